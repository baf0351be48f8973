"""The report of a result file: error rates, counts, and each line that was left out. `python score.py` prints it."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import BadUtterance, InputError
from hallucination import shorten
from manifest import key_of, open_records, stated_seconds, transcript_of
from score import METRICS, NORMALIZERS, score


def score_files(
    data_path: str, result_path: str, metric: str = "auto", normalizer: str = "none", as_json: bool = False
) -> str:
    """The report of a result file on a manifest, or one JSON object. Lines without a reference are not scored."""
    records = open_records(data_path, needs_text=False)
    keys = [key_of(record) for record in records]
    hypotheses = read_hypotheses(result_path, keys)
    rows, references, durations = [], [], []
    for record, key, hypothesis in zip(records, keys, hypotheses, strict=True):
        reference = transcript_of(record)
        if reference is not None:
            rows.append({"place": record["where"], "key": key, "pred": hypothesis})
            references.append(reference)
            durations.append(seconds_of(record))
    if not rows:
        raise InputError(f"{data_path}: found {len(records):,} lines, none with a reference; wanted 'txt' in them")

    result = score(references, [row["pred"] for row in rows], durations, metric, normalizer)
    left_out = [rows[index] | {"reason": reason} for index, reason in result.hallucinated.items()]
    num_not_scored, num_unknown_durations = len(records) - len(rows), sum(map(math.isnan, durations))
    if as_json:
        report = {"metric": result.metric, "normalizer": result.normalizer, "num_lines": len(rows)}
        for title, counts in (("all", result.all), ("filtered", result.filtered)):
            report[title] = counts._asdict() | {"rate": counts.rate if counts.reference_length else None}
        report |= {"num_not_scored": num_not_scored, "num_unknown_durations": num_unknown_durations}
        return json.dumps(report | {"hallucinated": left_out})

    lines = [result.summary()]
    lines.append(f"metric: {result.metric}, in {METRICS[result.metric].__doc__}; normalizer: {result.normalizer}")
    for title, counts in (("all lines", result.all), ("without the lines left out", result.filtered)):
        kinds = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts._asdict().items())
        lines.append(f"{title}: errors {counts.errors:,}: {kinds}")
    for row in left_out:
        lines.append(f"left out: {row['place']} {row['key']}: {row['reason']}\n    {shorten(row['pred'], 90)}")
    if metric == "auto":
        lines.append(f"{result.metric} was chosen by the script of the references; --metric overrules that")
    if num_not_scored:
        lines.append(f"not scored: {num_not_scored:,} lines without a reference")
    if num_unknown_durations:
        lines.append(f'duration unknown: {num_unknown_durations:,} lines, for which "too long" was not checked')
    return "\n".join(lines)


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
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: wanted a JSON object with 'key' and 'pred'; decode again") from None
        if row_key != key:
            raise InputError(f"{path}:{number}: found key {row_key!r}; wanted {key!r}; decode this manifest")
        hypotheses.append(hypothesis)
    return hypotheses


def seconds_of(record: dict) -> float:
    """Seconds of audio, as the record states them, else as the header of its file does; NaN if there is none."""
    if not math.isnan(seconds := stated_seconds(record)):
        return seconds
    from dataset import audio_seconds  # here, for dataset imports torch: 3 s

    try:
        return audio_seconds(record)
    except BadUtterance:
        return math.nan  # counted in the report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    add(
        "--metric",
        choices=["auto", *METRICS],
        default="auto",
        help=f"what is counted. {describe(METRICS)}; auto: cer where most letters of the references are Chinese, "
        "Japanese or Thai, else wer (default: auto)",
    )
    add(
        "--normalizer",
        choices=list(NORMALIZERS),
        default="none",
        help=f"what both texts go through first. {describe(NORMALIZERS)} (default: none)",
    )
    add("--json", action="store_true", help="print one JSON object; rates are fractions, null without references")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # where a text cannot be shown, the numbers still can
    print(score_files(args.data_path, args.result_path, args.metric, args.normalizer, args.json))
