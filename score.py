"""Word and character error rates of a result file, with and without hallucinated lines.

    python score.py --data_path test.jsonl --result_path result.txt
    WER 7.62 / 6.29, 12 of 2,620 lines left out

The first figure counts every line: errors summed over the corpus, divided by the length of all references.

The second figure leaves out the lines where the LLM did something else than transcribe. WeST gives both
(https://github.com/wenet-e2e/west; its example is "I apologize, but it appears that there is no speech to
transcribe."). Such a filter reads the reference, and every plain error that it takes for a hallucination
flatters the second figure. So it would rather miss one, the first figure always stands beside the second, and
each line left out is listed with its reason:

chat      Refusals and assistant talk in English and Chinese, unless the reference says that too, or something
          close to it. An apology counts only when it goes on about audio, transcripts, requests and the like.
loop      The same words over and over (characters in Chinese, Japanese and Thai), far more often than in the
          reference. Decoders are known for it: Radford et al. 2022, arXiv:2212.04356, section 4.5; Barański
          et al. 2025, arXiv:2501.11378, who take loops out of transcripts.
too long  More text than anyone could say in the time, while the reference fits. The limits are more than
          twice the mean rates of read speech, 5.2 to 7.8 syllables a second: Pellegrino et al. 2011,
          Language 87(3).

Fluent text that was never spoken (Koenecke et al. 2024, arXiv:2402.08021) is none of these: it stays in both.
"""

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jiwer
from rapidfuzz import fuzz  # comes with jiwer, which aligns with it

METRICS, NORMALIZERS = ("auto", "wer", "cer"), ("none", "basic", "english")

# Sets of characters, for the brackets of a regular expression.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
UNSPACED = f"{HAN}{KANA}\u0e00-\u0e7f"  # and Thai: no spaces between words
SYLLABIC = f"{HAN}{KANA}\uac00-\ud7a3"  # and Hangul: about a syllable each

MAX_SYLLABIC_PER_SECOND = 25
MAX_LETTERS_PER_SECOND = 50  # without whitespace; 400 English words a minute are about 30
GRACE_SECONDS = 1.0  # segment times are often cut a little short
LOOP_REPEATS = 4  # an n-gram that stands fewer times than this in a row is no loop
LOOP_EXTRA_TOKENS = 8  # nor is one that repeats fewer tokens than this beyond what the reference repeats
SPOKEN_LIKENESS = 80  # of 100: chat as like the reference as this is speech with a word misheard

# CHAT is matched against _plain text: lower case, no punctuation, no apostrophes.
TOPIC = "transcri|audio|speech|recording|spoken|provide|assist|fulfill|clarify|context|request|understand"
CHAT = re.compile(
    rf"""^(oh\ )?((im|i\ am)\ (\w+\ )?sorry|sorry|i\ apologi[sz]e|my\ apologies)\b.{{0,80}}?\b({TOPIC})\w*
    | \bas\ an?\ (ai|artificial\ intelligence|((large|ai)\ )*language\ model)\b(\ \w+){{0,3}}
    | \bno\ (\w+\ )?(speech|audio|spoken\ \w+)\ (to\ transcribe|((was|is)\ )?(detected|provided))\b
    | \bplease\ (provide|upload|share|send)(\ \w+){{0,4}}?\ (audio|recording|speech|transcript\w*|text)\b
    | \b(here\ is|heres|this\ is|below\ is)\ (the|your|a)\ (\w+\ ){{0,2}}transcri(pt|bed)\w*(\ \w+){{0,3}}
    | ^(sure|certainly|of\ course|absolutely)\b.{{0,40}}?\b(transcri\w+|audio|assist)\b
    | \bi\ ?(m|am|cannot|cant|can\ not)\ ((unable|not\ able)\ to\ )?(transcribe|process\ (\w+\ )?audio)\b
    | \bhow\ (can|may)\ i\ assist\ you\b(\ \w+)?
    | ^我?(很|非常|十分)?(抱歉|[对對]不起).{{0,20}}?
        ([无無]法|[转轉][录錄写寫]|[语語]音|音[频頻]|[录錄]音|[识識][别別]|提供)
    | 作[为為].{{0,8}}?([语語]言模型|ai助手|智能助[手理])
    | [请請][您你]?[先再]?(提供|上[传傳]|[发發]送).{{0,8}}?(音[频頻]|[语語]音|[录錄]音|文本)
    | (以下|下面|[这這])是.{{0,8}}?
        ([转轉][录錄写寫]|[识識][别別]|音[频頻]|[语語]音).{{0,4}}?([结結]果|[内內]容|文[本字])
    | ^(好的|[当當]然).{{0,12}}?([转轉][录錄写寫]|音[频頻])""",
    re.VERBOSE,
)


class InputError(ValueError):
    """What was given cannot be scored. One line: where, what was found, what was wanted, the cure."""


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
            lines.append(f"left out: {name}: {reason}\n    {_cut(hypotheses[index], 90)}")
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
    for index, (reference, hypothesis, seconds) in enumerate(lines):
        rows.append(_count_line(normalize(reference), normalize(hypothesis), metric))
        if reason := hallucination(reference, hypothesis, seconds):
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


def hallucination(reference: str, hypothesis: str, duration_seconds: float | None = None) -> str | None:
    """Why the hypothesis is no attempt at a transcript, or None. The rules stand at the top of this file."""
    if hypothesis == reference:
        return None
    written = _plain(hypothesis)
    if (chat := CHAT.search(written)) and not _is_spoken(chat.group(), _plain(reference)):
        return f'chat: "{_cut(chat.group(), 60)}"'
    if loop := _find_loop(written, reference):
        return loop
    limit = float("inf") if duration_seconds is None else duration_seconds + GRACE_SECONDS
    if _shortest_seconds(hypothesis) > limit >= _shortest_seconds(reference):
        return f"too long: {len(''.join(hypothesis.split())):,} characters in {duration_seconds:.2f} s"
    return None


def _plain(text: str) -> str:
    """Lower case, no punctuation, no apostrophes; spaces only in scripts that have them between words."""
    text = re.sub("['’‘`]", "", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"[^\w\s]", lambda m: " " if unicodedata.category(m[0])[0] in "PSC" else m[0], text)
    return re.sub(f"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(text.split()))


def _is_spoken(phrase: str, text: str) -> bool:
    """Whether `text` holds assistant talk itself, or a stretch that is much like `phrase`."""
    # partial_ratio looks for the shorter in the longer: it would find a text of one word in any phrase.
    likeness = fuzz.partial_ratio(phrase, text) if len(phrase) <= len(text) else fuzz.ratio(phrase, text)
    return likeness >= SPOKEN_LIKENESS or CHAT.search(text) is not None


def _find_loop(written: str, reference: str) -> str | None:
    """What n-gram the _plain text repeats over and over, and the reference does not, as a reason; or None."""
    tokens = _tokens(written)
    if max(Counter(tokens).values(), default=0) < LOOP_REPEATS:
        return None  # most lines end here
    spoken = _tokens(_plain(reference))
    for n in range(1, len(tokens) // LOOP_REPEATS + 1):
        repeated, end = _longest_repetition(tokens, n)
        extra = repeated - _longest_repetition(spoken, n)[0]
        if repeated >= n * (LOOP_REPEATS - 1) and extra >= LOOP_EXTRA_TOKENS:
            ngram = _plain(" ".join(tokens[end - n + 1 : end + 1]))
            return f'loop: "{_cut(ngram, 60)}" {repeated // n + 1} times in a row'
    return None


def _tokens(text: str) -> list[str]:
    """Words; characters in Chinese, Japanese and Thai."""
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)


def _longest_repetition(tokens: list[str], n: int) -> tuple[int, int]:
    """(length, last index) of the longest run of tokens like the one n before. no no no, n = 1: (2, 2)."""
    longest = run = end = 0
    for index in range(n, len(tokens)):
        run = run + 1 if tokens[index] == tokens[index - n] else 0
        if run > longest:
            longest, end = run, index
    return longest, end


def _shortest_seconds(text: str) -> float:
    """The least time in which the text could be said."""
    num_syllabic = len(re.findall(f"[{SYLLABIC}]", text))
    num_letters = len("".join(text.split())) - num_syllabic
    return num_syllabic / MAX_SYLLABIC_PER_SECOND + num_letters / MAX_LETTERS_PER_SECOND


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


@dataclass(frozen=True)
class Utterance:
    """What scoring needs of one line of the manifest."""

    place: str  # manifest:line
    key: str
    reference: str | None  # None: not scored
    duration_seconds: float | None  # None: unknown


def read_manifest(path: Path) -> list[Utterance]:
    """The utterances of a JSON lines manifest. Raises InputError for a line that cannot be understood."""
    utterances = []
    for place, record in _read_json_lines(path):
        if "wav" not in record and "messages" not in record:
            raise InputError(f"{place}: missing 'wav'; wanted 'wav' and 'txt', or 'messages'; add them")
        as_turns = [{"audio": [record.get("wav")]}, {"role": "assistant", "content": record.get("txt")}]
        turns = record.get("messages", as_turns)
        if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
            found = _cut(str(turns), 40)
            raise InputError(f"{place}: found {found} as 'messages'; wanted a list of turns; mend it")
        audio = [wav for turn in turns for wav in turn.get("audio", [])]
        reference = turns[-1].get("content") if turns[-1].get("role") == "assistant" else None
        if not all(isinstance(wav, str) for wav in audio) or not isinstance(reference, str | None):
            raise InputError(f"{place}: found a path or a transcript that is no text; put it in quotes")
        key = str(record.get("key") or Path(record.get("wav") or f"line{len(utterances) + 1}").stem)
        seconds = _read_seconds(place, record, [path.parent / wav for wav in audio])
        utterances.append(Utterance(place, key, reference, seconds))
    if all(utterance.reference is None for utterance in utterances):
        found = f"{len(utterances):,} lines, none with a reference"
        raise InputError(f"{path}: found {found}; wanted lines with 'wav' and 'txt'; check --data_path")
    return utterances


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("audio", []), list)


def _read_seconds(place: str, record: dict, audio: list[Path]) -> float | None:
    """`duration`, else end - start, else what the headers of the files say, else None."""
    duration, start, end = (record.get(name) for name in ("duration", "start", "end"))
    for value in (duration, start, end):
        if value is not None and not (isinstance(value, int | float) and value >= 0):
            raise InputError(f"{place}: found {value!r} as a time; wanted seconds, 0 or more; correct it")
    if end is not None and end < (start or 0):
        raise InputError(f"{place}: found the end {end} before the start {start}; correct them")
    if duration is not None or end is not None:
        return end - (start or 0) if duration is None else duration
    if not audio or not all(wav.is_file() for wav in audio):
        return None
    import soundfile

    try:
        return sum(soundfile.info(wav).duration for wav in audio) - (start or 0)
    except soundfile.SoundFileError:
        return None  # a format that it cannot read; main() says how many


def read_hypotheses(path: Path, utterances: list[Utterance]) -> list[str]:
    """One hypothesis an utterance, in the manifest's order, from a .txt or .jsonl file. Raises InputError."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: found the ending {path.suffix!r}; wanted .txt or .jsonl; rename the file")
    hypotheses = _read_lines(path) if path.suffix == ".txt" else []
    for index, (place, record) in enumerate(_read_json_lines(path) if path.suffix == ".jsonl" else ()):
        if "key" not in record or not isinstance(record.get("pred"), str):
            raise InputError(f"{place}: missing 'key', or text as 'pred'; wanted both; decode again")
        if index < len(utterances) and str(record["key"]) != utterances[index].key:
            wanted = f"{utterances[index].key!r}, as in {utterances[index].place}"
            raise InputError(f"{place}: found key {record['key']!r}; wanted {wanted}; decode this manifest")
        hypotheses.append(record["pred"])
    if len(hypotheses) != len(utterances):
        wanted = f"{len(utterances):,}, one for each line of the manifest"
        raise InputError(f"{path}: found {len(hypotheses):,} lines; wanted {wanted}; let recognize.py finish")
    return hypotheses


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, cut at "\\n" alone: str.splitlines would also cut inside a hypothesis."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted text in UTF-8; check the path") from None
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(path:line, object) of every line."""
    for number, line in enumerate(_read_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            place = f"{path}:{number}"
            raise InputError(f"{place}: malformed JSON ({error}); wanted an object; mend it") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: found {_cut(line, 40)}; wanted a JSON object; mend the line")
        yield f"{path}:{number}", record


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _parse_arguments() -> argparse.Namespace:
    parser = _Parser(
        description="Word or character error rate of a result file: all lines / without hallucinated ones. "
        "These are listed with the reason. The top of score.py says how they are found.",
        allow_abbrev=False,
    )
    texts = {
        "data_path": "manifest with the references: JSON lines with wav and txt",
        "result_path": "hypotheses in the manifest's order: .txt, one a line, or .jsonl, with key and pred",
        "metric": "wer: words; cer: characters without whitespace; auto: cer where most letters of the "
        "references are Chinese, Japanese or Thai, else wer (default: auto)",
        "normalizer": "what both texts go through first. none: nothing, so case and punctuation count; "
        "basic: Whisper's, lower case, no punctuation (nor the vowel signs of Thai and Hindi); "
        "english: Whisper's, also for spelling, numbers and contractions (default: none)",
        "json": "print one JSON object instead; rates are fractions, null where all references are empty",
    }
    parser.add_argument("--data_path", type=Path, required=True, help=texts["data_path"])
    parser.add_argument("--result_path", type=Path, required=True, help=texts["result_path"])
    parser.add_argument("--metric", choices=METRICS, default="auto", help=texts["metric"])
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="none", help=texts["normalizer"])
    parser.add_argument("--json", action="store_true", help=texts["json"])
    return parser.parse_args()


def main() -> int:
    args = _parse_arguments()
    try:
        manifest = read_manifest(args.data_path)
        pairs = zip(manifest, read_hypotheses(args.result_path, manifest), strict=True)
        scored = [(utterance, text) for utterance, text in pairs if utterance.reference is not None]
        utterances, hypotheses = zip(*scored, strict=True)
        durations = [utterance.duration_seconds for utterance in utterances]
        references = [utterance.reference for utterance in utterances]
        result = score(references, hypotheses, durations, args.metric, args.normalizer)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    num_not_scored, num_unknown_durations = len(manifest) - len(scored), durations.count(None)
    sys.stdout.reconfigure(errors="backslashreplace")  # where a text cannot be shown, the numbers still can
    if args.json:
        record = asdict(result) | {
            "num_not_scored": num_not_scored,
            "num_unknown_durations": num_unknown_durations,
        }
        for name, counts in (("all", result.all), ("filtered", result.filtered)):
            record[name]["rate"] = counts.rate if counts.reference_length else None
        record["hallucinated"] = [
            {"place": utterances[i].place, "key": utterances[i].key, "reason": reason, "pred": hypotheses[i]}
            for i, reason in result.hallucinated
        ]
        print(json.dumps(record))
        return 0
    print(result.report(hypotheses, [f"{utterance.place} {utterance.key}" for utterance in utterances]))
    if args.metric == "auto":
        print(f"{result.metric} was chosen by the script of the references; --metric overrules that")
    if num_not_scored:
        print(f"not scored: {num_not_scored:,} lines without a reference")
    if num_unknown_durations:
        print(f'duration unknown: {num_unknown_durations:,} lines, for which "too long" was not checked')
    return 0


if __name__ == "__main__":
    sys.exit(main())
