"""Rotary tables for which the host waits: ChronoEdit's two ends, Helios' frame indices, and CogView 4's whole tables.

CogView 4 and GLM-Image make them on the CPU, and every layer uploads them for its queries and again for its keys. The
tables themselves are built in every forward, as in stock. That takes a hundred-thousandth of a forward, and a cache
could not detect whether its inputs have been modified.
"""

from __future__ import annotations

from wan_patches.patches.versions import since
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Edit, Replace

_ENDS, _INDICES, _UPLOADED = "_wan_patches_ends", "_wan_patches_frame_indices", "_wan_patches_uploaded"


def _patch(module: str, qualname: str, *edits: Edit) -> Patch:
    return Patch(
        name="rotary_tables",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(qualname, edits),),
        calls={
            name: f"wan_patches.bindings.rotary_tables:{name.removeprefix('_wan_patches_')}"
            for name in (_ENDS, _INDICES, _UPLOADED)
        },
        implementations={"CPUs": "stock", "other devices": "the host does not wait for the tables"},
        since=since(module),
    )


def _upload(module: str, model: str) -> Patch:
    call = f"{_UPLOADED}(self, self.rope(hidden_states), hidden_states.device)"
    return _patch(module, f"{model}.forward", Replace("self.rope(hidden_states)", call))


PATCHES = (
    _patch("transformer_chronoedit", "ChronoEditRotaryPosEmbed.forward", Replace("ROWS[[0, -1]]", f"{_ENDS}(ROWS)", 2)),
    _patch(
        "transformer_helios",
        "HeliosRotaryPosEmbed.forward",
        Replace("frame_indices.to(device=device, dtype=torch.float32)", f"{_INDICES}(self, frame_indices, device)"),
    ),
    _upload("transformer_cogview4", "CogView4Transformer2DModel"),
    _upload("transformer_glm_image", "GlmImageTransformer2DModel"),
)
