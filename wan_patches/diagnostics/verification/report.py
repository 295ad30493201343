"""Renders a verification: tables for terminal and notebook, and a self-contained HTML page."""

from __future__ import annotations

import base64
import importlib.resources
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from wan_patches.diagnostics.verification import Compared, Stage, Verification, Video
    from wan_patches.diagnostics.verification.bits import Difference

__all__ = ["page", "renderables"]

_WIDTH = 320  # maximum width of a frame in the page, in pixels
_SHOWN = 12  # maximum number of rows of the table of blocks
_MIB = 1 << 20


# Tables


def renderables(found: Verification) -> list[object]:
    """Returns the verification as objects that `rich` prints."""
    colour = {"same": "green", "different": "red", "unknown": "yellow"}[found.verdict]
    shown: list[object] = [Text(_verdict(found), style=f"bold {colour}")]
    shown += [Text(f"  {culprit}", style="red") for culprit in found.culprits]
    if found.first_divergence is not None and not found.culprits and not found.undecided:
        shown.append(Text(f"  The first difference: {found.first_divergence}", style="red"))
    shown += [_stage_table(found), _table("patched function", found.ops, "patch")]
    if found.blocks:
        differing = _differing(found.blocks)
        shown.append(_table("block", differing[:_SHOWN]) if differing else _summary(found.blocks))
    if found.video is not None:
        shown.append(f"  Video: {_video_words(found.video)}")
    return shown + [f"  {note}" for note in found.notes]


def _verdict(found: Verification) -> str:
    what = f"{found.pipeline} on {found.device}, patches: {', '.join(found.patches) or 'none'}"
    if found.undecided:
        return f"NOT verified: {found.undecided} ({what})"
    if found.error:
        return f"FAILED with patches: {found.error} ({what})"
    if found.exact:
        return f"Every bit is the same, {found.exercise} ({what})"
    return f"NOT the same bits ({what})"


def _stage_table(found: Verification) -> Table:
    table = _empty("stage")
    columns = ("stock s", "patched s", "ratio", "stock MiB", "patched MiB") if found.repeat else ()
    for column in (*columns, "max abs", "max ulp"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits")
    for stage in found.stages:
        apart = stage.difference
        numbers = (_scientific(apart.max_abs), _whole(apart.max_ulp)) if apart is not None else ("", "")
        table.add_row(stage.name, *(_costs(stage) if found.repeat else ()), *numbers, _bits(apart))
    return table


def _table(title: str, rows: Sequence[Compared], patches: str | None = None) -> Table:
    rows = [row for row in rows if row.stock_calls or row.patched_calls]
    table = _empty(title, max((len(_short(row.name)) for row in rows), default=0))
    if patches:
        table.add_column(patches)
    for column in ("calls", "differ"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits")
    for row in rows:
        owners = (", ".join(row.patches),) if patches else ()
        before, after = row.stock_calls, row.patched_calls
        calls = str(before) if before == after else f"{before} stock, {after} patched"
        table.add_row(_short(row.name), *owners, calls, "" if row.reason else str(row.differing), _state(row))
    return table


def _short(name: str) -> str:
    """Shortens a function's name to its module and qualified name, so that the table stays narrow."""
    return re.sub(r"^(?:\w+\.)*?(\w+\.(?:[A-Z]|\w+$))", r"\1", name)


def _empty(title: str, width: int = 0) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(title, overflow="fold", min_width=min(width, 55))
    return table


def _differing(rows: Sequence[Compared]) -> list[Compared]:
    return [row for row in rows if row.state != "same"]


def _summary(blocks: Sequence[Compared]) -> str:
    return f"  Blocks: all {sum(block.stock_calls for block in blocks)} calls of {len(blocks)} blocks the same."


def _costs(stage: Stage) -> tuple[str, ...]:
    before, after = stage.stock_seconds, stage.patched_seconds
    ratio = f"{before / after:.2f}x" if before and after else ""
    return _seconds(before), _seconds(after), ratio, _mebibytes(stage.stock_peak), _mebibytes(stage.patched_peak)


def _state(row: Compared) -> Text:
    if row.reason:
        return Text(f"not compared: {row.reason}", style="yellow")
    return Text("differ", style="red") if row.differing else Text("same", style="green")


def _bits(apart: Difference | None) -> Text:
    if apart is None:
        return Text("")
    if apart.exact:
        return Text("same", style="green")
    return Text(f"differ: {apart.reason}" if apart.reason else "differ", style="red")


def _video_words(video: Video) -> str:
    frames, height, width, _ = video.shape
    words = f"{frames} frames of {width}x{height}, PSNR {_span(video.psnr, _decibels)}"
    return words + (f", SSIM {_span(video.ssim, _similarity)}" if video.ssim is not None else "")


def _span(values: Sequence[float], words: Callable[[float], str]) -> str:
    low, high = words(min(values)), words(max(values))
    return f"{low} in all frames" if low == high else f"from {low} to {high}, median {words(statistics.median(values))}"


def _decibels(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2f} dB"


def _similarity(value: float) -> str:
    return f"{value:.9g}" if value == 1 or value < 1 - 1e-9 else "just below 1"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _whole(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / _MIB:,.1f}"


# The page


def page(found: Verification) -> str:
    """Returns the verification as HTML with embedded styles and pictures and without scripts."""
    here = importlib.resources.files("wan_patches.diagnostics.verification")
    template = here.joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        decibels=_decibels,
        similarity=_similarity,
        short=_short,
        scientific=_scientific,
        whole=_whole,
        seconds=_seconds,
        mebibytes=_mebibytes,
        bits=lambda apart: _bits(apart).plain,
        state=lambda row: _state(row).plain,
    )
    return environment.from_string(template).render(
        found=found,
        verdict=_verdict(found),
        charts=_charts(found),
        rows=_strip_rows(found),
        video_words=_video_words(found.video) if found.video is not None else "",
        ops=[op for op in found.ops if op.stock_calls or op.patched_calls],
        blocks=_differing(found.blocks),
        blocks_summary=_summary(found.blocks),
        json=found.to_json(),
    )


def _strip_rows(found: Verification) -> list[tuple[str, list[str]]]:
    """Returns titles and pictures: stock, patched, and their difference."""
    strips, video = found.strips, found.video
    if strips is None or video is None:
        return []
    amplified = "no difference"
    if strips.largest:
        amplified = f"difference, amplified: white is the largest difference, {strips.largest:.3g} of {video.peak:.0f}"
    return [
        ("stock", [_png(frame) for frame in strips.stock]),
        ("patched", [_png(frame) for frame in strips.patched]),
        (amplified, [_png(_brightest(frame)) for frame in strips.amplified]),
    ]


def _png(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_WIDTH, _WIDTH))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return _data("image/png", file.getvalue())


def _brightest(pixels: np.ndarray) -> np.ndarray:
    """Shrinks to the brightest pixel of each tile; averaging would dim a difference in a single pixel."""
    block = -(-max(pixels.shape[:2]) // _WIDTH)
    rows, columns = (np.arange(0, size, block) for size in pixels.shape[:2])
    return np.maximum.reduceat(np.maximum.reduceat(pixels, rows, axis=0), columns, axis=1)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _charts(found: Verification) -> list[tuple[str, str]]:
    """Returns titles and pictures; empty without matplotlib or without measurements."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    charts = []
    timed = [stage for stage in found.stages if stage.stock_seconds is not None]
    if timed:
        values = [(stage.name, stage.stock_seconds, stage.patched_seconds) for stage in timed]
        charts.append(("Time by stage", _bars(Figure, values, "seconds")))
    held = [(s.name, s.stock_peak / _MIB, (s.patched_peak or 0) / _MIB) for s in timed if s.stock_peak is not None]
    if held:
        charts.append(("Peak memory by stage", _bars(Figure, held, "MiB beyond the memory held before the call")))
    if found.video is not None and not all(map(math.isinf, found.video.psnr)):
        charts.append(("PSNR by frame", _line(Figure, found.video.psnr)))
    return charts


def _bars(figure: Any, rows: Sequence[tuple[str, float | None, float | None]], unit: str) -> str:
    chart = figure(figsize=(6.4, 0.8 + 0.5 * len(rows)), layout="constrained")
    axes = chart.subplots()
    places = np.arange(len(rows))
    for offset, column, label, colour in ((-0.19, 1, "stock", "#9aa5b1"), (0.19, 2, "patched", "#2f6fdf")):
        axes.barh(places + offset, [row[column] or 0 for row in rows], 0.36, label=label, color=colour)
    axes.set_yticks(places, [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(chart)


def _line(figure: Any, values: Sequence[float]) -> str:
    chart = figure(figsize=(6.4, 2.4), layout="constrained")
    axes = chart.subplots()
    axes.plot([math.nan if math.isinf(value) else value for value in values], marker="o", color="#c0392b")
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel("frame (frames without a difference are omitted)")
    axes.set_ylabel("dB")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(chart)


def _svg(chart: Any) -> str:
    file = io.BytesIO()
    chart.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _data("image/svg+xml", file.getvalue())
