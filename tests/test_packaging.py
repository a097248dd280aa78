"""The wheel and the sdist hold what they should, install, and work from outside the checkout.

Nothing is downloaded: builds run without isolation, and the scratch environments see the running one's packages.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MOUNTED = ("pipelines", "training", "model_cards")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command as a user would, without the checkout on the path, and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks (and would track), copied: builds leave files behind and must not be helped by stray ones."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def dist(checkout: Path) -> Path:
    """The folder with the sdist and the wheel that was built from that sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=checkout)
    return checkout / "dist"


def scratch_environment(folder: Path) -> Path:
    """Makes a virtual environment that sees the running one's packages, but not its install of this project."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = Path(
        run(folder / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # A line in a .pth file adds the folder without reading the .pth files in it: editable installs stay invisible.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "running.pth").write_text("\n".join(paths))
    return folder / "bin/python"


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=cwd)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    python = scratch_environment(folder / "venv")
    install(python, next(dist.glob("*.whl")), cwd=folder)
    return python


def expected_modules() -> set[str]:
    """Every module below the package's folders, as paths inside the wheel."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers_ext").rglob("*.py")}
    return own | {
        f"diffusers_ext/{path.relative_to(ROOT)}" for name in MOUNTED for path in (ROOT / name).rglob("*.py")
    }


def test_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    wheel = next(dist.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    cards = {f"diffusers_ext/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")}
    assert code == expected_modules() | cards | {"diffusers_ext/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_is_enough_to_run_the_tests(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "tests/conftest.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/goldens").rglob("*") if path.is_file()}
    assert wanted <= names


def test_version_is_the_same_everywhere(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    code = (
        "import diffusers_ext, importlib.metadata as m; print(diffusers_ext.__version__, m.version('diffusers-ext'))"
    )
    assert run(installed, "-c", code, cwd=tmp_path, DIFFUSERS_EXT_NO_DISPATCH="1").split() == [version, version]


def test_constraints_pin_every_direct_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {Requirement(line).name for line in project["dependencies"] + extras["training"] + extras["dev"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name.lower().replace("_", "-"): requirement for requirement in map(Requirement, lines)}
    assert wanted <= set(pins)
    assert all(str(pin.specifier).startswith("==") and "+" not in str(pin.specifier) for pin in pins.values())
    assert f'"{pins["ruff"]}"' in (ROOT / ".pre-commit-config.yaml").read_text()


LOOK_AROUND = """
import importlib, importlib.resources, importlib.util, sys
import diffusers_ext
print(diffusers_ext.__file__)
for folder in ("pipelines", "training", "model_cards"):
    print(importlib.import_module("diffusers_ext." + folder).__file__)
    if sys.flags.safe_path:
        assert importlib.util.find_spec(folder) is None, "a top-level `" + folder + "` was installed"
cards = [c for c in importlib.resources.files("diffusers_ext.model_cards").iterdir() if c.name.endswith(".md")]
assert all(card.read_text(encoding="utf-8").strip() for card in cards)
print(len(cards))
"""


def look_around(python: Path, *flags: str, cwd: Path) -> list[Path]:
    """Returns the files that the package and its folders are imported from, after a check that the cards are there."""
    *files, cards = run(python, *flags, "-c", LOOK_AROUND, cwd=cwd, DIFFUSERS_EXT_NO_DISPATCH="1").splitlines()
    assert int(cards) == len(list((ROOT / "model_cards").glob("*.md")))
    return [Path(file) for file in files]


def test_wheel_works_from_outside(installed: Path, tmp_path: Path) -> None:
    assert all(file.is_relative_to(installed.parents[1]) for file in look_around(installed, "-P", cwd=tmp_path))
    code = "import diffusers_ext as d; print(all(hasattr(d, name) for name in d.__all__))"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "True"


def test_wheel_with_the_checkout_as_working_directory(installed: Path, checkout: Path) -> None:
    assert all(file.is_relative_to(checkout) for file in look_around(installed, cwd=checkout))


def test_editable_install_sees_the_checkout(checkout: Path, tmp_path: Path) -> None:
    python = scratch_environment(tmp_path / "venv")
    install(python, "-e", checkout, cwd=tmp_path)
    assert all(file.is_relative_to(checkout) for file in look_around(python, "-P", cwd=tmp_path))
    (checkout / "pipelines/made_later.py").write_text("VALUE = 3\n")
    code = "import diffusers_ext.pipelines.made_later as m; print(m.VALUE)"
    assert run(python, "-c", code, cwd=tmp_path, DIFFUSERS_EXT_NO_DISPATCH="1").strip() == "3"
    (checkout / "pipelines/made_later.py").unlink()


def test_source_install(checkout: Path, tmp_path: Path) -> None:
    python = scratch_environment(tmp_path / "venv")
    install(python, checkout, cwd=tmp_path)
    assert all(file.is_relative_to(tmp_path / "venv") for file in look_around(python, "-P", cwd=tmp_path))


def test_console_command(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "diffusers-ext"
    assert "evaluate" in run(command, "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path).startswith("diffusers-ext ")


SCRIPTS = sorted(path.stem for path in (ROOT / "training").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_script_from_wheel_and_checkout(script: str, installed: Path, checkout: Path, tmp_path: Path) -> None:
    help_of_module = run(installed, "-m", f"diffusers_ext.training.{script}", "--help", cwd=tmp_path)
    help_of_file = run(installed, checkout / "training" / f"{script}.py", "--help", cwd=tmp_path)
    assert "--output_dir" in help_of_module
    assert help_of_file.replace(f"{script}.py", "") == help_of_module.replace(f"{script}.py", "")
