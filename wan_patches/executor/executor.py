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
    """Base class of pipeline executors: accepts requests and returns futures of their results."""

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
        """Starts the groups and waits until each has loaded its pipeline. Other arguments as for `ParallelExecutor`.

        script: whether workers have imported the script, so that requests may refer to definitions in it.
        """
        self._timeout, self._queue_timeout, self._retries = timeout, queue_timeout, retries
        self._on_progress = _progress(progress)
        self._ids = itertools.count(1)
        self._remote, self._script = groups[0].remote, script
        self._scheduler = Scheduler(groups, bounds, cancel_grace)
        self._scheduler.start()
        # threads refer to the scheduler, not to this object, so that it can be garbage-collected like any executor
        weakref.finalize(self, self._scheduler.close).atexit = False

    @classmethod
    def from_pretrained(cls, model: str, *, pipeline_class: type | None = None, **options: Any) -> Self:
        """Creates an executor for a pipeline from the Hub or a folder. Works in notebooks and without `__main__` guard.

        Args:
            model: as for `DiffusionPipeline.from_pretrained`.
            pipeline_class: by default the class named by the model.
            options: options of the executor; all others, such as `torch_dtype`, are passed to `from_pretrained`.
        """
        known = inspect.signature(cls).parameters
        own = {name: options.pop(name) for name in list(options) if name in known}
        factory: Any = Pretrained(str(model), pipeline_class, options)  # first argument of every subclass
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
        """Queues a call of the pipeline and returns immediately.

        Workers receive the arguments in their current state, including that of generators; only the contents of
        tensors, arrays and images must not change until the request runs. Layout "inline" passes the objects
        themselves, as in a direct call, and advances the caller's generator.

        Args:
            arguments, keywords: arguments of the pipeline.
            timeout, queue_timeout, on_progress: override the executor's options for this request; a timeout of None
                means no limit.
            on_frames: called with the request and each `Chunk` of frames, in order, while decoding continues, as by
                `wan_patches.stream_frames`. The `frames` of the result are then None. Runs in the thread that reads
                the worker's messages; during a call, further chunks wait in memory. Exceptions are logged. A retry
                begins again with a chunk whose `start` is 0.

        Returns:
            A `concurrent.futures.Future` of the pipeline's result. It raises the pipeline's exception, `TimeoutError`,
            `WorkerDied` or `ExecutorBroken`. `cancel()` also works for running requests.

        Raises:
            ValueError: a timeout is not a number of seconds.
            RuntimeError: the executor was shut down, or (`ExecutorBroken`) no worker has served for too long.
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
            except Exception as error:  # fails only this future
                request._give_up(error)
                return request
        self._scheduler.add(request)
        return request

    def _pack(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Packed:
        """Pickles the arguments of a request for workers.

        Raises:
            Exception: pickling failed; the message names the argument.
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
            timeout: seconds from now after which the iterator raises `TimeoutError` if the next result is not ready.
            buffersize: number of requests to submit ahead of the next result; by default all. Limits the memory of
                results that have not been consumed.
        """
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize is {buffersize}; it must be at least 1")
        end = None if timeout is None else time.monotonic() + timeout
        todo = iter(requests)
        futures: deque[Request] = deque()
        try:
            futures.extend(self._submit_all(itertools.islice(todo, buffersize)))
        except BaseException:  # their results are not needed
            for future in futures:
                future.cancel()
            raise

        def results() -> Iterator[Any]:  # a nested generator, so that the code above runs immediately
            try:
                while futures:
                    future = futures.popleft()
                    try:
                        yield future.result(None if end is None else end - time.monotonic())
                    except BaseException:
                        future.cancel()
                        raise
                    del future  # frees the result before waiting for the next one
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
        """Stops accepting requests; workers end after the last request.

        Args:
            wait: wait until all workers have ended.
            cancel_futures: cancel requests that have not started. Running requests continue.
            timeout: seconds after which all requests are cancelled and the workers killed. A pipeline in this process
                (layout "inline") leaves its request at the next step.
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
        """Shuts down after all requests are done. After an exception, cancels them first, including running ones."""
        if kind is not None:
            self._scheduler.cancel()
        self.shutdown()


class ParallelExecutor(PipelineExecutor):
    """Runs a diffusers pipeline on one or several devices of this machine.

        with ParallelExecutor.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16) as ex:
            future = ex.submit(prompt="a cat", generator=torch.Generator().manual_seed(42))
            video = future.result().frames

    Results are those of the pipeline, with the same bits. Tensors on accelerators arrive on the CPU; PIL images are
    decoded at first use. For output classes, `result.timings` contains the seconds of the pipeline's stages. A worker
    runs each request with the patches that were enabled in this process at the time of `submit`.

    Layouts:
        inline: one device; the pipeline runs in a thread of this process, without copies.
        replicas: one pipeline per device; requests are distributed over them.
        context: all devices of a group work on one request, through diffusers' `enable_parallelism`.
        cfg: two devices, one per branch of classifier-free guidance.
        sharded: the denoisers' weights are sharded over the devices of a group (`fully_shard`).
        auto: inline for one device, replicas for several.

    Except for inline, a request without a generator gets a seed drawn from torch's default generator in this process.

    A forked child keeps the results of its parent, like any memory. The parent's executor raises RuntimeError there;
    create a new one. Forks by C code that does not call Python's hooks are not detected: results in such a child change
    when the parent drops them.
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
            factory: called without arguments in every worker; returns a pipeline. Must be defined in a module that
                workers can import. If it is defined in the script itself, guard the code that starts the executor with
                `if __name__ == "__main__":`.
            devices: "auto" for all accelerators, or the CPU if there are none; a number of them; or a list such as
                `["cuda:0", "cuda:1"]`. `["cpu", "cpu"]` starts two processes on the CPU.
            layout: see the class.
            group_size: number of devices that work on one request together, for context and sharded (by default all)
                and cfg (2).
            parallel: for context: "ulysses" (default), "ring" or "tensor", or a configuration of diffusers.
            vae_parallel: for context, cfg and sharded: True or "tiles" distributes the tiles of the VAE, which must be
                an `AutoencoderKLWan`, over the devices of a group. It turns tiling on, so results have the same bits
                as stock with `vae.enable_tiling()`. "spatial" divides the picture and equals stock without tiling up
                to rounding. See `wan_patches.parallelize_vae`.
            retries: number of times a request moves to another worker after its worker has died.
            timeout: maximum run time of a request in seconds, from its start; `submit` can override it.
            queue_timeout: maximum time in seconds that a request waits for a worker; `submit` can override it.
            cancel_grace: grace period in seconds for a cancelled or timed out request to reach its next step; after
                it, the worker is ended and started again.
            bounds: time limits after which a hung worker is ended and started again; by default `Bounds()`.
            spares: number of spare processes, with torch and diffusers imported, that replace workers that end. Each
                uses about 0.3 GB of memory, and no device. By default the number of workers per request.
            progress: True for progress bars in the terminal, or a function called with the request (its future) and
                its `Progress` after every step; `submit` can override it.
            log: called with a worker's rank and a line of its output; by default, lines are printed to stderr with the
                rank as prefix.
            threads: CPU threads per worker; by default an equal share of the cores. On CPUs, results can depend on it.
            patience: deprecated name of `cancel_grace`; will be removed in the next release.

        Raises:
            ValueError: options do not fit together; the message names valid ones.
            WorkerDied: a worker ended while loading its pipeline.
            Exception: any exception of the factory.
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
                raise RuntimeError('workers need Unix sockets, which this system does not have; use layout="inline"')
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
    """Returns the setup data of a worker: the factory and layout options, packed, and plain data.

    Raises:
        ValueError: the factory cannot be pickled, or cannot be imported in another process.
    """
    try:
        build = pack((factory, {"layout": layout, "parallel": parallel, "vae_parallel": vae_parallel}))
    except Exception as error:
        raise ValueError(
            f"the factory {factory!r} cannot be sent to workers ({error}); it must be a function at the top of a "
            "module, or another object that can be pickled"
        ) from error
    return build, {"patches": chosen_patches(), "main": main_module.needed(factory)}


def cancel_grace_of(patience: float | Default | None, cancel_grace: float | None) -> float | None:
    """Returns `cancel_grace`, or the deprecated `patience` with a warning at the caller of the constructor.

    Raises:
        ValueError: `patience` is not a number of seconds.
    """
    if patience is DEFAULT:
        return cancel_grace
    warnings.warn("`patience` is now called `cancel_grace`", DeprecationWarning, stacklevel=3)
    check_seconds("patience", patience)
    return patience


def check_options(
    retries: int, timeout: float | None, queue_timeout: float | None, cancel_grace: float | None, threads: int | None
) -> None:
    """Validates options of all executors before any worker starts.

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
    """Returns an error that names the argument of the request, of the same type if possible."""
    text = f"argument {argument!r} of the request cannot be sent to a worker: {error}"
    try:
        return type(error)(text)
    except Exception:
        return TypeError(text)


def _devices(wanted: str | int | Sequence[str | torch.device]) -> list[torch.device]:
    """Resolves the executor's argument `devices`."""
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
            f"{wanted} devices requested, but found {len(found)}: {names}. For several processes on the CPU, pass a "
            'list: ["cpu", "cpu"]'
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
    """Returns all accelerators of the first available kind, without initialising them in this process."""
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
