"""FSDP2 shares all weights out over the processes, layer by layer, through accelerate: --fsdp.

Its checkpoints are those of one process: whole tensors in model.safetensors and optimizer.pt, of what was trained. So a
run goes on from one process, DDP or FSDP2 on any of the three.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from errors import InputError

if TYPE_CHECKING:
    from model import SpeechLLM


def check(args: TrainingArguments) -> None:
    """Raise InputError for settings of FSDP that do not go together with such checkpoints."""
    if args.fsdp_plugin_args["fsdp_version"] != 2:
        raise InputError(f"--fsdp_config version {args.fsdp_plugin_args['fsdp_version']}: wanted 2")
    if args.fsdp_plugin_args.get("activation_checkpointing"):
        raise InputError("--fsdp_config activation_checkpointing: renames weights; give --gradient_checkpointing")


def prepare() -> None:
    """Make transformers' Trainer write and read checkpoints of one process; before any weight is loaded."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # so that cpu_ram_efficient_loading is heeded: one process reads the LLM
    # The logits are a view, which nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    trainer = transformers.trainer
    trainer.save_fsdp_model = lambda *args, **kwargs: None  # save_model has written the trained weights
    trainer.save_fsdp_optimizer, trainer.load_fsdp_optimizer = save_optimizer, load_optimizer
    trainer.load_fsdp_model = load_weights


def adapt(trainer: Trainer) -> None:
    """Tell accelerate which layers to share out, before training wraps them."""
    model = trainer.model
    model._no_split_modules = {type(m).__name__ for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}
    model.get_output_embeddings = model.llm.get_output_embeddings  # shared out with the input's, where the two are tied
    model.llm._is_fsdp_managed_module = True  # so that all processes generate until the last has ended
    trainer.add_callback(GatherForEvaluation())


class GatherForEvaluation(TrainerCallback):
    """Has weights that belong to no layer (projector, embeddings) gathered where evaluation goes round `forward`."""

    def on_train_begin(self, args, state, control, model: "SpeechLLM", **kwargs) -> None:
        for method in ("embed_batch", "decode_batch"):
            register_fsdp_forward_method(model, method)


def gather(model: "SpeechLLM") -> dict[str, Tensor]:
    """Whole weights of what a checkpoint holds; every process has to call it."""
    reshard(model)
    return {name: whole(p.detach()) for name, p in model.parameters_to_save().items()}


def reshard(model: "SpeechLLM") -> None:
    """Put away what an evaluation has gathered: with --bf16 it is rounded, and the shares are not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


# In place of accelerate's functions, with the arguments that Trainer gives these


def save_optimizer(plugin, accelerator, optimizer: torch.optim.Optimizer, model, folder: str) -> None:
    """Write optimizer.pt as one process would; every process has to call it."""
    content = optimizer.state_dict()
    states = content["state"].items()  # of each parameter, by its number
    content["state"] = {number: {name: whole(value) for name, value in state.items()} for number, state in states}
    if accelerator.is_main_process:
        torch.save(content, Path(folder, "optimizer.pt"))


def load_optimizer(plugin, accelerator, optimizer: torch.optim.Optimizer, model, folder: str, **kwargs) -> None:
    """Take this process's share of optimizer.pt."""
    content = torch.load(Path(folder, "optimizer.pt"), map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    for p, number in zip(parameters, numbers, strict=True):
        state = content["state"].get(number, {})
        for name, value in state.items():
            if value.shape == p.shape:  # a moment, not the count of steps
                value = value.to(p.device)
                state[name] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    optimizer.load_state_dict(content)


def load_weights(plugin, accelerator, model: "SpeechLLM", folder: str, **kwargs):
    """Take this process's share of model.safetensors; torch's record of the keys that did not fit."""
    reshard(model)
    options = StateDictOptions(full_state_dict=True, strict=False)  # frozen weights are not in the file
    return set_model_state_dict(model, load_file(Path(folder, "model.safetensors")), options=options)
