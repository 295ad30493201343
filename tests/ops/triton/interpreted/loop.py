"""The CLOSE kernels over a whole denoising loop of a small Wan model: error against fp64, compared with stock's."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import wan_patches
from wan_patches.patching.fidelity import gate


def _model(dtype):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=96, num_layers=2,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(torch.float32).to(dtype)


def _denoised(model, dtype, seed):
    torch.manual_seed(seed)
    latents, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    latents = latents.to(dtype)
    for t in scheduler.timesteps:
        velocity = model(latents, t[None], text.to(dtype), return_dict=False)[0]
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_denoising(dtype, as_on_cuda):
    exact, model = _model(torch.float16).to(torch.float64), _model(torch.float16).to(dtype)
    errors = {"stock": 0.0, "ours": 0.0}
    for seed in range(5):
        truth = _denoised(exact, torch.float64, seed)
        stock = _denoised(model, dtype, seed)
        with wan_patches.enabled(["modulation"], fidelity="close"):
            ours = _denoised(model, dtype, seed)
        errors["stock"] += (stock - truth).abs().mean().item()
        errors["ours"] += (ours - truth).abs().mean().item()
    assert len(gate.verdicts()) >= 3
    assert all(verdict.exact for verdict in gate.verdicts()), gate.verdicts()
    assert errors["stock"] > 0
    assert errors["ours"] <= 1.01 * errors["stock"], errors["ours"] / errors["stock"]
