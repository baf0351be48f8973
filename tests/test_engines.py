"""What the two commands promise of several processes, on one machine or more; with DDP, where no engine is named."""

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from conftest import TRAIN_FLAGS, TRAINED_FLAGS, Job, write_manifest
from runs import assert_same, losses, weights
from torch.nn.parallel import DistributedDataParallel

import recognize


def test_four_processes_on_two_nodes_train_what_one_process_does(trained, launch, tmp_path):
    flags = f"{TRAIN_FLAGS} {TRAINED_FLAGS} --per_device_train_batch_size 1 --output_dir {tmp_path} --eval_strategy no"
    job = launch("train.py", f"{flags} --save_steps 10", processes=4, nodes=2).wait()
    assert job.status == 0, job.err
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-4)
    assert_same(weights(tmp_path), weights(trained), within=1e-5)


def test_two_nodes_decode_what_one_process_does(world, trained, call, launch):
    flags = "--model_path trained --data_path corpus.jsonl --max_new_tokens 4 --num_beams 1 --batch_size 5"
    call(recognize.main, f"{flags} --result_path one_node.txt")
    job = launch("recognize.py", f"{flags} --result_path two_nodes.txt", processes=2, nodes=2).wait()
    assert job.status == 0, job.err
    assert (world / "two_nodes.txt").read_bytes() == (world / "one_node.txt").read_bytes()
    assert not list(world.glob("two_nodes.txt.*"))


def test_ddp_sums_gradients_of_what_is_trained_and_nothing_else(model):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        facts = DistributedDataParallel(model)._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert facts["num_parameter_tensors"] == len(trained) == 6
    assert facts["total_parameter_size_bytes"] == sum(p.numel() * 4 for p in trained)


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def wait_until(condition: Callable[[], bool], job: Job) -> None:
    while not condition():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.01)


@pytest.mark.parametrize("loss", ["a clip", "a loader process", "a rank"])
def test_what_one_process_loses_stops_all_of_them_within_a_minute(loss, world, chinese_llm, launch, tmp_path):
    rows = [json.loads(line) | {"duration": 1.0} for line in (world / "corpus.jsonl").read_text().splitlines()]
    rows[7]["wav"] = "not_there.wav" if loss == "a clip" else rows[7]["wav"]
    manifest = write_manifest(world / f"{loss}.jsonl", rows)
    flags = f"{TRAIN_FLAGS} --data_path '{manifest}' --output_dir {tmp_path} --max_steps 100000 --save_strategy no"
    flags += " --per_device_train_batch_size 2 --dataloader_num_workers 1 --dataloader_persistent_workers True"
    job = launch("train.py", f"{flags} --disable_tqdm True", processes=2)
    if loss != "a clip":
        wait_until(lambda: "'loss'" in job.out, job)
        rank = job.processes[1].pid
        os.kill(children_of(rank)[0] if loss == "a loader process" else rank, signal.SIGKILL)
    job.wait(60)
    assert all(process.exitcode for process in job.processes), [p.exitcode for p in job.processes]
    if loss == "a clip":
        told = [(job.logs / f"err{rank}").read_text().count("error: ") for rank in (0, 1)]
        assert 1 in told, job.err
