"""Conversations in two channels: the user's is heard, the agent's is learnt, in frames of 80 ms.

{"user": "u.wav", "agent": "a.wav", "turns": [{"role": "user", "start": 0.0, "end": 1.9, "text": "seven?"}, ...]}

Shapes: B conversations, T frames of 80 ms, K codebooks, W windows of the encoder, S samples at 16 kHz, F feature
frames, M mel bins.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataset import IGNORE, load_audio
from errors import BadUtterance, InputError
from manifest import SAMPLE_RATE
from sources import RecordList, text_of

FRAME_SECONDS = 0.08
HOP = round(FRAME_SECONDS * SAMPLE_RATE)  # samples of the user in a frame
ROLES = ("user", "agent")


def frame_of(seconds: float) -> int:
    """The frame that begins nearest to a time, as NeMo's duplex collection places text."""
    return (round(seconds * SAMPLE_RATE) + HOP // 2) // HOP


@dataclass(frozen=True)
class TextTokens:
    """Ids with a meaning in a text channel: silence, and the frames in which a turn begins and ends."""

    pad: int
    bos: int
    eos: int


def text_channel(turns: list[dict], num_frames: int, encode: Callable, tokens: TextTokens, where: str) -> Tensor:
    """Token ids (T,) of turns with start, end and text. What does not fit is told in a warning.

    From its first frame a turn stands as bos and the tokens of its text, one a frame; in the frame of its end stands
    eos, on top of a token of the text if there are too many.
    """
    ids = torch.full((num_frames,), tokens.pad)
    for turn in turns:
        start, end, text = frame_of(turn["start"]), frame_of(turn["end"]), encode(turn["text"])
        if (room := max(min(end, num_frames) - start - 1, 0)) < len(text):
            warnings.warn(f"{where}: {len(text)} tokens from {turn['start']:g} s, room for {room}: cut", stacklevel=2)
        written = torch.tensor([tokens.bos, *text])[: max(num_frames - start, 0)]
        ids[start : start + len(written)] = written
        ids[end : end + 1] = tokens.eos  # nothing if the turn ends with the audio
    return ids


def open_conversations(source: str | Path) -> RecordList:
    """The records of JSON lines, or of lhotse:CUTS, whose cuts have NeMo's `target_audio`. Raises InputError."""
    kind, _, place = str(source).partition(":")
    records = []
    if kind == "lhotse":
        from lhotse_cuts import cuts_of  # an option

        for where, cut in cuts_of(Path(place)):
            turns = [{"role": s.speaker, "start": s.start, "end": s.end, "text": s.text} for s in cut.supervisions]
            turns = [turn | {"role": "user" if turn["role"].lower() == "user" else "agent"} for turn in turns]
            paths = [recording.sources[0].source for recording in (cut.recording, cut.target_audio)]
            records.append({"where": where, "turns": turns} | dict(zip(ROLES, paths, strict=True)))
    elif not Path(source).is_file():
        raise InputError(f"{source}: no such file; wanted JSON lines with 'user', 'agent' and 'turns'")
    else:
        for number, line in enumerate(text_of(Path(source)).splitlines(), 1):
            where = f"{source}:{number}"
            try:
                records.append({"where": where, "folder": Path(source).parent} | json.loads(line))
            except (ValueError, TypeError) as error:
                raise InputError(f"{where}: {error}; wanted a JSON object a line") from None
    for record in records:
        check_conversation(record)
    return RecordList(records)


def check_conversation(record: dict) -> None:
    """Raise InputError for keys that are missing, roles that do not exist and turns that are out of order."""
    where, last = record["where"], dict.fromkeys(ROLES, 0.0)  # seconds at which the turn before ends
    if missing := [key for key in (*ROLES, "turns") if key not in record]:
        raise InputError(f"{where}: missing {missing}; a conversation has 'user', 'agent' and 'turns'")
    for turn in record["turns"]:
        begin, end = turn.get("start", -1), turn.get("end", -1)
        if turn.get("role") not in ROLES or "text" not in turn or not last[turn["role"]] <= begin < end:
            wanted = "a 'text', a 'role', user or agent, and 'start' < 'end' in seconds behind that role's turn before"
            raise InputError(f"{where}: found the turn {turn}; wanted {wanted}")
        last[turn["role"]] = end


def load_channels(record: dict) -> np.ndarray:
    """Samples (2, S) of user and agent, whole frames of them. Raises BadUtterance."""
    try:
        channels = [load_audio(record.get("folder", Path()) / record[role]) for role in ROLES]
    except BadUtterance as error:
        raise BadUtterance(f"{record['where']}: {error}") from None
    sizes = [len(samples) for samples in channels]
    if max(sizes) - min(sizes) > HOP:
        seconds = " and ".join(f"{size / SAMPLE_RATE:.2f}" for size in sizes)
        warnings.warn(f"{record['where']}: channels of {seconds} s: silence fills the shorter one", stacklevel=2)
    whole = -(-max(sizes) // HOP) * HOP
    return np.stack([np.pad(samples, (0, whole - len(samples))) for samples in channels])


def windows(samples: np.ndarray, chunk: int, context: int, lookahead: int) -> np.ndarray:
    """Each chunk of so many frames with those before and behind it: (S,) -> (W, (context + chunk + lookahead) * HOP).

    Before the start and behind the end there is silence. An encoder that looks both ways sees no sample behind its
    window, and gives the same frames in training and in a stream.
    """
    num_chunks = -(-len(samples) // (chunk * HOP))
    samples = np.pad(samples, (context * HOP, (num_chunks * chunk + lookahead) * HOP - len(samples)))
    return np.lib.stride_tricks.sliding_window_view(samples, (context + chunk + lookahead) * HOP)[:: chunk * HOP]


def encode_channels(channels: np.ndarray, extract: Callable, codec, sizes: dict[str, int]) -> dict[str, Tensor]:
    """`features` (W, F, M) of the user's windows of these sizes, and the agent's `codes` (T, K), of samples (2, S)."""
    features = torch.stack([extract(window) for window in windows(channels[0], **sizes)])
    voice = torch.from_numpy(soxr.resample(channels[1], SAMPLE_RATE, codec.sample_rate))
    return {"features": features, "codes": codec.encode(voice[None])[0]}


@dataclass(eq=False)
class ConversationDataset(torch.utils.data.Dataset):
    """Examples of conversations: what is heard of the user, and the agent's codes and text channel."""

    records: RecordList
    encode: Callable[[np.ndarray], dict[str, Tensor]]  # samples (2, S) -> features (W, F, M) or frames, codes (T, K)
    encode_text: Callable[[str], list[int]]
    tokens: TextTokens

    def __post_init__(self):
        self.seconds = np.array([max((t["end"] for t in r["turns"]), default=0.0) for r in self.records])  # nearly

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index = index[1] if isinstance(index, tuple) else index  # LengthSampler gives (epoch, index)
        record = self.records[index]
        channels, turns = load_channels(record), [turn for turn in record["turns"] if turn["role"] == "agent"]
        ids = text_channel(turns, channels.shape[1] // HOP, self.encode_text, self.tokens, record["where"])
        labels = F.pad(ids[1:], (0, 1), value=IGNORE)  # the last frame predicts nothing
        return {"text_ids": ids, "labels": labels, "index": index} | self.encode(channels)


def collate(examples: list[dict], pad: int) -> dict:
    """One batch, padded on the right: text_ids, labels (B, T), codes (B, T, K), features (B, W, F, M) or frames."""
    batch = {name: [example[name] for example in examples] for name in examples[0]}
    batch["bad"] = [None] * len(examples)  # train.py counts what it skips
    values = {"text_ids": pad, "labels": IGNORE}  # Trainer counts the other labels
    for name in batch.keys() - {"index", "bad"}:
        batch[name] = pad_sequence(batch[name], batch_first=True, padding_value=values.get(name, 0))
    return batch
