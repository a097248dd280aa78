"""What one PDAE training step costs, beside the sum of its parts and beside the authors' arrangement.

```bash
python benchmarks/training_step.py                              # on digits' sizes and on 32 x 32 RGB, on the CPU
python benchmarks/training_step.py --device cuda --sizes 128    # the paper's channel widths
python benchmarks/training_step.py --reference PDAE             # also times a checkout of the authors' code
```

All rows of a size are measured in turn in one process, so that their ratios hold when the machine's speed drifts; the
medians are printed and written to `training_step.csv` beside this file. The step is what the training script does from
a batch to the gradients: noise, one pass through the frozen U-Net's down blocks, its own output, the gradient
estimator, the weighted loss, the backward pass. `whole` must not exceed 1.10 x `sum of parts`.

The authors' arrangement is one module that interleaves the frozen and the trained decoder block by block, outside of
`no_grad`, and modulates every residual block twice (time, then code) instead of once by the folded scale and shift.
`authors' arrangement` rebuilds this from diffusers' blocks with the same weights; `authors' code` is theirs.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusers_ext.pipelines.pdae import PDAEEncoder, PDAEGradientEstimator, PDAEScheduler, unet_down, unet_up

# name -> U-Net, encoder, batch size. "32" and "128" are of the authors' kind, so that their code can build them too.
SIZES = {
    "digits": (
        {
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32),
            "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "attention_head_dim": 8,
        },
        {"latent_dim": 32, "block_out_channels": (32, 64), "attention_block": None, "norm_num_groups": 8},
        64,
    ),
    "32": (
        {
            "sample_size": 32, "block_out_channels": (64, 128), "layers_per_block": 1,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32, "attention_head_dim": 128,
        },
        {"latent_dim": 64, "block_out_channels": (64, 128, 128), "attention_block": 0},
        8,
    ),
    "128": (
        {
            "sample_size": 128, "block_out_channels": (128, 128, 256, 384, 512), "layers_per_block": 2,
            "down_block_types": (*("ResnetDownsampleBlock2D",) * 3, "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", *("ResnetUpsampleBlock2D",) * 3),
            "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32, "attention_head_dim": 384,
        },
        {"latent_dim": 512},
        32,
    ),
}  # fmt: skip


class AuthorsArrangement(nn.Module):
    """Frozen and trained decoder side by side in one module, modulated twice: the yardstick."""

    def __init__(self, unet: UNet2DModel, encoder: PDAEEncoder, estimator: PDAEGradientEstimator) -> None:
        super().__init__()
        self.unet, self.encoder, self.estimator = unet, encoder, estimator

    def _block(self, resnet: ResnetBlock2D, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        time, code = temb.chunk(2, dim=1)
        act = resnet.nonlinearity
        hidden = act(resnet.norm1(hidden_states))
        if resnet.upsample is not None:
            hidden_states, hidden = resnet.upsample(hidden_states), resnet.upsample(hidden)
        hidden = resnet.norm2(resnet.conv1(hidden))
        for projection, embedding in (
            (resnet.time_emb_proj.time_proj, time),
            (resnet.time_emb_proj.code_proj, code),
        ):
            scale, shift = projection(act(embedding))[:, :, None, None].chunk(2, dim=1)
            hidden = (1 + scale) * hidden + shift
        hidden = resnet.conv2(resnet.dropout(act(hidden)))
        shortcut = hidden_states if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden_states)
        return (shortcut + hidden) / resnet.output_scale_factor

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise prediction and gradient."""
        unet, estimator = self.unet, self.estimator
        hidden, skips, temb = unet_down(unet, sample, timesteps)
        both = torch.cat([temb, estimator.code_embedding(self.encoder(images))], dim=1)
        shifted = hidden.contiguous()
        for i, resnet in enumerate(estimator.mid_block.resnets):
            if i > 0:
                attention = estimator.mid_block.attentions[i - 1]
                shifted = attention(shifted, temb=both) if attention is not None else shifted
            shifted = self._block(resnet, shifted, both)
        hidden = unet.mid_block(hidden, temb)
        for frozen, trained in zip(unet.up_blocks, estimator.up_blocks, strict=True):
            count = len(frozen.resnets)
            hidden = frozen(hidden, skips[-count:], temb)
            for i, resnet in enumerate(trained.resnets):
                shifted = self._block(resnet, torch.cat([shifted, skips[-1 - i]], dim=1), both)
                if hasattr(trained, "attentions"):
                    shifted = trained.attentions[i](shifted)
            for upsampler in trained.upsamplers or ():
                resnet_sampler = isinstance(upsampler, ResnetBlock2D)
                shifted = self._block(upsampler, shifted, both) if resnet_sampler else upsampler(shifted)
            skips = skips[:-count]
        noise_pred = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        gradient = estimator.conv_out(estimator.conv_act(estimator.conv_norm_out(shifted)))
        return noise_pred, gradient


def authors_code(folder: Path, size: str, device: torch.device) -> nn.Module:
    """Their ShiftUNet of the same sizes, with our encoder, since theirs are hard-coded for two resolutions."""
    sys.path.insert(0, str(folder))
    from model.shift_unet import ShiftUNet

    unet, encoder, _ = SIZES[size]
    attention = [2**i for i, name in enumerate(unet["down_block_types"]) if name.startswith("Attn")]
    base = unet["block_out_channels"][0]
    model = ShiftUNet(
        input_channel=3, base_channel=base, channel_multiplier=[c // base for c in unet["block_out_channels"]],
        num_residual_blocks_of_a_block=unet["layers_per_block"], attention_resolutions=attention, num_heads=1,
        head_channel=-1, use_new_attention_order=True, dropout=0.0, latent_dim=encoder["latent_dim"],
    )  # fmt: skip
    model.set_train_mode()
    return model.to(device)


def measure(size: str, args: argparse.Namespace) -> list[list[str]]:
    """Measures one size in turn, prints its table and returns its rows."""
    device = torch.device(args.device)

    def seconds(function: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # 1. Models, inputs, and the features that parts are timed on
    torch.manual_seed(0)
    unet_config, encoder_config, batch_size = SIZES[size]
    batch_size = args.batch_size or batch_size
    unet = UNet2DModel(**unet_config).requires_grad_(False).eval().to(device)
    channels, resolution = unet.config.in_channels, unet.config.sample_size
    encoder = PDAEEncoder(resolution, channels, **encoder_config).to(device)
    estimator = PDAEGradientEstimator.from_unet(unet, encoder_config["latent_dim"]).to(device)
    for parameter in estimator.parameters():  # zero convolutions would let the backward pass skip work
        nn.init.normal_(parameter, std=0.02)
    scheduler = PDAEScheduler()
    images = torch.rand(batch_size, channels, resolution, resolution, device=device) * 2 - 1
    noise, timesteps = torch.randn_like(images), torch.randint(0, 1000, (batch_size,), device=device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.no_grad():
        features = unet_down(unet, noisy, timesteps)
    code = torch.randn(batch_size, encoder_config["latent_dim"], device=device)
    cotangent = torch.randn_like(images)
    trained = [*encoder.parameters(), *estimator.parameters()]
    passes = []
    unet.down_blocks[0].register_forward_hook(lambda *_: passes.append(1))

    def loss(model_output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        shifted = scheduler.predict_noise(model_output, timesteps, noisy, gradient)
        return (scheduler.loss_weight(timesteps, sample=images) * (noise - shifted).square()).mean()

    # 2. What is timed. Gradients are computed and let go, so that no row pays for the one before.
    def whole() -> None:
        noisy = scheduler.add_noise(images, noise, timesteps)
        with torch.no_grad():
            features = unet_down(unet, noisy, timesteps)
            model_output = unet_up(unet, *features)
        torch.autograd.grad(loss(model_output, estimator(*features, encoder(images))), trained)

    arrangement = AuthorsArrangement(unet, encoder, estimator)

    def down() -> None:
        with torch.no_grad():
            unet_down(unet, noisy, timesteps)

    def up() -> None:
        with torch.no_grad():
            unet_up(unet, *features)

    def estimate() -> None:
        leaf = code.requires_grad_()
        torch.autograd.grad(estimator(*features, leaf), [leaf, *estimator.parameters()], cotangent)

    def encode() -> None:
        torch.autograd.grad(encoder(images), [*encoder.parameters()], code.detach())

    def yardstick() -> None:
        noisy = scheduler.add_noise(images, noise, timesteps)
        torch.autograd.grad(loss(*arrangement(noisy, timesteps, images)), trained)

    parts = {"U-Net down": down, "U-Net up": up, "estimator": estimate, "encoder": encode}
    timed = {"whole": whole, **parts, "authors' arrangement": yardstick}
    if args.reference is not None and size != "digits":
        reference = authors_code(args.reference, size, device)
        theirs = [*encoder.parameters(), *(p for p in reference.parameters() if p.requires_grad)]

        def their_step() -> None:
            noisy = scheduler.add_noise(images, noise, timesteps)
            torch.autograd.grad(loss(*reference(noisy, timesteps, encoder(images))), theirs)

        timed["authors' code"] = their_step
    # The yardstick computes the same thing.
    with torch.no_grad():
        ours = unet_up(unet, *features), estimator(*features, encoder(images))
        for mine, other in zip(ours, arrangement(noisy, timesteps, images), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)

    # 3. Measure in turn
    for function in timed.values():
        function()
    passes.clear()
    whole()
    down_passes = len(passes)
    samples = {name: [] for name in timed}
    for _ in range(args.repeats):
        for name, function in timed.items():
            samples[name].append(seconds(function))
    total = [sum(values) for values in zip(*(samples[name] for name in parts), strict=True)]
    samples = {"whole": samples["whole"], "sum of parts": total, **samples}
    rows = []
    print(f"\n{size}: batch {batch_size}, {args.device}, {args.threads} thread(s), {args.repeats} repeats")
    print(f"passes through the U-Net's down blocks in one step: {down_passes}")
    for name, values in samples.items():
        ratio = statistics.median(a / b for a, b in zip(samples["whole"], values, strict=True))
        milliseconds = 1000 * statistics.median(values)
        note = "" if name in ("whole", *parts) else f"   whole / {name} = {ratio:.3f}"
        print(f"{name:22s} {milliseconds:9.2f} ms{note}")
        rows.append([size, batch_size, args.device, args.threads, name, f"{milliseconds:.3f}", f"{ratio:.4f}"])
    return rows


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["digits", "32"])
    parser.add_argument("--batch_size", type=int, help="by default 64 for digits, 8 for 32, 32 for 128")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is fastest for tiny models")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for size in args.sizes for row in measure(size, args)]
    path = Path(__file__).with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "batch", "device", "threads", "row", "median_ms", "whole_over_row"])
        writer.writerows(rows)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
