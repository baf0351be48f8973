"""What zero3.py promises: ZeRO trains what one process trains, and its checkpoints hold what was trained."""

import inspect
import json
import re
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN_FLAGS, TRAINED_FLAGS
from runs import PROJECTOR, assert_same, evaluations, losses, weights
from transformers.integrations import deepspeed as integration

import zero3
from errors import InputError
from manifest import Manifest
from model import SpeechLLM
from resume import compare_settings, refuse_code

DEEPSPEED = f"--deepspeed {ROOT}/ds_config_zero3.json"
# From https://github.com/wenet-e2e/west, with tiny models on two CPU processes, without --bf16, for three epochs.
PUBLISHED = f"""
    --use_cpu
    --llm_model_name_or_path llm
    --whisper_model_name_or_path whisper.pt
    --data_path corpus.jsonl
    --output_dir published
    --num_train_epochs 3
    --per_device_train_batch_size 8
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8
    --evaluation_strategy "no"
    --save_strategy "steps"
    --save_steps 100
    --save_total_limit 10
    --learning_rate 3e-4
    --weight_decay 0.01
    --adam_beta2 0.95
    --warmup_ratio 0.01
    --lr_scheduler_type "cosine"
    --logging_steps 1
    --report_to "none"
    --model_max_length 512
    --gradient_checkpointing
    --dataloader_num_workers 2
    --dataloader_prefetch_factor 10
    {DEEPSPEED}"""


def test_the_published_command_trains_under_zero3(world, launch):
    job = launch("train.py", PUBLISHED, processes=2).wait()
    assert job.status == 0, job.err
    saved = weights(world / "published")
    assert saved.keys() == PROJECTOR
    assert saved["projector.linear1.weight"].shape == (2048, 32)
    state = json.loads((world / "published/checkpoint-3/trainer_state.json").read_text())
    assert state["global_step"] == 3  # 20 clips are one step of 2 x 8 x 8 an epoch
    learning_rates = [row["learning_rate"] for row in state["log_history"] if "loss" in row]
    assert learning_rates == pytest.approx([0, 3e-4, 1.5e-4])  # one step of warm-up, then half a cosine


# Half the batch of `trained` on each of two processes
FLAGS = f"{TRAIN_FLAGS} {TRAINED_FLAGS} {DEEPSPEED} --per_device_train_batch_size 2 --per_device_eval_batch_size 2"


@pytest.fixture(scope="module")
def sharded(world, trained, launch) -> Path:
    """The run of `trained` under ZeRO-3 on two processes, killed after checkpoint-5 and gone on from."""
    launch("train.py", f"{FLAGS} --output_dir sharded", processes=2, die_at="sharded/checkpoint-10").died()
    assert not (world / "sharded/model.safetensors").exists()
    job = launch("train.py", f"{FLAGS} --output_dir sharded", processes=2).wait()
    assert job.status == 0, job.err
    assert "going on from sharded/checkpoint-5\n" in job.out
    return world / "sharded"


def test_zero3_killed_with_its_whole_process_group_trains_what_one_process_never_stopped_trains(trained, sharded):
    assert losses(sharded) == pytest.approx(losses(trained), abs=1e-3)
    assert_same(weights(sharded), weights(trained), within=1e-5)
    assert_same(weights(sharded / "checkpoint-5"), weights(trained / "checkpoint-5"), within=1e-5)


def test_evaluation_under_zero3_is_that_of_one_process(trained, sharded):
    """Seven clips in batches of 2 on two processes: each has four, one of them twice."""
    assert np.array(evaluations(sharded)) == pytest.approx(np.array(evaluations(trained)), rel=1e-4)


def test_a_zero3_checkpoint_holds_no_frozen_weights(sharded, world, chinese_llm):
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), str(chinese_llm), projector_hidden_size=64)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    files = sorted((sharded / "checkpoint-5").glob("*/*_states.pt"))
    assert len(files) == 4  # weights and optimiser of two processes
    for path in files:
        state = torch.load(path, weights_only=False)
        assert not frozen & set(state.get("module", {}))
        assert not frozen & {name for group in state.get("param_shapes", []) for name in group}
    optimizer = sum(path.stat().st_size for path in files if "optim" in path.name)
    trained_bytes = (sharded / "checkpoint-5/model.safetensors").stat().st_size
    assert optimizer < 4 * trained_bytes  # fp32 weights and the two moments of Adam


@pytest.mark.parametrize("change", [{"world_size": 4}, {"deepspeed": False}])
def test_going_on_with_another_number_of_processes_or_without_zero3_is_refused(change, sharded, world):
    """ZeRO-3 cannot deal its optimiser's states out anew."""
    checkpoint, records = sharded / "checkpoint-10", Manifest(world / "corpus.jsonl")
    settings = json.loads((checkpoint / "train_settings.json").read_text())
    assert compare_settings(str(checkpoint), settings, records) == []
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=rf"\({name} was {settings[name]} and is {value}\)"):
        compare_settings(str(checkpoint), settings | change, records)


@pytest.fixture(scope="module")
def zero2(world, trained, launch) -> Path:
    """The run of `trained` under ZeRO-2 on two processes."""
    flags = f"{FLAGS.replace('zero3', 'zero2')} --output_dir zero2 --eval_strategy no"
    job = launch("train.py", flags, processes=2).wait()
    assert job.status == 0, job.err
    return world / "zero2"


def test_zero2_trains_what_one_process_trains(trained, zero2):
    assert losses(zero2) == pytest.approx(losses(trained), rel=1e-4)
    assert_same(weights(zero2), weights(trained), within=1e-5)


def test_a_zero2_checkpoint_is_data_alone_without_frozen_weights(zero2):
    refuse_code(zero2 / "checkpoint-5")
    (path,) = (zero2 / "checkpoint-5").glob("*/*_model_states.pt")
    assert torch.load(path, weights_only=True)["module"].keys() == PROJECTOR  # nor the tied vocabulary projection


def test_going_on_with_another_stage_of_zero_is_refused(zero2, world):
    checkpoint, records = zero2 / "checkpoint-10", Manifest(world / "corpus.jsonl")
    settings = json.loads((checkpoint / "train_settings.json").read_text())
    with pytest.raises(InputError, match="zero_stage was 2 and is 3"):
        compare_settings(str(checkpoint), settings | {"zero_stage": 3}, records)


def test_an_evaluation_set_alone_is_evaluated_at_the_end(trained, launch, tmp_path):
    flags = f"--data_path corpus.jsonl --eval_data_path eval.jsonl --max_steps 1 --output_dir {tmp_path} {DEEPSPEED}"
    job = launch("train.py", f"{TRAIN_FLAGS} {flags}", processes=2).wait()
    assert job.status == 0, job.err
    assert len(re.findall(r"evaluation: loss \d+\.\d+, WER \d+\.\d\d%", job.out)) == 1
    facts = json.loads((tmp_path / "config.json").read_text())["training"]
    assert {"evaluation loss", "evaluation wer"} <= facts.keys()


# Private names of DeepSpeed and transformers, whose minor versions requirements pin for them


def test_deepspeed_can_still_leave_the_frozen_weights_out_of_its_checkpoints():
    told = f"deepspeed {deepspeed.__version__}: {{}} is gone: checkpoints would hold the frozen LLM, or not be loaded"
    for method, argument in (
        ("save_checkpoint", "exclude_frozen_parameters"),
        ("load_checkpoint", "load_module_strict"),
    ):
        arguments = inspect.signature(getattr(deepspeed.DeepSpeedEngine, method)).parameters
        assert argument in arguments, told.format(f"{argument} of DeepSpeedEngine.{method}")


def test_an_encoder_can_still_be_loaded_whole_though_zero3_is_on():
    """transformers keeps what it knows of ZeRO-3 in a weak reference, which `unsharded` takes away for a while."""
    told = "transformers.integrations.deepspeed: _hf_deepspeed_config_weak_ref is gone: encoders would be sharded"
    assert "_hf_deepspeed_config_weak_ref" in vars(integration), told
    zero3_is_on = integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert integration.is_deepspeed_zero3_enabled() and zero3_is_on
        with zero3.unsharded():
            assert not integration.is_deepspeed_zero3_enabled(), told
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
