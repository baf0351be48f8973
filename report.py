"""What `python score.py` prints of a result file: error rates, intervals, counts, and each line that was left out.

Each further flag is an idea in a file of its own: comparison.py, groups.py, confusions.py, html_report.py.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, NamedTuple

from intervals import LEVEL, Interval, rate_interval
from manifest import SourceOptions, source_options
from result_file import Rows, read_rows

if TYPE_CHECKING:
    from score import Score

MAX_DIFFERENT = 10  # lines that --compare shows


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
    what = "manifest with the references: JSON lines with wav and txt; or those that were decoded together"
    add("--data_path", required=True, nargs="+", help=what)
    for option in fields(SourceOptions):
        add(f"--{option.name}", default=option.default, help=f"{option.metadata['help']} (default: {option.default!r})")
    results = parser.add_mutually_exclusive_group(required=True)
    results.add_argument("--result_path", help="what recognize.py wrote: .txt, or .jsonl with key and pred")
    what = (
        "in place of --result_path: two result files of the manifest, and whether the second is better than the first"
    )
    results.add_argument("--compare", nargs=2, metavar=("FIRST", "SECOND"), help=what)
    auto = "auto: cer where most letters of the references are Chinese, Japanese or Thai, else wer (default: auto)"
    what = f"what is counted. {describe(metrics)}; {auto}"
    add("--metric", choices=["auto", *metrics], default="auto", help=what)
    what = f"what both texts go through first. {describe(normalizers)} (default: none)"
    add("--normalizer", choices=list(normalizers), default="none", help=what)
    what = "keys of the records, such as language: the rate of each value; duration: in bins of seconds"
    add("--by", nargs="+", default=[], metavar="KEY", help=what)
    add("--confusions", type=int, default=0, metavar="N", help="the N commonest errors, word for word (default: 0)")
    add("--html", metavar="FILE", help="write a page to FILE: the worst lines aligned, with their audio")
    what = f"resampled corpora behind each {LEVEL} %% interval and p-value; 0 = no intervals (default: 1000)"
    add("--num_resamples", type=int, default=1000, metavar="N", help=what)
    add("--json", action="store_true", help="print one JSON object; rates are fractions, null without references")
    args = parser.parse_args(argv)
    if args.num_resamples < 0 or args.confusions < 0:
        parser.error("--num_resamples, --confusions: wanted 0 or more")
    if args.compare and args.num_resamples == 0:
        parser.error("--num_resamples 0: --compare wants some")
    if args.compare and (args.by or args.confusions or args.html):
        parser.error("--compare: give --by, --confusions and --html with --result_path, for one result file")
    return args


class Intervals(NamedTuple):
    """Of the two rates of a result; None where there is too little to draw from."""

    all: Interval | None
    filtered: Interval | None  # without the hallucinated lines


class System(NamedTuple):
    """A result file and its figures."""

    rows: Rows
    result: "Score"
    intervals: dict[str, Intervals]  # by what is drawn, utterances or speakers

    def left_out(self) -> list[dict]:
        """The hallucinated lines, each with the reason."""
        rows = self.rows
        return [
            {"place": rows.places[i], "key": rows.keys[i], "pred": rows.hypotheses[i], "reason": reason}
            for i, reason in self.result.hallucinated.items()
        ]


class Section(NamedTuple):
    """What a flag, or what the records hold, adds to the report."""

    name: str  # in --json
    figures: dict | list  # for --json
    lines: list[str]  # to read


def report(argv: Sequence[str] | None, score: Callable, metrics: dict[str, Callable], normalizers: dict[str, Callable]):
    """Print what the flags of score.py ask for; the other arguments are score.py's own."""
    args = parse(argv, metrics, normalizers)
    systems = []  # one, or the two that are compared
    for path in args.compare or [args.result_path]:
        rows = read_rows(args.data_path, path, args.by, **source_options(args))  # checked: a line for a line
        result = score(rows.references, rows.hypotheses, rows.durations, args.metric, args.normalizer)
        systems.append(System(rows, result, intervals_of(result, rows.speakers, args.num_resamples)))
    if args.compare:
        figures, lines = compared(args, *systems)
    else:
        normalize, tokens_of = normalizers[args.normalizer](), metrics[systems[0].result.metric]
        unit = tokens_of.__name__  # words, or characters
        sections = sections_of(args, systems[0], lambda text: tokens_of(normalize(text)), unit)
        figures = as_dict(systems[0]) | {section.name: section.figures for section in sections}
        lines = as_lines(systems[0], tokens_of.__doc__) + [line for section in sections for line in section.lines]
        if args.html:
            import html_report  # an option

            html_report.write(args.html, lines, systems[0].result, systems[0].rows, unit)
        lines += remarks(systems[0])
    print(json.dumps(figures) if args.json else "\n".join(lines))


def intervals_of(result: "Score", speakers: list | None, num_resamples: int) -> dict[str, Intervals]:
    """Intervals of both rates over utterances and, where the manifest names them, over speakers."""
    kept = [index for index in range(len(result.lines)) if index not in result.hallucinated]
    intervals = {}
    for name, units in {"utterances": None, **({"speakers": speakers} if speakers else {})}.items():
        of_all = of_kept = rate_interval(result.lines, num_resamples, units)
        if len(kept) < len(result.lines):
            units_kept = units and [units[index] for index in kept]
            of_kept = rate_interval([result.lines[index] for index in kept], num_resamples, units_kept)
        if of_all:
            intervals[name] = Intervals(of_all, of_kept)
    return intervals


def sections_of(
    args: argparse.Namespace, system: System, tokens_of: Callable[[str], list[str]], unit: str
) -> list[Section]:
    """Clips without speech and confidences, where there are such; groups and confusions, where asked for."""
    rows, result, sections = system.rows, system.result, []
    if not all(map(str.strip, rows.references)):
        from from_nothing import text_from_nothing  # an option

        figure = text_from_nothing(rows.references, rows.hypotheses, rows.durations)
        figures = asdict(figure) | {"words_per_minute": figure.words_per_minute}
        sections.append(Section("text_from_nothing", without_nan(figures), [str(figure)]))
    for key in args.by:
        import groups  # an option

        is_duration = key == "duration"
        names = map(groups.duration_bin, rows.durations) if is_duration else map(groups.name_of, rows.values[key])
        table, num_left_out = groups.groups(list(names), result.lines, args.num_resamples)
        figures = [asdict(group) | {"rate": group.rate} for group in table]
        sections.append(Section(f"by_{key}", figures, groups.as_lines(key, table, num_left_out, result.metric, unit)))
    if args.confusions:
        from confusions import confusions  # an option

        most = confusions(result.alignments, args.confusions)
        lines = ["most often confused:", *(f"  {confusion}" for confusion in most)]
        sections.append(Section("confusions", list(map(asdict, most)), lines))
    if any(rows.words):
        from reliability import reliability  # an option

        figure = reliability(rows.words, result.alignments, tokens_of)
        sections.append(Section("reliability", asdict(figure), figure.as_lines()))
    return sections


def shorten(text: str, width: int) -> str:
    """The text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def without_nan(figures: dict) -> dict:
    """JSON has no NaN: null stands for it."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}


def as_dict(system: System) -> dict:
    """The figures for --json."""
    result, rows = system.result, system.rows
    figures = {"metric": result.metric, "normalizer": result.normalizer, "num_lines": len(result.lines)}
    for title, counts in (("all", result.all), ("filtered", result.filtered)):
        figures[title] = counts._asdict() | {"rate": counts.rate if counts.reference_length else None}
        for name, intervals in system.intervals.items():
            interval = getattr(intervals, title)
            figures[title][f"interval_over_{name}"] = interval and [interval.low, interval.high]
    figures |= {"num_not_scored": rows.num_not_scored, "num_unknown_durations": sum(map(math.isnan, rows.durations))}
    return figures | {"hallucinated": system.left_out()}


def as_lines(system: System, unit: str) -> list[str]:
    """Rates, intervals and counts to read; `unit` says what the metric counts."""
    result, lines = system.result, [system.result.summary(), *interval_lines(system)]
    lines.append(f"{result.metric} counts {unit}; normalizer: {result.normalizer}")
    for title, counts in (("all lines", result.all), ("without the lines left out", result.filtered)):
        kinds = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts._asdict().items())
        lines.append(f"{title}: errors {counts.errors:,}: {kinds}")
    return lines


def interval_lines(system: System) -> list[str]:
    """`95 % interval 7.21 to 8.05 / 5.90 to 6.71, over 2,620 utterances`, and the same over speakers."""
    nums = {"utterances": len(system.result.lines), "speakers": len(set(system.rows.speakers or []))}
    return [
        f"{LEVEL} % interval {intervals.all} / {intervals.filtered or '-'}, over {nums[name]:,} {name}"
        for name, intervals in system.intervals.items()
    ]


def remarks(system: System) -> list[str]:
    """Each line that was left out, and what was not scored or not checked."""
    lines, rows = [], system.rows
    for row in system.left_out():
        lines.append(f"left out: {row['place']} {row['key']}: {row['reason']}\n    {shorten(row['pred'], 90)}")
    if rows.num_not_scored:
        lines.append(f"not scored: {rows.num_not_scored:,} lines without a reference")
    if num_unknown := sum(map(math.isnan, rows.durations)):
        lines.append(f'duration unknown: {num_unknown:,} lines, for which "too long" was not checked')
    return lines


def compared(args: argparse.Namespace, first: System, second: System) -> tuple[dict, list[str]]:
    """Two systems and the lines in which they differ most: figures for --json, and lines to read."""
    from comparison import differences, paired_test  # an option

    rows, figures, lines = first.rows, {"first": as_dict(first), "second": as_dict(second)}, []
    for path, system in zip(args.compare, (first, second), strict=True):
        lines += [f"{path}: {system.result.summary()}", *(f"    {line}" for line in interval_lines(system))]
    counts = first.result.lines, second.result.lines
    for name in first.intervals:  # none where every reference is empty
        test = paired_test(*counts, args.num_resamples, rows.speakers if name == "speakers" else None)
        figures[f"test_over_{name}"] = asdict(test)
        lines.append(f"all lines, over {name}: {test}")
    by_line = differences(*counts)
    figures |= {"num_better": by_line.num_better, "num_worse": by_line.num_worse}
    figures["different"] = [rows.places[index] for index in by_line.largest]
    lines.append(
        f"the second is better in {by_line.num_better:,} lines, worse in {by_line.num_worse:,}; most in these:"
    )
    for index in by_line.largest[:MAX_DIFFERENT]:
        errors = " -> ".join(str(system.result.lines[index].errors) for system in (first, second))
        lines.append(f"{rows.places[index]} {rows.keys[index]}: errors {errors}")
        for system, name in ((first, "first"), (second, "second")):
            lines.append(f"    {name:9} {shorten(system.rows.hypotheses[index], 100)}")
        lines.append(f"    reference {shorten(rows.references[index], 100)}")
    return figures, lines
