"""Norms with what stands before and after them in one pass over memory. CLOSE: only rounding moves.

The functions of `wan_patches.ops.modulation` by the same names, for norms that tell their parameters, and RMS norms
with the rotary embedding: a row stays in fp32 from where it is read to where the result is stored. How far that is from
the truth proves itself at first sight: on a sample of the tokens, its mean error against float64 must be at most 1.01
times that of stock's operations. Residual sums keep their bits. Where there is no kernel, the exact forms run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from wan_patches.fidelity import Fidelity, gate, signature
from wan_patches.ops import modulation as exact
from wan_patches.ops import rope
from wan_patches.ops import triton as kernels
from wan_patches.ops.accuracy import SAMPLE, double, is_as_accurate
from wan_patches.ops.modulation import Modulation
from wan_patches.ops.tracing import is_observed

Pair = tuple[torch.Tensor, torch.Tensor]


class LayerNorm(Protocol):
    """A layer norm over the last axis, in fp32, which returns new memory."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def modulated_norm(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """`wan_patches.ops.modulation.modulated_norm`, in one kernel on GPUs."""
    if not _has_kernel(x, norm, scale, shift):
        return exact.modulated_norm(x, norm, scale, shift)
    return _gated(x, None, None, norm, scale, shift)[1]


def cast_norm(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """`wan_patches.ops.modulation.cast_norm`, in one kernel on GPUs and one operation on NPUs."""
    if x.device.type == "npu":
        from wan_patches.ops.npu.norms import layer_norm

        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if not _has_kernel(x, norm):
        return exact.cast_norm(x, norm)
    return _gated(x, None, None, norm, None, None)[1]


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    by: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    """`wan_patches.ops.modulation.residual_norm`, in one kernel on GPUs; on NPUs its norm is `cast_norm`."""
    if x.device.type == "npu" and scale is None:
        h = x + y if by is None else exact.gated_residual(x, y, by)
        return h, cast_norm(h, norm)
    modulations = [modulation for modulation in (by, scale, shift) if modulation is not None]
    if not _has_kernel(x, norm, *modulations) or not exact.is_like(y, x) or (by is None and y.dtype != x.dtype):
        return exact.residual_norm(x, y, by, norm, scale, shift)
    return _gated(x, y, by, norm, scale, shift)


def rms_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    plain: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """The RMS norm of `x` over all its heads and the rotary embedding of that, in one kernel on GPUs.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`.
        weight: `(heads * head_dim,)`.
        eps: added to the mean square.
        cos, sin: as in `wan_patches.ops.rope.apply_rotary_emb`, fp32.
        plain: the formulation that it stands for; runs where there is no kernel.
    """
    if (
        not rope.has_kernel(x, cos, sin)
        or not weight.is_contiguous()
        or not {x.dtype, weight.dtype} <= set(exact.DTYPES)
    ):
        return plain()
    key = (*signature(x, weight, cos, sin), eps)

    def agree(ours: torch.Tensor, stock: torch.Tensor) -> bool:
        tokens = _some(x.shape[1])
        wide = double(x[:, tokens].flatten(2))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * double(weight)
        truth = rope.reference(normed.unflatten(2, x.shape[2:]), double(cos[:, tokens]), double(sin[:, tokens]))
        return is_as_accurate(ours[:, tokens], stock[:, tokens], truth)

    def kernel(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from wan_patches.ops.triton.close import rms_norm_rope

        return rms_norm_rope(x.flatten(2), weight, eps, cos, sin, x.shape[2])

    args = (x, weight, cos, sin)
    name = "RMS norm and rope in one pass"
    return gate(name, key, kernel, lambda *_: plain(), *args, agree=agree, fidelity=Fidelity.CLOSE)


def _gated(
    x: torch.Tensor,
    y: torch.Tensor | None,
    by: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    tensors = [tensor for tensor in (x, y, norm.weight, norm.bias) if tensor is not None]
    given = tuple(None if modulation is None else exact.kind_of(modulation) for modulation in (by, scale, shift))
    key = (*signature(*tensors), norm.weight is None, norm.eps, y is None, given)
    agree = _no_less_accurate(norm, scale, shift)
    args = (x, y, by, norm, scale, shift)
    return gate("layer norm in one pass", key, _kernel, _plain, *args, agree=agree, fidelity=Fidelity.CLOSE)


def _kernel(
    x: torch.Tensor,
    y: torch.Tensor | None,
    by: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    from wan_patches.ops.triton.close import layer_norm_modulate, residual_layer_norm_modulate

    modulations = (by, scale, shift)
    by_rows, factor, term = (None if modulation is None else exact.as_rows(modulation) for modulation in modulations)
    border = next((exact.border_of(modulation) for modulation in modulations if modulation is not None), None)
    if y is None:
        return x, layer_norm_modulate(x, norm.weight, norm.bias, factor, term, norm.eps, border)
    return residual_layer_norm_modulate(x, y, by_rows, norm.weight, norm.bias, factor, term, norm.eps, border)


def _plain(
    x: torch.Tensor,
    y: torch.Tensor | None,
    by: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    if y is not None:
        return exact.plain_residual_norm(x, y, by, norm, scale, shift)
    if scale is None or shift is None:
        return x, exact.plain_cast_norm(x, norm)
    return x, exact.plain_modulated_norm(x, norm, scale, shift)


def _no_less_accurate(norm: LayerNorm, scale: Modulation | None, shift: Modulation | None) -> Callable[..., bool]:
    def agree(ours: Pair, stock: Pair) -> bool:
        h, normed = stock
        if not torch.equal(ours[0], h):
            return False
        tokens = _some(h.shape[1])
        weight, bias = (None if tensor is None else double(tensor) for tensor in (norm.weight, norm.bias))
        truth = F.layer_norm(double(h[:, tokens]), h.shape[-1:], weight, bias, norm.eps)
        if scale is not None and shift is not None:
            factor, term = (double(exact.as_tensor(rows)[:, tokens]) for rows in (scale, shift))
            truth = truth * (1 + factor) + term
        return is_as_accurate(ours[1][:, tokens], normed[:, tokens], truth)

    return agree


def _some(seq: int) -> slice:
    """Tokens from all over a sequence."""
    return slice(None, None, max(1, seq // SAMPLE))


def _has_kernel(x: torch.Tensor, norm: LayerNorm, *modulations: Modulation) -> bool:
    if not kernels.is_usable(x.device) or not exact.is_fast(x, *modulations):
        return False
    from wan_patches.ops.triton.close import MAX_DIM

    given = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    return (
        x.shape[-1] <= MAX_DIM
        and not is_observed(x, *given)
        and all(
            tensor.dtype in exact.DTYPES and tensor.device == x.device and tensor.is_contiguous() for tensor in given
        )
    )
