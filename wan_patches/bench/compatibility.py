"""Which pipelines of the installed diffusers get which patches, and whether their videos keep every bit.

The matrix of diffusers versions (`tox`) writes a record of each. They make the README's table.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import torch
from packaging.version import Version
from rich import box
from rich.table import Table

import wan_patches
from wan_patches.bench.measure import MeasurementError, identical
from wan_patches.bench.models import FAMILIES, Family, available
from wan_patches.observation import observing


@dataclass(frozen=True)
class Row:
    """One family in the installed diffusers.

    `patches`: those whose code was called. `skipped`: those that a module of the pipeline was left without, and why.
    """

    family: str
    pipeline: str
    patches: tuple[str, ...]
    skipped: Mapping[str, str]
    identical: bool


def measure(families: Iterable[str] = ()) -> list[Row]:
    """Runs families once stock and once patched, small, in fp32 and on the CPU.

    Args:
        families: names in `wan_patches.bench.models.FAMILIES`; none means all that the installed diffusers has.

    Raises:
        MeasurementError: the installed diffusers has no such family, or nobody knows it.
    """
    families = list(families)
    if unknown := [name for name in families if name not in FAMILIES]:
        raise MeasurementError(f"Unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}.")
    if missing := [FAMILIES[name] for name in families if not FAMILIES[name].available]:
        since = ".".join(map(str, missing[0].since))
        raise MeasurementError(
            f"{missing[0].name} came with diffusers {since}, this is {diffusers.__version__}; "
            f"it has: {', '.join(available())}."
        )
    return [_row(FAMILIES[name]) for name in families or available()]


def table(rows: Iterable[Row]) -> Table:
    """The rows for people."""
    found = Table("family", "pipeline", "patches", "left stock", "exact", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        skipped = "; ".join(f"{name}: {reason}" for name, reason in row.skipped.items())
        found.add_row(row.family, row.pipeline, ", ".join(row.patches), skipped, "yes" if row.identical else "NO")
    return found


def write_json(folder: Path, rows: Iterable[Row]) -> Path:
    """Writes the rows to a file in `folder` that is named after the version of diffusers; returns its path.

    The same versions give the same file.
    """
    versions = {package: version(package).partition("+")[0] for package in ("diffusers", "transformers", "torch")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{versions['diffusers']}.json"
    path.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return path


def read_json(folder: Path) -> dict[str, list[Row]]:
    """The rows of every version of diffusers that `folder` has a record of, oldest first."""
    contents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    contents.sort(key=lambda content: Version(content["versions"]["diffusers"]))
    return {
        content["versions"]["diffusers"]: [Row(**row | {"patches": tuple(row["patches"])}) for row in content["rows"]]
        for content in contents
    }


def markdown(records: Mapping[str, Collection[Row]]) -> str:
    """The table of pipelines, patches and versions of diffusers, and below it why something was left stock."""
    rows = [row for record in records.values() for row in record]
    order = list(FAMILIES)
    pipelines = dict.fromkeys(row.pipeline for row in sorted(rows, key=lambda row: order.index(row.family)))
    lines = [["pipeline", "patches", *records], ["---"] * (2 + len(records))]
    for pipeline in pipelines:
        ever = _patches(rows, pipeline)
        cells = [_cell(record, pipeline, ever) for record in records.values()]
        lines.append([f"`{pipeline}`", ", ".join(sorted(ever)), *cells])
    reasons: dict[tuple[str, str], list[str]] = {}
    for diffusers_version, record in records.items():
        for patch, reason in sorted({item for row in record for item in row.skipped.items()}):
            reasons.setdefault((patch, reason), []).append(diffusers_version)
    notes = [f"- {patch}, {', '.join(where)}: {reason}" for (patch, reason), where in reasons.items()]
    notes = [note.replace("_", r"\_") for note in notes]  # __call__ would be bold
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [""] * bool(notes) + notes)


def _row(family: Family) -> Row:
    pipe = family.build()
    stock = _video(pipe, family)
    called: set[str] = set()
    with wan_patches.enabled():
        names: dict[int, set[str]] = {}
        for place in wan_patches._registry.places():
            names.setdefault(id(place.function.__code__), set()).add(place.patch.name)
        codes = [place.function.__code__ for place in wan_patches._registry.places()]

        def note(frame: FrameType) -> None:
            called.update(names[id(frame.f_code)])

        with observing(codes, on_call=note):
            patched = _video(pipe, family)
        modules = _modules(pipe)
        skipped = {report.name: report.reason for report in wan_patches.status().skipped() if report.module in modules}
    return Row(family.name, type(pipe).__name__, tuple(sorted(called)), skipped, identical(stock, patched))


def _video(pipe: Any, family: Family) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # Helios' pyramid draws from it in some versions
        return pipe(**family.inputs()).frames


def _modules(pipe: Any) -> set[str]:
    """Where the code of a pipeline and its parts is."""
    parts = [pipe]
    for part in vars(pipe).values():
        parts += part.modules() if isinstance(part, torch.nn.Module) else [part]
    return {type(part).__module__ for part in parts}


def _patches(rows: Iterable[Row], pipeline: str) -> set[str]:
    return {patch for row in rows if row.pipeline == pipeline for patch in row.patches}


def _cell(record: Iterable[Row], pipeline: str, ever: set[str]) -> str:
    rows = [row for row in record if row.pipeline == pipeline]
    if not rows:
        return "-"
    if not all(row.identical for row in rows):
        return "**differs**"
    missing = ever - _patches(rows, pipeline)
    return f"not {', '.join(sorted(missing))}" if missing else "yes"
