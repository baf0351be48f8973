"""kill -9 at random moments: what was done stays done, and the end is that of a run that was never stopped."""

import random
import time
from collections.abc import Callable

from conftest import TRAIN_FLAGS, Job, write_manifest
from runs import assert_same, checkpoints, weights

import recognize
import train

KILLS = 30
TRAINING = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 150 --save_steps 1 --save_total_limit 2 "
TRAINING += "--per_device_train_batch_size 2 --learning_rate 1e-3 --disable_tqdm True"
DECODING = (
    "--model_path trained --data_path short.jsonl --num_beams 1 --max_new_tokens 4 --num_workers 0 --batch_size 1"
)


def kill_after(job: Job, has_begun: Callable[[], bool], seconds: float) -> bool:
    """kill -9 a job so many seconds after it has begun; whether it was not at its end before."""
    while not has_begun() and job.processes[0].is_alive():
        time.sleep(0.005)
    job.processes[0].join(seconds)
    was_running = job.processes[0].is_alive()
    job.kill()
    return was_running


def going_on_from(job: Job) -> list[int]:
    """The step of the checkpoint that a job says it goes on from, if it has come so far."""
    log = job.logs / "out0"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split("-")[-1]) for line in lines if line.startswith("going on from ")]


def test_training_killed_at_30_random_moments_ends_with_the_weights_of_a_run_never_stopped(
    world, chinese_llm, call, launch
):
    call(train.main, f"{TRAINING} --save_strategy no --output_dir whole_run")
    draw, resumed = random.Random(0), []

    def newest() -> int:
        return max(checkpoints(world / "killed_run"), default=0)

    for number in range(KILLS):
        # Every fifth is killed as it starts, the others at some moment after their first checkpoint has begun.
        begun = 0 if number % 5 == 4 else newest() + 1
        job = launch("train.py", f"{TRAINING} --output_dir killed_run")
        assert kill_after(job, lambda begun=begun: newest() >= begun, draw.uniform(0, 0.15)), job.err
        resumed += going_on_from(job)
    job = launch("train.py", f"{TRAINING} --output_dir killed_run").wait()
    assert job.status == 0, job.err
    resumed += going_on_from(job)
    assert resumed == sorted(resumed) and len(set(resumed)) > 10, resumed  # no whole checkpoint was lost
    assert_same(weights(world / "killed_run"), weights(world / "whole_run"))


def test_decoding_killed_at_30_random_moments_writes_the_file_of_one_never_stopped(world, trained, call, launch):
    rows = [{"wav": f"clip{number % 20}.wav", "key": number, "txt": "hello"} for number in range(300)]
    write_manifest(world / "short.jsonl", rows)
    call(recognize.main, f"{DECODING} --batch_size 16 --result_path whole.jsonl")
    draw, kills = random.Random(0), 0

    def size() -> int:
        return sum(path.stat().st_size for path in world.glob("killed.jsonl.*.partial-*"))

    while kills < KILLS:
        before, job = size(), launch("recognize.py", f"{DECODING} --result_path killed.jsonl")
        kills += kill_after(job, lambda before=before: size() > before, draw.uniform(0, 0.04))
        assert not (world / "killed.jsonl").exists()
    job = launch("recognize.py", f"{DECODING} --result_path killed.jsonl").wait()
    assert job.status == 0, job.err
    assert "going on: " in job.err
    assert (world / "killed.jsonl").read_bytes() == (world / "whole.jsonl").read_bytes()
    assert not list(world.glob("killed.jsonl.*"))
