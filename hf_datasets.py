"""Data sets of Hugging Face: --data_path hf:PLACE, or hf:PLACE:SPLIT.

PLACE is a name on the Hub; a folder of parquet, audiofolder, JSON lines, csv or WebDataset tars; one such file, or a
glob of them; or a folder of save_to_disk. Audio may be files, paths, or arrays of any rate. soundfile decodes it.
"""

import json
import tarfile
import textwrap
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob, has_magic
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import InputError
from manifest import SAMPLE_RATE, SECONDS, TYPES, Records, check_record, stated_seconds, without_nulls
from packed_audio import PackedAudio, check_tar, wav_of

if TYPE_CHECKING:
    import pyarrow
    from datasets import Audio, Dataset, IterableDataset

# Our key -> columns that stand for it where none has its name. A WebDataset's x.json makes columns json.NAME.
USUAL_NAMES = {"wav": ["audio"], "txt": ["text", "json.text"], "key": ["__key__"], "duration": ["json.duration"]}
BATCH = 1000  # rows that are looked through at a time


def records_of_place(place: str, needs_text: bool, subset: str, split: str, remap_keys: str) -> Records:
    """The records of a split of a data set; PLACE:SPLIT wins over `split`. Raises InputError."""
    name, path = f"hf:{place}", Path(place)
    if ":" in place and not path.exists():
        place, _, split = place.partition(":")
        path = Path(place)
    dataset = open_dataset(place, subset, split)
    keys = keys_of_columns(dataset.features, name, needs_text, key_names(remap_keys))
    folder = path if path.is_dir() else path.parent if is_file(place) else Path()  # of relative paths
    return TableRecords(dataset, name, folder, keys, needs_text)


def stream_of_place(
    place: str, data_subset: str = "", data_split: str = "train", remap_keys: str = "", **others: str
) -> Callable[[int], Iterator[dict]]:
    """Epoch -> the records of a split as they come, with its shards in another order each time. Raises InputError."""
    if others:
        raise InputError(f"--streaming: --{min(others)} looks at all records first; leave one of them out")
    name, path = f"hf:{place}", Path(place)
    if ":" in place and not path.exists():
        place, _, data_split = place.partition(":")
        path = Path(place)
    dataset = open_dataset(place, data_subset, data_split, streaming=True)
    dataset = dataset if dataset.features else dataset._resolve_features()
    keys = keys_of_columns(dataset.features, name, True, key_names(remap_keys))
    folder = path if path.is_dir() else path.parent if is_file(place) else Path()
    # One shard at a time: of several at once datasets holds a row group each, and it waits 5 s after every epoch.
    shards = dataset.with_format("arrow").shuffle(seed=0, buffer_size=1, max_buffer_input_shards=1)

    def read(epoch: int) -> Iterator[dict]:
        shards.set_epoch(epoch)
        for number, table in enumerate(shards):
            (row,) = renamed(table, keys).to_pylist()
            where = f"{name} epoch {epoch} row {number}"
            record = record_of(row, where, folder)
            check_record(record | ({"wav": str(record["wav"])} if "wav" in record else {}), where, True)
            yield record

    return read


# Opening


def is_file(place: str) -> bool:
    """Whether a place is a file, or a glob of files."""
    return Path(place).is_file() or has_magic(place)


def open_dataset(place: str, subset: str = "", split: str = "", streaming: bool = False) -> "Dataset | IterableDataset":
    """A split of a data set, in which no audio is decoded. Without a name it is the only split. Raises InputError."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{place}: the package datasets is missing; pip install datasets") from None
    datasets.Audio.encode_example = stored_audio  # theirs wants torchcodec and FFmpeg, even where nothing is encoded
    for path in [*glob(place), *glob(f"{place}/**/*.tar", recursive=True)]:
        if path.endswith(".tar"):
            check_tar(Path(path))
    subset = subset or None  # as datasets has it
    if "/" not in place and not Path(place).exists() and not is_file(place):  # datasets would take "json" for a format
        raise InputError(f"hf:{place}: no such folder; wanted one, or a name on the Hub: OWNER/NAME")
    try:
        if any(Path(place, name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(place)
            splits = saved if isinstance(saved, dict) else {str(saved.split or split or "train"): saved}
            dataset = splits[named_split(place, split, list(splits))]
            return dataset.to_iterable_dataset() if streaming else dataset
        folder, files = (Path(place).parent, Path(place).name) if is_file(place) else (place, None)
        folder = (
            str(Path(folder).absolute()) if Path(folder).is_dir() else place
        )  # absolute: it may be named "json", too
        if not split:
            split = named_split(place, split, datasets.get_dataset_split_names(folder, subset, data_files=files))
        return datasets.load_dataset(folder, subset, split=split, data_files=files, streaming=streaming)
    except InputError:  # says it already
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, TypeError, tarfile.TarError) as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 400, placeholder=" ...")
        wanted = "wanted a name on the Hub, or a folder of parquet, audio, JSON lines or tars"
        raise InputError(f"hf:{place}: cannot be opened ({reason}); {wanted}") from error


def named_split(place: str, split: str, splits: list[str]) -> str:
    """`split`, or the only one that there is. Raises InputError."""
    if not split and len(splits) == 1:
        return splits[0]
    if split not in splits:
        found = f"no split {split!r}" if split else "no split named"
        raise InputError(f"hf:{place}: {found}; it has {', '.join(splits)}; give hf:{place}:{splits[-1]}")
    return split


def stored_audio(feature: "Audio", value: Any) -> dict:
    """What a table holds of an audio file that is a path, bytes, or both; in the place of Audio.encode_example."""
    if isinstance(value, (str, Path)):
        return {"bytes": None, "path": str(value)}
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


# Columns


def key_names(remap_keys: str) -> dict[str, str]:
    """Their keys -> ours, of --remap_keys. Raises InputError."""
    try:
        names = json.loads(remap_keys or "{}")
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"--remap_keys {remap_keys}: wanted JSON such as {json.dumps({'sentence': 'txt'})}")
    return names


def keys_of_columns(features: dict, name: str, needs_text: bool, remap_keys: dict[str, str]) -> dict[str, str]:
    """Column -> our key. Raises InputError, with the columns that there are, where one is missing."""
    columns = list(features)
    if isinstance(features.get("json"), dict):
        columns += [f"json.{field}" for field in features["json"]]  # of a WebDataset
    found = f"it has {', '.join(columns)}"
    if missing := sorted(remap_keys.keys() - set(columns)):
        raise InputError(f"{name}: --remap_keys names {missing[0]!r}, and there is no such column; {found}")
    others = [column for column in features if column not in {*remap_keys, *remap_keys.values()}]
    keys = {column: column for column in others} | remap_keys
    audio = [column for column in others if type(features[column]).__name__ == "Audio"]
    usual = USUAL_NAMES | {"wav": audio if len(audio) == 1 else ["audio"]}
    for key in usual.keys() - set(keys.values()):
        for column in [column for column in usual[key] if column in columns and column not in remap_keys][:1]:
            keys[column] = key
    needed = ["wav", "txt"] if needs_text else ["wav"]
    missing = [key for key in needed if key not in keys.values()]
    if missing and "messages" not in keys.values():
        cure = json.dumps({"COLUMN": missing[0]})
        raise InputError(f"{name}: no column for {missing[0]!r}; {found}; give --remap_keys '{cure}'")
    return keys


def renamed(table: "pyarrow.Table", keys: dict[str, str]) -> "pyarrow.Table":
    """The columns of a table by our keys."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(name: str) -> pa.ChunkedArray:
        if name in table.column_names:
            return table[name]
        return pc.struct_field(table["json"], name.removeprefix("json."))

    return pa.table({key: column(name) for name, key in keys.items()})


def sizes_of_audio(table: "pyarrow.Table") -> "pyarrow.Table":
    """A table with wav, or wav.bytes and wav.path, as they are, but of bytes and lists the lengths: read in no time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def size(column: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return pc.binary_length(column)
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        return pc.list_value_length(column) if is_list else column

    table = table.flatten()  # a column of structs becomes one column for each of their fields
    return pa.table({name: size(table[name]) if is_audio(name) else table[name] for name in table.column_names})


def is_audio(column: str) -> bool:
    return column.partition(".")[0] == "wav"


# Records


class TableRecords(Sequence):
    """The records of a Dataset, whose rows stay on the disk until they are asked for.

    Opening it reads and checks what is no audio. Raises InputError with the number of the first bad row, from 0.
    """

    def __init__(self, dataset: "Dataset", name: str, folder: Path, keys: dict[str, str], needs_text: bool = True):
        self.dataset = dataset.with_format("arrow")  # [i : j] are tables, in which no audio is decoded
        self.name, self.folder, self.keys, durations = name, folder, keys, array("d")
        for index, row in enumerate(self.rows_without_audio()):
            has_audio = any(is_audio(column) for column in row)
            row = {column: value for column, value in row.items() if not is_audio(column)}
            check_record(row | ({"wav": ""} if has_audio else {}), f"{name} row {index}", needs_text)
            durations.append(stated_seconds(row))
        if not durations:
            raise InputError(f"{name}: the data set is empty; wanted rows with 'wav' and 'txt'")
        self.durations = np.array(durations)

    def rows_without_audio(self) -> Iterator[dict]:
        """Of each row the keys that a record has, with sizes in the place of audio."""
        keys = {column: key for column, key in self.keys.items() if key in (*TYPES, *SECONDS)}
        for table in self.dataset.iter(BATCH):
            yield from map(without_empty, sizes_of_audio(renamed(table, keys)).to_pylist())

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        (row,) = renamed(self.dataset[index : index + 1], self.keys).to_pylist()
        return record_of(row, f"{self.name} row {index}", self.folder)

    def fingerprint(self, count: int | None = None) -> str:
        digest = sha256()
        for row in islice(self.rows_without_audio(), count):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        return digest.hexdigest()


def record_of(row: dict, where: str, folder: Path) -> dict:
    """The record of a row that has our keys."""
    record = without_empty(row) | {"where": where, "folder": folder}
    if "wav" in record:
        record["wav"], path = audio_of(record["wav"])
        record = {"key": Path(path).stem} | record if path else record
    return record


def audio_of(value: str | bytes | list | dict) -> tuple[str | PackedAudio, str | None]:
    """The audio of a row, and its path if that is known."""
    if isinstance(value, str):
        return value, value
    value = {"bytes": value} if isinstance(value, bytes) else value
    value = {"array": value, "sampling_rate": SAMPLE_RATE} if isinstance(value, list) else value
    path = value.get("path")
    if value.get("array") is not None:
        return PackedAudio(path or "audio", partial(wav_of, value["array"], value["sampling_rate"])), path
    if value.get("bytes") is not None:
        return PackedAudio(path or "audio", partial(bytes, value["bytes"])), path
    return path, path


def without_empty(row: dict) -> dict:
    """A row without nulls, those in the turns of a conversation too: a table has all columns in all rows."""
    row = without_nulls(row)
    if isinstance(row.get("messages"), list):
        row["messages"] = [without_nulls(turn) if isinstance(turn, dict) else turn for turn in row["messages"]]
    return row
