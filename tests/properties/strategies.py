"""What the property tests draw: tensors of any shape, layout, dtype and value; and what "the same" means.

Drawn values are small plain descriptions. What they describe is made anew for each of two calls, so that neither can
change the input of the other, and a falsifying example can be read and pasted.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import wan_patches
from wan_patches.patching.registry import Place

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES_AND_FLOAT = FLOATS[:3]

SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]


def amounts(few: int = 100, many: int = 10_000) -> pytest.MarkDecorator:
    """Runs a test with `few` examples, and with `many` where slow tests are asked for (`-m slow`)."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=SLOW)])


def hunt(check: Callable[[], None], examples: int) -> None:
    """Looks through so many examples for one that fails `check`, a function under `@given`.

    Few are the same in each run, so that a change is not blamed for what another run would have found as well.
    """
    slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    how = settings(
        max_examples=examples, deadline=None, derandomize=examples < 1000, suppress_health_check=slow_is_fine
    )
    how(check)()


@contextlib.contextmanager
def patched(name: str) -> Iterator[list[Place]]:
    """The patches of this name, enabled for a block in every module that the installed diffusers has."""
    for report in wan_patches.status().of(name):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(report.module)
    with wan_patches.enabled([name]):
        found = [place for place in wan_patches._registry.places() if place.patch.name == name]
        assert found
        yield found


def nested(function: types.FunctionType, name: str) -> types.FunctionType:
    """The function of this name that `function` defines when it runs."""
    codes = [c for c in function.__code__.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
    (code,) = codes
    return types.FunctionType(code, function.__globals__)


# Tensors


@dataclass(frozen=True)
class Layout:
    """Where elements lie: axes from the outermost in memory, steps along them, which are repeated, what lies before."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    repeated: tuple[bool, ...]
    offset: int = 0

    @classmethod
    def contiguous(cls, dims: int) -> Layout:
        return cls(tuple(range(dims)), (1,) * dims, (False,) * dims)


@dataclass(frozen=True)
class Drawn:
    """A tensor to be made; `make` gives the same one every time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    kind: str
    seed: int
    grad: bool = False

    @classmethod
    def plain(cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, repeated: int | None = None) -> Drawn:
        """A contiguous tensor of normal values; `repeated` is an axis along which it is expanded."""
        layout = replace(Layout.contiguous(len(shape)), repeated=tuple(axis == repeated for axis in range(len(shape))))
        return cls(shape, dtype, layout, "normal", 0)

    def make(self) -> torch.Tensor:
        repeated = [again and size > 1 for again, size in zip(self.layout.repeated, self.shape)]
        sizes = [1 if again else size for again, size in zip(repeated, self.shape)]
        in_memory = [sizes[axis] * self.layout.steps[axis] for axis in self.layout.order]
        flat = values(self.kind, self.layout.offset + math.prod(in_memory), self.dtype, self.seed)
        tensor = flat[self.layout.offset :].view(in_memory).permute(*np.argsort(self.layout.order).tolist())
        tensor = tensor[tuple(slice(None, None, step) for step in self.layout.steps)].expand(self.shape)
        return tensor.requires_grad_() if self.grad else tensor


KINDS = ("normal", "wide", "special", "bits")


def values(kind: str, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """`count` values of a kind, contiguous.

    "normal": around one. "wide": of many magnitudes. "special": every other one is nan, infinite, a zero, the largest,
    the smallest normal or denormal number, of either sign. "bits": any bits that there can be.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "bits":
        return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
    made = torch.randn(count, dtype=torch.float64, generator=generator)
    if kind == "wide":
        made *= torch.randint(-24, 12, (count,), generator=generator).exp2()
    if kind == "special":
        info = torch.finfo(dtype)
        ends = (math.nan, math.inf, 0.0, info.max, info.tiny, info.tiny * info.eps, 1.0)
        pool = torch.tensor([*ends, *(-end for end in ends)], dtype=torch.float64)
        chosen = pool[torch.randint(0, len(pool), (count,), generator=generator)]
        made = torch.where(torch.rand(count, generator=generator) < 0.5, chosen, made)
    return made.to(dtype)


seeds = st.integers(0, 2**32 - 1)


def layouts(dims: int, repeats: bool = True) -> st.SearchStrategy[Layout]:
    """Any layout of so many axes, the contiguous one often, and that of pictures, in which the second axis is last."""
    again = st.sampled_from((False, False, False, False, True)) if repeats else st.just(False)
    anything = st.builds(
        Layout,
        st.permutations(range(dims)).map(tuple),
        st.tuples(*[st.sampled_from((1, 1, 1, 2, 3))] * dims),
        st.tuples(*[again] * dims),
        st.sampled_from((0, 0, 1, 3)),
    )
    usual = Layout.contiguous(dims)
    pictures = [replace(usual, order=(0, *range(2, dims), 1))] if dims > 3 else []
    return st.one_of(st.just(usual), anything, *map(st.just, pictures))


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    dtypes: Collection[torch.dtype] = FLOATS,
    kinds: Collection[str] = KINDS,
    repeats: bool = True,
    grad: bool = False,
) -> Drawn:
    """Tensors of one shape; with `repeats` also expanded ones, with `grad` also those that ask for gradients."""
    return Drawn(
        tuple(shape),
        draw(st.sampled_from(tuple(dtypes))),
        draw(layouts(len(shape), repeats)),
        draw(st.sampled_from(tuple(kinds))),
        draw(seeds),
        grad and draw(st.sampled_from((False, False, False, False, True))),
    )


# The same


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the exception that it raises; warnings are nobody's concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except Exception as error:
            return error


def assert_same(actual: Any, expected: Any, strides: bool = True) -> None:
    """Asserts equal bits, dtypes, shapes and (if asked) strides; of exceptions, equal types and messages.

    A nan is a nan: its sign and payload depend on the lane of the processor that made it. Strides of what carries a
    gradient are autograd's affair.
    """
    assert type(actual) is type(expected), (actual, expected)
    if isinstance(expected, Exception):
        ours, theirs = (_ADDRESS.sub("", str(error)) for error in (actual, expected))
        assert ours == theirs, f"{ours} != {theirs}"
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.device, actual.shape) == (expected.dtype, expected.device, expected.shape)
        assert actual.layout == expected.layout
        actual, expected = (x if x.layout == torch.strided else x.to_dense() for x in (actual, expected))
        assert expected.requires_grad or not strides or actual.stride() == expected.stride()
        if not expected.is_meta:
            _assert_same_bits(actual.detach(), expected.detach())
    elif isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape, actual.strides) == (expected.dtype, expected.shape, expected.strides)
        _assert_same_bits(torch.from_numpy(actual), torch.from_numpy(expected))
    elif isinstance(expected, PIL.Image.Image):
        assert (actual.mode, actual.size, actual.tobytes()) == (expected.mode, expected.size, expected.tobytes())
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected):
            assert_same(*pair, strides)
    else:
        assert actual == expected


_ADDRESS = re.compile("0x[0-9a-f]+")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.is_floating_point() and expected.dtype.itemsize > 1:
        assert torch.equal(actual.isnan(), expected.isnan()), "nan elsewhere"
        actual, expected = (x.masked_fill(x.isnan(), 0).contiguous() for x in (actual, expected))
    elif expected.is_complex():
        actual, expected = (torch.view_as_real(x.resolve_conj()).contiguous() for x in (actual, expected))
    integers = _INTEGERS[expected.dtype.itemsize]
    actual, expected = (x.contiguous().view(integers) for x in (actual, expected))
    wrong = (actual != expected).sum().item()
    assert wrong == 0, f"{wrong} of {expected.numel()} values differ"
