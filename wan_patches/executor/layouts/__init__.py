"""How a pipeline lies on the devices of its group of processes."""

from __future__ import annotations

from wan_patches.executor.layouts.cfg import (
    LAYOUTS,
    _only_accelerator,  # noqa: F401
    device_named,
    loading_sharded,
    place,
    resolve,
)

__all__ = ["LAYOUTS", "device_named", "loading_sharded", "place", "resolve"]
