"""Attention processors of other libraries (cache-dit and xDiT), which replace those of diffusers.

They contain the same nested rotary embedding function as diffusers, and the same calls of query and key norms, so the
same edits apply. cache-dit installs its functions for context parallelism.
"""

from __future__ import annotations

from wan_patches.patches import qk, rope
from wan_patches.patches.qk import NORMS, Attention

_ATTENTION = (
    Attention("cache_dit.distributed.transformers.wan", "__patch_WanAttnProcessor__call__", NORMS, optional=True),
    Attention(
        "cache_dit.distributed.transformers.chrono_edit",
        "__patch_ChronoEditWanAttnProcessor__call__",
        NORMS,
        optional=True,
    ),
    Attention(
        "xfuser.model_executor.models.transformers.transformer_wan",
        "xFuserWanAttnProcessor._qk_norm_rope_reference",
        NORMS[:2],  # the third is in another function
        optional=True,
    ),
)

PATCHES = (
    *(rope.patch(where.module, where.function, rope.NESTED, optional=True) for where in _ATTENTION),
    *map(qk.exact, _ATTENTION),
    *map(qk.close, _ATTENTION),
)
