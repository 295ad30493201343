"""What a patch promises about the numbers, and the check that keeps the promise on accelerators."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable, Hashable
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
    raises, is warned about once per operation; stock's formulation serves that key from then on.
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
        import torch

        reason = ""
        try:
            ours = implementation(*args)
        except torch.OutOfMemoryError:
            return reference(*args)
        except Exception as error:
            ours, reason = None, f"raised {type(error).__name__}: {error}"
        try:
            stock = reference(*args)
            exact = ours is not None and _alike(ours, stock) and agree(ours, stock)
        except torch.OutOfMemoryError:
            del ours  # no room for both: stock alone, and no verdict
            return reference(*args)
        if not exact:
            reason = reason or _DIFFERS[fidelity]
            self._warn(op, reason)
        with self._lock:
            while len(self._verdicts) >= self.CAPACITY:
                del self._verdicts[next(iter(self._verdicts))]
            self._verdicts[(op, key)] = Verdict(op, key, exact, reason, fidelity)
        return stock

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
