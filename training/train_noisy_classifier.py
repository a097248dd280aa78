"""Train the classifier of classifier guidance: one of noisy images that knows their timestep.

On a folder with one folder of pictures per class, with the noise of the diffusion model that it will guide, and the
recipe of the paper (https://huggingface.co/papers/2105.05233, its batch of 256 on 8 processes):

```bash
accelerate launch --num_processes 8 training/train_noisy_classifier.py --pretrained_model_name_or_path ddpm-pictures \
  --train_data_dir pictures --train_batch_size 32 --max_train_steps 300000 --mixed_precision bf16 \
  --output_dir classifier-pictures
accelerate launch --num_processes 8 training/train_noisy_classifier.py ... --resume_from_checkpoint latest
```

On the bundled digits, in about a minute on one CPU core, after `training/train_unconditional.py`:

```bash
accelerate launch -m diffusers_ext.training.train_noisy_classifier --pretrained_model_name_or_path ddpm-digits \
  --dataset_name digits --no_random_flip --train_batch_size 64 --learning_rate 1e-3 --max_train_steps 1000 \
  --output_dir classifier-digits
```

The numbers to watch are `validation_acc1_q0` to `_q3`, the share of held-out images that are classified right in each
quarter of the timesteps: high in q0 and no better than chance in q3, where nothing but noise is left. `--clean` trains
without noise, for comparison: such a classifier guides badly. `--pretrained_classifier_name_or_path` goes on with a
classifier that is there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from diffusers import UNet2DModel
from transformers import HfArgumentParser

from diffusers_ext.data import ImageDataset
from diffusers_ext.pipelines.classifier_guidance import GuidedScheduler, NoisyClassifier, noise_levels
from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script

logger = get_logger(__name__)


@dataclass(kw_only=True)
class NoisyClassifierArguments(TrainingArguments):
    """Arguments of this script beside those of every script; the defaults are the paper's."""

    pretrained_model_name_or_path: str | None = argument(
        None, "Hub id or folder of the diffusion model to guide: gives noise schedule, resolution and channels."
    )
    pretrained_classifier_name_or_path: str | None = argument(
        None, "Hub id or folder of a classifier that training starts from."
    )
    classifier_config_name_or_path: str | None = argument(
        None, "Folder or repo with the `config.json` of a classifier; by default the paper's for the resolution."
    )
    num_classes: int | None = argument(None, "Number of classes; by default what the labels say.")
    ddpm_num_steps: int | None = argument(None, "Length of the noise schedule, without a pretrained one; 1000.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = argument(
        None, "Noise schedule, without a pretrained one; `linear`."
    )
    clean: bool = argument(False, "Train on images without noise, at timestep 0.")

    random_flip: bool = argument(
        True, "Flip images left to right at random, as the authors do; not for digits or text."
    )
    learning_rate: float = argument(3e-4, "Highest learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "cosine_with_min_lr",
    ] = argument("linear", "Learning-rate schedule, in optimizer steps; the authors' is linear, to 0.")  # fmt: skip
    adam_weight_decay: float = argument(0.05, "AdamW's decoupled weight decay.")
    max_grad_norm: float = argument(0.0, "Gradients are clipped to this norm; 0, the authors' choice, turns it off.")
    num_validation_images: int = argument(1000, "Held-out images that a validation classifies, at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_classifier_name_or_path and self.classifier_config_name_or_path:
            raise ValueError(
                "`pretrained_classifier_name_or_path` and `classifier_config_name_or_path` are both given, but a "
                "pretrained classifier brings its own configuration: leave one out."
            )
        if self.pretrained_model_name_or_path and (self.ddpm_num_steps or self.ddpm_beta_schedule):
            raise ValueError(
                "`pretrained_model_name_or_path` brings its own noise schedule, which the classifier must know: leave "
                "`ddpm_num_steps` and `ddpm_beta_schedule` out."
            )
        for name, least in (("num_classes", 2), ("ddpm_num_steps", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")


def default_classifier_config(resolution: int) -> dict[str, Any]:
    """The classifier for images of a size: the paper's from 32 pixels on, a small one for thumbnails.

    Args:
        resolution (`int`):
            Side of the images in pixels.

    Returns:
        `dict[str, Any]`: Keyword arguments for [`NoisyClassifier`], without sizes and channels of the images.
    """
    if resolution < 32:
        return {
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "attention_head_dim": 16,
            "norm_num_groups": 8,
        }
    # 128 channels times these; at the sizes of the paper the last block has 8 x 8 pixels.
    if resolution < 128:
        multipliers = (1, 2, 3, 4)
    elif resolution < 256:
        multipliers = (1, 1, 2, 3, 4)
    elif resolution < 512:
        multipliers = (1, 1, 2, 2, 4, 4)
    else:
        multipliers = (0.5, 1, 1, 2, 2, 4, 4)
    return {
        "layers_per_block": 4 if resolution < 128 else 2,
        "block_out_channels": tuple(int(128 * multiplier) for multiplier in multipliers),
        "time_proj_dim": 128,  # also where the first block has half of that
    }


def sample_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and hits of each image.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): What the classifier says.
        labels (`torch.Tensor` of shape `(batch,)`): The true classes.

    Returns:
        `dict[str, torch.Tensor]`: Of shape `(batch,)` each, in at least float32: `loss`, the cross-entropy in nats;
        `acc1`, 1 where the true class is the most likely one, else 0; with more than five classes also `acc5`, 1 where
        it is among the five most likely ones.

    Examples:
        >>> import torch
        >>> from diffusers_ext.training.train_noisy_classifier import sample_metrics
        >>> metrics = sample_metrics(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> [round(loss, 2) for loss in metrics["loss"].tolist()], metrics["acc1"][1].item()
        ([0.69, 9.0], 0.0)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = {"loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none")}
    for k in (1, 5):
        if k == 1 or logits.shape[1] > k:
            values[f"acc{k}"] = (logits.topk(k, dim=1).indices == labels[:, None]).any(1).to(logits.dtype)
    return values


@torch.no_grad()
def evaluate(
    classifier: NoisyClassifier,
    scheduler: GuidedScheduler,
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    num_images: int | None = None,
    seed: int = 0,
    clean: bool = False,
) -> dict[str, float]:
    """Loss and accuracy on held-out images with fixed noise, at timesteps that are spread evenly over the schedule.

    Args:
        classifier ([`NoisyClassifier`]): The classifier.
        scheduler ([`GuidedScheduler`]): Noise schedule.
        dataset ([`data.ImageDataset`]): Images in [-1, 1] with labels.
        batch_size (`int`, *optional*, defaults to 64): Images per forward pass; does not change the numbers.
        num_images (`int`, *optional*): The first so many images of the data set; by default all.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.
        clean (`bool`, *optional*, defaults to `False`): Add no noise, and give all images timestep 0.

    Returns:
        `dict[str, float]`: Means of [`sample_metrics`], `loss` and so on, over all images; with `_q0` to `_q3` over
        those of each quarter of the timesteps, t in [0, T/4) to [3T/4, T), which `clean` has not.
    """
    num_images = len(dataset) if num_images is None else min(num_images, len(dataset))
    total = scheduler.config.num_train_timesteps
    timesteps = torch.arange(num_images) * total // num_images * (not clean)
    generator, parts = torch.Generator().manual_seed(seed), []
    for rows in torch.arange(num_images).split(batch_size):
        items = [dataset[row] for row in rows.tolist()]
        images, labels = torch.stack([item["images"] for item in items]), torch.tensor([i["labels"] for i in items])
        if not clean:  # drawn one by one, so that the batch size does not matter
            noise = torch.stack([torch.randn(image.shape, generator=generator) for image in images])
            images = scheduler.add_noise(images, noise, timesteps[rows])
        logits = classifier(
            images.to(classifier.device, classifier.dtype), model_timesteps(scheduler, timesteps[rows])
        )
        parts.append(sample_metrics(logits.cpu(), labels))
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    means = {name: value.double().mean().item() for name, value in values.items()}
    quarters = 4 * timesteps // total
    for quarter in quarters.unique().tolist() if not clean else ():
        here = quarters == quarter
        means |= {f"{name}_q{quarter}": value[here].double().mean().item() for name, value in values.items()}
    return means


def model_timesteps(scheduler: GuidedScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """What the networks of a schedule are given for its timesteps: `t`, or `1000 t / T` with `rescale_timesteps`.

    Args:
        scheduler ([`GuidedScheduler`]): The schedule.
        timesteps (`torch.Tensor` of shape `(batch,)`): `t`, integers in [0, T).

    Returns:
        `torch.Tensor` of shape `(batch,)`: The same, or floats in [0, 1000).
    """
    config = scheduler.config
    return timesteps * 1000 / config.num_train_timesteps if config.rescale_timesteps else timesteps


def main(args: NoisyClassifierArguments) -> None:
    """Train, validate, save and, with `--push_to_hub`, publish a [`NoisyClassifier`].

    Args:
        args ([`NoisyClassifierArguments`]): The arguments.

    Raises:
        ValueError: Diffusion model, classifier, images and labels do not fit together, or the arguments are refused by
            [`TrainingRun`].
    """
    # 1. Seeds, and the noise and the size of the images of the diffusion model; its weights are not needed
    run = TrainingRun(args)
    wanted = {}  # of whom, resolution, channels
    if args.pretrained_model_name_or_path is not None:
        where = {"revision": args.revision, "cache_dir": args.cache_dir}
        schedule = GuidedScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler", **where)
        unet = UNet2DModel.load_config(args.pretrained_model_name_or_path, subfolder="unet", **where)
        if "beta_schedule" not in schedule:
            raise ValueError(
                f"`pretrained_model_name_or_path` has a {schedule.get('_class_name')}, but the noise must be that of "
                "timesteps with betas, such as a `DDPMScheduler`'s: choose another model."
            )
        scheduler = GuidedScheduler.from_config(schedule)
        learned = "learned" if unet["out_channels"] == 2 * unet["in_channels"] else "fixed"
        learned = schedule.get("variance_type", learned).startswith("learned")
        wanted["pretrained_model_name_or_path"] = (unet.get("sample_size"), unet["out_channels"] // (1 + learned))
    else:
        scheduler = GuidedScheduler(args.ddpm_num_steps or 1000, beta_schedule=args.ddpm_beta_schedule or "linear")
    num_train_timesteps = scheduler.config.num_train_timesteps
    classifier = None
    if args.pretrained_classifier_name_or_path is not None:
        classifier = NoisyClassifier.from_pretrained(
            args.pretrained_classifier_name_or_path, variant=args.variant, cache_dir=args.cache_dir
        )
        wanted["pretrained_classifier_name_or_path"] = (classifier.config.sample_size, classifier.config.in_channels)

    # 2. Data
    for size, channels in wanted.values():
        if args.resolution is None and isinstance(size, int):
            args.resolution = size
        if args.image_mode is None:
            args.image_mode = "L" if channels == 1 else "RGB"
    dataset = run.load_dataset("train", ["labels"])
    resolution, in_channels = dataset.resolution, 1 if dataset.image_mode == "L" else 3
    for name, (size, channels) in wanted.items():
        if (size or resolution) not in (resolution, [resolution] * 2) or channels != in_channels:
            raise ValueError(
                f"the images have {in_channels} channels of {resolution} x {resolution} pixels, but the model of "
                f"`{name}` has {channels} of size {size}: leave `resolution` and `image_mode` out, or choose another "
                "model."
            )
    if dataset.labels is None:
        raise ValueError(
            "the images have no labels: name their column in `label_column`, or sort the images of `train_data_dir` "
            "into one folder per class, two or more."
        )
    names, present = dataset.label_names, {dataset.labels[row] for row in dataset.indices}
    if len(present) < 2:
        raise ValueError(
            f"all {len(dataset)} training images are of class {present.pop()}, but there must be two classes to tell "
            "apart: add images of others, or raise `max_train_samples`."
        )
    num_classes = len(names) if names else max(dataset.labels) + 1
    given = num_classes if args.num_classes is None else args.num_classes
    if given < num_classes or (names and given != num_classes):
        raise ValueError(
            f"`num_classes` is {given}, but the labels are of {num_classes} classes "
            f"({', '.join(names[:10]) if names else f'0 to {num_classes - 1}'}): leave it out, or mend the labels."
        )
    num_classes, id2label = given, dict(enumerate(names)) if names else None
    if untrained := sorted(set(range(num_classes)) - present):
        logger.warning(f"no training image is of the classes {untrained[:20]}: the classifier will not know them.")
    validation = None
    if args.validation_steps and args.validation_fraction != 0:
        validation = run.load_dataset("validation", ["labels"])
        if validation.labels is None or max(validation.labels) >= num_classes:
            raise ValueError(
                f"the held-out images have {'no labels' if validation.labels is None else 'other labels'}, but must "
                f"have the {num_classes} classes of the training images: pass a `validation_fraction`, 0 for none."
            )

    # 3. Classifier. It remembers the names of its classes and the noise that it was trained with.
    sizes = {"sample_size": resolution, "in_channels": in_channels, "num_classes": num_classes, "id2label": id2label}
    noise = {
        "num_train_timesteps": num_train_timesteps,
        "trained_alphas_cumprod": None if args.clean else noise_levels(scheduler),
    }
    if classifier is None:
        if args.classifier_config_name_or_path is not None:
            config = NoisyClassifier.load_config(args.classifier_config_name_or_path, cache_dir=args.cache_dir)
        else:
            config = default_classifier_config(resolution)
        classifier = NoisyClassifier.from_config(config, **sizes, **noise)
    else:
        known = classifier.config.id2label
        known = known and {int(number): name for number, name in known.items()}
        if classifier.config.num_classes != num_classes or (known and id2label and known != id2label):
            raise ValueError(
                f"the classifier of `pretrained_classifier_name_or_path` has {classifier.config.num_classes} classes "
                f"({known or 'without names'}), but the images have {num_classes} ({id2label or 'without names'}): "
                "train a new one."
            )
        classifier.register_to_config(id2label=id2label or known, **noise)

    # 4. Train
    run.prepare({"classifier": classifier}, dataset)
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            if args.clean:
                timesteps = torch.zeros_like(batch["labels"])
            else:  # section 4.1: the diffusion model's noise at any of its timesteps
                timesteps = run.randint(num_train_timesteps)
                images = scheduler.add_noise(images, run.randn_like(images), timesteps)
            logits = run.model(images, model_timesteps(scheduler, timesteps))
            metrics = sample_metrics(logits, batch["labels"])
            per_sample_loss = metrics.pop("loss")
            run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
                metrics={f"train_{name}": value.mean() for name, value in metrics.items()},
            )
        if run.validate_now and validation is not None:
            trained = run.trained()["classifier"]
            if run.accelerator.is_main_process:
                values = evaluate(
                    trained,
                    scheduler,
                    validation,
                    batch_size=args.train_batch_size,
                    num_images=args.num_validation_images,
                    seed=args.seed,
                    clean=args.clean,
                )
                run.log({f"validation_{name}": value for name, value in values.items()})

    # 5. Save and publish
    base, diffusion = args.pretrained_classifier_name_or_path, args.pretrained_model_name_or_path
    metrics, results = run.metrics, []
    for quarter in ("", "_q0", "_q1", "_q2", "_q3"):
        scope = "without noise" if args.clean else "all timesteps"
        scope = f"quarter {quarter[-1]} of the timesteps" if quarter else scope
        for kind, title in {"loss": "cross-entropy", "acc1": "accuracy@1", "acc5": "accuracy@5"}.items():
            value = metrics.get(f"validation_{kind}{quarter}")
            if value is not None:
                results.append(
                    {
                        "dataset_name": args.dataset_name or "images",
                        "metric_type": "loss" if kind == "loss" else "accuracy",
                        "metric_name": f"{title}, {scope}, held out",
                        "metric_value": round(value, 5),
                    }
                )
    run.finish(
        run.trained()["classifier"],
        card={
            "datasets": [args.dataset_name] if args.dataset_name else None,
            "base_model": None if base is None or Path(base).is_dir() else base,
            "metrics": results,
            "training": {
                "data": dataset.description,
                **({"held out": min(args.num_validation_images, len(validation))} if results else {}),
                "classes": num_classes,
                "noise": "none"
                if args.clean
                else f"{scheduler.config.beta_schedule}, {num_train_timesteps} timesteps",
                **({} if diffusion is None or Path(diffusion).is_dir() else {"diffusion model": diffusion}),
                "optimizer": f"AdamW, weight decay {args.adam_weight_decay:g}",
                "optimizer steps": run.step,
                "images per step": run.global_batch_size,
                "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, warm-up {args.lr_warmup_steps}",
                "averaged weights": f"decay {args.ema_decay}" if args.use_ema else "none",
                "seed": args.seed,
                "last training loss": round(metrics["train_loss"], 5),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(NoisyClassifierArguments))
