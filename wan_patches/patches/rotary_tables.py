"""Where the making of rotary tables makes the host wait for the device: ChronoEdit's two ends, Helios' frame numbers.

The tables themselves are made anew in every forward, as in stock: that takes a hundred-thousandth of a forward, and
what is kept cannot tell whether somebody has written to what it was made of.
"""

from __future__ import annotations

from typing import Any

from wan_patches.patches.step_loop import can_move, is_accelerator, noted
from wan_patches.patches.versions import since
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Edit, Replace

_ENDS, _INDICES = "_wan_patches_ends", "_wan_patches_frame_indices"


def _patch(module: str, qualname: str, *edits: Edit) -> Patch:
    return Patch(
        name="rotary_tables",
        module=f"diffusers.models.transformers.{module}",
        targets=(Target(qualname, edits),),
        calls={name: f"{__name__}:{name.removeprefix('_wan_patches_')}" for name in (_ENDS, _INDICES)},
        implementations={"CPUs": "stock", "other devices": "the host does not wait for the tables"},
        since=since(module),
    )


PATCHES = (
    _patch("transformer_chronoedit", "ChronoEditRotaryPosEmbed.forward", Replace("ROWS[[0, -1]]", f"{_ENDS}(ROWS)", 2)),
    _patch(
        "transformer_helios",
        "HeliosRotaryPosEmbed.forward",
        Replace("frame_indices.to(device=device, dtype=torch.float32)", f"{_INDICES}(self, frame_indices, device)"),
    ),
)


def ends(rows: Any) -> Any:
    """`rows[[0, -1]]`, for which stock uploads the two numbers."""
    import torch

    from wan_patches.ops.tracing import is_observed

    if not noted("ends", is_accelerator(rows.device) and not is_observed(rows) and len(rows) > 0):
        return rows[[0, -1]]
    return torch.stack((rows[0], rows[-1]))


def frame_indices(rope: Any, indices: Any, device: Any) -> Any:
    """`indices.to(device=device, dtype=torch.float32)`, uploaded the first time that these values are seen.

    The pipelines make them on the CPU, where comparing them is free.
    """
    import torch

    from wan_patches.ops import step_loop

    if not noted("frame indices", can_move(rope, indices, device)):
        return indices.to(device=device, dtype=torch.float32)
    # a copy of the kept one, as it is handed on to methods that may be anybody's
    return step_loop.on_device(rope, indices.to(dtype=torch.float32), torch.device(device)).clone()
