"""Where the time of one pipeline call goes, for any pipeline, without touching what patches change.

Patches rewrite code inside functions of diffusers. The boundaries here are calls that a pipeline makes on its
own instance, its scheduler and its VAE: they are wrapped on those instances for one call. What lies between
two of them (preprocessing, denoising, postprocessing) is the gap.
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

#: In the order in which a pipeline goes through them. "Denoise" is all that no other stage is.
STAGES = (TEXT, IMAGE_ENCODER, PREPROCESS, LATENTS, DENOISE, DECODE, POSTPROCESS)

#: A call that crossed no boundary, because what was called is no pipeline or one of another make.
CALL = "call"

_SPANS = {
    "encode_prompt": TEXT,
    "encode_image": IMAGE_ENCODER,
    "prepare_latents": LATENTS,
    "prepare_image_latents": LATENTS,
    "prepare_video_latents": LATENTS,
}
_PIXELS = ("image", "last_image", "video")  # what `prepare_*` functions call the preprocessed picture

Function = Callable[..., Any]


class Stopwatch:
    """Gives time to stages, of which there is one at a time; waits for `device` whenever a stage ends."""

    def __init__(self, device: torch.device, on_end: Callable[[str], None] | None = None) -> None:
        self._device, self._on_end = device, on_end
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, in the order of `STAGES`; a stage that did not occur is absent.

        Only `CALL` where no boundary was crossed, and nothing before the first stage has ended.
        """
        return {stage: self._seconds[stage] for stage in (*STAGES, CALL) if stage in self._seconds}

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self._seconds.values())

    def start(self) -> None:
        """Nothing since the last stage ended counts."""
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """The time since the last stage ended was `stage`."""
        synchronize(self._device)
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now
        if self._on_end is not None:
            self._on_end(stage)
            self.start()


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done what it was given."""
    if device.type == "cpu":
        return
    import torch

    # of torch's backends only MPS takes no device; one without the function has nothing to wait for
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
    """Takes the times of what `pipe`, called once in the block, does on `device`.

    `pipe` may be anything: a boundary that it lacks, or that cannot be wrapped, is not there. The stopwatch is
    complete when the block ends; with an exception it has the stages that had ended. Wrappers that others have
    put on the same instances, before or in the block, stay as they are. One call at a time: a pipeline's
    scheduler does not bear two.

    Args:
        pipe: a pipeline, or any other object that can be called.
        device: waited for at each boundary.
        on_stage: called with a stage and what it gave, while the clock stands still. Of "text", "image encoder",
            "latents and mask" and "decode": the function's result. Of "image preprocess": a list of tensors. Of
            "denoise": a tuple of the latents that the VAE is to decode. Of "postprocess" nothing is known here.
        on_step: called after every step of the scheduler.
        on_end: called with a stage whenever time was given to it, while the clock stands still.
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
        """`function`, which is all of `stage` or part of it, watched."""

        @functools.wraps(function)  # pipelines look at signatures of scheduler methods
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self._left:  # one boundary calls another: the outer one has the time
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
        """`function`, and `callback` after it."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not self._left:
                callback()
            return result

        return call

    def finish(self) -> None:
        """The call has returned."""
        seconds = self.watch.seconds
        self.watch.end(CALL if not seconds else POSTPROCESS if DECODE in seconds else DENOISE)

    def leave(self) -> None:
        """A wrapper that someone still holds does no more than what it wraps."""
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
    """Has `make(owner.name)` for `owner.name` in the block, where that is a function and can be replaced."""
    function, attributes = _attribute(owner, name), _attribute(owner, "__dict__")
    if not callable(function) or type(attributes) is not dict:  # a class, or an object with slots
        yield
        return
    # not with setattr: frozen classes refuse that, proxies like torch.compile's pass it on to another object
    before = attributes.get(name)  # hooks of other libraries live on instances too
    ours = attributes[name] = make(function)
    try:
        yield
    finally:
        if attributes.get(name) is ours:  # else someone's hook has come, and may call ours
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before


def is_watching(function: Any) -> bool:
    """Whether `watching` has put it around the function in its `__wrapped__`, whose results it passes on."""
    return type(function) is types.FunctionType and function.__globals__ is globals()


def _attribute(owner: Any, name: str) -> Any:
    """`owner.name`, or None where there is none or a property raises."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _pixels(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The preprocessed pictures among the arguments."""
    import torch

    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # arguments that do not fit, about which the call will say more
        return []
    return [given[name] for name in _PIXELS if isinstance(given.get(name), torch.Tensor)]
