"""PDAE's models, scheduler and pipeline with real networks at tiny sizes (its equations: test_pdae_goldens.py)."""

import copy
import doctest
import inspect
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from contract import PipelineContract, no_model_runs
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image

from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline, PDAEScheduler, load_image_dataset
from diffusers_ext.pipelines import pdae
from diffusers_ext.pipelines.pdae import LatentModulation, check_unet, unet_down, unet_up

# The kinds of U-Nets that PDAE can stand on, as changes to a plain one.
UNETS = {
    "plain": {},
    "cifar": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "adm": {
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    },
    "class-conditional": {"num_class_embeds": 10},
    "conditional by timestep embedding": {"class_embed_type": "timestep"},
    "centered input": {"center_input_sample": True},
    "no middle block": {"mid_block_type": None},
    "no middle attention": {"add_attention": False},
    "learned time embedding": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "wide time embedding": {"time_embedding_dim": 48},
}
every_unet = pytest.mark.parametrize("kind", UNETS)


def make_unet(kind="plain", **changes):
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    return UNet2DModel(**(config | UNETS[kind] | changes)).eval().requires_grad_(False)


def make_estimator(unet, latent_dim=4, trained=True):
    """`trained`: the weights that start at zero get others, so that the gradient is not zero."""
    torch.manual_seed(1)
    estimator = PDAEGradientEstimator.from_unet(unet, latent_dim).eval()
    for parameter in estimator.parameters():
        if trained and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return estimator


def make_encoder(**changes):
    torch.manual_seed(2)
    config = {"sample_size": 8, "in_channels": 1, "latent_dim": 4, "block_out_channels": (8, 8)}
    return PDAEEncoder(**(config | {"attention_block": 1, "norm_num_groups": 4} | changes)).eval()


def make_pipeline(kind="plain", scheduler=None, **unet_changes):
    unet = make_unet(kind, **unet_changes)
    encoder = make_encoder(in_channels=unet.config.in_channels, sample_size=unet.config.sample_size)
    pipe = PDAEPipeline(unet, encoder, make_estimator(unet), scheduler or PDAEScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def labels_for(unet, batch_size=2):
    return None if unet.class_embedding is None else torch.arange(1, 1 + batch_size)


class TestGreyscale(PipelineContract):
    pipeline_class = PDAEPipeline
    image_shape = (1, 8, 8)

    def components(self):
        return make_pipeline().components

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"image": image, "num_inference_steps": 3}


class TestColorWideConditionalAncestral(PipelineContract):
    pipeline_class = PDAEPipeline
    image_shape = (3, 8, 16)

    def components(self):
        changes = {"in_channels": 3, "out_channels": 3, "sample_size": (8, 16)}
        return make_pipeline("class-conditional", DDPMScheduler(prediction_type="v_prediction"), **changes).components

    def inputs(self, batch_size):
        image = torch.rand(batch_size, 3, 8, 16, generator=torch.Generator().manual_seed(1))
        labels = [3, 7, 0][:batch_size]
        return {"image": image, "class_labels": labels, "num_inference_steps": 3, "sampler": "ddpm"}


class TestInvertedNoise(PipelineContract):
    """The noise is inferred: no draw at all, so that the tests of randomness have nothing to look at."""

    pipeline_class = PDAEPipeline
    image_shape = (1, 8, 8)
    components = TestGreyscale.components
    test_same_seed_same_images = test_callback_can_replace_the_latents = None

    def inputs(self, batch_size):
        return TestGreyscale.inputs(self, batch_size) | {"num_inversion_steps": 3}


def test_doctests():
    results = doctest.testmod(pdae, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 20 and results.failed == 0


# -- models


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in UNETS]
    # diffusers' own `forward` embeds a timestep for a class in single precision only
    + [(kind, torch.bfloat16) for kind in UNETS if kind != "conditional by timestep embedding"],
    ids=str,
)
def test_two_halves_are_the_unet_bit_for_bit(kind, dtype):
    unet = make_unet(kind).to(dtype)
    sample, timesteps = torch.randn(2, unet.config.in_channels, 8, 8, dtype=dtype), torch.tensor([3, 999])
    labels = labels_for(unet)
    with torch.no_grad():
        expected = unet(sample, timesteps, class_labels=labels).sample
        actual = unet_up(unet, *unet_down(unet, sample, timesteps, labels))
    assert actual.shape == sample.shape
    assert torch.equal(actual, expected[:, : unet.config.in_channels])


@every_unet
def test_estimator_fits_its_unet_and_starts_at_zero(kind, tmp_path):
    unet = make_unet(kind)
    state = copy.deepcopy(unet.state_dict())
    sample, timesteps = torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([3, 999])
    features = unet_down(unet, sample, timesteps, labels_for(unet))
    code = torch.randn(2, 4)
    fresh = make_estimator(unet, trained=False)(*features, latent_code=code)
    assert fresh.shape == sample.shape and not fresh.any()

    estimator = make_estimator(unet)
    gradient = estimator(*features, latent_code=code)
    assert gradient.shape == sample.shape
    assert not torch.allclose(gradient, estimator(*features, latent_code=-code)), "the code must matter"
    estimator.save_pretrained(tmp_path)
    assert torch.equal(PDAEGradientEstimator.from_pretrained(tmp_path)(*features, latent_code=code), gradient)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())


@every_unet
def test_estimator_has_the_layers_of_its_unet(kind):
    unet, estimator = make_unet(kind), make_estimator(make_unet(kind))
    shapes = {
        name: parameter.shape
        for name, parameter in unet.named_parameters()
        if name.startswith(("mid_block", "up_blocks", "conv_norm_out"))
    }
    own = {name: p.shape for name, p in estimator.named_parameters() if not name.startswith(("code_", "conv_out"))}
    assert {n for n in shapes if "time_emb_proj" not in n} == {n for n in own if "time_emb_proj" not in n}
    assert all(own[name] == shape for name, shape in shapes.items() if "time_emb_proj" not in name)
    if estimator.mid_block is not None and unet.config.add_attention:
        norms = [model.mid_block.attentions[0].group_norm for model in (unet, estimator)]
        assert norms[0].num_groups == norms[1].num_groups


@every_unet
def test_every_trainable_weight_learns_and_no_frozen_one(kind):
    unet = make_unet(kind)
    encoder = make_encoder(in_channels=unet.config.in_channels).train()
    estimator = make_estimator(unet, trained=False).train()
    scheduler, parameters = PDAEScheduler(), [*encoder.parameters(), *estimator.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    images, timesteps = torch.rand(4, unet.config.in_channels, 8, 8) * 2 - 1, torch.tensor([100, 300, 500, 800])
    noise = torch.randn_like(images)
    noisy = scheduler.add_noise(images, noise, timesteps)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.no_grad():
            features = unet_down(unet, noisy, timesteps, labels_for(unet, 4))
            model_output = unet_up(unet, *features)
        gradient = estimator(*features, latent_code=encoder(images))
        error = (noise - scheduler.predict_noise(model_output, timesteps, noisy, gradient)).square()
        loss = (scheduler.loss_weight(timesteps, sample=error) * error).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for model in (encoder, estimator):
        for name, parameter in model.named_parameters():
            # A bias of the keys adds the same to all of a query's scores, which the softmax takes out again.
            assert parameter.grad is not None and (parameter.grad.any() or "to_k.bias" in name), name
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_gradient_checkpointing_changes_nothing():
    unet = make_unet()
    features = unet_down(unet, torch.randn(2, 1, 8, 8), torch.tensor([3, 999]))
    gradients = []
    for checkpointing in (False, True):
        estimator = make_estimator(unet).train()
        if checkpointing:
            estimator.enable_gradient_checkpointing()
            assert estimator.is_gradient_checkpointing
        estimator(*features, latent_code=torch.ones(2, 4)).square().sum().backward()
        gradients.append([parameter.grad for parameter in estimator.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_modulation_is_by_time_and_then_by_code():
    """`(1 + z_s) ((1 + t_s) GroupNorm(h) + t_b) + z_b` inside the unmodified residual block."""
    block = ResnetBlock2D(
        in_channels=8, out_channels=8, temb_channels=6, groups=4, time_embedding_norm="scale_shift"
    ).double()
    block.time_emb_proj = LatentModulation(6, 8).double()
    hidden_states = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    time, code = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    actual = block(hidden_states, torch.cat([time, code], dim=1))

    silu, projection = torch.nn.functional.silu, block.time_emb_proj
    t_s, t_b = projection.time_proj(silu(time))[:, :, None, None].chunk(2, dim=1)
    z_s, z_b = projection.code_proj(silu(code))[:, :, None, None].chunk(2, dim=1)
    h = block.norm2(block.conv1(silu(block.norm1(hidden_states))))
    h = (1 + z_s) * ((1 + t_s) * h + t_b) + z_b
    torch.testing.assert_close(actual, hidden_states + block.conv2(silu(h)), rtol=1e-12, atol=1e-12)


def test_encoder_of_the_paper_ends_at_4_by_4():
    encoder = PDAEEncoder()
    assert encoder.to_latent.in_features == 256 * 4 * 4 and encoder.to_latent.out_features == 512
    assert encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 512)
    small = PDAEEncoder(64, block_out_channels=(64, 128, 128, 128), attention_block=1)
    assert small.to_latent.in_features == 128 * 4 * 4
    # Convolutions and their norms, the attention (norm and four layers) and the linear layer, counted by hand.
    convolutions = sum(9 * a * b + b + 2 * b for a, b in [(3, 64), (64, 128), (128, 128), (128, 128)])
    assert small.num_parameters() == convolutions + 2 * 128 + 4 * (128 * 128 + 128) + (128 * 16 * 512 + 512)


@pytest.mark.parametrize("guarded", [True, False])
def test_backward_through_channels_last_features(guarded):
    """On the CPU torch 2.13 dies in `group_norm`'s backward where such features reach it, so in its own process."""
    code = f"""
import torch
from diffusers import UNet2DModel
from diffusers_ext import PDAEGradientEstimator
from diffusers_ext.pipelines.pdae import unet_down

for mid_block_type in ("UNetMidBlock2D", None):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, mid_block_type=mid_block_type,
    )
    estimator = PDAEGradientEstimator.from_unet(unet, 4)
    torch.nn.init.ones_(estimator.conv_out.weight)
    with torch.no_grad():
        hidden_states, res, temb = unet_down(unet, torch.randn(2, 1, 8, 8), torch.tensor([3, 999]))
    hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
    res = tuple(state.contiguous(memory_format=torch.channels_last) for state in res)
    assert not hidden_states.is_contiguous() and not res[-1].is_contiguous()
    if {guarded}:
        gradient = estimator(hidden_states, res, temb, torch.randn(2, 4))
    else:
        gradient = estimator.mid_block(hidden_states, torch.cat([temb, temb], dim=1))
    gradient.square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if guarded:
        assert done.returncode == 0, done.stderr
    elif "NoneType" in done.stderr:
        pytest.skip(f"torch {torch.__version__} does not crash")
    else:
        assert done.returncode < 0, f"killed by a signal is expected, but: {done.stderr}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "SkipUpBlock2D")},
            r"SkipDownBlock2D.*SkipUpBlock2D.*without Skip blocks",
        ),
        ({"time_embedding_type": "fourier"}, "fourier.*noise levels.*timesteps"),
        ({"out_channels": 3}, "1 input and 3 output channels.*as many"),
        ({"class_embed_type": "identity"}, "identity.*num_class_embeds"),
    ],
)
def test_unet_that_cannot_work_is_refused(changes, message):
    unet = make_unet(**changes)
    for refused in (lambda: check_unet(unet), lambda: PDAEGradientEstimator.from_unet(unet)):
        with pytest.raises(ValueError, match=message):
            refused()


def test_other_networks_are_refused():
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    for other in (unet, make_encoder()):
        with pytest.raises(TypeError, match=f"`unet` is a {type(other).__name__}.*`UNet2DModel`"):
            PDAEGradientEstimator.from_unet(other)


def test_encoder_refuses_other_sizes():
    encoder = make_encoder()
    for shape in ((1, 1, 8, 9), (1, 3, 8, 8), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"`sample` has shape \(1.*\(batch, 1, 8, 8\).*resize or convert"):
            encoder(torch.zeros(shape))
    with pytest.raises(ValueError, match="`block_out_channels` holds 6.*`norm_num_groups`=4.*change"):
        make_encoder(block_out_channels=(6,))


def test_class_labels_are_checked_by_the_halves():
    with pytest.raises(ValueError, match="`class_labels` are missing"):
        unet_down(make_unet("class-conditional"), torch.zeros(1, 1, 8, 8), torch.tensor([3]))
    with pytest.raises(ValueError, match="`class_labels` were given.*leave them out"):
        unet_down(make_unet(), torch.zeros(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0]))


# -- scheduler


@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": np.linspace(1e-3, 0.3, 20).tolist(), "num_train_timesteps": 20},
        {"num_train_timesteps": 100, "prediction_type": "v_prediction", "clip_sample_range": 2.0},
        {"clip_sample": False, "prediction_type": "sample"},
    ],
    ids=lambda config: "-".join(config) or "default",
)
def test_stock_schedulers_are_converted(stock, config, tmp_path):
    if config.get("beta_schedule") == "sigmoid":
        stock = DDPMScheduler  # the only one of the two that has it
    original = stock(**config)
    scheduler = make_pipeline(scheduler=original).scheduler
    assert type(scheduler) is PDAEScheduler and type(original) is stock
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), original.alphas_cumprod, rtol=1e-4, atol=1e-6)
    for name in ("num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"):
        assert scheduler.config[name] == original.config[name]
    sample, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([5, 19])
    torch.testing.assert_close(
        scheduler.add_noise(sample, noise, t), original.add_noise(sample, noise, t), rtol=1e-5, atol=1e-5
    )
    scheduler.save_pretrained(tmp_path)
    again = PDAEScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(again.config[name] == scheduler.config[name] for name in inspect.signature(PDAEScheduler).parameters)


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler", "UnCLIPScheduler"],
)
def test_schedulers_of_other_processes_are_refused(name):
    with pytest.raises(ValueError, match=f"`scheduler` is a {name}, whose noise levels are not"):
        make_pipeline(scheduler=getattr(diffusers, name)())


def test_timesteps_do_not_wrap_around():
    scheduler, sample = PDAEScheduler(), torch.randn(1, 1, 2, 2)
    assert torch.equal(scheduler.add_noise(sample, sample, -1), sample)  # the clean image
    for call in (
        lambda: scheduler.add_noise(sample, sample, 1000),
        lambda: scheduler.add_noise(sample, sample, -2),
        lambda: scheduler.shift_coefficient(-1),
    ):
        with pytest.raises(ValueError, match="`timestep` is .*from 0 to 999"):
            call()


def test_stock_schedulers_can_take_over():
    """The config goes back: another sampler of diffusers on the same schedule."""
    scheduler = PDAEScheduler(beta_schedule="scaled_linear")
    stock = DDIMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(stock.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
    assert DDIMScheduler in scheduler.compatibles


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rescale_betas_zero_snr": True},
            "`rescale_betas_zero_snr`=True.*`rescale_betas_zero_snr=False`.*pure noise",
        ),
        ({"thresholding": True}, "`thresholding=True` is not supported: use `clip_sample`"),
        ({"beta_schedule": "laplace"}, "`beta_schedule` is 'laplace'.*'linear'.*`trained_betas`"),
        ({"prediction_type": "flow"}, "`prediction_type` is 'flow'.*'epsilon'"),
        ({"trained_betas": [0.1, 0.2]}, "2 betas.*`num_train_timesteps`=1000"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, r"\[0.1, 1\].*inside \(0, 1\)"),
        ({"beta_start": 0.0}, r"betas in \[0, 0.02\].*inside \(0, 1\)"),
    ],
)
def test_schedules_that_cannot_work_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PDAEScheduler(**config)


def test_zero_snr_checkpoint_is_refused():
    stock = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        make_pipeline(scheduler=stock)


def test_set_timesteps_refuses():
    scheduler = PDAEScheduler(num_train_timesteps=20)
    for steps in (0, -1, 21):
        with pytest.raises(ValueError, match=f"`num_inference_steps` is {steps}.*20 timesteps.*from 1 to 20"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="`direction`='up' with `sampler`='ddim'.*'decode' or 'encode'"):
        scheduler.set_timesteps(5, direction="up")
    with pytest.raises(ValueError, match="`direction`='encode' with `sampler`='ddpm'"):
        scheduler.set_timesteps(5, direction="encode", sampler="ddpm")


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 19, 20])
def test_trajectories_of_short_schedules(steps):
    scheduler = PDAEScheduler(num_train_timesteps=20)
    for sampler, end in (("ddim", 0), ("ddpm", -1)):
        scheduler.set_timesteps(steps, sampler=sampler)
        starts, ends = zip(*scheduler.trajectory, strict=True)
        assert starts[0] == 19 and ends[-1] == end and starts[1:] == ends[:-1]
        assert list(starts) == sorted(set(starts), reverse=True)
        assert len(starts) == (min(steps, 19) if sampler == "ddim" else steps)


def test_steps_take_their_next_timestep_from_the_trajectory():
    scheduler = PDAEScheduler()
    sample, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="`timestep` 999 is not on the trajectory.*`set_timesteps`"):
        scheduler.step(output, 999, sample)
    scheduler.set_timesteps(3)
    for t, t2 in scheduler.trajectory:
        expected = scheduler.step(output, t, sample, next_timestep=t2)
        assert torch.equal(scheduler.step(output, torch.tensor(t), sample).prev_sample, expected.prev_sample)
        parts = scheduler.step(output, t, sample, return_dict=False)
        assert torch.equal(parts[0], expected.prev_sample) and torch.equal(parts[1], expected.pred_original_sample)
    with pytest.raises(ValueError, match="`kind` is 'ddpm'.*'posterior' or 'ddim'"):
        scheduler.shift_coefficient(3, "ddpm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_samples_survive_the_first_timestep(dtype):
    """`1 / abar_0 - 1` is zero in half precision."""
    scheduler = PDAEScheduler()
    sample, output = torch.rand(2, 1, 4, 4).to(dtype), torch.randn(2, 1, 4, 4).to(dtype)
    step = scheduler.step(output, 0, sample, next_timestep=20)
    exact = scheduler.step(output.double(), 0, sample.double(), next_timestep=20)
    assert step.prev_sample.dtype == dtype and step.prev_sample.isfinite().all()
    torch.testing.assert_close(step.prev_sample.double(), exact.prev_sample, rtol=1e-2, atol=1e-2)
    assert scheduler.add_noise(sample, output, torch.tensor([0, 1])).dtype == dtype


def test_one_timestep_per_image_equals_one_for_all():
    scheduler = PDAEScheduler(prediction_type="v_prediction")
    sample, output, gradient = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([5, 700])
    for method in (
        lambda t, i: scheduler.predict_noise(output[i], t, sample[i], gradient[i]),
        lambda t, i: scheduler.add_noise(sample[i], output[i], t),
        lambda t, i: scheduler.predict_original_sample(output[i], t, sample[i]),
        lambda t, i: scheduler.posterior_mean(output[i], t, sample[i]),
    ):
        batch = method(t, slice(None))
        single = torch.cat([method(int(t[i]), slice(i, i + 1)) for i in range(2)])
        torch.testing.assert_close(batch, single, rtol=1e-14, atol=1e-14)


# -- pipeline


def counting(layer):
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    return calls


@every_unet
def test_autoencoding_works_on_every_kind_of_unet(kind, tmp_path):
    pipe = make_pipeline(kind)
    image = torch.rand(2, pipe.unet.config.in_channels, 8, 8)
    labels = labels_for(pipe.unet)
    output = pipe(image, 3, 3, class_labels=labels, output_type="pt")
    assert output.images.shape == image.shape and output.images.isfinite().all()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(image, 3, 3, class_labels=labels, output_type="pt").images
    torch.testing.assert_close(again, output.images, rtol=0, atol=1e-3)
    if labels is not None:
        other = pipe(image, 3, 3, class_labels=labels.flip(0), output_type="pt")
        assert not torch.equal(other.images, output.images), "the labels must matter"


@pytest.mark.parametrize("kind", ["plain", "class-conditional"])
def test_call_is_encode_invert_decode(kind):
    pipe = make_pipeline(kind)
    labels = {"class_labels": labels_for(pipe.unet)}
    image = torch.rand(2, 1, 8, 8)
    code = pipe.encode(image)
    torch.testing.assert_close(code, pipe.encoder(2 * image - 1).detach())
    noise = pipe.invert(image, code, num_inference_steps=4, **labels)
    images = pipe.decode(code, noise, num_inference_steps=3, output_type="pt", **labels).images
    output = pipe(image, num_inference_steps=3, num_inversion_steps=4, output_type="pt", **labels)
    for actual, expected in zip(output.to_tuple(), (images, code, noise), strict=True):
        assert torch.equal(actual, expected)
    given = pipe(image, num_inference_steps=3, latents=noise, output_type="pt", **labels)
    assert torch.equal(given.images, images)
    if kind == "class-conditional":
        other = {"class_labels": labels["class_labels"].flip(0)}
        assert not torch.allclose(pipe.invert(image, code, 4, **other), noise)
        assert not torch.allclose(pipe.decode(code, noise, 3, output_type="pt", **other).images, images)


def test_networks_run_once_per_step():
    pipe = make_pipeline()
    trunk, estimator, encoder = (
        counting(m) for m in (pipe.unet.down_blocks[0], pipe.gradient_estimator, pipe.encoder)
    )

    def counts(call):
        for calls in (trunk, estimator, encoder):
            calls.clear()
        call()
        return len(trunk), len(estimator), len(encoder)

    image, code = torch.rand(2, 1, 8, 8), torch.randn(2, 4)
    a, b = image[:1], image[1:]
    assert counts(lambda: pipe(image, 5)) == (5, 5, 1)
    assert counts(lambda: pipe(image, 5, num_inversion_steps=3)) == (8, 8, 1)
    assert counts(lambda: pipe.decode(code, num_inference_steps=5, sampler="ddpm")) == (5, 5, 0)
    assert counts(lambda: pipe.decode(code, num_inference_steps=5, shift_scale=0)) == (5, 0, 0)
    assert counts(lambda: pipe.decode(code, num_inference_steps=5, shift_range=(0, 0))) == (5, 0, 0)
    assert counts(lambda: pipe.decode(code, num_inference_steps=10, shift_range=(300, 1000))) == (10, 7, 0)
    assert counts(lambda: pipe.decode(code, num_inference_steps=10, shift_range=(300, 700))) == (10, 4, 0)
    # The timesteps are 99, 199, ..., 899 and 999: the lower limit belongs to the range, the upper one does not.
    assert counts(lambda: pipe.decode(code, num_inference_steps=10, shift_range=(299, 699))) == (10, 4, 0)
    assert counts(lambda: pipe.decode(code, num_inference_steps=10, shift_range=(699, 700))) == (10, 1, 0)
    assert counts(lambda: pipe.invert(image, None, 4)) == (4, 0, 0)
    assert counts(lambda: pipe.interpolate(a, b, 3, "latent", 5, 4)) == (9, 9, 1)
    assert counts(lambda: pipe.interpolate(a, b, 3, "trajectory", 5, None)) == (5, 10, 1)
    assert counts(lambda: pipe.denoise_one_step(image, 300)) == (1, 1, 1)
    assert counts(lambda: pipe.denoise_one_step(image, 300, code, shift_scale=0)) == (1, 0, 0)
    assert counts(lambda: pipe.posterior_gap(image, [1, 500])) == (2, 2, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_in_every_form(channels):
    pipe = make_pipeline(in_channels=channels, out_channels=channels)
    pixels = np.random.randint(0, 256, (2, 8, 8, channels), dtype=np.uint8)
    array = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    images = [Image.fromarray(image.squeeze()) for image in pixels]
    expected = pipe.encode(tensor)
    assert not torch.allclose(expected[0], expected[1])
    # The same layout gives the same bits; a batch of one may use other kernels.
    for form in (images, tuple(images), array, list(array), list(tensor), tensor.double(), [tensor[:1], tensor[1:]]):
        torch.testing.assert_close(pipe.encode(form), expected)
    for form in (images[0], array[0], array[:1], tensor[0], [images[0]]):
        torch.testing.assert_close(pipe.encode(form), expected[:1])
    other_mode = images[0].convert("RGB" if channels == 1 else "RGBA")
    torch.testing.assert_close(pipe.encode(other_mode), expected[:1])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_as_in_the_data_set(channels, tmp_path):
    """Turned upright, transparency on white, 16 bits in full: what the data set gives, the pipeline gives."""
    pipe = make_pipeline(in_channels=channels, out_channels=channels)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    images = [
        (Image.fromarray(pixels), {"exif": exif}),
        (Image.fromarray(np.stack([pixels] * 3 + [pixels[::-1]], axis=-1), "RGBA"), {}),
        (Image.fromarray((pixels.astype(np.uint16) << 8) + 7), {}),
        (Image.fromarray(pixels).convert("P"), {"transparency": int(pixels[2, 2])}),
    ]
    for i, (image, options) in enumerate(images):
        path = tmp_path / str(i) / "image.png"
        path.parent.mkdir()
        image.save(path, **options)
        mode = "L" if channels == 1 else "RGB"
        data = load_image_dataset(None, path.parent, resolution=8, image_mode=mode, validation_fraction=0)
        with Image.open(path) as image:
            seen = pipe._prepare_images(image)
        torch.testing.assert_close(seen[0], data[0]["images"], rtol=0, atol=2e-3)


def test_interpolation_starts_and_ends_at_its_images():
    pipe = make_pipeline().to(torch.float64)
    a, b = torch.rand(2, 1, 1, 8, 8, dtype=torch.float64)
    for mode in ("latent", "trajectory"):
        path = pipe.interpolate(a, b, 4, mode, 3, 5, output_type="pt")
        ends = pipe(torch.cat([a, b]), 3, 5, output_type="pt")
        assert path.images.shape == (4, 1, 8, 8) and path.latent_code.shape == (4, 4)
        torch.testing.assert_close(path.images[[0, -1]], ends.images, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(path.inverted_noise[[0, -1]], ends.inverted_noise, rtol=1e-9, atol=1e-9)
    drawn = [
        pipe.interpolate(
            a, b, 2, num_inference_steps=2, num_inversion_steps=None, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0].inverted_noise, drawn[1].inverted_noise)
    assert torch.equal(drawn[0].inverted_noise[0], drawn[0].inverted_noise[1]), "one noise for the whole path"
    assert not torch.equal(drawn[0].inverted_noise, drawn[2].inverted_noise)
    assert isinstance(pipe.interpolate(a, b, 2, num_inference_steps=2, return_dict=False), tuple)


def test_interpolation_of_class_conditional_models():
    pipe = make_pipeline("class-conditional")
    a, b = torch.rand(2, 1, 1, 8, 8)
    by_label = [pipe.interpolate(a, b, 3, "latent", 2, 2, class_labels=c, output_type="pt").images for c in (0, 5)]
    assert not torch.equal(*by_label)
    ends = pipe(torch.cat([a, b]), 2, 2, class_labels=[1, 2], output_type="pt").images
    path = pipe.interpolate(a, b, 2, "latent", 2, 2, class_labels=[1, 2], output_type="pt").images
    torch.testing.assert_close(path, ends, rtol=1e-4, atol=1e-4)


def test_one_progress_bar_for_every_method(capsys):
    pipe = make_pipeline(scheduler=PDAEScheduler(50))
    image = torch.rand(1, 1, 8, 8)
    code = pipe.encode(image)
    for call, total in (
        (lambda: pipe(image, 3, num_inversion_steps=4), 7),
        (lambda: pipe.invert(image, code, 4), 4),
        (lambda: pipe.decode(code, num_inference_steps=50), 49),
        (lambda: pipe.decode(code, num_inference_steps=20, sampler="ddpm"), 20),
        (lambda: pipe.interpolate(image, image, 3, "latent", 3, 4), 7),
        (lambda: pipe.posterior_gap(image, [3, 5]), 2),
    ):
        pipe.set_progress_bar_config(disable=False, file=sys.stdout)
        call()
        shown = capsys.readouterr().out
        assert shown.count("\n") == 1 and f"| {total}/{total} " in shown


def test_callback_can_replace_the_code():
    pipe = make_pipeline()
    noise, first, second = torch.randn(1, 1, 8, 8), torch.zeros(1, 4), torch.ones(1, 4)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors)
        return {"latent_code": second}

    swapped = pipe.decode(
        first,
        noise,
        4,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=("latent_code",),
    )
    assert all(set(tensors) == {"latent_code"} for tensors in seen)
    assert torch.equal(seen[0]["latent_code"], first) and torch.equal(seen[1]["latent_code"], second)
    kept = pipe.decode(first, noise, 4, output_type="pt")
    assert not torch.allclose(swapped.images, kept.images)


def test_networks_of_different_precision():
    pipe = make_pipeline()
    image = torch.rand(2, 1, 8, 8)
    kwargs = {"num_inference_steps": 3, "num_inversion_steps": 3, "output_type": "pt"}
    expected = pipe(image, **kwargs).images
    for models in (("unet",), ("gradient_estimator",), ("encoder",), ("unet", "gradient_estimator", "encoder")):
        mixed = make_pipeline()
        for name in models:
            getattr(mixed, name).to(torch.bfloat16)
        output = mixed(image, **kwargs)
        assert output.images.dtype == torch.float32, "trajectories are kept in single precision"
        assert (output.images - expected).abs().mean() < 0.1
        trajectory = mixed.interpolate(image[:1], image[1:], 3, "trajectory", 3, 3, output_type="pt")
        assert trajectory.images.isfinite().all()
        gap = mixed.posterior_gap(image, [0, 999])
        assert gap.shifted.dtype == torch.float32 and gap.shifted.isfinite().all()


def test_from_pipe_of_a_stock_pipeline(tiny_ddpm):
    assert isinstance(tiny_ddpm, DDPMPipeline)
    scheduler = tiny_ddpm.scheduler
    unet = tiny_ddpm.unet
    pipe = PDAEPipeline.from_pipe(tiny_ddpm, encoder=make_encoder(), gradient_estimator=make_estimator(unet))
    assert pipe.unet is unet and tiny_ddpm.scheduler is scheduler and type(pipe.scheduler) is PDAEScheduler
    assert len(pipe(torch.rand(1, 1, 8, 8), num_inference_steps=2).images) == 1


def test_posterior_gap_of_an_untrained_estimator_is_that_of_the_model():
    pipe = make_pipeline()
    pipe.gradient_estimator = make_estimator(pipe.unet, trained=False)
    image = torch.rand(3, 1, 8, 8)
    for timesteps in ([0, 500, 999], range(3), np.array([4, 5]), torch.tensor([7])):
        gap = pipe.posterior_gap(image, timesteps, generator=torch.Generator().manual_seed(0))
        assert gap.base.shape == (len(timesteps),)
        assert torch.equal(gap.base, gap.shifted)
        assert gap.timesteps == [int(t) for t in timesteps] and all(type(t) is int for t in gap.timesteps)
    pipe.gradient_estimator = make_estimator(pipe.unet)
    gap = pipe.posterior_gap(image, [0, 500])
    assert gap.base[0] == gap.shifted[0], "at t = 0 the posterior has no variance to shift by"
    assert gap.base[1] != gap.shifted[1]


def test_compiled_blocks_are_called_and_change_nothing():
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe = make_pipeline("no middle attention", **plain)
    image = torch.rand(2, 1, 8, 8)
    expected = pipe(image, 2, 2, output_type="pt").images
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.compile_blocks(backend=backend)
    images = pipe(image, 2, 2, output_type="pt").images
    models = (pipe.unet, pipe.gradient_estimator)
    assert len(graphs) >= 2 + 2 * (1 + 2), "down blocks of one, middle and up blocks of both"
    assert all(block._compiled_call_impl for model in models for block in (model.mid_block, *model.up_blocks))
    torch.testing.assert_close(images, expected)
    torch._dynamo.reset()


# -- bad input

BATCH, CODE = torch.rand(2, 1, 8, 8), torch.randn(2, 4)
SIZE = r"`image` has images of .*\(1, 8, 8\).*resize or convert"
BAD_CALLS = {
    "wider image": (lambda p: p(torch.rand(2, 1, 8, 16)), SIZE),
    "color image": (lambda p: p(torch.rand(2, 3, 8, 8)), SIZE),
    "large PIL image": (lambda p: p.encode(Image.new("L", (16, 8))), SIZE),
    "mixed sizes": (lambda p: p.encode([BATCH[0], torch.rand(1, 4, 4)]), r"\(1, 4, 4\), \(1, 8, 8\)"),
    "five dimensions": (lambda p: p.encode(torch.rand(1, 1, 1, 8, 8)), SIZE),
    "flat array": (lambda p: p.encode(np.zeros((8, 8), np.float32)), r"shape \(8, 8\).*\(height, width, channels\)"),
    "range -1 to 1": (lambda p: p(2 * BATCH - 1), r"`image` has values in \[-0.9.*\[0, 1\].*image / 2 \+ 0.5"),
    "range 0 to 255": (lambda p: p(255 * BATCH), r"values in \[.*, 2\d\d.*rescale"),
    "not a number": (lambda p: p(BATCH * float("nan")), r"values in \[nan, nan\]"),
    "no image": (lambda p: p([]), "`image` is empty: give at least one"),
    "empty batch": (lambda p: p(BATCH[:0]), "`image` is empty: give at least one"),
    "bytes": (lambda p: p(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), r"TypeError: .*torch.uint8.*divide by 255"),
    "file name": (lambda p: p("cat.png"), "TypeError: `image` holds a str: give PIL images"),
    "wide code": (lambda p: p.decode(torch.randn(2, 5)), r"`latent_code` has shape \(2, 5\).*\(batch, 4\).*`encode`"),
    "flat code": (lambda p: p.decode(torch.randn(4)), r"`latent_code` has shape \(4,\).*\(batch, 4\)"),
    "no code": (lambda p: p.decode(None), "TypeError: `latent_code` is a NoneType.*tensor"),
    "array for a code": (lambda p: p.decode(np.zeros((2, 4))), "TypeError: `latent_code` is a ndarray.*tensor"),
    "codes of another batch": (lambda p: p.invert(BATCH, CODE[:1]), "batch of 1, but there are 2 images.*agree"),
    "codes of another batch, gap": (lambda p: p.posterior_gap(BATCH, [3], CODE[:1]), "batch of 1.*2 images"),
    "codes of another batch, denoise": (lambda p: p.denoise_one_step(BATCH, 3, CODE[:1]), "batch of 1.*2 images"),
    "noise of another batch": (
        lambda p: p.decode(CODE, torch.randn(1, 1, 8, 8)),
        r"`inverted_noise` has shape \(1, 1, 8, 8\).*needs \(2, 1, 8, 8\)",
    ),
    "noise of another size": (
        lambda p: p(BATCH, latents=torch.randn(2, 1, 4, 4)),
        r"`latents` has shape \(2, 1, 4, 4\)",
    ),
    "two noises": (lambda p: p(BATCH, num_inversion_steps=5, latents=BATCH), "`latents` and `num_inversion_steps`"),
    "sampler": (lambda p: p(BATCH, sampler="euler"), "`sampler` is 'euler'.*'ddim' or 'ddpm'"),
    "no steps": (lambda p: p(BATCH, num_inference_steps=0), "`num_inference_steps` is 0.*from 1 to 1000"),
    "too many steps": (lambda p: p.decode(CODE, num_inference_steps=1001), "is 1001.*from 1 to 1000"),
    "no inversion steps": (lambda p: p(BATCH, num_inversion_steps=0), "`num_inversion_steps` is 0.*from 1 to 1000"),
    "no inversion steps, path": (
        lambda p: p.interpolate(BATCH[0], BATCH[1], num_inversion_steps=0),
        "`num_inversion_steps` is 0.*from 1 to 1000",
    ),
    "reversed shift_range": (lambda p: p(BATCH, shift_range=(500, 300)), r"`shift_range` is \(500, 300\).*<= 1000"),
    "large shift_range": (lambda p: p(BATCH, shift_range=(0, 1001)), r"`shift_range` is \(0, 1001\).*<= 1000"),
    "shares for shift_range": (
        lambda p: p(BATCH, shift_range=(0.3, 1.0)),
        r"`shift_range` is \(0.3, 1.0\).*timesteps",
    ),
    "output type": (lambda p: p.decode(CODE, output_type="latent"), "`output_type` is 'latent'.*'pil', 'np' or 'pt'"),
    "labels for nothing": (lambda p: p(BATCH, class_labels=[1, 2]), "`class_labels` were given.*leave them out"),
    "generators": (lambda p: p.decode(CODE, generator=[torch.Generator()]), "`generator` is a list of 1.*batch of 2"),
    "generators, gap": (
        lambda p: p.posterior_gap(BATCH, [3], generator=[torch.Generator()]),
        "`generator` is a list of 1 for a batch of 2",
    ),
    "tuple of generators": (lambda p: p.decode(CODE, generator=(torch.Generator(),)), "`generator` is a list of 1"),
    "list for noise": (lambda p: p(BATCH, latents=[1.0]), "TypeError: `latents` is a list.*tensor"),
    "half a step": (lambda p: p(BATCH, num_inference_steps=2.5), "`num_inference_steps` is 2.5.*whole number"),
    "one number for shift_range": (lambda p: p(BATCH, shift_range=300), "`shift_range` is 300.*two whole timesteps"),
    "word for shift_scale": (lambda p: p(BATCH, shift_scale="big"), "`shift_scale` is 'big'.*finite number"),
    "NaN for shift_scale": (lambda p: p.decode(CODE, shift_scale=float("nan")), "`shift_scale` is nan.*finite"),
    "NaN in a code": (lambda p: p.decode(CODE * float("nan")), "`latent_code` is empty, or not finite"),
    "no codes": (lambda p: p.decode(CODE[:0]), "`latent_code` is empty, or not finite"),
    "mode": (lambda p: p.interpolate(BATCH[0], BATCH[1], mode="z"), "`mode` is 'z'.*'latent' or 'trajectory'"),
    "short path": (lambda p: p.interpolate(BATCH[0], BATCH[1], 1), "`num` is 1, but a path has at least its 2 ends"),
    "batches at the ends": (lambda p: p.interpolate(BATCH, BATCH), "`a` and `b` hold 2 and 2 images: give one each"),
    "wrong end": (lambda p: p.interpolate(BATCH[0], torch.rand(3, 8, 8)), r"`b` has images of .*\(3, 8, 8\)"),
    "timestep": (lambda p: p.denoise_one_step(BATCH, 1000), "1000.*from 0 to 999"),
    "negative timestep": (lambda p: p.posterior_gap(BATCH, [5, -1]), "-1.*from 0 to 999"),
    "no timesteps": (lambda p: p.posterior_gap(BATCH, []), "from 0 to 999"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_before_a_model_runs(name):
    pipe = make_pipeline()
    call, message = BAD_CALLS[name]
    error = TypeError if message.startswith("TypeError: ") else ValueError
    with pytest.raises(error, match=message.removeprefix("TypeError: ")), no_model_runs(pipe):
        call(pipe)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "`class_labels` are missing.*class-conditional"),
        ([1, 2, 3], "`class_labels` has 3 entries for a batch of 2: give one or 2"),
        ([1, 10], r"`class_labels`.*10.*from 0 to 9"),
        (-1, r"`class_labels`.*-1.*from 0 to 9"),
    ],
)
def test_bad_labels_are_refused_before_a_model_runs(labels, message):
    pipe = make_pipeline("class-conditional")
    with pytest.raises(ValueError, match=message), no_model_runs(pipe):
        pipe(BATCH, class_labels=labels)


@pytest.mark.parametrize("labels", [[0.5, 1.0], [True, False]])
def test_labels_are_integers(labels):
    pipe = make_pipeline("class-conditional")
    with pytest.raises(TypeError, match="`class_labels` has dtype .*integers"), no_model_runs(pipe):
        pipe(BATCH, class_labels=labels)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"encoder": {"latent_dim": 5}}, "`latent_dim`: {'encoder': 5, 'gradient_estimator': 4}.*one training run"),
        ({"encoder": {"in_channels": 3}}, "`in_channels`: {'unet': 1, 'encoder': 3"),
        ({"encoder": {"sample_size": 9}}, r"`sample_size` .*9.*multiple of 2"),
        ({"estimator_of": {"block_out_channels": (8, 16)}}, r"`block_out_channels`.*\[8, 16\].*\[8, 8\].*trained on"),
        ({"estimator_of": {"layers_per_block": 2}}, "`layers_per_block`.*2.*1.*trained on"),
        ({"estimator_of": {"time_embedding_dim": 64}}, "`time_embedding_dim`.*64.*None.*trained on"),
        ({"estimator_of": {"in_channels": 3, "out_channels": 3}}, "`in_channels`: {'unet': 1, 'encoder': 1"),
        ({"unet": {"time_embedding_type": "fourier"}}, "fourier"),
    ],
)
def test_components_that_do_not_fit_are_refused(parts, message):
    unet = make_unet(**parts.get("unet", {}))
    encoder = make_encoder(**parts.get("encoder", {}))
    estimator = make_estimator(make_unet(**parts.get("estimator_of", {})))
    with pytest.raises(ValueError, match=message):
        PDAEPipeline(unet, encoder, estimator, PDAEScheduler())


def test_repo_of_another_latent_size_is_refused(tmp_path):
    """Half of one training run beside half of another."""
    make_pipeline().save_pretrained(tmp_path)
    make_encoder(latent_dim=6).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="`latent_dim`: {'encoder': 6, 'gradient_estimator': 4}"):
        PDAEPipeline.from_pretrained(tmp_path)


def test_estimator_refuses_codes_that_do_not_fit():
    unet = make_unet()
    features = unet_down(unet, torch.randn(2, 1, 8, 8), torch.tensor([3, 999]))
    for shape in ((2, 5), (1, 4), (4,)):
        with pytest.raises(ValueError, match=r"`latent_code` has shape .*batch of 2 needs \(2, 4\).*own encoder"):
            make_estimator(unet)(*features, latent_code=torch.zeros(shape))
