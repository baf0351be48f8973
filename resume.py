"""Going on after a kill, and never with what another run has left: training checkpoints, decoding journals."""

import json
import math
import shutil
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from manifest import InputError


def settings_of(*groups: tuple[object, list[str]], **others) -> dict:
    """What decides the course of a training run, as train_settings.json holds it: fields of objects, by name."""
    settings = {name: getattr(group, name) for group, names in groups for name in names} | others
    return json.loads(json.dumps(settings))


def find_checkpoint(output_dir: str, settings: dict) -> str | None:
    """The last complete checkpoint of a training run; InputError if it was made with other settings.

    trainer_state.json is written last: a folder without it was torn by a kill.
    """
    folders = [path.parent for path in Path(output_dir).glob("checkpoint-[0-9]*/trainer_state.json") if is_json(path)]
    if not folders:
        return None
    folder = max(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    path = folder / "train_settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {}  # another program's checkpoint: all contradicts
    changed = [key for key in settings | before if before.get(key) != settings.get(key)]
    if changed:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in changed)
        raise InputError(f"{folder}: this run contradicts it ({changes}); restore that, or choose another --output_dir")
    return str(folder)


def keep_best(output_dir: str, metric: str, count: int) -> None:
    """Delete all checkpoints but the last and the `count` whose evaluation had the lowest `metric`."""
    rates = {}  # step -> rate
    for path in Path(output_dir).glob("checkpoint-[0-9]*/trainer_state.json"):
        step = int(path.parent.name.removeprefix("checkpoint-"))
        logs = [log for log in json.loads(path.read_text())["log_history"] if log["step"] == step]
        rate = next((log[f"eval_{metric}"] for log in logs if f"eval_{metric}" in log), math.inf)
        rates[step] = math.inf if math.isnan(rate) else rate  # NaN compares with nothing
    for step in sorted(rates, key=lambda step: (rates[step], -step))[count:]:
        if step != max(rates):
            shutil.rmtree(Path(output_dir, f"checkpoint-{step}"))
    best = min(rates, key=lambda step: (rates[step], -step))
    print(f"lowest {metric} so far: {rates[best]:.4f}, {output_dir}/checkpoint-{best}")


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def fingerprint(model, *settings) -> str:
    """Hash of all that decides a hypothesis: config, the start of every weight tensor, and the settings given."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "training"}
    digest = sha256(json.dumps([config, settings], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def journals(result_path: str) -> list[Path]:
    """Files beside a result file that is not whole yet, one a process: `result.txt.partial-RANK`.

    JSON lines; the first is a key of all that decides a hypothesis, the others are rows {"index", "pred", ...}.
    """
    return sorted(Path(result_path).parent.glob(f"{escape(Path(result_path).name)}.partial-*"))


def read_journals(result_path: str, key: str) -> tuple[dict[int, dict], list[Path]]:
    """Finished rows by index, and the journals with another key, which are of no use."""
    done, foreign = {}, []
    for path in journals(result_path):
        lines = path.read_bytes().split(b"\n")[:-1]  # a last line without its end was torn by the kill
        head, *rows = map(json.loads, lines or [b"null"])
        done |= {row["index"]: row for row in rows if head == key}
        foreign += [path] if head != key else []
    return done, foreign


def open_journal(result_path: str, key: str, rank: int) -> BinaryIO:
    """This process's journal, open for writing after its last whole line."""
    path = Path(f"{result_path}.partial-{rank}")
    if not path.exists():
        path.write_text(json.dumps(key) + "\n")
    file = open(path, "r+b")  # noqa: SIM115
    file.seek(file.read().rfind(b"\n") + 1)
    file.truncate()
    return file
