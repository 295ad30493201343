"""Profiles pipelines: time by stage and by patched operation, and which calls fell back to stock and why.

    with wan_patches.profile() as profile:
        pipe(prompt="A red fox")
    print(profile)

Calls are observed from outside during the block: functions and their code stay unchanged, and without a profile there
is no overhead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import wan_patches
from wan_patches.diagnostics.call_tracing import CallTrace, tracing_calls
from wan_patches.diagnostics.preflight import check_file
from wan_patches.diagnostics.profiling.transfers import Transfer, count_transfers, has_accelerator, recorder
from wan_patches.diagnostics.profiling.watch import Observer, OpProfile, PipelineProfile
from wan_patches.patching import tally
from wan_patches.patching.renames import renamed
from wan_patches.patching.status import ACTIVE
from wan_patches.pipelines.stages import CALL, STAGES

Value = TypeVar("Value")

__all__ = ["OpProfile", "PipelineProfile", "Profile", "Transfer", "profile", "run"]

# Results


class Profile:
    """The result of `profile()`, complete when its block has ended. Prints as tables, also in notebooks.

    seconds: duration of the block, without the preparation of its calls.
    pipelines: one row for each pipeline class and device.
    ops: one row for each operation of a patch that was called.
    transfers: between host and device; None if torch's profiler was not on (`recorded`).
    active: names of the active patches.
    notes: further remarks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pipelines: list[PipelineProfile] = []
        self.ops: list[OpProfile] = []
        self.transfers: list[Transfer] | None = None
        self.active: tuple[str, ...] = ()
        self.notes: list[str] = []
        self._recorder: Any = None
        self._saved: Path | None = None

    crossings = renamed("crossings", "transfers")

    @property
    def recorded(self) -> bool:
        """Whether torch's profiler was on."""
        return self._recorder is not None

    def __str__(self) -> str:
        from wan_patches.diagnostics.profiling.views import tables
        from wan_patches.tables import text

        return text(*tables(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        from wan_patches.diagnostics.profiling.views import tables

        return Group(*tables(self))

    def _repr_html_(self) -> str:
        from wan_patches.diagnostics.profiling.views import tables
        from wan_patches.tables import html

        return html(*tables(self))

    def to_json(self) -> str:
        """Returns the whole profile and the machine's facts as JSON. Times are in seconds, memory in bytes."""
        import torch

        from wan_patches.diagnostics.machine import machine

        device = torch.device(self.pipelines[0].device if self.pipelines else "cpu")
        content = {
            "seconds": self.seconds,
            "active": self.active,
            "pipelines": [asdict(row) for row in self.pipelines],
            "ops": [{**asdict(row), "fast": row.fast} for row in self.ops],
            "transfers": None if self.transfers is None else [asdict(row) for row in self.transfers],
            "notes": self.notes,
            "machine": machine(device),
        }
        return json.dumps(content, indent=2)

    def save_json(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def save_chart(self, path: str | Path) -> None:
        """Draws the stages of each pipeline and the time of each operation to an image file, as PNG or by its suffix.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not support the file type, or there is nothing to draw.
        """
        from wan_patches.diagnostics.profiling.views import chart

        chart(self).savefig(path)

    def save_trace(self, path: str | Path) -> None:
        """Writes the trace of torch's profiler, in which calls of patched operations are labelled.

        View it in `chrome://tracing` or https://ui.perfetto.dev.

        Raises:
            RuntimeError: torch's profiler was not on.
        """
        if self._recorder is None:
            raise RuntimeError("no trace was recorded: use wan_patches.profile(trace=True)")
        if self._saved is None:
            self._recorder.export_chrome_trace(str(path))
            self._saved = Path(path)
        elif Path(path).resolve() != self._saved.resolve():  # torch can export a trace only once
            shutil.copyfile(self._saved, path)


# Entry points


@contextlib.contextmanager
def profile(pipe: Any = None, *, trace: bool | None = None) -> Iterator[Profile]:
    """Profiles the pipelines that are called in the block, in this thread.

        with wan_patches.profile() as profile:
            pipe(prompt="A red fox")
        print(profile)
        profile.save_chart("profile.png")

    Does not enable patches. After `enable()` the profile shows which calls of patched operations were fast; without it,
    only the stages of stock. Profiling slows down Python code. On accelerators it waits for the device at the end of
    stages and operations, so these cannot overlap, and it resets the counters of peak memory. Nothing remains in place
    after the block. Code compiled by `torch.compile` is not seen, nor is code under another profiler that is set within
    the block (cProfile, another `profile`); a note reports that.

    Args:
        pipe: the pipeline to watch, or any other object with a `__call__` in Python; None watches every diffusers
            pipeline.
        trace: whether to run torch's profiler, which is required for `save_trace` and for the counts of copies and
            waits. It keeps every operator of the block in memory, so profile only a few steps. None turns it on if
            there is an accelerator. Not for blocks that use torch's profiler themselves.

    Yields:
        A `Profile`, complete after the block.

    Raises:
        TypeError: `pipe` is not callable, or `trace` is not True, False or None.
    """
    if pipe is not None and not callable(pipe):
        raise TypeError(
            f"pipe must be a pipeline, not {type(pipe).__name__}; for scripts: wan-patches profile script.py"
        )
    if trace is not None and not isinstance(trace, bool):
        raise TypeError("trace must be True, False or None; profile.save_trace(path) writes the file after the block")
    found = Profile()
    before = _active()
    torchs = recorder(found.notes, trace)
    observer = Observer(pipe, marks=torchs is not None)
    found.pipelines, found.ops = observer.pipelines, observer.ops
    calls = CallTrace()
    try:
        with torchs or contextlib.nullcontext():
            start = time.perf_counter()
            try:
                watched = tracing_calls(observer.wants, on_call=observer.enter, on_return=observer.leave)
                with tally.listening(observer.count), watched as calls:
                    yield found
            finally:
                found.seconds = time.perf_counter() - start - observer.preparing
                observer.close()
    finally:
        ran = {row.patch for row in found.ops}
        found.active = tuple(sorted(before | _active() | ran))
        for row in found.pipelines:
            row.seconds, row.peak_bytes = _in_order(row.seconds), _in_order(row.peak_bytes)
        if torchs is not None:
            found._recorder = torchs
            found.transfers = count_transfers(torchs, found.notes)
        _remark(found, pipe, calls.displaced)


def run(
    target: str,
    arguments: Sequence[str] = (),
    *,
    module: bool = False,
    json: Path | None = None,
    chart: Path | None = None,
    trace: Path | None = None,
    copies: bool = True,
) -> None:
    """Runs a script like `script_runner.run` and prints a profile of it to stderr when it ends.

    With several ranks (`RANK`, `LOCAL_RANK`) only the first prints and writes files.

    Args:
        target, arguments, module: as for `script_runner.run`.
        json, chart, trace: files to write the profile to.
        copies: whether to count copies and waits on accelerators; always on with `trace`.

    Raises:
        BaseException: any exception of the script, including its `SystemExit`.
    """
    from wan_patches.diagnostics.script_runner import run as run_script

    process, found = os.getpid(), None
    try:
        with profile(trace=True if trace is not None else None if copies else False) as found:
            run_script(target, arguments, module=module)
    finally:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
        if found is not None and os.getpid() == process and rank == "0":  # not in a forked child process
            _deliver(found, [(json, found.save_json), (chart, found.save_chart), (trace, found.save_trace)])


def obstacle(chart: Path | None, *others: Path | None) -> str | None:
    """Returns why files could not be written after a long run, or None."""
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        from wan_patches.diagnostics.profiling.views import NO_MATPLOTLIB

        return NO_MATPLOTLIB
    for path in (chart, *others):
        try:
            if path is not None:
                check_file(path)
        except OSError as error:
            return str(error)
    return None


def _deliver(found: Profile, files: Sequence[tuple[Path | None, Callable[[Path], None]]]) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(found, file=sys.stderr)
    for path, save in files:
        if path is None:
            continue
        try:
            save(path)
        except Exception as error:  # must not hide how the script ended
            with contextlib.suppress(OSError, ValueError):
                print(f"wan-patches: {path.name} was not written: {error}", file=sys.stderr)


def _in_order(by_stage: dict[str, Value]) -> dict[str, Value]:
    return {stage: by_stage[stage] for stage in (*STAGES, CALL) if stage in by_stage}


def _active() -> set[str]:
    return {report.name for report in wan_patches.status().reports if report.state == ACTIVE}


def _remark(found: Profile, pipe: Any, displaced: bool) -> None:
    if displaced:
        found.notes.append(
            "another profiler was set meanwhile (such as cProfile, or a nested profile): code that ran under it was "
            "not seen"
        )
    elif not found.pipelines:
        what = "no pipeline was" if pipe is None else "the pipeline was not"
        found.notes.append(f"{what} called in this thread of this process, so there are no stages")
    choice = wan_patches._registry.chosen()
    if not found.active and choice is not None and choice.names != frozenset():
        found.notes.append("patches are enabled, but none of the modules that they apply to was imported")
    elif not found.active:
        found.notes.append("no patch is enabled, so these are the times of stock; call wan_patches.enable()")
    elif idle := sorted(set(found.active) - {row.patch for row in found.ops}):
        found.notes.append(f"enabled, but no call was seen (calls in compiled code are not seen): {', '.join(idle)}")
    if found.transfers is None and not has_accelerator():
        found.notes.append("no accelerator: there are no copies between host and device and no waits")
    elif found.transfers is None:
        found.notes.append(
            "copies between host and device were not counted: they require torch's profiler (trace=True)"
        )
