"""Benchmarks the transfer of results between processes: our channel against those of Python and torch.

Every transport has one child process for the whole run. A time starts when the child, which holds the value, begins to
send it, and ends when the parent has a usable value. All transports and a plain copy of the same number of bytes are
called in turns.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Table

from wan_patches.bench.measure import identical, others_cpu_seconds
from wan_patches.diagnostics.machine import machine
from wan_patches.executor import ParallelExecutor
from wan_patches.executor.images import Frame
from wan_patches.executor.transport import Channel, pack

CALM = 0.25  # cores
_FEW, _MANY = 5, 31  # minimum and maximum number of samples of each transport
_PAUSE = 0.1  # seconds before each sample, for the system to reclaim the memory freed by the last one
_CPU = torch.device("cpu")
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Case:
    """A value to send: a tensor of `shape`, `count` of them in a dict, or a list of images.

    `kind` is `tensor`, `tensors` (float32), `images` (of Pillow) or `frames` (arrays until their first use).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str = "uint8"
    count: int = 1

    @property
    def nbytes(self) -> int:
        return self.count * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def make(self) -> Any:
        """Makes the value, which is the same in every process."""
        if self.kind == "tensor":
            return self._tensor(0)
        if self.kind == "tensors":
            return {f"tensor {nth}": self._tensor(nth) for nth in range(self.count)}
        arrays = [self._tensor(nth).numpy() for nth in range(self.count)]
        return [Frame(array) if self.kind == "frames" else Image.fromarray(array) for array in arrays]

    def _tensor(self, offset: int) -> torch.Tensor:
        numbers = torch.arange(offset, offset + int(np.prod(self.shape)), dtype=torch.int32)
        return numbers.to(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class Row:
    """One case through one transport: milliseconds of a transfer, and of a plain copy of its bytes just before each.

    `equal`: whether the received value equals the sent one. `other_cores`: the number of cores that other processes
    used; above `CALM`, times and ratios mean little.
    """

    case: str
    nbytes: int
    transport: str
    ms: float
    memcpy_ms: float
    equal: bool
    other_cores: float | None = None

    @property
    def times_memcpy(self) -> float:
        return self.ms / self.memcpy_ms


# The transports


class Transport:
    """Transfers values to this process: `open` once, then `prepare` and any number of `fetch` for each case."""

    name = ""

    def open(self) -> None:
        """Starts the child."""

    def prepare(self, case: Case) -> None:
        """Makes the child produce the value; returns when it is ready."""
        raise NotImplementedError

    def fetch(self) -> tuple[Any, float]:
        """Returns the value and the seconds since the child began to send it."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """Returns the processes whose work belongs to the measurement."""
        return []

    def close(self) -> None:
        """Ends the child."""


class _OneChild(Transport):
    """A transport with a child that executes commands from a pipe. Subclasses define how a value is sent and received.

    `_ends` returns the ends of the parent and of the child; `_join` turns the child's end into its usable form.
    """

    def _ends(self) -> tuple[Any, Any]:
        raise NotImplementedError

    @classmethod
    def _join(cls, end: Any) -> Any:
        return end

    @classmethod
    def _put(cls, end: Any, value: Any) -> None:
        raise NotImplementedError

    @classmethod
    def _get(cls, end: Any) -> Any:
        raise NotImplementedError

    def open(self) -> None:
        self._end, theirs = self._ends()
        self._control, control = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_obey, args=(type(self), theirs, control), daemon=True)
        self._process.start()
        control.close()
        if hasattr(theirs, "close") and theirs is not self._end:
            theirs.close()

    def prepare(self, case: Case) -> None:
        self._control.send(case)
        self._control.recv()

    def fetch(self) -> tuple[Any, float]:
        self._control.send("go")
        value = self._get(self._end)
        now = time.perf_counter()
        return value, now - self._control.recv()

    def pids(self) -> list[int]:
        return [self._process.pid or 0]

    def close(self) -> None:
        self._control.close()
        self._process.join(30)
        self._process.kill()
        if hasattr(self._end, "close"):
            self._end.close()


def _obey(transport: type[_OneChild], end: Any, control: Any) -> None:
    torch.set_num_threads(1)  # idle threads would spin on the core that the other process needs
    end, value, sent = transport._join(end), None, None
    with contextlib.suppress(EOFError):
        while True:
            command = control.recv()
            if isinstance(command, Case):
                value = sent = None
                value = command.make()
                control.send("ready")
            else:
                sent = None
                sent = _fresh(value)
                start = time.perf_counter()  # on Linux the same clock in all processes
                transport._put(end, sent)
                control.send(start)


def _fresh(value: Any) -> Any:
    """Copies tensors, since a pipeline's results are new: torch would keep them in shared memory and not copy again."""
    if isinstance(value, dict):
        return {key: part.clone() for key, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


class Pool(_OneChild):
    """Our channel."""

    name = "channel"
    options: dict[str, Any] = {}  # noqa: RUF012

    def _ends(self) -> tuple[Any, Any]:
        return Channel.pair()

    @classmethod
    def _join(cls, end: socket.socket) -> Channel:
        return Channel(end, **cls.options)

    @classmethod
    def _put(cls, end: Channel, value: Any) -> None:
        end.send("value", value=pack(value))

    @classmethod
    def _get(cls, end: Channel) -> Any:
        return end.recv().load()


class Submit(Transport):
    """A `ParallelExecutor` end to end, from the call of `submit` to the result."""

    name = "submit"

    def open(self) -> None:
        self._executor = ParallelExecutor(_Producer, devices=["cpu"], layout="replicas", threads=1)
        self._pid = self._executor.submit("pid").result()

    def prepare(self, case: Case) -> None:
        self._executor.submit("make", case).result()

    def fetch(self) -> tuple[Any, float]:
        start = time.perf_counter()
        value = self._executor.submit("give").result()
        return value, time.perf_counter() - start

    def pids(self) -> list[int]:
        return [self._pid]

    def close(self) -> None:
        self._executor.shutdown()


class _Producer:
    """A pipeline that makes its result before the measured call."""

    def __call__(self, do: str, case: Case | None = None) -> Any:
        if do == "pid":
            return os.getpid()
        if case is not None:
            self._value = None
            self._value = case.make()
        return self._value if do == "give" else None


class Files(Pool):
    """Our channel with no free slot."""

    name = "no free slot"
    options = {"slots": 0}  # noqa: RUF012


class Wire(Pool):
    """Our channel without files in memory (memfd)."""

    name = "no memfd"
    options = {"memfd": False}  # noqa: RUF012


class Pickle(_OneChild):
    """`pickle` through a `multiprocessing.Pipe`."""

    name = "pickle"

    def _ends(self) -> tuple[Any, Any]:
        return _CONTEXT.Pipe()

    @classmethod
    def _put(cls, end: Any, value: Any) -> None:
        end.send_bytes(pickle.dumps(value))  # torch makes `send` share the memory of tensors

    @classmethod
    def _get(cls, end: Any) -> Any:
        return pickle.loads(end.recv_bytes())


class TorchQueue(_OneChild):
    """`torch.multiprocessing.Queue`, which passes descriptors of shared memory."""

    name = "torch.mp"

    def _ends(self) -> tuple[Any, Any]:
        queue = torch.multiprocessing.get_context("spawn").Queue()
        return queue, queue

    @classmethod
    def _put(cls, end: Any, value: Any) -> None:
        end.put(value)

    @classmethod
    def _get(cls, end: Any) -> Any:
        return end.get()


class NamedSegments(_OneChild):
    """A new `SharedMemory` for each tensor, with a copy in and a copy out: the reference design."""

    name = "named segments"

    def _ends(self) -> tuple[Any, Any]:
        return _CONTEXT.Pipe()

    @classmethod
    def _put(cls, end: Any, value: Any) -> None:
        end.send_bytes(pickle.dumps(cls._map(value, cls._into)))

    @classmethod
    def _get(cls, end: Any) -> Any:
        return cls._map(pickle.loads(end.recv_bytes()), cls._out_of)

    @classmethod
    def _map(cls, value: Any, change: Callable[[Any], Any]) -> Any:
        if isinstance(value, dict):
            return {key: change(part) for key, part in value.items()}
        return [change(part) for part in value] if isinstance(value, list) else change(value)

    @staticmethod
    def _into(value: Any) -> tuple[str, tuple[int, ...], str, bool]:
        image = isinstance(value, Image.Image)
        array = np.asarray(value) if image else value.numpy()
        segment = SharedMemory(create=True, size=array.nbytes)
        np.ndarray(array.shape, array.dtype, segment.buf)[...] = array
        segment.close()
        return segment.name, array.shape, array.dtype.str, image

    @staticmethod
    def _out_of(found: tuple[str, tuple[int, ...], str, bool]) -> Any:
        name, shape, dtype, image = found
        segment = SharedMemory(name=name)
        array = np.ndarray(shape, dtype, segment.buf).copy()
        segment.close()
        segment.unlink()
        return Image.fromarray(array) if image else torch.from_numpy(array)


def transports() -> list[Transport]:
    """Returns the transports to compare, ours first."""
    return [
        Pool(),
        Submit(),
        NamedSegments(),
        TorchQueue(),
        Pickle(),
    ]


def cases(quick: bool = False) -> list[Case]:
    """Returns typical results of a pipeline or, with `quick`, results of an eighth of their size."""
    frames = 10 if quick else 81
    video = (1, 3, frames, 720, 1280)
    return [
        Case(f"video {_shape(video)} float32", "tensor", video, "float32"),
        Case(f"video {_shape(video)} uint8", "tensor", video),
        Case(f"{frames} images 720x1280", "images", (720, 1280, 3), count=frames),
        Case(f"{frames} images 480x832", "images", (480, 832, 3), count=frames),
        Case(f"{frames} frames 480x832", "frames", (480, 832, 3), count=frames),
        Case("latents 8 MiB float32", "tensor", (1, 16, (16 if quick else 128), 32, 32), "float32"),
        Case("dict of 20 x 256 KiB", "tensors", (64, (128 if quick else 1024)), "float32", 20),
        Case("dict of 20 x 4 KiB", "tensors", (1024,), "float32", 20),
        Case("a tensor of 4 KiB", "tensor", (1024,), "float32"),
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# The measurement


def measure(
    *,
    quick: bool = False,
    seconds: float | None = None,
    cases_: Sequence[Case] | None = None,
    transports_: Sequence[Transport] | None = None,
) -> list[Row]:
    """Measures every case through every transport.

    Args:
        quick: uses an eighth of the size.
        seconds: approximate time per case, with at least 5 samples of each transport. By default 20, or 3 with `quick`.
        cases_: the cases, by default all.
        transports_: the transports, by default all.
    """
    chosen = list(transports() if transports_ is None else transports_)
    seconds = seconds if seconds is not None else 3.0 if quick else 20.0
    with contextlib.ExitStack() as stack:
        for transport in chosen:
            transport.open()
            stack.callback(transport.close)
        return [row for case in (cases_ or cases(quick)) for row in _rows(case, chosen, seconds)]


def _rows(case: Case, chosen: list[Transport], seconds: float) -> Iterator[Row]:
    expected, equal = case.make(), {}
    for transport in chosen:
        transport.prepare(case)
        value, _ = transport.fetch()  # not measured, since it includes slots and imports
        equal[transport.name] = identical(value, expected)
        del value
    del expected
    gc.collect()
    source, target = np.ones(case.nbytes, np.uint8), np.ones(case.nbytes, np.uint8)
    names = [transport.name for transport in chosen]
    times: dict[str, list[float]] = {name: [] for name in names}
    copies: dict[str, list[float]] = {name: [] for name in names}
    pids = [pid for transport in chosen for pid in transport.pids()]
    start, busy, rounds = time.perf_counter(), others_cpu_seconds(pids), 0
    while rounds < _FEW or (time.perf_counter() - start < seconds and rounds < _MANY):
        for nth in range(len(chosen)):
            transport = chosen[(nth + rounds) % len(chosen)]
            time.sleep(_PAUSE)
            copies[transport.name].append(_memcpy(source, target))
            value, elapsed = transport.fetch()
            del value  # frees its slot, like a program that writes one result after another to files
            times[transport.name].append(elapsed)
        rounds += 1
    other = None
    if busy is not None:
        other = max(0.0, (others_cpu_seconds(pids) or busy) - busy) / (time.perf_counter() - start)
    for name in names:
        own, copy = statistics.median(times[name]) * 1e3, statistics.median(copies[name]) * 1e3
        yield Row(case.name, case.nbytes, name, own, copy, equal[name], other)


def _memcpy(source: np.ndarray, target: np.ndarray) -> float:
    """Returns the seconds of a copy by one thread, from new memory, like that of a child, to memory in use."""
    fresh = torch.from_numpy(source).clone().numpy()
    start = time.perf_counter()
    np.copyto(target, fresh)
    return time.perf_counter() - start


# Output


def table(rows: Sequence[Row]) -> Group:
    """Returns a table with a line per case and, in brackets, the first transport's speed relative to the others."""
    names = list(dict.fromkeys(row.transport for row in rows))
    found = Table(box=box.SIMPLE, pad_edge=False)
    found.add_column("value", overflow="fold")
    for title in ("memcpy ms", f"{names[0]} ms", "x memcpy", *(f"{name} ms" for name in names[1:])):
        found.add_column(title, justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        line = {row.transport: row for row in rows if row.case == case}
        ours = line[names[0]]
        busy = "~" if _is_disturbed(ours) else ""
        others = [f"{_number(line[name].ms)} ({busy}{line[name].ms / ours.ms:,.1f}x)" for name in names[1:]]
        found.add_row(case, _number(ours.memcpy_ms), _number(ours.ms), f"{busy}{ours.times_memcpy:,.2f}", *others)
    notes = ["Medians of transfers in turns, from the producer's start to a value in the other process."]
    if disturbed := [row.other_cores or 0.0 for row in rows if _is_disturbed(row)]:
        notes.append(f"~ other processes kept up to {max(disturbed):.1f} cores busy. Run again.")
    notes += [f"Not what was sent: {row.case} through {row.transport}" for row in rows if not row.equal]
    return Group(found, *notes)


def _is_disturbed(row: Row) -> bool:
    return row.other_cores is not None and row.other_cores > CALM


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows and the facts about the machine."""
    lines = [{**asdict(row), "times_memcpy": row.times_memcpy} for row in rows]
    path.write_text(json.dumps({"machine": machine(_CPU), "rows": lines}, indent=2) + "\n")
