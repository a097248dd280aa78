"""VE-SDE against the authors' recorded runs, diffusers' own scheduler and closed forms, and what it refuses."""

import doctest
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_ext import VESDEPipeline, VESDEScheduler
from diffusers_ext.pipelines import ve_sde

with np.load(Path(__file__).parent / "goldens" / "guidance" / "sde_ve.npz") as file:
    GOLDEN = dict(file)
PAIRS = sorted({key.split("|")[0] for key in GOLDEN if "+" in key})
PREDICTORS = {"ancestral_sampling": "ancestral", "none": None}  # the authors' names and ours


def make_unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "time_embedding_type": "fourier",
    }
    return UNet2DModel(**(config | changes))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


class MixtureScore(ModelMixin, ConfigMixin):
    """The exact score of a mixture of isotropic Gaussians at any noise level, as a network in float64."""

    @register_to_config
    def __init__(
        self, means: list, weights: list, stds: list, in_channels: int, out_channels: int, sample_size: int
    ) -> None:
        super().__init__()
        for name, value in {"mu": means, "w": weights, "s": stds}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))  # gives the module a dtype; stays 1

    def forward(self, sample, sigmas, class_labels=None):
        variances = self.s**2 + sigmas[:, None] ** 2  # (batch, components)
        away = self.mu.flatten(1) - sample.flatten(1)[:, None]  # (batch, components, pixels)
        logits = self.w.log() - away.square().sum(-1) / (2 * variances) - away.shape[-1] / 2 * variances.log()
        score = (logits.softmax(1) / variances)[..., None] * away
        return SimpleNamespace(sample=score.sum(1).reshape(sample.shape) * self.scale)


def mixture():
    return MixtureScore(*(GOLDEN[name].tolist() for name in ("means", "weights", "stds")), 3, 3, 4)


def gaussian(mean, std, size, channels=1):
    """The score of independent pixels of one mean and standard deviation."""
    return MixtureScore(np.full((1, channels, size, size), mean).tolist(), [1.0], [std], channels, channels, size)


def replay(pipe, draws, monkeypatch, **arguments):
    """Run with these draws; returns the output and all samples after a step of the scheduler, by the step's kind."""
    draws, samples = iter(draws), {"step_correct": [], "step_pred": []}
    monkeypatch.setattr(ve_sde, "randn_tensor", lambda *args, **kwargs: next(draws))
    for name, found in samples.items():

        def recorded(step, found, *args):
            output = step(*args)
            found.append(output.prev_sample)
            return output

        monkeypatch.setattr(pipe.scheduler, name, partial(recorded, getattr(pipe.scheduler, name), found))
    output = pipe(output_type="latent", **arguments).images
    assert next(draws, None) is None, "every draw is used"
    return output, samples["step_correct"], samples["step_pred"]


def close(found, recorded):
    recorded = torch.from_numpy(recorded)
    assert found.dtype == torch.float64 and found.shape == recorded.shape
    assert (found - recorded).abs().max() < 1e-9 * recorded.abs().max()


# -- recorded runs


@pytest.mark.parametrize("pair", PAIRS)
def test_recorded_runs(pair, monkeypatch):
    predictor, corrector = pair.split("+")
    steps = int(GOLDEN["N"])
    scheduler = VESDEScheduler(
        steps,
        sigma_min=float(GOLDEN["sde_sigma_min"]),
        sigma_max=float(GOLDEN["sde_sigma_max"]),
        snr=float(GOLDEN["snr"]),
        sampling_eps=float(GOLDEN["eps"]),
        batch_norms=True,
    )
    draws = []
    for pairwise in zip(GOLDEN["noise_corrector"], GOLDEN["noise_predictor"], strict=True):
        used = (corrector != "none", predictor != "none")
        draws += [torch.from_numpy(noise) for noise, wanted in zip(pairwise, used, strict=True) if wanted]
    output, corrected, predicted = replay(
        quiet(VESDEPipeline(mixture(), scheduler)),
        draws,
        monkeypatch,
        batch_size=2,
        num_inference_steps=steps,
        predictor=PREDICTORS.get(predictor, predictor),
        corrector_steps=int(corrector != "none"),
        latents=torch.from_numpy(GOLDEN["x_T"]) / scheduler.init_noise_sigma,
    )
    close(scheduler.timesteps, GOLDEN["timesteps"])
    close(scheduler.discrete_sigmas, GOLDEN["discrete_sigmas"])
    for kind, found in (("x_corr", corrected), ("x_pred", predicted)):
        assert (f"{pair}|{kind}" in GOLDEN) == bool(found)
        for x, recorded in zip(found, GOLDEN.get(f"{pair}|{kind}", []), strict=True):
            close(x, recorded)
    close(output, GOLDEN["none+langevin|x_corr"][-1] if predictor == "none" else GOLDEN[f"{pair}|x_pred_mean"])


def test_recorded_run_of_the_tutorial(monkeypatch):
    steps = len(GOLDEN["slide|timesteps"])
    scheduler = VESDEScheduler(
        parametrization="exponential", sigma_base=float(GOLDEN["slide|sigma"]), sampling_eps=1e-3
    )
    output, corrected, predicted = replay(
        quiet(VESDEPipeline(mixture(), scheduler)),
        [torch.from_numpy(noise) for noise in GOLDEN["slide|noise"]],
        monkeypatch,
        batch_size=2,
        num_inference_steps=steps,
        predictor="euler_maruyama",
        corrector_steps=0,
        latents=torch.from_numpy(GOLDEN["slide|x_T"]) / scheduler.init_noise_sigma,
    )
    assert not corrected
    close(scheduler.timesteps, GOLDEN["slide|timesteps"])
    close(scheduler.sigmas, GOLDEN["slide|marginal_std"])
    for x, recorded in zip(predicted, GOLDEN["slide|x"], strict=True):
        close(x, recorded)
    close(output, GOLDEN["slide|mean"])


# -- diffusers' own


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stock_pipeline_gives_the_same(batch_size):
    """`ScoreSdeVePipeline` of diffusers, the same network, scheduler and seed."""
    unet = make_unet(in_channels=3, out_channels=3)
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=30, sigma_max=2.0, snr=0.05, correct_steps=2)
    stock = quiet(ScoreSdeVePipeline(unet, scheduler))
    expected = stock(batch_size, 30, generator=torch.Generator().manual_seed(3), output_type="np").images
    pipe = quiet(VESDEPipeline(**stock.components))
    assert type(pipe.scheduler) is VESDEScheduler
    assert {name: pipe.scheduler.config[name] for name in ("sigma_max", "snr", "correct_steps")} == {
        "sigma_max": 2.0,
        "snr": 0.05,
        "correct_steps": 2,
    }
    if batch_size > 1:
        pipe.scheduler.register_to_config(batch_norms=True)
    images = pipe(batch_size, 30, generator=torch.Generator().manual_seed(3), output_type="np").images
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.1, "clipping does not hide all"
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-3)
    other = pipe(batch_size, 30, generator=torch.Generator().manual_seed(4), output_type="np").images
    assert np.abs(other - expected).max() > 0.1


def test_stock_scheduler_keeps_its_settings():
    """Also those that are its defaults, or were given by position, which `from_config` replaces by ours."""
    names = ("num_train_timesteps", "snr", "sigma_min", "sigma_max", "sampling_eps", "correct_steps")
    for stock in (ScoreSdeVeScheduler(), ScoreSdeVeScheduler(500, 0.2, 0.02)):
        expected = {name: stock.config[name] for name in names}
        schedulers = [VESDEPipeline(make_unet(), stock).scheduler, VESDEScheduler.from_config(stock.config)]
        schedulers.append(VESDEScheduler.from_config(schedulers[0].config, batch_norms=True))
        assert schedulers[-1].config.batch_norms
        for scheduler in schedulers:
            assert {name: scheduler.config[name] for name in names} == expected


# -- closed forms


@pytest.mark.parametrize("parametrization", ["geometric", "exponential"])
def test_sigma_is_the_integral_of_the_diffusion(parametrization):
    """`sigma(t)^2 = sigma(0)^2 + integral of G^2`, with the `G` that a deterministic Euler-Maruyama step reveals."""
    scheduler = VESDEScheduler(parametrization=parametrization, sampling_eps=1e-9)
    scheduler.set_timesteps(4001)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    changes = [
        float(scheduler.step_pred(one, t, zero, "euler_maruyama", variance_noise=zero).prev_sample)
        for t in scheduler.timesteps
    ]
    total = sum(changes) - (changes[0] + changes[-1]) / 2  # the trapezoidal rule
    expected = float(scheduler.sigma(1.0)) ** 2 - float(scheduler.sigma(0.0)) ** 2
    assert total == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("parametrization", ["geometric", "exponential"])
def test_ancestral_steps_sample_the_posterior_of_a_known_image(parametrization):
    """`q(x_s' | x_s, x_0)` of Gaussian noise by Bayes' rule; at the end the image itself, whatever the noise."""
    scheduler = VESDEScheduler(parametrization=parametrization, sampling_eps=1e-3)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    x0, x, z = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    levels = [*scheduler.discrete_sigmas.flip(0).tolist(), 0.0]
    for i, t in enumerate(scheduler.timesteps):
        score = (x0 - x) / levels[i] ** 2
        output = scheduler.step_pred(score, t, x, "ancestral", variance_noise=z)
        precision = 1 / (levels[i] ** 2 - levels[i + 1] ** 2) + (1 / levels[i + 1] ** 2 if levels[i + 1] else math.inf)
        mean = x0 if math.isinf(precision) else x0 + (x - x0) * levels[i + 1] ** 2 / levels[i] ** 2
        torch.testing.assert_close(output.prev_sample_mean, mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(output.prev_sample, mean + precision**-0.5 * z, rtol=0, atol=1e-9)
    assert torch.equal(output.prev_sample, output.prev_sample_mean)


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("parametrization", ["geometric", "exponential"])
def test_gaussian_data_come_out_gaussian(predictor, parametrization):
    """Pixels of mean 0.6 and standard deviation 0.5 come out with both; 16384 of them, within five standard errors."""
    scheduler = VESDEScheduler(sigma_max=5.0, parametrization=parametrization, sigma_base=8.0, sampling_eps=1e-3)
    pipe = quiet(VESDEPipeline(gaussian(0.6, 0.5, 64), scheduler))
    images = pipe(
        4,
        400,
        predictor,
        corrector_steps=0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert images.mean() == pytest.approx(0.6, abs=5 * 0.5 / 128)
    assert images.std() == pytest.approx(0.5, rel=5 / (2 * 16384) ** 0.5 + 0.02)  # and 2 % of discretization


def test_guidance_gives_the_posterior():
    """
    Data N(0, a^2) and a measurement y = x_0 + N(0, r^2): the gradient of `log p(y | x_t)` leads to the posterior
    N(a^2 y / (a^2 + r^2), a^2 r^2 / (a^2 + r^2)).
    """
    a, r, y = 0.5, 0.3, 1.0

    def cond_fn(sample, sigma):
        sigma = sigma[:, None, None, None]
        assert not torch.is_grad_enabled() and sample.shape == (4, 1, 64, 64)
        shrink = a**2 / (a**2 + sigma**2)
        return shrink * (y - shrink * sample) / (r**2 + shrink * sigma**2)

    pipe = quiet(VESDEPipeline(gaussian(0.0, a, 64), VESDEScheduler(sigma_max=5.0)))
    generator = torch.Generator().manual_seed(0)
    images = pipe(4, 400, corrector_steps=0, cond_fn=cond_fn, generator=generator, output_type="latent").images
    mean, std = a**2 * y / (a**2 + r**2), a * r / (a**2 + r**2) ** 0.5
    assert images.mean() == pytest.approx(mean, abs=5 * std / 128 + 0.005)
    assert images.std() == pytest.approx(std, rel=5 / (2 * 16384) ** 0.5 + 0.02)


def test_guidance_adds_to_the_score():
    """A gradient that is twice the score's, scaled by one half, is a network of twice the score."""
    twice = mixture()
    twice.scale.data.fill_(2.0)
    images = []
    for unet, arguments in (
        (twice, {}),
        (mixture(), {"cond_fn": lambda x, s: 2 * mixture()(x, s).sample, "guidance_scale": 0.5}),
    ):
        pipe = quiet(VESDEPipeline(unet, VESDEScheduler(sigma_max=5.0)))
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        images.append(pipe(2, 10, generator=generator, output_type="latent", **arguments).images)
    torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)


def test_noise_prediction_is_the_score_in_other_units():
    class NoiseOfMixture(MixtureScore):
        def forward(self, sample, sigmas, class_labels=None):
            score = super().forward(sample, sigmas).sample
            return SimpleNamespace(sample=-score * sigmas[:, None, None, None])

    images = []
    for cls, prediction_type in ((MixtureScore, "score"), (NoiseOfMixture, "epsilon")):
        unet = cls(**{k: v for k, v in mixture().config.items() if not k.startswith("_")})
        pipe = quiet(VESDEPipeline(unet, VESDEScheduler(sigma_max=5.0, prediction_type=prediction_type)))
        images.append(pipe(2, 10, generator=torch.Generator().manual_seed(0), output_type="latent").images)
    torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)


def test_corrector_steps_have_the_given_signal_to_noise_ratio():
    """In every row; with norms of the batch only in their mean, as the authors'."""
    generator = torch.Generator().manual_seed(0)
    score, sample, noise = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    score *= torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)[:, None, None, None]
    for batch_norms in (False, True):
        scheduler = VESDEScheduler(batch_norms=batch_norms)
        output = scheduler.step_correct(score, sample, snr=0.3, variance_noise=noise)
        signal = (output.prev_sample_mean - sample).flatten(1).norm(dim=1)
        added = (output.prev_sample - output.prev_sample_mean).flatten(1).norm(dim=1)
        if batch_norms:
            assert signal.mean() / added.mean() == pytest.approx(0.3, rel=1e-12)
            assert (signal / added - 0.3).abs().min() > 0.01
        else:
            torch.testing.assert_close(signal / added, torch.full((3,), 0.3, dtype=torch.float64))
    default = VESDEScheduler(snr=0.3).step_correct(score, sample, variance_noise=noise, return_dict=False)
    given = VESDEScheduler(snr=0.1).step_correct(score, sample, 0.3, variance_noise=noise, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(default, given, strict=True))


@pytest.mark.parametrize("scale", [1000.0, 1e-4])
def test_corrector_steps_in_half_precision(scale):
    """Neither the norm of a score nor the size of a step need fit in 16 bits."""
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    score, sample = torch.full((1, 3, 64, 64), scale).half(), torch.zeros(1, 3, 64, 64).half()
    half = VESDEScheduler().step_correct(score, sample, variance_noise=noise)
    double = VESDEScheduler().step_correct(score.double(), sample.double(), variance_noise=noise.double())
    for found, expected in zip(half.to_tuple(), double.to_tuple(), strict=True):
        assert found.dtype == torch.float16 and expected.dtype == torch.float64
        torch.testing.assert_close(found, expected.half(), rtol=2e-3, atol=1e-3 * expected.abs().max().item())


def test_corrector_improves_a_coarse_predictor():
    """Ten steps forget how wide the data are; Langevin steps at each level, of a small ratio, restore it."""
    errors = []
    for corrector_steps in (0, 10):
        pipe = quiet(VESDEPipeline(gaussian(0.0, 0.5, 64), VESDEScheduler(sigma_max=5.0, snr=0.1)))
        generator = torch.Generator().manual_seed(0)
        images = pipe(2, 10, "ancestral", corrector_steps, generator=generator, output_type="latent").images
        errors.append(abs(images.std().item() - 0.5))
    assert errors[1] < errors[0] / 2


# -- levels


def test_add_noise():
    scheduler = VESDEScheduler(sigma_min=0.01, sigma_max=1.0)
    x0, z = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = scheduler.add_noise(x0, z, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(noisy, x0 + torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1) * z)
    torch.testing.assert_close(scheduler.add_noise(x0, z, 0.5), x0 + 0.1 * z)
    assert scheduler.add_noise(x0.half(), z.half(), 0.5).dtype == torch.float16


@pytest.mark.parametrize("sampling_eps", [1e-5, 1e-3])
def test_every_time_has_its_level(sampling_eps):
    """Also with times in float32, and where `eps N` reaches a whole step."""
    scheduler = VESDEScheduler(sampling_eps=sampling_eps)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for steps in (2, 1000, 2500):
        scheduler.set_timesteps(steps)
        levels = [0.0, *scheduler.discrete_sigmas.tolist()]
        for times in (scheduler.timesteps, scheduler.timesteps.float()):
            for place in {0, steps // 3, steps - 2, steps - 1}:
                change = scheduler.step_pred(one, times[-1 - place], zero, variance_noise=zero).prev_sample_mean.item()
                assert change == pytest.approx(levels[place + 1] ** 2 - levels[place] ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parametrization": "cosine"}, "`parametrization` is 'cosine'.*'geometric' or 'exponential'"),
        ({"prediction_type": "v_prediction"}, "`prediction_type` is 'v_prediction'.*'score' or 'epsilon'"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "`sigma_min` is 2.0 and `sigma_max` is 1.0"),
        ({"sigma_min": 0.0}, "`sigma_min` is 0.0"),
        ({"sigma_base": 1.0}, "`sigma_base` is 1.0"),
        ({"snr": 0.0}, "`snr` is 0.0.*`correct_steps=0`"),
        ({"sampling_eps": 0.0}, "`sampling_eps` is 0.0"),
        ({"correct_steps": -1}, "`correct_steps` is -1"),
        ({"num_train_timesteps": 1}, "`num_inference_steps` is 1"),
    ],
)
def test_bad_scheduler(arguments, message):
    with pytest.raises(ValueError, match=message):
        VESDEScheduler(**arguments)


def test_bad_steps():
    scheduler, x = VESDEScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="`predictor` is 'heun'.*euler_maruyama"):
        scheduler.step_pred(x, 0.5, x, "heun")
    for time in (0.0, 999, float("nan")):
        with pytest.raises(ValueError, match="`timestep` is .*take one of `timesteps`"):
            scheduler.step_pred(x, time, x)


# -- what every pipeline owes


class TestUnconditional(PipelineContract):
    pipeline_class = VESDEPipeline
    image_shape = (1, 8, 8)

    def components(self):
        return {"unet": make_unet(), "scheduler": VESDEScheduler(sigma_max=1.0, snr=0.02)}

    def inputs(self, batch_size):
        return {"batch_size": batch_size, "num_inference_steps": 6}

    def test_a_batch_equals_single_calls(self, pipe):
        pipe.to(torch.float64)
        inputs = self.inputs(3)
        batch = self.run(pipe, 3)
        for i in range(3):
            one = {k: v[i : i + 1] for k, v in inputs.items() if isinstance(v, list)}
            single = self.run(pipe, 1, **one, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close(single[0], batch[i], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(batch[0], batch[1])


class TestClassesAndChannels(TestUnconditional):
    """Three channels in [-1, 1], classes, the exponential schedule, a gradient to follow."""

    image_shape = (3, 8, 8)

    def components(self):
        unet = make_unet(in_channels=3, out_channels=3, num_class_embeds=4)
        scheduler = VESDEScheduler(
            parametrization="exponential", sigma_base=3.0, sampling_eps=1e-3, snr=0.02, centered=True
        )
        return {"unet": unet, "scheduler": scheduler}

    def inputs(self, batch_size):
        return {
            "batch_size": batch_size,
            "num_inference_steps": 6,
            "predictor": "euler_maruyama",
            "class_labels": [i % 4 for i in range(batch_size)],
            "cond_fn": lambda sample, sigma: -sample / (1 + sigma[:, None, None, None] ** 2),
            "guidance_scale": 0.5,
        }


def test_batch_norms_are_the_only_tie_between_images():
    results = {}
    for batch_norms in (False, True):
        pipe = quiet(VESDEPipeline(mixture(), VESDEScheduler(sigma_max=5.0, batch_norms=batch_norms)))
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        batch = pipe(2, 10, generator=generator, output_type="pt").images
        single = pipe(1, 10, generator=torch.Generator().manual_seed(0), output_type="pt").images
        results[batch_norms] = (batch[:1] - single).abs().max()
    assert results[False] < 1e-9 < 1e-6 < results[True]


def test_arguments_go_before_the_scheduler():
    """`snr` and `corrector_steps` of a call, and those of the scheduler without."""
    images = []
    for config, arguments in (
        ({"snr": 0.1, "correct_steps": 2}, {}),
        ({"snr": 0.3, "correct_steps": 1}, {"snr": 0.1, "corrector_steps": 2}),
        ({"snr": 0.3, "correct_steps": 2}, {}),
        ({"snr": 0.1, "correct_steps": 1}, {}),
    ):
        pipe = quiet(VESDEPipeline(mixture(), VESDEScheduler(sigma_max=5.0, **config)))
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(1, 10, generator=generator, output_type="latent", **arguments).images)
    assert torch.equal(images[0], images[1])
    assert not any(torch.allclose(images[0], other) for other in images[2:])


def test_range_of_the_data():
    """[0, 1] as it is, [-1, 1] rescaled, both clipped."""
    for centered in (False, True):
        pipe = quiet(VESDEPipeline(gaussian(0.2, 0.5, 8), VESDEScheduler(sigma_max=5.0, centered=centered)))
        raw, images = (
            pipe(2, 20, generator=torch.Generator().manual_seed(0), output_type=output_type).images
            for output_type in ("latent", "pt")
        )
        assert raw.min() < 0 and raw.max() > 1
        torch.testing.assert_close(images, ((raw + 1) / 2 if centered else raw).clamp(0, 1))


def test_classes_matter_and_sizes_are_free():
    pipe = quiet(VESDEPipeline(make_unet(num_class_embeds=4), VESDEScheduler(sigma_max=1.0, snr=0.02)))

    def run(**arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe(2, 4, generator=generator, output_type="latent", **arguments).images

    one, same, two = (run(class_labels=labels) for labels in (1, torch.tensor([1, 1]), [2, 2]))
    assert torch.equal(one, same) and not torch.allclose(one, two)
    assert run(class_labels=1, height=4, width=12).shape == (2, 1, 4, 12)


@pytest.mark.parametrize("channels", [2, 5])
def test_any_number_of_channels(channels):
    pipe = quiet(VESDEPipeline(gaussian(0.5, 0.1, 8, channels), VESDEScheduler(sigma_max=5.0)))
    assert pipe(2, 4, output_type="np").images.shape == (2, 8, 8, channels)
    with pytest.raises(ValueError, match=f"'pil'.*{channels} channels"), no_model_runs(pipe):
        pipe(2, 4)


def test_last_callback_sees_the_result():
    pipe, seen = quiet(VESDEPipeline(mixture(), VESDEScheduler(sigma_max=5.0))), []
    images = pipe(
        2, 5, output_type="latent", callback_on_step_end=lambda p, i, t, tensors: seen.append((t, tensors["latents"]))
    ).images
    assert torch.equal(images, seen[-1][1]) and not torch.equal(seen[-2][1], seen[-1][1])
    assert [t for t, _ in seen] == pipe.scheduler.timesteps.tolist()


# -- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": True}, "`batch_size` is True"),
        ({"corrector_steps": True}, "`corrector_steps` is True"),
        ({"height": 8.0}, r"`height` and `width` are \(8.0, 8\).*`int` multiples of 2"),
        ({"width": "8"}, r"`height` and `width` are \(8, '8'\)"),
        ({"latents": torch.full((1, 1, 8, 8), math.inf)}, "`latents` has values that are not finite"),
        ({"num_inference_steps": 1}, "`num_inference_steps` is 1.*at least 2"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
        ({"predictor": "heun"}, "`predictor` is 'heun'.*euler_maruyama.*`None`"),
        ({"corrector_steps": -1}, "`corrector_steps` is -1"),
        ({"predictor": None, "corrector_steps": 0}, "`predictor` is `None` and `corrector_steps` is 0"),
        ({"snr": -0.1}, "`snr` is -0.1.*`corrector_steps=0`"),
        ({"guidance_scale": 2.0}, "`guidance_scale` is 2.0.*no `cond_fn`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"height": 7}, r"`height` and `width` are \(7, 8\).*multiples of 2"),
        ({"width": 0}, r"`height` and `width` are \(8, 0\)"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"`latents` has shape \(2, 1, 8, 8\).*\(1, 1, 8, 8\)"),
        ({"class_labels": 1}, "`class_labels` were given.*takes none"),
    ],
)
def test_bad_input(arguments, message):
    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler()))
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe(**({"num_inference_steps": 3} | arguments))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "`class_labels` are missing"),
        (4, ValueError, r"`class_labels` is \[4\].*from 0 to 3"),
        ([1, 2], ValueError, "`class_labels` has 2 entries for a batch of 1"),
        (0.5, TypeError, "`class_labels` has dtype torch.float32"),
    ],
)
def test_bad_labels(labels, error, message):
    pipe = quiet(VESDEPipeline(make_unet(num_class_embeds=4), VESDEScheduler()))
    with pytest.raises(error, match=message), no_model_runs(pipe):
        pipe(class_labels=labels, num_inference_steps=3)


def test_unet_without_a_size_needs_one():
    pipe = quiet(VESDEPipeline(make_unet(sample_size=None), VESDEScheduler(sigma_max=1.0)))
    with pytest.raises(ValueError, match="`height` and `width` must both be given"), no_model_runs(pipe):
        pipe(num_inference_steps=3, height=8)
    assert pipe(num_inference_steps=3, height=8, width=4, output_type="pt").images.shape == (1, 1, 8, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, 0, 0, 0], ValueError, r"gave shape \(1,\) at step 0, but must .* \(1, 1, 8, 8\)"),
        (lambda x: None, TypeError, "gave a NoneType at step 0, but must give a tensor"),
        (lambda x: 0.0, TypeError, "gave a float at step 0"),
        (lambda x: x.numpy(), TypeError, "gave a ndarray at step 0"),
        (lambda x: x * 1j, TypeError, "gave a torch.complex64 at step 0"),
        (lambda x: x * math.nan, ValueError, "gave values that are not finite at step 0"),
    ],
)
def test_what_functions_give(change, error, message):
    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler(sigma_max=1.0)))
    with pytest.raises(error, match=f"`cond_fn` {message}"):
        pipe(num_inference_steps=3, cond_fn=lambda sample, sigma: change(sample))
    with pytest.raises(error, match=f"`callback_on_step_end` {message}"):
        pipe(num_inference_steps=3, callback_on_step_end=lambda p, i, t, k: {"latents": change(k["latents"])})


def test_gradients_may_change_what_they_get():
    def cond_fn(sample, sigma):
        sample.mul_(2)
        return torch.zeros_like(sample)

    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler(sigma_max=1.0)))
    images = [
        pipe(num_inference_steps=3, cond_fn=f, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for f in (cond_fn, None)
    ]
    assert torch.equal(*images)


def test_callbacks_keep_the_dtype():
    pipe, dtypes = quiet(VESDEPipeline(make_unet(), VESDEScheduler(sigma_max=1.0))), []

    def callback(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return {"latents": tensors["latents"].bfloat16()}

    images = pipe(num_inference_steps=3, callback_on_step_end=callback, output_type="pt").images
    assert {*dtypes, images.dtype} == {torch.float32}


def test_generators_in_a_tuple():
    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler(sigma_max=1.0)))
    images = [
        pipe(2, 3, generator=kind(torch.Generator().manual_seed(i) for i in range(2)), output_type="pt").images
        for kind in (list, tuple)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": "3"}, "`guidance_scale` is '3', but must be a number"),
        ({"snr": "a"}, "`snr` is 'a', but must be a number"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "`latents` is a ndarray"),
    ],
)
def test_types_that_are_refused(arguments, message):
    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler()))
    with pytest.raises(TypeError, match=message), no_model_runs(pipe):
        pipe(num_inference_steps=3, **arguments)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, ScoreSdeVeScheduler])
def test_schedulers_that_were_replaced(scheduler):
    pipe = quiet(VESDEPipeline(make_unet(), VESDEScheduler()))
    pipe.scheduler = scheduler()
    message = f"`scheduler` is a {scheduler.__name__}.*`VESDEScheduler.from_config"
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe(num_inference_steps=3)


def test_images_that_are_not_finite():
    unet, runs = make_unet(), []
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipe = quiet(VESDEPipeline(unet, VESDEScheduler()))
    hook = unet.register_forward_pre_hook(lambda *args: runs.append(args))
    with pytest.raises(ValueError, match="not finite after step 0.*score is zero"):
        pipe(num_inference_steps=30)
    assert len(runs) == 2  # corrector and predictor
    hook.remove()
    assert pipe(num_inference_steps=3, corrector_steps=0, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler])
def test_schedulers_of_another_kind(scheduler):
    with pytest.raises(ValueError, match=f"`scheduler` is a {scheduler.__name__}.*`VESDEScheduler`"):
        VESDEPipeline(make_unet(), scheduler())


def test_networks_of_another_kind():
    with pytest.raises(ValueError, match="1 input and 2 output channels"):
        VESDEPipeline(make_unet(out_channels=2), VESDEScheduler())
    with pytest.raises(ValueError, match="conditioned on text or on embeddings"):
        VESDEPipeline(make_unet(class_embed_type="identity"), VESDEScheduler())
    text = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(ValueError, match="conditioned on text or on embeddings"):
        VESDEPipeline(text, VESDEScheduler())


def test_examples():
    result = doctest.testmod(ve_sde, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 10
