"""The small tensors that control a denoising loop, kept so that the host neither downloads nor uploads them in a step.

All computations have the formulation and the device of the plain code: values are copied earlier and cached, or written
by a fill, and a check that is known to pass is skipped. All functions are EXACT on every device.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

#: Cached copies per owner: a pyramid of three stages has six schedules, and twelve with a longer first chunk.
CAPACITY = 16

_copies: weakref.WeakKeyDictionary[Any, dict[Any, torch.Tensor]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Known:
    """The values of a device tensor at version `version`; `exact`, or as computed on the host."""

    version: int
    values: torch.Tensor
    exact: bool


_known: Any = WeakTensorKeyDictionary()  # by identity, removed with the tensor


def on_device(owner: Any, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a copy of `values`, a small CPU tensor, on `device`, uploaded the first time these values occur.

    The copy is cached for the lifetime of `owner`, and must not be modified.
    """
    # includes the stream, because freed memory returns to the stream that allocated it
    key = (values.numpy().tobytes(), values.dtype, values.shape, device, _stream(device))
    copies = _copies.setdefault(owner, {})
    found = copies.get(key)
    if found is None:
        while len(copies) >= CAPACITY:
            copies.pop(next(iter(tuple(copies))), None)
        with tracked():
            found = copies[key] = values.to(device, copy=True)
    return found


def moved(owner: Any, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns `values.to(device)`, a new tensor whose values `on_host` knows."""
    with tracked():
        made = on_device(owner, values, device).clone()
        note(made, values.clone())
    return made


def note(tensor: torch.Tensor, values: torch.Tensor, exact: bool = True) -> None:
    """Records `values`, on the CPU, as those of `tensor` for `noted` and `on_host`, until `tensor` is modified."""
    if not tensor.is_inference():
        _known[tensor] = _Known(tensor._version, values, exact)


def noted(tensor: torch.Tensor, exact: bool = True) -> torch.Tensor | None:
    """Returns the recorded values of `tensor` on the CPU, or None if they are unknown. They must not be modified.

    With `exact=False` they may differ by rounding.
    """
    known = None if tensor.is_inference() else _known.get(tensor)
    if known is None or known.version != tensor._version or (exact and not known.exact):
        return None
    return known.values


def on_host(tensor: torch.Tensor, exact: bool = True) -> torch.Tensor | None:
    """Returns `noted`, or downloads the values once. None if modifications of `tensor` could not be detected."""
    values = noted(tensor, exact)
    if values is None and not tensor.is_inference():  # inference tensors do not count writes
        with tracked():
            values = tensor.cpu()
        note(tensor, values)
    return values


def position(tensor: torch.Tensor, element: torch.Tensor) -> int | None:
    """Returns the index of the 0-D `element` in the 1-D `tensor`, by memory address, or None if it is none."""
    if tensor.dim() != 1 or element.dim() != 0 or element.dtype != tensor.dtype or element.device != tensor.device:
        return None
    step = tensor.stride(0) * tensor.element_size()
    nth, rest = divmod(element.data_ptr() - tensor.data_ptr(), step) if step else (0, 1)
    return nth if rest == 0 and 0 <= nth < len(tensor) else None


def numbers(
    values: Sequence[torch.Tensor | float], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns `torch.tensor(values, dtype=dtype, device=device)`.

    values: numbers and 0-D tensors, on the CPU or on `device`.
    """
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, map(_dtype, values))
    made = [
        value.to(dtype)
        if isinstance(value, torch.Tensor) and value.device == device
        else torch.full((), value.item() if isinstance(value, torch.Tensor) else value, dtype=dtype, device=device)
        for value in values
    ]
    return torch.stack(made)


def apart(values: Sequence[float]) -> bool:
    """Whether a Vandermonde matrix of at most the last three steps of these half log SNRs is far from singular.

    Its nodes are 1 and `(v - values[-2]) / (values[-1] - values[-2])` for each `v` before the last two. If the values
    increase by more than their rounding error, those nodes are negative, so no pivot can be near zero. Two such nodes
    must also differ clearly from each other.
    """
    steps = [after - before for before, after in pairwise(values)]
    if len(steps) > 3 or not all(math.isfinite(step) and step > 1e-3 for step in steps):
        return False
    return len(steps) < 3 or steps[0] > 1e-2 * steps[1]


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, torch.Tensor) else torch.get_default_dtype()


def _stream(device: torch.device) -> Any:
    current = getattr(torch.get_device_module(device), "current_stream", None)
    return None if current is None else current(device)


@contextmanager
def tracked() -> Iterator[None]:
    """Makes tensors created inside count their writes and usable by autograd, even in inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
