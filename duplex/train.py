"""Train a DuplexModel, on one process, or under torchrun and --deepspeed as train.py.

    python -m duplex.train --data_path talks/conversations.jsonl --encoder_name_or_path tiny --projector_stride 4 \
        --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --codec kyutai/mimi --lora_r 16 --output_dir run

Flags: those of duplex/model.py and of transformers.TrainingArguments. The same command goes on after a kill.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, set_seed

from duplex.data import collate, open_conversations
from duplex.model import DuplexArguments, DuplexConfig, DuplexModel
from errors import InputError, run
from manifest import option
from train import SpeechTrainer, TrainArguments, describe, load_model


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "conversations: JSON lines as in duplex/data.py, or lhotse:CUTS"})
    eval_data_path: str | None = option(None, "the same, for --eval_strategy: losses of text and audio")
    projector_model_path: str | None = option(None, "model.safetensors to start from instead of random weights")


class DuplexTrainer(SpeechTrainer):
    """The root's trainer, with the losses of the two channels for an evaluation."""

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        dataset, sums, count = eval_dataset or self.eval_dataset, {}, 0
        with self.model.in_eval_mode():  # every process evaluates all of it
            for batch in DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator):
                losses = self.model(**self._prepare_inputs(batch))
                frames = int(batch["num_frames"].sum())
                for name, value in {"loss": losses.loss, **losses.logits}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * frames
                count += frames
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in sums.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((DuplexArguments, DataArguments, TrainArguments), allow_abbrev=False)
    arguments, data, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    records = open_conversations(data.data_path)
    eval_records = open_conversations(data.eval_data_path) if data.eval_data_path else None
    checkpoint = None
    if list(Path(args.output_dir).glob("checkpoint-[0-9]*")):
        import resume

        checkpoint = resume.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model = load_model(DuplexConfig(**vars(arguments)), data, args, DuplexModel)
    dataset = model.make_conversations(records)
    eval_dataset = model.make_conversations(eval_records) if eval_records else None
    settings = {"model": model.config.to_dict(), "records": records.fingerprint()}
    if checkpoint:
        before = json.loads(Path(checkpoint, "train_settings.json").read_text())
        if before != json.loads(json.dumps(settings)):
            raise InputError(f"{checkpoint}: is of another model or data; choose another --output_dir")
    model.config.training = {"trained on": f"{data.data_path}: {len(records):,} conversations"}
    pad = partial(collate, pad=model.tokens.pad)
    trainer = DuplexTrainer(model, args, pad, dataset, eval_dataset, settings=settings, eval_metric="loss")
    if trainer.is_world_process_zero():
        print(describe(model))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero() and dataset.problems:
        print(*sorted(set(dataset.problems))[:20], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    run(main)
