"""Attention processors of other libraries, which run in the place of diffusers': cache-dit's and xDiT's.

They hold diffusers' rotary embedding as a nested function of the same text, and call norms of queries and keys in the
same words, so they get the same edits. cache-dit puts its functions there for context parallelism.
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
        NORMS[:2],  # the other stands in another function
        optional=True,
    ),
)

PATCHES = (
    *(rope.patch(where.module, where.function, rope.NESTED, optional=True) for where in _ATTENTION),
    *map(qk.exact, _ATTENTION),
    *map(qk.close, _ATTENTION),
)
