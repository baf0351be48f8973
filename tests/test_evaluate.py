"""What evaluate.py promises: loss, error rate and listening gap, the same for any batch and number of processes."""

import json

import numpy as np
import pytest
import torch
from conftest import TRAIN_FLAGS, noise

from evaluate import DEAF, embeds_of_another, embeds_of_longest, evaluate
from manifest import SPEECH
from model import SpeechLLM
from train import parse


def arguments(*flags: str):
    return parse([*TRAIN_FLAGS.split(), "--data_path", "x", "--output_dir", "y", *flags])[2]


def make_dataset(model, count: int = 5):
    records = [{"where": f"{i}", "wav": noise(0.7 + 0.3 * i, seed=i), "txt": "hello world"} for i in range(count)]
    return model.make_dataset(records)


def test_the_listening_gap_is_the_loss_with_another_clips_audio_minus_the_loss(model):
    """By hand, of two clips: each with the embeddings of the other, cut or repeated to its own length."""
    dataset, total, tokens = make_dataset(model, 2), 0.0, 0
    evaluation = evaluate(model, dataset, arguments())
    audio = [dataset.records[1]["wav"], dataset.records[0]["wav"]]
    for example, samples in zip(dataset, audio, strict=False):
        features = model.encoder.extract(samples)[None]
        with torch.no_grad():
            embeds = model.embed_speech(torch.tensor([features.shape[1]]), input_features=features)
            count = example["prompt_ids"].count(SPEECH)
            embeds = embeds.repeat(count // len(embeds) + 1, 1)[:count]
            ids = torch.tensor([example["prompt_ids"] + example["target_ids"]])
            labels = torch.tensor([example["target_ids"]])
            ids = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            loss = model(**ids, num_items_in_batch=1, speech_embeds=embeds).loss
        total, tokens = total + loss.item(), tokens + labels.numel()
    assert evaluation.metrics["listening_gap"] == pytest.approx(total / tokens - evaluation.metrics["loss"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_figures_do_not_depend_on_the_batch(model, batch_size):
    one = evaluate(model, make_dataset(model), arguments("--per_device_eval_batch_size", "3"))
    other = evaluate(model, make_dataset(model), arguments("--per_device_eval_batch_size", str(batch_size)))
    assert other.hypotheses == one.hypotheses
    assert other.metrics == pytest.approx(one.metrics, abs=1e-4)


def test_one_clip_alone_has_no_listening_gap(model):
    assert evaluate(model, make_dataset(model, 1), arguments()).metrics.keys() == {"loss", "wer"}


def test_a_clip_that_cannot_be_read_lends_nobody_its_audio(model):
    records = [{"where": str(n), "wav": np.full(16000 * n, np.nan) if n == 4 else noise(n)} for n in (1, 4, 2)]
    dataset = model.make_dataset([record | {"txt": "hello"} for record in records], on_bad="skip")
    assert [index for index, _ in embeds_of_longest(model, dataset)] == [2, 0]


def test_every_clip_gets_the_longest_ones_audio_and_that_one_the_next(model):
    a, b = torch.zeros(2, 4), torch.ones(3, 4)
    batch = {"input_ids": torch.tensor([[SPEECH] * 3 + [5], [7, SPEECH, 5, 5]]), "index": [8, 3]}
    embeds = embeds_of_another(batch, [(8, a), (2, b)], None)
    assert embeds[:, 0].tolist() == [1, 1, 1, 0]  # record 8 hears record 2, record 3 hears record 8


def test_a_model_that_does_not_listen_is_told_with_what_to_try(model, capsys):
    silent = SpeechLLM(model.config, model.encoder, model.projector, model.llm, model.tokenizer)
    silent.projector = type("Deaf", (torch.nn.Module,), {"forward": lambda self, x, n: torch.zeros_like(keep(x, n))})()
    keep = model.projector.forward
    silent.projector.output_lengths = model.projector.output_lengths
    metrics = evaluate(silent, make_dataset(model), arguments()).metrics
    assert abs(metrics["listening_gap"]) < DEAF
    out = capsys.readouterr().out
    assert "warning: the model does not listen" in out and "--learning_rate" in out


def test_a_run_logs_the_listening_gap_and_both_processes_agree_on_it(trained, world, launch, tmp_path):
    flags = "--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 1 --learning_rate 1e-3"
    gaps = []
    for processes, size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        batch = f"--per_device_train_batch_size {size} --per_device_eval_batch_size {size} --output_dir {folder}"
        job = launch("train.py", f"{TRAIN_FLAGS} {flags} {batch}", processes=processes).wait()
        assert job.status == 0, job.err
        gaps.append(json.loads((folder / "config.json").read_text())["training"]["evaluation listening_gap"])
    assert gaps[1] == pytest.approx(gaps[0], abs=2e-4)
    assert np.isfinite(gaps[0])
