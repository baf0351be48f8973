"""What conversations.py promises: prompts of several turns and clips are answered, or refused with the reason."""

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, noise

from errors import BadUtterance, InputError
from inputs import records_of

NEW = {"max_new_tokens": 8}
ANSWER = {"role": "assistant", "content": "hello"}


def ask(content: str, *audio: str | np.ndarray) -> dict:
    return {"role": "user", "content": content, "audio": list(audio)}


@pytest.fixture
def files(tmp_path) -> list[str]:
    for seed in range(3):
        soundfile.write(tmp_path / f"{seed}.wav", noise(0.7 + 0.4 * seed, seed), SAMPLE_RATE, subtype="FLOAT")
    return [str(tmp_path / f"{seed}.wav") for seed in range(3)]


def test_conversations_are_answered_together_as_alone(any_model, files):
    prompts = [
        [ask("Transcribe the following: <audio>", files[0])],
        [ask("<audio> and <audio>", files[1], files[2])],
        [ask("<audio>", noise(0.9, 7)), ANSWER, ask("and <audio>", files[0])],
    ]
    together = any_model.generate(prompts=prompts, num_beams=4, **NEW)
    assert together.shape[0] == 3
    for prompt, ids in zip(prompts, together, strict=True):
        alone = any_model.generate(prompts=[prompt], num_beams=4, **NEW)[0]
        assert ids[: len(alone)].equal(alone)


def test_the_models_own_prompt_as_a_conversation_gives_its_transcript(model):
    clip = noise(1.3)
    ids = model.generate(prompts=[[ask("<audio>\nTranscribe the speech", clip)]], **NEW)
    (text,) = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    with pytest.warns(UserWarning, match="no end within 8"):
        assert model.transcribe(clip, num_beams=1, **NEW) == " ".join(text.split()) != ""


def test_answers_are_the_same_in_the_middle_of_training(any_model):
    prompts = [[ask("<audio>", noise(0.9, 7))]]
    answer = any_model.generate(prompts=prompts, **NEW)
    getattr(any_model, "activation_checkpointing_enable", any_model.gradient_checkpointing_enable)()
    any_model.train()
    assert any_model.generate(prompts=prompts, **NEW).equal(answer)
    assert any_model.training
    any_model.eval()


def test_one_clip_of_a_turn_may_stand_without_its_list(model, files):
    turn, path = {"role": "user", "content": "<audio> What?"}, files[0]
    answer = model.generate(prompts=[[turn | {"audio": [path]}]], **NEW)
    assert model.generate(prompts=[[turn | {"audio": path}]], **NEW).equal(answer)
    samples, _ = soundfile.read(path, dtype="float32")
    assert model.generate(prompts=[[turn | {"audio": samples}]], **NEW).equal(answer)


def test_the_records_of_prompts_are_named_by_their_number_and_the_callers_turns_stay_as_they_are():
    turn = ask("<audio>", "a.wav") | {"audio": "a.wav"}
    records = records_of([[turn], [turn]])
    assert [record["where"] for record in records] == ["prompt 1", "prompt 2"]
    assert records[0]["messages"][0]["audio"] == ["a.wav"]
    assert turn["audio"] == "a.wav"


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([ask("<audio> and <audio>", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("no place", noise(1))], "prompt 1: 0 <audio> in the prompt for 1 audio clips"),
        ([ask("<audio> <audio>", noise(1)), ask("and", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("<audio>", "nowhere.wav")], "prompt 1: nowhere.wav: no such file"),
        ([ask("<audio>", noise(0.001))], "prompt 1: .*too short"),
        ([ask("hello")], "prompt 1: no audio in the conversation"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"prompt 1: \{.*; wanted texts in 'role', 'content'"),
        ([{"content": "<audio>"}], r"prompt 1: \{.*; wanted texts in 'role', 'content'"),
    ],
)
def test_a_conversation_that_does_not_add_up_is_an_error(model, turns, told):
    with pytest.raises(BadUtterance, match=told) as error:
        model.generate(prompts=[turns], **NEW)
    assert "\n" not in str(error.value)


def test_a_prompt_longer_than_the_llms_context_is_an_error(model):
    with pytest.raises(InputError, match=r"prompt 1: .* do not fit in 1024"):
        model.generate(prompts=[[ask("<audio> " + "hello " * 1000, noise(1))]], **NEW)


@pytest.mark.parametrize("prompts", [[[]], [ask("<audio>")], [["<audio>"]]])
def test_prompts_of_another_shape_are_told_the_right_one(model, prompts):
    with pytest.raises(ValueError, match="prompt 1: wanted a list of turns, each with role, content and perhaps audio"):
        model.generate(prompts=prompts, **NEW)


def test_prompts_are_wanted_and_no_tensors_beside_them(model):
    with pytest.raises(ValueError, match="wanted prompts, found none"):
        model.generate(prompts=[], **NEW)
    with pytest.raises(ValueError, match="wanted prompts, or tensors of audio and text; not both"):
        model.generate(prompts=[[ask("<audio>", noise(1))]], input_features=noise(1), **NEW)


def test_an_answer_is_not_asked_for_after_an_answer(model):
    with pytest.raises(ValueError, match="last turn is the user's"):
        model.generate(prompts=[[ask("<audio>", noise(1)), ANSWER]], **NEW)
