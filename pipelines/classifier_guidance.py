r"""Classifier guidance: a diffusion model steered by the gradient of a classifier, or of anything else.

*Diffusion Models Beat GANs on Image Synthesis*, Dhariwal and Nichol, NeurIPS 2021
(https://huggingface.co/papers/2105.05233). A classifier `p(y | x_t)` that was trained on noisy images moves the mean
of every denoising step by `s Sigma grad log p(y | x_t)` (algorithm 1), or in DDIM the noise prediction by
`-s sqrt(1 - abar_t) grad log p(y | x_t)` (algorithm 2). The diffusion model is not trained again and need not know
classes.

This file is complete in itself: classifier, ADM's U-Net, scheduler, gradients, pipeline, guider. Notation: `abar_t` is
the cumulative product of `alpha_t = 1 - beta_t`; betas are those between the kept timesteps; `betatilde_t` is the
variance of `q(x_prev | x_t, x_0)`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})


# ------------------------------------------------------------------------------------------------------------ models


class AttentionPool(torch.nn.Module):
    r"""
    Pools a feature map by attention: its mean is the query, mean and positions are keys and values, as in CLIP's
    residual networks (https://huggingface.co/papers/2103.00020, section 2.4).

    Args:
        size (`int`): Side of the feature map in pixels.
        channels (`int`): Channels `C` of the feature map.
        num_heads (`int`): Heads of the attention; they share the channels.
        out_features (`int`): Numbers that come out per image.
    """

    def __init__(self, size: int, channels: int, num_heads: int, out_features: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = torch.nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.to_qkv = torch.nn.Linear(channels, 3 * channels)
        self.to_out = torch.nn.Linear(channels, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, C, size, size)` to `(batch, out_features)`."""
        tokens = hidden_states.flatten(2)
        tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], dim=-1) + self.positional_embedding
        query, key, value = self.to_qkv(tokens.mT).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        pooled = torch.nn.functional.scaled_dot_product_attention(query[:, :, :1], key, value)
        return self.to_out(pooled.flatten(1))


class NoisyClassifier(ModelMixin, ConfigMixin):
    r"""
    A classifier of noisy images that knows their timestep: the downward half of a diffusion U-Net and a head
    (https://huggingface.co/papers/2105.05233, section 4 and appendix I).

    Args:
        sample_size (`int`): Side of the images in pixels.
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes.
        layers_per_block (`int`, *optional*, defaults to 2): Residual layers per resolution.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(128, 128, 256, 256, 512, 512)`):
            Channels per resolution.
        down_block_types (`tuple[str, ...]`, *optional*):
            A diffusers block per resolution; by default residual blocks, with attention from 32 x 32 pixels down.
        downsample_type (`str`, *optional*, defaults to `"resnet"`):
            How blocks with attention halve: `"resnet"` or `"conv"`.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels per attention head.
        norm_num_groups (`int`, *optional*, defaults to 32): Groups of the group norms; divides all channels.
        norm_eps (`float`, *optional*, defaults to 1e-5): Their epsilon.
        resnet_time_scale_shift (`str`, *optional*, defaults to `"scale_shift"`):
            How the timestep enters: `"scale_shift"`, or `"default"` (added).
        pool (`str`, *optional*, defaults to `"attention"`): The head: `"attention"` ([`AttentionPool`], which fixes
            the size of the images), `"adaptive"` (mean, then a linear layer), or `"spatial"` and `"spatial_v2"` (the
            means of all layers' outputs through a hidden layer, with ReLU, or with group norm and SiLU).
        hidden_size (`int`, *optional*, defaults to 2048): Width of the hidden layer of the spatial heads.
        time_proj_dim (`int`, *optional*): Sinusoids of the timestep; `block_out_channels[0]` by default.
        id2label (`dict[int, str]`, *optional*): Names of the classes.
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T` of the noise that it was trained with.
        trained_alphas_cumprod (`list[float]`, *optional*):
            `abar_t` of that noise at five timesteps, [`noise_levels`] of its scheduler. A pipeline with another noise
            schedule refuses the classifier; `None` leaves that unchecked.

    Raises:
        ValueError: For an unknown head, and blocks and channels that do not fit.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import NoisyClassifier

    >>> classifier = NoisyClassifier(
    ...     8, in_channels=1, num_classes=10, layers_per_block=1, block_out_channels=(8, 16), attention_head_dim=8,
    ...     norm_num_groups=4,
    ... )
    >>> classifier(torch.randn(2, 1, 8, 8), torch.tensor([0, 999])).shape
    torch.Size([2, 10])

    ```
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        num_classes: int = 1000,
        layers_per_block: int = 2,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        down_block_types: tuple[str, ...] | None = None,
        downsample_type: str = "resnet",
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        pool: str = "attention",
        hidden_size: int = 2048,
        time_proj_dim: int | None = None,
        id2label: dict[int, str] | None = None,
        num_train_timesteps: int = 1000,
        trained_alphas_cumprod: list[float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "norm_num_groups": norm_num_groups}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number from 1.")
        if not isinstance(sample_size, int) or not isinstance(attention_head_dim, int) or attention_head_dim < 1:
            raise ValueError(
                f"`sample_size` is {sample_size!r} and `attention_head_dim` is {attention_head_dim!r}, but both must "
                "be whole numbers: images are square."
            )
        if downsample_type not in ("resnet", "conv"):
            raise ValueError(f"`downsample_type` is {downsample_type!r}, but must be 'resnet' or 'conv'.")
        if trained_alphas_cumprod is not None and len(trained_alphas_cumprod) != 5:
            raise ValueError(
                f"`trained_alphas_cumprod` has {len(trained_alphas_cumprod)} values, but must have the five of "
                "`noise_levels`."
            )
        channels, levels = block_out_channels, len(block_out_channels)
        if down_block_types is None:
            attends = [sample_size >> level <= 32 for level in range(levels)]
            down_block_types = ["AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends]
            self.register_to_config(down_block_types=tuple(down_block_types))
        if len(down_block_types) != levels or any(width % norm_num_groups for width in channels):
            raise ValueError(
                f"`block_out_channels` is {tuple(channels)} with {len(down_block_types)} `down_block_types` and "
                f"`norm_num_groups`={norm_num_groups}: give one block per entry, and multiples of the groups."
            )
        attend = ["Attn" in block_type for block_type in down_block_types[:-1]] + [True]  # the middle always does
        if any(width % attention_head_dim for width, here in zip(channels, attend, strict=True) if here):
            raise ValueError(
                f"`attention_head_dim` is {attention_head_dim}, but must divide the `block_out_channels`="
                f"{tuple(channels)} of all blocks with attention, and of the last."
            )
        if sample_size % 2 ** (levels - 1):
            raise ValueError(
                f"`sample_size` is {sample_size}, but {levels} blocks halve it {levels - 1} times: choose a multiple "
                f"of {2 ** (levels - 1)}, or fewer blocks."
            )
        if id2label is not None:
            id2label = {int(number): name for number, name in id2label.items()}  # JSON has made words of the numbers
            if sorted(id2label) != list(range(num_classes)):
                raise ValueError(
                    f"`id2label` has {len(id2label)} entries for `num_classes`={num_classes}: name every class from 0 "
                    "on, or none."
                )
            self.register_to_config(id2label=id2label)
        width = time_proj_dim or channels[0]
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        self.conv_in = torch.nn.Conv2d(in_channels, channels[0], kernel_size=3, padding=1)
        shared = {
            "temb_channels": 4 * width,
            "resnet_eps": norm_eps,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
            "resnet_time_scale_shift": resnet_time_scale_shift,
        }
        self.down_blocks = torch.nn.ModuleList(
            get_down_block(
                block_type,
                num_layers=layers_per_block,
                in_channels=channels[max(level - 1, 0)],
                out_channels=channels[level],
                add_downsample=level < levels - 1,
                downsample_padding=1,
                downsample_type=downsample_type,
                **shared,
            )
            for level, block_type in enumerate(down_block_types)
        )
        # Without `attn_groups` this block leaves out its attention's norm when time enters by scale and shift.
        self.mid_block = UNetMidBlock2D(in_channels=channels[-1], attn_groups=norm_num_groups, **shared)
        self.gradient_checkpointing = False

        def norm(width: int) -> torch.nn.GroupNorm:
            return torch.nn.GroupNorm(norm_num_groups, width, eps=norm_eps)

        silu = torch.nn.SiLU()
        if pool == "attention":
            side, heads = sample_size >> (levels - 1), channels[-1] // attention_head_dim
            layers = [norm(channels[-1]), silu, AttentionPool(side, channels[-1], heads, num_classes)]
        elif pool == "adaptive":
            mean = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
            layers = [norm(channels[-1]), silu, *mean, torch.nn.Linear(channels[-1], num_classes)]
        elif pool in ("spatial", "spatial_v2"):
            if pool == "spatial_v2" and hidden_size % norm_num_groups:
                raise ValueError(
                    f"`hidden_size` is {hidden_size}, but must be a multiple of `norm_num_groups`={norm_num_groups}."
                )
            # the first convolution, every layer, every halving, the middle
            features = channels[0] + sum(layers_per_block * width for width in channels) + sum(channels)
            middle = [torch.nn.ReLU()] if pool == "spatial" else [norm(hidden_size), silu]
            layers = [
                torch.nn.Linear(features, hidden_size),
                *middle,
                torch.nn.Linear(hidden_size, num_classes),
            ]
        else:
            raise ValueError(f"`pool` is {pool!r}, but must be 'attention', 'adaptive', 'spatial' or 'spatial_v2'.")
        self.head = torch.nn.Sequential(*layers)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor`): Noisy images `x_t`, shape `(batch, channels, height, width)`.
            timestep (`torch.Tensor`, `float` or `int`): `t`, one for all or shape `(batch,)`, 0 to `T - 1`.

        Returns:
            `torch.Tensor`: Logits of the classes, shape `(batch, num_classes)`.

        Raises:
            ValueError: For images of another size than the attention pool has positions for.
        """
        size = self.config.sample_size
        if self.config.pool == "attention" and tuple(sample.shape[-2:]) != (size, size):
            raise ValueError(
                f"`sample` has (height, width) {tuple(sample.shape[-2:])}, but this classifier's attention pool is "
                f"for {(size, size)}: resize the images, or train a classifier with another `pool`."
            )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden_states = self.conv_in(sample)
        features = [hidden_states]
        for block in self.down_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, outputs = self._gradient_checkpointing_func(block, hidden_states, emb)
            else:
                hidden_states, outputs = block(hidden_states, emb)
            features += outputs
        hidden_states = self.mid_block(hidden_states, emb)
        if self.config.pool.startswith("spatial"):
            hidden_states = torch.cat([feature.mean((2, 3)) for feature in (*features, hidden_states)], dim=1)
        return self.head(hidden_states)


class ADMUNet2DModel(UNet2DModel):
    r"""
    `UNet2DModel` with the two freedoms of ADM's networks for 128 x 128, 512 x 512 and 64 -> 256 pixels
    (https://huggingface.co/papers/2105.05233) that the stock model lacks. Its other arguments are those of
    [`~diffusers.UNet2DModel`].

    Args:
        num_attention_heads (`int`, *optional*):
            Attention heads of every layer, whose channels then differ; in place of `attention_head_dim`.
        time_proj_dim (`int`, *optional*): Sinusoids of the timestep, and a quarter of its embedding's width;
            `block_out_channels[0]` by default.

    Raises:
        ValueError: If the heads do not divide the channels.

    Example:

    ```py
    >>> from diffusers_ext import ADMUNet2DModel

    >>> unet = ADMUNet2DModel(
    ...     sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_attention_heads=4,
    ...     down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2,
    ... )
    >>> [block.attentions[0].heads for block in unet.down_blocks]
    [4, 4]

    ```
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
        time_proj_dim: int | None = None,
    ) -> None:
        if num_attention_heads is not None:
            attend = ["Attn" in down + up for down, up in zip(down_block_types, reversed(up_block_types), strict=True)]
            attend[-1] = True  # the middle always does
            widths = [width for width, here in zip(block_out_channels, attend, strict=True) if here]
            if num_attention_heads < 1 or any(width % num_attention_heads for width in widths):
                raise ValueError(
                    f"`num_attention_heads` is {num_attention_heads}, but must divide the `block_out_channels`="
                    f"{tuple(block_out_channels)} of all blocks with attention, and of the last."
                )
            # Any divisor of all of them lets the parent build its layers; their heads are set below.
            attention_head_dim = math.gcd(*(width // num_attention_heads for width in widths))
        if time_proj_dim is not None:
            if time_embedding_type != "positional" or time_embedding_dim not in (None, 4 * time_proj_dim):
                raise ValueError(
                    f"`time_proj_dim` is {time_proj_dim}, but belongs to `time_embedding_type='positional'` and a "
                    f"`time_embedding_dim` of {4 * time_proj_dim}, not to {time_embedding_type!r} and "
                    f"{time_embedding_dim}."
                )
            time_embedding_dim = 4 * time_proj_dim
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        if time_proj_dim is not None:
            self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos, freq_shift)
            self.time_embedding = TimestepEmbedding(time_proj_dim, 4 * time_proj_dim)
        if num_attention_heads is not None:
            for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
                for attention in getattr(block, "attentions", []):
                    attention.heads = attention.sliceable_head_dim = num_attention_heads
                    attention.scale = (attention.inner_dim // num_attention_heads) ** -0.5


# --------------------------------------------------------------------------------------------------------- scheduler


def space_timesteps(num_train_timesteps: int, timestep_respacing: str) -> list[int]:
    r"""
    The timesteps that a respacing keeps (https://huggingface.co/papers/2102.09672, section 4).

    Args:
        num_train_timesteps (`int`): `T`.
        timestep_respacing (`str`): `"250"`: so many, from 0 to `T - 1`, spread evenly. `"10,15,20"`: `T` is cut into
            as many sections as there are numbers, the least noisy first, and of each so many are kept. `"ddim25"`:
            every n-th from 0 on, for the n that gives exactly so many. `"fast27"`: GLIDE's list for 1000 timesteps.

    Returns:
        `list[int]`: Timesteps, rising.

    Raises:
        ValueError: For a word that is none of these, and counts that a section or stride cannot give.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.classifier_guidance import space_timesteps

    >>> space_timesteps(1000, "2,1"), space_timesteps(1000, "ddim4")
    ([0, 499, 500], [0, 250, 500, 750])

    ```
    """
    spec, total = timestep_respacing.strip(), num_train_timesteps
    if spec.startswith("ddim") and spec[4:].isdecimal():
        for stride in range(1, total):
            if len(range(0, total, stride)) == int(spec[4:]):
                return list(range(0, total, stride))
        raise ValueError(
            f"`timestep_respacing` is {spec!r}, but no stride through {total} timesteps gives exactly {spec[4:]} of "
            f"them: choose a divisor of {total}, or write {spec[4:]!r}."
        )
    if spec == "fast27":
        kept = space_timesteps(total, "10,10,3,2,2")
        return sorted({*kept} - {total - 1} | {total - 3})
    parts = spec.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"`timestep_respacing` is {spec!r}, but must be a count such as '250', counts of sections such as "
            "'10,15,20', a stride such as 'ddim25', or 'fast27'."
        )
    kept, start = [], 0
    for section, count in enumerate(map(int, parts)):
        size = total // len(parts) + (section < total % len(parts))
        if not 0 < count <= size:
            raise ValueError(
                f"`timestep_respacing` is {spec!r}, but section {section + 1} has {size} timesteps: choose 1 to "
                f"{size} of them."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # As in the authors' code the stride is summed up, which decides how halves are rounded.
        places = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
        kept += [start + round(place) for place in places]
        start += size
    return kept


def noise_levels(scheduler: SchedulerMixin) -> list[float]:
    r"""
    `abar_t` of a scheduler at five timesteps from 0 to `T - 1`: what a [`NoisyClassifier`] remembers of its noise.

    Args:
        scheduler ([`SchedulerMixin`]): One that has `alphas_cumprod`.

    Returns:
        `list[float]`: Five numbers in [0, 1], falling.
    """
    levels = scheduler.alphas_cumprod
    return [float(levels[(len(levels) - 1) * quarter // 4]) for quarter in range(5)]


@dataclass
class GuidedSchedulerOutput(BaseOutput):
    """
    Output of [`GuidedScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The next, less noisy sample, of the shape of `sample`.
        pred_original_sample (`torch.Tensor`): The clean image that was predicted, in DDIM after guidance; same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class GuidedScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Ancestral (https://huggingface.co/papers/2006.11239) and DDIM (https://huggingface.co/papers/2010.02502) sampling
    on any list of timesteps, with a gradient that steers. Every step leads to the next entry of the list, and from the
    last to the clean image. Tables are kept in float64 and enter as Python numbers: the sample's dtype sets the
    precision.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`.
        beta_start (`float`, *optional*, defaults to 1e-4): First `beta` of the schedules that have one.
        beta_end (`float`, *optional*, defaults to 0.02): Last `beta` of the schedules that have one.
        beta_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*): The betas themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            What the U-Net predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        variance_type (`str`, *optional*, defaults to `"fixed_small"`): The variance of ancestral steps:
            `"fixed_small"` (`betatilde_t`), `"fixed_large"` (`beta_t`; at the last step `betatilde` of the step
            before), `"learned_range"` (the U-Net's further channels `v` interpolate between the logarithms of both,
            https://huggingface.co/papers/2102.09672, equation 15) or `"learned"` (they are the logarithm). Stock names
            that end in `_log` mean the same.
        sampler (`str`, *optional*, defaults to `"ancestral"`): `"ancestral"` or `"ddim"`.
        clip_sample (`bool`, *optional*, defaults to `True`): Whether predictions of the clean image are clipped.
        clip_sample_range (`float`, *optional*, defaults to 1.0): The limit of that clip.
        thresholding (`bool`, *optional*, defaults to `False`):
            Dynamic thresholding (https://huggingface.co/papers/2205.11487, section 2.3) in place of the clip.
        dynamic_thresholding_ratio (`float`, *optional*, defaults to 0.995): Its quantile of absolute values.
        sample_max_value (`float`, *optional*, defaults to 1.0): Its largest threshold.
        rescale_timesteps (`bool`, *optional*, defaults to `False`): Whether networks are given `1000 t / T`.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`): Refused if `True`.

    Raises:
        ValueError: For unknown names, and for schedules that end in pure noise.

    Example:

    ```py
    >>> from diffusers_ext import GuidedScheduler

    >>> scheduler = GuidedScheduler(sampler="ddim")
    >>> scheduler.set_timesteps(timestep_respacing="ddim4")
    >>> scheduler.timesteps.tolist()
    [750, 500, 250, 0]

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
        variance_type: str = "fixed_small",
        sampler: str = "ancestral",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_timesteps: bool = False,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}, but must be 'epsilon', 'sample' or 'v_prediction'."
            )
        variances = ("fixed_small", "fixed_large", "learned_range", "learned")
        if variance_type.removesuffix("_log") not in variances:
            raise ValueError(f"`variance_type` is {variance_type!r}, but must be one of {variances}.")
        if sampler not in ("ancestral", "ddim"):
            raise ValueError(f"`sampler` is {sampler!r}, but must be 'ancestral' or 'ddim'.")
        if num_train_timesteps < 2:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps}, but must be at least 2.")
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
        self._next = {timestep: timestep - 1 for timestep in range(num_train_timesteps)}

    # Copied from pipelines.copaint.CoPaintScheduler.__len__
    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timestep_respacing: str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        r"""
        Chooses the timesteps; give one of the three.

        Args:
            num_inference_steps (`int`, *optional*): So many, from `T - 1` to 0: the respacing of that number.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.
            timestep_respacing (`str`, *optional*): As [`space_timesteps`] says.
            timesteps (`Sequence[int]`, *optional*): The timesteps themselves, falling.

        Raises:
            ValueError: For none or several of the three, fewer than two timesteps (the variance of the last step is
                that of the one before), and timesteps that do not fall.
        """
        limit = self.config.num_train_timesteps
        given = {
            name: value
            for name, value in {
                "num_inference_steps": num_inference_steps,
                "timestep_respacing": timestep_respacing,
                "timesteps": timesteps,
            }.items()
            if value is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"{given or 'nothing'} was given: give one of `num_inference_steps`, `timestep_respacing` and "
                "`timesteps`."
            )
        if num_inference_steps is not None:
            if not isinstance(num_inference_steps, int) or not 2 <= num_inference_steps <= limit:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but the schedule has {limit} timesteps: choose "
                    f"a whole number from 2 to {limit}."
                )
            timestep_respacing = str(num_inference_steps)
        if timesteps is not None:
            kept = [int(timestep) for timestep in timesteps]
            if any(number != timestep for number, timestep in zip(kept, timesteps, strict=True)):
                raise ValueError(f"`timesteps` is {list(timesteps)}, but must be whole numbers.")
        else:
            kept = space_timesteps(limit, timestep_respacing)[::-1]
        falls = all(a > b for a, b in itertools.pairwise(kept))
        if len(kept) < 2 or not falls or not 0 <= kept[-1] <= kept[0] < limit:
            raise ValueError(
                f"{given} gives the timesteps {kept}, but there must be at least two, falling from at most "
                f"{limit - 1} to 0 or above."
            )
        self.num_inference_steps = len(kept)
        self._next = dict(itertools.pairwise([*kept, -1]))
        self.timesteps = torch.tensor(kept, dtype=torch.int64, device=device)

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

    def split(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        What the U-Net predicts, and the channels of its learned variance.

        Args:
            model_output (`torch.Tensor`): Shape of `sample`, or with twice the channels if the variance is learned.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, ...)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Both of the shape of `sample`.

        Raises:
            ValueError: If the channels do not fit `variance_type`.
        """
        channels, outputs = sample.shape[1], model_output.shape[1]
        learned = self.config.variance_type.startswith("learned")
        if outputs != channels * (1 + learned):
            raise ValueError(
                f"`model_output` has {outputs} channels for {channels} of `sample`, but `variance_type`="
                f"{self.config.variance_type!r} needs {channels * (1 + learned)}: set it to 'learned_range' for a "
                "U-Net that predicts noise and variance, to 'fixed_small' or 'fixed_large' for one "
                "that predicts the noise."
            )
        return model_output.split(channels, dim=1) if learned else (model_output, None)

    def predict_original_sample(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        r"""
        The clean image that the model sees in `sample`, not clipped:
        `x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)`. Differentiable in both tensors.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts, by `prediction_type`; shape of `sample`.
            timestep (`int`): The level of `sample`.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, ...)`.

        Returns:
            `torch.Tensor`: `x_0`, of the shape of `sample`.
        """
        level = self._levels[int(timestep)]
        if self.config.prediction_type == "epsilon":
            return (1 / level) ** 0.5 * sample - (1 / level - 1) ** 0.5 * model_output
        if self.config.prediction_type == "sample":
            return model_output
        return level**0.5 * sample - (1 - level) ** 0.5 * model_output  # v = sqrt(abar) eps - sqrt(1 - abar) x_0

    def clip(self, pred_original_sample: torch.Tensor) -> torch.Tensor:
        r"""
        Clips or thresholds predictions of the clean image, as the configuration says.

        Args:
            pred_original_sample (`torch.Tensor`): Shape `(batch, channels, ...)`.

        Returns:
            `torch.Tensor`: Of the same shape.
        """
        if self.config.thresholding:
            ratio, largest = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            magnitudes = pred_original_sample.flatten(1).abs()
            precise = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
            threshold = torch.quantile(precise, ratio, dim=1).clamp(1, max(1, largest)).to(magnitudes)
            threshold = threshold.reshape(-1, *(1,) * (pred_original_sample.ndim - 1))
            return torch.minimum(torch.maximum(pred_original_sample, -threshold), threshold) / threshold
        if self.config.clip_sample:
            return pred_original_sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return pred_original_sample

    def log_variance(
        self, timestep: int, variance_values: torch.Tensor | None = None
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        r"""
        Variance of the ancestral step from `timestep`, and its logarithm. At the last step `betatilde` is zero; its
        logarithm is that of the step before, which the learned variances interpolate from.

        Args:
            timestep (`int`): One of `timesteps`.
            variance_values (`torch.Tensor`, *optional*): The U-Net's variance channels, if `variance_type` is learned.

        Returns:
            `tuple`: Variance and logarithm, numbers, or tensors of the shape of `variance_values`.
        """

        def posterior(timestep: int) -> tuple[float, float]:
            level, next_level = self._levels[timestep], self._levels[self._next[timestep]]
            beta = 1 - level / next_level
            return beta, beta * (1 - next_level) / (1 - level)

        beta, small = posterior(timestep)
        last = small == 0
        if last:
            clipped = posterior(next(before for before, after in self._next.items() if after == timestep))[1]
        else:
            clipped = small
        kind = self.config.variance_type.removesuffix("_log")
        if kind == "learned_range":
            share = (variance_values + 1) / 2  # leaves [0, 1] where the network does
            logarithm = share * math.log(beta) + (1 - share) * math.log(clipped)
            return logarithm.exp(), logarithm
        if kind == "learned":
            return variance_values.exp(), variance_values
        if kind == "fixed_small":
            return small, math.log(clipped)
        large = clipped if last else beta
        return large, math.log(large)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        gradient: torch.Tensor | None = None,
        eta: float = 0.0,
        guidance_form: str = "mean",
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> GuidedSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One step to the next entry of `timesteps`, steered by `g = gradient`.

        Ancestral, `guidance_form="mean"` (algorithm 1): `mu + Sigma g + sqrt(Sigma) z`, with
        `mu = (sqrt(abar_prev) beta_t x_0 + sqrt(alpha_t) (1 - abar_prev) x_t) / (1 - abar_t)`. The shift is exact to
        first order in the step: with few steps it guides too little. `guidance_form="epsilon"`: the noise prediction
        is moved by `-sqrt(1 - abar_t) g` instead (equation 14), before anything else; with the exact gradient this is
        the ancestral step of the conditional model.

        DDIM (algorithm 2): the noise that follows from the clipped `x_0` is moved by `-sqrt(1 - abar_t) g`; what
        follows from it is not clipped again.

        Args:
            model_output (`torch.Tensor`): What the U-Net returned, with the channels of a learned variance.
            timestep (`int` or `torch.Tensor`): One of `timesteps`.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, ...)`.
            gradient (`torch.Tensor`, *optional*): `s grad log p(y | x_t)` at `sample`, of its shape.
            eta (`float`, *optional*, defaults to 0.0): Noise of DDIM's step, 0 for none, 1 for as much as DDPM.
            guidance_form (`str`, *optional*, defaults to `"mean"`): `"mean"` or `"epsilon"`, for ancestral steps.
            clip_denoised (`bool`, *optional*, defaults to `True`):
                `False` leaves the prediction of `x_0` as it is, whatever the configuration says.
            denoised_fn (`Callable`, *optional*): Applied to the prediction of `x_0` before it is clipped.
            generator (`torch.Generator` or a list of them, *optional*): For the step's noise.
            variance_noise (`torch.Tensor`, *optional*): That noise itself, of the shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`GuidedSchedulerOutput`].

        Returns:
            [`GuidedSchedulerOutput`] or `tuple`: The next sample and the prediction of the clean image.

        Raises:
            ValueError: For a timestep that is not in `timesteps`, an unknown form, and channels that do not fit
                `variance_type`.
        """
        if guidance_form not in ("mean", "epsilon"):
            raise ValueError(f"`guidance_form` is {guidance_form!r}, but must be 'mean' or 'epsilon'.")
        timestep = int(timestep)
        if timestep not in self._next:
            raise ValueError(
                f"`timestep` is {timestep}, but `timesteps` is {self.timesteps.tolist()}: take one of it."
            )
        model_output, variance_values = self.split(model_output, sample)
        level, next_level = self._levels[timestep], self._levels[self._next[timestep]]
        pred_original_sample = self.predict_original_sample(model_output, timestep, sample)
        ancestral = self.config.sampler == "ancestral"
        if ancestral and gradient is not None and guidance_form == "epsilon":
            # x_0 is moved by what moving eps by -sqrt(1 - abar_t) g makes of it
            pred_original_sample = pred_original_sample + (1 - level) / level**0.5 * gradient
        if denoised_fn is not None:
            pred_original_sample = denoised_fn(pred_original_sample)
        if clip_denoised:
            pred_original_sample = self.clip(pred_original_sample)

        if ancestral:
            beta = 1 - level / next_level
            prev_sample = beta * next_level**0.5 / (1 - level) * pred_original_sample
            prev_sample = prev_sample + (1 - next_level) * (1 - beta) ** 0.5 / (1 - level) * sample
            variance, logarithm = self.log_variance(timestep, variance_values)
            if gradient is not None and guidance_form == "mean":
                prev_sample = prev_sample + variance * gradient
            noisy = next_level < 1
            std = (logarithm / 2).exp() if isinstance(logarithm, torch.Tensor) else math.exp(logarithm / 2)
        else:
            noise_pred = ((1 / level) ** 0.5 * sample - pred_original_sample) / (1 / level - 1) ** 0.5
            if gradient is not None:
                noise_pred = noise_pred - (1 - level) ** 0.5 * gradient
                pred_original_sample = (1 / level) ** 0.5 * sample - (1 / level - 1) ** 0.5 * noise_pred
            variance = eta**2 * (1 - next_level) / (1 - level) * (1 - level / next_level)
            prev_sample = next_level**0.5 * pred_original_sample
            prev_sample = prev_sample + max(1 - next_level - variance, 0.0) ** 0.5 * noise_pred
            noisy, std = variance > 0, variance**0.5
        if noisy:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            prev_sample = prev_sample + std * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return GuidedSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


# ---------------------------------------------------------------------------------------------------------- gradients


class ClassifierGradient:
    r"""
    `grad_x log p(y | x_t)` of a classifier: a `cond_fn`, also for several classifiers at once.

    Args:
        classifier ([`NoisyClassifier`] or another `torch.nn.Module`):
            `classifier(sample, timestep)` returns logits `(batch, classes)`, or an output that has `logits`.
        targets (`torch.Tensor`): Labels, integers of shape `(batch,)`, or one for all; or weights of all classes,
            float of shape `(batch, classes)` or `(1, classes)`, whose gradients are summed with them: between two
            classes, or away from one.
        loss_scale (`float`, *optional*, defaults to 1.0): Multiplies what is differentiated and divides the gradient:
            a power of two keeps gradients of large images above the smallest number of float16.
        timestep_scale (`float`, *optional*, defaults to 1.0): Multiplies the timestep that the classifier is given.

    Raises:
        ValueError: For targets that do not fit the batch or the number of logits.
        TypeError: For targets that are no tensor.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import ClassifierGradient

    >>> centers = torch.eye(3)  # logits -|x - c_k|^2 / 2: the gradient of log p(0 | x) at 0 is c_0 - the mean of all
    >>> cond_fn = ClassifierGradient(lambda x, t: -(x[:, None] - centers).square().sum(-1) / 2, torch.tensor([0]))
    >>> cond_fn(torch.zeros(1, 3), torch.tensor([10]))
    tensor([[ 0.6667, -0.3333, -0.3333]])

    ```
    """

    def __init__(
        self, classifier: torch.nn.Module, targets: torch.Tensor, loss_scale: float = 1.0, timestep_scale: float = 1.0
    ) -> None:
        if not isinstance(targets, torch.Tensor):
            raise TypeError(f"`targets` is {targets!r}, but must be a `torch.Tensor`.")
        self.classifier, self.targets = classifier, targets
        self.loss_scale, self.timestep_scale = loss_scale, timestep_scale

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            timestep (`torch.Tensor`): `t`, shape `(batch,)`.

        Returns:
            `torch.Tensor`: The gradient, of the shape of `sample`, at least float32.
        """
        with torch.enable_grad():
            # Sums, and what is small, are not left to half precision.
            sample = sample.detach().to(torch.promote_types(sample.dtype, torch.float32), copy=True).requires_grad_()
            parameter = next(self.classifier.parameters(), None) if hasattr(self.classifier, "parameters") else None
            dtype = sample.dtype if parameter is None else parameter.dtype
            if self.timestep_scale != 1:
                timestep = timestep * self.timestep_scale
            output = self.classifier(sample.to(dtype), timestep)
            logits = getattr(output, "logits", output).to(sample.dtype)
            log_probabilities = torch.nn.functional.log_softmax(logits, dim=-1)
            targets, (count, classes) = self.targets.to(logits.device), logits.shape
            weights = targets.is_floating_point()
            shapes = [(count, classes), (1, classes)] if weights else [(count,), (1,), ()]
            if tuple(targets.shape) not in shapes or not (weights or (0 <= targets.min() <= targets.max() < classes)):
                raise ValueError(
                    f"`targets` is {targets.tolist()} for {count} images and {classes} classes: give labels from 0 to "
                    f"{classes - 1}, one or {count} of them, or float weights of shape ({count}, {classes})."
                )
            if weights:
                chosen = targets.to(logits.dtype) * log_probabilities
            else:
                chosen = log_probabilities.gather(1, targets.long().expand(count)[:, None])
            # A sum over the batch leaves every image its own gradient; a mean would divide the scale.
            [gradient] = torch.autograd.grad(chosen.sum() * self.loss_scale, sample)
        return gradient / self.loss_scale


class ClipGuidance:
    r"""
    Steers towards a text by a CLIP model (https://huggingface.co/papers/2112.10741, section 2.4): a `cond_fn` that
    returns the gradient of `exp(logit_scale) f(x) . g(text)`, with embeddings of length one. The logit scale, 100 in
    trained models, is part of it as in the authors' code; their guidance scales are 1 to 4.

    An ordinary CLIP was trained on clean images and sees little in noisy ones. With `predict` it looks at the clean
    image that the U-Net sees in the sample, and the gradient goes through the U-Net, at the cost of another pass
    through it and back.

    Args:
        model ([`~transformers.CLIPModel`]): Any size; it stays where it is and as it is.
        tokenizer ([`~transformers.CLIPTokenizer`]): Its tokenizer.
        prompt (`str` or `list[str]`): One text for all images, or one each.
        predict (`Callable`, *optional*): `predict(sample, timestep)` returns the clean images in [-1, 1]:
            [`ClassifierGuidancePipeline.predict_original_sample`]. Without, CLIP is shown the noisy sample.
        image_mean (`Sequence[float]`, *optional*): Mean of CLIP's input per channel.
        image_std (`Sequence[float]`, *optional*): Standard deviation of it.

    Raises:
        ValueError: If the number of texts is not one or that of the images.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import ClipGuidance
    >>> from transformers import CLIPModel, CLIPTokenizer

    >>> model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    >>> tokenizer = CLIPTokenizer.from_pretrained("openai/clip-vit-base-patch32")
    >>> cond_fn = ClipGuidance(model, tokenizer, "a corgi")
    >>> cond_fn(torch.randn(2, 3, 64, 64), torch.tensor([500, 500])).shape
    torch.Size([2, 3, 64, 64])

    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        prompt: str | list[str],
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        if len(prompt) == 0 and not isinstance(prompt, str):
            raise ValueError("`prompt` is empty: give one text, or one for each image.")
        self.model, self.predict = model, predict
        self.image_mean, self.image_std = image_mean, image_std
        tokens = tokenizer(
            [prompt] if isinstance(prompt, str) else list(prompt),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            embeds = model.text_projection(text.pooler_output)
        self.text_embeds = torch.nn.functional.normalize(embeds.float(), dim=-1)

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (`torch.Tensor`): `x_t`, shape `(batch, 3, height, width)`.
            timestep (`torch.Tensor`): `t`, shape `(batch,)`.

        Returns:
            `torch.Tensor`: The gradient, of the shape of `sample`, at least float32.

        Raises:
            ValueError: If the number of texts is not one or that of the images.
        """
        if len(self.text_embeds) not in (1, len(sample)):
            raise ValueError(
                f"`prompt` has {len(self.text_embeds)} texts for {len(sample)} images: give one, or one each."
            )
        size = self.model.config.vision_config.image_size
        with torch.enable_grad():
            sample = sample.detach().to(torch.promote_types(sample.dtype, torch.float32), copy=True).requires_grad_()
            mean, std = (
                sample.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.image_mean, self.image_std)
            )
            images = sample if self.predict is None else self.predict(sample, timestep)
            pixels = torch.nn.functional.interpolate(
                images / 2 + 0.5, (size, size), mode="bicubic", antialias=True, align_corners=False
            )
            vision = self.model.vision_model(pixel_values=((pixels - mean) / std).to(self.model.dtype))
            embeds = self.model.visual_projection(vision.pooler_output).to(sample.dtype)
            similarity = torch.nn.functional.normalize(embeds, dim=-1) * self.text_embeds.to(embeds)
            scale = self.model.logit_scale.detach().to(sample.dtype).exp()
            [gradient] = torch.autograd.grad(scale * similarity.sum(), sample)
        return gradient


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


# ---------------------------------------------------------------------------------------------------------- pipeline


@dataclass
class ClassifierGuidancePipelineOutput(BaseOutput):
    """
    Output of [`ClassifierGuidancePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` a tensor in [-1, 1].
        class_labels (`torch.Tensor`, *optional*):
            The classes that were asked for: labels of shape `(batch,)`, or weights of shape `(batch, classes)`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    class_labels: torch.Tensor | None = None


class ClassifierGuidancePipeline(HubMixin, DiffusionPipeline):
    r"""
    Samples of a diffusion model on pixels, steered by a classifier (https://huggingface.co/papers/2105.05233), by any
    function that returns a gradient, or without a classifier by a class-conditional model itself
    (https://huggingface.co/papers/2207.12598).

    Args:
        unet ([`UNet2DModel`], [`ADMUNet2DModel`] or another model on images):
            The pretrained network: unconditional or class-conditional, with or without learned variance. With twice
            the input channels it is an upsampler, whose further channels are the small image.
        scheduler ([`GuidedScheduler`] or another): A stock `DDPMScheduler` is converted to ancestral sampling, a
            `DDIMScheduler` to DDIM.
        classifier ([`NoisyClassifier`], *optional*): Trained on images with the same noise.
        null_class_label (`int`, *optional*): The label that a class-conditional `unet` was trained with when its label
            was left out; needed for classifier-free guidance.
        id2label (`dict[int, str]`, *optional*): Names of the classes; by default the classifier's.

    Raises:
        ValueError: If networks and scheduler do not fit each other.
    """

    # The classifier comes first in a step, and gradients of a `cond_fn` may go back through the U-Net.
    model_cpu_offload_seq = "classifier->unet"
    _optional_components = ["classifier"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        unet: UNet2DModel | ModelMixin,
        scheduler: GuidedScheduler | SchedulerMixin,
        classifier: NoisyClassifier | ModelMixin | None = None,
        null_class_label: int | None = None,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        config = unet.config
        if config.get("cross_attention_dim") is not None or config.get("class_embed_type") == "identity":
            raise ValueError(
                "`unet` needs a text or embeddings as its condition: this pipeline is for unconditional or "
                "class-conditional models on images."
            )
        if config.get("time_embedding_type") == "fourier":
            raise ValueError(
                "`unet` has `time_embedding_type='fourier'`: it is conditioned on noise levels, not on timesteps. "
                "Take a model of the variance-preserving kind with timesteps."
            )
        inputs, outputs = config.in_channels, config.out_channels
        if outputs not in (inputs, 2 * inputs, inputs // 2):
            raise ValueError(
                f"`unet` has {inputs} input and {outputs} output channels: it needs as many outputs as inputs, twice "
                "as many (noise and variance), or twice as many inputs (an upsampler)."
            )
        if all(base.__name__ != "GuidedScheduler" for base in type(scheduler).__mro__):
            samplers = {"DDPMScheduler": "ancestral", "DDIMScheduler": "ddim"}
            kind = next((base.__name__ for base in type(scheduler).__mro__ if base.__name__ in samplers), None)
            if kind is None:
                raise ValueError(
                    f"`scheduler` is a {type(scheduler).__name__}: give a `DDPMScheduler` for ancestral sampling, a "
                    "`DDIMScheduler` for DDIM, or a `GuidedScheduler`."
                )
            further = {"sampler": samplers[kind]}
            if "variance_type" not in scheduler.config:  # DDIM's own, which has none: what the U-Net's outputs are
                further["variance_type"] = "learned_range" if outputs == 2 * inputs else "fixed_small"
            stock, scheduler = scheduler, GuidedScheduler.from_config(scheduler.config, **further)
            check_schedule(stock, scheduler)
        if classifier is not None and not isinstance(classifier, ModelMixin):
            raise TypeError(
                f"`classifier` is a {type(classifier).__name__}, but components are of `ModelMixin`: hand any other "
                "module to the call, as `cond_fn=ClassifierGradient(module, labels)`."
            )
        limit = config.get("num_class_embeds")
        if null_class_label is not None and (
            not isinstance(null_class_label, int) or limit is None or not 0 <= null_class_label < limit
        ):
            raise ValueError(
                f"`null_class_label` is {null_class_label!r}, but `unet` has "
                + ("no class embeddings." if limit is None else f"the labels 0 to {limit - 1}.")
            )
        if id2label is not None:  # a list, or what JSON has made of the numbers
            id2label = dict(enumerate(id2label)) if isinstance(id2label, list | tuple) else id2label
            id2label = {int(number): name for number, name in id2label.items()}
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(null_class_label=null_class_label, id2label=id2label)
        self._check_variance()
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    # Copied from pipelines.copaint.CoPaintPipeline._state_dtype
    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory (1 - abar_0 = 1e-4 is lost): only the network computes in it.
        return torch.promote_types(self.unet.dtype, torch.float32)

    @property
    def _num_channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.out_channels // (1 + self.scheduler.config.variance_type.startswith("learned"))

    def _check_variance(self) -> None:
        """Raises an error if the U-Net's channels do not fit the scheduler's variance."""
        inputs, outputs = self.unet.config.in_channels, self.unet.config.out_channels
        learned = self.scheduler.config.variance_type.startswith("learned")
        # noise, or noise and variance, of as many channels as go in, or of half as many (an upsampler)
        channels, rest = divmod(outputs, 1 + learned)
        if rest or inputs not in (channels, 2 * channels):
            raise ValueError(
                f"`unet` has {inputs} input and {outputs} output channels, but the scheduler's `variance_type` is "
                f"{self.scheduler.config.variance_type!r}: set it to 'learned_range' for a U-Net that predicts noise "
                "and variance, to 'fixed_small' or 'fixed_large' for one that predicts the noise."
            )

    def _check_classifier(self, size: tuple[int, int]) -> None:
        """Raises an error that names the reason if the classifier was trained on other images or other noise."""
        config = getattr(self.classifier, "config", None)
        if config is None or "sample_size" not in config:  # somebody's own, of which nothing is known
            return
        if size != (config.sample_size, config.sample_size) or config.in_channels != self._num_channels:
            raise ValueError(
                f"`classifier` is for {config.in_channels} channels of {config.sample_size} x {config.sample_size} "
                f"pixels, but `unet` makes {self._num_channels} channels of {size[0]} x {size[1]}: take a classifier "
                "that was trained on images of that size."
            )
        trained, levels = config.get("trained_alphas_cumprod"), noise_levels(self.scheduler)
        total = self.scheduler.config.num_train_timesteps
        apart = trained is not None and max(abs(a - b) for a, b in zip(trained, levels, strict=True)) > 1e-3
        if apart or (
            config.get("num_train_timesteps", total) != total and not self.scheduler.config.rescale_timesteps
        ):
            raise ValueError(
                f"`classifier` was trained on {config.num_train_timesteps} timesteps with abar from "
                f"{trained or 'unknown'}, but the scheduler has {total} with {[round(x, 5) for x in levels]}: take a "
                "classifier that was trained with the noise schedule of the diffusion model."
            )

    def _prepare_targets(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None,
        batch_size: int | None,
        classified: bool,
    ) -> tuple[torch.Tensor | None, int]:
        """Labels or weights of classes on the device, checked for who is given them, and the number of images."""
        counts = {}
        if getattr(self.unet, "class_embedding", None) is not None and self.unet.config.num_class_embeds is not None:
            counts["unet"] = self.unet.config.num_class_embeds
        known = getattr(self.classifier, "config", {})
        if classified and "num_classes" in known:
            counts["classifier"] = known["num_classes"]
        if class_labels is None:
            return None, 1 if batch_size is None else batch_size
        single = isinstance(class_labels, int | np.integer | str) and not isinstance(class_labels, bool)
        rows = [class_labels] if single else class_labels
        if not isinstance(rows, torch.Tensor):
            if not isinstance(rows, list | tuple | np.ndarray) or (isinstance(rows, np.ndarray) and rows.ndim == 0):
                raise TypeError(f"`class_labels` is {class_labels!r}, but must be labels, names, or a tensor.")
            if isinstance(rows, np.ndarray):
                rows = torch.from_numpy(rows)
            elif not all(isinstance(row, int | np.integer | str) and not isinstance(row, bool) for row in rows):
                raise TypeError(f"`class_labels` is {class_labels!r}, but labels are integers or names.")
        if len(rows) == 0 if not isinstance(rows, torch.Tensor) else rows.numel() == 0:
            raise ValueError("`class_labels` is empty: give at least one label.")
        if not isinstance(rows, torch.Tensor):
            ids: dict[str, list[int]] = {}
            for number, name in (self.config.id2label or known.get("id2label") or {}).items():
                ids.setdefault(name, []).append(int(number))
            words = [row for row in rows if isinstance(row, str)]
            unknown = [word for word in words if word not in ids]
            if unknown:
                listed = ", ".join(map(repr, list(ids)[:20])) or "none: give numbers, or `id2label` to the pipeline"
                raise ValueError(f"`class_labels` has the unknown names {unknown}; known are {listed}.")
            several = {word: ids[word] for word in words if len(ids[word]) > 1}
            if several:
                raise ValueError(f"`class_labels` has names that mean several labels, {several}: give the numbers.")
            rows = torch.as_tensor([ids[row][0] if isinstance(row, str) else int(row) for row in rows])
        targets = rows.to(self._execution_device)
        targets = targets.reshape(1) if targets.ndim == 0 else targets
        if targets.dtype == torch.bool or targets.is_complex():
            raise TypeError(
                f"`class_labels` has dtype {targets.dtype}, but labels are integers and weights are floats."
            )
        if targets.is_floating_point():
            classes = counts.get("classifier")
            if "unet" in counts or classes is None or targets.ndim != 2 or targets.shape[1] != classes:
                raise ValueError(
                    f"`class_labels` are weights of shape {tuple(targets.shape)}: with an unconditional `unet` and a "
                    f"`classifier` they may be of shape (batch, {classes or 'classes'}); else give integers."
                )
            if not targets.isfinite().all():
                raise ValueError("`class_labels` are weights that are not all finite.")
        else:
            if targets.ndim > 1:
                raise ValueError(
                    f"`class_labels` has shape {tuple(targets.shape)} and dtype {targets.dtype}: give labels of shape "
                    "(batch,), or make weights of classes floats."
                )
            targets = targets.to(torch.int64)
            for name, count in counts.items():
                if not 0 <= targets.min() <= targets.max() < count:
                    raise ValueError(
                        f"`class_labels` is {targets.tolist()}, but `{name}` knows the labels 0 to {count - 1}."
                    )
        if batch_size is not None and len(targets) == 1:
            targets = targets.expand(batch_size, *targets.shape[1:])
        if batch_size not in (None, len(targets)):
            raise ValueError(
                f"`class_labels` has {len(targets)} entries for `batch_size`={batch_size}: give one of them."
            )
        return targets, len(targets)

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

    def predict_original_sample(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        The clean images that the U-Net sees in noisy ones, not clipped; differentiable in `sample`. For a `cond_fn`
        that looks at clean images, such as [`ClipGuidance`].

        Args:
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            timestep (`torch.Tensor`): `t`, int64 of shape `(batch,)`, the same for all.
            class_labels (`torch.Tensor`, *optional*): For a class-conditional U-Net, int64 of shape `(batch,)`.
            low_res (`torch.Tensor`, *optional*): For an upsampler, the small images in [-1, 1], already enlarged.

        Returns:
            `torch.Tensor`: `x_0` in [-1, 1], of the shape of `sample`.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import ClassifierGuidancePipeline

        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> pipe = ClassifierGuidancePipeline(unet, DDPMScheduler())
        >>> pipe.predict_original_sample(torch.randn(2, 1, 8, 8), torch.tensor([500, 500])).shape
        torch.Size([2, 1, 8, 8])

        ```
        """
        if getattr(self.unet, "class_embedding", None) is not None and class_labels is None:
            raise ValueError(
                "`class_labels` are missing, as `unet` is class-conditional: hand over "
                "`functools.partial(pipe.predict_original_sample, class_labels=labels)`."
            )
        if (low_res is not None) != (self.unet.config.in_channels == 2 * sample.shape[1]):
            raise ValueError("`low_res` is for upsamplers, and needed by them: the small images, already enlarged.")
        class_labels, low_res = (x if x is None else x.to(sample.device) for x in (class_labels, low_res))
        time = int(torch.as_tensor(timestep).reshape(-1)[0])
        output = self._predict(sample, time, class_labels, None, low_res)
        model_output, _ = self.scheduler.split(output, sample)
        return self.scheduler.predict_original_sample(model_output, time, sample)

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: int,
        class_labels: torch.Tensor | None,
        classifier_free_scale: float | None,
        low_res: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the U-Net returns, in the sample's dtype; with a scale, guided by itself, both halves in one batch."""
        total = self.scheduler.config.num_train_timesteps
        time = timestep * 1000 / total if self.scheduler.config.rescale_timesteps else timestep
        inputs = sample if low_res is None else torch.cat([sample, low_res], dim=1)
        if classifier_free_scale is not None:
            inputs = torch.cat([inputs, inputs])
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.config.null_class_label)])
        times = torch.full((len(inputs),), time, device=inputs.device)
        output = self.unet(inputs.to(self.unet.dtype), times, class_labels=class_labels).sample.to(sample.dtype)
        if classifier_free_scale is None:
            return output
        # The prediction is guided, s = 1 + w; the variance stays that of the conditional model.
        conditional, null = output.chunk(2)
        channels = sample.shape[1]
        noise, null_noise = conditional[:, :channels], null[:, :channels]
        noise = null_noise + classifier_free_scale * (noise - null_noise)
        return torch.cat([noise, conditional[:, channels:]], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        timestep_respacing: str | Sequence[int] | None = None,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        cond_fn: Callable | Sequence[Callable | tuple[Callable, float]] | None = None,
        guidance_form: str = "mean",
        classifier_free_scale: float = 1.0,
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        eta: float = 0.0,
        low_res: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        batch_size: int | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ClassifierGuidancePipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ClassifierGuidancePipelineOutput | tuple:
        r"""
        Draws images.

        Published settings, 250 ancestral steps / 25 steps of DDIM with `timestep_respacing="ddim25"`: ImageNet 64 x 64
        1.0, 128 x 128 0.5 / 1.25, 256 x 256 1.0 / 2.5 (unconditional U-Net: 10.0), 512 x 512 4.0 / 9.0.

        Args:
            class_labels (`int`, `str`, a list of them, or `torch.Tensor`, *optional*):
                What to draw, one image per entry: numbers, or names of `id2label`. Or float weights of shape
                `(batch, classes)`: the gradients of all classes' log probabilities are summed with them, half and half
                between two, say. A class-conditional U-Net is given the labels too.
            guidance_scale (`float`, *optional*, defaults to 1.0): `s`, multiplies the gradient. 0 turns guidance off:
                the classifier is not called.
            num_inference_steps (`int`, *optional*, defaults to 250): Number of steps, spread evenly from `T - 1` to 0.
            timestep_respacing (`str` or `list[int]`, *optional*):
                In place of it `"ddim25"`, `"10,15,20"` (see [`space_timesteps`]), or the timesteps, falling.
            guidance_start (`float`, *optional*, defaults to 0.0): Share of the steps after which guidance begins.
            guidance_stop (`float`, *optional*, defaults to 1.0): Share of the steps after which it ends.
            cond_fn (`Callable`, *optional*): `cond_fn(sample, timestep)` in place of the classifier, for any guidance:
                it returns `grad log p(y | x_t)`, not scaled, of the shape of `sample`; `timestep` is the timestep of
                training, int64 of shape `(batch,)`. Gradients may be taken in it without further ado. A list, or a
                list of pairs `(cond_fn, weight)`, is summed: several classifiers are several [`ClassifierGradient`].
            guidance_form (`str`, *optional*, defaults to `"mean"`): For ancestral steps `"mean"` (the authors'
                algorithm, which guides too little if there are few steps) or `"epsilon"`: [`GuidedScheduler.step`].
            classifier_free_scale (`float`, *optional*, defaults to 1.0):
                `s` of classifier-free guidance, `eps(null) + s (eps(y) - eps(null))`, for a class-conditional U-Net
                with `null_class_label`. 1 turns it off; the paper's `w` is `s - 1`.
            clip_denoised (`bool`, *optional*, defaults to `True`):
                `False` leaves predictions of the clean image as they are; `True` treats them as the scheduler's
                configuration says, as a rule clipped to [-1, 1].
            denoised_fn (`Callable`, *optional*): Applied to these predictions before that.
            eta (`float`, *optional*, defaults to 0.0): Noise of DDIM's steps, 0 to 1.
            low_res: For upsamplers, one small image or one each: PIL images, or arrays or tensors in [0, 1]. It is
                enlarged bilinearly. ADM's upsamplers were trained on 8-bit images.
            batch_size (`int`, *optional*): Number of images if `class_labels` does not say it.
            latents (`torch.Tensor`, *optional*): `x_T` in place of a draw, shape `(batch, channels, height, width)`.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per image, which then
                depends on no other. Draws: `x_T`, then a noise for every step but the last.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (values in [0, 1]), or `"latent"` (in [-1, 1], as sampled). 8-bit images are
                rounded, where the authors' code cuts off: a pixel may differ by one.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`ClassifierGuidancePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step; it may return
                `{"latents": ...}`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What of `"latents"` and `"pred_original_sample"` is in `callback_kwargs`.

        Raises:
            TypeError: For labels and images of a type that cannot be used.
            ValueError: For arguments that do not fit each other or the networks, before a network runs; for a
                gradient of another shape, and samples that are not finite.
            RuntimeError: With guidance within `torch.inference_mode`, where no gradient can be had.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import ClassifierGuidancePipeline, NoisyClassifier

        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> classifier = NoisyClassifier(
        ...     8, in_channels=1, num_classes=2, layers_per_block=1, block_out_channels=(8, 16), attention_head_dim=8,
        ...     norm_num_groups=4, id2label={0: "cat", 1: "dog"},
        ... )
        >>> pipe = ClassifierGuidancePipeline(unet, DDPMScheduler(), classifier)
        >>> pipe(["dog", "cat"], guidance_scale=2.0, num_inference_steps=4, output_type="pt").images.shape
        torch.Size([2, 1, 8, 8])
        >>> bright = lambda sample, timestep: torch.ones_like(sample)
        >>> pipe(cond_fn=bright, batch_size=3, timestep_respacing="3,2", output_type="np").images.shape
        (3, 8, 8, 1)

        ```
        """
        # 1. Check inputs
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        for name, value in {"guidance_scale": guidance_scale, "classifier_free_scale": classifier_free_scale}.items():
            if not math.isfinite(value):
                raise ValueError(f"`{name}` is {value}, but must be finite.")
        if not 0 <= guidance_start < guidance_stop <= 1:
            raise ValueError(
                f"`guidance_start` is {guidance_start} and `guidance_stop` is {guidance_stop}: they are shares of the "
                "steps, 0 <= start < stop <= 1."
            )
        if guidance_form not in ("mean", "epsilon"):
            raise ValueError(f"`guidance_form` is {guidance_form!r}, but must be 'mean' or 'epsilon'.")
        if not 0 <= eta <= 1 or (eta > 0 and self.scheduler.config.sampler == "ancestral"):
            raise ValueError(
                f"`eta` is {eta}, but must be from 0 to 1, and 0 for ancestral sampling: give the pipeline a "
                "`DDIMScheduler` to set it."
            )
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` is {batch_size}, but must be a whole number from 1.")
        self._check_variance()
        conditional = getattr(self.unet, "class_embedding", None) is not None
        classified = guidance_scale != 0 and cond_fn is None and self.classifier is not None
        targets, count = self._prepare_targets(class_labels, batch_size, classified)
        size = self.unet.config.sample_size
        if size is None and latents is None:
            raise ValueError("`unet` has no `sample_size`: give `latents`, whose size the images will have.")
        size = tuple(latents.shape[-2:]) if size is None else size
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if conditional and targets is None:
            raise ValueError("`class_labels` are missing: this pipeline's `unet` is class-conditional.")
        guided = guidance_scale != 0 and (cond_fn is not None or self.classifier is not None)
        if guided and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "guidance differentiates, which `torch.inference_mode` rules out: call the pipeline without, it needs "
                "no `torch.no_grad` either."
            )
        if guided and cond_fn is None:
            if targets is None:
                raise ValueError(
                    "`class_labels` are missing: say what the classifier shall steer to, or set `guidance_scale=0`."
                )
            self._check_classifier(size)
            rescaled = self.scheduler.config.rescale_timesteps
            scale = 1000 / self.scheduler.config.num_train_timesteps if rescaled else 1.0
            cond_fn = ClassifierGradient(self.classifier, targets, timestep_scale=scale)
        elif targets is not None and not conditional and cond_fn is None and self.classifier is None:
            raise ValueError(
                "`class_labels` were given, but this pipeline has an unconditional `unet` and no `classifier`: give "
                "it one, or a `cond_fn`."
            )
        parts = cond_fn if isinstance(cond_fn, list | tuple) else [cond_fn]
        parts = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
        if guided and not (parts and all(len(part) == 2 and callable(part[0]) for part in parts)):
            raise TypeError(
                "`cond_fn` must be a function, a list of functions, or a list of pairs (function, weight)."
            )
        if classifier_free_scale != 1 and (not conditional or self.config.null_class_label is None):
            raise ValueError(
                f"`classifier_free_scale` is {classifier_free_scale}, but "
                + ("`unet` knows no classes" if not conditional else "the pipeline has no `null_class_label`")
                + ": it needs a class-conditional U-Net, and the label that stood for none in its training as the "
                "pipeline's `null_class_label`."
            )
        channels = self._num_channels
        if (low_res is not None) != (self.unet.config.in_channels == 2 * channels):
            raise ValueError(
                "`low_res` is missing: this pipeline's `unet` enlarges images."
                if low_res is None
                else "`low_res` was given, but this pipeline's `unet` is no upsampler: leave it out."
            )
        if low_res is not None:
            low_res = 2 * to_batch(low_res, channels, "low_res").to(self._execution_device, self._state_dtype) - 1
            if len(low_res) not in (1, count):
                raise ValueError(f"`low_res` has {len(low_res)} images for {count} results: give one, or one each.")
            low_res = torch.nn.functional.interpolate(low_res, size, mode="bilinear").expand(count, -1, -1, -1)
        if isinstance(timestep_respacing, str):
            self.scheduler.set_timesteps(timestep_respacing=timestep_respacing)
        elif timestep_respacing is not None:
            if not isinstance(timestep_respacing, Sequence | np.ndarray | torch.Tensor):
                raise TypeError(f"`timestep_respacing` is {timestep_respacing!r}, but must be a `str` or timesteps.")
            self.scheduler.set_timesteps(timesteps=timestep_respacing)
        else:
            self.scheduler.set_timesteps(num_inference_steps)
        latents = self._prepare_latents(latents, (count, channels, *size), generator)

        # 2. From noise to images
        timesteps = self.scheduler.timesteps.tolist()
        first, last = guided_steps(guidance_start, guidance_stop, len(timesteps))
        labels = targets if conditional else None
        classifier_free = classifier_free_scale if classifier_free_scale != 1 else None
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            gradient = None
            if guided and first <= step < last:
                times = torch.full((count,), timestep, dtype=torch.int64, device=latents.device)
                for part, weight in parts:
                    with torch.enable_grad():
                        term = part(latents.detach().clone(), times)
                    if not isinstance(term, torch.Tensor) or term.shape != latents.shape:
                        raise ValueError(
                            f"`cond_fn` returned {tuple(getattr(term, 'shape', ())) or type(term).__name__}, but must "
                            f"return a gradient of the sample's shape {tuple(latents.shape)}."
                        )
                    term = guidance_scale * weight * term.detach().to(latents)
                    gradient = term if gradient is None else gradient + term
            model_output = self._predict(latents, timestep, labels, classifier_free, low_res)
            latents, pred_original_sample = self.scheduler.step(
                model_output,
                timestep,
                latents,
                gradient=gradient,
                eta=eta,
                guidance_form=guidance_form,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                generator=generator,
                return_dict=False,
            )
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                replaced = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)
                if replaced.shape != latents.shape:
                    raise ValueError(
                        f"`callback_on_step_end` returned latents of shape {tuple(replaced.shape)}, but must "
                        f"keep {tuple(latents.shape)}."
                    )
                latents = replaced.to(latents)
        if not latents.isfinite().all():
            raise ValueError(
                "the samples are not finite: see if gradients of `cond_fn` are, choose a smaller `guidance_scale`, or "
                "run the networks in float32."
            )

        # 3. Images
        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, targets
        return ClassifierGuidancePipelineOutput(images=images, class_labels=targets)


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


def guided_steps(start: float, stop: float, num_steps: int) -> tuple[int, int]:
    r"""
    The steps between two shares of them: the first, and the one after the last.

    Args:
        start (`float`): Share of the steps after which guidance begins, 0 to 1.
        stop (`float`): Share of the steps after which it ends.
        num_steps (`int`): Number of steps.

    Returns:
        `tuple[int, int]`: The first step of which at least the share `start` lies before it, and likewise for `stop`.

    Example:

    ```py
    >>> from diffusers_ext.pipelines.classifier_guidance import guided_steps

    >>> guided_steps(0.28, 0.5, 25)
    (7, 13)

    ```
    """
    # 0.28 * 25 is a little more than 7
    return tuple(math.ceil(share * num_steps - 1e-9) for share in (start, stop))


# ------------------------------------------------------------------------------------------------------------ guider


class ClassifierGuidanceGuider(BaseGuidance):
    r"""
    Classifier guidance for modular pipelines: moves the denoiser's prediction by what moving the noise prediction by
    `-s sqrt(1 - abar_t) g` makes of it (https://huggingface.co/papers/2105.05233, equation 14), with `g` of a
    `cond_fn`: a noise prediction by `-sqrt(1 - abar_t) s g`, a velocity by `-sqrt((1 - abar_t) / abar_t) s g`, a clean
    image by `(1 - abar_t) / sqrt(abar_t) s g`.

    It needs `x_t`: the denoiser has to hand over `latents` (or `hidden_states`) among the guider's inputs. Of the
    stock blocks few do, and those of flow-matching models have no `abar_t`; both are refused with an error.

    Args:
        guidance_scale (`float`, *optional*, defaults to 1.0): `s`.
        start (`float`, *optional*, defaults to 0.0): Share of the steps after which guidance begins.
        stop (`float`, *optional*, defaults to 1.0): Share of the steps after which it ends.
        enabled (`bool`, *optional*, defaults to `True`): Whether it acts at all.
        cond_fn (`Callable`, *optional*): `cond_fn(sample, timestep)` as in [`ClassifierGuidancePipeline`], such as a
            [`ClassifierGradient`]. Not part of the configuration: set it again after loading.
        scheduler ([`SchedulerMixin`], *optional*): The pipeline's scheduler, for `alphas_cumprod` and
            `prediction_type`. Not part of the configuration either.

    Raises:
        ValueError: On use, without `cond_fn` or `scheduler`, without latents, and for schedulers without
            `alphas_cumprod`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import DDIMScheduler
    >>> from diffusers_ext import ClassifierGuidanceGuider

    >>> guider = ClassifierGuidanceGuider(2.0, cond_fn=lambda x, t: -x, scheduler=DDIMScheduler())
    >>> latents = torch.ones(1, 1, 2, 2)
    >>> guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(999))
    >>> [batch] = guider.prepare_inputs({"latents": latents})
    >>> batch.noise_pred = torch.zeros(1, 1, 2, 2)  # what the denoiser makes of it
    >>> guider([batch]).pred.flatten()
    tensor([2.0000, 2.0000, 2.0000, 2.0000])

    ```
    """

    _input_predictions = ["pred_cond"]
    ignore_for_config = ["cond_fn", "scheduler"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        cond_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale, self.cond_fn, self.scheduler = guidance_scale, cond_fn, scheduler

    def prepare_inputs(self, data: dict[str, torch.Tensor | tuple[torch.Tensor, ...]]) -> list[Any]:
        """One batch of the conditional inputs; see the base class.

        Args:
            data (`dict`): The denoiser's inputs by name.
        """
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same from a block's state; see the base class.

        Args:
            data (`BlockState`): The state of the block.
            input_fields (`dict`): Which of its fields are the denoiser's inputs.
        """
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """
        Args:
            data (`list[BlockState]`): The one batch, with `noise_pred` and `latents` or `hidden_states`.

        Returns:
            `GuiderOutput`: The guided prediction.

        Raises:
            ValueError: As the class says.
        """
        [batch] = data
        pred = batch.noise_pred
        inside = True
        if self._num_inference_steps is not None:
            first, last = guided_steps(self._start, self._stop, self._num_inference_steps)
            inside = first <= self._step < last
        if not self._enabled or not inside or self.guidance_scale == 0:
            return GuiderOutput(pred=pred, pred_cond=pred, pred_uncond=None)
        if self.cond_fn is None or self.scheduler is None:
            raise ValueError(
                f"`cond_fn` is {self.cond_fn} and `scheduler` is {self.scheduler}: set both on the guider before use."
            )
        latents = getattr(batch, "latents", None)
        latents = getattr(batch, "hidden_states", None) if latents is None else latents
        if latents is None:
            raise ValueError(
                f"the denoiser hands over {sorted(k for k in batch.as_dict() if not k.startswith('_'))}, but this "
                "guider needs `latents`: add `latents=block_state.latents` to the guider's inputs in the denoiser "
                "block."
            )
        levels = getattr(self.scheduler, "alphas_cumprod", None)
        if levels is None or float(getattr(self.scheduler, "init_noise_sigma", 1.0)) != 1:
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, which has no `alphas_cumprod` or steps on latents "
                "that are scaled otherwise: this guider is for schedulers of the variance-preserving kind, such as "
                "`DDIMScheduler`."
            )
        timestep = int(torch.as_tensor(self._timestep).reshape(-1)[0])
        level = float(levels[timestep])
        times = torch.full((len(latents),), timestep, dtype=torch.int64, device=latents.device)
        with torch.enable_grad():
            gradient = self.cond_fn(latents.detach().clone(), times)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != latents.shape:
            raise ValueError(
                f"`cond_fn` returned {tuple(getattr(gradient, 'shape', ())) or type(gradient).__name__}, but must "
                f"return a gradient of the latents' shape {tuple(latents.shape)}."
            )
        gradient = self.guidance_scale * gradient.detach()
        kind, channels = self.scheduler.config.prediction_type, latents.shape[1]
        guided = pred.clone()  # further channels, of a learned variance, stay as they are
        if kind == "epsilon":
            guided[:, :channels] -= ((1 - level) ** 0.5 * gradient).to(pred)
        elif kind == "v_prediction":
            guided[:, :channels] -= (((1 - level) / level) ** 0.5 * gradient).to(pred)
        elif kind == "sample":
            guided[:, :channels] += ((1 - level) / level**0.5 * gradient).to(pred)
        else:
            raise ValueError(f"`prediction_type` is {kind!r}, but must be 'epsilon', 'sample' or 'v_prediction'.")
        return GuiderOutput(pred=guided, pred_cond=pred, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        """Always: one conditional prediction is guided."""
        return True

    @property
    def num_conditions(self) -> int:
        """One."""
        return 1
