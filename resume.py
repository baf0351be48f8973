"""Going on after a kill: which checkpoint, and what must not have changed since."""

import json
import math
import re
from pathlib import Path

import torch
from transformers import TrainingArguments

from errors import InputError, as_input_error
from manifest import Records
from mixture import Mixture

# What the files of a checkpoint name beside what torch itself takes for data
DATA_CLASSES = {"numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct"}  # random states
DATA_CLASSES |= {f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")}
DATA_CLASSES |= {"deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address"}

# Settings that decide the weights, beside those of the model: a run that goes on must not change them.
DECISIVE = """model_max_length max_seconds on_bad_audio augment projector_model_path seed data_seed learning_rate
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args lr_scheduler_type lr_scheduler_kwargs
    warmup_steps num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps bf16 fp16
    train_sampling_strategy dataloader_drop_last label_smoothing_factor neftune_noise_alpha no_speech_share min_seconds
    min_tokens max_tokens max_characters_per_second train_on_turns average_tokens_across_devices max_batch_seconds
    max_batch_tokens auto_batch world_size deepspeed zero_stage num_records records""".split()


def find(args: TrainingArguments, settings: dict, records: Records, fields: list[str]) -> tuple[str | None, list[str]]:
    """The checkpoint that a run goes on from, and what it does otherwise, to be told; (None, []) for a new run.

    `fields` are those of the model's config, which decide the weights too.
    """
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    return checkpoint, compare_settings(checkpoint, settings, records, fields + DECISIVE) if checkpoint else []


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
    refuse_code(folder)
    return str(folder)


def refuse_code(checkpoint: Path) -> None:
    """Raise InputError if a file that Trainer or DeepSpeed unpickles names anything but data.

    DeepSpeed loads its files with weights_only=False: a pickle of a stranger would run there.
    """
    for pattern in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*/**/*.pt"):
        for path in sorted(checkpoint.glob(pattern)):
            with as_input_error(str(path), "read it", "what torch.save wrote"):
                others = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - DATA_CLASSES
            if others:
                raise InputError(f"{path}: names {', '.join(sorted(others))}, which could run; wanted data alone")
    latest = checkpoint / "latest"  # in which DeepSpeed looks up the folder of its files
    if latest.is_file() and not re.fullmatch(r"global_step\d+\s*", latest.read_text(errors="replace")):
        raise InputError(f"{latest}: names another folder; wanted global_step and a number")


def step_of(checkpoint: str | Path) -> int | None:
    """The step after which a checkpoint was saved; None if it is not complete."""
    try:
        return int(json.loads(Path(checkpoint, "trainer_state.json").read_bytes())["global_step"])
    except (OSError, ValueError, LookupError, TypeError):  # no such file, torn, or something else
        return None


def are_continued(records: Records, fingerprint: str, count: int) -> bool:
    """Whether these are the `count` records of an earlier run, with others appended to them or to a source of them."""
    if isinstance(records, Mixture):
        return records.continues(fingerprint, count)
    return records.fingerprint(count) == fingerprint


def compare_settings(checkpoint: str, settings: dict, records: Records, names: list[str] = DECISIVE) -> list[str]:
    """What a run does otherwise than the checkpoint that it goes on from, to be told. Raises InputError.

    Compared is what both sides know. A longer schedule, data appended, and another number of processes are allowed.
    """
    path = Path(checkpoint, "train_settings.json")
    before = json.loads(path.read_text()) if path.is_file() else {}  # the settings of the checkpoint
    if settings.get("auto_batch"):  # does not look again: the budget that it found before goes on
        settings |= {name: before[name] for name in ("max_batch_seconds", "max_batch_tokens") if name in before}
    has_budget = bool(settings.get("max_batch_seconds") or settings.get("max_batch_tokens"))
    changed = [name for name in names if name in before and settings[name] != before[name]]
    allowed = {n for n in ("num_train_epochs", "max_steps") if n in changed and settings[n] > before[n] > 0}
    allowed |= {"auto_batch"} if has_budget else set()  # found, or given as a number
    if "records" in changed and are_continued(records, before["records"], before["num_records"]):
        allowed |= {"records", "num_records"}  # lines were appended
    if not settings["deepspeed"]:  # which cannot deal its optimiser's states out anew
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        if has_budget:
            sizes = sizes[1:]  # no number of clips makes a batch
        is_same_batch = math.prod(settings[n] for n in sizes) == math.prod(before.get(n, 0) for n in sizes)
        allowed |= set(sizes) if is_same_batch else {"world_size"}
    if contradictions := [name for name in changed if name not in allowed]:
        changes = ", ".join(f"{name} was {before[name]!r} and is {settings[name]!r}" for name in contradictions)
        cure = f"restore that, or give a new --output_dir, and --projector_model_path {checkpoint}/model.safetensors"
        raise InputError(f"{checkpoint}: this run contradicts it ({changes}); {cure}")
    unknown = sorted(set(names) - before.keys())  # fields that did not exist then
    differences = [f"{name} was {before[name]}, is {settings[name]}" for name in changed if name != "records"]
    return differences + [f"not compared: {', '.join(unknown)}"] * bool(unknown)
