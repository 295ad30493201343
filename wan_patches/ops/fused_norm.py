"""Norms fused with the operations before and after them, in one pass over memory. CLOSE: only rounding differs.

Contains the ops of `wan_patches.ops.modulation` under the same names, for norms with known parameters, and RMS norms
with the rotary embedding. A row stays in fp32 from load to store. The error is verified at first sight: on a sample of
the tokens, the mean error against float64 must be at most 1.01 times that of stock's operations. Residual sums keep
their bits. Where there is no kernel, the exact forms run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wan_patches.ops import modulation as exact
from wan_patches.ops import rope
from wan_patches.ops import triton as kernels
from wan_patches.ops.accuracy import SAMPLE, double, is_as_accurate
from wan_patches.ops.dispatch import op
from wan_patches.ops.modulation import LayerNorm, Modulation
from wan_patches.ops.npu import norms as npu
from wan_patches.patching.fidelity import Fidelity

Pair = tuple[torch.Tensor, torch.Tensor]


# Agreement of the forms with float64


def _norm_agrees(
    ours: torch.Tensor,
    stock: torch.Tensor,
    h: torch.Tensor,
    norm: LayerNorm,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
) -> bool:
    """Whether a norm of `h`, modulated or not, is as accurate as stock's."""
    tokens = _some(h.shape[1])
    weight, bias = (None if tensor is None else double(tensor) for tensor in (norm.weight, norm.bias))
    truth = F.layer_norm(double(h[:, tokens]), h.shape[-1:], weight, bias, norm.eps)
    if scale is not None and shift is not None:
        factor, term = (double(exact.as_tensor(rows)[:, tokens]) for rows in (scale, shift))
        truth = truth * (1 + factor) + term
    return is_as_accurate(ours[:, tokens], stock[:, tokens], truth)


def _residual_agrees(
    ours: Pair,
    stock: Pair,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> bool:
    return torch.equal(ours[0], stock[0]) and _norm_agrees(ours[1], stock[1], stock[0], norm, scale, shift)


def _rotation_agrees(
    ours: torch.Tensor,
    stock: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> bool:
    tokens = _some(x.shape[1])
    wide = double(x[:, tokens].flatten(2))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * double(weight)
    reference = rope.apply_rotary_emb.reference
    truth = reference(normed.unflatten(2, x.shape[2:]), double(cos[:, tokens]), double(sin[:, tokens]))
    return is_as_accurate(ours[:, tokens], stock[:, tokens], truth)


def _some(seq: int) -> slice:
    """Selects tokens spread over a sequence."""
    return slice(None, None, max(1, seq // SAMPLE))


# The ops


@op("modulated norm in one pass", fidelity=Fidelity.CLOSE, agree=_norm_agrees)
def modulated_norm(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """Computes `wan_patches.ops.modulation.modulated_norm` in one kernel on GPUs."""
    return exact.modulated_norm.reference(x, norm, scale, shift)


@op("cast norm in one pass", fidelity=Fidelity.CLOSE, agree=_norm_agrees)
def cast_norm(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Computes `wan_patches.ops.modulation.cast_norm` in one kernel on GPUs and one operation on NPUs."""
    return exact.cast_norm.reference(x, norm)


@op("residual norm in one pass", fidelity=Fidelity.CLOSE, agree=_residual_agrees)
def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    """Computes `wan_patches.ops.modulation.residual_norm` in one kernel on GPUs; on NPUs its norm is `cast_norm`."""
    return exact.residual_norm.reference(x, y, gate, norm, scale, shift)


@op("RMS norm and rotary embedding in one pass", fidelity=Fidelity.CLOSE, agree=_rotation_agrees)
def rms_norm_rope(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Applies the RMS norm over all heads of `x`, then the rotary embedding, in one kernel on GPUs.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`.
        weight: `(heads * head_dim,)`.
        eps: added to the mean square.
        cos, sin: as in `wan_patches.ops.rope.apply_rotary_emb`, fp32.
    """
    return rope.apply_rotary_emb.reference(_normed(x, weight, eps), cos, sin)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.flatten(2), weight.shape, weight, eps).unflatten(2, x.shape[2:])


# One kernel

_KERNEL = "one kernel"


@modulated_norm.form(_KERNEL, device="cuda", smallest=exact.SMALL_ELSEWHERE)
def modulated_norm_kernel(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.close import layer_norm_modulate

    rows = exact.as_rows(scale), exact.as_rows(shift)
    return layer_norm_modulate(x, norm.weight, norm.bias, *rows, norm.eps, exact.border_of(scale))


@cast_norm.form(_KERNEL, device="cuda", smallest=exact.SMALL_ELSEWHERE)
def cast_norm_kernel(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    from wan_patches.ops.triton.close import layer_norm_modulate

    return layer_norm_modulate(x, norm.weight, norm.bias, None, None, norm.eps, None)


@residual_norm.form(_KERNEL, device="cuda", smallest=exact.SMALL_ELSEWHERE)
def residual_norm_kernel(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    from wan_patches.ops.triton.close import residual_layer_norm_modulate

    modulations = (gate, scale, shift)
    gate_rows, factor, term = (None if modulation is None else exact.as_rows(modulation) for modulation in modulations)
    split_index = next((exact.border_of(modulation) for modulation in modulations if modulation is not None), None)
    return residual_layer_norm_modulate(x, y, gate_rows, norm.weight, norm.bias, factor, term, norm.eps, split_index)


@rms_norm_rope.form(_KERNEL, device="cuda", smallest=exact.SMALL_ELSEWHERE)
def rms_norm_rope_kernel(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    from wan_patches.ops.triton.close import rms_norm_rope

    return rms_norm_rope(x.flatten(2), weight, eps, cos, sin, x.shape[2])


@modulated_norm_kernel.refuses
def _(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> str | None:
    return _why_no_kernel(x, norm, scale, shift)


@cast_norm_kernel.refuses
def _(x: torch.Tensor, norm: LayerNorm) -> str | None:
    return _why_no_kernel(x, norm)


@residual_norm_kernel.refuses
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> str | None:
    return _why_no_kernel(x, norm, gate, scale, shift) or exact.why_not_sum(x, y, gate) or exact.why_strided(y)


@rms_norm_rope_kernel.refuses
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if not weight.is_contiguous() or weight.dtype not in exact.DTYPES:
        return "the weight does not fit"
    return rope.why_no_kernel(x, cos, sin)


def _why_no_kernel(x: torch.Tensor, norm: LayerNorm, *modulations: Modulation | None) -> str | None:
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    if (reason := exact.why_not(x, *modulations) or exact.why_strided(x)) is not None:
        return reason
    from wan_patches.ops.triton.close import MAX_DIM

    given = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    fits = x.shape[-1] <= MAX_DIM and all(
        tensor.dtype in exact.DTYPES and tensor.device == x.device and tensor.is_contiguous() for tensor in given
    )
    return None if fits else "the hidden states are too wide, or the weights do not fit"


# One operation of torch_npu


@cast_norm.form("npu_layer_norm_eval", device="npu")
def cast_norm_on_npu(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    return npu.layer_norm(x, norm.weight, norm.bias, norm.eps)


@residual_norm.form("npu_layer_norm_eval after the residual sum", device="npu")
def residual_norm_on_npu(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> Pair:
    h = x + y if gate is None else exact.gated_residual_in_place(x, y, gate)
    return h, cast_norm_on_npu(h, norm)


@cast_norm_on_npu.refuses
def _(x: torch.Tensor, norm: LayerNorm) -> str | None:
    return npu.why_no_layer_norm(x, norm.weight, norm.bias)


@residual_norm_on_npu.refuses
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> str | None:
    if scale is not None or shift is not None:
        return "npu_layer_norm_eval does not modulate"
    sums = exact.why_not(x, gate) or exact.why_not_sum(x, y, gate)
    return sums or npu.why_no_layer_norm(x, norm.weight, norm.bias)


# The exact forms, as a fallback


@rms_norm_rope.form("one after the other")
def _one_after_the_other(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return rope.apply_rotary_emb(_normed(x, weight, eps), cos, sin)


modulated_norm.forms_of(exact.modulated_norm)
cast_norm.forms_of(exact.cast_norm)
residual_norm.forms_of(exact.residual_norm)
