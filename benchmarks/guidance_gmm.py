"""How close classifier guidance comes to the exact conditional distribution, by sampler and number of steps.

```bash
python benchmarks/guidance_gmm.py                              # everything, one seed: two to three minutes
python benchmarks/guidance_gmm.py --seed 0 1 2                 # the table beside this file
python benchmarks/guidance_gmm.py --steps 25 --scales          # one number of steps, no other guidance scales
```

The images are points in the plane from a Gaussian mixture with three classes. The noise prediction, the classifier
of noisy points and the distribution of each class are then known exactly, and all errors are the sampler's: with scale
1, guidance should lead an unconditional model to the distribution of the class. `conditional` is the class's own exact
noise prediction without guidance: what the sampler makes of a perfect conditional model in so many steps. Variance
`mid` is `"learned_range"` with `v = 0`, halfway in logarithm. All methods of a seed start from the same noise.

Figures are of the worst class: `mean`, the error of the samples' mean; `cov`, that of their covariance, relative, in
Frobenius norm; `SW2`, the sliced Wasserstein distance to as many exact samples, in 64 fixed directions. `p(y|x)` is
the mean probability of the class that was asked for, `spread` the root of the samples' total variance over that of
their class, both averages over classes. Those of `exact samples`, two sets of them, are the noise floor.

The printed table has means over seeds. Rows go to `guidance_gmm.csv` beside this file, in place of those of the same
seed, method, steps, scale and number of samples. The exit status is 1 if a gate does not hold.
"""

import argparse
import csv
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_ext.evaluation.posterior import GaussianMixture, sliced_wasserstein
from diffusers_ext.pipelines.classifier_guidance import ClassifierGradient, GuidedScheduler, space_timesteps

WEIGHTS = torch.tensor([0.25, 0.15, 0.20, 0.25, 0.15], dtype=torch.float64)
MEANS = torch.tensor([[-0.9, 0.5], [-0.3, -0.8], [0.7, 0.7], [0.2, 0.1], [0.9, -0.5]], dtype=torch.float64)
VARIANCES = torch.tensor(
    [[0.04, 0.02], [0.03, 0.06], [0.02, 0.08], [0.05, 0.05], [0.08, 0.02]], dtype=torch.float64
)  # along the axes
COMPONENT_CLASS = torch.tensor([0, 0, 1, 2, 2])  # rising
NUM_CLASSES = 3
CLASS_PRIORS = [
    GaussianMixture(WEIGHTS[own] / WEIGHTS[own].sum(), MEANS[own], VARIANCES[own].diag_embed())
    for own in (label == COMPONENT_CLASS for label in range(NUM_CLASSES))
]
LEVELS = GuidedScheduler().alphas_cumprod

# name -> settings of the scheduler, guidance form (None: the conditional model without guidance)
METHODS: dict[str, tuple[dict[str, str], str | None]] = {
    "mean form, fixed_small": ({"variance_type": "fixed_small"}, "mean"),
    "mean form, mid": ({"variance_type": "learned_range"}, "mean"),
    "mean form, fixed_large": ({"variance_type": "fixed_large"}, "mean"),
    "epsilon form, mid": ({"variance_type": "learned_range"}, "epsilon"),
    "DDIM": ({"sampler": "ddim"}, "epsilon"),
    "conditional, fixed_small": ({"variance_type": "fixed_small"}, None),
    "conditional, mid": ({"variance_type": "learned_range"}, None),
    "conditional, fixed_large": ({"variance_type": "fixed_large"}, None),
    "conditional, DDIM": ({"sampler": "ddim"}, None),
}
EXACT = "exact samples"
SWEEP = "mean form, mid"  # the method and steps whose scale is varied
SWEEP_STEPS = 250
FIGURES = {
    "mean_error": "mean",
    "covariance_error": "cov",
    "sliced_wasserstein": "SW2",
    "probability": "p(y|x)",
    "spread": "spread",
}
KEYS = ("seed", "method", "steps", "scale", "num_samples")
COLUMNS = (*KEYS, *FIGURES, "seconds", "command")
# method, steps, figure, limit with `GATE_SAMPLES` points per class
GATE_SAMPLES = 20_000
GATES = [
    ("mean form, mid", 250, "mean_error", 0.03),
    ("mean form, mid", 250, "covariance_error", 0.06),
    ("mean form, mid", 250, "sliced_wasserstein", 0.03),
    ("epsilon form, mid", 25, "probability", 0.02),  # distance from that of exact samples
]


def log_joint(sample: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`log p(k, x_t)` at `abar_t = level`, without a constant; shape `(batch, 2)` to `(components, batch)`."""
    variances = level * VARIANCES + 1 - level
    means = level.sqrt() * MEANS
    constants = WEIGHTS.log() - (means**2 / variances + variances.log()).sum(1) / 2
    # The square multiplied out, and components first: several times faster than arrays of (batch, components, 2).
    return constants[:, None] + means / variances @ sample.T - 0.5 / variances @ sample.T**2


def predict_noise(sample: torch.Tensor, level: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """`eps = -sqrt(1 - abar_t) grad log p(x_t)`, or with labels that of `p(x_t | y)`; of the shape of `sample`."""
    joint = log_joint(sample, level)
    if labels is not None:
        joint = joint.masked_fill(labels != COMPONENT_CLASS[:, None], -torch.inf)
    variances = level * VARIANCES + 1 - level
    shares = joint.softmax(0)
    noise = (1 / variances).T @ shares * sample.T - (level.sqrt() * MEANS / variances).T @ shares
    return ((1 - level).sqrt() * noise).T


def class_logits(sample: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`log p(y, x_t)` without a constant, the exact classifier; shape `(batch, 2)` to `(batch, classes)`."""
    components = log_joint(sample, level).split(COMPONENT_CLASS.bincount().tolist())
    return torch.stack([own.logsumexp(0) for own in components]).T


def guide(labels: torch.Tensor) -> ClassifierGradient:
    """The gradient of the exact classifier, which is given timesteps as a trained one is."""
    return ClassifierGradient(lambda sample, timestep: class_logits(sample, LEVELS[timestep]), labels)


def make_scheduler(settings: dict[str, str], steps: int) -> GuidedScheduler:
    """Of the authors' spacing: the images are not in [-1, 1], and so nothing is clipped."""
    scheduler = GuidedScheduler(clip_sample=False, **settings)
    ddim = scheduler.config.sampler == "ddim"
    scheduler.set_timesteps(timestep_respacing=f"ddim{steps}" if ddim else str(steps))
    return scheduler


def draw(
    scheduler: GuidedScheduler,
    labels: torch.Tensor,
    generator: torch.Generator,
    cond_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    scale: float = 1.0,
    guidance_form: str = "mean",
) -> torch.Tensor:
    """Samples `(batch, 2)` of the guided unconditional model; without `cond_fn` those of the conditional one."""
    sample = torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        output = predict_noise(sample, LEVELS[timestep], labels if cond_fn is None else None)
        if scheduler.config.variance_type == "learned_range":
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        gradient = None if cond_fn is None else scale * cond_fn(sample, timestep)
        sample = scheduler.step(
            output, timestep, sample, gradient=gradient, guidance_form=guidance_form, generator=generator
        ).prev_sample
    return sample


def draw_exact(num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """So many exact samples of every class, one class after the other, shape `(classes * num_samples, 2)`."""
    return torch.cat([prior.sample(num_samples, generator) for prior in CLASS_PRIORS])


def measure(samples: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """The figures of samples of all classes, in the order of [`draw_exact`]."""
    num_samples = len(samples) // NUM_CLASSES
    labels = torch.arange(NUM_CLASSES).repeat_interleave(num_samples)
    mean_errors, covariance_errors, distances, spreads = [], [], [], []
    for label, prior in enumerate(CLASS_PRIORS):
        own, expected = samples[labels == label], exact[labels == label]
        covariance = own.T.cov()
        mean_errors.append((own.mean(0) - prior.mean).norm().item())
        covariance_errors.append(((covariance - prior.covariance).norm() / prior.covariance.norm()).item())
        distances.append(sliced_wasserstein(own, expected, 64, torch.Generator().manual_seed(0)))
        spreads.append((covariance.trace() / prior.covariance.trace()).sqrt().item())
    probabilities = class_logits(samples, torch.ones(())).softmax(1).gather(1, labels[:, None])
    return {
        "mean_error": max(mean_errors),
        "covariance_error": max(covariance_errors),
        "sliced_wasserstein": max(distances),
        "probability": probabilities.mean().item(),
        "spread": statistics.fmean(spreads),
    }


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Puts rows into the table, whose other rows stay, and which is always whole on disk."""
    table = {}
    if path.is_file():
        with path.open(newline="") as file:
            table = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    table |= {tuple(row[key] for key in KEYS): row for row in rows}
    rank = {method: place for place, method in enumerate([EXACT, *METHODS])}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in sorted(
            table.values(),
            key=lambda row: (int(row["num_samples"]), int(row["seed"]), rank.get(row["method"], len(rank)),
                             int(row["steps"] or 0), float(row["scale"] or 0)),
        ):  # fmt: skip
            writer.writerow(row)
    os.replace(temporary, path)


def table(rows: list[dict[str, str]], columns: list[str], by: str) -> str:
    """Rows in Markdown: a line per method, a column for each value of `by`, all figures in a cell."""
    lines = [f"| {' / '.join(FIGURES.values())} | {' | '.join(f'{by} {column}' for column in columns)} |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for column in columns:
            found = [row for row in rows if row["method"] == method and row[by] in ("", column)]
            means = [statistics.fmean(float(row[figure]) for row in found) for figure in FIGURES if found]
            cells.append(" / ".join(f"{mean:.3f}" for mean in means))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_gates(rows: list[dict[str, str]], num_samples: int) -> list[tuple[str, bool]]:
    """What each gate found, of its worst seed, and whether it holds; gates of other steps and methods are left out."""
    # Limits are for errors that are mostly noise of finite samples, and that falls with the root of their number.
    allowance = max(1.0, (GATE_SAMPLES / num_samples) ** 0.5)
    exact = {row["seed"]: float(row["probability"]) for row in rows if row["method"] == EXACT}
    found = []
    for method, steps, figure, limit in GATES:
        values = [
            abs(float(row[figure]) - exact[row["seed"]]) if figure == "probability" else float(row[figure])
            for row in rows
            if (row["method"], row["steps"], float(row["scale"] or 0)) == (method, str(steps), 1.0)
        ]
        if values:
            name = FIGURES[figure] + (" from that of exact samples" if figure == "probability" else "")
            allowed = limit if figure == "probability" else limit * allowance
            holds = all(value <= allowed for value in values)  # which NaN is not
            verdict = "holds" if holds else "FAILS"
            found.append((f"{method}, {steps} steps: {name} {max(values):.4f} <= {allowed:.3f} {verdict}", holds))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the rows, prints tables and gates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=GATE_SAMPLES, help="samples of every class")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 25, 50, 100, 250])
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="one or several")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help="; ".join(METHODS))  # fmt: skip
    parser.add_argument("--scales", nargs="*", type=float, default=[0.0, 0.5, 1.0, 2.0, 4.0, 10.0],
                        help=f"guidance scales of '{SWEEP}', {SWEEP_STEPS} steps; none skips them")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args(arguments)
    if args.samples < 2:
        parser.error(f"--samples is {args.samples}, but must be at least 2: figures are of distributions")
    for steps in args.steps:
        if not 2 <= steps <= len(LEVELS):
            parser.error(f"--steps is {steps}, but must be from 2 to {len(LEVELS)}")
        try:
            space_timesteps(len(LEVELS), f"ddim{steps}")
        except ValueError as error:
            if any("DDIM" in method for method in args.methods):
                parser.error(f"--steps: {error} Or leave DDIM out of --methods.")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output is {args.output}, but its folder does not exist: make it first")
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/guidance_gmm.py", *(sys.argv[1:] if arguments is None else arguments)])

    runs = [(method, steps, 1.0) for method in args.methods for steps in args.steps]
    runs += [(SWEEP, SWEEP_STEPS, scale) for scale in args.scales if (SWEEP, SWEEP_STEPS, scale) not in runs]
    labels = torch.arange(NUM_CLASSES).repeat_interleave(args.samples)
    rows = []
    for seed in args.seed:
        exact = draw_exact(args.samples, torch.Generator().manual_seed(1000 * seed + 1))
        bar = tqdm([(EXACT, None, None), *runs])
        for method, steps, scale in bar:
            bar.set_description(f"seed {seed}, {method}, {steps} steps, scale {scale}")
            generator = torch.Generator().manual_seed(1000 * seed + 2)
            start = time.perf_counter()
            if method == EXACT:
                samples = draw_exact(args.samples, generator)
            else:
                settings, form = METHODS[method]
                scheduler = make_scheduler(settings, steps)
                if form is None:
                    samples = draw(scheduler, labels, generator)
                else:
                    samples = draw(scheduler, labels, generator, guide(labels), scale, form)
            seconds = time.perf_counter() - start
            row = {"seed": seed, "method": method, "steps": steps or "", "num_samples": args.samples}
            row |= {"scale": "" if scale is None or METHODS[method][1] is None else f"{scale:g}", "command": command}
            row |= {figure: f"{value:.5g}" for figure, value in measure(samples, exact).items()}
            rows.append({column: str(value) for column, value in (row | {"seconds": f"{seconds:.3g}"}).items()})
        write_rows(args.output, rows)

    print(f"{args.samples} samples of every class, scale 1, seeds {', '.join(map(str, args.seed))}\n")
    columns = [str(steps) for steps in args.steps]
    shown = [row for row in rows if row["scale"] in ("", "1") and row["steps"] in ("", *columns)]
    print(table(shown, columns, "steps"))
    if args.scales:
        swept = [row for row in rows if (row["method"], row["steps"]) == (SWEEP, str(SWEEP_STEPS))]
        print(f"\n{SWEEP}, {SWEEP_STEPS} steps, guidance scales\n")
        print(table(swept, [f"{scale:g}" for scale in args.scales], "scale"))
    gates = check_gates(rows, args.samples)
    print("\ngates, of the worst seed:" if gates else "\nno gate is of these methods and steps")
    for gate, _ in gates:
        print(f"- {gate}")
    print(f"\nwrote {args.output}")
    if not all(holds for _, holds in gates):
        sys.exit(1)


if __name__ == "__main__":
    main()
