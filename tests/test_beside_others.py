"""Beside what others do to the same models: wrappers, LoRA, offload, quantisation, caches, parallelism, files.

And what happens where the installed code is not what a patch was written for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wrapt

import wan_patches
from wan_patches import Patch, PatchError, Replace, Target
from wan_patches.ops import rope
from wan_patches.patches import rope as rope_patches
from wan_patches.patching.codeswap import functions_behind
from wan_patches.patching.registry import Registry
from wan_patches.testing.families import FAMILIES, available, images

diffusers = pytest.importorskip("diffusers", minversion="0.38")

TRANSFORMER = "diffusers.models.transformers.transformer_wan"
PIPELINE = "diffusers.pipelines.wan.pipeline_wan_i2v"

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the form of every rotary embedding that is computed by us."""
    calls: list[str] = []
    with wan_patches.enabled(["rope"]):
        forward(transformer())  # the fast form is tried out once; not counted

    def counted(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def count(*args: Any) -> torch.Tensor:
            calls.append(name)
            return function(*args)

        return count

    op = rope.apply_rotary_emb
    for name, owner, form in (
        ("reference", op, "reference"),
        ("stacked", op, "traced"),
        ("complex_rows", rope.complex_rows, "function"),
    ):
        monkeypatch.setattr(owner, form, counted(name, getattr(owner, form)))
    return calls


def transformer(**options: Any) -> torch.nn.Module:
    return FAMILIES["wan_t2v"].build(**options).transformer


def call(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A call with enough tokens for the fast form of the rotary embedding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 3, 20, 20, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator).to(dtype),
        "return_dict": False,
    }


@torch.no_grad()
def forward(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = model(**call(dtype))[0]
    assert out.isfinite().all()
    return out


def frames(pipe: Any, name: str, **more: Any) -> np.ndarray:
    return pipe(**FAMILIES[name].inputs(**more)).frames


def same_bits(model: torch.nn.Module, rotations: list[str], dtype: torch.dtype = torch.float32) -> None:
    """Stock and patched agree, and patched is ours."""
    stock = forward(model, dtype)
    assert not rotations
    with wan_patches.enabled():
        patched = forward(model, dtype)
    assert rotations
    assert torch.equal(stock, patched)
    rotations.clear()
    assert torch.equal(stock, forward(model, dtype))
    assert not rotations


def changed_copy(folder: Path, name: str = TRANSFORMER, old: str = "", new: str = "") -> types.ModuleType:
    """The installed module's text with `old` changed to `new`, as another module of the same package."""
    original = importlib.import_module(name)
    assert original.__file__ is not None
    text = Path(original.__file__).read_text()
    assert old in text
    path = folder / f"copy_{len(list(folder.iterdir()))}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{name.rpartition('.')[0]}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy_module(tmp_path: Path) -> Iterator[Callable[..., types.ModuleType]]:
    """`changed_copy` whose modules are forgotten afterwards."""
    made: list[types.ModuleType] = []

    def make(**change: str) -> types.ModuleType:
        made.append(changed_copy(tmp_path, **change))
        return made[-1]

    yield make
    for module in made:
        sys.modules.pop(module.__name__, None)


#: Says the same as stock in other words: not known to us.
UNKNOWN = {"old": "torch.empty_like(hidden_states)", "new": "torch.zeros_like(hidden_states)"}


def test_a_wrong_op_would_be_noticed(rotations, monkeypatch):
    """What every test here rests on."""
    exact = rope.complex_rows.function
    monkeypatch.setattr(rope.complex_rows, "function", lambda x, cos, sin: exact(x, cos, sin) * (1 + 2**-20))
    with pytest.raises(AssertionError, match=r"torch\.equal|equal"):
        same_bits(transformer(), rotations)


# Wrappers and re-implementations of other libraries


def with_wraps(original: Any, seen: list[str]) -> Any:
    @functools.wraps(original)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append("theirs")
        return original(*args, **kwargs)

    return theirs


def plain_closure(original: Any, seen: list[str]) -> Any:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append("theirs")
        return original(*args, **kwargs)

    return theirs


def wrapt_proxy(original: Any, seen: list[str]) -> Any:
    def theirs(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append("theirs")
        return wrapped(*args, **kwargs)

    return wrapt.FunctionWrapper(original, theirs)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> type:
    """Wan's attention processor, whose `__call__` a test may replace."""
    cls = importlib.import_module(TRANSFORMER).WanAttnProcessor
    monkeypatch.setattr(cls, "__call__", cls.__call__)  # put back afterwards
    return cls


@pytest.mark.parametrize("theirs_first", [True, False], ids=["before enable", "after enable"])
@pytest.mark.parametrize("wrap", [with_wraps, plain_closure, wrapt_proxy])
def test_a_wrapper_of_another_library_runs_and_stays(wrap, theirs_first, processor, rotations):
    model, seen = transformer(), []
    original = vars(processor)["__call__"]
    code = original.__code__
    stock = forward(model)
    if not theirs_first:
        wan_patches.enable()
    wrapper = wrap(original, seen)
    processor.__call__ = wrapper
    wan_patches.enable(strict=True)
    assert original.__code__ is not code
    assert torch.equal(stock, forward(model))
    assert len(seen) == 4  # two layers with self- and cross-attention
    assert len(rotations) == 4  # queries and keys of two layers: ours runs inside theirs
    wan_patches.disable()
    assert vars(processor)["__call__"] is wrapper
    assert original.__code__ is code
    rotations.clear()
    assert torch.equal(stock, forward(model))
    assert len(seen) == 8
    assert not rotations


@pytest.mark.parametrize("theirs_first", [True, False], ids=["before enable", "after enable"])
@pytest.mark.parametrize("rotates_as", ["stock", "unknown"])
def test_a_reimplementation_of_another_library_stays(rotates_as, theirs_first, processor, rotations, copy_module):
    model = transformer()
    stock = forward(model)
    original = vars(processor)["__call__"]
    code = original.__code__
    theirs = vars(copy_module(**({} if rotates_as == "stock" else UNKNOWN)).WanAttnProcessor)["__call__"]
    theirs_code = theirs.__code__
    if theirs_first:
        processor.__call__ = theirs
        wan_patches.enable(["rope"])
        report = next(r for r in wan_patches.status().of("rope") if r.module == TRANSFORMER)
        assert original.__code__ is code  # nobody calls it
        assert torch.equal(stock, forward(model))
        if rotates_as == "stock":  # the nested function is the known one, whoever holds it
            assert report.state == "active"
            assert rotations
        else:
            assert report.state == "skipped"
            assert "apply_rotary_emb is not known" in report.reason
            assert not rotations
    else:
        wan_patches.enable(["rope"])
        assert original.__code__ is not code
        processor.__call__ = theirs
        assert torch.equal(stock, forward(model))
        assert not rotations  # theirs replaced ours, as it would have replaced stock
    wan_patches.disable()
    assert vars(processor)["__call__"] is theirs
    assert theirs.__code__ is theirs_code
    assert original.__code__ is code


def test_code_that_someone_puts_in_over_ours_is_theirs_to_remove(processor):
    original = vars(processor)["__call__"]
    code = original.__code__
    wan_patches.enable(["rope"])
    theirs = code.replace(co_consts=(*code.co_consts, "theirs"))
    original.__code__ = theirs
    wan_patches.disable()
    assert original.__code__ is theirs
    original.__code__ = code


def all_targets() -> dict[tuple[str, str], types.FunctionType]:
    """Every target of every patch in the installed diffusers, all modules imported."""
    found = {}
    for report in wan_patches.status().reports:
        try:
            module = importlib.import_module(report.module)
        except ModuleNotFoundError:
            continue
        for qualname in report.targets:
            value: Any = module
            for name in qualname.split("."):
                value = vars(value).get(name) if value is not None else None
            if value is not None:
                found[report.module, qualname] = functions_behind(value, module.__file__)[-1]
    return found


def test_disable_restores_the_code_object_of_every_target():
    targets = all_targets()
    before = {key: function.__code__ for key, function in targets.items()}
    assert len(targets) > 15
    status = wan_patches.enable()
    assert not status.skipped(), status
    active = {(r.module, qualname) for r in status.reports if r.state == "active" for qualname in r.targets}
    assert {key for key, function in targets.items() if function.__code__ is not before[key]} == active
    wan_patches.disable()
    assert all(function.__code__ is before[key] for key, function in targets.items())


# Training


def test_lora_outputs_and_gradients_are_those_of_stock(rotations):
    peft = pytest.importorskip("peft")
    model = transformer()
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    same_bits(model, rotations)

    def train() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = model(**call())[0]
        out.square().mean().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock, stock_gradients = train()
    assert not rotations
    with wan_patches.enabled():
        patched, gradients = train()
    assert set(rotations) == {"stacked"}  # what autograd can look into
    assert torch.equal(stock, patched)
    assert gradients.keys() == stock_gradients.keys()
    assert all("lora" in name for name in gradients)
    assert all(torch.equal(gradients[name], stock_gradients[name]) for name in gradients)
    assert sum(gradient.abs().max() > 0 for gradient in gradients.values()) > 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_every_parameter_are_those_of_stock(dtype, rotations):
    model = transformer(dtype=dtype)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**call(dtype))[0].float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    with wan_patches.enabled():
        patched = gradients()
    assert rotations
    assert len(stock) > 50
    assert [name for name in stock if not torch.equal(stock[name], patched[name])] == []


def test_gradient_checkpointing_has_the_gradients_of_stock(rotations):
    model = transformer().train()
    model.enable_gradient_checkpointing()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**call())[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stock = gradients()
    with wan_patches.enabled():
        patched = gradients()
    assert rotations
    assert all(torch.equal(a, b) for a, b in zip(stock, patched, strict=True))


# Memory


@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(how, rotations):
    model = transformer()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **how)
    same_bits(model, rotations)


def test_layerwise_casting_to_eight_bits(rotations):
    model = transformer()
    plain = forward(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert not torch.equal(plain, forward(model))  # it is in force
    same_bits(model, rotations)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights(rotations):
    quantization = pytest.importorskip("torchao.quantization")
    model = transformer(dtype=torch.bfloat16)
    plain = forward(model, torch.bfloat16)
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    assert not torch.equal(plain, forward(model, torch.bfloat16))
    same_bits(model, rotations, torch.bfloat16)


# Speed


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_the_attention_backend_stays_the_users_choice(backend, rotations, monkeypatch):
    registry = importlib.import_module("diffusers.models.attention_dispatch")._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # diffusers sets it for all models
    model = transformer()
    model.set_attention_backend(backend)
    chosen = [block.attn1.processor._attention_backend for block in model.blocks]
    assert len({str(choice) for choice in chosen}) == 1
    same_bits(model, rotations)
    assert [block.attn1.processor._attention_backend for block in model.blocks] == chosen


def cache_configs() -> dict[str, Callable[[Any], Any]]:
    """How to switch on each cache of the installed diffusers that fits a pipeline of Wan."""
    makers: dict[str, Callable[[Any], Any]] = {
        "FirstBlockCacheConfig": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=10.0),
        "PyramidAttentionBroadcastConfig": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        "TaylorSeerCacheConfig": lambda pipe: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, max_order=1, use_lite_mode=True
        ),
        "MagCacheConfig": lambda pipe: diffusers.MagCacheConfig(
            threshold=1.0, max_skip_steps=2, num_inference_steps=5, mag_ratios=torch.full((5,), 0.9)
        ),
    }
    return {name: maker for name, maker in makers.items() if hasattr(diffusers, name)}


@pytest.mark.parametrize("name", cache_configs())
def test_caches_over_steps(name, rotations):
    pipe = FAMILIES["wan_t2v"].build()
    more = {"steps": 5, "output_type": "latent"}
    plain = frames(pipe, "wan_t2v", **more)
    pipe.transformer.enable_cache(cache_configs()[name](pipe))
    stock = frames(pipe, "wan_t2v", **more)
    assert not torch.equal(plain, stock)  # it is in force
    with wan_patches.enabled():
        patched = frames(pipe, "wan_t2v", **more)
    assert rotations
    assert torch.equal(stock, patched)


def test_fused_projections(rotations):
    model = transformer()
    model.fuse_qkv_projections()
    same_bits(model, rotations)
    model.unfuse_qkv_projections()
    same_bits(model, rotations)


ULYSSES = """
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import wan_patches
from wan_patches.testing.families import FAMILIES
from wan_patches.ops import rope

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1  # stock computes `rank % device_count()`, also without accelerators
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = FAMILIES["wan_t2v"].build().transformer
generator = torch.Generator().manual_seed(0)
call = {
    "hidden_states": torch.randn(1, 16, 3, 28, 28, generator=generator),  # 588 tokens
    "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
    "return_dict": False,
}
seen = []
op = rope.apply_rotary_emb
forms = {
    "complex_rows": (rope.complex_rows, "function"), "reference": (op, "reference"), "stacked": (op, "traced")
}
for name, (owner, attribute) in forms.items():
    form = getattr(owner, attribute)
    setattr(owner, attribute, lambda x, cos, sin, form=form: seen.append(tuple(x.shape)) or form(x, cos, sin))
with torch.no_grad():
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    stock = model(**call)[0]
    assert not seen
    with wan_patches.enabled():
        patched = model(**call)[0]
        assert seen.count((1, 294, 2, 32)) == 4, seen  # half of the tokens, queries and keys of two layers
    assert torch.isfinite(stock).all()
    assert torch.equal(stock, patched)
dist.barrier()
dist.destroy_process_group()
print("equal")
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_python(script: str, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh process; ends with its output, or with the test."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        env=environment(**more), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="this version has no context parallelism")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.slow
def test_ulysses_over_two_processes(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ULYSSES, str(rank), str(tmp_path / "store")],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 120
        outputs = [process.communicate(timeout=max(1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.strip().endswith("equal")


# Copies and files


def test_a_model_pickled_with_patches_on_loads_without_the_plugin(tmp_path):
    model = transformer()
    stock, stock_text = forward(model), pickle.dumps(model)
    with wan_patches.enabled():
        forward(model)
        text = pickle.dumps(model)
        assert text == stock_text
        assert torch.equal(stock, forward(pickle.loads(text)))
    assert b"wan_patches" not in text
    (tmp_path / "model.pickle").write_bytes(text)
    torch.save(call(), tmp_path / "call.pt")
    run_python(
        """
        import pickle, sys
        sys.modules["wan_patches"] = None  # cannot be imported
        import torch
        torch.set_num_threads(1)
        folder = sys.argv[1]
        model = pickle.load(open(f"{folder}/model.pickle", "rb"))
        with torch.no_grad():
            torch.save(model(**torch.load(f"{folder}/call.pt"))[0], f"{folder}/out.pt")
        """,
        str(tmp_path),
    )
    assert torch.equal(stock, torch.load(tmp_path / "out.pt"))


def test_a_deep_copy_is_patched_and_unpatched_with_the_rest(rotations):
    model = transformer()
    stock = forward(model)
    with wan_patches.enabled():
        twin = copy.deepcopy(model)
        assert torch.equal(stock, forward(twin))
        assert rotations
        rotations.clear()
    assert torch.equal(stock, forward(twin))
    assert not rotations


def test_saved_and_loaded_with_patches_on(tmp_path, rotations):
    pipe = FAMILIES["wan_t2v"].build()
    stock = frames(pipe, "wan_t2v")
    with wan_patches.enabled():
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(stock, frames(loaded, "wan_t2v"))
        assert rotations
    assert not any("wan_patches" in path.read_text() for path in tmp_path.rglob("*.json"))
    assert np.array_equal(stock, frames(loaded, "wan_t2v"))


def test_from_pipe_with_patches_on(rotations):
    def other(pipe: Any) -> Any:
        new = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
        new.set_progress_bar_config(disable=True)
        return new

    pipe = FAMILIES["wan_t2v"].build()
    stock = frames(other(pipe), "wan_v2v", negative_prompt="")
    with wan_patches.enabled():
        assert np.array_equal(stock, frames(other(pipe), "wan_v2v", negative_prompt=""))
        assert rotations


@pytest.mark.parametrize("name", [name for name in ("wan22_i2v", "helios_i2v") if name in available()])
def test_enabled_before_and_after_the_pipeline_is_built(name):
    before = FAMILIES[name].build()
    stock = frames(before, name)
    wan_patches.enable()
    after = FAMILIES[name].build()
    assert np.array_equal(stock, frames(before, name))
    assert np.array_equal(stock, frames(after, name))
    wan_patches.disable()
    assert np.array_equal(stock, frames(after, name))


# Code that is not known, and patches that go wrong


def patch_for(module: types.ModuleType, **changes: Any) -> Patch:
    """Wan's rotary patch, for another module."""
    patch = next(patch for patch in rope_patches.PATCHES if patch.module == TRANSFORMER)
    return dataclasses.replace(patch, module=module.__name__, **changes)


@pytest.mark.parametrize("change", [{}, UNKNOWN], ids=["known", "unknown"])
def test_changed_upstream_code_is_refused_with_a_reason_and_gives_stock_results(change, copy_module, rotations):
    module = copy_module(**change)
    model = transformer()
    stock = forward(model)
    theirs = module.WanTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(model.state_dict())
    code = module.WanAttnProcessor.__call__.__code__
    registry = Registry([patch_for(module)])
    try:
        (report,) = registry.enable().reports
        assert torch.equal(stock, forward(theirs))
        if change:
            assert report.state == "skipped"
            assert re.search(r"WanAttnProcessor\.__call__: the text of apply_rotary_emb is not known", report.reason)
            assert module.WanAttnProcessor.__call__.__code__ is code
            assert not rotations
        else:  # or the refusal above would say nothing
            assert report.state == "active"
            assert rotations
    finally:
        registry.disable()
    assert module.WanAttnProcessor.__call__.__code__ is code


@pytest.fixture
def replaced_in_memory(processor: type) -> Iterator[types.FunctionType]:
    """The attention processor with code that its source does not say."""
    function = vars(processor)["__call__"]
    code = function.__code__
    function.__code__ = code.replace(co_consts=(*code.co_consts, "theirs"))
    yield function
    wan_patches.disable()
    function.__code__ = code


def test_code_replaced_in_memory_is_left_alone_and_the_pipeline_gives_stock_results(replaced_in_memory, caplog):
    pipe = FAMILIES["wan22_i2v"].build()
    theirs = replaced_in_memory.__code__
    stock = frames(pipe, "wan22_i2v")
    with caplog.at_level(logging.WARNING, "wan_patches"):
        wan_patches.enable()
    reports = wan_patches.status().skipped()
    assert {"rope", "qk"} <= {report.name for report in reports}
    assert {report.module for report in reports} == {TRANSFORMER}
    assert all("its source is not what runs" in report.reason for report in reports)
    assert "left stock: " in str(wan_patches.status())
    assert [record.getMessage() for record in caplog.records if "left stock code alone" in record.getMessage()]
    assert np.array_equal(stock, frames(pipe, "wan22_i2v"))
    wan_patches.disable()
    assert replaced_in_memory.__code__ is theirs


def test_strict_raises_and_leaves_the_earlier_choice_in_force(replaced_in_memory):
    wan_patches.enable(["conditioning"])
    before = wan_patches.status()
    with pytest.raises(PatchError, match=r"rope in .*transformer_wan: WanAttnProcessor.__call__: its source is not"):
        wan_patches.enable(strict=True)
    assert wan_patches.status() == before
    with pytest.raises(PatchError), wan_patches.enabled(["rope"], strict=True):
        pass
    assert wan_patches.status() == before


@dataclasses.dataclass(frozen=True)
class Raising:
    """An edit with a bug."""

    def apply(self, function: Any) -> None:
        raise RuntimeError("a bug in a patch")


def test_a_patch_that_raises_is_rolled_back_whole(processor):
    module = importlib.import_module(TRANSFORMER)
    first, second = vars(processor)["__call__"], module.WanTransformerBlock.forward
    codes = first.__code__, second.__code__
    patch = patch_for(module)
    bad = dataclasses.replace(patch, targets=(*patch.targets, Target("WanTransformerBlock.forward", (Raising(),))))
    registry = Registry([bad])
    (report,) = registry.enable().reports
    assert (report.state, report.reason) == ("skipped", "raised RuntimeError: a bug in a patch")
    assert (first.__code__, second.__code__) == codes
    assert first.__code__ is codes[0]
    with pytest.raises(PatchError, match="a bug in a patch"):
        registry.enable(strict=True)
    registry.disable()


BROKEN_PLUGIN = """
from wan_patches import Patch, Target


class Raising:
    def apply(self, function):
        raise RuntimeError("a bug in a patch")


PATCHES = [
    Patch(
        name="broken",
        module="diffusers.models.transformers.transformer_wan",
        targets=(Target("WanAttnProcessor.__call__", (Raising(),)),),
        calls={},
    )
]
"""


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (BROKEN_PLUGIN, "raised RuntimeError: a bug in a patch"),
        pytest.param(
            "raise ImportError('a bug in a plugin')",
            "raised ImportError: a bug in a plugin",
            marks=pytest.mark.slow,
        ),
        pytest.param("PATCHES = ['not a patch']", "'not a patch' is not a wan_patches.Patch", marks=pytest.mark.slow),
    ],
    ids=["its patch raises", "its import raises", "no patch"],
)
def test_importing_diffusers_survives_a_broken_plugin(plugin, reason, tmp_path):
    (tmp_path / "broken_plugin.py").write_text(plugin)
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wan_patches.patches]\nbroken = broken_plugin:PATCHES\n")
    done = run_python(
        """
        import wan_patches
        wan_patches.enable()
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor
        status = wan_patches.status()
        (skipped,) = status.skipped()
        print(skipped.name, skipped.reason)
        assert any(r.name == "rope" and r.state == "active" for r in status.reports), status
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert done.stdout.startswith("broken ")
    assert reason in done.stdout
    assert "Traceback" not in done.stderr
    if plugin == BROKEN_PLUGIN:
        assert done.stderr.count("left stock code alone: broken in ") == 1  # without logging being set up


class BrokenEntryPoint:
    """What `importlib.metadata` gives for a plugin whose import fails."""

    name, value = "broken", "broken_plugin:PATCHES"

    def load(self) -> None:
        raise ImportError("a bug in a plugin")


@pytest.fixture
def broken_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry that finds no plugin but a broken one."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [BrokenEntryPoint()])
    registry = Registry()
    yield registry
    registry.disable()


def test_a_plugin_that_cannot_be_loaded_is_warned_about(broken_plugin, caplog):
    with caplog.at_level(logging.WARNING, "wan_patches"):
        broken_plugin.enable()
    assert broken_plugin.status().skipped()
    assert [record for record in caplog.records if "a bug in a plugin" in record.getMessage()]


def test_strict_raises_for_a_plugin_that_cannot_be_loaded(broken_plugin):
    with pytest.raises(PatchError, match="a bug in a plugin"):
        broken_plugin.enable(strict=True)


@pytest.mark.parametrize("function", [wan_patches.enable, lambda *a, **k: wan_patches.enabled(*a, **k).__enter__()])
def test_unknown_names_are_value_errors_that_list_the_known_ones(function):
    with pytest.raises(ValueError, match=r"unknown patch ropes; known: .*conditioning.*frames.*preprocess.*rope"):
        function(["rope", "ropes"])
    with pytest.raises(ValueError, match=r"unknown fidelity 'exakt'; known: 'exact', 'close'"):
        function(fidelity="exakt")
    assert {report.state for report in wan_patches.status().reports} == {"off"}


# Input that stock refuses


def array(size: tuple[int, int] = (48, 32)) -> np.ndarray:
    return np.asarray(images(0, 1, size)[0]) / 255.0


BAD_INPUTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "image: a path": ("wan22_i2v", lambda: {"image": "fox.png"}),
    "image: a number": ("wan22_i2v", lambda: {"image": 3}),
    "image: bytes array": ("wan22_i2v", lambda: {"image": (array() * 255).astype(np.uint8)}),
    "image: empty list": ("wan22_i2v", lambda: {"image": []}),
    "image: list of lists": ("wan22_i2v", lambda: {"image": [images()]}),
    "image: list of None": ("wan22_i2v", lambda: {"image": [None]}),
    "image: PIL, then array": ("wan22_i2v", lambda: {"image": [*images(), array()]}),
    "image: array, then PIL": ("wan22_i2v", lambda: {"image": [array(), *images()]}),
    "image: two for one prompt": ("wan22_i2v", lambda: {"image": images(0, 2)}),
    "image: grey": ("wan22_i2v", lambda: {"image": images()[0].convert("L")}),
    "image: with alpha": ("wan22_i2v", lambda: {"image": images()[0].convert("RGBA")}),
    "image: tensor of two dimensions": ("wan22_i2v", lambda: {"image": torch.zeros(32, 48)}),
    "image: beside embeddings": ("wan22_i2v", lambda: {"image_embeds": torch.zeros(1, 17, 32)}),
    "last image: a path": ("wan21_flf2v", lambda: {"last_image": "fox.png"}),
    "last image: empty list": ("wan21_flf2v", lambda: {"last_image": []}),
    "last image: PIL, then array": ("wan21_flf2v", lambda: {"last_image": [*images(), array()]}),
    "generators: too many": ("wan22_i2v", lambda: {"generator": [torch.Generator(), torch.Generator()]}),
    "generators: none": ("wan22_i2v", lambda: {"generator": []}),
    "height: odd": ("wan22_i2v", lambda: {"height": 31}),
    "width: a text": ("wan22_i2v", lambda: {"width": "48"}),
    "prompt: a number": ("wan22_i2v", lambda: {"prompt": 7}),
    "output type: unknown": ("wan22_i2v", lambda: {"output_type": "mp4"}),
    "video: empty list": ("wan_v2v", lambda: {"video": []}),
    "video: a path": ("wan_v2v", lambda: {"video": "fox.mp4"}),
    "video: list of paths": ("wan_v2v", lambda: {"video": ["fox.png"]}),
    "video: PIL, then array": ("wan_v2v", lambda: {"video": [*images(0, 5), array()]}),
    "video: array, then PIL": ("wan_v2v", lambda: {"video": [array(), *images(0, 5)]}),
    "video: of two lengths": ("wan_v2v", lambda: {"video": [images(0, 5), images(0, 9)]}),
    "video: second is empty": ("wan_v2v", lambda: {"video": [images(0, 5), []]}),
    "helios image: empty list": ("helios_i2v", lambda: {"image": []}),
    "helios image: a path": ("helios_i2v", lambda: {"image": "fox.png"}),
    "helios video: empty list": ("helios_v2v", lambda: {"video": []}),
    "helios video: PIL, then array": ("helios_v2v", lambda: {"video": [*images(0, 8), array()]}),
    "chronoedit image: PIL, then array": ("chronoedit", lambda: {"image": [*images(), array()]}),
    "skyreels image: empty list": ("skyreels_v2_i2v", lambda: {"image": []}),
}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {}


def outcome(function: Callable[[], Any]) -> tuple[str, str]:
    """The type and the message of what `function` raises."""
    try:
        with torch.no_grad():
            function()
    except Exception as error:
        return type(error).__name__, re.sub(r"0x[0-9a-fA-F]+", "0x", str(error))
    return "nothing", ""


@pytest.mark.parametrize("what", [what for what, (name, _) in BAD_INPUTS.items() if name in available()])
def test_bad_input_raises_what_stock_raises(what, pipelines):
    name, bad = BAD_INPUTS[what]
    pipe = pipelines.setdefault(name, None) or FAMILIES[name].build(transformer={"num_layers": 1})
    pipelines[name] = pipe

    def generate() -> None:
        pipe(**{**FAMILIES[name].inputs(steps=1, frames=9), **bad()})

    stock = outcome(generate)
    with wan_patches.enabled():
        patched = outcome(generate)
    assert stock[0] != "nothing"
    assert patched == stock


PREPARE: dict[str, dict[str, Any]] = {
    "frames that do not fit": {"num_frames": 6},
    "no frames": {"num_frames": 0},
    "negative frames": {"num_frames": -3},
    "generators for another batch": {"generator": [torch.Generator(), torch.Generator()]},
    "no image": {"image": None},
    "image of another size": {"image": torch.zeros(1, 3, 16, 16)},
    "no height": {"height": 0},
    "no width": {"width": 0},
    "an unknown device": {"device": "nowhere"},
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "first and last"])
@pytest.mark.parametrize("what", PREPARE)
def test_prepare_latents_raises_what_stock_raises(what, last, pipelines):
    pipe = pipelines.setdefault("wan22_i2v", None) or FAMILIES["wan22_i2v"].build(transformer={"num_layers": 1})
    pipelines["wan22_i2v"] = pipe
    usual = {
        "image": torch.zeros(1, 3, 32, 48), "batch_size": 1, "height": 32, "width": 48, "num_frames": 9,
        "dtype": torch.float32, "device": torch.device("cpu"), "generator": torch.Generator().manual_seed(0),
        "last_image": torch.zeros(1, 3, 32, 48) if last else None,
    }  # fmt: skip
    stock = outcome(lambda: pipe.prepare_latents(**{**usual, **PREPARE.get(what, {what: 0})}))
    with wan_patches.enabled():
        patched = outcome(lambda: pipe.prepare_latents(**{**usual, **PREPARE.get(what, {what: 0})}))
    assert stock[0] != "nothing"
    assert patched == stock


def test_prepare_latents_for_a_batch_of_none_raises_what_stock_raises(pipelines):
    test_prepare_latents_raises_what_stock_raises("batch_size", False, pipelines)


VIDEOS: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown output type": (lambda: torch.zeros(1, 3, 5, 8, 8), "mp4"),
    "no output type": (lambda: torch.zeros(1, 3, 5, 8, 8), ""),
    "four dimensions": (lambda: torch.zeros(3, 5, 8, 8), "pil"),
    "three dimensions": (lambda: torch.zeros(3, 5, 8), "np"),
    "with a gradient": (lambda: torch.zeros(1, 3, 5, 8, 8, requires_grad=True), "np"),
    "an array": (lambda: np.zeros((1, 3, 5, 8, 8)), "np"),
    "a list": (lambda: [torch.zeros(3, 5, 8, 8)], "pil"),
    "two channels": (lambda: torch.zeros(1, 2, 5, 8, 8), "pil"),
    "no frames": (lambda: torch.zeros(1, 3, 0, 8, 8), "pil"),
    "no videos": (lambda: torch.zeros(0, 3, 5, 8, 8), "np"),
    "not a number for an output type": (lambda: torch.zeros(1, 3, 5, 8, 8), None),  # type: ignore[dict-item]
    "meta": (lambda: torch.zeros(1, 3, 5, 8, 8, device="meta"), "np"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", VIDEOS)
def test_postprocess_video_raises_what_stock_raises(what):
    from diffusers.video_processor import VideoProcessor

    processor = VideoProcessor(vae_scale_factor=8)
    make, output_type = VIDEOS[what]
    stock = outcome(lambda: processor.postprocess_video(make(), output_type=output_type))
    with wan_patches.enabled():
        patched = outcome(lambda: processor.postprocess_video(make(), output_type=output_type))
    assert patched == stock


def test_a_replacement_that_is_not_found_often_enough_names_what_it_looked_for(copy_module):
    module = copy_module()
    edit = Replace("torch.empty_like(X)", "torch.zeros_like(X)", count=5)
    registry = Registry([Patch("x", module.__name__, (Target("WanAttnProcessor.__call__", (edit,)),), {})])
    (report,) = registry.enable().reports
    assert report.state == "skipped"
    assert "`torch.empty_like(X)` occurs 1 times, expected 5" in report.reason
    registry.disable()
