"""What auto_batch.py promises: the largest batch that fits, found by trials of which the training knows nothing."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import TRAIN_FLAGS, make_corpus
from runs import assert_same, copy_until, error_of, losses, weights

import auto_batch
import train
from auto_batch import extreme_clips, grow, peak_memory


@pytest.fixture(scope="module")
def flags(world, chinese_llm) -> str:
    """Of a run with 200 clips of 0.5 to 3 s, and with dropout, which needs random numbers."""
    folder = world / "many"
    folder.mkdir()
    make_corpus(folder, np.random.default_rng(0).uniform(0.5, 3, 200).tolist())
    return f"{TRAIN_FLAGS} --data_path many/corpus.jsonl --encoder_dropout 0.1 --max_steps 6 --save_steps 3"


def test_the_flag_that_is_printed_gives_the_same_weights_and_a_resumed_run_looks_for_nothing(call, flags, tmp_path):
    """The trials leave weights, optimiser and random numbers as they were."""
    screen = call(train.main, f"{flags} --auto_batch --output_dir {tmp_path}/auto")
    (flag,) = re.findall(r"the same again: (--max_batch_tokens \d+)", screen.out)
    assert "LLM positions fit" in screen.out
    call(train.main, f"{flags} {flag} --output_dir {tmp_path}/again")
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "auto"))
    for resumed, how in (("auto", "--auto_batch"), ("auto2", flag)):
        copy_until(tmp_path / "auto", 3, tmp_path / f"from_{resumed}")
        screen = call(train.main, f"{flags} {how} --output_dir {tmp_path}/from_{resumed}")
        assert "going on" in screen.out and "LLM positions fit" not in screen.out
        assert_same(weights(tmp_path / f"from_{resumed}"), weights(tmp_path / "auto"))
    assert len(losses(tmp_path / "auto")) == 6


def test_a_longest_clip_that_does_not_fit_is_an_error(call, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 1e3)  # a machine that has 1 kB left
    error = error_of(call, f"{flags} --auto_batch --output_dir {tmp_path}")
    assert re.match("--auto_batch: a step with one clip, the longest, takes .* try --gradient_checkpointing", error)


@pytest.mark.parametrize("fixed", [0, 3000])  # bytes whatever the size
@pytest.mark.parametrize("room", [10_000, 12_345, 100_000])
def test_the_budget_found_fills_the_memory_and_no_trial_goes_far_beyond_it(fixed, room):
    trials = []

    def need(budget: int) -> float:
        trials.append(budget)
        return fixed + 10 * budget

    budget, needed = grow(need, room, smallest=100, most=10**9)
    assert 0.95 * room <= needed <= room and needed == fixed + 10 * budget
    assert fixed + 10 * max(trials) <= room  # nothing is swapped out


def test_the_budget_is_found_where_memory_runs_out_without_a_measure():
    """As on a GPU; and where need grows faster than a line."""
    budget, needed = grow(lambda budget: budget**1.2 if budget < 1500 else math.inf, 1e5, smallest=100, most=10**9)
    assert 1350 <= budget < 1500
    budget, needed = grow(lambda budget: budget**1.5, 1e5, smallest=100, most=10**9)
    assert 0.85e5 < needed <= 1e5


def test_the_budget_is_bounded_and_the_smallest_is_tried_at_least():
    assert grow(lambda budget: budget, room=10**9, smallest=100, most=777)[0] == 777
    assert grow(lambda budget: 1e12, room=10**9, smallest=100, most=777) == (100, 1e12)


def test_trials_are_of_clips_that_take_most_for_their_positions_but_not_of_a_single_odd_one():
    seconds, positions, tokens = np.full(1000, 5.0), np.full(1000, 80.0), np.full(1000, 10.0)
    positions[7], tokens[8] = 200, 70  # the longest; one odd transcript
    tokens[100:200] = 20  # many talk fast
    longest, _, fast = extreme_clips(seconds, positions, tokens, budget=1600)
    assert longest == 7 and 100 <= fast < 200


def test_the_peak_is_seen_though_it_is_over_in_a_moment():
    def run() -> None:
        tensor = torch.ones(50_000_000)
        tensor.add_(1)

    before = auto_batch.memory_in_use(torch.device("cpu"))
    assert 150e6 < peak_memory(torch.device("cpu"), run) - before < 300e6
