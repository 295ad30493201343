"""Where diffusers makes the tables of its rotary embedding, anew in every forward: they are kept between forwards.

A kept table takes memory where the model is, until the model goes or moves: 8 * head_dim bytes a token for Wan's two,
34 MB for 81 frames of 480x832, and the same for Helios' one and those of its history, 29 MB for 33 frames of 384x640.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from wan_patches.codeswap import STOCK, functions_behind
from wan_patches.codeswap import stock as stock_of
from wan_patches.registry import Known, Patch, Target
from wan_patches.rewrite import Block, Body, Edit, Unknown, fingerprint

_GRID, _INDICES, _POOLED = "_wan_patches_grid_tables", "_wan_patches_indices_table", "_wan_patches_pooled_table"
_STOCK = "_wan_patches_stock_rotary_tables"
_HERE = "wan_patches.patches.rotary_tables"
_HELIOS = "diffusers.models.transformers.transformer_helios"

_GRIDS = 2  # grids of one model with tables kept: a pipeline has one, or two of different lengths
_PARTS = 8  # of Helios: three lengths of history, and the current frames at three resolutions

_COMPLEX = "keeps its rotary tables as complex numbers (diffusers before 0.35 for Wan, 0.36 for SkyReels-V2)"

_GRID_BODY = Body(  # the last arguments are what else the text reads of the module
    replacements=(
        ("30628a70a062608b", f"return {_GRID}({_STOCK}, self, hidden_states, self.t_dim, self.h_dim, self.w_dim)"),
        ("2484e0c953f17b3a", f"return {_GRID}({_STOCK}, self, hidden_states, self.attention_head_dim)"),  # 0.35
        (
            "cc445cde52deff37",
            f"return {_GRID}({_STOCK}, self, hidden_states, self.attention_head_dim, self.temporal_skip_len)",
        ),
    ),
    declined=(("468e023dd8505641", _COMPLEX), ("645640860443fd77", _COMPLEX)),
)

_INDICES_BODY = Body(
    replacements=(("c38a66b3cbd9280c", f"return {_INDICES}({_STOCK}, self, frame_indices, height, width, device)"),)
)

#: What the text of Helios' tables calls of its own module.
_METHODS = {
    "get_frequency_batched": frozenset({"21720049c1cfaf57", "2270c2ecfea1ddb7"}),  # to 0.38, from 0.39
    "_get_spatial_meshgrid": frozenset({"3279abb6d5b5a544"}),
}


def _patch(module: str, target: Target, name: str, implementation: str, requires: tuple[Known, ...] = ()) -> Patch:
    function = {_GRID: "grid_tables", _INDICES: "indices_table", _POOLED: "pooled_table"}[name]
    return Patch(
        name="rotary_tables",
        module=module,
        targets=(target,),
        calls={name: f"{_HERE}:{function}", _STOCK: STOCK},
        implementations={"all devices": implementation},
        requires=requires,
    )


def _grid_patch(module: str, cls: str = "WanRotaryPosEmbed") -> Patch:
    target = Target(f"{cls}.forward", (_GRID_BODY,))
    return _patch(f"diffusers.models.transformers.{module}", target, _GRID, "stock's, kept for each grid")


def _pooling(length: str, fingerprint: str) -> Edit:
    table = f"rotary_emb_history_{length}"
    return Block(
        first=f"{table} = pad_for_3d_conv({table}, KERNEL)",
        last=f"{table} = center_down_sample_3d({table}, KERNEL)",
        replacement=f"{table} = {_POOLED}(pad_for_3d_conv, center_down_sample_3d, {table}, KERNEL)",
        fingerprints=frozenset({fingerprint}),
    )


PATCHES = (
    _grid_patch("transformer_wan"),  # VACE uses Wan's
    _grid_patch("transformer_wan_animate"),
    _grid_patch("transformer_skyreels_v2", "SkyReelsV2RotaryPosEmbed"),
    _grid_patch("transformer_chronoedit", "ChronoEditRotaryPosEmbed"),
    _grid_patch("transformer_sana_video"),
    _patch(
        _HELIOS,
        Target("HeliosRotaryPosEmbed.forward", (_INDICES_BODY,)),
        _INDICES,
        "stock's, kept for each grid and its frame indices",
        tuple(Known(_HELIOS, f"HeliosRotaryPosEmbed.{name}", texts) for name, texts in _METHODS.items()),
    ),
    _patch(
        _HELIOS,
        Target(
            "HeliosTransformer3DModel.forward",
            (
                _pooling("mid", "c074644787dfd1dd"),
                _pooling("long", "9b3b61607b32d95c"),
            ),
        ),
        _POOLED,
        "stock's, kept with the table that they are pooled from",
    ),
)


def grid_tables(stock: Callable[..., Any], rope: Any, hidden_states: Any, *settings: Any) -> Any:
    """What stock's method returns for hidden states of shape `(batch, channels, frames, height, width)`.

    Two tables of shape `(1, seq, 1, head_dim)` that depend on the last three sizes, the module's buffers and patch
    size, and `settings`.
    """
    import torch

    from wan_patches.ops.rotary_tables import kept

    if torch.compiler.is_compiling():
        return stock(rope, hidden_states)
    key = (tuple(hidden_states.shape[2:]), tuple(rope.patch_size), settings)
    return kept(lambda: stock(rope, hidden_states), (rope.freqs_cos, rope.freqs_sin), key, _GRIDS)


def indices_table(
    stock: Callable[..., Any], rope: Any, frame_indices: Any, height: Any, width: Any, device: Any
) -> Any:
    """What stock's method returns for frame indices of shape `(batch, frames)`: one table, `(batch, 2 * head_dim,
    frames, height, width)`.

    Kept by the values of the indices, which the pipelines make on the CPU: on an accelerator they could not be read
    without a wait.
    """
    from wan_patches.ops.rotary_tables import kept

    arguments = (rope, frame_indices, height, width, device)
    if _reason_against_indices(*arguments) is not None:
        return stock(*arguments)
    key = (frame_indices.dtype, frame_indices.shape, tuple(frame_indices.flatten().tolist()), height, width)
    return kept(lambda: stock(*arguments), (rope.freqs_base_t, rope.freqs_base_y, rope.freqs_base_x), key, _PARTS)


def pooled_table(pad: Callable[..., Any], pool: Callable[..., Any], table: Any, kernel: tuple[int, ...]) -> Any:
    """`pool(pad(table, kernel), kernel)`: the table of history frames, of shape `(batch, channels, frames, height,
    width)`, at the resolution at which Helios looks at them."""
    from wan_patches.ops.rotary_tables import kept

    return kept(lambda: pool(pad(table, kernel), kernel), (table,), (pad, pool, kernel), 1)


def why_stock(*_: Any) -> str:
    """Why tables were made, asked after a call that did so without a reason."""
    return "tables are kept from the second forward with the same grid on"


def _reason_against_indices(rope: Any, frame_indices: Any, height: Any, width: Any, device: Any) -> str | None:
    """Why this table takes stock's way; None where it need not."""
    import torch

    from wan_patches.ops.tracing import is_observed

    if not isinstance(frame_indices, torch.Tensor) or is_observed(frame_indices):
        return "the frame indices are not a plain tensor, or something looks into the operations"
    if frame_indices.dtype not in (torch.int64, torch.int32):
        return "the frame indices are not integers"
    if not frame_indices.is_cpu:
        return "the frame indices are on an accelerator"
    if type(height) is not int or type(width) is not int or torch.device(device) != rope.freqs_base_t.device:
        return "the grid is not numbers, or not on the module's device"
    for name in _METHODS:
        if name in vars(rope) or not _is_known(getattr(type(rope), name), name):
            return "the module has a method that is not stock's"
        if _keeps_its_module(getattr(type(rope), name)):
            return "stock keeps the module when the model is gone (diffusers 0.37)"  # and the tables would stay as well
    return None


@functools.lru_cache(maxsize=32)
def _is_known(method: Any, name: str) -> bool:
    for function in functions_behind(method, None):
        try:
            if fingerprint(stock_of(function)) in _METHODS[name]:
                return True
        except Unknown:  # a wrapper without source
            continue
    return False


@functools.lru_cache(maxsize=32)
def _keeps_its_module(method: Any) -> bool:
    """Whether it is a method behind an `lru_cache`, which holds what it was called on."""
    while method is not None:
        if hasattr(method, "cache_info"):
            return True
        method = getattr(method, "__wrapped__", None)
    return False
