"""Warms up a pipeline before its first request: first-sight gate, kernel compilation, memory allocators."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

_STEPS = "num_inference_steps"
_FEW = 2  # steps; enough to reach both transformers of pipelines that have two


@dataclass(frozen=True)
class Warmth:
    """Costs of a pipeline's first call and of later calls.

    first_seconds, later_seconds: duration of the call.
    first_peak, later_peak: peak bytes beyond those held when the call began (of torch's allocator on accelerators, of
        the process on CPUs); None if the backend does not count memory.
    kinds: kinds of input for which ops chose a form during the calls; `fast` of them chose one other than stock's.
    """

    first_seconds: float
    later_seconds: float
    first_peak: int | None
    later_peak: int | None
    kinds: int
    fast: int

    def __str__(self) -> str:
        def call(seconds: float, peak: int | None) -> str:
            return f"{seconds:.2f} s" + ("" if peak is None else f" and {peak / 2**20:,.0f} MiB")

        first, later = call(self.first_seconds, self.first_peak), call(self.later_seconds, self.later_peak)
        return f"first call {first}, later ones {later}; {self.kinds} kinds of input decided, {self.fast} of them fast"


def warm(pipe: Any, /, **inputs: Any) -> Warmth:
    """Calls a pipeline twice, so that the first request needs no verification, compilation or allocation.

        wan_patches.enable()
        print(wan_patches.warm(pipe, prompt="a fox", height=480, width=832, num_frames=81))

    Decisions of ops are valid for tensors with the same shapes, strides and dtypes: warm every size and number of
    frames that will be requested. Two denoising steps are enough; they are the default for pipelines with a
    `num_inference_steps` parameter. The generators in the arguments and the global random states are restored
    afterwards.

    Args:
        pipe: a pipeline, or any other object that is called with keyword arguments.
        **inputs: the arguments of the pipeline.

    Returns:
        The durations and peak memory of the calls; prints as a sentence.

    Raises:
        TypeError: `pipe` is not callable.
        Exception: any exception of the pipeline.
    """
    if not callable(pipe):
        raise TypeError(f"warm expects a pipeline or another callable, not {type(pipe).__name__}")
    from wan_patches.diagnostics.verification.trials import Subject

    if _STEPS not in inputs and _STEPS in inspect.signature(pipe.__call__).parameters:
        inputs[_STEPS] = _FEW
    before = _decisions()
    subject = Subject(pipe, inputs, lambda purpose: None)
    try:
        first, later = subject.measure("first"), subject.measure("later")
    finally:
        subject.put_back()
    new = [found for found in _decisions() if found not in before]
    return Warmth(
        sum(first.seconds.values()),
        sum(later.seconds.values()),
        _most(first.peaks),
        _most(later.peaks),
        kinds=len(new),
        fast=sum(form is not None for *_, form in new),
    )


def _decisions() -> list[tuple[str, Any, str | None]]:
    """Returns op, key and form of all decisions."""
    dispatch = sys.modules.get("wan_patches.ops.dispatch")
    if dispatch is None:  # no patched function was called yet
        return []
    return [
        (op.name, key, decision.form and decision.form.name)
        for op in dispatch.ops()
        for key, decision in op.decisions().items()
    ]


def _most(peaks: Any) -> int | None:
    return max((peak for peak in peaks.values() if peak is not None), default=None)
