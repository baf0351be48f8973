"""train.py, which after each step writes down what share of each part's weights this process holds."""

import json
import os
from pathlib import Path

from transformers import TrainerCallback

import train
from errors import run


class Shares(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        shares = {}
        for name in ("encoder", "projector", "llm"):
            parameters = list(getattr(model, name).parameters())
            held = sum(getattr(p.data, "_local_tensor", p).numel() for p in parameters)  # of a DTensor, or whole
            shares[name] = held / sum(p.numel() for p in parameters)
        Path(f"{args.output_dir}.shares-{os.environ['RANK']}").write_text(json.dumps(shares))


def make_trainer(*args) -> train.SpeechTrainer:
    trainer = make(*args)
    trainer.add_callback(Shares())
    return trainer


if __name__ == "__main__":
    make, train.make_trainer = train.make_trainer, make_trainer
    run(train.main)
