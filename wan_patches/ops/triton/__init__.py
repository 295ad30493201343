"""Kernels for GPUs. Triton is imported only when a kernel is about to run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch


def is_usable(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`, as far as can be checked without importing Triton."""
    return device.type == "cuda" and _is_installed()


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches there, regardless of the arguments' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
