"""Benchmarks the overhead of patches: `enable()` itself, and the dispatch of one call."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from wan_patches.diagnostics.machine import machine
from wan_patches.ops import rope
from wan_patches.ops.dispatch import op

_PIPELINES = "from diffusers import WanPipeline, WanImageToVideoPipeline, HeliosPipeline\n"
_EVERYTHING = """
import contextlib, importlib
for module in {report.module for report in wan_patches.status().reports}:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(module)
"""
_ENABLE = """
import time
start = time.perf_counter()
wan_patches.enable()
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Row:
    """One cost, in seconds."""

    what: str
    seconds: float


def measure(repeats: int = 5) -> list[Row]:
    """Returns medians: `enable()` in new processes, before and after imports, and the dispatch of tiny calls."""
    return [
        Row("enable(), cold, before diffusers", _enable("", repeats)),
        Row("enable(), Wan T2V, I2V and Helios imported", _enable(_PIPELINES, repeats)),
        Row("enable(), every patched module imported", _enable(_EVERYTHING, repeats)),
        Row("rotary embedding on a CPU, a call", _dispatch_on_cpu()),
        Row("an op of three tensors, decided, a call", _dispatch_of_a_form()),
    ]


def table(rows: list[Row]) -> Table:
    """Returns the rows as a table."""
    found = Table("cost", box=box.SIMPLE, pad_edge=False)
    found.add_column("median", justify="right")
    for row in rows:
        small = row.seconds < 1e-3
        found.add_row(row.what, f"{row.seconds * 1e6:.1f} us" if small else f"{row.seconds * 1e3:.1f} ms")
    return found


def write_json(path: Path, rows: list[Row]) -> None:
    """Writes the rows and the facts about the machine."""
    content = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _enable(before: str, repeats: int) -> float:
    code = "import wan_patches\n" + before + _ENABLE
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, timeout=300) for _ in range(repeats)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def _dispatch_on_cpu() -> float:
    """Returns the seconds of a call that is too small for any form, minus those of the reference."""
    x, cos, sin = torch.randn(1, 16, 2, 32), torch.randn(1, 16, 1, 16), torch.randn(1, 16, 1, 16)
    return _difference(lambda: rope.apply_rotary_emb(x, cos, sin), lambda: rope.apply_rotary_emb.reference(x, cos, sin))


def _dispatch_of_a_form() -> float:
    """Returns the seconds of a call of three tensors with a decided form, minus those of the form itself."""
    x, cos, sin = torch.randn(1, 16, 2, 32), torch.randn(1, 16, 1, 16), torch.randn(1, 16, 1, 16)

    return _difference(lambda: _measured(x, cos, sin), lambda: _first(x, cos, sin))


@op("the first of three tensors")
def _measured(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x


@_measured.form("the first")
def _first(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x


def _difference(
    call: Callable[[], object], without: Callable[[], object], number: int = 5000, rounds: int = 15
) -> float:
    pairs = [(timeit.timeit(call, number=number), timeit.timeit(without, number=number)) for _ in range(rounds)]
    return statistics.median(a - b for a, b in pairs) / number
