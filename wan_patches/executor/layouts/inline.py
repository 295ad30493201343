"""Layout "inline": the whole pipeline on one device, in the executor's own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wan_patches.executor.layouts.placement import move
from wan_patches.executor.layouts.protocol import Layout, Parallel


class Inline(Layout):
    """Runs one pipeline in a thread of this process, without copies."""

    name = "inline"
    in_process = True
    one_device = True

    def group_size(self, devices: Sequence[torch.device], wanted: int | None) -> int:
        if len(devices) > 1:
            raise ValueError(
                f'layout "inline" uses one device, and there are {len(devices)}; pass one (devices='
                f'"{devices[0]}"), or use "replicas"'
            )
        return 1

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        move(pipe, device)
