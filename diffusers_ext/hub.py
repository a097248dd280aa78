"""Hub repos that load anywhere: `HubMixin` for the pipelines of this package, `dispatch` for `DiffusionPipeline`.

diffusers saves a pipeline of custom classes without their code. `HubMixin.save_pretrained` puts the code next to the
weights, so that a repo loads in three ways:

1. `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` where only diffusers is installed,
2. `PDAEPipeline.from_pretrained(repo)`, which runs the installed classes and no code of the repo,
3. `import diffusers_ext; DiffusionPipeline.from_pretrained(repo)`, which finds the class of 2 by its name.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib
import importlib.resources
import inspect
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import jinja2
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES, _unwrap_model
from diffusers.utils import logging
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from packaging.version import Version
from safetensors import SafetensorError

import diffusers_ext

logger = logging.get_logger(__name__)

_INDEX = DiffusionPipeline.config_name
_WORK = ".unfinished_save"
_CODE = re.compile(r"(?P<stem>\w+)_(?P<sha8>[0-9a-f]{8})(\.py)?")
# diffusion_pytorch_model.fp16-00001-of-00002.safetensors, diffusion_pytorch_model.safetensors.index.fp16.json, ...
_WEIGHTS = re.compile(
    r"(.*/)?([^./-]+)(?:\.([^./]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)(?:\.index(?:\.([^./]+))?\.json)?"
)
_MARK = "<!-- Written by diffusers-ext. Delete this line to keep your own text when the card is written again. -->"
# The card of a pipeline whose method has no template.
_TEMPLATE = """---
tags: [diffusers-ext]
---
# {{ repo_id }}

{{ description }}
{% if samples %}

![samples]({{ samples }})
{% endif %}

```py
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{{ repo_id }}", trust_remote_code=True)
```
{% if metrics %}

| data | metric | value |
|---|---|---|
{% for metric in metrics %}
| {{ metric.dataset_name }} | {{ metric.metric_name }} | {{ metric.metric_value }} |
{% endfor %}
{% endif %}
{% if training %}

| training | |
|---|---|
{% for name, value in training.items() %}
| {{ name }} | {{ value }} |
{% endfor %}
{% endif %}

Versions:{% for name, version in versions.items() %} {{ name }} {{ version }}{{ "," if not loop.last }}{% endfor %}
{% if citation %}

```bibtex
{{ citation }}
```
{% endif %}
"""


class HubMixin:
    """Saving, publishing and loading for a `DiffusionPipeline` that is defined in one self-contained file.

    It comes before `DiffusionPipeline` in the bases and is no pipeline itself, so that diffusers finds exactly one
    pipeline class in the file. The saved folder or repo holds, beside what diffusers writes,

    - the file of the pipeline as `<stem>_<sha8>.py` and that of each custom component as
      `<component>/<stem>_<component>_<sha8>.py` (`sha8`: first 8 digits of its SHA-256; diffusers copies all code
      flat into one folder, where equal names of different code would overwrite each other),
    - a `model_index.json` that names these files,
    - a model card.

    Loading through the class itself uses the installed classes: no code of the repo runs, no `trust_remote_code` is
    needed, and it works offline from the cache.

    **Model card.** The template is `<class name in snake case>.md` or else `<stem>.md`, beside the file of the class
    or in `diffusers_ext.model_cards`; else a short general one. Its YAML block holds the method's own metadata
    (`pipeline_tag`, `tags`, ...); its text is Jinja (`trim_blocks`, `lstrip_blocks`) with these variables, empty where
    nothing is known, never `None`: `repo_id`, `class_name`, `description` (the class docstring's first paragraph),
    `base_model`, `license`, `datasets` (a list), `metrics` (a list of [`~huggingface_hub.EvalResult`]), `training` (a
    dict), `samples` (a file name in the repo), `citation`, `versions` (a dict). A card carries a comment that says it
    was generated; where that comment is missing, or where no `card` is given, an existing card keeps its text and only
    gets the metadata that it lacks.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        # download() and load_config() read the index here. A `_class_name` in list form would make download() fetch
        # the repo's pipeline file and ask for trust; the component entries must stay, it looks for their files.
        index = super()._dict_from_json_file(json_file, **kwargs)  # `dduf_entries` in diffusers 0.38
        match index.get("_class_name"):
            case [str() as module, str() as name]:
                index["_class_name"] = name
                code, source = _CODE.fullmatch(module), _source(cls)
                if code and source and code["sha8"] != _sha8(source.read_bytes()):
                    logger.info(f"{json_file} is of another version of {cls.__name__} than {source}, which is used.")
        return index

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "HubMixin | DiffusionPipeline":
        """Load as [`~DiffusionPipeline.from_pretrained`] does; a folder that is being saved to, once that has ended.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a repo id.
            kwargs (*optional*):
                Passed on to [`~DiffusionPipeline.from_pretrained`].

        Raises:
            `ValueError`: The folder is of another pipeline, without components that this one needs.
        """
        while os.path.isdir(pretrained_model_name_or_path):
            _recover(pretrained_model_name_or_path)
            with _locked(Path(pretrained_model_name_or_path), shared=True):
                if not _interrupted(Path(pretrained_model_name_or_path)):
                    index = cls.load_config(pretrained_model_name_or_path)
                    needed, _ = cls._get_signature_keys(cls)
                    if missing := set(needed) - index.keys() - kwargs.keys() - set(cls._optional_components):
                        raise ValueError(
                            f"`{pretrained_model_name_or_path}` holds a {index.get('_class_name')} without "
                            f"{', '.join(f'`{name}`' for name in sorted(missing))}, but a {cls.__name__} needs "
                            f"{'it' if len(missing) == 1 else 'them'}: name the folder of a {cls.__name__}, or pass "
                            "what is missing as arguments."
                        )
                    pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
                    # A relative folder looks like a repo's id where it is saved later.
                    pipeline.register_to_config(_name_or_path=os.path.abspath(pretrained_model_name_or_path))
                    return pipeline
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json` as [`~ConfigMixin.load_config`] does, with custom components by installed classes.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, a `model_index.json` or a repo id.
            args, kwargs (*optional*):
                Passed on to [`~ConfigMixin.load_config`].

        Returns:
            `dict`, or a tuple that starts with it where `return_unused_kwargs` or `return_commit_hash` asks for more.
        """
        _recover(pretrained_model_name_or_path)
        config = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        # from_pretrained() looks up its components by this dict: an entry that names a class of the pipeline's own
        # module is pointed there, so that the file in the component's folder is not run. So is one that another
        # pipeline of this package has published: its scheduler is converted, its networks are used.
        for entry in (config if isinstance(config, dict) else config[0]).values():
            if isinstance(entry, list) and len(entry) == 2 and entry[0] not in LOADABLE_CLASSES:
                for base in cls.__mro__:
                    known = getattr(sys.modules[base.__module__], str(entry[1]), None)
                    if base is not HubMixin and issubclass(base, HubMixin) and inspect.isclass(known):
                        entry[:] = [known.__module__, known.__name__]
                        break
                else:
                    module = diffusers_ext._PUBLIC.get(str(entry[1]), "")
                    if _CODE.fullmatch(str(entry[0])) and module.startswith("pipelines."):
                        # diffusers refuses a library that has not been imported
                        entry[:] = [importlib.import_module(f"{__package__}.{module}").__name__, entry[1]]
        return config

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Make this pipeline from the components of another one, which are shared, and keep their dtypes.

        diffusers casts both pipelines to float32 unless a dtype is given; here every weight keeps the one that it has.
        diffusers leaves out networks of a subclass of what the new pipeline is annotated with; here they come along.

        Args:
            pipeline (`DiffusionPipeline`):
                The pipeline to take the components from.
            kwargs (*optional*):
                Components and arguments that replace those of `pipeline`, `dtype` among them.

        Returns:
            `DiffusionPipeline`: An instance of this class.
        """
        if kwargs.get("custom_pipeline") is None:
            expected = {
                name: tuple(kind for kind in kinds if inspect.isclass(kind))
                for name, kinds in cls._get_signature_types().items()
            }
            for name, component in pipeline.components.items():
                if isinstance(component, torch.nn.Module) and isinstance(component, expected.get(name, ())):
                    kwargs.setdefault(name, component)
        if "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)
        tensors = [
            (module, name, tensor.dtype)
            for component in {**pipeline.components, **kwargs}.values()
            if isinstance(component, torch.nn.Module)
            for module in component.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and tensor.is_floating_point()
        ]
        # The cast cannot be turned off: go to the widest dtype, which loses nothing, and from there back.
        dtypes = {dtype for _, _, dtype in tensors if dtype.itemsize > 1} or {torch.float32}
        widest = functools.reduce(torch.promote_types, dtypes)
        argument = "dtype" if Version(diffusers.__version__) >= Version("0.40.0.dev0") else "torch_dtype"
        new_pipeline = super().from_pipe(pipeline, **kwargs, **{argument: widest})
        for module, name, dtype in tensors:
            tensor = getattr(module, name)
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        return new_pipeline

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        card: dict[str, Any] | None = None,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Save weights, configs, code and model card to a folder that loads by itself, in whole or not at all.

        Everything is written to a hidden folder inside `save_directory` first. Only when it is complete and on disk
        are the files moved to their places, `model_index.json` as the last one. A save that fails or is killed leaves
        the folder as it was; one that is killed during the move leaves a folder without `model_index.json`, which
        refuses to load and is put right by the next save or load through this class. Other files in the folder stay;
        weights of the same component and variant and code of an earlier save are replaced. Until the move, the disk
        has to hold both saves.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder. It is created where it does not exist.
            safe_serialization (`bool`, *optional*, defaults to `True`):
                Whether to write safetensors instead of pickled weights.
            variant (`str`, *optional*):
                Name part of the weight files, for example `"fp16"`.
            max_shard_size (`int` or `str`, *optional*):
                Size from which on weights are split into several files, in bytes or like `"5GB"`.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload the saved files, and no others, after saving.
            card (`dict[str, Any]`, *optional*):
                What the model card says, see [`save_model_card`].
            repo_id (`str`, *optional*):
                Repo to upload to and the name in the card. Defaults to the name of `save_directory`.
            commit_message (`str`, *optional*):
                Message of the commit. Defaults to `"Upload <class name>"`.
            private (`bool`, *optional*):
                Whether a repo that is created is private.
            token (`str` or `bool`, *optional*):
                Token for the Hub. Defaults to the stored one.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead of committing.
            kwargs (*optional*):
                Passed on to [`~DiffusionPipeline.save_pretrained`].

        Returns:
            `CommitInfo` or `None`: The commit where `push_to_hub=True`.

        Raises:
            `TypeError`: An argument is unknown, or `card` is no `dict`.
            `ValueError`: `save_directory` is a file, a component's code cannot be published (the error says why), or
                `card` has an unknown entry.
            `OSError`: The disk is full or cannot be written to. The folder is as it was.

        Examples:

        ```py
        >>> import tempfile
        >>> from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
        >>> from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline

        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ...     norm_num_groups=4,
        ... )
        >>> encoder = PDAEEncoder(8, in_channels=1, latent_dim=4, block_out_channels=(8,), norm_num_groups=4)
        >>> estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=4)
        >>> pipe = PDAEPipeline(unet, encoder, estimator, DDPMScheduler())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pipe.save_pretrained(folder, card={"license": "apache-2.0"})
        ...     print(type(DiffusionPipeline.from_pretrained(folder)).__name__)
        PDAEPipeline

        ```
        """
        if unknown := kwargs.keys() - inspect.signature(DiffusionPipeline.save_pretrained).parameters.keys():
            raise TypeError(f"unexpected arguments {sorted(unknown)}: what the model card says belongs in `card`.")
        folder = Path(os.path.abspath(save_directory))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file: give the name of a folder.")
        code = _code_files(self)
        base_model = str(self.config.get("_name_or_path") or "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) or os.path.isdir(base_model):
            base_model = None
        _generated_card(type(self), repo_id or folder.name, card, base_model)  # raises before anything is written

        with replacing(folder) as new:
            try:
                super().save_pretrained(new, safe_serialization, variant, max_shard_size, **kwargs)
            except SafetensorError as error:  # what safetensors makes of an `OSError`
                raise OSError(f"the weights could not be written to {folder}: {error}") from error
            index = json.loads((new / _INDEX).read_text(encoding="utf-8"))
            index.pop("_name_or_path", None)  # a path on this machine, or a repo that the card names
            for component, (name, source, class_name) in code.items():
                (new / name).write_bytes(source)
                index[component] = [Path(name).stem, class_name]
            (new / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if (folder / "README.md").is_file():
                shutil.copy2(folder / "README.md", new)
            self.save_model_card(new, repo_id or folder.name, card, base_model=base_model)
            saved = _files(new)
        if not push_to_hub:
            return None

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id or folder.name, private=private, exist_ok=True).repo_id
        readme = index = None
        with contextlib.suppress(EntryNotFoundError):
            readme = _read(api.hf_hub_download(repo_id, "README.md"))
        with contextlib.suppress(EntryNotFoundError):
            index = Path(api.hf_hub_download(repo_id, _INDEX)).read_bytes()
        self.save_model_card(folder, repo_id, card, base_model=base_model, published=readme)
        stale = _superseded(api.list_repo_files(repo_id), saved, index)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in saved],
            delete_patterns=[glob.escape(name) for name in stale],
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload the pipeline with its code and model card. Code of an earlier push is removed from the repo.

        Args:
            repo_id (`str`):
                Name of the repo, which is created where it does not exist.
            commit_message, private, token, create_pr, safe_serialization, variant (*optional*):
                As in [`save_pretrained`].
            kwargs (*optional*):
                Passed on to [`save_pretrained`], `card` among them.

        Returns:
            `CommitInfo`: The commit, or the one before where nothing has changed.

        Raises:
            `ValueError`: As in [`save_pretrained`], or the Hub refuses the card's metadata.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                safe_serialization,
                variant,
                push_to_hub=True,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                **kwargs,
            )

    @classmethod
    def save_model_card(
        cls,
        save_directory: str | os.PathLike,
        repo_id: str | None = None,
        card: dict[str, Any] | None = None,
        *,
        base_model: str | None = None,
        published: str | None = None,
    ) -> None:
        """Write `README.md` from the method's template, or complete the metadata of one that was written by hand.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder of the saved pipeline.
            repo_id (`str`, *optional*):
                Repo that the card speaks of. Defaults to the folder's name.
            card (`dict[str, Any]`, *optional*):
                Keyword arguments of [`~huggingface_hub.ModelCardData`] (`license`, `datasets`, `tags`, ...). Of
                `license` only the form is checked here, since the list of licenses is the Hub's, which checks it when
                the card is published; one of your own is `license="other"` with `license_name` and `license_link`.
                Beside them

                - `metrics` (`list` of [`~huggingface_hub.EvalResult`] or of `dict`): measured results. A `dict` needs
                  `dataset_name`, `metric_type` and `metric_value`; `dataset_type` and `metric_name` default to the
                  first two, `task_type` to the `pipeline_tag`.
                - `training` (`dict[str, Any]`): how it was trained, name to value.
                - `samples` (`str` or `os.PathLike`): a picture, copied into the folder and shown.
                - `citation` (`str`): BibTeX.

                Without it, a card that is there keeps its text.
            base_model (`str`, *optional*):
                Base model, where `card` names none and it is not `repo_id` itself.
            published (`str`, *optional*):
                The card that the Hub has. It is kept where it was written by hand and the folder's was not.

        Raises:
            `ValueError`: `card` has an unknown or invalid entry, or the existing card's metadata cannot be read.
        """
        folder = Path(save_directory)
        content = _generated_card(cls, repo_id or folder.resolve().name, card, base_model)
        existing = [text for text in (_read(folder / "README.md"), published) if text is not None]
        kept = [text for text in existing if _MARK not in text] or (existing[::-1] if card is None else [])
        if kept:
            logger.info(f"The card of {folder} keeps its text and gets the metadata that it lacks.")
            content = _with_metadata(kept[0], ModelCard(content).data)
        elif card and card.get("samples"):
            samples = Path(card["samples"])
            if not (folder / samples.name).exists() or not samples.samefile(folder / samples.name):
                _write(folder / samples.name, samples.read_bytes())
        _write(folder / "README.md", content.encode("utf-8"))


def dispatch() -> None:
    """Let `DiffusionPipeline.from_pretrained(repo)` find the pipelines of this package without `trust_remote_code`.

    It wraps that one method, once, however often it is called. The wrapper reads the repo's `model_index.json` and,
    where the class that it names is one of ours, calls that class; everything else goes to diffusers as before: other
    classes, subclasses of `DiffusionPipeline`, and calls with `custom_pipeline` or `trust_remote_code`. It runs when
    `diffusers_ext` is imported, unless `DIFFUSERS_EXT_NO_DISPATCH=1` is set.
    """
    stock = DiffusionPipeline.__dict__["from_pretrained"].__func__
    if hasattr(stock, "_dispatches"):
        return

    @functools.wraps(stock)
    def from_pretrained(
        cls: type[DiffusionPipeline], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> DiffusionPipeline:
        if cls is DiffusionPipeline and kwargs.get("custom_pipeline") is None and not kwargs.get("trust_remote_code"):
            options = ("cache_dir", "proxies", "token", "local_files_only", "revision", "subfolder")
            name = None
            with contextlib.suppress(OSError, ValueError):  # diffusers itself will say what is wrong with the repo
                _recover(pretrained_model_name_or_path)
                index = cls.load_config(
                    pretrained_model_name_or_path, **{option: kwargs[option] for option in options if option in kwargs}
                )
                match index:
                    case {"_class_name": [_, str() as name] | str(name)}:
                        pass
            if diffusers_ext._PUBLIC.get(name, "").startswith("pipelines."):
                known = getattr(diffusers_ext, name)
                if issubclass(known, HubMixin):
                    return known.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return stock(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained._dispatches = True
    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


def _source(cls: type) -> Path | None:
    """The file that defines `cls`, if there is one."""
    try:
        source = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        return None
    return Path(source) if source and Path(source).is_file() else None


def _sha8(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:8]


def _stem(source: Path) -> str:
    """The method's name: the file's, without the hash that an earlier export put there."""
    code = _CODE.fullmatch(source.stem)
    return re.sub(r"\W", "_", code["stem"] if code and code["sha8"] == _sha8(source.read_bytes()) else source.stem)


def _code_files(pipeline: DiffusionPipeline) -> dict[str, tuple[str, bytes, str]]:
    """Index entry -> (file name in the repo, source, class name) for the pipeline and each custom component."""
    for name, value in pipeline.config.items():
        numbers = isinstance(value, list | tuple) and value and all(isinstance(v, int | float) for v in value)
        if isinstance(value, list | tuple) and not numbers and name not in pipeline.components:
            raise ValueError(
                f"the config value `{name}` of {type(pipeline).__name__} is {value!r}, but diffusers takes a list in"
                " `model_index.json` for a component: register a dict or a joined string."
            )
    classes = {"_class_name": type(pipeline)}
    for name, component in pipeline.components.items():
        cls = type(_unwrap_model(component))
        if component is not None and cls.__module__.split(".")[0] not in LOADABLE_CLASSES:
            classes[name] = cls
    files = {}
    for name, cls in classes.items():
        what = f"{type(pipeline).__name__} cannot be saved: {'its class' if cls is type(pipeline) else f'`{name}`'}"
        path = _source(cls)
        source = path.read_bytes() if path else b""
        nodes = list(ast.walk(ast.parse(source)))
        # by name, because a class from a notebook or from `exec` may be said to be of a file that it is not in
        if cls.__qualname__ not in [node.name for node in nodes if isinstance(node, ast.ClassDef)]:
            raise ValueError(
                f"{what} ({cls.__qualname__}) is not defined at the top level of a file (but in a notebook or a"
                " function?), so there is no code to put next to the weights: move it to a `.py` file and import it."
            )
        relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        if relative:
            raise ValueError(
                f"{what} is defined in {path}, whose line {relative[0].lineno} is a relative import, but only this one"
                " file goes into the repo: make the file self-contained."
            )
        if cls is type(pipeline):
            files[name] = (f"{_stem(path)}_{_sha8(source)}.py", source, cls.__name__)
            continue
        # diffusers looks the loadable base class up in the module of the component
        module = vars(sys.modules[cls.__module__])
        bases = [base for base in cls.__mro__ if base.__name__ in ALL_IMPORTABLE_CLASSES]
        if not any(module.get(base.__name__) is base for base in bases):
            needed = bases[0].__name__ if bases else "ModelMixin` or `SchedulerMixin"
            raise ValueError(
                f"{what} ({cls.__name__}) could not be loaded again, because {path} does not name its base class"
                f" `{needed}`: derive the class from it and import it in that file."
            )
        stem = _stem(path).removesuffix(f"_{name}")
        files[name] = (f"{name}/{stem}_{name}_{_sha8(source)}.py", source, cls.__name__)
    return files


def _generated_card(cls: type, repo_id: str, card: dict[str, Any] | None, base_model: str | None) -> str:
    """The card as the template and `card` have it, see [`HubMixin.save_model_card`]."""
    if not isinstance(card, dict | None):
        raise TypeError(f"`card` is a {type(card).__name__}, but must be a `dict` such as {{'license': 'mit'}}.")
    card = dict(card or {})
    source = _source(cls)
    # a model that is published alone has its own: NoisyClassifier's is noisy_classifier.md
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
    names = [f"{own}.md", f"{_stem(source)}.md"] if source else []
    packaged = importlib.resources.files("diffusers_ext.model_cards")
    texts = [folder / name for name in names for folder in (source.parent, packaged)]
    template = ModelCard(next((text.read_text(encoding="utf-8") for text in texts if text.is_file()), _TEMPLATE))

    metrics, training = card.pop("metrics", None) or [], card.pop("training", None) or {}
    samples, citation = card.pop("samples", None), card.pop("citation", None)
    known = inspect.signature(ModelCardData).parameters.keys() - {"eval_results", "ignore_metadata_errors", "kwargs"}
    if unknown := card.keys() - known:
        raise ValueError(
            f"`card` has {sorted(unknown)}, but can only have `metrics`, `training`, `samples`, `citation` and"
            f" the metadata {sorted(known)}."
        )
    if samples and not Path(samples).is_file():
        raise ValueError(f"`samples` of `card` is {str(samples)!r}, which is no file: give the path of a picture.")
    metadata = {"library_name": "diffusers", **template.data.to_dict()}
    if base_model != repo_id:
        metadata["base_model"] = base_model
    card |= {name: [card[name]] for name in ("datasets", "tags") if isinstance(card.get(name), str)}
    metadata |= {name: value for name, value in card.items() if value is not None}
    metadata["tags"] = [*template.data.get("tags", []), *(card.get("tags") or [])] or None
    licenses = metadata.get("license") or []
    for license in [licenses] if isinstance(licenses, str) else licenses:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license)):
            raise ValueError(
                f"`license` of `card` is {license!r}, but must be an identifier of the Hub such as 'apache-2.0' or "
                "'cc-by-4.0' (https://huggingface.co/docs/hub/repositories-licenses): for another license, pass "
                "'other' and its name as `license_name`."
            )

    results = []
    for metric in metrics:
        if isinstance(metric, dict):
            metric = {
                "task_type": metadata.get("pipeline_tag") or "other",
                "dataset_type": metric.get("dataset_name"),
                **metric,
            }
            try:
                metric = EvalResult(**metric)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`metrics` of `card` has {metric}, which is no `EvalResult`: {error}.") from error
        if not isinstance(metric, EvalResult):
            raise ValueError(f"`metrics` of `card` has {metric!r}, which is no `EvalResult` and no `dict`.")
        value = metric.metric_value
        value = value.item() if hasattr(value, "item") else value  # NumPy's and torch's scalars
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"`metrics` of `card` has {metric.metric_type} = {value}: leave out what has no value.")
        name = metric.metric_name or metric.metric_type
        results.append(dataclasses.replace(metric, metric_name=name, metric_value=value))
    name = metadata.pop("model_name", None) or repo_id.split("/")[-1]
    data = ModelCardData(**metadata, **({"model_name": name, "eval_results": results} if results else {}))

    datasets = data.get("datasets") or []
    text = jinja2.Template(
        template.text.lstrip(), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).render(
        repo_id=repo_id,
        class_name=cls.__name__,
        description=(inspect.getdoc(cls) or "").split("\n\n")[0],
        base_model=data.get("base_model") or "",
        license=data.get("license") or "",
        datasets=datasets,
        metrics=results,
        training=training,
        samples=Path(samples).name if samples else "",
        citation=citation or "",
        versions={
            "diffusers-ext": diffusers_ext.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__.split("+")[0],
        },
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_MARK}\n\n{text.strip()}\n"


def _with_metadata(text: str, data: ModelCardData) -> str:
    """`text` to the letter, plus the entries of `data` that its YAML block lacks."""
    try:
        present = ModelCard(text).data.to_dict()
    except Exception as error:
        raise ValueError(f"the metadata of the existing `README.md` cannot be read, correct it: {error}") from error
    missing = ModelCardData(**{name: v for name, v in data.to_dict().items() if present.get(name) is None})
    if not missing.to_dict():
        return text
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = missing.to_yaml(line_break=newline) + newline
    block = re.match(r"\s*---[ \t]*\r?\n(?:[\s\S]*?\r?\n)??(?=---[ \t]*(?:\r?\n|$))", text)
    if block is None:
        return f"---{newline}{lines}---{newline}{newline}{text}"
    return text[: block.end()] + lines + text[block.end() :]


def _read(path: str | os.PathLike) -> str | None:
    if not Path(path).is_file():
        return None
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
        return file.read()


def _write(path: Path, content: bytes) -> None:
    """Write the file in whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file or, where the system can, a folder on disk before going on."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders, nobody a read-only file
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: Path) -> list[str]:
    """Paths of all files below `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _superseded(existing: Iterable[str], saved: Iterable[str], index: bytes | None) -> list[str]:
    """Files of an earlier save that would be loaded in place of the new ones, or are their dead code.

    These are the code files that the earlier index names and weights of the same folder, base name and variant:
    diffusers prefers a shard index to a single file and safetensors to pickles, however old they are.
    """
    try:
        entries = json.loads(index or b"{}")
    except ValueError:
        entries = {}
    code = {
        f"{entry[0]}.py" if name == "_class_name" else f"{name}/{entry[0]}.py"
        for name, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, list) and entry and _CODE.fullmatch(str(entry[0]))
    }

    def weights(path: str) -> tuple | None:
        match = _WEIGHTS.fullmatch(path)
        return match and (match[1], match[2], match[3] or match[4])

    new = {weights(path) for path in saved} - {None}
    return [path for path in existing if path not in saved and (path in code or weights(path) in new)]


@contextlib.contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Let one process at a time change `folder`, or several read it; the lock ends with the process in any case."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows, and file systems without locks
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, then put its files into `folder`: all of them, or none when anything fails.

    It lies inside `folder`, so that no move crosses a file system. The steps, each of which `_finish` can take up:

    1. `new` is filled and synced. The old files are in place.
    2. The old files that make way, the index first, go to `old`. Without an index `folder` does not load.
    3. `new` is renamed to `ready`: from here on it goes forward, before this it goes back.
    4. The files of `ready`, the index last, go to their places.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _finish(folder)
        work = folder / _WORK
        new, old = work / "new", work / "old"
        try:
            new.mkdir(parents=True)
            yield new
            for path in (*new.rglob("*"), new):
                _sync(path)
            saved = _files(new)
            if blocked := next((folder / name for name in saved if (folder / name).is_dir()), None):
                raise IsADirectoryError(f"{blocked} is a folder, but a file of that name is saved: move it away.")
            folders = {(folder / name).parent for name in saved}
            for path in folders:
                path.mkdir(parents=True, exist_ok=True)
            existing = [path.relative_to(folder).as_posix() for f in folders for path in f.iterdir() if path.is_file()]
            index = (folder / _INDEX).read_bytes() if _INDEX in existing else None
            replaced = {*_superseded(existing, saved, index), *(set(existing) & set(saved))}
            for name in sorted(replaced, key=lambda name: name != _INDEX):
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, old / name)
            os.rename(new, work / "ready")
        except BaseException as error:
            if not (work / "ready").exists():
                space = shutil.disk_usage(folder).free / 2**20
                error.add_note(f"{folder} is as it was before the save. Its file system had {space:.1f} MiB left.")
            _finish(folder)
            if not existed:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        _finish(folder)


def _finish(folder: Path) -> None:
    """Bring an interrupted `replacing` to its end: forward where the new files are complete, else back."""
    work = folder / _WORK
    if not work.is_dir():
        return
    source = work / "ready" if (work / "ready").is_dir() else work / "old"
    for name in sorted(_files(source), key=lambda name: name == _INDEX):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, folder / name)
    _sync(folder)
    shutil.rmtree(work / "old", ignore_errors=True)
    if not (work / "old").exists():  # not before: `ready` says that `old` is outdated
        shutil.rmtree(work, ignore_errors=True)


def _interrupted(folder: Path) -> bool:
    moving = (folder / _WORK / "old").is_dir() or (folder / _WORK / "ready").is_dir()
    return moving and not (folder / _INDEX).exists()


def _recover(folder: str | os.PathLike) -> None:
    """Put right a local folder that a save left without index when it was killed."""
    folder = Path(folder)
    if _interrupted(folder):
        try:
            with _locked(folder):
                _finish(folder)
        except OSError as error:
            raise OSError(
                f"{folder} holds an interrupted save that could not be brought to its end ({error}): load it where"
                " it can be written to, or save again."
            ) from error
