"""A frozen LLM in 4 or 8 bits by bitsandbytes, on a GPU: --quantize."""

import torch
from transformers import BitsAndBytesConfig

from errors import InputError


def quantization_config(kind: str) -> BitsAndBytesConfig:
    """What transformers' from_pretrained needs to hold the LLM in `kind`, 4bit or 8bit. Raises InputError."""
    if not torch.cuda.is_available():
        raise InputError(f"--quantize {kind}: wanted a CUDA GPU, found none; leave it out on a CPU")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError(f"--quantize {kind}: wanted bitsandbytes: pip install bitsandbytes") from None
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
