"""Queries and keys in attention: RMS norms, and the rotary embedding of both in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.utils import is_torch_npu_available
from torch import nn

from wan_patches.bindings.forwards import is_untouched
from wan_patches.bindings.stock_functions import are_torch_functions
from wan_patches.ops import rms_norm as ops
from wan_patches.ops import triton
from wan_patches.ops.fused_norm import rms_norm_rope
from wan_patches.ops.npu.norms import rms_norm
from wan_patches.ops.rope import apply_rotary_emb_qk
from wan_patches.ops.tracing import is_observed
from wan_patches.patches import rope
from wan_patches.patching import tally

#: A family's rotary embedding function for one tensor, as diffusers defines it.
Rotate = Callable[..., torch.Tensor]


def qk_norm(norm: nn.RMSNorm, x: torch.Tensor, tables: object = None) -> torch.Tensor:
    """Returns `norm(x)` for `x` of `(batch, seq, dim)`, or `x` unchanged if `norm_and_rotate_both` will apply the norm.

    A plain `torch.nn.RMSNorm` is not called as a module.

    tables: what `x` will be rotated by; None if it is not rotated.
    """
    if torch.compiler.is_compiling():
        return norm(x)
    if tables is not None and _is_left_to_rotation(norm, x):
        return x
    reason = ops.rms_norm.why_small(x) or _reason_against_norm(norm, x)
    if reason is not None:
        tally.count(ops.rms_norm.name, "", reason)
        return norm(x)
    return ops.rms_norm(x, norm.weight, norm.eps)


def head_norm(norm: nn.RMSNorm, x: torch.Tensor, cast: bool = False) -> torch.Tensor:
    """Returns the norm of each head in `x`, `(batch, seq, heads, head_dim)`, as `qk_norm` does that of each token.

    cast: for `norm(x.float()).type_as(x)`.
    """
    if not torch.compiler.is_compiling():
        reason = ops.rms_norm.why_small(x)
        if reason is None and (x.dim() != 4 or not x.is_contiguous()):
            reason = "the heads do not lie next to each other"
        if reason is None:
            heads = x.flatten(1, 2)
            reason = _reason_against_norm(norm, heads)
            if reason is None:
                return ops.rms_norm(heads, norm.weight, norm.eps, cast).view(x.shape)
        tally.count(ops.rms_norm.name, "", reason)
    return norm(x.float()).type_as(x) if cast else norm(x)


def norm_of_diffusers(stock: Callable[..., torch.Tensor], norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Computes `stock(norm, x)`, the forward of diffusers' own class of norms, which many transformers use.

    x: `(..., dim)`.
    """
    if torch.compiler.is_compiling():
        return stock(norm, x)
    op = ops.twice_rounded
    reason = op.why_small(x)
    if reason is None and (not x.is_cpu or is_torch_npu_available()):
        reason = "on other devices than CPUs the norm is diffusers'"
    if reason is None and norm.bias is not None:
        reason = "the norm has a bias"
    if reason is None:
        return op(x, norm.weight, norm.eps)
    tally.count(op.name, "", reason)
    return stock(norm, x)


def rotate_both(
    rotate: Rotate, query: torch.Tensor, key: torch.Tensor, *tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `rotate(query, *tables), rotate(key, *tables)`, in one launch if a kernel handles both.

    rotate: diffusers' function. Its behaviour is known only while the `rope` patch is active in it.
    query, key: `(batch, seq, heads, head_dim)`.
    tables: cosines and sines, `(1 or batch, seq, 1, head_dim)` each, or both in one, `(1 or batch, seq, 2 * head_dim)`.
    """
    if _reason_against_both(rotate, query) is not None:
        return rotate(query, *tables), rotate(key, *tables)
    return apply_rotary_emb_qk(query, key, *_halves(tables))


def norm_and_rotate_both(
    rotate: Rotate,
    norm_q: nn.RMSNorm,
    norm_k: nn.RMSNorm,
    query: torch.Tensor,
    key: torch.Tensor,
    *tables: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies `rotate_both` after any norms that `qk_norm` deferred to it, in one pass if a kernel does both."""
    left_q, left_k = _is_left_to_rotation(norm_q, query), _is_left_to_rotation(norm_k, key)
    if left_q and left_k and _reason_against_both(rotate, query) is None:
        assert norm_q.eps is not None  # a default eps has no known rounding; `_is_left_to_rotation` checked
        assert norm_k.eps is not None
        weights, eps = (norm_q.weight, norm_k.weight), (norm_q.eps, norm_k.eps)
        return ops.rms_norm_rope_qk(query, key, weights, eps, *_halves(tables))
    query = _normed(norm_q, query) if left_q else query
    key = _normed(norm_k, key) if left_k else key
    return rotate_both(rotate, query, key, *tables)


def close_qk_norm(norm: nn.RMSNorm, x: torch.Tensor, tables: object = None) -> torch.Tensor:
    """Returns `qk_norm` with different rounding, or `x` unchanged if `close_rotate_both` will apply the norm."""
    if tables is not None and _is_left_to_rotation(norm, x):
        return x
    if x.device.type != "npu" or not _is_plain_rms_norm(norm, x):
        return qk_norm(norm, x)
    return rms_norm(x, norm.weight, norm.eps)


def close_rotate_both(
    rotate: Rotate,
    norm_q: nn.RMSNorm,
    norm_k: nn.RMSNorm,
    query: torch.Tensor,
    key: torch.Tensor,
    *tables: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies `rotate_both` after any norms that `close_qk_norm` deferred to it."""
    left_q, left_k = _is_left_to_rotation(norm_q, query), _is_left_to_rotation(norm_k, key)
    if not left_q and not left_k:
        return rotate_both(rotate, query, key, *tables)
    return (
        _normed_and_rotated(rotate, norm_q, query, tables) if left_q else rotate(query, *tables),
        _normed_and_rotated(rotate, norm_k, key, tables) if left_k else rotate(key, *tables),
    )


def _normed_and_rotated(
    rotate: Rotate, norm: nn.RMSNorm, x: torch.Tensor, tables: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    if _reason_against_both(rotate, x) is not None:
        return rotate(_normed(norm, x), *tables)
    assert norm.eps is not None
    return rms_norm_rope(x, norm.weight, norm.eps, *_halves(tables))


def _normed(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm(x.flatten(2)).unflatten(2, x.shape[2:])


def _is_left_to_rotation(norm: nn.RMSNorm, x: torch.Tensor) -> bool:
    """Whether one kernel applies norm and rotation; splitting `x` into heads does not change the answer."""
    return (
        not torch.compiler.is_compiling()
        and triton.is_usable(x.device)
        and _is_plain_rms_norm(norm, x)
        and norm.weight is not None
        and norm.eps is not None
        and not is_observed(x, norm.weight)
    )


def _reason_against_norm(norm: nn.RMSNorm, x: torch.Tensor) -> str | None:
    if not x.is_cpu:
        return "on other devices than CPUs the norm is torch's"
    return None if _is_plain_rms_norm(norm, x) else "the norm is another, is watched, or is being compiled"


def _is_plain_rms_norm(norm: nn.RMSNorm, x: torch.Tensor) -> bool:
    """Whether `norm` is a plain `torch.nn.RMSNorm` over all features of a token in `x`, and nothing observes it."""
    return not torch.compiler.is_compiling() and (
        type(norm) is torch.nn.RMSNorm
        and is_untouched(norm)
        and norm.normalized_shape == (x.shape[2:].numel(),)
        and are_torch_functions(F.rms_norm, torch.rms_norm)
    )


def _reason_against_both(rotate: Rotate, query: torch.Tensor) -> str | None:
    if torch.compiler.is_compiling() or not triton.is_usable(query.device):
        return "there is no kernel to take queries and keys together"
    if rope.CALL not in getattr(getattr(rotate, "__code__", None), "co_names", ()):
        return "`rope` is not in force in the function that is called"
    return None


def _halves(tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines, one value for each pair of channels."""
    cos, sin = tables if len(tables) > 1 else tables[0].unsqueeze(-2).chunk(2, dim=-1)
    return cos[..., 0::2], sin[..., 1::2]
