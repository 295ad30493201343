"""Layout "replicas": a whole pipeline on every device, each in a worker of its own; requests are spread."""

from __future__ import annotations

from typing import Any

import torch

from wan_patches.executor.layouts.placement import move
from wan_patches.executor.layouts.protocol import Layout, Parallel


class Replicas(Layout):
    """As many pipelines as devices; a single device works on a request."""

    name = "replicas"
    one_device = True

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        move(pipe, device)
