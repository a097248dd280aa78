"""training/train_unclip_decoder.py: its loss, its recipe, what it refuses, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PriorTransformer, UNet2DConditionModel
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_unclip import make_image_encoder, make_prior, make_text_encoder, make_tokenizer, prior_scheduler

from diffusers_ext import UnCLIPImageProjection, UnCLIPPriorPipeline, UnCLIPTextToImagePipeline
from diffusers_ext.data import load_image_dataset
from diffusers_ext.pipelines.unclip import UnCLIPDecoderScheduler
from diffusers_ext.training import precompute_clip_embeddings
from diffusers_ext.training.train_unclip_decoder import (
    ConditionedDecoder,
    EmbeddedImages,
    UnCLIPDecoderArguments,
    default_decoder_config,
    embed_images,
    evaluate_loss,
    main,
    resized,
    target,
)
from diffusers_ext.training_run import TrainingRun

ROOT = Path(__file__).parents[1]
TINY = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4, "cross_attention_dim": 12,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "class_embed_type": "identity",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of one color each, a CLIP, a decoder's configuration."""
    root = tmp_path_factory.mktemp("unclip")
    numbers = np.random.default_rng(0).integers(0, 256, (24, 3), dtype=np.uint8)
    for i, color in enumerate(numbers):
        folder = root / "images" / ("train" if i < 16 else "validation")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), tuple(color.tolist())).save(folder / f"{i:02d}.png")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{i:02d}.png", "text": f"color {i}"}) + "\n")
    save_clip(root / "clip")
    UNet2DConditionModel(**TINY, sample_size=8).save_config(root / "config")
    return root


def save_clip(folder, seed=0):
    pipe = UnCLIPPriorPipeline(
        make_prior(), make_text_encoder(), make_tokenizer(), prior_scheduler(), make_image_encoder()
    )
    torch.manual_seed(seed)
    if seed:
        pipe.image_encoder.visual_projection.weight.data.normal_()
    pipe.save_pretrained(folder)


def arguments(folders, output_dir, **changes):
    defaults = dict(
        train_data_dir=str(folders / "images"), resolution=8, train_batch_size=4, max_train_steps=2,
        validation_steps=0, checkpointing_steps=0, report_to="none", output_dir=str(output_dir),
        pretrained_clip_model_name_or_path=str(folders / "clip"), decoder_config_name_or_path=str(folders / "config"),
        num_validation_images=3, validation_inference_steps=2,
    )  # fmt: skip
    return UnCLIPDecoderArguments(**(defaults | changes))


def saved_numbers(folder):
    return json.loads((Path(folder) / "training_metrics.json").read_text())["metrics"]


def weights(folder):
    pipe = UnCLIPTextToImagePipeline.from_pretrained(folder)
    parts = {"decoder": pipe.decoder, "projection": pipe.decoder_projection}
    return {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}


# --- Numbers


def test_targets():
    images, noise, timesteps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.tensor([10, 900])
    assert target(UnCLIPDecoderScheduler(), images, noise, timesteps) is noise
    scheduler = UnCLIPDecoderScheduler(prediction_type="v_prediction")
    velocity = target(scheduler, images, noise, timesteps)
    for row, t in enumerate(timesteps.tolist()):  # a perfect prediction leads to the image
        noisy = scheduler.add_noise(images, noise, timesteps)[row : row + 1]
        scheduler.register_to_config(clip_sample=False)
        found = scheduler.step(velocity[row : row + 1], t, noisy, -1).prev_sample
        torch.testing.assert_close(found, images[row : row + 1], rtol=1e-4, atol=1e-4)


def test_embeddings_are_those_of_the_pipeline(folders):
    images = torch.rand(2, 3, 20, 20)
    encoder = make_image_encoder()
    for norm in ("standardize", "l2"):
        pipe = UnCLIPTextToImagePipeline(
            *[None] * 4, UNet2DConditionModel(**TINY, sample_size=8),
            UnCLIPImageProjection(4, 8, 32, 12), UnCLIPDecoderScheduler(), encoder, embed_norm=norm,
        )  # fmt: skip
        torch.testing.assert_close(embed_images(encoder, 2 * images - 1, norm), pipe.encode_image(images))


def test_the_loss_of_a_step(folders, tmp_path):
    """The error of the noise, at the drawn timesteps, told the embeddings of the images but for the dropped ones."""
    options = {"max_train_steps": 1, "embedding_dropout": 0.5, "train_batch_size": 8, "learning_rate": 1e-12}
    main(arguments(folders, tmp_path / "out", **options))
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "out")  # hardly changed by one such step

    draws = TrainingRun(arguments(folders, tmp_path / "draws", **options))
    dataset = draws.load_dataset("train", [])
    dataset.resolution = 12  # what CLIP sees
    draws.prepare({"decoder": UNet2DConditionModel(**TINY, sample_size=8)}, dataset)
    seen = next(draws.batches())["images"]
    images = resized(seen, 8)
    dropped = draws.randint(2**24) < 2**23
    noise, t = draws.randn_like(images), draws.randint(1000)
    assert 0 < dropped.sum() < 8
    level = pipe.decoder_scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    noisy = level.sqrt() * images + (1 - level).sqrt() * noise
    with torch.no_grad():
        z = (
            embed_images(pipe.image_encoder, seen) - pipe.decoder_projection.clip_mean
        ) / pipe.decoder_projection.clip_std
        z = torch.where(dropped[:, None], pipe.decoder_projection.learned_classifier_free_guidance_embeddings, z)
        tokens = pipe.decoder_projection.clip_extra_context_tokens_proj(z).reshape(8, 12, 4).transpose(1, 2)
        time_embeds = pipe.decoder_projection.clip_image_embeddings_project_to_time_embeddings(z)
        noise_pred = pipe.decoder(noisy, t, encoder_hidden_states=tokens, class_labels=time_embeds).sample
    expected = (noise_pred - noise).square().mean().item()
    assert saved_numbers(tmp_path / "out")["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_statistics_are_those_of_the_training_images(folders, tmp_path):
    main(arguments(folders, tmp_path / "out", max_train_steps=1))
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "out")
    pictures = [Image.open(path) for path in sorted((folders / "images" / "train").glob("*.png"))]
    z = pipe.encode_image(pictures)
    torch.testing.assert_close(pipe.decoder_projection.clip_mean, z.mean(dim=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pipe.decoder_projection.clip_std, z.std(dim=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("resolution", "levels"), [(8, 3), (31, 3), (32, 4), (63, 4)])
def test_default_networks_of_thumbnails(resolution, levels):
    """Both ways of telling the embedding act: the time embedding, and the tokens, which the middle attends to."""
    torch.manual_seed(0)
    decoder = UNet2DConditionModel(**default_decoder_config(resolution), sample_size=resolution).eval()
    assert sum(p.numel() for p in decoder.parameters()) < 1.5e6
    assert len(decoder.down_blocks) == levels and decoder.down_blocks[0].resnets[0].out_channels == 16
    attention = {name.split(".")[0] for name, _ in decoder.named_modules() if "attentions" in name}
    assert attention == {"mid_block"}
    width = decoder.class_embedding(decoder.time_embedding(torch.zeros(1, 16))).shape[1]
    projection = UnCLIPImageProjection(4, 8, width, decoder.config.cross_attention_dim)
    (tokens, others), (time_embeds, other_times) = (
        value.split(1) for value in projection(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    )
    noisy = torch.randn(1, 3, resolution, resolution)

    def predict(tokens, time_embeds):
        return decoder(noisy, 10, encoder_hidden_states=tokens, class_labels=time_embeds).sample

    with torch.no_grad():
        prediction = predict(tokens, time_embeds)
        assert prediction.shape == noisy.shape
        for other in (predict(others, time_embeds), predict(tokens, other_times)):
            assert (other - prediction).abs().max() > 1e-5


def test_default_network_of_larger_images():
    """The widths of GLIDE's base model, heads of 64, attention at all levels but the first."""
    with torch.device("meta"):
        decoder = UNet2DConditionModel(**default_decoder_config(64), sample_size=64)
    assert default_decoder_config(64) == default_decoder_config(256)
    assert 3e8 < sum(p.numel() for p in decoder.parameters()) < 5e8
    attended = [hasattr(block, "attentions") for block in (*decoder.down_blocks, *decoder.up_blocks)]
    assert attended == [False, True, True, True, True, True, True, False]
    widths = [module.inner_dim // module.heads for module in decoder.modules() if type(module).__name__ == "Attention"]
    assert set(widths) == {64}


# --- Training


def test_a_run_learns_and_leaves_a_pipeline(folders, tmp_path):
    """It paints the color that it is told, of pictures that it never saw."""
    args = arguments(
        folders, tmp_path / "unclip", max_train_steps=500, train_batch_size=16, learning_rate=4e-3, use_ema=True,
        ema_decay=0.99, cache_embeddings=True, validation_steps=250, prediction_type="v_prediction",
        lr_scheduler="cosine", validation_inference_steps=10,
    )  # fmt: skip
    main(args)
    pipe = UnCLIPTextToImagePipeline.from_pretrained(args.output_dir)
    assert type(DiffusionPipeline.from_pretrained(args.output_dir)) is UnCLIPTextToImagePipeline
    assert pipe.prior is None and pipe.text_encoder is not None and pipe.config.clip_model_id == "clip"
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.open(path) for path in sorted((folders / "images" / "train").glob("*.png"))]
    true = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    output = pipe(
        image_embeds=pipe.encode_image(pictures), num_inference_steps=20, guidance_scale=1.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    painted = output.images.mean((2, 3))
    error, other = (painted - true.mean((2, 3))).abs().mean(), (painted.roll(1, 0) - true.mean((2, 3))).abs().mean()
    assert error < 0.5 * other and error < 0.12, (error, other)
    numbers = saved_numbers(args.output_dir)
    assert numbers["validation_cos_decoded"] > numbers["validation_cos_shuffled"]
    assert (tmp_path / "unclip" / "samples" / "decoded-000500.png").is_file()

    card = ModelCard.load(tmp_path / "unclip" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and "unclip" in card.data.tags
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert len(results) == 3
    assert results["mean squared error of the prediction, held out"] == round(numbers["validation_loss"], 5)
    assert "| prediction | v_prediction |" in card.text and "| CLIP | clip |" in card.text
    assert "None" not in card.content and "[]" not in card.content and str(tmp_path) not in card.content


def test_validation_loss_is_of_the_published_weights(folders, tmp_path):
    args = arguments(folders, tmp_path / "out", validation_steps=2, use_ema=True)
    main(args)
    pipe = UnCLIPTextToImagePipeline.from_pretrained(args.output_dir)
    held_out = load_image_dataset(train_data_dir=folders / "images", split="validation", resolution=12)
    images = torch.stack([held_out[i]["images"] for i in range(len(held_out))])
    assert len(images) == 8
    z = embed_images(pipe.image_encoder, images)
    model = ConditionedDecoder(pipe.decoder, pipe.decoder_projection)
    values = [evaluate_loss(model, pipe.decoder_scheduler, resized(images, 8), z, batch_size=size) for size in (3, 8)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert saved_numbers(args.output_dir)["validation_loss"] == pytest.approx(values[0], rel=1e-4)


def test_resume_is_bit_exact(folders, tmp_path):
    options = {
        "use_ema": True, "checkpointing_steps": 3, "validation_steps": 2, "train_batch_size": 3,
        "gradient_accumulation_steps": 2, "random_flip": True, "max_train_steps": 5,
    }  # fmt: skip
    main(arguments(folders, tmp_path / "whole", **options))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    main(arguments(folders, tmp_path / "parts", resume_from_checkpoint="latest", **options))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert saved_numbers(tmp_path / "whole") == saved_numbers(tmp_path / "parts")
    for name in ("decoder", "decoder_projection"):  # of both, the averages are published
        published, averages, last = (
            load_file(tmp_path / "whole" / folder / "diffusion_pytorch_model.safetensors")
            for folder in (name, f"checkpoint-5/{name}_ema", f"checkpoint-5/{name}")
        )
        assert all(torch.equal(published[key], averages[key]) for key in averages)
        assert any(not torch.equal(published[key], last[key]) for key in last)
    save_clip(tmp_path / "other-clip", seed=1)
    for change, message in (
        ({"embedding_dropout": 0.2}, "`embedding_dropout` 0.1 -> 0.2"),
        ({"pretrained_clip_model_name_or_path": str(tmp_path / "other-clip")}, "is of another run"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(folders, tmp_path / "parts", resume_from_checkpoint="latest", **(options | change)))


def test_accumulation_equals_one_batch(folders, tmp_path):
    """Which embeddings are dropped depends on the image's place alone."""
    for name, changes in {"8": {"train_batch_size": 8}, "4x2": {"gradient_accumulation_steps": 2}}.items():
        main(arguments(folders, tmp_path / name, embedding_dropout=0.5, max_train_steps=3, **changes))
    assert saved_numbers(tmp_path / "8") == pytest.approx(saved_numbers(tmp_path / "4x2"), rel=1e-4)


def test_cached_embeddings_change_nothing(folders, tmp_path):
    precompute_clip_embeddings.main(
        precompute_clip_embeddings.PrecomputeArguments(
            pretrained_clip_model_name_or_path=str(folders / "clip"), train_data_dir=str(folders / "images"),
            output_dir=str(tmp_path / "embeddings"), batch_size=5,
        )
    )  # fmt: skip
    for name, options in {
        "fly": {}, "cache": {"cache_embeddings": True}, "dir": {"embeddings_dir": str(tmp_path / "embeddings")},
    }.items():  # fmt: skip
        main(arguments(folders, tmp_path / name, resolution=12, center_crop=True, **options))
    fly, cache, saved = (weights(tmp_path / name) for name in ("fly", "cache", "dir"))
    for name, value in fly.items():
        torch.testing.assert_close(cache[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
    numbers = [saved_numbers(tmp_path / name)["train_loss"] for name in ("fly", "cache", "dir")]
    assert numbers[1:] == pytest.approx(numbers[:1] * 2, rel=1e-4)

    # of other images, of another CLIP
    save_clip(tmp_path / "other-clip", seed=1)
    with pytest.raises(ValueError, match="`embeddings_dir` has embeddings by another CLIP"):
        main(
            arguments(
                folders, tmp_path / "out", embeddings_dir=str(tmp_path / "embeddings"),
                pretrained_clip_model_name_or_path=str(tmp_path / "other-clip"),
            )
        )  # fmt: skip
    with pytest.raises(ValueError, match="`embeddings_dir` has 16 embeddings of size 8, but there are 7 images"):
        main(arguments(folders, tmp_path / "out", embeddings_dir=str(tmp_path / "embeddings"), max_train_samples=7))
    assert not (tmp_path / "out").exists()


def test_embeddings_in_another_order_are_refused(folders, tmp_path):
    for name, order in (("images", 1), ("reversed", -1)):
        (tmp_path / name / "train").mkdir(parents=True)
        pictures = sorted((folders / "images" / "train").glob("*.png"))
        rows = []
        for i, path in enumerate(pictures[::order]):
            Image.open(path).save(tmp_path / name / "train" / f"{i:02d}.png")
            rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": "x"}))
        (tmp_path / name / "train" / "metadata.jsonl").write_text("\n".join(rows))
    precompute_clip_embeddings.main(
        precompute_clip_embeddings.PrecomputeArguments(
            pretrained_clip_model_name_or_path=str(folders / "clip"), train_data_dir=str(tmp_path / "images"),
            output_dir=str(tmp_path / "embeddings"), validation_fraction=0,
        )
    )  # fmt: skip
    options = {"embeddings_dir": str(tmp_path / "embeddings"), "validation_fraction": 0, "max_train_steps": 1}
    main(arguments(folders, tmp_path / "right", train_data_dir=str(tmp_path / "images"), **options))
    with pytest.raises(ValueError, match="row 0 of `embeddings_dir` is not the embedding of image 0"):
        main(arguments(folders, tmp_path / "wrong", train_data_dir=str(tmp_path / "reversed"), **options))


def test_embeddings_are_compared_row_by_row(folders, tmp_path):
    """In batches that are no divisor of what is compared, and of pictures that every filter shrinks otherwise."""
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    numbers = np.random.default_rng(1)
    for i in range(17):
        Image.fromarray(numbers.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(images / f"{i:02d}.png")
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": "x"}) for i in range(17)]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    precompute_clip_embeddings.main(
        precompute_clip_embeddings.PrecomputeArguments(
            pretrained_clip_model_name_or_path=str(folders / "clip"), train_data_dir=str(tmp_path / "images"),
            output_dir=str(tmp_path / "embeddings"), validation_fraction=0,
        )
    )  # fmt: skip
    options = {
        "embeddings_dir": str(tmp_path / "embeddings"), "validation_fraction": 0, "max_train_steps": 1,
        "train_data_dir": str(tmp_path / "images"),
    }  # fmt: skip
    main(arguments(folders, tmp_path / "right", **options))
    place = load_image_dataset(train_data_dir=tmp_path / "images", resolution=8, validation_fraction=0).indices[8]
    Image.new("RGB", (60, 50), "red").save(images / f"{place:02d}.png")
    with pytest.raises(ValueError, match="row 8 of `embeddings_dir` is not the embedding of image 8"):
        main(arguments(folders, tmp_path / "wrong", **options))


def test_with_a_prior(folders, tmp_path):
    """The finished pipeline paints texts; CLIP and the form of the embeddings are the prior's."""
    prior = UnCLIPPriorPipeline.from_pretrained(folders / "clip")
    prior.register_to_config(embed_norm="l2", clip_model_id="me/clip")
    prior.save_pretrained(tmp_path / "prior")
    options = {
        "pretrained_prior_model_name_or_path": str(tmp_path / "prior"), "pretrained_clip_model_name_or_path": None,
        "max_train_steps": 1,
    }  # fmt: skip
    main(arguments(folders, tmp_path / "out", **options))
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.embed_norm, pipe.config.clip_model_id) == ("l2", "me/clip")
    state = pipe.prior.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in prior.prior.state_dict().items())
    assert isinstance(pipe.prior, PriorTransformer)
    assert pipe("color 3", num_inference_steps=2, prior_num_inference_steps=2).images[0].size == (8, 8)

    save_clip(tmp_path / "other-clip", seed=1)
    for changes, message in (
        ({"embed_norm": "standardize"}, "`embed_norm` is 'standardize', but the pipeline of .* has 'l2'"),
        (
            {"pretrained_clip_model_name_or_path": str(tmp_path / "other-clip")},
            "the image encoder of .* is not that of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(folders, tmp_path / "no", **(options | changes)))
    other = UnCLIPPriorPipeline.from_pretrained(tmp_path / "other-clip")
    other.register_to_config(embed_norm="l2")
    other.save_pretrained(tmp_path / "other-prior")
    with pytest.raises(ValueError, match="the image encoder of `pretrained_model_name_or_path` is not that of"):
        main(
            arguments(
                folders, tmp_path / "no", pretrained_model_name_or_path=str(tmp_path / "out"), resolution=None,
                pretrained_prior_model_name_or_path=str(tmp_path / "other-prior"), decoder_config_name_or_path=None,
                pretrained_clip_model_name_or_path=None, embed_norm=None,
            )
        )  # fmt: skip


def test_fine_tuning_starts_from_the_pretrained_weights(folders, tmp_path):
    main(arguments(folders, tmp_path / "start", prediction_type="v_prediction", ddpm_num_steps=500))
    options = {
        "pretrained_model_name_or_path": str(tmp_path / "start"), "pretrained_clip_model_name_or_path": None,
        "decoder_config_name_or_path": None, "resolution": None, "learning_rate": 1e-9,
    }  # fmt: skip
    main(arguments(folders, tmp_path / "out", **options))
    start, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    for name, value in start.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    config = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "out").decoder_scheduler.config
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 500)
    recorded = json.loads((tmp_path / "out" / "training_arguments.json").read_text())
    assert (recorded["prediction_type"], recorded["ddpm_num_steps"]) == ("v_prediction", 500)
    for changes, message in (
        ({"resolution": 12}, "paints 8 pixels from embeddings of size 8, but images have 12"),
        ({"prediction_type": "epsilon"}, "`prediction_type` is 'epsilon', but .* trained with 'v_prediction'"),
        ({"ddpm_num_steps": 1000}, "`ddpm_num_steps` is 1000, but .* trained with 500: leave it out"),
        ({"ddpm_beta_schedule": "linear"}, "`ddpm_beta_schedule` is 'linear', but .* with 'squaredcos_cap_v2'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(folders, tmp_path / "no", **(options | changes)))
    # a run that is resumed does not change to what another decoder predicts
    main(arguments(folders, tmp_path / "other"))
    options["checkpointing_steps"] = 1
    main(arguments(folders, tmp_path / "long", **options))
    changed = options | {"pretrained_model_name_or_path": str(tmp_path / "other"), "max_train_steps": 3}
    with pytest.raises(ValueError, match="is of another run .*`prediction_type` 'v_prediction' -> 'epsilon'"):
        main(arguments(folders, tmp_path / "long", resume_from_checkpoint="latest", **changed))
    options["checkpointing_steps"] = 0
    # half precision is for using, not for training
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "start").to(torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    main(
        arguments(folders, tmp_path / "whole", **(options | {"pretrained_model_name_or_path": str(tmp_path / "half")}))
    )
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "whole")
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}


def test_decoders_of_others_are_refused(folders, tmp_path, monkeypatch):
    main(arguments(folders, tmp_path / "start", max_train_steps=1))
    load = UnCLIPTextToImagePipeline.from_pretrained

    def kandinsky(*args, **kwargs):
        pipe = load(*args, **kwargs)
        pipe.register_modules(decoder_projection=None)
        return pipe

    monkeypatch.setattr(UnCLIPTextToImagePipeline, "from_pretrained", kandinsky)
    with pytest.raises(ValueError, match="has no `UnCLIPImageProjection`.* which this script does not train"):
        main(
            arguments(
                folders, tmp_path / "no", pretrained_model_name_or_path=str(tmp_path / "start"), resolution=None,
                decoder_config_name_or_path=None,
            )
        )  # fmt: skip


WORKER = """
import sys, torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from diffusers_ext.training import train_unclip_decoder as script
torch.set_num_threads(1)
folder, out, sharded = sys.argv[1:]
if sharded == "True":  # accelerate turns this on for GPUs only: its state is set by hand
    original = Accelerator.__init__

    def initialize(self, *args, **kwargs):
        original(self, *args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )

    Accelerator.__init__ = initialize
script.main(script.UnCLIPDecoderArguments(
    train_data_dir=f"{folder}/images", pretrained_clip_model_name_or_path=f"{folder}/clip", resolution=8,
    decoder_config_name_or_path=f"{folder}/config", output_dir=out, train_batch_size=2, max_train_steps=3,
    validation_steps=2, checkpointing_steps=0, validation_inference_steps=2, num_validation_images=3, use_ema=True,
    report_to="none",
))
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes(folders, tmp_path, sharded):
    """Two gloo processes train what one process with the same images per step does, and none waits forever."""
    if sharded and not hasattr(torch.distributed.fsdp, "CPUOffloadPolicy"):
        pytest.skip("this torch has no second version of FSDP")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(folders), str(tmp_path / "two"), str(sharded)],
        env=os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    main(arguments(folders, tmp_path / "one", max_train_steps=3, validation_steps=2, use_ema=True))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)
    numbers = saved_numbers(tmp_path / "one")
    assert saved_numbers(tmp_path / "two") == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    assert json.loads((tmp_path / "two" / "training_metrics.json").read_text())["processes"] == 2


def test_command_line_and_hub(folders, tmp_path):
    flags = f"""--train_data_dir {folders / "images"} --resolution 8 --train_batch_size 4 --max_train_steps 1
        --pretrained_prior_model_name_or_path {folders / "clip"} --decoder_config_name_or_path {folders / "config"}
        --report_to none --validation_inference_steps 2 --num_validation_images 2 --checkpointing_steps 0
        --output_dir {tmp_path / "out"} --push_to_hub --hub_model_id alice/unclip --hub_token hf_alice_write""".split()
    with HubServer() as hub:
        env = hub.env(tmp_path / "home", token=None)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        script = [sys.executable, str(ROOT / "training" / "train_unclip_decoder.py"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        files = hub.files("alice/unclip")
        # wrong input ends in one line
        wrong = subprocess.run(
            [*script, "--embedding_dropout", "2"], env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert wrong.returncode == 2 and "error: `embedding_dropout` is 2.0" in wrong.stderr
        assert "Traceback" not in wrong.stderr
    folders_of_parts = {name.split("/")[0] for name in files}
    assert {"model_index.json", "README.md", "training_metrics.json", "prior", "decoder", "decoder_projection",
            "image_encoder", "text_encoder", "tokenizer", "samples"} <= folders_of_parts  # fmt: skip
    assert not any(b"hf_alice_write" in content for content in files.values())
    for name, content in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(content)
    published, saved = weights(tmp_path / "repo"), weights(tmp_path / "out")
    assert all(torch.equal(published[name], saved[name]) for name in saved)
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and str(tmp_path) not in card.content
    assert 'from_pretrained("alice/unclip")' in card.text and "None" not in card.content
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tmp_path / "repo")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("color 3", num_inference_steps=2, prior_num_inference_steps=2).images[0].size == (8, 8)


# --- What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dropout": 1.0}, r"`embedding_dropout` is 1.0, but must be in \[0, 1\)"),
        ({"ddpm_num_steps": 2}, "`ddpm_num_steps` is 2, but must be at least 4"),
        ({"validation_inference_steps": 0}, "`validation_inference_steps` is 0"),
        ({"validation_guidance_scale": float("nan")}, "`validation_guidance_scale` is nan, but must be finite"),
        ({"pretrained_model_name_or_path": "x"}, "brings its own configuration: leave one out"),
        ({"cache_embeddings": True, "embeddings_dir": "x"}, "are both given: leave one out"),
        ({"cache_embeddings": True, "random_flip": True}, "`random_flip` is set, but embeddings that are kept"),
        ({"pretrained_clip_model_name_or_path": None}, "there is no image encoder: pass `pretrained_clip_model"),
    ],
)
def test_arguments_that_do_not_fit(folders, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(folders, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": (12, 12)}, r"`cross_attention_dim` \[12, 12\].*make the first a whole number"),
        ({"encoder_hid_dim": 5}, "`encoder_hid_dim_type` 'text_proj'"),
        ({"addition_embed_type": "text"}, "`addition_embed_type` 'text'"),
        ({"class_embed_type": None}, "`class_embed_type`=None"),
        ({"out_channels": 6}, "6 output channels"),
    ],
)
def test_networks_that_do_not_fit(folders, tmp_path, changes, message):
    UNet2DConditionModel(**(TINY | changes), sample_size=8).save_config(tmp_path / "config")
    with pytest.raises(ValueError, match=message):
        main(arguments(folders, tmp_path / "out", decoder_config_name_or_path=str(tmp_path / "config")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(1, 3, 12, 20), (1, 3, 20, 12)])
def test_images_leave_in_the_size_of_the_decoder(shape):
    assert resized(torch.rand(shape) * 2 - 1, 12).shape == (1, 3, 12, 12)
    assert embed_images(make_image_encoder(), torch.rand(shape) * 2 - 1).shape == (1, 8)


def test_dataset_with_embeddings(folders):
    run = TrainingRun(arguments(folders, folders / "unused"))
    dataset = run.load_dataset("train", [])
    both = EmbeddedImages(dataset, torch.arange(16.0)[:, None])
    assert len(both) == 16 and both[3]["image_embeds"].tolist() == [3.0]
    assert torch.equal(both[3]["images"], dataset[3]["images"]) and both.pictures is dataset.pictures
