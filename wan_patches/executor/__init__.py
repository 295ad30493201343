"""Runs pipelines in this process or in workers, which exchange large values through shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_patches.executor.bounds import Bounds
from wan_patches.executor.errors import ExecutorBroken, RemoteError, WorkerDied, WorkerHung
from wan_patches.executor.executor import ParallelExecutor
from wan_patches.executor.health import Health, WorkerHealth
from wan_patches.executor.requests import Progress, Request

if TYPE_CHECKING:
    from wan_patches.executor.ray import RayParallelExecutor

__all__ = [
    "Bounds",
    "ExecutorBroken",
    "Health",
    "ParallelExecutor",
    "Progress",
    "RayParallelExecutor",
    "RemoteError",
    "Request",
    "WorkerDied",
    "WorkerHealth",
    "WorkerHung",
]


def __getattr__(name: str) -> Any:
    if name == "RayParallelExecutor":  # Ray is an extra, and slow to import
        from wan_patches.executor.ray import RayParallelExecutor

        return RayParallelExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
