"""`ParallelExecutor`: runs a diffusers pipeline on several devices, as a `concurrent.futures.Executor`."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import torch

from wan_patches.executor import main_module
from wan_patches.executor.bounds import DEFAULT, Bounds, Default, check_count, check_seconds
from wan_patches.executor.groups import Group, InlineGroup, Log, WorkerGroup
from wan_patches.executor.health import Health
from wan_patches.executor.layouts import Layout, Parallel, device_named, resolve
from wan_patches.executor.processes import Launcher
from wan_patches.executor.progress import Bars
from wan_patches.executor.rank import chosen_patches
from wan_patches.executor.requests import Progress, Request
from wan_patches.executor.scheduler import Scheduler
from wan_patches.executor.session import Pretrained, Session
from wan_patches.executor.transport import Packed, pack
from wan_patches.pipelines.streaming import Chunk

if TYPE_CHECKING:
    from typing_extensions import Self


class PipelineExecutor(Executor):
    """The base of all executors of pipelines: takes requests and gives futures of their results."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        retries: int,
        timeout: float | None,
        queue_timeout: float | None,
        cancel_grace: float | None,
        bounds: Bounds,
        progress: bool | Callable[[Request, Progress], None],
        script: bool = False,
    ) -> None:
        """Starts the groups and waits until each has its pipeline; the rest as in `ParallelExecutor`.

        script: workers have imported the script, and find what is defined in it.
        """
        self._timeout, self._queue_timeout, self._retries = timeout, queue_timeout, retries
        self._on_progress = _progress(progress)
        self._ids = itertools.count(1)
        self._remote, self._script = groups[0].remote, script
        self._scheduler = Scheduler(groups, bounds, cancel_grace)
        self._scheduler.start()
        # threads hold the scheduler and not this object, so that it can go out of scope like any executor
        weakref.finalize(self, self._scheduler.close).atexit = False

    @classmethod
    def from_pretrained(cls, model: str, *, pipeline_class: type | None = None, **options: Any) -> Self:
        """Makes an executor of a pipeline from the Hub or a folder; works in notebooks and without `__main__` guard.

        Args:
            model: as for `DiffusionPipeline.from_pretrained`.
            pipeline_class: by default the one that the model names.
            options: those of the executor; all others go to `from_pretrained`, such as `torch_dtype`.
        """
        known = inspect.signature(cls).parameters
        own = {name: options.pop(name) for name in list(options) if name in known}
        factory: Any = Pretrained(str(model), pipeline_class, options)  # the first argument of every subclass
        return cls(factory, **own)

    def submit(  # type: ignore[override]
        self,
        *arguments: Any,
        timeout: float | Default | None = DEFAULT,
        queue_timeout: float | Default | None = DEFAULT,
        on_progress: Callable[[Request, Progress], None] | None = None,
        on_frames: Callable[[Request, Chunk], object] | None = None,
        **keywords: Any,
    ) -> Request:
        """Queues a call of the pipeline with these arguments and returns at once.

        Workers get the arguments as they are now, with the state that generators have; only the contents of
        tensors, arrays and images must not change before the request runs. Inline, the pipeline gets the very
        objects, as if it were called, and draws from the very generator.

        Args:
            arguments, keywords: what the pipeline takes, as if it were called.
            timeout, queue_timeout, on_progress: for this request, instead of the executor's; a timeout of None is
                none.
            on_frames: called with the request and each `Chunk` of frames, in order, while the autoencoder goes on, as
                `wan_patches.stream_frames` does it; the frames are not in the result then, whose `frames` are None. In
                the thread that takes the worker's messages: chunks wait in memory while it is at an earlier one. What
                it raises is logged. After a retry they begin again, with a chunk whose `start` is 0.

        Returns:
            A `concurrent.futures.Future` of what the pipeline returns. It ends with the pipeline's exception,
            `TimeoutError`, `WorkerDied` or `ExecutorBroken`; `cancel()` works while it runs, too.

        Raises:
            ValueError: a timeout is no number of seconds.
            RuntimeError: the executor was shut down, or (`ExecutorBroken`) no worker has served for long.
        """
        timeout = self._timeout if timeout is DEFAULT else timeout
        queue_timeout = self._queue_timeout if queue_timeout is DEFAULT else queue_timeout
        check_seconds("timeout", timeout)
        check_seconds("queue_timeout", queue_timeout)
        request = Request(
            next(self._ids),
            arguments,
            keywords,
            seed=int(torch.randint(2**63 - 1, ())) if self._remote else None,
            timeout=timeout,
            queue_timeout=queue_timeout,
            on_progress=on_progress or self._on_progress,
            on_frames=on_frames,
        )
        request._retries = self._retries
        self._scheduler.check()
        if self._remote:
            request._patches = chosen_patches()
            try:
                request._packed = self._pack(arguments, keywords)
            except Exception as error:  # of this future only
                request._give_up(error)
                return request
        self._scheduler.add(request)
        return request

    def _pack(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Packed:
        """Pickles the arguments of a request for workers.

        Raises:
            Exception: what pickling raises, with a note that names the argument.
        """

        def packed(value: Any) -> Packed:
            found = pack(value)
            if not self._script:
                main_module.refuse(found.stream)
            return found

        try:
            return packed((arguments, keywords))
        except Exception:
            for name, value in [*enumerate(arguments, 1), *keywords.items()]:
                try:
                    packed(value)
                except Exception as error:
                    raise _about(name, error) from error
            raise

    def map(  # type: ignore[override]
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        timeout: float | None = None,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Submits a request for each mapping of keyword arguments and returns an iterator of the results, in order.

        Args:
            requests: such as `[{"prompt": "a cat"}, {"prompt": "a dog"}]`.
            timeout: seconds from now until `TimeoutError`, if the next result is not there.
            buffersize: how many are submitted ahead of the result that is asked for; by default all. With it
                the results that wait do not fill the memory.
        """
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize is {buffersize}, below 1")
        end = None if timeout is None else time.monotonic() + timeout
        todo = iter(requests)
        futures: deque[Request] = deque()
        try:
            futures.extend(self._submit_all(itertools.islice(todo, buffersize)))
        except BaseException:  # nobody will ask for these
            for future in futures:
                future.cancel()
            raise

        def results() -> Iterator[Any]:  # a generator of its own: all above happens at once
            try:
                while futures:
                    future = futures.popleft()
                    try:
                        yield future.result(None if end is None else end - time.monotonic())
                    except BaseException:
                        future.cancel()
                        raise
                    del future  # and with it the result, before the next is waited for
                    futures.extend(self._submit_all(itertools.islice(todo, 1)))
            finally:
                for future in futures:
                    future.cancel()

        return results()

    def _submit_all(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[Request]:
        for request in requests:
            if not isinstance(request, Mapping):
                raise TypeError(
                    f"map takes mappings of the pipeline's keyword arguments, such as dict(prompt=...), not "
                    f"{type(request).__name__!r}"
                )
            yield self.submit(**request)

    def health(self) -> Health:
        """Returns the state of every worker, and the numbers of waiting and running requests, for monitoring."""
        return self._scheduler.health()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests; workers end after the last one.

        Args:
            wait: return only then.
            cancel_futures: cancel the requests that have not started. Those that run go on.
            timeout: seconds after which all requests are cancelled and the workers ended, whatever they do. A pipeline
                of this process (layout "inline") leaves its request at the next step.
        """
        check_seconds("timeout", timeout)
        self._scheduler.close(cancel_futures)
        killer = None
        if timeout is not None:
            killer = threading.Timer(timeout, self._scheduler.end)
            killer.daemon = True
            killer.start()
        if wait:
            self._scheduler.join()
            if killer is not None:
                killer.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for all requests; after an exception cancels them first, including running ones."""
        if kind is not None:
            self._scheduler.cancel()
        self.shutdown()


class ParallelExecutor(PipelineExecutor):
    """Runs a diffusers pipeline on one or several devices of this machine and brings the results back.

        with ParallelExecutor.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16) as ex:
            future = ex.submit(prompt="a cat", generator=torch.Generator().manual_seed(42))
            video = future.result().frames

    Results are what the pipeline returns, with the same bits; tensors of accelerators arrive on the CPU, PIL
    images are decoded when they are looked at. Of an output class, `result.timings` holds the seconds of the
    pipeline's stages. What is enabled in this process when a request is submitted is enabled in its worker.

    Layouts:
        inline: one device; the pipeline lives in this process, on a thread, and nothing is copied.
        replicas: a pipeline for each device; requests are spread.
        context: all devices of a group work on one request, by diffusers' `enable_parallelism`.
        cfg: two devices, one for each branch of classifier-free guidance.
        sharded: the denoisers' weights are split over the devices of a group (`fully_shard`).
        auto: inline for one device, replicas for several.

    In all but inline, a request without a generator gets a seed drawn from torch's default generator here.

    A forked child keeps the results that its parent had, as any memory, and makes an executor of its own: its parent's
    raises RuntimeError there. Forks by C code that does not call Python's hooks are not seen; what such a child holds
    changes when the parent drops it.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        *,
        devices: str | int | Sequence[str | torch.device] = "auto",
        layout: str = "auto",
        group_size: int | None = None,
        parallel: Parallel = None,
        vae_parallel: bool | str = False,
        retries: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        cancel_grace: float | None = 600.0,
        bounds: Bounds | None = None,
        spares: int | None = None,
        progress: bool | Callable[[Request, Progress], None] = False,
        log: Log | None = None,
        threads: int | None = None,
        patience: float | Default | None = DEFAULT,
    ) -> None:
        """Starts the workers and waits until each has built its pipeline.

        Args:
            factory: called without arguments in every worker; returns a pipeline. A function of a module that
                workers can import; one of the script itself needs `if __name__ == "__main__":` around what
                starts the executor.
            devices: "auto" for all accelerators, or else the CPU; a number of them; or a list such as
                `["cuda:0", "cuda:1"]`. `["cpu", "cpu"]` is two processes on the CPU.
            layout: see the class.
            group_size: devices that work on one request together: for context and sharded (by default all) and
                cfg (2).
            parallel: for context: "ulysses" (also None), "ring" or "tensor", or a configuration of diffusers.
            vae_parallel: for context, cfg and sharded: True or "tiles" has all devices of a group share the tiles of
                the VAE, which must be an `AutoencoderKLWan`; turns its tiling on, so results have the bits of stock
                with `vae.enable_tiling()`. "spatial" divides the picture, and follows stock without tiling but for
                rounding. See `wan_patches.parallelize_vae`.
            retries: how often a request is given to another worker after its own has died.
            timeout: seconds that a request may run, from when it starts; `submit` can set another.
            queue_timeout: seconds that a request may wait for a worker; `submit` can set another.
            cancel_grace: seconds that a cancelled or timed out request may take to reach its next step before its
                worker is ended and started anew.
            bounds: after how long a worker that stands still is ended and started anew; None: as `Bounds()` says.
            spares: how many processes have imported torch and diffusers and wait to take the place of a worker that
                ends. Each takes some 0.3 GB of memory, and nothing of a device. By default as many as work on a
                request together.
            progress: True for bars in the terminal, or a function called with the request (its future) and its
                `Progress` after every step; `submit` can set another.
            log: called with a worker's rank and a line of its output; by default they go to stderr, prefixed
                with the rank.
            threads: CPU threads of each worker; by default the cores are shared out. On CPUs results can depend
                on it.
            patience: the old name of `cancel_grace`, until the next release.

        Raises:
            ValueError: for options that do not go together; the message says which do.
            WorkerDied: a worker ended while it loaded.
            Exception: what the factory raises.
        """
        cancel_grace = cancel_grace_of(patience, cancel_grace)
        check_options(retries, timeout, queue_timeout, cancel_grace, threads)
        bounds = bounds or Bounds()
        main_module.refuse_while_loading()
        chosen = _devices(devices)
        placing, size = resolve(layout, chosen, group_size, parallel, vae_parallel)
        groups: list[Group]
        script = False
        if placing.in_process:
            groups = [InlineGroup(functools.partial(Session, factory, placing, chosen[0]), chosen[0])]
        else:
            if not hasattr(socket, "AF_UNIX"):
                raise RuntimeError('workers need Unix sockets, which this system has not; use layout="inline"')
            build, setup = _worker_setup(factory, placing, parallel, vae_parallel)
            script = setup["main"] is not None
            environment = {}
            if threads is not None or "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = str(threads or max(1, _cores() // len(chosen)))
            spares = size if spares is None else spares
            check_count("spares", spares, 0)
            launcher = Launcher(sys.path, environment, spares=spares, send_timeout=bounds.answer)
            groups = [
                WorkerGroup(
                    build,
                    chosen[first : first + size],
                    first_rank=first,
                    setup=setup,
                    launcher=launcher,
                    bounds=bounds,
                    log=log or _to_stderr,
                )
                for first in range(0, len(chosen), size)
            ]
        super().__init__(
            groups,
            retries=retries,
            timeout=timeout,
            queue_timeout=queue_timeout,
            cancel_grace=cancel_grace,
            bounds=bounds,
            progress=progress,
            script=script,
        )


def _worker_setup(
    factory: Callable[[], Any], layout: Layout, parallel: Parallel, vae_parallel: bool | str
) -> tuple[Packed, dict[str, Any]]:
    """Returns the messages from which a worker builds its pipeline: arguments of `Rank.load`, packed, and plain data.

    Raises:
        ValueError: the factory cannot be sent, or cannot be found by another process.
    """
    try:
        build = pack((factory, {"layout": layout, "parallel": parallel, "vae_parallel": vae_parallel}))
    except Exception as error:
        raise ValueError(
            f"workers cannot be told about the factory {factory!r} ({error}); it must be a function at the top of a "
            "module, or anything else that pickles"
        ) from error
    return build, {"patches": chosen_patches(), "main": main_module.needed(factory)}


def cancel_grace_of(patience: float | Default | None, cancel_grace: float | None) -> float | None:
    """Returns `cancel_grace`, or `patience`, its old name, with a warning for the caller of the constructor.

    Raises:
        ValueError: `patience` is no number of seconds.
    """
    if patience is DEFAULT:
        return cancel_grace
    warnings.warn("`patience` is now called `cancel_grace`", DeprecationWarning, stacklevel=3)
    check_seconds("patience", patience)
    return patience


def check_options(
    retries: int, timeout: float | None, queue_timeout: float | None, cancel_grace: float | None, threads: int | None
) -> None:
    """Checks options of all executors before anything is started.

    Raises:
        ValueError: the message names the argument.
    """
    check_count("retries", retries, 0)
    check_seconds("timeout", timeout)
    check_seconds("queue_timeout", queue_timeout)
    check_seconds("cancel_grace", cancel_grace)
    if threads is not None:
        check_count("threads", threads, 1)


def _about(argument: object, error: Exception) -> Exception:
    """Returns an error of the same type, if possible, whose message names the argument of the request."""
    text = f"argument {argument!r} of the request cannot be sent to a worker: {error}"
    try:
        return type(error)(text)
    except Exception:
        return TypeError(text)


def _devices(wanted: str | int | Sequence[str | torch.device]) -> list[torch.device]:
    """Returns the devices that the executor's argument `devices` means."""
    if isinstance(wanted, str) and wanted != "auto":
        wanted = [wanted]
    if not isinstance(wanted, (str, int)):
        devices = [device_named(device) for device in wanted]
        if not devices:
            raise ValueError('devices is empty; name at least one, or "auto"')
        for device in devices:
            _check_there(device)
        return devices
    if wanted != "auto":
        check_count("devices", wanted, 1)
    found = _accelerators() or [torch.device("cpu")]
    if wanted == "auto":
        return found
    if not 1 <= int(wanted) <= len(found):
        names = ", ".join(map(str, found))
        raise ValueError(
            f"{wanted} devices are wanted, and there are {len(found)}: {names}. For several processes on "
            'the CPU give a list: ["cpu", "cpu"]'
        )
    return found[: int(wanted)]


def _check_there(device: torch.device) -> None:
    backend: Any = getattr(torch, device.type)
    if device.type == "cpu" or not hasattr(backend, "device_count"):
        return
    count = backend.device_count() if backend.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"devices names {str(device)!r}; torch {torch.__version__} finds {count} such devices here")


def _accelerators() -> list[torch.device]:
    """Returns all accelerators of the kind that torch uses here, without initialising them in this process."""
    for kind in ("cuda", "npu", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            return [torch.device(kind, index) for index in range(backend.device_count())]
    return []


def _progress(wanted: bool | Callable[[Request, Progress], None]) -> Callable[[Request, Progress], None] | None:
    if isinstance(wanted, bool):
        return Bars() if wanted else None
    return wanted


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_stderr(rank: int, line: str) -> None:
    print(f"[{rank}] {line}", file=sys.stderr, flush=True)
