"""Public methods compile as stock's do: whole where stock's do, with as many graph breaks, and to the same bits."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

import wan_patches

pytestmark = [pytest.mark.upstream]

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _fresh(one_thread):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


