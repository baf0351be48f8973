"""Flags of train.py that stand in a YAML file."""

import json
from pathlib import Path

import yaml

from errors import InputError, nearest

SECTIONS = ("data", "model", "training")  # in which keys may stand
# Keys of SpeechLLM's YAML, which has the same sections: what replaces them. README.md has them in a table.
RENAMED = {
    "speech_encoder_name_or_path": "encoder_name_or_path",
    "text_decoder_name_or_path": "llm_model_name_or_path",
    "downsample_factor": "projector_stride",
    "projector_n_layers": "projector_num_layers",
    "subset": "data_subset",
    "split": "data_split",
    "amount": "data_amount",
    "min_duration": "min_seconds",
    "max_duration": "max_seconds",
}
NOT_NEEDED = {
    "freeze_modules": "encoder and LLM are frozen by default, and freeze_params says otherwise",
    "sampling_rate": "audio of any rate becomes 16 kHz as it is read",
    "num_proc_for_preprocessing": "there is no preprocessing; dataloader_num_workers read the audio",
}


def with_flags_of_file(argv: list[str], flags: list[str]) -> list[str]:
    """The command line with the flags of the YAML file that it begins with, perhaps as --config FILE, in its place."""
    path, *others = argv[1:] or ["--config"] if argv[0] == "--config" else argv
    return [*flags_of_file(path, flags), *others]  # of two values the later wins


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
            raise InputError(f"{path}: unknown key {key!r}{replacement(str(key), flags)}")
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def replacement(key: str, flags: list[str]) -> str:
    """The end of an error line: what to write in place of an unknown key."""
    if key in NOT_NEEDED:
        return f"; leave it out: {NOT_NEEDED[key]}"
    return f"; did you mean {RENAMED[key]}?" if key in RENAMED else nearest(key, [flag[2:] for flag in flags])
