"""What errors.py promises: wrong input becomes one line and exit status 2; models load with all of their weights."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from errors import BadUtterance, InputError, as_input_error, load_pretrained, nearest, run

# run


def status_of(main, **options) -> int:
    with pytest.raises(SystemExit) as exit:
        run(main, **options)
    return exit.value.code


def raiser(error: Exception):
    def main():
        raise error

    return main


def test_wrong_input_is_one_line_on_standard_error_and_exit_status_2(capsys):
    assert status_of(raiser(InputError("a.jsonl:2: missing ['txt']"))) == 2
    assert capsys.readouterr() == ("", "error: a.jsonl:2: missing ['txt']\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadUtterance("a.jsonl:2: a.wav: no such file"), "error: a.jsonl:2: a.wav: no such file; skip it\n"),
        (InputError("a.jsonl: no such manifest"), "error: a.jsonl: no such manifest\n"),
    ],
)
def test_a_command_may_tell_the_cure_of_a_bad_utterance(capsys, error, line):
    assert status_of(raiser(error), cure="; skip it") == 2
    assert capsys.readouterr().err == line


class BadData(torch.utils.data.Dataset):
    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.error


@pytest.mark.parametrize("kind", [InputError, BadUtterance])
def test_the_traceback_of_a_loader_process_is_left_out(capsys, kind):
    loader = DataLoader(BadData(kind("a.jsonl:2: a.wav: no such file")), num_workers=1, multiprocessing_context="fork")
    assert status_of(lambda: list(loader)) == 2
    assert capsys.readouterr().err == "error: a.jsonl:2: a.wav: no such file\n"


def test_what_is_no_wrong_input_keeps_its_traceback():
    with pytest.raises(ValueError, match="a mistake of ours"):
        run(raiser(ValueError("a mistake of ours")))


def test_a_command_that_succeeds_goes_on_and_its_warnings_are_one_line(capsys):
    run(lambda: warnings.warn("the tokenizer has no template", stacklevel=1))
    assert capsys.readouterr() == ("", "warning: the tokenizer has no template\n")


def test_the_nearest_name_is_suggested_if_one_is_like_it():
    names = ["prompt", "system_prompt", "projector"]
    assert nearest("promt", names) == nearest("Prompt", names) == "; did you mean prompt?"
    assert nearest("learning_rate", names) == ""


# Models


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no such file"), "OSError: no such file"),
        (KeyError("dims"), "KeyError: 'dims'"),
        (RuntimeError("two\nlines  of text"), "RuntimeError: two lines of text"),
        (ImportError("tiktoken"), "ImportError: tiktoken"),
    ],
)
def test_what_the_libraries_raise_becomes_wrong_input(error, reason):
    with pytest.raises(InputError) as raised, as_input_error("some/name", "load the LLM", "a folder with an LLM"):
        raise error
    assert str(raised.value) == f"some/name: cannot load the LLM ({reason}); wanted a folder with an LLM"


def test_a_file_that_is_cut_off_and_a_long_reason_are_wrong_input_of_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with (
        pytest.raises(InputError, match=r"^a: cannot load b \(SafetensorError: .*\)"),
        as_input_error("a", "load b", "c"),
    ):
        load_file(path)
    with pytest.raises(InputError) as raised, as_input_error("a", "load b", "c"):
        raise ValueError("word " * 1000)
    assert len(str(raised.value)) < 700


def test_wrong_input_and_our_own_mistakes_pass_through():
    for error in (InputError("wrong"), BadUtterance("bad"), AssertionError("ours")):
        with pytest.raises(type(error)) as raised, as_input_error("a", "load b", "c"):
            raise error
        assert raised.value is error


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny causal LLM, whose output layer has weights of its own."""
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_whole_model_loads_with_the_weights_that_were_saved_and_without_a_warning(folder, recwarn):
    model = load_pretrained(Qwen2ForCausalLM, str(folder), dtype=torch.float64)
    saved = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == saved.keys() and model.dtype == torch.float64
    torch.testing.assert_close(model.get_parameter(UP).float(), saved[UP], rtol=0, atol=0)
    assert not [warning for warning in recwarn if "no place" in str(warning.message)]


def test_missing_weights_are_wrong_input_that_names_the_first_and_how_many_more(folder):
    edit_weights(folder, lambda weights: weights.pop(UP))
    with pytest.raises(InputError, match=f"^{folder}: weights that config.json promises are missing .1.: {UP} ...$"):
        load_pretrained(Qwen2ForCausalLM, str(folder))
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(InputError, match=f"are missing .2.: {UP} ...$"):
        load_pretrained(Qwen2ForCausalLM, str(folder))


def test_weights_that_may_be_missing_are_named_by_their_ends(folder):
    edit_weights(folder, lambda weights: weights.pop(UP))
    load_pretrained(Qwen2ForCausalLM, str(folder), may_lack=("up_proj.weight",))
    with pytest.raises(InputError, match="are missing"):
        load_pretrained(Qwen2ForCausalLM, str(folder), may_lack=("up_proj",))


@pytest.mark.parametrize("size", [7, 0])  # 0 is what ZeRO-3 leaves where weights are saved without being gathered
def test_weights_of_another_shape_are_wrong_input(folder, size):
    edit_weights(folder, lambda weights: weights.update({UP: weights[UP][:size].clone()}))
    with pytest.raises(InputError) as raised:
        load_pretrained(Qwen2ForCausalLM, str(folder))
    assert str(raised.value).startswith(f"{folder}: {UP} is ({size}, 8), wanted (8, 8) by its config.json")


def test_weights_without_a_place_are_told_unless_their_whole_part_is_left_out(folder, recwarn):
    load_pretrained(Qwen2Model, str(folder))  # no lm_head
    assert not [warning for warning in recwarn if "no place" in str(warning.message)]
    extra = {"model.layers.0.mlp.up_proj.bias": torch.zeros(8), "model.layers.0.mlp.gate_proj.bias": torch.zeros(8)}
    edit_weights(folder, lambda weights: weights.update(extra))
    names = r"model\.layers\.0\.mlp\.gate_proj\.bias and the like \(2\)"
    with pytest.warns(UserWarning, match=f"a Qwen2ForCausalLM has no place for {names}: left out$"):
        load_pretrained(Qwen2ForCausalLM, str(folder))


def test_the_verbosity_of_transformers_is_as_before_also_after_an_error(folder):
    from transformers.utils import logging

    before = logging.get_verbosity()
    load_pretrained(Qwen2ForCausalLM, str(folder))
    with pytest.raises(OSError):
        load_pretrained(Qwen2ForCausalLM, str(folder / "none"))
    assert logging.get_verbosity() == before
