"""Can the model learn a few clips by heart? --overfit N trains on the first N until no word of them is wrong."""

from typing import TYPE_CHECKING

from transformers import IntervalStrategy, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from errors import InputError
from evaluate import DEAF, TO_TRY
from manifest import Records
from score import METRICS
from sources import RecordList

if TYPE_CHECKING:
    from train import DataArguments

MAX_STEPS = 1000  # unless --max_steps says otherwise
EVALUATIONS = 40  # of a run that does not get there
LEARNT = 0.05  # a loss below this, in nats a token: the transcripts are known by heart, as long as the model is led


def prepare(records: dict[str, Records], data: "DataArguments", args: TrainingArguments) -> Records:
    """The first records of those trained on; the arguments become those of a run that is evaluated often and ends.

    Raises InputError for another evaluation set beside them.
    """
    if len(records) > 1 or data.save_best_by:
        flags = "--eval_data_path, --select_on, --save_best_by"
        raise InputError(f"--overfit {data.overfit}: evaluates the clips that it trains on; leave out {flags}")
    args.max_steps = args.max_steps if args.max_steps > 0 else MAX_STEPS
    args.eval_steps = args.eval_steps or max(args.max_steps // EVALUATIONS, 1)
    args.eval_strategy, args.save_strategy = IntervalStrategy.STEPS, SaveStrategy.NO
    clips = records["trained on"]
    return RecordList(clips[index] for index in range(min(data.overfit, len(clips))))


class StopWhenLearnt(TrainerCallback):
    """Ends training at the first evaluation without an error, and says at the end what came of it."""

    def __init__(self):
        self.evaluations: list[dict[str, float]] = []

    def rate(self) -> tuple[str, float]:
        """The last error rate, WER or another, and its name."""
        last = self.evaluations[-1]
        return next((name, last[f"eval_{name}"]) for name in METRICS if f"eval_{name}" in last)

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs) -> None:
        self.evaluations.append(metrics)
        control.should_training_stop = self.rate()[1] == 0

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Raises InputError with the likely reason if errors were left."""
        if not self.evaluations:  # ended from outside before the first
            return
        name, rate = self.rate()
        if rate != 0:  # NaN, where no transcript has a word
            raise InputError(f"--overfit: {name.upper()} {rate:.2%} after {state.global_step} steps; {self.why_not()}")
        if state.is_world_process_zero:
            print(f"--overfit: {name.upper()} 0 after {state.global_step} steps")

    def why_not(self) -> str:
        """What the evaluations say of a run that did not get there."""
        losses = [evaluation["eval_loss"] for evaluation in self.evaluations]
        gap, loss = self.evaluations[-1].get("eval_listening_gap", DEAF), f"the loss is {losses[-1]:.3f}"
        if losses[-1] < LEARNT:
            return (
                f"{loss}, so the transcripts are known by heart, but decoding leaves them: compare the lines above; "
                "does a transcript hold what the tokenizer cannot give back, a stop token of the LLM, over 200 tokens?"
            )
        if gap < DEAF:
            return f"{loss} and the listening gap {gap:.3f}: the model does not listen; try {TO_TRY}"
        if losses[-1] < 0.9 * losses[len(losses) // 2]:
            return f"{loss} and still falls: give more --max_steps, or a higher --learning_rate"
        return f"{loss} and falls no more; try {TO_TRY}"
