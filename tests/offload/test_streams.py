"""Streams for group offloading on a device that diffusers has not heard of, in the installed diffusers."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch

from wan_patches.offload import streams
from wan_patches.offload.streams import Streams, making, streams_on
from wan_patches.patching.codeswap import functions_behind, stock
from wan_patches.patching.rewrite import fingerprint

group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands a device in for the accelerator"),
]

DEVICE = torch.device("mps")  # torch knows the word everywhere; nothing is put there
KNOWS_ANY_DEVICE = hasattr(group_offloading, "TorchDeviceBackend")  # diffusers 0.41


class Stream:
    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """An accelerator with streams, as far as making hooks goes."""
    for name, value in (("Stream", Stream), ("current_stream", Stream), ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.mps, name, value, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: DEVICE)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
    return DEVICE


def hook(onload_device: Any) -> Any:
    """The stream that diffusers makes."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    group_offloading.apply_group_offloading(
        model, onload_device=onload_device, offload_type="leaf_level", use_stream=True
    )
    return model[0]._diffusers_hook.get_hook("group_offloading").group.stream


def code() -> Any:
    (function, *_) = functions_behind(group_offloading.apply_group_offloading, group_offloading.__file__)
    return function.__code__


def test_the_installed_diffusers_creates_streams_of_the_device(device):
    found = streams_on(device)
    assert found.usable, found.reason
    assert found.enabled_here != KNOWS_ANY_DEVICE
    with making(device, found):
        assert isinstance(hook(device), Stream)


@pytest.mark.skipif(KNOWS_ANY_DEVICE, reason="this diffusers makes streams of any device")
def test_streams_are_enabled_only_in_the_block_and_for_the_device(device):
    before = code()

    def refused(onload_device: Any) -> None:
        with pytest.raises(ValueError, match="requires a CUDA device"):
            hook(onload_device)

    refused(device)
    with making(device, streams_on(device)):
        assert code() is not before
        refused(torch.device("cuda"))  # which is not there
        hook(device)
    assert code() is before
    refused(device)
    with pytest.raises(KeyError), making(device, streams_on(device)):
        raise KeyError
    assert code() is before


@pytest.mark.skipif(KNOWS_ANY_DEVICE, reason="nothing is put in place")
def test_threads_do_not_disable_each_others_streams(device):
    found, failures = streams_on(device), []

    def work() -> None:
        for _ in range(20):
            try:
                with making(device, found):
                    hook(device)
            except ValueError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_cuda_is_left_to_diffusers():
    before = code()
    found = streams_on(torch.device("cuda"))
    assert found == Streams(True, False, "diffusers' own path")
    with making(torch.device("cuda"), found):
        assert code() is before


def test_a_device_without_streams_gets_none(device, monkeypatch):
    monkeypatch.delattr(torch.mps, "Stream")
    assert streams_on(device) == Streams(False, False, "torch.mps has no streams")


def test_versions_that_lose_weights_get_no_streams(device, monkeypatch):
    """Diffusers 0.33 and 0.34, on every device."""
    installed = fingerprint(stock(group_offloading.GroupOffloadingHook.pre_forward))
    monkeypatch.setattr(streams, "PRE_FORWARD_WITHOUT_WAIT", installed)
    for each in (device, torch.device("cuda")):
        found = streams_on(each)
        assert not found.usable
        assert "before its weights have arrived" in found.reason


@pytest.mark.skipif(KNOWS_ANY_DEVICE, reason="nothing is relied on")
def test_unknown_code_is_left_alone(device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", lambda group: None)
        found = streams_on(device)
        assert not found.usable
        assert "the text of ModuleGroup._offload_to_memory is not known" in found.reason
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("xpu"))
        assert "torch.accelerator gives xpu, not mps" in streams_on(device).reason
    assert streams_on(device).usable
