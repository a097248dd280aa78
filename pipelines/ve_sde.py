r"""VE-SDE: images by running a variance-exploding diffusion backwards in continuous time.

*Score-Based Generative Modeling through Stochastic Differential Equations*, Song et al., ICLR 2021
(https://huggingface.co/papers/2011.13456). Noise is added without shrinking the image, `x_t = x_0 + sigma(t) z`, and
taken away by a predictor, which discretizes the reverse SDE, and a corrector, which does Langevin steps at one level.

This file is complete in itself: scheduler, pipeline. Notation: time `t` falls from 1 to nearly 0, `sigma(t)` is the
standard deviation of the noise, `G(t)` the diffusion coefficient of `dx = G(t) dw`, `z` standard normal noise, and the
score is `grad_x log p_t(x)`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral")


# --------------------------------------------------------------------------------------------------------- scheduler


@dataclass
class VESDESchedulerOutput(BaseOutput):
    """
    Output of the steps of [`VESDEScheduler`].

    Args:
        prev_sample (`torch.Tensor`): The sample after the step, shape `(batch, channels, height, width)`.
        prev_sample_mean (`torch.Tensor`): The same without the noise that the step adds.
    """

    prev_sample: torch.Tensor
    prev_sample_mean: torch.Tensor


class VESDEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The variance-exploding SDE, its three predictors and its Langevin corrector
    (https://huggingface.co/papers/2011.13456, section 4 and appendices E to G), by float64 levels.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Number of levels before `set_timesteps`.
        sigma_min (`float`, *optional*, defaults to 0.01): `sigma(0)` of the geometric schedule.
        sigma_max (`float`, *optional*, defaults to 50.0):
            `sigma(1)` of the geometric schedule: 50 for CIFAR-10; about the largest distance between two images.
        snr (`float`, *optional*, defaults to 0.16): Signal-to-noise ratio of a corrector step.
        sampling_eps (`float`, *optional*, defaults to 1e-5): The last time; usually 1e-3 on the exponential schedule.
        correct_steps (`int`, *optional*, defaults to 1): Corrector steps per level, unless a call says otherwise.
        parametrization (`str`, *optional*, defaults to `"geometric"`):
            `"geometric"`: `sigma(t) = sigma_min (sigma_max / sigma_min)^t` (equation 30 there). `"exponential"`:
            `dx = sigma_base^t dw`, so that `sigma(t)^2 = (sigma_base^(2t) - 1) / (2 ln sigma_base)`, as in the
            authors' tutorial.
        sigma_base (`float`, *optional*, defaults to 25.0): The base of the exponential schedule.
        prediction_type (`str`, *optional*, defaults to `"score"`):
            What the U-Net gives: `"score"`, as NCSN++ in diffusers, or `"epsilon"`, the noise: `score = -eps / sigma`.
        centered (`bool`, *optional*, defaults to `False`): Whether the model's images are in [-1, 1], not in [0, 1].
        batch_norms (`bool`, *optional*, defaults to `False`):
            Whether a corrector step takes norms averaged over the batch, as the authors do: then a result depends on
            the others of its batch.

    Raises:
        ValueError: For names that are unknown and numbers that are out of range.

    Example:

    ```py
    >>> from diffusers_ext import VESDEScheduler

    >>> scheduler = VESDEScheduler(sigma_min=0.01, sigma_max=1.0)
    >>> scheduler.sigma([0.0, 0.5, 1.0])
    tensor([0.0100, 0.1000, 1.0000], dtype=torch.float64)

    ```
    """

    _compatibles = ["ScoreSdeVeScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        snr: float = 0.16,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
        parametrization: str = "geometric",
        sigma_base: float = 25.0,
        prediction_type: str = "score",
        centered: bool = False,
        batch_norms: bool = False,
    ) -> None:
        if parametrization not in ("geometric", "exponential"):
            raise ValueError(f"`parametrization` is {parametrization!r}, but must be 'geometric' or 'exponential'.")
        if prediction_type not in ("score", "epsilon"):
            raise ValueError(f"`prediction_type` is {prediction_type!r}, but must be 'score' or 'epsilon'.")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"`sigma_min` is {sigma_min} and `sigma_max` is {sigma_max}, but both must be above 0, and the second "
                "the larger one."
            )
        if not 1 < sigma_base < math.inf:
            raise ValueError(f"`sigma_base` is {sigma_base}, but must be above 1: the noise must grow.")
        if not 0 < snr < math.inf:
            raise ValueError(f"`snr` is {snr}, but must be above 0; leave the corrector out by `correct_steps=0`.")
        if not 0 < sampling_eps < 1:
            raise ValueError(f"`sampling_eps` is {sampling_eps}, but must be between 0 and 1.")
        if not isinstance(correct_steps, int) or correct_steps < 0:
            raise ValueError(f"`correct_steps` is {correct_steps}, but must be an `int` of at least 0.")
        self.init_noise_sigma = float(self.sigma(1.0))
        self.set_timesteps(num_train_timesteps)

    # Copied from pipelines.glide.GlideScheduler.from_config
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

    def sigma(self, timestep: float | list[float] | torch.Tensor) -> torch.Tensor:
        r"""
        Standard deviation of the noise at time `t`; see `parametrization`.

        Args:
            timestep (`float`, `list[float]` or `torch.Tensor`): Times from 0 to 1, of any shape.

        Returns:
            `torch.Tensor`: float64 of the same shape, on the CPU.
        """
        time = timestep.cpu() if isinstance(timestep, torch.Tensor) else timestep
        time = torch.as_tensor(time, dtype=torch.float64)
        if self.config.parametrization == "geometric":
            return self.config.sigma_min * (self.config.sigma_max / self.config.sigma_min) ** time
        rate = 2 * math.log(self.config.sigma_base)
        return (torch.expm1(rate * time) / rate).sqrt()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        r"""
        Lays out `timesteps`, float64 from 1 to `sampling_eps` in equal steps, `sigmas` at these times, and
        `discrete_sigmas`, the rising levels between which the reverse-diffusion and ancestral predictors go.

        Args:
            num_inference_steps (`int`): Number `N` of levels, at least 2.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` is put (in float32 on `mps`, which has no float64); the levels stay on the CPU.

        Raises:
            ValueError: For a number that is out of range.
        """
        if not isinstance(num_inference_steps, int) or num_inference_steps < 2:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be an `int` of at least 2.")
        self.num_inference_steps = num_inference_steps
        timesteps = torch.linspace(1, self.config.sampling_eps, num_inference_steps, dtype=torch.float64)
        self.sigmas = self.sigma(timesteps)
        # The authors' last level is sigma(0); on the exponential schedule that is 0, hence sigma(sampling_eps) there.
        first = 0.0 if self.config.parametrization == "geometric" else self.config.sampling_eps
        self.discrete_sigmas = self.sigma(torch.linspace(first, 1, num_inference_steps, dtype=torch.float64))
        self.timesteps = timesteps.to(device, torch.float32 if str(device).startswith("mps") else torch.float64)

    # Copied from pipelines.copaint.CoPaintScheduler.scale_model_input
    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is; for use in place of other schedulers."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        r"""
        `x_t = x_0 + sigma(t) z`.

        Args:
            original_samples (`torch.Tensor`): `x_0`, shape `(batch, channels, height, width)`.
            noise (`torch.Tensor`): `z`, same shape.
            timesteps (`float` or `torch.Tensor`): One time from 0 to 1, or a tensor of shape `(batch,)`.
        """
        sigma = self.sigma(timesteps).to(original_samples)
        return original_samples + sigma.reshape(-1, *(1,) * (original_samples.ndim - 1)) * noise

    def step_pred(
        self,
        score: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        predictor: str = "reverse_diffusion",
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> VESDESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One predictor step to the next level: `mean + std z` with `mean = x + v score`.

        `"euler_maruyama"` (equation 6 of https://huggingface.co/papers/2011.13456): `v = G(t)^2 dt`, `std^2 = v`, with
        `G = sigma(t) sqrt(2 ln(sigma_max / sigma_min))` and `dt = 1 / N`, or with the exponential schedule
        `G = sigma_base^t` and `dt` the distance of two times, each as their authors do. `"reverse_diffusion"`
        (equation 46): `v = s^2 - s'^2` of the level `s` and the next one `s'`, `std^2 = v`. `"ancestral"` (equation
        47): the same `v`, `std^2 = s'^2 (s^2 - s'^2) / s^2`. The last `s'` is 0.

        Args:
            score (`torch.Tensor`): `grad_x log p_t(x)` at `sample`, same shape.
            timestep (`float` or `torch.Tensor`): One of `timesteps`.
            sample (`torch.Tensor`): `x`, shape `(batch, channels, height, width)`.
            predictor (`str`, *optional*, defaults to `"reverse_diffusion"`):
                `"euler_maruyama"`, `"reverse_diffusion"` or `"ancestral"`.
            generator (`torch.Generator` or a list of them, *optional*): For `z`.
            variance_noise (`torch.Tensor`, *optional*): `z` itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`VESDESchedulerOutput`].

        Raises:
            ValueError: For an unknown predictor, and for a time that is not in (0, 1].
        """
        time = float(timestep)
        if predictor not in PREDICTORS:
            raise ValueError(f"`predictor` is {predictor!r}, but must be one of {PREDICTORS}.")
        if not 0 < time <= 1:
            raise ValueError(f"`timestep` is {time}, but times are above 0 and at most 1: take one of `timesteps`.")
        if predictor == "euler_maruyama":
            if self.config.parametrization == "geometric":
                rate = 2 * math.log(self.config.sigma_max / self.config.sigma_min)
                change = float(self.sigma(time)) ** 2 * rate / self.num_inference_steps
            else:
                step = (1 - self.config.sampling_eps) / (self.num_inference_steps - 1)
                change = self.config.sigma_base ** (2 * time) * step
            variance = change
        else:
            place = (time - self.config.sampling_eps) / (1 - self.config.sampling_eps) * (self.num_inference_steps - 1)
            place = max(round(place), 0)
            level = float(self.discrete_sigmas[place])
            next_level = float(self.discrete_sigmas[place - 1]) if place > 0 else 0.0
            variance = change = level**2 - next_level**2
            if predictor == "ancestral":
                variance = change * next_level**2 / level**2
        if variance_noise is None:
            variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        prev_sample_mean = sample + change * score
        prev_sample = prev_sample_mean + variance**0.5 * variance_noise
        if not return_dict:
            return prev_sample, prev_sample_mean
        return VESDESchedulerOutput(prev_sample=prev_sample, prev_sample_mean=prev_sample_mean)

    def step_correct(
        self,
        score: torch.Tensor,
        sample: torch.Tensor,
        snr: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> VESDESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One Langevin step at the level of `sample` (algorithm 4 of https://huggingface.co/papers/2011.13456):
        `x + e score + sqrt(2 e) z` with `e = 2 (snr |z| / |score|)^2`, norms over each sample, or with `batch_norms`
        their means over the batch.

        Args:
            score (`torch.Tensor`): `grad_x log p_t(x)` at `sample`, same shape.
            sample (`torch.Tensor`): `x`, shape `(batch, channels, height, width)`.
            snr (`float`, *optional*): Defaults to that of the configuration.
            generator (`torch.Generator` or a list of them, *optional*): For `z`.
            variance_noise (`torch.Tensor`, *optional*): `z` itself, shape of `sample`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`VESDESchedulerOutput`].
        """
        snr = self.config.snr if snr is None else snr
        if variance_noise is None:
            variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        # Half precision holds neither the norms nor the step's size.
        dtype, wide = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        score, sample, variance_noise = score.to(wide), sample.to(wide), variance_noise.to(wide)
        noise_norm, score_norm = (x.flatten(1).norm(dim=1) for x in (variance_noise, score))
        if self.config.batch_norms:
            noise_norm, score_norm = noise_norm.mean(0, keepdim=True), score_norm.mean(0, keepdim=True)
        step_size = 2 * (snr * noise_norm / score_norm) ** 2
        step_size = step_size.reshape(-1, *(1,) * (sample.ndim - 1))
        prev_sample_mean = sample + step_size * score
        prev_sample = (prev_sample_mean + (2 * step_size).sqrt() * variance_noise).to(dtype)
        prev_sample_mean = prev_sample_mean.to(dtype)
        if not return_dict:
            return prev_sample, prev_sample_mean
        return VESDESchedulerOutput(prev_sample=prev_sample, prev_sample_mean=prev_sample_mean)


# ---------------------------------------------------------------------------------------------------------- pipeline


@dataclass
class VESDEPipelineOutput(BaseOutput):
    """
    Output of [`VESDEPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: PIL, or values in [0, 1] of shape `(batch, height, width, channels)` as an array and
            `(batch, channels, height, width)` as a tensor; with `output_type="latent"` a tensor in the model's range.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


# Copied from pipelines.glide._checked
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


class VESDEPipeline(HubMixin, DiffusionPipeline):
    r"""
    Generates images with a variance-exploding SDE by predictor-corrector sampling
    (https://huggingface.co/papers/2011.13456, algorithm 1), with or without classes, and guided by any gradient.

    Args:
        unet ([`UNet2DModel`] or another model on images):
            The pretrained network, of any number of channels, which gets `sigma(t)` in place of a timestep:
            unconditional or class-conditional. What it gives is the scheduler's `prediction_type`. Fourier embeddings
            of `sigma` lose it in half precision: keep such networks in float32.
        scheduler ([`VESDEScheduler`] or [`ScoreSdeVeScheduler`]): The latter, of NCSN++ checkpoints, is converted.

    Raises:
        ValueError: If the U-Net or the scheduler is of a kind that does not fit.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel | ModelMixin, scheduler: VESDEScheduler | SchedulerMixin) -> None:
        super().__init__()
        if unet.config.get("cross_attention_dim") is not None or unet.config.get("class_embed_type") == "identity":
            raise ValueError(
                "`unet` is conditioned on text or on embeddings: this pipeline is for unconditional or "
                "class-conditional models, such as google/ncsnpp-celebahq-256."
            )
        if unet.config.out_channels != unet.config.in_channels:
            raise ValueError(
                f"`unet` has {unet.config.in_channels} input and {unet.config.out_channels} output channels, but a "
                "score has the shape of its image: it needs as many outputs as inputs."
            )
        if any(base.__name__ == "ScoreSdeVeScheduler" for base in type(scheduler).__mro__):
            scheduler = VESDEScheduler.from_config(scheduler.config)
        self._check_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False, do_normalize=False)

    def _check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """On making the pipeline, and on every call: it may have been replaced."""
        if all(base.__name__ != "VESDEScheduler" for base in type(scheduler).__mro__):
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__}, but this pipeline steps by a `VESDEScheduler`: give "
                "one with the `sigma_min` and `sigma_max` that the model was trained with, for a "
                "`ScoreSdeVeScheduler` `VESDEScheduler.from_config(scheduler.config)`."
            )

    # Copied from pipelines.copaint.CoPaintPipeline._state_dtype
    @property
    def _state_dtype(self) -> torch.dtype:
        # Half precision cannot hold a trajectory from sigma_max to sigma_min: only the network computes in it.
        return torch.promote_types(self.unet.dtype, torch.float32)

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

    def _score(
        self,
        sample: torch.Tensor,
        sigma: float,
        class_labels: torch.Tensor | None,
        cond_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        guidance_scale: float,
        step: int,
    ) -> torch.Tensor:
        """`grad log p_t(x)` plus `guidance_scale` times `grad log p_t(y | x)`, equation 14; in the sample's dtype."""
        sigmas = torch.full((sample.shape[0],), sigma, dtype=sample.dtype, device=sample.device)
        score = self.unet(sample.to(self.unet.dtype), sigmas, class_labels=class_labels).sample.to(sample.dtype)
        if self.scheduler.config.prediction_type == "epsilon":
            score = -score / sigma
        if cond_fn is None:
            return score
        found = cond_fn(sample.clone(), sigmas)  # it may change what it gets
        return score + guidance_scale * _checked("cond_fn", found, sample, step)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 1000,
        predictor: str | None = "reverse_diffusion",
        corrector_steps: int | None = None,
        snr: float | None = None,
        height: int | None = None,
        width: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        cond_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VESDEPipeline", int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> VESDEPipelineOutput | tuple:
        r"""
        Generates images. At each time the corrector's steps come first, then that of the predictor; the result is the
        last predictor step without its noise. The network runs `num_inference_steps * (corrector_steps + 1)` times.

        Draws: `x_1`, then at each time the noise of every corrector step, and that of the predictor.

        Args:
            batch_size (`int`, *optional*, defaults to 1): Number of images.
            num_inference_steps (`int`, *optional*, defaults to 1000): Number of times.
            predictor (`str`, *optional*, defaults to `"reverse_diffusion"`):
                `"euler_maruyama"`, `"reverse_diffusion"` or `"ancestral"`; `None` for the corrector alone (annealed
                Langevin dynamics), whose last noise stays in the result.
            corrector_steps (`int`, *optional*):
                Langevin steps per time, 0 for the predictor alone. Defaults to the scheduler's `correct_steps`.
            snr (`float`, *optional*): Signal-to-noise ratio of a Langevin step. Defaults to the scheduler's.
            height (`int`, *optional*): In pixels. Defaults to the U-Net's `sample_size`.
            width (`int`, *optional*): In pixels. Defaults to the U-Net's `sample_size`.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*):
                For a class-conditional U-Net: one label, or one per image.
            guidance_scale (`float`, *optional*, defaults to 1.0): Factor of the gradients of `cond_fn`.
            cond_fn (`Callable`, *optional*):
                `cond_fn(sample, sigma)` gives `grad_x log p(y | x)` of a classifier, or of anything else to be
                obeyed, at the noisy `sample` of shape `(batch, channels, height, width)` in the model's range and
                `sigma` of shape `(batch,)`; gradients are off when it is called.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise to start from, shape `(batch_size, channels, height, width)`.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per image, which then
                depends on no other (unless the scheduler has `batch_norms`).
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (one or three channels), `"np"` or `"pt"` (values in [0, 1]), or `"latent"` (the tensor in the
                model's range, not clipped).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`VESDEPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, timestep, callback_kwargs)` after every step, with the time in (0, 1]; it may
                return `{"latents": ...}`. The last one sees the result.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                What is in `callback_kwargs`: `"latents"`.

        Raises:
            TypeError: For class labels that are no integers, and numbers and gradients of other types.
            ValueError: For arguments that do not fit each other or are out of range, before the model runs; for
                gradients and latents of another shape than the sample; for anything that is not finite.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from diffusers_ext import VESDEPipeline, VESDEScheduler

        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ...     norm_num_groups=8, time_embedding_type="fourier",
        ... )
        >>> pipe = VESDEPipeline(unet, VESDEScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=5, output_type="pt").images.shape
        torch.Size([2, 1, 8, 8])

        >>> def brighter(sample, sigma):
        ...     with torch.enable_grad():
        ...         sample = sample.detach().requires_grad_()
        ...         log_probability = torch.nn.functional.logsigmoid(sample.mean(dim=(1, 2, 3))).sum()
        ...         return torch.autograd.grad(log_probability, sample)[0]
        >>> images = pipe(num_inference_steps=5, cond_fn=brighter, guidance_scale=10.0).images

        ```
        """
        # 1. Check inputs
        self._check_scheduler(self.scheduler)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be an `int` of at least 1.")
        if predictor is not None and predictor not in PREDICTORS:
            raise ValueError(f"`predictor` is {predictor!r}, but must be one of {PREDICTORS}, or `None`.")
        corrector_steps = self.scheduler.config.correct_steps if corrector_steps is None else corrector_steps
        if type(corrector_steps) is not int or corrector_steps < 0:
            raise ValueError(f"`corrector_steps` is {corrector_steps}, but must be an `int` of at least 0.")
        if predictor is None and corrector_steps == 0:
            raise ValueError("`predictor` is `None` and `corrector_steps` is 0: without both, noise stays noise.")
        for name, value in (("snr", snr), ("guidance_scale", guidance_scale)):
            if value is not None and not isinstance(value, Real):
                raise TypeError(f"`{name}` is {value!r}, but must be a number.")
        if snr is not None and not 0 < snr < math.inf:
            raise ValueError(f"`snr` is {snr}, but must be above 0; leave the corrector out by `corrector_steps=0`.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but must be finite.")
        if cond_fn is None and guidance_scale != 1:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but there is no `cond_fn` to guide: give one.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be of {self._callback_tensor_inputs}."
            )
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(
                f"`output_type` is 'pil', but the U-Net's images have {channels} channels: take 'np', 'pt' or "
                "'latent'."
            )
        size = self.unet.config.sample_size
        if size is None and (height is None or width is None):
            raise ValueError("`height` and `width` must both be given: the U-Net has no `sample_size`.")
        sides = size if isinstance(size, tuple | list) else (size, size)
        height, width = (side if given is None else given for given, side in zip((height, width), sides, strict=True))
        factor = 2 ** (len(self.unet.config.get("block_out_channels", (1,))) - 1)
        if any(type(side) is not int or side < 1 or side % factor for side in (height, width)):
            raise ValueError(
                f"`height` and `width` are {(height, width)}, but the U-Net halves images {int(math.log2(factor))} "
                f"times: both must be positive `int` multiples of {factor}."
            )
        class_labels = self._prepare_class_labels(class_labels, batch_size)
        self.scheduler.set_timesteps(num_inference_steps)
        generator = list(generator) if isinstance(generator, tuple) else generator
        latents = self._prepare_latents(latents, (batch_size, channels, height, width), generator)
        latents = latents * self.scheduler.init_noise_sigma

        # 2. From noise to images
        levels = list(zip(self.scheduler.timesteps.tolist(), self.scheduler.sigmas.tolist(), strict=True))
        for step, (timestep, sigma) in enumerate(self.progress_bar(levels)):
            for _ in range(corrector_steps):
                score = self._score(latents, sigma, class_labels, cond_fn, guidance_scale, step)
                latents = self.scheduler.step_correct(score, latents, snr, generator).prev_sample
            if predictor is not None:
                score = self._score(latents, sigma, class_labels, cond_fn, guidance_scale, step)
                output = self.scheduler.step_pred(score, timestep, latents, predictor, generator)
                latents = output.prev_sample if step < len(levels) - 1 else output.prev_sample_mean
            if not latents.isfinite().all():
                raise ValueError(
                    f"the images are not finite after step {step}: run the U-Net in float32, and see whether its "
                    "weights are finite and whether its score is zero (no Langevin step has a size then)."
                )
            if callback_on_step_end is not None:
                chosen = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                changed = (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", latents)
                latents = _checked("callback_on_step_end", changed, latents, step)

        # 3. Their range
        images = latents
        if output_type != "latent":
            images = (images / 2 + 0.5 if self.scheduler.config.centered else images).clamp(0, 1)
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return VESDEPipelineOutput(images=images)
