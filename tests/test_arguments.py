"""Arguments of train.py: flags, YAML files, and both."""

import shlex
from pathlib import Path

import pytest
import yaml
from arguments import parse
from conftest import ROOT

from manifest import InputError

FLAGS = "--llm_model_name_or_path llm --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --use_cpu"
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
    for got, wanted in zip(parse([write(tmp_path, flat)]), parse([write(tmp_path, SECTIONS)]), strict=True):
        assert got.to_dict() == wanted.to_dict() if hasattr(got, "to_dict") else got == wanted


def test_the_command_line_wins(tmp_path):
    path = write(tmp_path, SECTIONS)
    model, _, training = parse(
        [path, "--learning_rate", "3e-3", "--lora_target_modules", "up_proj", "--projector=linear"]
    )
    assert (training.learning_rate, model.lora_target_modules, model.projector) == (3e-3, ["up_proj"], "linear")


def test_the_file_may_stand_anywhere_and_after_a_flag_of_its_own(tmp_path):
    path = write(tmp_path, SECTIONS)
    wanted = vars(parse([path, "--seed", "3"])[2])
    given = (
        ["--seed", "3", path],
        ["--seed=3", path],
        ["--config", path, "--seed", "3"],
        ["--use_cpu", path, "--seed=3"],
    )
    for argv in (*given, ["--seed", "3", "--config", path], ["--seed", "3", f"--config={path}"]):
        found = vars(parse(argv)[2])
        assert (found["seed"], found["output_dir"]) == (wanted["seed"], wanted["output_dir"]) == (3, "run")


def test_the_best_error_rate_is_the_lowest():
    for metric, wanted in (("wer", False), ("eval_cer", False), ("loss", False), ("bleu", True)):
        best = f"--load_best_model_at_end --metric_for_best_model {metric} --eval_strategy steps --eval_data_path d"
        best += " --eval_steps 4 --save_steps 4"
        assert parse([*FLAGS.split(), *best.split()])[2].greater_is_better is wanted


def test_a_list_of_one_stands_for_its_value(tmp_path):
    _, _, training = parse([write(tmp_path, SECTIONS + "  report_to: [none]\n")])
    assert training.report_to == []


def test_old_names_work_in_a_file_too(tmp_path):
    text = "whisper_model_name_or_path: tiny\nllm_model_name_or_path: llm\ndata_path: a\noutput_dir: b\nuse_cpu: true\n"
    model, _, training = parse([write(tmp_path, text + "warmup_ratio: 0.1\n")])
    assert model.encoder_name_or_path == "tiny" and training.warmup_steps == 0.1


def test_a_bare_no_and_a_leading_dash_mean_what_they_say(tmp_path):
    text = "save_strategy: no\nllm_model_name_or_path: llm\ndata_path: a\noutput_dir: b\nuse_cpu: true\n"
    model, _, training = parse([write(tmp_path, text + "system_prompt: '-be nice'\n")])
    assert training.save_strategy == "no" and model.system_prompt == "-be nice"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {projectr: mlp}", "unknown key 'projectr'; did you mean projector?"),
        ("learning_rte: 1", "unknown key 'learning_rte'; did you mean learning_rate?"),
        ("xyz: 1", "unknown key 'xyz'$"),
        ("model: mlp", "found 'mlp' for a section"),
        ("- a", "wanted keys and values"),
        ("a: [", "malformed YAML"),
        ("{seed: 1, bf16: true, seed: 2}", r"malformed YAML \('seed' stands twice .*line 1, column 23"),
        ("{model: {lora_r: 8}, lora_r: 8}", "'lora_r' stands twice, in two sections"),
        ("downsample_factor: 5", "unknown key 'downsample_factor'; did you mean"),
        ("LEARNING_RATE: 1", "unknown key 'LEARNING_RATE'; did you mean learning_rate?"),
        ("{report_to: []}", r"report_to is \[\]; wanted one value"),
        ("{seed: [1, 2]}", r"seed is \[1, 2\]; wanted one value"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_that_names_it(tmp_path, text, told):
    with pytest.raises(InputError, match=rf"config\.yaml: {told}") as error:
        parse([write(tmp_path, text)])
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        parse(["nowhere.yaml"])


def test_an_unknown_flag_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse([*FLAGS.split(), "--projector_hidden_sise", "3"])
    assert "did you mean --projector_hidden_size?" in capsys.readouterr().err


def test_the_old_names_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert {"--whisper_model_name_or_path", "--warmup_ratio"} <= set(capsys.readouterr().out.split())


def test_old_names_may_have_dashes():
    assert parse([*FLAGS.split(), "--warmup-ratio", "0.1"])[2].warmup_steps == 0.1


def test_the_column_flag_of_other_programs_does_no_harm():
    assert not parse([*FLAGS.split(), "--remove_unused_columns", "True"])[2].remove_unused_columns


def test_patterns_can_be_given_as_none_at_all():
    model, _, _ = parse([*FLAGS.split(), "--freeze_params"])
    assert model.freeze_params == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--eval_strategy steps", "give --eval_data_path"),
        ("--save_best_by wer", "every checkpoint wants an evaluation"),
        ("--save_best_by wer --eval_data_path d --eval_strategy steps --eval_steps 30 --save_steps 100", "divide"),
        ("--save_best_by wer --eval_data_path d --eval_strategy epoch --save_steps 100", "alike"),
        ("--fsdp full_shard", "--deepspeed"),
        (f"--deepspeed {ROOT}/ds_config_zero3.json", "start it with torchrun"),
        ("--per_device_train_batch_size 0", "wanted 1 or more"),
        (f"--output_dir {ROOT}/README.md", "a file is there"),
        ("""--gradient_checkpointing_kwargs '{"use_reentrant": true}'""", "wanted false"),
    ],
)
def test_arguments_that_contradict_each_other_are_told_at_once(flags, told):
    with pytest.raises(InputError, match=told):
        parse([*FLAGS.split(), *shlex.split(flags)])


@pytest.mark.parametrize("name", ["whisper_qwen.yaml", "wavlm_llama.yaml"])
def test_the_examples_are_valid_and_say_what_each_line_is_for(name):
    model, data, training = parse([str(ROOT / name), "--bf16", "False", "--use_cpu"])
    assert data.data_path == "train.jsonl" and training.output_dir
    lines = (ROOT / name).read_text().splitlines()
    assert sum("#" in line for line in lines) > 5
    if name.startswith("wavlm"):
        assert (model.projector, model.projector_stride) == ("mlp", 5)
        assert (model.encoder_name_or_path, model.llm_model_name_or_path) == (
            "microsoft/wavlm-large", "meta-llama/Llama-3.2-1B",
        )  # fmt: skip
