"""Compute the CLIP embeddings of captioned images once, for a prior that sees them many times.

From an image folder with `metadata.jsonl` (`file_name` and `text` on each line), or a data set of the Hub:

```bash
python training/precompute_clip_embeddings.py --pretrained_clip_model_name_or_path openai/clip-vit-large-patch14 \
  --train_data_dir pictures --batch_size 256 --dataloader_num_workers 8 --output_dir embeddings
python training/precompute_clip_embeddings.py ... --split validation --output_dir embeddings-validation
```

On the digits and the CLIP of `training/train_toy_clip.py`, in seconds:

```bash
python -m diffusers_ext.training.precompute_clip_embeddings --pretrained_clip_model_name_or_path clip-digits \
  --train_data_dir digit-images --label_column digit --output_dir embeddings-digits
python -m diffusers_ext.training.precompute_clip_embeddings --pretrained_clip_model_name_or_path clip-digits \
  --train_data_dir digit-images --label_column digit --split validation --output_dir embeddings-digits-validation
```

The folder receives `embeddings-00000.safetensors` and so on, and `embeddings.json` with their hashes, the statistics
of the image embeddings, and what they were made of. A run that was killed is taken up by the same command: shards that
are whole, by their hash, are kept. Embeddings of two CLIPs, tokenizers or data sets never end up in one folder.

An image and its caption take 6 kB at 768 dimensions, 3 kB with `--embeddings_dtype float16`. The text encoder's hidden
states would take 40 times as much: training recomputes them, unless `--cache_hidden_states` keeps them.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    HfArgumentParser,
    ImageProcessingMixin,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from diffusers_ext.data import load_image_dataset
from diffusers_ext.training_run import argument, run_script

logger = logging.getLogger(__name__)

_INDEX = "embeddings.json"
_FORMAT = 1


@dataclass(kw_only=True)
class PrecomputeArguments:
    """Arguments of this script.

    Raises:
        ValueError: A number is out of its range.
    """

    pretrained_clip_model_name_or_path: str = argument(
        None, "Hub id or folder of a CLIP, or of a pipeline with `text_encoder`, `tokenizer` and `image_encoder`."
    )
    output_dir: str = argument(None, "Receives the embeddings.")
    revision: str | None = argument(None, "Branch, tag or commit of the CLIP.")
    cache_dir: str | None = argument(None, "Where downloaded models and data sets are kept.")
    # data
    train_data_dir: str | None = argument(None, "Image folder with `metadata.jsonl`.")
    dataset_name: str | None = argument(None, "A data set of the Hub, or a folder for `datasets`.")
    dataset_config_name: str | None = argument(None, "Configuration of the Hub data set.")
    split: Literal["train", "validation"] = argument("train", "The training images, or those held out.")
    image_column: str = argument("image", "Column of the data set that holds the images.")
    caption_column: str = argument("text", "Column of the data set that holds the captions.")
    label_column: str = argument("label", "Column with classes, for zero-shot accuracy; kept where there is one.")
    max_train_samples: int | None = argument(None, "Use at most this many images.")
    validation_fraction: float | None = argument(None, "Images held out: below 1 the share, from 1 on the number.")
    seed: int = argument(0, "Seed of the held-out split and of the order.")
    # computation
    batch_size: int = argument(64, "Images per forward pass.")
    shard_size: int = argument(10_000, "Images per file.")
    cache_hidden_states: bool = argument(False, "Keep the text encoder's hidden states too, in float16.")
    embeddings_dtype: Literal["float32", "float16"] = argument("float32", "Precision of the embeddings.")
    dataloader_num_workers: int = argument(0, "Processes that load images; 0 loads in the main process.")
    device: str | None = argument(None, "Device of the encoders; by default the first GPU, or else the CPU.")

    def __post_init__(self) -> None:
        for name in ("pretrained_clip_model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: pass it.")
        for name, least in (
            ("batch_size", 1), ("shard_size", 1), ("max_train_samples", 1), ("dataloader_num_workers", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")


def load_clip(
    pretrained_clip_model_name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection]:
    """Load both encoders of a CLIP in float32, frozen, with the tokenizer, and check that they belong together.

    Args:
        pretrained_clip_model_name_or_path (`str` or `os.PathLike`):
            Hub id or folder of a CLIP in transformers' format, or of a pipeline that has one (`text_encoder`,
            `tokenizer`, `image_encoder`), such as a prior's.
        revision (`str`, *optional*): Branch, tag or commit.
        cache_dir (`str`, *optional*): Where downloaded models are kept.

    Returns:
        `tuple`: Text encoder, tokenizer, image encoder.

    Raises:
        ValueError: It is not there or lacks weights, embeddings of texts and images differ in size, the tokenizer's
            end of text is not the one that the text encoder pools at, its length is not one that the text encoder has
            positions for, or the images are not normalized as CLIP's.
    """
    path, where = str(pretrained_clip_model_name_or_path), {"revision": revision, "cache_dir": cache_dir}
    options = {"text_encoder": {}, "tokenizer": {}, "image_encoder": {}}
    try:
        DiffusionPipeline.load_config(path, **where)
        options = {name: {"subfolder": name} for name in options}
    except OSError:  # no pipeline, but a model
        try:
            whole = AutoConfig.from_pretrained(path, **where)
        except OSError as error:
            raise ValueError(
                f"there is no CLIP in `{path}`: give the Hub id or the folder of one as "
                f"`pretrained_clip_model_name_or_path` ({error})."
            ) from error
        if isinstance(whole, CLIPConfig):
            halves = {"text_encoder": whole.text_config, "image_encoder": whole.vision_config}
            for name, half in halves.items():
                half.projection_dim = whole.projection_dim  # in some halves it is wrong, and not used by the whole
                options[name]["config"] = half
    encoders = []
    for name, cls in (("text_encoder", CLIPTextModelWithProjection), ("image_encoder", CLIPVisionModelWithProjection)):
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # half of a CLIP leaves the other half unused, as it should
        try:
            encoder, info = cls.from_pretrained(path, output_loading_info=True, **options[name], **where)
        finally:
            transformers_logging.set_verbosity(verbosity)
        if info["missing_keys"]:
            raise ValueError(
                f"`{path}` lacks weights of the {name.replace('_', ' ')} "
                f"({', '.join(sorted(info['missing_keys'])[:3])}, ...): choose a whole CLIP, text and image encoder "
                "with their projections."
            )
        encoders.append(encoder.float().requires_grad_(False).eval())
    text_encoder, image_encoder = encoders
    tokenizer = CLIPTokenizer.from_pretrained(path, **options["tokenizer"], **where)

    sizes = text_encoder.config.projection_dim, image_encoder.config.projection_dim
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`{path}` embeds texts in {sizes[0]} and images in {sizes[1]} dimensions, but a CLIP has one space: "
            "choose encoders that were trained together."
        )
    # 2 stands in the configurations of the first CLIPs, and means: pool at the highest token id
    end, pooled = tokenizer.eos_token_id, text_encoder.config.eos_token_id
    if end != pooled and not (pooled == 2 and end == len(tokenizer) - 1):
        raise ValueError(
            f"the end of text is {end} in the tokenizer of `{path}`, but {pooled} in its text encoder, which would "
            "pool the wrong token and give all captions the same embedding: set `eos_token_id` in `text_config` to "
            f"{end}, or choose the tokenizer that belongs to the model."
        )
    length, positions = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"`model_max_length` of the tokenizer of `{path}` is {length}, but the text encoder has {positions} "
            f"positions: set it to {positions}."
        )
    for subfolder in ({}, {"subfolder": "image_processor"}, {"subfolder": "feature_extractor"}):
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(path, **subfolder, **where)
        except OSError:
            continue
        used = [list(processor.get(f"image_{name}") or []) for name in ("mean", "std")]
        if used != [OPENAI_CLIP_MEAN, OPENAI_CLIP_STD] and all(used):
            raise ValueError(
                f"`{path}` normalizes images with mean and deviation {used}, but CLIP's are {OPENAI_CLIP_MEAN} and "
                f"{OPENAI_CLIP_STD}, the only ones that are supported."
            )
        break
    return text_encoder, tokenizer, image_encoder


def model_sha256(model: torch.nn.Module) -> str:
    """Hash of the weights of a model, whatever its parameters are called and where they lie.

    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `str`: 64 hexadecimal digits.

    Examples:
        >>> import torch
        >>> from diffusers_ext.training.precompute_clip_embeddings import model_sha256
        >>> model = torch.nn.Linear(2, 3)
        >>> model_sha256(model) == model_sha256(torch.nn.Sequential(model))
        True
    """
    digests = [
        hashlib.sha256(f"{tuple(p.shape)} {p.dtype} ".encode() + _bytes(p)).hexdigest() for p in model.parameters()
    ]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def tokenizer_sha256(tokenizer: CLIPTokenizer) -> str:
    """Hash of what a tokenizer does: its vocabulary, its special tokens, its length.

    Args:
        tokenizer (`transformers.CLIPTokenizer`): The tokenizer.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), special]).encode()).hexdigest()


def open_embeddings(embeddings_dir: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """Open what this script has written, check every value and every hash, and read it into memory when it is used.

    Args:
        embeddings_dir (`str` or `os.PathLike`): The folder.

    Returns:
        `tuple`: The contents of `embeddings.json`, and one dictionary of tensors for each shard, see
        [`load_embeddings`].

    Raises:
        ValueError: The folder holds no embeddings or not all of them; a shard is missing, was changed, or is of
            another CLIP or tokenizer; or a value is not finite, then with shard and row.
    """
    folder = Path(embeddings_dir)
    again = "run training/precompute_clip_embeddings.py again with the same arguments"
    index = _read_index(folder)
    if index is None:
        raise ValueError(
            f"`{folder}` has no `{_INDEX}`: make the embeddings with training/precompute_clip_embeddings.py."
        )
    if not index["complete"]:
        raise ValueError(f"`{folder}` holds {len(index['shards'])} shards, but is not complete: {again} to go on.")
    shards, first_row = [], 0
    for entry in index["shards"]:
        path = folder / entry["file"]
        try:
            with safe_open(path, "pt") as file:
                made_of = json.loads((file.metadata() or {}).get("made_of", "{}"))
                shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 mapped, not read
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`{path}` is missing or damaged ({error}): {again}, which makes it anew and keeps the others."
            ) from error
        for what in ("clip", "tokenizer"):
            if made_of.get(what) != index[what]["sha256"]:
                raise ValueError(
                    f"`{path}` is of another {what} (hash {made_of.get(what, 'none')[:16]}) than "
                    f"`{_INDEX}` says ({index[what]['sha256'][:16]}): embeddings of different CLIPs cannot be mixed; "
                    "compute them in a folder of their own."
                )
        for name, value in shard.items():
            if value.is_floating_point() and not value.isfinite().all():
                row = int((~value.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"row {row} of shard `{path}` (row {first_row + row} of all) has a value in `{name}` that is not "
                    f"finite: delete the shard, and {again}."
                )
        if _file_sha256(path) != entry["sha256"] or {len(value) for value in shard.values()} != {entry["count"]}:
            raise ValueError(
                f"`{path}` is not the file that was written (its hash differs): {again}, which makes it anew and "
                "keeps the others."
            )
        shards.append(shard)
        first_row += entry["count"]
    return index, shards


def load_embeddings(embeddings_dir: str | os.PathLike) -> dict[str, Any]:
    """Load all that this script has written, checked as by [`open_embeddings`].

    Args:
        embeddings_dir (`str` or `os.PathLike`): The folder.

    Returns:
        `dict[str, Any]`: Tensors with one row per image, and `meta`, the contents of `embeddings.json`.

        - `image_embeds`, `text_embeds`: of shape `(count, dim)`, as CLIP gives them, neither scaled nor normalized;
        - `input_ids`, int32, and `attention_mask`, bool: of shape `(count, length)`;
        - `labels`, int64 of shape `(count,)`, if the images have classes;
        - `text_hidden_states`, float16 of shape `(count, length, width)`, if they were cached.

    Raises:
        ValueError: As [`open_embeddings`].
    """
    index, shards = open_embeddings(embeddings_dir)
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]} | {"meta": index}


@torch.no_grad()
def main(args: PrecomputeArguments) -> None:
    """Compute embeddings, shard by shard, and the statistics of all of them.

    Args:
        args ([`PrecomputeArguments`]): The arguments.

    Raises:
        ValueError: CLIP, images and captions do not fit together, an embedding is not finite, or `output_dir` holds
            embeddings of something else.
    """
    # 1. CLIP, images, captions
    text_encoder, tokenizer, image_encoder = load_clip(
        args.pretrained_clip_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
    )
    dataset = load_image_dataset(
        args.dataset_name,
        args.train_data_dir,
        split=args.split,
        resolution=image_encoder.config.image_size,
        image_mode="RGB",
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        max_samples=args.max_train_samples,
        image_column=args.image_column,
        label_column=args.label_column,
        caption_column=args.caption_column,
        dataset_config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
    )
    if dataset.captions is None:
        raise ValueError(
            f"the images have no captions: name their column in `caption_column`, which is {args.caption_column!r}, "
            "or add a `metadata.jsonl` with `file_name` and `text` on each line to `train_data_dir`."
        )
    dataset.resample = Image.Resampling.BICUBIC  # CLIP's

    # 2. What is there? Only shards of the same CLIP, tokenizer, images and precision are kept.
    folder = Path(args.output_dir)
    rows, with_labels = len(dataset), dataset.labels is not None
    text_sha256, image_sha256 = model_sha256(text_encoder), model_sha256(image_encoder)
    source = hashlib.sha256()
    for row in dataset.indices:
        picture = dataset.pictures[row]
        if isinstance(picture, dict):  # of a data set
            picture = Path(picture["path"]) if picture["bytes"] is None else picture["bytes"]
        content = hashlib.sha256(picture.read_bytes() if isinstance(picture, Path) else picture).hexdigest()
        label = dataset.labels[row] if with_labels else None
        source.update(json.dumps([content, dataset.captions[row], label]).encode())
    made_of = {
        "clip": {
            "id": str(args.pretrained_clip_model_name_or_path),
            "revision": args.revision,
            "sha256": hashlib.sha256((text_sha256 + image_sha256).encode()).hexdigest(),
            "text_encoder_sha256": text_sha256,
            "image_encoder_sha256": image_sha256,
        },
        "tokenizer": {"sha256": tokenizer_sha256(tokenizer), "model_max_length": tokenizer.model_max_length},
        "source": {
            "description": dataset.description,
            "dataset_name": None if args.train_data_dir or Path(args.dataset_name).is_dir() else args.dataset_name,
            "sha256": source.hexdigest(),
        },
        "split": args.split,
        "count": rows,
        "shard_size": args.shard_size,
        "embeddings_dtype": args.embeddings_dtype,
        "cache_hidden_states": args.cache_hidden_states,
        "dim": text_encoder.config.projection_dim,
        "hidden_size": text_encoder.config.hidden_size,
        "label_names": dataset.label_names if with_labels else None,
    }
    shards: dict[str, dict[str, Any]] = {}
    existing = _read_index(folder)
    if existing is not None:
        for name, value in made_of.items():
            theirs = existing.get(name)
            if isinstance(value, dict):
                value, theirs = value.get("sha256"), (theirs or {}).get("sha256")
            if value != theirs:
                raise ValueError(
                    f"`output_dir` {str(folder)!r} holds embeddings with another `{name}` ({theirs} there, {value} "
                    "now): they cannot be mixed. Pass the arguments of before to go on, or another `output_dir`."
                )
        for entry in existing["shards"]:
            path = folder / entry["file"]
            if path.is_file() and _file_sha256(path) == entry["sha256"]:
                shards[entry["file"]] = entry
            else:
                logger.warning("%s is missing or damaged and is made anew.", path)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".embeddings*.tmp"):
        leftover.unlink()

    def write_index(**entries: Any) -> None:
        index = {"format": _FORMAT, "complete": False, **made_of, **entries, "shards": list(shards.values())}
        _write(folder / _INDEX, json.dumps(index, indent=2).encode())

    # 3. Shards. Each is written whole, then named in the index.
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_encoder, image_encoder = text_encoder.to(device), image_encoder.to(device)
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    dtype = getattr(torch, args.embeddings_dtype)
    names = [f"embeddings-{i:05d}.safetensors" for i in range(-(-rows // args.shard_size))]
    with diffusers_logging.tqdm(total=rows, desc="Embeddings") as progress:
        for i, file in enumerate(names):
            first = i * args.shard_size
            here = range(first, min(first + args.shard_size, rows))
            if file in shards:
                progress.update(len(here))
                continue
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(dataset, here), args.batch_size, num_workers=args.dataloader_num_workers
            )
            parts: list[dict[str, torch.Tensor]] = []
            cut: list[str] = []
            for batch in loader:
                images = (batch["images"].to(device) / 2 + 0.5 - mean) / std
                captions = batch["captions"]
                tokens = tokenizer(
                    captions, padding="max_length", truncation=True, return_tensors="pt", split_special_tokens=True
                )
                lengths = [len(ids) for ids in tokenizer(captions, split_special_tokens=True, verbose=False).input_ids]
                cut += [c for c, n in zip(captions, lengths, strict=True) if n > tokenizer.model_max_length]
                texts = text_encoder(tokens.input_ids.to(device))
                part = {
                    "image_embeds": image_encoder(images).image_embeds.to("cpu", dtype),
                    "text_embeds": texts.text_embeds.to("cpu", dtype),
                    "input_ids": tokens.input_ids.int(),
                    "attention_mask": tokens.attention_mask.bool(),
                }
                if with_labels:
                    part["labels"] = batch["labels"]
                if args.cache_hidden_states:
                    part["text_hidden_states"] = texts.last_hidden_state.to("cpu", torch.float16)
                for name, value in part.items():
                    if value.is_floating_point() and not value.isfinite().all():
                        row = int((~value.isfinite()).flatten(1).any(1).nonzero()[0])
                        row += first + sum(len(other["input_ids"]) for other in parts)
                        raise ValueError(
                            f"`{name}` of {dataset._name(dataset.indices[row])} (row {row - first} of shard `{file}`) "
                            "is not finite: check the weights of the CLIP"
                            + (", or choose `--embeddings_dtype float32`." if dtype == torch.float16 else ".")
                        )
                parts.append(part)
                progress.update(len(captions))
            if cut:
                logger.warning(
                    "%d of the %d captions of %s have more than the %d tokens that the text encoder reads, and were "
                    "cut, the first one: %r",
                    len(cut), len(here), file, tokenizer.model_max_length, cut[0],
                )  # fmt: skip
            content = safetensors.torch.save(
                {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]},
                # one entry: of several, safetensors does not keep the order, and with it the hash
                metadata={"made_of": json.dumps({what: made_of[what]["sha256"] for what in ("clip", "tokenizer")})},
            )
            _write(folder / file, content)
            digest = hashlib.sha256(content).hexdigest()
            shards[file] = {"file": file, "count": len(here), "sha256": digest, "captions_cut": len(cut)}
            shards = dict(sorted(shards.items()))
            write_index()

    # 4. Statistics, of what is stored
    total, squares = torch.zeros(2, made_of["dim"], dtype=torch.float64)
    for file in names:
        with safe_open(folder / file, "pt") as opened:
            total += opened.get_tensor("image_embeds").double().sum(0)
    average = total / rows
    for file in names:
        with safe_open(folder / file, "pt") as opened:
            squares += (opened.get_tensor("image_embeds").double() - average).square().sum(0)
    write_index(complete=True, mean=average.tolist(), std=(squares / rows).sqrt().tolist())
    logger.info("%d embeddings of %d dimensions are in %s.", rows, made_of["dim"], folder)


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"`{folder / _INDEX}` is no JSON ({error}): restore it, or choose another folder.") from error
    if index.get("format") != _FORMAT:
        raise ValueError(
            f"`{folder / _INDEX}` has format {index.get('format')}, but this version reads {_FORMAT}: compute the "
            "embeddings anew in another folder."
        )
    return index


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    """All of the file or none of it; a failed write leaves what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        space = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"`{path}` could not be written ({error}); {space:.1f} MiB are free there. Make room and run the same "
            "command again: what is finished is kept."
        ) from error


if __name__ == "__main__":
    run_script(main, HfArgumentParser(PrecomputeArguments))
