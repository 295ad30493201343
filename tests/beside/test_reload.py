"""Modules that are loaded anew: the state that is told is that of the code that runs."""

from __future__ import annotations

import importlib
import sys

import pytest

from wan_patches import Patch, Replace, Target
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.registry import Registry


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "made_to_reload.py").write_text("def f(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("made_to_reload")
    sys.modules.pop("made_to_reload", None)


def registry():
    edit = Replace("x + 1", "_ours(_stock, x)")
    calls = {"_ours": _ours, "_stock": STOCK}
    return Registry([Patch(name="p", module="made_to_reload", targets=(Target("f", (edit,)),), calls=calls)])


def _ours(stock, x):
    return 100 + stock(x)


@pytest.mark.parametrize("how", ["reload", "import again"])
@pytest.mark.parametrize("asked", ["status", "enable"])
def test_patches_are_put_in_again(how, asked, module):
    ours = registry()
    ours.enable()
    old = module.f
    assert old(1) == 102
    if how == "reload":
        module = importlib.reload(module)
    else:
        del sys.modules["made_to_reload"]
        module = importlib.import_module("made_to_reload")
    status = getattr(ours, asked)()
    assert status.reports[0].state == "active"
    assert module.f(1) == 102
    ours.disable()
    assert (module.f(1), old(1)) == (2, 2)


def test_a_function_that_others_have_replaced_is_not_called_active(module):
    ours = registry()
    ours.enable()
    module.f = lambda x: -x
    assert ours.status().reports[0].state == "skipped"
    assert module.f(1) == -1
    ours.disable()
    assert module.f(1) == -1
