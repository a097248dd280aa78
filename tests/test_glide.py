"""GLIDE: recorded steps and guidance, an independent program of the whole, and what every pipeline owes its user."""

import doctest
import importlib
import json
import math
import re
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import PipelineContract, no_model_runs
from diffusers import DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

from diffusers_ext import GlidePipeline, GlideTextEncoder, RePaintDDPMScheduler
from diffusers_ext.pipelines.glide import GlideScheduler

glide = importlib.import_module("diffusers_ext.pipelines.glide")


def make_unet(in_channels=3, sample_size=8, cross_attention_dim=16, **changes):
    config = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": 6,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 32,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    }
    torch.manual_seed(in_channels)
    return UNet2DConditionModel(**(config | changes)).eval()


def make_encoder(seed=0, **changes):
    config = {
        "vocab_size": 260,
        "max_position_embeddings": 12,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 128,
    }
    torch.manual_seed(seed)
    return GlideTextEncoder(**(config | changes)).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes and three merges, in GPT-2's files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "Ġthe", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    return GPT2Tokenizer.from_pretrained(folder)


def make_parts(tokenizer, *, inpainting=False, upsampler=False):
    extra = 4 * inpainting
    parts = {
        "unet": make_unet(3 + extra),
        "text_encoder": make_encoder(),
        "tokenizer": tokenizer,
        "scheduler": GlideScheduler(),
    }
    if upsampler:
        parts["upsampler"] = make_unet(6 + extra, 32)
        parts["upsampler_text_encoder"] = make_encoder(1)
        parts["upsampler_scheduler"] = GlideScheduler(beta_schedule="linear")
    return parts


def make(tokenizer, **kind):
    pipe = GlidePipeline(**make_parts(tokenizer, **kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMAGE = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(32, 32)
MASK[:12] = 0
PROMPTS = ["the corgi", "An oil painting", ""]
SHORT = {"num_inference_steps": 3, "upsampler_num_inference_steps": "2,1"}


class TestGlide(PipelineContract):
    pipeline_class, image_shape = GlidePipeline, (3, 8, 8)

    @pytest.fixture(autouse=True)
    def _tokenizer(self, tokenizer):
        self.tokenizer = tokenizer

    def components(self):
        return make_parts(self.tokenizer)

    def inputs(self, batch_size):
        return {"prompt": PROMPTS[:batch_size], "num_inference_steps": 3}


class TestGlideInpaintingTwoStages(TestGlide):
    image_shape = (3, 32, 32)

    def components(self):
        return make_parts(self.tokenizer, inpainting=True, upsampler=True)

    def inputs(self, batch_size):
        masks = MASK.expand(batch_size, 1, 32, 32)
        return {"prompt": PROMPTS[:batch_size], "image": IMAGE[:batch_size], "mask_image": masks, **SHORT}

    def test_callback_sees_every_step(self, pipe):
        calls = []
        self.run(pipe, callback_on_step_end=lambda _, *call: calls.append(call))
        assert [(step, timestep, tensors["latents"].shape[-1]) for step, timestep, tensors in calls] == [
            *((0, 999, 8), (1, 500, 8), (2, 0, 8)),
            *((3, 500, 32), (4, 499, 32), (5, 0, 32)),
        ]


# -- examples


def test_examples(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tokenizer, upsampler=True).save_pretrained("my-glide")
    result = doctest.testmod(glide, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 10


def test_card_examples(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = make(tokenizer, inpainting=True, upsampler=True)
    pipe.upsampler.register_to_config(sample_size=16)  # for speed
    pipe.save_pretrained("mine", card={})
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    installed, remote, *uses = re.findall(r"^```py\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert len(uses) == 2
    for load in (installed, remote):
        names = {"mask_image": MASK}
        exec(load, names)
        assert type(names["pipe"]).__name__ == "GlidePipeline"
    names["pipe"].set_progress_bar_config(disable=True)
    for use in uses:
        exec(use, names)
    assert len(names["closer"]) == 4 and {image.size for image in names["closer"] + names["painted"]} == {(16, 16)}


# -- timesteps and steps


@pytest.fixture
def recorded(goldens):
    def load(name):
        with np.load(goldens / "guidance" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


def test_recorded_timesteps(goldens):
    found = json.loads((goldens / "guidance" / "timesteps.json").read_text())
    assert {"1000|fast27", "1000|100", "1000|ddim25", "1000|ddim37", "1001|10,15,20"} <= found.keys()
    for key, expected in found.items():
        length, spec = key.split("|")
        scheduler = GlideScheduler(int(length))
        if "error" in expected or len(expected) < 2:
            with pytest.raises(ValueError, match="`num_inference_steps` is"):
                scheduler.set_timesteps(spec)
        else:
            scheduler.set_timesteps(spec)
            assert scheduler.timesteps.tolist() == expected[::-1], key
            assert scheduler.timesteps.dtype == torch.int64


@pytest.mark.parametrize("spec", ["ddim", "fast", "10,", "-5", "1.5", "", 0, 1, "0,1", 2.5, None, "ddim0", "fast28"])
def test_timesteps_that_are_refused(spec):
    scheduler = GlideScheduler()
    with pytest.raises(ValueError, match="`num_inference_steps` is"):
        scheduler.set_timesteps(spec)
    assert len(scheduler.timesteps) == 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "schedule", "sampler", "spec"),
    [
        ("sample_anc_lr_25_s0_inpaint", "linear", "ddpm", "25"),
        ("sample_anc_lr_101520_s1_cosine", "squaredcos_cap_v2", "ddpm", "10,15,20"),
        ("sample_ddim_ddim25_s1", "linear", "ddim", "ddim25"),
    ],
)
def test_recorded_steps(name, schedule, sampler, spec, dtype, recorded):
    steps = recorded(name)
    scheduler = GlideScheduler(beta_schedule=schedule)
    scheduler.set_timesteps(spec)
    assert scheduler.timesteps.tolist() == steps["t_model"].tolist()
    known = {}
    if "inpaint" in name:
        known = {"image": recorded("inpaint_inputs")["image"].to(dtype)}
        known["keep_mask"] = recorded("inpaint_inputs")["mask"].to(dtype)
    else:
        assert steps["grad"].abs().min() > 0
    for i, timestep in enumerate(scheduler.timesteps):
        model_output, sample, noise = (steps[key][i].to(dtype) for key in ("model_out", "x_in", "noise"))
        gradient = None if known else steps["grad"][i].to(dtype)
        output = scheduler.step(
            model_output, timestep, sample, sampler, gradient, variance_noise=noise, **known
        ).prev_sample
        tolerance = 1e-10 if dtype == torch.float64 else 2e-6 if schedule == "linear" else 2e-5
        torch.testing.assert_close(output.double(), steps["x_out"][i], rtol=0, atol=tolerance)


def test_add_noise_and_length():
    scheduler = GlideScheduler(beta_schedule="linear")
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[7, 998]]
    for timesteps, level in ((torch.tensor([7, 998]), torch.from_numpy(abar).reshape(2, 1, 1, 1)), (998, abar[1])):
        expected = level**0.5 * x0 + (1 - level) ** 0.5 * noise
        torch.testing.assert_close(scheduler.add_noise(x0, noise, timesteps), expected, rtol=0, atol=1e-12)
    assert len(scheduler) == 1000 and scheduler.scale_model_input(x0, 5) is x0


def test_steps_that_are_refused():
    scheduler, x = GlideScheduler(), torch.zeros(1, 3, 4, 4)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` is 5, .*999"):
        scheduler.step(x.repeat(1, 2, 1, 1), 5, x)
    with pytest.raises(ValueError, match="3 channels, but a sample of 3 needs 6"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="`sampler` is 'plms'"):
        scheduler.step(x.repeat(1, 2, 1, 1), 999, x, sampler="plms")
    with pytest.raises(ValueError, match="`beta_schedule` is 'sigmoid'"):
        GlideScheduler(beta_schedule="sigmoid")
    for known in ({"image": x}, {"keep_mask": x[:, :1]}):
        with pytest.raises(ValueError, match="`image` and `keep_mask` belong together"):
            scheduler.step(x.repeat(1, 2, 1, 1), 999, x, **known)


@pytest.mark.parametrize(
    ("steps", "schedule", "least"),
    [
        *((steps, "squaredcos_cap_v2", 2) for steps in (0, 1, -3, 5.5, True)),
        *((steps, "linear", 21) for steps in (20, 10, 0)),
    ],
)
def test_too_few_training_timesteps(steps, schedule, least):
    with pytest.raises(
        ValueError, match=f"`num_train_timesteps` is {steps}, but must be an `int` of at least {least}"
    ):
        GlideScheduler(steps, schedule)
    levels = GlideScheduler(least, schedule).alphas_cumprod
    assert (levels > 0).all() and (levels.diff() < 0).all()


def test_settings_of_another_scheduler_are_kept():
    assert GlideScheduler.from_config(DDPMScheduler().config).config.beta_schedule == "linear"
    cosine = GlideScheduler.from_config(DDPMScheduler().config, beta_schedule="squaredcos_cap_v2")
    assert cosine.config.beta_schedule == "squaredcos_cap_v2"
    assert GlideScheduler.from_config(GlideScheduler(500, "linear").config).config.num_train_timesteps == 500


# -- guidance


class RecordedUNet(ModelMixin, ConfigMixin):
    """Gives what was recorded for the input that was recorded."""

    @register_to_config
    def __init__(
        self,
        sample_size=4,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32,),
        cross_attention_dim=16,
        class_embed_type="identity",
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample, timestep, encoder_hidden_states, class_labels):
        if timestep[0] == 999:
            torch.testing.assert_close(sample, self.expected, rtol=0, atol=0)
        return SimpleNamespace(sample=self.output)


def test_recorded_guidance(tokenizer, recorded):
    """The first step of a run on the recorded output is that on the recorded guided output."""
    cfg = recorded("cfg")
    parts = make_parts(tokenizer) | {"unet": RecordedUNet()}
    parts["unet"].expected, parts["unet"].output = cfg["combined_in"], cfg["raw"]
    pipe = GlidePipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe(
        ["a", "b"],
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=cfg["combined_in"][:2],
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda _, step, timestep, tensors: seen.append(tensors["latents"]),
        output_type="latent",
    )
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for output, is_right in (
        (cfg["glide_s3"][:2], True),
        (torch.cat([cfg["glide_s3"][:2, :3], cfg["raw"][2:, 3:]], 1), False),  # the variance of the other half
        (cfg["raw"][:2], False),
    ):
        pipe.scheduler.set_timesteps(2)
        expected = pipe.scheduler.step(output, 999, cfg["combined_in"][:2], variance_noise=noise).prev_sample
        assert torch.allclose(seen[0], expected, rtol=0, atol=1e-12) is is_right


def test_guidance_of_one_is_none(tokenizer):
    pipe = make(tokenizer).to(torch.float64)
    sizes = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def run(**changes):
        arguments = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        return pipe("the corgi", **arguments, **changes).images

    plain = run(guidance_scale=1)
    assert sizes == [1, 1, 1]
    same = run(guidance_scale=3.0, negative_prompt="the corgi")  # eps_c - eps_u = 0
    assert sizes[3:] == [2, 2, 2]
    torch.testing.assert_close(plain, same, rtol=0, atol=1e-10)
    assert not torch.allclose(plain, run(guidance_scale=3.0), atol=1e-3)
    assert not torch.allclose(run(negative_prompt="a cat"), run(guidance_scale=3.0), atol=1e-3)


# -- the whole, against an independent program


def program(pipe, tokens, timesteps, draws, guidance, samplers, cond_fn=None, image=None, mask=None):
    """GLIDE on the pipeline's networks, from the papers' formulas; `tokens` of the prompts and of the empty one."""
    result = None
    for stage, (unet, encoder, schedule) in enumerate(
        [(pipe.unet, pipe.text_encoder, "cosine"), (pipe.upsampler, pipe.upsampler_text_encoder, "linear")]
    ):
        u = np.arange(1001) / 1000
        if schedule == "cosine":
            f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        else:
            betas = np.linspace(1e-4, 0.02, 1000)
        abar = np.cumprod(1 - betas)
        size, batch = unet.config.sample_size, len(tokens) - 1
        rows = tokens[:batch] + (tokens[batch:] * batch if stage == 0 and guidance != 1 else [])
        ids = torch.tensor([row + [259] * (12 - len(row)) for row in rows])
        text = encoder(ids, torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows]))
        x, extra = next(draws), []
        if image is not None:
            keep = (mask < 0.5).double()[None, None]
            keep = F.interpolate(F.interpolate(keep, (8, 8)), (size, size)).expand(batch, 1, size, size)
            y = F.interpolate(image.double(), (size, size), mode="bicubic", antialias=True) if size != 32 else image
            y = y.double().clamp(0, 1) * 2 - 1
            extra = [y * keep, keep]
        if stage == 1:
            x = x * 0.997
            low = ((result + 1) * 127.5).round() / 127.5 - 1
            extra.append(F.interpolate(low, (size, size), mode="bilinear", align_corners=False))
        steps = timesteps[stage]
        for i, t in enumerate(steps):
            a, b = abar[t], abar[steps[i + 1]] if i + 1 < len(steps) else 1.0
            beta = 1 - a / b
            parts = torch.cat([x, *extra], 1)
            parts = parts.repeat(len(rows) // batch, 1, 1, 1)
            out = unet(parts, torch.tensor([t] * len(parts)), text.last_hidden_state, class_labels=text.text_embeds)
            eps, v = out.sample[:batch, :3], out.sample[:batch, 3:]
            if len(rows) > batch:
                eps = (1 - guidance) * out.sample[batch:, :3] + guidance * eps
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            if image is not None:
                x0 = torch.where(keep > 0, y, x0)
            x0 = x0.clamp(-1, 1)
            gradient = cond_fn(x, torch.tensor([t] * batch)) if cond_fn and stage == 0 else 0
            if samplers[stage] == "ddim":
                eps = (x - a**0.5 * x0) / (1 - a) ** 0.5 - (1 - a) ** 0.5 * gradient
                x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
            else:
                small = beta * (1 - b) / (1 - a)
                if b == 1:  # the clipped logarithm
                    a1 = abar[steps[i - 1]]
                    small = (1 - a1 / a) * (1 - a) / (1 - a1)
                variance = torch.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small))
                mean = (b**0.5 * beta * x0 + (a / b) ** 0.5 * (1 - b) * x) / (1 - a)
                x = mean + variance * gradient + (variance**0.5 * next(draws) if b < 1 else 0)
        result = x
    return result


@pytest.mark.parametrize("kind", ["text", "clip", "inpainting"])
@torch.no_grad()
def test_the_whole(tokenizer, kind):
    pipe = make(tokenizer, inpainting=kind == "inpainting", upsampler=True).to(torch.float64)
    the, byte = 258, {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokens = [[257, *(byte[c] for c in "Ġcorgi")], [byte["a"], the, *(byte[c] for c in "ĠoilĠ")], []]
    arguments, settings = {"guidance_scale": 3.0}, {"guidance": 3.0, "samplers": ("ddpm", "ddim")}
    if kind == "clip":
        arguments = {"guidance_scale": 1, "cond_fn": lambda x, t: 2.0 * (0.3 - x) * (t[:, None, None, None] > 100)}
        arguments |= {"sampler": "ddim", "upsampler_sampler": "ddpm"}
        settings = {"guidance": 1, "samplers": ("ddim", "ddpm"), "cond_fn": arguments["cond_fn"]}
    if kind == "inpainting":
        arguments |= {"image": IMAGE[:2], "mask_image": MASK}
        arguments["cond_fn"] = lambda x, t: x.sin()
        settings |= {"samplers": ("ddpm", "ddpm"), "image": IMAGE[:2], "mask": MASK, "cond_fn": arguments["cond_fn"]}
    output = pipe(
        ["THE corgi", "a the oil "],
        num_inference_steps=4,
        upsampler_num_inference_steps="2,1",
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **arguments,
    ).images

    generator = torch.Generator().manual_seed(3)
    counts = {"ddpm": 1, "ddim": 0}  # draws per step but the last
    shapes = [(2, 3, 8, 8)] * (1 + 3 * counts[settings["samplers"][0]])
    shapes += [(2, 3, 32, 32)] * (1 + 2 * counts[settings["samplers"][1]])
    draws = iter([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes])
    expected = program(pipe, tokens, ([999, 666, 333, 0], [500, 499, 0]), draws, **settings)
    assert next(draws, None) is None and expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("own_latents", [False, True])
def test_gradients_may_change_what_they_get(tokenizer, own_latents):
    pipe = make(tokenizer)
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = latents.clone()

    def cond_fn(sample, timestep):
        sample.mul_(2)
        return torch.zeros_like(sample)

    images = [
        pipe(
            "the",
            num_inference_steps=2,
            cond_fn=function,
            latents=latents if own_latents else None,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        for function in (cond_fn, None)
    ]
    assert torch.equal(*images) and torch.equal(latents, before)


def test_callbacks_keep_the_dtype(tokenizer):
    pipe, dtypes = make(tokenizer), []

    def callback(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return {"latents": tensors["latents"].half()}

    images = pipe("the", num_inference_steps=3, output_type="pt", callback_on_step_end=callback).images
    assert {*dtypes, images.dtype} == {torch.float32}


def test_generators_in_a_tuple(tokenizer):
    images = [
        make(tokenizer)(
            ["a", "b"],
            num_inference_steps=2,
            generator=kind(torch.Generator().manual_seed(i) for i in range(2)),
            output_type="pt",
        ).images
        for kind in (list, tuple)
    ]
    assert torch.equal(*images)


def test_a_pair_of_numbers_as_size(tokenizer):
    parts = make_parts(tokenizer, upsampler=True) | {"unet": make_unet(3, (8, 8)), "upsampler": make_unet(6, [32, 32])}
    pipe = GlidePipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("the", output_type="pt", **SHORT).images.shape == (1, 3, 32, 32)
    assert pipe("the", output_type="pt", upsample=False, num_inference_steps=2).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("colors", [1, 4])
def test_other_numbers_of_colors(tokenizer, colors):
    parts = make_parts(tokenizer) | {"unet": make_unet(colors, out_channels=2 * colors)}
    pipe = GlidePipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("the", num_inference_steps=2, output_type="pt").images.shape == (1, colors, 8, 8)
    if colors == 1:
        assert pipe("the", num_inference_steps=2).images[0].mode == "L"
    else:
        with pytest.raises(ValueError, match="'pil', but the images have 4 channels"), no_model_runs(pipe):
            pipe("the", num_inference_steps=2)


# -- text


@pytest.mark.parametrize("how", ["offloaded", "layerwise"])
def test_weights_that_are_elsewhere(how):
    """Modules are called, so that hooks on them work: weights come from elsewhere, or are cast for their use."""
    encoder, ids = make_encoder(num_hidden_layers=2), torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = encoder(ids)[0]
        if how == "offloaded":
            accelerate.cpu_offload(encoder, torch.device("cpu"), offload_buffers=True)
        else:
            encoder.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        found = encoder(ids)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if how == "offloaded" else 0.5)
    assert how == "offloaded" or not torch.equal(found, expected)


def test_padding_is_its_own_embedding():
    encoder = make_encoder().double()
    ids, mask = torch.randint(260, (2, 12)), torch.arange(12)[None] < torch.tensor([[4], [12]])
    other = torch.where(mask, ids, (ids + 1) % 260)
    first, second, unmasked = encoder(ids, mask)[0], encoder(other, mask)[0], encoder(ids)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    torch.testing.assert_close(first[1], unmasked[1], rtol=0, atol=1e-12)
    assert not torch.allclose(first[0], unmasked[0], atol=1e-3)
    encoder.padding_embedding.data += torch.randn(12, 16)
    assert not torch.allclose(encoder(ids, mask)[0][0, :4], first[0, :4], atol=1e-3), "padding is attended to"


def test_encoder_input_that_is_refused():
    encoder = make_encoder()
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(1, 5\), but must be \(batch, 12\)"):
        encoder(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(1, 5\)"):
        encoder(torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 5))
    with pytest.raises(ValueError, match="`num_attention_heads` is 3, but must divide `hidden_size`=16"):
        make_encoder(num_attention_heads=3)
    for name, value in (("num_attention_heads", 0), ("num_hidden_layers", -1), ("vocab_size", 9.0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}, but must be an `int` of at least 1"):
            make_encoder(**{name: value})


def test_prompts(tokenizer, caplog):
    pipe = make(tokenizer)
    seen = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args))
    glide.logger.addHandler(caplog.handler)
    pipe(["A<|endoftext|>", "", "a" * 40], num_inference_steps=2, guidance_scale=1)
    glide.logger.removeHandler(caplog.handler)
    (ids, mask), byte = seen[0], {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    assert mask.sum(1).tolist() == [12, 0, 12]
    assert ids[0].tolist() == [byte[c] for c in "a<|endoftext|>"][:12], "what looks special is text"
    assert "a prompt has more than 12 tokens" in caplog.text


def test_tokenizers_that_add_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    seen = []
    for parts in ({}, {"tokenizer": GPT2Tokenizer.from_pretrained(tmp_path, add_bos_token=True)}):
        pipe = GlidePipeline(**make_parts(tokenizer) | parts)
        pipe.set_progress_bar_config(disable=True)
        pipe.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(torch.stack(args)))
        pipe("the a", num_inference_steps=2, guidance_scale=1)
    assert torch.equal(*seen)


# -- inpainting


def test_known_pixels_stay(tokenizer):
    pipe = make(tokenizer, inpainting=True, upsampler=True)
    for size, changes in ((32, {}), (8, {"upsample": False})):
        image = IMAGE[:1, :, :size, :size]
        mask = torch.ones(size, size)
        mask[: size // 2] = 0
        images = pipe("the", image, mask, output_type="pt", **SHORT, **changes).images
        torch.testing.assert_close(images[:, :, : size // 2], image[:, :, : size // 2], rtol=0, atol=1e-6)
        assert (images[:, :, size // 2 :] - image[:, :, size // 2 :]).abs().mean() > 0.05


def test_inpainting_networks_paint_without_an_image(tokenizer):
    pipe = make(tokenizer, inpainting=True, upsampler=True)
    seen = []
    pipe.upsampler.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert pipe("the", output_type="pt", **SHORT).images.shape == (1, 3, 32, 32)
    assert seen[0].shape[1] == 10 and not seen[0][:, 3:7].any() and seen[0][:, 7:].any()


def test_one_prompt_for_several_images_and_back(tokenizer):
    pipe = make(tokenizer, inpainting=True).to(torch.float64)
    generator = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    arguments = {"mask_image": MASK, "output_type": "pt", "num_images_per_prompt": 2, "num_inference_steps": 3}
    several = pipe("the", IMAGE[:2], generator=generator(), **arguments).images
    same = pipe(["the", "the"], IMAGE[:2], generator=generator(), **arguments).images
    assert several.shape == (4, 3, 8, 8)
    torch.testing.assert_close(several, same, rtol=0, atol=1e-10)
    one = pipe(["the", "a"], IMAGE[:1], generator=generator(), **arguments).images
    torch.testing.assert_close(one[:2], several[:2], rtol=0, atol=1e-10)
    assert not torch.allclose(one[2:], several[2:], atol=1e-3)


def test_pil_images(tokenizer):
    pipe = make(tokenizer, inpainting=True)
    pixels = (IMAGE[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image, mask = Image.fromarray(pixels), Image.fromarray((MASK.numpy() * 255).astype(np.uint8))
    images = [
        pipe("the", *given, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for given in ((image, mask), (torch.from_numpy(pixels).permute(2, 0, 1) / 255, MASK))
    ]
    torch.testing.assert_close(*images)


# -- what is refused


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ({}, {"prompt": 5}, TypeError, "`prompt` is 5"),
        ({}, {"prompt": ["a", 5]}, TypeError, "`prompt` is .'a', 5"),
        ({}, {"prompt": []}, ValueError, r"`prompt` is \[\], but must hold at least one text"),
        ({}, {"negative_prompt": []}, ValueError, r"`negative_prompt` is \[\], but must hold at least one text"),
        ({}, {"negative_prompt": None}, TypeError, "`negative_prompt` is None"),
        ({}, {"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2}, ValueError, r"have \[3, 2, 1\] entries"),
        ({}, {"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt` is 0"),
        ({}, {"num_images_per_prompt": True}, ValueError, "`num_images_per_prompt` is True"),
        ({}, {"guidance_scale": "3"}, TypeError, "`guidance_scale` is '3', but must be a number"),
        ({"upsampler": True}, {"upsampler_noise_scale": None}, TypeError, "`upsampler_noise_scale` is None"),
        ({}, {"negative_prompt": ["a", "b"], "guidance_scale": 1}, ValueError, r"have \[1, 2, 1\] .*not read with"),
        ({}, {"upsampler_sampler": "ddim"}, ValueError, "`upsampler_sampler` was given, .* has no `upsampler`"),
        ({}, {"upsampler_num_inference_steps": 9}, ValueError, "`upsampler_num_inference_steps` was given"),
        ({}, {"upsampler_noise_scale": 1.0}, ValueError, "`upsampler_noise_scale` was given"),
        ({}, {"latents": torch.full((1, 3, 8, 8), math.nan)}, ValueError, "`latents` has values that are not finite"),
        ({}, {"latents": np.zeros((1, 3, 8, 8))}, TypeError, "`latents` is a ndarray"),
        ({}, {"guidance_scale": math.nan}, ValueError, "`guidance_scale` is nan"),
        ({"upsampler": True}, {"upsampler_noise_scale": 0}, ValueError, "`upsampler_noise_scale` is 0"),
        ({}, {"sampler": "plms"}, ValueError, "`sampler` is 'plms'"),
        ({"upsampler": True}, {"upsampler_sampler": "plms"}, ValueError, "`upsampler_sampler` is 'plms'"),
        ({}, {"upsample": True}, ValueError, "`upsample` was given, but this pipeline has no `upsampler`"),
        ({}, {"num_inference_steps": 1}, ValueError, "`num_inference_steps` is 1"),
        ({"upsampler": True}, {"upsampler_num_inference_steps": "ddim37"}, ValueError, "no whole stride takes 37"),
        ({}, {"image": IMAGE, "mask_image": MASK}, ValueError, "`unet` has 3 input channels and was not"),
        ({"inpainting": True}, {"image": IMAGE}, ValueError, "`image` and `mask_image` belong together"),
        ({"inpainting": True}, {"mask_image": MASK}, ValueError, "`image` and `mask_image` belong together"),
        ({"inpainting": True}, {"image": IMAGE[..., 8:], "mask_image": MASK}, ValueError, "GLIDE paints squares"),
        ({"inpainting": True}, {"image": IMAGE, "mask_image": MASK[8:]}, ValueError, "agree in size"),
        ({"inpainting": True}, {"image": 2 * IMAGE, "mask_image": MASK}, ValueError, r"must be in \[0, 1\]"),
        ({"inpainting": True}, {"image": "a.png", "mask_image": MASK}, TypeError, "`image` holds a str"),
        ({}, {"latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"`latents` has shape \(1, 3, 4, 4\)"),
    ],
)
def test_calls_that_are_refused(tokenizer, kind, changes, error, message):
    pipe = make(tokenizer, **kind)
    with pytest.raises(error, match=message), no_model_runs(pipe):
        pipe(**{"prompt": "the", **changes})


def test_upsampler_that_does_not_inpaint(tokenizer):
    parts = make_parts(tokenizer, inpainting=True, upsampler=True) | {"upsampler": make_unet(6, 32)}
    pipe = GlidePipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`upsampler` has 6 input channels .* `upsample=False`"), no_model_runs(pipe):
        pipe("the", IMAGE, MASK)
    assert pipe("the", IMAGE, MASK, upsample=False, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, 0, 0, 0], ValueError, r"gave shape \(1,\) at step 0, but must .* \(1, 3, 8, 8\)"),
        (lambda x: None, TypeError, "gave a NoneType at step 0, but must give a tensor"),
        (lambda x: 0.0, TypeError, "gave a float at step 0"),
        (lambda x: x.numpy(), TypeError, "gave a ndarray at step 0"),
        (lambda x: x * 1j, TypeError, "gave a torch.complex64 at step 0"),
        (lambda x: x * math.nan, ValueError, "gave values that are not finite at step 0"),
    ],
)
def test_what_functions_give(tokenizer, change, error, message):
    pipe = make(tokenizer)
    with pytest.raises(error, match=f"`cond_fn` {message}"):
        pipe("the", num_inference_steps=3, cond_fn=lambda x, t: change(x))
    with pytest.raises(error, match=f"`callback_on_step_end` {message}"):
        pipe("the", num_inference_steps=3, callback_on_step_end=lambda p, i, t, k: {"latents": change(k["latents"])})


def test_images_that_are_not_finite(tokenizer):
    pipe, runs = make(tokenizer, upsampler=True), []
    pipe.unet.conv_out.bias.data[:] = math.inf
    for unet in (pipe.unet, pipe.upsampler):
        unet.register_forward_pre_hook(lambda *args: runs.append(args))
    with pytest.raises(ValueError, match="the images are not finite after step 0"):
        pipe("the", num_inference_steps=5)
    assert len(runs) == 1


@pytest.mark.parametrize("name", ["scheduler", "upsampler_scheduler"])
def test_schedulers_that_were_replaced(tokenizer, name):
    pipe = make(tokenizer, upsampler=True)
    for other in (DDPMScheduler(), RePaintDDPMScheduler()):
        setattr(pipe, name, other)
        with pytest.raises(ValueError, match=f"`{name}` is a {type(other).__name__}"), no_model_runs(pipe):
            pipe("the", **SHORT)


def test_one_scheduler_for_two_networks(tokenizer):
    parts = make_parts(tokenizer, upsampler=True)
    with pytest.raises(ValueError, match="`scheduler` and `upsampler_scheduler` are one object"):
        GlidePipeline(**parts | {"upsampler_scheduler": parts["scheduler"]})
    pipe = GlidePipeline(**parts)
    pipe.upsampler_scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="`scheduler` and `upsampler_scheduler` are one object"), no_model_runs(pipe):
        pipe("the", **SHORT)


def test_tokens_that_the_upsampler_does_not_know(tokenizer):
    parts = make_parts(tokenizer, upsampler=True) | {"upsampler_text_encoder": make_encoder(1, vocab_size=9)}
    with pytest.raises(ValueError, match="260 tokens, but the text encoder of `upsampler` knows 9"):
        GlidePipeline(**parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": make_unet(4)}, "`unet` has 4 input .* needs a size .*, 6 output channels .* 3 input channels, or 7"),
        ({"unet": make_unet(3, None)}, "`sample_size`=None"),
        ({"unet": make_unet(3, (8, 16))}, r"`sample_size`=\(8, 16\), but needs a size \(of a square\)"),
        ({"unet": make_unet(cross_attention_dim=32)}, r"gives widths \(16, 128\), but `unet` takes \(32, 128\)"),
        ({"unet": make_unet(class_embed_type=None)}, "and the type be 'identity'"),
        ({"text_encoder": make_encoder(projection_dim=64)}, r"gives widths \(16, 64\)"),
        (
            {"text_encoder": make_encoder(vocab_size=9)},
            "`tokenizer` has 260 tokens, but the text encoder of `unet` knows 9",
        ),
        ({"scheduler": DDPMScheduler()}, "is a DDPMScheduler, but only `GlideScheduler`"),
        ({"upsampler": make_unet(6, 32)}, "`upsampler_text_encoder`, `upsampler_scheduler` is missing"),
    ],
)
def test_parts_that_are_refused(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        GlidePipeline(**(make_parts(tokenizer) | changes))
