"""What must come out the same, in each encoder and projector family, and figures that no new dependency may change.

Elsewhere: frames alone and in a batch, saved and loaded (test_encoders.py), embeddings alone and in a batch
(test_projectors.py), losses and texts alone and in a batch in every pair (test_model.py), real processes, kills and
resumes of the commands with one pair (test_train.py, test_recognize.py, test_kills.py).
"""

import math
from pathlib import Path

import pytest
import torch
from families import ENCODERS, LLMS
from trials import SMALL, decode, examples_of, losses, records

from dataset import collate
from model import SpeechLLM

FAMILIES = {  # name -> encoder, projector
    "Whisper": ("whisper_hf", "conv1d"),
    "wav2vec 2.0": ("wav2vec2_base", "conv1d"),
    "HuBERT": ("hubert_large", "conv1d"),
    "WavLM": ("wavlm_large", "conv1d"),
    "W2V-BERT": ("w2v_bert", "conv1d"),
    "Parakeet": ("parakeet", "conv1d"),
    "linear": ("whisper_openai", "linear"),
    "mlp": ("whisper_openai", "mlp"),
    "conformer": ("whisper_openai", "conformer"),
    "qformer": ("whisper_openai", "qformer"),
}
PINNED = {  # name -> loss, and the logits of three tokens at the last position
    "Whisper": [6.42791, -0.04215, -0.61902, 0.07065],
    "wav2vec 2.0": [6.01115, -0.2745, -0.28789, 0.20045],
    "HuBERT": [6.22156, 1.08812, 0.97212, 1.37397],
    "WavLM": [6.67241, -0.49163, 0.33631, -0.09351],
    "W2V-BERT": [10.61463, 4.861, 8.28011, -4.81288],
    "Parakeet": [7.71434, 1.82838, 0.56316, -1.61392],
    "linear": [6.72956, -0.16058, -0.61514, 0.18568],
    "mlp": [6.53258, -0.06134, -0.62183, 0.08945],
    "conformer": [6.60221, -0.07125, -0.62218, 0.09911],
    "qformer": [6.55762, -0.05929, -0.61483, 0.08713],
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return str(LLMS["qwen2"](tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, llm, tmp_path_factory) -> tuple[str, SpeechLLM]:
    """A name of FAMILIES, and a model of that family with weights that no random number decides."""
    encoder, projector = FAMILIES[request.param]
    path = ENCODERS[encoder](tmp_path_factory.mktemp("encoder") / "encoder")
    model = SpeechLLM.from_parts(str(path), llm, projector=projector, **SMALL, projector_stride=4)
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            waves = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * (0.7 + 0.01 * number) + number)
            is_scale = tensor.ndim == 1 and not name.endswith("bias")  # of a norm, or a variance
            tensor.copy_((waves * 0.3 + is_scale).view(tensor.shape))
    return request.param, model


def gradients(model: SpeechLLM, batches: list[list[dict]]) -> list[torch.Tensor]:
    """Of the projector, summed over batches as over the processes of a step."""
    model.zero_grad()
    num_items = sum(len(example["target_ids"]) for batch in batches for example in batch)
    for batch in batches:
        model(**collate(batch), num_items_in_batch=num_items).loss.backward()
    return [p.grad.clone() for p in model.projector.parameters()]


def test_a_step_of_two_processes_is_that_of_one(family):
    _, model = family
    examples = examples_of(model, (0.9, 2.3, 0.5, 1.4))
    for whole, shared in zip(
        gradients(model, [examples]), gradients(model, [examples[::2], examples[1::2]]), strict=True
    ):
        assert (whole - shared).norm() <= 1e-4 * whole.norm() + 1e-7


def test_two_processes_decode_what_one_decodes(family):
    _, model = family
    dataset = model.make_dataset(records((0.9, 2.3, 0.5, 1.4)), with_targets=False)
    options = {"num_beams": 1, "max_new_tokens": 4}
    shares = [h for rank in (0, 1) for batch in model.decode(dataset, range(rank, 4, 2), **options) for h in batch]
    assert [h.text for h in sorted(shares, key=lambda h: h.index)] == decode(model, dataset, **options)


def test_one_beam_takes_the_likeliest_token_each_time(family):
    _, model = family
    batch = model.tensors_of(collate(examples_of(model), with_targets=False))
    ids = model.generate(**batch, num_beams=1, max_new_tokens=4)
    with torch.no_grad():
        inputs = model.inputs_for_llm(**batch)
        embeds, mask, ends = inputs["inputs_embeds"], inputs["attention_mask"], model.llm.generation_config.eos_token_id
        has_ended = torch.zeros(len(mask), dtype=torch.bool)
        for column in ids.T:  # without a cache
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, -1]
            assert (has_ended | (logits.argmax(1) == column)).all()
            has_ended |= torch.isin(column, torch.tensor(ends))
            embeds = torch.cat([embeds, model.get_input_embeddings()(column)[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def trained(model: SpeechLLM, folder: Path, pause: bool) -> list[torch.Tensor]:
    """The projector after three steps of AdamW, with all written to a folder and read back after two, if asked."""
    examples = examples_of(model)
    optimizer = torch.optim.AdamW(model.projector.parameters(), 1e-2)
    for step in range(3):
        if pause and step == 2:
            model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            model = SpeechLLM.from_pretrained(folder)
            optimizer = torch.optim.AdamW(model.projector.parameters(), 1e-2)
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
        optimizer.zero_grad()
        model.train()
        model(**collate(examples)).loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.projector.parameters()]


def test_a_saved_model_is_the_loaded_one_and_goes_on_as_one_that_never_stopped(family, tmp_path):
    _, model = family
    model.encoder.save_pretrained(tmp_path / "encoder")  # `family` has changed its frozen weights
    model.llm.save_pretrained(tmp_path / "llm")
    model.tokenizer.save_pretrained(tmp_path / "llm")
    model.config.encoder_name_or_path, model.config.llm_model_name_or_path = f"{tmp_path}/encoder", f"{tmp_path}/llm"
    model.save_pretrained(tmp_path / "run")
    first, second = SpeechLLM.from_pretrained(tmp_path / "run"), SpeechLLM.from_pretrained(tmp_path / "run")
    assert losses(first, examples_of(first)) == losses(model, examples_of(model))
    whole, resumed = trained(first, tmp_path, False), trained(second, tmp_path / "run", True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def figures(model: SpeechLLM) -> list[float]:
    """The loss of a tone that rises, and the logits of three tokens at the last position."""
    seconds = torch.arange(20_000) / 16_000
    samples = (0.3 * torch.sin(2 * math.pi * (200 + 300 * seconds) * seconds)).numpy()
    batch = collate(list(model.make_dataset([{"wav": samples, "txt": "hello world", "where": "here"}])))
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return [output.loss.item(), *output.logits[0, -1, [5, 50, 150]].tolist()]


def test_the_figures_of_a_fixed_model_are_those_of_yesterday(family):
    """In fp32 on a CPU. If a new version of a library changes them, find out why before you change the numbers."""
    name, model = family
    assert figures(model) == pytest.approx(PINNED[name], rel=1e-4, abs=1e-4)
