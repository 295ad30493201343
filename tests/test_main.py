"""The command line: what it prints, how fast it starts, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import wan_patches
from wan_patches import __main__ as cli


def _run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["bench", "--help"], ["bench", "ops", "--help"]])
def test_help_imports_neither_torch_nor_diffusers(arguments):
    code = f"""
import sys
from wan_patches.__main__ import app
app({arguments!r}, standalone_mode=False)
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
    monkeypatch.setitem(cli._NEEDS, extra, ("transformers", "a_package_that_is_not_there"))
    done = _run(*command)
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        f'Error: a_package_that_is_not_there must be installed for this: pip install "wan-patches[{extra}]"'
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "toaster"], "The device 'toaster' cannot be used"),
        (["--dtype", "fp7"], "Unknown dtype 'fp7'; known: fp32, bf16, fp16."),
        (["--image", "no-such-photo.jpg"], "Cannot read the image no-such-photo.jpg"),
    ],
)
def test_what_the_user_can_mend_is_said_without_a_traceback(arguments, message):
    done = _run("demo", "--device", "cpu", *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("size", ["320", "0x320", "320x", "320xmany"])
def test_a_size_is_width_and_height(size):
    done = _run("demo", "--size", size)
    assert done.exit_code == 2
    assert "WIDTHxHEIGHT" in done.output


def test_bench_ops_writes_json(tmp_path, monkeypatch):
    from wan_patches.bench import ops

    monkeypatch.setattr(ops, "_cases", lambda quick: [ops._rope((1, 64, 2, 32))])
    done = _run("bench", "ops", "--quick", "--dtype", "fp32", "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    assert "1x64x2x32" in done.output
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["exact"] is True


def test_bench_ops_fails_where_a_bit_differs(monkeypatch):
    from wan_patches.bench import ops

    rows = [ops.Row("rope", "1x2", "bf16", 2.0, 1.0, None, None, exact=False)]
    monkeypatch.setattr(ops, "measure", lambda *args, **kwargs: rows)
    done = _run("bench", "ops")
    assert done.exit_code == 1
    assert "NOT bit-identical: rope 1x2." in done.output
