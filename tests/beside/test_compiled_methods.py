"""Public methods compile as stock's do: whole where stock's do, with as many graph breaks, and to the same bits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import wan_patches
from wan_patches.testing import families

pytestmark = [pytest.mark.upstream]

diffusers = pytest.importorskip("diffusers")

WAN_21 = {  # as few layers as have one of each kind: tracing takes long
    **{"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "num_res_blocks": 1},
    **{"dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "scale_factor_spatial": 4},
}
WAN_22 = {
    **{**WAN_21, "decoder_base_dim": 8, "is_residual": True, "in_channels": 12, "out_channels": 12},
    **{"patch_size": 2, "scale_factor_spatial": 8},
}
KINDS = {"wan 2.1": WAN_21, "wan 2.2": WAN_22}


@pytest.fixture(autouse=True)
def _fresh(one_thread):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def autoencoder(kind):
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(**KINDS[kind]).eval()


def latents(vae, side=2):
    return torch.randn(1, vae.config.z_dim, 2, side, side, generator=torch.Generator().manual_seed(1))


def video(vae, side=2):
    side *= 4 * (vae.config.patch_size or 1)
    return torch.randn(1, 3, 5, side, side, generator=torch.Generator().manual_seed(2))


def images(channels, frames=1, side=16):
    return torch.randn(1, channels, frames, side, side, generator=torch.Generator().manual_seed(3))


#: What people compile: a function of the autoencoder, and what it is called with.
METHODS = {
    "decode": lambda vae: (vae.decode, latents(vae)),
    "encode": lambda vae: (lambda x: vae.encode(x).latent_dist.parameters, video(vae)),
    "forward": lambda vae: (vae, video(vae)),
    "tiled_decode": lambda vae: (vae.tiled_decode, latents(vae, 6)),
    "tiled_encode": lambda vae: (vae.tiled_encode, images(vae.config.in_channels, side=48)),
    "blend_v": lambda vae: (lambda x: vae.blend_v(x.clone(), x + 1, 2), images(3)),
    "blend_h": lambda vae: (lambda x: vae.blend_h(x.clone(), x + 1, 2), images(3)),
    "clear_cache": lambda vae: (lambda x: (vae.clear_cache(), x + len(vae._feat_map))[1], torch.zeros(1)),
    "decoder": lambda vae: (vae.decoder, images(vae.config.z_dim, side=4)),
    "encoder": lambda vae: (vae.encoder, images(vae.config.in_channels)),
    "decoder with caches": lambda vae: (decode_chunks(vae), images(vae.config.z_dim, side=4)),
    "encoder with caches": lambda vae: (encode_chunks(vae), images(vae.config.in_channels, 5)),
}


def decode_chunks(vae):
    def run(x):
        vae.clear_cache()
        first = vae.decoder(x, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
        return torch.cat([first, vae.decoder(x, feat_cache=vae._feat_map, feat_idx=[0])], dim=2)

    return run


def encode_chunks(vae):
    def run(x):
        vae.clear_cache()
        chunks = [vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=[0]) for part in (x[:, :, :1], x[:, :, 1:])]
        return torch.cat(chunks, dim=2)

    return run


def tensor(result):
    return getattr(result, "sample", result)


def compiling(fullgraph):
    """Options for a compiler, and how many graphs were made with them and breaks between them."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return {"backend": backend, "fullgraph": fullgraph}, lambda: (len(graphs), sum(counters["graph_break"].values()))


def compiled(function, x, fullgraph=False):
    options, counts = compiling(fullgraph)
    return tensor(torch.compile(function, **options)(x)), counts()


LOOP = {"wan 2.1": ("decode", "encode", "tiled_decode", "blend_v", "decoder with caches"), "wan 2.2": ("decode",)}
CASES = [
    pytest.param(kind, method, False, marks=[] if method in LOOP[kind] else [pytest.mark.slow])
    for kind in KINDS
    for method in METHODS
]
CASES += [("wan 2.1", "decode", True), pytest.param("wan 2.1", "encode", True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "method", "gradients"), CASES)
def test_methods_of_the_autoencoder_compile_as_stocks_do(kind, method, gradients):
    vae = autoencoder(kind)
    function, x = METHODS[method](vae)
    with torch.set_grad_enabled(gradients):
        try:
            stock, counts = compiled(function, x)
        except RuntimeError as error:
            pytest.skip(f"stock itself fails: {error}")
        with wan_patches.enabled(strict=True):
            function(x)  # what a pass leaves behind must not be in the way
            patched, ours = compiled(function, x, fullgraph=counts[1] == 0)
    assert ours == counts
    assert torch.equal(patched, stock)


@pytest.mark.parametrize("order", ["compiled before", "used before"])
@pytest.mark.parametrize("method", ["decode", "encode"])
def test_a_compiled_method_lives_with_patches_that_come_and_go(method, order):
    vae = autoencoder("wan 2.1")
    function, x = METHODS[method](vae)
    with torch.no_grad():
        expected = tensor(function(x))
        graph = torch.compile(function, backend="eager", fullgraph=True)
        if order == "compiled before":
            assert torch.equal(tensor(graph(x)), expected)
        with wan_patches.enabled(strict=True):
            assert torch.equal(tensor(function(x)), expected)
            assert torch.equal(tensor(graph(x)), expected)
            assert torch.equal(tensor(function(x)), expected)
        assert torch.equal(tensor(graph(x)), expected)


TRANSFORMERS = ["wan_vace", "wan_animate", "sana_video_i2v"]  # the classes that tests/test_compile.py has not


def transformer_and_call(name):
    """A family's transformer of few layers, and what its pipeline calls it with in the last step."""
    layers = {"wan_vace": 3, "wan_animate": 2, "wan_animate_replace": 2}.get(name, 1)
    pipe = families.FAMILIES[name].build(transformer={"num_layers": layers})
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    pipe(**families.FAMILIES[name].inputs(steps=2, output_type="latent"))
    hook.remove()
    args, given = calls[-1]
    return pipe.transformer, lambda: pipe.transformer(*args, **{**given, "return_dict": False})[0]


@pytest.mark.parametrize("way", ["model", "blocks"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in TRANSFORMERS else [pytest.mark.slow]) for name in families.available()],
)
@torch.no_grad()
def test_transformers_compile_as_stocks_do(name, way):
    model, call = transformer_and_call(name)
    compile_it = model.compile if way == "model" else getattr(model, "compile_repeated_blocks", None)
    if compile_it is None or (way == "blocks" and not model._repeated_blocks):
        pytest.skip("no blocks that stock compiles by themselves")

    def run(fullgraph=False):
        options, counts = compiling(fullgraph)
        compile_it(**options)
        return call(), counts()

    stock, counts = run()
    assert counts[0] > 0
    with wan_patches.enabled(strict=True):
        patched, ours = run(fullgraph=counts[1] == 0)
    assert ours == counts
    assert torch.equal(patched, stock)
