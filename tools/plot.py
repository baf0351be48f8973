"""Pictures of training runs, of a result file, and of what the LLM attends to, each as a PNG.

python -m tools.plot run run_lora --out runs.png                                # loss, error rate and listening gap
python -m tools.plot --result result.jsonl --data_path test.jsonl --out wer.png # error rate against duration
python -m tools.plot --attention a.wav --model_path run --out attention.png     # from the transcript to the audio
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch

from dataset import collate, load_audio
from errors import InputError, run
from manifest import SAMPLE_RATE, SPEECH
from model import SpeechLLM
from result_file import read_rows
from score import METRICS, score, total

matplotlib.use("agg")  # files alone, no window
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which the colour-blind tell apart, and a line style for each, for print without colours.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Noto Sans"]
PANELS = [  # of a plot of runs: keys in trainer_state.json's log, label of the axis ({} = metric), factor
    (["loss"], "training loss\n(nats a token)", 1),
    ([f"eval_{metric}" for metric in METRICS], "{} in\nevaluation (%)", 100),
    (["eval_listening_gap"], "listening gap\n(nats a token)", 1),
]
SMOOTH_FROM = 100  # logged values; so many are drawn pale, with their moving mean
MOST_BINS = 10  # of durations


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="output folders of train.py, or checkpoints in them")
    add("--result", help="a result file of recognize.py, .txt or .jsonl")
    add("--data_path", nargs="+", help="the manifest of --result, or several, with transcripts")
    add("--attention", metavar="AUDIO", help="an audio file")
    add("--model_path", help="the model for --attention: folder or Hub name")
    add("--last_layers", type=int, default=0, help="--attention in so many layers, the last ones (default: 0 = all)")
    add("--out", default="plot.png", help="where the picture goes (default: plot.png)")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.runs, args.result, args.attention))) != 1:
        parser.error("wanted one of: RUN [RUN ...], --result, --attention")
    for flag, other in (("result", "data_path"), ("attention", "model_path")):
        if bool(getattr(args, flag)) != bool(getattr(args, other)):
            parser.error(f"--{flag} and --{other} go together")
    if args.last_layers < 0:
        parser.error(f"--last_layers {args.last_layers}: wanted 0 or more")
    if Path(args.out).suffix != ".png" or not Path(args.out).parent.is_dir():
        parser.error(f"--out {args.out}: wanted a .png file in a folder that is there")
    return args


# Runs


def read_log(folder: str) -> list[dict]:
    """What a run has logged: dicts with "step" and figures. Of a run that has not ended, up to its last checkpoint."""
    paths = [Path(folder, "trainer_state.json"), *Path(folder).glob("checkpoint-[0-9]*/trainer_state.json")]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(f"{folder}: no trainer_state.json; wanted an output folder of train.py, or a checkpoint in it")
    try:
        states = [json.loads(path.read_text()) for path in paths]
        return max(states, key=lambda state: state["global_step"])["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{paths[0]}: no state of a Trainer ({error!r})") from None


def plot_runs(folders: list[str]) -> plt.Figure:
    """A panel for each figure that any of the runs has logged, over the steps."""
    logs = {folder: read_log(folder) for folder in folders}
    logged = {key for rows in logs.values() for row in rows for key in row}
    panels = [panel for panel in PANELS if logged & set(panel[0])]
    if not panels:
        raise InputError(f"{folders[0]}: nothing was logged; wanted --logging_steps below the number of steps")
    figure, axes = plt.subplots(len(panels), sharex=True, squeeze=False, figsize=(8, 1 + 2.2 * len(panels)))
    for axis, (keys, label, factor) in zip(axes[:, 0], panels, strict=True):
        for number, (folder, rows) in enumerate(logs.items()):
            points = [(row["step"], factor * row[key]) for row in rows for key in keys if key in row]
            steps, values = zip(*points, strict=True) if points else ((), ())
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
            if len(values) >= SMOOTH_FROM:
                axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
                size = len(values) // 20
                steps = steps[size // 2 :][: len(values) - size + 1]  # the middle of the values behind each mean
                values = np.convolve(values, np.full(size, 1 / size), "valid")
            axis.plot(steps, values, **style, marker="o" if len(values) < 30 else "", markersize=4, label=folder)
        metrics = " / ".join(sorted(key.removeprefix("eval_").upper() for key in logged & set(keys)))
        axis.set_ylabel(label.format(metrics))
        if keys != ["loss"]:
            axis.axhline(0, color="grey", linewidth=0.8)
    axes[-1, 0].set_xlabel("optimiser steps")
    axes[0, 0].legend(title="pale: each logged value" if axes[0, 0].lines[0].get_alpha() else None)
    return figure


# A result file


def plot_result(result_path: str, data_path: str | list[str]) -> plt.Figure:
    """The error rate in bins of the duration, and how many utterances each bin holds."""
    rows = read_rows(data_path, result_path)
    result, seconds = score(rows.references, rows.hypotheses, rows.durations), np.array(rows.durations)
    known = np.isfinite(seconds)
    if not known.any():
        raise InputError(f"{result_path}: no duration is known; wanted 'duration' in the manifest, or the audio files")
    edges = MaxNLocator(MOST_BINS).tick_values(seconds[known].min(), seconds[known].max())  # round numbers
    bin_of = np.clip(np.digitize(seconds, edges) - 1, 0, len(edges) - 2)  # the last edge belongs to the last bin
    members = [np.flatnonzero(known & (bin_of == b)) for b in range(len(edges) - 1)]  # lines of each bin
    counts = [total([result.lines[i] for i in lines]) if len(lines) else None for lines in members]
    rates = [100 * c.rate if c else math.nan for c in counts]  # per cent
    middles, width = (edges[1:] + edges[:-1]) / 2, 0.9 * (edges[1] - edges[0])

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5), height_ratios=[2, 1])
    mean = f"all {len(seconds):,} utterances: {100 * result.all.rate:.2f} %"
    top.axhline(100 * result.all.rate, color=COLOURS[1], linestyle="--", label=mean)
    panels = ((top, rates, COLOURS[0], "%.1f"), (bottom, [len(lines) for lines in members], COLOURS[5], "%d"))
    for axis, heights, colour, form in panels:
        bars = axis.bar(middles, heights, width, color=colour)
        axis.bar_label(bars, fmt=form, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        axis.margins(y=0.25)
    top.set(ylabel=f"{result.metric.upper()} (%)", title=Path(result_path).name)
    top.legend()
    bottom.set(ylabel="utterances", xlabel="duration (s)", xticks=edges)
    return figure


# Attention


@torch.no_grad()
def attention_to_speech(model: SpeechLLM, audio: str, last_layers: int = 0) -> tuple[list[str], np.ndarray]:
    """The tokens of the model's own transcript, and the attention (tokens, N) with which each was predicted.

    A row is that of the position before the token, whose output predicts it: the mean over heads and layers. Over
    prompt, speech and transcript together it sums to 1; these are the columns of the N speech embeddings.
    """
    record = {"wav": audio, "txt": model.transcribe(audio), "where": audio}
    batch = collate([model.make_dataset([record], max_length=model.max_length)[0]])
    model.llm.set_attn_implementation("eager")  # the others give no attention weights
    inputs = model.inputs_for_llm(**model.tensors_of(batch))
    layers = model.llm(**inputs, use_cache=False, output_attentions=True).attentions  # of (1, heads, L, L)
    weights = torch.stack(layers[-last_layers:]).float().mean((0, 1, 2))  # (L, L)
    ids, num_trained = batch["input_ids"][0], batch["labels"].shape[1]
    tokens = [model.tokenizer.decode([token]).replace(" ", "·") for token in ids[-num_trained:].tolist()]
    return tokens, weights[-num_trained - 1 : -1, ids == SPEECH].cpu().numpy()


def plot_attention(model: SpeechLLM, audio: str, last_layers: int) -> plt.Figure:
    """The wave form, and under it a row for each token of the transcript, over the same time axis."""
    samples = load_audio(audio)  # (S,)
    tokens, weights = attention_to_speech(model, audio, last_layers)
    seconds = len(samples) / SAMPLE_RATE
    covered = max(seconds, 30) if model.config.pad_to_30s else seconds  # by the embeddings
    height = 0.25 * len(tokens) + 0.5  # inches
    sizes = {"figsize": (9, height + 2), "height_ratios": [1, height]}
    figure, (top, bottom) = plt.subplots(2, sharex=True, **sizes)
    top.plot(np.arange(len(samples)) / SAMPLE_RATE, samples, color=COLOURS[0], linewidth=0.4)
    title = f"{Path(audio).name}: where the LLM looks before it writes a token\n"
    top.set_title(f"{title}behind the token: how much of its attention goes to speech, not to text", fontsize=10)
    top.set(yticks=[], ylabel="wave")
    options = {"norm": PowerNorm(0.5, 0), "cmap": "viridis", "interpolation": "none"}  # small weights are seen, too
    image = bottom.imshow(weights, aspect="auto", extent=(0, covered, len(tokens), 0), **options)
    labels = [f"{token}   {share:.0%}" for token, share in zip(tokens, weights.sum(1), strict=True)]
    bottom.set_yticks(np.arange(len(tokens)) + 0.5, labels)
    bottom.grid(False)
    bottom.set(xlabel="time (s)", ylabel="token", xlim=(0, seconds))
    figure.colorbar(image, ax=bottom, label="attention", pad=0.01)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    installed = {font.name for font in fontManager.ttflist}  # the default one has no Chinese
    style = {"font.family": [font for font in FONTS if font in installed], "figure.constrained_layout.use": True}
    style |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        if args.runs:
            figure = plot_runs(args.runs)
        elif args.result:
            figure = plot_result(args.result, args.data_path)
        else:
            figure = plot_attention(SpeechLLM.from_pretrained(args.model_path), args.attention, args.last_layers)
        with warnings.catch_warnings(record=True) as caught:  # one for each character that no font has
            figure.savefig(args.out, dpi=150)
    if caught:
        warnings.warn(f"{len(caught)} of the like: {caught[0].message}; for Chinese: fonts-noto-cjk", stacklevel=2)
    plt.close(figure)
    print(f"{args.out} is written")


if __name__ == "__main__":
    run(main)
