"""CoPaint against the authors' recorded runs, its costs, its line search, and what it refuses."""

import doctest
import itertools
import math
import os
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from inpainting_goldens import MixtureUNet, load
from PIL import Image
from reader_env import make_reader

import diffusers_ext
from diffusers_ext import CoPaintPipeline, CoPaintScheduler
from diffusers_ext.pipelines import copaint
from diffusers_ext.pipelines.copaint import PRESETS, AveragePoolOperator, MaskOperator, prepare_keep_mask, to_batch

FILES = Path(__file__).parents[1] / "pipelines"
RUNS = [
    "copaint_eta0_10",
    "copaint_fast_20_8",
    "copaint_tt_10",
    "copaint_sr4_10",
    "copaint_batch2_biglr_10_alone0",
    "copaint_batch2_biglr_10_alone1",
]
AUTHORS = {"paste_known": False, "denoise_final": False, "loss_tolerance": 0, "output_type": "latent"}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(recording):
    """A recording's configuration in our arguments."""
    config = {name.split(".")[-1]: value for name, value in recording["config"].items()}
    visited = sorted(set(recording["schedule_idx"].tolist()), reverse=True)
    arguments = {
        "timesteps": [int(recording["timestep_map"][i]) for i in visited],
        "num_optimization_steps": config["num_iteration_optimize_xt"],
        "learning_rate": config["lr_xt"],
        "learning_rate_decay": config["lr_xt_decay"],
        "scale_learning_rate": config["use_smart_lr_xt_decay"],
        "adaptive_learning_rate": config["use_adaptive_lr_xt"],
        "regularization": config["coef_xt_reg"],
        "regularization_decay": config["coef_xt_reg_decay"],
        "optimize_before_time_travel": config["optimize_before_time_travel"],
        "eta": config["ddim_sigma"],
        "latents": torch.from_numpy(recording["x_T"]),
    }
    if config["use_timetravel"]:
        arguments |= {"jump_length": config["jump_length"], "jump_n_sample": config["jump_n_sample"]}
    image = torch.from_numpy(recording["image"])
    if config["mode"] == "inpaint":
        return arguments | {"image": image / 2 + 0.5, "mask_image": 1 - torch.from_numpy(recording["keep_mask"])}
    small = torch.nn.functional.avg_pool2d(image, config["scale"])
    return arguments | {"image": small / 2 + 0.5, "mode": "super_resolution", "scale_factor": config["scale"]}


def replay(given, unet, draws, monkeypatch):
    """Run with these draws; returns the output, and after every move the sample and the network's passes in it."""
    draws, samples, passes = iter(draws), [], [0]

    def callback(pipe, step, timestep, tensors):
        samples.append(tensors["latents"].clone())
        passes.append(len(unet.calls))

    monkeypatch.setattr(copaint, "randn_tensor", lambda *args, **kwargs: next(draws).to(unet.dtype))
    unet.calls.clear()
    pipe = quiet(CoPaintPipeline(unet, CoPaintScheduler()))
    images = pipe(**(AUTHORS | given), callback_on_step_end=callback).images
    assert next(draws, None) is None, "every draw is used"
    return images, torch.stack(samples), np.diff(passes).tolist()


def recorded_draws(recording):
    return torch.from_numpy(recording["ev_noise"][recording["ev_kind"] == 1])


@pytest.mark.parametrize("name", RUNS)
def test_authors_runs_in_double_precision(name, monkeypatch):
    recording, unet = load(name), MixtureUNet()
    images, samples, passes = replay(settings(recording), unet, recorded_draws(recording), monkeypatch)
    np.testing.assert_allclose(images.clamp(-1, 1), recording["output"], rtol=0, atol=1e-10)
    kinds, rejections = recording["ev_kind"], recording["ev_n_reject"]
    np.testing.assert_allclose(samples, recording["ev_x_out"][kinds != 2], rtol=0, atol=1e-10)
    # 1 + G forward and G backward passes per optimized level, one forward pass more per rejected trial
    steps = recording["config"]["optimize_xt.num_iteration_optimize_xt"]
    expected = []
    for i, kind in enumerate(kinds):
        if kind == 1:  # back in time, after an optimization or without one
            expected.append(1 + steps + rejections[i - 1] if kinds[i - 1] == 2 else 0)
        elif kind == 0:
            expected.append(1 + steps + rejections[i])
    assert passes == expected
    levels = int((kinds != 1).sum())
    assert int(recording["nfe_backward"]) == levels * steps
    assert int(recording["nfe_forward"]) == levels * (1 + 2 * steps) + rejections.sum(), "the authors' code takes more"
    if rejections.sum() == 0:
        assert sum(with_graph for _, _, with_graph in unet.calls) == levels * steps, "no graph that is not used"
    else:
        assert name.startswith("copaint_batch2")


@pytest.mark.parametrize("name", RUNS)
def test_authors_runs_in_single_precision(name, monkeypatch):
    recording, unet = load(name), MixtureUNet().to(torch.float32)
    given = settings(recording) | {"loss_tolerance": 1e-5}
    images, *_ = replay(given, unet, recorded_draws(recording), monkeypatch)
    np.testing.assert_allclose(images.clamp(-1, 1), recording["output"], rtol=0, atol=5e-5)


def test_images_of_a_batch_have_their_own_line_search(monkeypatch):
    """The rows of a batch are the authors' runs alone, not their batch, whose line search is shared."""
    recording = load("copaint_batch2_biglr_10")
    images, *_ = replay(settings(recording), MixtureUNet(), [], monkeypatch)
    alone = np.concatenate([load(f"copaint_batch2_biglr_10_alone{i}")["output"] for i in range(2)])
    np.testing.assert_allclose(images.clamp(-1, 1), alone, rtol=0, atol=1e-10)
    assert np.abs(alone - recording["output"]).max() > 0.03


def authors_program(unet, recording, walk, draws, given):
    """
    Their algorithm once more, for one image and in all its settings: plain autograd, every pass made anew. `walk` are
    the places visited, counted from the clean end. Returns the output and the rejected trials at each move.
    """
    abar, times = recording["alphas_cumprod"], recording["timestep_map"].tolist()
    keep, draws = torch.from_numpy(recording["keep_mask"]), iter(draws)
    if given.get("mode") == "super_resolution":
        measure = lambda x: torch.nn.functional.avg_pool2d(x, given["scale_factor"])  # noqa: E731
    else:
        measure = lambda x: keep * x  # noqa: E731
    y = measure(torch.from_numpy(recording["image"]))

    def predict(x, i):
        eps = unet(x, torch.tensor([times[i]])).sample[:, :3]
        return ((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5).clamp(-1, 1), eps

    def estimate(x, i):
        n = given.get("num_x0_steps", 1)
        if n == 1 or i == 0:
            return predict(x, i)[0]
        for a, b in itertools.pairwise(sorted({i, *(k * (i // n) for k in range(n))}, reverse=True)):
            x0, eps = predict(x, a)
            x = abar[b] ** 0.5 * x0 + (1 - abar[b]) ** 0.5 * eps
        return x.clamp(-1, 1)

    def optimize(x, i, rate, weight):
        origin, rejected = x, 0
        if given["scale_learning_rate"]:
            rate = rate * (abar[i] / abar[0]) ** 0.5

        def loss(x):
            return (y - measure(estimate(x, i))).square().sum() + weight * (origin - x).square().sum()

        for _ in range(given["num_optimization_steps"]):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                old = loss(leaf)
                [gradient] = torch.autograd.grad(old, leaf)
            new = x - rate * gradient
            while given["adaptive_learning_rate"] and not loss(new) <= old:
                rate, rejected = 0.8 * rate, rejected + 1
                new = x - rate * gradient
            x = new
        return x, rejected

    x, rate, weight = torch.from_numpy(recording["x_T"]), given["learning_rate"], given["regularization"]
    rejections, came_down = [], False
    with torch.no_grad():
        for i, j in itertools.pairwise(walk):
            rejected = None
            if j < i or (came_down and given["optimize_before_time_travel"]):
                x, rejected = optimize(x, i, rate, weight)
            rejections.append(rejected)
            if j < i:
                x0, eps = predict(x, i)
                s = given["eta"] * ((1 - abar[j]) / (1 - abar[i])) ** 0.5 * (1 - abar[i] / abar[j]) ** 0.5
                x = abar[j] ** 0.5 * x0 + (1 - abar[j] - s**2) ** 0.5 * eps
                x = x + s * next(draws) if s else x
                rate, weight = rate * given["learning_rate_decay"], weight * given["regularization_decay"]
            else:
                x = (abar[j] / abar[i]) ** 0.5 * x + (1 - abar[j] / abar[i]) ** 0.5 * next(draws)
                rate, weight = rate / given["learning_rate_decay"], weight / given["regularization_decay"]
            came_down = j < i
    return x, rejections


@pytest.mark.parametrize("name", RUNS)
def test_the_program_is_the_authors(name):
    recording = load(name)
    places = {timestep: i for i, timestep in enumerate(recording["timestep_map"].tolist())}
    walk = [places[recording["timestep_map"][i]] for i in recording["schedule_idx"]]
    images, rejections = authors_program(
        MixtureUNet(), recording, walk, recorded_draws(recording), settings(recording)
    )
    np.testing.assert_allclose(images.clamp(-1, 1), recording["output"], rtol=0, atol=1e-10)
    assert sum(filter(None, rejections)) == recording["ev_n_reject"].sum()


LARGE = {"learning_rate": 8.0, "learning_rate_decay": 0.9, "num_optimization_steps": 5}
WALKS = {
    (1, 1): [*range(9, -1, -1)],
    (4, 2): [9, 8, 7, 6, 5, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0],
    (3, 3): [9, 8, 7, *2 * [6, 7, 8, 9, 8, 7], 6, 5, 4, *2 * [3, 4, 5, 6, 5, 4], 3, 2, 1, *2 * [0, 1, 2, 3, 2, 1], 0],
}
OTHERS = {
    "no search, unscaled": {
        "scale_learning_rate": False, "adaptive_learning_rate": False, "num_optimization_steps": 5,
        "learning_rate": 1e-5, "learning_rate_decay": 1.3, "regularization": 0.01,
    },
    "search with weight, travel": LARGE | {
        "regularization": 3.0, "regularization_decay": 1.3, "jump_length": 4, "jump_n_sample": 2,
    },
    "travel without optimization": {
        "optimize_before_time_travel": False, "jump_length": 3, "jump_n_sample": 3, "learning_rate": 1.0,
    },
    "ancestral": {"eta": 1.0, "learning_rate": 2.0},
    "ancestral with travel": {"eta": 0.6, "jump_length": 4, "jump_n_sample": 2},
    "enlarging by 2, travel": {"mode": "super_resolution", "scale_factor": 2, "jump_length": 3, "jump_n_sample": 3},
    "estimate in 2 steps": {"num_x0_steps": 2},
    "estimate in 3 steps, search, travel": LARGE | {"num_x0_steps": 3, "jump_length": 4, "jump_n_sample": 2},
    "estimate in more steps than there are": {"num_x0_steps": 12, "num_optimization_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_those_of_the_authors(name, monkeypatch):
    """To 1e-10, with the same rejections at every move."""
    recording, unet = load("copaint_eta0_10"), MixtureUNet()
    given = settings(recording) | OTHERS[name]
    if given.get("mode") == "super_resolution":
        small = torch.nn.functional.avg_pool2d(given["image"], given["scale_factor"])
        given |= {"image": small, "mask_image": None}
    walk = WALKS[given.get("jump_length", 1), given.get("jump_n_sample", 1)]
    moves = list(itertools.pairwise(walk))
    count = sum(j > i or given["eta"] > 0 for i, j in moves)
    draws = torch.randn(count, 1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, rejections = authors_program(unet, recording, walk, draws, given)
    images, _, passes = replay(given, unet, draws, monkeypatch)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)
    assert "search" not in name or "no search" in name or sum(filter(None, rejections)) > 20
    steps, n = given["num_optimization_steps"], given.get("num_x0_steps", 1)
    for (i, _), rejected, taken in zip(moves, rejections, passes, strict=True):
        more = len({i, *(k * (i // n) for k in range(n))}) - 2 if n > 1 and i else 0  # passes of the estimate
        # those are made once more for every gradient: their activations are not kept
        assert taken == (0 if rejected is None else (1 + steps + rejected) * (1 + more) + steps * more)


# -- the rest of the pipeline


def make_unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DModel(**(config | changes)).eval()


def make_pipeline(scheduler=None, **changes):
    return quiet(CoPaintPipeline(make_unet(**changes), scheduler or CoPaintScheduler()))


IMAGE = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(1, 8, 8)
MASK[..., 4:] = 1


class TestContract(PipelineContract):
    pipeline_class, image_shape = CoPaintPipeline, (1, 8, 8)

    def components(self):
        return {"unet": make_unet(), "scheduler": CoPaintScheduler()}

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(batch_size, 1, 8, 8)
        mask[:, :, :2] = 0
        return {"image": image, "mask_image": mask, "num_inference_steps": 4}


def test_examples():
    result = doctest.testmod(copaint, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted >= 10


def test_known_pixels():
    pipe = make_pipeline()
    images = pipe(IMAGE, MASK, num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(images[..., :4], IMAGE[..., :4])
    assert not torch.allclose(images[..., 4:], IMAGE[..., 4:], atol=1e-2)
    own = pipe(IMAGE, MASK, num_inference_steps=4, output_type="pt", paste_known=False).images
    assert not torch.allclose(own[..., :4], IMAGE[..., :4], atol=1e-2)
    images = pipe(IMAGE, mode="super_resolution", scale_factor=2, num_inference_steps=4, output_type="latent").images
    assert images.shape == (2, 1, 16, 16)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(images, 2), 2 * IMAGE - 1)


def test_white_is_filled_whatever_holds_the_mask():
    expected = prepare_keep_mask(MASK, 2, 8, 8)
    assert torch.equal(expected, (1 - MASK).expand(2, 1, 8, 8))
    array = MASK[0].numpy()
    picture = Image.fromarray((255 * array).astype(np.uint8))
    grey = MASK * 0.9 + 0.05
    forms = (
        picture,
        [picture, picture],
        picture.convert("1"),
        picture.convert("RGB"),
        array,
        array[..., None],
        MASK[0],
    )
    for form in (
        *forms,
        MASK.bool(),
        grey,
        MASK.expand(2, 1, 8, 8),
        picture.resize((16, 16), Image.Resampling.NEAREST),
    ):
        assert torch.equal(prepare_keep_mask(form, 2, 8, 8), expected)


def test_a_larger_mask_loses_no_hole():
    mask = torch.zeros(64, 64)
    mask[:, :2] = 1  # half a pixel wide at 16 x 16
    keep = prepare_keep_mask(mask, 1, 16, 16)
    assert (keep[..., 0] == 0).all() and (keep[..., 1:] == 1).all()


def test_grey_models_get_grey_images():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    assert to_batch(picture, 1).shape == (1, 1, 8, 8) and to_batch(picture, 3).shape == (1, 3, 8, 8)
    expected = torch.from_numpy(np.asarray(picture.convert("L"), np.float32) / 255)
    torch.testing.assert_close(to_batch(picture, 1)[0, 0], expected)


@pytest.mark.parametrize("operator", [MaskOperator(torch.rand(2, 1, 6, 6).round()), AveragePoolOperator(3)])
def test_operators_are_adjoint(operator):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y = torch.randn_like(operator.forward(x))
    torch.testing.assert_close((operator.forward(x) * y).sum(), (x * operator.transpose(y)).sum())
    # A A^+ A = A and A^+ A A^+ = A^+
    again = operator.forward(operator.pseudo_inverse(operator.forward(x)))
    torch.testing.assert_close(again, operator.forward(x))
    back = operator.pseudo_inverse(operator.forward(operator.pseudo_inverse(y)))
    torch.testing.assert_close(back, operator.pseudo_inverse(y))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_agree(prediction_type):
    """The same clean image and noise from a model that says the same in other words."""
    scheduler, other = CoPaintScheduler(), CoPaintScheduler(prediction_type=prediction_type)
    x0, eps = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1, torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for t in (0, 500, 999):
        sample, level = scheduler.add_noise(x0, eps, t), scheduler.alphas_cumprod[t]
        output = x0 if prediction_type == "sample" else level.sqrt() * eps - (1 - level).sqrt() * x0
        for predicted in (scheduler.predict(eps, t, sample), other.predict(output, t, sample)):
            torch.testing.assert_close(predicted[0], x0, rtol=0, atol=1e-9)
            torch.testing.assert_close(predicted[1], eps, rtol=0, atol=1e-6)


def test_step_and_thresholding_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    options = {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.8}
    for config in ({}, {"clip_sample": False}, {"clip_sample_range": 0.5}, options):
        ours, stock = CoPaintScheduler(**config), DDIMScheduler(**config)
        stock.set_timesteps(10)
        sample, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
        for eta in (0.0, 0.7):
            noise = torch.randn(2, 1, 4, 4)
            expected = stock.step(output, 500, sample, eta=eta, variance_noise=noise)
            actual = ours.step(output, 500, sample, 400, eta=eta, variance_noise=noise)
            torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(
                actual.pred_original_sample, expected.pred_original_sample, rtol=1e-5, atol=2e-6
            )


def test_undoing_gives_the_next_level():
    """Clean images noised to a level and undone have the variance of the next: whatever the spacing."""
    scheduler = CoPaintScheduler()
    signal, variance = 1.0, 0.0
    zero, unit = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for a, b in ((-1, 10), (10, 250), (250, 999)):
        one, noise = scheduler.undo_step(unit, a, b, noise=zero), scheduler.undo_step(zero, a, b, noise=unit)
        signal, variance = signal * one.item(), one.item() ** 2 * variance + noise.item() ** 2
        assert signal**2 == pytest.approx(scheduler.alphas_cumprod[b].item(), rel=1e-12)
        assert variance == pytest.approx(1 - scheduler.alphas_cumprod[b].item(), rel=1e-12)


def test_time_travel_is_that_of_the_paper():
    """RePaint's list of times for 250 steps with jumps of 10, twice: 489 moves down and 240 up."""
    scheduler = CoPaintScheduler()
    scheduler.set_timesteps(250, jump_length=10, jump_n_sample=2)
    down = [a > b for a, b in scheduler.trajectory]
    assert (sum(down), len(down) - sum(down)) == (489, 240)
    assert scheduler.trajectory[0][0] == 999 and scheduler.trajectory[-1][1] == 0
    levels = sorted({t for move in scheduler.trajectory for t in move})
    assert all(abs(levels.index(a) - levels.index(b)) == 1 for a, b in scheduler.trajectory)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(scheduler.trajectory))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_set_what_is_not_given(preset, monkeypatch):
    pipe, seen = make_pipeline(), []
    optimize = CoPaintPipeline._optimize
    monkeypatch.setattr(
        CoPaintPipeline, "_optimize", lambda self, *args: (seen.append(args), optimize(self, *args))[1]
    )  # watched, not replaced
    steps = {"num_inference_steps": 4} if preset != "fast" else {"timesteps": [999, 500, 0]}
    pipe(IMAGE, MASK, preset=preset, **steps, output_type="pt")
    numbers = PRESETS[preset]
    assert {args[9] for args in seen} == {numbers["num_optimization_steps"]}
    seen.clear()
    pipe(IMAGE, MASK, preset=preset, **steps, num_optimization_steps=3, learning_rate=0.001, output_type="pt")
    assert {args[9] for args in seen} == {3}
    assert seen[0][7] == pytest.approx(
        0.001 * math.sqrt(pipe.scheduler.alphas_cumprod[999] / pipe.scheduler.alphas_cumprod[0])
    )


def test_fast_takes_a_hundred_of_the_250_levels():
    pipe, seen = make_pipeline(), []
    with pytest.raises(KeyboardInterrupt):
        pipe(IMAGE, MASK, preset="fast", callback_on_step_end=lambda *args: (seen.append(args), _stop())[1])
    levels = [round(i * 999 / 249) for i in range(250)]
    chosen = [levels[round(2.5 * k)] for k in range(100)][::-1]
    assert pipe.scheduler.timesteps.tolist() == chosen[:-1] and pipe.scheduler.trajectory[-1][1] == chosen[-1] == 0


def _stop():
    raise KeyboardInterrupt


def test_nothing_is_drawn_after_the_first_noise():
    pipe = make_pipeline()
    generator = torch.Generator().manual_seed(3)
    pipe(IMAGE, MASK, num_inference_steps=3, generator=generator, output_type="pt")
    expected = torch.Generator().manual_seed(3)
    torch.randn(2, 1, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"jump_length": 1, "jump_n_sample": 2}])
def test_a_result_depends_on_its_own_generator_only(options):
    pipe = make_pipeline()
    pipe.to(torch.float64)

    def run(seeds, images):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(images, MASK, num_inference_steps=4, generator=generators, output_type="pt", **options).images

    together, other = run([1, 2], IMAGE), run([1, 3], IMAGE)
    torch.testing.assert_close(together[0], other[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(together[:1], run([1], IMAGE[:1]), rtol=0, atol=1e-9)
    assert not torch.allclose(together[1], other[1], atol=1e-3)


def test_several_fills_per_image():
    pipe = make_pipeline(num_class_embeds=3)
    noise = torch.randn(4, 1, 8, 8)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    images = pipe(IMAGE, MASK, num_images_per_prompt=2, latents=noise, class_labels=[0, 2], **options).images
    expected = pipe(IMAGE[[0, 0, 1, 1]], MASK, latents=noise, class_labels=[0, 0, 2, 2], **options).images
    assert torch.equal(images, expected)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_learned_variance_is_split_off(channels):
    with_variance = make_unet(in_channels=channels, out_channels=2 * channels)
    without = make_unet(in_channels=channels, out_channels=channels)
    state = with_variance.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = state[name][:channels]
    without.load_state_dict(state)
    image = torch.rand(1, channels, 8, 8)
    noise = torch.randn(1, channels, 8, 8)
    images = [
        quiet(CoPaintPipeline(unet, DDPMScheduler()))(
            image, MASK, num_inference_steps=3, latents=noise, output_type="pt"
        )
        for unet in (with_variance, without)
    ]
    torch.testing.assert_close(images[0].images, images[1].images)


def test_no_gradient_is_left_on_the_weights_and_checkpointing_changes_nothing():
    pipe = make_pipeline()
    pipe.unet.requires_grad_(True)
    noise = torch.randn(2, 1, 8, 8)
    images = pipe(IMAGE, MASK, num_inference_steps=3, latents=noise, output_type="pt").images
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipe.unet.parameters())
    pipe.unet.enable_gradient_checkpointing()
    again = pipe(IMAGE, MASK, num_inference_steps=3, latents=noise, output_type="pt").images
    torch.testing.assert_close(images, again)


class Held:
    """A tensor that is kept for a backward pass; the class counts them in bytes."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Held.now += tensor.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.nbytes


def test_no_more_than_one_pass_is_held_in_memory():
    """Also where trials are rejected."""
    pipe = make_pipeline(CoPaintScheduler(clip_sample=False))
    passes = []
    pipe.unet.register_forward_pre_hook(lambda *args: passes.append(torch.is_grad_enabled()))
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        sample = torch.randn(2, 1, 16, 16, requires_grad=True)
        torch.autograd.grad(pipe.unet(sample, 500).sample.square().sum(), sample)
        bare, Held.peak = Held.peak, 0
        assert Held.now == 0 < bare
        options = {"num_inference_steps": 4, "num_optimization_steps": 4, "learning_rate": 1e3}
        pipe(torch.rand(2, 1, 16, 16), torch.eye(16), output_type="pt", **options)
    assert sum(passes) > 3 * 4 + 10, "some trials with a graph are rejected"
    assert Held.now == 0
    assert bare < Held.peak < 1.1 * bare


def test_optimizing_brings_the_known_pixels_nearer():
    recording = load("copaint_eta0_10")
    pipe = quiet(CoPaintPipeline(MixtureUNet(), CoPaintScheduler()))
    given = settings(recording) | AUTHORS
    known = torch.from_numpy(recording["keep_mask"]).bool().expand(1, 3, 16, 16)
    image = torch.from_numpy(recording["image"])
    errors = []
    for steps, rate in ((1, 1e-12), (1, 0.02), (2, 0.02), (4, 0.1)):
        images = pipe(**(given | {"num_optimization_steps": steps, "learning_rate": rate})).images
        errors.append((images - image)[known].square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_a_loss_that_is_not_finite_is_named():
    pipe = make_pipeline()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    for adaptive in (True, False):
        with pytest.raises(ValueError, match=r"not finite at step 0 \(timestep 999\).*`learning_rate`.*smaller"):
            pipe(IMAGE, MASK, num_inference_steps=3, adaptive_learning_rate=adaptive)
    pipe = make_pipeline(CoPaintScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="not finite at step .*`learning_rate`"):
        pipe(IMAGE, MASK, num_inference_steps=4, learning_rate=1e30, adaptive_learning_rate=False)


def test_an_image_that_no_step_improves_stays_where_it_is():
    """With no cut allowed, a step that is too large is not taken: the sample is as without any."""
    pipe = make_pipeline(CoPaintScheduler(clip_sample=False))
    noise = torch.randn(2, 1, 8, 8)
    options = {"num_inference_steps": 3, "latents": noise, "output_type": "latent", "paste_known": False}
    huge = pipe(IMAGE, MASK, learning_rate=1e6, max_backtracks=0, **options).images
    none = pipe(IMAGE, MASK, learning_rate=0.0, **options).images
    assert torch.equal(huge, none)


def test_inference_mode_is_refused():
    pipe = make_pipeline()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode` rules out"):
        pipe(IMAGE, MASK)


def test_stock_checkpoints_load(tiny_ddpm_folder, tiny_ddpm):
    pipe = quiet(CoPaintPipeline.from_pretrained(tiny_ddpm_folder))
    assert type(pipe.scheduler) is CoPaintScheduler
    shared = quiet(CoPaintPipeline.from_pipe(tiny_ddpm))
    assert shared.unet is tiny_ddpm.unet
    noise = torch.randn(2, 1, 8, 8)
    images = [
        each(IMAGE, MASK, num_inference_steps=3, latents=noise, output_type="pt").images for each in (pipe, shared)
    ]
    torch.testing.assert_close(*images)


def test_files_work_without_this_package(tiny_ddpm_folder, tiny_ddpm, tmp_path):
    """As `custom_pipeline` on a stock checkpoint, in an environment that has only diffusers and torch."""
    methods = ["copaint", "replacement", "repaint", "mcg", "ddnm", "ddrm", "dps"]
    code = """
    import importlib.util, sys
    import torch
    from diffusers import DiffusionPipeline
    assert importlib.util.find_spec("diffusers_ext") is None
    checkpoint, pipelines, *methods = sys.argv[1:]
    for method in methods:
        file = f"{pipelines}/{method}.py"
        pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline=file, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        image, mask = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), torch.eye(8)
        generator = torch.Generator().manual_seed(0)
        images = pipe(image, mask, num_inference_steps=3, generator=generator, output_type="pt").images
        print(type(pipe).__name__, *images.flatten().tolist())
    """
    done = subprocess.run(
        [make_reader(tmp_path / "env"), "-c", textwrap.dedent(code), tiny_ddpm_folder, FILES, *methods],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    image, mask = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), torch.eye(8)
    for method, line in zip(methods, done.stdout.splitlines(), strict=True):
        name, *values = line.split()
        pipe = quiet(getattr(diffusers_ext, name).from_pipe(tiny_ddpm))
        assert type(pipe).__module__ == f"diffusers_ext.pipelines.{method}"
        generator = torch.Generator().manual_seed(0)
        images = pipe(image, mask, num_inference_steps=3, generator=generator, output_type="pt").images
        torch.testing.assert_close(torch.tensor([float(v) for v in values]), images.flatten(), rtol=0, atol=1e-4)


BAD_CALLS = {
    "RGB for a grey model": (lambda p: p(torch.rand(1, 3, 8, 8), MASK), r"`image` has shape .*must have 1 channels"),
    "odd size": (lambda p: p(torch.rand(1, 1, 9, 8), torch.zeros(9, 8)), r"\(9, 8\).*multiples of 2"),
    "values": (lambda p: p(2 * IMAGE - 1, MASK), r"`image` has values in \[.*image / 2 \+ 0.5"),
    "bytes": (lambda p: p((255 * IMAGE).byte(), MASK), "TypeError: `image` has dtype torch.uint8.*divide by 255"),
    "file name": (lambda p: p("cat.png", MASK), "TypeError: `image` holds a str"),
    "no image": (lambda p: p([], MASK), "`image` is empty"),
    "images of two sizes": (lambda p: p([IMAGE[0], IMAGE[0, :, :4]], MASK), "one call needs one size"),
    "no mask": (lambda p: p(IMAGE), "`mask_image` is missing"),
    "mask of another shape": (lambda p: p(IMAGE, torch.zeros(8, 4)), r"`mask_image` has .*\(8, 4\).*proportions"),
    "three masks": (lambda p: p(IMAGE, torch.zeros(3, 1, 8, 8)), "3 masks for 2 images: give one for all"),
    "mask out of range": (lambda p: p(IMAGE, 255 * MASK), r"`mask_image` has values in \[0, 255\]"),
    "mask for super-resolution": (lambda p: p(IMAGE, MASK, mode="super_resolution"), "leave it out"),
    "mode": (lambda p: p(IMAGE, MASK, mode="deblur"), "`mode` is 'deblur'.*'inpaint' or 'super_resolution'"),
    "preset": (lambda p: p(IMAGE, MASK, preset="best"), "`preset` is 'best'.*'copaint'"),
    "one step": (lambda p: p(IMAGE, MASK, num_inference_steps=1), "`num_inference_steps` is 1.*from 2 to 1000"),
    "too many steps": (lambda p: p(IMAGE, MASK, num_inference_steps=1001), "is 1001.*from 2 to 1000"),
    "no optimization": (lambda p: p(IMAGE, MASK, num_optimization_steps=0), "`num_optimization_steps` is 0.*least 1"),
    "negative rate": (lambda p: p(IMAGE, MASK, learning_rate=-0.1), "`learning_rate` is -0.1.*at least 0"),
    "NaN rate": (lambda p: p(IMAGE, MASK, learning_rate=float("nan")), "`learning_rate` is nan"),
    "half a step": (lambda p: p(IMAGE, MASK, num_optimization_steps=2.5), "TypeError: .* is 2.5.*an `int`"),
    "word": (lambda p: p(IMAGE, MASK, learning_rate="0.1"), "TypeError: `learning_rate` is '0.1'.*a number"),
    "no decay": (lambda p: p(IMAGE, MASK, learning_rate_decay=0), "`learning_rate_decay` is 0.*at least 1e-06"),
    "eta": (lambda p: p(IMAGE, MASK, eta=1.5), "`eta` is 1.5.*at most 1"),
    "no jump": (lambda p: p(IMAGE, MASK, jump_length=0), "`jump_length` is 0.*from 1"),
    "rising timesteps": (lambda p: p(IMAGE, MASK, timesteps=[0, 500]), r"`timesteps` is \[0, 500\].*falling"),
    "timesteps and steps": (lambda p: p(IMAGE, MASK, 10, timesteps=[500, 0]), "both given"),
    "no fills": (lambda p: p(IMAGE, MASK, num_images_per_prompt=0), "`num_images_per_prompt` is 0.*at least 1"),
    "labels for nothing": (lambda p: p(IMAGE, MASK, class_labels=1), "`class_labels` were given.*leave them out"),
    "latents": (lambda p: p(IMAGE, MASK, latents=torch.randn(1, 1, 8, 8)), r"needs \(2, 1, 8, 8\)"),
    "generators": (lambda p: p(IMAGE, MASK, generator=[torch.Generator()]), "list of 1 for a batch of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_before_the_model_runs(name):
    pipe = make_pipeline()
    call, message = BAD_CALLS[name]
    error = TypeError if message.startswith("TypeError: ") else ValueError
    with pytest.raises(error, match=message.removeprefix("TypeError: ")), no_model_runs(pipe):
        call(pipe)


def test_networks_of_another_kind_are_refused():
    for changes, words in (
        ({"time_embedding_type": "fourier"}, "noise levels"),
        ({"class_embed_type": "identity"}, "embeddings in place of class labels"),
        ({"out_channels": 3}, "1 input and 3 output channels"),
    ):
        with pytest.raises(ValueError, match=words):
            make_pipeline(**changes)
    text = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="cross-attention"):
        CoPaintPipeline(text, CoPaintScheduler())
