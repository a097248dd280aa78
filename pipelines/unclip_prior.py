r"""The prior of unCLIP (DALL-E 2): image embeddings from text, for any CLIP, and what to do with them.

*Hierarchical Text-Conditional Image Generation with CLIP Latents*, Ramesh et al., 2022
(https://huggingface.co/papers/2204.06125). A CLIP's image embedding `z_i` is drawn given its text embedding `z_t` by a
diffusion model whose network is a causal transformer, trained on `E_t |f(z_i^(t), t, y) - z_i|^2`.

This file is complete in itself: schedule, network, pipeline. Notation: `z_i^(t) = sqrt(abar_t) x_0 + sqrt(1 - abar_t)
eps`, where `x_0 = (z_i - clip_mean) / clip_std` has about unit variance, `abar_t` is the cumulative product of
`1 - beta_t` on the cosine schedule, and timestep 0 is the least noisy one. d is the width of CLIP's embeddings, h that
of the hidden states of its text encoder, L the number of tokens.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
    PriorTransformer,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    BatchEncoding,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})

logger = logging.get_logger(__name__)


# ------------------------------------------------------------------------------------------------------------ schedule

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


def default_prior_scheduler() -> DPMSolverMultistepScheduler:
    r"""
    DPM-Solver++ (2M) on the cosine schedule for a network that predicts `x_0`. At 25 steps it keeps 99.4 % of the
    variance, where ancestral sampling keeps 81 % even with an exact network.

    Returns:
        [`DPMSolverMultistepScheduler`]: A new one.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.unclip_prior import default_prior_scheduler

    >>> default_prior_scheduler().config.beta_schedule
    'squaredcos_cap_v2'

    ```
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
    )


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


def fix_stable_unclip_scheduler(scheduler: SchedulerMixin | Mapping[str, Any]) -> DDPMScheduler:
    r"""
    The scheduler that Karlo's prior was trained with, from what is found in its repo, for `prior_scheduler` of
    [`StableUnCLIPPipeline`] and for [`UnCLIPPriorPipeline`]. It puts two things right that give wrong embeddings
    without a sign of it: `DDPMScheduler.from_config(...)` on that repo's config, as the documentation of diffusers
    says, has linear betas, because the config does not name its schedule; and [`UnCLIPScheduler`] left in place is
    never told by `StableUnCLIPPipeline` how far a step goes.

    Args:
        scheduler (`SchedulerMixin` or `Mapping`):
            A scheduler or its config: `UnCLIPScheduler`, its config, or what was made from it.

    Returns:
        [`DDPMScheduler`]: Cosine schedule, steps of Karlo's grid, small fixed variance; the clipping is kept.

    Raises:
        ValueError: If the config is not that of a network which predicts `x_0`.

    Example:

    ```py
    >>> from diffusers import DDPMScheduler, UnCLIPScheduler
    >>> from diffusers_ext.pipelines.unclip_prior import fix_stable_unclip_scheduler

    >>> config = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0).config
    >>> DDPMScheduler.from_config(config).config.beta_schedule
    'linear'
    >>> fix_stable_unclip_scheduler(config).config.beta_schedule
    'squaredcos_cap_v2'

    ```
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    # Where the config says nothing, what `UnCLIPScheduler` would do holds.
    if (prediction := config.get("prediction_type", "epsilon")) != "sample":
        raise ValueError(
            f"`scheduler` has `prediction_type`={prediction!r}, but a prior predicts the sample: give that of "
            "the prior, not that of a decoder."
        )
    fixed = DDPMScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        variance_type="fixed_small_log",
        timestep_spacing="linspace",
        clip_sample=config.get("clip_sample", True),
        clip_sample_range=config.get("clip_sample_range", 1.0),
    )
    check_prior_scheduler(fixed)  # which warns of a limit for pixels
    return fixed


# ------------------------------------------------------------------------------------------------------------- network


class UnCLIPPriorTransformer(PriorTransformer):
    r"""
    diffusers' [`PriorTransformer`] for CLIPs whose text encoder's hidden states are not as wide as its embeddings
    (such as ResNet-50's: 512 and 1024). Where they are, take `PriorTransformer` itself, which more programs can load.

    Args:
        num_attention_heads (`int`, *optional*, defaults to 32): Heads per layer.
        attention_head_dim (`int`, *optional*, defaults to 64): Width of a head.
        num_layers (`int`, *optional*, defaults to 20): Number of layers.
        embedding_dim (`int`, *optional*, defaults to 768): d.
        num_embeddings (`int`, *optional*, defaults to 77): L.
        additional_embeddings (`int`, *optional*, defaults to 4):
            Further tokens: text embedding, timestep, noisy image embedding, query.
        dropout (`float`, *optional*, defaults to 0.0): As in [`PriorTransformer`], like all that follow but the last.
        time_embed_act_fn (`str`, *optional*, defaults to `"silu"`): Activation of the time embedding.
        norm_in_type (`str`, *optional*): `"layer"` or nothing.
        embedding_proj_norm_type (`str`, *optional*): `"layer"` or nothing.
        encoder_hid_proj_type (`str`, *optional*, defaults to `"linear"`): `"linear"` or nothing.
        added_emb_type (`str`, *optional*, defaults to `"prd"`): `"prd"` for the query token.
        time_embed_dim (`int`, *optional*): Width of the time embedding's hidden layer.
        embedding_proj_dim (`int`, *optional*): Width of the text embedding, d by default.
        clip_embed_dim (`int`, *optional*): Width of what is predicted, d by default.
        encoder_hid_dim (`int`, *optional*): h, d by default.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import UnCLIPPriorTransformer

    >>> prior = UnCLIPPriorTransformer(2, 8, 1, embedding_dim=6, num_embeddings=5, encoder_hid_dim=12)
    >>> mask = torch.ones(1, 5, dtype=torch.bool)
    >>> noisy, text_embeds, hidden_states = torch.zeros(1, 6), torch.zeros(1, 6), torch.zeros(1, 5, 12)
    >>> prior(noisy, 999, text_embeds, hidden_states, mask).predicted_image_embedding.shape
    torch.Size([1, 6])

    ```
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_layers: int = 20,
        embedding_dim: int = 768,
        num_embeddings: int = 77,
        additional_embeddings: int = 4,
        dropout: float = 0.0,
        time_embed_act_fn: str = "silu",
        norm_in_type: str | None = None,
        embedding_proj_norm_type: str | None = None,
        encoder_hid_proj_type: str | None = "linear",
        added_emb_type: str | None = "prd",
        time_embed_dim: int | None = None,
        embedding_proj_dim: int | None = None,
        clip_embed_dim: int | None = None,
        encoder_hid_dim: int | None = None,
    ) -> None:
        super().__init__(
            num_attention_heads,
            attention_head_dim,
            num_layers,
            embedding_dim,
            num_embeddings,
            additional_embeddings,
            dropout,
            time_embed_act_fn,
            norm_in_type,
            embedding_proj_norm_type,
            encoder_hid_proj_type,
            added_emb_type,
            time_embed_dim,
            embedding_proj_dim,
            clip_embed_dim,
        )
        if encoder_hid_dim is not None and self.encoder_hidden_states_proj is not None:
            self.encoder_hidden_states_proj = nn.Linear(encoder_hid_dim, num_attention_heads * attention_head_dim)


def init_prior(
    prior: PriorTransformer | ModelMixin,
    image_embeds: torch.Tensor,
    embed_norm: str = "standardize",
    embed_scale: float | None = None,
) -> None:
    r"""
    Makes a new prior fit for training, in place: diffusers leaves the query token and the positions at zero, and the
    statistics too, so that all that it would ever sample is zero. Tokens are drawn from `N(0, 0.01^2)`, as in Karlo;
    statistics are set so that `x_0 = (z_i - clip_mean) / clip_std` has about unit variance, and frozen, since no
    gradient reaches them.

    Args:
        prior ([`PriorTransformer`]): The network.
        image_embeds (`torch.Tensor`): Image embeddings of the training data as CLIP gives them, shape `(n, d)`.
        embed_norm (`str`, *optional*, defaults to `"standardize"`):
            `"standardize"`: mean and standard deviation per dimension. `"l2"`: for training on `z_i / |z_i|`, which is
            multiplied by `embed_scale`.
        embed_scale (`float`, *optional*):
            For `"l2"`: `sqrt(d)` by default. The paper's 17.2 for d = 1024 is `0.5375 sqrt(d)`.

    Raises:
        ValueError: For embeddings of another width, fewer than two, not finite, or constant in a dimension; for an
            unknown `embed_norm`, and a scale where none is used.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import PriorTransformer
    >>> from diffusers_ext.pipelines.unclip_prior import init_prior

    >>> prior = PriorTransformer(2, 8, 1, embedding_dim=6, num_embeddings=5)
    >>> init_prior(prior, 3 * torch.randn(1000, 6) + 1)
    >>> bool((prior.clip_std - 3).abs().max() < 0.5), prior.clip_std.requires_grad
    (True, False)

    ```
    """
    width = prior.clip_std.shape[-1]
    if image_embeds.ndim != 2 or image_embeds.shape[1] != width or len(image_embeds) < 2:
        raise ValueError(
            f"`image_embeds` has shape {tuple(image_embeds.shape)}, but must be (n, {width}) with n of at least 2: "
            "give those of the training data."
        )
    embeds = image_embeds.detach().double()
    if not embeds.isfinite().all():
        row = (~embeds.isfinite().all(dim=1)).nonzero()[0].item()
        raise ValueError(f"`image_embeds` is not finite in row {row}: leave such images out.")
    if embed_norm == "standardize":
        if embed_scale is not None:
            raise ValueError(f"`embed_scale` is {embed_scale}, but belongs to `embed_norm='l2'`: leave it out.")
        mean, std = embeds.mean(dim=0), embeds.std(dim=0)
        constant = (std <= 1e-6 * embeds.abs().amax(dim=0)).nonzero().flatten()  # where rounding is all that varies
        if len(constant):
            raise ValueError(
                f"`image_embeds` is constant in dimension {constant[0].item()}: give those of more images."
            )
    elif embed_norm == "l2":
        scale = math.sqrt(width) if embed_scale is None else embed_scale
        if not 0 < scale < math.inf:
            raise ValueError(f"`embed_scale` is {embed_scale}, but must be positive.")
        mean, std = torch.zeros_like(embeds[0]), torch.full_like(embeds[0], 1 / scale)
    else:
        raise ValueError(f"`embed_norm` is {embed_norm!r}, but must be 'standardize' or 'l2'.")
    with torch.no_grad():
        for tokens in (prior.prd_embedding, prior.positional_embedding):
            if tokens is not None:
                tokens.normal_(std=0.01)
        prior.clip_mean.copy_(mean)
        prior.clip_std.copy_(std)
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- interpolation


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


# ---------------------------------------------------------------------------------------------------------- images


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


# ---------------------------------------------------------------------------------------------------------- pipeline


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


def likeness(image_embeds: torch.Tensor, text_embeds: torch.Tensor, mode: str = "cosine") -> torch.Tensor:
    r"""
    How well embeddings of images go with embeddings of texts: `"cosine"`, or `"dot"`, the length of `z_i` along `z_t`
    (section 2.2 of https://huggingface.co/papers/2204.06125 compares two draws by `z_i . z_t`).

    Args:
        image_embeds (`torch.Tensor`): `z_i`, shape `(..., d)`.
        text_embeds (`torch.Tensor`): `z_t`, a shape that can be broadcast to it.
        mode (`str`, *optional*, defaults to `"cosine"`): `"cosine"` or `"dot"`.

    Returns:
        `torch.Tensor`: Shape `(...)`.
    """
    dots = (image_embeds * nn.functional.normalize(text_embeds, dim=-1)).sum(dim=-1)
    return dots if mode == "dot" else dots / image_embeds.norm(dim=-1).clamp(min=1e-12)


@dataclass
class UnCLIPPriorPipelineOutput(BaseOutput):
    """
    Output of [`UnCLIPPriorPipeline`]; arrays instead of tensors with `output_type="np"`. A batch is
    `prompts * num_images_per_prompt`, where the images of a prompt follow each other.

    Args:
        image_embeds (`torch.Tensor` or `np.ndarray`):
            The embeddings as CLIP would give them (of about unit length for a prior that was trained on such), shape
            `(batch, d)`: the best of their candidates.
        negative_image_embeds (`torch.Tensor` or `np.ndarray`):
            What Kandinsky's decoder goes away from, shape `(batch, d)`.
        text_embeds (`torch.Tensor` or `np.ndarray`): The embeddings of the prompts, shape `(batch, d)`.
        scores (`torch.Tensor`, `np.ndarray` or `None`):
            What each candidate was chosen by, shape `(batch, num_candidates)`; the cosine where nothing was chosen;
            `None` if texts' embeddings have another width.
        candidates (`torch.Tensor` or `np.ndarray`): All that were drawn, shape `(batch, num_candidates, d)`.
    """

    image_embeds: torch.Tensor | np.ndarray
    negative_image_embeds: torch.Tensor | np.ndarray
    text_embeds: torch.Tensor | np.ndarray
    scores: torch.Tensor | np.ndarray | None
    candidates: torch.Tensor | np.ndarray


class UnCLIPPriorPipeline(HubMixin, DiffusionPipeline):
    r"""
    Image embeddings from text with the diffusion prior of unCLIP (https://huggingface.co/papers/2204.06125).

    Args:
        prior ([`PriorTransformer`]): The network, with the statistics of the image embeddings.
        text_encoder ([`~transformers.CLIPTextModelWithProjection`], *optional*):
            CLIP's text encoder. Without it calls need `prompt_embeds`.
        tokenizer ([`~transformers.CLIPTokenizer`], *optional*): Its tokenizer.
        scheduler ([`SchedulerMixin`]):
            [`DPMSolverMultistepScheduler`], [`UniPCMultistepScheduler`], [`DDPMScheduler`], [`DDIMScheduler`],
            [`EulerDiscreteScheduler`] or [`UnCLIPScheduler`], see [`check_prior_scheduler`].
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*): The same CLIP's image encoder.
        image_processor ([`~transformers.CLIPImageProcessor`], *optional*):
            How images get to the size and range of `image_encoder`. By default as OpenAI's CLIP has them.
        embed_norm (`str`, *optional*, defaults to `"standardize"`):
            What the prior was trained on, see [`init_prior`]: `"standardize"` for embeddings as CLIP gives them,
            `"l2"` for embeddings of unit length.
        clip_model_id (`str`, *optional*): Which CLIP this is, for those who look for a decoder.

    Raises:
        ValueError: If parts do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->prior"
    _exclude_from_cpu_offload = ["prior"]  # its statistics are used outside of its forward pass
    _optional_components = ["text_encoder", "tokenizer", "image_encoder", "image_processor"]
    _callback_tensor_inputs = ["latents", "predicted_image_embedding"]

    def __init__(
        self,
        prior: PriorTransformer | ModelMixin,
        text_encoder: CLIPTextModelWithProjection | PreTrainedModel | None,
        tokenizer: CLIPTokenizer | PreTrainedTokenizerBase | None,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | PreTrainedModel | None = None,
        image_processor: ImageProcessingMixin | None = None,
        embed_norm: str = "standardize",
        clip_model_id: str | None = None,
    ) -> None:
        super().__init__()
        if embed_norm not in ("standardize", "l2"):
            raise ValueError(f"`embed_norm` is {embed_norm!r}, but must be 'standardize' or 'l2'.")
        config = prior.config
        width = config.embedding_dim
        widths = [("`prior` predicts", config.get("clip_embed_dim") or width, width)]
        if text_encoder is not None:
            text = text_encoder.config
            expected = config.get("embedding_proj_dim") or width
            widths.append(("`text_encoder` gives embeddings of", text.projection_dim, expected))
            if config.get("encoder_hid_proj_type", "linear") is not None:
                expected = config.get("encoder_hid_dim") or width
                widths.append(("`text_encoder` gives hidden states of", text.hidden_size, expected))
        if image_encoder is not None:
            widths.append(("`image_encoder` gives embeddings of", image_encoder.config.projection_dim, width))
        for what, found, expected in widths:
            if found != expected:
                raise ValueError(
                    f"{what} width {found}, but `prior` takes {expected}: take the parts that were trained together; "
                    "for a new prior, `UnCLIPPriorTransformer` has `encoder_hid_dim` for hidden states of any width."
                )
        if text_encoder is not None and tokenizer is not None:
            check_tokenizer(tokenizer, text_encoder)
            if tokenizer.model_max_length != config.num_embeddings:
                raise ValueError(
                    f"`prior` reads {config.num_embeddings} tokens, but `tokenizer` cuts at "
                    f"{tokenizer.model_max_length}: set `tokenizer.model_max_length`, or make a new prior with "
                    "another `num_embeddings`."
                )
        check_prior_scheduler(scheduler)
        self.register_modules(
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        self.register_to_config(embed_norm=embed_norm, clip_model_id=clip_model_id)

    # -- texts and images

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Encodes texts with CLIP. What is beyond the context is left out, and a warning says what that is. What looks
        like a special token is text.

        Args:
            prompt (`str` or `list[str]`): The texts.

        Returns:
            A tuple of the embeddings `z_t`, shape `(batch, d)`, the text encoder's last hidden states, shape `(batch,
            L, h)`, and the mask of tokens, bool of shape `(batch, L)`, with `False` for padding.

        Raises:
            TypeError: For anything else than texts.
            ValueError: If there are none, if the tokenizer reads a part of one as the end of the text, as some do with
                what they do not know, or if the pipeline has no text encoder.

        Example:

        ```py
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> text_embeds, hidden_states, mask = pipe.encode_prompt(["a red three", "a blue four"])
        >>> text_embeds.shape, hidden_states.shape, mask.shape
        (torch.Size([2, 6]), torch.Size([2, 16, 6]), torch.Size([2, 16]))

        ```
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`prompt` is {texts!r}, but must be a `str` or a list of them.")
        if not texts:
            raise ValueError("`prompt` is empty: give at least one text.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no `text_encoder` and `tokenizer`: give `prompt_embeds`, or load them."
            )
        tokens = tokenize(self.tokenizer, list(texts), self.prior.config.num_embeddings)
        device = self._execution_device
        output = self.text_encoder(tokens.input_ids.to(device))
        return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool().to(device)

    @torch.no_grad()
    def encode_image(self, images: Image.Image | np.ndarray | torch.Tensor | list) -> torch.Tensor:
        r"""
        Encodes images with CLIP: resized to its size by the shorter side, cut to the square in the middle, shifted and
        scaled as CLIP was trained, unless the pipeline has an `image_processor`, which then does that its way.

        Args:
            images: PIL images, arrays of shape `(height, width, 3)` or `(batch, height, width, 3)`, tensors of shape
                `(3, height, width)` or `(batch, 3, height, width)`, or a list of them, with values in [0, 1]. Those in
                a list may differ in size.

        Returns:
            `torch.Tensor`: The embeddings `z_i` as CLIP gives them, float32 (float64 if CLIP is), shape `(batch, d)`.

        Raises:
            TypeError: For other types, and for integers, whose range cannot be known.
            ValueError: For other shapes, values that are not in [0, 1], no image, and if there is no `image_encoder`.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.encode_image(torch.rand(2, 3, 48, 32)).shape
        torch.Size([2, 6])

        ```
        """
        if self.image_encoder is None:
            raise ValueError("this pipeline has no `image_encoder`: load one, the image part of the same CLIP.")
        size, pixels = self.image_encoder.config.image_size, []
        items = images if isinstance(images, list | tuple) else [images]
        batches = [to_batch(item, 3, "images") for item in items] or [to_batch([], 3, "images")]
        for batch in batches:
            if self.image_processor is not None:
                arrays = (batch * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
                batch = self.image_processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
                pixels.append(batch["pixel_values"])
                continue
            height, width = (max(size, int(side * size / min(batch.shape[-2:]))) for side in batch.shape[-2:])
            batch = nn.functional.interpolate(batch, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (height - size) // 2, (width - size) // 2
            batch = batch[..., top : top + size, left : left + size]
            # mean and standard deviation of the pixels that CLIP was trained on
            mean, std = batch.new_tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
            pixels.append((batch - mean[:, None, None]) / std[:, None, None])
        device, dtype = self._execution_device, self.image_encoder.dtype
        embeds = self.image_encoder(torch.cat([p.to(device, dtype) for p in pixels])).image_embeds
        return embeds.to(torch.promote_types(dtype, torch.float32))

    def score(
        self, image_embeds: torch.Tensor, prompt: str | list[str] | torch.Tensor, mode: str = "cosine"
    ) -> torch.Tensor:
        r"""
        How well image embeddings go with texts, which candidates are chosen by.

        Args:
            image_embeds (`torch.Tensor`): Shape `(batch, d)`.
            prompt (`str`, `list[str]` or `torch.Tensor`):
                One text for all or one each, or their embeddings, shape `(1 or batch, d)`.
            mode (`str`, *optional*, defaults to `"cosine"`): `"cosine"`, or `"dot"`, where longer ones score more.

        Returns:
            `torch.Tensor`: Shape `(batch,)`.

        Raises:
            ValueError: For shapes that do not fit, and another `mode`.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.score(torch.randn(3, 6), "a red three").shape
        torch.Size([3])

        ```
        """
        if mode not in ("cosine", "dot"):
            raise ValueError(f"`mode` is {mode!r}, but must be 'cosine' or 'dot'.")
        self._check_width("image_embeds", image_embeds)
        text_embeds = prompt if isinstance(prompt, torch.Tensor) else self.encode_prompt(prompt)[0]
        self._check_width("prompt", text_embeds)
        if len(text_embeds) not in (1, len(image_embeds)):
            raise ValueError(
                f"`prompt` has {len(text_embeds)} entries for {len(image_embeds)} of `image_embeds`: give one for "
                "all, or one each."
            )
        return likeness(image_embeds, text_embeds.to(image_embeds), mode)

    def _check_width(self, name: str, embeds: torch.Tensor) -> None:
        width = self.prior.config.embedding_dim
        if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or embeds.shape[1] != width:
            shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
            raise ValueError(f"`{name}` is {shape}, but must be a tensor of shape (batch, {width}).")
        if not embeds.isfinite().all():
            row = (~embeds.isfinite().all(dim=1)).nonzero()[0].item()
            raise ValueError(f"`{name}` is not finite in row {row}: leave it out.")

    def _to_embeds(self, name: str, images: Image.Image | np.ndarray | torch.Tensor | list) -> torch.Tensor:
        """Embeddings in the scale of the prior's, of images or of what already is embeddings."""
        if not isinstance(images, torch.Tensor) or images.ndim > 2:
            embeds = self.encode_image(images)
            return nn.functional.normalize(embeds) if self.config.embed_norm == "l2" else embeds
        self._check_width(name, images)
        return images

    # -- manipulations

    def interpolate(
        self,
        a: Image.Image | np.ndarray | torch.Tensor | list,
        b: Image.Image | np.ndarray | torch.Tensor | list,
        theta: float | Sequence[float] | torch.Tensor = 0.5,
        mode: str = "slerp",
    ) -> torch.Tensor:
        r"""
        Embeddings between two (section 3.2 of https://huggingface.co/papers/2204.06125).

        Args:
            a (`torch.Tensor` or images): Embeddings, shape `(batch, d)`, or images as in [`~encode_image`].
            b (`torch.Tensor` or images): The same for the other end.
            theta (`float`, a list of them or `torch.Tensor`, *optional*, defaults to 0.5):
                Where between, from 0 (`a`) to 1 (`b`): one place, or several, of shape `(places,)`.
            mode (`str`, *optional*, defaults to `"slerp"`):
                `"slerp"`: the direction moves along the great circle by equal angles, the length by equal steps.
                `"lerp"`: along a straight line, where embeddings in the middle are shorter than any true ones.

        Returns:
            `torch.Tensor`: Shape `(batch, d)`, or `(places, batch, d)` for several places.

        Raises:
            ValueError: For shapes that do not fit, embeddings of zero, opposite ones, places out of range, and
                another `mode`.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.interpolate(torch.randn(1, 6), torch.randn(1, 6), [0, 0.25, 0.5, 0.75, 1]).shape
        torch.Size([5, 1, 6])

        ```
        """
        if mode not in ("slerp", "lerp"):
            raise ValueError(f"`mode` is {mode!r}, but must be 'slerp' or 'lerp'.")
        a, b = self._to_embeds("a", a), self._to_embeds("b", b)
        if a.shape != b.shape:
            raise ValueError(f"`a` has {len(a)} embeddings and `b` {len(b)}: they must agree.")
        b = b.to(a)
        places = torch.as_tensor(theta, dtype=a.dtype, device=a.device)
        if places.ndim > 1 or not ((places >= 0) & (places <= 1)).all():
            raise ValueError(f"`theta` is {theta}, but must be one place from 0 to 1, or a list of them.")
        places = places.reshape(*places.shape, 1, 1)
        if mode == "lerp":
            return a + places * (b - a)
        lengths = [x.norm(dim=1, keepdim=True) for x in (a, b)]
        directions = slerp(*(x / length.clamp(min=1e-30) for x, length in zip((a, b), lengths, strict=True)), theta)
        return directions * (lengths[0] + places * (lengths[1] - lengths[0]))

    def text_diff(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        target: str | list[str] | torch.Tensor,
        source: str | list[str] | torch.Tensor | None = "a photo",
        theta_max: float = 0.5,
        num: int = 5,
    ) -> torch.Tensor:
        r"""
        Moves images' embeddings toward a change that texts describe (section 3.3 of
        https://huggingface.co/papers/2204.06125): `slerp(z_i, z_d, theta)` with `z_d = (z_t - z_t0) / |z_t - z_t0|`,
        on the unit sphere, then as long as `z_i` was.

        Args:
            image (`torch.Tensor` or images): Embeddings, shape `(batch, d)`, or images as in [`~encode_image`].
            target (`str`, `list[str]` or `torch.Tensor`):
                What the image is to become: one text for all or one each, or their embeddings.
            source (`str`, `list[str]`, `torch.Tensor` or `None`, *optional*, defaults to `"a photo"`):
                What it is now; `None` for the direction of `target` alone.
            theta_max (`float`, *optional*, defaults to 0.5): The largest `theta`; the paper goes to 0.25 up to 0.5.
            num (`int`, *optional*, defaults to 5): Number of values of `theta`, from 0 on in equal steps.

        Returns:
            `torch.Tensor`: Shape `(num, batch, d)`; the first are the image's own.

        Raises:
            ValueError: For shapes that do not fit, texts that do not differ, and values out of range.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.text_diff(torch.rand(1, 3, 32, 32), "a red three", "a blue three").shape
        torch.Size([5, 1, 6])

        ```
        """
        if not 0 <= theta_max <= 1 or not isinstance(num, int) or num < 1:
            raise ValueError(
                f"`theta_max` is {theta_max} and `num` {num}, but they must be in [0, 1] and an `int` of at least 1."
            )
        embeds = self._to_embeds("image", image)
        lengths = embeds.norm(dim=1, keepdim=True)
        direction = torch.zeros_like(embeds)
        for name, text, sign in (("target", target, 1), ("source", source, -1)):
            if text is None:
                continue
            text = text if isinstance(text, torch.Tensor) else self.encode_prompt(text)[0]
            self._check_width(name, text)
            if len(text) not in (1, len(embeds)):
                raise ValueError(
                    f"`{name}` has {len(text)} entries for {len(embeds)} images: give one for all, or one each."
                )
            direction = direction + sign * text.to(embeds)
        sizes = direction.norm(dim=1, keepdim=True)
        if (sizes == 0).any() or (lengths == 0).any():
            raise ValueError("`target` and `source` have the same embedding, or an image's is zero: there is no way.")
        theta = torch.linspace(0, theta_max, num, dtype=torch.float64)
        return slerp(embeds / lengths, direction / sizes, theta) * lengths

    def blend(self, items: list, weights: Sequence[float], **kwargs: Any) -> torch.Tensor:
        r"""
        Weighted sum of the embeddings of texts and images, as `interpolate` of [`KandinskyV22PriorPipeline`] mixes
        them.

        Args:
            items (`list`): Texts, images as in [`~encode_image`], and embeddings of shape `(d,)` or `(1, d)`.
            weights (`list[float]`): As many; they are not changed, so let them add up to 1 for a true length.
            kwargs (*optional*): Arguments of the call that makes an embedding of a text, such as `generator`.

        Returns:
            `torch.Tensor`: Shape `(1, d)`.

        Raises:
            ValueError: For another number of weights, no item, or an item that is more than one.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe.blend(["a red three", torch.rand(3, 32, 32)], [0.3, 0.7], num_inference_steps=2).shape
        torch.Size([1, 6])

        ```
        """
        if len(items) != len(weights) or not items:
            raise ValueError(f"`items` has {len(items)} entries and `weights` {len(weights)}: give one weight each.")
        total = 0
        for item, weight in zip(items, weights, strict=True):
            if isinstance(item, str):
                embeds = self(item, **kwargs | {"return_dict": True}).image_embeds
            else:
                is_row = isinstance(item, torch.Tensor) and item.ndim == 1
                embeds = self._to_embeds("items", item[None] if is_row else item)
            if len(embeds) != 1:
                raise ValueError(f"`items` has an entry of {len(embeds)} embeddings: give every one as its own entry.")
            total = total + weight * torch.as_tensor(embeds, device=self._execution_device)
        return total

    def fit_pca(self, image_embeds: torch.Tensor) -> torch.Tensor:
        r"""
        Finds the principal components of embeddings for [`~pca_reconstruct`]. They are kept with the pipeline, but not
        saved.

        Args:
            image_embeds (`torch.Tensor`): Many embeddings, shape `(n, d)`.

        Returns:
            `torch.Tensor`: The singular values, falling, float64 of shape `(min(n, d),)`.

        Raises:
            ValueError: For another width, and fewer than two.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.fit_pca(torch.randn(50, 6)).shape
        torch.Size([6])

        ```
        """
        self._check_width("image_embeds", image_embeds)
        if len(image_embeds) < 2:
            raise ValueError(f"`image_embeds` has {len(image_embeds)} rows: give at least 2, and rather many.")
        embeds = image_embeds.detach().double()
        mean = embeds.mean(dim=0)
        _, singular_values, components = torch.linalg.svd(embeds - mean, full_matrices=False)
        self._pca = (mean, components)
        return singular_values

    def pca_reconstruct(self, image_embeds: torch.Tensor, num_components: int) -> torch.Tensor:
        r"""
        What is left of embeddings in the first principal components, to see by decoding what each adds (section 4 of
        https://huggingface.co/papers/2204.06125).

        Args:
            image_embeds (`torch.Tensor`): Shape `(batch, d)`.
            num_components (`int`): How many components to keep, from 0 (the mean) on.

        Returns:
            `torch.Tensor`: Shape `(batch, d)`.

        Raises:
            ValueError: Before [`~fit_pca`], and for another width and more components than there are.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> embeds = torch.randn(50, 6)
        >>> _ = pipe.fit_pca(embeds)
        >>> torch.allclose(pipe.pca_reconstruct(embeds, 6), embeds, atol=1e-5)
        True

        ```
        """
        if getattr(self, "_pca", None) is None:
            raise ValueError("there are no components yet: call `fit_pca` with many embeddings first.")
        self._check_width("image_embeds", image_embeds)
        mean, components = (tensor.to(image_embeds.device) for tensor in self._pca)
        if not isinstance(num_components, int) or not 0 <= num_components <= len(components):
            raise ValueError(
                f"`num_components` is {num_components}, but must be an `int` from 0 to {len(components)}."
            )
        kept = components[:num_components]
        return (mean + (image_embeds.double() - mean) @ kept.T @ kept).to(image_embeds.dtype)

    # -- decoders

    def _hand_over(
        self,
        image_embeds: UnCLIPPriorPipelineOutput | torch.Tensor | np.ndarray,
        decoder: DiffusionPipeline | None,
        name: str,
        widths: tuple[int, ...],
        clip: str,
    ) -> torch.Tensor:
        """Checks what all decoders need: the width, the scale, and as far as is known the CLIP."""
        embeds = torch.as_tensor(getattr(image_embeds, "image_embeds", image_embeds))
        self._check_width("image_embeds", embeds)
        if embeds.shape[1] not in widths:
            raise ValueError(
                f"`image_embeds` has width {embeds.shape[1]}, but {name} takes {' or '.join(map(str, widths))}: take "
                f"a prior for its CLIP ({clip})."
            )
        if self.config.embed_norm == "l2":
            raise ValueError(
                f"`embed_norm` is 'l2', so this prior gives embeddings of unit length, but {name} takes them as CLIP "
                "gives them: take a prior that was trained with 'standardize'."
            )
        # E |z_i|^2 of the training data
        expected = (self.prior.clip_mean.double() ** 2 + self.prior.clip_std.double() ** 2).sum().sqrt().item()
        lengths = embeds.double().norm(dim=1)
        if not ((lengths > expected / 2) & (lengths < 2 * expected)).all():
            raise ValueError(
                f"`image_embeds` has lengths from {lengths.min():.4g} to {lengths.max():.4g}, but this CLIP's are "
                f"about {expected:.4g}: give them as the pipeline or CLIP does, neither normalized nor standardized."
            )
        if self.config.clip_model_id is not None and clip.lower() not in self.config.clip_model_id.lower():
            logger.warning(
                f"{name} was trained with {clip}, but this prior's CLIP is {self.config.clip_model_id!r}: if they are "
                "not the same, its embeddings mean nothing to that decoder."
            )
        return embeds if decoder is None else embeds.to(decoder._execution_device, decoder.dtype)

    def to_kandinsky22(
        self,
        image_embeds: UnCLIPPriorPipelineOutput | torch.Tensor | np.ndarray,
        negative_image_embeds: torch.Tensor | np.ndarray | None = None,
        decoder: DiffusionPipeline | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        The arguments of [`KandinskyV22Pipeline`] and its relatives, as in `decoder(**pipe.to_kandinsky22(output))`.

        Args:
            image_embeds ([`UnCLIPPriorPipelineOutput`], `torch.Tensor` or `np.ndarray`):
                What a call returned, or embeddings of shape `(batch, d)`.
            negative_image_embeds (`torch.Tensor` or `np.ndarray`, *optional*):
                What to go away from, shape `(1 or batch, d)`; another call's `image_embeds` for a negative prompt. By
                default what the call returned, else CLIP's embedding of a blank image, or zeros without
                `image_encoder`, which Kandinsky has never seen.
            decoder ([`KandinskyV22Pipeline`], *optional*):
                The pipeline that takes them; for the width, device and dtype. Without it the width must be 1280.

        Returns:
            `dict[str, torch.Tensor]`: `image_embeds` and `negative_image_embeds`.

        Raises:
            ValueError: For embeddings of another width, or that are not as long as CLIP's are.
        """
        widths = (1280,) if decoder is None else (decoder.unet.config.encoder_hid_dim,)
        embeds = self._hand_over(image_embeds, decoder, "Kandinsky 2.2", widths, "ViT-bigG-14")
        if negative_image_embeds is None:
            negative_image_embeds = getattr(image_embeds, "negative_image_embeds", None)
        if negative_image_embeds is None:
            negative_image_embeds = self._negative_image_embeds(
                "zeros" if self.image_encoder is None else "zero_image"
            )
        negative = torch.as_tensor(negative_image_embeds)
        self._check_width("negative_image_embeds", negative)
        if len(negative) not in (1, len(embeds)):
            raise ValueError(
                f"`negative_image_embeds` has {len(negative)} entries for {len(embeds)} of `image_embeds`: give one "
                "for all, or one each."
            )
        return {"image_embeds": embeds, "negative_image_embeds": negative.to(embeds).expand_as(embeds)}

    def to_karlo(
        self,
        image_embeds: UnCLIPPriorPipelineOutput | torch.Tensor | np.ndarray,
        decoder: DiffusionPipeline | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        The arguments of Karlo's [`UnCLIPImageVariationPipeline`], as in `decoder(**pipe.to_karlo(output))`.

        Args:
            image_embeds ([`UnCLIPPriorPipelineOutput`], `torch.Tensor` or `np.ndarray`):
                What a call returned, or embeddings of shape `(batch, d)`.
            decoder ([`UnCLIPImageVariationPipeline`], *optional*):
                The pipeline that takes them; for the width, device and dtype. Without it the width must be 768.

        Returns:
            `dict[str, torch.Tensor]`: `image_embeddings`.

        Raises:
            ValueError: For embeddings of another width, or that are not as long as CLIP's are.
        """
        widths = (768,) if decoder is None else (decoder.text_proj.config.clip_embeddings_dim,)
        return {"image_embeddings": self._hand_over(image_embeds, decoder, "Karlo", widths, "ViT-large-patch14")}

    def to_stable_unclip(
        self,
        image_embeds: UnCLIPPriorPipelineOutput | torch.Tensor | np.ndarray,
        noise_level: int = 0,
        decoder: DiffusionPipeline | None = None,
    ) -> dict[str, torch.Tensor | int]:
        r"""
        The arguments of [`StableUnCLIPImg2ImgPipeline`] beside its prompt, as in `decoder(prompt=...,
        **pipe.to_stable_unclip(output))`.

        Args:
            image_embeds ([`UnCLIPPriorPipelineOutput`], `torch.Tensor` or `np.ndarray`):
                What a call returned, or embeddings of shape `(batch, d)`.
            noise_level (`int`, *optional*, defaults to 0): How much noise that pipeline adds to them, from 0 to 999.
            decoder ([`StableUnCLIPImg2ImgPipeline`], *optional*):
                The pipeline that takes them; for the width, device and dtype. Without it the width must be 1024
                (Stable unCLIP) or 768 (its small model).

        Returns:
            `dict[str, torch.Tensor | int]`: `image_embeds` and `noise_level`.

        Raises:
            ValueError: For embeddings of another width, or that are not as long as CLIP's are, and another level.
        """
        widths, levels = (1024, 768), 1000
        if decoder is not None:
            widths = (decoder.image_normalizer.config.embedding_dim,)
            levels = decoder.image_noising_scheduler.config.num_train_timesteps
        if not isinstance(noise_level, int) or not 0 <= noise_level < levels:
            raise ValueError(f"`noise_level` is {noise_level}, but must be an `int` from 0 to {levels - 1}.")
        small = widths[0] == 768 or (decoder is None and self.prior.config.embedding_dim == 768)
        clip = "ViT-large-patch14" if small else "ViT-H-14"
        embeds = self._hand_over(image_embeds, decoder, "Stable unCLIP", widths, clip)
        return {"image_embeds": embeds, "noise_level": noise_level}

    # -- sampling

    def _negative_image_embeds(self, kind: str) -> torch.Tensor:
        device, width = self._execution_device, self.prior.config.embedding_dim
        if kind == "zeros":
            return torch.zeros(1, width, device=device, dtype=torch.promote_types(self.prior.dtype, torch.float32))
        # Kandinsky's "zero image": zero is what the network gets, after shifting and scaling, and so a medium grey.
        size, dtype = self.image_encoder.config.image_size, self.image_encoder.dtype
        embeds = self.image_encoder(torch.zeros(1, 3, size, size, device=device, dtype=dtype)).image_embeds
        return embeds.to(torch.promote_types(dtype, torch.float32))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_candidates: int = 2,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        rerank: str | None = "cosine",
        prompt_embeds: torch.Tensor | None = None,
        prompt_hidden_states: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_hidden_states: torch.Tensor | None = None,
        negative_prompt_mask: torch.Tensor | None = None,
        negative_embeds: str | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[["UnCLIPPriorPipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> UnCLIPPriorPipelineOutput | tuple:
        r"""
        Draws image embeddings for texts.

        Guidance (https://huggingface.co/papers/2207.12598) is `x_0 = u + s (c - u)` with `u` for `negative_prompt`,
        both in one batch. It moves embeddings away from the true distribution and takes away from their variety: the
        default is none. Of `num_candidates` draws the one that goes best with the text is returned, of two in the
        paper.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to see. Needed unless `prompt_embeds` are given.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to go away from, one for all prompts or one each; the empty text by default. Used if
                `guidance_scale` is not 1.
            num_candidates (`int`, *optional*, defaults to 2): Draws of which the best is returned.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Embeddings per prompt.
            num_inference_steps (`int`, *optional*, defaults to 25): Number of timesteps.
            guidance_scale (`float`, *optional*, defaults to 1.0): `s`; 1 is none, less than 1 is toward `u`.
            rerank (`str` or `None`, *optional*, defaults to `"cosine"`):
                How the best candidate is found, `"cosine"` or `"dot"` (see [`~score`]); `None` takes the first.
            prompt_embeds (`torch.Tensor`, *optional*): In place of `prompt`: `z_t`, shape `(prompts, d)`.
            prompt_hidden_states (`torch.Tensor`, *optional*): With it, shape `(prompts, L, h)`.
            prompt_mask (`torch.Tensor`, *optional*): With it, bool of shape `(prompts, L)`, `False` for padding.
            negative_prompt_embeds (`torch.Tensor`, *optional*): In place of `negative_prompt`, for all or each.
            negative_prompt_hidden_states (`torch.Tensor`, *optional*): With it.
            negative_prompt_mask (`torch.Tensor`, *optional*): With it.
            negative_embeds (`str`, *optional*):
                What `negative_image_embeds` of the output is: `"zero_image"`, CLIP's embedding of a blank image, as
                Kandinsky 2.2 has it, or `"zeros"`. By default the first if the pipeline has an `image_encoder`.
            latents (`torch.Tensor`, *optional*):
                Noise to start from, shape `(prompts * num_images_per_prompt * num_candidates, d)`, with the candidates
                of an embedding after each other.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per returned embedding,
                which then depends on no other.
            output_type (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`UnCLIPPriorPipelineOutput`], or its entries in a tuple.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step; it may return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` (`z_i^(t)` as the scheduler has it) and `"predicted_image_embedding"` (`x_0`,
                guided, not clipped) is in `callback_kwargs`.

        Raises:
            TypeError: For prompts that are no texts.
            ValueError: For arguments that do not fit each other or are out of range, a scheduler that does not fit,
                and a prior without statistics, before a model runs; for embeddings that are not finite.

        Example:

        ```py
        >>> from diffusers_ext import UnCLIPPriorPipeline

        >>> pipe = UnCLIPPriorPipeline.from_pretrained("my-prior")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe(["a red three", "a blue four"], num_inference_steps=2)
        >>> output.image_embeds.shape, output.candidates.shape
        (torch.Size([2, 6]), torch.Size([2, 2, 6]))

        ```
        """
        # 1. Check inputs
        given = {
            "prompt": (prompt, prompt_embeds, prompt_hidden_states, prompt_mask),
            "negative_prompt": (
                negative_prompt,
                negative_prompt_embeds,
                negative_prompt_hidden_states,
                negative_prompt_mask,
            ),
        }
        config, is_guided, counts = self.prior.config, guidance_scale != 1, {}
        has_hidden_states = config.get("encoder_hid_proj_type", "linear") is not None
        for name, (texts, embeds, hidden_states, mask) in given.items():
            if texts is not None and embeds is not None:
                raise ValueError(f"`{name}` and `{name}_embeds` were both given: leave one out.")
            if texts is None and embeds is None:
                if name == "prompt":
                    raise ValueError("`prompt` is missing: give it, or `prompt_embeds`.")
                texts = ""
            if embeds is None:
                if hidden_states is not None or mask is not None:
                    raise ValueError(
                        f"`{name}_hidden_states` and `{name}_mask` go with `{name}_embeds`, which is missing: give "
                        "all three, as `encode_prompt` does, or none."
                    )
                texts = [texts] if isinstance(texts, str) else texts
                if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"`{name}` is {texts!r}, but must be a `str` or a list of them.")
                if (name == "prompt" or is_guided) and (self.text_encoder is None or self.tokenizer is None):
                    raise ValueError(
                        f"this pipeline has no `text_encoder` and `tokenizer`: give `{name}_embeds`, or load them."
                    )
                counts[name] = len(texts)
            else:
                length = config.num_embeddings
                count = len(embeds) if isinstance(embeds, torch.Tensor) and embeds.ndim else 1
                width = config.get("encoder_hid_dim") or config.embedding_dim
                shapes = {
                    "embeds": (embeds, (count, config.get("embedding_proj_dim") or config.embedding_dim)),
                    "hidden_states": (hidden_states, (count, length, width)),
                    "mask": (mask, (count, length)),
                }
                for part, (tensor, expected) in shapes.items():
                    if tensor is None and not has_hidden_states:
                        continue
                    if tensor is None:
                        found = "missing"
                    elif not isinstance(tensor, torch.Tensor):
                        found = f"a {type(tensor).__name__}"
                    elif tuple(tensor.shape) != expected:
                        found = f"of shape {tuple(tensor.shape)}"
                    elif not tensor.isfinite().all():
                        found = "not finite"
                    else:
                        continue
                    raise ValueError(
                        f"`{name}_{part}` is {found}, but must be a finite tensor of shape {expected}: "
                        "`encode_prompt` gives all three."
                    )
                counts[name] = count
            given[name] = (texts, embeds, hidden_states, mask)
        if not counts["prompt"] or counts["negative_prompt"] not in (1, counts["prompt"]):
            raise ValueError(
                f"`prompt` has {counts['prompt']} entries and `negative_prompt` {counts['negative_prompt']}: give at "
                "least one prompt, and one negative prompt for all, or as many."
            )
        for name, count in (("num_candidates", num_candidates), ("num_images_per_prompt", num_images_per_prompt)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` is {count}, but must be an `int` of at least 1.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but must be finite.")
        can_compare = (config.get("embedding_proj_dim") or config.embedding_dim) == config.embedding_dim
        if rerank not in ("cosine", "dot", None) or (rerank is not None and not can_compare):
            raise ValueError(
                f"`rerank` is {rerank!r}, but must be 'cosine', 'dot' or `None`, and `None` where the embeddings of "
                f"texts ({config.get('embedding_proj_dim')}) and images ({config.embedding_dim}) differ in width."
            )
        if negative_embeds not in ("zero_image", "zeros", None) or (
            negative_embeds == "zero_image" and not self.image_encoder
        ):
            raise ValueError(
                f"`negative_embeds` is {negative_embeds!r}, but must be 'zeros', or 'zero_image' if the pipeline has "
                "an `image_encoder`."
            )
        if output_type not in ("pt", "np"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pt' or 'np'.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )
        std = self.prior.clip_std
        if not (std > 0).all() or not std.isfinite().all() or not self.prior.clip_mean.isfinite().all():
            raise ValueError(
                "`prior.clip_std` is not positive everywhere, or a statistic is not finite, as in a prior that was "
                "never trained: set them by `init_prior(prior, image_embeds)` before training."
            )
        check_prior_scheduler(self.scheduler, num_inference_steps)
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        batch_size = counts["prompt"] * num_images_per_prompt
        if isinstance(generator, torch.Generator) and batch_size == 1:  # as in a list, where each row is a draw
            generator = [generator]
        if isinstance(generator, list):
            if len(generator) != batch_size:
                raise ValueError(
                    f"`generator` is a list of {len(generator)} for a batch of {batch_size}: give one or {batch_size}."
                )
            generator = [one for one in generator for _ in range(num_candidates)]
        # Half precision cannot hold a trajectory: only the network computes in it.
        dtype = torch.promote_types(self.prior.dtype, torch.float32)
        shape = (batch_size * num_candidates, config.embedding_dim)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape or not latents.isfinite().all():
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but this call needs {shape}, and finite numbers."
            )
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        if not is_guided and (negative_prompt is not None or negative_prompt_embeds is not None):
            logger.warning("`negative_prompt` has no effect with `guidance_scale=1`: give another scale.")

        # 2. Texts, for each row of the batch; negative ones first
        conditions = []
        for name in ("negative_prompt", "prompt") if is_guided else ("prompt",):
            texts, *encoded = given[name]
            if texts is not None:
                encoded = self.encode_prompt(list(texts))
            embeds, hidden_states, mask = (None if tensor is None else tensor.to(device) for tensor in encoded)
            if not has_hidden_states:
                hidden_states = None
            if mask is None:  # without one, `PriorTransformer` would not be causal
                mask = torch.ones(len(embeds), config.num_embeddings, dtype=torch.bool, device=device)
            repeats = shape[0] // len(embeds)
            conditions.append(
                [
                    None if tensor is None else tensor.repeat_interleave(repeats, dim=0)
                    for tensor in (embeds, hidden_states, mask)
                ]
            )
        text_embeds = conditions[-1][0].to(dtype)
        embeds, hidden_states, mask = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*conditions, strict=True)
        )
        embeds = embeds.to(self.prior.dtype)
        hidden_states = None if hidden_states is None else hidden_states.to(self.prior.dtype)

        # 3. From noise to embeddings
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            inputs = self.scheduler.scale_model_input(latents, timestep).to(self.prior.dtype)
            predicted = self.prior(
                torch.cat([inputs, inputs]) if is_guided else inputs,
                timestep,
                proj_embedding=embeds,
                encoder_hidden_states=hidden_states,
                attention_mask=mask,
            ).predicted_image_embedding.to(dtype)
            if is_guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            predicted = predicted.reshape(shape)
            if "prev_timestep" in accepted:  # `UnCLIPScheduler` would take t - 1
                options["prev_timestep"] = timesteps[step + 1] if step + 1 < len(timesteps) else None
            latents = self.scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0].to(dtype)
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "predicted_image_embedding": predicted}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)

        # 4. The best candidates
        embeds = self.prior.post_process_latents(latents)
        if not embeds.isfinite().all():
            raise ValueError("the embeddings are not finite: run the prior in float32, and see if its weights are.")
        candidates = embeds.reshape(batch_size, num_candidates, -1)
        text_embeds = text_embeds[::num_candidates]
        scores = likeness(candidates, text_embeds[:, None], rerank or "cosine") if can_compare else None
        best = torch.zeros(batch_size, dtype=torch.int64, device=device) if rerank is None else scores.argmax(dim=1)
        image_embeds = candidates[torch.arange(batch_size, device=device), best]
        if negative_embeds is None:
            negative_embeds = "zeros" if self.image_encoder is None else "zero_image"
        negative_image_embeds = self._negative_image_embeds(negative_embeds).to(embeds).repeat(batch_size, 1)
        self.maybe_free_model_hooks()
        parts = (image_embeds, negative_image_embeds, text_embeds, scores, candidates)
        if output_type == "np":
            parts = tuple(None if part is None else part.cpu().numpy() for part in parts)
        return UnCLIPPriorPipelineOutput(*parts) if return_dict else parts
