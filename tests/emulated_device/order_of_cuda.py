"""Operations of the emulated device that have the order of NVIDIA GPUs, where CPUs have another.

Norms follow the emulation of ATen's kernel, and SiLU divides by a sum with NumPy's exponential, which is that of
Triton's interpreter. EXACT kernels can then have the bits of these operations, as on a GPU. As a pytest plugin
(`-p order_of_cuda`) for all tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_EMULATION = Path(__file__).parents[1] / "ops" / "triton" / "interpreted" / "aten.py"


def pytest_configure() -> None:
    _stay.enter_context(operations())


def pytest_unconfigure() -> None:
    _stay.close()


_stay = contextlib.ExitStack()


@contextlib.contextmanager
def operations() -> Iterator[None]:
    """Replaces layer norm, RMS norm and SiLU of the emulated device in the block."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("native_layer_norm", _layer_norm, "PrivateUse1")
    library.impl("rms_norm", _rms_norm, "PrivateUse1")
    library.impl("silu", _silu, "PrivateUse1")
    library.impl("silu_", lambda x: x.copy_(_silu(x)), "PrivateUse1")
    try:
        yield
    finally:
        library._destroy()


def _layer_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed = _aten().layer_norm(_rows(x, shape), _parameter(weight), _parameter(bias), eps)
    return _like(x, normed), x.new_empty(0), x.new_empty(0)  # statistics are autograd's


def _rms_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = np.float32(1) if weight is None else _parameter(weight)
    return _like(x, _aten().rms_norm(_rows(x, shape), scale, eps))


def _silu(x: torch.Tensor) -> torch.Tensor:
    with np.errstate(over="ignore"):
        values = x.cpu().float().numpy()
        return _like(x, values / (np.float32(1) + np.exp(-values)))


def _rows(x: torch.Tensor, shape: list[int]) -> Any:
    return x.cpu().float().reshape(-1, math.prod(shape)).numpy()


def _parameter(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().float().flatten().numpy()


def _like(x: torch.Tensor, values: Any) -> torch.Tensor:
    return torch.empty_like(x).copy_(torch.from_numpy(values).reshape(x.shape))


_loaded: dict[str, Any] = {}


def _aten() -> Any:
    """Returns the emulation of ATen's norms."""
    if not _loaded:
        spec = importlib.util.spec_from_file_location("aten", _EMULATION)
        assert spec is not None
        assert spec.loader is not None
        _loaded["aten"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return _loaded["aten"]
