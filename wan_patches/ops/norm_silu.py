"""RMS norm over channels followed by SiLU, which precedes most convolutions of Wan's video autoencoder.

    silu(x / max(|x|, 1e-12) * scale * gamma + bias), |x| over the channels of each position

Every operation is rounded to the dtype of `x`; for half dtypes, newer diffusers versions compute the quotient in fp32.
EXACT on accelerators means ATen's own reduction for |x|, and for the rest a kernel that rounds at the same points as
ATen. The kernel writes to where the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import Key, key_of, op

Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 12  # elements below which stock's operations run; not measured yet
_GRID = 65535  # blocks along the second and third axis of a launch


@dataclass(frozen=True)
class Memory:
    """Where a kernel writes its result; the reference does not, so that the two can be compared.

    frames: like the result, any strides except that the pixels of a row are adjacent.
    last: like the result's last frames, one or two, with adjacent rows; None if nobody needs them twice.
    """

    frames: torch.Tensor
    last: torch.Tensor | None = None


def _key(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> Key | None:
    return key_of(x, scale, gamma, bias, in_fp32, memory.frames, memory.last, length)


@op("RMS norm + SiLU", key=_key)
def norm_silu(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Returns SiLU of the RMS norm of `x` over its channels, and once more its last frames if `memory` has a place.

    Args:
        x: `(batch, channels, frames, height, width)`, any strides.
        norm: stock's formulation of the norm, called with `x`, `gamma` and `bias`, on CPUs and where no kernel runs.
        scale, gamma, bias: the norm's parameters: a number; `channels` values; the same or None.
        in_fp32: whether `norm` divides in fp32 if `x` has a half dtype.
        memory: where a kernel writes.
        length: |x|, `(batch, 1, frames, height, width)`, if it is known, in the dtype of the quotient.

    Returns:
        The tensors of `memory` themselves, if a kernel wrote them; else new ones.
    """
    y = F.silu(norm(x, gamma, bias), inplace=True)
    return (y,) if memory.last is None else (y, y[:, :, y.shape[2] - memory.last.shape[2] :])


@norm_silu.form("a kernel after the reduction", device="cuda", smallest=_SMALL)
def by_kernel(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    if length is None:
        dtype = torch.float32 if in_fp32 else x.dtype
        length = torch.linalg.vector_norm(x, 2.0, 1, keepdim=True, dtype=dtype)  # casts as it reads
    return _launch(x, length, scale, gamma, bias, memory)


@norm_silu.form("a kernel after a cast and the reduction", device="cuda", smallest=_SMALL)
def by_kernel_after_cast(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    return _launch(x, x.float().norm(2.0, 1, keepdim=True), scale, gamma, bias, memory)


def _launch(
    x: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    memory: Memory,
) -> tuple[torch.Tensor, ...]:
    from wan_patches.ops.triton.norm_silu import norm_silu as kernel

    kernel(x, length.contiguous(), scale, gamma, bias, memory.frames, memory.last)
    return (memory.frames,) if memory.last is None else (memory.frames, memory.last)


@by_kernel.refuses
def _reason_against(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
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
    fits = all(part.dtype == x.dtype and part.is_contiguous() for part in (gamma, bias) if part is not None)
    return None if fits else "the weight does not fit"


@by_kernel.confirms
def _(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> bool:
    """Compares the lengths themselves: in half dtypes, few results show that sums have another order."""
    if not in_fp32 or x.dtype == torch.float32 or length is not None:
        return True
    found = torch.linalg.vector_norm(x, 2.0, 1, keepdim=True, dtype=torch.float32)
    return torch.equal(found, x.float().norm(2.0, 1, keepdim=True))


def _has_adjacent_rows(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]


@by_kernel_after_cast.refuses
def _(
    x: torch.Tensor,
    norm: Norm,
    scale: float,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp32: bool,
    memory: Memory,
    length: torch.Tensor | None = None,
) -> str | None:
    if not in_fp32 or x.dtype == torch.float32 or length is not None:
        return "nothing is cast"
    return _reason_against(x, norm, scale, gamma, bias, in_fp32, memory)
