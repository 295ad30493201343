"""Compares two versions of diffusers: the functions that patches change or rely on.

The versions are read without importing them, from a wheel or from a folder that contains `diffusers/` (site-packages,
or `src` of a checkout).
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from wan_patches.patching import fingerprints
from wan_patches.patching.registry import Patch
from wan_patches.patching.rewrite import Edit, Unknown, fingerprint

KNOWN, ABSENT = "known", "-"


class Source:
    """The source text of a library's modules.

    Raises `ValueError` if `path` does not contain the library.
    """

    def __init__(self, path: Path, library: str = "diffusers") -> None:
        try:
            self._root: Any = zipfile.Path(path) if path.is_file() else path
        except zipfile.BadZipFile:
            raise ValueError(f"{path} is neither a wheel nor a folder") from None
        text = self._text(library)
        if text is None:
            raise ValueError(f"{path} contains no {library}/: give a wheel, site-packages, or src of a checkout")
        found = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
        self.version = found[1] if found else str(path)
        self._module = functools.cache(self._read)

    def function(self, module: str, qualname: str) -> tuple[ast.FunctionDef, str] | None:
        """Returns a function, or a method of a class or its bases, with its source text."""
        tree, text = self._module(module)
        *classes, name = qualname.split(".")
        body: list[ast.stmt] = tree.body
        for cls in classes:
            found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == cls), None)
            if found is None:
                return None
            body, bases = found.body, found.bases
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node, ast.get_source_segment(text, node) or ""
        for base in bases if classes else ():
            if isinstance(base, ast.Name) and (inherited := self._inherited(module, tree, base.id, name)):
                return inherited
        return None

    def _inherited(self, module: str, tree: ast.Module, base: str, name: str) -> tuple[ast.FunctionDef, str] | None:
        if any(isinstance(node, ast.ClassDef) and node.name == base for node in tree.body):
            return self.function(module, f"{base}.{name}")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == base for alias in node.names):
                package = ".".join(module.split(".")[: -node.level]) if node.level else ""
                return self.function(".".join(filter(None, (package, node.module))), f"{base}.{name}")
        return None

    def _read(self, module: str) -> tuple[ast.Module, str]:
        text = self._text(module) or ""
        return ast.parse(text), text

    def _text(self, module: str) -> str | None:
        *folders, name = module.split(".")
        for parts in ((*folders, f"{name}.py"), (*folders, name, "__init__.py")):
            path = self._root.joinpath(*parts)
            if path.is_file():
                return str(path.read_text(encoding="utf-8"))
        return None


@dataclass(frozen=True)
class Function:
    """A function in both versions.

    patches: names of the patches that change it or rely on it; empty if only other code of this package checks it.
    old, new: `KNOWN`, `ABSENT`, or the reason why the text is not known.
    diff: lines of a unified diff; empty if the texts are equivalent.
    """

    module: str
    qualname: str
    patches: tuple[str, ...]
    old: str
    new: str
    diff: tuple[str, ...] = field(repr=False)

    @property
    def is_lost(self) -> bool:
        """Whether the function is known in the old version and unknown, or absent, in the new one."""
        return self.old == KNOWN != self.new


def compare(old: Source, new: Source, patches: Iterable[Patch]) -> list[Function]:
    """Compares every function that `patches` change or rely on, or that this package knows otherwise."""
    edits: dict[tuple[str, str], list[tuple[Edit, ...]]] = {}
    names: dict[tuple[str, str], set[str]] = {}
    former: dict[tuple[str, str], str] = {}
    for module, functions in fingerprints.TEXTS.items():
        names.update({(module, qualname): set() for qualname in functions})
    for patch in patches:
        for target in patch.targets:
            place = patch.module, target.qualname
            names.setdefault(place, set()).add(patch.name)
            edits.setdefault(place, []).append(target.edits)
            if target.formerly is not None:
                former[place] = target.formerly
        for known in patch.requires:
            names.setdefault((known.module, known.qualname), set()).add(patch.name)
    found = []
    for (module, qualname), used in sorted(names.items()):
        place = module, qualname
        both = [
            source.function(module, qualname) or (source.function(module, former[place]) if place in former else None)
            for source in (old, new)
        ]
        if any(both):
            before, after = (_state(module, qualname, function, edits.get(place, [])) for function in both)
            diff = _diff(both, old.version, new.version)
            found.append(Function(module, qualname, tuple(sorted(used)), before, after, diff))
    return found


def table(functions: Iterable[Function], old: Source, new: Source, *, diffs: bool = False) -> Group:
    """Returns the functions as a table; with `diffs`, followed by the changes of each."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("function", "patches", old.version, new.version):
        found.add_column(column, overflow="fold")
    parts: list[Any] = [found]
    for function in functions:
        name = f"{function.module.removeprefix('diffusers.')}.{function.qualname}"
        found.add_row(name, ", ".join(function.patches), function.old, function.new)
        if diffs and function.diff:
            parts.append("\n".join(function.diff))
    return Group(*parts)


def _state(
    module: str, qualname: str, found: tuple[ast.FunctionDef, str] | None, edits: Iterable[tuple[Edit, ...]]
) -> str:
    if found is None:
        return ABSENT
    texts = fingerprints.TEXTS.get(module, {}).get(qualname)
    if texts is not None and (text := fingerprint(found[0])) not in texts:
        return f"the text is not known (fingerprint {text})"
    for several in edits:
        node = copy.deepcopy(found[0])
        try:
            for edit in several:
                edit.apply(node)
        except Unknown as error:
            return str(error)
    return KNOWN


def _diff(both: list[tuple[ast.FunctionDef, str] | None], old: str, new: str) -> tuple[str, ...]:
    nodes = [found[0] for found in both if found]
    if len(nodes) == 2 and fingerprint(nodes[0]) == fingerprint(nodes[1]):
        return ()
    before, after = (found[1].splitlines() if found else [] for found in both)
    return tuple(difflib.unified_diff(before, after, old, new, lineterm=""))
