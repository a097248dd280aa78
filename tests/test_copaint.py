"""CoPaint against the authors' recorded runs, its costs, its line search, and what it refuses."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from inpainting_goldens import MixtureUNet, load
from PIL import Image

from diffusers_ext import CoPaintPipeline, CoPaintScheduler
from diffusers_ext.pipelines import copaint
from diffusers_ext.pipelines.copaint import PRESETS, AveragePoolOperator, MaskOperator, prepare_keep_mask, to_batch

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


def replay(recording, unet, monkeypatch, **changes):
    """Run with the recorded draws; returns the output and the sample after every move."""
    draws = iter(
        torch.from_numpy(noise).to(unet.dtype)
        for noise, kind in zip(recording["ev_noise"], recording["ev_kind"], strict=True)
        if kind == 1
    )
    monkeypatch.setattr(copaint, "randn_tensor", lambda *args, **kwargs: next(draws))
    samples = []
    pipe = quiet(CoPaintPipeline(unet, CoPaintScheduler()))
    unet.calls.clear()
    output = pipe(
        **(settings(recording) | AUTHORS | changes),
        callback_on_step_end=lambda pipe, step, timestep, tensors: samples.append(tensors["latents"].clone()),
    )
    assert next(draws, None) is None, "every recorded draw is used"
    return output.images, torch.stack(samples)


@pytest.mark.parametrize("name", RUNS)
def test_authors_runs_in_double_precision(name, monkeypatch):
    recording, unet = load(name), MixtureUNet()
    images, samples = replay(recording, unet, monkeypatch)
    np.testing.assert_allclose(images.clamp(-1, 1), recording["output"], rtol=0, atol=1e-10)
    moves = recording["ev_kind"] != 2
    np.testing.assert_allclose(samples, recording["ev_x_out"][moves], rtol=0, atol=1e-10)
    # 1 + G forward and G backward passes per optimized level, one forward pass more per rejected trial
    steps = recording["config"]["optimize_xt.num_iteration_optimize_xt"]
    levels = int((recording["ev_kind"] != 1).sum())
    rejected = int(recording["ev_n_reject"].sum())
    assert len(unet.calls) == levels * (1 + steps) + rejected
    assert int(recording["nfe_backward"]) == levels * steps
    assert int(recording["nfe_forward"]) == levels * (1 + 2 * steps) + rejected, "what the authors' code takes"
    if name.startswith("copaint_batch2"):
        assert rejected > 0


@pytest.mark.parametrize("name", RUNS)
def test_authors_runs_in_single_precision(name, monkeypatch):
    recording, unet = load(name), MixtureUNet().to(torch.float32)
    images, _ = replay(recording, unet, monkeypatch, loss_tolerance=1e-5)
    np.testing.assert_allclose(images.clamp(-1, 1), recording["output"], rtol=0, atol=5e-5)


def test_images_of_a_batch_have_their_own_line_search(monkeypatch):
    """The rows of a batch are the authors' runs alone, not their batch, whose line search is shared."""
    recording = load("copaint_batch2_biglr_10")
    images, _ = replay(recording, MixtureUNet(), monkeypatch)
    alone = np.concatenate([load(f"copaint_batch2_biglr_10_alone{i}")["output"] for i in range(2)])
    np.testing.assert_allclose(images.clamp(-1, 1), alone, rtol=0, atol=1e-10)
    assert np.abs(alone - recording["output"]).max() > 0.03


def test_rejections_are_counted_level_by_level(monkeypatch):
    recording, unet = load("copaint_batch2_biglr_10_alone0"), MixtureUNet()
    replay(recording, unet, monkeypatch)
    per_level = [len(list(calls)) - 3 for _, calls in itertools.groupby(call[0] for call in unet.calls)]
    assert per_level == recording["ev_n_reject"].tolist()


def test_estimate_in_several_steps(monkeypatch):
    """`num_x0_steps`, by gradients of an independent program: plain autograd, no checkpoints, no reuse."""
    unet, steps = MixtureUNet(), 3
    recording = load("copaint_eta0_10")
    given = settings(recording) | {"num_optimization_steps": 1, "adaptive_learning_rate": False}
    images, _ = replay(recording, unet, monkeypatch, **(given | {"num_x0_steps": steps}))

    abar = recording["alphas_cumprod"]
    t_map, image = recording["timestep_map"], torch.from_numpy(recording["image"])
    keep, x = torch.from_numpy(recording["keep_mask"]), torch.from_numpy(recording["x_T"])

    def predict(x, i):
        eps = unet(x, torch.tensor([int(t_map[i])])).sample[:, :3]
        return ((x - math.sqrt(1 - abar[i]) * eps) / math.sqrt(abar[i])).clamp(-1, 1), eps

    rate, weight = 0.02, 1e-4
    for i in range(9, 0, -1):
        leaf = x.clone().requires_grad_()
        places = [i, *[k * (i // steps) for k in range(steps - 1, -1, -1)]]
        places = sorted(set(places), reverse=True)
        state = leaf
        for a, b in itertools.pairwise(places):
            x0, eps = predict(state, a)
            state = math.sqrt(abar[b]) * x0 + math.sqrt(1 - abar[b]) * eps
        loss = (keep * (image - state.clamp(-1, 1))).square().sum() + weight * (leaf - x).square().sum()
        [gradient] = torch.autograd.grad(loss, leaf)
        x = x - rate * math.sqrt(abar[i] / abar[0]) * gradient
        x0, eps = predict(x, i)
        x = math.sqrt(abar[i - 1]) * x0 + math.sqrt(1 - abar[i - 1]) * eps
        rate, weight = rate * 1.012, weight * 1.01
    torch.testing.assert_close(images, x.detach(), rtol=0, atol=1e-10)


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
    "eta": (lambda p: p(IMAGE, MASK, eta=1.5), "`eta` is 1.5.*at most 1"),
    "no jump": (lambda p: p(IMAGE, MASK, jump_length=0), "`jump_length` is 0.*at least 1"),
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
