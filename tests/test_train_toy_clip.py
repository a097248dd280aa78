"""training/train_toy_clip.py: its images and captions, tokenizer, losses and numbers, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusers_ext.data import load_image_dataset
from diffusers_ext.training.train_toy_clip import (
    COLORS,
    DIGITS,
    SIZES,
    CaptionedDigits,
    ToyCLIPArguments,
    attribute_prompts,
    byte_tokenizer,
    caption,
    default_clip_config,
    evaluate_clip,
    main,
    preprocess,
    render_digits,
)
from diffusers_ext.training_run import TrainingRun

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip(**text):
    config = default_clip_config(byte_tokenizer()).to_dict()
    return CLIPModel(
        CLIPConfig(text_config=config["text_config"] | TINY | text, vision_config=config["vision_config"] | TINY)
    ).eval()


@pytest.fixture
def config_folder(tmp_path):
    tiny_clip().config.save_pretrained(tmp_path / "config")
    return str(tmp_path / "config")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 training and 20 validation images."""
    folder = tmp_path_factory.mktemp("images")
    render_digits(folder, 40)
    render_digits(folder, 20, "validation")
    return folder


def arguments(output_dir, images, **changes):
    defaults = dict(
        image_dir=str(images), num_train_images=40, num_validation_images=20, max_train_steps=2, warm_start_steps=1,
        train_batch_size=4, validation_steps=0, checkpointing_steps=0, report_to="none", output_dir=str(output_dir),
    )  # fmt: skip
    return ToyCLIPArguments(**(defaults | changes))


def saved_numbers(folder):
    return json.loads((Path(folder) / "training_metrics.json").read_text())["metrics"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


# --- Images and captions


def test_images_are_what_their_captions_say(images):
    """Every colored pixel has the hue of the color, and the digit the extent of its size."""
    rows = rows_of(images / "train")
    assert [row["file_name"] for row in rows] == [f"{i:05}.png" for i in range(40)]
    assert {row["size"] for row in rows} == set(SIZES) and {row["color"] for row in rows} == set(COLORS)
    assert {row["digit"] for row in rows} == set(DIGITS)
    for row in rows:
        image = Image.open(images / "train" / row["file_name"])
        assert (image.size, image.mode) == ((32, 32), "RGB")
        pixels = np.asarray(image, np.float64)
        brightest = pixels.reshape(-1, 3)[pixels.sum(2).argmax()]
        assert 0.7 * 255 * 0.9 < brightest.max() <= 255
        nearest = min(
            COLORS, key=lambda name: np.abs(brightest / brightest.max() - np.array(COLORS[name]) / 255).sum()
        )
        assert nearest == row["color"]
        extent = max(np.ptp(places) + 1 for places in pixels.max(2).nonzero())
        assert SIZES[row["size"]] * 0.75 < extent <= SIZES[row["size"]]
        assert row["full_text"] == f"a {row['size']} {row['color']} {row['digit']}"
        words = row["text"].split()
        assert words[0] == "a" and words[-1] in (row["digit"], "digit")
        assert set(words[1:-1]) <= {row["size"], row["color"]}


def test_handwriting_is_drawn_from_the_stated_source():
    """Up to scale and place, an image is one of scikit-learn's digits, with that label."""
    digits = CaptionedDigits(30, "validation")
    table = load_image_dataset("digits", validation_fraction=0)
    for i in range(30):
        pixels, row = digits.render(i)
        ink = pixels.max(2).astype(np.float64)
        side = SIZES[row["size"]]
        windows = np.lib.stride_tricks.sliding_window_view(ink, (side, side))
        first = (32 - side) // 2 - 2
        errors = {}
        for source, label in zip(digits.rows, digits.digits, strict=True):
            assert table.labels[source] == label
            if label == DIGITS.index(row["digit"]):
                picture = Image.fromarray(table.pictures[source]).resize((side, side), Image.Resampling.BILINEAR)
                picture = np.asarray(picture, np.float64) / 255
                places = windows[first : first + 5, first : first + 5]
                scale = places.max() / picture.max()
                errors[source] = np.abs(places - picture * scale).max((2, 3)).min()
        assert min(errors.values()) < 2


def test_images_depend_on_split_seed_and_place_alone(images, tmp_path):
    again = render_digits(tmp_path, 10)
    for path in sorted(again.glob("*.png")):
        assert path.read_bytes() == (images / "train" / path.name).read_bytes()
    assert rows_of(again) == rows_of(images / "train")[:10]
    other, held_out = render_digits(tmp_path / "seed", 10, seed=1), render_digits(tmp_path, 10, "validation")
    assert rows_of(other) != rows_of(again) != rows_of(held_out)
    # recorded: the first captions of seed 0, on any machine
    recorded = ["a small blue two", "a large yellow six", "a large yellow nine"]
    assert [row["full_text"] for row in rows_of(again)[:3]] == recorded
    assert [row["text"] for row in rows_of(again)[:3]] == ["a small digit", "a yellow six", "a large yellow digit"]


def test_splits_share_no_handwriting():
    train, held_out = CaptionedDigits(1), CaptionedDigits(1, "validation", seed=5)
    assert len(train.rows) == 1437 and len(held_out.rows) == 360
    assert sorted([*train.rows, *held_out.rows]) == list(range(1797))
    assert CaptionedDigits(1, seed=7).rows == train.rows, "the seed of the images must not move the split"


def test_attributes_are_mentioned_as_often_as_said():
    rows = [row for _, row in map(CaptionedDigits(3000).render, range(3000))]
    for name in ("digit", "color", "size"):
        share = np.mean([row[name] in row["text"].split() for row in rows])
        assert share == pytest.approx(0.6, abs=0.03)  # 3.4 standard errors
    shares = [np.mean([row[n] == value for row in rows]) for n, value in (("color", "red"), ("size", "small"))]
    assert shares == pytest.approx([1 / 8, 1 / 2], abs=0.03)


def test_an_item_is_the_rendered_image():
    digits = CaptionedDigits(3)
    pixels, row = digits.render(2)
    item = digits[2]
    torch.testing.assert_close((item["images"] + 1) * 127.5, torch.from_numpy(pixels).permute(2, 0, 1).float())
    assert byte_tokenizer().decode(item["input_ids"], skip_special_tokens=True) == row["text"]
    digit, color, size = item["labels"].tolist()
    assert (DIGITS[digit], list(COLORS)[color], list(SIZES)[size]) == (row["digit"], row["color"], row["size"])
    with pytest.raises(IndexError, match="`index` is 3"):
        digits[3]


def test_the_folder_is_an_image_folder(images):
    for split, count in (("train", 40), ("validation", 20)):
        dataset = load_image_dataset(train_data_dir=images, split=split, resolution=32, label_column="color")
        rows = {row["file_name"]: row for row in rows_of(images / split)}
        assert len(dataset) == count and dataset.label_names == sorted(COLORS)
        for i, place in enumerate(dataset.indices):
            row = rows[dataset.pictures[place].name]
            assert dataset[i]["captions"] == row["text"]
            assert dataset.label_names[dataset[i]["labels"]] == row["color"]


def test_rendering_overwrites_nothing(images, tmp_path):
    folder = render_digits(tmp_path, 4)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert render_digits(tmp_path, 4) == folder  # the same once more
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for changes in ({"num_images": 5}, {"num_images": 4, "seed": 1}):
        with pytest.raises(ValueError, match="with other images, or not all of them: choose another, or move it away"):
            render_digits(tmp_path, **changes)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["train"], "a temporary folder is left"
    (folder / "00002.png").unlink()
    with pytest.raises(ValueError, match="or not all of them"):
        render_digits(tmp_path, 4)
    for changes in ({"num_images": 0}, {"num_images": 4, "seed": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            render_digits(tmp_path / "bad", **changes)
    assert not (tmp_path / "bad").exists()


# --- Tokenizer


def test_tokenizer_is_the_same_in_every_process(tmp_path):
    code = (
        "import hashlib, json, sys; from diffusers_ext.training.train_toy_clip import byte_tokenizer;"
        "t = byte_tokenizer(); t.save_pretrained(sys.argv[1]); v = json.dumps(sorted(t.get_vocab().items()));"
        "print(hashlib.sha256(v.encode()).hexdigest(), t('a red three, 三').input_ids)"
    )
    printed, files = [], []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "DIFFUSERS_EXT_NO_DISPATCH": "1"}
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT)
        printed.append(done.stdout.splitlines()[-1])
        files.append((tmp_path / seed / "tokenizer.json").read_bytes())
    assert printed[0] == printed[1] and files[0] == files[1]


def test_tokenizer_knows_every_text():
    tokenizer = byte_tokenizer(model_max_length=77)
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 514
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (512, 513, 513)
    for text in ("a small red three", "naïve 三 🎈", "x" * 60, "!?", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == 512 and ids[-1] == 513 and 513 not in ids[1:-1], text
        symbols = len("".join(text.split()).encode())
        assert len(ids) == symbols + 2, text
    assert len({tuple(tokenizer(name).input_ids) for name in (*DIGITS, *COLORS, *SIZES)}) == 20
    assert len(tokenizer("x" * 100, truncation=True).input_ids) == 77
    longest = max(len(byte_tokenizer()(caption(d, c, s)).input_ids) for d in DIGITS for c in COLORS for s in SIZES)
    assert longest <= byte_tokenizer().model_max_length == 32


def test_the_encoder_pools_at_the_end_token():
    tokenizer, config = byte_tokenizer(), default_clip_config(byte_tokenizer())
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.hidden_size == config.projection_dim  # stock priors need it
    model = CLIPModel(config).eval()
    assert sum(p.numel() for p in model.parameters()) == 478_849
    ids = tokenizer(["a red three"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.text_model(input_ids=ids)
    end = ids[0].tolist().index(513)
    torch.testing.assert_close(output.pooler_output[0], output.last_hidden_state[0, end])


# --- Losses and numbers


def test_preprocessing_is_clips():
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    expected = (images + 1) / 2
    for channel, (mean, std) in enumerate(
        [(0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711)]
    ):
        expected[:, channel] = (expected[:, channel] - mean) / std
    torch.testing.assert_close(preprocess(images), expected)
    torch.testing.assert_close(preprocess(images[0]), expected[0])


def test_prompts_name_one_attribute_each():
    tokenizer = byte_tokenizer()
    texts = tokenizer.batch_decode(attribute_prompts(tokenizer), skip_special_tokens=True)
    assert texts == [f"a {d}" for d in DIGITS] + [f"a {name} digit" for name in (*COLORS, *SIZES)]


def test_the_numbers_are_those_of_a_direct_computation(images):
    model, tokenizer = tiny_clip(), byte_tokenizer()
    values = evaluate_clip(model, tokenizer, images / "train", batch_size=7)
    assert values == pytest.approx(evaluate_clip(model, tokenizer, images / "train"), rel=1e-6)
    rows = rows_of(images / "train")
    normalize = torch.nn.functional.normalize

    def texts(captions):
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1).double()

    pictures = np.stack([np.asarray(Image.open(images / "train" / row["file_name"])) for row in rows])
    pixels = preprocess(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    with torch.no_grad():
        i = normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1).double()
        t = texts([row["text"] for row in rows])
        cosines = i @ t.T
        off = ~torch.eye(40, dtype=torch.bool)
        assert values["cos_text_image"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
        assert values["cos_unpaired"] == pytest.approx(cosines[off].mean().item(), abs=1e-6)
        assert values["modality_gap"] == pytest.approx((i.mean(0) - t.mean(0)).norm().item(), abs=1e-6)
        for name, words in (("digit", DIGITS), ("color", [*COLORS]), ("size", [*SIZES])):
            nearest = (i @ texts([caption(**{name: word}) for word in words]).T).argmax(1)
            right = np.mean([words[n] == row[name] for n, row in zip(nearest.tolist(), rows, strict=True)])
            assert values[f"{name}_accuracy"] == pytest.approx(right), name
    assert not model.training
    with pytest.raises(ValueError, match="`folder` has no .*metadata.jsonl"):
        evaluate_clip(model, tokenizer, images)


def test_the_losses_of_the_two_phases(images, config_folder, tmp_path):
    """First of images and prompts, attribute by attribute, then of the batch's pairs; both ways."""
    options = {"clip_config_name_or_path": config_folder, "max_train_steps": 1, "train_batch_size": 6}
    for warm_start_steps in (1, 0):
        args = arguments(tmp_path / f"clip{warm_start_steps}", images, warm_start_steps=warm_start_steps, **options)
        main(args)
        run = TrainingRun(arguments(tmp_path / "draws", images, **options))
        model = CLIPModel(CLIPConfig.from_pretrained(config_folder))
        torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
        run.prepare({"clip": model}, CaptionedDigits(2**20))
        batch = next(run.batches())
        with torch.no_grad():
            if warm_start_steps:
                texts, expected = attribute_prompts(byte_tokenizer()), 0.0
            else:
                texts = batch["input_ids"]
            embeds = model(input_ids=texts, pixel_values=preprocess(batch["images"]))
            scores = model.logit_scale.exp() * embeds.image_embeds @ embeds.text_embeds.T
        if warm_start_steps:
            for (start, end), label in zip(((0, 10), (10, 18), (18, 20)), batch["labels"].T, strict=True):
                part = scores[:, start:end]
                expected -= part.log_softmax(1)[torch.arange(6), label].mean().item() / 6
                for name in range(end - start):  # a name that fits no image of the batch counts as 0
                    if (label == name).any():
                        expected -= part.log_softmax(0)[label == name, name].mean().item() / (end - start) / 6
        else:
            both = scores.log_softmax(1).diagonal().mean() + scores.log_softmax(0).diagonal().mean()
            expected = -both.item() / 2
        assert saved_numbers(args.output_dir)["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_learns_and_leaves_a_clip(images, tmp_path):
    args = arguments(
        tmp_path / "clip", images, max_train_steps=200, warm_start_steps=120, train_batch_size=32, lr_warmup_steps=10,
        validation_steps=100,
    )  # fmt: skip
    main(args)
    model, tokenizer = CLIPModel.from_pretrained(args.output_dir), CLIPTokenizer.from_pretrained(args.output_dir)
    numbers, values = saved_numbers(args.output_dir), evaluate_clip(model, tokenizer, images / "validation")
    assert {f"validation_{name}" for name in values} == {n for n in numbers if n.startswith("validation")}
    for name, value in values.items():
        assert numbers[f"validation_{name}"] == pytest.approx(value, abs=1e-6), name
    assert values["color_accuracy"] > 0.5 and values["size_accuracy"] > 0.7  # chance: 1/8 and 1/2
    digits = CaptionedDigits(64, "validation", seed=1)
    batch = torch.utils.data.default_collate([digits[i] for i in range(64)])
    untrained, losses = CLIPModel(model.config).eval(), []
    for clip in (untrained, model):
        with torch.no_grad():
            output = clip(batch["input_ids"], preprocess(batch["images"]), return_loss=True)
        losses.append(output.loss.item())
    assert losses[1] < 0.9 * np.log(64) < losses[0]  # what knows nothing of the pairs has log(64)

    # The halves load alone, and give what the whole gives.
    text = CLIPTextModelWithProjection.from_pretrained(args.output_dir)
    vision = CLIPVisionModelWithProjection.from_pretrained(args.output_dir)
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab() and tokenizer.model_max_length == 32
    ids = tokenizer(["a red three", "a digit"], padding="max_length", return_tensors="pt").input_ids
    pixels = preprocess(torch.stack([CaptionedDigits(2)[i]["images"] for i in range(2)]))
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels)
        halves = text(input_ids=ids).text_embeds, vision(pixel_values=pixels).image_embeds
    for one, other in zip((whole.text_embeds, whole.image_embeds), halves, strict=True):
        torch.testing.assert_close(one, torch.nn.functional.normalize(other, dim=-1))

    # The example of the card: two captions, of which one has the wrong color.
    card = (tmp_path / "clip" / "README.md").read_text()
    example = card.split("```py\n")[1].split("```")[0].replace('from_pretrained("clip")', "from_pretrained(folder)")
    picture = images / "train" / "00000.png"  # a small blue two
    found = {"folder": args.output_dir}
    exec(example.replace('"digit.png"', repr(str(picture))), found)
    assert found["probabilities"].shape == (1, 2) and found["probabilities"][0, 1] > 0.5
    pixels = preprocess(CaptionedDigits(1)[0]["images"])[None]
    processed = found["processor"](Image.open(picture), return_tensors="pt").pixel_values
    torch.testing.assert_close(processed, pixels, rtol=0, atol=1e-5)
    assert f"zero-shot accuracy, color | {values['color_accuracy']:.5g}" in card
    assert "| optimizer steps | 200, the first 120 on single attributes |" in card and "None" not in card


def test_resume_is_bit_exact_across_the_phases(images, config_folder, tmp_path):
    options = {
        "clip_config_name_or_path": config_folder, "use_ema": True, "checkpointing_steps": 2, "validation_steps": 2,
        "warm_start_steps": 3, "max_train_steps": 5,
    }  # fmt: skip
    main(arguments(tmp_path / "whole", images, **options))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    main(arguments(tmp_path / "parts", images, resume_from_checkpoint="latest", **options))
    whole, parts = (CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert saved_numbers(tmp_path / "whole") == saved_numbers(tmp_path / "parts")
    with pytest.raises(ValueError, match="`warm_start_steps` 3 -> 4"):
        main(
            arguments(tmp_path / "parts", images, resume_from_checkpoint="latest", **options | {"warm_start_steps": 4})
        )


def test_the_temperature_stays_below_100(images, tmp_path):
    config = tiny_clip().config
    config.logit_scale_init_value = 7.0
    config.save_pretrained(tmp_path / "hot")
    main(arguments(tmp_path / "clip", images, clip_config_name_or_path=str(tmp_path / "hot"), max_train_steps=1))
    assert CLIPModel.from_pretrained(tmp_path / "clip").logit_scale.exp().item() == pytest.approx(100)


def test_command_line_and_hub(config_folder, tmp_path):
    """The images lie where they were asked for, and are not published."""
    flags = f"""--image_dir {tmp_path / "images"} --num_train_images 4 --num_validation_images 3 --max_train_steps 2
        --clip_config_name_or_path {config_folder} --train_batch_size 4 --report_to none
        --output_dir {tmp_path / "clip"} --push_to_hub --hub_model_id alice/clip --hub_token hf_alice_write""".split()
    with HubServer() as hub:
        env = hub.env(tmp_path / "home", token=None)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        script = [sys.executable, str(ROOT / "training" / "train_toy_clip.py"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        files = hub.files("alice/clip")
        wrong = subprocess.run(
            [*script, "--warm_start_steps", "-1"], env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert wrong.returncode == 2 and "error: `warm_start_steps` is -1" in wrong.stderr
        assert "Traceback" not in wrong.stderr
    assert {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
        "README.md",
    } <= set(files)
    assert not [name for name in files if name.endswith(".png")]
    assert [len(rows_of(tmp_path / "images" / split)) for split in ("train", "validation")] == [4, 3]
    card = files["README.md"].decode()
    assert 'CLIPModel.from_pretrained("alice/clip")' in card and "library_name: transformers" in card


# --- What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "digits"}, "`dataset_name` is 'digits', but this script renders its own images"),
        ({"train_data_dir": "x"}, "`train_data_dir` is 'x'"),
        ({"num_train_epochs": 3}, "`num_train_epochs` is 3, but this script renders its own images"),
        ({"random_flip": True}, "`random_flip` is True"),
        ({"pretrained_model_name_or_path": "x"}, "starts from random weights: leave it out"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2.*raise `train_batch_size`"),
        ({"warm_start_steps": -1}, "`warm_start_steps` is -1, but must be at least 0"),
        ({"train_batch_size": 1}, "`train_batch_size` is 1, but must be at least 2"),
        ({"num_train_images": 0}, "`num_train_images` is 0, but must be at least 1"),
    ],
)
def test_arguments_that_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path / "out", tmp_path / "images", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 2}, "has `eos_token_id` 2, but it must be 513"),
        ({"vocab_size": 600}, "has `vocab_size` 600, but it must be 514"),
        ({"max_position_embeddings": 77}, "has `max_position_embeddings` 77, but it must be 32"),
    ],
)
def test_configurations_that_do_not_fit(changes, message, tmp_path):
    tiny_clip(**changes).config.save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path / "out", tmp_path / "images", clip_config_name_or_path=str(tmp_path / "config")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "images").exists()
