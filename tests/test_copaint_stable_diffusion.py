"""CoPaint in latent space, on Stable Diffusion's real components at tiny sizes."""

import json

import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ext import CoPaintStableDiffusionPipeline
from diffusers_ext.pipelines.copaint_stable_diffusion import CoPaintStableDiffusionScheduler, decode, encode

STOCK = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real one with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def components(tokenizer, scheduler=None, **unet_changes):
    torch.manual_seed(0)
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return {
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**(unet | unet_changes)).eval(),
        "scheduler": scheduler or DDIMScheduler(**STOCK),
    }


@pytest.fixture
def pipe(tokenizer):
    pipe = CoPaintStableDiffusionPipeline(**components(tokenizer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(1, 16, 16)
MASK[..., 8:] = 1
SHORT = {"num_inference_steps": 3, "output_type": "pt"}


class TestContract(PipelineContract):
    pipeline_class, image_shape = CoPaintStableDiffusionPipeline, (3, 16, 16)

    @pytest.fixture(autouse=True)
    def _tokenizer(self, tokenizer):
        self.tokenizer = tokenizer

    def components(self):
        return components(self.tokenizer)

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(batch_size, 1, 16, 16)
        mask[:, :, :2] = 0
        return {"prompt": ["a"] * batch_size, "image": image, "mask_image": mask, "num_inference_steps": 3}

    def test_from_pipe_shares_the_components(self, pipe):
        other = CoPaintStableDiffusionPipeline.from_pipe(pipe)
        assert other.unet is pipe.unet and other.vae is pipe.vae


def test_the_scheduler_keeps_the_levels_and_never_clips(pipe):
    stock = DDIMScheduler(**STOCK)
    assert type(pipe.scheduler) is CoPaintStableDiffusionScheduler and not pipe.scheduler.config.clip_sample
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_stable_diffusion_checkpoints_load(tokenizer, tmp_path):
    stock = StableDiffusionPipeline(
        **components(tokenizer), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.save_pretrained(tmp_path)
    loaded = CoPaintStableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    shared = CoPaintStableDiffusionPipeline.from_pipe(stock)
    shared.set_progress_bar_config(disable=True)
    assert shared.unet is stock.unet
    noise = torch.randn(2, 4, 8, 8)
    images = [each("ab", IMAGE, MASK, latents=noise, **SHORT).images for each in (loaded, shared)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_networks_that_were_trained_to_inpaint_are_refused(tokenizer):
    with pytest.raises(ValueError, match="9 input channels.*`StableDiffusionInpaintPipeline`"):
        CoPaintStableDiffusionPipeline(**components(tokenizer, in_channels=9))


def test_known_pixels(pipe):
    images = pipe("ab", IMAGE, MASK, feather=0, **SHORT).images
    torch.testing.assert_close(images[..., :8], IMAGE[..., :8])
    feathered = pipe("ab", IMAGE, MASK, feather=2, **SHORT).images
    torch.testing.assert_close(feathered[..., :6], IMAGE[..., :6])
    assert not torch.allclose(feathered[..., 7], IMAGE[..., 7], atol=1e-3), "the seam is a mixture"
    own = pipe("ab", IMAGE, MASK, paste_known=False, **SHORT).images
    assert not torch.allclose(own[..., :8], IMAGE[..., :8], atol=1e-2)


def test_a_latent_is_known_only_if_all_of_its_pixels_are(pipe, monkeypatch):
    """The latent loss sees exactly the latents outside of the hole and its rim."""
    seen = []
    optimize = CoPaintStableDiffusionPipeline._optimize
    monkeypatch.setattr(
        CoPaintStableDiffusionPipeline, "_optimize", lambda self, *a: (seen.append(a[4]), optimize(self, *a))[1]
    )
    mask = torch.zeros(16, 16)
    mask[3, 5] = 1  # one pixel
    pipe("a", IMAGE[:1], mask, **SHORT)
    expected = torch.ones(8, 8)
    expected[1, 2] = 0
    assert torch.equal(seen[0].keep_mask[0, 0], expected)


@pytest.mark.parametrize(("loss_space", "rate"), [("latent", 0.02), ("pixel", 10.0)])  # a random decoder says little
def test_optimizing_brings_what_is_known_nearer(pipe, loss_space, rate):
    pipe.to(torch.float64)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    known = (1 - MASK).double()

    def error(rate):
        options = SHORT | {"num_inference_steps": 8, "output_type": "latent", "learning_rate": rate}
        latents = pipe("ab", IMAGE, MASK, latents=noise, loss_space=loss_space, **options).images
        if loss_space == "latent":
            target = encode(pipe.vae, 2 * IMAGE.double() - 1)
            return ((latents - target) * known[..., ::2, ::2]).square().sum().item()
        return ((decode(pipe.vae, latents) - 2 * IMAGE + 1) * known).square().sum().item()

    with torch.no_grad():
        assert error(rate) < 0.9 * error(1e-12)


def test_gradient_goes_through_guidance_and_decoder(pipe):
    """The gradient of the loss against central differences, in float64."""
    pipe.to(torch.float64)
    module = pipe.scheduler.__class__.__module__
    operator_class = __import__(module, fromlist=["x"]).DecodedMaskOperator
    keep = (1 - MASK).double()[None]
    operator = operator_class(pipe.vae, keep)
    measurement = keep * (2 * IMAGE[:1].double() - 1)
    embeds = torch.randn(2, 8, 16, dtype=torch.float64)
    x, direction = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    origin = x + 0.1

    def loss(sample, with_graph=False):
        inputs = (operator, measurement, origin, 0.3)
        return pipe._evaluate(sample, 500, (embeds, 3.0), inputs, [], with_graph)

    leaf, value, *_ = loss(x, True)
    [gradient] = torch.autograd.grad(value, leaf, torch.ones_like(value))
    step = 1e-5
    with torch.no_grad():
        slope = (loss(x + step * direction)[1] - loss(x - step * direction)[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope[0], rtol=1e-6, atol=1e-6)


def test_guidance(pipe):
    """Without guidance one pass per prediction; with it both in one batch, the negative prompt first."""
    noise = torch.randn(2, 4, 8, 8)
    options = SHORT | {"latents": noise}
    plain = pipe("ab", IMAGE, MASK, guidance_scale=1.0, **options).images
    same = pipe("ab", IMAGE, MASK, guidance_scale=3.0, negative_prompt="ab", **options).images
    torch.testing.assert_close(plain, same, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, pipe("cd", IMAGE, MASK, guidance_scale=1.0, **options).images, atol=1e-4)
    embeds = pipe._encode_prompt(["ab"])
    given = pipe(prompt_embeds=embeds, image=IMAGE, mask_image=MASK, guidance_scale=1.0, **options).images
    assert torch.equal(given, plain)


def test_no_gradient_is_left_and_inference_mode_is_refused(pipe):
    pipe("ab", IMAGE, MASK, loss_space="pixel", **SHORT)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode` rules out"):
        pipe("ab", IMAGE, MASK, **SHORT)


BAD_CALLS = {
    "no prompt": (lambda p: p(None, IMAGE, MASK), "`prompt` is missing"),
    "no image": (lambda p: p("a"), "`image` or `mask_image` is missing"),
    "two prompts": (lambda p: p("a", IMAGE, MASK, prompt_embeds=torch.zeros(1, 8, 16)), "both given"),
    "three prompts": (lambda p: p(["a"] * 3, IMAGE, MASK), "`prompt` has 3 entries for 2 images"),
    "size": (lambda p: p("a", IMAGE[..., :10], torch.zeros(16, 10)), r"\(16, 10\).*multiples of 4"),
    "loss space": (lambda p: p("a", IMAGE, MASK, loss_space="text"), "`loss_space` is 'text'.*'latent' or 'pixel'"),
    "feather": (lambda p: p("a", IMAGE, MASK, feather=-1), "`feather` is -1"),
    "guidance": (lambda p: p("a", IMAGE, MASK, guidance_scale=float("nan")), "`guidance_scale` is nan"),
    "latents": (lambda p: p("a", IMAGE, MASK, latents=torch.zeros(2, 4, 16, 16)), r"needs \(2, 4, 8, 8\)"),
    "grey": (lambda p: p("a", torch.rand(1, 1, 16, 16), MASK), "must have 3 channels"),
    "steps": (lambda p: p("a", IMAGE, MASK, num_inference_steps=1), "from 2 to 1000"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_before_a_model_runs(pipe, name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        call(pipe)
