"""Classifier guidance on digits: how often an independent judge sees the class that was asked for, and what it costs.

```bash
python benchmarks/guidance_digits.py                      # trains what it needs first: four to five minutes in all
python benchmarks/guidance_digits.py --seeds 0 1 2
```

An unconditional diffusion model with learned variance, a classifier of noisy digits and one of clean digits are
trained on 1297 of scikit-learn's digits by the training scripts. The judge is a support vector machine that was fitted
to the other 500, which none of the three has seen. For each scale, sampler and classifier 500 digits are drawn, 50 of
every class:

* judged right: the share that the judge assigns to the class that was asked for;
* spread: the standard deviation of a pixel within a class, over all pixels and classes, values in [-1, 1];
* distance: the mean squared distance to the nearest training digit of that class, summed over the pixels.

The rows are printed and written to `guidance_digits.csv` beside this file.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.utils.logging import set_verbosity_error
from sklearn.svm import SVC

from diffusers_ext.data import load_image_dataset
from diffusers_ext.pipelines.classifier_guidance import ClassifierGuidancePipeline, NoisyClassifier
from diffusers_ext.training import train_noisy_classifier, train_unconditional

SAMPLERS = {
    "ancestral 50": (DDPMScheduler, {"timestep_respacing": "50"}),
    "ancestral 50, epsilon form": (DDPMScheduler, {"timestep_respacing": "50", "guidance_form": "epsilon"}),
    "DDIM 25": (DDIMScheduler, {"timestep_respacing": "ddim25"}),
    "ancestral 250": (DDPMScheduler, {"timestep_respacing": "250"}),
}
SCALES = (0.0, 1.0, 3.0, 10.0)


def train(folder: Path) -> None:
    """The three models, by the training scripts; what is there is left."""
    shared = {
        "dataset_name": "digits", "train_batch_size": 64, "random_flip": False, "report_to": "none", "seed": 0,
        "checkpointing_steps": 10**6, "validation_steps": 10**6,
    }  # fmt: skip
    if not (folder / "base" / "model_index.json").is_file():
        train_unconditional.main(
            train_unconditional.UnconditionalArguments(
                output_dir=str(folder / "base"), learn_variance=True, max_train_steps=1500, learning_rate=2e-3,
                lr_scheduler="cosine_with_min_lr", lr_warmup_steps=50, max_grad_norm=1.0, use_ema=True,
                ema_decay=0.999, **shared,
            )
        )  # fmt: skip
    for name, clean in (("noisy", False), ("clean", True)):
        if not (folder / name / "config.json").is_file():
            train_noisy_classifier.main(
                train_noisy_classifier.NoisyClassifierArguments(
                    output_dir=str(folder / name), pretrained_model_name_or_path=str(folder / "base"), clean=clean,
                    max_train_steps=1000, learning_rate=1e-3, **shared,
                )
            )  # fmt: skip


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1], flat, and their labels."""
    dataset = load_image_dataset("digits", split=split)
    items = [dataset[row] for row in range(len(dataset))]
    images = torch.stack([item["images"] for item in items]).flatten(1)
    return images, torch.tensor([item["labels"] for item in items])


def main() -> None:
    """Trains, draws, judges, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("guidance-digits"), help="where the models are, or go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of all rows each")
    parser.add_argument("--per_class", type=int, default=50, help="samples of every class")
    parser.add_argument("--threads", type=int, default=1, help="two gain little on networks of this size")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_verbosity_error()
    started = time.monotonic()
    train(args.folder)
    print(f"training: {time.monotonic() - started:.0f} s")

    judged, judged_labels = digits("validation")
    judge = SVC(gamma=0.02, C=10).fit(judged.numpy(), judged_labels.numpy())
    real, real_labels = digits("train")
    spread = torch.stack([real[real_labels == k].std(0).mean() for k in range(10)]).mean()
    rows = [
        {
            "seed": "",
            "classifier": "",
            "sampler": "training digits",
            "scale": "",
            "judged right": judge.score(real.numpy(), real_labels.numpy()),
            "spread": spread.item(),
            "distance": 0.0,
        }
    ]
    base = DDPMPipeline.from_pretrained(args.folder / "base")
    labels = torch.arange(10).repeat_interleave(args.per_class)
    for seed in args.seeds:
        for name in ("noisy", "clean"):
            classifier = NoisyClassifier.from_pretrained(args.folder / name)
            for sampler, (scheduler, settings) in SAMPLERS.items():
                if name == "clean" and sampler not in ("ancestral 50", "DDIM 25"):
                    continue
                steps = scheduler.from_config(base.scheduler.config)
                pipe = ClassifierGuidancePipeline(base.unet, steps, classifier)
                pipe.set_progress_bar_config(disable=True)
                for scale in SCALES:
                    if (name == "clean" and scale == 0) or (sampler == "ancestral 250" and scale not in (1.0, 3.0)):
                        continue
                    generator = torch.Generator().manual_seed(seed)
                    images = pipe(
                        labels, guidance_scale=scale, generator=generator, output_type="latent", **settings
                    ).images.flatten(1)
                    right = torch.from_numpy(judge.predict(images.numpy())) == labels
                    spread = torch.stack([images[labels == k].std(0).mean() for k in range(10)]).mean()
                    nearest = [
                        torch.cdist(images[labels == k], real[real_labels == k]).min(1).values.square().mean()
                        for k in range(10)
                    ]
                    rows.append(
                        {
                            "seed": seed,
                            "classifier": name,
                            "sampler": sampler,
                            "scale": scale,
                            "judged right": right.double().mean().item(),
                            "spread": spread.item(),
                            "distance": torch.stack(nearest).mean().item(),
                        }
                    )
                    print(" | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in rows[-1].values()))
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )
    print(f"{time.monotonic() - started:.0f} s in all; wrote {args.output}")


if __name__ == "__main__":
    main()
