"""`wan-patches run`: a script runs as Python runs it, patched, and so do the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

OURS = [sys.executable, "-m", "wan_patches", "run"]

# Prints all that a script can ask about being run.
FACTS = """
import inspect, json, multiprocessing.spawn, os, pickle, sys

class Here:
    def method(self, x: 2 + 2 = 0):
        return 1

main = sys.modules["__main__"]
preparation = multiprocessing.spawn.get_preparation_data("child")
print(json.dumps({
    "name": __name__,
    "doc": __doc__,
    "file": __file__,
    "cached": __cached__,
    "package": __package__,
    "loader": type(__loader__).__name__,
    "spec": __spec__ and [__spec__.name, __spec__.origin],
    "builtins": repr(__builtins__),
    "names": sorted(set(globals()) - {"__annotations__"}),
    "own": main.__dict__ is globals() and main.Here is Here,
    "argv": sys.argv,
    "path": [os.path.abspath(p) for p in sys.path if p],
    "annotations": Here.method.__annotations__,
    "source": "return 1" in inspect.getsource(Here),
    "pickle": type(pickle.loads(pickle.dumps(Here()))) is Here,
    "hook": sys.excepthook is sys.__excepthook__,
    "children": {k: v for k, v in preparation.items() if k.startswith("init_main")},
}, indent=1))
"""


def run(command, cwd=None, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env=os.environ | environment, check=False
    )


def assert_alike(arguments, cwd, **environment):
    """Runs it both ways: the same on stdout and stderr, but for the closing line, and the same status."""
    plain = run([sys.executable, *arguments], cwd, **environment)
    ours = run([*OURS, *arguments], cwd, **environment)
    lines = ours.stderr.splitlines()
    assert lines[-1].startswith("wan-patches: ")
    assert (ours.returncode, ours.stdout, lines[:-1]) == (plain.returncode, plain.stdout, plain.stderr.splitlines())
    return plain


@pytest.fixture
def folder(tmp_path):
    """Scripts, a package, a folder and a zip file that can be run."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "package").mkdir()
    for path in ("script.py", "inner/script.py", "package/__main__.py", "package/module.py"):
        (tmp_path / path).write_text(FACTS)
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "link.py").symlink_to("inner/script.py")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", FACTS.replace('"return 1" in inspect.getsource(Here)', "True"))
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["script.py", "--patches", "rope", "-m", "x", "--", "--help"],
        ["./inner/script.py"],
        ["link.py", ""],
        ["package", "1"],
        ["archive.zip"],
        ["-m", "package", "-m", "x"],
        ["-m", "package.module", "--no-gate"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_script_sees_the_same_environment_as_under_plain_python(folder, arguments):
    assert assert_alike(arguments, folder).returncode == 0


def test_safe_path_leaves_out_the_folder_of_the_script(folder):
    if sys.version_info < (3, 11):
        pytest.skip("python -P came with 3.11")
    assert assert_alike(["inner/script.py"], folder, PYTHONSAFEPATH="1").returncode == 0


def test_the_console_command_is_the_same(folder):
    command = Path(sys.executable).with_name("wan-patches")
    if not command.exists():
        pytest.skip("the package is not installed here")
    plain, ours = run([sys.executable, "script.py", "a"], folder), run([command, "run", "script.py", "a"], folder)
    assert (ours.returncode, ours.stdout) == (0, plain.stdout)


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit(3)",
        "sys.exit('what went wrong')",
        "raise ValueError('wrong')",
        "def f():\n    g(",
        "raise KeyboardInterrupt",
        "raise EOFError",
        "raise BrokenPipeError(32, 'Broken pipe')",
        "import click\nraise click.ClickException('wrong')",
        "class Own(BaseException): pass\nraise Own('wrong')",
        "import traceback\nsys.excepthook = lambda k, v, t: print(traceback.format_exception(k, v, t))\n1 / 0",
    ],
)
def test_a_script_ends_as_under_plain_python(tmp_path, body):
    (tmp_path / "script.py").write_text(f"import sys\nprint('ran')\n{body}\n")
    assert_alike(["script.py"], tmp_path)


def test_a_module_that_raises_ends_as_under_plain_python(tmp_path):
    (tmp_path / "module.py").write_text("def f():\n    raise ValueError('wrong')\nf()\n")
    assert assert_alike(["-m", "module"], tmp_path).returncode == 1


def test_a_missing_module_has_the_error_of_plain_python(tmp_path):
    assert "No module named no_such_module" in assert_alike(["-m", "no_such_module"], tmp_path).stderr


def test_the_closing_line_comes_after_threads_exit_handlers_and_the_traceback(tmp_path):
    (tmp_path / "script.py").write_text(
        "import atexit, sys, threading, time\n"
        "atexit.register(print, 'exit handler', file=sys.stderr)\n"
        "threading.Timer(0.3, print, ['thread', __import__('__main__').__file__], {'file': sys.stderr}).start()\n"
        "raise ValueError('wrong')\n"
    )
    done = run([*OURS, "script.py"], tmp_path)
    assert done.stdout == ""
    *_, error, thread, handler, closing = done.stderr.splitlines()
    assert error == "ValueError: wrong"
    assert thread == f"thread {tmp_path / 'script.py'}"
    assert handler == "exit handler"
    assert closing == "wan-patches: no patch is active: the script imported none of the modules that patches apply to"


# With a patch made for it, which needs no diffusers


TOY = """
def answer():
    x = 1
    return x + 1

def other():
    x = 1
    return x + 2
"""
PATCHES = """
from wan_patches import Fidelity, Patch, Replace, Target

def big(x):
    return 100 + x

def patch(name, function, pattern, fidelity=Fidelity.EXACT):
    targets = (Target(function, (Replace(pattern, f"_{name}(x)"),)),)
    return Patch(name, "toy", targets, {f"_{name}": "toy_patches:big"}, fidelity)

PATCHES = (patch("toy", "answer", "x + 1"), patch("loose", "other", "x + 2", Fidelity.CLOSE))
"""
ACTIVE = "wan-patches: active in 1 function: toy (1)"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder in PYTHONPATH with a module `toy`, and with a plugin for it."""
    site = tmp_path / "site"
    (site / "toy_patches-1.0.dist-info").mkdir(parents=True)
    (site / "toy.py").write_text(TOY)
    (site / "toy_patches.py").write_text(PATCHES)
    (site / "toy_patches-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy-patches\nVersion: 1.0\n")
    (site / "toy_patches-1.0.dist-info/entry_points.txt").write_text(
        "[wan_patches.patches]\ntoy = toy_patches:PATCHES\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "answers", "closing"),
    [
        ([], "101 3", ACTIVE),
        (["--patches", "toy, rope", "--no-gate"], "101 3", ACTIVE),
        (["--fidelity", "close"], "101 101", "wan-patches: active in 2 functions: loose (1), toy (1)"),
        (
            ["--patches", "rope"],
            "2 3",
            "wan-patches: no patch is active: the script imported none of the modules that patches apply to",
        ),
    ],
)
def test_what_is_chosen_is_active_and_said(toy, options, answers, closing):
    (toy / "script.py").write_text(
        "import sys, toy, wan_patches.patching.fidelity\n"
        "print(toy.answer(), toy.other(), wan_patches.patching.fidelity.gate.enabled, sys.argv[1:])\n"
    )
    done = run([*OURS, *options, "script.py", "--fidelity", "wrong"], toy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{answers} {'--no-gate' not in options} ['--fidelity', 'wrong']\n"
    assert done.stderr.splitlines() == [closing]


def test_the_summary_names_a_skipped_patch_and_the_reason(toy):
    (toy / "site/toy.py").write_text(TOY.replace("x + 1", "x - 1"))
    (toy / "script.py").write_text("import toy\n")
    closing = run([*OURS, "script.py"], toy).stderr.splitlines()[-1]
    assert "; skipped: toy in toy: answer: " in closing


def test_the_summary_reports_that_the_script_disabled_the_patches(toy):
    (toy / "script.py").write_text("import toy, wan_patches\nwan_patches.disable()\nprint(toy.answer())\n")
    done = run([*OURS, "script.py"], toy)
    assert done.stdout == "2\n"
    assert "called wan_patches.disable()" in done.stderr


CHILDREN = """
import concurrent.futures, multiprocessing, sys
import toy

class Mine:
    def __init__(self, value):
        self.value = value

def grandchild(queue):
    queue.put(Mine(toy.answer()))

def child(queue, method):
    queue.put(Mine(toy.answer()))
    process = multiprocessing.get_context(method).Process(target=grandchild, args=(queue,))
    process.start()
    process.join()

if __name__ == "__main__":
    if sys.argv[2:]:
        import wan_patches
        wan_patches.disable()
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, sys.argv[1]))
    process.start()
    print(queue.get(timeout=60).value, queue.get(timeout=60).value)
    process.join()
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        print(pool.submit(toy.answer).result(timeout=60), process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_child_processes_are_patched_too(toy, method):
    (toy / "script.py").write_text(CHILDREN)
    assert run([sys.executable, "script.py", method], toy).stdout == "2 2\n2 0\n"
    done = run([*OURS, "script.py", method], toy)
    assert done.stdout == "101 101\n101 0\n", done.stderr
    assert done.stderr.splitlines() == [ACTIVE]


def test_child_processes_get_the_selection_in_force_when_they_start(toy):
    (toy / "script.py").write_text(CHILDREN)
    assert run([*OURS, "script.py", "spawn", "disabled"], toy).stdout == "2 2\n2 0\n"
    assert run([*OURS, "--patches", "rope", "script.py", "spawn"], toy).stdout == "2 2\n2 0\n"


def test_a_child_process_finds_the_module(toy):
    (toy / "module.py").write_text(CHILDREN)
    done = run([*OURS, "-m", "module", "spawn"], toy)
    assert done.stdout == "101 101\n101 0\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--patches", "nope", "script.py"], 2, "Error: unknown patch nope; known: "),
        (["--fidelity", "nope", "script.py"], 2, "'nope' is not one of exact, close"),
        (["--nope", "script.py"], 2, "--nope"),
        ([], 2, "Missing argument"),
        (["nope.py"], 2, "wan-patches: can't open file '{folder}/nope.py': No such file or directory"),
    ],
)
def test_user_errors_are_reported_without_a_traceback(tmp_path, arguments, status, message):
    (tmp_path / "script.py").write_text("print('ran')\n")
    done = run([*OURS, *arguments], tmp_path)
    assert done.returncode == status
    assert message.format(folder=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# Several ranks


SPMD = """
import sys
import torch
import torch.distributed
from diffusers import WanPipeline

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
pipe = WanPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
video = pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="np", **size).frames
videos = [None, None]
torch.distributed.all_gather_object(videos, video.tobytes())
if torch.distributed.get_rank() == 0:
    torch.save((videos, type(pipe).__name__), sys.argv[2])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_under_torchrun(tmp_path):
    import torch

    from wan_patches.testing.families import FAMILIES

    pipe = FAMILIES["wan_t2v"].build()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SPMD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["script.py", str(tmp_path / "model"), "videos.pt"]
    done = run([*torchrun, "-m", "wan_patches", "run", *arguments], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    videos, _ = torch.load(tmp_path / "videos.pt")
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
    stock = pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="np", **size).frames
    assert videos == [stock.tobytes()] * 2
    (closing,) = [line for line in done.stderr.splitlines() if line.startswith("wan-patches: ")]
    assert "rope (" in closing
    assert "frames (" in closing
    assert "skipped" not in closing


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_under_accelerate_launch(toy):
    (toy / "script.py").write_text(
        "import sys, torch.distributed, toy\n"
        "torch.distributed.init_process_group('gloo')\n"
        "answers = [None, None]\n"
        "torch.distributed.all_gather_object(answers, toy.answer())\n"
        "if torch.distributed.get_rank() == 0:\n"
        "    print(answers, sys.argv)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = run([*launch, "-m", "wan_patches", "run", "script.py", "--cpu"], toy, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[101, 101] ['script.py', '--cpu']\n"
    assert done.stderr.splitlines().count(ACTIVE) == 1


def test_the_closing_line_says_what_ran_and_not_what_was_imported(tmp_path):
    (tmp_path / "script.py").write_text(
        "import diffusers.models.transformers.transformer_helios\n"
        "import torch\n"
        "from diffusers.video_processor import VideoProcessor\n"
        "VideoProcessor().postprocess_video(torch.zeros(1, 3, 2, 8, 8), output_type='np')\n"
    )
    done = run([*OURS, "script.py"], tmp_path)
    assert done.stderr.splitlines()[-1] == "wan-patches: fast in 1 of 1 call: frames 1 of 1"
