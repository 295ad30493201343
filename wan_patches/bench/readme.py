"""The README's tables of figures, made of the files in `examples/results/`:

    python -m wan_patches.bench.readme README.md examples/results

A table goes between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is one of `TABLES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wan_patches.bench import compatibility


def update(readme: Path, results: Path) -> None:
    """Puts every table between its marks in `readme`.

    Raises:
        ValueError: the marks of a table are missing.
    """
    text = readme.read_text()
    for name, make in TABLES.items():
        before, _, after = parts(text, name)
        text = f"{before}\n{make(results)}\n{after}"
    readme.write_text(text)


def parts(text: str, name: str) -> tuple[str, str, str]:
    """What is before a table (its mark included), the table, and what is after it."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, mark, rest = text.partition(start)
    table, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"the README needs the lines {start} and {end}: a table goes between them")
    return before + start, table.strip(), end + after


def _ops(results: Path) -> str:
    """Operations of the denoisers and around them: bf16, and the ratio in fp32."""
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
    """The video autoencoder."""
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
    """Tiles of the video autoencoder shared by processes."""
    lines = []
    for row in json.loads((results / "cpu-vae-bf16.json").read_text())["shared"]:
        case = row["case"]
        shape = f"{case['frames']}x{case['height']}x{case['width']}"
        times = [f"{row[name]:.2f} s" for name in ("alone_s", "shared_s")]
        ratio = f"**{row['ratio']:.2f}x**"
        lines.append([case["operation"], shape, case["dtype"], str(row["ranks"]), *times, ratio, _yes(row["equal"])])
    return _table(("operation", "shape", "dtype", "processes", "one alone", "together", "ratio", "exact"), lines)


def _sharding(results: Path) -> str:
    """Memory of each rank in layout `sharded`."""
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
    """Results from one process to another, in milliseconds."""
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


_OTHERS = {"named segments": "named segments", "torch.mp": "torch.multiprocessing", "pickle": "pickle"}

TABLES: dict[str, Callable[[Path], str]] = {
    "ops": _ops,
    "vae": _vae,
    "tiles": _tiles,
    "sharding": _sharding,
    "transport": _transport,
    "compatibility": lambda results: compatibility.markdown(compatibility.read_json(results / "compatibility")),
}


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


if __name__ == "__main__":
    update(*map(Path, sys.argv[1:]))
