"""Classifier guidance: recorded trajectories, an independent program for every setting, and what users do with it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from hub_server import HubServer
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusers_ext import (
    ClassifierGradient,
    ClassifierGuidanceGuider,
    ClassifierGuidancePipeline,
    ClipGuidance,
    CoPaintPipeline,
    GuidedScheduler,
    NoisyClassifier,
)
from diffusers_ext.pipelines import classifier_guidance as module
from diffusers_ext.pipelines.classifier_guidance import noise_levels, space_timesteps

GOLDENS = Path(__file__).parent / "goldens" / "guidance"
RECORDED = sorted(path.stem.removeprefix("sample_") for path in GOLDENS.glob("sample_*.npz"))
CASES = json.loads((GOLDENS / "samples_index.json").read_text())
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}


# -------------------------------------------------------------------------------------------- timesteps and schedules


def test_timestep_lists_equal_the_recorded_ones():
    recorded = json.loads((GOLDENS / "timesteps.json").read_text())
    for key, expected in recorded.items():
        total, spec = key.split("|")
        if isinstance(expected, dict):
            with pytest.raises(ValueError, match="timestep_respacing"):
                space_timesteps(int(total), spec)
        else:
            assert space_timesteps(int(total), spec) == expected, key
    assert len(recorded) > 40


def test_tables_equal_the_recorded_ones():
    recorded = np.load(GOLDENS / "schedules.npz")
    checked = 0
    for key in {name.rsplit("|", 1)[0] for name in recorded}:
        schedule, total, spec = key.split("|")
        scheduler = GuidedScheduler(
            int(total),
            1000 / int(total) * 1e-4,
            1000 / int(total) * 0.02,
            {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        )
        kept = recorded[f"{key}|timestep_map"].tolist()
        scheduler.set_timesteps(timesteps=kept[::-1])
        levels = scheduler.alphas_cumprod[kept].numpy()
        # The recorded ones were multiplied up again from betas near one, which costs the last digits.
        np.testing.assert_allclose(levels, recorded[f"{key}|alphas_cumprod"], rtol=1e-9 if spec else 1e-12)
        if spec:
            small = [scheduler.log_variance(t) for t in kept]
            np.testing.assert_allclose([x for x, _ in small], recorded[f"{key}|posterior_variance"], rtol=1e-10)
            logarithms = recorded[f"{key}|posterior_log_variance_clipped"]
            np.testing.assert_allclose([x for _, x in small], logarithms, rtol=1e-11)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing was given"),
        ({"num_inference_steps": 5, "timestep_respacing": "5"}, "give one of"),
        ({"num_inference_steps": 1}, "from 2 to 1000"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"timestep_respacing": "ddim30x"}, "such as '250'"),
        ({"timestep_respacing": "ddim999"}, "no stride through 1000.*write '999'"),
        ({"timestep_respacing": "10,600"}, "section 2 has 500"),
        ({"timestep_respacing": "1"}, "at least two"),
        ({"timesteps": [3, 5]}, "falling"),
        ({"timesteps": [1000, 5]}, "at most 999"),
    ],
)
def test_bad_timesteps(arguments, message):
    with pytest.raises(ValueError, match=message):
        GuidedScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sampler": "euler"}, "'ancestral' or 'ddim'"),
        ({"variance_type": "big"}, "`variance_type` is 'big'"),
        ({"prediction_type": "flow"}, "`prediction_type` is 'flow'"),
        ({"beta_schedule": "cubic"}, "`beta_schedule` is 'cubic'"),
        ({"rescale_betas_zero_snr": True}, "pure noise"),
    ],
)
def test_bad_schedulers(config, message):
    with pytest.raises(ValueError, match=message):
        GuidedScheduler(**config)


# ---------------------------------------------------------------------------------- samplers: recordings and oracle


def scheduler_of(case):
    scale = 1000 / case["steps"]
    return GuidedScheduler(
        case["steps"],
        scale * 1e-4,
        scale * 0.02,
        {"linear": "linear", "cosine": "squaredcos_cap_v2"}[case["schedule"]],
        prediction_type="sample" if case["predict_xstart"] else "epsilon",
        variance_type=(
            "learned_range" if case["learn_sigma"] else "fixed_small" if case["sigma_small"] else "fixed_large"
        ),
        sampler={"p": "ancestral", "d": "ddim"}[case["kind"]],
        rescale_timesteps=case["rescale_timesteps"],
    )


class AnalyticUNet(ModelMixin, ConfigMixin):
    """The recordings' network: Gaussian data's exact prediction, a ripple, and variances that leave [-1, 1]."""

    @register_to_config
    def __init__(self, in_channels=3, out_channels=6, sample_size=4, predict_xstart=False):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.zeros(3, 4, 4))

    def forward(self, sample, timestep, class_labels=None):
        tau = timestep.reshape(-1, 1, 1, 1).to(sample.dtype) / 1000
        level = torch.exp(-(0.1 * tau + 9.95 * tau**2))
        spread, ripple = 0.25 * level + 1 - level, 0.05 * torch.sin(2 * sample + 10 * tau)
        if self.config.predict_xstart:
            output = (0.25 * level.sqrt() * sample + (1 - level) * self.mu) / spread + ripple
        else:
            output = (1 - level).sqrt() * (sample - level.sqrt() * self.mu) / spread + ripple
        if self.config.out_channels == 6:
            output = torch.cat([output, 1.3 * torch.sin(1.5 * sample + 20 * tau)], dim=1)
        return UNet2DOutput(sample=output)


class AnalyticClassifier(torch.nn.Module):
    def __init__(self, centers):
        super().__init__()
        self.centers = centers

    def forward(self, sample, timestep):
        weight = 0.02 + 0.2 * (1 - timestep.to(sample.dtype) / 1000)
        return -weight[:, None] / 2 * (sample[:, None] - self.centers).square().flatten(2).sum(-1)


def inputs_of(name):
    """Start, noises, mean, centers and labels of any recording: what they are does not depend on the setting."""
    recorded = np.load(GOLDENS / f"sample_{name}.npz")
    return {key: recorded[key] for key in ("x_T", "noise", "mu", "centers", "y")}


def keep_known():
    known = np.load(GOLDENS / "inpaint_inputs.npz")
    return lambda x: x * (1 - known["mask"]) + known["image"] * known["mask"] ** 2


def program(case, data):
    """The samplers in NumPy, from the formulas: https://huggingface.co/papers/2105.05233, algorithms 1 and 2."""
    total, kept = case["steps"], space_timesteps(case["steps"], case["spec"])
    if case["schedule"] == "linear":
        betas = np.linspace(1000 / total * 1e-4, 1000 / total * 0.02, total)
    else:

        def alpha_bar(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / total) / alpha_bar(i / total), 0.999) for i in range(total)]
    abar = np.cumprod(1 - np.asarray(betas))[kept]
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    clipped = np.append(posterior[1], posterior[1:])
    x, mu, centers, y = data["x_T"], data["mu"], data["centers"], data["y"]
    for step, i in enumerate(reversed(range(len(kept)))):
        t = kept[i] * (1000 / total if case["rescale_timesteps"] else 1)
        tau = t / 1000
        level = math.exp(-(0.1 * tau + 9.95 * tau**2))
        ripple = 0.05 * np.sin(2 * x + 10 * tau)
        if case["predict_xstart"]:
            x0 = (0.25 * level**0.5 * x + (1 - level) * mu) / (0.25 * level + 1 - level) + ripple
        else:
            eps = (1 - level) ** 0.5 * (x - level**0.5 * mu) / (0.25 * level + 1 - level) + ripple
            x0 = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        weight = 0.02 + 0.2 * (1 - tau)
        logits = -weight / 2 * ((x[:, None] - centers) ** 2).sum((2, 3, 4))
        odds = np.exp(logits - logits.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        gradient = case["scale"] * weight * (centers[y] - np.einsum("nk,kchw->nchw", odds, centers))
        if case["denoised_fn"]:
            x0 = keep_known()(x0)
        if case["clip_denoised"]:
            x0 = x0.clip(-1, 1)
        noise = data["noise"][step] * (i != 0)
        if case["kind"] == "p":
            if case["learn_sigma"]:
                share = (1.3 * np.sin(1.5 * x + 20 * tau) + 1) / 2
                logarithm = share * np.log(beta[i]) + (1 - share) * np.log(clipped[i])
                variance = np.exp(logarithm)
            elif case["sigma_small"]:
                variance, logarithm = posterior[i], np.log(clipped[i])
            else:
                variance = posterior[1] if i == 0 else beta[i]
                logarithm = np.log(variance)
            mean = beta[i] * before[i] ** 0.5 / (1 - abar[i]) * x0
            mean = mean + (1 - before[i]) * (1 - beta[i]) ** 0.5 / (1 - abar[i]) * x
            x = mean + variance * gradient + np.exp(logarithm / 2) * noise
        else:
            eps = (x - abar[i] ** 0.5 * x0) / (1 - abar[i]) ** 0.5 - (1 - abar[i]) ** 0.5 * gradient
            x0 = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
            sigma = case["eta"] * ((1 - before[i]) / (1 - abar[i])) ** 0.5 * (1 - abar[i] / before[i]) ** 0.5
            x = before[i] ** 0.5 * x0 + (1 - before[i] - sigma**2) ** 0.5 * eps + sigma * noise
    return x


def sample(case, data, dtype, monkeypatch):
    """The same through the pipeline."""
    unet = AnalyticUNet(out_channels=6 if case["learn_sigma"] else 3, predict_xstart=case["predict_xstart"])
    data = {key: torch.from_numpy(value) for key, value in data.items()}
    unet.mu.data = data["mu"]
    pipe = ClassifierGuidancePipeline(unet.to(dtype), scheduler_of(case))
    pipe.set_progress_bar_config(disable=True)
    draws = iter(data["noise"].to(dtype))
    monkeypatch.setattr(module, "randn_tensor", lambda *args: next(draws))
    rate = 1000 / case["steps"] if case["rescale_timesteps"] else 1.0
    classifier = AnalyticClassifier(data["centers"].to(dtype))
    return pipe(
        cond_fn=ClassifierGradient(classifier, data["y"], timestep_scale=rate),
        guidance_scale=case["scale"],
        timestep_respacing=case["spec"],
        clip_denoised=case["clip_denoised"],
        denoised_fn=(lambda x: torch.from_numpy(keep_known()(x.double().numpy())).to(x))
        if case["denoised_fn"]
        else None,
        eta=case["eta"],
        batch_size=2,
        latents=data["x_T"],
        output_type="latent",
    ).images


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectories(name, monkeypatch):
    case, recorded = CASES[name], np.load(GOLDENS / f"sample_{name}.npz")
    np.testing.assert_allclose(program(case, inputs_of(name)), recorded["final"], rtol=0, atol=1e-11)
    final = sample(case, inputs_of(name), torch.float64, monkeypatch)
    np.testing.assert_allclose(final.numpy(), recorded["final"], rtol=0, atol=1e-10)
    final = sample(case, inputs_of(name), torch.float32, monkeypatch)
    np.testing.assert_allclose(final.numpy(), recorded["final"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps(name, dtype):
    case, recorded = CASES[name], np.load(GOLDENS / f"sample_{name}.npz")
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(timestep_respacing=case["spec"])
    known = keep_known()
    for i, timestep in enumerate(scheduler.timesteps.tolist()):
        parts = {key: torch.from_numpy(recorded[key][i]).to(dtype) for key in ("model_out", "x_in", "grad", "noise")}
        output = scheduler.step(
            parts["model_out"],
            timestep,
            parts["x_in"],
            gradient=parts["grad"] if case["scale"] else None,
            eta=case["eta"],
            clip_denoised=case["clip_denoised"],
            denoised_fn=(lambda x: torch.from_numpy(known(x.numpy())).to(x)) if case["denoised_fn"] else None,
            variance_noise=parts["noise"],
        )
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(output.prev_sample.numpy(), recorded["x_out"][i], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(RECORDED)))
def test_other_settings(name, monkeypatch):
    """Settings without a recording, against the program that the recordings vouch for; noises as in one of them."""
    case = CASES[name]
    data = inputs_of("anc_lr_101520_s1_cosine")  # 45 steps
    assert len(space_timesteps(case["steps"], case["spec"])) <= len(data["noise"])
    final = sample(case, data, torch.float64, monkeypatch)
    np.testing.assert_allclose(final.numpy(), program(case, data), rtol=0, atol=1e-10)


def test_prediction_types_give_one_trajectory():
    """Epsilon, sample and velocity say the same: all samplers and forms, with gradient and clip."""
    torch.manual_seed(0)
    levels = GuidedScheduler().alphas_cumprod
    for sampler, form in (("ancestral", "mean"), ("ancestral", "epsilon"), ("ddim", "mean")):
        results = []
        for kind in ("epsilon", "sample", "v_prediction"):
            scheduler = GuidedScheduler(sampler=sampler, prediction_type=kind)
            scheduler.set_timesteps(6)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=generator)
            for t in scheduler.timesteps.tolist():
                level = levels[t]
                eps = torch.sin(x) + 0.3 * x
                x0 = (x - (1 - level).sqrt() * eps) / level.sqrt()
                output = {"epsilon": eps, "sample": x0, "v_prediction": level.sqrt() * eps - (1 - level).sqrt() * x0}[
                    kind
                ]
                x = scheduler.step(output, t, x, gradient=torch.cos(x), guidance_form=form, generator=generator)[0]
            results.append(x)
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
        torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-10)


def test_epsilon_form_is_the_step_of_a_guided_prediction():
    scheduler = GuidedScheduler(variance_type="learned_range")
    scheduler.set_timesteps(5)
    x, eps, v, gradient, noise = torch.randn(5, 2, 3, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        moved = eps - (1 - scheduler.alphas_cumprod[t]).sqrt() * gradient
        outputs = [
            scheduler.step(torch.cat([a, v], 1), t, x, g, guidance_form="epsilon", variance_noise=noise)[0]
            for a, g in ((eps, gradient), (moved, None))
        ]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_learned_logarithms_and_thresholds():
    scheduler = GuidedScheduler(variance_type="learned", thresholding=True, sample_max_value=2.0)
    scheduler.set_timesteps(5)
    x, eps, noise = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    logarithm = torch.full_like(x, -3.0)
    still = scheduler.step(torch.cat([eps, logarithm], 1), 250, x, variance_noise=0 * noise)
    moved = scheduler.step(torch.cat([eps, logarithm], 1), 250, x, variance_noise=noise)
    torch.testing.assert_close(moved[0] - still[0], math.exp(-1.5) * noise)
    assert still[1].abs().max() <= 1 and (still[1].abs() == 1).float().mean() < 0.5


def test_channels_must_fit_the_variance():
    for kind, channels in (("learned_range", 3), ("fixed_small", 6)):
        with pytest.raises(ValueError, match=f"`model_output` has {channels} channels.*'learned_range'"):
            GuidedScheduler(variance_type=kind).step(torch.zeros(1, channels, 2, 2), 5, torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="`guidance_form` is 'mu'"):
        GuidedScheduler().step(torch.zeros(1, 3, 2, 2), 5, torch.zeros(1, 3, 2, 2), guidance_form="mu")
    with pytest.raises(ValueError, match="`timestep` is 7.*take one of it"):
        scheduler = GuidedScheduler()
        scheduler.set_timesteps(5)
        scheduler.step(torch.zeros(1, 3, 2, 2), 7, torch.zeros(1, 3, 2, 2))


# ----------------------------------------------------------------------------------------------------------- networks


def make_classifier(**changes):
    torch.manual_seed(1)
    config = {"sample_size": 8, "in_channels": 1, "num_classes": 4, **SMALL}
    return NoisyClassifier(**(config | changes)).eval()


def make_unet(in_channels=1, out_channels=1, **changes):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(8, in_channels, out_channels, **(SMALL | blocks | changes)).eval()


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("norm", ["scale_shift", "default"])
def test_classifier_is_saved_and_differentiable(pool, norm, tmp_path):
    classifier = make_classifier(
        pool=pool, resnet_time_scale_shift=norm, hidden_size=16, id2label=dict(enumerate("abcd"))
    )
    classifier.save_pretrained(tmp_path)
    loaded = NoisyClassifier.from_pretrained(tmp_path).to(torch.float64)
    classifier.to(torch.float64)
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 500, 999])
    logits = classifier(x, t)
    assert logits.shape == (3, 4) and torch.equal(loaded(x, t), logits)
    torch.testing.assert_close(classifier(x[1:2], 500), logits[1:2], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(classifier(x, t * 0), logits), "the timestep matters"
    classifier.enable_gradient_checkpointing()
    labels = torch.tensor([0, 1, 3])
    gradients = [ClassifierGradient(each, labels)(x, t) for each in (classifier, loaded)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    step = 1e-5 * torch.randn_like(x)  # central difference of the chosen log probabilities
    ends = [
        each.log_softmax(1).gather(1, labels[:, None]).sum() for each in (loaded(x + step, t), loaded(x - step, t))
    ]
    torch.testing.assert_close((gradients[1] * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=1e-12)
    if pool == "attention":
        with pytest.raises(ValueError, match=r"\(16, 16\).*attention pool is for \(8, 8\)"):
            classifier(torch.randn(1, 1, 16, 16, dtype=torch.float64), 0)
    else:
        assert classifier(torch.randn(1, 1, 16, 16, dtype=torch.float64), 0).shape == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "`pool` is 'max'"),
        ({"down_block_types": ("DownBlock2D",)}, "1 `down_block_types`"),
        ({"norm_num_groups": 3}, "`norm_num_groups`=3"),
        ({"attention_head_dim": 5}, "`attention_head_dim` is 5"),
        ({"attention_head_dim": 16}, "of all blocks with attention"),  # divides the last width alone
        ({"sample_size": 7}, "`sample_size` is 7"),
        ({"id2label": {0: "a"}}, "`id2label` has 1 entries for `num_classes`=4"),
        ({"downsample_type": "x"}, "`downsample_type` is 'x'"),
        ({"num_classes": 0}, "`num_classes` is 0"),
        ({"sample_size": (8, 8)}, "images are square"),
        ({"trained_alphas_cumprod": [1.0, 0.5]}, "has 2 values"),
        ({"pool": "spatial_v2", "hidden_size": 17}, "`hidden_size` is 17"),
    ],
)
def test_bad_classifiers(changes, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(**changes)


def test_adm_unet_heads_and_time_features(tmp_path):
    """Four heads at every width, and more sinusoids than channels: saved, loaded, and unlike the stock model."""
    blocks = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    unet = module.ADMUNet2DModel(8, 1, 1, **(SMALL | blocks), num_attention_heads=4, time_proj_dim=16).eval()
    unet.save_pretrained(tmp_path)
    loaded = module.ADMUNet2DModel.from_pretrained(tmp_path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(loaded(x, t).sample, unet(x, t).sample)
    assert [block.attentions[0].heads for block in loaded.down_blocks] == [4, 4]
    assert unet.time_embedding.linear_1.weight.shape == (64, 16)
    stock = UNet2DModel(8, 1, 1, **(SMALL | blocks | {"attention_head_dim": 2}), time_embedding_dim=64).eval()
    state = unet.state_dict()
    del state["time_embedding.linear_1.weight"]
    stock.load_state_dict(state, strict=False)
    stock.time_embedding, stock.time_proj = unet.time_embedding, unet.time_proj
    assert not torch.allclose(stock(x, t).sample, unet(x, t).sample, atol=1e-4), "heads of another size"
    with pytest.raises(ValueError, match="`num_attention_heads` is 3"):
        module.ADMUNet2DModel(8, 1, 1, **(SMALL | blocks), num_attention_heads=3)


# ----------------------------------------------------------------------------------------------------------- pipeline


class TestContract(PipelineContract):
    pipeline_class, image_shape = ClassifierGuidancePipeline, (1, 8, 8)

    def components(self):
        return {"unet": make_unet(), "scheduler": DDPMScheduler(), "classifier": make_classifier()}

    def inputs(self, batch_size):
        return {"class_labels": torch.arange(batch_size), "guidance_scale": 5.0, "num_inference_steps": 4}


class TestContractDDIM(TestContract):
    def components(self):
        return super().components() | {"unet": make_unet(num_class_embeds=4), "scheduler": DDIMScheduler()}

    def inputs(self, batch_size):
        return super().inputs(batch_size) | {"eta": 0.5}


@pytest.fixture
def pipe():
    pipe = ClassifierGuidancePipeline(make_unet(), DDPMScheduler(), make_classifier(id2label=dict(enumerate("abcd"))))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, *args, seed=0, **kwargs):
    options = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(*args, **(options | kwargs)).images


def count_calls(model):
    calls = []
    model.register_forward_hook(lambda layer, args, output: calls.append(args[1]))
    return calls


def test_without_guidance_the_classifier_is_not_called(pipe):
    calls = count_calls(pipe.classifier)
    plain = ClassifierGuidancePipeline(pipe.unet, pipe.scheduler)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe, [0, 1], guidance_scale=0), run(plain, batch_size=2))
    assert calls == []
    with torch.inference_mode():  # nothing is differentiated
        run(pipe, [0, 1], guidance_scale=0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode`"):
        run(pipe, [0, 1])


def test_unguided_samples_are_those_of_stock_pipelines():
    """DDIM at strides that the stock scheduler gets right; ancestral steps on any list."""
    unet, noise = make_unet(), torch.randn(2, 1, 8, 8)
    for stock in (DDIMScheduler(), DDPMScheduler(timestep_spacing="linspace")):
        pipe = ClassifierGuidancePipeline(unet, stock)
        pipe.set_progress_bar_config(disable=True)
        ddim = type(stock) is DDIMScheduler
        draws = torch.Generator().manual_seed(3)
        images = pipe(
            batch_size=2,
            timestep_respacing="ddim10" if ddim else "25",
            latents=noise,
            generator=draws,
            output_type="pt",
        ).images
        stock.set_timesteps(10 if ddim else 25)
        x, draws = noise, torch.Generator().manual_seed(3)
        with torch.no_grad():
            for t in stock.timesteps:
                more = {"use_clipped_model_output": True} if ddim else {}  # as in the algorithm's guided form
                x = stock.step(unet(x, t).sample, t, x, generator=draws, **more).prev_sample
        torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


def test_one_pass_of_each_network_per_guided_step(pipe):
    unet, classifier = count_calls(pipe.unet), count_calls(pipe.classifier)
    run(pipe, [0, 1], num_inference_steps=10, guidance_start=0.2, guidance_stop=0.7)
    assert len(unet) == 10
    assert [int(times[0]) for times in classifier] == [777, 666, 555, 444, 333]
    assert all(times.dtype == torch.int64 and times.shape == (2,) for times in classifier)


def test_names_numbers_and_weights(pipe):
    expected = run(pipe, torch.tensor([2, 0]))
    for labels in ([2, 0], ["c", "a"], ["c", 0], np.array([2, 0]).tolist(), torch.eye(4)[[2, 0]]):
        torch.testing.assert_close(run(pipe, labels), expected)
    assert torch.equal(run(pipe, "c", batch_size=2), run(pipe, [2, 2]))
    assert run(pipe, 3).shape == (1, 1, 8, 8)
    output = pipe(["c", "a"], num_inference_steps=2, output_type="pt")
    assert output.class_labels.tolist() == [2, 0]


def test_several_gradients_are_summed(pipe):
    """Weights of classes, and lists of functions with weights, are the weighted sum of single gradients."""
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 2.0, -1]])
    expected = run(pipe, weights, guidance_scale=3.0)
    singles = [ClassifierGradient(pipe.classifier, torch.full((2,), k)) for k in range(4)]

    def cond_fn(sample, timestep):
        return sum(weights[:, k].reshape(2, 1, 1, 1) * singles[k](sample, timestep) for k in range(4))

    torch.testing.assert_close(run(pipe, cond_fn=cond_fn, guidance_scale=3.0, batch_size=2), expected)
    a, b = (
        run(pipe, cond_fn=[singles[0], (singles[1], 0.25)], batch_size=2),
        run(pipe, torch.tensor([[1, 0.25, 0, 0]] * 2)),
    )
    torch.testing.assert_close(a, b)


def test_any_guidance(pipe):
    """A function in place of the classifier, which may differentiate without asking for it."""
    seen = []

    def darker(sample, timestep):
        seen.append((timestep, torch.is_grad_enabled()))
        sample = sample.clone().requires_grad_()
        return torch.autograd.grad(-10 * sample.square().sum(), sample)[0]

    calls = count_calls(pipe.classifier)
    images = run(pipe, cond_fn=darker, batch_size=2)
    assert images.square().mean() < run(pipe, batch_size=2, guidance_scale=0).square().mean()
    assert calls == [] and len(seen) == 4 and all(enabled and times.dtype == torch.int64 for times, enabled in seen)
    with pytest.raises(ValueError, match=r"`cond_fn` returned \(2,\).*\(2, 1, 8, 8\)"):
        run(pipe, cond_fn=lambda sample, timestep: torch.ones(2), batch_size=2)
    with pytest.raises(ValueError, match="`cond_fn` returned NoneType"):
        run(pipe, cond_fn=lambda sample, timestep: None, batch_size=2)
    with pytest.raises(ValueError, match="not finite: see if gradients of `cond_fn` are"):
        run(pipe, cond_fn=lambda sample, timestep: sample / 0, batch_size=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_classifier_is_summed_in_single(pipe, dtype):
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 3])
    exact = ClassifierGradient(pipe.classifier, labels)(x, t)
    pipe.classifier.to(dtype)
    gradient = ClassifierGradient(pipe.classifier, labels)(x, t)
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() / exact.norm() < 0.05
    scaled = ClassifierGradient(pipe.classifier, labels, loss_scale=2.0**10)(x, t)
    assert (scaled - exact).norm() / exact.norm() < 0.05
    images = run(pipe, [0, 1])
    assert images.dtype == torch.float32
    assert all(p.grad is None for p in pipe.classifier.parameters())


def test_half_precision_samples_keep_small_gradients(pipe):
    """A sample in half precision, as a guider may hand over, is differentiated in single precision."""
    small = lambda x, t: 1e-5 * pipe.classifier(x, t)  # noqa: E731
    x, t = torch.randn(2, 1, 8, 8).half(), torch.tensor([3, 500])
    gradient, exact = (ClassifierGradient(small, torch.tensor([1]))(y, t) for y in (x, x.float()))
    assert gradient.dtype == torch.float32 and torch.equal(gradient, exact)


def test_targets_fit_the_batch(pipe):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 3])
    one = ClassifierGradient(pipe.classifier, torch.tensor([1]))(x, t)
    assert torch.equal(one, ClassifierGradient(pipe.classifier, torch.tensor([1, 1]))(x, t))
    assert torch.equal(one, ClassifierGradient(pipe.classifier, torch.tensor(1, dtype=torch.uint8))(x, t))
    assert torch.equal(one, ClassifierGradient(pipe.classifier, torch.eye(4)[[1]])(x, t))
    for wrong in (torch.tensor([1, 2, 3]), torch.tensor([4, 0]), torch.eye(3), torch.eye(4)):
        with pytest.raises(ValueError, match="`targets` is .* for 2 images and 4 classes"):
            ClassifierGradient(pipe.classifier, wrong)(x, t)
    with pytest.raises(TypeError, match="`targets` is 1, but must be a `torch.Tensor`"):
        ClassifierGradient(pipe.classifier, 1)


def test_other_classifiers(pipe):
    """Any module that gives logits, of any dtype, without a configuration."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 4).half()

        def forward(self, sample, timestep):
            return self.linear(sample.flatten(1))

    with pytest.raises(TypeError, match=r"`classifier` is a Plain.*cond_fn=ClassifierGradient"):
        ClassifierGuidancePipeline(pipe.unet, pipe.scheduler, Plain())
    cond_fn = ClassifierGradient(Plain(), torch.tensor([1, 2]))
    assert not torch.equal(run(pipe, cond_fn=cond_fn, batch_size=2), run(pipe, batch_size=2, guidance_scale=0))


def test_callers_and_callbacks_latents(pipe):
    """What the caller gave is not changed; what a callback gives is brought to the state's dtype and checked."""
    noise = torch.ones(1, 1, 8, 8)
    run(pipe, cond_fn=lambda sample, timestep: sample.requires_grad_().detach().mul_(0), latents=noise)
    assert torch.equal(noise, torch.ones(1, 1, 8, 8)) and not noise.requires_grad
    seen = []

    def halve(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].dtype)
        return {"latents": tensors["latents"].half()}

    run(pipe, 1, callback_on_step_end=halve)
    assert set(seen) == {torch.float32}
    with pytest.raises(ValueError, match=r"returned latents of shape \(2, 1, 8, 8\), but must keep \(1, 1, 8, 8\)"):
        run(pipe, 1, callback_on_step_end=lambda *args: {"latents": torch.zeros(2, 1, 8, 8)})


@pytest.mark.parametrize(
    ("start", "steps", "guided"), [(0.28, 25, 18), (0.55, 100, 45), (0.07, 100, 93), (0.5, 5, 2), (0.0, 7, 7)]
)
def test_shares_of_steps(start, steps, guided):
    first, last = module.guided_steps(start, 1.0, steps)
    assert last - first == guided


def test_names_after_saving(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.classifier.config.id2label[2] == "c"
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded, "c"), run(pipe, 2))
    several = ClassifierGuidancePipeline(pipe.unet, pipe.scheduler, make_classifier(), id2label=["a", "b", "a", "d"])
    with pytest.raises(ValueError, match=r"several labels, \{'a': \[0, 2\]\}"), no_model_runs(several):
        run(several, "a")


def test_null_labels():
    unet = make_unet(num_class_embeds=5)
    pipe = ClassifierGuidancePipeline(unet, DDPMScheduler(), make_classifier(), null_class_label=4)
    pipe.set_progress_bar_config(disable=True)
    assert run(pipe, 4, guidance_scale=0).isfinite().all(), "the classifier, which does not know it, is not asked"
    with pytest.raises(ValueError, match="`classifier` knows the labels 0 to 3"), no_model_runs(pipe):
        run(pipe, 4)
    for wrong in (5, -1, "x"):
        with pytest.raises(ValueError, match="`null_class_label` is .*labels 0 to 4"):
            ClassifierGuidancePipeline(unet, DDPMScheduler(), null_class_label=wrong)
    with pytest.raises(ValueError, match="no class embeddings"):
        ClassifierGuidancePipeline(make_unet(), DDPMScheduler(), null_class_label=1)


def test_numpy_and_sizes(pipe):
    expected = run(pipe, 3)
    for label in (np.int64(3), np.array([3]), [np.int32(3)], torch.tensor(3)):
        assert torch.equal(run(pipe, label), expected)
    unet = make_unet()
    unet.register_to_config(sample_size=None)
    other = ClassifierGuidancePipeline(unet, DDPMScheduler())
    other.set_progress_bar_config(disable=True)
    assert run(other, latents=torch.randn(1, 1, 16, 8)).shape == (1, 1, 16, 8)
    with pytest.raises(ValueError, match="no `sample_size`: give `latents`"), no_model_runs(other):
        run(other)
    other.scheduler = GuidedScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="`variance_type` is 'learned_range'"), no_model_runs(other):
        run(other, latents=torch.randn(1, 1, 8, 8))
    other.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="but this pipeline steps by a GuidedScheduler"), no_model_runs(other):
        run(other, latents=torch.randn(1, 1, 8, 8))


def test_class_conditional_and_classifier_free(tmp_path):
    unet = make_unet(num_class_embeds=5, out_channels=2)
    pipe = ClassifierGuidancePipeline(unet, DDPMScheduler(variance_type="learned_range"), null_class_label=4)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calls = count_calls(pipe.unet)
    noise = torch.randn(2, 1, 8, 8)
    guided = run(pipe, [1, 3], classifier_free_scale=3.0, latents=noise)
    assert len(calls) == 4 and len(calls[0]) == 4, "both halves in one batch"
    x, scheduler = noise, GuidedScheduler(variance_type="learned_range")
    scheduler.set_timesteps(4)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            kept, null = (pipe.unet(x, t, class_labels=torch.tensor(y)).sample for y in ([1, 3], [4, 4]))
            w = 2.0  # the paper's: (1 + w) eps(y) - w eps(null), with the variance of the conditional model
            noise_pred = (1 + w) * kept[:, :1] - w * null[:, :1]
            x = scheduler.step(torch.cat([noise_pred, kept[:, 1:]], 1), t, x, generator=draws)[0]
    torch.testing.assert_close(guided, x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(pipe, [1, 3], latents=noise), guided, atol=1e-3)
    with pytest.raises(ValueError, match="`class_labels` are missing: this pipeline's `unet`"), no_model_runs(pipe):
        run(pipe)
    other = ClassifierGuidancePipeline(unet, DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match="no `null_class_label`"), no_model_runs(other):
        run(other, 1, classifier_free_scale=2.0)


def test_classifier_free_formulas_equal_the_recorded_ones():
    recorded = {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / "cfg.npz").items()}

    class Recorded(AnalyticUNet):
        def forward(self, sample, timestep, class_labels=None):
            torch.testing.assert_close(sample, recorded["combined_in"])
            return UNet2DOutput(sample=recorded["raw"])

    unet = Recorded().double()
    unet.register_to_config(num_class_embeds=10)
    pipe = ClassifierGuidancePipeline(unet, GuidedScheduler(variance_type="learned_range"), null_class_label=9)
    x, labels = recorded["x_t"][:2], torch.tensor([0, 1])
    output = pipe._predict(x, 10, labels, 3.0, None)
    torch.testing.assert_close(output, recorded["glide_s3"][:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(output[:, :3], recorded["ho_w2"], rtol=0, atol=1e-12)


def test_upsampler(tmp_path):
    unet = make_unet(in_channels=2, out_channels=2)
    pipe = ClassifierGuidancePipeline(unet, DDPMScheduler(variance_type="learned_range"), make_classifier())
    pipe.set_progress_bar_config(disable=True)
    small, noise = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 8, 8)
    images = run(pipe, low_res=small, latents=noise, guidance_scale=0, batch_size=2)
    large = torch.nn.functional.interpolate(2 * small - 1, (8, 8), mode="bilinear", align_corners=False)
    scheduler = GuidedScheduler(variance_type="learned_range")
    scheduler.set_timesteps(4)
    x, draws = noise, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(torch.cat([x, large], 1), t).sample, t, x, generator=draws)[0]
    torch.testing.assert_close(images, x, rtol=1e-5, atol=1e-5)
    assert run(pipe, [0, 1], low_res=small[:1]).shape == (2, 1, 8, 8)
    for wrong, message in (
        ({}, "`low_res` is missing"),
        ({"low_res": torch.rand(3, 1, 4, 4)}, "3 images for 2"),
        ({"low_res": torch.rand(1, 3, 4, 4)}, "must have 1 channels"),
    ):
        with pytest.raises(ValueError, match=message), no_model_runs(pipe):
            run(pipe, [0, 1], **wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 4}, r"`class_labels` is \[4\], but `classifier` knows the labels 0 to 3"),
        ({"class_labels": [-1, 0]}, "labels 0 to 3"),
        ({"class_labels": ["a", "zebra"]}, r"unknown names \['zebra'\]; known are 'a', 'b', 'c', 'd'"),
        ({"class_labels": []}, "is empty"),
        ({"class_labels": torch.ones(2, 3)}, r"weights of shape \(2, 3\).*\(batch, 4\)"),
        ({"class_labels": torch.full((1, 4), torch.nan)}, "not all finite"),
        ({"class_labels": torch.eye(4).long()}, "make weights of classes floats"),
        ({"latents": torch.full((1, 1, 8, 8), torch.nan)}, "not finite"),
        ({"timestep_respacing": [500.9, 0]}, "must be whole numbers"),
        ({"class_labels": [1, 2], "batch_size": 3}, "2 entries for `batch_size`=3"),
        ({"class_labels": None}, "`class_labels` are missing: say what the classifier"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"guidance_scale": math.inf}, "`guidance_scale` is inf"),
        ({"guidance_start": 0.8, "guidance_stop": 0.2}, "`guidance_start` is 0.8"),
        ({"guidance_form": "score"}, "`guidance_form` is 'score'"),
        ({"eta": 0.5}, "`eta` is 0.5.*`DDIMScheduler`"),
        ({"classifier_free_scale": 2.0}, "`unet` knows no classes"),
        ({"low_res": torch.rand(1, 1, 4, 4)}, "no upsampler"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"`latents` has shape \(1, 1, 4, 4\)"),
        ({"timestep_respacing": "ddim999"}, "no stride"),
        ({"num_inference_steps": 1}, "from 2 to 1000"),
    ],
)
def test_bad_input_is_refused_before_a_network_runs(pipe, arguments, message):
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        run(pipe, **({"class_labels": 0} | arguments))


def test_bad_types(pipe):
    for wrong, message in (
        ({"class_labels": torch.tensor([True])}, "labels are integers"),
        ({"cond_fn": "bright"}, "`cond_fn` must be a function"),
        ({"cond_fn": []}, "`cond_fn` must be a function"),
        ({"class_labels": 1.0}, "`class_labels` is 1.0"),
        ({"class_labels": [None]}, "labels are integers or names"),
        ({"timestep_respacing": 5}, "`timestep_respacing` is 5"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "`latents` is a ndarray"),
    ):
        with pytest.raises(TypeError, match=message), no_model_runs(pipe):
            run(pipe, **({"class_labels": 0} | wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 16}, "is for 1 channels of 16 x 16.*makes 1 channels of 8 x 8"),
        ({"in_channels": 3}, "is for 3 channels"),
        ({"num_train_timesteps": 4000}, "trained on 4000 timesteps"),
        ({"trained_alphas_cumprod": noise_levels(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))}, "noise schedule"),
    ],
)
def test_a_classifier_of_other_images_or_noise_is_refused(changes, message):
    pipe = ClassifierGuidancePipeline(make_unet(), DDPMScheduler(), make_classifier(**changes))
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        run(pipe, 0)
    fitting = make_classifier(trained_alphas_cumprod=noise_levels(DDPMScheduler()))
    assert run(ClassifierGuidancePipeline(make_unet(), DDPMScheduler(), fitting), 0).isfinite().all()


def test_labels_that_nothing_uses_are_refused():
    pipe = ClassifierGuidancePipeline(make_unet(), DDPMScheduler())
    with pytest.raises(ValueError, match="unconditional `unet` and no `classifier`"), no_model_runs(pipe):
        run(pipe, 0)


def test_networks_and_schedulers_that_do_not_fit():
    for unet, scheduler, message in (
        (make_unet(out_channels=2), DDPMScheduler(), "`variance_type` is 'fixed_small'"),
        (make_unet(in_channels=3, out_channels=2), DDPMScheduler(), "3 input and 2 output"),
        (make_unet(), PNDMScheduler(), "`scheduler` is a PNDMScheduler"),
        (make_unet(time_embedding_type="fourier"), DDPMScheduler(), "fourier"),
        (make_unet(class_embed_type="identity"), DDPMScheduler(), "embeddings as its condition"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassifierGuidancePipeline(unet, scheduler)
    pipe = ClassifierGuidancePipeline(make_unet(out_channels=2), DDIMScheduler())
    assert pipe.scheduler.config.variance_type == "learned_range", "a DDIM scheduler has none of its own"
    assert run(pipe).shape == (1, 1, 8, 8)


def test_stock_checkpoints_load(tmp_path):
    DDIMPipeline(make_unet(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    pipe = ClassifierGuidancePipeline.from_pretrained(tmp_path)
    assert pipe.classifier is None and pipe.scheduler.config.sampler == "ddim"
    pipe = ClassifierGuidancePipeline.from_pretrained(tmp_path, classifier=make_classifier(), id2label={0: "cat"})
    assert run(pipe, "cat", timestep_respacing="ddim5").shape == (1, 1, 8, 8)
    shared = ClassifierGuidancePipeline.from_pipe(DDPMPipeline(pipe.unet, DDPMScheduler()), classifier=pipe.classifier)
    assert shared.unet is pipe.unet and shared.scheduler.config.sampler == "ancestral"


def test_other_pipelines_load_the_folder(pipe, tmp_path):
    """Its scheduler and networks are this package's: CoPaint and its like take them without running its code."""
    blocks = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    unet = module.ADMUNet2DModel(8, 1, 2, **(SMALL | blocks), num_attention_heads=4).eval()
    pipe = ClassifierGuidancePipeline(unet, DDIMScheduler(), pipe.classifier)
    pipe.save_pretrained(tmp_path)
    loaded, shared = CoPaintPipeline.from_pretrained(tmp_path), CoPaintPipeline.from_pipe(pipe)
    image, mask, noise = torch.rand(1, 1, 8, 8), torch.zeros(8, 8), torch.randn(1, 1, 8, 8)
    mask[:, 4:] = 1
    images = []
    for each in (loaded, shared):
        assert type(each.unet) is module.ADMUNet2DModel
        each.set_progress_bar_config(disable=True)
        images.append(each(image, mask, num_inference_steps=3, latents=noise, output_type="pt").images)
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_without_a_classifier_the_folder_is_complete(pipe, tmp_path):
    plain = ClassifierGuidancePipeline(pipe.unet, pipe.scheduler)
    plain.save_pretrained(tmp_path / "plain")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert type(loaded) is ClassifierGuidancePipeline and loaded.classifier is None


# --------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A real CLIP with few weights and a vocabulary of letters, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=size | {
            "vocab_size": 54, "max_position_embeddings": 8, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53,
        },
        vision_config=size | {"image_size": 16, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


def test_clip_gradient(clip):
    """Equals the central difference of exp(logit_scale) cos(image, text), at the size that CLIP sees."""
    model, tokenizer, folder = clip
    model = CLIPModel.from_pretrained(folder).double().eval()
    cond_fn = ClipGuidance(model, tokenizer, ["a corgi", "a cat"])
    x, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 0])
    gradient = cond_fn(x, t)
    tokens = tokenizer(["a corgi", "a cat"], padding="max_length", max_length=8, return_tensors="pt")

    def similarity(x):
        mean, std = (
            torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (cond_fn.image_mean, cond_fn.image_std)
        )
        output = model(pixel_values=(x / 2 + 0.5 - mean) / std, **tokens)
        return output.logits_per_image.diagonal().sum()  # with the logit scale, by transformers

    step = 1e-5 * torch.randn_like(x)
    with torch.no_grad():
        expected = (similarity(x + step) - similarity(x - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), expected, rtol=1e-5, atol=1e-12)
    assert cond_fn(torch.randn(2, 3, 24, 40), t).shape == (2, 3, 24, 40), "other sizes are resized"
    with pytest.raises(ValueError, match="`prompt` is empty"):
        ClipGuidance(model, tokenizer, [])
    conditional = ClassifierGuidancePipeline(make_unet(3, 3, num_class_embeds=4), DDIMScheduler())
    with pytest.raises(ValueError, match="functools.partial"):
        ClipGuidance(model, tokenizer, "a", predict=conditional.predict_original_sample)(
            torch.randn(1, 3, 8, 8), t[:1]
        )
    with pytest.raises(ValueError, match="`prompt` has 2 texts for 3 images"):
        cond_fn(torch.randn(3, 3, 16, 16), torch.zeros(3))
    assert all(p.grad is None for p in model.parameters())


def test_clip_guides_by_the_sample_and_by_the_estimate(clip):
    model, tokenizer, _ = clip
    pipe = ClassifierGuidancePipeline(make_unet(in_channels=3, out_channels=6), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    noisy = ClipGuidance(model, tokenizer, "a corgi")
    estimate = ClipGuidance(model, tokenizer, "a corgi", predict=pipe.predict_original_sample)
    noise = torch.randn(1, 3, 8, 8)
    plain, by_sample, by_estimate = (
        run(pipe, cond_fn=cond_fn, latents=noise, guidance_scale=scale)
        for cond_fn, scale in ((noisy, 0.0), (noisy, 0.5), (estimate, 0.5))
    )
    assert not torch.allclose(by_sample, by_estimate, atol=1e-3)

    def similarity(x):
        return (ClipGuidance(model, tokenizer, "a corgi")(x, torch.zeros(1)) * x).sum()

    t, step = torch.tensor([700]), 1e-2 * torch.randn(1, 3, 8, 8)
    gradient = estimate(noise, t)
    assert gradient.shape == noise.shape and not torch.allclose(gradient, noisy(noise, t)), "through the U-Net"
    assert plain.isfinite().all() and similarity(noise + step).isfinite()


# ------------------------------------------------------------------------------------------------------------- guider


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_guider_reproduces_guided_ddim(kind):
    """The guider's corrected prediction, stepped by a stock DDIM scheduler, is the pipeline's own guidance."""
    stock = DDIMScheduler(clip_sample=False, prediction_type=kind)
    stock.set_timesteps(25)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    gradients = []

    def cond_fn(sample, timestep):
        gradients.append(int(timestep[0]))
        return -torch.sin(sample)

    guider = ClassifierGuidanceGuider(4.0, cond_fn=cond_fn, scheduler=stock)
    own = GuidedScheduler(sampler="ddim", clip_sample=False, prediction_type=kind)
    own.set_timesteps(timestep_respacing="ddim25")
    x = y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for i, t in enumerate(stock.timesteps):
        guider.set_state(step=i, num_inference_steps=25, timestep=t)
        [batch] = guider.prepare_inputs({"latents": x})
        batch.noise_pred = torch.cos(batch.latents)
        x = stock.step(guider([batch]).pred, t, x).prev_sample
        y = own.step(torch.cos(y), t, y, gradient=-4 * torch.sin(y)).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # the stock scheduler's levels have single precision
    assert gradients == stock.timesteps.tolist()


def test_guider_is_honest():
    guider = ClassifierGuidanceGuider(2.0, start=0.5)
    assert dict(guider.config)["guidance_scale"] == 2.0 and "cond_fn" not in guider.config

    def ask(step=9, **inputs):
        guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(5))
        [batch] = guider.prepare_inputs(inputs)
        batch.noise_pred = torch.zeros(1, 1, 2, 2)
        return guider([batch]).pred

    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(ask(step=1, latents=x), torch.zeros_like(x)), "not begun yet"
    with pytest.raises(ValueError, match="`cond_fn` is None and `scheduler` is None"):
        ask(latents=x)
    guider.cond_fn, guider.scheduler = (lambda sample, timestep: sample), DDIMScheduler()
    with pytest.raises(ValueError, match="hands over.*encoder_hidden_states.*add `latents=block_state.latents`"):
        ask(encoder_hidden_states=x)
    torch.testing.assert_close(ask(hidden_states=(x, x)), ask(latents=x))
    for scheduler in (FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler()):
        guider.scheduler = scheduler
        with pytest.raises(ValueError, match=f"is a {type(scheduler).__name__}, which has no `alphas_cumprod` or"):
            ask(latents=x)


def test_guider_differentiates_for_its_function_and_leaves_variances():
    guider = ClassifierGuidanceGuider(2.0, scheduler=DDIMScheduler())
    guider.cond_fn = lambda x, t: torch.autograd.grad(-x.requires_grad_().square().sum() / 2, x)[0]
    guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(999))
    with torch.no_grad():
        [batch] = guider.prepare_inputs({"latents": torch.ones(1, 1, 2, 2)})
        batch.noise_pred = torch.zeros(1, 2, 2, 2)
        pred = guider([batch]).pred
    assert torch.allclose(pred[:, 0], torch.tensor(2.0), atol=1e-4) and torch.equal(pred[:, 1], torch.zeros(1, 2, 2))
    guider.cond_fn = lambda x, t: None
    with pytest.raises(ValueError, match="`cond_fn` returned NoneType"):
        guider([batch])


def test_examples(clip, tmp_path):
    """Those of the file, in a process that finds a small CLIP under the name of a large one on this machine's Hub."""
    program = (
        "import doctest, torch; torch.set_num_threads(1)\n"
        "import diffusers_ext.pipelines.classifier_guidance as module\n"
        "result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)\n"
        "assert result.failed == 0 and result.attempted >= 40, result\n"
    )
    files = {path.name: path.read_bytes() for path in clip[2].iterdir() if path.is_file()}
    with HubServer() as hub:
        hub.put("openai/clip-vit-base-patch32", files)
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
