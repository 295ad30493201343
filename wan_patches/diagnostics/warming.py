"""The first request of a kind, before anybody waits for it: proofs of the gate, kernels' compilers, allocators."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

_STEPS = "num_inference_steps"
_FEW = 2  # steps, so that pipelines with two transformers reach both


@dataclass(frozen=True)
class Warmth:
    """What a pipeline's first call took, and what later ones take.

    first_seconds, later_seconds: of the call; first_peak, later_peak: bytes beyond what was held when it began (of
        torch's allocator on accelerators, of the process on CPUs), None where nobody counts.
    kinds: kinds of input about which ops have decided meanwhile; `fast` of them in favour of a form.
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
    """Calls a pipeline twice as a request would, so that the first request finds all decided, compiled and allocated.

        wan_patches.enable()
        print(wan_patches.warm(pipe, prompt="a fox", height=480, width=832, num_frames=81))

    What ops decide holds for tensors of the same shapes, strides and dtypes: call it for each size and number of frames
    that will be asked for. Two denoising steps are enough, which is the default for pipelines that take
    `num_inference_steps`. The generators among the arguments and the global ones are as before afterwards.

    Args:
        pipe: a pipeline, or any other object that is called with keyword arguments.
        **inputs: its arguments.

    Raises:
        TypeError: `pipe` cannot be called.
        Exception: whatever the pipeline raises.
    """
    if not callable(pipe):
        raise TypeError(f"warm takes a pipeline, not {type(pipe).__name__}; give it one that can be called")
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
    """Op, key and form of all decisions."""
    dispatch = sys.modules.get("wan_patches.ops.dispatch")
    if dispatch is None:  # nothing patched was called yet
        return []
    return [
        (op.name, key, decision.form and decision.form.name)
        for op in dispatch.ops()
        for key, decision in op.decisions().items()
    ]


def _most(peaks: Any) -> int | None:
    return max((peak for peak in peaks.values() if peak is not None), default=None)
