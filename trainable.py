"""What is trained: LoRA, the rule that freezes parameters by name, and what follows from it."""

import re
from collections import Counter

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from config import SpeechLLMConfig
from manifest import InputError

LORA = r"\.lora_"  # in the name of every parameter of LoRA
TARGETS = "q_proj v_proj linear_q linear_v qkv_proj query_key_value c_attn".split()  # queries and values, by family
WAVLM_TARGETS = ["intermediate_dense", "output_dense"]  # its attention reads the weights past the layers


def prepare(model) -> None:
    """Add LoRA and freeze parameters, as the model's config says. Raises InputError where that cannot be done."""
    config = model.config
    if config.lora_target_modules and not config.lora_r:
        raise InputError("--lora_target_modules without LoRA; give --lora_r too")
    if config.lora_r:
        add_lora(model.llm, config.lora_r, config.lora_target_modules or TARGETS, config)
    if config.encoder_lora_r:
        wavlm = model.encoder.model.config.model_type == "wavlm"
        add_lora(model.encoder.model, config.encoder_lora_r, WAVLM_TARGETS if wavlm else TARGETS, config)
    exceptions = [LORA] if config.lora_r or config.encoder_lora_r else []
    freeze(model, config.freeze_params, config.prevent_freeze_params + exceptions)


def add_lora(module: nn.Module, rank: int, targets: list[str], config: SpeechLLMConfig) -> None:
    """Put LoRA (arXiv:2106.09685) into the linear layers with these names, or in ["all-linear"]."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = sorted({name.rpartition(".")[2] for name, part in module.named_modules() if type(part) is nn.Linear})
    cure = f"--lora_target_modules can be {layers}"
    everything = [p for _, p in module.named_parameters(remove_duplicate=False)]
    tied = {p for p, count in Counter(everything).items() if count > 1}
    for target in targets if targets not in (TARGETS, ["all-linear"]) else []:
        found = [part for name, part in module.named_modules() if f".{name}".endswith(f".{target}")]
        if not found:
            raise InputError(f"LoRA: no layer {target!r}; {cure}")
        if any(p in tied for part in found for p in part.parameters(recurse=False)):
            raise InputError(f"LoRA: {target!r} shares its weights with another layer; take other layers")
    shape = {"r": rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    try:
        config = LoraConfig(target_modules="all-linear" if targets == ["all-linear"] else targets, **shape)
        inject_adapter_in_model(config, module)
    except ValueError as error:
        raise InputError(f"LoRA: {str(error).splitlines()[0]}; {cure}") from None


def freeze(model: nn.Module, freeze_params: list[str], prevent_freeze_params: list[str]) -> None:
    """Train the parameters whose names match no pattern of the first list, or one of the second.

    Raises InputError for a pattern that matches no name.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # tied weights have two names
    for pattern in (*freeze_params, *prevent_freeze_params):
        try:
            if not any(re.search(pattern, name) for name in names):
                some = ", ".join(names[:: len(names) // 4])
                raise InputError(f"freeze pattern {pattern!r} matches no parameter; there are {some} ...")
        except re.error as error:
            raise InputError(f"freeze pattern {pattern!r} is no regular expression ({error})") from None
    called = {}  # parameter -> its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(parameter, []).append(name)
    for parameter, its in called.items():
        frozen, kept = (
            any(re.search(pattern, name) for pattern in patterns for name in its)
            for patterns in (freeze_params, prevent_freeze_params)
        )
        parameter.requires_grad_((not frozen or kept) and parameter.is_floating_point())
    hold_in_fp32(model)


def hold_in_fp32(model) -> None:
    """Trained weights in fp32; and the whole encoder or LLM, if weights of its own are trained.

    AdamW's steps are lost in the rounding of bf16.
    """
    for part in (model.encoder, model.llm):
        own = [p for name, p in part.named_parameters() if p.requires_grad and not re.search(LORA, name)]
        if own and getattr(part, "is_quantized", False):
            raise InputError("--quantize: weights of a quantised LLM cannot be trained; use --lora_r, or leave it out")
        if any(p.dtype != torch.float32 and not hasattr(p, "ds_id") for p in own):
            part.float()
    for p in model.parameters():
        if p.requires_grad and p.dtype != torch.float32 and not hasattr(p, "ds_id"):  # ZeRO-3 holds fp32 itself
            p.data = p.data.float()


def saved(model) -> dict[str, nn.Parameter]:
    """What a checkpoint holds: all that is trained, or was, and all that comes from no other place."""
    frozen = re.compile(r"^(encoder|llm)\.(?!.*\.lora_)")
    kept = model.once_trained
    return {n: p for n, p in model.named_parameters() if p.requires_grad or n in kept or not frozen.search(n)}


def switches(*names: str) -> tuple:
    """The methods that freeze and unfreeze parts of the model, all of them."""

    def parts(model) -> nn.ModuleList:
        return nn.ModuleList([getattr(model, name) for name in names if hasattr(model, name)])

    def freeze(model) -> None:
        set_trained(model, parts(model), False)

    def unfreeze(model) -> None:
        set_trained(model, parts(model), True)

    return freeze, unfreeze


def freeze_llm_except_lm_head(model) -> None:
    """Of the LLM only the vocabulary projection is trained: with it the token embeddings, where the two are tied."""
    set_trained(model, model.llm, False)
    set_trained(model, model.llm.get_output_embeddings(), True)


def set_trained(model, module: nn.Module, yes: bool) -> None:
    """Freeze or unfreeze all parameters of a part of the model; what was trained till now is saved all the same."""
    model.once_trained |= {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in module.parameters():
        parameter.requires_grad_(yes and parameter.is_floating_point())
    hold_in_fp32(model)
    model.train(model.training)


def merge_lora(model) -> None:
    """Add LoRA's product to the weights it stands beside, and take it away: decoding costs what it costs without."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
            model.merged = True
    model.config.lora_r = model.config.encoder_lora_r = 0


def set_training(model: nn.Module, mode: bool = True) -> nn.Module:
    """Training mode for what is trained, eval mode for all else: no dropout in a frozen LLM.

    Layers that checkpoint their gradients are told that they train, for they do not checkpoint otherwise.
    """
    trained = {"": [True]}  # module -> which of its parameters are
    for name, parameter in model.named_parameters():
        while name := name.rpartition(".")[0]:
            trained.setdefault(name, []).append(parameter.requires_grad)
    modes, embeddings = {}, model.get_input_embeddings()
    for name, module in model.named_modules():  # parents come first
        inherited = modes.get(name.rpartition(".")[0]) or ".lora_dropout" in name
        modes[name] = module.training = mode and bool(all(trained[name]) if name in trained else inherited)
        if isinstance(module, nn.BatchNorm1d):
            module.training = False  # its running statistics are no parameters: no checkpoint would hold them
        if module is embeddings:
            module.training = mode  # where NEFTune adds its noise
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = mode and (name.startswith("llm.") or any(trained[name]))
    return model


def describe(model: nn.Module) -> str:
    """A table of the parts: parameters, trained ones, their share."""
    rows = ["| module | parameters | trained | share |", "|---|---|---|---|"]
    for name, part in [*model.named_children(), ("all", model)]:
        sizes = [(parameter_size(p), p.requires_grad) for p in part.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, yes in sizes if yes)
        rows.append(f"| {name} | {total:,} | {trained:,} | {trained / max(total, 1):.2%} |")
    return "\n".join(rows)


def parameter_size(p: nn.Parameter) -> int:
    """Number of weights, of parameters that ZeRO-3 has shared out and of 4-bit ones too."""
    if hasattr(p, "ds_numel"):
        return p.ds_numel
    return p.quant_state.shape.numel() if hasattr(p, "quant_state") and p.quant_state else p.numel()
