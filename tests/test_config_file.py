"""What config_file.py promises: a YAML file stands for flags of train.py."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from config_file import NOT_NEEDED, RENAMED
from errors import InputError
from train import parse

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
    assert model.system_prompt is None and data.data_path == ["train.jsonl"]
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
        ("downsample_factor: 5", r"unknown key 'downsample_factor'; did you mean projector_stride\?$"),
        ("data: {split: train}", r"unknown key 'split'; did you mean data_split\?$"),
        ("data: {sampling_rate: 16000}", "unknown key 'sampling_rate'; leave it out: audio of any rate becomes 16 kHz"),
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


SPEECHLLM = """
data:
  data_path: parler-tts/libritts_r_filtered
  subset: clean
  split: train.clean.100
  amount: ":100%"
  remap_keys: {"text_normalized": "transcription"}
  sampling_rate: 16000
  min_duration: 0.01
  max_duration: 15.0
  num_proc_for_preprocessing: 4
training:
  output_dir: ./output/
  freeze_modules: ["encoder", "text_decoder"]
  num_train_epochs: 3
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  learning_rate: 1e-4
  warmup_steps: 1000
  bf16: true
  lr_scheduler_type: cosine
  optim: adamw_torch
  max_grad_norm: 1.0
model:
  speech_encoder_name_or_path: microsoft/wavlm-large
  text_decoder_name_or_path: meta-llama/Llama-3.2-1B
  downsample_factor: 5
  projector_n_layers: 2
  projector_activation: relu
  projector_hidden_size: 2048
"""  # a training config of SpeechLLM


def readme_renames() -> dict[str, str | None]:
    """Another system's name -> ours, or None where there is no need of it, as README.md's table has them."""
    table = (ROOT / "README.md").read_text().partition("## If you come from another system")[2].partition("\n## ")[0]
    renames = {}
    for there, here in re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE):
        names, ours = (re.findall(r"`(\w+)[^`]*`", cell) for cell in (there, here))
        if here.startswith("not needed"):
            renames |= dict.fromkeys(names)
        elif len(names) == len(ours):
            renames |= dict(zip(names, ours, strict=True))
    return renames


def test_the_config_of_speechllm_runs_with_the_names_of_the_readmes_table(tmp_path):
    renames = readme_renames()
    config = {
        section: {renames.get(key, key): value for key, value in values.items() if renames.get(key, key)}
        for section, values in yaml.safe_load(SPEECHLLM).items()
    }
    model, data, training = parse([write(tmp_path, yaml.safe_dump(config)), "--bf16=False", "--use_cpu"])
    assert (model.encoder_name_or_path, model.llm_model_name_or_path, model.projector_stride, data.max_seconds) == (
        "microsoft/wavlm-large", "meta-llama/Llama-3.2-1B", 5, 15
    )  # fmt: skip
    assert training.output_dir == "./output/" and training.warmup_steps == 1000


@pytest.mark.parametrize("key", [*RENAMED, *NOT_NEEDED])
def test_a_key_of_speechllm_is_answered_with_what_the_readme_has_for_it(tmp_path, key):
    assert readme_renames()[key] == RENAMED.get(key)
    told = f"did you mean {RENAMED[key]}\\?$" if key in RENAMED else f"leave it out: {NOT_NEEDED[key]}$"
    with pytest.raises(InputError, match=f"unknown key '{key}'; {told}"):
        parse([write(tmp_path, f"{PARTS}{key}: 1")])


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        parse(["nowhere.yaml"])
