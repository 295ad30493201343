"""Shared memory of two processes: anonymous files mapped by both, and reusable slots."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch

from wan_patches.executor import forks

PAGE = mmap.PAGESIZE  # bytes before a slot's data; its first word is the last generation that the receiver released
RETIRED = 2**64 - 1  # value of that word if the receiver will never release the slot
_FAILED = ctypes.c_void_p(-1).value  # error result of mmap and mremap
_MOVE_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED; atomic, so other threads never see a gap


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = (pointer, size, number, number, number, ctypes.c_long), pointer
    libc.munmap.argtypes = (pointer, size)
    libc.mremap.argtypes, libc.mremap.restype = (pointer, size, size, number, pointer), pointer
    libc.madvise.argtypes = (pointer, size, number)
    return libc


def _mapped(descriptor: int, start: int, size: int, private: bool) -> int:
    """Maps `size` bytes of a file and returns their address."""
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, start)
    if address in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)


class Map:
    """A mapping of `size` bytes of a file that exists as long as this object or an array over it.

    Not `mmap.mmap`, which keeps a descriptor open (before Python 3.13 always): users may keep thousands of results.

    Args:
        descriptor: file descriptor.
        size: size in bytes.
        private: writes are visible only in this process.
    """

    def __init__(self, descriptor: int, size: int, *, private: bool = False) -> None:
        if os.fstat(descriptor).st_size < size:  # access beyond the end would kill the process
            raise ConnectionError("The file is smaller than stated in the message.")
        self.address, self.size = _mapped(descriptor, 0, size, private), size
        weakref.finalize(self, _libc().munmap, self.address, size).atexit = False

    def make_private(self, descriptor: int, start: int) -> None:
        """Makes writes from byte `start` on, a multiple of the page size, visible only in this process.

        Call only once: a second call would undo the writes. Has no effect if the system is out of memory.
        """
        size = self.size - start
        try:
            new = _mapped(descriptor, start, size, private=True)
        except OSError:
            return
        if _libc().mremap(new, size, size, _MOVE_TO, self.address + start) == _FAILED:
            _libc().munmap(new, size)

    def array(self, start: int, size: int) -> np.ndarray:
        """Returns a new uint8 array `(size,)`, the `.base` of every array and tensor derived from it."""
        return np.asarray(_Region(self, start, size))

    def give_back(self, start: int) -> None:
        """Frees the memory from byte `start` on, a multiple of the page size; it then reads as zeros."""
        if _libc().madvise(self.address + start, self.size - start, mmap.MADV_REMOVE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


class _Region:
    """Ends numpy's chain of `.base`, as this is not an array. A `.base` beyond it would let a lease end too early."""

    def __init__(self, mapping: Map, start: int, size: int) -> None:
        if not 0 <= start <= start + size <= mapping.size:
            raise ConnectionError("The buffer is outside its file.")
        self._mapping = mapping
        self.__array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (mapping.address + start, False),
        }


def new_file() -> int:
    """Creates an anonymous file in memory and returns its descriptor. Raises `OSError` if that is not possible."""
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.memfd_create("wan-patches", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(descriptor: int) -> None:
    """Prevents changes of the file's size: access beyond its end would kill the other process."""
    import fcntl  # not available on every system that may import this module

    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


class Slot:
    """A file reused for successive messages: a page that starts with a word, then `capacity` bytes.

    The receiver writes the generation that it has released into that word. This takes neither a lock nor a call, so it
    may happen during garbage collection. The slot is free once that is the last generation sent and no tensor of the
    sender uses it. It is retired, and never free again, if a forked child of either process may use its contents.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.descriptor = new_file()
        try:
            self._allocate()
            seal(self.descriptor)
            self.mapping = Map(self.descriptor, PAGE + capacity)
        except BaseException:
            os.close(self.descriptor)
            raise
        # at most once, even in a child forked during the call: the descriptor may be reused by then
        self.close_file = weakref.finalize(self, os.close, self.descriptor)
        self.close_file.atexit = False
        self.data = self.mapping.array(PAGE, capacity)
        self._released = self.mapping.array(0, 8).view(np.uint64)
        self.generation = 0
        self.holds: set[object] = set()  # one token per tensor of the sender
        self.sent = False
        self.pinned = False
        self._retired = False
        self._trimmed = False

    def _allocate(self) -> None:
        os.posix_fallocate(self.descriptor, 0, PAGE + self.capacity)  # out of memory: error now, not signal later

    @property
    def leased(self) -> bool:
        """Whether the receiver still uses the last message."""
        return int(self._released[0]) != self.generation

    @property
    def retired(self) -> bool:
        return self._retired or int(self._released[0]) == RETIRED

    @property
    def free(self) -> bool:
        return not self.leased and not self.holds and not self._retired

    def retire_if_held(self) -> None:
        if self.holds:
            self._retired = True

    def make_ready(self) -> None:
        """Allocates trimmed memory again. Call before writing."""
        if self._trimmed:
            self._allocate()
            self._trimmed = False

    def trim(self) -> None:
        if not self.pinned and not self._trimmed:
            self._trimmed = True
            self.mapping.give_back(PAGE)

    def hold(self, size: int) -> np.ndarray:
        """Returns the first `size` bytes to the sender; the slot is not free while the array or a view of it exists."""
        found, token = self.mapping.array(PAGE, size), object()
        self.holds.add(token)
        weakref.finalize(found, self._let_go, token).atexit = False
        return found

    def _let_go(self, token: object) -> None:
        if forks.under_way():
            self._retired = True
        self.holds.discard(token)

    def position(self, data: np.ndarray) -> int | None:
        """Returns the offset of `data` in the slot, or None if it is elsewhere."""
        position = data.ctypes.data - self.data.ctypes.data
        return position if 0 <= position <= self.capacity - data.nbytes else None

    def pin(self) -> None:
        """Registers the memory with CUDA for direct, faster writes by a GPU. Not tested on hardware."""
        self.pinned = self._cuda("cudaHostRegister", self.mapping.size, 1)

    def close(self) -> None:
        """Releases the slot; its memory remains while either process uses its contents."""
        if self.pinned:
            self._cuda("cudaHostUnregister")
            self.pinned = False
        if self.free:  # the receiver keeps its mapping until another slot replaces this one
            with contextlib.suppress(OSError):
                self.trim()
        self.close_file()

    def _cuda(self, function: str, *arguments: int) -> bool:
        try:
            return int(getattr(torch.cuda.cudart(), function)(self.mapping.address, *arguments)) == 0
        except Exception:
            return False


class Received:
    """The receiver's view of a slot of the other process."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._mapping = Map(descriptor, size)
        self._word = self._mapping.array(0, 8).view(np.uint64)
        self._descriptor = os.dup(descriptor)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._close.atexit = False
        self._lease: Any = None

    def take(self, generation: int) -> np.ndarray:
        """Returns all bytes of the slot, which is released to the sender when the array and its views are gone."""
        found = self._mapping.array(PAGE, self._mapping.size - PAGE)
        self._lease = weakref.finalize(found, _release, os.getpid(), self._word, generation)
        self._lease.atexit = False
        return found

    def keep(self) -> bool:
        """Makes the taken bytes private to this process and never releases them. Returns False if unused."""
        if self._lease is None or self._lease.detach() is None:  # succeeds for one thread only
            return False
        self._mapping.make_private(self._descriptor, PAGE)
        return True

    def retire(self) -> None:
        """Unmaps the slot after `keep` and marks it as retired, so that the sender may replace it."""
        word = self._word
        del self._mapping, self._word
        self._close()
        word[0] = RETIRED


def _release(process: int, word: np.ndarray, generation: int) -> None:
    if os.getpid() == process:  # a forked child inherits the arrays but must not release them
        word[0] = RETIRED if forks.under_way() else generation
