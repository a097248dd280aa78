"""`diffusers-ext evaluate`: measure a saved pipeline on a data set."""

import argparse
from pathlib import Path

import torch

from diffusers_ext.data import load_image_dataset
from diffusers_ext.evaluation.pdae import draw_pdae, evaluate_pdae
from diffusers_ext.evaluation.report import markdown_report, write_report
from diffusers_ext.pipelines.pdae import PDAEPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("repo", help="folder or Hub repo of a PDAEPipeline")
    parser.add_argument("--revision", help="branch, tag or commit of the repo")
    data = parser.add_argument_group("data, as in training")
    data.add_argument(
        "--dataset_name", "--dataset-name", help="digits, photos, a data set of the Hub or a folder for `datasets`"
    )
    data.add_argument("--dataset_config_name", "--dataset-config-name", help="configuration of the Hub data set")
    data.add_argument(
        "--train_data_dir", "--train-data-dir", type=Path, help="folder of images, instead of --dataset_name"
    )
    data.add_argument("--image_column", "--image-column", default="image")
    data.add_argument("--label_column", "--label-column", default="label")
    data.add_argument("--cache_dir", "--cache-dir", help="where `datasets` keeps its files")
    data.add_argument(
        "--validation_fraction",
        "--validation-fraction",
        type=float,
        help="share or number of the images that are held out",
    )
    data.add_argument(
        "--seed", type=int, default=0, help="chooses the held-out images (give that of the training), and the noise"
    )
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("evaluation"), help="default: evaluation"
    )
    parser.add_argument("--batch_size", "--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--num_inference_steps", "--num-inference-steps", type=int, default=50, help="decoding moves (default: 50)"
    )
    parser.add_argument(
        "--num_inversion_steps",
        "--num-inversion-steps",
        type=int,
        default=50,
        help="moves to infer noise (default: 50); 0 leaves that out",
    )
    parser.add_argument(
        "--max_images", "--max-images", type=int, help="measure that many held-out images; default: all"
    )
    parser.add_argument(
        "--max_train_images",
        "--max-train-images",
        type=int,
        default=2048,
        help="fit baselines and probes to that many (default: 2048)",
    )
    parser.add_argument(
        "--num_pictures", "--num-pictures", type=int, default=8, help="columns of the pictures (default: 8)"
    )
    parser.add_argument("--device", help="default: cuda or mps where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables, and writes pictures, report.md, metrics.json and card.json to `--output_dir`.

    `diffusers-ext card FOLDER --card card.json` puts the numbers and a picture into a saved pipeline's model card.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        ValueError: If there is no such folder or device, the repo holds another pipeline, or its images are of a kind
            that data sets cannot be loaded in.
    """
    repo = Path(args.repo)
    if not repo.is_dir() and (len(repo.parts) != 2 or repo.parent.is_dir()):  # nothing to ask the Hub for
        raise ValueError(
            f"there is no folder `{args.repo}`: give the one that `save_pretrained` or a training wrote, or a Hub "
            "repo as `owner/name`, from a working directory without a folder `owner`."
        )
    device = args.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise ValueError(
            f"`--device {device}` cannot be used here ({str(error).splitlines()[0]}): leave it out, or pass `cpu`."
        ) from error
    report = [name for name in ("metrics.json", "report.md", "card.json") if (args.output_dir / name).is_file()]
    if report:
        print(f"replacing {', '.join(report)} and pictures of an earlier evaluation in {args.output_dir}")

    options = {} if args.revision is None else {"revision": args.revision}
    class_name = PDAEPipeline.load_config(args.repo, **options).get("_class_name")
    if class_name != "PDAEPipeline":
        raise ValueError(f"`{args.repo}` holds a {class_name}, but `evaluate` measures a PDAEPipeline.")
    pipe = PDAEPipeline.from_pretrained(args.repo, **options)

    size, channels = pipe.encoder.config.sample_size, pipe.encoder.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or channels not in (1, 3):
        raise ValueError(
            f"`{args.repo}` is for images of size {size} with {channels} channels, but data sets are loaded as square "
            "grey or RGB images: call `diffusers_ext.evaluation.pdae.evaluate_pdae` with a data set of your own."
        )
    train, test = (
        load_image_dataset(
            args.dataset_name,
            args.train_data_dir,
            split=split,
            resolution=height,
            image_mode="L" if channels == 1 else "RGB",
            validation_fraction=args.validation_fraction,
            seed=args.seed,
            max_samples=max_samples,
            image_column=args.image_column,
            label_column=args.label_column,
            dataset_config_name=args.dataset_config_name,
            cache_dir=args.cache_dir,
        )
        for split, max_samples in (("train", args.max_train_images), ("validation", args.max_images))
    )

    pipe.to(device)
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    steps = {
        "num_inference_steps": args.num_inference_steps,
        "num_inversion_steps": args.num_inversion_steps or None,
        "seed": args.seed,
    }
    pictures = draw_pdae(pipe, test, num_images=args.num_pictures, **steps)  # first: quick, and checks the arguments
    metrics = evaluate_pdae(
        pipe, train, test, batch_size=args.batch_size, max_train_images=args.max_train_images, **steps
    )
    metrics["protocol"]["repo"] = str(args.repo)

    files = write_report(args.output_dir, metrics, pictures, args.dataset_name or args.train_data_dir.name)
    print(markdown_report(metrics))
    print("wrote", *files, sep="\n  ")
