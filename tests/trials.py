"""One trial of a model, whatever its parts: it is trained for a step and decoded, and clips do not hear each other."""

import numpy as np
import torch
import torch.nn.functional as F
from conftest import CHATML, noise

from dataset import SpeechDataset, collate
from model import DecodingOptions, SpeechLLM

SMALL = {"projector_hidden_size": 32, "projector_num_layers": 2}
EIGHT_CLIPS = (0.5, 1.0, 2.0, 0.3, 1.5, 3.0, 0.7, 2.5)  # seconds
VARIANTS = {  # of a model that is saved and loaded
    "as it comes": {},
    "LoRA on the LLM": {"lora_r": 4},
    "LoRA on all layers": {"lora_r": 2, "encoder_lora_r": 3, "lora_target_modules": ["all-linear"]},
    "vectors around a clip": {"audio_boundary_tokens": True},
    "a template of its own": {"chat_template": CHATML.replace("user", "human"), "system_prompt": "Zwölf | Wörter"},
    "a layer in the middle": {"encoder_layer": 2},
    "an encoder that is trained": {"freeze_params": [r"^llm\."]},
}


def records(seconds: tuple[float, ...] = (0.9, 2.3, 0.5)) -> list[dict]:
    """Records of noise, with short transcripts."""
    texts = ["hello", "hello world", "transcribe the speech", "the user"]
    return [{"where": f"a:{n}", "wav": noise(s, n), "txt": texts[n % 4]} for n, s in enumerate(seconds)]


def examples_of(model: SpeechLLM, seconds: tuple[float, ...] = (0.9, 2.3, 0.5)) -> list[dict]:
    return list(model.make_dataset(records(seconds)))


def losses(model: SpeechLLM, examples: list[dict]) -> list[float]:
    """Of each example, summed over its tokens, when these stand in one batch."""
    batch = collate(examples)
    with torch.no_grad():
        logits = model(**batch).logits
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1).tolist()


def decode(model: SpeechLLM, dataset: SpeechDataset, batch_size: int = 16, **options) -> list[str]:
    """The texts of a dataset, in its order."""
    options = {"num_beams": 2, "max_new_tokens": 5} | options
    hypotheses = sum(model.decode(dataset, batch_size=batch_size, **options), [])
    return [hypothesis.text for hypothesis in sorted(hypotheses, key=lambda hypothesis: hypothesis.index)]


def texts(model: SpeechLLM, examples: list[dict]) -> list[str]:
    """The first tokens of the answers to examples in one batch, by beam search."""
    options, dataset = DecodingOptions(num_beams=2, max_new_tokens=3), model.make_dataset(records())
    hypotheses = model.decode_batch(collate(examples, with_targets=False), dataset, options)
    return [hypothesis.text for hypothesis in hypotheses]


def try_out(model: SpeechLLM) -> None:
    """Train a model for one step and decode every clip; assert that none depends on the others in its batch."""
    examples = examples_of(model)
    model.train()
    model(**collate(examples)).loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unreached, f"no gradient reaches {unreached}"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen weight has a gradient"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.eval()
    together, alone = losses(model, examples), [losses(model, [example])[0] for example in examples]
    np.testing.assert_allclose(together, alone, rtol=1e-4, err_msg="losses in a batch and alone")
    together, alone = texts(model, examples), [texts(model, [example])[0] for example in examples]
    assert together == alone, f"texts in a batch {together} and alone {alone}"
