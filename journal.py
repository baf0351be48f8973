"""Decoding goes on after a kill, and never with what another run has left: a journal of finished utterances."""

import json
import os
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from manifest import Manifest, record_key, reference


def fingerprint(model, *settings) -> str:
    """Hash of all that decides a hypothesis: config, the start of every weight tensor, and the settings given."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("training", "origin")}
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


def append(journal: BinaryIO, batch: list[tuple[int, str, str | None]]) -> None:
    """Put finished utterances (index, text, problem) on the disk, whatever happens next."""
    rows = [{"index": index, "pred": text, "problem": problem} for index, text, problem in batch]
    journal.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    journal.flush()
    os.fsync(journal.fileno())


def finish(result_path: str, manifest: Manifest, key: str) -> list[tuple[int, str]]:
    """Make the result file of the journals; (line, problem) where there was one.

    It is in the manifest's order, and appears whole or not at all.
    """
    rows, _ = read_journals(result_path, key)
    with open(f"{result_path}.whole", "w", encoding="utf-8") as file:
        for index, record in enumerate(manifest):
            row = {"key": record_key(record), "wav": record.get("wav"), "txt": reference(record)} | rows[index]
            line = json.dumps(row, ensure_ascii=False) if result_path.endswith(".jsonl") else row["pred"]
            file.write(line + "\n")
    os.replace(f"{result_path}.whole", result_path)
    for path in journals(result_path):
        path.unlink()
    return [(index + 1, row["problem"]) for index, row in sorted(rows.items()) if row["problem"]]
