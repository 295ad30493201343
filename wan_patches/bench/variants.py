"""Measures work in every variant: stock, patched, compiled. Shared by `bench block`, `model` and `pipeline`.

All variants are called in turns, in one run, together with the floor (`wan_patches.bench.floor`) and a plain copy.
Patches change code in place, so each variant is entered before its sample and left afterwards, outside the timing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Group
from rich.table import Table

import wan_patches
from wan_patches.bench.floor import Copy, Floor, recording
from wan_patches.bench.measure import (
    MeasurementError,
    Turns,
    identical,
    in_turns,
    machine,
    name_of,
    peak_extra_bytes,
    using_threads,
)
from wan_patches.bench.ops import CALM, SLOWER
from wan_patches.bench.shapes import Shape
from wan_patches.patching.status import ACTIVE

STOCK, PATCHED, CLOSE = "stock", "patched", "patched, close"
COMPILED_STOCK, COMPILED = "compiled stock", "compiled patched"
WAYS = (STOCK, PATCHED, CLOSE, COMPILED_STOCK, COMPILED)

#: The rival of each variant: no variant may be slower than its rival.
RIVALS = {PATCHED: STOCK, CLOSE: STOCK, COMPILED: COMPILED_STOCK}

_CHOICES: Mapping[str, Mapping[str, Any]] = {
    STOCK: {"patches": ()},
    PATCHED: {},
    CLOSE: {"fidelity": "close"},
    COMPILED_STOCK: {"patches": ()},
    COMPILED: {},
}
_COMPILED = (COMPILED_STOCK, COMPILED)
_FLOOR, _COPY = "floor", "copy"

#: The backend of torch.compile.
BACKEND = "inductor"

_MIB = 1 << 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """The subject of a measurement.

    make: called once per variant; returns the call, on its own input with the same values in every variant.
    compiled: the modules that compiled variants compile.
    """

    make: Callable[[], Call]
    compiled: Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Row:
    """One variant (`way`): milliseconds of a call, its peak memory above the memory in use before, and its result.

    low, high: quartiles of the time relative to stock, over the turns.
    cpu_ms: CPU milliseconds of all threads; None on accelerators.
    exact: whether the result has the bits of stock's eager code; None if it did not run, or stock is nondeterministic.
    difference: the largest difference from stock's result, for tensors and arrays.
    reason: why the variant did not run, or why its numbers are unreliable.
    """

    way: str
    ms: float | None = None
    peak_mib: float | None = None
    exact: bool | None = None
    difference: float | None = None
    reason: str = ""
    low: float | None = None
    high: float | None = None
    cpu_ms: float | None = None


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one layer's queries and keys.

    gb: the minimum of memory traffic: both tensors are read and written once, and the tables are read once.
    """

    gb: float
    stock_ms: float
    patched_ms: float
    exact: bool
    copy_gb_s: float

    @property
    def stock_share(self) -> float:
        """Stock's share of the bandwidth of a copy."""
        return self.gb / self.stock_ms * 1e3 / self.copy_gb_s

    @property
    def patched_share(self) -> float:
        """The patched code's share of the bandwidth of a copy."""
        return self.gb / self.patched_ms * 1e3 / self.copy_gb_s


@dataclass(frozen=True)
class Result:
    """The result of one benchmark run.

    video: frames, height and width of the latents.
    layers: number of blocks of the measured model; `of_layers` is that of the published model.
    floor_ms: time of the same matmuls and attention calls alone.
    copy_gb_s: GB per second, read and written, of a copy within the device.
    patches: the patches that were active in loaded modules.
    deterministic: whether two stock calls give the same bits; if not, comparisons are meaningless.
    other_cores: the number of cores that other processes used meanwhile; above `CALM`, times mean little.
    attention: the selected backend; None for diffusers' own choice.
    regional: whether blocks were compiled instead of the whole model.
    vae_dtype: of the autoencoder of a pipeline; None for `dtype`.
    """

    bench: str
    shape: str
    dtype: str
    video: tuple[int, int, int]
    tokens: int
    layers: int
    of_layers: int
    rows: tuple[Row, ...]
    floor_ms: float
    matmuls: int
    attentions: int
    copy_gb_s: float
    deterministic: bool
    patches: tuple[str, ...]
    other_cores: float | None = None
    attention: str | None = None
    regional: bool = False
    steps: int | None = None
    rope: Rope | None = None
    vae_dtype: str | None = None

    def row(self, way: str) -> Row:
        """Returns the row of a variant, or an empty row if there is none."""
        return next((row for row in self.rows if row.way == way), Row(way, reason="not measured"))

    def of(self, way: str, other: str = STOCK) -> float | None:
        """Returns the time of a variant divided by that of another."""
        return _ratio(self.row(way).ms, self.row(other).ms)

    def of_floor(self, way: str) -> float | None:
        """Returns the time of a variant divided by the floor's."""
        return _ratio(self.row(way).ms, self.floor_ms)

    def memory_of(self, way: str, other: str = STOCK) -> float | None:
        """Returns the peak memory of a variant divided by that of another."""
        return _ratio(self.row(way).peak_mib, self.row(other).peak_mib)

    def moved_gb(self, way: str) -> float | None:
        """Returns the GB that a copy would read and write in the time above the floor.

        This is an upper estimate of a variant's memory traffic between the matmuls: kernel launches take some of the
        time.
        """
        ms = self.row(way).ms
        return None if ms is None else max(0.0, ms - self.floor_ms) / 1e3 * self.copy_gb_s

    @property
    def is_disturbed(self) -> bool:
        """Whether other work shows in the times: on other cores, or because the floor exceeds what contains it."""
        eager = [self.row(way).ms for way in (STOCK, PATCHED)]
        return (self.other_cores or 0.0) > CALM or any(ms is not None and self.floor_ms > ms for ms in eager)

    def different(self) -> list[str]:
        """Returns the results that should have stock's bits, but differ."""
        found = [row.way for row in self.rows if row.way == PATCHED and row.exact is False]
        return found + ["rotary embedding"] * (self.rope is not None and not self.rope.exact)

    def slower(self) -> list[tuple[str, str, float]]:
        """Returns the variants that are slower than their rivals by more than noise: variant, rival, relative speed.

        None are if the times are disturbed.
        """
        if self.is_disturbed:
            return []
        pairs = [(way, rival, self.of(rival, way)) for way, rival in RIVALS.items()]
        return [(way, rival, ratio) for way, rival, ratio in pairs if ratio is not None and ratio < SLOWER]


def compilable(model: Any, regional: bool) -> list[torch.nn.Module]:
    """Returns the model or, with `regional`, its blocks, like diffusers' `compile_repeated_blocks`."""
    return list(model.blocks) if regional else [model]


def measure(
    bench: str,
    shape: Shape,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    regional: bool = False,
    seconds: float = 10.0,
    steps: int | None = None,
) -> Result:
    """Measures a subject in every variant.

    Args:
        compiled: includes the variants with `torch.compile`, which take minutes on a CPU.
        regional, steps: stored in the result.
        seconds: approximate duration of all turns; there are at least three.

    Raises:
        MeasurementError: stock's own code does not run.
    """
    with torch.no_grad(), said_once():
        stock, *others = (_Trial(way, subject, device) for way in WAYS if compiled or way not in _COMPILED)
        expected = stock.prepare()
        for trial in others:
            trial.prepare(expected, comparable=stock.row.exact is True)
        del expected
        if stock.call is None:
            raise MeasurementError(f"Stock's own code does not run: {stock.row.reason}.")
        with stock.around(), recording() as noted:
            stock.call()
        floor, copy = Floor(noted, device), Copy(device, _copy_size(device, shape))
        calls: dict[str, Call] = {_FLOOR: floor, _COPY: copy}
        for call in calls.values():
            call()  # `in_turns` requires a first run
        trials = (stock, *others)
        calls = {**{trial.way: trial.call for trial in trials if trial.call is not None}, **calls}
        around = {trial.way: trial.around for trial in trials}
        turns = in_turns(calls, device, around=around, seconds=seconds)
    return Result(
        bench=bench,
        shape=shape.name,
        dtype=name_of(dtype),
        video=shape.latents,
        tokens=shape.tokens,
        layers=shape.layers,
        of_layers=shape.published.layers,
        rows=tuple(trial.finished(turns) for trial in trials),
        floor_ms=turns.seconds[_FLOOR] * 1e3,
        matmuls=floor.matmuls,
        attentions=floor.attentions,
        copy_gb_s=copy.bytes / turns.seconds[_COPY] / 1e9,
        deterministic=stock.row.exact is True,
        patches=others[0].patches,
        other_cores=turns.other_cores,
        attention=shape.attention,
        regional=regional,
        steps=steps,
    )


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Logs repeated messages of `enable` about skipped code only once during the block."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = len(said)
        said.add(record.getMessage())
        return len(said) > known

    logger = logging.getLogger("wan_patches")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


class _Trial:
    """One variant during the measurement: its call, the context of the call, and its row so far."""

    def __init__(self, way: str, subject: Subject, device: torch.device) -> None:
        self.way, self.row = way, Row(way)
        self.call: Call | None = None
        self._subject, self._device = subject, device
        self._handle = _Handle(subject.compiled) if way in _COMPILED else None
        self._graphs = 0
        self.patches: tuple[str, ...] = ()

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Applies the patches and the compiled modules of this variant during the block."""
        compiled = contextlib.nullcontext() if self._handle is None else self._handle.in_use()
        with wan_patches.enabled(**_CHOICES[self.way]), compiled:
            yield

    def prepare(self, expected: Any = None, *, comparable: bool = True) -> Any:
        """Runs the variant twice and returns the expected result, or None with a reason in the row.

        The reason is an error, or patches without effect on the result. The second run is compared with `expected`, by
        default the result of the first run.
        """
        try:
            with wan_patches.enabled(**_CHOICES[self.way]) as status:
                active = [report for report in status.reports if report.state == ACTIVE]
                self.patches = tuple(sorted({report.name for report in active}))
                if self.way == CLOSE and all(report.fidelity is wan_patches.Fidelity.EXACT for report in active):
                    self.row = Row(self.way, reason="no active patch changes rounding")
                    return None
                call = self._subject.make()
            given: list[Any] = []
            with self.around():
                first = call()  # on accelerators, the first-sight gate returns stock's result for a patched call
                expected = first if expected is None else expected
                del first
                peak = peak_extra_bytes(lambda: given.append(call()), self._device)
        except Exception as error:  # compiler errors, out of memory
            error = getattr(error, "inner_exception", error)  # dynamo wraps the error of a backend
            self.row = Row(self.way, reason=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
            _free(self._device)
            return None
        self.call = call
        exact = identical(expected, given[0]) if comparable else None
        mib = None if peak is None else peak / _MIB
        self.row = Row(self.way, peak_mib=mib, exact=exact, difference=_difference(expected, given[0]))
        self._graphs = 0 if self._handle is None else self._handle.graphs
        return expected

    def finished(self, turns: Turns) -> Row:
        """Returns the row, with the time if the variant ran."""
        if self.call is None:
            return self.row
        reason = ""
        if self._handle is not None and not self._graphs:
            reason = "nothing was compiled"
        elif self._handle is not None and self._handle.graphs != self._graphs:
            reason = "recompiled during the measurement"
        cpu = turns.cpu_seconds(self.way)
        low, high = turns.spread(self.way, STOCK)
        return replace(
            self.row,
            ms=turns.seconds[self.way] * 1e3,
            reason=reason,
            low=low,
            high=high,
            cpu_ms=None if cpu is None else cpu * 1e3,
        )


class _Handle:
    """Compiled versions of modules, in use during a block and separate from other compiled versions.

    Dynamo caches graphs by code object and does not check the code of inlined functions. It never mixes graphs of
    different backends, so every handle has its own backend.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.graphs = 0
        backend = self._backend
        self._calls = [(module, torch.compile(module._call_impl, backend=backend)) for module in modules]

    def _backend(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes the modules run compiled during the block, as if `compile()` had been called on them."""
        before = [(module, module._compiled_call_impl) for module, _ in self._calls]
        for module, call in self._calls:
            module._compiled_call_impl = call
        try:
            yield
        finally:
            for module, earlier in before:
                module._compiled_call_impl = earlier


def _copy_size(device: torch.device, shape: Shape) -> int:
    """Returns a number of bytes that caches do not hold."""
    return (16 if shape.name.startswith("tiny") else 256 if device.type == "cpu" else 1024) * _MIB


def _free(device: torch.device) -> None:
    gc.collect()
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()


def _difference(a: Any, b: Any) -> float | None:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        a, b = torch.from_numpy(a), torch.from_numpy(b)
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or a.shape != b.shape:
        return None
    return float((a.float() - b.float()).abs().max())


def _ratio(number: float | None, other: float | None) -> float | None:
    return None if number is None or not other else number / other


# Output


def table(result: Result) -> Group:
    """Returns the rows as a table, with notes on how the numbers were measured."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    found.add_column(result.bench)
    for column in ("ms", "of stock", "middle half", "CPU time", "x floor", "GB moved", "peak MiB", "of stock"):
        found.add_column(column, justify="right")
    found.add_column("exact")
    for row in result.rows:
        busy = "~" if result.is_disturbed and row.ms is not None else ""
        spread = "-" if row.low is None else f"{row.low:.2f}-{row.high:.2f}"
        cpu = _number(_ratio(row.cpu_ms, result.row(STOCK).cpu_ms))
        cells = [_number(row.ms), busy + _number(result.of(row.way)), spread, cpu]
        cells.append(busy + _number(result.of_floor(row.way)))
        cells += [_number(result.moved_gb(row.way)), _number(row.peak_mib), _number(result.memory_of(row.way))]
        found.add_row(row.way, *cells, bits(result, row))
    found.add_row("floor", _number(result.floor_ms), _number(_ratio(result.floor_ms, result.row(STOCK).ms)))
    return Group(describe(result), found, *_notes(result))


def describe(result: Result) -> str:
    """Describes the subject of a result in one line."""
    fewer = result.layers < result.of_layers and result.bench != "block"
    layers = f"{result.layers} of {result.of_layers} layers" if fewer else ""
    steps = "" if result.steps is None else f"{result.steps} {'step' if result.steps == 1 else 'steps'}"
    vae = "" if result.vae_dtype is None else f"autoencoder {result.vae_dtype}"
    parts = [f"{result.tokens:,} tokens", layers, steps, result.dtype, vae, result.attention]
    return f"{result.bench} {result.shape}: {', '.join(filter(None, parts))}"


def device_name(facts: Mapping[str, Any]) -> str:
    """Returns the name of the device from the facts of `machine`; for a CPU, its model and the number of threads."""
    if facts["device"] != "cpu":
        return str(facts["device"])
    return f"{facts['cpu']}, {facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'}"


def bits(result: Result, row: Row) -> str:
    """Returns a table cell: whether a row has stock's bits or, if equality is not required, its largest difference."""
    if row.exact is None:
        return "-"
    if row.exact:
        return "yes"
    if row.way in (STOCK, PATCHED):
        return "NO"
    return "no" if row.difference is None else f"within {row.difference:.2g}"


def _notes(result: Result) -> list[str]:
    notes = [
        "Medians of calls in turns, and the middle half of their ratios to stock. CPU time: that of all threads, of "
        "stock's. MiB: peak of a call beyond what was held before, its result included.",
        f"Floor: the same {result.matmuls:,} matrix products and {result.attentions:,} attention calls alone. "
        f"GB moved: what a copy, at {result.copy_gb_s:,.4g} GB/s, would read and write in the time above it.",
    ]
    if (rope := result.rope) is not None:
        notes.append(
            f"Rotary embedding of queries and keys, {rope.gb:.3g} GB: stock {_number(rope.stock_ms)} ms, "
            f"{rope.stock_share:.0%} of a copy's bandwidth; patched {_number(rope.patched_ms)} ms, "
            f"{rope.patched_share:.0%}; bits {'the same' if rope.exact else 'NOT the same'}."
        )
    if not result.deterministic:
        notes.append("Two calls of stock differ here: no comparison of bits means anything.")
    if result.is_disturbed:
        cores = result.other_cores or 0.0
        why = (
            f"other processes kept {cores:.1f} cores busy"
            if cores > CALM
            else "the floor took longer than what contains it"
        )
        notes.append(f"~ {why}: no verdict. Run again.")
    if result.regional and any(result.row(way).ms is not None for way in _COMPILED):
        notes.append("Compiled: the blocks, not the whole model.")
    notes += [f"{row.way}: {row.reason}" for row in result.rows if row.reason]
    notes += [f"Slower than {rival}: {way}, {ratio:.2f}x" for way, rival, ratio in result.slower()]
    return notes


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def chart(result: Result, device: torch.device) -> Any:
    """Draws a matplotlib figure with the time and memory of every variant, and the floor.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        from wan_patches.diagnostics.profiling.views import NO_MATPLOTLIB

        raise ImportError(NO_MATPLOTLIB) from None
    rows = [row for row in reversed(result.rows) if row.ms is not None]
    names = [row.way for row in rows]
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.5), layout="constrained", dpi=120)
    figure.suptitle(f"{describe(result)}, {device_name(machine(device))}", fontsize="medium")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    times = left.barh(names, [row.ms for row in rows], color="tab:blue")
    shares = [result.of(row.way) for row in rows]
    left.bar_label(times, [f"{_number(row.ms)} ({share:.2f})" for row, share in zip(rows, shares)], padding=4)
    left.axvline(result.floor_ms, color="black", linestyle="--", label=f"floor, {_number(result.floor_ms)}")
    left.set_xlabel("ms (of stock)")
    left.margins(x=0.25)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    right.bar_label(right.barh(names, [row.peak_mib or 0.0 for row in rows], color="tab:gray"), fmt="%.0f", padding=4)
    right.set_xlabel("peak MiB of a call")
    right.margins(x=0.25)
    return figure


def write_json(path: Path, result: Result, device: torch.device, threads: int | None = None) -> None:
    """Writes the result and the facts about the machine; `threads` is the number during the measurement."""
    with using_threads(threads):
        facts = machine(device)
    path.write_text(json.dumps({"machine": facts, **to_json(result)}, indent=2) + "\n")


def to_json(result: Result) -> dict[str, Any]:
    """Returns the result and derived numbers as a dict for JSON; `from_json` reads it."""
    content = asdict(result)
    for row in content["rows"]:
        way = row["way"]
        row |= {"of_stock": result.of(way), "of_floor": result.of_floor(way), "moved_gb": result.moved_gb(way)}
    if result.rope is not None:
        content["rope"] |= {"stock_share": result.rope.stock_share, "patched_share": result.rope.patched_share}
    return content


def from_json(content: Mapping[str, Any]) -> Result:
    """Returns the result from the content of a JSON file."""
    known = _known(Result, content)
    known |= {"video": tuple(content["video"]), "patches": tuple(content["patches"])}
    known |= {"rows": tuple(Row(**_known(Row, row)) for row in content["rows"])}
    known |= {"rope": content["rope"] and Rope(**_known(Rope, content["rope"]))}
    return Result(**known)


def _known(cls: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `cls` in `content`, without derived numbers."""
    return {field.name: content[field.name] for field in fields(cls) if field.name in content}  # or it is older
