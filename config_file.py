"""Flags of train.py that stand in a YAML file."""

import json
from pathlib import Path

import yaml

from errors import InputError, nearest

SECTIONS = ("data", "model", "training")  # in which keys may stand


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
            raise InputError(f"{path}: unknown key {key!r}{nearest(str(key), [flag[2:] for flag in flags])}")
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
