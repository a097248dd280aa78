"""PDAE measured against its base model, and its code against simple baselines.

A code is worth what it adds: every reconstruction from random noise starts from the same noise as the base model's
own sample, and every use of a code is repeated with another image's code, which must not help.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from sklearn.decomposition import PCA
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Dataset, Subset

from diffusers_ext.evaluation.reconstruction import reconstruction_metrics, ssim_window
from diffusers_ext.evaluation.report import image_grid
from diffusers_ext.evaluation.representation import linear_probe
from diffusers_ext.pipelines.pdae import PDAEPipeline

_PROBE_SIDE = 32  # larger images are averaged to this side for the probe of pixels


def evaluate_pdae(
    pipe: PDAEPipeline,
    dataset_train: Dataset,
    dataset_test: Dataset,
    *,
    batch_size: int = 64,
    num_inference_steps: int = 50,
    num_inversion_steps: int | None = 50,
    max_images: int | None = None,
    max_train_images: int | None = 2048,
    gap_timesteps: list[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    r"""
    Measures a PDAE on images that it was not trained on.

    1. **Reconstruction** by DDIM: the base model and PDAE from the same random noise, with the image's own code and
       with another one's; both from inferred noise; beside them the mean training image and a PCA of the code's size.
    2. **Posterior mean gap** over the timesteps, without a code, with the own and with another image's, at the same
       noises (see [`PDAEPipeline.posterior_gap`]).
    3. **Linear probe**, where both data sets have labels: codes against pixels (averaged to at most 32 x 32), the PCA
       of the same size, and an encoder of the same architecture that was never trained.

    The noise of test image `i` is drawn from `seed + i`, so no number depends on `batch_size` beyond rounding. Another
    image is the next one on a random cycle through all of them. Random states, the mode of the models and the settings
    of the progress bar are left as they were.

    Args:
        pipe ([`PDAEPipeline`]): What is measured, on any device and in any dtype.
        dataset_train, dataset_test (`torch.utils.data.Dataset`):
            Items as those of [`~diffusers_ext.data.ImageDataset`]: `images` in [-1, 1] of shape
            `(channels, height, width)` and, where there are any, integer `labels`. The first fits the baselines and
            the probes.
        batch_size (`int`, *optional*, defaults to 64): Images per call of the networks.
        num_inference_steps (`int`, *optional*, defaults to 50): Number of decoding moves.
        num_inversion_steps (`int`, *optional*, defaults to 50):
            Number of moves to infer noise; `None` leaves the rows with inferred noise out.
        max_images (`int`, *optional*): Measure that many images of `dataset_test`, evenly spaced; all by default.
        max_train_images (`int`, *optional*, defaults to 2048): The same for `dataset_train`; they are held in memory.
        gap_timesteps (`list[int]`, *optional*): Where to measure the gap; 21 evenly spaced timesteps by default.
        seed (`int`, *optional*, defaults to 0): Seed of all that is drawn.

    Returns:
        `dict[str, Any]`: Numbers, strings, lists and dictionaries, as JSON has them:

        - `protocol`: data, number of images, seed, steps, definitions of the metrics, versions;
        - `reconstruction`: `mse`, `psnr` (dB) and `ssim`, means over the images, for `base_random`, `pdae_random`,
          `pdae_random_wrong_code`, `base_inferred`, `pdae_inferred`, `mean_image` and `pca`;
        - `posterior_gap`: lists `timesteps`, `no_code`, `own_code`, `wrong_code`;
        - `probe`: `num_features` and `accuracy` of `code`, `pixels`, `pca`, `untrained_encoder`; or `None`;
        - `notes`: what was left out, and why.

    Raises:
        ValueError: For numbers out of range, fewer than two images, images that do not fit the pipeline, and missing
            labels where the U-Net is class-conditional; all before a model runs.

    Example:

    ```py
    >>> from diffusers_ext.data import load_image_dataset
    >>> from diffusers_ext.evaluation.pdae import evaluate_pdae

    >>> train, test = (load_image_dataset("digits", split=split) for split in ("train", "validation"))
    >>> metrics = evaluate_pdae(pipe, train, test, num_inference_steps=2, num_inversion_steps=2, max_images=8)
    >>> sorted(metrics["reconstruction"]["pdae_random"])
    ['mse', 'psnr', 'ssim']

    ```
    """
    # 1. Check inputs
    _check_numbers(pipe, batch_size, num_inference_steps, num_inversion_steps)
    for name, value in (("max_images", max_images), ("max_train_images", max_train_images)):
        if value is not None and value < 2:
            raise ValueError(f"`{name}` is {value}, but must be at least 2: a code is compared with another image's.")
    num_timesteps = pipe.scheduler.config.num_train_timesteps
    if gap_timesteps is None:
        gap_timesteps = sorted({int(timestep) for timestep in np.linspace(0, num_timesteps - 1, 21)})
    if len(gap_timesteps) == 0 or not all(0 <= timestep < num_timesteps for timestep in gap_timesteps):
        raise ValueError(f"`gap_timesteps` is {gap_timesteps}, but must hold timesteps from 0 to {num_timesteps - 1}.")
    items = [_first_item(pipe, dataset_train, "dataset_train"), _first_item(pipe, dataset_test, "dataset_test")]
    has_labels = all("labels" in item for item in items)
    shape = tuple(items[1]["images"].shape)
    ssim_side, ssim_is_gaussian = ssim_window(*shape[1:])
    train, test = _evenly_spaced(dataset_train, max_train_images), _evenly_spaced(dataset_test, max_images)
    notes = [] if has_labels else ["no linear probe: both data sets need labels"]

    with _measuring(pipe, seed) as progress:
        # 2. Features: the code, and those of the baselines
        # not by `from_config`, which takes what was given by position for a default value
        config = {name: value for name, value in pipe.encoder.config.items() if not name.startswith("_")}
        untrained = type(pipe.encoder)(**config).to(pipe.encoder.device).eval()

        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            side = [min(length, _PROBE_SIDE) for length in images.shape[-2:]]
            values = {
                "code": pipe.encode(images),
                "pixels": adaptive_avg_pool2d(images, side).flatten(1),
                "untrained_encoder": untrained((2 * images - 1).to(untrained.device)),
            }
            return {name: value.float().cpu() for name, value in values.items()}

        pixels, parts, labels = [], [], []
        with progress(len(train), "Encoding training images") as bar:
            for _, images, batch_labels in _batches(train, batch_size):
                pixels.append(images.flatten(1))
                parts.append(features(images))
                labels.append(batch_labels)
                bar.update(len(images))
        pixels = torch.cat(pixels).numpy()
        train_features = _concatenate(parts)
        train_labels = torch.cat(labels) if has_labels else None

        latent_dim = train_features["code"].shape[1]
        pca = PCA(min(latent_dim, *pixels.shape), random_state=seed).fit(pixels)
        train_features["pca"] = torch.from_numpy(pca.transform(pixels))
        mean_image = torch.from_numpy(pixels.mean(0)).reshape(1, *shape)
        if pca.n_components_ < latent_dim:
            notes.append(
                f"the PCA has {pca.n_components_} components, not {latent_dim}: it was fitted to {len(train)} images "
                f"of {pixels.shape[1]} numbers each"
            )
        del pixels

        scores: dict[str, list[dict[str, torch.Tensor]]] = {}
        parts, labels = [], []
        with progress(len(test), "Encoding test images") as bar:
            for _, images, batch_labels in _batches(test, batch_size):
                components = pca.transform(images.flatten(1).numpy())
                restored = torch.from_numpy(pca.inverse_transform(components)).reshape(images.shape).clamp(0, 1)
                scores.setdefault("pca", []).append(reconstruction_metrics(images, restored))
                mean_images = mean_image.expand_as(images).clamp(0, 1)
                scores.setdefault("mean_image", []).append(reconstruction_metrics(images, mean_images))
                parts.append({**features(images), "pca": torch.from_numpy(components)})
                labels.append(batch_labels)
                bar.update(len(images))
        test_features = _concatenate(parts)
        test_labels = torch.cat(labels) if has_labels else None

        codes = test_features["code"]
        cycle = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        wrong_codes = torch.empty_like(codes)
        wrong_codes[cycle] = codes[cycle.roll(1)]

        # 3. Reconstruction
        rows = [("base_random", codes), ("pdae_random", codes), ("pdae_random_wrong_code", wrong_codes)]
        if num_inversion_steps is not None:
            rows += [("base_inferred", codes), ("pdae_inferred", codes)]
        with progress(len(rows) * len(test), "Reconstructing") as bar:
            for start, images, batch_labels in _batches(test, batch_size):
                for name, row_codes in rows:
                    reconstructions = _reconstruct(
                        pipe,
                        images,
                        row_codes[start : start + len(images)],
                        batch_labels,
                        shift_scale=0.0 if name.startswith("base") else 1.0,
                        num_inference_steps=num_inference_steps,
                        num_inversion_steps=num_inversion_steps if name.endswith("inferred") else None,
                        generator=_generators(seed + start, len(images)),
                    )
                    scores.setdefault(name, []).append(reconstruction_metrics(images, reconstructions))
                    bar.update(len(images))

        # 4. Posterior mean gap
        gap = torch.zeros(3, len(gap_timesteps), dtype=torch.float64)
        with progress(2 * len(test), "Measuring the gap") as bar:
            for start, images, batch_labels in _batches(test, batch_size):
                for row, row_codes in ((1, codes), (2, wrong_codes)):
                    output = pipe.posterior_gap(
                        images,
                        gap_timesteps,
                        latent_code=row_codes[start : start + len(images)],
                        class_labels=_class_labels(pipe, batch_labels),
                        generator=_generators(seed + start, len(images)),
                    )
                    gap[row] += output.shifted.double() * len(images)
                    if row == 1:
                        gap[0] += output.base.double() * len(images)
                    bar.update(len(images))
        gap /= len(test)

        # 5. Linear probe
        probe = None
        if has_labels:
            names = ("code", "pixels", "pca", "untrained_encoder")
            try:
                with progress(len(names), "Probing", unit="probe") as bar:
                    probe = {}
                    for name in names:
                        result = linear_probe(train_features[name], train_labels, test_features[name], test_labels)
                        probe[name] = {"num_features": train_features[name].shape[1], **result}
                        bar.update()
            except ValueError as error:  # labels that cannot be told apart; all that was measured stays
                probe = None
                notes.append(f"no linear probe: {error}")

    device = pipe._execution_device
    return {
        "protocol": {
            "method": "PDAE",
            "test_data": getattr(dataset_test, "description", ""),
            "train_data": getattr(dataset_train, "description", ""),
            "num_images": len(test),
            "num_train_images": len(train),
            "image_shape": list(shape),
            "latent_dim": latent_dim,
            "pca_components": int(pca.n_components_),
            "seed": seed,
            "sampler": "ddim",
            "num_inference_steps": num_inference_steps,
            "num_inversion_steps": num_inversion_steps,
            "batch_size": batch_size,
            "metrics": "values in [0, 1], one number per image, mean over the images",
            "psnr": "10 log10(1 / MSE) in dB",
            "ssim_window": f"{ssim_side} x {ssim_side}, "
            f"{'Gaussian with sigma 1.5' if ssim_is_gaussian else 'uniform'}, mirrored borders",
            "posterior_gap": "mean squared distance of the means of the reverse step, values in [-1, 1]",
            "probe": "logistic regression on standardized features, L2 penalty with C = 1",
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "diffusers", "torchmetrics", "scikit-learn")},
            },
        },
        "reconstruction": {
            name: {metric: values.mean().item() for metric, values in _concatenate(scores[name]).items()}
            for name in (*(name for name, _ in rows), "mean_image", "pca")
        },
        "posterior_gap": {
            "timesteps": [int(timestep) for timestep in gap_timesteps],
            **dict(zip(("no_code", "own_code", "wrong_code"), gap.tolist(), strict=True)),
        },
        "probe": probe,
        "notes": notes,
    }


def draw_pdae(
    pipe: PDAEPipeline,
    dataset: Dataset,
    *,
    num_images: int = 8,
    num_inference_steps: int = 50,
    num_inversion_steps: int | None = 50,
    seed: int = 0,
) -> dict[str, Image.Image]:
    r"""
    Pictures of what [`evaluate_pdae`] measures, for the first images of a data set.

    Args:
        pipe ([`PDAEPipeline`]): What is shown.
        dataset (`torch.utils.data.Dataset`): As `dataset_test` of [`evaluate_pdae`].
        num_images (`int`, *optional*, defaults to 8): Number of columns; at least 2.
        num_inference_steps (`int`, *optional*, defaults to 50): Number of decoding moves.
        num_inversion_steps (`int`, *optional*, defaults to 50):
            Number of moves to infer noise; `None` leaves the row with inferred noise out.
        seed (`int`, *optional*, defaults to 0): The noise of image `i` is drawn from `seed + i`.

    Returns:
        `dict[str, PIL.Image.Image]`: `reconstructions`, a grid with the rows input, PDAE from random noise, PDAE from
        inferred noise, base model from the same random noise; `interpolation`, the ways of
        [`PDAEPipeline.interpolate`] from the first image to the next one with another label.

    Raises:
        ValueError: As in [`evaluate_pdae`].

    Example:

    ```py
    >>> from diffusers_ext.data import load_image_dataset
    >>> from diffusers_ext.evaluation.pdae import draw_pdae

    >>> test = load_image_dataset("digits", split="validation")
    >>> list(draw_pdae(pipe, test, num_images=2, num_inference_steps=2, num_inversion_steps=2))
    ['reconstructions', 'interpolation']

    ```
    """
    _check_numbers(pipe, 1, num_inference_steps, num_inversion_steps)
    _first_item(pipe, dataset, "dataset")
    if num_images < 2:
        raise ValueError(f"`num_images` is {num_images}, but must be at least 2.")
    test = Subset(dataset, range(min(num_images, len(dataset))))

    # label -> inversion steps, strength of the shift
    rows = {
        "PDAE, random noise": (None, 1.0),
        "PDAE, inferred noise": (num_inversion_steps, 1.0),
        "base model, same random noise": (None, 0.0),
    }
    if num_inversion_steps is None:
        del rows["PDAE, inferred noise"]
    with _measuring(pipe, seed) as progress:
        _, images, labels = next(_batches(test, len(test)))
        other = 1 if labels is None else next((i for i in range(1, len(images)) if labels[i] != labels[0]), 1)
        num_columns = len(images)
        with progress(len(rows) * num_columns + 2 * num_columns, "Drawing") as bar:
            codes = pipe.encode(images)
            grid = {"input": images}
            for label, (inversion_steps, shift_scale) in rows.items():
                grid[label] = _reconstruct(
                    pipe,
                    images,
                    codes,
                    labels,
                    shift_scale=shift_scale,
                    num_inference_steps=num_inference_steps,
                    num_inversion_steps=inversion_steps,
                    generator=_generators(seed, num_columns),
                )
                bar.update(num_columns)
            path = {}
            path_labels = None if labels is None else labels[[0] * (num_columns // 2) + [other] * -(-num_columns // 2)]
            for label, mode in (("interpolated codes", "latent"), ("interpolated gradients", "trajectory")):
                path[label] = pipe.interpolate(
                    images[0],
                    images[other],
                    num=num_columns,
                    mode=mode,
                    num_inference_steps=num_inference_steps,
                    num_inversion_steps=num_inversion_steps,
                    class_labels=_class_labels(pipe, path_labels),
                    generator=torch.Generator().manual_seed(seed),
                    output_type="pt",
                ).images
                bar.update(num_columns)
    return {"reconstructions": image_grid(grid), "interpolation": image_grid(path)}


def _check_numbers(
    pipe: PDAEPipeline, batch_size: int, num_inference_steps: int, num_inversion_steps: int | None
) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
    limit = pipe.scheduler.config.num_train_timesteps - 1
    for name, value in (("num_inference_steps", num_inference_steps), ("num_inversion_steps", num_inversion_steps)):
        if value is not None and not 1 <= value <= limit:
            raise ValueError(f"`{name}` is {value}, but must be from 1 to {limit}.")


def _first_item(pipe: PDAEPipeline, dataset: Dataset, name: str) -> dict[str, Any]:
    if len(dataset) < 2:
        raise ValueError(f"`{name}` has too few images, {len(dataset)}: at least 2 are needed.")
    with torch.random.fork_rng(devices=[]):  # it may be cropped at random
        item = dataset[0]
    size = pipe.encoder.config.sample_size
    expected = (pipe.encoder.config.in_channels, *((size, size) if isinstance(size, int) else size))
    if tuple(item["images"].shape) != expected:
        raise ValueError(
            f"`{name}` has images of (channels, height, width) {tuple(item['images'].shape)}, but the pipeline is for "
            f"{expected}: load them with another `image_mode` ('L' has 1 channel, 'RGB' has 3) or `resolution`."
        )
    if pipe.unet.class_embedding is not None and "labels" not in item:
        raise ValueError(f"`{name}` has no labels, but the pipeline's `unet` is class-conditional and needs them.")
    return item


@contextlib.contextmanager
def _measuring(pipe: PDAEPipeline, seed: int) -> Iterator[Callable[..., Any]]:
    """Models in evaluation mode, seeded, no gradients, no bars but those that are made by the function it gives."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    modes = [(module, module.training) for model in models for module in model.modules()]
    settings = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)  # its own, one for each call
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            yield lambda total, desc, unit="image": logging.tqdm(
                **{"unit": unit, **settings, "total": total, "desc": desc}
            )
    finally:
        for module, training in modes:
            module.training = training
        pipe.set_progress_bar_config(**settings)


def _evenly_spaced(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, limit).astype(int).tolist())


def _batches(dataset: Dataset, batch_size: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Place of the first image, images in [0, 1], labels."""
    start = 0
    for batch in DataLoader(dataset, batch_size):
        images = batch["images"].float() / 2 + 0.5
        yield start, images, batch.get("labels")
        start += len(images)


def _concatenate(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def _class_labels(pipe: PDAEPipeline, labels: torch.Tensor | None) -> torch.Tensor | None:
    return None if pipe.unet.class_embedding is None else labels


def _reconstruct(
    pipe: PDAEPipeline,
    images: torch.Tensor,
    latent_code: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    shift_scale: float,
    num_inference_steps: int,
    num_inversion_steps: int | None,
    generator: list[torch.Generator],
) -> torch.Tensor:
    """Images decoded from random noise or, with `num_inversion_steps`, from noise inferred with the same shift."""
    class_labels = _class_labels(pipe, labels)
    if num_inversion_steps is None:
        noise = randn_tensor(images.shape, generator=generator)
    else:
        noise = pipe.invert(images, latent_code if shift_scale else None, num_inversion_steps, class_labels)
    return pipe.decode(
        latent_code,
        noise,
        num_inference_steps,
        shift_scale=shift_scale,
        class_labels=class_labels,
        output_type="pt",
    ).images.cpu()
