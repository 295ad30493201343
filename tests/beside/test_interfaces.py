"""Objects that pipelines know by their methods alone: what works with stock works patched, with the same bits."""

from __future__ import annotations

import types
from collections import UserDict
from unittest import mock

import pytest
import torch
from diffusers.video_processor import VideoProcessor

import wan_patches
from wan_patches.bindings import step_loop
from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")


class ByMethods:
    """The methods that pipelines call, and nothing else: no settings, and no `__dict__`."""

    __slots__ = ("_own",)

    def __init__(self, own):
        self._own = own

    def preprocess(self, image, height=None, width=None):
        return self._own.preprocess(image, height, width) * 0.5

    def preprocess_video(self, video, height=None, width=None):
        return self._own.preprocess_video(video, height, width) * 0.5

    def get_default_height_width(self, image, height=None, width=None):
        return self._own.get_default_height_width(image, height, width)

    def postprocess_video(self, video, output_type="np"):
        return self._own.postprocess_video(video, output_type)

    def resize(self, *args, **kwargs):
        return self._own.resize(*args, **kwargs)


def _with_settings(settings):
    class Processor(ByMethods):
        __slots__ = ("config",)

        def __init__(self, own):
            super().__init__(own)
            self.config = settings(dict(own.config))

    return Processor


class Borrowed:
    """diffusers' methods over settings of another kind."""

    preprocess, preprocess_video = VideoProcessor.preprocess, VideoProcessor.preprocess_video
    postprocess_video, postprocess = VideoProcessor.postprocess_video, VideoProcessor.postprocess
    get_default_height_width, resize = VideoProcessor.get_default_height_width, VideoProcessor.resize
    pil_to_numpy, numpy_to_pt = staticmethod(VideoProcessor.pil_to_numpy), staticmethod(VideoProcessor.numpy_to_pt)
    normalize, denormalize = staticmethod(VideoProcessor.normalize), staticmethod(VideoProcessor.denormalize)
    pt_to_numpy, numpy_to_pil = staticmethod(VideoProcessor.pt_to_numpy), staticmethod(VideoProcessor.numpy_to_pil)
    _denormalize_conditionally = VideoProcessor._denormalize_conditionally

    def __init__(self, own):
        self.config = types.SimpleNamespace(**own.config)


class BorrowedWithoutAll(Borrowed):
    """What stock reads of the settings for every image, and not what it reads for some."""

    def __init__(self, own):
        needed = ("do_resize", "vae_scale_factor", "resample", "reducing_gap", "do_normalize", "do_binarize")
        self.config = types.SimpleNamespace(
            **{name: own.config[name] for name in needed}, do_convert_rgb=False, do_convert_grayscale=False
        )


class Wrong:
    """Nothing that pipelines call: they raise."""

    def __init__(self, own):
        self.config = None


PROCESSORS = {
    "methods alone": ByMethods,
    "settings in a dict": _with_settings(dict),
    "settings in a mapping": _with_settings(UserDict),
    "settings in a namespace": _with_settings(lambda config: types.SimpleNamespace(**config)),
    "no settings": _with_settings(lambda config: None),
    "borrowed methods": Borrowed,
    "borrowed methods, settings that are enough": BorrowedWithoutAll,
    "nothing": Wrong,
}


@pytest.mark.parametrize("kind", ["methods alone", "settings in a dict"])
@pytest.mark.parametrize("name", available())
def test_a_processor_of_ones_own_in_every_family(name, kind, pipelines, against_stock):
    pipe = pipelines(name)
    own = pipe.video_processor
    with mock.patch.object(pipe, "video_processor", PROCESSORS[kind](own)):
        run = lambda: pipe(**FAMILIES[name].inputs(steps=2)).frames  # noqa: E731
        against_stock(run, looks=False, patches=["preprocess", "frames", "conditioning"])


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", [name for name in ("wan21_i2v", "wan_v2v") if name in available()])
def test_a_processor_of_any_kind(name, kind, pipelines, against_stock):
    pipe = pipelines(name)
    with mock.patch.object(pipe, "video_processor", PROCESSORS[kind](pipe.video_processor)):
        for output_type in ("np", "pil"):
            run = lambda kind=output_type: _arrays(pipe(**FAMILIES[name].inputs(steps=2, output_type=kind)).frames)  # noqa: E731
            against_stock(run, looks=False, raises=kind == "nothing", patches=["preprocess", "frames"])


def _arrays(frames):
    return [frame.tobytes() for frame in frames[0]] if isinstance(frames, list) else frames


class Delegating:
    """An object that hands on what it is asked for, and cannot be referred to weakly."""

    __slots__ = ("own",)

    def __init__(self, own):
        object.__setattr__(self, "own", own)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "own"), name)

    def __setattr__(self, name, value):
        setattr(self.own, name, value)


class Scheduler(Delegating):
    """A scheduler known by its methods, some of which pipelines look for in its class."""

    __slots__ = ()

    def set_timesteps(self, *args, timesteps=None, sigmas=None, **kwargs):
        more = {"timesteps": timesteps, "sigmas": sigmas, **kwargs}
        more = {name: value for name, value in more.items() if value is not None}
        self.own.set_timesteps(*args, **more)

    def step(self, *args, generator=None, **kwargs):
        return self.own.step(*args, **kwargs)

    def __deepcopy__(self, memo):
        import copy

        return type(self)(copy.deepcopy(self.own, memo))


#: Families that differ in more than their inputs.
DISTINCT = [
    name
    for name in available()
    if name not in ("wan_animate_replace", "chronoedit_reasoning", "helios_i2v", "helios_pyramid_i2v")
]
CLIP = [n for n in ("wan21_i2v", "wan21_flf2v", "wan_animate", "skyreels_v2_i2v", "chronoedit") if n in DISTINCT]
PARTS = [
    *((name, "scheduler", as_accelerator) for name in DISTINCT for as_accelerator in (False, True)),
    *((name, "vae", False) for name in DISTINCT),
    *((name, part, False) for name in CLIP for part in ("image_encoder", "image_processor")),
]


@pytest.mark.parametrize(("name", "part", "as_accelerator"), PARTS)
def test_parts_of_ones_own_in_every_family(name, part, as_accelerator, pipelines, against_stock, monkeypatch):
    pipe = pipelines(name)
    monkeypatch.setattr(step_loop, "is_accelerator", lambda device: as_accelerator)

    class Callable(Delegating):
        __slots__ = ()

        def __call__(self, *args, **kwargs):
            return self.own(*args, **kwargs)

    kind = Scheduler if part == "scheduler" else Callable
    own = getattr(pipe, part)
    try:
        vars(pipe)[part] = kind(own)
        run = lambda: pipe(**FAMILIES[name].inputs(steps=2, output_type="latent")).frames  # noqa: E731
        against_stock(run, looks=False)
    finally:
        vars(pipe)[part] = own


def test_methods_of_a_scheduler_borrowed_by_one_that_cannot_be_referred_to_weakly(against_stock, monkeypatch):
    from diffusers import UniPCMultistepScheduler

    monkeypatch.setattr(step_loop, "is_accelerator", lambda device: True)

    class Borrowing:
        __slots__ = ("__dict__",)  # no `__weakref__`

    for name, value in vars(UniPCMultistepScheduler).items():
        if not name.startswith("__"):
            setattr(Borrowing, name, value)

    def run():
        own = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        scheduler = Borrowing()
        vars(scheduler).update(vars(own), config=own.config)
        scheduler.set_timesteps(4, device="cpu")
        sample = torch.rand(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            sample = scheduler.step(sample.tanh(), t, sample, return_dict=False)[0]
        return [scheduler.timesteps, scheduler.sigmas, sample]

    against_stock(run, looks=False, patches=["step_loop"])


class Rope(torch.nn.Module):
    """Tables like the model's, known by its call."""

    def __init__(self, own):
        super().__init__()
        self.inner = own

    def forward(self, *args, **kwargs):
        found = self.inner(*args, **kwargs)
        if isinstance(found, dict):  # of AnyFlow
            return {name: table * 0.5 for name, table in found.items()}
        return tuple(t * 0.5 for t in found) if isinstance(found, tuple) else found * 0.5


@pytest.mark.parametrize("name", DISTINCT)
def test_rotary_tables_of_ones_own_in_every_family(name, pipelines, against_stock):
    pipe = pipelines(name)
    model = pipe.transformer
    own = model.rope
    try:
        model.rope = Rope(own)
        run = lambda: pipe(**FAMILIES[name].inputs(steps=2, output_type="latent")).frames  # noqa: E731
        against_stock(run, looks=False)
    finally:
        model.rope = own


class Model(torch.nn.Module):
    """A transformer without blocks."""

    def __init__(self, own):
        super().__init__()
        self.config, self.dtype, self.device, self.cache_context = own.config, own.dtype, own.device, own.cache_context
        for name in ("condition_embedder",):
            setattr(self, name, getattr(own, name))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False, **others):
        scale = timestep.float().mean() / 1000
        return (hidden_states[:, : self.config.out_channels] * 0.5 + scale,)


@pytest.mark.parametrize("fidelity", ["exact", "close"])
@pytest.mark.parametrize("name", [n for n in ("wan_t2v", "wan22_ti2v", "wan21_i2v", "wan_v2v") if n in available()])
def test_a_transformer_without_blocks(name, fidelity, pipelines, against_stock):
    pipe = pipelines(name)
    own = pipe.transformer
    try:
        pipe.transformer = Model(own)
        run = lambda: pipe(**FAMILIES[name].inputs(steps=2, output_type="latent")).frames  # noqa: E731
        against_stock(run, looks=False, fidelity=fidelity)
    finally:
        pipe.transformer = own


def test_the_fast_ways_are_taken_with_diffusers_own(pipelines, monkeypatch):
    from wan_patches.ops import frames
    from wan_patches.ops import images as op

    taken = []
    for module, name in ((op, "normalize_uint8"), (frames, "video_to_float")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, o=original, n=name, **k: taken.append(n) or o(*a, **k))
    pipe = pipelines("wan_v2v")
    with wan_patches.enabled():
        pipe(**FAMILIES["wan_v2v"].inputs(steps=2))
    assert set(taken) == {"normalize_uint8", "video_to_float"}
