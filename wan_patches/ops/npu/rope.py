"""Rotary embedding by `npu_rotary_mul`, whose "interleave" mode is the formula of `wan_patches.ops.rope`."""

from __future__ import annotations

import torch

from wan_patches.ops.npu import function

_OP = "torch_npu:npu_rotary_mul"


def why_not(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why `rotary_mul` does not take such input, or the installed torch_npu has no such operation; None where it does.

    Documented limits of "interleave": four dimensions, batch * heads < 1000, an even head_dim < 896, tables
    `(1, seq, 1, head_dim)`. The result is contiguous, which stock's is unless `x` has its axes in another order.
    """
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "npu_rotary_mul is not for such queries and keys"
    batch, seq, heads, dim = x.shape
    half = (1, seq, 1, dim // 2)
    if batch * heads >= 1000 or dim >= 896 or dim % 2:
        return "npu_rotary_mul is not for such queries and keys"
    if any(table.shape != half or table.dtype != torch.float32 for table in (cos, sin)):
        return "npu_rotary_mul is not for such tables"
    if any(one < other for one, other in zip(x.stride(), x.stride()[1:])):
        return "the result of npu_rotary_mul would lie in another order in memory"
    return None if function(_OP) is not None else "torch_npu has no npu_rotary_mul"


def rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of neighbouring channels.

    Args:
        x: `(batch, seq, heads, head_dim)`; fp32, bf16 or fp16.
        cos, sin: `(1, seq, 1, head_dim / 2)`, fp32.

    Returns:
        A new tensor like `x`. Meant to be EXACT, behind the gate. Computed in fp32 and rounded once, as stock does:
        what the operation makes of half precision beside tables in fp32 is not documented.
    """
    op = function(_OP)
    assert op is not None  # see `why_not`
    return op(x.float(), _pairs(cos), _pairs(sin), "interleave").to(x.dtype)


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """Each value twice, in one copy: of a table, which is as small as one of many heads."""
    return table.unsqueeze(-1).expand(*table.shape, 2).flatten(-2)
