"""Train a small CLIP (https://huggingface.co/papers/2103.00020) on captioned digits, which needs no download.

scikit-learn's handwritten digits are drawn in eight colors and two sizes on 32 x 32 pixels. A caption mentions only
some of what is to be seen ("a small digit", "a red three"), so that many images fit one caption, as they do for the
captions of photographs: this is what the prior of unCLIP (https://huggingface.co/papers/2204.06125) is for. Images and
encoders, in about two minutes on one CPU core:

```bash
accelerate launch training/train_toy_clip.py --image_dir digit-images --output_dir clip-digits
```

`digit-images` has the folders `train` and `validation` with a `metadata.jsonl` each. `clip-digits` loads as a
`CLIPModel` with a `CLIPTokenizer` and a `CLIPImageProcessor`, or as its halves, `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection`.

The numbers to watch: `validation_digit_accuracy` (zero-shot, of handwriting that was not trained on), and
`validation_cos_text_image`, the cosine of an image and its caption, which lies well below 1 where captions leave much
open, and well above `validation_cos_unpaired`. `validation_modality_gap` is the distance between the mean embeddings
of texts and of images, which is not 0 in any CLIP.
"""

import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, HfArgumentParser
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffusers_ext.data import ImageDataset, load_image_dataset
from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "magenta": (255, 0, 255), "purple": (128, 0, 255), "white": (255, 255, 255),
}  # fmt: skip
SIZES = {"small": 16, "large": 26}  # sides in pixels
RESOLUTION = 32
MAX_SHIFT = 2  # pixels from the center
MIN_BRIGHTNESS = 0.7
MENTION_PROBABILITY = 0.6  # of each attribute


@dataclass(kw_only=True)
class ToyCLIPArguments(TrainingArguments):
    """Arguments of this script beside those of every script; the defaults are the recipe for the toy."""

    image_dir: str | None = argument(None, "Folder of the rendered images; by default `images` in `output_dir`.")
    num_train_images: int = argument(4096, "Images rendered into `image_dir/train`; training draws more of them.")
    num_validation_images: int = argument(1000, "Images rendered into `image_dir/validation`, of other handwriting.")
    clip_config_name_or_path: str | None = argument(
        None, "Folder or repo with the `config.json` of a `CLIPModel`; by default a small one."
    )
    warm_start_steps: int = argument(
        1200, "Optimizer steps on captions that name one attribute each, before those on the images' captions."
    )

    train_batch_size: int = argument(64, "Images per process and step: each other's negatives.")
    max_train_steps: int | None = argument(2800, "Optimizer steps in all; there are no epochs.")
    learning_rate: float = argument(1e-3, "Highest learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "cosine_with_min_lr",
    ] = argument("cosine_with_min_lr", "Learning-rate schedule, in optimizer steps.")  # fmt: skip
    lr_warmup_steps: int = argument(50, "Optimizer steps until the learning rate is reached.")
    adam_beta2: float = argument(0.98, "AdamW's decay of the squared gradient's average.")
    adam_weight_decay: float = argument(0.05, "AdamW's decoupled weight decay.")
    output_dir: str = argument("clip-digits", "Receives model, tokenizer, checkpoints and logs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "pretrained_model_name_or_path", "dataset_name", "dataset_config_name", "train_data_dir", "image_mode",
            "resolution", "max_train_samples", "validation_fraction", "random_flip", "center_crop", "num_train_epochs",
        ):  # fmt: skip
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but this script renders its own images and starts from "
                    "random weights: leave it out."
                )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but only the images of one "
                "forward pass are each other's negatives: raise `train_batch_size` instead."
            )
        for name, least in (("warm_start_steps", 0), ("num_train_images", 1), ("train_batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")


def caption(digit: str | None = None, color: str | None = None, size: str | None = None) -> str:
    """The caption that mentions what is given.

    Args:
        digit (`str`, *optional*): One of `DIGITS`.
        color (`str`, *optional*): One of `COLORS`.
        size (`str`, *optional*): One of `SIZES`.

    Returns:
        `str`: The caption.

    Examples:
        >>> from diffusers_ext.training.train_toy_clip import caption
        >>> caption("three", "red", "small"), caption(color="red"), caption()
        ('a small red three', 'a red digit', 'a digit')
    """
    return " ".join(["a", *filter(None, (size, color)), digit or "digit"])


def byte_tokenizer(model_max_length: int = 32) -> CLIPTokenizer:
    """A tokenizer of bytes: any text, no unknown tokens, and the same 514 ids everywhere.

    A trained vocabulary would number its tokens differently from process to process.

    Args:
        model_max_length (`int`, *optional*, defaults to 32): Longest sequence, with start and end token.

    Returns:
        `CLIPTokenizer`: Start token 512, end and padding token 513.

    Examples:
        >>> from diffusers_ext.training.train_toy_clip import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer.decode(tokenizer("A Red Digit").input_ids, skip_special_tokens=True)
        'a red digit'
    """
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


class CaptionedDigits(torch.utils.data.Dataset):
    """Digits in colors and sizes with captions, rendered when they are asked for.

    Image `i` depends on `split`, `seed` and `i` alone. Of the 1797 digits of scikit-learn, 360 are those of the
    validation images. An item is a dictionary: `images`, float32 of shape `(3, 32, 32)` in [-1, 1]; `input_ids`, int64
    of shape `(32,)`, its caption padded; `labels`, int64 of shape `(3,)`, the places of digit, color and size in
    `DIGITS`, `COLORS` and `SIZES`.

    Args:
        num_images (`int`): Length of the data set.
        split (`"train"` or `"validation"`, *optional*, defaults to `"train"`): Whose handwriting.
        seed (`int`, *optional*, defaults to 0): Chooses digits, attributes and captions; not the split.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_images: int, split: Literal["train", "validation"] = "train", seed: int = 0) -> None:
        for name, value, least in (("num_images", num_images, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")
        self.num_images, self.entropy = num_images, (seed, int(split == "validation"))
        # in [0, 1], by size
        self.ink: dict[str, list[np.ndarray]] = {}
        for size, side in SIZES.items():
            digits = load_image_dataset("digits", split=split, resolution=side, validation_fraction=360)
            items = [digits[i] for i in range(len(digits))]
            self.ink[size] = [item["images"][0].numpy() / 2 + 0.5 for item in items]
        self.digits = [item["labels"] for item in items]
        self.rows = digits.indices  # in scikit-learn's table
        captions = [caption(*names) for names in itertools.product((None, *DIGITS), (None, *COLORS), (None, *SIZES))]
        ids = byte_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids
        self._input_ids = dict(zip(captions, ids, strict=True))

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels, row = self.render(index)
        labels = DIGITS.index(row["digit"]), list(COLORS).index(row["color"]), list(SIZES).index(row["size"])
        return {
            "images": torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1),
            "input_ids": self._input_ids[row["text"]],
            "labels": torch.tensor(labels),
        }

    def render(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """One image with what is known of it.

        Args:
            index (`int`): Which one, in [0, num_images).

        Returns:
            `tuple`: uint8 array of shape `(32, 32, 3)`, and a dictionary with `text` (the caption), `digit`, `color`
            and `size` (their names), and `full_text` (the caption that mentions all of them).

        Raises:
            IndexError: There is no such image.
        """
        if not 0 <= index < self.num_images:
            raise IndexError(f"`index` is {index}, but must lie in [0, {self.num_images}).")
        # Uniform in [0, 1). The raw stream of a bit generator is the same in every version of numpy.
        draws = (np.random.PCG64((*self.entropy, index)).random_raw(9) >> np.uint64(11)) / 2.0**53
        source = int(draws[0] * len(self.digits))
        digit = DIGITS[self.digits[source]]
        color, size = list(COLORS)[int(draws[1] * len(COLORS))], list(SIZES)[int(draws[2] * len(SIZES))]
        side = SIZES[size]
        left, top = ((RESOLUTION - side) // 2 - MAX_SHIFT + int(draw * (2 * MAX_SHIFT + 1)) for draw in draws[3:5])
        brightness = MIN_BRIGHTNESS + (1 - MIN_BRIGHTNESS) * draws[5]
        pixels = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
        ink = self.ink[size][source][..., None] * np.array(COLORS[color]) * brightness
        pixels[top : top + side, left : left + side] = np.round(ink)
        names = {"digit": digit, "color": color, "size": size}
        mentioned = dict(zip(names, draws[6:] < MENTION_PROBABILITY, strict=True))
        text = caption(**{name: value for name, value in names.items() if mentioned[name]})
        return pixels, {"text": text, **names, "full_text": caption(**names)}


def render_digits(
    output_dir: str | os.PathLike,
    num_images: int,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
) -> Path:
    """Write the first images of [`CaptionedDigits`] as an image folder for [`data.load_image_dataset`].

    Args:
        output_dir (`str` or `os.PathLike`): Receives the folder `train` or `validation`, once it is complete.
        num_images (`int`): How many.
        split (`"train"` or `"validation"`, *optional*, defaults to `"train"`): Whose handwriting.
        seed (`int`, *optional*, defaults to 0): Chooses digits, attributes and captions.

    Returns:
        `pathlib.Path`: The folder; one that is there with these images is left alone. It holds `00000.png` and so on,
        and `metadata.jsonl` with `file_name`, `text`, `digit`, `color`, `size` and `full_text` of each.

    Raises:
        ValueError: The folder is there with other images, or an argument is out of range.

    Examples:
        >>> import tempfile
        >>> from diffusers_ext.data import load_image_dataset
        >>> from diffusers_ext.training.train_toy_clip import render_digits
        >>> folder = render_digits(tempfile.mkdtemp(), 8)
        >>> dataset = load_image_dataset(train_data_dir=folder, resolution=32, label_column="digit")
        >>> sorted(dataset[0])
        ['captions', 'images', 'labels']
    """
    folder = Path(output_dir) / split
    digits = CaptionedDigits(num_images, split, seed)
    rendered = [digits.render(i) for i in range(num_images)]
    names = [f"{i:05}.png" for i in range(num_images)]
    rows = [{"file_name": name, **row} for name, (_, row) in zip(names, rendered, strict=True)]
    metadata = "".join(json.dumps(row) + "\n" for row in rows)
    if folder.exists():
        present = folder / "metadata.jsonl"
        is_same = present.is_file() and present.read_text(encoding="utf-8") == metadata
        if is_same and all((folder / name).is_file() for name in names):
            return folder
        raise ValueError(
            f"`output_dir` holds `{folder}` with other images, or not all of them: choose another, or move it away."
        )
    temporary = folder.with_name(f".{split}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, (pixels, _) in zip(names, rendered, strict=True):
            Image.fromarray(pixels).save(temporary / name)
        (temporary / "metadata.jsonl").write_text(metadata, encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as CLIP takes them.

    Args:
        images (`torch.Tensor` of shape `(..., 3, height, width)`): In [-1, 1].

    Returns:
        `torch.Tensor` of the same shape: With OpenAI's mean and standard deviation taken out.
    """
    mean, std = (images.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images / 2 + 0.5 - mean) / std


def attribute_prompts(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Captions that name one attribute each: the digits, then the colors, then the sizes.

    Args:
        tokenizer (`CLIPTokenizer`): The tokenizer.

    Returns:
        `torch.Tensor` of shape `(20, length)`: Token ids, padded.
    """
    prompts = [caption(name) for name in DIGITS]
    prompts += [caption(color=name) for name in COLORS] + [caption(size=name) for name in SIZES]
    return tokenizer(prompts, padding=True, return_tensors="pt").input_ids


@torch.no_grad()
def evaluate_clip(
    model: CLIPModel, tokenizer: CLIPTokenizer, folder: str | os.PathLike, batch_size: int = 250
) -> dict[str, float]:
    """How well embeddings of images and captions fit.

    Args:
        model (`CLIPModel`): The model, on any device.
        tokenizer (`CLIPTokenizer`): Its tokenizer.
        folder (`str` or `os.PathLike`): Of [`render_digits`].
        batch_size (`int`, *optional*, defaults to 250): Images per forward pass; does not change the numbers.

    Returns:
        `dict[str, float]`: `digit_accuracy`, `color_accuracy` and `size_accuracy`, the share of images whose embedding
        is closest to the caption that mentions their digit (color, size) and nothing else; `cos_text_image`, mean
        cosine of an image and its caption; `cos_unpaired`, of an image and the captions of all others;
        `modality_gap`, distance between the mean normalized embeddings of images and of captions.

    Raises:
        ValueError: The folder has no `metadata.jsonl` of [`render_digits`].
    """
    # 1. Images, captions, names
    metadata = Path(folder) / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(f"`folder` has no `{metadata}`: pass what `render_digits` returned, such as `images/train`.")
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    images = ImageDataset(
        [metadata.with_name(row["file_name"]) for row in rows], resolution=model.config.vision_config.image_size
    )
    tokenized = tokenizer(
        [row["text"] for row in rows], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    prompts = F.pad(attribute_prompts(tokenizer), (0, tokenized.shape[1]), value=tokenizer.pad_token_id)[
        :, : tokenized.shape[1]
    ]

    # 2. Embeddings, normalized
    image_embeds, text_embeds = [], []
    training = model.training
    model.eval()
    for part in torch.arange(len(rows)).split(batch_size):
        pixels = preprocess(torch.stack([images[i]["images"] for i in part.tolist()]))
        output = model(
            input_ids=torch.cat([prompts, tokenized[part]]).to(model.device),
            pixel_values=pixels.to(model.device, model.dtype),
        )
        image_embeds.append(output.image_embeds.double().cpu())
        prompt_embeds, embeds = output.text_embeds.double().cpu().split([len(prompts), len(part)])
        text_embeds.append(embeds)
    model.train(training)
    image_embeds, text_embeds = torch.cat(image_embeds), torch.cat(text_embeds)

    # 3. Numbers
    values, start = {}, 0
    for attribute, names in {"digit": DIGITS, "color": tuple(COLORS), "size": tuple(SIZES)}.items():
        scores = image_embeds @ prompt_embeds[start : start + len(names)].T
        truth = torch.tensor([names.index(row[attribute]) for row in rows])
        values[f"{attribute}_accuracy"] = (scores.argmax(1) == truth).double().mean().item()
        start += len(names)
    paired = (image_embeds * text_embeds).sum(1)
    everything = image_embeds.sum(0) @ text_embeds.sum(0)  # over all pairs, paired or not
    values["cos_text_image"] = paired.mean().item()
    values["cos_unpaired"] = ((everything - paired.sum()) / (len(rows) * max(1, len(rows) - 1))).item()
    values["modality_gap"] = (image_embeds.mean(0) - text_embeds.mean(0)).norm().item()
    return values


def default_clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP for 32 x 32 pixels with embeddings of size 64, which is also the width of its text encoder.

    Args:
        tokenizer (`CLIPTokenizer`): Gives the number of tokens and the length of a text.

    Returns:
        `CLIPConfig`: The configuration.
    """
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            # the text embedding is read off at the end token
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": 64,
        },
        vision_config={
            "image_size": RESOLUTION,
            "patch_size": 16,  # few and large: from 8 x 8 pixels digits are learned far later
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
        },
        projection_dim=64,
        logit_scale_init_value=1.6,  # a low start keeps images and captions closer together
    )


@dataclass
class ToyCLIP:
    """A small CLIP and its tokenizer, which are saved with what prepares images."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save all into one folder.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
        """
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        side = self.model.config.vision_config.image_size
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(save_directory)


def main(args: ToyCLIPArguments) -> None:
    """Render the images, train, validate, save and, with `--push_to_hub`, publish a `CLIPModel` and its tokenizer.

    Args:
        args ([`ToyCLIPArguments`]): The arguments.

    Raises:
        ValueError: The configuration does not fit images and tokenizer, `image_dir` holds other images, or the
            arguments are refused by [`TrainingRun`].
    """
    # 1. Seeds, tokenizer, model
    run = TrainingRun(args)
    tokenizer = byte_tokenizer()
    if args.clip_config_name_or_path is not None:
        config = CLIPConfig.from_pretrained(args.clip_config_name_or_path, cache_dir=args.cache_dir)
    else:
        config = default_clip_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    for name, value, wanted in (
        ("vocab_size", text.vocab_size, len(tokenizer)),
        ("max_position_embeddings", text.max_position_embeddings, tokenizer.model_max_length),
        ("eos_token_id", text.eos_token_id, tokenizer.eos_token_id),
        ("image_size", vision.image_size, RESOLUTION),
    ):
        if value != wanted:
            raise ValueError(
                f"`clip_config_name_or_path` has `{name}` {value}, but it must be {wanted}, as tokenizer and images "
                "have it: change it in the `config.json`."
            )
    model = CLIPModel(config)
    # Attention takes the patches for a bag until it has learned where they lie. CLIP's own start, a fiftieth of the
    # patches' scale, is for far longer trainings.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)

    # 2. Images: a folder for those who come after, and an endless stream of the like to train on
    image_dir = Path(args.image_dir or Path(args.output_dir) / "images")
    with run.accelerator.main_process_first():
        render_digits(image_dir, args.num_train_images, "train", args.seed)
        validation = render_digits(image_dir, args.num_validation_images, "validation", args.seed)
    dataset = CaptionedDigits(2**20, "train", args.seed)

    # 3. Train
    run.prepare({"clip": model}, dataset)
    prompts = attribute_prompts(tokenizer).to(run.accelerator.device)
    for batch in run.batches():
        with run.accumulate():
            pixel_values, labels = preprocess(batch["images"]), batch["labels"]
            if run.step < args.warm_start_steps:
                # Which prompt fits an image, and which images fit a prompt. Each attribute on its own: between whole
                # captions color and size decide nearly everything, and digits would be learned far later.
                logits = run.model(input_ids=prompts, pixel_values=pixel_values).logits_per_image
                parts = logits.split([len(DIGITS), len(COLORS), len(SIZES)], dim=1)
                loss = logits.new_zeros(())
                for part, label in zip(parts, labels.unbind(1), strict=True):
                    fits = F.one_hot(label, part.shape[1]).to(part.dtype).T
                    fits = fits / fits.sum(1, keepdim=True).clamp(min=1)  # a name may be missing in the batch
                    loss = loss + F.cross_entropy(part, label) / 6 + F.cross_entropy(part.T, fits) / 6
            else:
                # Which image belongs to which caption. Equal captions are negatives too, as they are in CLIP.
                length = (batch["input_ids"] == tokenizer.eos_token_id).int().argmax(1).max() + 1
                input_ids = batch["input_ids"][:, :length]
                logits = run.model(input_ids=input_ids, pixel_values=pixel_values).logits_per_image
                pairs = torch.arange(len(logits), device=logits.device)
                loss = F.cross_entropy(logits, pairs) / 2
                loss = loss + F.cross_entropy(logits.T, pairs) / 2
            run.optimize(loss, metrics={"logit_scale": model.logit_scale.exp()})
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if run.validate_now:
            trained = run.trained()["clip"]
            if run.accelerator.is_main_process:
                values = evaluate_clip(trained, tokenizer, validation)
                run.log({f"validation_{name}": value for name, value in values.items()})

    # 4. Save and publish
    titles = {
        "digit_accuracy": "zero-shot accuracy, digit", "color_accuracy": "zero-shot accuracy, color",
        "size_accuracy": "zero-shot accuracy, size", "cos_text_image": "cosine of image and caption",
        "cos_unpaired": "cosine of image and other captions", "modality_gap": "modality gap",
    }  # fmt: skip
    run.finish(
        ToyCLIP(run.trained()["clip"], tokenizer),
        card={
            "datasets": ["digits"],
            "metrics": [
                {
                    "dataset_name": "captioned digits, held out",
                    "metric_type": "accuracy" if "accuracy" in name else name,
                    "metric_name": title,
                    "metric_value": round(run.metrics[f"validation_{name}"], 5),
                }
                for name, title in titles.items()
                if f"validation_{name}" in run.metrics
            ],
            "training": {
                "data": "handwritten digits of scikit-learn in 8 colors and 2 sizes, 32 x 32",
                "captions": f"each attribute is mentioned with probability {MENTION_PROBABILITY}",
                "optimizer": f"AdamW, weight decay {args.adam_weight_decay:g}",
                "optimizer steps": f"{run.step}, the first {args.warm_start_steps} on single attributes",
                "images per step": run.global_batch_size,
                "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, warm-up {args.lr_warmup_steps}",
                "averaged weights": f"decay {args.ema_decay}" if args.use_ema else "none",
                "seed": args.seed,
                "last training loss": round(run.metrics["train_loss"], 5),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(ToyCLIPArguments))
