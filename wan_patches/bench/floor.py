"""What has to be computed, and nothing else: the matrix products, convolutions and attention calls of a forward.

They are noted while stock's code runs, and then called again, one after the other, on random inputs of the same
shapes, strides and dtypes, with the model's own weights and through the attention backend that was called. How long
that takes is the floor under any code that computes the same.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode

from wan_patches.bench.measure import generator

__all__ = ["Copy", "Floor", "Step", "recording"]

_MATMULS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm),
}
_ATTENTION = {F.scaled_dot_product_attention}
_DISPATCH = "dispatch_attention_fn"  # of diffusers: it knows which backend the user has chosen


@dataclass(frozen=True)
class _Like:
    """What a tensor was, without its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def reach(self) -> int:
        """Elements of memory from its first to behind its last."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride))
        return last + 1 if math.prod(self.size) else 0


@dataclass(frozen=True)
class Step:
    """One call: of which kind ("matmul" or "attention"), and with what; tensors but for parameters are `_Like`."""

    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextlib.contextmanager
def recording() -> Iterator[list[Step]]:
    """Gives a list of the calls that are made in the block, by this thread; it fills as they are made."""
    with _Recorder() as recorder, _dispatching(recorder):
        yield recorder.steps


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._inside = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _MATMULS:
            return self.call("matmul", function, args, kwargs or {})
        if function in _ATTENTION:
            return self.call("attention", function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def call(self, kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Calls and notes it, unless it is part of what is noted already."""
        if self._inside:
            return function(*args, **kwargs)
        arguments = tuple(map(_like, args))
        self.steps.append(Step(kind, function, arguments, {name: _like(value) for name, value in kwargs.items()}))
        self._inside = True
        try:
            return function(*args, **kwargs)
        finally:
            self._inside = False


@contextlib.contextmanager
def _dispatching(recorder: _Recorder) -> Iterator[None]:
    """Notes the calls of diffusers' dispatcher, which every transformer's module has its own name for."""
    changed: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if str(names.get("__name__", "")).startswith("diffusers.") and callable(stock := names.get(_DISPATCH)):
                changed.append((names, stock))
                names[_DISPATCH] = _noted(recorder, stock)
        yield
    finally:
        for names, stock in changed:
            names[_DISPATCH] = stock


def _noted(recorder: _Recorder, stock: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return recorder.call("attention", stock, args, kwargs)

    return dispatch


def _like(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter) or not isinstance(value, torch.Tensor):
        return value
    return _Like(tuple(value.shape), value.stride(), value.dtype)


class Floor:
    """The noted calls, to be made again: `floor()` makes all of them, in their order.

    Their inputs lie in one piece of random memory for each dtype, as large as the largest call needs; those of one
    call lie one behind the other.
    """

    def __init__(self, steps: Sequence[Step], device: torch.device) -> None:
        self.matmuls = sum(step.kind == "matmul" for step in steps)
        self.attentions = len(steps) - self.matmuls
        sizes: dict[torch.dtype, int] = {}
        for step in steps:
            needed: dict[torch.dtype, int] = {}
            for like in _likes(step):
                needed[like.dtype] = needed.get(like.dtype, 0) + _aligned(like.reach)
            sizes = {dtype: max(sizes.get(dtype, 0), needed.get(dtype, 0)) for dtype in {*sizes, *needed}}
        self._memory = {dtype: _noise(size, dtype, device) for dtype, size in sizes.items()}
        self._calls = [self._prepared(step) for step in steps]

    def __call__(self) -> None:
        for function, arguments, keywords in self._calls:
            function(*arguments, **keywords)

    def _prepared(self, step: Step) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        used: dict[torch.dtype, int] = {}

        def real(value: Any) -> Any:
            if not isinstance(value, _Like):
                return value
            offset = used.get(value.dtype, 0)
            used[value.dtype] = offset + _aligned(value.reach)
            return self._memory[value.dtype].as_strided(value.size, value.stride, offset)

        arguments = tuple(map(real, step.arguments))
        return step.function, arguments, {name: real(value) for name, value in step.keywords.items()}


class Copy:
    """A copy within the device, of as many bytes as caches cannot hold: `copy()` reads and writes `bytes` in all."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes = 2 * size

    def __call__(self) -> None:
        self._target.copy_(self._source)


def _likes(step: Step) -> list[_Like]:
    return [value for value in (*step.arguments, *step.keywords.values()) if isinstance(value, _Like)]


def _aligned(elements: int) -> int:
    return -(-elements // 64) * 64  # as an allocator would


def _noise(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype, device=device)
    return randn_tensor((size,), generator=generator(device), device=device, dtype=dtype)  # zeros take less power
