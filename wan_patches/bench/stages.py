"""Records the time and the output of every stage of one pipeline call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wan_patches.bench.measure import identical
from wan_patches.pipelines.stages import (
    DECODE,
    DENOISE,
    IMAGE_ENCODER,
    LATENTS,
    POSTPROCESS,
    PREPROCESS,
    STAGES,
    TEXT,
    watching,
)

__all__ = [
    "DECODE",
    "DENOISE",
    "IMAGE_ENCODER",
    "LATENTS",
    "POSTPROCESS",
    "PREPROCESS",
    "STAGES",
    "TEXT",
    "Run",
    "record",
]


@dataclass
class Run:
    """One call of a pipeline.

    seconds: by stage; stages that did not occur are absent.
    outputs: by stage, as tensors on the CPU. For "denoise", the latents passed to the VAE; for "postprocess", the
        frames, uint8 `(frames, height, width, 3)`.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all stages: those of the call without the time to keep the outputs."""
        return sum(self.seconds.values())

    @property
    def frames(self) -> np.ndarray:
        """The video, uint8 `(frames, height, width, 3)`."""
        return self.outputs[POSTPROCESS][0].numpy()

    def same(self, other: Run) -> dict[str, bool]:
        """Returns by stage, in the order of `STAGES`, whether both runs gave the same bits."""
        both = [s for s in STAGES if s in self.outputs or s in other.outputs]
        return {stage: identical(self.outputs.get(stage), other.outputs.get(stage)) for stage in both}


def record(
    pipe: Any, arguments: Mapping[str, Any], device: torch.device, on_step: Callable[[], None] = lambda: None
) -> Run:
    """Calls `pipe(**arguments)`, with the `output_type` `"pil"`, and returns times and outputs by stage.

    Synchronizes with `device` at each stage boundary. `on_step` is called at every step of the scheduler.
    """
    run = Run()

    def keep(stage: str, value: Any) -> None:
        # copied, since diffusers changes some tensors in place
        copies = [tensor.detach().to("cpu", copy=True) for tensor in _tensors(value)]
        run.outputs.setdefault(stage, []).extend(copies)

    with watching(pipe, device, on_stage=keep, on_step=on_step) as watch:
        result = pipe(**arguments)
    run.seconds.update(watch.seconds)
    keep(POSTPROCESS, torch.from_numpy(np.stack([np.asarray(frame) for frame in result.frames[0]])))
    return run


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
