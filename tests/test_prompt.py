"""Prompts of any LLM: templates of its own, a plain one, one from a file; the system's turn; no thoughts."""

import json

import pytest
from families import LLMS
from prompt import AUDIO, conversation, render_prompt, set_chat_template
from transformers import AutoTokenizer

from manifest import InputError
from model import SpeechLLM


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("llms")
    return {name: str(build(folder / name)) for name, build in LLMS.items()}


def text_around(tokenizer, prompt: str = f"{AUDIO}\nWrite", system: str | None = None) -> list[str]:
    pieces, _ = render_prompt(tokenizer, json.dumps(conversation(prompt, system)))
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("llm", LLMS)
def test_the_end_token_is_what_the_template_puts_after_an_answer(llms, llm):
    tokenizer = AutoTokenizer.from_pretrained(llms[llm])
    if tokenizer.chat_template is None:
        with pytest.warns(UserWarning, match="no chat template; taking a plain one"):
            set_chat_template(tokenizer, None)
    asked = conversation(f"{AUDIO}\nWrite")
    _, end_id = render_prompt(tokenizer, json.dumps(asked))
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert whole.rpartition("yes")[2].lstrip().startswith(tokenizer.decode([end_id]))


def test_thinking_models_are_told_not_to_think(llms):
    _, after = text_around(AutoTokenizer.from_pretrained(llms["qwen3"]))
    assert after.endswith("<think>\n\n</think>\n\n")


def test_a_base_llm_gets_a_plain_template_and_a_warning(llms, world):
    with pytest.warns(UserWarning, match="gpt2: no chat template; taking a plain one, 'user: ...'"):
        model = SpeechLLM.from_parts(str(world / "whisper.pt"), llms["gpt2"], projector_hidden_size=64)
    assert text_around(model.tokenizer) == ["user: ", "\nWrite\nassistant: "]
    assert model.config.chat_template is None  # it comes again with the LLM


def test_a_template_from_a_file_replaces_the_llms_own_and_is_kept_in_the_config(llms, world, tmp_path):
    path, text = tmp_path / "mine.jinja", "Say: {{ messages[-1].content }}|{{ messages[-1].role }}|"
    path.write_text(text)
    model = SpeechLLM.from_parts(
        str(world / "whisper.pt"), llms["qwen2"], chat_template=str(path), projector_hidden_size=64
    )
    assert text_around(model.tokenizer) == ["Say: ", "\nWrite|user|"]
    path.unlink()
    model.save_pretrained(tmp_path / "run")
    assert SpeechLLM.from_pretrained(tmp_path / "run").tokenizer.chat_template == text


def test_a_template_may_place_the_audio_itself(llms, world, tmp_path):
    (tmp_path / "mine.jinja").write_text(f"Speech: {AUDIO} Text:")
    options = {"chat_template": str(tmp_path / "mine.jinja"), "prompt": "whatever", "projector_hidden_size": 64}
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], **options)
    assert text_around(model.tokenizer) == ["Speech: ", " Text:"]
    _, end_id = render_prompt(model.tokenizer, json.dumps(conversation("whatever")))
    assert end_id == model.tokenizer.eos_token_id  # the template shows no answer, and so no end of one

    model.save_pretrained(tmp_path / "run")
    assert text_around(SpeechLLM.from_pretrained(tmp_path / "run").tokenizer) == ["Speech: ", " Text:"]


def test_a_template_given_to_the_tokenizer_later_counts_from_then_on(llms, world):
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], projector_hidden_size=64)
    before = text_around(model.tokenizer)
    model.tokenizer.chat_template = "Say: {{ messages[-1].content }}|"
    assert text_around(model.tokenizer) == ["Say: ", "\nWrite|"] != before


@pytest.mark.parametrize("name", ["nowhere.jinja", "nowhere.txt"])
def test_a_template_that_is_missing_is_one_line(world, llms, name):
    with pytest.raises(InputError, match=f"--chat_template {name}: no such file"):
        SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], chat_template=name)


def test_a_template_without_a_place_for_the_speech_is_told(world, llms, tmp_path):
    (tmp_path / "mine.txt").write_text("{{ messages[0].role }}")
    with pytest.raises(InputError, match="wanted <audio> in it or in --chat_template, once"):
        SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], chat_template=str(tmp_path / "mine.txt"))


def test_a_system_prompt_comes_first(llms, world):
    options = {"system_prompt": "You hear well.", "projector_hidden_size": 64}
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], **options)
    example = model.make_dataset([{"where": "a", "wav": [0.1] * 16000, "txt": "hello"}])[0]
    ids = [i for i in example["prompt_ids"] if i >= 0]
    assert model.tokenizer.decode(ids).startswith("<|im_start|>system\nYou hear well.<|im_end|>\n<|im_start|>user\n")


def test_a_system_prompt_that_the_llm_does_not_know_is_refused_before_anything_is_trained(llms, world):
    with pytest.raises(InputError, match="the chat template refuses the conversation"):
        SpeechLLM.from_parts(str(world / "whisper.pt"), llms["mistral"], system_prompt="You hear well.")


@pytest.mark.parametrize("prompt", ["no place for the speech", f"{AUDIO} and {AUDIO}"])
def test_a_prompt_needs_one_place_for_the_speech(llms, world, prompt):
    with pytest.raises(InputError, match="wanted <audio> in it, once"):
        SpeechLLM.from_parts(str(world / "whisper.pt"), llms["qwen2"], prompt=prompt)
