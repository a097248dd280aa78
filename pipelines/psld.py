r"""PSLD: posterior sampling with latent diffusion models.

*Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models*, Rout et al., NeurIPS
2023 (https://huggingface.co/papers/2307.00619). Every DDIM step on the latents is moved by two gradients: that of the
misfit between the known pixels and the image that the predicted clean latents decode to, and that of the distance
between these latents and the encoding of their image with the known pixels put in, which holds them where the
autoencoder is at home.

This file is complete in itself: scheduler, pipeline. Notation: `abar_t` is the cumulative product of
`alpha_t = 1 - beta_t`; timestep 0 is the least noisy level and -1 stands for clean latents, `abar = 1`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.utils.checkpoint
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.get_logger(__name__)

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})


# --------------------------------------------------------------------------------------------------------- scheduler


class PSLDScheduler(SchedulerMixin, ConfigMixin):
    r"""
    DDIM (https://huggingface.co/papers/2010.02502) on explicit moves from one timestep to another, with the noise
    levels of Stable Diffusion and without clipping.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`.
        beta_start (`float`, *optional*, defaults to 0.00085): First `beta` of the schedules that have one.
        beta_end (`float`, *optional*, defaults to 0.012): Last `beta` of the schedules that have one.
        beta_schedule (`str`, *optional*, defaults to `"scaled_linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*): The betas themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            What the U-Net predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        clip_sample (`bool`, *optional*, defaults to `False`): Whether predictions of the clean latents are clipped.
        clip_sample_range (`float`, *optional*, defaults to 1.0): The limit of that clip.
        thresholding (`bool`, *optional*, defaults to `False`):
            Dynamic thresholding (https://huggingface.co/papers/2205.11487, section 2.3) in place of the clip.
        dynamic_thresholding_ratio (`float`, *optional*, defaults to 0.995): Its quantile of absolute values.
        sample_max_value (`float`, *optional*, defaults to 1.0): Its largest threshold.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Refused if `True`.

    Raises:
        ValueError: For an unknown schedule or prediction type, and for schedules that end in pure noise.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.psld import PSLDScheduler

    >>> scheduler = PSLDScheduler()
    >>> scheduler.set_timesteps(4)
    >>> scheduler.trajectory
    [(999, 666), (666, 333), (333, 0)]

    ```
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}, but must be 'epsilon', 'sample' or 'v_prediction'."
            )
        if trained_betas is not None:
            betas = np.asarray(trained_betas, dtype=np.float64)
        elif beta_schedule == "linear":
            betas = np.linspace(beta_start, beta_end, num_train_timesteps)
        elif beta_schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        elif beta_schedule == "squaredcos_cap_v2":
            # abar(u) = cos^2((u + 0.008) / 1.008 pi / 2), https://huggingface.co/papers/2102.09672, eq. 17
            time = np.arange(num_train_timesteps + 1) / num_train_timesteps
            alpha_bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        elif beta_schedule == "sigmoid":
            betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
        else:
            raise ValueError(
                f"`beta_schedule` is {beta_schedule!r}, but must be 'linear', 'scaled_linear', 'squaredcos_cap_v2' or "
                "'sigmoid'; give any other schedule as `trained_betas`."
            )
        if len(betas) != num_train_timesteps or not ((betas > 0) & (betas < 1)).all() or rescale_betas_zero_snr:
            raise ValueError(
                f"the schedule has {len(betas)} betas in [{betas.min():.4g}, {betas.max():.4g}] and "
                f"`rescale_betas_zero_snr`={rescale_betas_zero_snr}, but this scheduler needs `num_train_timesteps`="
                f"{num_train_timesteps} betas inside (0, 1) and `rescale_betas_zero_snr=False`: at pure noise no "
                "noise prediction determines an image."
            )
        alphas_cumprod = np.cumprod(1 - betas)
        self.betas = torch.from_numpy(betas)
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod)
        self._levels = [*alphas_cumprod.tolist(), 1.0]  # the last entry makes timestep -1 the clean image
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.trajectory: list[tuple[int, int]] = []

    # Copied from pipelines.copaint.CoPaintScheduler.__len__
    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # Copied from pipelines.copaint.CoPaintScheduler.set_timesteps
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        jump_length: int = 1,
        jump_n_sample: int = 1,
        timesteps: list[int] | None = None,
    ) -> None:
        r"""
        Lays out the moves: `trajectory`, a list of pairs `(timestep, next_timestep)`, and `timesteps` (int64), the
        first of each pair. The levels are `round(i (T - 1) / (N - 1))`, which include both ends; as in the authors'
        respacing the stride is summed up, which decides how halves are rounded. The list ends at the least noisy
        level, not in the clean image.

        With `jump_n_sample > 1` it travels in time as in RePaint (https://huggingface.co/papers/2201.09865): each time
        it comes to one of the places 0, `jump_length`, 2 `jump_length`, ... below `N - jump_length` (counted from the
        clean end), it goes `jump_length` levels back and down again, until the levels above that place have been
        walked through `jump_n_sample` times.

        Args:
            num_inference_steps (`int`, *optional*): Number `N` of levels, 2 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.
            jump_length (`int`, *optional*, defaults to 1): Levels per jump, at least 1.
            jump_n_sample (`int`, *optional*, defaults to 1): Passes through each stretch, at least 1; 1 for no jumps.
            timesteps (`list[int]`, *optional*): The levels themselves, falling, in place of `num_inference_steps`.

        Raises:
            ValueError: For numbers out of range, timesteps that do not fall, or both or none of
                `num_inference_steps` and `timesteps`.
        """
        limit = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps} and `timesteps` is {timesteps}: give one of the two."
            )
        if timesteps is None:
            if not isinstance(num_inference_steps, int) or not 2 <= num_inference_steps <= limit:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but the schedule has {limit} timesteps: choose "
                    f"a whole number from 2 to {limit}."
                )
            stride = (limit - 1) / (num_inference_steps - 1)
            places = itertools.accumulate(itertools.repeat(stride, num_inference_steps - 1), initial=0.0)
            levels = [round(place) for place in places][::-1]
        else:
            levels = [int(timestep) for timestep in timesteps]
            falls = all(a > b for a, b in itertools.pairwise(levels))
            if len(levels) < 2 or not falls or not 0 <= levels[-1] <= levels[0] < limit:
                raise ValueError(
                    f"`timesteps` is {levels}, but must be at least two timesteps from {limit - 1} to 0, falling."
                )
        if any(not isinstance(number, int) or number < 1 for number in (jump_length, jump_n_sample)):
            raise ValueError(
                f"`jump_length` is {jump_length} and `jump_n_sample` is {jump_n_sample}, but both must be whole "
                "numbers from 1."
            )
        left = dict.fromkeys(range(0, len(levels) - jump_length, jump_length), jump_n_sample - 1)
        place = len(levels) - 1  # counted from the clean end
        places = [place]
        while place > 0:
            place -= 1
            places.append(place)
            if left.get(place, 0) > 0:
                left[place] -= 1
                places += range(place + 1, place + jump_length + 1)
                place += jump_length
        visited = [levels[-1 - place] for place in places]
        self.num_inference_steps = len(levels)
        self.trajectory = list(itertools.pairwise(visited))
        self.timesteps = torch.tensor(visited[:-1], dtype=torch.int64, device=device)

    # Copied from pipelines.copaint.CoPaintScheduler.scale_model_input
    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is; for use in place of other schedulers."""
        return sample

    # Copied from pipelines.copaint.CoPaintScheduler.add_noise
    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        r"""
        `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`.

        Args:
            original_samples (`torch.Tensor`): `x_0`, shape `(batch, channels, height, width)`.
            noise (`torch.Tensor`): `eps`, same shape.
            timesteps (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`; -1 gives `x_0` itself.
        """
        if isinstance(timesteps, torch.Tensor) and timesteps.ndim:
            levels = torch.tensor(self._levels, dtype=torch.float64)[timesteps.cpu()]
            levels = levels.reshape(-1, *(1,) * (original_samples.ndim - 1))
            signal, sigma = (table.to(original_samples) for table in (levels.sqrt(), (1 - levels).sqrt()))
        else:
            level = self._levels[int(timesteps)]
            signal, sigma = level**0.5, (1 - level) ** 0.5
        return signal * original_samples + sigma * noise

    # Copied from pipelines.copaint.CoPaintScheduler.predict
    def predict(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The clean image and the noise that the model sees in `sample`:
        `x_0 = clip((x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t))`, and `eps` as predicted, not anew from the clipped
        `x_0`. Differentiable in both arguments.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts, by `prediction_type`; shape of `sample`.
            timestep (`int`): The level of `sample`.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `pred_original_sample` and `noise_pred`, of the shape of `sample`.
        """
        level = self._levels[int(timestep)]
        signal, sigma = level**0.5, (1 - level) ** 0.5
        if self.config.prediction_type == "epsilon":
            pred_original_sample, noise_pred = (sample - sigma * model_output) / signal, model_output
        elif self.config.prediction_type == "sample":
            pred_original_sample, noise_pred = model_output, (sample - signal * model_output) / sigma
        else:  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
            pred_original_sample = signal * sample - sigma * model_output
            noise_pred = signal * model_output + sigma * sample
        if self.config.thresholding:
            magnitudes = pred_original_sample.flatten(1).abs()
            ratio, largest = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            threshold = torch.quantile(magnitudes, ratio, dim=1).clamp(1, max(1, largest))
            threshold = threshold.reshape(-1, *(1,) * (sample.ndim - 1))
            pred_original_sample = torch.minimum(torch.maximum(pred_original_sample, -threshold), threshold)
            pred_original_sample = pred_original_sample / threshold
        elif self.config.clip_sample:
            limit = self.config.clip_sample_range
            pred_original_sample = pred_original_sample.clamp(-limit, limit)
        return pred_original_sample, noise_pred

    # Copied from pipelines.copaint.CoPaintScheduler.step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        next_timestep: int,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One DDIM step (equation 12 of https://huggingface.co/papers/2010.02502) to any less noisy level:
        `sqrt(abar_next) x_0 + sqrt(1 - abar_next - s^2) eps + s z`, with
        `s = eta sqrt((1 - abar_next) / (1 - abar_t)) sqrt(1 - abar_t / abar_next)`.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts at `timestep`; shape of `sample`.
            timestep (`int`): The level of `sample`.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            next_timestep (`int`): The level to go to, below `timestep`; -1 for the clean image.
            eta (`float`, *optional*, defaults to 0.0): 0 is deterministic and draws nothing, 1 is ancestral.
            generator (`torch.Generator` or a list of them, *optional*): For `z`.
            variance_noise (`torch.Tensor`, *optional*): `z` itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`DDIMSchedulerOutput`].

        Raises:
            ValueError: If `next_timestep` is not below `timestep`.
        """
        if next_timestep >= timestep:
            raise ValueError(
                f"`next_timestep` is {next_timestep}, but a step from {timestep} must lead to less noise: give one "
                "below it."
            )
        pred_original_sample, noise_pred = self.predict(model_output, timestep, sample)
        level, next_level = self._levels[int(timestep)], self._levels[int(next_timestep)]
        variance = eta**2 * (1 - next_level) / (1 - level) * (1 - level / next_level)
        prev_sample = next_level**0.5 * pred_original_sample
        prev_sample = prev_sample + max(1 - next_level - variance, 0.0) ** 0.5 * noise_pred
        if variance > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            prev_sample = prev_sample + variance**0.5 * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


# ---------------------------------------------------------------------------------------------------------- latents


# Copied from pipelines.copaint_stable_diffusion.encode
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    r"""
    Latents of images: the mode of the encoder's distribution, as the U-Net takes them.

    Args:
        vae ([`AutoencoderKL`]): The autoencoder.
        images (`torch.Tensor`): Values in [-1, 1], shape `(batch, 3, height, width)`.

    Returns:
        `torch.Tensor`: Shape `(batch, latent_channels, h, w)`, of the dtype of `images`.
    """
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mode().to(images.dtype)
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


# Copied from pipelines.copaint_stable_diffusion.decode
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    r"""
    Images of latents.

    Args:
        vae ([`AutoencoderKL`]): The autoencoder.
        latents (`torch.Tensor`): As the U-Net gives them, shape `(batch, latent_channels, h, w)`.

    Returns:
        `torch.Tensor`: Values around [-1, 1], shape `(batch, 3, height, width)`, of the dtype of `latents`.
    """
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(scaled.to(vae.dtype)).sample.to(latents.dtype)


# ------------------------------------------------------------------------------------------------------------ inputs


# Copied from pipelines.copaint.pil_to_array
def pil_to_array(image: Image.Image, channels: int) -> np.ndarray:
    r"""
    The pixels of a PIL image: upright (EXIF orientation), with transparency laid on white, 16-bit grey in full.

    Args:
        image (`PIL.Image.Image`): The image, of any mode.
        channels (`int`): 1 for grey, 3 for RGB.

    Returns:
        `np.ndarray`: float32 of shape `(height, width, channels)`, values in [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # numbers, as in an array
        return np.repeat(np.asarray(image, dtype=np.float32)[..., None], channels, axis=-1)
    if image.mode.startswith("I"):  # 16 bits, whatever Pillow calls them
        pixels = np.asarray(image, dtype=np.float32) / 65535
        return np.repeat(pixels[..., None], channels, axis=-1)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return pixels[..., None] if channels == 1 else pixels


# Copied from pipelines.copaint.to_batch
def to_batch(
    image: Image.Image | np.ndarray | torch.Tensor | list, channels: int, name: str = "image"
) -> torch.Tensor:
    r"""
    One image or several, as they come, in one tensor. PIL images become grey or RGB as [`pil_to_array`] says, booleans
    0 and 1.

    Args:
        image: PIL images, arrays of shape `(height, width, channels)` or `(batch, height, width, channels)`, tensors
            of shape `(channels, height, width)` or `(batch, channels, height, width)`, or a list of them, with values
            in [0, 1]. With `channels` 1, arrays and tensors may also be `(height, width)`.
        channels (`int`): How many there must be.
        name (`str`, *optional*, defaults to `"image"`): The argument to name in errors.

    Returns:
        `torch.Tensor`: Shape `(batch, channels, height, width)`, values in [0, 1], float32, or float64 if it was.

    Raises:
        TypeError: For other types, and for integers, whose range cannot be known.
        ValueError: For other shapes, sizes that differ, no image at all, and values that are not in [0, 1].
    """
    tensors = []
    for item in image if isinstance(image, list | tuple) else [image]:
        if isinstance(item, Image.Image):
            item = pil_to_array(item, channels)
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(np.ascontiguousarray(item))
            if item.ndim > 2:
                item = item.movedim(-1, -3)
        if not isinstance(item, torch.Tensor):
            raise TypeError(f"`{name}` holds a {type(item).__name__}: give PIL images, arrays or tensors.")
        if item.dtype == torch.bool:
            item = item.float()
        if not item.is_floating_point():
            raise TypeError(f"`{name}` has dtype {item.dtype}, but values must be floats in [0, 1]: divide by 255.")
        if item.ndim == 2 and channels == 1:
            item = item[None]
        if item.ndim not in (3, 4) or item.shape[-3] != channels:
            raise ValueError(
                f"`{name}` has shape {tuple(item.shape)} (as (..., channels, height, width)), but must have "
                f"{channels} channels: convert it."
            )
        item = item if item.ndim == 4 else item[None]
        tensors.append(item.to(torch.promote_types(item.dtype, torch.float32)))
    sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
    if len(sizes) > 1:
        raise ValueError(f"`{name}` has images of (height, width) {sorted(sizes)}, but one call needs one size.")
    if sum(len(tensor) for tensor in tensors) == 0 or 0 in next(iter(sizes)):
        raise ValueError(f"`{name}` is empty: give at least one image.")
    batch = torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
    low, high = batch.min().item(), batch.max().item()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(
            f"`{name}` has values in [{low:.4g}, {high:.4g}], but they must be in [0, 1]: rescale them, for images in "
            "[-1, 1] by `image / 2 + 0.5`."
        )
    return batch


# Copied from pipelines.copaint.prepare_keep_mask
def prepare_keep_mask(
    mask_image: Image.Image | np.ndarray | torch.Tensor | list, batch_size: int, height: int, width: int
) -> torch.Tensor:
    r"""
    The mask of known pixels from one in diffusers' convention, where white is repainted. Grey is split at 0.5. A mask
    of another size, if it has the same proportions, is resized: when it shrinks, a pixel is repainted if any white
    falls into it.

    Args:
        mask_image: As `image` in [`to_batch`], one for all images or one each; 1 (white) = repaint.
        batch_size (`int`): Number of images.
        height (`int`): Height of the images in pixels.
        width (`int`): Width of the images in pixels.

    Returns:
        `torch.Tensor`: 1 = known, 0 = to be painted, float32 of shape `(batch_size, 1, height, width)`.

    Raises:
        TypeError: As [`to_batch`].
        ValueError: As [`to_batch`]; for a mask of other proportions; for a number of masks that does not fit.
    """
    mask = to_batch(mask_image, 1, "mask_image")
    if mask.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`mask_image` has {mask.shape[0]} masks for {batch_size} images: give one for all, or one each."
        )
    if mask.shape[-2] * width != mask.shape[-1] * height:
        raise ValueError(
            f"`mask_image` has (height, width) {tuple(mask.shape[-2:])}, but the images have {(height, width)}: they "
            "must agree in size, or at least in proportions."
        )
    keep = (mask < 0.5).float()
    if keep.shape[-2] > height:
        keep = 1 - torch.nn.functional.adaptive_max_pool2d(1 - keep, (height, width))
    else:
        keep = torch.nn.functional.interpolate(keep, (height, width), mode="nearest-exact")
    return keep.expand(batch_size, -1, -1, -1)


# ---------------------------------------------------------------------------------------------------------- pipeline


@dataclass
class PSLDPipelineOutput(BaseOutput):
    """
    Output of [`PSLDPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` the latents.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class PSLDPipeline(HubMixin, DiffusionPipeline):
    r"""
    Fills holes of any shape in images by Stable Diffusion with posterior sampling
    (https://huggingface.co/papers/2307.00619, algorithm 2): `z_next = DDIM(z_t) - grad [omega ||m (D(z_0) - y)|| +
    gamma ||E(m y + (1 - m) D(z_0)) - z_0||]`, with the gradient in `z_t` through U-Net, decoder and encoder, and
    Euclidean norms over one image each.

    There is no safety checker here: run one on the results where you need it.

    Args:
        vae ([`AutoencoderKL`]): Turns images into latents and back.
        text_encoder (`CLIPTextModel`): Encodes prompts.
        tokenizer (`CLIPTokenizer`): Cuts prompts into tokens.
        unet ([`UNet2DConditionModel`]): Denoises latents; not one that was trained to inpaint, with 9 input channels.
        scheduler ([`PSLDScheduler`] or another): A stock scheduler is converted.

    Raises:
        ValueError: If U-Net, autoencoder and scheduler are of kinds that do not fit.
    """

    # The U-Net last: the gradient goes back through it after the decoder has run.
    model_cpu_offload_seq = "text_encoder->vae->unet"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: PSLDScheduler | SchedulerMixin,
    ) -> None:
        super().__init__()
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"`unet` has {unet.config.in_channels} input channels, but `vae` has {vae.config.latent_channels} "
                "latent channels: U-Nets that were trained to inpaint take mask and image besides; use "
                "`StableDiffusionInpaintPipeline` for those, and a text-to-image model here."
            )
        if unet.config.out_channels != unet.config.in_channels:
            raise ValueError(
                f"`unet` has {unet.config.in_channels} input and {unet.config.out_channels} output channels: it must "
                "have as many outputs as inputs."
            )
        if unet.config.get("addition_embed_type") is not None or unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "`unet` needs conditions beside the prompt (`addition_embed_type` of Stable Diffusion XL, or "
                "`time_cond_proj_dim` of consistency models): take a model of Stable Diffusion 1 or 2."
            )
        width = None if text_encoder is None else text_encoder.config.hidden_size
        if width not in (None, unet.config.cross_attention_dim):
            raise ValueError(
                f"`text_encoder` gives {width} channels, but `unet` takes {unet.config.cross_attention_dim} "
                "(`cross_attention_dim`): they must come from the same model."
            )
        if all(base.__name__ != "PSLDScheduler" for base in type(scheduler).__mro__):
            off = {"clip_sample": False, "thresholding": False}  # meant for pixels
            stock = scheduler
            # Without that entry diffusers would put this class's defaults in place of the stock scheduler's.
            config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
            scheduler = PSLDScheduler.from_config(config, **off)
            check_schedule(stock, scheduler)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    # -- inputs

    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory: only the networks compute in it.
        return torch.promote_types(self.unet.dtype, torch.float32)

    # Copied from pipelines.copaint.CoPaintPipeline._prepare_latents
    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for a batch of {shape[0]}: give one or {shape[0]}."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._state_dtype)
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"`latents` is a {type(latents).__name__}, but must be a `torch.Tensor`.")
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but this call needs {shape}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` has values that are not finite.")
        return latents.to(self._execution_device, self._state_dtype)

    # Copied from pipelines.copaint.CoPaintPipeline._check_output
    def _check_output(self, output_type: str, tensor_inputs: list[str]) -> None:
        own = self._get_signature_types()["scheduler"][0].__name__
        if all(base.__name__ != own for base in type(self.scheduler).__mro__):
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, but this pipeline steps by a {own}: make it anew, "
                "`type(pipe)(**{**pipe.components, 'scheduler': scheduler})`, which converts it."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )

    # Copied from pipelines.copaint_stable_diffusion.CoPaintStableDiffusionPipeline._encode_prompt
    def _encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        longest = max(map(len, self.tokenizer(prompts).input_ids))
        if longest > self.tokenizer.model_max_length:
            logger.warning(
                f"`prompt` has {longest} tokens, but CLIP reads {self.tokenizer.model_max_length}: the rest is cut "
                "off."
            )
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]

    # Copied from pipelines.copaint_stable_diffusion.CoPaintStableDiffusionPipeline._prepare_prompts
    def _prepare_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        guided: bool,
        count: int,
    ) -> Callable[[], torch.Tensor]:
        """Checks; gives what encodes: one row of embeddings per image, with guidance twice as many, negative first."""
        rows = {}
        for name, text, embeds in (
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
            ("prompt", prompt, prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"`{name}` and `{name}_embeds` were both given: give one of them.")
            if text is None and embeds is None:
                if name == "prompt":
                    raise ValueError("`prompt` is missing: give one (it may be empty), or `prompt_embeds`.")
                text = ""
            texts = [text] if isinstance(text, str) else text
            if embeds is None and not (isinstance(texts, list | tuple) and all(isinstance(x, str) for x in texts)):
                raise TypeError(f"`{name}` is {text!r}, but must be a `str` or a list of them.")
            if embeds is None and self.text_encoder is None and (name == "prompt" or guided):
                raise ValueError(f"`{name}_embeds` are missing: this pipeline has no `text_encoder`.")
            width = self.unet.config.cross_attention_dim
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[-1] != width):
                raise ValueError(
                    f"`{name}_embeds` has shape {tuple(embeds.shape)}, but must be (batch, tokens, {width})."
                )
            number = len(texts) if embeds is None else embeds.shape[0]
            if number not in (1, count):
                raise ValueError(f"`{name}` has {number} entries for {count} images: give one for all, or one each.")
            rows[name] = (texts, embeds)
        if not guided:
            del rows["negative_prompt"]
        lengths = {
            name: self.tokenizer.model_max_length if embeds is None else embeds.shape[1]
            for name, (_, embeds) in rows.items()
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"prompts have {lengths} tokens, but must have the same number: pad the embeddings.")

        def embed() -> torch.Tensor:
            parts = []
            for texts, embeds in rows.values():
                part = self._encode_prompt(texts) if embeds is None else embeds.to(self._execution_device)
                parts.append(part.expand(count, -1, -1) if part.shape[0] == 1 else part)
            return torch.cat(parts)

        return embed

    # Copied from pipelines.copaint_stable_diffusion.CoPaintStableDiffusionPipeline._predict
    def _predict(
        self, sample: torch.Tensor, timestep: int, condition: tuple[torch.Tensor, float]
    ) -> tuple[torch.Tensor, None]:
        """What the U-Net predicts, guided: `eps(-) + s (eps(+) - eps(-))`, both in one batch; no learned variance."""
        prompt_embeds, guidance_scale = condition
        guided = prompt_embeds.shape[0] == 2 * sample.shape[0]
        inputs = torch.cat([sample, sample]) if guided else sample
        output = self.unet(
            inputs.to(self.unet.dtype), timestep, encoder_hidden_states=prompt_embeds.to(self.unet.dtype)
        ).sample.to(sample.dtype)
        if guided:
            negative, positive = output.chunk(2)
            output = negative + guidance_scale * (positive - negative)
        return output, None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | np.ndarray | torch.Tensor | list = None,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list = None,
        num_inference_steps: int = 1000,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        omega: float = 0.1,
        gamma: float = 0.01,
        eta: float = 0.0,
        paste_known: bool = True,
        feather: int = 8,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["PSLDPipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> PSLDPipelineOutput | tuple:
        r"""
        Fills the white parts of the mask by what the prompt says.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to see, one for all images or one each.
            image: One image or several, as PIL images, or arrays or tensors with values in [0, 1]; height and width
                must be multiples of what autoencoder and U-Net halve them by (64 for Stable Diffusion).
            mask_image: White (1) is filled, black (0) is kept; one mask for all images or one each, of the images'
                size or proportions.
            num_inference_steps (`int`, *optional*, defaults to 1000): Number of levels.
            guidance_scale (`float`, *optional*, defaults to 7.5):
                `s` of classifier-free guidance (https://huggingface.co/papers/2207.12598); 1 and below turn it off.
            negative_prompt (`str` or `list[str]`, *optional*): What not to see.
            omega (`float`, *optional*, defaults to 0.1): Weight of the misfit of the known pixels.
            gamma (`float`, *optional*, defaults to 0.01):
                Weight of the gluing; the authors take 0.01 with Stable Diffusion and 0.1 with a model of faces.
            eta (`float`, *optional*, defaults to 0.0): 0 for deterministic steps, 1 for ancestral ones.
            paste_known (`bool`, *optional*, defaults to `True`): Whether known pixels are put in at the end.
            feather (`int`, *optional*, defaults to 8):
                Width in pixels of the seam, inside the known part, over which original and result are mixed by the
                distance to the hole: known parts that are thinner stay mixed. 0 keeps every known pixel exactly.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Fills per image.
            latents (`torch.Tensor`, *optional*): Noise to start from, in the shape of the latents.
            prompt_embeds (`torch.Tensor`, *optional*): In place of `prompt`, shape `(batch, tokens, channels)`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): In place of `negative_prompt`.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per result, which then
                depends on no other.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (values in [0, 1]), or `"latent"` (the latents; nothing is pasted).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`PSLDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step; it may return
                `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` and `"pred_original_sample"` is in `callback_kwargs`.

        Raises:
            TypeError: For images and masks of a type that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs; for
                latents that are not finite.
            RuntimeError: Within `torch.inference_mode`, where no gradient can be had.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import PSLDPipeline

        >>> pipe = PSLDPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64)
        >>> mask[:, 16:48, 16:48] = 1  # white is painted
        >>> images = pipe("a lake", image, mask, num_inference_steps=4, output_type="pt").images
        >>> images.shape
        torch.Size([1, 3, 64, 64])

        ```
        """
        # 1. Check inputs
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "this pipeline differentiates, which `torch.inference_mode` rules out: call it without, it needs no "
                "`torch.no_grad` either."
            )
        if image is None or mask_image is None:
            raise ValueError("`image` or `mask_image` is missing: this pipeline fills the white parts of an image.")
        # name -> value, type, least and largest value
        limits = {
            "guidance_scale": (guidance_scale, float, 0, math.inf),
            "omega": (omega, float, 0, math.inf),
            "gamma": (gamma, float, 0, math.inf),
            "eta": (eta, float, 0, 1),
            "feather": (feather, int, 0, math.inf),
            "num_images_per_prompt": (num_images_per_prompt, int, 1, math.inf),
        }
        for name, (value, kind, low, high) in limits.items():
            if not isinstance(value, (int, float) if kind is float else int):
                raise TypeError(f"`{name}` is {value!r}, but must be {'a number' if kind is float else 'an `int`'}.")
            if not low <= value <= high or value == math.inf:
                limit = "." if high == math.inf else f" and at most {high}."
                raise ValueError(f"`{name}` is {value}, but must be finite, at least {low}{limit}")
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        images = 2 * to_batch(image, self.vae.config.in_channels).to(self._execution_device, self._state_dtype) - 1
        count, _, height, width = images.shape
        reduction = 2 ** (len(self.vae.config.block_out_channels) - 1)
        factor = reduction * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`image` has (height, width) {(height, width)}, but both must be multiples of {factor}: resize or "
                "pad it."
            )
        keep_mask = prepare_keep_mask(mask_image, count, height, width).to(images)
        guided = guidance_scale > 1
        embed = self._prepare_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guided, count)
        images, keep_mask = (x.repeat_interleave(num_images_per_prompt, dim=0) for x in (images, keep_mask))
        batch_size = count * num_images_per_prompt
        self.scheduler.set_timesteps(num_inference_steps)
        trajectory = self.scheduler.trajectory
        shape = (batch_size, self.vae.config.latent_channels, height // reduction, width // reduction)
        latents = self._prepare_latents(latents, shape, generator)

        # 2. Encode prompts
        condition = embed().repeat_interleave(num_images_per_prompt, dim=0), guidance_scale

        # 3. From noise to the least noisy level
        pred_original_sample = torch.zeros_like(latents)
        for step, (timestep, next_timestep) in enumerate(self.progress_bar(trajectory)):
            with torch.enable_grad():
                latents = latents.detach().requires_grad_()
                model_output, _ = self._predict(latents, timestep, condition)
                estimate, _ = self.scheduler.predict(model_output, timestep, latents)
                decoded = decode(self.vae, estimate)
                misfit = torch.linalg.vector_norm((keep_mask * (decoded - images)).flatten(1), dim=1)
                again = encode(self.vae, keep_mask * images + (1 - keep_mask) * decoded)
                gluing = torch.linalg.vector_norm((again - estimate).flatten(1), dim=1)
                error = omega * misfit + gamma * gluing
            [gradient] = torch.autograd.grad(error, latents, torch.ones_like(error))
            latents, pred_original_sample = self.scheduler.step(
                model_output.detach(),
                timestep,
                latents.detach(),
                next_timestep,
                eta=eta,
                generator=generator,
                return_dict=False,
            )
            latents = latents - gradient
            if not latents.isfinite().all():
                raise ValueError(
                    f"the latents are not finite at step {step}, timestep {timestep}: choose smaller `omega` and "
                    "`gamma`, or run the networks in float32."
                )
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)

        # 4. Clean latents, and their image
        least = trajectory[-1][1]
        model_output, _ = self._predict(latents, least, condition)
        latents, _ = self.scheduler.predict(model_output, least, latents)
        if output_type == "latent":
            result = latents
        else:
            result = decode(self.vae, latents)
            if paste_known:
                # A ramp from 1 / (feather + 1) beside the hole to 1 at `feather` + 1 pixels from it
                weights = inside = keep_mask
                for _ in range(feather):
                    inside = 1 - torch.nn.functional.max_pool2d(1 - inside, 3, stride=1, padding=1)
                    weights = weights + inside
                weights = weights / (feather + 1)
                result = weights * images + (1 - weights) * result
        if not result.isfinite().all():
            raise ValueError("the result is not finite: run the networks in float32, the autoencoder above all.")
        if output_type != "latent":
            result = self.image_processor.postprocess(result, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        return PSLDPipelineOutput(images=result)


# Copied from pipelines.copaint.check_schedule
def check_schedule(stock: SchedulerMixin, converted: SchedulerMixin) -> None:
    r"""
    Raises an error if a stock scheduler was converted to one of other noise levels.

    Args:
        stock ([`SchedulerMixin`]): The scheduler of a checkpoint.
        converted ([`SchedulerMixin`]): What its configuration gave.

    Raises:
        ValueError: If `stock` has no `alphas_cumprod`, or others: a model that was trained on it would be misled.
    """
    levels = getattr(stock, "alphas_cumprod", None)
    same_length = levels is not None and len(levels) == len(converted.alphas_cumprod)
    if not same_length or (levels.double().cpu() - converted.alphas_cumprod).abs().max() > 1e-4:
        raise ValueError(
            f"`scheduler` is a {type(stock).__name__}, whose noise levels are not those of a DDPM with the betas in "
            "its configuration: give the scheduler that the model was trained with, such as a `DDPMScheduler`."
        )
