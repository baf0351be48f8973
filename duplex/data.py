"""Conversations in two channels: the user's is heard, the agent's is learnt, in frames of 80 ms.

{"user": "u.wav", "agent": "a.wav", "turns": [{"role": "user", "start": 0.0, "end": 1.9, "text": "seven?"}, ...]}

Shapes: B conversations, T frames of 80 ms, W windows of the encoder, S samples of the user at 16 kHz, A samples of the
agent at the codec's rate, F feature frames, M mel bins.
"""

import json
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
from sources import RecordList

FRAME_SECONDS = 0.08
HOP = round(FRAME_SECONDS * SAMPLE_RATE)  # samples of the user in a frame


def frame_of(seconds: float, rate: int = SAMPLE_RATE) -> int:
    """The frame that begins nearest to a time, as NeMo's duplex collection places text."""
    hop = round(FRAME_SECONDS * rate)
    return (round(seconds * rate) + hop // 2) // hop


@dataclass(frozen=True)
class TextTokens:
    """Ids with a meaning in a text channel: silence, and the frames in which a turn begins and ends."""

    pad: int
    bos: int
    eos: int


def text_channel(turns: list[dict], num_frames: int, encode: Callable, tokens: TextTokens) -> tuple[Tensor, list[str]]:
    """(Token ids (T,) of turns with start, end and text; what did not fit).

    From its first frame a turn stands as bos and the tokens of its text, one a frame; in the frame of its end stands
    eos, on top of a token of the text if there are too many.
    """
    ids, problems = torch.full((num_frames,), tokens.pad), []
    for turn in turns:
        start, end, text = frame_of(turn["start"]), frame_of(turn["end"]), encode(turn["text"])
        if start >= num_frames:
            problems.append(f"the turn at {turn['start']:g} s begins behind the audio: left out")
            continue
        if start + 1 + len(text) > min(end, num_frames):
            room = max(min(end, num_frames) - start - 1, 0)
            problems.append(f"the turn at {turn['start']:g} s has {len(text)} tokens and room for {room}: cut")
        written = torch.tensor([tokens.bos, *text])[: num_frames - start]
        ids[start : start + len(written)] = written
        if end < num_frames:
            ids[end] = tokens.eos
    return ids, problems


def open_conversations(source: str | Path) -> RecordList:
    """The records of JSON lines, or of lhotse:CUTS, whose cuts have NeMo's `target_audio`. Raises InputError."""
    kind, _, place = str(source).partition(":")
    records = []
    if kind == "lhotse":
        from lhotse import CutSet  # optional

        for cut in CutSet.from_file(place):
            turns = [{"role": s.speaker, "start": s.start, "end": s.end, "text": s.text} for s in cut.supervisions]
            turns = [turn | {"role": "user" if turn["role"].lower() == "user" else "agent"} for turn in turns]
            paths = [recording.sources[0].source for recording in (cut.recording, cut.target_audio)]
            records.append({"where": cut.id, "user": paths[0], "agent": paths[1], "turns": turns})
    elif not Path(source).is_file():
        raise InputError(f"{source}: no such file; wanted JSON lines with 'user', 'agent' and 'turns'")
    else:
        for number, line in enumerate(Path(source).read_text(encoding="utf-8").splitlines(), 1):
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
    where = record["where"]
    if missing := [key for key in ("user", "agent", "turns") if key not in record]:
        raise InputError(f"{where}: missing {missing}; a conversation has 'user', 'agent' and 'turns'")
    last = {"user": 0.0, "agent": 0.0}  # where the turn before ends, seconds
    for turn in record["turns"]:
        if missing := [key for key in ("role", "start", "end", "text") if key not in turn]:
            raise InputError(f"{where}: a turn without {missing}")
        if turn["role"] not in last:
            raise InputError(f"{where}: role {turn['role']!r}; wanted user or agent")
        if not last[turn["role"]] <= turn["start"] < turn["end"]:
            raise InputError(f"{where}: the {turn['role']}'s turn {turn['start']} to {turn['end']} s is out of order")
        last[turn["role"]] = turn["end"]


def windows(samples: np.ndarray, chunk: int, context: int, lookahead: int) -> np.ndarray:
    """Each chunk of so many frames with those before and behind it: (S,) -> (W, (context + chunk + lookahead) * HOP).

    Before the start and behind the end there is silence. An encoder that looks both ways sees no sample behind its
    window, and gives the same frames in training and in a stream.
    """
    num_chunks = -(-len(samples) // (chunk * HOP))
    samples = np.pad(samples, (context * HOP, (num_chunks * chunk + lookahead) * HOP - len(samples)))
    return np.lib.stride_tricks.sliding_window_view(samples, (context + chunk + lookahead) * HOP)[:: chunk * HOP]


def window_features(extract: Callable, samples: np.ndarray, **sizes: int) -> Tensor:
    """Features (W, F, M) of the windows of samples (S,)."""
    return torch.stack([extract(window) for window in windows(samples, **sizes)])


def resample(rate: int, samples: np.ndarray) -> Tensor:
    return torch.from_numpy(soxr.resample(samples, SAMPLE_RATE, rate))


def text_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@dataclass(eq=False)
class ConversationDataset(torch.utils.data.Dataset):
    """Examples of conversations: what is heard of the user, and the agent's voice and text channel."""

    records: RecordList
    hear: Callable[[np.ndarray], Tensor]  # samples (S,) -> features (W, F, M) of windows, or the encoder's frames
    speak: Callable[[np.ndarray], Tensor]  # samples (S,) -> samples (A,) at the codec's rate, or its codes (T, K)
    encode: Callable[[str], list[int]]  # text -> ids
    tokens: TextTokens

    def __post_init__(self):
        self.problems: list[str] = []  # what did not fit, in this process
        self.seconds = np.array(
            [max([turn["end"] for turn in r["turns"]], default=0.0) for r in self.records]
        )  # nearly

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index = index[1] if isinstance(index, tuple) else index  # LengthSampler gives (epoch, index)
        record = self.records[index]
        (user, agent), problems = load_channels(record)
        turns = [turn for turn in record["turns"] if turn["role"] == "agent"]
        ids, misfits = text_channel(turns, -(-len(user) // HOP), self.encode, self.tokens)
        self.problems += [f"{record['where']}: {problem}" for problem in problems + misfits]
        return {"heard": self.hear(user), "voice": self.speak(agent), "text_ids": ids, "index": index}


def load_channels(record: dict) -> tuple[np.ndarray, list[str]]:
    """(Samples of user and agent (2, S), of the longer one's length; what did not fit). Raises BadUtterance."""
    try:
        user, agent = (load_audio(record.get("folder", Path()) / record[role]) for role in ("user", "agent"))
    except BadUtterance as error:
        raise BadUtterance(f"{record['where']}: {error}") from None
    size, problems = max(len(user), len(agent)), []
    if abs(len(user) - len(agent)) > HOP:
        seconds = f"{len(user) / SAMPLE_RATE:.2f} and {len(agent) / SAMPLE_RATE:.2f} s"
        problems = [f"channels of {seconds}: the shorter is filled with silence"]
    return np.stack([np.pad(samples, (0, size - len(samples))) for samples in (user, agent)]), problems


def collate(examples: list[dict], pad: int) -> dict:
    """One batch, padded on the right: text_ids and labels (B, T), num_frames (B,), voice (B, A) or (B, T, K), heard.

    `heard` are the windows (W, ...) of all conversations.
    """
    ids = [example["text_ids"] for example in examples]
    labels = [F.pad(row[1:], (1, 0), value=IGNORE) for row in ids]  # nothing predicts the first frame
    return {
        "heard": torch.cat([example["heard"] for example in examples]),  # windows, conversation by conversation
        "text_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),  # Trainer counts these
        "num_frames": torch.tensor([len(row) for row in ids]),
        "voice": pad_sequence([example["voice"] for example in examples], batch_first=True),
        "index": [example["index"] for example in examples],
        "bad": [None] * len(examples),  # train.py counts what it skips
    }
