"""One batch as the model gets it, and no training: train.py --check, or --check 3 for the first three batches.

Each utterance is shown token by token: what the LLM reads, the label under it, the attention mask. What would spoil the
training is marked and ends the command with an InputError: see `problem_of`. Under the batch stand its padding, the
loss before the first step, and the memory that a step will take: see `Memory`.

Shapes: B batch, L tokens, K last tokens with labels, A audio windows, F feature frames, V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from itertools import groupby, islice

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from dataset import IGNORE, WINDOW, SpeechDataset, collate
from errors import InputError
from hallucination import GRACE_SECONDS, least_seconds
from manifest import SAMPLE_RATE, SPEECH, transcript_of
from predictions import BOUNDARY_NAMES

PADDING, PROMPT, AUDIO, TRAINED, END, WRONG = "dim", "", "cyan", "green", "reverse green", "bold red"  # styles of rich
LEGEND = """token: what the LLM reads, "·" for a space, "↵" for a new line. mask: 0 is padding, which nothing sees.
label: what is trained, under its own token; the LLM predicts it one position earlier. A dash is not trained."""


@dataclass(frozen=True)
class Row:
    """An utterance of a batch."""

    where: str  # file and line of the manifest
    bad: str | None  # why --on_bad_audio skip leaves it out
    transcript: str  # empty in a conversation: an answer may be longer than its question
    seconds: float  # of audio: what the manifest or the file states, but no more than the embeddings carry
    ids: list[int]  # (L,)
    mask: list[int]  # (L,) 0 = padding
    labels: list[int]  # (L,) IGNORE where nothing is trained
    all_turns: bool = False  # --train_on_turns all: between the answers nothing is trained


@dataclass(frozen=True)
class Cell:
    """What stands at a position of the LLM, or at a run of positions that are alike."""

    token: str
    label: str
    mask: str
    style: str

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.token, self.label, self.mask)))  # characters of the terminal


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors in one process at the peak of a training step, estimated.

    Python, the libraries, CUDA's context, the processes that read audio, and what a frozen encoder needs for a moment
    come on top. So do the activations of one layer with --gradient_checkpointing, and gradients on their way to other
    processes.
    """

    weights: int
    gradients: int  # of what is trained
    optimizer: int  # AdamW's two means
    activations: int  # kept for the backward pass; counted in a forward pass
    logits: int  # their gradients, at the begin of the backward pass

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {getattr(self, part.name) / 1e6:,.0f}" for part in fields(self))
        return f"{self.total / 1e6:,.0f} MB ({parts})"


def show(trainer: Trainer, count: int) -> None:
    """Print the first `count` batches that a SpeechTrainer trains on, and raise InputError if any utterance is wrong.

    Of several processes each checks its own share of a batch, and the first prints.
    """
    dataset, model, args = trainer.train_dataset, trainer.model, trainer.args
    # Colours in a terminal alone; brackets in a text are no markup.
    console = Console(quiet=args.process_index > 0, highlight=False, markup=False, soft_wrap=True)
    stop_ids, problems = set(model.llm.generation_config.eos_token_id), []
    console.print(Text(LEGEND, style=PADDING))
    if args.gradient_checkpointing:
        recompute_activations(model, args)
    for number, batch in enumerate(islice(trainer.get_train_dataloader(), count), 1):
        rows = rows_of(batch, dataset)
        console.print(f"\nbatch {number}: {len(rows)} utterances")
        for row in rows:
            problem = problem_of(row, stop_ids)
            problems += [f"{row.where}: {problem}"] if problem else []
            print_row(console, row, model.tokenizer, problem)
        if not any(label != IGNORE for row in rows for label in row.labels):
            problems.append(f"{rows[0].where}: batch {number} has not one label")
        print_sizes(console, batch)
        of_all = sum(gather_object([problems]), [])  # of all processes: none may wait for another one
        if not of_all:
            print_step(console, "a step with this batch", batch, model, args)
    if of_all:
        more = f" (and {len(of_all) - 1} more)" if len(of_all) > 1 else ""
        raise InputError(f"{of_all[0]}{more}")
    longest = dataset.seconds.argsort()[-args.train_batch_size :].tolist()  # positions
    if trainer.batches:
        longest = trainer.batches.longest_batch()
    batch = collate([dataset[position] for position in longest])
    print_step(console, f"\na step with the {len(longest)} longest clips", batch, model, args)
    console.print("nothing wrong found")


def rows_of(batch: dict, dataset: SpeechDataset) -> list[Row]:
    """The utterances of a batch of `collate`."""
    # What 30 s give tells the rate. With --pad_to_30s every clip has as many: then the manifest tells the seconds.
    per_second = dataset.embedding_counts[len(dataset.extract(np.zeros(WINDOW, np.float32)))] / WINDOW * SAMPLE_RATE
    ids, labels = batch["input_ids"], batch["labels"]
    labels = nn.functional.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)  # (B, K) -> (B, L)
    rows = []
    for b, index in enumerate(batch["index"]):
        record = dataset.records[index]
        num_speech = (ids[b] == SPEECH).sum().item()
        seconds = min((num_speech + 1) / per_second, dataset.durations[index])  # a tail gives no embedding
        spoken = "" if "messages" in record else transcript_of(record) or ""
        texts = record["where"], batch["bad"][b], spoken
        columns = (x[b].tolist() for x in (ids, batch["attention_mask"], labels))
        rows.append(Row(*texts, seconds, *columns, dataset.train_on_turns == "all"))
    return rows


def problem_of(row: Row, stop_ids: set[int]) -> str | None:
    """What would spoil the training, or None."""
    trained = [position for position, label in enumerate(row.labels) if label != IGNORE]
    if row.bad:
        return None  # left out, and reported
    if not trained:
        return "no label: nothing of this utterance is trained"
    if len(trained) >= sum(row.mask):
        return "all labels: the prompt is trained too, not the transcript alone"
    if any(not row.mask[position] or row.ids[position] < 0 for position in trained):
        return "a label on padding or on speech"
    if any(row.labels[position] != row.ids[position] for position in trained):
        return "a label that is not its own token: labels are not to be shifted, the model does that"
    if row.labels[-1] not in stop_ids:
        return "no end token under training: the model would never learn to stop"
    # Of several answers each has its end, behind which nothing is trained.
    ends = {position for position in trained[:-1] if row.all_turns and row.labels[position + 1] == IGNORE}
    if stops := [position for position in trained[:-1] if row.labels[position] in stop_ids and position not in ends]:
        return f"an end token inside the transcript, at its token {trained.index(stops[0]) + 1} of {len(trained)}"
    # 50 letters a second, or 25 Chinese characters: about twice the fastest speech. hallucination.py has the sources.
    if row.transcript and (least := least_seconds(row.transcript) + GRACE_SECONDS) > row.seconds:
        sizes = f"{len(row.transcript)} characters in {row.seconds:.2f} s, where nobody needs less than {least:.2f} s"
        return f"a transcript longer than its audio can carry: {sizes}"
    return None


def cells_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Cell]:
    """A cell for each token, and for each run of padding or of speech embeddings."""
    cells, first_trained = [], next((i for i, label in enumerate(row.labels) if label != IGNORE), len(row.labels))
    columns = zip(row.ids, row.mask, row.labels, range(len(row.ids)), strict=True)

    def kind(column: tuple[int, int, int, int]) -> tuple:
        token, mask, label, position = column
        is_run = label == IGNORE and (not mask or token == SPEECH)
        return (token, mask) if is_run else (position,)

    for _, columns_alike in groupby(columns, kind):
        (token, mask, label, position), *others = columns_alike
        count, last = 1 + len(others), position == len(row.ids) - 1
        if not mask:
            text, style = f"padding ×{count}", PADDING
        elif token == SPEECH:
            text, style = f"[{count} embeddings]", AUDIO
        elif token in BOUNDARY_NAMES:
            text, style = BOUNDARY_NAMES[token], AUDIO
        else:
            text, style = show_token(tokenizer, token), PROMPT
        if label != IGNORE:
            is_end = last or (row.all_turns and row.labels[position + 1] == IGNORE)
            style = END if is_end else TRAINED
        elif position > first_trained and not row.all_turns:
            style = WRONG  # a hole in the labels
        cells.append(Cell(text, "-" if label == IGNORE else show_token(tokenizer, label), str(mask), style))
    return cells


def show_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = tokenizer.decode([token])
    if not text.replace("\n", "").isprintable() or "\ufffd" in text:  # a part of a character
        text = tokenizer.convert_ids_to_tokens(token)
    return text.replace("\n", "↵").replace(" ", "·") or "''"


def print_row(console: Console, row: Row, tokenizer: PreTrainedTokenizerBase, problem: str | None) -> None:
    """Three lines, token over label over mask, broken where the terminal ends."""
    num_speech, num_trained = row.ids.count(SPEECH), len(row.labels) - row.labels.count(IGNORE)
    letters = len("".join(row.transcript.split())) / max(row.seconds, 0.01)
    rate = f", {letters:.1f} characters a second" if row.transcript else ""
    sizes = f"{row.seconds:.2f} s, {num_speech} embeddings, {sum(row.mask)} positions, {num_trained} trained"
    console.print(Text(f"\n{row.where}  {sizes}{rate}"))
    if row.bad:
        console.print(Text(f"left out: {row.bad}", style=WRONG))
    lines = new_lines()
    for cell in cells_of(row, tokenizer):
        if lines[0].cell_len + cell.width + 2 > console.width and len(lines[0]) > 6:
            print_lines(console, lines)
            lines = new_lines()
        for line, text in zip(lines, (cell.token, cell.label, cell.mask), strict=True):
            line.append("  ").append(text, cell.style).append(" " * (cell.width - cell_len(text)))
    print_lines(console, lines)
    if problem:
        console.print(Text(f"wrong: {problem}", style=WRONG))


def new_lines() -> list[Text]:
    return [Text(title) for title in ("token ", "label ", "mask  ")]


def print_lines(console: Console, lines: list[Text]) -> None:
    for line in lines:
        line.rstrip()
        console.print(line)


def print_sizes(console: Console, batch: dict) -> None:
    name = "input_values" if "input_values" in batch else "input_features"  # (A, S) or (A, F, M)
    lengths, mask, labels = batch["feature_lengths"], batch["attention_mask"], batch["labels"]
    padding = 1 - lengths.sum().item() / math.prod(batch[name].shape[:2])
    console.print()
    console.print(f"encoder: {name} {tuple(batch[name].shape)}, {padding:.1%} padding")
    console.print(f"LLM: input_ids {tuple(mask.shape)}, {1 - mask.float().mean().item():.1%} padding")
    trained = (labels != IGNORE).sum().item()
    console.print(f"labels: {tuple(labels.shape)}, {trained} of {mask.sum().item()} positions are trained")


def print_step(console: Console, title: str, batch: dict, model: nn.Module, args: TrainingArguments) -> None:
    """The loss of a batch and the memory that a training step with it takes. Raises InputError if the loss is NaN."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return console.print(f"{title}: not measured under DeepSpeed ZeRO-3, which shares out the weights")
    loss, memory = measure_step(model, batch, autocast_dtype(args))
    num_tokens = model.get_input_embeddings().weight.shape[0]  # V
    guess = f"a guess among {num_tokens:,} tokens has {math.log(num_tokens):.2f}"
    console.print(f"{title}: loss {loss:.2f} nats a token before training ({guess}); memory about {memory}")
    if not math.isfinite(loss):
        raise InputError(f"{title.strip()}: the loss is {loss}; wanted a number: look at the weights and at --dtype")


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def recompute_activations(model: nn.Module, args: TrainingArguments) -> None:
    """Switch gradient checkpointing on as Trainer does it, by the name that its version has."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(args.gradient_checkpointing_kwargs)


def measure_step(model: nn.Module, batch: dict, dtype: torch.dtype | None = None) -> tuple[float, Memory]:
    """The loss of a batch, and the memory of a training step with it; no gradient is computed, no weight changed.

    The forward pass is real: PyTorch tells which tensors it keeps for the backward pass. `dtype` is autocast's.
    """
    saved, parameters = {}, list(model.parameters())  # saved: address -> bytes
    tensors = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(model.device.type, dtype, enabled=dtype is not None),
    ):
        outputs = model(**tensors)
    weights = storages([*parameters, *model.buffers()])
    trained = sum(storages([p for p in parameters if p.requires_grad]).values())
    kept = saved | storages([outputs.logits])
    activations = sum(size for address, size in kept.items() if address not in weights)
    logits = 2 * outputs.logits.numel() * outputs.logits.element_size()  # of the softmax, and of the logits
    return outputs.loss.item(), Memory(sum(weights.values()), trained, 2 * trained, activations, logits)


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of what holds the tensors; tied weights are there once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
