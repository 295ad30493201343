"""What a patch promises about the numbers, and the check that keeps the promise on accelerators."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("wan_patches")

Result = TypeVar("Result")


class Fidelity(str, enum.Enum):
    """The promise of a patch about its numbers.

    `EXACT`: the bits of the stock code on the same device, dtype and shape.
    `CLOSE`: the same mathematics at the same or a higher precision of every operand; only rounding
    moves. Opt-in: `wan_patches.enable(fidelity="close")`, which allows exact patches as well.
    """

    EXACT = "exact"
    CLOSE = "close"

    def allows(self, other: Fidelity) -> bool:
        """Whether a user who asked for `self` accepts a patch that promises `other`."""
        return self is Fidelity.CLOSE or other is Fidelity.EXACT


@dataclass(frozen=True)
class Verdict:
    """What the first-sight gate found for one operation on one kind of input.

    exact: it keeps its promise, which is `fidelity`.
    """

    op: str
    key: Hashable
    exact: bool
    reason: str = ""
    fidelity: Fidelity = Fidelity.EXACT


class Gate:
    """The first-sight gate: an EXACT implementation on an accelerator proves itself before it is used.

    The first time an operation meets a new key (shapes, strides, dtypes, device), stock's formulation
    runs as well and the results are compared with `torch.equal`. A mismatch, or an implementation that
    raises, is warned about once per operation; stock's formulation serves that key from then on, also
    where there was no memory for both.

    Arguments that are all zeros, say, would let anything pass. An EXACT implementation is then tried on
    random values in their place; a CLOSE one waits for other arguments.
    """

    #: Keys remembered. Past it the oldest is forgotten and proves itself again.
    CAPACITY = 4096

    def __init__(self) -> None:
        self.enabled = True
        self._verdicts: dict[Hashable, Verdict] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __call__(
        self,
        op: str,
        key: Hashable,
        implementation: Callable[..., Result],
        reference: Callable[..., Result],
        *args: Any,
        agree: Callable[[Result, Result], bool] | None = None,
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> Result:
        """Returns `implementation(*args)` where it has proved equal to `reference(*args)`, else the latter.

        The result is a tensor or a tuple of tensors.

        `key` must hold all that the arithmetic can depend on (see `signature`); it always includes `op`.
        The first sight of a key costs one extra call and one wait for the device. A CLOSE implementation
        says by `agree(ours, stock)` whether its result will do.
        """
        if not self.enabled:
            return implementation(*args)
        verdict = self._verdicts.get((op, key))
        if verdict is not None:
            return implementation(*args) if verdict.exact else reference(*args)
        if _is_capturing():  # a comparison waits for the device, which a graph capture forbids
            return reference(*args)
        return self._first_sight(op, key, implementation, reference, args, agree or _identical, fidelity)

    def verdicts(self) -> list[Verdict]:
        """What has been found so far, oldest first."""
        with self._lock:
            return list(self._verdicts.values())

    def reset(self) -> None:
        """Forgets every verdict, so that each key proves itself again."""
        with self._lock:
            self._verdicts.clear()
            self._warned.clear()

    def _first_sight(self, op: str, key: Hashable, implementation, reference, args, agree, fidelity: Fidelity) -> Any:
        tried = args
        if _tell_little(_tensors(args)):
            if fidelity is Fidelity.CLOSE:  # how close it comes depends on the values
                return reference(*args)
            tried = _with_random_values(args)
        ours = stock = None
        reason = ""
        try:
            ours = implementation(*tried)
        except Exception as error:
            reason = _NO_MEMORY if _is_shortage(error) else f"raised {type(error).__name__}: {error}"
        # stock runs outside of `except`, where a traceback would hold what had been made until then
        if reason != _NO_MEMORY:
            try:
                stock = reference(*tried)
                if not reason and not (_alike(ours, stock) and agree(ours, stock)):
                    reason = _DIFFERS[fidelity]
            except Exception as error:
                ours = None
                if not _is_shortage(error):  # of stock itself, for such arguments
                    raise
                reason = _NO_MEMORY
        ours = None
        if tried is not args:
            tried = stock = None
        self._decide(Verdict(op, key, not reason, reason, fidelity))
        return reference(*args) if stock is None else stock

    def _decide(self, verdict: Verdict) -> None:
        if verdict.reason:
            self._warn(verdict.op, verdict.reason)
        with self._lock:
            while len(self._verdicts) >= self.CAPACITY:
                del self._verdicts[next(iter(self._verdicts))]
            self._verdicts[(verdict.op, verdict.key)] = verdict

    def _warn(self, op: str, reason: str) -> None:
        if op not in self._warned:
            self._warned.add(op)
            logger.warning(
                "%s %s on this device; the stock formulation is used for such input (see wan_patches.status())",
                op,
                reason,
            )


#: The gate of this process.
gate = Gate()


def signature(*tensors: torch.Tensor) -> tuple[Hashable, ...]:
    """The part of a gate key that tensors of one device contribute: the device; shape, strides, dtype of each."""
    key: list[Hashable] = [tensors[0].device]
    for tensor in tensors:
        key += (tensor.shape, tensor.stride(), tensor.dtype)
    return tuple(key)


_DIFFERS = {
    Fidelity.EXACT: "differs from the stock formulation",
    Fidelity.CLOSE: "is less accurate than the stock formulation",
}
_NO_MEMORY = "found no memory to be compared with the stock formulation"
_TELLING = 1 / 16  # of the values that are looked at must differ from the first one
_SAMPLE = 4096


def _is_shortage(error: Exception) -> bool:
    """Whether a device, of any maker, ran out of memory."""
    return isinstance(error, (RuntimeError, MemoryError)) and (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error).lower()
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating tensors in arguments, which may be tuples of them."""
    import torch

    if isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        yield value


def _tell_little(tensors: Iterator[torch.Tensor]) -> bool:
    """Whether one of the tensors, looked at here and there, has the same value nearly everywhere, or NaN."""
    import torch

    shares = []
    for tensor in tensors:
        per_axis = max(1, round(_SAMPLE ** (1 / max(1, tensor.dim()))))
        some = tensor.detach()[tuple(slice(None, None, -(-size // per_axis)) for size in tensor.shape)]
        first = some[(0,) * some.dim()]
        shares.append((some.isfinite() & (some != first)).float().mean())
    return bool(shares) and float(torch.stack(shares).min()) < _TELLING  # one wait


def _with_random_values(value: Any) -> Any:
    """Arguments with other values in floating tensors: shapes, strides, dtypes and devices stay."""
    import torch

    generator = torch.Generator("cpu").manual_seed(0)  # the user's random state is not ours to move

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


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):  # of an operation with several results
        return len(a) == len(b) and all(map(_alike, a, b))
    return a.dtype == b.dtype and a.shape == b.shape


def _identical(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, tuple):
        return all(map(_identical, a, b))
    # nan is not equal to itself, and says nothing against an implementation that gives it where stock does
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _is_capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
