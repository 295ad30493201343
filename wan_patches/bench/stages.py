"""Where the time of one pipeline call goes, and what each stage gives, without touching what patches change.

Patches rewrite code inside functions of diffusers. The boundaries here are calls that a pipeline makes on its
own instance, its scheduler and its VAE: they are wrapped on those instances for one call. What lies between
two of them (preprocessing, denoising, postprocessing) is the gap.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wan_patches.bench.measure import identical, synchronize

TEXT, IMAGE_ENCODER, PREPROCESS = "text", "image encoder", "image preprocess"
LATENTS, DENOISE, DECODE, POSTPROCESS = "latents and mask", "denoise", "decode", "postprocess"

#: In the order in which a pipeline goes through them. "Denoise" is all that no other stage is.
STAGES = (TEXT, IMAGE_ENCODER, PREPROCESS, LATENTS, DENOISE, DECODE, POSTPROCESS)

_SPANS = {
    "encode_prompt": TEXT,
    "encode_image": IMAGE_ENCODER,
    "prepare_latents": LATENTS,
    "prepare_image_latents": LATENTS,
    "prepare_video_latents": LATENTS,
}
_PIXELS = ("image", "last_image", "video")  # what `prepare_*` functions call the preprocessed picture


@dataclass
class Run:
    """One call of a pipeline.

    seconds: by stage; stages that did not occur are absent.
    outputs: by stage, what it gave, as tensors on the CPU. Of "denoise": the latents handed to the VAE. Of
        "postprocess": the frames, uint8 `(frames, height, width, 3)`.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all stages: of the call, less what keeping the outputs took."""
        return sum(self.seconds.values())

    @property
    def frames(self) -> np.ndarray:
        """The video, uint8 `(frames, height, width, 3)`."""
        return self.outputs[POSTPROCESS][0].numpy()

    def same(self, other: Run) -> dict[str, bool]:
        """Whether both runs gave the same bits, by stage, in the order of `STAGES`."""
        both = [s for s in STAGES if s in self.outputs or s in other.outputs]
        return {stage: identical(self.outputs.get(stage), other.outputs.get(stage)) for stage in both}


def record(
    pipe: Any, arguments: Mapping[str, Any], device: torch.device, on_step: Callable[[], None] = lambda: None
) -> Run:
    """Calls `pipe(**arguments)`, whose `output_type` must be `"pil"`, and tells what happened.

    Waits for `device` at each boundary. `on_step` is called at every step of the scheduler.
    """
    recorder = _Recorder(device)
    with recorder.watching(pipe, on_step):
        recorder.start()
        result = pipe(**arguments)
        recorder.finish(result)
    return recorder.run


class _Recorder:
    def __init__(self, device: torch.device) -> None:
        self.run = Run()
        self._device = device
        self._since = 0.0
        self._before_latents = True
        self._inside = 0
        self._stages_done: set[str] = set()

    def start(self) -> None:
        synchronize(self._device)
        self._since = time.perf_counter()

    def finish(self, result: Any) -> None:
        self._give(POSTPROCESS if DECODE in self._stages_done else DENOISE)
        frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in result.frames[0]]))
        self._keep(POSTPROCESS, frames)

    @contextlib.contextmanager
    def watching(self, pipe: Any, on_step: Callable[[], None]) -> Iterator[None]:
        """Wraps the boundaries on the instances, and takes the wrappers off again."""
        with contextlib.ExitStack() as stack:

            def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
                if callable(getattr(owner, name, None)):
                    stack.enter_context(_wrapped(owner, name, make))

            for name, stage in _SPANS.items():
                wrap(pipe, name, functools.partial(self._span, stage=stage))
            wrap(pipe.scheduler, "set_timesteps", functools.partial(self._span, stage=DENOISE))
            wrap(pipe.scheduler, "step", lambda step: _then(step, on_step))
            wrap(pipe.vae, "decode", functools.partial(self._span, stage=DECODE))
            yield

    def _span(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)  # pipelines look at signatures of scheduler methods
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one boundary calls another: the outer one has the time
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            pixels = [given[name] for name in _PIXELS if isinstance(given.get(name), torch.Tensor)]
            self._give(PREPROCESS if stage == LATENTS and pixels and self._before_latents else DENOISE)
            if stage == LATENTS:
                self._before_latents = False
                if pixels:
                    self._keep(PREPROCESS, pixels)
            if stage == DECODE:
                self._keep(DENOISE, args[:1] or next(iter(kwargs.values())))
            self._inside += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside -= 1
            self._give(stage)
            if stage != DENOISE:
                self._keep(stage, result)
            return result

        return watched

    def _give(self, stage: str) -> None:
        """The time since the last boundary goes to `stage`."""
        synchronize(self._device)
        now = time.perf_counter()
        self.run.seconds[stage] = self.run.seconds.get(stage, 0.0) + now - self._since
        self._since = now
        self._stages_done.add(stage)

    def _keep(self, stage: str, value: Any) -> None:
        """Copies the tensors in `value` to the CPU while the clock stands still."""
        kept = self.run.outputs.setdefault(stage, [])
        # a copy: diffusers works on some tensors in place
        kept += [tensor.detach().to("cpu", copy=True) for tensor in _tensors(value)]
        self._since = time.perf_counter()


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before = vars(owner).get(name)  # hooks of other libraries live on instances too
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _then(function: Callable[..., Any], callback: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        callback()
        return result

    return call


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
