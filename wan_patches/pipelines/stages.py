"""Measures the stages of one pipeline call, for any pipeline, without touching the code that patches change.

Patches rewrite code inside functions of diffusers. The stage boundaries here are calls that a pipeline makes on its own
instance, its scheduler and its VAE; they are wrapped on those instances for one call. The gaps between boundaries are
preprocessing, denoising and postprocessing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TEXT, IMAGE_ENCODER, PREPROCESS = "text", "image encoder", "image preprocess"
LATENTS, DENOISE, DECODE, POSTPROCESS = "latents and mask", "denoise", "decode", "postprocess"

#: All stages, in the order in which a pipeline runs them. "denoise" is everything that belongs to no other stage.
STAGES = (TEXT, IMAGE_ENCODER, PREPROCESS, LATENTS, DENOISE, DECODE, POSTPROCESS)

#: The only stage of a call that crossed no boundary: the object is not a pipeline, or one of an unknown structure.
CALL = "call"

_SPANS = {
    "encode_prompt": TEXT,
    "encode_image": IMAGE_ENCODER,
    "prepare_latents": LATENTS,
    "prepare_image_latents": LATENTS,
    "prepare_video_latents": LATENTS,
}
_PIXELS = ("image", "last_image", "video")  # parameters of `prepare_*` functions for preprocessed images

Function = Callable[..., Any]


class Stopwatch:
    """Attributes elapsed time to stages, one at a time; waits for `device` at the end of each stage."""

    def __init__(self, device: torch.device, on_end: Callable[[str], None] | None = None) -> None:
        self._device, self._on_end = device, on_end
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, in the order of `STAGES`; stages that did not occur are absent.

        Contains only `CALL` if no boundary was crossed, and nothing until the first stage has ended.
        """
        return {stage: self._seconds[stage] for stage in (*STAGES, CALL) if stage in self._seconds}

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self._seconds.values())

    def start(self) -> None:
        """Restarts the clock: time since the end of the last stage is not counted."""
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """Attributes the time since the end of the last stage to `stage`."""
        synchronize(self._device)
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now
        if self._on_end is not None:
            self._on_end(stage)
            self.start()


def synchronize(device: torch.device) -> None:
    """Waits until `device` has finished all work queued on it."""
    if device.type == "cpu":
        return
    import torch

    # MPS is the only backend of torch whose function takes no device; a backend without it has nothing to wait for
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait(*() if device.index is None or device.type == "mps" else (device,))


@contextlib.contextmanager
def watching(
    pipe: Any,
    device: torch.device,
    *,
    on_stage: Callable[[str, Any], None] | None = None,
    on_step: Callable[[], None] | None = None,
    on_end: Callable[[str], None] | None = None,
) -> Iterator[Stopwatch]:
    """Times the stages of one call of `pipe` in the block, on `device`.

    `pipe` may be any object: boundaries that it lacks, or that cannot be wrapped, are left out. The stopwatch is
    complete when the block ends; after an exception it contains the stages that had ended. Wrappers that other code
    puts on the same instances, before or during the block, stay in place. Only one call at a time, because a pipeline's
    scheduler does not support two.

    Args:
        pipe: a pipeline, or any other callable object.
        device: the device to wait for at each boundary.
        on_stage: called with a stage and its output, while the clock is stopped. For "text", "image encoder", "latents
            and mask" and "decode" the output is the function's result; for "image preprocess" a list of tensors; for
            "denoise" a tuple with the latents to be decoded. Not called for "postprocess", whose output is not seen
            here.
        on_step: called after every scheduler step.
        on_end: called with a stage whenever time was attributed to it, while the clock is stopped.
    """
    watcher = _Watcher(Stopwatch(device, on_end), on_stage)
    scheduler, vae = _attribute(pipe, "scheduler"), _attribute(pipe, "vae")
    boundaries = [(pipe, name, functools.partial(watcher.span, stage=stage)) for name, stage in _SPANS.items()]
    boundaries.append((scheduler, "set_timesteps", functools.partial(watcher.span, stage=DENOISE)))
    boundaries.append((vae, "decode", functools.partial(watcher.span, stage=DECODE)))
    if on_step is not None:
        boundaries.append((scheduler, "step", functools.partial(watcher.then, callback=on_step)))
    with contextlib.ExitStack() as stack:
        stack.callback(watcher.leave)
        for owner, name, make in boundaries:
            stack.enter_context(_wrapped(owner, name, make))
        synchronize(device)
        watcher.watch.start()
        yield watcher.watch
        watcher.finish()


class _Watcher:
    """Ends stages at the boundaries of one call."""

    def __init__(self, watch: Stopwatch, on_stage: Callable[[str, Any], None] | None) -> None:
        self.watch = watch
        self._on_stage = on_stage
        self._before_latents = True
        self._inside = False
        self._left = False

    def span(self, function: Function, stage: str) -> Function:
        """Wraps `function`, which is `stage` or a part of it."""

        @functools.wraps(function)  # pipelines inspect the signatures of scheduler methods
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self._left:  # a boundary inside another: the outer one counts the time
                return function(*args, **kwargs)
            self._end_gap(stage, function, args, kwargs)
            self._inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = False
            self.watch.end(stage)
            if stage != DENOISE:
                self._tell(stage, result)
            return result

        return watched

    def then(self, function: Function, callback: Callable[[], None]) -> Function:
        """Returns `function` followed by `callback`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not self._left:
                callback()
            return result

        return call

    def finish(self) -> None:
        """Ends the last stage, after the call has returned."""
        seconds = self.watch.seconds
        self.watch.end(CALL if not seconds else POSTPROCESS if DECODE in seconds else DENOISE)

    def leave(self) -> None:
        """Turns wrappers that other code still holds into plain calls of the wrapped functions."""
        self._left = True

    def _end_gap(self, following: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = _pixels(function, args, kwargs) if following == LATENTS else []
        self.watch.end(PREPROCESS if pixels and self._before_latents else DENOISE)
        if following == LATENTS:
            self._before_latents = False
            if pixels:
                self._tell(PREPROCESS, pixels)
        if following == DECODE:
            self._tell(DENOISE, (*args, *kwargs.values())[:1])

    def _tell(self, stage: str, value: Any) -> None:
        if self._on_stage is not None:
            self._on_stage(stage, value)
            self.watch.start()


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, make: Callable[[Function], Function]) -> Iterator[None]:
    """Replaces `owner.name` by `make(owner.name)` in the block, if it is a function that can be replaced."""
    function, attributes = _attribute(owner, name), _attribute(owner, "__dict__")
    if not callable(function) or type(attributes) is not dict:  # a class, or an object with slots
        yield
        return
    # not setattr: frozen classes reject it, and proxies like torch.compile's forward it to another object
    before = attributes.get(name)  # other libraries put hooks on instances too
    ours = attributes[name] = make(function)
    try:
        yield
    finally:
        if attributes.get(name) is ours:  # otherwise another hook was added, which may call ours
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before


def is_watching(function: Any) -> bool:
    """Whether a function is a wrapper made by `watching`; such a wrapper returns the results of its `__wrapped__`."""
    return type(function) is types.FunctionType and function.__globals__ is globals()


def _attribute(owner: Any, name: str) -> Any:
    """Returns `owner.name`, or None if it is missing or a property raises."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _pixels(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the preprocessed images among the arguments."""
    import torch

    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # invalid arguments; the call itself raises a better error
        return []
    return [given[name] for name in _PIXELS if isinstance(given.get(name), torch.Tensor)]
