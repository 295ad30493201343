"""Laser attention of MindIE-SD (`mindiesd.attention_forward`), a kernel for long sequences on Ascend NPUs.

MindIE-SD is not on the package index: https://gitcode.com/Ascend/MindIE-SD. According to its documentation and source
(2.3), it computes in fp16 (bf16 input is cast, so values beyond 65504 overflow), ignores masks, has no backward, and is
intended for 4,000 tokens or more. Its environment variable MINDIE_SD_FA_TYPE overrides the requested kernel. Not run on
hardware.
"""

from __future__ import annotations

import torch

from wan_patches.ops.npu import function
from wan_patches.ops.tracing import is_observed

PATH = "mindiesd:attention_forward"

_DEVICE = "npu"
_MIN_TOKENS = 4000  # below, MindIE-SD itself prefers other kernels
_MAX_DIM = 128


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `laser_attention` supports such input: self-attention without autograd over a long sequence on an NPU."""
    return (
        query.device.type == _DEVICE
        and query.dim() == 4
        and query.shape == key.shape == value.shape
        and query.shape[1] >= _MIN_TOKENS
        and query.shape[3] <= _MAX_DIM
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and not is_observed(query, key, value)
        and function(PATH) is not None
    )


def laser_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Computes attention without a mask.

    Args:
        query, key, value: `(batch, seq, heads, head_dim)`, bf16 or fp16; see `fits`.
        scale: of the scores; None for `head_dim ** -0.5`.

    Returns:
        A tensor like `query`. Not bit-identical to any other attention, so only for users who select it by name.
    """
    op = function(PATH)
    assert op is not None  # see `fits`
    scale = None if scale is None else float(scale)  # integers are rejected
    options = {"opt_mode": "manual", "op_type": "ascend_laser_attention", "layout": "BNSD"}
    return op(query, key, value, scale=scale, head_first=False, **options)
