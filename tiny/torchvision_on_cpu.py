"""Install requirements-vision.txt into a folder of its own, so that torchvision works beside a CPU build of torch:

    python tiny/torchvision_on_cpu.py .venv/vision
    PYTHONPATH=.venv/vision python ...

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, which it allows,
but it then registers a fake `nms` and finds no operator of that name: `import torchvision` fails. The copy in this
folder declares those operators itself where they did not load. They still compute nothing; processors only resize and
normalize, which needs none of them. Where the operators load, the addition does nothing.

Only what stands in the folder is changed, so processes that PYTHONPATH points there, loader workers too, need nothing
else, and nobody else sees a torchvision.
"""

import argparse
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-vision.txt"
MARK = "# added by tiny/torchvision_on_cpu.py"
ADDITION = f"""

{MARK}: operators that torchvision expects to be declared
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{{_name}}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def install(folder: Path) -> None:
    """Have pip write requirements-vision.txt's packages, and nothing that they depend on, into `folder`."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)


def declare_operators(folder: Path) -> None:
    """Add the declarations to `folder`'s torchvision, once. They stand at the end of the module that has just tried to
    load the operators and that is imported before anything that asks for them."""
    extension = folder / "torchvision" / "extension.py"
    source = extension.read_text(encoding="utf-8")
    if MARK not in source:
        extension.write_text(source + ADDITION, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to install into; made if it is not there")
    folder = parser.parse_args().folder
    install(folder)
    declare_operators(folder)


if __name__ == "__main__":
    main()
