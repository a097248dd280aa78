"""The PDAE authors' checkpoints -> diffusers folders, against outputs recorded from their code."""

import doctest
import functools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import diffusers_ext.convert.pdae
from diffusers_ext import PDAEPipeline
from diffusers_ext.cli import main
from diffusers_ext.convert.pdae import convert_decoder, convert_encoder, convert_unet
from diffusers_ext.pipelines.pdae import unet_down, unet_up

_FOLDER = Path(__file__).parent / "goldens" / "pdae_networks"
_RECORDER = runpy.run_path(str(_FOLDER / "record.py"))
_SHAPES = json.loads((_FOLDER / "networks.json").read_text(encoding="utf-8"))
_DIFFUSION = {"timesteps": 1000, "betas_type": "linear"}


@functools.cache
def drawn(name: str) -> tuple[dict, dict, dict]:
    """Weights under the authors' names, configuration, inputs. For every test the same, so not to be changed."""
    weights, inputs = _RECORDER["draw"](name, _SHAPES[name])
    tensors = [{key: torch.from_numpy(value) for key, value in values.items()} for values in (weights, inputs)]
    return tensors[0], _RECORDER["NETWORKS"][name][1], tensors[1]


def recorded(key: str) -> torch.Tensor:
    with np.load(_FOLDER / "networks.npz") as arrays:
        return torch.from_numpy(arrays[key])


def run_decoder(weights: dict, config: dict, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    unet, estimator = convert_decoder(weights, config)
    with torch.no_grad():
        features = unet_down(unet, inputs["sample"], inputs["timestep"])
        return unet_up(unet, *features), estimator(*features, latent_code=inputs["latent_code"])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An autoencoder and a base model as the authors' trainers leave them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("ddpm").mkdir()
    encoder, _, _ = drawn("encoder64")
    decoder, decoder_config, _ = drawn("decoder_heads")
    base, base_config, _ = drawn("base")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    # The weights without `ema_` are not the ones to convert.
    raw = {"encoder": {}, "decoder": {}, "denoise_fn": {}, "optimizer": optimizer, "scaler": {}, "step": 640000}
    torch.save(raw | {"ema_encoder": encoder, "ema_decoder": decoder}, "checkpoint.pt")
    torch.save(raw | {"ema_denoise_fn": base}, "ddpm/checkpoint.pt")
    configs = {
        "config.yml": {"diffusion_config": _DIFFUSION, "trained_ddpm_config": "./ddpm.yml"},
        "ddpm.yml": {"denoise_fn_config": decoder_config},
        "ddpm/config.yml": {
            "denoise_fn_config": base_config | {"model": "MNISTDenoiseFn"},
            "diffusion_config": _DIFFUSION | {"timesteps": 100, "betas_type": "cosine"},
            "train_dataset_config": {"image_size": 16},
        },
    }
    for name, config in configs.items():
        Path(name).write_text(yaml.dump(config))
    return tmp_path


# ---------------------------------------------------------------------------------------------- the recorded numbers


@pytest.mark.parametrize("name", ["decoder_heads", "decoder_head_channel"])
def test_decoder(name: str) -> None:
    noise_pred, gradient = run_decoder(*drawn(name))
    torch.testing.assert_close(noise_pred, recorded(f"{name}.noise_pred"), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, recorded(f"{name}.gradient"), atol=5e-5, rtol=0)


@pytest.mark.parametrize("wrong", [{"num_heads": 1}, {"num_heads": 4}, {"use_new_attention_order": True}])
def test_heads_and_their_order_matter(wrong: dict) -> None:
    weights, config, inputs = drawn("decoder_heads")
    noise_pred, gradient = run_decoder(weights, config | wrong, inputs)
    assert (noise_pred - recorded("decoder_heads.noise_pred")).abs().max() > 1e-2
    assert (gradient - recorded("decoder_heads.gradient")).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["base", "base_classes"])
def test_base(name: str) -> None:
    weights, config, inputs = drawn(name)
    unet = convert_unet(weights, config)
    labels = inputs["class_labels"] if name == "base_classes" else None
    with torch.no_grad():
        noise_pred = unet(inputs["sample"], inputs["timestep"], class_labels=labels).sample
    torch.testing.assert_close(noise_pred, recorded(f"{name}.noise_pred"), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["encoder64", "encoder128"])
def test_encoder(name: str) -> None:
    weights, _, inputs = drawn(name)
    encoder = convert_encoder(weights)
    assert encoder.config.sample_size == inputs["sample"].shape[-1]
    with torch.no_grad():
        latent_code = encoder(inputs["sample"])
    torch.testing.assert_close(latent_code, recorded(f"{name}.latent_code"), atol=5e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------- the command


def test_autoencoder_folder(files: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "pdae", "checkpoint.pt", "models/mine", "--config", "config.yml"]) == 0
    assert "models/mine: PDAEPipeline for 64 x 64, 3 channel(s)" in capsys.readouterr().out
    pipeline = PDAEPipeline.from_pretrained("models/mine")
    pipeline.set_progress_bar_config(disable=True)
    image = drawn("encoder64")[2]["sample"][:1] / 2 + 0.5
    images = pipeline(image, num_inversion_steps=2, num_inference_steps=3, output_type="pt").images
    expected = (recorded("autoencoded") / 2 + 0.5).clamp(0, 1)
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.3
    # Networks of drawn weights denoise nothing, so rounding grows on the way: 1e-5 on average, 5e-4 at most, the same
    # as between float32 and float64. One step more or less makes 0.16 on average.
    assert (images[:, :, ::4, ::4] - expected).abs().mean() < 1e-4
    card = ModelCard.load("models/mine/README.md").text
    assert "checkpoint.pt" in card and "640000" in card

    # The same weights as safetensors, with the configuration named, into an existing empty folder.
    weights = torch.load("checkpoint.pt", weights_only=True)
    parts = ("ema_encoder", "ema_decoder")
    save_file({f"{part}.{key}": t for part in parts for key, t in weights[part].items()}, "weights.safetensors")
    Path("again").mkdir()
    words = ["convert", "pdae", "weights.safetensors", "again", "--config", "config.yml", "--ddpm_config", "ddpm.yml"]
    assert main(words) == 0
    written = sorted(path.relative_to("models/mine") for path in Path("models/mine").rglob("*.safetensors"))
    assert len(written) == 3
    for path in written:
        assert (Path("again") / path).read_bytes() == (Path("models/mine") / path).read_bytes()


def test_base_folder(files: Path) -> None:
    assert main(["convert", "pdae", "ddpm/checkpoint.pt", "base", "--config", "ddpm/config.yml", "--base"]) == 0
    pipeline = DDPMPipeline.from_pretrained("base")
    inputs = drawn("base")[2]
    with torch.no_grad():
        noise_pred = pipeline.unet(inputs["sample"], inputs["timestep"]).sample
    torch.testing.assert_close(noise_pred, recorded("base.noise_pred"), atol=5e-5, rtol=0)
    # cosine: abar_t = f(t + 1) / f(0), as long as no beta is capped
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert len(pipeline.scheduler.alphas_cumprod) == 100
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod[:99], f[1:100] / f[0], rtol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 1)


def test_examples_in_docstrings(files: Path) -> None:
    result = doctest.testmod(diffusers_ext.convert.pdae)
    assert result.attempted >= 14 and result.failed == 0


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learn_sigma": True}, "`learn_sigma` is true"),
        ({"dims": 3}, "`dims` is 3"),
        ({"num_class": 10}, "`num_class` is 10"),
        ({"channel_multiplier": [2, 2]}, "must start with 1"),
        ({"channel_multiplier": []}, "must start with 1"),
        ({"channel_multiplier": [1, 1.5]}, r"\[32, 48\].*multiple of 32"),
        ({"attention_resolutions": [1]}, r"`num_heads` is 2 at several widths \(\[32, 64\]\)"),
        ({"num_heads": 3}, r"do not divide the \[64\] channels"),
        ({"head_channel": 48}, r"do not divide the \[64\] channels"),
        ({"num_heads": "2"}, "`num_heads` is '2', but must be of type `int`"),
        ({"use_new_attention_order": None}, "`use_new_attention_order` is None, but must be of type `bool`"),
        (
            {"num_residual_blocks_of_a_block": 2},
            r"`input_blocks.3.0.in_layers.2.bias` has shape \(64,\) instead of \(32,\)",
        ),
        ({"attention_resolutions": []}, "`input_blocks.3.1.norm.bias` is unknown"),
        ({"input_channel": 1}, r"`input_blocks.0.0.weight` has shape \(32, 3, 3, 3\) instead of \(32, 1, 3, 3\)"),
    ],
)
def test_configurations_that_are_refused(change: dict, message: str) -> None:
    weights, config, _ = drawn("decoder_heads")
    with pytest.raises(ValueError, match=message):
        convert_decoder(weights, config | change)


def test_missing_fields_are_named() -> None:
    weights, config, _ = drawn("base")
    config = {field: value for field, value in config.items() if field not in ("num_heads", "head_channel")}
    with pytest.raises(ValueError, match="`num_heads` is 'missing'.*`head_channel` is 'missing'"):
        convert_unet(weights, config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shift_out.2.weight", None, "`shift_out.2.weight` is missing"),
        ("shift_middle_block.1.qkv.weight", None, "`shift_middle_block.1.qkv.weight` is missing"),
        (
            "shift_output_blocks.0.1.qkv.weight",
            torch.zeros(64, 64, 1),
            r"has shape \(64, 64, 1\) instead of \(192, 64\)",
        ),
        ("shift_extra.weight", torch.zeros(1), "PDAEGradientEstimator.*`shift_extra.weight` is unknown"),
        ("extra.weight", torch.zeros(1), "UNet2DModel.*`extra.weight` is unknown"),
        (
            "out.2.weight",
            torch.zeros(6, 32, 3, 3),
            r"`out.2.weight` has shape \(6, 32, 3, 3\) instead of \(3, 32, 3, 3\)",
        ),
        ("label_emb.weight", None, "no decoder of PDAE"),
        ("label_emb.weight", torch.zeros(7), "no decoder of PDAE"),
    ],
)
def test_decoders_that_are_refused(key: str, value: torch.Tensor | None, message: str) -> None:
    weights, config, _ = drawn("decoder_heads")
    weights = weights | {key: value} if value is not None else {name: weights[name] for name in weights if name != key}
    with pytest.raises(ValueError, match=message):
        convert_decoder(weights, config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.14.weight", None, "one linear layer"),
        ("encoder.14.weight", torch.zeros(8, 128 * 15), "one linear layer"),
        ("encoder.20.weight", torch.zeros(2, 2), "one linear layer"),
        ("encoder.1.weight", None, "`encoder.1.weight` is missing"),
        ("encoder.4.qkv.weight", torch.zeros(3, 128, 1), r"`encoder.4.qkv.weight` has shape \(3, 128, 1\)"),
        ("encoder.99.weight", torch.zeros(1), "`encoder.99.weight` is unknown"),
        ("encoder.0.weight", torch.zeros(48, 3, 3, 3), "48"),
    ],
)
def test_encoders_that_are_refused(key: str, value: torch.Tensor | None, message: str) -> None:
    weights, _, _ = drawn("encoder64")
    weights = weights | {key: value} if value is not None else {name: weights[name] for name in weights if name != key}
    with pytest.raises(ValueError, match=message):
        convert_encoder(weights)


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("checkpoint.pt", None, [], "No such file"),
        ("checkpoint.pt", b"not a checkpoint", [], "`checkpoint.pt` cannot be read as a checkpoint of tensors"),
        ("checkpoint.pt", {"ema_encoder": {}, "ema_decoder": Path()}, [], "cannot be read"),  # would run code
        ("checkpoint.pt", {"ema_encoder": {}, "ema_decoder": 1}, [], "no weights `ema_decoder`"),
        ("checkpoint.pt", [1, 2], [], "no weights `ema_encoder` but list"),
        ("w.safetensors", b"not a checkpoint", [], "`w.safetensors` cannot be read as a checkpoint of tensors"),
        ("config.yml", b"a: [", [], "`config.yml` cannot be read as YAML"),
        ("config.yml", b"just text", [], "`config.yml` holds a str"),
        ("config.yml", b"a: 1", [], "no section `diffusion_config` but ['a']"),
        ("config.yml", b"diffusion_config: {timesteps: 1000}", [], "`betas_type` is 'missing'"),
        (
            "config.yml",
            b"diffusion_config: {timesteps: 10, betas_type: sqrt}",
            [],
            "must be one of ['linear', 'cosine']",
        ),
        ("config.yml", b"diffusion_config: {timesteps: 10, betas_type: linear}", [], "give it by `--ddpm_config`"),
        ("ddpm.yml", None, [], "'./ddpm.yml' is not a file: give it by `--ddpm_config`"),
        ("ddpm.yml", b"a: 1", [], "no section `denoise_fn_config`"),
        (
            "config.yml",
            b"{diffusion_config: {timesteps: 10, betas_type: linear}, denoise_fn_config: {}}",
            ["--base"],
            "no section `train_dataset_config`",
        ),
        ("out", b"mine", [], "`out` exists and is not an empty folder"),
    ],
)
def test_input_that_is_refused(
    files: Path, capsys: pytest.CaptureFixture, name: str, content: object, words: list[str], message: str
) -> None:
    if content is None:
        Path(name).unlink()
    elif isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        torch.save(content, name)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    checkpoint = "w.safetensors" if name == "w.safetensors" else "checkpoint.pt"
    assert main(["convert", "pdae", checkpoint, "out", "--config", "config.yml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    assert Path("out").is_file() or not Path("out").exists()


def test_a_base_model_is_not_taken_for_an_autoencoder(files: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "pdae", "ddpm/checkpoint.pt", "out", "--config", "config.yml"]) == 2
    assert "no weights `ema_encoder`" in (error := capsys.readouterr().err) and "`--base`" in error
