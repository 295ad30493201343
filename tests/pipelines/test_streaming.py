"""Streamed frames: the same bits, no whole video in memory, nothing left behind; and the fallback to the end."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import weakref

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan
from torch.utils.flop_counter import FlopCounterMode

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.bindings.output_buffers import OutputBuffers, writing_to
from wan_patches.patching.objects import own_methods
from wan_patches.pipelines import streaming
from wan_patches.pipelines.stages import watching
from wan_patches.pipelines.streaming import stream_frames
from wan_patches.testing.families import FAMILIES

FAMILY = FAMILIES["wan_t2v"]
HELIOS = pytest.param("helios", marks=pytest.mark.skipif(not FAMILIES["helios"].available, reason="no Helios"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def forget_warnings():
    streaming._warn_once.cache_clear()


@pytest.fixture(scope="module")
def built():
    """Pipelines that tests leave unchanged."""
    return functools.cache(lambda name: FAMILIES[name].build())


@pytest.fixture
def pipe(built):
    pipe = built("wan_t2v")
    classes = type(pipe), type(pipe.vae), type(pipe.video_processor)
    yield pipe
    assert (type(pipe), type(pipe.vae), type(pipe.video_processor)) == classes
    assert not own_methods(pipe.vae) | own_methods(pipe.video_processor)
    assert not any(pipe.vae._feat_map)
    assert streaming._stream.get() is None


def inputs(name="wan_t2v", **more):
    return FAMILIES[name].inputs(**{"steps": 1, "output_type": "np", **more})


def streamed(pipe, name="wan_t2v", **more):
    """Returns the chunks and their concatenated frames (arrays)."""
    chunks = []
    output = stream_frames(pipe, chunks.append, **inputs(name, **more))
    assert output.frames is None
    return chunks, np.concatenate([chunk.frames for chunk in chunks], axis=1)


@pytest.fixture
def assert_delivered_at_the_end(pipe, caplog):
    """Checks that stock's frames are delivered in one chunk at the end, for a reason that is logged once."""

    def check(reason, stock=None, **more):
        stock = pipe(**inputs(**more)).frames if stock is None else stock
        for _ in range(2):
            (chunk,), frames = streamed(pipe, **more)
            assert reason in chunk.reason
            assert chunk.start == 0
            assert identical(frames, stock)
        assert len([record for record in caplog.records if reason in record.getMessage()]) == 1

    with caplog.at_level(logging.WARNING):
        yield check


# Streamed frames


@pytest.mark.quick
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_batches(pipe, patched):
    more = {"prompt": ["a fox", "a cat"], "negative_prompt": ["", "blurry"]}
    stock = pipe(**inputs(**more)).frames
    with wan_patches.enabled() if patched else wan_patches.enabled([]):
        chunks, frames = streamed(pipe, **more)
    assert [chunk.frames.shape[:2] for chunk in chunks] == [(2, 1), (2, 4), (2, 4)]
    assert identical(frames, stock)


@pytest.mark.parametrize("name", ["wan_t2v", "wan22_ti2v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decoders(name, dtype):
    pipe = FAMILIES[name].build(vae_dtype=dtype)
    try:
        stock = pipe(**inputs(name)).frames
    except RuntimeError as error:
        pytest.skip(f"stock itself fails: {error}")
    assert identical(streamed(pipe, name)[1], stock)
    with wan_patches.enabled():
        assert identical(streamed(pipe, name)[1], stock)


def test_one_frame_is_one_chunk(pipe):
    stock = pipe(**inputs(frames=1)).frames
    chunks, frames = streamed(pipe, frames=1)
    assert [(chunk.start, chunk.reason) for chunk in chunks] == [(0, None)]
    assert identical(frames, stock)


def test_with_return_dict_false_the_first_item_is_none(pipe):
    chunks = []
    assert stream_frames(pipe, chunks.append, **inputs(return_dict=False)) == (None,)
    assert len(chunks) == 3


def test_the_default_output_type_and_positional_arguments(pipe):
    arguments = inputs(output_type=None)
    prompt = arguments.pop("prompt")
    stock = pipe(prompt, **arguments).frames
    chunks = []
    stream_frames(pipe, chunks.append, prompt, **inputs(output_type=None, prompt=None))
    assert identical(np.concatenate([chunk.frames for chunk in chunks], axis=1), stock)


@pytest.mark.parametrize("name", [HELIOS])
def test_helios_delivers_a_chunk_before_denoising_the_next(name, built):
    pipe, events = built(name), []

    def on_step(pipe, step, timestep, kept):
        events.append("step")
        return kept

    stream_frames(pipe, lambda chunk: events.append(chunk.start), **inputs(name, callback_on_step_end=on_step))
    assert events == ["step", 0, 1, "step", 5]


def test_frames_go_to_the_output_buffers(pipe):
    made = []

    def image(array):
        made.append(array.shape)
        return PIL.Image.fromarray(array)

    def memory(shape, stride, dtype):
        return torch.empty_strided(shape, stride, dtype=dtype)

    chunks = []
    with wan_patches.enabled(), writing_to(OutputBuffers(memory, image)):
        stream_frames(pipe, chunks.append, **inputs(output_type="pil"))
    assert len(made) == sum(len(chunk.frames[0]) for chunk in chunks) == 9


def test_chunks_are_delivered_in_the_decode_stage(pipe):
    seen, chunks = [], []
    with watching(pipe, torch.device("cpu"), on_stage=lambda stage, value: seen.append((stage, len(chunks)))):
        stream_frames(pipe, chunks.append, **inputs())
    assert ("decode", 3) in seen
    assert not any(chunk.reason for chunk in chunks)
    assert identical(np.concatenate([chunk.frames for chunk in chunks], axis=1), pipe(**inputs()).frames)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_the_callback_may_use_the_vae(pipe, patched):
    def on_frames(chunk):
        chunks.append(chunk.frames)
        video = torch.from_numpy(chunk.frames).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = pipe.vae.encode(video[:, :, :1]).latent_dist.mode()
        assert pipe.vae.decode(latents).sample.shape == (1, 3, 1, 32, 48)

    stock, chunks = pipe(**inputs()).frames, []
    with wan_patches.enabled() if patched else wan_patches.enabled([]):
        stream_frames(pipe, on_frames, **inputs())
    assert identical(np.concatenate(chunks, axis=1), stock)


@pytest.mark.parametrize("name", ["wan_t2v", HELIOS])
def test_previews_decoded_by_a_step_callback_are_not_streamed(name, built):
    pipe, previews, chunks = built(name), [], []

    def on_step(pipe, step, timestep, kept):
        video = pipe.vae.decode(kept["latents"].to(pipe.vae.dtype)).sample
        previews.append(pipe.video_processor.postprocess_video(video, output_type="np").shape)
        return kept

    more = {"steps": 2, "callback_on_step_end": on_step}
    stock = pipe(**inputs(name, **more)).frames
    stream_frames(pipe, chunks.append, **inputs(name, **more))
    assert identical(np.concatenate([chunk.frames for chunk in chunks], axis=1), stock)
    assert previews[: len(previews) // 2] == previews[len(previews) // 2 :]
    assert [chunk.start for chunk in chunks] == [0, 1, 5]


# Memory


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize(("name", "frames"), [("wan_t2v", 33), ("helios", 33)])
def test_the_whole_video_is_never_in_memory(built, name, frames, patched):
    """Counted at every chunk: the bytes of all tensors that are videos, and whether older chunks are let go."""
    if not FAMILIES[name].available:
        pytest.skip("no Helios")
    pipe, width, height = built(name), 48, 32
    whole = frames * height * width * 3 * 4
    most, given = 0, []

    def videos():
        return {
            thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
            for thing in gc.get_objects()
            if issubclass(type(thing), torch.Tensor)
            and tuple(thing.shape[-2:]) in ((height, width), (width, 3))
            and 3 in thing.shape  # channels: not what the decoder remembers
        }

    def on_frames(chunk):
        nonlocal most
        assert not any(frames() is not None for frames in given)
        given.append(weakref.ref(chunk.frames))
        most = max(most, sum(videos().values()) - before)

    gc.collect()
    before = sum(videos().values())
    with wan_patches.enabled() if patched else wan_patches.enabled([]):
        stream_frames(pipe, on_frames, **inputs(name, frames=frames))
    assert len(given) == 1 + frames // 4
    assert 0 < most < whole / 2


# Exceptions


class Stop(Exception):
    pass


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_exception_in_the_callback_propagates_and_leaves_no_trace(pipe, at, patched):
    def on_frames(chunk):
        starts.append(chunk.start)
        if chunk.start == at:
            raise Stop

    stock, starts = pipe(**inputs()).frames, []
    with wan_patches.enabled() if patched else wan_patches.enabled([]):
        with pytest.raises(Stop):
            stream_frames(pipe, on_frames, **inputs())
        assert starts[-1] == at
        assert not any(pipe.vae._feat_map)
        assert identical(pipe(**inputs()).frames, stock)
        assert identical(streamed(pipe)[1], stock)


def test_errors_of_pipeline_and_decoder_propagate(pipe, monkeypatch):
    with pytest.raises(ValueError, match="divisible"):
        stream_frames(pipe, print, **inputs(size=(48, 33)))
    with pytest.raises(TypeError, match="no_such_argument"):
        stream_frames(pipe, print, no_such_argument=1)

    calls, chunks = [], []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError

    hook = pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        stream_frames(pipe, chunks.append, **inputs())
    hook.remove()
    assert [chunk.start for chunk in chunks] == [0]
    assert identical(streamed(pipe)[1], pipe(**inputs()).frames)


def test_latent_output_is_rejected_before_the_call(pipe):
    with pytest.raises(ValueError, match="latent"):
        stream_frames(pipe, print, **inputs(output_type="latent"))


def test_an_invalid_output_type_is_left_to_the_pipeline_to_reject(pipe):
    with pytest.raises(ValueError, match="does not exist"):
        stream_frames(pipe, print, **inputs(output_type="gif"))


# Delivery at the end


def test_vae_slicing_delivers_at_the_end(pipe, assert_delivered_at_the_end):
    pipe.vae.enable_slicing()
    try:
        assert_delivered_at_the_end("enable_slicing", prompt=["a fox", "a cat"], negative_prompt=["", ""])
    finally:
        pipe.vae.disable_slicing()


TILES = {"tile_sample_min_height": 16, "tile_sample_min_width": 16, "tile_sample_stride_height": 8}


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_vae_tiling_delivers_at_the_end(patched, caplog):
    pipe = FAMILY.build()
    pipe.vae.enable_tiling(**TILES, tile_sample_stride_width=8)
    stock = pipe(**inputs()).frames
    with wan_patches.enabled() if patched else wan_patches.enabled([]):
        (chunk,), frames = streamed(pipe)
    assert "enable_tiling" in chunk.reason
    assert identical(frames, stock)


def test_a_video_no_larger_than_a_tile_is_streamed():
    pipe = FAMILY.build()
    pipe.vae.enable_tiling()
    chunks, frames = streamed(pipe)
    assert [chunk.reason for chunk in chunks] == [None] * 3
    assert identical(frames, pipe(**inputs()).frames)


@pytest.mark.parametrize("name", [HELIOS])
def test_helios_with_tiling_is_delivered_chunk_by_chunk(name):
    pipe = FAMILIES[name].build()
    pipe.vae.enable_tiling(**TILES, tile_sample_stride_width=8)
    stock = pipe(**inputs(name)).frames
    chunks, frames = streamed(pipe, name)
    assert [(chunk.start, chunk.reason) for chunk in chunks] == [(0, None), (5, None)]
    assert identical(frames, stock)


def test_a_wrapped_decode_delivers_at_the_end(pipe, assert_delivered_at_the_end):
    decode, seen = pipe.vae.decode, []

    def darker(*args, **kwargs):
        (video,) = decode(*args, **kwargs)
        seen.append(tuple(video.shape))
        return (video / 2,)

    pipe.vae.decode = darker
    try:
        assert_delivered_at_the_end("other code wraps it")
    finally:
        del pipe.vae.decode
    assert seen == [(1, 3, 9, 32, 48)] * 3


def test_a_replaced_decode_loop_delivers_at_the_end(pipe, assert_delivered_at_the_end):
    decode = pipe.vae._decode
    pipe.vae._decode = lambda *args, **kwargs: decode(*args, **kwargs)
    try:
        assert_delivered_at_the_end("other code wraps it")
    finally:
        del pipe.vae._decode


def test_a_decode_loop_of_another_class_delivers_at_the_end(assert_delivered_at_the_end, pipe, monkeypatch):
    stock = autoencoder_kl_wan.AutoencoderKLWan._decode
    monkeypatch.setattr(autoencoder_kl_wan.AutoencoderKLWan, "_decode", lambda *args, **kwargs: stock(*args, **kwargs))
    assert_delivered_at_the_end("decoding loop is unknown")


def test_a_replaced_function_in_the_loop_delivers_at_the_end(assert_delivered_at_the_end, monkeypatch):
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **kwargs: cat(*args, **kwargs))
    assert_delivered_at_the_end("was replaced")


def test_an_active_mode_delivers_at_the_end(assert_delivered_at_the_end):
    with FlopCounterMode(display=False):
        assert_delivered_at_the_end("observes the operations")


def test_an_unknown_processor_delivers_at_the_end(assert_delivered_at_the_end, pipe, monkeypatch):
    class Smoothed(type(pipe.video_processor)):
        def postprocess_video(self, video, output_type="np", **kwargs):
            return super().postprocess_video(video.cumsum(dim=2) / 10, output_type, **kwargs)

    monkeypatch.setattr(pipe, "video_processor", Smoothed(vae_scale_factor=8))
    assert_delivered_at_the_end("video processor is unknown")


def test_a_custom_pipeline_delivers_at_the_end(pipe, caplog):
    class Twice(diffusers.WanPipeline):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.frames = np.concatenate([output.frames, output.frames], axis=1)
            return output

    twice = Twice(**pipe.components)
    (chunk,), frames = streamed(twice)
    assert "a Twice may process" in chunk.reason
    assert identical(frames, twice(**inputs()).frames)


def test_a_wrapped_pipeline_call_still_runs(pipe, monkeypatch):
    call = diffusers.WanPipeline.__call__

    @functools.wraps(call)
    def brighter(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        output.frames = output.frames * 2
        return output

    monkeypatch.setattr(diffusers.WanPipeline, "__call__", brighter)
    (chunk,), frames = streamed(pipe)
    assert "may process the decoded video further" in chunk.reason
    assert identical(frames, pipe(**inputs()).frames)


def test_objects_that_are_not_pipelines(caplog):
    chunks = []
    with caplog.at_level(logging.WARNING):
        assert stream_frames(lambda prompt: prompt.upper(), chunks.append, "a fox") == "A FOX"
    assert not chunks
    assert "no frames were streamed: there are no frames in a str" in caplog.text


# Others


def test_two_threads_stream_independently():
    pipes = [FAMILY.build(seed=seed) for seed in range(2)]
    stocks = [pipe(**inputs()).frames for pipe in pipes]
    both, found = threading.Barrier(2, timeout=60), [None, None]

    def run(nth):
        torch.set_num_threads(1)
        chunks = []

        def on_frames(chunk):
            both.wait()
            chunks.append(chunk.frames)

        stream_frames(pipes[nth], on_frames, **inputs())
        found[nth] = np.concatenate(chunks, axis=1)

    threads = [threading.Thread(target=run, args=(nth,)) for nth in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(identical, found, stocks))


def test_another_thread_may_decode_with_the_same_vae(pipe):
    """Between two chunks; its own frames stay its own."""
    other = diffusers.WanPipeline(**pipe.components)
    stock, found = pipe(**inputs()).frames, []

    def decode():
        chunks = []
        stream_frames(other, chunks.append, **inputs())
        found.append((chunks, type(pipe.vae)))

    def on_step(pipe, step, timestep, kept):
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
        return kept

    _, frames = streamed(pipe, callback_on_step_end=on_step)
    ((chunk,), _), *_ = found
    assert "another stream" in chunk.reason
    assert identical(chunk.frames, stock)
    assert identical(frames, stock)


def test_importing_the_package_does_not_import_torch():
    assert "stream_frames" in wan_patches.__all__
    assert wan_patches.stream_frames is stream_frames
