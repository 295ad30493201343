"""Memory that two processes share: files without a name, mapped by both, and slots that are used again and again."""

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

PAGE = mmap.PAGESIZE  # bytes before a slot's data; the first word says which generation the receiver has released
RETIRED = 2**64 - 1  # in that word: the receiver will never release the slot
_FAILED = ctypes.c_void_p(-1).value  # what mmap and mremap return then
_MOVE_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED: in one step, others never see a gap


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
    """The address of so many bytes of a file."""
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, start)
    if address in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)


class Map:
    """`size` bytes of a file, mapped for as long as this or an array over them is there.

    Not `mmap.mmap`, which (before Python 3.13 always) keeps a descriptor open: a user may keep thousands of results.

    Args:
        descriptor: of the file.
        size: bytes.
        private: what is written stays in this process.
    """

    def __init__(self, descriptor: int, size: int, *, private: bool = False) -> None:
        if os.fstat(descriptor).st_size < size:  # touching what lies behind the end would kill the process
            raise ConnectionError("A file is smaller than the message says.")
        self.address, self.size = _mapped(descriptor, 0, size, private), size
        weakref.finalize(self, _libc().munmap, self.address, size).atexit = False

    def make_private(self, descriptor: int, start: int) -> None:
        """What is written from byte `start` on, a multiple of the page size, stays in this process from now on.

        Once only: a second time would undo what was written. Where the system has no room for it, nothing happens.
        """
        size = self.size - start
        try:
            new = _mapped(descriptor, start, size, private=True)
        except OSError:
            return
        if _libc().mremap(new, size, size, _MOVE_TO, self.address + start) == _FAILED:
            _libc().munmap(new, size)

    def array(self, start: int, size: int) -> np.ndarray:
        """A new uint8 array `(size,)`, which is the `.base` of every array and tensor made of it."""
        return np.asarray(_Region(self, start, size))

    def give_back(self, start: int) -> None:
        """Frees the memory from byte `start` on, a multiple of the page size; it reads as zeros then."""
        if _libc().madvise(self.address + start, self.size - start, mmap.MADV_REMOVE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


class _Region:
    """Numpy ends the chain of `.base` here, as this is no array. One view more and a lease would end too early."""

    def __init__(self, mapping: Map, start: int, size: int) -> None:
        if not 0 <= start <= start + size <= mapping.size:
            raise ConnectionError("A buffer lies outside its file.")
        self._mapping = mapping
        self.__array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (mapping.address + start, False),
        }


def new_file() -> int:
    """A file in memory without a name; `OSError` where that cannot be had."""
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.memfd_create("wan-patches", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(descriptor: int) -> None:
    """Nobody shrinks it any more: the other end would be killed at the next look."""
    import fcntl  # not on every system that may import this module

    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


class Slot:
    """A file that is used for one message after another: a page with a word in it, then `capacity` bytes.

    The receiver writes the generation that it has released into that word, which needs neither a lock nor a call
    and so may happen in a garbage collection. The slot is free when that is the last one sent and no tensor of
    the sender's own lies in it. It is retired, and never free again, when a forked child of either may have
    what lies in it.
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
        # once, be it in a child forked in the middle of it: the number may be another file's by then
        self.close_file = weakref.finalize(self, os.close, self.descriptor)
        self.close_file.atexit = False
        self.data = self.mapping.array(PAGE, capacity)
        self._released = self.mapping.array(0, 8).view(np.uint64)
        self.generation = 0
        self.holds: set[object] = set()  # one for each tensor of the sender's own
        self.sent = False
        self.pinned = False
        self._retired = False
        self._trimmed = False

    def _allocate(self) -> None:
        os.posix_fallocate(self.descriptor, 0, PAGE + self.capacity)  # no memory is an error now, a signal later

    @property
    def leased(self) -> bool:
        """Whether the receiver still has what it was sent last."""
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
        """Before it is written to."""
        if self._trimmed:
            self._allocate()
            self._trimmed = False

    def trim(self) -> None:
        if not self.pinned and not self._trimmed:
            self._trimmed = True
            self.mapping.give_back(PAGE)

    def hold(self, size: int) -> np.ndarray:
        """Its first bytes, for the sender; not free again before the array (and all made of it) is gone."""
        found, token = self.mapping.array(PAGE, size), object()
        self.holds.add(token)
        weakref.finalize(found, self._let_go, token).atexit = False
        return found

    def _let_go(self, token: object) -> None:
        if forks.under_way():
            self._retired = True
        self.holds.discard(token)

    def position(self, data: np.ndarray) -> int | None:
        """Where in the slot the bytes lie, if they do."""
        position = data.ctypes.data - self.data.ctypes.data
        return position if 0 <= position <= self.capacity - data.nbytes else None

    def pin(self) -> None:
        """Lets a GPU write to it directly; without that it is slower. Not run on hardware."""
        self.pinned = self._cuda("cudaHostRegister", self.mapping.size, 1)

    def close(self) -> None:
        """Lets go of it; the memory stays for as long as somebody has something in it."""
        if self.pinned:
            self._cuda("cudaHostUnregister")
            self.pinned = False
        if self.free:  # the other end has it mapped until it hears of another
            with contextlib.suppress(OSError):
                self.trim()
        self.close_file()

    def _cuda(self, function: str, *arguments: int) -> bool:
        try:
            return int(getattr(torch.cuda.cudart(), function)(self.mapping.address, *arguments)) == 0
        except Exception:
            return False


class Received:
    """A slot of the other end's, as the receiver has it: what was sent in it last can be taken."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._mapping = Map(descriptor, size)
        self._word = self._mapping.array(0, 8).view(np.uint64)
        self._descriptor = os.dup(descriptor)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._close.atexit = False
        self._lease: Any = None

    def take(self, generation: int) -> np.ndarray:
        """All bytes of the slot, which is the sender's again when the array and all made of it is gone."""
        found = self._mapping.array(PAGE, self._mapping.size - PAGE)
        self._lease = weakref.finalize(found, _release, os.getpid(), self._word, generation)
        self._lease.atexit = False
        return found

    def keep(self) -> bool:
        """Makes what was taken this process's own, never to be released; False if nobody has it any more."""
        if self._lease is None or self._lease.detach() is None:  # to one caller only, be it in several threads
            return False
        self._mapping.make_private(self._descriptor, PAGE)
        return True

    def retire(self) -> None:
        """Lets go of the slot after `keep`, and tells the sender, which from now on may send another in its place."""
        word = self._word
        del self._mapping, self._word
        self._close()
        word[0] = RETIRED


def _release(process: int, word: np.ndarray, generation: int) -> None:
    if os.getpid() == process:  # a forked child has the same arrays, but they are not its to give back
        word[0] = RETIRED if forks.under_way() else generation
