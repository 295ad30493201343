"""Whoever wraps or hooks what a pipeline calls sees what stock shows: the same calls, with the same values."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wan_patches
from wan_patches.bindings import step_loop
from wan_patches.ops.conditioning import ConditionVideo
from wan_patches.testing.families import FAMILIES, available, images

diffusers = pytest.importorskip("diffusers", minversion="0.38")

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")

I2V = [
    name for name in ("wan21_i2v", "wan22_i2v", "wan21_flf2v", "skyreels_v2_i2v", "chronoedit") if name in available()
]


# The autoencoder of image-to-video


@pytest.fixture
def prepare(pipelines):
    """The latents of an image-to-video pipeline, of nine frames."""

    def run(name):
        pipe, size = pipelines(name), (3, 32, 48)
        image, last = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        more = {"last_image": last} if name == "wan21_flf2v" else {}
        channels, generator = pipe.vae.config.z_dim, torch.Generator().manual_seed(1)
        return list(
            pipe.prepare_latents(
                image, 1, channels, *size[1:], 9, torch.float32, torch.device("cpu"), generator, **more
            )
        )

    return run


@contextlib.contextmanager
def attribute(owner, name, value):
    """`owner.name` is `value` inside."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def removed(handle):
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def tiled(vae):
    vae.enable_tiling(24, 24, 16, 16)
    try:
        yield
    finally:
        vae.use_tiling = False


class Functions(TorchFunctionMode):
    def __init__(self, looking):
        super().__init__()
        self.looking = looking

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cat and args[0][0].dim() == 5 and args[0][0].shape[1] == 3:
            self.looking.note("cat", *args)
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, looking):
        super().__init__()
        self.looking = looking

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.cat.default and args[0][0].dim() == 5 and args[0][0].shape[1] == 3:
            self.looking.note("cat", *args)
        return function(*args, **(kwargs or {}))


def _of_class(method, wrap):
    return lambda vae, looking: attribute(type(vae), method, getattr(looking, wrap)(vars(type(vae))[method]))


def _of_instance(method, wrap):
    return lambda vae, looking: attribute(vae, method, getattr(looking, wrap)(getattr(vae, method)))


def _hook(find):
    def change(vae, looking):
        hook = lambda module, args: looking.note(type(module).__name__, *args)  # noqa: E731
        return removed(find(vae).register_forward_pre_hook(hook))

    return change


def _hook_of_diffusers(vae, looking):
    from diffusers.hooks import HookRegistry, ModelHook

    class Theirs(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            looking.note("hook", *args)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(vae.encoder.conv_in)
    registry.register_hook(Theirs(), "theirs")
    return contextlib.closing(type("Hook", (), {"close": lambda self: registry.remove_hook("theirs")})())


def _global_hook(vae, looking):
    def hook(module, args):
        if type(module).__name__ == "WanEncoder3d":
            looking.note("encoder", *args)

    return removed(torch.nn.modules.module.register_module_forward_pre_hook(hook))


def _subclass(vae, looking):
    class Theirs(type(vae)):
        def encode(self, x, *args, **kwargs):
            looking.note("encode", x)
            return super().encode(x, *args, **kwargs)

    return _given_class(vae, Theirs)


@contextlib.contextmanager
def _given_class(instance, cls):
    before, instance.__class__ = type(instance), cls
    try:
        yield
    finally:
        instance.__class__ = before


ENCODE = {
    "encode of the class, a closure": _of_class("encode", "closure"),
    "encode of the class, functools.wraps": _of_class("encode", "wraps"),
    "encode of the class, wrapt": _of_class("encode", "wrapt"),
    "_encode of the class": _of_class("_encode", "wraps"),
    "encode of the object": _of_instance("encode", "wraps"),
    "_encode of the object": _of_instance("_encode", "closure"),
    "a subclass": _subclass,
    "forward of the encoder": lambda vae, looking: _of_instance("forward", "wraps")(vae.encoder, looking),
    "forward of the encoder's class": lambda vae, looking: _of_class("forward", "wraps")(vae.encoder, looking),
    "forward of a layer's class": lambda vae, looking: _of_class("forward", "wraps")(vae.encoder.conv_in, looking),
    "a hook on the encoder": _hook(lambda vae: vae.encoder),
    "a compiled encoder": lambda vae, looking: attribute(
        vae.encoder, "_compiled_call_impl", looking.closure(vae.encoder._call_impl)
    ),
    "a hook on a layer": _hook(lambda vae: vae.encoder.conv_in),
    "a hook of diffusers": _hook_of_diffusers,
    "a hook on all modules": _global_hook,
    "a function mode": lambda vae, looking: Functions(looking),
    "a dispatch mode": lambda vae, looking: Operations(looking),
}


@pytest.mark.parametrize("late", [False, True], ids=["before enable", "after enable"])
@pytest.mark.parametrize("way", ENCODE)
def test_whoever_looks_at_the_encoder_is_handed_the_video_of_stock(
    way, late, pipelines, prepare, looking, against_stock
):
    vae = pipelines("wan21_i2v").vae
    against_stock(lambda: prepare("wan21_i2v"), lambda: ENCODE[way](vae, looking), late, patches=["conditioning"])


@pytest.mark.parametrize("way", ["encode of the class, a closure", "a hook on the encoder", "a hook on all modules"])
@pytest.mark.parametrize("name", I2V)
def test_in_every_family(name, way, pipelines, prepare, looking, against_stock):
    against_stock(lambda: prepare(name), lambda: ENCODE[way](pipelines(name).vae, looking))


@pytest.mark.parametrize("wrap", ["closure", "wraps", "wrapt"])
def test_whoever_wraps_tiled_encode_is_handed_the_video_of_stock(wrap, pipelines, prepare, looking, against_stock):
    vae = pipelines("wan21_i2v").vae
    with tiled(vae):
        against_stock(lambda: prepare("wan21_i2v"), lambda: _of_class("tiled_encode", wrap)(vae, looking))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encode", "encoder"])
def test_what_is_compiled_is_handed_the_video_of_stock(what, pipelines, prepare, looking, against_stock):
    vae = pipelines("wan21_i2v").vae

    def change():
        if what == "encode":
            return attribute(vae, "encode", torch.compile(vae.encode, backend=backend))
        return _given_part(vae, "encoder", torch.compile(vae.encoder, backend=backend))

    def backend(graph, inputs):
        looking.note("graph", *[i for i in inputs if isinstance(i, torch.Tensor) and i.shape[1:2] == (3,)])
        return graph.forward

    torch.compiler.reset()
    against_stock(lambda: torch.compiler.reset() or prepare("wan21_i2v"), change, patches=["conditioning"])


@contextlib.contextmanager
def _given_part(module, name, part):
    before = getattr(module, name)
    setattr(module, name, part)
    try:
        yield
    finally:
        setattr(module, name, before)


@pytest.mark.parametrize("name", I2V)
def test_where_nobody_looks_the_video_is_not_built(name, prepare, monkeypatch):
    made, original = [], ConditionVideo.__init__
    monkeypatch.setattr(ConditionVideo, "__init__", lambda self, *args: made.append(1) or original(self, *args))
    with wan_patches.enabled(), torch.no_grad():
        prepare(name)
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            prepare(name)
    assert len(made) > 1


# Processors


PICTURES = [name for name in available() if {"image", "video", "pose_video"} & FAMILIES[name].takes.keys()]
METHODS = ("preprocess", "preprocess_video", "resize", "get_default_height_width", "pil_to_numpy", "numpy_to_pt")
METHODS += ("normalize", "postprocess_video", "postprocess", "denormalize", "pt_to_numpy", "numpy_to_pil")


def wrapped_method(looking, wrap, cls, name):
    """A class's method, static or not, inside others' code."""
    from inspect import getattr_static

    found = getattr_static(cls, name)
    is_static = isinstance(found, staticmethod)
    wrapper = getattr(looking, wrap)(found.__func__ if is_static else found, name)
    return staticmethod(wrapper) if is_static else wrapper


@pytest.mark.parametrize("name", PICTURES)
def test_whoever_wraps_a_processor_sees_the_calls_of_stock(name, pipelines, looking, against_stock):
    """The call for the size is one that ours would make more often, and those to the processor are made by us."""
    pipe = pipelines(name)

    def change():
        stack, cls = contextlib.ExitStack(), type(pipe.video_processor)
        stack.enter_context(attribute(cls, "get_default_height_width", wrapped(cls, "get_default_height_width")))
        for method in ("preprocess", "preprocess_video"):
            bound = getattr(pipe.video_processor, method)
            stack.enter_context(attribute(pipe.video_processor, method, looking.closure(bound, method)))
        return stack

    def wrapped(cls, method):
        return wrapped_method(looking, "wraps", cls, method)

    against_stock(lambda: pipe(**FAMILIES[name].inputs(steps=2)).frames, change, patches=["preprocess", "frames"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", ["closure", "wraps", "wrapt"])
@pytest.mark.parametrize("where", ["class", "object"])
def test_any_method_of_a_processor(method, wrap, where, looking, against_stock):
    from diffusers.video_processor import VideoProcessor

    from wan_patches.bindings.preprocess import preprocess, preprocess_video

    processor, video = VideoProcessor(vae_scale_factor=8), torch.rand(1, 3, 2, 16, 16)

    def run():
        frames = images(0, 2, (40, 36))
        if wan_patches._registry.chosen() is None:
            first, second = processor.preprocess(frames[0], 32, width=48), processor.preprocess_video(frames)
        else:  # what stands in pipelines
            first = preprocess(processor, "cpu", frames[0], 32, width=48)
            second = preprocess_video(processor, "cpu", frames)
        pictures = processor.postprocess_video(video, "pil")
        return [first, second, processor.postprocess_video(video, "np"), [p.tobytes() for p in pictures[0]]]

    def change():
        if where == "object":
            return attribute(processor, method, getattr(looking, wrap)(getattr(processor, method), method))
        return attribute(VideoProcessor, method, wrapped_method(looking, wrap, VideoProcessor, method))

    against_stock(run, change)


# Schedulers, on a CPU taken for an accelerator: on others nothing of theirs is patched

SCHEDULERS = [
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1], "use_dynamic_shifting": True}),
    ("HeliosDMDScheduler", {"use_dynamic_shifting": True}),
]
STEPS = (
    *("index_for_timestep", "time_shift", "_sigma_to_alpha_sigma_t", "convert_model_output", "scale_model_input"),
    *("step", "set_timesteps", "_init_step_index"),
)


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("wrap", ["closure", "wraps", "wrapt"])
@pytest.mark.parametrize(("name", "options"), SCHEDULERS, ids=[name for name, _ in SCHEDULERS])
def test_whoever_wraps_a_scheduler_sees_the_calls_of_stock(
    name, options, method, wrap, looking, against_stock, monkeypatch
):
    cls = getattr(diffusers, name)
    if not hasattr(cls, method):
        pytest.skip("it has none")
    owner = next(base for base in cls.__mro__ if method in vars(base))
    monkeypatch.setattr(step_loop, "is_accelerator", lambda device: True)

    def run():
        scheduler = cls(**options)
        shift = {"mu": 0.7} if options.get("use_dynamic_shifting") else {}
        staged = {"stage_index": 0} if name == "HeliosDMDScheduler" else {}
        scheduler.set_timesteps(4, device="cpu", **shift, **staged)
        sample = torch.rand(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        if name == "HeliosDMDScheduler":
            return [scheduler.timesteps, scheduler.sigmas]
        for t in scheduler.timesteps:
            sample = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(sample.tanh(), t, sample, return_dict=False)[0]
        return [scheduler.timesteps, scheduler.sigmas, sample]

    def change():
        return attribute(owner, method, wrapped_method(looking, wrap, owner, method))

    against_stock(run, change, patches=["step_loop"], looks=False)


# The pipeline and the model of Wan 2.2 TI2V, whose timesteps the close form hands on in another shape


@pytest.mark.parametrize("wrap", ["closure", "wraps", "wrapt"])
def test_whoever_wraps_prepare_latents_has_the_timesteps_of_stock(wrap, pipelines, looking, against_stock):
    pipe = pipelines("wan22_ti2v")
    owner = type(pipe)

    def change():
        stack = contextlib.ExitStack()
        stack.enter_context(
            attribute(owner, "prepare_latents", wrapped_method(looking, wrap, owner, "prepare_latents"))
        )
        return stack

    _against_stock_by_timesteps(pipe, change, looking, against_stock)


def test_a_hook_on_all_modules_has_the_timesteps_of_stock(pipelines, looking, against_stock):
    def hook(module, args, kwargs):
        if type(module).__name__ in ("WanTransformer3DModel", "WanTimeTextImageEmbedding", "TimestepEmbedding"):
            looking.note("hook", *[(type(a), getattr(a, "shape", a)) for a in (*args, *kwargs.values())])

    class Handle(contextlib.AbstractContextManager):
        def __enter__(self):
            self.handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda m, a: hook(m, a, {}))

        def __exit__(self, *args):
            self.handle.remove()

    _against_stock_by_timesteps(pipelines("wan22_ti2v"), Handle, looking, against_stock)


def _against_stock_by_timesteps(pipe, change, looking, against_stock):
    import importlib

    patch = importlib.import_module("wan_patches.bindings.timesteps")
    if "wan22_ti2v" not in available():
        pytest.skip("this diffusers has none")
    rows = []
    original = patch._reason_against
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patch, "_reason_against", lambda *args: rows.append(original(*args)) or rows[-1])
        run = lambda: pipe(**FAMILIES["wan22_ti2v"].inputs(steps=2, output_type="latent")).frames  # noqa: E731
        with change():
            stock = run()
        expected = looking.taken()
        with change(), wan_patches.enabled(["modulation", "timesteps"], fidelity="close"):
            run()
    assert stock.isfinite().all()
    assert expected
    assert rows
    assert all(rows)  # a reason each time
