"""Workers import the pipelines of these tests, so their folder is on the path."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def _what_torch_keeps():
    """A pipe, from the first store to the end of the process."""
    TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def nothing_left(request, _what_torch_keeps):
    """No process, socket, pipe or shared memory outlives a test that uses executors of its own."""
    with contextlib.nullcontext() if "shared_executor" in request.fixturenames else _leaving_nothing():
        yield


@pytest.fixture(scope="module")
def nothing_left_by_shared(_what_torch_keeps):
    """Nor one that tests share."""
    with _leaving_nothing():
        yield


@pytest.fixture(scope="module")
def chosen(request):
    """The words that the selected tests of a module are parametrised with: processes need not run other cases."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return {value for item in items for value in item.callspec.params.values() if isinstance(value, str)}


@contextlib.contextmanager
def _leaving_nothing():
    descriptors, processes = _descriptors(), set(psutil.Process().children(recursive=True))
    yield
    gc.collect()
    children = set(psutil.Process().children(recursive=True)) - processes
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"left: {[child.cmdline() for child in alive]}"
    end = time.monotonic() + 5  # an executor that nobody waits for closes them in a thread
    while not _descriptors() <= descriptors and time.monotonic() < end:
        time.sleep(0.05)
    assert _descriptors() <= descriptors


def _descriptors() -> set[str]:
    """The open ends of this process that another one could be behind."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if target.startswith(("socket:", "pipe:", "/memfd:", "anon_inode:[pidfd]")):
                found.add(target)
    return found
