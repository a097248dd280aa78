"""The methods that CoPaint is compared with: recorded runs, closed forms, and what all of them owe their user."""

import doctest
import importlib
import inspect
import itertools

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import DDPMScheduler, RePaintScheduler
from inpainting_goldens import MixtureUNet, load
from test_copaint import IMAGE, MASK, make_unet, quiet

import diffusers_ext

# method -> pipeline, scheduler, a short call
METHODS = {
    "replacement": ("ReplacementPipeline", "ReplacementScheduler", {"num_inference_steps": 4}),
    "repaint": ("RePaintDDPMPipeline", "RePaintDDPMScheduler", {"num_inference_steps": 4, "jump_n_sample": 1}),
    "mcg": ("MCGPipeline", "MCGScheduler", {"num_inference_steps": 4, "step_size": 0.1}),
    "ddnm": ("DDNMPipeline", "DDNMScheduler", {"num_inference_steps": 4}),
    "ddrm": ("DDRMPipeline", "DDRMScheduler", {"num_inference_steps": 4}),
    "dps": ("DPSPipeline", "DPSScheduler", {"num_inference_steps": 4}),
}
ENLARGES = ("ddnm", "ddrm", "dps")


def make(method, unet=None, scheduler=None, **changes):
    pipeline, own, _ = METHODS[method]
    scheduler = scheduler or getattr(diffusers_ext, own)()
    return quiet(getattr(diffusers_ext, pipeline)(unet or make_unet(**changes), scheduler))


class _Contract(PipelineContract):
    image_shape = (1, 8, 8)
    method: str

    def components(self):
        return {"unet": make_unet(), "scheduler": getattr(diffusers_ext, METHODS[self.method][1])()}

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(batch_size, 1, 8, 8)
        mask[:, :, :2] = 0
        return {"image": image, "mask_image": mask, **METHODS[self.method][2]}


class TestReplacement(_Contract):
    method, pipeline_class = "replacement", diffusers_ext.ReplacementPipeline


class TestRePaint(_Contract):
    method, pipeline_class = "repaint", diffusers_ext.RePaintDDPMPipeline


class TestMCG(_Contract):
    method, pipeline_class = "mcg", diffusers_ext.MCGPipeline


class TestDDNM(_Contract):
    method, pipeline_class = "ddnm", diffusers_ext.DDNMPipeline


class TestDDRM(_Contract):
    method, pipeline_class = "ddrm", diffusers_ext.DDRMPipeline


class TestDPS(_Contract):
    method, pipeline_class = "dps", diffusers_ext.DPSPipeline


@pytest.mark.parametrize("method", METHODS)
def test_examples(method):
    module = importlib.import_module(f"diffusers_ext.pipelines.{method}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 10


# -- recorded runs


RECORDINGS = {
    # method -> recording, which of its draws in which order (0 is x_T), arguments
    "replacement": (
        "blended_copaintrepo_10",
        lambda count: [1 + i for i in range(9, 0, -1)],  # one per level, noisiest last in the file
        {"num_inference_steps": 10, "denoise_final": False, "paste_known": False},
    ),
    "repaint": (
        "repaint_ref_10",
        lambda count: [*range(1, count - 2), count - 1],  # the last step's noise is drawn there, and times zero
        {"num_inference_steps": 10, "jump_length": 3, "jump_n_sample": 2, "paste_known": False},
    ),
    "ddnm": ("ddnm_official_10", lambda count: range(1, count - 1), {"num_inference_steps": 10}),
    "dps": (
        "dps_official_ps_1.0_10",
        lambda count: range(1, count - 2, 2),  # every second one is not used there
        {"num_inference_steps": 10, "step_size": 1.0, "paste_known": False},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", RECORDINGS)
def test_recorded_runs(method, dtype, monkeypatch):
    name, order, arguments = RECORDINGS[method]
    recording, given = load(name), load("copaint_eta0_10")
    noises = [torch.from_numpy(recording[key]) for key in sorted(recording) if key.startswith("noise_")]
    draws = iter([noises[i].to(dtype) for i in order(len(noises))])
    module = importlib.import_module(f"diffusers_ext.pipelines.{method}")
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    image, keep = torch.from_numpy(given["image"]), torch.from_numpy(given["keep_mask"])
    pipe = make(method, MixtureUNet().to(dtype))
    output = pipe(image / 2 + 0.5, 1 - keep, latents=noises[0], output_type="latent", **arguments).images
    assert next(draws, None) is None, "every recorded draw is used"
    tolerance = 1e-10 if dtype == torch.float64 else 5e-5
    np.testing.assert_allclose(output, recording["output"], rtol=0, atol=tolerance)


def test_ddnm_travels_from_the_estimate_before_its_correction(monkeypatch):
    """An independent program of the official loop with time travel, on the recordings' model."""
    unet, given = MixtureUNet(), load("copaint_eta0_10")
    image, keep = torch.from_numpy(given["image"]), torch.from_numpy(given["keep_mask"])
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(60)]
    draws = iter(noises[1:])
    module = importlib.import_module("diffusers_ext.pipelines.ddnm")
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    arguments = {"num_inference_steps": 10, "travel_length": 3, "travel_repeat": 2, "output_type": "latent"}
    output = make("ddnm", unet)(image / 2 + 0.5, 1 - keep, latents=noises[0], **arguments).images

    abar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)
    draws, x = iter(noises[1:]), noises[0]
    # counted from the clean end: down to 6, back to 9, down to 3, back to 6, down to 0, back to 3, down to the image
    places = [9, 8, 7, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, -1]
    for a, b in itertools.pairwise(places):
        t, s = 100 * a, 100 * b if b >= 0 else -1
        if b < a:
            eps = unet(x, torch.tensor([t])).sample[:, :3]
            x0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
            x = abar[s] ** 0.5 * (keep * image + (1 - keep) * x0)
            if b >= 0:
                x = x + (1 - abar[s]) ** 0.5 * (0.85 * next(draws) + (1 - 0.85**2) ** 0.5 * eps)
        else:
            x = abar[s] ** 0.5 * x0 + (1 - abar[s]) ** 0.5 * next(draws)
    torch.testing.assert_close(output, x, rtol=0, atol=1e-10)


def test_mcg_is_its_equation(monkeypatch):
    unet, given = MixtureUNet(), load("copaint_eta0_10")
    image, keep = torch.from_numpy(given["image"]), torch.from_numpy(given["keep_mask"])
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(30)]
    draws = iter(noises[1:])
    module = importlib.import_module("diffusers_ext.pipelines.mcg")
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    arguments = {"num_inference_steps": 5, "step_size": 0.7, "output_type": "latent"}
    output = make("mcg", unet)(image / 2 + 0.5, 1 - keep, latents=noises[0], **arguments).images

    abar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)
    draws, x = iter(noises[1:]), noises[0]
    levels = [999, 749, 500, 250, 0, -1]
    for t, s in itertools.pairwise(levels):
        x = x.detach().requires_grad_()
        eps = unet(x, torch.tensor([t])).sample[:, :3]
        x0 = ((x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5).clamp(-1, 1)
        (keep * (image - x0)).norm().backward()
        beta = 1 - abar[t] / abar[s]
        mean = abar[s] ** 0.5 * beta / (1 - abar[t]) * x0 + (1 - beta) ** 0.5 * (1 - abar[s]) / (1 - abar[t]) * x
        moved, known = mean, image
        if s >= 0:
            # the zeros that stand for a learned variance lie halfway between the two fixed ones
            moved = mean + (beta * beta * (1 - abar[s]) / (1 - abar[t])) ** 0.25 * next(draws)
            known = abar[s] ** 0.5 * image + (1 - abar[s]) ** 0.5 * next(draws)
        x = (keep * known + (1 - keep) * (moved - 0.7 * x.grad)).detach()
    torch.testing.assert_close(output, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("measurement_noise", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["mask", "pool"])
def test_ddrm_equals_its_spectral_form(kind, measurement_noise):
    """Every step against the paper's equations 6 to 8, in the singular vectors of a matrix."""
    module = importlib.import_module("diffusers_ext.pipelines.ddrm")
    scheduler = diffusers_ext.DDRMScheduler()
    if kind == "mask":
        keep = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        keep[..., :2, 1:] = 1
        operator = module.MaskOperator(keep)
        matrix = torch.diag(keep.flatten())[keep.flatten().bool()]
    else:
        operator = module.AveragePoolOperator(2)
        units = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
        matrix = operator.forward(units).flatten(1).T
    u, values, vh = torch.linalg.svd(matrix)
    assert torch.allclose(values, values[0].expand_as(values)), "all singular values are equal"
    x0, eps, z, noise = torch.randn(4, 1, 1, 4, 4, dtype=torch.float64)
    y = torch.randn(len(matrix), dtype=torch.float64)
    shape = (1, 1, 4, 4) if kind == "mask" else (1, 1, 2, 2)
    full = torch.zeros(16, dtype=torch.float64)
    if kind == "mask":
        full[keep.flatten().bool()] = y
    known = operator.pseudo_inverse((full if kind == "mask" else y).reshape(shape))
    # in the singular vectors; the noise of y has the deviation s_y there, that of A^+ y the deviation s_y / value
    bar = {name: vh @ tensor.flatten() for name, tensor in {"x0": x0, "eps": eps, "z": z, "noise": noise}.items()}
    y_bar, count = (u.T @ y) / values, len(values)
    torch.testing.assert_close((vh @ known.flatten())[:count], y_bar)

    abar = scheduler.alphas_cumprod
    sigma = ((1 - abar[750]) / abar[750]).sqrt().item()
    expected = sigma * bar["noise"]
    expected[:count] = y_bar + (sigma**2 - measurement_noise**2) ** 0.5 * bar["noise"][:count]
    first = scheduler.initialize(noise, known, operator, 750, measurement_noise)
    torch.testing.assert_close(vh @ first.flatten(), expected / sigma, rtol=1e-9, atol=1e-9)

    for t in (500, 10, 0, -1):
        level = abar[t].item() if t >= 0 else 1.0
        s = ((1 - level) / level) ** 0.5
        expected = bar["x0"] + s * ((1 - 0.85**2) ** 0.5 * bar["eps"] + 0.85 * bar["z"])
        if s >= measurement_noise:
            measured = 0.1 * bar["x0"][:count] + 0.9 * y_bar
            measured = measured + (s**2 - (0.9 * measurement_noise) ** 2) ** 0.5 * bar["z"][:count]
        else:
            towards = (y_bar - bar["x0"][:count]) / measurement_noise
            measured = bar["x0"][:count] + s * ((1 - 0.85**2) ** 0.5 * towards + 0.85 * bar["z"][:count])
        expected[:count] = measured
        if t == -1:
            expected = bar["x0"]
        given = (x0, eps, known, operator, t, 0.85, 0.9, measurement_noise)
        actual = scheduler.step(*given, variance_noise=z)
        torch.testing.assert_close(vh @ actual.flatten(), level**0.5 * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_steps_are_those_of_diffusers(variance_type):
    ours = diffusers_ext.RePaintDDPMScheduler(variance_type=variance_type)
    stock = DDPMScheduler(variance_type=variance_type, timestep_spacing="leading")
    stock.set_timesteps(10)  # 900, 800, ...
    sample, output, values = torch.randn(3, 2, 1, 4, 4)
    given = torch.cat([output, values], dim=1) if variance_type == "learned_range" else output
    for t in (900, 100, 0):
        expected = stock.step(given, t, sample, generator=torch.Generator().manual_seed(0))
        actual = ours.ancestral_step(
            output,
            t,
            sample,
            t - 100 if t else -1,
            values if variance_type == "learned_range" else None,
            torch.Generator().manual_seed(0),
        )
        # diffusers keeps its schedule in float32
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_a_jump_back_has_the_noise_of_its_level():
    """diffusers' scheduler undoes a step by the betas above its level in place of those below it: too much noise."""
    stock, ours = RePaintScheduler(), diffusers_ext.RePaintDDPMScheduler()
    stock.set_timesteps(100, jump_length=10, jump_n_sample=2)
    low, high = 0, 10  # a step down ended at `low`; its undoing leads to `high` again
    noisy = (1 - ours.alphas_cumprod[low].item()) ** 0.5 * torch.randn(1, 1, 300, 300)
    expected = (1 - ours.alphas_cumprod[high].item()) ** 0.5
    own = ours.undo_step(noisy, low, high).std().item()
    theirs = stock.undo_step(noisy, high).std().item()
    error = expected / (2 * noisy.numel()) ** 0.5  # of a standard deviation of so many pixels
    assert abs(own - expected) < 4 * error
    assert theirs > expected + 20 * error


# -- what all of them owe their user


@pytest.mark.parametrize("method", METHODS)
def test_known_pixels_are_exact_where_they_are_pasted(method):
    images = make(method)(IMAGE, MASK, output_type="pt", **METHODS[method][2]).images
    torch.testing.assert_close(images[..., :4], IMAGE[..., :4])
    assert not torch.allclose(images[..., 4:], IMAGE[..., 4:], atol=1e-2)


@pytest.mark.parametrize("method", ENLARGES)
def test_enlarged_images_have_the_given_means(method):
    options = METHODS[method][2] | {"mode": "super_resolution", "scale_factor": 2, "output_type": "latent"}
    images = make(method)(IMAGE, **options).images
    assert images.shape == (2, 1, 16, 16)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(images, 2), 2 * IMAGE - 1)


@pytest.mark.parametrize("method", METHODS)
def test_color_classes_and_learned_variance(method):
    pipe = make(method, in_channels=3, out_channels=6, num_class_embeds=3)
    image, options = torch.rand(2, 3, 8, 8), METHODS[method][2] | {"output_type": "pt"}
    noise = torch.randn(2, 3, 8, 8)

    def run(labels):
        generator = torch.Generator().manual_seed(0)
        return pipe(image, MASK, class_labels=labels, latents=noise, generator=generator, **options).images

    images = run([0, 2])
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    other = run([0, 1])
    torch.testing.assert_close(images[0], other[0])
    assert not torch.allclose(images[1], other[1], atol=1e-4)
    with pytest.raises(ValueError, match="`class_labels` are missing"), no_model_runs(pipe):
        pipe(image, MASK, **options)


@pytest.mark.parametrize("method", METHODS)
def test_several_fills_per_image(method):
    pipe, options = make(method), METHODS[method][2] | {"output_type": "pt"}
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    images = pipe(IMAGE, MASK, num_images_per_prompt=2, generator=seeds(), **options).images
    assert torch.equal(images, pipe(IMAGE[[0, 0, 1, 1]], MASK, generator=seeds(), **options).images)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_stock_schedulers_are_converted(method, tiny_ddpm):
    pipe = getattr(diffusers_ext, METHODS[method][0]).from_pipe(tiny_ddpm)
    assert type(pipe.scheduler).__name__ == METHODS[method][1]
    assert pipe.scheduler.config.clip_sample is (method not in ("ddnm", "ddrm")), "no clip in these papers"


@pytest.mark.parametrize("method", [*METHODS, "copaint"])
def test_a_pipeline_of_one_method_becomes_one_of_another(method):
    """Schedulers are converted whatever method they come from."""
    pipeline, _, call = METHODS.get(method, ("CoPaintPipeline", "", {"num_inference_steps": 3}))
    for other in METHODS:
        pipe = quiet(getattr(diffusers_ext, pipeline).from_pipe(make(other)))
        assert pipe(IMAGE, MASK, output_type="pt", **call).images.shape == IMAGE.shape


@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_not_finite_are_refused(method):
    pipe = make(method)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="the images are not finite"):
        pipe(IMAGE, MASK, **METHODS[method][2])


def test_ddnm_takes_as_many_levels_as_asked():
    scheduler = diffusers_ext.DDNMScheduler()
    for steps in (1, 30, 100, 300, 1000):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == [i * (1000 // steps) for i in range(steps)][::-1]


@pytest.mark.parametrize("method", ["dps", "mcg"])
def test_gradients_leave_nothing_behind_and_need_a_graph(method):
    pipe = make(method)
    pipe(IMAGE, MASK, **METHODS[method][2])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipe.unet.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode` rules out"):
        pipe(IMAGE, MASK, **METHODS[method][2])
    with pytest.raises(ValueError, match="not finite with `step_size` inf|`step_size` is inf"):
        pipe(IMAGE, MASK, num_inference_steps=3, step_size=float("inf"))


BAD_CALLS = {
    "no fills": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0.*at least 1"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    "too many steps": ({"num_inference_steps": 1001}, "`num_inference_steps` is 1001.*1000"),
    "RGB for a grey model": ({"image": torch.rand(1, 3, 8, 8)}, "must have 1 channels"),
    "odd size": ({"image": torch.rand(1, 1, 9, 8), "mask_image": torch.zeros(9, 8)}, r"\(9, 8\).*multiples of 2"),
    "masks": ({"mask_image": torch.zeros(3, 1, 8, 8)}, "3 masks for 2 images"),
    "labels for nothing": ({"class_labels": 1}, "`class_labels` were given.*leave them out"),
    "latents": ({"latents": torch.randn(1, 1, 8, 8)}, r"`latents` has shape .*needs \(2, 1, 8, 8\)"),
    "eta": ({"eta": 2.0}, "`eta` is 2.0.*at most 1"),
    "eta_b": ({"eta_b": -1.0}, "`eta_b` is -1.0.*at least 0"),
    "measurement_noise": ({"measurement_noise": -1.0}, "`measurement_noise` is -1.0"),
    "step_size": ({"step_size": -1.0}, "`step_size` is -1.0.*at least 0"),
    "travel": ({"travel_length": 0}, "`travel_length` is 0.*at least 1"),
    "jump": ({"jump_n_sample": 0}, "`jump_n_sample` is 0.*from 1"),
    "mode": ({"mode": "deblur"}, "`mode` is 'deblur'.*'super_resolution'"),
    "mask to enlarge": ({"mode": "super_resolution"}, "`mask_image` is given.*super-resolution none"),
    "no mask": ({"mask_image": None, "mode": "inpaint"}, "`mask_image` is missing.*inpainting needs one"),
    "scale": ({"mode": "super_resolution", "mask_image": None, "scale_factor": 0}, "`scale_factor` is 0"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_before_the_model_runs(method, name):
    changes, message = BAD_CALLS[name]
    pipe = make(method)
    if set(changes) - set(inspect.signature(type(pipe).__call__).parameters):
        pytest.skip("the method has no such argument")
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe(**({"image": IMAGE, "mask_image": MASK} | METHODS[method][2] | changes))
