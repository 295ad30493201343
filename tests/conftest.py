"""What every test starts from: no network, and stock diffusers."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest

import wan_patches

STAND_IN = Path(__file__).with_name("emulated_device") / "torch_npu_stand_in.py"


@pytest.fixture(autouse=True)
def _stock_before_and_after():
    wan_patches.disable()
    yield
    wan_patches.disable()


@pytest.fixture
def one_thread():
    """Small models only wait for more, and much so on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_npu_stand_in(monkeypatch):
    """A module that stands where torch_npu and mindiesd would be; see its docstring."""
    spec = importlib.util.spec_from_file_location("torch_npu_stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (spec.name, "torch_npu", "mindiesd"):
        monkeypatch.setitem(sys.modules, name, module)
    from wan_patches.fidelity import gate
    from wan_patches.ops import npu

    npu.forget()
    gate.reset()
    yield module
    npu.forget()
    gate.reset()
