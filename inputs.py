"""What the LLM is given, from audio and text in any form: `SpeechLLM.inputs_for_llm`, and conversations."""

import json

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from dataset import collate, pad_left, speech_ids
from manifest import BadUtterance, wrong_turns
from prompt import SPEECH, conversation, render_prompt

AUDIO_INPUTS = ("input_values", "input_features", "feature_lengths", "audio_attention_mask")


def inputs_for_llm(
    model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    input_values: Tensor | None = None,
    input_features: Tensor | None = None,
    feature_lengths: Tensor | None = None,
    audio_attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """inputs_embeds (B, L, H), attention_mask (B, L) of text and audio, in any of these forms:

    a batch of `collate`, whose input_ids hold placeholders for the speech; or what the model's feature_extractor
    returns, its mask as audio_attention_mask, one clip a row, which goes before input_ids, or into the model's prompt.
    Raises ValueError where shapes, or the counts of clips, rows or placeholders, do not fit.
    """
    given = [tensor for tensor in (input_values, input_features) if tensor is not None]
    if len(given) != 1:
        raise ValueError("wanted audio: input_values or input_features, as model.feature_extractor returns them")
    (features,) = given
    if attention_mask is None and input_ids is not None:
        attention_mask = torch.ones_like(input_ids)
    if input_ids is not None:
        want("input_ids", input_ids, "B", "L")
        want("attention_mask", attention_mask, *input_ids.shape)
    if feature_lengths is None and isinstance(model.feature_extractor, WhisperFeatureExtractor):
        want("input_features", features, "A", *model.feature_shape, "F")
        features = features.transpose(1, 2)  # (A, M, F) -> (A, F, M)
    want(model.encoder.input_name, features, "A", "F" if model.feature_shape else "S", *model.feature_shape)
    if feature_lengths is None:
        mask = audio_attention_mask
        full = torch.full((len(features),), features.shape[1], device=features.device)
        if mask is not None:
            want("audio_attention_mask", mask, *features.shape[:2])
            if (mask.long().diff(dim=1) > 0).any():
                raise ValueError(
                    "audio_attention_mask: found padding before audio; wanted it behind, padding_side=right"
                )
        feature_lengths = full if mask is None else mask.long().sum(1)
    want("feature_lengths", feature_lengths, len(features))
    if input_ids is None or not (input_ids == SPEECH).any():
        before, after = [], []
        if input_ids is None:
            asked = conversation(model.config.prompt, model.config.system_prompt)
            (before, after), _ = render_prompt(model.tokenizer, json.dumps(asked))
            input_ids = attention_mask = features.new_zeros((len(features), 0), dtype=torch.long)
        if len(input_ids) != len(features):
            raise ValueError(f"{len(input_ids)} rows of input_ids for {len(features)} clips")
        counts = model.speech_lengths(feature_lengths).tolist()
        if 0 in counts:
            raise ValueError(f"clip {counts.index(0) + 1} is too short for a single speech embedding")
        rows = [before + speech_ids(count, model.config.audio_boundary_tokens) + after for count in counts]
        ids, mask = (pad_left(r, 0).to(features.device) for r in (rows, [[1] * len(row) for row in rows]))
        # padding on the left of the text goes to the left of its clip; on the right, it stays there beside its labels
        lead = torch.cat([mask == 0, attention_mask.cumsum(1) == 0], 1)
        order = (~lead).long().argsort(dim=1, stable=True)
        input_ids = torch.cat([ids, input_ids], 1).gather(1, order)
        attention_mask = torch.cat([mask, attention_mask], 1).gather(1, order)
    return {"inputs_embeds": model.embed(input_ids, features, feature_lengths), "attention_mask": attention_mask}


def want(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless a tensor has this shape; a letter in it is any size."""
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.ndim != len(shape) or any(size != wanted for size, wanted in sizes if not isinstance(wanted, str)):
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, wanted ({', '.join(map(str, shape))})")


def predictable(labels: Tensor, rows: int, length: int) -> Tensor:
    """Labels (B, K) of the last K of L positions, without the first position's, which nothing predicts."""
    want("labels", labels, rows, "K")
    if labels.shape[1] > length:
        raise ValueError(f"labels: found shape {tuple(labels.shape)} for {length} positions of audio and text together")
    return labels[:, -(length - 1) :]


def pad_to_the_left(inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The same with all padding on the left, from where generate goes on."""
    order = attention_mask.long().argsort(dim=1, stable=True)  # (B, L)
    embeds = inputs_embeds.gather(1, order.unsqueeze(2).expand_as(inputs_embeds))
    return {"inputs_embeds": embeds, "attention_mask": attention_mask.gather(1, order)}


def as_list(audio) -> list:
    """The clips of a turn; one alone, a path or samples (S,), may stand without its list."""
    return list(audio) if isinstance(audio, (list, tuple)) else [audio]


def of_prompts(model, prompts: list[list[dict]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(input_ids, attention_mask, audio inputs) of conversations; BadUtterance for one that does not add up."""
    if not prompts:
        raise ValueError("wanted prompts, found none")
    records = []
    for number, turns in enumerate(prompts, 1):
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"prompt {number}: wanted a list of turns, each with role, content and perhaps audio")
        turns = [turn | {"audio": as_list(turn.get("audio", []))} for turn in turns]
        if wrong := wrong_turns(turns):
            raise BadUtterance(f"prompt {number}: {wrong}")
        if turns[-1]["role"] == "assistant":
            raise ValueError("wanted prompts whose last turn is the user's")
        records.append({"where": f"prompt {number}", "messages": turns})
    dataset = model.make_dataset(records, max_length=model.max_length)
    batch = collate([dataset[i] for i in range(len(dataset))], with_targets=False)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in ("index", "bad", "labels")}
    return batch.pop("input_ids"), batch.pop("attention_mask"), batch
