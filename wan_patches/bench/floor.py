"""Measures the floor: the matrix products, convolutions and attention calls of a forward alone.

The calls are recorded while stock's code runs. Then they are repeated in order on random inputs of the same shapes,
strides and dtypes, with the model's own weights and the same attention backend. Their time is a lower bound for any
code that computes the same result.
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
_DISPATCH = "dispatch_attention_fn"  # of diffusers: calls the backend that the user has selected


@dataclass(frozen=True)
class _Like:
    """Size, stride and dtype of a tensor, without its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def reach(self) -> int:
        """Number of elements that the tensor spans in memory, gaps included."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride))
        return last + 1 if math.prod(self.size) else 0


@dataclass(frozen=True)
class Step:
    """A recorded call. `kind` is "matmul" or "attention"; tensors are `_Like` in the arguments, except parameters."""

    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextlib.contextmanager
def recording() -> Iterator[list[Step]]:
    """Yields a list to which the calls that this thread makes in the block are added as they happen."""
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
        """Calls the function and records the call, unless it is part of a recorded call."""
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
    """Records calls of diffusers' attention dispatcher, which each transformer module imports under its own name."""
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
    """Repeats recorded calls: `floor()` makes all of them in order.

    The inputs are views of one block of random memory per dtype, as large as the largest call needs. The inputs of one
    call do not overlap.
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
    """A copy within the device, of more bytes than caches hold. `copy()` reads and writes `bytes` in total."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes = 2 * size

    def __call__(self) -> None:
        self._target.copy_(self._source)


def _likes(step: Step) -> list[_Like]:
    return [value for value in (*step.arguments, *step.keywords.values()) if isinstance(value, _Like)]


def _aligned(elements: int) -> int:
    return -(-elements // 64) * 64  # like an allocator


def _noise(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype, device=device)
    return randn_tensor((size,), generator=generator(device), device=device, dtype=dtype)  # zeros take less power
