"""What shares the weights out over several processes: DeepSpeed, FSDP2 or tensor parallelism. Without, it is DDP."""

import os
from typing import TYPE_CHECKING, Any

from accelerate.state import DistributedType, PartialState
from torch import Tensor
from transformers import Trainer

from errors import InputError

if TYPE_CHECKING:
    from model import SpeechLLM
    from train import TrainArguments


def check(args: "TrainArguments") -> None:
    """Raise InputError where the engine of these arguments cannot run."""
    if bool(args.fsdp) + bool(args.deepspeed) + args.tensor_parallel > 1:
        raise InputError("--deepspeed, --fsdp, --tensor_parallel: each shares the weights out; choose one")
    engine, least = args.engine, 1 if args.engine == "deepspeed" else 2
    if int(os.environ.get("WORLD_SIZE", 0)) < least:
        cure = f"start it with torchrun --standalone --nproc_per_node={least} train.py ..., or leave --{engine} out"
        raise InputError(f"--{engine} {getattr(args, engine)}: this is one process on its own; {cure}")
    if args.fsdp:
        import fsdp  # an option

        fsdp.check(args)


def prepare(args: "TrainArguments") -> dict[str, Any]:
    """Where SpeechLLM.from_config shall put the weights; before any weight is loaded."""
    if args.deepspeed:
        import zero3  # an option

        zero3.prepare()
        return {"device": None}  # DeepSpeed moves the model itself
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        # accelerate has FSDP2 and tensor parallelism for GPUs alone, and would leave the former out without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if args.fsdp:
        import fsdp  # an option

        fsdp.prepare()
        return {"device": None}  # FSDP2 moves each process's share
    import tensor_parallel  # an option

    return {"distributed_config": tensor_parallel.prepare(args)}


def adapt(trainer: Trainer) -> None:
    """What the engine wants of a new Trainer."""
    if trainer.args.fsdp:
        import fsdp  # an option

        fsdp.adapt(trainer)
    if trainer.args.tensor_parallel:
        import tensor_parallel  # an option

        tensor_parallel.adapt(trainer)


def gather(engine: str, model: "SpeechLLM") -> dict[str, Tensor]:
    """Whole weights of what a checkpoint holds; every process has to call it."""
    if engine == "deepspeed":
        import zero3  # an option

        return zero3.gather(model.parameters_to_save())
    if engine == "fsdp":
        import fsdp  # an option

        return fsdp.gather(model)
    return model.parameters_to_save()  # tensor parallelism slices the frozen LLM alone
