"""What the installed package must be, wherever it is: whole, typed, light to import, of one version."""

import sys
from importlib.metadata import version
from pathlib import Path

import wan_patches

heavy = {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
assert not heavy, f"`import wan_patches` imports {', '.join(sorted(heavy))}"
package = Path(wan_patches.__file__).parent
assert package.is_relative_to(sys.prefix), f"this is not the installed package but {package}"
assert version("wan-patches") == wan_patches.__version__
assert (package / "py.typed").is_file()
states = {report.state for report in wan_patches.enable(fidelity="close").reports if report.state != "off"}
assert states == {"waiting for import"}, states
for name in wan_patches.__all__:
    getattr(wan_patches, name)
print(f"wan-patches {wan_patches.__version__} in {package.name}: whole, typed, light")
