"""The `diffusers-ext` command.

A command is a module with two functions, `add_arguments(parser)` and `run(args)`. It is imported when it is called, so
`diffusers-ext --help` needs neither torch nor the commands' own requirements.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

import diffusers_ext
from diffusers_ext.exit_status import exit_status

# command -> its module in diffusers_ext, what it does
_COMMANDS = {
    "demo": ("demo", "train PDAE on real digits, publish it to a folder, load it again and measure it"),
    "demo-unclip": ("demo_unclip", "train CLIP, prior and decoder on real digits, paint texts and edit a digit"),
    "evaluate": ("evaluation.cli", "measure a saved pipeline on a data set: metrics.json, a table, pictures"),
    "card": ("card", "write the model card of a saved pipeline anew"),
    "convert": (None, "turn a checkpoint that a method's authors published into a diffusers folder"),
}
_CONVERTERS = {
    "glide": ("convert.glide", "a checkpoint of GLIDE (https://huggingface.co/papers/2112.10741)"),
    "guided-diffusion": (
        "convert.guided_diffusion",
        "a U-Net or classifier of guided-diffusion (https://huggingface.co/papers/2105.05233)",
    ),
    "karlo-prior": ("convert.karlo_prior", "Karlo's prior, of unCLIP (https://huggingface.co/papers/2204.06125)"),
    "pdae": ("convert.pdae", "a checkpoint of PDAE (https://huggingface.co/papers/2212.12990)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The words after the program's name. By default those that the process was started with.

    Returns:
        `int`: The exit status: 0; 2 after wrong input, with one line `error: ...` on stderr (with `--debug` the
        traceback); 130 after Ctrl-C.

    Example:

    ```py
    >>> from diffusers_ext.cli import main

    >>> main(["card", "no/such/folder"])
    2

    ```
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    words = [word for word in argv if not word.startswith("-")]  # they start with the command: only flags precede it

    parser = argparse.ArgumentParser(prog="diffusers-ext", description=diffusers_ext.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"diffusers-ext {diffusers_ext.__version__}")
    try:
        commands = _add_commands(parser, _COMMANDS, words[:1])
        _add_commands(commands["convert"], _CONVERTERS, words[1:2] if words[:1] == ["convert"] else [])
        args = parser.parse_args(argv)
        # Commands may load any pipeline of this package by its repo.
        importlib.import_module("diffusers_ext.hub").dispatch()
        return args.run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        return exit_status(error, debug="--debug" in argv)


def _add_commands(
    parser: argparse.ArgumentParser, table: Mapping[str, tuple[str | None, str]], called: Sequence[str]
) -> dict[str, argparse.ArgumentParser]:
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    commands = {}
    for name, (module_name, summary) in table.items():
        commands[name] = subparsers.add_parser(name, help=summary, description=summary)
        if module_name is not None and [name] == called:
            module = importlib.import_module(f"diffusers_ext.{module_name}")
            commands[name].add_argument("--debug", action="store_true", help="show the traceback of an error")
            module.add_arguments(commands[name])
            commands[name].set_defaults(run=module.run)
    return commands


if __name__ == "__main__":
    sys.exit(main())
