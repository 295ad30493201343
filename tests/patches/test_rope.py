"""Joint rotation of queries and keys in every model family, against stock."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.ops import rope
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

PAIRS = ["rope", "qk"]


def latents(pipe, name):
    torch.manual_seed(0)
    return np.asarray(pipe(**FAMILIES[name].inputs(output_type="latent")).frames)


@pytest.fixture
def pairs(as_on_cuda, monkeypatch):
    """Fills with the queries that were rotated together with keys, by what stands for the kernel here."""
    seen = []

    def both(query, key, cos, sin):
        seen.append(query)
        return rope.apply_rotary_emb.reference(query, cos, sin), rope.apply_rotary_emb.reference(key, cos, sin)

    monkeypatch.setattr(rope.both_by_kernel, "function", both)
    return seen


@pytest.mark.parametrize("name", available())
def test_processors_rotate_queries_and_keys_together(name, pairs):
    pipe = FAMILIES[name].build()
    pipe.set_progress_bar_config(disable=True)
    stock = latents(pipe, name)
    assert not pairs
    with wan_patches.enabled(PAIRS) as status:
        patched = latents(pipe, name)
    assert np.array_equal(stock, patched)
    complex_tables = {r.module for r in status.of("qk") if "as complex numbers" in r.reason}
    without = "qk" in FAMILIES[name].without or type(pipe.transformer).__module__ in complex_tables
    assert bool(pairs) is not without


def test_rotation_replaced_by_another_library_is_called(pairs):
    """Its function has the name and the calls, and another text."""
    from wan_patches.bindings.qk import rotate_both

    def apply_rotary_emb(x, cos, sin):
        return x + 1

    query, key = torch.randn(2, 1, 8, 2, 32)
    cos, sin = torch.randn(2, 1, 8, 1, 32)
    with wan_patches.enabled(PAIRS):
        rotated = rotate_both(apply_rotary_emb, query, key, cos, sin)
    assert torch.equal(rotated[0], query + 1)
    assert torch.equal(rotated[1], key + 1)
    assert not pairs


@pytest.mark.parametrize("names", [["qk"], ["rope"]])
def test_either_patch_alone_keeps_separate_calls(names, pairs):
    pipe = FAMILIES["wan_t2v"].build()
    pipe.set_progress_bar_config(disable=True)
    stock = latents(pipe, "wan_t2v")
    with wan_patches.enabled(names):
        assert np.array_equal(stock, latents(pipe, "wan_t2v"))
    assert not pairs


def test_autograd_sees_plain_torch(pairs):
    model = FAMILIES["wan_t2v"].build().transformer
    attention = model.blocks[0].attn1
    x = torch.randn(1, 8, attention.to_q.in_features)
    cos, sin = torch.randn(2, 1, 8, 1, attention.inner_dim // attention.heads)
    gradients = []
    for names in ([], PAIRS):
        with wan_patches.enabled(names):
            model.zero_grad()
            attention(x, rotary_emb=(cos, sin)).square().sum().backward()
        gradients.append(attention.to_q.weight.grad.clone())
    assert torch.equal(*gradients)
    assert not pairs
