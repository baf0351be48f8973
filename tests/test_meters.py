"""What meters.py promises: figures of the batches that were counted, in the log and in TensorBoard."""

import time

import numpy as np
import pytest
import torch
from conftest import TRAIN_FLAGS, noise
from runs import history

import train
from dataset import collate
from meters import Meters


def step(meters: Meters, batch: dict, logits: torch.Tensor) -> None:
    meters.count(batch, logits)
    meters.on_step_end()


def test_padding_and_accuracy_are_shares_of_what_was_counted(model):
    records = [{"where": f"{i}", "wav": noise(1.0 + i), "txt": "hello world" * (i + 1)} for i in range(2)]
    batch = collate(list(model.make_dataset(records)))
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 400).float()
    meters = Meters(np.array([1.0, 2.0]), world_size=1)
    meters.on_train_begin()
    step(meters, batch, logits)
    figures = meters.figures()
    assert figures["token_accuracy"] == 1
    assert figures["encoder_padding"] == pytest.approx(1 - (100 + 200) / 400, abs=0.01)
    used = batch["attention_mask"].float().mean().item()
    assert figures["llm_padding"] == pytest.approx(1 - used, abs=1e-4) and used < 1
    assert figures["audio_seconds_a_second"] > 3 and 0.05 < figures["peak_memory_gb"] < 50


def test_wrong_tokens_are_no_accuracy_and_figures_start_anew(model):
    batch = collate([model.make_dataset([{"where": "", "wav": noise(1.0), "txt": "hello"}])[0]])
    meters = Meters(np.array([1.0]), 1)
    meters.on_train_begin()
    step(meters, batch, torch.nn.functional.one_hot(batch["labels"] + 1, 400).float())
    assert meters.figures()["token_accuracy"] == 0
    step(meters, batch, torch.nn.functional.one_hot(batch["labels"], 400).float())
    assert meters.figures()["token_accuracy"] == 1


def test_evaluating_and_saving_are_no_training(model):
    batch = collate([model.make_dataset([{"where": "", "wav": noise(1.0), "txt": "hello"}])[0]])
    meters, logits = Meters(np.array([1.0]), 1), torch.zeros(1, batch["labels"].shape[1], 400)
    meters.on_train_begin()
    time.sleep(0.5)
    meters.on_evaluate()
    step(meters, batch, logits)
    assert meters.figures()["audio_seconds_a_second"] > 10  # 1 s, in far less than 0.1 s


def test_a_run_logs_them_beside_the_loss_with_the_same_weights(trained, call, tmp_path, world):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 2 --save_steps 2"
    for name in ("none", "tensorboard"):
        call(train.main, f"{flags} --report_to {name} --output_dir {tmp_path / name}")
    rows = [row for row in history(tmp_path / "tensorboard") if "loss" in row]
    assert {"token_accuracy", "audio_seconds_a_second", "llm_padding", "encoder_padding"} <= rows[0].keys()
    losses = [[row["loss"] for row in history(tmp_path / name) if "loss" in row] for name in ("none", "tensorboard")]
    assert losses[0] == losses[1]
