"""An environment that has diffusers and torch but not `diffusers_ext`: what a reader of a repo starts from."""

import importlib.metadata
import os
import sys
from pathlib import Path

from packaging.requirements import Requirement


def make_reader(folder: Path, requirements: tuple[str, ...] = ("diffusers", "torch")) -> str:
    """Build a virtual environment of links to the installed packages that `requirements` need, and no others.

    Args:
        folder (`Path`): Where to build it; it takes about a second and no space.
        requirements (`tuple[str]`, *optional*): Names of installed packages.

    Returns:
        `str`: The environment's interpreter.
    """
    packages, waiting = {}, list(requirements)
    while waiting:
        package = importlib.metadata.distribution(waiting.pop())
        if package.metadata["Name"] not in packages:
            packages[package.metadata["Name"]] = package
            needs = [Requirement(text) for text in package.requires or []]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    site.mkdir(parents=True)
    for package in packages.values():
        for name in {file.parts[0] for file in package.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / name).exists():
                (site / name).symlink_to(package.locate_file(name).resolve())
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    home = Path(sys.base_exec_prefix) / "bin"
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    return str(python)
