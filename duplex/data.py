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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataset import load_audio
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


def last_end(record: dict) -> float:
    """Seconds after which nobody speaks any more."""
    return max((turn["end"] for turn in record["turns"]), default=0.0)


def windows(samples: np.ndarray, chunk: int, context: int) -> np.ndarray:
    """Each chunk of so many frames, behind so many frames of what came before: (S,) -> (W, (context + chunk) * HOP).

    Before the start and behind the end there is silence. An encoder that looks both ways sees no sample behind the
    chunk, and gives the same frames in training and in a stream.
    """
    num_chunks = -(-len(samples) // (chunk * HOP))
    samples = np.pad(samples, (context * HOP, num_chunks * chunk * HOP - len(samples)))
    return np.lib.stride_tricks.sliding_window_view(samples, (context + chunk) * HOP)[:: chunk * HOP]


@dataclass(eq=False)
class ConversationDataset(torch.utils.data.Dataset):
    """Examples of conversations: the user's features, the agent's samples and the text channel of the agent."""

    records: RecordList
    extract: Callable[[np.ndarray], Tensor]  # samples of a window -> features (F, M), or samples again
    encode: Callable[[str], list[int]]  # text -> ids
    tokens: TextTokens
    agent_rate: int  # Hz, of the codec
    chunk: int
    context: int

    def __post_init__(self):
        self.problems: list[str] = []  # what did not fit, in this process
        self.seconds = np.array([last_end(record) for record in self.records])  # nearly, to sort by

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index = index[1] if isinstance(index, tuple) else index  # LengthSampler gives (epoch, index)
        record = self.records[index]
        try:
            user, agent = (load_audio(record.get("folder", Path()) / record[role]) for role in ("user", "agent"))
        except BadUtterance as error:
            raise BadUtterance(f"{record['where']}: {error}") from None
        size = max(len(user), len(agent))
        if abs(len(user) - len(agent)) > HOP:
            seconds = f"{len(user) / SAMPLE_RATE:.2f} and {len(agent) / SAMPLE_RATE:.2f} s"
            self.problems.append(f"{record['where']}: channels of {seconds}: the shorter is filled with silence")
        user, agent = (np.pad(samples, (0, size - len(samples))) for samples in (user, agent))
        num_frames = -(-size // HOP)
        turns = [turn for turn in record["turns"] if turn["role"] == "agent"]
        ids, problems = text_channel(turns, num_frames, self.encode, self.tokens)
        self.problems += [f"{record['where']}: {problem}" for problem in problems]
        return {
            "features": torch.stack([self.extract(window) for window in windows(user, self.chunk, self.context)]),
            "agent_samples": torch.from_numpy(soxr.resample(agent, SAMPLE_RATE, self.agent_rate)),
            "text_ids": ids,
            "index": index,
        }


def collate(examples: list[dict], pad: int) -> dict:
    """One batch, padded on the right: text_ids (B, T), num_frames (B,), agent_samples (B, A), features (of all W)."""
    ids = [example["text_ids"] for example in examples]
    return {
        "features": torch.cat([example["features"] for example in examples]),  # windows, conversation by conversation
        "text_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "num_frames": torch.tensor([len(row) for row in ids]),
        "agent_samples": pad_sequence([example["agent_samples"] for example in examples], batch_first=True),
        "index": [example["index"] for example in examples],
        "bad": [None] * len(examples),  # train.py counts what it skips
    }
