"""What the training tests run in processes of their own: `python training_worker.py <job> <folder>`."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.distributed import fsdp

from diffusers_ext.training_run import TrainingArguments, TrainingRun

torch.set_num_threads(1)


def arguments(output_dir, **changes):
    """Seven optimizer steps of 3 x 4 images out of 30: the epochs end in the middle of an accumulation."""
    defaults = dict(
        dataset_name="digits", max_train_samples=30, random_flip=True, train_batch_size=4, max_train_steps=7,
        gradient_accumulation_steps=3, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=2, use_ema=True,
        checkpointing_steps=0, validation_steps=0, report_to="none", output_dir=str(output_dir),
    )  # fmt: skip
    return TrainingArguments(**(defaults | changes))


def tiny_unet(**changes):
    config = dict(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), dropout=0.1,
    )  # fmt: skip
    return UNet2DModel(**(config | changes))


def train(args, make_model=tiny_unet, loss_at=None, after_step=lambda run: None):
    """A script's loop. The run it returns also has `record`: losses, rates and the images of each optimizer step."""
    run = TrainingRun(args)
    dataset = run.load_dataset("train")
    run.prepare({"unet": make_model()}, dataset)
    run.record, run.images = [], []
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            noise, timesteps = run.randn_like(images), run.randint(1000)
            alpha = (1 - timesteps / 1000).view(-1, 1, 1, 1)
            noisy_images = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
            error = run.model(noisy_images, timesteps).sample - noise
            per_sample_loss = error.square().flatten(1).mean(1)
            loss = per_sample_loss.mean()
            if loss_at is not None:
                loss = loss * loss_at.get((run.step + 1, run.accelerator.process_index), 1.0)
            stepped = run.optimize(loss, per_sample_loss=per_sample_loss, timesteps=timesteps)
        run.images.append((images, noise, timesteps))
        if stepped:
            run.record.append({"step": run.step, **run.metrics})
            after_step(run)
    return run


def state(run):
    """Every number that the rest of a run depends on, and the averaged weights."""
    numbers = {f"unet.{name}": value for name, value in run.models["unet"].state_dict().items()}
    if run.ema is not None:
        numbers |= {f"ema.{i}": value for i, value in enumerate(run.ema.shadow_params)}
    for i, slots in run.optimizer.state_dict()["state"].items():
        numbers |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    return {name: value.detach().clone() for name, value in numbers.items()}


class Part(ModelMixin, ConfigMixin):
    """One of several models that are trained together."""

    @register_to_config
    def __init__(self, channels: int = 4):
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, sample):
        return self.linear(sample)


def kill(folder):
    """Runs that are killed while they save checkpoint 4, or delete checkpoint 2 after it: one for each place."""

    def kill_at(owner, name, checkpoint, call):
        """Has the process killed in that call of `owner.name` which concerns the checkpoint."""
        original, calls = getattr(owner, name), []

        def patched(*args, **kwargs):
            if checkpoint in str(args) and (name != "rmtree" or Path(args[0]).exists()):
                calls.append(args)
                if len(calls) == call:
                    if name == "save_pretrained":  # half a component
                        Path(args[1]).mkdir(parents=True)
                        (Path(args[1]) / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    places = {
        "state": (Accelerator, "save_state", "checkpoint-4", 1),
        "weights": (UNet2DModel, "save_pretrained", "checkpoint-4", 1),
        "average": (UNet2DModel, "save_pretrained", "checkpoint-4", 2),
        "rename": (Path, "rename", "checkpoint-4", 1),
        "delete": (shutil, "rmtree", "checkpoint-2", 1),
    }
    for place, where in places.items():
        child = os.fork()  # before any backward pass, after which torch refuses to be forked
        if child == 0:
            kill_at(*where)
            train(arguments(folder / place, checkpointing_steps=2, checkpoints_total_limit=1))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, place


def sharded(folder, small, whole):
    """FSDP, which accelerate turns on for GPUs only: here its state is set by hand, the rest is the real thing."""
    original, kind = Accelerator.__init__, PartialState._shared_state["distributed_type"]

    def initialize(self, *args, **kwargs):
        PartialState._shared_state["distributed_type"] = kind
        original(self, *args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin

    Accelerator.__init__ = initialize
    plugin = FullyShardedDataParallelPlugin()  # version 1 by default, and the only one in old releases of accelerate
    with pytest.raises(ValueError, match="FSDP version 1, but only one device, DDP and FSDP version 2"):
        TrainingRun(arguments(folder / "sharded"))
    if hasattr(fsdp, "CPUOffloadPolicy"):  # FSDP version 2 as accelerate uses it, from torch 2.6 on
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        run = train(arguments(folder / "sharded", **small), lambda: tiny_unet(dropout=0.0))
        assert hasattr(run.model.conv_in.weight, "full_tensor")
        assert [r["train_loss"] for r in run.record] == pytest.approx(
            [r["train_loss"] for r in whole.record], rel=1e-5
        )
        resumed = train(
            arguments(folder / "sharded", **small, resume_from_checkpoint="checkpoint-2"),
            lambda: tiny_unet(dropout=0.0),
        )
        assert resumed.record == run.record[2:]
        for ema in (False, True):
            models = [each.trained(ema=ema)["unet"] for each in (run, resumed, whole)]
            if run.accelerator.is_main_process:  # the others receive no weights
                for name, value in models[0].state_dict().items():
                    assert torch.equal(models[1].state_dict()[name], value), name
                    torch.testing.assert_close(models[2].state_dict()[name], value, rtol=1e-3, atol=2e-5)
    Accelerator.__init__ = original
    PartialState._shared_state["distributed_type"] = kind


def two_processes(folder):
    """Two gloo processes: same weights in both, those of one process with twice the batch, exact resume, no hang."""
    small = dict(max_train_steps=5, train_batch_size=2, checkpointing_steps=2)
    run = train(arguments(folder / "whole", **small), lambda: tiny_unet(dropout=0.0))
    rank, accelerator = run.accelerator.process_index, run.accelerator
    assert accelerator.num_processes == 2 and run.global_batch_size == 12
    weights = torch.cat([value.flatten().float() for value in state(run).values()])
    both = accelerator.gather(weights[None].contiguous())
    assert torch.equal(both[0], both[1])
    run.accelerator.wait_for_everyone()

    if rank == 0:
        shutil.copytree(folder / "whole" / "checkpoint-2", folder / "resumed" / "checkpoint-2")
    accelerator.wait_for_everyone()
    resumed = train(
        arguments(folder / "resumed", **small, resume_from_checkpoint="latest"), lambda: tiny_unet(dropout=0.0)
    )
    assert resumed.record == run.record[2:]
    for name, value in state(run).items():
        assert torch.equal(value, state(resumed)[name]), name

    # Only one process meets the NaN; both must end, with the same words.
    with pytest.raises(FloatingPointError, match=r"at step 3\. The last good checkpoint is `.*checkpoint-2`"):
        train(arguments(folder / "nan", **small), loss_at={(3, 1): float("nan")})

    # Only one process is asked to end.
    def interrupt(run):
        if run.step == 2 and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="step 3, which is saved"):
        train(arguments(folder / "interrupted", **small), after_step=interrupt)
    accelerator.wait_for_everyone()
    assert (folder / "interrupted" / "checkpoint-3").is_dir()
    if rank == 0:
        torch.save({"record": run.record, "state": state(run)}, folder / "two.pt")
    accelerator.wait_for_everyone()
    sharded(folder, small, run)
    accelerator.end_training()


if __name__ == "__main__":
    {"kill": kill, "two_processes": two_processes}[sys.argv[1]](Path(sys.argv[2]))
