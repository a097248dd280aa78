"""unCLIP: recorded conditioning, exact levels, an independent program of each use, and what every pipeline owes."""

import doctest
import importlib
import io
import itertools
import re

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_ext import UnCLIPImageProjection, UnCLIPTextToImagePipeline
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


# -- examples


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("my-unclip")
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


def test_conditioning_is_the_recorded_one(recorded):
    """Of `UnCLIPTextProjModel`, whose text adds a summand to the time embedding, and more tokens."""
    projection = UnCLIPImageProjection(clip_embeddings_dim=6, time_embed_dim=10, cross_attention_dim=7)
    weights = {name[2:]: value for name, value in recorded.items() if name.startswith("w/")}
    own = projection.state_dict().keys() - {"clip_mean", "clip_std"}
    assert len(own) == 5
    projection.load_state_dict({name: weights[name] for name in own}, strict=False)
    text = torch.nn.functional.linear(
        recorded["prompt_embeds"], weights["embedding_proj.weight"], weights["embedding_proj.bias"]
    )
    with torch.no_grad():
        tokens, time_embeds = projection(recorded["image_embeddings"])
        torch.testing.assert_close(tokens, recorded["encoder_hidden_states"][:, :4], rtol=0, atol=2e-6)
        torch.testing.assert_close(time_embeds + text, recorded["class_labels"], rtol=0, atol=2e-6)
        # the recorded ones have no image first
        both, drop_mask = recorded["image_embeddings"].repeat(2, 1), torch.tensor([True, True, False, False])
        tokens, time_embeds = projection(both, drop_mask)
    torch.testing.assert_close(tokens, recorded["encoder_hidden_states_cfg"][:, :4], rtol=0, atol=2e-6)
    guided_text = recorded["class_labels_cfg"] - time_embeds
    torch.testing.assert_close(guided_text, text.repeat(2, 1), rtol=0, atol=2e-6)


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
        assert max(scores) - sorted(scores)[-2] > 1e-3
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
        ({"decoder_projection": lambda: make_projection(clip_embeddings_dim=6)}, "'decoder_projection': 6"),
        ({"prior": lambda: make_prior(num_embeddings=9)}, "16 tokens, but `prior` takes 8 and 9"),
        ({"text_encoder": lambda: make_text_encoder(eos_token_id=5)}, "the id 513, but `text_encoder` looks for 5"),
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
        ({"prompt": "a", "prior_latents": torch.zeros(1, DIM)}, ValueError, r"`prior_latents` has shape \(1, 8\)"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 8, 8)}, ValueError, r"`latents` has shape .*, but this call"),
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
