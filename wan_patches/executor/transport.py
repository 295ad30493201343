"""Transfers values between two processes: small ones through a socket, large ones through shared memory.

Mapping a new segment for every result causes page faults that cost several times the copy. A channel therefore keeps
*slots*: files in memory (memfd), mapped once on both ends and reused once the receiver has dropped the value. Received
values lie in the slot, without a second copy. If all slots are in use, a separate file carries the value; if such files
are not available, the socket does. No further fallback is needed, since every channel has a socket.

A message on the wire consists of a header (lengths), an envelope (plain data: kind of message and positions of its
buffers), a pickle, and the bytes that no file carries. Files have no names, so nothing remains when processes die. Only
data from the socket is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wan_patches.executor import forks
from wan_patches.executor.memory import PAGE, Map, Received, Slot, new_file, seal
from wan_patches.executor.packing import Packed, Payload, TensorPayload, make_tensor, pack

__all__ = ["Channel", "Message", "Packed", "pack"]

INLINE = 96 << 10  # payload in bytes up to which the socket is faster than a slot
LARGEST_SLOT = 4 << 30  # bytes; larger values use separate files, whose memory is freed at once
_ALIGN = 64  # bytes: a cache line, and more than any dtype requires
_MAGIC = b"wpm1"
_HEADER = struct.Struct("<4sIQQQ")  # magic, number of descriptors, bytes of envelope, pickle and payload on the wire
_MAX_DESCRIPTORS = 64


# Messages


@dataclass(frozen=True)
class Message:
    """A received message: `kind`, `request` and `info` as passed to `send`; `load` returns the value."""

    kind: str
    request: int
    info: Any
    _value: list[tuple[np.ndarray, list[np.ndarray]] | Exception] = field(
        default_factory=list, repr=False, compare=False
    )

    def load(self) -> Any:
        """Unpickles the value; None if there is none. Call only once: a second value would share the same memory.

        Raises:
            Exception: unpickling failed; `OSError` if this end had no memory or descriptors left for the value. The
                channel remains usable.
            RuntimeError: the value has been loaded before.
        """
        try:
            found = self._value.pop()
        except IndexError:
            raise RuntimeError("A message can be loaded only once.") from None
        if isinstance(found, Exception):
            raise found
        stream, buffers = found
        return pickle.loads(stream.data, buffers=buffers) if len(stream) else None


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        raise TypeError(f"`info` must be plain data, not {type(value).__name__}.")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError("The envelope must be plain data.")


class _Layout:
    """The layout of a message's buffers: `blocks` of memory, and `(block, start, bytes)` for every buffer.

    A block is `("slot", index, generation, index of descriptor or None, bytes of file)`, `("file", index of descriptor,
    bytes)` or `("wire", bytes)`.
    """

    def __init__(self, count: int) -> None:
        self.blocks: list[tuple[Any, ...]] = []
        self.spans: list[tuple[int, int, int]] = [(-1, 0, 0)] * count  # -1: empty
        self.descriptors: list[int] = []
        self.wire: list[Any] = []
        self.leased: list[Slot] = []
        self.own_files: list[int] = []

    def add_descriptor(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1

    def close(self) -> None:
        """Closes files of this message alone; the other end has its own descriptors of them."""
        while self.own_files:
            os.close(self.own_files.pop())


class Channel:
    """One end of a symmetric connection between two processes.

    Args:
        sock: connected stream socket of family `AF_UNIX`; the channel takes ownership.
        slots: maximum number of slots for sending. Their memory stays allocated until `trim` or `close`.
        memfd: False sends everything through the socket, as on systems without memfd.
        send_timeout: seconds without any read by the other end after which sending fails and the connection closes;
            None for no limit.
        device: device of the tensors to send. For a CUDA device, slots are registered with the driver for direct
            writes; NPU tensors are copied through pinned memory. Neither has been tested on hardware.

    Any thread may send; one thread receives. Received values stay valid after the channel is closed or the other
    process dies. A forked child inherits received values copy-on-write, like any memory; the channel is closed in the
    child. Forks by C code that does not call Python's hooks are not detected: such a child sees later writes, including
    the next message.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        slots: int = 2,
        memfd: bool = True,
        send_timeout: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._socket = sock
        if send_timeout is not None:
            seconds, rest = divmod(send_timeout, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
        self._limit = slots if memfd else 0
        self._memfd = memfd
        self.device = device  # may be set later, before the first send
        self._lock = threading.Lock()
        self._slots: list[Slot | None] = []  # None: could not be created
        self._theirs: dict[int, Received] = {}
        self._lost = False  # the connection is lost, though unread bytes may remain
        self._closed = False
        forks.watch(self)

    @staticmethod
    def pair(**options: Any) -> tuple[Channel, socket.socket]:
        """Returns this process's end and the socket of the other end.

        A child inherits the socket (`pass_fds`); the caller closes it afterwards.

        Args:
            options: as for `Channel`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Channel(ours, **options), theirs

    # Sending

    def send(self, kind: str, request: int = 0, info: Any = None, value: Packed | None = None) -> None:
        """Sends a message. Returns once all bytes are available to the other end, even if it has not read them.

        Args:
            kind: kind of message, as agreed between both ends.
            request: number of the request that the message belongs to.
            info: small plain data (None, numbers, strings, bytes, and containers of them).
            value: result of `pack`. Memory from `empty_strided` is not copied: it then belongs to the other end, which
                may write to it.

        Raises:
            ConnectionError: the other end is closed or has stopped reading, or this end is closed.
            TypeError: `info` is not plain data.
        """
        payloads = value.payloads if value else []
        layout = _Layout(len(payloads))
        with self._lock:
            if self._lost:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            try:
                self._place(payloads, layout)
                envelope = io.BytesIO()
                _PlainPickler(envelope, protocol=5).dump((kind, request, info, layout.blocks, layout.spans))
                stream = value.stream if value else b""
                wire = sum(len(part) for part in layout.wire)
                header = _HEADER.pack(_MAGIC, len(layout.descriptors), len(envelope.getbuffer()), len(stream), wire)
                # the slots count as leased from here on, since part of the message may arrive
                for slot in layout.leased:
                    slot.generation += 1
                    slot.sent = True
                try:
                    self._write([header, envelope.getbuffer(), stream, *layout.wire], layout.descriptors)
                except BaseException:
                    self._hang_up()  # after a partial message, the other end would misread the next one
                    raise
            finally:
                layout.close()

    def _place(self, payloads: Sequence[Payload], layout: _Layout) -> None:
        """Places the payloads in memory that the other end can read."""
        rest = self._place_in_place(payloads, layout)
        size = _packed_size(payloads[nth].nbytes for nth in rest)
        if size > INLINE and self._memfd:
            slot = self._free_slot(size)
            if slot is not None and self._place_in_slot(slot, payloads, rest, layout):
                return
            if self._place_in_file(payloads, rest, size, layout):
                return
        self._place_on_wire(payloads, rest, layout)

    def _place_in_place(self, payloads: Sequence[Payload], layout: _Layout) -> list[int]:
        """Places payloads that are already in a slot; returns the indices of all others."""
        held = [slot for slot in self._slots if slot and slot.holds and not slot.leased and not slot.retired]
        rest: list[int] = []
        blocks: dict[int, int] = {}
        for nth, payload in enumerate(payloads):
            data = payload.dense() if held and payload.nbytes else None
            if data is None:
                if payload.nbytes:
                    rest.append(nth)
                continue
            for slot in held:
                start = slot.position(data)
                if start is None:
                    continue
                end, block = start + payload.nbytes, blocks.get(id(slot))
                if any(block == other and start < begin + size and begin < end for other, begin, size in layout.spans):
                    continue  # overlapping views must arrive as independent tensors
                if block is None:
                    block = blocks[id(slot)] = self._lease(slot, layout)
                layout.spans[nth] = block, start, payload.nbytes
                break
            else:
                rest.append(nth)
        return rest

    def _place_in_slot(self, slot: Slot, payloads: Sequence[Payload], which: list[int], layout: _Layout) -> bool:
        try:
            slot.make_ready()
        except OSError:  # out of memory
            return False
        block, start, devices = len(layout.blocks), 0, set()
        for nth in which:
            payload, end = payloads[nth], start + payloads[nth].nbytes
            payload.copy_to(slot.data[start:end], slot.pinned)
            if slot.pinned and isinstance(payload, TensorPayload) and payload.device.type == "cuda":
                devices.add(payload.device)
            layout.spans[nth] = block, start, payload.nbytes
            start = aligned(end)
        for device in devices:
            torch.cuda.synchronize(device)
        self._lease(slot, layout)
        return True

    def _lease(self, slot: Slot, layout: _Layout) -> int:
        descriptor = None if slot.sent else layout.add_descriptor(slot.descriptor)
        number = self._slots.index(slot)
        layout.blocks.append(("slot", number, slot.generation + 1, descriptor, slot.mapping.size))
        layout.leased.append(slot)
        return len(layout.blocks) - 1

    def _place_in_file(self, payloads: Sequence[Payload], which: list[int], size: int, layout: _Layout) -> bool:
        """Writes the payloads to a file of their own; page faults of a new mapping would cost more than the copy."""
        try:
            descriptor = new_file()
        except OSError:
            return False
        layout.own_files.append(descriptor)
        block, start = len(layout.blocks), 0
        try:
            os.ftruncate(descriptor, size)
            for nth in which:
                _write_at(descriptor, payloads[nth].bytes(), start)
                layout.spans[nth] = block, start, payloads[nth].nbytes
                start = aligned(start + payloads[nth].nbytes)
            seal(descriptor)
        except OSError:  # out of memory
            return False
        layout.blocks.append(("file", layout.add_descriptor(descriptor), size))
        return True

    def _place_on_wire(self, payloads: Sequence[Payload], which: list[int], layout: _Layout) -> None:
        block, start = len(layout.blocks), 0
        for nth in which:
            data = payloads[nth].bytes()
            layout.spans[nth] = block, start, data.nbytes
            layout.wire += [data.data, bytes(aligned(data.nbytes) - data.nbytes)]
            start += aligned(data.nbytes)
        if which:
            layout.blocks.append(("wire", start))

    def _free_slot(self, size: int) -> Slot | None:
        """Returns the smallest sufficient free slot, or a new one that replaces a smaller one if necessary, or None."""
        if size > LARGEST_SLOT or self._closed:
            return None
        self._drop_retired()
        free = sorted((slot for slot in self._slots if slot and slot.free), key=lambda slot: slot.capacity)
        for slot in free:
            if slot.capacity >= size:
                return slot
        if None in self._slots:
            number = self._slots.index(None)
        elif len(self._slots) < self._limit:
            number = len(self._slots)
            self._slots.append(None)
        elif free:
            number = self._slots.index(free[0])
            free[0].close()  # before allocation of the new slot: memory may not suffice for both
            self._slots[number] = None
        else:
            return None
        try:
            new = Slot(-(-size // PAGE) * PAGE)
        except OSError:
            return None
        if self.device is not None and self.device.type == "cuda":
            new.pin()
        self._slots[number] = new
        return new

    def _drop_retired(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot and slot.retired:
                slot.close()
                self._slots[number] = None

    def _write(self, parts: list[Any], descriptors: list[int]) -> None:
        ancillary: list[Any] = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        flags = getattr(socket, "MSG_NOSIGNAL", 0)
        while left:
            try:
                written = self._socket.sendmsg(left[:64], ancillary, flags)
            except BlockingIOError:
                raise ConnectionError("The other end has stopped reading.") from None
            ancillary = []  # sent with the first byte
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def empty_strided(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised CPU tensor of `shape` and `stride`, in a free slot if possible.

        A later `send` does not copy it. The slot is in use while the tensor or a view of it exists.
        """
        last = sum((size - 1) * step for size, step in zip(shape, stride))
        nbytes = 0 if 0 in shape else (last + 1) * dtype.itemsize
        if nbytes > INLINE and self._memfd:
            with self._lock:
                slot = self._free_slot(nbytes)
                try:
                    if slot is not None:
                        slot.make_ready()
                        return make_tensor(slot.hold(nbytes), dtype, tuple(shape), tuple(stride))
                except OSError:  # out of memory
                    pass
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cpu")

    def trim(self) -> None:
        """Returns the memory of free slots to the system; the next value sent through a slot allocates it again."""
        with self._lock:
            self._drop_retired()
            for slot in self._slots:
                if slot and slot.free:
                    try:
                        slot.trim()
                    except OSError:  # an old kernel
                        return

    # Receiving

    def recv(self) -> Message:
        """Waits for the next message and returns it. Only one thread at a time may call this.

        Raises:
            EOFError: the other end or this end is closed, possibly in the middle of a message.
            ConnectionError: the received bytes are not a message. The channel is unusable afterwards.
        """
        if self._lost:
            raise EOFError("The connection is closed.")
        descriptors: list[int] = []
        try:
            header = self._read_header(descriptors)
            try:
                magic, count, envelope, stream, wire = _HEADER.unpack(header)
                if magic != _MAGIC:
                    raise ConnectionError("Its magic bytes are wrong.")
                content = self._read(envelope + stream)
                payload = self._read(wire)
                plain = _PlainUnpickler(io.BytesIO(content[:envelope].data)).load()
                kind, request, info, blocks, spans = plain
                value = self._take(content[envelope:], blocks, spans, payload, descriptors, count)
                return Message(kind, request, info, [value])
            except BaseException as error:
                self._hang_up()  # the remaining bytes would be misread as a message
                if isinstance(error, EOFError) or not isinstance(error, Exception):
                    raise
                raise ConnectionError(f"The received bytes are not a message: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _take(
        self,
        stream: np.ndarray,
        blocks: list[tuple[Any, ...]],
        spans: list[tuple[int, int, int]],
        payload: np.ndarray,
        descriptors: list[int],
        count: int,
    ) -> tuple[np.ndarray, list[np.ndarray]] | Exception:
        """Returns pickle and buffers of the value, or the error that prevented mapping them."""
        try:
            if len(descriptors) < count:  # the kernel drops descriptors beyond this process's limit
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            found = [self._block(block, payload, descriptors) for block in blocks]
        except ConnectionError:
            raise
        except OSError as error:
            return error
        buffers = []
        for block, start, size in spans:
            memory = found[block] if block >= 0 else np.empty(0, np.uint8)
            if not 0 <= start <= start + size <= len(memory):
                raise ConnectionError("The buffer is outside its block.")
            buffers.append(memory[start : start + size])
        return stream, buffers

    def _block(self, block: tuple[Any, ...], payload: np.ndarray, descriptors: list[int]) -> np.ndarray:
        match block:
            case ("wire", size):
                if size != len(payload):
                    raise ConnectionError("The size of a block differs from the size stated in the message.")
                return payload
            case ("file", nth, size):
                return Map(descriptors[nth], size, private=True).array(0, size)
            case ("slot", number, generation, nth, size):
                if nth is not None:
                    if (old := self._theirs.pop(number, None)) is not None:
                        old.keep()
                    self._theirs[number] = Received(descriptors[nth], size)
                elif number not in self._theirs:
                    raise OSError(errno.ENOMEM, "The slot could not be mapped when it was received.")
                return self._theirs[number].take(generation)
        raise ConnectionError("The message contains a block of unknown kind.")

    def _read_header(self, descriptors: list[int]) -> bytes:
        found = b""
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        while len(found) < _HEADER.size:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_HEADER.size - len(found), room, flags)
            except OSError as error:
                raise EOFError("The connection is closed.") from error
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
            if not data:
                raise EOFError("The connection is closed.")
            found += data
        return found

    def _read(self, size: int) -> np.ndarray:
        """Reads `size` bytes into a new array."""
        found = np.empty(size, np.uint8)
        left = found.data
        while len(left):
            try:
                count = self._socket.recv_into(left)
            except OSError as error:
                raise EOFError("The connection is closed.") from error
            if not count:
                raise EOFError("The connection is closed.")
            left = left[count:]
        return found

    # Closing

    def _hang_up(self) -> None:
        self._lost = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection; `recv` on both ends raises `EOFError`. Received values stay valid."""
        self._hang_up()  # first, since another thread may hold the lock while sending
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._socket.close()
            for slot in self._slots:
                if slot:
                    slot.close()
            self._slots.clear()
            self._keep_what_is_theirs()
            self._theirs.clear()

    # Forks

    def before_fork(self) -> None:
        """Retires slots in use, since the child may share their contents."""
        for slot in list(self._slots):
            if slot:
                slot.retire_if_held()
        self._keep_what_is_theirs()

    def _keep_what_is_theirs(self) -> None:
        for slot in list(self._theirs.values()):
            if slot.keep():
                slot.retire()

    def after_fork_in_child(self) -> None:
        """Closes the child's copy of the connection, which would hide the parent's death from the other end."""
        self._lock = threading.Lock()  # a thread of the parent may hold the inherited lock
        self._lost = self._closed = True
        self._socket.close()
        for slot in self._slots:
            if slot:
                slot.close_file()
        self._slots.clear()
        for theirs in self._theirs.values():
            theirs.keep()  # received during the fork; the parent notifies the sender
        self._theirs.clear()


def aligned(size: int) -> int:
    """Rounds `size` up to the alignment of buffers."""
    return -(-size // _ALIGN) * _ALIGN


def _packed_size(sizes: Any) -> int:
    return sum(map(aligned, sizes))


def _write_at(descriptor: int, data: np.ndarray, start: int) -> None:
    left = data.data
    while len(left):
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written
