"""Values between two processes: a socket for what is small, memory that both have mapped for what is large.

Where a new segment is mapped for every result, page faults cost several times the copy. A channel keeps its
*slots*: files in memory (memfd), mapped once on both ends and used again when the receiver has dropped what it
got. What the receiver gets lies in the slot; nothing is copied a second time. With every slot taken, a file of
its own carries the value; where there are no such files, the socket does. The socket works wherever the channel
does, so nothing comes after it.

On the wire a message is a header (lengths), an envelope (plain data: what it is, where its buffers lie), a
pickle, and bytes that came without a file. Files have no names, so nothing is left when processes die. Only
what came through the socket is ever unpickled.
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

INLINE = 96 << 10  # bytes of payload up to which the socket is faster than a slot
LARGEST_SLOT = 4 << 30  # bytes; larger values get files of their own, whose memory goes back at once
_ALIGN = 64  # bytes: a cache line, and more than any dtype asks for
_MAGIC = b"wpm1"
_HEADER = struct.Struct("<4sIQQQ")  # magic, descriptors, bytes of envelope, of pickle, of payload on the wire
_MAX_DESCRIPTORS = 64


# Messages


@dataclass(frozen=True)
class Message:
    """What the other end sent: `kind`, `request` and `info` as given to `send`; the value by `load`."""

    kind: str
    request: int
    info: Any
    _value: list[tuple[np.ndarray, list[np.ndarray]] | Exception] = field(
        default_factory=list, repr=False, compare=False
    )

    def load(self) -> Any:
        """Unpickles the value, None if there was none. Once: the second value would be made of the same memory.

        Raises:
            Exception: what unpickling raises; `OSError` if this end had no memory or descriptors left for it.
                The channel goes on.
            RuntimeError: it has been loaded before.
        """
        try:
            found = self._value.pop()
        except IndexError:
            raise RuntimeError("A message is loaded once.") from None
        if isinstance(found, Exception):
            raise found
        stream, buffers = found
        return pickle.loads(stream.data, buffers=buffers) if len(stream) else None


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        raise TypeError(f"Only plain data goes beside a value, not {type(value).__name__}.")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError("Only plain data may be here.")


class _Layout:
    """Where the buffers of a message lie: `blocks` of memory, and `(block, start, bytes)` for every buffer.

    A block is `("slot", index, generation, nth descriptor or None, bytes of the file)`, `("file", nth descriptor,
    bytes)` or `("wire", bytes)`.
    """

    def __init__(self, count: int) -> None:
        self.blocks: list[tuple[Any, ...]] = []
        self.spans: list[tuple[int, int, int]] = [(-1, 0, 0)] * count  # -1: nothing in it
        self.descriptors: list[int] = []
        self.wire: list[Any] = []
        self.leased: list[Slot] = []
        self.own_files: list[int] = []

    def add_descriptor(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1

    def close(self) -> None:
        """Ours no longer: the other end has descriptors of its own."""
        while self.own_files:
            os.close(self.own_files.pop())


class Channel:
    """One end of a connection between two processes, the same on both.

    Args:
        sock: A connected stream socket of family `AF_UNIX`, the channel's own from now on.
        slots: How many slots this end sends through, at most. Their memory stays until `trim` or `close`.
        memfd: False sends everything through the socket, as on a system without memfd.
        send_timeout: Seconds that the other end may read nothing of what is sent before the connection is given up;
            None: any time.
        device: Of the tensors that will be sent. For a CUDA device slots are registered with the driver, so that
            it writes to them directly, and NPU tensors go through pinned memory; neither has been run on hardware.

    Any thread may send, one receives. What was received stays valid when the channel is closed and when the
    other process dies. A forked child has what its parent had received, and each writes to its own, as with any
    memory; the channel is closed in the child. Forks by C code that does not call Python's hooks are not seen: such a
    child sees what is written later, be it by the next message.
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
        self.device = device  # may be set later, before anything is sent
        self._lock = threading.Lock()
        self._slots: list[Slot | None] = []  # None: could not be made
        self._theirs: dict[int, Received] = {}
        self._lost = False  # the connection, though there may be bytes of it to read
        self._closed = False
        forks.watch(self)

    @staticmethod
    def pair(**options: Any) -> tuple[Channel, socket.socket]:
        """This process's end, and the socket of the other's, which a child inherits (`pass_fds`) and then closes here.

        Args:
            options: As for `Channel`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Channel(ours, **options), theirs

    # Sending

    def send(self, kind: str, request: int = 0, info: Any = None, value: Packed | None = None) -> None:
        """Sends a message; returns when the bytes are where the other end finds them, whether it looks or not.

        Args:
            kind: What the message is, in the language of the two ends.
            request: The number of what it belongs to.
            info: Plain data (None, numbers, strings, bytes, and containers of them), small.
            value: By `pack`. What of it lies in memory from `empty_strided` is not copied: from now on it belongs
                to the other end, which may write to it.

        Raises:
            ConnectionError: The other end is gone or reads no more, or this one closed.
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
                # from here on it is taken, as part of it may have arrived
                for slot in layout.leased:
                    slot.generation += 1
                    slot.sent = True
                try:
                    self._write([header, envelope.getbuffer(), stream, *layout.wire], layout.descriptors)
                except BaseException:
                    self._hang_up()  # half a message, and the other end would take the next for the rest of it
                    raise
            finally:
                layout.close()

    def _place(self, payloads: Sequence[Payload], layout: _Layout) -> None:
        """Copies the payloads to where the other end can see them."""
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
        """Finds those that lie in a slot already; returns which do not."""
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
                    continue  # two views of the same memory arrive as two tensors
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
        except OSError:  # no memory
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
        """A file for this message alone. Written, not mapped: the pages of a new map cost more than the copy."""
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
        except OSError:  # no memory
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
        """The smallest free slot that is large enough, or a new one, in place of a smaller if there must be."""
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
            free[0].close()  # before the new one is there: memory for both may be more than there is
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
                raise ConnectionError("The other end reads no more.") from None
            ancillary = []  # they have gone with the first byte
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def empty_strided(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` and `stride` on the CPU, its values whatever is there, in a free slot if there is one.

        Sent by a later `send`, it is not copied. The slot is taken while the tensor or a view of it is there.
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
                except OSError:  # no memory
                    pass
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cpu")

    def trim(self) -> None:
        """Gives the memory of free slots back to the system. The next value that goes through one takes it again."""
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
        """Waits for the next message, which one thread at a time may do.

        Raises:
            EOFError: The other end is gone, or this one closed, be it in the middle of a message.
            ConnectionError: What came is no message. The channel is of no use any more.
        """
        if self._lost:
            raise EOFError("The other end is gone.")
        descriptors: list[int] = []
        try:
            header = self._read_header(descriptors)
            try:
                magic, count, envelope, stream, wire = _HEADER.unpack(header)
                if magic != _MAGIC:
                    raise ConnectionError("Its first bytes are wrong.")
                content = self._read(envelope + stream)
                payload = self._read(wire)
                plain = _PlainUnpickler(io.BytesIO(content[:envelope].data)).load()
                kind, request, info, blocks, spans = plain
                value = self._take(content[envelope:], blocks, spans, payload, descriptors, count)
                return Message(kind, request, info, [value])
            except BaseException as error:
                self._hang_up()  # the rest of it would be taken for a message
                if isinstance(error, EOFError) or not isinstance(error, Exception):
                    raise
                raise ConnectionError(f"What came is no message: {error}") from error
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
        """The value with its buffers in place, or why they cannot be had."""
        try:
            if len(descriptors) < count:  # the kernel drops those for which this process has no room
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
                raise ConnectionError("A buffer lies outside its block.")
            buffers.append(memory[start : start + size])
        return stream, buffers

    def _block(self, block: tuple[Any, ...], payload: np.ndarray, descriptors: list[int]) -> np.ndarray:
        match block:
            case ("wire", size):
                if size != len(payload):
                    raise ConnectionError("A block has another size than the message says.")
                return payload
            case ("file", nth, size):
                return Map(descriptors[nth], size, private=True).array(0, size)
            case ("slot", number, generation, nth, size):
                if nth is not None:
                    if (old := self._theirs.pop(number, None)) is not None:
                        old.keep()
                    self._theirs[number] = Received(descriptors[nth], size)
                elif number not in self._theirs:
                    raise OSError(errno.ENOMEM, "The slot could not be mapped when it came.")
                return self._theirs[number].take(generation)
        raise ConnectionError("A message has a block of an unknown kind.")

    def _read_header(self, descriptors: list[int]) -> bytes:
        found = b""
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        while len(found) < _HEADER.size:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_HEADER.size - len(found), room, flags)
            except OSError as error:
                raise EOFError("The other end is gone.") from error
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
            if not data:
                raise EOFError("The other end is gone.")
            found += data
        return found

    def _read(self, size: int) -> np.ndarray:
        """So many bytes in an array of their own."""
        found = np.empty(size, np.uint8)
        left = found.data
        while len(left):
            try:
                count = self._socket.recv_into(left)
            except OSError as error:
                raise EOFError("The other end is gone.") from error
            if not count:
                raise EOFError("The other end is gone.")
            left = left[count:]
        return found

    # The end

    def _hang_up(self) -> None:
        self._lost = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection; `recv` on both ends raises `EOFError`. What was received stays valid."""
        self._hang_up()  # first, as another thread may be sending with the lock
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
        """What lies in slots now may get a second holder: the slots are not used again."""
        for slot in list(self._slots):
            if slot:
                slot.retire_if_held()
        self._keep_what_is_theirs()

    def _keep_what_is_theirs(self) -> None:
        for slot in list(self._theirs.values()):
            if slot.keep():
                slot.retire()

    def after_fork_in_child(self) -> None:
        """The connection is the parent's alone; open here too, it would hide the parent's death from the other end."""
        self._lock = threading.Lock()  # a thread of the parent's may hold the other
        self._lost = self._closed = True
        self._socket.close()
        for slot in self._slots:
            if slot:
                slot.close_file()
        self._slots.clear()
        for theirs in self._theirs.values():
            theirs.keep()  # came while the fork was under way; the parent tells the sender
        self._theirs.clear()


def aligned(size: int) -> int:
    """Where the next buffer may start after one of `size` bytes."""
    return -(-size // _ALIGN) * _ALIGN


def _packed_size(sizes: Any) -> int:
    return sum(map(aligned, sizes))


def _write_at(descriptor: int, data: np.ndarray, start: int) -> None:
    left = data.data
    while len(left):
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written
