"""Facts about the machine."""

from __future__ import annotations

import types

import torch

from wan_patches.diagnostics import machine


def test_the_facts_of_a_gpu_contain_the_driver(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a: real(version if "nvidia" in str(path) else path, *a))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert machine._cuda() == {"cuda": "12.8", "driver": "570.86.15"}
    version.write_text("nothing")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert machine._cuda() == {"cuda": "12.8", "driver": "for CUDA 12.8"}


def test_a_gpu_is_described_as_far_as_torch_knows_it():
    known = types.SimpleNamespace(total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
    assert machine._properties(known) == {"memory_gib": 80.0, "multiprocessors": 132, "capability": "9.0"}
