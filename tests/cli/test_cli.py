"""The command line as a whole: what it prints, how fast it starts, how it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import wan_patches
from wan_patches import cli
from wan_patches.cli import options, shared


def _run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("arguments", [[], ["demo"], ["profile"], ["bench"], ["bench", "ops"]])
def test_help_imports_neither_torch_nor_diffusers(arguments):
    code = f"""
import sys
from wan_patches.cli import app
app({[*arguments, "--help"]!r}, standalone_mode=False)
assert not {{"torch", "diffusers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "wan_patches", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == wan_patches.__version__


def test_status_prints_the_table():
    done = _run("status", "--import")
    assert done.exit_code == 0
    assert "active" in done.output
    assert "waiting for import" not in done.output


@pytest.mark.parametrize(("command", "extra"), [(["demo"], "demo"), (["bench", "ops"], "bench")])
def test_a_missing_extra_is_named_in_one_sentence(command, extra, monkeypatch):
    monkeypatch.setitem(shared.NEEDS, extra, ("transformers", "a_package_that_is_not_there"))
    done = _run(*command)
    assert done.exit_code == 2
    assert done.output.splitlines() == [
        f'Error: this command needs a_package_that_is_not_there: pip install "wan-patches[{extra}]"'
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "toaster"], "The device 'toaster' cannot be used"),
        (["--dtype", "fp7"], "'fp7' is not one of fp32, bf16, fp16"),
        (["--image", "no-such-photo.jpg"], "Cannot read the image no-such-photo.jpg"),
        (["--size", "100x100"], "width and height have to be multiples of 16"),
    ],
)
def test_user_errors_are_reported_without_a_traceback(arguments, message):
    done = _run("demo", "--device", "cpu", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("size", ["320", "0x320", "320x", "320xmany"])
def test_a_size_is_width_and_height(size):
    done = _run("demo", "--size", size)
    assert done.exit_code == 2
    assert "WIDTHxHEIGHT" in done.output


@pytest.fixture(scope="module")
def broken_torch(tmp_path_factory):
    """What `pip install torch_npu` leaves on a machine without CANN: `import torch` fails."""
    folder = tmp_path_factory.mktemp("broken")
    package, info = folder / "torch_npu", folder / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (folder / "script.py").write_text("print('ran')\n")
    return folder


@pytest.mark.parametrize(
    ("command", "autoload", "what"),
    [
        (["verify", "tiny:wan_t2v"], "1", "torch"),
        (["verify", "tiny:wan_t2v"], "0", "diffusers"),
        pytest.param(["demo"], "1", "torch", marks=pytest.mark.slow),
        pytest.param(["bench", "ops"], "1", "torch", marks=pytest.mark.slow),
        pytest.param(["profile", "script.py"], "1", "torch", marks=pytest.mark.slow),
    ],
)
def test_a_broken_torch_is_reported_in_one_line(command, autoload, what, broken_torch):
    environment = os.environ | {"PYTHONPATH": str(broken_torch), "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = subprocess.run(
        [sys.executable, "-m", "wan_patches", *command],
        cwd=broken_torch, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]  # libraries may have said something before
    assert line.startswith(f"Error: {what} cannot be imported: ")
    assert "Traceback" not in done.stderr
    assert "libhccl.so: cannot open shared object file" in line
    assert line.endswith("; run `wan-patches doctor`")


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "overhead", "--json", "/nowhere/rows.json"],
        ["bench", "ops", "--json", "/proc/rows.json"],
        ["bench", "transport", "--json", "/"],
        ["bench", "vae", "--json", "/proc/rows.json"],
        ["bench", "block", "--json", "/proc/rows.json"],
        ["bench", "sharding", "--json", "/proc/rows.json"],
        ["bench", "compatibility", "--json", "/proc/records"],
        ["bench", "gpu", "--out", "/proc/folder"],
        ["verify", "tiny:wan_t2v", "--json", "/"],
        ["verify", "tiny:wan_t2v", "--report", "/proc/report.html"],
        ["demo", "--out", "/proc/demo"],
    ],
)
def test_unwritable_files_are_reported_before_the_command_runs(command, monkeypatch):
    monkeypatch.setattr(shared, "require", lambda *modules: pytest.fail("it has begun"))
    done = _run(*command)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("Error: ")


@pytest.mark.parametrize("command", [["run", "script.py"], ["profile", "script.py"], ["verify", "tiny:wan_t2v"]])
@pytest.mark.parametrize("option", [["--patches", "rpoe"], ["--fidelity", "near"]])
def test_misspelt_patches_and_fidelities_exit_with_2(command, option):
    name, *rest = command
    done = _run(name, *option, *rest)
    assert done.exit_code == 2
    said = "unknown patch rpoe" if "rpoe" in option else "'near' is not one of exact, close"
    assert said in " ".join(done.output.replace("│", " ").split())


def test_the_names_of_the_command_line_are_those_that_there_are():
    from wan_patches.bench.measure import DTYPES
    from wan_patches.bench.shapes import SHAPES
    from wan_patches.testing import families, names, relatives

    ours = {patch.name for patch in wan_patches._registry.patches() if patch.module.startswith("diffusers.")}
    assert set(options.PATCHES) == ours
    assert tuple(DTYPES) == options.DTYPES
    assert tuple(SHAPES) == options.SHAPES
    assert tuple(fidelity.value for fidelity in wan_patches.Fidelity) == options.FIDELITIES
    assert tuple(families.FAMILIES) == names.FAMILIES
    assert tuple(relatives.RELATIVES) == names.RELATIVES


@pytest.mark.parametrize(
    "command",
    [["verify", "tiny:wan_t3v"], ["bench", "compatibility", "flux"], ["bench", "compatibility", "--others", "wan_t2v"]],
)
def test_unknown_families_are_refused_before_torch_is_imported(command):
    code = f"import sys\nfrom wan_patches.cli import app\ntry: app({command})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "is not one of" in done.stderr
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "tiny:wan_t2v", "--patches", "rpoe"],
        ["verify", "tiny:wan_t2v", "--dtype", "fp8"],
        ["run", "--patches", "rope", "--patches", "rpoe", "script.py"],
        ["bench", "block", "--shape", "nope"],
        ["bench", "gpu", "--out", "x", "--device", "tpu"],
    ],
)
def test_a_wrong_name_is_refused_before_torch_is_imported(arguments):
    code = f"""
import sys
from wan_patches.cli import app
try:
    app({arguments!r})
except SystemExit as error:
    assert error.code == 2, error.code
assert not {{"torch", "diffusers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_has_a_short_form():
    assert "Usage" in _run("bench", "-h").output


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with shared.progress("loading") as tell:
        tell("stock")
    assert capsys.readouterr().err == "loading\nstock\n"
