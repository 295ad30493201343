"""Two nodes of a Ray cluster, which here are two raylets of one machine with an address each."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
import time

import fakes
import psutil
import pytest
import torch
from processes import wait_until

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.executor import Bounds, WorkerDied, WorkerHung
from wan_patches.testing.families import FAMILIES

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'wan-patches[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from wan_patches.executor import ray as executors  # noqa: E402
from wan_patches.executor.ray import RayParallelExecutor  # noqa: E402
from wan_patches.executor.rendezvous import Rendezvous  # noqa: E402

pytestmark = pytest.mark.timeout(240)

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
OTHER = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"  # Linux's loopback has many


@pytest.fixture
def cluster(monkeypatch):
    """A head and another node, with a place for one worker each."""
    before = set(psutil.Process().children(recursive=True))
    folder = tempfile.mkdtemp(prefix="ray")  # short, as sockets lie in it; tests beside look for a Ray elsewhere
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # whatever else takes the machine's memory
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        cluster.other = cluster.add_node(node_ip_address=OTHER, **NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        wait_until(lambda: {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"})
    finally:
        ray.shutdown()
        cluster.shutdown()
        _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
    assert not alive


def test_a_lost_node_costs_nothing_that_is_tried_again_and_a_new_one_takes_its_place(cluster, caplog):
    with RayParallelExecutor(fakes.fake, devices=2, threads=1, retries=1) as executor:
        requests = [executor.submit("node", steps=2, seconds=0.4) for _ in range(2)]
        nodes = {request.result(60) for request in requests}
        assert nodes == {cluster.head_node.node_id, cluster.other.node_id}
        running = [executor.submit("node", steps=10, seconds=3.0) for _ in range(2)]
        wait_until(lambda: executor.health().running == 2)
        cluster.remove_node(cluster.other, allow_graceful=False)
        assert [request.result(120) for request in running] == [cluster.head_node.node_id] * 2
        assert "retrying request " in caplog.text
        assert executor.health().serving == 1
        new = cluster.add_node(**NODE)
        wait_until(lambda: executor.health().serving == 2, 120)
        requests = [executor.submit("node", steps=2, seconds=0.4) for _ in range(2)]
        assert {request.result(60) for request in requests} == {cluster.head_node.node_id, new.node_id}


@pytest.mark.slow
def test_large_results_go_through_small_stores(cluster):
    with RayParallelExecutor(fakes.fake, devices=2, threads=1) as executor:
        results = [executor.submit("bytes_", 200 << 20) for _ in range(4)]
        for result in results:
            found = result.result(120)
            assert found.numel() == 200 << 20
            assert bool((found == 1).all())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    [
        ("replicas", "wan_t2v", torch.bfloat16),
        ("context", "wan22_i2v", torch.float32),
        ("cfg", "wan_t2v", torch.bfloat16),
        ("sharded", "wan22_i2v", torch.bfloat16),
    ],
)
def test_layouts_across_nodes_give_the_video_of_one_process(cluster, layout, name, dtype):
    wan_patches.enable()
    expected = [fakes.family(name, dtype)(**FAMILIES[name].inputs(seed=seed)).frames for seed in range(2)]
    build = functools.partial(fakes.family if layout == "replicas" else _found_by_an_actor, name, dtype)
    with RayParallelExecutor(build, layout=layout, devices=2, threads=1, strategy="STRICT_SPREAD") as executor:
        workers = executor.health().workers
        assert len({worker.pid for worker in workers}) == len({worker.device for worker in workers}) == 2
        for seed, video in enumerate(expected):
            assert identical(executor.submit(**FAMILIES[name].inputs(seed=seed)).result(200).frames, video)
        first, second = (_ports(worker.pid) for worker in workers)
        assert len(first) == len(second)  # a TCPStore would listen in the first rank


def _found_by_an_actor(name: str, dtype: torch.dtype):
    """A pipeline, if that is how the ranks have found one another."""
    store = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, Rendezvous), store
    return fakes.family(name, dtype)


def _ports(pid: int) -> set[int]:
    """Where the process listens."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_a_group_waits_for_a_node_in_place_of_a_lost_one(cluster, caplog):
    caplog.set_level(logging.WARNING)
    build = functools.partial(fakes.family, "wan_t2v")
    with RayParallelExecutor(
        build, layout="context", devices=2, threads=1, strategy="STRICT_SPREAD", retries=1
    ) as executor:
        inputs = FAMILIES["wan_t2v"].inputs(seed=1)
        first = executor.submit(**inputs).result(100).frames
        cluster.remove_node(cluster.other, allow_graceful=False)
        waiting = executor.submit(**inputs)
        lacking = (
            "workers are waiting for a place in the Ray cluster: each of 2 needs 1 CPU (strategy STRICT_SPREAD); "
            "the cluster has 1 CPU on 1 nodes, of which 1 CPU are free"
        )
        wait_until(lambda: lacking in caplog.text, 120)
        health = executor.health()
        assert health.serving == 0
        assert {worker.device for worker in health.workers} == {"CPU, waiting for a place in the cluster"}
        assert "ended" in health.workers[0].reason
        cluster.add_node(**NODE)
        assert identical(waiting.result(200).frames, first)


@pytest.mark.slow
def test_a_worker_of_another_node_that_stands_still_is_noticed(cluster):
    with RayParallelExecutor(fakes.fake, devices=2, threads=1, bounds=Bounds(answer=8.0)) as executor:
        pids = {worker.pid for worker in executor.health().workers}
        requests = [executor.submit("hang", 30) for _ in range(2)]
        wait_until(lambda: executor.health().running == 2)
        os.kill(stopped := min(pids), signal.SIGSTOP)
        errors = [request.exception(120) for request in requests]
        (error,) = (error for error in errors if error is not None)
        assert isinstance(error, WorkerHung)
        assert (error.bound, error.pid) == ("answer", stopped)
        wait_until(lambda: executor.health().serving == 2, 120)


@pytest.mark.slow
def test_shutdown_ends_though_a_node_is_lost(cluster):
    executor = RayParallelExecutor(fakes.fake, devices=2, threads=1)
    running = [executor.submit("hang", 100) for _ in range(2)]
    wait_until(lambda: executor.health().running == 2)
    cluster.remove_node(cluster.other, allow_graceful=False)
    wait_until(lambda: any(request.done() for request in running), 120)
    (lost,) = (request for request in running if request.done())
    assert isinstance(lost.exception(), WorkerDied)
    start = time.monotonic()
    executor.shutdown(timeout=2.0)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_lost_node_is_named_and_its_capacity_is_missing(cluster, caplog):
    with RayParallelExecutor(fakes.fake, devices=2, threads=1) as executor:
        running = [executor.submit("hang", 5.0) for _ in range(2)]
        wait_until(lambda: executor.health().running == 2)
        (worker,) = (worker for worker in executor.health().workers if worker.device == f"CPU of node {OTHER}")
        cluster.remove_node(cluster.other, allow_graceful=False)
        (died,) = (error for error in (request.exception(60) for request in running) if error is not None)
        assert isinstance(died, WorkerDied)
        assert (died.rank, died.pid, died.node) == (worker.rank, worker.pid, OTHER)
        told = f"worker {worker.rank} (pid {worker.pid}, node {OTHER}) ended during request {died.request}"
        assert f"{told}; restarting now; 1 of 2 groups serving" in caplog.text
        wait_until(lambda: "waiting for a place" in executor.health().workers[worker.rank].device)
        health = executor.health()
        assert (health.serving, health.workers[worker.rank].reason) == (1, told)


@pytest.mark.slow
def test_a_node_that_falls_silent_is_noticed_and_left(cluster):
    """As when a machine hangs, or its network: nothing of it ends."""
    with RayParallelExecutor(fakes.fake, devices=2, threads=1, bounds=Bounds(answer=8.0), retries=1) as executor:
        running = [executor.submit("node", steps=200, seconds=20.0) for _ in range(2)]
        wait_until(lambda: executor.health().running == 2)
        raylet = psutil.Process(cluster.other.all_processes["raylet"][0].process.pid)
        silent = [raylet, *raylet.children(recursive=True)]
        for process in silent:
            process.suspend()
        try:
            assert {request.result(120) for request in running} == {cluster.head_node.node_id}
            assert executor.health().serving == 1
            start = time.monotonic()
            executor.shutdown(timeout=2.0)
            assert time.monotonic() - start < 60
        finally:
            for process in reversed(silent):
                with contextlib.suppress(psutil.Error):
                    process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_interface_of_an_address_is_found():
    assert executors._interface("127.0.0.1") == "lo"
    assert executors._interface("192.0.2.213") is None
