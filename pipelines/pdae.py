"""PDAE: a semantic code for images, learned from a frozen diffusion model.

*Unsupervised Representation Learning from Pre-trained Diffusion Probabilistic Models*, Zhang, Zhao and Lin, NeurIPS
2022 (https://huggingface.co/papers/2212.12990). A pretrained U-Net cannot recover an image from pure noise, because
the mean of its reverse step differs from that of the true posterior, which knows the image. An encoder `E` gives a
code `z = E(x_0)`, and a gradient estimator `G(x_t, z, t)` moves the mean by `Sigma_t G`, as a classifier's gradient
would; training both to close the gap puts into `z` what the noise has destroyed. The U-Net is never changed.

This file is complete in itself: models, scheduler, pipeline. Notation: `abar_t` is the cumulative product of
`alpha_t = 1 - beta_t`; timestep 0 is the least noisy level and index -1 stands for the clean image, `abar = 1`.
"""

import inspect
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import nn

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})


# ------------------------------------------------------------------------------------------------------------ models


class PDAEEncoder(ModelMixin, ConfigMixin):
    r"""
    The semantic encoder `z = E(x_0)`: strided convolutions and one linear layer, deterministic, with no normalization
    of the code.

    Every block halves the resolution: `Conv2d(stride=2)`, followed by `GroupNorm` and SiLU; one block may carry
    self-attention after its convolution. The defaults are the authors' network for 128 x 128 images, which ends at
    4 x 4; `block_out_channels=(64, 128, 128, 128), attention_block=1` at `sample_size=64` is theirs for 64 x 64.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 128):
            Height and width of the images; fixed, because the last layer is linear.
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        latent_dim (`int`, *optional*, defaults to 512): Size of the code.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256, 256, 256)`):
            Output channels of the blocks, one block per halving.
        attention_block (`int`, *optional*, defaults to 2):
            Index of the block with self-attention; `None` for an encoder without.
        num_attention_heads (`int`, *optional*, defaults to 4): Heads of that attention.
        norm_num_groups (`int`, *optional*, defaults to 32): Groups of every `GroupNorm`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import PDAEEncoder

    >>> encoder = PDAEEncoder(
    ...     sample_size=8, in_channels=1, latent_dim=32, block_out_channels=(32, 64), attention_block=None,
    ...     norm_num_groups=8,
    ... )
    >>> encoder(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 32])

    ```
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 128,
        in_channels: int = 3,
        latent_dim: int = 512,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256, 256),
        attention_block: int | None = 2,
        num_attention_heads: int = 4,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        layers = []
        channels = in_channels
        for index, out_channels in enumerate(block_out_channels):
            if out_channels % norm_num_groups:
                raise ValueError(
                    f"`block_out_channels` holds {out_channels}, which `norm_num_groups`={norm_num_groups} does not "
                    "divide: change one of the two."
                )
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1))
            if index == attention_block:
                layers.append(
                    Attention(
                        out_channels,
                        heads=num_attention_heads,
                        dim_head=out_channels // num_attention_heads,
                        norm_num_groups=norm_num_groups,
                        residual_connection=True,
                        bias=True,
                        eps=1e-5,
                        upcast_softmax=True,
                        _from_deprecated_attn_block=True,
                    )
                )
            layers += [nn.GroupNorm(norm_num_groups, out_channels), nn.SiLU()]
            channels, height, width = out_channels, (height + 1) // 2, (width + 1) // 2
        self.blocks = nn.Sequential(*layers)
        self.to_latent = nn.Linear(channels * height * width, latent_dim)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (`torch.Tensor`): Clean images in [-1, 1], shape `(batch, in_channels, height, width)`.

        Returns:
            `torch.Tensor`: The codes, shape `(batch, latent_dim)`.

        Raises:
            ValueError: If `sample` has another number of channels or another size than the config says.
        """
        size = self.config.sample_size
        expected = (self.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, but this encoder was built for (batch, "
                f"{', '.join(map(str, expected))}): resize or convert the images, or train an encoder for theirs."
            )
        return self.to_latent(self.blocks(sample).flatten(1))


class LatentModulation(nn.Module):
    r"""
    Takes the place of a residual block's time projection, so that the unmodified diffusers block is modulated by the
    time and then by the code (adaptive group normalization, as in the paper):

    `(1 + z_s) ((1 + t_s) GroupNorm(h) + t_b) + z_b`, which is `(1 + s) GroupNorm(h) + b` with
    `s = t_s + z_s + t_s z_s` and `b = (1 + z_s) t_b + z_b`: the scale and the shift that the block asks for.

    Args:
        embedding_dim (`int`): Size of the time embedding and of the code's embedding.
        channels (`int`): Channels that are modulated.
    """

    def __init__(self, embedding_dim: int, channels: int) -> None:
        super().__init__()
        self.time_proj = nn.Linear(embedding_dim, 2 * channels)
        self.code_proj = nn.Linear(embedding_dim, 2 * channels)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            embedding (`torch.Tensor`):
                Embeddings of the time and of the code side by side, after the activation, shape
                `(batch, 2 * embedding_dim)`.

        Returns:
            `torch.Tensor`: Scale and shift side by side, shape `(batch, 2 * channels)`.
        """
        time, code = embedding.chunk(2, dim=1)
        time_scale, time_shift = self.time_proj(time).chunk(2, dim=1)
        code_scale, code_shift = self.code_proj(code).chunk(2, dim=1)
        scale = time_scale + code_scale + time_scale * code_scale
        return torch.cat([scale, (1 + code_scale) * time_shift + code_shift], dim=1)


class PDAEGradientEstimator(ModelMixin, ConfigMixin):
    r"""
    The gradient estimator `G(x_t, z, t)`, which stands for `grad_{x_t} log p(z | x_t)`: a second middle block and
    second up blocks on the time embedding, the down blocks and the skip connections of the frozen U-Net (see
    [`unet_down`]).

    Its weights are its own and start fresh; the last convolution of every residual block and of the network is zero,
    so that training starts exactly at the pretrained model (`G = 0`). Use [`PDAEGradientEstimator.from_unet`] for one
    that fits a U-Net; the arguments beside `latent_dim` are those of [`UNet2DModel`]. Time is injected by scale and
    shift (adaptive group normalization), also where the U-Net adds it.

    Args:
        latent_dim (`int`, *optional*, defaults to 512): Size of the code `z`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 512,
        in_channels: int = 3,
        time_embedding_dim: int | None = None,
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        add_attention: bool = True,
    ) -> None:
        super().__init__()
        # The second half of a U-Net of the same shape; its first half is the frozen U-Net's.
        unet = UNet2DModel(
            in_channels=in_channels,
            out_channels=in_channels,
            time_embedding_dim=time_embedding_dim,
            down_block_types=("DownBlock2D",) * len(block_out_channels),
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            # With "default" time injection a U-Net normalizes before its middle attention in any case.
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift="scale_shift",
            add_attention=add_attention,
        )
        embedding_dim = time_embedding_dim or 4 * block_out_channels[0]
        self.code_embedding = nn.Linear(latent_dim, embedding_dim)
        self.mid_block = unet.mid_block
        self.up_blocks = unet.up_blocks
        self.conv_norm_out = unet.conv_norm_out
        self.conv_act = unet.conv_act
        self.conv_out = unet.conv_out

        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.time_emb_proj = LatentModulation(embedding_dim, module.out_channels)
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @classmethod
    def from_unet(cls, unet: UNet2DModel, latent_dim: int = 512) -> "PDAEGradientEstimator":
        r"""
        An estimator that fits `unet`, freshly initialized.

        Args:
            unet ([`UNet2DModel`]): The pretrained network; it is not changed.
            latent_dim (`int`, *optional*, defaults to 512): Size of the code.

        Raises:
            ValueError: If PDAE cannot work on `unet`; the message says why (see [`check_unet`]).

        Example:

        ```py
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from diffusers_ext import PDAEGradientEstimator
        >>> from diffusers_ext.pipelines.pdae import unet_down

        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ...     norm_num_groups=8,
        ... )
        >>> estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=4)
        >>> features = unet_down(unet, torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
        >>> estimator(*features, latent_code=torch.randn(2, 4)).abs().max().item()
        0.0

        ```
        """
        check_unet(unet)
        config = {name: unet.config[name] for name in inspect.signature(cls).parameters if name in unet.config}
        if unet.config.resnet_time_scale_shift == "default" and config["attn_norm_num_groups"] is None:
            config["attn_norm_num_groups"] = config["norm_num_groups"]
        return cls(latent_dim=latent_dim, **config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        latent_code: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor`): Output of the frozen U-Net's down blocks, from [`unet_down`].
            res_hidden_states (`tuple[torch.Tensor, ...]`): Its skip connections.
            temb (`torch.Tensor`): Its time embedding, shape `(batch, time_embedding_dim)`.
            latent_code (`torch.Tensor`): The codes, shape `(batch, latent_dim)`.

        Returns:
            `torch.Tensor`: The gradient, shape `(batch, in_channels, height, width)`.

        Raises:
            ValueError: If `latent_code` does not have the shape `(batch, latent_dim)`.
        """
        if latent_code.shape != (temb.shape[0], self.config.latent_dim):
            raise ValueError(
                f"`latent_code` has shape {tuple(latent_code.shape)}, but a batch of {temb.shape[0]} needs "
                f"{(temb.shape[0], self.config.latent_dim)}: encode the images with this model's own encoder."
            )
        temb = torch.cat([temb, self.code_embedding(latent_code)], dim=1)
        # The frozen features need no gradient. On the CPU, `group_norm`'s backward crashes the process (torch 2.13)
        # for such an input in channels_last order, which is what attention leaves behind. The skips are safe: they are
        # concatenated with what is contiguous or needs a gradient.
        hidden_states = hidden_states.contiguous()
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb)
        return _unet_up(self, hidden_states, res_hidden_states, temb)


def check_unet(unet: UNet2DModel) -> None:
    r"""
    Raises an error that names the reason if PDAE cannot work on `unet`: blocks that carry a second, full-size image
    stream beside the features (`Skip` blocks), timesteps that are noise levels (`fourier` embeddings), class
    embeddings in place of labels, or an output that is neither the noise nor noise and variance.

    Args:
        unet ([`UNet2DModel`]): The network in question.

    Raises:
        TypeError: If it is no [`UNet2DModel`].
        ValueError: If it is one that PDAE cannot work on.
    """
    if not isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):  # also where `torch.compile` has wrapped it
        raise TypeError(f"`unet` is a {type(unet).__name__}, but PDAE works on the two halves of a `UNet2DModel`.")
    config = unet.config
    skip_blocks = sorted({name for name in (*config.down_block_types, *config.up_block_types) if "Skip" in name})
    if skip_blocks:
        raise ValueError(
            f"`unet` has the blocks {skip_blocks}, which hand a second image stream around the features that the "
            "gradient estimator builds on: PDAE needs a U-Net without Skip blocks, such as google/ddpm-celebahq-256."
        )
    if config.time_embedding_type == "fourier":
        raise ValueError(
            "`unet` has `time_embedding_type='fourier'`: it is conditioned on noise levels, not on timesteps. PDAE "
            "needs a model of the variance-preserving kind with timesteps, such as google/ddpm-celebahq-256."
        )
    if config.class_embed_type == "identity":
        raise ValueError(
            "`unet` has `class_embed_type='identity'`, which takes embeddings in place of class labels: PDAE needs a "
            "model with `num_class_embeds`, with `class_embed_type='timestep'`, or without classes."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"`unet` has {config.in_channels} input and {config.out_channels} output channels: PDAE needs as many "
            "outputs as inputs, or twice as many (noise and variance)."
        )


def unet_down(
    unet: UNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    r"""
    The first half of `unet.forward`: what its own second half ([`unet_up`]) and the gradient estimator share.

    Args:
        unet ([`UNet2DModel`]): The frozen network.
        sample (`torch.Tensor`): Noisy images, shape `(batch, channels, height, width)`.
        timestep (`torch.Tensor`): Timesteps, int64, shape `(batch,)`.
        class_labels (`torch.Tensor`, *optional*): int64, shape `(batch,)`; for class-conditional networks.

    Returns:
        `tuple`: The features, the skip connections, and the time embedding of shape `(batch, time_embedding_dim)`.

    Raises:
        ValueError: If `class_labels` are missing, or given to a network that takes none.
    """
    if hasattr(unet, "_hf_hook"):  # offloading moves a model when `forward` is called, which is not done here
        unet._hf_hook.pre_forward(unet)
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0

    temb = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    if unet.class_embedding is not None:
        if class_labels is None:
            raise ValueError("`class_labels` are missing: this `unet` is class-conditional.")
        if unet.config.class_embed_type == "timestep":
            class_labels = unet.time_proj(class_labels).to(unet.dtype)
        temb = temb + unet.class_embedding(class_labels).to(unet.dtype)
    elif class_labels is not None:
        raise ValueError("`class_labels` were given, but this `unet` is not class-conditional: leave them out.")

    hidden_states = unet.conv_in(sample)
    res_hidden_states = (hidden_states,)
    for block in unet.down_blocks:
        hidden_states, res = block(hidden_states=hidden_states, temb=temb)
        res_hidden_states += res
    return hidden_states, res_hidden_states, temb


def unet_up(
    unet: UNet2DModel, hidden_states: torch.Tensor, res_hidden_states: tuple[torch.Tensor, ...], temb: torch.Tensor
) -> torch.Tensor:
    r"""
    The second half of `unet.forward`, on the output of [`unet_down`]; both together are `unet.forward`, bit for bit.

    Returns:
        `torch.Tensor`: The model's output without its variance half, shape `(batch, in_channels, height, width)`.
    """
    if unet.mid_block is not None:
        hidden_states = unet.mid_block(hidden_states, temb)
    # A learned variance (twice the channels) is split off: both of PDAE's samplers have a fixed one.
    return _unet_up(unet, hidden_states, res_hidden_states, temb)[:, : unet.config.in_channels]


def _unet_up(
    decoder: nn.Module, hidden_states: torch.Tensor, res_hidden_states: tuple[torch.Tensor, ...], temb: torch.Tensor
) -> torch.Tensor:
    for block in decoder.up_blocks:
        res = res_hidden_states[-len(block.resnets) :]
        res_hidden_states = res_hidden_states[: -len(block.resnets)]
        hidden_states = block(hidden_states, res, temb)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden_states)))


# --------------------------------------------------------------------------------------------------------- scheduler


@dataclass
class PDAESchedulerOutput(BaseOutput):
    """
    Output of [`PDAEScheduler.step`] and [`PDAEScheduler.ancestral_step`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next timestep of the trajectory, shape of the input.
        pred_original_sample (`torch.Tensor`): The estimate of the clean image that the move was made with.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class PDAEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Moves along PDAE's trajectories, its training targets and its weights. Everything that depends on the schedule is
    computed in float64; half-precision samples are moved in float32.

    The mean shift `Sigma_t G` changes the predicted noise by one of two factors, which differ at small timesteps:

    | | factor of `G` | used in |
    | --- | --- | --- |
    | `"posterior"` | `-sqrt(alpha_t) (1 - abar_{t-1}) / sqrt(1 - abar_t)` | training, ancestral steps, diagnostics |
    | `"ddim"` | `-sqrt(1 - abar_t)` | deterministic steps in both directions |

    A deterministic trajectory of N steps visits the N + 1 levels `int(linspace(0, T - 1, N + 1))`. The image *is*
    level 0 (`abar_0 = 0.9999`), at both ends of the road, which makes encoding and decoding symmetric; the model is
    never called at level 0 when decoding and never at level T - 1 when encoding.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): `T`.
        beta_start (`float`, *optional*, defaults to 1e-4): First `beta` of the linear schedules.
        beta_end (`float`, *optional*, defaults to 0.02): Last `beta` of the linear schedules.
        beta_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"` or `"sigmoid"`.
        trained_betas (`list[float]`, *optional*): The betas themselves.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`):
            What the U-Net predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        clip_sample (`bool`, *optional*, defaults to `True`):
            Whether deterministic steps clip the estimate of the clean image (and derive the noise anew from it).
        clip_sample_range (`float`, *optional*, defaults to 1.0): The limit of that clip.

    Raises:
        ValueError: For an unknown schedule or prediction type, for dynamic thresholding, and for schedules that end in
            pure noise (`rescale_betas_zero_snr`), from which no noise prediction can be turned into an image.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext import PDAEScheduler

    >>> scheduler = PDAEScheduler()
    >>> scheduler.set_timesteps(4)
    >>> scheduler.trajectory
    [(999, 749), (749, 499), (499, 249), (249, 0)]
    >>> scheduler.set_timesteps(4, direction="encode")
    >>> scheduler.trajectory
    [(0, 249), (249, 499), (499, 749), (749, 999)]
    >>> scheduler.shift_coefficient(500, kind="posterior"), scheduler.shift_coefficient(500, kind="ddim")
    (-0.9546..., -0.9603...)

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
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        thresholding: bool = False,
    ) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}, but must be 'epsilon', 'sample' or 'v_prediction'."
            )
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
                f"`rescale_betas_zero_snr`={rescale_betas_zero_snr}, but PDAE needs `num_train_timesteps`="
                f"{num_train_timesteps} betas inside (0, 1) and `rescale_betas_zero_snr=False`: at pure noise no "
                "noise prediction determines an image."
            )

        alphas = 1 - betas
        # The last entry makes index -1 the clean image, so that `abar_{t-1}` needs no special case at t = 0.
        abar = np.append(np.cumprod(alphas), 1.0)
        abar_prev = np.roll(abar, 1)
        snr = abar[:-1] / (1 - abar[:-1])
        tables = {
            "sqrt_alpha_prod": np.sqrt(abar),
            "sqrt_beta_prod": np.sqrt(1 - abar),
            "sqrt_recip_alpha_prod": np.sqrt(1 / abar),
            "sqrt_recipm1_alpha_prod": np.sqrt(1 / abar - 1),
            "shift_posterior": -np.sqrt(alphas) * (1 - abar_prev[:-1]) / np.sqrt(1 - abar[:-1]),
            "shift_ddim": -np.sqrt(1 - abar[:-1]),
            "posterior_original": np.sqrt(abar_prev[:-1]) * betas / (1 - abar[:-1]),
            "posterior_sample": np.sqrt(alphas) * (1 - abar_prev[:-1]) / (1 - abar[:-1]),
            "snr": snr,
        }
        self._tables = {name: torch.from_numpy(table.copy()) for name, table in tables.items()}
        self._device_tables: dict[tuple, torch.Tensor] = {}
        self.betas = torch.from_numpy(betas)
        self.alphas_cumprod = torch.from_numpy(abar[:-1].copy())
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.trajectory: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _at(self, table: str, timestep: int | torch.Tensor, sample: torch.Tensor) -> float | torch.Tensor:
        """An entry for an `int`, without a device in between; entries that broadcast over `sample` for a tensor."""
        if not isinstance(timestep, torch.Tensor):
            entries, limit = self._tables[table], len(self)
            if not limit - len(entries) <= timestep < limit:  # -1 is the clean image, where that has a meaning
                raise ValueError(f"`timestep` is {timestep}, but must be from 0 to {limit - 1}.")
            return entries[timestep].item()
        key = (table, sample.device, torch.promote_types(sample.dtype, torch.float32))
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[table].to(dtype=key[2]).to(key[1])
        entries = self._device_tables[key][timestep.to(sample.device)]
        return entries.reshape(-1, *(1,) * (sample.ndim - 1))

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        direction: str = "decode",
        sampler: str = "ddim",
    ) -> None:
        r"""
        Lays out a trajectory: `timesteps` (int64), at which the model is called, and `trajectory`, the list of moves
        `(timestep, next_timestep)`.

        Args:
            num_inference_steps (`int`): Number of moves, 1 to `num_train_timesteps`. `num_train_timesteps` itself
                gives one deterministic move less, because there are no more levels.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put.
            direction (`str`, *optional*, defaults to `"decode"`): `"decode"` or, deterministic only, `"encode"`.
            sampler (`str`, *optional*, defaults to `"ddim"`):
                `"ddim"` for deterministic moves; `"ddpm"` for ancestral ones, which end in the clean image (-1).

        Raises:
            ValueError: For a number of steps out of range or an unknown `direction` or `sampler`.
        """
        limit = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= limit:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but the schedule has {limit} timesteps: choose a "
                f"number from 1 to {limit}."
            )
        if (direction, sampler) not in (("decode", "ddim"), ("encode", "ddim"), ("decode", "ddpm")):
            raise ValueError(
                f"`direction`={direction!r} with `sampler`={sampler!r} is unknown: choose 'decode' or 'encode' with "
                "'ddim', or 'decode' with 'ddpm'."
            )
        if sampler == "ddpm":
            steps = range(num_inference_steps)
            levels = [-1, *sorted({round(limit - 1 - i * limit / num_inference_steps) for i in steps})]
        else:
            levels = sorted({int(level) for level in np.linspace(0, limit - 1, num_inference_steps + 1)})
        if direction == "decode":
            levels = levels[::-1]
        self.num_inference_steps = num_inference_steps
        self.trajectory = list(itertools.pairwise(levels))
        self.timesteps = torch.tensor(levels[:-1], dtype=torch.int64, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is; there for interchangeability with other schedulers."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        r"""
        Draws from `q(x_t | x_0)`: `sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`.

        Args:
            original_samples (`torch.Tensor`): Clean images in [-1, 1], shape `(batch, channels, height, width)`.
            noise (`torch.Tensor`): Standard normal noise of the same shape.
            timesteps (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`.

        Returns:
            `torch.Tensor`: The noisy images, in the dtype of `original_samples`.
        """
        signal = self._at("sqrt_alpha_prod", timesteps, original_samples)
        sigma = self._at("sqrt_beta_prod", timesteps, original_samples)
        return (signal * original_samples + sigma * noise).to(original_samples.dtype)

    def predict_noise(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        gradient: torch.Tensor | None = None,
        kind: str = "posterior",
        shift_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        The noise that the model predicts, shifted by the gradient: `eps + shift_scale c_t G`.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts, by `prediction_type`; shape of `sample`.
            timestep (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`.
            sample (`torch.Tensor`): The noisy images, shape `(batch, channels, height, width)`.
            gradient (`torch.Tensor`, *optional*): `G(x_t, z, t)`; `None` for the pretrained model alone.
            kind (`str`, *optional*, defaults to `"posterior"`): Which factor, see [`PDAEScheduler`].
            shift_scale (`float`, *optional*, defaults to 1.0): Strength of the shift.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        model_output, sample = model_output.to(dtype), sample.to(dtype)
        if self.config.prediction_type == "epsilon":
            noise_pred = model_output
        elif self.config.prediction_type == "sample":
            scaled = self._at("sqrt_recip_alpha_prod", timestep, sample) * sample
            noise_pred = (scaled - model_output) / self._at("sqrt_recipm1_alpha_prod", timestep, sample)
        else:  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
            noise_pred = self._at("sqrt_alpha_prod", timestep, sample) * model_output
            noise_pred = noise_pred + self._at("sqrt_beta_prod", timestep, sample) * sample
        if gradient is not None:
            coefficient = self.shift_coefficient(timestep, kind, sample)
            noise_pred = noise_pred + shift_scale * coefficient * gradient.to(dtype)
        return noise_pred

    def predict_original_sample(
        self, noise_pred: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        r"""The clean image that `noise_pred` stands for, not clipped: `x_t / sqrt(abar) - sqrt(1 / abar - 1) eps`."""
        return (
            self._at("sqrt_recip_alpha_prod", timestep, sample) * sample
            - self._at("sqrt_recipm1_alpha_prod", timestep, sample) * noise_pred
        )

    def posterior_mean(
        self, original_samples: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The mean of `q(x_{t-1} | x_t, x_0)` for adjacent timesteps:
        `sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t`.
        """
        return (
            self._at("posterior_original", timestep, sample) * original_samples
            + self._at("posterior_sample", timestep, sample) * sample
        )

    def shift_coefficient(
        self, timestep: int | torch.Tensor, kind: str = "posterior", sample: torch.Tensor | None = None
    ) -> float | torch.Tensor:
        r"""
        The factor `c_t` by which `G` enters the predicted noise, `eps + c_t G`; never positive.

        Args:
            timestep (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`.
            kind (`str`, *optional*, defaults to `"posterior"`): `"posterior"` or `"ddim"`, see [`PDAEScheduler`].
            sample (`torch.Tensor`, *optional*):
                A tensor whose device, dtype and number of dimensions the result fits; `None` for float64 on the CPU,
                shape `(batch,)`.

        Raises:
            ValueError: For an unknown `kind`.
        """
        if kind not in ("posterior", "ddim"):
            raise ValueError(f"`kind` is {kind!r}, but must be 'posterior' or 'ddim'.")
        return self._at(f"shift_{kind}", timestep, torch.empty(0, dtype=torch.float64) if sample is None else sample)

    def loss_weight(
        self, timestep: int | torch.Tensor, gamma: float = 0.1, sample: torch.Tensor | None = None
    ) -> float | torch.Tensor:
        r"""
        The weight of the training loss (the paper's weighting scheme), with `SNR = abar / (1 - abar)`:
        `(1 / (1 + SNR))^(1 - gamma) (SNR / (1 + SNR))^gamma`. It favors the middle of the road, where the gap is.

        Args:
            timestep (`int` or `torch.Tensor`): One timestep, or int64 of shape `(batch,)`.
            gamma (`float`, *optional*, defaults to 0.1): The paper's exponent.
            sample (`torch.Tensor`, *optional*): As in [`PDAEScheduler.shift_coefficient`].
        """
        snr = self._at("snr", timestep, torch.empty(0, dtype=torch.float64) if sample is None else sample)
        return snr**gamma / (1 + snr)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        gradient: torch.Tensor | None = None,
        next_timestep: int | None = None,
        shift_scale: float = 1.0,
        return_dict: bool = True,
    ) -> PDAESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One deterministic move along the trajectory, in either direction (the authors' shifted DDIM):

        `eps' = eps - sqrt(1 - abar_t) G`, `x_0 = clip(x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps')`, `eps'` anew
        from the clipped `x_0`, and `sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps'`.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts at `timestep`; shape of `sample`.
            timestep (`int` or `torch.Tensor`): Where `sample` is. An `int` costs no host synchronization.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            gradient (`torch.Tensor`, *optional*): `G(x_t, z, t)`; `None` for plain DDIM.
            next_timestep (`int`, *optional*):
                Where to move to; taken from the trajectory of [`PDAEScheduler.set_timesteps`] if `None`.
            shift_scale (`float`, *optional*, defaults to 1.0): Strength of the shift.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`PDAESchedulerOutput`].

        Raises:
            ValueError: If `next_timestep` is `None` and the trajectory does not visit `timestep`.
        """
        timestep, next_timestep = self._move(timestep, next_timestep)
        noise_pred = self.predict_noise(model_output, timestep, sample, gradient, "ddim", shift_scale)
        state = sample.to(noise_pred.dtype)
        pred_original_sample = self.predict_original_sample(noise_pred, timestep, state)
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            pred_original_sample = pred_original_sample.clamp(-limit, limit)
            noise_pred = self._at("sqrt_recip_alpha_prod", timestep, state) * state - pred_original_sample
            noise_pred = noise_pred / self._at("sqrt_recipm1_alpha_prod", timestep, state)
        signal = self._at("sqrt_alpha_prod", next_timestep, state)
        sigma = self._at("sqrt_beta_prod", next_timestep, state)
        prev_sample = (signal * pred_original_sample + sigma * noise_pred).to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return PDAESchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def ancestral_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        gradient: torch.Tensor | None = None,
        next_timestep: int | None = None,
        shift_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PDAESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One draw from the shifted reverse step `N(mu + Sigma G, Sigma)` with the posterior's variance
        `beta_t (1 - abar_{t-1}) / (1 - abar_t)`; between timesteps that are not adjacent, `alpha_t` stands for
        `abar_t / abar_next`. As in the authors' sampler the estimate of the clean image is not clipped, and the move
        to the clean image (`next_timestep` -1) adds no noise.

        Args:
            model_output (`torch.Tensor`): What the U-Net predicts at `timestep`; shape of `sample`.
            timestep (`int` or `torch.Tensor`): Where `sample` is. An `int` costs no host synchronization.
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`.
            gradient (`torch.Tensor`, *optional*): `G(x_t, z, t)`; `None` for the pretrained model alone.
            next_timestep (`int`, *optional*):
                Where to move to; taken from the trajectory of [`PDAEScheduler.set_timesteps`] if `None`.
            shift_scale (`float`, *optional*, defaults to 1.0): Strength of the shift.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise.
            variance_noise (`torch.Tensor`, *optional*): The noise itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`PDAESchedulerOutput`].

        Raises:
            ValueError: If `next_timestep` is `None` and the trajectory does not visit `timestep`.
        """
        timestep, next_timestep = self._move(timestep, next_timestep)
        noise_pred = self.predict_noise(model_output, timestep, sample)
        state = sample.to(noise_pred.dtype)
        abar = self._tables["sqrt_alpha_prod"][timestep].item() ** 2
        abar_next = self._tables["sqrt_alpha_prod"][next_timestep].item() ** 2
        alpha = abar / abar_next
        if gradient is not None:
            factor = -shift_scale * math.sqrt(alpha) * (1 - abar_next) / math.sqrt(1 - abar)
            noise_pred = noise_pred + factor * gradient.to(noise_pred.dtype)
        pred_original_sample = self.predict_original_sample(noise_pred, timestep, state)
        prev_sample = math.sqrt(abar_next) * (1 - alpha) / (1 - abar) * pred_original_sample
        prev_sample = prev_sample + math.sqrt(alpha) * (1 - abar_next) / (1 - abar) * state
        if next_timestep >= 0:
            if variance_noise is None:
                variance_noise = randn_tensor(state.shape, generator=generator, device=state.device, dtype=state.dtype)
            variance = (1 - alpha) * (1 - abar_next) / (1 - abar)
            prev_sample = prev_sample + math.sqrt(variance) * variance_noise.to(state.dtype)
        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return PDAESchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _move(self, timestep: int | torch.Tensor, next_timestep: int | None) -> tuple[int, int]:
        timestep = int(timestep)
        if next_timestep is None:
            moves = dict(self.trajectory)
            if timestep not in moves:
                raise ValueError(
                    f"`timestep` {timestep} is not on the trajectory {list(moves)}: call `set_timesteps` first, or "
                    "give `next_timestep`."
                )
            next_timestep = moves[timestep]
        return timestep, int(next_timestep)


# ---------------------------------------------------------------------------------------------------------- pipeline


@dataclass
class PDAEPipelineOutput(BaseOutput):
    """
    Output of [`PDAEPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor.
        latent_code (`torch.Tensor`): The codes that they were decoded from, shape `(batch, latent_dim)`.
        inverted_noise (`torch.Tensor`):
            The noise `x_T` that they were decoded from, inferred or drawn, shape `(batch, channels, height, width)`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    latent_code: torch.Tensor
    inverted_noise: torch.Tensor


@dataclass
class PDAEGapOutput(BaseOutput):
    """
    Output of [`PDAEPipeline.posterior_gap`].

    Args:
        timesteps (`list[int]`): Where the gap was measured.
        base (`torch.Tensor`):
            Mean squared distance of the pretrained model's mean to the posterior's, one per timestep.
        shifted (`torch.Tensor`): The same with the mean shifted by `Sigma G`.
    """

    timesteps: list[int]
    base: torch.Tensor
    shifted: torch.Tensor


class PDAEPipeline(HubMixin, DiffusionPipeline):
    r"""
    Encodes images into semantic codes and decodes codes into images, by a frozen diffusion model and PDAE's encoder
    and gradient estimator (https://huggingface.co/papers/2212.12990).

    Images go in as PIL images, arrays or tensors with values in [0, 1], one or a list or a batch of them, all of the
    size that the encoder was built for. Two numbers together determine an image almost exactly: the code, which holds
    the meaning, and the noise `x_T` that it is decoded from, which holds the rest. Decoding from random noise shows
    what the code alone knows.

    Args:
        unet ([`UNet2DModel`]): The pretrained network, untouched; learned variance, class labels and every
            `prediction_type` are supported.
        encoder ([`PDAEEncoder`]): Gives the code of an image.
        gradient_estimator ([`PDAEGradientEstimator`]): Gives the gradient that shifts the mean.
        scheduler ([`PDAEScheduler`] or another): A stock scheduler (of a DDPM or DDIM checkpoint) is converted.

    Raises:
        ValueError: If the components do not fit each other (channels, size of the code, kind of U-Net).
    """

    # The estimator is called in alternation with the U-Net, so it has no place in this chain: like a ControlNet it
    # moves to the device at its first call and stays until the end.
    model_cpu_offload_seq = "encoder->unet"
    _callback_tensor_inputs = ["latents", "latent_code"]

    def __init__(
        self,
        unet: UNet2DModel,
        encoder: PDAEEncoder | ModelMixin,
        gradient_estimator: PDAEGradientEstimator | ModelMixin,
        scheduler: PDAEScheduler | SchedulerMixin,
    ) -> None:
        super().__init__()
        check_unet(unet)
        sizes = {"encoder": encoder.config.latent_dim, "gradient_estimator": gradient_estimator.config.latent_dim}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the components disagree on `latent_dim`: {sizes}. Take both from one training run.")
        channels = {
            name: model.config.in_channels
            for name, model in {"unet": unet, "encoder": encoder, "gradient_estimator": gradient_estimator}.items()
        }
        if len(set(channels.values())) > 1:
            raise ValueError(f"the components disagree on `in_channels`: {channels}. They must be for one U-Net.")
        for name in ("block_out_channels", "layers_per_block", "time_embedding_dim"):
            # A config that was loaded holds lists where a new one may hold tuples.
            expected, actual = (
                list(value) if isinstance(value, tuple) else value
                for value in (gradient_estimator.config[name], unet.config[name])
            )
            if expected != actual:
                raise ValueError(
                    f"`gradient_estimator` was made for a U-Net with `{name}`={expected}, but `unet` has {actual}: "
                    "load the U-Net that it was trained on."
                )
        if all(base.__name__ != "PDAEScheduler" for base in type(scheduler).__mro__):
            stock, scheduler = scheduler, PDAEScheduler.from_config(scheduler.config)
            check_schedule(stock, scheduler)
        self.register_modules(unet=unet, encoder=encoder, gradient_estimator=gradient_estimator, scheduler=scheduler)
        factor = 2 ** (len(unet.config.block_out_channels) - 1)
        if any(side % factor for side in self._image_shape[1:]):
            raise ValueError(
                f"`encoder` has `sample_size` {encoder.config.sample_size}, but `unet` halves images "
                f"{len(unet.config.block_out_channels) - 1} times: height and width must be a multiple of {factor}."
            )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    # -- inputs

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        size = self.encoder.config.sample_size
        return (self.encoder.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _prepare_images(
        self, image: Image.Image | np.ndarray | torch.Tensor | list, name: str = "image"
    ) -> torch.Tensor:
        """One image or several, as they come -> float32 in [-1, 1], shape `(batch, channels, height, width)`."""
        channels = self.encoder.config.in_channels
        images = image if isinstance(image, list | tuple) else [image]
        tensors = []
        for item in images:
            if isinstance(item, Image.Image):
                item = pil_to_array(item, channels)
            if isinstance(item, np.ndarray):
                if item.ndim not in (3, 4):
                    raise ValueError(
                        f"`{name}` has an array of shape {item.shape}, but arrays must be (height, width, channels) "
                        "or (batch, height, width, channels)."
                    )
                item = torch.from_numpy(np.ascontiguousarray(np.moveaxis(item, -1, -3)))
            if not isinstance(item, torch.Tensor):
                raise TypeError(f"`{name}` holds a {type(item).__name__}: give PIL images, arrays or tensors.")
            if not item.is_floating_point():
                raise TypeError(
                    f"`{name}` has dtype {item.dtype}, but values must be floats in [0, 1]: divide by 255."
                )
            tensors.append(item if item.ndim == 4 else item[None])
        if sum(len(tensor) for tensor in tensors) == 0:
            raise ValueError(f"`{name}` is empty: give at least one image.")
        shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
        if shapes != {self._image_shape}:
            raise ValueError(
                f"`{name}` has images of (channels, height, width) {sorted(shapes)}, but this pipeline encodes "
                f"{self._image_shape}: resize or convert them."
            )
        images = torch.cat([tensor.to(self._execution_device) for tensor in tensors])
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(
                f"`{name}` has values in [{low:.4g}, {high:.4g}], but they must be in [0, 1]: rescale them, for "
                "images in [-1, 1] by `image / 2 + 0.5`."
            )
        return 2 * images.to(self._state_dtype) - 1

    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory (1 - abar_0 = 1e-4 is lost): only the networks compute in it.
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _prepare_class_labels(
        self, class_labels: int | list[int] | torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        if class_labels is None:
            if self.unet.class_embedding is not None:
                raise ValueError("`class_labels` are missing: this pipeline's `unet` is class-conditional.")
            return None
        if self.unet.class_embedding is None:
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

    def _check_latent_code(self, latent_code: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        if not isinstance(latent_code, torch.Tensor):
            raise TypeError(f"`latent_code` is a {type(latent_code).__name__}, but must be a tensor, as of `encode`.")
        latent_dim = self.gradient_estimator.config.latent_dim
        if latent_code.ndim != 2 or latent_code.shape[1] != latent_dim:
            raise ValueError(
                f"`latent_code` has shape {tuple(latent_code.shape)}, but this pipeline's codes have shape (batch, "
                f"{latent_dim}): use codes of its own `encode`."
            )
        if latent_code.shape[0] == 0 or not latent_code.isfinite().all():
            raise ValueError("`latent_code` is empty, or not finite: use codes of `encode`.")
        if batch_size is not None and latent_code.shape[0] != batch_size:
            raise ValueError(
                f"`latent_code` has a batch of {latent_code.shape[0]}, but there are {batch_size} images: they must "
                "agree."
            )
        return latent_code.to(self._execution_device)

    def _check_sampling(
        self, sampler: str, shift_range: tuple[int, int] | None, shift_scale: float
    ) -> tuple[int, int]:
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"`sampler` is {sampler!r}, but must be 'ddim' or 'ddpm'.")
        if not isinstance(shift_scale, int | float) or not math.isfinite(shift_scale):
            raise ValueError(f"`shift_scale` is {shift_scale!r}, but must be a finite number; 1 is as trained.")
        steps = self.scheduler.config.num_train_timesteps
        if shift_range is None:
            return 0, steps
        try:
            low, high = map(operator.index, shift_range)  # NumPy's and PyTorch's integers too
        except (TypeError, ValueError):
            low = high = -1
        if not 0 <= low <= high <= steps:
            raise ValueError(
                f"`shift_range` is {shift_range}, but must be two whole timesteps with 0 <= low <= high <= {steps}."
            )
        return low, high

    def _check_generator(self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
        if isinstance(generator, list | tuple) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for a batch of {batch_size}: give one or {batch_size}."
            )

    def _prepare_noise(
        self,
        inverted_noise: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        name: str = "inverted_noise",
    ) -> torch.Tensor:
        shape = (batch_size, *self._image_shape)
        self._check_generator(generator, batch_size)
        if inverted_noise is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._state_dtype)
        if not isinstance(inverted_noise, torch.Tensor):
            raise TypeError(f"`{name}` is a {type(inverted_noise).__name__}, but must be a tensor.")
        if tuple(inverted_noise.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(inverted_noise.shape)}, but this call needs {shape}.")
        return inverted_noise.to(self._execution_device, self._state_dtype)

    # -- the two networks, and the loops over them

    def predict(
        self,
        sample: torch.Tensor,
        timestep: int,
        latent_code: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        class_labels: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Output of the U-Net and gradient at one timestep, in one pass through the U-Net's down blocks.

        Args:
            sample (`torch.Tensor`): Noisy images, shape `(batch, channels, height, width)`.
            timestep (`int`): Their timestep.
            latent_code (`torch.Tensor`, or two of them, *optional*):
                Codes of shape `(batch, latent_dim)`; two for a weighted mean of their gradients; `None` for none.
            class_labels (`torch.Tensor`, *optional*): int64, shape `(batch,)`.
            weight (`torch.Tensor`, *optional*):
                With two codes: weight of the second gradient, from 0 to 1, shape `(batch, 1, 1, 1)`.

        Returns:
            `tuple`: The U-Net's output and the gradient (`None` without a code), both of the shape of `sample`.
        """
        timesteps = torch.full((sample.shape[0],), timestep, dtype=torch.int64, device=sample.device)
        features = unet_down(self.unet, sample.to(self.unet.dtype), timesteps, class_labels)
        model_output = unet_up(self.unet, *features)
        if latent_code is None:
            return model_output, None
        dtype = self.gradient_estimator.dtype  # may differ from the U-Net's
        hidden_states, res_hidden_states, temb = features
        features = hidden_states.to(dtype), tuple(res.to(dtype) for res in res_hidden_states), temb.to(dtype)
        if isinstance(latent_code, torch.Tensor):
            return model_output, self.gradient_estimator(*features, latent_code=latent_code.to(dtype))
        first, second = (self.gradient_estimator(*features, latent_code=code.to(dtype)) for code in latent_code)
        return model_output, (1 - weight) * first + weight * second

    def _invert_loop(
        self,
        sample: torch.Tensor,
        latent_code: torch.Tensor | None,
        num_inference_steps: int,
        class_labels: torch.Tensor | None,
        progress_bar: object,
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps, device=sample.device, direction="encode")
        for timestep, next_timestep in self.scheduler.trajectory:
            model_output, gradient = self.predict(sample, timestep, latent_code, class_labels)
            sample = self.scheduler.step(model_output, timestep, sample, gradient, next_timestep).prev_sample
            progress_bar.update()
        return sample

    def _decode_loop(
        self,
        latents: torch.Tensor,
        latent_code: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        num_inference_steps: int,
        class_labels: torch.Tensor | None,
        progress_bar: object,
        *,
        shift_range: tuple[int, int],
        shift_scale: float = 1.0,
        sampler: str = "ddim",
        weight: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The images, and the codes at the end, which a callback may have replaced."""
        low, high = shift_range
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device, sampler=sampler)
        for i, (timestep, next_timestep) in enumerate(self.scheduler.trajectory):
            code = latent_code if low <= timestep < high and shift_scale != 0 else None
            model_output, gradient = self.predict(latents, timestep, code, class_labels, weight)
            move = (model_output, timestep, latents, gradient, next_timestep, shift_scale)
            if sampler == "ddim":
                latents = self.scheduler.step(*move).prev_sample
            else:
                latents = self.scheduler.ancestral_step(*move, generator=generator).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "latent_code": latent_code}
                callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                callback_outputs = callback_on_step_end(self, i, timestep, callback_kwargs) or {}
                latents = callback_outputs.pop("latents", latents)
                latent_code = callback_outputs.pop("latent_code", latent_code)
            progress_bar.update()
        return latents, latent_code

    def _num_moves(self, num_steps: int, sampler: str = "ddim", name: str = "num_inference_steps") -> int:
        limit = self.scheduler.config.num_train_timesteps
        if not isinstance(num_steps, int) or not 1 <= num_steps <= limit:
            raise ValueError(
                f"`{name}` is {num_steps}, but must be a whole number from 1 to {limit}, the schedule's timesteps."
            )
        self.scheduler.set_timesteps(num_steps, sampler=sampler)
        return len(self.scheduler.trajectory)

    # -- what a user calls

    @torch.no_grad()
    def encode(self, image: Image.Image | np.ndarray | torch.Tensor | list) -> torch.Tensor:
        r"""
        The semantic codes of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list):
                Images; arrays `(height, width, channels)` or `(batch, height, width, channels)`, tensors
                `(channels, height, width)` or `(batch, channels, height, width)`, values in [0, 1].

        Returns:
            `torch.Tensor`: The codes, shape `(batch, latent_dim)`.

        Raises:
            ValueError: For images of another size or number of channels than the encoder's, or out of range.
        """
        images = self._prepare_images(image)
        latent_code = self.encoder(images.to(self.encoder.dtype))
        self.maybe_free_model_hooks()
        return latent_code

    @torch.no_grad()
    def invert(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        latent_code: torch.Tensor | None,
        num_inference_steps: int = 100,
        class_labels: int | list[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Infers the noise from which images are decoded: the deterministic trajectory, walked from the image up.

        Args:
            image: Images, as in [`PDAEPipeline.encode`].
            latent_code (`torch.Tensor` or `None`):
                Their codes, shape `(batch, latent_dim)`; `None` inverts the pretrained model alone.
            num_inference_steps (`int`, *optional*, defaults to 100): Number of moves.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): For a class-conditional U-Net.

        Returns:
            `torch.Tensor`: The noise, shape `(batch, channels, height, width)`, float32 (float64 for such a U-Net).
        """
        images = self._prepare_images(image)
        if latent_code is not None:
            latent_code = self._check_latent_code(latent_code, batch_size=images.shape[0])
        class_labels = self._prepare_class_labels(class_labels, images.shape[0])
        with self.progress_bar(total=self._num_moves(num_inference_steps)) as progress_bar:
            inverted_noise = self._invert_loop(images, latent_code, num_inference_steps, class_labels, progress_bar)
        self.maybe_free_model_hooks()
        return inverted_noise

    @torch.no_grad()
    def decode(
        self,
        latent_code: torch.Tensor,
        inverted_noise: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        shift_range: tuple[int, int] | None = None,
        shift_scale: float = 1.0,
        sampler: str = "ddim",
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> PDAEPipelineOutput | tuple:
        r"""
        Images of codes.

        Args:
            latent_code (`torch.Tensor`): The codes, shape `(batch, latent_dim)`.
            inverted_noise (`torch.Tensor`, *optional*):
                Noise to start from, shape `(batch, channels, height, width)`, from [`PDAEPipeline.invert`] or your
                own; drawn at random if `None`.
            num_inference_steps (`int`, *optional*, defaults to 50): Number of moves.
            shift_range (`tuple[int, int]`, *optional*):
                The mean is shifted at timesteps `low <= t < high` only (mixed sampling); everywhere if `None`. The
                authors' `stop_percent=0.3` for unconditional sampling is `(300, 1000)`.
            shift_scale (`float`, *optional*, defaults to 1.0): Strength of the shift; 0 is the pretrained model.
            sampler (`str`, *optional*, defaults to `"ddim"`): `"ddim"` (deterministic) or `"ddpm"` (ancestral).
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): For a class-conditional U-Net.
            generator (`torch.Generator` or a list of them, *optional*): Makes random draws repeatable.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`PDAEPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; returns the tensors it changed.
            callback_on_step_end_tensor_inputs (`tuple[str, ...]`, *optional*, defaults to `("latents",)`):
                Which of `latents` and `latent_code` it gets.

        Raises:
            ValueError: For arguments that do not fit each other or are out of range, before a model runs.
        """
        # 1. Check inputs
        latent_code = self._check_latent_code(latent_code)
        batch_size = latent_code.shape[0]
        shift_range = self._check_sampling(sampler, shift_range, shift_scale)
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        class_labels = self._prepare_class_labels(class_labels, batch_size)
        noise = self._prepare_noise(inverted_noise, batch_size, generator)

        # 2. Denoise
        with self.progress_bar(total=self._num_moves(num_inference_steps, sampler)) as progress_bar:
            latents, latent_code = self._decode_loop(
                noise,
                latent_code,
                num_inference_steps,
                class_labels,
                progress_bar,
                shift_range=shift_range,
                shift_scale=shift_scale,
                sampler=sampler,
                generator=generator,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
        return self._output(latents, latent_code, noise, output_type, return_dict)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 50,
        num_inversion_steps: int | None = None,
        shift_range: tuple[int, int] | None = None,
        shift_scale: float = 1.0,
        sampler: str = "ddim",
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> PDAEPipelineOutput | tuple:
        r"""
        Autoencodes images: encode, infer the noise (or not), decode.

        Args:
            image: Images, as in [`PDAEPipeline.encode`].
            num_inference_steps (`int`, *optional*, defaults to 50): Number of decoding moves.
            num_inversion_steps (`int`, *optional*):
                Number of moves for inferring the noise, which gives a near-perfect reconstruction; `None` starts from
                random noise and shows what the code alone holds.
            shift_range, shift_scale, sampler, class_labels, generator, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs: As in [`PDAEPipeline.decode`].
            latents (`torch.Tensor`, *optional*):
                Noise to start from instead of random noise, shape `(batch, channels, height, width)`.

        Raises:
            ValueError: For arguments that do not fit each other or are out of range, before a model runs.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline

        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ...     norm_num_groups=8,
        ... )
        >>> encoder = PDAEEncoder(8, 1, 4, block_out_channels=(16, 16), attention_block=None, norm_num_groups=8)
        >>> pipe = PDAEPipeline(unet, encoder, PDAEGradientEstimator.from_unet(unet, 4), DDPMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)

        >>> image = torch.rand(2, 1, 8, 8)
        >>> output = pipe(image, num_inference_steps=5, num_inversion_steps=5, output_type="pt")
        >>> output.images.shape, output.latent_code.shape, output.inverted_noise.shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 4]), torch.Size([2, 1, 8, 8]))

        ```
        """
        # 1. Check inputs
        images = self._prepare_images(image)
        batch_size = images.shape[0]
        shift_range = self._check_sampling(sampler, shift_range, shift_scale)
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        class_labels = self._prepare_class_labels(class_labels, batch_size)
        if num_inversion_steps is not None and latents is not None:
            raise ValueError("`latents` and `num_inversion_steps` were both given: start from noise or infer it.")
        self._check_generator(generator, batch_size)
        noise = None
        if num_inversion_steps is None:
            noise = self._prepare_noise(latents, batch_size, generator, name="latents")
        total = self._num_moves(num_inference_steps, sampler)
        if num_inversion_steps is not None:
            total += self._num_moves(num_inversion_steps, name="num_inversion_steps")

        # 2. Encode
        latent_code = self.encoder(images.to(self.encoder.dtype))

        with self.progress_bar(total=total) as progress_bar:
            # 3. Infer the noise
            if noise is None:
                noise = self._invert_loop(images, latent_code, num_inversion_steps, class_labels, progress_bar)
            # 4. Denoise
            latents, latent_code = self._decode_loop(
                noise,
                latent_code,
                num_inference_steps,
                class_labels,
                progress_bar,
                shift_range=shift_range,
                shift_scale=shift_scale,
                sampler=sampler,
                generator=generator,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
        return self._output(latents, latent_code, noise, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        a: Image.Image | np.ndarray | torch.Tensor,
        b: Image.Image | np.ndarray | torch.Tensor,
        num: int = 8,
        mode: str = "latent",
        num_inference_steps: int = 50,
        num_inversion_steps: int | None = 50,
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PDAEPipelineOutput | tuple:
        r"""
        A path of images from `a` to `b`. The noise goes along the great circle between the two inferred noises (or
        stays at one random noise); on the way, either the code is interpolated linearly, or the gradients of the two
        codes are (the paper's trajectory interpolation).

        Args:
            a, b: One image each, as in [`PDAEPipeline.encode`].
            num (`int`, *optional*, defaults to 8): Number of images, the two ends included; at least 2.
            mode (`str`, *optional*, defaults to `"latent"`): `"latent"` or `"trajectory"`.
            num_inference_steps (`int`, *optional*, defaults to 50): Number of decoding moves.
            num_inversion_steps (`int`, *optional*, defaults to 50):
                Number of moves for inferring the noises; `None` for one random noise.
            class_labels (`int`, *optional*): For a class-conditional U-Net.
            generator (`torch.Generator`, *optional*): Makes the random noise repeatable.
            output_type, return_dict: As in [`PDAEPipeline.decode`].

        Returns:
            [`PDAEPipelineOutput`]: `num` images, the codes at their places on the way, and their noises.

        Raises:
            ValueError: For an unknown `mode`, fewer than two images, or more than one image at an end.
        """
        if mode not in ("latent", "trajectory"):
            raise ValueError(f"`mode` is {mode!r}, but must be 'latent' or 'trajectory'.")
        if num < 2:
            raise ValueError(f"`num` is {num}, but a path has at least its 2 ends.")
        ends = [self._prepare_images(a, name="a"), self._prepare_images(b, name="b")]
        if any(end.shape[0] != 1 for end in ends):
            raise ValueError(
                f"`a` and `b` hold {ends[0].shape[0]} and {ends[1].shape[0]} images: give one each, and call once per "
                "pair."
            )
        self._check_output(output_type)
        ends = torch.cat(ends)
        labels = self._prepare_class_labels(class_labels, num)
        total = self._num_moves(num_inference_steps)
        if num_inversion_steps is not None:
            total += self._num_moves(num_inversion_steps, name="num_inversion_steps")
        noise = None
        if num_inversion_steps is None:
            noise = self._prepare_noise(None, 1, generator).expand(num, -1, -1, -1)

        codes = self.encoder(ends.to(self.encoder.dtype))
        weight = torch.linspace(0, 1, num, device=ends.device, dtype=self._state_dtype)
        path = torch.lerp(codes[:1], codes[1:], weight[:, None].to(codes.dtype))
        with self.progress_bar(total=total) as progress_bar:
            if noise is None:
                end_labels = None if labels is None else labels[[0, -1]]
                noises = self._invert_loop(ends, codes, num_inversion_steps, end_labels, progress_bar)
                noise = slerp(noises[:1], noises[1:], weight[:, None, None, None])
            latents, _ = self._decode_loop(
                noise,
                path if mode == "latent" else (codes[:1].expand(num, -1), codes[1:].expand(num, -1)),
                num_inference_steps,
                labels,
                progress_bar,
                shift_range=(0, self.scheduler.config.num_train_timesteps),
                weight=weight[:, None, None, None],
            )
        return self._output(latents, path, noise, output_type, return_dict)

    @torch.no_grad()
    def denoise_one_step(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        timestep: int,
        latent_code: torch.Tensor | None = None,
        shift_scale: float = 1.0,
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PDAEPipelineOutput | tuple:
        r"""
        The clean images that the model sees in images noised to `timestep`: what it knows there, in one step.

        Args:
            image: Images, as in [`PDAEPipeline.encode`].
            timestep (`int`): Where to look, 0 to `num_train_timesteps - 1`.
            latent_code (`torch.Tensor`, *optional*): Codes to look with; the images' own if `None`.
            shift_scale (`float`, *optional*, defaults to 1.0): Strength of the shift; 0 is the pretrained model.
            latents (`torch.Tensor`, *optional*): The noise that is added, shape of the images.
            class_labels, generator, output_type, return_dict: As in [`PDAEPipeline.decode`].

        Raises:
            ValueError: For a timestep out of range and for inputs that do not fit.
        """
        images = self._prepare_images(image)
        [timestep] = self._check_timesteps([timestep])
        self._check_output(output_type)
        labels = self._prepare_class_labels(class_labels, images.shape[0])
        noise = self._prepare_noise(latents, images.shape[0], generator, name="latents")
        if latent_code is None:
            latent_code = self.encoder(images.to(self.encoder.dtype))
        latent_code = self._check_latent_code(latent_code, images.shape[0])
        noisy = self.scheduler.add_noise(images, noise, timestep)
        model_output, gradient = self.predict(noisy, timestep, latent_code if shift_scale else None, labels)
        noise_pred = self.scheduler.predict_noise(model_output, timestep, noisy, gradient, shift_scale=shift_scale)
        estimate = self.scheduler.predict_original_sample(noise_pred, timestep, noisy)
        return self._output(estimate, latent_code, noise, output_type, return_dict)

    @torch.no_grad()
    def posterior_gap(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        timesteps: list[int],
        latent_code: torch.Tensor | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> PDAEGapOutput:
        r"""
        The posterior mean gap: how far the mean of a reverse step is from that of `q(x_{t-1} | x_t, x_0)`, which knows
        the image; mean squared over the images, without and with the shift. The noise is Gaussian (the authors'
        script draws it uniformly, so that its `x_t` is not a sample of `q(x_t | x_0)`).

        Args:
            image: Images, as in [`PDAEPipeline.encode`].
            timesteps (`list[int]`): Where to measure, 0 to `num_train_timesteps - 1`.
            latent_code (`torch.Tensor`, *optional*):
                Codes to shift with, shape `(batch, latent_dim)`: the images' own if `None`; shuffled ones tell whether
                the codes are used.
            class_labels, generator: As in [`PDAEPipeline.decode`].

        Raises:
            ValueError: For timesteps out of range and for inputs that do not fit.
        """
        images = self._prepare_images(image)
        timesteps = self._check_timesteps(timesteps)
        self._check_generator(generator, images.shape[0])
        labels = self._prepare_class_labels(class_labels, images.shape[0])
        if latent_code is None:
            latent_code = self.encoder(images.to(self.encoder.dtype))
        latent_code = self._check_latent_code(latent_code, images.shape[0])
        gaps = []
        for timestep in self.progress_bar(timesteps):
            noise = self._prepare_noise(None, images.shape[0], generator)
            noisy = self.scheduler.add_noise(images, noise, timestep)
            model_output, gradient = self.predict(noisy, timestep, latent_code, labels)
            target = self.scheduler.posterior_mean(images, timestep, noisy)
            for shift in (None, gradient):
                noise_pred = self.scheduler.predict_noise(model_output, timestep, noisy, shift)
                estimate = self.scheduler.predict_original_sample(noise_pred, timestep, noisy)
                gaps.append((target - self.scheduler.posterior_mean(estimate, timestep, noisy)).square().mean())
        gaps = torch.stack(gaps).reshape(-1, 2).cpu()
        self.maybe_free_model_hooks()
        return PDAEGapOutput(timesteps=timesteps, base=gaps[:, 0], shifted=gaps[:, 1])

    def compile_blocks(self, **kwargs: object) -> None:
        r"""
        Compiles the blocks of the U-Net and the estimator in place with `torch.compile`. The U-Net's halves are called
        one by one, so that compiling it as a whole (`pipe.unet = torch.compile(pipe.unet)`) has no effect here.

        Args:
            kwargs: For `torch.compile`.
        """
        for model in (self.unet, self.gradient_estimator):
            for block in (*getattr(model, "down_blocks", ()), model.mid_block, *model.up_blocks):
                if block is not None:
                    block.compile(**kwargs)

    def _check_timesteps(self, timesteps: list[int]) -> list[int]:
        timesteps = [operator.index(timestep) for timestep in timesteps]  # NumPy's and PyTorch's integers too
        limit = self.scheduler.config.num_train_timesteps
        wrong = [timestep for timestep in timesteps if not 0 <= timestep < limit]
        if wrong or len(timesteps) == 0:
            raise ValueError(f"the timesteps {wrong or timesteps} are not from 0 to {limit - 1}.")
        return timesteps

    def _check_output(self, output_type: str, tensor_inputs: tuple[str, ...] = ()) -> None:
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np' or 'pt'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )

    def _output(
        self,
        latents: torch.Tensor,
        latent_code: torch.Tensor,
        noise: torch.Tensor,
        output_type: str,
        return_dict: bool,
    ) -> PDAEPipelineOutput | tuple:
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, latent_code, noise
        return PDAEPipelineOutput(images=images, latent_code=latent_code, inverted_noise=noise)


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


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""
    Spherical interpolation, `(sin((1 - w) theta) a + sin(w theta) b) / sin(theta)`, with the angle between the whole
    tensors; linear where they are parallel.

    Args:
        a, b (`torch.Tensor`): The ends, shape `(batch, ...)`.
        weight (`torch.Tensor`): From 0 (`a`) to 1 (`b`), broadcast over the ends.
    """
    cosine = nn.functional.cosine_similarity(a.flatten(1).double().cpu(), b.flatten(1).double().cpu())
    theta = cosine.clamp(-1, 1).arccos().to(a.device, a.dtype).reshape(-1, *(1,) * (a.ndim - 1))
    parallel = theta.sin().abs() < 1e-4
    path = (torch.sin((1 - weight) * theta) * a + torch.sin(weight * theta) * b) / theta.sin()
    return torch.where(parallel, torch.lerp(a, b, weight.expand_as(path)), path)
