"""`submit(..., on_frames=)`: frames while a worker's autoencoder goes on."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import logging
import threading

import fakes
import numpy as np
import pytest

import wan_patches
from wan_patches import ParallelExecutor
from wan_patches.bench.measure import identical
from wan_patches.executor import WorkerDied
from wan_patches.executor.images import Frame
from wan_patches.testing.families import FAMILIES

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("nothing_left", "one_thread")]

INLINE = {"devices": "cpu"}
WORKER = {"devices": ["cpu"], "layout": "replicas", "threads": 1}


@pytest.fixture(scope="module", params=[INLINE, WORKER], ids=["inline", "worker"])
def shared_executor(request, nothing_left_by_shared):
    with ParallelExecutor(functools.partial(fakes.family, "wan_t2v"), **request.param) as executor:
        yield executor


@pytest.fixture
def executor(shared_executor):
    return shared_executor


@functools.cache
def stock(output_type="np"):
    return FAMILIES["wan_t2v"].build()(**inputs(output_type=output_type)).frames


def inputs(**more):
    return FAMILIES["wan_t2v"].inputs(**{"steps": 1, **more})


@pytest.mark.parametrize(("output_type", "patched"), [("pil", True), ("np", False), ("np", True)])
def test_chunks_come_in_order_with_the_bits_of_stock(executor, output_type, patched):
    seen, threads = [], set()

    def on_frames(request, chunk):
        threads.add(threading.current_thread().name)
        assert not request.done()
        seen.append((request, chunk))

    expected = stock(output_type)
    if patched:
        wan_patches.enable()
    request = executor.submit(on_frames=on_frames, **inputs(output_type=output_type))
    assert request.result(60).frames is None
    assert request.result().timings["decode"] > 0
    assert threads == {"wan-patches group"}
    assert all(theirs is request for theirs, _ in seen)
    chunks = [chunk for _, chunk in seen]
    assert [(chunk.start, chunk.reason) for chunk in chunks] == [(0, None), (1, None), (5, None)]
    parts = [chunk.frames for chunk in chunks]
    if output_type == "np":
        assert identical(np.concatenate(parts, axis=1), expected)
    else:
        assert identical([list(itertools.chain(*videos)) for videos in zip(*parts)], expected)


def test_requests_without_it_have_their_frames(executor):
    chunks = []
    executor.submit(on_frames=lambda request, chunk: chunks.append(chunk), **inputs()).result(60)
    assert len(chunks) == 3
    assert identical(executor.submit(**inputs()).result(60).frames, stock())
    assert len(chunks) == 3


def test_a_callback_that_raises_is_logged_and_hurts_nobody(executor, caplog):
    starts = []

    def on_frames(request, chunk):
        starts.append(chunk.start)
        raise RuntimeError("not in the mood")

    with caplog.at_level(logging.ERROR, "wan_patches"):
        request = executor.submit(on_frames=on_frames, **inputs())
        assert request.result(60).frames is None
    assert starts == [0, 1, 5]
    assert caplog.text.count(f"the frames callback of request {request.id} raised") == 3


def test_a_callback_may_cancel(executor):
    starts = []

    def on_frames(request, chunk):
        starts.append(chunk.start)
        request.cancel()

    request = executor.submit(on_frames=on_frames, **inputs(frames=33))
    with pytest.raises(concurrent.futures.CancelledError):
        request.result(60)
    assert starts == [0]
    assert identical(executor.submit(**inputs()).result(60).frames, stock())


def test_latents_are_refused(executor):
    request = executor.submit(on_frames=print, **inputs(output_type="latent"))
    with pytest.raises(ValueError, match="latent"):
        request.result(60)


def test_frames_of_a_pipeline_that_is_not_known_come_at_the_end():
    chunks = []
    with ParallelExecutor(fakes.fake, devices="cpu") as executor:
        request = executor.submit("big", 3, on_frames=lambda request, chunk: chunks.append(chunk))
        assert request.result(60).frames is None
    (chunk,) = chunks
    assert "a Fake may process the decoded video further" in chunk.reason
    assert bool((chunk.frames == 3).all())


def test_pictures_are_decoded_when_looked_at():
    """And lie in memory that the worker wrote them to."""
    chunks = []
    wan_patches.enable()
    with ParallelExecutor(functools.partial(fakes.family, "wan_t2v"), **WORKER) as executor:
        executor.submit(on_frames=lambda _, chunk: chunks.append(chunk), **inputs(output_type="pil")).result(60)
    assert {type(image) for chunk in chunks for image in chunk.frames[0]} == {Frame}


@pytest.mark.parametrize("retries", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_after_a_death_in_mid_stream_frames_begin_again_or_end_with_the_request(tmp_path, retries):
    chunks = []
    factory = functools.partial(fakes.dies_in_mid_stream, str(tmp_path / "died"))
    with ParallelExecutor(factory, **WORKER, retries=retries) as executor:
        request = executor.submit(on_frames=lambda _, chunk: chunks.append(chunk), **inputs())
        error = request.exception(120)
    if retries:
        assert request.result().frames is None
        assert [chunk.start for chunk in chunks] == [0, 1, 0, 1, 5]
        assert identical(np.concatenate([chunk.frames for chunk in chunks[2:]], axis=1), stock())
    else:
        assert isinstance(error, WorkerDied)
        assert [chunk.start for chunk in chunks] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("vae_parallel", [False, "tiles", "spatial"])
def test_two_ranks(vae_parallel):
    """The first hands over; with slabs the video comes as a whole."""
    chunks = []
    factory = functools.partial(fakes.family, "wan_t2v")
    options = {"devices": ["cpu", "cpu"], "threads": 1, "layout": "cfg", "vae_parallel": vae_parallel}
    with ParallelExecutor(factory, **options) as executor:
        whole = executor.submit(**inputs()).result(90).frames
        executor.submit(on_frames=lambda _, chunk: chunks.append(chunk), **inputs()).result(90)
    assert identical(np.concatenate([chunk.frames for chunk in chunks], axis=1), whole)
    assert len(chunks) == (1 if vae_parallel == "spatial" else 3)
