"""A method in one self-contained file, as a user would write one: the tests save, publish and load it."""

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})

SHIFT = 1.0  # the tests write a second version of this file with another value


def shifted(sample: torch.Tensor) -> torch.Tensor:
    return sample + SHIFT


class ToyEncoder(ModelMixin, ConfigMixin):
    """One linear layer."""

    @register_to_config
    def __init__(self, in_features: int = 64, latent_dim: int = 4):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, latent_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))


class ToyScheduler(SchedulerMixin, ConfigMixin):
    """Subtracts a part of the model output."""

    order = 1

    @register_to_config
    def __init__(self, factor: float = 0.5):
        self.timesteps = None

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps).flip(0)

    def step(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample - self.config.factor * model_output


class ToyPipeline(HubMixin, DiffusionPipeline):
    """Noise, moved by an image's code.

    The second paragraph is not for the card.
    """

    model_cpu_offload_seq = "encoder->unet"

    def __init__(self, unet: UNet2DModel, encoder: ToyEncoder | ModelMixin, scheduler: ToyScheduler | SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, encoder=encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, generator: torch.Generator, num_inference_steps: int = 2) -> torch.Tensor:
        code = self.encoder(image).mean()
        sample = randn_tensor(image.shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            sample = self.scheduler.step(self.unet(sample, t).sample + code, sample)
        return shifted(sample)
