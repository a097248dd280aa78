r"""DDRM: restoration in the spectral space of the measurement, in few steps.

*Denoising Diffusion Restoration Models*, Kawar et al., NeurIPS 2022 (https://huggingface.co/papers/2201.11793). What
the measurement determines of an image is drawn around the measured values, with less and less noise; the rest is
denoised as in DDIM. All singular values of the two measurements here are equal, so that no singular vectors are
needed: `A^+ A` splits an image into the two parts.

This file is complete in itself: scheduler, measurement operators, pipeline. Notation: `abar_t` is the cumulative
product of `alpha_t = 1 - beta_t`; timestep 0 is the least noisy level and -1 stands for the clean image, `abar = 1`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})


# --------------------------------------------------------------------------------------------------------- scheduler


class DDRMScheduler(SchedulerMixin, ConfigMixin):
    r"""
    DDRM's steps on explicit moves from one timestep to another, by float64 levels. In the paper's variance-exploding
    form `x / sqrt(abar_t)`, a level's noise is `sigma_t = sqrt((1 - abar_t) / abar_t)`.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`.
        beta_start (`float`, *optional*, defaults to 1e-4): First `beta` of the schedules that have one.
        beta_end (`float`, *optional*, defaults to 0.02): Last `beta` of the schedules that have one.
        beta_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*): The betas themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            What the U-Net predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        clip_sample (`bool`, *optional*, defaults to `False`):
            Whether predictions of the clean image are clipped; not in the paper, and switched off where a stock
            scheduler is converted.
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
    >>> from diffusers_ext import DDRMScheduler

    >>> scheduler = DDRMScheduler()
    >>> scheduler.set_timesteps(4)
    >>> scheduler.trajectory
    [(750, 500), (500, 250), (250, 0), (0, -1)]

    ```
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
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

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
    ) -> None:
        r"""
        Lays out the moves: `trajectory`, a list of pairs `(timestep, next_timestep)`, and `timesteps` (int64), the
        first of each pair. The levels are 0, `T // N`, 2 `T // N`, ... (the authors' spacing) and, at the end, the
        clean image (-1).

        Args:
            num_inference_steps (`int`): `N`, 1 to `num_train_timesteps`. Where it does not divide `T`, some more
                levels.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.

        Raises:
            ValueError: For numbers out of range.
        """
        limit = self.config.num_train_timesteps
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= limit:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but must be a whole number from 1 to {limit}, the "
                "schedule's timesteps."
            )
        levels = list(range(0, limit, limit // num_inference_steps))[::-1]
        self.num_inference_steps = num_inference_steps
        self.trajectory = list(itertools.pairwise([*levels, -1]))
        self.timesteps = torch.tensor(levels, dtype=torch.int64, device=device)

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

    def initialize(
        self, noise: torch.Tensor, known: torch.Tensor, operator: object, timestep: int, measurement_noise: float = 0.0
    ) -> torch.Tensor:
        r"""
        The first sample (equation 6): around the measured values where there are any, pure noise elsewhere.

        Args:
            noise (`torch.Tensor`): Standard normal, shape `(batch, channels, height, width)`.
            known (`torch.Tensor`): `A^+ y`, same shape.
            operator ([`MaskOperator`] or [`AveragePoolOperator`]): `A`.
            timestep (`int`): The noisiest level.
            measurement_noise (`float`, *optional*, defaults to 0.0): Standard deviation of the noise in `A^+ y`.

        Returns:
            `torch.Tensor`: The sample, divided by its standard deviation as in the authors' code; same shape.
        """
        sigma = ((1 - self._levels[timestep]) / self._levels[timestep]) ** 0.5
        determined = operator.pseudo_inverse(operator.forward(noise))
        return noise - determined + max(1 - (measurement_noise / sigma) ** 2, 0.0) ** 0.5 * determined + known / sigma

    def step(
        self,
        pred_original_sample: torch.Tensor,
        noise_pred: torch.Tensor,
        known: torch.Tensor,
        operator: object,
        next_timestep: int,
        eta: float = 0.85,
        eta_b: float = 1.0,
        measurement_noise: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        To the next level (equations 7 and 8). With `s` for `sigma_next` and `s_y` for `measurement_noise`, the part
        that the measurement says nothing about becomes `x_0 + s (sqrt(1 - eta^2) eps + eta z)`; the other part `(1 -
        eta_b) x_0 + eta_b A^+ y + sqrt(s^2 - s_y^2 eta_b^2) z` where `s >= s_y`, and otherwise `x_0 + s (sqrt(1 -
        eta^2) (A^+ y - x_0) / s_y + eta z)`. The step to the clean image keeps `x_0`.

        Args:
            pred_original_sample (`torch.Tensor`): `x_0`, shape `(batch, channels, height, width)`.
            noise_pred (`torch.Tensor`): `eps`, same shape.
            known (`torch.Tensor`): `A^+ y`, same shape.
            operator ([`MaskOperator`] or [`AveragePoolOperator`]): `A`.
            next_timestep (`int`): The level to go to; -1 for the clean image.
            eta (`float`, *optional*, defaults to 0.85): Share of new noise where nothing is measured, 0 to 1.
            eta_b (`float`, *optional*, defaults to 1.0): Weight of the measured values, 0 to 1.
            measurement_noise (`float`, *optional*, defaults to 0.0): Standard deviation of the noise in `A^+ y`.
            generator (`torch.Generator` or a list of them, *optional*): For `z`.
            variance_noise (`torch.Tensor`, *optional*): `z` itself, same shape.

        Returns:
            `torch.Tensor`: The sample at the next level, same shape.
        """
        level = self._levels[int(next_timestep)]
        sigma = ((1 - level) / level) ** 0.5
        if sigma == 0:
            return pred_original_sample
        if variance_noise is None:
            shape, device, dtype = pred_original_sample.shape, pred_original_sample.device, pred_original_sample.dtype
            variance_noise = randn_tensor(shape, generator, device, dtype)
        free = pred_original_sample + sigma * ((1 - eta**2) ** 0.5 * noise_pred + eta * variance_noise)
        if sigma >= measurement_noise:
            measured = (1 - eta_b) * pred_original_sample + eta_b * known
            measured = measured + (sigma**2 - (measurement_noise * eta_b) ** 2) ** 0.5 * variance_noise
        else:
            towards = (known - pred_original_sample) / measurement_noise
            measured = pred_original_sample + sigma * ((1 - eta**2) ** 0.5 * towards + eta * variance_noise)
        return level**0.5 * (free + operator.pseudo_inverse(operator.forward(measured - free)))


# --------------------------------------------------------------------------------------------- measurement operators


# Copied from pipelines.copaint.MaskOperator
class MaskOperator:
    r"""
    What is known of an image with a hole: `A x = m x`, with `m` 1 on known pixels and 0 elsewhere. `A` is its own
    transpose and its own pseudo-inverse.

    Args:
        keep_mask (`torch.Tensor`): `m`, shape `(batch, 1, height, width)`.
    """

    def __init__(self, keep_mask: torch.Tensor) -> None:
        self.keep_mask = keep_mask

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """`A x`, shape `(batch, channels, height, width)` to the same."""
        return self.keep_mask * sample

    def transpose(self, measurement: torch.Tensor) -> torch.Tensor:
        """`A^T y`, same shape."""
        return self.keep_mask * measurement

    def pseudo_inverse(self, measurement: torch.Tensor) -> torch.Tensor:
        """`A^+ y`, same shape."""
        return self.keep_mask * measurement


# Copied from pipelines.copaint.AveragePoolOperator
class AveragePoolOperator:
    r"""
    What is known of an image from a smaller one: the means over squares of `scale_factor` pixels a side. With `s` for
    that side, `A A^T = I / s^2`, so that `A^+ = s^2 A^T`, which repeats each value over its square.

    Args:
        scale_factor (`int`): Side of the squares in pixels.
    """

    def __init__(self, scale_factor: int) -> None:
        self.scale_factor = scale_factor

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """`A x`, shape `(batch, channels, height, width)` to `(batch, channels, height / s, width / s)`."""
        return torch.nn.functional.avg_pool2d(sample, self.scale_factor)

    def transpose(self, measurement: torch.Tensor) -> torch.Tensor:
        """`A^T y`, shape `(batch, channels, height / s, width / s)` to `(batch, channels, height, width)`."""
        return self.pseudo_inverse(measurement) / self.scale_factor**2

    def pseudo_inverse(self, measurement: torch.Tensor) -> torch.Tensor:
        """`A^+ y`, shapes as in `transpose`."""
        rows = measurement.repeat_interleave(self.scale_factor, dim=-2)
        return rows.repeat_interleave(self.scale_factor, dim=-1)


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
class DDRMPipelineOutput(BaseOutput):
    """
    Output of [`DDRMPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` a tensor in [-1, 1].
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class DDRMPipeline(HubMixin, DiffusionPipeline):
    r"""
    Fills holes in images, or enlarges images, by denoising diffusion restoration
    (https://huggingface.co/papers/2201.11793). The last step keeps the model's prediction also where pixels are known,
    as in the authors' code; `paste_known` puts them in.

    Args:
        unet ([`UNet2DModel`] or another model on images):
            The pretrained network, of one or three channels: unconditional or class-conditional, with or without
            learned variance.
        scheduler ([`DDRMScheduler`] or another): A stock scheduler (of a DDPM or DDIM checkpoint) is converted.

    Raises:
        ValueError: If the U-Net or the scheduler is of a kind that does not fit.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(self, unet: UNet2DModel | ModelMixin, scheduler: DDRMScheduler | SchedulerMixin) -> None:
        super().__init__()
        check_unet(unet)
        if all(base.__name__ != "DDRMScheduler" for base in type(scheduler).__mro__):
            stock, scheduler = (
                scheduler,
                DDRMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False),
            )
            check_schedule(stock, scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    # Copied from pipelines.copaint.CoPaintPipeline._state_dtype
    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory (1 - abar_0 = 1e-4 is lost): only the network computes in it.
        return torch.promote_types(self.unet.dtype, torch.float32)

    # Copied from pipelines.copaint.CoPaintPipeline._check_size
    def _check_size(self, height: int, width: int) -> None:
        factor = 2 ** (len(self.unet.config.get("block_out_channels", (1,))) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`image` has (height, width) {(height, width)}, but the U-Net halves images {int(math.log2(factor))} "
                f"times: both must be multiples of {factor}; resize or pad the image."
            )

    # Copied from pipelines.copaint.CoPaintPipeline._prepare_class_labels
    def _prepare_class_labels(
        self, class_labels: int | list[int] | torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        conditional = getattr(self.unet, "class_embedding", None) is not None
        if class_labels is None:
            if conditional:
                raise ValueError("`class_labels` are missing: this pipeline's `unet` is class-conditional.")
            return None
        if not conditional:
            raise ValueError("`class_labels` were given, but this pipeline's `unet` takes none: leave them out.")
        class_labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if class_labels.is_floating_point() or class_labels.is_complex() or class_labels.dtype == torch.bool:
            raise TypeError(f"`class_labels` has dtype {class_labels.dtype}, but labels are integers.")
        class_labels = class_labels.to(torch.int64)
        if class_labels.shape[0] == 1:
            class_labels = class_labels.expand(batch_size)
        if class_labels.shape[0] != batch_size:
            raise ValueError(
                f"`class_labels` has {class_labels.shape[0]} entries for a batch of {batch_size}: give one or "
                f"{batch_size}."
            )
        limit = self.unet.config.num_class_embeds
        if limit is not None and not (0 <= class_labels.min() <= class_labels.max() < limit):
            raise ValueError(f"`class_labels` is {class_labels.tolist()}, but labels must be from 0 to {limit - 1}.")
        return class_labels

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

    # Copied from pipelines.copaint.CoPaintPipeline._predict
    def _predict(
        self, sample: torch.Tensor, timestep: int, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the U-Net predicts, and the values of its learned variance if it has one, in the sample's dtype."""
        timesteps = torch.full((sample.shape[0],), timestep, dtype=torch.int64, device=sample.device)
        output = self.unet(sample.to(self.unet.dtype), timesteps, class_labels=class_labels).sample.to(sample.dtype)
        if output.shape[1] == sample.shape[1]:
            return output, None
        model_output, variance_values = output.split(sample.shape[1], dim=1)
        return model_output, variance_values

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        num_inference_steps: int = 20,
        eta: float = 0.85,
        eta_b: float = 1.0,
        measurement_noise: float = 0.0,
        paste_known: bool = True,
        num_images_per_prompt: int = 1,
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDRMPipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        mode: str = "inpaint",
        scale_factor: int = 4,
    ) -> DDRMPipelineOutput | tuple:
        r"""
        Fills the white parts of the mask, or enlarges the image.

        Draws: `x_T`; then at each step but the last its noise.

        Args:
            image: One image or several, as PIL images, or arrays or tensors with values in [0, 1]; height and width
                must be multiples of what the U-Net halves them by. For `mode="super_resolution"` the small image.
            mask_image: White (1) is filled, black (0) is kept; one mask for all images or one each, of the images'
                size or proportions. Left out for `mode="super_resolution"`.
            num_inference_steps (`int`, *optional*, defaults to 20): Number of levels.
            eta (`float`, *optional*, defaults to 0.85): Share of new noise where nothing is measured, 0 to 1.
            eta_b (`float`, *optional*, defaults to 1.0): Weight of the measured values, 0 to 1.
            measurement_noise (`float`, *optional*, defaults to 0.0):
                Standard deviation of the noise in the image's values, which are in [0, 1]; for a noisy image use
                `paste_known=False`.
            paste_known (`bool`, *optional*, defaults to `True`): Whether the result has the known pixels exactly (or,
                in super-resolution, the given means, before values are clipped to [0, 1]).
            num_images_per_prompt (`int`, *optional*, defaults to 1): Fills per image.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*):
                For a class-conditional U-Net: one label, or one per image.
            latents (`torch.Tensor`, *optional*):
                Noise to start from, shape `(images * num_images_per_prompt, channels, height, width)`.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per result, which then
                depends on no other.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (values in [0, 1]), or `"latent"` (the tensor in [-1, 1], not clipped).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`DDRMPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step; it may return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` and `"pred_original_sample"` is in `callback_kwargs`.
            mode (`str`, *optional*, defaults to `"inpaint"`): `"inpaint"` or `"super_resolution"`.
            scale_factor (`int`, *optional*, defaults to 4): For super-resolution: how many times larger.

        Raises:
            TypeError: For images and masks of a type that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before the model runs.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import DDRMPipeline

        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ...     norm_num_groups=8,
        ... )
        >>> pipe = DDRMPipeline(unet, DDPMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)

        >>> image, mask = torch.rand(2, 1, 8, 8), torch.zeros(8, 8)
        >>> mask[:, 4:] = 1  # fill the right half
        >>> images = pipe(image, mask, num_inference_steps=5, output_type="pt").images
        >>> images.shape, torch.allclose(images[..., :4], image[..., :4])
        (torch.Size([2, 1, 8, 8]), True)

        ```
        """
        # 1. Check inputs
        limits = {
            "eta": (eta, 0, 1),
            "eta_b": (eta_b, 0, 1),
            "measurement_noise": (measurement_noise, 0, None),
            "num_images_per_prompt": (num_images_per_prompt, 1, None),
        }
        if not isinstance(num_images_per_prompt, int):
            raise TypeError(f"`num_images_per_prompt` is {num_images_per_prompt!r}, but must be an `int`.")
        for name, (value, low, high) in limits.items():
            if not (value >= low and (high is None or value <= high)) or math.isinf(value):
                limit = "" if high is None else f" and at most {high}"
                raise ValueError(f"`{name}` is {value}, but must be at least {low}{limit}.")
        if mode not in ("inpaint", "super_resolution"):
            raise ValueError(f"`mode` is {mode!r}, but must be 'inpaint' or 'super_resolution'.")
        if not isinstance(scale_factor, int) or scale_factor < 1:
            raise ValueError(f"`scale_factor` is {scale_factor}, but must be a whole number of at least 1.")
        if (mask_image is None) == (mode == "inpaint"):
            raise ValueError(
                f"`mask_image` is {'missing' if mask_image is None else 'given'}, but `mode` is {mode!r}: inpainting "
                "needs one, super-resolution none."
            )
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        images = 2 * to_batch(image, self.unet.config.in_channels).to(self._execution_device, self._state_dtype) - 1
        count, channels, height, width = images.shape
        class_labels = self._prepare_class_labels(class_labels, count)
        images = images.repeat_interleave(num_images_per_prompt, dim=0)
        if class_labels is not None:
            class_labels = class_labels.repeat_interleave(num_images_per_prompt)
        if mode == "inpaint":
            keep_mask = prepare_keep_mask(mask_image, count, height, width).to(images)
            operator = MaskOperator(keep_mask.repeat_interleave(num_images_per_prompt, dim=0))
            measurement = operator.forward(images)
        else:
            operator, measurement = AveragePoolOperator(scale_factor), images
            height, width = height * scale_factor, width * scale_factor
        self._check_size(height, width)
        shape = (count * num_images_per_prompt, channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps)
        trajectory = self.scheduler.trajectory
        latents = self._prepare_latents(latents, shape, generator)
        known = operator.pseudo_inverse(measurement)
        # In [-1, 1]. A mean has the singular value 1 / scale_factor, which A^+ undoes in an orthonormal basis.
        deviation = 2 * measurement_noise * (scale_factor if mode == "super_resolution" else 1)
        latents = self.scheduler.initialize(latents, known, operator, trajectory[0][0], deviation)

        # 2. From noise to the clean image
        for step, (timestep, next_timestep) in enumerate(self.progress_bar(trajectory)):
            model_output, _ = self._predict(latents, timestep, class_labels)
            pred_original_sample, noise_pred = self.scheduler.predict(model_output, timestep, latents)
            latents = self.scheduler.step(
                pred_original_sample, noise_pred, known, operator, next_timestep, eta, eta_b, deviation, generator
            )
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)

        # 3. The known pixels themselves
        if paste_known:
            latents = latents - operator.pseudo_inverse(operator.forward(latents))
            latents = latents + operator.pseudo_inverse(measurement)
        if not latents.isfinite().all():
            raise ValueError("the images are not finite: run the U-Net in float32, and see whether its weights are.")
        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return DDRMPipelineOutput(images=images)


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


# Copied from pipelines.copaint.check_unet
def check_unet(unet: ModelMixin) -> None:
    r"""
    Raises an error that names the reason if `unet` is not a network on images that is conditioned on timesteps.

    Args:
        unet ([`ModelMixin`]): The network in question, most often a [`UNet2DModel`].

    Raises:
        ValueError: If it needs a text condition, takes noise levels (`fourier` embeddings) or embeddings of classes,
            or returns neither the noise nor noise and variance.
    """
    config = unet.config
    if config.get("cross_attention_dim") is not None:
        raise ValueError(
            "`unet` has cross-attention to a text condition: this pipeline is for unconditional or class-conditional "
            "models, such as google/ddpm-celebahq-256."
        )
    if config.get("time_embedding_type") == "fourier":
        raise ValueError(
            "`unet` has `time_embedding_type='fourier'`: it is conditioned on noise levels, not on timesteps. Take a "
            "model of the variance-preserving kind with timesteps, such as google/ddpm-celebahq-256."
        )
    if config.get("class_embed_type") == "identity":
        raise ValueError(
            "`unet` has `class_embed_type='identity'`, which takes embeddings in place of class labels: take a model "
            "with `num_class_embeds`, or without classes."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"`unet` has {config.in_channels} input and {config.out_channels} output channels: it needs as many "
            "outputs as inputs, or twice as many (noise and variance)."
        )
