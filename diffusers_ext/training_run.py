"""What every training script shares: arguments, accelerator, data order, EMA, checkpoints, exact resume, logs, Hub.

The loop stays in the script, [`TrainingRun`] only stands beside it; its example is a whole script.

What is trained depends on the seed and on the images of an optimizer step, not on how they are divided: every image
has a place in one endless stream (the epochs' permutations, one after the other), and its augmentation, noise and
timestep are drawn from generators that are seeded by that place. So a resumed run is the uninterrupted run bit for bit
at any step, with any number of workers, and 1 x 4 accumulation or 2 processes equal one batch of 4 but for the
rounding of sums. What a model draws itself (dropout) is exact on resume, but depends on the division.
"""

import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, send_to_device, set_seed
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from diffusers_ext.data import ImageDataset, load_image_dataset
from diffusers_ext.exit_status import exit_status
from diffusers_ext.hub import HubMixin, replacing

logger = logging.getLogger(__name__)

_NUM_BANDS = 4
_STATE_FILE = "training_run.json"
# Arguments that a resumed run may change: they move files about or the run's end, and leave each step as it is.
# `train_batch_size` x `gradient_accumulation_steps` x processes is compared as one number.
_FREE_ARGUMENTS = {
    "pretrained_model_name_or_path", "train_data_dir", "cache_dir", "output_dir", "train_batch_size",
    "gradient_accumulation_steps", "dataloader_num_workers", "max_train_steps", "num_train_epochs", "torch_compile",
    "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "validation_steps", "num_validation_images", "report_to", "logging_dir", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_token", "hub_private_repo",
}  # fmt: skip


def _digest(parts: Iterable[bytes]) -> str | None:
    """Hash of all parts together; `None` for no parts."""
    digest, empty = hashlib.sha256(), True
    for part in parts:
        digest.update(part)
        empty = False
    return None if empty else digest.hexdigest()[:16]


def argument(default: Any, help: str) -> Any:
    """A dataclass field with a default and the text that `--help` prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class TrainingArguments:
    """Arguments that all training scripts have, by the names of diffusers' scripts; a method's script subclasses it.

    The help text of each field is what `--help` prints (`transformers.HfArgumentParser`).

    Raises:
        ValueError: An argument is out of range, or two contradict each other.

    Examples:
        >>> from transformers import HfArgumentParser
        >>> from diffusers_ext.training_run import TrainingArguments
        >>> flags = ["--dataset_name", "digits", "--max_train_steps", "100", "--use_ema"]
        >>> (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
        >>> args.dataset_name, args.max_train_steps, args.use_ema
        ('digits', 100, True)
    """

    # model
    pretrained_model_name_or_path: str | None = argument(
        None, "Hub id or folder of the model that training starts from."
    )
    revision: str | None = argument(None, "Branch, tag or commit of the pretrained model.")
    variant: str | None = argument(None, "Weight variant of the pretrained model, such as `fp16`.")
    cache_dir: str | None = argument(None, "Where downloaded models and data sets are kept.")
    # data
    dataset_name: str | None = argument(None, "`digits`, `photos`, a data set of the Hub, or a folder for `datasets`.")
    dataset_config_name: str | None = argument(None, "Configuration of the Hub data set.")
    train_data_dir: str | None = argument(None, "Image folder: plain, with class folders, or with `metadata.jsonl`.")
    image_column: str = argument("image", "Column of the data set that holds the images.")
    label_column: str = argument("label", "Column of the data set that holds the class labels.")
    caption_column: str = argument("text", "Column of the data set that holds the captions.")
    image_mode: Literal["RGB", "L"] | None = argument(None, "Colour or greyscale; by default the data set's own.")
    resolution: int | None = argument(None, "Side of the square training images in pixels.")
    center_crop: bool = argument(False, "Crop the center instead of a random place.")
    random_flip: bool = argument(False, "Flip images left to right at random.")
    max_train_samples: int | None = argument(None, "Use at most this many training images.")
    validation_fraction: float | None = argument(None, "Images held out: below 1 the share, from 1 on the number.")
    dataloader_num_workers: int = argument(0, "Processes that load images; 0 loads in the main process.")
    # optimization
    train_batch_size: int = argument(16, "Images per process and forward pass.")
    gradient_accumulation_steps: int = argument(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = argument(None, "Optimizer steps in all; overrides `num_train_epochs`.")
    num_train_epochs: int | None = argument(None, "Passes over the training images.")
    learning_rate: float = argument(1e-4, "Highest learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "cosine_with_min_lr",
    ] = argument("constant_with_warmup", "Learning-rate schedule, in optimizer steps.")  # fmt: skip
    lr_warmup_steps: int = argument(0, "Optimizer steps until the learning rate is reached.")
    lr_min_ratio: float = argument(0.02, "Where `cosine_with_min_lr` ends, as a share of `learning_rate`.")
    adam_beta1: float = argument(0.9, "AdamW's decay of the gradient's average.")
    adam_beta2: float = argument(0.999, "AdamW's decay of the squared gradient's average.")
    adam_weight_decay: float = argument(1e-2, "AdamW's decoupled weight decay.")
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = argument(1.0, "Gradients are clipped to this norm; 0 turns clipping off.")
    use_ema: bool = argument(False, "Keep a moving average of the weights; it is what is validated and published.")
    ema_decay: float = argument(0.9999, "Highest decay: step n uses min(ema_decay, (1 + n) / (10 + n)).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = argument(None, "By default what `accelerate config` says.")
    torch_compile: bool = argument(False, "Compile the trained model with `torch.compile`.")
    gradient_checkpointing: bool = argument(False, "Recompute activations in the backward pass to save memory.")
    seed: int = argument(0, "Seed of weights, data order, augmentation, noise and the held-out split.")
    # output
    output_dir: str = argument("output", "Receives the pipeline, checkpoints, samples and logs.")
    checkpointing_steps: int = argument(500, "Optimizer steps between checkpoints (and one at the end); 0 for none.")
    checkpoints_total_limit: int | None = argument(None, "Keep this many checkpoints, delete the oldest beyond it.")
    resume_from_checkpoint: str | None = argument(None, "`latest`, or the folder of a checkpoint.")
    validation_steps: int = argument(500, "Optimizer steps between validations (and one at the end); 0 for none.")
    num_validation_images: int = argument(16, "Images that a validation makes.")
    report_to: str = argument(
        "tensorboard", "Tracker, or several with commas: `tensorboard`, `wandb`, ..., `all`, `none`."
    )
    logging_dir: str = argument("logs", "Folder of the trackers' files inside `output_dir`.")
    tracker_project_name: str = argument("diffusers-ext", "Name of the project at the tracker.")
    push_to_hub: bool = argument(False, "Publish the finished pipeline on the Hub.")
    hub_model_id: str | None = argument(None, "Repo to publish to; by default the name of `output_dir`.")
    hub_token: str | None = argument(
        None, "Token of the Hub; by default that of `hf auth login`. Never logged or written."
    )
    hub_private_repo: bool = argument(False, "Make the repo private when it is created.")

    def __post_init__(self) -> None:
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise ValueError("Neither `max_train_steps` nor `num_train_epochs` is given: pass one of them.")
        for name, least in {
            "resolution": 1, "max_train_samples": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
            "max_train_steps": 1, "num_train_epochs": 1, "checkpoints_total_limit": 1, "num_validation_images": 1,
            "dataloader_num_workers": 0, "lr_warmup_steps": 0, "checkpointing_steps": 0, "validation_steps": 0,
            "max_grad_norm": 0, "adam_weight_decay": 0, "seed": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay", "lr_min_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must lie in [0, 1].")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"`learning_rate` is {self.learning_rate}, but must be positive.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"`lr_warmup_steps` is {self.lr_warmup_steps}, but the `constant` schedule has no warm-up: use "
                "`--lr_scheduler constant_with_warmup`."
            )
        wanted = set(self.report_to.split(",")) - {"all", "none"}
        if missing := wanted - {str(tracker) for tracker in get_available_trackers()}:
            raise ValueError(
                f"`report_to` asks for {', '.join(sorted(missing))}, which is unknown or not installed: install it "
                "with pip, or pass `--report_to none`."
            )


def run_script(main: Callable[[Any], None], parser: HfArgumentParser) -> None:
    """Run a training script from the command line, with one line `error: ...` and exit status 2 after wrong input.

    `--debug` shows the traceback instead; `accelerate launch` adds one of its own, unless it is given `--quiet`.
    `--help` begins with the first paragraph of the script's docstring.

    Args:
        main (`Callable`):
            The script's function; it takes the arguments.
        parser (`HfArgumentParser`):
            The parser of their dataclass.

    Raises:
        SystemExit: With status 2 after wrong input, 130 after Ctrl-C.

    Examples:

    ```py
    >>> from transformers import HfArgumentParser
    >>> from diffusers_ext.training_run import TrainingArguments, run_script

    >>> def main(args: TrainingArguments) -> None:
    ...     print(args.learning_rate)
    >>> if __name__ == "__main__":
    ...     run_script(main, HfArgumentParser(TrainingArguments))

    ```
    """
    parser.description = (sys.modules[main.__module__].__doc__ or "").split("\n\n")[0]
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    for action in parser._actions:  # the `--no_...` that the parser adds have the help of what they turn off
        if action.const is False:
            action.help = f"Turn `--{action.dest}` off."
    try:
        arguments, _ = parser.parse_args_into_dataclasses()
        main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_status(error, debug="--debug" in sys.argv))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_images)


@lru_cache(maxsize=4)
def _sample_seeds(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """Two seeds for each image of an optimizer step: row 0 for its augmentation, row 1 for noise and timestep."""
    state = np.random.SeedSequence((seed, 1, step)).generate_state(2 * global_batch_size, np.uint64)
    return state.reshape(2, global_batch_size)


class _Stream(Dataset):
    """The training images as one endless sequence: position p is image p mod n of the permutation of epoch p // n.

    Torch's generator is seeded by the position while an item is made, so that a random crop or flip does not depend on
    the process that makes it.
    """

    def __init__(self, dataset: Dataset, seed: int, global_batch_size: int) -> None:
        self.dataset, self.seed, self.global_batch_size = dataset, seed, global_batch_size

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        items = []
        with torch.random.fork_rng(devices=[]):
            for position in positions:
                step, place = divmod(position, self.global_batch_size)
                seeds = _sample_seeds(self.seed, step, self.global_batch_size)
                torch.default_generator.manual_seed(int(seeds[0, place]))
                epoch, offset = divmod(position, len(self.dataset))
                items.append(self.dataset[int(_permutation(self.seed, epoch, len(self.dataset))[offset])])
        return items


class TrainingRun:
    """One training run: the parts around the loop that are the same for every method.

    Seeds torch, numpy and `random` at once, so build it before the models. Works on one device, and under
    `accelerate launch` or `torchrun` on several (DDP, or version 2 of FSDP).

    Args:
        args ([`TrainingArguments`]):
            The arguments of the script.

    Attributes:
        accelerator (`accelerate.Accelerator`): Device, processes, precision, trackers.
        model (`torch.nn.Module`): The trained module as `prepare` wrapped it: what the loop calls.
        models (`dict[str, torch.nn.Module]`): Its components by name, unwrapped.
        step (`int`): Optimizer steps done; `max_train_steps` is where the run ends.
        generators (`list[torch.Generator]`): One for each image of the current batch, for `randn_tensor` and the like.
        metrics (`dict[str, float]`): The last logged value of everything.
        output_dir (`pathlib.Path`): `args.output_dir`.

    Raises:
        ValueError: The accelerate configuration asks for DeepSpeed, Megatron-LM or the first version of FSDP.

    Examples:

    ```py
    >>> import tempfile
    >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    >>> from diffusers_ext.training_run import TrainingArguments, TrainingRun

    >>> folder = tempfile.mkdtemp()
    >>> run = TrainingRun(TrainingArguments(dataset_name="digits", max_train_steps=2, output_dir=folder, use_ema=True))
    >>> unet = UNet2DModel(
    ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
    ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ...     norm_num_groups=4,
    ... )
    >>> scheduler = DDPMScheduler()
    >>> run.prepare({"unet": unet}, run.load_dataset("train"))
    >>> for batch in run.batches():
    ...     with run.accumulate():
    ...         images = batch["images"]
    ...         noise, timesteps = run.randn_like(images), run.randint(1000)
    ...         noise_pred = run.model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
    ...         per_sample_loss = (noise_pred - noise).square().flatten(1).mean(1)
    ...         stepped = run.optimize(per_sample_loss.mean(), per_sample_loss=per_sample_loss, timesteps=timesteps)
    ...     if run.validate_now:
    ...         pipe = DDPMPipeline(**run.trained(), scheduler=scheduler)
    ...         run.log_images("samples", pipe(batch_size=2, num_inference_steps=2).images)
    >>> pipe = DDPMPipeline(**run.trained(), scheduler=scheduler)
    >>> run.finish(pipe, card={"datasets": ["digits"]})  # doctest: +ELLIPSIS
    The DDPMPipeline is saved in ....
    >>> DDPMPipeline.from_pretrained(folder).unet.config.sample_size
    8

    ```
    """

    def __init__(self, args: TrainingArguments) -> None:
        # These are global: a second run in one process must not inherit the first one's precision and accumulation.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(str(self.output_dir), str(self.output_dir / args.logging_dir)),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
            ),
        )
        kind = self.accelerator.distributed_type
        self._sharded = kind == DistributedType.FSDP
        fsdp_version = getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) if self._sharded else None
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or fsdp_version == 1:
            raise ValueError(
                f"`accelerate` is configured for {kind}{' version 1' if self._sharded else ''}, but only one device, "
                "DDP and FSDP version 2 are supported: choose one of these in `accelerate config`."
            )
        set_seed(args.seed)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._totals: torch.Tensor | None = None
        self._stepped = False
        self._stop = self._ends = False  # this process was asked to end; one of them was
        self._seconds = 0.0
        self._repo_id: str | None = None

    def load_dataset(
        self, split: Literal["train", "validation"] = "train", columns: Collection[str] = ("labels", "captions")
    ) -> ImageDataset:
        """Load the images that the arguments name; the held-out ones are neither cropped nor flipped at random.

        Args:
            split (`str`, *optional*, defaults to `"train"`):
                `"train"` or `"validation"`.
            columns (`list[str]`, *optional*, defaults to `("labels", "captions")`):
                What is used beside the images: what is wrong in other columns does not matter.

        Returns:
            [`data.ImageDataset`]: Items with `images`, and `labels` and `captions` where there are any.
        """
        args, train = self.args, split == "train"
        with self.accelerator.main_process_first():  # the others find the download in the cache
            return load_image_dataset(
                args.dataset_name,
                args.train_data_dir,
                split=split,
                resolution=args.resolution,
                image_mode=args.image_mode,
                center_crop=args.center_crop or not train,
                random_flip=args.random_flip and train,
                validation_fraction=args.validation_fraction,
                seed=args.seed,
                max_samples=args.max_train_samples if train else None,
                image_column=args.image_column,
                label_column=args.label_column if "labels" in columns else None,
                caption_column=args.caption_column if "captions" in columns else None,
                dataset_config_name=args.dataset_config_name,
                cache_dir=args.cache_dir,
            )

    def prepare(
        self,
        models: Mapping[str, torch.nn.Module],
        dataset: Dataset,
        *,
        train_module: torch.nn.Module | None = None,
        frozen: torch.nn.Module | None = None,
    ) -> None:
        """Take over the models: device, wrapping, optimizer, learning-rate schedule, EMA, trackers, resume.

        Args:
            models (`dict[str, torch.nn.Module]`):
                The components to train and save, each with `save_pretrained` and `from_pretrained`. Parameters that
                do not require a gradient are saved, but neither trained nor averaged.
            dataset (`torch.utils.data.Dataset`):
                Training images with a length; an item is a dictionary that `torch.utils.data.default_collate` can
                batch.
            train_module (`torch.nn.Module`, *optional*):
                A module whose `forward` computes everything that is differentiated and that contains all of `models`;
                needed for more than one model, because DDP and FSDP wrap exactly one module.
            frozen (`torch.nn.Module`, *optional*):
                A model that the trained ones stand on: a run is not resumed on another one.

        Raises:
            TypeError: A model cannot be saved, or the data set has no length.
            ValueError: The data set is empty, `train_module` does not fit `models`, `output_dir` holds checkpoints
                that this run would mix with, or the checkpoint to resume from is damaged or of another run.
        """
        # 1. Check inputs
        args, accelerator = self.args, self.accelerator
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"`dataset` is a {type(dataset).__name__}, but must have a length and be indexed.")
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty: nothing to train on.")
        for name, model in models.items():
            if not hasattr(model, "save_pretrained") or not hasattr(model, "from_pretrained"):
                raise TypeError(
                    f"`models` has {name!r} of type {type(model).__name__}, which has no `save_pretrained` and "
                    "`from_pretrained`: derive it from `diffusers.ModelMixin`."
                )
        if train_module is None:
            if len(models) != 1:
                raise ValueError(f"`models` has {len(models)} entries: pass the one `train_module` that holds them.")
            train_module = next(iter(models.values()))
        names = {module: f"{name}." if name else "" for name, module in train_module.named_modules()}
        if outside := [name for name, model in models.items() if model not in names]:
            raise ValueError(f"`train_module` does not contain {outside}, but must contain all of `models`.")
        owned = {id(parameter) for model in models.values() for parameter in model.parameters()}
        if stray := [n for n, p in train_module.named_parameters() if p.requires_grad and id(p) not in owned]:
            raise ValueError(
                f"`train_module` trains {stray}, which belong to none of `models` and would not be saved."
            )
        if not any(parameter.requires_grad for parameter in train_module.parameters()):
            raise ValueError("`models` have no parameter that requires a gradient: nothing to train.")

        # 2. Where the run starts from
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = self._find_checkpoint()
        if accelerator.is_main_process:
            for leftover in self.output_dir.glob(".checkpoint-*.tmp"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)

        # 3. Models. Plain copies on the side receive the trained weights for validation and saving: making them anew
        # (`from_config`) would draw initial weights from the global random state.
        self.models = dict(models)
        self._prefixes = {name: names[model] for name, model in models.items()}
        self._copies = {name: copy.deepcopy(model).requires_grad_(False).eval() for name, model in models.items()}
        if not self._sharded:
            for model in self._copies.values():
                model.to(accelerator.device)
        if args.gradient_checkpointing:
            able = [m for m in models.values() if getattr(m, "_supports_gradient_checkpointing", False)]
            if not able:
                raise ValueError(f"`gradient_checkpointing` is set, but none of {list(models)} supports it.")
            for model in able:
                model.enable_gradient_checkpointing()
        if args.torch_compile:
            train_module.compile()
        train_module.train()

        # 4. Optimizer and schedule. The schedule is not `prepare`d: accelerate would step it once per process.
        device = accelerator.device
        optimizer = torch.optim.AdamW(
            [parameter for parameter in train_module.parameters() if parameter.requires_grad],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            fused=True if device.type in ("cpu", "cuda") and not self._sharded else None,
        )
        self.model, self.optimizer = accelerator.prepare(train_module, optimizer)
        self.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.max_train_steps = args.max_train_steps or math.ceil(
            args.num_train_epochs * len(dataset) / self.global_batch_size
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            scheduler_specific_kwargs=(
                {"min_lr_rate": args.lr_min_ratio} if args.lr_scheduler == "cosine_with_min_lr" else None
            ),
        )
        accelerator.register_for_checkpointing(self.lr_scheduler)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = (
            EMAModel(self._parameters, decay=args.ema_decay, foreach=not self._sharded) if args.use_ema else None
        )

        # 5. Data. The stream orders and shards itself, so accelerate's loader would be a second opinion.
        self._stream = _Stream(dataset, args.seed, self.global_batch_size)
        generator_device = device if device.type in ("cpu", "cuda", "xpu") else "cpu"
        self.generators = [torch.Generator(generator_device) for _ in range(args.train_batch_size)]

        # 6. Resume. Checkpoints hold the weights as components; accelerate's own copy of the module is left out.
        arguments = {name: value for name, value in dataclasses.asdict(args).items() if name != "hub_token"}
        pictures = getattr(dataset, "pictures", None)
        self._state = {
            "arguments": {name: value for name, value in arguments.items() if name not in _FREE_ARGUMENTS},
            "global_batch_size": self.global_batch_size,
            "num_images": len(dataset),
            "image_files": _digest(
                f"{picture.name} {picture.stat().st_size}".encode()
                for picture in (
                    pictures if isinstance(pictures, list) else ()
                )  # others are made or fetched one by one
                if isinstance(picture, Path)
            ),
            "labels": _digest(repr(label).encode() for label in getattr(dataset, "labels", None) or ()),
            "frozen_weights": _digest(
                value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                for value in (frozen.state_dict().values() if frozen is not None else ())
            ),
        }
        accelerator.register_save_state_pre_hook(lambda _models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)

        # 7. Trackers, records, repo: what can fail fails now and not after the training
        if accelerator.is_main_process:
            self._write("training_arguments.json", json.dumps(arguments, indent=2, default=str).encode())
        accelerator.init_trackers(
            args.tracker_project_name,
            {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in arguments.items()},
        )
        if args.push_to_hub and accelerator.is_main_process:
            repo, private = args.hub_model_id or self.output_dir.resolve().name, args.hub_private_repo or None
            self._repo_id = HfApi(token=args.hub_token).create_repo(repo, private=private, exist_ok=True).repo_id

    def batches(self) -> Iterator[dict[str, Any]]:
        """Iterate over the batches of the rest of the run, with a progress bar of optimizer steps.

        The epochs follow each other without a seam: a batch, or an optimizer step, may hold the end of one and the
        beginning of the next. Checkpoints are written where due once the body of the loop has ended a step. SIGINT
        and SIGTERM end the run after the current optimizer step, with a checkpoint.

        Returns:
            `Iterator[dict]`: Batches of `train_batch_size` images on the accelerator's device.

        Raises:
            RuntimeError: The body of the loop did not call `optimize`.
            KeyboardInterrupt: The run was asked to end (SIGINT, SIGTERM); a checkpoint has been written.
        """
        args, accelerator = self.args, self.accelerator
        batch_size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        rank, processes = accelerator.process_index, accelerator.num_processes

        def places() -> Iterator[tuple[int, int, int]]:
            """Optimizer step, forward pass within it, first place of this process in the step's global batch."""
            for step in range(self.step, self.max_train_steps):
                for micro_step in range(accumulation):
                    yield step, micro_step, (micro_step * processes + rank) * batch_size

        loader = DataLoader(
            self._stream,
            batch_sampler=(
                range(step * self.global_batch_size + place, step * self.global_batch_size + place + batch_size)
                for step, _, place in places()
            ),
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self._bar = tqdm(
            total=self.max_train_steps, initial=self.step, desc="Steps", disable=not accelerator.is_main_process
        )
        previous_handlers = {}

        def stop(signum: int, _frame: Any) -> None:
            logger.warning("Ending after this optimizer step; once more ends at once.")
            self._stop = True
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                previous_handlers[number] = signal.signal(number, stop)
        started, seconds = time.monotonic(), self._seconds
        try:
            for (step, micro_step, place), batch in zip(places(), loader, strict=True):
                if step != self.step:
                    raise RuntimeError(
                        f"`optimize` has made {self.step} optimizer steps, but the batches of {step} are over: call "
                        "it once for each batch, inside `with run.accumulate():`."
                    )
                # The global state is for what a model draws itself: dropout, for example.
                entropy = np.random.SeedSequence((args.seed, 2, step, micro_step, rank))
                set_seed(int(entropy.generate_state(1)[0]))
                seeds = _sample_seeds(args.seed, step, self.global_batch_size)[1, place : place + batch_size]
                for generator, seed in zip(self.generators, seeds.tolist(), strict=True):
                    generator.manual_seed(seed)
                self._stepped = False
                yield send_to_device(batch, accelerator.device, non_blocking=True)
                self._seconds = seconds + time.monotonic() - started
                # Here the step is over with all that the loop does in it, validation too: a checkpoint lacks nothing.
                due = args.checkpointing_steps and (
                    self.step % args.checkpointing_steps == 0 or self.step == self.max_train_steps
                )
                if self._stepped and (due or self._ends):
                    try:
                        self._save_checkpoint()
                    except (OSError, RuntimeError) as error:  # torch gives the second for a full disk
                        shutil.rmtree(self.output_dir / f".checkpoint-{self.step}.tmp", ignore_errors=True)
                        space, last = shutil.disk_usage(self.output_dir).free / 2**20, self._checkpoints()
                        raise OSError(
                            f"the checkpoint of step {self.step} could not be written to `{self.output_dir}`, where "
                            f"{space:.1f} MiB are free ({error}). Make room and go on with "
                            f"`--resume_from_checkpoint {last[-1].name if last else 'latest'}`."
                        ) from error
                if self._ends and self.step < self.max_train_steps:
                    raise KeyboardInterrupt(
                        f"ended at step {self.step}, which is saved: go on with `--resume_from_checkpoint latest`"
                    )
        finally:
            self._bar.close()
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def accumulate(self) -> AbstractContextManager[None]:
        """The context for one batch's forward and backward pass: gradients are exchanged at optimizer steps only."""
        return self.accelerator.accumulate(self.model)

    def randn_like(self, images: torch.Tensor) -> torch.Tensor:
        """Standard normal noise for the current batch, each row from its image's own generator.

        Args:
            images (`torch.Tensor` of shape `(batch, ...)`):
                Gives shape, device and dtype.

        Returns:
            `torch.Tensor` of shape `(batch, ...)`: The noise; the next call draws anew.
        """
        return randn_tensor(images.shape, generator=self.generators, device=images.device, dtype=images.dtype)

    def randint(self, high: int) -> torch.Tensor:
        """Uniform integers for the current batch, each from its image's own generator: timesteps, for example.

        Args:
            high (`int`):
                One above the largest integer.

        Returns:
            `torch.Tensor` of shape `(batch,)`: int64 in [0, high) on the accelerator's device.
        """
        rows = [
            torch.randint(high, (1,), generator=generator, device=generator.device) for generator in self.generators
        ]
        return torch.cat(rows).to(self.accelerator.device)

    def optimize(
        self,
        loss: torch.Tensor,
        *,
        per_sample_loss: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        num_train_timesteps: int = 1000,
        metrics: Mapping[str, torch.Tensor] | None = None,
    ) -> bool:
        """Backward pass; at the end of an accumulation also clip, step, EMA and log.

        What is logged is the mean over the accumulation and over all processes, fetched once per optimizer step.

        Args:
            loss (`torch.Tensor`):
                Scalar mean over the batch.
            per_sample_loss (`torch.Tensor` of shape `(batch,)`, *optional*):
                With `timesteps`, logs the mean loss of each quarter of the timesteps: four numbers that show a wrong
                noise schedule at once.
            timesteps (`torch.Tensor` of shape `(batch,)`, *optional*):
                Integers in [0, num_train_timesteps).
            num_train_timesteps (`int`, *optional*, defaults to 1000):
                Length of the noise schedule.
            metrics (`dict[str, torch.Tensor]`, *optional*):
                Further scalars to log, the same names each time.

        Returns:
            `bool`: Whether this was an optimizer step.

        Raises:
            FloatingPointError: The loss or the gradient is not finite. The weights are those of the step before; the
                message names the last checkpoint.
            ValueError: A trained parameter takes no part in the loss (several processes would wait for it forever).
        """
        args, accelerator = self.args, self.accelerator
        accelerator.backward(loss)
        metrics = metrics or {}
        row = [loss.detach().float().reshape(1), *(value.detach().float().reshape(1) for value in metrics.values())]
        if per_sample_loss is not None and timesteps is not None:
            bands = torch.zeros(2, _NUM_BANDS, device=loss.device)
            band = timesteps * _NUM_BANDS // num_train_timesteps
            bands[0].index_add_(0, band, per_sample_loss.detach().float())
            bands[1].index_add_(0, band, torch.ones_like(band, dtype=torch.float32))
            row.append(bands.flatten())
        row = torch.cat(row)
        self._totals = row if self._totals is None else self._totals + row
        self._stepped = accelerator.sync_gradients
        if not self._stepped:
            return False

        # 1. One vector for all processes: means, gradient norm, and whether a process was asked to end
        if self.step == 0 and not self._sharded:
            names = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
            if names:
                raise ValueError(
                    f"{len(names)} trained parameters take no part in the loss ({', '.join(names[:5])}, ...): freeze "
                    "them with `requires_grad_(False)`, or use them in every forward pass."
                )
        parameters = self.model.parameters() if self._sharded else self._parameters
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        if hasattr(grad_norm, "full_tensor"):  # sharded
            grad_norm = grad_norm.full_tensor()
        stop = torch.tensor([float(self._stop)], device=loss.device)
        totals = torch.cat([self._totals, grad_norm.detach().float().reshape(1).to(loss.device), stop])
        *totals, grad_norm, stop = accelerator.reduce(totals, reduction="sum").tolist()
        self._totals = None
        passes = args.gradient_accumulation_steps * accelerator.num_processes
        values = {"train_loss": totals[0] / passes, "grad_norm": grad_norm / accelerator.num_processes}
        values |= {name: total / passes for name, total in zip(metrics, totals[1:], strict=False)}
        if per_sample_loss is not None and timesteps is not None:
            sums, counts = totals[-2 * _NUM_BANDS : -_NUM_BANDS], totals[-_NUM_BANDS:]
            edges = [num_train_timesteps * i // _NUM_BANDS for i in range(_NUM_BANDS + 1)]
            for low, high, total, count in zip(edges[:-1], edges[1:], sums, counts, strict=True):
                if count:
                    values[f"train_loss_t{low}-{high - 1}"] = total / count

        # 2. Not finite: end before the weights are spoiled. Under fp16 the scaler meets infinite gradients by itself.
        for name in ("train_loss", "grad_norm"):
            if not math.isfinite(values[name]) and (name == "train_loss" or accelerator.scaler is None):
                last = self._checkpoints()
                raise FloatingPointError(
                    f"`{name}` is {values[name]} at step {self.step + 1}. The last good checkpoint is "
                    f"{f'`{last[-1]}`' if last else 'none: none was written yet'}. Lower `learning_rate`, raise "
                    "`lr_warmup_steps`, or train without `mixed_precision`."
                )

        # 3. Step
        values["lr"] = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._parameters)
        self.optimizer.zero_grad()
        self.step += 1
        self.log(values)
        self._bar.set_postfix(loss=f"{values['train_loss']:.4f}", lr=f"{values['lr']:.1e}", refresh=False)
        self._bar.update(1)

        self._ends = bool(stop)
        return True

    @property
    def validate_now(self) -> bool:
        """Whether the batch just done ended an optimizer step that is due for validation, or the last one."""
        steps = self.args.validation_steps
        return bool(steps) and self._stepped and (self.step % steps == 0 or self.step == self.max_train_steps)

    def log(self, values: Mapping[str, float]) -> None:
        """Send numbers to the trackers at the current step, and keep them in `metrics`.

        Args:
            values (`dict[str, float]`):
                Numbers by name.
        """
        self.metrics.update(values)
        self.accelerator.log(dict(values), step=self.step)

    def log_images(self, name: str, images: Sequence[Image.Image], *, columns: int | None = None) -> None:
        """Write images as one grid to `output_dir/samples/<name>-<step>.png`, and send them to the trackers.

        Args:
            name (`str`):
                What the images are.
            images (`list[PIL.Image.Image]`):
                Images of one size; those under 64 pixels are enlarged for the grid, each pixel to a square.
            columns (`int`, *optional*):
                Images in a row; by default the grid is about square.

        Raises:
            ValueError: There are no images.
        """
        if not self.accelerator.is_main_process:
            return
        if not images:
            raise ValueError(f"`images` of {name!r} is empty.")
        width, height = images[0].size
        size = [side * max(1, 64 // max(width, height)) for side in (width, height)]
        tiles = [image.convert("RGB").resize(size, Image.Resampling.NEAREST) for image in images]
        columns = columns or math.ceil(math.sqrt(len(tiles)))
        rows = math.ceil(len(tiles) / columns)
        tiles += [Image.new("RGB", size, "white")] * (rows * columns - len(tiles))
        grid = make_image_grid(tiles, rows, columns)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(grid)[None]}, self.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [grid]}, self.step)
        png = io.BytesIO()
        grid.save(png, format="PNG")
        self._write(f"samples/{name}-{self.step:06d}.png", png.getvalue())

    def trained(self, *, ema: bool | None = None) -> dict[str, torch.nn.Module]:
        """The components as trained so far, on the side: sampling with them leaves the training as it is.

        All processes must call it under FSDP, where the main process alone receives the weights. The same objects are
        refreshed and returned each time.

        Args:
            ema (`bool`, *optional*):
                Averaged weights or the current ones; by default averaged ones where `use_ema` is set.

        Returns:
            `dict[str, torch.nn.Module]`: Frozen components in evaluation mode by name.

        Raises:
            ValueError: Averaged weights are wanted, but `use_ema` is not set.
        """
        ema = self.ema is not None if ema is None else ema
        if ema and self.ema is None:
            raise ValueError("`ema` is True, but this run keeps no average: pass `--use_ema`.")
        if ema:
            current = [parameter.detach().clone() for parameter in self._parameters]
            self.ema.copy_to(self._parameters)
        state = self.accelerator.get_state_dict(self.model)
        for name, model in self._copies.items() if state else ():
            prefix = self._prefixes[name]
            model.load_state_dict({key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)})
        if ema:
            for parameter, value in zip(self._parameters, current, strict=True):
                parameter.data.copy_(value)
        return dict(self._copies)

    def finish(self, pipeline: DiffusionPipeline, card: dict[str, Any] | None = None) -> None:
        """Save the pipeline, its card and the run's numbers in `output_dir`; publish them with `--push_to_hub`.

        Args:
            pipeline (`diffusers.DiffusionPipeline`):
                The finished pipeline, most often made from [`TrainingRun.trained`].
            card (`dict[str, Any]`, *optional*):
                What the model card says, see [`hub.HubMixin.save_model_card`].
        """
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            numbers = {
                "metrics": self.metrics,
                "steps": self.step,
                "images_seen": self.step * self.global_batch_size,
                "seconds": round(self._seconds, 1),
                "processes": accelerator.num_processes,
                "device": str(accelerator.device),
                "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
            }
            self._write("training_metrics.json", json.dumps(numbers, indent=2).encode())
            repo_id = self._repo_id or self.output_dir.resolve().name
            # What goes to the Hub is named: other files may lie in the folder that are nobody's business.
            published = ["training_metrics.json", "training_arguments.json", "samples/*.png"]
            if isinstance(pipeline, HubMixin):
                push, token = self.args.push_to_hub, self.args.hub_token
                pipeline.save_pretrained(self.output_dir, card=card, push_to_hub=push, repo_id=repo_id, token=token)
            else:
                readme = self.output_dir / "README.md"
                with replacing(self.output_dir) as folder:
                    pipeline.save_pretrained(folder)
                    if readme.exists():  # one written by hand is kept
                        shutil.copy2(readme, folder)
                    HubMixin.save_model_card.__func__(type(pipeline), folder, repo_id, card)
                    published += [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            if self.args.push_to_hub:
                HfApi(token=self.args.hub_token).upload_folder(
                    repo_id=self._repo_id,
                    folder_path=self.output_dir,
                    commit_message=f"Training, step {self.step}",
                    allow_patterns=published,
                )
            where = f" and published as {repo_id}" if self.args.push_to_hub else ""
            print(f"The {type(pipeline).__name__} is saved in {self.output_dir}{where}.")
        accelerator.wait_for_everyone()
        accelerator.end_training()

    def _checkpoints(self) -> list[Path]:
        """Whole checkpoints in `output_dir`, oldest first: a folder has this name only once it is complete."""
        paths = [path for path in self.output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))

    def _find_checkpoint(self) -> Path | None:
        wanted, present = self.args.resume_from_checkpoint, self._checkpoints()
        if wanted is None:
            if present:
                raise ValueError(
                    f"`output_dir` holds `{present[-1]}` of an earlier run: pass `--resume_from_checkpoint latest` to "
                    "go on with it, or another `output_dir`."
                )
            return None
        path = present[-1] if wanted == "latest" and present else Path(wanted)
        if not path.is_dir() and (self.output_dir / wanted).is_dir():
            path = self.output_dir / wanted
        if not path.is_dir() and (wanted != "latest" or present):
            raise ValueError(
                f"`resume_from_checkpoint` is {wanted!r}, but there is no such checkpoint; `output_dir` holds "
                f"{', '.join(other.name for other in present) or 'none'}."
            )
        if not path.is_dir():
            logger.warning("`resume_from_checkpoint` is 'latest', but there is no checkpoint yet: starting anew.")
            return None
        return path

    def _save_checkpoint(self) -> None:
        accelerator, final = self.accelerator, self.output_dir / f"checkpoint-{self.step}"
        folder = self.output_dir / f".{final.name}.tmp"
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        for ema in (False, True) if self.ema is not None else (False,):
            for name, model in self.trained(ema=ema).items():
                if accelerator.is_main_process:
                    model.save_pretrained(folder / (f"{name}_ema" if ema else name))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = self._state | {
                "step": self.step,
                "ema_step": self.ema.optimization_step if self.ema is not None else None,
                "seconds": self._seconds,
                "metrics": self.metrics,
            }
            (folder / _STATE_FILE).write_text(json.dumps(state, indent=2, default=str))
            for path in folder.rglob("*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            others = [path for path in self._checkpoints() if path != final]
            limit = self.args.checkpoints_total_limit
            gone = others[: len(others) + 1 - limit] if limit is not None else []
            if final.exists():  # the run went back to an older one
                final.rename(final.with_name(f".{final.name}.old.tmp"))
                gone.append(final)
            folder.rename(final)
            for path in gone:
                if path != final:
                    path.rename(path.with_name(f".{path.name}.old.tmp"))
                shutil.rmtree(path.with_name(f".{path.name}.old.tmp"))
        accelerator.wait_for_everyone()

    def _load_checkpoint(self, path: Path) -> None:
        # 1. Is it of this run?
        try:
            state = json.loads((path / _STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"`resume_from_checkpoint`: `{path}` is not a whole checkpoint ({error}).") from error
        changed = [
            f"`{name}` {state['arguments'][name]!r} -> {value!r}"
            for name, value in json.loads(json.dumps(self._state["arguments"], default=str)).items()
            if name in state["arguments"] and state["arguments"][name] != value
        ]
        compared = {
            "global_batch_size": "images per optimizer step",
            "num_images": "training images",
            "image_files": "names and sizes of the image files, as a hash,",
            "labels": "labels of the images, as a hash,",
            "frozen_weights": "weights of the frozen model, as a hash,",
        }
        changed += [
            f"{what} {state[name]} -> {self._state[name]}"
            for name, what in compared.items()
            if state.get(name) != self._state[name]
        ]
        if changed:
            raise ValueError(
                f"`{path}` is of another run ({'; '.join(changed)}): resume with the same arguments, or start a new "
                "run with `--pretrained_model_name_or_path` and another `output_dir`."
            )
        if state["step"] > self.max_train_steps:
            raise ValueError(
                f"`max_train_steps` is {self.max_train_steps}, but `{path}` is at step {state['step']}: choose more "
                "steps, or an earlier checkpoint."
            )
        # 2. Weights, averaged ones first: both go through the trained module, which may be sharded.
        options = StateDictOptions(full_state_dict=True, strict=False)
        try:
            for suffix in ("_ema", "") if self.ema is not None else ("",):
                weights = {}
                for name, model in self._copies.items():
                    saved = type(model).from_pretrained(path / f"{name}{suffix}")
                    if isinstance(model, ConfigMixin):
                        ours, theirs = (
                            {k: v for k, v in json.loads(m.to_json_string()).items() if not k.startswith("_")}
                            for m in (model, saved)
                        )
                        if ours != theirs:
                            raise ValueError(f"the configuration of `{name}` differs: {theirs} -> {ours}")
                    model.load_state_dict(saved.state_dict())
                    weights |= {f"{self._prefixes[name]}{key}": value for key, value in saved.state_dict().items()}
                set_model_state_dict(self.model, weights, options=options)
                if suffix:
                    for average, parameter in zip(self.ema.shadow_params, self._parameters, strict=True):
                        average.copy_(parameter.detach())
            self.accelerator.load_state(str(path))
        except Exception as error:
            raise ValueError(
                f"`{path}` does not load: it is damaged, or its models are configured otherwise ({error}). Whole "
                f"ones to try: {', '.join(other.name for other in self._checkpoints() if other != path) or 'none'}."
            ) from error
        self.accelerator.step = 0  # counts forward passes; a checkpoint is between optimizer steps
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]
        self.step, self.metrics, self._seconds = state["step"], state["metrics"], state["seconds"]
        logger.info("Resumed from %s.", path)

    def _write(self, name: str, content: bytes) -> None:
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
