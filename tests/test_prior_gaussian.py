"""unCLIP's prior where everything is known: recorded numbers, exact identities, and the benchmark's figures."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from diffusers_ext.pipelines.unclip_prior import check_prior_scheduler

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests/goldens/unclip"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / name) as file:
        return {key: torch.from_numpy(array) for key, array in file.items()}


TRUTH, KARLO = load("g9_gaussian_truth.npz"), load("g2_karlo_prior_sampling.npz")
MEASURED = json.loads((GOLDENS / "g9_scheduler_mc_results.json").read_text())
NUM_SAMPLES = 20_000

spec = importlib.util.spec_from_file_location("prior_gaussian", ROOT / "benchmarks/prior_gaussian.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------- recorded numbers


def test_the_gaussian_is_that_recorded() -> None:
    recorded = {"A": bench.A, "b": bench.B, "S": bench.COVARIANCE, "mt": bench.TEXT_MEAN,
                "St": bench.TEXT_COVARIANCE, "zt": bench.TEXT}  # fmt: skip
    for name, array in recorded.items():
        assert torch.equal(array, TRUTH[name])
    close(bench.MEAN, TRUTH["m"], 1e-10)
    close(bench.BLIND_MEAN, TRUTH["uncond_mean"], 1e-10)
    close(bench.BLIND_COVARIANCE, TRUTH["uncond_cov"], 1e-10)
    close(bench.LEVELS, TRUTH["alphas_cumprod"], 1e-10)


def test_floors_of_the_loss_are_those_recorded() -> None:
    for name, covariance in (("bayes", bench.COVARIANCE), ("uncond", bench.BLIND_COVARIANCE)):
        errors = [bench.posterior_covariance(level, covariance).trace() / bench.DIM for level in bench.LEVELS]
        close(torch.stack(errors), TRUTH[f"{name}_mse_per_t"], 1e-10)


@pytest.mark.parametrize("steps", [10, 25, 64, 100, 1000])
@pytest.mark.parametrize("variance", bench.VARIANCES)
def test_laws_are_those_recorded(variance: str, steps: int) -> None:
    mean, covariance = bench.ancestral_law(steps, variance)
    name = "analytic_iso" if variance == "analytic" else variance
    close(mean, TRUTH[f"{name}/{steps}/mean"], 1e-10)
    close(covariance, TRUTH[f"{name}/{steps}/cov"], 1e-10)
    if variance == "exact":
        close(covariance, bench.COVARIANCE, 1e-6)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("steps", [10, 25])
def test_laws_with_guidance_are_those_recorded(scale: int, steps: int) -> None:
    mean, covariance = bench.ancestral_law(steps, guidance_scale=scale)
    close(mean, TRUTH[f"cfg{scale}/{steps}/mean"], 1e-10)
    close(covariance, TRUTH[f"cfg{scale}/{steps}/cov"], 1e-10)


def karlo_loop(tag: str, monkeypatch: pytest.MonkeyPatch, **changes: str) -> torch.Tensor:
    """The recorded points by the loop of `DDPMScheduler`, each step given its noise."""
    steps, scale, clamp = (int(part.lstrip("nwclamp")) for part in tag.split("_"))
    settings = {"timestep_spacing": "linspace", "variance_type": "fixed_small_log"} | changes
    scheduler = DDPMScheduler(**bench.COSINE, clip_sample=True, clip_sample_range=clamp, **settings)
    scheduler.set_timesteps(steps)
    noise = iter(KARLO[f"{tag}/noise"])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(noise))
    if not changes:
        assert torch.equal(scheduler.timesteps, KARLO[f"{tag}/timesteps"])
    sample, samples = KARLO[f"{tag}/x_T"], []
    for timestep in scheduler.timesteps:
        clean = bench.predict_clean(sample.double(), bench.LEVELS[timestep], KARLO["zt"], scale).float()
        sample = scheduler.step(clean, timestep, sample).prev_sample
        samples.append(sample)
    return torch.stack(samples)


TAGS = ["n10_w1_clamp10", "n10_w4_clamp10", "n10_w4_clamp1", "n25_w1_clamp10", "n25_w4_clamp10", "n25_w4_clamp1"]


@pytest.mark.parametrize("tag", TAGS)
def test_karlos_loop_is_that_recorded(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = karlo_loop(tag, monkeypatch)
    close(samples, KARLO[f"{tag}/x_steps"], 1e-5)
    close(samples[-1] * KARLO["clip_std"] + KARLO["clip_mean"], KARLO[f"{tag}/image_embeds"].double(), 2e-5)


@pytest.mark.parametrize(
    "changes", [{"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"variance_type": "fixed_large"}]
)
def test_another_loop_is_another(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = karlo_loop("n10_w4_clamp10", monkeypatch, **changes)
    assert (samples - KARLO["n10_w4_clamp10/x_steps"]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------ samplers


RECORDED = {
    "DDPM linspace, fixed_small_log": "DDPM linspace fixed_small_log",
    "UnCLIP with prev_timestep": "UnCLIP+prev",
    "DDIM trailing": "DDIM eta0 trailing",
    "DPM++ 2M linspace": "DPM++2M linspace",
    "SDE-DPM++ 2M linspace": "SDE-DPM++2M linspace",
    "DDIM leading": "DDIM eta0 leading",
    "DDIM linspace": "DDIM eta0 linspace",
    "UnCLIP without prev_timestep": "UnCLIP NO prev",
    "DDPM of UnCLIP's settings": "DDPM.from_config(karlo json): linear betas",
}
MAKERS = bench.SAMPLERS | {method: maker for method, (maker, _) in bench.REFUSED.items()}


def samples_of(method: str, steps: int, num_samples: int = NUM_SAMPLES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return bench.draw(MAKERS[method](), steps, num_samples, generator, has_previous=method != bench.NO_PREVIOUS)


def figures(samples: torch.Tensor) -> dict[str, float]:
    return bench.measure(samples.mean(0), samples.T.cov())


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("method", RECORDED)
def test_figures_are_those_recorded(method: str, steps: int) -> None:
    samples, recorded = samples_of(method, steps), MEASURED[f"mc/{RECORDED[method]}/{steps}"]
    found = figures(samples)
    # About four standard deviations.
    largest = (samples.mean(0) - bench.MEAN).abs().max().item()  # what was recorded
    assert largest == pytest.approx(recorded["mean_err"], abs=0.02)
    assert found["covariance_error"] == pytest.approx(recorded["cov_rel"], abs=0.03, rel=0.03)
    assert found["trace_ratio"] == pytest.approx(recorded["trace_ratio"], abs=0.03, rel=0.02)


def test_exact_samples_are_the_floor() -> None:
    samples = bench.draw_exact(bench.MEAN, bench.COVARIANCE, NUM_SAMPLES, torch.Generator().manual_seed(1))
    found = figures(samples)
    deviation = (bench.COVARIANCE.diag().max() / NUM_SAMPLES) ** 0.5
    assert found["mean_error"] * bench.MEAN.norm() < 4 * deviation
    assert found["covariance_error"] < 5 * (bench.DIM / NUM_SAMPLES) ** 0.5
    assert bench.measure(bench.MEAN, bench.COVARIANCE) == {
        "mean_error": 0, "covariance_error": 0, "trace_ratio": 1
    }  # fmt: skip


def test_ancestral_samples_have_the_law_in_closed_form() -> None:
    for method in ("DDPM linspace, fixed_small_log", "UnCLIP with prev_timestep"):
        samples = samples_of(method, 25)
        mean, covariance = bench.ancestral_law(25)
        close(samples.mean(0), mean, 0.03)
        assert (samples.T.cov() - covariance).norm() / covariance.norm() < 5 * (bench.DIM / NUM_SAMPLES) ** 0.5
    assert bench.measure(mean, covariance)["trace_ratio"] == pytest.approx(0.814, abs=1e-3)


def test_the_solver_keeps_the_variance_and_ancestral_sampling_does_not() -> None:
    solver = figures(samples_of("DPM++ 2M linspace", 25))
    ancestral = figures(samples_of("DDPM linspace, fixed_small_log", 25))
    assert solver["covariance_error"] < 0.03 and 0.97 < solver["trace_ratio"] < 1.03
    assert ancestral["covariance_error"] > 0.15 and ancestral["trace_ratio"] < 0.83


@pytest.mark.parametrize("method", MAKERS)
def test_the_pipeline_takes_the_samplers_and_refuses_the_others(method: str) -> None:
    scheduler = MAKERS[method]()
    if method in bench.REFUSED and method != bench.NO_PREVIOUS:  # of which the pipeline tells the previous one
        with pytest.raises(ValueError, match="`scheduler`"):
            check_prior_scheduler(scheduler)
    else:
        check_prior_scheduler(scheduler, num_inference_steps=100)


def test_second_order_overshoots() -> None:
    assert figures(samples_of("Heun trailing", 25, 500))["trace_ratio"] > 5


# ------------------------------------------------------------------------------------------------------------ training


def test_training_starts_above_the_text_blind_error_and_falls() -> None:
    prior = bench.train(120, seed=0)
    assert sum(parameter.numel() for parameter in prior.parameters()) == 109_580
    assert not prior.clip_mean.requires_grad and torch.equal(prior.clip_std, torch.ones(1, 4))
    found = bench.measure_training(prior, 20_000, torch.Generator().manual_seed(1))
    # Errors of finite samples of the same pairs.
    assert found["bayes_error"] == pytest.approx(TRUTH["bayes_mse_per_t"].mean().item(), rel=0.02)
    assert found["blind_error"] == pytest.approx(TRUTH["uncond_mse_per_t"].mean().item(), rel=0.02)
    assert found["loss"] == pytest.approx(found["to_bayes"] * found["bayes_error"])
    assert found["loss"] == pytest.approx(found["to_blind"] * found["blind_error"])
    assert 0.99 < found["to_bayes"] < 1.2 and found["to_blind"] < 0.9
    early = bench.measure_training(bench.train(20, seed=0), 20_000, torch.Generator().manual_seed(1))
    assert early["to_bayes"] > 1.3  # far outside what the gate allows


def test_the_network_is_causal() -> None:
    """The query is the last of the four tokens; an earlier one does not see what comes after it."""
    prior = bench.train(20, seed=0)
    seen = []
    hook = prior.transformer_blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    text_embeds, _, timesteps, sample = bench.noised_pairs(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for noisy in (sample, sample + 1):
            bench.predict_network(prior, noisy, timesteps, text_embeds)
    hook.remove()
    assert torch.equal(seen[0][:, :2], seen[1][:, :2])
    assert (seen[0][:, 2:] - seen[1][:, 2:]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "table.csv"
    bench.main(["--samples", "4000", "--steps", "10", "25", "--train_steps", "20", "--output", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("holds") == 2 + 2 * 2 * 2 and "FAILS" not in printed  # training was too short for its gates
    first, second = printed.split("not for this prior")
    assert all(f"\n| {method} | " in first for method in (bench.EXACT, *bench.CLOSED_FORM, *bench.SAMPLERS))
    assert all(f"\n| {name} | " in second and f"\n- {name}: {reason}\n" in second
               for name, (_, reason) in bench.REFUSED.items())  # fmt: skip
    with path.open(newline="") as file:
        rows = {(row["method"], row["steps"]): row for row in csv.DictReader(file)}
    assert len(rows) == 1 + 2 * len(bench.CLOSED_FORM | MAKERS) + 2
    assert float(rows["closed form, fixed_small", "25"]["trace_ratio"]) == pytest.approx(0.81441)
    assert float(rows[bench.NO_PREVIOUS, "25"]["trace_ratio"]) > 2
    assert float(rows["training", "20"]["to_bayes"]) > 1.3
    assert rows["trained prior, 20 training steps", "25"]["num_samples"] == "800"
    assert rows[bench.EXACT, ""]["command"].startswith("python benchmarks/prior_gaussian.py --samples 4000")

    bench.main(["--samples", "50", "--steps", "7", "--train_steps", "0", "--seed", "3", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "no gate is of these steps" in printed and "training for" not in printed
    with path.open(newline="") as file:
        later = list(csv.DictReader(file))
    assert all(row in later for row in rows.values())  # what was there stays
    assert len(later) == len(rows) + 1 + len(bench.CLOSED_FORM | MAKERS)
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def gate_rows(**changes: float) -> list[dict[str, str]]:
    """Rows at 25 steps by the truth: an exact solver, ancestral sampling with its loss, a training at the floor."""
    law = bench.measure(*bench.ancestral_law(25))
    exact = {"mean_error": 0.0, "covariance_error": 0.0, "trace_ratio": 1.0}
    found = {"DPM++ 2M linspace": exact, "closed form, fixed_small": law, "DDPM linspace, fixed_small_log": law,
             "UnCLIP with prev_timestep": law, "training": {"to_bayes": 1.0, "to_blind": 0.74}}  # fmt: skip
    rows = []
    for method, values in found.items():
        own = {figure: value for name, value in changes.items()
               for prefix, _, figure in [name.partition("__")] if method.startswith(prefix)}  # fmt: skip
        steps = "1500" if method == "training" else "25"
        rows.append({"method": method, "steps": steps} | {key: str(value) for key, value in (values | own).items()})
    return rows


def test_gates_hold_for_the_truth() -> None:
    gates = bench.check_gates(gate_rows(), bench.GATE_SAMPLES)
    assert len(gates) == 2 + 4 + 2 and all(holds for _, holds in gates)


@pytest.mark.parametrize(
    "change",
    [
        {"DPM__covariance_error": 0.021},
        {"DPM__covariance_error": float("nan")},
        {"DPM__trace_ratio": 0.96},
        {"DPM__trace_ratio": 1.04},
        {"DDPM__trace_ratio": 1.0},
        {"DDPM__trace_ratio": 0.79},
        {"UnCLIP__covariance_error": 0.0},
        {"UnCLIP__trace_ratio": 2.42},
        {"training__to_bayes": 1.06},
        {"training__to_bayes": 0.98},  # below the floor, which only leaking gives
        {"training__to_blind": 0.81},
    ],
)
def test_gates_can_fail(change: dict) -> None:
    gates = bench.check_gates(gate_rows(**change), bench.GATE_SAMPLES)
    assert [holds for _, holds in gates].count(False) == 1


def test_failing_gates_are_told_by_the_exit_status(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(bench.SAMPLERS, "DPM++ 2M linspace", bench.REFUSED["DDPM of UnCLIP's settings"][0])
    arguments = ["--samples", "2000", "--steps", "25", "--train_steps", "0", "--output", str(tmp_path / "table.csv")]
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 1 and (tmp_path / "table.csv").is_file()
    assert capsys.readouterr().out.count("FAILS") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1"], "--samples is 1, but must be at least 2"),
        (["--steps", "25", "1"], "--steps is 1, but must be from 2 to"),
        (["--steps", "2000"], "--steps is 2000"),
        (["--train_steps", "5"], "--train_steps is 5, but must be 0 or at least 20"),
        (["--train_steps", "-1"], "--train_steps is -1, but must be 0 or at least 20"),
        (["--output", "/nowhere/table.csv"], "its folder does not exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--output", str(tmp_path / "table.csv"), *arguments])
    assert message in capsys.readouterr().err


def test_an_output_that_is_no_table_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "other.csv").write_text("seed,figure\n0,1\n")
    for path in (tmp_path, tmp_path / "other.csv"):
        with pytest.raises(SystemExit):
            bench.main(["--output", str(path)])
        assert "which is no table of this benchmark" in capsys.readouterr().err
    assert (tmp_path / "other.csv").read_text() == "seed,figure\n0,1\n"
