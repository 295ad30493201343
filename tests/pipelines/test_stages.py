"""Seconds per stage of a call, for pipelines, partial pipelines and arbitrary callables."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from wan_patches.pipelines import stages
from wan_patches.testing.families import FAMILIES, available, images

CPU = torch.device("cpu")
NAP = 0.01


class Scheduler:
    def set_timesteps(self, steps: int, device: object = None) -> None:
        self.steps = steps

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + 1


class Vae:
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return latents * 2


class Pipeline:
    """Goes through every stage, and naps as often as the stage's number in `STAGES` says."""

    def __init__(self) -> None:
        self.scheduler, self.vae = Scheduler(), Vae()

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        time.sleep(NAP)
        return torch.zeros(1)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * NAP)
        return torch.ones(1)

    def prepare_latents(self, image: torch.Tensor, size: int = 3) -> torch.Tensor:
        time.sleep(3 * NAP)
        return torch.zeros(size)

    def __call__(self, prompt: str = "", steps: int = 2, fail: bool = False) -> torch.Tensor:
        self.encode_prompt(prompt)
        self.encode_image(torch.zeros(1))
        self.scheduler.set_timesteps(steps)
        time.sleep(4 * NAP)  # preprocessing
        latents = self.prepare_latents(torch.zeros(2))
        for _ in range(steps):
            latents = self.scheduler.step(latents)
            time.sleep(NAP)
        if fail:
            raise RuntimeError("out of luck")
        video = self.vae.decode(latents)
        time.sleep(2 * NAP)
        return video


def held(pipe: object) -> list[dict[str, object]]:
    """What lies on the instances that are watched."""
    owners = (pipe, getattr(pipe, "scheduler", None), getattr(pipe, "vae", None))
    return [dict(vars(owner)) if hasattr(owner, "__dict__") else {} for owner in owners]


def test_every_stage_is_timed_in_order():
    pipe = Pipeline()
    start = time.perf_counter()
    with stages.watching(pipe, CPU) as watch:
        pipe()
    whole = time.perf_counter() - start
    assert list(watch.seconds) == list(stages.STAGES)
    for stage, naps in zip(stages.STAGES, (1, 2, 4, 3, 2, 1, 2), strict=True):
        assert watch.seconds[stage] >= naps * NAP * 0.9, stage
    assert sum(watch.seconds.values()) == pytest.approx(watch.total)
    assert 16 * NAP * 0.9 <= watch.total <= whole


def test_on_stage_gets_each_output_while_the_clock_is_stopped():
    pipe, told = Pipeline(), []

    def tell(stage, value):
        told.append((stage, value))
        time.sleep(0.2)

    with stages.watching(pipe, CPU, on_stage=tell) as watch:
        video = pipe()
    assert watch.total < 0.2 * len(told)
    given = dict(told)
    assert list(given) == [
        stages.TEXT, stages.IMAGE_ENCODER, stages.PREPROCESS, stages.LATENTS, stages.DENOISE, stages.DECODE,
    ]  # fmt: skip
    assert torch.equal(given[stages.PREPROCESS][0], torch.zeros(2))
    assert torch.equal(given[stages.DENOISE][0] * 2, video)
    assert given[stages.DECODE] is video


def test_on_step_is_called_after_each_step():
    pipe, steps = Pipeline(), []
    with stages.watching(pipe, CPU, on_step=functools.partial(steps.append, 1)):
        pipe(steps=5)
    assert len(steps) == 5


def test_wrappers_are_removed_after_the_block():
    pipe = Pipeline()
    pipe()
    before = held(pipe)
    with stages.watching(pipe, CPU, on_step=lambda: None):
        assert "decode" in vars(pipe.vae)
        pipe()
    assert held(pipe) == before


def test_wrappers_are_removed_after_an_exception():
    pipe = Pipeline()
    pipe()
    before = held(pipe)
    with pytest.raises(RuntimeError, match="out of luck"), stages.watching(pipe, CPU) as watch:
        pipe(fail=True)
    assert held(pipe) == before
    assert list(watch.seconds) == [stages.TEXT, stages.IMAGE_ENCODER, stages.PREPROCESS, stages.LATENTS, stages.DENOISE]


def test_a_boundary_that_raises_ends():
    pipe = Pipeline()

    def decode(latents):
        raise ValueError("too large")

    pipe.vae.decode = decode

    def call():
        with pytest.raises(ValueError, match="too large"):
            pipe()
        pipe.encode_prompt("again")

    with stages.watching(pipe, CPU) as watch:
        call()
    assert pipe.vae.decode is decode
    assert watch.seconds[stages.TEXT] >= 2 * NAP * 0.9


def test_existing_hooks_stay_and_are_called():
    pipe, calls = Pipeline(), []

    def hook(latents):
        calls.append(latents)
        return Vae.decode(pipe.vae, latents)

    pipe.vae.decode = hook
    with stages.watching(pipe, CPU) as watch:
        pipe()
    assert pipe.vae.decode is hook
    assert len(calls) == 1
    assert stages.DECODE in watch.seconds


def test_a_hook_added_in_the_block_stays_but_is_not_watched_afterwards():
    pipe = Pipeline()
    with stages.watching(pipe, CPU) as watch:
        pipe()
        watched = pipe.vae.decode
        pipe.vae.decode = hook = lambda latents: watched(latents)
    seconds = watch.seconds
    assert pipe.vae.decode is hook
    assert torch.equal(pipe(), torch.full((3,), 4.0))
    assert watch.seconds == seconds


def test_wrapping_preserves_signatures():
    pipe = Pipeline()
    stock = inspect.signature(pipe.scheduler.set_timesteps)
    with stages.watching(pipe, CPU):
        assert inspect.signature(pipe.scheduler.set_timesteps) == stock  # diffusers inspects it


def test_invalid_arguments_raise_the_same_error_as_without_watching():
    pipe = Pipeline()
    with pytest.raises(TypeError) as stock:
        pipe.prepare_latents(picture=1)
    with pytest.raises(TypeError) as watched, stages.watching(pipe, CPU):
        pipe.prepare_latents(picture=1)
    assert str(stock.value) == str(watched.value)


class Slots:
    __slots__ = ("scheduler", "vae")

    def __init__(self) -> None:
        self.scheduler, self.vae = None, Vae()

    def encode_prompt(self) -> None:
        pass

    def __call__(self) -> torch.Tensor:
        self.encode_prompt()
        return self.vae.decode(torch.ones(1))


@dataclass(frozen=True)
class Frozen:
    vae: Vae

    def __call__(self) -> torch.Tensor:
        return self.vae.decode(torch.ones(1))

    def encode_prompt(self) -> None:
        pass


class Raising:
    @property
    def scheduler(self) -> Scheduler:
        raise RuntimeError("not loaded")

    def __call__(self) -> int:
        return 1


def plain() -> int:
    return 1


KINDS = ["function", "partial", "class", "raises", "lambda", "builtin"]


@pytest.mark.parametrize("pipe", [plain, functools.partial(plain), dict, Raising(), lambda: 1, print], ids=KINDS)
def test_objects_without_stages_have_only_the_call_stage(pipe):
    with stages.watching(pipe, CPU) as watch:
        pipe()
    assert list(watch.seconds) == [stages.CALL]
    assert watch.total == watch.seconds[stages.CALL] >= 0


@pytest.mark.parametrize("pipe", [Slots(), Frozen(Vae())], ids=["slots", "frozen"])
def test_only_replaceable_functions_are_wrapped(pipe):
    before = held(pipe)
    with stages.watching(pipe, CPU) as watch:
        assert torch.equal(pipe(), torch.full((1,), 2.0))
    assert list(watch.seconds) == [stages.DENOISE, stages.DECODE, stages.POSTPROCESS]
    assert held(pipe) == before


def test_a_proxy_is_wrapped_and_not_its_target():
    class Proxy:
        """Forwards attributes, like the wrapper of `torch.compile`."""

        def __init__(self, inner: Vae) -> None:
            vars(self)["inner"] = inner

        def __getattr__(self, name: str) -> object:
            return getattr(vars(self)["inner"], name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(vars(self)["inner"], name, value)

    pipe, inner = Pipeline(), Vae()
    pipe.vae = Proxy(inner)
    with stages.watching(pipe, CPU) as watch:
        pipe()
        assert not vars(inner)
    assert stages.DECODE in watch.seconds
    assert list(vars(pipe.vae)) == ["inner"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [name for name in ("wan22_i2v", "helios_i2v") if name in available()])
def test_watching_changes_no_bits_and_leaves_nothing_on_the_pipeline(name):
    family = FAMILIES[name]
    pipe = family.build()
    arguments = {"image": images(0, 1, (64, 48))[0], "size": (48, 32), "frames": 5, "steps": 2}

    def call():
        return pipe(**family.inputs(generator=torch.Generator().manual_seed(0), **arguments)).frames

    stock = call()
    before = [set(vars(owner)) for owner in (pipe, pipe.scheduler, pipe.vae)]
    with stages.watching(pipe, CPU) as watch:
        watched = call()
    assert (stock == watched).all()
    assert set(watch.seconds) == set(stages.STAGES) - {stages.IMAGE_ENCODER}
    assert [set(vars(owner)) for owner in (pipe, pipe.scheduler, pipe.vae)] == before


@pytest.mark.parametrize(
    ("device", "waited"),
    [("cpu", []), ("xpu", [()]), ("xpu:1", [(torch.device("xpu:1"),)]), ("mps:0", [()]), ("meta", [])],
)
def test_synchronize_waits_for_the_given_device(device, waited, monkeypatch):
    waits = []
    for backend in (torch.xpu, torch.mps, torch.cpu):
        monkeypatch.setattr(backend, "synchronize", lambda *args: waits.append(args))
    stages.synchronize(torch.device(device))
    assert waits == waited


def test_importing_stages_does_not_import_torch():
    code = (
        "import sys, wan_patches.pipelines.stages\n"
        "assert not {'torch', 'numpy', 'wan_patches.bench'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
