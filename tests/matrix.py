"""Every encoder with every LLM and every projector, tiny and random: trained for a step, decoded, alone = in a batch.

python tests/matrix.py  # the table of README.md
"""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from families import ENCODERS, LLMS
from transformers.utils import logging

from dataset import collate
from model import SpeechLLM
from projectors import PROJECTORS

SMALL = {"projector_hidden_size": 32, "projector_num_layers": 2}
SECONDS = (0.9, 2.3, 0.5)


def records() -> list[dict]:
    random, texts = np.random.default_rng(0), ("hello", "hello world", "the user")
    noise = [random.normal(0, 0.1, round(16000 * s)).astype(np.float32) for s in SECONDS]
    return [
        {"where": f"a:{n}", "wav": wav, "txt": text} for n, (wav, text) in enumerate(zip(noise, texts, strict=True))
    ]


def losses(model: SpeechLLM, examples: list[dict]) -> list[float]:
    """Of each example, summed over its tokens, when these stand in one batch."""
    batch = collate(examples)
    with torch.no_grad():
        logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1).tolist()


def try_out(model: SpeechLLM) -> None:
    """One step of training, a beam search of every clip; assert that neither depends on the others in the batch."""
    dataset = model.make_dataset(records())
    examples = [dataset[i] for i in range(len(dataset))]
    model.train()
    loss = model(**collate(examples)).loss
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unreached, f"no gradient reaches {unreached}"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen weight has a gradient"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.eval()
    together, alone = losses(model, examples), [losses(model, [example])[0] for example in examples]
    np.testing.assert_allclose(together, alone, rtol=1e-4, err_msg="losses in a batch and alone")
    texts = [decode(model, dataset, batch_size) for batch_size in (3, 1)]
    assert texts[0] == texts[1], f"texts in a batch and alone: {texts}"


def decode(model: SpeechLLM, dataset, batch_size: int) -> list[str]:
    rows = model.decode(dataset, batch_size=batch_size, num_beams=2, max_new_tokens=5)
    return [text for _, text, _ in sorted(row for batch in rows for row in batch)]


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print("| encoder |", *(f"{llm} |" for llm in LLMS))
    print("|---|" + "---|" * len(LLMS))
    with tempfile.TemporaryDirectory() as folder:
        llms = {name: str(build(Path(folder, name))) for name, build in LLMS.items()}
        for encoder, build in ENCODERS.items():
            path, cells = str(build(Path(folder, encoder))), []
            for llm in LLMS:
                works = []
                for projector in PROJECTORS:
                    torch.manual_seed(0)
                    try_out(SpeechLLM.from_parts(path, llms[llm], projector, **SMALL))
                    works.append(projector)
                cells.append(f"{len(works)} of {len(PROJECTORS)}")
            print(f"| {encoder} |", *(f"{cell} |" for cell in cells), flush=True)
    print(f"\nprojectors: {', '.join(PROJECTORS)}")


if __name__ == "__main__":
    main()
