"""The state of the patches: a report for each, and all of them as a table."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from wan_patches.patching.fidelity import Fidelity, Verdict
from wan_patches.patching.tally import Way

ACTIVE, WAITING, SKIPPED, OFF = "active", "waiting for import", "skipped", "off"


@dataclass(frozen=True)
class Report:
    """The state of one patch: `active`, `waiting for import`, `skipped` (with the reason) or `off`.

    ways: the calls so far, by what served them; `note` summarises them.
    """

    name: str
    module: str
    targets: tuple[str, ...]
    state: str
    reason: str = ""
    fidelity: Fidelity = Fidelity.EXACT
    implementations: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[Way, int] = field(default_factory=dict)
    note: str = ""

    @property
    def calls(self) -> int:
        """The number of counted calls; calls in compiled code are not counted."""
        return sum(self.ways.values())

    @property
    def fast(self) -> int:
        """The number of counted calls served by a form other than stock's."""
        return sum(calls for way, calls in self.ways.items() if way.is_fast)


@dataclass(frozen=True)
class Status:
    """The patches and their states; prints as a table. `advice`: notes on this machine."""

    reports: tuple[Report, ...]
    verdicts: tuple[Verdict, ...] = ()
    advice: tuple[str, ...] = ()

    def of(self, name: str) -> tuple[Report, ...]:
        """Returns the reports of the patches named `name`."""
        return tuple(report for report in self.reports if report.name == name)

    def skipped(self) -> tuple[Report, ...]:
        """Returns the reports of selected patches that could not be installed."""
        return tuple(report for report in self.reports if report.state == SKIPPED)

    def __str__(self) -> str:
        from wan_patches.tables import text

        return text(*table(self))

    def _repr_html_(self) -> str:
        from wan_patches.tables import html

        return html(*table(self))


def _is_there(module: str) -> bool:
    """Whether the library of a module is installed."""
    library = module.partition(".")[0]
    return library in sys.modules or importlib.util.find_spec(library) is not None


def table(status: Status) -> list[object]:
    """Returns the status as a table, followed by what each patch runs and the first-sight gate's verdicts."""
    from rich import box
    from rich.table import Table

    rows = Table(box=box.SIMPLE)
    for column in ("patch", "module", "target", "state"):
        rows.add_column(column, overflow="fold", no_wrap=column == "module")
    reports = [report for report in status.reports if report.state != "waiting for import" or _is_there(report.module)]
    for report in reports:
        more = report.reason or report.note
        state = f"{report.state}: {more}" if more else report.state
        targets = ", ".join(target.removesuffix(".__call__") for target in report.targets)
        rows.add_row(report.name, report.module.rpartition("diffusers.")[2], targets, state)
    count = Counter(report.state for report in reports)
    lines: list[object] = [rows, "  " + ", ".join(f"{n} {state}" for state, n in count.items())]
    running: dict[tuple[str, str], dict[str, None]] = {}
    for report in reports:
        if report.state != "off":
            runs = running.setdefault((report.name, report.fidelity.value), {})
            runs |= {f"{what} on {device}": None for device, what in report.implementations.items()}
    lines += [f"  {name} ({fidelity}): {'; '.join(runs)}" for (name, fidelity), runs in running.items()]
    judged = Counter((v.op, v.form, v.fidelity.value if v.exact else f"not used, {v.reason}") for v in status.verdicts)
    for (op, form, verdict), n in judged.items():
        lines.append(f"  gate: {op}, {form}: {verdict} ({n} kinds of input)")
    lines += [f"  {advice}" for advice in status.advice]
    return lines
