"""A page to read a result by: `score.py --html report.html`. One file, with the audio inside; it needs no network."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
from jinja2 import Environment

from alignment import columns_of
from errors import BadUtterance, InputError
from manifest import SAMPLE_RATE, clips_of

if TYPE_CHECKING:
    from result_file import Rows
    from score import Score

MAX_LINES = 200  # on a page, those with the most errors; a clip of 5 s takes about 30 kB of it

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report[0] }}</title>
<style>
  :root { --ink: #1b1f24; --dim: #626c77; --edge: #d9dee4; --page: #f5f6f8; --card: #fff;
          --substitute: #ffe3a3; --delete: #ffc9c2; --insert: #bfe0ff; color-scheme: light dark; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #9aa4af; --edge: #383e46; --page: #15181c;
          --card: #1e2228; --substitute: #6b5207; --delete: #77291f; --insert: #17507e; } }
  body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; background: var(--page); color: var(--ink);
         font: 16px/1.5 system-ui, sans-serif; }
  h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
  pre { overflow-x: auto; margin: 0 0 1rem; color: var(--dim); font-size: .85rem; }
  form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center;
         padding: .6rem 0; background: var(--page); border-bottom: 1px solid var(--edge); font-size: .9rem; }
  select, input[type=search] { font: inherit; padding: .2rem .4rem; }
  article { margin: .8rem 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--edge);
            border-radius: .5rem; }
  header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; font-size: .85rem;
           color: var(--dim); overflow-wrap: anywhere; }
  header b { font-size: 1rem; color: var(--ink); }
  .reason { margin: .3rem 0 0; padding: .1rem .5rem; border-left: .25rem solid #c2410c; font-size: .85rem; }
  .tokens { display: flex; flex-wrap: wrap; gap: .5rem .15rem; margin: .6rem 0; }
  .tokens span { display: grid; grid-template-rows: 1fr 1fr; min-height: 3em; padding: 0 .2rem; border-radius: .25rem;
                 overflow-wrap: anywhere; text-align: center; }
  .tokens b { font-weight: normal; } .tokens i { font-style: normal; color: var(--dim); }
  .substitute { background: var(--substitute); } .tokens .substitute * { font-weight: 600; color: inherit; }
  .delete { background: var(--delete); } .delete s { text-decoration-thickness: 2px; }
  .insert { background: var(--insert); } .tokens .insert i { color: inherit; text-decoration: underline; }
  .key span { padding: 0 .4rem; border-radius: .25rem; }
  @media (max-width: 40rem) { form { position: static; } }
  audio { display: block; width: min(100%, 26rem); height: 2.2rem; margin-top: .3rem; }
</style>
<h1>{{ report[0] }}</h1>
<pre>{{ report[1:] | join("\\n") }}</pre>
<form>
  <label>Sort by <select id="order">
    <option value="errors">errors</option><option value="rate">error rate</option>
    <option value="seconds">duration</option><option value="index">place in the manifest</option></select></label>
  <label>Show <input type="search" id="text" placeholder="lines that hold this text"></label>
  <label><input type="checkbox" id="reason"> only lines left out</label>
  <span class="key">above the reference, below the hypothesis: <span class="substitute">substituted</span>
    <span class="delete"><s>deleted</s></span> <span class="insert"><u>inserted</u></span></span>
</form>
<p id="count"></p>
<main>
{% for line in lines %}
<article data-errors="{{ line.errors }}" data-rate="{{ line.rate }}" data-seconds="{{ line.seconds }}"
 data-index="{{ line.index }}" data-reason="{{ line.reason }}" data-text="{{ line.text }}">
  <header><b>{{ line.key }}</b><span>{{ line.errors }} error{{ "" if line.errors == 1 else "s" }}
    {%- if line.counts.reference_length %} in {{ line.counts.reference_length }} {{ unit }}{% endif %}:
    {{ line.counts.substitutions }} substituted, {{ line.counts.deletions }} deleted,
    {{ line.counts.insertions }} inserted</span>
    {%- if line.seconds >= 0 %}<span>{{ "%.1f" | format(line.seconds) }} s</span>{% endif %}
    <span>{{ line.place }}</span></header>
  {% if line.reason %}<p class="reason">left out: {{ line.reason }}</p>{% endif %}
  <div class="tokens" dir="auto">{% for token in line.columns %}<span class="{{ token.kind }}">
    {%- if token.kind == "delete" %}<s>{{ token.reference }}</s>{% else %}<b>{{ token.reference }}</b>{% endif -%}
    <i>{{ token.hypothesis }}</i></span>{% endfor %}</div>
  {% for clip in line.audio %}<audio controls preload="metadata" src="{{ clip }}"></audio>{% endfor %}
  {% if line.problem %}<small>no audio: {{ line.problem }}</small>{% endif %}
</article>
{% endfor %}
</main>
<script>
  const lines = [...document.querySelectorAll("article")], get = id => document.getElementById(id);
  function show() {
    const key = get("order").value, text = get("text").value.toLowerCase(), only = get("reason").checked;
    const value = line => Number(line.dataset[key]);
    lines.sort((a, b) => key == "index" ? value(a) - value(b) : value(b) - value(a));
    for (const line of lines)
      line.hidden = !line.dataset.text.toLowerCase().includes(text) || (only && !line.dataset.reason);
    document.querySelector("main").append(...lines);
    get("count").textContent = `${lines.filter(line => !line.hidden).length} of the {{ num_wrong }} lines with errors`;
  }
  document.querySelector("form").addEventListener("input", show);
  document.querySelector("form").addEventListener("submit", event => event.preventDefault());
  show();
</script>
</html>
"""


def write(path: str, report: Sequence[str], result: "Score", rows: "Rows", unit: str) -> None:
    """Write the page: the report, and below it the lines with the most errors, in a `unit`. Raises InputError."""
    wrong = sorted((i for i, counts in enumerate(result.lines) if counts.errors), key=lambda i: -result.lines[i].errors)
    lines = [line_of(index, result, rows) for index in wrong[:MAX_LINES]]
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(report=report, lines=lines, unit=unit, num_wrong=f"{len(wrong):,}")
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {path}: cannot be written ({error.strerror}); wanted a file in a folder") from None


def line_of(index: int, result: "Score", rows: "Rows") -> dict:
    """What the page shows of a line."""
    counts, seconds = result.lines[index], rows.durations[index]
    audio, problem = [], ""
    try:
        audio = audio_of(rows.records[rows.indices[index]])
    except BadUtterance as error:
        problem = str(error)
    return {
        "index": index,
        "key": rows.keys[index],
        "place": rows.places[index],
        "counts": counts,
        "errors": counts.errors,
        "rate": counts.errors / max(counts.reference_length, 1),
        "seconds": -1 if math.isnan(seconds) else seconds,
        "reason": result.hallucinated.get(index, ""),
        "text": f"{rows.references[index]}\n{rows.hypotheses[index]}\n{rows.keys[index]}",
        "columns": columns_of(result.alignments[index]),
        "audio": audio,
        "problem": problem,
    }


def audio_of(record: dict) -> list[str]:
    """The clips of a record as addresses that hold an mp3, which every browser plays. Raises BadUtterance."""
    from dataset import load_audio  # here, because dataset imports torch

    addresses = []
    for clip in clips_of(record):
        file = io.BytesIO()
        soundfile.write(file, load_audio(*clip), SAMPLE_RATE, format="MP3")
        addresses.append(f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return addresses
