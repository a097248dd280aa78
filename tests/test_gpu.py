"""What only a CUDA device can show: half precision, compiled blocks, offloading, and the cost of a training step."""

import statistics

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_ext import (
    ClassifierGuidancePipeline,
    NoisyClassifier,
    PDAEEncoder,
    PDAEGradientEstimator,
    PDAEPipeline,
    PDAEScheduler,
    UnCLIPTextToImagePipeline,
)
from diffusers_ext.pipelines.pdae import unet_down, unet_up

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32, so that single precision is one."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_pipeline():
    """
    32 x 32 RGB, random weights instead of the zeros of the start. The U-Net predicts v, from which the estimate of the
    image is well-conditioned at every timestep, as a trained network's is from its noise.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    encoder = PDAEEncoder(32, latent_dim=64, block_out_channels=(32, 64, 64), attention_block=1)
    estimator = PDAEGradientEstimator.from_unet(unet, 64)
    for parameter in estimator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.normal_(estimator.conv_out.weight, std=1e-3)
    scheduler = PDAEScheduler(prediction_type="v_prediction")
    pipe = PDAEPipeline(unet.eval(), encoder.eval(), estimator.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencode(pipe, num_inversion_steps=10):
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    return pipe(
        image,
        num_inference_steps=10,
        num_inversion_steps=num_inversion_steps,
        generator=generator,
        output_type="pt",
    )


def report(capsys, text):
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: {text}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=str)
def test_half_precision_against_single(dtype, tolerance, capsys):
    expected = autoencode(make_pipeline().to("cuda"))
    output = autoencode(make_pipeline().to("cuda", dtype))
    assert output.latent_code.dtype == dtype
    assert output.images.dtype == output.inverted_noise.dtype == torch.float32, "trajectories stay in single precision"
    differences = {}
    for name in ("latent_code", "inverted_noise", "images"):
        value, exact = output[name].float(), expected[name].float()
        assert value.isfinite().all(), name
        differences[name] = ((value - exact).square().mean() / exact.square().mean()).sqrt().item()
    figures = ", ".join(f"{name} {difference:.2e}" for name, difference in differences.items())
    report(capsys, f"relative error of {dtype}: {figures}")
    assert max(differences.values()) < tolerance, differences


def test_device_equals_cpu():
    expected = autoencode(make_pipeline())
    output = autoencode(make_pipeline().to("cuda"))
    assert output.images.is_cuda
    torch.testing.assert_close(output.images.cpu(), expected.images, rtol=0, atol=1e-3)
    draws = autoencode(make_pipeline().to("cuda"), num_inversion_steps=None).inverted_noise
    expected = autoencode(make_pipeline(), num_inversion_steps=None).inverted_noise
    assert torch.equal(draws.cpu(), expected), "a generator of the CPU draws the same noise for every device"


def test_compiled_blocks(capsys):
    pipe = make_pipeline().to("cuda")
    expected = autoencode(pipe).images

    def seconds():
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        images = autoencode(pipe).images
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, images

    eager, _ = seconds()
    pipe.compile_blocks()
    autoencode(pipe)
    compiled, images = seconds()
    report(capsys, f"20 moves of 4 images 32 x 32: {eager:.3f} s, with compiled blocks {compiled:.3f} s")
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-3)


def test_model_cpu_offload():
    expected = autoencode(make_pipeline().to("cuda"))
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        output = autoencode(pipe)
        torch.testing.assert_close(output.images.cpu(), expected.images.cpu(), rtol=0, atol=1e-4)
        devices = {name: next(getattr(pipe, name).parameters()).device.type for name in ("unet", "encoder")}
        assert devices == {"unet": "cpu", "encoder": "cpu"}
        assert next(pipe.gradient_estimator.parameters()).device.type == "cpu"
    code = pipe.encode(torch.rand(2, 3, 32, 32))
    assert len(pipe.decode(code, num_inference_steps=2).images) == 2
    assert pipe.posterior_gap(torch.rand(2, 3, 32, 32), [10]).base.isfinite().all()


@pytest.mark.parametrize("mixed_precision", [None, torch.bfloat16], ids=str)
def test_training_step_of_the_paper(mixed_precision, capsys):
    """128 x 128 with the paper's widths: 128 channels times 1, 1, 2, 3, 4, attention at 16 x 16, codes of 512."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=128,
        block_out_channels=(128, 128, 256, 384, 512),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        attn_norm_num_groups=32,
    )
    unet.eval().requires_grad_(False).to("cuda")
    encoder, estimator = PDAEEncoder().to("cuda"), PDAEGradientEstimator.from_unet(unet).to("cuda")
    scheduler = PDAEScheduler()
    optimizer = torch.optim.Adam([*encoder.parameters(), *estimator.parameters()], lr=1e-4)
    trunk_passes = []
    unet.down_blocks[0].register_forward_hook(lambda *args: trunk_passes.append(1))
    batch_size = 16
    images = torch.rand(batch_size, 3, 128, 128, device="cuda") * 2 - 1

    def step():
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (batch_size,), device="cuda")
        noisy = scheduler.add_noise(images, noise, timesteps)
        with torch.autocast("cuda", mixed_precision, enabled=mixed_precision is not None):
            with torch.no_grad():
                features = unet_down(unet, noisy, timesteps)
                model_output = unet_up(unet, *features)
            gradient = estimator(*features, latent_code=encoder(images))
        error = (noise - scheduler.predict_noise(model_output, timesteps, noisy, gradient)).square()
        loss = (scheduler.loss_weight(timesteps, sample=error) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() / MIB
    report(
        capsys,
        f"training step, {batch_size} images 128 x 128, {mixed_precision or 'float32'}: "
        f"{statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f}), peak {peak:.0f} MiB; parameters: "
        f"unet {unet.num_parameters() / 1e6:.1f} M, encoder {encoder.num_parameters() / 1e6:.1f} M, "
        f"estimator {estimator.num_parameters() / 1e6:.1f} M",
    )
    assert loss.isfinite()
    assert len(trunk_passes) == 13, "one trunk pass per step"
    assert all(parameter.grad is None for parameter in unet.parameters())


# ----------------------------------------------------------------------------------- gradients while others are guided


def make_guided(dtype=torch.float32, classifier_dtype=None):
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DModel(
        32, 3, 6, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )  # fmt: skip
    classifier = NoisyClassifier(32, num_classes=10, attention_head_dim=16, **blocks)
    unet.to(dtype), classifier.to(classifier_dtype or dtype)
    pipe = ClassifierGuidancePipeline(unet.eval(), DDIMScheduler(), classifier.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"timestep_respacing": "ddim10", "guidance_scale": 5.0, "output_type": "latent"}
    return pipe([0, 1, 2, 3], latents=noise, **options).images.cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_guidance_in_half_precision(dtype):
    expected = draw(make_guided().to("cuda"))
    torch.testing.assert_close(draw(make_guided()), expected, rtol=0, atol=1e-3)
    halved = draw(make_guided(dtype).to("cuda"))
    assert halved.isfinite().all() and (halved - expected).abs().mean() < 0.05
    only = draw(make_guided(classifier_dtype=dtype).to("cuda"))
    assert (only - expected).abs().mean() < 0.02


def test_guidance_with_model_offload():
    """The classifier's gradient is taken while it is on the device."""
    pipe = make_guided()
    expected = draw(make_guided().to("cuda"))
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    assert pipe.unet.device.type == pipe.classifier.device.type == "cpu"


def paint(pipe):
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    texts = ["a red three", "a small seven"]
    return pipe(texts, num_inference_steps=10, generator=generator, output_type="latent").images.float().cpu()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=str)
def test_unclip_in_half_precision(tiny_unclip_folder, dtype, tolerance):
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tiny_unclip_folder / "unclip")
    expected = paint(pipe)
    torch.testing.assert_close(paint(pipe.to("cuda")), expected, rtol=0, atol=1e-3)
    # all but the prior in half precision: which of two candidates is painted may turn by a hair
    for name in ("decoder", "decoder_projection"):
        getattr(pipe, name).to(dtype)
    halved = paint(pipe)
    assert halved.isfinite().all() and (halved - expected).abs().mean() < tolerance
    assert paint(pipe.to(dtype)).isfinite().all()


def test_unclip_with_model_offload(tiny_unclip_folder):
    pipe = UnCLIPTextToImagePipeline.from_pretrained(tiny_unclip_folder / "unclip")
    expected = paint(pipe)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(paint(pipe), expected, rtol=0, atol=1e-3)
        assert {getattr(pipe, name).device.type for name in ("text_encoder", "decoder")} == {"cpu"}
    image = torch.rand(1, 3, 32, 32)
    edited = pipe.text_diff(image, "a red three", "a three", num=2, num_inference_steps=2, output_type="pt")
    assert len(edited.images) == 2 and len(pipe.variations(image, num_inference_steps=2).images) == 1
