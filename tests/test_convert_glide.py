"""OpenAI's GLIDE checkpoints -> diffusers folders, against the networks written out from their formulas.

`shapes` has the names and shapes of OpenAI's weights by the settings that they were published with; `run_unet` and
`run_text` compute on weights under those names.
"""

import argparse
import doctest
import functools
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

import diffusers_ext.convert.glide
from diffusers_ext import GlidePipeline
from diffusers_ext.cli import main
from diffusers_ext.convert.glide import add_arguments, convert_text_encoder, convert_unet, run

# kind -> input channels, multiples of the base width, residual blocks per level, levels with attention
NETWORKS = {
    "base": (3, (1, 2, 3, 4), 3, (1, 2, 3)),
    "base-inpaint": (7, (1, 2, 3, 4), 3, (1, 2, 3)),
    "upsample": (6, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)),
    "upsample-inpaint": (10, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)),
}
FULL = {"base": 385030726, "base-inpaint": 385037638, "upsample": 398361286, "upsample-inpaint": 398368198}
HEAD_DIM, TEXT_HEADS, TEXT_LAYERS = 32, 4, 2
TINY = {"channels": 32, "width": 64, "text_layers": TEXT_LAYERS, "positions": 12, "vocabulary": 260}
TEXT = re.compile(r"transformer\.|final_ln|token_emb|positional|padding|transformer_proj")


# ------------------------------------------------------------------------------------- the networks, by their formulas


def layout(kind, channels):
    """Per entry of `input_blocks` and `output_blocks` its parts: (kind, channels in, out) or (attention, channels)."""
    in_channels, multipliers, layers, attended = NETWORKS[kind]
    widths = [m * channels for m in multipliers]
    down, skips, now = [[("conv", in_channels, channels)]], [channels], channels
    for level, width in enumerate(widths):
        for _ in range(layers):
            down.append([("res", now, width)] + [("attention", width)] * (level in attended))
            now = width
            skips.append(now)
        if level + 1 < len(widths):
            down.append([("down", now, now)])
            skips.append(now)
    middle = [("res", now, now), ("attention", now), ("res", now, now)]
    up = []
    for level, width in reversed(list(enumerate(widths))):
        for i in range(layers + 1):
            entry = [("res", now + skips.pop(), width)] + [("attention", width)] * (level in attended)
            up.append(entry + [("up", width, width)] * (i == layers and level > 0))
            now = width
    return down, middle, up


def shapes(kind, channels=192, width=512, text_layers=16, positions=128, vocabulary=50257):
    found = {}

    def layer(name, *shape):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    time = 4 * channels
    layer("time_embed.0", time, channels)
    layer("time_embed.2", time, time)
    down, middle, up = layout(kind, channels)
    entries = {f"input_blocks.{i}": entry for i, entry in enumerate(down)}
    entries |= {"middle_block": middle} | {f"output_blocks.{i}": entry for i, entry in enumerate(up)}
    for place, entry in entries.items():
        for j, (part, first, *rest) in enumerate(entry):
            name = f"{place}.{j}"
            if part == "conv":
                layer(name, rest[0], first, 3, 3)
            elif part == "attention":
                layer(f"{name}.norm", first)
                layer(f"{name}.qkv", 3 * first, first, 1)
                layer(f"{name}.encoder_kv", 2 * first, width, 1)
                layer(f"{name}.proj_out", first, first, 1)
            else:
                layer(f"{name}.in_layers.0", first)
                layer(f"{name}.in_layers.2", rest[0], first, 3, 3)
                layer(f"{name}.emb_layers.1", 2 * rest[0], time)
                layer(f"{name}.out_layers.0", rest[0])
                layer(f"{name}.out_layers.3", rest[0], rest[0], 3, 3)
                if first != rest[0]:
                    layer(f"{name}.skip_connection", rest[0], first, 1, 1)
    layer("out.0", channels)
    layer("out.2", 6, channels, 3, 3)
    found["token_embedding.weight"] = (vocabulary, width)
    found["positional_embedding"] = found["padding_embedding"] = (positions, width)
    for i in range(text_layers):
        name = f"transformer.resblocks.{i}"
        layer(f"{name}.ln_1", width)
        layer(f"{name}.attn.c_qkv", 3 * width, width)
        layer(f"{name}.attn.c_proj", width, width)
        layer(f"{name}.ln_2", width)
        layer(f"{name}.mlp.c_fc", 4 * width, width)
        layer(f"{name}.mlp.c_proj", width, 4 * width)
    layer("final_ln", width)
    layer("transformer_proj", time, width)
    return found


def attend(query, key, value):
    """softmax(q k' / sqrt(d)) v on (batch, heads, positions, d)."""
    return ((query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5).softmax(-1) @ value


def split_heads(x, heads, count):
    """(batch, positions, count * C), where each head has its `count` parts together -> `count` of (b, heads, n, d)."""
    return x.unflatten(-1, (heads, count, -1)).permute(3, 0, 2, 1, 4)


def run_text(w, tokens, mask, heads=TEXT_HEADS):
    def dense(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = torch.where(
        mask[..., None], w["token_embedding.weight"][tokens] + w["positional_embedding"], w["padding_embedding"]
    )
    for i in range(sum(key.endswith("ln_1.bias") for key in w)):
        name = f"transformer.resblocks.{i}"
        parts = split_heads(dense(f"{name}.attn.c_qkv", norm(f"{name}.ln_1", x)), heads, 3)
        x = x + dense(f"{name}.attn.c_proj", attend(*parts).transpose(1, 2).flatten(2))
        h = dense(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", x))
        x = x + dense(f"{name}.mlp.c_proj", h * (1 + torch.erf(h / 2**0.5)) / 2)
    x = norm("final_ln", x)
    return x, dense("transformer_proj", x[:, -1])


def run_unet(w, kind, x, timesteps, hidden_states, text_embeds, head_dim=HEAD_DIM):
    def conv(name, x):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def dense(name, x):
        return F.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    def residual(name, x, part):
        h = F.silu(norm(f"{name}.in_layers.0", x))
        if part == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if part == "up":
            h, x = (y.repeat_interleave(2, 2).repeat_interleave(2, 3) for y in (h, x))
        h = conv(f"{name}.in_layers.2", h)
        scale, shift = dense(f"{name}.emb_layers.1", F.silu(emb))[..., None, None].chunk(2, 1)
        h = conv(f"{name}.out_layers.3", F.silu(norm(f"{name}.out_layers.0", h) * (1 + scale) + shift))
        return h + (conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)

    def attention(name, x):
        heads = x.shape[1] // head_dim
        h = norm(f"{name}.norm", x).flatten(2).transpose(1, 2)
        query, key, value = split_heads(dense(f"{name}.qkv", h), heads, 3)
        text_key, text_value = split_heads(dense(f"{name}.encoder_kv", hidden_states), heads, 2)
        h = attend(query, torch.cat([text_key, key], 2), torch.cat([text_value, value], 2))
        return x + dense(f"{name}.proj_out", h.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)

    def entry(place, parts, x):
        for j, (part, *_) in enumerate(parts):
            name = f"{place}.{j}"
            if part == "conv":
                x = conv(name, x)
            else:
                x = attention(name, x) if part == "attention" else residual(name, x, part)
        return x

    channels = w["input_blocks.0.0.weight"].shape[0]
    # in single precision, as both libraries do
    rates = torch.exp(-math.log(10000) * torch.arange(channels // 2, dtype=torch.float32) / (channels // 2))
    angles = timesteps[:, None].float() * rates
    emb = dense("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1).to(x))
    emb = dense("time_embed.2", F.silu(emb)) + text_embeds
    down, middle, up = layout(kind, channels)
    skips = []
    for i, parts in enumerate(down):
        x = entry(f"input_blocks.{i}", parts, x)
        skips.append(x)
    x = entry("middle_block", middle, x)
    for i, parts in enumerate(up):
        x = entry(f"output_blocks.{i}", parts, torch.cat([x, skips.pop()], 1))
    return conv("out.2", F.silu(norm("out.0", x)))


# ------------------------------------------------------------------------------------------------------------ fixtures


@functools.cache
def drawn(kind, **sizes):
    """Weights under OpenAI's names; for every test the same, so not to be changed."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in shapes(kind, **(TINY | sizes)).items():
        z = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 0.1 * z + name.endswith("weight")
        else:
            weights[name] = z if "embedding" in name else z / math.prod(shape[1:]) ** 0.5
    return weights


def part(weights, is_text):
    return {name: tensor for name, tensor in weights.items() if bool(TEXT.match(name)) is is_text}


def double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def unet_inputs(kind, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, NETWORKS[kind][0], size, size, generator=generator, dtype=torch.float64)
    hidden_states = torch.randn(2, TINY["positions"], TINY["width"], generator=generator, dtype=torch.float64)
    text_embeds = torch.randn(2, 4 * TINY["channels"], generator=generator, dtype=torch.float64)
    return x, torch.tensor([997, 3]), hidden_states, text_embeds


def text_inputs(vocabulary=TINY["vocabulary"]):
    tokens = torch.randint(vocabulary, (3, TINY["positions"]), generator=torch.Generator().manual_seed(2))
    return tokens, torch.arange(TINY["positions"])[None] < torch.tensor([[12], [5], [0]])


def call(unet, x, timesteps, hidden_states, text_embeds):
    with torch.no_grad():
        return unet(x, timesteps, encoder_hidden_states=hidden_states, class_labels=text_embeds).sample


def convert(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The four checkpoints, as narrow as 64 channels per head allow, for as long as this file is tested."""
    folder = tmp_path_factory.mktemp("glide")
    for kind in NETWORKS:
        torch.save(drawn(kind, channels=64 if "base" in kind else 32, text_layers=16), folder / f"{kind}.pt")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def files(checkpoints, tmp_path, monkeypatch):
    """The checkpoints and a small vocabulary, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "Ġthe", "<|endoftext|>"]
    Path("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    Path("merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    assert len(tokens) == TINY["vocabulary"]
    for path in checkpoints.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


VOCABULARY = ("--vocab", "vocab.json", "--merges", "merges.txt")


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("kind", NETWORKS)
def test_unet(kind):
    weights, inputs = part(drawn(kind), False), unet_inputs(kind)
    unet = convert_unet(weights, HEAD_DIM)
    assert type(unet).__module__.startswith("diffusers.") and not unet.training
    expected = run_unet(double(weights), kind, *inputs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(call(unet.double(), *inputs), expected, rtol=0, atol=1e-10)
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    torch.testing.assert_close(call(unet.float(), *single).double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("is_padded", [False, True])
def test_text_encoder(is_padded):
    weights = part(drawn("base"), True)
    encoder = convert_text_encoder(weights, TEXT_HEADS, TEXT_LAYERS).double()
    tokens, mask = text_inputs()
    mask = mask if is_padded else torch.ones_like(mask)
    expected = run_text(double(weights), tokens, mask)
    with torch.no_grad():
        output = encoder(tokens, mask.long() if is_padded else None)
    for mine, theirs in zip(output.to_tuple(), expected, strict=True):
        assert theirs.abs().max() > 1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
def test_full_size(kind):
    """Every name and shape of the published networks is expected, and no other: the converter refuses all else."""
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes(kind).items()}
        unet, encoder = convert_unet(part(weights, False)), convert_text_encoder(part(weights, True))
    counts = [sum(p.numel() for p in model.parameters()) for model in (unet, encoder)]
    assert sum(counts) == sum(tensor.numel() for tensor in weights.values()) == FULL[kind]
    assert counts[1] == 76695808
    config = encoder.config
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (50257, 128, 512)
    assert (config.num_hidden_layers, config.num_attention_heads, config.projection_dim) == (16, 8, 768)
    assert unet.config.sample_size == (64 if "base" in kind else 256)
    heads = {m.heads * 64 == m.to_q.out_features for m in unet.modules() if hasattr(m, "to_q")}
    assert heads == {True}


@pytest.mark.parametrize("head_dim", [16, 8])
def test_heads_of_the_unet_matter(head_dim):
    weights, inputs = part(drawn("base"), False), unet_inputs("base")
    wrong = call(convert_unet(weights, head_dim).double(), *inputs)
    assert (wrong - run_unet(double(weights), "base", *inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_heads_of_the_text_encoder_matter(heads):
    weights, inputs = part(drawn("base"), True), text_inputs()
    wrong = convert_text_encoder(weights, heads, TEXT_LAYERS).double()(*inputs).last_hidden_state
    assert (wrong - run_text(double(weights), *inputs)[0]).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("suffix", ["", "-inpaint"])
def test_folder(files, capsys, suffix):
    convert(f"base{suffix}.pt", "models/mine", "--upsampler", f"upsample{suffix}.pt", *VOCABULARY)
    told = "models/mine: GlidePipeline for 256 x 256" + (", with inpainting" if suffix else "")
    assert capsys.readouterr().out == f"wrote {told}\n"
    pipe = DiffusionPipeline.from_pretrained("models/mine")
    assert type(pipe) is GlidePipeline
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.upsampler_scheduler.config.beta_schedule == "linear"
    for kind, unet, encoder in (
        (f"base{suffix}", pipe.unet, pipe.text_encoder),
        (f"upsample{suffix}", pipe.upsampler, pipe.upsampler_text_encoder),
    ):
        weights = double(torch.load(f"{kind}.pt", weights_only=True))
        hidden_states, text_embeds = run_text(weights, *text_inputs(), heads=8)
        output = encoder.double()(*text_inputs())
        torch.testing.assert_close(output.last_hidden_state, hidden_states, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.text_embeds, text_embeds, rtol=0, atol=1e-10)
        x, timesteps, _, _ = unet_inputs(kind)
        inputs = (x, timesteps, hidden_states[:2], text_embeds[:2])
        expected = run_unet(weights, kind, *inputs, head_dim=64)
        torch.testing.assert_close(call(unet.double(), *inputs), expected, rtol=0, atol=1e-10)
    assert pipe.tokenizer(["the the"]).input_ids == [[257, 258]]
    card = ModelCard.load("models/mine/README.md")
    assert f"base{suffix}.pt, upsample{suffix}.pt" in card.text and "50,257" not in card.text


def test_small_images_alone_safetensors_and_compressed_vocabulary(files):
    save_file(torch.load("base.pt", weights_only=True), "weights.safetensors")
    for name in ("vocab.json", "merges.txt"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    Path("mine").mkdir()
    convert("weights.safetensors", "mine", "--vocab", "vocab.json.gz", "--merges", "merges.txt.gz")
    pipe = GlidePipeline.from_pretrained("mine")
    assert pipe.upsampler is pipe.upsampler_text_encoder is pipe.upsampler_scheduler is None
    expected = torch.load("base.pt", weights_only=True)["input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.conv_in.weight, expected)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("The corgi", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_examples_in_docstrings(files):
    weights = drawn("base-inpaint")
    torch.save(part(weights, False), "unet.pt")
    torch.save(part(weights, True), "text_encoder.pt")
    result = doctest.testmod(diffusers_ext.convert.glide)
    assert result.failed == 0 and result.attempted >= 8


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("is_text", "change", "message"),
    [
        (False, {"out.2.bias": None}, "`out.2.bias` is missing"),
        (False, {"out.3.bias": torch.zeros(6)}, "`out.3.bias` is unknown"),
        (
            False,
            {"middle_block.1.qkv.weight": torch.zeros(9, 128, 1)},
            r"`middle_block.1.qkv.weight` has shape \(9, 128,",
        ),
        (False, {"input_blocks.5.0.skip_connection.weight": torch.zeros(1)}, r"has shape \(1,\)"),
        (False, {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, r"has 4 input channels, but .* 3 \(base\)"),
        (False, {"input_blocks.0.0.weight": None}, "None input channels"),
        (False, {"input_blocks.0.0.weight": torch.zeros(40, 3, 3, 3)}, "40 channels, but .* 32 groups"),
        (False, {"middle_block.1.encoder_kv.weight": None}, "which takes the text, is missing"),
        (False, {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "and [0-9]+ more"),  # another network
        (False, {"input_blocks.0.0.weight": torch.zeros(0, 3, 3, 3)}, "0 channels, but .* 32 groups"),
        (False, {"middle_block.1.encoder_kv.weight": torch.zeros(5, 0, 1)}, "which takes the text, is missing"),
        (False, {"out.2.bias": torch.full((6,), math.nan)}, "`out.2.bias` has values that are not finite"),
        (False, {"out.2.bias": torch.zeros(6, dtype=torch.complex64)}, "`out.2.bias` is torch.strided of .*complex64"),
        (False, {"out.2.bias": torch.zeros(6, dtype=torch.int64)}, "`out.2.bias` is torch.strided of torch.int64"),
        (True, {"final_ln.bias": torch.full((64,), math.inf)}, "`final_ln.bias` has values that are not finite"),
        (True, {"token_embedding.weight": torch.zeros(260, 64).to_sparse()}, "is torch.sparse_coo of torch.float32"),
        (True, {"token_embedding.weight": torch.zeros(260, 0)}, "`hidden_size` is 0, but must be an `int` of at"),
        (True, {"final_ln.weight": None}, "`final_ln.weight` is missing"),
        (True, {"padding_embedding": None}, "`padding_embedding` is missing"),
        (True, {"token_embedding.weight": None}, "no text transformer"),
        (True, {"unemb.weight": torch.zeros(2, 2)}, "`unemb.weight` is unknown"),
        (True, {"transformer.resblocks.1.attn.c_qkv.weight": torch.zeros(64, 64)}, r"has shape \(64, 64\)"),
    ],
)
def test_weights_that_are_refused(is_text, change, message):
    weights = {k: v for k, v in (part(drawn("base"), is_text) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        convert_text_encoder(weights, TEXT_HEADS, TEXT_LAYERS) if is_text else convert_unet(weights, HEAD_DIM)


@pytest.mark.parametrize("layers", ["[01]", "1", "0"])
def test_layers_that_are_missing(layers):
    weights = part(drawn("base"), True)
    weights = {name: w for name, w in weights.items() if not re.match(rf"transformer\.resblocks\.{layers}\.", name)}
    first = min(layers.strip("[]"))
    with pytest.raises(ValueError, match=rf"`transformer.resblocks.{first}.attn.c_proj.bias` is missing.* more"):
        convert_text_encoder(weights, TEXT_HEADS, TEXT_LAYERS)
    with pytest.raises(ValueError, match="`transformer.resblocks.10.attn.c_proj.bias` is missing"):  # 16 by default
        convert_text_encoder(part(drawn("base"), True), TEXT_HEADS)


@pytest.mark.parametrize("heads", [0, -4, 4.0, None])
def test_heads_that_are_no_number(heads):
    with pytest.raises(ValueError, match=f"`attention_head_dim` is {heads}, but must be an `int`"):
        convert_unet(part(drawn("base"), False), heads)
    with pytest.raises(ValueError, match=f"`num_attention_heads` is {heads}, but must be an `int`"):
        convert_text_encoder(part(drawn("base"), True), heads, TEXT_LAYERS)


def test_a_whole_checkpoint_is_not_one_network():
    message = "is unknown, .* and [0-9]+ more. Give all weights of this network, and none of another"
    with pytest.raises(ValueError, match=message) as error:
        convert_unet(drawn("base"), HEAD_DIM)
    assert len(str(error.value)) < 400


def test_a_wrong_name_is_both_missing_and_unknown():
    weights = part(drawn("base"), False)
    weights["input_blocks.1.0.in_layers.1.bias"] = weights.pop("input_blocks.1.0.in_layers.2.bias")
    message = r"`input_blocks.1.0.in_layers.1.bias` is unknown, `input_blocks.1.0.in_layers.2.bias` is missing"
    with pytest.raises(ValueError, match=message):
        convert_unet(weights, HEAD_DIM)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="heads of 64"):
        convert_unet(part(drawn("base"), False), 64)
    with pytest.raises(ValueError, match="`num_attention_heads` is 7"):
        convert_text_encoder(part(drawn("base"), True), 7, TEXT_LAYERS)


class _Code:
    def __reduce__(self):
        return (print, ("this runs on loading",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("upsample.pt", "out"), "`upsample.pt` is a GLIDE upsampler, but was given as the base"),
        (("base.pt", "out", "--upsampler", "base-inpaint.pt"), "is a GLIDE base, but was given as the upsampler"),
        (("base.pt", "out", "--upsampler", "upsample-inpaint.pt"), "one of .* inpaints and the other does not"),
        (("base.pt", "full"), "`full` exists and is not an empty folder"),
        (("base.pt", "merges.txt"), "exists and is not an empty folder"),
        (("base.pt", "new/.."), "`new/..` exists and is not an empty folder"),
        (("base.pt", "loop"), "`loop` exists and is not an empty folder"),
        (("base.pt", "merges.txt/new/out"), "is below `.*merges.txt`, which is no folder"),
        (("intkey.pt", "out"), "something else than weights"),
        (("code.pt", "out"), "would run code"),
        (("merges.txt", "out"), "cannot be read as a checkpoint"),
        (("list.pt", "out"), "something else than weights"),
        (
            ("base.pt", "out", "--vocab", "large.json", "--merges", "large.txt"),
            "knows 260: give the vocabulary of GPT-2",
        ),
        (("base.pt", "out", "--vocab", "merges.txt"), "cannot be read as JSON"),
        (("base.pt", "out", "--vocab", "list.json"), "is no vocabulary"),
        (("base.pt", "out", "--vocab", "base.pt"), "cannot be read as text"),
        (("base.pt", "out", "--merges", "wrong.txt"), r"1 lines that are no pair .*\('x y'\)"),
        (("base.pt", "out", "--merges", "vocab.json"), "1 lines that are no pair .{100,200}$"),
        (
            ("base.pt", "out", "--merges", "empty.txt"),
            "has 0 merges, 0 of them different, but the 260 tokens .* need 3",
        ),
        (("base.pt", "out", "--merges", "short.txt"), "has 2 merges, 2 of them"),
        (("base.pt", "out", "--merges", "double.txt"), "has 4 merges, 3 of them"),
        (("base.pt", "out", "--merges", "again.txt"), "has 3 merges, 2 of them"),
        (("base.pt", "out", "--vocab", "mixed.json"), "is no vocabulary"),
        (("base.pt", "out", "--vocab", "null.json"), "is no vocabulary"),
        (("base.pt", "out", "--vocab", "deep.json"), "cannot be read as JSON"),
        (("base.pt", "out", "--vocab", "damaged.json.gz"), "cannot be read as text"),
        (("base.pt", "out", "--merges", "broken.gz"), "cannot be read as text"),
    ],
)
def test_input_that_is_refused(files, words, message, capsys):
    torch.save(_Code(), "code.pt")
    torch.save([torch.zeros(1)], "list.pt")
    (files / "full").mkdir()
    (files / "full" / "mine").write_text("keep")
    tokens = json.loads(Path("vocab.json").read_text())
    Path("large.json").write_text(json.dumps(tokens | {"he": len(tokens)}))
    merges = Path("merges.txt").read_text(encoding="utf-8")
    for name, text in {
        "large.txt": f"{merges}h e\n",
        "empty.txt": "",
        "short.txt": merges.removesuffix("Ġ the\n"),
        "double.txt": f"{merges}t h\n",
        "again.txt": merges.replace("Ġ the", "t h"),
        "mixed.json": '{"a": "x", "b": 1}',
        "null.json": '{"a": null, "b": 0}',
        "deep.json": "[" * 100000,
    }.items():
        Path(name).write_text(text, encoding="utf-8")
    packed = bytearray(gzip.compress(Path("vocab.json").read_bytes()))
    packed[20:60] = b"\xff" * 40
    Path("damaged.json.gz").write_bytes(packed)
    torch.save({1: torch.zeros(1)}, "intkey.pt")
    Path("loop").symlink_to("loop")
    Path("list.json").write_text("[1, 2]")
    Path("wrong.txt").write_text("#version: 0.2\nt h\nx y\n")
    Path("broken.gz").write_text("no gzip")
    before = sorted(path.name for path in files.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert(*words[:2], *VOCABULARY, *words[2:])
    assert sorted(path.name for path in files.rglob("*")) == before, "nothing is left behind"
    assert "this runs" not in capsys.readouterr().out


def test_files_that_do_not_exist(files):
    with pytest.raises(FileNotFoundError, match="nosuch"):
        convert("nosuch.pt", "out", *VOCABULARY)
    with pytest.raises(FileNotFoundError, match="nosuch"):
        convert("base.pt", "out", "--vocab", "nosuch.json", "--merges", "merges.txt")


@pytest.mark.parametrize("data", [b".", b"a", b"J", b"h\x01.", b"\x80", b"e.", b"\x80\x02R.", b"PK\x03\x04", b""])
@pytest.mark.parametrize("name", ["damaged.pt", "damaged.SAFETENSORS"])
def test_damaged_files_end_in_one_line(files, name, data, capsys):
    Path(name).write_bytes(data)
    assert main(["convert", "glide", name, "out", *VOCABULARY]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: `{name}` cannot be read as a checkpoint of tensors: .*\n", error)


def test_upper_case_suffixes_and_windows_line_ends(files):
    save_file(torch.load("base.pt", weights_only=True), "base.SAFETENSORS")
    Path("windows.txt").write_bytes(Path("merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    Path("vocab.GZ").write_bytes(gzip.compress(Path("vocab.json").read_bytes()))
    convert("base.SAFETENSORS", "out", "--vocab", "vocab.GZ", "--merges", "windows.txt")
    assert GlidePipeline.from_pretrained("out").tokenizer("the the").input_ids == [257, 258]


@pytest.mark.parametrize("target", ["real", "new/folder"], ids=["an empty folder", "nothing"])
def test_out_is_a_link(files, target):
    Path("real").mkdir()
    Path("link").symlink_to(target)
    convert("base.pt", "link", *VOCABULARY)
    assert Path("link").is_symlink() and (files / target / "model_index.json").is_file()
    assert not list(files.glob(".*"))


def test_out_is_the_working_folder(files, monkeypatch):
    (files / "here").mkdir()
    monkeypatch.chdir("here")
    with pytest.raises(ValueError, match="`.` exists and is .* the one that you are in"):
        convert("../base.pt", ".", "--vocab", "../vocab.json", "--merges", "../merges.txt")
    assert not list(Path().iterdir())
