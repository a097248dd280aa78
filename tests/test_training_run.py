"""The training run: exact resume, invariance to how a batch is divided, checkpoints, EMA, logs, processes."""

import copy
import doctest
import json
import logging
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from training_worker import Part, arguments, state, tiny_unet, train
from transformers import HfArgumentParser

import diffusers_ext.training_run
from diffusers_ext.data import load_image_dataset
from diffusers_ext.training_run import TrainingArguments, TrainingRun, run_script

WORKER = Path(__file__).parent / "training_worker.py"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} differs by {(value.float() - b[name].float()).abs().max()}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(arguments(folder, checkpointing_steps=1))
    run.final = state(run)
    return run


# -------- arguments


def test_flags_have_the_names_of_diffusers_scripts():
    names = """pretrained_model_name_or_path revision variant cache_dir dataset_name dataset_config_name train_data_dir
    image_column caption_column resolution center_crop random_flip max_train_samples dataloader_num_workers
    train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs learning_rate lr_scheduler
    lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm use_ema mixed_precision
    gradient_checkpointing seed output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    validation_steps num_validation_images report_to logging_dir tracker_project_name push_to_hub hub_model_id
    hub_token""".split()
    text = HfArgumentParser(TrainingArguments).format_help()
    for name in names:
        assert f"--{name}" in text
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        "--dataset_name digits --num_train_epochs 3 --mixed_precision bf16 --use_ema --adam_beta2 0.99".split()
    )
    assert (args.num_train_epochs, args.mixed_precision, args.use_ema, args.adam_beta2) == (3, "bf16", True, 0.99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train_steps": None}, "Neither `max_train_steps` nor `num_train_epochs`"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0, but must be at least 1"),
        ({"train_batch_size": -1}, "`train_batch_size` is -1"),
        ({"max_train_steps": 0}, "`max_train_steps` is 0"),
        ({"checkpoints_total_limit": 0}, "`checkpoints_total_limit` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan"),
        ({"max_grad_norm": math.nan}, "`max_grad_norm` is nan"),
        ({"ema_decay": 1.5}, r"`ema_decay` is 1.5, but must lie in \[0, 1\]"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "use `--lr_scheduler constant_with_warmup`"),
        ({"report_to": "tensorboard,crayon"}, "`report_to` asks for crayon"),
    ],
)
def test_bad_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


# -------- scripts


SCRIPTS = ("train_unconditional", "train_pdae", "train_noisy_classifier")


@pytest.fixture
def script(monkeypatch):
    """Runs a training script as `python training/<name>.py <words>` does; gives its exit status."""

    def run(name, *words):
        path = Path(diffusers_ext.__file__).parents[1] / "training" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(path), run_name="__main__")
        return done.value.code

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_input_of_a_script_is_one_line(name, script, tiny_ddpm_folder, tmp_path, capsys):
    words = ["--max_train_steps", 1, "--pretrained_model_name_or_path", tiny_ddpm_folder, "--report_to", "none"]
    (tmp_path / "used" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for mistake, message in (
        (["--seed", -1], "`seed` is -1"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--train_data_dir", tmp_path / "nowhere", "--resolution", 8], "there is no such folder"),
        (["--dataset_name", "digits", "--output_dir", tmp_path / "used"], "`--resume_from_checkpoint latest`"),
        (["--dataset_name", "digits", "--output_dir", tmp_path / "file"], "File exists"),
        (["--dataset_name", "digits", "--pretrained_model_name_or_path", tmp_path / "nowhere"], "nowhere"),
    ):
        capsys.readouterr()
        assert script(name, *words, *mistake) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("error: ") and message in captured.err.splitlines()[-1]
        assert "Traceback" not in captured.err + captured.out


def test_debug_shows_the_traceback_of_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--max_train_steps", "0", "--debug"])
    with pytest.raises(ValueError, match="`max_train_steps` is 0"):
        run_script(lambda args: None, HfArgumentParser(TrainingArguments))


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt("ended at step 3"), 130), (FloatingPointError("lower it"), 2), (ImportError("tracker"), 2)],
)
def test_what_ends_a_script(error, status, monkeypatch, capsys):
    def main(args):
        assert args.max_train_steps == 3
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "--max_train_steps", "3"])
    with pytest.raises(SystemExit) as done:
        run_script(main, HfArgumentParser(TrainingArguments))
    assert done.value.code == status
    assert capsys.readouterr().err == ("" if status == 130 else "error: ") + f"{error}\n"


def test_a_defect_of_a_script_keeps_its_traceback(monkeypatch):
    def main(args):
        raise RuntimeError("not the user's mistake")

    monkeypatch.setattr(sys, "argv", ["script", "--max_train_steps", "3"])
    with pytest.raises(RuntimeError, match="not the user's mistake"):
        run_script(main, HfArgumentParser(TrainingArguments))


def test_wrong_input_under_accelerate_launch(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    command += ["diffusers_ext.training.train_unconditional", "--max_train_steps", "1", "--seed", "-1"]
    done = subprocess.run(command, cwd=tmp_path, env=worker_env(), capture_output=True, text=True)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: `seed` is -1, but must be at least 0."
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script_says_what_it_does(name, script, capsys):
    assert script(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    described = {
        "train_unconditional": "Train a DDPM (https://huggingface.co/papers/2006.11239)",
        "train_pdae": "an encoder that gives images a semantic code, and a gradient estimator. options:",
        "train_noisy_classifier": "Train the classifier of classifier guidance: one of noisy images",
    }
    assert described[name] in text and "accelerate launch" not in text
    if name != "train_unconditional":  # the parser's complements of what is on by default
        assert "--no-random-flip Turn `--random_flip` off." in text
    if name == "train_pdae":
        assert "--no-use-ema Turn `--use_ema` off." in text
    assert "--random-flip [RANDOM_FLIP] Flip images left to right at random" in text


# -------- exactness of runs


@pytest.mark.parametrize("step", range(1, 7))
def test_resume_is_bit_exact_at_any_step(whole, step, tmp_path):
    shutil.copytree(whole.output_dir / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    set_seed(step)  # nothing may hang on the state that a new process happens to have
    resumed = train(arguments(tmp_path, resume_from_checkpoint="latest"))
    assert_same(state(resumed), whole.final)
    assert resumed.record == whole.record[step:]
    for ours, theirs in zip(resumed.images, whole.images[3 * step :], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpoints_validation_and_average_leave_the_run_as_it_is(whole, tmp_path):
    def sample(run):
        DDPMPipeline(**run.trained(), scheduler=DDPMScheduler())(2, num_inference_steps=2)
        torch.rand(5)

    sampled = train(arguments(tmp_path / "a"), after_step=sample)
    assert_same(state(sampled), whole.final)
    plain = train(arguments(tmp_path / "b", use_ema=False))
    assert_same(state(plain), {name: value for name, value in whole.final.items() if not name.startswith("ema")})


def test_trained_draws_no_random_numbers(whole):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole.trained(), whole.trained(ema=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_run(whole, tmp_path):
    other = train(arguments(tmp_path, seed=1, max_train_steps=1))
    assert other.record[0]["train_loss"] != whole.record[0]["train_loss"]
    assert not torch.equal(other.images[0][0], whole.images[0][0])


def test_workers_do_not_change_the_images(whole, tmp_path):
    run = train(arguments(tmp_path, dataloader_num_workers=2))
    assert_same(state(run), whole.final)


@pytest.mark.parametrize("division", [(1, 12), (12, 1), (6, 2)])
def test_accumulation_equals_one_batch(division, tmp_path):
    def make_model():
        return tiny_unet(dropout=0.0)

    one = train(arguments(tmp_path / "one"), make_model)
    batch_size, accumulation = division
    other = train(
        arguments(tmp_path / "other", train_batch_size=batch_size, gradient_accumulation_steps=accumulation),
        make_model,
    )
    # Images, flips, noise and timesteps are the same to the bit, the sums are rounded in another order.
    for ours, theirs in zip(zip(*one.images, strict=True), zip(*other.images, strict=True), strict=True):
        assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert [r["train_loss"] for r in other.record] == pytest.approx([r["train_loss"] for r in one.record], rel=1e-5)
    for name, value in other.trained(ema=False)["unet"].state_dict().items():
        torch.testing.assert_close(value, one.models["unet"].state_dict()[name], rtol=1e-3, atol=2e-5)


def test_an_epoch_is_every_image_once_in_another_order(tmp_path):
    run = train(arguments(tmp_path, random_flip=False, num_train_epochs=2, max_train_steps=None))
    assert run.max_train_steps == run.step == 5  # 2 epochs of 30 images in steps of 12
    dataset = load_image_dataset("digits", max_samples=30)
    images = [dataset[i]["images"].numpy().tobytes() for i in range(30)]
    seen = [images.index(image.numpy().tobytes()) for batch, *_ in run.images for image in batch]
    assert sorted(seen[:30]) == sorted(seen[30:60]) == list(range(30))
    assert seen[:30] != seen[30:60] and seen[:30] != sorted(seen[:30])


def test_a_data_set_smaller_than_one_step(tmp_path):
    run = train(arguments(tmp_path, max_train_samples=5, max_train_steps=1))
    assert len(run.images) == 3 and math.isfinite(run.record[0]["train_loss"])


def test_noise_is_standard_normal_and_timesteps_are_uniform(tmp_path):
    run = train(arguments(tmp_path, train_batch_size=200, gradient_accumulation_steps=1, max_train_steps=3))
    noise = torch.cat([noise for _, noise, _ in run.images])
    timesteps = torch.cat([timesteps for *_, timesteps in run.images]).double()
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5 and (noise.var() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5
    assert (timesteps.mean() - 499.5).abs() < 4 * 288.7 / len(timesteps) ** 0.5
    rows = torch.corrcoef(torch.cat([noise.flatten(1)[:, :60], timesteps[:, None]], dim=1).T)
    assert (rows - torch.eye(61)).abs().max() < 6 / len(noise) ** 0.5  # neither with each other nor with t


# -------- learning rate, average, logs


def test_the_learning_rate_is_a_function_of_optimizer_steps(whole):
    expected = [0.0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * n / 5) for n in range(5))]  # 2 of warm-up, then cosine
    assert [r["lr"] for r in whole.record] == pytest.approx([1e-3 * factor for factor in expected])


def test_cosine_to_a_minimum(tmp_path):
    args = arguments(tmp_path, lr_scheduler="cosine_with_min_lr", lr_warmup_steps=0, max_train_steps=20)
    run = train(args)
    assert run.record[0]["lr"] == 1e-3
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(2e-5)


def test_average_follows_its_formula(tmp_path):
    average, expected = None, []

    def follow(run):
        nonlocal average
        n, weight = run.step - 1, run.models["unet"].conv_in.weight.detach().double()
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0  # the first average is the first weight
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
        expected.append(average)

    run = train(arguments(tmp_path, ema_decay=0.3), after_step=follow)
    averaged = run.trained()["unet"].conv_in.weight
    torch.testing.assert_close(averaged.double(), expected[-1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(averaged, run.models["unet"].conv_in.weight)
    assert not run.trained()["unet"].training and run.models["unet"].training


def test_no_average_without_use_ema(tmp_path):
    run = train(arguments(tmp_path, use_ema=False, max_train_steps=1))
    assert_same(run.trained()["unet"].state_dict(), run.models["unet"].state_dict())
    with pytest.raises(ValueError, match="pass `--use_ema`"):
        run.trained(ema=True)


def test_one_log_line_for_each_optimizer_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(arguments(tmp_path, report_to="tensorboard", hub_token="hf_secret"))
    run.log_images("samples", [Image.new("L", (8, 8), 200)] * 3)
    run.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "logs" / "diffusers-ext")).Reload()
    for name in ("train_loss", "grad_norm", "lr"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([r[name] for r in run.record])
    image = events.Images("samples")[0]
    assert (image.step, image.width, image.height) == (7, 128, 128)
    for path in tmp_path.rglob("*"):  # the token is in none of the files
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
    assert json.loads((tmp_path / "training_arguments.json").read_text())["train_batch_size"] == 4


def test_logged_loss_is_the_mean_and_bands_are_quarters(tmp_path):
    """One frozen forward pass after the other: the numbers are known."""
    run = TrainingRun(arguments(tmp_path, max_train_steps=1, gradient_accumulation_steps=2))
    model = Part(1)
    run.prepare({"part": model}, load_image_dataset("digits"))
    per_sample = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    timesteps = torch.tensor([[0, 24, 25, 99], [30, 49, 75, 10]])
    for i, _ in enumerate(run.batches()):
        with run.accumulate():
            loss = per_sample[i] + 0 * model(torch.ones(4, 1)).sum()
            stepped = run.optimize(
                loss.mean(),
                per_sample_loss=loss,
                timesteps=timesteps[i],
                num_train_timesteps=100,
                metrics={"extra": torch.tensor(10.0 + i)},
            )
        assert stepped == (i == 1)
    assert run.metrics["train_loss"] == 4.5 and run.metrics["extra"] == 10.5
    bands = {name: value for name, value in run.metrics.items() if name.startswith("train_loss_t")}
    assert bands == {
        "train_loss_t0-24": pytest.approx((1 + 2 + 8) / 3),
        "train_loss_t25-49": pytest.approx((3 + 5 + 6) / 3),
        "train_loss_t75-99": pytest.approx((4 + 7) / 2),
    }


def test_pictures_are_written_and_padded(tmp_path):
    run = TrainingRun(arguments(tmp_path))
    tiles = [Image.fromarray(np.full((8, 8), 40 * i, np.uint8)) for i in range(5)]
    run.step = 12
    run.log_images("digits", tiles)
    grid = Image.open(tmp_path / "samples" / "digits-000012.png")
    assert grid.size == (3 * 64, 2 * 64) and grid.mode == "RGB"
    assert [grid.getpixel((32 + 64 * (i % 3), 32 + 64 * (i // 3)))[0] for i in range(6)] == [0, 40, 80, 120, 160, 255]
    run.log_images("digits", [Image.new("RGB", (100, 80))] * 4, columns=4)
    assert Image.open(tmp_path / "samples" / "digits-000012.png").size == (400, 80)
    with pytest.raises(ValueError, match="`images` of 'none' is empty"):
        run.log_images("none", [])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["digits-000012.png"]


# -------- checkpoints


def test_checkpoints_are_save_pretrained_folders(whole):
    folder = whole.output_dir / "checkpoint-7"
    for name, ema in (("unet", False), ("unet_ema", True)):
        loaded = UNet2DModel.from_pretrained(folder / name)
        assert_same(loaded.state_dict(), whole.trained(ema=ema)["unet"].state_dict())
    weights = [path for path in folder.rglob("*.safetensors") if "unet" not in str(path.parent.name)]
    assert not weights, "each weight is stored once"


def test_limit_keeps_the_newest(tmp_path):
    train(arguments(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-6",
        "checkpoint-7",
        "training_arguments.json",
    ]


def test_missing_checkpoint_starts_anew_with_a_warning(whole, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "diffusers_ext.training_run"):
        run = train(arguments(tmp_path, resume_from_checkpoint="latest"))
    assert "there is no checkpoint yet: starting anew" in caplog.text
    assert_same(state(run), whole.final)


def test_a_named_checkpoint_that_is_not_there_is_refused(tmp_path):
    train(arguments(tmp_path, max_train_steps=2, checkpointing_steps=2))
    for wanted in ("checkpoint-20", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="`resume_from_checkpoint` is .*no such checkpoint.*checkpoint-2"):
            train(arguments(tmp_path, resume_from_checkpoint=wanted, checkpoints_total_limit=1))
    assert (tmp_path / "checkpoint-2").is_dir()


def test_gradient_checkpointing_needs_a_model_that_can(tmp_path):
    with pytest.raises(ValueError, match="`gradient_checkpointing` is set, but none of"):
        TrainingRun(arguments(tmp_path, gradient_checkpointing=True)).prepare(
            {"part": Part()}, load_image_dataset("digits")
        )


def test_existing_checkpoints_are_not_overwritten(whole, tmp_path):
    shutil.copytree(whole.output_dir / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="holds `.*checkpoint-2` of an earlier run.*--resume_from_checkpoint latest"):
        train(arguments(tmp_path))


def test_resume_by_path_goes_back(whole, tmp_path):
    for step in (2, 5):
        shutil.copytree(whole.output_dir / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    args = arguments(tmp_path, resume_from_checkpoint="checkpoint-2", checkpointing_steps=5)
    assert_same(state(train(args)), whole.final)
    moved = shutil.copytree(whole.output_dir / "checkpoint-3", tmp_path / "elsewhere")
    other = train(arguments(tmp_path / "other", resume_from_checkpoint=str(moved)))
    assert_same(state(other), whole.final)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "`learning_rate` 0.001 -> 0.002"),
        ({"seed": 5}, "`seed` 0 -> 5"),
        ({"train_batch_size": 5}, "images per optimizer step 12 -> 15"),
        ({"max_train_samples": 29}, "`max_train_samples` 30 -> 29; training images 30 -> 29"),
        ({"use_ema": False}, "`use_ema` True -> False"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(whole, changes, message, tmp_path):
    checkpoint = str(whole.output_dir / "checkpoint-3")
    with pytest.raises(ValueError, match=message):
        train(arguments(tmp_path, resume_from_checkpoint=checkpoint, **changes))


def test_resume_with_another_division_of_the_step(whole, tmp_path):
    args = arguments(tmp_path, train_batch_size=6, gradient_accumulation_steps=2)
    args.resume_from_checkpoint = str(whole.output_dir / "checkpoint-3")
    resumed = train(args)
    for ours, theirs in zip(zip(*resumed.images, strict=True), zip(*whole.images[9:], strict=True), strict=True):
        assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_a_finished_run_can_be_extended(whole, tmp_path):
    args = arguments(tmp_path, max_train_steps=9, resume_from_checkpoint=str(whole.output_dir / "checkpoint-7"))
    run = train(args)
    assert run.step == 9 and len(run.record) == 2
    done = train(arguments(tmp_path / "done", resume_from_checkpoint=str(whole.output_dir / "checkpoint-7")))
    assert done.step == 7 and not done.record
    assert_same(state(done), whole.final)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "unet_ema/config.json", "optimizer.bin", "training_run.json"]
)
def test_a_damaged_checkpoint_is_named(whole, file, tmp_path):
    for step in (3, 4):
        shutil.copytree(whole.output_dir / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-4" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoint-4` (does not load.*try: checkpoint-3|is not a whole checkpoint)"):
        train(arguments(tmp_path, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("changes", [{"block_out_channels": (16, 16)}, {"dropout": 0.2}])
def test_a_checkpoint_of_another_model_is_refused(whole, changes, tmp_path):
    args = arguments(tmp_path, resume_from_checkpoint=str(whole.output_dir / "checkpoint-3"))
    with pytest.raises(ValueError, match="configured otherwise"):
        train(args, lambda: tiny_unet(**changes))


def test_killed_while_it_saves(tmp_path):
    """SIGKILL in the middle of checkpoint 4: the run goes on from the last whole checkpoint, to the same end."""
    subprocess.run([sys.executable, str(WORKER), "kill", str(tmp_path)], check=True, timeout=300, env=worker_env())
    whole = train(arguments(tmp_path / "whole"))
    for place, left in {"state": 2, "weights": 2, "average": 2, "rename": 2, "delete": 4}.items():
        folder = tmp_path / place
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{left}"], place
        assert list(folder.glob(".checkpoint-*.tmp")), place
        resumed = train(arguments(folder, resume_from_checkpoint="latest"))
        assert resumed.record == whole.record[left:], place
        assert_same(state(resumed), state(whole))
        assert not list(folder.glob(".checkpoint-*.tmp")), place


def test_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original = UNet2DModel.save_pretrained

    def full(self, folder, **kwargs):
        if "checkpoint-4" in str(folder):
            raise OSError(28, "No space left on device")
        original(self, folder, **kwargs)

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        train(arguments(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert train(arguments(tmp_path, resume_from_checkpoint="latest")).step == 7


# -------- what ends a run early


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(whole, value, tmp_path):
    runs = []
    with pytest.raises(FloatingPointError, match=r"at step 3\. The last good checkpoint is `.*checkpoint-2`"):
        train(arguments(tmp_path, checkpointing_steps=2), loss_at={(3, 0): value}, after_step=runs.append)
    saved = UNet2DModel.from_pretrained(tmp_path / "checkpoint-2" / "unet").state_dict()
    assert_same(runs[-1].models["unet"].state_dict(), saved)  # the weights are those of step 2


def test_a_loss_that_is_not_finite_without_checkpoints(tmp_path):
    with pytest.raises(FloatingPointError, match="`train_loss` is nan at step 1.*none was written yet"):
        train(arguments(tmp_path), loss_at={(1, 0): math.nan})


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(max_grad_norm, tmp_path):
    run = TrainingRun(arguments(tmp_path, gradient_accumulation_steps=1, max_grad_norm=max_grad_norm))
    model = Part()
    before = copy.deepcopy(model.state_dict())
    run.prepare({"part": model}, run.load_dataset())
    with pytest.raises(FloatingPointError, match="`grad_norm` is nan at step 1"):
        for batch in run.batches():
            with run.accumulate():
                run.optimize((run.model(batch["images"][:, 0, 0, :4]) * 0).sqrt().sum())  # 0, with gradient inf * 0
    assert_same(model.state_dict(), before)


def test_no_clipping_is_no_clipping(tmp_path):
    def norm(run):
        return run.record[0]["grad_norm"], state(run)

    huge, norm_huge = norm(train(arguments(tmp_path / "a", max_train_steps=3, max_grad_norm=1e9)))
    off, norm_off = norm(train(arguments(tmp_path / "b", max_train_steps=3, max_grad_norm=0)))
    assert huge == off > 0
    assert_same(norm_huge, norm_off)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_goes_on(whole, number, tmp_path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="ended at step 3, which is saved"):
        train(arguments(tmp_path), after_step=lambda run: run.step == 2 and signal.raise_signal(number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = train(arguments(tmp_path, resume_from_checkpoint="latest"))
    assert resumed.record == whole.record[3:]
    assert_same(state(resumed), whole.final)


def test_forgotten_optimize(tmp_path):
    run = TrainingRun(arguments(tmp_path))
    run.prepare({"part": Part()}, load_image_dataset("digits"))
    with pytest.raises(RuntimeError, match="`optimize` has made 0 optimizer steps, but the batches of 1 are over"):
        for _ in run.batches():
            pass


# -------- models that are refused, used


class Together(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, sample):
        return sum(part(sample) for part in self.parts)


def test_several_models_are_trained_in_one_and_saved_apart(tmp_path):
    def go(folder, **changes):
        run = TrainingRun(arguments(folder, max_train_steps=4, **changes))
        first, second = Part(), Part()
        second.linear.bias.requires_grad_(False)
        frozen = second.linear.bias.clone()
        run.prepare(
            {"first": first, "second": second}, run.load_dataset(), train_module=Together(first, nn.Identity(), second)
        )
        for batch in run.batches():
            with run.accumulate():
                run.optimize(run.model(batch["images"][:, 0, 0, :4]).square().mean())
        assert torch.equal(second.linear.bias, frozen)
        return run

    run = go(tmp_path / "a", checkpointing_steps=2)
    folder = run.output_dir / "checkpoint-4"
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"first", "first_ema", "second", "second_ema"}
    for name in ("first", "second"):
        assert_same(Part.from_pretrained(folder / name).state_dict(), run.models[name].state_dict())
        assert_same(Part.from_pretrained(folder / f"{name}_ema").state_dict(), run.trained()[name].state_dict())
    resumed = go(tmp_path / "b", resume_from_checkpoint=str(run.output_dir / "checkpoint-2"))
    for ema in (False, True):
        for name, model in run.trained(ema=ema).items():
            assert_same(resumed.trained(ema=ema)[name].state_dict(), model.state_dict())


def test_models_that_do_not_fit(tmp_path):
    run = TrainingRun(arguments(tmp_path))
    dataset = load_image_dataset("digits")
    first, second = Part(), Part()
    with pytest.raises(ValueError, match="pass the one `train_module`"):
        run.prepare({"first": first, "second": second}, dataset)
    with pytest.raises(ValueError, match=r"`train_module` does not contain \['second'\]"):
        run.prepare({"first": first, "second": second}, dataset, train_module=Together(first))
    with pytest.raises(ValueError, match=r"trains \['parts.1.linear.weight', .*would not be saved"):
        run.prepare({"first": first}, dataset, train_module=Together(first, second))
    with pytest.raises(ValueError, match="nothing to train"):
        run.prepare({"first": Part().requires_grad_(False)}, dataset)
    with pytest.raises(TypeError, match="no `save_pretrained` and `from_pretrained`"):
        run.prepare({"first": nn.Linear(2, 2)}, dataset)
    with pytest.raises(TypeError, match="must have a length"):
        run.prepare({"first": first}, iter(dataset))
    with pytest.raises(ValueError, match="`dataset` is empty"):
        run.prepare({"first": first}, torch.utils.data.Subset(dataset, []))


def test_a_parameter_without_part_in_the_loss_is_named(tmp_path):
    run = TrainingRun(arguments(tmp_path, gradient_accumulation_steps=1))
    first, second = Part(), Part()
    run.prepare({"first": first, "second": second}, load_image_dataset("digits"), train_module=Together(first, second))
    with pytest.raises(ValueError, match=r"2 trained parameters take no part.*parts.1.linear.weight"):
        for _ in run.batches():
            with run.accumulate():
                run.optimize(first(torch.ones(4)).sum())


def test_bfloat16_and_a_second_run_of_another_precision(whole, tmp_path):
    half = train(arguments(tmp_path / "half", mixed_precision="bf16"))
    assert half.accelerator.mixed_precision == "bf16"
    losses = [r["train_loss"] for r in half.record]
    assert losses != [r["train_loss"] for r in whole.record]
    assert losses == pytest.approx([r["train_loss"] for r in whole.record], rel=0.05)
    assert half.models["unet"].conv_in.weight.dtype == torch.float32
    again = train(arguments(tmp_path / "again"))  # neither precision nor accumulation of the run before
    assert_same(state(again), whole.final)


def test_gradient_checkpointing_changes_nothing_but_memory(whole, tmp_path):
    assert_same(state(train(arguments(tmp_path, gradient_checkpointing=True))), whole.final)


@pytest.mark.skipif(shutil.which("g++") is None, reason="`torch.compile` needs a C++ compiler")
def test_torch_compile(tmp_path):
    def go(folder, **changes):
        run = TrainingRun(arguments(folder, max_train_steps=3, checkpointing_steps=3, **changes))
        run.prepare({"part": Part()}, run.load_dataset())
        for batch in run.batches():
            with run.accumulate():
                run.optimize(run.model(batch["images"][:, 0, 0, :4]).square().mean())
        return run

    plain, compiled = go(tmp_path / "a"), go(tmp_path / "b", torch_compile=True)
    assert compiled.models["part"]._compiled_call_impl is not None
    saved = Part.from_pretrained(compiled.output_dir / "checkpoint-3" / "part").state_dict()
    for name, value in plain.models["part"].state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


# -------- finish


def test_finish_saves_a_pipeline_that_loads(tmp_path, capsys):
    run = train(arguments(tmp_path))
    run.finish(DDPMPipeline(**run.trained(), scheduler=DDPMScheduler()), {"license": "cc-by-4.0"})
    assert capsys.readouterr().out == f"The DDPMPipeline is saved in {tmp_path}.\n"
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert_same(loaded.unet.state_dict(), run.trained()["unet"].state_dict())
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc-by-4.0"
    numbers = json.loads((tmp_path / "training_metrics.json").read_text())
    assert numbers["steps"] == 7 and numbers["images_seen"] == 84 and numbers["seconds"] > 0
    assert numbers["metrics"]["train_loss"] == run.record[-1]["train_loss"]


def test_finish_keeps_a_card_written_by_hand_and_replaces_its_own(tmp_path):
    def finish(folder, steps):
        run = train(arguments(folder, max_train_steps=1))
        run.finish(DDPMPipeline(**run.trained(), scheduler=DDPMScheduler()), {"training": {"steps": steps}})
        return (folder / "README.md").read_text()

    assert "| steps | first |" in finish(tmp_path, "first")
    assert "| steps | second |" in finish(tmp_path, "second")
    (tmp_path / "README.md").write_text("# Mine")
    card = finish(tmp_path, "third")
    assert card.endswith("# Mine") and "unconditional-image-generation" in card  # the text stays, metadata is added


def test_a_failed_save_keeps_the_pipeline_that_was_there(tmp_path, monkeypatch):
    run = train(arguments(tmp_path, max_train_steps=1))
    run.finish(DDPMPipeline(**run.trained(), scheduler=DDPMScheduler()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    run = train(arguments(tmp_path, max_train_steps=2))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DDPMScheduler, "save_pretrained", full)  # after the U-Net has been written
    with pytest.raises(OSError, match="No space left"):
        run.finish(DDPMPipeline(**run.trained(), scheduler=DDPMScheduler()))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    DDPMPipeline.from_pretrained(tmp_path)


# -------- several processes


def worker_env():
    path = os.pathsep.join([str(Path(diffusers_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}


def test_two_processes(tmp_path):
    """What both processes find is asserted in `training_worker.py`; here they are compared with one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), "two_processes", str(tmp_path)],
        env=worker_env(),
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = torch.load(tmp_path / "two.pt")
    one = train(arguments(tmp_path / "one", max_train_steps=5, train_batch_size=4), lambda: tiny_unet(dropout=0.0))
    # The schedule ends with the run: its horizon counts optimizer steps, not steps of all processes together.
    assert [r["lr"] for r in two["record"]] == [r["lr"] for r in one.record]
    for name in ("train_loss", "grad_norm", "train_loss_t0-249"):
        assert [r[name] for r in two["record"]] == pytest.approx([r[name] for r in one.record], rel=1e-4)
    for name, value in state(one).items():
        if name.startswith("unet"):
            torch.testing.assert_close(two["state"][name], value, rtol=1e-3, atol=2e-5)


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(diffusers_ext.training_run)
    assert result.attempted > 10 and result.failed == 0
