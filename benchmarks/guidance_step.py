"""What a guided step costs beside the bare network passes that it consists of, and what half precision changes.

```bash
python benchmarks/guidance_step.py                                                 # on the CPU
python benchmarks/guidance_step.py --device cuda --sizes 64 256 --dtypes float32 float16 bfloat16   # ADM's networks
```

Random weights of ADM's architecture: "tiny" is an eighth as wide, "64" and "256" are the U-Nets and classifiers of
ImageNet at these resolutions. A whole call of the pipeline is timed in turn with its parts, one forward pass of the
U-Net and one forward and backward pass of the classifier, so that the ratios hold when the machine's speed drifts. The
medians are printed and written to `guidance_step.csv` beside this file: `whole / sum of passes` must not exceed 1.05.
Also the peak of the GPU's memory over the weights, the share of exact zeros in the classifier's gradient, and the
gradient's relative error against float32.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusers_ext.pipelines.classifier_guidance import (
    ClassifierGradient,
    ClassifierGuidancePipeline,
    GuidedScheduler,
    NoisyClassifier,
)

# name -> resolution, widths of U-Net and classifier, their residual layers, resolutions with attention
SIZES = {
    "tiny": (64, (24, 48, 72, 96), (16, 32, 48, 64), 3, 2, 8),
    "64": (64, (192, 384, 576, 768), (128, 256, 384, 512), 3, 4, 64),
    "256": (256, (256, 256, 512, 512, 1024, 1024), (128, 128, 256, 256, 512, 512), 2, 2, 64),
}


def build(size: str, device: str) -> tuple[UNet2DModel, NoisyClassifier]:
    """U-Net and classifier with random weights; ADM's last layers start at zero, these do not."""
    resolution, widths, classifier_widths, layers, classifier_layers, head = SIZES[size]
    attends = [resolution >> level <= 32 for level in range(len(widths))]
    down = tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends)
    up = tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends))
    groups = 8 if size == "tiny" else 32
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DModel(
            resolution, 3, 6, block_out_channels=widths, layers_per_block=layers, down_block_types=down,
            up_block_types=up, downsample_type="resnet", upsample_type="resnet", attention_head_dim=head,
            resnet_time_scale_shift="scale_shift", norm_num_groups=groups, attn_norm_num_groups=groups,
        )  # fmt: skip
        classifier = NoisyClassifier(
            resolution, layers_per_block=classifier_layers, block_out_channels=classifier_widths,
            attention_head_dim=head, norm_num_groups=groups,
        )  # fmt: skip
    return unet.eval().requires_grad_(False), classifier.eval().requires_grad_(False)


def main() -> None:
    """Builds, times, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="names of torch dtypes, of both networks")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="guided steps per call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")

    def seconds(function: Callable, *inputs: torch.Tensor, **options: Any) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs, **options)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = []
    for size in args.sizes:
        unet, classifier = build(size, args.device)
        noise = torch.randn(args.batch_size, 3, *(SIZES[size][0],) * 2, device=args.device)
        labels = torch.arange(args.batch_size, device=args.device)
        times = torch.full((args.batch_size,), 500, device=args.device)
        exact = ClassifierGradient(classifier, labels)(noise, times)
        for name in args.dtypes:
            dtype = getattr(torch, name)
            unet.to(dtype), classifier.to(dtype)
            pipe = ClassifierGuidancePipeline(unet, GuidedScheduler(variance_type="learned_range"), classifier)
            pipe.set_progress_bar_config(disable=True)
            options = {"num_inference_steps": args.steps, "latents": noise, "output_type": "latent"}
            gradient = ClassifierGradient(classifier, labels)
            whole, parts = [], []
            for repeat in range(args.repeats + 1):  # the first warms up
                if cuda:
                    weights = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                taken = seconds(pipe, labels, **options)
                peak = (torch.cuda.max_memory_allocated() - weights) / 2**30 if cuda else float("nan")
                with torch.no_grad():
                    passes = sum(
                        seconds(unet, noise.to(dtype), times) + seconds(gradient, noise, times)
                        for _ in range(args.steps)
                    )
                if repeat:
                    whole.append(taken), parts.append(taken / passes)
            found = gradient(noise, times)
            rows.append(
                {
                    "device": torch.cuda.get_device_name() if cuda else "CPU",
                    "size": size,
                    "dtype": name,
                    "ms per step": 1e3 * statistics.median(whole) / args.steps,
                    "whole / sum of passes": statistics.median(parts),
                    "peak GiB over weights": peak,
                    "zero gradients": (found == 0).double().mean().item(),
                    "gradient error": ((found - exact).norm() / exact.norm()).item(),
                }
            )
            print(" | ".join(f"{key} {x:.4g}" if isinstance(x, float) else str(x) for key, x in rows[-1].items()))
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
