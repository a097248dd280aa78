"""Images for training and evaluation: image folders, Hub data sets, and two real data sets that need no download.

Pillow and numpy do all of the work (no torchvision); scikit-learn and `datasets` are imported only when they are used.
"""

import json
import logging
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

_EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test")  # in this order of preference
_NEEDS_EXTRA = '`dataset_name` {!r} needs the package {}: run `pip install "diffusers-ext[training]"`'


class ImageDataset(torch.utils.data.Dataset):
    """Square images as tensors, with their labels and captions where there are any.

    An item is a dictionary: `images`, float32 of shape `(channels, resolution, resolution)` in [-1, 1]; `labels`, an
    `int`, if the data set has labels; `captions`, a `str`, if it has captions. `DataLoader`'s default collation makes
    batches of them.

    Each image is turned upright (EXIF orientation), transparency is laid on white, and 16-bit grey keeps its
    precision; color profiles are ignored, of several frames the first is taken. The largest square that fits (the
    center, or at random) is resized with Lanczos' filter when it shrinks and bicubically when it grows. Crops and
    flips draw from torch's random state, which `torch.manual_seed` and `DataLoader`'s workers govern.

    Args:
        pictures (`Sequence`):
            Paths, PIL images, encoded bytes, `{"bytes", "path"}` dictionaries, or float32 arrays of shape
            `(height, width)` in [0, 255].
        labels (`Sequence[int]`, *optional*): One per picture.
        captions (`Sequence[str]`, *optional*): One per picture.
        resolution (`int`): Height and width of an item in pixels.
        image_mode (`"RGB"` or `"L"`, *optional*, defaults to `"RGB"`): Three channels, or one of grey (ITU-R 601).
        center_crop (`bool`, *optional*, defaults to `True`): Crop the center instead of a random place.
        random_flip (`bool`, *optional*, defaults to `False`): Mirror left and right with probability one half.
        resample (`PIL.Image.Resampling`, *optional*): A filter to use instead of the two above.
        indices (`Sequence[int]`, *optional*): Which pictures, in which order; all by default.
        label_names (`list[str]`, *optional*): The name of label `i` at place `i`.
        description (`str`, *optional*): A sentence for the model card.

    Attributes:
        corrupt (`dict[str, str]`): What [`load_image_dataset`] left out as unreadable, and why.

    Raises:
        ValueError: On `resolution` below 1, an unknown `image_mode`, labels or captions that are not one per picture;
            on access, if a picture cannot be read (the message names it).
        TypeError: If `resolution` is not an `int`.

    Example:
    ```py
    >>> from PIL import Image
    >>> from diffusers_ext.data import ImageDataset

    >>> dataset = ImageDataset([Image.new("RGB", (48, 32), "white")], labels=[3], resolution=16)
    >>> dataset[0]["images"].shape, dataset[0]["images"].max().item(), dataset[0]["labels"]
    (torch.Size([3, 16, 16]), 1.0, 3)

    ```
    """

    def __init__(
        self,
        pictures: Sequence[Any],
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        *,
        resolution: int,
        image_mode: Literal["RGB", "L"] = "RGB",
        center_crop: bool = True,
        random_flip: bool = False,
        resample: Image.Resampling | None = None,
        indices: Sequence[int] | None = None,
        label_names: list[str] | None = None,
        description: str = "",
    ) -> None:
        _check_output(resolution, image_mode)
        for name, column in (("labels", labels), ("captions", captions)):
            if column is not None and len(column) != len(pictures):
                raise ValueError(
                    f"`{name}` has {len(column)} entries, but `pictures` has {len(pictures)}: give one each"
                )
        self.pictures, self.labels, self.captions = pictures, labels, captions
        self.resolution, self.image_mode = resolution, image_mode
        self.center_crop, self.random_flip, self.resample = center_crop, random_flip, resample
        self.indices = list(range(len(pictures)) if indices is None else indices)
        self.label_names, self.description = label_names, description
        self.corrupt: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.indices[index]
        try:
            image = _decode(self.pictures[row], self.image_mode)
        except Exception as error:  # whatever a decoder raises on a broken file
            raise ValueError(
                f"{self._name(row)} cannot be read ({error}): repair or remove it, "
                "or have `load_image_dataset` leave it out with `on_error='skip'`"
            ) from error

        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if not self.center_crop:
            left = torch.randint(width - side + 1, ()).item()
            top = torch.randint(height - side + 1, ()).item()
        resample = self.resample
        if resample is None:
            resample = Image.Resampling.LANCZOS if side > self.resolution else Image.Resampling.BICUBIC
        image = image.resize((self.resolution,) * 2, resample, box=(left, top, left + side, top + side))
        if self.random_flip and torch.rand(()).item() < 0.5:
            image = ImageOps.mirror(image)

        # [0, 255] -> [-1, 1]; the filters overshoot on images of floats, hence the clip
        pixels = np.clip(np.asarray(image, np.float32) / 127.5 - 1, -1, 1)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.image_mode == "RGB" and len(pixels) == 1:
            pixels = pixels.repeat(3, axis=0)
        item: dict[str, Any] = {"images": torch.from_numpy(np.ascontiguousarray(pixels))}
        if self.labels is not None:
            item["labels"] = self.labels[row]
        if self.captions is not None:
            item["captions"] = self.captions[row]
        return item

    def verify(self) -> dict[int, str]:
        """Find the pictures that cannot be read.

        Every picture is decoded to its end, since only that finds a file that breaks off half-way; JPEGs at an eighth
        of their size, which is several times quicker. Threads share the work: of images of 256 x 256, expect 2,000
        JPEGs or 200 PNGs a second and core. What a decoder does not notice (altered bytes inside a JPEG) stays
        unnoticed.

        Returns:
            `dict[int, str]`: The row of each unreadable picture in `pictures`, and why it cannot be read.

        Example:
        ```py
        >>> from diffusers_ext.data import ImageDataset

        >>> ImageDataset([b"not an image"], resolution=16).verify().keys()
        dict_keys([0])

        ```
        """

        def check(start: int) -> dict[int, str]:
            problems = {}
            for row in self.indices[start : start + 32]:
                try:
                    _decode(self.pictures[row], self.image_mode, reduce_jpeg=True)
                except Exception as error:  # whatever a decoder raises on a broken file
                    problems[row] = f"{type(error).__name__}: {error}"
            return problems

        starts = range(0, len(self), 32)
        problems = {}
        with (
            ThreadPoolExecutor() as pool,
            # quick checks need no bar
            diffusers_logging.tqdm(total=len(self), desc="Checking images", delay=2, leave=False) as progress,
        ):
            for start, found in zip(starts, pool.map(check, starts), strict=True):
                problems |= found
                progress.update(min(32, len(self) - start))
        return problems

    def _name(self, row: int) -> str:
        picture = self.pictures[row]
        if isinstance(picture, dict):
            return f"row {row}" + (f" ({picture['path']})" if picture.get("path") else "")
        return str(picture) if isinstance(picture, str | os.PathLike) else f"row {row}"


def load_image_dataset(
    dataset_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    *,
    split: Literal["train", "validation"] = "train",
    resolution: int | None = None,
    image_mode: Literal["RGB", "L"] | None = None,
    center_crop: bool = True,
    random_flip: bool = False,
    validation_fraction: float | None = None,
    seed: int = 0,
    max_samples: int | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = "text",
    dataset_config_name: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_crops: int = 2048,
    verify: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
) -> ImageDataset:
    """Load the training or the held-out images of a data set.

    - `"digits"`: the 1797 handwritten digits of `sklearn.datasets.load_digits`, grey, 8 x 8 (other resolutions are
      interpolated bilinearly), with labels; 500 are held out.
    - `"photos"`: `num_crops` random squares out of scikit-learn's two color photographs (640 x 427), a quarter of them
      held out. The right 224 columns of each photograph are kept for the held-out squares, so no pixel is in both
      splits. The label is the photograph. Square `i` of a split depends on `seed`, `resolution` and `i` alone.
    - any other `dataset_name`: a data set on the Hub, or a local folder that `datasets` reads or has saved.
    - `train_data_dir`: a folder of images, searched through and through; hidden files are ignored. Captions and labels
      come from `metadata.jsonl` (one object per line: `file_name`, and the columns named below), otherwise the folders
      in it are the labels, if there are at least two and no images beside them. If the folders in it are `train` and
      `validation` (or `val`, `valid`, `dev`, `test`), they are its splits.

    Which images are held out depends on `seed` and the sorted names only, and is the same on every machine. Held-out
    images are always cropped in the center and never flipped.

    Args:
        dataset_name (`str`, *optional*): See above. Exactly one of it and `train_data_dir` must be given.
        train_data_dir (`str` or `os.PathLike`, *optional*): See above.
        split (`"train"` or `"validation"`, *optional*, defaults to `"train"`): Images to train on or those held out.
        resolution (`int`, *optional*): Height and width in pixels. Only `"digits"` has a default: 8.
        image_mode (`"RGB"` or `"L"`, *optional*):
            Color or grey; `"L"` for `"digits"` and `"RGB"` for everything else by default.
        center_crop (`bool`, *optional*, defaults to `True`): Crop the center instead of a random place.
        random_flip (`bool`, *optional*, defaults to `False`): Mirror left and right with probability one half.
        validation_fraction (`float`, *optional*):
            Below 1 the share, from 1 on the number of the (training) images that are held out. By default a data set's
            own held-out split is used, and if it has none, 500 of the digits and 0.1 of any other.
        seed (`int`, *optional*, defaults to 0): Chooses the held-out images, the subset of `max_samples`, the crops.
        max_samples (`int`, *optional*): Use that many images of the split, drawn by `seed`.
        image_column (`str`, *optional*, defaults to `"image"`): Column of the images (`dataset_name`).
        label_column (`str`, *optional*, defaults to `"label"`):
            Column of the labels: integers from 0 on, or names, which are numbered in sorted order. `None`: no labels.
        caption_column (`str`, *optional*, defaults to `"text"`): Column of the captions. `None`: no captions.
        dataset_config_name (`str`, *optional*): Configuration of the Hub data set.
        cache_dir (`str` or `os.PathLike`, *optional*): Where `datasets` keeps its files.
        num_crops (`int`, *optional*, defaults to 2048): Squares of `"photos"`, both splits together.
        verify (`bool`, *optional*, defaults to `True`):
            Decode every file now (see [`ImageDataset.verify`]). Otherwise a broken file is an error when it is read.
        on_error (`"raise"` or `"skip"`, *optional*, defaults to `"raise"`):
            What to do about broken files: raise an error that lists them all, or leave them out of the data set, with
            a warning that lists them, and keep the list as `dataset.corrupt`.

    Returns:
        [`ImageDataset`]: Its items are dictionaries with `images` in [-1, 1], `labels` and `captions`.

    Raises:
        ValueError: If an argument is out of its range, a data set, folder, column or split does not exist or is empty,
            or a file is broken.
        ImportError: If scikit-learn or `datasets` is needed and missing.

    Example:
    ```py
    >>> from diffusers_ext.data import load_image_dataset

    >>> train = load_image_dataset("digits")
    >>> held_out = load_image_dataset("digits", split="validation")
    >>> len(train), len(held_out), train[0]["images"].shape
    (1297, 500, torch.Size([1, 8, 8]))

    ```
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"`dataset_name` is {dataset_name!r} and `train_data_dir` is {train_data_dir!r}, but exactly one "
            "of them is needed: a folder of images, or 'digits', 'photos' or the name of a Hub data set"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"`split` is {split!r}, but must be 'train' or 'validation' (the held-out images)")
    if dataset_name == "digits":
        resolution, image_mode = 8 if resolution is None else resolution, image_mode or "L"
    if resolution is None:
        raise ValueError("`resolution` is missing: give the side of the images in pixels, such as 64")
    image_mode = image_mode or "RGB"
    _check_output(resolution, image_mode)
    if validation_fraction is not None and not (
        0 <= validation_fraction < 1 or (validation_fraction >= 1 and float(validation_fraction).is_integer())
    ):
        raise ValueError(
            f"`validation_fraction` is {validation_fraction}, but must be a share from 0 to below 1 or a whole number"
        )
    for name, value, limit in (("seed", seed, 0), ("max_samples", max_samples, 1), ("num_crops", num_crops, 2)):
        if value is not None and value < limit:
            raise ValueError(f"`{name}` is {value}, but must be at least {limit}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` is {on_error!r}, but must be 'raise' or 'skip'")
    if on_error == "skip" and not verify:
        raise ValueError("`on_error='skip'` needs `verify=True`: files that are not checked cannot be left out")
    if dataset_config_name is not None and dataset_name in (None, "digits", "photos"):
        raise ValueError(
            f"`dataset_config_name` is {dataset_config_name!r}, but only Hub data sets have configurations"
        )

    # 1. The table of the training images, and that of the held-out images where the data set has its own.
    held_out: _Table | None = None
    label_names = None
    if dataset_name == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(_NEEDS_EXTRA.format(dataset_name, "scikit-learn")) from error
        digits = load_digits()  # pixels are whole numbers from 0 to 16
        train = _Table(list((digits.images * (255 / 16)).astype(np.float32)), digits.target.tolist())
        label_names = [str(digit) for digit in digits.target_names]
        title = "handwritten digits of scikit-learn (load_digits, 8 x 8 pixels, grey)"
    elif dataset_name == "photos":
        num_held_out = _count_held_out(0.25 if validation_fraction is None else validation_fraction, num_crops, split)
        crops = _PhotoCrops(seed, split, resolution, num_crops - num_held_out if split == "train" else num_held_out)
        train = held_out = _Table(crops, [crop % 2 for crop in range(len(crops))])
        validation_fraction = None  # is spent: both splits stand
        label_names = ["china", "flower"]
        title = "random crops of the two photographs that come with scikit-learn (china.jpg, flower.jpg)"
    elif dataset_name is not None:
        train, held_out, label_names = _read_hub_dataset(
            str(dataset_name), dataset_config_name, cache_dir, image_column, label_column, caption_column
        )
        title = str(dataset_name)
    else:
        train, held_out, label_names = _read_image_folder(Path(train_data_dir), label_column, caption_column)
        title = f"image folder {Path(train_data_dir).resolve().name}"

    # 2. The split. The raw stream of a bit generator, unlike `permutation`, is the same in every version of numpy.
    table = train
    if held_out is not None and validation_fraction is None and split == "validation":
        table = held_out
    order = np.arange(len(table.pictures))
    if dataset_name != "photos":
        order = np.argsort(np.random.PCG64(seed).random_raw(len(order)), kind="stable")
    if held_out is None or validation_fraction is not None:
        if validation_fraction is None:
            validation_fraction = 500 if dataset_name == "digits" else 0.1
        num_held_out = _count_held_out(validation_fraction, len(order), split)
        order = order[num_held_out:] if split == "train" else order[:num_held_out]
    order = order[:max_samples]

    dataset = ImageDataset(
        table.pictures,
        table.labels,
        table.captions,
        resolution=resolution,
        image_mode=image_mode,
        center_crop=center_crop or split == "validation",
        random_flip=random_flip and split == "train",
        resample=Image.Resampling.BILINEAR if dataset_name == "digits" else None,
        indices=order.tolist(),
        label_names=label_names,
    )

    # 3. Broken files. They are left out after the split, which therefore does not depend on them.
    if verify and dataset_name not in ("digits", "photos"):
        problems = dataset.verify()
        if problems:
            dataset.corrupt = {dataset._name(row): reason for row, reason in sorted(problems.items())}
            listing = "".join(f"\n  {name}: {reason}" for name, reason in dataset.corrupt.items())
            message = f"{len(problems)} of {len(dataset)} images of {title} ({split}) cannot be read"
            if on_error == "raise" or len(problems) == len(dataset):
                raise ValueError(
                    f"{message}: repair or remove them, or pass `on_error='skip'` to go on without:{listing}"
                )
            logger.warning("%s and are left out:%s", message, listing)
            dataset.indices = [row for row in dataset.indices if row not in problems]
    dataset.description = (
        f"{title}: {len(dataset)} images ({'held-out' if split == 'validation' else 'training'} split), "
        f"{dataset.resolution} x {dataset.resolution}, {'grey' if dataset.image_mode == 'L' else 'RGB'}"
    )
    return dataset


@dataclass
class _Table:
    """The columns of one split: one entry per picture, `None` for a column that is not there."""

    pictures: Sequence[Any]
    labels: list[Any] | None = None
    captions: list[Any] | None = None


class _PhotoCrops(Sequence):
    """Random squares out of scikit-learn's two photographs, cut when they are asked for."""

    _HELD_OUT_WIDTH = 224

    def __init__(self, seed: int, split: str, resolution: int, length: int) -> None:
        try:
            from sklearn.datasets import load_sample_images
        except ImportError as error:
            raise ImportError(_NEEDS_EXTRA.format("photos", "scikit-learn")) from error
        columns = slice(-self._HELD_OUT_WIDTH) if split == "train" else slice(-self._HELD_OUT_WIDTH, None)
        self.photos = [Image.fromarray(photo[:, columns]) for photo in load_sample_images().images]  # sorted by name
        self.seed, self.length = seed, length
        self.smallest = min(resolution, self._HELD_OUT_WIDTH)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Image.Image:
        photo = self.photos[index % 2]
        size, left, top = np.random.PCG64((self.seed, index)).random_raw(3) / 2.0**64  # uniform in [0, 1]
        side = self.smallest + round(size * (self._HELD_OUT_WIDTH - self.smallest))
        left, top = round(left * (photo.width - side)), round(top * (photo.height - side))
        return photo.crop((left, top, left + side, top + side))


class _HubColumn(Sequence):
    """The image column of a `datasets.Dataset`, read row by row."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        return self.dataset[index][self.column]


def _read_hub_dataset(
    name: str,
    config: str | None,
    cache_dir: str | os.PathLike | None,
    image_column: str,
    label_column: str | None,
    caption_column: str | None,
) -> tuple[_Table, _Table | None, list[str] | None]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(_NEEDS_EXTRA.format(name, "datasets")) from error
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except Exception as error:  # `datasets` has no common base for "not there", "not reachable" and "no such config"
        raise ValueError(
            f"`dataset_name` {name!r} (`dataset_config_name` {config!r}) cannot be loaded: it must be 'digits', "
            f"'photos', a data set on the Hub or a local folder of the `datasets` library "
            f"({type(error).__name__}: {error})"
        ) from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise ValueError(f"`dataset_name` {name!r} has the splits {sorted(splits)}, but one must be called 'train'")
    held_out_name = next((split for split in _HELD_OUT_SPLITS if split in splits), None)

    features = splits["train"].features
    with_labels = _is_column("label_column", label_column, "label", features, name)
    with_captions = _is_column("caption_column", caption_column, "text", features, name)
    label_names = getattr(features[label_column], "names", None) if with_labels else None
    tables = []
    for split in filter(None, ("train", held_out_name)):
        data, features = splits[split].with_format(None), splits[split].features
        if image_column not in features:
            raise ValueError(f"`image_column` is {image_column!r}, but {name!r} ({split}) has {sorted(features)}")
        try:
            # undecoded: orientation, modes and broken files are treated here as they are in folders
            data = data.cast_column(image_column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's errors, by type of column
            raise ValueError(
                f"`image_column` {image_column!r} of {name!r} holds {features[image_column]}, but must hold images"
            ) from error
        table = _Table(_HubColumn(data, image_column))
        if with_labels and label_column in features:  # held-out splits are often published without
            table.labels = list(data[label_column])
        if with_captions and caption_column in features:
            table.captions = list(data[caption_column])
        tables.append(table)
    return tables[0], tables[1] if held_out_name else None, _number_labels(tables, name, label_names)


def _read_image_folder(
    root: Path, label_column: str | None, caption_column: str | None
) -> tuple[_Table, _Table | None, list[str] | None]:
    if not root.is_dir():
        raise ValueError(f"`train_data_dir` is {str(root)!r}, but there is no such folder")
    folders = [root]
    inside = {
        entry.name
        for entry in root.iterdir()
        if entry.name[0] != "." and (entry.is_dir() or entry.name.lower().endswith((*_EXTENSIONS, "metadata.jsonl")))
    }
    if "train" in inside and inside <= {"train", *_HELD_OUT_SPLITS}:
        folders = [root / name for name in ("train", *_HELD_OUT_SPLITS) if name in inside][:2]

    tables = []
    for folder in folders:
        found, seen = set(), set()
        for parent, subfolders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:  # a link to a folder above, which would lead round in circles
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            found |= {
                Path(parent, name).relative_to(folder).as_posix()
                for name in files
                if name[0] != "." and name.lower().endswith(_EXTENSIONS)
            }
        metadata = folder / "metadata.jsonl"

        rows: dict[str, dict[str, Any]] = {}
        if metadata.is_file():
            for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    file_name = Path(row["file_name"]).as_posix()
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of {metadata} is no JSON object with a `file_name` ({error}): {line[:80]!r}"
                    ) from error
                if file_name in rows:
                    raise ValueError(
                        f"line {number} of {metadata} repeats {file_name!r}: each image may stand there once, "
                        "otherwise it could be trained on and held out at the same time"
                    )
                if not (folder / file_name).is_file():
                    raise ValueError(f"line {number} of {metadata} names {file_name!r}, but there is no such file")
                rows[file_name] = row
            unlisted = len(found - rows.keys())
            if unlisted:
                logger.warning("%d images in %s are not in metadata.jsonl and are left out", unlisted, folder)
        names = sorted(rows if metadata.is_file() else found)
        if not names:
            raise ValueError(
                f"`train_data_dir` {str(folder)!r} holds no images: "
                + (
                    "metadata.jsonl is empty"
                    if metadata.is_file()
                    else f"looked for {', '.join(_EXTENSIONS)} at any depth"
                )
            )

        table = _Table([folder / name for name in names])
        columns = {column for row in rows.values() for column in row}
        if _is_column("caption_column", caption_column, "text", columns, metadata):
            table.captions = [rows[name].get(caption_column) for name in names]
        if _is_column("label_column", label_column, "label", columns, metadata):
            table.labels = [rows[name].get(label_column) for name in names]
        elif label_column is not None and not rows and all("/" in name for name in names):
            classes = [name.split("/")[0] for name in names]
            if len(set(classes)) > 1 or (tables and tables[0].labels):
                table.labels = classes
        tables.append(table)

    return tables[0], tables[1] if len(tables) == 2 else None, _number_labels(tables, str(root), None)


def _is_column(argument: str, column: str | None, default: str, columns: Collection[str], where: Any) -> bool:
    """Whether `column` is there. Only the default name may be missing: any other was asked for."""
    if column is not None and column != default and column not in columns:
        raise ValueError(f"`{argument}` is {column!r}, but {where} has the columns {sorted(columns)}")
    return column in columns


def _number_labels(tables: list[_Table], where: str, label_names: list[str] | None) -> list[str] | None:
    """Check the labels and captions; replace labels that are names by their place in sorted order, over all splits."""
    for caption in (caption for table in tables for caption in table.captions or ()):
        if not isinstance(caption, str):
            raise ValueError(
                f"a caption in {where} is {caption!r}, but must be text: mend it or pass `caption_column=None`"
            )
    labels = {
        label if isinstance(label, int | str) and not isinstance(label, bool) else repr(label)
        for table in tables
        for label in table.labels or ()
    }
    if all(isinstance(label, int) and label >= 0 for label in labels):
        return label_names
    label_names = sorted(labels, key=str)
    if not all(isinstance(label, str) for table in tables for label in table.labels or ()):
        raise ValueError(
            f"the labels in {where} are {', '.join(map(str, label_names[:10]))}, but must all be names or all be "
            "integers from 0 on: mend them or pass `label_column=None`"
        )
    places = {name: place for place, name in enumerate(label_names)}
    for table in tables:
        table.labels = table.labels and [places[label] for label in table.labels]
    return label_names


def _check_output(resolution: int, image_mode: str) -> None:
    if not isinstance(resolution, int):
        raise TypeError(f"`resolution` is {resolution!r}, but must be an `int`: the side of the images in pixels")
    if resolution < 1:
        raise ValueError(f"`resolution` is {resolution}, but must be at least 1 pixel")
    if image_mode not in ("RGB", "L"):
        raise ValueError(f"`image_mode` is {image_mode!r}, but must be 'RGB' (color) or 'L' (grey)")


def _count_held_out(validation_fraction: float, total: int, split: str) -> int:
    count = round(validation_fraction * total) if validation_fraction < 1 else int(validation_fraction)
    if count >= total or (count == 0 and split == "validation"):
        raise ValueError(
            f"`validation_fraction` {validation_fraction} holds out {count} of {total} images, "
            f"but {'training' if count else 'validation'} needs at least one: give a number from 1 to {total - 1}"
        )
    return count


def _decode(picture: Any, image_mode: str, *, reduce_jpeg: bool = False) -> Image.Image:
    """An upright image without transparency, of mode `image_mode`, or of mode "F" in [0, 255] if it is deeper grey."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        image = ImageOps.exif_transpose(picture)
    else:
        if isinstance(picture, dict):
            picture = picture["path"] if picture["bytes"] is None else picture["bytes"]
        if picture is None:
            raise ValueError("the row has no image")
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            if reduce_jpeg:
                file.draft("L", (1, 1))
            image = ImageOps.exif_transpose(file)  # reads the file to its end
    if image.mode.startswith("I"):  # 16 bits, whatever Pillow calls them: "I;16", "I;16B" or "I"
        pixels = np.asarray(image, np.float32)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its grey values leave the range of 16 bits, so what is white is unknown")
        return Image.fromarray(pixels / 257)
    if image.mode == "F":
        raise ValueError("its grey values are floats, so what is white is unknown: save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(image_mode)
