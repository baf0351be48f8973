"""What conversations.py promises: prompts of several turns and clips are answered, or refused with the reason."""

import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, TRAIN_FLAGS, make_tokenizer, noise, write_manifest
from families import LLMS
from runs import error_of, losses
from transformers import AutoTokenizer

import train
from conversations import with_labels
from dataset import IGNORE, PLAIN_TEMPLATE, collate, render_prompt
from errors import BadUtterance, InputError
from inputs import records_of
from manifest import AUDIO, SPEECH

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


def test_a_conversation_of_text_alone_is_the_llms_own_alone_and_beside_audio(any_model):
    turns = [ask("Who are you?"), {**ANSWER, "content": "nobody"}]
    example, heard = example_of(any_model, turns), example_of(any_model, [ask("<audio>", noise(1.3)), ANSWER])
    ids = torch.tensor([example["prompt_ids"] + example["target_ids"]])
    labels = torch.tensor([[IGNORE] * len(example["prompt_ids"]) + example["target_ids"]])
    wanted = any_model.llm(ids, labels=labels).loss
    torch.testing.assert_close(any_model(**collate([example, example])).loss, wanted, rtol=1e-4, atol=0)
    parts = [any_model(**collate([each]), num_items_in_batch=1).loss for each in (example, heard)]
    both = any_model(**collate([example, heard]), num_items_in_batch=1).loss
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=0)
    answer = any_model.generate(prompts=[turns[:1]], num_beams=1, **NEW)[0]
    written = any_model.llm.generate(ids[:, : len(example["prompt_ids"])], num_beams=1, **NEW)[0]
    assert written[len(example["prompt_ids"]) :].equal(answer)


def test_a_batch_of_text_alone_gives_the_projector_a_gradient_of_zeros_as_other_processes_wait_for_one(model):
    model.zero_grad()
    model(**collate([example_of(model, [ask("Who?"), ANSWER])])).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and not any(gradient.any() for gradient in gradients)
    model.zero_grad()


def test_an_answer_to_text_alone_may_have_all_new_tokens(recogniser):
    """The limit that follows from the length of the audio is for clips."""
    options = {"num_beams": 1, "max_new_tokens": 60, "max_tokens_per_second": 1}
    dataset = recogniser.make_dataset([{"messages": [ask(f"{n} times?")]} for n in range(20)], with_targets=False)
    lengths = [len(h.text) for batch in recogniser.decode(dataset, **options) for h in batch]
    assert max(lengths) > 20


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([ask("<audio> and <audio>", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("no place", noise(1))], "prompt 1: 0 <audio> in the prompt for 1 audio clips"),
        ([ask("<audio> <audio>", noise(1)), ask("and", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("<audio>", "nowhere.wav")], "prompt 1: nowhere.wav: no such file"),
        ([ask("<audio>", noise(0.001))], "prompt 1: .*too short"),
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


# --train_on_turns all

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First <audio>, second <audio>.", "audio": [noise(0.5, 1), noise(0.7, 2)]},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "And <audio>?", "audio": [noise(0.9, 3)]},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Nothing?"},
    {"role": "assistant", "content": "hello"},
]


def example_of(model, turns: list[dict], train_on_turns: str = "all", **options) -> dict:
    return model.make_dataset([{"messages": turns}], train_on_turns=train_on_turns, **options)[0]


def trained_texts(tokenizer, labels: list[int]) -> list[str]:
    """The runs of labels that are trained."""
    runs = "".join(tokenizer.decode([label]) if label != IGNORE else "\0" for label in labels).split("\0")
    return [run for run in runs if run]


def test_all_answers_are_trained_with_their_end_tokens_and_nothing_else(model):
    example = example_of(model, TURNS)
    texts = trained_texts(model.tokenizer, example["labels"])
    assert texts == ["hello world<|im_end|>", "<|im_end|>", "hello<|im_end|>"]
    ids = example["prompt_ids"] + example["target_ids"]
    for token, label in zip(ids[-len(example["labels"]) :], example["labels"], strict=True):
        assert label == IGNORE or (token == label and token >= 0)  # no speech embedding
    assert example["labels"][0] != IGNORE  # the vocabulary projection begins with the first of them


def test_what_the_llm_reads_is_the_same_whatever_is_trained(model):
    every, last = example_of(model, TURNS), example_of(model, TURNS, "last")
    text = [model.tokenizer.decode([t for t in e["prompt_ids"] if t >= 0]) for e in (every, last)]
    assert text[0] == text[1] and every["target_ids"] == last["target_ids"] == last["labels"]
    assert every["prompt_ids"].count(SPEECH) == last["prompt_ids"].count(SPEECH)
    assert trained_texts(model.tokenizer, last["labels"]) == ["hello<|im_end|>"]


@pytest.mark.parametrize("llm", LLMS)
def test_an_earlier_answer_is_trained_by_every_familys_template(llm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(LLMS[llm](tmp_path))
    tokenizer.chat_template = PLAIN_TEMPLATE
    turns = [{"role": "user", "content": "Hear <audio>"}, {"role": "assistant", "content": "hello world"}]
    ids, labels = with_labels(
        [*turns, {"role": "user", "content": "More"}], [[SPEECH]], tokenizer, render_prompt, AUDIO, IGNORE
    )
    _, end_id = render_prompt(tokenizer, "<audio>")
    trained = [label for label in labels if label != IGNORE]
    assert trained == [*tokenizer("hello world", add_special_tokens=False).input_ids, end_id]
    assert ids[-len(labels) :][: len(trained)] == trained and ids.count(SPEECH) == 1


def test_of_a_conversation_of_one_turn_both_train_the_same(model):
    turns = [ask("<audio> What?", noise(0.9, 7)), ANSWER]
    every, last = example_of(model, turns), example_of(model, turns, "last")
    assert all(every[key] == last[key] for key in ("prompt_ids", "target_ids", "labels"))
    record = {"wav": noise(0.9, 7), "txt": "hello"}  # and of a line that is no conversation
    lines = [model.make_dataset([record], train_on_turns=which)[0] for which in ("all", "last")]
    assert lines[0]["labels"] == lines[1]["labels"] and lines[0]["prompt_ids"] == lines[1]["prompt_ids"]


def test_the_loss_is_the_sum_over_the_answers_given_what_comes_before_each(model):
    """As if each answer were the last of a conversation of its own."""
    sums = []
    for count in (3, 5, 7):
        batch = collate([example_of(model, TURNS[:count], "last")])
        sums.append(model(**batch, num_items_in_batch=1).loss.item())
    batch = collate([example_of(model, TURNS)])
    assert model(**batch, num_items_in_batch=1).loss.item() == pytest.approx(sum(sums), rel=1e-4)
    other = example_of(model, [ask("<audio>", noise(2.0, 7)), ANSWER])  # padding beside it changes nothing
    alone = model(**collate([other]), num_items_in_batch=1).loss.item()
    both = model(**collate([example_of(model, TURNS), other]), num_items_in_batch=1).loss.item()
    assert both == pytest.approx(sum(sums) + alone, rel=1e-4)


def test_an_answer_that_holds_a_clip_is_not_trained(model):
    turns = [
        ask("<audio>", noise(0.5)),
        {**ANSWER, "content": "heard <audio>", "audio": [noise(0.6)]},
        ask("so?"),
        ANSWER,
    ]
    example = example_of(model, turns)
    assert trained_texts(model.tokenizer, example["labels"]) == ["hello<|im_end|>"]


def test_where_the_template_places_the_audio_all_answers_cannot_be_trained(model):
    tokenizer = make_tokenizer("{% for m in messages %}{{ '<audio>' if m.role == 'user' }}{{ m.content }}{% endfor %}")
    turns = [ask("", noise(0.5)), ANSWER, ask("", noise(0.5)), ANSWER]
    dataset = replace(model.make_dataset([{"messages": turns}], train_on_turns="all"), tokenizer=tokenizer)
    with pytest.raises(BadUtterance, match="places <audio> or leaves turns out; wanted --train_on_turns last"):
        dataset[0]
    assert replace(dataset, train_on_turns="last")[0]["target_ids"]


def test_text_alone_is_trained_beside_audio_with_a_budget_a_cache_and_an_evaluation(world, call, tmp_path):
    rows = [{"messages": [ask("Who are you?"), {**ANSWER, "content": "nobody " * n}]} for n in range(1, 7)]
    rows += [{"wav": str(world / f"clip{n}.wav"), "txt": "hello"} for n in range(6)]
    path = write_manifest(tmp_path / "train.jsonl", rows)
    flags = f"{TRAIN_FLAGS} --llm_model_name_or_path llm --data_path {path} --num_train_epochs 2 --lora_r 2"
    flags += f" --eval_data_path {path} --max_batch_seconds 8 --encoder_cache {tmp_path}/frames --seed 1"
    checked = call(train.main, f"{flags} --output_dir {tmp_path}/run --check 3").out
    assert "nothing wrong found" in checked
    out = call(train.main, f"{flags} --output_dir {tmp_path}/run").out
    assert int(re.search(r"batches of \d+ to (\d+) clips", out)[1]) <= 4  # text alone has the 2 s of its silence
    assert "evaluation: loss" in out
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_a_run_trains_all_answers_and_every_look_at_it_works(world, call, tmp_path):
    rows = []
    for number in range(4):
        clips = [str(world / f"clip{number + 1 + n}.wav") for n in range(2)]
        rows.append(
            {"messages": [ask("<audio>", clips[0]), ANSWER, ask("<audio>", clips[1]), {**ANSWER, "content": "world"}]}
        )
    path = write_manifest(tmp_path / "train.jsonl", rows)
    flags = f"{TRAIN_FLAGS} --llm_model_name_or_path llm --data_path {path} --output_dir {tmp_path}/run --max_steps 2"
    flags += " --per_device_train_batch_size 4 --train_on_turns all"
    checked = call(train.main, f"{flags} --check").out
    assert "nothing wrong found" in checked and checked.count(", 5 trained") == 4
    assert "characters a second" not in checked  # an answer is not read out of the audio
    screen = call(train.main, f"{flags} --eval_data_path {path} --log_predictions 1 --log_predictions_steps 1")
    assert re.search(r"reference .* world +\(2 tokens\)", screen.out) and "evaluation: loss" in screen.out
    assert "train_on_turns was 'all' and is 'last'" in error_of(call, f"{flags} --train_on_turns last")
