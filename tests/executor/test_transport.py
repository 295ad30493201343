"""The channel: every value arrives, nothing is overwritten, nothing is left behind, and no death hangs anybody."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wan_patches.bench.measure import identical
from wan_patches.executor import packing, transport
from wan_patches.executor.images import Frame
from wan_patches.executor.transport import Channel, pack

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="what is tested needs files in memory"),
]

BIG = 300_000  # bytes, more than goes through the socket
CARRIERS = {"slots": {}, "files": {"slots": 0}, "wire": {"memfd": False}}


@contextlib.contextmanager
def _ends(**options):
    """Both ends in this process: a channel that sends and one that receives."""
    ours, sock = Channel.pair(**options)
    theirs = Channel(sock)
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


@pytest.fixture
def ends():
    with _ends() as both:
        yield both


@pytest.fixture(params=CARRIERS)
def carrier(request):
    with _ends(**CARRIERS[request.param]) as both:
        yield both


def _through(both, value):
    """What comes out of the one end when `value` goes into the other."""
    packed, found = pack(value), []
    thread = threading.Thread(target=lambda: found.append(both[1].recv()))
    thread.start()
    both[0].send("value", value=packed)
    del packed
    thread.join(60)
    return found[0].load()


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _slots(channel):
    return [slot for slot in channel._slots if slot]


@pytest.fixture
def child():
    """Starts `code` in another process, where `channel` is its end; gives this end and the process."""
    started, channels = [], []

    def start(code, **options):
        channel, sock = Channel.pair()
        head = f"""
            import os, signal, socket, sys, torch
            from wan_patches.executor.transport import Channel, pack
            channel = Channel(socket.socket(fileno={sock.fileno()}), **{options})
        """
        script = textwrap.dedent(head) + textwrap.dedent(code)
        started.append(subprocess.Popen([sys.executable, "-c", script], pass_fds=[sock.fileno()]))
        channels.append(channel)
        sock.close()
        return channel, started[-1]

    yield start
    for channel in channels:
        channel.close()
    for process in started:
        process.kill()
        process.wait(30)


# Every value arrives


def _dtypes():
    for name, dtype in sorted(vars(torch).items()):
        if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}" and "q" not in name:
            try:
                yield torch.randint(0, 2, (64 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
            except RuntimeError:
                continue


@pytest.mark.parametrize("tensor", list(_dtypes()), ids=lambda tensor: str(tensor.dtype))
@pytest.mark.parametrize("count", [64, BIG])
def test_every_dtype_arrives(ends, tensor, count):
    try:
        tensor = tensor.view(torch.uint8).repeat(-(-count // 64)).view(tensor.dtype)
    except RuntimeError:
        pytest.skip("torch knows it by name only")
    found = _through(ends, tensor)
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def _layouts(size):
    base = torch.randn(size, 4, 6, 8)
    yield "contiguous", base
    yield "transposed", base.transpose(1, 3)
    yield "channels last", base.to(memory_format=torch.channels_last)
    yield "every other", base[:, ::2, :, 1:]
    yield "expanded", base[:1].expand(size, 4, 6, 8)
    yield "offset", base[1:]
    yield "conjugate", torch.complex(base, base * 2).conj()
    yield "negative", torch.complex(base, base * 2).conj().imag
    yield "wants gradients", base.clone().requires_grad_()
    yield "computed with gradients", base.clone().requires_grad_() * 2
    yield "no dimensions", torch.tensor(3.5)
    yield "empty", torch.empty(0, 3)
    yield "empty, transposed", torch.empty(5, 0, 3).transpose(0, 2)
    yield "bfloat16", base.bfloat16()


@pytest.mark.parametrize("size", [2, 1000])
def test_every_layout_arrives(carrier, size):
    for name, tensor in _layouts(size):
        found = _through(carrier, tensor)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor.detach()), name
        assert not found.requires_grad, name
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size(), name
        dense = torch.empty_like(tensor).stride() == tensor.stride()
        assert found.stride() == tensor.stride() if dense else found.is_contiguous(), name


def _arrays(size):
    base = np.random.default_rng(0).normal(size=(size, 6, 8))
    yield base
    yield base.astype(">f4")
    yield np.asfortranarray(base)
    yield base[:, ::2]
    yield base.transpose(1, 0, 2)
    yield np.zeros((0, 3), np.float32)
    yield np.array(4)
    yield np.zeros(size, [("a", "f4"), ("b", "u1", (3,))])
    yield base.astype("datetime64[s]")
    yield base[:2].astype(str)
    yield base[:2].astype(object)
    yield np.lib.stride_tricks.as_strided(base, (2, 6, 8), (0, *base.strides[1:]))


@pytest.mark.parametrize("size", [2, 2000])
def test_every_array_arrives(carrier, size):
    for array in _arrays(size):
        found = _through(carrier, array)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        assert found.flags.writeable
    read_only = np.ones(size)
    read_only.flags.writeable = False
    assert _through(carrier, read_only).flags.writeable


@pytest.mark.parametrize("size", [10, BIG])
def test_containers_and_outputs_arrive(carrier, size):
    frames = torch.rand(1, 3, size)
    value = {
        "output": WanPipelineOutput(frames=frames),
        "nested": [(frames, {"again": [torch.arange(size), np.arange(size)]}), OrderedDict(a=frames.numpy())],
        "parameter": torch.nn.Parameter(torch.randn(size)),
        "sparse": torch.eye(5).to_sparse(),
        "plain": [None, 1.5, "text", b"bytes" * size, bytearray(size), Fraction(1, 3), {1, 2}, ValueError("no")],
    }
    found = _through(carrier, value)
    assert isinstance(found["output"], WanPipelineOutput)
    assert identical(found["output"].frames, frames)
    assert found["nested"][0][0] is found["output"].frames  # one object stays one
    assert identical(found["nested"][0][1], value["nested"][0][1])
    assert identical(found["nested"][1]["a"], frames.numpy())
    assert isinstance(found["parameter"], torch.nn.Parameter)
    assert found["parameter"].requires_grad
    assert torch.equal(found["parameter"], value["parameter"])
    assert torch.equal(found["sparse"].to_dense(), torch.eye(5))
    assert found["plain"][:-1] == value["plain"][:-1]
    assert found["plain"][-1].args == ("no",)


def test_a_generator_goes_as_it_pickles_itself(ends):
    generator = torch.Generator().manual_seed(5)
    try:
        pickle.dumps(generator)
    except TypeError:
        pytest.skip("not in this torch")
    assert torch.equal(torch.rand(3, generator=_through(ends, generator)), torch.rand(3, generator=generator))


def test_attributes_and_subclasses_are_not_lost(ends):
    tensor = torch.ones(BIG)
    tensor.note = "mine"
    assert _through(ends, tensor).note == "mine"
    assert isinstance(_through(ends, torch.nn.Linear(3, 400)), torch.nn.Linear)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_arrive_as_frames(carrier, mode):
    noise = np.random.default_rng(0).integers(0, 256, (240, 400, 4), dtype=np.uint8)
    images = [Image.fromarray(noise[index:]).convert(mode) for index in range(4)]
    images[0].info["prompt"] = "a cat"
    images.append(Image.new(mode, (5, 0)))
    images.append(Frame(np.asarray(images[1])))
    found = _through(carrier, images)
    assert all(type(image) is Frame and image.array is not None for image in found)
    assert found == images
    assert found[0].info == {"prompt": "a cat"}
    found[0].putpixel((0, 0), 1)
    assert found[0] != images[0]


def test_other_images_go_as_they_pickle_themselves(ends):
    palette = Image.new("RGB", (300, 400), "red").quantize()
    found = _through(ends, [palette, Image.new("F", (300, 400), 0.5)])
    assert [image.mode for image in found] == ["P", "F"]
    assert found[0].convert("RGB").getpixel((3, 3)) == (255, 0, 0)


def test_a_default_device_does_not_reach_it(carrier):
    value = [torch.arange(BIG), torch.rand(40, 9000)[:, ::3], torch.empty(0, 4), torch.rand(30, 30).t()]
    with torch.device("meta"):
        found = _through(carrier, value)
    assert identical(found, value)


def test_kind_request_and_info_arrive(ends):
    info = {"a": (1, 2.5, None, True), "b": [b"x", "y", {3}]}
    ends[0].send("progress", 7, info)
    found = ends[1].recv()
    assert (found.kind, found.request, found.info, found.load()) == ("progress", 7, info, None)


# What arrives is the receiver's own


def test_results_are_writable_exact_and_independent(carrier):
    base = torch.arange(4.0 * BIG).reshape(4, BIG)
    found = _through(carrier, [base[0], base[1], base[:2], base.numpy()[2]])
    assert all(part.storage_offset() == 0 for part in found[:3])
    found[0].fill_(-1)
    found[3][:] = -2
    assert identical(found[1:3], [base[1], base[:2]])
    file = io.BytesIO()
    torch.save(found[1], file)
    assert len(file.getvalue()) < base[1].nbytes + 5000
    assert base[0, 1] == 1


def test_every_part_starts_where_vector_instructions_like_it(carrier):
    parts = [torch.zeros(size, dtype=torch.uint8) for size in (3, 1, BIG + 5, 64, 9)]
    assert {part.data_ptr() % 16 for part in _through(carrier, parts)} == {0}


def test_a_value_sent_twice_arrives_twice(carrier):
    tensor = carrier[0].empty_strided((BIG,), (1,), torch.float32).fill_(3)
    packed = pack([tensor])
    found = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(carrier[1].recv().load()[0]))
        thread.start()
        carrier[0].send("x", value=packed)
        thread.join()
    found[0].fill_(4)
    assert (found[1] == 3).all()


def test_a_message_is_loaded_once(ends):
    ends[0].send("x", value=pack(torch.ones(BIG)))
    message = ends[1].recv()
    message.load()
    with pytest.raises(RuntimeError, match="once"):
        message.load()


def test_results_outlive_the_channels(carrier):
    value = [torch.arange(BIG) + nth for nth in range(5)]
    found = [_through(carrier, part) for part in value]
    for channel in carrier:
        channel.close()
    gc.collect()
    for part in found:
        part += 1
    assert identical(found, [part + 1 for part in value])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_held_is_never_overwritten_and_what_is_free_is_used_again(data):
    with _ends(slots=data.draw(st.integers(1, 3))) as (sender, receiver):
        held, own, made = {}, {}, 0
        for step in range(data.draw(st.integers(5, 40))):
            size = data.draw(st.sampled_from([50_000, 120_000, 200_000, 400_000]))
            match data.draw(st.sampled_from(["send", "send", "drop", "compute", "forget", "trim", "both"])):
                case "send":
                    value = torch.full((size,), step, dtype=torch.uint8)
                    sender.send("x", step, value=pack([value, value[:9]]))
                    held[step] = receiver.recv().load()
                case "compute":
                    own[step] = sender.empty_strided((size,), (1,), torch.uint8).fill_(step)
                case "both" if own:
                    nth = data.draw(st.sampled_from(list(own)))
                    sender.send("x", nth, value=pack([own[nth], torch.full((size,), nth, dtype=torch.uint8)]))
                    held[step + 1000 * (nth + 1)] = receiver.recv().load()
                case "drop" if held:
                    del held[data.draw(st.sampled_from(list(held)))]
                case "forget" if own:
                    del own[data.draw(st.sampled_from(list(own)))]
                case "trim":
                    sender.trim()
            for nth, parts in held.items():
                expected = nth // 1000 - 1 if nth >= 1000 else nth
                assert all((part == expected).all() for part in parts)
            for nth, tensor in own.items():
                assert (tensor == nth).all()
            made = max(made, len(_slots(sender)))
        held.clear()
        own.clear()
        parts = tensor = None
        assert all(slot.free for slot in _slots(sender))
        before = {id(slot): slot.generation for slot in _slots(sender)}
        if before:  # what is free is used, and nothing new is made
            sender.send("x", value=pack(torch.zeros(100_000, dtype=torch.uint8)))
            after = {id(slot): slot.generation for slot in _slots(sender)}
            assert after.keys() == before.keys()
            assert sum(after.values()) == sum(before.values()) + 1


def test_a_slot_is_held_by_every_part_of_what_lies_in_it(ends):
    found = _through(ends, {"a": torch.ones(BIG), "b": np.ones(BIG), "c": [Frame(np.ones((300, 400, 3), np.uint8))]})
    (slot,) = _slots(ends[0])
    for part in ("a", "b", "c"):
        assert not slot.free
        view = found.pop(part)[:5]
        gc.collect()
        assert not slot.free
        del view
    assert slot.free


def test_a_free_slot_is_used_again(ends):
    for _ in range(5):
        found = _through(ends, torch.ones(BIG))
        del found
    (slot,) = _slots(ends[0])
    assert slot.generation == 5


def test_a_slot_too_small_is_replaced(ends):
    kept = [_through(ends, torch.full((BIG,), 1.0)), _through(ends, torch.full((2 * BIG,), 2.0))]
    del kept[1]
    kept += [_through(ends, torch.full((5 * BIG,), 3.0)), _through(ends, torch.full((5 * BIG,), 4.0))]
    assert [part.unique().tolist() for part in kept] == [[1.0], [3.0], [4.0]]
    assert [slot.capacity >= 20 * BIG for slot in _slots(ends[0])] == [False, True]


def test_a_forked_child_does_not_give_the_slot_back(ends):
    held = _through(ends, torch.full((BIG,), 7.0))
    pid = os.fork()
    if not pid:
        try:
            del held
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert not _slots(ends[0])[0].free
    other = _through(ends, torch.zeros(BIG))
    assert (held == 7).all()
    del other, held
    assert all(slot.free for slot in _slots(ends[0]))


# Computing into a slot


def test_what_was_computed_in_a_slot_is_not_copied(ends, monkeypatch):
    copied = []
    original = np.copyto
    monkeypatch.setattr(transport.np, "copyto", lambda to, *rest: (copied.append(to.nbytes), original(to, *rest))[1])
    tensor = ends[0].empty_strided((3, 4, BIG), (BIG * 4, BIG, 1), torch.bfloat16)
    packed = pack([tensor[0], tensor[1:], torch.ones(5)])
    tensor.fill_(2)  # later than the pickle
    ends[0].send("x", value=packed)
    found = ends[1].recv().load()
    assert identical(found, [tensor[0], tensor[1:], torch.ones(5)])
    assert not copied
    tensor[0, 0, 0] = 9  # only to see that it is the same memory
    assert found[0][0, 0] == 9
    del packed


def test_a_video_computed_in_a_slot_goes_as_frames_without_a_copy(ends, monkeypatch):
    monkeypatch.setattr(transport.np, "copyto", None)
    video = ends[0].empty_strided((5, 240, 320, 3), (240 * 320 * 3, 320 * 3, 3, 1), torch.uint8).random_()
    ends[0].send("x", value=pack([Frame(frame) for frame in video.numpy()]))
    found = ends[1].recv().load()
    assert np.array_equal(np.stack(found), video.numpy())


def test_a_slot_is_not_used_again_while_the_sender_holds_it(ends):
    tensor = ends[0].empty_strided((BIG,), (1,), torch.float32).fill_(1)
    view = tensor[5:]
    _through(ends, tensor)
    del tensor
    assert not _slots(ends[0])[0].free
    kept = [_through(ends, torch.zeros(BIG)) for _ in range(3)]
    assert (view == 1).all()
    del view, kept
    assert all(slot.free for slot in _slots(ends[0]))


def test_views_of_the_same_memory_arrive_as_two_tensors(ends):
    tensor = ends[0].empty_strided((2, BIG), (BIG, 1), torch.float32).fill_(1)
    whole, part = _through(ends, [tensor, tensor[1]])
    part.fill_(5)
    assert (whole == 1).all()


def test_without_a_free_slot_it_is_ordinary_memory(ends):
    held = [ends[0].empty_strided((BIG,), (1,), torch.float32) for _ in range(4)]
    assert len(_slots(ends[0])) == 2
    assert identical(_through(ends, [part.fill_(3) for part in held]), held)
    assert ends[0].empty_strided((2, 0), (1, 1), torch.float32).shape == (2, 0)
    assert ends[0].empty_strided((), (), torch.float32).shape == ()
    assert ends[0].empty_strided((BIG, 2), (1, BIG), torch.bool).stride() == (1, BIG)


def test_trim_gives_the_memory_back_and_slots_work_after(ends):
    found = _through(ends, torch.ones(8 << 20))
    (slot,) = _slots(ends[0])
    ends[0].trim()
    assert os.fstat(slot.descriptor).st_blocks * 512 > 32 << 20  # held: nothing happens
    assert (found == 1).all()
    del found
    ends[0].trim()
    assert os.fstat(slot.descriptor).st_blocks * 512 < 1 << 20
    assert identical(_through(ends, torch.ones(8 << 20)), torch.ones(8 << 20))
    assert _slots(ends[0]) == [slot]
    ends[0].trim()
    tensor = ends[0].empty_strided((8 << 20,), (1,), torch.float32).fill_(4)
    assert identical(_through(ends, tensor), tensor)


# Nothing is left behind


def _open():
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
        return len(os.listdir("/proc/self/fd")), len(list(maps)), int(statm.read().split()[1]) * 4096


def test_a_thousand_values_leave_nothing(carrier):
    value = [torch.ones(30_000), np.ones(1000)]
    for _ in range(100):
        _through(carrier, value)
    gc.collect()
    gc.disable()  # nothing may need it
    try:
        before = _open()
        for _ in range(1000):
            _through(carrier, value)
        after = _open()
    finally:
        gc.enable()
    assert after[0] == before[0]
    assert after[1] < before[1] + 20
    assert after[2] < before[2] + (8 << 20)


def test_held_results_need_no_descriptors(ends):
    kept = [_through(ends, torch.full((BIG // 2,), float(nth))) for nth in range(3)]
    before = _open()[0]
    kept += [_through(ends, torch.full((BIG // 2,), float(nth))) for nth in range(3, 50)]
    assert _open()[0] == before
    assert all((part == nth).all() for nth, part in enumerate(kept))


def test_closing_leaves_no_descriptors_and_nothing_has_a_name():
    names, before = os.listdir("/dev/shm"), _open()[0]
    for options in CARRIERS.values():
        with _ends(**options) as both:
            kept = [_through(both, torch.ones(BIG)) for _ in range(4)]
            assert os.listdir("/dev/shm") == names
    assert _open()[0] == before
    assert all((part == 1).all() for part in kept)


def test_packed_payloads_go_when_it_goes():
    tensor = torch.ones(10)
    before = sys.getrefcount(tensor)
    gc.disable()
    try:
        packed = pack([tensor, copy.deepcopy(tensor)])
        del packed
        assert sys.getrefcount(tensor) == before
    finally:
        gc.enable()


# What goes wrong


def _explode():
    raise ValueError("cannot be loaded")


class _Unloadable:
    def __reduce__(self):
        return _explode, ()


def test_what_cannot_be_pickled_raises_when_packed(ends):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pack([torch.ones(BIG), lambda: None])


def test_what_cannot_be_loaded_raises_when_loaded_and_the_channel_goes_on(carrier):
    with pytest.raises(ValueError, match="cannot be loaded"):
        _through(carrier, [torch.ones(BIG), _Unloadable()])
    assert (_through(carrier, torch.ones(BIG)) == 1).all()


def test_info_must_be_plain(ends):
    with pytest.raises(TypeError, match="Fraction"):
        ends[0].send("x", 0, Fraction(1, 2), pack(torch.ones(BIG)))
    assert (_through(ends, torch.ones(BIG)) == 1).all()
    assert [slot.generation for slot in _slots(ends[0])] == [1]


def test_a_failing_copy_leaves_the_channel_in_order(ends, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packing.TensorPayload, "copy_to", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ends[0].send("x", value=pack(torch.ones(BIG)))
    assert (_through(ends, torch.ones(BIG)) == 1).all()


def test_half_a_message_ends_the_channel(ends):
    class Interrupted:
        def __init__(self, sock):
            self.sock = sock

        def sendmsg(self, parts, *rest):
            self.sock.sendall(bytes(parts[0])[:10])
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.sock, name)

    ends[0]._socket = Interrupted(ends[0]._socket)
    with pytest.raises(KeyboardInterrupt):
        ends[0].send("x")
    ends[0]._socket = ends[0]._socket.sock
    with pytest.raises(ConnectionError):
        ends[0].send("y")
    with pytest.raises(EOFError):
        ends[1].recv()


def test_sending_to_nobody_raises(carrier):
    carrier[1].close()
    with pytest.raises(ConnectionError):
        carrier[0].send("x", value=pack(torch.ones(BIG)))
    with pytest.raises(EOFError):
        carrier[0].recv()
    carrier[0].close()
    with pytest.raises(ConnectionError):
        carrier[0].send("x")
    with pytest.raises(EOFError):
        carrier[0].recv()


def test_close_wakes_who_waits(ends):
    woken = []

    def wait():
        with pytest.raises(EOFError):
            ends[0].recv()
        woken.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    ends[0].close()
    thread.join(30)
    assert woken


@pytest.mark.parametrize("failing", ["memfd_create", "posix_fallocate", "pwrite"])
def test_without_memory_for_files_the_socket_carries_it(failing, ends, monkeypatch):
    def fail(*_):
        raise OSError(12, "no memory")

    monkeypatch.setattr(transport.os, failing, fail)
    before = _open()[0]
    for _ in range(3):
        assert identical(_through(ends, torch.arange(BIG)), torch.arange(BIG))
    assert ends[0].empty_strided((BIG,), (1,), torch.float32).shape == (BIG,)
    assert _open()[0] == before + 2 * (failing == "pwrite")  # that needs none for slots, which both ends keep open
    monkeypatch.undo()
    assert identical(_through(ends, torch.arange(BIG)), torch.arange(BIG))
    assert len(_slots(ends[0])) == 1


def test_writes_that_fall_short_are_continued(monkeypatch):
    original = os.pwrite
    monkeypatch.setattr(transport.os, "pwrite", lambda file, data, at: original(file, data[:70_001], at))
    with _ends(slots=0) as both:
        assert identical(_through(both, torch.arange(BIG)), torch.arange(BIG))


def test_a_receiver_without_descriptors_loses_the_value_and_not_the_channel(ends):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ends[0].send("big", value=pack(torch.ones(BIG)))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.devnull)) for _ in range(3)]
        free = os.dup(files[0].fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            message = ends[1].recv()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(OSError, match="Too many"):
        message.load()
    assert (_through(ends, torch.ones(BIG)) == 1).all()


_spoiled = []


def _spoil():
    _spoiled.append(True)


class _Evil:
    def __reduce__(self):
        return _spoil, ()


def _raw(plain, *, descriptors=0, stream=b"", wire=b"", magic=transport._MAGIC):
    envelope = pickle.dumps(plain)
    return transport._HEADER.pack(magic, descriptors, len(envelope), len(stream), len(wire)) + envelope + stream + wire


@pytest.mark.parametrize(
    "raw",
    [
        b"\0" * 100,
        _raw(("x", 0, None, [], []), magic=b"oops"),
        _raw(("x", 0, _Evil(), [], [])),
        _raw(("x", 0)),
        _raw(17),
        _raw(("x", 0, None, [("what", 1)], [])),
        _raw(("x", 0, None, [("wire", 100)], [(0, 0, 100)]), wire=b"abc"),
        _raw(("x", 0, None, [("wire", 3)], [(0, 1, 3)]), wire=b"abc"),
        _raw(("x", 0, None, [("wire", 3)], [(0, -1, 3)]), wire=b"abc"),
        _raw(("x", 0, None, [("wire", 3)], [(0, 2, -1)]), wire=b"abc"),
        _raw(("x", 0, None, [("wire", 3)], [(3, 0, 3)]), wire=b"abc"),
        _raw(("x", 0, None, [("file", 0, 4096)], [])),
        struct.pack("<4sIQQQ", transport._MAGIC, 0, 1 << 62, 0, 0),
    ],
    ids=range(13),
)
def test_what_is_no_message_raises(raw):
    channel, sock = Channel.pair()
    with sock:
        sock.sendall(raw)
        with pytest.raises(ConnectionError):
            channel.recv()
        with pytest.raises(EOFError):
            channel.recv()
    assert not _spoiled
    channel.close()


@pytest.mark.parametrize(
    "block", [("file", 0, 8192), ("slot", 0, 1, 0, 8192), ("slot", 0, 1, 0, 100), ("file", 0, -4096)]
)
def test_files_smaller_than_they_say_raise(block):
    channel, sock = Channel.pair()
    file = os.memfd_create("small")
    os.ftruncate(file, 4096)
    with sock:
        socket.send_fds(sock, [_raw(("x", 0, None, [block], [(0, 0, 1)]), descriptors=1)], [file])
        with pytest.raises((ConnectionError, OSError)):
            channel.recv().load()
    os.close(file)
    channel.close()


def test_many_threads_send_at_once(carrier):
    def send(nth):
        for step in range(30):
            size = (10, 3000, 100_000)[step % 3]
            carrier[0].send(f"{nth}", step, value=pack([torch.full((size,), nth * 100 + step)]))

    threads = [threading.Thread(target=send, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    kept, steps = [], {str(nth): [] for nth in range(4)}
    for count in range(120):
        message = carrier[1].recv()
        steps[message.kind].append(message.request)
        kept.append((int(message.kind) * 100 + message.request, message.load()[0]))
        if count % 2:
            kept.pop(0)
        assert all((tensor == expected).all() for expected, tensor in kept)
    for thread in threads:
        thread.join()
    assert all(found == list(range(30)) for found in steps.values())


# The other process


ECHO = """
    try:
        while True:
            message = channel.recv()
            channel.send(message.kind, message.request, message.info, pack(message.load()))
            del message
    except EOFError:
        pass
"""


@pytest.mark.parametrize("options", CARRIERS.values(), ids=CARRIERS)
def test_another_process_sends_back_what_it_gets(child, options):
    channel, process = child(ECHO, **options)
    value = {"big": torch.rand(3, BIG), "small": torch.arange(5), "frames": [Frame(np.ones((240, 320, 3), np.uint8))]}
    kept = []
    for step in range(6):
        channel.send("x", step, {"step": step}, pack(value))
        message = channel.recv()
        assert message.request == step
        kept.append(message.load())
    process.kill()
    process.wait()
    with pytest.raises(EOFError):
        channel.recv()
    with pytest.raises(ConnectionError):
        channel.send("x")
    channel.close()
    for found in kept:
        found["big"] += 1
        assert identical(found["big"], value["big"] + 1)
        assert found["frames"] == value["frames"]


def test_a_process_ends_when_the_other_end_does(child):
    channel, process = child(ECHO)
    channel.send("x")
    channel.recv()
    channel.close()
    assert process.wait(60) == 0


def test_killed_in_the_middle_of_a_message(child):
    code = """
        channel.send("first", value=pack(torch.ones(300_000)))
        channel.send("second", value=pack(torch.ones(30_000_000)))
    """
    channel, process = child(code, memfd=False)
    found = channel.recv().load()
    threading.Timer(0.5, process.kill).start()
    process.wait(60)  # it waits for somebody to read the second
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(EOFError):
        channel.recv()
    assert (found == 1).all()


def test_killed_before_anybody_looked(child):
    code = """
        for step in range(3):
            channel.send("x", step, value=pack(torch.full((300_000,), step)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    channel, process = child(code)
    process.wait(60)
    assert [channel.recv().load().unique().tolist() for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(EOFError):
        channel.recv()
