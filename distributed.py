"""Several processes, as torchrun starts them."""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist


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
