r"""`diffusers-ext convert glide`: OpenAI's GLIDE checkpoints -> a folder for `from_pretrained`.

```sh
diffusers-ext convert glide base.pt my-glide --upsampler upsample.pt --vocab encoder.json --merges vocab.bpe
diffusers-ext convert glide base_inpaint.pt my-glide-inpaint --upsampler upsample_inpaint.pt \
    --vocab encoder.json --merges vocab.bpe
```

Each file holds a U-Net and its text transformer, which become a stock `UNet2DConditionModel` and a `GlideTextEncoder`.
Which of the four it is can be told from the number of input channels. The vocabulary is GPT-2's: `encoder.json` and
`vocab.bpe` beside OpenAI's code (also as `.gz`), or `vocab.json` and `merges.txt` of any GPT-2 repo.
"""

import argparse
import gzip
import json
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Tokenizer

from diffusers_ext.pipelines.glide import GlidePipeline, GlideScheduler, GlideTextEncoder

# The two networks; each exists with and without channels for inpainting. Attention is where images are 32, 16 and 8
# pixels wide.
_NETWORKS = {
    "base": {
        "in_channels": (3, 7),
        "sample_size": 64,
        "multipliers": (1, 2, 3, 4),
        "layers_per_block": 3,
        "beta_schedule": "squaredcos_cap_v2",
    },
    "upsampler": {
        "in_channels": (6, 10),
        "sample_size": 256,
        "multipliers": (1, 1, 2, 2, 4, 4),
        "layers_per_block": 2,
        "beta_schedule": "linear",
    },
}
# diffusers' module -> OpenAI's; where it stands in the network is for `_their_name`
_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
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
    "add_k_proj": "encoder_kv",
    "add_v_proj": "encoder_kv",
    "to_out.0": "proj_out",
}
# What a fused projection is made of, for each head in turn.
_FUSED = {
    "qkv": ("to_q", "to_k", "to_v"),
    "encoder_kv": ("add_k_proj", "add_v_proj"),
    "c_qkv": ("to_q", "to_k", "to_v"),
}
# The same for the text transformer, by whole names.
_TEXT_NAMES = {
    "token_embedding.weight": "token_embedding.weight",
    "position_embedding": "positional_embedding",
    "padding_embedding": "padding_embedding",
    "final_layer_norm.weight": "final_ln.weight",
    "final_layer_norm.bias": "final_ln.bias",
    "text_projection.weight": "transformer_proj.weight",
    "text_projection.bias": "transformer_proj.bias",
}
_TEXT_LAYER_NAMES = {
    "norm1": "ln_1",
    "attn1.to_q": "attn.c_qkv",
    "attn1.to_k": "attn.c_qkv",
    "attn1.to_v": "attn.c_qkv",
    "attn1.to_out.0": "attn.c_proj",
    "norm3": "ln_2",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TEXT_PREFIXES = ("transformer.", "final_ln.", "token_embedding.", "positional_", "padding_", "transformer_proj.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("checkpoint", type=Path, help="base.pt or base_inpaint.pt, as .pt or .safetensors")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist or be empty")
    parser.add_argument(
        "--upsampler", type=Path, help="upsample.pt or upsample_inpaint.pt; without it images are small"
    )
    parser.add_argument(
        "--vocab", type=Path, required=True, help="GPT-2's vocabulary: encoder.json or vocab.json, also as .gz"
    )
    parser.add_argument(
        "--merges", type=Path, required=True, help="GPT-2's merges: vocab.bpe or merges.txt, also as .gz"
    )


def run(args: argparse.Namespace) -> None:
    """Converts one or two checkpoints. The folder appears when it is complete.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        `ValueError`: The folder is not empty, a file cannot be read, lacks something or is not the one that it should
            be; the message says which and why.
        `OSError`: A file does not exist or cannot be written.
    """
    out = Path(os.path.realpath(args.out))  # not a link, and no `..`
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()) or out == Path.cwd()):
        raise ValueError(
            f"`{args.out}` exists and is not an empty folder, or the one that you are in: give the name of a new one."
        )
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"`{args.out}` is below `{above}`, which is no folder: give another name.")
    tokenizer = _read_tokenizer(args.vocab, args.merges)
    stages = []
    for expected, path in (("base", args.checkpoint), ("upsampler", args.upsampler)):
        if path is None:
            continue
        weights = _read_checkpoint(path)
        name = _network(weights)
        if name != expected:
            raise ValueError(
                f"`{path}` is a GLIDE {name}, but was given as the {expected}: `checkpoint` is base.pt or "
                "base_inpaint.pt, `--upsampler` is upsample.pt or upsample_inpaint.pt."
            )
        parts = {
            prefix: {key: tensor for key, tensor in weights.items() if key.startswith(_TEXT_PREFIXES) is is_text}
            for prefix, is_text in (("unet", False), ("text_encoder", True))
        }
        unet, text_encoder = convert_unet(parts["unet"]), convert_text_encoder(parts["text_encoder"])
        if text_encoder.config.vocab_size != len(tokenizer):
            raise ValueError(
                f"`{args.vocab}` has {len(tokenizer)} tokens, but the text transformer in `{path}` knows "
                f"{text_encoder.config.vocab_size}: give the vocabulary of GPT-2."
            )
        stages.append((unet, text_encoder, GlideScheduler(beta_schedule=_NETWORKS[name]["beta_schedule"])))
    kinds = {unet.config.in_channels in (7, 10) for unet, _, _ in stages}
    if len(kinds) == 2:
        raise ValueError(
            f"one of `{args.checkpoint}` and `{args.upsampler}` inpaints and the other does not: give base.pt and "
            "upsample.pt, or base_inpaint.pt and upsample_inpaint.pt."
        )
    unet, text_encoder, scheduler = stages[0]
    upsampler = stages[1] if len(stages) == 2 else ()
    pipeline = GlidePipeline(unet, text_encoder, tokenizer, scheduler, *upsampler)
    training = {"converted from OpenAI's files": ", ".join(p.name for p in (args.checkpoint, args.upsampler) if p)}

    with tempfile.TemporaryDirectory(dir=above, prefix=".") as folder:
        new = Path(folder) / out.name
        pipeline.save_pretrained(new, card={"training": training})
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(new, out)
    size = stages[-1][0].config.sample_size
    print(f"wrote {args.out}: GlidePipeline for {size} x {size}{', with inpainting' if kinds == {True} else ''}")


def convert_unet(state_dict: Mapping[str, torch.Tensor], attention_head_dim: int = 64) -> UNet2DConditionModel:
    r"""
    A U-Net of GLIDE -> diffusers. It expects the text encoder's projected last position as `class_labels` and all
    positions as `encoder_hidden_states`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under OpenAI's names, without the text transformer's.
        attention_head_dim (`int`, *optional*, defaults to 64):
            Channels per head of attention, which weights do not tell; 64 in all of OpenAI's files.

    Returns:
        [`UNet2DConditionModel`]: With the same outputs to rounding, in evaluation mode.

    Raises:
        `ValueError`: The weights are of no GLIDE network, or one is missing, unknown, of the wrong shape, or not of
            finite floats.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.glide import convert_unet

    >>> weights = torch.load("unet.pt", weights_only=True)
    >>> unet = convert_unet(weights, attention_head_dim=32)
    >>> unet.config.in_channels, unet.config.sample_size
    (7, 64)

    ```
    """
    _check_numbers(state_dict)
    network = _NETWORKS[_network(state_dict)]
    conv_in = state_dict["input_blocks.0.0.weight"]
    base = conv_in.shape[0]
    widths = [base * multiplier for multiplier in network["multipliers"]]
    has_attention = [network["sample_size"] // 2**level <= 32 for level in range(len(widths))]
    attended = [width for width, attention in zip(widths, has_attention, strict=True) if attention]
    encoder_kv = state_dict.get("middle_block.1.encoder_kv.weight")
    if encoder_kv is None or encoder_kv.ndim != 3 or encoder_kv.shape[1] == 0:
        raise ValueError(
            "`middle_block.1.encoder_kv.weight`, which takes the text, is missing: this is no GLIDE U-Net."
        )
    if type(attention_head_dim) is not int or attention_head_dim < 1:
        raise ValueError(f"`attention_head_dim` is {attention_head_dim!r}, but must be an `int` of at least 1.")
    if base == 0 or base % 32 or any(width % attention_head_dim for width in attended):
        raise ValueError(
            f"`input_blocks.0.0.weight` has {base} channels, but GLIDE's networks normalize in 32 groups and attend "
            f"in heads of {attention_head_dim} (`attention_head_dim`): both must divide {sorted(set(attended))}."
        )
    unet = UNet2DConditionModel(
        sample_size=network["sample_size"],
        in_channels=conv_in.shape[1],
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=network["layers_per_block"],
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in has_attention],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in has_attention[::-1]],
        cross_attention_dim=encoder_kv.shape[1],
        attention_head_dim=attention_head_dim,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    tensors, theirs = {}, {}
    for name, parameter in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        key = theirs[name] = f"{_their_name(unet, module)}.{kind}"
        tensor = state_dict.get(key)
        # Their attention is made of convolutions over a sequence, with a last axis of 1.
        if tensor is not None and tensor.ndim == parameter.ndim + 1 and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        tensors[name] = _split(name, key, tensor, parameter.shape, parameter.shape[0] // attention_head_dim)
    return _load(unet, tensors, theirs, state_dict)


def convert_text_encoder(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int = 8, num_hidden_layers: int = 16
) -> GlideTextEncoder:
    r"""
    The text transformer of a GLIDE network -> [`GlideTextEncoder`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Its weights under OpenAI's names, without the U-Net's.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads per layer, which weights do not tell; 8 in all of OpenAI's files.
        num_hidden_layers (`int`, *optional*, defaults to 16): Layers that there must be; 16 in all of OpenAI's files.

    Returns:
        [`GlideTextEncoder`]: With the same outputs to rounding, in evaluation mode.

    Raises:
        `ValueError`: A weight is missing, unknown, of the wrong shape or not of finite floats, or the heads do not
            divide the width.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.glide import convert_text_encoder

    >>> weights = torch.load("text_encoder.pt", weights_only=True)
    >>> text_encoder = convert_text_encoder(weights, num_attention_heads=4, num_hidden_layers=2)
    >>> text_encoder.config.hidden_size, text_encoder.config.num_hidden_layers
    (64, 2)

    ```
    """
    _check_numbers(state_dict)
    sizes = {}
    for key in ("token_embedding.weight", "positional_embedding", "transformer_proj.weight"):
        if key not in state_dict or state_dict[key].ndim != 2:
            raise ValueError(f"`{key}` is missing or has not two dimensions: this is no text transformer of GLIDE.")
        sizes[key] = state_dict[key].shape
    encoder = GlideTextEncoder(
        vocab_size=sizes["token_embedding.weight"][0],
        max_position_embeddings=sizes["positional_embedding"][0],
        hidden_size=sizes["token_embedding.weight"][1],
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        projection_dim=sizes["transformer_proj.weight"][0],
    )
    tensors, theirs = {}, {}
    for name, parameter in encoder.state_dict().items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)\.(weight|bias)", name):
            key = f"transformer.resblocks.{match[1]}.{_TEXT_LAYER_NAMES[match[2]]}.{match[3]}"
        else:
            key = _TEXT_NAMES[name]
        theirs[name] = key
        tensors[name] = _split(name, key, state_dict.get(key), parameter.shape, num_attention_heads)
    return _load(encoder, tensors, theirs, state_dict)


def _network(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Which of the networks the weights are of: "base" or "upsampler"."""
    conv_in = state_dict.get("input_blocks.0.0.weight")
    channels = conv_in.shape[1] if conv_in is not None and conv_in.ndim == 4 else None
    for name, network in _NETWORKS.items():
        if channels in network["in_channels"]:
            return name
    raise ValueError(
        f"`input_blocks.0.0.weight` has {channels} input channels, but GLIDE's networks have 3 (base), 7 (base for "
        "inpainting), 6 (upsampler) or 10 (upsampler for inpainting): these are no weights of GLIDE's."
    )


def _their_name(unet: UNet2DConditionModel, module: str) -> str:
    """OpenAI's name for a module of the U-Net."""
    layers = unet.config.layers_per_block
    match module.split("."):
        # One entry per skip connection: the first convolution, then per level the layers and the downsampling ...
        case ["down_blocks", level, kind, index, *inner]:
            entry = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
            place = f"input_blocks.{entry}.{int(kind == 'attentions')}"
        # ... and as many on the way up, where the upsampling is a part of a level's last entry.
        case ["up_blocks", level, "upsamplers", _, *inner]:
            entry = int(level) * (layers + 1) + layers
            place = f"output_blocks.{entry}.{1 + hasattr(unet.up_blocks[int(level)], 'attentions')}"
        case ["up_blocks", level, kind, index, *inner]:
            place = f"output_blocks.{int(level) * (layers + 1) + int(index)}.{int(kind == 'attentions')}"
        case ["mid_block", kind, index, *inner]:
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
        case _:
            return _NAMES[module]
    return f"{place}.{_NAMES['.'.join(inner)]}"


def _check_numbers(state_dict: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"`{key}` is {tensor.layout} of {tensor.dtype}, but must be dense, and of "
                f"{', '.join(map(str, _DTYPES))}."
            )
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"`{key}` has values that are not finite: the file is damaged, or its training failed.")


def _split(
    name: str, key: str, tensor: torch.Tensor | None, shape: tuple[int, ...], heads: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """Of a fused projection the part that `name` is; with the shape that it, or the whole projection, must have."""
    layer, place = (full.rpartition(".")[0].rpartition(".")[2] for full in (name, key))
    fused = _FUSED.get(place, ())
    if layer not in fused:
        return tensor, shape
    whole = (len(fused) * shape[0], *shape[1:])
    if tensor is None or tensor.shape != whole:
        return tensor, whole
    return tensor.unflatten(0, (heads, len(fused), -1))[:, fused.index(layer)].flatten(0, 1), shape


def _load(
    model: nn.Module,
    tensors: Mapping[str, tuple[torch.Tensor | None, tuple[int, ...]]],
    theirs: Mapping[str, str],
    state_dict: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Fill `model` with `tensors`, each with the shape that it must have; `theirs` has OpenAI's names of them."""
    problems = dict.fromkeys(state_dict.keys() - set(theirs.values()), "is unknown")
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            problems[theirs[name]] = "is missing"
        elif tensor.shape != shape:
            found = tuple(state_dict[theirs[name]].shape)
            problems[theirs[name]] = f"has shape {found}, but needs {math.prod(shape)} numbers as {tuple(shape)}"
    if problems:
        listed = [f"`{key}` {problem}" for key, problem in sorted(problems.items())]
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: {', '.join(listed[:3])}"
            f"{f' and {len(listed) - 3} more' if len(listed) > 3 else ''}. Give all weights of this network, and none "
            "of another."
        )
    model.load_state_dict({name: tensor for name, (tensor, _) in tensors.items()})
    return model.eval()


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix.lower() == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # damaged files fail in any way
        raise ValueError(
            f"`{path}` cannot be read as a checkpoint of tensors: it is damaged, something else, or would run code "
            "when it is loaded. `--debug` shows what was wrong."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in weights.items()
    ):
        raise ValueError(f"`{path}` holds something else than weights by their names: give OpenAI's file as it is.")
    return weights


def _read_tokenizer(vocab: Path, merges: Path) -> GPT2Tokenizer:
    contents = {}
    for path, name in ((vocab, "vocab.json"), (merges, "merges.txt")):
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode()
            contents[name] = text.replace("\r\n", "\n")
        except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"`{path}` cannot be read as text: {error}") from error
    try:
        tokens = json.loads(contents["vocab.json"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`{vocab}` cannot be read as JSON: {error}") from error
    numbers = list(tokens.values()) if isinstance(tokens, dict) else [None]
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise ValueError(
            f"`{vocab}` is no vocabulary: it must give each token a number from 0 on, and each number once."
        )
    lines = [line for line in contents["merges.txt"].split("\n") if line and not line.startswith("#version")]
    unknown = [line for line in lines if line.count(" ") != 1 or line.replace(" ", "") not in tokens]
    if unknown or "<|endoftext|>" not in tokens:
        raise ValueError(
            f"`{merges}` has {len(unknown)} lines that are no pair of tokens of `{vocab}` "
            f"({', '.join(repr(line[:40]) for line in unknown[:3])}), or the vocabulary has no '<|endoftext|>': give "
            "both files of GPT-2's."
        )
    # Every token is a byte, or what one merge makes, or the end of the text.
    if not len(lines) == len(set(lines)) == len(tokens) - 256 - 1:
        raise ValueError(
            f"`{merges}` has {len(lines)} merges, {len(set(lines))} of them different, but the {len(tokens)} tokens "
            f"of `{vocab}` need {len(tokens) - 257}, each once: give the whole file of GPT-2's."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in contents.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return GPT2Tokenizer.from_pretrained(folder)
