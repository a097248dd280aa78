"""Classifier guidance where everything is known: recorded numbers, exact identities, and the benchmark's figures."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_ext import ClassifierGradient, GuidedScheduler

ROOT = Path(__file__).parents[1]
with np.load(ROOT / "tests/goldens/guidance/gmm.npz") as file:
    GOLDEN = {name: torch.from_numpy(array) for name, array in file.items()}
NUM_SAMPLES = 1000

spec = importlib.util.spec_from_file_location("guidance_gmm", ROOT / "benchmarks/guidance_gmm.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
LABELS = torch.arange(bench.NUM_CLASSES).repeat_interleave(NUM_SAMPLES)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def trajectory(respacing, noise, *, guided=True, scale=1.0, form="mean", eta=0.0, **settings):
    """The recorded points from `x_T` to the end, each step given its noise; unguided ones of the conditional model."""
    scheduler = GuidedScheduler(clip_sample=False, **settings)
    scheduler.set_timesteps(timestep_respacing=respacing)
    kind = scheduler.config.prediction_type
    sample, labels, samples = GOLDEN["x_T"], GOLDEN["y"], []
    cond_fn = bench.guide(labels)
    for timestep, draws in zip(scheduler.timesteps, noise, strict=True):
        level = bench.LEVELS[timestep]
        output = bench.predict_noise(sample, level, None if guided else labels)
        if kind != "epsilon":
            clean = (sample - (1 - level).sqrt() * output) / level.sqrt()
            output = clean if kind == "sample" else level.sqrt() * output - (1 - level).sqrt() * clean
        if scheduler.config.variance_type == "learned_range":
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        options = {"gradient": scale * cond_fn(sample, timestep), "guidance_form": form} if guided else {}
        sample = scheduler.step(output, timestep, sample, eta=eta, variance_noise=draws, **options).prev_sample
        samples.append(sample)
    return torch.stack(samples)


# --------------------------------------------------------------------------------------------------- recorded numbers


def test_closed_forms_are_those_recorded() -> None:
    for name in ("means", "variances", "weights", "component_class"):
        assert torch.equal(getattr(bench, name.upper()), GOLDEN[name])
    for label, prior in enumerate(bench.CLASS_PRIORS):
        close(prior.mean, GOLDEN["class_mean"][label], 1e-12)
        close(prior.covariance, GOLDEN["class_cov"][label], 1e-12)
    points = GOLDEN["x"]
    for index, level in enumerate(GOLDEN["abar"]):
        close(bench.predict_noise(points, level), GOLDEN["eps_uncond"][index], 1e-12)
        log_probabilities = bench.class_logits(points, level).log_softmax(1)
        for label in range(bench.NUM_CLASSES):
            labels = torch.full((len(points),), label)
            close(bench.predict_noise(points, level, labels), GOLDEN["eps_cond"][index, label], 1e-12)
            close(log_probabilities[:, label], GOLDEN["logp_y"][index, label], 1e-12)
            gradient = ClassifierGradient(bench.class_logits, labels)(points, level)
            close(gradient, GOLDEN["grad_logp_y"][index, label], 1e-12)
            # Bayes: the noise of the class is the guided noise of all
            guided = bench.predict_noise(points, level) - (1 - level).sqrt() * gradient
            close(guided, GOLDEN["eps_cond"][index, label], 1e-12)


@pytest.mark.parametrize("scale", [1, 3])
def test_trajectories_are_those_recorded(scale: int) -> None:
    ancestral = {"scale": scale, "variance_type": "learned_range"}
    ddim = trajectory("ddim25", GOLDEN["noise_ddim25"], scale=scale, sampler="ddim")
    mean = trajectory("25", GOLDEN["noise_25"], **ancestral)
    epsilon = trajectory("25", GOLDEN["noise_25"], form="epsilon", **ancestral)
    close(ddim, GOLDEN[f"traj_ddim25_s{scale}"], 1e-10)
    close(mean, GOLDEN[f"traj_anc25_sigma_s{scale}"], 1e-10)
    close(epsilon, GOLDEN[f"traj_anc25_epsshift_s{scale}"], 1e-10)
    assert (mean - epsilon).abs().max() > 0.05  # the forms differ


# --------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(
    "settings",
    [
        {"respacing": "ddim25", "sampler": "ddim"},
        {"respacing": "ddim25", "sampler": "ddim", "eta": 1.0},
        {"respacing": "10,10,5", "sampler": "ddim"},
        {"respacing": "25", "form": "epsilon", "variance_type": "fixed_small"},
        {"respacing": "25", "form": "epsilon", "variance_type": "fixed_large"},
        {"respacing": "25", "form": "epsilon", "variance_type": "learned_range"},
    ],
)
def test_exact_guidance_is_the_conditional_model(settings: dict) -> None:
    noise = GOLDEN["noise_25"]
    close(trajectory(noise=noise, **settings), trajectory(noise=noise, guided=False, **settings), 1e-10)
    assert not torch.allclose(
        trajectory(noise=noise, **settings), trajectory(noise=noise, scale=1.01, **settings), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize(
    "settings",
    [
        {"respacing": "ddim25", "sampler": "ddim"},
        {"respacing": "ddim25", "sampler": "ddim", "eta": 0.7},
        {"respacing": "25", "form": "mean", "variance_type": "learned_range"},
        {"respacing": "25", "form": "epsilon", "variance_type": "learned_range"},
        {"respacing": "25", "form": "mean", "variance_type": "fixed_large"},
    ],
)
def test_prediction_types_give_one_trajectory(settings: dict, prediction_type: str) -> None:
    settings = settings | {"noise": GOLDEN["noise_25"], "scale": 2.0}
    close(trajectory(prediction_type=prediction_type, **settings), trajectory(**settings), 1e-10)


# ---------------------------------------------------------------------------------------------------------- benchmark


def figures(method, steps, cond_fn=None, scale=1.0):
    """The benchmark's figures of a few samples, optionally with another gradient than the right one."""
    settings, form = bench.METHODS[method]
    generator = torch.Generator().manual_seed(0)
    scheduler = bench.make_scheduler(settings, steps)
    samples = bench.draw(scheduler, LABELS, generator, cond_fn or bench.guide(LABELS), scale, form)
    return bench.measure(samples, bench.draw_exact(NUM_SAMPLES, generator))


def wrong(name, method, steps):
    """The gradient that makes of a right step the step of a program with a known mistake."""
    right, scheduler = bench.guide(LABELS), bench.make_scheduler(bench.METHODS[method][0], steps)
    places = {int(t): len(scheduler.timesteps) - 1 - index for index, t in enumerate(scheduler.timesteps)}

    def variance(timestep: torch.Tensor) -> torch.Tensor:
        return scheduler.log_variance(int(timestep), torch.zeros(1, dtype=torch.float64))[0]

    return {
        "no Sigma": lambda x, t: right(x, t) / variance(t),
        "standard deviation for variance": lambda x, t: right(x, t) / variance(t) ** 0.5,
        "sign": lambda x, t: -right(x, t),
        "index for timestep": lambda x, t: right(x, torch.tensor(places[int(t)])),
        "no sqrt(1 - abar)": lambda x, t: right(x, t) / (1 - bench.LEVELS[t]).sqrt(),
        "classifier of clean images": lambda x, t: right(x, torch.tensor(0)),
    }[name]


def within(found: dict[str, float], mean: float, cov: float, distance: float) -> bool:
    """Whether errors are below limits."""
    errors = ("mean_error", "covariance_error", "sliced_wasserstein")
    return all(found[error] <= limit for error, limit in zip(errors, (mean, cov, distance), strict=True))


LIMITS = {("mean form, mid", 100): (0.08, 0.2, 0.08), ("DDIM", 100): (0.08, 0.25, 0.08)}


@pytest.mark.parametrize(("method", "steps"), LIMITS)
def test_right_guidance_is_within_the_limits(method: str, steps: int) -> None:
    assert within(figures(method, steps), *LIMITS[method, steps])


@pytest.mark.parametrize(
    ("mistake", "method", "steps"),
    [
        ("no Sigma", "mean form, mid", 100),
        ("standard deviation for variance", "mean form, mid", 100),
        ("sign", "mean form, mid", 100),
        ("classifier of clean images", "mean form, mid", 100),
        ("index for timestep", "DDIM", 100),
        ("no sqrt(1 - abar)", "DDIM", 100),
        ("sign", "DDIM", 100),
    ],
)
def test_figures_tell_mistakes(mistake: str, method: str, steps: int) -> None:
    assert not within(figures(method, steps, wrong(mistake, method, steps)), *LIMITS[method, steps])


def test_scale_trades_spread_for_probability() -> None:
    found = [figures("mean form, mid", 50, scale=scale) for scale in (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)]
    probabilities, spreads = ([row[name] for row in found] for name in ("probability", "spread"))
    assert probabilities == sorted(probabilities) and spreads == sorted(spreads, reverse=True)
    assert probabilities[0] == pytest.approx(1 / 3, abs=0.02) and probabilities[-1] > 0.998


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SWEEP_STEPS", 25)
    path = tmp_path / "table.csv"
    bench.main(["--samples", "1000", "--steps", "25", "250", "--scales", "0", "1", "--output", str(path),
                "--methods", "mean form, mid", "epsilon form, mid"])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("holds") == len(bench.GATES) and "FAILS" not in printed
    assert "| steps 25 | steps 250 |" in printed and "| scale 0 | scale 1 |" in printed
    assert printed.count("\n| mean form, mid | 0.") == 2 and f"\n| {bench.EXACT} | 0." in printed
    with path.open(newline="") as file:
        rows = {(row["method"], row["steps"], row["scale"]): row for row in csv.DictReader(file)}
    assert len(rows) == 1 + 2 * 2 + 1 and {row["seed"] for row in rows.values()} == {"0"}
    assert float(rows["mean form, mid", "25", "1"]["probability"]) < 0.85  # first order guides too little
    assert float(rows["mean form, mid", "25", "0"]["probability"]) < 0.4
    assert rows[bench.EXACT, "", ""]["command"].startswith("python benchmarks/guidance_gmm.py --samples 1000")

    bench.main(["--samples", "50", "--steps", "10", "--scales", "--seed", "3", "--output", str(path),
                "--methods", "DDIM", "conditional, DDIM"])  # fmt: skip
    assert "no gate is of these methods and steps" in capsys.readouterr().out
    with path.open(newline="") as file:
        later = list(csv.DictReader(file))
    assert len(later) == len(rows) + 3 and all(row in later for row in rows.values())  # what was there stays
    guided, oracle = ([row[figure] for figure in bench.FIGURES] for row in later if "DDIM" in row["method"])
    assert guided == oracle  # from the same noise
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_failing_gates_are_told_by_the_exit_status(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench, "GATES", [("mean form, mid", 10, "mean_error", 0.001)])
    arguments = ["--samples", "50", "--steps", "10", "--scales", "--methods", "mean form, mid"]
    with pytest.raises(SystemExit) as error:
        bench.main([*arguments, "--output", str(tmp_path / "table.csv")])
    assert error.value.code == 1 and (tmp_path / "table.csv").is_file()
    assert "FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1"], "--samples is 1, but must be at least 2"),
        (["--steps", "1"], "--steps is 1, but must be from 2 to 1000"),
        (["--steps", "25", "41"], "gives exactly 41"),
        (["--methods", "Magic"], "invalid choice: 'Magic'"),
        (["--output", "/nowhere/table.csv"], "its folder does not exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--output", str(tmp_path / "table.csv"), *arguments])
    assert message in capsys.readouterr().err
