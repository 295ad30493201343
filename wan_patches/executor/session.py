"""Sessions: a pipeline on its device, in this process or in a worker, that runs requests one at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wan_patches.executor.layouts import Layout, Parallel, place
from wan_patches.pipelines import stages
from wan_patches.pipelines.streaming import Chunk, stream_frames

Report = Callable[[int, "int | None", int], None]


class Interrupted(BaseException):
    """Raised at the end of a step to leave the pipeline of a cancelled request.

    Not an `Exception`, so that handlers in a pipeline do not catch it.
    """


@dataclass(frozen=True)
class Pretrained:
    """Builds a pipeline from a name on the Hub or a folder. Can be pickled, so that workers can call it."""

    model: str
    pipeline_class: type | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        from diffusers import DiffusionPipeline

        return (self.pipeline_class or DiffusionPipeline).from_pretrained(self.model, **self.arguments)  # type: ignore[attr-defined]


class Session:
    """A pipeline that is placed and ready. One thread calls `run`; any thread may call `interrupt`."""

    def __init__(
        self,
        build: Callable[[], Any],
        layout: Layout,
        device: torch.device,
        *,
        parallel: Parallel = None,
        vae_parallel: bool | str = False,
        ranks: int = 1,
    ) -> None:
        """Builds the pipeline and places it according to the layout.

        Args:
            build: returns the pipeline.
            layout: a value of `LAYOUTS`.
            device: device of this process.
            parallel, vae_parallel: as for `ParallelExecutor`.
            ranks: number of processes that work on each request; if above 1, torch.distributed must be initialised.

        Raises:
            TypeError: `build` returns an object that is not callable.
        """
        if device.index is not None and hasattr(getattr(torch, device.type, None), "set_device"):
            getattr(torch, device.type).set_device(device)
        # a user's factory may process its models after loading: the layout only takes part in loading of `Pretrained`
        with layout.loading(device) if isinstance(build, Pretrained) else contextlib.nullcontext():
            pipe = build()
        if not callable(pipe):
            raise TypeError(f"the factory returned {type(pipe).__name__!r}, which is not callable; return a pipeline")
        place(pipe, layout, device, parallel, vae_parallel)
        if hasattr(pipe, "progress_bar"):
            pipe.progress_bar = self._progress_bar
        self._pipe, self._device, self._ranks = pipe, device, ranks
        self._report: Report | None = None
        self._bars = 0
        self._running: int | None = None
        self._unwanted: set[int] = set()

    def run(
        self,
        request: int,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        seed: int | None = None,
        report: Report | None = None,
        on_frames: Callable[[Chunk], object] | None = None,
    ) -> tuple[Any, dict[str, float]]:
        """Calls the pipeline.

        Args:
            request: number of the request, for `interrupt`, which may be called even before the request starts.
            arguments, keywords: arguments of the pipeline.
            seed: seed of torch's default generators, which the pipeline uses if it is given no generator.
            report: called after every step with the steps done, the total (None if unknown), and the number of the
                pipeline's progress bar, from 1 (Helios has one per chunk of frames).
            on_frames: as for `stream_frames`; None to return frames in the result.

        Returns:
            The pipeline's result, and the seconds of its stages.

        Raises:
            Interrupted: `interrupt` was called; raised after the current step or chunk of frames.
            Exception: any exception of the pipeline.
        """
        self._running, self._report, self._bars = request, report, 0
        try:
            self._leave_if_unwanted()
            if seed is not None:
                _seed(seed, self._device)
            keywords = {name: _on_device(value, self._device) for name, value in keywords.items()}
            call = self._pipe
            if on_frames is not None:
                call = functools.partial(stream_frames, call, functools.partial(self._hand_over, on_frames))
            with stages.watching(self._pipe, self._device) as watch:
                result = call(*arguments, **keywords)
            return result, dict(watch.seconds)
        except BaseException as error:
            self._tidy_up(error)
            raise
        finally:
            self._running = self._report = None
            self._unwanted.clear()

    def interrupt(self, request: int) -> None:
        """Stops `request` at its next step, if it is running or is the next one."""
        self._unwanted.add(request)

    def _progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> _StepBar:
        self._bars += 1
        return _StepBar(iterable, total, self._step)

    def _step(self, step: int, total: int | None) -> None:
        if self._report is not None:
            self._report(step, total, self._bars)
        self._leave_if_unwanted()

    def _hand_over(self, on_frames: Callable[[Chunk], object], chunk: Chunk) -> None:
        on_frames(chunk)
        if self._ranks == 1:  # other ranks have no check here
            self._leave_if_unwanted()

    def _leave_if_unwanted(self) -> None:
        unwanted = self._running in self._unwanted
        if self._ranks > 1:  # all ranks must leave at the same step, or the next collective would hang
            flag = torch.tensor(unwanted, dtype=torch.int32, device="cpu")
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            unwanted = bool(flag)
        if unwanted:
            raise Interrupted

    def _tidy_up(self, error: BaseException) -> None:
        """Frees the memory that a pipeline frees at the end of a successful call."""
        if hasattr(self._pipe, "maybe_free_model_hooks"):
            self._pipe.maybe_free_model_hooks()
        if isinstance(error, torch.cuda.OutOfMemoryError) and self._device.type != "cpu":
            getattr(torch, self._device.type).empty_cache()


class _StepBar:
    """Replaces the pipeline's tqdm bar; every update counts as a step."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, step: Callable[[int, int | None], None]):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self.iterable, self.total, self.n = iterable, total, 0
        self._step = step

    def update(self, n: int = 1) -> None:
        self.n += n
        self._step(self.n, self.total)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None  # set_description, set_postfix, refresh, close, ...


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the default generators that a pipeline on `device` uses; seeding all takes longer."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _on_device(value: Any, device: torch.device) -> Any:
    """Copies generators, with their state, from another device of the same kind to `device`."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, torch.Generator) for item in value):
        return type(value)(_on_device(item, device) for item in value)
    if not isinstance(value, torch.Generator) or value.device.type != device.type or value.device == device:
        return value
    if device.index is None:
        return value
    generator = torch.Generator(device)
    generator.set_state(value.get_state())
    return generator
