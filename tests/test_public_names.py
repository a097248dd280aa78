"""The names that `diffusers_ext` promises, and what importing it costs."""

import importlib
import os
import subprocess
import sys

import pytest

import diffusers_ext

PUBLIC = [name for name in diffusers_ext.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_name_resolves_to_its_documented_definition(name: str) -> None:
    value = getattr(diffusers_ext, name)
    module = importlib.import_module(f"diffusers_ext.{diffusers_ext._PUBLIC[name]}")
    assert value is getattr(module, name)
    assert value.__module__ == module.__name__, "the table names the module that defines it"
    assert value.__doc__ and value.__doc__.strip()


def test_dir_lists_every_name_once() -> None:
    names = dir(diffusers_ext)
    assert set(diffusers_ext.__all__) <= set(names)
    assert len(names) == len(set(names))


def test_star_import_gives_every_name() -> None:
    namespace: dict = {}
    exec("from diffusers_ext import *", namespace)
    assert set(diffusers_ext.__all__) <= set(namespace)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'diffusers_ext' has no attribute 'PDEAPipeline'"):
        diffusers_ext.PDEAPipeline  # noqa: B018
    with pytest.raises(ImportError, match="PDEAPipeline"):
        from diffusers_ext import PDEAPipeline  # noqa: F401


def test_method_folders_are_mounted_under_one_name() -> None:
    for folder in ("pipelines", "training", "model_cards"):
        module = importlib.import_module(f"diffusers_ext.{folder}")
        assert getattr(diffusers_ext, folder) is module
        assert folder not in sys.modules, f"`{folder}` was imported under a second name"


def test_import_alone_imports_no_torch_when_dispatch_is_off() -> None:
    code = "import sys, diffusers_ext; print(sorted({'torch', 'diffusers', 'datasets'} & set(sys.modules)))"
    environment = os.environ | {"DIFFUSERS_EXT_NO_DISPATCH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
