"""Reports what works on this machine, what does not, and how to fix it; implements `wan-patches doctor`.

This module does not import torch, since a failing import is one of the problems to explain. Other processes try it
(`probes`). Functions named `_find_*` turn facts into findings and inspect nothing themselves.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

import wan_patches
from wan_patches.diagnostics.doctor.probes import Answer, ask, kernel_facts, patch_facts, torch_facts

OK, WARNING, PROBLEM = "ok", "warning", "problem"

#: Version of the format of `Examination.json()`; increased by changes that readers must adapt to.
SCHEMA = 1

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_SMALL = 2**30  # bytes of /dev/shm; containers have 64 MiB by default
_NEWEST_PYTHON = (3, 13)


@dataclass(frozen=True)
class Tested:
    """The range of a package's versions, inclusive, that the tests have run with."""

    package: str
    oldest: str
    newest: str
    needed: bool = True
    decisive: bool = False  # patches and bit equality can depend on this package


TESTED = (
    Tested("torch", "2.5.1", "2.14.1", decisive=True),
    Tested("diffusers", "0.35.2", "0.42.1", decisive=True),
    Tested("transformers", "4.57", "5.23.0", needed=False),
    Tested("accelerate", "1.15.0", "1.15.0", needed=False),
    Tested("numpy", "2.4.6", "2.4.6"),
    Tested("pillow", "13.0.0", "13.0.0"),
    Tested("wrapt", "2.5.2", "2.5.2"),
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. `state` is "ok", "warning" or "problem"; warnings and problems come with a remedy."""

    area: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """All findings; prints as a table."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that prevent pipelines from running or patches from being applied at all."""
        return tuple(finding for finding in self.findings if finding.state == PROBLEM)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that make pipelines work less well than they could."""
        return tuple(finding for finding in self.findings if finding.state == WARNING)

    @property
    def state(self) -> str:
        """The worst state of all findings."""
        return PROBLEM if self.problems else WARNING if self.warnings else OK

    def of(self, area: str) -> tuple[Finding, ...]:
        """Returns the findings of an area."""
        return tuple(finding for finding in self.findings if finding.area == area)

    def json(self) -> str:
        """Returns a JSON object: `schema`, `wan_patches` (its version), `state`, and `findings` each a `Finding`."""
        content = {"schema": SCHEMA, "wan_patches": wan_patches.__version__, "state": self.state}
        return json.dumps(content | {"findings": [asdict(finding) for finding in self.findings]}, indent=2)

    def __str__(self) -> str:
        from wan_patches.tables import text

        return text(*self._renderables())

    def _repr_html_(self) -> str:
        from wan_patches.tables import html

        return html(*self._renderables())

    def _renderables(self) -> list[object]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        colour = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
        table = Table("", "looked at", "found", box=box.SIMPLE, pad_edge=False)
        for finding in self.findings:
            found = f"{finding.text}\n-> {finding.remedy}" if finding.remedy else finding.text
            table.add_row(Text(finding.state, colour[finding.state]), finding.area, found)
        n, m = len(self.problems), len(self.warnings)
        return [table, f"{n} problem{'s' * (n != 1)}, {m} warning{'s' * (m != 1)}"]


def examine(*, timeout: float = 300.0) -> Examination:
    """Examines this machine and Python environment. Changes nothing, and works even if torch cannot be imported.

    Other processes import torch and try the patches, which takes some seconds.

    Args:
        timeout: maximum seconds for each of those processes.
    """
    installed = {tested.package: _version_of(tested.package) for tested in TESTED}
    findings = [*_find_python(sys.version_info[:3], platform.system()), *_find_package(_number_of_patches())]
    findings += [finding for tested in TESTED for finding in _find_version(tested, installed[tested.package])]
    findings += _torch_and_patches(installed, timeout)
    findings += _find_shared_memory(*_shared_memory())
    return Examination(tuple(findings))


def _torch_and_patches(installed: Mapping[str, str | None], timeout: float) -> Iterator[Finding]:
    if installed["torch"] is None:
        return
    backends, cann = _backends(), _cann_scripts()
    answer = ask(torch_facts, {}, timeout)
    environment: dict[str, str] = {}
    without = None
    if answer.errors and backends and os.environ.get(AUTOLOAD) != "0":
        environment = {AUTOLOAD: "0"}
        without = ask(torch_facts, environment, timeout)
    facts = (answer if without is None else without).facts
    patches = None if facts is None or installed["diffusers"] is None else ask(patch_facts, environment, timeout)
    enough = patches is None or (patches.facts is not None and not patches.facts["errors"])
    yield from _find_torch(answer, without, enough, backends, cann)
    if facts is None:
        return
    npu = (_version_of("torch-npu") or "of unknown version") if importlib.util.find_spec("torch_npu") else None
    yield from _find_devices(facts, glob.glob("/dev/nvidia[0-9]*"), glob.glob("/dev/davinci[0-9]*"))
    triton = next(filter(None, map(_version_of, ("triton", "triton-ascend", "pytorch-triton"))), None)
    yield _find_triton(facts, triton)
    if triton is not None and "cuda" in facts["devices"]:
        yield _find_kernels(ask(kernel_facts, environment, timeout), facts["version"])
    yield from _find_npu(facts, npu, cann, glob.glob("/dev/davinci[0-9]*"))
    if patches is not None:
        yield from _find_patches(patches, cann)


# Facts about this process


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(package: str) -> SpecifierSet:
    """Returns the versions of `package` that this package requires."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in map(Requirement, importlib.metadata.requires("wan-patches") or ()):
            if requirement.name == package:
                return requirement.specifier
    return SpecifierSet()


def _number_of_patches() -> int:
    return len(list(importlib.metadata.entry_points(group="wan_patches.patches")))


def _backends() -> list[str]:
    """Returns the backends that `import torch` loads automatically, through an entry point."""
    return sorted({point.name for point in importlib.metadata.entry_points(group="torch.backends")})


def _cann_scripts() -> list[str]:
    """Returns the set-up scripts of the installed CANN versions."""
    roots = ["/usr/local/Ascend", os.path.expanduser("~/Ascend")]
    paths = [os.path.join(root, name, "set_env.sh") for root in roots for name in ("ascend-toolkit", "cann", "nnae")]
    return [path for path in paths if os.path.exists(path)]


def _shared_memory() -> tuple[int | None, int, bool]:
    """Returns the size of /dev/shm in bytes (None if there is none), its free bytes, and whether memfd_create works."""
    memfd = False
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            os.close(os.memfd_create("wan-patches-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            memfd = True
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None, 0, memfd
    return usage.total, usage.free, memfd


# From facts to findings


def _find_python(version: Sequence[int], system: str) -> Iterator[Finding]:
    name = ".".join(map(str, version))
    if tuple(version[:2]) > _NEWEST_PYTHON:
        newest = ".".join(map(str, _NEWEST_PYTHON))
        yield Finding(
            "python",
            WARNING,
            f"{name} is newer than the tested versions (3.10 to {newest})",
            "Functions that are not recognised stay stock: see the findings about patches below.",
        )
    else:
        yield Finding("python", OK, f"{name} ({sys.executable})")
    text = f"{platform.platform()}, {platform.machine()}"
    if system == "Linux":
        yield Finding("platform", OK, text)
    else:
        less = "ParallelExecutor only runs `inline`" if system == "Windows" else "results of workers go through sockets"
        yield Finding("platform", WARNING, f"{text}: not tested; {less}", "Use Linux for several devices.")


def _find_package(patches: int) -> Iterator[Finding]:
    folder = os.path.dirname(os.path.abspath(wan_patches.__file__))
    text = f"{wan_patches.__version__} in {folder}"
    if patches:
        yield Finding("wan-patches", OK, text)
    else:
        yield Finding(
            "wan-patches",
            PROBLEM,
            f"{text} is not installed, but patches are found through package metadata",
            "pip install wan-patches (copying the folder is not enough).",
        )


def _find_version(tested: Tested, installed: str | None) -> Iterator[Finding]:
    package, required = tested.package, _required(tested.package)
    install = f'pip install "{package}{required}"'
    if installed is None:
        if tested.needed:
            what = ": there is nothing to patch" if package == "diffusers" else ""
            yield Finding(package, PROBLEM, f"not installed{what}", f"{install}.")
        else:
            yield Finding(package, WARNING, "not installed, but most pipelines need it", f"{install}.")
        return
    span = tested.oldest if tested.oldest == tested.newest else f"{tested.oldest} to {tested.newest}"
    try:
        version = Version(Version(installed).public)  # without "+cpu"
    except InvalidVersion:
        yield Finding(package, WARNING, f"{installed!r} is not a valid version", f"{install}.")
        return
    if not required.contains(version, prereleases=True):
        yield Finding(package, PROBLEM, f"{installed} is too old", f"{install}.")
    elif Version(tested.oldest) <= version <= Version(tested.newest):
        yield Finding(package, OK, f"{installed} (tested with {span})")
    elif not tested.decisive:
        yield Finding(package, OK, f"{installed} (mostly tested with {span})")
    else:
        age = "older" if version < Version(tested.oldest) else "newer"
        if package == "diffusers":
            remedy = f"Recognised code is patched, the rest stays stock: see below. Or install one of {span}."
        else:
            remedy = "Check the bits on this machine: wan-patches demo."
        yield Finding(package, WARNING, f"{installed} is {age} than the tested versions ({span})", remedy)


def _find_torch(
    answer: Answer, without: Answer | None, enough: bool, backends: Sequence[str], cann: Sequence[str]
) -> Iterator[Finding]:
    """Reports whether torch can be imported.

    without: the answer of a process in which torch loads no backends.
    enough: diffusers can be imported there.
    """
    loads = f"; loads {', '.join(backends)} automatically" if backends else ""
    if answer.facts is not None:
        off = f", which {AUTOLOAD}=0 prevents" if backends and os.environ.get(AUTOLOAD) == "0" else ""
        yield Finding("import torch", OK, f"works{loads}{off}")
        return
    text = f"fails: {_reasons(answer.errors)}"
    if without is None or without.facts is None:
        yield Finding("import torch", PROBLEM, text, _remedy(answer.errors, cann))
        return
    remedy = _remedy(answer.errors, cann, f"Update or uninstall {', '.join(backends)}.")
    if enough:
        remedy += f" Or set {AUTOLOAD}=0."
    else:
        remedy += f" {AUTOLOAD}=0 is not enough, because diffusers imports the installed backends itself."
    yield Finding(
        "import torch",
        PROBLEM,
        f"{text}. Torch itself works: with {AUTOLOAD}=0, without {', '.join(backends)}, the import succeeds",
        remedy,
    )


def _reasons(errors: Sequence[str]) -> str:
    return ", caused by ".join(error.rstrip(".") for error in errors)


def _remedy(
    errors: Sequence[str], cann: Sequence[str], otherwise: str = "Reinstall torch: pip install -U torch."
) -> str:
    """Returns the remedy for an import that failed with `errors`."""
    text = " ".join(errors)
    if any(word in text for word in ("torch_npu", "libhccl", "libascend", "CANN", "libacl")):
        start = (
            f"Run `source {cann[0]}` in the shell first: torch_npu needs CANN's libraries."
            if cann
            else "torch_npu needs Ascend CANN, which was not found in the usual places: install it and run "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or the set_env.sh of your CANN) in the shell first."
        )
        return f"{start} On a machine without an NPU: pip uninstall torch_npu."
    if errors and errors[-1].startswith("ModuleNotFoundError: No module named "):
        return f"pip install {errors[-1].split(chr(39))[1].partition('.')[0]}."
    return otherwise


def _find_devices(facts: Mapping[str, Any], nvidia: Sequence[str], ascend: Sequence[str]) -> Iterator[Finding]:
    yield Finding("devices", OK, f"cpu: torch uses {facts['threads']} threads on {facts['cores']} cores")
    for kind, names in facts["devices"].items():
        count = Counter(names)
        yield Finding("devices", OK, f"{kind}: " + ", ".join(f"{n} x {name}" for name, n in count.items()))
    if nvidia and "cuda" not in facts["devices"]:
        if facts["built_for"]:
            text, remedy = "torch cannot use it", "Check nvidia-smi; update the driver, or install an older torch."
        else:
            text = f"torch {facts['version']} was built without CUDA"
            remedy = "Install torch with CUDA: see https://pytorch.org/get-started/locally."
        yield Finding("devices", WARNING, f"there is an NVIDIA GPU, but {text}", remedy)
    if ascend and "npu" not in facts["devices"]:
        yield Finding(
            "devices", WARNING, "there is an Ascend NPU, but torch does not see it", "See the findings about the NPU."
        )


def _find_triton(facts: Mapping[str, Any], triton: str | None) -> Finding:
    if triton is not None:
        return Finding("triton", OK, triton)
    if "cuda" in facts["devices"]:
        return Finding(
            "triton", WARNING, "not installed: torch.compile and fused kernels need it on a GPU", "pip install triton."
        )
    return Finding("triton", OK, "not installed; not needed on these devices")


#: What Triton's errors contain in lower case, what that means, and a remedy.
_KERNEL_ERRORS = (
    (
        ("unsupported toolchain", "driver version is insufficient", "ptxas", "no kernel image", "image is invalid"),
        "the driver, or the GPU, does not fit this Triton",
        "Update the driver (nvidia-smi shows its version), or install an older torch with its own Triton.",
    ),
    (
        ("c compiler", "'gcc'", "'cc'", "python.h", "non-zero exit status"),
        "no C compiler is found, or it lacks Python's headers",
        "Install both (apt install gcc python3-dev), or set CC to a compiler.",
    ),
    (
        ("permissionerror", "read-only file system", "no space left", "notadirectoryerror", "fileexistserror"),
        "Triton's cache folder cannot be written",
        "Set TRITON_CACHE_DIR to a folder that can be written, on a disk that is not full.",
    ),
    (
        ("libcuda",),
        "the driver's library libcuda.so is not found",
        "Run ldconfig, or set TRITON_LIBCUDA_PATH to its folder; in a container, start it with --gpus all.",
    ),
    (
        ("importerror", "modulenotfounderror"),
        "Triton cannot be imported",
        "Reinstall the version that belongs to your torch: pip install --force-reinstall torch triton.",
    ),
)


def _find_kernels(answer: Answer, torch_version: str) -> Finding:
    """Reports whether a kernel could be launched on a GPU, and what prevents it."""
    if answer.facts is not None:
        if answer.facts["is_exact"]:
            return Finding("kernels", OK, "one was launched, with the bits of torch's operations")
        return Finding(
            "kernels",
            WARNING,
            "one was launched, and its result differs from that of torch's operations; such kernels are not used",
            f"Install the Triton that belongs to torch {torch_version}, and report this.",
        )
    text = " ".join(answer.errors).lower()
    known = ((meaning, remedy) for signs, meaning, remedy in _KERNEL_ERRORS if any(sign in text for sign in signs))
    unknown = "none can be launched", "Install the Triton that belongs to your torch, or report this."
    meaning, remedy = next(known, unknown)
    return Finding(
        "kernels",
        WARNING,
        f"{meaning}: torch's operations run in their place, with the same results, slower ({_reasons(answer.errors)})",
        remedy,
    )


def _find_npu(
    facts: Mapping[str, Any], torch_npu: str | None, cann: Sequence[str], ascend: Sequence[str]
) -> Iterator[Finding]:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    toolkit = f"CANN in {home}" if home else f"CANN not set up ({cann[0]})" if cann else "no CANN"
    text = f"{len(ascend)} devices, torch_npu {torch_npu or 'not installed'}, {toolkit}"
    if torch_npu is None:
        if ascend:
            yield Finding(
                "npu", WARNING, text, f"pip install torch-npu in the version that matches torch {facts['version']}."
            )
        else:
            yield Finding("npu", OK, "no torch_npu; not needed on these devices")
        return
    ours, theirs = ([*version.split("."), "", ""][:2] for version in (facts["version"], torch_npu))
    if torch_npu[:1].isdigit() and ours != theirs:
        remedy = f'pip install "torch-npu=={".".join(ours)}.*".'
        yield Finding("npu", WARNING, f"torch_npu {torch_npu} does not match torch {facts['version']}", remedy)
    elif ascend and not home:
        yield Finding("npu", WARNING, text, _remedy(["CANN"], cann))
    else:
        yield Finding("npu", OK, text)


def _find_shared_memory(total: int | None, free: int, memfd: bool) -> Iterator[Finding]:
    if memfd:
        yield Finding("shared memory", OK, "memfd_create works: workers return results without /dev/shm")
    else:
        yield Finding(
            "shared memory",
            WARNING,
            "memfd_create is not available: workers return results through sockets, which is slower",
            "Use Linux, or a container whose seccomp profile allows memfd_create.",
        )
    if total is None:
        yield Finding("shared memory", OK, "no /dev/shm on this system")
        return
    text = f"/dev/shm: {_size(total)}, of which {_size(free)} free"
    if total < _SMALL:
        remedy = "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory."
        yield Finding("shared memory", WARNING, f"{text}: too small for some data loaders and for NCCL", remedy)
    elif free < total / 10:
        remedy = "Delete files that dead processes left there: ls -l /dev/shm."
        yield Finding("shared memory", WARNING, f"{text}: nearly full", remedy)
    else:
        yield Finding("shared memory", OK, text)


def _find_patches(answer: Answer, cann: Sequence[str]) -> Iterator[Finding]:
    if answer.facts is None:
        remedy = _remedy(answer.errors, cann, "Please report this with the output of wan-patches doctor --json.")
        yield Finding("patches", PROBLEM, f"cannot be enabled: {_reasons(answer.errors)}", remedy)
        return
    reports, functions = answer.facts["reports"], answer.facts["functions"]
    for name in dict.fromkeys(report["name"] for report in reports):
        states = Counter(report["state"] for report in reports if report["name"] == name)
        if states["active"]:
            n, m = functions.get(name, 0), states["active"]
            text = f"{name}: active in {n} function{'s' * (n != 1)} of {m} module{'s' * (m != 1)}"
            yield Finding("patches", OK, text)
        elif all(report["fidelity"] == "close" for report in reports if report["name"] == name):
            if set(states) == {"off"}:
                yield Finding("patches", OK, f"{name}: off: only enable(fidelity='close') uses it")
        elif set(states) <= {"off", "waiting for import"} and not answer.facts["errors"]:
            yield Finding("patches", OK, f"{name}: not in this version of diffusers")
    for report in reports:
        if report["state"] == "skipped":
            plugin = ":" in report["module"]  # an entry point that could not be loaded
            yield Finding(
                "patches",
                WARNING,
                f"{report['name']}: skipped in {report['module']}: {report['reason']}",
                "Update or uninstall the package that provides this plugin."
                if plugin
                else "Stock code runs there: correct, not faster. Update wan-patches, or install a tested diffusers.",
            )
    if errors := answer.facts["errors"]:  # often causes the others
        module, reasons = next(iter(errors.items()))
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        text = f"{module} cannot be imported: {_reasons(reasons)}{more}"
        remedy = _remedy(reasons, cann, "Reinstall diffusers: pip install -U diffusers.")
        yield Finding("patches", PROBLEM, text, remedy)


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
