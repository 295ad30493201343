"""Predicts the time of forwards and decodes on GPUs from counted memory traffic: `wan-patches bench gpu --predict`.

Models of published size run on "meta", stock and patched (`wan_patches.bench.traffic`). A call takes as long as its
bytes or its operations need, whichever is longer. Nothing here is measured on a GPU. Where a folder of `bench gpu` has
measurements, they are shown beside the prediction: an operation that is far off is the one to look at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich import box
from rich.console import Group
from rich.table import Table

import wan_patches
from wan_patches.bench import shapes, variants
from wan_patches.bench.measure import DTYPES, MeasurementError
from wan_patches.bench.traffic import META, Call, on_paper

FILE = "predicted.json"
STOCK, PATCHED = variants.STOCK, variants.PATCHED
OFF = 0.2  # from where on a measurement points at a mistake, in the prediction or in the code

PRODUCTS, ATTENTION, CONVOLUTIONS, OTHER = "matrix products", "attention", "convolutions", "other"


@dataclass(frozen=True)
class Card:
    """A GPU by its published figures: GB per second, and TFLOPS of dense products by the dtype they multiply in."""

    name: str
    gb_s: float
    bf16: float
    tf32: float
    fp32: float


CARDS = (
    Card("H100", 3350, 989, 495, 67),  # SXM
    Card("H200", 4800, 989, 495, 67),
    Card("A100", 2039, 312, 156, 19.5),  # 80 GB, SXM
    Card("4090", 1008, 165, 82.6, 82.6),
)

#: Shares of the published figures that kernels reach: assumed, not measured.
REACHED = {"memory": 0.85, PRODUCTS: 0.60, ATTENTION: 0.45, CONVOLUTIONS: 0.45}


@dataclass(frozen=True)
class Row:
    """The calls of one operation in one run of `subject`.

    way: `STOCK` or `PATCHED`. of: an op of this package, `PRODUCTS`, `ATTENTION`, `CONVOLUTIONS`, or an ATen operator.
    seconds: by name of the card.
    """

    subject: str
    way: str
    of: str
    calls: int
    gb: float
    tflop: float
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Subject:
    name: str
    make: Callable[[], Callable[[], Any]]


def measure(only: str = "") -> list[Row]:
    """Returns the rows of all subjects, or of those with `only` in their name, such as "decode 480p, bf16".

    Raises:
        MeasurementError: there is no such subject.
    """
    known = list(_subjects())
    if not (chosen := [subject for subject in known if only in subject.name]):
        names = "; ".join(subject.name for subject in known)
        raise MeasurementError(f"Nothing to predict is called {only!r}; there are: {names}.")
    return [row for subject in chosen for way in (STOCK, PATCHED) for row in _rows(subject, way)]


def _subjects() -> Iterator[_Subject]:
    for name in ("14b-480p", "14b-720p", "1.3b-480p", "ti2v-5b", "helios"):
        if shapes.SHAPES[name].available:
            yield _Subject(name, lambda name=name: _forward(name))  # type: ignore[misc]
    for dtype in ("fp32", "bf16"):
        for height, width in ((480, 832), (720, 1280)):
            yield _Subject(
                f"decode {height}p, {dtype}",
                lambda dtype=dtype, size=(81, height, width): _decode(dtype, *size),  # type: ignore[misc]
            )


def _forward(name: str) -> Callable[[], Any]:
    shape = shapes.shape_of(name, META)
    model = shapes.build_on_paper(shape, torch.bfloat16)
    arguments = shapes.inputs(shape, model, META, torch.bfloat16)
    return lambda: model(**arguments)


def _decode(dtype: str, frames: int, height: int, width: int) -> Callable[[], Any]:
    with META:
        vae: Any = diffusers.AutoencoderKLWan()
    torch.nn.Module.to(vae.eval(), dtype=DTYPES[dtype])
    scale = vae.spatial_compression_ratio
    size = (1, vae.config.z_dim, (frames - 1) // 4 + 1, height // scale, width // scale)
    latents = torch.empty(size, device=META, dtype=DTYPES[dtype])
    return lambda: vae.decode(latents)


def _rows(subject: _Subject, way: str) -> list[Row]:
    with torch.no_grad(), wan_patches.enabled(() if way == STOCK else None), variants.said_once():
        run = subject.make()
        with on_paper() as calls:
            run()
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(_group(call), []).append(call)
    return [_row(subject.name, way, of, group) for of, group in groups.items()]


def _group(call: Call) -> str:
    if not call.flops:
        return call.op or call.name
    if "attention" in call.name:
        return ATTENTION
    return CONVOLUTIONS if "conv" in call.name else PRODUCTS


def _row(subject: str, way: str, of: str, calls: Sequence[Call]) -> Row:
    seconds = {card.name: round(sum(_seconds(call, of, card) for call in calls), 6) for card in CARDS}
    gb, tflop = sum(call.bytes for call in calls) / 1e9, sum(call.flops for call in calls) / 1e12
    return Row(subject, way, of, len(calls), round(gb, 3), round(tflop, 3), seconds)


def _seconds(call: Call, of: str, card: Card) -> float:
    memory = call.bytes / (card.gb_s * 1e9 * REACHED["memory"])
    if not call.flops:
        return memory
    in_fp32 = card.tf32 if of == CONVOLUTIONS else card.fp32  # torch allows TF32 in convolutions only
    tflops = in_fp32 if call.dtype == torch.float32 else card.bf16
    return max(memory, call.flops / (tflops * 1e12 * REACHED[of]))


# Output


def table(rows: Sequence[Row], folder: Path | None = None) -> Group:
    """Returns totals, the operations of a single subject, and measurements in `folder` beside the predictions."""
    subjects = list(dict.fromkeys(row.subject for row in rows))
    parts: list[Table | str] = [_totals(rows, subjects), *([_operations(rows)] if len(subjects) == 1 else [])]
    shares = ", ".join(f"{share:.0%} in {what}" for what, share in REACHED.items() if what != "memory")
    parts.append(
        f"Predicted, not measured: bytes that calls touch at {REACHED['memory']:.0%} of the published bandwidth, "
        f"operations at a share of the published TFLOPS: {shares}. Caches and the host's time are left out."
    )
    if folder is not None and (beside := list(_beside(rows, folder))):
        found = Table("measured on this GPU", box=box.SIMPLE, pad_edge=False)
        for column in ("predicted ms", "measured ms", "off"):
            found.add_column(column, justify="right")
        for what, predicted, measured in beside:
            off = measured / predicted - 1
            found.add_row(what, _ms(predicted), _ms(measured), f"{off:+.0%}{' <-' if abs(off) > OFF else ''}")
        parts += [found, "Forwards: predicted from the measured floor and copy, so only the other operations count."]
    return Group(*parts)


def _totals(rows: Sequence[Row], subjects: Sequence[str]) -> Table:
    found = Table("one run", box=box.SIMPLE, pad_edge=False)
    for column in ("TFLOP", "calls", "GB", *(f"{card.name} s" for card in CARDS)):
        found.add_column(column, justify="right")
    for subject in subjects:
        found.add_row(subject, *totals(rows, subject))
    return found


def totals(rows: Sequence[Row], subject: str) -> list[str]:
    """Returns table cells of a subject: TFLOP; then calls, GB and seconds on each card, stock and patched."""
    ways = [[row for row in rows if (row.subject, row.way) == (subject, way)] for way in (STOCK, PATCHED)]
    cells = [f"{sum(row.tflop for row in ways[0]):,.0f}"]
    cells.append(", ".join(f"{sum(row.calls for row in way):,}" for way in ways))
    cells.append(", ".join(f"{sum(row.gb for row in way):,.0f}" for way in ways))
    cells += [", ".join(f"{sum(row.seconds[card.name] for row in way):.2f}" for way in ways) for card in CARDS]
    return cells


def _operations(rows: Sequence[Row]) -> Table:
    found = Table(f"{rows[0].subject}, patched", box=box.SIMPLE, pad_edge=False)
    for column in ("calls", "GB", "TFLOP", *(f"{card.name} ms" for card in CARDS)):
        found.add_column(column, justify="right")
    for cells in operations(rows, rows[0].subject):
        found.add_row(*cells)
    return found


def operations(rows: Sequence[Row], subject: str) -> Iterator[list[str]]:
    """Yields table cells of each operation of a patched subject, the longest first; short ones together."""
    of_subject = [row for row in rows if (row.subject, row.way) == (subject, PATCHED)]
    card = CARDS[0].name
    limit = 0.02 * sum(row.seconds[card] for row in of_subject if not row.tflop)
    short = [row for row in of_subject if row.seconds[card] < limit]
    longer = sorted((row for row in of_subject if row not in short), key=lambda row: -row.seconds[card])
    for of, group in [*((row.of, [row]) for row in longer), (OTHER, short)]:
        tflop = sum(row.tflop for row in group)
        numbers = [f"{sum(row.calls for row in group):,}", f"{sum(row.gb for row in group):,.1f}"]
        times = [_ms(1e3 * sum(row.seconds[card.name] for row in group)) for card in CARDS]
        yield [of, *numbers, f"{tflop:,.0f}" if tflop else "-", *times]


def _beside(rows: Sequence[Row], folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yields what was measured, the prediction and the measurement, in milliseconds."""
    subjects = {row.subject for row in rows}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError, KeyError):
            content = json.loads(path.read_text())
            if content.get("bench") == "model" and content["shape"] in subjects:
                result = variants.from_json(content)
                for way in (STOCK, PATCHED):
                    others = [r for r in rows if (r.subject, r.way) == (result.shape, way) and not r.tflop]
                    measured = result.row(way).ms
                    if measured is not None and result.layers == result.of_layers:
                        yield (
                            f"{result.shape}, {way}",
                            result.floor_ms + sum(row.gb for row in others) / result.copy_gb_s * 1e3,
                            measured,
                        )
            elif path.name.startswith("vae-"):
                yield from _decodes_beside(rows, content)


def _decodes_beside(rows: Sequence[Row], content: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    device = content["machine"]["device"]
    if not (card := next((card.name for card in CARDS if card.name in device), "")):
        return
    for measured in content["rows"]:
        subject = f"decode {measured['shape'].split('x')[1]}p, {measured['dtype']}"
        for way in (STOCK, PATCHED):
            found = [row for row in rows if (row.subject, row.way) == (subject, way)]
            if measured["op"] == "decode" and found:
                yield f"{subject}, {way}", 1e3 * sum(row.seconds[card] for row in found), measured[f"{way}_ms"]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows, and the figures and versions that they were made from."""
    versions = {name: version(name) for name in ("torch", "diffusers")}
    content = {"versions": versions, "cards": list(map(asdict, CARDS)), "reached": REACHED}
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(content)[:-1]}, "rows": [\n{lines}\n]}}\n')


def read_json(path: Path) -> list[Row]:
    """Returns the rows of a file of `write_json`."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]
