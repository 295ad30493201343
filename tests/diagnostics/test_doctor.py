"""`wan-patches doctor`: what it finds, on this machine and on worse ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from wan_patches import cli
from wan_patches.diagnostics import doctor
from wan_patches.diagnostics.doctor import OK, PROBLEM, TESTED, WARNING, Examination, Finding, probes
from wan_patches.diagnostics.doctor.probes import Answer, ask

TORCH = {"version": "2.13.0+cpu", "threads": 2, "cores": 2, "built_for": "", "devices": {}}
PATCHES = {"reports": [], "errors": {}, "functions": {}}
DIFFUSERS, TRANSFORMERS = TESTED[1], TESTED[2]
HCCL = "ImportError: libhccl.so: cannot open shared object file: No such file or directory"
BROKEN = Answer(None, ("RuntimeError: Failed to load the backend extension: torch_npu.", HCCL))


@pytest.fixture
def quick(monkeypatch):
    """No other processes: they are said to have found this."""
    answers = {"torch_facts": Answer(TORCH), "patch_facts": Answer(PATCHES)}
    monkeypatch.setattr(doctor, "ask", lambda probe, environment, timeout: answers[probe.__name__])
    return answers


def one(findings) -> Finding:
    (finding,) = findings
    return finding


def test_this_machine():
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert set(found) == {"schema", "wan_patches", "state", "findings"}
    assert found["schema"] == 1
    assert all(set(finding) == {"area", "state", "text", "remedy"} for finding in found["findings"])
    states = {(finding["area"], finding["state"]) for finding in found["findings"]}
    assert {("python", OK), ("torch", OK), ("import torch", OK), ("devices", OK), ("patches", OK)} <= states
    texts = [finding["text"] for finding in found["findings"] if finding["area"] == "patches"]
    assert any(text.startswith("rope: active in ") for text in texts)
    assert found["state"] != PROBLEM
    assert done.exit_code == 0


@pytest.fixture
def torch_npu_without_cann(tmp_path, monkeypatch):
    """What `pip install torch_npu` leaves on a machine without CANN: `import torch` fails."""
    package, info = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({HCCL.removeprefix('ImportError: ')!r})\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def test_torch_npu_without_cann(torch_npu_without_cann):
    command = [sys.executable, "-m", "wan_patches", "doctor", "--json"]
    done = subprocess.run(command, env=torch_npu_without_cann, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    findings = [Finding(**finding) for finding in json.loads(done.stdout)["findings"]]
    found = Examination(tuple(findings))
    torch = one(found.of("import torch"))
    assert torch.state == PROBLEM
    assert "libhccl.so" in torch.text
    assert "Torch itself works" in torch.text
    assert "set_env.sh" in torch.remedy
    assert "pip uninstall torch_npu" in torch.remedy
    # without the backend torch works, but diffusers imports torch_npu by itself
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is not enough" in torch.remedy
    assert found.of("devices")[0].state == OK
    patches = one(finding for finding in found.of("patches") if finding.state == PROBLEM)
    assert "libhccl.so" in patches.text
    assert "set_env.sh" in patches.remedy


def test_the_script_of_an_installed_cann_is_named():
    remedy = one(doctor._find_torch(BROKEN, None, True, ["torch_npu"], ["/opt/cann/set_env.sh"])).remedy
    assert "source /opt/cann/set_env.sh" in remedy


def test_disabling_autoload_is_suggested_only_if_diffusers_works_without_the_backend():
    remedy = one(doctor._find_torch(BROKEN, Answer(TORCH), True, ["torch_npu"], [])).remedy
    assert remedy.endswith("Or set TORCH_DEVICE_BACKEND_AUTOLOAD=0.")


def test_a_broken_torch():
    answer = Answer(None, ("OSError: libcudart.so.12: cannot open shared object file",))
    finding = one(doctor._find_torch(answer, None, True, [], []))
    assert finding.state == PROBLEM
    assert "libcudart" in finding.text
    assert "pip install" in finding.remedy


def test_without_torch_no_process_is_started(monkeypatch, quick):
    monkeypatch.setattr(doctor, "_version_of", lambda package: None if package == "torch" else "1.0")
    quick.clear()
    found = doctor.examine()
    assert one(found.of("torch")).remedy == 'pip install "torch>=2.5".'
    assert found.of("patches") == ()


def test_missing_diffusers(monkeypatch, quick):
    version_of = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda package: None if package == "diffusers" else version_of(package))
    del quick["patch_facts"]
    found = doctor.examine()
    finding = one(found.of("diffusers"))
    assert finding in found.problems
    assert finding.text == "not installed: there is nothing to patch"
    assert finding.remedy == 'pip install "diffusers>=0.33".'


@pytest.mark.parametrize(
    ("tested", "version", "state", "text"),
    [
        (DIFFUSERS, "0.42.1", OK, "0.42.1 (tested with 0.35.2 to 0.42.1)"),
        (DIFFUSERS, "0.35.2", OK, "tested with"),
        (DIFFUSERS, "0.34.0", WARNING, "older"),
        (DIFFUSERS, "0.43.0.dev0", WARNING, "newer"),
        (DIFFUSERS, "0.30.0", PROBLEM, "too old"),
        (DIFFUSERS, "somebody's", WARNING, "not a valid version"),
        (TESTED[0], "2.13.0+cpu", OK, "2.13.0+cpu"),
        (TESTED[0], "2.5.0", WARNING, "older"),
        (TRANSFORMERS, None, WARNING, "not installed"),
        (TRANSFORMERS, "99.0", OK, "mostly tested with"),
    ],
)
def test_versions(tested, version, state, text):
    finding = one(doctor._find_version(tested, version))
    assert finding.state == state
    assert text in finding.text
    assert bool(finding.remedy) == (state != OK)


def test_an_unknown_diffusers_is_explained():
    assert "Recognised code is patched" in one(doctor._find_version(DIFFUSERS, "0.99.0")).remedy


def test_a_small_shared_memory():
    memfd, shm = doctor._find_shared_memory(64 * 2**20, 60 * 2**20, True)
    assert memfd.state == OK
    assert shm.state == WARNING
    assert shm.text.startswith("/dev/shm: 64 MiB, of which 60 MiB free")
    assert "--shm-size" in shm.remedy


@pytest.mark.parametrize(
    ("total", "free", "memfd", "states"),
    [
        (8 * 2**30, 8 * 2**30, True, [OK, OK]),
        (8 * 2**30, 2**20, True, [OK, WARNING]),
        (None, 0, True, [OK, OK]),
        (8 * 2**30, 8 * 2**30, False, [WARNING, OK]),
    ],
)
def test_shared_memory(total, free, memfd, states):
    assert [finding.state for finding in doctor._find_shared_memory(total, free, memfd)] == states


def test_a_tiny_shared_memory_is_a_warning_and_no_failure(monkeypatch, quick):
    monkeypatch.setattr(doctor, "_shared_memory", lambda: (2**20, 0, True))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert "--shm-size" in done.output
    assert "1 warning" in done.output
    assert done.exit_code == 0


def test_devices():
    facts = TORCH | {"devices": {"cuda": ["A GPU", "A GPU"]}}
    assert [f.text for f in doctor._find_devices(facts, ["/dev/nvidia0"], [])][1] == "cuda: 2 x A GPU"
    *_, gpu = doctor._find_devices(TORCH, ["/dev/nvidia0"], [])
    assert gpu.state == WARNING
    assert "built without CUDA" in gpu.text
    *_, gpu = doctor._find_devices(TORCH | {"built_for": "CUDA"}, ["/dev/nvidia0"], [])
    assert "nvidia-smi" in gpu.remedy
    *_, npu = doctor._find_devices(TORCH, [], ["/dev/davinci0"])
    assert npu.state == WARNING


def test_missing_triton_is_a_warning_only_on_a_gpu():
    assert doctor._find_triton(TORCH, None).state == OK
    assert doctor._find_triton(TORCH | {"devices": {"cuda": ["A GPU"]}}, None).state == WARNING
    assert doctor._find_triton(TORCH, "3.7.0").text == "3.7.0"


@pytest.mark.parametrize(
    ("error", "text", "remedy"),
    [
        ("RuntimeError: Failed to find C compiler. Please specify", "no C compiler", "apt install gcc python3-dev"),
        ("CalledProcessError: Command '['/usr/bin/gcc', 'main.c']' returned non-zero exit status 1.", "headers", "CC"),
        ("PermissionError: [Errno 13] Permission denied: '/root/.triton/cache'", "cache folder", "TRITON_CACHE_DIR"),
        ("OSError: [Errno 30] Read-only file system: '/root/.triton'", "cache folder", "TRITON_CACHE_DIR"),
        ("AssertionError: libcuda.so cannot found!", "libcuda.so is not found", "ldconfig"),
        ("RuntimeError: the provided PTX was compiled with an unsupported toolchain", "driver", "nvidia-smi"),
        ("ImportError: libtriton.so: undefined symbol", "cannot be imported", "--force-reinstall"),
        ("ValueError: something else", "none can be launched", "report this"),
    ],
)  # fmt: skip
def test_kernels_that_cannot_be_launched(error, text, remedy):
    finding = doctor._find_kernels(Answer(None, (error,)), "2.13.0")
    assert finding.state == WARNING
    assert text in finding.text.partition(":")[0]
    assert error.rstrip(".") in finding.text
    assert remedy in finding.remedy


def test_errors_of_the_installed_triton_are_recognised(monkeypatch, tmp_path):
    build, cache = (pytest.importorskip(f"triton.runtime.{name}") for name in ("build", "cache"))
    (tmp_path / "file").touch()

    def meaning(call):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - each version has its own
            call()
        return doctor._find_kernels(Answer(None, tuple(probes.chain(raised.value))), "2.13.0").text

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert meaning(lambda: cache.get_cache_manager("ab").put("x", "y")).startswith("Triton's cache folder")
    if hasattr(build, "compile_module_from_src"):  # since Triton 3.4
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
        assert meaning(lambda: build.compile_module_from_src("", "m")).startswith("no C compiler")


@pytest.mark.parametrize(("is_exact", "state", "text"), [(True, OK, "with the bits"), (False, WARNING, "differs")])
def test_a_kernel_is_launched_where_there_is_a_gpu(is_exact, state, text, quick):
    quick["torch_facts"] = Answer(TORCH | {"devices": {"cuda": ["A GPU"]}})
    quick["kernel_facts"] = Answer({"is_exact": is_exact})
    finding = one(doctor.examine().of("kernels"))
    assert finding.state == state
    assert text in finding.text


def test_no_kernel_is_launched_without_a_gpu_or_without_triton(quick, monkeypatch):
    quick["kernel_facts"] = None  # would fail if it were asked
    assert doctor.examine().of("kernels") == ()
    quick["torch_facts"] = Answer(TORCH | {"devices": {"cuda": ["A GPU"]}})
    version_of = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda package: None if "triton" in package else version_of(package))
    found = doctor.examine()
    assert found.of("kernels") == ()
    assert one(found.of("triton")).remedy == "pip install triton."


def test_the_kernel_is_compared_with_the_operations_of_torch(monkeypatch):
    """On the CPU, with a function in the kernel's place."""
    modulation = pytest.importorskip("wan_patches.ops.triton.modulation")
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args: to(x, *(arg for arg in args if arg != "cuda")))
    stock = lambda x, y, gate: (x.float() + y.float() * gate).to(x.dtype)  # noqa: E731
    for kernel, is_exact in ((stock, True), (lambda *args: stock(*args) * (1 + 2**-7), False)):
        monkeypatch.setattr(modulation, "gated_residual", kernel)
        assert probes.kernel_facts() == {"is_exact": is_exact}


@pytest.mark.parametrize(
    ("torch_npu", "ascend", "home", "state", "text"),
    [
        (None, [], None, OK, "no torch_npu"),
        (None, ["/dev/davinci0"], None, WARNING, "pip install torch-npu"),
        ("2.12.0", [], None, WARNING, 'pip install "torch-npu==2.13.*"'),
        ("2.13.0rc1", ["/dev/davinci0"], None, WARNING, "set_env.sh"),
        ("2.13.0", ["/dev/davinci0"], "/opt/cann", OK, "CANN in /opt/cann"),
    ],
)
def test_npu(monkeypatch, torch_npu, ascend, home, state, text):
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv("ASCEND_HOME_PATH", home)
    finding = one(doctor._find_npu(TORCH, torch_npu, [], ascend))
    assert finding.state == state
    assert text in finding.text + finding.remedy


def test_patches():
    def report(name, state, module="diffusers.a", reason="", fidelity="exact"):
        return {"name": name, "module": module, "state": state, "reason": reason, "fidelity": fidelity}

    facts = {
        "reports": [
            report("rope", "active"),
            report("rope", "skipped", "diffusers.b", "its text is not known"),
            report("frames", "waiting for import"),
            report("rope", "off", fidelity="close"),
            report("timesteps", "off", fidelity="close"),
            report("plugin", "skipped", "theirs.patches:PATCHES", "raised ImportError: no"),
        ],
        "errors": {},
        "functions": {"rope": 3},
    }
    active, absent, close, skipped, plugin = doctor._find_patches(Answer(facts), [])
    assert active == Finding("patches", OK, "rope: active in 3 functions of 1 module")
    assert absent == Finding("patches", OK, "frames: not in this version of diffusers")
    assert close == Finding("patches", OK, "timesteps: off: only enable(fidelity='close') uses it")
    assert skipped.state == plugin.state == WARNING
    assert "diffusers.b: its text is not known" in skipped.text
    assert "plugin" in plugin.remedy


def test_a_module_that_cannot_be_imported():
    missing = ["ModuleNotFoundError: No module named 'transformers.models'"]
    facts = PATCHES | {"errors": {"diffusers.a": missing, "diffusers.b": ["AttributeError: half of it"]}}
    finding = one(doctor._find_patches(Answer(facts), []))
    assert finding.state == PROBLEM
    assert "diffusers.a cannot be imported" in finding.text
    assert finding.remedy == "pip install transformers."


def test_a_copied_package_without_metadata():
    finding = one(doctor._find_package(0))
    assert finding.state == PROBLEM
    assert "pip install wan-patches" in finding.remedy


def test_other_pythons_and_systems():
    assert [finding.state for finding in doctor._find_python((3, 11, 7), "Linux")] == [OK, OK]
    assert [finding.state for finding in doctor._find_python((3, 99, 0), "Windows")] == [WARNING, WARNING]


def test_the_examination_prints_as_a_table_and_as_html():
    found = Examination((Finding("a", OK, "fine"), Finding("b", PROBLEM, "not <fine>", "mend [it]")))
    assert found.state == PROBLEM
    assert "-> mend [it]" in str(found)
    assert "1 problem, 0 warnings" in str(found)
    assert "not &lt;fine&gt;" in found._repr_html_()


# Processes that are asked


def crash():
    os.abort()


def sleep():
    import time

    time.sleep(60)


def leave():
    raise SystemExit(3)


def chatter():
    print("wan-patches probe: not this")
    print("nor this", end="")
    return {"it": os.environ["A_VARIABLE"]}


def fail():
    try:
        import a_module_that_is_not_there  # noqa: F401
    except ImportError as error:
        raise RuntimeError("it\nfailed") from error


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """Has functions of this file asked, as if they were in `probes`."""
    folder = os.path.dirname(__file__)
    name = os.path.basename(__file__).removesuffix(".py")
    imports = f"sys.path.insert(0, {folder!r}); import {name}; vars(probes).update(vars({name}))"
    monkeypatch.setattr(probes, "_ASK", probes._ASK.replace("; probes._answer()", f"; {imports}; probes._answer()"))
    return lambda function, timeout=60.0: ask(function, {"A_VARIABLE": "told"}, timeout)


def test_the_answer_is_found_among_other_output(probe):
    assert probe(chatter) == Answer({"it": "told"})


def test_errors_come_with_their_causes(probe):
    errors = probe(fail).errors
    assert errors == ("RuntimeError: it failed", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'")


@pytest.mark.parametrize(
    ("function", "error"), [(crash, "killed by SIGABRT"), (leave, "status 3"), (sleep, "no answer within 3 seconds")]
)
def test_probes_that_fail_to_answer(probe, function, error):
    answer = probe(function, timeout=3.0 if function is sleep else 60.0)
    assert answer.facts is None
    assert error in answer.errors[0]
