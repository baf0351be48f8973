"""Train what is not frozen, by default the projector: HF Trainer on one process, under DDP or DeepSpeed.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --bf16 True \
        --deepspeed ds_config_zero3.json

The flags can stand in a YAML file, and the command line wins: python train.py recipes/whisper_qwen.yaml --bf16 False
"""

import gc
import json
import math
import os
import sys
import warnings
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, ProgressCallback, Trainer, TrainingArguments, set_seed

from dataset import IGNORE, SpeechDataset, collate, open_records
from errors import InputError, nearest, run
from manifest import DecodingOptions, Records, transcript_of
from model import AUDIO_INPUTS, ModelArguments, SpeechLLM, SpeechLLMConfig, load_config, option

# Arguments

OTHER_NAMES = {"whisper_model_name_or_path": "encoder_name_or_path", "dtype": "frozen_dtype"}
OTHER_NAMES |= {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}  # below 1: a share of all steps
SECTIONS = ("data", "model", "training")  # of a YAML file


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "training manifest: JSON lines with 'wav' and 'txt'; or KIND:PLACE"})
    eval_data_path: str | None = option(None, "manifest for --eval_strategy: loss and WER")
    model_max_length: int = option(512, "most LLM positions of prompt, speech and transcript")
    max_seconds: float = option(30.0, "longest utterance, seconds; 0 = any")
    on_bad_audio: Literal["error", "skip"] = option(
        "error", "what cannot be read or does not fit: stop, or skip, counted"
    )
    augment: list[str] = option([], "names in augment.py, applied in this order")
    projector_model_path: str | None = option(None, "model.safetensors to start from instead of random weights")
    save_best_by: str | None = option(None, "wer, cer, loss: keep the --save_total_limit best checkpoints and the last")


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this model needs."""

    train_sampling_strategy: str = option("group_by_length", "group_by_length = similar lengths in a batch; random")
    remove_unused_columns: bool = False  # utterances have none
    ddp_find_unused_parameters: bool = False

    def __post_init__(self):
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = False  # transformers thinks so of losses alone
        self.remove_unused_columns = False  # also where a YAML file says otherwise
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # or --bf16 is refused without a GPU
        super().__post_init__()


def parse(argv: list[str]) -> tuple[SpeechLLMConfig, DataArguments, TrainArguments]:
    """The three groups of arguments. Raises InputError for those that contradict each other."""
    about = {"usage": "train.py [CONFIG.yaml] [--flag value ...] [--help]", "allow_abbrev": False}
    about["epilog"] = f"Other names: {', '.join(f'--{other} (--{name})' for other, name in OTHER_NAMES.items())}"
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments), **about)
    for action in list(parser._actions):
        action.nargs = "*" if action.nargs == "+" else action.nargs  # --freeze_params without any: nothing is frozen
        for other in [other for other, name in OTHER_NAMES.items() if name == action.dest]:
            same = {"type": action.type, "nargs": action.nargs, "const": action.const, "choices": action.choices}
            names = f"--{other}", f"--{other.replace('_', '-')}"
            parser.add_argument(*names, dest=action.dest, default=SUPPRESS, help=SUPPRESS, **same)
    flags = sorted(name for action in parser._actions for name in action.option_strings)
    if argv and argv[0] == "--config":
        argv = argv[1:]  # train.py --config FILE.yaml, as other trainers have it
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*flags_of_file(argv[0], flags), *argv[1:]]  # of two values the later wins
    try:
        model, data, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, OSError, ImportError, ArgumentTypeError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}{nearest(unknown[0].split('=')[0], flags)}")
    check(data, args)
    return SpeechLLMConfig(**vars(model)), data, args


def flags_of_file(path: str, flags: list[str]) -> list[str]:
    """The command line that a YAML file stands for. Its keys may stand in sections: data, model, training."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    sections = [content]  # the keys that stand in none
    if isinstance(content, dict):
        sections += [content.pop(name) or {} for name in SECTIONS if name in content]
    if not all(isinstance(section, dict) for section in sections):
        raise InputError(f"{path}: wanted keys and values: the names of train.py's flags, perhaps under {SECTIONS}")
    argv = []  # the file, as flags
    for key, value in [pair for section in sections for pair in section.items()]:
        if f"--{key}" not in flags:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, [flag[2:] for flag in flags])}")
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def check(data: DataArguments, args: TrainArguments) -> None:
    """Raise InputError for arguments that contradict each other."""
    if args.fsdp:
        raise InputError("--fsdp: the projector would be saved in shards; use --deepspeed ds_config_zero3.json")
    if args.deepspeed and "WORLD_SIZE" not in os.environ:
        cure = "start it with torchrun --standalone --nproc_per_node=1 train.py ..., or leave --deepspeed out"
        raise InputError(f"--deepspeed {args.deepspeed}: this is one process on its own; {cure}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: wanted 1 or more")
    if args.n_gpu > 1:
        cure = f"torchrun --standalone --nproc_per_node={args.n_gpu} train.py ..., or set CUDA_VISIBLE_DEVICES=0"
        raise InputError(f"one process sees {args.n_gpu} GPUs; start it with {cure}")
    if Path(args.output_dir).is_file():
        raise InputError(f"--output_dir {args.output_dir}: a file is there; wanted a folder, or a name for a new one")
    names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    if any((getattr(args, name, None) or {}).get("use_reentrant") for name in names):
        raise InputError("use_reentrant true: no gradient would reach LoRA on the encoder; wanted false, the default")
    if args.eval_strategy != "no" and not data.eval_data_path:
        raise InputError(f"--eval_strategy {args.eval_strategy.value} wants a manifest; give --eval_data_path")
    if data.save_best_by:
        import keep_best  # an option

        keep_best.check(data.save_best_by, args)


# Training


class LengthSampler(torch.utils.data.Sampler):
    """(epoch, position) in a random order in which each run of `batch_size` has similar lengths.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again; without
    `by_length` they are only shuffled. The last batch is filled up with positions that come twice, or dropped: any
    number of processes sees the same batches. The order depends on seed and epoch alone, also in a resumed run.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, seed: int, epoch=lambda: 0, by_length=True, drop_last=False
    ):
        self.lengths, self.batch_size, self.by_length = lengths, batch_size, by_length  # seconds; clips of a step
        self.seed, self.epoch, count = seed, epoch, len(lengths)
        self.num_batches = count // batch_size if drop_last else -(-count // batch_size)
        if drop_last and not self.num_batches:
            raise InputError(f"--dataloader_drop_last: {count} utterances do not fill one batch of {batch_size}")
        if 0 < count < batch_size:
            times = f"{batch_size / count:.1f} times an epoch"
            warnings.warn(f"{count} utterances fill a batch of {batch_size}: each comes {times}", stacklevel=2)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, size = self.epoch(), self.batch_size
        random = np.random.default_rng([self.seed, epoch])  # another order every epoch
        order = np.resize(random.permutation(len(self.lengths)), len(self))  # wraps around to fill the last batch
        if self.by_length:
            groups = np.split(order, range(50 * size, len(order), 50 * size))  # of 50 batches
            order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
            order = random.permutation(order.reshape(-1, size)).ravel()  # whole batches change places
        return ((epoch, position) for position in order.tolist())


class SpeechTrainer(Trainer):
    """Trainer that saves the trained weights alone, evaluates loss and WER, and counts the utterances it skipped.

    Names with an underscore are private to transformers: requirements.txt pins its minor version for them.
    """

    def __init__(self, *args, settings: dict, eval_metric: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings, self.eval_metric = settings, eval_metric  # settings: for train_settings.json
        self.step_losses: list[torch.Tensor] = []  # of the micro-batches of this step, for the progress bar
        self.skipped: set[str] = set()  # why utterances were skipped
        self.epoch = 0  # which decides the order of the clips, and their augmentation
        self.has_learnt = False  # from one good utterance at least
        self.model.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None  # forward smooths

    def _get_train_sampler(self, dataset=None):
        args, dataset = self.args, self.train_dataset
        if args.train_sampling_strategy not in ("group_by_length", "random"):
            return super()._get_train_sampler(dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        # The order is the same for any number of processes and accumulation steps with the same total batch.
        total = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # clips a step
        durations, epoch = dataset.durations[dataset.indices], lambda: self.epoch
        by_length = args.train_sampling_strategy == "group_by_length"
        return LengthSampler(durations, total, seed, epoch, by_length, args.dataloader_drop_last)

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        """Nothing if a run that has ended is started again: Trainer would take one step before it counts them."""
        self.epoch = epoch
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.skipped |= set(filter(None, inputs["bad"]))
        self.has_learnt |= None in inputs["bad"]  # a clip of the batch was good
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.step_losses += [] if self.args.disable_tqdm else [loss]
        return loss

    def on_all_processes(self, values: set) -> set:
        """The values of all processes together."""
        return set().union(*gather_object([values]))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next, and says that all is there

    def _issue_warnings_after_load(self, load_result) -> None:
        """Frozen weights are missing from a checkpoint by design; nothing else may be."""
        missing = self.model.parameters_to_save().keys() & set(load_result.missing_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = output_dir or self.args.output_dir
        self.model.config.training["steps"] = self.state.global_step  # config.json tells how far it was trained
        skipped, state = self.on_all_processes(self.skipped), None
        if self.is_deepspeed_enabled:
            import zero3  # an option

            state = zero3.gather(self.model.parameters_to_save())
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state)  # what was trained, and config.json
            Path(output_dir, "train_settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
            Path(output_dir, "skipped.json").write_text(json.dumps(sorted(skipped)) + "\n")
            if self.args.push_to_hub and not _internal_call:
                self.model.push_to_hub(self.hub_model_id, state_dict=state, token=self.args.hub_token)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics, skipped = evaluate(self.model, eval_dataset or self.eval_dataset, self.args, self.eval_metric)
        self.skipped |= skipped  # told at the end of the run
        self.model.config.training |= {f"evaluation {name}": round(value, 4) for name, value in metrics.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)  # into trainer_state.json, and where --report_to says
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class ShowLoss(ProgressCallback):
    """Trainer's progress bar, with the time to the end, and the loss of every step on this process."""

    def __init__(self, trainer: SpeechTrainer):
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        loss = sum(self.trainer.step_losses)  # of the micro-batches
        self.trainer.step_losses.clear()  # for the next step
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{float(loss):.3f}")


# Evaluation


def collate_with_prompts(examples: list[dict]) -> tuple[dict, dict]:
    """The batch with transcripts, for the loss, and the one without, for decoding."""
    return collate(examples), collate(examples, with_targets=False)


@torch.no_grad()
def evaluate(
    model: SpeechLLM, dataset: SpeechDataset, args: TrainingArguments, metric: str = "auto"
) -> tuple[dict[str, float], set[str]]:
    """{"loss": per trained token, "wer" or another metric: greedy}, and why utterances were skipped.

    Prints the figures and three transcripts. Of W processes each takes every W-th utterance; all get the same result.
    Shares are equal, as ZeRO-3 wants, so the last may wrap around to the first utterances; these count once.
    """
    from score import score

    share = -(-len(dataset) // args.world_size)  # utterances a process
    positions = [(args.process_index + i * args.world_size) % len(dataset) for i in range(share)]
    positions.sort(key=lambda position: -dataset.durations[dataset.indices[position]])  # similar lengths in a batch
    options = {"num_workers": args.dataloader_num_workers, "collate_fn": collate_with_prompts}
    losses, tokens, texts, bad = {}, {}, {}, {}  # of each utterance, by index
    with model.in_eval_mode():
        for batch, prompts in DataLoader(dataset, args.per_device_eval_batch_size, sampler=positions, **options):
            tensors = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            audio = {name: tensors.pop(name) for name in AUDIO_INPUTS if name in tensors}
            speech_embeds = model.embed_speech(**audio)  # once, for loss and decoding
            logits, labels = model(**tensors, speech_embeds=speech_embeds).logits, tensors["labels"]  # (B, K, V)
            sums = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)  # (B,)
            losses |= dict(zip(batch["index"], sums.tolist(), strict=True))
            tokens |= dict(zip(batch["index"], (labels != IGNORE).sum(1).tolist(), strict=True))
            bad |= {index: reason for index, reason in zip(batch["index"], batch["bad"], strict=True) if reason}
            for hypothesis in model.decode_batch(prompts, dataset.records, DecodingOptions(num_beams=1), speech_embeds):
                texts[hypothesis.index] = hypothesis.text
    for part in gather_object([(losses, tokens, texts, bad)]):
        for values, others in zip((losses, tokens, texts, bad), part, strict=True):
            values.update(others)  # an utterance that came twice counts once
    good = sorted(losses.keys() - bad.keys())  # indices, in the order of the records
    if not good:
        raise InputError(f"every evaluation utterance is bad; the first: {min(bad.values())}")
    references, hypotheses = [transcript_of(dataset.records[index]) for index in good], [texts[index] for index in good]
    result = score(references, hypotheses, metric=metric)  # over the whole set, not a mean of batches
    loss = sum(losses[index] for index in good) / sum(tokens[index] for index in good)
    if args.process_index == 0:
        print(f"evaluation: loss {loss:.4f}, {result.metric.upper()} {result.all.rate:.2%}; the first lines are:")
        for reference, hypothesis in list(zip(references, hypotheses, strict=True))[:3]:
            print(f"  reference  {reference}\n  hypothesis {hypothesis}")
    return {"loss": loss, result.metric: result.all.rate}, set(bad.values())


# Going on after a kill

# Settings that decide the weights, beside those of the model. A run that goes on must not change them.
DECISIVE_DATA = "model_max_length max_seconds on_bad_audio augment projector_model_path".split()
DECISIVE = """seed data_seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim
    optim_args lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps per_device_train_batch_size
    gradient_accumulation_steps world_size train_sampling_strategy label_smoothing_factor bf16 fp16
    dataloader_drop_last neftune_noise_alpha average_tokens_across_devices""".split()


def settings_of(config: SpeechLLMConfig, data: DataArguments, args: TrainArguments, records: Records) -> dict:
    """What decides the course of a training run, as train_settings.json holds it."""
    names = [f.name for f in fields(ModelArguments)]
    groups = ((config, names), (data, DECISIVE_DATA), (args, DECISIVE))  # whose attributes, and which
    settings = {name: getattr(group, name) for group, group_names in groups for name in group_names}
    settings |= {"deepspeed": bool(args.deepspeed), "num_records": len(records), "records": records.fingerprint()}
    return json.loads(json.dumps(settings))  # as they come back from the file


def find_checkpoint(output_dir: str, chosen: str | None = None) -> str | None:
    """The checkpoint that a training run goes on from: the last complete one in its folder, else the one `chosen`.

    trainer_state.json is written last: a folder without it was torn by a kill. InputError if the checkpoint holds
    weights alone, or if going on from the chosen one would overwrite later ones.
    """
    complete = [path for path in Path(output_dir).glob("checkpoint-[0-9]*") if step_of(path) is not None]
    if chosen and step_of(chosen) is None:
        raise InputError(f"--resume_from_checkpoint {chosen}: no complete checkpoint; leave it out to take the last")
    if not complete and not chosen:
        return None
    folder = max(complete, key=step_of) if complete else Path(chosen)  # the last, if any
    if chosen:
        is_inside = Path(chosen).resolve().parent == Path(output_dir).resolve()  # of the folder of this run
        steps_ahead = step_of(folder) - step_of(chosen)
        if steps_ahead < 0 or (steps_ahead and is_inside):
            raise InputError(f"--resume_from_checkpoint {chosen}: {folder} is there too; choose another --output_dir")
    if not (list(folder.glob("rng_state*")) and [*folder.glob("optimizer.pt"), *folder.glob("global_step*")]):
        cure = f"start from them with --projector_model_path {folder}/model.safetensors and another --output_dir"
        raise InputError(f"{folder}: no run can go on from weights alone, as --save_only_model keeps them; {cure}")
    return str(folder)


def step_of(checkpoint: str | Path) -> int | None:
    """The step after which a checkpoint was saved; None if it is not complete."""
    try:
        return json.loads(Path(checkpoint, "trainer_state.json").read_bytes())["global_step"]
    except (OSError, ValueError):  # no such file, or torn
        return None


def compare_settings(checkpoint: str, settings: dict, records: Records) -> list[str]:
    """What a run does otherwise than the checkpoint that it goes on from, to be told. Raises InputError.

    Compared is what both sides know. A longer schedule, data appended, and another number of processes are allowed.
    """
    path = Path(checkpoint, "train_settings.json")
    before = json.loads(path.read_text()) if path.is_file() else {}  # the settings of the checkpoint
    changed = [name for name in settings if name in before and settings[name] != before[name]]
    allowed = {n for n in ("num_train_epochs", "max_steps") if n in changed and settings[n] > before[n] > 0}
    if "records" in changed and records.fingerprint(before["num_records"]) == before["records"]:
        allowed |= {"records", "num_records"}  # lines were appended
    if not settings["deepspeed"]:  # which cannot deal its optimiser's states out anew
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        is_same_batch = math.prod(settings[n] for n in sizes) == math.prod(before.get(n, 0) for n in sizes)
        allowed |= set(sizes) if is_same_batch else {"world_size"}
    if contradictions := [name for name in changed if name not in allowed]:
        changes = ", ".join(f"{name} was {before[name]!r} and is {settings[name]!r}" for name in contradictions)
        cure = "restore that, or choose another --output_dir"
        raise InputError(f"{checkpoint}: this run contradicts it ({changes}); {cure}")
    unknown = sorted(before.keys() ^ settings.keys())  # fields that one of the two does not have
    differences = [f"{name} was {before[name]}, is {settings[name]}" for name in changed if name != "records"]
    return differences + [f"not compared: {', '.join(unknown)}"] * bool(unknown)


def describe(model: SpeechLLM) -> str:
    """A table of the parts: parameters, trained ones, their share."""
    rows = ["| module | parameters | trained | share |", "|---|---|---|---|"]
    for name, part in [*model.named_children(), ("all", model)]:
        total = sum(num_weights(p) for p in part.parameters())  # tied weights once
        trained = sum(num_weights(p) for p in part.parameters() if p.requires_grad)
        rows.append(f"| {name} | {total:,} | {trained:,} | {trained / max(total, 1):.2%} |")
    return "\n".join(rows)


def num_weights(p: torch.nn.Parameter) -> int:
    """Number of weights; ZeRO-3 keeps a share of them in `p`, bitsandbytes packs them."""
    if hasattr(p, "ds_numel"):
        return p.ds_numel
    return p.quant_state.shape.numel() if hasattr(p, "quant_state") and p.quant_state else p.numel()


def main(argv: list[str] | None = None) -> None:
    config, data, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)  # the new weights of the projector
    records = open_records(data.data_path)  # wrong input is told before the model is loaded
    settings = settings_of(config, data, args, records)
    checkpoint, differences = find_checkpoint(args.output_dir, args.resume_from_checkpoint), []
    if checkpoint:
        differences = compare_settings(checkpoint, settings, records)
        before = load_config(Path(checkpoint))  # knows the commits of the parts, and an evaluation
        for name in ("encoder_revision", "llm_revision", "training"):
            setattr(config, name, getattr(before, name))
    if args.deepspeed:
        import zero3  # an option

        zero3.prepare()  # before any weight is loaded
    model = SpeechLLM.from_config(config, device=None if args.deepspeed else args.device)  # DeepSpeed moves it itself
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing to train: every parameter matches --freeze_params")
    if any(p.requires_grad and ".lora_" not in name for name, p in model.encoder.named_parameters()):
        args.ddp_find_unused_parameters = True  # with --encoder_layer the layers' final norm gets no gradient
    if data.projector_model_path:
        model.load_trained(data.projector_model_path, only="projector")  # LoRA may start new beside it

    limits = {"max_length": min(data.model_max_length, model.max_length), "max_seconds": data.max_seconds}
    augment = None
    if data.augment:
        from augment import Chain  # an option

        augment = Chain(data.augment)
    dataset = model.make_dataset(records, on_bad=data.on_bad_audio, augment=augment, seed=args.seed, **limits)
    eval_dataset = None
    if data.eval_data_path:
        eval_dataset = model.make_dataset(open_records(data.eval_data_path), on_bad=data.on_bad_audio, **limits)
    hours = round(float(dataset.durations[dataset.indices].sum()) / 3600, 2)
    facts = {"data": data.data_path, "utterances": len(dataset), "hours": hours}  # for config.json
    model.config.training = (model.config.training or {}) | facts

    callbacks = []
    if data.save_best_by:
        from keep_best import KeepBest  # an option

        callbacks.append(KeepBest(data.save_best_by, args))
    metric = data.save_best_by or args.metric_for_best_model or "loss"  # what an evaluation counts
    metric = "auto" if metric.removeprefix("eval_") == "loss" else metric.removeprefix("eval_")
    rest = {"callbacks": callbacks, "settings": settings, "eval_metric": metric}
    trainer = SpeechTrainer(model, args, collate, dataset, eval_dataset, **rest)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ShowLoss(trainer))  # in place of the bar without a loss
    if checkpoint:
        trainer.skipped = set(json.loads(Path(checkpoint, "skipped.json").read_text()))
    if trainer.is_world_process_zero():
        print(describe(model))
        if checkpoint:
            print(f"going on from {checkpoint}", *differences, sep="\n  ")
    trainer.train(resume_from_checkpoint=checkpoint)  # None = from the start

    if eval_dataset and args.eval_strategy == "no":
        trainer.save_model(_internal_call=True)  # first, because the evaluation may raise
        trainer.evaluate()
    if not checkpoint and True not in trainer.on_all_processes({trainer.has_learnt}):
        raise InputError(f"every utterance is bad; the first: {min(trainer.on_all_processes(trainer.skipped))}")
    trainer.skipped |= {reason for part in (dataset, eval_dataset) if part for reason in part.bad.values()}
    trainer.save_model()  # into output_dir itself
    skipped = sorted(trainer.on_all_processes(trainer.skipped))
    if skipped and trainer.is_world_process_zero():
        print(f"skipped {len(skipped)} bad utterances:", *skipped, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    gc.freeze()  # what the imports have made stays; walking it again would cost a second at the end of --help
    run(main, cure="; mend it, or pass --on_bad_audio skip")
