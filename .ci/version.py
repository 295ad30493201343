"""`version.py NAME [ARGUMENT OF PYTEST ...]`: one version of tox's matrix, beside the torch of `.venv`.

What depends on the text of the installed diffusers, one case for each name that tests are parametrised with; all cases
are tox's. Run it with the Python of `.venv`.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ["tests/ops", "tests/patches", "tests/upstream"]


def requirements(name: str) -> list[str]:
    """What tox would install, without torch."""
    tox = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tox"]
    own = [wanted for wanted in tox["env"][name]["deps"] if isinstance(wanted, str)]
    common = [wanted for wanted in tox["env_run_base"]["deps"] if not wanted.startswith("torch==")]
    return [*common, *own, "pytest-xdist"]


def main(name: str, arguments: list[str]) -> None:
    wanted = [f"torch=={version('torch')}", *requirements(name)]  # pip must not replace what is only linked
    environment = ROOT / ".tox" / f"shared-{name}"
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([sys.executable, ROOT / ".ci" / "share_torch.py", sys.prefix, environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", "-e", ROOT, *wanted], check=True)
    tests = ["-n", "2", "-m", "upstream and not slow", "--cases", "names", *(arguments or FOLDERS)]
    subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, check=True)
    bench = ["bench", "compatibility", "wan22_i2v"]  # which every version has
    subprocess.run([python, "-m", "wan_patches", *bench], cwd=ROOT, check=True)


try:
    main(sys.argv[1], sys.argv[2:])
except subprocess.CalledProcessError as error:
    sys.exit(f"diffusers {sys.argv[1]}: {' '.join(map(str, error.cmd))} ended with {error.returncode}")
