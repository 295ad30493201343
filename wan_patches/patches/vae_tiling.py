"""Where Wan's VAE, which is that of all families here, fades its tiles into one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wan_patches.patching import tally
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body


def _patch(method: str, dim: int, fingerprint: str) -> Patch:
    call, stock = "_wan_patches_blend", f"_wan_patches_stock_{method}"
    statement = f"return {call}({stock}, self, a, b, blend_extent, {dim})"
    return Patch(
        name="vae",
        module="diffusers.models.autoencoders.autoencoder_kl_wan",
        targets=(Target(f"AutoencoderKLWan.{method}", (Body(((fingerprint, statement),)),)),),
        calls={call: "wan_patches.patches.vae_tiling:blend", stock: STOCK},
        implementations={"CPUs": "a few frames at a time", "other devices": "all rows of an overlap at once"},
        optional=True,  # since diffusers 0.34
    )


PATCHES = (_patch("blend_v", -2, "f6e9ef1c44f40143"), _patch("blend_h", -1, "b40dd958ed48461e"))


def blend(stock: Callable[..., Any], vae: Any, a: Any, b: Any, blend_extent: Any, dim: int) -> Any:
    """What stock's method returns: `b`, with the end of `a` faded into it in place.

    Tiles of shape `(batch, channels, frames, height, width)` in fp32, bf16 or fp16 take the fast way, but not while
    something looks into the operations (autograd, a compiler); everything else is stock's.
    """
    from wan_patches.ops import tiling

    if (reason := _reason_against(a, b, blend_extent, dim)) is not None:
        tally.note("tile blend", "", reason)
        return stock(vae, a, b, blend_extent)
    return tiling.blend(a, b, blend_extent, dim)


def _reason_against(a: Any, b: Any, blend_extent: Any, dim: int) -> str | None:
    """Why these tiles take stock's way; None where they need not."""
    import torch

    from wan_patches.ops import tiling
    from wan_patches.ops.tracing import is_observed

    if torch.compiler.is_compiling():
        return "it is being compiled"
    if is_observed(a, b) or a.is_meta or b.is_meta:
        return "something looks into the operations on a tile"
    if type(blend_extent) is not int:
        return "the overlap is not a whole number"
    if a.dtype != b.dtype or a.dtype not in tiling.DTYPES or a.device != b.device:
        return "the dtypes or devices of the tiles"
    if a.dim() != 5 or b.dim() != 5:
        return "the tiles are not five-dimensional"
    if any(sizes[0] != sizes[1] for axis, sizes in enumerate(zip(a.shape, b.shape), -5) if axis != dim):
        return "the tiles do not fit one another"
    if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():  # row by row, a row could read another
        return "the tiles share memory"
    if 0 in b.stride():  # stock writes row after row to the same place, or refuses to
        return "elements of a tile are one in memory"
    return None
