"""Tensor parallelism splits every layer of the LLM over all processes, through transformers: --tensor_parallel.

All processes read the same clips, and each has the whole encoder and projector.
"""

import torch
from accelerate import ParallelismConfig
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from errors import InputError


def prepare(args: TrainingArguments) -> DistributedConfig:
    """What transformers needs to load a share of each layer; before any weight is loaded."""
    args.parallelism_config = ParallelismConfig(tp_size=args.world_size)  # no other clips for another process
    return DistributedConfig(tp_size=args.world_size)


def check_frozen(llm: torch.nn.Module) -> None:
    """Raise InputError if anything of the LLM is trained, LoRA included."""
    if trained := [name for name, p in llm.named_parameters() if p.requires_grad]:
        raise InputError(f"--tensor_parallel: {trained[0]} of the LLM is trained; wanted a frozen one, or --fsdp")


def adapt(trainer: Trainer) -> None:
    """Let Trainer average the projector's gradients, in place of DDP. Raises InputError if the LLM is trained."""
    check_frozen(trainer.model.llm)
    # Only now: Trainer would refuse checkpoints, for the shares of weights that are trained. Here those are whole.
    trainer.is_distributed_loading_by_transformers = True
