"""Observes calls of pipelines and patched operations from outside; the tally reports which form served each call."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import wan_patches
from wan_patches.diagnostics.profiling.transfers import has_accelerator, mark
from wan_patches.patching.tally import DISPATCH, FIRST_SIGHT, Way
from wan_patches.pipelines.stages import Stopwatch, synchronize, watching

if TYPE_CHECKING:
    import torch


@dataclass
class PipelineProfile:
    """The calls of the pipelines of one class on one device, summed.

    calls: number of calls, of which `failed` raised an exception. Failed calls, and calls whose end was not seen,
        contribute only their completed stages.
    seconds: by stage, in the order in which a pipeline runs them.
    peak_bytes: by stage, peak memory beyond that held when the call began: of torch's allocator on accelerators, of the
        process on CPUs. None if the backend does not count memory.
    """

    pipeline: str
    device: str
    calls: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


@dataclass
class OpProfile:
    """The calls of one operation of a patch, as counted by `wan_patches.patching.tally`.

    calls: number of calls. `stock` of them fell back to stock; `first_sight` ran both ways for the first-sight gate.
    forms: the forms that served the other calls, with the number of calls of each.
    seconds: duration of the calls, with the device synchronised at both ends; `own_seconds` excludes operations called
        inside. first_seconds: duration of the first-sight calls only, including the compilation of kernels.
    reasons: the reasons for falling back to stock, with the number of calls of each.
    """

    patch: str
    op: str
    calls: int = 0
    stock: int = 0
    first_sight: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0
    first_seconds: float = 0.0
    forms: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def fast(self) -> int:
        """Number of calls served by a form of the patch."""
        return self.calls - self.stock - self.first_sight


_OP, _PIPELINE = range(2)


@dataclass
class _Call:
    """A call from patched code in progress, and the ways counted for it so far."""

    frame: FrameType
    op: _Op
    device: Any
    mark: Any = None
    start: float = 0.0
    inner: float = 0.0
    ways: list[Way] = field(default_factory=list)


@dataclass(frozen=True)
class _Op:
    """A function that patched code calls by `name`."""

    patch: str
    name: str
    module: str
    function: str

    def found(self) -> Any:
        """Returns the function, or the op of `wan_patches.ops.dispatch`; None while its module is not loaded."""
        return getattr(sys.modules.get(self.module), self.function, None)


@dataclass
class _PipelineCall:
    frame: FrameType
    pipe: Any
    row: PipelineProfile
    device: torch.device
    watch: Stopwatch
    watched: contextlib.ExitStack


class Observer:
    """Recognises functions by their code objects and follows their nested calls.

    The results are in `pipelines` and `ops`; `preparing` is the observer's own overhead in seconds.

    Args:
        pipe: the pipeline to watch; None watches every diffusers pipeline.
        marks: whether calls are labelled in the trace of torch's profiler.
    """

    def __init__(self, pipe: Any, marks: bool) -> None:
        self.pipelines: list[PipelineProfile] = []
        self.ops: list[OpProfile] = []
        self._pipe, self._marks = pipe, marks
        self._has_accelerator = has_accelerator()
        self.preparing = 0.0
        self._roles: dict[int, tuple[int, Any]] = {}  # by the id of a code object, which `tracing_calls` keeps alive
        self._rows: dict[tuple[str, str], OpProfile] = {}
        self._calls: list[_Call] = []
        self._running: list[_PipelineCall] = []
        self._ops: dict[str, list[_Op]] = {}
        for patch in wan_patches._registry.patches():
            for name, path in patch.calls.items():
                if isinstance(path, str):
                    module, _, function = path.partition(":")
                    self._ops.setdefault(function, []).append(_Op(patch.name, name, module, function))

    def wants(self, frame: FrameType) -> bool:
        """Whether `enter` and `leave` should be called for this code."""
        role = self._role(frame)
        if role is not None:
            self._roles[id(frame.f_code)] = role
        return role is not None

    def _role(self, frame: FrameType) -> tuple[int, Any] | None:
        code, owner = frame.f_code, _first_argument(frame)
        if code.co_name == "__call__":
            if frame.f_globals.get("__name__") == DISPATCH and hasattr(owner, "forms"):
                return _OP, None  # code shared by all ops; the frame identifies the op
            return (_PIPELINE, None) if self._is_watched_kind(owner) else None
        ops = [op for op in self._ops.get(code.co_name, ()) if getattr(op.found(), "__code__", None) is code]
        return (_OP, ops) if ops else None

    def _is_watched_kind(self, owner: Any) -> bool:
        return _is_pipeline(owner) if self._pipe is None else isinstance(owner, type(self._pipe))

    def enter(self, frame: FrameType) -> None:
        role, value = self._roles[id(frame.f_code)]
        if role == _PIPELINE:
            self._enter_pipeline(frame)
        else:
            caller = frame.f_back
            names = caller.f_code.co_names if caller is not None else ()
            for op in self._named(frame) if value is None else value:
                if op.name in names:  # other callers call the function by another name
                    self._enter_op(frame, op)
                    return

    def _named(self, frame: FrameType) -> list[_Op]:
        """Returns the names under which patches call the op whose call begins."""
        found = _first_argument(frame)
        return [op for op in self._ops.get(found.__name__, ()) if op.found() is found]

    def count(self, way: Way) -> None:
        """Adds a way to the innermost call."""
        if self._calls:
            self._calls[-1].ways.append(way)

    def leave(self, frame: FrameType, value: Any) -> None:
        role, _ = self._roles[id(frame.f_code)]
        if role == _PIPELINE:
            if self._running and self._running[-1].frame is frame:
                self._leave_pipeline(self._running.pop(), value)
        elif self._calls and self._calls[-1].frame is frame:
            self._leave_op(self._calls.pop())

    def close(self) -> None:
        """Closes calls whose end was not seen, because another profiler was set."""
        while self._calls:
            call = self._calls.pop()
            if call.mark is not None:
                call.mark.__exit__(None, None, None)
        while self._running:
            self._end_pipeline(self._running.pop(), whole=False)

    # Operations

    def _enter_op(self, frame: FrameType, op: _Op) -> None:
        call = _Call(frame, op, self._device(frame))
        synchronize(call.device)
        if self._marks:
            call.mark = mark(f"wan_patches: {op.patch}: {op.function}")
            call.mark.__enter__()
        self._calls.append(call)
        call.start = time.perf_counter()

    def _leave_op(self, call: _Call) -> None:
        synchronize(call.device)
        seconds = time.perf_counter() - call.start
        if call.mark is not None:
            call.mark.__exit__(None, None, None)
        if not call.ways:  # it returned the result of another operation
            if self._calls:
                self._calls[-1].inner += call.inner
            return
        op, ways = call.op, call.ways
        row = self._rows.get((op.patch, op.function))
        if row is None:
            row = self._rows[op.patch, op.function] = OpProfile(op.patch, op.function)
            self.ops.append(row)
        row.calls += 1
        row.seconds += seconds
        row.own_seconds += seconds - call.inner
        if any(way.reason == FIRST_SIGHT for way in ways):
            row.first_sight += 1
            row.first_seconds += seconds
        else:
            form = next((way.form for way in ways if way.form), None)
            counts, why = (row.reasons, ways[0].reason) if form is None else (row.forms, form)
            row.stock += form is None
            counts[why] = counts.get(why, 0) + 1
        if self._calls:
            self._calls[-1].inner += seconds

    def _device(self, frame: FrameType) -> torch.device:
        """Returns the device of a call: that of the surrounding pipeline, or else that of its arguments."""
        import torch

        if self._running:
            return self._running[-1].device
        found = []
        if self._has_accelerator:
            for value in frame.f_locals.values():
                found += [value] if isinstance(value, torch.device) else []
                found += [value.device] if isinstance(value, torch.Tensor) else []
        return next((device for device in found if device.type != "cpu"), torch.device("cpu"))

    # Pipelines

    def _enter_pipeline(self, frame: FrameType) -> None:
        from wan_patches.diagnostics.memory import watching_memory
        from wan_patches.pipelines.components import execution_device

        pipe = _first_argument(frame)
        if self._pipe is not None and pipe is not self._pipe:
            return
        if any(call.pipe is pipe for call in self._running):  # the class calls its base class
            return
        start, device = time.perf_counter(), execution_device(pipe)
        row = self._pipeline_row(type(pipe).__name__, str(device))
        watched = contextlib.ExitStack()
        if self._marks:
            watched.enter_context(mark(f"wan_patches: {row.pipeline}"))
        peak = watched.enter_context(watching_memory(device))

        def end(stage: str) -> None:
            most, before = peak(), row.peak_bytes.get(stage)
            row.peak_bytes[stage] = most if before is None or most is None else max(most, before)

        watch = watched.enter_context(watching(pipe, device, on_end=end))
        self._running.append(_PipelineCall(frame, pipe, row, device, watch, watched))
        self.preparing += time.perf_counter() - start

    def _leave_pipeline(self, call: _PipelineCall, value: Any) -> None:
        failed = value is None and _is_pipeline(call.pipe)  # no pipeline returns None, so an exception was raised
        call.row.failed += failed
        self._end_pipeline(call, whole=not failed)

    def _end_pipeline(self, call: _PipelineCall, whole: bool) -> None:
        """Adds the completed stages to the row; if the call is `whole`, also the last one."""
        call.row.calls += 1
        if whole:
            call.watched.close()
        else:
            error = RuntimeError()
            call.watched.__exit__(type(error), error, None)
        for stage, seconds in call.watch.seconds.items():
            call.row.seconds[stage] = call.row.seconds.get(stage, 0.0) + seconds

    def _pipeline_row(self, pipeline: str, device: str) -> PipelineProfile:
        for row in self.pipelines:
            if (row.pipeline, row.device) == (pipeline, device):
                return row
        self.pipelines.append(PipelineProfile(pipeline, device))
        return self.pipelines[-1]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_pipeline(value: Any) -> bool:
    """Whether an object is a diffusers pipeline, without importing diffusers."""
    return any(
        base.__name__ in ("DiffusionPipeline", "ModularPipeline") and _package(base.__module__) == "diffusers"
        for base in type(value).__mro__
    )
