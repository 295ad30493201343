"""The example's service over real HTTP: clients of all kinds, and workers that die."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import io
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import psutil
import pytest
from films import COLOURS, film
from processes import wait_until
from prometheus_client.parser import text_string_to_metric_families

from wan_patches import ParallelExecutor
from wan_patches.executor import ExecutorBroken, Health, WorkerDied, WorkerHealth
from wan_patches.testing.families import FAMILIES

pytestmark = pytest.mark.timeout(120)

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "service.py"
ORDER = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service():
    spec = importlib.util.spec_from_file_location("service_of_the_examples", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class FakeExecutor:
    """Two workers that are done at once, or else when the test says so."""

    def __init__(self, at_once: bool = False) -> None:
        self.at_once, self.requests = at_once, []
        self.states = ["idle", "idle"]
        self.refuses: Exception | None = None

    def submit(self, *, output_type: str, timeout: float, queue_timeout: float, **call) -> Future:
        if self.refuses is not None:
            raise self.refuses
        assert output_type == "pil"
        request: Future = Future()
        request.call, request.limits = call, (timeout, queue_timeout)  # type: ignore[attr-defined]
        self.requests.append(request)
        if self.at_once:
            self.finish()
        return request

    def open(self) -> list[Future]:
        return [request for request in self.requests if not request.done()]

    def finish(self) -> None:
        for request in self.open():
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled meanwhile
                request.set_result(film(request.call["prompt"]))  # type: ignore[attr-defined]

    def health(self) -> Health:
        workers = [
            WorkerHealth(rank, "cpu", state, 1.0, 100 + rank, None, rank, None)
            for rank, state in enumerate(self.states)
        ]
        count = len(self.open())
        return Health(tuple(workers), max(0, count - 2), min(2, count))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        running = self.open()[:2]
        for request in self.open()[2:]:
            if cancel_futures:
                request.cancel()
        concurrent.futures.wait(running, timeout)
        for request in self.open():
            request.cancel()


class Site:
    """A server in a thread of its own."""

    def __init__(self, service, executor, limits: dict[str, float] | None = None, **call) -> None:
        self.executor = executor
        self.service = service.Service(executor, service.Limits(**{"drain": 0.2} | (limits or {})), **call)
        self.server = service.Server(self.service, port=0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def order(self, prompt: str = "red") -> httpx.Response:
        return self.client.post("/", content=prompt)

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(sent)
        return connection

    def metrics(self) -> dict:
        """The value of each sample, by its name and its labels, in the order of their names."""
        samples = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                samples[(sample.name, *(value for _, value in sorted(sample.labels.items())))] = sample.value
        return samples

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.client.close()
        assert not self.thread.is_alive()


@pytest.fixture
def site(service):
    """Makes a site."""
    with contextlib.ExitStack() as stack:

        def make(at_once: bool = False, **limits) -> Site:
            made = Site(service, FakeExecutor(at_once), limits)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="module")
def prompt_site(service):
    """One for all tests that ask no more of it than an answer."""
    made = Site(service, FakeExecutor(at_once=True), guidance_scale=5.0)
    yield made
    made.close()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = bytearray()
    with connection, contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            received += chunk
    return bytes(received)


def assert_film(body: bytes, colour: str) -> None:
    with av.open(io.BytesIO(body)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (48, 64, 3)
    assert abs(frames[-1].astype(int) - COLOURS[colour]).max() < 8


# What is answered


@pytest.mark.quick
def test_a_prompt_becomes_an_mp4(prompt_site):
    answer = prompt_site.order("green")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert_film(answer.content, "green")
    request = prompt_site.executor.requests[-1]
    assert request.call == {"prompt": "green", "guidance_scale": 5.0}
    assert request.limits == (600.0, 300.0)


def test_options_go_to_the_pipeline_and_a_seed_becomes_a_generator(prompt_site):
    options = {"prompt": "blue", "height": 480, "width": 832, "num_frames": 33, "guidance_scale": 3.5}
    answer = prompt_site.client.post("/", json=options | {"seed": 42})
    assert_film(answer.content, "blue")
    call = prompt_site.executor.requests[-1].call
    assert call.pop("generator").initial_seed() == 42
    assert call == options


@pytest.mark.parametrize(
    ("status", "body", "headers", "told"),
    [
        (400, b"{", JSON, "Invalid JSON"),
        (400, b"[" * 60000, JSON, "Invalid JSON"),
        (400, b"\xff", {}, "utf-8"),
        (422, b"", {}, "prompt: String should have at least 1 character"),
        (422, b"", {"Content-Type": "text/plain"}, "prompt: "),
        (422, b"x" * 4001, {}, "prompt: "),
        (422, b"[]", JSON, "object"),
        (422, b"{}", JSON, "prompt: Field required"),
        (422, b'{"prompt": 3}', JSON, "prompt: "),
        (422, b'{"prompt": "red", "output_type": "latent"}', JSON, "output_type: Extra inputs are not permitted"),
        (422, b'{"prompt": "red", "height": 17}', JSON, "height: "),
        (422, b'{"prompt": "red", "guidance_scale": NaN}', JSON, "guidance_scale: "),
        (422, b'{"prompt": "red", "seed": 1e999}', JSON, "seed: "),
        (413, b"x" * (20 << 20), {}, "65536 bytes"),
        (413, b'{"prompt": "red"}'.ljust(65537), JSON, "65536 bytes"),
        (200, b'{"prompt": "red"}'.ljust(65536), JSON, ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_order_is_refused_with_the_reason(prompt_site, status, body, headers, told):
    answer = prompt_site.client.post("/", content=body, headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert told in answer.text


def test_a_body_of_unknown_length_is_limited_too(prompt_site):
    answer = prompt_site.client.post("/", content=(b"x" * 65536 for _ in range(100)))
    assert answer.status_code == 413


@pytest.mark.quick
def test_other_methods_and_paths_are_refused(prompt_site):
    answer = prompt_site.client.get("/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert prompt_site.client.put("/", content="red").status_code == 405
    assert prompt_site.client.post("/health").status_code == 405
    assert prompt_site.client.get("/videos").status_code == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"make me a video\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nred",
        ORDER.replace(b"%d", b"-3") + b"red",
        ORDER.replace(b"%d", b"many") + b"red",
        b"POST / HTTP/1.1\r\nHost: here\r\nX: " + b"x" * (1 << 17),
    ],
    ids=["no HTTP", "no host", "negative length", "no length", "long head"],
)
def test_malformed_http_is_told_so(prompt_site, sent):
    assert read_all(prompt_site.connect(sent)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (TimeoutError("request 3 took longer"), 504, "the video took too long"),
        (WorkerDied(-9, 1, 3, ("a secret",)), 502, "the process that made the video has died"),
        (ExecutorBroken("no worker is left"), 503, "no worker is there"),
        (ValueError("a secret"), 500, "the pipeline failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_have_a_status_each(site, error, status, told):
    made = site()
    with ThreadPoolExecutor(1) as pool:
        order = pool.submit(made.order)
        wait_until(made.executor.open)
        made.executor.requests[0].set_exception(error)
        answer = order.result(60)
    assert (answer.status_code, answer.text) == (status, f"{told}\n")
    assert ("retry-after" in answer.headers) == (status == 503)


def test_an_executor_that_takes_nothing_is_told_so(prompt_site):
    prompt_site.executor.refuses = ExecutorBroken("no worker has been there for long")
    try:
        answer = prompt_site.order()
    finally:
        prompt_site.executor.refuses = None
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


@pytest.mark.quick
def test_health_is_that_of_the_executor(site):
    made = site(at_once=True)
    made.executor.states = ["down", "idle"]
    answer = made.client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["serving"] == 1
    assert [worker["state"] for worker in answer.json()["workers"]] == ["down", "idle"]
    made.executor.states = ["down", "loading"]
    answer = made.client.get("/health")
    assert (answer.status_code, answer.json()["serving"]) == (503, 0)


@pytest.mark.quick
def test_prometheus_can_scrape_it(site):
    made = site()
    made.executor.states = ["down", "idle"]
    assert made.client.post("/", content=b"\xff").status_code == 400
    with ThreadPoolExecutor(3) as pool:
        orders = [pool.submit(made.order) for _ in range(3)]
        wait_until(lambda: len(made.executor.open()) == 3)
        found = made.metrics()
        assert (found[("wan_requests_waiting",)], found[("wan_requests_running",)]) == (1, 2)
        assert (found[("wan_worker_up", "cpu", "0")], found[("wan_worker_up", "cpu", "1")]) == (0, 1)
        assert found[("wan_worker_restarts_total", "cpu", "1")] == 1
        made.executor.finish()
        assert {order.result(60).status_code for order in orders} == {200}
    found = made.metrics()
    assert found[("wan_answer_seconds_count", "200")] == 3
    assert found[("wan_answer_seconds_count", "400")] == 1
    answer = made.client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


# Many clients, and slow ones


def test_of_200_clients_as_many_wait_as_may(site):
    made = site(waiting=16)

    async def all_of_them() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        url = f"http://127.0.0.1:{made.port}/"
        async with httpx.AsyncClient(timeout=90, limits=limits, trust_env=False) as client:
            orders = [asyncio.ensure_future(client.post(url, content="red")) for _ in range(200)]
            while sum(order.done() for order in orders) < 182:
                await asyncio.sleep(0.02)
            made.executor.finish()
            return await asyncio.gather(*orders)

    answers = asyncio.run(all_of_them())
    assert Counter(answer.status_code for answer in answers) == {200: 18, 503: 182}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    for answer in answers:
        if answer.status_code == 200:
            assert_film(answer.content, "red")


def test_slow_clients_are_not_waited_for_and_hinder_nobody(site):
    made = site(at_once=True, read=1.5)
    beginnings = [b"", ORDER[:20], ORDER % 10 + b"half"]
    connections = [made.connect(beginning) for beginning in beginnings for _ in range(50)]
    assert made.order().status_code == 200
    answers = [read_all(connection) for connection in connections]
    assert {answer[:13] for answer in answers} == {b"HTTP/1.1 408 "}
    assert len(made.executor.requests) == 1


def test_connections_that_are_too_many_are_closed(site):
    made = site(at_once=True, connections=30)
    connections = [made.connect() for _ in range(40)]
    wait_until(lambda: len(select.select(connections, [], [], 0)[0]) == 10)
    assert len(made.server.server_state.connections) == 30
    for connection in connections:
        connection.close()
    wait_until(lambda: not made.server.server_state.connections)
    assert made.order().status_code == 200


def test_a_byte_now_and_then_is_slow_too(site):
    made = site(at_once=True, read=1.0)
    connections = [made.connect(), made.connect(ORDER % 4000)]
    began = time.monotonic()
    answers = [b"", b""]
    while not all(answers):
        assert time.monotonic() - began < 30
        for nth, connection in enumerate(connections):
            if not answers[nth]:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"x")
                connection.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    answers[nth] = connection.recv(1000)
    assert {answer[:13] for answer in answers} == {b"HTTP/1.1 408 "}
    for connection in connections:
        connection.close()


def test_an_answer_that_nobody_takes_is_dropped(service, site, monkeypatch):
    monkeypatch.setattr(service, "to_mp4", lambda frames: bytes(64 << 20))
    made = site(at_once=True, write=0.5)
    connection = made.connect(ORDER % 3 + b"red")
    assert connection.recv(13) == b"HTTP/1.1 200 "
    wait_until(lambda: not made.server.server_state.connections)
    assert len(read_all(connection)) < 64 << 20


def test_others_are_answered_while_a_video_is_encoded(service, site, monkeypatch):
    encoded = threading.Event()
    monkeypatch.setattr(service, "to_mp4", lambda frames: encoded.wait(60) and b"a video")
    made = site(at_once=True)
    with ThreadPoolExecutor(1) as pool:
        order = pool.submit(made.order)
        wait_until(lambda: made.executor.requests)
        try:
            assert made.client.get("/health", timeout=20).status_code == 200
            assert not order.done()
        finally:
            encoded.set()
        assert order.result(60).content == b"a video"


def test_who_hangs_up_has_the_video_cancelled(site):
    made = site()
    for _ in range(4):  # two of them wait
        with made.connect(ORDER % 3 + b"red"):
            wait_until(made.executor.open)
        wait_until(lambda: not made.executor.open())
    connections = [made.connect(ORDER % 3 + b"red") for _ in range(50)]
    wait_until(lambda: made.client.get("/health").json()["waiting"] == 16)
    for connection in connections:
        connection.close()
    wait_until(lambda: not made.executor.open())
    assert all(request.cancelled() for request in made.executor.requests)
    wait_until(lambda: made.metrics()[("wan_answer_seconds_count", "499")] == len(made.executor.requests))


# The end


@pytest.mark.quick
def test_what_runs_is_finished_at_the_end_and_all_else_refused(site):
    made = site(drain=60.0)
    with ThreadPoolExecutor(3) as pool:
        orders = []
        for count in (1, 2, 3):
            orders.append(pool.submit(made.order))
            wait_until(lambda count=count: len(made.executor.open()) == count)
        made.server.handle_exit(signal.SIGTERM, None)
        waited = orders[2].result(60)
        assert (waited.status_code, "retry-after" in waited.headers) == (503, True)
        health = made.client.get("/health")
        assert (health.status_code, health.json()["ending"]) == (503, True)
        assert made.order().status_code == 503
        made.executor.finish()
        assert [order.result(60).status_code for order in orders[:2]] == [200, 200]
    made.thread.join(60)
    with pytest.raises(ConnectionError):
        made.connect()


def test_the_end_does_not_wait_for_long(site):
    made = site(drain=0.3)
    with ThreadPoolExecutor(1) as pool:
        order = pool.submit(made.order)
        wait_until(made.executor.open)
        made.server.handle_exit(signal.SIGTERM, None)
        answer = order.result(60)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    made.thread.join(60)
    assert not made.thread.is_alive()


# With pipelines


@pytest.mark.usefixtures("one_thread")
def test_an_order_goes_through_a_pipeline_of_diffusers(service):
    tiny = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
    with ParallelExecutor(FAMILIES["wan_t2v"].build, devices="cpu") as executor:
        made = Site(service, executor, **tiny)
        try:
            answer = made.client.post("/", json={"prompt": "a fox", "seed": 1, "num_frames": 9})
            with av.open(io.BytesIO(answer.content)) as video:
                frames = list(video.decode(video=0))
            assert (len(frames), frames[0].width, frames[0].height) == (9, 48, 32)
            assert made.client.get("/health").json()["serving"] == 1

            def there_are(running: int, waiting: int) -> bool:
                health = made.client.get("/health").json()
                return (health["running"], health["waiting"]) == (running, waiting)

            made.service.call["num_inference_steps"] = 900
            with made.connect(ORDER % 5 + b"a fox"):
                wait_until(lambda: there_are(running=1, waiting=0))
                for _ in range(3):  # who has gone keeps nobody from the queue
                    with made.connect(ORDER % 5 + b"a cat"):
                        wait_until(lambda: there_are(running=1, waiting=1))
                    wait_until(lambda: there_are(running=1, waiting=0))
            wait_until(lambda: there_are(running=0, waiting=0))  # long before its last step
            assert made.metrics()[("wan_answer_seconds_count", "499")] == 4
        finally:
            made.close()


def test_workers_are_killed_under_load_and_the_service_ends_with_all_of_them():
    command = [sys.executable, str(HERE / "serve_films.py"), str(EXAMPLE), "0.3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        port = None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                port = found[1]
                break
        assert port, "".join(lines)
        rest = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        rest.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90, trust_env=False) as client:
            workers = _load_and_kill(client)
            with ThreadPoolExecutor(20) as pool:
                orders = [pool.submit(client.post, "/", content="blue") for _ in range(20)]
                wait_until(lambda: client.get("/health").json()["waiting"] > 2)
                process.send_signal(signal.SIGTERM)
                answers = [order.result(60) for order in orders]
        assert process.wait(60) == -signal.SIGTERM, "".join(lines)
        counted = Counter(answer.status_code for answer in answers)
        assert counted.keys() == {200, 503}
        for answer in answers:
            if answer.status_code == 200:
                assert_film(answer.content, "blue")
        assert not psutil.wait_procs(workers, 10)[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _load_and_kill(client: httpx.Client) -> list[psutil.Process]:
    """30 orders, during which one of the two workers is killed; returns the workers there are then."""
    with ThreadPoolExecutor(30) as pool:
        orders = [pool.submit(client.post, "/", content="red") for _ in range(30)]
        wait_until(lambda: client.get("/health").json()["running"] == 2)
        os.kill(client.get("/health").json()["workers"][0]["pid"], signal.SIGKILL)
        answers = [order.result(60) for order in orders]
    counted = Counter(answer.status_code for answer in answers)
    assert counted[200] >= 29
    assert counted[200] + counted[502] == 30
    for answer in answers[::10]:
        if answer.status_code == 200:
            assert_film(answer.content, "red")
    wait_until(lambda: client.get("/health").json()["serving"] == 2)
    assert 'wan_worker_restarts_total{device="cpu",rank="0"} 1.0' in client.get("/metrics").text
    return [psutil.Process(worker["pid"]) for worker in client.get("/health").json()["workers"]]
