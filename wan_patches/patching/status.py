"""The state of the patches: a report for each, and all of them as a table."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from wan_patches.patching.fidelity import Fidelity, Verdict
from wan_patches.patching.tally import Way

ACTIVE, WAITING, SKIPPED, OFF = "active", "waiting for import", "skipped", "off"


def counted(number: int, thing: str) -> str:
    """Returns a number with its noun, in the plural unless the number is one."""
    return f"{number} {thing}" + "s" * (number != 1)


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
    """The patches and their states; prints as a table of one line per patch.

    advice: notes on this machine.
    verbose: print every function that has a patch, and what serves its calls on each device.
    """

    reports: tuple[Report, ...]
    verdicts: tuple[Verdict, ...] = ()
    advice: tuple[str, ...] = ()
    verbose: bool = False

    def of(self, name: str) -> tuple[Report, ...]:
        """Returns the reports of the patches named `name`."""
        return tuple(report for report in self.reports if report.name == name)

    def skipped(self) -> tuple[Report, ...]:
        """Returns the reports of selected patches that could not be installed."""
        return tuple(report for report in self.reports if report.state == SKIPPED)

    def to_json(self) -> str:
        """Returns all of it as JSON."""
        reports = [
            {
                **{name: getattr(report, name) for name in ("name", "module", "targets", "state", "reason", "note")},
                "fidelity": report.fidelity.value,
                "calls": [{**way._asdict(), "calls": calls} for way, calls in report.ways.items()],
            }
            for report in self.reports
        ]
        verdicts = [
            {
                **{name: getattr(verdict, name) for name in ("op", "form", "exact", "reason")},
                "fidelity": verdict.fidelity.value,
                "input": repr(verdict.key),
            }
            for verdict in self.verdicts
        ]
        return json.dumps({"patches": reports, "gate": verdicts, "advice": self.advice}, indent=2)

    def __str__(self) -> str:
        from wan_patches.tables import terminal_width, text

        if self.verbose:
            return text(*details(self))
        width = terminal_width(80)
        return text(*summary(self, width), width=width)

    def _repr_html_(self) -> str:
        from wan_patches.tables import html

        return html(*(details(self) if self.verbose else summary(self, 100)), width=140 if self.verbose else 100)


_LINES = 40  # that the summary has at most
_FEW = 3  # modules that a line of it names


def summary(status: Status, width: int) -> list[object]:
    """Returns the status as at most 40 lines of `width` columns: a line per patch, then reasons, each once."""
    from rich import box
    from rich.table import Table

    from wan_patches.tables import text

    groups: dict[str, list[Report]] = {}
    for report in status.reports:
        if report.state != OFF:
            close = " (close)" if report.fidelity is Fidelity.CLOSE else ""
            groups.setdefault(report.name + close, []).append(report)
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rows.add_column("patch", no_wrap=True)
    rows.add_column("active in", justify="right", no_wrap=True)
    rows.add_column("fast calls", justify="right", no_wrap=True)
    rows.add_column("called in")
    for name, reports in sorted(groups.items()):
        loaded = [report for report in reports if report.state != WAITING]
        active = f"{sum(report.state == ACTIVE for report in loaded)} of {counted(len(loaded), 'module')}"
        fast, calls = (sum(getattr(report, kind) for report in reports) for kind in ("fast", "calls"))
        called = list(dict.fromkeys(_short(report.module) for report in reports if report.calls))
        called[_FEW:] = [f"{len(called) - _FEW} more"] if len(called) > _FEW else []
        rows.add_row(
            name, active if loaded else "not imported", f"{fast} of {calls}" if calls else "", ", ".join(called)
        )
    head = rows if groups else "No patch is enabled."
    on = {report.name for reports in groups.values() for report in reports}
    off = dict.fromkeys(report.name for report in status.reports if report.name not in on)
    ends = [f"Off: {', '.join(off)}"] if off else []
    ends.append("Each function: wan_patches.status(verbose=True), or `wan-patches status --all`.")
    lines = _remarks(status, width)
    room = _LINES - len(text(head, *ends, width=width).splitlines())
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {counted(len(lines) - room + 1, 'line')} more"]
    return [head, *lines, *ends]


def _remarks(status: Status, width: int) -> list[str]:
    """The lines below the summary: what could not be installed, what stock served, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for report in status.skipped():
        reasons.setdefault(f"left stock: {report.reason}", {})[f"{report.name} in {_short(report.module)}"] = None
    for verdict in status.verdicts:
        if not verdict.exact:
            reasons.setdefault(f"not used, {verdict.reason}", {})[f"{verdict.op}, {verdict.form}"] = None
    slow: dict[str, Counter[str]] = {}
    for report in status.reports:
        for way, calls in report.ways.items():
            if report.state != OFF and not way.is_fast:
                slow.setdefault(way.reason, Counter())[report.name] += calls
    for reason, counts in sorted(slow.items(), key=lambda item: -item[1].total()):
        reasons.setdefault(reason, {}).update({f"{name} {calls}": None for name, calls in counts.items()})
    for report in status.reports:
        if report.state == ACTIVE and report.note and not report.ways:
            reasons.setdefault(report.note, {})[f"{report.name} in {_short(report.module)}"] = None
    lines = [f"{', '.join(where)}: {reason}" for reason, where in reasons.items()]
    return [part for line in [*lines, *status.advice] for part in textwrap.wrap(line, width, subsequent_indent="  ")]


def _short(module: str) -> str:
    """The part of a module's name that tells families apart."""
    name = module.rpartition(".")[2]
    for prefix in ("transformer_", "pipeline_", "autoencoder_kl_", "scheduling_"):
        name = name.removeprefix(prefix)
    return name


def _is_there(module: str) -> bool:
    """Whether the library of a module is installed."""
    library = module.partition(".")[0]
    return library in sys.modules or importlib.util.find_spec(library) is not None


def details(status: Status) -> list[object]:
    """Returns a row per patched function, what serves its calls on each device, and the first-sight gate's verdicts."""
    from rich import box
    from rich.table import Table

    rows = Table(box=box.SIMPLE)
    for column in ("patch", "module", "target", "state"):
        rows.add_column(column, overflow="fold", no_wrap=column == "module")
    reports = [report for report in status.reports if report.state != WAITING or _is_there(report.module)]
    for report in reports:
        more = report.reason or report.note
        state = f"{report.state}: {more}" if more else report.state
        targets = ", ".join(target.removesuffix(".__call__") for target in report.targets)
        rows.add_row(report.name, report.module.rpartition("diffusers.")[2], targets, state)
    count = Counter(report.state for report in reports)
    lines: list[object] = [rows, "  " + ", ".join(f"{n} {state}" for state, n in count.items())]
    running: dict[tuple[str, str], dict[str, None]] = {}
    for report in reports:
        if report.state != OFF:
            runs = running.setdefault((report.name, report.fidelity.value), {})
            runs |= {f"{what} on {device}": None for device, what in report.implementations.items()}
    lines += [f"  {name} ({fidelity}): {'; '.join(runs)}" for (name, fidelity), runs in running.items()]
    judged = Counter((v.op, v.form, v.fidelity.value if v.exact else f"not used, {v.reason}") for v in status.verdicts)
    for (op, form, verdict), n in judged.items():
        lines.append(f"  gate: {op}, {form}: {verdict} ({n} kinds of input)")
    lines += [f"  {advice}" for advice in status.advice]
    return lines
