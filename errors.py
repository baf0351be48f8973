"""Wrong input becomes one line: where, what was found, what was wanted, the cure. Commands start with `run(main)`."""

import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """Something the user gave us is wrong. The message is one line."""


class BadUtterance(InputError):
    """One record cannot be used: its audio is unreadable, empty or too long, or its text does not fit."""


def run(main: Callable[[], None], cure: str = "") -> None:
    """Call a command's `main`; an InputError becomes one line on standard error and exit status 2.

    `cure` is what helps against a BadUtterance; it goes to the end of the line.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # where a text cannot be shown, the rest still can
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    status = 0
    try:
        main()
    except InputError as error:
        from tqdm.auto import tqdm  # tqdm.write takes a progress bar off the line first

        # A DataLoader worker puts its whole traceback into the message; the last part is ours.
        message = re.split(r"\n\S*(?:BadUtterance|InputError): ", str(error).strip())[-1]
        tqdm.write(f"error: {message}{cure if isinstance(error, BadUtterance) else ''}", file=sys.stderr)
        status = 2  # as argparse ends after wrong flags
    processes = sys.modules.get("torch.distributed")
    if processes and processes.is_available() and processes.is_initialized():
        import distributed  # an option

        distributed.leave(status)
    if status:
        sys.exit(status)


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean prompt?`, or nothing if no name is like it."""
    near = get_close_matches(name.lower(), names, 1, cutoff=0.4)  # the best one, or none
    return f"; did you mean {near[0]}?" if near else ""


@contextmanager
def as_input_error(name: str, what: str, wanted: str) -> Iterator[None]:
    """Whatever the libraries raise for the files of a model inside this block becomes an InputError."""
    try:
        yield
    except (InputError, AssertionError):  # the one says it already, the other is a mistake of ours
        raise
    except Exception as error:  # each library has its own classes
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" ...")
        raise InputError(f"{name}: cannot {what} ({reason}); wanted {wanted}") from error


def load_pretrained(model_class: type, name: str, may_lack: tuple[str, ...] = (), **options) -> Any:
    """`model_class.from_pretrained(name, **options)`, which by itself does not insist on all weights.

    Raises InputError for weights of another shape, and for missing ones, unless their names end in one of `may_lack`.
    Weights without a place in the model give a warning, unless a whole part is left out: a head, a decoder, layers.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no tables of weights; what matters in them comes below
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(name, **options)  # info: which weights did not fit
    finally:
        logging.set_verbosity(verbosity)
    for key, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise InputError(f"{name}: {key} is {tuple(found)}, wanted {tuple(wanted)} by its config.json")
    may_lack = (*may_lack, "num_batches_tracked")  # a counter of BatchNorm that nothing uses
    if missing := sorted(key for key in info["missing_keys"] if not key.endswith(may_lack)):
        raise InputError(f"{name}: weights that config.json promises are missing ({len(missing)}): {missing[0]} ...")
    modules = dict(model.named_modules())
    # The layer is there and has no such weight. Weights of whole parts that are not there are left out on purpose.
    misplaced = [key for key in sorted(info["unexpected_keys"]) if modules.get(key.rpartition(".")[0], model) != model]
    if misplaced:
        more = f" and the like ({len(misplaced)})" if len(misplaced) > 1 else ""
        warnings.warn(f"{name}: a {type(model).__name__} has no place for {misplaced[0]}{more}: left out", stacklevel=2)
    return model
