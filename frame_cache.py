"""Each clip goes through the frozen encoder once; later epochs and runs read its frames: --encoder_cache DIR.

    DIR/KEY/NAME.frames    frames (T, D) of windows of audio, one behind the other, in bf16
    DIR/KEY/NAME.index     a row of ROW for each of them

KEY is a hash of the encoder's weights and of how its features are made. A window of audio is found by a hash of its
samples: other audio never gets its frames, whatever its file is called.

Every process that has something to encode makes a pair of files of its own, and reads those of all others: several
jobs can fill one DIR at the same time. Frames get their rows when they are safe on the disk. What a kill leaves without
a row is never read.

Shapes: A windows of audio, S samples, F feature frames, M mel bins, T encoder frames, D encoder width.
"""

import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from dataset import SILENCE, WINDOW, SpeechDataset
from errors import BadUtterance, InputError, as_input_error
from manifest import SAMPLE_RATE, clips_of

if TYPE_CHECKING:
    from model import SpeechLLM
    from train import DataArguments

ROW = np.dtype([("key", "<u8", 2), ("offset", "<i8"), ("num_frames", "<i8")])  # key: 128 bits; offset: bytes
Key = tuple[int, int]
SYNC_SECONDS = 10.0  # how often frames are made safe on the disk: the most work that a kill takes away
# Samples that are the same on every machine, bit for bit. Under one KEY they have the same frames, unless code changed.
TRIAL = (np.arange(SILENCE) * 7919 % 2001 / 1000 - 1).astype(np.float32)
TOLERANCE = 0.05  # of the norm of these frames: above what bf16, another batch or another device changes


def use(model: "SpeechLLM", datasets: dict[str, SpeechDataset], data: "DataArguments", args: TrainingArguments) -> None:
    """Encode what the cache lacks of the datasets, on all processes, and put the cache in the place of the encoder.

    Raises InputError where a clip has no lasting frames, and for want of room on the disk. With --check nothing is done
    but telling the size.
    """
    if data.augment:
        raise InputError("--encoder_cache with --augment, which changes the samples each time; leave one of them out")
    if any(name.startswith("encoder.") for name in model.parameters_to_save()):
        raise InputError("--encoder_cache: weights of the encoder are, or were, trained; wanted a frozen encoder")
    encoder = model.encoder.to(args.device).eval()
    folder = Path(data.encoder_cache, key_of_encoder(encoder, model.config.pad_to_30s))
    with as_input_error(f"--encoder_cache {data.encoder_cache}", "write there", "a folder, or a name for a new one"):
        folder.mkdir(parents=True, exist_ok=True)
    cache = FrameCache(folder, encoder.output_size)
    clips = [clip for dataset in datasets.values() for clip in new_clips(dataset, cache, args)]  # of this process
    tell_size(clips, datasets, encoder, cache, args)
    if data.check:
        return
    fill(cache, encoder, clips, next(iter(datasets.values())), args)
    gather_object([None])  # waits for the other processes
    dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
    model.encoder = CachedEncoder(FrameCache(folder, encoder.output_size), dtype)  # its weights leave the memory
    model.embedding_counts = model.num_embeddings(torch.arange(WINDOW + 1)).int().numpy()
    for dataset in datasets.values():
        dataset.extract, dataset.embedding_counts = model.encoder.extract, model.embedding_counts


def key_of_encoder(encoder: nn.Module, pad_to_30s: bool) -> str:
    """Hash of all weights, which tell the layer and the dtype too, and of the settings of the features."""
    settings = type(encoder).__name__, str(getattr(encoder, "feature_extractor", None)), pad_to_30s
    digest = sha256(repr(settings).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def key_of(content: bytes | np.ndarray) -> Key:
    first, second = np.frombuffer(sha256(content).digest(), "<u8")[:2].tolist()
    return first, second


# Reading


class FrameCache:
    """The frames of windows of audio that are in the files of a folder."""

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width  # D
        self.files, parts = [], [np.empty(0, ROW)]  # files: path, bytes
        for path in sorted(folder.glob("*.index")):
            rows = np.fromfile(path, ROW)  # leaves out a torn last row
            frames = path.with_suffix(".frames")
            size = frames.stat().st_size if frames.exists() else -1  # bytes
            parts.append(rows[rows["offset"] + 2 * width * rows["num_frames"] <= size])
            self.files.append((frames, size))
        rows, counts = np.concatenate(parts), [len(part) for part in parts[1:]]
        order = rows["key"][:, 0].argsort(kind="stable")
        self.rows, self.file_of_row = rows[order], np.repeat(np.arange(len(counts)), counts)[order]
        self.first_halves = self.rows["key"][:, 0].copy()  # of the keys; quicker to search than every fourth column

    def find(self, key: Key) -> int | None:
        """The number of the row with a key."""
        number = int(self.first_halves.searchsorted(np.uint64(key[0])))
        while number < len(self.rows) and self.first_halves[number] == key[0]:
            if self.rows["key"][number, 1] == key[1]:
                return number
            number += 1
        return None

    def frames(self, key: Key) -> Tensor | None:
        """Frames (T, D), bf16."""
        number = self.find(key)
        if number is None:
            return None
        start, size = int(self.rows["offset"][number]) // 2, int(self.rows["num_frames"][number]) * self.width
        values = np.array(map_file(*self.files[self.file_of_row[number]])[start : start + size])  # a copy, in memory
        return torch.from_numpy(values).view(torch.bfloat16).view(-1, self.width)

    def extract(self, samples: np.ndarray) -> Tensor:
        """Samples (S,) of a window -> their frames (T, D). Raises InputError if they are not there."""
        frames = self.frames(key_of(samples))
        if frames is None:
            seconds = len(samples) / SAMPLE_RATE
            problem = f"no frames of {seconds:.2f} s of audio: it has changed, or its frames are on another host"
            raise InputError(f"{self.folder}: {problem}; start again, and if that does not help delete this folder")
        return frames


@functools.cache  # once in each process that loads audio, for a map cannot be sent to it
def map_file(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes of a file, two by two; they are read from the disk where they are looked at."""
    return np.memmap(path, np.int16, mode="r", shape=size // 2)


class CachedEncoder(nn.Module):
    """An encoder whose features are frames already: what `extract` finds in the cache, the projector gets."""

    def __init__(self, cache: FrameCache, dtype: torch.dtype):
        super().__init__()
        self.extract, self.output_size, self.dtype = cache.extract, cache.width, dtype

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return lengths

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return frames.to(self.dtype)  # (A, T, D), in the dtype of the encoder


# Filling

NewClip = tuple[SpeechDataset, int, Key | None]  # a position of a dataset, and the mark of its record


def new_clips(dataset: SpeechDataset, cache: FrameCache, args: TrainingArguments) -> list[NewClip]:
    """What the cache lacks of this process's share of a dataset, the longest first."""
    order = (-dataset.seconds).argsort(kind="stable")[args.process_index :: args.world_size].tolist()
    with ThreadPoolExecutor(16) as pool:  # files wait for the disk
        marks = pool.map(lambda position: mark_of(dataset.records[dataset.indices[position]]), order)
        clips = [(dataset, position, mark) for position, mark in zip(order, marks, strict=True)]
    return [(*clip, mark) for *clip, mark in clips if mark is None or cache.find(mark) is None]


def mark_of(record: dict) -> Key | None:
    """The key of a row without frames, which says that all windows of a record are in the cache.

    It spares a later run the reading of the audio before it begins. If it is wrong, because a file was changed and its
    time set back, `extract` finds no frames. None where audio is no file, or is missing.
    """
    clips = clips_of(record)
    try:
        files = [(str(clip.audio.absolute()), clip.audio.stat(), clip.start, clip.end) for clip in clips]
    except (AttributeError, OSError):
        return None
    return key_of(repr([(path, s.st_size, s.st_mtime_ns, start, end) for path, s, start, end in files]).encode())


class NewWindows(Dataset):
    """[n] -> the mark of a new clip, and key -> features (F, M) of the windows that the cache lacks."""

    def __init__(self, clips: list[NewClip], extract: Callable[[np.ndarray], Tensor], cache: FrameCache):
        self.clips, self.extract, self.cache = clips, extract, cache

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> tuple[Key | None, dict[Key, Tensor]]:
        dataset, position, mark = self.clips[number]
        record = dataset.records[dataset.indices[position]]
        try:
            clips = dataset.load(record)  # (S,) each
        except BadUtterance as error:
            if dataset.on_bad == "error":
                raise BadUtterance(f"{record['where']}: {error}") from None
            return None, {}  # silence will stand in its place
        return mark, self.windows(dataset, clips)

    def windows(self, dataset: SpeechDataset, clips: list[np.ndarray]) -> dict[Key, Tensor]:
        dataset = copy(dataset)
        dataset.extract = lambda samples: samples  # so that its windows are those of samples
        samples = {key_of(window): window for clip in clips for window in dataset.windows(clip) if len(window)}
        return {key: self.extract(window) for key, window in samples.items() if self.cache.find(key) is None}


def tell_size(
    clips: list[NewClip],
    datasets: dict[str, SpeechDataset],
    encoder: nn.Module,
    cache: FrameCache,
    args: TrainingArguments,
) -> None:
    """Print how much all processes will encode and write. Raises InputError if that is more than the disk has room."""
    seconds = [dataset.seconds[position] for dataset, position, _ in clips]
    if any(dataset.pad_to_30s for dataset in datasets.values()):
        seconds = [30 * math.ceil(length / 30) for length in seconds]
    shares = gather_object([(len(clips), float(sum(seconds)))])
    count, total = sum(share[0] for share in shares), sum(share[1] for share in shares)  # of all processes
    num_frames = encoder.output_lengths(len(encoder.extract(np.zeros(WINDOW, np.float32))))  # of 30 s
    size, free = 2 * cache.width * num_frames * total / 30, shutil.disk_usage(cache.folder).free  # bytes
    num_clips = sum(map(len, datasets.values()))
    what = f"{count:,} of {num_clips:,} clips are new, {total / 3600:,.1f} hours, about {size / 1e9:,.2f} GB"
    text = f"encoder cache: {what} in {cache.folder}; {free / 1e9:,.1f} GB are free"
    if size > free:
        raise InputError(f"{text}; wanted more room, or an --encoder_cache on another disk")
    if args.process_index == 0:
        print(text)


@torch.no_grad()
def encode(encoder: nn.Module, features: list[Tensor], device: torch.device) -> list[Tensor]:
    """Frames (T, D) of windows of features (F, M) or samples (S,), bf16, on the CPU."""
    lengths = torch.tensor([len(window) for window in features], device=device)  # (A,)
    frames = encoder(pad_sequence(features, batch_first=True).to(device), lengths).bfloat16().cpu()  # (A, T, D)
    return [row[:length] for row, length in zip(frames, encoder.output_lengths(lengths).tolist(), strict=True)]


def fill(
    cache: FrameCache, encoder: nn.Module, clips: list[NewClip], dataset: SpeechDataset, args: TrainingArguments
) -> None:
    """Encode new clips, and silences of two lengths, into a file of this process.

    One stands for a bad clip. The other, of a whole window, tells how many frames a second has.

    Raises InputError for a full disk, and if the encoder gives other frames than the one that filled the cache.
    """
    trial, stored = encode(encoder, [encoder.extract(TRIAL)], args.device)[0], cache.frames(key_of(TRIAL))
    if stored is not None and not (trial - stored).float().norm() <= TOLERANCE * stored.float().norm():
        problem = "this encoder, of the same weights, gives other frames; its code or a library has changed"
        raise InputError(f"{cache.folder}: {problem}: delete that folder, or name another --encoder_cache")
    new = NewWindows(clips, encoder.extract, cache)
    silences = new.windows(dataset, [np.zeros(size, np.float32) for size in (SILENCE, WINDOW)])
    if not clips and not silences and stored is not None:
        return
    first = {key_of(TRIAL): encoder.extract(TRIAL)} | silences
    # As many windows at once as a batch of training has clips: this takes no more memory than training without a cache.
    size, written = args.per_device_train_batch_size, set()
    loader = DataLoader(new, size, num_workers=args.dataloader_num_workers, collate_fn=list)
    with NewFile(cache.folder) as file:
        for batch in chain([[(None, first)]], tqdm(loader, "encoding", unit="batch", disable=args.process_index > 0)):
            windows = {key: window for _, part in batch for key, window in part.items() if key not in written}
            keys = list(windows)  # a clip may stand in two datasets
            for some in (keys[start : start + size] for start in range(0, len(keys), size)):
                frames = encode(encoder, [windows[key] for key in some], args.device)
                file.append(dict(zip(some, frames, strict=True)))
            file.append({mark: trial[:0] for mark, _ in batch if mark})  # behind the frames of their windows
            written |= windows.keys()


class NewFile:
    """A pair of files of this process alone: frames, and the rows of those that are safe on the disk.

    Raises InputError where the disk is full. Frames that have their rows by then stay of use.
    """

    def __init__(self, folder: Path):
        self.path, self.offset, self.rows = folder / uuid4().hex, 0, []  # offset in bytes; rows of unsafe frames
        self.synced = time.monotonic()

    def __enter__(self) -> "NewFile":
        self.frames = open(self.path.with_suffix(".frames"), "xb", buffering=0)
        self.index = open(self.path.with_suffix(".index"), "xb", buffering=0)
        return self

    def append(self, frames: dict[Key, Tensor]) -> None:
        """Add the frames (T, D) of keys; those of a mark are empty."""
        wanted = "room on the disk; what was encoded stays, and the same command goes on from it"
        with as_input_error(f"--encoder_cache {self.path}.frames", "write it", wanted):
            for key, values in frames.items():
                content = values.contiguous().view(torch.int16).numpy().tobytes()
                write_all(self.frames, content)
                self.rows.append((key, self.offset, len(values)))
                self.offset += len(content)
            if time.monotonic() - self.synced > SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        os.fsync(self.frames.fileno())
        write_all(self.index, np.array(self.rows, ROW).tobytes())
        self.rows, self.synced = [], time.monotonic()

    def __exit__(self, error, *_) -> None:
        if error is None:
            self.sync()
        self.frames.close()
        self.index.close()


def write_all(file: BinaryIO, content: bytes) -> None:
    while content:  # a disk that is almost full takes a part
        content = content[file.write(content) :]
