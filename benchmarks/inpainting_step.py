"""What CoPaint costs beside the bare network passes that it consists of, in time and in memory.

```bash
python benchmarks/inpainting_step.py                                          # on the CPU
python benchmarks/inpainting_step.py --device cuda --sizes 256 --dtype float16   # an ADM-sized network
python benchmarks/inpainting_step.py --gradient_checkpointing --compile
```

Time: a whole call of the pipeline against the sum of its forward passes and of its forward-and-backward passes, each
timed alone, in turn with the call, so that the ratios hold when the machine's speed drifts. Memory: the peak over the
weights during a call against that of one bare forward and backward pass, on the CPU each in a process of its own by
Linux's high-water mark of resident memory, on a GPU by PyTorch's count. The medians are printed and written to
`inpainting_step.csv` beside this file. `whole / sum of passes` must not exceed 1.05 for a network of 50 ms a pass, and
`peak / bare peak` must not exceed 1.1.
"""

import argparse
import csv
import ctypes
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from diffusers import UNet2DModel

from diffusers_ext.pipelines.copaint import CoPaintPipeline, CoPaintScheduler

# name -> U-Net. "256" is the network of google/ddpm-celebahq-256 with the six output channels of ADM.
SIZES = {
    "64": {
        "sample_size": 64, "block_out_channels": (64, 128, 128), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    "256": {
        "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512), "layers_per_block": 2,
        "out_channels": 6, "downsample_padding": 0,
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    },
}  # fmt: skip


def build(size: str, args: argparse.Namespace) -> CoPaintPipeline:
    """A pipeline around a random network."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    unet = UNet2DModel(**SIZES[size]).eval().to(args.device, getattr(torch, args.dtype))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile()
    pipe = CoPaintPipeline(unet, CoPaintScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def workloads(pipe: CoPaintPipeline, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The call, and the bare passes: forward without a graph, and forward with the gradient of the sample."""
    unet = pipe.unet
    side = unet.config.sample_size
    image = torch.rand(args.batch_size, 3, side, side, device=args.device)
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 2 :] = 1
    state = torch.randn(args.batch_size, 3, side, side, device=args.device)
    timesteps = torch.full((args.batch_size,), 500, device=args.device)

    def call() -> None:
        pipe(
            image, mask, num_inference_steps=args.steps, adaptive_learning_rate=not args.no_line_search,
            learning_rate=1e-6, generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            unet(state.to(unet.dtype), timesteps)

    def forward_backward() -> None:
        leaf = state.requires_grad_()
        torch.autograd.grad(unet(leaf.to(unet.dtype), timesteps).sample[:, :3].float().square().sum(), leaf)

    return {"call": call, "forward": forward, "forward and backward": forward_backward}


def count_passes(pipe: CoPaintPipeline, call: Callable[[], object]) -> tuple[int, int]:
    """Forward passes without and with a graph in one call; each of the latter has its backward pass."""
    counts = {False: 0, True: 0}

    def hook(module: torch.nn.Module, args: tuple) -> None:
        counts[torch.is_grad_enabled()] += 1

    handle = pipe.unet.register_forward_pre_hook(hook)
    call()
    handle.remove()
    return counts[False], counts[True]


def peak_memory(size: str, name: str, args: argparse.Namespace, result: SimpleQueue | None) -> float:
    """Peak of memory over that of the idle pipeline, in MiB."""
    pipe = build(size, args)
    workload = workloads(pipe, args)[name]
    workload()  # what the libraries keep for themselves is there now
    if args.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        workload()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = resident("VmHWM")
    workload()
    peak = resident("VmHWM") - before
    result.put(peak)
    return peak


def resident(field: str) -> float:
    """A field of this process's status in MiB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(size: str, args: argparse.Namespace) -> list[list[object]]:
    """Measures one size, prints its figures and returns their rows."""
    pipe = build(size, args)
    timed = workloads(pipe, args)
    samples = {name: [] for name in timed}
    without, with_graph = count_passes(pipe, timed["call"])
    for _ in range(args.repeats + 1):
        for name, function in timed.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    samples = {name: values[1:] for name, values in samples.items()}  # the first is the warm-up
    median = {name: statistics.median(values) for name, values in samples.items()}
    total = without * median["forward"] + with_graph * median["forward and backward"]
    del pipe, timed

    peaks = {}
    for name in ("call", "forward and backward"):
        if args.device == "cuda":
            peaks[name] = peak_memory(size, name, args, None)
            torch.cuda.empty_cache()
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, and is not counted
            context = multiprocessing.get_context("spawn")
            result = context.SimpleQueue()
            process = context.Process(target=peak_memory, args=(size, name, args, result))
            process.start()
            process.join()
            peaks[name] = result.get()

    print(f"\n{size} x {size}, batch {args.batch_size}, {args.dtype}, {args.device}, {args.steps} steps:")
    print(f"{without} forward and {with_graph} forward-and-backward passes")
    for name, value in median.items():
        print(f"{name:22s} {1000 * value:10.2f} ms")
    print(f"{'sum of passes':22s} {1000 * total:10.2f} ms   whole / sum of passes = {median['call'] / total:.3f}")
    ratio = peaks["call"] / peaks["forward and backward"]
    print(f"{'peak of the call':22s} {peaks['call']:10.1f} MiB")
    print(f"{'peak of one pass':22s} {peaks['forward and backward']:10.1f} MiB  peak / bare peak = {ratio:.3f}")
    setting = [size, args.batch_size, args.dtype, args.device, args.threads, args.gradient_checkpointing, args.compile]
    return [
        [*setting, "whole / sum of passes", f"{median['call'] / total:.4f}"],
        [*setting, "ms per step", f"{1000 * median['call'] / args.steps:.2f}"],
        [*setting, "ms per forward", f"{1000 * median['forward']:.2f}"],
        [*setting, "ms per forward and backward", f"{1000 * median['forward and backward']:.2f}"],
        [*setting, "peak / bare peak", f"{ratio:.4f}"],
        [*setting, "peak MiB", f"{peaks['call']:.1f}"],
    ]


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["64"])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_line_search", action="store_true", help="fixed learning rate: no trial is ever rejected")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure(size, args)]
    path = Path(__file__).with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["size", "batch", "dtype", "device", "threads", "gradient_checkpointing", "compile", "figure", "value"]
        )
        writer.writerows(rows)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
