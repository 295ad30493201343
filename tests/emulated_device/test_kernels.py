"""Kernels in Triton's interpreter on an emulated device: whole pipelines, and the tests of operations on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.npu_emulated

FOLDER = Path(__file__).parent
NIGHTLY = pytest.param("slow or not slow", marks=pytest.mark.slow, id="all")


@pytest.fixture
def on_emulated_device(_device: object) -> Callable[..., None]:  # builds it, or says why not
    """Runs pytest with the device in a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")

    def run(*arguments: str, timeout: int = 500) -> None:
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "with_kernels", "-p", "no:cacheprovider", "--tb=short", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout, done.stdout

    return run


@pytest.mark.parametrize("marks", ["not slow", NIGHTLY])
def test_whole_pipelines(marks, on_emulated_device):
    on_emulated_device(str(FOLDER / "interpreted" / "pipelines.py"), "-m", marks)


@pytest.mark.parametrize("cases", ["names", pytest.param("all", marks=pytest.mark.slow)])
def test_operations_as_on_a_gpu(cases, on_emulated_device):
    on_emulated_device(
        *(str(FOLDER.parent / "test_gpu.py"), "-p", "order_of_cuda"),
        *("-m", "gpu", "-k", "bits_of or further", "--cases", cases),
    )
