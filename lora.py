"""LoRA (arXiv:2106.09685) on the LLM and the encoder: --lora_r, --encoder_lora_r."""

from collections import Counter
from typing import TYPE_CHECKING

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from errors import InputError

if TYPE_CHECKING:
    from model import SpeechLLMConfig

# Queries and values, by the names that families have for them.
TARGETS = "q_proj v_proj linear_q linear_v qkv_proj query_key_value c_attn".split()


def add_to_parts(llm: nn.Module, encoder: nn.Module, config: "SpeechLLMConfig") -> None:
    """Put LoRA into the LLM and the encoder, as the config says. Raises InputError where that cannot be done."""
    if config.lora_target_modules and not config.lora_r:
        raise InputError("--lora_target_modules without LoRA; give --lora_r too")
    if config.lora_r:
        add_lora(llm, config.lora_r, config.lora_target_modules or TARGETS, config.lora_alpha, config.lora_dropout)
    if config.encoder_lora_r:
        targets = encoder.lora_targets or TARGETS
        add_lora(encoder.model, config.encoder_lora_r, targets, config.lora_alpha, config.lora_dropout)


def add_lora(module: nn.Module, rank: int, targets: list[str], alpha: float, dropout: float) -> None:
    """Put LoRA into the linear layers with these names, or, with ["all-linear"], into all. Raises InputError."""
    layers = sorted({name.rpartition(".")[2] for name, part in module.named_modules() if type(part) is nn.Linear})
    cure = f"--lora_target_modules can be {layers}"
    if targets not in (TARGETS, ["all-linear"]):
        check_targets(module, targets, cure)
    names = "all-linear" if targets == ["all-linear"] else targets
    try:
        config = LoraConfig(target_modules=names, r=rank, lora_alpha=alpha, lora_dropout=dropout)
        inject_adapter_in_model(config, module)
        for name, p in module.named_parameters():
            if ".lora_" in name and not hasattr(p, "ds_id"):  # ZeRO-3 holds fp32 copies itself
                p.data = p.data.float()  # beside layers of any dtype: bf16 rounds AdamW's steps away
    except ValueError as error:
        raise InputError(f"LoRA: {str(error).splitlines()[0]}; {cure}") from None


def check_targets(module: nn.Module, targets: list[str], cure: str) -> None:
    """Raise InputError for the name of a layer that does not exist, or that shares its weights with another layer."""
    counts = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    for target in targets:
        layers = [part for name, part in module.named_modules() if f".{name}".endswith(f".{target}")]
        if not layers:
            raise InputError(f"LoRA: no layer {target!r}; {cure}")
        if any(counts[p] > 1 for layer in layers for p in layer.parameters(recurse=False)):
            raise InputError(f"LoRA: {target!r} shares its weights with another layer; take other layers")


def merge(module: nn.Module) -> bool:
    """Add LoRA's product to the weights that it stands beside, and take it away; whether there was any."""
    adapters = [(name, part) for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, adapter in adapters:
        adapter.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, adapter.get_base_layer())
    return bool(adapters)
