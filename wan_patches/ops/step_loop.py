"""The small tensors that steer a denoising loop, so that the host neither reads one from the device nor uploads one.

Nothing here computes in another way or place than the plain formulation: values are copied earlier and kept, or
written by a fill, and a check that is known to pass is left out. All of it is EXACT on every device.
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

#: Copies kept for an owner: a pyramid of three stages has six schedules, and twelve with a longer first chunk.
CAPACITY = 16

_copies: weakref.WeakKeyDictionary[Any, dict[Any, torch.Tensor]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Known:
    """What a tensor on a device held when its version was `version`; `exact` or as computed on the host."""

    version: int
    values: torch.Tensor
    exact: bool


_known: Any = WeakTensorKeyDictionary()  # by identity, and gone with the tensor


def on_device(owner: Any, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `values`, a small tensor on the CPU, on `device`: uploaded the first time that they are seen.

    The copy is kept as long as `owner` lives; it is not to be written to.
    """
    # of the stream: the memory of what is forgotten goes back to the stream that it came from
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
    """`values.to(device)`, a tensor of its own, of which `on_host` knows the values."""
    with tracked():
        made = on_device(owner, values, device).clone()
        note(made, values.clone())
    return made


def note(tensor: torch.Tensor, values: torch.Tensor, exact: bool = True) -> None:
    """From now on `noted` and `on_host` take `values`, on the CPU, for those of `tensor`, until that is written to."""
    if not tensor.is_inference():
        _known[tensor] = _Known(tensor._version, values, exact)


def noted(tensor: torch.Tensor, exact: bool = True) -> torch.Tensor | None:
    """The values of `tensor` on the CPU, not to be written to; None where they are not known.

    With `exact=False` they may be off by rounding.
    """
    known = None if tensor.is_inference() else _known.get(tensor)
    if known is None or known.version != tensor._version or (exact and not known.exact):
        return None
    return known.values


def on_host(tensor: torch.Tensor, exact: bool = True) -> torch.Tensor | None:
    """What `noted` gives, else downloaded once. None where writes to `tensor` could not be noticed."""
    values = noted(tensor, exact)
    if values is None and not tensor.is_inference():  # whose writes are not counted
        with tracked():
            values = tensor.cpu()
        note(tensor, values)
    return values


def position(tensor: torch.Tensor, element: torch.Tensor) -> int | None:
    """Which element of the 1-D `tensor` the 0-D `element` is, in memory; None if it is none."""
    if tensor.dim() != 1 or element.dim() != 0 or element.dtype != tensor.dtype or element.device != tensor.device:
        return None
    step = tensor.stride(0) * tensor.element_size()
    nth, rest = divmod(element.data_ptr() - tensor.data_ptr(), step) if step else (0, 1)
    return nth if rest == 0 and 0 <= nth < len(tensor) else None


def numbers(
    values: Sequence[torch.Tensor | float], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)` of numbers and 0-D tensors, on the CPU or on `device`."""
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
    """Whether a Vandermonde matrix of the last three or fewer steps of these half log SNRs is far from singular.

    Its nodes are 1 and `(v - values[-2]) / (values[-1] - values[-2])` for each `v` before the last two. Where the
    values rise by more than their rounding, those nodes are negative, so that no pivot can be near zero; of two such,
    one must not be the other in disguise.
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
    """Tensors made inside count their writes and can be used by autograd, also where inference mode is on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
