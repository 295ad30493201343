"""Run with TRITON_INTERPRET=1, by the tests one folder up. They share `comparing`, so their folder is on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _interpreter():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton does not interpret")


@pytest.fixture(autouse=True)
def _rounding_to_bf16(monkeypatch):
    from rounding import rounding
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding(InterpreterBuilder.cast_impl))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    from wan_patches.ops import proof

    monkeypatch.setattr(proof, "ROWS", 64)
