"""Where diffusers keeps its rotary embedding: the Wan family's nested function and Helios' own.

`rope` rewrites the function. `rope_qk` has the two calls of it, for queries and for keys, made as one where a kernel
takes both; it leaves the function to `rope`, for there is code, of other libraries too, that calls it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wan_patches.registry import Patch, Target
from wan_patches.rewrite import Block, Body

_CALL, _BOTH = "_wan_patches_rope", "_wan_patches_rope_qk"


def _patch(module: str, qualname: str, edit: Body, formerly: str | None = None) -> Patch:
    return Patch(
        name="rope",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(qualname, (edit,), formerly),),
        calls={_CALL: "wan_patches.ops.rope:apply_rotary_emb"},
        implementations={
            "CPUs": "complex product over whole rows",
            "CUDA with Triton": "one kernel",
            "NPUs": "npu_rotary_mul",
            "other devices, compilers, autograd": "stack + flatten",
        },
    )


def _pair(module: str, qualname: str, edit: Block, formerly: str | None = None) -> Patch:
    return Patch(
        name="rope_qk",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(qualname, (edit,), formerly),),
        calls={_BOTH: "wan_patches.patches.rope:rotate_both"},
        implementations={
            "CUDA with Triton": "where `rope` is in force, one kernel for queries and keys",
            "elsewhere": "queries and keys by themselves",
        },
    )


def rotate_both(rotate: Callable[..., Any], query: Any, key: Any, *tables: Any) -> tuple[Any, Any]:
    """`rotate(query, *tables), rotate(key, *tables)`, at once where a kernel takes both.

    rotate: diffusers' function. What it computes is known while `rope` is in force in it, and only then.
    query, key: `(batch, seq, heads, head_dim)`.
    tables: cosines and sines, `(1 or batch, seq, 1, head_dim)` each, or both in one, `(1 or batch, seq, 2 * head_dim)`.
    """
    if _reason_against(rotate, query) is not None:
        return rotate(query, *tables), rotate(key, *tables)
    from wan_patches.ops.rope import apply_rotary_emb_qk

    cos, sin = tables if len(tables) > 1 else tables[0].unsqueeze(-2).chunk(2, dim=-1)
    return apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])


def _reason_against(rotate: Callable[..., Any], query: Any) -> str | None:
    import torch

    from wan_patches.ops import triton

    if torch.compiler.is_compiling() or not triton.is_usable(query.device):
        return "there is no kernel to take queries and keys together"
    if _CALL not in getattr(getattr(rotate, "__code__", None), "co_names", ()):
        return "`rope` is not in force in the function that is called"
    return None


_COMPLEX = "keeps its rotary tables as complex numbers (diffusers before 0.35 for Wan, 0.36 for SkyReels-V2)"

_NESTED = Body(  # one text in every family that keeps its tables as two real tensors
    nested="apply_rotary_emb",
    replacements=(("eb82049e08f68673", f"return {_CALL}(hidden_states, freqs_cos[..., 0::2], freqs_sin[..., 1::2])"),),
    declined=(("2aac59bc43e80b30", _COMPLEX), ("c3a2c35ea5844c11", _COMPLEX), ("9b38ac46fc205917", _COMPLEX)),
)

_PACKED = Body(  # cosines and sines in one table
    replacements=(
        (
            "0effcaf784d1db72",
            f"""
cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
return {_CALL}(hidden_states, cos[..., 0::2], sin[..., 1::2])
""",
        ),
    ),
)


def _calls(of: str, function: str, fingerprint: str) -> Block:
    """The two calls of `function`, whose results are named `of`."""
    query, key = of.split(", ")
    return Block(
        first=f"{query} = {function}(query, TABLES)",
        last=f"{key} = {function}(key, TABLES)",
        replacement=f"{of} = {_BOTH}({function}, query, key, TABLES)",  # `TABLES` may be `*tables`
        fingerprints=frozenset((fingerprint,)),
        declined=(("34741dbe344db518", _COMPLEX),),
    )


_TWO_CALLS = _calls("query, key", "apply_rotary_emb", "cfeb02973e924dc2")

PATCHES = (
    # VACE uses Wan's blocks
    _patch("transformer_wan", "WanAttnProcessor.__call__", _NESTED, formerly="WanAttnProcessor2_0.__call__"),
    _patch("transformer_wan_animate", "WanAttnProcessor.__call__", _NESTED),
    _patch(
        "transformer_skyreels_v2",
        "SkyReelsV2AttnProcessor.__call__",
        _NESTED,
        formerly="SkyReelsV2AttnProcessor2_0.__call__",
    ),
    _patch("transformer_chronoedit", "WanAttnProcessor.__call__", _NESTED),
    _patch("transformer_sana_video", "SanaLinearAttnProcessor3_0.__call__", _NESTED),
    _patch("transformer_helios", "apply_rotary_emb_transposed", _PACKED),
    _pair("transformer_wan", "WanAttnProcessor.__call__", _TWO_CALLS, formerly="WanAttnProcessor2_0.__call__"),
    _pair("transformer_wan_animate", "WanAttnProcessor.__call__", _TWO_CALLS),
    _pair(
        "transformer_skyreels_v2",
        "SkyReelsV2AttnProcessor.__call__",
        _TWO_CALLS,
        formerly="SkyReelsV2AttnProcessor2_0.__call__",
    ),
    _pair("transformer_chronoedit", "WanAttnProcessor.__call__", _TWO_CALLS),
    _pair(
        "transformer_sana_video",
        "SanaLinearAttnProcessor3_0.__call__",
        _calls("query_rotate, key_rotate", "apply_rotary_emb", "f0da236efbb54f98"),
    ),
    _pair(
        "transformer_helios",
        "HeliosAttnProcessor.__call__",
        _calls("query, key", "apply_rotary_emb_transposed", "e8a5d35d90adb046"),
    ),
)
