"""Kernels without a GPU: run by Triton's interpreter, in a process of its own, and compiled, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Runs the tests of a file in `interpreted`. Triton decides at import whether it interprets."""
    pytest.importorskip("triton")

    def run(name: str) -> None:
        path = Path(__file__).parent / "interpreted" / f"{name}.py"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", str(path), "-p", "no:cacheprovider", "--tb=short"],
            capture_output=True,
            text=True,
            timeout=500,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout, done.stdout

    return run


@pytest.fixture
def ptx(compiled) -> Callable[..., str]:
    """What a call compiles a kernel to, for an H100: `ptx(module, name of the kernel, call)`; nothing is launched."""
    return lambda module, name, call: compiled(module, name, call).asm["ptx"]


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """A kernel as a call compiles it: `compiled(module, name of the kernel, call, capability)`; nothing is launched."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def build(module: types.ModuleType, name: str, call: Callable[[], object], capability: int = 90) -> Any:
        kernel, launches = getattr(module, name), []
        grids = defaultdict(lambda: lambda *args, **named: launches.append((args, named)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, grids)
            call()
        ((args, named),) = launches
        given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in named.items() if k in kernel.arg_names}
        types_, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(kernel.params):  # as Triton specialises
            value = given[parameter.name]
            free = not parameter.is_constexpr and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and isinstance(value, int) and value == 1):
                types_[parameter.name], constants[i,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types_[parameter.name] = f"*{_ELEMENTS[value.dtype]}"
                aligned[i,] = value.data_ptr() % 16 == 0
            else:
                types_[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                aligned[i,] = free and isinstance(value, int) and value % 16 == 0
        attributes = {i: [["tt.divisibility", 16]] for i, yes in aligned.items() if yes}
        source = ASTSource(fn=kernel, signature=types_, constexprs=constants, attrs=attributes)
        options = {k: v for k, v in named.items() if k not in kernel.arg_names}
        return compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    return build


_ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
