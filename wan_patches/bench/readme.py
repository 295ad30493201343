"""Fills the tables of the results pages and draws the front page's picture, from the JSON files in `examples/results/`.

    python -m wan_patches.bench.readme [FOLDER]

FOLDER is `examples/results` by default. In its pages, each table is written between `<!-- NAME -->` and
`<!-- /NAME -->`, where NAME is one of `PAGES[page]`. The picture is written to its `stock-and-patched.svg`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from wan_patches.bench import compatibility, predict, reach, variants
from wan_patches.bench.ops import SLOWER

PICTURE = "stock-and-patched.svg"


def main(results: Path = Path("examples/results")) -> None:
    """Writes the tables and the picture of a results folder into that folder."""
    for page in PAGES:
        update(results / page, results)
    (results / PICTURE).write_text(picture(results))


def update(page: Path, results: Path) -> None:
    """Writes every table between its markers in `page`, one of `PAGES`.

    Raises:
        ValueError: the markers of a table are missing.
    """
    text = page.read_text()
    for name, make in PAGES[page.name].items():
        before, _, after = parts(text, name)
        text = f"{before}\n{make(results)}\n{after}"
    page.write_text(text)


def parts(text: str, name: str) -> tuple[str, str, str]:
    """Splits `text` into the part before a table, the table, and the part after it; the outer parts keep the markers.

    Raises:
        ValueError: a marker is missing.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, mark, rest = text.partition(start)
    table, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"the page needs the lines {start} and {end}: a table goes between them")
    return before + start, table.strip(), end + after


def _predicted(results: Path) -> str:
    """Returns the tables of predicted times, in seconds for a whole run and in milliseconds for its operations."""
    rows = predict.read_json(results / predict.FILE)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    cards = [card.name for card in predict.CARDS]
    whole = [[subject, *predict.totals(rows, subject)] for subject in subjects]
    parts = [[subject, *cells] for subject in subjects for cells in predict.operations(rows, subject)]
    header = ("one run", "TFLOP", "calls: stock, patched", "GB", *(f"{card}, s" for card in cards))
    header_of_parts = ("patched", "operation", "calls", "GB", "TFLOP", *(f"{card}, ms" for card in cards))
    return f"{_table(header, whole)}\n\n{_table(header_of_parts, parts)}"


def _ops(results: Path) -> str:
    """Returns the table of operations of denoisers and their surroundings: bf16, and the ratio in fp32."""
    fp32 = {(row["op"], row["shape"]): row for row in _rows(results / "cpu-ops-fp32.json")}
    header = ("operation", "shape", "bf16: stock, patched", "ratio", "fp32: ratio")
    lines = []
    for row in _rows(results / "cpu-ops-bf16.json"):
        other = fp32.get((row["op"], row["shape"]))
        lines.append(
            [
                *(row["op"], row["shape"], f"{_pair(row, 'ms')} ms", f"**{row['ratio']:.2f}x**"),
                *("-" if other is None else f"{other['ratio']:.2f}x", f"{_pair(row, 'extra_mib')} MiB"),
                _yes(row["exact"] and (other is None or other["exact"])),
            ]
        )
    return _table((*header, "extra memory bf16: stock, patched", "exact"), lines)


def _vae(results: Path) -> str:
    """Returns the table of the video autoencoder."""
    header = ("operation", "shape", "dtype", "stock, patched", "ratio", "memory: stock, patched", "exact")
    return _table(
        header,
        [
            [
                *(row["op"], row["shape"], row["dtype"], f"{_pair(row, 'ms')} ms", f"**{row['ratio']:.2f}x**"),
                f"{_pair(row, 'extra_mib')} MiB ({row['patched_extra_mib'] / row['stock_extra_mib']:.2f})",
                _yes(row["exact"]),
            ]
            for row in _rows(results / "cpu-vae-bf16.json")
        ],
    )


def _tiles(results: Path) -> str:
    """Returns the table of the video autoencoder with tiles shared by processes."""
    lines = []
    for row in json.loads((results / "cpu-vae-bf16.json").read_text())["shared"]:
        case = row["case"]
        shape = f"{case['frames']}x{case['height']}x{case['width']}"
        times = [f"{row[name]:.2f} s" for name in ("alone_s", "shared_s")]
        ratio = f"**{row['ratio']:.2f}x**"
        lines.append([case["operation"], shape, case["dtype"], str(row["ranks"]), *times, ratio, _yes(row["equal"])])
    return _table(("operation", "shape", "dtype", "processes", "one alone", "together", "ratio", "exact"), lines)


def _sharding(results: Path) -> str:
    """Returns the table of each rank's memory in layout `sharded`."""
    header = ("weights are", "ranks", "weights", "peak at load", "held", "peak in forward", "exact")
    return _table(
        header,
        [
            [
                *(row["way"], str(row["ranks"]), f"{row['weights_mib']:,.0f} MiB"),
                f"{row['load_mib']:,.0f} MiB ({row['load_ratio']:.2f}x)",
                f"{row['held_mib']:,.0f} MiB",
                f"{row['forward_mib']:,.0f} MiB ({row['forward_ratio']:.2f}x)",
                _yes(row["exact"]),
            ]
            for row in _rows(results / "cpu-sharding.json")
        ],
    )


def _transport(results: Path) -> str:
    """Returns the table of transfers from one process to another, in milliseconds."""
    cases: dict[str, dict[str, Any]] = {}
    for row in _rows(results / "cpu-transport.json"):
        cases.setdefault(row["case"], {})[row["transport"]] = row
    lines = []
    for case, row in cases.items():
        ours = row["channel"]
        slower = [f"{_number(row[name]['ms'])} ({row[name]['ms'] / ours['ms']:.1f}x)" for name in _OTHERS]
        times = [_number(ours["memcpy_ms"]), f"**{_number(ours['ms'])}**", f"{ours['times_memcpy']:.2f}"]
        lines.append([case, *times, _number(row["submit"]["ms"]), *slower])
    header = ("result", "memcpy", "channel", "x memcpy", "`submit`", *_OTHERS.values())
    return _table(header, lines)


@dataclass(frozen=True)
class Goal:
    """A goal set in advance, and a function to read the number from a result.

    limit: the maximum of the number, or with `at_least` the minimum.
    """

    what: str
    bench: str
    shape: str
    on_cpu: bool
    of: str  # the reference of the share
    limit: float
    read: Callable[[variants.Result], float | None]
    at_least: bool = False

    def fits(self, result: variants.Result, on_cpu: bool) -> bool:
        """Whether the goal is one for this result; all goals are set for bf16."""
        wanted = (self.bench, self.shape, self.on_cpu, "bf16")
        return (result.bench, result.shape, on_cpu, result.dtype) == wanted

    def is_met(self, number: float) -> bool:
        return number >= self.limit if self.at_least else number <= self.limit

    def shown(self, number: float) -> str:
        return f"{number:.0%}" if self.at_least else f"{number:.3f}"


def _goals_of_forward(what: str, shape: str, of_floor: float, of_stock: float | None) -> Iterator[Goal]:
    def goal(of: str, limit: float, read: Callable[[variants.Result], float | None]) -> Goal:
        return Goal(what, "model", shape, False, of, limit, read)

    yield goal("the floor", of_floor, lambda found: found.of_floor(variants.PATCHED))
    if of_stock is not None:
        yield goal("stock", of_stock, lambda found: found.of(variants.PATCHED))
    yield goal("stock, compiled", 1.0, lambda found: found.of(variants.PATCHED, variants.COMPILED_STOCK))
    yield goal("stock's peak of memory", 1.0, lambda found: found.memory_of(variants.PATCHED))


def _rope_share(found: variants.Result) -> float | None:
    return None if found.rope is None else found.rope.patched_share


GOALS = (
    Goal("rotary embedding of q and k, 14B 480p", "block", "14b-480p", False, "a copy's bandwidth", 0.85, _rope_share,
          at_least=True),
    *_goals_of_forward("forward, Wan 14B 480p", "14b-480p", 1.04, 0.82),
    *_goals_of_forward("forward, Helios", "helios", 1.06, None),
    Goal("block, Helios, on a CPU", "block", "helios", True, "stock", 0.70, lambda found: found.of(variants.PATCHED)),
    Goal(
        "block, Wan 1.3B, on a CPU", "block", "1.3b-480p", True, "stock", 0.86, lambda found: found.of(variants.PATCHED)
    ),
)  # fmt: skip
_NOT_YET = "not measured yet"


def _performance(results: Path) -> str:
    """Returns the table of goals and results in bf16, and the table of all measurements, in milliseconds."""
    found = list(_results(results))
    lines = []
    for goal in GOALS:
        sign = "at least" if goal.at_least else "at most"
        start = [goal.what, f"{sign} {goal.shown(goal.limit)} of {goal.of}"]
        reached = 0
        for facts, result in found:
            number = goal.read(result) if goal.fits(result, facts["device"] == "cpu") else None
            if number is not None:
                reached += 1
                met = f"**{goal.shown(number)}**" if goal.is_met(number) else f"{goal.shown(number)}, missed"
                lines.append([*start, _busy(result) + met, variants.device_name(facts)])
        if not reached:
            lines.append([*start, _NOT_YET, "-"])
    lines.append(_slowest(found, results))
    goals = _table(("what", "goal", "reached", "on"), lines)
    if not found:
        return goals
    header = ("ms of a call", "on", *variants.WAYS, "floor", "memory: stock, patched", "exact")
    return f"{goals}\n\n{_table(header, [_everything(*one) for one in found])}"


def _results(folder: Path) -> Iterator[tuple[dict[str, Any], variants.Result]]:
    """Yields the facts about the machine and the result of each file of `bench block`, `model` and `pipeline`.

    Folders in `folder` are those of `bench gpu`.
    """
    for bench in ("block", "model", "pipeline"):
        for path in sorted([*folder.glob(f"*-{bench}-*.json"), *folder.glob(f"*/{bench}-*.json")]):
            content = json.loads(path.read_text())
            yield content["machine"], variants.from_json(content)


def _slowest(found: Sequence[tuple[dict[str, Any], variants.Result]], folder: Path) -> list[str]:
    """Returns the row of the lowest speed relative to a rival, over all results, single operations included."""
    start = ["anything patched", f"at least {SLOWER} times as fast as stock"]
    speeds = [
        (speed, f"{variants.describe(result)}, {way}, {variants.device_name(facts)}")
        for facts, result in found
        for way, rival in variants.RIVALS.items()
        if (speed := result.of(rival, way)) is not None
    ]
    names = ("*-ops-*.json", "*-vae-*.json", "*/ops.json", "*/vae-*.json")
    for path in sorted(path for name in names for path in folder.glob(name)):
        content = json.loads(path.read_text())
        device = variants.device_name(content["machine"])
        speeds += [(row["ratio"], f"{row['op']} {row['shape']}, {row['dtype']}, {device}") for row in content["rows"]]
    if not speeds:
        return [*start, _NOT_YET, "-"]
    least, where = min(speeds)
    return [*start, f"**{least:.2f}**" if least >= SLOWER else f"{least:.2f}, missed", where]


def _everything(facts: dict[str, Any], result: variants.Result) -> list[str]:
    times = [
        "-" if row.ms is None else f"{_number(row.ms)} ({_busy(result)}{result.of(way):.2f})"
        for way in variants.WAYS
        for row in [result.row(way)]
    ]
    peaks = [result.row(way).peak_mib for way in (variants.STOCK, variants.PATCHED)]
    memory = "-" if None in peaks else f"{', '.join(_number(peak) for peak in peaks if peak is not None)} MiB"
    exact = result.row(variants.PATCHED).exact
    bits = "-" if exact is None else _yes(exact)
    return [variants.describe(result), variants.device_name(facts), *times, _number(result.floor_ms), memory, bits]


def _busy(result: variants.Result) -> str:
    return "~" if result.is_disturbed else ""


def _production(results: Path) -> str:
    *_, newest = compatibility.read_json(results / "compatibility-production").values()
    return compatibility.shares(newest)


def _other_models(results: Path) -> str:
    *_, newest = compatibility.read_json(results / "compatibility-others").values()
    return compatibility.others(newest)


def _pipelines(results: Path) -> str:
    """Returns the table of all pipelines by denoiser, with the pipelines that have at most tiles below it."""
    pipelines = reach.read_json(results / "pipelines.json")
    families = compatibility.read_json(results / "compatibility")
    newest = [rows for name, rows in families.items() if "," not in name][-1]
    *_, others = compatibility.read_json(results / "compatibility-others").values()
    lines, few = reach.by_denoiser(pipelines, [*newest, *others])
    header = ("denoiser", "pipelines", "patches", "small runs", "calls by forms", "same bits")
    tiled, rest = ([one.name for one in few if bool(one.patches) is has] for has in (True, False))
    names = ", ".join(name.removesuffix("Pipeline") for name in rest)
    return (
        f"{_table(header, lines)}\n\n"
        f"These are {len(pipelines) - len(few)} of {len(pipelines)} pipelines. In {len(tiled)} others only the tiles "
        f"of the autoencoder are cross-faded faster. No patch concerns the last {len(rest)}: {names}."
    )


_OTHERS = {"named segments": "named segments", "torch.mp": "torch.multiprocessing", "pickle": "pickle"}

TABLES: dict[str, Callable[[Path], str]] = {
    "performance": _performance,
    "predicted": _predicted,
    "ops": _ops,
    "vae": _vae,
    "tiles": _tiles,
    "sharding": _sharding,
    "transport": _transport,
    "compatibility": lambda results: compatibility.markdown(compatibility.read_json(results / "compatibility")),
    "production": _production,
    "others": _other_models,
}

#: The pages of the folder, and the tables of each.
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {"README.md": TABLES, "pipelines.md": {"pipelines": _pipelines}}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _pair(row: dict[str, Any], unit: str) -> str:
    return f"{_number(row[f'stock_{unit}'])}, {_number(row[f'patched_{unit}'])}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 2 else f"{value:.3f}"


def _yes(same: bool) -> str:
    return "yes" if same else "**no**"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


@dataclass(frozen=True)
class _Bar:
    """One line of the picture: times in seconds and peak memory in MiB, each stock and patched."""

    what: str
    shape: str
    seconds: tuple[float, float]
    mib: tuple[float, float]


#: Lines of the picture in the order of a pipeline: the file, its row (None: the file is one block) and the label.
_PICTURED = (
    ("cpu-ops-bf16", ("video preprocess", "81 of 1280x720 to 832x480"), "Video preprocessing"),
    ("cpu-vae-bf16", ("encode", "5x352x640"), "Encode, Wan 2.1 autoencoder"),
    ("cpu-block-1.3b-480p-bf16", None, "Transformer block, Wan 2.1 1.3B"),
    ("cpu-block-ti2v-5b-bf16", None, "Transformer block, Wan 2.2 TI2V 5B"),
    ("cpu-block-helios-bf16", None, "Transformer block, Helios"),
    ("cpu-vae-bf16", ("decode, Wan 2.2", "5x128x224"), "Decode, Wan 2.2 autoencoder"),
    ("cpu-vae-bf16", ("decode", "5x352x640"), "Decode, Wan 2.1 autoencoder"),
    ("cpu-ops-bf16", ("frames to pil", "81x480x832"), "Frames to PIL images"),
)


def _bars(results: Path) -> Iterator[_Bar]:
    for name, wanted, words in _PICTURED:
        content = json.loads((results / f"{name}.json").read_text())
        if wanted is None:
            rows = {row["way"]: row for row in content["rows"]}
            pair = [rows[way] for way in (variants.STOCK, variants.PATCHED)]
            times, peaks = [row["ms"] for row in pair], [row["peak_mib"] for row in pair]
            shape = f"{content['tokens']:,} tokens"
        else:
            row = next(row for row in content["rows"] if (row["op"], row["shape"]) == wanted)
            times, peaks = [row["stock_ms"], row["patched_ms"]], [row["stock_extra_mib"], row["patched_extra_mib"]]
            shape = row["shape"]
        yield _Bar(words, shape, (times[0] / 1e3, times[1] / 1e3), (peaks[0], peaks[1]))


def picture(results: Path) -> str:
    """Draws an SVG on white: time and memory of parts of a pipeline, patched as a share of stock."""
    bars = list(_bars(results))
    machine = json.loads((results / "cpu-vae-bf16.json").read_text())["machine"]
    where = f"{variants.device_name(machine)}, bf16, diffusers {machine['diffusers']}"
    height = _TOP + _STEP * len(bars) + 12
    head = f"Time and memory on a CPU ({where}). Grey: stock, blue: patched."
    lines = [_text(16, 28, head, size=14)]
    lines += [_text(x, 56, words, size=12, fill=_FAINT) for x, words in ((_TIME, "time"), (_MEMORY, "peak memory"))]
    for number, bar in enumerate(bars):
        y = _TOP + _STEP * number
        lines.append(_text(16, y + 9, bar.what))
        lines.append(_text(16, y + 24, bar.shape, size=11, fill=_FAINT))
        lines += _share(_TIME, y, 190, bar.seconds, [f"{value:.2f}" for value in bar.seconds], "s")
        lines += _share(_MEMORY, y, 110, bar.mib, [f"{value:,.0f}" for value in bar.mib], "MiB")
    content = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="Helvetica, Arial, sans-serif">\n<title>{escape(head)}</title>\n'
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>\n{content}\n</svg>\n'
    )


_WIDTH, _TOP, _STEP, _TIME, _MEMORY = 780, 74, 40, 260, 580  # pixels: the picture, its first line, columns
_INK, _FAINT, _STOCK, _PATCHED = "#1f2328", "#57606a", "#d0d7de", "#0969da"


def _share(x: int, y: int, width: int, pair: tuple[float, float], numbers: Sequence[str], unit: str) -> Iterator[str]:
    """Draws a patched bar over a stock bar of length `width`, with the ratio and both numbers."""
    ratio = pair[1] / pair[0]
    for length, fill in ((width, _STOCK), (min(ratio, 1.15) * width, _PATCHED)):
        yield f'<rect x="{x}" y="{y}" width="{length:.0f}" height="12" fill="{fill}"/>'
    yield _text(x + width + 10, y + 11, f"{ratio:.2f}", weight="bold")
    yield _text(x, y + 26, f"{numbers[0]} \u2192 {numbers[1]} {unit}", size=11, fill=_FAINT)


def _text(x: int, y: int, words: str, *, size: int = 13, fill: str = _INK, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(words)}</text>'


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
