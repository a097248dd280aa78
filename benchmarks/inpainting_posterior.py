"""How close inpainting methods come to the exact posterior, and what they cost.

```bash
python benchmarks/inpainting_posterior.py                                     # everything: some twenty minutes
python benchmarks/inpainting_posterior.py --suites digits --seeds 0           # side by side with other suites
python benchmarks/inpainting_posterior.py --methods "CoPaint" "DDNM 250"      # some methods, all suites
```

The prior is a Gaussian mixture, the network its exact noise prediction, and so the distribution that the samples
should have is known: see `diffusers_ext/evaluation/posterior.py` for problems and metrics. Every method is its
pipeline, called as anybody would call it, but without pasting the known pixels at the end, so that `known` shows how
well the method itself keeps to them. `SW` is the sliced Wasserstein distance in standard deviations of the posterior;
that of "exact posterior", two sets of exact samples, is the least that can be had with so few samples. Passes are
those of a batch of all samples of a problem, which waits for the line search of its slowest. All figures are means
over the problems of a suite, in the printed table also over seeds.

Rows go to `inpainting_posterior.csv` beside this file as they are done; those that are in it are not computed again.
Processes may share the file. Times are those of one thread.
"""

import argparse
import csv
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, RePaintPipeline, RePaintScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from filelock import FileLock
from tqdm import tqdm

from diffusers_ext.evaluation.posterior import (
    SUITES,
    AnalyticUNet,
    InpaintingProblem,
    count_passes,
    inpainting_problems,
    posterior_metrics,
)
from diffusers_ext.pipelines.copaint import CoPaintPipeline
from diffusers_ext.pipelines.ddnm import DDNMPipeline
from diffusers_ext.pipelines.ddrm import DDRMPipeline
from diffusers_ext.pipelines.dps import DPSPipeline
from diffusers_ext.pipelines.mcg import MCGPipeline
from diffusers_ext.pipelines.repaint import RePaintDDPMPipeline
from diffusers_ext.pipelines.replacement import ReplacementPipeline


class StockRePaintPipeline(RePaintPipeline):
    """RePaint of diffusers, called like the others: it takes [-1, 1], masks of what is known, and no repetitions."""

    def __init__(self, unet: AnalyticUNet, scheduler: DDPMScheduler) -> None:
        super().__init__(unet, RePaintScheduler.from_config(scheduler.config))

    def __call__(
        self,
        image: torch.Tensor,
        mask_image: torch.Tensor,
        num_images_per_prompt: int,
        generator: torch.Generator,
        output_type: str,
        **settings: float,
    ) -> ImagePipelineOutput:
        """Samples in [-1, 1] for one image."""
        image = (2 * image.float() - 1).repeat(num_images_per_prompt, 1, 1, 1)
        output = super().__call__(image, 1 - mask_image, generator=generator, output_type="np", **settings)
        return ImagePipelineOutput(torch.from_numpy(output.images).movedim(-1, 1) * 2 - 1)


# name, pipeline (None for the exact posterior), arguments
METHODS: list[tuple[str, type[DiffusionPipeline] | None, dict]] = [
    ("exact posterior", None, {}),
    ("replacement DDIM 250", ReplacementPipeline, dict(num_inference_steps=250, eta=0.0, paste_known=False)),
    ("replacement DDPM 250", ReplacementPipeline, dict(num_inference_steps=250, eta=1.0, paste_known=False)),
    ("RePaint 250 j10 r10", RePaintDDPMPipeline, dict(jump_length=10, jump_n_sample=10, paste_known=False)),
    ("RePaint 100 j10 r2", RePaintDDPMPipeline, dict(num_inference_steps=100, jump_n_sample=2, paste_known=False)),
    ("RePaint of diffusers 250 j10 r10", StockRePaintPipeline, dict(num_inference_steps=250)),
    ("DDRM 20", DDRMPipeline, dict(num_inference_steps=20, paste_known=False)),
    ("DDRM 250", DDRMPipeline, dict(num_inference_steps=250, paste_known=False)),
    ("DDNM 100", DDNMPipeline, dict(num_inference_steps=100)),
    ("DDNM 250", DDNMPipeline, dict(num_inference_steps=250)),
    ("DDNM 100 j10 r3", DDNMPipeline, dict(num_inference_steps=100, travel_length=10, travel_repeat=3)),
    ("DPS 250, 1", DPSPipeline, dict(num_inference_steps=250, step_size=1.0, paste_known=False)),
    ("DPS 250, 0.3", DPSPipeline, dict(num_inference_steps=250, step_size=0.3, paste_known=False)),
    ("DPS 1000, 0.3", DPSPipeline, dict(num_inference_steps=1000, step_size=0.3, paste_known=False)),
    ("MCG 250, 1", MCGPipeline, dict(num_inference_steps=250, step_size=1.0)),
    ("MCG 250, 0.1", MCGPipeline, dict(num_inference_steps=250, step_size=0.1)),
    ("CoPaint-Fast", CoPaintPipeline, dict(preset="fast", paste_known=False)),
    ("CoPaint", CoPaintPipeline, dict(paste_known=False)),
    ("CoPaint eta 1", CoPaintPipeline, dict(eta=1.0, paste_known=False)),
    ("CoPaint-Swift", CoPaintPipeline, dict(preset="swift", paste_known=False)),
    ("CoPaint rate 0.2", CoPaintPipeline, dict(learning_rate=0.2, paste_known=False)),
    ("CoPaint 20", CoPaintPipeline, dict(num_inference_steps=20, paste_known=False)),
    (
        "CoPaint 20 steps, rate 0.2",
        CoPaintPipeline,
        dict(num_inference_steps=20, learning_rate=0.2, paste_known=False),
    ),
    ("CoPaint-TT", CoPaintPipeline, dict(preset="tt", paste_known=False)),
    ("CoPaint-TT eta 1", CoPaintPipeline, dict(preset="tt", eta=1.0, paste_known=False)),
]

NUM_SAMPLES = {"digits": 128, "digitsG": 200, "gmm25": 100, "gmm25_dy2": 100}
FIGURES = ("sliced_wasserstein", "mean_error", "variance_ratio", "density_deficit", "weight_error", "known_error",
           "forward", "backward", "seconds")  # fmt: skip
HEADINGS = ("SW", "mean", "variance", "density", "weights", "known", "forward", "backward", "seconds")
COLUMNS = ("suite", "seed", "method", "num_samples", *FIGURES, "command")


def inpaint(
    pipeline: type[DiffusionPipeline], settings: dict, problem: InpaintingProblem, num_samples: int, seed: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """A pipeline's samples for a problem, in [-1, 1], with passes and seconds."""
    unet = AnalyticUNet.from_mixture(problem.prior, problem.image.shape)
    pipe = pipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    with count_passes(unet) as passes:
        samples = pipe(
            problem.input_image,
            problem.mask_image,
            num_images_per_prompt=num_samples,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **settings,
        ).images
    seconds = time.perf_counter() - start
    return samples, {"forward": passes.forward, "backward": passes.backward, "seconds": seconds}


def measure(
    pipeline: type[DiffusionPipeline] | None,
    settings: dict,
    problems: list[InpaintingProblem],
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """The figures of one method on the problems of a suite."""
    results = []
    for index, problem in enumerate(problems):
        seed_of_problem = 1000 * seed + index
        if pipeline is None:
            samples = problem.image.repeat(num_samples, 1, 1, 1)
            generator = torch.Generator().manual_seed(seed_of_problem)
            exact = problem.posterior.sample(num_samples, generator)
            samples[:, ~problem.known.expand_as(problem.image)] = exact
            cost = {"forward": 0, "backward": 0, "seconds": 0.0}
        else:
            samples, cost = inpaint(pipeline, settings, problem, num_samples, seed_of_problem)
        # A fixed seed of its own: the same exact samples and directions for all methods, and none of those above.
        metrics = posterior_metrics(samples, problem, torch.Generator().manual_seed(seed_of_problem + 500))
        results.append(metrics | cost)
    return {name: statistics.fmean(result[name] for result in results) for name in FIGURES}


def read_rows(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a table by suite, seed and method."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {(row["suite"], row["seed"], row["method"]): row for row in csv.DictReader(file)}


def write_row(path: Path, row: dict[str, str]) -> None:
    """Puts one row into the table, which is always whole on disk, also when other processes do the same."""
    order = [name for name, *_ in METHODS]
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path) | {(row["suite"], row["seed"], row["method"]): row}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            rank = {name: place for place, name in enumerate(order)}
            keys = sorted(rows, key=lambda key: (SUITES.index(key[0]), int(key[1]), rank.get(key[2], len(rank)), key))
            writer.writerows(rows[key] for key in keys)
        os.replace(temporary, path)


def table(rows: list[dict[str, str]], suite: str) -> str:
    """The rows of one suite in Markdown: SW of each seed, means over seeds of the rest."""
    seeds = sorted({int(row["seed"]) for row in rows})
    lines = [f"{suite}, seeds {', '.join(map(str, seeds))}", "", f"| method | {' | '.join(HEADINGS)} |",
             "|---" * (len(HEADINGS) + 1) + "|"]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {int(row["seed"]): row for row in rows if row["method"] == method}
        distances = " / ".join(f"{float(found[s]['sliced_wasserstein']):.2f}" if s in found else "-" for s in seeds)
        means = [statistics.fmean(float(row[name]) for row in found.values()) for name in FIGURES[1:]]
        cells = [*(f"{value:.3f}" for value in means[:5]), f"{means[5]:.0f}", f"{means[6]:.0f}", f"{means[7]:.1f}"]
        lines.append(f"| {method} | {distances} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, writes it, and prints the tables."""
    names = [name for name, *_ in METHODS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=["digits", "digitsG", "gmm25"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--num_samples", type=int, help=f"samples per problem; by default {NUM_SAMPLES}")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--overwrite", action="store_true", help="measure rows again that are in the table")
    args = parser.parse_args(arguments)
    if args.num_samples is not None and args.num_samples < 2:
        parser.error(f"--num_samples is {args.num_samples}, but must be at least 2: figures are of distributions")
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/inpainting_posterior.py", *(arguments or sys.argv[1:])])

    wanted = [
        (suite, seed, method)
        for suite in args.suites
        for seed in args.seeds
        for method in METHODS
        if method[0] in args.methods
    ]
    bar = tqdm(wanted)
    for suite, seed, (name, pipeline, settings) in bar:
        bar.set_description(f"{suite} {seed} {name}")
        num_samples = args.num_samples or NUM_SAMPLES[suite]
        done = read_rows(args.output).get((suite, str(seed), name))
        if done and done["num_samples"] == str(num_samples) and not args.overwrite:
            continue
        figures = measure(pipeline, settings, inpainting_problems(suite, seed), num_samples, seed)
        row = {"suite": suite, "seed": seed, "method": name, "num_samples": num_samples, "command": command}
        row |= {figure: f"{value:.5g}" for figure, value in figures.items()}
        write_row(args.output, {column: str(value) for column, value in row.items()})

    rows = read_rows(args.output).values()
    for suite in args.suites:
        print(f"\n{table([row for row in rows if row['suite'] == suite], suite)}")
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
