"""`RayParallelExecutor`: runs a diffusers pipeline on the devices of a Ray cluster.

A rank is an actor; a group of ranks that work on one request together occupies a placement group. A call of an actor
streams events: progress after every step, and finally the outcome. Tensors of a result are buffers next to its pickle,
so that Ray's object store transfers them without pickling. Memory of the store is read-only and ends with Ray, so each
result is copied once into memory of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from wan_patches.executor import scheduler
from wan_patches.executor.bounds import DEFAULT, LOOK, Bounds, Default, Stillness
from wan_patches.executor.errors import WorkerDied
from wan_patches.executor.executor import PipelineExecutor, cancel_grace_of, check_options
from wan_patches.executor.groups import (
    BEAT,
    GOODBYE,
    LOG_LINES,
    OTHER_RANKS,
    Progression,
    Unwanted,
    find_hung,
    group_name,
)
from wan_patches.executor.layouts import LAYOUTS, Parallel, named, resolve
from wan_patches.executor.rank import Rank, chosen_patches, failed, failure_of
from wan_patches.executor.rendezvous import Notes, Rendezvous
from wan_patches.executor.requests import Progress, Request, logger
from wan_patches.executor.session import Interrupted
from wan_patches.executor.transport import Message, aligned, pack
from wan_patches.pipelines.streaming import Chunk

_UNTOLD = 20.0  # seconds of waiting for a place in the cluster before a warning is logged
_LATE_OUTPUT = 1.0  # seconds for Ray to deliver the last lines of an ended worker
_FOLLOWED = 1000  # workers whose last lines are kept
_THREADS = 5  # threads of an actor: one runs, one waits for its end, the others handle interrupts and heartbeats

#: A pickle and its buffers.
Parts = tuple[np.ndarray, list[np.ndarray]]


class RayParallelExecutor(PipelineExecutor):
    """Runs a diffusers pipeline on the devices of a Ray cluster, like `ParallelExecutor` on one machine.

        with RayParallelExecutor.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16) as ex:
            future = ex.submit(prompt="a cat", generator=torch.Generator().manual_seed(42))
            video = future.result().frames

    Requests, results, progress, cancellation, errors and layouts are those of `ParallelExecutor`, except for the layout
    "inline", which does not need Ray. Results are copied out of Ray's object store: they are writable, and outlive the
    executor and Ray. Ray handles the output of workers. A `WorkerDied` names the node; its log consists of the output
    that Ray delivers to this program (by default all), and its cause (`__cause__`) is Ray's error.

    Uses the program's connection to Ray, if there is one. Otherwise, connects to the cluster at `address`, or starts
    one on this machine, and disconnects when the last executor is shut down. Ray Client (`ray://`) is not supported:
    run the program in the cluster, for example with `ray job submit`. Every node needs this package and the model.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        *,
        devices: str | int = "auto",
        layout: str = "auto",
        group_size: int | None = None,
        parallel: Parallel = None,
        vae_parallel: bool | str = False,
        retries: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        cancel_grace: float | None = 600.0,
        bounds: Bounds | None = None,
        progress: bool | Callable[[Request, Progress], None] = False,
        threads: int | None = None,
        resources: Mapping[str, float] | None = None,
        strategy: str = "PACK",
        address: str | None = None,
        patience: float | Default | None = DEFAULT,
    ) -> None:
        """Starts the workers: waits until Ray has placed them, and then until each has built its pipeline.

        Args:
            factory: called without arguments in every worker; returns a pipeline. Pickled by Ray, so functions of the
                script or a notebook and lambdas are allowed.
            devices: number of workers; "auto" for as many as the cluster has `resources` for.
            layout: "replicas" (also "auto"), "context", "cfg" or "sharded"; see `ParallelExecutor`.
            group_size, parallel, vae_parallel, retries, timeout, queue_timeout, cancel_grace, patience, bounds,
                progress: see `ParallelExecutor`. The limit for loading starts once Ray has placed the workers; waiting
                for a place is not limited.
            threads: CPU threads per worker; by default the cluster's CPUs divided by the number of workers that fit in
                it. On CPUs, results can depend on it.
            resources: Ray resources of each worker. By default `{"GPU": 1}` or `{"NPU": 1}` if the cluster has them, or
                else `{"CPU": 1}`. Without "GPU" and "NPU", workers use the CPU.
            strategy: placement of a group's workers on the nodes of the cluster, as for `ray.util.placement_group`:
                "PACK" for as few nodes as possible, "STRICT_PACK" for one.
            address: address of the cluster, as for `ray.init`, if the program is not connected to one.

        Raises:
            ImportError: Ray is not installed.
            ValueError: options do not fit together; the message names valid ones.
            WorkerDied: a worker ended while loading its pipeline.
            Exception: any exception of the factory.
        """
        cancel_grace = cancel_grace_of(patience, cancel_grace)
        check_options(retries, timeout, queue_timeout, cancel_grace, threads)
        bounds = bounds or Bounds()
        ray = _import_ray()
        chosen = named(layout, auto=LAYOUTS["replicas"])
        if chosen.in_process:
            raise ValueError(
                f'layout "{chosen.name}" runs in this process and needs no Ray; use ParallelExecutor for it'
            )
        if not isinstance(devices, int) and devices != "auto":
            raise ValueError(
                f'devices={devices!r}: Ray chooses the devices; give a number of workers or "auto", and in resources '
                'what each needs, such as {"GPU": 1}'
            )
        options = {"layout": chosen, "parallel": parallel, "vae_parallel": vae_parallel}
        build = _pickled(ray, (factory, options))
        _connection.enter(address)
        try:
            total = ray.cluster_resources()
            if resources is None:
                resources = {next((kind for kind in ("GPU", "NPU") if total.get(kind)), "CPU"): 1}
            resources = {kind: amount for kind, amount in resources.items() if amount}
            if not resources:
                raise ValueError('resources is empty; name what each worker needs, such as {"CPU": 1}')
            room = _room(total, resources)
            count = room if devices == "auto" else int(devices)
            if count < 1:
                has, needs = _told(total, resources), _told(resources, resources)
                raise ValueError(f"there is nothing to run on: each worker needs {needs}, and the cluster has {has}")
            _, size = resolve(chosen.name, [torch.device("cpu")] * count, group_size, parallel, vae_parallel)
            setup = {
                "patches": chosen_patches(),
                "path": [str(path) for path in sys.path],
                "resources": resources,
                "threads": threads or max(1, int(total.get("CPU", 1) // max(1, room))),
            }
            groups = [
                RayGroup(build, size, first_rank=first, setup=setup, strategy=strategy, bounds=bounds)
                for first in range(0, count, size)
            ]
            super().__init__(
                groups,
                retries=retries,
                timeout=timeout,
                queue_timeout=queue_timeout,
                cancel_grace=cancel_grace,
                bounds=bounds,
                progress=progress,
            )
        finally:
            _connection.leave()  # the groups hold the connection from now on


class RayGroup:
    """Runs the pipeline in actors, one per rank, that work on a request together."""

    remote = True

    def __init__(
        self,
        build: bytes,
        ranks: int,
        *,
        first_rank: int,
        setup: dict[str, Any],
        strategy: str,
        bounds: Bounds,
    ) -> None:
        """`first_rank`: index of the first rank among all workers. `setup`: see `RayParallelExecutor`."""
        self._build, self._ranks, self._first_rank = build, ranks, first_rank
        self._setup, self._strategy, self._bounds = setup, strategy, bounds
        self.name = group_name(first_rank, ranks)
        self.on_death: Callable[[], None] = lambda: None
        self._actors: list[_Actor] = []
        self._placement: Any = None
        _connection.enter()

    def start(self, wanted: Callable[[], bool]) -> None:
        import ray

        self._clear()
        if not ray.is_initialized():  # the calls below would start a cluster
            raise RuntimeError("Ray was shut down; create another executor")
        try:
            options = _options(self._setup["resources"])
            if self._ranks > 1:
                bundles = [dict(self._setup["resources"]) for _ in range(self._ranks)]
                self._placement = ray.util.placement_group(bundles, strategy=self._strategy)
            actor = ray.remote(PipelineWorker)
            for rank in range(self._ranks):
                if self._placement is not None:
                    options["scheduling_strategy"] = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                        self._placement, rank
                    )
                handle = actor.options(max_concurrency=_THREADS, **options).remote()
                self._actors.append(_Actor(self._first_rank + rank, handle, self.on_death))
            self._wait_for_places([actor.handle.prepare.remote(self._setup["path"]) for actor in self._actors], wanted)
            first = self._actors[0].handle
            streams = [
                actor.handle.load.options(num_returns="streaming").remote(
                    self._build, self._setup, rank, self._ranks, first
                )
                for rank, actor in enumerate(self._actors)
            ]
            self._gather(None, streams, wanted)
        except BaseException:
            self._clear()
            raise

    def run(self, request: Request) -> tuple[Any, dict[str, float]]:
        import ray

        value: Any = request._packed.parts()
        if self._ranks > 1:
            value = ray.put(value)  # once for all ranks
        info = request.id, request._seed, request._patches, request._streams
        with self._deaths(self._actors[0], request.id):
            streams = [actor.handle.run.options(num_returns="streaming").remote(*info, value) for actor in self._actors]
        del value
        message = self._gather(request, streams)
        return message.load(), message.info

    def _gather(
        self, request: Request | None, streams: Sequence[Any], wanted: Callable[[], bool] = lambda: True
    ) -> Message:
        """Waits until every rank is done, and returns the last event of the first rank."""
        import ray

        waiting = dict(zip(streams, self._actors))
        number = 0 if request is None else request.id
        first: Message | None = None
        deadline: float | None = None
        failure: BaseException | None = None
        progression = Progression(self._bounds, loading=request is None)
        while waiting:
            with self._deaths(self._actors[0], number):
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK)
            if not ready:
                if not wanted():
                    raise Unwanted
                if deadline is not None and time.monotonic() > deadline:
                    self._clear()  # one rank failed, and the others would wait for it forever
                    break
                self._look(number or None, progression.exceeded())
                continue
            stream, actor = ready[0], waiting[ready[0]]
            kind, info, *value = self._get(actor, stream, number)
            if kind == "progress":
                progression.step()
                if request is not None:
                    request._advance(Progress(*info))
                continue
            if kind == "frames":
                progression.step()
                if request is not None:
                    request._hand_over(Message(kind, number, info, [_owned(parts) for parts in value]).load, *info)
                continue
            del waiting[stream]
            message = Message(kind, number, info, [_owned(parts) for parts in value])
            del value
            if actor is self._actors[0]:
                first = message
            if kind in ("failed", "interrupted") and failure is None:
                failure = Interrupted() if kind == "interrupted" else failure_of(message)
                deadline = time.monotonic() + OTHER_RANKS
        if failure is not None:
            raise failure
        assert first is not None
        return first

    def _get(self, actor: _Actor, what: Any, request: int = 0) -> Any:
        """Returns the value of a reference, or the next value of a stream."""
        import ray

        if not isinstance(what, ray.ObjectRef):
            with self._deaths(actor, request):
                what = next(what)
        while True:
            with self._deaths(actor, request), contextlib.suppress(ray.exceptions.GetTimeoutError):
                return ray.get(what, timeout=LOOK)

    @contextlib.contextmanager
    def _deaths(self, actor: _Actor, request: int) -> Iterator[None]:
        """Converts Ray's exceptions about the end of an actor into `WorkerDied`, inside the block."""
        import ray

        try:
            if not _initialized():  # Ray's functions would start another cluster
                raise RuntimeError("Ray was shut down")
            yield
        except BaseException as error:
            # an error of our code in the actor is not a death; ray.shutdown() by the program raises SystemExit here
            deadly = isinstance(error, (ray.exceptions.RayError, StopIteration))
            if _initialized() and (not deadly or isinstance(error, ray.exceptions.RayTaskError)):
                raise
            # also the cause of errors of torch.distributed in other ranks
            died = WorkerDied(*actor.known(request or None))
            self._clear()
            raise died from error

    def _look(self, request: int | None, exceeded: tuple[str, float] | None, doing: str = "") -> None:
        """Raises `WorkerHung` if a worker sends no heartbeats or the group has exceeded a limit."""
        for actor in self._actors:
            actor.ask()
        hung = find_hung(self._actors, self._bounds, exceeded, request, doing)
        if hung is not None:
            self._clear()
            raise hung

    def _wait_for_places(self, calls: list[Any], wanted: Callable[[], bool]) -> None:
        import ray

        needed = self._setup["resources"]
        began, told = time.monotonic(), False
        while True:
            with self._deaths(self._actors[0], 0):
                if not ray.wait(calls, num_returns=len(calls), timeout=LOOK)[1]:
                    break
            if not wanted():
                raise Unwanted
            if told or time.monotonic() - began < _UNTOLD:
                continue
            told = True
            logger.warning(
                "workers are waiting for a place in the Ray cluster: each of %d needs %s%s; the cluster has %s on %d "
                "nodes, of which %s are free",
                self._ranks,
                _told(needed, needed),
                f" (strategy {self._strategy})" if self._placement is not None else "",
                _told(ray.cluster_resources(), needed),
                sum(node["Alive"] for node in ray.nodes()),
                _told(ray.available_resources(), needed),
            )
        for actor, call in zip(self._actors, calls):
            actor.pid, actor.node = self._get(actor, call)

    def interrupt(self, request: int) -> None:
        for actor in list(self._actors):
            with contextlib.suppress(Exception):  # the actor or Ray is gone
                if _initialized():
                    actor.handle.interrupt.remote(request)

    def kill(self) -> None:
        for actor in list(self._actors):
            actor.kill()

    def _clear(self) -> None:
        self.kill()
        for actor in self._actors:
            actor.ended.wait(GOODBYE)
        self._actors = []
        placement, self._placement = self._placement, None
        if placement is not None and _initialized():
            import ray

            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(placement)

    def check(self) -> None:
        if not _initialized() or not self._actors:
            doing = "as another of its group had failed" if _initialized() else "with Ray, which was shut down"
            raise WorkerDied(None, self._first_rank, None, None, None, None, doing)
        for actor in self._actors:
            if actor.ended.is_set():
                raise WorkerDied(*actor.known(None, "while it was idle"))
        self._look(None, None, "while it was idle")

    def members(self) -> list[tuple[int, str, int | None]]:
        actors = {actor.rank: actor for actor in list(self._actors)}
        device = next((kind for kind in ("GPU", "NPU") if kind in self._setup["resources"]), "CPU")
        found: list[tuple[int, str, int | None]] = []
        for rank in range(self._first_rank, self._first_rank + self._ranks):
            if (actor := actors.get(rank)) is None:
                found.append((rank, device, None))
            elif actor.pid is None:
                found.append((rank, f"{device}, waiting for a place in the cluster", None))
            else:
                found.append((rank, f"{device} of node {actor.node}", actor.pid))
        return found

    def stop(self) -> None:
        try:
            if self._actors and not any(actor.ended.is_set() for actor in self._actors) and _initialized():
                import ray

                with contextlib.suppress(Exception):
                    ray.wait(
                        [actor.handle.close.remote() for actor in self._actors],
                        num_returns=len(self._actors),
                        timeout=GOODBYE,
                    )
            self._clear()
        finally:
            _connection.leave()


class _Actor:
    """An actor, as seen by the executor: its handle, its end and its heartbeats."""

    def __init__(self, rank: int, handle: Any, on_death: Callable[[], None]) -> None:
        self.rank, self.handle = rank, handle
        self.pid: int | None = None
        self.node: str | None = None
        self.ended = threading.Event()
        self.silent = Stillness()
        self._asked, self._answered = 0.0, True
        self._on_death = on_death
        # a call that ends only with the actor
        handle.wait.remote().future().add_done_callback(self._end)

    @property
    def up(self) -> bool:
        """Whether the actor has a place in the cluster and can respond."""
        return self.pid is not None

    def ask(self) -> None:
        """Requests a heartbeat, unless one is pending or the last request is less than `BEAT` seconds old."""
        if self.up and self._answered and time.monotonic() - self._asked > BEAT:
            self._asked, self._answered = time.monotonic(), False
            self.handle.answer.remote().future().add_done_callback(self._answer)

    def known(self, request: int | None, doing: str = "") -> tuple[Any, ...]:
        time.sleep(_LATE_OUTPUT)
        return None, self.rank, request, _output.of(self.node, self.pid), self.pid, self.node, doing

    def _answer(self, answer: Any) -> None:
        if answer.exception() is None:
            self._answered = True
            self.silent.sign()

    def _end(self, _: Any) -> None:
        self.ended.set()
        self._on_death()

    def kill(self) -> None:
        import ray

        if not _initialized():
            self.ended.set()
            return
        with contextlib.suppress(Exception):
            ray.kill(self.handle)


class PipelineWorker:
    """The class of the actors. Ray calls methods in several threads; a single thread does all torch work."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._rank: Rank | None = None
        self._notes = Notes()

    def prepare(self, path: Sequence[str]) -> tuple[int, str]:
        """Extends the module search path before the factory is unpickled.

        Returns:
            The process id, and the address of the node.
        """
        import ray

        sys.path.extend(folder for folder in path if folder not in sys.path)
        return os.getpid(), ray.util.get_node_ip_address()

    def answer(self) -> None:
        """Returns at once."""

    def rendezvous(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a method of `Notes` on the notes that the first rank keeps for its group."""
        return method(self._notes, *arguments)

    def load(self, *arguments: Any) -> Iterator[Any]:
        """Builds the pipeline and yields one event: "ready" or "failed"."""
        yield from self._events(lambda _: self._load(*arguments))

    def run(self, *arguments: Any) -> Iterator[Any]:
        """Runs a request and yields events: "progress" and "frames", and finally "done", "failed" or "interrupted"."""
        yield from self._events(lambda put: self._run(put, *arguments))

    def interrupt(self, request: int) -> None:
        if self._rank is not None:
            self._rank.interrupt(request)

    def wait(self) -> None:
        """Never returns."""
        threading.Event().wait()

    def close(self) -> None:
        if self._rank is not None:
            self._thread.submit(self._rank.close).result()

    def _events(self, work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
        """Yields the events that `work` puts, and finally its result or failure."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def guarded() -> None:
            try:
                last = work(events.put)
            except Interrupted:
                last = ("interrupted", None)
            except BaseException as error:
                text, packed = failed(error)
                last = ("failed", text, packed.parts())
            events.put(last)

        self._thread.submit(guarded)
        while (event := events.get())[0] in ("progress", "frames"):
            yield event
        yield event

    def _load(self, build: bytes, setup: dict[str, Any], rank: int, ranks: int, first: Any) -> Any:
        import ray

        torch.set_num_threads(setup["threads"])  # Ray sets 1 for actors without CPUs
        store = None
        if ranks > 1:
            store = Rendezvous(lambda *call: ray.get(first.rendezvous.remote(*call)))
            # by default, gloo uses the address of the host name, which many systems map to the loopback interface
            if interface := _interface(ray.util.get_node_ip_address()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._rank = Rank(rank, ranks, _device(setup["resources"]))
        self._rank.load(lambda: ray.cloudpickle.loads(build), setup["patches"], store)
        return "ready", None

    def _run(
        self,
        put: Callable[[Any], None],
        request: int,
        seed: int | None,
        patches: dict[str, Any] | None,
        streams: bool,
        inputs: Parts,
    ) -> Any:
        assert self._rank is not None

        def on_frames(chunk: Chunk) -> None:
            put(("frames", (chunk.start, chunk.reason), pack(chunk.frames).parts()))

        packed, timings = self._rank.run(
            request,
            Message("run", request, None, [_owned(inputs)]).load,
            seed=seed,
            patches=patches,
            empty_strided=_empty_strided,
            report=lambda step, total, bar: put(("progress", (step, total, bar))),
            on_frames=on_frames if streams else None,
        )
        return ("done", timings) if packed is None else ("done", timings, packed.parts())


def _empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cpu")


def _device(resources: Mapping[str, float]) -> torch.device:
    """Returns the device of this actor: always the first one, since Ray hides all others."""
    if "NPU" in resources:
        import torch_npu  # noqa: F401

        return torch.device("npu", 0)
    if "GPU" in resources:
        for kind in ("cuda", "xpu"):
            backend = getattr(torch, kind, None)
            if backend is not None and backend.is_available():
                return torch.device(kind, 0)
        raise RuntimeError(f"Ray assigned a GPU to this worker, but its torch {torch.__version__} cannot use it")
    return torch.device("cpu")


def _interface(address: str) -> str | None:
    """Returns the network interface with that address, or None."""
    import psutil

    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), None)


# Values in Ray's object store


def _owned(parts: Parts) -> Parts:
    """Copies a pickle and its buffers out of the object store, whose memory is read-only.

    Uses a single block, for which numpy requests huge pages: page faults of new memory cost more than the copy.
    """
    stream, buffers = parts
    starts = list(itertools.accumulate((aligned(len(buffer)) for buffer in buffers), initial=0))
    block = np.empty(starts[-1], np.uint8)
    copies = [block[start : start + len(buffer)] for start, buffer in zip(starts, buffers)]
    for copy, buffer in zip(copies, buffers):
        np.copyto(copy, buffer)
    return stream.copy(), copies


# Ray


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError('RayParallelExecutor needs Ray: pip install "wan-patches[ray]"') from error
    # requests must finish before Ray's own exit handler; handlers registered last run first
    atexit.unregister(scheduler.finish_all)
    atexit.register(scheduler.finish_all)
    return ray


def _initialized() -> bool:
    import ray

    return bool(ray.is_initialized())


def _pickled(ray: Any, value: Any) -> bytes:
    try:
        return bytes(ray.cloudpickle.dumps(value))
    except Exception as error:
        raise ValueError(f"the factory {value[0]!r} cannot be sent to workers ({error})") from error


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Converts resources to options of an actor, which have special names for some resources."""
    others = dict(resources)
    options: dict[str, Any] = {"num_cpus": others.pop("CPU", 0), "num_gpus": others.pop("GPU", 0)}
    if "memory" in others:
        options["memory"] = others.pop("memory")
    return options | {"resources": others}


def _room(total: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Returns the number of workers with these resources that fit in the cluster."""
    return int(min(total.get(kind, 0.0) / amount + 1e-6 for kind, amount in resources.items()))  # 1 / 0.1 gives 10


def _told(amounts: Mapping[str, float], kinds: Iterable[str]) -> str:
    return ", ".join(f"{amounts.get(kind, 0):g} {kind}" for kind in kinds)


class _Output:
    """Stores the last lines of output of each worker of this program."""

    def __init__(self) -> None:
        self._lines: OrderedDict[tuple[str, int], deque[str]] = OrderedDict()

    def follow(self) -> None:
        """Subscribes to the output that Ray delivers; has no effect without Ray's undocumented dispatcher."""
        with contextlib.suppress(Exception):
            from ray._private.ray_logging import global_worker_stdstream_dispatcher

            global_worker_stdstream_dispatcher.remove_handler(__name__)
            global_worker_stdstream_dispatcher.add_handler(__name__, self)

    def __call__(self, data: Mapping[str, Any]) -> None:
        with contextlib.suppress(Exception):  # called in Ray's thread, which must continue
            worker = data["ip"], int(data["pid"])
            lines = self._lines.setdefault(worker, deque(maxlen=LOG_LINES))
            lines.extend(str(line) for line in data["lines"])
            self._lines.move_to_end(worker)
            if len(self._lines) > _FOLLOWED:
                self._lines.popitem(last=False)

    def of(self, node: str | None, pid: int | None) -> tuple[str, ...] | None:
        """Returns a worker's lines; None without output or if Ray does not deliver it (`log_to_driver=False`)."""
        found = self._lines.get((node or "", pid or 0))
        return None if found is None else tuple(found)


_output = _Output()


class _Connection:
    """The connection to Ray. If the program has none, the first executor opens one and the last one closes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False

    def enter(self, address: str | None = None) -> None:
        import ray

        with self._lock:
            if not self._users:
                self._ours = not ray.is_initialized()
                if self._ours:
                    ray.init(address=address)
                if ray.util.client.ray.is_connected():
                    if self._ours:
                        ray.shutdown()
                    raise ValueError("Ray Client (ray://) cannot stream results; run the program in the cluster")
                _output.follow()
            self._users += 1

    def leave(self) -> None:
        import ray

        with self._lock:
            self._users -= 1
            if not self._users and self._ours:
                ray.shutdown()


_connection = _Connection()
