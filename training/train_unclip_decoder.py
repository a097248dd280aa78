"""Train the decoder of unCLIP: a diffusion model of images that is told what is in them by CLIP's image embedding.

On a folder of pictures, for a CLIP of the Hub and the prior that was trained for it, with the recipe of the paper
(https://huggingface.co/papers/2204.06125, its batch of 2048 on 32 processes):

```bash
accelerate launch --num_processes 32 training/train_unclip_decoder.py \
  --pretrained_clip_model_name_or_path openai/clip-vit-large-patch14 --pretrained_prior_model_name_or_path my-prior \
  --train_data_dir pictures --resolution 64 --train_batch_size 64 --max_train_steps 800000 --learning_rate 1.2e-4 \
  --use_ema --mixed_precision bf16 --output_dir unclip-pictures
accelerate launch --num_processes 32 training/train_unclip_decoder.py ... --resume_from_checkpoint latest
```

On the digits and the CLIP of `training/train_toy_clip.py`, in about five minutes on one CPU core:

```bash
accelerate launch -m diffusers_ext.training.train_unclip_decoder --pretrained_clip_model_name_or_path clip-digits \
  --train_data_dir digit-images --resolution 16 --prediction_type v_prediction --cache_embeddings \
  --train_batch_size 32 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 50 --use_ema --ema_decay 0.995 \
  --max_train_steps 2400 --output_dir unclip-digits
```

`output_dir` is an [`UnCLIPTextToImagePipeline`]. With `--pretrained_prior_model_name_or_path` it paints texts;
without, it decodes embeddings and edits images, and a prior can be added later:

```py
prior, decoder = UnCLIPPriorPipeline.from_pretrained("my-prior"), UnCLIPTextToImagePipeline.from_pretrained("decoder")
UnCLIPTextToImagePipeline.from_decoder(decoder, prior).save_pretrained("my-unclip")
```

The numbers to watch are `validation_loss`, and `validation_cos_decoded`, the cosine between the embeddings of held-out
images and those of what the decoder makes of them, which must leave `validation_cos_shuffled`, that of other images,
far behind.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPVisionModelWithProjection, HfArgumentParser
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffusers_ext.data import ImageDataset
from diffusers_ext.pipelines.unclip import (
    UnCLIPDecoderScheduler,
    UnCLIPImageProjection,
    UnCLIPTextToImagePipeline,
)
from diffusers_ext.pipelines.unclip_prior import UnCLIPPriorPipeline
from diffusers_ext.training.precompute_clip_embeddings import (
    load_clip,
    load_embeddings,
    model_sha256,
    tokenizer_sha256,
)
from diffusers_ext.training_run import TrainingArguments, TrainingRun, argument, run_script


@dataclass(kw_only=True)
class UnCLIPDecoderArguments(TrainingArguments):
    """Arguments of this script beside those of every script."""

    pretrained_model_name_or_path: str | None = argument(
        None, "Hub id or folder of an unCLIP pipeline whose decoder training starts from."
    )
    pretrained_clip_model_name_or_path: str | None = argument(
        None, "Hub id or folder of the CLIP; by default the one in the pretrained pipeline or prior."
    )
    pretrained_prior_model_name_or_path: str | None = argument(
        None, "Hub id or folder of a prior that becomes part of the finished pipeline."
    )
    decoder_config_name_or_path: str | None = argument(
        None, "Folder or repo with the `config.json` of the U-Net; by default one that fits the resolution."
    )
    embed_norm: Literal["standardize", "l2"] | None = argument(
        None, "Embeddings as CLIP gives them, or of length 1; by default as the prior has them."
    )
    embedding_dropout: float = argument(0.1, "Share of embeddings that the learned one for no image replaces.")
    cache_embeddings: bool = argument(
        False, "Embed all training images, cropped in the center, once before the training, not in each step."
    )
    embeddings_dir: str | None = argument(
        None, "Embeddings of the same images, cropped in the center, by training/precompute_clip_embeddings.py."
    )
    ddpm_num_steps: int | None = argument(
        None, "Length of the noise schedule; by default that of the pretrained decoder, or 1000."
    )
    ddpm_beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] | None = argument(
        None, "Noise schedule; by default that of the pretrained decoder, or `squaredcos_cap_v2`."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = argument(
        None,
        "What the decoder predicts: the noise, as in the paper, or the velocity, which few steps need. By default "
        "what the pretrained decoder does, or `epsilon`.",
    )
    image_mode: Literal["RGB"] = argument("RGB", "Color: CLIP knows no other.")
    validation_guidance_scale: float = argument(2.0, "Guidance of the pictures that a validation makes.")
    validation_inference_steps: int = argument(50, "Steps of these pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"`embedding_dropout` is {self.embedding_dropout}, but must be in [0, 1).")
        for name, least in (("ddpm_num_steps", 4), ("validation_inference_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}, but must be at least {least}.")
        if not math.isfinite(self.validation_guidance_scale):
            raise ValueError(f"`validation_guidance_scale` is {self.validation_guidance_scale}, but must be finite.")
        if self.pretrained_model_name_or_path and self.decoder_config_name_or_path:
            raise ValueError(
                "`pretrained_model_name_or_path` and `decoder_config_name_or_path` are both given, but a pretrained "
                "decoder brings its own configuration: leave one out."
            )
        if self.cache_embeddings or self.embeddings_dir:
            if self.cache_embeddings and self.embeddings_dir:
                raise ValueError("`cache_embeddings` and `embeddings_dir` are both given: leave one out.")
            if self.random_flip:
                raise ValueError(
                    "`random_flip` is set, but embeddings that are kept are of images as they are: leave it out, or "
                    "`cache_embeddings` and `embeddings_dir`."
                )
            self.center_crop = True


def default_decoder_config(resolution: int) -> dict[str, Any]:
    """A U-Net for images of a size: a small one for thumbnails, from 64 pixels on one like that of GLIDE.

    Args:
        resolution (`int`):
            Side of the images in pixels.

    Returns:
        `dict[str, Any]`: Keyword arguments for [`~diffusers.UNet2DConditionModel`], without the size of the images.
    """
    common = {
        "in_channels": 3,
        "out_channels": 3,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    }
    if resolution < 64:
        # plain blocks: the embedding acts by the time embedding mostly, and by its tokens in the middle
        channels = (16, 32, 64) if resolution < 32 else (16, 32, 64, 64)
        return common | {
            "block_out_channels": channels,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D",) * len(channels),
            "up_block_types": ("UpBlock2D",) * len(channels),
            "time_embedding_dim": 256,  # 4 x the first block's 16 channels would not hold an embedding
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
    return common | {
        "block_out_channels": (192, 384, 576, 768),
        "layers_per_block": 3,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "cross_attention_dim": 768,
        "attention_head_dim": (3, 6, 9, 12),
    }


@torch.no_grad()
def embed_images(
    image_encoder: CLIPVisionModelWithProjection, images: torch.Tensor, embed_norm: str = "standardize"
) -> torch.Tensor:
    """Embeddings of images, as [`UnCLIPTextToImagePipeline.encode_image`] gives them.

    Args:
        image_encoder (`CLIPVisionModelWithProjection`): CLIP's image encoder.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): Square images in [-1, 1].
        embed_norm (`str`, *optional*, defaults to `"standardize"`): `"l2"` divides embeddings by their length.

    Returns:
        `torch.Tensor` of shape `(batch, dim)`: The embeddings, in float32.
    """
    size = image_encoder.config.image_size
    pixels = (images.to(image_encoder.device, torch.float32) + 1) / 2
    if pixels.shape[-2:] != (size, size):
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    embeds = image_encoder(((pixels - mean) / std).to(image_encoder.dtype)).image_embeds.float()
    return torch.nn.functional.normalize(embeds, dim=1) if embed_norm == "l2" else embeds


class EmbeddedImages(torch.utils.data.Dataset):
    """Images with the embeddings that were computed before.

    Args:
        dataset ([`data.ImageDataset`]): The images.
        image_embeds (`torch.Tensor` of shape `(images, dim)`): Their embeddings, in the same order.
    """

    def __init__(self, dataset: ImageDataset, image_embeds: torch.Tensor) -> None:
        self.dataset, self.image_embeds, self.pictures = dataset, image_embeds, dataset.pictures

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index] | {"image_embeds": self.image_embeds[index]}


class ConditionedDecoder(torch.nn.Module):
    """What is differentiated: projection and U-Net in one module.

    Args:
        decoder ([`~diffusers.UNet2DConditionModel`]): The U-Net.
        decoder_projection ([`UnCLIPImageProjection`]): How it is told the embedding.
    """

    def __init__(self, decoder: UNet2DConditionModel, decoder_projection: UnCLIPImageProjection) -> None:
        super().__init__()
        self.decoder, self.decoder_projection = decoder, decoder_projection

    def forward(
        self,
        noisy_images: torch.Tensor,
        timesteps: torch.Tensor,
        image_embeds: torch.Tensor,
        drop_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the decoder predicts.

        Args:
            noisy_images (`torch.Tensor` of shape `(batch, 3, height, width)`): x_t.
            timesteps (`torch.Tensor` of shape `(batch,)`): t.
            image_embeds (`torch.Tensor` of shape `(batch, dim)`): z_i.
            drop_mask (`torch.Tensor` of shape `(batch,)`, *optional*): True where the embedding is dropped.

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: The noise or the velocity, see [`target`].
        """
        tokens, time_embeds = self.decoder_projection(image_embeds, drop_mask)
        return self.decoder(noisy_images, timesteps, encoder_hidden_states=tokens, class_labels=time_embeds).sample


def resized(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """Images of the decoder's size, from larger or smaller ones.

    Args:
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): Square images in [-1, 1].
        resolution (`int`): The side to have.

    Returns:
        `torch.Tensor` of shape `(batch, 3, resolution, resolution)`: The same, in [-1, 1].
    """
    size = (resolution, resolution)
    if images.shape[-2:] == size:
        return images
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def target(
    scheduler: UnCLIPDecoderScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the decoder is to predict: the noise, or the velocity `sqrt(abar) noise - sqrt(1 - abar) images`.

    The paper's decoder predicts the noise. With the cosine schedule nothing can be told of the image from that at the
    last timesteps, so that hundreds of steps are needed where the average image is far from grey; the velocity
    (https://huggingface.co/papers/2202.00512, section 4) does well with 25.

    Args:
        scheduler ([`UnCLIPDecoderScheduler`]): Noise schedule and `prediction_type`.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): Clean images in [-1, 1].
        noise (`torch.Tensor` of the same shape): The noise that is added.
        timesteps (`torch.Tensor` of shape `(batch,)`): t.

    Returns:
        `torch.Tensor` of the same shape.
    """
    if scheduler.config.prediction_type == "epsilon":
        return noise
    levels = scheduler.alphas_cumprod[timesteps.cpu()].reshape(-1, 1, 1, 1)
    signal, sigma = (table.to(images) for table in (levels.sqrt(), (1 - levels).sqrt()))
    return signal * noise - sigma * images


@torch.no_grad()
def evaluate_loss(
    model: ConditionedDecoder,
    scheduler: UnCLIPDecoderScheduler,
    images: torch.Tensor,
    image_embeds: torch.Tensor,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """The training loss on fixed images with fixed noise, at timesteps that are spread evenly: comparable over a run.

    Args:
        model ([`ConditionedDecoder`]): Decoder and projection.
        scheduler ([`UnCLIPDecoderScheduler`]): Noise schedule.
        images (`torch.Tensor` of shape `(images, 3, height, width)`): Held-out images in [-1, 1].
        image_embeds (`torch.Tensor` of shape `(images, dim)`): What the decoder is told; none is dropped.
        batch_size (`int`, *optional*, defaults to 64): Images per forward pass; does not change the number.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Returns:
        `float`: The mean squared error of what is predicted.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.arange(len(images)) * scheduler.config.num_train_timesteps // len(images)
    total = 0.0
    device = model.decoder.device
    for rows in torch.arange(len(images)).split(batch_size):
        clean, eps, t, embeds = (x[rows].to(device) for x in (images, noise, timesteps, image_embeds.cpu()))
        error = model(scheduler.add_noise(clean, eps, t), t, embeds) - target(scheduler, clean, eps, t)
        total += error.square().flatten(1).mean(1).sum().item()
    return total / len(images)


def main(args: UnCLIPDecoderArguments) -> None:
    """Train, validate, save and, with `--push_to_hub`, publish an [`UnCLIPTextToImagePipeline`].

    Args:
        args ([`UnCLIPDecoderArguments`]): The arguments.

    Raises:
        ValueError: CLIP, prior, decoder and images do not fit together, or the arguments are refused by
            [`TrainingRun`].
    """
    # 1. Seeds, CLIP, and the parts of the pipeline that are there: of a prior, of a decoder to go on with
    run = TrainingRun(args)
    where = {"cache_dir": args.cache_dir}
    parts: dict[str, Any] = dict.fromkeys(("prior", "text_encoder", "tokenizer", "prior_scheduler", "image_encoder"))
    embed_norm, clip_model_id, pretrained = args.embed_norm, args.pretrained_clip_model_name_or_path, None
    if args.pretrained_model_name_or_path is not None:
        pretrained = UnCLIPTextToImagePipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, **where
        )
        if type(pretrained.decoder_projection).__name__ != "UnCLIPImageProjection":
            raise ValueError(
                "the decoder of `pretrained_model_name_or_path` has no `UnCLIPImageProjection`, as if it was that of "
                "Kandinsky, Karlo or Stable unCLIP, which this script does not train: take one that it has made."
            )
        parts |= {name: getattr(pretrained, name) for name in parts}
        sources = [("pretrained_model_name_or_path", pretrained)]
    else:
        sources = []
    if args.pretrained_prior_model_name_or_path is not None:
        prior = UnCLIPPriorPipeline.from_pretrained(args.pretrained_prior_model_name_or_path, **where)
        theirs = {"prior": prior.prior, "prior_scheduler": prior.scheduler, "image_encoder": prior.image_encoder}
        theirs |= {"text_encoder": prior.text_encoder, "tokenizer": prior.tokenizer}
        parts |= {name: part for name, part in theirs.items() if part is not None}
        sources.append(("pretrained_prior_model_name_or_path", prior))
    for name, source in sources:
        for model in source.components.values():
            if isinstance(model, torch.nn.Module):
                model.float()  # transformers loads the precision that was saved
        embed_norm = embed_norm or source.config.embed_norm
        clip_model_id = clip_model_id or source.config.get("clip_model_id")
        if source.config.embed_norm != embed_norm:
            raise ValueError(
                f"`embed_norm` is {embed_norm!r}, but the pipeline of `{name}` has {source.config.embed_norm!r}: "
                "leave `embed_norm` out, and take a prior and a decoder that were trained on the same embeddings."
            )
    embed_norm = embed_norm or "standardize"
    if clip_model_id and Path(clip_model_id).is_dir():  # nobody else has that folder
        clip_model_id = Path(clip_model_id).resolve().name
    if args.pretrained_clip_model_name_or_path is not None:
        text_encoder, tokenizer, image_encoder = load_clip(args.pretrained_clip_model_name_or_path, **where)
        parts |= {"text_encoder": text_encoder, "tokenizer": tokenizer, "image_encoder": image_encoder}
    digests = {"text_encoder": model_sha256, "tokenizer": tokenizer_sha256, "image_encoder": model_sha256}
    for name, source in sources:
        for kind, digest in digests.items():
            ours, theirs = parts[kind], getattr(source, kind)
            if theirs is not None and theirs is not ours and digest(theirs) != digest(ours):
                raise ValueError(
                    f"the {kind.replace('_', ' ')} of `{name}` is not that of the CLIP or prior that is given too, "
                    "but embeddings of two CLIPs do not mix: leave one out."
                )
    if parts["image_encoder"] is None:
        raise ValueError(
            "there is no image encoder: pass `pretrained_clip_model_name_or_path`, or a prior or pipeline with one."
        )
    image_encoder = parts["image_encoder"].requires_grad_(False).eval().to(run.accelerator.device)
    dim = image_encoder.config.projection_dim

    # 2. Data: in the size that CLIP sees where it has to see them, resized for the decoder
    if args.resolution is None and pretrained is not None:
        args.resolution = pretrained.decoder.config.sample_size
    dataset = run.load_dataset("train", [])
    resolution = dataset.resolution
    sees = resolution if args.embeddings_dir else max(resolution, image_encoder.config.image_size)
    dataset.resolution = sees

    # 3. Decoder, projection, noise schedule
    if pretrained is not None:
        decoder, projection = pretrained.decoder, pretrained.decoder_projection
        scheduler = pretrained.decoder_scheduler
        for name, value in (
            ("ddpm_num_steps", scheduler.config.num_train_timesteps),
            ("ddpm_beta_schedule", scheduler.config.beta_schedule),
            ("prediction_type", scheduler.config.prediction_type),
        ):
            if getattr(args, name) not in (None, value):
                raise ValueError(
                    f"`{name}` is {getattr(args, name)!r}, but the decoder of `pretrained_model_name_or_path` was "
                    f"trained with {value!r}: leave it out."
                )
        if decoder.config.sample_size != resolution or projection.config.clip_embeddings_dim != dim:
            raise ValueError(
                f"the decoder of `pretrained_model_name_or_path` paints {decoder.config.sample_size} pixels from "
                f"embeddings of size {projection.config.clip_embeddings_dim}, but images have {resolution} and CLIP's "
                f"embeddings {dim}: leave `resolution` out, and take the CLIP that it was trained with."
            )
    else:
        config = default_decoder_config(resolution)
        if args.decoder_config_name_or_path is not None:
            config = UNet2DConditionModel.load_config(args.decoder_config_name_or_path, **where)
        decoder = UNet2DConditionModel.from_config(config, sample_size=resolution)
        width = decoder.config.cross_attention_dim
        if not isinstance(width, int) or decoder.config.encoder_hid_dim_type or decoder.config.addition_embed_type:
            raise ValueError(
                f"`decoder_config_name_or_path` has `cross_attention_dim` {width}, `encoder_hid_dim_type` "
                f"{decoder.config.encoder_hid_dim_type!r} and `addition_embed_type` "
                f"{decoder.config.addition_embed_type!r}, but the decoder is told the embedding by tokens of one "
                "width, and nothing else: make the first a whole number, the others `null`."
            )
        projection = UnCLIPImageProjection(
            clip_embeddings_dim=dim,
            time_embed_dim=decoder.config.time_embedding_dim or 4 * decoder.config.block_out_channels[0],
            cross_attention_dim=decoder.config.cross_attention_dim,
        )
        scheduler = UnCLIPDecoderScheduler(
            args.ddpm_num_steps or 1000,
            beta_schedule=args.ddpm_beta_schedule or "squaredcos_cap_v2",
            prediction_type=args.prediction_type or "epsilon",
        )

    # a resumed run has to be the same in what was left to the pretrained parts
    args.embed_norm, args.prediction_type = embed_norm, scheduler.config.prediction_type
    args.ddpm_num_steps, args.ddpm_beta_schedule = scheduler.config.num_train_timesteps, scheduler.config.beta_schedule

    def pipeline(trained: dict[str, torch.nn.Module]) -> UnCLIPTextToImagePipeline:
        """The whole pipeline."""
        made = UnCLIPTextToImagePipeline(
            **parts,
            **trained,
            decoder_scheduler=scheduler,
            embed_norm=embed_norm,
            clip_model_id=clip_model_id,
        )
        made.set_progress_bar_config(disable=True)
        return made

    models = {"decoder": decoder, "decoder_projection": projection}
    pipeline(models)  # parts that do not fit are refused now
    num_train_timesteps = scheduler.config.num_train_timesteps

    # 4. Embeddings: of the training images as far as they are kept, or for their mean and deviation
    def embedded(images: ImageDataset, rows: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in diffusers_logging.tqdm(
            torch.tensor(rows).split(args.train_batch_size),
            desc="Embedding images",
            delay=2,
            leave=False,
            disable=not run.accelerator.is_main_process,
        ):
            batch = torch.stack([images[row]["images"] for row in part.tolist()])
            yield resized(batch, resolution), embed_images(image_encoder, batch, embed_norm).cpu()

    if args.embeddings_dir:
        saved = load_embeddings(args.embeddings_dir)
        image_embeds = saved["image_embeds"].float()
        if len(image_embeds) != len(dataset) or image_embeds.shape[1] != dim:
            raise ValueError(
                f"`embeddings_dir` has {len(image_embeds)} embeddings of size {image_embeds.shape[1]}, but there are "
                f"{len(dataset)} images and CLIP's have size {dim}: compute them anew with the same arguments."
            )
        if saved["meta"]["clip"]["image_encoder_sha256"] != model_sha256(image_encoder):
            raise ValueError(
                "`embeddings_dir` has embeddings by another CLIP (by the hash of its image encoder): compute them "
                "anew with this one."
            )
        probed = copy.copy(dataset)  # as that script prepares them
        probed.resolution, probed.resample = image_encoder.config.image_size, Image.Resampling.BICUBIC
        probes = range(0, len(dataset), max(1, len(dataset) // 4))
        again = torch.cat([embeds for _, embeds in embedded(probed, probes)])
        for row, cosine in zip(probes, cosine_similarity(image_embeds[list(probes)], again).tolist(), strict=True):
            if not cosine > 0.99:
                raise ValueError(
                    f"row {row} of `embeddings_dir` is not the embedding of image {row}: compute them anew from the "
                    "same images, with the same `seed` and `max_train_samples`."
                )
        if embed_norm == "l2":
            image_embeds = torch.nn.functional.normalize(image_embeds, dim=1)
    elif args.cache_embeddings or pretrained is None:  # a pretrained projection has its statistics
        stride = 1 if args.cache_embeddings else max(1, len(dataset) // 4096)
        rows = range(0, len(dataset), stride)
        image_embeds = torch.cat([embeds for _, embeds in embedded(dataset, rows)])
    if pretrained is None:
        std = image_embeds.std(dim=0)
        projection.clip_mean.copy_(image_embeds.mean(dim=0))
        projection.clip_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
    train_dataset = EmbeddedImages(dataset, image_embeds) if args.cache_embeddings or args.embeddings_dir else dataset
    validation = None
    if args.validation_steps and args.validation_fraction != 0:
        held_out = run.load_dataset("validation", [])
        held_out.resolution = max(resolution, image_encoder.config.image_size)
        batches = list(embedded(held_out, range(min(256, len(held_out)))))
        validation = tuple(torch.cat(column) for column in zip(*batches, strict=True))

    # 5. Train
    run.prepare(models, train_dataset, train_module=ConditionedDecoder(**models), frozen=image_encoder)
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"]
            embeds = batch.get("image_embeds")
            if embeds is None:
                embeds = embed_images(image_encoder, images, embed_norm)
            images = resized(images, resolution)
            # Section 2.1: 10 % of the embeddings are dropped, for guidance
            drop_mask = run.randint(2**24) < args.embedding_dropout * 2**24
            noise, timesteps = run.randn_like(images), run.randint(num_train_timesteps)
            model_output = run.model(scheduler.add_noise(images, noise, timesteps), timesteps, embeds, drop_mask)
            error = model_output.float() - target(scheduler, images, noise, timesteps)
            per_sample_loss = error.square().flatten(1).mean(1)
            run.optimize(
                per_sample_loss.mean(),
                per_sample_loss=per_sample_loss,
                timesteps=timesteps,
                num_train_timesteps=num_train_timesteps,
            )
        if run.validate_now and validation is not None:
            trained = run.trained()
            if run.accelerator.is_main_process:
                true_images, true_embeds = validation
                values = {
                    "loss": evaluate_loss(
                        ConditionedDecoder(**trained),
                        scheduler,
                        true_images,
                        true_embeds,
                        batch_size=args.train_batch_size,
                        seed=args.seed,
                    )
                }
                count = min(args.num_validation_images, len(true_images))
                decoded = pipeline(trained)(
                    image_embeds=true_embeds[:count],
                    num_inference_steps=min(args.validation_inference_steps, num_train_timesteps),
                    guidance_scale=args.validation_guidance_scale,
                    generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
                    output_type="pt",
                ).images
                again = embed_images(image_encoder, 2 * decoded - 1, embed_norm).cpu()
                values["cos_decoded"] = cosine_similarity(again, true_embeds[:count]).mean().item()
                if count > 1:
                    values["cos_shuffled"] = cosine_similarity(again.roll(1, 0), true_embeds[:count]).mean().item()
                run.log({f"validation_{name}": value for name, value in values.items()})
                # first what was embedded, below what was made of it
                pairs = torch.cat([true_images[:count] / 2 + 0.5, decoded.cpu()])
                array = (pairs * 255).round().byte().permute(0, 2, 3, 1).numpy()
                run.log_images("decoded", [Image.fromarray(picture) for picture in array], columns=count)

    # 6. Save and publish
    metrics, results = run.metrics, []
    names = {
        "loss": ("loss", "mean squared error of the prediction, held out"),
        "cos_decoded": ("cosine", "cosine of embeddings, image and decoded image, held out"),
        "cos_shuffled": ("cosine", "cosine of embeddings, image and another decoded image, held out"),
    }
    for name, (kind, title) in names.items():
        if (value := metrics.get(f"validation_{name}")) is not None:
            results.append(
                {
                    "dataset_name": args.dataset_name or "images",
                    "metric_type": kind,
                    "metric_name": title,
                    "metric_value": round(value, 5),
                }
            )
    bases = [args.pretrained_model_name_or_path, args.pretrained_prior_model_name_or_path]
    bases = [base for base in bases if base is not None and not Path(base).is_dir()]
    run.finish(
        pipeline(run.trained()),
        card={
            "datasets": [args.dataset_name] if args.dataset_name else None,
            "base_model": bases or None,
            "metrics": results,
            "training": {
                "data": dataset.description,
                **({"CLIP": clip_model_id} if clip_model_id else {}),
                "embeddings": "as CLIP gives them" if embed_norm == "standardize" else "of length 1",
                "embeddings dropped": f"{args.embedding_dropout:g}",
                "noise": f"{scheduler.config.beta_schedule}, {num_train_timesteps} timesteps",
                "prediction": scheduler.config.prediction_type,
                "optimizer": f"AdamW, weight decay {args.adam_weight_decay:g}",
                "optimizer steps": run.step,
                "images per step": run.global_batch_size,
                "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, warm-up {args.lr_warmup_steps}",
                "averaged weights": f"decay {args.ema_decay}" if args.use_ema else "none",
                "seed": args.seed,
                "last training loss": round(metrics["train_loss"], 5),
            },
        },
    )


if __name__ == "__main__":
    run_script(main, HfArgumentParser(UnCLIPDecoderArguments))
