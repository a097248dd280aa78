"""How commands and training scripts end after an error."""

import sys


def exit_status(error: BaseException, *, debug: bool) -> int:
    """Says in one line on stderr what ended a command; an error that is not the user's is raised again.

    Args:
        error (`BaseException`):
            What the command raised.
        debug (`bool`):
            Whether to raise the user's errors too, for their traceback.

    Returns:
        `int`: 2 after wrong input, 130 after Ctrl-C.

    Example:

    ```py
    >>> from diffusers_ext.exit_status import exit_status

    >>> exit_status(ValueError("`seed` is -1, but must be at least 0."), debug=False)
    2

    ```
    """
    if isinstance(error, KeyboardInterrupt):
        if str(error):  # how to go on
            print(error, file=sys.stderr)
        return 130
    ours = isinstance(error, ImportError) and (error.name or "").startswith("diffusers_ext")
    if debug or ours or not isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        raise error
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        message += " (`pip install 'diffusers-ext[training]'` brings what the commands need)"
    print(f"error: {message}", file=sys.stderr)
    return 2
