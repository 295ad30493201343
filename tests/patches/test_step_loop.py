"""Schedulers and loops of the installed diffusers, patched in place, against stock.

A CPU has no waits and uses stock's code, so the CPU is treated as an accelerator here. Counts of waits and copies on an
accelerator are in `tests/emulated_device`.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.bindings import step_loop
from wan_patches.ops import step_loop as ops
from wan_patches.patches.step_loop import PATCHES
from wan_patches.patching.status import ACTIVE
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

UNIPC = diffusers.UniPCMultistepScheduler
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
HAS_HELIOS = hasattr(diffusers, "HeliosScheduler")
needs_helios = pytest.mark.skipif(not HAS_HELIOS, reason="Helios came with diffusers 0.37")


@pytest.fixture
def fast(monkeypatch):
    """A CPU taken for an accelerator, and what was done there in place of stock's way."""
    calls: Counter[str] = Counter()

    def counted(place, name):
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kwargs: calls.update([name]) or function(*args, **kwargs))

    for name in ("on_device", "moved", "numbers", "noted"):
        counted(ops, name)
    for name in ("solve", "solve_ex"):
        counted(torch.linalg, name)
    monkeypatch.setattr(
        step_loop, "are_torch_functions", lambda function: True
    )  # the call counter is not a user's replacement
    monkeypatch.setattr(step_loop, "is_accelerator", lambda device: True)
    return calls


def noise(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(call):
    """What a call gives, tensors in a list, or what it raises."""
    try:
        with torch.no_grad():
            return call()
    except Exception as error:
        return [type(error), str(error)]


def assert_same(stock, patched):
    assert len(stock) == len(patched)
    for a, b in zip(stock, patched):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def both(make, call, fast=None):
    """`call` of two equal schedulers: with stock code and with patches. What was counted is of the second."""
    stock = outcome(lambda: call(make()))
    if fast is not None:
        fast.clear()
    with wan_patches.enabled(["step_loop"]):
        patched = outcome(lambda: call(make()))
    assert_same(stock, patched)
    return stock


def denoised(scheduler, steps=6, dtype=torch.bfloat16, latents_dtype=torch.float32, skip=0, **schedule):
    """The schedule and the latents after every step, of a model that looks at latents and timestep."""
    scheduler.set_timesteps(steps, device="cpu", **schedule)
    latents = noise((2, 4, 3, 6, 8), 1, latents_dtype)
    found = [scheduler.timesteps, scheduler.sigmas]
    for t in scheduler.timesteps[skip:]:
        prediction = torch.tanh(latents * 0.7 + t.float() * 1e-3).to(dtype)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        found.append(latents)
    return [*found, scheduler.step_index]


def raised(found):
    return isinstance(found[0], type)


# Which functions are patched

MODULES = sorted({patch.module for patch in PATCHES})


def test_every_patch_is_active():
    for module in MODULES:
        if importlib.util.find_spec(module.rpartition(".")[0]) and importlib.util.find_spec(module):
            importlib.import_module(module)
    with wan_patches.enabled(["step_loop"]) as status:
        left = [r for r in status.of("step_loop") if r.state != ACTIVE]
    absent = {r.module.rpartition(".")[2]: r.state for r in left}
    version = tuple(map(int, diffusers.__version__.split(".")[:2]))
    expected = {}
    if version < (0, 37):
        expected |= dict.fromkeys(("scheduling_helios", "scheduling_helios_dmd"), "waiting for import")
    if version < (0, 36):
        newer = ("pipeline_lucy_edit", "transformer_kandinsky")
        expected |= {**dict.fromkeys(newer, "waiting for import"), "denoise": "off"}
    assert absent == expected


# UniPC, with which Wan and SkyReels come

OPTIONS = [
    {**FLOW, "flow_shift": 5.0},
    {**FLOW, "solver_order": 1},
    {**FLOW, "solver_order": 3, "flow_shift": 3.0},
    {**FLOW, "solver_order": 3, "lower_order_final": False, "solver_type": "bh1"},
    {**FLOW, "solver_order": 4},
    {**FLOW, "disable_corrector": [0, 2]},
    {**FLOW, "final_sigmas_type": "sigma_min"},
    {**FLOW, "use_karras_sigmas": True},
    {},
    {"solver_order": 3},
    {"solver_type": "bh1"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"prediction_type": "sample", "thresholding": True},
    {"predict_x0": False},
    {"predict_x0": False, "prediction_type": "v_prediction", "solver_order": 3},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
@pytest.mark.parametrize("steps", [7, 1, 2, 30])
def test_unipc(options, steps, fast):
    try:
        made = UNIPC(**options)
    except ImportError as error:  # scipy
        pytest.skip(str(error))
    found = both(lambda: made.from_config(made.config), lambda scheduler: denoised(scheduler, steps), fast)
    assert fast["moved"] == 1
    if raised(found) or not found[-2].isfinite().all():  # of some options in some versions
        return
    assert fast["on_device"] + fast["numbers"] > steps
    solved = fast["solve"] + fast["solve_ex"]
    if options.get("solver_order", 2) == 2 and steps > 2 and "rescale_betas_zero_snr" not in options:
        assert fast["solve"] == 0
        assert solved == steps - 2 - len(set(options.get("disable_corrector", [])) & {1, 2})
    elif options.get("solver_order", 2) == 4:  # not looked into
        assert fast["solve"] > 0 or steps < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latents_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unipc_in_other_dtypes(dtype, latents_dtype, fast):
    both(lambda: UNIPC(**FLOW), lambda s: denoised(s, 6, dtype, latents_dtype), fast)
    assert fast["solve"] == 0


def test_the_second_half_of_a_schedule(fast):
    both(lambda: UNIPC(**FLOW), lambda s: denoised(s, 8, skip=4), fast)
    assert fast["noted"] > 0


def test_schedule_that_is_set_again_and_modified(fast):
    def call(scheduler):
        first = denoised(scheduler, 5)
        second = denoised(scheduler, 4)
        scheduler.sigmas[2] += 0.01
        scheduler.sigmas = scheduler.sigmas.clone()
        third = denoised(scheduler, 4)
        return first + second + third

    both(lambda: UNIPC(**FLOW), call, fast)


def test_sigmas_modified_between_steps(fast):
    def call(scheduler):
        scheduler.set_timesteps(6)
        latents, found = noise((1, 4, 2, 6, 8)), []
        for nth, t in enumerate(scheduler.timesteps):
            latents = scheduler.step(latents.tanh(), t, latents, return_dict=False)[0]
            scheduler.sigmas[nth + 1] *= 0.98
            found.append(latents)
        return found

    both(lambda: UNIPC(**FLOW), call, fast)


CUSTOM = {
    "again": [1.0, 0.7, 0.7, 0.4],
    "twice": [0.9, 0.9, 0.9, 0.4],
    "up": [0.4, 0.6, 0.8, 0.9],
    "nearly": [0.9, 0.8, 0.8 - 1e-6, 0.4],
    "zero": [1.0, 0.5, 0.0, 0.0],
    "usual": [0.98, 0.7, 0.5, 0.2],
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", CUSTOM)
def test_schedules_with_zero_steps_behave_as_in_stock(name, order, fast):
    def call(scheduler):
        scheduler.set_timesteps(4)
        scheduler.sigmas = torch.tensor([*CUSTOM[name], 0.0])
        latents, found = noise((1, 4, 2, 6, 8)), []
        for t in scheduler.timesteps:
            latents = scheduler.step(latents.tanh(), t, latents, return_dict=False)[0]
            found.append(latents)
        return found

    both(lambda: UNIPC(**FLOW, solver_order=order), call, fast)
    assert (fast["solve_ex"] > 0) == (name == "usual")
    assert (fast["solve"] > 0) == (name != "usual")


@torch.no_grad()
def test_a_singular_matrix_is_still_an_error(fast):
    scheduler = UNIPC(**FLOW)
    scheduler.set_timesteps(4)
    singular, rhs = torch.ones(2, 2), torch.ones(2)
    scheduler._step_index = 2
    scheduler.sigmas = torch.tensor([0.9, 0.5, 0.4999, 0.4, 0.0])
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        step_loop.solve(scheduler, singular, rhs, 2, 0, True)


def _wrong(function):
    return lambda *args: function(*args) * (1 + 2**-20)


@pytest.mark.parametrize("name", ["numbers", "on_device", "apart"])
def test_wrong_values_are_detected(name, fast, monkeypatch):
    """That the comparisons of this file can fail."""
    wrong = (lambda values: True) if name == "apart" else _wrong(getattr(ops, name))
    monkeypatch.setattr(ops, name, wrong)
    checks = [
        lambda: test_unipc({**FLOW, "flow_shift": 5.0}, 7, fast),
        lambda: test_a_singular_matrix_is_still_an_error(fast),
    ]
    if HAS_HELIOS:
        checks.append(lambda: test_helios({}, 6, fast))
    failed = 0
    for check in checks:
        try:
            check()
        except (AssertionError, pytest.fail.Exception):
            failed += 1
    assert failed > 0 or (name == "on_device" and not fast[name])  # up to diffusers 0.37 it is not used


# Subclasses and changes of one's own


def test_user_changes_of_a_scheduler_take_effect(fast):
    class Mine(UNIPC):
        def index_for_timestep(self, timestep, schedule_timesteps=None):
            assert schedule_timesteps is None
            return 1

        def _sigma_to_alpha_sigma_t(self, sigma):
            assert sigma.dim() == 0
            return 1 - sigma, sigma * 0.9

    both(lambda: Mine(**FLOW), denoised, fast)
    assert fast["solve_ex"] == 0

    def instance():
        scheduler = UNIPC(**FLOW)
        scheduler.index_for_timestep = lambda timestep: 2
        return scheduler

    assert both(instance, lambda s: denoised(s, 8, skip=3), fast)[-1] == 7


def test_scheduler_with_custom_equality_stays_stock(fast):
    class Mine(UNIPC):
        __hash__ = None

        def __eq__(self, other):
            return True

    both(lambda: Mine(**FLOW), denoised, fast)
    assert fast["on_device"] == 0


def test_other_schedulers_are_unchanged(fast):
    both(lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), denoised, fast)
    flow = diffusers.DPMSolverMultistepScheduler
    both(lambda: flow(**FLOW, flow_shift=5.0), denoised, fast)
    both(lambda: flow(**FLOW, solver_order=3, algorithm_type="dpmsolver++"), denoised, fast)
    assert not fast


def test_gradients_go_through_a_step(fast):
    def call(scheduler):
        scheduler.set_timesteps(4)
        weight = torch.tensor(0.7, requires_grad=True)
        latents = noise((1, 4, 2, 6, 8))
        with torch.enable_grad():
            for t in scheduler.timesteps:
                latents = scheduler.step(weight * latents.tanh(), t, latents, return_dict=False)[0]
            latents.square().mean().backward()
        return [latents.detach(), weight.grad]

    both(lambda: UNIPC(**FLOW), call, fast)


def test_inference_mode(fast):
    def call(scheduler):
        with torch.inference_mode():
            return denoised(scheduler)

    both(lambda: UNIPC(**FLOW), call, fast)
    assert fast["solve"] == 0


def test_compiled_step_uses_stock(fast):
    values = [torch.tensor(0.3), 1.0]

    def made(x):
        return x * step_loop.numbers(values, x.device)

    scheduler = UNIPC(**FLOW)
    scheduler.set_timesteps(4)

    def level(x):
        return x * step_loop.sigma(scheduler, 2, x.device)

    for function in (made, level):
        x = noise((3, 2))
        stock = function(x)
        fast.clear()
        assert torch.equal(torch.compile(function, backend="eager")(x), stock)
        assert not fast


# Helios


def helios(**options):
    return diffusers.HeliosScheduler(**{"use_dynamic_shifting": True, **options})


HELIOS = [
    {},
    {"solver_order": 3},
    {"solver_order": 1},
    {"solver_type": "bh1", "lower_order_final": False},
    {"predict_x0": False, "prediction_type": "epsilon"},
    {"use_dynamic_shifting": False, "shift": 3.0},
    {"time_shift_type": "linear"},
    {"scheduler_type": "euler"},
    {"use_flow_sigmas": False, "prediction_type": "v_prediction"},
    {"disable_corrector": [1]},
]


@needs_helios
@pytest.mark.parametrize("options", HELIOS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
@pytest.mark.parametrize("steps", [6, 1, 2, 20])
def test_helios(options, steps, fast):
    def call(scheduler):
        one = scheduler.config.stages == 1
        found = []
        for _chunk in range(2):
            for stage in range(scheduler.config.stages):
                where = {} if one else {"stage_index": stage}
                mu = {"mu": 0.6 + 0.2 * stage} if scheduler.config.use_dynamic_shifting else {}
                given = {"sigmas": np.linspace(0.999, 0, steps + 1, dtype=np.float32)[:-1]} if one else {}
                found += denoised(scheduler, steps, **where, **mu, **given)
        return found

    for stages in (1, 3):
        more = {"stages": 1, "stage_range": [0, 1]} if stages == 1 else {}
        found = both(lambda more=more: helios(**options, **more), call, fast)
        if raised(found) or options.get("scheduler_type") == "euler":
            continue
        assert fast["moved"] == 4 * stages
        assert fast["numbers"] >= 2 * stages * steps
        if options.get("solver_order", 2) == 2 and options.get("use_flow_sigmas", True):
            assert fast["solve"] == 0


@needs_helios
def test_helios_with_custom_sigmas(fast):
    """They are not those of the schedule: what is known of that says nothing about them."""

    def call(scheduler):
        scheduler.set_timesteps(4, 0, mu=0.8)
        latents = noise((1, 4, 2, 6, 8))
        for t in scheduler.timesteps[:2]:
            latents = scheduler.step_unipc(latents.tanh(), t, latents, return_dict=False)[0]
        fast.clear()
        given = {"sigma_before": 0.9, "sigma": 0.6, "sigma_next": 0.3}
        given = {name: torch.tensor(value) for name, value in given.items()}
        return [scheduler.step_unipc(latents.sin(), 3, latents, return_dict=False, **given)[0]]

    both(helios, call, fast)
    assert (fast["solve"], fast["solve_ex"]) == (1, 0)


@needs_helios
@pytest.mark.parametrize("amplify", [False, True])
def test_helios_distilled(amplify, fast):
    def call(scheduler):
        found = []
        for chunk in range(2):
            for stage in range(3):
                scheduler.set_timesteps(2, stage, device="cpu", mu=0.7, is_amplify_first_chunk=amplify and chunk == 0)
                latents = start = noise((2, 4, 2, 6, 8), stage)
                for nth, t in enumerate(scheduler.timesteps):
                    latents = scheduler.step(
                        latents.tanh().bfloat16(), t, latents, return_dict=False, cur_sampling_step=nth,
                        dmd_noisy_tensor=start, dmd_sigmas=scheduler.sigmas, dmd_timesteps=scheduler.timesteps,
                        all_timesteps=scheduler.timesteps,
                    )[0]  # fmt: skip
                    found.append(latents)
        return found

    both(lambda: diffusers.HeliosDMDScheduler(use_dynamic_shifting=True, gamma=0.3333), call, fast)
    assert fast["moved"] == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_timestep_per_sample(dtype, fast):
    for value in (999.0, 333.9, 0.0, 1.0):
        timestep = torch.tensor([value, 7]).to(dtype)[0]
        made = step_loop.timesteps(noise((3, 4)), timestep)
        assert_same([torch.full((3,), timestep, dtype=torch.long)], [made])
    assert step_loop.timesteps(noise((2, 4)), 5).tolist() == [5, 5]


# Loops


def test_the_boundary(fast):
    for timesteps in (torch.tensor([999, 900, 875, 874, 3]), torch.tensor([874.9999, 875.0, 875.0001]).double()):
        for boundary in (875, 875.0, 874.5, 899.9999999):
            for t in timesteps:
                reached = step_loop.reaches(timesteps, t, boundary)
                assert type(reached) is bool
                assert reached == bool(t >= boundary)
    assert step_loop.reaches([3, 2], 3, 2.5) is True
    assert step_loop.reaches(None, timesteps[1], 875.0)
    before = fast["noted"]
    assert step_loop.reaches(timesteps.bfloat16(), timesteps[1], 875.0)
    assert fast["noted"] == before


def test_boundary_after_a_modification(fast):
    timesteps = torch.tensor([900, 700, 500])
    elements = list(timesteps)
    assert not step_loop.reaches(timesteps, elements[1], 800)
    timesteps[1] = 850
    assert step_loop.reaches(timesteps, elements[1], 800)


def test_rows_of_a_template(fast):
    template = torch.tensor([999, 900, 500, 100, 0])
    for rows in (torch.tensor([3, 0, 4, 4]), torch.tensor([-1]), torch.tensor([], dtype=torch.long)):
        assert_same([template[rows]], [step_loop.take(template, rows)])
    mask = template > 300
    assert_same([template[mask]], [step_loop.take(template, mask)])
    for take in (step_loop.take, lambda template, rows: template[rows]):
        with pytest.raises(IndexError):
            take(template, torch.tensor([5]))


@pytest.mark.parametrize("with_timesteps", [False, True])
def test_modular_loop_chooses_the_transformer_as_in_stock(with_timesteps, fast):
    try:
        from diffusers.modular_pipelines.wan.denoise import Wan22LoopDenoiser
    except ImportError:
        pytest.skip("this diffusers has no such block")
    timesteps = torch.tensor([950, 880, 875, 400])

    class Chosen(Exception):
        pass

    class Guider:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, attribute):
            raise Chosen(self.name)

        def __setattr__(self, attribute, value):
            if attribute != "name":
                raise Chosen(self.name)
            object.__setattr__(self, attribute, value)

    def chosen(t):
        components = types.SimpleNamespace(
            config=types.SimpleNamespace(boundary_ratio=0.875), num_train_timesteps=1000, transformer=1,
            transformer_2=2, guider=Guider("high"), guider_2=Guider("low"),
        )  # fmt: skip
        state = types.SimpleNamespace(num_inference_steps=4, dtype=torch.float32, prompt_embeds=None)
        if with_timesteps:
            state.timesteps = timesteps
        try:
            Wan22LoopDenoiser()(components, state, 0, t)
        except Chosen as error:
            return str(error)
        except Exception:
            pass
        return state.guider.name

    expected = ["high", "high", "high", "low"]
    assert [chosen(t) for t in timesteps] == expected
    fast.clear()
    with wan_patches.enabled(["step_loop"]):
        assert [chosen(t) for t in timesteps] == expected
    assert (fast["noted"] > 0) == with_timesteps


def test_on_a_cpu_it_is_stock(monkeypatch):
    """Nobody waits there."""
    for name in ("on_device", "moved", "numbers", "on_host"):
        monkeypatch.setattr(ops, name, None)
    both(lambda: UNIPC(**FLOW), denoised)
    if HAS_HELIOS:
        both(helios, lambda s: denoised(s, 4, stage_index=1, mu=0.8))


def test_nothing_is_left_on_a_scheduler(fast):
    scheduler = UNIPC(**FLOW)
    with wan_patches.enabled(["step_loop"]):
        denoised(scheduler)
    plain = UNIPC(**FLOW)
    denoised(plain)
    assert vars(scheduler).keys() == vars(plain).keys()
    assert np.array_equal(scheduler.timesteps.numpy(), plain.timesteps.numpy())


# Whole pipelines

WHOLE = ("wan22_i2v", "wan22_ti2v", "wan_v2v", "wan_vace", "wan_animate", "skyreels_v2_df", "skyreels_v2_df_v2v",
         "helios_i2v", "helios_pyramid", "helios_distilled")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in WHOLE if name in available()])
def test_latents_are_bit_identical(name, fast):
    pipe = FAMILIES[name].build(dtype=torch.bfloat16)

    def latents():
        torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
        return torch.as_tensor(pipe(**FAMILIES[name].inputs(steps=4, output_type="latent")).frames)

    try:
        stock = latents()
    except RuntimeError as error:
        pytest.skip(f"stock itself fails: {error}")  # half precision, in some older versions
    fast.clear()
    with wan_patches.enabled(["step_loop"]):
        patched = latents()
        assert not wan_patches.status().skipped()
    assert stock.std() > 0
    assert_same([stock], [patched])
    assert fast["moved"] > 0
    assert fast["solve"] == 0


@pytest.mark.skipif("skyreels_v2_df" not in available(), reason="SkyReels-V2 came with diffusers 0.35")
def test_a_model_with_frame_rates_compiles_as_in_stock(fast):
    model = FAMILIES["skyreels_v2_df"].build().transformer
    inputs = {
        "hidden_states": noise((1, 16, 2, 4, 6)), "timestep": torch.tensor([[999, 500]]),
        "encoder_hidden_states": noise((1, 8, 32)), "enable_diffusion_forcing": True, "fps": [1], "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        stock = model(**inputs)[0]
        with wan_patches.enabled(["step_loop"]):
            assert torch.equal(model(**inputs)[0], stock)
            assert fast["numbers"] == 1
            compiled = torch.compile(model, backend="eager")
            assert torch.equal(compiled(**inputs)[0], stock)
            assert fast["numbers"] == 1
    torch.compiler.reset()
