"""What tensor_parallel.py promises: an LLM in slices on two processes trains what one process trains."""

import json

import numpy as np
import pytest
from conftest import TRAIN_FLAGS, TRAINED_FLAGS
from runs import PROJECTOR, assert_same, copy_until, evaluations, losses, weights

import train
from errors import InputError
from model import SpeechLLM
from tensor_parallel import check_frozen

FLAGS = f"{TRAIN_FLAGS} {TRAINED_FLAGS} --per_device_train_batch_size 4 --per_device_eval_batch_size 3"


@pytest.fixture(scope="module")
def sliced(world, trained, launch):
    """The run of `trained` with its LLM over two processes."""
    job = launch("tests/sharded.py", f"{FLAGS} --tensor_parallel --output_dir sliced", processes=2).wait()
    assert job.status == 0, job.err
    return world / "sliced"


def test_a_sliced_llm_trains_and_evaluates_what_one_process_does(trained, sliced):
    assert losses(sliced) == pytest.approx(losses(trained), rel=1e-4)
    assert np.array(evaluations(sliced)) == pytest.approx(np.array(evaluations(trained)), rel=1e-4)
    assert weights(sliced).keys() == PROJECTOR
    assert_same(weights(sliced), weights(trained), within=1e-5)


def test_each_process_holds_a_slice_of_the_llm_and_the_whole_of_the_rest(sliced):
    for rank in (0, 1):
        shares = json.loads((sliced.parent / f"sliced.shares-{rank}").read_text())
        assert shares == {"encoder": 1, "projector": 1, "llm": pytest.approx(0.5, abs=0.02)}  # norms are whole


def test_one_process_goes_on_from_tensor_parallelism(trained, sliced, call, tmp_path):
    run = copy_until(sliced, 5, tmp_path / "run")
    call(train.main, f"{FLAGS} --output_dir {run}")
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert_same(weights(run), weights(trained), within=1e-5)


def test_a_trained_llm_is_refused(world):
    model = SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / "llm"), lora_r=2)
    with pytest.raises(InputError, match="of the LLM is trained; wanted a frozen one, or --fsdp"):
        check_frozen(model.llm)
