"""Rotary embedding functions in diffusers.

The Wan family nests one in its attention processors, and Helios has its own. Nineteen transformers (Flux, HunyuanVideo,
CogVideoX, CogView 4, Cosmos, ...) call a shared one, and others have relatives of it.

Left unchanged: Ernie-Image and MiniMax (products rounded in the dtype of the queries), Allegro (three axes, whose
tables are looked up), SANA-WM (heads of 112 channels, of which stock's complex products round a rest differently).
"""

from __future__ import annotations

from collections.abc import Mapping

from wan_patches.patches.versions import since
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body, Edit, Nested, Replace

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

_REAL = {"CPUs": "complex product over whole rows, or a few tokens at a time", "CUDA with Triton": "one kernel"}
_COMPLEX = {"CPUs": "a few tokens at a time", "other devices": "stock's operations"}
_ELSEWHERE = "_wan_patches_rope_by_"


def _function(module: str, function: str, arguments: str, fingerprint: str, binding: str) -> Patch:
    """Returns a patch of a rotary embedding function, whose binding calls the original where nothing is faster."""
    original = f"_wan_patches_stock_{function}"  # a module can have two
    edit = Body(replacements=((fingerprint, f"return {_ELSEWHERE}{binding}({original}, {arguments})"),))
    return _elsewhere(module, function, (edit,), binding, {original: STOCK})


def _nested(module: str, method: str, function: str, arguments: str, fingerprint: str, binding: str) -> Patch:
    """Returns a patch of the calls of a function that is nested in a method, for queries and for keys."""
    edits: tuple[Edit, ...] = (
        Nested(function, frozenset((fingerprint,))),
        *(
            Replace(f"{function}({x}, {arguments})", f"{_ELSEWHERE}{binding}({function}, {x}, {arguments})")
            for x in ("query", "key")
        ),
    )
    return _elsewhere(module, method, edits, binding, {})


def _elsewhere(module: str, qualname: str, edits: tuple[Edit, ...], binding: str, calls: Mapping[str, object]) -> Patch:
    return Patch(
        name="rope",
        module=f"diffusers.models.{module}",
        targets=(Target(qualname, edits),),
        calls={_ELSEWHERE + binding: f"wan_patches.bindings.rope:{binding}", **calls},
        implementations=_COMPLEX if binding.startswith("complex") else _REAL,
        since=since(module.rpartition(".")[2]),
    )


_QWEN = "x, freqs_cis, use_real, use_real_unbind_dim"

_RELATIVES = (
    _function("embeddings", "apply_rotary_emb", f"{_QWEN}, sequence_dim", "48445a32922a9dad", "shared"),
    *(
        _function(
            f"transformers.{module}", "apply_rotary_emb_qwen", _QWEN, "5578cbe3831ec20b", "complex_numbers_of_qwen"
        )
        for module in ("transformer_qwenimage", "transformer_qwenimage21")
    ),
    _function(
        "transformers.transformer_nucleusmoe_image",
        "_apply_rotary_emb_nucleus",
        _QWEN,
        "15203d0bfad8a3b8",
        "complex_numbers_of_qwen",
    ),
    *(
        _nested(module, f"{processor}.__call__", "apply_rotary_emb", "freqs_cis", text, "complex_numbers")
        for module, processor, text in (
            ("transformers.transformer_z_image", "ZSingleStreamAttnProcessor", "f67691db5d952475"),
            ("controlnets.controlnet_z_image", "ZSingleStreamAttnProcessor", "f67691db5d952475"),
            ("transformers.transformer_bria_fibo2", "BriaFibo2AttnProcessor", "1c1161414e99b1da"),
        )
    ),
    *(
        _function(
            f"transformers.{module}",
            "apply_rotary_emb",
            "hidden_states, freqs",
            "df765c5790b20904",
            "complex_numbers_in_double",
        )
        for module in ("transformer_anyflow", "transformer_anyflow_far")
    ),
    _function(
        "transformers.transformer_wan_animate_2",
        "rope_apply",
        "x, grid_sizes, freqs, time_stride",
        "374b111880a13fea",
        "complex_numbers_of_grids",
    ),
    _function("transformers.transformer_ltx", "apply_rotary_emb", "x, freqs", "ede1cf7514f9921a", "without_heads"),
    *(
        _function(
            f"transformers.{module}", "apply_interleaved_rotary_emb", "x, freqs", "eeda1033f4aa4b50", "without_heads"
        )
        for module in ("transformer_ltx2", "transformer_sana_wm_refiner")
    ),
    *(
        _function(f"transformers.{module}", "apply_split_rotary_emb", "x, freqs", "a1e80abe23e2cc30", "by_addcmul")
        for module in ("transformer_ltx2", "transformer_sana_wm_refiner")
    ),
    _function(
        "transformers.transformer_joyimage",
        "_apply_rotary_emb",
        "xq, xk, freqs_cis",
        "545d48c0ef575ffe",
        "queries_and_keys",
    ),
    _function(
        "transformers.transformer_joyimage_edit_plus",
        "_apply_rotary_emb_batched",
        "xq, xk, freqs_cis",
        "8c9d343a8027d1f1",
        "queries_and_keys_of_samples",
    ),
    _function(
        "transformers.transformer_longcat_audio_dit",
        "_apply_rotary_emb",
        "hidden_states, rope",
        "714c1dec1771aed5",
        "half_a_head_apart",
    ),
    _nested(
        "attention_processor",
        "MochiAttnProcessor2_0.__call__",
        "apply_rotary_emb",
        "*image_rotary_emb",
        "b631632d1455c5ca",
        "tables_of_heads",
    ),
    _nested(
        "transformers.transformer_kandinsky",
        "Kandinsky5AttnProcessor.__call__",
        "apply_rotary",
        "rotary_emb",
        "c354bc415df8c726",
        "through_bfloat16",
    ),
    *(
        _function(f"transformers.{module}", "apply_rotary", "x, rope", "9a56b606740015d3", "matrices")
        for module in ("transformer_kandinsky6", "transformer_kandinsky6_sr")
    ),
    _function("transformers.transformer_prx", "apply_rope", "xq, freqs_cis", "3072f9420b002c00", "matrices"),
    _function(
        "transformers.transformer_hidream_image",
        "apply_rope",
        "xq, xk, freqs_cis",
        "ae3c2435cd59e330",
        "matrices_of_both",
    ),
)

PATCHES = (
    *_RELATIVES,
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
