"""The example of a third-party plugin: installed on its own, found, active, with the bits of stock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the plugin is installed, without network."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)  # the build leaves files beside the project
    install = ["install", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(code: str, site: Path | None) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "" if site is None else str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


STATUS = """
import sys, wan_patches
print([(report.name, report.state) for report in wan_patches.enable().reports if report.name == "allegro"])
assert not {"torch", "diffusers"} & set(sys.modules)
"""


def test_it_is_found_once_it_is_installed(site):
    assert run(STATUS, None) == "[]\n"
    assert run(STATUS, site) == "[('allegro', 'waiting for import')]\n"


ACTIVE = """
import torch, wan_patches, wan_patches_allegro.ops
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

torch.manual_seed(0)
model = AllegroTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=48,
    caption_channels=16, sample_height=8, sample_width=8, sample_frames=3,
)
*tables, times, rows, columns = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 3)
positions = tuple(torch.cartesian_prod(times, rows, columns).long().T[:, None])
call = dict(
    hidden_states=torch.randn(2, 4, 3, 8, 8), encoder_hidden_states=torch.randn(2, 7, 16),
    timestep=torch.tensor([500, 500]), attention_mask=torch.ones(2, 3, 8, 8), encoder_attention_mask=torch.ones(2, 7),
    image_rotary_emb=(tuple(tables), positions), return_dict=False,
)
calls, form = [], wan_patches_allegro.ops.rotated
rotated, form.function = form.function, lambda *args: calls.append(args[0].dtype) or rotated(*args)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    model.to(dtype)
    given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    with torch.no_grad():
        stock = model(**given)[0]
        with wan_patches.enabled() as status:
            patched = model(**given)[0]
        assert torch.equal(stock, model(**given)[0])
    assert stock.isfinite().all() and stock.std() > 0
    assert torch.equal(stock, patched), dtype
    assert calls == 4 * [dtype], calls  # queries and keys of two layers
    calls.clear()

model.float()
gradients = []
for patches in ([], ["allegro"]):
    model.zero_grad()
    with wan_patches.enabled(patches):
        model(**call)[0].square().sum().backward()
    gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
assert not calls and gradients[0]  # autograd sees stock
assert all(map(torch.equal, *gradients))
(report,) = wan_patches.enable().of("allegro")
assert report.note == "fast in 12 of 16 calls; others: autograd, autocast, a transform or a tracer looks on (4)", report
wan_patches.disable()
print(report.state)
"""


EXACT = """
from diffusers.models import embeddings


def drawn(batch, heads, seq, dim, dtype=torch.float32):
    x = torch.randn(2 * batch, heads, seq, 2 * dim).to(dtype)[::2, ..., :dim]
    axes = tuple(tuple(torch.randn(2, 9, dim // 3)) for _ in range(3))
    return x, axes, tuple(torch.randint(9, (batch, seq)) for _ in range(3))


for *shape, dtype in [(1, 2, 4095, 96, torch.bfloat16), (3, 3, 17, 30, torch.float32), (2, 1, 1, 6, torch.float16)]:
    x, *others = drawn(*shape, dtype)
    x[..., 0, :] *= 1e-39
    x[..., -1, 0] = float("inf")
    with wan_patches.enabled(["allegro"]):
        patched = embeddings.apply_rotary_emb_allegro(x, *others)
    stock = embeddings.apply_rotary_emb_allegro(x, *others)
    assert patched.dtype == stock.dtype and patched.stride() == stock.stride()
    assert torch.equal(patched.nan_to_num(nan=7), stock.nan_to_num(nan=7))
"""

GATED = """
wan_patches.ops.dispatch._device = lambda args: torch.device("cuda")
wan_patches.patching.fidelity.gate.reset()
with wan_patches.enabled(["allegro"]), torch.no_grad():
    embeddings.apply_rotary_emb_allegro(*drawn(1, 2, 3, 6))
verdicts = [(verdict.op, verdict.exact) for verdict in wan_patches.status().verdicts]
assert verdicts == [("Allegro rotary embedding", True)]
"""


def test_it_is_active_keeps_every_bit_and_is_gated_on_accelerators(site):
    assert run(ACTIVE + EXACT + GATED, site) == "active\n"
