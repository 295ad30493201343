"""Where Triton is missing or broken, torch's operations take the place of kernels, and stock's that of both."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import wan_patches
from wan_patches.ops import modulation, rope
from wan_patches.ops import triton as kernels
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

BROKEN = {
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "cache not writable": PermissionError(13, "Permission denied", "/root/.triton/cache"),
    "driver too old": RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
    "no driver": AssertionError("libcuda.so cannot found!"),
}


@pytest.fixture
def fresh(any_size, monkeypatch):
    """Tensors on the CPU pass for such on a GPU; nothing is known of Triton."""
    from wan_patches.ops import dispatch

    monkeypatch.setattr(dispatch, "_device", lambda args: torch.device("cuda"))
    monkeypatch.setattr(kernels, "is_usable", lambda device: not kernels._failure())
    kernels._failure.cache_clear()
    yield
    kernels._failure.cache_clear()


def calls():
    """Returns an op, its arguments, and the form without a kernel."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 12, 64).bfloat16()
    cos, sin = torch.rand(2, 1, 12, 1, 16)
    return (
        (modulation.gated_residual, (x, y, torch.randn(1, 1, 64)), modulation.gated_residual_in_place),
        (rope.apply_rotary_emb, (x.unflatten(2, (2, 32)), cos, sin), rope.by_stacking),
    )


@torch.no_grad()
def check(reason, form_of=lambda form: form.name, times=3):
    """Every call has stock's bits and is served by that form; its table says why no kernel was."""
    for op, args, form in calls():
        for _ in range(times):
            assert torch.equal(op(*args), op.reference(*args))
        served = {way.form for way in tally.counted() if way.op == op.name and way.reason != tally.FIRST_SIGHT}
        assert served == {form_of(form)}
        kernel = op.forms[[form.name for form in op.forms].index("one kernel")]
        why = [v.reason for v in gate.verdicts() if v.op == op.name and v.form == kernel.name]
        assert reason in (why[0] if why else kernel.why_not(*args))


def test_missing_triton(fresh, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    check("Triton is not installed")
    assert all(verdict.exact for verdict in gate.verdicts())


def test_triton_that_cannot_be_imported_is_tried_once(fresh, monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    tried = tmp_path / "tried"
    (tmp_path / "triton" / "__init__.py").write_text(
        f"open({str(tried)!r}, 'a').write('once ')\nraise ImportError('libtriton.so: undefined symbol')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    check("Triton cannot be imported: ImportError: libtriton.so: undefined symbol")
    assert tried.read_text() == "once "


@pytest.fixture(params=BROKEN)
def failing(request, fresh, monkeypatch):
    """Launches raise this error; they are counted."""
    jit = pytest.importorskip("triton.runtime.jit")
    error, launches = BROKEN[request.param], []

    def run(kernel, *args, **kwargs):
        launches.append(kernel)
        raise error

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return error, launches


def test_launch_that_raises_is_tried_once_for_each_kind_of_input(failing):
    error, launches = failing
    check(f"raised {type(error).__name__}: {error}")
    assert len(launches) == len(calls())
    assert str(error) in " ".join(str(wan_patches.status()).split())


def test_stock_computes_if_torch_forms_raise_too(failing, monkeypatch):
    error, launches = failing

    def no_such_operation(*args):
        raise NotImplementedError("not on this device")

    for _, _, form in calls():
        monkeypatch.setattr(form, "function", no_such_operation)
    check(str(error), form_of=lambda form: "")
    assert len(launches) == len(calls())
    reasons = {way.reason for way in tally.counted()}
    assert all("not on this device" in reason and str(error) in reason for reason in reasons)
