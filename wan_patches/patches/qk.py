"""Queries and keys in the attention of Wan, Helios and their relatives: their RMS norms, and both rotated in one call.

The rotary embedding itself belongs to `rope`: there is code, of other libraries too, that calls it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wan_patches.bindings.forwards import is_untouched
from wan_patches.bindings.originals import are_torchs
from wan_patches.patches import rope
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Block, Edit, Replace

_NORM, _BOTH = "_wan_patches_qk_norm", "_wan_patches_rotate_both"
_CLOSE_NORM, _CLOSE_BOTH = "_wan_patches_close_qk_norm", "_wan_patches_close_rotate_both"


def _rotations(of: str, function: str, both: str, fingerprint: str) -> Block:
    """The two calls of `function`, whose results are named `of`."""
    query, key = of.split(", ")
    return Block(
        first=f"{query} = {function}(query, TABLES)",
        last=f"{key} = {function}(key, TABLES)",
        replacement=f"{of} = {both}, query, key, TABLES)",  # `TABLES` may be `*tables`
        fingerprints=frozenset((fingerprint,)),
        declined=(("34741dbe344db518", rope.COMPLEX),),
    )


@dataclass(frozen=True)
class Attention:
    """A function that norms and rotates queries and keys.

    module, function, formerly: where it is, and what it was called in older versions.
    rotate, fingerprint: what it calls for the rotation, and the fingerprint of its two calls.
    norms: of the attention module, those that it calls.
    of: what the rotated queries and keys are called.
    optional: of another library, which may not be there.
    """

    module: str
    function: str
    norms: tuple[str, ...]
    formerly: str | None = None
    rotate: str = "apply_rotary_emb"
    fingerprint: str = "cfeb02973e924dc2"
    of: str = "query, key"
    optional: bool = False


def exact(where: Attention) -> Patch:
    """Norms without the calls of their modules, and both rotations in one call."""
    edits = [Replace(f"attn.{norm}(X)", f"{_NORM}(attn.{norm}, X)") for norm in where.norms]
    implementations = {
        "CPUs": "norms a few tokens at a time",
        "CUDA with Triton": "where `rope` is in force, one kernel for queries and keys",
    }
    calls = {_NORM: f"{__name__}:qk_norm", _BOTH: f"{__name__}:rotate_both"}
    return _patch(where, edits, f"{_BOTH}({where.rotate}", calls, Fidelity.EXACT, implementations)


def close(where: Attention) -> Patch:
    """With the norm of what is rotated left to the rotation."""
    rotated = "norm_q", "norm_k"
    edits = [
        Replace(f"attn.{norm}(X)", f"{_CLOSE_NORM}(attn.{norm}, X{', rotary_emb' if norm in rotated else ''})")
        for norm in where.norms
    ]
    both = f"{_CLOSE_BOTH}({where.rotate}, attn.norm_q, attn.norm_k"
    implementations = {
        "CPUs": "norms a few tokens at a time",
        "CUDA with Triton": "where `rope` is in force, one kernel for norm and rotation",
        "NPUs": "npu_rms_norm",
    }
    calls = {_CLOSE_NORM: f"{__name__}:close_qk_norm", _CLOSE_BOTH: f"{__name__}:close_rotate_both"}
    return _patch(where, edits, both, calls, Fidelity.CLOSE, implementations)


def _patch(
    where: Attention,
    norms: list[Replace],
    both: str,
    calls: Mapping[str, object],
    fidelity: Fidelity,
    implementations: dict[str, str],
) -> Patch:
    edits: tuple[Edit, ...] = (*norms, _rotations(where.of, where.rotate, both, where.fingerprint))
    return Patch(
        name="qk",
        module=where.module,
        targets=(Target(where.function, edits, where.formerly),),
        calls=calls,
        fidelity=fidelity,
        implementations=implementations,
        optional=where.optional,
        runs_with="modulation",
    )


def _of_diffusers(module: str, processor: str, *norms: str, **more: Any) -> Attention:
    call, formerly = f"{processor}.__call__", f"{processor}2_0.__call__"
    return Attention(f"diffusers.models.transformers.{module}", call, norms, formerly, **more)


NORMS = ("norm_q", "norm_k", "norm_added_k")
_ATTENTION = (  # VACE uses Wan's
    _of_diffusers("transformer_wan", "WanAttnProcessor", *NORMS),
    _of_diffusers("transformer_wan_animate", "WanAttnProcessor", *NORMS),
    _of_diffusers("transformer_skyreels_v2", "SkyReelsV2AttnProcessor", *NORMS),
    _of_diffusers("transformer_chronoedit", "WanAttnProcessor", *NORMS),
    _of_diffusers(
        "transformer_helios",
        "HeliosAttnProcessor",
        *NORMS[:2],
        rotate="apply_rotary_emb_transposed",
        fingerprint="e8a5d35d90adb046",
    ),
)

PATCHES = (
    *map(exact, _ATTENTION),
    *map(close, _ATTENTION),
    exact(
        _of_diffusers(
            "transformer_sana_video",
            "SanaLinearAttnProcessor3_0",
            fingerprint="f0da236efbb54f98",
            of="query_rotate, key_rotate",
        )
    ),
)


def qk_norm(norm: Any, x: Any) -> Any:
    """`norm(x)` for `x` of `(batch, seq, dim)`: without the call where it is `torch.nn.RMSNorm` and nothing else."""
    import torch

    from wan_patches.ops import rms_norm as ops  # a name of the package costs half of one that is in the module

    if torch.compiler.is_compiling():
        return norm(x)
    reason = ops.rms_norm.why_small(x) or _reason_against_norm(norm, x)
    if reason is not None:
        tally.count(ops.rms_norm.name, "", reason)
        return norm(x)
    return ops.rms_norm(x, norm.weight, norm.eps)


def rotate_both(rotate: Callable[..., Any], query: Any, key: Any, *tables: Any) -> tuple[Any, Any]:
    """`rotate(query, *tables), rotate(key, *tables)`, at once where a kernel takes both.

    rotate: diffusers' function. What it computes is known while `rope` is in force in it, and only then.
    query, key: `(batch, seq, heads, head_dim)`.
    tables: cosines and sines, `(1 or batch, seq, 1, head_dim)` each, or both in one, `(1 or batch, seq, 2 * head_dim)`.
    """
    if _reason_against_both(rotate, query) is not None:
        return rotate(query, *tables), rotate(key, *tables)
    from wan_patches.ops.rope import apply_rotary_emb_qk

    return apply_rotary_emb_qk(query, key, *_halves(tables))


def close_qk_norm(norm: Any, x: Any, tables: Any = None) -> Any:
    """`qk_norm`, with rounding that moves; `x` itself where `close_rotate_both` will do it."""
    if tables is not None and _is_left_to_rotation(norm, x):
        return x
    if x.device.type != "npu" or not _is_torchs_own(norm, x):
        return qk_norm(norm, x)
    from wan_patches.ops.npu.norms import rms_norm

    return rms_norm(x, norm.weight, norm.eps)


def close_rotate_both(
    rotate: Callable[..., Any], norm_q: Any, norm_k: Any, query: Any, key: Any, *tables: Any
) -> tuple[Any, Any]:
    """`rotate_both`, after the norms that `close_qk_norm` has left to it."""
    left_q, left_k = _is_left_to_rotation(norm_q, query), _is_left_to_rotation(norm_k, key)
    if not left_q and not left_k:
        return rotate_both(rotate, query, key, *tables)
    return (
        _normed_and_rotated(rotate, norm_q, query, tables) if left_q else rotate(query, *tables),
        _normed_and_rotated(rotate, norm_k, key, tables) if left_k else rotate(key, *tables),
    )


def _normed_and_rotated(rotate: Callable[..., Any], norm: Any, x: Any, tables: tuple[Any, ...]) -> Any:
    if _reason_against_both(rotate, x) is not None:
        return rotate(norm(x.flatten(2)).unflatten(2, x.shape[2:]), *tables)
    from wan_patches.ops.fused_norm import rms_norm_rope

    return rms_norm_rope(x, norm.weight, norm.eps, *_halves(tables))


def _is_left_to_rotation(norm: Any, x: Any) -> bool:
    """Whether a kernel takes norm and rotation; the same answer for `x` before and after it was split into heads."""
    from wan_patches.ops import triton
    from wan_patches.ops.tracing import is_observed

    return (
        triton.is_usable(x.device)
        and _is_torchs_own(norm, x)
        and norm.weight is not None
        and norm.eps is not None
        and not is_observed(x, norm.weight)
    )


def _reason_against_norm(norm: Any, x: Any) -> str | None:
    if not x.is_cpu:
        return "on other devices than CPUs the norm is torch's"
    return None if _is_torchs_own(norm, x) else "the norm is another, is watched, or is being compiled"


def _is_torchs_own(norm: Any, x: Any) -> bool:
    """Whether a norm is `torch.nn.RMSNorm` of all that `x` has for a token, and nobody looks on."""
    import torch
    import torch.nn.functional as F

    return not torch.compiler.is_compiling() and (
        type(norm) is torch.nn.RMSNorm
        and is_untouched(norm)
        and norm.normalized_shape == (x.shape[2:].numel(),)
        and are_torchs(F.rms_norm, torch.rms_norm)
    )


def _reason_against_both(rotate: Callable[..., Any], query: Any) -> str | None:
    import torch

    from wan_patches.ops import triton

    if torch.compiler.is_compiling() or not triton.is_usable(query.device):
        return "there is no kernel to take queries and keys together"
    if rope.CALL not in getattr(getattr(rotate, "__code__", None), "co_names", ()):
        return "`rope` is not in force in the function that is called"
    return None


def _halves(tables: tuple[Any, ...]) -> tuple[Any, Any]:
    """Cosines and sines for each pair of channels."""
    cos, sin = tables if len(tables) > 1 else tables[0].unsqueeze(-2).chunk(2, dim=-1)
    return cos[..., 0::2], sin[..., 1::2]
