"""Evaluation: every metric against a closed form or an independent computation, and the report that comes of it."""

import copy
import doctest
import importlib
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline
from diffusers_ext.cli import main
from diffusers_ext.data import ImageDataset, load_image_dataset
from diffusers_ext.evaluation.pdae import draw_pdae, evaluate_pdae
from diffusers_ext.evaluation.reconstruction import reconstruction_metrics, ssim_window
from diffusers_ext.evaluation.report import eval_results, image_grid, line_plot, markdown_report, write_report
from diffusers_ext.evaluation.representation import linear_probe

# ---------------------------------------------------------------------------------------------------- reconstruction


def test_metrics_of_constant_images():
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), 0.6)
    metrics = reconstruction_metrics(a, b)
    assert metrics["mse"].item() == pytest.approx(0.01, rel=1e-6)
    assert metrics["psnr"].item() == pytest.approx(20, rel=1e-6)
    # without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1)
    assert metrics["ssim"].item() == pytest.approx((0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), rel=1e-6)


def test_metrics_of_equal_images():
    image = torch.rand(2, 1, 8, 8)
    metrics = reconstruction_metrics(image, image)
    assert metrics["mse"].tolist() == [0, 0]
    assert metrics["psnr"].tolist() == [math.inf, math.inf]
    torch.testing.assert_close(metrics["ssim"], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_psnr_is_that_of_each_image():
    images = torch.zeros(2, 1, 8, 8)
    reconstructions = torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1).expand_as(images)
    psnr = reconstruction_metrics(images, reconstructions)["psnr"]
    assert psnr.tolist() == pytest.approx([20, 40], rel=1e-6)
    assert psnr.mean().item() == pytest.approx(30, rel=1e-6)  # that of the mean MSE is 22.97


def ssim_pixel_by_pixel(a: np.ndarray, b: np.ndarray, window: np.ndarray) -> float:
    """SSIM of two images of one channel, from its definition by weighted moments in each window."""
    radius = len(window) // 2
    a, b = (np.pad(x.astype(np.float64), radius, mode="reflect") for x in (a, b))
    values = []
    for top in range(a.shape[0] - 2 * radius):
        for left in range(a.shape[1] - 2 * radius):
            x, y = (image[top : top + len(window), left : left + len(window)] for image in (a, b))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 16), (1, 10, 13)])
def test_ssim_against_its_definition(shape):
    images = torch.rand(2, *shape)
    reconstructions = (images + 0.2 * torch.randn_like(images)).clamp(0, 1)
    side, gaussian = ssim_window(*shape[1:])
    profile = np.exp(-((np.arange(side) - side // 2) ** 2) / (2 * 1.5**2)) if gaussian else np.ones(side)
    window = np.outer(profile, profile) / profile.sum() ** 2
    expected = [
        np.mean([ssim_pixel_by_pixel(a, b, window) for a, b in zip(x.numpy(), y.numpy(), strict=True)])
        for x, y in zip(images, reconstructions, strict=True)
    ]
    assert reconstruction_metrics(images, reconstructions)["ssim"].tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_against_scikit_image():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    # Flat margins: the two libraries mirror borders differently, and scikit-image leaves them out of the mean.
    images = torch.full((1, 1, 40, 40), 0.5, dtype=torch.float64)
    reconstructions = images.clone()
    images[..., 12:28, 12:28], reconstructions[..., 12:28, 12:28] = torch.rand(2, 16, 16, dtype=torch.float64)
    _, full = structural_similarity(
        images[0, 0].numpy(),
        reconstructions[0, 0].numpy(),
        data_range=1,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    assert reconstruction_metrics(images, reconstructions)["ssim"].item() == pytest.approx(full.mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("size", "window"),
    [((3, 3), 3), ((4, 9), 3), ((8, 8), 7), ((9, 9), 9), ((10, 64), 9), ((11, 11), 11), ((256, 256), 11)],
)
def test_ssim_window_fits(size, window):
    assert ssim_window(*size) == (window, min(size) >= 11)
    assert ssim_window(*reversed(size)) == ssim_window(*size)
    metrics = reconstruction_metrics(torch.rand(1, 1, *size), torch.rand(1, 1, *size))
    assert -1 <= metrics["ssim"].item() < 1


def test_metrics_of_a_batch_are_those_of_its_images():
    images, reconstructions = torch.rand(2, 5, 3, 12, 12)
    together = reconstruction_metrics(images, reconstructions)
    for name, values in together.items():
        assert values.shape == (5,) and values.dtype == torch.float64
        alone = [reconstruction_metrics(images[i : i + 1], reconstructions[i : i + 1])[name] for i in range(5)]
        torch.testing.assert_close(values, torch.cat(alone))
    half = reconstruction_metrics(images.half(), reconstructions.half())
    for name in together:
        torch.testing.assert_close(half[name], together[name], rtol=5e-3, atol=1e-3)


def test_metrics_refuse_what_they_cannot_compare():
    image = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\), but `reconstructions` has \(1, 3, 8, 8\)"):
        reconstruction_metrics(image, image.expand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="same"):
        reconstruction_metrics(image[0], image[0])
    with pytest.raises(TypeError, match="divide by 255"):
        reconstruction_metrics(image, (255 * image).byte())
    for wrong in (2 * image - 1.5, torch.full_like(image, math.nan)):
        with pytest.raises(ValueError, match=r"`reconstructions` has values in .* must be in \[0, 1\]"):
            reconstruction_metrics(image, wrong)
    with pytest.raises(ValueError, match="2 x 8 are too small"):
        reconstruction_metrics(image[:, :, :2], image[:, :, :2])


# ---------------------------------------------------------------------------------------------------- representation


def digits_features(classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    keep = labels < classes
    features = torch.from_numpy(images[keep]) + 4 * torch.randn(int(keep.sum()), 64)  # noise: nothing is separable
    labels = torch.from_numpy(labels[keep])
    return features[::2], labels[::2], features[1::2], labels[1::2]


def fit_sklearn(features, labels, test_features, inverse_l2):
    mean, std = features.mean(0), features.std(0, correction=0)
    model = LogisticRegression(C=inverse_l2, tol=1e-10, max_iter=10000)
    model.fit(((features - mean) / std).numpy(), labels.numpy())
    return model, ((test_features - mean) / std).numpy()


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("inverse_l2", [1.0, 0.01])
def test_probe_of_classes_is_that_of_scikit_learn(classes, inverse_l2):
    features, labels, test_features, test_labels = digits_features(classes)
    model, scaled = fit_sklearn(features, labels, test_features, inverse_l2)
    accuracy = linear_probe(features, labels, test_features, test_labels, inverse_l2)["accuracy"]
    assert accuracy == pytest.approx(model.score(scaled, test_labels.numpy()), abs=1e-9)
    assert 1.5 / classes < accuracy or classes == 2


def test_probe_of_attributes_is_that_of_scikit_learn():
    features, labels, test_features, test_labels = digits_features(10)
    attributes, test_attributes = (torch.stack([y > 4, y % 2 == 0, y == 3], 1).long() for y in (labels, test_labels))
    test_attributes = torch.cat([test_attributes, torch.zeros(len(test_attributes), 1).long()], 1)  # no curve for it
    attributes = torch.cat([attributes, (labels == 0).long()[:, None]], 1)
    result = linear_probe(features, attributes, test_features, test_attributes, inverse_l2=0.1)
    auroc, average_precision = [], []
    for column in range(3):
        model, scaled = fit_sklearn(features, attributes[:, column], test_features, 0.1)
        scores = model.decision_function(scaled)
        auroc.append(roc_auc_score(test_attributes[:, column], scores))
        average_precision.append(average_precision_score(test_attributes[:, column], scores))
    assert result["num_labels"] == 3
    assert result["auroc"] == pytest.approx(np.mean(auroc), abs=1e-5)
    assert result["average_precision"] == pytest.approx(np.mean(average_precision), abs=1e-5)


def test_probe_of_features_that_say_nothing_answers_the_most_frequent_class():
    labels, test_labels = torch.tensor([5, 5, 5, 2, 2, 9]), torch.tensor([5, 2, 2, 9])
    result = linear_probe(torch.full((6, 3), 0.1), labels, torch.rand(4, 3), test_labels)
    assert result == {"accuracy": 0.25}


def test_probe_counts_classes_that_it_has_not_seen_as_wrong():
    features = torch.tensor([[-1.0], [-1.1], [1.0], [1.1]])
    result = linear_probe(features, torch.tensor([0, 0, 1, 1]), features, torch.tensor([0, 0, 1, 2]))
    assert result == {"accuracy": 0.75}


def test_probe_leaves_no_trace_and_works_without_gradients():
    features, labels, test_features, test_labels = digits_features(3)
    expected = linear_probe(features, labels, test_features, test_labels)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert linear_probe(features.float(), labels, test_features.float(), test_labels) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_says_when_it_has_not_converged(caplog):
    features, labels, test_features, test_labels = digits_features(10)
    with caplog.at_level(logging.WARNING):
        linear_probe(features, labels, test_features, test_labels)
        assert not caplog.records
        linear_probe(features, labels, test_features, test_labels, max_iterations=2)
    assert "has not converged" in caplog.text and "after 2 iterations" in caplog.text


def test_probe_refuses_what_it_cannot_fit():
    x, y = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
    for arguments, message in [
        ((x[0], y, x, y), r"`features` has shape \(2,\)"),
        ((x, y, x[:, :1], y), r"`test_features` has shape \(4, 1\)"),
        ((x, y[:3], x, y), r"`labels` has shape \(3,\).* the 4 samples"),
        ((x, y, x, y[:, None]), r"`test_labels` has shape \(4, 1\)"),
        ((x / 0, y, x, y), "`features` holds values that are not finite"),
        ((x, 0 * y, x, y), r"`labels` holds the class \[0\] alone"),
        ((x, 2 * y[:, None], x, y[:, None]), "other than 0 and 1"),
        ((x, torch.stack([y, 0 * y], 1), x, torch.stack([y, y], 1)), r"one value only in the columns \[1\]"),
        ((x, y[:, None], x, 0 * y[:, None]), "`test_labels` has one value only"),
        ((x, y, x, y, 0.0), "`inverse_l2` is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(*arguments)


# -------------------------------------------------------------------------------------------------------------- PDAE


def make_pipe(unet: UNet2DModel, channels: int = 1, latent_dim: int = 4) -> PDAEPipeline:
    """A pipeline whose estimator is not zero: a code matters."""
    encoder = PDAEEncoder(8, channels, latent_dim, block_out_channels=(8, 8), attention_block=None, norm_num_groups=4)
    estimator = PDAEGradientEstimator.from_unet(unet, latent_dim)
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PDAEPipeline(unet, encoder, estimator, DDPMScheduler())


@pytest.fixture
def pipe(tiny_unet) -> PDAEPipeline:
    return make_pipe(tiny_unet)


@pytest.fixture(scope="module")
def train() -> ImageDataset:
    return load_image_dataset("digits", max_samples=60)


@pytest.fixture(scope="module")
def test() -> ImageDataset:
    return load_image_dataset("digits", split="validation", max_samples=10)


FAST = {"num_inference_steps": 3, "num_inversion_steps": 2, "gap_timesteps": [0, 500, 999]}


def stack(dataset) -> torch.Tensor:
    return torch.stack([dataset[i]["images"] for i in range(len(dataset))]) / 2 + 0.5


def test_numbers_are_those_of_plain_calls(pipe, train, test):
    metrics = evaluate_pdae(pipe, train, test, **FAST, seed=7)
    x_train, x, codes = stack(train), stack(test), pipe.encode(stack(test))
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7 + i)) for i in range(10)])
    pca = PCA(4).fit(x_train.flatten(1))
    restored = torch.from_numpy(pca.inverse_transform(pca.transform(x.flatten(1)))).reshape(x.shape).float()

    def decode(noise: torch.Tensor, **options) -> torch.Tensor:
        return pipe.decode(codes, noise, 3, output_type="pt", **options).images

    expected = {
        "base_random": decode(noise, shift_scale=0),
        "pdae_random": decode(noise),
        "base_inferred": decode(pipe.invert(x, None, 2), shift_scale=0),
        "pdae_inferred": decode(pipe.invert(x, codes, 2)),
        "mean_image": x_train.mean(0, keepdim=True).expand_as(x),
        "pca": restored.clamp(0, 1),
    }
    rows = metrics["reconstruction"]
    assert rows.keys() == {*expected, "pdae_random_wrong_code"}
    for name, images in expected.items():
        assert rows[name]["mse"] == pytest.approx((images - x).square().mean().item(), rel=1e-4), name
        for metric, values in reconstruction_metrics(x, images).items():
            assert rows[name][metric] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-6), name
    mse = [rows[name]["mse"] for name in ("base_random", "pdae_random", "pdae_random_wrong_code")]
    assert len({round(value, 5) for value in mse}) == 3, "the code has no effect: the rows prove nothing"

    generators = [torch.Generator().manual_seed(7 + i) for i in range(10)]
    gap = pipe.posterior_gap(x, [0, 500, 999], generator=generators)
    assert metrics["posterior_gap"]["timesteps"] == [0, 500, 999]
    assert metrics["posterior_gap"]["no_code"] == pytest.approx(gap.base.tolist(), rel=1e-4)
    assert metrics["posterior_gap"]["own_code"] == pytest.approx(gap.shifted.tolist(), rel=1e-4)
    assert metrics["posterior_gap"]["wrong_code"][1] != pytest.approx(gap.shifted[1].item(), rel=1e-4)

    y_train, y = (torch.tensor([item["labels"] for item in data]) for data in (train, test))
    assert metrics["probe"]["pixels"] == {
        "num_features": 64,
        **linear_probe(x_train.flatten(1), y_train, x.flatten(1), y),
    }
    assert metrics["probe"]["code"] == {
        "num_features": 4,
        **linear_probe(pipe.encode(x_train), y_train, codes, y),
    }
    assert metrics["probe"]["pca"]["num_features"] == metrics["probe"]["untrained_encoder"]["num_features"] == 4


def test_wrong_code_is_another_images(pipe, train, test):
    pair = torch.utils.data.Subset(test, [0, 1])
    metrics = evaluate_pdae(pipe, train, pair, **FAST)
    codes = pipe.encode(stack(pair))
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    images = pipe.decode(codes.flip(0), noise, 3, output_type="pt").images
    expected = (images - stack(pair)).square().mean().item()
    assert metrics["reconstruction"]["pdae_random_wrong_code"]["mse"] == pytest.approx(expected, rel=1e-4)


def test_estimator_that_does_nothing_gives_the_base_model(tiny_unet, train, test):
    encoder = PDAEEncoder(8, 1, 4, block_out_channels=(8, 8), attention_block=None, norm_num_groups=4)
    pipe = PDAEPipeline(tiny_unet, encoder, PDAEGradientEstimator.from_unet(tiny_unet, 4), DDPMScheduler())
    metrics = evaluate_pdae(pipe, train, test, **FAST)
    rows, gap = metrics["reconstruction"], metrics["posterior_gap"]
    assert rows["pdae_random"] == rows["pdae_random_wrong_code"] == rows["base_random"]
    assert rows["pdae_inferred"] == rows["base_inferred"] != rows["base_random"]
    assert gap["own_code"] == gap["wrong_code"] == gap["no_code"]
    # the untrained encoder is one of another seed, not the pipeline's own
    assert metrics["probe"]["untrained_encoder"] != metrics["probe"]["code"]


def assert_close(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a.keys() - {"batch_size"}:
            assert_close(a[name], b[name])
    elif (isinstance(a, list) and a and isinstance(a[0], float)) or isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4)
    else:
        assert a == b


def test_batch_size_changes_nothing_and_the_seed_everything_random(pipe, train, test):
    metrics = evaluate_pdae(pipe, train, test, **FAST)
    assert evaluate_pdae(pipe, train, test, **FAST) == metrics
    assert_close(evaluate_pdae(pipe, train, test, **FAST, batch_size=3), metrics)
    other = evaluate_pdae(pipe, train, test, **FAST, seed=1)
    assert other["reconstruction"]["pdae_random"] != metrics["reconstruction"]["pdae_random"]
    assert other["reconstruction"]["pdae_inferred"] == metrics["reconstruction"]["pdae_inferred"]


def test_pipeline_is_left_as_it_was(pipe, train, test, capsys):
    pipe.unet.eval()
    pipe.encoder.train()
    pipe.gradient_estimator.mid_block.eval()
    pipe.set_progress_bar_config(disable=True)
    cropped = ImageDataset(train.pictures[:4], resolution=8, image_mode="L", center_crop=False)
    modes = [module.training for model in (pipe.unet, pipe.encoder) for module in model.modules()]
    state = torch.get_rng_state()
    draw_pdae(pipe, test, num_images=2, num_inference_steps=2, num_inversion_steps=2)
    evaluate_pdae(pipe, cropped, test, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for model in (pipe.unet, pipe.encoder) for module in model.modules()]
    assert pipe._progress_bar_config == {"disable": True}
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    assert capsys.readouterr().err == "", "progress bars that were turned off"


def test_one_progress_bar_per_phase(pipe, train, test, capsys):
    evaluate_pdae(pipe, train, test, **FAST)
    bars = [line.split("\r")[-1] for line in capsys.readouterr().err.rstrip("\n").split("\n")]
    assert [bar.split(":")[0] for bar in bars] == [
        "Encoding training images",
        "Encoding test images",
        "Reconstructing",
        "Measuring the gap",
        "Probing",
    ]
    assert all("100%" in bar for bar in bars)


def test_limits_take_evenly_spaced_images(pipe, train, test):
    metrics = evaluate_pdae(pipe, train, test, **FAST, max_images=4, max_train_images=20)
    few = torch.utils.data.Subset(test, [0, 3, 6, 9])
    some = torch.utils.data.Subset(train, np.linspace(0, 59, 20).astype(int).tolist())
    expected = evaluate_pdae(pipe, some, few, **FAST)
    for part in ("reconstruction", "posterior_gap", "probe"):
        assert metrics[part] == expected[part]
    assert (metrics["protocol"]["num_images"], metrics["protocol"]["num_train_images"]) == (4, 20)


def test_without_inferred_noise(pipe, train, test):
    metrics = evaluate_pdae(pipe, train, test, **{**FAST, "num_inversion_steps": None})
    assert not any(name.endswith("inferred") for name in metrics["reconstruction"])
    assert "no inferred noise" in markdown_report(metrics)
    heights = [
        draw_pdae(pipe, test, num_images=2, num_inference_steps=2, num_inversion_steps=steps)["reconstructions"].height
        for steps in (None, 2)
    ]
    assert heights == [4 + 3 * 68, 4 + 4 * 68]


def test_without_labels_there_is_a_note_and_no_probe(pipe, train, test):
    bare = ImageDataset(test.pictures[:6], resolution=8, image_mode="L")
    metrics = evaluate_pdae(pipe, train, bare, **FAST)
    assert metrics["probe"] is None
    assert metrics["notes"] == ["no linear probe: both data sets need labels"]
    assert "Note: no linear probe" in markdown_report(metrics)
    assert all(result["metric_type"] != "accuracy" for result in eval_results(metrics))
    one_class = ImageDataset(train.pictures[:6], labels=[3] * 6, resolution=8, image_mode="L")
    metrics = evaluate_pdae(pipe, one_class, test, **FAST)
    assert metrics["probe"] is None and "class [3] alone" in metrics["notes"][-1]
    assert metrics["reconstruction"]["pdae_random"]["mse"] > 0


def test_pca_cannot_be_larger_than_its_data(pipe, train, test):
    metrics = evaluate_pdae(pipe, torch.utils.data.Subset(train, range(3)), test, **FAST)
    assert metrics["protocol"]["pca_components"] == 3
    assert any("the PCA has 3 components, not 4" in note for note in metrics["notes"])
    assert "PCA, 3 components" in markdown_report(metrics)


def test_class_conditional_rgb(test):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=10,
    )
    pipe = make_pipe(unet, channels=3)
    pictures = [Image.fromarray(np.uint8(np.random.default_rng(i).integers(0, 256, (8, 8, 3)))) for i in range(6)]
    labelled = ImageDataset(pictures, labels=[0, 1, 2, 3, 0, 1], resolution=8)
    metrics = evaluate_pdae(pipe, labelled, labelled, **FAST, batch_size=4)
    relabelled = ImageDataset(pictures, labels=[5, 6, 7, 8, 5, 6], resolution=8)
    other = evaluate_pdae(pipe, labelled, relabelled, **FAST, batch_size=4)
    for name in ("base_random", "pdae_random", "base_inferred"):
        assert metrics["reconstruction"][name] != other["reconstruction"][name]
    assert set(draw_pdae(pipe, labelled, num_images=3, num_inference_steps=2, num_inversion_steps=2)) == {
        "reconstructions",
        "interpolation",
    }
    with pytest.raises(ValueError, match="`dataset_test` has no labels, but the pipeline's `unet` is class-cond"):
        evaluate_pdae(pipe, labelled, ImageDataset(pictures, resolution=8), **FAST)


def test_bad_input_is_refused_before_a_model_runs(pipe, train, test):
    def refuse(*_):
        raise AssertionError("a model ran")

    for model in (pipe.unet.conv_in, pipe.encoder):
        model.register_forward_pre_hook(refuse)
    color = load_image_dataset("digits", image_mode="RGB", max_samples=4)
    large = load_image_dataset("digits", resolution=16, max_samples=4)
    for data, options, message in [
        ((train, color), {}, r"`dataset_test` has images of .* \(3, 8, 8\), but the pipeline is for \(1, 8, 8\).*'L'"),
        ((large, test), {}, r"`dataset_train` has images of .* \(1, 16, 16\).*`resolution`"),
        ((train, torch.utils.data.Subset(test, [0])), {}, "`dataset_test` has too few images, 1"),
        ((train, test), {"max_images": 1}, "`max_images` is 1"),
        ((train, test), {"max_train_images": 0}, "`max_train_images` is 0"),
        ((train, test), {"batch_size": 0}, "`batch_size` is 0"),
        ((train, test), {"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be from 1 to 999"),
        ((train, test), {"num_inversion_steps": 1000}, "`num_inversion_steps` is 1000"),
        ((train, test), {"gap_timesteps": [0, 1000]}, r"`gap_timesteps` is \[0, 1000\].*from 0 to 999"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_pdae(pipe, *data, **options)
    for data, options in [(color, {}), (test, {"num_images": 1}), (test, {"num_inference_steps": 1000})]:
        with pytest.raises(ValueError, match=r"images of|num_images|num_inference_steps"):
            draw_pdae(pipe, data, **options)


def test_failure_leaves_the_pipeline_as_it_was(pipe, train, test):
    pipe.unet.train()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_pdae(pipe, train, test, **FAST)
    handle.remove()
    assert pipe.unet.training and not pipe._progress_bar_config


# ------------------------------------------------------------------------------------------------------------ report


def test_grid_enlarges_pixel_by_pixel():
    images = torch.rand(3, 1, 8, 8)
    grid = image_grid({"first": images, "a longer label": 1 - images}, min_side=30)
    pixels = np.asarray(grid).astype(int)
    assert grid.mode == "RGB" and grid.height == 4 + 2 * (32 + 4)
    left = grid.width - 3 * (32 + 4) - 4 + 4 - 4
    for row, batch in enumerate((images, 1 - images)):
        for column in range(3):
            top, start = 4 + row * 36, left + column * 36
            expected = batch[column, 0].mul(255).round().int().numpy().repeat(4, 0).repeat(4, 1)
            for channel in range(3):
                assert np.array_equal(pixels[top : top + 32, start : start + 32, channel], expected)
    assert (pixels[:, : left - 4] < 128).any(), "no label is written"
    assert image_grid({"large": torch.rand(1, 3, 100, 80)}).height == 108


@pytest.mark.parametrize("rows", [{}, {"a": torch.rand(1, 2, 8, 8)}, {"a": torch.rand(8, 8)}])
def test_grid_refuses_what_is_no_picture(rows):
    with pytest.raises(ValueError, match="`rows` has images of shapes"):
        image_grid(rows)
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\), \(2, 1, 8, 8\)"):
        image_grid({"a": torch.rand(1, 1, 8, 8), "b": torch.rand(2, 1, 8, 8)})


def test_plot_draws_values_where_they_belong():
    # A decade above and one below the level 1e-1: it runs through the middle of the frame, from 30 to 370.
    plot = np.asarray(line_plot([0, 1, 2], {"level": [0.1, 0.1, 0.1], "edge": [0.01, 0.5, 1.0]})).astype(int)
    grey = np.abs(plot - 0x88).sum(2) < 60
    rows = np.flatnonzero(grey[35:365, 100:300].mean(1) > 0.8) + 35
    assert abs(rows.mean() - 200) < 1.5
    blue = (plot[..., 2] > 150) & (plot[..., 0] < 100)
    heights = np.nonzero(blue[:, 80:690])
    assert heights[0][heights[1] < 5].max() > 355 and heights[0][heights[1] > 600].min() < 40


def test_plot_of_values_that_have_no_logarithm():
    assert line_plot([0, 1], {"zero": [0.0, 0.0], "none": [math.inf, math.nan]}).size == (720, 420)
    with pytest.raises(ValueError, match=r"`x` has 2 places and the `curves` \{'a': 3\}"):
        line_plot([0, 1], {"a": [1, 2, 3]})


@pytest.fixture(scope="module")
def measured(train, test) -> dict:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return evaluate_pdae(make_pipe(unet), train, test, **FAST)


@pytest.fixture
def metrics(measured) -> dict:
    return copy.deepcopy(measured)


def test_report_is_written_in_whole(metrics, tmp_path):
    metrics["reconstruction"]["pca"]["psnr"] = math.inf
    files = write_report(tmp_path / "new" / "folder", metrics, {"reconstructions": Image.new("RGB", (4, 4))})
    assert [file.name for file in files] == [
        "reconstructions.png",
        "posterior_gap.png",
        "report.md",
        "card.json",
        "metrics.json",
    ]
    assert sorted(files) == sorted((tmp_path / "new" / "folder").iterdir())

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(files[-1].read_text(), parse_constant=refuse)
    assert read["reconstruction"]["pca"]["psnr"] is None
    assert read["reconstruction"]["pdae_random"] == metrics["reconstruction"]["pdae_random"]
    assert read["protocol"]["ssim_window"] == "7 x 7, uniform, mirrored borders"
    assert "| PCA, 4 components | " in markdown_report(read) and " inf |" in markdown_report(read)
    assert files[2].read_text().startswith(markdown_report(metrics))
    assert json.loads(files[3].read_text())["samples"] == files[0].name


def test_report_that_cannot_be_written_loses_nothing(metrics, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "report.md").mkdir()  # in the way
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(OSError):
        write_report(tmp_path, metrics)
    assert (tmp_path / "metrics.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.json",
        "mine.txt",
        "posterior_gap.png",
        "report.md",
    ]
    with pytest.raises(ValueError, match=r"mine.txt', which is a file"):
        write_report(tmp_path / "mine.txt", metrics)


def test_table_has_every_number(metrics):
    text = markdown_report(metrics)
    for row in metrics["reconstruction"].values():
        assert f"| {row['mse']:.4f} | {row['psnr']:.2f} | {row['ssim']:.4f} |" in text
    for row in metrics["probe"].values():
        assert f"| {row['num_features']} | {row['accuracy']:.4g} |" in text
    for value in ("seed 0", "3 DDIM steps", "2 to infer noise", "7 x 7", "held-out split"):
        assert value.lower() in text.lower()


def test_results_go_into_a_model_card(pipe, metrics, tmp_path):
    metrics["reconstruction"]["pdae_inferred"]["psnr"] = math.inf  # a card cannot say that
    pipe.save_pretrained(tmp_path / "repo", card={"metrics": eval_results(metrics, "digits", "mnist-like")})
    results = ModelCard.load(tmp_path / "repo" / "README.md").data.eval_results
    found = {result.metric_name: result.metric_value for result in results}
    assert found["MSE, PDAE, own code, same random noise"] == pytest.approx(
        metrics["reconstruction"]["pdae_random"]["mse"], rel=1e-3
    )
    assert found["linear probe of the code, accuracy"] == metrics["probe"]["code"]["accuracy"]
    assert len(found) == 5 * 3 - 1 + 1 and not any("PCA" in name for name in found)
    assert {(result.dataset_name, result.dataset_type, result.dataset_split) for result in results} == {
        ("digits", "mnist-like", "validation")
    }


# ----------------------------------------------------------------------------------------------------------- command


def test_command(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "repo")
    words = ["evaluate", str(tmp_path / "repo"), "--dataset_name", "digits", "--max_images", "8", "--seed", "3"]
    words += ["--max-train-images", "60", "--num-inference-steps", "2", "--num-inversion-steps", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--num_pictures", "3"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert markdown_report(metrics) in printed and "metrics.json" in printed and "replacing" not in printed
    expected = evaluate_pdae(
        PDAEPipeline.from_pretrained(tmp_path / "repo"),
        load_image_dataset("digits", seed=3, max_samples=60),
        load_image_dataset("digits", split="validation", seed=3, max_samples=8),
        num_inference_steps=2,
        num_inversion_steps=2,
        seed=3,
    )
    del metrics["protocol"]["repo"]
    assert metrics == expected
    assert Image.open(tmp_path / "out" / "interpolation.png").size[0] > 3 * 64

    assert main(["card", str(tmp_path / "repo"), "--card", str(tmp_path / "out" / "card.json")]) == 0
    assert ModelCard.load(tmp_path / "repo" / "README.md").data.eval_results[0].dataset_name == "digits"
    assert (tmp_path / "repo" / "reconstructions.png").is_file()


def test_command_says_that_it_replaces_a_report(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "repo")
    (tmp_path / "out").mkdir()
    for name in ("metrics.json", "report.md", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    words = ["--max_images", "4", "--max_train_images", "20", "--num_inference_steps", "2", "--num_inversion_steps"]
    words += ["0", "--num_pictures", "2", "--device", "cpu", "--dataset-name", "digits"]
    assert main(["evaluate", str(tmp_path / "repo"), "--output-dir", str(tmp_path / "out"), *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("replacing")]
    assert lines == [f"replacing metrics.json, report.md and pictures of an earlier evaluation in {tmp_path / 'out'}"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "old"
    assert "reconstruction" in json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("device", ["cuda", "no-such-device"])
def test_command_names_a_device_that_is_not_there(device, pipe, tmp_path, capsys):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    pipe.save_pretrained(tmp_path / "repo")
    assert main(["evaluate", str(tmp_path / "repo"), "--dataset_name", "digits", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: `--device {device}` cannot be used here") and error.count("\n") == 1
    assert "pass `cpu`" in error


@pytest.mark.parametrize("repo", ["nope", "here/nope", "./nope", "/nope", "no/where/at/all"])
def test_command_does_not_ask_the_hub_for_what_looks_like_a_folder(repo, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", repo, "--dataset_name", "digits"]) == 2
    assert f"error: there is no folder `{repo}`" in capsys.readouterr().err
    assert main(["evaluate", "somebody/else", "--dataset_name", "digits"]) == 2  # may be a repo
    assert "there is no folder" not in capsys.readouterr().err


def test_command_names_what_it_cannot_measure(tiny_ddpm: DDPMPipeline, pipe, tmp_path: Path, capsys):
    tiny_ddpm.save_pretrained(tmp_path / "ddpm")
    assert main(["evaluate", str(tmp_path / "ddpm"), "--dataset_name", "digits"]) == 2
    assert "holds a DDPMPipeline, but `evaluate` measures a PDAEPipeline" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nowhere"), "--dataset_name", "digits"]) == 2
    assert "nowhere" in capsys.readouterr().err
    pipe.save_pretrained(tmp_path / "repo")
    assert main(["evaluate", str(tmp_path / "repo")]) == 2
    assert "`dataset_name`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reconstruction", "representation", "pdae", "report"])
def test_doctests(name, pipe, metrics, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some examples write files
    module = importlib.import_module(f"diffusers_ext.evaluation.{name}")
    result = doctest.testmod(module, extraglobs={"pipe": pipe, "metrics": metrics})
    assert result.failed == 0 and result.attempted > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_on_a_gpu_are_those_of_the_cpu(pipe, train, test, dtype):
    expected = evaluate_pdae(pipe, train, test, **FAST)
    metrics = evaluate_pdae(pipe.to("cuda", dtype), train, test, **FAST)
    assert metrics["protocol"]["device"] == torch.cuda.get_device_name()
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for name, row in expected["reconstruction"].items():
        assert metrics["reconstruction"][name]["mse"] == pytest.approx(row["mse"], rel=tolerance)
