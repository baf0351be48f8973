"""Word and character error rates of a result file, with and without hallucinated lines.

    python score.py --data_path test.jsonl --result_path result.txt
    WER 7.62 / 6.29, 12 of 2,620 lines left out

The first figure counts every line: errors summed over the corpus, divided by the length of all references.

The second leaves out the lines where the LLM did something else than transcribe: hallucination.py says which.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jiwer
import numpy as np

from audio import seconds_of
from hallucination import UNSPACED, cut, hallucination
from manifest import BadUtterance, InputError, Manifest, record_key, reference, run

METRICS, NORMALIZERS = ("auto", "wer", "cer"), ("none", "basic", "english")


@dataclass(frozen=True)
class Counts:
    """Errors summed over lines, in words (WER) or characters (CER)."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors / reference_length, a fraction; nan where every reference is empty, whatever the errors."""
        return self.errors / self.reference_length if self.reference_length else float("nan")


@dataclass(frozen=True)
class Score:
    metric: str  # "wer" or "cer", never "auto"
    normalizer: str
    num_lines: int
    all: Counts
    filtered: Counts  # without the hallucinated lines
    hallucinated: list[tuple[int, str]]  # (index of the line, reason)

    def parts(self) -> list[tuple[str, Counts]]:
        return [("all", self.all), ("filtered", self.filtered)]

    def summary(self) -> str:
        """`WER 7.62 / 6.29, 12 of 2,620 lines left out`: per cent of all lines / without these."""
        rates = f"{100 * self.all.rate:.2f} / {100 * self.filtered.rate:.2f}"
        left_out = f"{len(self.hallucinated):,} of {self.num_lines:,} lines left out"
        return f"{self.metric.upper()} {rates}, {left_out}"

    def report(self, hypotheses: Sequence[str], names: Sequence[str] | None = None) -> str:
        """The summary, the counts of both figures, and each line left out, called by its `names` if given."""
        unit = {"wer": "words", "cer": "characters without whitespace"}[self.metric]
        lines = [self.summary(), f"metric: {self.metric}, in {unit}; normalizer: {self.normalizer}"]
        for title, counts in (("all lines", self.all), ("without the lines left out", self.filtered)):
            kinds = ", ".join(f"{kind.replace('_', ' ')} {n:,}" for kind, n in asdict(counts).items())
            lines.append(f"{title}: errors {counts.errors:,}: {kinds}")
        for index, reason in self.hallucinated:
            name = names[index] if names else f"line {index + 1}"
            lines.append(f"left out: {name}: {reason}\n    {cut(hypotheses[index], 90)}")
        return "\n".join(lines)


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    durations: Sequence[float | None] | None = None,
    metric: str = "auto",
    normalizer: str = "none",
) -> Score:
    """The error counts of a corpus, over all lines and without hallucinated lines.

    WER splits words at whitespace; CER counts code points and ignores whitespace. "auto" is CER where most
    letters of the references are Chinese, Japanese or Thai, else WER. A reference may be empty: its
    hypothesis is then all insertions. `durations` are in seconds; None, for all lines or for one, switches
    "too long" off. What is hallucinated is decided on the text as given: the normaliser has no say in it.
    Raises InputError (a ValueError) for unequal lengths and unknown names.
    """
    durations = [None] * len(references) if durations is None else durations
    lengths = (len(references), len(hypotheses), len(durations))
    if len(set(lengths)) > 1:
        raise InputError(f"found {lengths} references, hypotheses and durations; wanted as many of each")
    for name, value, known in (("metric", metric, METRICS), ("normalizer", normalizer, NORMALIZERS)):
        if value not in known:
            raise InputError(f"{name}: found {value!r}; wanted one of {', '.join(known)}")
    metric = choose_metric(references) if metric == "auto" else metric
    normalize = _load_normalizer(normalizer)
    rows, kept, hallucinated = [], [], []
    lines = zip(references, hypotheses, durations, strict=True)
    for index, (spoken, written, seconds) in enumerate(lines):
        rows.append(_count_line(normalize(spoken), normalize(written), metric))
        if reason := hallucination(spoken, written, seconds):
            hallucinated.append((index, reason))
        else:
            kept.append(rows[-1])
    return Score(metric, normalizer, len(rows), _total(rows), _total(kept), hallucinated)


def choose_metric(references: Sequence[str]) -> str:
    """cer where most letters are Chinese, Japanese or Thai, else wer. Korean has spaces: wer."""
    text = "".join(references)
    num_unspaced = len(re.findall(f"[{UNSPACED}]", text))
    return "cer" if num_unspaced > len(re.findall(rf"[^\W\d_{UNSPACED}]", text)) else "wer"


def _load_normalizer(name: str) -> Callable[[str], str]:
    if name == "none":
        return str
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer  # 5 s: it imports torch

    return BasicTextNormalizer() if name == "basic" else EnglishTextNormalizer()


def _count_line(reference: str, hypothesis: str, metric: str) -> tuple[int, int, int, int]:
    """(substitutions, deletions, insertions, reference length) of one line."""
    split = str.split if metric == "wer" else lambda text: list("".join(text.split()))
    spoken, written = split(reference), split(hypothesis)
    # Tokens go in as they are: jiwer splits words at U+0020 alone, and counts spaces as characters.
    errors = jiwer.process_words([spoken], [written], reference_transform=list, hypothesis_transform=list)
    return errors.substitutions, errors.deletions, errors.insertions, len(spoken)


def _total(rows: list[tuple[int, int, int, int]]) -> Counts:
    return Counts(*(sum(column) for column in zip(*rows, strict=True)))


def read_hypotheses(path: str, keys: Sequence[str]) -> list[str]:
    """The hypotheses of a .txt or .jsonl result file, one for each line of the manifest. Raises InputError."""
    if not str(path).endswith((".txt", ".jsonl")) or not Path(path).is_file():
        raise InputError(f"{path}: no such result file; wanted a .txt or .jsonl that recognize.py wrote")
    try:  # cut at "\n" alone: str.splitlines would also cut inside a hypothesis
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted text in UTF-8") from None
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if len(lines) != len(keys):
        wanted = f"{len(keys):,}, one for each line of the manifest"
        raise InputError(f"{path}: found {len(lines):,} lines; wanted {wanted}; let recognize.py finish")
    if str(path).endswith(".txt"):
        return lines
    hypotheses = []
    for number, (line, key) in enumerate(zip(lines, keys, strict=True), 1):
        try:
            row = json.loads(line)
            found, text = str(row["key"]), row["pred"] + ""
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: wanted a JSON object with 'key' and 'pred'; decode again") from None
        if found != key:
            raise InputError(f"{path}:{number}: found key {found!r}; wanted {key!r}; decode this manifest")
        hypotheses.append(text)
    return hypotheses


def score_files(
    data_path: str, result_path: str, metric: str = "auto", normalizer: str = "none", as_json: bool = False
) -> str:
    """The report of a result file on a manifest, or one JSON object. Lines without a reference are not scored."""
    manifest = Manifest(data_path, needs_text=False)
    records = list(manifest)
    keys = [record_key(record) for record in records]
    hypotheses = read_hypotheses(result_path, keys)
    scored = [index for index, record in enumerate(records) if reference(record) is not None]
    if not scored:
        raise InputError(f"{data_path}: found {len(records):,} lines, none with a reference; wanted 'txt' in them")
    durations = [known_seconds(records[index], manifest.durations[index]) for index in scored]
    references = [reference(records[index]) for index in scored]
    hypotheses = [hypotheses[index] for index in scored]
    result = score(references, hypotheses, durations, metric, normalizer)
    if as_json:
        counts = {name: asdict(c) | {"rate": c.rate if c.reference_length else None} for name, c in result.parts()}
        numbers = {"num_not_scored": len(records) - len(scored), "num_unknown_durations": durations.count(None)}
        left_out = [
            {"place": records[scored[i]]["where"], "key": keys[scored[i]], "reason": reason, "pred": hypotheses[i]}
            for i, reason in result.hallucinated
        ]
        return json.dumps(asdict(result) | counts | numbers | {"hallucinated": left_out})
    lines = [result.report(hypotheses, [f"{records[index]['where']} {keys[index]}" for index in scored])]
    if metric == "auto":
        lines.append(f"{result.metric} was chosen by the script of the references; --metric overrules that")
    if len(scored) < len(records):
        lines.append(f"not scored: {len(records) - len(scored):,} lines without a reference")
    if None in durations:
        lines.append(f'duration unknown: {durations.count(None):,} lines, for which "too long" was not checked')
    return "\n".join(lines)


def known_seconds(record: dict, stated: float) -> float | None:
    try:
        return seconds_of(record, stated)
    except BadUtterance:
        return None if np.isnan(stated) else float(stated)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Word or character error rate of a result file: all lines / without hallucinated ones. "
        "These are listed with the reason. The top of hallucination.py says how they are found.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="manifest with the references: JSON lines with wav and txt")
    add("--result_path", required=True, help="what recognize.py wrote: .txt, or .jsonl with key and pred")
    add(
        "--metric",
        choices=METRICS,
        default="auto",
        help="wer: words; cer: characters without whitespace; auto: cer where most letters of the references are "
        "Chinese, Japanese or Thai, else wer (default: auto)",
    )
    add(
        "--normalizer",
        choices=NORMALIZERS,
        default="none",
        help="what both texts go through first. none: nothing, so case and punctuation count; basic: Whisper's, lower "
        "case, no punctuation (nor the vowel signs of Thai and Hindi); english: Whisper's, also for spelling, numbers "
        "and contractions (default: none)",
    )
    add("--json", action="store_true", help="print one JSON object; rates are fractions, null without references")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")  # where a text cannot be shown, the numbers still can
    print(score_files(args.data_path, args.result_path, args.metric, args.normalizer, args.json))


if __name__ == "__main__":
    run(main)
