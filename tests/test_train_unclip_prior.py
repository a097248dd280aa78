"""training/train_unclip_prior.py and evaluation/embeddings.py: the loss, the numbers, resume, adapters, refusals.

CLIPs and pictures are those of `test_precompute_clip_embeddings`: real classes, tiny, with random weights.
"""

import doctest
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DPMSolverMultistepScheduler, PriorTransformer
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from scipy.linalg import sqrtm
from test_precompute_clip_embeddings import ROOT, captioned_images, tiny_clip
from test_precompute_clip_embeddings import arguments as precompute_arguments

import diffusers_ext.evaluation.embeddings
from diffusers_ext import UnCLIPPriorPipeline, UnCLIPPriorTransformer
from diffusers_ext.evaluation.embeddings import (
    embedding_metrics,
    frechet_distance,
    linear_regression,
    zero_shot_accuracy,
)
from diffusers_ext.pipelines.unclip_prior import init_prior
from diffusers_ext.training import precompute_clip_embeddings as precompute
from diffusers_ext.training.precompute_clip_embeddings import load_embeddings
from diffusers_ext.training.train_unclip_prior import (
    EmbeddingDataset,
    UnCLIPPriorArguments,
    default_prior_config,
    evaluate,
    main,
    text_inputs,
)
from diffusers_ext.training_run import TrainingRun

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`clip`, `images`, `embeddings` of 40 of them, with and without hidden states, and `config` of a tiny prior."""
    folder = tmp_path_factory.mktemp("prior")
    clip, images = tiny_clip(folder / "clip"), captioned_images(folder / "images", 40)
    for name, changes in (("embeddings", {}), ("cached", {"cache_hidden_states": True})):
        precompute.main(precompute_arguments(clip, images, folder / name, shard_size=15, **changes))
    PriorTransformer(**TINY).save_config(folder / "config")
    return folder


def arguments(folder, output_dir, **changes):
    defaults = dict(
        embeddings_dir=str(folder / "embeddings"), prior_config_name_or_path=str(folder / "config"),
        output_dir=str(output_dir), train_batch_size=4, max_train_steps=2, learning_rate=1e-3, validation_steps=0,
        checkpointing_steps=0, num_inference_steps=3, zero_shot_template="a {}", report_to="none",
    )  # fmt: skip
    defaults |= {"prior_config_name_or_path": None} if "pretrained_model_name_or_path" in changes else {}
    return UnCLIPPriorArguments(**(defaults | changes))


@pytest.fixture(scope="module")
def base(folder):
    """A prior that was trained for six steps."""
    main(arguments(folder, folder / "base", max_train_steps=6))
    return str(folder / "base")


def saved_numbers(folder):
    return json.loads((Path(folder) / "training_metrics.json").read_text())["metrics"]


def weights(folder, cls=PriorTransformer):
    return cls.from_pretrained(folder, subfolder="prior").state_dict()


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# --- Distances and cosines


def exact_sample(mean, covariance, generator, count=200):
    """Points that have this mean and covariance to the last digit."""
    points = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    points -= points.mean(0)
    points = points @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(points.T))).T
    return points @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    means, roots = (torch.randn(*shape, generator=generator).double() for shape in ((2, 4), (2, 4, 4)))
    covariances = roots @ roots.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    samples = [exact_sample(m, c, generator) for m, c in zip(means, covariances, strict=True)]
    cross = np.trace(sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + covariances.diagonal(dim1=1, dim2=2).sum() - 2 * cross
    assert frechet_distance(*samples) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(*samples[::-1]) == pytest.approx(expected.item(), rel=1e-9)
    variances = torch.tensor([[1, 4, 9, 1], [4, 1, 9, 0.25]], dtype=torch.float64)
    scaled = [exact_sample(means[0], torch.diag(variance), generator) for variance in variances]
    assert frechet_distance(*scaled) == pytest.approx(1 + 1 + 0 + 0.25, rel=1e-9)
    assert frechet_distance(samples[0], samples[0].flip(0)) == pytest.approx(0, abs=1e-12)
    few = torch.randn(3, 8, generator=generator)  # a covariance of rank 2
    assert frechet_distance(few, few + 2) == pytest.approx(32, rel=1e-6)
    assert frechet_distance(few.bfloat16().float(), few.bfloat16()) == pytest.approx(0, abs=1e-6)


def test_linear_regression_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    x[:, 5] = x[:, 4]  # not of full rank
    solution = np.linalg.lstsq(np.c_[x.double(), np.ones(50)], y.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(
        linear_regression(x, y)(x).numpy(), np.c_[x.double(), np.ones(50)] @ solution, atol=1e-9
    )


def test_cosine_alone_would_choose_the_wrong_one():
    """Of a joint distribution whose truth is known: samples of it against its conditional mean."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(6000, 8, generator=generator)
    untold = 0.2 + torch.arange(8) / 4  # the text says much of the first dimensions, little of the last
    image, again, other = (text + untold * torch.randn(3, 6000, 8, generator=generator)).unbind(0)
    pairs = (image[3000:], text[3000:], image[:3000], text[:3000])
    perfect = embedding_metrics(torch.stack([again, other], 1)[3000:], *pairs)
    assert perfect["cos_true"] < perfect["cos_true_linear"]  # the mean is nearer to the truth
    assert perfect["frechet"] < perfect["frechet_true"] < 0.01 < 0.02 < perfect["frechet_linear"]
    assert perfect["cos_text"] == pytest.approx(perfect["cos_text_true"], abs=0.01)
    assert abs(perfect["cos_shuffled"]) < 0.02 and perfect["norm_ratio"] == pytest.approx(1, abs=0.02)
    assert perfect["best_of_2_cos_text_gain"] > 0.05 and perfect["best_of_2_cos_true_gain"] > 0.03
    unit = torch.nn.functional.normalize(torch.stack([again, other], 1)[3000:].double(), dim=2)
    assert perfect["diversity"] == pytest.approx(1 - (unit[:, 0] * unit[:, 1]).sum(1).mean().item(), abs=1e-12)
    collapsed = embedding_metrics(text[3000:, None].expand(-1, 3, -1), *pairs)
    assert collapsed["diversity"] == pytest.approx(0, abs=1e-12) and collapsed["frechet"] > 0.02
    assert collapsed["best_of_3_cos_text_gain"] == pytest.approx(0, abs=1e-12)
    for name in ("cos_true", "cos_shuffled", "frechet"):
        assert collapsed[name] == pytest.approx(collapsed[f"{name}_text"], abs=1e-9)


def test_a_gap_between_texts_and_images_is_bridged_by_the_baseline():
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(4000, 8, generator=generator) + 3)
    text = image - torch.tensor([0.2, -0.1, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    text = text / text.norm(dim=1, keepdim=True)
    metrics = embedding_metrics(image[2000:, None], image[2000:], text[2000:], image[:2000], text[:2000])
    assert metrics["frechet_text"] > 0.1 and metrics["frechet_text_gap"] < metrics["frechet_text"] / 10
    assert metrics["frechet_linear"] < metrics["frechet_text_gap"]


def test_diversity_is_that_of_images_that_share_a_caption():
    """By hand: captions a, a, a, b, b, c; only the first five have others of their caption."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1)
    candidates = torch.nn.functional.normalize(torch.randn(6, 3, 4, generator=generator, dtype=torch.float64), dim=2)
    captions = torch.tensor([[1, 2]] * 3 + [[1, 3]] * 2 + [[2, 2]])
    metrics = embedding_metrics(candidates, image, image, image, image, captions=captions)
    cos = image @ image.T
    by_row = [(cos[0, 1] + cos[0, 2] + cos[1, 2]) / 3] * 3 + [cos[3, 4]] * 2
    assert metrics["diversity_true"] == pytest.approx(1 - torch.stack(by_row).mean().item())
    drawn = candidates @ candidates.mT
    between = (drawn[:, 0, 1] + drawn[:, 0, 2] + drawn[:, 1, 2]) / 3
    assert metrics["diversity"] == pytest.approx(1 - between[:5].mean().item())


def test_accuracy_counts_what_the_captions_name():
    classes = torch.eye(3)
    predicted = torch.tensor([[5.0, 1, 0], [0, 0.1, 0], [0, 0, 9.0], [0, 2.0, 1]])
    assert zero_shot_accuracy(predicted, classes, torch.tensor([0, 1, 2, 2])) == 0.75
    labels = torch.tensor([0, 1, -1, 2])
    options = {"class_embeds": classes, "labels": labels}
    metrics = embedding_metrics(predicted[:, None], predicted.roll(1, 0), predicted, predicted, predicted, **options)
    assert metrics["zero_shot_accuracy"] == pytest.approx(2 / 3) == metrics["zero_shot_accuracy_text"]
    assert metrics["zero_shot_accuracy_true"] == pytest.approx(1 / 3)
    assert "zero_shot_accuracy" not in embedding_metrics(
        predicted[:, None], predicted, predicted, predicted, predicted, class_embeds=classes, labels=labels * 0 - 1
    )


def test_what_metrics_refuse():
    x = torch.ones(4, 3)
    nan = x.clone()
    nan[2, 1] = float("nan")
    for call, message in (
        (lambda: frechet_distance(x, x[:, :2]), r"`other_embeds` has shape \(4, 2\), but must be \(number, dim\)"),
        (lambda: frechet_distance(x[:1], x), "`embeds` has 1 embeddings, but a covariance needs at least 2"),
        (lambda: frechet_distance(x, nan), "row 2 of `other_embeds` holds values that are not finite"),
        (lambda: linear_regression(x, x[:3]), "`inputs` has 4 rows, but `targets` has 3"),
        (lambda: zero_shot_accuracy(x, x, torch.tensor([0, 1, 2])), r"`labels` has shape \(3,\)"),
        (
            lambda: zero_shot_accuracy(x, x, torch.tensor([0, 1, 2, 4])),
            "`labels` are 0 to 4, but `class_embeds` has 4",
        ),
        (lambda: embedding_metrics(x, x, x, x, x), r"`candidates` has shape \(4, 3\), but must be \(num_pairs"),
        (lambda: embedding_metrics(x[:, None], x[:3], x, x, x), "have 4, 3 and 4 rows"),
        (lambda: embedding_metrics(nan[:, None], x, x, x, x), "holds values that are not finite"),
        (lambda: embedding_metrics(x[:, None], x, x, x, x, labels=x[:, 0].long()), "`class_embeds` and `labels` one"),
        (
            lambda: embedding_metrics(x[:, None], x, x, x, x, labels=torch.zeros(3).long(), class_embeds=x),
            "`labels` has 3 rows, but there are 4 pairs",
        ),
        (lambda: embedding_metrics(x[:, None], x, x, x, x, captions=x[:2]), "`captions` has 2 rows, but there are 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert doctest.testmod(diffusers_ext.evaluation.embeddings).failed == 0


# --- The loss


def test_the_loss_is_the_papers(folder, tmp_path):
    """By hand, in float64: the cosine schedule, `x_0` standardized, the caption forgotten where the stream says so."""
    args = arguments(folder, tmp_path / "out", max_train_steps=1, text_drop_prob=0.5, train_batch_size=8)
    main(args)
    loss = saved_numbers(tmp_path / "out")["train_loss"]

    run = TrainingRun(arguments(folder, tmp_path / "again", max_train_steps=1, train_batch_size=8))
    loaded = load_embeddings(folder / "embeddings")
    order = np.argsort(np.random.PCG64(0).random_raw(40), kind="stable")[4:]  # 0.1 are held out
    train = loaded["image_embeds"][order].double()
    pipe = UnCLIPPriorPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(pipe.prior.clip_mean[0].double(), train.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pipe.prior.clip_std[0].double(), train.std(0), rtol=1e-5, atol=1e-6)
    # the network before its first step: the same seed makes it
    torch.manual_seed(0)
    config = PriorTransformer.load_config(folder / "config")
    prior = PriorTransformer.from_config(config, embedding_dim=16, num_embeddings=16)
    init_prior(prior, train.float())
    initial = {name: value.clone() for name, value in prior.state_dict().items()}
    run.prepare({"prior": prior}, EmbeddingDataset([{k: v for k, v in loaded.items() if k != "meta"}], order))
    batch = next(iter(run.batches()))
    timesteps = run.randint(1000)
    x_0 = (batch["image_embeds"].double() - train.mean(0)) / train.std(0)
    noise = run.randn_like(x_0.float()).double()
    dropped = run.randint(2**20) < 2**19
    assert 0 < dropped.sum() < 8
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    betas = torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)], dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)[timesteps][:, None]
    noisy = alphas_cumprod.sqrt() * x_0 + (1 - alphas_cumprod).sqrt() * noise
    captions = pipe.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    embeds, hidden_states, mask = pipe.encode_prompt(captions)
    prior.load_state_dict(initial)
    with torch.no_grad():
        predicted = prior.double()(noisy, timesteps, embeds.double(), hidden_states.double(), mask)
    error = (predicted.predicted_image_embedding - x_0).square().mean()
    assert loss == pytest.approx(error.item(), rel=1e-4)


def test_captions_are_dropped_whole(folder, tmp_path):
    """With all of them dropped, nothing that was said reaches the weights; without, it does."""
    other = captioned_images(tmp_path / "images", 40, text=["something else"] * 40)
    precompute.main(precompute_arguments(str(folder / "clip"), other, tmp_path / "other", shard_size=15))
    theirs = load_embeddings(tmp_path / "other")
    assert torch.equal(theirs["image_embeds"], load_embeddings(folder / "embeddings")["image_embeds"])
    for share, is_equal in ((1.0, True), (0.0, False)):
        runs = []
        for source in (folder / "embeddings", tmp_path / "other"):
            out = tmp_path / f"{share}-{source.name}"
            main(arguments(folder, out, embeddings_dir=str(source), text_drop_prob=share, max_train_steps=3))
            runs.append(weights(out)["proj_to_clip_embeddings.weight"])
        assert torch.equal(*runs) == is_equal


def test_cached_hidden_states_change_nothing(folder, tmp_path):
    for name in ("embeddings", "cached"):
        main(arguments(folder, tmp_path / name, embeddings_dir=str(folder / name), validation_steps=2))
    ours, theirs = saved_numbers(tmp_path / "embeddings"), saved_numbers(tmp_path / "cached")
    assert ours.keys() == theirs.keys()
    for name in ("train_loss", "validation_loss", "validation_cos_text"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"dataloader_num_workers": 1},
    ],
)
def test_accumulation_precision_and_workers(changes, folder, tmp_path):
    main(arguments(folder, tmp_path / "plain"))
    main(arguments(folder, tmp_path / "changed", **changes))
    plain, changed = (saved_numbers(tmp_path / name)["train_loss"] for name in ("plain", "changed"))
    assert changed == pytest.approx(plain, rel=2e-2 if "mixed_precision" in changes else 1e-6)
    assert torch.tensor(changed).bfloat16().item() != changed  # the loss itself is float32
    assert {value.dtype for value in weights(tmp_path / "changed").values()} == {torch.float32}


def test_mixed_precision_computes_the_loss_in_float32(folder, tmp_path, monkeypatch):
    seen = []
    optimize = TrainingRun.optimize

    def spy(self, loss, *, per_sample_loss, **options):
        seen.append((loss.dtype, per_sample_loss.dtype))
        return optimize(self, loss, per_sample_loss=per_sample_loss, **options)

    def linear(*args):
        result = original(*args)
        seen.append(result.dtype)
        return result

    original = torch.nn.functional.linear
    monkeypatch.setattr(TrainingRun, "optimize", spy)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    main(arguments(folder, tmp_path / "out", mixed_precision="bf16", max_train_steps=1))
    assert seen.count((torch.float32, torch.float32)) == 1
    step = seen[: seen.index((torch.float32, torch.float32))]
    assert step.count(torch.bfloat16) > 10 and torch.float32 in step  # the network; the empty caption before the loop


def test_it_learns_what_captions_say(folder, tmp_path):
    """With the caption the prediction is better than without, and better than at the start."""
    options = {"train_batch_size": 32, "text_drop_prob": 0.1, "validation_fraction": 10, "num_inference_steps": 10}
    main(arguments(folder, tmp_path / "out", max_train_steps=150, validation_steps=150, learning_rate=3e-3, **options))
    numbers = saved_numbers(tmp_path / "out")
    assert numbers["validation_loss"] < 0.8 * numbers["validation_loss_without_text"]
    assert numbers["validation_cos_true"] > numbers["validation_cos_shuffled"] + 0.02


# --- Validation


def test_validation_numbers_are_those_of_the_saved_prior(folder, tmp_path):
    """From averaged weights, whatever the batch size; the labels are the pictures' colors."""
    args = arguments(
        folder, tmp_path / "out", validation_steps=2, use_ema=True, ema_decay=0.5, validation_fraction=0.5
    )
    main(args)
    numbers = {
        name.removeprefix("validation_"): value
        for name, value in saved_numbers(args.output_dir).items()
        if name.startswith("validation_")
    }
    for name in ("cos_true", "cos_text", "cos_shuffled", "frechet", "zero_shot_accuracy"):
        for suffix in ("", "_text", "_text_gap", "_linear"):
            assert f"{name}{suffix}" in numbers
    assert {"frechet_true", "loss_t0-249", "loss_t750-999", "diversity", "diversity_true"} <= numbers.keys()
    pipe = UnCLIPPriorPipeline.from_pretrained(args.output_dir)
    pipe.set_progress_bar_config(disable=True)
    loaded = load_embeddings(folder / "embeddings")
    order = np.argsort(np.random.PCG64(0).random_raw(40), kind="stable")
    train, pairs = ({k: v[rows] for k, v in loaded.items() if k != "meta"} for rows in (order[20:], order[:20]))
    for batch_size in (20, 7):
        again = evaluate(
            pipe, pairs, train, class_names=loaded["meta"]["label_names"], zero_shot_template="a {}",
            num_inference_steps=3, batch_size=batch_size,
        )  # fmt: skip
        assert again == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    # half of the pictures, those whose caption names the color
    named = sum("picture" not in text for text in pipe.tokenizer.batch_decode(pairs["input_ids"]))
    accuracy = numbers["zero_shot_accuracy_text"]
    assert 5 < named < 20 and accuracy == pytest.approx(round(accuracy * named) / named)
    assert accuracy == 1  # "a red" is the prompt itself


def test_names_of_classes_are_words(folder, base):
    """With `_` for a space, in captions as in prompts; other braces in a prompt are left as they are."""
    pipe = UnCLIPPriorPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pairs = {k: v for k, v in load_embeddings(folder / "embeddings").items() if k != "meta"}
    names = ["a_blue", "a_green", "a_red"]
    values = evaluate(pipe, pairs, pairs, class_names=names, zero_shot_template="{}", num_inference_steps=1)
    assert values["zero_shot_accuracy_text"] == 1  # the caption is the prompt, and others are not counted
    prompts = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt: prompts.append(prompt) or encode(prompt)
    evaluate(pipe, pairs, pairs, class_names=names, zero_shot_template="{} {x}", num_inference_steps=1)
    assert prompts == ["", ["a blue {x}", "a green {x}", "a red {x}"]]


def test_the_loss_of_validations_is_the_mean_over_timesteps(folder, base):
    pipe = UnCLIPPriorPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    loaded = load_embeddings(folder / "embeddings")
    pairs = {k: v for k, v in loaded.items() if k != "meta"}
    values = evaluate(pipe, pairs, pairs, num_inference_steps=2, seed=3)
    bands = [values[f"loss_t{250 * i}-{250 * i + 249}"] for i in range(4)]
    assert values["loss"] == pytest.approx(np.mean(bands))
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(40, 2, 16, generator=generator), torch.randn(40, 16, generator=generator)
    level = pipe.scheduler.alphas_cumprod[torch.arange(40) * 25][:, None]
    x_0 = (pairs["image_embeds"] - pipe.prior.clip_mean) / pipe.prior.clip_std
    embeds, hidden_states, mask = text_inputs(pipe.text_encoder, pairs)
    with torch.no_grad():
        predicted = pipe.prior(
            level.sqrt() * x_0 + (1 - level).sqrt() * noise, torch.arange(40) * 25, embeds, hidden_states, mask
        ).predicted_image_embedding
    assert values["loss"] == pytest.approx((predicted - x_0).square().mean().item(), rel=1e-4)
    drawn = pipe(
        prompt_embeds=embeds, prompt_hidden_states=hidden_states, prompt_mask=mask, latents=latents.flatten(0, 1),
        num_inference_steps=2, rerank=None,
    )  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(drawn.image_embeds, pairs["image_embeds"]).mean().item()
    assert values["cos_true"] == pytest.approx(cosine, abs=1e-5)


def test_the_pipeline_embeds_images_as_they_were_trained_on(folder, base, tmp_path):
    """The embeddings of the cache are those of `encode_image`, but for the rounding of resized pixels."""
    images = [Image.open(path).resize((32, 32)) for path in sorted((folder / "images").glob("*.png"))]
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": f"{i}"}) for i in range(len(images))]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    precompute.main(precompute_arguments(str(folder / "clip"), str(tmp_path / "images"), tmp_path / "out"))
    pipe, loaded = UnCLIPPriorPipeline.from_pretrained(base), load_embeddings(tmp_path / "out")
    texts = pipe.tokenizer.batch_decode(loaded["input_ids"], skip_special_tokens=True)
    order = [int(text.replace(" ", "")) for text in texts]  # CLIP reads digit by digit
    embeds = pipe.encode_image(images)[order]
    difference = (embeds - loaded["image_embeds"]).norm(dim=1).max()
    assert difference < 0.05 * torch.cdist(embeds, embeds).median()


# --- Resume, average, processes


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_resumed_run_is_the_uninterrupted_one(lora_rank, folder, base, tmp_path):
    options = {"max_train_steps": 6, "use_ema": True, "checkpointing_steps": 3, "validation_steps": 2}
    if lora_rank:
        options |= {"lora_rank": lora_rank, "pretrained_model_name_or_path": base}
    main(arguments(folder, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    main(arguments(folder, tmp_path / "resumed", resume_from_checkpoint="latest", **options))
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        ours = safetensors.torch.load_file(path)
        assert_equal(ours, safetensors.torch.load_file(tmp_path / "resumed" / path.relative_to(tmp_path / "whole")))
    assert saved_numbers(tmp_path / "whole") == saved_numbers(tmp_path / "resumed")
    if lora_rank:  # the prior's own weights are in no checkpoint
        checkpoint = tmp_path / "whole" / "checkpoint-6"
        assert max(path.stat().st_size for path in checkpoint.rglob("*")) < 60_000
        assert all("lora" in name for name in safetensors.torch.load_file(checkpoint / "prior_ema" / LORA))


def test_a_run_is_not_resumed_with_other_embeddings(folder, tmp_path):
    options = {"checkpointing_steps": 1, "embeddings_dir": str(tmp_path / "embeddings")}
    shutil.copytree(folder / "embeddings", tmp_path / "embeddings")
    main(arguments(folder, tmp_path / "out", max_train_steps=1, **options))
    shutil.rmtree(tmp_path / "embeddings")
    images = captioned_images(tmp_path / "images", 40, seed=1)
    precompute.main(precompute_arguments(str(folder / "clip"), images, tmp_path / "embeddings", shard_size=15))
    with pytest.raises(ValueError, match=r"is of another run \(`inputs_sha256`"):
        main(arguments(folder, tmp_path / "out", resume_from_checkpoint="latest", **options))


def test_the_average_keeps_the_statistics(folder, tmp_path):
    main(arguments(folder, tmp_path / "out", use_ema=True, ema_decay=0.5, checkpointing_steps=2, max_train_steps=4))
    final, first = weights(tmp_path / "out"), tmp_path / "out" / "checkpoint-2"
    raw, average = (PriorTransformer.from_pretrained(first / name).state_dict() for name in ("prior", "prior_ema"))
    for name in ("clip_mean", "clip_std"):
        assert (
            torch.equal(raw[name], average[name]) and torch.equal(raw[name], final[name]) and (final[name] != 0).all()
        )
    assert not torch.equal(raw["proj_in.weight"], average["proj_in.weight"])


WORKER = """
import sys, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed import fsdp
from diffusers_ext.training import train_unclip_prior as script
torch.set_num_threads(1)
runs = []
class Recorded(script.TrainingRun):
    def __init__(self, args):
        super().__init__(args)
        runs.append(self)
script.TrainingRun = Recorded
folder, base, rank, out = sys.argv[1:]
tiny = dict(prior_config_name_or_path=f"{folder}/config")
if int(rank):
    tiny = dict(pretrained_model_name_or_path=base, lora_rank=int(rank))
def train(out):
    script.main(script.UnCLIPPriorArguments(
        embeddings_dir=f"{folder}/embeddings", output_dir=out, train_batch_size=2, max_train_steps=3,
        learning_rate=1e-3, validation_steps=3, checkpointing_steps=0, num_inference_steps=2, report_to="none",
        use_ema=True, **tiny,
    ))
end = Accelerator.end_training
Accelerator.end_training = lambda self: None  # a second run follows
train(out)
(run,) = runs
assert run.accelerator.num_processes == 2
state = run.models["prior"].state_dict() | {f"ema.{i}": v for i, v in enumerate(run.ema.shadow_params)}
torch.save(state, f"{out}-{run.accelerator.process_index}.pt")

# FSDP, which accelerate turns on for GPUs only: here its state is set by hand, the rest is the real thing
def initialize(self, *args, **kwargs):
    PartialState._shared_state["distributed_type"] = kind
    original(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
if hasattr(fsdp, "CPUOffloadPolicy"):  # version 2, from torch 2.6 on
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    original, kind = Accelerator.__init__, PartialState._shared_state["distributed_type"]
    Accelerator.__init__ = initialize
    train(out + "-sharded")
    assert hasattr(next(runs[-1].model.parameters()), "full_tensor")
end(runs[-1].accelerator)
"""


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_processes(lora_rank, folder, base, tmp_path):
    """Two gloo processes end with the same weights, those of one process with the same images per step; FSDP too."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(folder), base, str(lora_rank), str(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    states = [torch.load(f"{tmp_path / 'two'}-{rank}.pt") for rank in range(2)]
    assert_equal(*states)
    options = {"pretrained_model_name_or_path": base, "lora_rank": lora_rank} if lora_rank else {}
    options |= {"max_train_steps": 3, "use_ema": True, "validation_steps": 3, "num_inference_steps": 2}
    main(arguments(folder, tmp_path / "one", **options))
    numbers = saved_numbers(tmp_path / "one")
    for other in filter(Path.is_dir, (tmp_path / "two", tmp_path / "two-sharded")):
        if lora_rank:
            ours, theirs = (safetensors.torch.load_file(path / LORA) for path in (tmp_path / "one", other))
        else:
            ours, theirs = weights(tmp_path / "one"), weights(other)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=2e-5)
        for name in ("train_loss", "validation_loss"):
            assert saved_numbers(other)[name] == pytest.approx(numbers[name], rel=1e-4)


# --- Other priors, adapters


def test_fine_tuning_starts_from_the_pretrained_prior(folder, base, tmp_path):
    """Its weights, and its own statistics even where the new pictures have others."""
    images = captioned_images(tmp_path / "images", 20, seed=5)
    precompute.main(precompute_arguments(str(folder / "clip"), images, tmp_path / "embeddings"))
    options = {"pretrained_model_name_or_path": base, "embeddings_dir": str(tmp_path / "embeddings")}
    main(arguments(folder, tmp_path / "out", learning_rate=1e-9, **options))
    before, after = weights(base), weights(tmp_path / "out")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert torch.equal(after["clip_std"], before["clip_std"])
    main(arguments(folder, tmp_path / "more", **options))
    assert (weights(tmp_path / "more")["proj_in.weight"] - before["proj_in.weight"]).abs().max() > 1e-4


LORA = "pytorch_lora_weights.safetensors"


def test_lora_trains_and_saves_the_adapter_alone(folder, base, tmp_path, monkeypatch):
    trained = []
    finish = TrainingRun.finish
    monkeypatch.setattr(
        TrainingRun, "finish", lambda self, *args, **options: trained.append(self) or finish(self, *args, **options)
    )
    before = {path: path.read_bytes() for path in Path(base).rglob("*.safetensors")}
    args = arguments(
        folder, tmp_path / "lora", pretrained_model_name_or_path=base, lora_rank=3, max_train_steps=5,
        validation_steps=5, learning_rate=1e-2, validation_fraction=0.5,
    )  # fmt: skip
    main(args)
    assert {path: path.read_bytes() for path in Path(base).rglob("*.safetensors")} == before
    saved = safetensors.torch.load_file(tmp_path / "lora" / LORA)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        LORA, "README.md", "training_arguments.json", "training_metrics.json",
    }  # fmt: skip
    names = {f"transformer_blocks.0.attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert saved.keys() == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {3}

    # in memory too, nothing but the adapter has changed
    (run,) = trained
    state = run.models["prior"].prior.state_dict()
    own = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    assert_equal(own, weights(base))

    # it loads through the pipeline, to what was trained and validated
    pipe = UnCLIPPriorPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    pipe.prior.load_lora_adapter(str(tmp_path / "lora"), prefix=None, weight_name=LORA)
    adapted = pipe("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    assert (adapted - plain).abs().max() > 1e-3
    ours = UnCLIPPriorPipeline.from_pretrained(base, prior=run.models["prior"].prior.eval())
    ours.set_progress_bar_config(disable=True)
    expected = ours("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    assert torch.equal(adapted, expected)
    loaded = load_embeddings(folder / "embeddings")
    order = np.argsort(np.random.PCG64(0).random_raw(40), kind="stable")
    train, pairs = ({k: v[rows] for k, v in loaded.items() if k != "meta"} for rows in (order[20:], order[:20]))
    again = evaluate(pipe, pairs, train, num_inference_steps=3)
    numbers = saved_numbers(tmp_path / "lora")
    for name in ("loss", "cos_true", "frechet"):
        assert numbers[f"validation_{name}"] == pytest.approx(again[name], rel=1e-4)
    pipe.prior.disable_lora()
    disabled = pipe("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    assert torch.equal(disabled, plain)
    pipe.prior.unload_lora()
    assert_equal(pipe.prior.state_dict(), weights(base))
    removed = pipe("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    assert torch.equal(removed, plain)

    # W + B A, by hand
    merged = UnCLIPPriorPipeline.from_pretrained(base)
    merged.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name in names:
            weight = merged.prior.get_submodule(name).weight
            weight += saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    by_hand = merged("a red", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    torch.testing.assert_close(adapted, by_hand, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f'weight_name="{LORA}"' in card and "| LoRA rank | 3 |" in card
    assert {"lora", "unclip"} <= set(ModelCard(card).data.tags)


def test_a_clip_with_texts_of_another_width(folder, tmp_path):
    """Then the prior is the subclass, which the pipeline finds again; it is fine-tuned too."""
    clip = tiny_clip(tmp_path / "clip", text_width=12)
    precompute.main(precompute_arguments(clip, str(folder / "images"), tmp_path / "embeddings"))
    args = arguments(folder, tmp_path / "out", embeddings_dir=str(tmp_path / "embeddings"), validation_steps=2)
    main(args)
    pipe = UnCLIPPriorPipeline.from_pretrained(args.output_dir)
    assert type(pipe.prior).__name__ == "UnCLIPPriorTransformer" and pipe.prior.config.encoder_hid_dim == 12
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler and pipe.image_encoder is not None
    options = {"pretrained_model_name_or_path": args.output_dir, "learning_rate": 1e-9}
    main(arguments(folder, tmp_path / "more", embeddings_dir=args.embeddings_dir, **options))
    before, after = (weights(path, UnCLIPPriorTransformer) for path in (args.output_dir, tmp_path / "more"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_embeddings_of_unit_length(folder, tmp_path):
    main(arguments(folder, tmp_path / "l2", embed_norm="l2", embed_scale=3.0, validation_steps=2))
    pipe = UnCLIPPriorPipeline.from_pretrained(tmp_path / "l2")
    assert pipe.config.embed_norm == "l2"
    torch.testing.assert_close(pipe.prior.clip_std, torch.full((1, 16), 1 / 3))
    assert (pipe.prior.clip_mean == 0).all()
    # the error of predicting zeros, where the network starts: 9 / 16
    assert saved_numbers(tmp_path / "l2")["train_loss"] == pytest.approx(9 / 16, abs=0.5)
    main(arguments(folder, tmp_path / "more", pretrained_model_name_or_path=str(tmp_path / "l2")))
    assert UnCLIPPriorPipeline.from_pretrained(tmp_path / "more").config.embed_norm == "l2"


def test_rows_of_shards(folder):
    loaded = load_embeddings(folder / "embeddings")
    _, shards = precompute.open_embeddings(folder / "embeddings")
    assert [len(shard["labels"]) for shard in shards] == [15, 15, 10]
    dataset = EmbeddingDataset(shards, [39, 0, 14, 15, 30])
    first = dataset.first(4, ("labels", "image_embeds", "text_hidden_states"))
    assert first.keys() == {"labels", "image_embeds"}
    assert torch.equal(first["image_embeds"], loaded["image_embeds"][[39, 0, 14, 15]])
    for place, row in enumerate([39, 0, 14, 15, 30]):
        assert torch.equal(dataset[place]["input_ids"], loaded["input_ids"][row])
    item = dataset[0]
    item["image_embeds"].zero_()
    assert torch.equal(dataset[0]["image_embeds"], loaded["image_embeds"][39])
    assert len(EmbeddingDataset(shards)) == 40 and default_prior_config(768)["num_layers"] == 20


# --- Hub, refusals


FROM_THE_CARD = f"""
import re, runpy, sys
from huggingface_hub import hf_hub_download
runpy.run_path({str(ROOT / "training" / "train_unclip_prior.py")!r}, run_name="__main__")
with open(hf_hub_download("alice/adapter", "README.md")) as file:
    exec(re.search(r"```py\\n(.*?)```", file.read(), re.S)[1])
print(tuple(image_embeds.shape), any(".lora_" in name for name in pipe.prior.state_dict()))
"""


def test_command_line_and_hub(folder, tmp_path):
    shutil.copytree(folder / "embeddings", tmp_path / "embeddings")
    index = json.loads((tmp_path / "embeddings" / "embeddings.json").read_text())
    index["source"]["dataset_name"] = "alice/pairs"
    (tmp_path / "embeddings" / "embeddings.json").write_text(json.dumps(index))
    flags = f"""--embeddings_dir {tmp_path / "embeddings"} --prior_config_name_or_path {folder / "config"}
        --train_batch_size 8 --max_train_steps 2 --num_validation_images 4 --num_inference_steps 2 --report_to none
        --use_ema --output_dir {tmp_path / "prior"} --push_to_hub --hub_model_id alice/prior
        --hub_token hf_alice_write""".split()
    with HubServer() as hub:
        env = hub.env(tmp_path / "home", token=None)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        script = [sys.executable, str(ROOT / "training" / "train_unclip_prior.py"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        files = hub.files("alice/prior")
        # an adapter for it, which is used as its card says
        options = {"lora_rank": 2, "pretrained_model_name_or_path": "alice/prior", "max_train_steps": 1}
        options |= {"output_dir": tmp_path / "adapter", "hub_model_id": "alice/adapter", "push_to_hub": ""}
        options |= {"embeddings_dir": tmp_path / "embeddings", "report_to": "none", "hub_token": "hf_alice_write"}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_CARD, *flags], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("(1, 16) True\n")
        assert hub.files("alice/adapter").keys() - {".gitattributes"} == {
            LORA, "README.md", "training_arguments.json", "training_metrics.json",
        }  # fmt: skip
        data = ModelCard(hub.files("alice/adapter")["README.md"].decode()).data
        assert data.base_model == "alice/prior" and data.datasets == ["alice/pairs"]
        assert data.base_model_relation == "adapter"
    assert {"model_index.json", "README.md", "training_metrics.json", "prior/config.json"} <= files.keys()
    assert {"tokenizer", "text_encoder", "image_encoder", "scheduler"} <= {name.split("/")[0] for name in files}
    assert not any("embeddings" in name or b"hf_alice_write" in content for name, content in files.items())
    for name, content in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(content)
    assert_equal(weights(tmp_path / "repo"), weights(tmp_path / "prior"))
    card = files["README.md"].decode()
    assert 'from_pretrained("alice/prior")' in card and "Fréchet distance to true embeddings" in card
    assert "| CLIP | clip |" in card and str(folder) not in card
    assert UnCLIPPriorPipeline.from_pretrained(tmp_path / "repo").config.clip_model_id == "clip"


def test_embeddings_clips_and_priors_that_do_not_fit(folder, base, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            main(arguments(folder, tmp_path / "out", **changes))

    other = tiny_clip(tmp_path / "other", seed=1)
    small = captioned_images(tmp_path / "small", 4)
    precompute.main(precompute_arguments(other, small, tmp_path / "of-other"))
    refused("has another text encoder: pass the one", pretrained_clip_model_name_or_path=other)
    refused(
        "`validation_embeddings_dir` was made with another clip", validation_embeddings_dir=str(tmp_path / "of-other")
    )
    refused("are of the same images: make the former", validation_embeddings_dir=str(folder / "cached"))
    refused("`validation_fraction` is 40, but must be a share below 1", validation_fraction=40)
    refused("the configuration of a model of another library", prior_config_name_or_path=str(folder / "clip"))
    refused("one pair is held out, but a distribution needs two", validation_fraction=1, validation_steps=1)
    # of another CLIP of the same size, or without statistics
    shutil.copytree(base, tmp_path / "base")
    prior = PriorTransformer.from_pretrained(base, subfolder="prior")
    another = "it was trained with another CLIP"
    std = prior.clip_std.clone()
    for factor, message in ((0.1, another), (10, another), (0, "has no statistics")):
        with torch.no_grad():
            prior.clip_std.copy_(factor * std)
        prior.save_pretrained(tmp_path / "base" / "prior")
        refused(message, pretrained_model_name_or_path=str(tmp_path / "base"))
    wide = tiny_clip(tmp_path / "wide", text_width=12)
    precompute.main(precompute_arguments(wide, small, tmp_path / "of-wide"))
    refused(
        "`text_encoder` gives hidden states of width 12, but `prior` takes 16",
        embeddings_dir=str(tmp_path / "of-wide"),
        pretrained_model_name_or_path=base,
    )
    refused("`output_dir` is .*/out', the folder of `pretr", pretrained_model_name_or_path=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "training" / "train_unclip_prior.py")
    flags = ["--embeddings_dir", str(tmp_path), "--max_train_steps", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *flags, "--report_to", "none"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    error = f"error: `{tmp_path}` has no `embeddings.json`: make the embeddings with"
    assert capsys.readouterr().err.splitlines()[-1].startswith(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings_dir": None}, "`embeddings_dir` is missing: make embeddings"),
        ({"train_data_dir": "x"}, "`train_data_dir` is 'x', but the prior is trained on embeddings"),
        ({"random_flip": True}, "`random_flip` is True, but the prior is trained on embeddings"),
        ({"validation_fraction": -0.5}, "`validation_fraction` is -0.5, but must be a share"),
        ({"validation_fraction": 5.5}, "`validation_fraction` is 5.5, but must be a share"),
        (
            {"validation_fraction": 0.5, "validation_embeddings_dir": "x"},
            "`validation_fraction` is 0.5, but `validation_embeddings_dir` is given too",
        ),
        (
            {"num_validation_images": 1, "validation_steps": 1},
            "`num_validation_images` is 1, but a distribution needs at least 2",
        ),
        ({"dataset_name": "digits"}, "`dataset_name` is 'digits', but the prior is trained on embeddings"),
        ({"lora_rank": 4}, "`lora_rank` is 4, but an adapter needs a prior"),
        ({"lora_rank": 0, "pretrained_model_name_or_path": "x"}, "`lora_rank` is 0, but must be at least 1"),
        (
            {"embed_norm": "l2", "pretrained_model_name_or_path": "x"},
            "`embed_norm` and `pretrained_model_name_or_path`",
        ),
        ({"embed_scale": 4.0}, "`embed_scale` is 4.0, but belongs to `--embed_norm l2`"),
        ({"text_drop_prob": 1.5}, r"`text_drop_prob` is 1.5, but must lie in \[0, 1\]"),
        ({"zero_shot_template": "a photo"}, "`zero_shot_template` is 'a photo', but must have `{}`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be from 1"),
    ],
)
def test_arguments_that_do_not_do(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(folder, tmp_path / "out", **changes)
