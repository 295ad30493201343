"""Attention for Ascend NPUs, selected by name through diffusers' own `set_attention_backend`, never by default.

`mindiesd_laser` is MindIE-SD's laser attention where it applies (long self-attention, see
`wan_patches.ops.npu.attention`), and diffusers' `_native_npu`, which is `npu_fusion_attention`, everywhere else.
Neither is bit-identical to the attention that stock diffusers chooses.
"""

from __future__ import annotations

from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Replace

NAME = "mindiesd_laser"

_MODULE = "diffusers.models.attention_dispatch"
_CHECK = "_wan_patches_attention_backend"
_FLASH = "[AttentionBackendName.FLASH, AttentionBackendName.FLASH_VARLEN]"

PATCHES = (
    Patch(
        name="attention_backends",
        module=_MODULE,
        targets=(
            Target(
                "_check_attention_backend_requirements",
                (Replace(f"BACKEND in {_FLASH}", f"{_CHECK}(BACKEND) or BACKEND in {_FLASH}"),),
            ),
        ),
        calls={_CHECK: "wan_patches.bindings.attention_backends:check"},
        implementations={"NPUs": f"'{NAME}' for set_attention_backend, never chosen for you,"},
        addition="wan_patches.bindings.attention_backends:backend",
        advice="wan_patches.bindings.attention_backends:advice",
    ),
)
