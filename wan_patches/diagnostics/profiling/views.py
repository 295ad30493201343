"""Renders a profile as tables and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from wan_patches.pipelines.stages import CALL, STAGES

if TYPE_CHECKING:
    from wan_patches.diagnostics.profiling import Profile
    from wan_patches.diagnostics.profiling.transfers import Transfer
    from wan_patches.diagnostics.profiling.watch import OpProfile

NO_MATPLOTLIB = 'matplotlib must be installed for charts: pip install "wan-patches[demo]"'


def tables(found: Profile) -> list[Any]:
    """Returns the tables, and the lines below them, for `rich`."""
    parts: list[Any] = [
        Text(f"Profile of {_ms(found.seconds)} ms. Patches: {', '.join(found.active) or 'none'}.", style="bold")
    ]
    if found.pipelines:
        parts.append(_stage_table(found))
    if found.ops:
        parts.append(_op_table(found))
        for row in found.ops:
            for reason, count in row.reasons.items():
                parts.append(Text(f"  {row.patch}, {row.op}: {count} of {row.calls} fell back to stock: {reason}"))
    if found.transfers:
        parts.append(_transfer_table(found.transfers))
    elif found.transfers is not None:
        parts.append(Text("  no copies between host and device, and no waits"))
    return parts + [Text(f"  {note}") for note in found.notes]


def _table(texts: Sequence[str], numbers: Sequence[str]) -> Any:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in texts:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _stage_table(found: Profile) -> Any:
    table = _table(("pipeline", "stage"), ("ms", "share", "peak MiB"))
    for row in found.pipelines:
        failed = f", {row.failed} failed" if row.failed else ""
        calls = f"{row.calls} {'call' if row.calls == 1 else 'calls'}{failed}, {row.device}"
        first = [row.pipeline, calls]
        for stage, seconds in row.seconds.items():
            most = row.peak_bytes.get(stage)
            peak = "" if most is None else f"{most / 2**20:,.1f}"
            table.add_row(first.pop(0) if first else "", stage, _ms(seconds), _share(seconds, row.total), peak)
        table.add_row(first.pop(0) if first else "", "total", _ms(row.total), "", "", style="bold")
        for left in first:
            table.add_row(left, "", "", "", "")
    return table


def _op_table(found: Profile) -> Any:
    numbers = ("calls", "fast", "stock", "first sight", "ms", "own ms", "first ms", "share")
    table = _table(("patch", "operation"), numbers)
    whole = sum(row.total for row in found.pipelines) or found.seconds
    for row in sorted(found.ops, key=lambda row: (row.patch, -row.own_seconds)):
        counts = (row.calls, row.fast, row.stock, row.first_sight)
        first = _ms(row.first_seconds) if row.first_sight else ""
        times = (_ms(row.seconds), _ms(row.own_seconds), first, _share(row.own_seconds, whole))
        table.add_row(row.patch, row.op, *(f"{count:,}" for count in counts), *times)
    return table


def _transfer_table(transfers: Sequence[Transfer]) -> Any:
    table = _table(("host and device", "inside"), ("times", "MiB", "waits"))
    for row in transfers:
        size = f"{row.bytes / 2**20:,.2f}" if row.bytes else ""
        table.add_row(row.what, row.inside, f"{row.count:,}", size, f"{row.waits:,}")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _share(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.1%}" if whole else ""


def chart(found: Profile) -> Any:
    """Returns a matplotlib figure with the stages of each pipeline and the time of each operation.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not found.pipelines and not found.ops:
        raise ValueError("nothing to draw: no pipeline and no patched operation was called in the block")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(NO_MATPLOTLIB) from None
    ops = sorted(found.ops, key=lambda row: row.own_seconds)
    inches = [0.5 * max(1, len(found.pipelines)) + 1, 0.3 * max(1, len(ops)) + 1]
    figure = Figure(figsize=(10, sum(inches) + 1), layout="constrained", dpi=120)
    above, below = figure.subplots(2, 1, height_ratios=inches)
    pipelines = {f"{row.pipeline}, {row.device} ({row.calls})": row for row in found.pipelines}
    stages = {
        stage: [row.seconds.get(stage, 0.0) for row in pipelines.values()]
        for stage in (*STAGES, CALL)
        if any(stage in row.seconds for row in pipelines.values())
    }
    _bars(above, "Seconds by stage", list(pipelines), stages)
    # an operation's calls were timed together, so their time is divided in proportion to the number of calls
    ways: dict[str, Callable[[OpProfile], int]] = {
        "fast": lambda row: row.fast,
        "stock": lambda row: row.stock,
        "first sight": lambda row: row.first_sight,
    }
    parts = {way: [row.own_seconds * count(row) / row.calls for row in ops] for way, count in ways.items()}
    names = [f"{row.patch}: {row.op}" for row in ops]
    _bars(below, "Seconds in patched operations, by how calls were served", names, parts)
    return figure


def _bars(axes: Any, title: str, names: Sequence[str], parts: dict[str, list[float]]) -> None:
    """Draws stacked horizontal bars."""
    left = [0.0] * len(names)
    for label, seconds in parts.items():
        axes.barh(names, seconds, left=left, label=label)
        left = [start + more for start, more in zip(left, seconds)]
    axes.set_title(title)
    if names:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    else:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
