"""Describes the machine on which a measurement ran."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the facts that a measurement depends on: processor, threads, device, versions. No names, no paths."""
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
    }
    if device.type != "cpu" and hasattr(getattr(torch, device.type), "get_device_name"):
        facts["device"] = getattr(torch, device.type).get_device_name()
    if device.type == "cuda":
        facts |= _cuda() | _properties(torch.cuda.get_device_properties(device))
    for package in ("wan-patches", "torch", "torch-npu", "triton", "diffusers", "pillow", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def _cuda() -> dict[str, Any]:
    """Returns torch's CUDA or HIP toolkit and the driver: its version, or else the newest CUDA that it supports."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version") as file:
        if found := re.search(r"\s(\d+(?:\.\d+)+)\s", file.readline()):
            facts["driver"] = found[1]
    if "driver" not in facts and hasattr(torch._C, "_cuda_getDriverVersion"):
        number = torch._C._cuda_getDriverVersion()
        facts["driver"] = f"for CUDA {number // 1000}.{number % 1000 // 10}"
    return {name: value for name, value in facts.items() if value}


def _properties(found: Any) -> dict[str, Any]:
    """Returns a GPU's memory, multiprocessors, cache and architecture; torch's builds do not know all of them."""
    names = {"multi_processor_count": "multiprocessors", "L2_cache_size": "l2_bytes", "gcnArchName": "architecture"}
    facts: dict[str, Any] = {"memory_gib": round(found.total_memory / 2**30, 1)}
    facts |= {ours: getattr(found, name) for name, ours in names.items() if hasattr(found, name)}
    return facts | {"capability": f"{found.major}.{found.minor}"}


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for key, value in map(_pairs, file):
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _pairs(line: str) -> tuple[str, str]:
    key, _, rest = line.partition(":")
    return key, rest
