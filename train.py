"""Train the projector: HF Trainer on one process, under DDP or DeepSpeed, with every flag of TrainingArguments.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --whisper_model_name_or_path tiny --data_path train.jsonl --output_dir run --bf16 True \
        --deepspeed ds_config_zero3.json
"""

import json
import sys
import warnings
from dataclasses import dataclass, field, fields
from functools import partialmethod
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from dataset import LengthSampler, collate
from evaluate import evaluate
from manifest import InputError, Manifest, run
from model import SpeechLLM, SpeechLLMConfig
from resume import find_checkpoint

OLD_FLAGS = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}  # below 1: a share
DECISIVE = """seed data_seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim
    lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps per_device_train_batch_size
    gradient_accumulation_steps train_sampling_strategy label_smoothing_factor bf16 fp16 world_size""".split()


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "training manifest: JSON lines with 'wav' and 'txt'"})
    eval_data_path: str | None = field(default=None, metadata={"help": "manifest for --eval_strategy: loss and WER"})
    model_max_length: int = field(default=512, metadata={"help": "most LLM positions of prompt, speech and transcript"})
    max_seconds: float = field(default=30.0, metadata={"help": "longest utterance, seconds; 0 = any"})
    on_bad_audio: Literal["error", "skip"] = field(
        default="error", metadata={"help": "utterances that cannot be read or do not fit: stop, or leave out and count"}
    )
    projector_model_path: str | None = field(
        default=None, metadata={"help": "model.safetensors to start from instead of random weights"}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this model needs."""

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length = clips of similar length in a batch; random"}
    )
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool = False


class SpeechTrainer(Trainer):
    """Trainer that saves the trained weights alone, evaluates loss and WER, and counts the utterances it skipped."""

    def __init__(self, *args, settings: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings, self.skipped = settings, {}
        self.model.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None

    def _get_train_sampler(self, dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        dataset, args = self.train_dataset, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        # the same order for any number of processes and accumulation steps with the same total batch
        total = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthSampler(dataset.durations[dataset.indices], total, seed, lambda: int(self.state.epoch or 0))

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.skipped.update(dict.fromkeys(filter(None, inputs.pop("bad"))))
        del inputs["index"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Frozen weights are missing from a checkpoint by design; nothing else may be."""
        missing = {name for name, _ in self.model.trained()} & set(load_result.missing_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir, state = output_dir or self.args.output_dir, None
        if self.is_deepspeed_enabled:  # fp32 master weights, which all processes hold together
            from deepspeed.utils import safe_get_full_fp32_param

            state = {name: safe_get_full_fp32_param(p).cpu().view(p.ds_shape) for name, p in self.model.trained()}
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state)
            Path(output_dir, "train_settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        args = self.args
        where = args.per_device_eval_batch_size, args.dataloader_num_workers, args.process_index, args.world_size
        metrics, texts, skipped = evaluate(self.model, self.eval_dataset, *where)
        self.skipped.update(dict.fromkeys(skipped))
        if self.is_world_process_zero():
            for spoken, written in texts[:3]:
                print(f"  reference  {spoken}\n  hypothesis {written}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def prepare_deepspeed() -> None:
    """Checkpoints without the frozen weights, which DeepSpeed would write and want back; and a start on CPUs too."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # several a step, not ours
    engine, load = deepspeed.DeepSpeedEngine, deepspeed.DeepSpeedEngine.load_checkpoint
    engine.save_checkpoint = partialmethod(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = lambda self, *args, **kw: load(self, *args, **{**kw, "load_module_strict": False})
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def parse(argv: list[str]) -> tuple[SpeechLLMConfig, DataArguments, TrainArguments]:
    """The three groups of arguments; names that transformers has dropped are translated."""
    argv = [OLD_FLAGS.get(flag, flag) + equals + value for flag, equals, value in (arg.partition("=") for arg in argv)]
    groups, about = (SpeechLLMConfig, DataArguments, TrainArguments), __doc__.splitlines()[0]
    parser = HfArgumentParser(groups, description=about, allow_abbrev=False)
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return groups


def main() -> None:
    config, data, args = parse(sys.argv[1:])
    if args.fsdp:
        raise InputError("--fsdp: the projector would be saved in shards; use --deepspeed ds_config_zero3.json")
    set_seed(args.seed)
    manifest = Manifest(data.data_path)
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    settings |= {"manifest": manifest.sha256, "deepspeed": bool(args.deepspeed)}
    settings |= {
        name: getattr(data, name)
        for name in ("model_max_length", "max_seconds", "on_bad_audio", "projector_model_path")
    }
    settings |= {name: getattr(args, name) for name in DECISIVE}
    settings = json.loads(json.dumps(settings))
    checkpoint = find_checkpoint(args.output_dir, settings)

    if args.eval_strategy != "no" and not data.eval_data_path:
        raise InputError(f"--eval_strategy {args.eval_strategy.value} wants a manifest; give --eval_data_path")
    if args.deepspeed:
        prepare_deepspeed()
    model = SpeechLLM(config)
    if data.projector_model_path:
        model.load_trained(data.projector_model_path)
    if args.gradient_checkpointing:  # Trainer would look for this on our model
        getattr(model.llm, "activation_checkpointing_enable", model.llm.gradient_checkpointing_enable)()
        args.gradient_checkpointing = args.activation_checkpointing = False
    limits = {"max_length": min(data.model_max_length, model.max_length), "max_seconds": data.max_seconds}
    dataset = model.make_dataset(manifest, on_bad=data.on_bad_audio, **limits)
    eval_dataset = None
    if data.eval_data_path:
        eval_dataset = model.make_dataset(Manifest(data.eval_data_path), on_bad=data.on_bad_audio, **limits)
    trainer = SpeechTrainer(model, args, collate, train_dataset=dataset, eval_dataset=eval_dataset, settings=settings)
    if checkpoint and trainer.is_world_process_zero():
        print(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)

    for made in filter(None, (dataset, eval_dataset)):
        trainer.skipped.update(dict.fromkeys(made.bad.values()))
    skipped = {reason: None for part in gather_object([list(trainer.skipped)]) for reason in part}
    if sum(reason.startswith(f"{manifest.path}:") for reason in skipped) == len(manifest):
        raise InputError(f"every utterance is bad; the first: {min(skipped)}")
    trainer.save_model()
    if skipped and trainer.is_world_process_zero():
        print(f"skipped {len(skipped)} bad utterances:", *skipped, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    run(main)
