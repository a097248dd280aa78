r"""`diffusers-ext convert guided-diffusion`: OpenAI's guided-diffusion (ADM) checkpoints -> folders.

```sh
diffusers-ext convert guided-diffusion 256x256_diffusion.pt my-adm --name 256x256_diffusion \
    --classifier_checkpoint 256x256_classifier.pt
diffusers-ext convert guided-diffusion 64x64_classifier.pt my-classifier --name 64x64_classifier
diffusers-ext convert guided-diffusion ema_0.9999_300000.pt mine \
    --flags "--image_size 64 --num_channels 128 --num_head_channels 64 --attention_resolutions 32,16,8 ..."
```

A U-Net becomes a folder of `ClassifierGuidancePipeline`, with its classifier if one is given; a classifier alone
becomes one of `NoisyClassifier`. Published checkpoints are named as their files; one's own need the flags that they
were trained with. **Weights tell neither the number of attention heads nor the order of query, key and value nor the
noise schedule**: a name brings them, while flags that differ there convert without an error and give wrong images.
From the authors' trainer take the averaged weights, `ema_*.pt`.
"""

import argparse
import json
import os
import shlex
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from safetensors.torch import load_file

from diffusers_ext.pipelines.classifier_guidance import (
    ADMUNet2DModel,
    ClassifierGuidancePipeline,
    GuidedScheduler,
    NoisyClassifier,
    noise_levels,
)

_LSUN = (
    "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 --dropout 0.1 "
    "--learn_sigma True --resblock_updown True"
)
# Published checkpoint -> its flags in the authors' README, less those that are defaults or have no effect here. They
# give none for training the 64 x 64 classifier, but sample with it and the cosine schedule of the diffusion model.
_RELEASED = {
    "64x64_diffusion": "--image_size 64 --num_channels 192 --num_res_blocks 3 --num_head_channels 64 "
    "--attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --learn_sigma True --noise_schedule cosine "
    "--resblock_updown True --use_new_attention_order True --classifier_depth 4",
    "128x128_diffusion": "--image_size 128 --num_channels 256 --num_heads 4 --attention_resolutions 32,16,8 "
    "--class_cond True --learn_sigma True --resblock_updown True",
    "256x256_diffusion": "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
    "--class_cond True --learn_sigma True --resblock_updown True",
    "256x256_diffusion_uncond": "--image_size 256 --num_channels 256 --num_head_channels 64 "
    "--attention_resolutions 32,16,8 --learn_sigma True --resblock_updown True",
    "512x512_diffusion": "--image_size 512 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 "
    "--class_cond True --learn_sigma True --resblock_updown True",
    "64_256_upsampler": "--large_size 256 --small_size 64 --num_channels 192 --num_heads 4 "
    "--attention_resolutions 32,16,8 --class_cond True --learn_sigma True --resblock_updown True",
    "128_512_upsampler": "--large_size 512 --small_size 128 --num_channels 192 --num_head_channels 64 "
    "--attention_resolutions 32,16 --class_cond True --learn_sigma True --resblock_updown True",
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN.replace("--dropout 0.1", "--dropout 0.0"),
    "64x64_classifier": "--image_size 64 --classifier_depth 4 --noise_schedule cosine",
    "128x128_classifier": "--image_size 128",
    "256x256_classifier": "--image_size 256",
    "512x512_classifier": "--image_size 512",
}

# The authors' flags with their defaults: of every U-Net, ...
_UNET_FLAGS = {
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
}
# ... of those that make images from noise, of upsamplers, ...
_BASE_FLAGS = {"image_size": 64, "channel_mult": "", "use_new_attention_order": False}
_UPSAMPLER_FLAGS = {"large_size": 256, "small_size": 64}
# ... of the noise, and of classifiers.
_DIFFUSION_FLAGS = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
_CLASSIFIER_FLAGS = {
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
# Arguments of the authors' networks with their defaults; None where there is none.
_NETWORK = {
    "image_size": None,
    "in_channels": None,
    "model_channels": None,
    "out_channels": None,
    "num_res_blocks": None,
    "attention_resolutions": None,
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "num_classes": 0,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "pool": "adaptive",
}

# diffusers' module -> the authors'; where it stands in the network is for `_their_name`
_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    # residual blocks
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    # attention
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
# The same for the heads of the classifier.
_HEAD_NAMES = {
    "attention": {
        "head.0": "out.0",
        "head.2": "out.2",
        "head.2.to_qkv": "out.2.qkv_proj",
        "head.2.to_out": "out.2.c_proj",
    },
    "adaptive": {"head.0": "out.0", "head.4": "out.3"},
    "spatial": {"head.0": "out.0", "head.2": "out.2"},
    "spatial_v2": {"head.0": "out.0", "head.1": "out.1", "head.3": "out.3"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("checkpoint", type=Path, help="the authors' file: PyTorch (.pt) or safetensors")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist or be empty")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--name", choices=list(_RELEASED), help="which published checkpoint it is")
    kind.add_argument("--flags", help="the flags of the authors' scripts that one's own model was trained with")
    parser.add_argument("--classifier", action="store_true", help="with --flags: the checkpoint is a classifier")
    parser.add_argument(
        "--num_classes",
        "--num-classes",
        type=int,
        default=1000,
        help="with --flags: `NUM_CLASSES` in the authors' code",
    )
    parser.add_argument(
        "--classifier_checkpoint",
        "--classifier-checkpoint",
        type=Path,
        help="file of the classifier for a U-Net, to put both in one folder: the published one for its size, or what "
        "the `classifier_*` of --flags describe",
    )
    parser.add_argument(
        "--id2label", type=Path, help="JSON file with the names of the classes: a list, or {number: name}"
    )


def run(args: argparse.Namespace) -> None:
    """Converts one checkpoint, or a U-Net and its classifier. The folder appears when it is complete.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        `ValueError`: As for [`convert`], and if the names of the classes cannot be read.
        `OSError`: A file does not exist or cannot be written.
    """
    id2label = None
    if args.id2label is not None:
        try:
            names = json.loads(args.id2label.read_text(encoding="utf-8"))
            names = dict(enumerate(names)) if isinstance(names, list) else names
            id2label = {int(number): str(name) for number, name in names.items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"`{args.id2label}` cannot be read as names of classes: it must be JSON, a list of names or an object "
                f'such as {{"0": "tench"}} ({error}).'
            ) from error
    model = convert(
        args.checkpoint,
        args.out,
        name=args.name,
        flags=args.flags,
        classifier=args.classifier,
        num_classes=args.num_classes,
        classifier_checkpoint=args.classifier_checkpoint,
        id2label=id2label,
    )
    network = model.unet if isinstance(model, ClassifierGuidancePipeline) else model
    size = network.config.sample_size
    print(f"wrote {args.out}: {type(model).__name__} for {size} x {size}, {network.num_parameters()} parameters")


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name: str | None = None,
    flags: str | None = None,
    classifier: bool = False,
    num_classes: int = 1000,
    classifier_checkpoint: str | os.PathLike | None = None,
    id2label: Mapping[int, str] | None = None,
) -> ClassifierGuidancePipeline | NoisyClassifier:
    r"""
    A checkpoint of guided-diffusion (https://huggingface.co/papers/2105.05233) -> a folder for `from_pretrained`. It
    appears when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): The authors' file, PyTorch (read with `weights_only=True`) or safetensors.
        out (`str` or `os.PathLike`): The folder, which must not exist or be empty.
        name (`str`, *optional*): A published checkpoint: its file's name without `.pt`. This or `flags`.
        flags (`str`, *optional*): The authors' flags that one's own checkpoint was trained with.
        classifier (`bool`, *optional*, defaults to `False`): Whether `checkpoint` is a classifier; a name says that.
        num_classes (`int`, *optional*, defaults to 1000): With `flags`, what `NUM_CLASSES` was in the authors' code.
        classifier_checkpoint (`str` or `os.PathLike`, *optional*):
            Beside a U-Net its classifier, to put both into one folder: the published one for that size of image, or
            the one that the `classifier_*` of `flags` describe.
        id2label (`Mapping[int, str]`, *optional*): Names of the classes.

    Returns:
        [`ClassifierGuidancePipeline`] or [`NoisyClassifier`]: What was saved.

    Raises:
        `ValueError`: The folder is not empty, a file cannot be read, its weights are not those that `name` or `flags`
            describe, or diffusers cannot express the network; the message says which and why.
        `OSError`: A file does not exist or cannot be written.

    Example:

    ```py
    >>> from diffusers import DiffusionPipeline
    >>> from diffusers_ext.convert.guided_diffusion import convert

    >>> flags = "--image_size 64 --num_channels 32 --num_res_blocks 1 --num_head_channels 32 --learn_sigma True"
    >>> pipe = convert("ema_0.9999_000100.pt", "my-adm", flags=flags)
    >>> DiffusionPipeline.from_pretrained("my-adm").unet.config.block_out_channels
    [32, 64, 96, 128]

    ```
    """
    checkpoint, out = Path(checkpoint), Path(out).resolve()  # a link's target, and `.` by its name
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"`{out}` exists and is not an empty folder: give the name of a new one.")
    if (name is None) == (flags is None):
        raise ValueError(f"`name` is {name!r} and `flags` is {flags!r}: give one of them.")
    if name is not None:
        if name not in _RELEASED:
            raise ValueError(f"`name` is {name!r}, but must be one of {list(_RELEASED)}; for others give `flags`.")
        if num_classes != 1000:
            raise ValueError(f"`num_classes` is {num_classes}, but the published checkpoints have 1000: leave it out.")
        if classifier and not name.endswith("_classifier"):
            raise ValueError(f"`classifier` is true, but `name` is {name!r}, a U-Net: leave one of them out.")
        flags, classifier = _RELEASED[name], name.endswith("_classifier")
    if classifier and classifier_checkpoint is not None:
        raise ValueError(
            f"`classifier_checkpoint` is `{classifier_checkpoint}`, but `checkpoint` is a classifier: give the U-Net "
            "as `checkpoint`."
        )
    has_classifier = classifier or classifier_checkpoint is not None

    network, noise = config_from_flags(flags, classifier, num_classes)
    scheduler = GuidedScheduler(**noise)
    if id2label is not None:
        known = num_classes if has_classifier or network.get("num_classes") else 0
        if sorted(id2label) != list(range(known)):
            raise ValueError(
                f"`id2label` names {len(id2label)} classes, but the networks know {known}: name every class from 0 "
                "on, or none."
            )
    guide = None
    if has_classifier:
        guide = convert_classifier_state_dict(
            _read_checkpoint(Path(classifier_checkpoint or checkpoint)),
            config_from_flags(flags, True, num_classes)[0],
        )
        guide.register_to_config(
            id2label=None if id2label is None else dict(id2label),
            num_train_timesteps=scheduler.config.num_train_timesteps,
            trained_alphas_cumprod=noise_levels(scheduler),
        )
    if classifier:
        result, card = guide, {}
    else:
        unet = convert_unet_state_dict(_read_checkpoint(checkpoint), network)
        names = None if id2label is None or guide is not None else dict(id2label)
        result = ClassifierGuidancePipeline(unet, scheduler, guide, id2label=names)
        card = {"card": {"training": {"converted from the authors' file": checkpoint.name}}}

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        new = Path(folder) / out.name
        result.save_pretrained(new, **card)
        if out.exists():
            out.rmdir()
        os.replace(new, out)
    return result


def config_from_flags(
    flags: str | Sequence[str], classifier: bool = False, num_classes: int = 1000
) -> tuple[dict[str, Any], dict[str, Any]]:
    r"""
    The flags of the authors' scripts -> the networks that these build and their noise. As in `classifier_sample.py`,
    the same flags may describe a U-Net and its classifier.

    Args:
        flags (`str` or `Sequence[str]`): As one writes them in a shell, or split into words. Those that are left out
            have the authors' defaults. `--large_size` makes the U-Net an upsampler.
        classifier (`bool`, *optional*, defaults to `False`): Whether the classifier is asked for and not the U-Net.
        num_classes (`int`, *optional*, defaults to 1000): What `NUM_CLASSES` is in the authors' code.

    Returns:
        `tuple[dict, dict]`: The arguments of the authors' `UNetModel` or `EncoderUNetModel`, and of our
        [`GuidedScheduler`].

    Raises:
        `ValueError`: For unknown flags and values, and for sizes that the authors' scripts have no widths for.

    Example:

    ```py
    >>> from diffusers_ext.convert.guided_diffusion import config_from_flags

    >>> network, noise = config_from_flags("--image_size 128 --attention_resolutions 32,16,8 --learn_sigma True")
    >>> network["channel_mult"], network["attention_resolutions"], noise["variance_type"]
    ((1, 1, 2, 3, 4), (4, 8, 16), 'learned_range')

    ```
    """

    def truth(word: str) -> bool:
        if word.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
            raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
        return word.lower() in ("yes", "true", "t", "y", "1")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    try:
        words = shlex.split(flags) if isinstance(flags, str) else list(flags)
        upsampler = any(word.partition("=")[0] in ("--large_size", "--small_size") for word in words)
        sizes = _UPSAMPLER_FLAGS if upsampler else _BASE_FLAGS
        for flag, default in (_UNET_FLAGS | sizes | _DIFFUSION_FLAGS | _CLASSIFIER_FLAGS).items():
            kind = truth if isinstance(default, bool) else type(default)
            parser.add_argument(f"--{flag}", default=default, type=kind)
        args, unknown = parser.parse_known_args(words)
        if unknown:
            network = "an upsampler" if upsampler else "a network"
            raise ValueError(f"{' '.join(unknown)!r} is none of the flags that describe {network}")
        size = args.large_size if upsampler else args.image_size
        channel_mults = {
            64: (1, 2, 3, 4),
            128: (1, 1, 2, 3, 4),
            256: (1, 1, 2, 2, 4, 4),
            512: (0.5, 1, 1, 2, 2, 4, 4),
        }
        if upsampler and not classifier:
            channel_mults |= {512: channel_mults[256]}
            del channel_mults[128]
        if not classifier and not upsampler and args.channel_mult:
            channel_mult = tuple(float(number) for number in args.channel_mult.split(","))
        elif size in channel_mults:
            channel_mult = channel_mults[size]
        else:
            raise ValueError(
                f"`{'large_size' if upsampler else 'image_size'}` is {size}, but the authors' scripts have widths for "
                f"{list(channel_mults)}{'' if upsampler or classifier else '; for others there is `channel_mult`'}"
            )
        resolutions = args.classifier_attention_resolutions if classifier else args.attention_resolutions
        rates = tuple(size // int(resolution) for resolution in resolutions.split(","))
        if args.noise_schedule not in ("linear", "cosine"):
            raise ValueError(f"`noise_schedule` is {args.noise_schedule!r}, but must be 'linear' or 'cosine'")
        if args.diffusion_steps < 2 or num_classes < 1:
            raise ValueError(
                f"`diffusion_steps` is {args.diffusion_steps} and `num_classes` is {num_classes}, but there must be "
                "at least 2 steps and 1 class"
            )
    except (argparse.ArgumentError, ZeroDivisionError, ValueError) as error:
        raise ValueError(
            f"the flags {flags!r} cannot be used: {error}. Give those of the authors' scripts, such as "
            "'--image_size 64 --num_channels 192 --attention_resolutions 32,16,8 --learn_sigma True'."
        ) from error

    noise = {
        "num_train_timesteps": args.diffusion_steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[args.noise_schedule],
        # linear betas are given for 1000 steps
        "beta_start": 1000 / args.diffusion_steps * 1e-4,
        "beta_end": 1000 / args.diffusion_steps * 0.02,
        "prediction_type": "sample" if args.predict_xstart else "epsilon",
        "variance_type": "learned_range" if args.learn_sigma else "fixed_large",
        "rescale_timesteps": args.rescale_timesteps,
    }
    network = {"image_size": size, "channel_mult": channel_mult, "attention_resolutions": rates}
    if classifier:
        network |= {
            "in_channels": 3,
            "model_channels": args.classifier_width,
            "out_channels": num_classes,
            "num_res_blocks": args.classifier_depth,
            "num_head_channels": 64,
            "use_scale_shift_norm": args.classifier_use_scale_shift_norm,
            "resblock_updown": args.classifier_resblock_updown,
            "pool": args.classifier_pool,
        }
    else:
        network |= {
            "in_channels": 6 if upsampler else 3,
            "model_channels": args.num_channels,
            "out_channels": 6 if args.learn_sigma else 3,
            "num_res_blocks": args.num_res_blocks,
            "dropout": args.dropout,
            "num_classes": num_classes if args.class_cond else None,
            "num_heads": args.num_heads,
            "num_head_channels": args.num_head_channels,
            "num_heads_upsample": args.num_heads_upsample,
            "use_scale_shift_norm": args.use_scale_shift_norm,
            "resblock_updown": args.resblock_updown,
            "use_new_attention_order": not upsampler and args.use_new_attention_order,
        }
    return network, noise


def convert_unet_state_dict(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> UNet2DModel:
    r"""
    The authors' `UNetModel` (also `SuperResModel`, which has twice the `in_channels`) -> diffusers.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under the authors' names. They are copied.
        config (`Mapping[str, Any]`): The arguments of its constructor, as from [`config_from_flags`];
            `attention_resolutions` are downsampling rates.

    Returns:
        [`UNet2DModel`]: With the same outputs to rounding, in evaluation mode; an [`ADMUNet2DModel`] where the stock
        class cannot express it: a number of heads in place of their size, or first channels that are not
        `model_channels`.

    Raises:
        `ValueError`: An argument is missing, unknown, or cannot be expressed, or weights are missing, unknown or of
            the wrong shape; the message names the published checkpoints that have such weights.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.guided_diffusion import config_from_flags, convert_unet_state_dict

    >>> flags = "--image_size 64 --num_channels 32 --num_res_blocks 1 --num_head_channels 32 --learn_sigma True"
    >>> weights = torch.load("ema_0.9999_000100.pt", weights_only=True)
    >>> unet = convert_unet_state_dict(weights, config_from_flags(flags)[0])
    >>> unet(torch.zeros(1, 3, 64, 64), 10).sample.shape
    torch.Size([1, 6, 64, 64])

    ```
    """
    return _load(_build_unet(config), state_dict, config.get("use_new_attention_order", False))


def convert_classifier_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> NoisyClassifier:
    r"""
    The authors' `EncoderUNetModel` -> [`NoisyClassifier`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under the authors' names. They are copied.
        config (`Mapping[str, Any]`): The arguments of its constructor, as from [`config_from_flags`];
            `attention_resolutions` are downsampling rates.

    Returns:
        [`NoisyClassifier`]: With the same logits to rounding, in evaluation mode. The noise that it was trained on is
        not recorded in it; [`convert`] does that.

    Raises:
        `ValueError`: As for [`convert_unet_state_dict`].

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.guided_diffusion import config_from_flags, convert_classifier_state_dict

    >>> flags = "--image_size 64 --classifier_width 64 --classifier_depth 1"
    >>> network, _ = config_from_flags(flags, classifier=True, num_classes=10)
    >>> classifier = convert_classifier_state_dict(torch.load("model000100.pt", weights_only=True), network)
    >>> classifier(torch.zeros(1, 3, 64, 64), 10).shape
    torch.Size([1, 10])

    ```
    """
    return _load(_build_classifier(config), state_dict, config.get("use_new_attention_order", False))


def _network(config: Mapping[str, Any], foreign: Sequence[str]) -> tuple[dict[str, Any], list[int], list[bool]]:
    """The authors' arguments with their defaults, the widths of the levels, and which of these have attention."""
    known = {name: default for name, default in _NETWORK.items() if name not in foreign}
    network = known | dict(config)
    missing = [name for name, default in known.items() if default is None and network[name] is None]
    unknown = sorted(network.keys() - known)
    if missing or unknown:
        raise ValueError(f"`config` lacks {missing} and has the unknown {unknown}: it may have {list(known)}.")
    widths = [int(multiplier * network["model_channels"]) for multiplier in network["channel_mult"]]
    if not widths or any(width < 1 or width % 32 for width in widths):
        raise ValueError(
            f"`model_channels` {network['model_channels']} times `channel_mult` {tuple(network['channel_mult'])} is "
            f"{widths}, but the authors' networks normalize in 32 groups: every width must be a multiple of 32."
        )
    attends = [2**level in network["attention_resolutions"] for level in range(len(widths))]
    # The middle block has attention in any case. The size of a head goes before the number of heads.
    attended = sorted({width for width, here in zip(widths, attends, strict=True) if here} | {widths[-1]})
    name = "num_heads" if network["num_head_channels"] == -1 else "num_head_channels"
    if network[name] < 1 or any(width % network[name] for width in attended):
        raise ValueError(f"`{name}` is {network[name]}, but must divide the {attended} channels with attention.")
    return network, widths, attends


def _build_unet(config: Mapping[str, Any]) -> UNet2DModel:
    """The network without weights."""
    network, widths, attends = _network(config, foreign=["pool"])
    heads, upsample = network["num_heads"], network["num_heads_upsample"]
    unet_class, arguments = UNet2DModel, {"attention_head_dim": network["num_head_channels"]}
    if network["num_head_channels"] == -1:
        if upsample not in (-1, heads):
            raise ValueError(
                f"`num_heads_upsample` is {upsample} and `num_heads` is {heads}, but diffusers has the same number "
                "of heads on the way down and up."
            )
        # The stock class has one size of heads for all levels; None is one head of full width at each.
        if heads == 1 or not any(attends[:-1]):
            arguments = {"attention_head_dim": None if heads == 1 else widths[-1] // heads}
        else:
            unet_class, arguments = ADMUNet2DModel, {"num_attention_heads": heads}
    if widths[0] != network["model_channels"]:
        unet_class, arguments = ADMUNet2DModel, arguments | {"time_proj_dim": network["model_channels"]}
    kind = "Resnet{}sampleBlock2D" if network["resblock_updown"] else "{}Block2D"
    with torch.device("meta"):
        return unet_class(
            sample_size=network["image_size"],
            in_channels=network["in_channels"],
            out_channels=network["out_channels"],
            block_out_channels=widths,
            layers_per_block=network["num_res_blocks"],
            down_block_types=["AttnDownBlock2D" if here else kind.format("Down") for here in attends],
            up_block_types=["AttnUpBlock2D" if here else kind.format("Up") for here in reversed(attends)],
            downsample_type="resnet" if network["resblock_updown"] else "conv",
            upsample_type="resnet" if network["resblock_updown"] else "conv",
            resnet_time_scale_shift="scale_shift" if network["use_scale_shift_norm"] else "default",
            # Without this the middle attention has no norm when time enters by scale and shift.
            attn_norm_num_groups=32,
            dropout=network["dropout"],
            num_class_embeds=network["num_classes"] or None,
            **arguments,
        )


def _build_classifier(config: Mapping[str, Any]) -> NoisyClassifier:
    """The network without weights."""
    network, widths, attends = _network(config, foreign=["num_classes", "dropout"])
    if network["num_head_channels"] == -1:
        raise ValueError(
            "`num_head_channels` is -1, but `NoisyClassifier` has heads of one size: give their number of channels."
        )
    kind = "ResnetDownsampleBlock2D" if network["resblock_updown"] else "DownBlock2D"
    with torch.device("meta"):
        return NoisyClassifier(
            sample_size=network["image_size"],
            in_channels=network["in_channels"],
            num_classes=network["out_channels"],
            layers_per_block=network["num_res_blocks"],
            block_out_channels=widths,
            down_block_types=["AttnDownBlock2D" if here else kind for here in attends],
            downsample_type="resnet" if network["resblock_updown"] else "conv",
            attention_head_dim=network["num_head_channels"],
            resnet_time_scale_shift="scale_shift" if network["use_scale_shift_norm"] else "default",
            pool=network["pool"],
            time_proj_dim=network["model_channels"],
        )


def _their_name(model: UNet2DModel | NoisyClassifier, module: str) -> str:
    """The authors' name for a module of the network."""
    layers = model.config.layers_per_block
    match module.split("."):
        case ["head", *_]:
            return _HEAD_NAMES[model.config.pool][module]
        # One entry per skip connection: the first convolution, then per level the layers and the downsampling ...
        case ["down_blocks", level, kind, index, *inner]:
            entry = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
            place = f"input_blocks.{entry}.{int(kind == 'attentions')}"
            if inner == ["conv"]:
                return f"{place}.op"
        # ... and as many on the way up, where the upsampling is a part of a level's last entry.
        case ["up_blocks", level, "upsamplers", _, *inner]:
            entry = int(level) * (layers + 1) + layers
            place = f"output_blocks.{entry}.{1 + hasattr(model.up_blocks[int(level)], 'attentions')}"
            if inner == ["conv"]:
                return f"{place}.conv"
        case ["up_blocks", level, kind, index, *inner]:
            place = f"output_blocks.{int(level) * (layers + 1) + int(index)}.{int(kind == 'attentions')}"
        case ["mid_block", kind, index, *inner]:
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
        case _:
            return _NAMES[module]
    return f"{place}.{_NAMES['.'.join(inner)]}"


def _sources(model: ModelMixin) -> dict[str, tuple[str, tuple[int, ...], int | None]]:
    """For each weight of ours theirs, the shape to bring it to, and for query, key and value the part of it."""
    sources = {}
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        part = {"to_q": 0, "to_k": 1, "to_v": 2}.get(module.rpartition(".")[2])
        shape = tuple(parameter.shape)
        if part is not None:
            shape = (3 * shape[0], *shape[1:])
        sources[name] = (f"{_their_name(model, module)}.{kind}", shape, part)
    return sources


def _problems(model: ModelMixin, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What hinders `state_dict` from filling `model`, by the authors' names."""
    problems, sources = {}, _sources(model)
    for key, shape, _ in sources.values():
        if key not in state_dict:
            problems[key] = "is missing"
        else:
            # Their attention and some heads are made of convolutions over a sequence or a pixel: last axes of 1.
            found = tuple(state_dict[key].shape)
            if found[: len(shape)] != shape or any(size != 1 for size in found[len(shape) :]):
                problems[key] = f"has shape {found} instead of {shape}"
            elif not state_dict[key].is_floating_point():
                problems[key] = f"has dtype {state_dict[key].dtype}, which no weight has"
            elif not state_dict[key].is_meta and not state_dict[key].isfinite().all():
                problems[key] = "has values that are not finite"
    return problems | dict.fromkeys(state_dict.keys() - {key for key, _, _ in sources.values()}, "is unknown")


def _load(model: ModelMixin, state_dict: Mapping[str, torch.Tensor], use_new_order: bool) -> ModelMixin:
    """Fill `model`, which has no weights yet, with `state_dict`."""
    problems = _problems(model, state_dict)
    if problems:
        fitting, width = [], state_dict.get("time_embed.0.weight", torch.empty(0)).shape[-1:]
        for name, flags in _RELEASED.items():
            classifier = name.endswith("_classifier")
            config, _ = config_from_flags(flags, classifier)
            if width == (config["model_channels"],):  # spares building the others
                other = _build_classifier(config) if classifier else _build_unet(config)
                if not _problems(other, state_dict):
                    fitting.append(name)
        listed = [f"`{key}` {problem}" for key, problem in sorted(problems.items())]
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: {', '.join(listed[:6])}"
            f"{f' and {len(listed) - 6} more' if len(listed) > 6 else ''}. "
            + (
                f"They have the names and shapes of the published {', '.join(fitting)}: give such a `name`."
                if fitting
                else "They are of no published checkpoint either: give a whole checkpoint, and the `flags` that it "
                "was trained with."
            )
        )
    model.to_empty(device="cpu")
    tensors = {}
    for name, (key, shape, part) in _sources(model).items():
        tensor = state_dict[key].reshape(shape)
        if part is not None:
            heads = 1 if use_new_order else model.get_submodule(name.rpartition(".to_")[0]).heads
            # The legacy order is q, k, v for each head in turn, the new one q, k, v with all heads in each.
            tensor = tensor.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
        tensors[name] = tensor
    model.load_state_dict(tensors)
    return model.eval()


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # the unpickler fails in many ways on what is no pickle
        raise ValueError(
            f"`{path}` cannot be read as a checkpoint of tensors: it is damaged, something else, or would run code "
            "when it is loaded. `--debug` shows what was wrong."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    ):
        held = list(weights)[:6] if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(
            f"`{path}` holds {held}, but must hold weights by name: give a file that the authors' trainer saved as "
            "`ema_*.pt` or `model*.pt`, or the weights alone."
        )
    return weights
