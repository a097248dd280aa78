"""`diffusers-ext convert pdae`: the PDAE authors' checkpoints -> folders for `from_pretrained`.

Their trainers save one file per autoencoder (with `ema_encoder` and `ema_decoder`) and one per pretrained diffusion
model (with `ema_denoise_fn`), each beside a YAML configuration:

```sh
diffusers-ext convert pdae checkpoint.pt my-pdae --config config.yml --ddpm_config ddpm/config.yml
diffusers-ext convert pdae ddpm/checkpoint.pt my-ddpm --config ddpm/config.yml --base
```

The averaged (`ema_`) weights are converted, as their samplers load them. Their decoder is one network, an ADM U-Net
and a second middle and output half (`shift_*`), which become a stock `UNet2DModel` and a `PDAEGradientEstimator`. The
configuration is needed because weights do not tell how attention splits them into heads.
"""

import argparse
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffusers_ext.pipelines.pdae import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline, PDAEScheduler

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
    "time_emb_proj.time_proj": "emb_layers.1",
    "time_emb_proj.code_proj": "emb_z_layers.1",
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("checkpoint", type=Path, help="the authors' file: PyTorch (.pt) or safetensors")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist or be empty")
    parser.add_argument("--config", type=Path, required=True, help="the YAML file that belongs to the checkpoint")
    parser.add_argument(
        "--ddpm_config",
        "--ddpm-config",
        type=Path,
        help="YAML file of the pretrained diffusion model; by default what `trained_ddpm_config` in --config names",
    )
    parser.add_argument(
        "--base",
        action="store_true",
        help="the checkpoint is a pretrained diffusion model without PDAE: write a stock DDPMPipeline",
    )


def run(args: argparse.Namespace) -> None:
    """Converts one checkpoint. The folder appears when it is complete.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        `ValueError`: The folder is not empty, a file cannot be read or lacks something, or diffusers cannot express
            the network; the message says which and why.
        `OSError`: A file does not exist or cannot be written.
    """
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ValueError(f"`{args.out}` exists and is not an empty folder: give the name of a new one.")
    config = _read_config(args.config)
    num_train_timesteps, betas_type = _fields(config, "diffusion_config", {"timesteps": int, "betas_type": str})
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    if betas_type not in schedules:
        raise ValueError(f"`betas_type` is {betas_type!r} in `{args.config}`, but must be one of {list(schedules)}.")
    schedule = {"num_train_timesteps": num_train_timesteps, "beta_schedule": schedules[betas_type]}

    if args.base:
        denoise_fn_config = _section(config, "denoise_fn_config")
        (sample_size,) = _fields(config, "train_dataset_config", {"image_size": int})
        checkpoint = _read_checkpoint(args.checkpoint, ["ema_denoise_fn"])
        unet = convert_unet(checkpoint["ema_denoise_fn"], denoise_fn_config, sample_size)
        pipeline, card = DDPMPipeline(unet, DDPMScheduler(**schedule)), {}
    else:
        ddpm_config = args.ddpm_config or config.get("trained_ddpm_config")
        if not ddpm_config or not Path(ddpm_config).is_file():
            raise ValueError(
                f"the pretrained diffusion model's configuration {str(ddpm_config)!r} is not a file: give it by "
                "`--ddpm_config`."
            )
        denoise_fn_config = _section(_read_config(Path(ddpm_config)), "denoise_fn_config")
        checkpoint = _read_checkpoint(args.checkpoint, ["ema_encoder", "ema_decoder"])
        encoder = convert_encoder(checkpoint["ema_encoder"])
        unet, estimator = convert_decoder(checkpoint["ema_decoder"], denoise_fn_config, encoder.config.sample_size)
        pipeline = PDAEPipeline(unet, encoder, estimator, PDAEScheduler(**schedule))
        training = {"converted from the authors' file": args.checkpoint.name}
        if "step" in checkpoint:
            training["steps"] = checkpoint["step"]
        card = {"card": {"training": training}}

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as folder:
        new = Path(folder) / args.out.name
        pipeline.save_pretrained(new, **card)
        if args.out.exists():
            args.out.rmdir()
        os.replace(new, args.out)
    size = unet.config.sample_size
    print(f"wrote {args.out}: {type(pipeline).__name__} for {size} x {size}, {unet.config.in_channels} channel(s)")


def convert_unet(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], sample_size: int | None = None
) -> UNet2DModel:
    r"""
    The authors' `UNet` (of the ADM kind: time by scale and shift, residual up- and downsampling) -> diffusers.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under the authors' names, for example `ema_denoise_fn`.
        config (`Mapping[str, Any]`): The `denoise_fn_config` of its YAML file.
        sample_size (`int`, *optional*): Height and width of its images, which a pipeline without PDAE has to know.

    Returns:
        [`UNet2DModel`]: With the same outputs to rounding, in evaluation mode.

    Raises:
        `ValueError`: A field of `config` or a weight is missing, unknown or of the wrong shape, or `UNet2DModel`
            cannot express the network: a learned variance, other than two dimensions, first channels that are not
            `base_channel`, several heads whose size differs between the widths with attention.

    Example:

    ```py
    >>> import torch
    >>> import yaml
    >>> from diffusers_ext.convert.pdae import convert_unet

    >>> weights = torch.load("ddpm/checkpoint.pt", weights_only=True)["ema_denoise_fn"]
    >>> with open("ddpm/config.yml") as file:
    ...     config = yaml.safe_load(file)["denoise_fn_config"]
    >>> unet = convert_unet(weights, config)
    >>> unet(torch.randn(1, 1, 16, 16), 500).sample.shape
    torch.Size([1, 1, 16, 16])

    ```
    """
    types = {
        "input_channel": int,
        "base_channel": int,
        "channel_multiplier": list,
        "num_residual_blocks_of_a_block": int,
        "attention_resolutions": list,
        "num_heads": int,
        "head_channel": int,
        "use_new_attention_order": bool,
    }
    in_channels, base, multipliers, layers, rates, num_heads, head_channel, use_new_order = _fields(
        {"denoise_fn_config": config}, "denoise_fn_config", types
    )
    if config.get("learn_sigma"):
        raise ValueError(
            "`learn_sigma` is true, but the authors' autoencoder and their deterministic sampler take a network whose "
            "output is the noise alone: there is no such checkpoint of theirs to convert."
        )
    if config.get("dims", 2) != 2:
        raise ValueError(f"`dims` is {config['dims']}, but `UNet2DModel` has 2.")
    widths = [int(multiplier * base) for multiplier in multipliers]
    if widths[:1] != [base]:
        raise ValueError(
            f"`channel_multiplier` is {multipliers}, but must start with 1: the time embedding of `UNet2DModel` "
            "starts from as many numbers as its first block has channels."
        )
    if any(width % 32 for width in widths):
        raise ValueError(
            f"`base_channel` {base} times `channel_multiplier` {multipliers} is {widths}, but the authors' networks "
            "normalize in 32 groups: every width must be a multiple of 32. Take the configuration of this checkpoint."
        )
    # A downsampling rate in `attention_resolutions` marks a level; the middle block has attention in any case.
    has_attention = [2**level in rates for level in range(len(widths))]
    attended = {width for width, attention in zip(widths, has_attention, strict=True) if attention} | {widths[-1]}
    # The size of a head is one number for a whole UNet2DModel; None is one head of full width at every level.
    if head_channel == -1 and num_heads == 1:
        attention_head_dim = None
    elif head_channel == -1 and len(attended) > 1:
        raise ValueError(
            f"`num_heads` is {num_heads} at several widths ({sorted(attended)}), so its heads have different sizes, "
            "but `UNet2DModel` has one `attention_head_dim`: diffusers cannot express this network."
        )
    else:
        attention_head_dim = head_channel if head_channel != -1 else widths[-1] // max(num_heads, 1)
        if attention_head_dim < 1 or any(width % attention_head_dim for width in attended):
            raise ValueError(
                f"`num_heads` {num_heads} and `head_channel` {head_channel} do not divide the {sorted(attended)} "
                "channels with attention: take the configuration of this checkpoint."
            )
    unet = UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=[
            "AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in has_attention
        ],
        up_block_types=[
            "AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(has_attention)
        ],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=attention_head_dim,
        attn_norm_num_groups=32,
        dropout=float(config.get("dropout") or 0),
        num_class_embeds=config.get("num_class"),
    )
    theirs = {module: _their_name(unet, module) for module in _modules(unet)}
    return _load(unet, state_dict, theirs, use_new_order)


def convert_decoder(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], sample_size: int | None = None
) -> tuple[UNet2DModel, PDAEGradientEstimator]:
    r"""
    The authors' `ShiftUNet` -> the pretrained network and the gradient estimator, which it holds in one.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under the authors' names, for example `ema_decoder`.
        config (`Mapping[str, Any]`): The `denoise_fn_config` of the pretrained diffusion model's YAML file.
        sample_size (`int`, *optional*): Height and width of the images.

    Returns:
        `tuple[UNet2DModel, PDAEGradientEstimator]`: With the same outputs to rounding, in evaluation mode.

    Raises:
        `ValueError`: As for [`convert_unet`], and for `num_class`: the authors' decoder has no class embedding.

    Example:

    ```py
    >>> import torch
    >>> import yaml
    >>> from diffusers_ext.convert.pdae import convert_decoder

    >>> weights = torch.load("checkpoint.pt", weights_only=True)["ema_decoder"]
    >>> with open("ddpm.yml") as file:
    ...     config = yaml.safe_load(file)["denoise_fn_config"]
    >>> unet, gradient_estimator = convert_decoder(weights, config, sample_size=64)
    >>> gradient_estimator.config.latent_dim
    8

    ```
    """
    own = {key: tensor for key, tensor in state_dict.items() if key.startswith(("label_emb.", "shift_"))}
    weight = own.get("label_emb.weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(
            f"`label_emb.weight`, which takes the code, is {'missing' if weight is None else tuple(weight.shape)}, "
            "but must have 2 dimensions: this is no decoder of PDAE. A diffusion model alone is for `convert_unet`."
        )
    if config.get("num_class") is not None:
        raise ValueError(
            f"`num_class` is {config['num_class']}, but the authors' decoder has no class embedding (the code takes "
            "its place): take the configuration of the diffusion model that this decoder was trained on."
        )
    unet = convert_unet({key: state_dict[key] for key in state_dict if key not in own}, config, sample_size)
    estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=weight.shape[1])
    theirs = {
        module: "label_emb" if module == "code_embedding" else f"shift_{_their_name(estimator, module)}"
        for module in _modules(estimator)
    }
    return unet, _load(estimator, own, theirs, config["use_new_attention_order"])


def convert_encoder(state_dict: Mapping[str, torch.Tensor]) -> PDAEEncoder:
    r"""
    Any of the authors' five encoders (for 64 x 64 and 128 x 128 images) -> [`PDAEEncoder`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under the authors' names, for example `ema_encoder`.

    Returns:
        [`PDAEEncoder`]: With the same outputs to rounding, in evaluation mode.

    Raises:
        `ValueError`: The weights are not those of a chain of halving blocks and one linear layer.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.pdae import convert_encoder

    >>> weights = torch.load("checkpoint.pt", weights_only=True)["ema_encoder"]
    >>> convert_encoder(weights)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 8])

    ```
    """
    weights = {
        int(key.split(".")[1]): weight
        for key, weight in state_dict.items()
        if re.fullmatch(r"encoder\.\d+\.weight", key)
    }
    convolutions = {index: weights[index] for index in sorted(weights) if weights[index].ndim == 4}
    linears = [weight for weight in weights.values() if weight.ndim == 2]
    channels = [weight.shape[0] for weight in convolutions.values()]
    pixels = linears[0].shape[1] // channels[-1] if channels and len(linears) == 1 else 0
    if not pixels or channels[-1] * math.isqrt(pixels) ** 2 != linears[0].shape[1]:
        raise ValueError(
            f"the weights {list(state_dict)[:4]}... hold {len(channels)} convolutions `encoder.<n>.weight` and linear "
            f"layers of shape {[tuple(weight.shape) for weight in linears]}, but an encoder of PDAE is convolutions "
            "and one linear layer on their square output."
        )
    attentions = [int(key.split(".")[1]) for key in state_dict if re.fullmatch(r"encoder\.\d+\.qkv\.weight", key)]
    encoder = PDAEEncoder(
        sample_size=math.isqrt(pixels) * 2 ** len(channels),
        in_channels=next(iter(convolutions.values())).shape[1],
        latent_dim=linears[0].shape[0],
        block_out_channels=tuple(channels),
        attention_block=sum(index < attentions[0] for index in convolutions) - 1 if attentions else None,
        num_attention_heads=4,
    )
    # Their `nn.Sequential` has the layers of our blocks in the same order, then a reshape and the linear layer.
    theirs = {}
    for module in _modules(encoder):
        if module == "to_latent":
            theirs[module] = f"encoder.{len(encoder.blocks) + 1}"
        else:
            _, index, *inner = module.split(".")
            theirs[module] = ".".join(["encoder", index, *([_NAMES[".".join(inner)]] if inner else [])])
    return _load(encoder, state_dict, theirs, use_new_order=False)


def _their_name(model: UNet2DModel | PDAEGradientEstimator, module: str) -> str:
    """The authors' name for a module of the U-Net or, without `shift_`, of the estimator."""
    layers = model.config.layers_per_block
    match module.split("."):
        # One entry per skip connection: the first convolution, then per level the layers and the downsampling ...
        case ["down_blocks", level, kind, index, *inner]:
            entry = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
            place = f"input_blocks.{entry}.{int(kind == 'attentions')}"
        # ... and as many on the way up, where the upsampling is a part of a level's last entry.
        case ["up_blocks", level, "upsamplers", _, *inner]:
            entry = int(level) * (layers + 1) + layers
            place = f"output_blocks.{entry}.{1 + hasattr(model.up_blocks[int(level)], 'attentions')}"
        case ["up_blocks", level, kind, index, *inner]:
            place = f"output_blocks.{int(level) * (layers + 1) + int(index)}.{int(kind == 'attentions')}"
        case ["mid_block", kind, index, *inner]:
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
        case _:
            return _NAMES[module]
    return f"{place}.{_NAMES['.'.join(inner)]}"


def _modules(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in model.state_dict()}


def _load(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], theirs: Mapping[str, str], use_new_order: bool
) -> nn.Module:
    """Fill `model` with `state_dict`; `theirs` has the authors' name of each of its modules."""
    tensors, problems, known = {}, {}, set()
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        attention, _, layer = module.rpartition(".")
        key = f"{theirs[module]}.{kind}"
        known.add(key)
        if key not in state_dict:
            problems[key] = "is missing"
            continue
        # Their attention is made of convolutions over a sequence (a last axis of 1), one for query, key and value.
        fused = layer in ("to_q", "to_k", "to_v")
        shape = (3 * parameter.shape[0] if fused else parameter.shape[0], *parameter.shape[1:])
        tensor = state_dict[key]
        if tensor.ndim > parameter.ndim:
            tensor = tensor.squeeze(-1)
        if tensor.shape != shape:
            problems[key] = f"has shape {tuple(state_dict[key].shape)} instead of {shape}"
            continue
        if fused:
            part = ("to_q", "to_k", "to_v").index(layer)
            heads = 1 if use_new_order else model.get_submodule(attention).heads
            # The legacy order is q, k, v for each head in turn, the new one q, k, v with all heads in each.
            tensor = tensor.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
        tensors[name] = tensor
    problems |= dict.fromkeys(state_dict.keys() - known, "is unknown")
    if problems:
        listed = [f"`{key}` {problem}" for key, problem in sorted(problems.items())]
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: {', '.join(listed[:6])}"
            f"{f' and {len(listed) - 6} more' if len(listed) > 6 else ''}. Give a whole checkpoint of the authors' "
            "and the configuration that was saved with it."
        )
    model.load_state_dict(tensors)
    return model.eval()


def _read_checkpoint(path: Path, parts: list[str]) -> dict[str, Any]:
    """The authors' file as a dict that has `parts`; in safetensors, keys start with `<part>.`."""
    try:
        if path.suffix == ".safetensors":
            checkpoint = {}
            for key, tensor in load_file(path).items():
                part, _, name = key.partition(".")
                checkpoint.setdefault(part, {})[name] = tensor
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`{path}` cannot be read as a checkpoint of tensors: it is damaged, something else, or would run code "
            "when it is loaded. `--debug` shows what was wrong."
        ) from error
    present = list(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
    for part in parts:
        weights = checkpoint.get(part) if isinstance(checkpoint, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(
                f"`{path}` has no weights `{part}` but {present}: an autoencoder has `ema_encoder` and `ema_decoder`, "
                "a pretrained diffusion model, which `--base` converts, has `ema_denoise_fn`."
            )
    return checkpoint


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"`{path}` holds a {type(config).__name__}, but must hold sections such as `diffusion_config`."
        )
    return config


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(
            f"the configuration has no section `{name}` but {list(config)}: add it, or give another file."
        )
    return section


def _fields(config: Mapping[str, Any], name: str, types: Mapping[str, type]) -> list[Any]:
    """The values of the fields `types` of the section `name`."""
    section = _section(config, name)
    wrong = [
        f"`{field}` is {section.get(field, 'missing')!r}, but must be of type `{kind.__name__}`"
        for field, kind in types.items()
        if type(section.get(field)) is not kind
    ]
    if wrong:
        raise ValueError(f"in the section `{name}` of the configuration {'; '.join(wrong)}.")
    return [section[field] for field in types]
