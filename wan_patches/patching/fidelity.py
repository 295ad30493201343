"""A patch's numerical guarantee, and the gate that enforces it on accelerators."""

from __future__ import annotations

import enum
import logging
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("wan_patches")


class Fidelity(str, enum.Enum):
    """The numerical guarantee of a patch.

    `EXACT`: the bits of the stock code on the same device, dtype and shape.
    `CLOSE`: the same mathematics at the same or a higher precision of every operand; only rounding differs. Opt-in:
        `wan_patches.enable(fidelity="close")`, which allows exact patches as well.
    """

    EXACT = "exact"
    CLOSE = "close"

    def allows(self, other: Fidelity) -> bool:
        """Whether a user who requested `self` accepts a patch that guarantees `other`."""
        return self is Fidelity.CLOSE or other is Fidelity.EXACT


@dataclass(frozen=True)
class Verdict:
    """Result of the first-sight gate for one form of an op on one kind of input.

    exact: whether the form meets its guarantee, `fidelity`.
    """

    op: str
    form: str
    key: Hashable
    exact: bool
    reason: str = ""
    fidelity: Fidelity = Fidelity.EXACT


class Decider(Protocol):
    """Interface of the objects that store the gate's verdicts: ops (see `wan_patches.ops.dispatch`)."""

    def verdicts(self) -> Iterable[Verdict]: ...

    def forget(self, proved: bool = True) -> None: ...


class Gate:
    """The first-sight gate: verifies a form on an accelerator before it is used.

    When an op first sees arguments with new shapes, strides, dtypes or devices, the reference (stock's formulation)
    runs as well, and the results are compared. A form whose result differs, or which raises, causes one warning. Such
    arguments are then served by the next form, or by the reference; also if there was no memory for both results. The
    check costs one extra call and one wait for the device.
    """

    def __init__(self) -> None:
        self._enabled = True
        self._deciders: list[Decider] = []
        self._warned: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether forms are compared before use. Re-enabling forgets the decisions made while disabled."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        returns, self._enabled = value and not self._enabled, value
        if returns:
            for decider in self._deciders:
                decider.forget(proved=False)

    def watch(self, decider: Decider) -> None:
        """Registers `decider`: its verdicts are reported and forgotten through this gate."""
        self._deciders.append(decider)

    def verdicts(self) -> list[Verdict]:
        """Returns all verdicts so far."""
        return [verdict for decider in self._deciders for verdict in decider.verdicts()]

    def reset(self) -> None:
        """Forgets all verdicts, so that every form is verified again."""
        self._warned.clear()
        for decider in self._deciders:
            decider.forget()

    def warn(self, form: str, reason: str) -> None:
        """Logs that a form is not used, once per form."""
        if form not in self._warned:
            self._warned.add(form)
            logger.warning(
                "%s %s; another is used for such input (see wan_patches.status())",
                form,
                reason,
            )


#: The gate of this process.
gate = Gate()
