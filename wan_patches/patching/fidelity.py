"""What a patch promises about the numbers, and the check that keeps the promise on accelerators."""

from __future__ import annotations

import enum
import logging
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("wan_patches")


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
    """What the first-sight gate found for one form of an op, on one kind of input.

    exact: it keeps its promise, which is `fidelity`.
    """

    op: str
    form: str
    key: Hashable
    exact: bool
    reason: str = ""
    fidelity: Fidelity = Fidelity.EXACT


class Decider(Protocol):
    """What the gate's findings are kept by: ops (see `wan_patches.ops.dispatch`)."""

    def verdicts(self) -> Iterable[Verdict]: ...

    def forget(self, proved: bool = True) -> None: ...


class Gate:
    """The first-sight gate: a form on an accelerator proves itself before it is used.

    The first time that an op meets arguments with new shapes, strides, dtypes or devices, the reference, stock's
    formulation, runs as well, and the results are compared. A form whose result differs, or which raises, is warned
    about once; the next form serves such arguments from then on, or the reference, also where there was no memory for
    both. It costs an extra call and a wait for the device.
    """

    def __init__(self) -> None:
        self._enabled = True
        self._deciders: list[Decider] = []
        self._warned: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether forms are compared before they are used. What was decided without is forgotten when that ends."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        returns, self._enabled = value and not self._enabled, value
        if returns:
            for decider in self._deciders:
                decider.forget(proved=False)

    def watch(self, decider: Decider) -> None:
        """From now on what `decider` finds is told and forgotten here."""
        self._deciders.append(decider)

    def verdicts(self) -> list[Verdict]:
        """What has been found so far."""
        return [verdict for decider in self._deciders for verdict in decider.verdicts()]

    def reset(self) -> None:
        """Forgets all that was found, so that every form proves itself again."""
        self._warned.clear()
        for decider in self._deciders:
            decider.forget()

    def warn(self, form: str, reason: str) -> None:
        """Tells that a form is not used, once for each."""
        if form not in self._warned:
            self._warned.add(form)
            logger.warning(
                "%s %s; another is used for such input (see wan_patches.status())",
                form,
                reason,
            )


#: The gate of this process.
gate = Gate()
