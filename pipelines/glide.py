r"""GLIDE: images from text, and text-guided inpainting.

*GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models*, Nichol et al., ICML
2022 (https://huggingface.co/papers/2112.10741). A diffusion model of 64 x 64 pixels with a text transformer of its
own, under classifier-free guidance, and a second one that enlarges its images to 256 x 256.

This file is complete in itself: text encoder, scheduler, pipeline. Notation: `abar_t` is the cumulative product of
`alpha_t = 1 - beta_t`, of the levels that are kept; timestep 0 is the least noisy one. C is the number of color
channels: the networks predict 2 C, the noise and what the variance is interpolated by.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import nn
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})

logger = logging.get_logger(__name__)


# ------------------------------------------------------------------------------------------------------ text encoder


@dataclass
class GlideTextEncoderOutput(BaseOutput):
    """
    Output of [`GlideTextEncoder`].

    Args:
        last_hidden_state (`torch.Tensor`): Every position, shape `(batch, max_position_embeddings, hidden_size)`.
        text_embeds (`torch.Tensor`): The last position, projected, shape `(batch, projection_dim)`.
    """

    last_hidden_state: torch.Tensor
    text_embeds: torch.Tensor | None = None  # with a default, offloading can make it anew from a dict


class GlideTextEncoder(ModelMixin, ConfigMixin):
    r"""
    The text transformer of GLIDE (https://huggingface.co/papers/2112.10741, section 3): layers that normalize before
    attention and before the feed-forward part, and look in both directions. Padding is not masked: its places hold
    learned embeddings. All positions become keys and values of the U-Net's attention; the last one, projected, is
    added to its time embedding.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): Number of tokens; GLIDE's vocabulary is that of GPT-2.
        max_position_embeddings (`int`, *optional*, defaults to 128): Number of positions.
        hidden_size (`int`, *optional*, defaults to 512): Width.
        num_hidden_layers (`int`, *optional*, defaults to 16): Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads per layer; must divide `hidden_size`.
        projection_dim (`int`, *optional*, defaults to 768): Width of the U-Net's time embedding.

    Raises:
        ValueError: If the heads do not divide the width, or a number is below 1.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import GlideTextEncoder

    >>> encoder = GlideTextEncoder(10, max_position_embeddings=6, hidden_size=8, num_hidden_layers=1, projection_dim=4)
    >>> output = encoder(torch.tensor([[1, 2, 0, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0, 0, 0]]))
    >>> output.last_hidden_state.shape, output.text_embeds.shape
    (torch.Size([1, 6, 8]), torch.Size([1, 4]))

    ```
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 50257,
        max_position_embeddings: int = 128,
        hidden_size: int = 512,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 8,
        projection_dim: int = 768,
    ) -> None:
        super().__init__()
        for name, value in self.config.items():
            if not name.startswith("_") and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` is {value!r}, but must be an `int` of at least 1.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` is {num_attention_heads}, but must divide `hidden_size`={hidden_size}."
            )
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(max_position_embeddings, hidden_size))
        self.padding_embedding = nn.Parameter(0.01 * torch.randn(max_position_embeddings, hidden_size))
        self.layers = nn.ModuleList(
            BasicTransformerBlock(
                hidden_size,
                num_attention_heads,
                hidden_size // num_attention_heads,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size)
        self.text_projection = nn.Linear(hidden_size, projection_dim)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, return_dict: bool = True
    ) -> GlideTextEncoderOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Encodes tokens.

        Args:
            input_ids (`torch.Tensor`): Tokens, int64 of shape `(batch, max_position_embeddings)`.
            attention_mask (`torch.Tensor`, *optional*):
                1 for tokens, 0 for padding, same shape; padding takes part in attention by its own embedding.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`GlideTextEncoderOutput`].

        Raises:
            ValueError: If the tokens do not fill all positions, or the mask has another shape.
        """
        positions = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] != positions:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}, but must be (batch, {positions}): pad it, with 0 in "
                "`attention_mask` where there is no token."
            )
        hidden_states = self.token_embedding(input_ids) + self.position_embedding
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` has "
                    f"{tuple(input_ids.shape)}: they must agree."
                )
            hidden_states = torch.where(attention_mask[..., None] != 0, hidden_states, self.padding_embedding)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states)
        text_embeds = self.text_projection(hidden_states[:, -1])
        if not return_dict:
            return hidden_states, text_embeds
        return GlideTextEncoderOutput(last_hidden_state=hidden_states, text_embeds=text_embeds)


# --------------------------------------------------------------------------------------------------------- scheduler


class GlideScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Ancestral and DDIM steps of networks with learned variance (https://huggingface.co/papers/2102.09672) on any choice
    of the timesteps, by float64 levels.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`, at least 2.
        beta_schedule (`str`, *optional*, defaults to `"squaredcos_cap_v2"`):
            `"squaredcos_cap_v2"` (cosine), which GLIDE uses at 64 x 64, or `"linear"`, which it enlarges with: from
            `0.1 / T` to `20 / T`, for a `T` above 20.

    Raises:
        ValueError: For an unknown schedule, and too few timesteps for it.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.glide import GlideScheduler

    >>> scheduler = GlideScheduler()
    >>> scheduler.set_timesteps("fast27")
    >>> len(scheduler.timesteps), scheduler.timesteps[:3].tolist()
    (27, [997, 800, 799])

    ```
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, beta_schedule: str = "squaredcos_cap_v2") -> None:
        # the last linear beta, 20 / T, must leave a signal
        least = 21 if beta_schedule == "linear" else 2
        if type(num_train_timesteps) is not int or num_train_timesteps < least:
            raise ValueError(
                f"`num_train_timesteps` is {num_train_timesteps!r}, but must be an `int` of at least {least} with "
                f"`beta_schedule`={beta_schedule!r}."
            )
        if beta_schedule == "squaredcos_cap_v2":
            # abar(u) = cos^2((u + 0.008) / 1.008 pi / 2), https://huggingface.co/papers/2102.09672, eq. 17
            time = np.arange(num_train_timesteps + 1) / num_train_timesteps
            alpha_bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        elif beta_schedule == "linear":
            betas = np.linspace(0.1 / num_train_timesteps, 20 / num_train_timesteps, num_train_timesteps)
        else:
            raise ValueError(f"`beta_schedule` is {beta_schedule!r}, but must be 'squaredcos_cap_v2' or 'linear'.")
        self.betas = torch.from_numpy(betas)
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "SchedulerMixin | tuple[SchedulerMixin, dict[str, Any]]":
        r"""
        As [`~ConfigMixin.from_config`], which gives a value that was another scheduler's default up for the default
        of this one; here it is kept.

        Args:
            config (`Mapping[str, Any]`): The configuration of a scheduler.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`): Whether to return what was not used too.
            kwargs (*optional*): What replaces values of `config`.
        """
        if isinstance(config, Mapping):
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps: int | str, device: str | torch.device | None = None) -> None:
        r"""
        Chooses the timesteps, `timesteps` (int64, falling), in the notation of the authors.

        A number, or several with commas between, divides the `T` timesteps into as many sections of equal length
        (the first ones are longer by one where they cannot be) and takes that many from each, the least noisy section
        first, with both of its ends. `"ddimN"` takes N in whole strides from 0 on. `"fast27"` is `"10,10,3,2,2"` with
        `T - 3` in place of `T - 1`.

        Args:
            num_inference_steps (`int` or `str`): Such as 100, `"100"`, `"10,10,3,2,2"`, `"ddim25"` or `"fast27"`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.

        Raises:
            ValueError: For anything else, sections that are too short, strides that do not exist, and fewer than two
                timesteps.
        """
        limit, spec = self.config.num_train_timesteps, str(num_inference_steps)
        chosen: list[int] = []
        if match := re.fullmatch(r"ddim(\d+)", spec):
            strides = (range(0, limit, stride) for stride in range(1, limit))
            chosen = list(next((stride for stride in strides if len(stride) == int(match[1])), ()))
            if not chosen:
                raise ValueError(
                    f"`num_inference_steps` is {spec!r}, but no whole stride takes {match[1]} of {limit} timesteps: "
                    f"choose another number, or {match[1]} alone."
                )
        elif spec == "fast27" or re.fullmatch(r"\d+(,\d+)*", spec):
            counts = [int(count) for count in ("10,10,3,2,2" if spec == "fast27" else spec).split(",")]
            start = 0
            for section, count in enumerate(counts):
                size = limit // len(counts) + (section < limit % len(counts))
                if count > size:
                    raise ValueError(
                        f"`num_inference_steps` is {spec!r}, but section {section + 1} of {len(counts)} has {size} "
                        f"timesteps of {limit}: take at most so many."
                    )
                # Summed up, as the authors do: it decides how halves are rounded.
                stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
                for _ in range(count):
                    chosen.append(start + round(place))
                    place += stride
                start += size
            if spec == "fast27":
                chosen = sorted({*chosen[:-1], limit - 3})
        if len(chosen) < 2:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, but must choose at least two timesteps: a number "
                f"from 2 to {limit}, numbers for sections such as '10,10,3,2,2', 'ddim' and a number, or 'fast27'."
            )
        levels = self.alphas_cumprod[chosen].tolist()
        self._levels: dict[int, tuple[float, float, float, float]] = {}  # abar, that of the next step, beta, beta~
        for timestep, level, next_level in zip(chosen, levels, [1.0, *levels[:-1]], strict=True):
            beta = 1 - level / next_level
            self._levels[timestep] = (level, next_level, beta, beta * (1 - next_level) / (1 - level))
        # The last step's posterior has no variance, and no logarithm of it: it takes that of the step before.
        self._levels[chosen[0]] = (*self._levels[chosen[0]][:3], self._levels[chosen[1]][3])
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen[::-1], dtype=torch.int64, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is; for use in place of other schedulers."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        r"""
        `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`.

        Args:
            original_samples (`torch.Tensor`): `x_0`, shape `(batch, channels, height, width)`.
            noise (`torch.Tensor`): `eps`, same shape.
            timesteps (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`.
        """
        levels = self.alphas_cumprod[torch.as_tensor(timesteps).cpu()].reshape(-1, 1, 1, 1)
        signal, sigma = (table.to(original_samples) for table in (levels.sqrt(), (1 - levels).sqrt()))
        return signal * original_samples + sigma * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        sampler: str = "ddpm",
        gradient: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One step to the next of `timesteps`. The estimate of the clean image is `x_0 = (x_t - sqrt(1 - abar_t) eps) /
        sqrt(abar_t)`, its known pixels replaced, clipped to [-1, 1].

        - `"ddpm"`: to `N(mu + Sigma gradient, Sigma)` with the mean `mu` of `q(x_{t-1} | x_t, x_0)` and
          `log Sigma = f log beta_t + (1 - f) log beta~_t`, `f = (v + 1) / 2`
          (https://huggingface.co/papers/2102.09672, eq. 15; https://huggingface.co/papers/2105.05233, algorithm 1).
          The last step adds no noise, but the gradient.
        - `"ddim"`: deterministic, with `eps` anew from the clipped `x_0`, less `sqrt(1 - abar_t) gradient`
          (the same, algorithm 2). `v` plays no part.

        Args:
            model_output (`torch.Tensor`): `eps` and `v`, shape `(batch, 2 * channels, height, width)`.
            timestep (`int`): The level of `sample`, one of `timesteps`.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            sampler (`str`, *optional*, defaults to `"ddpm"`): `"ddpm"` or `"ddim"`.
            gradient (`torch.Tensor`, *optional*): Of what is to grow, such as `log p(y | x_t)`; shape of `sample`.
            image (`torch.Tensor`, *optional*): What the known pixels are, in [-1, 1]; shape of `sample`.
            keep_mask (`torch.Tensor`, *optional*): Which are known, 1 or 0; shape `(batch, 1, height, width)`.
            generator (`torch.Generator` or a list of them, *optional*): For the noise of `"ddpm"`.
            variance_noise (`torch.Tensor`, *optional*): That noise itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`DDPMSchedulerOutput`].

        Raises:
            ValueError: For another sampler, a timestep that was not chosen, a network without learned variance, or
                one of `image` and `keep_mask` without the other.
        """
        if (image is None) != (keep_mask is None):
            raise ValueError("`image` and `keep_mask` belong together: give both, or none.")
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"`sampler` is {sampler!r}, but must be 'ddpm' or 'ddim'.")
        if int(timestep) not in self._levels:
            raise ValueError(
                f"`timestep` is {timestep}, but `set_timesteps` chose {sorted(self._levels, reverse=True)}."
            )
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"`model_output` has {model_output.shape[1]} channels, but a sample of {sample.shape[1]} needs "
                f"{2 * sample.shape[1]}: the noise and the learned variance."
            )
        level, next_level, beta, posterior_variance = self._levels[int(timestep)]
        is_last = next_level == 1.0
        eps, variance_values = model_output.chunk(2, dim=1)
        pred_original_sample = (sample - (1 - level) ** 0.5 * eps) / level**0.5
        if keep_mask is not None:
            pred_original_sample = (1 - keep_mask) * pred_original_sample + keep_mask * image
        pred_original_sample = pred_original_sample.clamp(-1, 1)
        if sampler == "ddim":
            eps = (sample - level**0.5 * pred_original_sample) / (1 - level) ** 0.5
            if gradient is not None:
                eps = eps - (1 - level) ** 0.5 * gradient
                pred_original_sample = (sample - (1 - level) ** 0.5 * eps) / level**0.5  # not clipped again
            prev_sample = next_level**0.5 * pred_original_sample + (1 - next_level) ** 0.5 * eps
        else:
            fraction = (variance_values + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(posterior_variance)
            prev_sample = next_level**0.5 * beta / (1 - level) * pred_original_sample
            prev_sample = prev_sample + (1 - next_level) * (1 - beta) ** 0.5 / (1 - level) * sample
            if gradient is not None:
                prev_sample = prev_sample + log_variance.exp() * gradient
            if not is_last:
                if variance_noise is None:
                    variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
                prev_sample = prev_sample + (0.5 * log_variance).exp() * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


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
class GlidePipelineOutput(BaseOutput):
    """
    Output of [`GlidePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` a tensor in [-1, 1].
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


def _side(unet: UNet2DConditionModel | ModelMixin) -> int | None:
    """The side of the square images that `unet` was made for."""
    size = unet.config.sample_size
    if isinstance(size, list | tuple):
        size = size[0] if len(set(size)) == 1 else None
    return size


def _checked(name: str, found: object, sample: torch.Tensor, step: int) -> torch.Tensor:
    """What the user's function `name` gave at a step, which must be like `sample`."""
    if not isinstance(found, torch.Tensor) or found.is_complex():
        kind = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
        raise TypeError(f"`{name}` gave a {kind} at step {step}, but must give a tensor of floats.")
    if found.shape != sample.shape:
        raise ValueError(
            f"`{name}` gave shape {tuple(found.shape)} at step {step}, but must give that of the images, "
            f"{tuple(sample.shape)}."
        )
    if not found.isfinite().all():
        raise ValueError(f"`{name}` gave values that are not finite at step {step}.")
    return found.to(sample)


class GlidePipeline(HubMixin, DiffusionPipeline):
    r"""
    Text to image, and inpainting by text, with GLIDE (https://huggingface.co/papers/2112.10741).

    Args:
        unet ([`UNet2DConditionModel`]):
            The diffusion model, with learned variance; its input is `x_t`, or for inpainting `x_t`, the known pixels
            and the mask of them (2 C + 1 channels).
        text_encoder ([`GlideTextEncoder`]): The text transformer that was trained with `unet`.
        tokenizer (`GPT2Tokenizer`): Cuts prompts into tokens. GLIDE's vocabulary is that of GPT-2.
        scheduler ([`GlideScheduler`]): The noise levels of `unet`.
        upsampler ([`UNet2DConditionModel`], *optional*):
            The diffusion model that enlarges: the same with the small image as C more channels, which come last.
        upsampler_text_encoder ([`GlideTextEncoder`], *optional*): The text transformer that was trained with it.
        upsampler_scheduler ([`GlideScheduler`], *optional*): The noise levels of `upsampler`.

    Raises:
        ValueError: If parts do not fit each other, or some of the upsampler's are missing.
    """

    model_cpu_offload_seq = "text_encoder->unet->upsampler_text_encoder->upsampler"
    _optional_components = ["upsampler", "upsampler_text_encoder", "upsampler_scheduler"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        unet: UNet2DConditionModel | ModelMixin,
        text_encoder: GlideTextEncoder | ModelMixin,
        tokenizer: GPT2Tokenizer | PreTrainedTokenizerBase,
        scheduler: GlideScheduler | SchedulerMixin,
        upsampler: UNet2DConditionModel | ModelMixin | None = None,
        upsampler_text_encoder: GlideTextEncoder | ModelMixin | None = None,
        upsampler_scheduler: GlideScheduler | SchedulerMixin | None = None,
    ) -> None:
        super().__init__()
        parts = {
            "upsampler": upsampler,
            "upsampler_text_encoder": upsampler_text_encoder,
            "upsampler_scheduler": upsampler_scheduler,
        }
        missing = [name for name, part in parts.items() if part is None]
        if 0 < len(missing) < len(parts):
            raise ValueError(f"`{'`, `'.join(missing)}` is missing: give all of {list(parts)}, or none.")
        stages = [("unet", unet, text_encoder, (1, 2))]
        if upsampler is not None:
            stages.append(("upsampler", upsampler, upsampler_text_encoder, (2, 3)))
        for name, network, encoder, (plain, inpainting) in stages:
            config, colors = network.config, unet.config.out_channels // 2
            allowed = (plain * colors, inpainting * colors + 1)
            if config.in_channels not in allowed or config.out_channels != 2 * colors or _side(network) is None:
                raise ValueError(
                    f"`{name}` has {config.in_channels} input and {config.out_channels} output channels and "
                    f"`sample_size`={config.sample_size}, but needs a size (of a square), {2 * colors} output "
                    f"channels (the noise and a learned variance) and {allowed[0]} input channels, or {allowed[1]} "
                    "for inpainting."
                )
            time_embed_dim = 4 * config.block_out_channels[0]
            widths = (encoder.config.hidden_size, encoder.config.projection_dim)
            if widths != (config.cross_attention_dim, time_embed_dim) or config.class_embed_type != "identity":
                raise ValueError(
                    f"the text encoder of `{name}` gives widths {widths}, but `{name}` takes "
                    f"{(config.cross_attention_dim, time_embed_dim)} with `class_embed_type`="
                    f"{config.class_embed_type!r}: they must agree, and the type be 'identity'."
                )
            if len(tokenizer) > encoder.config.vocab_size:
                raise ValueError(
                    f"`tokenizer` has {len(tokenizer)} tokens, but the text encoder of `{name}` knows "
                    f"{encoder.config.vocab_size}: take the vocabulary that it was trained with, that of GPT-2."
                )
        self._check_schedulers(scheduler, upsampler_scheduler)
        self.register_modules(
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            upsampler=upsampler,
            upsampler_text_encoder=upsampler_text_encoder,
            upsampler_scheduler=upsampler_scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    # Copied from pipelines.copaint.CoPaintPipeline._state_dtype
    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory (1 - abar_0 = 1e-4 is lost): only the network computes in it.
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

    def _check_schedulers(self, scheduler: SchedulerMixin, upsampler_scheduler: SchedulerMixin | None) -> None:
        """On making the pipeline, and on every call: they may have been replaced."""
        for name, levels in (("scheduler", scheduler), ("upsampler_scheduler", upsampler_scheduler)):
            is_own = any(base.__name__ == "GlideScheduler" for base in type(levels).__mro__)
            if not is_own and (levels is not None or name == "scheduler"):
                raise ValueError(
                    f"`{name}` is a {type(levels).__name__}, but only `GlideScheduler` knows GLIDE's choices of "
                    "timesteps and its learned variance: make one with the same `beta_schedule`."
                )
        if scheduler is upsampler_scheduler:
            raise ValueError(
                "`scheduler` and `upsampler_scheduler` are one object, but each keeps the timesteps of its own "
                "network: give a second one, `GlideScheduler.from_config(scheduler.config)`."
            )

    def _encode_prompts(
        self, prompts: list[str], text_encoder: GlideTextEncoder | ModelMixin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and the projected last one; GLIDE reads lower case and no token for start or end."""
        length = text_encoder.config.max_position_embeddings
        # What looks like a special token in a prompt is text.
        tokens = self.tokenizer(
            [prompt.lower() for prompt in prompts], split_special_tokens=True, add_special_tokens=False
        ).input_ids
        if max(len(words) for words in tokens) > length:
            logger.warning(f"a prompt has more than {length} tokens: the rest of it is left out.")
        attention_mask = torch.zeros(len(prompts), length, dtype=torch.int64)
        input_ids = torch.zeros_like(attention_mask)  # any token: the encoder has an embedding for padding
        for row, words in enumerate(tokens):
            count = min(len(words), length)
            input_ids[row, :count] = torch.tensor(words[:count], dtype=torch.int64)
            attention_mask[row, :count] = 1
        device = self._execution_device
        return text_encoder(input_ids.to(device), attention_mask.to(device), return_dict=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        num_inference_steps: int | str = 100,
        guidance_scale: float = 3.0,
        negative_prompt: str | list[str] = "",
        sampler: str = "ddpm",
        cond_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        upsample: bool | None = None,
        upsampler_num_inference_steps: int | str = "fast27",
        upsampler_sampler: str | None = None,
        upsampler_noise_scale: float = 0.997,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["GlidePipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> GlidePipelineOutput | tuple:
        r"""
        Paints what the prompt says, or with an image and a mask the white parts of it.

        Guidance (https://huggingface.co/papers/2207.12598) is `eps = eps_u + s (eps_c - eps_u)` with `u` for
        `negative_prompt`; the variance is that of `c`, and the estimate of the clean image is clipped after it. The
        upsampler is not guided. Draws: `x_T` and the noise of each step but the last, then the same for the upsampler.

        Args:
            prompt (`str` or `list[str]`): What to see, one for all images or one each; read in lower case.
            image (*optional*):
                For inpainting, one square image or several, as PIL images, or arrays or tensors with values in [0, 1],
                of any one size: they are resized to what the networks paint.
            mask_image (*optional*):
                White (1) is painted, black (0) is kept; one mask for all images or one each. What counts is the mask
                in the size of the small image, where one pixel stands for 4 x 4 of the large one.
            num_inference_steps (`int` or `str`, *optional*, defaults to 100):
                Number of levels, or sections of them, see [`GlideScheduler.set_timesteps`].
            guidance_scale (`float`, *optional*, defaults to 3.0): `s`; 1 is no guidance, and half the work.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What to go away from, one for all images or one each; not read with `guidance_scale=1`.
            sampler (`str`, *optional*, defaults to `"ddpm"`): `"ddpm"` (ancestral) or `"ddim"`.
            cond_fn (`Callable`, *optional*):
                `cond_fn(sample, timestep)`, the gradient of what is to grow, such as the likeness of image and text by
                a CLIP model for noisy images, times its scale: for `x_t` of shape `(batch, channels, height, width)`
                and int64 timesteps of shape `(batch,)`, a tensor of the shape of `x_t`. Usual with
                `guidance_scale=1`. The upsampler goes without.
            upsample (`bool`, *optional*): Whether to enlarge. By default if the pipeline has an upsampler.
            upsampler_num_inference_steps (`int` or `str`, *optional*, defaults to `"fast27"`): As above.
            upsampler_sampler (`str`, *optional*):
                By default `"ddim"`, and `"ddpm"` for inpainting, as in the authors' examples.
            upsampler_noise_scale (`float`, *optional*, defaults to 0.997):
                What the upsampler's first noise is multiplied by; sharper but grainy images with 1.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images per prompt.
            latents (`torch.Tensor`, *optional*):
                Noise to start from, shape `(prompts * num_images_per_prompt, channels, height, width)`, small.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per result, which then
                depends on no other.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (one or three channels), `"np"` or `"pt"` (values in [0, 1]), or `"latent"` (the tensor in
                [-1, 1], not clipped).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`GlidePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step, of the upsampler too, whose steps
                are counted on; it may return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` and `"pred_original_sample"` is in `callback_kwargs`.

        Raises:
            TypeError: For prompts, images, masks, numbers and gradients of a type that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs; for
                gradients and latents of another shape, or that are not finite.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import GlidePipeline

        >>> pipe = GlidePipeline.from_pretrained("my-glide")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe("an oil painting of a corgi", num_inference_steps=2, output_type="pt").images
        >>> images.shape
        torch.Size([1, 3, 32, 32])

        ```
        """
        # 1. Check inputs
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        for name, texts in (("prompt", prompts), ("negative_prompt", negative_prompts)):
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"`{name}` is {texts!r}, but must be a `str` or a list of them.")
            if not texts:
                raise ValueError(f"`{name}` is {texts!r}, but must hold at least one text.")
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(
                f"`num_images_per_prompt` is {num_images_per_prompt}, but must be an `int` of at least 1."
            )
        if self.upsampler is None:
            given = {
                "upsample": bool(upsample),
                "upsampler_num_inference_steps": upsampler_num_inference_steps != "fast27",
                "upsampler_sampler": upsampler_sampler is not None,
                "upsampler_noise_scale": upsampler_noise_scale != 0.997,
            }
            if any(given.values()):
                raise ValueError(
                    f"`{next(name for name in given if given[name])}` was given, but this pipeline has no "
                    "`upsampler`: load one with it."
                )
        for name, value in (("guidance_scale", guidance_scale), ("upsampler_noise_scale", upsampler_noise_scale)):
            if not isinstance(value, Real):
                raise TypeError(f"`{name}` is {value!r}, but must be a number.")
        if not math.isfinite(guidance_scale) or not 0 < upsampler_noise_scale < math.inf:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale} and `upsampler_noise_scale` is {upsampler_noise_scale}, but "
                "they must be finite, and the second one positive."
            )
        self._check_schedulers(self.scheduler, self.upsampler_scheduler)
        colors = self.unet.config.out_channels // 2
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if output_type == "pil" and colors not in (1, 3):
            raise ValueError(
                f"`output_type` is 'pil', but the images have {colors} channels: take 'np', 'pt' or 'latent'."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )
        stages = [("unet", self.unet, self.text_encoder, self.scheduler, sampler, num_inference_steps)]
        if self.upsampler is not None and upsample is not False:
            parts = (self.upsampler, self.upsampler_text_encoder, self.upsampler_scheduler)
            sampler = upsampler_sampler or ("ddim" if image is None else "ddpm")
            stages.append(("upsampler", *parts, sampler, upsampler_num_inference_steps))
        for stage, (name, unet, _, scheduler, sampler, steps) in enumerate(stages):
            if sampler not in ("ddpm", "ddim"):
                raise ValueError(
                    f"`{'upsampler_sampler' if stage else 'sampler'}` is {sampler!r}, but must be 'ddpm' or 'ddim'."
                )
            if image is not None and unet.config.in_channels == (stage + 1) * colors:
                raise ValueError(
                    f"`image` was given, but `{name}` has {unet.config.in_channels} input channels and was not "
                    f"trained to inpaint: load one that was{', or give `upsample=False`' if stage else ''}."
                )
            scheduler.set_timesteps(steps)
        if (image is None) != (mask_image is None):
            raise ValueError("`image` and `mask_image` belong together: give both, or none.")
        images = None if image is None else to_batch(image, colors)
        if images is not None and images.shape[-2] != images.shape[-1]:
            raise ValueError(
                f"`image` has (height, width) {tuple(images.shape[-2:])}, but GLIDE paints squares: crop it or pad it."
            )
        counts = [len(prompts), len(negative_prompts), 1 if images is None else len(images)]
        most = max(counts if guidance_scale != 1 else counts[::2])
        if not set(counts) <= {1, most}:
            raise ValueError(
                f"`prompt`, `negative_prompt` and `image` have {counts} entries: give one for all, or as many of each"
                f"{' (the second one is not read with `guidance_scale=1`)' if guidance_scale == 1 else ''}."
            )
        size, batch_size = _side(self.unet), most * num_images_per_prompt
        generator = list(generator) if isinstance(generator, tuple) else generator
        keep_mask = None if images is None else prepare_keep_mask(mask_image, most, size, size)
        latents = self._prepare_latents(latents, (batch_size, colors, size, size), generator)
        prompts, negative_prompts = (list(texts) * (most // len(texts)) for texts in (prompts, negative_prompts))

        # 2. From noise to a small image, and from noise and the small image to a large one
        step = -1
        with self.progress_bar(total=sum(len(stage[3].timesteps) for stage in stages)) as progress_bar:
            for stage, (_, unet, text_encoder, scheduler, sampler, _) in enumerate(stages):
                size, is_guided = _side(unet), stage == 0 and guidance_scale != 1
                conditions = self._encode_prompts(prompts + negative_prompts * is_guided, text_encoder)
                hidden_states, text_embeds = (
                    tensor.to(unet.dtype).repeat_interleave(num_images_per_prompt, dim=0) for tensor in conditions
                )
                given, known, keep = [], None, None
                if images is not None:
                    known = images.to(latents)
                    if known.shape[-1] != size:
                        known = nn.functional.interpolate(known, (size, size), mode="bicubic", antialias=True)
                    known = (2 * known.clamp(0, 1) - 1).repeat_interleave(batch_size // len(known), dim=0)
                    keep = nn.functional.interpolate(keep_mask.to(latents), (size, size), mode="nearest-exact")
                    keep = keep.repeat_interleave(num_images_per_prompt, dim=0)
                    given = [known * keep, keep]
                elif unet.config.in_channels > (stage + 1) * colors:  # nothing is known
                    given = [latents.new_zeros(batch_size, colors + 1, size, size)]
                if stage == 1:
                    # As from a file with 8 bits per color, which is what the upsampler was trained on.
                    low_res = ((latents + 1) * 127.5).round() / 127.5 - 1
                    given += [nn.functional.interpolate(low_res, (size, size), mode="bilinear", align_corners=False)]
                    latents = self._prepare_latents(None, (batch_size, colors, size, size), generator)
                    latents = upsampler_noise_scale * latents

                for timestep in scheduler.timesteps.tolist():
                    inputs = torch.cat([latents, *given], dim=1).repeat(1 + is_guided, 1, 1, 1)
                    timesteps = torch.full((len(inputs),), timestep, dtype=torch.int64, device=inputs.device)
                    model_output = unet(
                        inputs.to(unet.dtype), timesteps, encoder_hidden_states=hidden_states, class_labels=text_embeds
                    ).sample.to(latents.dtype)
                    if is_guided:
                        eps, eps_unconditional = (half[:, :colors] for half in model_output.chunk(2))
                        eps = eps_unconditional + guidance_scale * (eps - eps_unconditional)
                        model_output = torch.cat([eps, model_output[:batch_size, colors:]], dim=1)
                    gradient = None
                    if cond_fn is not None and stage == 0:
                        found = cond_fn(latents.clone(), timesteps[:batch_size])  # it may change what it gets
                        gradient = _checked("cond_fn", found, latents, step + 1)
                    latents, pred_original_sample = scheduler.step(
                        model_output, timestep, latents, sampler, gradient, known, keep, generator, return_dict=False
                    )
                    step += 1
                    if not latents.isfinite().all():
                        raise ValueError(
                            f"the images are not finite after step {step}: run the networks in float32, and see "
                            "whether their weights are finite."
                        )
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                        chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        changed = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)
                        latents = _checked("callback_on_step_end", changed, latents, step)
                    progress_bar.update()

        # 3. Images
        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return GlidePipelineOutput(images=images)
