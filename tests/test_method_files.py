"""The rules of the architecture, read from the source; every rule is shown to fail on a file that breaks it."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils.dynamic_modules_utils import find_pipeline_class
from reader_env import make_reader

import diffusers_ext

ROOT = Path(__file__).parents[1]
METHODS = sorted(path for path in (ROOT / "pipelines").glob("*.py") if path.name != "__init__.py")
ALLOWED = {"PIL", "diffusers", "numpy", "torch", "transformers", *sys.stdlib_module_names}
HUB = "diffusers_ext.hub"
BASES = ("ModelMixin", "SchedulerMixin", "BaseGuidance")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Everything that the file imports anywhere: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node) for alias in node.names)


def violations(path: Path) -> list[str]:
    """What keeps a method's file from working by itself, from the Hub, and under every name that it has."""
    source = path.read_text(encoding="utf-8")
    tree, found = ast.parse(source), []
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in block.handlers)
        for node in block.body
    }
    for name, node in imports(tree):
        if name.startswith("."):
            found.append(f"relative import: {name}")
        elif name == HUB and isinstance(node, ast.Import) and id(node) in guarded:
            pass  # the one import of this package, and the spelling that diffusers does not take for a requirement
        elif name.split(".")[0] not in ALLOWED:
            found.append(f"import: {name}")
    # diffusers looks for requirements by regular expression, also in docstrings
    lines = re.findall(r"^\s*import\s+(\S+)\s*$|^\s*from\s+(\S+)\s+import", source, re.MULTILINE)
    for name in ("".join(groups).split(".")[0] for groups in lines):
        if name not in ALLOWED:
            found.append(f"taken for a requirement by diffusers: {name}")
    if path.stem in {name for name in vars(diffusers.pipelines) if not name.startswith("_")}:
        found.append(f"file name of a diffusers pipeline folder: {path.stem}")

    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in sorted(own & set(dir(diffusers))):
        found.append(f"class name of diffusers: {name}")
    for node in ast.walk(tree):
        # each load executes the file again, once per role, so that these classes are not what they seem
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("isinstance", "issubclass")
            and own & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
        ):
            found.append(f"`{ast.unparse(node)}` asks for a class of the file")
    if found:
        return found

    spec = importlib.util.spec_from_file_location(f"rules_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        pipeline = find_pipeline_class(module)
    except ValueError as error:
        return [str(error)]
    if pipeline is None:
        return ["no pipeline class"]
    if not issubclass(pipeline, diffusers_ext.HubMixin):
        found.append(f"{pipeline.__name__} is no `HubMixin`")
    for cls in (getattr(module, name) for name in sorted(own)):
        for base in BASES:
            if issubclass(cls, getattr(diffusers, base, ())) and not hasattr(module, base):
                found.append(f"{cls.__name__} needs `{base}` in the namespace of its file")
    hints = typing.get_type_hints(pipeline.__init__)
    for name in list(inspect.signature(pipeline.__init__).parameters)[1:]:
        types = typing.get_args(hints.get(name)) or (hints.get(name),)
        if hints.get(name) is None:
            found.append(f"`{name}` of {pipeline.__name__} is not annotated")
        elif any(t.__name__ in own for t in types) and not any(t.__name__ in BASES for t in types):
            found.append(
                f"`{name}` of {pipeline.__name__} needs `| ModelMixin` or the like: a repo's class is another"
            )
    if not pipeline.model_cpu_offload_seq:
        found.append(f"{pipeline.__name__} has no `model_cpu_offload_seq`")
    return found


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_file(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_is_complete(path: Path) -> None:
    """Its pipeline is public, so that `dispatch` knows it, and it has a model card."""
    module = importlib.import_module(f"diffusers_ext.pipelines.{path.stem}")
    pipeline = find_pipeline_class(module)
    assert getattr(diffusers_ext, pipeline.__name__) is pipeline
    assert (ROOT / "model_cards" / f"{path.stem}.md").is_file()


def test_there_are_methods() -> None:
    assert METHODS


GOOD = (Path(__file__).parent / "toy_method.py").read_text(encoding="utf-8")


def test_good_file_breaks_no_rule(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    assert violations(tmp_path / "good.py") == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("import torch\n", "import torch\nfrom . import helper\n", "relative import: ..helper"),
        ("import torch\n", "import torch\nimport scipy.linalg\n", "import: scipy.linalg"),
        (
            "    import diffusers_ext.hub as _hub\n",
            "    from diffusers_ext import hub as _hub\n",
            "import: diffusers_ext.hub",
        ),
        ("class ToyEncoder", "import diffusers_ext.hub\n\n\nclass ToyEncoder", "import: diffusers_ext.hub"),
        ('"""One linear layer."""', '"""\n    import scipy\n    """', "taken for a requirement by diffusers: scipy"),
        ("class ToyScheduler", "class RePaintPipeline:\n    pass\n\n\nclass ToyScheduler", "class name of diffusers"),
        (
            "        code = self.",
            "        assert isinstance(self.encoder, ToyEncoder)\n        code = self.",
            "isinstance",
        ),
        ("class ToyPipeline(HubMixin, ", "class ToyPipeline(", "is no `HubMixin`"),
        ("class ToyPipeline(HubMixin, DiffusionPipeline)", "class ToyPipeline(HubMixin)", "no pipeline class"),
        ("class ToyPipeline", "class Second(DiffusionPipeline):\n    pass\n\n\nclass ToyPipeline", "Multiple classes"),
        ("unet: UNet2DModel,", "unet,", "`unet` of ToyPipeline is not annotated"),
        ("encoder: ToyEncoder | ModelMixin", "encoder: ToyEncoder", "needs `| ModelMixin`"),
        ('    model_cpu_offload_seq = "encoder->unet"\n', "", "has no `model_cpu_offload_seq`"),
    ],
)
def test_each_rule_can_fail(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    (tmp_path / "bad.py").write_text(GOOD.replace(old, new))
    assert any(message in found for found in violations(tmp_path / "bad.py"))


def test_named_base_can_fail(tmp_path: Path) -> None:
    source = GOOD.replace("ModelMixin", "Base").replace("import DiffusionPipeline, Base", "import DiffusionPipeline")
    (tmp_path / "bad.py").write_text(
        source.replace("import torch\n", "import torch\nfrom diffusers import ModelMixin as Base\n")
    )
    assert violations(tmp_path / "bad.py") == ["ToyEncoder needs `ModelMixin` in the namespace of its file"]


def test_name_of_a_diffusers_folder_can_fail(tmp_path: Path) -> None:
    (tmp_path / "ddpm.py").write_text(GOOD)
    assert violations(tmp_path / "ddpm.py") == ["file name of a diffusers pipeline folder: ddpm"]


# --- Copies


def wrong_copies(folder: Path) -> list[str]:
    """Definitions below a line `# Copied from pipelines.<file>.<name>` that are not what stands there.

    Comments and layout may differ, code and docstrings not.
    """
    found = []
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for number, line in enumerate(source.splitlines(), 1):
            if "Copied from" not in line:
                continue
            match = re.fullmatch(r"\s*# Copied from pipelines\.(\w+)\.([\w.]+)", line)
            original = folder / f"{match[1]}.py" if match else None
            if original is None or not original.is_file():
                found.append(f"{path.name}:{number}: no such file: {line.strip()}")
                continue
            copy, model = (
                next(
                    (
                        n
                        for n in definitions(source).values()
                        if min([n.lineno, *(d.lineno for d in n.decorator_list)]) == number + 1
                    ),
                    None,
                ),
                definitions(original.read_text(encoding="utf-8")).get(match[2]),
            )
            if copy is None or model is None or ast.dump(copy) != ast.dump(model):
                found.append(f"{path.name}:{number}: differs from pipelines.{match[1]}.{match[2]}")
    return found


def definitions(source: str) -> dict[str, ast.AST]:
    """Functions and classes by their dotted names."""
    found, waiting = {}, [("", node) for node in ast.parse(source).body]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[prefix + node.name] = node
            waiting += [(f"{prefix}{node.name}.", child) for child in node.body]
    return found


def test_copies_agree() -> None:
    assert wrong_copies(ROOT / "pipelines") == []


def test_copies_can_disagree(tmp_path: Path) -> None:
    function = "def f(x):\n    return x + 1\n"
    (tmp_path / "a.py").write_text(f"class A:\n{textwrap.indent(function, '    ')}\n\n{function}")
    marked = "# Copied from pipelines.a.f\n"
    (tmp_path / "b.py").write_text(f"{marked}{function.replace('return', '# why' + chr(10) + '    return')}")
    assert wrong_copies(tmp_path) == []
    method = "class B:\n    # Copied from pipelines.a.A.f\n" + textwrap.indent(function, "    ")
    (tmp_path / "b.py").write_text(method)
    assert wrong_copies(tmp_path) == []
    for source in (
        f"{marked}{function.replace('1', '2')}",
        f"{marked}@decorated\n{function}",
        f"{marked}\n{function}",
        f"{marked.replace('.a.', '.c.')}{function}",
        f"{marked.replace('.f', '.g')}{function}",
        method.replace("x + 1", "x"),
    ):
        (tmp_path / "b.py").write_text(source)
        assert len(wrong_copies(tmp_path)) == 1, source


# --- Direction of dependence


def wrong_imports(files: dict[str, str]) -> list[str]:
    """Imports against the direction scripts and commands -> library -> methods -> hub; by module name and source."""
    top = (
        "diffusers_ext.training",
        "diffusers_ext.cli",
        "diffusers_ext.demo",
        "diffusers_ext.demo_unclip",
        "benchmarks",
        "tests",
    )
    found = []

    def below(name: str, *packages: str) -> bool:
        return any(f"{name}.".startswith(f"{package}.") for package in packages)

    for module, source in files.items():
        for name, _ in imports(ast.parse(source)):
            allowed = (
                {HUB} if below(module, "diffusers_ext.pipelines") else {"diffusers_ext"} if module == HUB else None
            )
            if below(name, "pipelines", "training", "model_cards"):
                found.append(f"{module} imports {name}, which is a second identity of diffusers_ext.{name}")
            elif below(name, *top) and not below(module, *top):
                found.append(f"{module} imports {name} from above")
            elif allowed and below(name, "diffusers_ext") and name not in allowed:
                found.append(f"{module} imports {name}, but may import {allowed} only")
    return found


def package_files() -> dict[str, str]:
    folders = {name: f"diffusers_ext.{name}" for name in ("pipelines", "training", "model_cards")}
    folders |= {"diffusers_ext": "diffusers_ext", "benchmarks": "benchmarks"}
    files = {}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join((package, *parts)).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return files


def test_direction_of_dependence() -> None:
    files = package_files()
    assert {"diffusers_ext", "diffusers_ext.hub", "diffusers_ext.pipelines.pdae"} <= files.keys()
    assert wrong_imports(files) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("diffusers_ext.pipelines.copaint", "from diffusers_ext.pipelines.pdae import slerp"),
        ("diffusers_ext.pipelines.copaint", "from diffusers_ext import PDAEPipeline"),
        ("diffusers_ext.hub", "from diffusers_ext.pipelines import pdae"),
        ("diffusers_ext.data", "def f():\n    from diffusers_ext.training import train_pdae"),
        ("diffusers_ext.evaluation.cli", "import diffusers_ext.cli"),
        ("diffusers_ext.training.train_pdae", "from pipelines.pdae import PDAEPipeline"),
    ],
)
def test_direction_of_dependence_can_fail(module: str, line: str) -> None:
    assert wrong_imports({module: "import torch"}) == []
    assert len(wrong_imports({module: line})) == 1


def test_import_needs_diffusers_and_torch_only(tmp_path: Path) -> None:
    code = """
    import importlib.util, sys
    import diffusers_ext
    loaded = {name for name in sys.modules if name.startswith("diffusers_ext.")}
    folders = {f"diffusers_ext.{name}" for name in ("pipelines", "training", "model_cards")}
    assert loaded <= {"diffusers_ext.hub", *folders}, loaded
    for name in ("accelerate", "datasets", "transformers", "sklearn", "torchmetrics"):
        assert importlib.util.find_spec(name) is None, name
    assert diffusers_ext.PDAEPipeline and diffusers_ext.HubMixin
    assert diffusers_ext.load_image_dataset
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [make_reader(tmp_path / "env"), "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- The parts of diffusers that are not documented and that `hub` stands on


def test_canary_loading(tiny_ddpm_folder: Path) -> None:
    calls = []

    class Probe(DDPMPipeline):
        @classmethod
        def _dict_from_json_file(cls, *args, **kwargs):
            calls.append("_dict_from_json_file")
            return super()._dict_from_json_file(*args, **kwargs)

        @classmethod
        def load_config(cls, *args, **kwargs):
            calls.append("load_config")
            return super().load_config(*args, **kwargs)

    Probe.from_pretrained(tiny_ddpm_folder)
    assert calls == ["load_config", "_dict_from_json_file"]
    # From the Hub, the index is read once before: see `test_hub_scenarios`.
    assert "cls._dict_from_json_file(" in inspect.getsource(DiffusionPipeline.download)


def test_canary_names() -> None:
    assert DiffusionPipeline.config_name == "model_index.json"
    assert {"ModelMixin", "SchedulerMixin"} <= set(pipeline_loading_utils.LOADABLE_CLASSES["diffusers"])
    assert "PreTrainedModel" in pipeline_loading_utils.LOADABLE_CLASSES["transformers"]
    assert pipeline_loading_utils.ALL_IMPORTABLE_CLASSES["ModelMixin"] == ["save_pretrained", "from_pretrained"]
    model = object()
    assert pipeline_loading_utils._unwrap_model(model) is model
    assert isinstance(DiffusionPipeline.__dict__["from_pretrained"], classmethod)


def test_canary_base_is_looked_up_in_the_module_of_the_component() -> None:
    # why `HubMixin` refuses a component whose file does not name its base
    found, bases = pipeline_loading_utils.get_class_obj_and_candidates(
        __name__, "Path", {"DDPMPipeline": [], "ModelMixin": []}, diffusers.pipelines, is_pipeline_module=False
    )
    assert found is Path
    assert bases == {"DDPMPipeline": DDPMPipeline, "ModelMixin": None}


def test_canary_custom_components(tiny_ddpm_folder: Path) -> None:
    # why the index keeps the names of the code files until the download is done
    index = {"_class_name": "X", "encoder": ["code_1234", "Encoder"]}
    look = pipeline_loading_utils._get_custom_components_and_folders
    assert look("repo", index, ["encoder/code_1234.py"])[0] == {"encoder": "code_1234"}
    with pytest.raises(ValueError, match=r"encoder/code_1234\.py"):
        look("repo", index, ["encoder/config.json"])
