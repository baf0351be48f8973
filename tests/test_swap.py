"""Any encoder, any projector, any LLM: each family is trained, decoded, and held to alone = in a batch."""

import pytest
import torch
from families import ENCODERS, LLMS
from matrix import SMALL, records, try_out
from trainable import LORA

from dataset import collate
from model import SpeechLLM
from projectors import PROJECTORS


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Folders of all families, by name."""
    folder = tmp_path_factory.mktemp("families")
    return {name: str(build(folder / name)) for name, build in {**ENCODERS, **LLMS}.items()}


def build(parts, encoder="whisper_openai", llm="qwen2", projector="conv1d", **fields) -> SpeechLLM:
    torch.manual_seed(0)
    return SpeechLLM.from_parts(parts[encoder], parts[llm], projector, **(SMALL | fields))


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_works_with_every_projector(parts, encoder, projector):
    llm = list(LLMS)[(list(ENCODERS).index(encoder) + list(PROJECTORS).index(projector)) % len(LLMS)]
    try_out(build(parts, encoder, llm, projector))


@pytest.mark.parametrize("llm", LLMS)
def test_every_llm_works_with_boundary_vectors_and_lora(parts, llm):
    try_out(build(parts, llm=llm, audio_boundary_tokens=True, lora_r=2))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_lora_on_any_encoder_reaches_its_frames_and_is_trained(parts, encoder):
    model = build(parts, encoder, encoder_lora_r=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("encoder.")}
    assert trained and all(LORA.strip("\\") in name for name in trained)
    try_out(model)
    batch = collate([model.make_dataset(records())[1]])
    with torch.no_grad():
        before = model(**batch).loss
        for name, p in model.named_parameters():
            if name in trained:
                p.normal_()
        assert not torch.isclose(model(**batch).loss, before)


@pytest.mark.parametrize("encoder", ["whisper_openai", "wav2vec2_large", "parakeet"])
def test_encoder_layer_takes_the_output_of_another_layer(parts, encoder):
    batch = collate([build(parts, encoder).make_dataset(records())[0]])
    features, lengths = batch.get("input_values", batch.get("input_features")), batch["feature_lengths"]
    last, first = (build(parts, encoder, encoder_layer=layer) for layer in (None, 1))
    assert not torch.allclose(last.encoder(features, lengths), first.encoder(features, lengths))
    assert sum(p.numel() for p in first.encoder.parameters()) < sum(p.numel() for p in last.encoder.parameters())


def test_encoder_dropout_acts_in_training_only(parts):
    model = build(parts, encoder_dropout=0.5)
    batch = collate([model.make_dataset(records())[0]])
    with torch.no_grad():
        plain = build(parts)(**batch).loss.item()
        assert model(**batch).loss.item() == plain
        assert abs(model.train()(**batch).loss.item() - plain) > 1e-3


def test_a_clip_stands_between_its_boundary_vectors(parts):
    model = build(parts, audio_boundary_tokens=True)
    example = model.make_dataset(records())[0]
    plain = build(parts).make_dataset(records())[0]
    assert len(example["prompt_ids"]) == len(plain["prompt_ids"]) + 2
    batch = collate([example])
    embeds = model.embed(batch["input_ids"], batch["input_features"], batch["feature_lengths"])[0]
    start = example["prompt_ids"].index(-2)
    torch.testing.assert_close(embeds[start], model.boundary.weight[0])
    torch.testing.assert_close(embeds[example["prompt_ids"].index(-3)], model.boundary.weight[1])
    assert all(place == -1 for place in example["prompt_ids"][start + 1 : example["prompt_ids"].index(-3)])
