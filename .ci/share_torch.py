"""`share_torch.py FROM TO`: environment TO gets the torch of FROM, by links: no second gigabyte to unpack."""

import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path


def site(environment: str) -> Path:
    (found,) = Path(environment).resolve().glob("lib/python*/site-packages")
    return found


def torch_in(folder: Path) -> Distribution:
    (found,) = distributions(name="torch", path=[str(folder)])
    return found


source, target = (site(environment) for environment in sys.argv[1:3])
for name in sorted({file.parts[0] for file in torch_in(source).files or ()} - {"..", "__pycache__"}):
    (target / name).symlink_to(source / name)
