"""What stands in the output folder of a training run: weights, losses, error rates."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

PROJECTOR = {f"projector.{layer}.{kind}" for layer in ("conv", "linear1", "linear2") for kind in ("weight", "bias")}


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
