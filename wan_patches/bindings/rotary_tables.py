"""Builds rotary tables without making the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch

from wan_patches.bindings.step_loop import can_move, is_accelerator, noted
from wan_patches.ops import step_loop
from wan_patches.ops.tracing import is_observed


def ends(rows: torch.Tensor) -> torch.Tensor:
    """Returns `rows[[0, -1]]`, without uploading the two indices as stock does."""
    if not noted("ends", is_accelerator(rows.device) and not is_observed(rows) and len(rows) > 0):
        return rows[[0, -1]]
    return torch.stack((rows[0], rows[-1]))


def frame_indices(rope: torch.nn.Module, indices: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Returns `indices.to(device=device, dtype=torch.float32)`, uploaded only the first time these values occur.

    The pipelines create the indices on the CPU, where comparing them is cheap.
    """
    if not noted("frame indices", can_move(rope, indices, device)):
        return indices.to(device=device, dtype=torch.float32)
    # a copy of the cached tensor, because it is passed on to methods that may be overridden
    return step_loop.on_device(rope, indices.to(dtype=torch.float32), torch.device(device)).clone()


def uploaded(model: Any, tables: Any, device: torch.device) -> Any:
    """Returns cosines and sines on `device`, to which attention processors of the library upload them at each use."""
    if not noted("whole tables", is_accelerator(device) and _is_only_read_on_device(model, tables)):
        return tables
    return tuple(table.to(device) for table in tables)


def _is_only_read_on_device(model: Any, tables: Any) -> bool:
    if type(tables) is not tuple or any(type(table) is not torch.Tensor for table in tables) or is_observed(*tables):
        return False
    own = type(model).__module__
    return all(type(block.attn1.processor).__module__ == own for block in model.transformer_blocks)
