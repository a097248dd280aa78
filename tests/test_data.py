"""`diffusers_ext.data`, on real files of every kind that it promises to read."""

import doctest
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import DataLoader

import diffusers_ext.data
from diffusers_ext.data import ImageDataset, load_image_dataset


def noise(width=16, height=16, mode="RGB", seed=0):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def as_bytes(dataset, index=0):
    """An item as whole numbers from 0 to 255, height x width x channels."""
    pixels = (dataset[index]["images"].permute(1, 2, 0).double() + 1) * 127.5
    assert torch.allclose(pixels, pixels.round(), atol=1e-4)
    return pixels.round().numpy()


def write_folder(root, names):
    """One distinguishable 8 x 8 picture per name: its pixels have the value of its place."""
    for place, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), place).save(root / name)


def places(dataset):
    return [round(float(as_bytes(dataset, index)[0, 0, 0])) for index in range(len(dataset))]


def truncate(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# ---------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_scaled_to_plus_minus_one_exactly(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "ramp.png")
    images = load_image_dataset(train_data_dir=tmp_path, resolution=16, image_mode="L")[0]["images"]
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(images, (torch.arange(256.0) / 127.5 - 1).view(1, 16, 16))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, np.fliplr),
        (3, lambda stored: np.rot90(stored, 2)),
        (4, np.flipud),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: np.rot90(stored, -1)),  # clockwise
        (7, lambda stored: np.rot90(stored, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_exif_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(8, 8)
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(
        as_bytes(load_image_dataset(train_data_dir=tmp_path, resolution=8)), upright(np.array(stored))
    )


def test_exif_orientation_of_a_jpeg_comes_before_the_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((32, 96), np.uint8)
    stored[:, :32], stored[:, 64:] = 255, 255  # upright: 96 high, white at both ends, black in the middle
    stored[:16, 32:64] = 128  # upright: to the right
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image_dataset(train_data_dir=tmp_path, resolution=32, image_mode="L")[0]["images"][0]
    assert image[:, 20:].mean().item() == pytest.approx(128 / 127.5 - 1, abs=0.02)
    assert image[:, :12].mean().item() == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("image_mode", ["L", "RGB"])
def test_16_bit_grey_keeps_its_precision(tmp_path, image_mode):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    values[0, :2] = 0, 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    images = load_image_dataset(train_data_dir=tmp_path, resolution=8, image_mode=image_mode)[0]["images"]
    expected = torch.tensor(values / 32767.5 - 1, dtype=torch.float32)
    torch.testing.assert_close(images, expected.expand(len(image_mode), 8, 8), atol=1e-6, rtol=0)
    assert images.min() == -1 and images.max() == 1


def test_16_bit_grey_is_clipped_where_the_filter_overshoots(tmp_path):
    values = np.zeros((32, 32), np.uint16)
    values[:, 16:] = 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    images = load_image_dataset(train_data_dir=tmp_path, resolution=15)[0]["images"]
    assert images.min() == -1 and images.max() == 1


def test_transparency_is_laid_on_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.resize((8, 4)).crop((2, 0, 6, 4)).save(tmp_path / "a_palette.png", transparency=1)
    Image.new("RGBA", (4, 4), (0, 100, 200, 51)).save(tmp_path / "b_rgba.png")
    Image.new("LA", (4, 4), (55, 51)).save(tmp_path / "c_la.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "d_key.png", transparency=(1, 2, 3))
    paths = sorted(tmp_path.iterdir())
    with Image.open(paths[0]) as image:
        assert image.mode == "P" and "transparency" in image.info
    dataset = ImageDataset(paths, resolution=4)
    assert np.array_equal(as_bytes(dataset, 0)[0], [[255, 0, 0]] * 2 + [[255, 255, 255]] * 2)
    share = 51 / 255
    assert np.allclose(as_bytes(dataset, 1), 255 * (1 - share) + np.array([0, 100, 200]) * share, atol=0.51)
    assert np.allclose(as_bytes(dataset, 2), 255 * (1 - share) + 55 * share, atol=0.51)
    assert np.all(as_bytes(dataset, 3) == 255)


def test_other_modes(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.jpg", quality=100)
    Image.new("1", (4, 4), 1).save(tmp_path / "c.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "d.bmp")
    dataset = ImageDataset(sorted(tmp_path.iterdir()), resolution=4)
    expected = [(255, 0, 0), (0, 255, 255), (255, 255, 255), (77, 77, 77)]
    for index, color in enumerate(expected):
        assert np.abs(as_bytes(dataset, index) - color).max() <= 2, index
    assert dataset.verify() == {}


def test_color_to_grey_has_the_weights_of_itu_r_601():
    for color, weight in (("red", 0.299), ("lime", 0.587), ("blue", 0.114)):
        dataset = ImageDataset([Image.new("RGB", (4, 4), color)], resolution=4, image_mode="L")
        assert dataset[0]["images"].shape == (1, 4, 4)
        assert np.abs(as_bytes(dataset) - 255 * weight).max() <= 0.6


def test_greys_without_a_known_white_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "deep.tif")
    problems = ImageDataset(sorted(tmp_path.iterdir()), resolution=4).verify()
    assert "16 bits" in problems[0] and "floats" in problems[1]


# ---------------------------------------------------------------------------------------------------- geometry


def test_center_crop_is_the_middle():
    wide, tall = noise(21, 8), noise(8, 21)
    assert np.array_equal(as_bytes(ImageDataset([wide], resolution=8)), np.array(wide)[:, 6:14])
    assert np.array_equal(as_bytes(ImageDataset([tall], resolution=8)), np.array(tall)[6:14])


def test_shrinking_averages_and_growing_interpolates():
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    shrunk = ImageDataset([Image.fromarray(checkers.astype(np.uint8))], resolution=16, image_mode="L")[0]["images"]
    assert shrunk.abs().max() < 0.1  # grey: nothing of the checkers is left to alias
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1)))
    grown = ImageDataset([ramp], resolution=64, image_mode="L")[0]["images"][0, 32]
    expected = ((torch.arange(64) + 0.5) / 4 - 0.5) * 16 / 127.5 - 1  # a straight line stays one, away from the ends
    torch.testing.assert_close(grown[8:-8], expected[8:-8], atol=1 / 127, rtol=0)


def test_filters_are_lanczos_for_shrinking_and_bicubic_for_growing():
    image = noise(24, 24)
    for resolution, filter in ((10, Image.Resampling.LANCZOS), (50, Image.Resampling.BICUBIC)):
        expected = np.array(image.resize((resolution, resolution), filter))
        assert np.array_equal(as_bytes(ImageDataset([image], resolution=resolution)), expected)


def test_extreme_shapes():
    for size in ((1, 1), (3000, 1), (1, 3000)):
        assert ImageDataset([Image.new("RGB", size)], resolution=256)[0]["images"].shape == (3, 256, 256)


def test_random_crops_reach_every_place_and_follow_torchs_seed():
    image = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8), (8, 1)))
    dataset = ImageDataset([image], resolution=8, image_mode="L", center_crop=False)
    torch.manual_seed(3)
    lefts = [int(as_bytes(dataset)[0, 0, 0]) for _ in range(60)]
    assert set(lefts) == {0, 1, 2, 3, 4}
    torch.manual_seed(3)
    assert [int(as_bytes(dataset)[0, 0, 0]) for _ in range(60)] == lefts


def test_random_flip_mirrors_half_of_the_time():
    image = noise(8, 8)
    dataset = ImageDataset([image], resolution=8, random_flip=True)
    flipped = 0
    for _ in range(200):
        pixels = as_bytes(dataset)
        mirrored = np.array_equal(pixels, np.array(image)[:, ::-1])
        assert mirrored or np.array_equal(pixels, np.array(image))
        flipped += mirrored
    assert 70 < flipped < 130


def test_held_out_images_are_never_augmented(tmp_path):
    for name in "abcd":
        noise(12, 8).save(tmp_path / f"{name}.png")
    arguments = {"resolution": 8, "center_crop": False, "random_flip": True, "validation_fraction": 2}
    held_out = load_image_dataset(train_data_dir=tmp_path, split="validation", **arguments)
    assert len({held_out[index % 2]["images"].numpy().tobytes() for index in range(40)}) == 1
    train = load_image_dataset(train_data_dir=tmp_path, **arguments)
    assert len({train[index % 2]["images"].numpy().tobytes() for index in range(40)}) > 5


def test_data_loader_with_workers(tmp_path):
    write_folder(tmp_path, [f"{label}/{index}.png" for label in ("cat", "dog") for index in range(4)])
    dataset = load_image_dataset(train_data_dir=tmp_path, resolution=8, validation_fraction=0, random_flip=True)
    assert places(pickle.loads(pickle.dumps(dataset))) == places(dataset)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=2))
    assert [batch["images"].shape for batch in batches] == [(4, 3, 8, 8)] * 2
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [int(place >= 4) for place in places(dataset)]
    assert batches[0]["labels"].dtype == torch.int64


# ---------------------------------------------------------------------------------------------------- digits, photos


def test_digits_are_the_real_ones_split_without_overlap():
    real = load_digits()
    # value / 16 in [0, 1] -> [-1, 1], exact in float32
    expected = {
        (int(label), (image / 8 - 1).astype(np.float32).tobytes())
        for label, image in zip(real.target, real.images, strict=True)
    }
    splits = [load_image_dataset("digits", split=split) for split in ("train", "validation")]
    assert [len(split) for split in splits] == [1297, 500]
    assert set(splits[0].indices).isdisjoint(splits[1].indices)
    items = [
        (item["labels"], item["images"].numpy().tobytes())
        for split in splits
        for item in map(split.__getitem__, range(len(split)))
    ]
    assert len(items) == 1797 and set(items) == expected
    assert splits[0][0]["images"].shape == (1, 8, 8)
    assert splits[0].label_names == list("0123456789") and splits[0].image_mode == "L"
    assert "1297 images (training split), 8 x 8, grey" in splits[0].description


def test_digits_at_another_resolution_are_bilinear():
    small = load_image_dataset("digits")
    large = load_image_dataset("digits", resolution=32, image_mode="RGB")
    expected = torch.nn.functional.interpolate(small[5]["images"][None], 32, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(large[5]["images"], expected.expand(3, 32, 32), atol=1e-5, rtol=0)


def test_photo_crops_of_the_two_splits_share_no_pixel():
    photos = load_sample_images().images
    columns = {}
    for split in ("train", "validation"):
        dataset = load_image_dataset("photos", split=split, resolution=224, num_crops=24, validation_fraction=8)
        assert len(dataset) == {"train": 16, "validation": 8}[split]
        assert dataset.label_names == ["china", "flower"]
        found = []
        for index in range(len(dataset)):
            crop, photo = as_bytes(dataset, index).astype(np.uint8), photos[dataset[index]["labels"]]
            first = np.lib.stride_tricks.sliding_window_view(photo[:204], (1, 8, 3))[:, :, 0, 0]  # its first 8 pixels
            candidates = np.argwhere((first[:, : 640 - 223] == crop[0, :8]).all((2, 3)))
            at = [left for top, left in candidates if np.array_equal(photo[top : top + 224, left : left + 224], crop)]
            assert len(at) == 1
            found += at
        columns[split] = found
    assert max(columns["train"]) + 224 <= 640 - 224 and set(columns["validation"]) == {640 - 224}
    assert len(set(columns["train"])) > 8


def test_photo_crop_i_depends_on_seed_and_i_alone():
    long = load_image_dataset("photos", resolution=32, num_crops=100)
    short = load_image_dataset("photos", resolution=32, num_crops=10, max_samples=5)
    assert len(long) == 75 and len(short) == 5
    assert all(torch.equal(short[index]["images"], long[index]["images"]) for index in (4, 2, 0, 3, 1))
    other = load_image_dataset("photos", resolution=32, num_crops=10, seed=1)
    assert not torch.equal(other[0]["images"], long[0]["images"])
    assert len({long[index]["images"].numpy().tobytes() for index in range(75)}) == 75
    large = load_image_dataset("photos", resolution=300, num_crops=4)[0]["images"]
    assert large.shape == (3, 300, 300) and large.is_contiguous()


# ---------------------------------------------------------------------------------------------------- image folders


def test_plain_folder_is_searched_through_and_through(tmp_path):
    names = ["a.PNG", "b/c.Jpeg", "b/d/e.webp", "f.tiff"]
    write_folder(tmp_path, names)
    write_folder(tmp_path, [".hidden.png", ".cache/g.png", "b/._c.jpeg.png"])
    (tmp_path / "notes.txt").write_text("no image")
    dataset = load_image_dataset(train_data_dir=str(tmp_path), resolution=8, validation_fraction=0)
    assert sorted(dataset.pictures[row].relative_to(tmp_path).as_posix() for row in dataset.indices) == names
    assert dataset.label_names is None and set(dataset[0]) == {"images"}


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path, ["data/a.png", "elsewhere/b.png"])
    os.symlink(tmp_path / "data", tmp_path / "data" / "circle")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "linked")
    dataset = load_image_dataset(train_data_dir=tmp_path / "data", resolution=8, validation_fraction=0)
    assert sorted(places(dataset)) == [0, 1]


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    names = ["dog/1.png", "Cat/1.png", "dog/deep/2.png", "bird/1.png"]
    write_folder(tmp_path, names)
    dataset = load_image_dataset(train_data_dir=tmp_path, resolution=8, validation_fraction=0)
    assert dataset.label_names == ["Cat", "bird", "dog"]
    assert {place: dataset[i]["labels"] for i, place in enumerate(places(dataset))} == {0: 2, 1: 0, 2: 2, 3: 1}
    assert "labels" not in load_image_dataset(train_data_dir=tmp_path, resolution=8, label_column=None)[0]


@pytest.mark.parametrize("names", [["only/1.png", "only/2.png"], ["a/1.png", "b/2.png", "3.png"]])
def test_folders_that_are_no_classes(tmp_path, names):
    write_folder(tmp_path, names)
    dataset = load_image_dataset(train_data_dir=tmp_path, resolution=8, validation_fraction=0)
    assert len(dataset) == len(names) and dataset.labels is None and dataset.label_names is None


def test_split_folders(tmp_path):
    write_folder(tmp_path, ["train/a/1.png", "train/b/1.png", "test/c/1.png", "val/b/1.png"])
    (tmp_path / "README.md").write_text("")
    train, held_out = (
        load_image_dataset(train_data_dir=tmp_path, resolution=8, split=s) for s in ("train", "validation")
    )
    assert sorted(places(train)) == [0, 1] and places(held_out) == [3]
    assert train.label_names == held_out.label_names == ["a", "b"]
    assert held_out[0]["labels"] == 1
    # an explicit share is taken from the training images
    explicit = [
        load_image_dataset(train_data_dir=tmp_path, resolution=8, split=split, validation_fraction=1)
        for split in ("train", "validation")
    ]
    assert sorted(places(explicit[0]) + places(explicit[1])) == [0, 1]


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )


def test_metadata_with_captions_and_labels(tmp_path, caplog):
    write_folder(tmp_path, ["b.png", "sub/a.png", "unlisted.png"])
    write_metadata(
        tmp_path,
        [
            {"file_name": "sub/a.png", "text": "one\u2028line", "label": "zebra", "kind": 5},
            {"file_name": "./b.png", "text": "ein Bär", "label": "ant", "kind": 7},
        ],
    )
    dataset = load_image_dataset(train_data_dir=tmp_path, resolution=8, validation_fraction=0)
    assert "1 images" in caplog.text and "metadata.jsonl" in caplog.text
    items = {item["captions"]: item["labels"] for item in map(dataset.__getitem__, range(2))}
    assert items == {"one\u2028line": 1, "ein Bär": 0} and dataset.label_names == ["ant", "zebra"]
    assert sorted(places(dataset)) == [0, 1]
    kinds = load_image_dataset(train_data_dir=tmp_path, resolution=8, label_column="kind", validation_fraction=0)
    assert sorted(kinds[i]["labels"] for i in range(2)) == [5, 7] and kinds.label_names is None
    bare = load_image_dataset(train_data_dir=tmp_path, resolution=8, label_column=None, caption_column=None)
    assert set(bare[0]) == {"images"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file_name": "a.png"}\n{oops', "line 2 of .*metadata.jsonl is no JSON object"),
        ('{"name": "a.png"}', "line 1 .*`file_name`"),
        ('["a.png"]', "line 1 .*`file_name`"),
        ('{"file_name": "gone.png"}', "line 1 .*'gone.png', but there is no such file"),
        ('{"file_name": "a.png"}\n\n{"file_name": "./a.png"}', "line 3 .*repeats 'a.png'"),
        ("", "metadata.jsonl is empty"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"}', "caption .* is None.*`caption_column=None`"),
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}', "labels .*None.*`label_column=None`"),
        (
            '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": "1"}',
            "all be names or all be integers",
        ),
        ('{"file_name": "a.png", "label": -1}', "integers from 0 on"),
        ('{"file_name": "a.png", "label": 0.5}', "integers from 0 on"),
    ],
)
def test_bad_metadata(tmp_path, lines, message):
    write_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(train_data_dir=tmp_path, resolution=8)


def test_split_is_disjoint_seeded_and_the_same_on_every_machine(tmp_path):
    write_folder(tmp_path, [f"{index:02}.png" for index in range(20)])

    def load(split, **arguments):
        return places(load_image_dataset(train_data_dir=tmp_path, resolution=8, split=split, **arguments))

    assert load("validation") == [11, 3] and load("train", max_samples=4) == [13, 2, 15, 1]  # recorded
    for fraction, count in ((0.25, 5), (7, 7), (7.0, 7), (None, 2)):
        train, held_out = (load(split, validation_fraction=fraction) for split in ("train", "validation"))
        assert len(held_out) == count and sorted(train + held_out) == list(range(20))
    assert load("validation", seed=1) != load("validation")
    assert len(load("train", validation_fraction=0)) == 20


# ---------------------------------------------------------------------------------------------------- broken files


@pytest.fixture
def damaged(tmp_path):
    """Twenty images, four of them damaged in ways that a look at the header does not find."""
    for index in range(20):
        noise(64, 48, seed=index).save(tmp_path / f"{index:02}.jpg", progressive=index == 4)
    noise(64, 48).save(tmp_path / "20.png")
    truncate(tmp_path / "03.jpg")
    truncate(tmp_path / "04.jpg", 0.9)
    truncate(tmp_path / "20.png")
    (tmp_path / "11.jpg").write_bytes(b"")
    (tmp_path / "12.jpg").write_text("<html>404</html>")
    with Image.open(tmp_path / "20.png") as image:
        assert image.size == (64, 48)
    return tmp_path


BROKEN = ["03.jpg", "04.jpg", "11.jpg", "12.jpg", "20.png"]


def test_broken_files_are_all_listed(damaged):
    with pytest.raises(ValueError, match="5 of 21 images") as caught:
        load_image_dataset(train_data_dir=damaged, resolution=16, validation_fraction=0)
    assert [Path(line.split(": ")[0]).name for line in str(caught.value).splitlines()[1:]] == BROKEN
    assert str(damaged / "03.jpg") in str(caught.value) and "on_error='skip'" in str(caught.value)


def test_broken_files_can_be_left_out_with_a_warning(damaged, caplog):
    whole, corrupt = [], []
    for split in ("train", "validation"):
        with caplog.at_level(logging.WARNING):
            dataset = load_image_dataset(
                train_data_dir=damaged, resolution=16, split=split, validation_fraction=10, on_error="skip"
            )
        corrupt += dataset.corrupt
        whole += [str(dataset.pictures[row]) for row in dataset.indices]
        assert all(dataset[index]["images"].shape == (3, 16, 16) for index in range(len(dataset)))
        assert f"{len(dataset)} images" in dataset.description
    assert sorted(Path(name).name for name in corrupt) == BROKEN and all(name in caplog.text for name in corrupt)
    assert sorted(whole + corrupt) == sorted(map(str, damaged.iterdir()))


def test_the_split_does_not_depend_on_broken_files(damaged):
    def load(split):
        dataset = load_image_dataset(
            train_data_dir=damaged, resolution=8, split=split, validation_fraction=10, on_error="skip"
        )
        return [dataset.pictures[row].name for row in dataset.indices]

    before = {split: load(split) for split in ("train", "validation")}
    truncate(damaged / before["train"][0])
    assert load("validation") == before["validation"] and load("train") == before["train"][1:]


def test_unchecked_files_fail_by_name_when_they_are_read(damaged):
    dataset = load_image_dataset(train_data_dir=damaged, resolution=8, validation_fraction=0, verify=False)
    names = [dataset.pictures[row].name for row in dataset.indices]
    for name in BROKEN:
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*on_error='skip'"):
            dataset[names.index(name)]


def test_nothing_but_broken_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="1 of 1 images"):
        load_image_dataset(train_data_dir=tmp_path, resolution=8, on_error="skip")


# ---------------------------------------------------------------------------------------------------- datasets


def make_table(count=10, start=0, label=True):
    columns = {"image": [Image.new("L", (8, 8), start + index) for index in range(count)]}
    features = {"image": datasets.Image()}
    if label:
        columns["label"] = [index % 2 for index in range(count)]
        features["label"] = datasets.ClassLabel(names=["even", "odd"])
    columns["text"] = [f"number {start + index}" for index in range(count)]
    features["text"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def test_saved_dataset(tmp_path):
    make_table().with_format("torch").save_to_disk(tmp_path / "saved")
    splits = [load_image_dataset(str(tmp_path / "saved"), split=s, resolution=8) for s in ("train", "validation")]
    assert [len(split) for split in splits] == [9, 1]
    assert sorted(places(splits[0]) + places(splits[1])) == list(range(10))
    for split in splits:
        assert split.label_names == ["even", "odd"]
        for index, place in enumerate(places(split)):
            assert split[index]["labels"] == place % 2 and split[index]["captions"] == f"number {place}"
    batch = next(iter(DataLoader(splits[0], batch_size=9, num_workers=1)))
    assert batch["images"].shape == (9, 3, 8, 8) and len(batch["captions"]) == 9


def test_own_split_is_used_unless_a_share_is_asked_for(tmp_path):
    tables = {"train": make_table(), "test": make_table(3, start=100, label=False), "extra": make_table(2)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")

    def load(split, **arguments):
        return load_image_dataset(str(tmp_path / "saved"), split=split, resolution=8, **arguments)

    assert sorted(places(load("train"))) == list(range(10))
    assert sorted(places(load("validation"))) == [100, 101, 102]
    assert set(load("validation")[0]) == {"images", "captions"}
    assert len(load("validation", max_samples=2)) == 2
    assert set(load("train", label_column="text", caption_column=None)[0]) == {"images", "labels"}
    named = {"train": make_table(), "test": make_table(3, start=100).remove_columns("text")}
    datasets.DatasetDict(named).save_to_disk(tmp_path / "named")
    held_out = load_image_dataset(str(tmp_path / "named"), split="validation", resolution=8, label_column="text")
    assert set(held_out[0]) == {"images"} and held_out.label_names == sorted(f"number {index}" for index in range(10))
    assert sorted(
        places(load("train", validation_fraction=4)) + places(load("validation", validation_fraction=4))
    ) == [*range(10)]


def test_folder_that_datasets_reads(tmp_path):
    make_table().to_parquet(tmp_path / "data" / "train-00000.parquet")
    dataset = load_image_dataset(str(tmp_path / "data"), resolution=8, cache_dir=tmp_path / "cache")
    assert len(dataset) == 9 and dataset.label_names == ["even", "odd"]
    assert (tmp_path / "cache").is_dir()


def test_orientation_and_broken_rows_in_a_dataset(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = noise(8, 8)
    stored.save(tmp_path / "turned.png", exif=exif)
    noise(64, 64).save(tmp_path / "half.jpg")
    truncate(tmp_path / "half.jpg")
    rows = [
        {"bytes": (tmp_path / "turned.png").read_bytes(), "path": "turned.png"},
        {"bytes": (tmp_path / "half.jpg").read_bytes(), "path": "half.jpg"},
        None,
    ]
    table = datasets.Dataset.from_dict({"picture": rows}, datasets.Features({"picture": datasets.Image()}))
    table.save_to_disk(tmp_path / "saved")
    arguments = {"image_column": "picture", "resolution": 8, "validation_fraction": 0}
    with pytest.raises(ValueError, match="2 of 3 images") as caught:
        load_image_dataset(str(tmp_path / "saved"), **arguments)
    assert all(name in str(caught.value) for name in ("row 1 (half.jpg): ", "row 2: "))
    dataset = load_image_dataset(str(tmp_path / "saved"), on_error="skip", **arguments)
    assert np.array_equal(as_bytes(dataset), np.array(stored)[::-1, ::-1])
    assert len(dataset) == 1 and len(dataset.corrupt) == 2


def test_bytes_and_names_instead_of_features(tmp_path):
    write_folder(tmp_path, ["0.png", "1.png"])
    columns = {
        "image": [(tmp_path / f"{index}.png").read_bytes() for index in range(2)],
        "path": [str(tmp_path / f"{index}.png") for index in range(2)],
        "species": ["yak", "emu"],
        "number": [1, 2],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    for image_column in ("image", "path"):
        dataset = load_image_dataset(
            str(tmp_path / "saved"),
            image_column=image_column,
            label_column="species",
            resolution=8,
            validation_fraction=0,
        )
        assert dataset.label_names == ["emu", "yak"]
        assert {place: dataset[index]["labels"] for index, place in enumerate(places(dataset))} == {0: 1, 1: 0}
    for arguments, message in (
        ({"image_column": "img"}, r"`image_column` is 'img', but .*'species'"),
        ({"label_column": "klass"}, r"`label_column` is 'klass', but .*'species'"),
        ({"caption_column": "caption"}, r"`caption_column` is 'caption', but"),
        ({"caption_column": "number"}, r"a caption in .* is 1, but must be text"),
        ({"image_column": "number"}, r"`image_column` 'number' .*must hold images"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(str(tmp_path / "saved"), resolution=8, **arguments)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .*\n  row 1 \(.*1.png\): FileNotFoundError"):
        load_image_dataset(str(tmp_path / "saved"), image_column="path", resolution=8, validation_fraction=0)


def test_splits_without_a_training_split(tmp_path):
    datasets.DatasetDict({"a": make_table(), "b": make_table()}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"\['a', 'b'\], but one must be called 'train'"):
        load_image_dataset(str(tmp_path / "two"), resolution=8)
    datasets.DatasetDict({"a": make_table()}).save_to_disk(tmp_path / "one")
    assert len(load_image_dataset(str(tmp_path / "one"), resolution=8, validation_fraction=0)) == 10


def test_unknown_dataset_names_the_choices():
    with pytest.raises(
        ValueError, match=r"'no-one/no-such-data'.*'digits', 'photos', a data set on the Hub or a local"
    ):
        load_image_dataset("no-one/no-such-data", resolution=8)


# ---------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`dataset_name` is None and `train_data_dir` is None, but exactly one"),
        ({"dataset_name": "digits", "train_data_dir": "x"}, ValueError, "exactly one of them"),
        ({"dataset_name": "photos"}, ValueError, "`resolution` is missing"),
        ({"train_data_dir": "x"}, ValueError, "`resolution` is missing"),
        ({"dataset_name": "digits", "resolution": 0}, ValueError, "`resolution` is 0, but must be at least 1"),
        ({"dataset_name": "digits", "resolution": -8}, ValueError, "`resolution` is -8"),
        ({"dataset_name": "digits", "resolution": 8.0}, TypeError, "`resolution` is 8.0, but must be an `int`"),
        ({"dataset_name": "photos", "resolution": 0}, ValueError, "`resolution` is 0"),
        ({"dataset_name": "photos", "resolution": "64"}, TypeError, "`resolution` is '64'"),
        ({"dataset_name": "digits", "image_mode": "RGBA"}, ValueError, "`image_mode` is 'RGBA', but"),
        ({"dataset_name": "digits", "split": "test"}, ValueError, "`split` is 'test', but"),
        ({"dataset_name": "digits", "validation_fraction": -0.1}, ValueError, "`validation_fraction` is -0.1"),
        ({"dataset_name": "digits", "validation_fraction": 1.5}, ValueError, "`validation_fraction` is 1.5"),
        ({"dataset_name": "digits", "validation_fraction": 1797}, ValueError, "1797 of 1797 .*from 1 to 1796"),
        (
            {"dataset_name": "digits", "validation_fraction": 0, "split": "validation"},
            ValueError,
            "holds out 0 of 1797",
        ),
        ({"dataset_name": "photos", "resolution": 8, "validation_fraction": 2048}, ValueError, "2048 of 2048"),
        ({"dataset_name": "photos", "resolution": 8, "num_crops": 1}, ValueError, "`num_crops` is 1, but"),
        ({"dataset_name": "digits", "seed": -1}, ValueError, "`seed` is -1, but must be at least 0"),
        ({"dataset_name": "digits", "max_samples": 0}, ValueError, "`max_samples` is 0, but must be at least 1"),
        ({"dataset_name": "digits", "on_error": "ignore"}, ValueError, "`on_error` is 'ignore', but"),
        ({"dataset_name": "digits", "on_error": "skip", "verify": False}, ValueError, "needs `verify=True`"),
        ({"dataset_name": "digits", "dataset_config_name": "small"}, ValueError, "`dataset_config_name` is 'small'"),
        (
            {"train_data_dir": "/no/such/folder", "resolution": 8},
            ValueError,
            "'/no/such/folder', but there is no such",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load_image_dataset(**arguments)


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images: looked for .*\.png"):
        load_image_dataset(train_data_dir=tmp_path, resolution=8)


def test_folder_without_the_column_that_was_asked_for(tmp_path):
    write_folder(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="`label_column` is 'species'"):
        load_image_dataset(train_data_dir=tmp_path, resolution=8, label_column="species")


def test_columns_of_another_length():
    with pytest.raises(ValueError, match="`labels` has 2 entries, but `pictures` has 1"):
        ImageDataset([noise()], labels=[0, 1], resolution=8)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("photos", "sklearn"), ("x/y", "datasets")])
def test_missing_packages_name_the_remedy(monkeypatch, name, package):
    for module in [module for module in sys.modules if module.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)  # Python's own way to make an import fail
    with pytest.raises(ImportError, match=r'pip install "diffusers-ext\[training\]"'):
        load_image_dataset(name, resolution=8)


def test_examples_in_docstrings():
    result = doctest.testmod(diffusers_ext.data)
    assert result.attempted >= 8 and result.failed == 0
