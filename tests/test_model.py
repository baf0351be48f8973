"""What model.py promises: parts of any kind, batches without a trace of padding, training, decoding, checkpoints."""

import ctypes
import gc
import json
import os
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper
from conftest import SAMPLE_RATE, make_llm, make_tokenizer, make_whisper, noise
from families import ENCODERS, LLMS
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from trials import SMALL, VARIANTS, decode, examples_of, losses, records, try_out

from dataset import IGNORE, collate
from errors import InputError
from manifest import AUDIO, BOUNDARY, SPEECH, DecodingOptions, Manifest
from model import LORA, ModelArguments, SpeechLLM, SpeechLLMConfig, build_projector, load_encoder, load_llm
from projectors import PROJECTORS

SECONDS = (0.1, 29.3, 0.45, 3.2, 1.01, 7.7, 0.115, 2.5, 12.34, 0.9, 4.4, 1.5, 0.25, 5.05, 2.0, 0.6)  # 16 clips
THREE = (0.5, 2.0, 1.1)
pytestmark = pytest.mark.filterwarnings("ignore:audio .* no end within")  # random weights go on and on


def batch_of(model: SpeechLLM, records: list[dict], with_targets: bool = True) -> dict[str, torch.Tensor]:
    batch = collate(list(model.make_dataset(records)), with_targets)
    unused = ("index", "bad") if with_targets else ("index", "bad", "labels")
    return {name: value for name, value in batch.items() if name not in unused}


def embeddings_of(model: SpeechLLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the LLM reads of a batch: (B, L, H)."""
    names = ("input_ids", "attention_mask", "input_features", "feature_lengths")
    with torch.no_grad():
        return model.inputs_for_llm(**{name: batch[name] for name in names})["inputs_embeds"]


def pad_further(batch: dict, count: int) -> dict:
    """The batch with `count` more padding positions on the left of every row."""
    return batch | {name: F.pad(batch[name], (count, 0)) for name in ("input_ids", "attention_mask")}


def build(world: Path, llm: str | Path = "llm", **options) -> SpeechLLM:
    """A new model, for tests that change it; its projector's weights are always the same."""
    torch.manual_seed(0)
    options = {"encoder": str(world / "whisper.pt"), "projector_hidden_size": 64} | options
    return SpeechLLM.from_parts(llm=str(world / llm), **options)


def load_llm_of(path: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    return load_llm(SpeechLLMConfig(llm_model_name_or_path=path))


def change(model: torch.nn.Module, seed: int = 1) -> None:
    """Give what is trained other weights than a new model has."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)


def checkpoint_layers(model: SpeechLLM) -> None:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradients(model: SpeechLLM) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def trained(model: SpeechLLM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def trained_parts(model: SpeechLLM) -> set[str]:
    return {name.split(".")[0] for name in trained(model)}


@pytest.fixture(scope="module")
def bf16_llm(world) -> Path:
    AutoModelForCausalLM.from_pretrained(world / "llm", dtype=torch.bfloat16).save_pretrained(world / "llm-bf16")
    make_tokenizer().save_pretrained(world / "llm-bf16")
    return world / "llm-bf16"


@pytest.fixture(scope="module")
def path_of(tmp_path_factory) -> Callable[[str], str]:
    """path_of(name): the checkpoint of a family of encoders or LLMs, built when it is first asked for."""
    folder, built = tmp_path_factory.mktemp("families"), {}

    def find(name: str) -> str:
        if name not in built:
            built[name] = str((ENCODERS | LLMS)[name](folder / name))
        return built[name]

    return find


@pytest.fixture(scope="module")
def part_of(path_of) -> Callable:
    """part_of(name, load): the frozen part that load(path) makes of a checkpoint, loaded once."""
    parts = {}

    def find(name: str, load: Callable):
        if name not in parts:
            parts[name] = load(path_of(name))
        return parts[name]

    return find


@pytest.fixture(scope="module")
def build_of(path_of) -> Callable[..., SpeechLLM]:
    """build_of(encoder, llm, projector, **fields): a new small model of these families."""

    def build(encoder="whisper_openai", llm="qwen2", projector="conv1d", **fields) -> SpeechLLM:
        torch.manual_seed(0)
        return SpeechLLM.from_parts(path_of(encoder), path_of(llm), projector=projector, **(SMALL | fields))

    return build


# The config


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match=r"^config: unknown field 'projection_hidden_size'; did you mean projector_hi"):
        SpeechLLM.from_parts(encoder="tiny", llm="llm", projection_hidden_size=1024)
    with pytest.raises(InputError, match=r"unknown field 'x'.*wanted one of .*'prompt'"):
        SpeechLLMConfig(x=1)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("pad_to_30s", 1, "'pad_to_30s' expected bool, got int"),
        ("lora_r", True, "'lora_r' expected int, got bool"),
        ("lora_r", -1, "lora_r is -1; wanted 0 or more"),
        ("lora_alpha", "16", "'lora_alpha' expected float, got str"),
        ("encoder_layer", 2.5, "'encoder_layer' expected int, got float"),
        ("encoder_dropout", 1.0, "encoder_dropout is 1.0; wanted 0 or more, below 1"),
        ("freeze_params", "llm", "'freeze_params' expected a list, got str"),
        ("frozen_dtype", "float16", "'frozen_dtype' expected one of ('auto', 'float32', 'bfloat16'), got float16"),
        ("quantize", "2bit", "'quantize' expected one of ('4bit', '8bit'), got 2bit"),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_told_what_is_wanted(field, value, told):
    with pytest.raises(InputError, match=f"^config: .*{re.escape(told)}") as error:
        SpeechLLMConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_a_whole_number_will_do_where_a_fraction_is_wanted():
    assert SpeechLLMConfig(lora_alpha=16).lora_alpha == 16


def test_a_config_can_be_read_alone_as_any_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert SpeechLLMConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict() | {
        "architectures": ["SpeechLLM"]
    }


class CTCConfig(SpeechLLMConfig):
    """As a fork would have it."""

    ctc_weight: float = 0.0


def test_a_field_of_a_subclass_is_written_and_read_and_checked_with_all_others(tmp_path):
    config = CTCConfig(ctc_weight=0.3, projector_stride=7, prompt=f"{AUDIO}?", freeze_params=["llm"])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.items() >= {"ctc_weight": 0.3, "projector_stride": 7, "prompt": f"{AUDIO}?"}.items()
    assert {f.name for f in fields(ModelArguments)} <= written.keys()
    assert CTCConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(InputError, match="'ctc_weight' expected float, got str"):
        CTCConfig(ctc_weight="much")
    with pytest.raises(InputError, match="unknown field 'ctc_wait'; did you mean ctc_weight"):
        CTCConfig(ctc_wait=0.3)


# Parts, put together


def test_it_is_a_pretrained_model_with_feature_extractor_and_tokenizer(any_model):
    assert isinstance(any_model, PreTrainedModel) and isinstance(any_model.config, SpeechLLMConfig)
    assert any_model.config.projector == "mlp" and any_model.config.encoder_dropout == 0.1
    assert any_model.feature_extractor.sampling_rate == SAMPLE_RATE
    assert any_model.tokenizer.decode(any_model.tokenizer("hello").input_ids) == "hello"
    assert any_model.num_parameters(only_trainable=True) == sum(p.numel() for p in any_model.projector.parameters())


def test_ready_modules_are_put_together_without_reading_a_file_or_changing_the_callers_config(world, model, tmp_path):
    tokenizer, llm = load_llm_of(str(shutil.copytree(world / "llm", tmp_path / "llm")))
    encoder = load_encoder(str(shutil.copy(world / "whisper.pt", tmp_path)))
    shutil.rmtree(tmp_path)
    config = SpeechLLMConfig(projector_hidden_size=64)
    before = config.to_dict()
    torch.manual_seed(0)
    projector = build_projector(config, encoder.output_size, llm.config.hidden_size)
    composed = SpeechLLM(config, encoder, projector, llm, tokenizer)
    assert config.to_dict() == before
    assert (composed.config.encoder_size, composed.config.hidden_size) == (32, 48)
    assert composed.encoder is encoder and composed.projector is projector and composed.llm is llm
    composed.load_state_dict(model.state_dict())
    clip = noise(1.3)
    assert composed.transcribe(clip, max_new_tokens=8) == model.transcribe(clip, max_new_tokens=8) != ""


@pytest.mark.parametrize("projector", ["conv1d", *PROJECTORS])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_works_with_every_projector(part_of, encoder, projector):
    llm = list(LLMS)[(list(ENCODERS).index(encoder) + ["conv1d", *PROJECTORS].index(projector)) % len(LLMS)]
    config = SpeechLLMConfig(projector=projector, **SMALL)
    frozen_encoder, (tokenizer, frozen_llm) = part_of(encoder, load_encoder), part_of(llm, load_llm_of)
    torch.manual_seed(0)
    new_projector = build_projector(config, frozen_encoder.output_size, frozen_llm.config.hidden_size)
    try_out(SpeechLLM(config, frozen_encoder, new_projector, frozen_llm, tokenizer))


@pytest.mark.parametrize("llm", LLMS)
def test_every_llm_works_with_boundary_vectors_and_lora(build_of, llm):
    try_out(build_of(llm=llm, audio_boundary_tokens=True, lora_r=2))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_lora_on_any_encoder_reaches_its_frames_and_is_trained(build_of, encoder):
    model = build_of(encoder, encoder_lora_r=2)
    of_encoder = {name for name in trained(model) if name.startswith("encoder.")}
    assert of_encoder and all(re.search(LORA, name) for name in of_encoder)
    try_out(model)
    batch = batch_of(model, records((0.9,)))
    with torch.no_grad():
        before = model(**batch).loss
        for name in of_encoder:
            model.get_parameter(name).normal_()
        assert not torch.isclose(model(**batch).loss, before)


@pytest.mark.parametrize("encoder", ["whisper_openai", "wav2vec2_large", "parakeet"])
def test_encoder_layer_takes_the_output_of_another_layer(build_of, path_of, encoder):
    model, of_layer = build_of(encoder, encoder_layer=1), load_encoder(path_of(encoder), layer=1)
    features = model.encoder.extract(noise(0.9))[None]
    lengths = torch.tensor([features.shape[1]])
    assert model.encoder(features, lengths).equal(of_layer(features, lengths))
    assert model.num_parameters() < build_of(encoder).num_parameters()


def test_an_unknown_projector_is_told_the_known_ones(world):
    with pytest.raises(InputError, match=r"projector 'perceiver': wanted one of \['conformer', 'conv1d'"):
        build(world, projector="perceiver")


def test_a_stride_over_2_s_is_an_error_for_such_a_silence_stands_for_what_cannot_be_read(world):
    assert build(world, projector_stride=100).embedding_counts[200] == 1
    with pytest.raises(InputError, match="projector_stride 101: 2 s of audio give not one embedding"):
        build(world, projector_stride=101)


def test_encoder_and_llm_must_be_named(world):
    with pytest.raises(InputError, match="wanted an encoder and an LLM: --encoder_name_or_path and --llm_model_name"):
        SpeechLLM.from_config(SpeechLLMConfig(llm_model_name_or_path=str(world / "llm")))


def test_an_unknown_whisper_is_refused_with_the_known_names(world):
    known = r"whisper-huge: cannot load a speech encoder .*available models = .*tiny.*large-v3"
    with pytest.raises(InputError, match=known) as error:
        build(world, encoder="whisper-huge")
    assert "\n" not in str(error.value)


def test_an_llm_that_cannot_be_loaded_is_named(world, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = shutil.copytree(world / "llm", tmp_path / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    for folder in (tmp_path / "missing", tmp_path / "empty", tmp_path / "torn"):
        with pytest.raises(InputError, match=f"^{folder}: cannot load the LLM") as error:
            build(world, folder)
        assert "\n" not in str(error.value)


def test_an_llm_whose_weights_or_tokenizer_do_not_fit_is_told(world, tmp_path):
    folder = shutil.copytree(world / "llm", tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for size, told in ((7, r"is \(7, 48\), wanted \(96, 48\)"), (0, r"is \(0, 48\), wanted \(96, 48\)")):
        save_file(weights | {name: weights[name][:size].clone()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"^{folder}: {name} {told}"):
            build(world, folder)
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    save_file(weights | bias, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM has no place for model.layers.0.mlp.up_proj.bias: left out"):
        build(world, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=f"^{folder}: .*tokenizer"):
        build(world, folder)


# The prompt


def text_around(model: SpeechLLM) -> list[str]:
    """The text before and after the speech."""
    ids = model.make_dataset(records((0.9,)))[0]["prompt_ids"]
    first, last = ids.index(SPEECH), len(ids) - ids[::-1].index(SPEECH)
    return [model.tokenizer.decode(ids[:first]), model.tokenizer.decode(ids[last:])]


def test_a_base_llm_gets_a_plain_template_and_a_warning(build_of):
    with pytest.warns(UserWarning, match="gpt2: no chat template; taking a plain one, 'user: ...'"):
        model = build_of(llm="gpt2")
    assert text_around(model) == ["user: ", "\nTranscribe the speech\nassistant: "]
    assert model.config.chat_template is None  # it comes again with the LLM


def test_a_template_from_a_file_replaces_the_llms_own_and_is_kept_in_the_config(build_of, tmp_path):
    path, text = tmp_path / "mine.jinja", "Say: {{ messages[-1].content }}|{{ messages[-1].role }}|"
    path.write_text(text)
    model = build_of(chat_template=str(path))
    assert text_around(model) == ["Say: ", "\nTranscribe the speech|user|"]
    path.unlink()
    model.save_pretrained(tmp_path / "run")
    assert SpeechLLM.from_pretrained(tmp_path / "run").tokenizer.chat_template == text


def test_a_template_may_place_the_audio_itself(build_of, tmp_path):
    (tmp_path / "mine.jinja").write_text(f"Speech: {AUDIO} Text:")
    model = build_of(chat_template=str(tmp_path / "mine.jinja"), prompt="whatever")
    assert text_around(model) == ["Speech: ", " Text:"]
    model.save_pretrained(tmp_path / "run")
    assert text_around(SpeechLLM.from_pretrained(tmp_path / "run")) == ["Speech: ", " Text:"]


@pytest.mark.parametrize("name", ["nowhere.jinja", "nowhere.txt"])
def test_a_template_that_is_missing_is_one_line(name):
    with pytest.raises(InputError, match=f"--chat_template {name}: cannot read it .*No such file"):
        SpeechLLMConfig(chat_template=name)


def test_a_template_without_a_place_for_the_speech_is_told(build_of, tmp_path):
    (tmp_path / "mine.txt").write_text("{{ messages[0].role }}")
    with pytest.raises(InputError, match="wanted <audio> in it or in --chat_template, once"):
        build_of(chat_template=str(tmp_path / "mine.txt"))


def test_a_system_prompt_comes_first(build_of):
    before, _ = text_around(build_of(system_prompt="You hear well."))
    assert before == "<|im_start|>system\nYou hear well.<|im_end|>\n<|im_start|>user\n"


def test_a_system_prompt_that_the_llm_does_not_know_is_refused_before_anything_is_trained(build_of):
    with pytest.raises(InputError, match=r"chat template refuses the conversation .*wanted another --system_prompt"):
        build_of(llm="mistral", system_prompt="You hear well.")


@pytest.mark.parametrize("prompt", ["no place for the speech", f"{AUDIO} and {AUDIO}"])
def test_a_prompt_needs_one_place_for_the_speech(build_of, prompt):
    with pytest.raises(InputError, match="wanted <audio> in it or in --chat_template, once"):
        build_of(prompt=prompt)


# Batches


def test_the_loss_of_a_clip_is_the_same_alone_and_in_a_batch(model):
    examples = examples_of(model, SECONDS)
    batch = collate(examples)
    with torch.no_grad():
        output = model(**batch)
        alone = torch.stack([model(**collate([example])).loss for example in examples])
    rows = F.cross_entropy(output.logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
    counts = (batch["labels"] != IGNORE).sum(1)
    torch.testing.assert_close(rows / counts, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, rows.sum() / counts.sum())
    assert alone.std() > 0.1  # the clips do differ


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_text_of_a_clip_is_the_same_alone_and_in_a_batch(model, num_beams):
    dataset = model.make_dataset(records(SECONDS))
    together, alone = (decode(model, dataset, size, num_beams=num_beams, max_new_tokens=12) for size in (16, 1))
    assert together == alone
    assert len(set(alone)) > 12  # the clips do differ


def test_padding_further_on_the_left_changes_nothing(model):
    batch, prompts = batch_of(model, records(THREE)), batch_of(model, records(THREE), with_targets=False)
    with torch.no_grad():
        plain, longer = model(**batch), model(**pad_further(batch, 17))
    torch.testing.assert_close(longer.loss, plain.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(longer.logits, plain.logits, atol=1e-4, rtol=1e-4)
    ids = model.generate(**prompts, num_beams=4, max_new_tokens=12)
    assert model.generate(**pad_further(prompts, 17), num_beams=4, max_new_tokens=12).equal(ids)


def test_padding_changes_nothing_for_an_llm_that_learned_absolute_positions(world):
    """Rotary positions are relative, so that a shift of all of them would not show."""
    tokenizer, folder = make_tokenizer(), world / "llm-gpt2"
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = build(world, folder)
    batch, prompts = batch_of(model, records(THREE)), batch_of(model, records(THREE), with_targets=False)
    with torch.no_grad():
        loss = model(**batch).loss
        torch.testing.assert_close(model(**pad_further(batch, 17)).loss, loss, atol=1e-4, rtol=0)
    ids = model.generate(**prompts, num_beams=4, max_new_tokens=12)
    assert model.generate(**pad_further(prompts, 17), num_beams=4, max_new_tokens=12).equal(ids)


def test_the_logits_are_those_of_the_last_positions_of_a_whole_forward(model):
    batch = batch_of(model, records(THREE))
    mask = batch["attention_mask"]
    with torch.no_grad():
        logits = model(**batch).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        embeds = embeddings_of(model, batch)
        whole = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    count = batch["labels"].shape[1]
    assert logits.shape == (3, count, model.llm.config.vocab_size)
    torch.testing.assert_close(logits, whole[:, -count - 1 : -1])


def test_without_labels_there_are_logits_of_all_positions_and_no_loss(model):
    batch = batch_of(model, records(THREE), with_targets=False)
    with torch.no_grad():
        output = model(**batch)
    assert output.loss is None
    assert output.logits.shape == (*batch["input_ids"].shape, model.llm.config.vocab_size)


def test_the_loss_is_the_mean_over_transcript_and_end_token_of_their_negative_log_likelihood(model):
    """Put together by hand, from one utterance at a time and nothing padded."""
    terms = []
    head, tail = (
        model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for text in ("<|im_start|>user\n", "\nTranscribe the speech<|im_end|>\n<|im_start|>assistant\n")
    )
    embed = model.llm.get_input_embeddings()
    for record in records(THREE):
        mel = whisper.log_mel_spectrogram(record["wav"])
        target = model.tokenizer(record["txt"] + "<|im_end|>", return_tensors="pt").input_ids
        with torch.no_grad():
            lengths = torch.tensor([mel.shape[1]])
            speech = model.projector(model.encoder(mel.T[None], lengths), model.encoder.output_lengths(lengths))
            logits = model.llm(inputs_embeds=torch.cat([embed(head), speech, embed(tail), embed(target)], 1)).logits
        said = logits[0, -target.shape[1] - 1 : -1].log_softmax(1)
        terms += (-said.gather(1, target.T)).flatten().tolist()
    with torch.no_grad():
        assert model(**batch_of(model, records(THREE))).loss.item() == pytest.approx(np.mean(terms), abs=1e-4)


def test_the_embeddings_of_a_clip_are_as_many_as_the_dataset_leaves_places_for(model):
    for frames in range(9, 64):
        lengths = torch.tensor([frames])
        with torch.no_grad():
            speech = model.embed_speech(lengths, input_features=torch.randn(1, frames, 80))
        assert len(speech) == model.embedding_counts[frames]
        assert len(speech) == model.num_embeddings(frames) == model.num_embeddings(lengths).item()


def test_a_batch_of_nothing_but_skipped_utterances_has_no_loss_and_no_gradient(world):
    model = build(world)
    silent = [record | {"wav": np.full(16000, np.nan)} for record in records((1.0, 1.0))]
    batch = collate(list(model.make_dataset(silent, on_bad="skip")))
    assert all(batch["bad"])
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_speech_that_does_not_fit_its_places_is_an_error(model):
    batch = batch_of(model, records((1.0,)))
    batch["input_ids"][batch["input_ids"] == SPEECH] = torch.tensor([SPEECH] * 9 + [5])
    with pytest.raises(ValueError, match="9 speech positions in the prompts, 10 speech embeddings"):
        model(**batch)


def test_a_clip_over_30_s_has_the_embeddings_of_its_windows_joined_in_order(model):
    samples = noise(65)
    batch = batch_of(model, [{"wav": samples, "txt": "hello"}])
    assert batch["feature_lengths"].tolist() == [2166, 2166, 2166]
    windows = [batch_of(model, [{"wav": part, "txt": ""}]) for part in np.array_split(samples, 3)]
    parts = [embeddings_of(model, window)[window["input_ids"] == SPEECH] for window in windows]
    speech = embeddings_of(model, batch)[batch["input_ids"] == SPEECH]
    torch.testing.assert_close(speech, torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_each_clip_of_a_conversation_is_heard_in_its_place(model):
    def speech_of(*clips: np.ndarray) -> torch.Tensor:
        question = {"role": "user", "content": f"{AUDIO} and {AUDIO}", "audio": list(clips)}
        batch = batch_of(model, [{"messages": [question, {"role": "assistant", "content": "hello"}]}])
        return embeddings_of(model, batch)[batch["input_ids"] == SPEECH]

    short, long = noise(0.5, 0), noise(1.5, 1)
    first, second = speech_of(short, long), speech_of(long, short)
    assert len(first) == 5 + 15
    torch.testing.assert_close(first[:5], second[15:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[5:], second[:15], atol=1e-5, rtol=1e-5)


def test_a_clip_stands_between_its_boundary_vectors(world):
    model = build(world, audio_boundary_tokens=True)
    batch = batch_of(model, records((0.9,)))
    ids, embeds = batch["input_ids"], embeddings_of(model, batch)
    for placeholder, vector in zip(BOUNDARY, model.boundary.weight, strict=True):
        torch.testing.assert_close(embeds[ids == placeholder], vector[None])
    plain = build(world)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain_batch = batch_of(plain, records((0.9,)))
    is_boundary = (ids == BOUNDARY[0]) | (ids == BOUNDARY[1])
    torch.testing.assert_close(embeds[~is_boundary], embeddings_of(plain, plain_batch)[0])


def test_a_dataset_takes_no_model_along_to_the_processes_that_load_data(any_model):
    """They are started afresh on some systems, and everything that they need is sent to them."""
    dataset = any_model.make_dataset(records((0.9, 0.5)))
    sent = pickle.dumps(dataset)
    assert len(sent) < 3e6
    for example, again in zip(dataset, pickle.loads(sent), strict=True):
        assert example["prompt_ids"] == again["prompt_ids"]
        assert example["features"][0].equal(again["features"][0])


# Training


def test_accumulated_gradients_equal_those_of_one_large_batch(world):
    model = build(world).train()
    six = records((0.5, 2.0, 1.1, 3.0, 0.2, 0.8))
    batches = [batch_of(model, six[n : n + 2]) for n in (0, 2, 4)]
    count = sum((batch["labels"] != IGNORE).sum() for batch in batches)
    model(**batch_of(model, six)).loss.backward()
    wanted = gradients(model)
    for batch in batches:
        model(**batch, num_items_in_batch=count).loss.backward()
    accumulated = gradients(model)
    assert accumulated.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(accumulated[name] / scale, gradient / scale, atol=1e-5, rtol=0)


def test_a_plain_training_loop_learns(world):
    model = build(world).train()
    dataset = model.make_dataset(Manifest(world / "corpus.jsonl"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    steps = []
    for _ in range(3):
        for batch in DataLoader(dataset, batch_size=5, collate_fn=collate):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
    assert np.mean(steps[-4:]) < 0.8 * np.mean(steps[:4])


def test_only_the_projector_learns_and_only_it_is_in_training_mode(world):
    model = build(world).train()
    assert model.training
    assert all(module.training for module in model.projector.modules())
    assert not any(module.training for module in model.encoder.modules())
    dropouts = [module for module in model.llm.modules() if hasattr(module, "attention_dropout")]
    assert dropouts and not any(module.training for module in dropouts)
    model(**batch_of(model, records((0.5, 1.0)))).loss.backward()
    wanted = {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert trained(model) == gradients(model).keys() == wanted
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_llms_own_dropout_is_off_in_training(world, checkpointing):
    shutil.copytree(world / "llm", world / "llm-dropout", dirs_exist_ok=True)
    path = world / "llm-dropout" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.5}))
    model = build(world, "llm-dropout")
    if checkpointing:
        checkpoint_layers(model)
    batch = batch_of(model, records((0.5, 1.0)))
    assert model.train()(**batch).loss.item() == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-5)


def test_encoder_dropout_acts_in_training_only(world):
    model = build(world, encoder_dropout=0.5)
    batch = batch_of(model, records((0.9,)))
    with torch.no_grad():
        plain = build(world)(**batch).loss.item()
        assert model(**batch).loss.item() == plain
        assert abs(model.train()(**batch).loss.item() - plain) > 1e-3


def test_gradient_checkpointing_computes_layers_twice_for_the_same_gradients(world):
    model = build(world).train()
    batch, calls = batch_of(model, records((0.5, 2.0))), []
    model(**batch)  # here layers compute the prompt, once
    model.llm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(**batch).loss.backward()
    wanted = gradients(model)
    assert len(calls) == 1
    checkpoint_layers(model)
    model(**batch).loss.backward()
    assert len(calls) == 1 + 2
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted.pop(name), atol=1e-6, rtol=1e-5)
    assert not wanted
    model.eval()(**batch).loss.backward()
    assert len(calls) == 1 + 2 + 1


def test_gradient_checkpointing_keeps_less_than_half_of_the_activations(world):
    model = build(world).train()
    batch, sizes = batch_of(model, records((0.5, 2.0))), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[-1] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(model)
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch)
    assert 0 < sizes[1] < 0.5 * sizes[0]


def test_labels_are_smoothed_in_training_alone(world):
    model = build(world)
    batch = batch_of(model, records((0.5, 1.0)))
    plain = model(**batch).loss.item()
    model.label_smoothing = 0.1
    assert model(**batch).loss.item() == plain
    output = model.train()(**batch)
    wanted = F.cross_entropy(output.logits.transpose(1, 2), batch["labels"], label_smoothing=0.1)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert abs(output.loss.item() - plain) > 0.01


# What is trained


def test_parameters_are_frozen_by_the_first_patterns_but_for_the_second(world):
    model = build(world, freeze_params=[r"^encoder\.", r"^llm\."], prevent_freeze_params=[r"layers\.1\.mlp", "norm"])
    names = {name for name, _ in model.named_parameters()}
    wanted = {name for name in names if name.startswith("projector.") or "layers.1.mlp" in name or "norm" in name}
    assert trained(model) == wanted
    assert {name.split(".")[0] for name in wanted} == {"projector", "llm", "encoder"}
    assert trained(build(world, freeze_params=[])) == names


def test_tied_weights_answer_to_both_of_their_names(world):
    model = build(world, prevent_freeze_params=["lm_head"])
    assert model.llm.lm_head.weight.requires_grad and model.llm.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("field", ["freeze_params", "prevent_freeze_params"])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names(world, field):
    with pytest.raises(InputError, match=r"pattern '\^decoder' matches no parameter; there are llm\..*projector"):
        build(world, **{field: ["^decoder"]})
    with pytest.raises(InputError, match=r"pattern '\(': cannot read it .*; wanted a regular expression"):
        build(world, **{field: ["("]})


def test_parts_are_frozen_and_unfrozen_by_calls(world):
    model = build(world)
    model.unfreeze_encoder()
    model.freeze_projector()
    assert trained_parts(model) == {"encoder"}
    model.freeze_encoder()
    model.freeze_llm_except_lm_head()
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(model.llm.lm_head.weight)]
    model.unfreeze_llm()
    model.unfreeze_projector()
    assert trained_parts(model) == {"llm", "projector"}
    model.freeze_llm()
    assert trained_parts(model) == {"projector"}


def test_a_call_moves_a_part_into_training_mode_and_out_of_it(world):
    model = build(world).train()
    model.unfreeze_encoder()
    assert all(module.training for module in model.encoder.model.layers.modules())
    model.freeze_encoder()
    assert not any(module.training for module in model.encoder.modules())
    model.eval()
    model.unfreeze_encoder()
    assert not any(module.training for module in model.modules())


def test_the_vectors_around_a_clip_are_frozen_with_the_projector(world):
    model = build(world, audio_boundary_tokens=True)
    assert "boundary.weight" in trained(model)
    model.freeze_projector()
    assert not trained(model)
    model.unfreeze_projector()
    assert "boundary.weight" in trained(model)


def test_an_unfrozen_encoder_gets_gradients(world):
    model = build(world)
    model.unfreeze_encoder()
    model.train()(**collate(examples_of(model))).loss.backward()
    assert [n for n, p in model.encoder.named_parameters() if p.grad is None and "embed_positions" not in n] == []


def test_running_statistics_stay_as_they_were_loaded(build_of, tmp_path):
    model = build_of("parakeet")
    model.unfreeze_encoder()
    examples = examples_of(model)
    model.train()(**collate(examples)).loss.backward()
    model.save_pretrained(tmp_path)
    assert losses(SpeechLLM.from_pretrained(tmp_path), examples) == pytest.approx(losses(model.eval(), examples))


# Data types


def test_frozen_parts_have_the_llms_dtype_and_the_projector_is_fp32(world, bf16_llm):
    model = build(world, bf16_llm)
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    model.train()(**batch_of(model, records((0.5, 1.0)))).loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("llm", "dtype", "wanted"),
    [
        ("llm", "auto", torch.float32),
        ("llm-bf16", "auto", torch.bfloat16),
        ("llm", "bfloat16", torch.bfloat16),
        ("llm-bf16", "float32", torch.float32),
    ],
)
def test_the_dtype_of_the_frozen_parts_can_be_chosen_and_is_kept(world, bf16_llm, tmp_path, llm, dtype, wanted):
    model = build(world, llm, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert model.config.frozen_dtype == dtype
    for each in (model, SpeechLLM.from_pretrained(tmp_path)):
        assert {p.dtype for part in (each.llm, each.encoder) for p in part.parameters()} == {wanted}
        assert {p.dtype for p in each.projector.parameters()} == {torch.float32}
    other = SpeechLLM.from_pretrained(tmp_path, dtype="float32")
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_a_part_whose_own_weights_are_trained_is_held_in_fp32(world, bf16_llm):
    model = build(world, bf16_llm)
    model.unfreeze_llm()
    assert {p.dtype for p in model.llm.parameters()} == {torch.float32}
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    assert np.isfinite(losses(model, examples_of(model))).all()
    with_some = build(world, bf16_llm, prevent_freeze_params=["encoder.*layer_norm"])
    assert {p.dtype for p in with_some.encoder.parameters()} == {torch.float32}


def test_a_bf16_llm_gives_nearly_the_loss_of_its_fp32_twin(world, bf16_llm):
    half, full = build(world, bf16_llm), build(world)
    full.llm.load_state_dict(half.llm.state_dict())
    batch = batch_of(full, records((0.5, 1.0, 3.0)))
    with torch.no_grad():
        assert half(**batch).loss.item() == pytest.approx(full(**batch).loss.item(), rel=0.03)


def test_a_bf16_llm_gives_nearly_the_same_loss_alone_and_in_a_batch(world, bf16_llm):
    model = build(world, bf16_llm)
    examples = examples_of(model, (0.5, 1.0, 3.0, 0.1))
    alone = [losses(model, [example])[0] for example in examples]
    np.testing.assert_allclose(losses(model, examples), alone, rtol=0.05)


def test_a_bf16_llm_starts_the_same_text_alone_and_in_a_batch(world, bf16_llm):
    model = build(world, bf16_llm)
    dataset, options = model.make_dataset(records(SECONDS)), {"num_beams": 1, "max_new_tokens": 2}
    together, alone = (decode(model, dataset, size, **options) for size in (16, 1))
    assert sum(map(str.__eq__, together, alone)) >= 14  # roundings add up with each token


# Decoding


def test_transcribe_takes_a_path_or_samples_or_a_list_of_them(model, world):
    path = str(world / "clip3.wav")
    samples, _ = soundfile.read(path, dtype="float32")
    other = noise(2.0)
    transcribe = partial(model.transcribe, max_new_tokens=12)
    text = transcribe(path)
    assert isinstance(text, str) and text
    assert transcribe(samples) == transcribe(Path(path)) == text
    assert transcribe([other, path, samples]) == [transcribe(other), text, text]
    assert transcribe([path]) == [text]
    assert transcribe([]) == []


def test_transcripts_come_in_the_order_of_the_list_whatever_their_lengths(model):
    clips = [noise(seconds, seed) for seed, seconds in enumerate([0.5, 3.0, 1.0, 2.0])]
    texts = model.transcribe(clips, max_new_tokens=12, batch_size=2)
    assert texts == [model.transcribe(clip, max_new_tokens=12) for clip in clips]
    assert len(set(texts)) == 4


def test_transcribe_works_on_more_than_30_s_and_hears_its_end(model):
    start, end = noise(45, 1), noise(2, 2)
    text = model.transcribe(np.concatenate([start, end]), max_new_tokens=12)
    assert text != model.transcribe(np.concatenate([start, 0 * end]), max_new_tokens=12)


def test_transcribe_gives_an_empty_text_and_a_warning_for_audio_that_it_cannot_use(model, tmp_path):
    with pytest.warns(UserWarning, match=r"audio 2: .*missing\.wav: no such file"):
        texts = model.transcribe([noise(1), str(tmp_path / "missing.wav")], max_new_tokens=8)
    assert texts[0] and texts[1] == ""
    with pytest.warns(UserWarning, match=r"audio 1: .*do not fit in 824"):  # 1024 positions less 200 for the answer
        assert model.transcribe(noise(90)) == ""


def test_the_options_of_decoding_are_its_keywords_and_no_others_are(model):
    clip, dataset = noise(1.0), model.make_dataset(records((1.0,)))
    (hypotheses,) = model.decode(dataset, num_beams=1, max_new_tokens=3)
    (again,) = model.decode(dataset, options=DecodingOptions(num_beams=1, max_new_tokens=3))
    assert hypotheses == again
    assert hypotheses[0].problem == "a:0: no end within 3 new tokens"
    for call in (partial(model.transcribe, clip), lambda **keywords: list(model.decode(dataset, **keywords))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
            call(top_k=5)
        with pytest.raises(InputError, match="--num_beams 0: wanted 1 or more"):
            call(num_beams=0)


def test_length_penalty_favours_long_texts_of_a_beam_search(chinese_llm, world):
    """An LLM that ends one answer in eight tokens: else no two beams differ in length."""
    model, clips = build(world, chinese_llm), [noise(1 + n / 4, n) for n in range(8)]
    short, long = (model.transcribe(clips, max_new_tokens=30, length_penalty=p) for p in (-5.0, 5.0))
    assert sum(map(len, short)) < sum(map(len, long))


def test_more_new_tokens_than_the_llm_has_positions_are_an_error(model):
    with pytest.raises(InputError, match="max_new_tokens 1024: the LLM has 1024 positions in all"):
        model.transcribe(noise(1), max_new_tokens=1024)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_clip_has_as_many_new_tokens_as_its_length_allows_alone_and_in_a_batch(model, num_beams):
    """20, and so many for each second; --max_new_tokens is the limit of the longest clips."""
    dataset = model.make_dataset(records((0.5, 3.0, 1.0, 2.0)))
    options = DecodingOptions(num_beams=num_beams, max_new_tokens=34, max_tokens_per_second=8)
    (together,) = model.decode(dataset, options=options)
    assert sum(model.decode(dataset, batch_size=1, options=options), []) == together
    no_bound, num_cut = replace(options, max_tokens_per_second=1000), 0
    for hypothesis in together:
        limit = (24, 34, 28, 34)[hypothesis.index]
        ((wanted,),) = model.decode(dataset, [hypothesis.index], options=replace(no_bound, max_new_tokens=limit))
        assert hypothesis == wanted
        num_cut += f"no end within {limit} new tokens" in (hypothesis.problem or "")
    assert num_cut >= (2 if num_beams == 1 else 1)


def test_no_transcript_is_longer_than_the_llm_has_positions_left(model, monkeypatch):
    """In training --model_max_length leaves room for the transcript alone. What pads a batch takes none of it."""
    dataset = model.make_dataset(records((0.5, 1.0)))
    lengths = [len(example["prompt_ids"]) for example in dataset]
    monkeypatch.setattr(model, "max_length", max(lengths) + 2)
    search = {"num_beams": 1, "max_tokens_per_second": 1000}
    (together,) = model.decode(dataset, **search)
    assert sorted(lengths)[0] < sorted(lengths)[1] and len(together) == 2
    for hypothesis in together:
        room = model.max_length - lengths[hypothesis.index]
        ((wanted,),) = model.decode(dataset, [hypothesis.index], max_new_tokens=room, **search)
        assert hypothesis == wanted


def test_transcribe_gives_texts_and_refuses_what_it_has_no_place_for(model):
    for options in ({"nbest": 2}, {"confidence": True}):
        with pytest.raises(InputError, match="transcribe gives texts alone; wanted decode"):
            model.transcribe(noise(1), **options)


def test_one_beam_is_greedy_search(model):
    """Each token is the likeliest after those before it, in a forward pass over all of them."""
    batch = batch_of(model, records((1.0,)), with_targets=False)
    ids = model.generate(**batch, num_beams=1, max_new_tokens=12)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = model(**batch | {"labels": None}).logits
    assert logits[:, -13:-1].argmax(2).equal(ids)


def test_decoding_a_manifest_gives_every_index_once_and_the_longest_clips_first(model, world):
    dataset = model.make_dataset(Manifest(world / "corpus.jsonl"))
    options = DecodingOptions(num_beams=1, max_new_tokens=4)
    batches = list(model.decode(dataset, batch_size=8, options=options))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    hypotheses = {hypothesis.index: hypothesis for hypothesis in sum(batches, [])}
    assert sorted(hypotheses) == list(range(20))
    assert (np.diff(dataset.durations[list(hypotheses)]) <= 0).all()
    (some,) = model.decode(dataset, [3, 5], options=options)
    assert sorted(some, key=lambda hypothesis: hypothesis.index) == [hypotheses[3], hypotheses[5]]


def test_processes_that_load_data_change_no_text(model, world):
    clips = [str(world / f"clip{n}.wav") for n in range(4)]
    wanted = model.transcribe(clips, batch_size=2, max_new_tokens=4)
    assert model.transcribe(clips, batch_size=2, max_new_tokens=4, num_workers=1) == wanted


def test_what_cannot_be_read_has_no_text_and_a_reason(model):
    two = records((1.0, 1.0))
    two[1]["wav"] = np.full(16000, np.nan)
    (hypotheses,) = model.decode(model.make_dataset(two, on_bad="keep"), num_beams=1, max_new_tokens=4)
    readable, unreadable = sorted(hypotheses, key=lambda hypothesis: hypothesis.index)
    assert readable.text
    assert unreadable.text == ""
    assert unreadable.problem.startswith("a:1: ") and "NaN" in unreadable.problem


def test_decoding_leaves_the_model_in_the_mode_that_it_had(world):
    model = build(world)
    dataset = model.make_dataset(records((0.5, 1.0)))
    for mode in (True, False):
        model.train(mode)
        for _ in model.decode(dataset, batch_size=1, num_beams=1, max_new_tokens=2):
            assert not model.training
        assert model.training == mode
        next(model.decode(dataset, batch_size=1, num_beams=1, max_new_tokens=2))  # not read to its end
        assert model.training == mode


@pytest.mark.parametrize("encoder", ENCODERS)
def test_two_threads_decode_with_one_model_what_each_decodes_alone(build_of, encoder):
    model = build_of(encoder)
    clips = [[noise(0.4 + n, seed) for n in range(3)] for seed in range(4)]

    def transcribe(seed: int) -> list[str]:
        return model.transcribe(clips[seed], num_beams=1 + seed % 2, max_new_tokens=8)

    alone = [transcribe(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(transcribe, range(4))) == alone


def test_the_text_ends_where_the_end_token_comes(world):
    """The vocabulary's matrix is changed so that the end token comes where the third token came before."""
    model, one = build(world), records((1.0,))
    batch, end = batch_of(model, one, with_targets=False), model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = model.generate(**batch, num_beams=1, max_new_tokens=12)[0].tolist()
    assert end not in ids and ids[2] not in ids[:2]
    ((hypothesis,),) = model.decode(model.make_dataset(one), num_beams=1, max_new_tokens=12)
    assert hypothesis.problem == "a:0: no end within 12 new tokens"
    weight = model.llm.lm_head.weight.clone()
    weight[end] = 1.01 * weight[ids[2]]
    model.llm.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    ((hypothesis,),) = model.decode(model.make_dataset(one), num_beams=1, max_new_tokens=12)
    assert hypothesis.text == " ".join(model.tokenizer.decode(ids[:2]).split())
    assert hypothesis.problem is None


def test_every_end_token_that_template_tokenizer_or_llm_know_stops_the_answer(world):
    template = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    llm = make_llm(world / "llm-ends", tokenizer=make_tokenizer(template, eos_token="</s>"))
    path = llm / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [100, 101]}))
    model = build(world, llm)
    known = [model.tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "</s>")]
    assert model.llm.generation_config.eos_token_id == sorted([*known, 100, 101])


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_llms_settings_for_chat_do_not_leak_into_decoding(model, world, num_beams):
    llm = shutil.copytree(world / "llm", world / "llm-chat", dirs_exist_ok=True)
    chat = {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 3.0}
    chat |= {"no_repeat_ngram_size": 1, "max_new_tokens": 3, "length_penalty": -9.0, "eos_token_id": 1}
    (llm / "generation_config.json").write_text(json.dumps(chat))
    chatty = build(world, llm)
    chatty.load_state_dict(model.state_dict())
    dataset, options = model.make_dataset(records((0.5, 1.0, 2.0))), {"num_beams": num_beams, "max_new_tokens": 12}
    assert decode(chatty, dataset, **options) == decode(model, dataset, **options)


def test_a_tokenizer_without_a_pad_token_decodes_batches(world):
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    llm = make_llm(world / "llm-no-pad", tokenizer=make_tokenizer(template, eos_token="</s>"))
    model = build(world, llm)
    dataset = model.make_dataset(records(THREE))
    assert decode(model, dataset, 3, max_new_tokens=12) == decode(model, dataset, 1, max_new_tokens=12)


# Save and load


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    """The same weights, to the last bit."""
    state, wanted = loaded.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert [n for n in wanted if state[n].dtype != wanted[n].dtype or not state[n].equal(wanted[n])] == []


def assert_same_texts(loaded: SpeechLLM, model: SpeechLLM) -> None:
    clips = [noise(1 + seed / 2, seed) for seed in range(3)]
    texts = model.transcribe(clips, num_beams=1, max_new_tokens=10)
    assert len(set(texts)) > 1, f"the same text for every clip: {texts}"
    assert loaded.transcribe(clips, num_beams=1, max_new_tokens=10) == texts


def test_a_folder_holds_the_trained_weights_alone_in_fp32_and_a_config(world, bf16_llm, tmp_path):
    model = build(world, bf16_llm)
    model.save_pretrained(tmp_path / "new" / "run")
    assert sorted(contents(tmp_path / "new" / "run")) == ["config.json", "model.safetensors"]
    state = load_file(tmp_path / "new" / "run" / "model.safetensors")
    assert state.keys() == {f"projector.{name}" for name in model.projector.state_dict()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_to_the_bit(build_of, tmp_path, variant):
    model = build_of(**VARIANTS[variant])
    change(model)
    model.save_pretrained(tmp_path)
    loaded = SpeechLLM.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same(loaded, model)
    assert_same_texts(loaded, model)
    assert trained(loaded) == trained(model)
    assert loaded.config.to_dict() == model.config.to_dict() | {"architectures": ["SpeechLLM"]}


def test_the_config_names_all_that_is_needed_and_may_be_overridden(world, tmp_path):
    build(world).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    wanted = {
        "model_type": "speech_llm",
        "llm_model_name_or_path": str(world / "llm"),
        "encoder_name_or_path": str(world / "whisper.pt"),
        "prompt": f"{AUDIO}\nTranscribe the speech",
        "projector": "conv1d",
        "projector_stride": 5,
        "projector_hidden_size": 64,
        "pad_to_30s": False,
        "frozen_dtype": "auto",
        "encoder_size": 32,
        "hidden_size": 48,
    }
    assert written.items() >= wanted.items()
    assert {f.name for f in fields(ModelArguments)} <= written.keys()
    moved = shutil.copytree(world / "llm", tmp_path / "moved")
    loaded = SpeechLLM.from_pretrained(tmp_path, llm_model_name_or_path=str(moved))
    assert loaded.config.llm_model_name_or_path == str(moved)


def test_a_folder_can_be_loaded_from_any_other_though_it_was_trained_with_relative_names(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    model = SpeechLLM.from_parts("whisper.pt", "llm", projector_hidden_size=64)
    model.save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert_same(SpeechLLM.from_pretrained("run"), model)


def test_prompt_stride_and_padding_to_30_s_are_kept_with_the_weights(world, tmp_path):
    model = build(world, prompt=f"{AUDIO} Write it down.", pad_to_30s=True, projector_stride=4)
    model.save_pretrained(tmp_path)
    loaded = SpeechLLM.from_pretrained(tmp_path)
    example = loaded.make_dataset(records((1.0,)))[0]
    assert example["features"][0].shape == (3000, 80)
    assert example["prompt_ids"].count(SPEECH) == 1500 // 4
    assert text_around(loaded) == ["<|im_start|>user\n", " Write it down.<|im_end|>\n<|im_start|>assistant\n"]
    assert decode(loaded, loaded.make_dataset(records((1.0,)))) == decode(model, model.make_dataset(records((1.0,))))


def test_the_weights_file_alone_is_loaded_where_both_parts_are_named(model, world, tmp_path):
    """As published checkpoints of other projects are."""
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    names = {"encoder_name_or_path": str(world / "whisper.pt"), "llm_model_name_or_path": str(world / "llm")}
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(SpeechLLM.from_pretrained(place, projector_hidden_size=64, **names), model)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        SpeechLLM.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("llm", ["qwen2", "gemma"])  # tied to the embeddings, not tied
def test_a_vocabulary_projection_that_was_trained_is_kept_and_goes_on_being_kept(build_of, tmp_path, llm, dtype):
    model = build_of(llm=llm, dtype=dtype)
    model.freeze_llm_except_lm_head()
    change(model)
    model.save_pretrained(tmp_path / "run")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert_same(loaded, model)
    assert_same_texts(loaded, model)
    model.freeze_llm()
    for number, frozen in enumerate((model, loaded)):
        frozen.save_pretrained(tmp_path / f"run{number}")
        assert_same(SpeechLLM.from_pretrained(tmp_path / f"run{number}"), model)


def test_a_projector_can_be_loaded_into_a_model_with_more_to_train(world, tmp_path):
    first = build(world)
    change(first)
    first.save_pretrained(tmp_path)
    second = build(world, audio_boundary_tokens=True)
    with pytest.raises(InputError, match=r"boundary\.weight is missing, wanted \(2, 48\)"):
        second.load_trained(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"without boundary\.weight and the like \(1\): they start new"):
        second.load_trained(tmp_path / "model.safetensors", only="projector")
    assert_same(second.projector, first.projector)


def test_a_plain_trainer_saves_and_loads_it(world, tmp_path):
    model = build(world)
    options = {"save_steps": 2, "max_steps": 2, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **options)
    dataset = model.make_dataset(records((0.5, 1.0, 0.7, 0.9)))
    Trainer(model, args, data_collator=collate, train_dataset=dataset).train()
    loaded = SpeechLLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_same(loaded, model)
    assert_same_texts(loaded, model)


@pytest.mark.parametrize("include_frozen", [False, True])
def test_others_may_read_what_the_umask_lets_them(model, tmp_path, include_frozen):
    model.save_pretrained(tmp_path / "run", include_frozen=include_frozen)
    (tmp_path / "usual").touch()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "usual").stat().st_mode}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_loading_holds_no_second_copy_of_the_weights(large_llm, world, device):
    """The peak of resident memory until every weight has been read once; a second copy would make it 2."""

    def memory(kind: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
        return 1024 * int(line.split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed goes back, or the weights would take its place
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS:")
    model = build(world, large_llm, device=device)
    for p in model.parameters():
        p.sum()
    assert 0.9 < (memory("VmHWM:") - before) / sum(p.nbytes for p in model.parameters()) < 1.5


@pytest.fixture(scope="module")
def large_llm(tmp_path_factory) -> Path:
    """An LLM with 84 MB of bf16 weights, all of one value."""
    folder = make_llm(tmp_path_factory.mktemp("large"))
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 4000}
    with torch.device("meta"):
        config = Qwen2Config(num_attention_heads=8, num_key_value_heads=8, **sizes)
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    full = empty.to_empty(device="cpu")
    for p in full.parameters():
        p.data.fill_(0.01)
    full.save_pretrained(folder)
    return folder


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
    model = build(world)
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
    model.save_pretrained(tmp_path, include_frozen=True)
    assert {"config.json", "model.safetensors", "llm/model.safetensors"} <= contents(tmp_path).keys()
    assert not [name for name in contents(tmp_path) if "partial" in name]


# Files that are wrong


def with_weights(change: Callable[[dict[str, torch.Tensor]], dict]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def without_bias(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name != "projector.linear1.bias"}


def of_no_size(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) for name in weights}


def torn(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 99)


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def config_with(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))

    return spoil


def config_of(content: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(content, encoding=encoding)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


WEIGHTS, CONFIG = "model.safetensors", "config.json"
OF_OURS = "wanted a folder that train.py or save_pretrained wrote"


@pytest.mark.parametrize(
    ("spoil", "file", "told"),
    [
        (with_weights(without_bias), WEIGHTS, r"does not fit .*: projector\.linear1\.bias is missing, wanted \(64,\)$"),
        (
            with_weights(lambda weights: weights | {"projector.linear9.bias": torch.zeros(3)}),
            WEIGHTS,
            r"does not fit .*: projector\.linear9\.bias is \(3,\), wanted no such tensor$",
        ),
        (
            with_weights(lambda weights: weights | {"projector.linear2.weight": torch.zeros(48, 65)}),
            WEIGHTS,
            r"does not fit .*: projector\.linear2\.weight is \(48, 65\), wanted \(48, 64\)$",
        ),
        (with_weights(of_no_size), WEIGHTS, r"projector\.\S+ is \(0,\), wanted \("),
        (torn, WEIGHTS, "cannot read the trained weights"),
        (garbage, WEIGHTS, "cannot read the trained weights"),
        (gone, WEIGHTS, "cannot read the trained weights .*No such file"),
        (config_with("projector_stride", "projector_strid"), CONFIG, "'projector_strid'.* projector_stride"),
        (config_with("speech_llm", "whisper"), CONFIG, f"another kind of model; {OF_OURS}"),
        (config_with('"prompt":', '"prompt"'), CONFIG, f"Expecting ':' delimiter: line .*; {OF_OURS}"),
        (config_with('"conv1d"', "5"), CONFIG, f"'projector' expected str, got int .*; {OF_OURS}"),
        (config_of('{"prompt": "hör zu"}', "latin-1"), CONFIG, "can't decode byte 0xf6"),
        (config_of("{}"), CONFIG, OF_OURS),
        (config_of("[]"), CONFIG, OF_OURS),
        (config_of('{"architectures": ["Qwen2ForCausalLM"]}'), CONFIG, OF_OURS),
        (without_config, CONFIG, f"no such file; {OF_OURS}"),
    ],
)
def test_a_file_that_is_wrong_is_named_in_one_line_with_the_reason(model, tmp_path, spoil, file, told):
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / file))}: .*{told}") as error:
        SpeechLLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_for_other_widths_are_refused_with_both_widths_and_change_nothing(world, tmp_path):
    make_whisper(tmp_path / "whisper.pt", width=64)
    make_llm(tmp_path / "llm", width=32)
    build(tmp_path).save_pretrained(tmp_path / "run")
    model, untouched = build(world), build(world)
    with pytest.raises(InputError) as error:
        model.load_trained(tmp_path / "run" / "model.safetensors")
    message = str(error.value)
    assert "encoder width 32, LLM width 48, conv1d projector of stride 5, hidden size 64" in message
    assert "projector.conv.weight is (64, 64, 5), wanted (32, 32, 5)" in message
    assert "projector.linear2.weight is (32, 64), wanted (48, 64)" in message
    assert "\n" not in message
    assert_same(model, untouched)


def test_a_field_of_from_pretrained_that_does_not_exist_is_not_blamed_on_the_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^config: unknown field 'promt'; did you mean prompt\?$"):
        SpeechLLM.from_pretrained(tmp_path, promt="<audio> Write it down.")
