"""The analytic prior, its posterior and the metrics: each against recorded numbers or a closed form; the benchmark."""

import csv
import doctest
import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from inpainting_goldens import MixtureUNet, load
from packaging.version import Version
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import diffusers_ext.evaluation.posterior as posterior_module
from diffusers_ext import CoPaintPipeline
from diffusers_ext.evaluation.posterior import (
    SUITES,
    AnalyticUNet,
    GaussianMixture,
    InpaintingProblem,
    count_passes,
    inpainting_problems,
    posterior_metrics,
    sliced_wasserstein,
)

ROOT = Path(__file__).parents[1]
RECORDED = {"digits": "digits", "digitsG": "digitsG", "gmm25": "gmm25_dy1", "gmm25_dy2": "gmm25_dy2"}


def recorded_problems(suite: str) -> tuple[list[InpaintingProblem], dict[str, np.ndarray]]:
    """The recorded problems of seed 0, and the file with their posteriors."""
    file = load(f"bench/{RECORDED[suite]}_seed0")
    arrays = {name: torch.from_numpy(array) for name, array in file.items() if name != "names"}
    shape = tuple(file["image_shape"])
    weights = arrays["prior_w"].expand(len(arrays["y"]), -1)
    return [
        InpaintingProblem(
            str(name),
            GaussianMixture(weights[k], arrays["prior_mu"], arrays["prior_cov"]),
            arrays["y"][k].reshape(shape),
            arrays["known"][k].reshape(1, *shape[1:]),
        )
        for k, name in enumerate(file["names"])
    ], file


def random_mixture(components: int, dimensions: int, scale: float = 0.3) -> GaussianMixture:
    weights = torch.rand(components, dtype=torch.float64) + 0.1
    roots = scale * torch.randn(components, dimensions, dimensions, dtype=torch.float64) / dimensions**0.5
    covariances = roots @ roots.mT + 0.01 * torch.eye(dimensions)
    means = 0.5 * torch.randn(components, dimensions, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def as_distribution(mixture: GaussianMixture, abar: float = 1.0) -> MixtureSameFamily:
    """The mixture after noising to a level, from PyTorch's own parts."""
    covariances = abar * mixture.covariances + (1 - abar) * torch.eye(mixture.means.shape[1], dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(math.sqrt(abar) * mixture.means, covariances)
    )


# --------------------------------------------------------------------------------------------------------- posterior


@pytest.mark.parametrize("suite", SUITES)
def test_posteriors_are_the_recorded_ones(suite):
    problems, file = recorded_problems(suite)
    for k, problem in enumerate(problems):
        posterior = problem.posterior
        for name, value in {
            "post_w": posterior.weights,
            "post_mu": posterior.means,
            "post_cov": posterior.covariances,
            "mean": posterior.mean,
            "cov": posterior.covariance,
        }.items():
            np.testing.assert_allclose(value.numpy(), file[f"p{k}_{name}"], rtol=0, atol=1e-8)


def test_posterior_is_joint_over_marginal():
    mixture = random_mixture(3, 5)
    known = torch.tensor([True, False, True, False, False])
    samples = mixture.sample(20)
    observed = GaussianMixture(mixture.weights, mixture.means[:, known], mixture.covariances[:, known][:, :, known])
    for sample in samples:
        posterior = mixture.condition(known, sample[known])
        expected = mixture.log_prob(sample[None]) - observed.log_prob(sample[None, known])
        torch.testing.assert_close(posterior.log_prob(sample[None, ~known]), expected, rtol=0, atol=1e-10)


def test_mixture_is_that_of_pytorch():
    mixture = random_mixture(4, 3)
    samples, reference = mixture.sample(50), as_distribution(mixture)
    torch.testing.assert_close(mixture.log_prob(samples), reference.log_prob(samples), rtol=0, atol=1e-10)
    torch.testing.assert_close(mixture.mean, reference.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.covariance.diagonal(), reference.variance, rtol=0, atol=1e-12)
    by_hand = mixture.weights * torch.exp(reference.component_distribution.log_prob(samples[:, None]))
    torch.testing.assert_close(
        mixture.responsibilities(samples), by_hand / by_hand.sum(1, keepdim=True), rtol=0, atol=1e-10
    )


def test_samples_have_the_mixtures_moments():
    mixture = random_mixture(3, 4)
    samples = mixture.sample(100_000, torch.Generator().manual_seed(1))
    sd = mixture.covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mixture.mean).abs() < 5 * sd / 100_000**0.5).all()
    torch.testing.assert_close(samples.T.cov(), mixture.covariance, rtol=0, atol=0.03 * sd.max().item() ** 2)
    assert torch.equal(samples, mixture.sample(100_000, torch.Generator().manual_seed(1)))


def test_mixture_refuses_what_is_none():
    weights, means, covariances = torch.tensor([0.5, 0.5]), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(2, 3\), \(3, 3\)\]"):
        GaussianMixture(weights, means, torch.eye(3))
    with pytest.raises(ValueError, match=r"the sum 2, but must not be negative and must sum to 1"):
        GaussianMixture(2 * weights, means, covariances)
    with pytest.raises(ValueError, match=r"minimum -0.5"):
        GaussianMixture(torch.tensor([-0.5, 1.5]), means, covariances)
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture(weights, means, torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="symmetric"):
        GaussianMixture(weights, means, covariances + torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]]))
    mixture = GaussianMixture(weights, means, covariances)
    for known, values in (([True, False], [1.0]), ([True, False, False], [1.0, 2.0])):
        with pytest.raises(ValueError, match="3 dimensions"):
            mixture.condition(torch.tensor(known), torch.tensor(values))
    for known in (torch.ones(3), torch.zeros(3)):
        with pytest.raises(ValueError, match="all True or all False"):
            mixture.condition(known.bool(), torch.zeros(int(known.sum())))


# ----------------------------------------------------------------------------------------------------------- network

SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "cosine": DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2"),
    "trained_betas": DDIMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 3, 2)])
def test_output_is_the_score(name, shape):
    scheduler, mixture = SCHEDULERS[name], random_mixture(3, math.prod(shape))
    model = AnalyticUNet.from_mixture(mixture, shape, scheduler, dtype=torch.float64)
    torch.testing.assert_close(model.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    for timestep in (0, 1, len(scheduler.alphas_cumprod) - 1):
        abar = model.alphas_cumprod[timestep].item()
        sample = as_distribution(mixture, abar).sample((5,)).requires_grad_()
        log_prob = as_distribution(mixture, abar).log_prob(sample)
        (score,) = torch.autograd.grad(log_prob.sum(), sample)
        output = model(sample.detach().reshape(5, *shape), timestep).sample
        torch.testing.assert_close(output.flatten(1), -math.sqrt(1 - abar) * score, rtol=0, atol=1e-9)


def test_output_is_that_of_the_recorded_prior():
    golden = MixtureUNet()
    covariances = golden.s2 * torch.eye(768, dtype=torch.float64) + (golden.V * golden.lam) @ golden.V.T
    mixture = GaussianMixture(golden.w, golden.mu, covariances.expand(3, -1, -1))
    model = AnalyticUNet.from_mixture(mixture, (3, 16, 16), dtype=torch.float64)
    sample = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for timestep in (0, 111, 999):
        expected = golden(sample, torch.tensor([timestep])).sample[:, :3]
        torch.testing.assert_close(model(sample, timestep).sample, expected, rtol=0, atol=1e-10)


def test_timesteps_of_all_forms():
    model = AnalyticUNet.from_mixture(random_mixture(3, 4), (1, 2, 2), dtype=torch.float64)
    sample, timesteps = torch.randn(4, 1, 2, 2, dtype=torch.float64), [999, 0, 500, 0]
    alone = torch.cat([model(sample[i : i + 1], timesteps[i]).sample for i in range(4)])
    torch.testing.assert_close(model(sample, torch.tensor(timesteps)).sample, alone)
    expected = model(sample, 7).sample
    for timestep in (7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7, 7]), torch.tensor(7.0)):
        assert torch.equal(model(sample, timestep).sample, expected)
    assert torch.equal(model(sample, 7, return_dict=False)[0], expected)
    assert torch.equal(model(sample, 7, class_labels=None)[0], expected)


def test_single_precision_is_close_at_every_level():
    problem = inpainting_problems("digits", 0)[0]
    exact = AnalyticUNet.from_mixture(problem.prior, (1, 8, 8), dtype=torch.float64)
    model = AnalyticUNet.from_mixture(problem.prior, (1, 8, 8))
    assert (model.dtype, exact.dtype) == (torch.float32, torch.float64)
    for timestep in (0, 10, 100, 500, 999):
        abar = exact.alphas_cumprod[timestep].item()
        clean, noise = problem.prior.sample(50).float(), torch.randn(50, 64)
        sample = (math.sqrt(abar) * clean + math.sqrt(1 - abar) * noise).reshape(50, 1, 8, 8)
        error = (model(sample, timestep).sample - exact(sample.double(), timestep).sample).abs().max().item()
        # what it makes of an error in the clean image that the noise prediction stands for
        assert error * math.sqrt((1 - abar) / abar) < 1e-4, timestep


def test_gradient():
    model = AnalyticUNet.from_mixture(random_mixture(3, 4), (1, 2, 2), dtype=torch.float64)
    sample = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    timesteps = torch.tensor([30, 600])
    assert torch.autograd.gradcheck(lambda x: model(x, timesteps).sample, sample)
    assert list(model.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(tmp_path, dtype):
    mixture = random_mixture(3, 6)
    model = AnalyticUNet.from_mixture(mixture, (1, 2, 3), SCHEDULERS["scaled_linear"], dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = AnalyticUNet.from_pretrained(tmp_path, torch_dtype=dtype)
    sample = torch.randn(2, 1, 2, 3, dtype=dtype)
    assert loaded.dtype == dtype and tuple(loaded.config.sample_size) == (2, 3)
    assert torch.equal(loaded(sample, 500).sample, model(sample, 500).sample)
    assert torch.equal(loaded(sample, 0).sample, model(sample, 0).sample)


def test_new_network_is_that_of_standard_normal_images():
    sample = torch.randn(2, 3, 4, 4)
    model = AnalyticUNet(sample_size=4, in_channels=3, out_channels=3)
    sigma = math.sqrt(1 - model.alphas_cumprod[400].item())
    torch.testing.assert_close(model(sample, 400).sample, sigma * sample)


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_stock_pipelines_sample_from_the_prior(pipeline, tmp_path):
    means = 0.5 * torch.tensor([[1.0] * 6, [-1.0] * 6])
    mixture = GaussianMixture(torch.tensor([0.8, 0.2]), means, 0.01 * torch.eye(6).expand(2, 6, 6))
    pipe = pipeline(AnalyticUNet.from_mixture(mixture, (1, 2, 3)), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(batch_size=300, num_inference_steps=50, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pipe(**arguments, output_type="np").images).flatten(1) * 2 - 1
    assert (images.mean(1) > 0).float().mean().item() == pytest.approx(0.8, abs=0.07)
    torch.testing.assert_close(images[images.mean(1) > 0].mean(0), torch.full((6,), 0.5), rtol=0, atol=0.04)
    pipe.save_pretrained(tmp_path)
    assert AnalyticUNet.from_pretrained(tmp_path / "unet").config.num_components == 2


def test_network_refuses_wrong_input():
    with pytest.raises(ValueError, match="`out_channels` is 2, but must be `in_channels`=1"):
        AnalyticUNet(out_channels=2)
    with pytest.raises(ValueError, match=r"4 dimensions, but `image_shape` is \(1, 3, 3\), which needs 9"):
        AnalyticUNet.from_mixture(random_mixture(1, 4), (1, 3, 3))
    model = AnalyticUNet(sample_size=2)
    for shape in ((1, 2, 2), (1, 4, 1, 1), (1, 1, 3, 2)):
        with pytest.raises(ValueError, match="`sample` has shape"):
            model(torch.zeros(shape), 0)
    sample = torch.zeros(1, 1, 2, 2)
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match="`timestep` is from .* must be from 0 to 999"):
            model(sample, timestep)
    with pytest.raises(ValueError, match="this model takes none"):
        model(sample, 0, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="torch.float16, but must be in float32"):
        model.half()(sample.half(), 0)


# ---------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("suite", SUITES)
def test_problems_of_seed_0_are_the_recorded_ones(suite):
    if suite.startswith("gmm25") and Version(torch.__version__) < Version("2.13"):
        pytest.skip("`torch.multinomial` of older versions draws otherwise from the same seed")
    recorded, _ = recorded_problems(suite)
    problems = inpainting_problems(suite, 0)
    assert len(problems) == len(recorded)
    for problem, other in zip(problems, recorded, strict=True):
        assert torch.equal(problem.known, other.known)
        assert problem.image.shape == other.image.shape
        for name in ("weights", "means", "covariances"):
            torch.testing.assert_close(getattr(problem.prior, name), getattr(other.prior, name), rtol=0, atol=1e-12)
        torch.testing.assert_close(problem.image, other.image, rtol=0, atol=1e-12)
        if suite.startswith("digits"):
            assert problem.name == other.name and int(problem.name.split("/")[1]) % 5 == 0  # not of those fitted to


@pytest.mark.parametrize("suite", SUITES)
def test_problems_are_those_of_the_seed(suite):
    first, again, other = (inpainting_problems(suite, seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.name == b.name and torch.equal(a.image, b.image) and torch.equal(a.prior.weights, b.prior.weights)
        assert not torch.equal(a.image, c.image)
        assert a.image.abs().max() <= 1


def test_pipelines_are_told_the_known_pixels_only():
    for suite, seed in itertools.product(SUITES, range(2)):
        for problem in inpainting_problems(suite, seed):
            hidden = problem.mask_image == 1
            assert torch.equal(hidden, ~problem.known)
            assert (problem.input_image[hidden.expand_as(problem.image)] == 0.5).all()
            torch.testing.assert_close(
                (2 * problem.input_image - 1)[problem.known], problem.image[problem.known], rtol=0, atol=1e-15
            )


def test_unknown_suite_is_refused():
    with pytest.raises(ValueError, match="'mnist', but must be one of"):
        inpainting_problems("mnist", 0)


# ----------------------------------------------------------------------------------------------------------- metrics


def test_sliced_wasserstein_of_a_shift():
    points = torch.randn(40, 6)
    assert sliced_wasserstein(points, points.flip(0)) == pytest.approx(0, abs=1e-12)
    shift = torch.zeros(6)
    shift[2] = 3
    # every projection moves by cos(angle) 3, whose mean square over directions in 6 dimensions is 9 / 6
    distance = sliced_wasserstein(points, points + shift, 20_000, torch.Generator().manual_seed(0))
    assert distance == pytest.approx(math.sqrt(9 / 6), rel=0.02)


def test_sliced_wasserstein_in_one_dimension_is_the_best_matching():
    a, b = torch.randn(6, 1), torch.randn(6, 1)
    best = min((a[:, 0] - b[list(order), 0]).square().mean().item() for order in itertools.permutations(range(6)))
    assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt(best), rel=1e-6)


def test_sliced_wasserstein_refuses_sets_of_different_size():
    with pytest.raises(ValueError, match=r"\(3, 2\) and `reference` \(4, 2\)"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))


def exact_samples(problem: InpaintingProblem, number: int, seed: int = 1) -> torch.Tensor:
    samples = problem.image.repeat(number, 1, 1, 1)
    samples[:, ~problem.known.expand_as(problem.image)] = problem.posterior.sample(
        number, torch.Generator().manual_seed(seed)
    )
    return samples


def test_metrics_of_exact_samples():
    problem = inpainting_problems("digits", 0)[0]
    metrics = posterior_metrics(exact_samples(problem, 4000), problem)
    assert metrics["sliced_wasserstein"] < 0.06 and metrics["mean_error"] < 0.03
    assert metrics["variance_ratio"] == pytest.approx(1, abs=0.03)
    assert abs(metrics["density_deficit"]) < 0.02
    assert metrics["weight_error"] < 0.03 and metrics["known_error"] == 0


@pytest.mark.parametrize("suite", ["digitsG", "gmm25"])
def test_metrics_are_in_units_of_the_posterior(suite):
    problem = inpainting_problems(suite, 0)[0]
    known, samples = problem.known.expand_as(problem.image), exact_samples(problem, 500)
    sd = problem.posterior.covariance.diagonal().mean().sqrt()
    base = posterior_metrics(samples, problem)

    hidden = samples[:, ~known]
    centered = samples.clone()
    centered[:, ~known] = hidden - hidden.mean(0) + problem.posterior.mean
    assert posterior_metrics(centered, problem)["mean_error"] == pytest.approx(0, abs=1e-12)
    moved = centered.clone()
    moved[:, ~known] += 2 * sd
    moved[:, known] -= 0.5 * sd
    metrics = posterior_metrics(moved, problem)
    assert metrics["mean_error"] == pytest.approx(2, abs=1e-9)
    assert metrics["known_error"] == pytest.approx(0.5, abs=1e-9)
    assert metrics["sliced_wasserstein"] == pytest.approx(2, abs=0.2)
    assert metrics["variance_ratio"] == pytest.approx(base["variance_ratio"], abs=1e-9)

    wider = samples.clone()
    wider[:, ~known] = 3 * hidden
    assert posterior_metrics(wider, problem)["variance_ratio"] == pytest.approx(9 * base["variance_ratio"], rel=1e-9)


def test_density_deficit_of_scaled_gaussian_samples():
    problem = inpainting_problems("digitsG", 0)[0]
    known, mean = problem.known.expand_as(problem.image), problem.posterior.mean
    for scale in (0.5, 1.0, 1.5):
        samples = exact_samples(problem, 4000)
        samples[:, ~known] = mean + scale * (samples[:, ~known] - mean)
        # E |x|^2 / 2 per dimension of a standard normal that is scaled
        expected = (scale**2 - 1) / 2
        assert posterior_metrics(samples, problem)["density_deficit"] == pytest.approx(expected, abs=0.02)


def test_weight_error_of_one_mode():
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[0.0, -0.8], [0.0, 0.8]]), 0.01 * torch.eye(2).expand(2, 2, 2)
    )
    problem = InpaintingProblem(
        "two", mixture, torch.zeros(1, 1, 2, dtype=torch.float64), torch.tensor([[[True, False]]])
    )
    samples = torch.zeros(100, 1, 1, 2)
    samples[..., 1] = 0.8
    assert posterior_metrics(samples, problem)["weight_error"] == pytest.approx(0.3, abs=1e-6)
    samples[:70, ..., 1] = -0.8
    assert posterior_metrics(samples, problem)["weight_error"] == pytest.approx(0.4, abs=1e-6)


def test_metrics_refuse_other_shapes():
    problem = inpainting_problems("gmm25", 0)[0]
    for shape in ((5, 1, 8, 1), (1, 1, 1, 8)):
        with pytest.raises(ValueError, match="`samples` has shape"):
            posterior_metrics(torch.zeros(shape), problem)


def test_passes_of_any_network_are_counted():
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    sample = torch.randn(2, 1, 8, 8, requires_grad=True)
    with count_passes(unet) as passes:
        unet(sample, 5, return_dict=False)
        assert (passes.forward, passes.backward) == (1, 0)
        loss = unet(sample, 5).sample.sum()
        torch.autograd.grad(loss, sample, retain_graph=True)
        torch.autograd.grad(loss, sample)
        assert (passes.forward, passes.backward) == (2, 2)
    unet(sample, 5)
    assert (passes.forward, passes.backward) == (2, 2)


def test_passes_of_a_pipeline_are_counted():
    problem = inpainting_problems("gmm25", 0)[0]
    unet = AnalyticUNet.from_mixture(problem.prior, problem.image.shape)
    pipe = CoPaintPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with count_passes(unet) as passes:
        pipe(
            problem.input_image,
            problem.mask_image,
            num_inference_steps=4,
            learning_rate=1e-8,
            adaptive_learning_rate=False,
            denoise_final=False,
            output_type="latent",
        )
    assert (passes.forward, passes.backward) == (3 * 3, 3 * 2)


def test_doctests():
    result = doctest.testmod(posterior_module)
    assert result.failed == 0 and result.attempted > 0


# --------------------------------------------------------------------------------------------------------- benchmark


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("inpainting_posterior", ROOT / "benchmarks/inpainting_posterior.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_writes_what_is_missing(benchmark, tmp_path, capsys):
    path = tmp_path / "table.csv"
    common = ["--suites", "gmm25", "--num_samples", "8", "--output", str(path), "--methods", "exact posterior"]
    benchmark.main([*common, "--seeds", "1"])
    first = path.read_text()
    assert "| exact posterior |" in capsys.readouterr().out
    benchmark.main([*common, "CoPaint 20", "--seeds", "0", "1"])
    rows = benchmark.read_rows(path)
    assert [key[1:] for key in rows] == [(s, m) for s in "01" for m in ("exact posterior", "CoPaint 20")]
    assert first.splitlines()[1] in path.read_text().splitlines()  # was not measured again
    done = rows["gmm25", "0", "CoPaint 20"]
    assert float(done["forward"]) >= 58 and float(done["backward"]) == 38
    assert done["command"].endswith(f"--output {path} --methods 'exact posterior' 'CoPaint 20' --seeds 0 1")

    before, done_before = path.read_text(), rows["gmm25", "1", "exact posterior"]
    benchmark.main([*common, "--seeds", "1"])
    assert path.read_text() == before
    benchmark.main([*common, "--seeds", "1", "--overwrite"])
    again = benchmark.read_rows(path)["gmm25", "1", "exact posterior"]
    assert (
        again["command"].endswith("--overwrite") and again["sliced_wasserstein"] == done_before["sliced_wasserstein"]
    )
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".lock"]


def test_benchmark_keeps_rows_of_other_processes(benchmark, tmp_path):
    path = tmp_path / "table.csv"
    script = tmp_path / "write.py"
    script.write_text(f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("b", {str(ROOT / "benchmarks/inpainting_posterior.py")!r})
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
for seed in range(40):
    row = dict.fromkeys(benchmark.COLUMNS, "1") | dict(suite=sys.argv[1], seed=str(seed))
    benchmark.write_row(pathlib.Path({str(path)!r}), row)
""")
    processes = [subprocess.Popen([sys.executable, script, suite]) for suite in ("digits", "gmm25")]
    assert [process.wait() for process in processes] == [0, 0]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = [(row["suite"], int(row["seed"])) for row in rows]
    assert written == [(suite, seed) for suite in ("digits", "gmm25") for seed in range(40)]


def test_benchmark_refuses_wrong_arguments(benchmark, capsys):
    for wrong in (["--methods", "Magic"], ["--suites", "mnist"], ["--num_samples", "1"]):
        with pytest.raises(SystemExit):
            benchmark.main(wrong)
    assert "must be at least 2" in capsys.readouterr().err


# Bounds with some room above what independent implementations of the methods reach on these problems.
BOUNDS = [
    ("CoPaint", "digitsG", 64, dict(mean_error=0.42, variance_ratio=0.95, known_error=0.03, forward=790)),
    ("CoPaint-Fast", "digitsG", 200, dict(sliced_wasserstein=0.30, known_error=0.2, forward=230)),
    ("DDNM 250", "digitsG", 200, dict(sliced_wasserstein=0.36, known_error=1e-6, forward=250)),
    ("DDRM 250", "digitsG", 200, dict(sliced_wasserstein=0.36, forward=250)),
    ("DPS 250, 0.3", "digitsG", 200, dict(sliced_wasserstein=0.34, known_error=0.3, forward=250)),
    ("MCG 250, 0.1", "digitsG", 200, dict(sliced_wasserstein=0.33, known_error=1e-6, forward=250)),
    ("replacement DDPM 250", "digitsG", 200, dict(sliced_wasserstein=0.50, forward=250)),
    ("RePaint 100 j10 r2", "digitsG", 200, dict(sliced_wasserstein=0.40, forward=190)),
]
SLOW_BOUNDS = [
    ("RePaint 250 j10 r10", "digitsG", 200, dict(sliced_wasserstein=0.33, forward=2410)),
    ("CoPaint", "digits", 128, dict(sliced_wasserstein=0.50, weight_error=0.15, known_error=0.05)),
    ("CoPaint-TT", "digits", 128, dict(sliced_wasserstein=0.45, weight_error=0.10, known_error=0.05)),
]


@pytest.mark.parametrize(
    ("method", "suite", "num_samples", "bounds"),
    [*BOUNDS, *[pytest.param(*bounds, marks=pytest.mark.slow) for bounds in SLOW_BOUNDS]],
)
def test_methods_come_close_to_the_posterior(benchmark, method, suite, num_samples, bounds):
    [(pipeline, settings)] = [entry[1:] for entry in benchmark.METHODS if entry[0] == method]
    figures = benchmark.measure(pipeline, settings, recorded_problems(suite)[0], num_samples, 0)
    assert {name: figures[name] for name in bounds if figures[name] > bounds[name]} == {}
    assert figures["variance_ratio"] > 0.6


def test_exact_samples_reach_the_floor(benchmark):
    figures = benchmark.measure(None, {}, recorded_problems("digits")[0], 128, 0)
    assert figures["sliced_wasserstein"] == pytest.approx(0.20, abs=0.02)
    assert figures["known_error"] == figures["forward"] == 0


@pytest.mark.slow
def test_order_of_the_methods(benchmark):
    distances = {}
    for name in ("replacement DDIM 250", "RePaint 100 j10 r2", "CoPaint"):
        [(pipeline, settings)] = [entry[1:] for entry in benchmark.METHODS if entry[0] == name]
        figures = benchmark.measure(pipeline, settings, recorded_problems("digits")[0], 128, 0)
        distances[name] = figures["sliced_wasserstein"]
    assert distances["CoPaint"] < 0.5 * distances["replacement DDIM 250"]
    assert distances["CoPaint"] < 0.7 * distances["RePaint 100 j10 r2"]
