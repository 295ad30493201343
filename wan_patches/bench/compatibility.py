"""Records which patches apply to the pipelines of the installed diffusers, how many calls use forms, and bit equality.

Models have few layers and videos are small. The minimum sizes of forms, below which stock's operations are faster, are
therefore ignored: a form computes every call that it supports. With `production`, minimum sizes apply, and models and
videos are larger. The matrix of diffusers versions (`tox`) writes one record per version; the table of
versions is made from these records.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
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
from wan_patches.diagnostics.call_tracing import tracing_calls
from wan_patches.ops.dispatch import at_any_size
from wan_patches.patching import tally
from wan_patches.testing import relatives
from wan_patches.testing.families import FAMILIES, Family, available


@dataclass(frozen=True)
class Row:
    """The result for one family in the installed diffusers.

    patches: patches whose code was called.
    skipped: patches that were not applied to a module of the pipeline, with the reason.
    calls: by patch, the number of calls computed by forms, and of all calls.
    reasons: by patch, the reasons for using stock's operations, with the number of calls.
    """

    family: str
    pipeline: str
    patches: tuple[str, ...]
    skipped: Mapping[str, str]
    identical: bool
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def exercise(self) -> str:
        """The share of calls computed by forms, as text. On a CPU, the step loop has no such calls."""
        taken, total = tally.total(self.calls.values())
        return f"forms in {taken} of {total} calls" if taken else "not exercised"


def measure(families: Iterable[str] = (), production: bool = False) -> list[Row]:
    """Runs each family once stock and once patched, on the CPU.

    Args:
        families: names in `wan_patches.testing.families.FAMILIES`; by default, all that the installed diffusers has.
        production: applies the minimum sizes of forms, as in production. Takes about ten times as long.

    Raises:
        MeasurementError: a family is unknown, or missing from the installed diffusers.
    """
    families = list(families)
    if unknown := [name for name in families if name not in FAMILIES]:
        raise MeasurementError(f"Unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}.")
    if missing := [FAMILIES[name] for name in families if not FAMILIES[name].available]:
        since = ".".join(map(str, missing[0].since))
        raise MeasurementError(
            f"{missing[0].name} requires diffusers {since} or newer, not {diffusers.__version__}; "
            f"available families: {', '.join(available())}."
        )
    rows = []
    with contextlib.nullcontext() if production else at_any_size():
        for name in families or available():
            rows.append(_row(FAMILIES[name], production))
            gc.collect()  # pipelines are in reference cycles; wide ones would fill the memory
    return rows


def measure_others(names: Iterable[str] = ()) -> list[Row]:
    """Runs other models that share the rotary embedding or the autoencoder, once stock and once patched, on the CPU.

    Args:
        names: names in `wan_patches.testing.relatives.RELATIVES`; by default, all that the installed diffusers has.

    Raises:
        MeasurementError: a name is unknown, or missing from the installed diffusers.
    """
    there = relatives.available()
    names = list(names) or there
    if missing := [name for name in names if name not in there]:
        raise MeasurementError(f"Unknown model {missing[0]!r}; this diffusers has: {', '.join(there)}.")
    with at_any_size():
        return [_other(relatives.RELATIVES[name]) for name in names]


def table(rows: Iterable[Row]) -> Table:
    """Returns the rows as a table."""
    found = Table("family", "pipeline", "calls by forms", "left stock", "exact", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        skipped = "; ".join(f"{name}: {reason}" for name, reason in row.skipped.items())
        exact = f"yes, {row.exercise}" if row.identical else "NO"
        found.add_row(row.family, row.pipeline, _counts(row), skipped, exact)
    return found


def _counts(row: Row) -> str:
    """Returns the patches of a family, each with its number of calls by forms out of all counted calls."""
    counts = {name: row.calls.get(name) for name in row.patches}
    return ", ".join(f"{name} {found[0]}/{found[1]}" if found else name for name, found in counts.items())


def write_json(folder: Path, rows: Iterable[Row]) -> Path:
    """Writes the rows to a file in `folder`, named after the versions of diffusers and torch, and returns its path.

    A file of the same versions is overwritten.
    """
    versions = {package: version(package).partition("+")[0] for package in ("diffusers", "transformers", "torch")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{versions['diffusers']}-torch-{versions['torch']}.json"
    path.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return path


def read_json(folder: Path) -> dict[str, list[Row]]:
    """Returns the rows of all records in `folder` by version, oldest first.

    A key is the diffusers version, followed by the torch version if it is not the most common one of the records.
    """
    contents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    contents.sort(key=lambda content: [Version(content["versions"][package]) for package in ("diffusers", "torch")])
    usual = Counter(content["versions"]["torch"] for content in contents).most_common(1)
    found: dict[str, list[Row]] = {}
    for content in contents:
        versions = content["versions"]
        name = versions["diffusers"]
        if versions["torch"] != usual[0][0]:
            name += f", torch {versions['torch']}"
        found[name] = [_read(row) for row in content["rows"]]
    return found


def _read(row: dict[str, Any]) -> Row:
    calls = {name: (fast, total) for name, (fast, total) in row.get("calls", {}).items()}
    return Row(**row | {"patches": tuple(row["patches"]), "calls": calls})


def markdown(records: Mapping[str, Collection[Row]]) -> str:
    """Returns the table of pipelines, patches and diffusers versions, with the reasons for skipped patches below.

    The reasons for calls in stock's operations, in the newest version, come last.
    """
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
    notes = [f"- {patch}, {'; '.join(where)}: {reason}" for (patch, reason), where in reasons.items()]
    slow: Counter[tuple[str, str]] = Counter()
    for row in list(records.values())[-1] if records else ():
        for patch, why in row.reasons.items():
            slow.update({(patch, reason): calls for reason, calls in why.items()})
    notes += [f"- {patch}, {calls} calls in stock's operations: {reason}" for (patch, reason), calls in slow.items()]
    notes = [note.replace("_", r"\_") for note in notes]  # __call__ would be bold
    return _page(lines, notes)


def shares(rows: Iterable[Row]) -> str:
    """Returns the table of fast calls by family and patch, from a record with production sizes.

    The reasons for calls in stock's operations come below, with their number in each family.
    """
    lines = [["family", *JUDGED, "same bits"], ["---"] * (2 + len(JUDGED))]
    slow: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        counts = (row.calls.get(patch) for patch in JUDGED)
        cells = ("-" if count is None else f"{count[0]} of {count[1]}" for count in counts)
        lines.append([row.family, *cells, "yes" if row.identical else "**no**"])
        for patch in JUDGED:
            for reason, calls in row.reasons.get(patch, {}).items():
                slow.setdefault((patch, reason), []).append(f"{row.family} {calls}")
    notes = [f"- {patch}, {reason}: {', '.join(where)}" for (patch, reason), where in slow.items()]
    return _page(lines, notes)


def others(rows: Iterable[Row]) -> str:
    """Returns the table of models of other families, with the reasons for calls in stock's operations below."""
    lines = [["model", "run here as", "patches", "calls by forms", "same bits"], ["---"] * 5]
    slow: dict[str, list[str]] = {}
    for row in rows:
        taken, total = tally.total(row.calls.values())
        bits = "yes" if row.identical else "**no**"
        lines.append([row.family, f"`{row.pipeline}`", ", ".join(row.patches), f"{taken} of {total}", bits])
        for why in row.reasons.values():
            for reason, calls in why.items():
                slow.setdefault(reason, []).append(f"{row.family} {calls}")
    return _page(lines, [f"- {reason}: {', '.join(where)}" for reason, where in slow.items()])


def _page(lines: Iterable[Iterable[str]], notes: list[str]) -> str:
    """Returns a table in Markdown, with the notes below it."""
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [""] * bool(notes) + notes)


#: Patches that must make nearly all of their calls fast at production sizes, in every family that has them.
JUDGED = ("rope", "qk", "modulation", "frames", "vae", "conditioning")

_SMALL: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "transformer": {"num_attention_heads": 4}}
_SHORT: dict[str, Any] = {"size": (192, 192), "frames": 9, "steps": 2}
# a layer as wide as those of 14B; a VAE with fewer channels would be convolved by a loop
_WIDE: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "vae": {"base_dim": 16, "decoder_base_dim": 16}}
_LAYER: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 1}
_LAYER_OF: dict[str, dict[str, Any]] = {
    "wan_vace": {"vace_layers": [0]},
    **{name: {"inject_face_latents_blocks": 1} for name in ("wan_animate", "wan_animate_replace")},
}
_LONG: dict[str, Any] = {"size": (256, 256), "steps": 1}  # 768 tokens or more
_CHUNKS: dict[str, Any] = {"size": (288, 256), "frames": 17, "num_latent_frames_per_chunk": 3}  # two of 864 tokens
_PYRAMID: dict[str, Any] = {"size": (768, 768), "steps": 1, "num_latent_frames_per_chunk": 3}  # 432, 1,728 and 6,912
#: Overrides for families that would have fewer tokens per call, or no step at all. Published videos have more tokens.
_LONGER: dict[str, dict[str, Any]] = {
    "wan22_i2v": {"steps": 2},  # one of each transformer
    "wan22_ti2v": {"size": (512, 448)},  # a token is 32 x 32 pixels
    "wan_v2v": {"steps": 2},  # the pipeline skips the first
    "chronoedit": {"size": (320, 320)},  # two latent frames
    "chronoedit_reasoning": {"size": (320, 320), "steps": 2},  # one with all frames, one with two
    **{name: _CHUNKS for name in ("helios", "helios_i2v", "helios_v2v")},
    **{name: _PYRAMID for name in ("helios_pyramid", "helios_pyramid_i2v", "helios_distilled")},
    **{name: {"size": (480, 480)} for name in ("anyflow_far", "anyflow_far_i2v")},  # chunks of one latent frame
}
_TEXT = "max_sequence_length"  # the published pipelines pad prompts to 512 tokens


def _row(family: Family, production: bool) -> Row:
    config, inputs = _SMALL, _SHORT
    if production:
        config = _WIDE | {"transformer": _LAYER | _LAYER_OF.get(family.name, {})}
        inputs = _LONG | _LONGER.get(family.name, {})
    pipe = family.build(**config)
    try:
        stock = _video(pipe, family, inputs)
    except RuntimeError:  # stock itself fails in bf16: Wan-Animate in diffusers 0.36
        pipe = family.build(**config | {"dtype": torch.float32})
        stock = _video(pipe, family, inputs)
    return _compared(family.name, pipe, stock, lambda: _video(pipe, family, inputs))


def _other(relative: relatives.Relative) -> Row:
    model = relative.build(dtype=torch.bfloat16)
    stock = relative.run(model, dtype=torch.bfloat16)
    return _compared(relative.name, model, stock, lambda: relative.run(model, dtype=torch.bfloat16))


def _compared(name: str, pipe: Any, stock: Any, run: Callable[[], Any]) -> Row:
    """Runs a model with all patches, and returns the row; `stock`: its result without."""
    called: set[str] = set()
    tally.reset()
    with wan_patches.enabled():
        names: dict[int, set[str]] = {}
        for place in wan_patches._registry.places():
            names.setdefault(id(place.function.__code__), set()).add(place.patch.name)
        codes = [place.function.__code__ for place in wan_patches._registry.places()]

        def note(frame: FrameType) -> None:
            called.update(names[id(frame.f_code)])

        with tracing_calls(codes, on_call=note):
            patched = run()
        modules, status = _modules(pipe), wan_patches.status()
        skipped = {report.name: report.reason for report in status.skipped() if report.module in modules}
        counts = sorted(wan_patches._registry.calls({}).items())
    calls = {patch: count for patch, count in counts if patch not in _OF_ACCELERATORS}
    reasons = _reasons(report for report in status.reports if report.name not in _OF_ACCELERATORS)
    same = identical(stock, patched)
    return Row(name, type(pipe).__name__, tuple(sorted(called)), skipped, same, calls, reasons)


def _reasons(reports: Iterable[wan_patches.Report]) -> dict[str, dict[str, int]]:
    """Returns by patch, over all modules, the reasons for using stock's operations, with the number of calls."""
    found: dict[str, dict[str, int]] = {}
    for report in reports:
        for way, count in report.ways.items():
            if not way.is_fast:
                why = found.setdefault(report.name, {})
                why[f"{way.op}: {way.reason}"] = why.get(f"{way.op}: {way.reason}", 0) + count
    return dict(sorted(found.items()))


_OF_ACCELERATORS = ("rotary_tables", "step_loop")  # avoid waiting for a device, which does not occur on CPUs


def _video(pipe: Any, family: Family, inputs: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # Helios' pyramid draws from it in some versions
        long = {_TEXT: 512} if _TEXT in inspect.signature(pipe.__call__).parameters else {}
        return pipe(**family.inputs(**inputs) | long).frames


def _modules(pipe: Any) -> set[str]:
    """Returns the modules that define a pipeline and its components."""
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
    if missing:
        return f"not {', '.join(sorted(missing))}"
    taken, total = tally.total(count for row in rows for count in row.calls.values())
    return f"{taken} of {total}" if taken else "not exercised"
