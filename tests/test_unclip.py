"""unCLIP: recorded conditioning, exact levels, an independent program of each use, and what every pipeline owes."""

import doctest
import importlib
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    PNDMScheduler,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.utils import logging as diffusers_logging
from hub_server import HubServer
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_ext import (
    UnCLIPImageProjection,
    UnCLIPPriorPipeline,
    UnCLIPPriorTransformer,
    UnCLIPTextToImagePipeline,
)
from diffusers_ext.pipelines.unclip import UnCLIPDecoderScheduler, slerp

unclip = importlib.import_module("diffusers_ext.pipelines.unclip")
DIM, LENGTH, SIDE = 8, 16, 16


def make_tokenizer(**changes):
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        **({"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [], "model_max_length": LENGTH} | changes)
    )


def make_text_encoder(**changes):
    config = {
        "vocab_size": 514, "hidden_size": DIM, "intermediate_size": 16, "projection_dim": DIM, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "bos_token_id": 512, "eos_token_id": 513,
        "pad_token_id": 513, "initializer_factor": 5.0,
    }  # fmt: skip
    torch.manual_seed(1)
    return CLIPTextModelWithProjection(CLIPTextConfig(**(config | changes))).eval()


def make_image_encoder(**changes):
    config = {
        "hidden_size": DIM, "intermediate_size": 16, "projection_dim": DIM, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "initializer_factor": 5.0,
    }  # fmt: skip
    torch.manual_seed(2)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**(config | changes))).eval()


def make_prior(**changes):
    torch.manual_seed(3)
    prior = PriorTransformer(**({"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1} | {
        "embedding_dim": DIM, "num_embeddings": LENGTH} | changes)).eval()  # fmt: skip
    with torch.no_grad():
        prior.prd_embedding.normal_(std=0.5), prior.positional_embedding.normal_(std=0.5)
        for name, weight in prior.named_parameters():  # new ones hardly look at what they are given
            weight.mul_(6 if name.endswith("weight") and "norm" not in name and "time" not in name else 1)
        prior.clip_mean.normal_(), prior.clip_std.uniform_(0.5, 2)
    return prior.requires_grad_(False)


def make_decoder(**changes):
    config = {
        "sample_size": SIDE, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12, "attention_head_dim": 4,
        "class_embed_type": "identity",
    }  # fmt: skip
    torch.manual_seed(4)
    return UNet2DConditionModel(**(config | changes)).eval()


def make_projection(**changes):
    config = {"clip_embeddings_dim": DIM, "time_embed_dim": 128, "cross_attention_dim": 12}
    torch.manual_seed(5)
    projection = UnCLIPImageProjection(**(config | changes)).eval()
    with torch.no_grad():
        projection.learned_classifier_free_guidance_embeddings.normal_()
        projection.clip_mean.normal_(), projection.clip_std.uniform_(0.5, 2)
    return projection


def prior_scheduler():
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="linspace"
    )


def make_parts(**changes):
    return {
        "prior": make_prior(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_tokenizer(),
        "prior_scheduler": prior_scheduler(),
        "decoder": make_decoder(),
        "decoder_projection": make_projection(),
        "decoder_scheduler": UnCLIPDecoderScheduler(),
        "image_encoder": make_image_encoder(),
    } | changes


def make_prior_pipe(**changes):
    parts = make_parts()
    names = ("prior", "text_encoder", "tokenizer", "image_encoder")
    return UnCLIPPriorPipeline(
        **({name: parts[name] for name in names} | {"scheduler": parts["prior_scheduler"]} | changes)
    )


def louder(*models):
    """Larger weights: new networks hardly look at what they are told."""
    with torch.no_grad():
        for name, weight in itertools.chain(*(model.named_parameters() for model in models)):
            weight.mul_(3 if weight.ndim > 1 and "time_emb" not in name else 1)


def make_kandinsky(out_channels=8):
    torch.manual_seed(8)
    unet = make_decoder(
        sample_size=8, in_channels=4, out_channels=out_channels, addition_embed_type="image", encoder_hid_dim=DIM,
        encoder_hid_dim_type="image_proj", class_embed_type=None,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12, up_block_types=("UpDecoderBlock2D",) * 2,
        vq_embed_dim=4,
    )  # fmt: skip
    louder(unet)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, thresholding=True, variance_type="learned_range"
    )
    return KandinskyV22Pipeline(unet, scheduler, movq.eval())


def make_karlo():
    torch.manual_seed(9)
    decoder = make_decoder(
        sample_size=8, out_channels=6, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    large = [
        UNet2DModel(
            sample_size=SIDE, in_channels=6, out_channels=3, down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, add_attention=False,
        ).eval()
        for _ in range(2)
    ]  # fmt: skip
    projection = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=12)
    projection.learned_classifier_free_guidance_embeddings.data.normal_()
    louder(decoder)
    return UnCLIPImageVariationPipeline(
        decoder=decoder,
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
        text_proj=projection.eval(),
        feature_extractor=None,
        image_encoder=make_image_encoder(),
        super_res_first=large[0],
        super_res_last=large[1],
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )


def make_whole_karlo(**changes):
    """With its prior, which has the text encoder of the decoder."""
    parts = dict(make_karlo().components)
    for name in ("image_encoder", "feature_extractor"):
        del parts[name]
    return UnCLIPPipeline(**({"prior": make_prior(), "prior_scheduler": prior_scheduler()} | parts | changes))


def make_stable_unclip():
    torch.manual_seed(10)
    unet = make_decoder(
        sample_size=8, in_channels=4, out_channels=4, class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * DIM,
    )  # fmt: skip
    vae = AutoencoderKL(
        norm_num_groups=4, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    louder(unet)
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=make_image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=DIM),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=make_tokenizer(),
        text_encoder=CLIPTextModel(make_text_encoder(hidden_size=12).config).eval(),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
        ),
        vae=vae.eval(),
    )


DECODERS = {"kandinsky": make_kandinsky, "karlo": make_karlo, "stable_unclip": make_stable_unclip}


def make_over(name, **changes):
    """Over a stock decoder, and a prior."""
    pipe = UnCLIPTextToImagePipeline.from_decoder(DECODERS[name](), make_prior_pipe(), **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(**changes):
    pipe = UnCLIPTextToImagePipeline(**make_parts(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return make()


IMAGES = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
PROMPTS = ["a red three", "a cat", "blue"]
SHORT = {"num_inference_steps": 3, "prior_num_inference_steps": 3}


class TestUnCLIP(PipelineContract):
    pipeline_class, image_shape = UnCLIPTextToImagePipeline, (3, SIDE, SIDE)

    def components(self):
        return make_parts()

    def inputs(self, batch_size):
        return {"prompt": PROMPTS[:batch_size], **SHORT}


class TestUnCLIPGuided(TestUnCLIP):
    """Guidance of both models, noise in the steps of both, two candidates and two images of each prompt."""

    def components(self):
        scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="linspace", clip_sample=False
        )
        return make_parts(prior_scheduler=scheduler)

    def inputs(self, batch_size):
        return super().inputs(batch_size) | {
            "prior_guidance_scale": 2.0, "negative_prompt": "green", "eta": 1.0, "num_candidates": 3,
        }  # fmt: skip


class TestDecoderAlone(TestUnCLIP):
    """Embeddings in place of prompts, and no prior."""

    def components(self):
        return make_parts(**dict.fromkeys(("prior", "text_encoder", "tokenizer", "prior_scheduler", "image_encoder")))

    def inputs(self, batch_size):
        embeds = torch.randn(3, DIM, generator=torch.Generator().manual_seed(7))
        return {"image_embeds": embeds[:batch_size], "num_inference_steps": 3}


class TestKandinsky(TestUnCLIP):
    def components(self):
        return make_over("kandinsky").components

    def inputs(self, batch_size):
        return super().inputs(batch_size) | {"num_candidates": 1}  # of two, half precision may choose the other one


class TestKarlo(TestKandinsky):
    def components(self):
        return make_over("karlo").components


class TestStableUnCLIP(TestKandinsky):
    def components(self):
        return make_over("stable_unclip").components


# -- examples


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("my-unclip")
    make_prior_pipe().save_pretrained("my-prior")
    make_kandinsky().save_pretrained("my-kandinsky")
    result = doctest.testmod(unclip, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 20


def test_card_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("mine", card={})
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    installed, remote, *uses = re.findall(r"^```py\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert len(uses) == 2
    for load in (installed, remote):
        names = {"image": Image.new("RGB", (20, 20), "red"), "other_image": Image.new("RGB", (20, 20), "blue")}
        exec(load, names)
        names["pipe"].set_progress_bar_config(disable=True)
        for use in uses:
            exec(use, names)
        assert names["painted"].size == (SIDE, SIDE) and len(names["path"]) == 8


# -- conditioning


@pytest.fixture
def recorded(goldens):
    return {k: torch.from_numpy(v) for k, v in np.load(goldens / "unclip" / "g8_decoder_conditioning.npz").items()}


@torch.no_grad()
@pytest.mark.parametrize("with_text", [True, False])
def test_conditioning_is_the_recorded_one(recorded, with_text):
    """Of `UnCLIPTextProjModel`, whose text adds a summand to the time embedding, and more tokens."""
    projection = UnCLIPImageProjection(
        clip_embeddings_dim=6, time_embed_dim=10, cross_attention_dim=7, with_text=with_text
    )
    weights = {name[2:]: value for name, value in recorded.items() if name.startswith("w/")}
    own = projection.state_dict().keys() - {"clip_mean", "clip_std"}
    assert len(own) == (11 if with_text else 5)
    projection.load_state_dict({name: weights[name] for name in own}, strict=False)
    text_weights = (weights[f"embedding_proj.{name}"] for name in ("weight", "bias"))
    text = torch.nn.functional.linear(recorded["prompt_embeds"], *text_weights)
    for cfg in ("", "_cfg"):  # the recorded ones have no image first
        count = 2 if cfg else 1
        embeds = recorded["image_embeddings"].repeat(count, 1)
        drop_mask = torch.arange(len(embeds)) < len(embeds) - 2
        tokens, time_embeds = recorded[f"encoder_hidden_states{cfg}"], recorded[f"class_labels{cfg}"]
        texts = {}
        if with_text:
            texts["text_embeds"] = recorded["prompt_embeds"].repeat(count, 1)
            texts["hidden_states"] = recorded["text_hidden"].repeat(count, 1, 1)
        else:
            tokens, time_embeds = tokens[:, :4], time_embeds - text.repeat(count, 1)
        found = projection(embeds, drop_mask, **texts)
        torch.testing.assert_close(found[0], tokens, rtol=0, atol=2e-6)
        torch.testing.assert_close(found[1], time_embeds, rtol=0, atol=2e-6)


def test_statistics_and_the_embedding_of_no_image():
    projection = make_projection()
    embeds = torch.randn(3, DIM)
    plain = make_projection()
    plain.clip_mean.zero_(), plain.clip_std.fill_(1)
    standardized = (embeds - projection.clip_mean) / projection.clip_std
    for ours, theirs in zip(projection(embeds), plain(standardized), strict=True):
        torch.testing.assert_close(ours, theirs)
    null = projection.learned_classifier_free_guidance_embeddings.expand(3, -1)
    for ours, theirs in zip(projection(embeds, torch.ones(3, dtype=torch.bool)), plain(null), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("embeds", "mask", "message"),
    [
        (torch.zeros(2, 5), None, r"`image_embeds` has shape \(2, 5\), but must be \(batch, 8\)"),
        (torch.zeros(8), None, r"`image_embeds` has shape \(8,\)"),
        (torch.zeros(2, 8), torch.zeros(3, dtype=torch.bool), r"`drop_mask` has shape \(3,\), but must be \(2,\)"),
    ],
)
def test_projection_refuses(embeds, mask, message):
    with pytest.raises(ValueError, match=message):
        make_projection()(embeds, mask)


# -- levels


SCHEDULES = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_steps_are_those_of_diffusers(schedule, clip, prediction_type):
    """Where diffusers knows where it goes: trailing timesteps that divide the schedule; eta 1 is DDPM."""
    options = {**SCHEDULES[schedule], "clip_sample": clip, "prediction_type": prediction_type}
    ours = UnCLIPDecoderScheduler(**options)
    ours.set_timesteps(50)
    ddim = DDIMScheduler(**options, timestep_spacing="trailing")
    ddpm = DDPMScheduler(**options, timestep_spacing="trailing", variance_type="fixed_small")
    for stock in (ddim, ddpm):
        stock.set_timesteps(50)
        assert stock.timesteps.tolist() == ours.timesteps.tolist()
    sample, output, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for t, (timestep, after) in zip(ours.timesteps, ours.trajectory, strict=True):
        if not clip and t > 900:
            continue  # float32 levels of diffusers, divided by almost 0
        for eta in (0.0, 0.5, 1.0):
            expected = ddim.step(
                output, t, sample, eta, use_clipped_model_output=True, variance_noise=noise if eta else None
            )
            step = ours.step(output, timestep, sample, eta=eta, variance_noise=noise)
            torch.testing.assert_close(step.prev_sample, expected.prev_sample, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(step.pred_original_sample, expected.pred_original_sample, rtol=1e-3, atol=1e-4)
        if after >= 0:
            seeds = [torch.Generator().manual_seed(9) for _ in range(2)]
            expected = ddpm.step(output, t, sample, generator=seeds[0]).prev_sample
            noise_of_ddpm = torch.randn(sample.shape, generator=seeds[1], dtype=sample.dtype)
            step = ours.step(output, timestep, sample, eta=1.0, variance_noise=noise_of_ddpm)
            torch.testing.assert_close(step.prev_sample, expected, rtol=1e-3, atol=1e-4)


def gaussian_noise(scheduler, sample, timestep, std):
    """What a perfect network predicts where images are N(0, std^2)."""
    level = scheduler.alphas_cumprod[max(timestep, 0)].item()
    return (1 - level) ** 0.5 / (level * std**2 + 1 - level) * sample


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_directions_on_a_gaussian(schedule):
    """The flow keeps x_t / sqrt(abar_t std^2 + 1 - abar_t); the error of N steps falls like 1 / N or faster."""
    scheduler, std = UnCLIPDecoderScheduler(**SCHEDULES[schedule], clip_sample=False), 0.5
    image = std * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    level = scheduler.alphas_cumprod[-1].item()
    noise = image / std * (level * std**2 + 1 - level) ** 0.5
    errors = {}
    for steps in (50, 100, 200):
        results = []
        for direction, start in (("encode", image), ("decode", noise)):
            scheduler.set_timesteps(steps, direction=direction)
            sample = start
            for timestep, _ in scheduler.trajectory:
                sample = scheduler.step(gaussian_noise(scheduler, sample, timestep, std), timestep, sample).prev_sample
            results.append(sample)
        errors[steps] = [(results[0] - noise).abs().max().item(), (results[1] - image).abs().max().item()]
    for way in range(2):
        assert errors[200][way] < 0.55 * errors[100][way] < 0.55**2 * errors[50][way]
        assert errors[200][way] < 0.05


def test_ancestral_steps_keep_the_variance():
    scheduler, std = UnCLIPDecoderScheduler(clip_sample=False), 0.5
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=generator)
    scheduler.set_timesteps(250)
    for timestep, _ in scheduler.trajectory:
        output = gaussian_noise(scheduler, sample, timestep, std)
        sample = scheduler.step(output, timestep, sample, eta=1.0, generator=generator).prev_sample
    assert sample.std().item() == pytest.approx(std, rel=0.02)  # sampling error 0.4 %, and that of 250 steps


def test_trajectories():
    scheduler = UnCLIPDecoderScheduler(10)
    scheduler.set_timesteps(4)
    assert scheduler.trajectory == [(9, 7), (7, 4), (4, 2), (2, -1)] and scheduler.timesteps.tolist() == [9, 7, 4, 2]
    scheduler.set_timesteps(4, direction="encode")
    assert scheduler.trajectory == [(-1, 2), (2, 4), (4, 7), (7, 9)] and scheduler.timesteps.tolist() == [0, 2, 4, 7]
    scheduler.set_timesteps(10)
    assert scheduler.trajectory == [(t, t - 1) for t in range(9, -1, -1)]
    level = scheduler.alphas_cumprod[[3, 9]].reshape(2, 1, 1, 1)
    images, noise = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    expected = level.sqrt() * images + (1 - level).sqrt() * noise
    torch.testing.assert_close(scheduler.add_noise(images, noise, torch.tensor([3, 9])), expected)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: UnCLIPDecoderScheduler(prediction_type="sample"), "`prediction_type` is 'sample', but must be"),
        (lambda: UnCLIPDecoderScheduler(thresholding=True), "`thresholding=True` is not supported"),
        (lambda: UnCLIPDecoderScheduler(beta_schedule="cosine"), "`beta_schedule` is 'cosine'"),
        (lambda: UnCLIPDecoderScheduler(trained_betas=[0.1, 1.0]), r"2 betas in \[0.1, 1\]"),
        (lambda: UnCLIPDecoderScheduler().set_timesteps(0), "`num_inference_steps` is 0, but must be"),
        (lambda: UnCLIPDecoderScheduler().set_timesteps(1001), "from 1 to 1000"),
        (lambda: UnCLIPDecoderScheduler().set_timesteps(2, direction="up"), "`direction` is 'up'"),
    ],
)
def test_scheduler_refuses(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_steps_that_do_not_exist():
    scheduler, sample = UnCLIPDecoderScheduler(), torch.zeros(1, 3, 2, 2)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"`timestep` is 5, but the trajectory has \[999, 749, 499, 249\]"):
        scheduler.step(sample, 5, sample)
    scheduler.set_timesteps(4, direction="encode")
    with pytest.raises(ValueError, match="`eta` is 0.5, but must be 0 on the way from 249 to 499"):
        scheduler.step(sample, 249, sample, eta=0.5)


def test_stock_schedulers_keep_their_noise():
    """Also where diffusers marks the schedule as its default, which is another one here."""
    for stock in (DDPMScheduler(), DDIMScheduler(beta_schedule="scaled_linear"), DDPMScheduler(**SCHEDULES["cosine"])):
        converted = make(decoder_scheduler=stock).decoder_scheduler
        torch.testing.assert_close(converted.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
        assert converted.config.beta_schedule == stock.config.beta_schedule
    with pytest.raises(ValueError, match="whose noise levels are not those of a DDPM"):
        make(decoder_scheduler=EDMEulerScheduler())
    with pytest.raises(ValueError, match="whose noise levels are not those of a DDPM"):
        make(decoder_scheduler=DDIMScheduler(rescale_betas_zero_snr=True))


# -- what a call computes, by a program of its own


def predict(pipe, sample, timestep, image_embeds, guidance_scale=1.0):
    """The noise, with two passes of the networks for guidance."""
    outputs = []
    for drop in (False, True):
        drop_mask = torch.full((len(sample),), drop)
        tokens, time_embeds = pipe.decoder_projection(image_embeds, drop_mask)
        model_output = pipe.decoder(sample, timestep, encoder_hidden_states=tokens, class_labels=time_embeds)
        outputs.append(model_output.sample)
    return guidance_scale * outputs[0] + (1 - guidance_scale) * outputs[1]


@torch.no_grad()
def decode(pipe, sample, image_embeds, steps, guidance_scale=1.0, eta=0.0, generator=None):
    abar = torch.cat([pipe.decoder_scheduler.alphas_cumprod, torch.ones(1)])
    levels = torch.linspace(0, 1000, steps + 1).round().long().flip(0) - 1
    for t, s in itertools.pairwise(levels):
        eps = predict(pipe, sample, t, image_embeds, guidance_scale)
        x_0 = ((sample - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        eps = (sample - abar[t].sqrt() * x_0) / (1 - abar[t]).sqrt()
        sigma = eta * ((1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])).sqrt()
        sample = abar[s].sqrt() * x_0 + (1 - abar[s] - sigma**2).sqrt() * eps
        if sigma > 0:
            sample = sample + sigma * torch.randn(sample.shape, generator=generator, dtype=sample.dtype)
    return sample


@torch.no_grad()
def encode(pipe, sample, image_embeds, steps):
    abar = torch.cat([pipe.decoder_scheduler.alphas_cumprod, torch.ones(1)])
    levels = torch.linspace(0, 1000, steps + 1).round().long() - 1
    for t, s in itertools.pairwise(levels):
        eps, x_0 = predict(pipe, sample, t.clamp(min=0), image_embeds), sample
        if t >= 0:
            x_0 = ((sample - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
            eps = (sample - abar[t].sqrt() * x_0) / (1 - abar[t]).sqrt()
        sample = abar[s].sqrt() * x_0 + (1 - abar[s]).sqrt() * eps
    return sample


CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)


@torch.no_grad()
def embed(pipe, images):
    small = torch.nn.functional.interpolate(images, (12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    return pipe.image_encoder(((small - CLIP_MEAN) / CLIP_STD).to(pipe.decoder.dtype)).image_embeds


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.fixture
def exact(pipe):
    """In double precision, so that the last bits are no matter."""
    return pipe.to(torch.float64)


@torch.no_grad()
def test_text_to_image(exact):
    z_T = torch.randn(2 * 3, DIM, dtype=torch.float64)
    x_T = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    output = exact(
        PROMPTS[:2], negative_prompt="green", prior_guidance_scale=3.0, guidance_scale=1.5, num_candidates=3,
        prior_latents=z_T, latents=x_T, num_inference_steps=4, prior_num_inference_steps=5, output_type="latent",
    )  # fmt: skip

    encoded = {}
    for text in (*PROMPTS[:2], "green"):
        tokens = exact.tokenizer(text, padding="max_length", return_tensors="pt")
        outputs = exact.text_encoder(tokens.input_ids)
        encoded[text] = (outputs.text_embeds, outputs.last_hidden_state, tokens.attention_mask.bool())
    for row, prompt in enumerate(PROMPTS[:2]):
        candidates = []
        for start in z_T[3 * row : 3 * row + 3].split(1):
            scheduler, sample = prior_scheduler(), start
            scheduler.set_timesteps(5)
            for t in scheduler.timesteps:
                both = [
                    exact.prior(sample, t, z_t, hidden, mask).predicted_image_embedding
                    for z_t, hidden, mask in (encoded[prompt], encoded["green"])
                ]
                sample = scheduler.step(3.0 * both[0] - 2.0 * both[1], t, sample).prev_sample
            candidates.append(sample * exact.prior.clip_std + exact.prior.clip_mean)
        scores = [torch.cosine_similarity(z, encoded[prompt][0]).item() for z in candidates]
        assert max(scores) - sorted(scores)[-2] > 1e-8  # in float64
        close(output.image_embeds[row : row + 1], candidates[scores.index(max(scores))])
    close(output.images, decode(exact, x_T, output.image_embeds, 4, 1.5))
    assert torch.equal(output.noise, x_T)


@torch.no_grad()
def test_what_is_chosen(exact):
    """The dot product prefers long embeddings; without a choice it is the first."""
    torch.manual_seed(24)
    z_T, options = torch.randn(5, DIM, dtype=torch.float64), {**SHORT, "output_type": "latent"}
    singly = torch.cat(
        [exact("a cat", num_candidates=1, prior_latents=one, **options).image_embeds for one in z_T.split(1)]
    )
    z_t = exact.encode_prompt("a cat")[0]
    best = {"dot": (singly @ z_t.T).argmax(), "cosine": torch.cosine_similarity(singly, z_t).argmax(), None: 0}
    assert len({int(row) for row in best.values()}) == 3, "the case tells nothing: take another seed"
    for rerank, row in best.items():
        chosen = exact("a cat", num_candidates=5, prior_latents=z_T, rerank=rerank, **options).image_embeds
        close(chosen[0], singly[row])


@torch.no_grad()
def test_inversion_and_reconstruction(exact):
    images = IMAGES[:2].double()
    z, x_0 = embed(exact, images), 2 * images - 1
    close(exact.encode_image(images), z)
    x_T = exact.invert(images, num_inference_steps=5)
    close(x_T, encode(exact, x_0, z, 5))
    close(exact.invert(images, 5, image_embeds=z.flip(0)), encode(exact, x_0, z.flip(0), 5))
    again = exact(image_embeds=z, latents=x_T, num_inference_steps=5, guidance_scale=1.0, output_type="latent")
    close(again.images, decode(exact, x_T, z, 5))
    close(exact.variations(images, eta=0.0, num_inference_steps=5, output_type="latent").images, again.images)


@torch.no_grad()
def test_reconstruction_of_a_smooth_network(exact):
    """The more steps, the more exact: with noise that changes slowly, as that of a trained network."""
    exact.decoder.conv_out.weight.mul_(0.05)
    scheduler = UnCLIPDecoderScheduler(beta_schedule="linear", clip_sample=False)
    pipe = UnCLIPTextToImagePipeline.from_pipe(exact, decoder_scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = IMAGES[:2].double()
    errors = []
    for steps in (20, 40, 80):
        again = pipe.variations(images, eta=0.0, num_inference_steps=steps, output_type="latent").images
        errors.append((again / 2 + 0.5 - images).abs().mean().item())
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] and errors[2] < 0.02


@torch.no_grad()
@pytest.mark.parametrize("noise", ["inverted", "white"])
def test_variations(exact, noise):
    images = IMAGES[:2].double()
    z = embed(exact, images).repeat_interleave(2, dim=0)
    options = {"noise": noise, "num_images_per_prompt": 2, "num_inference_steps": 3, "num_inversion_steps": 4}
    output = exact.variations(
        images, **options, eta=0.7, guidance_scale=2.0, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    if noise == "white":
        x_T = torch.randn(4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    else:
        x_T = encode(exact, 2 * images - 1, z[::2], 4).repeat_interleave(2, dim=0)
    close(output.noise, x_T), close(output.image_embeds, z)
    close(output.images, decode(exact, x_T, z, 3, 2.0, 0.7, generator))
    # those of one image do not depend on the others
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    alone = exact.variations(images[1:], **options, generator=seeds[2:], output_type="latent").images
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    close(exact.variations(images, **options, generator=seeds, output_type="latent").images[2:], alone)


def turn(a, b, share):
    """The unit vector of a turned by a share of the angle towards b, in their plane (Gram-Schmidt)."""
    a, b = a / a.norm(), b / b.norm()
    angle = torch.arccos((a * b).sum())
    across = b - (a * b).sum() * a
    return torch.cos(share * angle) * a + torch.sin(share * angle) * across / across.norm()


@torch.no_grad()
@pytest.mark.parametrize("noise", ["slerp", "fixed"])
def test_interpolation(exact, noise):
    a, b = IMAGES[:2].double().split(1)
    z = embed(exact, torch.cat([a, b]))
    output = exact.interpolate(
        a, b, num=4, noise=noise, num_inference_steps=3, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )  # fmt: skip
    shares = [0, 1 / 3, 2 / 3, 1]
    lengths = z.norm(dim=1)
    path = torch.stack([turn(*z, w) * ((1 - w) * lengths[0] + w * lengths[1]) for w in shares])
    close(output.image_embeds, path)
    if noise == "fixed":
        x_T = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x_T = x_T.expand(4, -1, -1, -1)
    else:
        ends = encode(exact, 2 * torch.cat([a, b]) - 1, z, 3)
        cosine = (ends[0] * ends[1]).sum() / ends[0].norm() / ends[1].norm()
        angle = torch.arccos(cosine)
        x_T = torch.stack(
            [(torch.sin((1 - w) * angle) * ends[0] + torch.sin(w * angle) * ends[1]) / angle.sin() for w in shares]
        )
        reconstructed = exact.variations(torch.cat([a, b]), eta=0.0, num_inference_steps=3, output_type="latent")
        close(output.images[[0, -1]], reconstructed.images)
    close(output.noise, x_T)
    close(output.images, decode(exact, x_T, path, 3))


@torch.no_grad()
@pytest.mark.parametrize("source", ["a photo", None])
def test_text_differences(exact, source):
    image = IMAGES[:1].double()
    z = embed(exact, image)[0]
    output = exact.text_diff(
        image, "a cat", source_prompt=source, theta_max=0.4, num=3, num_inference_steps=3, output_type="latent"
    )
    texts = exact.encode_prompt(["a cat", "a photo"])[0]
    direction = texts[0] - texts[1] if source else texts[0]
    path = torch.stack([z.norm() * turn(z, direction, share) for share in (0, 0.2, 0.4)])
    close(output.image_embeds, path)
    x_T = encode(exact, 2 * image - 1, z[None], 3).expand(3, -1, -1, -1)
    close(output.noise, x_T)
    close(output.images, decode(exact, x_T, path, 3))


def test_manipulations_are_the_recorded_ones(goldens):
    recorded = {k: torch.from_numpy(v) for k, v in np.load(goldens / "unclip" / "g7_manipulations.npz").items()}
    path = slerp(recorded["z1"], recorded["z2"], recorded["theta"])
    torch.testing.assert_close(path, recorded["slerp"], rtol=0, atol=1e-12)
    units = [recorded[name] / recorded[name].norm(dim=1, keepdim=True) for name in ("z1", "z2")]
    torch.testing.assert_close(slerp(*units, recorded["theta"]), recorded["slerp_unit"], rtol=0, atol=1e-12)
    for row in range(2):  # what the independent program of `text_diff` and `interpolate` stands on
        for place, theta in enumerate(recorded["theta_textdiff"]):
            turned = turn(recorded["z1"][row], (recorded["z_text"] - recorded["z_text0"])[row], theta)
            torch.testing.assert_close(turned, recorded["text_diff_unit"][place, row], rtol=0, atol=1e-12)


# -- decoders of Kandinsky 2.2, Karlo and Stable unCLIP


class OnlyMeans(DDIMScheduler):
    """DDIM for stock pipelines that hand a learned variance, or the next timestep, to their scheduler."""

    def step(self, model_output, timestep, sample, prev_timestep=None, generator=None, return_dict=True, **kwargs):
        model_output = model_output[:, : sample.shape[1]]
        return super().step(model_output, timestep, sample, use_clipped_model_output=True, return_dict=return_dict)


def ddim(pipe):
    """As the pipeline's own scheduler, where diffusers knows where it goes, and as exact."""
    levels = dict(pipe.decoder_scheduler.config) | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = OnlyMeans.from_config({name: value for name, value in levels.items() if not name.startswith("_")})
    scheduler.alphas_cumprod = pipe.decoder_scheduler.alphas_cumprod.clone()
    return scheduler


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", DECODERS)
def test_stock_pipelines_paint_the_same(name, guidance_scale):
    stock = DECODERS[name]()
    pipe = UnCLIPTextToImagePipeline.from_decoder(stock, make_prior_pipe())
    for one in (pipe, stock):
        one.to(torch.float64).set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "generator": seeds[0], "output_type": "np"}
    theirs = {"latents": None, "generator": seeds[1], "output_type": "np"}
    x_T = torch.randn(2, *pipe._latents_shape, dtype=torch.float64)
    if name == "karlo":  # reads an empty text
        z = torch.randn(2, DIM, dtype=torch.float64)
        output = pipe(image_embeds=z, latents=x_T, **ours)
        stock.register_modules(decoder_scheduler=ddim(pipe))
        theirs = {"decoder_latents": x_T, "image_embeddings": z, "decoder_num_inference_steps": 5} | theirs
        del theirs["latents"]
        images = stock(**theirs, decoder_guidance_scale=guidance_scale).images
    else:
        texts = {"negative_prompt": ["green", "a dog"]} if name == "stable_unclip" else {}
        output = pipe(["a cat", "blue"], latents=x_T, prior_num_inference_steps=3, num_candidates=1, **texts, **ours)
        stock.register_modules(scheduler=ddim(pipe))
        theirs |= {"latents": x_T, "image_embeds": output.image_embeds, "num_inference_steps": 5}
        if name == "kandinsky":
            zeros = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
            theirs |= {"negative_image_embeds": pipe.image_encoder(zeros).image_embeds, "height": SIDE, "width": SIDE}
        else:
            stock.image_noising_scheduler.alphas_cumprod[0] = 1  # level 0 is no noise
            theirs |= {"prompt": ["a cat", "blue"]} | texts
        images = stock(**theirs, guidance_scale=guidance_scale).images
    assert images.std() > 0.02 and output.images.shape == (2, SIDE, SIDE, 3)
    np.testing.assert_allclose(output.images, images, rtol=0, atol=1e-5)
    other = pipe(image_embeds=torch.randn(2, DIM), latents=x_T, **ours | {"generator": seeds[1].manual_seed(0)}).images
    assert np.abs(other - output.images).max() > 0.02, "the embedding says nothing: the case is blind"


@torch.no_grad()
def test_all_of_karlo_in_one_call():
    """Its prior by its scheduler, its decoder, which reads the prompt, and its enlargement."""
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    stock = make_whole_karlo(prior_scheduler=scheduler)
    pipe = UnCLIPTextToImagePipeline.from_decoder(stock)
    stock.register_modules(decoder_scheduler=ddim(pipe))
    for one in (pipe, stock):
        one.to(torch.float64).set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    z_T, x_T = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((DIM,), (3, 8, 8)))
    ours = pipe(
        "a cat", prior_guidance_scale=4.0, guidance_scale=8.0, num_candidates=1, prior_num_inference_steps=5,
        num_inference_steps=5, prior_latents=z_T, latents=x_T, generator=seeds[0], output_type="np",
    ).images  # fmt: skip
    theirs = stock(
        "a cat", prior_guidance_scale=4.0, decoder_guidance_scale=8.0, prior_num_inference_steps=5,
        decoder_num_inference_steps=5, prior_latents=z_T, decoder_latents=x_T, generator=seeds[1], output_type="np",
    ).images  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.05


def test_a_text_encoder_of_prior_and_decoder_is_kept_once(tmp_path):
    stock = make_whole_karlo()
    pipe = UnCLIPTextToImagePipeline.from_decoder(stock, image_encoder=make_image_encoder())
    pipe.save_pretrained(tmp_path)
    assert pipe.text_encoder is stock.text_encoder and pipe.decoder_text_encoder is None
    weights = pipe.decoder_projection.state_dict()
    assert all(weights[name].data_ptr() == value.data_ptr() for name, value in stock.text_proj.state_dict().items())
    assert (tmp_path / "text_encoder").exists() and not (tmp_path / "decoder_text_encoder").exists()
    # with another prior the decoder reads with its own, and with the same weights paints the same
    other = UnCLIPTextToImagePipeline.from_decoder(pipe, make_prior_pipe())
    assert other.text_encoder is not stock.text_encoder and other.decoder_text_encoder is stock.text_encoder
    images = []
    for one in (pipe, UnCLIPTextToImagePipeline.from_pretrained(tmp_path), other):
        one.to(torch.float64).set_progress_bar_config(disable=True)
        images.append(one("a cat", **SHORT, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    close(images[0], images[1]), close(images[0], images[2])


def test_all_of_kandinsky_in_one_call():
    prior, decoder = make_prior_pipe(), make_kandinsky()
    stock = KandinskyV22CombinedPipeline(
        **decoder.components, prior_prior=prior.prior, prior_image_encoder=prior.image_encoder,
        prior_text_encoder=prior.text_encoder, prior_tokenizer=prior.tokenizer, prior_scheduler=prior.scheduler,
        prior_image_processor=CLIPImageProcessor(),
    )  # fmt: skip
    pipe = UnCLIPTextToImagePipeline.from_decoder(stock)
    assert pipe.image_processor is stock.prior_image_processor and pipe.image_encoder is prior.image_encoder
    images = []
    for one in (pipe, UnCLIPTextToImagePipeline.from_decoder(decoder, prior)):
        one.set_progress_bar_config(disable=True)
        images.append(one("a cat", **SHORT, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert torch.equal(*images)


def test_negative_prompts(caplog):
    """Decoders that read go away from them too; where nobody reads them, this is said."""
    diffusers_logging.enable_propagation()
    pipe = make_over("stable_unclip")
    options = {**SHORT, "guidance_scale": 3.0, "output_type": "pt"}

    def paint(pipe, prompt=("a cat", "blue"), **changes):
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompt))]
        return pipe(list(prompt), generator=generators, **(options | changes)).images

    plain, both = paint(pipe), paint(pipe, negative_prompt=["", "green"])
    assert torch.equal(paint(pipe, negative_prompt=None), plain)
    torch.testing.assert_close(both[0], plain[0], rtol=0, atol=1e-5)
    assert (both[1] - plain[1]).abs().max() > 1e-3 and "no effect" not in caplog.text
    paint(pipe, negative_prompt="green", guidance_scale=1.0)
    assert "`negative_prompt` has no effect with `prior_guidance_scale=1`" in caplog.text
    caplog.clear()
    paint(make(), negative_prompt="green")
    assert "`negative_prompt` has no effect" in caplog.text


def test_all_of_stable_unclip_in_one_call():
    image = make_stable_unclip()
    names = ("tokenizer", "text_encoder", "unet", "scheduler", "vae", "image_normalizer", "image_noising_scheduler")
    prior = make_prior_pipe()
    stock = StableUnCLIPPipeline(
        prior_tokenizer=prior.tokenizer, prior_text_encoder=prior.text_encoder, prior=prior.prior,
        prior_scheduler=prior.scheduler, **{name: getattr(image, name) for name in names},
    )  # fmt: skip
    pipe = UnCLIPTextToImagePipeline.from_decoder(stock)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder is prior.text_encoder and pipe.decoder_text_encoder is image.text_encoder
    same = UnCLIPTextToImagePipeline.from_decoder(pipe)
    same.set_progress_bar_config(disable=True)
    images = [
        one("a cat", **SHORT, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for one in (pipe, same, make_over("stable_unclip"))
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_edits_of_pictures_over_stock_decoders(name):
    """Inversion in the decoder's own space, and from there all ways lead back to the picture."""
    scheduler = UnCLIPDecoderScheduler(beta_schedule="linear", clip_sample=False)
    pipe = make_over(name, **({"decoder_scheduler": scheduler} if name == "karlo" else {})).to(torch.float64)
    for weight in pipe.decoder.conv_out.parameters():  # changes slowly, as a trained one
        weight.mul_(0.005)
    pictures = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    side = 8 if name == "karlo" else SIDE
    small = torch.nn.functional.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    if name == "kandinsky":
        x_0 = pipe.vae.encode(2 * small - 1).latents
    elif name == "karlo":
        x_0 = 2 * small - 1
    else:
        x_0 = 0.5 * pipe.vae.encode(2 * small - 1).latent_dist.mean
    errors = []
    for steps in (10, 20):
        options = {"num_inference_steps": steps, "output_type": "latent"}
        again = pipe.variations(pictures, eta=0.0, **options)
        errors.append((again.images - x_0).abs().mean() / x_0.abs().mean())
    assert errors[1] < 0.65 * errors[0] and errors[1] < 0.4
    z = pipe.encode_image(pictures)
    close(again.images, pipe(image_embeds=z, latents=pipe.invert(pictures, 20), guidance_scale=1.0, **options).images)
    path = pipe.interpolate(*pictures.split(1), num=3, **options)
    close(path.images[[0, 2]], again.images)
    edits = pipe.text_diff(pictures[:1], "a cat", num=2, theta_max=0.5, **options)
    close(edits.images[0], again.images[0])
    close(edits.image_embeds[0], z[0])
    # and as pictures
    options = {"num_inference_steps": 2, "output_type": "pt"}
    fixed = pipe.interpolate(*pictures.split(1), num=3, noise="fixed", **options)
    white = pipe.variations(pictures, noise="white", num_images_per_prompt=2, guidance_scale=2.0, **options)
    assert fixed.images.shape == (3, 3, SIDE, SIDE) and white.images.shape == (4, 3, SIDE, SIDE)
    edits = pipe.text_diff(pictures[:1], "a cat", num=2, guidance_scale=2.0, **options)
    assert edits.images.shape == (2, 3, SIDE, SIDE) and edits.images.isfinite().all()


def make_any(name):
    if name != "whole_karlo":
        return make() if name == "own" else make_over(name)
    pipe = UnCLIPTextToImagePipeline.from_decoder(make_whole_karlo(), image_encoder=make_image_encoder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["own", *DECODERS])
def test_networks_run_in_the_order_of_offloading(name):
    """Each is sent away when the next one comes: one that is out of order stays beside the decoder."""
    pipe, order = make_any(name), []
    sequence = pipe.model_cpu_offload_seq.split("->")
    for part in sequence:
        if getattr(pipe, part) is not None:
            getattr(pipe, part).register_forward_pre_hook(lambda *_, part=part: order.append(part))
    for call in (
        lambda: pipe("a cat", **SHORT, prior_guidance_scale=2.0),
        lambda: pipe.invert(ONE, num_inference_steps=2),
    ):
        order.clear()
        call()
        places = [sequence.index(part) for part in order]
        assert places == sorted(places) and "decoder" in order


@pytest.mark.parametrize("name", ["own", *DECODERS, "whole_karlo"])
def test_weights_that_are_elsewhere(name):
    """As with sequential offload: weights come when a network is called, and only then."""
    pipe = make_any(name)
    calls = (
        lambda: pipe("a cat", **SHORT, generator=torch.Generator().manual_seed(0), output_type="pt"),
        lambda: pipe.variations(ONE, num_inference_steps=2, eta=0.0, output_type="latent"),
    )
    expected = [call().images for call in calls]
    for part, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and part not in pipe._exclude_from_cpu_offload:
            assert part in pipe.model_cpu_offload_seq.split("->")
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for call, images in zip(calls, expected, strict=True):
        torch.testing.assert_close(call().images, images, rtol=0, atol=1e-5)


def test_what_stock_schedulers_say_of_clipping(caplog):
    diffusers_logging.enable_propagation()
    config = make_over("kandinsky").decoder_scheduler.config
    assert "`decoder_scheduler` has `thresholding=True`" in caplog.text
    assert (config.clip_sample, config.beta_schedule, config.beta_end) == (False, "linear", 0.012)
    config = make_over("stable_unclip").decoder_scheduler.config  # PNDM, which knows no clip
    assert (config.clip_sample, config.prediction_type) == (False, "v_prediction")
    assert make_over("karlo").decoder_scheduler.config.clip_sample is True
    assert make(decoder_scheduler=PNDMScheduler()).decoder_scheduler.config.clip_sample is True


def test_decoders_that_do_not_fit(caplog):
    kandinsky, karlo, stable = (make_over(name).components for name in DECODERS)
    rgb = UNet2DModel(
        sample_size=SIDE, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    for components, changes, message in (
        (karlo, {"super_res_last": None}, "is conditioned as that of 'karlo' is, which goes with .*super_res_last"),
        (kandinsky, {"vae": None}, r"'kandinsky22' is, which goes with \['vae'\], but what was given is \[\]"),
        (kandinsky, {"embed_norm": "l2"}, "`embed_norm` is 'l2', but the decoder"),
        (kandinsky, {"vae": make_stable_unclip().vae}, "`vae` is a AutoencoderKL, but .* needs a `VQModel`"),
        (stable, {"vae": make_kandinsky().movq}, "`vae` is a VQModel, but .* needs an `AutoencoderKL`"),
        (stable, {"decoder_tokenizer": CLIPTokenizer(model_max_length=16)}, "`decoder_tokenizer` has . tokens"),
        (stable, {"decoder_tokenizer": make_tokenizer(model_max_length=99)}, "`decoder_tokenizer` cuts at 99 tokens"),
        (karlo, {"super_res_scheduler": DDPMScheduler()}, "`super_res_scheduler` is a DDPMScheduler, but Karlo's"),
        (karlo, {"super_res_last": rgb}, "`super_res_last` has 3 input and 3 output channels"),
        (karlo, {"decoder_text_encoder": None}, "'karlo' is, which goes with"),
        (
            karlo | dict.fromkeys(("prior", "prior_scheduler", "decoder_text_encoder", "decoder_tokenizer")),
            {"text_encoder": make_text_encoder(hidden_size=12)},
            "`text_encoder` gives hidden states of width 12",
        ),
        (karlo, {"decoder_text_encoder": make_text_encoder(hidden_size=12)}, "width 12, but the decoder takes 8"),
        (karlo, {"decoder_text_encoder": make_text_encoder(eos_token_id=5)}, "`decoder_text_encoder` looks for the f"),
        (kandinsky, {"decoder": make_kandinsky(out_channels=5).unet}, "and 5 output .* needs 4 and 4 or 8"),
        (kandinsky, {"image_encoder": make_image_encoder(projection_dim=6)}, "sizes {'decoder': 8"),
    ):
        with pytest.raises(ValueError, match=message):
            UnCLIPTextToImagePipeline(**components | changes)
    with pytest.raises(TypeError, match="`decoder` is a UnCLIPPriorPipeline, but must be a pipeline with a decoder"):
        UnCLIPTextToImagePipeline.from_decoder(make_prior_pipe())
    with pytest.raises(ValueError, match="of `embed_norm`='standardize', but `decoder` was trained on those of 'l2'"):
        UnCLIPTextToImagePipeline.from_decoder(make(embed_norm="l2"), make_prior_pipe())
    diffusers_logging.enable_propagation()
    own = UnCLIPTextToImagePipeline.from_decoder(make(clip_model_id="me/clip"), other := make_prior_pipe())
    assert "trained with the CLIP" not in caplog.text
    UnCLIPTextToImagePipeline.from_decoder(make(clip_model_id="me/clip"), make_prior_pipe(clip_model_id="you/clip"))
    assert "`decoder` was trained with the CLIP 'me/clip', `prior` with 'you/clip'" in caplog.text
    assert own.prior is other.prior and own.config.clip_model_id == "me/clip"
    blind = UnCLIPTextToImagePipeline(**kandinsky | {"image_encoder": None})
    with pytest.raises(ValueError, match="without `image_encoder` there is no embedding of no image"):
        blind("a cat", guidance_scale=2.0)


# -- a published repo is the whole of unCLIP


LOAD = """
import sys
if sys.argv[1] == "without":
    sys.modules["diffusers_ext"] = None
    options = {"trust_remote_code": True}
else:
    import diffusers_ext
    options = {}
import torch
from diffusers import DiffusionPipeline
sys.path.insert(0, sys.argv[2])
from paint import paint
torch.set_num_threads(1)
images = {}
for repo in sys.argv[4:]:
    pipe = DiffusionPipeline.from_pretrained(repo, **options)
    assert type(pipe).__module__.startswith("diffusers_modules" if options else "diffusers_ext"), type(pipe)
    assert options or not any(name.startswith("diffusers_modules") for name in sys.modules)
    images[repo] = paint(pipe)
torch.save(images, sys.argv[3])
"""
PAINT = """
import torch
def paint(pipe):
    pipe.to(torch.float64).set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
    picture = torch.linspace(0, 1, 3 * 20 * 20).reshape(1, 3, 20, 20)
    edited = pipe.text_diff(picture, "a cat", num=2, **options)
    return [pipe("a cat", prior_num_inference_steps=3, **options).images, edited.images]
"""


def wide():
    """With the prior for a CLIP whose hidden states have another width."""
    torch.manual_seed(11)
    prior = UnCLIPPriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, embedding_dim=DIM, num_embeddings=LENGTH,
        encoder_hid_dim=12,
    )  # fmt: skip
    prior.clip_std.data.fill_(1)
    return make(prior=prior, text_encoder=make_text_encoder(hidden_size=12))


def load_elsewhere(pipes, package, folder):
    """Saves the pipelines and has another process load them, from their folders and from a Hub."""
    (folder / "paint.py").write_text(PAINT)
    names, expected = {}, {}
    exec(PAINT, names)
    with HubServer() as hub:
        for name, pipe in pipes.items():
            pipe.save_pretrained(folder / name, card={})
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            hub.put(f"alice/{name}", {str(p.relative_to(folder / name)): p.read_bytes() for p in files})
            expected |= dict.fromkeys((f"alice/{name}", f"./{name}"), names["paint"](pipe))
        env = hub.env(folder / "home", token=None)
        if package == "with":
            env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, package, folder, "images.pt", *expected],
            env=env, cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "images.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for repo, images in expected.items():
        for ours, theirs in zip(found[repo], images, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("package", ["with", "without"])
def test_whole_repos_load(package, tmp_path):
    pipes = {name: make_over(name) for name in DECODERS} | {"own": make()}
    load_elsewhere(pipes | ({"wide": wide()} if package == "without" else {}), package, tmp_path)


def test_whole_repo_with_a_prior_of_another_file(tmp_path):
    load_elsewhere({"wide": wide()}, "with", tmp_path)


# -- images of other sizes, texts, other parts


@torch.no_grad()
def test_images_of_any_size_and_form(exact):
    array = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).double() / 255
    z = embed(exact, tensor)
    small = torch.nn.functional.interpolate(tensor, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    expected = encode(exact, 2 * small - 1, z, 2)
    close(exact.invert(tensor, 2), expected)
    for form in ([Image.fromarray(picture) for picture in array], (array / 255).astype(np.float32)):
        torch.testing.assert_close(exact.invert(form, 2), expected, rtol=1e-3, atol=1e-3)  # 8 bits in float32


@torch.no_grad()
def test_image_processor(exact):
    """Its way of preparing images counts, which here is: no standardization."""
    size = {"height": 12, "width": 12}
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    pipe = make(image_processor=processor).to(torch.float64)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255
    torch.testing.assert_close(
        pipe.encode_image(picture), pipe.image_encoder(pixels).image_embeds, rtol=1e-4, atol=1e-4
    )


def test_embeddings_of_length_one(pipe):
    unit = make(embed_norm="l2")
    z, long = unit.encode_image(IMAGES), pipe.encode_image(IMAGES)
    torch.testing.assert_close(z, long / long.norm(dim=1, keepdim=True))
    path = unit.text_diff(IMAGES[:1], "a cat", num=3, num_inference_steps=1).image_embeds
    torch.testing.assert_close(path.norm(dim=1), torch.ones(3))


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    diffusers_logging.enable_propagation()
    long = pipe.encode_prompt("a red three, far too long")
    assert "CLIP reads 16 of them. This was left out: 'oo long'" in caplog.text
    ids = [*pipe.tokenizer("a red three, far too long").input_ids[:15], 513]
    with torch.no_grad():
        assert torch.equal(long[0], pipe.text_encoder(torch.tensor([ids])).text_embeds)
    caplog.clear()
    pipe.encode_prompt("a red three")
    assert not caplog.text
    text_alone = make(prior=None, prior_scheduler=None)
    assert all(
        torch.equal(a, b) for a, b in zip(text_alone.encode_prompt("a cat"), pipe.encode_prompt("a cat"), strict=True)
    )


def test_a_special_token_in_a_prompt_is_text(pipe):
    assert pipe.encode_prompt("<|endoftext|>")[2].sum() > 4


def test_a_prior_is_added_later(pipe, tmp_path):
    names = ("prior", "text_encoder", "tokenizer", "prior_scheduler")
    make(**dict.fromkeys(names)).save_pretrained(tmp_path)
    decoder = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(decoder) is UnCLIPTextToImagePipeline and decoder.prior is None and decoder.tokenizer is None
    decoder.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`prompt` was given, but this pipeline has no `text_encoder`"):
        decoder("a cat")
    parts = {name: getattr(pipe, name) for name in names}
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    expected = pipe("a cat", **SHORT, generator=seeds[0], output_type="pt").images
    whole = UnCLIPTextToImagePipeline.from_pipe(decoder, **parts)
    loaded = UnCLIPTextToImagePipeline.from_pretrained(tmp_path, **parts)
    for other, seed in zip((whole, loaded), seeds[1:], strict=True):
        assert torch.equal(other("a cat", **SHORT, generator=seed, output_type="pt").images, expected)


def test_config_is_kept(tmp_path):
    make(embed_norm="l2", clip_model_id="me/clip").save_pretrained(tmp_path)
    config = UnCLIPTextToImagePipeline.from_pretrained(tmp_path).config
    assert (config.embed_norm, config.clip_model_id) == ("l2", "me/clip")


def test_scheduler_that_was_put_in_place(pipe):
    pipe.decoder_scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="`decoder_scheduler` is a DDIMScheduler, which was put in place"):
        pipe("a cat")


def test_weights_that_are_not_finite(pipe):
    pipe.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the images are not finite"):
        pipe("a cat", **SHORT)


# -- what is refused before a model runs


NO_TEXT = {"text_encoder": None, "tokenizer": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": None}, "`prior` is missing: give all of"),
        ({"prior": None, "prior_scheduler": None, "tokenizer": None}, "`prior_scheduler`, `tokenizer` is missing"),
        ({"text_encoder": None, "tokenizer": None}, "`text_encoder`, `tokenizer` is missing: give all of"),
        ({"embed_norm": "l1"}, "`embed_norm` is 'l1', but must be 'standardize' or 'l2'"),
        ({"decoder": lambda: make_decoder(out_channels=6)}, "`decoder` has 3 input and 6 output channels"),
        ({"decoder": lambda: make_decoder(sample_size=(8, 16))}, r"`sample_size`=\(8, 16\)"),
        ({"decoder": lambda: make_decoder(class_embed_type=None)}, "with `class_embed_type`=None: they must agree"),
        ({"decoder": lambda: make_decoder(cross_attention_dim=8)}, r"widths \(12, 128\), but .* takes \(8, 128\)"),
        ({"image_encoder": lambda: make_image_encoder(projection_dim=6)}, "'image_encoder': 6}, but must have one"),
        ({"decoder_projection": lambda: make_projection(clip_embeddings_dim=6)}, "'decoder': 6"),
        ({"prior": lambda: make_prior(num_embeddings=9)}, "16 tokens, but `prior` takes 8 and 9"),
        ({"text_encoder": lambda: make_text_encoder(eos_token_id=5)}, "the id 513 .* looks for the first 5"),
        ({"tokenizer": lambda: CLIPTokenizer(model_max_length=16)}, "has . tokens, and none but special"),
        ({"prior_scheduler": HeunDiscreteScheduler}, "`scheduler` is a HeunDiscreteScheduler, which is wrong"),
        ({"prior_scheduler": DDPMScheduler}, "`scheduler` has `beta_schedule`='linear', but a prior needs"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{name: part() if callable(part) and part is not None else part for name, part in changes.items()})


NAN = torch.full((1, DIM), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`prompt` and `image_embeds` exclude each other"),
        ({"prompt": "a", "image_embeds": torch.zeros(1, DIM)}, ValueError, "exclude each other: give one"),
        ({"prompt": 3}, TypeError, "`prompt` is 3, but must be a `str`"),
        ({"prompt": []}, ValueError, "`prompt` is empty"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, ValueError, "`negative_prompt` has 2 entries for 1 prompts"),
        ({"image_embeds": [1]}, TypeError, "`image_embeds` is a list"),
        ({"image_embeds": torch.zeros(1, 6)}, ValueError, r"shape \(1, 6\), but must be \(batch, 8\)"),
        ({"image_embeds": NAN}, ValueError, "and finite"),
        ({"image_embeds": torch.zeros(1, DIM), "prior_latents": NAN}, ValueError, "with `image_embeds` no prior runs"),
        ({"image_embeds": torch.zeros(1, DIM), "negative_prompt": "a"}, ValueError, "`negative_prompt` is given, but"),
        ({"prompt": "a", "negative_prompt": 3}, TypeError, "`negative_prompt` is 3, but must be a `str`"),
        ({"prompt": "a", "prior_latents": torch.zeros(1, DIM)}, ValueError, r"`prior_latents` has shape \(1, 8\)"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 8, 8)}, ValueError, r"`latents` has shape .*, but this call"),
        ({"prompt": "a", "latents": [1]}, TypeError, "`latents` is a list, but must be a tensor"),
        ({"prompt": "a", "latents": NAN.new_full((1, 3, SIDE, SIDE), NAN[0, 0])}, ValueError, "and finite values"),
        ({"prompt": "a", "num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0, but must be an `int`"),
        ({"prompt": "a", "num_inference_steps": 1001}, ValueError, "is 1001, but the decoder has 1000 timesteps"),
        ({"prompt": "a", "prior_num_inference_steps": 1.5}, ValueError, "`prior_num_inference_steps` is 1.5"),
        ({"prompt": "a", "prior_num_inference_steps": 1001}, ValueError, "`num_inference_steps` is 1001, but must be"),
        ({"prompt": "a", "num_candidates": 0}, ValueError, "`num_candidates` is 0"),
        ({"prompt": "a", "num_images_per_prompt": True}, ValueError, "`num_images_per_prompt` is True"),
        ({"prompt": "a", "guidance_scale": float("inf")}, ValueError, "`guidance_scale` is inf"),
        ({"prompt": "a", "prior_guidance_scale": float("nan")}, ValueError, "`prior_guidance_scale` is nan"),
        ({"prompt": "a", "eta": 1.5}, ValueError, r"`eta` is 1.5, but must lie in \[0, 1\]"),
        ({"prompt": "a", "rerank": "l2"}, ValueError, "`rerank` is 'l2', but must be 'cosine', 'dot' or `None`"),
    ],
)  # fmt: skip
def test_bad_arguments(pipe, arguments, error, message):
    with pytest.raises(error, match=message), no_model_runs(pipe):
        pipe(**arguments)


ONE = IMAGES[:1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.encode_image("a.png"), TypeError, "`image` holds a str"),
        (lambda p: p.encode_image(torch.zeros(1, 3, 8, 9)), ValueError, r"\(8, 9\), but CLIP and decoder see squares"),
        (lambda p: p.encode_image(2 * ONE + 1), ValueError, r"values in .*, but they must be in \[0, 1\]"),
        (lambda p: p.invert(ONE, 0), ValueError, "`num_inference_steps` is 0"),
        (lambda p: p.invert(ONE, image_embeds=torch.zeros(2, DIM)), ValueError, r"`image_embeds` has shape \(2, 8\)"),
        (lambda p: p.variations(ONE, noise="pink"), ValueError, "`noise` is 'pink', but must be 'inverted' or"),
        (lambda p: p.variations(ONE, eta=-1.0), ValueError, "`eta` is -1.0"),
        (lambda p: p.variations(ONE, num_inversion_steps=2000), ValueError, "`num_inversion_steps` is 2000"),
        (lambda p: p.variations(ONE, generator=[torch.Generator()] * 2), ValueError, "`generator` is a list of 2"),
        (lambda p: p.variations(ONE, output_type="gif"), ValueError, "`output_type` is 'gif'"),
        (lambda p: p.interpolate(ONE, ONE, num=1), ValueError, "`num` is 1, but a path has at least its 2 ends"),
        (lambda p: p.interpolate(ONE, ONE, noise="white"), ValueError, "`noise` is 'white', but must be 'slerp'"),
        (lambda p: p.interpolate(ONE, IMAGES), ValueError, "`image_b` holds 3 images, but this call takes 1"),
        (lambda p: p.text_diff(IMAGES, "a"), ValueError, "`image` holds 3 images"),
        (lambda p: p.text_diff(ONE, ["a"]), TypeError, r"`prompt` is \['a'\], but must be a `str`"),
        (lambda p: p.text_diff(ONE, "a", source_prompt=1), TypeError, "`source_prompt` is 1"),
        (lambda p: p.text_diff(ONE, "a", theta_max=2.0), ValueError, r"`theta_max` is 2.0, but must lie in \[0, 1\]"),
        (lambda p: p.text_diff(ONE, "a", num=0), ValueError, "`num` is 0"),
    ],
)
def test_bad_images_and_numbers(pipe, call, error, message):
    with pytest.raises(error, match=message), no_model_runs(pipe):
        call(pipe)


def test_what_is_missing(pipe):
    blind = make(image_encoder=None)
    for call in (lambda: blind.invert(ONE), lambda: blind.text_diff(ONE, "a"), lambda: blind.encode_image(ONE)):
        with pytest.raises(ValueError, match="this pipeline has no `image_encoder`"), no_model_runs(blind):
            call()
    no_prior = make(prior=None, prior_scheduler=None)
    with (
        pytest.raises(ValueError, match="`prompt` was given, but this pipeline has no `prior`"),
        no_model_runs(no_prior),
    ):
        no_prior("a")
    with pytest.raises(ValueError, match="have the same embedding: .* do not differ for CLIP"):
        pipe.text_diff(ONE, "a", source_prompt="a")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_prior_without_statistics_is_refused(pipe, value):
    pipe.prior.clip_std.data[0, 3] = value
    with pytest.raises(ValueError, match="`prior.clip_std` is not positive everywhere"), no_model_runs(pipe):
        pipe("a cat")


def test_projection_of_texts():
    embeds, texts = torch.zeros(2, DIM), {"text_embeds": torch.zeros(2, DIM)}
    with pytest.raises(ValueError, match="`with_text` is False, so .* must not be given"):
        make_projection()(embeds, **texts)
    with pytest.raises(ValueError, match="`with_text` is True, so .* must both be given"):
        make_projection(with_text=True)(embeds, **texts)


def test_one_progress_bar_of_each_use(pipe):
    for call in (
        lambda: pipe.variations(ONE, num_inference_steps=2),
        lambda: pipe.interpolate(ONE, IMAGES[1:2], num=2, num_inference_steps=2),
        lambda: pipe.text_diff(ONE, "a cat", num=2, num_inference_steps=2),
        lambda: pipe.invert(ONE, num_inference_steps=2),
    ):
        screen = io.StringIO()
        pipe.set_progress_bar_config(file=screen, disable=False)
        call()
        assert screen.getvalue().count("\n") == 1 and "100%" in screen.getvalue()


def test_unclip_scheduler_is_told_where_it_goes(exact):
    """Its steps are those of DDPM, but for a rounding error in the last one."""
    ddpm = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="linspace",
        variance_type="fixed_small_log", clip_sample_range=10.0,
    )  # fmt: skip
    results = []
    for scheduler in (ddpm, UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)):
        other = UnCLIPTextToImagePipeline.from_pipe(exact, prior_scheduler=scheduler)
        other.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        results.append(other("a cat", **SHORT, num_candidates=1, generator=seed, output_type="pt").image_embeds)
    torch.testing.assert_close(*results, rtol=5e-3, atol=5e-3)
