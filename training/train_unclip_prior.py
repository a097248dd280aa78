"""Train or fine-tune the prior of unCLIP: a diffusion model of the image embeddings of a CLIP, given captions.

On embeddings that `training/precompute_clip_embeddings.py` has written, with the paper's optimizer
(https://huggingface.co/papers/2204.06125, appendix C; it has a batch of 4096 and 24 layers of width 2048):

```bash
accelerate launch --num_processes 8 training/train_unclip_prior.py --embeddings_dir embeddings \
  --validation_embeddings_dir embeddings-validation --train_batch_size 512 --max_train_steps 600000 --use_ema \
  --mixed_precision bf16 --output_dir prior
accelerate launch --num_processes 8 training/train_unclip_prior.py ... --resume_from_checkpoint latest
```

On the digits of `training/train_toy_clip.py`, in about three minutes on one CPU core:

```bash
accelerate launch -m diffusers_ext.training.train_unclip_prior --embeddings_dir embeddings-digits \
  --validation_embeddings_dir embeddings-digits-validation --zero_shot_template "a {}" --train_batch_size 64 \
  --learning_rate 2e-3 --adam_beta2 0.99 --lr_scheduler cosine --max_train_steps 1800 --use_ema --ema_decay 0.995 \
  --output_dir prior-digits
```

`--pretrained_model_name_or_path` goes on with a prior that is there, this package's or Kandinsky's, with its own
statistics of the embeddings; `--lora_rank 8` then trains and saves an adapter alone.

The network predicts the image embedding itself, `x_0`, standardized, with the plain squared error (eq. 2 of the
paper). The numbers to watch are `validation_frechet` against `validation_frechet_true`, which a perfect prior stays
below, and `validation_frechet_linear`, which it has to beat by far; `validation_cos_text` against
`validation_cos_text_true`; and `validation_diversity` against `validation_diversity_true`. The cosine to the true
embedding, `validation_cos_true`, never decides: a linear regression has a higher one than a perfect prior, because it
predicts means.
"""

import dataclasses
import hashlib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PriorTransformer
from transformers import CLIPTextModelWithProjection, HfArgumentParser

from diffusers_ext.evaluation.embeddings import embedding_metrics
from diffusers_ext.pipelines.unclip_prior import (
    UnCLIPPriorPipeline,
    UnCLIPPriorTransformer,
    default_prior_scheduler,
    init_prior,
)
from diffusers_ext.training.precompute_clip_embeddings import (
    load_clip,
    model_sha256,
    open_embeddings,
    tokenizer_sha256,
)
from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script

_LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_NUM_STATISTICS = 100_000  # training pairs that statistics and baselines are computed from, at most


@dataclass(kw_only=True)
class UnCLIPPriorArguments(TrainingArguments):
    """Arguments of this script beside those of every script; the defaults are the paper's."""

    pretrained_model_name_or_path: str | None = argument(
        None, "Hub id or folder of a pipeline whose `prior` training starts from."
    )
    pretrained_clip_model_name_or_path: str | None = argument(
        None, "Hub id or folder of the CLIP; by default the one that the embeddings name."
    )
    prior_config_name_or_path: str | None = argument(
        None, "Folder or repo with the `config.json` of a prior; by default Karlo's, a small one for small CLIPs."
    )
    embeddings_dir: str | None = argument(None, "Folder of training/precompute_clip_embeddings.py.")
    validation_embeddings_dir: str | None = argument(
        None, "The same for held-out images; by default `validation_fraction` of the training images, 0.1."
    )
    embed_norm: Literal["standardize", "l2"] | None = argument(
        None,
        "`standardize`: mean 0 and variance 1 in each dimension; `l2`: length `embed_scale`. By default the first.",
    )
    embed_scale: float | None = argument(None, "Length for `l2`, the square root of the dimension by default.")
    text_drop_prob: float = argument(0.1, "Share of captions that are replaced by the empty one, for guidance.")
    lora_rank: int | None = argument(None, "Train a LoRA adapter of this rank on the attention of a pretrained prior.")

    learning_rate: float = argument(1.1e-4, "Highest learning rate.")
    adam_beta2: float = argument(0.96, "AdamW's decay of the squared gradient's average.")
    adam_weight_decay: float = argument(6e-2, "AdamW's decoupled weight decay.")
    adam_epsilon: float = argument(1e-6, "AdamW's epsilon.")
    max_grad_norm: float = argument(0.5, "Gradients are clipped to this norm; 0 turns clipping off.")
    num_validation_images: int = argument(1000, "Held-out pairs that a validation samples for, at most.")
    num_inference_steps: int = argument(25, "Steps of the sampler in validations.")
    zero_shot_template: str = argument("a photo of a {}", "Prompt for a class, for the accuracy of predictions.")

    # What goes into the run beside the arguments: a run is not resumed with anything else.
    inputs_sha256: dict[str, str] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embeddings_dir is None:
            raise ValueError(
                "`embeddings_dir` is missing: make embeddings with training/precompute_clip_embeddings.py."
            )
        for name in (
            "dataset_name", "dataset_config_name", "train_data_dir", "image_mode", "resolution", "center_crop",
            "random_flip",
        ):  # fmt: skip
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but the prior is trained on embeddings: images are the "
                    "matter of training/precompute_clip_embeddings.py, and its folder is the `embeddings_dir` here."
                )
        fraction = self.validation_fraction
        if fraction is not None and self.validation_embeddings_dir is not None:
            raise ValueError(
                f"`validation_fraction` is {fraction}, but `validation_embeddings_dir` is given too, which is held "
                "out as it is: leave one out."
            )
        if fraction is not None and not (0 <= fraction < 1 or (fraction >= 1 and fraction % 1 == 0)):
            raise ValueError(f"`validation_fraction` is {fraction}, but must be a share below 1 or a whole number.")
        if self.validation_steps and self.num_validation_images < 2:
            raise ValueError(
                f"`num_validation_images` is {self.num_validation_images}, but a distribution needs at least 2: raise "
                "it, or pass `--validation_steps 0`."
            )
        if self.pretrained_model_name_or_path:
            if Path(self.pretrained_model_name_or_path).resolve() == Path(self.output_dir).resolve():
                raise ValueError(
                    f"`output_dir` is {self.output_dir!r}, the folder of `pretrained_model_name_or_path`, which would "
                    "be overwritten: choose another one."
                )
            for name in ("prior_config_name_or_path", "embed_norm", "embed_scale"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` and `pretrained_model_name_or_path` are both given, but a pretrained prior brings "
                        "its own: leave one out."
                    )
        elif self.lora_rank is not None:
            raise ValueError(
                f"`lora_rank` is {self.lora_rank}, but an adapter needs a prior to adapt: pass "
                "`pretrained_model_name_or_path`."
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` is {self.lora_rank}, but must be at least 1.")
        if self.lora_rank is not None and find_spec("peft") is None:
            raise ValueError('`lora_rank` needs the package peft: run `pip install "diffusers-ext[training]"`.')
        if self.embed_scale is not None and self.embed_norm != "l2":
            raise ValueError(f"`embed_scale` is {self.embed_scale}, but belongs to `--embed_norm l2`.")
        if not 0 <= self.text_drop_prob <= 1:
            raise ValueError(f"`text_drop_prob` is {self.text_drop_prob}, but must lie in [0, 1].")
        if "{}" not in self.zero_shot_template:
            raise ValueError(
                f"`zero_shot_template` is {self.zero_shot_template!r}, but must have `{{}}` where the class goes."
            )
        if not 1 <= self.num_inference_steps <= 999:
            raise ValueError(f"`num_inference_steps` is {self.num_inference_steps}, but must be from 1 to 999.")


class EmbeddingDataset(torch.utils.data.Dataset):
    """Pairs of embeddings out of shards, which are read from the disk when they are used.

    Args:
        shards (`list[dict[str, torch.Tensor]]`): As [`open_embeddings`] gives them.
        indices (`Sequence[int]`, *optional*): Which rows of all shards, in which order; all by default.
    """

    def __init__(self, shards: list[dict[str, torch.Tensor]], indices: Sequence[int] | None = None) -> None:
        self.shards = shards
        self.ends = np.cumsum([len(shard["input_ids"]) for shard in shards])
        self.indices = np.arange(self.ends[-1]) if indices is None else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.indices[index]
        shard = int(np.searchsorted(self.ends, row, side="right"))
        row = int(row - (self.ends[shard - 1] if shard else 0))
        return {name: value[row].clone() for name, value in self.shards[shard].items()}

    def first(self, count: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The first rows in tensors.

        Args:
            count (`int`): How many rows, at most.
            names (`list[str]`): Which columns; those that are not there are left out.

        Returns:
            `dict[str, torch.Tensor]`: One row for each pair.
        """
        rows = self.indices[:count]
        shard = np.searchsorted(self.ends, rows, side="right")
        starts = self.ends - [len(part["input_ids"]) for part in self.shards]
        batch = {}
        for name in names:
            if name in self.shards[0]:
                values = torch.empty(len(rows), *self.shards[0][name].shape[1:], dtype=self.shards[0][name].dtype)
                for i in np.unique(shard):
                    values[shard == i] = self.shards[i][name][rows[shard == i] - starts[i]]
                batch[name] = values
        return batch


class PriorAdapter(torch.nn.Module):
    """A prior of which a LoRA adapter alone is trained, kept in checkpoints and published.

    Args:
        prior ([`PriorTransformer`]): The prior; it is frozen, and the adapter put into its attention layers.
        rank (`int`): Rank of the adapter's matrices; the scale `alpha / rank` is 1.
    """

    def __init__(self, prior: PriorTransformer, rank: int) -> None:
        from peft import LoraConfig

        super().__init__()
        prior.requires_grad_(False)
        prior.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "default"
        )
        self.prior = prior

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the prior does, see [`PriorTransformer.forward`]."""
        return self.prior(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The adapter's weights, without the prior's."""
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if ".lora_" not in name]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Loads the adapter's weights, and leaves the prior's as they are."""
        missing = self.state_dict().keys() ^ state_dict.keys()
        if strict and missing:
            raise RuntimeError(f"the adapter has other weights: {sorted(missing)[:3]}, ...")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the adapter for `load_lora_adapter` of diffusers' models.

        Args:
            save_directory (`str` or `Path`): The folder.
        """
        self.prior.save_lora_adapter(save_directory, weight_name=_LORA_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> types.SimpleNamespace:
        """Reads an adapter without the prior that it belongs to.

        Args:
            folder (`str` or `Path`): Where [`~save_pretrained`] wrote it.

        Returns:
            `SimpleNamespace`: Its `state_dict()` is that of a [`PriorAdapter`].
        """
        weights = safetensors.torch.load_file(Path(folder) / _LORA_FILE)
        state = {f"prior.{name.removesuffix('weight')}default.weight": value for name, value in weights.items()}
        return types.SimpleNamespace(state_dict=lambda: state)


def default_prior_config(embedding_dim: int) -> dict[str, Any]:
    """Karlo's prior, of a billion parameters; for CLIPs with embeddings below 512 dimensions a small one.

    Args:
        embedding_dim (`int`):
            Size of the CLIP's embeddings.

    Returns:
        `dict[str, Any]`: Keyword arguments for [`PriorTransformer`], without what the CLIP decides.
    """
    if embedding_dim < 512:
        return {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2}
    return {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20}


def text_inputs(
    text_encoder: CLIPTextModelWithProjection, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the prior is told of the captions: their hidden states are computed, unless they were cached.

    Args:
        text_encoder (`transformers.CLIPTextModelWithProjection`): The CLIP's text encoder.
        batch (`dict[str, torch.Tensor]`): Rows of embeddings, see [`load_embeddings`].

    Returns:
        `tuple[torch.Tensor]`: Text embeddings `(batch, dim)`, hidden states `(batch, length, width)`, both float32,
        and mask `(batch, length)`, bool, on the encoder's device.
    """
    device = text_encoder.device
    hidden_states = batch.get("text_hidden_states")
    if hidden_states is None:
        with torch.no_grad():
            hidden_states = text_encoder(batch["input_ids"].to(device).long()).last_hidden_state
    return (
        batch["text_embeds"].to(device).float(),
        hidden_states.to(device).float(),
        batch["attention_mask"].to(device),
    )


def normalized(
    image_embeds: torch.Tensor, clip_mean: torch.Tensor, clip_std: torch.Tensor, embed_norm: str
) -> torch.Tensor:
    """`x_0`, what a prior predicts for image embeddings.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch, dim)`): As CLIP gives them.
        clip_mean, clip_std (`torch.Tensor` of shape `(1, dim)`): The statistics of the prior.
        embed_norm (`str`): `"standardize"` or `"l2"`.

    Returns:
        `torch.Tensor` of shape `(batch, dim)`: float32, of about unit variance.
    """
    image_embeds = image_embeds.float()
    if embed_norm == "l2":
        image_embeds = torch.nn.functional.normalize(image_embeds)
    return (image_embeds - clip_mean.to(image_embeds)) / clip_std.to(image_embeds)


@torch.no_grad()
def evaluate(
    pipeline: UnCLIPPriorPipeline,
    pairs: dict[str, torch.Tensor],
    train_pairs: dict[str, torch.Tensor],
    *,
    class_names: list[str] | None = None,
    zero_shot_template: str = "a photo of a {}",
    num_candidates: int = 2,
    num_inference_steps: int = 25,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Sample for held-out captions with fixed noise, and compare with the true embeddings and the baselines.

    Args:
        pipeline ([`UnCLIPPriorPipeline`]): The prior with its text encoder and sampler.
        pairs (`dict[str, torch.Tensor]`): Held-out rows, see [`load_embeddings`].
        train_pairs (`dict[str, torch.Tensor]`): `image_embeds` and `text_embeds` of training rows, for the baselines.
        class_names (`list[str]`, *optional*):
            What the classes are called, if `pairs` have `labels`. Only pairs whose caption names their class are
            counted, or all, if no caption does.
        zero_shot_template (`str`, *optional*, defaults to `"a photo of a {}"`): Prompt for a class.
        num_candidates (`int`, *optional*, defaults to 2): Draws for each caption.
        num_inference_steps (`int`, *optional*, defaults to 25): Steps of the sampler.
        batch_size (`int`, *optional*, defaults to 64): Captions at a time; does not change the numbers.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Returns:
        `dict[str, float]`: Those of [`embedding_metrics`], and the error of one prediction of `x_0` at timesteps
        spread evenly: `loss`, `loss_t0-249` and so on, and `loss_without_text`, with the empty caption for all.
    """
    prior, text_encoder = pipeline.prior, pipeline.text_encoder
    total, count = pipeline.scheduler.config.num_train_timesteps, len(pairs["input_ids"])
    noise_scheduler = DDPMScheduler(total, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    generator = torch.Generator().manual_seed(seed)
    dim = pairs["image_embeds"].shape[1]
    latents = torch.randn(count, num_candidates, dim, generator=generator)
    noise, timesteps = torch.randn(count, dim, generator=generator), torch.arange(count) * total // count
    empty = pipeline.encode_prompt("")
    candidates, losses = [], {"loss": [], "loss_without_text": []}
    for rows in torch.arange(count).split(batch_size):
        batch = {name: value[rows] for name, value in pairs.items()}
        text = text_inputs(text_encoder, batch)
        embeds, hidden_states, mask = text
        candidates.append(
            pipeline(
                prompt_embeds=embeds,
                prompt_hidden_states=hidden_states,
                prompt_mask=mask,
                num_candidates=num_candidates,
                num_inference_steps=num_inference_steps,
                rerank=None,
                latents=latents[rows].flatten(0, 1),
                negative_embeds="zeros",
            ).candidates.cpu()
        )
        x_0 = batch["image_embeds"].to(prior.device)
        x_0 = normalized(x_0, prior.clip_mean, prior.clip_std, pipeline.config.embed_norm)
        t = timesteps[rows].to(prior.device)
        noisy = noise_scheduler.add_noise(x_0, noise[rows].to(prior.device), t).to(prior.dtype)
        for name, (embeds, hidden_states, mask) in (("loss", text), ("loss_without_text", empty)):
            predicted = prior(
                noisy,
                t,
                proj_embedding=embeds.to(prior.dtype).expand(len(rows), -1),
                encoder_hidden_states=hidden_states.to(prior.dtype).expand(len(rows), -1, -1),
                attention_mask=mask.expand(len(rows), -1),
            ).predicted_image_embedding
            losses[name].append((predicted.float() - x_0).square().mean(1).cpu())
    metrics = {name: torch.cat(values).double().mean().item() for name, values in losses.items()}
    bands, per_sample_loss = 4 * timesteps // total, torch.cat(losses["loss"]).double()
    for band in bands.unique().tolist():
        first, last = band * total // 4, (band + 1) * total // 4 - 1
        metrics[f"loss_t{first}-{last}"] = per_sample_loss[bands == band].mean().item()

    image_embeds, train_image_embeds = pairs["image_embeds"].float(), train_pairs["image_embeds"].float()
    if pipeline.config.embed_norm == "l2":  # what this prior predicts; all but `norm_ratio` is of unit length anyway
        image_embeds = torch.nn.functional.normalize(image_embeds)
    classes = {}
    if class_names and "labels" in pairs:
        labels = pairs["labels"].clone()
        captions = pipeline.tokenizer.batch_decode(pairs["input_ids"].long(), skip_special_tokens=True)
        named = []
        for label, caption in zip(labels.tolist(), captions, strict=True):
            # as words; CLIP's tokenizer takes numbers apart, and class names often have _ for a space
            name, text = (
                re.sub(r"(?<=\d)\s+(?=\d)", "", t.lower().replace("_", " ")) for t in (class_names[label], caption)
            )
            named.append(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None)
        named = torch.tensor(named)
        if named.any():
            labels[~named] = -1
        prompts = [zero_shot_template.replace("{}", name.replace("_", " ")) for name in class_names]
        starts = range(0, len(prompts), batch_size)
        class_embeds = torch.cat([pipeline.encode_prompt(prompts[i : i + batch_size])[0].cpu() for i in starts])
        classes = {"labels": labels, "class_embeds": class_embeds}
    return metrics | embedding_metrics(
        torch.cat(candidates),
        image_embeds,
        pairs["text_embeds"].float(),
        train_image_embeds,
        train_pairs["text_embeds"].float(),
        captions=pairs["input_ids"],
        **classes,
    )


def main(args: UnCLIPPriorArguments) -> None:
    """Train, validate, save and, with `--push_to_hub`, publish an [`UnCLIPPriorPipeline`], or an adapter for one.

    Args:
        args ([`UnCLIPPriorArguments`]): The arguments.

    Raises:
        ValueError: Embeddings, CLIP and prior do not fit together, or the arguments are refused by [`TrainingRun`].
    """
    # 1. Seeds, embeddings, the CLIP that they are of
    run = TrainingRun(args)
    index, shards = open_embeddings(args.embeddings_dir)
    digests = [shard["sha256"] for shard in index["shards"]]
    if args.validation_embeddings_dir is not None:
        validation_index, validation_shards = open_embeddings(args.validation_embeddings_dir)
        for what in ("clip", "tokenizer"):
            if validation_index[what]["sha256"] != index[what]["sha256"]:
                raise ValueError(
                    f"`validation_embeddings_dir` was made with another {what} ({validation_index['clip']['id']}) "
                    f"than `embeddings_dir` ({index['clip']['id']}): make both with the same CLIP."
                )
        if index["source"]["sha256"] == validation_index["source"]["sha256"]:
            raise ValueError(
                "`validation_embeddings_dir` and `embeddings_dir` are of the same images: make the former with "
                "`--split validation`, or leave it out."
            )
        train, validation = EmbeddingDataset(shards), EmbeddingDataset(validation_shards)
        label_names = validation_index["label_names"]
    else:
        fraction = 0.1 if args.validation_fraction is None else args.validation_fraction
        rows = index["count"]
        held_out = round(fraction * rows) if 0 <= fraction < 1 else int(fraction)
        if not 0 <= held_out < rows:
            raise ValueError(
                f"`validation_fraction` is {fraction}, but must be a share below 1 or a number below {rows}."
            )
        order = np.argsort(np.random.PCG64(args.seed).random_raw(rows), kind="stable")
        train, validation = (EmbeddingDataset(shards, part) for part in (order[held_out:], order[:held_out]))
        label_names = index["label_names"]
    if args.max_train_samples is not None:
        train.indices = train.indices[: args.max_train_samples]
    if args.validation_steps and len(validation) == 1:
        raise ValueError(
            "one pair is held out, but a distribution needs two: raise `validation_fraction`, or set it to 0."
        )
    clip = args.pretrained_clip_model_name_or_path or index["clip"]["id"]
    with run.accelerator.main_process_first():  # the others find the download in the cache
        revision = index["clip"]["revision"] if clip == index["clip"]["id"] else None
        text_encoder, tokenizer, image_encoder = load_clip(clip, revision=revision, cache_dir=args.cache_dir)
    for what, theirs, ours in (
        ("text encoder", index["clip"]["text_encoder_sha256"], model_sha256(text_encoder)),
        ("image encoder", index["clip"]["image_encoder_sha256"], model_sha256(image_encoder)),
        ("tokenizer", index["tokenizer"]["sha256"], tokenizer_sha256(tokenizer)),
    ):
        if theirs != ours:
            raise ValueError(
                f"`embeddings_dir` was made with {index['clip']['id']}, but `{clip}` has another {what}: pass the one "
                "of the embeddings as `pretrained_clip_model_name_or_path`, or make the embeddings anew."
            )

    # 2. Prior
    train_pairs = train.first(_NUM_STATISTICS, ("image_embeds", "text_embeds"))
    base = args.pretrained_model_name_or_path
    embed_norm = args.embed_norm or "standardize"
    if base is not None:
        where = {"revision": args.revision, "cache_dir": args.cache_dir}
        embed_norm = DiffusionPipeline.load_config(base, **where).get("embed_norm") or embed_norm
        config = PriorTransformer.load_config(base, subfolder="prior", **where)
        is_own = config.get("_class_name") == "UnCLIPPriorTransformer"
        prior = (UnCLIPPriorTransformer if is_own else PriorTransformer).from_pretrained(
            base, subfolder="prior", variant=args.variant, **where
        )
        prior = prior.float()
        if not (prior.clip_std > 0).all():
            raise ValueError(
                "the prior of `pretrained_model_name_or_path` has no statistics of the embeddings (`clip_std` is not "
                "positive), as if it was never trained: choose another one, or train from scratch."
            )
        prior.clip_mean.requires_grad_(False)
        prior.clip_std.requires_grad_(False)
    else:
        if args.prior_config_name_or_path is not None:
            config = PriorTransformer.load_config(args.prior_config_name_or_path, cache_dir=args.cache_dir)
            kind = config.get("_class_name")
            if kind not in ("PriorTransformer", "UnCLIPPriorTransformer"):
                raise ValueError(
                    f"`prior_config_name_or_path` is {args.prior_config_name_or_path!r}, the configuration of a "
                    f"{kind or 'model of another library'}: choose that of a PriorTransformer."
                )
        else:
            config = default_prior_config(index["dim"])
        sizes = {"embedding_dim": index["dim"], "num_embeddings": tokenizer.model_max_length}
        if index["hidden_size"] == index["dim"]:
            prior = PriorTransformer.from_config(config, **sizes)
        else:  # the stock class takes texts as wide as the embeddings only
            prior = UnCLIPPriorTransformer.from_config(config, **sizes, encoder_hid_dim=index["hidden_size"])
        init_prior(prior, train_pairs["image_embeds"], embed_norm, args.embed_scale)
    clip_name = Path(index["clip"]["id"]).resolve().name if Path(index["clip"]["id"]).is_dir() else index["clip"]["id"]
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": default_prior_scheduler()}
    options = {"embed_norm": embed_norm, "clip_model_id": clip_name}
    UnCLIPPriorPipeline(prior, image_encoder=image_encoder, **parts, **options)  # do all parts fit?
    # plain copies: the prior's own may be sharded soon
    statistics = [value.detach().clone().to(run.accelerator.device) for value in (prior.clip_mean, prior.clip_std)]
    x_0 = normalized(train_pairs["image_embeds"], *(value.cpu() for value in statistics), embed_norm)
    rms = x_0.square().mean().sqrt().item()
    if not 0.25 < rms < 4:
        raise ValueError(
            f"the embeddings have a root mean square of {rms:.3g} by the statistics of the prior of "
            "`pretrained_model_name_or_path`, but should have about 1: it was trained with another CLIP."
        )
    args.inputs_sha256 = {
        "embeddings": hashlib.sha256("".join(digests).encode()).hexdigest()[:16],
        "clip": index["clip"]["sha256"][:16],
        **({} if base is None else {"pretrained prior": model_sha256(prior)[:16]}),
    }
    model = prior if args.lora_rank is None else PriorAdapter(prior, args.lora_rank)

    # 3. Train
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    run.prepare({"prior": model}, train)
    text_encoder.to(run.accelerator.device)
    empty = UnCLIPPriorPipeline(prior, **parts, **options).encode_prompt("")
    resolution = 2**20
    for batch in run.batches():
        with run.accumulate():
            x_0 = normalized(batch["image_embeds"], *statistics, embed_norm)
            timesteps, noise = run.randint(num_train_timesteps), run.randn_like(x_0)
            with run.accelerator.autocast():
                text = text_inputs(text_encoder, batch)
            # for guidance: the caption is forgotten, in all three forms that it has
            is_dropped = run.randint(resolution) < args.text_drop_prob * resolution
            embeds, hidden_states, mask = (
                torch.where(is_dropped.view(-1, *(1,) * (value.ndim - 1)), without, value)
                for value, without in zip(text, empty, strict=True)
            )
            predicted = run.model(
                noise_scheduler.add_noise(x_0, noise, timesteps),
                timesteps,
                proj_embedding=embeds,
                encoder_hidden_states=hidden_states,
                attention_mask=mask,  # without one, it would not be causal
            ).predicted_image_embedding
            per_sample_loss = (predicted.float() - x_0).square().mean(1)
            run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
            )
        if run.validate_now and len(validation):
            trained = run.trained()["prior"]
            if run.accelerator.is_main_process:
                pipeline = UnCLIPPriorPipeline(getattr(trained, "prior", trained), **parts, **options)
                pipeline.to(run.accelerator.device).set_progress_bar_config(disable=True)
                values = evaluate(
                    pipeline,
                    validation.first(args.num_validation_images, validation.shards[0]),
                    train_pairs,
                    class_names=label_names,
                    zero_shot_template=args.zero_shot_template,
                    num_inference_steps=args.num_inference_steps,
                    batch_size=args.train_batch_size,
                    seed=args.seed,
                )
                run.log({f"validation_{name}": value for name, value in values.items()})

    # 4. Save and publish
    metrics, results = run.metrics, []
    for name, kind, title in (
        ("frechet", "frechet_distance", "Fréchet distance to true embeddings"),
        ("frechet_true", "frechet_distance", "the same of true embeddings"),
        ("frechet_linear", "frechet_distance", "the same of a linear regression"),
        ("frechet_text_gap", "frechet_distance", "the same of text embeddings plus the mean gap"),
        ("frechet_text", "frechet_distance", "the same of text embeddings"),
        ("zero_shot_accuracy", "accuracy", "zero-shot accuracy of predictions"),
        ("zero_shot_accuracy_true", "accuracy", "the same of true embeddings"),
        ("cos_text", "cosine_similarity", "cosine to the text"),
        ("cos_text_true", "cosine_similarity", "the same of true embeddings"),
        ("cos_true", "cosine_similarity", "cosine to the true embedding"),
        ("cos_shuffled", "cosine_similarity", "cosine to another caption's true embedding"),
        ("best_of_2_cos_text_gain", "cosine_similarity", "gain in cosine to the text by the best of two"),
        ("diversity", "diversity", "1 less the cosine of two draws"),
        ("diversity_true", "diversity", "the same of true embeddings"),
        ("loss", "loss", "squared error of the prediction"),
        ("loss_without_text", "loss", "the same without captions"),
    ):
        if f"validation_{name}" in metrics:
            value = round(metrics[f"validation_{name}"], 5)
            results.append(
                {
                    "dataset_name": "held-out pairs",
                    "metric_type": kind,
                    "metric_name": title,
                    "metric_value": value,
                }
            )
    trained = run.trained()["prior"]
    result = trained
    if args.lora_rank is None:
        result = UnCLIPPriorPipeline(trained, image_encoder=image_encoder, **parts, **options)
    run.finish(
        result,
        card={
            "base_model": None if base is None or Path(base).is_dir() else base,
            "datasets": [index["source"]["dataset_name"]] if index["source"].get("dataset_name") else None,
            "metrics": results,
            "training": {
                "data": index["source"]["description"],
                "pairs": len(train),
                **({"held out": min(args.num_validation_images, len(validation))} if results else {}),
                "CLIP": clip_name,
                "embeddings": "standardized" if embed_norm == "standardize" else "of unit length, scaled",
                "schedule": f"cosine, {num_train_timesteps} timesteps, x_0 prediction",
                **({} if args.lora_rank is None else {"LoRA rank": args.lora_rank}),
                "captions dropped": args.text_drop_prob,
                "optimizer": f"AdamW, beta2 {args.adam_beta2}, weight decay {args.adam_weight_decay:g}",
                "optimizer steps": run.step,
                "pairs per step": run.global_batch_size,
                "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, warm-up {args.lr_warmup_steps}",
                "averaged weights": f"decay {args.ema_decay}" if args.use_ema else "none",
                "seed": args.seed,
                "last training loss": round(metrics["train_loss"], 5),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(UnCLIPPriorArguments))
