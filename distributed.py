"""Several processes, as torchrun starts them, and what shares the weights out over them: --deepspeed, --fsdp ..."""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from model import SpeechLLM
    from train import TrainArguments


def join() -> Callable[[], None]:
    """Join the other processes; the function that waits until all have called it."""
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist.barrier


def leave(status: int) -> None:
    """Exit a process that has joined others after Python's atexit functions, before Python takes its modules apart.

    gloo's threads, which DistributedDataParallel keeps alive, free the last collective's tensors at that time, and
    torch 2.13 then aborts the process (before Python 3.14; PyTorch PR 179291; 9 of 12 runs under stress).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Engines: what shares the weights out


def check(args: "TrainArguments") -> None:
    """Raise InputError where the engine of these arguments cannot run."""
    engine, least = args.engine, 1 if args.engine == "deepspeed" else 2
    if int(os.environ.get("WORLD_SIZE", 0)) < least:
        cure = f"start it with torchrun --standalone --nproc_per_node={least} train.py ..., or leave --{engine} out"
        raise InputError(f"--{engine} {getattr(args, engine)}: this is one process on its own; {cure}")
    if bool(args.fsdp) + bool(args.deepspeed) + args.tensor_parallel > 1:
        raise InputError("--deepspeed, --fsdp, --tensor_parallel: each shares the weights out; choose one")
    if args.fsdp:
        import fsdp  # an option

        fsdp.check(args)


def prepare(args: "TrainArguments") -> dict[str, Any]:
    """Where SpeechLLM.from_config shall put the weights; before any weight is loaded."""
    if args.deepspeed:
        import zero3  # an option

        zero3.prepare()
        return {"device": None}  # DeepSpeed moves the model itself
    from accelerate.state import DistributedType, PartialState

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        # accelerate has FSDP2 and tensor parallelism for GPUs alone, and would leave the former out without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if args.fsdp:
        import fsdp  # an option

        fsdp.prepare()
        return {"device": None}  # FSDP2 moves each process's share
    import tensor_parallel  # an option

    return {"distributed_config": tensor_parallel.prepare(args)}


def adapt(trainer: "Trainer") -> None:
    """What the engine wants of a new Trainer."""
    if trainer.args.fsdp:
        import fsdp  # an option

        fsdp.adapt(trainer)
    if trainer.args.tensor_parallel:
        import tensor_parallel  # an option

        tensor_parallel.adapt(trainer)


def gather(engine: str, model: "SpeechLLM") -> dict[str, "Tensor"]:
    """Whole weights of what a checkpoint holds; every process has to call it."""
    if engine == "deepspeed":
        import zero3  # an option

        return zero3.gather(model.parameters_to_save())
    if engine == "fsdp":
        import fsdp  # an option

        return fsdp.gather(model)
    return model.parameters_to_save()  # tensor parallelism slices the frozen LLM alone
