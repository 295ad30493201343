"""RMS norm over channels followed by SiLU, which precedes most convolutions of Wan's video autoencoder.

    silu(x / max(|x|, 1e-12) * scale * gamma + bias), |x| over the channels of each position

Every operation is rounded to the dtype of `x`; for half dtypes, newer diffusers versions compute the quotient in fp32.
EXACT on accelerators means ATen's own reduction for |x|, and for the rest a kernel that rounds at the same points as
ATen. The kernel writes to where the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import Key, key_of, op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 12  # elements below which stock's operations run; not measured yet
_GRID = 65535  # blocks along the second and third axis of a launch


class ChannelNorm(NamedTuple):
    """An RMS norm over channels.

    stock: stock's formulation, called with `x`, `gamma` and `bias`, on CPUs and where no kernel runs.
    scale, gamma, bias: a number; `channels` values; the same or None.
    in_fp32: whether `stock` divides in fp32 if `x` has a half dtype.
    """

    stock: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    scale: float
    gamma: torch.Tensor
    bias: torch.Tensor | None
    in_fp32: bool


@dataclass(frozen=True)
class Memory:
    """Where a kernel writes its result; the reference does not, so that the two can be compared.

    frames: like the result, any strides except that the pixels of a row are adjacent.
    last: like the result's last frames, one or two, with adjacent rows; None if nobody needs them twice.
    """

    frames: torch.Tensor
    last: torch.Tensor | None = None


def _key(x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None) -> Key | None:
    _, *parameters = norm
    return key_of(x, *parameters, memory.frames, memory.last, length)


@op("RMS norm + SiLU", key=_key)
def norm_silu(
    x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Returns SiLU of the RMS norm of `x` over its channels, and once more its last frames if `memory` has a place.

    Args:
        x: `(batch, channels, frames, height, width)`, any strides.
        norm: the norm.
        memory: where a kernel writes.
        length: |x|, `(batch, 1, frames, height, width)`, if it is known, in the dtype of the quotient.

    Returns:
        The tensors of `memory` themselves, if a kernel wrote them; else new ones.
    """
    y = F.silu(norm.stock(x, norm.gamma, norm.bias), inplace=True)
    return (y,) if memory.last is None else (y, y[:, :, y.shape[2] - memory.last.shape[2] :])


@norm_silu.form("a kernel after the reduction", device="cuda", smallest=_SMALL)
def by_kernel(
    x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    if length is None:
        length = _length(x, norm)
    return _launch(x, length, norm, memory)


@norm_silu.form("a kernel after a cast and the reduction", device="cuda", smallest=_SMALL)
def by_kernel_after_cast(
    x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return _launch(x, _length_after_cast(x), norm, memory)


def _length(x: torch.Tensor, norm: ChannelNorm) -> torch.Tensor:
    dtype = torch.float32 if norm.in_fp32 else x.dtype
    return torch.linalg.vector_norm(x, 2.0, 1, keepdim=True, dtype=dtype)  # casts as it reads


def _length_after_cast(x: torch.Tensor) -> torch.Tensor:
    return x.float().norm(2.0, 1, keepdim=True)


def _launch(x: torch.Tensor, length: torch.Tensor, norm: ChannelNorm, memory: Memory) -> tuple[torch.Tensor, ...]:
    from wan_patches.ops.triton.norm_silu import norm_silu as kernel

    kernel(x, length.contiguous(), norm.scale, norm.gamma, norm.bias, memory.frames, memory.last)
    return (memory.frames,) if memory.last is None else (memory.frames, memory.last)


@by_kernel.refuses
def _reason_against(
    x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None
) -> str | None:
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    frames, last = memory.frames, memory.last
    if x.dim() != 5 or x.dtype not in _DTYPES or not _has_adjacent_rows(x):
        return "the frames do not lie in memory row by row"
    if frames.stride(-1) != 1 or not (last is None or _has_adjacent_rows(last)):
        return "the result is not to lie in memory row by row"
    if x.shape[0] * x.shape[1] > _GRID or x.shape[2] > _GRID:
        return "there are too many frames or channels"
    parameters = [part for part in (norm.gamma, norm.bias) if part is not None]
    fits = all(part.dtype == x.dtype and part.is_contiguous() for part in parameters)
    return None if fits else "the weight does not fit"


@by_kernel.confirms
def _(x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None) -> bool:
    """Compares the lengths themselves: in half dtypes, few results show that sums have another order."""
    return not _is_cast(x, norm, length) or torch.equal(_length(x, norm), _length_after_cast(x))


def _is_cast(x: torch.Tensor, norm: ChannelNorm, length: torch.Tensor | None) -> bool:
    """Whether stock casts `x` for its lengths, which nobody knows yet."""
    return norm.in_fp32 and x.dtype != torch.float32 and length is None


def _has_adjacent_rows(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]


@by_kernel_after_cast.refuses
def _(x: torch.Tensor, norm: ChannelNorm, memory: Memory, length: torch.Tensor | None = None) -> str | None:
    return _reason_against(x, norm, memory) if _is_cast(x, norm, length) else "nothing is cast"
