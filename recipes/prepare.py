"""Manifests of a corpus that lhotse knows: OUT/PART.jsonl for each part of it.

    python -m recipes.prepare librispeech corpora data/librispeech  # corpora/LibriSpeech is there
    python -m recipes.prepare aishell corpora data/aishell  # corpora/data_aishell is there
    python -m recipes.prepare ami corpora/ami data/ami mic=sdm  # any other; mic is an option of lhotse's prepare_ami

Audio stays where it is, and its paths are absolute: manifests can be moved, and joined with `cat`.
"""

import argparse
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import yaml

from errors import InputError, nearest, run
from manifest import stated_seconds

try:
    import lhotse.recipes
    from lhotse import RecordingSet, SupervisionSet
    from lhotse.audio.utils import AudioLoadingError
except ImportError:
    sys.exit("error: recipes.prepare reads corpora by lhotse, which is not installed; pip install lhotse")


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus beside lhotse's recipe."""

    folder: str = ""  # the folder inside FOLDER that lhotse's recipe wants
    options: dict = field(default_factory=dict)  # of lhotse's recipe
    published: dict[str, tuple[int, float]] = field(default_factory=dict)  # part -> utterances, hours
    cure: str = ""  # what to do if some of it is missing


CORPORA = {
    "librispeech": Corpus(
        folder="LibriSpeech",
        options={"normalize_text": "lower"},  # an LLM has read few texts in capitals
        # Utterances: the dataset card of openslr/librispeech_asr. Hours: the table of Panayotov and others, 2015, in
        # which those of dev-other and test-other have changed places (icefall counts 5.1 and 5.3).
        published={
            "train-clean-100": (28539, 100.6),
            "train-clean-360": (104014, 363.6),
            "train-other-500": (148688, 496.7),
            "dev-clean": (2703, 5.4),
            "dev-other": (2864, 5.1),
            "test-clean": (2620, 5.4),
            "test-other": (2939, 5.3),
        },
        cure="unpack the archive of each part again: tar xzf test-clean.tar.gz -C FOLDER",
    ),
    "aishell": Corpus(
        # icefall's count of the files that have a transcript; its hours of train are of three speeds, so divided.
        published={"train": (120098, 150.9), "dev": (14326, 18.1), "test": (7176, 10.0)},
        cure="unpack each speaker's archive: find FOLDER/data_aishell/wav -name '*.tar.gz' -execdir tar xzf {} ';'",
    ),
}


def find_recipe(name: str) -> Callable:
    """lhotse's function prepare_NAME. Raises InputError."""
    names = [function.removeprefix("prepare_") for function in dir(lhotse.recipes) if function.startswith("prepare_")]
    if name not in names:
        raise InputError(f"{name}: lhotse has no recipe prepare_{name}{nearest(name, names)}")
    return getattr(lhotse.recipes, f"prepare_{name}")


def read_options(words: list[str], recipe: Callable) -> dict[str, Any]:
    """The options of lhotse's recipe from words like num_jobs=8; values are YAML. Raises InputError."""
    names, options = list(inspect.signature(recipe).parameters)[1:], {}  # the first is the folder
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise InputError(f"{word}: wanted NAME=VALUE, and one of {recipe.__name__}'s names: {', '.join(names)}")
        options[name] = yaml.safe_load(value)
    return options


def run_recipe(recipe: Callable, folder: Path, options: dict, out: Path, cure: str) -> Any:
    """What lhotse's recipe returns. Raises InputError for what it cannot read, and warns of what it left out."""
    parameters = inspect.signature(recipe).parameters
    if "output_dir" in parameters and parameters["output_dir"].default is inspect.Parameter.empty:
        options = {"output_dir": out / "lhotse"} | options  # some recipes insist on writing manifests of their own
    log = BufferingHandler(sys.maxsize)
    log.setLevel(logging.WARNING)
    logging.getLogger().addHandler(log)  # lhotse logs what it leaves out
    try:
        manifests = recipe(folder, **options)
    except (OSError, ValueError, LookupError, TypeError, AssertionError, ImportError, AudioLoadingError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].removesuffix(" Details:")
        raise InputError(f"{folder}: lhotse's {recipe.__name__} fails ({reason}){cure}") from error
    finally:
        logging.getLogger().removeHandler(log)
    if log.buffer:
        first = " ".join(log.buffer[0].getMessage().split())
        warnings.warn(f"lhotse left things out; the first of its {len(log.buffer):,} messages: {first}", stacklevel=2)
    return manifests


def find_parts(manifests: Any, *names: str) -> Iterator[tuple[str, RecordingSet, SupervisionSet]]:
    """The name, recordings and supervisions of each part. Raises InputError.

    lhotse's recipes return one pair, a dict of them by part, or dicts in dicts; `names` lead to this pair or dict.
    """
    if isinstance(manifests, tuple) and len(manifests) == 2:
        manifests = dict(zip(("recordings", "supervisions"), manifests, strict=True))
    if not isinstance(manifests, dict):
        found = f"{'-'.join(names)}: lhotse's recipe makes a {type(manifests).__name__}"
        raise InputError(f"{found}; wanted a RecordingSet and a SupervisionSet")
    if {"recordings", "supervisions"} <= manifests.keys():
        yield "-".join(names) or "all", manifests["recordings"], manifests["supervisions"]
    else:
        for name, part in manifests.items():
            yield from find_parts(part, *names, str(name))


def make_rows(recordings: RecordingSet, supervisions: SupervisionSet) -> list[dict]:
    """The manifest's lines, sorted by key; those of supervisions without a text are left out. Raises InputError."""
    by_id, rows = {recording.id: recording for recording in recordings}, []
    for segment in supervisions:
        text = " ".join((segment.text or "").split())
        if not text:
            continue
        recording = by_id.get(segment.recording_id)
        if recording is None:
            raise InputError(f"{segment.id}: lhotse's recipe has no recording {segment.recording_id} for it")
        if len(recording.sources) != 1 or recording.sources[0].type != "file" or recording.transforms:
            raise InputError(f"{segment.id}: its audio is not one plain file; save it as one first")
        channels = segment.channel if isinstance(segment.channel, list) else [segment.channel]
        if set(channels) != set(recording.channel_ids):
            found = f"{segment.id}: channels {channels} of {recording.channel_ids} in {recording.sources[0].source}"
            raise InputError(f"{found}; a manifest's line has all of them: save each channel as a file of its own")
        row = {"key": segment.id, "wav": str(Path(recording.sources[0].source).absolute()), "txt": text}
        if segment.start > 0 or segment.end < recording.duration - 0.01:  # a stretch of the file
            row |= {"start": round(segment.start, 4), "end": round(segment.end, 4)}
        else:
            row |= {"duration": round(recording.duration, 4)}
        about = {"speaker": segment.speaker, "language": segment.language}
        rows.append(row | {name: value for name, value in about.items() if value})
    return sorted(rows, key=lambda row: row["key"])  # lhotse's order is the file system's


def write_manifest(path: Path, rows: list[dict]) -> None:
    partial_path = path.with_name(f"{path.name}.partial")  # so that after a kill no manifest looks complete
    partial_path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial_path.replace(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", metavar="NAME", help="of lhotse's recipe, as in prepare_NAME")
    add("folder", metavar="FOLDER", type=Path, help="in which the corpus was unpacked")
    add("out", metavar="OUT", type=Path, help="where the manifests go")
    add("options", metavar="OPTION=VALUE", nargs="*", help="options of lhotse's recipe, such as num_jobs=8")
    args = parser.parse_args(argv)

    recipe, corpus = find_recipe(args.name), CORPORA.get(args.name, Corpus())
    options = corpus.options | read_options(args.options, recipe)
    folder = args.folder / corpus.folder
    cure = f"; {corpus.cure.replace('FOLDER', str(args.folder))}" if corpus.cure else ""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder{cure}")
    manifests = run_recipe(recipe, folder, options, args.out, cure)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {}  # part -> utterances
    for name, recordings, supervisions in sorted(find_parts(manifests), key=lambda part: part[0]):
        rows = make_rows(recordings, supervisions)
        counts[name] = len(rows)
        write_manifest(args.out / f"{name}.jsonl", rows)
        hours, speakers = sum(map(stated_seconds, rows)) / 3600, len({row.get("speaker") for row in rows})
        print(f"{args.out}/{name}.jsonl: {len(rows):,} utterances, {hours:,.1f} hours, {speakers:,} speakers")
        if without_text := len(supervisions) - len(rows):
            print(f"{name}: {without_text:,} segments without a text are left out")
    if missing := [part for part in corpus.published if part not in counts]:
        print(f"not in {folder}: {', '.join(missing)}")
    incomplete = [
        f"{part} has {counts[part]:,} of {count:,} utterances ({hours} hours)"
        for part, (count, hours) in corpus.published.items()
        if counts.get(part, count) != count
    ]
    if incomplete:
        warnings.warn(f"incomplete: {', '.join(incomplete)}{cure}", stacklevel=2)


if __name__ == "__main__":
    run(main)
