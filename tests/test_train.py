"""The training command: its arguments, what it saves, that it goes on after a kill, and what it says of wrong input.

Most runs are calls of main in this process (`call` in conftest.py). Processes are started (`launch`) where they are
the point: a kill, several ranks, an exit status.
"""

import inspect
import json
import re
import resource
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT, TRAIN_FLAGS, TRAINED_FLAGS, write_manifest
from runs import (
    CORPUS,
    PROJECTOR,
    assert_same,
    checkpoints,
    copy_until,
    error_of,
    evaluations,
    good,
    history,
    losses,
    terminate,
    weights,
)
from torch.utils.data import BatchSampler

import recognize
import train
from dataset import collate
from errors import BadUtterance, InputError
from evaluate import evaluate
from manifest import Manifest
from model import SpeechLLM
from train import LengthSampler, parse

FLAGS = "--llm_model_name_or_path llm --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --use_cpu"


# Flags


def test_dropped_flag_names_are_accepted_with_a_space_or_an_equals_sign():
    needed = f"{FLAGS} --eval_data_path dev.jsonl".split()
    for old in ("--evaluation_strategy steps --warmup_ratio 0.1", "--evaluation_strategy=steps --warmup_ratio=0.1"):
        _, _, args = parse([*needed, *old.split()])
        assert (args.eval_strategy.value, args.warmup_steps, args.get_warmup_steps(200)) == ("steps", 0.1, 20)


def test_old_names_may_have_dashes():
    assert parse([*FLAGS.split(), "--warmup-ratio", "0.1"])[2].warmup_steps == 0.1


def test_the_dtype_of_the_frozen_weights_has_a_short_name():
    for flag in ("--dtype", "--frozen_dtype"):
        assert parse([*FLAGS.split(), flag, "float32"])[0].frozen_dtype == "float32"


def test_the_column_flag_of_other_programs_does_no_harm():
    assert not parse([*FLAGS.split(), "--remove_unused_columns", "True"])[2].remove_unused_columns


def test_patterns_can_be_given_as_none_at_all():
    assert parse([*FLAGS.split(), "--freeze_params"])[0].freeze_params == []


def test_the_best_error_rate_is_the_lowest():
    best = "--load_best_model_at_end --eval_strategy steps --eval_data_path d --eval_steps 4 --save_steps 4"
    for metric in ("wer", "eval_cer", "loss"):
        assert parse([*FLAGS.split(), *best.split(), "--metric_for_best_model", metric])[2].greater_is_better is False


@pytest.mark.parametrize(
    "flags",
    [
        "--num_train_epoch 5",
        "--no_such_flag",
        "stray",
        "--on_bad_audio ignore",
        "--learning_rate fast",
        "--projector_hidden_sise 3",
    ],
)
def test_an_unknown_flag_or_value_is_named_with_exit_status_2(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        parse([*FLAGS.split(), *flags.split()])
    assert exit.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert flags.split()[0].lstrip("-") in told
    assert "sise" not in flags or "did you mean --projector_hidden_size?" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--eval_strategy steps", "give --eval_data_path"),
        ("--save_best_by wer", "every checkpoint wants an evaluation"),
        ("--save_best_by wer --eval_data_path d --eval_strategy steps --eval_steps 30 --save_steps 100", "divide"),
        ("--save_best_by wer --eval_data_path d --eval_strategy epoch --save_steps 100", "alike"),
        ("--save_best_by ser --eval_data_path d --eval_strategy epoch", "wanted one of wer, cer, loss"),
        ("--save_best_by cer --eval_data_path d --eval_strategy steps --metric_for_best_model wer", "choose"),
        ("--fsdp", "start it with torchrun"),
        ("--fsdp --tensor_parallel", "choose one"),
        ("--tensor_parallel", "--nproc_per_node=2 train.py"),
        (f"--deepspeed {ROOT}/ds_config_zero3.json", "start it with torchrun"),
        ("--per_device_train_batch_size 0", "wanted 1 or more"),
        ("--gradient_accumulation_steps 0", "wanted 1 or more"),
        (f"--output_dir {ROOT}/README.md", "a file is there"),
        ("--overfit -1", "--overfit -1: wanted 0 or more"),
        ("--log_predictions_steps 0", "--log_predictions_steps 0: wanted 1 or more"),
        ("--check -1", "--check -1: wanted 0 or more"),
    ],
)
def test_arguments_that_contradict_each_other_are_told_at_once(flags, told):
    with pytest.raises(InputError, match=told):
        parse([*FLAGS.split(), *shlex.split(flags)])


def test_help_names_the_flags_and_the_older_names(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    wanted = "llm_model_name_or_path encoder_name_or_path whisper_model_name_or_path data_path eval_data_path "
    wanted += (
        "output_dir model_max_length max_seconds on_bad_audio augment projector_stride dtype deepspeed learning_rate "
    )
    wanted += "warmup_ratio evaluation_strategy"
    assert {f"--{flag}" for flag in wanted.split()} <= set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("name", ["whisper_qwen.yaml", "wavlm_llama.yaml"])
def test_the_examples_are_valid(name):
    (path,) = [path for path in ROOT.rglob(name) if ".venv" not in path.parts]
    model, data, training = parse([str(path), "--bf16", "False", "--use_cpu"])
    assert data.data_path == ["train.jsonl"] and training.output_dir
    if name.startswith("wavlm"):
        names = model.encoder_name_or_path, model.llm_model_name_or_path
        assert names == ("microsoft/wavlm-large", "meta-llama/Llama-3.2-1B")
        assert (model.projector, model.projector_stride) == ("mlp", 5)


def test_what_the_readme_calls_our_name_for_another_systems_exists(capsys):
    table = (ROOT / "README.md").read_text().partition("## If you come from another system")[2].partition("\n## ")[0]
    cells = [re.findall(r"`([^`]+)`", here) for _, here in re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE)]
    names = [re.sub(r"[-=().].*|^from .*", "", name) for cell in cells for name in cell]
    names = [name for name in names if re.fullmatch(r"\w*_\w+", name)]  # flags, fields, methods; not code
    with pytest.raises(SystemExit):
        parse(["--help"])
    known = {flag.lstrip("-") for flag in re.findall(r"--\w+", capsys.readouterr().out)} | set(dir(SpeechLLM))
    known |= {"max_new_tokens", "audio_attention_mask", "attention_mask"}  # arguments of generate
    assert len(names) > 8 and [name for name in names if name not in known] == []


# What is saved


def test_only_the_projector_is_saved_and_the_folder_says_how_to_use_it(trained, world, monkeypatch):
    assert weights(trained).keys() == PROJECTOR
    assert weights(trained / "checkpoint-5").keys() == PROJECTOR
    assert_same(weights(trained), weights(trained / "checkpoint-10"))
    config = json.loads((trained / "config.json").read_text())
    wanted = {"projector_stride": 5, "projector_hidden_size": 64, "encoder_size": 32, "hidden_size": 48}
    wanted |= {"llm_model_name_or_path": str(world / "chinese_llm"), "encoder_name_or_path": str(world / "whisper.pt")}
    assert {name: config[name] for name in wanted} == wanted  # the run was given relative paths
    assert config["training"]["steps"] == 10
    fingerprint = Manifest(world / "corpus.jsonl").fingerprint()
    assert config["training"]["trained on"] == f"corpus.jsonl: 20 utterances, 0.01 hours, fingerprint {fingerprint}"
    monkeypatch.chdir("/")
    assert_same(SpeechLLM.from_pretrained(trained).parameters_to_save(), weights(trained))


def test_the_weights_are_saved_at_the_end_even_without_checkpoints(chinese_llm, call, tmp_path):
    call(train.main, f"{CORPUS} --output_dir {tmp_path} --max_steps 2 --save_strategy no")
    assert weights(tmp_path).keys() == PROJECTOR and not checkpoints(tmp_path)


def test_weights_alone_are_saved_when_asked_and_nothing_goes_on_from_them(chinese_llm, call, tmp_path):
    flags = f"{CORPUS} --max_steps 2 --save_steps 1 --save_only_model"
    call(train.main, f"{flags} --output_dir {tmp_path}/light")
    last = tmp_path / "light/checkpoint-2"
    assert weights(last).keys() == PROJECTOR and not (last / "optimizer.pt").exists()
    error = error_of(call, f"{flags} --output_dir {tmp_path}/light")
    start = re.search("--projector_model_path [^ ]+", error)[0]
    call(train.main, f"{flags} --output_dir {tmp_path}/from_light {start}")
    assert weights(tmp_path / "from_light").keys() == PROJECTOR


def test_frozen_weights_can_be_held_in_another_dtype(world, chinese_llm, call, tmp_path):
    shutil.copytree(chinese_llm, tmp_path / "bf16")
    llm = transformers.AutoModelForCausalLM.from_pretrained(chinese_llm, dtype=torch.bfloat16)
    llm.save_pretrained(tmp_path / "bf16")
    for flags, dtype in (("", torch.bfloat16), ("--dtype float32", torch.float32)):
        run = f"--llm_model_name_or_path {tmp_path}/bf16 {flags} --output_dir {tmp_path}/run{dtype}"
        call(train.main, f"{CORPUS} {run} --max_steps 1 --save_strategy no")
        assert SpeechLLM.from_pretrained(tmp_path / f"run{dtype}").llm.dtype == dtype


# Training


def test_two_processes_train_what_one_trains_with_the_same_total_batch(trained, ddp):
    assert losses(ddp) == pytest.approx(losses(trained), abs=1e-3)
    assert_same(weights(ddp), weights(trained), within=1e-5)


def test_two_processes_train_an_encoder_of_which_a_chosen_layer_leaves_some_unused(chinese_llm, launch, tmp_path):
    flags = f"--max_steps 3 --freeze_params ^llm --encoder_layer 1 --output_dir {tmp_path}"
    job = launch("train.py", f"{CORPUS} {flags} --per_device_train_batch_size 2", processes=2).wait()
    assert job.status == 0, job.err
    assert any(name.startswith("encoder.") for name in weights(tmp_path))


def test_overfitting_a_few_clips_brings_the_loss_down(world, call, tmp_path):
    """The best that a projector before a random LLM can do; four clips of the same text."""
    write_manifest(tmp_path / "few.jsonl", [good(world, number) for number in (3, 6, 9, 12)])
    flags = f"{TRAIN_FLAGS} --llm_model_name_or_path llm --data_path {tmp_path}/few.jsonl --logging_steps 10"
    flags += f" --output_dir {tmp_path}/run --max_steps 60 --save_steps 60 --per_device_train_batch_size 4"
    call(train.main, f"{flags} --learning_rate 3e-3")
    means = losses(tmp_path / "run")
    assert len(means) == 6 and means[-1] < 0.6 * means[0]


def test_gradient_checkpointing_changes_no_weight(call, chinese_llm, tmp_path):
    flags = f"{CORPUS} --max_steps 3 --save_steps 3 --per_device_train_batch_size 4 --output_dir {tmp_path}"
    for run in ("stored", "recomputed --gradient_checkpointing"):
        call(train.main, f"{flags}/{run}")
    assert_same(weights(tmp_path / "recomputed"), weights(tmp_path / "stored"), within=1e-6)


def test_label_smoothing_and_random_sampling_are_heeded(call, chinese_llm, tmp_path):
    """Smoothed targets change the first loss; random sampling is another order of the clips, the same a second time."""
    flags = f"{CORPUS} --max_steps 3 --save_steps 3"
    variants = {
        "exact": "--per_device_train_batch_size 20",
        "smoothed": "--per_device_train_batch_size 20 --label_smoothing_factor 0.2",
        "shuffled": "--per_device_train_batch_size 4 --train_sampling_strategy random",
        "again": "--per_device_train_batch_size 4 --train_sampling_strategy random",
        "sorted": "--per_device_train_batch_size 4",
    }
    for name, more in variants.items():
        call(train.main, f"{flags} --output_dir {tmp_path}/{name} {more}")
    first = {name: losses(tmp_path / name)[0] for name in variants}
    assert first["smoothed"] != pytest.approx(first["exact"], abs=1e-3)
    assert losses(tmp_path / "shuffled") == losses(tmp_path / "again")
    assert first["shuffled"] != pytest.approx(first["sorted"], abs=1e-3)


def test_neftune_adds_its_noise(call, chinese_llm, tmp_path):
    weights_of_runs = []
    for run in ("quiet", "noisy --neftune_noise_alpha 5", "loud --neftune_noise_alpha 50"):
        call(train.main, f"{CORPUS} --max_steps 2 --save_strategy no --output_dir {tmp_path}/{run}")
        weights_of_runs.append(weights(tmp_path / run.split()[0])["projector.conv.weight"])
    quiet, noisy, loud = weights_of_runs
    assert not quiet.equal(noisy) and not noisy.equal(loud)


def test_augmentation_is_another_in_each_epoch_and_the_same_after_a_resume(call, chinese_llm, tmp_path):
    flags = f"{CORPUS} --max_steps 4 --save_steps 2 --per_device_train_batch_size 10 --learning_rate 1e-3"
    call(train.main, f"{flags} --output_dir {tmp_path}/plain")
    augmented = f"{flags} --augment gain speed --output_dir {tmp_path}"
    call(train.main, f"{augmented}/whole")
    copy_until(tmp_path / "whole", 2, tmp_path / "resumed")
    assert "checkpoint-2\n" in call(train.main, f"{augmented}/resumed").out
    assert_same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "whole")[0] != pytest.approx(losses(tmp_path / "plain")[0], abs=1e-3)
    assert "augment was ['gain', 'speed'] and is ['speed']" in error_of(call, f"{augmented}/whole --augment speed")
    error = error_of(call, f"{CORPUS} --augment reverb --output_dir never")
    assert error == "--augment reverb: wanted some of gain, speed, noise, room, telephone, mask"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_bf16_works_without_a_gpu_though_nobody_says_use_cpu(call, chinese_llm, tmp_path):
    flags = CORPUS.replace("--use_cpu ", "")
    call(train.main, f"{flags} --bf16 True --max_steps 1 --save_strategy no --output_dir {tmp_path}")
    assert {weight.dtype for weight in weights(tmp_path).values()} == {torch.float32}


def test_the_progress_bar_shows_the_loss_of_every_step(call, chinese_llm, tmp_path):
    flags = "--max_steps 3 --save_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    screen = call(train.main, f"{CORPUS} {flags} --output_dir {tmp_path}")
    shown = [float(value) for value in re.findall(r"\bloss=([\d.]+)", screen.err)]
    assert list(dict.fromkeys(shown)) == pytest.approx(losses(tmp_path), abs=1e-3)
    quiet = call(train.main, f"{CORPUS} {flags} --output_dir {tmp_path}/quiet --disable_tqdm True")
    assert "loss=" not in quiet.err


def test_training_with_nothing_to_train_is_an_error(call, chinese_llm):
    assert "nothing to train" in error_of(call, f"{CORPUS} --output_dir never --freeze_params .")


# Evaluation


def test_evaluation_reports_loss_and_wer_whatever_the_batch_and_the_number_of_processes(
    trained, ddp, world, monkeypatch
):
    """Seven clips in batches of 3 and 1, on one process and on two; the loss is that of each clip on its own."""
    single = evaluations(trained)
    assert len(single) == 2
    assert np.array(evaluations(ddp)) == pytest.approx(np.array(single), rel=1e-4)  # a loss of about ten
    monkeypatch.chdir(world)
    model = SpeechLLM.from_pretrained(trained)
    total = tokens = 0
    for example in model.make_dataset(Manifest("eval.jsonl")):
        total += model(**collate([example]), num_items_in_batch=1).loss.item()
        tokens += len(example["target_ids"])
    assert single[-1][0] == pytest.approx(total / tokens, abs=1e-4)


def test_evaluation_reads_and_encodes_each_clip_once(trained, world, monkeypatch):
    import dataset

    model, load_audio, clips_read, clips_encoded = SpeechLLM.from_pretrained(trained), dataset.load_audio, [], []
    monkeypatch.setattr(dataset, "load_audio", lambda path, *times: clips_read.append(path) or load_audio(path, *times))
    model.encoder.register_forward_hook(lambda encoder, inputs, frames: clips_encoded.extend(frames))
    _, _, args = parse([*FLAGS.split(), "--per_device_eval_batch_size", "3"])
    evaluation = evaluate(model, model.make_dataset(Manifest(world / "eval.jsonl")), args)
    assert evaluation.metrics.keys() == {"loss", "wer", "listening_gap"} and not evaluation.skipped
    assert len(set(clips_read)) == 7
    assert len(clips_read) == len(clips_encoded) == 7 + 2  # the longest two serve the listening gap as well


def test_an_evaluation_set_alone_is_evaluated_at_the_end(trained, call, tmp_path):
    screen = call(train.main, f"{CORPUS} --eval_data_path eval.jsonl --max_steps 2 --output_dir {tmp_path}")
    assert len(re.findall(r"evaluation: loss \d+\.\d+, WER \d+\.\d\d%", screen.out)) == 1
    assert screen.out.count("  reference  ") == screen.out.count("  hypothesis ") == 3
    facts = json.loads((tmp_path / "config.json").read_text())["training"]
    assert {"evaluation loss", "evaluation wer"} <= facts.keys()


def test_an_evaluation_that_fails_at_the_end_loses_nothing(chinese_llm, call, tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    write_manifest(tmp_path / "bad_eval.jsonl", [{"wav": "nan.wav", "txt": "hello"}])
    flags = f"--eval_data_path {tmp_path}/bad_eval.jsonl --max_steps 2 --save_strategy no --output_dir {tmp_path}/run"
    assert "bad_eval.jsonl:1" in error_of(call, f"{CORPUS} {flags}")
    assert weights(tmp_path / "run").keys() == PROJECTOR


def test_the_checkpoint_of_the_best_wer_is_kept_and_loaded(trained, call, tmp_path):
    flags = "--metric_for_best_model wer --load_best_model_at_end --save_total_limit 1 --eval_steps 2 --save_steps 2"
    flags = f"{TRAIN_FLAGS} {TRAINED_FLAGS} --per_device_train_batch_size 4 {flags} --output_dir {tmp_path}"
    call(train.main, flags)
    state = json.loads((tmp_path / f"checkpoint-{checkpoints(tmp_path)[-1]}/trainer_state.json").read_text())
    rates = {row["step"]: row["eval_wer"] for row in state["log_history"] if "eval_wer" in row}
    first = min(rates, key=rates.get)
    assert state["best_metric"] == min(rates.values())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{first}"
    assert_same(weights(tmp_path), weights(tmp_path / f"checkpoint-{first}"))
    facts = json.loads((tmp_path / "config.json").read_text())["training"]  # of these weights, not of the last step
    assert facts["steps"] == facts["evaluation after steps"] == first
    assert facts["evaluation wer"] == pytest.approx(rates[first], abs=1e-4)


# Wrong input. BAD makes the second line of a manifest wrong, in a folder.


def no_file(folder):
    return {"wav": "nowhere.wav", "txt": "hello"}


def no_audio(folder):
    (folder / "text.wav").write_text("this is no audio")
    return {"wav": "text.wav", "txt": "hello"}


def clip(folder, name: str, seconds: float) -> dict:
    samples = np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)
    soundfile.write(folder / name, samples, 16000, subtype="FLOAT")
    return {"wav": name, "txt": "hello"}


def not_a_number(folder):
    record = clip(folder, "nan.wav", 1)
    samples, rate = soundfile.read(folder / "nan.wav")
    samples[8000] = np.nan
    soundfile.write(folder / "nan.wav", samples, rate, subtype="FLOAT")
    return record


BAD = {
    "a missing file": (no_file, "nowhere.wav: no such file"),
    "no audio file": (no_audio, "text.wav: unreadable"),
    "no samples": (lambda folder: clip(folder, "empty.wav", 0), "empty"),
    "NaN in the audio": (not_a_number, "nan.wav: the audio holds NaN"),
    "0.01 s": (lambda folder: clip(folder, "short.wav", 0.01), "too short"),
    "0.08 s": (lambda folder: clip(folder, "shorter.wav", 0.08), "too short"),
    "a long clip": (lambda folder: clip(folder, "long.wav", 4.5), "4.50 s of audio, over --max_seconds 4"),
    "a long transcript": (lambda folder: clip(folder, "ok.wav", 1) | {"txt": "hello " * 200}, "--model_max_length"),
}
BAD_FLAGS = f"{TRAIN_FLAGS} --max_steps 4 --save_strategy no --max_seconds 4 --model_max_length 256"


@pytest.mark.parametrize("kind", BAD)
def test_an_utterance_that_cannot_be_used_stops_training_with_its_line(kind, world, chinese_llm, call, tmp_path):
    make, reason = BAD[kind]
    manifest = write_manifest(tmp_path / "bad.jsonl", [good(world), make(tmp_path), good(world, 1)])
    with pytest.raises(BadUtterance) as error:
        call(train.main, f"{BAD_FLAGS} --data_path {manifest} --output_dir {tmp_path}/run")
    assert str(error.value).startswith(f"{manifest}:2: ") and reason in str(error.value)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_the_command_tells_the_cure_of_a_bad_utterance_with_exit_status_2(world, chinese_llm, launch, tmp_path):
    """Though a loader process finds it, whose traceback PyTorch puts into the message."""
    manifest = write_manifest(tmp_path / "bad.jsonl", [good(world), not_a_number(tmp_path), good(world, 1)])
    flags = f"--data_path {manifest} --output_dir {tmp_path}/run --dataloader_num_workers 1"
    error = launch("train.py", f"{BAD_FLAGS} {flags}").wait().the_error()
    assert error.startswith(f"error: {manifest}:2: ") and error.endswith("mend it, or pass --on_bad_audio skip")


def test_bad_utterances_are_skipped_counted_and_listed_when_asked(world, chinese_llm, call, tmp_path):
    rows = [row for number, (make, _) in enumerate(BAD.values()) for row in (good(world, number), make(tmp_path))]
    manifest = write_manifest(tmp_path / "mixed.jsonl", rows)
    flags = f"--data_path {manifest} --output_dir {tmp_path}/run --on_bad_audio skip"
    screen = call(train.main, f"{BAD_FLAGS} {flags} --per_device_train_batch_size 4")
    assert weights(tmp_path / "run").keys() == PROJECTOR
    _, listed = screen.err.split(f"skipped {len(BAD)} bad utterances:\n")
    assert len(listed.splitlines()) == len(BAD)
    for number, (_, reason) in enumerate(BAD.values()):
        (line,) = [line for line in listed.splitlines() if f"{manifest}:{2 * number + 2}: " in line]
        assert reason in line


def test_a_skipped_utterance_leaves_no_trace_in_the_weights(world, chinese_llm, tmp_path):
    """A clip that turns out bad when it is read stands in its batch without a label."""
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), str(chinese_llm), projector_hidden_size=64)
    manifest = write_manifest(tmp_path / "mixed.jsonl", [good(world, 3), not_a_number(tmp_path)])
    dataset = model.make_dataset(Manifest(str(manifest)), on_bad="skip")
    gradients = []
    for examples in ([dataset[0]], [dataset[0], dataset[1]]):
        model.zero_grad()
        model(**collate(examples)).loss.backward()
        gradients.append(model.projector.linear2.weight.grad.clone())
    alone, beside_a_bad_one = gradients
    assert (alone - beside_a_bad_one).norm() < 1e-4 * alone.norm()
    with pytest.raises(BadUtterance, match=r"mixed\.jsonl:2: .*NaN"):
        model.make_dataset(Manifest(str(manifest)))[1]


@pytest.mark.parametrize("kind", ["a missing file", "NaN in the audio"])
def test_training_on_nothing_but_bad_utterances_is_an_error(kind, chinese_llm, call, tmp_path):
    record = BAD[kind][0](tmp_path)
    manifest = write_manifest(tmp_path / "all_bad.jsonl", [record, record, record])
    flags = f"--data_path {manifest} --output_dir {tmp_path}/run --on_bad_audio skip"
    error = error_of(call, f"{BAD_FLAGS} {flags}")
    assert "all_bad.jsonl:" in error and Path(record["wav"]).name in error
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--llm_model_name_or_path no_llm", "no_llm: cannot load the LLM"),
        ("--whisper_model_name_or_path no_whisper", "no_whisper: cannot load a speech encoder"),
        ("--projector_model_path nowhere/model.safetensors", "nowhere/model.safetensors"),
        ("--projector_model_path trained/model.safetensors --projector_hidden_size 32", "linear1.weight"),
        ("--eval_data_path nowhere.jsonl --eval_strategy epoch", "nowhere.jsonl: no such manifest"),
        ("--eval_strategy epoch", "--eval_data_path"),
        ("--prompt 'Transcribe the speech'", "<audio>"),
    ],
)
def test_other_wrong_input_is_one_line_too(flags, told, trained, call, tmp_path):
    assert told in error_of(call, f"{BAD_FLAGS} --data_path corpus.jsonl --output_dir {tmp_path}/run {flags}")


# Private names of transformers, whose minor version requirements.txt pins for them


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("_get_train_sampler", "the order of utterances would no longer be ours, nor the same after a resume"),
        ("_run_epoch", "a run that has ended would take one step more when it is started again"),
        ("_save_rng_state", "trainer_state.json might be written before all processes have saved"),
        ("_issue_warnings_after_load", "every resume would warn of the frozen weights that a checkpoint lacks"),
    ],
)
def test_trainer_still_calls_the_private_method_that_we_override(method, loss):
    calls = re.findall(rf"self\.{method}\b", inspect.getsource(transformers.Trainer))
    told = f"transformers {transformers.__version__}: Trainer does not call {method} any more: {loss}"
    assert method in vars(transformers.Trainer) and calls, told
    assert method in vars(train.SpeechTrainer)


def test_the_progress_bar_of_trainer_still_has_its_name():
    told = f"transformers {transformers.__version__}: ProgressCallback.training_bar is gone: no loss is shown"
    assert vars(transformers.ProgressCallback()).get("training_bar", "gone") is None, told


# The order of the utterances


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 30, count)


def positions_of(sampler: LengthSampler) -> list[int]:
    return [position for _, position in sampler]


@pytest.mark.filterwarnings("ignore:3 utterances")
@pytest.mark.parametrize("count", [0, 3, 8, 1003])
def test_every_utterance_comes_once_an_epoch_and_some_again_to_fill_the_last_batch(count):
    sampler = LengthSampler(lengths_of(count), batch_size=8, seed=0)
    order = positions_of(sampler)
    assert set(order) == set(range(count))
    assert len(order) == len(sampler) == -(-count // 8) * 8


def test_the_last_batch_can_be_dropped():
    sampler = LengthSampler(lengths_of(1003), batch_size=8, seed=0, drop_last=True)
    order = positions_of(sampler)
    assert len(order) == len(set(order)) == len(sampler) == 1000
    with pytest.raises(InputError, match="--dataloader_drop_last: 7 utterances do not fill one batch of 8"):
        LengthSampler(lengths_of(7), batch_size=8, seed=0, drop_last=True)


def test_utterances_too_few_for_a_batch_are_told_how_often_they_come():
    with pytest.warns(UserWarning, match=r"20 utterances fill a batch of 128: each comes 6\.4 times an epoch"):
        LengthSampler(lengths_of(20), batch_size=128, seed=0)


def test_a_batch_holds_similar_lengths_and_batches_come_in_no_order_of_length():
    lengths = lengths_of(1600)
    batches = lengths[positions_of(LengthSampler(lengths, batch_size=8, seed=0))].reshape(-1, 8)
    assert np.ptp(batches, axis=1).mean() < 1.5  # seconds
    assert abs(np.corrcoef(batches[:-1].mean(1), batches[1:].mean(1))[0, 1]) < 0.3


def test_batches_may_hold_any_lengths():
    lengths = lengths_of(1600)
    order = positions_of(LengthSampler(np.zeros(1600), batch_size=8, seed=0))  # as --train_sampling_strategy random
    assert sorted(order) == list(range(1600))
    assert np.ptp(lengths[order].reshape(-1, 8), axis=1).mean() > 20  # seconds


def test_the_order_is_another_each_epoch_and_seed_and_else_the_same():
    lengths = lengths_of(200)
    orders = {
        (seed, epoch): positions_of(LengthSampler(lengths, 8, seed, lambda epoch=epoch: epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 0] == positions_of(LengthSampler(lengths, 8, seed=1))


def test_each_position_comes_with_its_epoch_which_the_augmentation_depends_on():
    sampler = LengthSampler(lengths_of(16), 8, seed=0, epoch=lambda: 5)
    assert {epoch for epoch, _ in sampler} == {5}


def test_each_optimiser_step_sees_the_same_utterances_on_any_number_of_processes():
    def steps(processes: int, accumulation: int, size: int) -> list[set[int]]:
        sampler = LengthSampler(lengths_of(160), processes * accumulation * size, seed=3)
        batches = BatchSampler(sampler, size, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        rows = [sum(parts, []) for parts in zip(*shards, strict=True)]  # what all processes see at once
        return [set(sum(rows[n : n + accumulation], [])) for n in range(0, len(rows), accumulation)]

    wanted = steps(1, 1, 16)
    assert len(wanted) == 10
    assert steps(2, 1, 8) == steps(4, 2, 2) == steps(1, 4, 4) == wanted


# Nothing is lost


def test_a_loss_that_is_no_number_stops_the_run_at_once_with_the_clips_of_its_batch(trained, call, world, tmp_path):
    call(train.main, f"{CORPUS} --max_steps 2 --save_steps 1 --output_dir {tmp_path}")
    checkpoint = tmp_path / "checkpoint-2"
    good = weights(checkpoint)
    flags = f"{CORPUS} --max_steps 4 --save_steps 1 --learning_rate 1e30 --output_dir {tmp_path / 'high'}"
    with pytest.raises(InputError, match=r"^the loss of step [23] is (nan|inf), with corpus.jsonl:\d+, .*; look at"):
        call(train.main, flags)
    assert max(checkpoints(tmp_path / "high"), default=1) <= 2  # the last one is of a step before
    assert all(torch.isfinite(tensor).all() for tensor in good.values())


def test_all_processes_save_and_stop_together_whichever_gets_the_sigterm(launch, trained, tmp_path):
    job = launch("train.py", f"{CORPUS} --max_steps 300 --output_dir {tmp_path}", processes=2)
    terminate(job, lambda: "'loss'" in job.out, rank=1)  # both are at it
    assert "is saved; the same command goes on from it" in job.wait(60).the_error()
    assert len(checkpoints(tmp_path)) == 1


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(trained, call, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails in the same place."""
    flags = f"{CORPUS} --save_steps 1 --output_dir {tmp_path}"
    call(train.main, f"{flags} --max_steps 1")
    before = weights(tmp_path / "checkpoint-1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"cannot save step 2 \(.*\); wanted room on the disk; earlier checkpoints"
        ):
            call(train.main, f"{flags} --max_steps 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(weights(tmp_path / "checkpoint-1"), before)
    call(train.main, f"{flags} --max_steps 2")
    assert checkpoints(tmp_path) == [1, 2]


# The record of the experiment


def test_experiment_md_holds_what_it_takes_to_repeat_the_run_and_what_came_of_it(trained, call, tmp_path):
    flags = f"{CORPUS} --eval_data_path eval.jsonl --output_dir {tmp_path}"
    call(train.main, f"{flags} --max_steps 1 --save_steps 1")
    call(train.main, f"{flags} --max_steps 2 --save_steps 1")
    text = (tmp_path / "experiment.md").read_text()
    events = re.findall(r"^## 20\d\d-\d\d-\d\d \d\d:\d\d UTC: (.*)$", text, re.MULTILINE)
    assert events == ["starts", "is done", f"goes on from {tmp_path}/checkpoint-1", "is done"]
    assert f"| command | `train.py {flags} --max_steps 1 --save_steps 1` |" in text
    assert re.search(r"\| commit \| ([0-9a-f]{40}|unknown|no git)", text) and f"torch {torch.__version__}" in text
    fingerprint = Manifest(trained.parent / "corpus.jsonl").fingerprint()
    assert f"| trained on | corpus.jsonl: 20 utterances, 0.01 hours, fingerprint {fingerprint} |" in text
    assert "| evaluation wer |" in text and "| projector |" in text


def test_checkpoints_are_chosen_on_one_manifest_and_tested_on_another(trained, call, world, tmp_path):
    flags = f"{CORPUS} --select_on eval.jsonl --eval_data_path corpus.jsonl --eval_strategy steps --eval_steps 1"
    flags += f" --save_steps 1 --max_steps 2 --save_best_by loss --output_dir {tmp_path}"
    call(train.main, flags)
    last, best = (
        json.loads((tmp_path / name / "config.json").read_text())["training"] for name in ("", "checkpoint-2")
    )
    assert {"evaluation loss", "test loss", "test wer"} <= last.keys()
    assert best["chosen on"] == Manifest(world / "eval.jsonl").fingerprint()
    assert "chosen on" not in last  # these weights are the last, whatever was chosen

    def out(model: str, manifest: str) -> str:
        flags = f"--max_new_tokens 2 --num_beams 1 --num_workers 0 --data_path {manifest}"
        return call(recognize.main, f"--model_path {tmp_path}/{model} {flags} --result_path {tmp_path}/result.txt").out

    warning = "chosen on this very manifest"
    assert warning in out("checkpoint-2", "eval.jsonl")
    assert warning not in out("checkpoint-2", "corpus.jsonl")
    assert warning not in out(".", "eval.jsonl")
    assert [row for row in history(tmp_path) if "test_loss" in row] == []  # the checkpoints never saw it
