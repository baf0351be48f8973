"""Training runs of the tests: their flags, what stands in their output folders, what they say of wrong input."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_FLAGS
from safetensors.torch import load_file

import train
from errors import InputError

PROJECTOR = {f"projector.{layer}.{kind}" for layer in ("conv", "linear1", "linear2") for kind in ("weight", "bias")}
CORPUS = f"{TRAIN_FLAGS} --data_path corpus.jsonl"
# 20 clips in batches of 2, three to a step: four steps an epoch, the last of one batch only.
RESUMED = f"{CORPUS} --num_train_epochs 4 --per_device_train_batch_size 2 --learning_rate 1e-3 "
RESUMED += "--gradient_accumulation_steps 3 --save_steps 3"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(weights: dict, wanted: dict, within: float = 0) -> None:
    """Two sets of weights are the same, bit for bit unless a difference is allowed."""
    assert weights.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def checkpoints(folder: Path) -> list[int]:
    """The steps of its checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def history(folder: Path) -> list[dict]:
    """The log of the last checkpoint."""
    return json.loads((folder / f"checkpoint-{checkpoints(folder)[-1]}/trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in history(folder) if "loss" in row]


def evaluations(folder: Path) -> list[tuple[float, float]]:
    """Loss and word error rate of each evaluation."""
    return [(row["eval_loss"], row["eval_wer"]) for row in history(folder) if "eval_loss" in row]


def copy_until(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was after a step: of its checkpoints those till then, without the last weights."""
    later = [f"checkpoint-{other}" for other in checkpoints(run) if other > step]
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*later))
    (copy / "model.safetensors").unlink()
    return copy


def error_of(call, flags: str) -> str:
    """The one line that train.py says of wrong input."""
    with pytest.raises(InputError) as error:
        call(train.main, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def good(world, number: int = 0) -> dict:
    return {"wav": str(world / f"clip{number}.wav"), "txt": "hello world"}


def terminate(job, begun, rank: int = 0) -> None:
    """Send SIGTERM to a rank as soon as `begun()` is true."""
    while not begun():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.01)
    os.kill(job.processes[rank].pid, signal.SIGTERM)
