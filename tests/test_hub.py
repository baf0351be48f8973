"""What hub.py promises: a model comes back from the Hub and from an export, whole, of the very revision asked for."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAIN_FLAGS
from fake_hub import FakeHub
from families import ENCODERS, LLMS
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from runs import assert_same, weights
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as hub_of_transformers
from trials import VARIANTS

import recognize
import train
from errors import InputError
from model import SpeechLLM, SpeechLLMConfig, load_config

EXPORT = ["README.md", "config.json", "encoder", "llm", "model.safetensors"]
TOKEN = "hf_of_a_test"
pytestmark = pytest.mark.filterwarnings("ignore:audio .* no end within")  # random weights go on and on


def build(encoder: str | Path, llm: str | Path, **fields) -> SpeechLLM:
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


def texts(model, world: Path) -> list[str]:
    clips = [str(world / f"clip{number}.wav") for number in (1, 2, 3)]
    transcripts = model.transcribe(clips, num_beams=1, max_new_tokens=10)
    assert len(set(transcripts)) > 1, f"the same text for every clip: {transcripts}"
    return transcripts


def assert_same_model(loaded, model) -> None:
    """The same weights, to the last bit."""
    assert {name: w.dtype for name, w in loaded.state_dict().items()} == {
        name: w.dtype for name, w in model.state_dict().items()
    }
    assert_same(loaded.state_dict(), model.state_dict())


# An export: include_frozen=True


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_comes_back_to_the_bit_without_the_parts_that_it_was_made_of(world, tmp_path, variant):
    model = build(*parts(tmp_path), **VARIANTS[variant])
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == EXPORT
    shutil.rmtree(tmp_path / "an encoder")
    shutil.rmtree(tmp_path / "an LLM")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert_same_model(loaded, model)
    assert texts(loaded, world) == texts(model, world)
    for name in SpeechLLMConfig.own_fields().keys() - {"encoder_name_or_path", "llm_model_name_or_path", "origin"}:
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
        assert_same_model(loaded, model)
        assert texts(loaded, world) == wanted
    loaded.save_pretrained(tmp_path / "trained further")  # found from any folder, though loaded by a relative path
    monkeypatch.chdir(tmp_path)
    assert_same_model(SpeechLLM.from_pretrained("trained further"), model)


def test_the_frozen_parts_of_an_export_are_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, include_frozen=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), model.llm)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    assert extractor.to_dict() == model.feature_extractor.to_dict()


def test_an_export_can_be_written_over_the_one_that_the_model_came_from(tmp_path):
    build(*parts(tmp_path)).save_pretrained(tmp_path / "run", include_frozen=True)
    model = SpeechLLM.from_pretrained(tmp_path / "run")  # its weights are pages of the files
    change(model)
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    assert_same_model(SpeechLLM.from_pretrained(tmp_path / "run"), model)


@pytest.mark.parametrize("llm", ["qwen2", "gemma"])  # tied to the embeddings, not tied
def test_an_export_holds_a_vocabulary_projection_that_was_trained(tmp_path, llm):
    model = build(*parts(tmp_path, llm=llm))
    model.freeze_llm_except_lm_head()
    change(model)
    model.freeze_llm()
    model.save_pretrained(tmp_path / "whole", include_frozen=True)
    assert_same_model(SpeechLLM.from_pretrained(tmp_path / "whole").llm, model.llm)


# The Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub of our own, to which this process is online."""
    hub, cache = FakeHub(), tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        for api in (hf_api.api, hub_of_transformers.hf_api()):  # both may have been made before, for another address
            patch.setattr(api, "endpoint", hub.url)
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache)}.items():
            patch.setattr(constants, name, value)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
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


def card_of(hub: FakeHub, name: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files[hub.refs[name][revision]]["README.md"].decode())


@pytest.fixture(scope="module")
def pushed(hub, world) -> dict[str | None, dict]:
    """user/asr, pushed to main and to the branch v1: revision -> trained weights."""
    model, weights_of = build(world / "whisper.pt", world / "llm"), {}
    for revision in (None, "v1"):
        change(model)
        with pytest.warns(UserWarning, match="others do not have"):
            url = model.push_to_hub("user/asr", revision=revision, token=TOKEN, private=True, commit_message="Better")
        commit = hub.refs["user/asr"][revision or "main"]
        assert url == f"{hub.url}/user/asr/commit/{commit}"
        trained = {name: p.detach().clone() for name, p in model.parameters_to_save().items()}
        weights_of[revision] = weights_of[commit] = trained
    hub.refs["user/asr"]["a-tag"] = hub.refs["user/asr"]["v1"]
    weights_of["a-tag"] = weights_of["v1"]
    return weights_of


def test_each_revision_on_the_hub_has_its_own_weights_and_a_card_that_names_it(hub, pushed):
    assert hub.visibility["user/asr"] == "private"
    files = sorted(hub.files[hub.refs["user/asr"]["main"]])
    assert files == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    for revision, trained in pushed.items():
        assert_same(SpeechLLM.from_pretrained("user/asr", revision=revision).parameters_to_save(), trained)
    assert 'SpeechLLM.from_pretrained("user/asr")' in card_of(hub, "user/asr").text
    assert 'SpeechLLM.from_pretrained("user/asr", revision="v1")' in card_of(hub, "user/asr", "v1").text


def test_what_was_downloaded_once_is_there_offline(hub, pushed, monkeypatch):
    SpeechLLM.from_pretrained("user/asr", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(SpeechLLM.from_pretrained("user/asr", revision="v1").parameters_to_save(), pushed["v1"])
    told = r"user/never-seen: no such folder, nor a model on the Hub \(.*HF_HUB_OFFLINE=0"
    with pytest.raises(InputError, match=told):
        SpeechLLM.from_pretrained("user/never-seen")


def test_no_more_than_a_model_is_downloaded(hub, pushed):
    files = {"optimizer.pt": bytes(1000), "checkpoint-5/model.safetensors": bytes(1000)}
    commit = hub.commit("user/asr", "v1", files)
    SpeechLLM.from_pretrained("user/asr", revision=commit)
    (folder,) = Path(constants.HF_HUB_CACHE).glob(f"models--user--asr/snapshots/{commit}")
    assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "model.safetensors"]


def test_an_export_on_the_hub_needs_nothing_else(hub, world, tmp_path):
    model = build(*parts(tmp_path, "wav2vec2_base"))
    model.push_to_hub("user/whole", include_frozen=True, token=TOKEN)
    shutil.rmtree(tmp_path)
    loaded = SpeechLLM.from_pretrained("user/whole")
    assert_same_model(loaded, model)
    assert texts(loaded, world) == texts(model, world)


def add_noise(folder: Path) -> None:
    torch.seed()
    path = folder / "model.safetensors"
    save_file({n: w + 0.1 * torch.randn_like(w) for n, w in load_file(path).items()}, path, {"format": "pt"})


def test_encoder_and_llm_are_those_of_the_revisions_asked_for(hub, tmp_path):
    commits = {}
    for revision in ("v1", None):
        for folder in (ENCODERS["whisper_hf"](tmp_path / "encoder"), LLMS["qwen3"](tmp_path / "llm")):
            add_noise(folder)
            commits[folder.name, revision] = upload(folder, f"user/{folder.name}", revision)
            shutil.copytree(folder, tmp_path / f"{folder.name}-{revision}")
    model = build("user/encoder", "user/llm", encoder_revision="v1", llm_revision=commits["llm", "v1"])
    same = build(tmp_path / "encoder-v1", tmp_path / "llm-v1")
    latest = build(tmp_path / "encoder-None", tmp_path / "llm-None")
    for part in ("encoder", "llm"):
        assert_same_model(getattr(model, part), getattr(same, part))
        with pytest.raises(AssertionError):
            assert_same_model(getattr(model, part), getattr(latest, part))
    model.save_pretrained(tmp_path / "run")
    assert_same_model(SpeechLLM.from_pretrained(tmp_path / "run"), model)
    newest = SpeechLLM.from_pretrained(tmp_path / "run", encoder_revision=None, llm_revision=None)
    assert_same_model(newest.llm, latest.llm)
    assert_same_model(newest.encoder, latest.encoder)
    with warnings.catch_warnings(action="error"):  # others have these parts
        model.push_to_hub("user/of-revisions", token=TOKEN)
    card = card_of(hub, "user/of-revisions")
    assert card.data.base_model == ["user/encoder", "user/llm"]
    assert f"| encoder | user/encoder, {commits['encoder', 'v1']} |" in card.text  # the branch may go on
    assert f"| LLM | user/llm, {commits['llm', 'v1']} |" in card.text


def test_a_checkpoint_stays_with_the_commits_that_it_was_trained_on(hub, world, tmp_path):
    first = upload(LLMS["qwen2"](tmp_path / "llm"), "user/moving")
    model = build(ENCODERS["whisper_openai"](tmp_path / "whisper"), "user/moving")
    add_noise(tmp_path / "llm")
    assert upload(tmp_path / "llm", "user/moving") != first
    model.save_pretrained(tmp_path / "run")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert loaded.config.llm_revision == first
    assert_same_model(loaded, model)


def test_recognize_takes_a_hub_name_and_a_revision(hub, pushed, call, world):
    screen = call(recognize.main, "--model_path user/asr --revision a-tag --max_new_tokens 10 clip1.wav")
    model = SpeechLLM.from_pretrained("user/asr", revision="a-tag")
    assert screen.out.strip() == model.transcribe(str(world / "clip1.wav"), max_new_tokens=10)


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


def test_a_revision_of_a_local_folder_is_refused(world):
    with pytest.raises(InputError, match="llm: revision v1 of local files"):
        build(world / "whisper.pt", world / "llm", llm_revision="v1")


def test_training_pushes_its_checkpoints_and_last_weights(hub, chinese_llm, call, tmp_path):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 2 --save_steps 1 --output_dir {tmp_path}"
    flags += f" --push_to_hub --hub_model_id user/trained --hub_token {TOKEN} --hub_always_push True"
    with pytest.warns(UserWarning, match="others do not have"):
        call(train.main, flags)
    loaded = SpeechLLM.from_pretrained("user/trained")
    assert_same(loaded.parameters_to_save(), weights(tmp_path))
    assert loaded.config.training["steps"] == 2
    assert 'SpeechLLM.from_pretrained("user/trained")' in card_of(hub, "user/trained").text
    commits = set(hub.refs["user/trained"].values())
    assert len([commit for commit in commits if "model.safetensors" in hub.files[commit]]) > 1
    assert not any(path.endswith("optimizer.pt") for commit in commits for path in hub.files[commit])


def test_nothing_is_made_on_the_hub_for_a_model_that_cannot_be_saved(hub, world):
    model = build(world / "whisper.pt", world / "llm", lora_r=2)
    model.merge_lora()
    with pytest.raises(InputError, match="include_frozen=True"), warnings.catch_warnings(action="ignore"):
        model.push_to_hub("user/merged", token=TOKEN)
    assert "user/merged" not in hub.refs


def test_a_model_that_came_whole_is_pushed_with_the_names_that_its_parts_had(hub, world, tmp_path):
    encoder, llm = parts(tmp_path, "wav2vec2_base")
    commits = {name: upload(folder, f"user/{name}") for name, folder in (("enc", encoder), ("llm2", llm))}
    build("user/enc", "user/llm2").save_pretrained(tmp_path / "whole", include_frozen=True)
    model = SpeechLLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "copy")  # works where the parts are: on this machine, offline
    assert load_config(tmp_path / "copy").llm_model_name_or_path == str(tmp_path / "whole/llm")
    with warnings.catch_warnings(action="error"):
        model.push_to_hub("user/again", token=TOKEN)
    shutil.rmtree(tmp_path)
    again = SpeechLLM.from_pretrained("user/again")
    assert (again.config.encoder_name_or_path, again.config.encoder_revision) == ("user/enc", commits["enc"])
    assert_same_model(again, model)
    assert card_of(hub, "user/again").data.base_model == ["user/enc", "user/llm2"]
    other = SpeechLLM.from_pretrained("user/again", llm_model_name_or_path=str(world / "llm"))
    with pytest.warns(UserWarning, match=f"user/third: others do not have {world / 'llm'} of this machine; push with"):
        other.push_to_hub("user/third", token=TOKEN)


# The model card


def test_the_card_tells_parts_data_error_rate_and_how_to_use_the_model(
    world, chinese_llm, tmp_path, monkeypatch, capsys
):
    model = build(world / "whisper.pt", chinese_llm, lora_r=4, prompt="<audio> a | b")
    model.config.training = {"data": "train.jsonl", "hours": 960.0, "evaluation wer": 0.0213}
    model.unfreeze_encoder()
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.model_name, card.data.pipeline_tag) == ("run", "automatic-speech-recognition")
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == (card.data.pipeline_tag, "wer", 0.0213)
    for row in (
        f"| encoder | {world / 'whisper.pt'}, default revision |",
        "| projector | conv1d, 5 frames an embedding |",
        f"| LLM | {chinese_llm}, default revision |",
        "| adapted | LoRA of rank 4 on the LLM, weights of the encoder |",
        r"| prompt | '<audio> a \| b' |",
        "| data | train.jsonl |",
        "| evaluation wer | 2.13% |",
    ):
        assert row in card.text.splitlines()
    (tmp_path / "a.wav").symlink_to(world / "clip1.wav")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1])
    assert capsys.readouterr().out == model.transcribe("a.wav", num_beams=4) + "\n"


def test_a_local_folder_that_looks_like_a_hub_name_is_no_base_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.parent)
    build(world / "whisper.pt", f"{world.name}/llm").save_pretrained(tmp_path, include_frozen=True)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_card_without_an_evaluation_or_a_record_of_training_says_so(model, tmp_path):
    model.save_pretrained(tmp_path, include_frozen=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "| trained on | not recorded |" in card.text
