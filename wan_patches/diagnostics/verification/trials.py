"""Calls one pipeline repeatedly from the same random state, with and without patches: watched, or measured."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch

import wan_patches
from wan_patches.diagnostics.call_tracing import tracing_calls
from wan_patches.diagnostics.memory import watching_memory
from wan_patches.diagnostics.verification.bits import digest
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.registry import Patch, Place, Registry, split_names
from wan_patches.patching.status import Status
from wan_patches.pipelines.components import block_lists, denoisers, execution_device, is_compiled
from wan_patches.pipelines.stages import watching

__all__ = ["Choice", "Event", "Measured", "Op", "Subject", "Trial", "copied", "message", "ops_of"]


@dataclass(frozen=True)
class Event:
    """A completed call; `digest` is that of its result, or None if it has nothing to compare."""

    kind: str
    name: str
    digest: str | None


@dataclass
class Trial:
    """One watched run: its completed calls in order, and its result or error.

    displaced: another profiler was set meanwhile; patched functions that ran under it are missing.
    """

    events: list[Event] = field(default_factory=list)
    result: Any = None
    error: Exception | None = None
    displaced: bool = False


@dataclass(frozen=True)
class Measured:
    """One measured run: seconds and peak bytes by stage, and a fingerprint of the result."""

    seconds: Mapping[str, float]
    peaks: Mapping[str, int | None]
    digest: str | None


class Subject:
    """A pipeline and its arguments, for repeated calls from the same random state."""

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], on_run: Callable[[str], None]) -> None:
        self.pipe, self.inputs = pipe, inputs
        self.device = execution_device(pipe)
        self.blocks, self.compiled = _blocks(pipe)
        self._on_run = on_run
        self._generators = [
            (generator, generator.get_state())
            for value in inputs.values()
            for generator in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(generator, torch.Generator)
        ]

    def put_back(self) -> None:
        """Restores the initial states of the given generators."""
        for generator, state in self._generators:
            generator.set_state(state)

    def result(self, purpose: str) -> str | None:
        """Calls the pipeline and returns a fingerprint of its result."""
        self._on_run(purpose)
        return self._digest(self._call())

    def observe(self, ops: Sequence[Op], purpose: str, on_stage: Callable[[str, Any], None] | None = None) -> Trial:
        """Calls the pipeline and watches its operations, blocks and stages."""
        self._on_run(purpose)
        run = Trial()
        names = {id(code): op.name for op in ops for code in op.codes()}

        def tell(kind: str, name: str, value: Any) -> None:
            run.events.append(Event(kind, name, digest(value)))

        def stage(name: str, value: Any) -> None:
            tell("stage", name, value)
            if on_stage is not None:
                on_stage(name, value)

        with contextlib.ExitStack() as stack:
            stack.enter_context(_watching_blocks(self.blocks, functools.partial(tell, "block")))
            stack.enter_context(watching(self.pipe, self.device, on_stage=stage))
            trace = stack.enter_context(
                tracing_calls(
                    [code for op in ops for code in op.codes()],
                    on_return=lambda frame, value: tell("op", names[id(frame.f_code)], value),
                )
            )
            try:
                run.result = self._call()
            except Exception as error:
                run.error = error
        run.displaced = trace.displaced
        if run.error is None:
            run.events.append(Event("result", "result", self._digest(run.result)))
        return run

    def measure(self, purpose: str) -> Measured:
        """Calls the pipeline with only a clock and a memory counter."""
        self._on_run(purpose)
        most: dict[str, int | None] = {}
        with watching_memory(self.device) as peak:

            def end(stage: str) -> None:
                found = peak()
                most[stage] = found if found is None else max(found, most.get(stage) or 0)

            with watching(self.pipe, self.device, on_end=end) as watch:
                result = self._call()
        return Measured(watch.seconds, most, self._digest(result))

    def _call(self) -> Any:
        self.put_back()
        # fresh copies, because pipelines modify some of their arguments
        fresh = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()
        }
        with _random_state(self.device):
            return self.pipe(**fresh)

    def _digest(self, result: Any) -> str | None:
        found = digest(result)
        if found is None:
            raise TypeError(
                f"{type(self.pipe).__name__} returned a {type(result).__name__} without tensors, arrays or images, "
                "so there is nothing to verify"
            )
        return found


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Restores the global random states after the block."""
    states = random.getstate(), np.random.get_state()
    backend: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
    forks: dict[str, Any] = {"devices": []}
    if hasattr(backend, "get_rng_state"):
        forks = {"devices": list(range(backend.device_count())), "device_type": device.type}
    try:
        with torch.random.fork_rng(**forks):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _blocks(pipe: Any) -> tuple[list[tuple[str, torch.nn.Module]], list[str]]:
    """Returns the transformer blocks of the denoisers by name, and the names of compiled denoisers.

    Modules of a VAE are never included: patched VAE code falls back to stock in modules with hooks.
    """
    found: list[tuple[str, torch.nn.Module]] = []
    compiled = []
    for name, model in denoisers(pipe).items():
        if is_compiled(model):
            compiled.append(name)  # calls in compiled code are not seen
        else:
            found += [(f"{name}.{path}", block) for blocks in block_lists(model) for path, block in blocks.items()]
    return found, compiled


@contextlib.contextmanager
def _watching_blocks(
    blocks: Iterable[tuple[str, torch.nn.Module]], on_output: Callable[[str, Any], None]
) -> Iterator[None]:
    """Reports the outputs of blocks. Does not use hooks, because patches fall back to stock in blocks with hooks."""
    kinds: dict[type, dict[int, str]] = defaultdict(dict)
    for name, block in blocks:
        kinds[type(block)][id(block)] = name
    with contextlib.ExitStack() as stack:
        for kind, names in kinds.items():
            stack.enter_context(mock.patch.object(kind, "__call__", _told(kind.__call__, names, on_output)))
        yield


def _told(call: Callable[..., Any], names: Mapping[int, str], on_output: Callable[[str, Any], None]) -> Any:
    def __call__(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = call(block, *args, **kwargs)
        if id(block) in names:
            on_output(names[id(block)], output)
        return output

    return __call__


def copied(value: Any) -> Any:
    """Copies tensors to new CPU memory, because pipelines modify some of them in place later."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


# Patches


class Choice:
    """The patches to verify, and contexts with and without them.

    names: names of the requested patches; None means all.
    """

    def __init__(self, patches: Iterable[str | Patch] | None, fidelity: Fidelity | str) -> None:
        patches = [patches] if isinstance(patches, (str, Patch)) else None if patches is None else list(patches)
        values = [patch for patch in patches or () if isinstance(patch, Patch)]
        if values and len(values) < len(patches or ()):
            raise ValueError("patches must be either all names or all Patch values, not a mixture")
        self.registry = Registry(values) if values else wan_patches._registry
        self._names = None if patches is None or values else split_names(patches)
        self.names = [patch.name for patch in values] if values else self._names
        with wan_patches.enabled((), fidelity=fidelity):  # raises for an unknown name
            self.fidelity = Fidelity(fidelity)

    def stock(self) -> contextlib.AbstractContextManager[Status]:
        """Disables all patches in the block."""
        return wan_patches.enabled(())

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Enables the patches to verify in the block."""
        with self.stock(), self.registry.enabled(self._names, fidelity=self.fidelity):
            yield

    @contextlib.contextmanager
    def only(self, patches: Iterable[Patch]) -> Iterator[None]:
        """Enables exactly these patches in the block."""
        with self.stock(), Registry(patches).enabled(fidelity=self.fidelity):
            yield


@dataclass(frozen=True)
class Op:
    """A function that patches change, or a nested function that they replace."""

    name: str
    function: FunctionType
    nested: str | None
    patches: tuple[Patch, ...]

    def codes(self) -> list[CodeType]:
        """Returns the code objects that it currently runs."""
        code = self.function.__code__
        return [code] if self.nested is None else [inner for inner in _inner(code) if inner.co_name == self.nested]


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def ops_of(places: Iterable[Place]) -> list[Op]:
    """Returns the operations to watch among the functions that patches change."""
    found: dict[tuple[FunctionType, str | None], list[Patch]] = defaultdict(list)
    for place in places:
        for nested in {getattr(edit, "nested", None) for edit in place.target.edits}:
            found[place.function, nested].append(place.patch)
    return [
        Op(
            ".".join(filter(None, (function.__module__, function.__qualname__, nested))),
            function,
            nested,
            tuple({id(patch): patch for patch in patches}.values()),
        )
        for (function, nested), patches in found.items()
    ]


def message(error: BaseException) -> str:
    """Formats an exception in one line."""
    return f"{type(error).__name__}: {error}"
