"""PSLD and ReSample, on Stable Diffusion's real components at tiny sizes, against independent programs."""

import importlib
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from contract import PipelineContract, no_model_runs
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
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


# ------------------------------------------------------------------------------- what the three latent methods share


THREE = {"copaint_stable_diffusion": ("CoPaintStableDiffusionPipeline", {"num_inference_steps": 4}), **METHODS}


@pytest.fixture(params=THREE)
def one(request, tokenizer):  # noqa: F811
    """Each of the three, with its short settings."""
    name, settings = THREE[request.param]
    pipe = getattr(diffusers_ext, name)(**components(tokenizer))
    pipe.set_progress_bar_config(disable=True)
    return pipe, settings | {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}


class _Moving(ModelHook):
    """As a model's hook of CPU offload, which sends the model before it away; one that is away has no weights."""

    def __init__(self, model, before):
        self.model, self.before, self.weights = model, before, None

    def leave(self):
        if self.weights is None:
            self.weights = [parameter.data for parameter in self.model.parameters()]
            for parameter in self.model.parameters():
                parameter.data = torch.full_like(parameter.data, torch.nan)

    def pre_forward(self, module, *args, **kwargs):
        if self.before is not None:
            self.before.leave()
        if self.weights is not None:
            for parameter, weights in zip(self.model.parameters(), self.weights, strict=True):
                parameter.data = weights
            self.weights = None
        return args, kwargs


@pytest.mark.parametrize("more", [{}, {"loss_space": "pixel"}], ids=["", "pixel"])
def test_gradients_survive_the_order_of_offload(one, more):
    pipe, settings = one
    if more and type(pipe).__name__ != "CoPaintStableDiffusionPipeline":
        pytest.skip("has no such argument")
    expected = pipe("ab", IMAGE, MASK, **settings, **more).images
    before = None
    for name in pipe.model_cpu_offload_seq.split("->"):
        before = _Moving(getattr(pipe, name), before)
        add_hook_to_module(before.model, before)
        if name == "vae":  # diffusers' own methods of it do not go through `forward`
            for method in ("encode", "decode"):
                original = getattr(pipe.vae, method)

                def moved(*args, hook=before, original=original, **kwargs):
                    hook.pre_forward(hook.model)
                    return original(*args, **kwargs)

                setattr(pipe.vae, method, moved)
    settings["generator"] = torch.Generator().manual_seed(0)
    torch.testing.assert_close(pipe("ab", IMAGE, MASK, **settings, **more).images, expected)


def test_what_is_in_the_hole_does_not_matter(one):
    pipe, settings = one
    other = IMAGE.clone()
    other[..., 8:] = 1 - other[..., 8:]
    images = []
    for image in (IMAGE, other):
        settings["generator"] = torch.Generator().manual_seed(0)
        images.append(pipe("ab", image, MASK, **settings).images)
    assert torch.equal(*images)


@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_stock_schedulers_keep_their_own_defaults(one, stock, tokenizer):  # noqa: F811
    scheduler = stock()
    converted = type(one[0])(**components(tokenizer, scheduler=scheduler)).scheduler
    torch.testing.assert_close(converted.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_a_scheduler_that_was_put_in_is_named(one):
    pipe, settings = one
    pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler.*make it anew"), no_model_runs(pipe):
        pipe("ab", IMAGE, MASK, **settings)
    again = type(pipe)(**{**pipe.components, "scheduler": pipe.scheduler})
    again.set_progress_bar_config(disable=True)
    assert again("ab", IMAGE, MASK, **settings).images.isfinite().all()


def test_seams_are_ramps_by_distance(one):
    pipe, settings = one
    mask = torch.ones(16, 16)
    mask[:, 4:8] = 0  # four known columns, 1 and 2 pixels from the holes
    noise, images = torch.randn(2, 4, 8, 8), {}
    for feather in (0, 3):
        settings["generator"] = torch.Generator().manual_seed(0)
        images[feather] = pipe("ab", IMAGE, mask, latents=noise, feather=feather, **settings).images
    settings["generator"] = torch.Generator().manual_seed(0)
    own = pipe("ab", IMAGE, mask, latents=noise, paste_known=False, **settings).images
    torch.testing.assert_close(images[0][..., 4:8], IMAGE[..., 4:8])
    weights = torch.tensor([1, 2, 2, 1]) / 4
    mixed = (weights * (2 * IMAGE[..., 4:8] - 1) + (1 - weights) * (2 * own[..., 4:8] - 1)) / 2 + 0.5
    inside = (own > 0) & (own < 1)  # elsewhere the output was clamped
    torch.testing.assert_close(images[3][..., 4:8][inside[..., 4:8]], mixed[inside[..., 4:8]], rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_named(one):
    pipe, settings = one
    with torch.no_grad():
        bias = pipe.unet.conv_out.bias.clone()
        pipe.unet.conv_out.bias[:] = torch.nan
    with pytest.raises(ValueError, match="not finite at step 0"):
        pipe("ab", IMAGE, MASK, **settings)
    with torch.no_grad():
        pipe.unet.conv_out.bias[:] = bias
    if "num_latent_steps" in settings:
        with pytest.raises(ValueError, match="not finite with the learning rate 10000000000"):
            pipe("ab", IMAGE, MASK, **settings | {"latent_learning_rate": 1e10})
    elif type(pipe).__name__ == "CoPaintStableDiffusionPipeline":
        with torch.no_grad():
            pipe.vae.decoder.conv_out.bias[:] = torch.nan
        with pytest.raises(ValueError, match="the result is not finite.*autoencoder"):
            pipe("ab", IMAGE, MASK, **settings)


def test_half_precision_gradients_of_large_images(tokenizer):  # noqa: F811
    """Of a mean over 512 x 512 pixels float16 has no gradient; the optimization works all the same."""
    pipe = diffusers_ext.ReSamplePipeline(**components(tokenizer))
    images, keep, start = torch.zeros(1, 3, 512, 512), torch.ones(1, 1, 512, 512), torch.full((1, 3, 64, 64), 0.005)

    def enlarge(latents):
        return torch.nn.functional.interpolate(latents.half(), scale_factor=8).float()

    with torch.no_grad():
        moved = pipe._make_consistent(start, enlarge, keep, images, 4, 1e-3, 1e-9)
    assert (moved < 0.6 * start).all(), "weight decay alone would leave 0.99996 of it"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "`prompt` is 3"),
        ({"prompt": [3, 4]}, TypeError, r"`prompt` is \[3, 4\]"),
        ({"negative_prompt": 3}, TypeError, "`negative_prompt` is 3"),
        ({"prompt": None, "prompt_embeds": torch.zeros(8, 16)}, ValueError, r"`prompt_embeds` has shape \(8, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 8, 5)}, ValueError, r"must be \(batch, tokens, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 5, 16)}, ValueError, "'prompt': 5.*pad the embeddings"),
    ],
)
def test_bad_prompts_are_refused_before_a_model_runs(one, arguments, error, message):
    pipe, settings = one
    with pytest.raises(error, match=message), no_model_runs(pipe):
        pipe(**({"prompt": "a", "image": IMAGE, "mask_image": MASK} | settings | arguments))


def test_long_prompts_are_cut_with_a_warning(one, caplog, monkeypatch):
    pipe, settings = one
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("diffusers_ext"), "propagate", True)
    with caplog.at_level("WARNING"):
        pipe("a b c d e f g h i j", IMAGE, MASK, **settings)
    assert "`prompt` has 12 tokens, but CLIP reads 8" in caplog.text


def test_without_a_text_encoder(one):
    pipe, settings = one
    embeds = pipe._encode_prompt(["ab"])
    bare = type(pipe)(**(pipe.components | {"text_encoder": None, "tokenizer": None}))
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`negative_prompt_embeds` are missing"), no_model_runs(bare):
        bare(None, IMAGE, MASK, prompt_embeds=embeds, **settings)
    images = bare(None, IMAGE, MASK, prompt_embeds=embeds, negative_prompt_embeds=embeds, **settings).images
    assert images.isfinite().all()


def test_other_families_are_refused(one, tokenizer):  # noqa: F811
    parts = components(tokenizer)
    narrow = components(tokenizer, cross_attention_dim=8)
    consistency = components(tokenizer, time_cond_proj_dim=4)
    for wrong, message in (
        (narrow, "gives 16 channels, but `unet` takes 8"),
        (consistency, "Stable Diffusion 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            type(one[0])(**(parts | {"unet": wrong["unet"]}))
