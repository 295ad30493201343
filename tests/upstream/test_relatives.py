"""Models that share Wan's rotary embedding or autoencoder: stock diffusers against the same diffusers patched."""

from __future__ import annotations

import pytest
import torch

import wan_patches
from wan_patches.patching import tally
from wan_patches.testing.relatives import RELATIVES, available

# tiny models take the way of large ones
pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]

NAMES = [pytest.param(name, marks=[pytest.mark.slow] * RELATIVES[name].slow) for name in available()]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]

#: Those with tables of complex numbers in single precision, which fp32 needs no cast for.
SINGLE = {"lumina", "nucleus", "bria_fibo2", *(n for n in RELATIVES if n.startswith(("qwen_image", "z_image")))}
#: Pipelines that take pictures or videos and resize them with the video processor.
PREPROCESSING = {"cosmos2_v2w", "ltx_i2v", "ltx_condition", "hunyuan_video_i2v", "kandinsky5_i2v"} | {
    f"cogvideox_{kind}" for kind in ("i2v", "v2v", "control")
}
NOT_CAST = "nothing is cast, and stock's operations are the fastest"
#: Those whose blocks are patched too: modulation, residual sums, and norms of queries and keys.
BLOCKS = {name for name in RELATIVES if name.startswith(("wan_animate_2", "kandinsky"))}
#: Those with norms of parts of a projection, or of an autoencoder's channels, which do not lie next to each other.
PARTS = {"ace_step", "prx", "ltx_i2v", "ltx_condition"}
TWICE = "fp16 would be rounded twice, as stock rounds to bf16"


def _stock(name, model, dtype):
    try:
        return RELATIVES[name].run(model, dtype=dtype)
    except RuntimeError as error:
        if dtype == torch.float32:
            raise
        pytest.skip(f"stock itself fails: {error}")  # half precision on CPUs, in some older versions


def _check(name, dtype, patches=None):
    """Compares the bits, and returns the ways of the calls for a rotary embedding; the autoencoder's are fast."""
    model = RELATIVES[name].build(dtype=dtype)
    stock = _stock(name, model, dtype)
    tally.reset()
    with wan_patches.enabled(patches):
        patched = RELATIVES[name].run(model, dtype=dtype)
    ways = {way for way in tally.counted() if way.op.startswith("rotary embedding")}
    decoding = {way for way in tally.counted() if way.entry.partition(":")[0] == "wan_patches.bindings.vae"}
    assert bool(decoding) == RELATIVES[name].decodes
    assert all(way.is_fast for way in decoding)
    preprocessing = {way for way in tally.counted() if way.op == "preprocess"}
    assert all(way.is_fast for way in preprocessing)
    assert bool(preprocessing) == (name in PREPROCESSING)
    if patches is None:
        _check_blocks(name)
    assert stock.isfinite().all()
    assert stock.std() > 0
    assert (patched.dtype, patched.stride()) == (stock.dtype, stock.stride())
    assert torch.equal(patched, stock)
    return ways


def _check_blocks(name):
    """Compares the ops that had calls with those that the blocks have; all of these calls were fast."""
    entries = "wan_patches.bindings.modulation", "wan_patches.bindings.qk"
    ways = {way for way in tally.counted() if way.entry.startswith(entries)}
    of_diffusers = {way for way in ways if way.op == "RMS norm of diffusers"}
    assert all(way.is_fast or name in PARTS for way in of_diffusers)
    ways -= of_diffusers
    ops = {"modulated norm", "gated residual", "RMS norm"} | ({"cast norm"} if name == "wan_animate_2" else set())
    assert {way.op for way in ways} == (ops if name in BLOCKS else set())
    assert all(way.is_fast for way in ways)


def _check_ways(name, dtype, ways):
    reasons = {way.reason for way in ways}
    if name in SINGLE and dtype == torch.float32:
        assert reasons == {NOT_CAST}
    elif name.startswith("kandinsky5") and dtype == torch.float16:
        assert reasons == {TWICE}
    else:
        assert reasons == {""}
        assert all(way.is_fast for way in ways)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_bit_identical_and_fast_forms_make_them(name, dtype):
    _check_ways(name, dtype, _check(name, dtype, ["rope", "vae", "preprocess"]))


@pytest.mark.parametrize("name", NAMES)
def test_all_patches_together(name):
    _check_ways(name, torch.bfloat16, _check(name, torch.bfloat16))


_COMPILED = (
    "flux",
    "qwen_image",
    "kandinsky5",
    "kandinsky6",
    "prx",
    "ltx",
    "mochi",
)  # one of each kind of tables, and PRX


@pytest.mark.parametrize("name", [n for n in _COMPILED if n in available()])
def test_compiled_transformers_are_bit_identical(name):
    results = []
    for patches in ([], None):
        torch.compiler.reset()
        pipe = RELATIVES[name].build()
        pipe.transformer.compile(backend="eager", fullgraph=True)
        with wan_patches.enabled(patches):
            try:
                results.append(RELATIVES[name].run(pipe))
            except torch._dynamo.exc.Unsupported as error:
                if patches is None:
                    raise
                pytest.skip(f"stock itself does not compile as one graph: {str(error).splitlines()[0]}")
    assert results[0].isfinite().all()
    assert torch.equal(*results)


#: One of each kind of tables, and the projections of its attention.
_ADAPTED = {
    "flux": ["to_q", "to_k", "to_v", "to_out.0"],
    "cogview4": ["to_q", "to_k", "to_v", "to_out.0"],
    "qwen_image": ["to_q", "to_k", "to_v", "to_out.0"],
    "kandinsky5": ["to_query", "to_key", "to_value"],
    "kandinsky6": ["to_query", "to_key", "to_value"],
    "wan_animate_2": ["to_q", "to_k", "to_v", "to_out.0"],
    "mochi": ["to_q", "to_k", "to_v", "to_out.0"],
    "ltx": ["to_q", "to_k", "to_v", "to_out.0"],
}


def _transformer(name, model):
    return model if RELATIVES[name].alone else model.transformer


@pytest.mark.parametrize("name", [name for name in _ADAPTED if name in available()])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_adapter_on_attention(name, dtype):
    peft = pytest.importorskip("peft")
    relative = RELATIVES[name]
    pipe = relative.build(dtype=dtype)
    without = _stock(name, pipe, dtype)
    torch.manual_seed(0)
    projections = _ADAPTED[name]
    _transformer(name, pipe).add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=projections))
    stock = relative.run(pipe, dtype=dtype)
    tally.reset()
    with wan_patches.enabled():
        patched = relative.run(pipe, dtype=dtype)
    assert not torch.equal(stock, without)
    assert torch.equal(patched, stock)
    _check_ways(name, dtype, {way for way in tally.counted() if way.op.startswith("rotary embedding")})
    if dtype != torch.float32:
        _check_blocks(name)


@pytest.mark.parametrize("name", [name for name in _ADAPTED if name in available()])
def test_offloaded_transformers_are_bit_identical(name):
    """Layers are loaded by hooks, which move tables and weights; the device stays, for want of another."""
    hooks = pytest.importorskip("diffusers.hooks")
    relative = RELATIVES[name]
    pipe = relative.build(dtype=torch.bfloat16)
    stock = _stock(name, pipe, torch.bfloat16)
    device = torch.device("cpu")
    try:
        hooks.apply_group_offloading(_transformer(name, pipe), device, device, offload_type="leaf_level")
    except AttributeError as error:
        pytest.skip(f"stock itself fails without an accelerator, in older versions: {error}")
    assert torch.equal(relative.run(pipe, dtype=torch.bfloat16), stock)
    tally.reset()
    with wan_patches.enabled():
        assert torch.equal(relative.run(pipe, dtype=torch.bfloat16), stock)
    assert {way.is_fast for way in tally.counted() if way.op.startswith("rotary embedding")} == {True}
    # norms have hooks, and are called as modules
    assert {way.is_fast for way in tally.counted() if way.op == "gated residual"} == (
        {True} if name in BLOCKS else set()
    )
