"""The emulated accelerator, once per session, and last: a process cannot forget a device."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("npu_emulated") is not None)


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated_device", Path(__file__).with_name("emulated_device.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device:
    """The counters of the emulated accelerator."""

    def __init__(self, counters: Any) -> None:
        self._counters = counters

    def reset(self) -> None:
        self._counters.reset()

    def uploads(self) -> Counter[int]:
        """How many copies to the device there were of each size in bytes."""
        return Counter(self._counters.host_to_device())

    def downloads(self) -> Counter[int]:
        return Counter(self._counters.device_to_host())

    def waits(self) -> Counter[str]:
        """How often the host waited, and for what."""
        return Counter(self._counters.syncs())

    def ops(self) -> Counter[str]:
        return Counter(self._counters.ops())


@pytest.fixture(scope="session")
def _device(request: pytest.FixtureRequest) -> Device:
    module = _module()
    if reason := module.missing():
        pytest.skip(f"the emulated accelerator cannot be built: {reason}")
    assert request.config.cache is not None
    version = f"torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
    return Device(module.install("npu", request.config.cache.mkdir("emulated_device") / version))


@pytest.fixture
def device(_device: Device, one_thread: None, any_size: None) -> Iterator[Device]:
    """The emulated accelerator `"npu"`, nothing counted yet and no verdict of the gate in force."""
    from wan_patches.patching.fidelity import gate

    gate.reset()
    _device.reset()
    yield _device
    gate.reset()


@pytest.fixture
def deep_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages of the emulated device cannot be copied deeply, as diffusion forcing does with its scheduler."""
    deeply: Any = torch.Tensor.__deepcopy__

    def copied(self: torch.Tensor, memo: Any) -> Any:
        return self.clone() if self.device.type == "npu" else deeply(self, memo)

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)
