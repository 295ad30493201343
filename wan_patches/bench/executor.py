"""Benchmarks the overhead of an executor: the round trip of a small request, and the recovery from a killed worker."""

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
    """A pipeline that returns its argument."""

    def __call__(self, value: Any) -> Any:
        return value


def measure(repeats: int = 5) -> list[Row]:
    """Returns medians, measured with one CPU thread in each worker."""
    value = torch.ones(_SMALL)
    with (
        ParallelExecutor(Echo, devices=["cpu", "cpu"], threads=1, spares=0) as executor,
        ProcessPoolExecutor(2) as pool,
    ):
        round_trips: list[Callable[[], Any]] = [
            lambda: executor.submit(value).result(),
            lambda: pool.submit(_echo, value.numpy()).result(),
        ]
        ours, theirs = _interleaved(round_trips, 60 * repeats)
    return [
        Row("4 KB there and back, ParallelExecutor", ours),
        Row("4 KB there and back, ProcessPoolExecutor", theirs),
        Row("until a killed worker of Wan serves again, no spare", _recovery(0, repeats)),
        Row("until a killed worker of Wan serves again, a spare", _recovery(1, repeats)),
        Row("of which: the pipeline is built (small weights)", _build(repeats)),
    ]


def _interleaved(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    found: list[list[float]] = [[] for _ in calls]
    for n in range(rounds + 10):
        for call, seconds in zip(calls, found):
            start = time.perf_counter()
            call()
            if n >= 10:  # the first calls start processes and threads
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


def _recovery(spares: int, repeats: int) -> float:
    """Returns the seconds from a worker's death until it serves again. A spare gets time to finish its imports."""
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
    """Returns the seconds to build the pipeline in a process that has finished its imports."""
    return min(_seconds(FAMILIES["wan_t2v"].build) for _ in range(repeats + 1))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _echo(value: Any) -> Any:
    return value
