"""The registered patches and the user's selection; the only module that installs and removes patches.

Patches are plain values, discovered through the entry-point group `wan_patches.patches`. Each belongs to one module of
another library and is installed in it all or nothing: immediately if the module is loaded, by a post-import hook
otherwise. This module is independent of tensors and models.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import logging
import sys
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import wrapt
from packaging.version import Version

from wan_patches.patching import tally
from wan_patches.patching.codeswap import functions_behind, has_fingerprint, site, stock
from wan_patches.patching.fidelity import Fidelity, gate
from wan_patches.patching.rewrite import Edit, Unknown
from wan_patches.patching.status import ACTIVE, OFF, SKIPPED, WAITING, Report, Status
from wan_patches.patching.tally import Way

logger = logging.getLogger("wan_patches")

ENTRY_POINT_GROUP = "wan_patches.patches"


class PatchError(RuntimeError):
    """Raised by `enable(strict=True)` when a selected patch cannot be installed."""


@dataclass(frozen=True)
class Target:
    """A function (`"Class.method"` or `"function"`), the edits to apply to it, and its name in older versions."""

    qualname: str
    edits: tuple[Edit, ...]
    formerly: str | None = None


@dataclass(frozen=True)
class Known:
    """A function that a patch relies on without changing it; it must have one of these fingerprints."""

    module: str
    qualname: str
    fingerprints: frozenset[str]


@dataclass(frozen=True)
class Patch:
    """A change to one module, installed all or nothing.

    name: selects the patch; patches for several modules can share a name.
    module: full name of the module to change.
    targets: the functions to change there.
    calls: the names that the edits call: name in the module's globals -> `"module:function"`, or `STOCK` for the
        original target.
    fidelity: the numerical guarantee. A selected close patch replaces the exact ones of its name in its module.
    implementations: for `status()`: what runs on each kind of device.
    requires: functions whose texts have to be known.
    optional: the targets do not exist in some versions; their absence, or the module's, is not reported.
    since: the first version of the library that has the module; one of a module's patches may state it for all.
    addition: `"module:object"`: an object that extends the module besides the edits, by `put(module)` and `take()`.
    advice: `"module:function"` that returns notes for `status()`, called if the module is loaded.
    runs_with: the name of a patch in the same module; if that one's code runs, this one's should too.
    """

    name: str
    module: str
    targets: tuple[Target, ...]
    calls: Mapping[str, object]
    fidelity: Fidelity = Fidelity.EXACT
    implementations: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[Known, ...] = ()
    optional: bool = False
    since: str | None = None
    addition: str | None = None
    advice: str | None = None
    runs_with: str | None = None


@dataclass(frozen=True)
class Place:
    """A function that a patch is currently installed in; `stock` runs the code that was installed."""

    patch: Patch
    target: Target
    function: types.FunctionType
    stock: types.FunctionType


@dataclass(frozen=True)
class Choice:
    """The selection made by one call of `enable`; `names` None means every patch."""

    names: frozenset[str] | None = None
    fidelity: Fidelity = Fidelity.EXACT
    gate: bool = True

    def wants(self, patch: Patch) -> bool:
        return (self.names is None or patch.name in self.names) and self.fidelity.allows(patch.fidelity)


def split_names(names: str | Iterable[object]) -> list[str]:
    """Splits a text, or several, into names of patches at their commas."""
    texts = [names] if isinstance(names, str) else names
    return [name.strip() for text in texts for name in str(text).split(",") if name.strip()]


class _Frame:
    """One level of `with enabled(...)`; the bottom one belongs to `enable` and `disable`."""

    def __init__(self, choice: Choice | None) -> None:
        self.choice = choice


class _Entry:
    """A patch, its state, and the functions that it is installed in."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.state, self.reason = OFF, ""
        self.functions: list[tuple[types.FunctionType, Target]] = []

    def report(self) -> Report:
        patch = self.patch
        targets = tuple(target.qualname for target in patch.targets)
        return Report(patch.name, patch.module, targets, self.state, self.reason, patch.fidelity, patch.implementations)


class Registry:
    """The patches of a process and their state. One instance backs the functions of `wan_patches`."""

    def __init__(self, patches: Iterable[Patch] | None = None) -> None:
        """Manages the given patches, or by default those that installed packages register."""
        self._lock = threading.RLock()
        self._entries = None if patches is None else [_Entry(patch) for patch in patches]
        _pass_over(entry.patch for entry in self._entries or ())
        self._broken_plugins: list[Report] = []
        self._frames = [_Frame(None)]
        self._hooked: set[str] = set()

    # Public methods

    def enable(
        self,
        patches: Iterable[str] | None = None,
        *,
        fidelity: Fidelity | str = Fidelity.EXACT,
        strict: bool = False,
        gate: bool = True,
    ) -> Status:
        """Installs patches, now and in modules that are imported later. See `wan_patches.enable`."""
        choice = self._choice(patches, fidelity, gate)
        return self._choose(self._frames[-1], choice, strict)

    def disable(self) -> None:
        """Removes every patch and restores stock's own code objects."""
        with self._lock:
            self._frames[-1].choice = None
            self._apply()

    @contextlib.contextmanager
    def enabled(
        self,
        patches: Iterable[str] | None = None,
        *,
        fidelity: Fidelity | str = Fidelity.EXACT,
        strict: bool = False,
        gate: bool = True,
    ) -> Iterator[Status]:
        """Applies `enable(...)` for the length of a `with` block, then restores the previous selection."""
        choice = self._choice(patches, fidelity, gate)
        with self._lock:
            frame = _Frame(self._frames[-1].choice)
            self._frames.append(frame)
        try:
            yield self._choose(frame, choice, strict)
        finally:
            with self._lock:  # by identity: other threads may have opened or closed frames in between
                self._frames.remove(frame)
                self._apply()

    def chosen(self) -> Choice | None:
        """Returns the selection of the last `enable`, or None if nothing is enabled."""
        return self._frames[-1].choice

    def status(self) -> Status:
        """Returns the state of every patch and the verdicts of the first-sight gate.

        Patches modules that were reloaded in the meantime first, and detects functions that other software has
        replaced.
        """
        with self._lock:
            if self._frames[-1].choice is not None:
                self._apply()
            return self._status()

    def _status(self) -> Status:
        with self._lock:
            reports = _with_ways(self._load())
            advice = tuple(line for entry in self._load() for line in _advice(entry.patch))
            return Status(tuple(reports + self._broken_plugins), tuple(gate.verdicts()), advice)

    def calls(self, since: Mapping[Way, int]) -> dict[str, tuple[int, int]]:
        """Returns, by patch, the numbers of fast calls and of all calls since the tally was `since`."""
        found: dict[str, tuple[int, int]] = {}
        for report in self.status().reports:
            new = {way: n - since.get(way, 0) for way, n in report.ways.items() if n > since.get(way, 0)}
            if new:
                counts = sum(n for way, n in new.items() if way.is_fast), sum(new.values())
                found[report.name] = tally.total((found.get(report.name, (0, 0)), counts))
        return found

    def patches(self) -> list[Patch]:
        """Returns every registered patch, whether selected or not."""
        with self._lock:
            return [entry.patch for entry in self._load()]

    def stock(self, patch: Patch, target: Target) -> list[types.FunctionType]:
        """Returns the functions behind a target of `patch` as they were before any edit; none if it is not loaded."""
        module = _loaded(patch.module)
        with self._lock, contextlib.suppress(Unknown):
            return [] if module is None else [stock(function) for function in _functions(module, target)]
        return []

    def places(self) -> list[Place]:
        """Returns the functions that patches are currently installed in."""
        with self._lock:
            return [
                Place(entry.patch, target, function, stock(function))
                for entry in self._load()
                for function, target in entry.functions
            ]

    # Finding patches

    def _load(self) -> list[_Entry]:
        if self._entries is None:
            self._entries = []
            for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                try:
                    loaded = list(point.load())
                    if wrong := [p for p in loaded if not isinstance(p, Patch)]:
                        raise TypeError(f"{wrong[0]!r} is not a wan_patches.Patch")
                    self._entries += [_Entry(patch) for patch in loaded]
                    _pass_over(loaded)
                except Exception as error:  # a broken third-party plugin must not affect other patches
                    reason = f"the plugin {point.value!r} raised {_describe(error)}"
                    self._broken_plugins.append(Report(point.name, point.value, (), SKIPPED, reason))
            if not self._entries:
                logger.warning(
                    "no patches found: copying the package is not enough, install it (pip install wan-patches)"
                )
        return self._entries

    def _choice(self, names: Iterable[str] | None, fidelity: Fidelity | str, gate: bool) -> Choice:
        try:
            fidelity = Fidelity(fidelity)
        except ValueError:
            known = ", ".join(repr(f.value) for f in Fidelity)
            raise ValueError(f"unknown fidelity {fidelity!r}; known: {known}") from None
        if names is not None:
            names = frozenset(split_names(names))
            known_names = {report.name for report in self._status().reports}
            if unknown := sorted(names - known_names):
                raise ValueError(f"unknown patch {', '.join(unknown)}; known: {', '.join(sorted(known_names))}")
        return Choice(names, fidelity, bool(gate))

    # Following imports

    def _hook_modules(self, choice: Choice, import_now: bool) -> None:
        # outside the lock: a hook can fire here, and an import can wait for another thread's import
        with self._lock:
            patches = [entry.patch for entry in self._load()]
            modules = {patch.module for patch in patches}
            fresh = modules - self._hooked
            self._hooked |= modules
        for name in sorted(fresh):  # hooks can't be unregistered; they check the selection when they fire
            wrapt.register_post_import_hook(self._on_import, name)
        for name in sorted(filter(_is_importing, modules)):
            with contextlib.suppress(Exception):  # wait for the importing thread; an error there is reported there
                importlib.import_module(name)
        libraries = {patch.module.partition(".")[0] for patch in patches if not patch.optional}
        for name in sorted({patch.module for patch in patches if import_now and choice.wants(patch)}):
            library = name.partition(".")[0]
            if library not in libraries and library not in sys.modules:  # another library, which is not in use
                continue
            with contextlib.suppress(ModuleNotFoundError):  # the installed version has no such module
                importlib.import_module(name)

    def _on_import(self, module: types.ModuleType) -> None:
        try:
            with self._lock:
                if self._frames[-1].choice is None:
                    return
                before = self._skipped()
                self._apply(just_imported=module)
                _log([report for report in self._skipped() if report not in before])
        except Exception as error:  # an exception here would break the user's import
            logger.warning("could not patch %s: %s", getattr(module, "__name__", module), _describe(error))

    # Installing and removing

    def _choose(self, frame: _Frame, choice: Choice, strict: bool) -> Status:
        self._hook_modules(choice, import_now=strict)
        with self._lock:
            before = frame.choice
            frame.choice = choice
            self._apply()
            skipped = self._skipped()
            if strict and (missing := skipped + self._gone()):
                frame.choice = before
                self._apply()
                raise PatchError("; ".join(map(_why, missing)))
            if before != choice:
                _log(skipped)
            return self._status()

    def _apply(self, just_imported: types.ModuleType | None = None) -> None:
        choice = self._frames[-1].choice
        gate.enabled = choice is None or choice.gate
        entries = [e for e in self._load() if just_imported is None or e.patch.module == just_imported.__name__]
        taken: set[tuple[str, str]] = set()
        for fidelity in (Fidelity.CLOSE, Fidelity.EXACT):
            wanted: list[tuple[_Entry, types.ModuleType]] = []
            for entry in (entry for entry in entries if entry.patch.fidelity is fidelity):
                module = just_imported or _loaded(entry.patch.module)
                if choice is None or not choice.wants(entry.patch):
                    self._remove(entry)
                    entry.state, entry.reason = OFF, ""
                elif _place(entry) in taken:
                    entry.state, entry.reason = OFF, "a close form is in its place"
                elif module is None:
                    entry.state, entry.reason = WAITING, ""
                else:
                    wanted.append((entry, module))
            if fidelity is Fidelity.CLOSE:
                self._make_room(entries, {_place(entry) for entry, _ in wanted})
            self._install(wanted)
            if fidelity is Fidelity.CLOSE and choice is not None:
                close = (entry for entry in entries if entry.patch.fidelity is fidelity and choice.wants(entry.patch))
                taken = {_place(entry) for entry in close if entry.state != SKIPPED}

    def _make_room(self, entries: Iterable[_Entry], places: Collection[tuple[str, str]]) -> None:
        """Removes the exact patches that close ones replace."""
        for entry in entries:
            if entry.patch.fidelity is Fidelity.EXACT and _place(entry) in places:
                self._remove(entry)

    def _install(self, wanted: Iterable[tuple[_Entry, types.ModuleType]]) -> None:
        fresh = []
        for entry, module in wanted:
            if entry.functions and all(_holds(module, *item) for item in entry.functions):
                entry.state, entry.reason = ACTIVE, ""
            else:
                self._remove(entry)
                fresh.append((entry, module))
        shared = _put_shared(fresh)
        for entry, module in fresh:
            entry.state, entry.reason = self._install_one(entry, module)
        for function, entry, target in shared:
            if entry.state != ACTIVE:
                site(function).remove(target.edits)

    def _install_one(self, entry: _Entry, module: types.ModuleType) -> tuple[str, str]:
        """Installs a patch all or nothing; returns its state and the reason."""
        if entry.patch.optional and not any(_exists(module, target) for target in entry.patch.targets):
            return OFF, "not in this version"
        try:
            calls = _calls(entry.patch)
            for target in entry.patch.targets:
                entry.functions.append((_put(module, target, calls), target))
            if entry.patch.addition is not None:
                _addition(entry.patch).put(module)
        except Exception as error:
            self._remove(entry)
            return SKIPPED, str(error) if isinstance(error, Unknown) else f"raised {_describe(error)}"
        return ACTIVE, ""

    def _remove(self, entry: _Entry) -> None:
        for function, target in entry.functions:
            site(function).remove(target.edits)
        if entry.functions and entry.patch.addition is not None:
            _addition(entry.patch).take()
        entry.functions = []

    def _skipped(self) -> list[Report]:
        """Returns selected patches that could not be installed, and broken plugins, which may contain any patch."""
        return [entry.report() for entry in self._load() if entry.state == SKIPPED] + self._broken_plugins

    def _gone(self) -> list[Report]:
        """Returns selected patches whose modules the installed library lacks, after an attempt to import them."""
        patches = [entry.patch for entry in self._load()]
        since = {patch.module: patch.since for patch in patches if patch.since is not None}
        return [
            replace(entry.report(), reason="there is no such module")
            for entry in self._load()
            if entry.state == WAITING
            and not entry.patch.optional
            and not _is_older(entry.patch.module.partition(".")[0], since.get(entry.patch.module))
        ]


def _pass_over(patches: Iterable[Patch]) -> None:
    """Attributes counted calls to the patched modules rather than to the packages that patched code calls."""
    for patch in patches:
        paths = [path for path in patch.calls.values() if isinstance(path, str)]
        for package in {path.partition(":")[0].partition(".")[0] for path in paths}:
            if package != patch.module.partition(".")[0]:
                tally.pass_over(package)


def _with_ways(entries: Iterable[_Entry]) -> list[Report]:
    """Returns the reports of these patches, with the tally's counts."""
    counted: dict[tuple[str, str], dict[Way, int]] = {}
    for way, calls in tally.counted().items():
        counted.setdefault((way.module, way.entry), {})[way] = calls
    found = []
    for entry in entries:
        report, patch, ways = entry.report(), entry.patch, dict[Way, int]()
        for path in {path for path in patch.calls.values() if isinstance(path, str)} if counted else ():
            ways |= counted.get((patch.module, path), {})
        found.append((replace(report, ways=ways) if ways else report, patch.runs_with))
    ran = {(report.module, report.name) for report, _ in found if report.ways}
    return [
        replace(report, note=_note(report, (report.module, beside) in ran)) if report.state == ACTIVE else report
        for report, beside in found
    ]


def _note(report: Report, beside: bool) -> str:
    """Summarises the calls of an active patch; `beside`: whether the patch it runs with was called."""
    reasons: dict[str, int] = {}
    for way, calls in report.ways.items():
        if not way.is_fast:
            reasons[way.reason] = reasons.get(way.reason, 0) + calls
    why = "; ".join(f"{reason} ({calls})" for reason, calls in sorted(reasons.items(), key=lambda item: -item[1]))
    if not report.ways:
        if beside:
            return "no call arrived: something else runs in its place"
        return "no call counted: those of compiled code are not countable" if _is_compiling() else ""
    if not report.fast:
        return f"not taken: {why}"
    return f"fast in {report.fast} of {report.calls} calls" + (f"; others: {why}" if why else "")


def _is_compiling() -> bool:
    """Whether torch has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"]["ok"])


def _is_older(library: str, version: str | None) -> bool:
    """Whether the installed library is older than `version`."""
    if version is None:
        return False
    try:
        return Version(importlib.metadata.version(library)) < Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False


def _why(report: Report) -> str:
    return f"{report.name} in {report.module}: {report.reason}"


def _log(skipped: list[Report]) -> None:
    if skipped:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        logger.warning("left stock code alone: %s%s; see wan_patches.status()", _why(skipped[0]), more)


def _place(entry: _Entry) -> tuple[str, str]:
    return entry.patch.name, entry.patch.module


def _calls(patch: Patch) -> dict[str, object]:
    """Returns the functions that a patch's edits call, after checking its requirements."""
    for known in patch.requires:
        _check(known)
    return {name: _resolve(path) for name, path in patch.calls.items()}


def _put_shared(
    wanted: Iterable[tuple[_Entry, types.ModuleType]],
) -> list[tuple[types.FunctionType, _Entry, Target]]:
    """Applies the edits of several patches to the functions they share in one rewrite; returns what was applied.

    This avoids parsing and compiling a function once for each patch. If any edit does not recognise the code, the
    function is left unchanged, and the patches are then installed one by one.
    """
    found: dict[types.FunctionType, list[tuple[_Entry, Target]]] = {}
    for entry, module in wanted:
        for target in entry.patch.targets:
            with contextlib.suppress(Unknown):
                for function in _functions(module, target)[:1]:
                    found.setdefault(function, []).append((entry, target))
    put = []
    for function, parts in found.items():
        if len({id(entry) for entry, _ in parts}) > 1:
            with contextlib.suppress(Exception):  # the failing patch is identified when they are installed one by one
                calls = {name: value for entry, _ in parts for name, value in _calls(entry.patch).items()}
                site(function).add(tuple(edit for _, target in parts for edit in target.edits), calls)
                put += [(function, entry, target) for entry, target in parts]
    return put


def _put(module: types.ModuleType, target: Target, calls: dict[str, object]) -> types.FunctionType:
    """Applies the edits to the first function behind the target that they recognise, the module's own first."""
    reasons = []
    for function in _functions(module, target):
        try:
            site(function).add(target.edits, calls)
        except Unknown as error:
            reasons.append(str(error))
        else:
            return function
    raise Unknown(f"{target.qualname}: {reasons[0] if reasons else 'not a Python function'}")


def _holds(module: types.ModuleType, function: types.FunctionType, target: Target) -> bool:
    return function in _functions(module, target) and site(function).holds(target.edits)


def _functions(module: types.ModuleType, target: Target) -> list[types.FunctionType]:
    """Returns the functions behind a target, the module's own first."""
    renamed = target.formerly is not None and not _exists(module, target, older=False)
    name = target.formerly if renamed else target.qualname
    home = getattr(module, "__file__", None)
    functions = functions_behind(_attribute(module, str(name)), home)
    return sorted(functions, key=lambda function: function.__code__.co_filename != home)


def _exists(module: types.ModuleType, target: Target, older: bool = True) -> bool:
    for name in [target.qualname] + [target.formerly] * older:
        with contextlib.suppress(Unknown):
            return name is not None and _attribute(module, name) is not None
    return False


def _addition(patch: Patch) -> Any:
    return _resolve(patch.addition)


def _advice(patch: Patch) -> list[str]:
    if patch.advice is None or _loaded(patch.module) is None:
        return []
    try:
        return list(_resolve(patch.advice)())  # type: ignore[operator]
    except Exception as error:  # advice must not raise
        return [f"{patch.advice} raised {_describe(error)}"]


def _check(known: Known) -> None:
    module = importlib.import_module(known.module)
    behind = functions_behind(_attribute(module, known.qualname), getattr(module, "__file__", None))
    if not any(has_fingerprint(function, known.fingerprints) for function in behind):
        raise Unknown(f"it relies on {known.qualname}, whose text is not known")


def _attribute(module: types.ModuleType, qualname: str) -> object:
    value: object = module
    for name in qualname.split("."):
        try:
            value = inspect.getattr_static(value, name)
        except AttributeError:
            raise Unknown(f"there is no {qualname} in the installed {module.__name__}") from None
    return value


def _resolve(path: object) -> object:
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _loaded(name: str) -> types.ModuleType | None:
    return None if _is_importing(name) else sys.modules.get(name)


def _is_importing(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
