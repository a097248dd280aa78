"""guided-diffusion's checkpoints -> folders, against recorded outputs and an implementation of its formulas."""

import doctest
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file

import diffusers_ext.convert.guided_diffusion as converter
from diffusers_ext import (
    ADMUNet2DModel,
    ClassifierGuidancePipeline,
    CoPaintPipeline,
    GuidedScheduler,
    NoisyClassifier,
)
from diffusers_ext.cli import main
from diffusers_ext.convert.guided_diffusion import (
    config_from_flags,
    convert,
    convert_classifier_state_dict,
    convert_unet_state_dict,
)
from diffusers_ext.pipelines.classifier_guidance import noise_levels

_FOLDER = Path(__file__).parent / "goldens" / "guidance"
_NETS = json.loads((_FOLDER / "nets_index.json").read_text(encoding="utf-8"))
_UNETS = [name for name in _NETS if name.startswith("unet_")]
_CLASSIFIERS = [name for name in _NETS if name.startswith("classifier_")]
# parameters of the published checkpoints
_PARAMETERS = {
    "64x64_diffusion": 295_904_454,
    "128x128_diffusion": 421_529_606,
    "256x256_diffusion": 553_838_086,
    "256x256_diffusion_uncond": 552_814_086,
    "512x512_diffusion": 558_997_638,
    "64_256_upsampler": 311_795_910,
    "128_512_upsampler": 308_835_270,
    "lsun_bedroom": 552_814_086,
    "lsun_cat": 552_814_086,
    "lsun_horse": 552_814_086,
    "lsun_horse_nodropout": 552_814_086,
    "64x64_classifier": 65_438_568,
    "128x128_classifier": 42_568_040,
    "256x256_classifier": 54_096_360,
    "512x512_classifier": 54_448_360,
}
_TINY = "--image_size 64 --num_channels 32 --num_res_blocks 1 --num_head_channels 32 --learn_sigma True"
_TINY_CLASSIFIER = "--image_size 64 --classifier_width 64 --classifier_depth 1"

# ------------------------------------------------------ the authors' networks, by their formulas and under their names


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """The weights of `UNetModel(**config)`, or of `EncoderUNetModel` if there is a `pool`."""
    shapes, base, layers = {}, config["model_channels"], config["num_res_blocks"]
    updown, time = config.get("resblock_updown", False), 4 * config["model_channels"]
    widths = [int(factor * base) for factor in config["channel_mult"]]
    attends = [2**level in config["attention_resolutions"] for level in range(len(widths))]

    def add(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = shape, shape[:1]

    def residual(key: str, inputs: int, outputs: int) -> None:
        add(f"{key}.in_layers.0", inputs)
        add(f"{key}.in_layers.2", outputs, inputs, 3, 3)
        add(f"{key}.emb_layers.1", outputs * (1 + config.get("use_scale_shift_norm", False)), time)
        add(f"{key}.out_layers.0", outputs)
        add(f"{key}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{key}.skip_connection", outputs, inputs, 1, 1)

    def attention(key: str, width: int) -> None:
        add(f"{key}.norm", width)
        add(f"{key}.qkv", 3 * width, width, 1)
        add(f"{key}.proj_out", width, width, 1)

    add("time_embed.0", time, base)
    add("time_embed.2", time, time)
    if config.get("num_classes"):
        shapes["label_emb.weight"] = (config["num_classes"], time)
    add("input_blocks.0.0", widths[0], config["in_channels"], 3, 3)
    stack = [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(layers):
            key = f"input_blocks.{len(stack)}"
            residual(f"{key}.0", stack[-1], width)
            if attends[level]:
                attention(f"{key}.1", width)
            stack.append(width)
        if level < len(widths) - 1:
            key = f"input_blocks.{len(stack)}.0"
            residual(key, width, width) if updown else add(f"{key}.op", width, width, 3, 3)
            stack.append(width)
    last = stack[-1]
    residual("middle_block.0", last, last)
    attention("middle_block.1", last)
    residual("middle_block.2", last, last)
    pool, classes = config.get("pool"), config["out_channels"]
    if pool == "attention":
        side = config["image_size"] // 2 ** (len(widths) - 1)
        add("out.0", last)
        shapes["out.2.positional_embedding"] = (last, side**2 + 1)
        add("out.2.qkv_proj", 3 * last, last, 1)
        add("out.2.c_proj", classes, last, 1)
    elif pool == "adaptive":
        add("out.0", last)
        add("out.3", classes, last, 1, 1)
    elif pool is not None:
        add("out.0", 2048, sum(stack) + last)
        if pool == "spatial_v2":
            add("out.1", 2048)
        add("out.3" if pool == "spatial_v2" else "out.2", classes, 2048)
    else:
        entry = 0
        for level in reversed(range(len(widths))):
            for layer in range(layers + 1):
                key = f"output_blocks.{entry}"
                residual(f"{key}.0", last + stack.pop(), widths[level])
                last = widths[level]
                if attends[level]:
                    attention(f"{key}.1", last)
                if level and layer == layers:
                    key = f"{key}.{1 + attends[level]}"
                    residual(key, last, last) if updown else add(f"{key}.conv", last, last, 3, 3)
                entry += 1
        add("out.0", last)
        add("out.2", classes, widths[0], 3, 3)
    return shapes


def forward(
    weights: dict, config: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
) -> torch.Tensor:
    """What `UNetModel(**config)` or, with a `pool`, `EncoderUNetModel(**config)` computes, in the dtype of `x`."""
    weights = {key: weight.to(x) for key, weight in weights.items()}
    layers, base, size = config["num_res_blocks"], config["model_channels"], config.get("num_head_channels", -1)

    def linear(key: str, h: torch.Tensor) -> torch.Tensor:
        weight = weights[f"{key}.weight"]
        return F.linear(h, weight.reshape(weight.shape[:2]), weights[f"{key}.bias"])

    def norm(key: str, h: torch.Tensor) -> torch.Tensor:
        return F.group_norm(h, 32, weights[f"{key}.weight"], weights[f"{key}.bias"], 1e-5)

    def conv(key: str, h: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = weights[f"{key}.weight"]
        return F.conv2d(h, weight, weights[f"{key}.bias"], stride, padding=weight.shape[-1] // 2)

    def down(h: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(h, 2)

    def up(h: torch.Tensor) -> torch.Tensor:
        return h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def residual(key: str, h: torch.Tensor, resize: Callable = lambda h: h) -> torch.Tensor:
        inner = conv(f"{key}.in_layers.2", resize(F.silu(norm(f"{key}.in_layers.0", h))))
        emb = linear(f"{key}.emb_layers.1", F.silu(embedding))[:, :, None, None]
        if config.get("use_scale_shift_norm"):
            scale, shift = emb.chunk(2, dim=1)
            inner = norm(f"{key}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = norm(f"{key}.out_layers.0", inner + emb)
        h = resize(h)
        if f"{key}.skip_connection.weight" in weights:
            h = conv(f"{key}.skip_connection", h)
        return h + conv(f"{key}.out_layers.3", F.silu(inner))

    def heads_of(qkv: torch.Tensor, heads: int, new_order: bool) -> torch.Tensor:
        """(batch, positions, 3 C) -> softmax(q k / sqrt(d)) v, (batch, positions, C)"""
        if new_order:
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        else:
            q, k, v = qkv.unflatten(-1, (heads, 3, -1)).unbind(-2)
        weight = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weight, v).flatten(-2)

    def attention(key: str, h: torch.Tensor) -> torch.Tensor:
        if f"{key}.qkv.weight" not in weights:
            return h
        heads = config.get("num_heads", 1) if size == -1 else h.shape[1] // size
        qkv = linear(f"{key}.qkv", norm(f"{key}.norm", h).flatten(2).mT)
        attended = heads_of(qkv, heads, config.get("use_new_attention_order", False))
        return h + linear(f"{key}.proj_out", attended).mT.reshape(h.shape)

    frequencies = torch.exp(-math.log(10000) * torch.arange(base // 2, dtype=torch.float32) / (base // 2))
    angles = t[:, None].float() * frequencies
    embedding = linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=-1).to(x))
    embedding = linear("time_embed.2", F.silu(embedding))
    if y is not None:
        embedding = embedding + weights["label_emb.weight"][y]
    h = conv("input_blocks.0.0", x)
    stack = [h]
    for entry in range(1, len(config["channel_mult"]) * (layers + 1)):
        key = f"input_blocks.{entry}"
        if entry % (layers + 1):
            h = attention(f"{key}.1", residual(f"{key}.0", h))
        elif config.get("resblock_updown"):
            h = residual(f"{key}.0", h, down)
        else:
            h = conv(f"{key}.0.op", h, stride=2)
        stack.append(h)
    h = residual("middle_block.2", attention("middle_block.1", residual("middle_block.0", h)))
    match config.get("pool"):
        case "attention":
            h = F.silu(norm("out.0", h)).flatten(2)
            tokens = torch.cat([h.mean(-1, keepdim=True), h], dim=-1) + weights["out.2.positional_embedding"]
            return linear(
                "out.2.c_proj", heads_of(linear("out.2.qkv_proj", tokens.mT), h.shape[1] // size, True)[:, 0]
            )
        case "adaptive":
            return conv("out.3", F.silu(norm("out.0", h)).mean((2, 3), keepdim=True)).flatten(1)
        case "spatial":
            return linear("out.2", linear("out.0", torch.cat([f.mean((2, 3)) for f in [*stack, h]], dim=1)).relu())
        case "spatial_v2":
            hidden = linear("out.0", torch.cat([f.mean((2, 3)) for f in [*stack, h]], dim=1))
            return linear("out.3", F.silu(norm("out.1", hidden)))
    entry = 0
    for level in reversed(range(len(config["channel_mult"]))):
        for layer in range(layers + 1):
            key = f"output_blocks.{entry}"
            h = attention(f"{key}.1", residual(f"{key}.0", torch.cat([h, stack.pop()], dim=1)))
            if level and layer == layers:
                key = f"{key}.{1 + (f'{key}.1.qkv.weight' in weights)}"
                h = residual(key, h, up) if config.get("resblock_updown") else conv(f"{key}.conv", up(h))
            entry += 1
    return conv("out.2", F.silu(norm("out.0", h)))


def draw(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """float32 weights under the authors' names, none of them zero."""
    random, weights = np.random.RandomState(seed), {}
    for key, shape in sorted(shapes_of(config).items()):
        z = random.standard_normal(shape)
        if key.endswith("bias"):
            z = 0.05 * z
        elif len(shape) == 1:
            z = 1 + 0.1 * z
        elif key.endswith("positional_embedding"):
            z = z / math.sqrt(shape[0])
        elif key != "label_emb.weight":
            z = z / math.sqrt(math.prod(shape[1:]))
        weights[key] = torch.from_numpy(z.astype(np.float32))
    return weights


# ---------------------------------------------------------------------------------------------- the recorded numbers


@functools.cache
def recorded(name: str) -> tuple[dict, dict, dict]:
    """Weights, arguments, and inputs, output and gradient. For every test the same, so not to be changed.

    Of some networks only the largest output is recorded: what `forward` gives, which is proved by the others, has it.
    """
    index, unet = _NETS[name], name in _UNETS
    config = dict(index["flags"])
    if index["cls"] == "SuperResModel":
        config["in_channels"] *= 2
    weights = draw(config, index["seed"])
    assert sum(weight.numel() for weight in weights.values()) == index["params"]
    x = np.random.RandomState((1000 if unet else 2000) + index["seed"]).standard_normal((3, 3, 16, 16))
    arrays = {"x": x, "t": np.array([0, 417, 999]), "y": np.array([0, 3, 1])}
    if (path := _FOLDER / f"{name}_io.npz").exists():
        with np.load(path) as file:
            assert np.array_equal(file["x"], x)
            arrays = dict(file)
    arrays = {key: torch.from_numpy(array) for key, array in arrays.items()}
    x = arrays["x"].requires_grad_()
    arrays["sample"] = x
    if "low_res" in arrays:
        arrays["sample"] = torch.cat([x, F.interpolate(arrays["low_res"], (16, 16), mode="bilinear")], dim=1)
    arrays["class_labels"] = arrays["y"] if config.get("num_classes") else None
    output, gradient = output_and_gradient(lambda *inputs: forward(weights, config, *inputs), arrays, unet)
    assert output.abs().max().item() == pytest.approx(index["out_max"], abs=1e-12)
    assert unet or gradient.abs().max().item() == pytest.approx(index["grad_max"], abs=1e-14)
    if path.exists():
        output_f64, gradient_f64 = (
            arrays[key] for key in (("out_f64", "grad_sumsq_eps_f64") if unet else ("logits_f64", "grad_logp_y_f64"))
        )
        assert (output - output_f64).abs().max() < (1e-12 if unet else 1e-13)
        assert (gradient - gradient_f64).abs().max() < (1e-12 if unet else 1e-14)
        output, gradient = output_f64, gradient_f64
    return weights, config, arrays | {"output": output, "gradient": gradient}


def output_and_gradient(network: Callable, arrays: dict, unet: bool, dtype: torch.dtype = torch.float64) -> tuple:
    """d/dx of sum(eps^2) for a U-Net, of log p(y) for a classifier."""
    inputs = [arrays["sample"].to(dtype), arrays["t"], *([arrays["class_labels"]] if unet else [])]
    output = network(*inputs)
    target = output[:, :3].square() if unet else output.log_softmax(-1).gather(1, arrays["y"][:, None])
    [gradient] = torch.autograd.grad(target.sum(), arrays["x"])
    return output.detach(), gradient


def errors(name: str, model: UNet2DModel | NoisyClassifier, dtype: torch.dtype = torch.float64) -> list[float]:
    """Largest deviations of output and gradient from what is recorded."""
    _, _, arrays = recorded(name)
    unet, model = name in _UNETS, model.to(dtype)
    network = (lambda x, t, y: model(x, t, class_labels=y).sample) if unet else model
    found = output_and_gradient(network, arrays, unet, dtype)
    return [(a - b).abs().max().item() for a, b in zip(found, (arrays["output"], arrays["gradient"]), strict=True)]


@pytest.mark.parametrize("name", _UNETS)
def test_unets(name: str) -> None:
    weights, config, _ = recorded(name)
    unet = convert_unet_state_dict(weights, config)
    needs_own_class = name in ("unet_num_heads4", "unet_half_mult")
    assert type(unet) is (ADMUNet2DModel if needs_own_class else UNet2DModel) and not unet.training
    output, gradient = errors(name, unet, torch.float32)
    assert output < 2e-5 and gradient < 1e-4
    output, gradient = errors(name, unet)
    assert output < 1e-12 and gradient < 1e-12


@pytest.mark.parametrize("name", _CLASSIFIERS)
def test_classifiers(name: str) -> None:
    weights, config, _ = recorded(name)
    classifier = convert_classifier_state_dict(weights, config)
    assert not classifier.training
    logits, gradient = errors(name, classifier, torch.float32)
    assert logits < 5e-6 and gradient < 5e-7
    logits, gradient = errors(name, classifier)
    assert logits < 1e-13 and gradient < 1e-14


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("unet_legacy_heads", {"use_new_attention_order": True}),
        ("unet_new_order", {"use_new_attention_order": False}),
        ("unet_legacy_heads", {"num_head_channels": 32}),
        ("unet_new_order", {"num_head_channels": 64}),
        ("unet_num_heads4", {"num_head_channels": 8}),  # what loads into a stock UNet2DModel
        ("unet_num_heads4", {"num_heads": 1}),
        ("classifier_attention", {"use_new_attention_order": True}),
        ("classifier_attention", {"num_head_channels": 32}),
    ],
)
def test_heads_and_their_order_matter(name: str, wrong: dict) -> None:
    weights, config, _ = recorded(name)
    turn = convert_unet_state_dict if name in _UNETS else convert_classifier_state_dict
    assert errors(name, turn(weights, config | wrong))[0] > 0.1


def test_epsilon_and_the_norm_in_the_middle_matter() -> None:
    weights, config, _ = recorded("unet_legacy_heads")
    unet = convert_unet_state_dict(weights, config)
    unet.mid_block.attentions[0].group_norm = None
    assert errors("unet_legacy_heads", unet)[0] > 0.1
    unet = convert_unet_state_dict(weights, config)
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    assert errors("unet_legacy_heads", unet)[0] > 5e-5


def test_weights_are_copied() -> None:
    weights, config, _ = recorded("unet_new_order")
    unet = convert_unet_state_dict({key: weight.half() for key, weight in weights.items()}, config)
    assert unet.dtype == torch.float32
    before = weights["out.2.bias"].clone()
    unet = convert_unet_state_dict(weights, config)
    with torch.no_grad():
        unet.conv_out.bias += 1
    assert torch.equal(weights["out.2.bias"], before)


# ------------------------------------------------------------------------------------------ the published checkpoints


def save_published(name: str, path: Path) -> None:
    """A file with the names and shapes of a published checkpoint, in which every weight is one number."""
    config, _ = config_from_flags(converter._RELEASED[name], name.endswith("_classifier"))
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes_of(config).items()}, path)


@pytest.mark.parametrize("name", _PARAMETERS)
def test_names_and_shapes_of_published_checkpoints(name: str) -> None:
    classifier = name.endswith("_classifier")
    config, _ = config_from_flags(converter._RELEASED[name], classifier)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(config).items()}
    model = (converter._build_classifier if classifier else converter._build_unet)(config)
    assert converter._problems(model, weights) == {}
    assert sum(weight.numel() for weight in weights.values()) == _PARAMETERS[name]
    assert model.num_parameters() == _PARAMETERS[name]
    own = name in ("128x128_diffusion", "512x512_diffusion", "64_256_upsampler")
    assert type(model) is (NoisyClassifier if classifier else ADMUNet2DModel if own else UNet2DModel)


def test_all_names_are_tested() -> None:
    assert list(_PARAMETERS) == list(converter._RELEASED)


# as narrow as 32 groups and the heads allow
@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("64x64_diffusion", "--num_channels 32 --num_head_channels 32"),
        ("128x128_diffusion", "--num_channels 32"),
        ("256x256_diffusion", "--num_channels 32"),
        ("256x256_diffusion_uncond", "--num_channels 32"),
        ("512x512_diffusion", "--num_channels 64"),
        ("64_256_upsampler", "--num_channels 32"),
        ("128_512_upsampler", "--num_channels 32 --num_head_channels 32"),
        ("lsun_bedroom", "--num_channels 32"),
    ],
)
def test_topologies_of_published_unets(name: str, narrow: str, tmp_path: Path) -> None:
    flags = f"{converter._RELEASED[name]} {narrow}"
    config, noise = config_from_flags(flags, num_classes=5)
    weights = draw(config, seed=0)
    torch.save(weights, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", flags=flags, num_classes=5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is ClassifierGuidancePipeline and type(pipe.scheduler) is GuidedScheduler
    assert pipe.unet.config.sample_size == int(config["image_size"])
    assert noise.items() <= dict(pipe.scheduler.config).items()
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert (pipe.scheduler.config.beta_schedule == "linear") == (name != "64x64_diffusion")
    x = torch.randn(1, config["in_channels"], 64, 64, dtype=torch.float64, generator=torch.manual_seed(1))
    t, y = torch.tensor([417]), torch.tensor([3]) if config["num_classes"] else None
    with torch.no_grad():
        expected = forward(weights, config, x, t, y)
        found = pipe.unet.double()(x, t, class_labels=y).sample
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("name", "width"),
    [("64x64_classifier", 64), ("128x128_classifier", 64), ("256x256_classifier", 32), ("512x512_classifier", 64)],
)
def test_topologies_of_published_classifiers(name: str, width: int, tmp_path: Path) -> None:
    flags = f"{converter._RELEASED[name]} --classifier_width {width}"
    config, noise = config_from_flags(flags, classifier=True, num_classes=5)
    weights = draw(config, seed=0)
    save_file(weights, tmp_path / "model.safetensors")
    names = {number: f"class {number}" for number in range(5)}
    convert(
        tmp_path / "model.safetensors", tmp_path / "out", flags=flags, classifier=True, num_classes=5, id2label=names
    )
    classifier = NoisyClassifier.from_pretrained(tmp_path / "out")
    assert classifier.config.sample_size == int(name.partition("x")[0])
    levels = classifier.config.trained_alphas_cumprod
    assert levels == noise_levels(GuidedScheduler(**noise))
    cosine = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    linear = math.exp(-(0.1 * 0.5 + 9.95 * 0.25))
    assert levels[2] == pytest.approx(cosine if name == "64x64_classifier" else linear, rel=1e-2)
    assert classifier.config.id2label == names
    size = config["image_size"]
    dtype = torch.float64 if size < 512 else torch.float32
    x, t = torch.randn(1, 3, size, size, dtype=dtype, generator=torch.manual_seed(1)), torch.tensor([417])
    with torch.no_grad():
        expected = forward(weights, config, x, t)
        found = classifier.to(dtype)(x, t)
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() < (1e-12 if size < 512 else 5e-6)


@pytest.mark.parametrize(
    ("given", "name", "fitting"),
    [
        ("256x256_diffusion", "256x256_diffusion_uncond", "256x256_diffusion: give"),
        (
            "lsun_cat",
            "256x256_diffusion",
            "256x256_diffusion_uncond, lsun_bedroom, lsun_cat, lsun_horse, lsun_horse_nodropout: give",
        ),
        ("512x512_diffusion", "256x256_diffusion", "512x512_diffusion: give"),
        ("128_512_upsampler", "64_256_upsampler", "128_512_upsampler: give"),
        ("64x64_classifier", "64x64_diffusion", "64x64_classifier: give"),
        ("128x128_diffusion", "128x128_classifier", "128x128_diffusion: give"),
        ("256x256_classifier", "512x512_classifier", "256x256_classifier: give"),
    ],
)
def test_a_wrong_name_is_put_right(
    given: str, name: str, fitting: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_published(given, tmp_path / "model.pt")
    words = ["convert", "guided-diffusion", str(tmp_path / "model.pt"), str(tmp_path / "out"), "--name", name]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"names and shapes of the published {fitting} such a `name`" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A U-Net and a classifier of 10 classes as the authors' trainers leave them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save(draw(config_from_flags(_TINY)[0], seed=1), "ema_0.9999_000100.pt")
    torch.save(draw(config_from_flags(_TINY_CLASSIFIER, True, 10)[0], seed=2), "model000100.pt")
    Path("names.json").write_text(json.dumps([f"digit {number}" for number in range(10)]))
    return tmp_path


def test_unet_and_classifier_in_one_folder(files: Path, capsys: pytest.CaptureFixture) -> None:
    flags = f"{_TINY} {_TINY_CLASSIFIER} --noise_schedule cosine"
    words = ["ema_0.9999_000100.pt", "models/both", "--flags", flags, "--classifier_checkpoint", "model000100.pt"]
    words += ["--num_classes", "10", "--id2label", "names.json"]
    assert main(["convert", "guided-diffusion", *words]) == 0
    assert "wrote models/both: ClassifierGuidancePipeline for 64 x 64" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained("models/both")
    assert "ema_0.9999_000100.pt" in Path("models/both/README.md").read_text()
    pipe.set_progress_bar_config(disable=True)
    # The networks and the noise fit each other, and the names are known: a sample is steered towards one.
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    steered, number, free = (
        pipe(label, guidance_scale=scale, generator=torch.manual_seed(0), **arguments).images
        for label, scale in (("digit 3", 1.0), (3, 1.0), (3, 0.0))
    )
    assert torch.equal(steered, number) and not torch.equal(steered, free)

    # The classifier alone is the same.
    words = ["model000100.pt", "alone", "--classifier", "--flags", f"{_TINY_CLASSIFIER} --noise_schedule cosine"]
    assert main(["convert", "guided-diffusion", *words, "--num_classes", "10", "--id2label", "names.json"]) == 0
    assert "wrote alone: NoisyClassifier for 64 x 64" in capsys.readouterr().out
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert Path("alone", file).read_bytes() == Path("models/both/classifier", file).read_bytes()


def test_a_conditional_unet_knows_the_names(files: Path) -> None:
    flags = f"{_TINY} --class_cond True --num_heads 2 --num_head_channels -1"
    torch.save(draw(config_from_flags(flags, num_classes=10)[0], seed=3), "conditional.pt")
    words = ["conditional.pt", "out", "--flags", flags, "--num_classes", "10", "--id2label", "names.json"]
    assert main(["convert", "guided-diffusion", *words]) == 0
    pipe = ClassifierGuidancePipeline.from_pretrained("out")
    assert type(pipe.unet) is ADMUNet2DModel and pipe.classifier is None
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(label, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
        for label in ("digit 3", 3, 4)
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_an_upsampler_enlarges(files: Path) -> None:
    flags = "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --num_heads 4 --learn_sigma True"
    torch.save(draw(config_from_flags(flags)[0], seed=4), "upsampler.pt")
    pipe = convert("upsampler.pt", "out", flags=flags)
    pipe.set_progress_bar_config(disable=True)
    small = torch.rand(1, 3, 16, 16, generator=torch.manual_seed(0))
    images = pipe(low_res=small, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    other = pipe(low_res=1 - small, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and not torch.equal(images, other)


def test_an_unconditional_folder_is_for_inpainting_too(files: Path) -> None:
    Path("out").mkdir()  # an empty folder is filled
    pipe = convert("ema_0.9999_000100.pt", "out", flags=_TINY)
    image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    inpainters = [
        CoPaintPipeline.from_pipe(pipe),
        CoPaintPipeline.from_pipe(DiffusionPipeline.from_pretrained("out")),
        CoPaintPipeline.from_pretrained("out", trust_remote_code=True),
    ]
    results = []
    for inpainter in inpainters:
        inpainter.set_progress_bar_config(disable=True)
        generator = torch.manual_seed(0)
        results.append(inpainter(image, mask, num_inference_steps=2, generator=generator, output_type="pt").images)
    assert results[0].shape == image.shape
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_examples_in_docstrings(files: Path) -> None:
    result = doctest.testmod(converter)
    assert result.attempted >= 14 and result.failed == 0


# ---------------------------------------------------------------------------------------------------------- the flags


def test_flags_and_their_defaults() -> None:
    network, noise = config_from_flags("")
    assert network == {
        "image_size": 64,
        "in_channels": 3,
        "model_channels": 128,
        "out_channels": 3,
        "num_res_blocks": 2,
        "attention_resolutions": (4, 8),
        "dropout": 0.0,
        "channel_mult": (1, 2, 3, 4),
        "num_classes": None,
        "num_heads": 4,
        "num_head_channels": -1,
        "num_heads_upsample": -1,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_new_attention_order": False,
    }
    assert noise["variance_type"] == "fixed_large" and noise["prediction_type"] == "epsilon"
    words = ["--image_size=32", "--channel_mult", "1,2,2", "--class_cond", "yes", "--resblock_updown", "T"]
    words += [
        "--diffusion_steps",
        "4000",
        "--predict_xstart",
        "1",
        "--rescale_timesteps",
        "true",
        "--use_fp16",
        "True",
    ]
    network, noise = config_from_flags(words)
    assert network["channel_mult"] == (1, 2, 2) and network["attention_resolutions"] == (2, 4)
    assert network["num_classes"] == 1000 and network["resblock_updown"] is True
    assert noise["prediction_type"] == "sample" and noise["rescale_timesteps"] is True
    scheduler = GuidedScheduler(**noise)
    # linear betas of any number of steps go from abar = 1 to the same end
    betas = np.linspace(0.25 * 1e-4, 0.25 * 0.02, 4000)
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-14)
    network, _ = config_from_flags("--large_size 512 --small_size 128 --class_cond True")
    assert network["in_channels"] == 6 and network["image_size"] == 512
    assert network["channel_mult"] == (1, 1, 2, 2, 4, 4)
    network, _ = config_from_flags("--num_channels 64 --classifier_depth 4", classifier=True, num_classes=7)
    assert network["model_channels"] == 128 and network["num_res_blocks"] == 4 and network["out_channels"] == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 4", "'--batch_size 4' is none of the flags"),
        ("--image_siz 64", "'--image_siz 64' is none of the flags"),
        ("64", "'64' is none of the flags"),
        ("--large_size 256 --use_new_attention_order True", "flags that describe an upsampler"),
        ("--large_size 128", r"`large_size` is 128.*\[64, 256, 512\]"),
        ("--image_size 32", "`image_size` is 32.*`channel_mult`"),
        ("--class_cond maybe", "'maybe' is neither True nor False"),
        ("--num_heads four", "invalid int value: 'four'"),
        ("--num_heads", "expected one argument"),
        ("--attention_resolutions 0", "cannot be used"),
        ("--attention_resolutions ''", "cannot be used"),
        ("--noise_schedule sqrt", "`noise_schedule` is 'sqrt'"),
        ("--diffusion_steps 1", "`diffusion_steps` is 1"),
        ("--image_size '64", "No closing quotation"),
    ],
)
def test_flags_that_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_flags(flags)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": None}, r"lacks \['model_channels'\]"),
        ({"pool": "attention"}, r"unknown \['pool'\]"),
        ({"conv_resample": False}, r"unknown \['conv_resample'\]"),
        ({"channel_mult": (1, 1.5)}, r"\[32, 48\].*multiple of 32"),
        ({"channel_mult": ()}, "multiple of 32"),
        ({"num_head_channels": 48}, r"`num_head_channels` is 48, but must divide the \[64\]"),
        ({"num_head_channels": 0}, "`num_head_channels` is 0"),
        ({"num_head_channels": -1, "num_heads": 3}, r"`num_heads` is 3, but must divide the \[64\]"),
        ({"num_head_channels": -1, "num_heads_upsample": 2}, "`num_heads_upsample` is 2 and `num_heads` is 1"),
        ({"attention_resolutions": []}, "`input_blocks.3.1.norm.bias` is unknown"),
        (
            {"num_res_blocks": 2},
            r"`input_blocks.3.0.in_layers.2.bias` has shape \(64,\) instead of \(32,\).*and \d+ more",
        ),
        ({"resblock_updown": False}, r"`input_blocks.2.0.emb_layers.1.bias` is unknown.*and \d+ more"),
        ({"num_classes": None}, "`label_emb.weight` is unknown"),
        ({"num_classes": 10}, r"`label_emb.weight` has shape \(5, 128\) instead of \(10, 128\)"),
        ({"in_channels": 6}, r"`input_blocks.0.0.weight` has shape \(32, 3, 3, 3\) instead of \(32, 6, 3, 3\)"),
    ],
)
def test_unets_that_are_refused(change: dict, message: str) -> None:
    weights, config, _ = recorded("unet_legacy_heads")
    with pytest.raises(ValueError, match=message):
        convert_unet_state_dict(weights, config | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_head_channels": -1}, "`num_head_channels` is -1"),
        ({"num_classes": 5}, r"unknown \['num_classes'\]"),
        ({"pool": "max"}, "`pool` is 'max'"),
        ({"pool": "adaptive"}, "`out.2.c_proj.bias` is unknown.*`out.3.bias` is missing"),
        ({"image_size": 32}, r"`out.2.positional_embedding` has shape \(64, 65\) instead of \(64, 257\)"),
        ({"out_channels": 6}, r"`out.2.c_proj.weight` has shape \(5, 64, 1\) instead of \(6, 64\)"),
    ],
)
def test_classifiers_that_are_refused(change: dict, message: str) -> None:
    weights, config, _ = recorded("classifier_attention")
    with pytest.raises(ValueError, match=message):
        convert_classifier_state_dict(weights, config | change)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("out.2.weight", None, "`out.2.weight` is missing"),
        ("middle_block.1.qkv.weight", None, "`middle_block.1.qkv.weight` is missing"),
        ("extra.weight", torch.zeros(1), "UNet2DModel: `extra.weight` is unknown. They are of no published"),
        ("middle_block.1.qkv.weight", torch.zeros(64, 64, 1), r"has shape \(64, 64, 1\) instead of \(192, 64\)"),
        ("middle_block.1.qkv.weight", torch.zeros(192, 64, 3), r"has shape \(192, 64, 3\) instead of \(192, 64\)"),
    ],
)
def test_weights_that_are_refused(key: str, value: torch.Tensor | None, message: str) -> None:
    weights, config, _ = recorded("unet_legacy_heads")
    weights = weights | {key: value} if value is not None else {name: weights[name] for name in weights if name != key}
    with pytest.raises(ValueError, match=message):
        convert_unet_state_dict(weights, config)


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("model.pt", None, [], "No such file"),
        ("model.pt", b"not a checkpoint", [], "`model.pt` cannot be read as a checkpoint of tensors"),
        ("model.pt", {"weight": Path()}, [], "cannot be read"),  # would run code
        ("model.pt", {"state_dict": {}, "step": 1}, [], "`model.pt` holds ['state_dict', 'step'], but must hold"),
        ("model.pt", [1, 2], [], "`model.pt` holds list"),
        ("model.safetensors", b"not a checkpoint", [], "`model.safetensors` cannot be read"),
        ("names.json", b"{", ["--id2label", "names.json"], "`names.json` cannot be read as names of classes"),
        ("names.json", b"1", ["--id2label", "names.json"], "`names.json` cannot be read as names of classes"),
        ("names.json", b'{"a": "b"}', ["--id2label", "names.json"], "`names.json` cannot be read as names of classes"),
        ("names.json", b'["a"]', ["--id2label", "names.json"], "names 1 classes, but the networks know 0"),
        ("out", b"mine", [], "out` exists and is not an empty folder"),
        ("out/mine", b"mine", [], "out` exists and is not an empty folder"),
    ],
)
def test_input_that_is_refused(
    files: Path, capsys: pytest.CaptureFixture, name: str, content: object, words: list[str], message: str
) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        torch.save(content, name)
    checkpoint = name if name.startswith("model.") else "ema_0.9999_000100.pt"
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert main(["convert", "guided-diffusion", checkpoint, "out", "--flags", _TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`name` is None and `flags` is None"),
        ({"name": "lsun_cat", "flags": _TINY}, "give one of them"),
        ({"name": "1024x1024_diffusion"}, "must be one of"),
        ({"name": "lsun_cat", "num_classes": 10}, "`num_classes` is 10"),
        ({"name": "lsun_cat", "classifier": True}, "`classifier` is true, but `name` is 'lsun_cat'"),
        ({"name": "64x64_classifier", "classifier_checkpoint": "a.pt"}, "`checkpoint` is a classifier"),
        ({"flags": _TINY, "num_classes": 0}, "`num_classes` is 0"),
        ({"flags": _TINY, "id2label": {0: "a"}}, "the networks know 0"),
    ],
)
def test_arguments_that_are_refused(files: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert("ema_0.9999_000100.pt", "out", **arguments)
    assert not Path("out").exists()
