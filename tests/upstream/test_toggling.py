"""Patches that come and go in the middle of a call: what one function leaves, patched or not, all others understand."""

from __future__ import annotations

import pytest
import torch

from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]


def generation(family):
    pipe = FAMILIES[family].build()
    pipe.set_progress_bar_config(disable=True)
    return lambda: torch.as_tensor(pipe(**FAMILIES[family].inputs()).frames)


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.loop("wan_t2v", "wan22_i2v", "wan_vace", "skyreels_v2_df", "chronoedit", "sana_video", "helios_i2v")
@pytest.mark.parametrize("family", available())
def test_generations_have_the_bits_of_stock(family, rounds, toggled):
    run = generation(family)
    stock = run()
    for seed, video in enumerate(toggled(run, range(rounds))):
        assert torch.equal(video, stock), seed


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in available() if name in ("wan22_ti2v", "helios")])
def test_close_patches_come_and_go_too(family, rounds, toggled):
    run = generation(family)
    stock = run()
    for seed, video in enumerate(toggled(run, range(rounds), fidelity="close")):
        torch.testing.assert_close(video, stock, rtol=1e-3, atol=1e-3, msg=str(seed))
