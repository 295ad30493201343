"""What the tests beside others' code share: small pipelines, and what their code was handed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.testing.families import FAMILIES

Pipelines = Callable[[str], Any]


@pytest.fixture(scope="session")
def pipelines() -> Pipelines:
    """The pipeline of a family, built once; a test leaves it as it was."""

    @functools.cache
    def build(name: str) -> Any:
        return FAMILIES[name].build(dtype=torch.float32)

    return lambda name: build({"wan_animate_replace": "wan_animate"}.get(name, name))


def described(value: Any) -> Any:
    """All that somebody who is handed `value` can tell; tensors and arrays with their memory's layout."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.dtype, value.device, value.shape, value.stride(), value.detach().clone())
    if isinstance(value, np.ndarray):
        return (type(value), value.dtype, value.shape, value.strides, value.copy())
    if isinstance(value, (list, tuple)):
        return (type(value), [described(item) for item in value])
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, (int, float, str, type(None))):
        return value
    return type(value).__name__


def same(a: Any, b: Any) -> bool:
    """Equality of what `described` gives, and of results, bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


class Raised(NamedTuple):
    """An exception, as far as a test compares it."""

    kind: str
    text: str


class Looking:
    """Somebody's code around functions, which notes what it is handed and hands it on."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.seen.append((name, described(list(args)), described(kwargs)))

    def taken(self) -> list[Any]:
        """What was noted since it was last asked."""
        seen, self.seen = self.seen, []
        return seen

    def closure(self, function: Any, name: str = "") -> Any:
        """A wrapper that says nothing of whom it wraps."""

        def theirs(*args: Any, **kwargs: Any) -> Any:
            self.note(name, *args, **kwargs)
            return function(*args, **kwargs)

        return theirs

    def wraps(self, function: Any, name: str = "") -> Any:
        return functools.wraps(function)(self.closure(function, name))

    def wrapt(self, function: Any, name: str = "") -> Any:
        import wrapt

        def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            self.note(name, *args, **kwargs)
            return wrapped(*args, **kwargs)

        return wrapt.FunctionWrapper(function, theirs)


@pytest.fixture
def looking() -> Looking:
    return Looking()


@pytest.fixture
def against_stock(looking: Looking) -> Callable[..., None]:
    """Runs a call with stock code and patched: same result, and the same seen by whoever looks on.

    `change` puts others' code in place, inside `enabled` as well where `late`.
    """

    def compare(
        run: Callable[[], Any],
        change: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        late: bool = False,
        looks: bool = True,
        raises: bool = False,
        **options: Any,
    ) -> None:
        with change():
            stock = outcome(run)
        expected = looking.taken()
        assert expected or not looks
        assert isinstance(stock, Raised) is raises, stock
        first, second = (enabled, change) if late else (change, enabled)
        with first(**options if first is enabled else {}), second(**options if second is enabled else {}):
            patched = outcome(run)
        assert same(looking.taken(), expected)
        assert same(patched, stock)

    return compare


@contextlib.contextmanager
def enabled(**options: Any) -> Iterator[None]:
    with wan_patches.enabled(**options):
        yield


def outcome(run: Callable[[], Any]) -> Any:
    """What a call gives, or what it raises."""
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        return Raised(type(error).__name__, str(error))
