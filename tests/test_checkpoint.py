"""What checkpoint.py promises: a model comes back from its folder and from the Hub, whole or not at all."""

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint import load_config
from config import SpeechLLMConfig
from conftest import CHATML, ROOT, make_llm, make_whisper
from fake_hub import FakeHub
from families import ENCODERS, LLMS
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from safetensors.torch import load_file, save_file
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from dataset import collate
from manifest import InputError
from model import SpeechLLM

OURS = ["README.md", "config.json", "model.safetensors"]
TOKEN = "hf_of_a_test"
pytestmark = pytest.mark.filterwarnings("ignore:audio .* no end within")  # random weights go on and on


def build(encoder: Path, llm: Path, **fields) -> SpeechLLM:
    """A model whose trained weights are unlike those that any other has, or that a new one starts with."""
    model = SpeechLLM.from_parts(str(encoder), str(llm), **{"projector_hidden_size": 64} | fields)
    change(model)
    return model


def change(model) -> None:
    torch.seed()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)


def parts(folder: Path, encoder: str = "whisper_openai", llm: str = "qwen2") -> tuple[Path, Path]:
    return ENCODERS[encoder](folder / "an encoder"), LLMS[llm](folder / "an LLM")


def in_bf16(llm: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).save_pretrained(llm)
    return llm


def texts(model, world: Path) -> list[str]:
    clips = [str(world / f"clip{number}.wav") for number in (1, 2, 3)]
    found = model.transcribe(clips, num_beams=1, max_new_tokens=10)
    assert len(set(found)) > 1, f"the same text for every clip: {found}"
    return found


def assert_same(loaded, model, world: Path | None = None) -> None:
    """The same weights to the last bit, and with `world` the same texts."""
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not found[n].equal(wanted[n])] == []
    if world:
        assert texts(loaded, world) == texts(model, world)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A folder


def test_a_folder_holds_the_trained_weights_alone_a_config_and_a_card(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "run")
    assert sorted(contents(tmp_path / "new" / "run")) == OURS
    found = load_file(tmp_path / "new" / "run" / "model.safetensors")
    assert found.keys() == {f"projector.{name}" for name in model.projector.state_dict()}


VARIANTS = {
    "as it comes": {},
    "LoRA on the LLM": {"lora_r": 4},
    "LoRA on all layers": {"lora_r": 2, "encoder_lora_r": 3, "lora_target_modules": ["all-linear"]},
    "vectors around a clip": {"audio_boundary_tokens": True},
    "a template of its own": {"chat_template": CHATML.replace("user", "human"), "system_prompt": "Zwölf | Wörter"},
    "a layer in the middle": {"encoder_layer": 2},
    "an encoder that is trained": {"freeze_params": [r"^llm\."]},
}


@pytest.mark.parametrize("include_frozen", [False, True])
def test_others_may_read_what_the_umask_lets_them(model, tmp_path, include_frozen):
    model.save_pretrained(tmp_path / "run", include_frozen=include_frozen)
    (tmp_path / "usual").touch()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "usual").stat().st_mode}


@pytest.mark.parametrize("include_frozen", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_to_the_bit(world, tmp_path, variant, include_frozen):
    model = build(*parts(tmp_path), **VARIANTS[variant])
    model.save_pretrained(tmp_path / "run", include_frozen=include_frozen)
    if include_frozen:
        shutil.rmtree(tmp_path / "an encoder")
        shutil.rmtree(tmp_path / "an LLM")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert_same(loaded, model, world)
    for name in SpeechLLMConfig.__annotations__:
        if not include_frozen or not name.endswith("name_or_path"):
            assert getattr(loaded.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("encoder", ["whisper_openai", "whisper_hf", "wav2vec2_large", "wavlm_base", "parakeet"])
def test_an_export_needs_nothing_else_wherever_it_is_moved(world, tmp_path, monkeypatch, encoder):
    (tmp_path / "here").mkdir()
    model = build(*parts(tmp_path / "here", encoder), encoder_lora_r=2, encoder_layer=2)
    wanted = texts(model, world)
    model.save_pretrained(tmp_path / "here" / "run", include_frozen=True)
    shutil.move(tmp_path / "here" / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "some" / "where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "some" / "where")
    for path in (tmp_path / "moved", Path("../../moved")):
        loaded = SpeechLLM.from_pretrained(path)
        assert_same(loaded, model)
        assert texts(loaded, world) == wanted
    loaded.save_pretrained(tmp_path / "trained further")  # found from any folder, though loaded by a relative path
    monkeypatch.chdir(tmp_path)
    assert_same(SpeechLLM.from_pretrained("trained further"), model)


def test_the_frozen_parts_of_an_export_are_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, include_frozen=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), model.llm)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    assert extractor.to_dict() == model.feature_extractor.to_dict()


def test_a_config_can_be_read_alone_as_any_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = SpeechLLMConfig.from_pretrained(tmp_path)
    assert all(getattr(config, name) == getattr(model.config, name) for name in SpeechLLMConfig.__annotations__)


def test_an_export_can_be_written_over_the_one_that_the_model_came_from(world, tmp_path):
    build(*parts(tmp_path)).save_pretrained(tmp_path / "run", include_frozen=True)
    model = SpeechLLM.from_pretrained(tmp_path / "run")  # its weights are pages of the files
    change(model)
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    assert_same(SpeechLLM.from_pretrained(tmp_path / "run"), model, world)


def test_merged_lora_is_saved_with_the_weights_that_it_went_into_or_not_at_all(world, tmp_path):
    model = build(*parts(tmp_path), lora_r=4, encoder_lora_r=2)
    model.save_pretrained(tmp_path / "run")
    before = contents(tmp_path / "run")
    model.merge_lora()
    with pytest.raises(InputError, match=r"^LoRA was merged .*include_frozen=True$"):
        model.save_pretrained(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert loaded.config.lora_r == loaded.config.encoder_lora_r == 0
    assert not any("lora" in name for name in loaded.state_dict())
    assert_same(loaded, model, world)


@pytest.mark.parametrize("prepare", [Path, in_bf16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("llm", ["qwen2", "gemma"])  # tied to the embeddings, not tied
def test_a_vocabulary_projection_that_was_trained_is_kept_and_goes_on_being_kept(world, tmp_path, llm, prepare):
    encoder, llm = parts(tmp_path, llm=llm)
    model = build(encoder, prepare(llm))
    model.freeze_llm_except_lm_head()
    change(model)
    model.save_pretrained(tmp_path / "run")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert_same(loaded, model, world)
    model.freeze_llm()
    for number, frozen in enumerate((model, loaded)):
        frozen.save_pretrained(tmp_path / f"run{number}")
        assert_same(SpeechLLM.from_pretrained(tmp_path / f"run{number}"), model)
    model.save_pretrained(tmp_path / "whole", include_frozen=True)
    assert_same(SpeechLLM.from_pretrained(tmp_path / "whole").llm, model.llm)


# A save that fails


@contextmanager
def files_end_at(size: int):
    """No file can grow past `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("include_frozen", "size"), [(False, 500), (False, 20_000), (True, 500), (True, 60_000)])
def test_a_save_that_fails_leaves_the_old_files_whole_and_no_others(world, tmp_path, include_frozen, size):
    model = build(world / "whisper.pt", world / "llm")
    model.save_pretrained(tmp_path, include_frozen=include_frozen)
    before = contents(tmp_path)
    assert max(map(len, before.values())) > size
    change(model)
    with files_end_at(size), pytest.raises(Exception, match="File too large"):
        model.save_pretrained(tmp_path, include_frozen=include_frozen)
    assert contents(tmp_path) == before


def test_what_a_kill_left_of_a_save_does_no_harm(model, tmp_path):
    (tmp_path / "model.partial" / "llm").mkdir(parents=True)
    (tmp_path / "model.partial" / "llm" / "model.safetensors").write_bytes(b"torn")
    model.save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == OURS


# Files that are wrong


def of_another_model(folder: Path) -> None:
    make_whisper(folder / "wide.pt", width=64)
    config = SpeechLLMConfig.from_pretrained(folder)
    build(folder / "wide.pt", Path(config.llm_model_name_or_path)).save_pretrained(folder / "wide")
    (folder / "wide" / "model.safetensors").replace(folder / "model.safetensors")


def of_no_size(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: torch.empty(0) for name in state}, folder / "model.safetensors")


def torn(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def config_with(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))

    return spoil


def latin_1(folder: Path) -> None:
    (folder / "config.json").write_bytes('{"prompt": "hör zu"}'.encode("latin-1"))


@pytest.mark.parametrize(
    ("spoil", "file", "told"),
    [
        (of_another_model, "model.safetensors", r"does not fit encoder width 32.* is \(64, 64, 5\), wanted \(32, 32"),
        (of_no_size, "model.safetensors", r"tensors of size 0, which ZeRO-3 leaves .* projector\.\S+ is \(0,\)"),
        (torn, "model.safetensors", "cannot read the trained weights"),
        (gone, "model.safetensors", "cannot read the trained weights .*No such file"),
        (config_with("projector_stride", "projector_strid"), "config.json", "'projector_strid'.* projector_stride"),
        (config_with("speech_llm", "whisper"), "config.json", "another kind of model; wanted a folder that"),
        (config_with('"prompt":', '"prompt"'), "config.json", "Expecting ':' delimiter: line"),
        (latin_1, "config.json", "can't decode byte 0xf6"),
    ],
)
def test_a_file_that_is_wrong_is_named_in_one_line_with_the_reason(model, tmp_path, spoil, file, told):
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / file))}: .*{told}") as error:
        SpeechLLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_field_of_from_pretrained_that_does_not_exist_is_not_blamed_on_the_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^config: unknown field 'promt'; did you mean prompt\?$"):
        SpeechLLM.from_pretrained(tmp_path, promt="<audio> Write it down.")


# The Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub of our own, to which this process is online."""
    hub, cache = FakeHub(), tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache)}.items():
            patch.setattr(constants, name, value)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hf_api.api, "endpoint", hub.url)
        yield hub
    hub.shutdown()
    hub.server_close()


def upload(folder: Path, name: str, revision: str | None = None) -> str:
    """A folder onto the Hub, as its own tools do; the commit."""
    api = HfApi(token=TOKEN)
    api.create_repo(name, exist_ok=True)
    if revision:
        api.create_branch(name, branch=revision, exist_ok=True)
    return api.upload_folder(repo_id=name, folder_path=folder, revision=revision).oid


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def pushed(hub, world, tmp_path_factory) -> dict[str | None, dict]:
    """user/asr, pushed to main and to the branches v1 and v2: revision -> trained weights."""
    model, weights = build(world / "whisper.pt", world / "llm"), {}
    for revision in (None, "v1", "v2"):
        change(model)
        url = model.push_to_hub("user/asr", revision=revision, token=TOKEN, private=True, commit_message="Better")
        commit = hub.refs["user/asr"][revision or "main"]
        assert url == f"{hub.url}/user/asr/commit/{commit}"
        weights[revision] = weights[commit] = {name: p.clone() for name, p in model.saved().items()}
    hub.refs["user/asr"]["a-tag"] = hub.refs["user/asr"]["v1"]
    weights["a-tag"] = weights["v1"]
    return weights


def test_each_revision_on_the_hub_has_its_own_weights(hub, pushed):
    assert hub.visibility["user/asr"] == "private"
    assert sorted(hub.files[hub.refs["user/asr"]["main"]]) == [".gitattributes", *OURS]
    for revision, weights in pushed.items():
        found = SpeechLLM.from_pretrained("user/asr", revision=revision).saved()
        assert all(found[name].equal(weights[name]) for name in weights | found), revision


def test_what_was_downloaded_once_is_there_offline(hub, pushed, monkeypatch):
    SpeechLLM.from_pretrained("user/asr", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = SpeechLLM.from_pretrained("user/asr", revision="v1").saved()
    assert all(found[name].equal(p) for name, p in pushed["v1"].items())
    with pytest.raises(
        InputError, match=r"user/never-seen: no such folder, nor a model on the Hub \(.*HF_HUB_OFFLINE=0"
    ):
        SpeechLLM.from_pretrained("user/never-seen")


def test_no_more_than_a_model_is_downloaded(hub, pushed, world):
    hub.commit("user/asr", "v2", {"optimizer.pt": bytes(1000), "checkpoint-5/model.safetensors": bytes(1000)})
    SpeechLLM.from_pretrained("user/asr", revision="v2")
    (folder,) = Path(constants.HF_HUB_CACHE).glob(f"models--user--asr/snapshots/{hub.refs['user/asr']['v2']}")
    assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "model.safetensors"]


def test_an_export_on_the_hub_needs_nothing_else(hub, world, tmp_path):
    model = build(*parts(tmp_path, "wav2vec2_base"))
    model.push_to_hub("user/whole", include_frozen=True, token=TOKEN)
    shutil.rmtree(tmp_path)
    assert_same(SpeechLLM.from_pretrained("user/whole"), model, world)


def test_encoder_and_llm_are_those_of_the_revisions_asked_for(hub, world, tmp_path):
    commits = {}
    for revision in ("v1", None):
        encoder, llm = ENCODERS["whisper_hf"](tmp_path / "encoder"), LLMS["qwen3"](tmp_path / "llm")
        torch.seed()
        for folder in (encoder, llm):
            path = folder / "model.safetensors"
            save_file({n: w + 0.1 * torch.randn_like(w) for n, w in load_file(path).items()}, path, {"format": "pt"})
            commits[folder.name, revision] = upload(folder, f"user/{folder.name}", revision)
            shutil.copytree(folder, tmp_path / f"{folder.name}-{revision}")
    asked = {"encoder_revision": "v1", "llm_revision": commits["llm", "v1"]}
    model = build("user/encoder", "user/llm", **asked)
    same = build(tmp_path / "encoder-v1", tmp_path / "llm-v1")
    latest = build(tmp_path / "encoder-None", tmp_path / "llm-None")
    for part in ("encoder", "llm"):
        assert_same(getattr(model, part), getattr(same, part))
        with pytest.raises(AssertionError):
            assert_same(getattr(model, part), getattr(latest, part))
    model.save_pretrained(tmp_path / "run")
    assert_same(SpeechLLM.from_pretrained(tmp_path / "run"), model, world)
    newest = SpeechLLM.from_pretrained(tmp_path / "run", encoder_revision=None, llm_revision=None)
    assert_same(newest.llm, latest.llm)
    assert_same(newest.encoder, latest.encoder)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == ["user/encoder", "user/llm"]
    assert f"| encoder | user/encoder, {commits['encoder', 'v1']} |" in card.text  # the branch may go on
    assert f"| LLM | user/llm, {asked['llm_revision']} |" in card.text


def test_a_checkpoint_stays_with_the_commits_that_it_was_trained_on(hub, world, tmp_path):
    first = upload(LLMS["qwen2"](tmp_path / "llm"), "user/moving")
    model = build(ENCODERS["whisper_openai"](tmp_path / "whisper"), "user/moving")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    assert upload(tmp_path / "llm", "user/moving") != first
    model.save_pretrained(tmp_path / "run")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert loaded.config.llm_revision == first
    assert_same(loaded, model, world)


def test_recognize_takes_a_hub_name_and_a_revision(hub, pushed, world, tmp_path):
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
    flags = f"--model_path user/asr --revision v1 --max_new_tokens 10 {world / 'clip1.wav'}"
    command = [sys.executable, str(ROOT / "recognize.py"), *flags.split()]
    job = subprocess.run(command, env=os.environ | told, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    model = SpeechLLM.from_pretrained("user/asr", revision="v1")
    assert job.returncode == 0, job.stderr
    assert job.stdout.strip() == model.transcribe(str(world / "clip1.wav"), max_new_tokens=10)


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        ("user/nobody", None, r"user/nobody: no such folder, nor a model on the Hub \(.*Repository Not Found"),
        ("/no/such/folder", None, "/no/such/folder: no such folder, nor a model on the Hub"),
        ("user/asr", "v9", "user/asr: no revision v9; wanted a branch, tag or commit$"),
        (str(ROOT), "v1", "revision v1 of local files; wanted none, or a Hub name$"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_in_one_line(hub, pushed, name, revision, told):
    with pytest.raises(InputError, match=told) as error:
        SpeechLLM.from_pretrained(name, revision=revision)
    assert "\n" not in str(error.value)


def test_training_pushes_its_checkpoints_and_last_weights(hub, world, tmp_path):
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
    flags = "--llm_model_name_or_path llm --encoder_name_or_path whisper.pt --data_path corpus.jsonl --use_cpu"
    flags += " --max_steps 2 --save_steps 1 --report_to none"
    flags += f" --output_dir {tmp_path}/run --push_to_hub --hub_model_id user/trained --hub_token {TOKEN}"
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--hub_always_push", "True"]
    job = subprocess.run(command, env=os.environ | told, cwd=world, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    wanted = load_file(tmp_path / "run" / "model.safetensors")
    found = SpeechLLM.from_pretrained("user/trained")
    assert all(found.saved()[name].equal(weight) for name, weight in wanted.items())
    assert found.config.training["steps"] == 2
    assert (
        'SpeechLLM.from_pretrained("user/trained")' in hub.files[hub.refs["user/trained"]["main"]]["README.md"].decode()
    )
    pushed = [set(hub.files[commit]) for commit in hub.refs["user/trained"].values()]
    assert {"model.safetensors", "config.json", "README.md"} <= set.union(*pushed)


def test_nothing_is_made_on_the_hub_for_a_model_that_cannot_be_saved(hub, world):
    model = build(world / "whisper.pt", world / "llm", lora_r=2)
    model.merge_lora()
    with pytest.raises(InputError, match="include_frozen=True"):
        model.push_to_hub("user/merged", token=TOKEN)
    assert "user/merged" not in hub.refs


def test_a_model_that_came_whole_is_pushed_with_the_names_that_its_parts_had(hub, world, tmp_path):
    encoder, llm = parts(tmp_path, "wav2vec2_base")
    commits = {name: upload(folder, f"user/{name}") for name, folder in (("enc", encoder), ("llm", llm))}
    build("user/enc", "user/llm").save_pretrained(tmp_path / "whole", include_frozen=True)
    model = SpeechLLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "copy")  # works where the parts are: on this machine, offline
    assert load_config(tmp_path / "copy").llm_model_name_or_path == str(tmp_path / "whole/llm")
    with warnings.catch_warnings(action="error"):
        model.push_to_hub("user/again", token=TOKEN)
    shutil.rmtree(tmp_path)
    again = SpeechLLM.from_pretrained("user/again")
    assert (again.config.encoder_name_or_path, again.config.encoder_revision) == ("user/enc", commits["enc"])
    assert_same(again, model, world)
    card = hub.files[hub.refs["user/again"]["main"]]["README.md"].decode()
    assert front_matter(card)["base_model"] == ["user/enc", "user/llm"]
    other = SpeechLLM.from_pretrained("user/again", llm_model_name_or_path=str(world / "llm"))
    with pytest.warns(UserWarning, match=f"user/third: others do not have {world / 'llm'} of this machine; push with"):
        other.push_to_hub("user/third", token=TOKEN)


def test_a_revision_of_a_local_folder_is_refused(world):
    with pytest.raises(InputError, match="llm: revision v1 of local files"):
        build(world / "whisper.pt", world / "llm", llm_revision="v1")


def test_a_plain_trainer_saves_and_loads_it(world, tmp_path):
    model = build(world / "whisper.pt", world / "llm")
    records = [{"wav": str(world / f"clip{i}.wav"), "txt": "hello"} for i in range(4)]
    options = {"save_steps": 2, "max_steps": 2, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **options)
    Trainer(model, args, data_collator=collate, train_dataset=model.make_dataset(records)).train()
    assert_same(SpeechLLM.from_pretrained(tmp_path / "checkpoint-2"), model, world)


# The model card


def test_the_card_tells_parts_data_error_rate_and_how_to_use_the_model(world, tmp_path, monkeypatch, capsys):
    model = build(world / "whisper.pt", world / "llm", lora_r=4, prompt="<audio> a | b")
    model.config.training = {"data": "train.jsonl", "hours": 960.0, "evaluation wer": 0.0213}
    model.unfreeze_encoder()
    model.save_pretrained(tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.to_dict() == {"pipeline_tag": "automatic-speech-recognition"}
    for row in (
        f"| encoder | {world / 'whisper.pt'}, default revision |",
        "| projector | conv1d, 5 frames an embedding |",
        f"| LLM | {world / 'llm'}, default revision |",
        "| adapted | LoRA of rank 4 on the LLM, weights of the encoder |",
        r'| prompt | "<audio> a \| b" |',
        "| data | train.jsonl |",
        "| WER in evaluation | 2.13% |",
    ):
        assert row in card.text.splitlines()
    (tmp_path / "a.wav").symlink_to(world / "clip1.wav")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1])
    assert capsys.readouterr().out == model.transcribe("a.wav", num_beams=4) + "\n"


def test_the_card_of_an_export_names_the_parts_that_it_was_made_of(model, world, tmp_path):
    model.save_pretrained(tmp_path, include_frozen=True)
    assert f"| LLM | {world / 'llm'}, default revision |" in (tmp_path / "README.md").read_text()


def test_a_local_folder_that_looks_like_a_hub_name_is_no_base_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.parent)
    name = f"{world.name}/llm"
    build(world / "whisper.pt", name).save_pretrained(tmp_path)
    assert "base_model" not in front_matter((tmp_path / "README.md").read_text())


def test_the_card_on_the_hub_says_how_to_get_that_very_model(hub, pushed):
    cards = [hub.files[hub.refs["user/asr"][branch]]["README.md"].decode() for branch in ("main", "v1")]
    assert 'SpeechLLM.from_pretrained("user/asr")' in cards[0]
    assert 'SpeechLLM.from_pretrained("user/asr", revision="v1")' in cards[1]


# Memory

MEASURE = """
import gc, sys
import torch, peft, whisper, transformers.models.qwen2.modeling_qwen2
from model import SpeechLLM

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

torch.set_num_threads(1)
for device in (None, "cpu"):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak()
    model = SpeechLLM.from_pretrained(sys.argv[1], device=device)
    for p in model.parameters():
        p.sum()
    print((peak() - before) / sum(p.nbytes for p in model.parameters()))
    del model, p
"""


@pytest.fixture(scope="module")
def large(world, tmp_path_factory) -> Path:
    """A model whose LLM has 300 MB of bf16 weights."""
    folder = tmp_path_factory.mktemp("large")
    llm, sizes = make_llm(folder / "llm"), {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    config = Qwen2Config(vocab_size=16000, num_attention_heads=8, num_key_value_heads=8, **sizes)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    full = empty.to_empty(device="cpu")
    for p in full.parameters():
        p.data.fill_(0.01)
    full.save_pretrained(llm)
    build(world / "whisper.pt", llm).save_pretrained(folder / "run")
    return folder / "run"


def test_loading_holds_no_second_copy_of_the_weights(large):
    """The peak of resident memory, from imports done to every weight read once, over the bytes of the weights.

    VmHWM, not anonymous memory: on a CPU the weights of the LLM stay pages of their file (and cost nothing until they
    are read, so all are read here). They count as much as a copy would, and the two together would be 2.
    """
    command = [sys.executable, "-c", MEASURE, str(large)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert job.returncode == 0, job.stderr
    for device, found in zip(("by default", "on the CPU"), job.stdout.split(), strict=True):
        print(f"peak {device}: {float(found):.3f} times the weights")
        assert 0.9 < float(found) < 1.2
