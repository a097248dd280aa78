r"""unCLIP: images from text by way of CLIP's image embeddings; variations, interpolations, text differences.

*Hierarchical Text-Conditional Image Generation with CLIP Latents*, Ramesh et al., 2022
(https://huggingface.co/papers/2204.06125), known as DALL-E 2. A prior draws an image embedding `z_i` for a text, a
decoder, which is a diffusion model of pixels, paints what `z_i` says. Together with the noise `x_T` that DDIM infers
from an image, `(z_i, x_T)` is a code of that image that can be edited.

The decoder may be one of this package, or that of Kandinsky 2.2, Karlo or Stable unCLIP. This file is complete in
itself: the conditioning of the first, the scheduler of all of them, the pipeline. Notation: `abar_t` is the cumulative
product of `alpha_t = 1 - beta_t`; `abar_{-1} = 1` is the clean image.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ModelMixin,
    PriorTransformer,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    BatchEncoding,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})

logger = logging.get_logger(__name__)


# ----------------------------------------------------------------------------------------- conditioning of the decoder


class UnCLIPImageProjection(ModelMixin, ConfigMixin):
    r"""
    How the decoder is told the image embedding (https://huggingface.co/papers/2204.06125, section 2.1): one projection
    is added to its time embedding, another one makes four tokens for its attention. For classifier-free guidance a
    learned embedding stands for no image.

    Token `j`, channel `c` is entry `4 c + j` of the second projection (channel after channel), as in Karlo and in
    diffusers' `UnCLIPTextProjModel`, whose parameters have the same names here. Karlo's decoder is told a text in the
    same two ways, by its embedding and its hidden states.

    Args:
        clip_extra_context_tokens (`int`, *optional*, defaults to 4): Number of tokens.
        clip_embeddings_dim (`int`, *optional*, defaults to 768): Size of an image embedding.
        time_embed_dim (`int`, *optional*, defaults to 1280): Width of the U-Net's time embedding.
        cross_attention_dim (`int`, *optional*, defaults to 1024): Width of a token, the U-Net's of the same name.
        with_text (`bool`, *optional*, defaults to `False`): Whether a text is projected too.

    Attributes:
        clip_mean, clip_std (`torch.Tensor`):
            What embeddings are standardized by, of shape `(clip_embeddings_dim,)`: those of the training images; 0 and
            1 in a new model.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import UnCLIPImageProjection

    >>> projection = UnCLIPImageProjection(clip_embeddings_dim=6, time_embed_dim=32, cross_attention_dim=8)
    >>> tokens, time_embeds = projection(torch.randn(2, 6))
    >>> tokens.shape, time_embeds.shape
    (torch.Size([2, 4, 8]), torch.Size([2, 32]))

    ```
    """

    @register_to_config
    def __init__(
        self,
        clip_extra_context_tokens: int = 4,
        clip_embeddings_dim: int = 768,
        time_embed_dim: int = 1280,
        cross_attention_dim: int = 1024,
        with_text: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("clip_mean", torch.zeros(clip_embeddings_dim))
        self.register_buffer("clip_std", torch.ones(clip_embeddings_dim))
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(clip_embeddings_dim))
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(clip_embeddings_dim, time_embed_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(
            clip_embeddings_dim, clip_extra_context_tokens * cross_attention_dim
        )
        if with_text:
            self.embedding_proj = nn.Linear(clip_embeddings_dim, time_embed_dim)
            self.encoder_hidden_states_proj = nn.Linear(clip_embeddings_dim, cross_attention_dim)
            self.text_encoder_hidden_states_norm = nn.LayerNorm(cross_attention_dim)

    def forward(
        self,
        image_embeds: torch.Tensor,
        drop_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Projects image embeddings, and with `with_text` texts.

        Args:
            image_embeds (`torch.Tensor`): CLIP's image embeddings, shape `(batch, clip_embeddings_dim)`.
            drop_mask (`torch.Tensor`, *optional*):
                `True` where the learned embedding takes the image's place, bool of shape `(batch,)`.
            text_embeds (`torch.Tensor`, *optional*): CLIP's text embeddings, shape `(batch, clip_embeddings_dim)`.
            hidden_states (`torch.Tensor`, *optional*):
                The last hidden states of CLIP's text encoder, shape `(batch, length, clip_embeddings_dim)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The U-Net's `encoder_hidden_states`, shape `(batch,
            clip_extra_context_tokens + length, cross_attention_dim)`, the image's first, and its `class_labels`,
            `(batch, time_embed_dim)`.

        Raises:
            ValueError: If shapes do not fit, and for a text that is missing or not meant.
        """
        expected = self.config.clip_embeddings_dim
        if image_embeds.ndim != 2 or image_embeds.shape[1] != expected:
            raise ValueError(
                f"`image_embeds` has shape {tuple(image_embeds.shape)}, but must be (batch, {expected}): give "
                "embeddings of the CLIP that this projection was trained with."
            )
        if any((text is not None) != self.config.with_text for text in (text_embeds, hidden_states)):
            raise ValueError(
                f"`with_text` is {self.config.with_text}, so `text_embeds` and `hidden_states` must "
                f"{'both' if self.config.with_text else 'not'} be given."
            )
        embeds = (image_embeds - self.clip_mean) / self.clip_std
        if drop_mask is not None:
            if drop_mask.shape != image_embeds.shape[:1]:
                raise ValueError(
                    f"`drop_mask` has shape {tuple(drop_mask.shape)}, but must be ({len(image_embeds)},): one per "
                    "embedding."
                )
            null = self.learned_classifier_free_guidance_embeddings
            embeds = torch.where(drop_mask[:, None], null.to(embeds.dtype), embeds)
        tokens = self.clip_extra_context_tokens_proj(embeds)
        tokens = tokens.unflatten(1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)
        time_embeds = self.clip_image_embeddings_project_to_time_embeddings(embeds)
        if self.config.with_text:
            time_embeds = time_embeds + self.embedding_proj(text_embeds)
            text_tokens = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(hidden_states))
            tokens = torch.cat([tokens, text_tokens], dim=1)
        return tokens, time_embeds


# --------------------------------------------------------------------------------------------------------- scheduler


@dataclass
class UnCLIPDecoderSchedulerOutput(BaseOutput):
    """
    Output of [`UnCLIPDecoderScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next timestep of the trajectory, shape of the input.
        pred_original_sample (`torch.Tensor`): The estimate of the clean image that the move was made with.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class UnCLIPDecoderScheduler(SchedulerMixin, ConfigMixin):
    r"""
    DDIM (https://huggingface.co/papers/2010.02502) with any `eta`, in both directions, between exactly the levels that
    it says: `t_k = round(k T / N) - 1` for k = 0 ... N, from the clean image, `t_0 = -1`, to `T - 1`. With `eta=1` it
    is the ancestral sampler of DDPM with the posterior's variance. Levels are float64.

    A scheduler of diffusers with the same noise converts: `UnCLIPDecoderScheduler.from_config(...)`, as the pipeline
    does with what it is given.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`.
        beta_start (`float`, *optional*, defaults to 1e-4): First `beta` of the linear schedules.
        beta_end (`float`, *optional*, defaults to 0.02): Last `beta` of the linear schedules.
        beta_schedule (`str`, *optional*, defaults to `"squaredcos_cap_v2"`):
            `"squaredcos_cap_v2"` (cosine, as the paper's decoder), `"linear"` or `"scaled_linear"`.
        trained_betas (`list[float]`, *optional*): The betas themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`.
        clip_sample (`bool`, *optional*, defaults to `True`):
            Whether steps clip the estimate of the clean image, and derive the noise anew from it.
        clip_sample_range (`float`, *optional*, defaults to 1.0): The limit of that clip.

    Raises:
        ValueError: For an unknown schedule or prediction type, betas that are not inside (0, 1), and dynamic
            thresholding.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.unclip import UnCLIPDecoderScheduler

    >>> scheduler = UnCLIPDecoderScheduler()
    >>> scheduler.set_timesteps(4)
    >>> scheduler.trajectory
    [(999, 749), (749, 499), (499, 249), (249, -1)]
    >>> scheduler.set_timesteps(4, direction="encode")
    >>> scheduler.trajectory
    [(-1, 249), (249, 499), (499, 749), (749, 999)]

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
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"`prediction_type` is {prediction_type!r}, but must be 'epsilon' or 'v_prediction'.")
        if thresholding:
            raise ValueError("`thresholding=True` is not supported: use `clip_sample` and `clip_sample_range`.")
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
        else:
            raise ValueError(
                f"`beta_schedule` is {beta_schedule!r}, but must be 'squaredcos_cap_v2', 'linear' or 'scaled_linear'; "
                "give any other schedule as `trained_betas`."
            )
        if len(betas) != num_train_timesteps or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"the schedule has {len(betas)} betas in [{betas.min():.4g}, {betas.max():.4g}], but must have "
                f"`num_train_timesteps`={num_train_timesteps} inside (0, 1)."
            )
        self.betas = torch.from_numpy(betas)
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
        # The last entry makes index -1 the clean image.
        self._levels = [*self.alphas_cumprod.tolist(), 1.0]
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, direction: str = "decode"
    ) -> None:
        r"""
        Lays out a trajectory: `trajectory`, the list of moves `(timestep, next_timestep)`, and `timesteps` (int64), at
        which the network is called, which is 0 for the clean image.

        Args:
            num_inference_steps (`int`): `N`, 1 to `num_train_timesteps`.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.
            direction (`str`, *optional*, defaults to `"decode"`): `"decode"`, or `"encode"` for inversion.

        Raises:
            ValueError: For a number of steps out of range, or another direction.
        """
        limit = self.config.num_train_timesteps
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= limit:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, but must be a whole number from 1 to {limit}, the "
                "schedule's timesteps."
            )
        if direction not in ("decode", "encode"):
            raise ValueError(f"`direction` is {direction!r}, but must be 'decode' or 'encode'.")
        # Halves are rounded up: in whole numbers, so that no rounding error decides.
        levels = [
            (2 * k * limit + num_inference_steps) // (2 * num_inference_steps) - 1
            for k in range(num_inference_steps + 1)
        ]
        if direction == "decode":
            levels = levels[::-1]
        self.num_inference_steps = num_inference_steps
        self.trajectory = list(itertools.pairwise(levels))
        self.timesteps = torch.tensor([max(level, 0) for level in levels[:-1]], dtype=torch.int64, device=device)

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
        next_timestep: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UnCLIPDecoderSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One move along the trajectory, from `t` to `s`, in either direction (https://huggingface.co/papers/2010.02502,
        eq. 12): `sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise` with
        `sigma = eta sqrt((1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s))`.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts, shape of `sample`.
            timestep (`int`): `t`, the level of `sample`; -1 is the clean image.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            next_timestep (`int`, *optional*): `s`; by default what comes next in `trajectory`.
            eta (`float`, *optional*, defaults to 0.0): 0 is deterministic, 1 is DDPM; 0 where noise grows.
            generator (`torch.Generator` or a list of them, *optional*): For the noise.
            variance_noise (`torch.Tensor`, *optional*): That noise itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`UnCLIPDecoderSchedulerOutput`].

        Raises:
            ValueError: For a timestep that is not on the trajectory, and noise on the way to more noise.
        """
        if next_timestep is None:
            moves = dict(self.trajectory)
            if int(timestep) not in moves:
                raise ValueError(
                    f"`timestep` is {timestep}, but the trajectory has {list(moves)}: call `set_timesteps` first, or "
                    "give `next_timestep`."
                )
            next_timestep = moves[int(timestep)]
        level, next_level = self._levels[int(timestep)], self._levels[next_timestep]
        if eta != 0 and next_level < level:
            raise ValueError(f"`eta` is {eta}, but must be 0 on the way from {timestep} to {next_timestep}.")
        signal, sigma = level**0.5, (1 - level) ** 0.5
        if level == 1.0:  # the clean image is its own estimate, and both predictions are of the noise
            eps, pred_original_sample = model_output, sample
        else:
            if self.config.prediction_type == "epsilon":
                pred_original_sample = (sample - sigma * model_output) / signal
            else:  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
                pred_original_sample = signal * sample - sigma * model_output
            if self.config.clip_sample:
                limit = self.config.clip_sample_range
                pred_original_sample = pred_original_sample.clamp(-limit, limit)
            eps = (sample - signal * pred_original_sample) / sigma
        prev_sample = next_level**0.5 * pred_original_sample
        variance = eta**2 * (1 - next_level) / (1 - level) * (1 - level / next_level) if eta != 0 else 0.0
        prev_sample = prev_sample + max(1 - next_level - variance, 0.0) ** 0.5 * eps
        if variance > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            prev_sample = prev_sample + variance**0.5 * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return UnCLIPDecoderSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


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


# Copied from pipelines.unclip_prior.slerp
def slerp(a: torch.Tensor, b: torch.Tensor, theta: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
    r"""
    Spherical interpolation of each row, `(sin((1 - theta) w) a + sin(theta w) b) / sin(w)` with the angle `w` between
    the row of `a` and that of `b`; linear where they are parallel.

    Args:
        a (`torch.Tensor`): What `theta` = 0 gives, shape `(batch, ...)`.
        b (`torch.Tensor`): What `theta` = 1 gives, same shape.
        theta (`float`, a list of them or `torch.Tensor`): One place, or several, of shape `(places,)`.

    Returns:
        `torch.Tensor`: Shape `(batch, ...)`, or `(places, batch, ...)` for several.

    Raises:
        ValueError: If the shapes differ, a row is zero or not finite, or two are opposite, where no path is the
            shortest.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.pipelines.unclip_prior import slerp

    >>> slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5)
    tensor([[1.4142, 1.4142]])

    ```
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"`a` has shape {tuple(a.shape)} and `b` {tuple(b.shape)}: they must agree, as (batch, ...).")
    rows = [x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b)]
    norms = [x.norm(dim=1, keepdim=True) for x in rows]
    if not all((norm > 0).all() and norm.isfinite().all() for norm in norms):
        raise ValueError("`a` or `b` has a row of zeros, or one that is not finite, without direction: leave it out.")
    units = [x / norm for x, norm in zip(rows, norms, strict=True)]
    # As exact for small angles as for right ones, which the arc cosine is not.
    w = 2 * torch.atan2((units[0] - units[1]).norm(dim=1), (units[0] + units[1]).norm(dim=1))
    w = w.reshape(-1, *(1,) * (a.ndim - 1))
    if (math.pi - w < 1e-6).any():
        raise ValueError("`a` and `b` have opposite rows: no path between them is the shortest, so go by a third one.")
    places = torch.as_tensor(theta, dtype=w.dtype, device=w.device)
    places = places.reshape(*places.shape, *(1,) * a.ndim) if places.ndim else places
    # sin(x w) / sin(w) is x where w is small.
    parallel = w < 1e-6
    ends = [torch.where(parallel, x, torch.sin(x * w) / torch.sin(w)) for x in (1 - places, places)]
    return (ends[0] * a + ends[1] * b).to(a.dtype)


# ----------------------------------------------------------------------------------------- schedule of the prior

# For each scheduler: what else must hold of its config, and the fewest steps. With an exact network on a Gaussian, the
# relative error of the covariance at 25 steps is 0.17 (ancestral), 0.10 (DDIM), 0.007 (DPM-Solver++), 0.04 (its SDE),
# 0.009 (UniPC); Euler has 0.10, and Heun's is above 1: the cosine schedule's first sigma is 20000. Of settings, "bh1"
# and no `lower_order_final` of UniPC are not finite, "sigma_min" has 0.24 (SDE), "log_linear" 0.67 (Euler, 50 steps).
_SCHEDULERS = {
    "DDPMScheduler": (
        {
            "timestep_spacing": ("linspace", "trailing"),
            "variance_type": ("fixed_small_log", "fixed_small", "fixed_large"),
        },
        2,
    ),
    "DDIMScheduler": ({"timestep_spacing": ("trailing",)}, 1),
    "DPMSolverMultistepScheduler": (
        {
            "timestep_spacing": ("linspace", "trailing"),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "variance_type": (None,),
            "final_sigmas_type": ("zero",),
            "lambda_min_clipped": (-math.inf,),
        },
        1,
    ),
    "UniPCMultistepScheduler": (
        {
            "timestep_spacing": ("linspace", "trailing"),
            "predict_x0": (True,),
            "solver_type": ("bh2",),
            "lower_order_final": (True,),
        },
        1,
    ),
    "EulerDiscreteScheduler": (
        {
            "timestep_spacing": ("linspace", "trailing"),
            "timestep_type": ("discrete",),
            "interpolation_type": ("linear",),
            "sigma_max": (None,),
        },
        50,
    ),
    "UnCLIPScheduler": ({"variance_type": ("fixed_small_log",)}, 2),
}
_UNWANTED = (
    *("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("use_flow_sigmas", "use_dynamic_shifting"),
)


# Copied from pipelines.unclip_prior.check_prior_scheduler
def check_prior_scheduler(scheduler: SchedulerMixin, num_inference_steps: int | None = None) -> None:
    r"""
    Refuses schedulers that give wrong embeddings without a sign of it, and warns of two that are questionable: one
    that clips what the network predicts below 3 standard deviations (diffusers' default is 1, for pixels), and
    [`UnCLIPScheduler`], whose last step multiplies the result by 0.99947 (two roundings of the same number; diffusers
    itself advises against it). [`DDPMScheduler`] with `variance_type="fixed_small_log"` and
    `timestep_spacing="linspace"` takes the same steps without that.

    Args:
        scheduler (`SchedulerMixin`): What to check.
        num_inference_steps (`int`, *optional*): If given, whether it can take that many steps is checked too.

    Raises:
        ValueError: For other schedulers than DDPM, DDIM, DPM-Solver++ multistep, UniPC, Euler and UnCLIP; another
            schedule than the cosine one, another prediction than `x_0`, settings that give wrong embeddings on it, too
            few steps, and a number of steps that diffusers rounds to timesteps which miss the ends or repeat.

    Example:

    ```py
    >>> from diffusers import HeunDiscreteScheduler
    >>> from diffusers_ext.pipelines.unclip_prior import check_prior_scheduler

    >>> check_prior_scheduler(HeunDiscreteScheduler())
    Traceback (most recent call last):
    ...
    ValueError: `scheduler` is a HeunDiscreteScheduler, which is wrong or untested on the cosine schedule: ...

    ```
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in _SCHEDULERS:
        raise ValueError(
            f"`scheduler` is a {name}, which is wrong or untested on the cosine schedule: take "
            f"`default_prior_scheduler()`, or one of {list(_SCHEDULERS)}."
        )
    allowed, least = _SCHEDULERS[name]
    allowed = {"beta_schedule": ("squaredcos_cap_v2",), "prediction_type": ("sample",), "trained_betas": (None,)} | {
        **allowed,
        **dict.fromkeys(_UNWANTED, (False, None)),
    }
    for key, values in allowed.items():
        if (value := config.get(key, values[0])) not in values:
            raise ValueError(
                f"`scheduler` has `{key}`={value!r}, but a prior needs {' or '.join(map(repr, values))}: give it to "
                f"`{name}.from_config(config, {key}={values[0]!r})`, which takes defaults meant for pixels where a "
                "config says nothing, or take `default_prior_scheduler()`."
            )
    if config.get("clip_sample") and config.clip_sample_range < 3:
        logger.warning(
            f"`scheduler` clips embeddings of unit variance at `clip_sample_range`={config.clip_sample_range}: give "
            "10 (Karlo, Kandinsky 2.2), or `clip_sample=False`."
        )
    if name == "UnCLIPScheduler":
        logger.warning(
            "`UnCLIPScheduler` makes embeddings 0.05 % too small: take `fix_stable_unclip_scheduler(scheduler)`."
        )
    if num_inference_steps is not None:
        most = config.num_train_timesteps
        if not isinstance(num_inference_steps, int) or not least <= num_inference_steps <= most:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but must be an `int` from {least} to {most} with "
                f"`{name}`: give more, or take `default_prior_scheduler()`."
            )
        # What diffusers rounds can give a step more, the timestep -1, or the same one twice, and a step of DDIM goes
        # `most // num_inference_steps` down, wherever the next one starts.
        trial = type(scheduler).from_config(config)
        trial.set_timesteps(num_inference_steps)
        places = trial.timesteps.tolist()
        is_falling = all(a > b for a, b in itertools.pairwise([*places, -1]))
        is_short = name == "DDIMScheduler" and most % num_inference_steps > most / 20
        if len(places) != num_inference_steps or places[0] != most - 1 or not is_falling or is_short:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, for which {name} does not take as many different "
                f"steps from the timestep {most - 1} to the end: give a smaller number that divides {most}."
            )


# Copied from pipelines.unclip_prior.check_tokenizer
def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModelWithProjection, prefix: str = ""
) -> None:
    r"""
    Refuses a tokenizer with which CLIP would read something else than the text, without a sign of it.

    Args:
        tokenizer (`CLIPTokenizer`): What to check.
        text_encoder (`CLIPTextModelWithProjection`): The encoder that gets its tokens.
        prefix (`str`, *optional*, defaults to `""`): What the names of the two start with, in messages.

    Raises:
        ValueError: If it has no tokens but special ones, or tokens that the encoder does not know; if it cuts beyond
            the encoder's context, or on the left, or pads there; if the id that ends texts is not the one at which the
            encoder reads off the embedding.
    """
    ids, text = tokenizer.get_vocab().values(), text_encoder.config
    if len(ids) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"`{prefix}tokenizer` has {len(ids)} tokens, and none but special ones, so that all texts would be the "
            "same: load its vocabulary, as `from_pretrained` does."
        )
    if max(ids) >= text.vocab_size:
        raise ValueError(
            f"`{prefix}tokenizer` has ids up to {max(ids)}, but `{prefix}text_encoder` knows {text.vocab_size} "
            "tokens: take the one that it was trained with."
        )
    if (tokenizer.model_max_length or math.inf) > text.max_position_embeddings:
        raise ValueError(
            f"`{prefix}tokenizer` cuts at {tokenizer.model_max_length} tokens, but `{prefix}text_encoder` has "
            f"{text.max_position_embeddings} positions: set `{prefix}tokenizer.model_max_length`."
        )
    # An id of 2 is what old configs say: CLIP then pools at the highest id.
    end = max(ids) if text.eos_token_id == 2 else text.eos_token_id
    empty = tokenizer("").input_ids
    if end != tokenizer.eos_token_id or end not in empty or empty.index(end) != len(empty) - 1:
        raise ValueError(
            f"`{prefix}tokenizer` ends texts with the id {tokenizer.eos_token_id} (the empty one is {empty}), but "
            f"`{prefix}text_encoder` looks for the first {end} and would pool another token, the same for all texts: "
            "set `eos_token_id` of its config and load it anew, or take the tokenizer that it was trained with."
        )
    sides = {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
    if set(sides.values()) != {"right"} or tokenizer.pad_token is None:
        raise ValueError(
            f"`{prefix}tokenizer` has {sides} and `pad_token` {tokenizer.pad_token!r}, but CLIP reads texts that are "
            "padded and cut on the right: set them on it."
        )


# Copied from pipelines.unclip_prior.tokenize
def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> BatchEncoding:
    r"""
    Texts as CLIP reads them: what looks like a special token is text, and what is beyond the context is left out, with
    a warning that says what that is.

    Args:
        tokenizer (`CLIPTokenizer`): CLIP's tokenizer.
        texts (`list[str]`): The texts.
        length (`int`): Tokens that are read, with those for start and end.

    Returns:
        `BatchEncoding`: `input_ids` and `attention_mask`, of shape `(texts, length)`.

    Raises:
        ValueError: If the tokenizer takes a part of a text for its end, as some do with what they do not know.
    """
    end = tokenizer.eos_token_id
    for text, ids in zip(texts, tokenizer(texts, split_special_tokens=True, verbose=False).input_ids, strict=True):
        if end in ids[:-1]:
            known = tokenizer.decode(ids[: ids.index(end)], skip_special_tokens=True).strip()
            raise ValueError(
                f"`prompt` has {text!r}, of which `tokenizer` does not know what comes after {known!r}, and reads it "
                "as the end of the text: write it with characters of its vocabulary."
            )
        if len(ids) > length:
            logger.warning(
                f"a prompt has {len(ids)} tokens, and CLIP reads {length} of them. This was left out: "
                f"{tokenizer.decode(ids[length - 1 : -1]).strip()!r}, at the end of {text!r}."
            )
    return tokenizer(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        split_special_tokens=True,
        return_tensors="pt",
    )


# ---------------------------------------------------------------------------------------------------------- pipeline


@dataclass
class UnCLIPTextToImagePipelineOutput(BaseOutput):
    """
    Output of [`UnCLIPTextToImagePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` what the decoder itself made.
        image_embeds (`torch.Tensor`): What was decoded, `z_i`, in CLIP's own scale, shape `(batch, dim)`.
        noise (`torch.Tensor`): What decoding started from, `x_T`, shape `(batch, channels, height, width)`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    image_embeds: torch.Tensor
    noise: torch.Tensor


# Which of the components that only some decoders have each of them needs.
_PARTS = {
    "own": {"decoder_projection"},
    "kandinsky22": {"vae"},
    "karlo": {
        *("decoder_projection", "decoder_text_encoder", "decoder_tokenizer"),
        *("super_res_first", "super_res_last", "super_res_scheduler"),
    },
    "stable_unclip": {"vae", "decoder_text_encoder", "decoder_tokenizer"},
}
_SUPER_RES_STEPS = 7  # what Karlo's networks were made for: the last step has its own


class UnCLIPTextToImagePipeline(HubMixin, DiffusionPipeline):
    r"""
    Text to image, image variations, interpolations and text differences with unCLIP
    (https://huggingface.co/papers/2204.06125).

    Without a prior it decodes image embeddings and edits images. [`~UnCLIPTextToImagePipeline.from_decoder`] puts a
    decoder, also that of Kandinsky 2.2, Karlo or Stable unCLIP, and a prior together. Those decoders are sampled by
    `decoder_scheduler` too, so that all that is here works with them, without dynamic thresholding and variances that
    they have learned. Stable unCLIP gets embeddings without noise, at its noise level 0.

    Args:
        prior ([`PriorTransformer`], *optional*): Draws image embeddings for a text; it predicts `z_i` itself.
        text_encoder (`CLIPTextModelWithProjection`, *optional*): CLIP's text encoder.
        tokenizer (`CLIPTokenizer`, *optional*): CLIP's tokenizer.
        prior_scheduler ([`SchedulerMixin`], *optional*): The noise levels of `prior`, and how they are run through.
        decoder ([`UNet2DConditionModel`]):
            The diffusion model of images; one of this package has `class_embed_type="identity"` and no learned
            variance.
        decoder_projection ([`UnCLIPImageProjection`], *optional*):
            How `decoder` is told `z_i`; Karlo's `UnCLIPTextProjModel` is converted. Kandinsky 2.2 and Stable unCLIP
            have none.
        decoder_scheduler ([`UnCLIPDecoderScheduler`]):
            The noise levels of `decoder`; a scheduler of diffusers with betas is converted.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*):
            CLIP's image encoder, for all that takes images, and for guidance of Kandinsky 2.2.
        image_processor (`CLIPImageProcessor`, *optional*):
            Prepares images for it; without, they are resized (bicubic) and standardized by CLIP's mean and deviation.
        vae ([`VQModel`] or [`AutoencoderKL`], *optional*): Of Kandinsky 2.2 (`movq`) and Stable unCLIP.
        decoder_text_encoder (`CLIPTextModelWithProjection` or `CLIPTextModel`, *optional*):
            Of Karlo and Stable unCLIP, whose decoders read the text too; Karlo's may be left out where `text_encoder`
            is the same.
        decoder_tokenizer (`CLIPTokenizer`, *optional*): Its tokenizer.
        super_res_first ([`UNet2DModel`], *optional*): Karlo's network that enlarges.
        super_res_last ([`UNet2DModel`], *optional*): Karlo's network for the last step of that.
        super_res_scheduler ([`UnCLIPScheduler`], *optional*): The scheduler of both.
        embed_norm (`str`, *optional*, defaults to `"standardize"`):
            Which embeddings `prior` draws and `decoder` was trained on: CLIP's own (`"standardize"`), or those divided
            by their lengths (`"l2"`).
        clip_model_id (`str`, *optional*): Which CLIP it is.

    Raises:
        ValueError: If parts do not fit each other, or some of the prior's or the decoder's are missing.
    """

    model_cpu_offload_seq = (
        "text_encoder->prior->image_encoder->decoder_text_encoder->decoder_projection->decoder->vae"
        "->super_res_first->super_res_last"
    )
    _exclude_from_cpu_offload = ["prior"]  # its statistics are used outside of its forward pass
    _optional_components = [
        *("prior", "text_encoder", "tokenizer", "prior_scheduler", "image_encoder", "image_processor"),
        *("decoder_projection", "vae", "decoder_text_encoder", "decoder_tokenizer"),
        *("super_res_first", "super_res_last", "super_res_scheduler"),
    ]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        prior: PriorTransformer | ModelMixin | None,
        text_encoder: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | PreTrainedTokenizerBase | None,
        prior_scheduler: SchedulerMixin | None,
        decoder: UNet2DConditionModel | ModelMixin,
        decoder_projection: UnCLIPImageProjection | ModelMixin | None,
        decoder_scheduler: UnCLIPDecoderScheduler | SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_processor: CLIPImageProcessor | None = None,
        vae: VQModel | AutoencoderKL | None = None,
        decoder_text_encoder: CLIPTextModelWithProjection | CLIPTextModel | None = None,
        decoder_tokenizer: CLIPTokenizer | PreTrainedTokenizerBase | None = None,
        super_res_first: UNet2DModel | None = None,
        super_res_last: UNet2DModel | None = None,
        super_res_scheduler: SchedulerMixin | None = None,
        embed_norm: str = "standardize",
        clip_model_id: str | None = None,
    ) -> None:
        super().__init__()
        parts = {
            "prior": prior,
            "prior_scheduler": prior_scheduler,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        missing = [name for name, part in parts.items() if part is None]
        if missing and (prior is not None or prior_scheduler is not None or len(missing) % 2):
            raise ValueError(
                f"`{'`, `'.join(missing)}` is missing: give all of {list(parts)}, none, or `text_encoder` and "
                "`tokenizer` alone."
            )
        if embed_norm not in ("standardize", "l2"):
            raise ValueError(f"`embed_norm` is {embed_norm!r}, but must be 'standardize' or 'l2'.")
        if decoder_projection is not None and not hasattr(decoder_projection, "clip_mean"):  # Karlo's, in diffusers
            stock = decoder_projection
            config = {name: value for name, value in stock.config.items() if not name.startswith("_")}
            decoder_projection = UnCLIPImageProjection(**config, with_text=True).eval()
            weights = stock.state_dict()
            null = weights["learned_classifier_free_guidance_embeddings"]
            weights |= {"clip_mean": torch.zeros_like(null), "clip_std": torch.ones_like(null)}
            decoder_projection.load_state_dict(weights, assign=True)  # shares them
        if decoder_text_encoder is not None and decoder_text_encoder is text_encoder:
            decoder_text_encoder = decoder_tokenizer = None  # one model is offloaded and saved once
        self.register_modules(
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prior_scheduler=prior_scheduler,
            decoder=decoder,
            decoder_projection=decoder_projection,
            decoder_scheduler=decoder_scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
            vae=vae,
            decoder_text_encoder=decoder_text_encoder,
            decoder_tokenizer=decoder_tokenizer,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            super_res_scheduler=super_res_scheduler,
        )
        self.register_to_config(embed_norm=embed_norm, clip_model_id=clip_model_id)
        # 1. The decoder's side
        config, kind = decoder.config, self._kind
        given = {name for names in _PARTS.values() for name in names if getattr(self, name) is not None}
        reader = {"decoder_text_encoder", "decoder_tokenizer"}
        if kind == "karlo" and text_encoder is not None and not given & reader:
            given |= reader
        if given != _PARTS[kind]:
            raise ValueError(
                f"`decoder` is conditioned as that of {kind!r} is, which goes with {sorted(_PARTS[kind])}, but what "
                f"was given is {sorted(given)}: give these parts of that decoder, and no other."
            )
        if vae is not None and isinstance(vae, VQModel) != (kind == "kandinsky22"):
            raise ValueError(
                f"`vae` is a {type(vae).__name__}, but the decoder of {kind!r} needs "
                f"{'a `VQModel`' if kind == 'kandinsky22' else 'an `AutoencoderKL`'}: take the one of its pipeline."
            )
        channels = 3 if vae is None else vae.config.latent_channels
        variances = (1,) if kind == "own" else (1, 2)
        outputs = [channels * factor for factor in variances]
        if config.in_channels != channels or config.out_channels not in outputs or type(config.sample_size) is not int:
            raise ValueError(
                f"`decoder` has {config.in_channels} input and {config.out_channels} output channels and "
                f"`sample_size`={config.sample_size!r}, but needs {channels} and {' or '.join(map(str, outputs))}, "
                f"which is {'RGB' if vae is None else 'what `vae` has'} "
                f"with{'out' if kind == 'own' else ' or without'} a learned variance, and a whole number."
            )
        if decoder_projection is not None:
            projection = decoder_projection.config
            widths = (projection.cross_attention_dim, projection.time_embed_dim)
            wanted = (config.cross_attention_dim, config.time_embedding_dim or 4 * config.block_out_channels[0])
            if widths != wanted or config.class_embed_type != "identity":
                raise ValueError(
                    f"`decoder_projection` gives widths {widths}, but `decoder` takes {wanted} with "
                    f"`class_embed_type`={config.class_embed_type!r}: they must agree, and the type be 'identity'."
                )
        if self._reader is not None:
            width = self._reader[1].config.hidden_size
            wanted = self._embedding_dim if kind == "karlo" else config.cross_attention_dim
            if width != wanted:
                raise ValueError(
                    f"`{'' if decoder_text_encoder is None else 'decoder_'}text_encoder` gives hidden states of width "
                    f"{width}, but the decoder takes {wanted}: give the one that it was trained with as "
                    "`decoder_text_encoder`."
                )
        if kind == "karlo":
            for name in ("super_res_first", "super_res_last"):
                large = getattr(self, name).config
                if (large.in_channels, large.out_channels) != (6, 3) or type(large.sample_size) is not int:
                    raise ValueError(
                        f"`{name}` has {large.in_channels} input and {large.out_channels} output channels and "
                        f"`sample_size`={large.sample_size!r}, but must have 6 (noise and image) and 3, and a whole "
                        "number."
                    )
            if "prev_timestep" not in inspect.signature(super_res_scheduler.step).parameters:
                raise ValueError(
                    f"`super_res_scheduler` is a {type(super_res_scheduler).__name__}, but Karlo's networks need an "
                    "`UnCLIPScheduler`."
                )
        if kind != "own" and embed_norm == "l2":
            raise ValueError(
                f"`embed_norm` is 'l2', but the decoder of {kind!r} takes embeddings as CLIP gives them: take a prior "
                "that was trained with 'standardize'."
            )
        if all(base.__name__ != "UnCLIPDecoderScheduler" for base in type(decoder_scheduler).__mro__):
            # Values that are defaults there need not be so here: all of them count. Schedulers that know no clip have
            # none, which only pixels need.
            levels = {"clip_sample": vae is None} | dict(decoder_scheduler.config)
            levels.pop("_use_default_values", None)
            if vae is not None and levels.pop("thresholding", False):
                logger.warning("`decoder_scheduler` has `thresholding=True`, which steps of DDIM here do without.")
            converted = UnCLIPDecoderScheduler.from_config(levels)
            check_schedule(decoder_scheduler, converted)
            self.register_modules(decoder_scheduler=converted)
        # 2. CLIP and the prior
        widths = {"decoder": self._embedding_dim}
        if prior is not None:
            check_prior_scheduler(prior_scheduler)
            widths["prior"] = prior.config.embedding_dim
            expected = prior.config.get("encoder_hid_dim") or prior.config.embedding_dim
            if (
                text_encoder.config.hidden_size != expected
                or tokenizer.model_max_length != prior.config.num_embeddings
            ):
                raise ValueError(
                    f"`text_encoder` gives hidden states of width {text_encoder.config.hidden_size} and `tokenizer` "
                    f"{tokenizer.model_max_length} tokens, but `prior` takes {expected} and "
                    f"{prior.config.num_embeddings}: take the parts that were trained together."
                )
        for prefix in ("", "decoder_"):
            encoder = getattr(self, f"{prefix}text_encoder")
            if encoder is None:
                continue
            check_tokenizer(getattr(self, f"{prefix}tokenizer"), encoder, prefix)
            if not prefix or kind == "karlo":  # of Stable unCLIP's, another CLIP, the embeddings are not used
                widths[f"{prefix}text_encoder"] = encoder.config.projection_dim
        if image_encoder is not None:
            widths["image_encoder"] = image_encoder.config.projection_dim
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"the embeddings of the parts have sizes {widths}, but must have one: take parts that were trained "
                "with the same CLIP."
            )
        self._postprocessor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @classmethod
    def from_decoder(
        cls, decoder: DiffusionPipeline, prior: DiffusionPipeline | None = None, **kwargs: Any
    ) -> "UnCLIPTextToImagePipeline":
        r"""
        Puts the decoder of one pipeline and the prior of another one together. The models are shared, not copied.

        Args:
            decoder ([`DiffusionPipeline`]):
                [`KandinskyV22Pipeline`] or [`KandinskyV22CombinedPipeline`], Karlo's
                [`UnCLIPImageVariationPipeline`] or [`UnCLIPPipeline`], Stable unCLIP's
                [`StableUnCLIPImg2ImgPipeline`] or [`StableUnCLIPPipeline`], or an [`UnCLIPTextToImagePipeline`]. If it
                has a prior, this is used where no other is given.
            prior ([`DiffusionPipeline`], *optional*): [`UnCLIPPriorPipeline`] or [`KandinskyV22PriorPipeline`].
            kwargs (*optional*): Arguments of this class that replace what the two have, such as `image_encoder`.

        Returns:
            [`UnCLIPTextToImagePipeline`]: A pipeline that can be saved and published as one.

        Raises:
            TypeError: If `decoder` is no pipeline of those.
            ValueError: If parts do not fit each other, or are missing.

        Example:

        ```py
        >>> from diffusers import KandinskyV22Pipeline
        >>> from diffusers_ext import UnCLIPPriorPipeline, UnCLIPTextToImagePipeline

        >>> decoder = KandinskyV22Pipeline.from_pretrained("my-kandinsky")
        >>> prior = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe = UnCLIPTextToImagePipeline.from_decoder(decoder, prior)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> image = pipe("a red three", num_inference_steps=2, prior_num_inference_steps=2).images[0]
        >>> pipe.save_pretrained("whole-kandinsky")

        ```
        """
        theirs = decoder.components
        if "decoder_projection" in theirs:  # one of this class
            parts = theirs | {name: decoder.config[name] for name in ("embed_norm", "clip_model_id")}
            if decoder._reader is not None:  # also where it was the prior's
                parts["decoder_tokenizer"], parts["decoder_text_encoder"] = decoder._reader
        else:
            parts = dict.fromkeys(("prior", "prior_scheduler", "text_encoder", "tokenizer", "decoder_projection"))
            if "text_proj" in theirs and "prior" in theirs:  # Karlo's prior and decoder read with one text encoder
                parts |= {name: theirs[name] for name in ("text_encoder", "tokenizer")}
            names = {
                "unet": "decoder",
                "text_proj": "decoder_projection",
                "scheduler": "decoder_scheduler",
                "movq": "vae",
                "text_encoder": "decoder_text_encoder",
                "tokenizer": "decoder_tokenizer",
                "feature_extractor": "image_processor",
                "prior_text_encoder": "text_encoder",
                "prior_tokenizer": "tokenizer",
                "prior_prior": "prior",
                "prior_image_encoder": "image_encoder",
                "prior_image_processor": "image_processor",
            }
            parts |= {names.get(name, name): part for name, part in theirs.items()}
            if not {"decoder", "decoder_scheduler"} <= parts.keys():
                raise TypeError(
                    f"`decoder` is a {type(decoder).__name__}, but must be a pipeline with a decoder of unCLIP, such "
                    "as a `KandinskyV22Pipeline`."
                )
            known = inspect.signature(cls).parameters
            parts = {name: part for name, part in parts.items() if name in known}
        if prior is not None:
            names = ("prior", "text_encoder", "tokenizer", "image_encoder", "image_processor")
            found = {name: prior.components.get(name) for name in names}
            parts |= {name: part for name, part in found.items() if part is not None}
            parts["prior_scheduler"] = prior.scheduler
            embed_norm = prior.config.get("embed_norm", "standardize")
            if parts.setdefault("embed_norm", embed_norm) != embed_norm:
                raise ValueError(
                    f"`prior` draws embeddings of `embed_norm`={embed_norm!r}, but `decoder` was trained on those of "
                    f"{parts['embed_norm']!r}: take parts that were trained on the same embeddings."
                )
            clips = [parts.get("clip_model_id"), prior.config.get("clip_model_id")]
            if None not in clips and clips[0] != clips[1]:
                logger.warning(
                    f"`decoder` was trained with the CLIP {clips[0]!r}, `prior` with {clips[1]!r}: if they are not "
                    "the same, images will not show what the text says."
                )
            parts["clip_model_id"] = clips[0] or clips[1]
        return cls(**(parts | kwargs))

    @property
    def _kind(self) -> str:
        """Whose decoder it is: a key of `_PARTS`, by how its U-Net is conditioned."""
        config = self.decoder.config
        if config.encoder_hid_dim_type == "image_proj":
            return "kandinsky22"
        if config.class_embed_type == "projection":
            return "stable_unclip"
        return "karlo" if getattr(self.decoder_projection, "config", {}).get("with_text") else "own"

    @property
    def _embedding_dim(self) -> int:
        """The size of the image embeddings that the decoder takes."""
        if self._kind == "kandinsky22":
            return self.decoder.config.encoder_hid_dim
        if self._kind == "stable_unclip":  # beside them, as many numbers say the noise level
            return self.decoder.config.projection_class_embeddings_input_dim // 2
        return self.decoder_projection.config.clip_embeddings_dim

    @property
    def _reader(self) -> tuple[PreTrainedTokenizerBase, CLIPTextModelWithProjection | CLIPTextModel] | None:
        """Tokenizer and encoder of the text that the decoder reads, if it does; Karlo's may be those of the prior."""
        if self._kind == "karlo" and self.decoder_text_encoder is None:
            return self.tokenizer, self.text_encoder
        return None if self.decoder_text_encoder is None else (self.decoder_tokenizer, self.decoder_text_encoder)

    # -- inputs

    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory: only the networks compute in it.
        return torch.promote_types(self.decoder.dtype, torch.float32)

    def _check_output(self, output_type: str, tensor_inputs: list[str] = []) -> None:  # noqa: B006
        if not hasattr(self.decoder_scheduler, "trajectory"):
            raise ValueError(
                f"`decoder_scheduler` is a {type(self.decoder_scheduler).__name__}, which was put in place of the "
                "pipeline's own: make the pipeline anew with it, by `from_pipe(pipe, decoder_scheduler=...)`, which "
                "converts it."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )

    def _check_numbers(self, guidance_scale: float, eta: float = 0.0, **counts: int) -> None:
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"`{name}` is {count!r}, but must be an `int` of at least 1.")
            limit = self.decoder_scheduler.config.num_train_timesteps
            if name in ("num_inference_steps", "num_inversion_steps") and count > limit:
                raise ValueError(f"`{name}` is {count}, but the decoder has {limit} timesteps: choose fewer.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but must be finite; 1 is no guidance.")
        if guidance_scale != 1 and self._kind == "kandinsky22" and self.image_encoder is None:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but without `image_encoder` there is no embedding of no image "
                "for Kandinsky 2.2: give 1, or load one, by `from_pipe(pipe, image_encoder=...)`."
            )
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta}, but must lie in [0, 1]: 0 is deterministic, 1 is DDPM.")

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._state_dtype)
        return latents.to(self._execution_device, self._state_dtype)

    def _check_latents(self, latents: torch.Tensor | None, shape: tuple[int, ...], name: str = "latents") -> None:
        if latents is None:
            return
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"`{name}` is a {type(latents).__name__}, but must be a tensor.")
        if tuple(latents.shape) != shape or not latents.isfinite().all():
            raise ValueError(
                f"`{name}` has shape {tuple(latents.shape)}, but this call needs {shape} and finite values."
            )

    def _check_generator(self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for a batch of {batch_size}: give one or {batch_size}."
            )

    def _prepare_images(
        self, image: Image.Image | np.ndarray | torch.Tensor | list, name: str = "image", count: int | None = None
    ) -> torch.Tensor:
        """One square image or several, as they come -> values in [0, 1] of shape `(batch, 3, side, side)`."""
        if self.image_encoder is None:
            raise ValueError(
                "this pipeline has no `image_encoder`, but needs CLIP's for what an image says: load one with it, by "
                "`from_pipe(pipe, image_encoder=...)`."
            )
        images = to_batch(image, 3, name)
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(
                f"`{name}` has (height, width) {tuple(images.shape[-2:])}, but CLIP and decoder see squares: crop it "
                "or pad it."
            )
        if count is not None and len(images) != count:
            raise ValueError(f"`{name}` holds {len(images)} images, but this call takes {count}: call once for each.")
        return images.to(self._execution_device)

    def _embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """CLIP's embeddings of values in [0, 1], in the form that prior and decoder know."""
        if self.image_processor is not None:
            pictures = VaeImageProcessor.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())
            pixels = self.image_processor(pictures, return_tensors="pt").pixel_values
        else:
            size = self.image_encoder.config.image_size
            pixels = images
            if pixels.shape[-1] != size:
                pixels = nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            mean, std = (
                torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
                for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
            )
            pixels = (pixels - mean) / std
        pixels = pixels.to(self._execution_device, self.image_encoder.dtype)
        embeds = self.image_encoder(pixels).image_embeds
        return nn.functional.normalize(embeds, dim=1) if self.config.embed_norm == "l2" else embeds

    def _check_prompts(self, prompt: str | list[str], name: str = "prompt") -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"`{name}` is {prompts!r}, but must be a `str` or a list of them.")
        if not prompts:
            raise ValueError(f"`{name}` is empty: give at least one text.")
        if self.text_encoder is None:
            raise ValueError(
                f"`{name}` was given, but this pipeline has no `text_encoder` and `tokenizer`: load them with it, by "
                "`from_pipe(pipe, text_encoder=..., tokenizer=...)`."
            )
        return list(prompts)

    # -- CLIP

    @torch.no_grad()
    def encode_image(self, image: Image.Image | np.ndarray | torch.Tensor | list) -> torch.Tensor:
        r"""
        What images say: their embeddings by CLIP, as prior and decoder know them.

        Args:
            image: Square images, as PIL images, or arrays or tensors with values in [0, 1], of any size.

        Returns:
            `torch.Tensor`: `z_i`, shape `(batch, dim)`.

        Raises:
            TypeError: For types that cannot be used.
            ValueError: If the pipeline has no image encoder, or the images are not square or not in [0, 1].
        """
        return self._embed_images(self._prepare_images(image))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        What texts say, by CLIP. What is beyond its context is cut off, with a warning.

        Args:
            prompt (`str` or `list[str]`): The texts.

        Returns:
            `tuple`: `z_t` of shape `(batch, dim)`, the last hidden states `(batch, length, width)`, and the mask of
            tokens, bool of shape `(batch, length)`.

        Raises:
            TypeError: For other types.
            ValueError: If the pipeline has no text encoder.
        """
        prompts = self._check_prompts(prompt)
        length = self.tokenizer.model_max_length if self.prior is None else self.prior.config.num_embeddings
        tokens, device = tokenize(self.tokenizer, prompts, length), self._execution_device
        output = self.text_encoder(tokens.input_ids.to(device))
        return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool().to(device)

    # -- the networks, and the loops over them

    def _sample_prior(
        self,
        conditions: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        latents: torch.Tensor,
        guidance_scale: float,
        num_candidates: int,
        rerank: str | None,
        generator: torch.Generator | list[torch.Generator] | None,
        progress_bar: object,
    ) -> torch.Tensor:
        """Image embeddings `(batch, dim)`: of `num_candidates` the one that is most like the text."""
        text_embeds, hidden_states, mask = (torch.cat(parts) for parts in zip(*conditions, strict=True))
        count, is_guided = len(latents), len(conditions) == 2
        dtype = self.prior.dtype
        known = inspect.signature(self.prior_scheduler.step).parameters
        timesteps = self.prior_scheduler.timesteps
        latents = latents * self.prior_scheduler.init_noise_sigma
        for i, timestep in enumerate(timesteps):
            inputs = self.prior_scheduler.scale_model_input(latents, timestep).repeat(1 + is_guided, 1)
            prediction = self.prior(
                inputs.to(dtype),
                timestep=timestep,
                proj_embedding=text_embeds.to(dtype),
                encoder_hidden_states=hidden_states.to(dtype),
                attention_mask=mask,
            ).predicted_image_embedding.to(latents.dtype)
            if is_guided:  # https://huggingface.co/papers/2207.12598
                prediction, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (prediction - unconditional)
            extra = {"generator": generator} if "generator" in known else {}
            if "prev_timestep" in known:
                extra["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
            latents = self.prior_scheduler.step(prediction, timestep, latents, **extra).prev_sample
            progress_bar.update()
        embeds = latents * self.prior.clip_std.to(latents) + self.prior.clip_mean.to(latents)
        # Section 2.2: of two, that with the larger dot product with the text's embedding
        candidates = embeds.unflatten(0, (count // num_candidates, num_candidates))
        if rerank is None:
            return candidates[:, 0]
        texts = text_embeds[:count:num_candidates].to(embeds)
        scores = (candidates * nn.functional.normalize(texts, dim=1)[:, None]).sum(-1)
        if rerank == "cosine":
            scores = scores / candidates.norm(dim=-1)
        return candidates[torch.arange(len(candidates), device=scores.device), scores.argmax(1)]

    def _condition(
        self,
        image_embeds: torch.Tensor,
        is_guided: bool,
        prompts: Sequence[str] = ("",),
        negative_prompts: Sequence[str] = ("",),
    ) -> dict:
        """What the decoder is called with beside sample and timestep; with guidance, the rows of no image first."""
        device, count = self._execution_device, len(image_embeds)
        dtype = (self.decoder if self.decoder_projection is None else self.decoder_projection).dtype
        image_embeds = image_embeds.to(device, dtype).repeat(1 + is_guided, 1)
        no_image = torch.arange(len(image_embeds), device=device) < count * is_guided
        if self._kind == "kandinsky22":
            if is_guided:  # no image is what CLIP makes of zeros
                size = self.image_encoder.config.image_size
                zeros = torch.zeros(1, 3, size, size, dtype=self.image_encoder.dtype, device=device)
                null = self.image_encoder(zeros).image_embeds.to(dtype)
                image_embeds = torch.where(no_image[:, None], null, image_embeds)
            return {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": image_embeds}}

        texts = {}
        if self._reader is not None:
            groups = (negative_prompts, prompts) if is_guided else (prompts,)
            lines = [text for group in groups for text in group for _ in range(count // len(group))]
            different = list(dict.fromkeys(lines))
            rows = [different.index(text) for text in lines]
            tokenizer, text_encoder = self._reader
            tokens = tokenize(tokenizer, different, tokenizer.model_max_length)
            output, mask = text_encoder(tokens.input_ids.to(device)), tokens.attention_mask.bool().to(device)
            texts["hidden_states"] = output.last_hidden_state[rows].to(dtype)
        if self._kind == "stable_unclip":
            zeros = torch.zeros(len(image_embeds), device=device)
            level = get_timestep_embedding(zeros, image_embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
            labels = torch.cat([image_embeds, level.to(dtype)], dim=1).masked_fill(no_image[:, None], 0)
            return {"encoder_hidden_states": texts["hidden_states"], "class_labels": labels}
        if texts:
            texts["text_embeds"] = output.text_embeds[rows].to(dtype)
        tokens, time_embeds = self.decoder_projection(image_embeds, no_image, **texts)
        condition = {"encoder_hidden_states": tokens, "class_labels": time_embeds}
        condition = {name: tensor.to(self.decoder.dtype) for name, tensor in condition.items()}
        if texts:  # the tokens of the image come first, and all of them are to be seen
            extra = mask.new_ones(len(rows), tokens.shape[1] - mask.shape[1])
            condition["attention_mask"] = torch.cat([extra, mask[rows]], dim=1)
        return condition

    def _predict(self, sample: torch.Tensor, timestep: int, condition: dict, guidance_scale: float) -> torch.Tensor:
        inputs = sample.to(self.decoder.dtype).repeat(2 if guidance_scale != 1 else 1, 1, 1, 1)
        timesteps = torch.full((len(inputs),), max(timestep, 0), dtype=torch.int64, device=sample.device)
        model_output = self.decoder(inputs, timesteps, **condition).sample
        model_output = model_output[:, : sample.shape[1]].to(sample.dtype)  # the rest is a variance
        if guidance_scale != 1:
            unconditional, model_output = model_output.chunk(2)
            model_output = unconditional + guidance_scale * (model_output - unconditional)
        return model_output

    def _invert_loop(
        self, sample: torch.Tensor, image_embeds: torch.Tensor, num_inference_steps: int, progress_bar: object
    ) -> torch.Tensor:
        self.decoder_scheduler.set_timesteps(num_inference_steps, direction="encode")
        condition = self._condition(image_embeds, is_guided=False)
        for timestep, next_timestep in self.decoder_scheduler.trajectory:
            model_output = self._predict(sample, timestep, condition, 1.0)
            sample = self.decoder_scheduler.step(model_output, timestep, sample, next_timestep).prev_sample
            progress_bar.update()
        return sample

    def _decode_loop(
        self,
        latents: torch.Tensor,
        image_embeds: torch.Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        progress_bar: object,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompts: Sequence[str] = ("",),
        negative_prompts: Sequence[str] = ("",),
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> torch.Tensor:
        self.decoder_scheduler.set_timesteps(num_inference_steps)
        condition = self._condition(image_embeds, guidance_scale != 1, prompts, negative_prompts)
        for step, (timestep, next_timestep) in enumerate(self.decoder_scheduler.trajectory):
            model_output = self._predict(latents, timestep, condition, guidance_scale)
            latents, pred_original_sample = self.decoder_scheduler.step(
                model_output, timestep, latents, next_timestep, eta, generator, return_dict=False
            )
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)
            progress_bar.update()
        return latents

    def _to_sample(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the decoder's `x_0`."""
        size = self.decoder.config.sample_size
        if self.vae is not None:
            size *= 2 ** (len(self.vae.config.block_out_channels) - 1)
        if images.shape[-1] != size:
            images = nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        sample = 2 * images.to(self._state_dtype) - 1
        if self.vae is None:
            return sample
        encoded = self.vae.encode(sample.to(self.vae.dtype))
        if self._kind == "kandinsky22":
            return encoded.latents.to(sample)
        return self.vae.config.scaling_factor * encoded.latent_dist.mode().to(sample)

    def _enlarge(
        self,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        progress_bar: object,
    ) -> torch.Tensor:
        """Karlo's second stage, by its own scheduler. The last step, at timestep 0, has a network of its own."""
        size = self.super_res_first.config.sample_size
        small = nn.functional.interpolate(sample.clamp(-1, 1), (size, size), mode="bicubic", antialias=True)
        self.super_res_scheduler.set_timesteps(_SUPER_RES_STEPS, device=sample.device)
        timesteps = self.super_res_scheduler.timesteps
        sample = self._prepare_latents(None, small.shape, generator)
        for i, timestep in enumerate(timesteps):
            is_last = i + 1 == len(timesteps)
            unet = self.super_res_last if is_last else self.super_res_first
            model_output = unet(torch.cat([sample, small], dim=1).to(unet.dtype), timestep).sample.to(sample.dtype)
            after = None if is_last else timesteps[i + 1]
            step = self.super_res_scheduler.step(
                model_output, timestep, sample, prev_timestep=after, generator=generator
            )
            sample = step.prev_sample
            progress_bar.update()
        return sample

    def _output(
        self,
        latents: torch.Tensor,
        image_embeds: torch.Tensor,
        noise: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        progress_bar: object,
        output_type: str,
        return_dict: bool,
    ) -> UnCLIPTextToImagePipelineOutput | tuple:
        images = latents
        if output_type != "latent":
            if self._kind == "kandinsky22":
                images = self.vae.decode(latents.to(self.vae.dtype), force_not_quantize=True).sample.to(latents)
            elif self.vae is not None:
                images = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
                images = self.vae.decode(images).sample.to(latents)
            elif self.super_res_first is not None:
                images = self._enlarge(latents, generator, progress_bar)
        if not images.isfinite().all():
            raise ValueError("the images are not finite: run the networks in float32, and see if their weights are.")
        if output_type != "latent":
            images = self._postprocessor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, image_embeds, noise
        return UnCLIPTextToImagePipelineOutput(images=images, image_embeds=image_embeds, noise=noise)

    def _num_steps_to_enlarge(self, output_type: str) -> int:
        return 0 if self.super_res_first is None or output_type == "latent" else _SUPER_RES_STEPS

    @property
    def _latents_shape(self) -> tuple[int, int, int]:
        return (self.decoder.config.in_channels, *[self.decoder.config.sample_size] * 2)

    # -- what a user calls

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image_embeds: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        eta: float = 0.0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 1.0,
        num_candidates: int = 2,
        rerank: str | None = "cosine",
        num_images_per_prompt: int = 1,
        prior_latents: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["UnCLIPTextToImagePipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> UnCLIPTextToImagePipelineOutput | tuple:
        r"""
        Paints what the prompt says: the prior draws some image embeddings for it, that which is most like the text is
        decoded. Or decodes image embeddings that are given.

        Guidance (https://huggingface.co/papers/2207.12598) is `u + s (c - u)`, in the prior of the clean embedding
        with `u` for `negative_prompt`, in the decoder of the noise with `u` for no image. Draws: `z_T` of all
        candidates, what the prior's scheduler draws, `x_T`, with `eta` the noise of each step but the last, and what
        Karlo draws to enlarge. Karlo and Stable unCLIP read the prompt in the decoder too, and for `u` the negative
        one; empty ones where embeddings are given.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to see.
            image_embeds (`torch.Tensor`, *optional*): `z_i` in place of a prompt, shape `(batch, dim)`.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What guidance of the prior goes away from, and that of decoders that read the text; one for all or
                one each.
            num_inference_steps (`int`, *optional*, defaults to 50): Steps of the decoder.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                `s` of the decoder; 1 is no guidance, and half the work. The paper's value for COCO is 1.25.
            eta (`float`, *optional*, defaults to 0.0): Noise of the decoder's steps: 0 is DDIM, 1 is DDPM.
            prior_num_inference_steps (`int`, *optional*, defaults to 25): Steps of the prior.
            prior_guidance_scale (`float`, *optional*, defaults to 1.0):
                `s` of the prior; more than 1 loses diversity in what the text leaves open.
            num_candidates (`int`, *optional*, defaults to 2): How many embeddings are drawn for an image.
            rerank (`str`, *optional*, defaults to `"cosine"`):
                By what the best of them is chosen, likeness to the text's embedding: `"cosine"`, or the paper's
                `"dot"`, which prefers long embeddings. `None` takes the first one.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images per prompt or embedding.
            prior_latents (`torch.Tensor`, *optional*):
                `z_T`, shape `(prompts * num_images_per_prompt * num_candidates, dim)`.
            latents (`torch.Tensor`, *optional*):
                `x_T`, such as that of [`~UnCLIPTextToImagePipeline.invert`], shape
                `(prompts * num_images_per_prompt, channels, height, width)`.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per result, which then
                depends on no other.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (values in [0, 1]), or `"latent"`: what the decoder made, which is pixels in
                [-1, 1], not clipped and with Karlo not enlarged, or what `vae` makes an image of.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`UnCLIPTextToImagePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step of the decoder; it may return
                `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` and `"pred_original_sample"` is in `callback_kwargs`.

        Returns:
            [`UnCLIPTextToImagePipelineOutput`]: Images, what was decoded, and from which noise.

        Raises:
            TypeError: For prompts of another type.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPTextToImagePipeline

        >>> pipe = UnCLIPTextToImagePipeline.from_pretrained("my-unclip")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe("a red three", num_inference_steps=2, prior_num_inference_steps=2, output_type="pt")
        >>> output.images.shape, output.image_embeds.shape
        (torch.Size([1, 3, 16, 16]), torch.Size([1, 8]))

        >>> # the same again, from what was decoded
        >>> again = pipe(
        ...     image_embeds=output.image_embeds, latents=output.noise, num_inference_steps=2, output_type="pt"
        ... )
        >>> torch.equal(again.images, output.images)
        True

        ```
        """
        # 1. Check inputs
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        self._check_numbers(
            guidance_scale,
            eta,
            num_inference_steps=num_inference_steps,
            prior_num_inference_steps=prior_num_inference_steps,
            num_candidates=num_candidates,
            num_images_per_prompt=num_images_per_prompt,
        )
        if not math.isfinite(prior_guidance_scale):
            raise ValueError(f"`prior_guidance_scale` is {prior_guidance_scale}, but must be finite.")
        if rerank not in ("cosine", "dot", None):
            raise ValueError(f"`rerank` is {rerank!r}, but must be 'cosine', 'dot' or `None`.")
        if (prompt is None) == (image_embeds is None):
            raise ValueError("`prompt` and `image_embeds` exclude each other: give one of them.")
        dim = self._embedding_dim
        prompts = negative_prompts = [""]
        if image_embeds is not None:
            if not isinstance(image_embeds, torch.Tensor):
                raise TypeError(f"`image_embeds` is a {type(image_embeds).__name__}, but must be a tensor.")
            if image_embeds.ndim != 2 or image_embeds.shape[1] != dim or not image_embeds.isfinite().all():
                raise ValueError(
                    f"`image_embeds` has shape {tuple(image_embeds.shape)}, but must be (batch, {dim}) and finite: "
                    "give embeddings of the CLIP that this pipeline was made with."
                )
            for name, value in (("prior_latents", prior_latents), ("negative_prompt", negative_prompt or None)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` is given, but with `image_embeds` no prior runs, and no text is read: leave it out."
                    )
            batch_size = len(image_embeds) * num_images_per_prompt
        else:
            prompts = self._check_prompts(prompt)
            negative_prompts = self._check_prompts(
                "" if negative_prompt is None else negative_prompt, "negative_prompt"
            )
            if self.prior is None:
                raise ValueError(
                    "`prompt` was given, but this pipeline has no `prior`: give `image_embeds`, or put one in, by "
                    "`UnCLIPTextToImagePipeline.from_decoder(pipe, prior_pipe)`."
                )
            if len(negative_prompts) not in (1, len(prompts)):
                raise ValueError(
                    f"`negative_prompt` has {len(negative_prompts)} entries for {len(prompts)} prompts: give one for "
                    "all, or one each."
                )
            if any(negative_prompts) and prior_guidance_scale == 1 and (self._reader is None or guidance_scale == 1):
                logger.warning("`negative_prompt` has no effect with `prior_guidance_scale=1`: give another scale.")
            std = self.prior.clip_std
            if not (std > 0).all() or not std.isfinite().all() or not self.prior.clip_mean.isfinite().all():
                raise ValueError(
                    "`prior.clip_std` is not positive everywhere, or a statistic is not finite, as in a prior that "
                    "was never trained: set `clip_mean` and `clip_std` to those of CLIP's embeddings before training."
                )
            check_prior_scheduler(self.prior_scheduler, prior_num_inference_steps)
            batch_size = len(prompts) * num_images_per_prompt
            self._check_latents(prior_latents, (batch_size * num_candidates, dim), "prior_latents")
        self._check_generator(generator, batch_size)
        self._check_latents(latents, (batch_size, *self._latents_shape))

        total = num_inference_steps + self._num_steps_to_enlarge(output_type)
        if prompt is not None:
            self.prior_scheduler.set_timesteps(prior_num_inference_steps, device=self._execution_device)
            total += len(self.prior_scheduler.timesteps)
        with self.progress_bar(total=total) as progress_bar:
            # 2. From text to the embedding of an image
            if prompt is not None:
                each = num_images_per_prompt * num_candidates
                texts = [prompts]
                if prior_guidance_scale != 1:
                    texts.append(negative_prompts * (len(prompts) // len(negative_prompts)))
                conditions = [
                    tuple(part.repeat_interleave(each, dim=0) for part in self.encode_prompt(text)) for text in texts
                ]
                generators = generator
                if generator is not None:  # row by row, so that one for all and one each draw the same for one image
                    each_one = generator if isinstance(generator, list) else [generator] * batch_size
                    generators = [one for one in each_one for _ in range(num_candidates)]
                prior_latents = self._prepare_latents(prior_latents, (len(prompts) * each, dim), generators)
                image_embeds = self._sample_prior(
                    conditions, prior_latents, prior_guidance_scale, num_candidates, rerank, generators, progress_bar
                )
            else:
                image_embeds = image_embeds.to(self._execution_device, self._state_dtype)
                image_embeds = image_embeds.repeat_interleave(num_images_per_prompt, dim=0)

            # 3. From the embedding to an image
            noise = self._prepare_latents(latents, (batch_size, *self._latents_shape), generator)
            latents = self._decode_loop(
                noise,
                image_embeds,
                num_inference_steps,
                guidance_scale,
                progress_bar,
                eta,
                generator,
                prompts,
                negative_prompts,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            return self._output(latents, image_embeds, noise, generator, progress_bar, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 50,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        The noise `x_T` that the decoder, told `z_i`, makes these images of: DDIM backwards (section 3 of the paper).
        With the same number of steps, `eta=0` and `guidance_scale=1`, decoding it gives the images again, the better
        the more steps.

        Args:
            image: Square images, as PIL images, or arrays or tensors with values in [0, 1], of any size.
            num_inference_steps (`int`, *optional*, defaults to 50): Number of moves.
            image_embeds (`torch.Tensor`, *optional*): `z_i`, one per image; by default the images' own.

        Returns:
            `torch.Tensor`: `x_T`, shape `(batch, channels, height, width)`.

        Raises:
            TypeError: For types that cannot be used.
            ValueError: As [`~UnCLIPTextToImagePipeline.encode_image`]; for a number of steps that is out of range, or
                embeddings of another shape.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPTextToImagePipeline

        >>> pipe = UnCLIPTextToImagePipeline.from_pretrained("my-unclip")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> image = torch.rand(1, 3, 16, 16)
        >>> x_T = pipe.invert(image, num_inference_steps=10)
        >>> z_i = pipe.encode_image(image)
        >>> again = pipe(image_embeds=z_i, latents=x_T, num_inference_steps=10, guidance_scale=1.0, output_type="pt")
        >>> again.images.shape
        torch.Size([1, 3, 16, 16])

        ```
        """
        self._check_output("pt")
        self._check_numbers(1.0, num_inference_steps=num_inference_steps)
        images = self._prepare_images(image)
        dim = self._embedding_dim
        self._check_latents(image_embeds, (len(images), dim), "image_embeds")
        if image_embeds is None:
            image_embeds = self._embed_images(images)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            noise = self._invert_loop(self._to_sample(images), image_embeds, num_inference_steps, progress_bar)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def variations(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        num_images_per_prompt: int = 1,
        noise: str = "inverted",
        eta: float = 1.0,
        num_inference_steps: int = 50,
        num_inversion_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> UnCLIPTextToImagePipelineOutput | tuple:
        r"""
        Other images that say the same (section 3.1 of the paper): from `(z_i, x_T)`, decoded with noise.

        Args:
            image: Square images, as PIL images, or arrays or tensors with values in [0, 1], of any size.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Variations of each.
            noise (`str`, *optional*, defaults to `"inverted"`):
                `"inverted"` starts from the noise that is inferred from the image, `"white"` from a new one (as Karlo
                does).
            eta (`float`, *optional*, defaults to 1.0): The more, the less of `x_T` remains; 0 gives the image again.
            num_inference_steps (`int`, *optional*, defaults to 50): Steps of the decoder.
            num_inversion_steps (`int`, *optional*): Steps of the inversion; by default as many.
            guidance_scale (`float`, *optional*, defaults to 1.0): Of the decoder, for what `z_i` says.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per result.
            output_type, return_dict: As in [`~UnCLIPTextToImagePipeline.__call__`].

        Returns:
            [`UnCLIPTextToImagePipelineOutput`]: The variations of the first image, of the second one, ...

        Raises:
            TypeError: For types that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs.
        """
        num_inversion_steps = num_inference_steps if num_inversion_steps is None else num_inversion_steps
        self._check_output(output_type)
        self._check_numbers(
            guidance_scale,
            eta,
            num_inference_steps=num_inference_steps,
            num_inversion_steps=num_inversion_steps,
            num_images_per_prompt=num_images_per_prompt,
        )
        if noise not in ("inverted", "white"):
            raise ValueError(f"`noise` is {noise!r}, but must be 'inverted' or 'white'.")
        images = self._prepare_images(image)
        batch_size = len(images) * num_images_per_prompt
        self._check_generator(generator, batch_size)

        embeds = self._embed_images(images)
        total = num_inference_steps + num_inversion_steps * (noise == "inverted")
        total += self._num_steps_to_enlarge(output_type)
        with self.progress_bar(total=total) as progress_bar:
            if noise == "inverted":
                start = self._invert_loop(self._to_sample(images), embeds, num_inversion_steps, progress_bar)
                start = start.repeat_interleave(num_images_per_prompt, dim=0)
            else:
                start = self._prepare_latents(None, (batch_size, *self._latents_shape), generator)
            embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)
            latents = self._decode_loop(
                start, embeds, num_inference_steps, guidance_scale, progress_bar, eta, generator
            )
            return self._output(latents, embeds, start, generator, progress_bar, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Image.Image | np.ndarray | torch.Tensor,
        image_b: Image.Image | np.ndarray | torch.Tensor,
        num: int = 8,
        noise: str = "slerp",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> UnCLIPTextToImagePipelineOutput | tuple:
        r"""
        A path between two images (section 3.2 of the paper): the direction of `z_i` goes along the great circle
        between those of the two, its length by equal steps.

        Args:
            image_a, image_b: One square image each, as in [`~UnCLIPTextToImagePipeline.variations`].
            num (`int`, *optional*, defaults to 8): Number of images, the two ends included; at least 2.
            noise (`str`, *optional*, defaults to `"slerp"`):
                `"slerp"`: `x_T` goes along the great circle too, from one inferred noise to the other, so that the
                ends are the two images. `"fixed"`: all have one random `x_T` (the paper's figure 4).
            num_inference_steps (`int`, *optional*, defaults to 50): Steps of the decoder, and of the inversion.
            guidance_scale (`float`, *optional*, defaults to 1.0): Of the decoder; the ends are the images with 1.
            generator (`torch.Generator`, *optional*): For the random `x_T`.
            output_type, return_dict: As in [`~UnCLIPTextToImagePipeline.__call__`].

        Returns:
            [`UnCLIPTextToImagePipelineOutput`]: `num` images from `image_a` to `image_b`.

        Raises:
            TypeError: For types that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs.
        """
        self._check_output(output_type)
        self._check_numbers(guidance_scale, num_inference_steps=num_inference_steps)
        if not isinstance(num, int) or num < 2:
            raise ValueError(f"`num` is {num!r}, but a path has at least its 2 ends.")
        if noise not in ("slerp", "fixed"):
            raise ValueError(f"`noise` is {noise!r}, but must be 'slerp' or 'fixed'.")
        self._check_generator(generator, 1)
        ends = [self._prepare_images(image_a, "image_a", 1), self._prepare_images(image_b, "image_b", 1)]

        embeds = torch.cat([self._embed_images(end) for end in ends])
        thetas = torch.linspace(0, 1, num, device=embeds.device, dtype=self._state_dtype)
        lengths = embeds.to(thetas).norm(dim=1, keepdim=True)
        path = slerp(*(embeds.to(thetas) / lengths).split(1), thetas)[:, 0]
        path = path * (lengths[0] + thetas[:, None] * (lengths[1] - lengths[0]))
        total = num_inference_steps * (1 + (noise == "slerp")) + self._num_steps_to_enlarge(output_type)
        with self.progress_bar(total=total) as progress_bar:
            if noise == "slerp":
                samples = torch.cat([self._to_sample(end) for end in ends])
                noises = self._invert_loop(samples, embeds, num_inference_steps, progress_bar)
                start = slerp(noises[:1], noises[1:], thetas)[:, 0]
            else:
                start = self._prepare_latents(None, (1, *self._latents_shape), generator).expand(num, -1, -1, -1)
            latents = self._decode_loop(start, path, num_inference_steps, guidance_scale, progress_bar)
            return self._output(latents, path, start, generator, progress_bar, output_type, return_dict)

    @torch.no_grad()
    def text_diff(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        prompt: str,
        source_prompt: str | None = "a photo",
        theta_max: float = 0.5,
        num: int = 8,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> UnCLIPTextToImagePipelineOutput | tuple:
        r"""
        Edits an image by a text (section 3.3 of the paper): `z_i` turns towards the difference of two texts,
        `slerp(z_i, z_d, theta)` with `z_d = norm(z_t - z_t0)`, in lengths of `z_i`, while `x_T` stays that of the
        image.

        Args:
            image: One square image, as in [`~UnCLIPTextToImagePipeline.variations`].
            prompt (`str`): What it is to become.
            source_prompt (`str`, *optional*, defaults to `"a photo"`):
                What it is now, or something that says nothing; `None` turns to the text itself.
            theta_max (`float`, *optional*, defaults to 0.5):
                How far to turn, as a share of the way to `z_d`; 0.25 to 0.5 in the paper.
            num (`int`, *optional*, defaults to 8): Number of images, the first at 0, the last at `theta_max`.
            num_inference_steps (`int`, *optional*, defaults to 50): Steps of the decoder, and of the inversion.
            guidance_scale (`float`, *optional*, defaults to 1.0): Of the decoder; the first is the image with 1.
            generator (`torch.Generator`, *optional*): For what Karlo draws to enlarge; no other decoder draws here.
            output_type, return_dict: As in [`~UnCLIPTextToImagePipeline.__call__`].

        Returns:
            [`UnCLIPTextToImagePipelineOutput`]: `num` images.

        Raises:
            TypeError: For types that cannot be used.
            ValueError: For arguments that do not fit each other or are out of range, before a model runs; for two
                texts with the same embedding.
        """
        self._check_output(output_type)
        self._check_numbers(guidance_scale, num_inference_steps=num_inference_steps, num=num)
        self._check_generator(generator, 1)
        if not 0 <= theta_max <= 1:
            raise ValueError(f"`theta_max` is {theta_max}, but must lie in [0, 1]; the paper's are 0.25 to 0.5.")
        texts = [prompt] if source_prompt is None else [prompt, source_prompt]
        for name, text in zip(("prompt", "source_prompt"), texts, strict=False):
            if not isinstance(text, str):
                raise TypeError(f"`{name}` is {text!r}, but must be a `str`.")
        self._check_prompts(texts)
        images = self._prepare_images(image, count=1)

        embeds = self._embed_images(images)
        thetas = torch.linspace(0, theta_max, num, device=embeds.device, dtype=self._state_dtype)
        z_t, *z_t0 = self.encode_prompt(texts)[0].to(thetas).split(1)
        direction = z_t - z_t0[0] if z_t0 else z_t
        if direction.norm() <= 1e-6 * z_t.norm():
            raise ValueError(f"`prompt` and `source_prompt` have the same embedding: {texts} do not differ for CLIP.")
        length = embeds.to(thetas).norm()
        path = length * slerp(embeds.to(thetas) / length, direction / direction.norm(), thetas)[:, 0]
        total = 2 * num_inference_steps + self._num_steps_to_enlarge(output_type)
        with self.progress_bar(total=total) as progress_bar:
            start = self._invert_loop(self._to_sample(images), embeds, num_inference_steps, progress_bar)
            start = start.expand(num, -1, -1, -1)
            latents = self._decode_loop(start, path, num_inference_steps, guidance_scale, progress_bar)
            return self._output(latents, path, start, generator, progress_bar, output_type, return_dict)
