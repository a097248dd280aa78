"""Train PDAE on a pretrained diffusion model: an encoder that gives images a semantic code, and a gradient estimator.

The defaults are the recipe of the paper (https://huggingface.co/papers/2212.12990, its batch of 128 on 4 processes):

```bash
accelerate launch --num_processes 4 training/train_pdae.py \
  --pretrained_model_name_or_path google/ddpm-ema-celebahq-256 --train_data_dir faces --resolution 256 \
  --train_batch_size 32 --max_train_steps 500000 --output_dir pdae-celebahq
```

and on the bundled digits, in about two minutes on one CPU core, after `training/train_unconditional.py`:

```bash
accelerate launch -m diffusers_ext.training.train_pdae --pretrained_model_name_or_path ddpm-digits \
  --dataset_name digits --no_random_flip --latent_dim 32 --train_batch_size 64 --learning_rate 2e-3 \
  --max_train_steps 1500 --lr_scheduler cosine_with_min_lr --lr_warmup_steps 50 --max_grad_norm 1.0 --ema_decay 0.999 \
  --output_dir pdae-digits
```

The number to watch is `loss_ratio`, the weighted loss with the learned shift over that of the pretrained model alone:
1 at the start; it falls as the code tells the decoder what the noise has hidden. Base model and data must be of one
kind: on images that the base model does not know, training is unstable; fine-tune the base on them first.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.logging import get_logger
from diffusers import DDPMPipeline
from PIL import Image
from torch import nn
from transformers import HfArgumentParser

from diffusers_ext.data import ImageDataset
from diffusers_ext.pipelines.pdae import (
    PDAEEncoder,
    PDAEGradientEstimator,
    PDAEPipeline,
    PDAEScheduler,
    unet_down,
    unet_up,
)
from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script

logger = get_logger(__name__)


@dataclass(kw_only=True)
class PDAEArguments(TrainingArguments):
    """Arguments of this script beside those of every script; the defaults are the paper's."""

    latent_dim: int = argument(512, "Size of the semantic code.")
    encoder_block_out_channels: str | None = argument(
        None, "Channels of the encoder's blocks, `64,128,256` for example; by default the paper's for the resolution."
    )
    weighting: Literal["pdae", "none"] = argument("pdae", "Weight of the loss over timesteps: the paper's, or none.")
    gamma: float = argument(0.1, "Exponent of the paper's weight, SNR^gamma / (1 + SNR).")

    train_batch_size: int = argument(32, "Images per process and forward pass.")
    random_flip: bool = argument(
        True, "Flip images left to right at random, as the authors do; not for digits or text."
    )
    adam_weight_decay: float = argument(0.0, "AdamW's decoupled weight decay; the authors use Adam, which is 0.")
    max_grad_norm: float = argument(0.0, "Gradients are clipped to this norm; 0, the authors' choice, turns it off.")
    use_ema: bool = argument(True, "Keep a moving average of the weights; it is what is validated and published.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                "`pretrained_model_name_or_path` is missing: name a diffusion model on a `UNet2DModel`, such as "
                "google/ddpm-ema-celebahq-256 or the output of `train_unconditional.py`."
            )
        if self.latent_dim < 1:
            raise ValueError(f"`latent_dim` is {self.latent_dim}, but must be at least 1.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` is {self.gamma}, but must be in [0, 1].")
        channels = self.encoder_block_out_channels
        widths = [] if channels is None else [number.strip() for number in channels.split(",")]
        if not all(width.isdecimal() and int(width) >= 4 for width in widths):
            raise ValueError(
                f"`encoder_block_out_channels` is {channels!r}, but must be numbers of at least 4 with commas: "
                "`64,128,256`."
            )


class PDAETrainModule(nn.Module):
    """Everything that is differentiated, in one `forward`: the gradient that the code of the clean images gives."""

    def __init__(self, encoder: PDAEEncoder, gradient_estimator: PDAEGradientEstimator) -> None:
        super().__init__()
        self.encoder = encoder
        self.gradient_estimator = gradient_estimator

    def forward(
        self,
        clean_images: torch.Tensor,
        hidden_states: torch.Tensor,
        res_hidden_states: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient `G(x_t, E(x_0), t)`, shape of `clean_images`, on the features that `unet_down` gives."""
        return self.gradient_estimator(hidden_states, res_hidden_states, temb, self.encoder(clean_images))


def make_encoder(args: PDAEArguments, resolution: int, in_channels: int) -> PDAEEncoder:
    """The paper's encoder for 64 and 128 pixels, continued to others: halve to 4 x 4, attention at 16 x 16."""
    if args.encoder_block_out_channels is not None:
        block_out_channels = tuple(int(channels) for channels in args.encoder_block_out_channels.split(","))
    elif resolution < 32:  # the authors' images are larger; this is a network of their kind for small ones
        block_out_channels = (32, 64)
    else:
        halvings = (resolution - 1).bit_length() - 2
        block_out_channels = (64, *(128,) * 3)[:halvings] if resolution <= 64 else (64, 128, *(256,) * (halvings - 2))
    attention_block = (resolution - 1).bit_length() - 5
    return PDAEEncoder(
        sample_size=resolution,
        in_channels=in_channels,
        latent_dim=args.latent_dim,
        block_out_channels=block_out_channels,
        attention_block=attention_block if 0 <= attention_block < len(block_out_channels) else None,
        norm_num_groups=min(32, min(block_out_channels) // 4),
    )


@torch.no_grad()
def validate(
    run: TrainingRun, pipeline: PDAEPipeline, images: torch.Tensor, class_labels: torch.Tensor | None
) -> list[Image.Image]:
    """Logs losses and errors on held-out `images` (in [0, 1]) with fixed noise; gives the rows of a picture."""
    generator = torch.Generator().manual_seed(run.args.seed)
    pipeline.set_progress_bar_config(disable=True)
    # 1. How far the shift closes the posterior mean gap: one number per band of timesteps
    steps = pipeline.scheduler.config.num_train_timesteps
    timesteps = [steps * i // 8 for i in range(1, 8)]
    gap = pipeline.posterior_gap(images, timesteps, class_labels=class_labels, generator=generator)
    run.log({f"validation_gap_ratio_t{t}": (s / b).item() for t, b, s in zip(*gap.values(), strict=True)})
    # 2. What the code alone gives back, from random noise, beside what the pretrained model gives from that noise
    decoding = {"num_inference_steps": min(50, steps), "class_labels": class_labels, "output_type": "pt"}
    output = pipeline(images, generator=generator, **decoding)
    noise, codes = output.inverted_noise, output.latent_code
    base = pipeline.decode(codes, noise, shift_scale=0, **decoding).images
    target = images.to(output.images.device)
    errors = {"mse": output.images, "base_mse": base}
    run.log({f"validation_{name}": (i - target).square().mean().item() for name, i in errors.items()})
    rows = torch.cat([target.to(base.dtype), output.images, base]).cpu()
    return pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(rows))


def held_out(dataset: ImageDataset, num_images: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first images of the held-out split, in [0, 1], and their labels."""
    items = [dataset[i] for i in range(min(num_images, len(dataset)))]
    labels = torch.tensor([item["labels"] for item in items]) if "labels" in items[0] else None
    return torch.stack([item["images"] for item in items]) / 2 + 0.5, labels


def main(args: PDAEArguments) -> None:
    """Trains, validates, saves and, with `--push_to_hub`, publishes a [`PDAEPipeline`].

    Args:
        args ([`PDAEArguments`]): The arguments.
    """
    # 1. Seeds, the frozen model, the data, the models that are trained
    run = TrainingRun(args)
    base = DDPMPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
    )
    unet = base.unet.requires_grad_(False).eval()
    scheduler = PDAEScheduler.from_config(base.scheduler.config)
    num_train_timesteps = scheduler.config.num_train_timesteps
    if args.resolution is None and isinstance(unet.config.sample_size, int):
        args.resolution = unet.config.sample_size
    if args.image_mode is None:
        args.image_mode = "L" if unet.config.in_channels == 1 else "RGB"
    class_conditional = unet.class_embedding is not None
    columns = ["labels"] if class_conditional else []
    dataset = run.load_dataset("train", columns)
    channels = 1 if dataset.image_mode == "L" else 3
    if unet.config.in_channels != channels:
        raise ValueError(
            f"`image_mode` {dataset.image_mode!r} gives {channels} channels, but the U-Net of "
            f"`pretrained_model_name_or_path` has {unet.config.in_channels}: leave `image_mode` out."
        )
    size, resolution = unet.config.sample_size, dataset.resolution
    if size is not None and tuple(size if isinstance(size, list | tuple) else [size] * 2) != (resolution,) * 2:
        logger.warning(
            f"`resolution` is {resolution}, but the base model's `sample_size` is {size}: at another size it predicts "
            "noise badly. Leave `resolution` out, or fine-tune the base model at that size first."
        )
    if channels == 1:
        some = ImageDataset(dataset.pictures, resolution=resolution, indices=dataset.indices[:8])  # RGB
        if any((item["images"].amax(0) - item["images"].amin(0)).max() > 0.1 for item in some):
            logger.warning(
                "The images are in color, with 3 channels, but the base model has 1: they are turned to grey. Take a "
                "base model of color images to keep their color."
            )
    validation_images = validation_labels = None
    if args.validation_steps:
        held_out_dataset = run.load_dataset("validation", columns)
        validation_images, validation_labels = held_out(held_out_dataset, args.num_validation_images)
    if class_conditional:
        classes = unet.config.num_class_embeds
        labels = dataset.labels
        if labels is None or (classes is not None and not 0 <= min(labels) <= max(labels) < classes):
            raise ValueError(
                f"the U-Net of `pretrained_model_name_or_path` is class-conditional ({classes} classes), but the "
                f"labels of the images are {'missing' if labels is None else f'from {min(labels)} to {max(labels)}'}: "
                "name another `label_column`, or take an unconditional model."
            )
    encoder = make_encoder(args, dataset.resolution, unet.config.in_channels)
    gradient_estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=args.latent_dim)
    PDAEPipeline(unet, encoder, gradient_estimator, scheduler)  # refuses parts that do not fit, before training
    run.prepare(
        {"encoder": encoder, "gradient_estimator": gradient_estimator},
        dataset,
        train_module=PDAETrainModule(encoder, gradient_estimator),
        frozen=unet,
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(run.accelerator.mixed_precision, torch.float32)
    # Training may round the frozen weights; what is published must not.
    frozen = (unet if dtype == torch.float32 else copy.deepcopy(unet).to(dtype)).to(run.accelerator.device)

    # 2. Train
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            noise, timesteps = run.randn_like(images), run.randint(num_train_timesteps)
            noisy_images = scheduler.add_noise(images, noise, timesteps)
            with torch.no_grad():  # one pass through the frozen U-Net serves its own output and the estimator
                features = unet_down(
                    frozen, noisy_images.to(dtype), timesteps, batch["labels"] if class_conditional else None
                )
                model_output = unet_up(frozen, *features)
            gradient = run.model(images, *features)

            # lambda_t || eps - (eps_theta(x_t, t) + c_t G(x_t, E(x_0), t)) ||^2, the paper's objective
            noise_pred = scheduler.predict_noise(model_output, timesteps, noisy_images)
            shifted = scheduler.predict_noise(model_output, timesteps, noisy_images, gradient)
            weight = scheduler.loss_weight(timesteps, args.gamma, images) if args.weighting == "pdae" else 1.0
            per_sample_loss = (weight * (noise - shifted).square()).flatten(1).mean(1)
            base_loss = (weight * (noise - noise_pred).square()).mean()
            stepped = run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
                metrics={"base_loss": base_loss},
            )
        if stepped:
            run.log({"loss_ratio": run.metrics["train_loss"] / run.metrics["base_loss"]})
        if run.validate_now:
            pipeline = PDAEPipeline(frozen, **run.trained(), scheduler=scheduler)
            if run.accelerator.is_main_process:
                labels = validation_labels if class_conditional else None
                pictures = validate(run, pipeline, validation_images, labels)
                run.log_images("reconstructions", pictures, columns=len(validation_images))

    # 3. Publish
    pipeline = PDAEPipeline(unet, **run.trained(), scheduler=scheduler)
    names = {"validation_mse": "MSE from random noise", "validation_base_mse": "MSE of the base model, same noise"}
    samples = run.output_dir / f"samples/reconstructions-{run.step:06d}.png"
    base_is_local = Path(args.pretrained_model_name_or_path).is_dir()
    run.finish(
        pipeline,
        card={
            "datasets": [args.dataset_name] if args.dataset_name else None,
            "base_model": None if base_is_local else args.pretrained_model_name_or_path,
            "samples": samples if samples.is_file() else None,
            "metrics": [
                {
                    "dataset_name": args.dataset_name or "images",
                    "metric_type": "mse",
                    "metric_name": f"{name}, {len(validation_images)} held-out images in [0, 1]",
                    "metric_value": round(run.metrics[key], 5),
                }
                for key, name in names.items()
                if key in run.metrics
            ],
            "training": {
                "optimizer steps": run.step,
                "images per step": run.global_batch_size,
                "learning rate": args.learning_rate,
                "size of the code": args.latent_dim,
                "weighting": f"pdae, gamma {args.gamma}" if args.weighting == "pdae" else "none",
                "averaged weights": f"decay {args.ema_decay}" if args.use_ema else "none",
                "seed": args.seed,
                "last loss with the shift over the loss without": round(run.metrics["loss_ratio"], 4),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(PDAEArguments))
