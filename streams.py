"""Data that come as a stream: --streaming, for hf:PLACE and manifests that nobody wants to look through first.

    python train.py --data_path hf:NAME --streaming --max_steps 10000 ...

Every process reads all records, in the same order, and leaves their audio as it is stored; the loader's processes
decode that of their own batches. So no number of processes or workers changes a batch, and a run that goes on reads
what it has had once more, without decoding it. A stream has no end: behind the last record comes the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from batching import batches, make_loader
from dataset import SpeechDataset, audio_seconds
from errors import BadUtterance, InputError
from manifest import parse_line, source_options, stated_seconds
from mixture import split_weight

if TYPE_CHECKING:
    from train import DataArguments, SpeechTrainer

BUFFER = 50  # steps whose clips are sorted by length, cut into batches and shuffled together
KEPT = 1000  # batches of which it is known where their records stand
WANT_ALL = """no_speech_share min_seconds min_tokens max_tokens max_characters_per_second encoder_cache
    max_batch_tokens auto_batch log_predictions overfit check""".split()  # flags that look at all records first
Read = Callable[[int], Iterator[dict]]  # epoch -> the records of a source


class Streamed(NamedTuple):
    """A record on its way to the loader's processes."""

    epoch: int  # of its source
    number: int  # in the stream; in the place of an index
    record: dict
    seconds: float


class Stream:
    """Endless records of one source or of several, drawn by their weights. In the place of Records it has no length.

    Of the records in the latest batches [number] tells where they stand.
    """

    durations = np.zeros(0)

    def __init__(self, sources: list[str], seed: int, **options: str):
        """`options` are fields of SourceOptions. Raises InputError."""
        names, weights = zip(*map(split_weight, sources), strict=True)
        if None in weights and any(weights):
            raise InputError(f"{' '.join(sources)}: wanted a weight for every source, or for none")
        self.weights = None if None in weights else np.array(weights) / sum(weights)  # None: all alike
        self.names, self.seed, self.options = names, seed, options
        self.sources = [open_stream(name, **options) for name in names]
        self.latest: dict[int, dict] = {}  # number -> where, seconds

    def __len__(self) -> int:
        return 0

    def __getitem__(self, number: int) -> dict:
        return self.latest[number]

    def fingerprint(self, count: int | None = None) -> str:
        what = self.names, None if self.weights is None else self.weights.tolist(), sorted(self.options.items())
        return sha256(repr(what).encode()).hexdigest()  # by name: nobody has read it all

    def __iter__(self) -> Iterator[Streamed]:
        endless = [repeat(name, read) for name, read in zip(self.names, self.sources, strict=True)]
        random = np.random.default_rng(self.seed)
        for number in count():
            source = random.choice(len(endless), p=self.weights) if endless[1:] else 0
            epoch, record = next(endless[source])
            yield Streamed(epoch, number, record, seconds_of(record))

    def batches_for(self, trainer: "SpeechTrainer", data: "DataArguments") -> "StreamBatches":
        """The batches of a training run on this process."""
        args, dataset = trainer.args, trainer.train_dataset
        sizes = args.train_batch_size, data.max_batch_seconds, self.seed
        dataset.durations = Seconds(self.latest)
        return StreamBatches(self, *sizes, args.world_size, args.process_index, args.gradient_accumulation_steps)


@dataclass
class Seconds:
    """[numbers] -> seconds of these records of a stream, as an array of durations gives them."""

    latest: dict[int, dict]

    def __getitem__(self, numbers: Sequence[int]) -> np.ndarray:
        return np.array([self.latest[number]["seconds"] for number in numbers])


def repeat(name: str, read: Read) -> Iterator[tuple[int, dict]]:
    """(epoch, record) without an end. Raises InputError if there are no records."""
    for epoch in count():
        record = None
        for record in read(epoch):
            yield epoch, record
        if record is None:
            raise InputError(f"{name}: no records; wanted some with 'wav' and 'txt'")


def seconds_of(record: dict) -> float:
    """Seconds of audio, from the header where the record does not state them; 0 if it cannot be read: load says so."""
    seconds = stated_seconds(record)
    try:
        return audio_seconds(record) if np.isnan(seconds) else seconds
    except BadUtterance:
        return 0.0


def open_stream(source: str, **options: str) -> Read:
    """The records of a manifest, or of hf:PLACE, whose shards come in another order each epoch. Raises InputError."""
    if source.startswith("hf:"):
        import hf_datasets  # an option

        return hf_datasets.stream_of_place(source.removeprefix("hf:"), **options)
    path = Path(source)
    if not path.is_file() or options:
        flags = "".join(f" --{name}" for name in options)
        raise InputError(f"--streaming {source}{flags}: wanted hf:PLACE, or a manifest without flags of a data set")

    def read(epoch: int) -> Iterator[dict]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{source}:{number}"
                yield parse_line(line, where, needs_text=True) | {"where": where, "folder": path.parent}

    return read


@dataclass
class StreamedExamples(torch.utils.data.Dataset):
    """Examples of records that come with their place in the batch, made in the loader's processes."""

    dataset: SpeechDataset

    def __getitem__(self, streamed: Streamed) -> dict:
        return self.dataset.example(streamed.number, streamed.record, streamed.epoch)


@dataclass
class StreamBatches:
    """The batches of one process; the sampler of its loader.

    A buffer of the stream is sorted by length and cut into batches, of `batch_size` clips or by a budget of seconds.
    Neighbours, as many as all processes take for a step, stay together; the steps change places.
    """

    stream: Stream
    batch_size: int
    max_seconds: float  # of a batch, clips x longest; 0 = batch_size clips
    seed: int
    num_processes: int
    process_index: int
    accumulation: int

    def __iter__(self) -> Iterator[list[Streamed]]:
        size, buffer = self.num_processes * self.accumulation, []  # batches of a step
        for streamed in self.stream:
            buffer.append(streamed)
            if len(buffer) < BUFFER * size * self.batch_size:
                continue
            random = np.random.default_rng([self.seed, streamed.number])
            groups = self.cut(np.array([each.seconds for each in buffer]), size, random)
            for step in random.permutation(len(groups) // size).tolist():
                for group in groups[step * size + self.process_index : (step + 1) * size : self.num_processes]:
                    yield self.note([buffer[position] for position in group.tolist()])
            buffer = []

    def cut(self, seconds: np.ndarray, multiple: int, random: np.random.Generator) -> list[np.ndarray]:
        """Positions of the clips of each batch. Raises InputError for a clip longer than the budget."""
        if not self.max_seconds:
            order = np.argsort(seconds, kind="stable")
            return np.split(order, range(self.batch_size, len(order), self.batch_size))
        if seconds.max() > self.max_seconds:
            raise InputError(f"--max_batch_seconds {self.max_seconds:g}: a clip alone has {seconds.max():.2f}")
        return batches(seconds[:, None].clip(min=0.01), np.array([self.max_seconds]), random, multiple)

    def note(self, batch: list[Streamed]) -> list[Streamed]:
        """The batch, of which messages and figures can now ask the stream."""
        latest = self.stream.latest
        latest.update({each.number: {"where": each.record["where"], "seconds": each.seconds} for each in batch})
        for number in list(latest)[: max(len(latest) - KEPT * len(batch), 0)]:
            del latest[number]
        return batch

    def loader(self, dataset: SpeechDataset, args: TrainingArguments) -> DataLoader:
        return make_loader(StreamedExamples(dataset), self, args)


def open_training_data(data: "DataArguments", args: TrainingArguments) -> Stream:
    """The stream of --data_path. Raises InputError for flags that do not go with it."""
    if args.max_steps <= 0:
        raise InputError("--streaming: a stream has no end; give --max_steps")
    for name in WANT_ALL:
        if getattr(data, name):
            raise InputError(f"--streaming: --{name} looks at all records first; leave one of them out")
    seed = args.seed if args.data_seed is None else args.data_seed
    return Stream(data.data_path, seed, **source_options(data))
