"""What batching.py promises: full batches of similar lengths within a budget, as many in every epoch and process."""

import re

import numpy as np
import pytest
import torch
from conftest import TRAIN_FLAGS, noise, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CORPUS, assert_same, copy_until, error_of, losses, weights

import train
from batching import POSITIONS, SECONDS, BudgetSampler, batches, measure
from manifest import AUDIO

NO_LIMIT = np.inf


def librispeech(count: int = 281_241) -> np.ndarray:
    """Lengths like those of its 960 hours: a mean of 12.3 s, most of 12 to 16 s, 2.7 words a second."""
    random = np.random.default_rng(0)
    most = random.normal(14.3, 1.3, count)
    others = 1.3 + 14 * random.beta(1.2, 1.2, count)
    seconds = np.where(random.random(count) < 0.65, most, others)
    seconds = np.where(random.random(count) < 0.005, random.uniform(16, 24.5, count), seconds).clip(1.3, 24.5)
    words_a_second = random.normal(2.7, 0.4, count).clip(1.2, 4.5)
    return with_positions(seconds, 1.3 * seconds * words_a_second)


def aishell(count: int = 120_098) -> np.ndarray:
    """Lengths like those of AISHELL-1: a mean of 4.5 s and of 14.4 characters."""
    random = np.random.default_rng(0)
    seconds = random.gamma(9, 0.5, count).clip(1.2, 14.5)
    return with_positions(seconds, 3.2 * seconds + random.normal(0, 2, count))


def with_positions(seconds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(clips, 2): seconds, and positions of 22 tokens of prompt, 10 embeddings a second, and the transcript."""
    return np.stack([seconds, 22 + np.floor(10 * seconds) + tokens.round().clip(1) + 1], axis=1)


def small(count: int = 400) -> np.ndarray:
    seconds = np.random.default_rng(0).uniform(1, 30, count)
    return with_positions(seconds, 3 * seconds)


def sets(lists: list) -> set[frozenset]:
    """Batches, whatever their order and that in them."""
    return {frozenset(np.array(batch).reshape(-1).tolist()) for batch in lists}


# Batches


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.integers(1, 400)), min_size=1, max_size=150),
    st.floats(5, 200),
    st.integers(20, 4000),
    st.integers(1, 9),
)
def test_every_clip_comes_once_within_the_budget_in_as_many_batches_in_every_epoch(clips, seconds, positions, multiple):
    lengths, budget = np.array(clips, float), np.array([seconds, positions])
    epochs = [batches(lengths, budget, np.random.default_rng(seed), multiple) for seed in range(3)]
    assert len({len(epoch) for epoch in epochs}) == 1 and len(epochs[0]) % multiple == 0
    for batch in epochs[0]:
        assert len(batch) == 1 or (lengths[batch].max(0) * len(batch) <= budget).all()
    order = np.concatenate(epochs[0]).tolist()
    assert set(order) == set(range(len(clips)))
    # Clips come again only where each is a batch of its own, and there are still too few batches.
    assert len(order) == len(clips) or (len(order) == len(epochs[0]) and len(order) - len(clips) < multiple)


@pytest.mark.parametrize(
    ("corpus", "budget", "most"),
    [(librispeech, (240, NO_LIMIT), 0.02), (aishell, (240, NO_LIMIT), 0.03), (aishell, (NO_LIMIT, 8192), 0.04)],
)
def test_padding_is_a_few_per_cent_of_the_encoder_and_of_the_llm(corpus, budget, most):
    lengths = corpus()
    epoch = batches(lengths, np.array(budget), np.random.default_rng(0), 8)
    padded = sum(lengths[batch].max(0) * len(batch) for batch in epoch)  # (measures,)
    assert (1 - lengths.sum(0) / padded < most).all()  # README: no packing, for want of padding
    used = padded / len(epoch) / np.array(budget)
    assert used.max() > 0.93  # the batches are full, too


def test_batches_differ_from_epoch_to_epoch_and_are_the_same_for_the_same_seed():
    epochs = [batches(small(), np.array([120, NO_LIMIT]), np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert len(sets(epochs[0]) & sets(epochs[1])) < len(epochs[0]) / 10
    assert all(map(np.array_equal, epochs[0], epochs[2]))


def test_steps_have_similar_lengths_and_come_in_no_order_of_length():
    lengths = small(1600)
    sampler = BudgetSampler(lengths, np.array([120, NO_LIMIT]), seed=0, accumulation=4)
    rows = [np.array(batch)[:, 1] for batch in sampler]
    means = np.array([lengths[row, SECONDS].mean() for row in rows]).reshape(-1, 4)  # (steps, batches)
    assert np.ptp(means, axis=1).mean() < 2  # seconds
    assert abs(np.corrcoef(means[:-1].mean(1), means[1:].mean(1))[0, 1]) < 0.3


def test_each_optimiser_step_has_the_same_batches_on_any_number_of_processes():
    def steps(processes: int, accumulation: int) -> list[set[frozenset]]:
        args = small(), np.array([100, 900]), 3, lambda: 5, processes
        ranks = [BudgetSampler(*args, rank, accumulation) for rank in range(processes)]
        shares = [list(sampler) for sampler in ranks]
        assert [len(share) for share in shares] == [len(sampler) for sampler in ranks] == processes * [len(ranks[0])]
        assert {epoch for share in shares for batch in share for epoch, _ in batch} == {5}
        starts = range(0, len(ranks[0]), accumulation)
        return [sets(sum((share[start : start + accumulation] for share in shares), [])) for start in starts]

    wanted = steps(1, 4)
    assert sum(map(len, wanted)) == 4 * len(wanted)
    assert steps(2, 2) == steps(4, 1) == wanted


# Lengths


@pytest.mark.parametrize("variant", [{}, {"audio_boundary_tokens": True, "pad_to_30s": True}])
def test_positions_are_those_of_the_examples_or_one_or_two_more(any_model, variant):
    seconds = (0.5, 1.01, 2.333, 7.77, 29.995, 31.3)
    records = [{"where": f"a:{n}", "wav": noise(s, n), "txt": n * "hello "} for n, s in enumerate(seconds)]
    records[2]["prompt"] = f"Say it: {AUDIO} in other words"
    turns = [{"role": "user", "content": f"{AUDIO} and {AUDIO}", "audio": [noise(1.2), noise(3.4)]}]
    turns += [{"role": "assistant", "content": "hello world"}]
    if "pad_to_30s" not in variant:  # which pads both clips
        records.append({"where": "a:7", "messages": turns})
    dataset = any_model.make_dataset(records)
    for name, value in variant.items():
        setattr(dataset, name, value)
    lengths, tokens = measure(dataset)
    for n, example in enumerate(dataset):
        size = len(example["prompt_ids"]) + len(example["target_ids"])
        assert size <= lengths[n, POSITIONS] <= size + 2
        assert tokens[n] == len(example["target_ids"])
    assert lengths[:6, SECONDS] == pytest.approx([30, 30, 30, 30, 30, 60] if variant else seconds, abs=0.01)


# Training


def test_uneven_batches_train_as_one_large_batch_does_on_one_process_and_on_two(chinese_llm, call, launch, tmp_path):
    """20 clips in one step an epoch: at once, as 8 batches of one process, as 4 batches of each of two.

    SGD, for AdamW's first step does not depend on the scale of the loss.
    """
    flags = f"{CORPUS} --optim sgd --learning_rate 1e-3 --max_grad_norm 0 --max_steps 2 --save_steps 2"
    budget = f"{flags} --max_batch_seconds 9 --gradient_accumulation_steps"
    call(train.main, f"{flags} --per_device_train_batch_size 20 --output_dir {tmp_path}/large")
    screen = call(train.main, f"{budget} 8 --output_dir {tmp_path}/one")
    assert re.search("budget of 9 s: 8 batches of 2 to [34] clips, 1 steps an epoch; padding", screen.out)
    job = launch("train.py", f"{budget} 4 --output_dir {tmp_path}/two", processes=2).wait()
    assert job.status == 0, job.err
    wanted = weights(tmp_path / "large")
    for run in ("one", "two"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
        assert_same(weights(tmp_path / run), wanted, within=1e-5)
    assert losses(tmp_path / "large")[0] - losses(tmp_path / "large")[1] > 0.1  # it does learn


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_ends_with_the_same_weights(chinese_llm, call, tmp_path):
    flags = f"{CORPUS} --max_batch_tokens 130 --gradient_accumulation_steps 2 --learning_rate 1e-3 --save_steps 3"
    flags += " --num_train_epochs 2 --augment speed --encoder_dropout 0.1"
    call(train.main, f"{flags} --output_dir {tmp_path}/whole")
    assert len(losses(tmp_path / "whole")) > 6 and len(losses(tmp_path / "whole")) % 6
    copy_until(tmp_path / "whole", 3, tmp_path / "resumed")
    assert "going on" in call(train.main, f"{flags} --output_dir {tmp_path}/resumed").out
    assert_same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    error = error_of(call, f"{flags} --max_batch_tokens 140 --output_dir {tmp_path}/resumed")
    assert "max_batch_tokens was 130 and is 140" in error


def test_check_shows_the_batches_of_the_budget(chinese_llm, call, tmp_path):
    flags = f"{CORPUS} --llm_model_name_or_path llm --max_batch_seconds 9 --check 8 --output_dir {tmp_path}"
    out = call(train.main, flags).out
    shown = re.findall(r"^corpus.jsonl:(\d+)  ", out, re.MULTILINE)
    assert sorted(map(int, shown)) == list(range(1, 21))
    assert "a step with the 2 longest clips" in out  # 3.9 s each


def test_a_run_without_a_budget_does_not_go_on_with_one(chinese_llm, call, tmp_path):
    flags = f"{CORPUS} --max_steps 2 --save_steps 1 --output_dir {tmp_path}"
    call(train.main, flags)
    assert "max_batch_seconds was 0 and is 9.0" in error_of(call, f"{flags} --max_batch_seconds 9")
    assert "auto_batch was False and is True" in error_of(call, f"{flags} --auto_batch")


def test_overfitting_evaluation_and_meters_go_with_a_budget(chinese_llm, call, tmp_path):
    flags = f"{CORPUS.replace('--report_to none', '--report_to tensorboard')} --overfit 4 --max_batch_tokens 90"
    error = error_of(call, f"{flags} --max_steps 4 --eval_steps 2 --save_steps 4 --output_dir {tmp_path}")
    assert error.startswith("--overfit: WER")


# Wrong input


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--max_batch_seconds 3", r"--max_batch_seconds 3: corpus.jsonl:\d+ alone has 4; wanted so many at least"),
        ("--max_batch_tokens 30", r"--max_batch_tokens 30: corpus.jsonl:\d+ alone has \d+; wanted so many at least"),
        ("--max_batch_seconds -1", "--max_batch_seconds -1.0: wanted 0 or more"),
        ("--max_batch_seconds 9 --auto_batch", "--auto_batch looks for a budget; leave out"),
        ("--max_batch_seconds 9 --dataloader_drop_last", "leave out .*--dataloader_drop_last"),
        ("--max_batch_seconds 9 --train_sampling_strategy random", "leave out --train_sampling_strategy"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_told_in_one_line(chinese_llm, call, flags, told):
    assert re.search(told, error_of(call, f"{CORPUS} {flags} --output_dir never"))


def test_a_bad_clip_does_not_stop_a_run_that_skips_it(world, chinese_llm, call, tmp_path):
    """Its transcript is longer than --model_max_length, which shows when it is read."""
    rows = [{"wav": str(world / f"clip{n}.wav"), "txt": "hello " * (200 if n == 3 else 2)} for n in range(8)]
    write_manifest(tmp_path / "one_bad.jsonl", rows)
    flags = f"{TRAIN_FLAGS} --data_path {tmp_path}/one_bad.jsonl --model_max_length 120 --max_batch_tokens 120"
    screen = call(
        train.main, f"{flags} --on_bad_audio skip --num_train_epochs 1 --save_strategy no --output_dir {tmp_path}/run"
    )
    assert "skipped 1 bad utterances" in screen.err
    assert torch.isfinite(weights(tmp_path / "run")["projector.conv.weight"]).all()
