"""Two nodes of a Ray cluster, which here are two raylets of one machine."""

from __future__ import annotations

import functools
import logging
import os
import signal
import time

import fakes
import psutil
import pytest
import torch
from processes import wait_until

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.bench.models import FAMILIES
from wan_patches.executor import Bounds, WorkerDied, WorkerHung

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'wan-patches[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from wan_patches.executor.ray import RayParallelExecutor  # noqa: E402

pytestmark = pytest.mark.timeout(240)

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster():
    """A head and another node, with a place for one worker each."""
    before = set(psutil.Process().children(recursive=True))
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    cluster.other = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=30)
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
        assert "is tried again: worker" in caplog.text
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
    with RayParallelExecutor(
        functools.partial(fakes.family, name, dtype), layout=layout, devices=2, threads=1, strategy="STRICT_SPREAD"
    ) as executor:
        assert len({worker.pid for worker in executor.health().workers}) == 2
        for seed, video in enumerate(expected):
            assert identical(executor.submit(**FAMILIES[name].inputs(seed=seed)).result(200).frames, video)


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
        wait_until(lambda: "workers wait for a place in the Ray cluster" in caplog.text, 120)
        assert executor.health().serving == 0
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
