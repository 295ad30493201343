"""Renders offload plans as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from wan_patches import tables

if TYPE_CHECKING:
    from wan_patches.offload.plan import OffloadPlan

__all__ = ["size", "text"]


def size(count: int) -> str:
    """Formats a number of bytes in the largest unit in which it is at least one."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count} bytes"


def text(plan: OffloadPlan) -> str:
    """Returns a plan as plain text: the chosen level, tables of components and levels, notes."""
    parts = Table(box=box.SIMPLE)
    for column in ("component", "class", "how", "stream", "weights", "on the device", "why"):
        parts.add_column(column, overflow="fold", justify="right" if column in ("weights", "on the device") else "left")
    for p in plan.placements:
        stream = "yes" if p.stream else "no"
        parts.add_row(p.name, p.kind, p.how, stream, size(p.weights), size(p.peak), p.why)
    levels = Table(box=box.SIMPLE)
    for column in ("level", "peak of weights", ""):
        levels.add_column(column, overflow="fold", justify="right" if column == "peak of weights" else "left")
    for e in plan.estimates:
        fits = "" if plan.budget is None else "fits" if e.peak <= plan.budget - plan.reserve else "too large"
        mark = f"{e.obstacle or fits}{', chosen' if e.level == plan.level and fits else ''}"
        levels.add_row(e.level, size(e.peak), mark or ("chosen" if e.level == plan.level else ""))
    room = "unknown" if plan.budget is None else f"{size(plan.budget)}, of which {size(plan.reserve)} are reserved"
    lines = [
        f"{plan.pipeline} on {plan.device}: level {plan.level!r} ({plan.reason})",
        parts,
        levels,
        f"  memory on the device: {room}; activations are not estimated",
        f"  streams: {plan.streams}",
    ]
    if plan.pinned:
        lines.append(f"  pinned host memory: {size(plan.pinned)} (low_cpu_mem_usage=True needs less but is slower)")
    return tables.text(*lines)
