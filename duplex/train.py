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
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

import resume
from duplex.data import HOP, collate, load_channels, open_conversations, resample
from duplex.model import DuplexArguments, DuplexConfig, DuplexModel
from errors import InputError, run
from frame_cache import TRIAL, CachedEncoder, FrameCache, NewFile, key_of, key_of_encoder
from manifest import Records, option
from train import SpeechTrainer, TrainArguments, describe, load_model


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "conversations: JSON lines as in duplex/data.py, or lhotse:CUTS"})
    eval_data_path: str | None = option(None, "the same, for --eval_strategy: losses of text and audio")
    encoder_cache: str | None = option(None, "a folder that keeps the frames of a frozen encoder; None = no cache")
    projector_model_path: str | None = option(None, "model.safetensors to start from instead of random weights")


class DuplexTrainer(SpeechTrainer):
    """The root's trainer, with the losses of the two channels for an evaluation."""

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        dataset, sums, count = eval_dataset or self.eval_dataset, {}, 0
        with self.model.in_eval_mode():  # every process evaluates all of it
            for batch in DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator):
                losses, frames = self.model(**self._prepare_inputs(batch)), int(batch["num_frames"].sum())
                for name, value in {"loss": losses.loss, **losses.logits}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * frames
                count += frames
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in sums.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Caches(NamedTuple):
    """What was computed once, found by a hash of a conversation's samples."""

    frames: FrameCache  # of the encoder, for one size of windows
    codes: FrameCache  # of the codec, which stand there as int16
    chunk: int

    def hear(self, samples: np.ndarray) -> torch.Tensor:
        """The encoder's frames (W, frames, D) of the windows of samples (S,)."""
        return self.frames.extract(samples).unflatten(0, (-(-len(samples) // (self.chunk * HOP)), -1))

    def speak(self, samples: np.ndarray) -> torch.Tensor:
        return self.codes.extract(samples).view(torch.int16)  # (T, K)


def open_caches(model: DuplexModel, folder: str | Path) -> Caches:
    """The caches of a model's encoder and codec in a folder, with what is there by now."""
    trial = model.codec.encode(torch.from_numpy(TRIAL)[None])  # tells one codec from another
    names = f"{key_of_encoder(model.encoder, False)}_{'_'.join(map(str, model.window.values()))}", "codes_{:x}_{:x}"
    places = Path(folder, names[0]), Path(folder, names[1].format(*key_of(trial.numpy().tobytes())))
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    sizes = model.encoder.output_size, model.codec.num_codebooks
    return Caches(*map(FrameCache, places, sizes), model.config.chunk)


@torch.no_grad()
def encode_once(model: DuplexModel, records: Records, folder: str | Path, rank: int = 0, world_size: int = 1) -> None:
    """Put the frames and codes of this process's share of the records into the caches of a folder."""
    if any(p.requires_grad for p in model.encoder.parameters()):
        raise InputError("--encoder_cache: the encoder is trained; wanted a frozen one")
    known, speak = open_caches(model, folder), partial(resample, model.codec.sample_rate)
    with NewFile(known.frames.folder) as frames, NewFile(known.codes.folder) as codes:
        for index in tqdm(range(rank, len(records), world_size), "encoding", disable=None):
            (user, agent), _ = load_channels(records[index])
            if known.frames.find(key_of(user)) is None:
                heard = model.encode_windows(model.hear(user).to(model.device))  # (W, frames, D)
                frames.append({key_of(user): heard.flatten(0, 1).bfloat16().cpu()})
            if known.codes.find(key_of(agent)) is None:
                voice = model.codec.encode(speak(agent)[None].to(model.device))[0]  # (T, K)
                codes.append({key_of(agent): voice.short().cpu()})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((DuplexArguments, DataArguments, TrainArguments), allow_abbrev=False)
    arguments, data, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    checkpoint, sources = None, [path for path in (data.data_path, data.eval_data_path) if path]
    if list(Path(args.output_dir).glob("checkpoint-[0-9]*")):
        checkpoint = resume.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model = load_model(DuplexConfig(**vars(arguments)), data, args, DuplexModel)
    datasets = [model.make_conversations(open_conversations(source)) for source in sources]
    dataset, records = datasets[0], datasets[0].records
    settings = json.loads(json.dumps({"model": model.config.to_dict(), "records": records.fingerprint()}))
    if checkpoint and json.loads(Path(checkpoint, "train_settings.json").read_text()) != settings:
        raise InputError(f"{checkpoint}: is of another model or data; choose another --output_dir")
    if data.encoder_cache:
        for part in datasets:
            encode_once(model, part.records, data.encoder_cache, args.process_index, args.world_size)
        gather_object([None])  # waits for the other processes
        caches = open_caches(model, data.encoder_cache)
        for part in datasets:
            part.hear, part.speak = caches.hear, caches.speak
        model.encoder = CachedEncoder(caches.frames, torch.float32)  # which gives back what it gets
    model.config.training = {"trained on": f"{data.data_path}: {len(records):,} conversations"}
    options = {"settings": settings, "eval_dataset": datasets[1] if datasets[1:] else None}
    trainer = DuplexTrainer(model, args, partial(collate, pad=model.tokens.pad), dataset, **options)
    if trainer.is_world_process_zero():
        print(describe(model))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero() and dataset.problems:
        print(*sorted(set(dataset.problems))[:20], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    run(main)
