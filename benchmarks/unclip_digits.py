"""unCLIP on captioned digits: are predicted embeddings like true ones, and do pictures show what the text asks for?

```bash
python benchmarks/unclip_digits.py                        # trains CLIP, prior and decoder first: about eight minutes
python benchmarks/unclip_digits.py --folder demo-unclip   # measures what `diffusers-ext demo-unclip` has trained
```

Embeddings are predicted for the captions of 1000 held-out images, which mention only some of what is to be seen:

* Frechet distance, between predictions and true embeddings scaled to length 1; a linear regression from text to image
  embeddings for comparison;
* class accuracy of the predictions whose caption names a digit: zero-shot, by CLIP's own texts, and by a logistic
  regression that was fitted to true embeddings of training images;
* cosine to the text, which should be that of true images, neither less nor more;
* share of large ones: of predictions for "a {color} {digit}", which leaves the size open, by a logistic regression;
  over all 80 such texts, and the share of the texts for which it lies between 30 and 70 %.

Pictures are painted for "a {color} {digit}" and judged by classifiers that saw neither CLIP nor decoder: a support
vector machine for digits, fitted to the training images without their colors, and the nearest mean color. Captions,
draws of the prior and of the decoder are new for each seed; the models are those of the folder.

The rows are printed and written to `unclip_digits.csv` beside this file.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.logging import set_verbosity_error
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch.nn.functional import cosine_similarity, interpolate, normalize

from diffusers_ext.demo_unclip import train
from diffusers_ext.evaluation.embeddings import frechet_distance, linear_regression, zero_shot_accuracy
from diffusers_ext.pipelines.unclip import UnCLIPTextToImagePipeline
from diffusers_ext.pipelines.unclip_prior import UnCLIPPriorPipeline
from diffusers_ext.training.train_toy_clip import COLORS, DIGITS, caption


def load(folder: Path, size: int) -> tuple[list[Image.Image], torch.Tensor, list[dict[str, str]]]:
    """Images, the same as tensors in [0, 1] of the decoder's size, and what is known of them."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    pixels = torch.stack([torch.from_numpy(np.asarray(x).copy()).permute(2, 0, 1) / 255 for x in pictures])
    return pictures, interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1), rows


def ink(images: torch.Tensor) -> np.ndarray:
    """Images without color and brightness, flat."""
    ink = images.amax(1).flatten(1)
    return (ink / ink.amax(1, keepdim=True).clamp(min=1e-3)).numpy()


def mean_color(images: torch.Tensor) -> torch.Tensor:
    """The color of the brighter pixels, its highest component 1."""
    weight = images.amax(1, keepdim=True)
    weight = (weight > 0.5 * weight.amax((2, 3), keepdim=True)).float()
    color = (images * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)
    return color / color.amax(1, keepdim=True).clamp(min=1e-3)


def main() -> None:
    """Trains, predicts, paints, judges, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-unclip"), help="where the models are, or go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of all rows each")
    parser.add_argument("--per_text", type=int, default=5, help="pictures painted for each of the 80 texts")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_verbosity_error()
    started = time.monotonic()
    train(args.folder)
    print(f"training of what was not there: {time.monotonic() - started:.0f} s")

    # 1. What the judges know
    prior = UnCLIPPriorPipeline.from_pretrained(args.folder / "prior")
    decoder = UnCLIPTextToImagePipeline.from_pretrained(args.folder / "decoder")
    for pipe in (prior, decoder):
        pipe.set_progress_bar_config(disable=True)
    size = decoder.decoder.config.sample_size
    (seen, seen_pixels, seen_rows), (held_out, pixels, rows) = (
        load(args.folder / "images" / split, size) for split in ("train", "validation")
    )
    seen_embeds, embeds = (
        torch.cat([prior.encode_image(pictures[i : i + 250]) for i in range(0, len(pictures), 250)])
        for pictures in (seen, held_out)
    )
    directions = 8 * normalize(seen_embeds, dim=1).numpy()
    digit_probe = LogisticRegression(max_iter=3000).fit(directions, [row["digit"] for row in seen_rows])
    size_probe = LogisticRegression(max_iter=3000).fit(directions, [row["size"] for row in seen_rows])
    judge = SVC(C=10).fit(ink(seen_pixels), [row["digit"] for row in seen_rows])
    seen_colors = mean_color(seen_pixels)
    of_color = {name: [i for i, row in enumerate(seen_rows) if row["color"] == name] for name in COLORS}
    color_means = torch.stack([seen_colors[indices].mean(0) for indices in of_color.values()])

    def judged(images: torch.Tensor, digits: list[str], colors: list[str]) -> dict[str, float]:
        digit = judge.predict(ink(images)) == np.array(digits)
        nearest = torch.cdist(mean_color(images), color_means).argmin(1)
        color = np.array(list(COLORS))[nearest.numpy()] == np.array(colors)
        return {"digit": digit.mean(), "color": color.mean(), "digit and color": (digit & color).mean()}

    table: list[dict[str, object]] = []

    def report(seed: int | str, what: str, **values: float) -> None:
        for name, value in values.items():
            table.append({"seed": seed, "what": what, "figure": name, "value": round(float(value), 4)})
            print(f"{seed} | {what} | {name} | {value:.4f}", flush=True)

    # 2. Predicted embeddings
    texts = [row["text"] for row in rows]
    text_embeds = torch.cat([prior.encode_prompt(texts[i : i + 250])[0] for i in range(0, len(texts), 250)])
    seen_texts = [row["text"] for row in seen_rows]
    seen_text_embeds = torch.cat([prior.encode_prompt(seen_texts[i : i + 256])[0] for i in range(0, len(seen), 256)])
    named = torch.tensor([row["digit"] in row["text"].split() for row in rows])
    labels = torch.tensor([DIGITS.index(row["digit"]) for row in rows])
    class_embeds = prior.encode_prompt([caption(name) for name in DIGITS])[0]
    is_named = [row["digit"] for row, is_in in zip(rows, named, strict=True) if is_in]

    def measure(seed: int | str, what: str, predicted: torch.Tensor) -> None:
        report(
            seed,
            what,
            **{
                "Frechet distance": frechet_distance(normalize(predicted, dim=1), normalize(embeds, dim=1)),
                "cosine to the text": cosine_similarity(predicted, text_embeds).mean(),
                "cosine to the true embedding": cosine_similarity(predicted, embeds).mean(),
                "class accuracy, zero-shot": zero_shot_accuracy(predicted[named], class_embeds, labels[named]),
                "class accuracy, probe": digit_probe.score(
                    8 * normalize(predicted[named].float(), dim=1).numpy(), is_named
                ),
            },
        )

    measure("", "true embeddings", embeds)
    unit = (normalize(x.double(), dim=1) for x in (seen_text_embeds, seen_embeds))
    measure("", "linear regression", linear_regression(*unit)(normalize(text_embeds.double(), dim=1)).float())
    open_texts = [(digit, color) for digit in DIGITS for color in COLORS]
    prompts = [caption(digit, color) for digit, color in open_texts]
    report("", "judges on held-out images", **judged(pixels, *([row[k] for row in rows] for k in ("digit", "color"))))
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(seed)
        for what, settings in {
            "prior": {"num_candidates": 1},
            "prior, best of 2": {"num_candidates": 2},
            "prior, best of 2, guidance 2": {"num_candidates": 2, "guidance_scale": 2.0},
        }.items():
            measure(seed, what, prior(texts, generator=generator, **settings).image_embeds)
        for guidance_scale in (1.0, 4.0):
            large = []
            for prompt in prompts:
                drawn = prior(
                    prompt, num_candidates=1, num_images_per_prompt=32, guidance_scale=guidance_scale,
                    generator=generator,
                ).image_embeds  # fmt: skip
                large.append((size_probe.predict(8 * normalize(drawn, dim=1).numpy()) == "large").mean())
            shares = torch.tensor(large)
            within = ((shares >= 0.3) & (shares <= 0.7)).double().mean()
            report(
                seed,
                f"size left open, guidance {guidance_scale:g}",
                **{"share of large ones": shares.mean(), "texts with 30 to 70 %": within},
            )

        # 3. Pictures
        wanted = [pair for pair in open_texts for _ in range(args.per_text)]
        digits, colors = zip(*wanted, strict=True)
        drawn = prior(prompts, num_images_per_prompt=args.per_text, generator=generator).image_embeds
        known = tuple([row[k] for row in rows[: len(wanted)]] for k in ("digit", "color"))
        for what, z, truth in (
            ("painted from texts", drawn, (digits, colors)),
            ("painted from held-out images", embeds[: len(wanted)], known),
        ):
            for guidance_scale in (1.0, 2.0, 3.0):
                painted = [
                    decoder(
                        image_embeds=part, guidance_scale=guidance_scale, num_inference_steps=25, generator=generator,
                        output_type="pt",
                    ).images
                    for part in z.split(100)
                ]  # fmt: skip
                report(seed, f"{what}, guidance {guidance_scale:g}", **judged(torch.cat(painted), *truth))

    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(f"{time.monotonic() - started:.0f} s in all; wrote {args.output}")


if __name__ == "__main__":
    main()
