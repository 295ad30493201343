"""`wan-patches profile`: what it hands on, and what keeps it from running the script."""

from __future__ import annotations

import contextlib

import pytest
from typer.testing import CliRunner

import wan_patches
from wan_patches import cli
from wan_patches.cli.shared import Outside
from wan_patches.diagnostics import profiling


@pytest.mark.parametrize(
    ("options", "trace"),
    [([], None), (["--no-copies"], False), (["--trace", "t.json"], True), (["--trace", "t.json", "--no-copies"], True)],
)
def test_copies_are_counted_by_default(options, trace, monkeypatch, tmp_path):
    given = []

    @contextlib.contextmanager
    def profile(pipe=None, *, trace=None):
        given.append(trace)
        yield profiling.Profile()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setattr("wan_patches.diagnostics.script_runner.run", lambda *args, **kwargs: None)
    with pytest.raises(Outside) as outside:
        cli.app(["profile", *options, "script.py"], standalone_mode=False)
    outside.value.action()
    assert given == [trace]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/p.json", "script.py"], "there is no folder"),
        (["--json", ".", "script.py"], "is a folder"),
        (["--patches", "rope,nope", "script.py"], "unknown patch nope"),
        (["--fidelity", "near", "script.py"], "'near' is not one of exact, close"),
    ],
)
def test_user_errors_are_reported_before_the_script_runs(arguments, message):
    done = CliRunner().invoke(cli.app, ["profile", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_profile_accepts_the_options_of_run(monkeypatch):
    with pytest.raises(Outside):
        cli.app(["profile", "--fidelity", "close", "--no-gate", "script.py"], standalone_mode=False)
    choice = wan_patches._registry.chosen()
    assert (choice.fidelity, choice.gate) == (wan_patches.Fidelity.CLOSE, False)


def test_missing_matplotlib_is_reported_before_the_script_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    done = CliRunner().invoke(cli.app, ["profile", "--chart", "p.png", "script.py"])
    assert done.exit_code == 2
    assert 'pip install "wan-patches[demo]"' in done.output
