"""What a model is made of: `config.json` of a checkpoint, keyword arguments in Python, flags on the command line."""

import copy
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from transformers import PreTrainedConfig

from manifest import AUDIO, InputError
from prompt import PROMPT

FROZEN = (r"^encoder\.", r"^llm\.")  # names of parameters that are not trained, unless asked for


def option(default, help: str):
    """A field that is a flag of train.py, too."""
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class SpeechLLMConfig(PreTrainedConfig):
    """The fields of config.json. Raises InputError for a field that does not exist, with the nearest that does."""

    model_type = "speech_llm"

    encoder_name_or_path: str | None = option(None, "tiny ... large-v3-turbo, a .pt file, a folder or a Hub name")
    encoder_revision: str | None = option(None, "branch, tag or commit on the Hub")
    encoder_layer: int | None = option(None, "take the output of this layer, 1 = the first (default: the last)")
    encoder_dropout: float = option(0.0, "dropout on the encoder's frames, in training only")
    encoder_lora_r: int = option(0, "rank of LoRA on the encoder; 0 = none")
    pad_to_30s: bool = option(False, "pad every clip to 30 s, as Whisper was trained")
    llm_model_name_or_path: str | None = option(None, "the LLM: a folder or a Hub name")
    llm_revision: str | None = option(None, "branch, tag or commit on the Hub")
    quantize: str | None = option(None, "4bit or 8bit: hold the frozen LLM so, by bitsandbytes on a GPU")
    lora_r: int = option(0, "rank of LoRA on the LLM; 0 = none")
    lora_alpha: float = option(16.0, "LoRA's output is scaled by alpha / rank")
    lora_dropout: float = option(0.0, "dropout on LoRA's input, in training only")
    lora_target_modules: list[str] = option([], "names of linear layers, or all-linear (default: queries and values)")
    projector: str = option("conv1d", "conv1d, linear, mlp, conformer or qformer")
    projector_stride: int = option(5, "encoder frames joined into one embedding")
    projector_hidden_size: int = option(2048, "width inside the projector")
    projector_num_layers: int = option(2, "hidden layers (mlp), Conformer layers, Q-Former blocks")
    projector_activation: str = option("relu", "activation inside the projector: relu, gelu, silu ...")
    audio_boundary_tokens: bool = option(False, "a learned vector before and after each clip")
    prompt: str = option(PROMPT, "the user's turn, with <audio> in it")
    system_prompt: str | None = option(None, "the system's turn (default: as the chat template has it)")
    chat_template: str | None = option(None, "FILE.jinja (or its text) in place of the tokenizer's own template")
    freeze_params: list[str] = option(FROZEN, "regular expressions: parameters with such names are not trained")
    prevent_freeze_params: list[str] = option([], "regular expressions: exceptions from --freeze_params")
    encoder_size: int = 0  # D, filled in when the model is built
    hidden_size: int = 0  # H
    origin: dict | None = None  # where frozen parts that lie beside config.json came from: names and commits
    training: dict | None = None  # data, steps and error rate of the run that made the weights

    def __post_init__(self, **kwargs):
        own = [f.name for f in fields(self) if f.name in type(self).__annotations__]
        known = [*own, "model_type", "architectures", "transformers_version", "name_or_path", "_commit_hash"]
        inherited = {f.name: getattr(self, f.name) for f in fields(PreTrainedConfig) if f.name not in known}
        unknown = [name for name, value in inherited.items() if value != getattr(PreTrainedConfig, name, None)]
        unknown += [name for name, value in kwargs.items() if name not in known and value is not None]
        if unknown:
            hint = nearest(unknown[0], known) or f"; wanted one of {sorted(known)}"
            raise InputError(f"config: unknown field {unknown[0]!r}{hint}")
        for name in own:
            if isinstance(getattr(self, name), Path):
                setattr(self, name, str(getattr(self, name)))
            check_type(name, getattr(self, name), type(self).__annotations__[name])
        ranges = {"encoder_dropout": (0, 1), "lora_dropout": (0, 1), "lora_r": (0, 1e9), "encoder_lora_r": (0, 1e9)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) < most:
                raise InputError(f"config: {name} is {getattr(self, name)}; wanted {least} or more, below {most:g}")
        if self.chat_template and "{" not in self.chat_template and AUDIO not in self.chat_template:  # a file
            if not Path(self.chat_template).is_file():
                raise InputError(f"--chat_template {self.chat_template}: no such file")
            self.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """What config.json holds: our own fields. transformers' say nothing of such a model, and Trainer adds more."""
        own = {name: getattr(self, name) for name in type(self).__annotations__}
        return copy.deepcopy({"model_type": self.model_type, "architectures": self.architectures} | own)


def check_type(name: str, value, kind) -> None:
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    kinds = [get_origin(k) or k for k in kinds] + ([int] if float in kinds else [])
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        raise InputError(f"config: {name} is {value!r}; wanted {' or '.join(k.__name__ for k in kinds)}")


def nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name.lower(), names, 1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
