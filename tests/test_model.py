"""What model.py promises: projector, encoder, batches without a trace of padding, training, checkpoints, decoding."""

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper
from conftest import make_llm, make_tokenizer, make_whisper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from arguments import ModelArguments
from dataset import IGNORE, collate
from manifest import SAMPLE_RATE, InputError, Manifest
from model import SpeechLLM
from prompt import AUDIO, SPEECH

SECONDS = [0.1, 29.3, 0.45, 3.2, 1.01, 7.7, 0.115, 2.5, 12.34, 0.9, 4.4, 1.5, 0.25, 5.05, 2.0, 0.6]  # 16 clips


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness and colour go up and down, so that no two stretches of it are alike."""
    random = np.random.default_rng(seed)
    samples = random.normal(0, 0.1, round(seconds * SAMPLE_RATE))
    swell = np.sin(np.arange(len(samples)) / SAMPLE_RATE * random.uniform(3, 9)) ** 2
    return (samples * swell + np.roll(samples, 1) * (1 - swell)).astype(np.float32)


def records_of(seconds: list[float]) -> list[dict]:
    texts = ["hello", "hello world", "transcribe the speech", "the user"]
    return [{"where": f"a:{n}", "wav": noise(s, n), "txt": texts[n % 4]} for n, s in enumerate(seconds)]


def batch_of(model, records: list[dict], with_targets: bool = True) -> dict[str, torch.Tensor]:
    dataset = model.make_dataset(records)
    batch = collate([dataset[position] for position in range(len(records))], with_targets)
    unused = ("index", "bad") if with_targets else ("index", "bad", "labels")
    return {name: value for name, value in batch.items() if name not in unused}


def pad_further(batch: dict, count: int) -> dict:
    """The batch with `count` more padding positions on the left of every row."""
    longer = {name: F.pad(batch[name], (count, 0)) for name in ("input_ids", "attention_mask")}
    return batch | longer


def build(world: Path, llm: str | Path = "llm", **options) -> SpeechLLM:
    """A model of its own, for tests that change it; its projector's weights are always the same."""
    torch.manual_seed(0)
    options = {"encoder": str(world / "whisper.pt"), "projector_hidden_size": 64} | options
    return SpeechLLM.from_parts(llm=str(world / llm), **options)


def checkpoint_layers(model) -> None:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def decode_all(model, records: list[dict], **options) -> dict[int, str]:
    return {index: text for rows in model.decode(model.make_dataset(records), **options) for index, text, _ in rows}


@pytest.fixture(scope="module")
def bf16_llm(world) -> Path:
    AutoModelForCausalLM.from_pretrained(world / "llm", dtype=torch.bfloat16).save_pretrained(world / "llm-bf16")
    make_tokenizer().save_pretrained(world / "llm-bf16")
    return world / "llm-bf16"


# The projector


def test_the_number_of_mel_bins_is_read_from_the_checkpoint(tmp_path):
    make_whisper(tmp_path / "80.pt")
    checkpoint = torch.load(tmp_path / "80.pt", weights_only=True)
    checkpoint["dims"]["n_mels"] = 128
    checkpoint["model_state_dict"]["encoder.conv1.weight"] = torch.randn(32, 128, 3)
    torch.save(checkpoint, tmp_path / "128.pt")
    make_llm(tmp_path / "llm")
    model = build(tmp_path, encoder=str(tmp_path / "128.pt"))
    dataset = model.make_dataset(records_of([1.0]))
    assert dataset[0]["features"][0].shape == (100, 128)
    assert model(**batch_of(model, records_of([1.0])))["loss"].isfinite()


# Batches


def test_the_loss_of_a_clip_is_the_same_alone_and_in_a_batch(model):
    records = records_of(SECONDS)
    batch = batch_of(model, records)
    with torch.no_grad():
        output = model(**batch)
        rows = F.cross_entropy(output["logits"].transpose(1, 2), batch["labels"], reduction="none").sum(1)
        trained = (batch["labels"] != IGNORE).sum(1)
        together = rows / trained
        alone = torch.stack([model(**batch_of(model, [record]))["loss"] for record in records])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(output["loss"], rows.sum() / trained.sum())
    assert alone.std() > 0.1  # the clips do differ


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_text_of_a_clip_is_the_same_alone_and_in_a_batch(model, num_beams):
    options = {"num_beams": num_beams, "max_new_tokens": 12}
    together = decode_all(model, records_of(SECONDS), batch_size=16, **options)
    alone = decode_all(model, records_of(SECONDS), batch_size=1, **options)
    assert together == alone
    assert len(set(alone.values())) > 12  # the clips do differ


def test_padding_further_on_the_left_changes_nothing(model):
    records = records_of([0.5, 2.0, 1.1])
    batch, prompts = batch_of(model, records), batch_of(model, records, with_targets=False)
    with torch.no_grad():
        wanted, found = model(**batch), model(**pad_further(batch, 17))
    torch.testing.assert_close(found["loss"], wanted["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["logits"], wanted["logits"], atol=1e-4, rtol=1e-4)
    ids = model.generate(**prompts, num_beams=4, max_new_tokens=12)
    assert model.generate(**pad_further(prompts, 17), num_beams=4, max_new_tokens=12).equal(ids)


def test_padding_changes_nothing_for_an_llm_that_learned_absolute_positions(world):
    """Rotary positions are relative, so that a shift of all of them would not show."""
    tokenizer, folder = make_tokenizer(), world / "llm-gpt2"
    config = GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=4, n_positions=512, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, records = build(world, folder), records_of([0.5, 2.0, 1.1])
    batch, prompts = batch_of(model, records), batch_of(model, records, with_targets=False)
    with torch.no_grad():
        loss = model(**batch)["loss"]
        torch.testing.assert_close(model(**pad_further(batch, 17))["loss"], loss, atol=1e-4, rtol=0)
    ids = model.generate(**prompts, num_beams=4, max_new_tokens=12)
    assert model.generate(**pad_further(prompts, 17), num_beams=4, max_new_tokens=12).equal(ids)


def test_the_logits_are_those_of_the_last_positions_of_a_whole_forward(model):
    batch = batch_of(model, records_of([0.5, 2.0, 1.1]))
    with torch.no_grad():
        logits = model(**batch)["logits"]
        mask = batch["attention_mask"]
        embeds = model.embed(*(batch[name] for name in ("input_ids", "input_features", "feature_lengths")))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    count = batch["labels"].shape[1]
    assert logits.shape == (3, count, model.llm.config.vocab_size)
    torch.testing.assert_close(logits, whole[:, -count - 1 : -1])


def test_the_loss_is_the_mean_over_transcript_and_end_token_of_their_negative_log_likelihood(model):
    """Put together by hand, from one utterance at a time and nothing padded."""
    records, terms = records_of([0.5, 2.0, 1.1]), []
    head, tail = (
        model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for text in ("<|im_start|>user\n", "\nTranscribe the speech<|im_end|>\n<|im_start|>assistant\n")
    )
    embed = model.llm.get_input_embeddings()
    for record in records:
        mel = whisper.log_mel_spectrogram(record["wav"])
        target = model.tokenizer(record["txt"] + "<|im_end|>", return_tensors="pt").input_ids
        with torch.no_grad():
            lengths = torch.tensor([mel.shape[1]])
            speech = model.projector(model.encoder(mel.T[None], lengths), model.encoder.output_lengths(lengths))
            logits = model.llm(inputs_embeds=torch.cat([embed(head), speech, embed(tail), embed(target)], 1)).logits
        said = logits[0, -target.shape[1] - 1 : -1].log_softmax(1)
        terms += (-said.gather(1, target.T)).flatten().tolist()
    with torch.no_grad():
        assert model(**batch_of(model, records))["loss"].item() == pytest.approx(np.mean(terms), abs=1e-4)


def test_a_batch_of_nothing_but_skipped_utterances_has_no_loss_and_no_gradient(world):
    model = build(world)
    records = [{**record, "wav": np.full(16000, np.nan)} for record in records_of([1.0, 1.0])]
    dataset = model.make_dataset(records, on_bad="skip")
    batch = collate([dataset[0], dataset[1]])
    assert all(batch.pop("bad"))
    batch.pop("index")
    loss = model(**batch)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_speech_that_does_not_fit_its_places_is_an_error(model):
    batch = batch_of(model, records_of([1.0]))
    batch["input_ids"][batch["input_ids"] == SPEECH] = torch.tensor([SPEECH] * 9 + [5])
    with pytest.raises(ValueError, match="9 speech positions in the prompts, 10 speech embeddings"):
        model(**batch)


def test_a_clip_over_30_s_has_the_embeddings_of_its_windows_joined_in_order(model):
    samples = noise(65)
    batch = batch_of(model, [{"where": "a", "wav": samples, "txt": "hello"}])
    ids, features, lengths = (batch[name] for name in ("input_ids", "input_features", "feature_lengths"))
    assert lengths.tolist() == [2166, 2166, 2166]
    with torch.no_grad():
        found = model.embed(ids, features, lengths)[ids == SPEECH]
        windows = [whisper.log_mel_spectrogram(part) for part in np.array_split(samples, 3)]
        frames = [model.encoder(w.T[None], torch.tensor([w.shape[1]])) for w in windows]
        parts = [model.projector(f, torch.tensor([f.shape[1]]))[0] for f in frames]
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_each_clip_of_a_conversation_is_heard_in_its_place(model, tmp_path):
    for seed in (0, 1):
        soundfile.write(tmp_path / f"{seed}.wav", noise(0.5 + seed, seed), SAMPLE_RATE, subtype="FLOAT")

    def speech_of(*seeds: int) -> torch.Tensor:
        paths = [str(tmp_path / f"{seed}.wav") for seed in seeds]
        asked = {"role": "user", "content": f"{AUDIO} and {AUDIO}", "audio": paths}
        turns = [asked, {"role": "assistant", "content": "hello"}]
        batch = batch_of(model, [{"where": "a", "messages": turns}])
        with torch.no_grad():
            embeds = model.embed(batch["input_ids"], batch["input_features"], batch["feature_lengths"])
        return embeds[batch["input_ids"] == SPEECH]

    first, second = speech_of(0, 1), speech_of(1, 0)
    assert len(first) == 5 + 15
    torch.testing.assert_close(first[:5], second[15:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[5:], second[:15], atol=1e-5, rtol=1e-5)


# Training


def test_accumulated_gradients_equal_those_of_one_large_batch(world):
    model = build(world).train()
    records = records_of([0.5, 2.0, 1.1, 3.0, 0.2, 0.8])
    batches = [batch_of(model, records[n : n + 2]) for n in (0, 2, 4)]
    count = sum((batch["labels"] != IGNORE).sum() for batch in batches)
    model(**batch_of(model, records))["loss"].backward()
    wanted = gradients(model)
    for batch in batches:
        model(**batch, num_items_in_batch=count)["loss"].backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=0)


def test_only_the_projector_learns_and_only_it_is_in_training_mode(world):
    model = build(world).train()
    assert model.training
    assert all(module.training for module in model.projector.modules())
    assert not any(module.training for module in model.encoder.modules())
    dropouts = [module for module in model.llm.modules() if hasattr(module, "attention_dropout")]
    assert dropouts and not any(module.training for module in dropouts)
    model(**batch_of(model, records_of([0.5, 1.0])))["loss"].backward()
    wanted = {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert gradients(model).keys() == wanted
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
    batch = batch_of(model, records_of([0.5, 1.0]))
    assert model.train()(**batch)["loss"].item() == pytest.approx(model.eval()(**batch)["loss"].item(), abs=1e-5)


def test_gradient_checkpointing_computes_layers_twice_for_the_same_gradients(world):
    model = build(world).train()
    batch, calls = batch_of(model, records_of([0.5, 2.0])), []
    model.llm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(**batch)["loss"].backward()
    wanted = gradients(model)
    assert len(calls) == 1
    checkpoint_layers(model)
    model(**batch)["loss"].backward()
    assert len(calls) == 1 + 2
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted.pop(name), atol=1e-6, rtol=1e-5)
    assert not wanted
    model.eval()(**batch)["loss"].backward()
    assert len(calls) == 1 + 2 + 1


def test_gradient_checkpointing_keeps_less_than_half_of_the_activations(world):
    model = build(world).train()
    batch, sizes = batch_of(model, records_of([0.5, 2.0])), []

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
    batch = batch_of(model, records_of([0.5, 1.0]))
    plain = model(**batch)["loss"].item()
    model.label_smoothing = 0.1
    assert model(**batch)["loss"].item() == plain
    output = model.train()(**batch)
    wanted = F.cross_entropy(output["logits"].transpose(1, 2), batch["labels"], label_smoothing=0.1)
    assert output["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert abs(output["loss"].item() - plain) > 0.01


def test_a_few_steps_on_one_batch_bring_the_loss_down(world):
    model = build(world).train()
    batch = batch_of(model, records_of([0.5, 1.0]))
    optimizer = torch.optim.AdamW([p for p in model.saved().values()], lr=1e-3)
    losses = []
    for _ in range(15):
        losses.append(model(**batch)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


# Half precision


def test_frozen_parts_have_the_llms_dtype_and_the_projector_is_fp32(world, bf16_llm):
    model = build(world, bf16_llm)
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    model.train()(**batch_of(model, records_of([0.5, 1.0])))["loss"].backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


def test_a_bf16_llm_gives_nearly_the_loss_of_its_fp32_twin(world, bf16_llm):
    half, full = build(world, bf16_llm), build(world)
    full.llm.load_state_dict(half.llm.state_dict())
    batch = batch_of(full, records_of([0.5, 1.0, 3.0]))
    with torch.no_grad():
        assert half(**batch)["loss"].item() == pytest.approx(full(**batch)["loss"].item(), rel=0.03)


def test_a_bf16_llm_gives_nearly_the_same_loss_alone_and_in_a_batch(world, bf16_llm):
    model, records = build(world, bf16_llm), records_of([0.5, 1.0, 3.0, 0.1])
    batch = batch_of(model, records)
    with torch.no_grad():
        logits = model(**batch)["logits"]
        rows = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
        alone = torch.stack([model(**batch_of(model, [record]))["loss"] for record in records])
    torch.testing.assert_close(rows / (batch["labels"] != IGNORE).sum(1), alone, atol=0, rtol=0.05)


def test_a_bf16_llm_starts_the_same_text_alone_and_in_a_batch(world, bf16_llm):
    model, options = build(world, bf16_llm), {"num_beams": 1, "max_new_tokens": 2}  # roundings add up with each token
    together, alone = (decode_all(model, records_of(SECONDS), batch_size=n, **options) for n in (16, 1))
    assert sum(together[n] == alone[n] for n in range(16)) >= 14


# Checkpoints


def test_a_saved_model_gives_the_same_text_when_it_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    records, options = records_of([0.5, 2.0, 1.1]), {"num_beams": 4, "max_new_tokens": 12}
    assert decode_all(loaded, records, **options) == decode_all(model, records, **options)
    assert not loaded.training


def test_a_checkpoint_holds_the_projector_alone_in_fp32(world, bf16_llm, tmp_path):
    model = build(world, bf16_llm)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == {f"projector.{name}" for name in model.projector.state_dict()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_config_names_all_that_is_needed_and_may_be_overridden(world, tmp_path):
    model = build(world)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (
        written.items()
        >= {
            "model_type": "speech_llm",
            "llm_model_name_or_path": str(world / "llm"),
            "encoder_name_or_path": str(world / "whisper.pt"),
            "prompt": f"{AUDIO}\nTranscribe the speech",
            "projector": "conv1d",
            "projector_stride": 5,
            "projector_hidden_size": 64,
            "pad_to_30s": False,
            "encoder_size": 32,
            "hidden_size": 48,
        }.items()
    )
    assert {f.name for f in fields(ModelArguments)} <= written.keys()
    moved = shutil.copytree(world / "llm", tmp_path / "moved")
    loaded = SpeechLLM.from_pretrained(tmp_path, llm_model_name_or_path=str(moved))
    assert loaded.config.llm_model_name_or_path == str(moved)


def test_prompt_stride_and_padding_to_30_s_are_kept_with_the_weights(world, tmp_path):
    prompt = f"{AUDIO} Write it down."
    model = build(world, prompt=prompt, pad_to_30s=True, projector_stride=4)
    model.save_pretrained(tmp_path)
    loaded, records = SpeechLLM.from_pretrained(tmp_path), records_of([1.0])
    example = loaded.make_dataset(records)[0]
    assert example["features"][0].shape == (3000, 80)
    assert example["prompt_ids"].count(SPEECH) == 1500 // 4
    said = loaded.tokenizer.decode([token for token in example["prompt_ids"] if token != SPEECH])
    assert said == "<|im_start|>user\n Write it down.<|im_end|>\n<|im_start|>assistant\n"
    options = {"num_beams": 1, "max_new_tokens": 8}
    assert decode_all(loaded, records, **options) == decode_all(model, records, **options)


def drop(state):
    del state["projector.linear1.bias"]


def add(state):
    state["projector.linear9.bias"] = torch.zeros(3)


def reshape(state):
    state["projector.linear2.weight"] = torch.zeros(48, 65)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (drop, r"projector\.linear1\.bias is missing, wanted \(64,\)"),
        (add, r"projector\.linear9\.bias is \(3,\), wanted no such tensor"),
        (reshape, r"projector\.linear2\.weight is \(48, 65\), wanted \(48, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(model, tmp_path, change, wanted):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(InputError, match=rf"model\.safetensors: does not fit .*: {wanted}$"):
        model.load_trained(path)


def test_weights_for_other_widths_are_refused_with_both_widths(model, tmp_path):
    make_whisper(tmp_path / "whisper.pt", width=64)
    make_llm(tmp_path / "llm", width=32)
    build(tmp_path).save_pretrained(tmp_path / "run")
    with pytest.raises(InputError) as error:
        model.load_trained(tmp_path / "run" / "model.safetensors")
    message = str(error.value)
    assert "encoder width 32, LLM width 48, conv1d projector of stride 5, hidden size 64" in message
    assert "projector.conv.weight is (64, 64, 5), wanted (32, 32, 5)" in message
    assert "projector.linear2.weight is (32, 64), wanted (48, 64)" in message
    assert "\n" not in message


@pytest.mark.parametrize("harm", ["truncated", "garbage", "missing"])
def test_a_weights_file_that_cannot_be_read_is_named_and_changes_nothing(world, tmp_path, harm):
    model = build(world)
    before = {name: p.clone() for name, p in model.saved().items()}
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(whole[:-100] if harm == "truncated" else b"garbage" * 99)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot read the trained weights") as error:
        SpeechLLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert all(p.equal(before[name]) for name, p in model.saved().items())


@pytest.mark.parametrize("content", [None, "{}", '{"architectures": ["Qwen2ForCausalLM"]}', "{"])
def test_a_folder_that_is_no_checkpoint_of_ours_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: .*wanted a folder that train\.py or save_pretrained wrote"):
        SpeechLLM.from_pretrained(tmp_path)


def test_an_unknown_whisper_is_refused_with_the_known_names(world):
    with pytest.raises(
        InputError, match=r"whisper-huge: cannot load a speech encoder .*available models = .*tiny.*large-v3"
    ) as error:
        build(world, encoder="whisper-huge")
    assert "\n" not in str(error.value)


def test_a_whisper_file_that_cannot_be_read_is_named(world, tmp_path):
    (tmp_path / "torn.pt").write_bytes((world / "whisper.pt").read_bytes()[:5000])
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 99)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("torn.pt", "garbage.pt", "other.pt"):
        with pytest.raises(InputError, match=f"{name}: cannot load a speech encoder") as error:
            build(world, encoder=str(tmp_path / name))
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
    for shape, told in ((7, r"is \(7, 48\), wanted \(96, 48\)"), (0, r"is \(0, 48\), wanted .* size 0, which ZeRO-3")):
        save_file(weights | {name: weights[name][:shape].clone()}, folder / "model.safetensors", {"format": "pt"})
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
        texts = model.transcribe([noise(1), str(tmp_path / "missing.wav")])
    assert texts[0] and texts[1] == ""
    with pytest.warns(UserWarning, match=r"audio 1: .*do not fit in 824"):  # 1024 positions less 200 for the answer
        assert model.transcribe(noise(90)) == ""


def test_decoding_a_manifest_gives_every_index_once_and_the_longest_clips_first(model, world):
    dataset = model.make_dataset(Manifest(world / "corpus.jsonl"))
    batches = list(model.decode(dataset, batch_size=8, num_beams=1, max_new_tokens=4))
    assert [len(rows) for rows in batches] == [8, 8, 4]
    order = [index for rows in batches for index, _, _ in rows]
    assert sorted(order) == list(range(20))
    assert (np.diff(dataset.durations[order]) <= 0).all()
    some = [row for rows in model.decode(dataset, [3, 5], num_beams=1, max_new_tokens=4) for row in rows]
    assert sorted(some) == sorted(row for rows in batches for row in rows if row[0] in (3, 5))


def test_what_cannot_be_read_has_no_text_and_a_reason(model):
    records = records_of([1.0, 1.0])
    records[1]["wav"] = np.full(16000, np.nan)
    (rows,) = model.decode(model.make_dataset(records, on_bad="keep"), num_beams=1, max_new_tokens=4)
    (_, text, _), (_, nothing, reason) = sorted(rows)
    assert text
    assert nothing == ""
    assert reason.startswith("a:1: ") and "NaN" in reason


def test_decoding_leaves_the_model_in_the_mode_that_it_had(world):
    model = build(world)
    dataset = model.make_dataset(records_of([0.5, 1.0]))
    for mode in (True, False):
        model.train(mode)
        for _ in model.decode(dataset, batch_size=1, num_beams=1, max_new_tokens=2):
            assert not model.training
        assert model.training == mode
        next(model.decode(dataset, batch_size=1, num_beams=1, max_new_tokens=2))  # not read to its end
        assert model.training == mode


def test_the_text_ends_where_the_end_token_comes(world):
    """The vocabulary's matrix is changed so that the end token comes where the third token came before."""
    model, records = build(world), records_of([1.0])
    batch, end = batch_of(model, records, with_targets=False), model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = model.generate(**batch, num_beams=1, max_new_tokens=12)[0].tolist()
    assert end not in ids and ids[2] not in ids[:2]
    ((_, _, problem),) = next(model.decode(model.make_dataset(records), num_beams=1, max_new_tokens=12))
    assert problem == "no end within 12 new tokens"
    weight = model.llm.lm_head.weight.clone()
    weight[end] = 1.01 * weight[ids[2]]
    model.llm.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    ((_, text, problem),) = next(model.decode(model.make_dataset(records), num_beams=1, max_new_tokens=12))
    assert text == " ".join(model.tokenizer.decode(ids[:2]).split())
    assert problem is None


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
    chatty, records = build(world, llm), records_of([0.5, 1.0, 2.0])
    chatty.load_state_dict(model.state_dict())
    options = {"num_beams": num_beams, "max_new_tokens": 12}
    assert decode_all(chatty, records, **options) == decode_all(model, records, **options)


def test_a_tokenizer_without_a_pad_token_decodes_batches(world):
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    llm = make_llm(world / "llm-no-pad", tokenizer=make_tokenizer(template, eos_token="</s>"))
    model, records = build(world, llm), records_of([0.5, 2.0, 1.0])
    options = {"num_beams": 4, "max_new_tokens": 12}
    assert decode_all(model, records, **options) == decode_all(model, records, batch_size=1, **options)


def test_the_embeddings_of_a_clip_are_as_many_as_the_dataset_leaves_places_for(model):
    for frames in range(9, 64):
        lengths = torch.tensor([frames])
        speech = model.projector(
            model.encoder(torch.randn(1, frames, 80), lengths), model.encoder.output_lengths(lengths)
        )
        assert speech.shape[1] == model.speech_lengths(frames) == model.speech_lengths(lengths).item()
