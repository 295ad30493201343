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
    """The interpreter cuts digits off where it makes bf16 of fp32; GPUs round to the nearest, like torch."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, to.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    from wan_patches.ops import proof

    monkeypatch.setattr(proof, "ROWS", 64)
