"""Karlo's prior -> diffusers, against the network written out from its formulas.

`shapes` has the names and shapes of Karlo's weights, by the settings that they were published with; `run_prior`
computes on weights under those names.
"""

import argparse
import doctest
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, PriorTransformer
from huggingface_hub import ModelCard
from packaging.version import Version
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffusers_ext.convert.karlo_prior
from diffusers_ext import UnCLIPPriorPipeline
from diffusers_ext.convert.karlo_prior import add_arguments, convert_prior, run

FULL = 1_022_028_544
TINY = {"width": 64, "layers": 2, "dim": 24, "text_ctx": 6}
HEADS = 4


# --------------------------------------------------------------------------------------- the network, by its formulas


def shapes(width=2048, layers=20, dim=768, text_ctx=77):
    found = {"positional_embedding": (1, text_ctx + 4, width), "prd_emb": (1, 1, width)}

    def layer(name, *shape):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    for i in (0, 2):
        layer(f"time_embed.{i}", width, width)
    for name in ("text_enc_proj", "text_emb_proj", "clip_img_proj"):
        layer(name, width, dim)
    layer("out_proj", dim, width)
    layer("final_ln", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        layer(f"{block}.ln_1", width)
        layer(f"{block}.ln_2", width)
        layer(f"{block}.attn.c_qkv", 3 * width, width)
        layer(f"{block}.attn.c_proj", width, width)
        layer(f"{block}.mlp.c_fc", 4 * width, width)
        layer(f"{block}.mlp.c_proj", width, 4 * width)
    return found


def run_prior(w, noisy, timesteps, text_embeds, hidden_states, mask, heads=HEADS):
    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    width = w["prd_emb"].shape[-1]
    # in single precision, as both libraries do
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = timesteps[:, None].float() * rates
    time = dense("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1).to(noisy))
    time = dense("time_embed.2", time * time.sigmoid())
    tokens = [dense("text_emb_proj", text_embeds), time, dense("clip_img_proj", noisy)]
    x = torch.cat(
        [
            dense("text_enc_proj", hidden_states),
            torch.stack(tokens, 1),
            w["prd_emb"].expand(len(noisy), 1, width),
        ],
        dim=1,
    )
    x = x + w["positional_embedding"]
    length = x.shape[1]
    visible = torch.cat([mask, torch.ones(len(mask), 4, dtype=torch.bool)], 1)[:, None, None, :]
    visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(sum(key.endswith("ln_1.bias") for key in w)):
        block = f"transformer.resblocks.{i}"
        # each head has its query, key and value together
        parts = dense(f"{block}.attn.c_qkv", norm(f"{block}.ln_1", x)).unflatten(-1, (heads, 3, -1))
        query, key, value = parts.permute(3, 0, 2, 1, 4)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        h = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
        x = x + dense(f"{block}.attn.c_proj", h.transpose(1, 2).flatten(2))
        h = dense(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + dense(f"{block}.mlp.c_proj", h * (1 + torch.erf(h / 2**0.5)) / 2)
    return dense("out_proj", norm("final_ln", x)[:, -1])


# ------------------------------------------------------------------------------------------------------------ fixtures


def drawn(**sizes):
    """Weights under Karlo's names; for every test the same."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in shapes(**(TINY | sizes)).items():
        z = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 0.1 * z + ("ln_" in name or "_ln" in name) * name.endswith("weight")
        else:
            weights[name] = z if len(shape) == 3 else z * (2 / shape[1]) ** 0.5
    return weights


def statistics(dim=TINY["dim"]):
    return torch.linspace(-1, 1, dim), torch.linspace(0.5, 2, dim)


def inputs(dim=TINY["dim"], text_ctx=TINY["text_ctx"]):
    generator = torch.Generator().manual_seed(1)
    noisy, text_embeds = torch.randn(2, 3, dim, generator=generator, dtype=torch.float64)
    hidden_states = torch.randn(3, text_ctx, dim, generator=generator, dtype=torch.float64)
    mask = torch.arange(text_ctx) < torch.tensor([[text_ctx], [2], [1]])
    return noisy, torch.tensor([999, 3, 0]), text_embeds, hidden_states, mask


def call(prior, *args):
    with torch.no_grad():
        return prior(*args).predicted_image_embedding


def double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def convert(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(word) for word in words]))


def save_clip(folder, width=TINY["dim"], dim=TINY["dim"], length=TINY["text_ctx"]):
    symbols = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length).save_pretrained(folder)
    text = {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        "pad_token_id": len(tokens) - 1,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text["projection_dim"] = vision["projection_dim"] = dim
    torch.manual_seed(3)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)).save_pretrained(folder)
    return CLIPTextConfig(**text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint, statistics and CLIP, as published; of 32 heads."""
    folder = tmp_path_factory.mktemp("karlo")
    weights = {f"model.{name}": tensor for name, tensor in drawn().items()}
    torch.save({"state_dict": weights, "global_step": 1_000_000, "epoch": 0}, folder / "prior.ckpt")
    torch.save(statistics(), folder / "stats.th")
    save_clip(folder / "clip")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def files(saved, tmp_path, monkeypatch):
    """These files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for path in saved.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("prefix", ["", "model."])
def test_prior(prefix):
    weights = {prefix + name: tensor for name, tensor in drawn().items()}
    prior = convert_prior(weights, *statistics(), num_attention_heads=HEADS)
    assert type(prior) is PriorTransformer and not prior.training
    expected = run_prior(double(drawn()), *inputs())
    assert expected.abs().max() > 1
    torch.testing.assert_close(call(prior.double(), *inputs()), expected, rtol=0, atol=1e-10)
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs()]
    torch.testing.assert_close(call(prior.float(), *single).double(), expected, rtol=0, atol=2e-5)
    # `x clip_std + clip_mean`
    mean, std = statistics()
    torch.testing.assert_close(prior.post_process_latents(single[0]), single[0] * std + mean, rtol=0, atol=1e-6)
    frozen = {name for name, parameter in prior.named_parameters() if not parameter.requires_grad}
    assert frozen == {"clip_mean", "clip_std"}


def test_statistics_with_a_batch_axis():
    prior = convert_prior(drawn(), *(x[None] for x in statistics()), num_attention_heads=HEADS)
    assert torch.equal(prior.clip_std[0], statistics()[1])


@pytest.mark.filterwarnings("ignore:for clip_")
def test_full_size():
    """Every name and shape of the published network is expected, and no other: the converter refuses all else."""
    with torch.device("meta"):
        weights = {f"model.{name}": torch.empty(shape) for name, shape in shapes().items()}
        prior = convert_prior(weights, torch.zeros(768, device="cpu"), torch.ones(768, device="cpu"))
    count = sum(tensor.numel() for tensor in weights.values())
    assert sum(p.numel() for p in prior.parameters()) == count + 2 * 768
    assert count == FULL
    config = prior.config
    assert (config.num_attention_heads, config.attention_head_dim, config.num_layers) == (32, 64, 20)
    assert (config.embedding_dim, config.num_embeddings) == (768, 77)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_heads_matter(heads):
    wrong = convert_prior(drawn(), *statistics(), num_attention_heads=heads).double()
    assert (call(wrong, *inputs()) - run_prior(double(drawn()), *inputs())).abs().max() > 1e-2


def test_the_mask_matters():
    prior = convert_prior(drawn(), *statistics(), num_attention_heads=HEADS).double()
    *arguments, mask = inputs()
    changed = call(prior, *arguments, torch.ones_like(mask)) - call(prior, *arguments, mask)
    assert changed[0].abs().max() == 0 and changed[1:].abs().amax(1).min() > 1e-2


# --------------------------------------------------------------------------------------------------------- the command


def test_pipeline_folder(files, capsys):
    convert("prior.ckpt", "models/mine", "--stats", "stats.th", "--clip", "clip")
    assert "wrote models/mine: UnCLIPPriorPipeline for embeddings of 24\n" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained("models/mine")
    assert type(pipe) is UnCLIPPriorPipeline
    assert (pipe.config.clip_model_id, pipe.config.embed_norm) == ("clip", "standardize")
    expected = run_prior(double(drawn()), *inputs(), heads=32)
    torch.testing.assert_close(call(pipe.prior.double(), *inputs()), expected, rtol=0, atol=1e-10)
    text = CLIPModel.from_pretrained("clip").text_model.state_dict()
    encoder = pipe.text_encoder.text_model.state_dict()
    assert encoder.keys() == text.keys() and all(torch.equal(encoder[key], text[key]) for key in text)
    pipe.prior.float()
    pipe.set_progress_bar_config(disable=True)
    embeds = pipe(["a dog", "cats"], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    assert embeds.shape == (2, 24) and embeds.isfinite().all()
    assert "prior.ckpt" in ModelCard.load("models/mine/README.md").text


def test_network_alone_and_safetensors(files, capsys):
    save_file(drawn(), "weights.safetensors")
    Path("mine").mkdir()
    convert("weights.safetensors", "mine", "--stats", "stats.th")
    assert capsys.readouterr().out == "wrote mine: PriorTransformer for embeddings of 24\n"
    prior = PriorTransformer.from_pretrained("mine")
    assert json.loads(Path("mine/config.json").read_text())["_class_name"] == "PriorTransformer"
    assert torch.equal(prior.clip_mean[0], statistics()[0]) and prior.config.num_attention_heads == 32
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(".")) == []


def test_examples_in_docstrings(files):
    Path("prior.ckpt").rename("other")  # a link
    torch.save({"state_dict": drawn()}, "prior.ckpt")
    result = doctest.testmod(diffusers_ext.convert.karlo_prior)
    assert result.failed == 0 and result.attempted >= 6


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_proj.bias": None}, "`out_proj.bias` is missing"),
        ({"final_ln.weight": None}, "`final_ln.weight` is missing"),
        ({"causal_mask": torch.zeros(1)}, "`causal_mask` is unknown"),
        ({"prd_emb": torch.zeros(1, 1, 63)}, r"`prd_emb` has shape \(1, 1, 63\), but needs \(1, 1, 64\)"),
        (
            {"transformer.resblocks.1.attn.c_qkv.weight": torch.zeros(64, 64)},
            r"c_qkv.weight` has shape \(64, 64\), but needs \(192, 64\)",
        ),
        ({"text_enc_proj.weight": torch.zeros(64, 32)}, r"has shape \(64, 32\), but needs \(64, 24\)"),
        ({"clip_img_proj.weight": None}, "`clip_img_proj.weight` is missing .* no prior of Karlo's"),
        ({"positional_embedding": torch.zeros(10, 64)}, "has not 3 dimensions"),
        ({"positional_embedding": torch.zeros(1, 4, 64)}, "has 4 positions"),
        ({"clip_img_proj.weight": torch.zeros(128, 24)}, "and [0-9]+ more"),  # another width
        ({"out_proj.weight": torch.full((24, 64), torch.nan)}, "`out_proj.weight` is not finite"),
        ({"out_proj.bias": torch.zeros(24, dtype=torch.int8)}, "`out_proj.bias` is of torch.int8"),
    ],
)
def test_weights_that_are_refused(change, message):
    weights = {name: tensor for name, tensor in (drawn() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert_prior(weights, *statistics(), num_attention_heads=HEADS)


def test_a_missing_block_is_told():
    weights = {name: tensor for name, tensor in drawn(layers=3).items() if "resblocks.1." not in name}
    with pytest.raises(ValueError, match="`transformer.resblocks.1.attn.c_proj.bias` is missing"):
        convert_prior(weights, *statistics(), num_attention_heads=HEADS)


def test_a_network_without_blocks():
    weights = {name: tensor for name, tensor in drawn().items() if "resblocks." not in name}
    with pytest.raises(ValueError, match="no weight is of a `transformer.resblocks`"):
        convert_prior(weights, *statistics(), num_attention_heads=HEADS)


@pytest.mark.parametrize("heads", [0, 5, 7])
def test_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"`num_attention_heads` is {heads}, but must divide the width 64"):
        convert_prior(drawn(), *statistics(), num_attention_heads=heads)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(24), torch.zeros(24), "`clip_std` is not positive"),
        (torch.full((24,), torch.nan), torch.ones(24), "not finite"),
        (torch.zeros(24), torch.ones(32), r"`clip_std` has shape \(1, 32\), but needs \(1, 24\)"),
        (torch.zeros(23), torch.ones(24), r"`clip_mean` has shape \(1, 23\)"),
    ],
)
def test_statistics_that_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        convert_prior(drawn(), mean, std, num_attention_heads=HEADS)


# Of a `DiffusionPrior` and of the `DiffusionPriorNetwork` in it, some of the names.
DALLE2 = ("noise_scheduler.betas", "net.learned_query", "net.null_text_encodings", "net.null_text_embeds",
          "net.null_image_embed", "net.causal_transformer.layers.0.0.to_q.weight")  # fmt: skip


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_another_architecture_is_refused_by_name(prefix, files):
    weights = {name.removeprefix("net.") if not prefix else name: torch.zeros(2) for name in DALLE2}
    # Its trainer saves the version as an object, which is not loaded; others save the weights alone.
    torch.save({"optimizer": {}, "model": weights, "version": Version("1.15.6"), "step": 7}, "trainer.pth")
    torch.save({"model": weights, "version": "1.15.6", "step": 7}, "latest.pth")
    for name in ("trainer.pth", "latest.pth"):
        with pytest.raises(ValueError, match="of DALLE2-pytorch's prior, which cannot be .*rotary.*SwiGLU.*null"):
            convert(name, "out", "--stats", "stats.th")
    assert not Path("out").exists()


class _Code:
    def __reduce__(self):
        return (print, ("this runs on loading",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prior.ckpt", "full"), "`full` exists and is not an empty folder"),
        (("prior.ckpt", "stats.th"), "`stats.th` exists and is not an empty folder"),
        (("code.ckpt", "out"), "would run code"),
        (("text.txt", "out"), "cannot be read as a checkpoint"),
        (("half.ckpt", "out"), "`half.ckpt` cannot be read as a checkpoint"),
        (("bits.ckpt", "out"), "`bits.ckpt` cannot be read as a checkpoint"),
        (("half.safetensors", "out"), "`half.safetensors` cannot be read as a checkpoint"),
        (("numbers.ckpt", "out"), "`numbers.ckpt` holds no weights by their names"),
        (("stats.th", "out"), "`stats.th` holds no weights by their names"),
        (("prior.ckpt", "out", "--stats", "prior.ckpt"), "`prior.ckpt` is no pair of tensors"),
        (("prior.ckpt", "out", "--stats", "three.th"), "`three.th` is no pair of tensors"),
        (("prior.ckpt", "out", "--clip", "nosuch"), "`nosuch` is no folder with the config.json of a CLIP"),
        (
            ("prior.ckpt", "out", "--clip", "wide"),
            "`wide` is not the CLIP of this prior.* width 32, but `prior` takes",
        ),
        (("prior.ckpt", "out", "--clip", "long"), "`long` is not the CLIP of this prior.* 9"),
        (("prior.ckpt", "out", "--clip", "unprojected"), r"`unprojected` lacks \['text_projection.weight'\]"),
        (("prior.ckpt", "out", "--clip", "damaged"), "the weights in `damaged` cannot be read"),
    ],
)
def test_input_that_is_refused(files, words, message, capsys):
    torch.save(_Code(), "code.ckpt")
    torch.save((*statistics(), torch.zeros(1)), "three.th")
    Path("text.txt").write_text("no checkpoint")
    torch.save({1: torch.zeros(2)}, "numbers.ckpt")
    whole = Path("prior.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    # of other lengths than they say, which the unpickler meets with any error
    Path("bits.ckpt").write_bytes(whole.replace(b"state_dict", b"\xff\xfe\xfd\xfc_dict", 1))
    save_file(drawn(), "half.safetensors")
    Path("half.safetensors").write_bytes(Path("half.safetensors").read_bytes()[:5000])
    save_clip("damaged")
    Path("damaged/model.safetensors").write_bytes(Path("damaged/model.safetensors").read_bytes()[:500])
    Path("full").mkdir()
    Path("full/mine").write_text("keep")
    save_clip("wide", width=32)
    save_clip("long", length=9)
    CLIPTextModel(save_clip("unprojected")).save_pretrained("unprojected")
    before = sorted(path.name for path in files.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert(*words[:2], *([] if "--stats" in words else ["--stats", "stats.th"]), *words[2:])
    assert sorted(path.name for path in files.rglob("*")) == before, "nothing is left behind"
    assert "this runs" not in capsys.readouterr().out


def test_files_that_are_missing(files, capsys):
    with pytest.raises(FileNotFoundError, match="nosuch"):
        convert("nosuch.ckpt", "out", "--stats", "stats.th")
    with pytest.raises(FileNotFoundError, match="nosuch"):
        convert("prior.ckpt", "out", "--stats", "nosuch.th")
    with pytest.raises(SystemExit):
        convert("prior.ckpt", "out")
    assert "the following arguments are required: --stats" in capsys.readouterr().err


def test_a_clip_without_its_tokenizer(files):
    save_clip("bare")
    for path in Path("bare").iterdir():
        if path.name.startswith(("token", "vocab", "merges", "special")):
            path.unlink()
    with pytest.raises(ValueError, match="`bare` has [0-9]+ tokens, but its text encoder knows 54: put the tokenizer"):
        convert("prior.ckpt", "out", "--stats", "stats.th", "--clip", "bare")
    assert not Path("out").exists()
