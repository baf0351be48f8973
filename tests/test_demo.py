"""The demo's parts, at a few steps: the whole of it is run by `make demo QUICK=1`."""

import random

import pytest
import torch

from dataset import load_audio, open_records
from demo import data, models, stages
from model import SpeechLLM, load_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Speech of 32 sentences to train on, 2 in each test set."""
    folder = tmp_path_factory.mktemp("demo")
    data.make_data(folder, seed=0, train_sentences=32, test_sentences=2)
    return folder


def test_no_test_sentence_and_no_new_voice_is_trained_on(folder):
    rows = {path.stem: list(open_records(path)) for path in folder.glob("*.jsonl") if path.stem != "test_nothing"}
    texts = {name: {row["txt"] for row in part} for name, part in rows.items()}
    voices = {name: {row["voice"].partition("+")[2] for row in part} for name, part in rows.items()}
    assert {name: len(part) for name, part in texts.items()} == {
        "train": 32, "dev": 64, "test_known_voices": 2, "test_new_voices": 2
    }  # fmt: skip
    assert not texts["train"] & (texts["dev"] | texts["test_known_voices"] | texts["test_new_voices"])
    assert not voices["test_new_voices"] & voices["train"]
    for row in rows["train"][:4]:
        samples = load_audio(folder / row["wav"])
        assert len(samples) / 16000 == pytest.approx(row["duration"], abs=1e-3) and samples.std() > 0.01


def test_clips_without_speech_have_empty_transcripts(folder):
    rows = list(open_records(folder / "test_nothing.jsonl"))
    assert {row["kind"] for row in rows} == set(data.NOTHING) and {row["txt"] for row in rows} == {""}
    for row in rows:
        samples = load_audio(folder / row["wav"])
        assert len(samples) / 16000 == pytest.approx(row["duration"], abs=1e-3)
        assert (samples.std() < 1e-3) == (row["kind"] == "silence")


@pytest.mark.parametrize("encoder", models.RECIPES)
def test_an_encoder_is_saved_as_it_was_trained(folder, encoder):
    recipe = models.RECIPES[encoder]
    torch.manual_seed(0)
    recipe.create(folder / f"untrained_{recipe.output}")
    models.train_encoder(folder, lambda: 1, seed=0, encoder_epochs=1, encoder=encoder)
    before, after = (load_encoder(str(folder / name)) for name in (f"untrained_{recipe.output}", recipe.output))
    unchanged = [name for name, p in before.named_parameters() if torch.equal(p, after.get_parameter(name))]
    assert unchanged == (["model.embed_positions.weight"] if encoder == "whisper" else [])


def test_the_llm_is_saved_as_the_commands_load_it(folder):
    models.train_llm(folder, seed=0, llm_steps=2)
    models.new_whisper(folder / "new.pt")
    model = SpeechLLM.from_parts(folder / "new.pt", folder / "llm")
    first = next(iter(open_records(folder / "train.jsonl")))
    assert isinstance(model.transcribe(folder / first["wav"], max_new_tokens=2), str)


def test_a_stage_is_run_again_only_if_its_settings_or_a_stage_before_it_have_changed(tmp_path):
    runs = []

    def run(value: int, seed: int) -> None:
        first = stages.Stage(tmp_path, "data", {"value": value}, [], {})
        second = stages.Stage(tmp_path, "llm", {"seed": seed}, [first], {})
        for stage in (first, second):
            stage.run(
                [f"{stage.name}.txt"], lambda s=stage: (runs.append(s.name), (tmp_path / f"{s.name}.txt").touch())
            )

    run(1, 1)
    assert runs == ["data", "llm"]
    run(1, 1)
    assert runs == ["data", "llm"]
    run(1, 2)
    assert runs == ["data", "llm", "llm"]
    run(2, 2)
    assert runs == ["data", "llm", "llm", "data", "llm"]
    (tmp_path / "data.txt").unlink()
    run(2, 2)
    assert runs[5:] == ["data", "llm"]


def test_what_the_llm_repeats_is_all_there_without_noise():
    heard = models.mishear([7, 8, 9], words=[10, 11], noise=0.0, rng=random.Random(0))
    tokens = [token for token in heard if token != data.BLANK]
    assert list(dict.fromkeys(tokens)) == [7, 8, 9]
