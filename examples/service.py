"""A video service over one executor: `pip install "wan-patches[service]"`, `python examples/service.py MODEL [PORT]`.

    curl --data-binary "a fox in the snow" localhost:8000/ > fox.mp4
    curl --json '{"prompt": "a fox in the snow", "num_frames": 33, "seed": 42}' localhost:8000/ > fox.mp4
    curl localhost:8000/health
    curl localhost:8000/metrics

Who hangs up before the video is there has it cancelled, and the device works for the next one. On SIGTERM or Ctrl-C
what runs is finished and all else refused; a second one ends everything at once. Only this machine can reach the
service: TLS and passwords are the work of a proxy in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import math
import signal
import sys
import time

import av
import torch
import uvicorn
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

import wan_patches
from wan_patches import ParallelExecutor
from wan_patches.executor import ExecutorBroken, WorkerDied

log = logging.getLogger("uvicorn.error")  # where the server's own messages go
RETRY = {"Retry-After": "30"}
FAILURES = {
    ClientDisconnect: (499, "the client has gone"),
    TimeoutError: (504, "the video took too long"),
    ExecutorBroken: (503, "no worker is there"),
    WorkerDied: (502, "the process that made the video has died"),
    Exception: (500, "the pipeline failed"),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    connections: int = 300  # at a time; well below the number of open files that the system allows (`ulimit -n`)
    body: int = 64 << 10  # bytes of a request
    waiting: int = 16  # requests that no worker has begun
    read: float = 10.0  # seconds for a client to send its request
    write: float = 60.0  # for a client to take its answer
    queue: float = 300.0  # for a request to wait
    run: float = 600.0  # for a request to run
    drain: float = 120.0  # for those that run when the service is told to end


class Order(BaseModel, extra="forbid"):
    """What a client may choose, by the pipeline's names."""

    prompt: str = Field(min_length=1, max_length=4000)
    negative_prompt: str | None = Field(None, max_length=4000)
    height: int | None = Field(None, ge=16, le=1280, multiple_of=16)
    width: int | None = Field(None, ge=16, le=1280, multiple_of=16)
    num_frames: int | None = Field(None, ge=1, le=121)
    num_inference_steps: int | None = Field(None, ge=1, le=50)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=0, lt=2**63)


def to_mp4(frames, fps: int = 16) -> bytes:
    """PIL images as a video (H.264)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return file.getvalue()


async def read(request: Request, limit: int) -> Order:
    """The order that a request holds, as JSON or as nothing but the prompt."""
    body = b""
    async for chunk in request.stream():  # to the end: who is cut off while sending never sees the answer
        body = body + chunk if len(body) <= limit else body
    if len(body) > limit:
        raise HTTPException(413, f"a request may have {limit} bytes")
    try:
        json = request.headers.get("content-type", "").startswith("application/json")
        return Order.model_validate_json(body) if json else Order(prompt=body.decode())
    except UnicodeDecodeError as error:
        raise HTTPException(400, str(error)) from None
    except ValidationError as error:
        problems = error.errors()
        status = 400 if problems[0]["type"] == "json_invalid" else 422
        told = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".lstrip(": ") for problem in problems)
        raise HTTPException(status, "; ".join(told)) from None


async def unless_gone(request: Request, video: asyncio.Future):
    """What `video` gives; cancels it when the client hangs up."""
    gone = asyncio.ensure_future(request.receive())  # after the body nothing else comes
    try:
        await asyncio.wait([video, gone], return_when=asyncio.FIRST_COMPLETED)
        if not video.done():
            raise ClientDisconnect
        if video.cancelled():
            raise HTTPException(503, "the service is ending", RETRY)
        return video.result()
    finally:
        gone.cancel()
        video.cancel()  # unless it is done; at the pipeline's next step


class Service:
    """The application; `call` goes to the pipeline with every order."""

    def __init__(self, executor: ParallelExecutor, limits: Limits = Limits(), **call) -> None:
        self.executor, self.limits, self.call, self.ending = executor, limits, call, False
        self.registry = CollectorRegistry()
        self.registry.register(self)
        told, buckets = "Orders until they are answered, by HTTP status", (0.1, 1, 3, 10, 30, 60, 120, 300, 600)
        self.answers = Histogram("wan_answer_seconds", told, ["status"], buckets=buckets, registry=self.registry)
        order = Route("/", self.order, methods=["POST"])
        self.app = Starlette(routes=[order, Route("/health", self.health), Route("/metrics", self.metrics)])

    async def order(self, request: Request) -> Response:
        began = time.monotonic()
        try:
            response = Response(await self.video(request), media_type="video/mp4")
        except HTTPException as error:
            response = PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)
        except Exception as error:
            status, told = next(answer for kind, answer in FAILURES.items() if isinstance(error, kind))
            if status in (500, 502):
                log.error("an order failed", exc_info=error)  # clients are told no more than the kind
            response = PlainTextResponse(f"{told}\n", status, RETRY if status == 503 else None)
        self.answers.labels(response.status_code).observe(time.monotonic() - began)
        return response

    async def video(self, request: Request) -> bytes:
        try:
            order = await asyncio.wait_for(read(request, self.limits.body), self.limits.read)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"a request must arrive in {self.limits.read} s") from None
        if self.ending:
            raise HTTPException(503, "the service is ending", RETRY)
        if self.executor.health().waiting >= self.limits.waiting:
            raise HTTPException(503, "too many requests wait", RETRY)
        call = self.call | order.model_dump(exclude_none=True)
        if (seed := call.pop("seed", None)) is not None:
            call["generator"] = torch.Generator().manual_seed(seed)
        limits = {"timeout": self.limits.run, "queue_timeout": self.limits.queue}
        future = self.executor.submit(output_type="pil", **limits, **call)
        output = await unless_gone(request, asyncio.wrap_future(future))
        return await asyncio.to_thread(to_mp4, output.frames[0])  # others are answered meanwhile

    async def health(self, request: Request) -> Response:
        health = self.executor.health()
        serves = health.serving > 0 and not self.ending
        facts = {"serving": health.serving, "ending": self.ending, **dataclasses.asdict(health)}
        return JSONResponse(facts, 200 if serves else 503)

    async def metrics(self, request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"Content-Type": kind})

    def collect(self):
        """Of the executor, when Prometheus asks."""
        health = self.executor.health()
        yield GaugeMetricFamily("wan_requests_waiting", "Requests in the queue", health.waiting)
        yield GaugeMetricFamily("wan_requests_running", "Requests that workers work on", health.running)
        up = GaugeMetricFamily("wan_worker_up", "Whether a worker can serve", labels=["rank", "device"])
        restarts = CounterMetricFamily("wan_worker_restarts", "Times it was started again", labels=["rank", "device"])
        for worker in health.workers:
            up.add_metric([str(worker.rank), worker.device], worker.state in ("idle", "running"))
            restarts.add_metric([str(worker.rank), worker.device], worker.restarts)
        yield from (up, restarts)

    async def end(self) -> None:
        """Refuses what waits and what comes, and finishes what runs."""
        self.ending = True
        await asyncio.to_thread(self.executor.shutdown, cancel_futures=True, timeout=self.limits.drain)


class Protocol(H11Protocol):
    """uvicorn's, with limits for clients who are many, slow to ask or slow to listen; it leaves those to a proxy."""

    limits = Limits()

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self.loop.call_later(self.limits.read, self.close_unless_asked)

    def close_unless_asked(self) -> None:
        if self.cycle is None and not self.transport.is_closing():  # there is no whole head of a request
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.loop.call_later(self.limits.write, self.transport.abort)


class Server(uvicorn.Server):
    def __init__(self, service: Service, port: int = 8000) -> None:
        self.service, limits = service, service.limits
        config = uvicorn.Config(
            service.app,
            port=port,
            http=type("LimitedProtocol", (Protocol,), {"limits": limits}),
            ws="none",
            headers=[("Connection", "close")],  # one request each, as the limits of the protocol take it
            backlog=limits.connections,  # asyncio accepts so many in one go
            timeout_graceful_shutdown=math.ceil(limits.write),
        )
        super().__init__(config)

    def handle_exit(self, number, frame) -> None:
        super().handle_exit(number, frame)
        signal.signal(number, signal.SIG_DFL)  # a second one ends all at once

    async def shutdown(self, sockets=None) -> None:
        await self.service.end()  # who asks for health meanwhile is told
        await super().shutdown(sockets)


def main(model: str, port: str = "8000") -> None:
    wan_patches.enable()
    executor = ParallelExecutor.from_pretrained(model, retries=1, torch_dtype=torch.bfloat16)
    with executor, contextlib.suppress(KeyboardInterrupt):
        Server(Service(executor), int(port)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
