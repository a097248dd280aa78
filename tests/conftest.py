"""What every test stands on: one thread, fixed seeds, no network but loopback, tiny stock checkpoints."""

import os
import random
import sys
import tempfile
from pathlib import Path

# huggingface_hub, diffusers and torch read these when they are imported, and the processes that tests start inherit
# them. The endpoint is a closed port: a process that goes online by mistake fails at once.
_hf_home = tempfile.TemporaryDirectory(prefix="diffusers-ext-tests-")
os.environ |= {
    "HF_HOME": _hf_home.name,
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # recorded numbers and bit-exactness are those of the CPU


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and `make test-gpu`")


def _refuse_outside_addresses(event: str, args: tuple) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
        if not (host.startswith("127.") or host in ("localhost", "::1")):
            raise ConnectionRefusedError(f"a test tried to connect to {args[1]}: tests stay on this machine")


sys.addaudithook(_refuse_outside_addresses)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of the recorded numbers."""
    return Path(__file__).parent / "goldens"


@pytest.fixture
def tiny_unet() -> UNet2DModel:
    """A U-Net for 8 x 8 greyscale images with two resolutions and attention, the same for every test."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def tiny_ddpm(tiny_unet: UNet2DModel) -> DDPMPipeline:
    """A stock unconditional pipeline around `tiny_unet`."""
    pipeline = DDPMPipeline(tiny_unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_ddpm_folder(tiny_ddpm: DDPMPipeline, tmp_path: Path) -> Path:
    """The same, saved by stock diffusers."""
    tiny_ddpm.save_pretrained(tmp_path / "tiny-ddpm")
    return tmp_path / "tiny-ddpm"


@pytest.fixture
def tiny_unclip_folder(tmp_path: Path) -> Path:
    """What `diffusers-ext demo-unclip` leaves behind, with untrained networks: `images`, `clip`, `prior`, `unclip`."""
    from diffusers import PriorTransformer, UNet2DConditionModel
    from transformers import CLIPModel

    from diffusers_ext.pipelines.unclip import (
        UnCLIPDecoderScheduler,
        UnCLIPImageProjection,
        UnCLIPTextToImagePipeline,
    )
    from diffusers_ext.pipelines.unclip_prior import UnCLIPPriorPipeline, default_prior_scheduler, init_prior
    from diffusers_ext.training.precompute_clip_embeddings import load_clip
    from diffusers_ext.training.train_toy_clip import ToyCLIP, byte_tokenizer, default_clip_config, render_digits
    from diffusers_ext.training.train_unclip_decoder import default_decoder_config

    folder = tmp_path / "demo-unclip"
    render_digits(folder / "images", 1, "validation")
    tokenizer = byte_tokenizer()
    ToyCLIP(CLIPModel(default_clip_config(tokenizer)), tokenizer).save_pretrained(folder / "clip")
    text_encoder, tokenizer, image_encoder = load_clip(folder / "clip")
    clip = {"text_encoder": text_encoder, "tokenizer": tokenizer, "image_encoder": image_encoder}
    prior = PriorTransformer(1, 32, 1, embedding_dim=64, num_embeddings=tokenizer.model_max_length)
    init_prior(prior, torch.randn(100, 64))
    UnCLIPPriorPipeline(prior, scheduler=default_prior_scheduler(), **clip).save_pretrained(folder / "prior")
    UnCLIPTextToImagePipeline(
        prior,
        prior_scheduler=default_prior_scheduler(),
        decoder=UNet2DConditionModel(**default_decoder_config(16), sample_size=16),
        decoder_projection=UnCLIPImageProjection(4, 64, time_embed_dim=256, cross_attention_dim=64),
        decoder_scheduler=UnCLIPDecoderScheduler(prediction_type="v_prediction"),
        **clip,
    ).save_pretrained(folder / "unclip")
    return folder
