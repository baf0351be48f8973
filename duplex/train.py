"""Train a DuplexModel, on one process, or under torchrun and --deepspeed as train.py.

    python -m duplex.train --data_path talks/conversations.jsonl --encoder_name_or_path tiny --projector_stride 4 \
        --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --codec kyutai/mimi --lora_r 16 --output_dir run

Flags: those of duplex/model.py and of transformers.TrainingArguments. The same command goes on after a kill.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

import resume
from dataset import IGNORE
from duplex.data import ConversationDataset, collate, load_channels, open_conversations
from duplex.model import DuplexArguments, DuplexConfig, DuplexModel
from errors import InputError, as_input_error, run
from frame_cache import TRIAL, key_of, key_of_encoder
from manifest import option
from train import SpeechTrainer, TrainArguments, describe, load_model


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "conversations: JSON lines as in duplex/data.py, or lhotse:CUTS"})
    eval_data_path: str | None = option(None, "the same, for --eval_strategy: losses of text and audio")
    encoder_cache: str | None = option(None, "a folder that keeps the frames of a frozen encoder; None = no cache")
    projector_model_path: str | None = option(None, "model.safetensors to start from instead of random weights")


class DuplexTrainer(SpeechTrainer):
    """The root's trainer, with the losses of the two channels for an evaluation: means over all frames."""

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        loader = DataLoader(self.eval_dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        sums, num_frames = Counter(), 0
        with self.model.in_eval_mode():  # every process evaluates all of it
            for batch in loader:
                losses = self.model(**self._prepare_inputs(batch), num_items_in_batch=1).logits  # sums over frames
                sums.update({name: value.item() for name, value in losses.items()})
                num_frames += int((batch["labels"] != IGNORE).sum())
        metrics = {f"{metric_key_prefix}_{name}": value / num_frames for name, value in sums.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def path_of(folder: Path, key: bytes, channels: np.ndarray) -> Path:
    """The file of a conversation's frames and codes; its name is a hash of what decides them."""
    return folder / "{:x}_{:x}.safetensors".format(*key_of(key + channels.tobytes()))


def read(folder: Path, key: bytes, channels: np.ndarray) -> dict[str, torch.Tensor]:
    with as_input_error(str(folder), "read the frames of a conversation", "the audio that was encoded"):
        return load_file(path_of(folder, key, channels))


@torch.no_grad()
def encode_once(model: DuplexModel, dataset: ConversationDataset, folder: Path, rank: int, world_size: int) -> None:
    """Write frames and codes of this process's share of a dataset, which will read all of them from then on."""
    if any(p.requires_grad for p in model.encoder.parameters()):
        raise InputError("--encoder_cache: the encoder is trained; wanted a frozen one")
    trial = model.codec.encode(torch.from_numpy(TRIAL)[None]).tolist()  # tells one codec from another
    key = f"{key_of_encoder(model.encoder, False)} {model.window} {trial}".encode()
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(rank, len(dataset), world_size), "encoding", disable=None):
        channels = load_channels(dataset.records[index])
        if not (path := path_of(folder, key, channels)).is_file():
            example = dataset.encode(channels)
            frames = model.encode_windows(example["features"].to(model.device)).bfloat16().cpu()  # (W, frames, D)
            save_file({"frames": frames, "codes": example["codes"].short()}, new := f"{path}.{os.getpid()}")
            os.replace(new, path)  # whole or not at all, whatever is killed
    dataset.encode = partial(read, folder, key)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((DuplexArguments, DataArguments, TrainArguments), allow_abbrev=False)
    with as_input_error("duplex.train", "read its flags", "those that --help names"):
        arguments, data, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    checkpoint = resume.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model = load_model(DuplexConfig(**vars(arguments)), data, args, DuplexModel)
    sources = [path for path in (data.data_path, data.eval_data_path) if path]
    dataset, *others = datasets = [model.make_conversations(open_conversations(source)) for source in sources]
    settings = {"model": model.config.to_dict(), "records": dataset.records.fingerprint()}
    if checkpoint and json.loads(Path(checkpoint, "train_settings.json").read_text()) != settings:
        raise InputError(f"{checkpoint}: is of another model or data; choose another --output_dir")
    if data.encoder_cache:
        for part in datasets:
            encode_once(model, part, Path(data.encoder_cache), args.process_index, args.world_size)
        gather_object([None])  # waits for the other processes
    model.config.training = {"trained on": f"{data.data_path}: {len(dataset):,} conversations"}
    options = {"settings": settings, "eval_dataset": others[0] if others else None}
    trainer = DuplexTrainer(model, args, partial(collate, pad=model.tokens.pad), dataset, **options)
    if trainer.is_world_process_zero():
        print(describe(model))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    run(main)
