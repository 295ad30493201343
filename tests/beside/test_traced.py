"""Who looks into the operations sees plain ones, from the first use on; nothing is tried out in front of him."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

pytest.importorskip("transformers")

import wan_patches
from wan_patches.ops import rms_norm, rope
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]

#: A transformer of each kind.
NAMES = ["wan_t2v", "wan22_ti2v", "wan_vace", "wan_animate", "skyreels_v2_t2v", "chronoedit", "sana_video", "helios"]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


class Listed(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _first_use_at_any_size(any_size):
    for op in (rope, rms_norm):
        op._is_exact.cache_clear()


def forward(name):
    """A function of the tensors that a family's transformer is called with in the last step, and these."""
    pipe, calls = FAMILIES[name].build(dtype=torch.bfloat16), []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    pipe(**FAMILIES[name].inputs(steps=1, output_type="latent"))
    hook.remove()
    values, structure = tree_flatten(calls[-1])
    places = [nth for nth, value in enumerate(values) if isinstance(value, torch.Tensor)]

    def run(*tensors):
        filled = list(values)
        for nth, tensor in zip(places, tensors):
            filled[nth] = tensor
        args, kwargs = tree_unflatten(filled, structure)
        return pipe.transformer(*args, **{**kwargs, "return_dict": False})[0]

    return run, [values[nth] for nth in places]


@pytest.fixture(params=[name for name in NAMES if name in available()])
def run_and_tensors(request):
    return forward(request.param)


@pytest.mark.loop("wan_vace", "helios")
@torch.no_grad()
def test_a_graph_of_a_model_has_no_trials_in_it(run_and_tensors):
    run, tensors = run_and_tensors
    stock = run(*tensors)
    with wan_patches.enabled(strict=True):
        graph = make_fx(run)(*tensors)
        again = make_fx(run)(*tensors)
    names = [[str(node.target) for node in found.graph.nodes] for found in (graph, again)]
    assert names[0] == names[1]  # nothing that only a first use does
    assert not [name for name in names[0] if "randn" in name or "equal" in name]
    assert torch.equal(graph(*tensors), stock)


@pytest.mark.parametrize("mode", [Counted, Listed])
@torch.no_grad()
def test_a_mode_sees_as_much_at_first_use_as_later(run_and_tensors, mode):
    run, tensors = run_and_tensors
    stock, seen = run(*tensors), []
    with wan_patches.enabled(strict=True):
        for _ in range(2):
            with mode() as watching:
                found = run(*tensors)
            seen.append([str(call) for call in watching.calls])
            assert torch.equal(found, stock)
    assert seen[0] == seen[1]


@torch.no_grad()
def test_the_mode_of_a_default_device_is_in_nobodys_way(monkeypatch):
    taken, rows = [], rope.complex_rows
    monkeypatch.setattr(rope, "complex_rows", lambda *args: taken.append(1) or rows(*args))
    x, table = torch.randn(1, 8, 2, 32), torch.randn(1, 8, 1, 16)
    with torch.device("cpu"):
        rope.apply_rotary_emb(x, table, table)
    assert taken


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@torch.no_grad()
def test_a_norm_that_somebody_has_replaced_is_called_as_by_stock(run_and_tensors, name, monkeypatch):
    """Compatibility layers of vendors do that, before or after patches are enabled."""
    run, tensors = run_and_tensors
    calls, norm = [], getattr(F, name)

    def replaced(x, *args, **kwargs):
        calls.append((tuple(x.shape), x.dtype))
        return norm(x, *args, **kwargs)

    monkeypatch.setattr(F, name, replaced)
    stock, expected = run(*tensors), list(calls)
    calls.clear()
    with wan_patches.enabled(strict=True):
        assert torch.equal(run(*tensors), stock)
    assert calls == expected


@pytest.mark.parametrize(
    ("owner", "name"),
    [(F, "conv3d"), (F, "interpolate"), (F, "normalize"), (F, "pad"), (F, "silu"), (torch, "cat"), (torch, "clamp")],
)
@torch.no_grad()
def test_functions_of_the_autoencoder_that_somebody_has_replaced_are_called_as_by_stock(owner, name, monkeypatch):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    z = torch.randn(1, 4, 2, 4, 4)
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    stock, expected = vae.decode(z).sample, len(calls)
    with wan_patches.enabled(strict=True):
        assert torch.equal(vae.decode(z).sample, stock)
    assert len(calls) == 2 * expected > 0
