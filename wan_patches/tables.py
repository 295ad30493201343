"""Tables for people: what `status()` and the benches print."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from wan_patches.patching.registry import Status

# "pre" wraps in some notebooks, which would tear tables apart
_FRAGMENT = """
<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace"
>{code}</pre>"""


def text(*renderables: object, width: int = 140) -> str:
    """What `rich` would print, as plain text. Strings are taken literally, without markup."""
    console = _console(width)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def html(*renderables: object, width: int = 140) -> str:
    """What `rich` would print, as a fragment of HTML: for notebooks (`_repr_html_`) and reports.

    One `<pre>` with its styles inline; no scripts, no style sheet. Strings are taken literally, without markup, and
    escaped; for colours use `rich.text.Text` and styles of tables.

    Args:
        renderables: strings, tables and whatever else `rich` prints.
        width: columns of text.
    """
    console = _console(width, record=True)
    for renderable in renderables:
        console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_FRAGMENT).strip()


def _console(width: int, record: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_jupyter=False,  # else rich would display the text in a notebook, not write it
        record=record,
        markup=False,  # brackets and colons in reasons and prompts mean nothing
        emoji=False,
        highlight=False,
    )


def _is_there(module: str) -> bool:
    """Whether the library of a module is installed."""
    library = module.partition(".")[0]
    return library in sys.modules or importlib.util.find_spec(library) is not None


def status_table(status: Status) -> list[object]:
    """The status as a table; below it what each patch runs, and what the first-sight gate has found."""
    table = Table(box=box.SIMPLE)
    for column in ("patch", "module", "target", "state"):
        table.add_column(column, overflow="fold", no_wrap=column == "module")
    reports = [report for report in status.reports if report.state != "waiting for import" or _is_there(report.module)]
    for report in reports:
        more = report.reason or report.note
        state = f"{report.state}: {more}" if more else report.state
        targets = ", ".join(target.removesuffix(".__call__") for target in report.targets)
        table.add_row(report.name, report.module.rpartition("diffusers.")[2], targets, state)
    count = Counter(report.state for report in reports)
    lines: list[object] = [table, "  " + ", ".join(f"{n} {state}" for state, n in count.items())]
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
