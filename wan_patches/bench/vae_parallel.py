"""Benchmarks tiled encoding and decoding by one process, and by several processes that share the tiles.

Each process has its own core and lives for the whole run. Both sides take turns: the first process does all the work
while the others sleep, then all processes share it. The model has the published channel counts and random weights;
patches are off.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wan_patches.bench.measure import DTYPES, MeasurementError, dtype_of, identical, others_cpu_seconds

_CONTEXT = multiprocessing.get_context("spawn")
_PATIENCE = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Case:
    """A computation: `decode` to, or `encode` from, `frames` of `height` and `width` in tiles, all sizes in pixels."""

    operation: str
    frames: int = 5
    height: int = 96
    width: int = 160
    tile: int = 64
    stride: int = 48
    base_dim: int = 96
    dtype: str = "fp32"


@dataclass(frozen=True)
class Row:
    """Seconds of one case by one process, and by `ranks` processes together until all have the whole result.

    `equal`: whether the shared result has the bits of the single process's. `other_cores`: the number of cores that
    other processes used.
    """

    case: Case
    ranks: int
    alone_s: float
    shared_s: float
    equal: bool
    other_cores: float | None = None

    @property
    def ratio(self) -> float:
        return self.alone_s / self.shared_s


def cases(quick: bool = False) -> list[Case]:
    """Returns cases of eight tiles of three sizes; with `quick`, of a single frame."""
    return [Case(operation, frames=1 if quick else 5) for operation in ("decode", "encode")]


def measure(
    *, quick: bool = False, rounds: int | None = None, ranks: int = 2, cases_: Sequence[Case] | None = None
) -> list[Row]:
    """Measures every case.

    Args:
        quick: measures one frame in one round.
        rounds: rounds per case, in each of which both sides run once; the medians are returned. By default 3, or 1 with
            `quick`.
        ranks: number of processes that share the work.
        cases_: the cases, by default all.

    Raises:
        MeasurementError: there are fewer cores than `ranks`, or the system cannot bind a process to a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise MeasurementError("This system cannot bind a process to a core. Use Linux.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        raise MeasurementError(f"{ranks} processes need a core each, but only {len(cores)} are available.")
    for case in cases_ or ():
        dtype_of(case.dtype)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        crew = [_Process(rank, ranks, cores[rank], folder) for rank in range(ranks)]
        for process in crew:
            stack.callback(process.close)
        return [_row(case, crew, rounds or (1 if quick else 3)) for case in cases_ or cases(quick)]


def _row(case: Case, crew: Sequence[_Process], rounds: int) -> Row:
    _together(crew, case)
    _together(crew, "shared")  # warm-up, not measured
    pids = [process.pid for process in crew]
    alone: list[float] = []
    shared: list[float] = []
    equal = True
    start, busy = time.perf_counter(), others_cpu_seconds(pids)
    for nth in range(rounds):
        for together in (False, True) if nth % 2 == 0 else (True, False):
            told = _together(crew if together else crew[:1], "shared" if together else "alone")
            (shared if together else alone).append(max(seconds for seconds, _ in told))
            equal = equal and all(same for _, same in told)
    spent = None if busy is None else (others_cpu_seconds(pids) or busy) - busy
    other = None if spent is None else max(0.0, spent) / (time.perf_counter() - start)
    return Row(case, len(crew), statistics.median(alone), statistics.median(shared), equal, other)


def _together(crew: Sequence[_Process], command: Any) -> list[Any]:
    for process in crew:
        process.send(command)
    return [process.receive() for process in crew]


class _Process:
    """A process on its own core that executes commands: a case to prepare, "alone" or "shared"."""

    def __init__(self, rank: int, ranks: int, core: int, folder: str) -> None:
        self._end, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_obey, args=(rank, ranks, core, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0

    def send(self, command: Any) -> None:
        self._end.send(command)

    def receive(self) -> Any:
        try:
            return self._end.recv()
        except EOFError:
            raise MeasurementError("A process that shares the work has died; its error is above.") from None

    def close(self) -> None:
        self._end.close()
        self._process.join(30)
        self._process.kill()
        self._process.join()


def _obey(rank: int, ranks: int, core: int, folder: str, end: Any) -> None:
    os.sched_setaffinity(0, {core})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    work: _Work | None = None
    with contextlib.suppress(EOFError):
        while True:
            command = end.recv()
            if isinstance(command, Case):
                work = _Work(command)
                end.send(None)
            elif work is not None:
                end.send(work.alone() if command == "alone" else work.shared())
    dist.destroy_process_group()


class _Work:
    """One case in one of the processes."""

    def __init__(self, case: Case) -> None:
        import torch
        from diffusers import AutoencoderKLWan

        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]
        vae: Any = AutoencoderKLWan(base_dim=case.base_dim)
        self._vae = vae.to(dtype).eval()
        self._vae.enable_tiling(case.tile, case.tile, case.stride, case.stride)
        ratio = self._vae.spatial_compression_ratio
        latents = (1, self._vae.config.z_dim, 1 + (case.frames - 1) // 4, case.height // ratio, case.width // ratio)
        decodes = case.operation == "decode"
        self._input = torch.randn(latents if decodes else (1, 3, case.frames, case.height, case.width)).to(dtype)
        self._run = self._decode if decodes else self._encode
        self._expected: Any = None

    def _decode(self) -> Any:
        return self._vae.decode(self._input).sample

    def _encode(self) -> Any:
        return self._vae.encode(self._input).latent_dist.parameters

    def alone(self) -> tuple[float, bool]:
        """Computes the case alone and returns the seconds and True, for "equal"."""
        start = time.perf_counter()
        self._expected = self._run()
        return time.perf_counter() - start, True

    def shared(self) -> tuple[float, bool]:
        """Returns the seconds, and whether the result equals that of one process; True if that is unknown."""
        import torch.distributed as dist

        from wan_patches.vae_parallel import parallelize_vae

        with parallelize_vae(self._vae):
            dist.barrier()
            start = time.perf_counter()
            found = self._run()
            seconds = time.perf_counter() - start
        return seconds, self._expected is None or identical(found, self._expected)
