r"""`diffusers-ext convert karlo-prior`: Karlo's prior -> a folder for `from_pretrained`.

```sh
diffusers-ext convert karlo-prior prior-ckpt-step=01000000-of-01000000.ckpt my-prior \
    --stats ViT-L-14_stats.th --clip clip-vit-large-patch14
```

The network becomes a stock `PriorTransformer`. With `--clip`, a folder of the CLIP that it was trained for (OpenAI's
ViT-L/14 as transformers has it), the result is an `UnCLIPPriorPipeline` with its text encoder and tokenizer; without,
the folder holds the network alone, for `PriorTransformer.from_pretrained`. Karlo's weights are under the CreativeML
Open RAIL-M license.

Checkpoints of DALLE2-pytorch cannot be converted, since no weights of a `PriorTransformer` compute what their network
does: it has rotary positions and a learned bias by distance, attends by cosine similarity with keys and values that
all heads share, and has SwiGLU in place of GELU, a learned null embedding for what is dropped, and an embedding for
each timestep.
"""

import argparse
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_ext.pipelines.unclip_prior import UnCLIPPriorPipeline, default_prior_scheduler

# diffusers' module or parameter -> Karlo's
_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "encoder_hidden_states_proj": "text_enc_proj",
    "embedding_proj": "text_emb_proj",
    "proj_in": "clip_img_proj",
    "positional_embedding": "positional_embedding",
    "prd_embedding": "prd_emb",
    "norm_out": "final_ln",
    "clip_mean": "clip_mean",
    "clip_std": "clip_std",
    "proj_to_clip_embeddings": "out_proj",
    # of a block
    "norm1": "ln_1",
    "attn1.to_q": "attn.c_qkv",
    "attn1.to_k": "attn.c_qkv",
    "attn1.to_v": "attn.c_qkv",
    "attn1.to_out.0": "attn.c_proj",
    "norm3": "ln_2",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # each head in turn has its rows of all three
_DALLE2 = re.compile(r"(^|\.)(causal_transformer\.|null_text_encodings$|null_text_embeds?$|null_image_embed$)")
_DALLE2_REASON = (
    "is of DALLE2-pytorch's prior, which cannot be converted: it is another network (rotary attention by cosine "
    "similarity, SwiGLU, learned null embeddings), and no weights make a `PriorTransformer` compute the same. Train a "
    "prior on the same embeddings instead."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("checkpoint", type=Path, help="Karlo's prior-ckpt-*.ckpt, as it is or as .safetensors")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist or be empty")
    parser.add_argument(
        "--stats", type=Path, required=True, help="mean and deviation of its image embeddings: ViT-L-14_stats.th"
    )
    parser.add_argument(
        "--clip", type=Path, help="folder of its CLIP with tokenizer, for a pipeline; without it the network alone"
    )


def run(args: argparse.Namespace) -> None:
    """Converts a checkpoint. The folder appears when it is complete.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        `ValueError`: The folder is not empty, a file cannot be read, lacks something or is not the one that it should
            be; the message says which and why.
        `OSError`: A file does not exist or cannot be written.
    """
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ValueError(f"`{args.out}` exists and is not an empty folder: give the name of a new one.")
    # 1. CLIP
    if args.clip is not None:
        if not (args.clip / "config.json").is_file():
            raise ValueError(
                f"`{args.clip}` is no folder with the config.json of a CLIP: give one that transformers has saved."
            )
        try:
            text_encoder, found = CLIPTextModelWithProjection.from_pretrained(
                args.clip, local_files_only=True, output_loading_info=True
            )
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"the weights in `{args.clip}` cannot be read: they are damaged ({error}).") from error
        if found["missing_keys"]:
            raise ValueError(
                f"`{args.clip}` lacks {sorted(found['missing_keys'])[:3]} of a CLIP's text encoder with its "
                "projection: give the folder of a whole CLIP."
            )
        tokenizer = CLIPTokenizer.from_pretrained(args.clip, local_files_only=True)
        if len(tokenizer) != text_encoder.config.vocab_size:  # without files, transformers makes an empty one
            raise ValueError(
                f"`{args.clip}` has {len(tokenizer)} tokens, but its text encoder knows "
                f"{text_encoder.config.vocab_size}: put the tokenizer's files into it."
            )

    # 2. Weights and statistics
    weights = _read(args.checkpoint)
    # Lightning's checkpoints hold more than weights; those of DALLE2-pytorch's trainer have them as "model".
    for name in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"`{args.checkpoint}` holds no weights by their names: give Karlo's file as it is.")
    statistics = _read(args.stats)
    if (
        not isinstance(statistics, tuple | list)
        or len(statistics) != 2
        or not all(isinstance(tensor, torch.Tensor) for tensor in statistics)
    ):
        raise ValueError(
            f"`{args.stats}` is no pair of tensors, mean and standard deviation of image embeddings: give the "
            "ViT-L-14_stats.th that belongs to the checkpoint."
        )

    # 3. Prior or pipeline
    model = prior = convert_prior(weights, *statistics)
    if args.clip is not None:
        try:
            model = UnCLIPPriorPipeline(
                prior, text_encoder, tokenizer, default_prior_scheduler(), clip_model_id=args.clip.name
            )
        except ValueError as error:
            raise ValueError(
                f"`{args.clip}` is not the CLIP of this prior, which for Karlo's is ViT-L/14: {error}"
            ) from error
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as folder:
        new = Path(folder) / args.out.name
        if args.clip is None:
            prior.save_pretrained(new)
        else:
            model.save_pretrained(new, card={"training": {"converted from Karlo's file": args.checkpoint.name}})
        if args.out.exists():
            args.out.rmdir()
        os.replace(new, args.out)
    config = prior.config
    print(f"wrote {args.out}: {type(model).__name__} for embeddings of {config.embedding_dim}")


def convert_prior(
    state_dict: Mapping[str, torch.Tensor],
    clip_mean: torch.Tensor,
    clip_std: torch.Tensor,
    num_attention_heads: int = 32,
) -> PriorTransformer:
    r"""
    Karlo's prior -> diffusers.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Its weights under Karlo's names, with or without the `model.` that they begin with in its checkpoint.
        clip_mean (`torch.Tensor`): Mean of the image embeddings that it was trained on, shape `(d,)`.
        clip_std (`torch.Tensor`): Their standard deviation, shape `(d,)`.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Heads per layer, which weights do not tell; 32 in Karlo's file.

    Returns:
        [`PriorTransformer`]: With the same outputs to rounding, if it is given a mask, in evaluation mode.

    Raises:
        `ValueError`: A weight is missing, unknown, of the wrong shape or not finite, the heads do not divide the
            width, the statistics do not fit; or the weights are DALLE2-pytorch's.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.convert.karlo_prior import convert_prior

    >>> weights = torch.load("prior.ckpt", weights_only=True)["state_dict"]
    >>> clip_mean, clip_std = torch.load("stats.th", weights_only=True)
    >>> prior = convert_prior(weights, clip_mean, clip_std, num_attention_heads=4)
    >>> prior.config.embedding_dim, prior.config.num_layers
    (24, 2)

    ```
    """
    if foreign := sorted(filter(_DALLE2.search, state_dict)):
        raise ValueError(f"`{foreign[0]}` {_DALLE2_REASON}")
    weights = {key.removeprefix("model."): tensor for key, tensor in state_dict.items()}
    for key, ndim in (("clip_img_proj.weight", 2), ("positional_embedding", 3)):
        if key not in weights or weights[key].ndim != ndim:
            raise ValueError(f"`{key}` is missing or has not {ndim} dimensions: this is no prior of Karlo's.")
    width, dim = weights["clip_img_proj.weight"].shape
    positions = weights["positional_embedding"].shape[1]
    if positions < 5:
        raise ValueError(
            f"`positional_embedding` has {positions} positions, but needs more than the 4 that follow the text: this "
            "is no prior of Karlo's."
        )
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}, but must divide the width {width}: Karlo's prior has 32 "
            "and a width of 2048."
        )
    if not all(x.isfinite().all() for x in (clip_mean, clip_std)) or not (clip_std > 0).all():
        raise ValueError(
            "`clip_mean` or `clip_std` is not finite, or `clip_std` is not positive, so that no embedding could be "
            "made of what the prior predicts: give the statistics that belong to the checkpoint."
        )
    weights |= {"clip_mean": clip_mean.reshape(1, -1), "clip_std": clip_std.reshape(1, -1)}
    layers = {match[1] for key in weights if (match := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    if not layers:
        raise ValueError("no weight is of a `transformer.resblocks`: this is no whole prior of Karlo's.")
    prior = PriorTransformer(
        num_attention_heads=num_attention_heads,
        attention_head_dim=width // num_attention_heads,
        num_layers=len(layers),
        embedding_dim=dim,
        num_embeddings=positions - 4,
    )
    tensors, known, problems = {}, set(), {}
    for name, parameter in prior.state_dict().items():
        layer, module, kind = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name).groups(
            default=""
        )
        key = (f"transformer.resblocks.{layer}." if layer else "") + _NAMES[module] + kind
        known.add(key)
        shape = (3 * width, *parameter.shape[1:]) if module in _QKV else parameter.shape
        if key not in weights:
            problems[key] = "is missing"
        elif weights[key].shape != shape:
            problems[key] = f"has shape {tuple(weights[key].shape)}, but needs {tuple(shape)}"
        elif not weights[key].is_floating_point():
            problems[key] = f"is of {weights[key].dtype}"
        elif not weights[key].is_meta and not weights[key].isfinite().all():
            problems[key] = "is not finite"
        elif module in _QKV:
            tensors[name] = (
                weights[key].unflatten(0, (num_attention_heads, 3, -1))[:, _QKV.index(module)].flatten(0, 1)
            )
        else:
            tensors[name] = weights[key]
    problems |= dict.fromkeys(weights.keys() - known, "is unknown")
    if problems:
        listed = [f"`{key}` {problem}" for key, problem in sorted(problems.items())]
        raise ValueError(
            f"the weights do not fit a prior of {dim} numbers and width {width}: {', '.join(listed[:6])}"
            f"{f' and {len(listed) - 6} more' if len(listed) > 6 else ''}. Give Karlo's checkpoint and the statistics "
            "that belong to it."
        )
    prior.load_state_dict(tensors)
    # No gradient reaches them.
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior.eval()


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # damaged files fail in any way
        with path.open("rb") as file:  # its trainer saves objects too, which are not read: names stand before weights
            if b"causal_transformer." in file.read(2**24):
                raise ValueError(f"`{path}` {_DALLE2_REASON}") from error
        raise ValueError(
            f"`{path}` cannot be read as a checkpoint of tensors: it is damaged, something else, or would run code "
            "when it is loaded. `--debug` shows what was wrong."
        ) from error
