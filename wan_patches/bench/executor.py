"""What an executor costs beside the pipeline: a small request's way, and the time without a worker that has died."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from wan_patches.bench.overhead import Row
from wan_patches.executor import ParallelExecutor
from wan_patches.testing.families import FAMILIES

_SMALL = 1024  # elements of fp32: 4 KB


class Echo:
    """A pipeline that gives back what it gets."""

    def __call__(self, value: Any) -> Any:
        return value


def measure(repeats: int = 5) -> list[Row]:
    """Medians, with one CPU thread in each worker."""
    value = torch.ones(_SMALL)
    with (
        ParallelExecutor(Echo, devices=["cpu", "cpu"], threads=1, spares=0) as executor,
        ProcessPoolExecutor(2) as pool,
    ):
        ways: list[Callable[[], Any]] = [
            lambda: executor.submit(value).result(),
            lambda: pool.submit(_echo, value.numpy()).result(),
        ]
        ours, theirs = _interleaved(ways, 60 * repeats)
    return [
        Row("4 KB there and back, ParallelExecutor", ours),
        Row("4 KB there and back, ProcessPoolExecutor", theirs),
        Row("until a killed worker of Wan serves again, no spare", _again(0, repeats)),
        Row("until a killed worker of Wan serves again, a spare", _again(1, repeats)),
        Row("of which: the pipeline is built (small weights)", _build(repeats)),
    ]


def _interleaved(ways: list[Callable[[], Any]], rounds: int) -> list[float]:
    found: list[list[float]] = [[] for _ in ways]
    for n in range(rounds + 10):
        for way, seconds in zip(ways, found):
            start = time.perf_counter()
            way()
            if n >= 10:  # the first ones start processes and threads
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


def _again(spares: int, repeats: int) -> float:
    """Seconds from a worker's death until it serves; a spare has had the time to import what it can."""
    found = []
    build = FAMILIES["wan_t2v"].build
    with ParallelExecutor(
        build, devices=["cpu"], layout="replicas", threads=1, spares=spares, log=lambda *_: None
    ) as executor:
        for nth in range(repeats):
            time.sleep(15.0 if spares else 0.0)
            (worker,) = executor.health().workers
            start = time.perf_counter()
            os.kill(worker.pid or 0, signal.SIGKILL)
            while executor.health().workers[0].restarts <= nth or not executor.health().serving:
                time.sleep(0.002)
            found.append(time.perf_counter() - start)
            executor.submit(**FAMILIES["wan_t2v"].inputs(seed=nth, steps=1)).result()
    return statistics.median(found)


def _build(repeats: int) -> float:
    """In a process that has imported all that it needs."""
    return min(_seconds(FAMILIES["wan_t2v"].build) for _ in range(repeats + 1))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _echo(value: Any) -> Any:
    return value
