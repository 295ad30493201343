"""Reads the schemas of the operations that are called here from torch-npu's wheels, and writes `schemas.json`.

    python -m wan_patches.ops.npu.refresh 2.13.0 2.14.0       # versions, downloaded with pip
    python -m wan_patches.ops.npu.refresh torch_npu-....whl   # or local wheels

The schemas are read as text from the library in which torch_npu registers them; nothing in a wheel is run or installed.
The YAML files in a wheel are not used, because their argument names differ from the registered ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

FUNCTIONS = ("npu_fusion_attention", "npu_layer_norm_eval", "npu_rms_norm", "npu_rotary_mul")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
PATH = Path(__file__).with_name("schemas.json")


def read(wheel: Path, functions: Iterable[str] = FUNCTIONS) -> dict[str, str]:
    """Returns the schema of each function in a wheel.

    Raises:
        LookupError: the wheel has no schema of a function, or several.
    """
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    found = {}
    for name in functions:
        pattern = rb"(?<![\w.])" + name.encode() + rb"\([^()\x00]*(?:\([^()\x00]*\)[^()\x00]*)*\) -> [ -~]+"
        schemas = {match.decode() for match in re.findall(pattern, library)}
        if len(schemas) != 1:
            raise LookupError(f"{wheel.name} has {len(schemas)} schemas of {name}: {sorted(schemas)}")
        found[name] = schemas.pop()
    return found


def version_of(wheel: Path) -> str:
    """Returns the version in the name of a wheel."""
    return wheel.name.split("-")[1]


def schemas() -> dict[str, dict[str, str]]:
    """Returns the contents of `schemas.json`: the schema of each function, by version of torch-npu."""
    found: dict[str, dict[str, str]] = json.loads(PATH.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m wan_patches.ops.npu.refresh", description=__doc__)
    parser.add_argument("wheels", nargs="+", help="versions of torch-npu, or paths of its wheels")
    known = schemas() if PATH.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for given in parser.parse_args(arguments).wheels:
            wheel = Path(given) if given.endswith(".whl") else _download(given, Path(folder))
            known[version_of(wheel)] = read(wheel)
    ordered = {version: known[version] for version in sorted(known, key=_numbers)}
    PATH.write_text(json.dumps(ordered, indent=2) + "\n")


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder / version), f"torch-npu=={version}"], check=True)
    return next((folder / version).glob("torch_npu-*.whl"))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


if __name__ == "__main__":
    main()
