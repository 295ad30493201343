"""RMS norm and layer norm by one operation of torch_npu each. CLOSE: only rounding moves.

How these operations round inside is not documented. So they prove themselves at first sight: on a sample of tokens
their mean error against float64 must be at most 1.01 times that of the formulation they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from wan_patches.fidelity import Fidelity, gate, signature
from wan_patches.ops.accuracy import SAMPLE, double, is_as_accurate
from wan_patches.ops.npu import function
from wan_patches.ops.tracing import is_observed

_RMS, _LAYER = "torch_npu:npu_rms_norm", "torch_npu:npu_layer_norm_eval"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None = None) -> torch.Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis.

    Args:
        x: `(..., dim)`, of two to eight axes; fp32, bf16 or fp16.
        weight: `(dim,)`, or None for ones; any floating dtype.
        eps: None for the machine epsilon that `torch.nn.functional.rms_norm` takes.

    Returns:
        A new tensor of the shape and dtype that `torch.nn.functional.rms_norm` gives. Off NPUs, for other input, and
        where a compiler, autograd or a transform looks on, that function's own.
    """
    plain = partial(F.rms_norm, normalized_shape=x.shape[-1:], weight=weight, eps=eps)
    if not _fits(x, _RMS, weight) or eps is None:
        return plain(x)
    key = (*signature(x, *(() if weight is None else (weight,))), eps)
    return _close("RMS norm", key, partial(_rms_norm, weight=weight, eps=eps), plain, _exact_rms_norm, x, weight, eps)


def layer_norm(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Layer norm of `x` in fp32, rounded to the dtype of `x`: as `FP32LayerNorm` of diffusers, without its casts.

    Args:
        x: `(..., dim)`; fp32, bf16 or fp16.
        normalized_shape: `(dim,)`; other shapes take the plain formulation.
        weight, bias: `(dim,)` or None, any floating dtype.
        eps: added to the variance.

    Returns:
        A new tensor of the shape and dtype of `x`. Off NPUs, for other input, and where a compiler, autograd or a
        transform looks on, the plain formulation.
    """
    plain = partial(_plain_layer_norm, normalized_shape=normalized_shape, weight=weight, bias=bias, eps=eps)
    if not _fits(x, _LAYER, weight, bias) or tuple(normalized_shape) != x.shape[-1:]:
        return plain(x)
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    key = (*signature(x, *given), weight is None, bias is None, eps)
    fast = partial(_layer_norm, weight=weight, bias=bias, eps=eps)
    return _close("layer norm", key, fast, plain, _exact_layer_norm, x, weight, bias, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    op = function(_RMS)
    assert op is not None  # see `_fits`
    if weight is None:
        return op(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps)[0]
    dtype = torch.promote_types(x.dtype, weight.dtype)  # both must be of one, and neither may lose digits
    return op(x.to(dtype), weight.to(dtype), eps)[0].to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    op = function(_LAYER)
    assert op is not None
    dtype = x.dtype
    for tensor in (weight, bias):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    return op(x.to(dtype), list(x.shape[-1:]), weight, bias, eps).to(x.dtype)


def _plain_layer_norm(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return F.layer_norm(x.float(), normalized_shape, weight, bias, eps).to(x.dtype)


def _fits(x: torch.Tensor, path: str, *parameters: torch.Tensor | None) -> bool:
    given = [tensor for tensor in parameters if tensor is not None]
    return (
        x.device.type == "npu"
        and x.dtype in _DTYPES
        and 2 <= x.dim() <= 8
        and x.numel() > 0
        and all(tensor.shape == x.shape[-1:] and tensor.dtype in _DTYPES for tensor in given)
        and not is_observed(x, *given)
        and function(path) is not None
    )


def _close(
    op: str,
    key: tuple[object, ...],
    fast: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor],
    exact: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *parameters: torch.Tensor | float | None,
) -> torch.Tensor:
    def no_worse(ours: torch.Tensor, stock: torch.Tensor) -> bool:
        truth = exact(*(_sample(p) if isinstance(p, torch.Tensor) else p for p in (x, *parameters)))
        return is_as_accurate(_sample(ours), _sample(stock), truth)

    return gate(op, key, fast, plain, x, agree=no_worse, fidelity=Fidelity.CLOSE)


def _sample(x: torch.Tensor) -> torch.Tensor:
    """Some tokens from all over `x`, in float64."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    return double(tokens[:: max(1, tokens.shape[0] // SAMPLE)])


def _exact_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight


def _exact_layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    weight, bias = (None if tensor is None else tensor[0] for tensor in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
