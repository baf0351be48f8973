"""The LLM as it comes: loaded straight in its own dtype, with its tokenizer, its chat template and its stop tokens."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from config import SpeechLLMConfig
from manifest import AUDIO, BadUtterance, InputError
from pretrained import load_pretrained, told_in_one_line
from prompt import conversation, render_prompt, set_chat_template


def load_llm(config: SpeechLLMConfig, device: str | torch.device | None = None) -> tuple:
    """(tokenizer, LLM) of a config. The LLM's generation_config holds its stop tokens and nothing else.

    Raises InputError if they cannot be loaded, or the prompt does not suit them.
    """
    path, revision = config.llm_model_name_or_path, config.llm_revision
    options = {"dtype": "auto", "quantization_config": quantization(config.quantize)}
    if device:
        options["device_map"] = {"": device}
    with told_in_one_line(path, "the LLM", "a folder or Hub name of a causal LLM, with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        llm = load_pretrained(AutoModelForCausalLM, path, revision=revision, **options)
    if not tokenizer("Transcribe the speech").input_ids:
        raise InputError(f"{path}: a tokenizer without a vocabulary; wanted its files, tokenizer.json or the like")
    # logits_to_keep is a slice, which PyTorch would multiply row by row, reading the vocabulary matrix each time:
    # half the time of a training step with a small LLM.
    llm.get_output_embeddings().register_forward_pre_hook(contiguous)
    set_chat_template(tokenizer, config.chat_template)
    asked = conversation(config.prompt, config.system_prompt)
    try:
        pieces, end_id = render_prompt(tokenizer, json.dumps(asked))
    except BadUtterance as error:
        raise InputError(f"{path}: {error}; wanted another --system_prompt, --prompt or --chat_template") from None
    if len(pieces) != 2:
        template = " or in --chat_template" if config.chat_template else ""
        raise InputError(f"prompt {config.prompt!r}: wanted {AUDIO} in it{template}, once")
    # The LLM's own defaults (Qwen2: sampling, a repetition penalty) are for chat; only its stop tokens are kept.
    stop_ids = llm.generation_config.eos_token_id
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    stop_ids = sorted({end_id, tokenizer.eos_token_id, *stop_ids} - {None})
    llm.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=end_id)
    return tokenizer, llm


def contiguous(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def quantization(kind: str | None) -> BitsAndBytesConfig | None:
    if kind is None:
        return None
    if kind not in ("4bit", "8bit"):
        raise InputError(f"--quantize {kind}: wanted 4bit or 8bit")
    if not torch.cuda.is_available():
        raise InputError(f"--quantize {kind}: wanted a CUDA GPU, found none; leave it out on a CPU")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError(f"--quantize {kind}: wanted bitsandbytes: pip install bitsandbytes") from None
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
