"""The Python object: from parts, forward, generate, conversations, a plain training loop; as SpeechLM's users do."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
from families import ENCODERS, LLMS
from prompt import SPEECH
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel

from dataset import collate
from manifest import InputError, Manifest
from model import SpeechLLM, SpeechLLMConfig

NEW = {"max_new_tokens": 8}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


@pytest.fixture(scope="module", params=["wav2vec2_large", "whisper_openai", "w2v_bert"])
def any_model(request, tmp_path_factory) -> SpeechLLM:
    folder = tmp_path_factory.mktemp("parts")
    encoder, llm = ENCODERS[request.param](folder / "encoder"), LLMS["qwen3"](folder / "llm")
    torch.manual_seed(0)
    return SpeechLLM.from_parts(
        encoder=str(encoder), llm=str(llm), projector="mlp", projector_hidden_size=32, encoder_dropout=0.1
    )


def inputs_of(model, *clips: np.ndarray) -> dict[str, torch.Tensor]:
    """What the feature extractor makes of clips, by the names of forward and generate."""
    kwargs = {"sampling_rate": 16000, "return_tensors": "pt", "padding": True, "return_attention_mask": True}
    if "Whisper" in type(model.feature_extractor).__name__:
        kwargs["padding"] = "max_length"
    inputs = model.feature_extractor(list(clips), **kwargs)
    mask = inputs.pop("attention_mask")
    return dict(inputs) | {"audio_attention_mask": mask}


def test_it_is_a_pretrained_model_with_feature_extractor_and_tokenizer(any_model):
    assert isinstance(any_model, PreTrainedModel) and isinstance(any_model.config, SpeechLLMConfig)
    assert any_model.config.projector == "mlp" and any_model.config.encoder_dropout == 0.1
    assert any_model.feature_extractor.sampling_rate == 16000
    assert any_model.tokenizer.decode(any_model.tokenizer("hello").input_ids) == "hello"
    assert any_model.num_parameters(only_trainable=True) == sum(p.numel() for p in any_model.projector.parameters())


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match="unknown field 'projection_hidden_size'; did you mean projector_hidden_size"):
        SpeechLLM.from_parts(encoder="tiny", llm="llm", projection_hidden_size=1024)


def test_an_unknown_projector_is_told_the_known_ones(world):
    with pytest.raises(InputError, match=r"projector 'perceiver': wanted one of \['conformer', 'conv1d'"):
        SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / "llm"), projector="perceiver")


def test_audio_alone_is_asked_the_models_own_prompt(any_model):
    clip = noise(1.3)
    ids = any_model.generate(**inputs_of(any_model, clip), **NEW)
    (found,) = any_model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    if "Whisper" not in type(any_model.feature_extractor).__name__:  # whose own features are padded to 30 s
        with pytest.warns(UserWarning, match="no end within 8") if "<" not in found else pytest.warns():
            assert " ".join(found.split()) == any_model.transcribe(clip, num_beams=1, **NEW)


def test_clips_of_different_length_are_the_same_alone_and_together(any_model):
    clips = [noise(0.8, 1), noise(2.1, 2)]
    together = any_model.generate(**inputs_of(any_model, *clips), num_beams=2, **NEW)
    for clip, ids in zip(clips, together, strict=True):
        assert any_model.generate(**inputs_of(any_model, clip), num_beams=2, **NEW)[0].equal(ids[: len(ids)])


def test_audio_goes_before_prompt_ids_or_where_they_say(any_model):
    audio = inputs_of(any_model, noise(1.2))
    prompt = any_model.tokenizer("hello world", return_tensors="pt").input_ids
    count = any_model.speech_lengths(int(audio["audio_attention_mask"].sum()))
    placed = torch.cat([torch.full((1, count), SPEECH), prompt], 1)
    assert any_model.generate(**audio, input_ids=prompt, **NEW).equal(
        any_model.generate(**audio, input_ids=placed, **NEW)
    )
    elsewhere = torch.cat([prompt, torch.full((1, count), SPEECH)], 1)
    with torch.no_grad():
        assert not torch.allclose(
            any_model(**audio, input_ids=placed).logits[:, -1], any_model(**audio, input_ids=elsewhere).logits[:, -1]
        )


def test_forward_gives_loss_and_logits_of_text_after_audio(any_model):
    text = any_model.tokenizer(["hello world", "transcribe"], return_tensors="pt", padding=True)
    labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
    audio = inputs_of(any_model, noise(1.2, 1), noise(0.7, 2))
    outputs = any_model(**audio, **text, labels=labels)
    assert outputs.logits.shape == (*labels.shape, any_model.llm.config.vocab_size)
    wanted = torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), labels)
    torch.testing.assert_close(outputs.loss, wanted)
    alone = any_model(**inputs_of(any_model, noise(1.2, 1)), input_ids=text.input_ids[:1], labels=labels[:1])
    torch.testing.assert_close(
        alone.logits[0][labels[0] != -100], outputs.logits[0][labels[0] != -100], atol=1e-4, rtol=0
    )


def test_every_option_of_generate_works(any_model):
    audio = inputs_of(any_model, noise(1.2))
    greedy = any_model.generate(**audio, **NEW)
    assert any_model.generate(**audio, num_beams=4, num_return_sequences=2, **NEW).shape[0] == 2
    torch.manual_seed(0)
    assert any_model.generate(**audio, do_sample=True, temperature=5.0, **NEW).shape[0] == 1
    config = GenerationConfig(max_new_tokens=3, eos_token_id=any_model.llm.generation_config.eos_token_id)
    assert any_model.generate(**audio, generation_config=config).equal(greedy[:, :3])
    once = any_model.generate(**audio, no_repeat_ngram_size=1, **NEW)[0].tolist()
    assert len(set(once)) == len(once)


@pytest.fixture
def files(tmp_path) -> list[str]:
    for seed in range(3):
        soundfile.write(tmp_path / f"{seed}.wav", noise(0.7 + 0.4 * seed, seed), 16000, subtype="FLOAT")
    return [str(tmp_path / f"{seed}.wav") for seed in range(3)]


def ask(content: str, *audio) -> dict:
    return {"role": "user", "content": content, "audio": list(audio)}


def test_conversations_are_answered_together_as_alone(any_model, files):
    prompts = [
        [ask("Transcribe the following: <audio>", files[0])],
        [ask("<audio> and <audio>", files[1], files[2])],
        [ask("<audio>", noise(0.9, 7)), {"role": "assistant", "content": "hello"}, ask("and <audio>", files[0])],
    ]
    together = any_model.generate(prompts=prompts, num_beams=4, **NEW)
    assert together.shape[0] == 3
    for prompt, ids in zip(prompts, together, strict=True):
        alone = any_model.generate(prompts=[prompt], num_beams=4, **NEW)[0]
        assert ids[: len(alone)].equal(alone)


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([ask("<audio> and <audio>", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("no place", noise(1))], "prompt 1: 0 <audio> in the prompt for 1 audio clips"),
        ([ask("<audio> <audio>", noise(1)), ask("and", noise(1))], "prompt 1: 2 <audio> in a turn with 1 audio clips"),
        ([ask("<audio>", "nowhere.wav")], "prompt 1: nowhere.wav: no such file"),
        ([ask("<audio>", noise(0.001))], "prompt 1: .*too short"),
    ],
)
def test_a_conversation_that_does_not_add_up_is_an_error(any_model, turns, told):
    with pytest.raises(InputError, match=told):
        any_model.generate(prompts=[turns], **NEW)


def test_an_answer_is_not_asked_for_after_an_answer(any_model):
    with pytest.raises(ValueError, match="last turn is the user's"):
        any_model.generate(prompts=[[ask("<audio>", noise(1)), {"role": "assistant", "content": "hello"}]], **NEW)


def test_counts_and_inputs_that_do_not_fit_are_errors(any_model):
    audio = inputs_of(any_model, noise(1.0), noise(1.0))
    with pytest.raises(ValueError, match=r"1 rows of input_ids for 2 clips"):
        any_model(**audio, input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"2 speech positions in the prompts, .* speech embeddings"):
        any_model(**audio, input_ids=torch.tensor([[SPEECH, 5], [SPEECH, 5]]))
    with pytest.raises(ValueError, match=r"wanted audio: input_values or input_features"):
        any_model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wanted audio: input_values or input_features"):
        any_model(input_values=torch.ones(1, 800), input_features=torch.ones(1, 80, 80))


def test_tensors_of_another_shape_are_told_the_right_one(any_model):
    audio = inputs_of(any_model, noise(1.0), noise(0.8))
    mask, (name,) = audio.pop("audio_attention_mask"), audio
    ids = any_model.tokenizer("hello world", return_tensors="pt").input_ids.repeat(2, 1)
    length = any_model.inputs_for_llm(ids, **audio)["inputs_embeds"].shape[1]
    for wrong, told in (
        ({name: audio[name][0]}, f"{name}: found shape .*, wanted \\(A, "),
        ({name: audio[name].unsqueeze(1)}, f"{name}: found shape .*, wanted \\(A, "),
        ({"audio_attention_mask": mask[:1]}, "audio_attention_mask: found shape"),
        ({"feature_lengths": torch.ones(3).long()}, r"feature_lengths: found shape \(3,\), wanted \(2\)|wanted \(A"),
        ({"input_ids": ids[0]}, r"input_ids: found shape .*, wanted \(B, L\)"),
        ({"attention_mask": torch.ones(2, 1)}, "attention_mask: found shape"),
        ({"audio_attention_mask": mask.flip(1)}, "audio_attention_mask: found padding before audio"),
        ({"audio_attention_mask": torch.zeros_like(mask)}, "clip 1 is too short for a single speech embedding"),
        ({"labels": ids[:1]}, r"labels: found shape .*, wanted \(2, K\)"),
        ({"labels": ids.new_zeros(2, length + 1)}, f"labels: found shape .* for {length} positions"),
    ):
        with pytest.raises(ValueError, match=told):
            any_model(**{**audio, "input_ids": ids, **wrong})


def test_labels_of_all_positions_train_all_but_the_first(any_model):
    audio = inputs_of(any_model, noise(1.0))
    ids = any_model.tokenizer("hello world", return_tensors="pt").input_ids
    length = any_model.inputs_for_llm(ids, **audio)["inputs_embeds"].shape[1]
    whole = torch.cat([torch.full((1, length - ids.shape[1]), -100), ids], 1)
    wanted = any_model(**audio, input_ids=ids, labels=ids)
    found = any_model(**audio, input_ids=ids, labels=whole)
    torch.testing.assert_close(found.loss, wanted.loss)
    assert found.logits.shape[1] == length - 1


def test_a_plain_training_loop_learns(any_model, world):
    torch.manual_seed(0)
    dataset = any_model.make_dataset(Manifest(str(world / "corpus.jsonl")))
    optimizer = torch.optim.AdamW((p for p in any_model.parameters() if p.requires_grad), lr=3e-3)
    any_model.train()
    losses = []
    for _ in range(3):
        for batch in DataLoader(dataset, batch_size=5, collate_fn=collate):
            optimizer.zero_grad()
            loss = any_model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    any_model.eval()
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_a_dataset_takes_no_model_along_to_the_processes_that_load_data(any_model, world):
    """They are started afresh on some systems, and everything that they need is sent to them."""
    dataset = any_model.make_dataset(Manifest(str(world / "corpus.jsonl")))
    assert len(pickle.dumps(dataset)) < 3e6
    loader = DataLoader(dataset, batch_size=5, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for batch, again in zip(loader, DataLoader(dataset, batch_size=5, collate_fn=collate), strict=True):
        assert batch["input_ids"].equal(again["input_ids"])


def test_padding_of_text_on_either_side_changes_nothing(any_model):
    audio, pad = inputs_of(any_model, noise(1.2)), torch.zeros(1, 3, dtype=torch.long)
    ids = any_model.tokenizer("hello world", return_tensors="pt").input_ids
    ones, ignored = torch.ones_like(ids), torch.full_like(pad, -100)
    loss = any_model(**audio, input_ids=ids, labels=ids).loss
    left = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, ones], 1)}
    right = {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([ones, pad], 1)}
    torch.testing.assert_close(any_model(**audio, **left, labels=torch.cat([ignored, ids], 1)).loss, loss)
    torch.testing.assert_close(any_model(**audio, **right, labels=torch.cat([ids, ignored], 1)).loss, loss)
    answer = any_model.generate(**audio, input_ids=ids, **NEW)
    assert any_model.generate(**audio, **left, **NEW).equal(answer)
    assert any_model.generate(**audio, **right, **NEW).equal(answer)


def test_audio_of_half_precision_keeps_its_length(any_model):
    audio = inputs_of(any_model, noise(2.031))
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in audio.items()}
    ids = any_model.tokenizer("hello", return_tensors="pt").input_ids
    wanted = any_model.inputs_for_llm(ids, **audio)["inputs_embeds"].shape
    assert any_model.inputs_for_llm(ids, **half)["inputs_embeds"].shape == wanted
    half.pop("audio_attention_mask"), audio.pop("audio_attention_mask")
    wanted = any_model.inputs_for_llm(ids, **audio)["inputs_embeds"].shape
    assert any_model.inputs_for_llm(ids, **half)["inputs_embeds"].shape == wanted


def test_answers_are_the_same_in_the_middle_of_training(any_model):
    prompts = [[ask("<audio>", noise(0.9, 7))]]
    wanted = any_model.generate(prompts=prompts, **NEW)
    getattr(any_model, "activation_checkpointing_enable", any_model.gradient_checkpointing_enable)()
    any_model.train()
    assert any_model.generate(prompts=prompts, **NEW).equal(wanted)
    assert any_model.training
    any_model.eval()


@pytest.mark.parametrize("prompts", [[[]], [ask("<audio>")], [["<audio>"]]])
def test_prompts_of_another_shape_are_told_the_right_one(any_model, prompts):
    with pytest.raises(ValueError, match="wanted a list of turns"):
        any_model.generate(prompts=prompts, **NEW)


def test_one_clip_of_a_turn_may_stand_without_its_list(any_model, files):
    turn, path = {"role": "user", "content": "<audio> What?"}, str(files[0])
    wanted = any_model.generate(prompts=[[turn | {"audio": [path]}]], **NEW)
    assert any_model.generate(prompts=[[turn | {"audio": path}]], **NEW).equal(wanted)
    assert any_model.generate(prompts=[[turn | {"audio": noise(1.0)}]], **NEW).shape[0] == 1


def test_prompts_that_are_none_or_no_text_are_told(any_model):
    with pytest.raises(ValueError, match="wanted prompts, found none"):
        any_model.generate(prompts=[], **NEW)
    for turn in ({"role": "user", "content": [{"type": "audio"}]}, {"content": "<audio>"}):
        with pytest.raises(InputError, match=r"prompt 1: \{.*; wanted texts in 'role', 'content'"):
            any_model.generate(prompts=[[turn]], **NEW)


def test_a_conversation_without_audio_is_told_so(any_model):
    with pytest.raises(InputError, match="no audio in the conversation"):
        any_model.generate(prompts=[[{"role": "user", "content": "hello"}]], **NEW)
