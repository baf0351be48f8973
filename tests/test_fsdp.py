"""What fsdp.py promises: FSDP2 trains what one process trains, and its checkpoints are those of one process."""

import inspect
import json
import shutil

import accelerate.utils.fsdp_utils
import numpy as np
import pytest
import torch
import transformers
from conftest import TRAIN_FLAGS, TRAINED_FLAGS
from runs import PROJECTOR, assert_same, copy_until, evaluations, losses, weights

import train

RUN = f"{TRAIN_FLAGS} {TRAINED_FLAGS}"
FLAGS = f"{RUN} --fsdp --per_device_train_batch_size 2 --per_device_eval_batch_size 2"


@pytest.fixture(scope="module")
def sharded(world, trained, launch):
    """The run of `trained` under FSDP2 on two processes."""
    job = launch("tests/sharded.py", f"{FLAGS} --output_dir fsdp", processes=2).wait()
    assert job.status == 0, job.err
    return world / "fsdp"


def test_fsdp2_trains_and_evaluates_what_one_process_does(trained, sharded):
    assert losses(sharded) == pytest.approx(losses(trained), rel=1e-4)
    assert np.array(evaluations(sharded)) == pytest.approx(np.array(evaluations(trained)), rel=1e-4)
    assert weights(sharded).keys() == PROJECTOR
    assert_same(weights(sharded), weights(trained), within=1e-5)


def test_each_of_two_processes_holds_half_of_every_part(sharded):
    for rank in (0, 1):
        shares = json.loads((sharded.parent / f"fsdp.shares-{rank}").read_text())
        assert shares == {name: pytest.approx(0.5, abs=0.02) for name in ("encoder", "projector", "llm")}


def test_a_checkpoint_has_the_files_and_the_optimiser_of_one_process(trained, sharded):
    ours, wanted = (torch.load(run / "checkpoint-5/optimizer.pt", weights_only=True) for run in (sharded, trained))
    assert ours["param_groups"] == wanted["param_groups"]
    for number, state in wanted["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=1e-3, atol=1e-5)
    names = [{path.name for path in (run / "checkpoint-5").glob("[!r]*")} for run in (sharded, trained)]
    assert names[0] == names[1]  # but those of the random states


def test_one_process_goes_on_from_fsdp2(trained, sharded, call, tmp_path):
    run = copy_until(sharded, 5, tmp_path / "run")
    call(train.main, f"{RUN} --per_device_train_batch_size 4 --output_dir {run}")
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert_same(weights(run), weights(trained), within=1e-5)


def test_fsdp2_goes_on_from_one_process_and_chooses_the_best_checkpoint(trained, launch, tmp_path):
    run = copy_until(trained, 5, tmp_path / "run")
    job = launch("train.py", f"{FLAGS} --output_dir {run} --load_best_model_at_end", processes=2).wait()
    assert job.status == 0, job.err
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert_same(weights(run / "checkpoint-10"), weights(trained / "checkpoint-10"), within=1e-5)
    best = min((5, 10), key=lambda step: dict(zip((5, 10), evaluations(trained), strict=True))[step])
    assert_same(weights(run), weights(trained / f"checkpoint-{best}"), within=1e-5)
    shutil.rmtree(run)


def test_accelerates_functions_for_checkpoints_still_have_the_arguments_that_ours_take():
    for name in ("save_fsdp_model", "save_fsdp_optimizer", "load_fsdp_model", "load_fsdp_optimizer"):
        assert hasattr(transformers.trainer, name), f"transformers.trainer.{name} is gone: frozen weights are saved"
        arguments = list(inspect.signature(getattr(accelerate.utils.fsdp_utils, name)).parameters)
        wanted = ["fsdp_plugin", "accelerator", *(["optimizer"] if "optimizer" in name else []), "model"]
        assert arguments[: len(wanted)] == wanted, f"{name}: other arguments"
