"""The largest batch that fits into memory: --auto_batch tries forward and backward passes of growing size.

What counts is the LLM's positions: by its activations, and by them the seconds of audio are bounded as well. A trial's
batch is one clip many times over, without padding: the longest clip, then one with much audio for its positions, then
one with many trained tokens, each of which has a row of logits as wide as the vocabulary.
"""

import math
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainingArguments

from dataset import SpeechDataset, collate
from errors import InputError
from inspect_batch import autocast_dtype, recompute_activations, storages

if TYPE_CHECKING:
    from model import SpeechLLM

KEPT_FREE = 0.1  # of the memory: batches of many sizes leave holes in it, and others use the machine
LEAST_STEPS = 16  # an epoch keeps so many, however much memory there is


def find_budget(
    model: "SpeechLLM",
    dataset: SpeechDataset,
    seconds: np.ndarray,
    positions: np.ndarray,
    tokens: np.ndarray,
    args: TrainingArguments,
) -> int:
    """The --max_batch_tokens that fits on every process; it is printed. Raises InputError if the longest clip does not.

    Seconds of audio, LLM positions and trained tokens are (clips,), by position of the dataset. Weights, gradients
    and random state are afterwards as before.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise InputError("--auto_batch: cannot try batches under DeepSpeed ZeRO-3; give --max_batch_tokens")
    if args.gradient_checkpointing:
        recompute_activations(model, args)
    device, was_training = model.device, model.training
    trained = sum(storages([p for p in model.parameters() if p.requires_grad]).values())  # bytes
    # AdamW's two means come with the first step; DistributedDataParallel holds gradients a second time.
    room = (1 - KEPT_FREE) * free_memory(device) - trained * (2 + (args.world_size > 1))
    before = memory_in_use(device)
    gather_object([room])  # all have looked before the first takes any

    def need(budget: int) -> float:
        """Bytes that a step with batches of so many positions takes, at most; infinity if it does not fit."""
        clips = extreme_clips(seconds, positions, tokens, budget)
        steps = [partial(try_step, model, dataset[clip], budget, args) for clip in clips]
        return max(peak_memory(device, step) for step in steps) - before

    smallest = int(np.ceil(positions.max()))
    batches_a_step = args.world_size * args.gradient_accumulation_steps
    most = max(smallest, int(positions.sum() / LEAST_STEPS / batches_a_step))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        budget, needed = grow(need, room, smallest, most)
    model.train(was_training)
    budgets = gather_object([budget if needed <= room else 0])  # of all processes
    sizes = f"{needed / 1e9:.3g} of {room / 1e9:.3g} GB"
    if not min(budgets):
        cure = "try --gradient_checkpointing, or a lower --max_seconds with --on_bad_audio skip"
        raise InputError(f"--auto_batch: a step with one clip, the longest, takes {sizes}; {cure}")
    if args.process_index == 0:
        why = f"; more would leave an epoch less than {LEAST_STEPS} steps" if budget == most else ""
        flag = f"the same again: --max_batch_tokens {min(budgets)}"
        print(f"--auto_batch: {min(budgets):,} LLM positions fit ({sizes} that are free{why}); {flag}")
    return min(budgets)


def grow(need: Callable[[int], float], room: float, smallest: int, most: int) -> tuple[int, float]:
    """(budget, bytes it needs): the largest found between `smallest` and `most` whose need is within `room`.

    The size is doubled as long as the memory for that is there; the last two sizes then tell how far to go, in a line,
    and a trial confirms it. If the smallest does not fit, it is returned all the same.
    """
    budget, needed = smallest, need(smallest)
    rate = needed / smallest  # bytes a position, at most: some are needed whatever the size
    while budget < most and needed + rate * (min(2 * budget, most) - budget) <= room:
        larger = min(2 * budget, most)
        more = need(larger)
        if more < math.inf:
            rate = max((more - needed) / (larger - budget), 0.1 * more / larger)  # small sizes may show no difference
        if more > room:
            break
        budget, needed = larger, more
    guess = min(most, 2 * budget, budget + int(max(room - needed, 0) / rate))
    while guess > budget:
        more = need(guess)
        if more <= room:
            return guess, more
        guess = int(0.95 * guess)
    return budget, needed


def extreme_clips(seconds: np.ndarray, positions: np.ndarray, tokens: np.ndarray, budget: int) -> list[int]:
    """Positions of clips of which batches of so many LLM positions would take the most memory, without doubles.

    Of audio and trained tokens for each position, the mean of the batch that has most: one odd clip is no batch.
    """
    clips = [int(positions.argmax())]
    for share in (seconds / positions, tokens / positions):
        order = np.argsort(-share, kind="stable")
        num_clips = np.searchsorted(positions[order].cumsum(), budget)  # that fill the batch
        clips.append(int(order[min(num_clips // 2, len(order) - 1)]))
    return list(dict.fromkeys(clips))


def try_step(model: "SpeechLLM", example: dict, budget: int, args: TrainingArguments) -> None:
    """A forward and a backward pass of as many copies of an example as the budget holds; the gradients are dropped."""
    num_positions = len(example["prompt_ids"]) + len(example["target_ids"])
    batch = collate([example] * max(budget // num_positions, 1))
    tensors = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
    dtype = autocast_dtype(args)
    model.train()
    try:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            loss = model(**tensors).loss
        loss.backward()
    finally:
        model.zero_grad(set_to_none=True)


# Memory


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_in_use(device: torch.device) -> int:
    """Bytes: of tensors on the GPU, or of this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: torch.device, run: Callable[[], None]) -> float:
    """The most bytes in use while `run` runs; infinity if the GPU has not so many.

    On the CPU a thread looks at this process every millisecond.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run()
        except torch.cuda.OutOfMemoryError:
            return math.inf
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated(device)
    sizes, is_done = [memory_in_use(device)], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.001):
            sizes.append(memory_in_use(device))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        is_done.set()
        thread.join()
    return max(sizes)
