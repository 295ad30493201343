"""Shared parts of measurements: devices, interleaved medians, peak memory, bit equality."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wan_patches.diagnostics.machine import machine
from wan_patches.diagnostics.memory import watching_memory
from wan_patches.pipelines.stages import synchronize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MeasurementError(RuntimeError):
    """Raised if a measurement is impossible; the message is a sentence for the user."""


# Devices


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype named `fp32`, `bf16` or `fp16`; raises `MeasurementError` for other names."""
    if name not in DTYPES:
        raise MeasurementError(f"Unknown dtype {name!r}; known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """Returns the name that `dtype_of` takes."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def device_of(name: str) -> torch.device:
    """Returns the device named `name`; `auto` is the accelerator that torch finds, or else the CPU.

    Raises:
        MeasurementError: torch cannot use the device on this machine.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        if found is not None and torch.accelerator.is_available():
            return torch.device(found.type)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.startswith("npu"):
            importlib.import_module("torch_npu")
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeasurementError(f"The device {name!r} cannot be used: {reason}") from None
    return device


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Returns a seeded generator of `device`, or of the CPU if the backend has no generators.

    diffusers' `randn_tensor` accepts both.
    """
    try:
        return torch.Generator(device).manual_seed(seed)
    except (RuntimeError, NotImplementedError):
        return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads during the block; None keeps it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Equal bits


def identical(a: Any, b: Any) -> bool:
    """Whether two results have the same types, dtypes, shapes and bits (0 and -0 differ).

    Accepts tensors, arrays, PIL images, and lists, tuples and mappings of these.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and identical(torch.from_numpy(a), torch.from_numpy(b))
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):
        return (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# Time


@dataclass(frozen=True)
class Turns:
    """The times of calls that ran in turns.

    samples: by name, the seconds of a call in each round.
    cpu_samples: the same in CPU seconds of all threads of this process; empty on accelerators.
    other_cores: the number of cores that other processes used meanwhile (None: unknown).
    """

    samples: Mapping[str, Sequence[float]]
    cpu_samples: Mapping[str, Sequence[float]]
    other_cores: float | None

    @property
    def seconds(self) -> dict[str, float]:
        """The median seconds of a call, by name."""
        return {name: statistics.median(found) for name, found in self.samples.items()}

    def cpu_seconds(self, name: str) -> float | None:
        """Returns the median CPU seconds of a call; None on accelerators."""
        return statistics.median(self.cpu_samples[name]) if self.cpu_samples else None

    def spread(self, name: str, other: str) -> tuple[float, float]:
        """Returns the quartiles of the time of one call divided by that of another, over the rounds."""
        ratios = [a / b for a, b in zip(self.samples[name], self.samples[other])]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    seconds: float = 3.0,
    sample: float = 0.01,
) -> Turns:
    """Returns the times of each call, measured in turns so that a busy machine affects all calls alike.

    Every call must have run before. A sample repeats its call until it lasts at least `sample` seconds. Each call gets
    3 to 31 samples; all samples together take about `seconds`.

    Args:
        around: by name, factories of context managers that a sample runs in; entering and leaving them is not timed.
    """
    around = around or {}

    def timed(name: str, times: int) -> tuple[float, float]:
        with around.get(name, contextlib.nullcontext)():
            return _time(calls[name], device, times)

    start, busy = time.perf_counter(), others_cpu_seconds()
    first_times = {name: timed(name, 1) for name in calls}
    once = {name: max(seconds, 1e-7) for name, (seconds, _) in first_times.items()}
    times = {name: max(1, math.ceil(sample / once[name])) for name in calls}
    # long calls need no repetition
    samples = {name: [first_times[name]] if times[name] == 1 else [] for name in calls}
    rounds = min(31, max(3, int(seconds / sum(once[name] * times[name] for name in calls))))
    names = list(calls)
    for nth in range(rounds):
        first = nth % len(names)
        turn = names[first:] + names[:first]  # no call is always first,
        for name in reversed(turn) if nth // len(names) % 2 else turn:  # or always after the same one
            if len(samples[name]) <= nth:
                samples[name].append(timed(name, times[name]))
    # not taken from the spread of samples: a thread that waits for a busy core is slow in every sample
    others = None if busy is None else (others_cpu_seconds() or busy) - busy
    cores = None if others is None else max(0.0, others) / (time.perf_counter() - start)
    by_wall, by_cpu = ({name: [one[nth] for one in found] for name, found in samples.items()} for nth in (0, 1))
    return Turns(by_wall, by_cpu if device.type == "cpu" else {}, cores)


def others_cpu_seconds(pids: Iterable[int] = ()) -> float | None:
    """Returns the CPU seconds of all processes except this one and `pids`, on all cores that this machine sees.

    None if psutil is not installed.
    """
    try:
        import psutil
    except ImportError:
        return None
    idle = {"idle", "iowait", "guest", "guest_nice"}  # "user" includes guests
    seconds = sum(value for name, value in psutil.cpu_times()._asdict().items() if name not in idle)
    for pid in (os.getpid(), *pids):
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(pid).cpu_times()
            seconds -= own.user + own.system
    return float(seconds)


def _time(call: Callable[[], Any], device: torch.device, calls: int) -> tuple[float, float]:
    """Returns the seconds and the CPU seconds of one of these calls."""
    synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls, (time.process_time() - start_cpu) / calls


# Memory


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Returns the peak memory of a call in bytes, above the memory in use before and including its result.

    On accelerators, torch's allocator counts. On the CPU, the resident set of the process counts, which includes numpy
    and Pillow and is accurate to a few hundred KiB. None if the device has no such counters.
    """
    with watching_memory(device) as peak:
        call()
        return peak()


# The machine


def write_rows(path: Path, rows: list[dict[str, Any]], device: torch.device, threads: int | None = None) -> None:
    """Writes a measurement and the facts about the machine; `threads` is torch's number of threads during it."""
    with using_threads(threads):
        content = {"machine": machine(device), "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
