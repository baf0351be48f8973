"""What the model reads and writes, clip by clip, while it is trained: --log_predictions N."""

from itertools import groupby
from typing import TYPE_CHECKING

import jiwer
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from dataset import SpeechDataset, collate
from manifest import AUDIO, BOUNDARY, SPEECH, DecodingOptions, transcript_of
from score import score

if TYPE_CHECKING:
    from model import SpeechLLM

BOUNDARY_NAMES = dict(zip(BOUNDARY, ("[before]", "[after]"), strict=True))  # of --audio_boundary_tokens


def prediction_text(tokenizer, example: dict, record: dict, hypothesis: str) -> str:
    """What the LLM reads of an example, its transcript and the hypothesis, each with its number of tokens.

    input       <|im_start|>user↵<audio> → [25 embeddings]↵Transcribe the speech<|im_end|>↵ (41 positions)
    prompt      <|im_start|>user↵<audio>↵Transcribe the speech<|im_end|>↵ (16 tokens)
    audio       <audio> → [25 embeddings]
    reference   hello world (3 tokens)
    hypothesis  hello word  (3 tokens)
    errors            S     (WER 50.00%)
    """
    ids, reference = example["prompt_ids"], transcript_of(record) or ""
    pieces, audio, num_speech = [], [], 0
    for kind, run in groupby(ids, key=lambda token: token if token < 0 else 0):  # text, or placeholders of one kind
        tokens = list(run)
        if kind == SPEECH:
            audio.append(f"{AUDIO} → [{len(tokens)} embeddings]")
            num_speech += len(tokens)
        pieces.append(audio[-1] if kind == SPEECH else BOUNDARY_NAMES.get(kind) or tokenizer.decode(tokens))
    text = "".join(AUDIO if piece in audio else piece for piece in pieces)
    result = score([reference], [hypothesis])  # in words, or characters
    alignment = result.alignments[0]
    lines = jiwer.visualize_alignment(alignment, show_measures=False, skip_correct=False).splitlines()
    aligned = {line[:4]: line[5:] for line in lines}  # "REF: ...", "HYP: ...", and the marks of errors below
    marks = lines[-1][5:].rstrip() if result.all.errors else ""
    rows = {
        "input": f"{''.join(pieces)} ({len(ids)} positions)",
        "prompt": f"{text} ({len(ids) - num_speech} tokens)",
        "audio": "; ".join(audio),
        "reference": f"{aligned['REF:']} ({max(len(example['target_ids']) - 1, 0)} tokens)",  # without the end
        "hypothesis": f"{aligned['HYP:']} ({len(tokenizer(hypothesis, add_special_tokens=False).input_ids)} tokens)",
        "errors": f"{marks} ({result.metric.upper()} {result.all.rate:.2%})",
    }
    shown = "\n".join(f"  {name:<11} {value}".replace("\n", "↵") for name, value in rows.items())
    return f"{record['where']}\n{shown}"


class PredictionLog(TrainerCallback):
    """Shows the first `count` clips of the training data every `every` steps, and of each evaluation.

    They are printed, and go to TensorBoard as text if --report_to asks for it.
    """

    def __init__(self, trainer: Trainer, count: int, every: int):
        self.dataset, self.count, self.every = trainer.train_dataset, count, every
        self.callbacks = trainer.callback_handler.callbacks  # TensorBoard's may be among them

    def on_step_end(self, args, state, control, model: "SpeechLLM", **kwargs) -> None:
        if state.global_step % self.every:
            return
        dataset, positions = self.dataset, range(min(self.count, len(self.dataset)))
        batch = collate([dataset[position] for position in positions], with_targets=False)
        with model.in_eval_mode(), torch.no_grad():  # on every process, as ZeRO-3 wants
            hypotheses = model.decode_batch(batch, dataset, DecodingOptions(num_beams=1))
        self.show("training", dataset, {h.index: h.text for h in hypotheses}, state)

    def show(self, title: str, dataset: SpeechDataset, hypotheses: dict[int, str], state) -> None:
        """Print the first clips of a dataset with their hypotheses, which are by the index of the record."""
        if not state.is_world_process_zero:
            return
        positions = [position for position, index in enumerate(dataset.indices) if int(index) in hypotheses]
        for number, position in enumerate(positions[: self.count], 1):
            example = dataset[position]
            record, index = dataset.records[example["index"]], example["index"]
            text = prediction_text(dataset.tokenizer, example, record, hypotheses[index])
            print(f"{title}, step {state.global_step}, {number} of {min(self.count, len(positions))}: {text}")
            for callback in self.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                    markdown = "    " + text.replace("\n", "\n    ")  # TensorBoard shows Markdown; this is a code block
                    callback.tb_writer.add_text(f"{title}/{number}", markdown, state.global_step)
