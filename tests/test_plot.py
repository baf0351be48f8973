"""tools/plot.py: what is in the pictures, by the axes that matplotlib is given, and that a PNG comes out."""

import json
import math
import warnings

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import write_manifest

from errors import InputError
from manifest import SPEECH
from model import SpeechLLM
from tools import plot


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def write_state(folder, rows: list[dict], step: int = 100) -> str:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": rows}))
    return str(folder)


def texts_of(axis) -> list[str]:
    """The numbers above bars."""
    return [text.get_text() for text in axis.texts]


# Runs


def test_a_run_that_train_py_wrote_is_drawn_with_its_loss_and_error_rate(trained, tmp_path):
    plot.main([str(trained), "--out", str(tmp_path / "runs.png")])
    assert matplotlib.image.imread(tmp_path / "runs.png").shape[1] == 1200  # pixels
    figure = plot.plot_runs([str(trained)])
    assert [axis.get_ylabel() for axis in figure.axes][:2] == [
        "training loss\n(nats a token)",
        "WER in\nevaluation (%)",
    ]
    rows = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    logged = [[(row["step"], row["loss"]) for row in rows if "loss" in row]]
    logged += [[(row["step"], 100 * row["eval_wer"]) for row in rows if "eval_wer" in row]]
    assert [len(points) for points in logged] == [10, 2]
    for axis, points in zip(figure.axes, logged, strict=False):
        np.testing.assert_allclose(axis.lines[0].get_xydata(), points)


def test_several_runs_stand_in_one_picture_in_colours_and_line_styles_of_their_own(tmp_path):
    gap = [{"step": 10, "loss": 2.0}, {"step": 10, "eval_wer": 0.5, "eval_listening_gap": 1.5}]
    folders = [write_state(tmp_path / "a", gap), write_state(tmp_path / "b", [{"step": 20, "loss": 1.0}])]
    figure = plot.plot_runs(folders)
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes] == ["training loss", "WER in", "listening gap"]
    assert figure.axes[-1].get_xlabel() == "optimiser steps"
    first, second = figure.axes[0].lines
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == folders
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[10, 1.5]]


def test_of_a_run_that_has_not_ended_the_last_checkpoint_is_drawn(tmp_path):
    for step in (2, 10):
        rows = [{"step": i + 1, "loss": 1.0 / (i + 1)} for i in range(step)]
        write_state(tmp_path / f"run/checkpoint-{step}", rows, step)
    assert len(plot.read_log(str(tmp_path / "run"))) == 10


def test_many_values_are_drawn_pale_with_their_mean_over_a_twentieth_of_the_run(tmp_path):
    rows = [{"step": i + 1, "loss": 3.0 + (-1) ** i} for i in range(200)]
    pale, mean = plot.plot_runs([write_state(tmp_path / "run", rows)]).axes[0].lines
    assert len(pale.get_xdata()) == 200 and pale.get_alpha() < 0.5
    np.testing.assert_allclose(mean.get_ydata(), 3.0)
    assert mean.get_xdata()[0] > 1 and len(mean.get_xdata()) == 191


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no trainer_state.json"),
        ("{", "no state of a Trainer"),
        ("[]", "no state of a Trainer"),
        ('{"global_step": 1, "log_history": []}', "nothing was logged"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        plot.plot_runs([str(tmp_path)])


# A result file


@pytest.fixture
def result(tmp_path):
    """Ten utterances of 1 to 10 s with a word each, of which the three longest are wrong: manifest, result file."""
    rows = [{"wav": f"{i}.wav", "txt": "word", "duration": float(i)} for i in range(1, 11)]
    hypotheses = [{"key": str(i), "pred": "word" if i < 8 else "ward"} for i in range(1, 11)]
    return write_manifest(tmp_path / "test.jsonl", rows), write_manifest(tmp_path / "result.jsonl", hypotheses)


def test_the_error_rate_stands_over_the_duration_with_the_number_of_utterances(result):
    top, bottom = plot.plot_result(str(result[1]), str(result[0])).axes
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("WER (%)", "utterances", "duration (s)")
    heights = [bar.get_height() for bar in bottom.patches]
    assert sum(heights) == 10  # the longest, at the edge of the last bin, too
    assert texts_of(bottom) == [f"{height:.0f}" for height in heights]
    right = [bar.get_x() + bar.get_width() for bar in top.patches]  # seconds
    rates = [bar.get_height() for bar in top.patches]
    assert {rate for rate, second in zip(rates, right, strict=True) if second < 8} == {0}
    assert {rate for rate, second in zip(rates, right, strict=True) if second > 8.5} == {100}
    assert "all 10 utterances: 30.00 %" in top.get_legend().get_texts()[0].get_text()


def test_a_bin_without_an_utterance_has_no_rate(tmp_path):
    rows = [{"wav": f"{i}.wav", "txt": "word", "duration": seconds} for i, seconds in enumerate((1.0, 9.9))]
    data, hypotheses = write_manifest(tmp_path / "test.jsonl", rows), tmp_path / "result.txt"
    hypotheses.write_text("word\nward\n")
    top, _ = plot.plot_result(str(hypotheses), str(data)).axes
    heights = [bar.get_height() for bar in top.patches]
    assert heights[0] == 0 and heights[-1] == 100 and all(map(math.isnan, heights[1:-1]))
    assert [text for text in texts_of(top) if text] == ["0.0", "100.0"]


def test_durations_that_nobody_knows_are_an_error(tmp_path):
    data = write_manifest(tmp_path / "test.jsonl", [{"wav": "missing.wav", "txt": "word"}])
    (tmp_path / "result.txt").write_text("word\n")
    with pytest.raises(InputError, match="no duration is known"):
        plot.plot_result(str(tmp_path / "result.txt"), str(data))


# Attention


@pytest.fixture(scope="module")
def trained_model(trained):
    return SpeechLLM.from_pretrained(trained)


def test_attention_is_that_of_the_position_which_predicts_the_token(trained_model, world):
    model, heads = trained_model, []
    model.llm.set_attn_implementation("eager")  # gives each layer's weights (1, heads, L, L)
    hook = model.llm.model.layers[-1].self_attn.register_forward_hook(lambda *args: heads.append(args[-1][1]))
    tokens, weights = plot.attention_to_speech(model, str(world / "clip3.wav"), last_layers=1)
    hook.remove()
    dataset = model.make_dataset([{"wav": str(world / "clip3.wav"), "where": "clip 3"}], with_targets=False)
    prompt_ids = dataset[0]["prompt_ids"]
    is_speech = np.array(prompt_ids) == SPEECH
    assert weights.shape == (len(tokens), is_speech.sum()) and is_speech.sum() > 1
    whole = heads[-1][0].detach().mean(0).numpy()  # (L, L)
    assert len(whole) == len(prompt_ids) + len(tokens)
    first = len(prompt_ids) - 1  # the last position of the prompt predicts the first token
    np.testing.assert_allclose(weights, whole[first:-1, : len(prompt_ids)][:, is_speech], rtol=1e-5)
    assert (weights.sum(1) < 1).all()


def test_the_map_has_a_row_for_each_token_and_an_axis_in_seconds(trained_model, world, tmp_path):
    tokens, weights = plot.attention_to_speech(trained_model, str(world / "clip3.wav"))
    top, bottom, _ = plot.plot_attention(trained_model, str(world / "clip3.wav"), 0).axes
    labels = [label.get_text() for label in bottom.get_yticklabels()]
    assert labels == [f"{token}   {share:.0%}" for token, share in zip(tokens, weights.sum(1), strict=True)]
    assert bottom.get_xlabel() == "time (s)"
    seconds = len(top.lines[0].get_xdata()) / 16000
    assert bottom.get_xlim() == (0, seconds) and bottom.images[0].get_extent()[1] == seconds
    np.testing.assert_allclose(bottom.images[0].get_array(), weights)


def test_the_command_writes_the_map(trained, world, tmp_path):
    flags = ["--attention", str(world / "clip3.wav"), "--model_path", str(trained), "--out", str(tmp_path / "map.png")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot.main(flags)
    # The transcript is Chinese. Where no font has the characters, one warning stands for all of them.
    assert len([warning for warning in caught if "Glyph" in str(warning.message)]) <= 1
    assert matplotlib.image.imread(tmp_path / "map.png").ndim == 3


@pytest.mark.parametrize(
    "flags",
    ["", "run --result a.txt", "--result a.txt", "--attention a.wav", "run --out plot.jpg", "run --last_layers -1"],
)
def test_wrong_flags_end_with_one_line_and_status_2(capsys, flags):
    with pytest.raises(SystemExit) as exit:
        plot.main(flags.split())
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
