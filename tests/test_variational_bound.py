"""The loss of a learned variance: recorded numbers of guided-diffusion, and oracles in closed form.

`goldens/guidance/losses.npz` holds numbers that OpenAI's guided-diffusion (github.com/openai/guided-diffusion, commit
22e0df8) computes in double precision for 6 images at 6 of 1000 timesteps, with a network in closed form (`network`).
"""

import doctest
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusers_ext.training import train_unconditional
from diffusers_ext.training.train_unconditional import target, training_losses, variational_bound

T = 1000
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def exact_scheduler(schedule="linear", **config):
    """A scheduler with tables in double precision; its own are in single precision."""
    betas = np.linspace(1e-4, 0.02, T)
    if schedule == "cosine":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    scheduler = DDPMScheduler(trained_betas=betas.tolist(), **config)
    scheduler.betas = torch.from_numpy(betas)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    return scheduler


def network(x, timesteps, mu):
    """The exact noise prediction for pixels of mean `mu` and variance 1/4, disturbed; and a v that leaves [-1, 1]."""
    tau = timesteps.to(x).reshape(-1, 1, 1, 1) / 1000
    a = torch.exp(-(0.1 * tau + 9.95 * tau**2))
    eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / (0.25 * a + 1 - a) + 0.05 * torch.sin(2 * x + 10 * tau)
    return torch.cat([eps, 1.3 * torch.sin(1.5 * x + 20 * tau)], dim=1)


@pytest.fixture(scope="module")
def recorded(goldens):
    return {name: torch.from_numpy(array) for name, array in np.load(goldens / "guidance" / "losses.npz").items()}


@pytest.fixture
def batch():
    """Clean images, noise and timesteps, the least and the most noisy one among them."""
    torch.manual_seed(1)
    images = torch.randint(0, 256, (5, 2, 4, 4)).double() / 127.5 - 1
    return images, torch.randn_like(images), torch.tensor([0, 1, 30, 500, 999])


@pytest.mark.parametrize("case", ["lr", "lr_rescaled", "lr_cosine", "kl", "fixed"])
def test_recorded_losses(case, recorded):
    scheduler = exact_scheduler("cosine" if case == "lr_cosine" else "linear")
    images, noise, timesteps = (recorded[name] for name in ("x0", "noise", "t"))
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(noisy_images, recorded[f"{case}|x_t"], **close)
    model_output = network(noisy_images, timesteps, recorded["mu"])
    if case == "kl":
        bound = variational_bound(scheduler, images, noisy_images, model_output, timesteps)
        torch.testing.assert_close(T * bound, recorded["kl|loss"], **close)
        return
    if case == "fixed":
        model_output = model_output[:, :3]
    losses = training_losses(scheduler, images, noise, noisy_images, model_output, timesteps)
    torch.testing.assert_close(losses["loss"], recorded[f"{case}|loss"], **close)
    if case == "fixed":
        assert list(losses) == ["loss"]
        return
    torch.testing.assert_close(losses["mse"], recorded[f"{case}|mse"], **close)
    torch.testing.assert_close(losses["vlb"] / T, recorded[f"{case}|vb"], **close)


def test_weight_of_the_bound(recorded):
    """`vlb_weight` times all T steps: as the paper's 0.001, so the default is T / 1000 for the term of one step."""
    scheduler = exact_scheduler()
    images, noise, timesteps = (recorded[name] for name in ("x0", "noise", "t"))
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    inputs = scheduler, images, noise, noisy_images, network(noisy_images, timesteps, recorded["mu"]), timesteps
    expected = recorded["lr|mse"] + 0.25 * T * recorded["lr|vb"]
    torch.testing.assert_close(training_losses(*inputs, vlb_weight=0.25)["loss"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("schedule", "case"), [("linear", "lr"), ("squaredcos_cap_v2", "lr_cosine")])
def test_single_precision(schedule, case, recorded):
    """With a stock scheduler and in the precision of a training run."""
    scheduler = DDPMScheduler(beta_schedule=schedule)
    images, noise, timesteps = recorded["x0"].float(), recorded["noise"].float(), recorded["t"]
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    model_output = network(noisy_images, timesteps, recorded["mu"].float())
    bound = variational_bound(scheduler, images, noisy_images, model_output, timesteps)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound, recorded[f"{case}|vb"].float(), rtol=1e-3, atol=2e-6)
    low = variational_bound(scheduler, images, noisy_images, model_output.bfloat16(), timesteps)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low[:2], bound[:2], rtol=0.05, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_bound_trains_the_variance_alone(prediction_type, batch):
    """The gradient with respect to the prediction is that of the error alone, bit for bit; the rest is the bound's."""
    scheduler = exact_scheduler(prediction_type=prediction_type)
    images, noise, timesteps = batch
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    model_output = torch.randn(5, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    losses = training_losses(scheduler, images, noise, noisy_images, model_output, timesteps)
    from_vlb, from_loss = (
        torch.autograd.grad(losses[name].sum(), model_output, retain_graph=True)[0] for name in ("vlb", "loss")
    )
    assert torch.equal(from_vlb[:, :2], torch.zeros_like(images))
    error = model_output[:, :2] - target(scheduler, images, noise, timesteps)
    torch.testing.assert_close(from_loss[:, :2], 2 * error / error[0].numel(), rtol=1e-12, atol=0)
    torch.testing.assert_close(from_loss[:, 2:], 1e-3 * from_vlb[:, 2:], rtol=1e-6, atol=0)
    # Where the decoder's likelihood is at its floor there is nothing to follow; the divergence always has a slope.
    assert (from_vlb[1:, 2:] != 0).all()
    # The bound itself depends on the mean too
    bound = variational_bound(scheduler, images, noisy_images, model_output, timesteps)
    assert (torch.autograd.grad(bound.sum(), model_output)[0][1:, :2] != 0).any()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_divergence_of_two_normals(prediction_type, batch):
    """Torch's divergence between the posterior and the step that a `DDPMScheduler` makes from the same output."""
    scheduler = exact_scheduler(prediction_type=prediction_type, variance_type="learned_range", clip_sample=False)
    images, noise, timesteps = (value[1:] for value in batch)
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    error = 0.1 * torch.randn_like(images)
    prediction = target(scheduler, images, noise, timesteps) + error
    model_output = torch.cat([prediction, torch.rand_like(images) * 2 - 1], dim=1)
    bound = variational_bound(scheduler, images, noisy_images, model_output, timesteps)
    truth = DDPMScheduler.from_config(scheduler.config, prediction_type="sample")
    truth.betas, truth.alphas_cumprod = scheduler.betas, scheduler.alphas_cumprod
    for i, t in enumerate(timesteps.tolist()):
        half = torch.zeros_like(images[i : i + 1])  # v = 0, so that both runs draw the same noise
        steps = []
        for one, output in ((truth, images[i : i + 1]), (scheduler, prediction[i : i + 1])):
            steps.append(
                one.step(
                    torch.cat([output, half], dim=1), t, noisy_images[i : i + 1],
                    generator=torch.Generator().manual_seed(0),
                ).prev_sample
            )  # fmt: skip
        a, previous, beta = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1], scheduler.betas[t]
        low, high = beta * (1 - previous) / (1 - a), beta
        f = (model_output[i, 2:] + 1) / 2
        # The noise is the same in both steps, so their difference is that of the means.
        true = Normal(torch.zeros_like(f), low.sqrt())
        ours = Normal((steps[1] - steps[0])[0], (high**f * low ** (1 - f)).sqrt())
        expected = kl_divergence(true, ours).mean() / math.log(2)
        torch.testing.assert_close(bound[i], expected, rtol=1e-7, atol=1e-12)


def test_perfect_prediction_costs_nothing(batch):
    """The posterior itself, v = -1: the divergence is 0; with v = 1 it is that of two variances."""
    scheduler = exact_scheduler()
    images, noise, timesteps = (value[1:] for value in batch)
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    for v in (-1.0, 1.0):
        model_output = torch.cat([noise, torch.full_like(noise, v)], dim=1)
        bound = variational_bound(scheduler, images, noisy_images, model_output, timesteps)
        a = scheduler.alphas_cumprod
        ratio = ((1 - a[timesteps - 1]) / (1 - a[timesteps])) ** ((v + 1) / 2)  # posterior's by the model's variance
        expected = (ratio - 1 - ratio.log()) / 2 / math.log(2)
        torch.testing.assert_close(bound, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_best_variance(prediction_type, batch):
    """Least is the bound where the variance is the posterior's plus the squared error of the mean.

    It is 1/2 log2(1 + error^2 / posterior variance) there, and its slope is zero.
    """
    scheduler = exact_scheduler(prediction_type=prediction_type)
    images, noise, timesteps = (value[1:] for value in batch)
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    column = (-1, 1, 1, 1)
    a, previous = (scheduler.alphas_cumprod[timesteps - i].reshape(column) for i in (0, 1))
    beta = scheduler.betas[timesteps].reshape(column)
    posterior_variance = beta * (1 - previous) / (1 - a)
    error = 0.5 * torch.randn_like(images)  # of the predicted x_0
    shift = {"sample": 1, "epsilon": -(a / (1 - a)).sqrt(), "v_prediction": -1 / (1 - a).sqrt()}[prediction_type]
    mean_error = beta * previous.sqrt() / (1 - a) * error
    best = posterior_variance + mean_error**2
    v = 2 * (best / posterior_variance).log() / (beta / posterior_variance).log() - 1
    prediction = target(scheduler, images, noise, timesteps) + shift * error
    v.requires_grad_()
    bound = variational_bound(scheduler, images, noisy_images, torch.cat([prediction, v], dim=1), timesteps)
    expected = 0.5 * torch.log2(1 + mean_error**2 / posterior_variance).flatten(1).mean(1)
    torch.testing.assert_close(bound.detach(), expected, rtol=1e-8, atol=1e-12)
    [slope] = torch.autograd.grad(bound.sum(), v)
    assert slope.abs().max() < 1e-10
    for change in (-0.1, 0.1):
        other = variational_bound(
            scheduler, images, noisy_images, torch.cat([prediction, v.detach() + change], dim=1), timesteps
        )
        assert (other > bound.detach()).all()


def test_likelihood_of_the_last_step_sums_to_one():
    """Over the 256 values of a pixel, for any mean and variance."""
    scheduler = exact_scheduler(prediction_type="sample")
    values = (torch.arange(256).double() / 127.5 - 1).reshape(-1, 1, 1, 1)
    timesteps = torch.zeros(256, dtype=torch.int64)
    for mean, v in ((-1.0, 0.0), (0.3, 1.0), (0.9999, 4.0), (2.0, 10.0)):
        model_output = torch.tensor([mean, v], dtype=torch.float64).reshape(1, 2, 1, 1).expand(256, -1, -1, -1)
        bits = variational_bound(scheduler, values, values, model_output, timesteps)
        assert (2**-bits).sum() == pytest.approx(1, abs=256e-12)
        # The most likely value is the one nearest to the mean.
        assert bits.argmin() == (values.flatten() - mean).abs().argmin()


def test_model_output_without_a_variance_is_refused():
    images = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="`model_output` has 3 channels, but must have twice the 3"):
        variational_bound(DDPMScheduler(), images, images, images, torch.tensor([5]))


def test_example_in_docstring():
    result = doctest.testmod(train_unconditional)
    assert result.attempted >= 9 and result.failed == 0
