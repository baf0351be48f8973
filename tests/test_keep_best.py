"""What keep_best.py promises: the checkpoints that evaluate best are kept, and the last."""

import json
from pathlib import Path

import pytest
from conftest import TRAIN_FLAGS
from runs import assert_same, checkpoints, history, weights
from transformers import TrainingArguments

import train
from errors import InputError
from keep_best import KeepBest, keep_best


def write_checkpoint(folder: Path, step: int, rate: float | None) -> None:
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    logs = [{"step": step, "loss": 1.0}, {"step": step - 1, "eval_wer": 0.0}]
    logs += [] if rate is None else [{"step": step, "eval_wer": rate}]
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": logs}))


@pytest.mark.parametrize(
    ("rates", "count", "kept"),
    [
        ({2: 0.5, 4: 0.2, 6: 0.3, 8: 0.4}, 2, [4, 6, 8]),  # the last is kept to go on from
        ({2: 0.5, 4: 0.2, 6: 0.3, 10: 0.1}, 2, [4, 10]),
        ({2: 0.5, 4: 0.5, 100: 0.5}, 1, [2, 100]),  # of equals the earlier, as Trainer has it
        ({2: None, 4: 0.9, 6: 0.8}, 1, [6]),
        ({1: 0.5, 2: float("nan"), 3: 0.1, 4: float("nan"), 5: 0.9}, 1, [3, 5]),
    ],
)
def test_the_best_checkpoints_and_the_last_are_kept(tmp_path, rates, count, kept):
    for step, rate in rates.items():
        write_checkpoint(tmp_path, step, rate)
    keep_best(str(tmp_path), "wer", count)
    assert checkpoints(tmp_path) == kept


def test_the_lowest_rate_is_told(tmp_path, capsys):
    write_checkpoint(tmp_path, 2, 0.25)
    write_checkpoint(tmp_path, 4, 0.5)
    keep_best(str(tmp_path), "wer", 3)
    assert capsys.readouterr().out == f"lowest wer so far: 0.2500, {tmp_path}/checkpoint-2\n"


def test_trainer_deletes_no_checkpoint_by_itself(tmp_path):
    args = TrainingArguments(str(tmp_path), save_total_limit=3, use_cpu=True)
    assert KeepBest("wer", args).count == 3 and args.save_total_limit is None


def test_a_rate_that_is_not_counted_is_told(tmp_path):
    best = KeepBest("ser", TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(InputError, match=r"--save_best_by ser: wanted one of \['loss', 'wer'\]"):
        best.on_evaluate(None, None, None, {"eval_loss": 1.0, "eval_wer": 0.5, "epoch": 1.0})


@pytest.mark.parametrize("metric", ["loss", "cer"])  # the transcripts are English: by itself the evaluation counts wer
def test_a_run_keeps_its_checkpoints_that_evaluate_best(metric, trained, call, tmp_path):
    flags = "--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 5 --learning_rate 3e-2 --save_steps 1"
    flags += f" --eval_strategy steps --eval_steps 1 --save_best_by {metric} --save_total_limit 2"
    out = call(train.main, f"{TRAIN_FLAGS} {flags} --output_dir {tmp_path}").out
    rates = {row["step"]: row[f"eval_{metric}"] for row in history(tmp_path) if f"eval_{metric}" in row}
    best_first = sorted(rates, key=lambda step: (rates[step], step))
    assert rates[best_first[0]] < rates[best_first[-1]]
    assert checkpoints(tmp_path) == sorted({*best_first[:2], 5})
    assert f"lowest {metric} so far: {rates[best_first[0]]:.4f}, {tmp_path}/checkpoint-{best_first[0]}\n" in out


@pytest.mark.parametrize("metric", ["wer", "cer"])
def test_the_best_checkpoint_that_is_kept_is_the_one_that_is_loaded_at_the_end(metric, trained, call, tmp_path):
    flags = "--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 4 --learning_rate 3e-2 --save_steps 1"
    flags += f" --eval_strategy steps --eval_steps 1 --save_best_by {metric} --save_total_limit 1"
    call(train.main, f"{TRAIN_FLAGS} {flags} --load_best_model_at_end True --output_dir {tmp_path}")
    rates = {row["step"]: row[f"eval_{metric}"] for row in history(tmp_path) if f"eval_{metric}" in row}
    best = min(rates, key=lambda step: (rates[step], step))
    assert checkpoints(tmp_path) == sorted({best, 4})
    assert_same(weights(tmp_path), weights(tmp_path / f"checkpoint-{best}"))
