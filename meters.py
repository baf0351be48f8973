"""Figures of training that --report_to logs beside the loss: speed, padding, token accuracy, memory."""

import sys
import time

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from dataset import IGNORE


class Meters(TrainerCallback):
    """Counts the batches of this process; `figures` tells of those since it was last asked.

    The time is that of training: from one step to the next, without evaluations and saving.
    """

    def __init__(self, durations: np.ndarray, world_size: int):
        self.durations, self.world_size = durations, world_size  # seconds, by the index of a record
        self.reset()

    def start_clock(self, *args, **kwargs) -> None:
        self.begin = time.perf_counter()

    on_evaluate = on_save = start_clock

    def on_train_begin(self, *args, model: nn.Module | None = None, **kwargs) -> None:
        self.start_clock()
        if model is not None:
            model.register_forward_hook(self.on_forward, with_kwargs=True)

    def on_forward(self, model: nn.Module, args: tuple, batch: dict, outputs: ModelOutput) -> None:
        if model.training:  # not in an evaluation
            self.count(batch, outputs.logits)

    def on_log(self, args, state, control, logs: dict, **kwargs) -> None:
        if "loss" in logs:
            figures = self.figures()
            logs |= figures  # for TensorBoard and the like
            state.log_history[-1] |= figures

    def on_step_end(self, *args, **kwargs) -> None:
        self.elapsed += time.perf_counter() - self.begin
        self.start_clock()

    def reset(self) -> None:
        self.elapsed = self.seconds = 0.0  # of training; of audio
        self.positions = self.used_positions = 0  # of the LLM
        self.frames = self.used_frames = 0  # features, or samples, of the encoder
        self.tokens = self.right_tokens = 0  # trained ones; those that the model thinks likeliest

    def count(self, batch: dict, logits: torch.Tensor) -> None:
        """Count a batch of `collate` and the logits (B, K, V) that predict its last labels."""
        labels = batch["labels"][:, -logits.shape[1] :]
        self.tokens += (labels != IGNORE).sum()  # tensors on the device: nothing waits for it here
        self.right_tokens += (logits.argmax(2) == labels).sum()
        self.seconds += float(self.durations[batch["index"]].sum())
        self.positions += batch["attention_mask"].numel()
        self.used_positions += batch["attention_mask"].sum()
        features = batch.get("input_values", batch.get("input_features"))
        self.frames += features.shape[0] * features.shape[1]  # (A, F, M) or (A, S)
        self.used_frames += batch["feature_lengths"].sum()

    def figures(self) -> dict[str, float]:
        """Audio seconds a second of all processes, if the others do as much; shares of this one; its peak memory."""
        figures = {
            "token_accuracy": round(int(self.right_tokens) / max(int(self.tokens), 1), 4),
            "audio_seconds_a_second": round(self.seconds * self.world_size / self.elapsed, 2),
            "llm_padding": round(1 - int(self.used_positions) / max(self.positions, 1), 4),
            "encoder_padding": round(1 - int(self.used_frames) / max(self.frames, 1), 4),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        self.reset()
        return figures


def peak_memory() -> int:
    """Bytes: of this process's GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
