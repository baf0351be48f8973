"""Hypotheses of a model for many utterances: `SpeechLLM.decode` and `SpeechLLM.transcribe`."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch.utils.data import DataLoader

from dataset import SpeechDataset, collate
from manifest import InputError


def decode(
    model,
    dataset: SpeechDataset,
    positions: Iterable[int] | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    num_beams: int = 4,
    max_new_tokens: int = 200,
    **options,
) -> Iterator[list[tuple[int, str, str | None]]]:
    """Yield a list of (index of the record, hypothesis, problem or None) for each batch, longest clips first.

    Only the examples at `positions` of the dataset (default: all). What cannot be read has an empty hypothesis.
    `options` are those of transformers' generate; with a generation_config, num_beams and max_new_tokens are its own.
    """
    if options.get("num_return_sequences", 1) > 1:
        raise ValueError("num_return_sequences: wanted 1, for each utterance has one hypothesis; see generate")
    if "generation_config" not in options:
        options |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    training = model.training
    model.eval()
    positions = range(len(dataset)) if positions is None else positions
    order = sorted(positions, key=lambda i: -dataset.durations[dataset.indices[i]])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    to_batch = partial(collate, with_targets=False)
    try:
        for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=to_batch, num_workers=num_workers):
            index, problems, _ = (batch.pop(key) for key in ("index", "bad", "labels"))
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            ids = model.generate(**batch, **options).cpu()
            stopped = torch.isin(ids, torch.tensor(model.llm.generation_config.eos_token_id)).any(1).tolist()
            texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = ["" if bad else " ".join(text.split()) for text, bad in zip(texts, problems, strict=True)]
            cut = f"no end within {ids.shape[1]} new tokens"
            problems = [bad or (None if end else cut) for bad, end in zip(problems, stopped, strict=True)]
            yield list(zip(index, texts, problems, strict=True))
    finally:  # also if the caller stops early
        model.train(training)


def to_decode(model, records: Sequence[dict], max_new_tokens: int) -> SpeechDataset:
    """The dataset of records for `decode`: every line is kept, transcripts are not looked at. Raises InputError."""
    room = model.max_length - max_new_tokens
    if room < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: the LLM has {model.max_length} positions in all")
    return model.make_dataset(records, on_bad="keep", with_targets=False, max_length=room)


def transcribe(model, audio, **options) -> str | list[str]:
    """The transcript of an audio file (or of samples (S,) at 16 kHz); of a list, the list of transcripts.

    `options` are those of `decode`. Audio that cannot be read has an empty transcript and a warning that says why.
    """
    many = isinstance(audio, (list, tuple))
    records = [{"where": f"audio {number}", "wav": a} for number, a in enumerate(audio if many else [audio], 1)]
    dataset = to_decode(model, records, options.get("max_new_tokens", 200))
    rows = sorted(chain(*decode(model, dataset, **options)))
    for index, _, problem in rows:
        if problem:
            warnings.warn(f"audio {index + 1}: {problem.removeprefix(f'audio {index + 1}: ')}", stacklevel=2)
    texts = [text for _, text, _ in rows]
    return texts if many else texts[0]
