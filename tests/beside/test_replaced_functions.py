"""Functions that somebody has replaced are called as often as by stock: compatibility layers of vendors do that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import wan_patches
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread", "any_size")]

#: What each family's pipeline computes with; not what only makes new tensors.
FUNCTIONS = [
    *((F, name) for name in ("conv3d", "interpolate", "layer_norm", "normalize", "pad", "rms_norm", "silu")),
    *(
        (torch, name)
        for name in ("cat", "clamp", "concat", "from_numpy", "repeat_interleave", "rms_norm", "layer_norm")
    ),
]
NAMES = ["wan22_i2v", "wan_vace", "wan_animate", "skyreels_v2_df_i2v", "chronoedit", "sana_video_i2v", "helios_i2v"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in NAMES if name in available()])
def test_replaced_functions_are_called_as_often_as_by_stock(name, when, any_size, monkeypatch):
    """One at a time, before patches are enabled or after."""
    pipe, inputs = FAMILIES[name].build(dtype=torch.bfloat16), FAMILIES[name].inputs

    def run():
        return torch.as_tensor(pipe(**inputs(steps=1, output_type="np"))[0])

    for owner, function in FUNCTIONS[when == "after" :: 2]:
        calls, own = [], getattr(owner, function)

        def replaced(*args, calls=calls, own=own, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        with monkeypatch.context() as patched:
            if when == "after":
                wan_patches.enable(strict=True)
            patched.setattr(owner, function, replaced)
            wan_patches.enable(strict=True)
            found, ours = run(), len(calls)
            wan_patches.disable()
            stock = run()
        assert ours == len(calls) - ours, f"{owner.__name__}.{function}"
        assert torch.equal(found, stock)
