"""The report of a result file, which `python score.py` prints: error rates, counts, and each line that was left out."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from errors import BadUtterance, InputError
from hallucination import shorten
from manifest import key_of, stated_seconds, transcript_of

if TYPE_CHECKING:
    from score import Score


def parse(argv: Sequence[str] | None, metrics: dict[str, Callable], normalizers: dict[str, Callable]):
    """The arguments of score.py; what the metrics and normalisers do is told by their docstrings."""

    def describe(table: dict[str, Callable]) -> str:
        return "; ".join(f"{name}: {function.__doc__}" for name, function in table.items())

    parser = argparse.ArgumentParser(
        description="Error rates of a result file: all lines / without hallucinated ones. "
        "These are listed with the reason. The top of hallucination.py says how they are found.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="manifest with the references: JSON lines with wav and txt")
    add("--result_path", required=True, help="what recognize.py wrote: .txt, or .jsonl with key and pred")
    auto = "auto: cer where most letters of the references are Chinese, Japanese or Thai, else wer (default: auto)"
    what = f"what is counted. {describe(metrics)}; {auto}"
    add("--metric", choices=["auto", *metrics], default="auto", help=what)
    what = f"what both texts go through first. {describe(normalizers)} (default: none)"
    add("--normalizer", choices=list(normalizers), default="none", help=what)
    add("--json", action="store_true", help="print one JSON object; rates are fractions, null without references")
    return parser.parse_args(argv)


@dataclass
class Rows:
    """The lines of a result file that have a reference, beside each other."""

    references: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)  # seconds, NaN where unknown
    places: list[str] = field(default_factory=list)  # file and line of the manifest
    keys: list[str] = field(default_factory=list)
    num_not_scored: int = 0  # lines without a reference

    def left_out(self, result: "Score") -> list[dict]:
        """The hallucinated lines, each with the reason."""
        return [
            {"place": self.places[i], "key": self.keys[i], "pred": self.hypotheses[i], "reason": reason}
            for i, reason in result.hallucinated.items()
        ]


def read_rows(data_path: str, result_path: str) -> Rows:
    """The lines of a result file beside those of its manifest. Raises InputError."""
    from dataset import open_records  # here, because dataset imports torch, for 2 s

    records, rows = open_records(data_path, needs_text=False), Rows()
    keys = [key_of(record) for record in records]
    for record, key, hypothesis in zip(records, keys, read_hypotheses(result_path, keys), strict=True):
        if (reference := transcript_of(record)) is None:
            rows.num_not_scored += 1
            continue
        rows.references.append(reference)
        rows.hypotheses.append(hypothesis)
        rows.durations.append(seconds_of(record))
        rows.places.append(record["where"])
        rows.keys.append(key)
    if not rows.references:
        raise InputError(f"{data_path}: found {len(records):,} lines, none with a reference; wanted 'txt' in them")
    return rows


def read_hypotheses(path: str, keys: Sequence[str]) -> list[str]:
    """The hypotheses of a .txt or .jsonl result file, one for each line of the manifest. Raises InputError."""
    if not str(path).endswith((".txt", ".jsonl")) or not Path(path).is_file():
        raise InputError(f"{path}: no such result file; wanted a .txt or .jsonl that recognize.py wrote")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted text in UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # str.splitlines would also cut inside a hypothesis
    if not lines[-1]:
        lines.pop()  # nothing follows the last line feed
    if len(lines) != len(keys):
        wanted = f"{len(keys):,}, one for each line of the manifest"
        raise InputError(f"{path}: found {len(lines):,} lines; wanted {wanted}; let recognize.py finish")
    if str(path).endswith(".txt"):
        return lines
    hypotheses = []
    for number, (line, key) in enumerate(zip(lines, keys, strict=True), 1):
        try:
            row = json.loads(line)
            row_key, hypothesis = str(row["key"]), row["pred"] + ""  # TypeError if it is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}:{number}: wanted a JSON object with 'key' and 'pred'; decode again") from None
        if row_key != key:
            raise InputError(f"{path}:{number}: found key {row_key!r}; wanted {key!r}; decode this manifest")
        hypotheses.append(hypothesis)
    return hypotheses


def seconds_of(record: dict) -> float:
    """Seconds of audio, as the record states them, else as the header of its file does; NaN if there is none."""
    if not math.isnan(seconds := stated_seconds(record)):
        return seconds
    from dataset import audio_seconds

    try:
        return audio_seconds(record)
    except BadUtterance:
        return math.nan  # counted in the report


def as_json(result: "Score", rows: Rows) -> str:
    """The report as one JSON object."""
    report = {"metric": result.metric, "normalizer": result.normalizer, "num_lines": len(result.lines)}
    for title, counts in (("all", result.all), ("filtered", result.filtered)):
        report[title] = counts._asdict() | {"rate": counts.rate if counts.reference_length else None}
    report |= {"num_not_scored": rows.num_not_scored, "num_unknown_durations": sum(map(math.isnan, rows.durations))}
    return json.dumps(report | {"hallucinated": rows.left_out(result)})


def as_text(result: "Score", rows: Rows, unit: str) -> str:
    """The report to read; `unit` says what the metric counts."""
    sys.stdout.reconfigure(errors="backslashreplace")  # where a text cannot be shown, the numbers still can
    lines = [result.summary(), f"{result.metric} counts {unit}; normalizer: {result.normalizer}"]
    for title, counts in (("all lines", result.all), ("without the lines left out", result.filtered)):
        kinds = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts._asdict().items())
        lines.append(f"{title}: errors {counts.errors:,}: {kinds}")
    for row in rows.left_out(result):
        lines.append(f"left out: {row['place']} {row['key']}: {row['reason']}\n    {shorten(row['pred'], 90)}")
    if rows.num_not_scored:
        lines.append(f"not scored: {rows.num_not_scored:,} lines without a reference")
    if num_unknown := sum(map(math.isnan, rows.durations)):
        lines.append(f'duration unknown: {num_unknown:,} lines, for which "too long" was not checked')
    return "\n".join(lines)
