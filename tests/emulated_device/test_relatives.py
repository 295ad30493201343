"""Pipelines outside of the Wan family: what the host waits for, stock and patched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import wan_patches
from wan_patches.testing.relatives import RELATIVES, available

#: Pipelines with each kind of rotary tables and each autoencoder.
NAMES = (
    *("flux", "flux2", "chroma", "hunyuan_video", "hunyuan_video_1.5", "cogvideox", "cogview4", "glm_image", "cosmos2"),
    *("krea2", "bria_fibo", "ltx", "qwen_image", "qwen_image_edit", "z_image", "lumina2", "hidream", "kandinsky5"),
)


def _on_device(value):
    if isinstance(value, list):
        return [_on_device(item) for item in value]
    return value.to("npu") if isinstance(value, torch.Tensor) else value


def _runner(name, device):
    relative = RELATIVES[name]
    pipe = relative.build(dtype=torch.bfloat16).to("npu")

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
    assert few_patched <= few
    assert many_patched <= many


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
