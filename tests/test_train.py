"""The training command: its arguments, what it saves, that it goes on after a kill, and what it says of wrong input.

Most runs are calls of main in this process (`call` in conftest.py). Processes are started (`launch`) where they are
the point: a kill, several ranks, an exit status.
"""

import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT, TRAIN_FLAGS, TRAINED_FLAGS, write_manifest
from runs import PROJECTOR, assert_same, checkpoints, evaluations, history, losses, weights
from torch.utils.data import BatchSampler

import recognize
import train
from dataset import collate
from errors import BadUtterance, InputError
from evaluate import evaluate
from manifest import Manifest
from model import SpeechLLM
from resume import find_checkpoint
from train import LengthSampler, parse

FLAGS = "--llm_model_name_or_path llm --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --use_cpu"


def error_of(call, flags: str) -> str:
    """The one line that train.py says of wrong input."""
    with pytest.raises(InputError) as error:
        call(train.main, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# Flags and YAML files

SECTIONS = """
model:
  encoder_name_or_path: microsoft/wavlm-large
  llm_model_name_or_path: meta-llama/Llama-3.2-1B
  projector: mlp
  freeze_params: ["^llm\\\\.", "^encoder\\\\."]
  lora_target_modules: [q_proj, v_proj]
  system_prompt: null
data:
  data_path: train.jsonl
training:
  output_dir: run
  learning_rate: 1e-4
  gradient_checkpointing: true
  bf16: false
  use_cpu: true
  lr_scheduler_kwargs: {num_cycles: 2}
"""


def write(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


def test_a_yaml_file_stands_for_flags(tmp_path):
    model, data, training = parse([write(tmp_path, SECTIONS)])
    assert (model.encoder_name_or_path, model.projector) == ("microsoft/wavlm-large", "mlp")
    assert model.freeze_params == [r"^llm\.", r"^encoder\."] and model.lora_target_modules == ["q_proj", "v_proj"]
    assert model.system_prompt is None and data.data_path == "train.jsonl"
    assert (training.learning_rate, training.bf16, training.lr_scheduler_kwargs) == (1e-4, False, {"num_cycles": 2})


def test_sections_may_be_left_out(tmp_path):
    flat = yaml.safe_dump({key: value for part in yaml.safe_load(SECTIONS).values() for key, value in part.items()})
    for flat_group, group in zip(parse([write(tmp_path, flat)]), parse([write(tmp_path, SECTIONS)]), strict=True):
        assert flat_group.to_dict() == group.to_dict() if hasattr(group, "to_dict") else flat_group == group


def test_the_command_line_wins(tmp_path):
    path = write(tmp_path, SECTIONS)
    flags = ["--learning_rate", "3e-3", "--lora_target_modules", "up_proj", "--projector=linear"]
    model, _, training = parse([path, *flags])
    assert (training.learning_rate, model.lora_target_modules, model.projector) == (3e-3, ["up_proj"], "linear")


def test_the_file_stands_first_with_or_without_a_flag_of_its_own(tmp_path, capsys):
    path = write(tmp_path, SECTIONS)
    for argv in ([path, "--seed", "3"], ["--config", path, "--seed=3"]):
        _, _, training = parse(argv)
        assert (training.seed, training.output_dir) == (3, "run")
    with pytest.raises(SystemExit):
        parse(["--seed", "3", path])
    assert "Traceback" not in capsys.readouterr().err


def test_a_list_of_one_stands_for_its_value(tmp_path):
    _, _, training = parse([write(tmp_path, SECTIONS + "  report_to: [none]\n")])
    assert training.report_to == []


PARTS = "llm_model_name_or_path: llm\ndata_path: a\noutput_dir: b\nuse_cpu: true\n"


def test_old_names_work_in_a_file_too(tmp_path):
    model, _, training = parse([write(tmp_path, f"{PARTS}whisper_model_name_or_path: tiny\nwarmup_ratio: 0.1\n")])
    assert model.encoder_name_or_path == "tiny" and training.warmup_steps == 0.1


def test_a_bare_no_and_a_leading_dash_mean_what_they_say(tmp_path):
    model, _, training = parse([write(tmp_path, f"{PARTS}save_strategy: no\nsystem_prompt: '-be nice'\n")])
    assert training.save_strategy == "no" and model.system_prompt == "-be nice"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {projectr: mlp}", r"unknown key 'projectr'; did you mean projector\?$"),
        ("learning_rte: 1", r"unknown key 'learning_rte'; did you mean learning_rate\?$"),
        ("LEARNING_RATE: 1", r"unknown key 'LEARNING_RATE'; did you mean learning_rate\?$"),
        ("downsample_factor: 5", "unknown key 'downsample_factor'; did you mean"),
        ("xyz: 1", "unknown key 'xyz'$"),
        ("model: mlp", "wanted keys and values"),
        ("- a", "wanted keys and values"),
        ("a: [", "cannot be read .* line 1, column"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_that_names_it(tmp_path, text, told):
    with pytest.raises(InputError, match=rf"config\.yaml: {told}") as error:
        parse([write(tmp_path, text)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"), [("report_to: []", "--report_to"), ("seed: many", "--seed"), ("seed: [1, 2]", "arguments: 2")]
)
def test_a_value_that_a_key_cannot_have_is_told_as_that_of_a_flag_is(tmp_path, text, told, capsys):
    with pytest.raises(SystemExit):
        parse([write(tmp_path, f"{PARTS}encoder_name_or_path: tiny\n{text}")])
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        parse(["nowhere.yaml"])


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
        ("--fsdp full_shard", "--deepspeed"),
        (f"--deepspeed {ROOT}/ds_config_zero3.json", "start it with torchrun"),
        ("--per_device_train_batch_size 0", "wanted 1 or more"),
        ("--gradient_accumulation_steps 0", "wanted 1 or more"),
        (f"--output_dir {ROOT}/README.md", "a file is there"),
        ("""--gradient_checkpointing_kwargs '{"use_reentrant": true}'""", "wanted false"),
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
    assert data.data_path == "train.jsonl" and training.output_dir
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
    assert config["training"].items() >= {"data": "corpus.jsonl", "utterances": 20, "steps": 10}.items()
    monkeypatch.chdir("/")
    assert_same(SpeechLLM.from_pretrained(trained).parameters_to_save(), weights(trained))


CORPUS = f"{TRAIN_FLAGS} --data_path corpus.jsonl"


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


@pytest.fixture(scope="session")
def ddp(world, trained, launch) -> Path:
    """The run of `trained` under DistributedDataParallel on two processes."""
    batches = "--per_device_train_batch_size 2 --per_device_eval_batch_size 1"
    job = launch("train.py", f"{TRAIN_FLAGS} {TRAINED_FLAGS} {batches} --output_dir ddp", processes=2).wait()
    assert job.status == 0, job.err
    return world / "ddp"


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
    assert error == "--augment reverb: wanted some of gain, speed"


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


# Going on after a kill. 20 clips in batches of 2, three to a step: four steps an epoch, the last of one batch only.

RESUMED = f"{CORPUS} --num_train_epochs 4 --per_device_train_batch_size 2 --learning_rate 1e-3 "
RESUMED += "--gradient_accumulation_steps 3 --save_steps 3"


@pytest.fixture(scope="session")
def never_stopped(world, chinese_llm, call) -> Path:
    assert "going on" not in call(train.main, f"{RESUMED} --output_dir never_stopped").out
    assert len(losses(world / "never_stopped")) == 16
    return world / "never_stopped"


def copy_until(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was after a step: of its checkpoints those till then, without the last weights."""
    later = [f"checkpoint-{other}" for other in checkpoints(run) if other > step]
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*later))
    (copy / "model.safetensors").unlink()
    return copy


def test_a_run_killed_twice_ends_with_the_very_weights_of_one_never_stopped(world, never_stopped, launch):
    folder, flags = world / "killed", f"{RESUMED} --output_dir killed"
    launch("train.py", flags, die_at="killed/checkpoint-6").died()  # checkpoint-3: in the middle of the first epoch
    second = launch("train.py", flags, die_at="killed/checkpoint-12").died()
    assert "going on from killed/checkpoint-3\n" in second.out
    assert not (folder / "model.safetensors").exists()
    third = launch("train.py", flags).wait()
    assert third.status == 0, third.err
    assert "going on from killed/checkpoint-9\n" in third.out
    assert_same(weights(folder), weights(never_stopped))
    assert losses(folder) == losses(never_stopped)


@pytest.mark.parametrize("torn", ["missing", "empty", "half"])
def test_a_checkpoint_torn_by_the_kill_is_passed_over(torn, tmp_path, never_stopped, call):
    """trainer_state.json is what is written last."""
    state = copy_until(never_stopped, 15, tmp_path / "run") / "checkpoint-15/trainer_state.json"
    whole = state.read_text()
    state.unlink()
    if torn != "missing":
        state.write_text("" if torn == "empty" else whole[: len(whole) // 2])
    (tmp_path / "run/checkpoint-15/optimizer.pt").write_bytes(b"torn")
    screen = call(train.main, f"{RESUMED} --output_dir {tmp_path}/run")
    assert f"going on from {tmp_path}/run/checkpoint-12\n" in screen.out
    assert_same(weights(tmp_path / "run"), weights(never_stopped))


def test_the_same_command_after_the_end_changes_nothing(tmp_path, never_stopped, call):
    shutil.copytree(never_stopped, tmp_path / "run")
    screen = call(train.main, f"{RESUMED} --output_dir {tmp_path}/run")
    assert f"going on from {tmp_path}/run/checkpoint-16\n" in screen.out
    assert_same(weights(tmp_path / "run"), weights(never_stopped))


def test_the_same_command_after_the_last_of_max_steps_changes_nothing(chinese_llm, call, tmp_path):
    """In the middle of an epoch, where Trainer would take one step more."""
    flags = f"{CORPUS} --per_device_train_batch_size 2 --max_steps 4 --save_steps 2"
    flags += f" --learning_rate 1e-3 --lr_scheduler_type constant --output_dir {tmp_path}"
    call(train.main, flags)
    before = weights(tmp_path)
    assert f"going on from {tmp_path}/checkpoint-4\n" in call(train.main, flags).out
    assert_same(weights(tmp_path), before)
    assert checkpoints(tmp_path) == [2, 4]
    (tmp_path / "checkpoint-4/optimizer.pt").unlink()
    assert "no run can go on from weights alone" in error_of(call, flags)


def test_a_run_goes_on_from_a_chosen_checkpoint_in_a_folder_of_its_own(tmp_path, never_stopped, call):
    flags = f"{RESUMED} --resume_from_checkpoint never_stopped/checkpoint-6 --output_dir {tmp_path}/branch"
    assert "going on from never_stopped/checkpoint-6\n" in call(train.main, flags).out
    assert_same(weights(tmp_path / "branch"), weights(never_stopped))


def test_a_chosen_checkpoint_loses_nothing_of_what_came_later(tmp_path, never_stopped):
    run, chosen = tmp_path / "run", str(never_stopped / "checkpoint-6")
    assert find_checkpoint(str(run), chosen) == chosen
    shutil.copytree(never_stopped / "checkpoint-9", run / "checkpoint-9")  # the same command after a kill
    assert find_checkpoint(str(run), chosen) == f"{run}/checkpoint-9"
    with pytest.raises(InputError, match="checkpoint-9 is there too; choose another --output_dir"):
        find_checkpoint(str(run), str(never_stopped / "checkpoint-12"))
    last = find_checkpoint(str(never_stopped))
    assert find_checkpoint(str(never_stopped), last) == last
    with pytest.raises(InputError, match="checkpoint-16 is there too; choose another --output_dir"):
        find_checkpoint(str(never_stopped), chosen)
    with pytest.raises(InputError, match="--resume_from_checkpoint True: no complete checkpoint"):
        find_checkpoint(str(run), "True")


# Going on with other settings


@pytest.mark.parametrize(
    ("flags", "setting", "values"),
    [
        ("--learning_rate 2e-3", "learning_rate", ("0.001", "0.002")),
        ("--prompt '<audio> What was said?'", "prompt", ("Transcribe the speech", "What was said?")),
        ("--projector_stride 4", "projector_stride", ("5", "4")),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps", ("3", "2")),
        ("--num_train_epochs 3", "num_train_epochs", ("4.0", "3.0")),
        ("--max_steps 3", "max_steps", ("-1", "3")),
    ],
)
def test_a_restart_with_another_setting_is_refused(flags, setting, values, never_stopped, call):
    error = error_of(call, f"{RESUMED} --output_dir never_stopped {flags}")
    assert error.startswith("never_stopped/checkpoint-16: ")
    assert re.search(rf"\b{setting} was .*{re.escape(values[0])}.* and is .*{re.escape(values[1])}", error), error
    assert error.count(" and is ") == 1


@pytest.mark.parametrize("change", ["fewer", "another first line"])
def test_a_restart_with_other_data_is_refused(change, world, never_stopped, call, tmp_path):
    rows = (world / "corpus.jsonl").read_text().replace('"wav": "', f'"wav": "{world}/').splitlines(keepends=True)
    changed = rows[:-1] if change == "fewer" else [rows[1], *rows[1:]]
    (tmp_path / "changed.jsonl").write_text("".join(changed))
    error = error_of(call, f"{RESUMED} --output_dir never_stopped --data_path {tmp_path}/changed.jsonl")
    hashes = [Manifest(path).fingerprint() for path in (world / "corpus.jsonl", tmp_path / "changed.jsonl")]
    assert f"records was '{hashes[0]}' and is '{hashes[1]}'" in error
    assert ("num_records was 20 and is 19" in error) == (change == "fewer")


def test_a_run_goes_on_for_more_epochs_and_says_so(never_stopped, call, tmp_path):
    shutil.copytree(never_stopped, tmp_path / "run")
    out = call(train.main, f"{RESUMED} --output_dir {tmp_path}/run --num_train_epochs 5").out
    assert f"going on from {tmp_path}/run/checkpoint-16\n  num_train_epochs was 4.0, is 5.0\n" in out
    assert len(losses(tmp_path / "run")) == 20
    assert losses(tmp_path / "run")[:16] == losses(never_stopped)


def test_a_run_goes_on_for_more_steps_and_says_so(chinese_llm, call, tmp_path):
    flags = f"{CORPUS} --per_device_train_batch_size 2 --output_dir {tmp_path} --save_steps 2 --max_steps"
    call(train.main, f"{flags} 2")
    assert f"{tmp_path}/checkpoint-2\n  max_steps was 2, is 4\n" in call(train.main, f"{flags} 4").out
    assert checkpoints(tmp_path) == [2, 4] and len(losses(tmp_path)) == 4
    assert "max_steps was 4 and is 3" in error_of(call, f"{flags} 3")


def test_a_run_goes_on_with_lines_appended_to_its_manifest_and_says_so(world, chinese_llm, call, tmp_path):
    rows = [good(world, number) for number in range(10)]
    write_manifest(tmp_path / "grows.jsonl", rows[:8])
    flags = f"{TRAIN_FLAGS} --data_path {tmp_path}/grows.jsonl --output_dir {tmp_path}/run"
    flags += " --per_device_train_batch_size 2 --save_strategy epoch --num_train_epochs"
    call(train.main, f"{flags} 1")
    write_manifest(tmp_path / "grows.jsonl", rows)
    out = call(train.main, f"{flags} 2").out
    assert "checkpoint-4\n  num_train_epochs was 1.0, is 2.0\n  num_records was 8, is 10\n" in out
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["utterances"] == 10
    assert len(losses(tmp_path / "run")) > 4


def test_one_process_goes_on_where_two_were_killed_with_as_large_a_batch(ddp, call, tmp_path):
    """By accumulation: the weights are those of the two."""
    run = copy_until(ddp, 5, tmp_path / "run")
    flags = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --per_device_eval_batch_size 1"
    out = call(train.main, f"{TRAIN_FLAGS} {TRAINED_FLAGS} {flags} --output_dir {run}").out
    assert "\n  gradient_accumulation_steps was 1, is 2\n  world_size was 2, is 1\n" in out
    assert_same(weights(run), weights(ddp), within=1e-5)


def test_one_process_goes_on_where_two_were_killed_with_the_same_batch_on_each(ddp, call, tmp_path):
    run = copy_until(ddp, 5, tmp_path / "run")
    flags = "--per_device_train_batch_size 2 --eval_strategy no"
    out = call(train.main, f"{TRAIN_FLAGS} {TRAINED_FLAGS} {flags} --output_dir {run}").out
    assert "checkpoint-5\n  world_size was 2, is 1\n" in out
    assert losses(run)[:5] == losses(ddp)[:5]


def test_a_setting_that_the_checkpoint_does_not_know_is_said(never_stopped, call, tmp_path):
    run = copy_until(never_stopped, 15, tmp_path / "run")
    path = run / "checkpoint-15/train_settings.json"
    settings = json.loads(path.read_text())
    del settings["encoder_dropout"]  # as if a newer version had brought it
    path.write_text(json.dumps(settings))
    out = call(train.main, f"{RESUMED} --output_dir {run}").out
    assert "checkpoint-15\n  not compared: encoder_dropout\n" in out
    assert_same(weights(run), weights(never_stopped))


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


def good(world, number: int = 0) -> dict:
    return {"wav": str(world / f"clip{number}.wav"), "txt": "hello world"}


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
    told = f"transformers {transformers.__version__}: ProgressCallback.training_bar is gone: ShowLoss shows no loss"
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
    order = positions_of(LengthSampler(lengths, batch_size=8, seed=0, by_length=False))
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


def terminate(job, begun, rank: int = 0) -> None:
    """Send SIGTERM to a rank as soon as `begun()` is true."""
    while not begun():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.01)
    os.kill(job.processes[rank].pid, signal.SIGTERM)


def test_sigterm_saves_first_and_the_same_command_ends_with_the_weights_of_a_run_never_stopped(
    never_stopped, launch, tmp_path
):
    flags = f"{RESUMED} --output_dir {tmp_path}"
    job = launch("train.py", flags)
    terminate(job, (tmp_path / "experiment.md").is_file)  # which is written just before the first step
    assert "is saved; the same command goes on from it" in job.wait().the_error()
    assert max(checkpoints(tmp_path)) < 16 and not (tmp_path / "model.safetensors").exists()
    assert launch("train.py", flags).wait().status == 0
    assert_same(weights(tmp_path), weights(never_stopped))


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
    assert f"| trained on | 20 utterances, 0.01 hours, fingerprint {fingerprint} |" in text
    assert "| evaluation wer |" in text and "| projector |" in text


def test_checkpoints_are_chosen_on_one_manifest_and_tested_on_another(trained, call, world, tmp_path):
    flags = f"{CORPUS} --select_on eval.jsonl --eval_data_path corpus.jsonl --eval_strategy steps --eval_steps 1"
    flags += f" --save_steps 1 --max_steps 2 --save_best_by loss --output_dir {tmp_path}"
    call(train.main, flags)
    facts = json.loads((tmp_path / "config.json").read_text())["training"]
    assert {"evaluation loss", "test loss", "test wer"} <= facts.keys()
    assert facts["chosen on"] == Manifest(world / "eval.jsonl").fingerprint()
    decode = f"--model_path {tmp_path} --max_new_tokens 2 --num_beams 1 --num_workers 0 --data_path"
    told = "chosen on this very manifest"
    assert told in call(recognize.main, f"{decode} eval.jsonl --result_path {tmp_path}/dev.txt").out
    assert told not in call(recognize.main, f"{decode} corpus.jsonl --result_path {tmp_path}/test.txt").out
    assert [row for row in history(tmp_path) if "test_loss" in row] == []  # the checkpoints never saw it
