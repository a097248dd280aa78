"""`diffusers-ext card`: write the model card of a saved pipeline anew, without loading its weights."""

import argparse
import json
from pathlib import Path

import diffusers_ext
from diffusers_ext.hub import HubMixin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("folder", type=Path, help="folder that a pipeline of this package was saved to")
    parser.add_argument(
        "--card",
        type=Path,
        help="JSON file with what the card says: license, datasets, tags, base_model, metrics, training, samples, "
        "citation. `samples` is relative to the file's folder, or to the working directory. Without it a card keeps "
        "its text and gets the metadata that it lacks",
    )
    parser.add_argument("--repo_id", "--repo-id", help="repo that the card speaks of; by default the folder's name")


def run(args: argparse.Namespace) -> None:
    """Writes `README.md`. A card that somebody wrote or changed by hand keeps its text.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.

    Raises:
        `ValueError`: The folder holds no pipeline of this package, or the card's contents are not valid.
    """
    index = args.folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"`{args.folder}` has no `model_index.json`: give the folder that `save_pretrained` wrote.")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    cls = getattr(diffusers_ext, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, HubMixin)):
        raise ValueError(f"`{args.folder}` holds a {name}, which is no pipeline of diffusers-ext.")
    card = None
    if args.card is not None:
        card = json.loads(args.card.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError(f"`--card {args.card}` holds a {type(card).__name__}, but must hold a JSON object.")
        samples = args.card.parent / str(card.get("samples") or "")
        if samples.is_file():
            card["samples"] = samples
    cls.save_model_card(args.folder, args.repo_id, card)
    print(f"wrote {args.folder / 'README.md'}")
