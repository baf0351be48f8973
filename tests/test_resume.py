"""What resume.py promises: a run that goes on ends as one never stopped, and says what it does otherwise."""

import json
import re
import shutil

import pytest
from conftest import TRAIN_FLAGS, TRAINED_FLAGS, write_manifest
from runs import CORPUS, RESUMED, assert_same, checkpoints, copy_until, error_of, good, losses, terminate, weights

import train
from errors import InputError
from manifest import Manifest
from resume import find_checkpoint

# Going on after a kill. 20 clips in batches of 2, three to a step: four steps an epoch, the last of one batch only.


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
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["training"]["trained on"]
        .split(": ")[1]
        .startswith("10 utterances")
    )
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
