"""How often the host waits in a step of denoising, on an emulated accelerator: stock against patched, same bits.

What a step costs is the difference of two runs that differ in their number of steps.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.ops import step_loop as ops
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.npu_emulated, pytest.mark.usefixtures("deep_copies")]

UPLOAD, READ = "copy to device", "aten::_local_scalar_dense"
VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Step:
    """What a step of stock waits for, as often; `left` uploads remain, which are of rotary tables."""

    uploads: Fraction | int = 6
    reads: Fraction | int = 1  # whether a matrix was singular
    left: int = 0
    loops: int = 1  # how many loops a run has, each with so many steps


#: Helios' models upload four lists of frame numbers in each of two calls, ChronoEdit's four of two indices.
HELIOS = Step(uploads=8 + 5, reads=1 + 6, left=8, loops=2)
PYRAMID = Step(uploads=8 + 5, reads=1 + 6, left=8, loops=6)
STEPS = {
    name: step
    for name, step in {
        "wan_t2v": Step(),
        "wan22_i2v": Step(reads=2),  # and which transformer it is
        "wan22_ti2v": Step(),
        "wan_v2v": Step(),
        "wan_vace": Step(),
        "wan_animate": Step(loops=2),
        "skyreels_v2_i2v": Step(),
        "chronoedit": Step(uploads=6 + 4, left=4),
        "helios": HELIOS,
        "helios_i2v": HELIOS,
        "helios_pyramid": PYRAMID,
        "helios_distilled": Step(uploads=4, reads=2, left=4, loops=6),  # one call: no guidance
    }.items()
    if name in available()
}


@dataclass(frozen=True)
class Run:
    video: Any
    waits: Counter[str]
    uploads: Counter[int]


@pytest.fixture
def build(device):
    def built(name, **options):
        return FAMILIES[name].build(dtype=torch.bfloat16, **options).to("npu")

    return built


def run(pipe, name, device, **more):
    torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
    call = FAMILIES[name].inputs(**{"output_type": "latent", **more})
    device.reset()
    video = pipe(**call).frames
    waits, uploads = device.waits(), device.uploads()
    return Run(video.cpu() if isinstance(video, torch.Tensor) else torch.as_tensor(np.asarray(video)), waits, uploads)


def per_step(pipe, name, device, first=3, last=6, **more):
    """The waits of a step, by kind, and all videos. `strength` is 0.8."""
    few, many = run(pipe, name, device, steps=first, **more), run(pipe, name, device, steps=last, **more)
    steps = last - first if name != "wan_v2v" else int(last * 0.8) - int(first * 0.8)
    kinds = few.waits.keys() | many.waits.keys()
    counts = {kind: Fraction(many.waits[kind] - few.waits[kind], steps) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}, (few, many)


def assert_same(stock, patched):
    for a, b in zip(stock, patched):
        assert a.video.isfinite().all()
        assert a.video.std() > 0
        assert (a.video.dtype, a.video.shape) == (b.video.dtype, b.video.shape)
        assert torch.equal(a.video, b.video)


@pytest.mark.parametrize("name", STEPS)
def test_the_host_does_not_wait_in_a_step(name, build, device):
    pipe, step = build(name), STEPS[name]
    waits, stock = per_step(pipe, name, device)
    with wan_patches.enabled(["step_loop"]):
        left, patched = per_step(pipe, name, device)
    assert_same(stock, patched)
    uploads, reads = step.uploads, step.reads
    if VERSION < (0, 38) and not name.startswith("helios"):
        uploads -= 1  # five lists of numbers
    assert waits == {UPLOAD: uploads * step.loops, READ: reads * step.loops}
    assert left == ({UPLOAD: step.left * step.loops} if step.left else {})
    assert patched[0].waits.total() < stock[0].waits.total()


@pytest.mark.parametrize("name", [n for n in ("skyreels_v2_df", "skyreels_v2_df_v2v") if n in available()])
def test_diffusion_forcing(name, build, device):
    """Each latent frame has a scheduler of its own."""
    pipe = build(name)
    waits, stock = per_step(pipe, name, device)
    with wan_patches.enabled(["step_loop"]):
        left, patched = per_step(pipe, name, device)
    assert_same(stock, patched)
    assert sum(waits.values()) >= 20
    assert left == {}


SCHEDULERS = {
    "one": lambda: unipc(solver_order=1),
    "three": lambda: unipc(solver_order=3),
    "bh1": lambda: unipc(solver_type="bh1", lower_order_final=False, final_sigmas_type="sigma_min"),
    "karras": lambda: diffusers.UniPCMultistepScheduler(use_karras_sigmas=True),
    "velocity": lambda: diffusers.UniPCMultistepScheduler(prediction_type="v_prediction"),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
}


def unipc(**options):
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_schedulers(name, build, device):
    pipe = build("wan22_i2v")
    pipe.scheduler = SCHEDULERS[name]()
    waits, stock = per_step(pipe, "wan22_i2v", device)
    with wan_patches.enabled(["step_loop"]):
        left, patched = per_step(pipe, "wan22_i2v", device)
    assert_same(stock, patched)
    assert waits[READ] >= 1  # the timestep
    assert left == {}


def test_a_scheduler_that_nobody_knows(build, device):
    """Its timesteps are fetched once, and the rest is its own."""

    class Mine(diffusers.SchedulerMixin, diffusers.ConfigMixin):
        order, config_name = 1, "scheduler_config.json"

        @diffusers.configuration_utils.register_to_config
        def __init__(self, num_train_timesteps=1000):
            self.timesteps = None

        def set_timesteps(self, steps, device=None):
            self.timesteps = torch.linspace(1000, 1, steps).to(device)

        def step(self, prediction, t, sample, return_dict=True):
            return (sample - prediction.float() * (t.item() / 5000),)

    pipe = build("wan22_i2v")
    pipe.scheduler = Mine()
    waits, stock = per_step(pipe, "wan22_i2v", device)
    with wan_patches.enabled(["step_loop"]):
        left, patched = per_step(pipe, "wan22_i2v", device)
    assert_same(stock, patched)
    assert (waits, left) == ({READ: 2}, {READ: 1})


def test_each_transformer_has_its_steps(build, device, monkeypatch):
    pipe = build("wan22_i2v")
    for ratio in (0.0, 0.8, 0.9, 2.0):
        pipe.register_to_config(boundary_ratio=ratio)
        called = {}
        for on in (False, True):
            called[on] = []
            for name in ("transformer", "transformer_2"):
                hook = getattr(pipe, name).register_forward_pre_hook(lambda *_, n=name, to=called[on]: to.append(n))
                monkeypatch.setattr(pipe, f"_{name}_hook", hook, raising=False)
            with wan_patches.enabled(["step_loop"] if on else []):
                run(pipe, "wan22_i2v", device, steps=5)
            for name in ("transformer", "transformer_2"):
                getattr(pipe, f"_{name}_hook").remove()
        assert called[True] == called[False]
        assert len(set(called[True])) == (2 if 0 < ratio < 1 else 1)


def test_a_callback_that_writes_to_the_timesteps(build, device):
    """It moves the boundary; what the host knew of them holds no longer."""

    def callback(pipe, step, t, inputs):
        if step == 0:
            pipe.scheduler.timesteps[1:] -= 100
        return inputs

    pipe, called = build("wan22_i2v"), []
    pipe.transformer_2.register_forward_pre_hook(lambda *_: called.append(1))
    stock = run(pipe, "wan22_i2v", device, steps=6, callback_on_step_end=callback)
    before = len(called)
    plain = run(pipe, "wan22_i2v", device, steps=6)
    assert len(called) - before < before  # it did move
    assert not torch.equal(stock.video, plain.video)
    called.clear()
    with wan_patches.enabled(["step_loop"]):
        patched = run(pipe, "wan22_i2v", device, steps=6, callback_on_step_end=callback)
    assert_same([stock], [patched])
    assert len(called) == before


def test_interrupted(build, device):
    def callback(pipe, step, t, inputs):
        pipe._interrupt = step >= 2
        return inputs

    pipe = build("wan_t2v")
    stock = run(pipe, "wan_t2v", device, steps=6, callback_on_step_end=callback)
    with wan_patches.enabled(["step_loop"]):
        patched = run(pipe, "wan_t2v", device, steps=6, callback_on_step_end=callback)
    assert_same([stock], [patched])


@pytest.mark.parametrize("name", [n for n in ("wan22_i2v", "helios") if n in available()])
def test_inference_mode(name, build, device):
    pipe, step = build(name), STEPS[name]
    with torch.inference_mode():
        _, stock = per_step(pipe, name, device)
        with wan_patches.enabled(["step_loop"]):
            left, patched = per_step(pipe, name, device)
    assert_same(stock, patched)
    assert left == ({UPLOAD: step.left * step.loops} if step.left else {})


def test_cpu_offload(device):
    pipe = FAMILIES["wan22_i2v"].build(dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload(device="npu")
    stock = run(pipe, "wan22_i2v", device, steps=4)
    with wan_patches.enabled(["step_loop"]):
        patched = run(pipe, "wan22_i2v", device, steps=4)
    assert_same([stock], [patched])
    assert stock.waits[READ] - patched.waits[READ] >= 4 + 2


@pytest.mark.skipif("helios" not in available(), reason="Helios came with diffusers 0.37")
@pytest.mark.parametrize("name", ["HeliosScheduler", "HeliosDMDScheduler"])
def test_the_schedules_of_further_chunks_are_not_uploaded(name, device):
    """Each is a tensor of its own, and can be written to."""
    scheduler = getattr(diffusers, name)(use_dynamic_shifting=True, gamma=0.3333)

    def schedules(chunks):
        for _ in range(chunks):
            for stage in range(3):
                scheduler.set_timesteps(3, stage, device="npu", mu=0.5 + stage / 10)
                yield scheduler.timesteps.cpu(), scheduler.sigmas.cpu()
                scheduler.sigmas.zero_()
                scheduler.timesteps.zero_()

    stock = list(schedules(3))
    with wan_patches.enabled(["step_loop"]):
        patched = list(schedules(1))
        device.reset()
        patched += schedules(2)
        assert device.waits() == {"copy to host": 2 * 3 * 2}  # of this test
    for one, other in zip(stock, patched):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other))


def test_something_wrong_would_be_noticed(build, device, monkeypatch):
    """That the comparisons above can fail: a level that is off by one bit, a boundary that is not asked for."""
    pipe = build("wan22_i2v")
    stock = run(pipe, "wan22_i2v", device, steps=4)
    right = ops.on_device
    for name, wrong in (
        ("on_device", lambda *args: right(*args) * (1 + 2**-20)),
        ("position", lambda timesteps, t: 0),
    ):
        with monkeypatch.context() as patch, wan_patches.enabled(["step_loop"]):
            if name == "on_device":
                patch.setattr(ops, "moved", lambda owner, values, device: values.to(device))
            patch.setattr(ops, name, wrong)
            if VERSION >= (0, 38) or name != "on_device":
                assert not torch.equal(run(pipe, "wan22_i2v", device, steps=4).video, stock.video)
