"""The RMS norms of queries and keys in the attention of Wan, Helios and their relatives."""

from __future__ import annotations

from typing import Any

from wan_patches.registry import Patch, Target
from wan_patches.rewrite import Replace

_CALL = "_wan_patches_qk_norm"


def _patch(module: str, processor: str, *norms: str, formerly: str | None = None) -> Patch:
    edits = tuple(Replace(f"attn.{norm}(X)", f"{_CALL}(attn.{norm}, X)") for norm in norms)
    return Patch(
        name="qk_norm",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(f"{processor}.__call__", edits, formerly),),
        calls={_CALL: "wan_patches.patches.qk_norm:qk_norm"},
        implementations={"CPUs": "a few tokens at a time", "other devices, compilers, autograd": "stock's own call"},
    )


_OWN, _IMAGE = ("norm_q", "norm_k"), ("norm_q", "norm_k", "norm_added_k")

PATCHES = (
    _patch("transformer_wan", "WanAttnProcessor", *_IMAGE, formerly="WanAttnProcessor2_0.__call__"),
    _patch("transformer_wan_animate", "WanAttnProcessor", *_IMAGE),
    _patch(
        "transformer_skyreels_v2", "SkyReelsV2AttnProcessor", *_IMAGE, formerly="SkyReelsV2AttnProcessor2_0.__call__"
    ),
    _patch("transformer_chronoedit", "WanAttnProcessor", *_IMAGE),
    _patch("transformer_helios", "HeliosAttnProcessor", *_OWN),
)


def qk_norm(norm: Any, x: Any) -> Any:
    """`norm(x)` for `x` of `(batch, seq, dim)`: without the call where it is `torch.nn.RMSNorm` and nothing else."""
    import torch

    if (
        torch.compiler.is_compiling()
        or type(norm) is not torch.nn.RMSNorm
        or not x.is_cpu
        or "forward" in vars(norm)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
        or norm.normalized_shape != (x.shape[-1],)
    ):
        return norm(x)
    from wan_patches.ops.rms_norm import rms_norm

    return rms_norm(x, norm.weight, norm.eps)
