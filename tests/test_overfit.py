"""What overfit.py promises: a few clips are learnt by heart, or the run says why not."""

from types import SimpleNamespace

import pytest
from conftest import TRAIN_FLAGS

import train
from errors import InputError
from evaluate import TO_TRY
from overfit import StopWhenLearnt

FLAGS = f"{TRAIN_FLAGS} --data_path corpus.jsonl --per_device_train_batch_size 2 --disable_tqdm True"


def test_a_run_ends_when_no_word_of_its_clips_is_wrong(trained, call, tmp_path):
    flags = f"--overfit 2 --max_steps 200 --eval_steps 20 --learning_rate 3e-3 --output_dir {tmp_path}"
    flags += " --llm_model_name_or_path llm --freeze_params ^encoder"  # so small a projector alone takes too long
    out = call(train.main, f"{FLAGS} {flags}").out
    assert "--overfit: WER 0 after" in out and "WER 0.00%" in out
    assert "trained on | corpus.jsonl: 2 utterances" in (tmp_path / "experiment.md").read_text()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_that_does_not_get_there_says_why(trained, call, tmp_path):
    flags = f"--overfit 2 --max_steps 2 --eval_steps 1 --learning_rate 1e-6 --output_dir {tmp_path}"
    with pytest.raises(InputError, match=r"^--overfit: WER .*% after 2 steps; the loss is \d"):
        call(train.main, f"{FLAGS} {flags}")


def test_an_error_rate_that_is_no_number_is_no_success_and_an_end_without_evaluation_says_nothing():
    """NaN where no transcript has a word; no evaluation where SIGTERM came first."""
    stop, state = StopWhenLearnt(), SimpleNamespace(global_step=2, is_world_process_zero=True)
    stop.on_train_end(None, state, None)
    stop.evaluations = [{"eval_loss": 1.0, "eval_cer": float("nan")}]
    with pytest.raises(InputError, match=r"^--overfit: CER nan% after 2 steps"):
        stop.on_train_end(None, state, None)


@pytest.mark.parametrize("flags", ["--eval_data_path eval.jsonl", "--save_best_by wer"])
def test_another_evaluation_beside_it_is_refused(trained, call, tmp_path, flags):
    flags += " --eval_strategy steps --eval_steps 1 --save_steps 1"
    with pytest.raises(InputError, match="--overfit 2: evaluates the clips that it trains on; leave out"):
        call(train.main, f"{FLAGS} --overfit 2 {flags} --output_dir {tmp_path}")


@pytest.mark.parametrize(
    ("losses", "gap", "reason"),
    [
        ([2.0, 0.01], 3.0, "known by heart, but decoding leaves them"),
        ([2.0, 1.9], 0.01, f"the model does not listen; try {TO_TRY}"),
        ([2.0, 1.5, 1.0], 1.0, "still falls: give more --max_steps"),
        ([2.0, 1.5, 1.49], 1.0, f"falls no more; try {TO_TRY}"),
    ],
)
def test_the_reason_is_what_the_figures_say(losses, gap, reason):
    stop = StopWhenLearnt()
    stop.evaluations = [{"eval_loss": loss, "eval_wer": 0.5, "eval_listening_gap": gap} for loss in losses]
    assert reason in stop.why_not()
