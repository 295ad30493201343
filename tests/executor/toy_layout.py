"""A layout in one file, and a small pipeline for it: as another package would bring them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from wan_patches.executor.layouts import Layout, Parallel
from wan_patches.executor.layouts.placement import ranks_in_group


class Dot:
    """A pipeline without diffusers: the dot product of its weights with what it is given."""

    def __init__(self) -> None:
        self.weights = torch.arange(8.0)
        self.rows = slice(None)

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        return self.total(self.weights @ vector[self.rows])

    def total(self, part: torch.Tensor) -> torch.Tensor:
        return part


class Rows(Layout):
    """Every rank holds some of the weights; the parts of the product are added."""

    name = "rows"

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        rows = len(pipe.weights) // ranks_in_group(self.name)
        first = dist.get_rank() * rows
        pipe.rows = slice(first, first + rows)
        pipe.weights = pipe.weights[pipe.rows].to(device)
        pipe.total = _added


def _added(part: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(part)
    return part
