"""Runs somebody's script as Python itself would, in this process: what `wan-patches run` does.

The script is `__main__`: it has the arguments, the first entry of `sys.path`, the exit status and the tracebacks
that it has without this package, and processes that it starts find it where they look for it.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.machinery
import io
import logging
import multiprocessing
import os
import pkgutil
import runpy
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import wan_patches
from wan_patches.patching import tally
from wan_patches.patching.registry import Choice

logger = logging.getLogger("wan_patches")


def run(target: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
    """Runs a script as `python TARGET ARGUMENTS` does, or with `module` as `python -m TARGET ARGUMENTS` does.

    Call `wan_patches.enable()` first. This is meant to be the last that a process does: `__main__`, `sys.argv` and
    `sys.path[0]` stay the script's. The patches also reach processes that the script starts through multiprocessing,
    whatever the start method. When the process ends, a line on stderr says what was active; of several ranks
    (`RANK`, `LOCAL_RANK`) the first says it.

    Args:
        target: a file, a folder or zip file with a `__main__.py`, or the name of a module.
        arguments: what the script gets as `sys.argv[1:]`.
        module: `target` is the name of a module.

    Raises:
        SystemExit: the script's own, or status 2 (with a line on stderr) where the file cannot be read.
        BaseException: whatever the script raises; Python will print its traceback from the script's first frame on.
    """
    start = _as_module(target, arguments) if module else _as_file(target, arguments)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    # under the second name, the one that it has in children, multiprocessing looks for it here
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    _tell_at_exit()
    _reach_children()
    try:
        start(main)
    except BaseException as error:
        _hide_frames(error)
        raise


def summary() -> str:
    """Returns one line on this process: by patch, the fast calls of all; the patched functions if none was called."""
    if wan_patches._registry.chosen() is None:
        return "wan-patches: nothing is active: the script called wan_patches.disable()"
    status, places = wan_patches.status(), wan_patches._registry.places()
    parts = ["nothing was patched: no module that a patch is for was imported"]
    if counts := wan_patches._registry.calls({}):
        fast, calls = tally.total(counts.values())
        names = ", ".join(f"{name} {taken} of {every}" for name, (taken, every) in sorted(counts.items()))
        parts = [f"fast in {fast} of {_counted(calls, 'call')}: {names}"]
    elif places:
        functions = len({id(place.function) for place in places})
        count = Counter(place.patch.name for place in places)
        names = ", ".join(f"{name} ({n})" for name, n in sorted(count.items()))
        parts = [f"active in {_counted(functions, 'function')}: {names}"]
    if skipped := status.skipped():
        more = f" (and {len(skipped) - 1} more; see `wan-patches status --import`)" if len(skipped) > 1 else ""
        parts.append(f"skipped: {skipped[0].name} in {skipped[0].module}: {skipped[0].reason}{more}")
    if inexact := sorted({verdict.op for verdict in status.verdicts if not verdict.exact}):
        parts.append(f"not exact on this device, so stock was used for: {', '.join(inexact)}")
    return "wan-patches: " + "; ".join(parts)


# Starting


def _as_module(name: str, arguments: Sequence[str]) -> Callable[[types.ModuleType], None]:
    sys.argv = ["-m", *arguments]  # runpy puts the file in place of "-m" when it has found it
    _set_first_path(os.getcwd())
    # the function that the interpreter itself calls for "-m"; runpy's public ones take `__main__` away at the end,
    # while threads and exit handlers of the script are still running
    return lambda _: runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _as_file(path: str, arguments: Sequence[str]) -> Callable[[types.ModuleType], None]:
    sys.argv = [path, *arguments]
    file = os.path.join(os.getcwd(), path)  # not normalised, as with Python
    if pkgutil.get_importer(path) is not None:  # a folder or zip file
        _set_first_path(file, always=True)
        return lambda _: runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    try:
        with io.open_code(file) as stream:
            compiled = pkgutil.read_code(stream)
            stream.seek(0)
            source = stream.read()
    except OSError as error:
        print(f"wan-patches: can't open file {file!r}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(path)))

    def start(main: types.ModuleType) -> None:
        main.__file__ = file
        main.__dict__["__cached__"] = None
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
        exec(compiled or compile(source, file, "exec", dont_inherit=True), main.__dict__)

    return start


def _set_first_path(folder: str, always: bool = False) -> None:
    if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        sys.path[0] = folder  # where Python put the folder of this command
    elif always:
        sys.path.insert(0, folder)


# Children


class _Inherited:
    """Travels with what multiprocessing tells each new process, and enables there what is enabled here."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Choice | None]]:
        return _enable_in_child, (wan_patches._registry.chosen(),)


def _reach_children() -> None:
    # every process inherits this dictionary from the one that starts it; a forked one is patched anyhow
    with contextlib.suppress(AttributeError):  # it is an implementation detail, though an old one
        multiprocessing.current_process()._config["wan_patches"] = _Inherited()  # type: ignore[attr-defined]


def _enable_in_child(choice: Choice | None) -> _Inherited:
    if choice is not None:
        try:
            wan_patches.enable(choice.names, fidelity=choice.fidelity, gate=choice.gate)
        except Exception as error:  # it must not keep the script's process from starting
            logger.warning("not enabled in this process: %s: %s", type(error).__name__, error)
    return _Inherited()


# Ending


def _hide_frames(error: BaseException) -> None:
    """Has Python print the traceback of `error` without the frames of this module and of its callers."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_globals is globals():
        own = own.tb_next
    hook = sys.excepthook  # the script may have set one

    def tell(kind: Any, value: Any, traceback: Any) -> None:
        if value is error:
            traceback = own
            value = value.with_traceback(own)
        hook(kind, value, traceback)

    sys.excepthook = tell


def _tell_at_exit() -> None:
    """The line comes last: after the script's threads, its traceback and its own exit handlers."""
    process = os.getpid()

    def tell() -> None:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
        if os.getpid() == process and rank == "0" and sys.stderr is not None:  # not in a forked child
            with contextlib.suppress(OSError, ValueError):  # closed
                print(summary(), file=sys.stderr, flush=True)

    atexit.register(tell)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
