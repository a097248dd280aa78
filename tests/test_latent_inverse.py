"""PSLD and ReSample, on Stable Diffusion's real components at tiny sizes, against independent programs."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import StableDiffusionPipeline
from hub_server import HubServer
from test_copaint_stable_diffusion import IMAGE, MASK, components, tokenizer  # noqa: F401

import diffusers_ext
from diffusers_ext.pipelines.psld import decode, encode

METHODS = {
    "psld": ("PSLDPipeline", {"num_inference_steps": 4}),
    "resample": (
        "ReSamplePipeline",
        {"num_inference_steps": 4, "resample_interval": 1, "num_pixel_steps": 2, "num_latent_steps": 2},
    ),
}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def pipe(method, tokenizer):  # noqa: F811
    pipe = getattr(diffusers_ext, METHODS[method][0])(**components(tokenizer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Contract(PipelineContract):
    image_shape = (3, 16, 16)
    method: str

    @pytest.fixture
    def pipe(self, tokenizer):  # noqa: F811
        self.tokenizer = tokenizer
        pipe = self.pipeline_class(**components(tokenizer))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(batch_size, 1, 16, 16)
        mask[:, :, :2] = 0
        return {"prompt": ["a"] * batch_size, "image": image, "mask_image": mask, **METHODS[self.method][1]}

    def test_from_pipe_shares_the_components(self, pipe):
        other = self.pipeline_class.from_pipe(pipe)
        assert other.unet is pipe.unet and other.vae is pipe.vae


class TestPSLD(_Contract):
    method, pipeline_class = "psld", diffusers_ext.PSLDPipeline


class TestReSample(_Contract):
    method, pipeline_class = "resample", diffusers_ext.ReSamplePipeline


ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def adamw(variable, loss, steps, rate):
    """Decoupled weight decay (1711.05101, algorithm 2) with torch's defaults, written out."""
    first, second = torch.zeros_like(variable), torch.zeros_like(variable)
    for step in range(1, steps + 1):
        variable = variable.detach().requires_grad_()
        [gradient] = torch.autograd.grad(loss(variable), variable)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        variable = (1 - 0.01 * rate) * variable.detach() - rate * direction
    return variable


def program(pipe, method, levels, noises, steps=0):
    """The method in plain loops, in float64, without guidance; `steps` of AdamW in each optimization of ReSample."""
    images, keep = 2 * IMAGE.double() - 1, (1 - MASK).double()
    embeds = pipe._encode_prompt(["ab"]).expand(2, -1, -1)
    draws, z = iter(noises[1:]), noises[0]
    scale = pipe.vae.config.scaling_factor

    def picture(z):
        return pipe.vae.decode(z / scale).sample

    def misfit(pixels):  # the mean over each image's known pixels, summed over the images
        return (keep * (pixels - images)).square().sum() / (3 * keep.sum())

    def predict(z, t):
        return pipe.unet(z, t, encoder_hidden_states=embeds).sample

    def clean(z, t, eps):
        return (z - (1 - ABAR[t]) ** 0.5 * eps) / ABAR[t] ** 0.5

    def move(z, t, s):
        eps = predict(z, t)
        return ABAR[s] ** 0.5 * clean(z, t, eps) + (1 - ABAR[s]) ** 0.5 * eps

    for step, (t, s) in enumerate(itertools.pairwise(levels)):
        z = z.detach().requires_grad_()
        z0 = clean(z, t, predict(z, t))
        image, total = picture(z0), 0
        for i in range(2):
            error = (keep * (image[i] - images[i])).norm()
            if method == "psld":
                glued = keep * images[i : i + 1] + (1 - keep) * image[i : i + 1]
                again = pipe.vae.encode(glued).latent_dist.mode() * scale
                error = 0.1 * error + 0.01 * (again[0] - z0[i]).norm()
            else:
                error = ABAR[t] / 2 * error
            total = total + error
        [gradient] = torch.autograd.grad(total, z)
        with torch.no_grad():
            z = move(z, t, s) - gradient
        moves = len(levels) - 1
        left = moves - 1 - step
        if method == "resample" and 0 < left < 2 * moves / 3:
            with torch.no_grad():
                ahead, seen = z, s
                for a, b in list(itertools.pairwise(levels[step + 1 :]))[:5]:
                    ahead, seen = move(ahead, a, b), b
                z0 = clean(ahead, seen, predict(ahead, seen))
                pixels = picture(z0)
            if left > moves / 3:
                pixels = adamw(pixels, misfit, steps, 1e-2)
                with torch.no_grad():
                    z0 = pipe.vae.encode(pixels).latent_dist.mode() * scale
            else:
                z0 = adamw(z0, lambda z: misfit(picture(z)), steps, 5e-3)
            a = ABAR[s]
            variance = 40 * (1 - a) / (1 - ABAR[t]) * (1 - ABAR[t] / a)
            mean = (variance * a**0.5 * z0 + (1 - a) * z) / (variance + 1 - a)
            z = mean + (1 / (1 / variance + 1 / (1 - a))) ** 0.5 * next(draws)
    with torch.no_grad():
        z = clean(z, 0, predict(z, 0))
    return adamw(z, lambda z: misfit(picture(z)), steps, 5e-3) if steps else z


# Six moves of ReSample: the one with three moves left optimizes pixels, those with two and one left latents.
@pytest.mark.parametrize(
    ("method", "levels", "options"),
    [
        ("psld", [999, 666, 333, 0], {}),
        ("resample", [999, 666, 333, 0], {"num_pixel_steps": 0, "num_latent_steps": 0}),
        ("resample", [999, 832, 666, 500, 333, 166, 0], {"num_pixel_steps": 3, "num_latent_steps": 3}),
    ],
    indirect=["method"],
)
def test_equals_an_independent_program(pipe, method, levels, options, monkeypatch):
    pipe.to(torch.float64)
    noises = list(torch.randn(len(levels), 2, 4, 8, 8, dtype=torch.float64))
    draws = iter(noises[1:])
    module = importlib.import_module(f"diffusers_ext.pipelines.{method}")
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    if method == "resample":
        options = options | {"resample_interval": 1, "consistency_tolerance": 0.0}
    steps = {"num_inference_steps": len(levels), "guidance_scale": 1.0}
    output = pipe("ab", IMAGE, MASK, **steps, latents=noises[0], output_type="latent", **options).images
    assert pipe.scheduler.trajectory == list(itertools.pairwise(levels))
    expected = program(pipe, method, levels, noises, options.get("num_latent_steps", 0))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_hard_consistency_meets_the_known_pixels(tokenizer):  # noqa: F811
    """The optimization of the pixels reaches any image; each image of a batch ends for itself."""
    pipe = diffusers_ext.ReSamplePipeline(**components(tokenizer))
    keep, images = (1 - MASK)[None].expand(2, -1, -1, -1), 2 * IMAGE - 1
    start = torch.zeros_like(images)
    start[1] = images[1]
    with torch.no_grad():
        pixels = pipe._make_consistent(start, lambda x: x, keep, images, 2000, 1e-2, 1e-6)
        assert ((pixels - images) * keep).square().flatten(1).sum(1).div(keep.flatten(1).sum(1) * 3).max() <= 1e-6
        assert torch.equal(pixels[1], images[1]), "nothing was to be done"
        latents = torch.randn(2, 4, 8, 8)
        before, after = (
            ((decode(pipe.vae, z) - images) * keep).square().sum().item()
            for z in (
                latents,
                pipe._make_consistent(latents, lambda z: decode(pipe.vae, z), keep, images, 50, 5e-2, 1e-6),
            )
        )
    assert after < before


def test_examples(tokenizer, tmp_path):  # noqa: F811
    """They load a checkpoint by its name: here from a Hub of this machine that has a tiny one under that name."""
    stock = StableDiffusionPipeline(
        **components(tokenizer), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.save_pretrained(tmp_path / "checkpoint")
    files = {
        path.relative_to(tmp_path / "checkpoint").as_posix(): path.read_bytes()
        for path in (tmp_path / "checkpoint").rglob("*")
        if path.is_file()
    }
    program = (
        "import doctest, importlib, sys, torch; torch.set_num_threads(1)\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(f'diffusers_ext.pipelines.{name}')\n"
        "    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)\n"
        "    assert result.failed == 0 and result.attempted >= 9, (name, result)\n"
    )
    with HubServer() as hub:
        hub.put("stable-diffusion-v1-5/stable-diffusion-v1-5", files)
        done = subprocess.run(
            [sys.executable, "-c", program, "copaint_stable_diffusion", "psld", "resample"],
            env=hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_latents_and_images(tokenizer):  # noqa: F811
    vae = components(tokenizer)["vae"]
    images = 2 * IMAGE - 1
    with torch.no_grad():
        torch.testing.assert_close(encode(vae, images), vae.encode(images).latent_dist.mode() * 0.18215)
        latents = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(decode(vae, latents), vae.decode(latents / 0.18215).sample)


def test_known_pixels_and_gradients(pipe, method):
    images = pipe("ab", IMAGE, MASK, feather=0, output_type="pt", **METHODS[method][1]).images
    torch.testing.assert_close(images[..., :8], IMAGE[..., :8])
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode` rules out"):
        pipe("ab", IMAGE, MASK, **METHODS[method][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "`prompt` is missing"),
        ({"image": None}, "`image` or `mask_image` is missing"),
        ({"image": IMAGE[..., :10], "mask_image": torch.zeros(16, 10)}, r"\(16, 10\).*multiples of 4"),
        ({"eta": 2.0}, "`eta` is 2.0.*at most 1"),
        ({"feather": -1}, "`feather` is -1"),
        ({"num_inference_steps": 1}, "from 2 to 1000"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    ],
)
def test_bad_input_is_refused_before_a_model_runs(pipe, arguments, message):
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe(**({"prompt": "a", "image": IMAGE, "mask_image": MASK} | arguments))


def test_networks_that_were_trained_to_inpaint_are_refused(method, tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match="9 input channels"):
        getattr(diffusers_ext, METHODS[method][0])(**components(tokenizer, in_channels=9))
