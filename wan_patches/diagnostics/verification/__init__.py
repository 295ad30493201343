"""Verifies the patches on the user's own pipeline: bit equality, time, memory, and the patch that causes a difference.

    import wan_patches

    found = wan_patches.verify(pipe, prompt="A red fox", num_inference_steps=4, report="verification.html")
    assert found.exact, found

Watched runs and measured runs are separate, so that watching does not distort the measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import importlib.util
import json
import logging
import math
import operator
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wan_patches.diagnostics.preflight import check_file
from wan_patches.diagnostics.verification.bits import Difference, difference
from wan_patches.diagnostics.verification.divergence import (
    NOTHING,
    Compared,
    Culprit,
    Divergence,
    Suspect,
    compare_calls,
    find_culprits,
    find_first_divergence,
)
from wan_patches.diagnostics.verification.pictures import Strips, Video, compare_videos
from wan_patches.diagnostics.verification.trials import Choice, Measured, Subject, copied, message, ops_of
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.registry import Patch
from wan_patches.patching.renames import renamed
from wan_patches.patching.status import ACTIVE, SKIPPED, WAITING, Status
from wan_patches.pipelines.components import modules
from wan_patches.pipelines.stages import CALL, POSTPROCESS, STAGES

#: The values of `Verification.verdict`.
SAME, DIFFERENT, UNKNOWN = "same", "different", "unknown"

__all__ = ["Compared", "Culprit", "Divergence", "Stage", "Strips", "Suspect", "Verification", "Video", "verify"]

logger = logging.getLogger("wan_patches")

_PACKAGES = (
    "wan-patches",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "pillow",
    "triton",
    "torch-npu",
)


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline: bit equality of its output, time and memory.

    difference: None if the stage has no output to compare.
    stock_seconds, patched_seconds: medians; None if nothing was measured.
    stock_peak, patched_peak: peak bytes beyond those held before the call; on the CPU, of the whole process.
    """

    name: str
    difference: Difference | None = None
    stock_seconds: float | None = None
    patched_seconds: float | None = None
    stock_peak: int | None = None
    patched_peak: int | None = None


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; prints as tables, also in notebooks.

    pipeline: class of the pipeline. device: the device on which it runs.
    fidelity: the requested fidelity. patches: names of the active patches.
    inputs: descriptions of the arguments.
    result: difference between the pipeline's results.
    ops, blocks, stages, video: the comparison by patched function, denoiser block, stage and frame.
    first_divergence: where the runs first differ; None if they do not. culprits: the patches that cause it.
    stock_repeats, patched_repeats: whether all stock runs, and all patched runs, gave the same result.
    error: the exception of patched code, if stock raised none.
    repeat: number of measured runs of each.
    status: the patches, as returned by `wan_patches.status()`. facts: versions and machine.
    notes: further remarks.
    calls: for each patch, the number of calls served by a form other than stock's and of all calls, in all patched
        runs.
    undecided: why nothing can be concluded about the patches; empty if a conclusion is possible. Either stock runs
        differ from each other, or no patch was active, or no patched function was seen to run although nothing is
        compiled.
    """

    parting = renamed("parting", "first_divergence")

    pipeline: str
    device: str
    fidelity: Fidelity
    patches: tuple[str, ...]
    inputs: Mapping[str, str]
    result: Difference
    ops: tuple[Compared, ...]
    blocks: tuple[Compared, ...]
    stages: tuple[Stage, ...]
    video: Video | None
    first_divergence: Divergence | None
    culprits: tuple[Culprit, ...]
    stock_repeats: bool
    patched_repeats: bool
    error: str
    repeat: int
    status: Status
    facts: Mapping[str, str]
    notes: tuple[str, ...]
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    undecided: str = ""
    strips: Strips | None = field(default=None, repr=False, compare=False)

    @property
    def exact(self) -> bool:
        """Whether everything that was compared is bit-identical, above all the result.

        Also False if no conclusion is possible (`undecided`): use `verdict` to distinguish the two.
        """
        return self.verdict == SAME

    @property
    def exercise(self) -> str:
        """How many calls forms other than stock's served, in words; without such calls those forms are not verified."""
        fast, total = tally.total(self.calls.values())
        if fast:
            return f"fast in {fast} of {total} calls"
        return "fast forms were not exercised" + ("" if total else ": no call was counted")

    @property
    def verdict(self) -> str:
        """`"same"`, `"different"` (also if patched code raises), or `"unknown"` (see `undecided`)."""
        if self.undecided:
            return UNKNOWN
        same = all(stage.difference is None or stage.difference.exact for stage in self.stages)
        same = same and self.result.exact and self.first_divergence is None
        return SAME if same and not self.error and self.patched_repeats else DIFFERENT

    def __str__(self) -> str:
        from wan_patches.diagnostics.verification.report import renderables
        from wan_patches.tables import text

        return text(*renderables(self))

    def _repr_html_(self) -> str:
        from wan_patches.diagnostics.verification.report import renderables
        from wan_patches.tables import html

        return html(*renderables(self))

    def to_json(self) -> str:
        """Returns everything except the pictures. Numbers that JSON lacks, such as an infinite PSNR, are null."""
        return json.dumps({"exact": self.exact, "verdict": self.verdict, **_plain(self)}, indent=2, allow_nan=False)

    def save_json(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def save_html(self, path: str | Path) -> None:
        """Writes an HTML page with tables, charts and frames that needs no other files, no network and no scripts."""
        from wan_patches.diagnostics.verification.report import page

        Path(path).write_text(page(self), encoding="utf-8")


# Entry point


def verify(
    pipe: Any,
    /,
    *,
    patches: Iterable[str | Patch] | None = None,
    fidelity: Fidelity | str = Fidelity.EXACT,
    repeat: int = 1,
    report: str | Path | None = None,
    on_run: Callable[[str], None] | None = None,
    **inputs: Any,
) -> Verification:
    """Runs a pipeline with stock code and with patches, on its own weights and device, and compares the runs.

    Every run starts from the same random state: the generators in the arguments and the global ones (torch's on the CPU
    and on the pipeline's device, Python's, numpy's) are reset before each run and restored at the end. The previous
    selection of patches is restored too. There are 4 runs, 2 more per `repeat`, and further runs to find the
    responsible patch if results differ; a few steps and frames are enough. No other code may use diffusers in this
    process at the same time.

    Args:
        pipe: a pipeline, or any other object that is called with keyword arguments.
        patches: names of the patches to verify (see `wan_patches.status()`), or `wan_patches.Patch` values, which are
            then the only active patches; None means all registered patches.
        fidelity: as for `wan_patches.enable`.
        repeat: number of measured runs of each, stock and patched alternating; 0 skips the measurement of time and
            memory.
        report: path for an HTML report, checked before the runs. If writing fails afterwards, the failure is logged and
            added to the notes, and the result is returned nevertheless.
        on_run: called before every run with its purpose.
        **inputs: the arguments of the pipeline.

    Returns:
        The result; `.exact` is True if every bit is the same, and `.undecided` gives the reason if that is unknown.

    Raises:
        ValueError: unknown patch or fidelity, or negative `repeat`.
        TypeError: `pipe` is not callable or returns nothing that can be compared, or `repeat` is not an integer.
        OSError: `report` cannot be written.
        Exception: any exception of the pipeline with stock code.
    """
    if isinstance(pipe, type):
        raise TypeError(
            f"verify takes a pipeline, not the class {pipe.__name__}: pass {pipe.__name__}.from_pretrained(...)"
        )
    if isinstance(pipe, torch.nn.Module):
        raise TypeError(f"verify takes a whole pipeline, not a {type(pipe).__name__}: pass the pipeline that has it")
    if not callable(pipe):
        raise TypeError(f"verify expects a pipeline or another callable, not {type(pipe).__name__}")
    try:
        repeat = operator.index(repeat)
    except TypeError:
        raise TypeError(f"repeat must be an integer, the number of measured runs, not {repeat!r}") from None
    if repeat < 0:
        raise ValueError(f"repeat must be 0 or more measured runs, not {repeat}")
    if report is not None:
        check_file(report)
    subject = Subject(pipe, inputs, on_run or (lambda text: logger.info("verify: %s", text)))
    choice = Choice(patches, fidelity)
    try:
        found = _verify(subject, choice, repeat)
    finally:
        subject.put_back()
    if report is not None:
        try:
            found.save_html(report)
        except OSError as error:  # such as a full disk; the result is more important
            unwritten = f"The report was not written to {report}: {error}"
            logger.error("verify: %s", unwritten)
            found = dataclasses.replace(found, notes=(*found.notes, unwritten))
    return found


def _verify(subject: Subject, choice: Choice, repeat: int) -> Verification:
    before = tally.counted()
    with choice.patched():
        ops = ops_of(choice.registry.places())
    # one unwatched run: on accelerators the first-sight gate first returns stock's results, and compilers compile
    with choice.stock():
        digests = {False: [subject.result("stock, to warm up")], True: []}
    error = ""
    with choice.patched():
        try:
            first = subject.result("patched, to warm up")
            if choice.fidelity is Fidelity.EXACT:  # close forms differ from the gate's first results
                digests[True].append(first)
        except Exception as raised:  # the watched run raises it again and locates it
            error = message(raised)
    outputs: dict[str, list[Any]] = defaultdict(list)
    apart: dict[str, list[Difference]] = defaultdict(list)

    def keep(stage: str, value: Any) -> None:
        outputs[stage].append(copied(value))

    def compare(stage: str, value: Any) -> None:
        nth = len(apart[stage])
        known = nth < len(outputs[stage])
        apart[stage].append(
            difference(outputs[stage][nth], value) if known else Difference(False, reason="not in stock")
        )

    with choice.stock():
        stock = subject.observe(ops, "stock, watched", keep)
        if stock.error is not None:
            raise stock.error
    with choice.patched():
        patched = subject.observe(ops, "patched, watched", compare)
    error = error or ("" if patched.error is None else message(patched.error))
    digests[False].append(stock.events[-1].digest)
    if patched.error is None:
        digests[True].append(patched.events[-1].digest)
    for stage, given in outputs.items():
        if len(apart[stage]) < len(given):
            apart[stage].append(Difference(False, reason="not reached, or less often than in stock"))
    if patched.error is None:
        apart[POSTPROCESS] = [difference(stock.result, patched.result)]

    measured: dict[bool, list[Measured]] = {False: [], True: []}
    for nth in range(0 if error else repeat):
        for which in (False, True) if nth % 2 else (True, False):
            with choice.patched() if which else choice.stock():
                name = "patched" if which else "stock"
                measured[which].append(subject.measure(f"{name}, measured ({nth + 1} of {repeat})"))
                digests[which].append(measured[which][-1].digest)

    stock_repeats, patched_repeats = (len(set(digests[which])) <= 1 for which in (False, True))
    compared = compare_calls(stock, patched, ops)
    first_divergence = find_first_divergence(stock, patched, compared)
    with choice.patched():
        status, calls = choice.registry.status(), choice.registry.calls(before)
    in_force = tuple(dict.fromkeys(report.name for report in status.reports if report.state == ACTIVE))
    displaced = stock.displaced or patched.displaced
    undecided = ""
    if not in_force:
        undecided = "no patch was in force"
    elif not error and not stock_repeats:
        undecided = "runs of stock code differ from each other"
    elif first_divergence is None and not (_patched_calls(compared) or subject.compiled or displaced):
        undecided = "no patched function was seen to run"
    culprits: list[Culprit] = []
    if first_divergence is not None and stock_repeats and not undecided:
        culprits = find_culprits(subject, choice, ops, stock, patched, first_divergence)
    result = apart[POSTPROCESS][0] if patched.error is None else Difference(False, reason=error)
    video, strips = None, None
    if subject.inputs.get("output_type") != "latent" and patched.error is None:
        video, strips = compare_videos(stock.result, patched.result)
    return Verification(
        pipeline=type(subject.pipe).__name__,
        device=str(subject.device),
        fidelity=choice.fidelity,
        patches=in_force,
        inputs={name: _in_words(value) for name, value in subject.inputs.items()},
        result=result,
        ops=tuple(one for (kind, _), one in compared.items() if kind == "op"),
        blocks=tuple(one for (kind, _), one in compared.items() if kind == "block"),
        stages=_stages(apart, measured),
        video=video,
        first_divergence=first_divergence,
        culprits=tuple(culprits),
        stock_repeats=stock_repeats,
        patched_repeats=patched_repeats,
        error=error,
        repeat=len(measured[True]),
        status=status,
        facts=_facts(subject),
        notes=(
            *_notes_on_runs(subject, stock_repeats, patched_repeats, displaced),
            *_notes_on_calls(subject, compared, displaced),
            *_notes_on_patches(choice, status),
            *_notes_on_results(video, first_divergence, culprits, undecided),
        ),
        calls=calls,
        undecided=undecided,
        strips=strips,
    )


# Stages, frames, words


def _stages(apart: Mapping[str, list[Difference]], measured: Mapping[bool, list[Measured]]) -> tuple[Stage, ...]:
    def seconds(which: bool, stage: str) -> float | None:
        found = [run.seconds[stage] for run in measured[which] if stage in run.seconds]
        return statistics.median(found) if found else None

    def peak(which: bool, stage: str) -> int | None:
        return max((most for run in measured[which] if (most := run.peaks.get(stage)) is not None), default=None)

    known = {stage for runs in measured.values() for run in runs for stage in run.seconds} | {*apart}
    if CALL in known:  # no known stages: only the result can be compared
        apart = {CALL: apart[POSTPROCESS]} if POSTPROCESS in apart else {}
        known.discard(POSTPROCESS)
    return tuple(
        Stage(
            stage,
            Difference.of(apart[stage]) if apart.get(stage) else None,
            seconds(False, stage),
            seconds(True, stage),
            peak(False, stage),
            peak(True, stage),
        )
        for stage in (*STAGES, CALL)
        if stage in known
    )


def _patched_calls(compared: Mapping[tuple[str, str], Compared]) -> int:
    """Returns the number of calls of patched functions that were seen while the patches were active."""
    return sum(one.patched_calls for (kind, _), one in compared.items() if kind == "op")


def _notes_on_runs(subject: Subject, stock_repeats: bool, patched_repeats: bool, displaced: bool) -> Iterator[str]:
    if not stock_repeats:
        yield (
            "Runs of stock code differ from each other, so patches cannot be verified. Pass a generator, call "
            "torch.use_deterministic_algorithms(True), and use no callback that keeps state."
        )
    elif not patched_repeats:
        yield "Runs of patched code differ from each other; please report this with the HTML report."
    if displaced:
        yield (
            "Another profiler was set during the watched runs (perhaps by a callback): patched functions that ran "
            "under it were not seen."
        )
    if subject.compiled:
        yield f"Compiled, so its blocks were not compared: {', '.join(subject.compiled)}."


def _notes_on_calls(subject: Subject, compared: Mapping[tuple[str, str], Compared], displaced: bool) -> Iterator[str]:
    if not _patched_calls(compared) and not displaced:
        why = (
            "the code that calls them is compiled" if subject.compiled else "the patches do not apply to this pipeline"
        )
        yield f"No patched function was seen to run: {why}. See the states of the patches."
    if any(
        kind == "op" and one.reason not in ("", NOTHING) and one.patched_calls for (kind, _), one in compared.items()
    ):
        yield "Calls that were not compared are covered by the comparison of blocks, stages and the result."


def _notes_on_patches(choice: Choice, status: Status) -> Iterator[str]:
    for left in status.skipped():
        yield f"Not in force: {left.name} in {left.module}, {left.reason}."
    for name in dict.fromkeys(choice.names or ()):
        reports = status.of(name)
        states = {report.state for report in reports}
        if states & {ACTIVE, SKIPPED}:
            continue
        if not any(choice.fidelity.allows(report.fidelity) for report in reports):
            why = "which requires fidelity='close'"
        elif WAITING in states:
            why = "because none of its modules was imported"
        else:
            why = "which does not apply to this version of diffusers"
        yield f"Not in force: {name}, {why}."
    for form, op, reason in dict.fromkeys((one.form, one.op, one.reason) for one in status.verdicts if not one.exact):
        yield f"The first-sight gate disables the form {form} of {op} on this device: {reason}."


def _notes_on_results(
    video: Video | None, first_divergence: Divergence | None, culprits: Sequence[Culprit], undecided: str
) -> Iterator[str]:
    if first_divergence is not None and not undecided and not culprits:
        yield "No set of patches was found that causes the difference; it may not be reproducible."
    if video is not None and video.ssim is None and importlib.util.find_spec("skimage") is None:
        yield 'For SSIM by frame: pip install "wan-patches[verify]"'


def _facts(subject: Subject) -> dict[str, str]:
    """Returns versions and machine. No user names, no paths."""
    facts = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    facts["device"] = str(subject.device)
    if subject.device.type != "cpu":
        with contextlib.suppress(Exception):  # not every backend has it
            facts["device"] = str(torch.get_device_module(subject.device.type).get_device_name())
    for name, module in modules(subject.pipe).items():
        dtype = str(getattr(module, "dtype", "")).removeprefix("torch.")
        facts[name] = f"{type(module).__name__} {dtype}".strip()
    return facts


def _in_words(value: Any) -> str:
    if isinstance(value, torch.Generator):
        return f"generator on {value.device}, seed {value.initial_seed()}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Image.Image):
        return f"{value.mode} image {value.width}x{value.height}"
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int, float)):
        return f"{len(value)} of: {_in_words(value[0])}"
    words = repr(value) if isinstance(value, (str, int, float, list, tuple, type(None))) else type(value).__name__
    return words if len(words) <= 300 else words[:300] + "..."


def _plain(value: Any) -> Any:
    """Converts a value to dictionaries, lists, text and finite numbers."""
    if dataclasses.is_dataclass(value):
        fields = (one.name for one in dataclasses.fields(value) if one.repr)
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)
