"""training/precompute_clip_embeddings.py: the numbers, what a killed run leaves, and what is refused.

The CLIPs are transformers' own classes at tiny sizes with random weights; `tiny_clip` and `captioned_images` serve the
tests of the training too.
"""

import doctest
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

import diffusers_ext.training.precompute_clip_embeddings as precompute
from diffusers_ext.training.precompute_clip_embeddings import (
    PrecomputeArguments,
    load_clip,
    load_embeddings,
    main,
    model_sha256,
    open_embeddings,
    tokenizer_sha256,
)
from diffusers_ext.training.train_toy_clip import byte_tokenizer

ROOT = Path(__file__).parents[1]
COLORS = ("red", "green", "blue")
NUM_TOKENS = 16


def tiny_clip(folder, *, text_width=16, dim=16, seed=0, text_config=None):
    """A CLIP for 8 x 8 pixels and 16 tokens, whose embeddings have about unit length."""
    tokenizer = byte_tokenizer(model_max_length=NUM_TOKENS)
    torch.manual_seed(seed)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=2 * text_width, projection_dim=dim,
        max_position_embeddings=NUM_TOKENS, bos_token_id=tokenizer.bos_token_id, pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=32, image_size=8, patch_size=4, projection_dim=dim)
    text, vision = text | sizes | (text_config or {}), vision | sizes
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    model = CLIPModel(config)
    with torch.no_grad():  # the initial ones hardly depend on the input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def captioned_images(folder, count=10, seed=0, **columns):
    """Noisy one-colored pictures with captions that name the color in two out of three cases."""
    folder.mkdir(parents=True)
    generator, rows = np.random.default_rng(seed), []
    for i in range(count):
        pixels = generator.integers(0, 100, (12, 9, 3))
        pixels[..., i % 3] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        color = COLORS[i % 3]
        text = "a picture" if i % 3 == 2 - i // 3 % 3 else f"a {color}"
        row = {"file_name": f"{i:03d}.png", "text": text, "label": color}
        rows.append(json.dumps(row | {name: value[i] for name, value in columns.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder)


def arguments(clip, images, output_dir, **changes):
    defaults = dict(
        pretrained_clip_model_name_or_path=clip, train_data_dir=images, output_dir=str(output_dir),
        validation_fraction=0, batch_size=4, shard_size=4,
    )  # fmt: skip
    return PrecomputeArguments(**(defaults | changes))


@pytest.fixture
def clip(tmp_path):
    return tiny_clip(tmp_path / "clip")


@pytest.fixture
def images(tmp_path):
    return captioned_images(tmp_path / "images")


@pytest.fixture
def embeddings(clip, images, tmp_path):
    main(arguments(clip, images, tmp_path / "embeddings"))
    return tmp_path / "embeddings"


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- Numbers


def test_embeddings_are_those_of_the_whole_clip(clip, images, embeddings):
    """Against `CLIPModel` on pictures that are cropped, resized and normalized here."""
    loaded = load_embeddings(embeddings)
    rows = [json.loads(line) for line in (Path(images) / "metadata.jsonl").read_text().splitlines()]
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    pixels = []
    for row in rows:
        image = Image.open(Path(images) / row["file_name"])  # 9 x 12 pixels
        image = image.resize((8, 8), Image.Resampling.BICUBIC, box=(0, 1, 9, 10))
        pixels.append(np.asarray(image, np.float32) / 255)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor((np.stack(pixels) - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    tokens = tokenizer([row["text"] for row in rows], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
        raw_image = model.visual_projection(model.vision_model(pixels).pooler_output)
        raw_text = model.text_projection(model.text_model(tokens.input_ids).pooler_output)
    torch.testing.assert_close(torch.nn.functional.normalize(raw_image), expected.image_embeds)

    captions = tokenizer.batch_decode(loaded["input_ids"], skip_special_tokens=True)
    order = []  # of the rows in the folder; the same caption may stand with several
    for i in range(10):
        same = [r for r in range(10) if torch.allclose(raw_image[r], loaded["image_embeds"][i], atol=2e-5)]
        assert len(same) == 1
        order += same
    assert sorted(order) == list(range(10))
    torch.testing.assert_close(loaded["image_embeds"], raw_image[order], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(loaded["text_embeds"], raw_text[order], rtol=1e-4, atol=2e-5)
    assert captions == [rows[r]["text"] for r in order]
    torch.testing.assert_close(loaded["input_ids"], tokens.input_ids[order].int())
    torch.testing.assert_close(loaded["attention_mask"], tokens.attention_mask[order].bool())
    names = loaded["meta"]["label_names"]
    assert names == ["blue", "green", "red"]
    assert [names[label] for label in loaded["labels"]] == [rows[r]["label"] for r in order]
    assert (loaded["text_embeds"][0] - loaded["text_embeds"][1:]).abs().amax(1).max() > 0.1

    meta = loaded["meta"]
    assert meta["count"] == 10 and meta["dim"] == 16
    assert [(s["file"], s["count"]) for s in meta["shards"]] == [
        ("embeddings-00000.safetensors", 4), ("embeddings-00001.safetensors", 4), ("embeddings-00002.safetensors", 2),
    ]  # fmt: skip
    np.testing.assert_allclose(meta["mean"], loaded["image_embeds"].double().mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(meta["std"], loaded["image_embeds"].double().std(0, correction=0), rtol=0, atol=1e-12)


def test_hidden_states_and_half_precision(clip, images, embeddings, tmp_path):
    main(
        arguments(clip, images, tmp_path / "half", cache_hidden_states=True, embeddings_dtype="float16", batch_size=3)
    )
    half, whole = load_embeddings(tmp_path / "half"), load_embeddings(embeddings)
    assert half["image_embeds"].dtype == half["text_embeds"].dtype == half["text_hidden_states"].dtype == torch.float16
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(half[name].float(), whole[name], rtol=1e-3, atol=1e-3)
    encoder = CLIPTextModelWithProjection.from_pretrained(clip)
    with torch.no_grad():
        hidden = encoder(whole["input_ids"].long()).last_hidden_state
    torch.testing.assert_close(half["text_hidden_states"].float(), hidden, rtol=2e-3, atol=2e-3)
    assert "text_hidden_states" not in whole


def test_splits_share_no_image(clip, images, tmp_path):
    parts = []
    for split in ("train", "validation"):
        main(arguments(clip, images, tmp_path / split, split=split, validation_fraction=3, label_column="label"))
        parts.append(load_embeddings(tmp_path / split))
    assert [len(part["labels"]) for part in parts] == [7, 3]
    assert torch.cdist(*(part["image_embeds"] for part in parts)).min() > 1e-3


def test_a_pipeline_folder_and_a_data_set_serve_too(clip, images, embeddings, tmp_path):
    """The encoders may lie in the subfolders of a pipeline, the images in a data set."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "pipeline"
    CLIPTextModelWithProjection.from_pretrained(clip).save_pretrained(folder / "text_encoder")
    CLIPVisionModelWithProjection.from_pretrained(clip).save_pretrained(folder / "image_encoder")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "UnCLIPPriorPipeline"}')
    rows = [json.loads(line) for line in (Path(images) / "metadata.jsonl").read_text().splitlines()]
    table = {
        "picture": [str(Path(images) / row["file_name"]) for row in rows],
        "caption": [row["text"] for row in rows],
    }
    datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "set")
    options = {"dataset_name": str(tmp_path / "set"), "train_data_dir": None}
    main(arguments(str(folder), None, tmp_path / "other", **options, image_column="picture", caption_column="caption"))
    whole, other = load_embeddings(embeddings), load_embeddings(tmp_path / "other")
    assert other["meta"]["clip"]["sha256"] == whole["meta"]["clip"]["sha256"]
    for name in ("image_embeds", "text_embeds", "input_ids"):
        torch.testing.assert_close(other[name], whole[name])
    assert "labels" not in other and other["meta"]["source"]["dataset_name"] is None

    # the same captions for other pictures of the same size in bytes
    others = captioned_images(tmp_path / "others", seed=1)
    table["picture"] = [str(Path(others) / row["file_name"]) for row in rows]
    assert Path(table["picture"][0]).stat().st_size == (Path(images) / rows[0]["file_name"]).stat().st_size
    datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "second")
    options["dataset_name"] = str(tmp_path / "second")
    with pytest.raises(ValueError, match="holds embeddings with another `source`"):
        main(arguments(clip, None, tmp_path / "other", **options, image_column="picture", caption_column="caption"))


def test_halves_may_be_configured_with_another_size(clip, tmp_path):
    """As in some published CLIPs, and in `CLIPConfig(projection_dim=...)`: the size of the whole holds."""
    halves = Path(tiny_clip(tmp_path / "halves"))
    config = json.loads((halves / "config.json").read_text())
    for half in ("text_config", "vision_config"):
        config[half]["projection_dim"] = 512
    (halves / "config.json").write_text(json.dumps(config))
    text_encoder, _, image_encoder = load_clip(halves)
    assert text_encoder.config.projection_dim == image_encoder.config.projection_dim == 16
    assert [model_sha256(model) for model in (text_encoder, image_encoder)] == [
        model_sha256(model) for model in load_clip(clip)[::2]
    ]


def test_long_captions_are_cut_with_a_warning(clip, tmp_path, caplog):
    texts = ["a red"] * 5 + ["a picture of something that is red all over"]
    images = captioned_images(tmp_path / "images", 6, text=texts)
    with caplog.at_level(logging.WARNING):
        main(arguments(clip, images, tmp_path / "out"))
    assert "1 of the 4 captions" in caplog.text or "1 of the 2 captions" in caplog.text
    assert "more than the 16 tokens" in caplog.text and "something that is red" in caplog.text
    loaded = load_embeddings(tmp_path / "out")
    assert sum(shard["captions_cut"] for shard in loaded["meta"]["shards"]) == 1
    assert loaded["attention_mask"].sum(1).max() == NUM_TOKENS


def test_hashes_tell_models_and_tokenizers_apart(clip, tmp_path):
    text, tokenizer, image = load_clip(clip)
    again, _, _ = load_clip(clip)
    other, _, _ = load_clip(tiny_clip(tmp_path / "other", seed=1))
    assert model_sha256(text) == model_sha256(again) != model_sha256(other)
    assert model_sha256(text) != model_sha256(image)
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(CLIPTokenizer.from_pretrained(clip))
    assert tokenizer_sha256(tokenizer) != tokenizer_sha256(byte_tokenizer(model_max_length=15))
    assert doctest.testmod(precompute).failed == 0
    assert not any(parameter.requires_grad for parameter in text.parameters()) and not text.training


# --- Resume


def kill(clip, images, output_dir, call):
    """In a process of its own: killed in the given call of `os.replace`, when the file is there but has no name."""
    code = f"""
import os, signal, sys
from diffusers_ext.training.precompute_clip_embeddings import PrecomputeArguments, main
replace, calls = os.replace, []
def killed(source, target):
    calls.append(target)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
main(PrecomputeArguments(
    pretrained_clip_model_name_or_path={clip!r}, train_data_dir={images!r}, output_dir={str(output_dir)!r},
    validation_fraction=0, batch_size=4, shard_size=4,
))
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def test_a_killed_run_goes_on_where_it_was(clip, images, embeddings, tmp_path):
    """Killed while it names the second shard in the index, then while it puts the third shard in its place."""
    folder = tmp_path / "killed"
    kill(clip, images, folder, 4)
    assert (folder / "embeddings-00001.safetensors").is_file()
    index = json.loads((folder / "embeddings.json").read_text())
    assert len(index["shards"]) == 1 and not index["complete"]
    with pytest.raises(ValueError, match="holds 1 shards, but is not complete: run training/precompute_clip"):
        load_embeddings(folder)
    kept = (folder / "embeddings-00000.safetensors").stat().st_mtime_ns
    kill(clip, images, folder, 3)
    assert [path.name for path in folder.glob(".*")] == [".embeddings-00002.safetensors.tmp"]
    main(arguments(clip, images, folder))
    assert (folder / "embeddings-00000.safetensors").stat().st_mtime_ns == kept
    assert files(folder) == files(embeddings)


def test_only_damaged_shards_are_made_anew(clip, images, embeddings, caplog):
    before = files(embeddings)
    times = {path.name: path.stat().st_mtime_ns for path in embeddings.glob("*.safetensors")}
    damaged = embeddings / "embeddings-00001.safetensors"
    for content in (before[damaged.name][:100], before[damaged.name][:-1] + b"\x01", None):
        damaged.unlink() if content is None else damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"embeddings-00001.safetensors` is (missing or damaged|not the file)"):
            load_embeddings(embeddings)
        with caplog.at_level(logging.WARNING):
            main(arguments(clip, images, embeddings))
        assert "embeddings-00001.safetensors is missing or damaged and is made anew" in caplog.text
        assert files(embeddings) == before
    for name in ("embeddings-00000.safetensors", "embeddings-00002.safetensors"):
        assert (embeddings / name).stat().st_mtime_ns == times[name]


def test_a_full_disk_loses_nothing(clip, images, embeddings, monkeypatch):
    before = files(embeddings)
    (embeddings / "embeddings-00002.safetensors").unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"could not be written .* Make room and run the same command again"):
            main(arguments(clip, images, embeddings))
    assert not list(embeddings.glob(".*"))
    main(arguments(clip, images, embeddings))
    assert files(embeddings) == before


# --- What is refused


def test_nothing_is_mixed(clip, images, embeddings, tmp_path):
    """Another CLIP, tokenizer, data set or precision in the same folder; a shard of another CLIP among the others."""
    before = files(embeddings)
    other = tiny_clip(tmp_path / "other", seed=1)
    shorter = tiny_clip(tmp_path / "shorter")
    byte_tokenizer(model_max_length=15).save_pretrained(shorter)
    others = captioned_images(tmp_path / "others", text=["a thing"] * 10)
    repainted = captioned_images(tmp_path / "repainted", seed=1)  # the same names, captions and sizes in bytes
    for args, name in (
        (arguments(other, images, embeddings), "clip"),
        (arguments(shorter, images, embeddings), "tokenizer"),
        (arguments(clip, others, embeddings), "source"),
        (arguments(clip, repainted, embeddings), "source"),
        (arguments(clip, images, embeddings, embeddings_dtype="float16"), "embeddings_dtype"),
        (arguments(clip, images, embeddings, shard_size=5), "shard_size"),
    ):
        with pytest.raises(ValueError, match=rf"holds embeddings with another `{name}` .* they cannot be mixed"):
            main(args)
        assert files(embeddings) == before
    main(arguments(other, images, tmp_path / "foreign"))
    foreign = (tmp_path / "foreign" / "embeddings-00001.safetensors").read_bytes()
    (embeddings / "embeddings-00001.safetensors").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"embeddings-00001.safetensors` is of another clip .* cannot be mixed"):
        load_embeddings(embeddings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value, embeddings):
    path = embeddings / "embeddings-00001.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors["text_embeds"][2, 5] = value
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"row 2 of shard `.*embeddings-00001.safetensors` \(row 6 of all\).*`text_emb"
    ):
        open_embeddings(embeddings)


def test_an_overflow_names_the_image(clip, images, tmp_path):
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight *= 1e6
    model.save_pretrained(clip)
    with pytest.raises(
        ValueError, match=r"`image_embeds` of .*\.png \(row 0 of shard .*choose `--embeddings_dtype flo"
    ):
        main(arguments(clip, images, tmp_path / "out", embeddings_dtype="float16"))
    assert not list((tmp_path / "out").iterdir())


def test_clips_that_do_not_do(clip, images, tmp_path):
    """End of text, length, size, normalization; the first CLIPs' 2 as end of text is right."""
    eos = byte_tokenizer().eos_token_id
    wrong = tiny_clip(tmp_path / "wrong", text_config={"eos_token_id": 5})
    with pytest.raises(ValueError, match=rf"end of text is {eos} in the tokenizer of .*, but 5 in its text encoder"):
        main(arguments(wrong, images, tmp_path / "out"))
    load_clip(tiny_clip(tmp_path / "first", text_config={"eos_token_id": 2}))
    byte_tokenizer(model_max_length=17).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=r"`model_max_length` .* is 17, but the text encoder has 16 positions"):
        load_clip(tmp_path / "first")
    CLIPTextModelWithProjection.from_pretrained(clip).save_pretrained(tmp_path / "half")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="lacks weights of the image encoder"):
        load_clip(tmp_path / "half")
    (Path(clip) / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    with pytest.raises(ValueError, match=r"normalizes images with mean and deviation \[\[0.5, 0.5, 0.5\]"):
        load_clip(clip)
    with pytest.raises(
        ValueError, match=r"there is no CLIP in `.*nowhere`: give the Hub id or the folder of one as `pr"
    ):
        load_clip(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_images_and_arguments_that_do_not_do(clip, images, tmp_path):
    (Path(images) / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="the images have no captions: name their column in `caption_column`"):
        main(arguments(clip, images, tmp_path / "out"))
    with pytest.raises(ValueError, match="exactly one of them is needed"):
        main(arguments(clip, None, tmp_path / "out"))
    for changes, message in (
        ({"shard_size": 0}, "`shard_size` is 0, but must be at least 1"),
        ({"output_dir": None}, "`output_dir` is missing"),
        ({"pretrained_clip_model_name_or_path": None}, "`pretrained_clip_model_name_or_path` is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            PrecomputeArguments(**({"pretrained_clip_model_name_or_path": clip, "output_dir": "out"} | changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"has no `embeddings.json`: make the embeddings"):
        load_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, but this version reads 1"):
        load_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_embeddings(tmp_path)


def test_a_mistake_is_one_line(clip, images, tmp_path, monkeypatch, capsys):
    (Path(images) / "metadata.jsonl").unlink()
    script = str(ROOT / "training" / "precompute_clip_embeddings.py")
    flags = ["--pretrained_clip_model_name_or_path", clip, "--train_data_dir", images, "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the images have no captions: name their column")


def test_command(clip, images, embeddings, tmp_path):
    command = [sys.executable, str(ROOT / "training" / "precompute_clip_embeddings.py"), "--output_dir", "out"]
    command += ["--pretrained_clip_model_name_or_path", clip, "--train_data_dir", images, "--validation_fraction", "0"]
    done = subprocess.run([*command, "--shard_size", "4", "--batch_size", "4"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert files(tmp_path / "out") == files(embeddings)
