"""Files from strangers: no path executes a pickle, or code that lies beside weights, and none writes where it likes."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_FLAGS, write_manifest
from families import ENCODERS

import recognize
import train
from errors import InputError
from model import SpeechLLM, load_encoder, load_llm

TRAIN = f"{TRAIN_FLAGS} --data_path corpus.jsonl --per_device_train_batch_size 2 --save_steps 1"
CODE = "open('burnt', 'w')\n"  # of a module that lies beside weights


class Payload:
    """Whoever unpickles it makes a file with the name `burnt`."""

    def __reduce__(self):
        return open, ("burnt", "w")


def as_torch_file(path: Path) -> None:
    torch.save({"dims": Payload(), "model_state_dict": Payload(), "step": Payload()}, path)


def as_old_torch_file(path: Path) -> None:
    torch.save({"state": Payload()}, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


PICKLES = pytest.mark.parametrize("write", [as_torch_file, as_old_torch_file, as_pickle])


@pytest.fixture
def burnt(tmp_path, monkeypatch) -> Callable[[], bool]:
    """Whether a payload was executed, in the present folder."""
    monkeypatch.chdir(tmp_path)
    return lambda: (tmp_path / "burnt").exists()


@pytest.fixture
def burnt_by_call(world) -> Callable[[], bool]:
    """Whether a payload was executed in the folder where `call` runs commands."""
    return lambda: (world / "burnt").exists()


@pytest.fixture
def llm(world, tmp_path) -> Path:
    """A copy of an LLM's folder, to spoil."""
    return shutil.copytree(world / "llm", tmp_path / "llm")


def edit(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def error_of(call: Callable, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Pickles


@PICKLES
def test_the_payload_burns_where_a_pickle_is_executed(write, burnt, tmp_path):
    write(tmp_path / "a.pt")
    with open(tmp_path / "a.pt", "rb") as file:
        torch.load(file, weights_only=False) if write != as_pickle else pickle.load(file)
    assert burnt()


@PICKLES
def test_a_pickle_as_an_openai_whisper_is_refused(write, burnt, tmp_path):
    write(tmp_path / "a.pt")
    assert error_of(load_encoder, str(tmp_path / "a.pt")).startswith(f"{tmp_path}/a.pt: cannot load a speech encoder")
    assert not burnt()


@PICKLES
def test_a_pickle_as_trained_weights_is_refused(write, burnt, trained, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    write(tmp_path / "model.safetensors")
    assert "cannot read the trained weights" in error_of(SpeechLLM.from_pretrained, tmp_path)
    assert not burnt()


@PICKLES
def test_a_pickle_as_an_llm_is_refused(write, burnt, model, llm):
    (llm / "model.safetensors").unlink()
    write(llm / "pytorch_model.bin")
    config = type(model.config)(encoder_name_or_path="tiny", llm_model_name_or_path=str(llm))
    assert error_of(load_llm, config).startswith(f"{llm}: cannot load the LLM")
    assert not burnt()


@PICKLES
@pytest.mark.parametrize("encoder", ["whisper_hf", "wav2vec2_base", "parakeet"])
def test_a_pickle_as_an_encoder_is_refused(write, encoder, burnt, tmp_path):
    folder = ENCODERS[encoder](tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin")
    assert error_of(load_encoder, str(folder)).startswith(f"{folder}: cannot load a speech encoder")
    assert not burnt()


@pytest.fixture(scope="module")
def stopped(world, chinese_llm, call) -> Path:
    """The output folder of a run of two steps."""
    call(train.main, f"{TRAIN} --max_steps 2 --output_dir stopped")
    return world / "stopped"


def test_a_checkpoint_cannot_lead_deepspeed_to_files_elsewhere(stopped, call, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run") / "checkpoint-2/latest"
    path.write_text("../../elsewhere")
    found = error_of(call, train.main, f"{TRAIN} --max_steps 3 --output_dir {tmp_path}/run")
    assert found == f"{path}: names another folder; wanted global_step and a number"


@PICKLES
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "global_step2/a/b.pt"])
def test_a_pickle_in_a_checkpoint_is_refused_by_the_run_that_would_go_on_from_it(
    write, name, stopped, burnt_by_call, call, tmp_path
):
    """DeepSpeed, whose states lie in global_step*, would run it."""
    path = shutil.copytree(stopped, tmp_path / "run") / "checkpoint-2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    told = error_of(call, train.main, f"{TRAIN} --max_steps 3 --output_dir {tmp_path}/run")
    assert told.startswith(f"{path}: names io.open" if write == as_torch_file else f"{path}: cannot read it")
    assert not burnt_by_call()


def test_pickles_that_nothing_needs_are_not_read(stopped, burnt_by_call, call, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "scheduler.bin"):
        as_torch_file(folder / "checkpoint-2" / name)
    call(train.main, f"{TRAIN} --max_steps 3 --output_dir {folder}")
    assert not burnt_by_call()


# Code beside weights

MODEL_CODE = {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoModel": "code.M"}}


def test_code_beside_an_llm_of_a_known_kind_is_left_alone(burnt, model, llm):
    (llm / "code.py").write_text(CODE)
    edit(llm / "config.json", **MODEL_CODE)
    edit(llm / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    load_llm(type(model.config)(encoder_name_or_path="tiny", llm_model_name_or_path=str(llm)))
    assert not burnt()


def test_an_llm_that_needs_its_own_code_is_refused_and_nobody_is_asked(burnt, model, llm, capsys):
    (llm / "code.py").write_text(CODE)
    edit(llm / "config.json", model_type="unheard_of", **MODEL_CODE)
    config = type(model.config)(encoder_name_or_path="tiny", llm_model_name_or_path=str(llm))
    assert "trust_remote_code" in error_of(load_llm, config)
    assert "[y/N]" not in capsys.readouterr().out
    assert not burnt()


def test_an_encoder_that_needs_its_own_code_is_refused_and_nobody_is_asked(burnt, tmp_path, capsys):
    folder = ENCODERS["wav2vec2_base"](tmp_path / "encoder")
    (folder / "code.py").write_text(CODE)
    edit(folder / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": "code.F"}, feature_extractor_type="F")
    assert error_of(load_encoder, str(folder)).startswith(f"{folder}: cannot load a speech encoder")
    edit(folder / "config.json", model_type="unheard_of", **MODEL_CODE)
    assert error_of(load_encoder, str(folder)).startswith(f"{folder}: cannot load a speech encoder")
    assert "[y/N]" not in capsys.readouterr().out
    assert not burnt()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projector", "os.system"),
        ("projector", "__class__"),
        ("projector_activation", "os.system"),
        ("encoder_name_or_path", "os.system:touch burnt"),
        ("chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }} <audio>"),
        ("chat_template", "{{ cycler.__init__.__globals__.os.system('touch burnt') }} <audio>"),
        ("auto_map", {"AutoModel": "code.M"}),
    ],
)
def test_the_config_of_a_checkpoint_names_no_code(field, value, burnt, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    edit(tmp_path / "config.json", **{field: value})
    error_of(SpeechLLM.from_pretrained, tmp_path)
    assert not burnt()


# Places


def test_a_manifest_cannot_make_decoding_write_anywhere_but_into_its_result(trained, world, call, tmp_path):
    rows = [
        {"wav": str(world / "clip0.wav"), "key": "../up", "txt": "a"},
        {"wav": str(tmp_path / "new.wav"), "key": str(tmp_path / "absolute"), "txt": "b"},
        {"wav": str(world / "clip0.wav"), "where": "../where", "folder": str(tmp_path), "txt": "c", "start": 0.1},
        {"wav": "| touch burnt", "txt": "d"},
        {"wav": "file:///dev/null;touch burnt", "txt": "e"},
    ]
    (tmp_path / "in/side").mkdir(parents=True)
    manifest = write_manifest(tmp_path / "in/side/m.jsonl", rows)
    before = {path for folder in (tmp_path, world) for path in folder.rglob("*")}
    flags = f"--model_path trained --data_path {manifest} --num_workers 0 --num_beams 1 --max_new_tokens 2"
    call(recognize.main, f"{flags} --result_path {tmp_path}/in/side/r.jsonl")
    after = {path for folder in (tmp_path, world) for path in folder.rglob("*")}
    assert after - before == {tmp_path / "in/side/r.jsonl"}
