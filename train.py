"""Train what is not frozen, by default the projector: HF Trainer on one process, or on several.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --bf16 True \
        --deepspeed ds_config_zero3.json

The flags can stand in a YAML file, and the command line wins: python train.py recipes/whisper_qwen.yaml --bf16 False
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from dataset import SpeechDataset, collate, open_records
from errors import InputError, as_input_error, nearest, run
from manifest import Records, SourceOptions, source_options
from model import ModelArguments, SpeechLLM, SpeechLLMConfig, load_config, option

# Arguments

OTHER_NAMES = {"whisper_model_name_or_path": "encoder_name_or_path", "dtype": "frozen_dtype"}
OTHER_NAMES |= {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}  # below 1: a share of all steps
LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
LEAST |= {"learning_rate": 0, "dataloader_num_workers": 0, "seed": 0, "log_predictions": 0, "log_predictions_steps": 1}
LEAST |= {"overfit": 0, "check": 0, "max_batch_seconds": 0, "max_batch_tokens": 0}  # what nobody else checks


@dataclass(kw_only=True)
class DataArguments(SourceOptions):
    data_path: list[str] = field(metadata={"help": "JSON lines with wav and txt, or KIND:PLACE; several: PLACE:WEIGHT"})
    streaming: bool = option(False, "read hf:PLACE or a manifest as it comes, without looking at all of it first")
    no_speech_share: float = option(0.0, "share of an epoch that is silence and noise without text; 0 = none, below 1")
    min_seconds: float = option(0.0, "leave shorter utterances out of the training data; 0 = off")
    min_tokens: int = option(0, "leave shorter transcripts out of it, in tokens of the LLM; 0 = off")
    max_tokens: int = option(0, "leave longer transcripts out of it, in tokens of the LLM; 0 = off")
    max_characters_per_second: float = option(0.0, "leave out transcripts with more; spaces do not count; 0 = off")
    train_on_turns: Literal["last", "all"] = option("last", "of a conversation: the last answer, or all, are trained")
    eval_data_path: list[str] | None = option(None, "one manifest or several for --eval_strategy: loss and WER")
    model_max_length: int = option(512, "most LLM positions of prompt, speech and transcript")
    max_seconds: float = option(30.0, "longest utterance, seconds; 0 = any")
    on_bad_audio: Literal["error", "skip"] = option("error", "what cannot be read or does not fit: stop, or skip it")
    encoder_cache: str | None = option(None, "a folder that keeps the encoder's frames, computed once; None = no cache")
    augment: list[str] = option([], "gain, speed, noise:FOLDER, room, telephone, mask: in this order")
    projector_model_path: str | None = option(None, "model.safetensors to start from instead of random weights")
    save_best_by: str | None = option(None, "wer, cer, loss: keep the --save_total_limit best checkpoints and the last")
    select_on: list[str] | None = option(None, "to evaluate and choose by; --eval_data_path then waits for the end")
    log_predictions: int = option(0, "clips to show with all that the LLM reads and writes, in training and evaluation")
    log_predictions_steps: int = option(50, "in training show them every so many steps")
    max_batch_seconds: float = option(0, "batches by a budget: clips x the longest, seconds; 0 = by a number of clips")
    max_batch_tokens: int = option(0, "the same in LLM positions, of prompt, speech and transcript; 0 = any")
    auto_batch: bool = option(False, "try which --max_batch_tokens fits into memory, and train with it")
    overfit: int = option(0, "train on this many clips until no word of them is wrong, or say why not")
    check: int = field(default=0, metadata={"help": "show so many batches, and do not train", "nargs": "?", "const": 1})


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this model needs."""

    train_sampling_strategy: str = option("group_by_length", "group_by_length = similar lengths in a batch; random")
    report_to: str = option("auto", "tensorboard, wandb ... or none; auto = TensorBoard where it is installed")
    ddp_find_unused_parameters: bool = False
    tensor_parallel: bool = option(False, "split each layer of the frozen LLM over all processes")

    def __post_init__(self):
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = False  # transformers thinks so of losses alone
        if self.report_to == "auto":
            self.report_to = "tensorboard" if find_spec("tensorboard") else "none"
        engines = ("deepspeed", "fsdp", "tensor_parallel")  # that share the weights out over the processes
        self.engine = next((name for name in engines if getattr(self, name)), None)
        self.remove_unused_columns = False  # utterances have none
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # or --bf16 is refused without a GPU
        super().__post_init__()


def parse(argv: list[str]) -> tuple[SpeechLLMConfig, DataArguments, TrainArguments]:
    """The three groups of arguments. Raises InputError for those that contradict each other."""
    about = {"usage": "train.py [CONFIG.yaml] [--flag value ...] [--help]", "allow_abbrev": False}
    about["epilog"] = f"Other names: {', '.join(f'--{other} (--{name})' for other, name in OTHER_NAMES.items())}"
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments), **about)
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # --freeze_params without any: nothing is frozen
    actions = parser._option_string_actions  # flag -> what argparse does with it
    for other, name in OTHER_NAMES.items():
        actions[f"--{other}"] = actions[f"--{other.replace('_', '-')}"] = actions[f"--{name}"]
    flags = sorted(actions)
    if argv and (argv[0] == "--config" or argv[0].endswith((".yaml", ".yml"))):
        import config_file  # an option

        argv = config_file.with_flags_of_file(argv, flags)
    try:
        model, data, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, OSError, ImportError, ArgumentTypeError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}{nearest(unknown[0].split('=')[0], flags)}")
    check(data, args)
    return SpeechLLMConfig(**vars(model)), data, args


def check(data: DataArguments, args: TrainArguments) -> None:
    """Raise InputError for arguments that contradict each other."""
    if args.engine:
        import engines  # an option

        engines.check(args)
    for name, value in (vars(args) | vars(data)).items():
        if name in LEAST and not value >= LEAST[name]:  # nor NaN
            raise InputError(f"--{name} {value}: wanted {LEAST[name]} or more")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"--num_train_epochs {args.num_train_epochs}: wanted more than 0, or --max_steps")
    if args.n_gpu > 1:
        cure = f"torchrun --standalone --nproc_per_node={args.n_gpu} train.py ..., or set CUDA_VISIBLE_DEVICES=0"
        raise InputError(f"one process sees {args.n_gpu} GPUs; start it with {cure}")
    if any(path.is_file() for path in (Path(args.output_dir), *Path(args.output_dir).parents)):
        raise InputError(f"--output_dir {args.output_dir}: a file is there; wanted a folder, or a name for a new one")
    if args.eval_strategy != "no" and not (data.eval_data_path or data.select_on or data.overfit):
        raise InputError(f"--eval_strategy {args.eval_strategy.value} wants a manifest; give --eval_data_path")
    if data.select_on and args.eval_strategy == "no":
        raise InputError(f"--select_on {data.select_on[0]}: nothing is evaluated during training; give --eval_strategy")
    if data.save_best_by:
        import keep_best  # an option

        keep_best.check(data.save_best_by, args)


# Training


class LengthSampler(torch.utils.data.Sampler):
    """(epoch, position) in a random order in which each run of `batch_size` has similar lengths.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again. The last batch
    is filled up with positions that come twice, or dropped: any number of processes sees the same batches. The order
    depends on seed and epoch alone, also in a resumed run.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch=lambda: 0, drop_last=False):
        self.lengths, self.batch_size = lengths, batch_size  # seconds; clips of a step
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
        groups = np.split(order, range(50 * size, len(order), 50 * size))  # of 50 batches
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        order = random.permutation(order.reshape(-1, size)).ravel()  # whole batches change places
        return ((epoch, position) for position in order.tolist())


class SpeechTrainer(Trainer):
    """Trainer that saves the trained weights alone, evaluates loss and WER, and counts the utterances it skipped.

    Names with an underscore are private to transformers: requirements.txt pins its minor version for them.
    """

    def __init__(self, *args, settings: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings  # for train_settings.json
        self.step_loss = 0.0  # summed over the micro-batches of this step, for the progress bar
        self.predictions = self.batches = None  # options: PredictionLog, BudgetSampler
        self.skipped: set[str] = set()  # why utterances were skipped
        self.has_learnt = False  # from one good utterance at least
        self.got_sigterm = False
        self.epoch = 0  # which decides the order of the clips, and their augmentation
        self.model.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None  # forward smooths

    def _get_train_sampler(self, dataset=None):
        args, dataset = self.args, self.train_dataset
        if args.train_sampling_strategy not in ("group_by_length", "random"):
            return super()._get_train_sampler(dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        # The order is the same for any number of processes and accumulation steps with the same total batch.
        total = self.get_total_train_batch_size(args)  # clips a step
        lengths = dataset.seconds if args.train_sampling_strategy == "group_by_length" else np.zeros(len(dataset))
        return LengthSampler(lengths, total, seed, lambda: self.epoch, args.dataloader_drop_last)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.batches.loader(self.train_dataset, self.args) if self.batches else super().get_train_dataloader()

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        """Nothing if a run that has ended is started again: Trainer would take one step before it counts them."""
        self.epoch = epoch
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.skipped |= set(filter(None, inputs["bad"]))
        self.has_learnt |= None in inputs["bad"]  # a clip of the batch was good
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):  # before the optimiser takes a step with it
            clips = ", ".join(self.train_dataset.records[index]["where"] for index in inputs["index"])
            cure = "look at these clips; try a lower --learning_rate or --max_grad_norm"
            raise InputError(f"the loss of step {self.state.global_step + 1} is {loss.item()}, with {clips}; {cure}")
        self.step_loss += loss.item()
        if self.accelerator.sync_gradients:  # this was the last micro-batch of the step
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:  # ProgressCallback's, on the first process
                    callback.training_bar.set_postfix(loss=f"{self.step_loss:.3f}")
            self.step_loss = 0.0
            if self.accelerator.check_trigger():  # on all processes, whichever got the SIGTERM
                self.got_sigterm = self.control.should_save = self.control.should_training_stop = True
        return loss

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.model.config.training["steps"] = self.state.global_step  # config.json tells how far it was trained
        wanted = "room on the disk; earlier checkpoints are whole, and the same command goes on from the last"
        with as_input_error(self.args.output_dir, f"save step {self.state.global_step}", wanted):
            super()._save_checkpoint(*args, **kwargs)

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
        skipped, state = self.on_all_processes(self.skipped), None
        if self.args.engine:
            import engines  # an option

            state = engines.gather(self.args.engine, self.model)
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state)  # what was trained, and config.json
            Path(output_dir, "train_settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
            Path(output_dir, "skipped.json").write_text(json.dumps(sorted(skipped)) + "\n")
            if self.args.push_to_hub and not _internal_call:
                self.model.push_to_hub(self.hub_model_id, state_dict=state, token=self.args.hub_token)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        from evaluate import evaluate_and_note  # an option

        metrics = evaluate_and_note(self, eval_dataset or self.eval_dataset, metric_key_prefix)
        self.log(metrics)  # into trainer_state.json, and where --report_to says
        if metric_key_prefix == "eval":  # a test set chooses and stops nothing
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# What is written down: settings, parts, the experiment


def settings_of(config: SpeechLLMConfig, data: DataArguments, args: TrainArguments, records: Records) -> dict:
    """All settings of a run, as train_settings.json holds them; resume.py says which must not change."""
    settings = args.to_dict() | vars(data) | config.to_dict()
    settings |= {"world_size": 1 if args.tensor_parallel else args.world_size, "deepspeed": bool(args.deepspeed)}
    settings |= {"zero_stage": args.deepspeed_plugin.zero_stage if args.deepspeed else None}
    settings |= {"num_records": len(records), "records": records.fingerprint()}
    return json.loads(json.dumps(settings))  # as they come back from the file


def record_start(argv: list[str], event: str, model: SpeechLLM, args: TrainArguments, facts: dict) -> None:
    """Append to experiment.md what it takes to repeat this run: command, code, data, parts."""
    config, rows = model.config, {"command": f"`{shlex.join(['train.py', *argv])}`", "commit": "unknown"}
    if shutil.which("git"):  # the commit of this code; -dirty: with changes that are not committed
        git = "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"
        rows["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no git checkout"
    rows["versions"] = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))
    rows["device"] = f"{args.world_size} x {torch.cuda.get_device_name() if args.device.type == 'cuda' else 'CPU'}"
    rows["encoder"] = f"{config.encoder_name_or_path}, revision {config.encoder_revision}"
    rows["LLM"] = f"{config.llm_model_name_or_path}, revision {config.llm_revision}"
    append_record(args.output_dir, event, rows | facts, describe(model))


def append_record(folder: str, event: str, rows: dict, text: str = "") -> None:
    """Append a table to experiment.md: a killed run, and the one that goes on from it, both stay there."""
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    with open(Path(folder, "experiment.md"), "a", encoding="utf-8") as file:
        file.write(f"## {now}: {event}\n\n| | |\n|---|---|\n{table}\n{text}\n\n")


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


# From the flags to a trained model, in this order


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config, data, args = parse(argv)
    set_seed(args.seed)  # the new weights of the projector
    records, facts = open_data(config, data, args)  # wrong input is reported before the model is loaded
    settings = settings_of(config, data, args, records["trained on"])
    checkpoint, differences = None, []
    if args.resume_from_checkpoint or list(Path(args.output_dir).glob("checkpoint-[0-9]*")):
        import resume  # an option

        checkpoint, differences = resume.find(args, settings, records["trained on"], list(config.own_fields()))
    if checkpoint:
        before = load_config(Path(checkpoint))  # knows the commits of the parts, and an evaluation
        for name in ("encoder_revision", "llm_revision", "training"):
            setattr(config, name, getattr(before, name))
    if data.no_speech_share:  # behind the settings: a resumed run compares the records without these clips
        import no_speech  # an option

        records["trained on"] = no_speech.add(records["trained on"], data, args.seed)
    model = load_model(config, data, args)
    datasets = make_datasets(model, records, data, args)
    facts |= {use: f"{facts[use]}: {dataset}" for use, dataset in datasets.items()}
    if (data.save_best_by or args.load_best_model_at_end) and args.eval_strategy != "no":
        facts["chosen on"] = records["evaluated on"].fingerprint()  # an error rate on these is no test
    model.config.training = (model.config.training or {}) | facts
    trainer = make_trainer(model, data, args, settings, datasets)
    if data.check:
        import inspect_batch  # an option

        return inspect_batch.show(trainer, data.check)
    # SIGTERM, as a cluster sends it before it takes a machine away: all processes save after this step, and stop.
    signal.signal(signal.SIGTERM, lambda *_: trainer.accelerator.set_trigger())
    if checkpoint:
        trainer.skipped = set(json.loads(Path(checkpoint, "skipped.json").read_text()))
    if trainer.is_world_process_zero():
        print(describe(model))
        if checkpoint:
            print(f"going on from {checkpoint}", *differences, sep="\n  ")
        record_start(argv, f"goes on from {checkpoint}" if checkpoint else "starts", model, args, facts)
    trainer.train(resume_from_checkpoint=checkpoint)  # None = from the start
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no step comes any more that could heed it
    if trainer.got_sigterm:
        raise InputError(f"SIGTERM: step {trainer.state.global_step} is saved; the same command goes on from it")
    finish(trainer, datasets, checkpoint)


def open_data(config: SpeechLLMConfig, data: DataArguments, args: TrainArguments) -> tuple[dict[str, Records], dict]:
    """Records by their use; and facts about them, for config.json and experiment.md."""
    sources = {"trained on": data.data_path, "evaluated on": data.select_on or data.eval_data_path}
    sources["tested on"] = data.eval_data_path if data.select_on else None
    facts = {use: " ".join(source) for use, source in sources.items() if source}
    if data.streaming:
        import streams  # an option

        records = {"trained on": streams.open_training_data(data, args)}
    else:
        records = {"trained on": open_records(data.data_path, may_weigh=True, **source_options(data))}
    for use in list(facts)[1:]:  # of an evaluation
        records[use] = open_records(sources[use], **source_options(data, is_evaluation_of=sources[use]))
    if any(limits := [data.min_seconds, data.min_tokens, data.max_tokens, data.max_characters_per_second]):
        import filters  # an option

        records["trained on"], facts["left out"] = filters.keep(records["trained on"], limits, config)
    if data.overfit:
        import overfit  # an option

        records["trained on"] = records["evaluated on"] = overfit.prepare(records, data, args)
        facts["evaluated on"] = facts["trained on"]
    return records, facts


def load_model(config: SpeechLLMConfig, data: DataArguments, args: TrainArguments, model_class=SpeechLLM) -> SpeechLLM:
    """The model to train. Raises InputError if nothing of it would be."""
    place = {"device": args.device}
    if args.engine:
        import engines  # an option

        place = engines.prepare(args)  # before any weight is loaded
    model = model_class.from_config(config, **place)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing to train: every parameter matches --freeze_params")
    if any(p.requires_grad and ".lora_" not in name for name, p in model.encoder.named_parameters()):
        args.ddp_find_unused_parameters = True  # with --encoder_layer the layers' final norm gets no gradient
    if data.projector_model_path:
        model.load_trained(data.projector_model_path, only="projector")  # LoRA may start new beside it
    return model


def make_datasets(
    model: SpeechLLM, records: dict[str, Records], data: DataArguments, args: TrainArguments
) -> dict[str, SpeechDataset]:
    """Datasets by their use; what is trained on may be augmented, or have frames from a cache."""
    options = {"max_length": min(data.model_max_length, model.max_length), "max_seconds": data.max_seconds}
    options |= {"on_bad": data.on_bad_audio, "seed": args.seed, "train_on_turns": data.train_on_turns}
    datasets = {use: model.make_dataset(part, **options) for use, part in records.items()}
    if data.augment:
        from augment import Chain  # an option

        datasets["trained on"].augment = Chain(data.augment)
    if data.encoder_cache:
        import frame_cache  # an option

        frame_cache.use(model, datasets, data, args)
    return datasets


def make_trainer(
    model: SpeechLLM, data: DataArguments, args: TrainArguments, settings: dict, datasets: dict[str, SpeechDataset]
) -> SpeechTrainer:
    """The trainer, with what the flags add to it."""
    dataset, eval_dataset = datasets["trained on"], datasets.get("evaluated on")
    trainer = SpeechTrainer(model, args, collate, dataset, eval_dataset, settings=settings)
    if args.engine:
        import engines  # an option

        engines.adapt(trainer)
    if data.streaming:
        trainer.batches = dataset.records.batches_for(trainer, data)
    elif data.max_batch_seconds or data.max_batch_tokens or data.auto_batch:
        import batching  # an option

        trainer.batches = batching.sampler_for(trainer, data)
    if data.save_best_by:
        from keep_best import KeepBest  # an option

        trainer.add_callback(KeepBest(data.save_best_by, args))
    if data.overfit:
        from overfit import StopWhenLearnt  # an option

        trainer.add_callback(StopWhenLearnt())
    if data.log_predictions:
        from predictions import PredictionLog  # an option

        trainer.predictions = PredictionLog(trainer, data.log_predictions, data.log_predictions_steps)
        trainer.add_callback(trainer.predictions)
    if args.report_to:
        from meters import Meters  # an option

        meters = Meters(dataset.durations, args.world_size // trainer.get_tp_size())
        trainer.callback_handler.callbacks.insert(0, meters)  # before those that write its figures down
    return trainer


def finish(trainer: SpeechTrainer, datasets: dict[str, SpeechDataset], checkpoint: str | None) -> None:
    """Evaluate what waited for the end, save the weights, and report what was skipped."""
    model, args = trainer.model, trainer.args
    if best := args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        model.config.training = load_config(Path(best)).training  # of the weights that are there now
    else:
        model.config.training["steps"] = trainer.state.global_step
        model.config.training.pop("chosen on", None)  # the last weights were not chosen
    if "tested on" in datasets or ("evaluated on" in datasets and args.eval_strategy == "no"):
        trainer.save_model(_internal_call=True)  # first, because the evaluation may raise
        trainer.evaluate(datasets.get("tested on"), metric_key_prefix="test" if "tested on" in datasets else "eval")
    trainer.skipped |= {reason for part in datasets.values() for reason in part.bad.values()}
    skipped = sorted(trainer.on_all_processes(trainer.skipped))
    if not checkpoint and True not in trainer.on_all_processes({trainer.has_learnt}):
        raise InputError(f"every utterance is bad; the first: {skipped[0]}")
    trainer.save_model()  # into output_dir itself
    trainer.save_state()  # with the log of all steps and evaluations, for tools/plot.py
    if trainer.is_world_process_zero():
        append_record(args.output_dir, "is done", model.config.training | {"skipped": len(skipped)})
        if skipped:
            print(f"skipped {len(skipped)} bad utterances:", *skipped, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    run(main, cure="; mend it, or pass --on_bad_audio skip")
