"""Pipelines that workers of tests build: some do what they are told, some are diffusers' own with small weights."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BIG = 1 << 20  # elements of a result that does not travel inline


@dataclass
class Output:
    """Like an output class of diffusers."""

    frames: Any
    pid: int


class CustomError(ValueError):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code

    def __reduce__(self):
        return type(self), (self.code, str(self).rpartition(" (")[0])


class Unportable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __reduce__(self):
        raise RuntimeError("no way")


class Unloadable:
    """Pickles here, does not load there."""

    def __reduce__(self):
        return _refuse, (os.getpid(),)


def _refuse(pid: int) -> None:
    if pid != os.getpid():
        raise ImportError("this does not load in another process")


class Fake:
    """Does `do` in `steps` steps of `seconds / steps` each."""

    def __init__(self) -> None:
        self.calls = 0

    def progress_bar(self, iterable=None, total=None):
        raise AssertionError("the executor gives pipelines its own")

    def __call__(self, do: str = "echo", value: Any = None, steps: int = 0, seconds: float = 0.0, **more: Any) -> Any:
        self.calls += 1
        with self.progress_bar(total=steps) as bar:
            for _ in range(steps):
                time.sleep(seconds / steps)
                bar.update()
        return getattr(self, do)(value, **more)

    def echo(self, value: Any) -> Any:
        return value

    def pid(self, _: Any) -> int:
        return os.getpid()

    def count(self, _: Any) -> int:
        return self.calls

    def noise(self, generator: torch.Generator | None) -> torch.Tensor:
        return torch.randn(4, generator=generator)

    def big(self, value: int) -> Output:
        return Output(torch.full((BIG,), value, dtype=torch.int32), os.getpid())

    def fail(self, value: str) -> None:
        raise CustomError(7, value)

    def fail_oddly(self, _: Any) -> None:
        raise Unportable(1, 2)

    def unpicklable(self, _: Any) -> Any:
        return threading.Lock()

    def unloadable(self, _: Any) -> Any:
        return Unloadable()

    def say(self, value: str) -> None:
        print(value)

    def kill(self, signal_number: int) -> None:
        print("about to go")
        sys.stdout.flush()
        os.kill(os.getpid(), signal_number)
        time.sleep(60)

    def kill_once(self, path: str) -> str:
        if not os.path.exists(path):
            with open(path, "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        return "second time"

    def leave(self, value: int) -> None:
        os._exit(value)

    def hang(self, seconds: float) -> str:
        time.sleep(seconds)
        return "woke up"

    def stop(self, _: Any) -> str:
        _stop()
        return "went on"

    def stop_once(self, path: str) -> str:
        if not os.path.exists(path):
            with open(path, "w"):
                _stop()
        return "second time"

    def hold_the_lock(self, seconds: int) -> str:
        """Python's own, in C."""
        ctypes.PyDLL(None).sleep(seconds)
        return "went on"

    def change_the_process(self, folder: str) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(7)
        torch.use_deterministic_algorithms(True)
        os.chdir(folder)
        os.environ["LEFT_BEHIND"] = "yes"
        del os.environ["PATH"]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def process(self, _: Any) -> Any:
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            os.getcwd(),
            dict(os.environ),
            signal.getsignal(signal.SIGTERM),
        )

    def flags(self, _: Any) -> Any:
        return sys.path, sys.flags.optimize, sys.warnoptions, sys.executable

    def node(self, _: Any) -> str:
        """Of Ray's, by its id."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def bytes_(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.uint8)

    def command(self, _: Any) -> list[str]:
        return Path("/proc/self/cmdline").read_bytes().decode().split("\0")

    def fail_unspeakably(self, _: Any) -> None:
        raise Unspeakable

    def chatter(self, count: int) -> int:
        """Writes so many bytes without an end of line."""
        for _ in range(count >> 20):
            sys.stdout.write("x" * (1 << 20))
        sys.stdout.flush()
        return count

    def no_memory(self, _: Any) -> None:
        raise MemoryError

    def no_space(self, _: Any) -> None:
        """A disk that is full."""
        Path("/dev/full").write_text("x")

    def take_memory(self, _: Any) -> None:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, before[1]))
        try:
            torch.ones(64 << 30, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def patches(self, _: Any) -> list[str]:
        import wan_patches

        return sorted({report.name for report in wan_patches.status().reports if report.state != "off"})

    def environment(self, name: str) -> Any:
        return os.environ.get(name), torch.get_num_threads()

    def fork_and_kill(self, path: str) -> None:
        """A child that holds this process's end of the socket, and outlives it; its id stands in that file."""
        if (child := os.fork()) == 0:
            time.sleep(20)
            os._exit(0)
        Path(path).write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    """Stops this process at once: a signal to the process waits for another thread, and this one would go on."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def fake() -> Fake:
    return Fake()


def broken() -> Any:
    raise CustomError(3, "no such weights")


def kills_itself() -> Any:
    print("loading")
    os.kill(os.getpid(), signal.SIGKILL)


def not_a_pipeline() -> int:
    return 3


def slow_to_load(seconds: float) -> Fake:
    time.sleep(seconds)
    return Fake()


def family(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A pipeline of the real architecture with small seeded weights."""
    from wan_patches.testing.families import FAMILIES

    return FAMILIES[name].build(dtype=dtype, **options)


def without_memfd() -> Fake:
    del os.memfd_create
    return Fake()


def while_there(path: str) -> Fake:
    """Loads while the file is there."""
    if not os.path.exists(path):
        raise CustomError(4, "the weights are gone")
    return Fake()


def stops_later(first: str, second: str) -> Fake:
    """The second process that loads it stops."""
    for path in (first, second):
        if not os.path.exists(path):
            with open(path, "w"):
                if path == second:
                    os.kill(os.getpid(), signal.SIGSTOP)
                break
    return Fake()


def unreliable(folder: str) -> Fake:
    """Hangs or fails to load while a file of that name is in the folder."""
    if os.path.exists(f"{folder}/hang"):
        time.sleep(60)
    if os.path.exists(f"{folder}/fail"):
        raise MemoryError
    return Fake()


def slow_to_load_again(path: str, seconds: float) -> Fake:
    if os.path.exists(path):
        time.sleep(seconds)
    with open(path, "w"):
        return Fake()


def fails_in_one_rank(path: str) -> Any:
    """Rank 1 fails while the file is there, and rank 0 waits for it in a collective."""
    pipe = family("wan_t2v")
    forward = pipe.transformer.blocks[0].forward

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if torch.distributed.get_rank() == 1 and os.path.exists(path):
            raise CustomError(5, "out of luck")
        return forward(*arguments, **keywords)

    pipe.transformer.blocks[0].forward = failing
    return pipe


def dies_in_mid_stream(path: str) -> Any:
    """Its process is killed after the second latent frame that is decoded, unless the file is there."""
    pipe, decoded = family("wan_t2v"), []

    def hook(*_: Any) -> None:
        decoded.append(1)
        if len(decoded) == 3 and not os.path.exists(path):
            with open(path, "w"):
                os.kill(os.getpid(), signal.SIGKILL)

    pipe.vae.decoder.register_forward_pre_hook(hook)
    return pipe
