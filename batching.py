"""Batches by a budget, in place of a fixed number of clips: --max_batch_seconds, --max_batch_tokens, --auto_batch.

    for batch in batches(lengths, budget, np.random.default_rng(0)):  # lengths (clips, measures), budget (measures,)
        lengths[batch].max(0) * len(batch) <= budget  # in each measure: seconds of audio, LLM positions ...

`batches` knows nothing of records and models: a buffer of a stream can be cut by it as well.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from dataset import SILENCE, WINDOW, SpeechDataset, collate, render_prompt
from errors import BadUtterance, InputError
from manifest import SAMPLE_RATE, transcript_of

if TYPE_CHECKING:
    from train import DataArguments, SpeechTrainer

SECONDS, POSITIONS = 0, 1  # columns of lengths: of audio; of the LLM, for prompt, speech and transcript
NUM_DECKS = 8  # so many batches of an epoch are dealt from the same clips: more mix better, and pad more
SLOWEST = 0.9  # of --augment speed: such clips get longer


# Batches of any lengths


def batches(
    lengths: np.ndarray, budget: np.ndarray, random: np.random.Generator, multiple: int = 1
) -> list[np.ndarray]:
    """Positions of the clips of each batch; neighbours in the list are of similar length.

    In each measure of `lengths` (clips, measures) a batch has clips x longest <= `budget` (measures,); a longer clip is
    a batch of its own. Every clip comes once. The number of batches is a multiple of `multiple`, and depends on lengths
    and budget alone. Where there are fewer clips than that, some come again.
    """
    return deal(plan(lengths, budget), random, multiple)


@dataclass(frozen=True)
class Plan:
    """Clips in an order in which neighbours are alike, laid out in rows, and the rows at which batches begin.

    Each row is dealt out at random, one clip to each deck, and every deck is cut at the same rows. So batches differ
    from epoch to epoch, their number does not, and no clip is left over.
    """

    rows: np.ndarray  # (rows, decks) positions; the last row is filled up with -1
    starts: list[int]
    filled: np.ndarray  # (measures,) share of the batches that is no padding, at least


def plan(lengths: np.ndarray, budget: np.ndarray) -> Plan:
    """The plan with the least padding. Clips are sorted in strips, of which 1, 2, 4 ... are tried: many strips make the
    first measure alike, few strips the last.
    """
    num_clips, best = len(lengths), None
    num_batches = (lengths.sum(0) / budget).max()  # if nothing were padded
    num_decks = int(np.clip(num_batches // 16, min(2, num_clips), NUM_DECKS))  # few batches: less to choose from
    num_rows, num_strips = -(-num_clips // num_decks), 1
    while num_strips <= max(num_rows // 4, 1):
        rows = np.full(num_rows * num_decks, -1)
        rows[:num_clips] = order_in_strips(lengths, num_strips)
        rows = rows.reshape(num_rows, num_decks)
        longest = np.where(rows[:, :, None] < 0, 0, lengths[rows]).max(1)  # (rows, measures)
        starts = cut(longest, budget)
        num_rows_of = np.diff([*starts, num_rows])  # of each batch: a clip of each row
        padded = (np.maximum.reduceat(longest, starts) * num_rows_of[:, None]).sum(0) * num_decks
        filled = lengths.sum(0) / np.maximum(padded, 1e-9)
        if best is None or filled.sum() > best.filled.sum():
            best = Plan(rows, starts, filled)
        num_strips *= 2
    return best


def order_in_strips(lengths: np.ndarray, num_strips: int) -> np.ndarray:
    """Positions (clips,) of which neighbours are alike.

    The first measure falls from strip to strip; the last falls in one strip and rises in the next, so that the clips on
    both sides of the border are alike too.
    """
    strips = np.array_split(np.argsort(-lengths[:, 0], kind="stable"), num_strips)
    strips = [strip[np.argsort(-lengths[strip, -1], kind="stable")] for strip in strips]
    return np.concatenate([strip[::-1] if number % 2 else strip for number, strip in enumerate(strips)])


def cut(longest: np.ndarray, budget: np.ndarray) -> list[int]:
    """Where batches begin in rows whose longest clips are `longest` (rows, measures): each as full as `budget` lets."""
    starts, row = [], 0
    while row < len(longest):
        starts.append(row)
        most = min(budget / np.maximum(longest[row], 1e-9))  # rows, if the others are no longer than this one
        widest = np.maximum.accumulate(longest[row : row + max(int(min(most, len(longest))), 1)])  # (rows, measures)
        fits = (widest * np.arange(1, len(widest) + 1)[:, None] <= budget).all(1)
        row += max(int(fits.sum()), 1)  # a clip over the budget stands alone
    return starts


def deal(plan: Plan, random: np.random.Generator, multiple: int = 1) -> list[np.ndarray]:
    """The batches of an epoch; see `batches`."""
    dealt = random.permuted(plan.rows, axis=1)  # each row on its own
    batches = [deck[deck >= 0] for rows in np.split(dealt, plan.starts[1:]) for deck in rows.T]
    batches = [batch for batch in batches if len(batch)]  # the last row may not reach every deck
    while len(batches) % multiple:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))  # the first of those
        if len(batches[largest]) == 1:
            break
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return batches + list(islice(cycle(batches[::-1]), -len(batches) % multiple))  # clips of one batch each: too few


# Batches of a training run


class BudgetSampler(torch.utils.data.Sampler):
    """The batches of one process, as lists of (epoch, position), in a random order.

    An optimiser's step takes `num_processes * accumulation` batches of similar lengths. Which these are does not depend
    on how many of the two there are, and the order depends on seed and epoch alone, also in a resumed run.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        budget: np.ndarray,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
    ):
        self.lengths, self.budget, self.plan = lengths, budget, plan(lengths, budget)
        self.seed, self.epoch = seed, epoch
        self.num_processes, self.process_index = num_processes, process_index
        self.batches_a_step = num_processes * accumulation
        self.num_batches = len(self.batches_of(0)[0])  # of all processes, in every epoch

    def batches_of(self, epoch: int) -> tuple[list[np.ndarray], np.random.Generator]:
        """The batches of an epoch, and the generator that is to shuffle them."""
        random = np.random.default_rng([self.seed, epoch])
        return deal(self.plan, random, self.batches_a_step), random

    def __len__(self) -> int:
        return self.num_batches // self.num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size = self.epoch(), self.batches_a_step
        batches, random = self.batches_of(epoch)
        for step in random.permutation(len(batches) // size).tolist():
            # Shuffled inside the step too, so that no process has always its longest.
            for number in (step * size + random.permutation(size))[self.process_index :: self.num_processes].tolist():
                yield [(epoch, position) for position in batches[number].tolist()]

    def longest_batch(self) -> list[int]:
        """Positions of the batch with the longest clip, in the first epoch."""
        return max(self.batches_of(0)[0], key=lambda batch: self.lengths[batch, SECONDS].max()).tolist()

    def describe(self) -> str:
        """One line: how many batches and steps an epoch has, and what of them is padding."""
        batches = self.batches_of(0)[0]
        sizes = [len(batch) for batch in batches]
        padded = sum(self.lengths[batch].max(0) * len(batch) for batch in batches)  # (measures,)
        padding = 1 - sum(self.lengths[batch].sum(0) for batch in batches) / np.maximum(padded, 1e-9)
        units = zip(self.budget, ("s", "LLM positions"), strict=True)
        budget = " and ".join(f"{limit:,.6g} {unit}" for limit, unit in units if np.isfinite(limit))
        clips = f"{len(batches):,} batches of {min(sizes)} to {max(sizes)} clips"
        shares = f"{padding[SECONDS]:.1%} (encoder), {padding[POSITIONS]:.1%} (LLM)"
        return f"budget of {budget}: {clips}, {len(batches) // self.batches_a_step:,} steps an epoch; padding {shares}"

    def loader(self, dataset: SpeechDataset, args: TrainingArguments) -> DataLoader:
        return make_loader(dataset, self, args)


def make_loader(dataset: torch.utils.data.Dataset, sampler: Iterable[list], args: TrainingArguments) -> DataLoader:
    """What Trainer iterates over: the batches of this process. accelerate need not deal them out."""
    options = {n: getattr(args, f"dataloader_{n}") for n in "num_workers persistent_workers prefetch_factor".split()}
    options["pin_memory"] = args.dataloader_pin_memory and args.device.type == "cuda"
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options)


def sampler_for(trainer: "SpeechTrainer", data: "DataArguments") -> BudgetSampler:
    """The sampler that the flags ask for. The budget goes into the settings of the trainer. Raises InputError.

    A run that goes on has there the budget that --auto_batch found before.
    """
    dataset, args, settings = trainer.train_dataset, trainer.args, trainer.settings
    if args.train_sampling_strategy != "group_by_length" or args.dataloader_drop_last:
        flags = "--train_sampling_strategy, --dataloader_drop_last"
        raise InputError(f"a budget for a batch makes batches of similar lengths of all clips; leave out {flags}")
    if data.auto_batch and (data.max_batch_seconds or data.max_batch_tokens):
        raise InputError("--auto_batch looks for a budget; leave out --max_batch_seconds and --max_batch_tokens")
    is_stretched = "speed" in data.augment
    lengths, tokens = measure(dataset, args.process_index, args.world_size, 1 / SLOWEST if is_stretched else 1.0)
    if data.auto_batch and not settings["max_batch_tokens"]:
        import auto_batch  # an option

        settings["max_batch_tokens"] = auto_batch.find_budget(trainer.model, dataset, *lengths.T, tokens, args)
    budget = np.array([settings["max_batch_seconds"] or np.inf, settings["max_batch_tokens"] or np.inf])
    for column, flag in ((SECONDS, "--max_batch_seconds"), (POSITIONS, "--max_batch_tokens")):
        longest = lengths[:, column].argmax()
        if lengths[longest, column] > budget[column]:
            where, least = dataset.records[int(dataset.indices[longest])]["where"], np.ceil(lengths[:, column].max())
            cure = "or --on_bad_audio skip with a lower --max_seconds or --model_max_length"
            raise InputError(f"{flag} {budget[column]:g}: {where} alone has {least:g}; wanted so many at least, {cure}")
    seed = args.seed if args.data_seed is None else args.data_seed
    processes = args.world_size, args.process_index, args.gradient_accumulation_steps
    sampler = BudgetSampler(lengths, budget, seed, lambda: trainer.epoch, *processes)
    if trainer.is_world_process_zero():
        print(sampler.describe())
        if len(dataset) < sampler.num_batches:
            print(
                f"{len(dataset)} utterances for {sampler.num_batches} batches a step: some come more than once an epoch"
            )
    return sampler


def measure(dataset: SpeechDataset, process_index: int = 0, num_processes: int = 1, stretch: float = 1.0) -> tuple:
    """Lengths (clips, 2), seconds of audio and LLM positions, and trained tokens (clips,), by position of the dataset.

    Transcripts are tokenised, a share of them by each process. Speech embeddings are counted from seconds, `stretch`
    times as many as now: at most one too many for each 30 s. Clips padded to 30 s last 30 s.
    """
    # Features grow with the samples; what 30 s give tells how fast.
    rate = len(dataset.extract(np.zeros(WINDOW, np.float32))) / WINDOW  # features a sample
    share = np.arange(process_index, len(dataset), num_processes)  # positions
    lengths = []
    for start in range(0, len(share), 1000):
        positions = share[start : start + 1000]
        records = [dataset.records[index] for index in dataset.indices[positions].tolist()]
        texts = [transcript_of(record) or "" for record in records]
        tokens = np.array([len(ids) + 1 for ids in dataset.tokenizer(texts, add_special_tokens=False).input_ids])
        seconds = dataset.seconds[positions]
        samples = np.where(seconds > 0, seconds * stretch * SAMPLE_RATE, SILENCE)  # text alone comes with a silence
        windows = np.maximum(np.ceil(samples / WINDOW), 1)
        samples = windows * WINDOW if dataset.pad_to_30s else samples
        features = np.ceil(samples / windows * rate).astype(int) + 1
        speech = windows * dataset.embedding_counts[features.clip(max=len(dataset.embedding_counts) - 1)]
        num_positions = speech * (seconds > 0) + tokens + [prompt_length(dataset, record) for record in records]
        num_positions = num_positions.clip(max=dataset.max_length)  # no example is longer
        lengths.append(np.stack([samples / SAMPLE_RATE, num_positions, tokens], axis=1))
    result = np.zeros((len(dataset), 3))
    for number, part in enumerate(gather_object([np.concatenate([result[:0], *lengths])])):  # of each process
        result[number::num_processes] = part
    return result[:, :2], result[:, 2]


def prompt_length(dataset: SpeechDataset, record: dict) -> int:
    """LLM positions of a record's prompt without its speech; 0 if it is bad, which shows when it is read."""
    prompt = record["messages"][:-1] if "messages" in record else record.get("prompt", dataset.prompt)
    try:
        pieces, _ = render_prompt(dataset.tokenizer, prompt, dataset.system_prompt)
    except BadUtterance:
        return 0
    return sum(map(len, pieces)) + 2 * (len(pieces) - 1) * dataset.audio_boundary_tokens
