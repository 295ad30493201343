"""Kernels for GPUs. Triton is imported only where one is about to run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch


def is_usable(device: torch.device) -> bool:
    """Whether kernels run on tensors of `device`, as far as is known here."""
    return device.type == "cuda" and _is_installed()


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one, which is where Triton launches, wherever the arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
