"""Training goes on after a kill, and never from what another run has left; which checkpoints are kept."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments

from arguments import ModelArguments
from checkpoint import load_config
from manifest import InputError

# What a run that goes on must not change.
DECISIVE_DATA = "model_max_length max_seconds on_bad_audio projector_model_path".split()
DECISIVE = """seed data_seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim
    lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps per_device_train_batch_size
    gradient_accumulation_steps train_sampling_strategy label_smoothing_factor bf16 fp16 world_size
    optim_args dataloader_drop_last neftune_noise_alpha average_tokens_across_devices""".split()


def settings_of(config, data, args, manifest: str) -> dict:
    """What decides the course of a training run, as train_settings.json holds it; `manifest` is its hash."""
    model = [f.name for f in fields(ModelArguments)]
    groups = ((config, model), (data, DECISIVE_DATA), (args, DECISIVE))
    settings = {name: getattr(group, name) for group, names in groups for name in names}
    return json.loads(json.dumps(settings | {"manifest": manifest, "deepspeed": bool(args.deepspeed)}))


def take_over(config, checkpoint: str) -> None:
    """Put into the config what an earlier run has found out: the commits of its parts, its evaluation."""
    before = load_config(Path(checkpoint))
    for name in ("encoder_revision", "llm_revision", "training"):
        setattr(config, name, getattr(before, name))


def find_checkpoint(output_dir: str, settings: dict, given: str | None = None) -> str | None:
    """The checkpoint that a training run goes on from: the last complete one in its folder, else the one `given`.

    trainer_state.json is written last: a folder without it was torn by a kill. InputError if the checkpoint was made
    with other settings, holds weights alone, or if going on from the one given would overwrite later ones.
    """
    folders = [path.parent for path in Path(output_dir).glob("checkpoint-[0-9]*/trainer_state.json") if is_json(path)]
    if given and not is_json(Path(given, "trainer_state.json")):
        raise InputError(f"--resume_from_checkpoint {given}: no complete checkpoint; leave it out to take the last")
    if not folders and not given:
        return None
    folder = max(folders, key=step_of, default=Path(given or ""))
    if given:
        inside = Path(given).resolve().parent == Path(output_dir).resolve()
        ahead = step_of(folder) - step_of(Path(given))
        if ahead < 0 or (ahead and inside):
            raise InputError(f"--resume_from_checkpoint {given}: {folder} is there too; choose another --output_dir")
    if not (list(folder.glob("rng_state*")) and [*folder.glob("optimizer.pt"), *folder.glob("global_step*")]):
        cure = f"start from them with --projector_model_path {folder}/model.safetensors and another --output_dir"
        raise InputError(f"{folder}: no run can go on from weights alone, as --save_only_model keeps them; {cure}")
    path = folder / "train_settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {}  # another program's checkpoint: all contradicts
    changed = [key for key in settings | before if before.get(key) != settings.get(key)]
    if changed:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in changed)
        raise InputError(f"{folder}: this run contradicts it ({changes}); restore that, or choose another --output_dir")
    return str(folder)


class KeepBest(TrainerCallback):
    """Keeps the --save_total_limit checkpoints whose evaluation was best by `metric`, and the last to go on from."""

    def __init__(self, metric: str, args: TrainingArguments):
        self.metric, self.count = metric, args.save_total_limit or 1
        args.save_total_limit = None  # Trainer keeps the newest

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs) -> None:
        if f"eval_{self.metric}" not in metrics:
            names = sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
            raise InputError(f"--save_best_by {self.metric}: wanted one of {names}, as evaluated here")

    def on_save(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            keep_best(args.output_dir, self.metric, self.count)


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


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True
