"""Rotary embedding functions in diffusers: the nested function of the Wan family, and Helios' own."""

from __future__ import annotations

from wan_patches.patches.versions import since
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body

CALL = "_wan_patches_rope"
_DIFFUSERS = "diffusers.models.transformers."


def patch(module: str, qualname: str, edit: Body, formerly: str | None = None, optional: bool = False) -> Patch:
    """Returns a patch of a function that is or contains the rotary embedding.

    optional: whether it belongs to another library, which may not be installed.
    """
    return Patch(
        name="rope",
        module=module,
        targets=(Target(qualname, (edit,), formerly),),
        calls={CALL: "wan_patches.ops.rope:apply_rotary_emb"},
        implementations={
            "CPUs": "complex product over whole rows",
            "CUDA with Triton": "one kernel",
            "NPUs": "npu_rotary_mul",
            "other devices, compilers, autograd": "stack + flatten",
        },
        since=since(module.removeprefix(_DIFFUSERS)),
        optional=optional,
        runs_with="modulation",
    )


COMPLEX = "keeps its rotary tables as complex numbers (diffusers before 0.35 for Wan, 0.36 for SkyReels-V2)"

NESTED = Body(  # the text is the same in every family that stores its tables as two real tensors
    nested="apply_rotary_emb",
    replacements=(("eb82049e08f68673", f"return {CALL}(hidden_states, freqs_cos[..., 0::2], freqs_sin[..., 1::2])"),),
    declined=(("2aac59bc43e80b30", COMPLEX), ("c3a2c35ea5844c11", COMPLEX), ("9b38ac46fc205917", COMPLEX)),
)

_PACKED = Body(  # cosines and sines in one table
    replacements=(
        (
            "0effcaf784d1db72",
            f"""
cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
return {CALL}(hidden_states, cos[..., 0::2], sin[..., 1::2])
""",
        ),
    ),
)


PATCHES = (
    # VACE uses Wan's blocks
    patch(f"{_DIFFUSERS}transformer_wan", "WanAttnProcessor.__call__", NESTED, formerly="WanAttnProcessor2_0.__call__"),
    patch(f"{_DIFFUSERS}transformer_wan_animate", "WanAttnProcessor.__call__", NESTED),
    patch(
        f"{_DIFFUSERS}transformer_skyreels_v2",
        "SkyReelsV2AttnProcessor.__call__",
        NESTED,
        formerly="SkyReelsV2AttnProcessor2_0.__call__",
    ),
    patch(f"{_DIFFUSERS}transformer_chronoedit", "WanAttnProcessor.__call__", NESTED),
    patch(f"{_DIFFUSERS}transformer_sana_video", "SanaLinearAttnProcessor3_0.__call__", NESTED),
    patch(f"{_DIFFUSERS}transformer_helios", "apply_rotary_emb_transposed", _PACKED),
)
