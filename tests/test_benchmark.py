"""The benchmark's own command at its smallest sizes, and the parts of it that could mislead."""

import json

import numpy as np
import pytest
import torch

import prompt_once
from dataset import collate
from tools import benchmark

TINY = "--llm nano --mean_seconds 1 --batch_size 2 --steps 1 --decode_batch_size 3 --decode_batches 1 --device cpu"


def make_batch(model, seconds: tuple[float, ...] = (0.7, 1.5)) -> dict:
    wavs = [np.random.default_rng(i).normal(0, 0.1, round(16000 * s)) for i, s in enumerate(seconds)]
    records = [{"where": "", "wav": wav, "txt": "hello world" + i * " hello"} for i, wav in enumerate(wavs)]
    return collate(list(model.make_dataset(records)))


def test_compare_prints_what_is_gained_over_the_fixed_recipe(capsys):
    benchmark.main([*TINY.split(), "--compare", "--repeats", "1", "--json"])
    figures = json.loads(capsys.readouterr().out)
    now, fixed, ratio = figures["train_audio_seconds_a_second"]
    assert ratio == pytest.approx(now / fixed)  # how large it is depends on the machine
    assert figures["train_encoder_padding_share"][0] < 0.5 < figures["train_encoder_padding_share"][1]
    assert figures["decode_clips_with_the_same_text"] == figures["decode_clips"] == [3]
    assert len(figures["train_peak_above_weights_mb"]) == 3


@pytest.mark.parametrize(("frames", "audio"), [("cache", "flac"), ("none", "memory")])
def test_training_can_be_measured_without_the_encoder(frames, audio, capsys):
    flags = f"{TINY} --decode_batches 0 --frames {frames} --audio {audio}"
    benchmark.main([*flags.split(), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["train_audio_seconds_a_second"] > 0
    assert ("fill_audio_seconds_a_second" in figures) == (frames == "cache")
    assert 0 <= figures["train_encoder_padding_share"] < 0.5  # of frames


def test_the_prompt_can_be_measured_once_and_anew(capsys, monkeypatch):
    monkeypatch.setattr(prompt_once, "IS_ON", True)
    args = benchmark.parse([*TINY.split(), "--prompt_tokens", "24"])
    assert len(benchmark.build_model(args).prompt_ids) == 24
    benchmark.main([*TINY.split(), "--prompt_anew", "--json"])
    assert not prompt_once.IS_ON
    figures = json.loads(capsys.readouterr().out)
    assert figures["train_audio_seconds_a_second"] > 0 and figures["decode_audio_seconds_a_second"] > 0


def test_the_fixed_recipe_has_the_same_loss(model):
    batch = make_batch(model)
    fixed = benchmark.fix(batch)
    assert fixed["input_ids"].shape == (2, 512)
    with torch.no_grad():
        assert model(**fixed).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_padding_is_no_useful_work(model):
    seconds = torch.tensor([0.7, 1.5])
    together = benchmark.count_work(model, seconds, benchmark.fix(make_batch(model)))["operations"]
    alone = sum(benchmark.count_work(model, s[None], make_batch(model, (float(s),)))["operations"] for s in seconds)
    assert together > alone  # by the longer transcript of the second clip, and by nothing else
    assert together == benchmark.count_work(model, seconds, make_batch(model))["operations"]


@pytest.mark.parametrize(
    "flags", ["--mean_seconds 40", "--steps 51", "--llm none", "--device abacus", "--stpes 1", "--frames none"]
)
def test_wrong_flags_end_with_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(flags.split())
    assert exit.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]
