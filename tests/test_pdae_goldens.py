"""PDAE's equations: recorded numbers of the authors' code, and oracles in closed form.

The pipeline runs its own loops; only the two networks are replaced by closed forms (see tests/goldens/pdae/README.md).
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline, PDAEScheduler
from diffusers_ext.pipelines.pdae import slerp

FOLDER = Path(__file__).parent / "goldens" / "pdae"
SCHEDULE = dict(np.load(FOLDER / "schedule.npz"))
LOSS = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "training_loss.npz").items()}
TRAJECTORIES = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "trajectories.npz").items()}
X0, XT, Z, Z_B = (TRAJECTORIES[name] for name in ("x0", "xT", "z", "z_b"))
ABAR = np.append(SCHEDULE["alphas_cumprod"], 1.0)  # index -1: the clean image

MU, S2, SC2 = 0.1, 0.25, 0.01  # pixels ~ N(MU, S2); given the code ~ N(m(z), SC2)
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 0, "atol": 5e-5}}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# -- the closed forms that stand for the networks


def image_mean(z, shape):
    channel, row, column = (
        np.arange(size).reshape(view) for size, view in zip(shape[1:], [(-1, 1, 1), (-1, 1), -1], strict=True)
    )
    wave = np.cos(np.pi * (row + 0.5) / shape[2]) * np.cos(np.pi * (column + 0.5) / shape[3])
    z = z.reshape(*z.shape, 1, 1, 1)
    return 0.3 * np.tanh(z[:, 0]) * (channel + 1) / shape[1] + 0.2 * np.tanh(z[:, 1]) * wave + 0.1 * np.sin(z[:, 2])


class Gauss:
    """The exact noise prediction and the exact gradient of log p(z | x_t) for Gaussian pixels."""

    def noise(x, t):
        abar = ABAR[t]
        return np.sqrt(1 - abar) * (x - np.sqrt(abar) * MU) / (abar * S2 + 1 - abar)

    def gradient(x, t, z):
        root, abar = np.sqrt(ABAR[t]), ABAR[t]
        return (x - root * MU) / (abar * S2 + 1 - abar) - (x - root * image_mean(z, x.shape)) / (abar * SC2 + 1 - abar)


class Stress:
    """No denoiser, on purpose: its estimates leave [-1, 1], so that the clip decides where a trajectory ends."""

    def noise(x, t):
        return 0.9 * np.sin(1.3 * x + 2 * t / 1000) + 0.25 * x * t / 1000

    def gradient(x, t, z):
        z = z.reshape(*z.shape, 1, 1, 1)
        return z[:, 0] * np.cos(x) * (1 - 0.5 * t / 1000) + z[:, 1] * t / 1000 - 0.3 * z[:, 2] * x


class ClosedFormPipeline(PDAEPipeline):
    model = Gauss

    def predict(self, sample, timestep, latent_code, class_labels=None, weight=None):
        self.calls = [*getattr(self, "calls", []), (timestep, latent_code is not None)]
        x = sample.double().numpy()
        model_output = self.model.noise(x, timestep)
        root, sigma = np.sqrt(ABAR[timestep]), np.sqrt(1 - ABAR[timestep])
        original = (x - sigma * model_output) / root
        if self.scheduler.config.prediction_type == "sample":
            model_output = original
        elif self.scheduler.config.prediction_type == "v_prediction":
            model_output = root * model_output - sigma * original
        model_output = torch.from_numpy(model_output).to(sample.dtype)
        if latent_code is None:
            return model_output, None
        if isinstance(latent_code, torch.Tensor):
            latent_code, weight = (latent_code, latent_code), torch.zeros(1)
        ends = [self.model.gradient(x, timestep, code.double().numpy()) for code in latent_code]
        weight = weight.double().numpy()
        return model_output, torch.from_numpy((1 - weight) * ends[0] + weight * ends[1]).to(sample.dtype)


def build(dtype=torch.float64, model=Gauss, codes=None, **scheduler):
    """A pipeline for images (2, 4, 4); with `codes`, a real encoder whose last layer is solved to give them."""
    unet = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
    )
    encoder = PDAEEncoder(4, 2, 4, block_out_channels=(8,), attention_block=None, norm_num_groups=4).double()
    if codes is not None:
        with torch.no_grad():
            images, targets = (torch.cat(parts) for parts in zip(*codes, strict=True))
            features = encoder.blocks(images).flatten(1)
            encoder.to_latent.weight.copy_((torch.linalg.pinv(features) @ targets).T)
            encoder.to_latent.bias.zero_()
    estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=4)
    pipe = ClosedFormPipeline(unet, encoder, estimator, PDAEScheduler(**scheduler)).to(dtype)
    pipe.model = model
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decode(pipe, latent_code, noise, steps, **kwargs):
    """The samples of every step, the starting noise included."""
    states = [noise]

    def record(pipe, step, timestep, tensors):
        states.append(tensors["latents"])

    output = pipe.decode(
        latent_code, noise, num_inference_steps=steps, output_type="pt", callback_on_step_end=record, **kwargs
    )
    torch.testing.assert_close(output.images, (states[-1] / 2 + 0.5).clamp(0, 1))
    return torch.stack(states)


def check(actual, golden, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), golden, **TOLERANCE[dtype])


def as_input(images):
    return images / 2 + 0.5  # the pipeline takes images in [0, 1]


# -- schedule and loss


def test_schedule():
    scheduler = PDAEScheduler()
    every = torch.arange(1000)
    like = torch.empty(0, dtype=torch.float64)
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    exact = {"rtol": 1e-11, "atol": 1e-14}
    for actual, name in (
        (scheduler.alphas_cumprod, "alphas_cumprod"),
        (scheduler.shift_coefficient(every, "posterior"), "shift_coef"),
        (scheduler.loss_weight(every), "weight"),
        (scheduler.posterior_mean(one, every, zero)[:, 0], "x_0_posterior_mean_x_0_coef"),
        (scheduler.posterior_mean(zero, every, one)[:, 0], "x_0_posterior_mean_x_t_coef"),
    ):
        torch.testing.assert_close(actual, torch.from_numpy(SCHEDULE[name]), **exact)
    ddim = scheduler.shift_coefficient(every, "ddim", like)
    torch.testing.assert_close(ddim, -torch.from_numpy(1 - ABAR[:-1]).sqrt(), **exact)
    assert all(scheduler.shift_coefficient(t) == scheduler.shift_coefficient(every)[t] for t in (0, 1, 500, 999))


def test_schedule_in_single_precision_is_the_rounded_double():
    """Computed in float32, the coefficients of small timesteps would be off by 1e-4 relatively."""
    every, like = torch.arange(1000), torch.empty(1, 1, 1, 1)
    for actual, name in (
        (PDAEScheduler().shift_coefficient(every, sample=like), "shift_coef"),
        (PDAEScheduler().loss_weight(every, sample=like), "weight"),
    ):
        assert actual.shape == (1000, 1, 1, 1) and actual.dtype == torch.float32
        torch.testing.assert_close(actual.flatten().double(), torch.from_numpy(SCHEDULE[name]), rtol=1e-6, atol=0)


def test_cosine_schedule():
    scheduler = PDAEScheduler(beta_schedule="squaredcos_cap_v2")
    for actual, name in (
        (scheduler.alphas_cumprod, "cosine_alphas_cumprod"),
        (scheduler.shift_coefficient(torch.arange(1000)), "cosine_shift_coef"),
        (scheduler.loss_weight(torch.arange(1000)), "cosine_weight"),
    ):
        torch.testing.assert_close(actual, torch.from_numpy(SCHEDULE[name]), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100, 200, 250, 500, 1000])
def test_levels(steps):
    levels = SCHEDULE[f"ddim{steps}_timestep_map"].tolist()
    scheduler = PDAEScheduler()
    scheduler.set_timesteps(steps, direction="encode")
    assert scheduler.trajectory == list(itertools.pairwise(levels))
    assert scheduler.timesteps.tolist() == levels[:-1]
    scheduler.set_timesteps(steps)
    assert scheduler.trajectory == list(zip(levels[:0:-1], levels[-2::-1], strict=True))
    assert scheduler.timesteps.tolist() == levels[:0:-1]


@both_dtypes
@pytest.mark.parametrize("case", range(4))
def test_training_loss(case, dtype):
    scheduler = PDAEScheduler()
    x0, noise, predicted, gradient = (LOSS[n].to(dtype) for n in ("x0", "noise", "predicted_eps", "predicted_grad"))
    t = LOSS[f"case{case}_t"].long()
    x_t = scheduler.add_noise(x0, noise, t)
    check(x_t, LOSS[f"case{case}_x_t"], dtype)
    error = (noise - scheduler.predict_noise(predicted, t, x_t, gradient)).square()
    loss = (scheduler.loss_weight(t, sample=x_t) * error).mean((1, 2, 3))
    check(loss, LOSS[f"case{case}_per_sample_loss"], dtype)
    check(loss.mean(), LOSS[f"case{case}_loss"], dtype)


def test_training_loss_with_the_closed_forms():
    pipe = build()
    t, x0, noise = LOSS["analytic_t"].long(), LOSS["x0"], LOSS["noise"]
    flat = x0.flatten(1)
    code = torch.stack([flat.mean(1), flat.std(1, unbiased=False), flat.amax(1), flat.amin(1)], dim=1)
    torch.testing.assert_close(code, LOSS["analytic_z"])
    x_t = pipe.scheduler.add_noise(x0, noise, t)
    outputs = [pipe.predict(x_t[i, None], int(t[i]), code[i, None]) for i in range(len(t))]
    model_output, gradient = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    error = (noise - pipe.scheduler.predict_noise(model_output, t, x_t, gradient)).square()
    loss = (pipe.scheduler.loss_weight(t, sample=x_t) * error).mean()
    torch.testing.assert_close(loss, LOSS["analytic_loss"], rtol=1e-9, atol=0)


@both_dtypes
def test_posterior_means(dtype):
    scheduler = PDAEScheduler()
    x0, predicted, gradient, x_t = (
        LOSS[name].to(dtype) for name in ("x0", "predicted_eps", "predicted_grad", "post_x_t")
    )
    t = LOSS["post_t"].long()
    check(scheduler.posterior_mean(x0, t, x_t), LOSS["post_mean_from_x0"], dtype)
    original = scheduler.predict_original_sample(scheduler.predict_noise(predicted, t, x_t), t, x_t)
    torch.testing.assert_close(original.double(), LOSS["post_pred_x0_from_eps"], rtol=1e-5, atol=1e-5)
    check(scheduler.posterior_mean(original, t, x_t), LOSS["post_mean_from_eps"], dtype)
    shifted = scheduler.predict_original_sample(scheduler.predict_noise(predicted, t, x_t, gradient), t, x_t)
    check(scheduler.posterior_mean(shifted, t, x_t), LOSS["post_mean_from_shifted_eps"], dtype)


# -- trajectories through the pipeline's loops


@both_dtypes
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 50])
def test_decode(steps, prediction_type, dtype):
    pipe = build(dtype, prediction_type=prediction_type)
    for name, shift in (
        ("shift", {}),
        ("plain", {"shift_scale": 0.0}),
        ("shift_stop0.3", {"shift_range": (300, 1000)}),
    ):
        pipe.calls = []
        states = decode(pipe, Z.to(dtype), XT.to(dtype), steps, **shift)
        golden = TRAJECTORIES[f"ddim{steps}_sample_{name}" + ("_final" if steps == 50 else "")]
        check(states[-1] if steps == 50 else states, golden, dtype)
        assert [t for t, _ in pipe.calls] == TRAJECTORIES[f"ddim{steps}_sample_model_timesteps"].tolist()
        shifted = {"shift": steps, "plain": 0, "shift_stop0.3": steps - int(0.3 * steps)}[name]
        assert [used for _, used in pipe.calls] == [True] * shifted + [False] * (steps - shifted)


@both_dtypes
@pytest.mark.parametrize("steps", [10, 50])
def test_invert(steps, dtype):
    pipe = build(dtype)
    for name, code in (("shift", Z.to(dtype)), ("plain", None)):
        pipe.calls = []
        noise = pipe.invert(as_input(X0).to(dtype), code, num_inference_steps=steps)
        golden = TRAJECTORIES[f"ddim{steps}_encode_{name}" + ("_final" if steps == 50 else "")]
        check(noise, golden if steps == 50 else golden[-1], dtype)
        assert [t for t, _ in pipe.calls] == TRAJECTORIES[f"ddim{steps}_encode_model_timesteps"].tolist()


@both_dtypes
@pytest.mark.parametrize(
    ("inversion_steps", "steps", "name"),
    [(10, 10, "ddim10_autoencode"), (50, 50, "ddim50_autoencode"), (50, 10, "encode50_decode10")],
)
def test_autoencode(inversion_steps, steps, name, dtype):
    pipe = build(dtype, codes=[(X0, Z)])
    final = {}
    output = pipe(
        as_input(X0).to(dtype),
        num_inference_steps=steps,
        num_inversion_steps=inversion_steps,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, timestep, tensors: final.update(tensors),
    )
    check(final["latents"], TRAJECTORIES[f"{name}_final"], dtype)
    check(output.latent_code, Z, dtype)
    golden = TRAJECTORIES[f"ddim{inversion_steps}_encode_shift" + ("_final" if inversion_steps == 50 else "")]
    check(output.inverted_noise, golden if inversion_steps == 50 else golden[-1], dtype)
    check(output.images, as_input(TRAJECTORIES[f"{name}_final"]), dtype)


def test_reconstruction_gets_better_with_every_step():
    """Deterministic trajectories solve one differential equation, up and then down: an error of first order."""
    pipe = build(codes=[(X0, Z)])
    errors = [
        (pipe(as_input(X0), n, num_inversion_steps=n, output_type="pt").images - as_input(X0)).abs().mean().item()
        for n in (25, 100, 400)
    ]
    assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5, f"4 times the steps, about 1/4: {errors}"
    assert errors[2] < 2e-3, errors


@both_dtypes
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_interpolated_decoding(steps, alpha, dtype):
    pipe = build(dtype)
    z, z_b, noise = Z.to(dtype), Z_B.to(dtype), XT.to(dtype)
    final = decode(pipe, torch.lerp(z, z_b, alpha), noise, steps)[-1]
    check(final, TRAJECTORIES[f"ddim{steps}_zlerp_alpha{alpha}"], dtype)
    with pipe.progress_bar(total=steps) as progress_bar:
        weight = torch.full((3, 1, 1, 1), alpha, dtype=dtype)
        final, _ = pipe._decode_loop(noise, (z, z_b), steps, None, progress_bar, shift_range=(0, 1000), weight=weight)
    check(final, TRAJECTORIES[f"ddim{steps}_trajinterp_alpha{alpha}"], dtype)


@both_dtypes
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ancestral_step(t, dtype):
    pipe = build(dtype)
    noise, x_t = TRAJECTORIES["ddpm_noise"].to(dtype), XT.to(dtype)
    model_output, gradient = pipe.predict(x_t, t, Z.to(dtype))
    step = pipe.scheduler.ancestral_step(model_output, t, x_t, gradient, t - 1, variance_noise=noise)
    check(step.prev_sample, TRAJECTORIES[f"ddpm_step_t{t}"], dtype)


@both_dtypes
def test_slerp(dtype):
    golden = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "slerp.npz").items()}
    a, b = golden["a"].to(dtype), golden["b"].to(dtype)
    for weight in (0.0, 0.25, 0.5, 1.0):
        check(slerp(a, b, torch.full((1, 1, 1, 1), weight, dtype=dtype)), golden[f"slerp_{weight}"], dtype)
    same = slerp(a, a, torch.full((1, 1, 1, 1), 0.3, dtype=dtype))
    torch.testing.assert_close(same, a, msg="parallel ends: the angle is 0")


# -- oracles in NumPy


def walk(model, x, levels, gradient=None, limit=1.0):
    """Shifted DDIM along `levels`, written down from the formulas; also the share of pixels that each move clips."""
    clipped = []
    for t, t2 in itertools.pairwise(levels):
        noise = model.noise(x, t)
        if gradient is not None:
            noise = noise - np.sqrt(1 - ABAR[t]) * gradient(x, t)
        original = (x - np.sqrt(1 - ABAR[t]) * noise) / np.sqrt(ABAR[t])
        clipped.append(np.mean(np.abs(original) > limit))
        original = np.clip(original, -limit, limit)
        noise = (x - np.sqrt(ABAR[t]) * original) / np.sqrt(1 - ABAR[t])
        x = np.sqrt(ABAR[t2]) * original + np.sqrt(1 - ABAR[t2]) * noise
    return x, np.array(clipped)


def levels_of(steps):
    return SCHEDULE[f"ddim{steps}_timestep_map"].astype(int)


@both_dtypes
@pytest.mark.parametrize("limit", [1.0, 0.5])
@pytest.mark.parametrize("steps", [10, 50])
def test_clipped_trajectories(steps, limit, dtype):
    rng = np.random.default_rng(0)
    z, noise, images = rng.normal(size=(3, 4)), rng.normal(size=(3, 2, 4, 4)), rng.uniform(-1, 1, size=(3, 2, 4, 4))
    pipe = build(dtype, Stress, clip_sample_range=limit)
    tensors = [torch.from_numpy(array).to(dtype) for array in (z, noise, images)]

    def gradient(x, t):
        return Stress.gradient(x, t, z)

    for code_gradient, kwargs in ((gradient, {}), (None, {"shift_scale": 0.0})):
        down = levels_of(steps)[::-1]
        expected, clipped = walk(Stress, noise, down, code_gradient, limit)
        assert clipped[-1] > 0.2 and clipped.mean() > 0.2, f"the clip must bite: {clipped}"
        unclipped, _ = walk(Stress, noise, down, code_gradient, limit=np.inf)
        assert np.abs(expected - unclipped).max() > 0.5, "the clip must decide where the trajectory ends"
        check(decode(pipe, *tensors[:2], steps, **kwargs)[-1], torch.from_numpy(expected), dtype)

        expected, clipped = walk(Stress, images, levels_of(steps), code_gradient, limit)
        assert clipped.mean() > 0.2, f"the clip must bite: {clipped}"
        code = None if code_gradient is None else tensors[0]
        check(pipe.invert(as_input(tensors[2]), code, steps), torch.from_numpy(expected), dtype)


def test_trajectories_without_clip():
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(3, 4)), rng.normal(size=(3, 2, 4, 4))
    expected, _ = walk(Stress, noise, levels_of(10)[::-1], lambda x, t: Stress.gradient(x, t, z), limit=np.inf)
    pipe = build(model=Stress, clip_sample=False)
    actual = decode(pipe, torch.from_numpy(z), torch.from_numpy(noise), 10)[-1]
    check(actual, torch.from_numpy(expected), torch.float64)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_shift_scale_multiplies_the_gradient(scale):
    expected, _ = walk(Gauss, XT.numpy(), levels_of(10)[::-1], lambda x, t: scale * Gauss.gradient(x, t, Z.numpy()))
    check(decode(build(), Z, XT, 10, shift_scale=scale)[-1], torch.from_numpy(expected), torch.float64)


@pytest.mark.parametrize("mode", ["latent", "trajectory"])
def test_interpolate(mode):
    """The whole path from two images, against the walk above; 0.7 of the way is neither end nor middle."""
    a, b = X0[:1], X0[1:2]
    pipe = build(codes=[(X0, Z)])
    path = pipe.interpolate(
        as_input(a), as_input(b), 11, mode, num_inference_steps=10, num_inversion_steps=50, output_type="pt"
    )
    assert len(pipe.calls) == 50 + 10
    codes, weights = Z[:2].numpy(), np.linspace(0, 1, 11).reshape(-1, 1, 1, 1)
    ends = walk(Gauss, X0[:2].numpy(), levels_of(50), lambda x, t: Gauss.gradient(x, t, codes))[0]
    first, second = ends.reshape(2, -1)
    angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    noise = (np.sin((1 - weights) * angle) * ends[:1] + np.sin(weights * angle) * ends[1:]) / np.sin(angle)
    between = (1 - weights[:, :, 0, 0]) * codes[:1] + weights[:, :, 0, 0] * codes[1:]

    def gradient(x, t):
        if mode == "latent":
            return Gauss.gradient(x, t, between)
        return (1 - weights) * Gauss.gradient(x, t, codes[:1]) + weights * Gauss.gradient(x, t, codes[1:])

    expected = walk(Gauss, noise, levels_of(10)[::-1], gradient)[0]
    check(path.images, torch.from_numpy(as_input(expected)), torch.float64)
    check(path.latent_code, torch.from_numpy(between), torch.float64)
    check(path.inverted_noise, torch.from_numpy(noise), torch.float64)
    if mode == "trajectory":
        other = walk(Gauss, noise, levels_of(10)[::-1], lambda x, t: Gauss.gradient(x, t, between))[0]
        assert np.abs(other - expected).max() > 1e-3, "the two modes must differ for this test to tell them apart"


def test_deterministic_samples_land_on_the_code():
    """The shifted noise prediction is the exact one of N(m(z), SC2): samples have this mean and this spread."""
    z = Z[:1].expand(500, 4)
    noise = torch.randn(500, 2, 4, 4, dtype=torch.float64)
    samples = decode(build(), z, noise, 1000)[-1].numpy()
    error = samples - image_mean(Z[:1].numpy(), samples.shape)
    assert abs(error.mean()) < 4 * 0.1 / np.sqrt(error.size)
    assert np.abs(error.mean(0)).max() < 5 * 0.1 / np.sqrt(500), "each pixel has its own mean"
    assert error.std() == pytest.approx(np.sqrt(SC2), rel=0.05)


@pytest.mark.parametrize("steps", [50, 1000])
def test_ancestral_samples_land_on_the_code(steps):
    """
    Every ancestral step is affine in `x_t`, so the samples are Gaussian and their mean and variance have a recursion.
    The mean that the shift `Sigma_t G` gives is close to m(z), not on it: the factor is not that of the exact score.
    """
    z = Z[:1].expand(500, 4)
    latents = []
    build().decode(
        z,
        num_inference_steps=steps,
        sampler="ddpm",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, timestep, tensors: latents.append(tensors["latents"]),
    )
    samples = latents[-1].numpy()
    target = image_mean(Z[:1].numpy(), samples.shape)

    levels = [*np.round(999 - np.arange(steps) * 1000 / steps).astype(int), -1]
    mean, variance = np.zeros_like(target), 1.0
    for t, t2 in itertools.pairwise(levels):
        alpha = ABAR[t] / ABAR[t2]
        sigma2 = (1 - alpha) * (1 - ABAR[t2]) / (1 - ABAR[t])

        def reverse_mean(x, t=t, alpha=alpha, sigma2=sigma2):
            plain = (x - (1 - alpha) / np.sqrt(1 - ABAR[t]) * Gauss.noise(x, t)) / np.sqrt(alpha)
            return plain + sigma2 * Gauss.gradient(x, t, Z[:1].numpy())

        slope = (reverse_mean(np.ones_like(target)) - reverse_mean(np.zeros_like(target))).flat[0]
        mean, variance = reverse_mean(mean), slope**2 * variance + sigma2
    assert len(latents) == len(levels) - 1
    spread = np.sqrt(variance)
    assert np.abs(samples.mean(0) - mean).max() < 5 * spread / np.sqrt(500)
    assert (samples - mean).std() == pytest.approx(spread, rel=0.04)
    assert np.abs(mean - target).max() < 0.05, "and this is where the code says"
    assert np.abs(mean - target).mean() < 0.25 * np.abs(MU - target).mean(), "and not where the plain model goes"


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ancestral_sampling_repeats_its_equation_draw_by_draw(scale):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64).numpy()
    for t in range(999, -1, -1):
        alpha, beta = ABAR[t] / ABAR[t - 1], 1 - ABAR[t] / ABAR[t - 1]
        x_next = (x - beta / np.sqrt(1 - ABAR[t]) * Gauss.noise(x, t)) / np.sqrt(alpha)
        variance = beta * (1 - ABAR[t - 1]) / (1 - ABAR[t])
        x_next = x_next + scale * variance * Gauss.gradient(x, t, Z.numpy())
        if t > 0:
            draw = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64).numpy()
            x_next = x_next + np.sqrt(variance) * draw
        x = x_next
    output = build().decode(
        Z,
        num_inference_steps=1000,
        shift_scale=scale,
        sampler="ddpm",
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    )
    check(output.images, torch.from_numpy(as_input(x)).clamp(0, 1), torch.float64)


@pytest.mark.parametrize(("t", "t2"), [(1, 0), (500, 499), (999, 998), (999, 0), (500, 300)])
def test_the_optimal_gradient_gives_the_true_posterior(t, t2):
    """
    `G` that closes the gap between prediction and noise makes the step's mean that of q(x_{t2} | x_t, x_0), which is,
    by Bayes, the precision-weighted mean of what x_t and what x_0 say about x_{t2}.
    """
    scheduler, alpha = PDAEScheduler(), ABAR[t] / ABAR[t2]
    x0, noise, wrong = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    x_t = scheduler.add_noise(x0, noise, t)
    sigma2 = (1 - alpha) * (1 - ABAR[t2]) / (1 - ABAR[t])
    # mu = (x_t - (1 - alpha) / sqrt(1 - abar_t) eps) / sqrt(alpha), so that closing the gap takes this Sigma G:
    shift = (wrong - noise) * (1 - alpha) / np.sqrt((1 - ABAR[t]) * alpha)
    step = scheduler.ancestral_step(wrong, t, x_t, shift / sigma2, t2, variance_noise=torch.zeros_like(x0))
    precision_t, precision_0 = alpha / (1 - alpha), 1 / (1 - ABAR[t2])
    mean = precision_t * x_t / np.sqrt(alpha) + precision_0 * np.sqrt(ABAR[t2]) * x0
    mean = mean / (precision_t + precision_0)
    torch.testing.assert_close(step.prev_sample, mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(1 / (precision_t + precision_0)), torch.tensor(sigma2))
    if t2 == t - 1:
        torch.testing.assert_close(scheduler.posterior_mean(x0, t, x_t), mean, rtol=1e-8, atol=1e-9)
        drawn = scheduler.ancestral_step(wrong, t, x_t, shift / sigma2, t2, variance_noise=torch.ones_like(x0))
        torch.testing.assert_close(drawn.prev_sample - mean, torch.full_like(x0, np.sqrt(sigma2)), rtol=1e-7, atol=0)
        assert sigma2 == pytest.approx(SCHEDULE["posterior_variance"][t])


def test_posterior_gap():
    timesteps = [1, 50, 300, 500, 999]
    gap = build(codes=[(X0, Z)]).posterior_gap(as_input(X0), timesteps, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    x0 = X0.numpy()
    for i, t in enumerate(timesteps):
        noise = torch.randn(X0.shape, generator=generator, dtype=torch.float64).numpy()
        x_t = np.sqrt(ABAR[t]) * x0 + np.sqrt(1 - ABAR[t]) * noise
        alpha = ABAR[t] / ABAR[t - 1]
        sigma2 = SCHEDULE["posterior_variance"][t]
        true = SCHEDULE["x_0_posterior_mean_x_0_coef"][t] * x0 + SCHEDULE["x_0_posterior_mean_x_t_coef"][t] * x_t
        plain = (x_t - (1 - alpha) / np.sqrt(1 - ABAR[t]) * Gauss.noise(x_t, t)) / np.sqrt(alpha)
        shifted = plain + sigma2 * Gauss.gradient(x_t, t, Z.numpy())
        assert gap.base[i].item() == pytest.approx(np.square(true - plain).mean(), rel=1e-8)
        assert gap.shifted[i].item() == pytest.approx(np.square(true - shifted).mean(), rel=1e-8)
    assert gap.timesteps == timesteps


def test_posterior_gap_with_given_codes():
    pipe = build(codes=[(X0, Z)])
    shuffled = Z[[1, 2, 0]]
    by_code = {
        name: pipe.posterior_gap(as_input(X0), [400], code, generator=torch.Generator().manual_seed(1))
        for name, code in (("own", Z), ("default", None), ("shuffled", shuffled))
    }
    torch.testing.assert_close(by_code["own"].shifted, by_code["default"].shifted)
    assert by_code["own"].shifted != pytest.approx(by_code["shuffled"].shifted, rel=0.01)
    torch.testing.assert_close(by_code["own"].base, by_code["shuffled"].base)


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_denoise_one_step(t):
    """Without the shift this is E[x_0 | x_t]; with it, the estimate that its mean `mu + Sigma G` stands for."""
    pipe = build(codes=[(X0, Z)])
    kwargs = {"latents": XT, "output_type": "pt"}
    x_t = np.sqrt(ABAR[t]) * X0.numpy() + np.sqrt(1 - ABAR[t]) * XT.numpy()
    expectation = MU + np.sqrt(ABAR[t]) * S2 / (ABAR[t] * S2 + 1 - ABAR[t]) * (x_t - np.sqrt(ABAR[t]) * MU)
    output = pipe.denoise_one_step(as_input(X0), t, shift_scale=0.0, **kwargs)
    check(output.images, torch.from_numpy(as_input(expectation)).clamp(0, 1), torch.float64)
    # mu is affine in the estimate with factor sqrt(abar_prev) beta / (1 - abar), so Sigma G moves the estimate by
    shift = (1 - ABAR[t - 1]) / np.sqrt(ABAR[t - 1]) * Gauss.gradient(x_t, t, Z.numpy()) if t else 0.0
    for scale in (1.0, 0.5):
        output = pipe.denoise_one_step(as_input(X0), t, shift_scale=scale, **kwargs)
        check(output.images, torch.from_numpy(as_input(expectation + scale * shift)).clamp(0, 1), torch.float64)


# -- real networks against plain DDIM


def real_pipeline(unet):
    torch.manual_seed(1)
    encoder = PDAEEncoder(8, 1, 4, block_out_channels=(8, 8), attention_block=None, norm_num_groups=4)
    pipe = PDAEPipeline(unet, encoder, PDAEGradientEstimator.from_unet(unet, 4), PDAEScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [7, 10])
def test_untrained_estimator_is_plain_ddim_bit_for_bit(tiny_unet, steps):
    pipe = real_pipeline(tiny_unet)
    noise = torch.randn(2, 1, 8, 8)
    states = decode(pipe, torch.randn(2, 4), noise, steps)
    scheduler, sample = PDAEScheduler(), noise
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for i, (t, t2) in enumerate(scheduler.trajectory):
            sample = scheduler.step(tiny_unet(sample, t).sample, t, sample, next_timestep=t2).prev_sample
            assert torch.equal(sample, states[i + 1]), f"step {i}"


@pytest.mark.parametrize("steps", [10, 50])
def test_plain_ddim_is_that_of_diffusers(tiny_unet, steps):
    """Where the number of steps divides T, its `trailing` spacing calls the model at the same timesteps."""
    stock = DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=True)
    stock.alphas_cumprod = torch.from_numpy(ABAR[:-1])  # its own are rounded to single precision
    stock.final_alpha_cumprod = stock.alphas_cumprod[0]
    stock.set_timesteps(steps)
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    states = decode(real_pipeline(tiny_unet.double()), torch.randn(2, 4), noise, steps)
    sample, clipped = noise, 0
    with torch.no_grad():
        for t in stock.timesteps:
            output = stock.step(tiny_unet(sample, t).sample, t, sample, use_clipped_model_output=True)
            sample = output.prev_sample
            clipped += (output.pred_original_sample.abs() == 1).float().mean().item()
    assert clipped > 0.1 * steps, "the clip must bite"
    torch.testing.assert_close(states[-1], sample, rtol=1e-9, atol=1e-9)
