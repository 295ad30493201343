"""`wan-patches bench gpu`: steps that crash, hang or come too late, the folder, and the report. No GPU is needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from dataclasses import asdict

import psutil
import pytest
import typer
from typer.testing import CliRunner

from wan_patches.bench import forms, gpu, ops, variants
from wan_patches.bench.gpu import DONE, FAILED, FILE, FINDING, NOT_RUN, STOPPED, Step
from wan_patches.cli import app
from wan_patches.diagnostics.doctor.probes import Answer
from wan_patches.tables import text


def _gpu(*arguments):
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, arguments)])


# Running

SCRIPTS = {
    "well": 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"machine": {}, "rows": []}\')',
    "differs": "import sys; sys.exit('Error: NOT bit-identical: rope')",  # status 1
    "fails": "import sys; print('Error: no memory'); sys.exit(2)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)",
}


@pytest.fixture
def steps(monkeypatch):
    """Steps, by the names of `SCRIPTS`, on a device called "A GPU"."""

    def use(*names, limit=60):
        monkeypatch.setattr(gpu, "STEPS", tuple(Step(name, 1, limit, f"bench {name}", "") for name in names))

    def command(step, device, dtype, result):
        return [sys.executable, "-c", SCRIPTS[step.name], str(result)]

    monkeypatch.setattr(gpu, "_command", command)
    monkeypatch.setattr(gpu, "_device_name", lambda device: "A GPU")
    return use


def _run(folder, budget=100.0, told=None, **options):
    given = {"part": None, "dtype": "bf16", "device": "cuda"} | options
    gpu.run(folder, budget=budget, tell=(lambda line: None) if told is None else told, **given)
    return gpu.outcomes(folder)


def test_nothing_that_goes_wrong_ends_the_rest(steps, tmp_path):
    steps("crashes", "fails", "differs", "well")
    found = _run(tmp_path)
    assert {name: outcome.state for name, outcome in found.items()} == {
        "crashes": FAILED, "fails": FAILED, "differs": FINDING, "well": DONE,
    }  # fmt: skip
    assert found["crashes"].why == "it was killed by SIGSEGV"
    assert found["fails"].why == "Error: no memory"
    assert found["differs"].why == "Error: NOT bit-identical: rope"
    said = text(gpu.report(tmp_path))
    assert re.search(r"^FAILED +fails: Error: no memory \(fails.log\)", said, re.M)
    assert (tmp_path / "fails.log").read_text() == "Error: no memory\n"


def test_a_step_that_hangs_is_ended_with_its_own_processes(steps, tmp_path):
    steps("hangs", "well", limit=3)
    start = time.monotonic()
    found = _run(tmp_path)
    assert time.monotonic() - start < 30
    assert (found["hangs"].state, found["well"].state) == (STOPPED, DONE)
    child = int((tmp_path / "hangs.log").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_every_step_is_on_disk_before_the_next_begins(steps, tmp_path):
    steps("well", "fails")
    seen = []

    def told(line):
        path = tmp_path / FILE
        seen.append(list(json.loads(path.read_text())["steps"]) if path.exists() else [])

    _run(tmp_path, told=told)
    assert seen == [[], ["well"]]


def test_a_budget_that_runs_out_leaves_the_rest_and_the_next_run_begins_there(steps, tmp_path):
    steps("well", "fails", "differs")
    order = []
    found = _run(tmp_path, budget=0.0)
    assert {outcome.state for outcome in found.values()} == {NOT_RUN}
    assert "the budget of 0 s was used up" in text(gpu.report(tmp_path))
    _run(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(_without(tmp_path, "differs")))
    _run(tmp_path, told=lambda line: order.append(line.partition(",")[0]))
    assert order == ["differs", "well", "fails"]
    assert _run(tmp_path, budget=0.0)["well"].state == DONE  # what was measured before stays


def _without(folder, name):
    record = json.loads((folder / FILE).read_text())
    del record["steps"][name]
    return record


def test_parts_add_up_in_one_folder_of_one_device(steps, tmp_path, monkeypatch):
    steps("well", "fails")
    monkeypatch.setattr(gpu, "STEPS", (gpu.STEPS[0], Step("fails", 2, 60, "bench fails", "")))
    assert _run(tmp_path, part=1)["fails"].state == NOT_RUN
    found = _run(tmp_path, part=2)
    assert [outcome.state for outcome in found.values()] == [DONE, FAILED]
    monkeypatch.setattr(gpu, "_device_name", lambda device: "Another GPU")
    done = _gpu("--out", tmp_path)
    assert done.exit_code == 2
    assert f"{tmp_path} has results of A GPU, not Another GPU: choose another folder." in done.output


def test_results_of_an_earlier_run_do_not_survive_a_failure(steps, tmp_path, monkeypatch):
    steps("well")
    _run(tmp_path)
    assert (tmp_path / "well.json").exists()
    monkeypatch.setitem(SCRIPTS, "well", SCRIPTS["fails"])
    assert _run(tmp_path)["well"].state == FAILED
    assert not (tmp_path / "well.json").exists()


@pytest.mark.parametrize(("names", "status"), [(("well",), 0), (("well", "fails"), 2), (("fails", "differs"), 1)])
def test_exit_status(names, status, steps, tmp_path):
    steps(*names)
    assert _gpu("--out", tmp_path / "new").exit_code == status


def test_without_a_gpu_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ask", lambda *_: Answer({"devices": {}}))
    done = _gpu("--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "Error: torch sees no 'cuda' device here; `wan-patches doctor` says why." in done.output
    assert not (tmp_path / "new").exists()


def test_a_torch_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ask", lambda *_: Answer(None, ("ImportError: libcuda", "OSError: no")))
    done = _gpu("--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "ImportError: libcuda, OSError: no; run `wan-patches doctor`" in done.output


def test_a_folder_that_cannot_be_used(tmp_path, steps):
    steps("well")
    assert _gpu("--out", "/proc/folder").exit_code == 2
    (tmp_path / FILE).write_text("{")
    done = _gpu("--out", tmp_path)
    assert (done.exit_code, "is not JSON" in done.output) == (2, True)


@pytest.mark.parametrize("step", gpu.STEPS, ids=lambda step: step.name)
def test_commands_are_ones_that_there_are(step, tmp_path):
    for device in ("cuda", "emulated"):
        if not (device == "emulated" and not step.tiny):
            words = gpu._command(step, device, "bf16", tmp_path / "x.json")
            if step.is_test:
                assert words[1:3] == ["-m", "pytest"]
            else:
                arguments = words[words.index("wan_patches") + 1 :] if device == "cuda" else words[2:]
                context = _parsed(arguments)
                assert context.params.get("device", device) == device


def _parsed(arguments):
    """The context of a command, which is parsed and not run."""
    command, parent = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
        parent = (
            command.make_context(name, list(arguments), parent=parent) if not hasattr(command, "commands") else None
        )
    return parent


def test_parts_fit_their_nine_minutes_if_no_step_needs_its_limit():
    assert {step.part for step in gpu.STEPS} == set(gpu.PARTS)
    assert all(step.limit < gpu.PART_SECONDS / 1.5 for step in gpu.STEPS)
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)


def test_a_checkout_that_is_not_installed_has_its_patches(monkeypatch):
    installed = {(point.name, point.value) for point in importlib.metadata.entry_points(group="wan_patches.patches")}
    with gpu._metadata() as path:
        assert path.split(os.pathsep)[0] == str(gpu._ROOT)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    with gpu._metadata() as path:
        folder = path.split(os.pathsep)[0]
        (made,) = importlib.metadata.distributions(path=[folder])
        assert {(point.name, point.value) for point in made.entry_points} == installed
        assert made.version
    assert not os.path.exists(folder)


# The report

MACHINE = {"device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "diffusers": "0.42.1"}


def _form(op, shape, gb, form_ms, *, input="one row", **more):
    row = forms.Row(op, input, shape, "bf16", "one kernel", "", 2.0, form_ms, True, gb, ("kernel",), 2800.0)
    return asdict(row) | {"share": row.share, "of_copy": row.of_copy} | more


def _operation(op, shape, stock, patched, exact=True, memory=(100.0, 60.0)):
    row = ops.Row(op, shape, "fp32", stock, patched, *memory, exact)
    return asdict(row) | {"ratio": row.ratio}


@pytest.fixture
def measured(tmp_path):
    """Writes results of steps, and returns the report on them."""

    def report(width=200, device="NVIDIA H100", **results):
        steps = {name.replace("_", "-"): content for name, content in results.items()}
        outcomes = {name: {"state": DONE, "why": "", "seconds": 1.0} for name in steps}
        (tmp_path / FILE).write_text(json.dumps({"device": device, "dtype": "bf16", "steps": outcomes}))
        for name, content in steps.items():
            content = {"rows": content} if isinstance(content, list) else content
            (tmp_path / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **content}))
        return text(gpu.report(tmp_path), width=width)

    return report


def test_kernels_are_judged_by_the_bandwidth_of_a_copy(measured):
    said = measured(
        forms=[
            _form("modulated norm", "1x32760x5120", 1.0, 1.0 / (0.71 * 2800) * 1e3),
            _form("modulated norm", "1x32760x5120", 1.0, 1.0 / (0.9 * 2800) * 1e3, input="two rows"),
            _form("modulated norm", "1x1x5120", 1e-6, 1.0),  # small: its share says nothing
            _form("rotary embedding", "1x32760x40x128", 1.0, 1.0 / (0.93 * 2800) * 1e3, input="rows"),
            _form(
                "gated residual", "1x32760x1536", 1.0, 1.0, form="", kernels=(), share=None, reason="Triton is broken"
            ),
        ]
    )
    assert said.startswith("NVIDIA H100, bf16, torch 2.11.0, triton 3.6.0, diffusers 0.42.1, a copy: 2,800 GB/s: 1 of")
    assert re.search(r"^MEND +modulated norm 14b: 71 % of a copy, want 85 \(one row\) *$", said, re.M)
    assert re.search(r"^MEND +gated residual 1.3b: Triton is broken *$", said, re.M)
    assert "rotary embedding 14b: 93 % of a copy" in said[said.index("OK ") :]


def test_bits_and_slow_forms_are_named(measured):
    said = measured(
        forms=[
            _form("rotary embedding", "1x32760x40x128", 1.0, 0.4, exact=False, input="rows"),
            _form("rotary embedding", "1x1x40x128", 1e-6, 3.0, input="rows"),
        ],
        ops=[_operation("rope", "1x2", 1.0, 1.25), _operation("frames to pil", "1x3", 1.0, 0.5, exact=False)],
    )
    assert "MEND" in said
    assert "forms: NOT exact: rotary embedding" in said
    assert "forms: 1 of 2 forms are slower than the reference; rotary embedding 1x1x40x128 takes 1.50 of it" in said
    assert "ops: NOT exact: frames to pil 1x3, fp32" in said
    assert "rope 1x2, fp32: 0.80 times as fast as stock" in said


def test_decode_and_forwards_have_goals(measured):
    rows = [variants.Row("stock", ms=3000.0, peak_mib=5000.0, exact=True)]
    rows += [variants.Row("patched", ms=2100.0, peak_mib=4000.0, exact=True)]
    rows += [variants.Row("compiled stock", ms=None, reason="Unsupported: a graph break")]
    result = variants.Result(
        **{"bench": "model", "shape": "14b-480p", "dtype": "bf16", "video": (21, 60, 104), "tokens": 32760},
        **{"layers": 40, "of_layers": 40, "rows": tuple(rows), "floor_ms": 2000.0, "matmuls": 406, "attentions": 80},
        **{"copy_gb_s": 2800.0, "deterministic": True, "patches": ("rope",)},
    )
    said = measured(
        vae_fp32_480p=[_operation("decode", "81x480x832", 10.0, 9.0), _operation("decode, Wan 2.2", "1x2", 10.0, 7.9)],
        model_14b_480p=variants.to_json(result),
    )
    assert "decode 81x480x832, fp32: 0.90 of stock's time, want 0.80" in said
    well = " ".join(said[said.index("OK ") :].split())
    assert "decode, Wan 2.2 1x2, fp32: 0.79 of stock's time" in well
    assert "forward, Wan 14B 480p: 1.050 of the floor, want 1.040" in said
    assert "compiled stock: Unsupported: a graph break" in said


def test_times_of_the_emulated_device_are_not_judged(measured):
    said = measured(device="emulated", forms=[_form("modulated norm", "1x32760x5120", 1.0, 9.0)])
    assert "Times mean nothing there and are not judged." in said
    assert "MEND" not in said
    assert "copy" not in said


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_report_fits_the_terminal_and_one_screen(width, measured):
    shapes = [f"1x32760x{width}" for width in (1536, 5120)] + ["1x32760x12x128"]
    rows = [
        _form(op, shape, 1.0, 0.4, input=kind)
        for op in ("modulated norm", "gated residual", "residual norm", "rotary embedding")
        for shape in shapes
        for kind in ("one row", "two rows", "a row per token")
    ]
    said = measured(width=width, forms=rows, kernels=rows, ops=[_operation("rope", "1x2", 1.0, 0.5)] * 20)
    assert max(map(len, said.splitlines())) <= width
    assert len(said.splitlines()) <= 24
