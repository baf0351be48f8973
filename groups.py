"""Error rates of groups of lines: `score.py --by language duration`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from intervals import LEVEL, Interval, rate_interval

DURATION_EDGES = [0, 2, 5, 10, 20, 30, math.inf]  # seconds
MAX_GROUPS = 30  # of one key in a report


@dataclass(frozen=True)
class Group:
    """The lines whose records have the same value of a key."""

    name: str
    num_lines: int
    num_errors: int
    reference_length: int  # in the tokens of the metric
    interval: Interval | None

    @property
    def rate(self) -> float | None:
        """Errors / reference length, a fraction; None where every reference is empty."""
        return self.num_errors / self.reference_length if self.reference_length else None


def groups(names: Sequence[str], lines: Sequence[tuple], num_resamples: int) -> tuple[list[Group], int]:
    """The groups of lines with the same name, and how many were left out, the smallest, beyond MAX_GROUPS.

    `lines` are score.Counts. Groups stand in the order of their names; those of durations in the order of seconds.
    """
    members: dict[str, list[tuple]] = {}
    for name, line in zip(names, lines, strict=True):
        members.setdefault(name, []).append(line)
    order = {duration_bin(edge): number for number, edge in enumerate(DURATION_EDGES[:-1])}  # name -> place
    largest = sorted(members, key=lambda name: -len(members[name]))[:MAX_GROUPS]
    rows = []
    for name in sorted(largest, key=lambda name: (order.get(name, math.inf), name)):
        errors, length = sum(sum(line[:-1]) for line in members[name]), sum(line[-1] for line in members[name])
        rows.append(Group(name, len(members[name]), errors, length, rate_interval(members[name], num_resamples)))
    return rows, len(members) - len(rows)


def name_of(value: object) -> str:
    """The group of a record by the value that it has, which may be any JSON; None = it has none."""
    if value is None:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration_bin(seconds: float) -> str:
    """`5 to 10 s`, from its lower edge up to, not with, its upper."""
    for low, high in pairwise(DURATION_EDGES):
        if low <= seconds < high:
            return f"{low} s and more" if math.isinf(high) else f"{low} to {high} s"
    return "unknown"


def as_lines(key: str, rows: Sequence[Group], num_left_out: int, metric: str, unit: str) -> list[str]:
    """A table to read; `unit` is what the metric counts, words say."""
    width = max(len(f"by {key}"), *(len(row.name) + 2 for row in rows))
    lines = [f"{f'by {key}':{width}}  {'lines':>8}  {unit:>10}  {metric.upper():>7}  {LEVEL} % interval"]
    for row in rows:
        rate = "-" if row.rate is None else f"{100 * row.rate:.2f}"
        counts = f"{row.num_lines:>8,}  {row.reference_length:>10,}  {rate:>7}"
        lines.append(f"  {row.name:{width - 2}}  {counts}  {row.interval or '-'}")
    return lines + [f"  and {num_left_out:,} smaller groups"] * bool(num_left_out)
