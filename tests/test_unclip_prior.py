"""The unCLIP prior: recorded schedules, steps and networks, closed forms, stock pipelines beside it, bad input."""

import doctest
import importlib
import json
import math
import re
import subprocess
import textwrap
from types import SimpleNamespace

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
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    ModelMixin,
    PNDMScheduler,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from reader_env import make_reader
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_ext import UnCLIPPriorPipeline, UnCLIPPriorTransformer
from diffusers_ext.pipelines.unclip_prior import (
    check_prior_scheduler,
    default_prior_scheduler,
    fix_stable_unclip_scheduler,
    init_prior,
    slerp,
)
from diffusers_ext.training.train_toy_clip import byte_tokenizer

unclip_prior = importlib.import_module("diffusers_ext.pipelines.unclip_prior")

PROMPTS = ["a red three", "a small 4", "blue"]
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
ANCESTRAL = {**COSINE, "variance_type": "fixed_small_log", "timestep_spacing": "linspace", "clip_sample_range": 10.0}


def make_text_encoder(width=6, hidden_size=6, **changes):
    config = {"vocab_size": 514, "max_position_embeddings": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513, "intermediate_size": 12}
    torch.manual_seed(1)
    config |= {"hidden_size": hidden_size, "projection_dim": width, "initializer_factor": 20.0}
    return CLIPTextModelWithProjection(CLIPTextConfig(**(config | changes))).eval()


def make_image_encoder(width=6):
    torch.manual_seed(2)
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config |= {"image_size": 16, "patch_size": 8, "projection_dim": width, "initializer_factor": 20.0}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()


def make_prior(width=6, cls=PriorTransformer, embed_norm="standardize", **changes):
    torch.manual_seed(3)
    prior = cls(**({"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": width,
                    "num_embeddings": 16} | changes)).eval()  # fmt: skip
    init_prior(prior, 0.3 * torch.randn(500, width) + 0.1 * torch.arange(width), embed_norm)
    return prior


def make_parts(width=6, **changes):
    return {
        "prior": make_prior(width),
        "text_encoder": make_text_encoder(width, width),
        "tokenizer": byte_tokenizer(16),
        "scheduler": default_prior_scheduler(),
        "image_encoder": make_image_encoder(width),
    } | changes


def make(**changes):
    pipe = UnCLIPPriorPipeline(**make_parts(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestUnCLIPPrior(PipelineContract):
    pipeline_class = UnCLIPPriorPipeline

    def components(self):
        return make_parts()

    def inputs(self, batch_size):
        return {"prompt": PROMPTS[:batch_size], "num_inference_steps": 3}

    def test_output_types(self, pipe):
        tensor = self.run(pipe)
        assert tensor.shape == (2, 6)
        array = self.run(pipe, output_type="np")
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, tensor.numpy())
        with pytest.raises(ValueError, match="`output_type` is 'pil'.*'np'"), no_model_runs(pipe):
            self.run(pipe, output_type="pil")

    def test_general_arguments_have_the_usual_names(self, pipe):
        parameters = unclip_prior.inspect.signature(UnCLIPPriorPipeline.__call__).parameters
        for name in ("num_inference_steps", "generator", "return_dict", "callback_on_step_end", "latents"):
            assert name in parameters
        assert parameters["output_type"].default == "pt"


class TestUnCLIPPriorAncestralGuided(TestUnCLIPPrior):
    """Noise in every step, both branches, another network."""

    def components(self):
        prior = make_prior(cls=UnCLIPPriorTransformer, encoder_hid_dim=8)
        return make_parts(
            prior=prior, text_encoder=make_text_encoder(6, 8), scheduler=DDPMScheduler(**ANCESTRAL), image_encoder=None
        )

    def inputs(self, batch_size):
        changes = {"guidance_scale": 2.5, "negative_prompt": ["a", "b", "c"][:batch_size], "num_candidates": 3}
        return super().inputs(batch_size) | changes


# -- examples


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("my-prior")
    result = doctest.testmod(unclip_prior, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 40


def test_card_examples(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("mine", card={})
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    installed, remote, *uses = re.findall(r"^```py\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert len(uses) == 2
    for load in (installed, remote):
        names = {}
        exec(load, names)
        assert type(names["pipe"]).__name__ == "UnCLIPPriorPipeline"
    names["pipe"].set_progress_bar_config(disable=True)
    for use in uses:
        exec(use, names)
    assert names["path"].shape == (5, 1, 6) and names["changed"].shape == (5, 1, 6) and names["ranks"].shape == (4,)


# -- recorded schedules, networks and steps


@pytest.fixture
def recorded(goldens):
    def load(name):
        with np.load(goldens / "unclip" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) if arrays[key].ndim else arrays[key].item() for key in arrays}

    return load


def test_recorded_schedule(recorded):
    numbers = recorded("g1_schedule")
    ours = fix_stable_unclip_scheduler(UnCLIPScheduler(prediction_type="sample"))
    for scheduler in (ours, default_prior_scheduler()):
        error = (scheduler.alphas_cumprod.double() - numbers["karlo_alphas_cumprod"]).abs().max()
        assert error < 5e-7
        assert (scheduler.alphas_cumprod - numbers["dalle2_alphas_cumprod"]).abs().max() < 5e-7
    for steps in (2, 7, 10, 25, 50, 64, 100):
        ours.set_timesteps(steps)
        assert ours.timesteps.tolist() == numbers[f"respaced{steps}_timestep_map"].flip(0).tolist()


@pytest.mark.parametrize("steps", [2, 7, 10, 25, 50, 64, 100, 1000])
def test_recorded_steps(steps, recorded, monkeypatch):
    """What a step takes of the prediction, of the sample and of the noise, is as in both references."""
    numbers = recorded("g1_schedule")
    scheduler = fix_stable_unclip_scheduler(UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0))
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor([[0.0, 0.0, 1.0]]))
    scheduler.set_timesteps(steps)
    predicted, sample = torch.eye(3)[:2, None]
    found = torch.cat([scheduler.step(predicted, t, sample).prev_sample for t in scheduler.timesteps.tolist()])
    for reference in (f"respaced{steps}",) if steps < 1000 else ("karlo", "dalle2"):
        names = ("mean_coef1", "mean_coef2", "log_variance_clipped")
        expected = torch.stack([numbers[f"{reference}_posterior_{name}"].flip(0).double() for name in names], dim=1)
        expected[:, 2] = (expected[:, 2] / 2).exp()
        expected[-1, 2] = 0  # the last step has no noise
        # differences of levels that are close to each other, in single precision
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if steps <= 25 else 3e-4)


@pytest.mark.parametrize("cls", [PriorTransformer, UnCLIPPriorTransformer])
def test_recorded_network(cls, recorded):
    numbers = recorded("g4_prior_transformer")
    prior = cls(**json.loads(numbers["cfg_json"])).eval()
    prior.load_state_dict({key[2:]: value for key, value in numbers.items() if key.startswith("w/")})
    inputs = {name: numbers[name] for name in ("hidden_states", "timestep", "proj_embedding", "encoder_hidden_states")}
    with torch.no_grad():
        for mask, name in ((numbers["attention_mask"], "out_masked"), (torch.ones(3, 5).bool(), "out_mask_ones")):
            output = prior(**inputs, attention_mask=mask).predicted_image_embedding
            torch.testing.assert_close(output, numbers[name], rtol=0, atol=5e-6)
        output = prior(**inputs, attention_mask=numbers["attention_mask"]).predicted_image_embedding
        embeds = prior.post_process_latents(output)
    torch.testing.assert_close(embeds, numbers["out_postprocessed"], rtol=0, atol=5e-6)


class GaussianPrior(ModelMixin, ConfigMixin):
    """The best prediction for `z_i | z_t ~ N(A z_t + b, S)`; where the mask is 0, that without a text."""

    @register_to_config
    def __init__(self, embedding_dim=4, embedding_proj_dim=3, num_embeddings=1, encoder_hid_proj_type=None):
        super().__init__()
        self.clip_mean = torch.nn.Parameter(torch.zeros(1, 4))
        self.clip_std = torch.nn.Parameter(torch.ones(1, 4))
        self.prd_embedding = self.positional_embedding = None
        self.calls = []

    def forward(self, hidden_states, timestep, proj_embedding, encoder_hidden_states, attention_mask):
        g, level = self.numbers, self.alphas_cumprod[int(timestep)]
        conditional = attention_mask[:, :1].bool()
        self.calls.append((len(hidden_states), conditional.sum().item()))
        x, outputs = hidden_states.double(), []
        for mean, cov in (
            (proj_embedding.double() @ g["A"].T + g["b"], g["S"]),
            ((g["A"] @ g["mt"] + g["b"]).expand_as(x), g["S"] + g["A"] @ g["St"] @ g["A"].T),
        ):
            gain = level.sqrt() * cov @ torch.linalg.inv(level * cov + (1 - level) * torch.eye(4, dtype=torch.double))
            outputs.append(mean + (x - level.sqrt() * mean) @ gain.T)
        predicted = torch.where(conditional, *outputs).to(hidden_states.dtype)
        return SimpleNamespace(predicted_image_embedding=predicted)

    def post_process_latents(self, latents):
        return latents * self.clip_std + self.clip_mean


def make_gaussian(numbers, scheduler, levels):
    prior = GaussianPrior()
    prior.numbers, prior.alphas_cumprod = numbers, levels.double()
    pipe = UnCLIPPriorPipeline(prior, None, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


UNCONDITIONAL = {
    "negative_prompt_embeds": torch.zeros(1, 3),
    "negative_prompt_mask": torch.zeros(1, 1, dtype=torch.bool),
    "num_candidates": 1,
    "rerank": None,
}


@pytest.mark.parametrize("kind", ["ddpm", "unclip"])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 10), (4.0, 10), (4.0, 1)])
def test_karlo_sampling(kind, steps, scale, limit, recorded, monkeypatch):
    """Every step of Karlo's loop, with its noise; guidance before clipping; the statistics at the end."""
    g, levels = recorded("g2_karlo_prior_sampling"), recorded("g1_schedule")["karlo_alphas_cumprod"]
    tag = f"n{steps}_w{scale:.0f}_clamp{limit}"
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=float(limit))
    if kind == "ddpm":
        scheduler = fix_stable_unclip_scheduler(scheduler)
    pipe = make_gaussian(g, scheduler, levels)
    pipe.prior.clip_mean.data[:], pipe.prior.clip_std.data[:] = g["clip_mean"], g["clip_std"]
    noises, states = iter(g[f"{tag}/noise"]), []
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises))
    output = pipe(
        prompt_embeds=g["zt"].float(),
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=g[f"{tag}/x_T"],
        callback_on_step_end=lambda _, step, timestep, tensors: states.append(tensors["latents"]),
        **UNCONDITIONAL,
    )
    assert pipe.scheduler.timesteps.tolist() == g[f"{tag}/timesteps"].tolist()
    expected = g[f"{tag}/x_steps"]
    if kind == "unclip":  # which makes the last ones too small
        torch.testing.assert_close(torch.stack(states), g[f"{tag}/x_steps_diffusers_unclip"], rtol=0, atol=1e-5)
        expected = torch.cat([expected[:-1], 0.9994723 * expected[-1:]])
    error = (torch.stack(states) - expected).abs().amax(dim=(1, 2))
    assert error.max() < (1e-5 if kind == "ddpm" else 1e-4)
    if kind == "ddpm":
        torch.testing.assert_close(output.image_embeds, g[f"{tag}/image_embeds"], rtol=0, atol=1e-5)
    rows = 3 if scale == 1 else 6
    assert set(pipe.prior.calls) == {(rows, 3)}, "one batch for both branches"


def test_all_timesteps_of_unit_embeddings(recorded, monkeypatch):
    """As DALLE2-pytorch samples: a timestep per step, and `sqrt(d)` times what has unit length."""
    g, generator = recorded("g2_karlo_prior_sampling"), torch.Generator().manual_seed(0)
    signal = (torch.linspace(0, 1, 101, dtype=torch.double).add(0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    levels = (1 - betas).cumprod(0)
    scheduler = DDPMScheduler(**(ANCESTRAL | {"num_train_timesteps": 100, "clip_sample": False}))
    scaled = g | {"A": 2 * g["A"], "b": 2 * g["b"], "S": 4 * g["S"]}
    pipe = make_gaussian(scaled, scheduler, levels)
    init_prior(pipe.prior, torch.randn(9, 4, generator=generator), "l2")
    noises = torch.randn(101, 3, 4, generator=generator)
    rows, x = iter(noises[1:]), noises[0].double()
    monkeypatch.setattr(
        importlib.import_module(type(scheduler).__module__), "randn_tensor", lambda *args, **kwargs: next(rows)
    )
    condition = {"prompt_embeds": g["zt"].float(), "num_inference_steps": 100, "latents": noises[0]}
    embeds = pipe(**condition, **UNCONDITIONAL).image_embeds
    for t in reversed(range(100)):
        before = levels[t - 1] if t else torch.tensor(1.0)
        predicted = pipe.prior(x, t, g["zt"], None, torch.ones(3, 1)).predicted_image_embedding
        x = (betas[t] * before.sqrt() * predicted + (1 - before) * (1 - betas[t]).sqrt() * x) / (1 - levels[t])
        x = x + (betas[t] * (1 - before) / (1 - levels[t])).sqrt() * noises[100 - t]
    torch.testing.assert_close(embeds.double(), x / 2, rtol=0, atol=1e-5)


def covariance_errors(pipe, g, steps, count=50_000, **changes):
    """Relative error of the covariance and ratio of the traces for one condition; the mean's largest error."""
    samples = pipe(
        prompt_embeds=g["zt"][None].float(),
        num_images_per_prompt=count,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        **UNCONDITIONAL,
        **changes,
    ).image_embeds.double()
    return samples.mean(dim=0), torch.cov(samples.T)


@pytest.mark.parametrize(
    ("scheduler", "steps", "error", "trace"),
    [
        (default_prior_scheduler(), 10, 0.054, 0.931),
        (default_prior_scheduler(), 25, 0.0065, 0.994),
        (DPMSolverMultistepScheduler(**COSINE, algorithm_type="sde-dpmsolver++"), 25, 0.038, 1.04),
        (DPMSolverMultistepScheduler(**COSINE, timestep_spacing="trailing"), 25, 0.006, None),
        (UniPCMultistepScheduler(**COSINE), 25, 0.009, 1.00),
        (DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample_range=10.0), 25, 0.097, 0.895),
        (DDPMScheduler(**ANCESTRAL), 25, 0.171, 0.816),
        (UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0), 25, 0.172, 0.816),
        (EulerDiscreteScheduler(**COSINE), 50, None, None),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_schedulers_on_a_gaussian(scheduler, steps, error, trace, recorded):
    """What each allowed scheduler makes of the exact network; the recorded errors are those of 100 000 samples."""
    g = recorded("g9_gaussian_truth")
    mean, cov = covariance_errors(make_gaussian(g, scheduler, g["alphas_cumprod"]), g, steps)
    assert (mean - g["m"]).abs().max() < 4 * (g["S"].diag().max() / 50_000).sqrt() + 0.005
    found = ((cov - g["S"]).norm() / g["S"].norm()).item(), (cov.trace() / g["S"].trace()).item()
    assert found[0] < 0.1 if error is None else abs(found[0] - error) < 0.015
    assert trace is None or abs(found[1] - trace) < 0.015


def test_ancestral_sampling_loses_what_the_formula_says(recorded):
    g = recorded("g9_gaussian_truth")
    for scale, tag in ((1.0, "fixed_small"), (4.0, "cfg4")):
        pipe = make_gaussian(g, DDPMScheduler(**(ANCESTRAL | {"clip_sample": False})), g["alphas_cumprod"])
        mean, cov = covariance_errors(pipe, g, 25, guidance_scale=scale)
        expected = g[f"{tag}/25/cov"]
        assert (mean - g[f"{tag}/25/mean"]).abs().max() < 4 * (expected.diag().max() / 50_000).sqrt()
        assert (cov - expected).norm() / expected.norm() < 5 * math.sqrt(4 / 50_000)


# -- schedulers


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (HeunDiscreteScheduler(**COSINE), "`scheduler` is a HeunDiscreteScheduler"),
        (PNDMScheduler(beta_schedule="squaredcos_cap_v2"), "`scheduler` is a PNDMScheduler"),
        (DDPMScheduler(prediction_type="sample"), "`beta_schedule`='linear'.*'squaredcos_cap_v2'"),
        (DDPMScheduler(**(ANCESTRAL | {"prediction_type": "epsilon"})), "`prediction_type`='epsilon'.*'sample'"),
        (DDPMScheduler(**(ANCESTRAL | {"timestep_spacing": "leading"})), "`timestep_spacing`='leading'.*'linspace'"),
        (DDPMScheduler(**(ANCESTRAL | {"variance_type": "learned_range"})), "`variance_type`='learned_range'"),
        (DDPMScheduler(**ANCESTRAL, thresholding=True), "`thresholding`=True"),
        (DDIMScheduler(**COSINE, timestep_spacing="linspace"), "`timestep_spacing`='linspace'.*'trailing'"),
        (
            DPMSolverMultistepScheduler(**COSINE, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
            "dpmsolver",
        ),
        (DPMSolverMultistepScheduler(**COSINE, use_karras_sigmas=True), "`use_karras_sigmas`=True"),
        (DPMSolverMultistepScheduler(**COSINE, final_sigmas_type="sigma_min"), "`final_sigmas_type`='sigma_min'"),
        (DPMSolverMultistepScheduler(**COSINE, lambda_min_clipped=-5.1), "`lambda_min_clipped`=-5.1"),
        (UniPCMultistepScheduler(**COSINE, predict_x0=False), "`predict_x0`=False"),
        (UniPCMultistepScheduler(**COSINE, solver_type="bh1"), "`solver_type`='bh1'.*'bh2'"),
        (UniPCMultistepScheduler(**COSINE, lower_order_final=False), "`lower_order_final`=False"),
        (EulerDiscreteScheduler(**COSINE, interpolation_type="log_linear"), "`interpolation_type`='log_linear'"),
        (UnCLIPScheduler(), "`prediction_type`='epsilon'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_that_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        make(scheduler=scheduler)
    pipe = make()
    pipe.scheduler = scheduler  # put in place later
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe("a")


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (default_prior_scheduler(), 0, "`num_inference_steps` is 0"),
        (default_prior_scheduler(), 2.5, "`num_inference_steps` is 2.5"),
        (default_prior_scheduler(), 1001, "from 1 to 1000"),
        (default_prior_scheduler(), 1000, "is 1000, for which DPMSolverMultistepScheduler does not.* divides 1000"),
        (UniPCMultistepScheduler(**COSINE), 1000, "is 1000, for which UniPCMultistepScheduler does not"),
        (DPMSolverMultistepScheduler(**COSINE, timestep_spacing="trailing"), 61, "is 61, for which"),
        (DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample=False), 300, "is 300, for which DDIM"),
        (DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample=False), 501, "is 501, for which DDIM"),
        (DDPMScheduler(**ANCESTRAL), 1, "from 2 to 1000 with `DDPMScheduler`"),
        (UnCLIPScheduler(prediction_type="sample"), 1, "from 2 to 1000"),
        (EulerDiscreteScheduler(**COSINE), 49, "from 50 to 1000 with `EulerDiscreteScheduler`"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_steps_that_are_refused(scheduler, steps, message):
    pipe = make(scheduler=scheduler)
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe("a", num_inference_steps=steps)
    with pytest.raises(ValueError, match=message):
        check_prior_scheduler(scheduler, steps)


def test_numbers_of_steps_that_an_error_advises():
    """What divides 1000 and is smaller; the scheduler that is checked stays as it was."""
    for cls, changes in (
        (DDPMScheduler, ANCESTRAL),
        (DDIMScheduler, COSINE | {"clip_sample": False}),
        (DPMSolverMultistepScheduler, COSINE),
        (UniPCMultistepScheduler, COSINE),
        (EulerDiscreteScheduler, COSINE),
    ):
        for spacing in ("linspace", "trailing") if cls is not DDIMScheduler else ("trailing",):
            scheduler = cls(**(changes | {"timestep_spacing": spacing}))
            timesteps = scheduler.timesteps.clone()
            for steps in (50, 100, 125, 200, 250, 500):
                check_prior_scheduler(scheduler, steps)
            assert torch.equal(scheduler.timesteps, timesteps) and scheduler.num_inference_steps is None
    check_prior_scheduler(DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample=False), 64)


def test_ddim_steps_that_are_refused_would_be_wrong(recorded, monkeypatch):
    """Steps of `1000 // 501` where `1000 / 501` is meant: samples of another variance, and another mean."""
    g = recorded("g9_gaussian_truth")
    scheduler = DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample=False)
    pipe = make_gaussian(g, scheduler, g["alphas_cumprod"])
    monkeypatch.setattr(unclip_prior, "check_prior_scheduler", lambda *args: None)
    errors = {}
    for steps in (500, 501):
        mean, cov = covariance_errors(pipe, g, steps, count=2000)
        errors[steps] = (mean - g["m"]).norm().item(), abs(cov.trace() / g["S"].trace() - 1).item()
    assert errors[500][0] < 0.1 and errors[500][1] < 0.1
    assert errors[501][0] > 0.2 and errors[501][1] > 0.3


def test_the_whole_pipeline_has_the_same_rules():
    unclip = importlib.import_module("diffusers_ext.pipelines.unclip")
    for name in ("_SCHEDULERS", "_UNWANTED"):  # what its copy of `check_prior_scheduler` goes by
        assert getattr(unclip, name) == getattr(unclip_prior, name)
    with pytest.raises(ValueError, match="is 1000, for which DPMSolverMultistepScheduler does not"):
        unclip.check_prior_scheduler(default_prior_scheduler(), 1000)


def test_questionable_schedulers_are_warned_of(caplog):
    check_prior_scheduler(DDPMScheduler(**ANCESTRAL))
    assert not caplog.records
    check_prior_scheduler(DDPMScheduler(**(ANCESTRAL | {"clip_sample_range": 1.0})))
    assert "`clip_sample_range`=1.0" in caplog.text
    caplog.clear()
    check_prior_scheduler(UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0))
    assert "0.05 % too small" in caplog.text


def test_fix_stable_unclip_scheduler(caplog):
    published = {"_class_name": "UnCLIPScheduler", "clip_sample_range": 5.0, "prediction_type": "sample"}  # as Karlo's
    wrong = DDPMScheduler.from_config(UnCLIPScheduler.from_config(published).config)
    assert wrong.config.beta_schedule == "linear"
    caplog.clear()
    for scheduler in (published, UnCLIPScheduler.from_config(published), wrong, wrong.config):
        fixed = fix_stable_unclip_scheduler(scheduler).config
        assert (fixed.beta_schedule, fixed.timestep_spacing) == ("squaredcos_cap_v2", "linspace")
        assert (fixed.variance_type, fixed.clip_sample_range) == ("fixed_small_log", 5.0)
    assert not caplog.records
    fix_stable_unclip_scheduler(UnCLIPScheduler(prediction_type="sample"))
    assert "`clip_sample_range`=1.0" in caplog.text
    with pytest.raises(ValueError, match="`prediction_type`='epsilon'"):
        fix_stable_unclip_scheduler(DDPMScheduler())


# -- sampling


def test_candidates_and_rerank():
    pipe = make()
    arguments = {"num_inference_steps": 3, "num_candidates": 16, "num_images_per_prompt": 2}
    outputs = {
        mode: pipe(PROMPTS, **arguments, rerank=mode, generator=torch.Generator().manual_seed(0))
        for mode in ("cosine", "dot", None)
    }
    texts = pipe.encode_prompt(PROMPTS)[0].repeat_interleave(2, dim=0)
    for mode, output in outputs.items():
        candidates = output.candidates
        assert candidates.shape == (6, 16, 6) and torch.equal(candidates, outputs[None].candidates)
        torch.testing.assert_close(output.text_embeds, texts)
        dots = torch.einsum("bnd,bd->bn", candidates, texts)
        scores = dots / texts.norm(dim=1)[:, None]
        if mode != "dot":
            scores = scores / candidates.norm(dim=2)
        torch.testing.assert_close(output.scores, scores)
        best = [0] * 6 if mode is None else scores.argmax(dim=1).tolist()
        assert torch.equal(output.image_embeds, torch.stack([candidates[i, k] for i, k in enumerate(best)]))
        if mode is not None:
            assert len(set(best)) > 1
            prompts = [text for text in PROMPTS for _ in range(2)]
            torch.testing.assert_close(pipe.score(output.image_embeds, prompts, mode), scores.max(dim=1)[0])
    assert outputs["cosine"].scores.argmax(1).tolist() != outputs["dot"].scores.argmax(1).tolist()


def test_guidance():
    pipe = make().to(torch.float64)
    sizes = []
    pipe.prior.proj_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def run(prompt="a red three", **changes):
        arguments = {"num_inference_steps": 3, "num_candidates": 1, "generator": torch.Generator().manual_seed(0)}
        return pipe(prompt, **(arguments | changes)).image_embeds

    plain, empty = run(), run("")
    assert sizes == [1] * 6
    same = run(guidance_scale=3.0, negative_prompt="a red three")  # c - u = 0
    assert sizes[6:] == [2, 2, 2]
    torch.testing.assert_close(plain, same, rtol=0, atol=1e-6)
    torch.testing.assert_close(run(guidance_scale=0.0), empty, rtol=0, atol=1e-6)  # less than 1 is guidance too
    assert not torch.allclose(run(guidance_scale=3.0), plain, atol=1e-3)
    encoded = dict(zip(("embeds", "hidden_states", "mask"), pipe.encode_prompt("a cat"), strict=True))
    torch.testing.assert_close(
        run(guidance_scale=3.0, **{f"negative_prompt_{name}": tensor for name, tensor in encoded.items()}),
        run(guidance_scale=3.0, negative_prompt="a cat"),
    )
    with torch.no_grad():  # one step is the network's guided prediction
        predicted = [
            pipe.prior(torch.ones(1, 6).double(), 999, *pipe.encode_prompt(text)).predicted_image_embedding
            for text in ("a red three", "a cat")
        ]
        guided = pipe.prior.post_process_latents(predicted[1] + 3 * (predicted[0] - predicted[1]))
    arguments = {"latents": torch.ones(1, 6), "num_inference_steps": 1, "negative_prompt": "a cat"}
    torch.testing.assert_close(run(guidance_scale=3.0, **arguments), guided, rtol=0, atol=1e-5)


def test_negative_prompt_without_guidance_is_warned_of(caplog):
    pipe = make()
    pipe("a", negative_prompt="b", num_inference_steps=1)
    assert "`negative_prompt` has no effect" in caplog.text


def test_encoded_prompts_give_the_same():
    pipe = make()
    arguments = {"num_inference_steps": 2, "latents": torch.randn(6, 6)}
    embeds, hidden_states, mask = pipe.encode_prompt(PROMPTS)
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [11, 9, 6]
    encoded = {"prompt_embeds": embeds, "prompt_hidden_states": hidden_states, "prompt_mask": mask}
    expected = pipe(PROMPTS, **arguments).image_embeds
    torch.testing.assert_close(pipe(**encoded, **arguments).image_embeds, expected)
    pipe = UnCLIPPriorPipeline(pipe.prior, None, None, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipe(**encoded, **arguments).image_embeds, expected)
    with pytest.raises(ValueError, match="no `text_encoder`.*`prompt_embeds`"), no_model_runs(pipe):
        pipe(PROMPTS)
    with pytest.raises(ValueError, match="no `text_encoder`.*`negative_prompt_embeds`"), no_model_runs(pipe):
        pipe(**encoded, guidance_scale=2.0)
    # padding is masked, and the network is causal: what stands there does not matter
    encoded["prompt_hidden_states"] = torch.where(mask[..., None], hidden_states, 7.0)
    torch.testing.assert_close(pipe(**encoded, **arguments).image_embeds, expected, rtol=0, atol=1e-5)


def test_negative_image_embeds():
    pipe, arguments = make(), {"num_inference_steps": 1}
    blank = pipe.image_encoder(torch.zeros(1, 3, 16, 16)).image_embeds
    for kind, expected in ((None, blank), ("zero_image", blank), ("zeros", 0 * blank)):
        output = pipe(PROMPTS, negative_embeds=kind, **arguments)
        torch.testing.assert_close(output.negative_image_embeds, expected.detach().expand(3, -1))
    pipe = make(image_encoder=None)
    assert not pipe("a", **arguments).negative_image_embeds.any()
    with pytest.raises(ValueError, match="`negative_embeds` is 'zero_image'.*`image_encoder`"), no_model_runs(pipe):
        pipe("a", negative_embeds="zero_image")


# -- the stock pipeline of Kandinsky 2.2


def test_stock_pipeline_takes_the_prior(tmp_path):
    """The saved `prior` loads in Kandinsky's prior pipeline, which gives the same embeddings."""
    pipe = make(scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prior"] == ["diffusers", "PriorTransformer"]
    parts = {name: part for name, part in pipe.components.items() if name not in ("prior", "image_processor")}
    stock = KandinskyV22PriorPipeline(
        prior=PriorTransformer.from_pretrained(tmp_path, subfolder="prior"), image_processor=None, **parts
    )
    stock.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 10, "latents": torch.randn(2, 6)}
    for scale in (1.0, 4.0):
        theirs, ours = (
            one(PROMPTS[:2], guidance_scale=scale, generator=torch.Generator().manual_seed(0), **arguments, **changes)
            for one, changes in ((stock, {}), (pipe, {"num_candidates": 1}))
        )
        torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.negative_image_embeds, theirs.negative_image_embeds)
        # the same steps of DDPM, whose last one is right
        other = UnCLIPPriorPipeline.from_pipe(stock, scheduler=fix_stable_unclip_scheduler(pipe.scheduler))
        mean, std = pipe.prior.clip_mean, pipe.prior.clip_std
        exact = other(
            PROMPTS[:2],
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
            num_candidates=1,
            **arguments,
        ).image_embeds
        torch.testing.assert_close(
            mean + 0.9994723 * (exact - mean), theirs.image_embeds, rtol=0, atol=2e-5 * std.max()
        )

    # There a negative prompt takes the empty one's place, and its own embeddings are what the decoder leaves.
    arguments = {"num_inference_steps": 10, "latents": torch.randn(4, 6), "guidance_scale": 4.0}
    theirs = stock(PROMPTS[:2], negative_prompt=["grey", ""], generator=torch.Generator().manual_seed(0), **arguments)
    ours = pipe(
        [*PROMPTS[:2], "grey", ""],
        negative_prompt=["grey", ""] * 2,
        generator=torch.Generator().manual_seed(0),
        num_candidates=1,
        **arguments,
    ).image_embeds
    torch.testing.assert_close(ours[:2], theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[2:], theirs.negative_image_embeds, rtol=0, atol=1e-5)


def test_a_prior_without_hidden_states_is_causal():
    """Without a mask `PriorTransformer` would see all tokens from each, which is not what priors are trained with."""
    prior = make_prior(encoder_hid_proj_type=None, num_embeddings=0, num_layers=2)
    pipe = UnCLIPPriorPipeline(prior, None, None, default_prior_scheduler())
    pipe.set_progress_bar_config(disable=True)
    embeds, noise = torch.randn(2, 6), torch.randn(2, 6)
    ours = pipe(prompt_embeds=embeds, latents=noise, num_inference_steps=1, num_candidates=1).image_embeds
    with torch.no_grad():
        causal, other = (
            prior.post_process_latents(prior(noise, 999, embeds, None, mask).predicted_image_embedding)
            for mask in (torch.ones(2, 0, dtype=torch.bool), None)
        )
    torch.testing.assert_close(ours, causal)
    assert (ours - other).abs().max() > 1e-4


# -- loading without the package


@pytest.mark.parametrize("cls", [PriorTransformer, UnCLIPPriorTransformer])
def test_repo_loads_without_the_package(cls, tmp_path):
    changes = {}
    if cls is UnCLIPPriorTransformer:
        changes = {"prior": make_prior(cls=cls, encoder_hid_dim=8), "text_encoder": make_text_encoder(6, 8)}
    pipe = make(**changes, embed_norm="l2", clip_model_id="me/clip")
    pipe.save_pretrained(tmp_path / "repo")
    latents = torch.linspace(-1, 1, 12).reshape(2, 6)
    expected = pipe("a red three", num_inference_steps=3, latents=latents).image_embeds
    for loaded in (UnCLIPPriorPipeline.from_pretrained(tmp_path / "repo"), DiffusionPipeline.from_pretrained(tmp_path / "repo")):  # fmt: skip  # noqa: E501
        assert type(loaded) is UnCLIPPriorPipeline and type(loaded.prior) is cls
        assert (loaded.config.embed_norm, loaded.config.clip_model_id) == ("l2", "me/clip")
        torch.testing.assert_close(
            loaded("a red three", num_inference_steps=3, latents=latents).image_embeds, expected, rtol=0, atol=1e-6
        )
    code = """
    import importlib.util, sys
    import torch
    from diffusers import DiffusionPipeline
    assert importlib.util.find_spec("diffusers_ext") is None
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert pipe.config.embed_norm == "l2"
    latents = torch.linspace(-1, 1, 12).reshape(2, 6)
    print(pipe("a red three", num_inference_steps=3, latents=latents).image_embeds.tolist())
    """
    python = make_reader(tmp_path / "env", ("diffusers", "torch", "transformers"))
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code), tmp_path / "repo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    embeds = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


# -- images


def test_images_of_every_kind():
    pipe = make()
    square = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        expected = pipe.image_encoder((square - mean) / std).image_embeds
    torch.testing.assert_close(pipe.encode_image(square), expected)
    torch.testing.assert_close(pipe.encode_image([square[0], square[1].permute(1, 2, 0).numpy()]), expected)
    pixels = (square * 255).round()
    images = [Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy()) for image in pixels]
    torch.testing.assert_close(pipe.encode_image(images), pipe.encode_image(pixels / 255))
    # larger ones: resized by the shorter side, cut in the middle
    wide = Image.fromarray(np.tile(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], (48, 1, 3)))
    resized = torch.from_numpy(np.array(wide.resize((32, 16), Image.Resampling.BICUBIC))) / 255
    middle = resized[:, 8:24].permute(2, 0, 1)
    torch.testing.assert_close(
        pipe.encode_image([wide, images[0]])[:1], pipe.encode_image(middle), rtol=0.02, atol=0.02
    )
    with pytest.raises(ValueError, match=r"`images` has values in \[-0.99"):
        pipe.encode_image(2 * square - 1)
    with pytest.raises(ValueError, match="`images` is empty"):
        pipe.encode_image([])
    with pytest.raises(TypeError, match="`images` has dtype torch.uint8"):
        pipe.encode_image(pixels.byte())
    with pytest.raises(ValueError, match="no `image_encoder`"):
        make(image_encoder=None).encode_image(square)


def test_image_processor_is_used(tmp_path):
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pipe, plain = make(image_processor=CLIPImageProcessor(**crop)), make()
    images, seen = torch.rand(2, 3, 24, 40), []
    for one in (pipe, plain, make(image_processor=CLIPImageProcessor(**crop, do_normalize=False))):
        one.image_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        one.encode_image(images)
    assert (seen[0] - seen[1]).abs().mean() < 0.01, "but for 8 bits per color, the same"
    assert 0 <= seen[2].min() < seen[2].max() <= 1
    pipe.save_pretrained(tmp_path)
    loaded = UnCLIPPriorPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode_image(images), pipe.encode_image(images))


# -- manipulations


@pytest.fixture
def bare():
    """A pipeline for recorded embeddings of width 8, without a CLIP."""
    return UnCLIPPriorPipeline(make_prior(8), None, None, default_prior_scheduler())


def test_recorded_manipulations(bare, recorded):
    g = recorded("g7_manipulations")
    z1, z2, theta = g["z1"], g["z2"], g["theta"]
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(slerp(z1, z2, theta), g["slerp"], **close)
    torch.testing.assert_close(slerp(z1, z2, 0.25), g["slerp"][1], **close)
    assert (slerp(z1, z2, theta) - g["community_slerp_WRONG"]).abs().max() > 0.1
    lengths = [z.norm(dim=1, keepdim=True) for z in (z1, z2)]
    units = [z / length for z, length in zip((z1, z2), lengths, strict=True)]
    torch.testing.assert_close(bare.interpolate(*units, theta), g["slerp_unit"], **close)
    path = bare.interpolate(z1, z2, theta.tolist())
    places = theta[:, None, None]
    torch.testing.assert_close(path, g["slerp_unit"] * (lengths[0] + places * (lengths[1] - lengths[0])), **close)
    line = bare.interpolate(z1, z2, theta, mode="lerp")
    torch.testing.assert_close(line, z1 + places * (z2 - z1), **close)
    assert torch.equal(bare.interpolate(z1, z2, 0.5), path[2])

    changed = bare.text_diff(z1, g["z_text"], g["z_text0"], theta_max=0.5, num=5)
    torch.testing.assert_close(changed, g["text_diff_rescaled"], **close)
    toward = bare.text_diff(z1, g["z_text"], source=None, num=2)[1]
    text_unit = g["z_text"] / g["z_text"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(toward, lengths[0] * slerp(units[0], text_unit, 0.5), **close)

    with pytest.raises(ValueError, match="`fit_pca`"):
        bare.pca_reconstruct(g["pca_query"], 3)
    torch.testing.assert_close(bare.fit_pca(g["pca_train"]), g["pca_singular"], rtol=0, atol=1e-10)
    for count in (1, 3, 5, 8):
        found = bare.pca_reconstruct(g["pca_query"], count)
        torch.testing.assert_close(found, g[f"pca_recon_k{count}"], rtol=0, atol=1e-10)
    torch.testing.assert_close(bare.pca_reconstruct(g["pca_query"], 0), g["pca_mean"].expand(3, -1))


def test_slerp_at_its_limits():
    a = torch.tensor([[3.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    b = a * torch.tensor([[2.0], [1.0]])
    torch.testing.assert_close(slerp(a, b, 0.5), (a + b) / 2)  # parallel
    b = a + torch.tensor([0, 1e-5, 0])  # nearly so
    torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=0, atol=1e-10)
    images = torch.randn(2, 3, 4, 4)
    assert slerp(images, images.flip(0), [0.1, 0.9]).shape == (2, 2, 3, 4, 4)
    half = slerp(torch.tensor([[1.0, 0.0]], dtype=torch.float16), torch.tensor([[0.0, 1.0]], dtype=torch.float16), 0.5)
    assert half.dtype == torch.float16 and abs(half[0, 0].item() - 0.7071) < 1e-3
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
    for end in (0 * a, a / 0, a * math.nan):
        with pytest.raises(ValueError, match="a row of zeros, or one that is not finite"):
            slerp(a, end, 0.5)
    with pytest.raises(ValueError, match=r"`a` has shape \(2, 3\) and `b` \(1, 3\)"):
        slerp(a, a[:1], 0.5)


def test_manipulations_of_images_and_texts():
    pipe = make()
    images = torch.rand(2, 3, 20, 20)
    embeds = pipe.encode_image(images)
    path = pipe.interpolate(images[:1], images[1:], [0.0, 1.0])
    torch.testing.assert_close(path[:, 0], embeds)
    changed = pipe.text_diff(images, ["a red three", "a 4"], "a photo", num=3)
    torch.testing.assert_close(changed[0], embeds)
    torch.testing.assert_close(changed.norm(dim=2), embeds.norm(dim=1).expand(3, -1))
    direction = pipe.encode_prompt(["a red three", "a 4"])[0] - pipe.encode_prompt("a photo")[0]
    angles = torch.nn.functional.cosine_similarity(changed, direction.expand_as(changed), dim=2).arccos()
    torch.testing.assert_close(angles[1], angles[0] * 0.75)
    torch.testing.assert_close(angles[2], angles[0] * 0.5)

    call = {"num_inference_steps": 2, "latents": torch.randn(2, 6)}
    mixed = pipe.blend(["a red three", images[0], embeds[1], embeds[:1]], [0.5, 0.2, 0.2, -0.1], **call)
    expected = 0.5 * pipe("a red three", **call).image_embeds + 0.1 * embeds[:1] + 0.2 * embeds[1:]
    torch.testing.assert_close(mixed, expected)
    unit = make(embed_norm="l2").blend([images[0]], [1.0])
    torch.testing.assert_close(unit, embeds[:1] / embeds[:1].norm())

    broken = embeds.clone()
    broken[1, 2] = math.inf
    for call, message in (
        (lambda: pipe.blend(["a"], [1, 2]), "`items` has 1 entries and `weights` 2"),
        (lambda: pipe.blend([images], [1]), "`items` has an entry of 2 embeddings"),
        (lambda: pipe.interpolate(embeds, embeds[:1]), "`a` has 2 embeddings and `b` 1"),
        (lambda: pipe.interpolate(embeds[:, :5], embeds), r"`a` is \(2, 5\), but .*\(batch, 6\)"),
        (lambda: pipe.interpolate(embeds, embeds, mode="cubic"), "`mode` is 'cubic'"),
        (lambda: pipe.interpolate(embeds, embeds, [0.5, 1.5]), r"`theta` is \[0.5, 1.5\]"),
        (lambda: pipe.interpolate(embeds, embeds, math.nan), "`theta` is nan"),
        (lambda: pipe.interpolate(embeds, embeds, [[0.5]]), r"`theta` is \[\[0.5\]\]"),
        (lambda: pipe.interpolate(embeds, broken), "`b` is not finite in row 1"),
        (lambda: pipe.fit_pca(broken), "`image_embeds` is not finite in row 1"),
        (lambda: pipe.text_diff(embeds, "a", "a"), "`target` and `source` have the same embedding"),
        (lambda: pipe.text_diff(embeds, ["a"] * 3), "`target` has 3 entries for 2 images"),
        (lambda: pipe.text_diff(embeds, "a", theta_max=1.5), "`theta_max` is 1.5"),
        (lambda: pipe.score(embeds, ["a"] * 3), "`prompt` has 3 entries for 2"),
        (lambda: pipe.score(embeds, "a", "l2"), "`mode` is 'l2'"),
        (lambda: pipe.fit_pca(embeds[:1]), "`image_embeds` has 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe.fit_pca(torch.randn(4, 6))
    with pytest.raises(ValueError, match="`num_components` is 5, .* 0 to 4"):
        pipe.pca_reconstruct(embeds, 5)


# -- decoders


def make_kandinsky(width=6):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=width,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        in_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        out_channels=3,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        vq_embed_dim=4,
    )
    return KandinskyV22Pipeline(unet, DDIMScheduler(), movq)


def make_karlo(width=6):
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    torch.manual_seed(0)
    decoder = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    large = UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
    )
    projection = UnCLIPTextProjModel(clip_embeddings_dim=width, time_embed_dim=128, cross_attention_dim=16)
    scheduler = UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon")
    return UnCLIPImageVariationPipeline(
        decoder=decoder,
        text_encoder=make_text_encoder(width, width),
        tokenizer=byte_tokenizer(16),
        text_proj=projection,
        feature_extractor=None,
        image_encoder=make_image_encoder(width),
        super_res_first=large,
        super_res_last=large,
        decoder_scheduler=scheduler,
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )


def make_stable_unclip(width=6):
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        attention_head_dim=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width,
        cross_attention_dim=6,
        layers_per_block=1,
    )
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=make_image_encoder(width),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=byte_tokenizer(16),
        text_encoder=CLIPTextModel(make_text_encoder().config),
        unet=unet,
        scheduler=DDIMScheduler(),
        vae=AutoencoderKL(norm_num_groups=8, block_out_channels=(8,), layers_per_block=1),
    )


def test_decoders_take_what_is_handed_over():
    pipe = make()
    output = pipe(PROMPTS[:2], num_inference_steps=2)
    kandinsky, karlo, stable = make_kandinsky(), make_karlo(), make_stable_unclip()
    for decoder in (kandinsky, karlo, stable):
        decoder.set_progress_bar_config(disable=True)
    short = {"num_inference_steps": 2, "output_type": "pt"}
    arguments = pipe.to_kandinsky22(output, decoder=kandinsky)
    torch.testing.assert_close(arguments["negative_image_embeds"], output.negative_image_embeds)
    assert kandinsky(**arguments, height=16, width=16, **short).images.shape[0] == 2
    arguments = pipe.to_karlo(output, decoder=karlo)
    images = karlo(
        **arguments, decoder_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (2, 16, 16, 3)
    arguments = pipe.to_stable_unclip(output, noise_level=5, decoder=stable)
    assert stable(prompt=["a", "b"], **arguments, **short).images.shape[0] == 2
    # embeddings alone, arrays, another call's as negative ones
    negative = pipe("blurry", num_inference_steps=2, output_type="np").image_embeds
    arguments = pipe.to_kandinsky22(output.image_embeds.numpy(), negative, kandinsky)
    torch.testing.assert_close(arguments["negative_image_embeds"], torch.from_numpy(negative).expand(2, -1))
    arguments = pipe.to_kandinsky22(output.image_embeds, decoder=kandinsky)
    torch.testing.assert_close(arguments["negative_image_embeds"], output.negative_image_embeds)
    half = pipe.to_kandinsky22(output, decoder=kandinsky.to(torch.bfloat16))
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())


def test_misfits_are_not_handed_over(caplog):
    pipe = make(clip_model_id="openai/clip-vit-base-patch32")
    output = pipe(PROMPTS[:2], num_inference_steps=2)
    decoder = SimpleNamespace(text_proj=SimpleNamespace(config=SimpleNamespace(clip_embeddings_dim=6)))
    decoder._execution_device, decoder.dtype = "cpu", torch.float32
    for call, message in (
        (lambda: pipe.to_kandinsky22(output), "width 6, but Kandinsky 2.2 takes 1280"),
        (lambda: pipe.to_karlo(output), "width 6, but Karlo takes 768"),
        (lambda: pipe.to_stable_unclip(output), "width 6, but Stable unCLIP takes 1024 or 768"),
        (lambda: pipe.to_stable_unclip(output, noise_level=1000), "`noise_level` is 1000"),
        (lambda: pipe.to_karlo(output.image_embeds[:, :5]), r"`image_embeds` is \(2, 5\)"),
        (lambda: pipe.to_karlo(output.image_embeds * 5, decoder), "`image_embeds` has lengths"),
        (lambda: pipe.to_karlo(output.image_embeds / 5, decoder), "`image_embeds` has lengths"),
        (lambda: pipe.to_kandinsky22(output.image_embeds, torch.zeros(3, 6), make_kandinsky()), "has 3 entries for 2"),
        (lambda: make(embed_norm="l2").to_karlo(output, decoder), "`embed_norm` is 'l2'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    caplog.clear()
    pipe.to_karlo(output, decoder)
    assert "Karlo was trained with ViT-large-patch14" in caplog.text


# -- a new prior


def test_init_prior():
    embeds = torch.randn(4000, 6) * torch.arange(1, 7) + 5
    prior = PriorTransformer(2, 8, 1, embedding_dim=6, num_embeddings=16)
    init_prior(prior, embeds)
    torch.testing.assert_close(prior.clip_mean[0], embeds.mean(0))
    torch.testing.assert_close(prior.clip_std[0], embeds.std(0))
    for tokens in (prior.positional_embedding, prior.prd_embedding):
        assert 0.003 < tokens.std() < 0.02 and tokens.requires_grad
    assert not prior.clip_mean.requires_grad and not prior.clip_std.requires_grad
    for scale, expected in ((None, math.sqrt(6)), (17.2, 17.2)):
        init_prior(prior, embeds, "l2", scale)
        assert not prior.clip_mean.any()
        torch.testing.assert_close(prior.clip_std, torch.full((1, 6), 1 / expected))
    broken = embeds.clone()
    broken[7, 2] = math.nan
    for arguments, message in (
        ((embeds[:, :5],), r"shape \(4000, 5\), but must be \(n, 6\)"),
        ((embeds[:1],), "n of at least 2"),
        ((broken,), "not finite in row 7"),
        ((torch.ones(5, 6),), "constant in dimension 0"),
        ((torch.full((7, 6), 0.1),), "constant in dimension 0"),  # the mean of which is rounded
        ((embeds, "unit"), "`embed_norm` is 'unit'"),
        ((embeds, "standardize", 2.0), "`embed_scale` is 2.0"),
        ((embeds, "l2", 0.0), "`embed_scale` is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            init_prior(prior, *arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_prior_without_statistics_is_refused(value):
    pipe = make()
    pipe.prior.clip_std.data[0, 3] = value
    with pytest.raises(ValueError, match=r"`prior.clip_std` is not positive.*`init_prior"), no_model_runs(pipe):
        pipe("a")


def test_own_network_has_hidden_states_of_any_width(tmp_path):
    prior = make_prior(cls=UnCLIPPriorTransformer, encoder_hid_dim=10)
    assert prior.encoder_hidden_states_proj.in_features == 10 and prior.config.encoder_hid_dim == 10
    prior.save_pretrained(tmp_path)
    loaded = UnCLIPPriorTransformer.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert dict(loaded.config)["encoder_hid_dim"] == 10 and loaded.config.embedding_dim == 6
    assert all(torch.equal(value, state[name]) for name, value in prior.state_dict().items())
    stock = make_prior()
    own = UnCLIPPriorTransformer.from_config(stock.config)
    assert {name: value.shape for name, value in own.state_dict().items()} == {
        name: value.shape for name, value in stock.state_dict().items()
    }


# -- bad input


def changed_tokenizer(**changes):
    tokenizer = byte_tokenizer(16)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {"text_encoder": make_text_encoder(5, 6)}, "embeddings of width 5, but `prior` takes 6"),
        (lambda: {"text_encoder": make_text_encoder(6, 8)}, "hidden states of width 8, .*`encoder_hid_dim`"),
        (lambda: {"image_encoder": make_image_encoder(8)}, "`image_encoder` gives embeddings of width 8"),
        (lambda: {"prior": make_prior(clip_embed_dim=6, num_embeddings=12)}, "reads 12 tokens"),
        (lambda: {"tokenizer": byte_tokenizer(32)}, "`tokenizer` cuts at 32"),
        (
            lambda: {"tokenizer": changed_tokenizer(model_max_length=int(1e30))},
            "cuts at 1000.* set `tokenizer.model_max_length`",
        ),
        (lambda: {"tokenizer": changed_tokenizer(model_max_length=None)}, "cuts at None"),
        (lambda: {"tokenizer": CLIPTokenizer(model_max_length=16)}, "none but special ones"),
        (lambda: {"tokenizer": changed_tokenizer(padding_side="left")}, "'padding_side': 'left'"),
        (lambda: {"tokenizer": changed_tokenizer(truncation_side="left")}, "'truncation_side': 'left'"),
        (lambda: {"tokenizer": changed_tokenizer(pad_token=None)}, "`pad_token` None"),
        (lambda: {"tokenizer": changed_tokenizer(eos_token=None)}, "ends texts with the id None"),
        (
            lambda: {
                "tokenizer": changed_tokenizer(eos_token="a"),
                "text_encoder": make_text_encoder(eos_token_id=64),
            },
            r"the empty one is \[512, 513\].* looks for the first 64",
        ),
        (
            lambda: {"text_encoder": make_text_encoder(eos_token_id=49407)},
            r"id 513 .*, but `text_encoder` looks for the first 49407",
        ),
        (lambda: {"text_encoder": make_text_encoder(vocab_size=400)}, "ids up to 513, but `text_encoder` knows 400"),
        (lambda: {"embed_norm": "none"}, "`embed_norm` is 'none'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "parts",
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        make(**parts())


def test_prior_that_predicts_another_width():
    prior = PriorTransformer(2, 8, 1, embedding_dim=6, num_embeddings=16, clip_embed_dim=7)
    with pytest.raises(ValueError, match="`prior` predicts width 7"):
        make(prior=prior)


def test_the_wrong_end_of_text_would_make_all_texts_the_same():
    """What the refusal is about, and the old id 2, which pools rightly."""
    tokens = byte_tokenizer(16)(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    wrong = make_text_encoder(eos_token_id=49407)(tokens).text_embeds
    torch.testing.assert_close(wrong[0], wrong[1])
    right, old = make_text_encoder(), make_text_encoder(eos_token_id=2)
    assert not torch.allclose(right(tokens).text_embeds[0], right(tokens).text_embeds[1])
    torch.testing.assert_close(make(text_encoder=old).encode_prompt(PROMPTS)[0], right(tokens).text_embeds.detach())


def test_a_long_prompt_is_cut_and_said(caplog):
    pipe = make()
    prompt = "a prompt that is much too long"
    embeds, _, mask = pipe.encode_prompt(["short", prompt])
    assert caplog.text.count("This was left out") == 1
    assert "has 26 tokens, and CLIP reads 16" in caplog.text and "'uch too long'" in caplog.text
    assert mask[1].all() and mask[0].sum() == 7
    read = [*pipe.tokenizer(prompt, verbose=False).input_ids[:15], pipe.tokenizer.eos_token_id]
    torch.testing.assert_close(embeds[1:], pipe.text_encoder(torch.tensor([read])).text_embeds)


def test_special_tokens_in_a_prompt_are_text():
    pipe = make()
    first, second = (pipe.encode_prompt(f"a<|endoftext|>{word}")[0] for word in ("x", "y"))
    assert not torch.allclose(*(pipe.encode_prompt(text)[0] for text in ("a<|", "b<|")))
    assert pipe.encode_prompt("a<|endo")[2].sum() == 9
    assert first.shape == second.shape


def test_characters_that_end_a_text_are_refused():
    """A small vocabulary may give the end of text for what it lacks, where CLIP would stop reading."""
    vocab = {symbol: i for i, symbol in enumerate(["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"])}
    pipe = make(
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        text_encoder=make_text_encoder(vocab_size=6, bos_token_id=4, eos_token_id=5, pad_token_id=5),
    )
    first, second = pipe.encode_prompt(["a b", "a a"])[0]
    assert not torch.allclose(first, second)
    for method in (pipe.encode_prompt, pipe):
        with pytest.raises(ValueError, match="`prompt` has 'a zb', .* after 'a'"), no_model_runs(pipe):
            method(["b", "a zb"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": None}, ValueError, "`prompt` is missing"),
        ({"prompt": 5}, TypeError, "`prompt` is 5"),
        ({"prompt": []}, ValueError, "`prompt` has 0 entries"),
        ({"negative_prompt": [1]}, TypeError, r"`negative_prompt` is \[1\]"),
        ({"negative_prompt": ["a"] * 3}, ValueError, "`prompt` has 2 entries and `negative_prompt` 3"),
        ({"prompt_embeds": torch.zeros(2, 6)}, ValueError, "both given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 5)}, ValueError, r"`prompt_embeds` is of shape \(2, 5\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 6)}, ValueError, "`prompt_hidden_states` is missing"),
        ({"prompt": None, "prompt_embeds": [[0.0] * 6]}, ValueError, "`prompt_embeds` is a list"),
        ({"prompt": None, "prompt_embeds": torch.full((2, 6), math.nan)}, ValueError, "`prompt_embeds` is not finite"),
        ({"prompt_hidden_states": torch.zeros(2, 16, 6)}, ValueError, "go with `prompt_embeds`, which is missing"),
        ({"negative_prompt_mask": torch.zeros(1, 16)}, ValueError, "go with `negative_prompt_embeds`"),
        ({"latents": torch.full((4, 6), math.inf)}, ValueError, "`latents` .* finite"),
        ({"num_candidates": 0}, ValueError, "`num_candidates` is 0"),
        ({"num_images_per_prompt": 1.5}, ValueError, "`num_images_per_prompt` is 1.5"),
        ({"guidance_scale": math.nan}, ValueError, "`guidance_scale` is nan"),
        ({"rerank": "l2"}, ValueError, "`rerank` is 'l2'"),
        ({"negative_embeds": "black"}, ValueError, "`negative_embeds` is 'black'"),
        ({"latents": torch.zeros(2, 6)}, ValueError, r"`latents` has shape \(2, 6\), but this call needs \(4, 6\)"),
    ],
    ids=str,
)
def test_calls_that_are_refused(changes, error, message):
    pipe = make()
    with pytest.raises(error, match=message), no_model_runs(pipe):
        pipe(**({"prompt": PROMPTS[:2]} | changes))


def test_embeddings_that_are_not_finite_are_refused():
    pipe = make()
    pipe.prior.proj_in.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        pipe("a", num_inference_steps=2)


def test_texts_and_images_of_different_width_cannot_be_compared(recorded):
    g = recorded("g9_gaussian_truth")
    pipe = make_gaussian(g, default_prior_scheduler(), g["alphas_cumprod"])
    with pytest.raises(ValueError, match=r"`None` where the embeddings of texts \(3\) and images \(4\)"):
        pipe(prompt_embeds=torch.zeros(1, 3))
    assert pipe(prompt_embeds=torch.zeros(1, 3), rerank=None, num_inference_steps=2).scores is None
