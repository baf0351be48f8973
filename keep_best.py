"""The checkpoints that evaluate best are kept, and the last to go on from: --save_best_by."""

import json
import math
import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments

from errors import InputError
from score import METRICS


def check(metric: str, args: TrainingArguments) -> None:
    """Raise InputError for a metric that is not counted, a second one, or checkpoints without an evaluation."""
    if metric not in (*METRICS, "loss"):
        raise InputError(f"--save_best_by {metric}: wanted one of {', '.join(METRICS)}, loss")
    evaluated, saved = args.eval_strategy, args.save_strategy
    if not (evaluated == saved != "no" and (evaluated == "epoch" or args.save_steps % args.eval_steps == 0)):
        cure = "give --eval_strategy and --save_strategy alike, and --eval_steps that divide --save_steps"
        raise InputError(f"--save_best_by {metric}: every checkpoint wants an evaluation; {cure}")
    other = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if other not in (metric, "loss"):
        raise InputError(f"--save_best_by {metric} --metric_for_best_model {other}: one of them is evaluated; choose")
    args.metric_for_best_model, args.greater_is_better = metric, False  # what --load_best_model_at_end goes by


class KeepBest(TrainerCallback):
    """Keeps the --save_total_limit checkpoints whose evaluation was best by `metric`, and the last."""

    def __init__(self, metric: str, args: TrainingArguments):
        self.metric, self.count = metric, args.save_total_limit or 1
        args.save_total_limit = None  # or Trainer would keep the newest

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
    best_first = sorted(rates, key=lambda step: (rates[step], step))  # of equals the earlier, as Trainer has it
    for step in best_first[count:]:
        if step != max(rates):
            shutil.rmtree(Path(output_dir, f"checkpoint-{step}"))
    print(f"lowest {metric} so far: {rates[best_first[0]]:.4f}, {output_dir}/checkpoint-{best_first[0]}")
