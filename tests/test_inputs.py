"""What inputs.py promises: tensors of feature extractors and tokenizers, as users of transformers have them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE_RATE, noise
from transformers import GenerationConfig, WhisperFeatureExtractor

from manifest import SPEECH
from model import SpeechLLM

NEW = {"max_new_tokens": 8}
pytestmark = pytest.mark.filterwarnings("ignore:audio .* no end within")


def inputs_of(model: SpeechLLM, *clips: np.ndarray, **options) -> dict[str, torch.Tensor]:
    """What the feature extractor makes of clips, by the names of forward and generate."""
    options = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "return_attention_mask": True} | options
    if isinstance(model.feature_extractor, WhisperFeatureExtractor):
        options = {"padding": "max_length"} | options
    inputs = model.feature_extractor(list(clips), **{"padding": True} | options)
    return {"audio_attention_mask" if name == "attention_mask" else name: t for name, t in inputs.items()}


def ids_of(model: SpeechLLM, text: str) -> torch.Tensor:
    """Token ids (1, L)."""
    return model.tokenizer(text, return_tensors="pt").input_ids


def num_positions(model: SpeechLLM, ids: torch.Tensor, audio: dict[str, torch.Tensor]) -> int:
    """Positions of speech and text in the LLM."""
    with torch.no_grad():
        return model.inputs_for_llm(ids, **audio)["inputs_embeds"].shape[1]


def test_audio_alone_is_asked_the_models_own_prompt(any_model):
    clip = noise(1.3)
    ids = any_model.generate(**inputs_of(any_model, clip), **NEW)
    (text,) = any_model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert " ".join(text.split()) == any_model.transcribe(clip, num_beams=1, **NEW) != ""


def test_clips_of_different_length_are_the_same_alone_and_together(any_model):
    clips = [noise(0.8, 1), noise(2.1, 2)]
    together = any_model.generate(**inputs_of(any_model, *clips), num_beams=2, **NEW)
    for clip, ids in zip(clips, together, strict=True):
        alone = any_model.generate(**inputs_of(any_model, clip), num_beams=2, **NEW)[0]
        assert ids[: len(alone)].equal(alone)


def test_audio_goes_before_prompt_ids_or_where_they_say(any_model):
    audio, prompt = inputs_of(any_model, noise(1.2)), ids_of(any_model, "hello world")
    count = any_model.num_embeddings(int(audio["audio_attention_mask"].sum()))
    speech = torch.full((1, count), SPEECH)
    before, behind = torch.cat([speech, prompt], 1), torch.cat([prompt, speech], 1)
    answer = any_model.generate(**audio, input_ids=prompt, **NEW)
    assert any_model.generate(**audio, input_ids=before, **NEW).equal(answer)
    with torch.no_grad():
        last = [any_model(**audio, input_ids=ids).logits[:, -1] for ids in (before, behind)]
    assert not torch.allclose(*last)


def test_forward_gives_loss_and_logits_of_text_after_audio(any_model):
    text = any_model.tokenizer(["hello world", "transcribe"], return_tensors="pt", padding=True)
    labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
    outputs = any_model(**inputs_of(any_model, noise(1.2, 1), noise(0.7, 2)), **text, labels=labels)
    assert outputs.logits.shape == (*labels.shape, any_model.llm.config.vocab_size)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits.transpose(1, 2), labels))
    alone = any_model(**inputs_of(any_model, noise(1.2, 1)), input_ids=text.input_ids[:1], labels=labels[:1])
    said = labels[0] != -100
    torch.testing.assert_close(alone.logits[0][said], outputs.logits[0][said], atol=1e-4, rtol=0)


def test_every_option_of_generate_works(any_model):
    audio = inputs_of(any_model, noise(1.2))
    greedy = any_model.generate(**audio, **NEW)
    assert any_model.generate(**audio, num_beams=4, num_return_sequences=2, **NEW).shape[0] == 2
    torch.manual_seed(0)
    assert not any_model.generate(**audio, do_sample=True, temperature=5.0, **NEW).equal(greedy)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=any_model.llm.generation_config.eos_token_id)
    assert any_model.generate(**audio, generation_config=config).equal(greedy[:, :3])
    once = any_model.generate(**audio, no_repeat_ngram_size=1, **NEW)[0].tolist()
    assert len(set(once)) == len(once)


def test_answers_are_the_same_in_the_middle_of_training(any_model):
    audio = inputs_of(any_model, noise(0.9, 7))
    answer = any_model.generate(**audio, **NEW)
    getattr(any_model, "activation_checkpointing_enable", any_model.gradient_checkpointing_enable)()
    any_model.train()
    assert any_model.generate(**audio, **NEW).equal(answer)
    assert any_model.training
    any_model.eval()


def test_labels_of_all_positions_train_all_but_the_first(any_model):
    audio, ids = inputs_of(any_model, noise(1.0)), ids_of(any_model, "hello world")
    length = num_positions(any_model, ids, audio)
    of_all = F.pad(ids, (length - ids.shape[1], 0), value=-100)
    wanted = any_model(**audio, input_ids=ids, labels=ids)
    outputs = any_model(**audio, input_ids=ids, labels=of_all)
    torch.testing.assert_close(outputs.loss, wanted.loss)
    assert outputs.logits.shape[1] == length - 1


def test_padding_of_text_on_either_side_changes_nothing(any_model):
    audio, ids = inputs_of(any_model, noise(1.2)), ids_of(any_model, "hello world")
    ones = torch.ones_like(ids)
    answer, loss = any_model.generate(**audio, input_ids=ids, **NEW), any_model(**audio, input_ids=ids, labels=ids).loss
    for sides in ((3, 0), (0, 3)):  # left, right
        padded = {"input_ids": F.pad(ids, sides), "attention_mask": F.pad(ones, sides)}
        labels = F.pad(ids, sides, value=-100)
        torch.testing.assert_close(any_model(**audio, **padded, labels=labels).loss, loss)
        assert any_model.generate(**audio, **padded, **NEW).equal(answer)


def test_audio_of_half_precision_keeps_its_length(any_model):
    audio, ids = inputs_of(any_model, noise(2.031)), ids_of(any_model, "hello")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in audio.items()}
    assert num_positions(any_model, ids, half) == num_positions(any_model, ids, audio)
    half.pop("audio_attention_mask"), audio.pop("audio_attention_mask")
    assert num_positions(any_model, ids, half) == num_positions(any_model, ids, audio)


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


def test_the_other_kind_of_audio_is_told_which_is_wanted(any_model):
    takes_samples = "input_values" in inputs_of(any_model, noise(1.0))
    other = {"input_features": torch.ones(1, 80, 80)} if takes_samples else {"input_values": torch.ones(1, 800)}
    told = "wanted input_values .*takes samples" if takes_samples else "wanted input_features: .*takes features"
    with pytest.raises(ValueError, match=told):
        any_model(**other)


def test_tensors_of_another_shape_are_told_the_right_one(any_model):
    audio = inputs_of(any_model, noise(1.0), noise(0.8))
    mask, (name,) = audio.pop("audio_attention_mask"), audio
    ids = ids_of(any_model, "hello world").repeat(2, 1)
    length = num_positions(any_model, ids, audio)
    for wrong, told in (
        ({name: audio[name][0]}, f"{name}: found shape .*, wanted \\(A, "),
        ({name: audio[name].unsqueeze(1)}, f"{name}: found shape .*, wanted \\(A, "),
        ({"audio_attention_mask": mask[:1]}, "audio_attention_mask: found shape"),
        ({"input_ids": ids[0]}, r"input_ids: found shape .*, wanted \(B, L\)"),
        ({"attention_mask": torch.ones(2, 1)}, "attention_mask: found shape"),
        ({"audio_attention_mask": mask.flip(1)}, "audio_attention_mask: found padding before audio"),
        ({"audio_attention_mask": torch.zeros_like(mask)}, "clip 1 is too short for a single speech embedding"),
        ({"labels": ids[:1]}, r"labels: found shape .*, .* \(2, "),
        ({"labels": ids.new_zeros(2, length + 1)}, rf"labels: found shape .* \(2, {length}\)"),
    ):
        with pytest.raises(ValueError, match=told):
            any_model(**{**audio, "input_ids": ids, **wrong})


def test_boundary_vectors_stand_around_a_clip_of_raw_tensors_too(world):
    torch.manual_seed(0)
    parts = str(world / "whisper.pt"), str(world / "llm")
    model = SpeechLLM.from_parts(*parts, projector_hidden_size=64, audio_boundary_tokens=True)
    plain = SpeechLLM.from_parts(*parts, projector_hidden_size=64)
    audio, ids = inputs_of(model, noise(1.0)), ids_of(model, "hello")
    assert num_positions(model, ids, audio) == num_positions(plain, ids, audio) + 2
    clip = noise(1.3)
    (text,) = model.tokenizer.batch_decode(model.generate(**inputs_of(model, clip), **NEW), skip_special_tokens=True)
    assert " ".join(text.split()) == model.transcribe(clip, num_beams=1, **NEW)
