"""What stock warns of, logs and raises is warned of, logged and raised: in the same words, at the same place."""

from __future__ import annotations

import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

import wan_patches
from wan_patches.bindings.preprocess import preprocess, preprocess_video
from wan_patches.testing.families import FAMILIES, available, images

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")


def told(run):
    """The result of a call or what it raises, its warnings with their places, and diffusers' log."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.name, record.levelname, record.getMessage()))
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as found, torch.no_grad():
            warnings.simplefilter("always")
            try:
                result = run()
            except Exception as error:
                result = (type(error), str(error))
    finally:
        logger.removeHandler(handler)
    told_once = "flex_attention called without torch.compile()"  # by torch, in each process
    found = [w for w in found if not str(w.message).startswith(told_once)]
    return result, [(w.category, str(w.message), w.filename, w.lineno) for w in found], records


def bytes_of(frames):
    return [image.tobytes() for video in frames for image in video] if isinstance(frames, list) else frames.tobytes()


def videos():
    video = torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    found = {"finite": video}
    for name, values in {
        "a NaN": [torch.nan],
        "infinities": [torch.inf, -torch.inf],
        "both": [torch.nan, torch.inf],
    }.items():
        found[name] = video.clone()
        for nth, value in enumerate(values):
            found[name][1, nth, 3, 5, 7 + nth] = value
    found["nothing else"] = torch.full_like(video, torch.nan)
    return found


@pytest.mark.parametrize("invalid", ["warn", "raise", "ignore", "call"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", videos())
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_numpy_warns_of_a_video_that_is_not_a_number(output_type, kind, dtype, invalid):
    processor, video, calls = VideoProcessor(vae_scale_factor=8), videos()[kind].to(dtype), []

    def run():
        with np.errstate(invalid=invalid, call=lambda *args: calls.append(args)):
            return bytes_of(processor.postprocess_video(video, output_type))

    stock, of_stock = told(run), calls.copy()
    calls.clear()
    with wan_patches.enabled(["frames"]):
        assert told(run) == stock
    assert calls == of_stock
    is_nan = bool(video.isnan().any())
    assert bool(stock[1] or of_stock or isinstance(stock[0], tuple)) is (
        is_nan and output_type == "pil" and invalid != "ignore"
    )


def test_only_a_video_that_is_not_a_number_is_left_to_stock():
    """Values to clamp, and infinities, are no news."""

    def called(kind):
        names = set()
        sys.setprofile(lambda frame, event, _: names.add(frame.f_code.co_name))
        try:
            VideoProcessor(vae_scale_factor=8).postprocess_video(videos()[kind], "pil")
        finally:
            sys.setprofile(None)
        return "numpy_to_pil" in names

    with wan_patches.enabled(["frames"]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {kind: called(kind) for kind in videos()} == {
            "finite": False, "infinities": False, "a NaN": True, "both": True, "nothing else": True
        }  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in ("wan_t2v", "skyreels_v2_t2v", "sana_video", "helios") if n in available()]
)
def test_a_pipeline_whose_model_gives_nan(name, pipelines):
    pipe = pipelines(name)
    weight = pipe.vae.decoder.conv_out.bias
    before = weight.detach().clone()
    run = lambda: bytes_of(pipe(**FAMILIES[name].inputs(steps=2, output_type="pil")).frames)  # noqa: E731
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        stock = told(run)
        with wan_patches.enabled():
            patched = told(run)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert any("invalid value" in text for _, text, _, _ in stock[1])
    assert patched == stock


class Truncated:
    """A picture whose file ends early."""

    def __new__(cls):
        import io

        import PIL.Image

        file = io.BytesIO()
        images(0, 1, (90, 70))[0].save(file, "png")
        return PIL.Image.open(io.BytesIO(file.getvalue()[:2000]))


def closed():
    image = images(0, 1, (90, 70))[0]
    image.close()
    return image


PICTURES = {
    "tensor in [-1, 1]": lambda: torch.full((1, 3, 32, 48), -0.5),
    "list of 4-D tensors": lambda: [torch.full((1, 3, 32, 48), 0.25)],
    "list of 4-D arrays": lambda: [np.random.default_rng(0).random((1, 32, 48, 3), np.float32)],
    "array with NaN": lambda: np.full((1, 32, 48, 3), np.nan, np.float32),
    "picture": lambda: images(0, 1, (90, 70))[0],
    "palette with bytes of transparency": lambda: _palette(),
    "truncated": Truncated,
    "closed": closed,
}


def _palette():
    image = images(0, 1, (90, 70))[0].convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize("size", [(32, 48), (None, None), (0, 48), (-8, 48), (3, 48)], ids=str)
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_which_stock_warns_or_raises(kind, size):
    processor = VideoProcessor(vae_scale_factor=8)
    stock = told(lambda: processor.preprocess(PICTURES[kind](), *size).numpy().tobytes())
    patched = told(lambda: preprocess(processor, "cpu", PICTURES[kind](), *size).numpy().tobytes())
    assert patched == stock
    frames = lambda: [PICTURES[kind]()] * 2  # noqa: E731
    stock = told(lambda: processor.preprocess_video(frames(), *size).numpy().tobytes())
    assert told(lambda: preprocess_video(processor, "cpu", frames(), *size).numpy().tobytes()) == stock


@pytest.mark.parametrize("name", available())
def test_pipelines_tell_what_stock_tells(name, pipelines):
    """Odd sizes, of which pipelines warn, and a number of frames that they round."""
    pipe, family = pipelines(name), FAMILIES[name]
    more = {family.frames_as: 10} if family.frames_as else {}
    run = lambda: np.asarray(pipe(**{**family.inputs(steps=2, size=None), **more}).frames).tobytes()  # noqa: E731
    stock = told(run)
    with wan_patches.enabled():
        assert told(run) == stock
