"""Layout "replicas": a whole pipeline per device, each in its own worker; requests are distributed over them."""

from __future__ import annotations

from typing import Any

import torch

from wan_patches.executor.layouts.placement import move
from wan_patches.executor.layouts.protocol import Layout, Parallel


class Replicas(Layout):
    """Runs one pipeline per device; a single device works on a request."""

    name = "replicas"
    one_device = True

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        move(pipe, device)
