"""Loss and error rate of a model on a whole set, whatever the batches and the number of processes."""

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from dataset import IGNORE, SpeechDataset, collate
from manifest import InputError, reference
from model import SpeechLLM
from score import score


@torch.no_grad()
def evaluate(model: SpeechLLM, dataset: SpeechDataset, args: TrainingArguments) -> tuple[dict[str, float], list[str]]:
    """{"loss": per trained token, "wer" or "cer": greedy}, and why utterances were skipped.

    Prints the figures and three transcripts. Of W processes each takes every W-th utterance; all get the same result.
    Shares are equal, as ZeRO-3 wants, so the last may wrap around to the first utterances; these count once.
    """
    batch_size, num_workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    share = -(-len(dataset) // args.world_size)
    mine = [(args.process_index + i * args.world_size) % len(dataset) for i in range(share)]
    rows, training = {}, model.training  # rows: index -> [loss, trained tokens, hypothesis, why it is bad]
    model.eval()
    for batch in DataLoader(dataset, batch_size, sampler=mine, collate_fn=collate, num_workers=num_workers):
        index, bad = batch.pop("index"), batch.pop("bad")
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        losses = F.cross_entropy(model(**batch)["logits"].transpose(1, 2), batch["labels"], reduction="none").sum(1)
        counts = (batch["labels"] != IGNORE).sum(1)
        for row in zip(index, losses.tolist(), counts.tolist(), bad, strict=True):
            rows[row[0]] = [row[1], row[2], "", row[3]]
    for batch in model.decode(dataset, mine, batch_size, num_workers, num_beams=1):
        for index, text, _ in batch:
            rows[index][2] = text
    model.train(training)
    rows = {index: row for part in gather_object([rows]) for index, row in part.items()}
    skipped = [bad for _, _, _, bad in rows.values() if bad]
    good = {index: row for index, row in sorted(rows.items()) if not row[3]}
    if not good:
        raise InputError(f"every evaluation utterance is bad; the first: {skipped[0]}")
    texts = [(reference(dataset.records[index]), row[2]) for index, row in good.items()]
    result = score(*zip(*texts, strict=True))
    loss = sum(row[0] for row in good.values()) / sum(row[1] for row in good.values())
    if args.process_index == 0:
        print(f"evaluation: loss {loss:.4f}, {result.metric.upper()} {result.all.rate:.2%}; the first lines are:")
        for spoken, written in texts[:3]:
            print(f"  reference  {spoken}\n  hypothesis {written}")
    return {"loss": loss, result.metric: result.all.rate}, skipped
