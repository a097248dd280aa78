"""Train an unconditional DDPM (https://huggingface.co/papers/2006.11239); the output is a stock `DDPMPipeline` folder.

On the bundled digits, in about two minutes on one CPU core:

```bash
accelerate launch training/train_unconditional.py --dataset_name digits --train_batch_size 64 --max_train_steps 1500 \
  --learning_rate 2e-3 --lr_scheduler cosine_with_min_lr --lr_warmup_steps 50 --use_ema --ema_decay 0.999 \
  --output_dir ddpm-digits
```

On a folder of pictures with two GPUs, and going on with that run after a break:

```bash
accelerate launch --num_processes 2 training/train_unconditional.py --train_data_dir pictures --resolution 64 \
  --random_flip --train_batch_size 64 --num_train_epochs 100 --mixed_precision bf16 --use_ema \
  --output_dir ddpm-pictures
accelerate launch --num_processes 2 training/train_unconditional.py ... --resume_from_checkpoint latest
```

Fine-tune with `--pretrained_model_name_or_path google/ddpm-celebahq-256`. From an installed package the script runs as
`accelerate launch -m diffusers_ext.training.train_unconditional ...`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from transformers import HfArgumentParser

from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument


@dataclass(kw_only=True)
class UnconditionalArguments(TrainingArguments):
    """Arguments of this script beside those of every script."""

    model_config_name_or_path: str | None = argument(
        None, "Folder or repo with the `config.json` of a `UNet2DModel`; by default one that fits the resolution."
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = argument(
        None, "What the model predicts; by default what the pretrained model does, or `epsilon`."
    )
    ddpm_num_steps: int | None = argument(
        None, "Length of the noise schedule; by default the pretrained one's, or 1000."
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = argument(
        None, "Noise schedule; by default the pretrained one's, or `linear`."
    )
    ddpm_num_inference_steps: int = argument(50, "DDIM steps for the validation images.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path and self.model_config_name_or_path:
            raise ValueError(
                "`pretrained_model_name_or_path` and `model_config_name_or_path` are both given, but a pretrained "
                "model brings its own configuration: leave one out."
            )
        if self.ddpm_num_steps is not None and self.ddpm_num_steps < 4:
            raise ValueError(f"`ddpm_num_steps` is {self.ddpm_num_steps}, but must be at least 4.")
        if not 1 <= self.ddpm_num_inference_steps <= (self.ddpm_num_steps or 1000):
            raise ValueError(
                f"`ddpm_num_inference_steps` is {self.ddpm_num_inference_steps}, but must lie between 1 and the "
                f"{self.ddpm_num_steps or 1000} steps of the noise schedule."
            )


def default_unet_config(resolution: int) -> dict[str, Any]:
    """The U-Net for images of a size: a small one for thumbnails, the DDPM paper's from 32 pixels on.

    Args:
        resolution (`int`):
            Side of the images in pixels.

    Returns:
        `dict[str, Any]`: Keyword arguments for `UNet2DModel`, without sizes and channels of the images.
    """
    if resolution < 32:
        width = 16 if resolution < 16 else 32
        config = {
            "layers_per_block": 1,
            "block_out_channels": (width, 2 * width),
            "norm_num_groups": 8,
            "attention_head_dim": width // 2,
        }
        attention = 1
    else:  # appendix B: attention at 16 x 16
        wide = (128, 256, 256, 256) if resolution < 128 else (128, 128, 256, 256, 512, 512)
        config = {"layers_per_block": 2, "block_out_channels": wide}
        attention = min((resolution - 1).bit_length() - 4, len(wide) - 1)
    blocks = range(len(config["block_out_channels"]))
    config["down_block_types"] = tuple("AttnDownBlock2D" if i == attention else "DownBlock2D" for i in blocks)
    config["up_block_types"] = tuple("AttnUpBlock2D" if i == attention else "UpBlock2D" for i in reversed(blocks))
    return config


@torch.no_grad()
def held_out_loss(
    unet: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor, batch_size: int, seed: int
) -> float:
    """The training loss on fixed images with fixed noise, at timesteps that are spread evenly: comparable over a run.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The model.
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): Held-out images in [-1, 1].
        batch_size (`int`): Images per forward pass.
        seed (`int`): Seed of the noise.

    Returns:
        `float`: The mean squared error of the prediction.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.arange(len(images)) * scheduler.config.num_train_timesteps // len(images)
    total = 0.0
    for batch in zip(*(tensor.split(batch_size) for tensor in (images, noise, timesteps)), strict=True):
        clean, noise_batch, t = (tensor.to(unet.device) for tensor in batch)
        model_output = unet(scheduler.add_noise(clean, noise_batch, t), t).sample
        total += (model_output - target(scheduler, clean, noise_batch, t)).square().flatten(1).mean(1).sum().item()
    return total / len(images)


def target(
    scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model has to predict, by `scheduler.config.prediction_type`.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): Clean images.
        noise (`torch.Tensor` of the same shape): The noise that was added.
        timesteps (`torch.Tensor` of shape `(batch,)`): At these timesteps.

    Returns:
        `torch.Tensor` of the shape of `images`: epsilon, x_0, or v = sqrt(ᾱ) epsilon - sqrt(1 - ᾱ) x_0.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    return images if scheduler.config.prediction_type == "sample" else noise


def main(args: UnconditionalArguments) -> None:
    """Train, validate, save and, with `--push_to_hub`, publish a `DDPMPipeline`.

    Args:
        args ([`UnconditionalArguments`]): The arguments.

    Raises:
        ValueError: Model and images do not fit together, or the arguments are refused by [`TrainingRun`].
    """
    # 1. Seeds, data, model, noise schedule
    run = TrainingRun(args)
    dataset = run.load_dataset("train", [])
    resolution, channels = dataset.resolution, 1 if dataset.image_mode == "L" else 3
    validation_images = None
    if args.validation_steps and args.validation_fraction != 0:
        validation = run.load_dataset("validation", [])
        validation_images = torch.stack([validation[i]["images"] for i in range(min(256, len(validation)))])

    schedule = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    schedule = {name: value for name, value in schedule.items() if value is not None}
    sizes = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    if args.pretrained_model_name_or_path is not None:
        pretrained = DDPMPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
        )
        unet, scheduler = pretrained.unet, DDPMScheduler.from_config(pretrained.scheduler.config, **schedule)
        for name in ("in_channels", "out_channels"):
            if unet.config[name] != channels:
                raise ValueError(
                    f"the U-Net of `pretrained_model_name_or_path` has {name} {unet.config[name]}, but the images "
                    f"have {channels} channels: pass another `image_mode`, or a model without learned variance."
                )
        unet.register_to_config(sample_size=resolution)
    else:
        scheduler = DDPMScheduler(**schedule)
        if args.model_config_name_or_path is not None:
            config = UNet2DModel.load_config(
                args.model_config_name_or_path, revision=args.revision, cache_dir=args.cache_dir
            )
        else:
            config = default_unet_config(resolution)
        unet = UNet2DModel.from_config({**config, **sizes})
    halvings = len(unet.config.block_out_channels) - 1
    if resolution % 2**halvings:
        raise ValueError(
            f"`resolution` is {resolution}, but the U-Net halves it {halvings} times: choose a multiple of "
            f"{2**halvings}, or a model with fewer blocks."
        )
    num_train_timesteps = scheduler.config.num_train_timesteps

    # 2. Train
    run.prepare({"unet": unet}, dataset)
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            noise, timesteps = run.randn_like(images), run.randint(num_train_timesteps)
            model_output = run.model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
            # Equation 14 of the paper, for epsilon; the same unweighted error for the other targets
            error = model_output.float() - target(scheduler, images, noise, timesteps)
            per_sample_loss = error.square().flatten(1).mean(1)
            run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
            )
        if run.validate_now:
            trained = run.trained()["unet"]
            if run.accelerator.is_main_process:
                if validation_images is not None:
                    loss = held_out_loss(trained, scheduler, validation_images, args.train_batch_size, args.seed)
                    run.log({"validation_loss": loss})
                pipeline = DDIMPipeline(trained, DDIMScheduler.from_config(scheduler.config))
                pipeline.set_progress_bar_config(disable=True)
                samples = pipeline(
                    batch_size=args.num_validation_images,
                    generator=torch.Generator(trained.device).manual_seed(args.seed),
                    num_inference_steps=args.ddpm_num_inference_steps,
                ).images
                run.log_images("samples", samples)

    # 3. Save and publish
    base = args.pretrained_model_name_or_path
    metrics, samples = run.metrics, run.output_dir / f"samples/samples-{run.step:06d}.png"
    run.finish(
        DDPMPipeline(**run.trained(), scheduler=scheduler),
        card={
            "datasets": [args.dataset_name] if args.dataset_name else None,
            "base_model": None if base is None or Path(base).is_dir() else base,
            "samples": samples if samples.is_file() else None,
            "metrics": [
                {
                    "dataset_name": args.dataset_name or "images",
                    "metric_type": "loss",
                    "metric_name": f"{scheduler.config.prediction_type} loss, {len(validation_images)} held out",
                    "metric_value": round(metrics["validation_loss"], 5),
                }
            ]
            if "validation_loss" in metrics
            else [],
            "training": {
                "data": dataset.description,
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
    (arguments,) = HfArgumentParser(UnconditionalArguments).parse_args_into_dataclasses()
    main(arguments)
