"""Rotary embedding by `npu_rotary_mul`, whose "interleave" mode is the formula of `wan_patches.ops.rope`."""

from __future__ import annotations

import torch

from wan_patches.ops.npu import function

_OP = "torch_npu:npu_rotary_mul"


def why_not(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Returns why `rotary_mul` does not support such input, or is missing from the installed torch_npu; or None.

    Documented limits of "interleave": four dimensions, batch * heads < 1000, an even head_dim < 896, tables
    `(1, seq, 1, head_dim)`. The result is contiguous, like stock's unless the axes of `x` are in another order.
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
        A new tensor like `x`. Intended to be EXACT, verified by the gate. Computed in fp32 and rounded once, as in
        stock, because the operation's handling of half precision with fp32 tables is not documented.
    """
    op = function(_OP)
    assert op is not None  # see `why_not`
    return op(x.float(), _pairs(cos), _pairs(sin), "interleave").to(x.dtype)


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """Repeats each value twice, in one copy; a table is small, as it has only one head."""
    return table.unsqueeze(-1).expand(*table.shape, 2).flatten(-2)
