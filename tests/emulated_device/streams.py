"""Streams and events for the emulated accelerator, whose copies really are late.

A copy from pinned memory that is started on a side stream with `non_blocking` does not happen: the new tensor is full
of NaN (of -1 for integers) until something waits for the stream, or for an event recorded on it after the copy. What
computes too early has wrong numbers, as on hardware. The journal has every copy, wait and event in order.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Entry:
    """Something that happened: `what` on the stream of that number (0 is the one that computes)."""

    what: str
    stream: int
    source: int = 0  # of a copy: its address in host memory, which may be pinned
    pinned: bool = False
    label: str = ""


@dataclass
class Journal:
    """What happened since it was cleared."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, what: str, stream: int, **more: Any) -> None:
        self.entries.append(Entry(what, stream, **more))

    def clear(self) -> None:
        self.entries.clear()


@dataclass
class Runtime:
    """The streams of the device and what is queued on them."""

    journal: Journal
    stream: type
    event: type
    current: Callable[[], Any]

    def watching(self, on_op: Callable[[Any], None] | None = None) -> TorchDispatchMode:
        """Copies inside take part; `on_op` is called before every operator, with its name."""
        return _Copies(self, on_op)


class _Copies(TorchDispatchMode):
    def __init__(self, runtime: Runtime, on_op: Callable[[Any], None] | None) -> None:
        super().__init__()
        self.runtime, self.on_op = runtime, on_op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.on_op is not None:
            self.on_op(name)
        device = torch.device(kwargs.get("device") or "cpu")
        if name != "_to_copy" or device.type != "npu" or not args[0].is_cpu:
            return func(*args, **kwargs)
        source, stream = args[0], self.runtime.current()
        self.runtime.journal.add("copy", stream.number, source=source.data_ptr(), pinned=source.is_pinned())
        if not (stream.number and kwargs.get("non_blocking") and source.is_pinned() and source.numel()):
            return func(*args, **kwargs)
        arrived = source.detach().clone()  # who writes to pinned memory too early is not what is looked for here
        result = torch.empty_like(source, device="npu", dtype=kwargs.get("dtype"))
        result.fill_(float("nan") if result.is_floating_point() else -1)
        stream.queue.append(lambda: result.copy_(arrived, non_blocking=True))
        return result


def install(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Gives `torch.npu` streams and events, and tensors pinned memory, until the test ends."""
    journal, numbers = Journal(), itertools.count()

    class Stream:
        """As `torch.cuda.Stream`; number 0 computes."""

        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.number = next(numbers)
            self.queue: list[Callable[[], Any]] = []

        def finish(self, count: int | None = None) -> None:
            due, self.queue = self.queue[:count], self.queue[len(self.queue[:count]) :]
            for arrive in due:
                arrive()

        def synchronize(self) -> None:
            journal.add("synchronize", self.number)
            self.finish()

        def query(self) -> bool:
            return not self.queue

        def record_event(self, event: Any = None) -> Any:
            event = Event() if event is None else event
            event.record(self)
            return event

        def wait_event(self, event: Any) -> None:
            journal.add("wait_event", self.number)
            event.finish()

        def wait_stream(self, stream: Any) -> None:
            self.wait_event(stream.record_event())

    class Event:
        """As `torch.cuda.Event`."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.stream: Any = None
            self.count = 0

        def record(self, stream: Any = None) -> None:
            self.stream = current() if stream is None else stream
            self.count = len(self.stream.queue)
            journal.add("record_event", self.stream.number)

        def wait(self, stream: Any = None) -> None:
            (current() if stream is None else stream).wait_event(self)

        def synchronize(self) -> None:
            self.finish()

        def finish(self) -> None:
            if self.stream is not None:
                self.stream.finish(self.count)
                self.count = 0

    stack = [Stream()]

    def current(device: Any = None) -> Any:
        return stack[-1]

    @contextlib.contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        stack.append(chosen)
        try:
            yield
        finally:
            stack.pop()

    def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        pinned = tensor.detach().clone(memory_format=torch.preserve_format)
        pinned._emulated_pinned = True  # type: ignore[attr-defined]
        return pinned

    for name, value in (("Stream", Stream), ("Event", Event), ("current_stream", current), ("stream", stream)):
        monkeypatch.setattr(torch.npu, name, value, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: hasattr(tensor, "_emulated_pinned"))
    return Runtime(journal, Stream, Event, current)
