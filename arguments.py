"""The arguments of train.py: flags, or a YAML file with the same names, or both.

python train.py --llm_model_name_or_path Qwen2-1.5B-Instruct --encoder_name_or_path tiny --data_path train.jsonl ...
python train.py config.yaml --learning_rate 1e-4  # the command line wins
"""

import json
import os
from argparse import ArgumentTypeError
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from config import SpeechLLMConfig, nearest
from manifest import InputError

OLD_FLAGS = {
    "whisper_model_name_or_path": "encoder_name_or_path",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1: a share of all steps
}
if "activation_checkpointing" in {f.name for f in fields(TrainingArguments)}:  # its name since transformers 5.2x
    OLD_FLAGS["gradient_checkpointing"] = "activation_checkpointing"
SECTIONS = ("data", "model", "training")
model_fields = [f for f in fields(SpeechLLMConfig) if "help" in f.metadata]
ModelArguments = make_dataclass("ModelArguments", [(f.name, f.type, f) for f in model_fields])


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
    save_best_by: Literal["wer", "cer", "loss"] | None = field(
        default=None, metadata={"help": "keep the --save_total_limit checkpoints that evaluate best, and the last"}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this model needs."""

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length = clips of similar length in a batch; random"}
    )
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool = False

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(("wer", "cer")):
            self.greater_is_better = False  # transformers thinks so of losses alone
        self.remove_unused_columns = False  # utterances have none
        super().__post_init__()


def parse(argv: list[str]) -> tuple[SpeechLLMConfig, DataArguments, TrainArguments]:
    """The three groups of arguments; names that other programs use are translated."""
    usage = "train.py [CONFIG.yaml] [--flag value ...] [--help]"
    old = "Older names work too: " + ", ".join(f"--{old} (now --{new})" for old, new in OLD_FLAGS.items())
    groups = (ModelArguments, DataArguments, TrainArguments)
    about = {"description": "Train a speech recogniser.", "usage": usage, "epilog": old, "allow_abbrev": False}
    parser = HfArgumentParser(groups, **about)
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # --freeze_params without any: nothing is frozen
    argv = with_file(argv, parser)
    argv = [rename(arg) if arg.startswith("--") else arg for arg in argv]
    try:
        model, data, training, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, OSError, ImportError, ArgumentTypeError) as error:
        parser.error(str(error))
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown arguments: {' '.join(unknown)}{nearest(unknown[0].split('=')[0], flags)}")
    check(data, training)
    return SpeechLLMConfig(**vars(model)), data, training


def check(data: DataArguments, training: TrainArguments) -> None:
    """Raise InputError for arguments that contradict each other."""
    if training.fsdp:
        raise InputError("--fsdp: the projector would be saved in shards; use --deepspeed ds_config_zero3.json")
    if training.deepspeed and "WORLD_SIZE" not in os.environ:
        cure = "start it with torchrun --standalone --nproc_per_node=1 train.py ..., or leave --deepspeed out"
        raise InputError(f"--deepspeed {training.deepspeed}: this is one process on its own; {cure}")
    if min(training.per_device_train_batch_size, training.per_device_eval_batch_size) < 1:
        raise InputError("--per_device_train_batch_size, --per_device_eval_batch_size: wanted 1 or more")
    if Path(training.output_dir).is_file():
        raise InputError(
            f"--output_dir {training.output_dir}: a file is there; wanted a folder, or a name for a new one"
        )
    names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    if any((getattr(training, name, None) or {}).get("use_reentrant") for name in names):
        raise InputError("use_reentrant true: no gradient would reach LoRA on the encoder; wanted false, the default")
    if training.n_gpu > 1:
        cure = f"torchrun --standalone --nproc_per_node={training.n_gpu} train.py ..., or set CUDA_VISIBLE_DEVICES=0"
        raise InputError(f"one process sees {training.n_gpu} GPUs; start it with {cure}")
    evaluated, kept = training.eval_strategy, training.save_strategy
    if evaluated != "no" and not data.eval_data_path:
        raise InputError(f"--eval_strategy {evaluated.value} wants a manifest; give --eval_data_path")
    together = evaluated == kept != "no" and (evaluated == "epoch" or training.save_steps % training.eval_steps == 0)
    if data.save_best_by and not together:
        cure = "give --eval_strategy and --save_strategy alike, and --eval_steps that divide --save_steps"
        raise InputError(f"--save_best_by {data.save_best_by}: every checkpoint wants an evaluation; {cure}")


def with_file(argv: list[str], parser: HfArgumentParser) -> list[str]:
    """The flags of a YAML file, which stands among the others or after --config, and then the others."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    switches = [name for action in parser._actions if action.nargs == "?" for name in action.option_strings]
    for place, arg in enumerate(argv):
        before = argv[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before and before not in ("--config", *switches)
        if arg.endswith((".yaml", ".yml")) and not is_value:
            return flags_of_file(arg, parser) + argv[: place - (before == "--config")] + argv[place + 1 :]
    return argv


def rename(flag: str) -> str:
    name, equals, value = flag[2:].partition("=")
    return f"--{OLD_FLAGS.get(name.replace('-', '_'), name)}{equals}{value}"


class UniqueKeys(yaml.SafeLoader):
    """YAML in which no key stands twice: PyYAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key, _ in node.value if keys.count(key.value) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[-1].value!r} stands twice", problem_mark=twice[-1].start_mark)
        return super().construct_mapping(node, deep)


def flags_of_file(path: str, parser: HfArgumentParser) -> list[str]:
    """A YAML file as command-line flags of the parser. Its keys may stand in sections: data, model, training."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: malformed YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted keys and values: the names of train.py's flags")
    takes_many = {action.dest: action.nargs == "*" for action in parser._actions if action.dest != "help"}
    known = [*takes_many, *OLD_FLAGS, *SECTIONS]
    sections = [content.pop(name) or {} for name in SECTIONS if name in content]
    if wrong := [section for section in sections if not isinstance(section, dict)]:
        raise InputError(f"{path}: found {wrong[0]!r} for a section; wanted keys and values under {SECTIONS}")
    flags, seen = [], set()
    for key, value in [pair for part in (content, *sections) for pair in part.items()]:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
        if key in seen:
            raise InputError(f"{path}: {key!r} stands twice, in two sections; wanted it once")
        seen.add(key)
        if isinstance(value, list) and not takes_many.get(key):
            if len(value) != 1:
                raise InputError(f"{path}: {key} is {value}; wanted one value")
            (value,) = value
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            value = "no" if value is False and key.endswith("_strategy") else value  # YAML reads a bare no as false
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
