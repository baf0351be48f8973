"""Models of transformers with all of their weights, which from_pretrained itself does not insist on."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from manifest import InputError

LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError)
LOAD_ERRORS += (ImportError, UnpicklingError, SafetensorError, StrictDataclassError)
UNGATHERED = "tensors of size 0, which ZeRO-3 leaves where weights are saved without being gathered"


@contextmanager
def told_in_one_line(name: str, what: str, wanted: str) -> Iterator[None]:
    """Whatever goes wrong with the files of a model in here becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except LOAD_ERRORS as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" ...")
        raise InputError(f"{name}: cannot load {what} ({reason}); wanted {wanted}") from None


def load_pretrained(
    loader: type, name: str, weights: dict[str, Tensor] | None = None, may_lack: tuple[str, ...] = (), **options
) -> PreTrainedModel:
    """loader.from_pretrained(name, **options), or the model of a config and `weights`.

    InputError for weights that are missing or have another shape. Weights without a place in the model give a
    warning, unless they belong to a whole part that is left out, such as a head, a decoder or layers above the last
    that is wanted.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no long tables: what matters in them comes below
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = loader.from_pretrained(name if weights is None else None, state_dict=weights, **options)
    finally:
        logging.set_verbosity(verbosity)
    for key, found, wanted in sorted(info["mismatched_keys"])[:1]:
        cause = UNGATHERED if 0 in found else f"{len(info['mismatched_keys'])} such weights in all"
        raise InputError(f"{name}: {key} is {tuple(found)}, wanted {tuple(wanted)} by its config.json; {cause}")
    may_lack = (*may_lack, "num_batches_tracked")  # a counter that nothing uses
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(may_lack))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{name}: weights that config.json promises are missing: {missing[0]}{more}")
    modules = dict(model.named_modules())
    if extra := [key for key in sorted(info["unexpected_keys"]) if modules.get(key.rpartition(".")[0], model) != model]:
        what = f"{extra[0]} and the like ({len(extra)})" if len(extra) > 1 else extra[0]
        warnings.warn(f"{name}: a {type(model).__name__} has no place for {what}: left out", stacklevel=2)
    return model
