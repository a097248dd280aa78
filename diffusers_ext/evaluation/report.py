"""What was measured, for people: metrics.json, a Markdown table, pictures, the results of a model card."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# What the names in the metrics mean, in tables, cards and pictures.
_ROWS = {
    "base_random": "base model, random noise",
    "pdae_random": "PDAE, own code, same random noise",
    "pdae_random_wrong_code": "PDAE, another image's code, same random noise",
    "base_inferred": "base model, inferred noise (DDIM inversion)",
    "pdae_inferred": "PDAE, own code, inferred noise",
    "mean_image": "mean training image",
}
_FEATURES = {
    "code": "PDAE code",
    "pixels": "pixels",
    "pca": "PCA of the pixels",
    "untrained_encoder": "code of an untrained encoder",
}
_CURVES = {"no_code": "no code (base model)", "own_code": "own code", "wrong_code": "another image's code"}
_COLORS = ("#888888", "#0066cc", "#dd5500", "#008844", "#aa22aa")


def image_grid(rows: Mapping[str, torch.Tensor], min_side: int = 64) -> Image.Image:
    """
    Rows of images with their labels on the left. Small images are enlarged pixel by pixel, by a whole factor.

    Args:
        rows (`Mapping[str, torch.Tensor]`):
            Label -> images with values in [0, 1], shape `(count, channels, height, width)` with 1 or 3 channels; the
            same shape in every row.
        min_side (`int`, *optional*, defaults to 64): An image's longer side has at least so many pixels.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ValueError: For no rows, rows of different shapes, and images that are neither grey nor RGB.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.report import image_grid

    >>> image_grid({"input": torch.zeros(4, 1, 8, 8), "output": torch.ones(4, 1, 8, 8)}).mode
    'RGB'

    ```
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or next(iter(shapes))[1] not in (1, 3):
        raise ValueError(
            f"`rows` has images of shapes {sorted(shapes)}, but all must have the same (count, channels, height, "
            "width) with 1 or 3 channels."
        )
    count, _, height, width = next(iter(shapes))
    factor = -(-min_side // max(height, width))
    height, width, gap = factor * height, factor * width, 4
    font = ImageFont.load_default(13)
    margin = 2 * gap + max(math.ceil(font.getlength(label)) for label in rows)
    canvas = Image.new(
        "RGB", (margin + count * (width + gap) + gap, len(rows) * (max(height, 18) + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(canvas)
    top = gap
    for label, images in rows.items():
        draw.text((gap, top + height // 2), label, "black", font, anchor="lm")
        pixels = images.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
        pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for column, image in enumerate(pixels):
            enlarged = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + column * (width + gap), top))
        top += max(height, 18) + gap
    return canvas


def line_plot(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str = "", y_label: str = ""
) -> Image.Image:
    """
    Curves over a common axis, in logarithmic scale; points that are not above 0 are left out.

    Args:
        x (`Sequence[float]`): Places, ascending.
        curves (`Mapping[str, Sequence[float]]`): Label -> one value for each place.
        x_label, y_label (`str`, *optional*): What the axes show.

    Returns:
        `PIL.Image.Image`: RGB, 720 x 420.

    Raises:
        ValueError: For fewer than two places, or a curve of another length.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.report import line_plot

    >>> line_plot([0, 500, 999], {"own code": [1e-4, 2e-3, 1e-5]}, "timestep", "gap").size
    (720, 420)

    ```
    """
    if len(x) < 2 or any(len(values) != len(x) for values in curves.values()):
        lengths = {label: len(values) for label, values in curves.items()}
        raise ValueError(f"`x` has {len(x)} places and the `curves` {lengths}: at least 2, and the same for all.")
    points = {
        label: [(a, math.log10(b)) for a, b in zip(x, values, strict=True) if 0 < b < math.inf]
        for label, values in curves.items()
    }
    logs = [b for curve in points.values() for _, b in curve] or [0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    scale = 2  # drawn at twice the size: ImageDraw's lines have no smooth edges
    left, right, top, bottom = (scale * value for value in (70, 700, 30, 370))
    canvas = Image.new("RGB", (scale * 720, scale * 420), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13 * scale)

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            left + (a - x[0]) / (x[-1] - x[0]) * (right - left),
            bottom - (b - low) / (high - low) * (bottom - top),
        )

    for power in range(low, high + 1, -(-(high - low) // 8)):
        _, y = place(x[0], power)
        draw.line([(left, y), (right, y)], "#dddddd", scale)
        draw.text((left - 6 * scale, y), f"1e{power}", "black", font, anchor="rm")
    for tick in np.linspace(x[0], x[-1], 6):
        draw.text((place(tick, low)[0], bottom + 6 * scale), f"{tick:.0f}", "black", font, anchor="mt")
    draw.rectangle([left, top, right, bottom], outline="black", width=scale)
    draw.text(((left + right) / 2, bottom + 26 * scale), x_label, "black", font, anchor="mt")
    draw.text((left, top - 12 * scale), y_label, "black", font, anchor="lm")
    legend = right
    for index, (label, curve) in reversed(list(enumerate(points.items()))):
        color = _COLORS[index % len(_COLORS)]
        if curve:
            draw.line([place(*point) for point in curve], color, 2 * scale, joint="curve")
        draw.text((legend, top - 12 * scale), label, "black", font, anchor="rm")
        legend -= font.getlength(label) + 6 * scale
        draw.line([(legend - 24 * scale, top - 12 * scale), (legend, top - 12 * scale)], color, 2 * scale)
        legend -= 40 * scale
    return canvas.resize((720, 420), Image.Resampling.LANCZOS)


def markdown_report(metrics: Mapping[str, Any]) -> str:
    """
    Tables of what [`~diffusers_ext.evaluation.pdae.evaluate_pdae`] has measured, and the protocol in words.

    Args:
        metrics (`Mapping[str, Any]`): Its result, or what metrics.json holds.

    Returns:
        `str`: Markdown.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.report import markdown_report

    >>> print(markdown_report(metrics).splitlines()[0])
    | reconstruction | MSE | PSNR (dB) | SSIM |

    ```
    """
    protocol, gap = metrics["protocol"], metrics["posterior_gap"]
    lines = ["| reconstruction | MSE | PSNR (dB) | SSIM |", "|---|---|---|---|"]
    for name, row in metrics["reconstruction"].items():
        psnr = "inf" if row["psnr"] is None or math.isinf(row["psnr"]) else f"{row['psnr']:.2f}"
        title = f"PCA, {protocol['pca_components']} components" if name == "pca" else _ROWS[name]
        lines.append(f"| {title} | {_number(row['mse'])} | {psnr} | {row['ssim']:.4f} |")
    lines += ["", "| posterior mean gap at timestep | " + " | ".join(_CURVES.values()) + " |", "|---|---|---|---|"]
    for place in sorted({round(place) for place in np.linspace(0, len(gap["timesteps"]) - 1, 6)}):
        values = " | ".join(_number(gap[name][place]) for name in _CURVES)
        lines.append(f"| {gap['timesteps'][place]} | {values} |")
    if metrics["probe"] is not None:
        scores = [name for name in metrics["probe"]["code"] if name != "num_features"]
        titles = " | ".join(name.replace("_", " ") for name in scores)
        lines += ["", f"| linear probe | numbers | {titles} |", "|---|---|" + "---|" * len(scores)]
        for name, row in metrics["probe"].items():
            values = " | ".join(f"{row[score]:.4g}" for score in scores)
            lines.append(f"| {_FEATURES[name]} | {row['num_features']} | {values} |")
    inversion = protocol["num_inversion_steps"]
    lines += [
        "",
        f"Measured on {protocol['num_images']} images of: {protocol['test_data'] or 'unnamed data'}. Baselines and "
        f"probes fitted to {protocol['num_train_images']} images of: {protocol['train_data'] or 'unnamed data'}.",
        f"Seed {protocol['seed']}; {protocol['num_inference_steps']} DDIM steps, "
        f"{'no inferred noise' if inversion is None else f'{inversion} to infer noise'}; "
        f"{protocol['metrics']}; SSIM over windows of {protocol['ssim_window']}; {protocol['dtype']} on "
        f"{protocol['device']}.",
        *(f"Note: {note}." for note in metrics["notes"]),
    ]
    return "\n".join(lines) + "\n"


def eval_results(
    metrics: Mapping[str, Any],
    dataset_name: str | None = None,
    dataset_type: str | None = None,
    dataset_split: str = "validation",
) -> list[dict[str, Any]]:
    """
    What a model card reports: the reconstructions by PDAE and the base model, and the probe of the code.

    Args:
        metrics (`Mapping[str, Any]`):
            Result of [`~diffusers_ext.evaluation.pdae.evaluate_pdae`], or what metrics.json holds.
        dataset_name (`str`, *optional*): What the card calls the data; by default their description.
        dataset_type (`str`, *optional*): Its id on the Hub; `dataset_name` by default.
        dataset_split (`str`, *optional*, defaults to `"validation"`): Split of the test images.

    Returns:
        `list[dict[str, Any]]`: Keyword arguments of [`~huggingface_hub.EvalResult`], as
        [`~diffusers_ext.hub.HubMixin.save_model_card`] takes them for `metrics`. Infinite values are left out.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.report import eval_results

    >>> results = eval_results(metrics, "digits")
    >>> results[0]["metric_name"]
    'MSE, base model, random noise'
    >>> pipe.save_pretrained("pdae-digits", card={"metrics": results})

    ```
    """
    protocol = metrics["protocol"]
    dataset_name = dataset_name or protocol["test_data"] or "unnamed"
    dataset = {
        "dataset_name": dataset_name,
        "dataset_type": dataset_type or dataset_name,
        "dataset_split": dataset_split,
    }
    results = []
    for name, row in metrics["reconstruction"].items():
        if name in ("mean_image", "pca"):
            continue
        for metric, value in row.items():
            if value is not None and math.isfinite(value):
                title = {"mse": "MSE", "psnr": "PSNR (dB)", "ssim": "SSIM"}[metric]
                results.append(
                    {
                        "task_type": "image-to-image",
                        **dataset,
                        "metric_type": metric,
                        "metric_name": f"{title}, {_ROWS[name]}",
                        "metric_value": float(f"{value:.4g}"),
                    }
                )
    for name, value in (metrics["probe"] or {"code": {}})["code"].items():
        if name in ("accuracy", "auroc", "average_precision"):
            results.append(
                {
                    "task_type": "image-classification",
                    **dataset,
                    "metric_type": name,
                    "metric_name": f"linear probe of the code, {name.replace('_', ' ')}",
                    "metric_value": float(f"{value:.4g}"),
                }
            )
    return results


def write_report(
    output_dir: str | os.PathLike,
    metrics: Mapping[str, Any],
    pictures: Mapping[str, Image.Image] | None = None,
    dataset_name: str | None = None,
) -> list[Path]:
    """
    Writes pictures (`<name>.png`), the curve of the gap (`posterior_gap.png`), `report.md`, `card.json` for
    `diffusers-ext card FOLDER --card card.json` and, last, `metrics.json`.

    Every file is written in whole or not at all; other files in the folder stay.

    Args:
        output_dir (`str` or `os.PathLike`): The folder; it is made where it does not exist.
        metrics (`Mapping[str, Any]`):
            Result of [`~diffusers_ext.evaluation.pdae.evaluate_pdae`]. Infinite numbers become `null`.
        pictures (`Mapping[str, PIL.Image.Image]`, *optional*):
            Name -> picture, from [`~diffusers_ext.evaluation.pdae.draw_pdae`]; `reconstructions` is for the card.
        dataset_name (`str`, *optional*): What the card calls the data, see [`eval_results`].

    Returns:
        `list[pathlib.Path]`: The files.

    Raises:
        ValueError: If `output_dir` is a file.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.report import write_report

    >>> [file.name for file in write_report("evaluation", metrics)]
    ['posterior_gap.png', 'report.md', 'card.json', 'metrics.json']

    ```
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {str(folder)!r}, which is a file: give the name of a folder.")
    folder.mkdir(parents=True, exist_ok=True)

    gap = metrics["posterior_gap"]
    pictures = dict(pictures or {})
    if len(gap["timesteps"]) > 1:
        order = np.argsort(gap["timesteps"], kind="stable")
        timesteps = [gap["timesteps"][place] for place in order]
        curves = {label: [gap[name][place] for place in order] for name, label in _CURVES.items()}
        pictures["posterior_gap"] = line_plot(timesteps, curves, "timestep", "posterior mean gap")

    contents = {}
    for name, picture in pictures.items():
        buffer = BytesIO()
        picture.save(buffer, format="png")
        contents[f"{name}.png"] = buffer.getvalue()
    shown = "".join(f"\n![{name.replace('_', ' ')}]({name}.png)\n" for name in pictures)
    contents["report.md"] = (markdown_report(metrics) + shown).encode()
    card: dict[str, Any] = {"metrics": eval_results(metrics, dataset_name)}
    if "reconstructions" in pictures:
        card["samples"] = "reconstructions.png"  # from the folder of card.json
    contents["card.json"] = (json.dumps(card, indent=2) + "\n").encode()
    contents["metrics.json"] = (json.dumps(_finite(metrics), indent=2, allow_nan=False) + "\n").encode()

    for name, content in contents.items():
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return [folder / name for name in contents]


def _finite(value: Any) -> Any:
    """JSON has no infinity (the PSNR of a perfect reconstruction)."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2e}"
