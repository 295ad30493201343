"""`enable`, `disable`, `enabled` and `status`, on purpose-made modules and on diffusers."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import subprocess
import sys

import pytest

import wan_patches
from wan_patches import Fidelity, Patch, PatchError, Replace, Target
from wan_patches.patching import codeswap
from wan_patches.patching.registry import Registry

SOURCE = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x + 2\n"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Importable modules `made_a`, `made_b`, not imported yet."""
    for name in ("made_a", "made_b"):
        (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("made_a", "made_b"):
        sys.modules.pop(name, None)


def double(x):
    return 2 * x


def patch(name="double", module="made_a", functions=("f",), pattern="x + N", fidelity=Fidelity.EXACT, **more):
    edits = (Replace(pattern, "_double(x + N)"),)
    calls = more.pop("calls", {"_double": f"{__name__}:double"})
    return Patch(name, module, tuple(Target(f, edits) for f in functions), calls, fidelity, **more)


@pytest.fixture(autouse=True)
def _this_module_is_importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, importlib.import_module(__name__)))


def test_before_and_after_import(modules):
    registry = Registry([patch(), patch(module="made_b")])
    a = importlib.import_module("made_a")
    original = a.f.__code__
    status = registry.enable()
    assert [r.state for r in status.reports] == ["active", "waiting for import"]
    assert a.f(1) == 4
    b = importlib.import_module("made_b")
    assert b.f(1) == 4
    assert [r.state for r in registry.status().reports] == ["active", "active"]
    registry.disable()
    assert a.f(1) == b.f(1) == 2
    assert a.f.__code__ is original
    assert [r.state for r in registry.status().reports] == ["off", "off"]


def test_a_module_imported_while_disabled_stays_stock(modules):
    registry = Registry([patch()])
    registry.enable()
    registry.disable()
    assert importlib.import_module("made_a").f(1) == 2


def test_last_enable_wins(modules):
    a = importlib.import_module("made_a")
    registry = Registry(
        [patch("one"), patch("two", functions=("g",)), patch("loose", "made_b", fidelity=Fidelity.CLOSE)]
    )
    importlib.import_module("made_b")
    registry.enable(["one"])
    assert (a.f(1), a.g(1)) == (4, 3)
    registry.enable(["two"])
    assert (a.f(1), a.g(1)) == (2, 6)
    registry.enable()
    assert [r.state for r in registry.status().reports] == ["active", "active", "off"]
    registry.enable(fidelity="close")
    assert [r.state for r in registry.status().reports] == ["active"] * 3
    registry.enable("one")
    assert (a.f(1), a.g(1)) == (4, 3)
    registry.disable()


def test_close_patch_replaces_exact_patch_of_its_name(modules):
    a = importlib.import_module("made_a")
    original = a.f.__code__
    edits = (Replace("x + N", "-made_close(x + N)"),)
    close = Patch("one", "made_a", (Target("f", edits),), {"made_close": lambda n: n}, Fidelity.CLOSE)
    registry = Registry([patch("one"), close, patch("two", functions=("g",))])
    for _ in range(2):
        registry.enable()
        assert (a.f(1), a.g(1)) == (4, 6)
        registry.enable(fidelity="close")
        assert (a.f(1), a.g(1)) == (-2, 6)
        assert [r.state for r in registry.status().reports] == ["off", "active", "active"]
        registry.enable(fidelity="close")
        assert a.f(1) == -2
    with registry.enabled():
        assert a.f(1) == 4
    assert a.f(1) == -2
    registry.disable()
    assert a.f.__code__ is original


def test_exact_patch_stays_if_close_patch_does_not_recognise_the_code(modules):
    a = importlib.import_module("made_a")
    close = patch("one", pattern="x * N", fidelity=Fidelity.CLOSE)
    registry = Registry([patch("one"), close])
    registry.enable(fidelity="close")
    assert a.f(1) == 4
    assert [r.state for r in registry.status().reports] == ["active", "skipped"]


def test_enabled_nests_and_restores(modules):
    a = importlib.import_module("made_a")
    registry = Registry([patch("one"), patch("two", functions=("g",))])
    with registry.enabled(["one"]):
        with registry.enabled(["two"]):
            assert (a.f(1), a.g(1)) == (2, 6)
            registry.disable()
            assert (a.f(1), a.g(1)) == (2, 3)
        assert (a.f(1), a.g(1)) == (4, 3)
    assert (a.f(1), a.g(1)) == (2, 3)
    registry.enable(["two"])
    with pytest.raises(KeyError), registry.enabled(["one"]):
        raise KeyError
    assert (a.f(1), a.g(1)) == (2, 6)
    registry.disable()


def test_contexts_that_end_out_of_order_leave_nothing_installed(modules):
    a = importlib.import_module("made_a")
    registry = Registry([patch("one"), patch("two", functions=("g",))])
    first, second = registry.enabled(["one"]), registry.enabled(["two"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (a.f(1), a.g(1)) == (2, 6)
    second.__exit__(None, None, None)
    assert (a.f(1), a.g(1)) == (2, 3)


def test_patch_is_installed_all_or_nothing(modules, caplog):
    a = importlib.import_module("made_a")
    registry = Registry([patch(functions=("f", "missing")), patch("fine", functions=("g",))])
    with caplog.at_level(logging.WARNING, "wan_patches"):
        status = registry.enable()
    assert a.f(1) == 2
    assert a.g(1) == 6
    assert status.reports[0].state == "skipped"
    assert "there is no missing" in status.reports[0].reason
    assert len(caplog.records) == 1
    assert "there is no missing" in caplog.text
    caplog.clear()
    registry.enable()  # nothing new to say
    assert not caplog.records
    registry.disable()


def test_patches_that_share_a_function_are_installed_with_one_rewrite(modules, monkeypatch):
    rewritten, seen = codeswap.rewritten, []
    monkeypatch.setattr(codeswap, "rewritten", lambda *args: seen.append(args) or rewritten(*args))
    registry = Registry([patch("one"), patch("two", pattern="x + N"), edit_of_x("three")])
    a = importlib.import_module("made_a")
    original = a.f.__code__
    assert [r.state for r in registry.enable().reports] == ["active"] * 3
    assert a.f(1) == 2 * (2 * 1 + 1)
    assert len(seen) == 1
    registry.disable()
    assert a.f.__code__ is original


@pytest.mark.parametrize("fails", [{"functions": ("f", "gone")}, {"calls": {"_double": "gone:gone"}}])
def test_one_of_several_patches_that_share_a_function_can_fail(modules, fails):
    for order in (1, -1):
        registry = Registry([edit_of_x("fails", **fails), patch("holds")][::order])
        a = importlib.import_module("made_a")
        states = {report.name: report.state for report in registry.enable().reports}
        assert states == {"fails": "skipped", "holds": "active"}
        assert a.f(1) == 4
        registry.disable()
        assert a.f(1) == 2


def edit_of_x(name, functions=("f",), calls=None):
    edits = (Replace("x", "_double(x)"),)
    return Patch(name, "made_a", tuple(Target(f, edits) for f in functions), calls or {"_double": f"{__name__}:double"})


def test_an_edit_that_raises_is_rolled_back(modules):
    class Broken:
        def apply(self, function):
            raise RuntimeError("boom")

    a = importlib.import_module("made_a")
    broken = Patch("broken", "made_a", (Target("f", (Replace("x + 1", "x"),)), Target("g", (Broken(),))), {})
    registry = Registry([broken])
    assert "RuntimeError: boom" in registry.enable().reports[0].reason
    assert (a.f(1), a.g(1)) == (2, 3)


def test_strict_raises_and_keeps_the_earlier_selection(modules):
    a = importlib.import_module("made_a")
    registry = Registry([patch("good"), patch("bad", "made_b", pattern="x * N")])
    registry.enable(["good"])
    with pytest.raises(PatchError, match=r"bad in made_b: .*occurs 0 times"):
        registry.enable(strict=True)  # imports made_b to know
    assert a.f(1) == 4
    assert [r.state for r in registry.status().reports] == ["active", "off"]
    registry.disable()


def test_strict_raises_for_a_module_that_no_longer_exists():
    registry = Registry([patch(module="torch.no_such_module")])
    assert registry.enable().reports[0].state == "waiting for import"
    with pytest.raises(PatchError, match=r"torch\.no_such_module: there is no such module"):
        registry.enable(strict=True)


def test_strict_ignores_modules_that_are_newer_or_optional():
    younger = dataclasses.replace(patch("younger", "torch.no_such_module"), since="999")
    sometimes = dataclasses.replace(patch("sometimes", "torch.no_such_module_either"), optional=True)
    reports = Registry([younger, sometimes]).enable(strict=True).reports
    assert {report.state for report in reports} == {"waiting for import"}


def test_unknown_names_raise_value_error_with_known_names():
    known = ", ".join(sorted({report.name for report in wan_patches.status().reports}))
    with pytest.raises(ValueError, match=f"unknown patch nope; known: {known}$"):
        wan_patches.enable(["rope", "nope"])
    with pytest.raises(ValueError, match=r"unknown fidelity 'best'; known: 'exact', 'close'"):
        wan_patches.enable(fidelity="best")
    with wan_patches.enabled("rope, frames,"):
        assert wan_patches._registry.chosen().names == {"rope", "frames"}
    with pytest.raises(ValueError, match="unknown patch"), wan_patches.enabled(["nope"]):
        pass
    assert {report.state for report in wan_patches.status().reports} == {"off"}


def test_broken_plugin_does_not_affect_other_patches(monkeypatch):
    import importlib.metadata as metadata

    real = metadata.entry_points

    def entry_points(**params):
        broken = metadata.EntryPoint("theirs", "no_such_plugin:PATCHES", "wan_patches.patches")
        wrong = metadata.EntryPoint("wrong", "os:sep", "wan_patches.patches")
        return [*real(**params), broken, wrong]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    registry = Registry()
    status = registry.enable()
    assert "ModuleNotFoundError" in status.of("theirs")[0].reason
    assert "is not a wan_patches.Patch" in status.of("wrong")[0].reason
    assert status.of("rope")
    registry.disable()


def test_a_third_party_patch_is_found(modules, monkeypatch):
    import importlib.metadata as metadata

    a = importlib.import_module("made_a")
    monkeypatch.setattr(sys.modules[__name__], "PATCHES", (patch("theirs"),), raising=False)
    point = metadata.EntryPoint("theirs", f"{__name__}:PATCHES", "wan_patches.patches")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [point])
    registry = Registry()
    with registry.enabled(["theirs"]):
        assert a.f(1) == 4
    assert a.f(1) == 2


def test_status_prints_as_a_table():
    wan_patches.enable(["rope"])
    assert "rope" in str(wan_patches.status())
    text = str(wan_patches.status(verbose=True))
    assert "rope" in text
    assert "transformer_helios" in text
    assert "stack + flatten" in text


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import sys, wan_patches; s = wan_patches.enable(); print(s); "
    assert run_python(code + "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'imported'")


def test_enable_before_importing_diffusers_patches_what_is_imported_later():
    out = run_python(
        "import wan_patches; wan_patches.enable(['rope'])\n"
        "from diffusers.models.transformers.transformer_wan import WanAttnProcessor\n"
        "print([r.state for r in wan_patches.status().of('rope') if r.module.endswith('transformers.transformer_wan')"
        " and r.module.startswith('diffusers')])"
    )
    assert out.strip() == "['active']"


def test_a_hook_that_fails_does_not_break_the_import():
    out = run_python(
        "import wan_patches\n"
        "wan_patches.enable()\n"
        "def fail(*args, **kwargs): raise RuntimeError('planted')\n"
        "wan_patches._registry._apply = fail\n"
        "from diffusers.models.transformers.transformer_wan import WanTransformer3DModel\n"
        "print(WanTransformer3DModel.__name__)"
    )
    assert out.strip() == "WanTransformer3DModel"


def test_places_are_the_functions_that_patches_are_installed_in(modules):
    a = importlib.import_module("made_a")
    registry = Registry([patch("one"), patch("two", functions=("g",))])
    assert registry.places() == []
    with registry.enabled("two"):
        (place,) = registry.places()
        assert (place.patch.name, place.target.qualname, place.function) == ("two", "g", a.g)
        assert (place.function(1), place.stock(1)) == (6, 3)
        assert place.stock.__code__ is not a.g.__code__
    assert registry.places() == []


class Addition:
    """What a patch can put into a module besides edits, and whether that fails."""

    def __init__(self):
        self.module, self.error = None, None

    def put(self, module):
        if self.error is not None:
            raise self.error
        self.module = module

    def take(self):
        self.module = None


addition = Addition()


@pytest.fixture
def added():
    addition.__init__()
    return patch(addition=f"{__name__}:addition")


def test_addition_is_present_while_the_patch_is_installed(added, modules):
    registry = Registry([added])
    registry.enable()
    assert addition.module is None  # as the module is not there yet
    a = importlib.import_module("made_a")
    assert addition.module is a
    with registry.enabled([]):
        assert addition.module is None
    assert addition.module is a
    registry.disable()
    assert addition.module is None


def test_failing_addition_rolls_back_the_edits(added, modules):
    a = importlib.import_module("made_a")
    addition.error = RuntimeError("no room")
    (report,) = Registry([added]).enable().reports
    assert (report.state, report.reason) == ("skipped", "raised RuntimeError: no room")
    assert a.f(1) == 2


def test_no_addition_without_the_edits(modules):
    importlib.import_module("made_a")
    addition.__init__()
    (report,) = Registry([patch(pattern="x + 7", addition=f"{__name__}:addition")]).enable().reports
    assert report.state == "skipped"
    assert addition.module is None


def advise():
    return ["buy", "sell"]


def fail():
    raise RuntimeError("planted")


def test_advice_is_requested_for_loaded_modules_and_may_raise(modules):
    registry = Registry([patch(advice=f"{__name__}:advise"), patch("other", "made_b", advice=f"{__name__}:fail")])
    assert registry.enable().advice == ()
    importlib.import_module("made_a")
    assert registry.status().advice == ("buy", "sell")
    importlib.import_module("made_b")
    status = registry.status()
    assert status.advice[2:] == (f"{__name__}:fail raised RuntimeError: planted",)
    assert "sell" in str(status).splitlines()
