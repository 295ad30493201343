"""Patches that come and go in the middle of a generation on an accelerator, where more of them do something."""

from __future__ import annotations

import pytest
import torch

from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.npu_emulated, pytest.mark.usefixtures("one_thread", "device", "deep_copies")]

NAMES = ("wan22_i2v", "wan22_ti2v", "wan_vace", "skyreels_v2_df_i2v", "chronoedit", "helios_i2v", "helios_pyramid")


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.loop("wan22_i2v", "chronoedit", "helios_pyramid")
@pytest.mark.parametrize("family", [name for name in NAMES if name in available()])
def test_generations_have_the_bits_of_stock(family, rounds, toggled):
    pipe = FAMILIES[family].build(dtype=torch.bfloat16).to("npu")
    pipe.set_progress_bar_config(disable=True)

    def run():
        torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
        return torch.as_tensor(pipe(**FAMILIES[family].inputs(steps=3)).frames).cpu()

    stock = run()
    for seed, video in enumerate(toggled(run, range(rounds))):
        assert torch.equal(video, stock), seed
