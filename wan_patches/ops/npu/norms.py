"""RMS norm and layer norm by one operation of torch_npu each. CLOSE: only rounding differs.

The internal rounding of these operations is not documented, so it is verified at first sight: on a sample of tokens,
the mean error against float64 must be at most 1.01 times that of the formulation they replace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wan_patches.ops.accuracy import SAMPLE, double, is_as_accurate
from wan_patches.ops.dispatch import op
from wan_patches.ops.npu import function
from wan_patches.patching.fidelity import Fidelity

_RMS, _LAYER = "torch_npu:npu_rms_norm", "torch_npu:npu_layer_norm_eval"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _agrees(ours: torch.Tensor, stock: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> bool:
    truth = _exact_rms_norm(_sample(x), None if weight is None else _sample(weight), eps)
    return is_as_accurate(_sample(ours), _sample(stock), truth)


@op("RMS norm by torch_npu", fidelity=Fidelity.CLOSE, agree=_agrees)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None = None) -> torch.Tensor:
    """Returns `x / sqrt(mean(x ** 2) + eps) * weight` over the last axis.

    Args:
        x: `(..., dim)`, of two to eight axes; fp32, bf16 or fp16.
        weight: `(dim,)`, or None for ones; any floating dtype.
        eps: None for the machine epsilon that `torch.nn.functional.rms_norm` uses.

    Returns:
        A new tensor with the shape and dtype of `torch.nn.functional.rms_norm`.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@rms_norm.form("npu_rms_norm", device="npu")
def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None = None) -> torch.Tensor:
    operation = function(_RMS)
    assert operation is not None  # see its refusal
    if weight is None:
        return operation(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps)[0]
    dtype = torch.promote_types(x.dtype, weight.dtype)  # the operation requires one dtype, and neither may lose digits
    return operation(x.to(dtype), weight.to(dtype), eps)[0].to(x.dtype)


@_rms_norm.refuses
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None = None) -> str | None:
    return "there is no eps" if eps is None else _why_not(x, _RMS, weight)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Returns the layer norm of `x` in fp32, rounded to its dtype: diffusers' `FP32LayerNorm` without the casts.

    Args:
        x: `(..., dim)`; fp32, bf16 or fp16.
        weight, bias: `(dim,)` or None, any floating dtype.
        eps: added to the variance.

    Returns:
        A new tensor of the shape and dtype of `x`.
    """
    operation = function(_LAYER)
    assert operation is not None  # see `why_no_layer_norm`
    dtype = x.dtype
    for tensor in (weight, bias):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    return operation(x.to(dtype), list(x.shape[-1:]), weight, bias, eps).to(x.dtype)


def why_no_layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    """Returns why `layer_norm` does not support such input, or is missing from the installed torch_npu; or None."""
    return _why_not(x, _LAYER, weight, bias)


def _why_not(x: torch.Tensor, path: str, *parameters: torch.Tensor | None) -> str | None:
    given = [tensor for tensor in parameters if tensor is not None]
    fits = x.dtype in _DTYPES and 2 <= x.dim() <= 8 and x.numel() > 0
    if not fits or any(tensor.shape != x.shape[-1:] or tensor.dtype not in _DTYPES for tensor in given):
        return "torch_npu's norm is not for such input"
    return None if function(path) is not None else f"torch_npu has no {path.partition(':')[2]}"


def _sample(x: torch.Tensor) -> torch.Tensor:
    """Returns tokens spread over `x`, in float64."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    return double(tokens[:: max(1, tokens.shape[0] // SAMPLE)])


def _exact_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight
