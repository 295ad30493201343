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
