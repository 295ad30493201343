"""Runs probes in other processes, so that an import that fails or crashes is a result and not the end of the caller."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import wan_patches

_MARK = "wan-patches probe: "
_ASK = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from wan_patches.diagnostics.doctor import probes; probes._answer()"
)


@dataclass(frozen=True)
class Answer:
    """The facts that a probe found, or None and the errors that ended it, each caused by the next one."""

    facts: Mapping[str, Any] | None
    errors: tuple[str, ...] = ()


def ask(probe: Callable[[], Mapping[str, Any]], environment: Mapping[str, str], timeout: float) -> Answer:
    """Calls a function of this module in a separate process.

    Args:
        probe: returns a value that JSON can represent.
        environment: variables to set in addition to those of this process.
        timeout: seconds.
    """
    command = [sys.executable, "-c", _ASK, json.dumps([str(path) for path in sys.path]), probe.__name__]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=os.environ | environment,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, (f"no answer within {timeout:g} seconds",))
    except OSError as error:
        return Answer(None, (f"Python cannot be started: {error}",))
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            answer = json.loads(line.removeprefix(_MARK))
            return Answer(answer["facts"], tuple(answer["errors"]))
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            return Answer(None, (f"the process was killed by {signal.Signals(-done.returncode).name}",))
    last = done.stderr.strip().splitlines()[-1:]
    return Answer(None, tuple(last or [f"the process ended with status {done.returncode}"]))


def _answer() -> None:
    """Runs in the probe's process."""
    try:
        answer: dict[str, Any] = {"facts": globals()[sys.argv[2]](), "errors": []}
    except Exception as error:
        answer = {"facts": None, "errors": chain(error)}
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


def chain(error: BaseException | None) -> list[str]:
    """Returns an error and its causes, one line each."""
    lines: list[str] = []
    while error is not None and len(lines) < 8:
        message = " ".join(str(error).split())
        lines.append(f"{type(error).__name__}: {message}" if message else type(error).__name__)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines


# Probes


def torch_facts() -> dict[str, Any]:
    """Returns torch's version, threads and devices: for each kind, the names of the usable devices."""
    import torch

    devices = {kind: _device_names(torch, kind) for kind in ("cuda", "npu", "xpu", "mps")}
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "built_for": "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "",
        "devices": {kind: names for kind, names in devices.items() if names},
    }


def _device_names(torch: Any, kind: str) -> list[str]:
    backend = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    try:
        if backend is None or not backend.is_available():
            return []
        count = 1 if kind == "mps" else backend.device_count()
        return [backend.get_device_name(n) if hasattr(backend, "get_device_name") else kind for n in range(count)]
    except Exception as error:
        return [chain(error)[0]]


def kernel_facts() -> dict[str, Any]:
    """Launches a kernel on the first CUDA device; returns whether it has the bits of torch's operations.

    Raises what Triton raises if it cannot be imported, or cannot build or launch the kernel.
    """
    import torch

    from wan_patches.ops.triton.modulation import gated_residual

    generator = torch.Generator("cpu").manual_seed(0)
    x, y = torch.randn(2, 1, 64, 1024, generator=generator).to("cuda", torch.bfloat16)
    gate = torch.randn(1, 1, 1024, generator=generator).to("cuda")
    expected = (x.float() + y.float() * gate).to(x.dtype)
    return {"is_exact": torch.equal(gated_residual(x, y, gate), expected)}


def patch_facts() -> dict[str, Any]:
    """Returns the state of every patch after importing its module, and the errors of failed imports."""
    errors: dict[str, list[str]] = {}
    for report in wan_patches.enable().reports:
        if report.state == "skipped" or report.module in errors:  # plugins that could not be loaded have no module
            continue
        try:
            importlib.import_module(report.module)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{report.module}.".startswith(f"{missing}."):  # else: not in this version
                errors[report.module] = chain(error)
    reports = [
        {
            "name": report.name,
            "module": report.module,
            "state": report.state,
            "reason": report.reason,
            "fidelity": report.fidelity.value,
        }
        for report in wan_patches.status().reports
    ]
    functions = Counter(place.patch.name for place in wan_patches._registry.places())
    return {"reports": reports, "errors": errors, "functions": functions}
