"""Trials of the first-sight gate: compares the results of a form and of the reference for the same arguments.

Some arguments, such as all zeros, would let any form pass. An EXACT form is then tried on random values instead; a
CLOSE form waits for other arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from wan_patches.patching.fidelity import Fidelity

NO_MEMORY = "found no memory to be compared with the stock formulation"
_DIFFERS = {
    Fidelity.EXACT: "differs from the stock formulation",
    Fidelity.CLOSE: "is less accurate than the stock formulation",
}
_TELLING = 1 / 16  # the share of sampled values that must differ from the first one
_SAMPLE = 4096
ROWS = 256  # of a comparison of orders

Agree = Callable[..., bool]


class Trial:
    """The reference's result for some arguments, computed once, to compare any number of forms with."""

    def __init__(
        self,
        reference: Callable[..., Any],
        args: tuple[Any, ...],
        fidelity: Fidelity,
        tells_nothing: Callable[..., bool] | None = None,
    ) -> None:
        self._reference, self._args, self._fidelity = reference, args, fidelity
        tells_little = _tells_little(args)
        #: Whether these arguments cannot distinguish correct from incorrect results.
        self.is_blind = (tells_little and fidelity is Fidelity.CLOSE) or bool(tells_nothing and tells_nothing(*args))
        self._tried = with_random_values(args) if tells_little and not self.is_blind else args
        self._stock: Any = None

    def failure(self, form: Callable[..., Any], agree: Agree | None = None) -> str:
        """Returns why `form` cannot replace the reference for these arguments, or an empty string.

        agree: for a CLOSE form, takes both results and the arguments, and returns whether they are close enough.

        Raises the reference's exceptions for these arguments, except for out-of-memory errors.
        """
        ours, reason = attempt(form, self._tried)
        # the reference runs outside of `except`, where a traceback would keep the form's intermediate results alive
        if reason != NO_MEMORY:
            try:
                if self._stock is None:
                    self._stock = self._reference(*self._tried)
                if not reason and not _agree(ours, self._stock, self._tried, agree):
                    reason = _DIFFERS[self._fidelity]
            except Exception as error:
                ours = None
                if not is_shortage(error):
                    raise
                reason = NO_MEMORY
        return reason

    def why_unconfirmed(self, confirmation: Callable[..., bool]) -> str:
        """Returns why `confirmation` of what `failure` compared fails, or an empty string."""
        is_confirmed, reason = attempt(confirmation, self._tried)
        return reason if reason or is_confirmed else _DIFFERS[self._fidelity]

    def result(self) -> Any:
        """Returns the reference's result for the original arguments."""
        if self._tried is not self._args:
            self._tried = self._stock = None
        return self._reference(*self._args) if self._stock is None else self._stock


def attempt(form: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str]:
    """Returns the result of `form` and an empty string, or None and the reason."""
    try:
        return form(*args), ""
    except Exception as error:
        return None, NO_MEMORY if is_shortage(error) else f"raised {type(error).__name__}: {error}"


def is_shortage(error: Exception) -> bool:
    """Whether an error means that a device of any vendor ran out of memory."""
    return isinstance(error, (RuntimeError, MemoryError)) and (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error).lower()
    )


def is_capturing() -> bool:
    """Whether a graph is being captured, which forbids comparisons because they wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def rows_that_tell_orders(dim: int, device: torch.device) -> torch.Tensor:
    """Returns `(1, ROWS, dim)` fp32 values; another order of additions changes the sums of many rows.

    The user's random state is left unchanged.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows, scale, offset = (
        torch.randn((1, ROWS, last), generator=generator, dtype=torch.float32, device="cpu") for last in (dim, 1, 1)
    )
    return (rows * torch.exp(2 * scale) + offset).to(device)


def identical(a: Any, b: Any) -> bool:
    """Whether two results, tensors or tuples of tensors, have the same bits; NaN equals NaN."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(identical, a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (
        torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )


def _agree(ours: Any, stock: Any, args: tuple[Any, ...], agree: Agree | None) -> bool:
    if agree is None:
        return identical(ours, stock)
    return _alike(ours, stock) and agree(ours, stock, *args)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the floating tensors in arguments, which may be nested in tuples."""
    if isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        yield value


def _tells_little(args: tuple[Any, ...]) -> bool:
    """Whether a sample of any tensor is nearly constant, or NaN."""
    shares = []
    for tensor in _tensors(args):
        per_axis = max(1, round(_SAMPLE ** (1 / max(1, tensor.dim()))))
        some = tensor.detach()[tuple(slice(None, None, -(-size // per_axis)) for size in tensor.shape)]
        first = some[(0,) * some.dim()]
        shares.append((some.isfinite() & (some != first)).float().mean())
    return bool(shares) and float(torch.stack(shares).min()) < _TELLING  # waits once


def with_random_values(value: Any) -> Any:
    """Replaces the values of floating tensors at random; shapes, strides, dtypes and devices stay."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            items = map(changed, value)
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()):
            return value
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
        flat = torch.randn(extent, generator=generator, dtype=torch.float32, device="cpu").to(value.device, value.dtype)
        return flat.as_strided(value.shape, value.stride())

    return changed(value)
