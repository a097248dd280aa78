"""How close samplers come to an unCLIP prior that is known exactly, and how close training comes to it.

```bash
python benchmarks/prior_gaussian.py                            # everything, one seed: two to three minutes
python benchmarks/prior_gaussian.py --seed 0 1 2               # the table beside this file
python benchmarks/prior_gaussian.py --steps 25 --train_steps 0 # one number of steps, no training
```

Image embeddings `z_i` of 4 numbers are Gaussian given text embeddings `z_t` of 3: `z_i | z_t ~ N(A z_t + b, S)`, and
`z_t` is Gaussian too. The best prediction of `z_i` from a noised one is then linear and known, and all errors are the
sampler's. The levels are the cosine schedule's. A distribution is that of one `z_t`, away from the mean. Figures are
`mean`, the error of the samples' mean over that mean's norm; `cov`, that of their covariance in Frobenius norm,
relative; `trace`, the total variance over the true one.

With ancestral sampling each step is linear with Gaussian noise added, so that what comes out is known without samples:
rows `closed form`, by the variance that each step adds. `fixed_small` is that of published priors. `analytic` adds to
it the mean variance of what remains unknown (Analytic-DPM, https://huggingface.co/papers/2201.06503), and `exact` its
whole covariance, which makes any number of steps exact.

The second table is of samplers that do not follow this prior, each with the reason.

`training` trains a small `PriorTransformer` on pairs, by the mean squared error of `z_i`. On average
no prediction has a smaller error than the exact one, the Bayes error, and none that ignores `z_t` a smaller one than
the text-blind error. Errors are per number, of new pairs with one level each, the same for all three. `trained prior`
is what DPM-Solver++ draws from it.

The printed tables have means over seeds. Rows go to `prior_gaussian.csv` beside this file, in place of those of the
same seed, method, steps and number of samples. The exit status is 1 if a gate does not hold.
"""

import argparse
import csv
import inspect
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PriorTransformer,
    SchedulerMixin,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import nn
from tqdm import tqdm

from diffusers_ext.pipelines.unclip_prior import init_prior

# fmt: off
A = torch.tensor([
    [0.0006150766787412871, 0.14937276875423494, -0.1370689276811088],
    [-0.4452959193786371, -0.22733539258586127, -0.4958232774982312],
    [0.030071801298719242, 0.6701076227772668, -0.24610325927566482],
    [-0.3102374499099702, 0.2449210250925991, 0.17844350408003037],
], dtype=torch.float64)
B = torch.tensor(
    [0.03162427469936956, -0.2791404134124614, -0.008775546738982046, 0.20859095833748634], dtype=torch.float64
)
COVARIANCE = torch.tensor([  # S, of eigenvalues 0.03, 0.15, 0.45 and 0.9
    [0.3440398345618734, -0.25231804737487057, -0.2158027053184449, 0.18017722840338019],
    [-0.2523180473748705, 0.23445025252169358, 0.1927568589359536, -0.14760035250903697],
    [-0.21580270531844487, 0.19275685893595362, 0.43247606274272815, -0.0378006006722452],
    [0.18017722840338016, -0.147600352509037, -0.037800600672245215, 0.5190338501737046],
], dtype=torch.float64)
TEXT_MEAN = torch.tensor([-0.1957038156113279, -0.16176744788511987, 0.21217972467721574], dtype=torch.float64)
TEXT_COVARIANCE = torch.tensor([
    [0.6167135262469537, 0.20613732941668902, 0.020042120883254345],
    [0.20613732941668902, 0.23149688232984877, 0.0388903746309533],
    [0.020042120883254345, 0.0388903746309533, 0.6438258018096131],
], dtype=torch.float64)
TEXT = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)  # the condition that is sampled
# fmt: on
MEAN = A @ TEXT + B
BLIND_MEAN = A @ TEXT_MEAN + B  # of all image embeddings, whatever the text
BLIND_COVARIANCE = COVARIANCE + A @ TEXT_COVARIANCE @ A.T
DIM, TEXT_DIM = A.shape

# The cosine schedule, in double precision as everything here.
_u = torch.arange(1001, dtype=torch.float64) / 1000
_f = torch.cos((_u + 0.008) / 1.008 * torch.pi / 2) ** 2
LEVELS = (1 - (1 - _f[1:] / _f[:-1]).clamp(max=0.999)).cumprod(0)  # abar_t
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
UNCLIP = {"prediction_type": "sample", "clip_sample": False}

SAMPLERS: dict[str, Callable[[], SchedulerMixin]] = {
    "DDPM linspace, fixed_small_log": lambda: DDPMScheduler(
        **COSINE, timestep_spacing="linspace", variance_type="fixed_small_log", clip_sample=False
    ),
    "UnCLIP with prev_timestep": lambda: UnCLIPScheduler(**UNCLIP),
    "DDIM trailing": lambda: DDIMScheduler(**COSINE, timestep_spacing="trailing", clip_sample=False),
    "DPM++ 2M linspace": lambda: DPMSolverMultistepScheduler(
        **COSINE, algorithm_type="dpmsolver++", timestep_spacing="linspace"
    ),
    "SDE-DPM++ 2M linspace": lambda: DPMSolverMultistepScheduler(
        **COSINE, algorithm_type="sde-dpmsolver++", timestep_spacing="linspace"
    ),
    "UniPC linspace": lambda: UniPCMultistepScheduler(**COSINE, timestep_spacing="linspace"),
    "Euler trailing": lambda: EulerDiscreteScheduler(**COSINE, timestep_spacing="trailing"),
}
NO_PREVIOUS = "UnCLIP without prev_timestep"
# name -> scheduler, what is wrong with it here
REFUSED: dict[str, tuple[Callable[[], SchedulerMixin], str]] = {
    NO_PREVIOUS: (
        lambda: UnCLIPScheduler(**UNCLIP),
        "takes every step for one of the 1000, as long as the caller does not say where it leads",
    ),
    "DDPM of UnCLIP's settings": (
        lambda: DDPMScheduler.from_config(UnCLIPScheduler(**UNCLIP).config),
        "`UnCLIPScheduler` has no `beta_schedule` to hand over: linear levels for a prior of cosine ones",
    ),
    "DDIM leading": (
        lambda: DDIMScheduler(**COSINE, clip_sample=False),
        "starts below the last timestep, but from pure noise",
    ),
    "DDIM linspace": (
        lambda: DDIMScheduler(**COSINE, timestep_spacing="linspace", clip_sample=False),
        "steps by 1000 // steps, which is not how far apart its timesteps are",
    ),
    "Heun trailing": (
        lambda: HeunDiscreteScheduler(**COSINE, timestep_spacing="trailing"),
        "the cosine schedule starts at sigma 20291, where a step of second order overshoots",
    ),
}
VARIANCES = ("fixed_small", "fixed_large", "analytic", "exact")
CLOSED_FORM = {f"closed form, {variance}": variance for variance in VARIANCES}
EXACT, TRAINING, TRAINED = "exact samples", "training", "trained prior"
TRAINED_STEPS = 25
FIGURES = {"mean_error": "mean", "covariance_error": "cov", "trace_ratio": "trace"}
LOSSES = {
    "loss": "loss",
    "bayes_error": "Bayes error",
    "blind_error": "text-blind error",
    "to_bayes": "loss / Bayes",
    "to_blind": "loss / text-blind",
}
KEYS = ("seed", "method", "steps", "num_samples")
COLUMNS = (*KEYS, *FIGURES, *LOSSES, "seconds", "command")
# method, steps, figure, its lowest and highest value; or how far it may be from the same figure of another method
GATE_SAMPLES = 100_000
GATES = [
    ("DPM++ 2M linspace", 25, "covariance_error", -torch.inf, 0.02, None),
    ("DPM++ 2M linspace", 25, "trace_ratio", 0.97, 1.03, None),
    *(
        (method, steps, figure, -0.015, 0.015, "closed form, fixed_small")
        for method in ("DDPM linspace, fixed_small_log", "UnCLIP with prev_timestep")
        for steps in (10, 25, 100)
        for figure in ("covariance_error", "trace_ratio")
    ),
]
TRAINING_GATES = [("to_bayes", 0.99, 1.05), ("to_blind", -torch.inf, 0.8)]
GATE_TRAIN_STEPS = 1500


def denoise(sample: torch.Tensor, level: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """`E[x_0 | x_t]` of `x_0 ~ N(mean, covariance)` at `abar_t = level`, a number or one for each row of `sample`."""
    variances, axes = torch.linalg.eigh(covariance)
    gains = level.sqrt() * variances / (level * variances + 1 - level)
    return mean + (sample - level.sqrt() * mean) @ axes * gains @ axes.T


def predict_clean(
    sample: torch.Tensor, level: torch.Tensor, text_embeds: torch.Tensor = TEXT, guidance_scale: float = 1.0
) -> torch.Tensor:
    """The exact prior's prediction, away from that of the unconditional one with a `guidance_scale` other than 1."""
    clean = denoise(sample, level, text_embeds @ A.T + B, COVARIANCE)
    if guidance_scale == 1:
        return clean
    return guidance_scale * clean + (1 - guidance_scale) * denoise(sample, level, BLIND_MEAN, BLIND_COVARIANCE)


def posterior_covariance(level: torch.Tensor, covariance: torch.Tensor = COVARIANCE) -> torch.Tensor:
    """`Cov(x_0 | x_t)`; its trace over 4 is the mean squared error of the best prediction."""
    variances, axes = torch.linalg.eigh(covariance)
    return axes * ((1 - level) * variances / (level * variances + 1 - level)) @ axes.T


def ancestral_law(
    steps: int, variance: str = "fixed_small", guidance_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of what ancestral sampling draws with the exact prior, on evenly spaced timesteps."""
    levels = LEVELS[torch.linspace(0, len(LEVELS) - 1, steps, dtype=torch.float64).round().long()].flip(0)
    eye, zero = torch.eye(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    mean, covariance = zero, eye
    for level, previous in zip(levels, [*levels[1:], torch.ones((), dtype=torch.float64)], strict=True):
        beta = 1 - level / previous
        to_clean = previous.sqrt() * beta / (1 - level)
        to_sample = (1 - beta).sqrt() * (1 - previous) / (1 - level)
        small = beta * (1 - previous) / (1 - level)
        unknown = to_clean**2 * posterior_covariance(level)
        shift = predict_clean(zero, level, guidance_scale=guidance_scale)
        slope = (predict_clean(eye, level, guidance_scale=guidance_scale) - shift).T
        matrix = to_clean * slope + to_sample * eye
        added = {
            "fixed_small": small * eye,
            "fixed_large": beta * (previous < 1) * eye,  # none in the last step
            "analytic": (small + unknown.trace() / DIM * (previous < 1)) * eye,
            "exact": small * eye + unknown,
        }[variance]
        mean = matrix @ mean + to_clean * shift
        covariance = matrix @ covariance @ matrix.T + added
    return mean, covariance


def draw(
    scheduler: SchedulerMixin,
    steps: int,
    num_samples: int,
    generator: torch.Generator,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda x, t: predict_clean(x, LEVELS[t]),
    has_previous: bool = True,
) -> torch.Tensor:
    """Samples `(num_samples, 4)` of a prior, given the noised embeddings and the timestep, by the exact one's loop."""
    scheduler.set_timesteps(steps)
    accepted = inspect.signature(scheduler.step).parameters
    sample = scheduler.init_noise_sigma * torch.randn(num_samples, DIM, generator=generator, dtype=torch.float64)
    for timestep, previous in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        scaled = scheduler.scale_model_input(sample, timestep)
        options = {"generator": generator} if "generator" in accepted else {}
        if "prev_timestep" in accepted and has_previous:
            options["prev_timestep"] = previous
        clean = predict(scaled, timestep.long())
        sample = scheduler.step(clean, timestep, sample, **options).prev_sample
    return sample


def draw_exact(mean: torch.Tensor, covariance: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    """So many samples of a Gaussian, or one for each row of `mean`."""
    noise = torch.randn(num, len(covariance), generator=generator, dtype=torch.float64)
    return mean + noise @ torch.linalg.cholesky(covariance).T


def measure(mean: torch.Tensor, covariance: torch.Tensor) -> dict[str, float]:
    """The figures of a distribution by its moments."""
    return {
        "mean_error": ((mean - MEAN).norm() / MEAN.norm()).item(),
        "covariance_error": ((covariance - COVARIANCE).norm() / COVARIANCE.norm()).item(),
        "trace_ratio": (covariance.trace() / COVARIANCE.trace()).item(),
    }


def noised_pairs(num: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Text embeddings, image embeddings, timesteps and noised image embeddings, `num` of each."""
    text_embeds = draw_exact(TEXT_MEAN, TEXT_COVARIANCE, num, generator)
    clean = draw_exact(text_embeds @ A.T + B, COVARIANCE, num, generator)
    timesteps = torch.randint(len(LEVELS), (num,), generator=generator)
    level = LEVELS[timesteps, None]
    noise = torch.randn(num, DIM, generator=generator, dtype=torch.float64)
    return text_embeds, clean, timesteps, level.sqrt() * clean + (1 - level).sqrt() * noise


def predict_network(
    prior: PriorTransformer, sample: torch.Tensor, timesteps: torch.Tensor, text_embeds: torch.Tensor
) -> torch.Tensor:
    """The prediction of a network without text tokens: the mask has none, but with it attention is causal."""
    mask = torch.ones(len(sample), 0, dtype=torch.bool)
    return prior(sample.float(), timesteps, text_embeds.float(), attention_mask=mask).predicted_image_embedding


def train(steps: int, seed: int, batch_size: int = 128) -> PriorTransformer:
    """A prior of 109,580 parameters, trained on new pairs in every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            embedding_dim=DIM,
            num_embeddings=0,
            encoder_hid_proj_type=None,
            embedding_proj_dim=TEXT_DIM,
        )
        # Embeddings are used as they are: mean 0, deviation 1.
        init_prior(prior, BLIND_MEAN.expand(2, -1), embed_norm="l2", embed_scale=1.0)
    generator = torch.Generator().manual_seed(1000 * seed + 3)
    optimizer = torch.optim.AdamW([p for p in prior.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"seed {seed}, training"):
        text_embeds, clean, timesteps, sample = noised_pairs(batch_size, generator)
        loss = (predict_network(prior, sample, timesteps, text_embeds) - clean.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return prior.eval()


@torch.no_grad()
def measure_training(prior: PriorTransformer, num: int, generator: torch.Generator) -> dict[str, float]:
    """The errors of the prior, of the exact one, and of the exact one that knows no text, on the same new pairs."""
    text_embeds, clean, timesteps, sample = noised_pairs(num, generator)
    level = LEVELS[timesteps, None]
    parts = zip(sample.split(10_000), timesteps.split(10_000), text_embeds.split(10_000), strict=True)
    predictions = {
        "loss": torch.cat([predict_network(prior, *part) for part in parts]),
        "bayes_error": predict_clean(sample, level, text_embeds),
        "blind_error": denoise(sample, level, BLIND_MEAN, BLIND_COVARIANCE),
    }
    errors = {name: (prediction - clean).square().mean().item() for name, prediction in predictions.items()}
    return errors | {
        "to_bayes": errors["loss"] / errors["bayes_error"],
        "to_blind": errors["loss"] / errors["blind_error"],
    }


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Puts rows into the table, whose other rows stay, and which is always whole on disk."""
    table = {}
    if path.is_file():
        with path.open(newline="") as file:
            table = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    table |= {tuple(row[key] for key in KEYS): row for row in rows}
    rank = {method: place for place, method in enumerate([EXACT, *CLOSED_FORM, *SAMPLERS, *REFUSED, TRAINING])}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in sorted(
            table.values(),
            key=lambda row: (int(row["seed"] or -1), rank.get(row["method"], len(rank)), int(row["steps"] or 0),
                             int(row["num_samples"] or 0)),
        ):  # fmt: skip
            writer.writerow(row)
    os.replace(temporary, path)


def table(rows: list[dict[str, str]], methods: list[str], steps: list[int]) -> str:
    """Rows of samplers in Markdown: a line per method, a column for each number of steps, all figures in a cell."""
    lines = [f"| {' / '.join(FIGURES.values())} | {' | '.join(f'{count} steps' for count in steps)} |",
             "|---" * (len(steps) + 1) + "|"]  # fmt: skip
    for method in methods:
        cells = []
        for count in steps:
            found = [row for row in rows if row["method"] == method and row["steps"] in ("", str(count))]
            cells.append(" / ".join(f"{mean_of(found, figure):.3f}" for figure in FIGURES))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(rows: list[dict[str, str]], figure: str) -> float:
    """The mean of a figure over rows."""
    return statistics.fmean(float(row[figure]) for row in rows)


def check_gates(rows: list[dict[str, str]], num_samples: int) -> list[tuple[str, bool]]:
    """What each gate found, of its worst seed, and whether it holds; gates of what was not run are left out."""
    # Limits are for 100,000 samples: with fewer, each is further off by what their noise is more.
    allowance = max(1.0, (GATE_SAMPLES / num_samples) ** 0.5)
    checks = []
    for method, steps, figure, low, high, other in GATES:
        values = []
        for row in rows:
            if (row["method"], row["steps"]) == (method, str(steps)):
                offsets = [float(r[figure]) for r in rows if (r["method"], r["steps"]) == (other, str(steps))]
                values.append(float(row[figure]) - (offsets[0] if other else 0.0))
        more = (allowance - 1) * (high if low == -torch.inf else (high - low) / 2)
        name = FIGURES[figure] + (f" less that of {other}" if other else "")
        checks.append((f"{method}, {steps} steps: {name}", values, low - more, high + more))
    trained = [row for row in rows if row["method"] == TRAINING and int(row["steps"]) >= GATE_TRAIN_STEPS]
    for figure, low, high in TRAINING_GATES:
        checks.append((f"{TRAINING}: {LOSSES[figure]}", [float(row[figure]) for row in trained], low, high))
    found = []
    for name, values, low, high in checks:
        if values:
            holds = all(low <= value <= high for value in values)  # which NaN is not
            worst = max(values, key=lambda value: max(value - high, low - value))
            verdict = "holds" if holds else "FAILS"
            limits = f"<= {high:.3f}" if low == -torch.inf else f"in [{low:.3f}, {high:.3f}]"
            found.append((f"{name} {worst:.4f} {limits} {verdict}", holds))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the rows, prints tables and gates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=GATE_SAMPLES, help="samples of each method")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 25, 100])
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="one or several")
    parser.add_argument("--train_steps", type=int, default=GATE_TRAIN_STEPS, help="0 trains nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args(arguments)
    if args.samples < 2:
        parser.error(f"--samples is {args.samples}, but must be at least 2: figures are of distributions")
    for steps in args.steps:
        if not 2 <= steps <= len(LEVELS):
            parser.error(f"--steps is {steps}, but must be from 2 to {len(LEVELS)}")
    if args.train_steps and args.train_steps < 20:
        parser.error(f"--train_steps is {args.train_steps}, but must be 0 or at least 20: the first tenth warms up")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output is {args.output}, but its folder does not exist: make it first")
    if args.output.exists():
        header = args.output.read_bytes().split(b"\n")[0] if args.output.is_file() else b""
        if header.strip() != ",".join(COLUMNS).encode():
            parser.error(f"--output is {args.output}, which is no table of this benchmark: give another name")
    torch.set_num_threads(1)
    command = shlex.join(
        ["python", "benchmarks/prior_gaussian.py", *(sys.argv[1:] if arguments is None else arguments)]
    )

    rows = []

    def add(seed: int | str, method: str, steps: int | str, num: int | str, start: float, values: dict) -> None:
        row = {"seed": seed, "method": method, "steps": steps, "num_samples": num, "command": command}
        row |= {name: f"{value:.5g}" for name, value in values.items()}
        row["seconds"] = f"{time.perf_counter() - start:.3g}"
        rows.append({column: str(row.get(column, "")) for column in COLUMNS})

    for method, variance in CLOSED_FORM.items():
        for steps in args.steps:
            start = time.perf_counter()
            add("", method, steps, "", start, measure(*ancestral_law(steps, variance)))
    for seed in args.seed:
        start, generator = time.perf_counter(), torch.Generator().manual_seed(1000 * seed + 2)
        samples = draw_exact(MEAN, COVARIANCE, args.samples, generator)
        add(seed, EXACT, "", args.samples, start, measure(samples.mean(0), samples.T.cov()))
        makers = SAMPLERS | {method: maker for method, (maker, _) in REFUSED.items()}
        bar = tqdm([(method, steps) for method in makers for steps in args.steps])
        for method, steps in bar:
            bar.set_description(f"seed {seed}, {method}, {steps} steps")
            start, generator = time.perf_counter(), torch.Generator().manual_seed(1000 * seed + 2)
            samples = draw(makers[method](), steps, args.samples, generator, has_previous=method != NO_PREVIOUS)
            add(seed, method, steps, args.samples, start, measure(samples.mean(0), samples.T.cov()))
        if args.train_steps:
            start, generator = time.perf_counter(), torch.Generator().manual_seed(1000 * seed + 4)
            prior = train(args.train_steps, seed)
            found = measure_training(prior, args.samples, generator)
            add(seed, TRAINING, args.train_steps, args.samples, start, found)
            start, num = time.perf_counter(), max(2, args.samples // 5)
            with torch.no_grad():
                samples = draw(
                    SAMPLERS["DPM++ 2M linspace"](), TRAINED_STEPS, num, generator,
                    lambda x, t, prior=prior: predict_network(prior, x, t, TEXT.expand(len(x), -1)).double(),
                )  # fmt: skip
            found = measure(samples.mean(0), samples.T.cov())
            add(seed, f"{TRAINED}, {args.train_steps} training steps", TRAINED_STEPS, num, start, found)
        write_rows(args.output, rows)

    print(f"{args.samples} samples, seeds {', '.join(map(str, args.seed))}\n")
    print(table(rows, [EXACT, *CLOSED_FORM, *SAMPLERS], args.steps))
    print(f"\nnot for this prior\n\n{table(rows, list(REFUSED), args.steps)}\n")
    print("\n".join(f"- {method}: {reason}" for method, (_, reason) in REFUSED.items()))
    if args.train_steps:
        trained = [row for row in rows if row["method"] == TRAINING]
        sampled = [row for row in rows if row["method"].startswith(TRAINED)]
        print(f"\n{TRAINING} for {args.train_steps} steps\n\n| {' | '.join(LOSSES.values())} |")
        print("|---" * len(LOSSES) + "|")
        print(f"| {' | '.join(f'{mean_of(trained, name):.4f}' for name in LOSSES)} |\n")
        print(table(sampled, [sampled[0]["method"]], [TRAINED_STEPS]))
    gates = check_gates(rows, args.samples)
    print("\ngates, of the worst seed:" if gates else "\nno gate is of these steps")
    for gate, _ in gates:
        print(f"- {gate}")
    print(f"\nwrote {args.output}")
    if not all(holds for _, holds in gates):
        sys.exit(1)


if __name__ == "__main__":
    main()
