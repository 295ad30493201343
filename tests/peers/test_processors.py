"""Beside cache-dit's and xDiT's attention processors: their bits, and calls that arrive. Needs those libraries."""

from __future__ import annotations

import importlib
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import wan_patches
from wan_patches.testing.families import FAMILIES

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("one_thread")]

CACHE_DIT = {
    "wan_t2v": ("cache_dit.distributed.transformers.wan", "__patch_WanAttnProcessor__call__"),
    "wan21_i2v": ("cache_dit.distributed.transformers.wan", "__patch_WanAttnProcessor__call__"),
    "chronoedit": ("cache_dit.distributed.transformers.chrono_edit", "__patch_ChronoEditWanAttnProcessor__call__"),
}
XDIT = "xfuser.model_executor.models.transformers.transformer_wan"


def model(name):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16)
    transformer = pipe.transformer
    captured = []

    def keep(module, args, kwargs):
        captured.append({**kwargs, "return_dict": False})

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**FAMILIES[name].inputs(steps=1, output_type="latent"))
    hook.remove()
    given = captured[-1]

    @torch.no_grad()
    def run():
        return transformer(**given)[0]

    return transformer, run


def counts(module):
    """Fast calls and all, of each patch of a module."""
    reports = [report for report in wan_patches.status().reports if report.module == module and report.ways]
    return {report.name: (report.fast, report.calls) for report in reports}


def cache_dit(name, monkeypatch):
    """Puts its function there, as it does for context parallelism, and gives what it takes of a processor."""
    module, function = CACHE_DIT[name]
    theirs = importlib.import_module(module)
    transformer, run = model(name)
    kind = type(transformer.blocks[0].attn1.processor)
    monkeypatch.setattr(kind, "_cp_config", None, raising=False)

    def put():
        monkeypatch.setattr(kind, "__call__", getattr(theirs, function))

    return module, put, run


def xdit(monkeypatch):
    pytest.importorskip("yunchang")
    with mock.patch("torch.backends.mps.is_available", return_value=True):  # it refuses to be imported on a CPU
        theirs = pytest.importorskip(XDIT)
    transformer, run = model("wan_t2v")

    def attend(query, key, value, **options):
        return F.scaled_dot_product_attention(query, key, value)

    def put():
        for block in transformer.blocks:
            for attention in (block.attn1, block.attn2):
                processor = attention.processor = theirs.xFuserWanAttnProcessor()
                processor.attention_function = attend

    return XDIT, put, run


def prepared(peer, monkeypatch):
    if peer == "xDiT":
        return xdit(monkeypatch)
    pytest.importorskip("cache_dit")
    return cache_dit(peer, monkeypatch)


@pytest.mark.parametrize("peer", [*CACHE_DIT, "xDiT"])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_their_processors_keep_their_bits_and_calls_arrive(peer, first, any_size, monkeypatch):
    module, put, run = prepared(peer, monkeypatch)
    stock = run()
    if first == "ours":
        wan_patches.enable()
    put()
    wan_patches.enable()
    ours = run()
    found = counts(module)
    wan_patches.disable()
    theirs = run()
    assert torch.equal(ours, theirs)
    assert torch.allclose(theirs.float(), stock.float(), atol=0.05)  # it is the same model
    layers = 2
    assert found["rope"] == (2 * layers, 2 * layers)
    fast, calls = found["qk"]
    assert fast == calls >= 2 * layers
    assert not [report for report in wan_patches.status().reports if report.state == "active"]


@pytest.mark.parametrize("peer", ["wan_t2v", "xDiT"])
def test_toggles_in_any_order_leave_their_function(peer, monkeypatch):
    _, put, run = prepared(peer, monkeypatch)
    put()
    expected = run()
    for order in itertools.permutations((None, ["rope"], ["qk"], [])):
        for patches in order:
            wan_patches.enable(patches)
            assert torch.equal(run(), expected)
        wan_patches.disable()
    assert torch.equal(run(), expected)


def test_without_our_patches_for_them_no_call_would_arrive(any_size, monkeypatch):
    """Or the tests above would prove nothing: `rope` of diffusers' own processor sees none of these calls."""
    _, put, run = prepared("wan_t2v", monkeypatch)
    put()
    with wan_patches.enabled():
        run()
        (report,) = [
            report
            for report in wan_patches.status().of("rope")
            if report.module == "diffusers.models.transformers.transformer_wan"
        ]
        assert report.note == "no call arrived: something else runs in its place"
