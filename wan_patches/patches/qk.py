"""Queries and keys in the attention of Wan, Helios, Kandinsky and related models.

Covers their RMS norms, and the rotary embedding of both in one call. The rotary embedding function itself belongs to
the `rope` patch, because other code, in other libraries too, calls it differently. AnyFlow, SANA, LTX 2, Qwen-Image and
many others have norms of diffusers' own class, which rounds differently from torch's; the class itself is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wan_patches.patches import rope
from wan_patches.patches.versions import since
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Block, Body, Edit, Replace

_HERE = "wan_patches.bindings.qk"
_NORM, _BOTH = "_wan_patches_qk_norm", "_wan_patches_norm_and_rotate_both"
_ROTATIONS = "_wan_patches_rotate_both"
_HEAD_NORM = "_wan_patches_head_norm"
_OWN_NORM, _STOCK = "_wan_patches_norm_of_diffusers", "_wan_patches_stock_norm"
_CLOSE_NORM, _CLOSE_BOTH = "_wan_patches_close_qk_norm", "_wan_patches_close_rotate_both"


def _rotations(of: str, function: str, both: str, fingerprint: str) -> Block:
    """Returns the edit of the two calls of `function`, whose results are named `of`."""
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
    """A function that normalises and rotates queries and keys.

    module, function, formerly: its location, and its name in older versions.
    rotate, fingerprint: the function it calls for the rotation, and the fingerprint of its two calls.
    norms: the norms of the attention module that it calls.
    of: its names of the rotated queries and keys.
    optional: whether it belongs to another library, which may not be installed.
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
    """Returns a patch that leaves the norms of rotated queries and keys to the rotation, where one kernel does both."""
    implementations = {
        "CPUs": "norms a few tokens at a time",
        "CUDA with Triton": "where `rope` is in force, one kernel for norm and rotation, in ATen's order",
    }
    both = f"{_BOTH}({where.rotate}, attn.norm_q, attn.norm_k" if where.norms else f"{_ROTATIONS}({where.rotate}"
    bindings = {_NORM: "qk_norm", _BOTH: "norm_and_rotate_both", _ROTATIONS: "rotate_both"}
    calls = {name: f"{_HERE}:{binding}" for name, binding in bindings.items()}
    return _patch(where, _NORM, both, calls, Fidelity.EXACT, implementations)


def close(where: Attention) -> Patch:
    """Returns the same patch with norms that round differently."""
    implementations = {
        "CPUs": "norms a few tokens at a time",
        "CUDA with Triton": "where `rope` is in force, one kernel for norm and rotation",
        "NPUs": "npu_rms_norm",
    }
    both = f"{_CLOSE_BOTH}({where.rotate}, attn.norm_q, attn.norm_k"
    calls = {_CLOSE_NORM: f"{_HERE}:close_qk_norm", _CLOSE_BOTH: f"{_HERE}:close_rotate_both"}
    return _patch(where, _CLOSE_NORM, both, calls, Fidelity.CLOSE, implementations)


def _patch(
    where: Attention,
    norm: str,
    both: str,
    calls: Mapping[str, object],
    fidelity: Fidelity,
    implementations: dict[str, str],
) -> Patch:
    rotated = "norm_q", "norm_k"
    norms = (
        Replace(f"attn.{name}(X)", f"{norm}(attn.{name}, X{', rotary_emb' if name in rotated else ''})")
        for name in where.norms
    )
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
_ATTENTION = (  # VACE uses Wan's processor
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


def _tokens(norm: str) -> Replace:
    return Replace(f"attn.{norm}(X)", f"{_NORM}(attn.{norm}, X)")


def _heads(norm: str) -> Replace:
    return Replace(f"attn.{norm}(X)", f"{_HEAD_NORM}(attn.{norm}, X)")


def _heads_in_fp32(norm: str) -> Replace:
    return Replace(f"attn.{norm}(X.float()).type_as(X)", f"{_HEAD_NORM}(attn.{norm}, X, True)")


def _norms_alone(module: str, edit: Callable[[str], Replace], **processors: tuple[str, ...]) -> Patch:
    """Returns a patch of the norms of each processor, whose queries and keys are rotated as in stock."""
    return Patch(
        name="qk",
        module=f"diffusers.models.transformers.{module}",
        targets=tuple(Target(f"{cls}.__call__", tuple(map(edit, norms))) for cls, norms in processors.items()),
        calls={_NORM: f"{_HERE}:qk_norm", _HEAD_NORM: f"{_HERE}:head_norm"},
        implementations={"CPUs": "norms a few tokens at a time"},
        since=since(module),
        runs_with="modulation",
    )


_OF_DIFFUSERS = Patch(
    name="qk",
    module="diffusers.models.normalization",
    targets=(
        Target(
            "RMSNorm.forward",
            (
                Body(
                    tuple(
                        (text, f"return {_OWN_NORM}({_STOCK}, self, hidden_states)")
                        for text in ("85acacadc40f48ee", "c1b452f77da94adf")
                    )
                ),
            ),
        ),
    ),
    calls={_OWN_NORM: f"{_HERE}:norm_of_diffusers", _STOCK: STOCK},
    implementations={"CPUs": "norms a few tokens at a time"},
)

_OF_KANDINSKY = "query_norm", "key_norm"

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
    _norms_alone(
        "transformer_wan_animate_2",
        _tokens,
        WanAnimate2AttnProcessor=NORMS[:2],
        WanAnimate2CrossAttnProcessor=NORMS,
    ),
    _norms_alone("transformer_kandinsky", _heads_in_fp32, Kandinsky5AttnProcessor=_OF_KANDINSKY),
    _norms_alone("transformer_kandinsky6", _heads, Kandinsky6AttnProcessor=_OF_KANDINSKY),
    _norms_alone("transformer_kandinsky6_sr", _heads_in_fp32, Kandinsky6SRAttnProcessor=_OF_KANDINSKY),
    _OF_DIFFUSERS,
)
