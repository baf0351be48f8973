"""Evaluation during training: loss, error rate, and whether the model listens to the audio: --eval_data_path."""

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from dataset import IGNORE, SpeechDataset, collate
from errors import InputError
from intervals import LEVEL, Interval, rate_interval
from manifest import SPEECH, DecodingOptions, transcript_of
from score import score

if TYPE_CHECKING:
    from model import SpeechLLM
    from train import SpeechTrainer

DEAF = 0.1  # a listening gap below this, in nats a token: the model writes much the same whatever it hears
NUM_RESAMPLES = 1000  # for the interval of the error rate
TO_TRY = "a higher --learning_rate, more steps, a smaller --projector_stride, --lora_r 8"


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]  # loss, listening_gap, and wer or another metric
    hypotheses: dict[int, str]  # greedy, by the index of the record, of the utterances that could be read
    skipped: set[str]  # why the others could not
    interval: Interval | None  # of the error rate, over utterances

    def facts(self) -> dict[str, float | str]:
        """For config.json and experiment.md."""
        interval = {} if self.interval is None else {f"{LEVEL} % interval": f"{self.interval} %"}
        return {name: round(value, 4) for name, value in self.metrics.items()} | interval


class Utterance(NamedTuple):  # what an evaluation finds of one
    loss: float  # summed over its tokens
    loss_of_other: float  # with another clip's audio
    num_tokens: int
    text: str
    bad: str | None  # why it could not be read


def collate_with_prompts(examples: list[dict]) -> tuple[dict, dict]:
    """The batch with transcripts, for the loss, and the one without, for decoding."""
    return collate(examples), collate(examples, with_targets=False)


def evaluate(
    model: "SpeechLLM", dataset: SpeechDataset, args: TrainingArguments, metric: str = "auto", title: str = "evaluation"
) -> Evaluation:
    """The evaluation of all utterances, the same for any number of processes.

    The listening gap is the loss with another clip's audio minus the loss with the right audio, per trained token: near
    0, the model writes what is likely and not what it hears. Prints the figures and three transcripts. Of W processes
    each takes every W-th utterance; shares are equal, as ZeRO-3 wants, so the last may wrap around to the first
    utterances; these count once.
    """
    # Under tensor parallelism all processes evaluate the same utterances.
    number, num_shares = (0, 1) if args.tensor_parallel else (args.process_index, args.world_size)
    share = -(-len(dataset) // num_shares)  # utterances a process
    positions = [(number + i * num_shares) % len(dataset) for i in range(share)]
    positions.sort(key=lambda position: -dataset.seconds[position])  # similar lengths in a batch
    utterances: dict[int, Utterance] = {}  # by index
    for part in gather_object([evaluate_share(model, dataset, positions, args)]):
        utterances |= part  # one that came twice counts once
    good = {index: utterances[index] for index in sorted(utterances) if not utterances[index].bad}
    bad = {utterance.bad for utterance in utterances.values() if utterance.bad}  # reasons
    if not good:
        raise InputError(f"every evaluation utterance is bad; the first: {min(bad)}")
    references, hypotheses = [transcript_of(dataset.records[index]) for index in good], [u.text for u in good.values()]
    result = score(references, hypotheses, metric=metric)  # over the whole set, not a mean of batches
    interval = rate_interval(result.lines, NUM_RESAMPLES)
    num_tokens = sum(utterance.num_tokens for utterance in good.values())
    loss = sum(utterance.loss for utterance in good.values()) / num_tokens
    metrics = {"loss": loss, result.metric: result.all.rate}
    if len(good) > 1:  # one clip alone has no other
        metrics["listening_gap"] = sum(utterance.loss_of_other for utterance in good.values()) / num_tokens - loss
    if args.process_index == 0:
        print_figures(title, metrics, result.metric, interval, references, hypotheses)
    return Evaluation(metrics, dict(zip(good, hypotheses, strict=True)), bad, interval)


def evaluate_and_note(trainer: "SpeechTrainer", dataset: SpeechDataset, prefix: str) -> dict[str, float]:
    """The metrics of an evaluation in a training run, with a prefix; its facts go into the model's config."""
    kind, args = "evaluation" if prefix == "eval" else prefix, trainer.args
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    evaluation = evaluate(trainer.model, dataset, args, "auto" if metric == "loss" else metric, kind)
    trainer.skipped |= evaluation.skipped  # reported at the end of the run
    facts = evaluation.facts() | {"after steps": trainer.state.global_step}
    trainer.model.config.training |= {f"{kind} {name}": value for name, value in facts.items()}
    if trainer.predictions:
        trainer.predictions.show(kind, dataset, evaluation.hypotheses, trainer.state)
    return {f"{prefix}_{name}": value for name, value in evaluation.metrics.items()}


@torch.no_grad()
def evaluate_share(
    model: "SpeechLLM", dataset: SpeechDataset, positions: list[int], args: TrainingArguments
) -> dict[int, Utterance]:
    """The utterances at some positions of the dataset, by the index of their records."""
    utterances, options = {}, {"num_workers": args.dataloader_num_workers, "collate_fn": collate_with_prompts}
    with model.in_eval_mode():
        others = embeds_of_longest(model, dataset)
        for batch, prompts in DataLoader(dataset, args.per_device_eval_batch_size, sampler=positions, **options):
            tensors = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
            speech_embeds = model.embed_batch(batch)  # (sum of N, H), once for both losses and decoding
            losses = []  # with the right audio, and with another clip's
            for embeds in (speech_embeds, embeds_of_another(batch, others, speech_embeds)):
                logits = model(**tensors, speech_embeds=embeds).logits  # (B, K, V)
                loss = F.cross_entropy(logits.transpose(1, 2), tensors["labels"], reduction="none")  # (B, K)
                losses.append(loss.sum(1).tolist())  # (B,)
            num_tokens = (batch["labels"] != IGNORE).sum(1).tolist()
            hypotheses = model.decode_batch(prompts, dataset, DecodingOptions(num_beams=1), speech_embeds)
            rows = zip(*losses, num_tokens, [hypothesis.text for hypothesis in hypotheses], batch["bad"], strict=True)
            utterances |= dict(zip(batch["index"], map(Utterance._make, rows), strict=True))
    return utterances


def embeds_of_longest(model: "SpeechLLM", dataset: SpeechDataset) -> list[tuple[int, Tensor]]:
    """(index of the record, speech embeddings (N, H)) of the two longest good clips, the same on every process."""
    by_length = map(int, (-dataset.seconds).argsort(kind="stable"))  # positions
    examples = (e for e in map(dataset.__getitem__, by_length) if not e["bad"] and any(e["feature_lengths"]))
    # One by one: short of memory, the longest clip alone is the most that must fit.
    return [(example["index"], model.embed_batch(collate([example]))) for example in islice(examples, 2)]


def embeds_of_another(batch: dict, others: list[tuple[int, Tensor]], speech_embeds: Tensor) -> Tensor:
    """As many speech embeddings as the batch has (sum of N, H), all of the longest clip; its own of the next longest.

    They are cut to the length of the right ones, or repeated where the only other clip is shorter.
    """
    parts = []
    for row, index in zip(batch["input_ids"], batch["index"], strict=True):
        embeds = next((embeds for other, embeds in others if other != index), speech_embeds)
        parts.append(embeds[torch.arange(int((row == SPEECH).sum())) % len(embeds)])
    return torch.cat(parts)


def print_figures(
    title: str,
    metrics: dict[str, float],
    rate: str,
    interval: Interval | None,
    references: list[str],
    hypotheses: list[str],
) -> None:
    """The figures of an evaluation, three transcripts, and what to try if the model does not listen."""
    gap = metrics.get("listening_gap")
    more = f" ({LEVEL} % interval {interval})" if interval else ""
    more += "" if gap is None else f", listening gap {gap:.3f}"
    print(f"{title}: loss {metrics['loss']:.4f}, {rate.upper()} {metrics[rate]:.2%}{more}; the first lines are:")
    for reference, hypothesis in list(zip(references, hypotheses, strict=True))[:3]:
        print(f"  reference  {reference}\n  hypothesis {hypothesis}")
    if gap is not None and gap < DEAF:
        print(
            "warning: the model does not listen: another clip's audio would do as well. Many learn to only after some"
        )
        print(f"  thousand clips. If it stays so, look at a batch (--check), and try {TO_TRY}")
