"""What every test starts from: no network, and stock diffusers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest

import wan_patches


@pytest.fixture(autouse=True)
def _stock_before_and_after():
    wan_patches.disable()
    yield
    wan_patches.disable()


@pytest.fixture
def one_thread():
    """Small models only wait for more, and much so on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
