"""Pipelines outside of the Wan family: what the host waits for, stock and patched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

import wan_patches
from wan_patches.ops.conditioning import valid_first
from wan_patches.patching import tally
from wan_patches.testing.relatives import RELATIVES, available

#: Pipelines with each kind of rotary tables and each autoencoder.
NAMES = (
    *("flux", "flux2", "chroma", "hunyuan_video", "hunyuan_video_1.5", "cogvideox", "cogview4", "glm_image", "cosmos2"),
    *(
        "hunyuan_image",
        "krea2",
        "bria_fibo",
        "ltx",
        "qwen_image",
        "qwen_image_edit",
        "z_image",
        "lumina2",
        "hidream",
        "kandinsky5",
    ),
)
#: Waits in a step that remain: tables made on the CPU in each forward (CogView 4, GLM-Image), and lengths of prompts
#: (Lumina 2) and numbers of tokens of each expert (HiDream) that decide shapes. Images are guided: two forwards a step.
REMAINING = {"cogview4": 4, "glm_image": 6, "lumina2": 8, "hidream": 18}


def _on_device(value):
    if isinstance(value, list):
        return [_on_device(item) for item in value]
    return value.to("npu") if isinstance(value, torch.Tensor) else value


def _runner(name, device, **components):
    relative = RELATIVES[name]
    pipe = relative.build(dtype=torch.bfloat16).to("npu")
    pipe.register_modules(**components)

    def run(steps):
        inputs = relative.inputs(dtype=torch.bfloat16, num_inference_steps=steps)
        inputs = {key: _on_device(value) for key, value in inputs.items()}
        device.reset()
        with torch.no_grad():
            result = pipe(**inputs, return_dict=False)[0]
        return Counter(device.waits()), torch.as_tensor(result).cpu()

    return pipe, run


@pytest.mark.parametrize("name", [name for name in NAMES if name in available()])
def test_results_are_bit_identical_and_the_host_waits_no_more(name, device):
    _, run = _runner(name, device)

    def measure():
        run(2)  # the gate's comparisons, once
        few, result = run(2)
        many, _ = run(4)
        return few, many, result

    few, many, stock = measure()
    with wan_patches.enabled():
        few_patched, many_patched, patched = measure()
    assert stock.isfinite().all()
    assert torch.equal(stock, patched)
    assert few_patched.total() <= few.total()
    assert many_patched.total() <= many.total()
    assert (many_patched - few_patched).total() == 2 * REMAINING.get(name, 0)


def test_a_scheduler_that_looks_back_reads_its_schedule_once(device):
    _, run = _runner("cogvideox", device, scheduler=CogVideoXDPMScheduler())
    stock = run(4)[1]
    with wan_patches.enabled():
        run(2)
        waits, patched = run(4)
    assert torch.equal(stock, patched)
    assert waits == {"copy to host": 1, "copy to device": 2 * 4}  # the schedule; noise that is drawn on the CPU


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_sorted_on_the_device(share, batch, device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 300, 16, generator=generator)
    valid = torch.rand(batch, 300, generator=generator) < share
    on_device = tokens.to("npu"), valid.to("npu")
    expected = valid_first.reference(tokens, valid)
    valid_first(*on_device)  # the gate's comparison
    tally.reset()
    device.reset()
    found = valid_first(*on_device)
    assert device.waits().total() == 0
    assert [way.form for way in tally.counted()] == ["sorted, without a wait for the number of valid tokens"]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))


@pytest.mark.parametrize("is_absent", [True, False])
def test_a_model_with_an_image_does_not_ask_whether_it_has_one(is_absent, device):
    pipe, run = _runner("hunyuan_video_1.5", device)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    run(1)
    hook.remove()
    given = calls[0]
    image = given["image_embeds"]
    given["image_embeds"] = image if is_absent else torch.randn(image.shape, dtype=image.dtype).to("npu")
    assert (given["image_embeds"] == 0).all() == is_absent

    def forward():
        device.reset()
        with torch.no_grad():
            result = pipe.transformer(**given)[0]
        return device.waits().total(), result.cpu()

    def of_first_block():
        """What the blocks are given; attention hides invalid tokens from the result."""
        given_to_block = []
        block = pipe.transformer.transformer_blocks[0]
        hook = block.register_forward_pre_hook(lambda _, args: given_to_block.extend(args))
        forward()
        hook.remove()
        return [value.cpu() for value in given_to_block if isinstance(value, torch.Tensor)]

    waits, stock = forward()
    expected = of_first_block()
    with wan_patches.enabled():
        forward()
        waits_patched, patched = forward()
        found = of_first_block()
    assert torch.equal(stock, patched)
    assert (waits, waits_patched) == (13, 0)
    assert len(expected) == 4
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", [name for name in ("cogview4", "glm_image") if name in available()])
@pytest.mark.parametrize("own_processor", [False, True])
def test_tables_made_on_the_cpu_are_uploaded_once_a_forward(name, own_processor, device):
    pipe, run = _runner(name, device)
    layers, seen = len(pipe.transformer.transformer_blocks), []
    if own_processor:
        attention = pipe.transformer.transformer_blocks[0].attn1

        class Processor(type(attention.processor)):
            def __call__(self, attn, hidden_states, *args, image_rotary_emb=None, **more):
                seen.append(image_rotary_emb[0].device.type)
                return super().__call__(attn, hidden_states, *args, image_rotary_emb=image_rotary_emb, **more)

        attention.processor = Processor()

    def uploads():
        run(2)
        (few, _), (many, result) = run(2), run(4)
        return (many - few).total() / 2, result

    stock, expected = uploads()
    stock_seen = [*seen]
    seen.clear()
    with wan_patches.enabled():
        patched, result = uploads()
    assert torch.equal(result, expected)
    assert seen == stock_seen
    forwards, tables, uses = 2, 2, 2 * layers  # with guidance; cosines and sines; by queries and keys
    assert stock - patched == (0 if own_processor else forwards * tables * (uses - 1))
