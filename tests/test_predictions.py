"""What predictions.py promises: all that the LLM reads and writes of a clip, with counts."""

import pytest
from conftest import TRAIN_FLAGS, noise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from predictions import prediction_text

FLAGS = f"{TRAIN_FLAGS} --data_path corpus.jsonl --per_device_train_batch_size 4 --max_steps 4"


def lines_of(model, hypothesis: str) -> dict[str, str]:
    record = {"where": "a.jsonl:7", "wav": noise(2.0), "txt": "hello big world"}
    dataset = model.make_dataset([record])
    where, *lines = prediction_text(model.tokenizer, dataset[0], record, hypothesis).split("\n")
    assert where == "a.jsonl:7"
    return {line.split()[0]: line for line in lines}


def test_the_input_is_shown_as_the_llm_reads_it_with_counts(model):
    lines = lines_of(model, "hello big world")
    assert "<audio> → [20 embeddings]↵Transcribe the speech<|im_end|>" in lines["input"]
    ids = model.make_dataset([{"where": "", "wav": noise(2.0), "txt": "x"}])[0]["prompt_ids"]
    assert lines["input"].endswith(f"({len(ids)} positions)")
    assert lines["prompt"].endswith(f"({len(ids) - 20} tokens)")
    assert lines["audio"].split(None, 1)[1] == "<audio> → [20 embeddings]"


def test_reference_and_hypothesis_stand_word_below_word_with_the_errors_marked(model):
    lines = lines_of(model, "hello pig world word")
    for word in ("hello", "world"):
        assert lines["hypothesis"].index(word) == lines["reference"].index(word)
    assert lines["errors"].index("S") == lines["hypothesis"].index("pig") + 2  # below the end of the word
    assert lines["errors"].split() == ["errors", "S", "I", "(WER", "66.67%)"]


@pytest.mark.parametrize(("reference", "hypothesis"), [("", "a word"), ("a word", ""), ("", "")])
def test_empty_texts_are_shown_too(model, reference, hypothesis):
    record = {"where": "b", "wav": noise(1.0), "txt": reference}
    text = prediction_text(model.tokenizer, model.make_dataset([record])[0], record, hypothesis)
    assert "  reference" in text and "  hypothesis" in text


def test_a_run_shows_them_every_so_many_steps_and_at_each_evaluation_and_in_tensorboard(trained, call, tmp_path):
    flags = f"--eval_data_path eval.jsonl --eval_strategy steps --eval_steps 4 --output_dir {tmp_path}"
    flags += " --log_predictions 2 --log_predictions_steps 2 --report_to tensorboard"
    out = call(train.main, f"{FLAGS} {flags}").out
    for step in (2, 4):
        assert f"training, step {step}, 1 of 2: corpus.jsonl:1" in out
    assert "evaluation, step 4, 2 of 2: eval.jsonl:2" in out and "evaluation, step 4, 3" not in out
    events = EventAccumulator(str(next(tmp_path.glob("runs/*"))))
    events.Reload()
    names = [name.removesuffix("/text_summary") for name in events.Tags()["tensors"]]
    assert {"training/1", "training/2", "evaluation/1", "evaluation/2"} <= set(names)
