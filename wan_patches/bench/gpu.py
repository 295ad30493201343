"""Runs all measurements that a GPU is needed for, and says what to mend: `wan-patches bench gpu`.

Every step is another command in a process of its own, with a time limit: nothing that crashes or hangs ends the rest.
A folder holds each step's log and JSON, and in `FILE` what became of the steps; later runs add to it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

import wan_patches
from wan_patches.bench import readme, variants
from wan_patches.bench.measure import MeasurementError
from wan_patches.bench.ops import SLOWER
from wan_patches.diagnostics.doctor.probes import ask, torch_facts
from wan_patches.patching.registry import ENTRY_POINT_GROUP

FILE = "gpu.json"
PARTS = (1, 2, 3)
PART_SECONDS = 540
WANTED_OF_COPY = 0.85  # of the bandwidth of a copy, for kernels
WANTED_OF_DECODE = {"time": ("ms", 0.80), "memory": ("extra_mib", 0.70)}  # of stock's

DONE, FINDING, FAILED, STOPPED, NOT_RUN = "done", "finding", "failed", "stopped", "not run"

_ROOT = Path(wan_patches.__file__).parents[1]
_EMULATED = _ROOT / "tests" / "emulated_device" / "command_line.py"
_TESTS = _ROOT / "tests" / "test_gpu.py"
_LEAST = 20  # seconds left for a step to begin
_WIDTHS = {1536: "1.3b", 5120: "14b"}


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds.

    command: the arguments of `wan-patches`, or of pytest if they begin with it.
    tiny: the same on the emulated device; empty if the step is left out there.
    """

    name: str
    part: int
    limit: int
    command: str
    tiny: str

    @property
    def is_test(self) -> bool:
        """Whether this step runs tests, which need an NVIDIA GPU."""
        return self.command.startswith("pytest")


STEPS = (
    Step("doctor", 1, 90, "doctor", ""),
    Step("kernels", 1, 150, "bench forms --quick", "bench forms --quick"),
    Step("forms", 1, 200, "bench forms", ""),
    Step("forms-fp32", 1, 60, "bench forms --dtype fp32 --only 'RMS norm + SiLU'", ""),  # as autoencoders are loaded
    Step("ops", 1, 120, "bench ops", "bench ops --quick --only 'rope, tiny'"),
    Step("block-14b-480p", 1, 150, "bench block --shape 14b-480p --seconds 8", "bench block --shape tiny"),
    Step("tests-ops", 1, 200, "pytest -k 'not final_videos and not wait'", ""),
    Step("vae-fp32-480p", 2, 120, "bench vae --dtype fp32 --only 81x480x832", "bench vae --dtype fp32 --only decode"),
    Step("vae-fp32-720p", 2, 120, "bench vae --dtype fp32 --only 'decode 81x720x1280'", ""),
    Step(
        "vae-bf16-480p",
        2,
        100,
        "bench vae --dtype bf16 --only 81x480x832",
        "bench vae --dtype bf16 --only 'decode, Qwen-Image'",
    ),
    Step("vae-bf16-720p", 2, 100, "bench vae --dtype bf16 --only 'decode 81x720x1280'", ""),
    Step("tests-pipelines", 2, 280, "pytest -k 'final_videos or wait'", ""),
    Step("model-14b-480p", 3, 240, "bench model --shape 14b-480p --regional", "bench model --shape tiny"),
    Step("model-helios", 3, 110, "bench model --shape helios --regional", "bench model --shape tiny-helios"),
    Step("model-ti2v-5b", 3, 100, "bench model --shape ti2v-5b --regional", "bench model --shape tiny-ti2v"),
    Step(
        *("pipeline-1.3b-480p", 3, 150),
        "bench pipeline --shape 1.3b-480p --steps 4 --vae-dtype fp32 --no-compile",
        "bench pipeline --shape tiny --steps 1 --vae-dtype fp32",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a step, and how long it took."""

    state: str
    why: str = ""
    seconds: float = 0.0


# Running


def run(
    folder: Path,
    device: str,
    dtype: str,
    *,
    part: int | None = None,
    only: str = "",
    budget: float,
    tell: Callable[[str], None],
) -> None:
    """Runs the steps of a part, or all, and writes to `folder` after each. Steps without a result there come first.

    Args:
        folder: is created if it does not exist.
        device: "cuda", "npu" or "emulated".
        dtype: of the denoisers and operations: fp32, bf16 or fp16.
        only: a part of the names of the steps to run.
        budget: seconds; what has not begun by then is not run.
        tell: takes a line about each step.

    Raises:
        MeasurementError: there is no such device or step, or the folder has results of another device.
        OSError: the folder cannot be written to.
    """
    deadline = time.monotonic() + budget
    if not (steps := [step for step in STEPS if part in (None, step.part) and only in step.name]):
        raise MeasurementError(f"No step is called {only!r}; there are: {', '.join(step.name for step in STEPS)}.")
    found = _device_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    record = _read(folder)
    for name, value in (("device", found), ("dtype", dtype)):
        if record.setdefault(name, value) != value:
            raise MeasurementError(f"{folder} has results of {record[name]}, not {value}: choose another folder.")
    with _metadata() as path:
        for step in sorted(steps, key=lambda step: _has_result(record, step)):
            limit = min(step.limit, deadline - time.monotonic())
            if why := _why_not(step, device, limit, budget):
                outcome = Outcome(NOT_RUN, why)
            else:
                tell(f"{step.name}, at most {limit:.0f} s")
                outcome = _run(step, folder, device, dtype, limit, path)
            if outcome.state != NOT_RUN or not _has_result(record, step):
                record["steps"][step.name] = asdict(outcome)
                _write(folder, record)


def _device_name(device: str) -> str:
    """Returns the device's own name, which another process finds out: this one is not to use the device."""
    if device == "emulated":
        if not _EMULATED.exists():
            raise MeasurementError("The emulated device is among the tests of a checkout: run the command there.")
        return device
    answer = ask(torch_facts, {}, 120)
    if answer.facts is None:
        raise MeasurementError(f"torch cannot be used: {', '.join(answer.errors)}; run `wan-patches doctor`.")
    if not (names := answer.facts["devices"].get(device)):
        raise MeasurementError(
            f"torch sees no {device!r} device here; `wan-patches doctor` says why. "
            "With --device emulated, the command runs without one, at tiny sizes."
        )
    return str(names[0])


def _why_not(step: Step, device: str, limit: float, budget: float) -> str:
    if step.is_test and not _TESTS.exists():
        return "the tests are not beside the package"
    if step.is_test and device != "cuda":
        return "the tests need an NVIDIA GPU"
    if device == "emulated" and not step.tiny:
        return "it is left out on the emulated device"
    return f"the budget of {budget:.0f} s was used up" if limit < min(_LEAST, step.limit) else ""


def _run(step: Step, folder: Path, device: str, dtype: str, limit: float, path: str) -> Outcome:
    result, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    result.unlink(missing_ok=True)  # of an earlier run
    start = time.monotonic()
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(step, device, dtype, result),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings | {"PYTHONPATH": path},
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = round(time.monotonic() - start, 1)
    if status is None:
        return Outcome(STOPPED, f"it was stopped after {seconds:.0f} s", seconds)
    if status == 0:
        return Outcome(DONE, "", seconds)
    return Outcome(FINDING if status == 1 else FAILED, _last_line(log, status), seconds)


def _command(step: Step, device: str, dtype: str, result: Path) -> list[str]:
    words = shlex.split(step.tiny if device == "emulated" else step.command)
    if step.is_test:
        plain = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--override-ini", "addopts=--import-mode=importlib"]
        parallel = ["-n", "4"] if importlib.util.find_spec("xdist") and step.part > 1 else []
        return [sys.executable, "-m", *words, *plain, *parallel, str(_TESTS)]
    start = [str(_EMULATED)] if device == "emulated" else ["-m", "wan_patches"]
    if words[0] == "bench":
        words += ["--device", device, "--json", str(result)]
        words += [] if "--dtype" in words else ["--dtype", dtype]
        words += ["--no-parallel"] if words[1] == "vae" else []
        if device == "emulated":
            words += {"vae": ["--quick"]}.get(words[1], [])
            words += ["--no-compile", "--seconds", "0"] if words[1] in ("block", "model", "pipeline") else []
    return [sys.executable, *start, *words]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step with all processes that it has started."""
    kill = getattr(os, "killpg", None)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if kill is not None:
            kill(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _last_line(log: Path, status: int) -> str:
    if status < 0:
        return f"it was killed by {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"exit status {status}"


@contextlib.contextmanager
def _metadata() -> Iterator[str]:
    """Yields a PYTHONPATH with this package and, if it is not installed, with the metadata that names patches."""
    folders = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        yield os.pathsep.join(folders)
        return
    project = (_ROOT / "pyproject.toml").read_text()
    _, _, rest = project.partition(f'[project.entry-points."{ENTRY_POINT_GROUP}"]\n')
    points = re.sub('"', "", rest.partition("\n\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder, f"wan_patches-{wan_patches.__version__}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: wan-patches\nVersion: {wan_patches.__version__}\n"
        )
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{points}\n")
        yield os.pathsep.join([folder, *folders])


# The folder


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        record = {}
    except ValueError:
        raise MeasurementError(f"{folder / FILE} is not JSON: choose another folder.") from None
    record.setdefault("steps", {})
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    fresh = folder / f"{FILE}.new"
    fresh.write_text(json.dumps(record, indent=2) + "\n")
    fresh.replace(folder / FILE)


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Returns what became of each step so far, in the order of `STEPS`; a step that no run reached is not run."""
    steps = _read(folder)["steps"]
    return {
        step.name: Outcome(**steps[step.name]) if step.name in steps else Outcome(NOT_RUN, f"part {step.part}")
        for step in STEPS
    }


def _has_result(record: Mapping[str, Any], step: Step) -> bool:
    return record["steps"].get(step.name, {}).get("state", NOT_RUN) != NOT_RUN


# The report


@dataclass(frozen=True)
class Verdict:
    """A judgement of a measurement, in a few words."""

    is_ok: bool
    text: str


def report(folder: Path) -> Group:
    """Returns what to mend, what is well and what did not run, as far as the results in `folder` go."""
    found = Table(box=None, show_header=False, pad_edge=False)
    verdicts = list(_verdicts(folder))
    for verdict in verdicts:
        if not verdict.is_ok:
            found.add_row("MEND", verdict.text)
    if well := [verdict.text for verdict in verdicts if verdict.is_ok]:
        found.add_row("OK", "; ".join(well))
    left: dict[str, list[str]] = {}
    for name, outcome in outcomes(folder).items():
        if outcome.state == NOT_RUN:
            left.setdefault(outcome.why, []).append(name)
        elif outcome.state != DONE:
            found.add_row(outcome.state.upper(), f"{name}: {outcome.why} ({name}.log)")
    for why, names in left.items():
        found.add_row(NOT_RUN.upper(), f"{', '.join(names)}: {why}")
    return Group(_headline(folder), "", found)


def status(folder: Path) -> int:
    """Returns the exit status: 1 if bits or tests differ, 2 if a step failed or was stopped, else 0."""
    states = {outcome.state for outcome in outcomes(folder).values()}
    return 1 if FINDING in states else 2 if states & {FAILED, STOPPED} else 0


def _headline(folder: Path) -> str:
    record = _read(folder)
    states = [outcome.state for outcome in outcomes(folder).values()]
    facts: Mapping[str, Any] = next((content["machine"] for _, content in _results(folder)), {})
    versions = [f"{package} {facts[package]}" for package in ("torch", "triton", "diffusers") if package in facts]
    rows = [row for _, content in _results(folder) for row in content["rows"]]
    copies = [row["copy_gb_s"] for row in rows if row.get("copy_gb_s")]
    bandwidth = f"a copy: {max(copies):,.0f} GB/s" if copies and _is_timed(record) else ""
    about = ", ".join(filter(None, [record.get("device"), record.get("dtype"), *versions, bandwidth]))
    note = "" if _is_timed(record) else " Times mean nothing there and are not judged."
    return f"{about}: {states.count(DONE)} of {len(states)} steps done.{note}"


def _is_timed(record: Mapping[str, Any]) -> bool:
    return record.get("device") != "emulated"


def _results(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the JSON of each step that wrote any."""
    for step in STEPS:
        with contextlib.suppress(FileNotFoundError, ValueError):
            yield step.name, json.loads((folder / f"{step.name}.json").read_text())


def _verdicts(folder: Path) -> Iterator[Verdict]:
    is_timed = _is_timed(_read(folder))
    for name, content in _results(folder):
        if "bench" in content:
            yield from _of_variants(variants.from_json(content), is_timed)
        elif any("form" in row for row in content["rows"]):
            yield from _of_forms(name, content["rows"], is_timed)
        else:
            yield from _of_operations(name, content["rows"], is_timed)


def _of_variants(result: variants.Result, is_timed: bool) -> Iterator[Verdict]:
    subject = variants.describe(result)
    if different := result.different():
        yield Verdict(False, f"{subject}: NOT exact: {', '.join(different)}")
    else:
        yield Verdict(True, f"{subject}: exact")
    for row in result.rows:
        if row.reason and row.reason != "no active patch changes rounding":
            yield Verdict(False, f"{subject}, {row.way}: {row.reason}")
    if not is_timed:
        return
    for goal in readme.GOALS:
        number = goal.read(result) if goal.fits(result, on_cpu=False) else None
        if number is not None:
            met, reached = goal.is_met(number), f"{goal.what}: {goal.shown(number)} of {goal.of}"
            yield Verdict(met, reached if met else f"{reached}, want {goal.shown(goal.limit)}")
    for way, rival, speed in result.slower():
        yield Verdict(False, f"{subject}: {way} is {speed:.2f} times as fast as {rival}")


def _of_forms(name: str, rows: list[dict[str, Any]], is_timed: bool) -> Iterator[Verdict]:
    if wrong := [row for row in rows if row["exact"] is False]:
        yield Verdict(False, f"{name}: NOT exact: {'; '.join(dict.fromkeys(row['op'] for row in wrong))}")
    else:
        yield Verdict(True, f"{name}: {sum(row['exact'] is True for row in rows)} exact")
    usual = [row for row in rows if "convolutions" not in row["input"]]  # a layout that some forms leave to stock
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in usual:
        subjects.setdefault(_subject(row), []).append(row)
    for subject, all_sizes in subjects.items():
        largest = max(map(_elements, all_sizes))
        of_subject = [row for row in all_sizes if _elements(row) == largest]
        for reason in dict.fromkeys(row["reason"] for row in of_subject if row["reason"]):
            yield Verdict(False, f"{subject}: {reason}")
        shares = [(row["of_copy"], row["input"]) for row in of_subject if row["kernels"] and row["of_copy"]]
        if is_timed and shares and name != "kernels":  # whose sizes are too small
            share, kind = min(shares)
            well = share >= WANTED_OF_COPY
            more = "" if well else f", want {WANTED_OF_COPY * 100:.0f} ({kind or 'one kind'})"
            yield Verdict(well, f"{subject}: {share * 100:.0f} % of a copy{more}")
    slow = [row for row in usual if row["share"] and row["share"] > 1 / SLOWER]
    if is_timed and slow:
        worst = max(slow, key=lambda row: row["share"])
        of_worst = f"{worst['op']} {worst['shape']} takes {worst['share']:.2f} of it"
        yield Verdict(False, f"{name}: {len(slow)} of {len(usual)} forms are slower than the reference; {of_worst}")


def _subject(row: Mapping[str, Any]) -> str:
    """Returns an op and the model that its channels are from; the dtype only if it is fp32."""
    _, _, *channels = row["shape"].split("x")
    width = _elements({"shape": "x".join(channels or "1")})
    subject = f"{row['op']} {_WIDTHS.get(width, row['input'])}".strip()
    return f"{subject}, fp32" if row["dtype"] == "fp32" else subject


def _elements(row: Mapping[str, Any]) -> int:
    return math.prod(map(int, row["shape"].split("x")))


def _of_operations(name: str, rows: list[dict[str, Any]], is_timed: bool) -> Iterator[Verdict]:
    def called(row: Mapping[str, Any]) -> str:
        return f"{row['op']} {row['shape']}, {row['dtype']}"

    wrong = [called(row) for row in rows if not row["exact"]]
    yield Verdict(not wrong, f"{name}: NOT exact: {'; '.join(wrong)}" if wrong else f"{name}: {len(rows)} exact")
    for row in rows if is_timed else ():
        if row["ratio"] < SLOWER:
            yield Verdict(False, f"{called(row)}: {row['ratio']:.2f} times as fast as stock")
        if row["op"].startswith("decode"):
            for what, (unit, wanted) in WANTED_OF_DECODE.items():
                if row[f"stock_{unit}"] and row[f"patched_{unit}"] is not None:
                    share = row[f"patched_{unit}"] / row[f"stock_{unit}"]
                    more = "" if share <= wanted else f", want {wanted:.2f}"
                    yield Verdict(share <= wanted, f"{called(row)}: {share:.2f} of stock's {what}{more}")
