"""A method whose components are all stock: it runs on any unconditional diffusers checkpoint."""

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

try:  # saving and publishing; a copy of this file in a Hub repo works without
    import diffusers_ext.hub as _hub

    HubMixin = _hub.HubMixin
except ImportError:
    HubMixin = type("HubMixin", (), {})


class ToySamplerPipeline(HubMixin, DiffusionPipeline):
    """One step of denoising."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        shape = (1, self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        sample = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        timestep = self.scheduler.timesteps[0]
        return self.scheduler.step(self.unet(sample, timestep).sample, timestep, sample).pred_original_sample
