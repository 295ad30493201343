"""What modules of the executor import: each other in one direction, and few others of the package."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import wan_patches.executor

PACKAGE = "wan_patches.executor"
ROOT = Path(wan_patches.executor.__file__).parents[2]

#: Packages and modules beside the executor's own; `wan_patches` itself for `enable`.
ALLOWED = ("wan_patches.pipelines", "wan_patches.patching", "wan_patches.vae_parallel")
ALLOWED_ALONE = ("wan_patches", "wan_patches.bindings.output_buffers")


def modules() -> dict[str, Path]:
    """The executor's, by name."""
    found = {}
    for path in (ROOT / PACKAGE.replace(".", "/")).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """The modules of this package that the file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if _is_module(name)}
            found |= inner if len(inner) == len(names) else inner | {str(node.module)}
    return {name for name in found if name.split(".")[0] == "wan_patches"}


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_modules_of_the_executor_import_each_other_in_one_direction():
    known = modules()
    graph = {name: {other for other in imported(path) if other in known} for name, path in known.items()}
    assert f"{PACKAGE}.layouts" in graph[f"{PACKAGE}.session"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_executor_imports_little_else_of_the_package():
    others = {name for path in modules().values() for name in imported(path) if not name.startswith(PACKAGE)}
    assert "wan_patches.bindings.output_buffers" in others
    strangers = {name for name in others if not name.startswith(ALLOWED) and name not in ALLOWED_ALONE}
    assert not strangers
