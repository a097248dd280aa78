"""Train a DDPM (https://huggingface.co/papers/2006.11239); the output is a stock `DDPMPipeline` folder.

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

With the variance learned too (https://huggingface.co/papers/2102.09672), and with class labels, a tenth of which is
left out for classifier-free guidance (https://huggingface.co/papers/2207.12598):

```bash
accelerate launch training/train_unconditional.py --dataset_name digits --learn_variance --class_conditional \
  --label_dropout 0.1 --train_batch_size 64 --max_train_steps 1500 --learning_rate 2e-3 --use_ema --ema_decay 0.999 \
  --output_dir ddpm-digits-classes
```

The class of index `num_class_embeds - 1` is then the null class. `DDPMPipeline` loads such a folder, but it takes no
labels: pass `class_labels` to its `unet`.

Fine-tune with `--pretrained_model_name_or_path google/ddpm-celebahq-256`. From an installed package the script runs as
`accelerate launch -m diffusers_ext.training.train_unconditional ...`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import HfArgumentParser

from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script

logger = get_logger(__name__)


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
    learn_variance: bool = argument(
        False, "Predict the variance of each step too; a pretrained model that does so keeps doing it."
    )
    vlb_weight: float = argument(
        1e-3, "Weight of the variational bound of all steps in bits per dimension, where the variance is learned."
    )
    class_conditional: bool = argument(False, "Give the model the labels in `label_column`.")
    label_dropout: float = argument(
        0.1, "With `class_conditional`: share of labels that a null class replaces, for classifier-free guidance."
    )

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
        if not 0 < self.vlb_weight < math.inf:
            raise ValueError(f"`vlb_weight` is {self.vlb_weight}, but must be positive: it alone trains the variance.")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"`label_dropout` is {self.label_dropout}, but must lie in [0, 1).")


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


@torch.no_grad()
def held_out_loss(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    batch_size: int,
    seed: int,
    *,
    class_labels: torch.Tensor | None = None,
    vlb_weight: float = 1e-3,
) -> float:
    """The training loss on fixed images with fixed noise, at timesteps that are spread evenly: comparable over a run.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The model.
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): Held-out images in [-1, 1].
        batch_size (`int`): Images per forward pass.
        seed (`int`): Seed of the noise.
        class_labels (`torch.Tensor` of shape `(images,)`, *optional*): Their labels, for a class-conditional model.
        vlb_weight (`float`, *optional*, defaults to 1e-3): As in [`training_losses`].

    Returns:
        `float`: The mean over the images of the loss of [`training_losses`].
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.arange(len(images)) * scheduler.config.num_train_timesteps // len(images)
    total = 0.0
    for rows in torch.arange(len(images)).split(batch_size):
        clean, noise_batch, t = (tensor[rows].to(unet.device) for tensor in (images, noise, timesteps))
        labels = None if class_labels is None else class_labels[rows].to(unet.device)
        noisy = scheduler.add_noise(clean, noise_batch, t)
        model_output = unet(noisy, t, class_labels=labels).sample
        losses = training_losses(scheduler, clean, noise_batch, noisy, model_output, t, vlb_weight=vlb_weight)
        total += losses["loss"].sum().item()
    return total / len(images)


@torch.no_grad()
def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    num_images: int,
    *,
    num_inference_steps: int = 50,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Image.Image]:
    """What `DDIMPipeline` makes, also of models that it cannot run: those with class labels or a learned variance.

    Args:
        unet ([`~diffusers.UNet2DModel`]): The model; a variance that it predicts is left out.
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        num_images (`int`): Images to make, in one batch.
        num_inference_steps (`int`, *optional*, defaults to 50): DDIM steps.
        num_classes (`int`, *optional*): For a class-conditional model: the images have the labels 0, 1, ...,
            `num_classes - 1`, 0, 1, ...
        generator (`torch.Generator`, *optional*): Makes the images reproducible.

    Returns:
        `list[PIL.Image.Image]`: The images.
    """
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(num_inference_steps)
    labels = None if num_classes is None else torch.arange(num_images, device=unet.device) % num_classes
    shape = (num_images, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    images = randn_tensor(shape, generator=generator, device=unet.device, dtype=unet.dtype)
    for t in ddim.timesteps:
        prediction = unet(images, t, class_labels=labels).sample[:, : unet.config.in_channels]
        images = ddim.step(prediction, t, images).prev_sample
    return VaeImageProcessor().postprocess(images, output_type="pil")


def training_losses(
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    noisy_images: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    vlb_weight: float = 1e-3,
) -> dict[str, torch.Tensor]:
    """The loss of each image: L_simple of DDPM, or with a learned variance the L_hybrid of "Improved DDPM".

    L_hybrid = L_simple + `vlb_weight` L_vlb (equation 16 of https://huggingface.co/papers/2102.09672), where the sum
    L_vlb over all T timesteps is estimated by T times the term of one, in bits per dimension. So 1e-3, the paper's
    weight, is a T / 1000 for the term of one timestep. L_vlb trains the variance alone: it sees the mean as a
    constant.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): Clean images in [-1, 1].
        noise (`torch.Tensor` of the same shape): The noise that was added.
        noisy_images (`torch.Tensor` of the same shape): What `scheduler.add_noise` made of the two.
        model_output (`torch.Tensor` of shape `(batch, channels or 2 * channels, height, width)`): What the model
            predicts for the noisy images.
        timesteps (`torch.Tensor` of shape `(batch,)`): Their timesteps.
        vlb_weight (`float`, *optional*, defaults to 1e-3): Weight of L_vlb.

    Returns:
        `dict[str, torch.Tensor]`: `loss` of shape `(batch,)`; with a learned variance also its parts, `mse` and `vlb`.

    Examples:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_ext.training.train_unconditional import training_losses
        >>> scheduler, timesteps = DDPMScheduler(), torch.tensor([20, 700])
        >>> images, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> noisy_images = scheduler.add_noise(images, noise, timesteps)
        >>> perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # the noise, and the posterior's variance
        >>> losses = training_losses(scheduler, images, noise, noisy_images, perfect, timesteps)
        >>> {name: value.abs().max().item() < 1e-4 for name, value in losses.items()}
        {'loss': True, 'mse': True, 'vlb': True}
    """
    prediction = model_output[:, : images.shape[1]]
    # Equation 14 of the DDPM paper, for epsilon; the same unweighted error for the other targets
    mse = (prediction - target(scheduler, images, noise, timesteps)).square().flatten(1).mean(1)
    if model_output.shape[1] == images.shape[1]:
        return {"loss": mse}
    frozen = torch.cat([prediction.detach(), model_output[:, images.shape[1] :]], dim=1)
    bound = variational_bound(scheduler, images, noisy_images, frozen, timesteps)
    vlb = scheduler.config.num_train_timesteps * bound
    return {"loss": mse + vlb_weight * vlb, "mse": mse, "vlb": vlb}


def variational_bound(
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    noisy_images: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """One timestep's term of the variational bound of a model that learns its variance.

    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the least noisy timestep L_0 = -log p(x_0 | x_1) with a
    Gaussian that is integrated over the bin of an 8-bit pixel value: equations 4 to 6 of
    https://huggingface.co/papers/2102.09672 and section 3.3 of https://huggingface.co/papers/2006.11239. With the
    model's second half of channels v, in [-1, 1] but not clamped, the variance is (equation 15)

        Sigma = exp(f log beta_t + (1 - f) log beta~_t)   with   f = (v + 1) / 2,

    where beta~ is the posterior's variance; it is 0 at the least noisy timestep, which takes that of the next one. The
    estimate of x_0 is not clipped.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): Noise schedule and prediction type.
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): Clean images x_0 in [-1, 1].
        noisy_images (`torch.Tensor` of the same shape): x_t.
        model_output (`torch.Tensor` of shape `(batch, 2 * channels, height, width)`): Prediction and v.
        timesteps (`torch.Tensor` of shape `(batch,)`): t, where 0 is the least noisy.

    Returns:
        `torch.Tensor` of shape `(batch,)`: Bits per dimension, in at least float32.

    Raises:
        ValueError: `model_output` does not have twice the channels of `images`.
    """
    if model_output.shape[1] != 2 * images.shape[1]:
        raise ValueError(
            f"`model_output` has {model_output.shape[1]} channels, but must have twice the {images.shape[1]} of "
            "`images`: a prediction and a variance."
        )
    # 1. The schedule, in double precision until it is complete
    betas = scheduler.betas.double()
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    tables = torch.stack(
        [
            alphas_cumprod.sqrt(),
            (1 - alphas_cumprod).sqrt(),
            betas * previous.sqrt() / (1 - alphas_cumprod),
            betas.log(),
            torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        ]
    )
    dtype = torch.promote_types(images.dtype, torch.float32)
    tables = tables.to(dtype).to(images.device)[:, timesteps, None, None, None]
    signal, sigma, x_0_factor, log_beta, log_posterior_variance = tables

    # 2. The model's x_0 and variance
    prediction, v = model_output.to(dtype).chunk(2, dim=1)
    if scheduler.config.prediction_type == "v_prediction":
        predicted_images = signal * noisy_images - sigma * prediction
    elif scheduler.config.prediction_type == "sample":
        predicted_images = prediction
    else:
        predicted_images = (noisy_images - sigma * prediction) / signal
    fraction = (v + 1) / 2
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior_variance

    # 3. L_t. Both means are this factor times x_0 plus the same multiple of x_t, which cancels.
    difference = images - predicted_images
    log_ratio = log_posterior_variance - log_variance
    squared_distance = (x_0_factor * difference).square() * (-log_variance).exp()
    divergence = 0.5 * (log_ratio.exp() - 1 - log_ratio + squared_distance)

    # 4. L_0, where the mean is the predicted x_0. The bins of black and white reach to infinity; the normal
    # distribution function is taken by its approximation with tanh (https://huggingface.co/papers/1606.08415).
    def cdf(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    precision = (-0.5 * log_variance).exp()
    upper, lower = (cdf(precision * (difference + edge)) for edge in (1 / 255, -1 / 255))
    upper = torch.where(images > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(images < -0.999, torch.zeros_like(lower), lower)
    decoder_nll = -(upper - lower).clamp(min=1e-12).log()

    nats = torch.where(timesteps == 0, decoder_nll.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return nats / math.log(2)


def main(args: UnconditionalArguments) -> None:
    """Train, validate, save and, with `--push_to_hub`, publish a `DDPMPipeline`.

    Args:
        args ([`UnconditionalArguments`]): The arguments.

    Raises:
        ValueError: Model and images do not fit together, or the arguments are refused by [`TrainingRun`].
    """
    # 1. Seeds, data, model, noise schedule
    run = TrainingRun(args)
    columns = ["labels"] if args.class_conditional else []
    dataset = run.load_dataset("train", columns)
    resolution, channels = dataset.resolution, 1 if dataset.image_mode == "L" else 3
    num_classes = num_class_embeds = None
    if args.class_conditional:
        if dataset.labels is None:
            raise ValueError(
                "`class_conditional` is set, but the images have no labels: name their column in `label_column`, or "
                "sort the images of `train_data_dir` into one folder per class."
            )
        num_classes = len(dataset.label_names) if dataset.label_names else max(dataset.labels) + 1
        num_class_embeds = num_classes + (args.label_dropout > 0)  # the last one is the null class
    validation_images = validation_labels = None
    if args.validation_steps and args.validation_fraction != 0:
        validation = run.load_dataset("validation", columns)
        items = [validation[i] for i in range(min(256, len(validation)))]
        validation_images = torch.stack([item["images"] for item in items])
        if args.class_conditional:
            if validation.labels is None or max(validation.labels) >= num_classes:
                raise ValueError(
                    f"the held-out images have {'no labels' if validation.labels is None else 'other labels'}, but "
                    f"must have the {num_classes} classes of the training images: pass a `validation_fraction`, 0 for "
                    "none."
                )
            validation_labels = torch.tensor([item["labels"] for item in items])

    schedule = {
        "prediction_type": args.prediction_type,
        "num_train_timesteps": args.ddpm_num_steps,
        "beta_schedule": args.ddpm_beta_schedule,
    }
    schedule = {name: value for name, value in schedule.items() if value is not None}
    if args.pretrained_model_name_or_path is not None:
        pretrained = DDPMPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
        )
        unet = pretrained.unet
        has = "the U-Net of `pretrained_model_name_or_path` has"
        for name, allowed in (("in_channels", (channels,)), ("out_channels", (channels, 2 * channels))):
            if unet.config[name] not in allowed:
                raise ValueError(
                    f"{has} {name} {unet.config[name]}, but the images have {channels} channels: pass another "
                    "`image_mode`, or another model."
                )
        learn_variance = unet.config.out_channels == 2 * channels
        if args.learn_variance and not learn_variance:
            raise ValueError(
                f"{has} out_channels {channels}, but `learn_variance` needs {2 * channels}: leave it out, or choose a "
                "model with a learned variance."
            )
        if learn_variance and pretrained.scheduler.config.get("variance_type") == "learned":
            raise ValueError(
                f"{has} a variance of type 'learned', but only 'learned_range' can be trained: choose another model."
            )
        if unet.config.num_class_embeds != num_class_embeds:
            null = " and the null class of `label_dropout`" if args.label_dropout else ""
            needed = (
                f"{num_class_embeds} are needed, for {num_classes} classes{null}" if num_classes else "none are needed"
            )
            raise ValueError(
                f"{has} {unet.config.num_class_embeds or 'no'} class embeddings (num_class_embeds), but {needed}: "
                "change `class_conditional` or `label_dropout`, or choose another model or other data."
            )
        if learn_variance:
            schedule["variance_type"] = "learned_range"
        scheduler = DDPMScheduler.from_config(pretrained.scheduler.config, **schedule)
        unet.register_to_config(sample_size=resolution)
    else:
        learn_variance = args.learn_variance
        if learn_variance:
            schedule["variance_type"] = "learned_range"
        scheduler = DDPMScheduler(**schedule)
        if args.model_config_name_or_path is not None:
            config = UNet2DModel.load_config(
                args.model_config_name_or_path, revision=args.revision, cache_dir=args.cache_dir
            )
        else:
            config = default_unet_config(resolution)
        sizes = {
            "sample_size": resolution,
            "in_channels": channels,
            "out_channels": (1 + learn_variance) * channels,
            "class_embed_type": None,
            "num_class_embeds": num_class_embeds,
        }
        unet = UNet2DModel.from_config(config, **sizes)
    halvings = len(unet.config.block_out_channels) - 1
    if resolution % 2**halvings:
        raise ValueError(
            f"`resolution` is {resolution}, but the U-Net halves it {halvings} times: choose a multiple of "
            f"{2**halvings}, or a model with fewer blocks."
        )
    if num_classes and (untrained := sorted(set(range(num_classes)) - {dataset.labels[i] for i in dataset.indices})):
        logger.warning(f"no training image is of the classes {untrained[:20]}: the model will not learn to draw them.")
    num_train_timesteps = scheduler.config.num_train_timesteps

    # 2. Train
    run.prepare({"unet": unet}, dataset)
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            noise, timesteps = run.randn_like(images), run.randint(num_train_timesteps)
            labels = None
            if args.class_conditional:
                labels = batch["labels"]
                if args.label_dropout:  # algorithm 1 of the classifier-free guidance paper
                    labels = labels.masked_fill(run.randint(2**24) < args.label_dropout * 2**24, num_classes)
            noisy_images = scheduler.add_noise(images, noise, timesteps)
            losses = training_losses(
                scheduler,
                images,
                noise,
                noisy_images,
                run.model(noisy_images, timesteps, class_labels=labels).sample.float(),
                timesteps,
                vlb_weight=args.vlb_weight,
            )
            per_sample_loss = losses.pop("loss")
            run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
                metrics={name: value.mean() for name, value in losses.items()},
            )
        if run.validate_now:
            trained = run.trained()["unet"]
            if run.accelerator.is_main_process:
                if validation_images is not None:
                    loss = held_out_loss(
                        trained,
                        scheduler,
                        validation_images,
                        args.train_batch_size,
                        args.seed,
                        class_labels=validation_labels,
                        vlb_weight=args.vlb_weight,
                    )
                    run.log({"validation_loss": loss})
                samples = sample_images(
                    trained,
                    scheduler,
                    args.num_validation_images,
                    num_inference_steps=args.ddpm_num_inference_steps,
                    num_classes=num_classes,
                    generator=torch.Generator(trained.device).manual_seed(args.seed),
                )
                run.log_images("samples", samples)

    # 3. Save and publish
    base = args.pretrained_model_name_or_path
    loss_name = f"{scheduler.config.prediction_type} loss"
    training = {}
    if learn_variance:
        loss_name += f" + {args.vlb_weight:g} x bound"
        training["variance"] = f"learned, weight of the variational bound {args.vlb_weight:g}"
    if args.class_conditional:
        names = dataset.label_names or map(str, range(num_classes))
        training["classes"] = ", ".join(f"{i}: {name}" for i, name in enumerate(names))
        training["label dropout"] = f"{args.label_dropout:g}" + f", to {num_classes}" * (args.label_dropout > 0)
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
                    "metric_name": f"{loss_name}, {len(validation_images)} held out",
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
                **training,
                "seed": args.seed,
                "last training loss": round(metrics["train_loss"], 5),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(UnconditionalArguments))
