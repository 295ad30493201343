"""Two versions of a library, read and not imported; and that each upstream text is known in one place."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import pytest
from typer.testing import CliRunner

import wan_patches
from wan_patches import Patch, Replace, Target, cli
from wan_patches.diagnostics.upstream import ABSENT, KNOWN, Source, compare
from wan_patches.patching import fingerprints

ROOT = Path(__file__).parents[2]
SITE = Path(str(distribution("diffusers").locate_file("")))

OLD = """
class Base:
    def scaled(self, x: int) -> int:
        "Doubles."
        return x * 2

class Block(Base):
    def forward(self, x):
        return x + 1

def same(x):
    return x
"""
NEW = """
from .base import Base

class Block(Base):
    def forward(self, x):
        return x + 1 + 0

def same(x: float) -> float:
    "In other words."
    return x

def added(x):
    return x - 1
"""
BASE = """
class Base:
    def scaled(self, x):
        return x * 2
"""


def _edit(qualname, pattern, formerly=None):
    target = Target(qualname, (Replace(pattern, "f(X)"),), formerly)
    return Patch(name=qualname, module="diffusers.part.model", targets=(target,), calls={"f": "a:f"})


PATCHES = (
    _edit("Block.forward", "X + 1"),
    _edit("Block.scaled", "X * 2"),
    _edit("same", "X + 1"),
    _edit("added", "X - 1"),
    _edit("renamed", "X - 1", formerly="same"),
    _edit("gone", "X"),
)


@pytest.fixture
def versions(tmp_path):
    for version, files in (("1.0", {"model": OLD}), ("2.0", {"model": NEW, "base": BASE})):
        folder = tmp_path / version / "diffusers" / "part"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text(f'__version__ = "{version}"\n')
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
    return tmp_path / "1.0", tmp_path / "2.0"


def test_functions_are_compared_by_their_syntax_trees(versions):
    found = {function.qualname: function for function in compare(*map(Source, versions), PATCHES)}
    states = {name: (function.old, function.new, bool(function.diff)) for name, function in found.items()}
    assert states == {
        "Block.forward": (KNOWN, KNOWN, True),
        "Block.scaled": (KNOWN, KNOWN, False),  # in a base class, which has moved
        "added": (ABSENT, KNOWN, True),
        "renamed": (*["`X - 1` occurs 0 times, expected 1"] * 2, False),
        "same": (*["`X + 1` occurs 0 times, expected 1"] * 2, False),  # annotations and docstrings say nothing
    }
    assert "+        return x + 1 + 0" in found["Block.forward"].diff


def test_a_wheel_is_read_like_a_folder(versions, tmp_path):
    wheel = tmp_path / "diffusers-2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in versions[1].rglob("*.py"):
            archive.write(path, path.relative_to(versions[1]))
    source = Source(wheel)
    assert source.version == "2.0"
    assert source.function("diffusers.part.model", "Block.scaled")[1] == "def scaled(self, x):\n        return x * 2"
    assert source.function("diffusers.part.nowhere", "f") is None


def test_the_command_reports_lost_functions(versions, monkeypatch):
    monkeypatch.setattr(wan_patches._registry, "patches", lambda: PATCHES[:1])
    run = CliRunner().invoke
    done = run(cli.app, ["upstream", *map(str, versions), "--diff"])
    assert done.exit_code == 0
    assert "part.model.Block.forward" in done.output
    assert "+        return x + 1 + 0" in done.output
    assert "1 functions: 1 changed, 0 no longer known." in done.output
    text = versions[1] / "diffusers" / "part" / "model.py"
    text.write_text(NEW.replace("x + 1 + 0", "x"))
    done = run(cli.app, ["upstream", *map(str, versions)])
    assert done.exit_code == 1
    assert "1 no longer known" in done.output
    assert "occurs 0 times" in done.output
    for wrong in (versions[0] / "diffusers", text):
        done = run(cli.app, ["upstream", str(wrong), str(versions[1])])
        assert done.exit_code == 2
        assert str(wrong) in done.output


def test_everything_is_known_in_the_installed_version():
    source = Source(SITE)
    found = compare(source, source, wan_patches._registry.patches())
    assert len(found) > 60
    assert [function for function in found if function.old != KNOWN and "complex numbers" not in function.old] == []


def test_each_known_text_is_registered_once():
    places = Counter()
    for path in (ROOT / "wan_patches").rglob("*.py"):
        places.update(set(re.findall(r"[\"']([0-9a-f]{16})[\"']", path.read_text())))
    assert len(places) > 60
    assert [text for text, count in places.items() if count > 1] == []


def test_known_texts_are_passed_to_patches():
    (known,) = fingerprints.relied_on(fingerprints.AUTOENCODER, "WanUpsample.forward")
    assert known.fingerprints == {"9324770ad80c15cc"}
    assert not fingerprints.is_known(len, fingerprints.AUTOENCODER, "WanUpsample.forward")
    with pytest.raises(KeyError):
        fingerprints.relied_on(fingerprints.AUTOENCODER, "WanUpsample.forwards")
