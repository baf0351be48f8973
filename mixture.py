"""Several sources at once: --data_path a.jsonl:0.7 nemo:b.json:0.3, with or without weights."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from errors import InputError
from manifest import Records
from sources import SOURCES, open_source


class Mixture(Sequence):
    """The records of several sources, one behind the other; those of some come several times.

    Without weights each record comes once. With weights (of any sum) an epoch is as long as it takes for every record
    of every source to come at least once. Of n_i records with weight w_i, where the weights add up to 1, it has
    E = max(n_i / w_i) places. Source i has E * w_i of them, and its records take turns there.
    """

    def __init__(self, parts: Sequence[Records], weights: Sequence[float] | None = None, names: Sequence[str] = ()):
        self.parts, self.names = list(parts), list(names)
        self.sizes = np.array([len(part) for part in parts])  # records of each source
        self.weights = None if weights is None else np.array(weights) / sum(weights)
        self.places = self.sizes  # of each source in an epoch
        if weights is not None:
            self.places = np.rint((self.sizes / self.weights).max() * self.weights).astype(int).clip(self.sizes)
        self.ends = self.places.cumsum()
        turns = [np.resize(part.durations, count) for part, count in zip(parts, self.places, strict=True)]
        self.durations = np.concatenate(turns)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = int(np.searchsorted(self.ends, index, side="right"))
        place = index - int(self.ends[source] - self.places[source])
        return self.parts[source][place % int(self.sizes[source])]

    def __str__(self) -> str:
        """`a.jsonl: 700 records, 70.0 % of an epoch, each 1.00 times; ...`."""
        columns = zip(self.names, self.sizes, self.places, strict=True)
        return "; ".join(
            f"{name}: {size:,} records, {count / len(self):.1%} of an epoch, each {count / size:.2f} times"
            for name, size, count in columns
        )

    def fingerprint(self, count: int | None = None) -> str:
        """`SIZE:FINGERPRINT:WEIGHT` of each source, up to the first `count` places; no weight where none was given."""
        terms, left = [], len(self) if count is None else count
        for source, places in enumerate(self.places):
            size = min(int(self.sizes[source]), left)
            terms += [self.term(source, size)] if size > 0 else []
            left -= int(places)
        return " ".join(terms)

    def term(self, source: int, size: int) -> str:
        """The part of the fingerprint that tells the first `size` records of a source."""
        weight = "" if self.weights is None else f":{self.weights[source]:g}"
        return f"{size}:{self.parts[source].fingerprint(size)}{weight}"

    def continues(self, fingerprint: str, count: int) -> bool:
        """Whether these are the `count` records of an earlier run, perhaps with more behind those of any source.

        Without weights, sources may have come behind the earlier ones, and behind a single one.
        """
        earlier = fingerprint.split() if ":" in fingerprint else [f"{count}:{fingerprint}"]  # a term a source
        if len(earlier) > len(self.parts):
            return False
        return all(term == self.term(source, int(term.partition(":")[0])) for source, term in enumerate(earlier))


def open_sources(sources: list[str], needs_text: bool = True, may_weigh: bool = False, **options: str) -> Records:
    """The records of several sources; `options` are fields of SourceOptions. Raises InputError."""
    if not sources:
        raise InputError("--data_path: found nothing behind it; wanted one source of data or several")
    names, weights = zip(*map(split_weight, sources), strict=True)
    weighed = [source for source, weight in zip(sources, weights, strict=True) if weight is not None]
    others = [source for source, weight in zip(sources, weights, strict=True) if weight is None]
    if weighed and not may_weigh:
        raise InputError(f"{weighed[0]}: a weight, where each record comes once; wanted {split_weight(weighed[0])[0]}")
    if weighed and others:
        raise InputError(f"{others[0]}: no weight, where other sources have one; wanted {others[0]}:NUMBER")
    parts = [open_source(name, needs_text, **options) for name in names]
    if len(parts) == 1:
        return parts[0]
    mixture = Mixture(parts, weights if weighed else None, names)
    if may_weigh:
        say(f"sources: {mixture}")
    return mixture


def split_weight(source: str) -> tuple[str, float | None]:
    """("a.jsonl", 0.7) of "a.jsonl:0.7"; None where no number stands behind the last colon, or a file has that name."""
    name, colon, number = source.rpartition(":")
    is_kind = name in SOURCES  # folder:2024 is a folder of that name
    if not colon or is_kind or Path(source).exists() or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", number):
        return source, None
    if float(number) <= 0:
        raise InputError(f"{source}: the weight {number}; wanted more than 0, or leave the source out")
    return name, float(number)


def say(text: str) -> None:
    """Print on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
