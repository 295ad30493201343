"""Whole pipelines offloaded on an accelerator: bits, order of copies and waits, and what lies there at once.

The accelerator is emulated on the CPU, and its copies on a side stream arrive when something waits for them: what
computes before has NaN. Nothing is said about speed.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from wan_patches import offload
from wan_patches.offload import BLOCKS, DEVICE, LEAVES, disable_offload, enable_offload
from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.npu_emulated

group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")
KNOWS_ANY_DEVICE = hasattr(group_offloading, "TorchDeviceBackend")  # diffusers 0.41

GROUPED = [
    "wan_t2v", "wan22_i2v", "wan21_i2v", "wan22_ti2v", "wan_vace", "wan_animate", "skyreels_v2_i2v", "sana_video",
    "helios_i2v", "helios_pyramid",
]  # fmt: skip
BY_LEAVES = ["wan22_i2v", "wan21_i2v", "wan22_ti2v", "wan_animate", "sana_video"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


streams = load(Path(__file__).with_name("streams.py"))


@pytest.fixture
def runtime(device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device, with streams."""
    return streams.install(monkeypatch)


def build(name: str = "wan22_i2v", **options: Any) -> Any:
    dtype = torch.float32 if name == "wan_animate" else torch.bfloat16  # in 0.36 it has two dtypes, and raises
    return FAMILIES[name].build(dtype=dtype, **options)


def call(pipe: Any, name: str = "wan22_i2v", **more: Any) -> np.ndarray:
    torch.manual_seed(0)  # some pipelines draw noise of their own
    return np.asarray(pipe(**FAMILIES[name].inputs(steps=2, output_type="np", **more)).frames)


@pytest.fixture(scope="module")
def whole(_device: Any) -> Callable[[str], np.ndarray]:
    """What the pipeline makes that lies on the device whole."""
    made: dict[str, np.ndarray] = {}

    def of(name: str) -> np.ndarray:
        if name not in made:
            made[name] = call(build(name).to("npu"), name)
            assert np.isfinite(made[name]).all()
            assert made[name].std() > 0
        return made[name]

    return of


def have(names: list[str]) -> list[str]:
    return [name for name in names if name in available()]


def weights(pipe: Any) -> list[torch.Tensor]:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return list({id(tensor): tensor for tensor in tensors}.values())


class Peak:
    """The most bytes of weights that any matrix product or convolution has seen on the device."""

    def __init__(self, pipe: Any) -> None:
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        parts = [part for module in modules for part in module.modules()]
        # not the tensors: a buffer that is moved is another one
        self.places = [(d, name) for part in parts for d in (part._parameters, part._buffers) for name in d]
        self.bytes = 0

    def __call__(self, op: str) -> None:
        if op in ("addmm", "mm", "bmm", "convolution"):
            tensors = {id(place[name]): place[name] for place, name in self.places if place[name] is not None}
            self.bytes = max(self.bytes, sum(t.nbytes for t in tensors.values() if t.device.type == "npu"))


# Bits


@pytest.mark.loop("wan22_i2v", "wan_vace", "helios_i2v")
@pytest.mark.parametrize("name", have(GROUPED))
def test_groups_on_a_stream_have_the_bits_of_the_whole_pipeline(name, whole, runtime):
    pipe = build(name)
    plan = enable_offload(pipe, "npu", level="group")
    assert all(p.stream for p in plan.placements if p.how != DEVICE)
    peak = Peak(pipe)
    with runtime.watching(peak):
        assert np.array_equal(call(pipe, name), whole(name))
        assert np.array_equal(call(pipe, name), whole(name))  # the order of blocks is known now
    assert plan.peak / 2 < peak.bytes <= plan.peak


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", have(BY_LEAVES))
def test_leaves_have_the_bits_of_the_whole_pipeline(name, stream, whole, runtime):
    pipe = build(name)
    plan = enable_offload(pipe, "npu", level="leaf", stream=stream)
    assert {p.how for p in plan.placements} == {LEAVES}
    peak = Peak(pipe)
    with runtime.watching(peak):
        assert np.array_equal(call(pipe, name), whole(name))
        assert np.array_equal(call(pipe, name), whole(name))
    assert plan.peak / 6 < peak.bytes <= plan.peak  # the two largest layers need not follow one another


@pytest.mark.parametrize("options", [{"blocks_per_group": 2}, {"stream": False}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("name", ["wan22_i2v", "wan_vace"])
def test_options_of_groups_have_the_same_bits(name, options, whole, runtime):
    pipe = build(name)
    plan = enable_offload(pipe, "npu", level="group", **options)
    assert {p.stream for p in plan.placements if p.how == BLOCKS} == {"low_cpu_mem_usage" in options}
    assert plan.pinned == 0
    peak = Peak(pipe)
    with runtime.watching(peak):
        assert np.array_equal(call(pipe, name), whole(name))
    assert plan.peak / 2 < peak.bytes <= plan.peak
    assert any(entry.stream for entry in runtime.journal.entries) == ("low_cpu_mem_usage" in options)


@pytest.mark.parametrize("name", ["wan22_i2v", "wan21_i2v"])
@pytest.mark.parametrize("level", ["none", "model"])
def test_whole_models_have_the_same_bits(level, name, whole, device, runtime):
    pipe = build(name)
    plan = enable_offload(pipe, "npu", level=level)
    peak = Peak(pipe)
    with runtime.watching(peak):
        assert np.array_equal(call(pipe, name), whole(name))
    assert plan.peak / 2 < peak.bytes <= plan.peak
    assert plan.pinned == 0


def test_without_streams_of_the_device_there_is_none(whole, device):
    pipe = build()
    plan = enable_offload(pipe, "npu", level="group")
    assert plan.streams == "torch.npu has no streams"
    assert not any(p.stream for p in plan.placements)
    assert np.array_equal(call(pipe), whole("wan22_i2v"))
    with pytest.raises(ValueError, match=r"no stream can be used: torch.npu has no streams; use stream='auto'"):
        enable_offload(build(), "npu", stream=True)


def test_diffusers_before_group_offloading_gets_sequential_offload(whole, device, monkeypatch):
    monkeypatch.setattr(offload.plan, "group_offloading", None)
    pipe = build()
    plan = enable_offload(pipe, "npu", level="group")
    assert plan.level == "leaf"
    assert "sequential offload, because the installed diffusers has no group offloading" in plan.reason
    assert np.array_equal(call(pipe), whole("wan22_i2v"))
    assert all(tensor.is_meta for tensor in pipe.transformer.parameters())
    disable_offload(pipe)
    assert not any(tensor.is_meta for tensor in weights(pipe))
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert np.array_equal(call(pipe.to("npu")), whole("wan22_i2v"))


# Streams


def test_diffusers_itself_raises_or_makes_the_stream(runtime):
    """What there is to be enabled, and that it is given back."""

    def by_hand():
        build("wan_t2v").transformer.enable_group_offload(
            onload_device=torch.device("npu"), offload_type="leaf_level", use_stream=True
        )

    plan = enable_offload(build("wan_t2v"), "npu", level="group")
    assert any(p.stream for p in plan.placements)
    if KNOWS_ANY_DEVICE:
        assert plan.streams == "diffusers' own path"
        by_hand()
    else:
        assert plan.streams == "the installed diffusers asks for CUDA or XPU; it gets streams of torch.npu"
        with pytest.raises(ValueError, match="requires a CUDA device"):
            by_hand()


@pytest.fixture
def watched(runtime: Any) -> tuple[Any, list[list[Any]], list[list[set[int]]]]:
    """A pipeline of four blocks after one call: per forward of the transformer, what happened and what lay there."""
    pipe = build("wan_t2v", transformer={"num_layers": 4})
    enable_offload(pipe, "npu", level="group")
    blocks = list(pipe.transformer.blocks)
    journal = runtime.journal
    block_at = {p.data_ptr(): i for i, block in enumerate(blocks) for p in block.parameters()}
    forwards: list[list[Any]] = []
    there: list[list[set[int]]] = []

    def start(*_: Any) -> None:
        journal.clear()
        there.append([])

    def compute(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            journal.add("compute", 0, label=str(i))
            there[-1].append({k for k, b in enumerate(blocks) if any(p.device.type == "npu" for p in b.parameters())})

        return hook

    def end(*_: Any) -> None:
        entries = []
        for entry in journal.entries:
            if entry.what == "copy" and entry.source in block_at:
                entries.append(("copy", block_at[entry.source], entry.stream, entry.pinned))
            elif entry.what == "compute":
                entries.append(("compute", int(entry.label)))
            elif entry.what in ("synchronize", "wait_event"):
                entries.append(("wait", entry.stream))
        forwards.append(entries)

    pipe.transformer.register_forward_pre_hook(start)
    pipe.transformer.register_forward_hook(end)
    for i, block in enumerate(blocks):
        block.attn1.to_q.register_forward_pre_hook(compute(i))
    with runtime.watching():
        call(pipe, "wan_t2v")
    return pipe, forwards, there


def test_the_next_block_is_copied_before_this_one_computes(watched):
    pipe, forwards, _ = watched
    assert len(forwards) == 4  # two steps, with and without the prompt
    side = {entry[2] for forward in forwards for entry in forward if entry[0] == "copy"}
    assert len(side) == 1
    assert 0 not in side
    (side_stream,) = side
    parameters = Counter({i: len(list(block.parameters())) for i, block in enumerate(pipe.transformer.blocks)})
    for n, forward in enumerate(forwards):
        copies = [entry for entry in forward if entry[0] == "copy"]
        assert Counter(entry[1] for entry in copies) == parameters  # each once
        assert all(pinned for *_, pinned in copies)
        computed = {i: forward.index(("compute", i)) for i in range(4)}
        first = {i: min(k for k, e in enumerate(forward) if e[:2] == ("copy", i)) for i in range(4)}
        last = {i: max(k for k, e in enumerate(forward) if e[:2] == ("copy", i)) for i in range(4)}
        for i in range(4):
            if n == 0:  # the order is being learnt: a block is copied when it is called
                assert i == 0 or computed[i - 1] < first[i]
                assert last[i] < computed[i]
                continue
            # the copies of a block have been waited for when it computes
            assert ("wait", side_stream) in forward[last[i] + 1 : computed[i]]
            if i < 3:  # and those of the next one are under way
                assert last[i + 1] < computed[i]
                assert ("wait", side_stream) not in forward[first[i + 1] : computed[i]]
            if i < 2:  # the one after that takes the place of this one, which has been computed by then
                assert computed[i] < first[i + 2]
                assert ("wait", 0) in forward[computed[i] : first[i + 2]]


def test_two_blocks_lie_on_the_device_and_one_while_the_order_is_learnt(watched):
    _, _, there = watched
    assert there[0] == [{0}, {1}, {2}, {3}]
    assert there[1:] == [[{0, 1}, {1, 2}, {2, 3}, {3}]] * 3


def test_blocks_of_a_group_come_and_go_together(runtime):
    pipe = build("wan_t2v", transformer={"num_layers": 4})
    enable_offload(pipe, "npu", level="group", blocks_per_group=2)
    blocks, there = list(pipe.transformer.blocks), []
    for block in blocks:
        block.attn1.to_q.register_forward_pre_hook(
            lambda *_: there.append([b.attn1.to_q.weight.device.type == "npu" for b in blocks])
        )
    call(pipe, "wan_t2v")
    first, second = [True, True, False, False], [False, False, True, True]
    assert there == [first, first, second, second] * 4  # forwards


def test_a_missing_wait_is_noticed(whole, runtime, monkeypatch):
    """That the tests above can fail: without the waits of the side stream, blocks compute with what is not there."""
    pipe = build()
    enable_offload(pipe, "npu", level="group")
    monkeypatch.setattr(runtime.stream, "synchronize", lambda stream: None)
    with runtime.watching():
        assert not np.array_equal(call(pipe), whole("wan22_i2v"))


def test_an_event_lets_arrive_what_was_copied_before_it(runtime):
    """The emulation itself."""
    side, pinned = runtime.stream(), torch.ones(3).pin_memory()
    with runtime.watching(), torch.npu.stream(side):
        before = pinned.to("npu", non_blocking=True)
        event = side.record_event()
        after = pinned.to("npu", non_blocking=True)
        unpinned = torch.ones(3).to("npu", non_blocking=True)
        blocking = pinned.to("npu")
    assert before.cpu().isnan().all()
    torch.npu.current_stream().wait_event(event)
    assert torch.equal(before.cpu(), pinned)
    assert after.cpu().isnan().all()
    torch.npu.current_stream().wait_stream(side)
    for arrived in (after, unpinned, blocking):
        assert torch.equal(arrived.cpu(), pinned)
    waits = [entry.what for entry in runtime.journal.entries if entry.what != "copy"]
    assert waits == ["record_event", "wait_event", "record_event", "wait_event"]


def test_weights_are_copied_there_and_not_back(runtime, device):
    for stream, back in ((True, False), (False, True)):
        pipe = build(transformer={"ffn_dim": 136})
        enable_offload(pipe, "npu", level="group", stream=stream)
        size = pipe.transformer.blocks[0].ffn.net[0].proj.weight.nbytes  # of no other tensor but its transpose
        with runtime.watching():
            call(pipe)
            device.reset()
            call(pipe)
        copies = 2 * 2 * 2 * 2  # matrices, blocks, steps, with and without the prompt
        assert device.uploads()[size] == copies
        assert device.downloads()[size] == copies * back


def test_hooks_that_diffusers_makes_anew_have_the_stream_too(whole, runtime):
    """As when a LoRA is loaded."""
    pipe = build()
    enable_offload(pipe, "npu", level="group")
    group_offloading._maybe_remove_and_reapply_group_offloading(pipe.transformer)
    with runtime.watching():
        assert np.array_equal(call(pipe), whole("wan22_i2v"))
    blocks = {p.data_ptr() for p in pipe.transformer.blocks.parameters()}
    copies = [e for e in runtime.journal.entries if e.what == "copy" and e.source in blocks]
    assert copies
    assert all(entry.stream for entry in copies)


def test_streams_are_made_on_the_current_device_only(runtime, monkeypatch):
    monkeypatch.setattr(torch.npu, "current_device", lambda: 1)
    plan = enable_offload(build(), "npu:2", level="group", dry_run=True)
    assert "the current device, which is npu:1; call torch.npu.set_device(2) first" in plan.streams
    assert not any(p.stream for p in plan.placements)


# Room


@pytest.mark.parametrize(("share", "level"), [(1.1, "none"), (0.9, "model"), (0.2, "group"), (0.12, "leaf")])
def test_the_device_is_asked_and_the_first_level_that_fits_is_taken(share, level, runtime, monkeypatch):
    pipe = build()
    total = sum(tensor.nbytes for tensor in weights(pipe))
    monkeypatch.setattr(torch.npu, "mem_get_info", lambda device=None: (int(share * total / 0.75), 0), raising=False)
    plan = enable_offload(pipe, "npu", dry_run=True)
    assert plan.level == level
    assert plan.fits
    assert f"{'fits' if share > 1 else 'the first level that fits'}" in plan.reason


def test_its_own_weights_there_and_what_torch_keeps_are_room(runtime, monkeypatch):
    pipe = build().to("npu")
    total = sum(tensor.nbytes for tensor in weights(pipe))
    for name, value in (("mem_get_info", (1000, 0)), ("memory_reserved", 300), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.npu, name, lambda device=None, value=value: value, raising=False)
    assert enable_offload(pipe, "npu", dry_run=True).budget == total + 1200


def test_a_vae_that_has_no_room_comes_layer_by_layer(whole, runtime):
    pipe = build()
    roomy = enable_offload(pipe, "npu", level="group", dry_run=True)
    plan = enable_offload(pipe, "npu", level="group", budget=roomy.peak - 1, reserve=0)
    assert {p.name: p.how for p in roomy.placements}["vae"] == DEVICE
    assert {p.name: (p.how, p.stream) for p in plan.placements}["vae"] == (LEAVES, False)
    peak = Peak(pipe)
    with runtime.watching(peak):
        assert np.array_equal(call(pipe), whole("wan22_i2v"))
    assert peak.bytes <= plan.peak < roomy.peak


def test_what_may_not_fit_is_warned_about_with_numbers(runtime, caplog):
    pipe = build()
    with caplog.at_level(logging.WARNING, "wan_patches"):
        plan = enable_offload(pipe, "npu", budget=4096)
    assert plan.level == "leaf"
    assert plan.fits is False
    assert "too large: pass a smaller `reserve`, or use another device" in plan.reason
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "wan_patches"]
    assert warning.startswith("WanImageToVideoPipeline may not fit on npu: ")
    assert "4.0 KiB available, of which 1.0 KiB are reserved" in warning


# Back


@pytest.mark.parametrize("level", ["none", "model", "group", "leaf"])
@pytest.mark.parametrize("before", ["cpu", "npu"])
def test_back_where_it_was(before, level, whole, runtime):
    pipe = build().to(before)
    call(pipe)
    attributes = {*vars(pipe)}
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    parameters = {id(parameter) for module in modules for parameter in module.parameters()}
    values = [(tensor.device, tensor.cpu()) for tensor in weights(pipe)]
    enable_offload(pipe, "npu", level=level)
    with runtime.watching():
        call(pipe)
    disable_offload(pipe)
    for tensor, (device, value) in zip(weights(pipe), values, strict=True):
        assert tensor.device == device
        assert torch.equal(tensor.cpu(), value)
    assert {id(parameter) for module in modules for parameter in module.parameters()} == parameters
    for module in modules:
        assert not hasattr(module, "_hf_hook")
        registry = getattr(module, "_diffusers_hook", None)
        assert registry is None or not registry.hooks
        assert "forward" not in vars(module)  # which would look like a patch of that one module
    assert {*vars(pipe)} - attributes <= {"_all_hooks"}
    runtime.journal.clear()
    with runtime.watching():
        assert np.array_equal(call(pipe.to("npu")), whole("wan22_i2v"))
    assert not any(entry.stream for entry in runtime.journal.entries)
    with pytest.raises(ValueError, match="not offloaded by enable_offload"):
        disable_offload(pipe)


def test_a_forward_of_its_own_is_kept(runtime):
    pipe = build()
    patched, bound = pipe.transformer.blocks[0].attn1.to_q, pipe.transformer.blocks[1].attn1.to_q
    patched.forward = lambda x: torch.nn.functional.linear(x, patched.weight, patched.bias)
    bound.forward = bound.forward  # as other libraries leave behind
    own = [vars(module)["forward"] for module in (patched, bound)]
    enable_offload(pipe, "npu", level="leaf")
    with runtime.watching():
        call(pipe)
    disable_offload(pipe)
    assert [vars(module)["forward"] for module in (patched, bound)] == own


class Interrupted(BaseException):
    """As `KeyboardInterrupt`, but nobody else's."""


def under_way(pipe: Any) -> list[torch.Tensor]:
    """Weights whose copies to the device have not arrived."""
    return [t for t in weights(pipe) if t.device.type == "npu" and t.is_floating_point() and t.cpu().isnan().any()]


def interrupt(pipe: Any) -> None:
    """A call that ends in the first block, when the next group is being copied."""

    def raises(*_: Any) -> None:
        raise Interrupted

    with pipe.transformer.blocks[0].attn1.to_q.register_forward_pre_hook(raises), pytest.raises(Interrupted):
        call(pipe)
    assert under_way(pipe)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("level", ["group", "leaf"])
@pytest.mark.parametrize("before", ["cpu", "npu"])
def test_back_after_an_interrupted_call_with_every_weight(before, level, low_cpu_mem_usage, runtime):
    pipe = build().to(before)
    values = [tensor.cpu() for tensor in weights(pipe)]
    enable_offload(pipe, "npu", level=level, low_cpu_mem_usage=low_cpu_mem_usage)
    with runtime.watching():
        call(pipe)  # the order of groups is known from here on
        interrupt(pipe)
        disable_offload(pipe)
    assert {tensor.device.type for tensor in weights(pipe)} == {before}
    for tensor, value in zip(weights(pipe), values, strict=True):
        assert torch.equal(tensor.cpu(), value)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_back_after_an_interrupted_copy_of_a_group(calls_before, runtime):
    """Some of its weights have been asked for, the others have not."""
    pipe = build()
    values = [tensor.clone() for tensor in weights(pipe)]
    enable_offload(pipe, "npu", level="group")
    group = list(pipe.transformer.blocks[1].parameters())

    def interrupts(op: str) -> None:
        if len({parameter.device for parameter in group}) > 1:
            raise Interrupted

    with runtime.watching():
        for _ in range(calls_before):
            call(pipe)
    with runtime.watching(interrupts), pytest.raises(Interrupted):
        call(pipe)
    assert bool(under_way(pipe)) == bool(calls_before)  # the first call waits for each
    disable_offload(pipe)
    for tensor, value in zip(weights(pipe), values, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("level", ["group", "leaf"])
def test_a_call_after_an_interrupted_one_has_the_same_bits(level, whole, runtime):
    pipe = build()
    enable_offload(pipe, "npu", level=level)
    with runtime.watching():
        call(pipe)
        interrupt(pipe)
        assert np.array_equal(call(pipe), whole("wan22_i2v"))


def test_going_back_can_be_interrupted_and_done_again(runtime, monkeypatch):
    pipe = build()
    values = [tensor.clone() for tensor in weights(pipe)]
    enable_offload(pipe, "npu", level="group")

    def raises(*_: Any) -> None:
        raise Interrupted

    with runtime.watching():
        call(pipe)
        interrupt(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.transformer), "to", raises)
            with pytest.raises(Interrupted):
                disable_offload(pipe)
        disable_offload(pipe)
    for tensor, value in zip(weights(pipe), values, strict=True):
        assert torch.equal(tensor, value)


def test_one_level_after_another(whole, runtime):
    pipe = build()
    for level in ("group", "model", "leaf", "none"):
        enable_offload(pipe, "npu", level=level)
        with runtime.watching():
            assert np.array_equal(call(pipe), whole("wan22_i2v"))
        disable_offload(pipe)


def test_what_raises_leaves_the_pipeline_as_it_was(whole, runtime):
    pipe = build()
    *_, last = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))

    def refuse(**options: Any) -> None:
        raise RuntimeError("no")

    object.__setattr__(last, "enable_group_offload", refuse)
    with pytest.raises(RuntimeError, match="no"):
        enable_offload(pipe, "npu", level="group")
    assert {tensor.device.type for tensor in weights(pipe)} == {"cpu"}
    object.__delattr__(last, "enable_group_offload")
    enable_offload(pipe, "npu", level="group")  # it is not taken for one that is offloaded
    with runtime.watching():
        assert np.array_equal(call(pipe), whole("wan22_i2v"))


def test_what_raises_leaves_it_where_an_earlier_level_has_put_it(runtime, monkeypatch):
    pipe = build()
    enable_offload(pipe, "npu", level="none")

    def refuse(*_: Any, **options: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(type(pipe.transformer_2), "enable_group_offload", refuse)
    with pytest.raises(RuntimeError, match="no"):
        enable_offload(pipe, "npu", level="group")
    assert {tensor.device.type for tensor in weights(pipe)} == {"npu"}
    disable_offload(pipe)
    assert {tensor.device.type for tensor in weights(pipe)} == {"cpu"}


def test_a_dry_run_moves_nothing(runtime, device):
    pipe = build()
    device.reset()
    plans = [enable_offload(pipe, "npu", level=level, dry_run=True) for level in ("auto", *offload.LEVELS)]
    assert not device.uploads()
    assert {tensor.device.type for tensor in weights(pipe)} == {"cpu"}
    with pytest.raises(ValueError, match="not offloaded"):
        disable_offload(pipe)
    for one, other in itertools.pairwise(plans):
        assert one.estimates == other.estimates


@pytest.mark.parametrize(
    ("offloaded", "hint"),
    [
        (lambda pipe: enable_offload(pipe, "npu", level="group"), r"wan_patches\.disable_offload\(pipe\)"),
        (lambda pipe: enable_offload(pipe, "npu", level="model"), r"wan_patches\.disable_offload\(pipe\)"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="npu"), r"pipe\.remove_all_hooks\(\)"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(device="npu"), r"pipe\.remove_all_hooks\(\)"),
        (
            lambda pipe: pipe.transformer.enable_group_offload(
                onload_device=torch.device("npu"), offload_type="leaf_level"
            ),
            r"pipe\.transformer\._diffusers_hook\.remove_hook\('group_offloading'\)",
        ),
    ],
)
def test_what_is_offloaded_already_is_left_alone_with_the_way_back(offloaded, hint, runtime):
    pipe = build()
    offloaded(pipe)
    with pytest.raises(ValueError, match=f"offloaded.*already: call {hint} first"):
        enable_offload(pipe, "npu")


def test_the_example(tmp_path, runtime, capsys):
    example = load(Path(__file__).parents[2] / "examples" / "offload.py")
    build("wan_t2v").save_pretrained(tmp_path / "model")
    tiny = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
    output = tmp_path / "video.gif"
    with runtime.watching():
        example.main(str(tmp_path / "model"), "a fox", str(output), "npu", level="group", **tiny)
    assert "WanPipeline on npu: level 'group'" in capsys.readouterr().out
    with PIL.Image.open(output) as video:
        assert video.n_frames == 5
