"""Inputs in place of a batch of `collate`: raw tensors, as transformers' classes return them, and conversations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from conversations import wrong_turns
from dataset import SPEECH, pad_left, speech_ids
from errors import BadUtterance
from manifest import AUDIO, SAMPLE_RATE
from sources import RecordList


def batch_from_tensors(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    audio: dict[str, Tensor],
    encoder: nn.Module,
    num_embeddings: Callable[[Tensor], Tensor],
    prompt_pieces: list[list[int]],
    boundary_tokens: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """input_ids, attention_mask (B, L), and {features, feature_lengths}, as `collate` makes them.

    `audio` is what the encoder's feature extractor returns, one clip a row, its mask as audio_attention_mask. It goes
    to the placeholders of input_ids, or before input_ids where they have none, or, without any, into the model's own
    prompt (`prompt_pieces` before and after the clip). Raises ValueError where shapes, or the counts of clips and rows,
    do not fit.
    """
    values, features = audio.get("input_values"), audio.get("input_features")
    if (features is None) == (values is None):
        raise ValueError("wanted audio: input_values or input_features, as model.feature_extractor returns them")
    features = audio_features(encoder, features, values)
    feature_lengths = audio_lengths(features, audio.get("audio_attention_mask"))
    name = "input_features" if features.ndim == 3 else "input_values"
    audio = {name: features, "feature_lengths": feature_lengths}
    if input_ids is None:
        before, after = prompt_pieces
        input_ids = attention_mask = features.new_zeros((len(features), 0), dtype=torch.long)
    else:
        before, after = [], []
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_shape("input_ids", input_ids, "B", "L")
        check_shape("attention_mask", attention_mask, *input_ids.shape)
    if (input_ids == SPEECH).any():
        return input_ids, attention_mask, audio

    if len(input_ids) != len(features):
        raise ValueError(f"{len(input_ids)} rows of input_ids for {len(features)} clips")
    counts = num_embeddings(feature_lengths).tolist()
    if 0 in counts:
        raise ValueError(f"clip {counts.index(0) + 1} is too short for a single speech embedding")
    rows = [before + speech_ids(count, boundary_tokens) + after for count in counts]
    speech, speech_mask = (pad_left(r, 0).to(features.device) for r in (rows, [[1] * len(row) for row in rows]))
    # Padding on the left of the text goes to the left of its clip; on the right, it stays there beside its labels.
    is_left_padding = torch.cat([speech_mask == 0, attention_mask.cumsum(1) == 0], 1)
    order = (~is_left_padding).long().argsort(dim=1, stable=True)
    input_ids = torch.cat([speech, input_ids], 1).gather(1, order)
    attention_mask = torch.cat([speech_mask, attention_mask], 1).gather(1, order)
    return input_ids, attention_mask, audio


def audio_features(encoder: nn.Module, input_features: Tensor | None, input_values: Tensor | None) -> Tensor:
    """Features (A, F, M) or samples (A, S) of the kind that the encoder takes. Raises ValueError for another shape."""
    frame_shape = encoder.extract(torch.zeros(SAMPLE_RATE).numpy()).shape[1:]  # (M,), or () of samples
    if not frame_shape:
        if input_values is None:
            raise ValueError("wanted input_values (A, S): this encoder takes samples")
        check_shape("input_values", input_values, "A", "S")
        return input_values
    if input_features is None:
        raise ValueError("wanted input_features: this encoder takes features")
    if isinstance(encoder.feature_extractor, WhisperFeatureExtractor):
        check_shape("input_features", input_features, "A", *frame_shape, "F")
        return input_features.transpose(1, 2)  # (A, M, F) -> (A, F, M)
    check_shape("input_features", input_features, "A", "F", *frame_shape)
    return input_features


def audio_lengths(features: Tensor, mask: Tensor | None) -> Tensor:
    """Valid feature frames, or samples, of each clip (A,). Raises ValueError for a mask that cannot tell."""
    if mask is None:
        return torch.full((len(features),), features.shape[1], device=features.device)
    check_shape("audio_attention_mask", mask, *features.shape[:2])
    if (mask.long().diff(dim=1) > 0).any():
        raise ValueError("audio_attention_mask: found padding before audio; wanted it behind, padding_side=right")
    return mask.long().sum(1)


def check_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless a tensor has this shape; a letter in it is any size."""
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.ndim != len(shape) or any(size != wanted for size, wanted in sizes if not isinstance(wanted, str)):
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, wanted ({', '.join(map(str, shape))})")


def pad_to_the_left(inputs_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The same with all padding on the left, from where generate goes on."""
    order = attention_mask.long().argsort(dim=1, stable=True)  # (B, L)
    embeds = inputs_embeds.gather(1, order.unsqueeze(2).expand_as(inputs_embeds))  # (B, L, H)
    return {"inputs_embeds": embeds, "attention_mask": attention_mask.gather(1, order)}


def records_of(prompts: list[list[dict]]) -> RecordList:
    """Records of conversations whose last turn is the user's. Raises BadUtterance for one that does not add up."""
    if not prompts:
        raise ValueError("wanted prompts, found none")
    records = []
    for number, turns in enumerate(prompts, 1):
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"prompt {number}: wanted a list of turns, each with role, content and perhaps audio")
        turns = [turn | {"audio": as_list(turn.get("audio", []))} for turn in turns]
        if wrong := wrong_turns(turns, AUDIO):
            raise BadUtterance(f"prompt {number}: {wrong}")
        if turns[-1]["role"] == "assistant":
            raise ValueError("wanted prompts whose last turn is the user's")
        records.append({"messages": turns})
    return RecordList(records, "prompt")


def as_list(audio) -> list:
    """The clips of a turn; one alone, a path or samples (S,), may stand without its list."""
    return list(audio) if isinstance(audio, (list, tuple)) else [audio]
