"""The demo's stages: what each prints while it runs, and the stamps by which a second run knows what is there."""

import json
import multiprocessing
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
STAGES = ("data", "llm", "encoder", "projector", "tests")
DUPLEX_STAGES = ("speech", "codec", "frames", "models", "answers")  # of python -m duplex


def say(stage: str, text: str) -> None:
    stages = STAGES if stage in STAGES else DUPLEX_STAGES
    print(f"[{stages.index(stage) + 1}/{len(stages)}] {stage}: {text}", flush=True)


class Stage:
    """A stage with a stamp, stages/NAME.json, which is written when its output is complete.

    `run(make)` makes the output unless the stamp says that it was made with these settings after these stages.
    `variant`, settings in which it differs from the default's, gives its stamp and outputs a `suffix`: _mlp_lora_r8.
    """

    def __init__(self, folder: Path, name: str, settings: dict, after: list["Stage"], variant: dict):
        self.folder, self.name, self.settings, self.after = folder, name, settings | variant, after
        self.suffix = "".join(f"_{v}" if isinstance(v, str) else f"_{k}{v}" for k, v in variant.items())
        self.path = folder / "stages" / f"{name}{self.suffix}.json"

    def stamp(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def key(self) -> dict:
        return {"settings": self.settings, "after": [stage.stamp()["id"] for stage in self.after]}

    def is_there(self, outputs: list[str]) -> bool:
        """Whether these were made with these settings after these stages."""
        return self.stamp().get("key") == self.key() and all((self.folder / output).exists() for output in outputs)

    def run(self, outputs: list[str], make: Callable, *args, **kwargs) -> None:
        if self.is_there(outputs):
            say(self.name, f"there already, made in {self.stamp()['seconds']:.0f} s")
            return
        key = self.key()
        self.path.unlink(missing_ok=True)
        begin = time.perf_counter()
        make(*args, **kwargs)
        seconds = round(time.perf_counter() - begin, 1)
        stamp = {"key": key, "id": uuid.uuid4().hex, "seconds": seconds}
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(stamp) + "\n")
        partial.replace(self.path)
        say(self.name, f"done in {seconds:.0f} s")


def run_in_child(stage: Stage, *args, **kwargs) -> None:
    """`stage.run(...)` in a process of its own, on half of the cores.

    It ends with its parent: if that is killed, it must not write on beside the next run.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(max(1, CORES // 2))
    stage.run(*args, **kwargs)


def put(partial: Path, path: Path) -> None:
    """Move a complete output to its place."""
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


class Progress:
    """Prints a line about every ten seconds: `[3/5] encoder: step 100/619, loss 0.712, 21 s`."""

    def __init__(self, stage: str, num_steps: int):
        self.stage, self.num_steps, self.step_number, self.losses = stage, num_steps, 0, []
        self.begin = self.last_line = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        self.step_number += 1
        self.losses.append(loss.item())
        now = time.perf_counter()
        if now - self.last_line > 10 or self.step_number == self.num_steps:
            mean = sum(self.losses) / len(self.losses)
            say(self.stage, f"step {self.step_number}/{self.num_steps}, loss {mean:.3f}, {now - self.begin:.0f} s")
            self.losses, self.last_line = [], now
