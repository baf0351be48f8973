"""What frame_cache.py promises: each clip is encoded once, a kill loses little, and no clip gets frames of another."""

import copy
import io
import json
import os
import pickle
import re
import resource
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, write_manifest
from runs import CORPUS, assert_same, copy_until, error_of, evaluations, losses, weights
from trials import records

import frame_cache
import recognize
import train
from dataset import collate, load_audio
from errors import InputError
from frame_cache import FrameCache, NewFile, key_of
from manifest import Manifest
from model import SpeechLLM, WhisperEncoder, load_encoder

TRAINED = f"{CORPUS} --num_train_epochs 2 --per_device_train_batch_size 4 --learning_rate 1e-4 --save_steps 5"
EVALUATED = f"{TRAINED} --eval_data_path corpus.jsonl --eval_strategy steps --eval_steps 5 --encoder_dropout 0.1"


def new_clips(text: str) -> int:
    """How many clips a run says that it encodes."""
    return int(re.search(r"encoder cache: ([\d,]+) of [\d,]+ clips are new", text)[1])


def num_frames(folder: Path) -> int:
    """Of all files of a cache."""
    return sum(int(np.fromfile(path, frame_cache.ROW)["num_frames"].sum()) for path in folder.rglob("*.index"))


def use(model: SpeechLLM, dataset, folder: Path, batch_size: int = 2, num_workers: int = 0) -> int:
    """Put a cache into a model and its dataset, on one process; how many clips were new."""
    data = SimpleNamespace(augment=[], check=0, encoder_cache=str(folder))
    args = SimpleNamespace(device=torch.device("cpu"), process_index=0, world_size=1)
    args.per_device_train_batch_size, args.dataloader_num_workers = batch_size, num_workers
    with redirect_stdout(io.StringIO()) as printed:
        frame_cache.use(model, {"trained on": dataset}, data, args)
    return new_clips(printed.getvalue())


def encode(model: SpeechLLM, manifest: Path, **options) -> int:
    """As `use`, with a copy of a model and the folder `cache` beside a manifest."""
    model = copy.deepcopy(model)
    return use(model, model.make_dataset(Manifest(manifest)), manifest.with_name("cache"), **options)


@pytest.fixture
def audio(world, tmp_path) -> Path:
    """Six clips and their manifest, to spoil."""
    for number in range(6):
        shutil.copy(world / f"clip{number}.wav", tmp_path)
    rows = [{"wav": f"clip{number}.wav", "txt": "hello world"} for number in range(6)]
    return write_manifest(tmp_path / "corpus.jsonl", rows)


# The same as without


def assert_hears_its_encoder(model: SpeechLLM, seconds: tuple[float, ...], folder: Path) -> dict:
    """The loss with the cache is that of the encoder whose frames are rounded to bf16; returns the batch."""
    dataset = model.make_dataset(records(seconds))
    model.encoder.register_forward_hook(lambda _, inputs, frames: frames.bfloat16().float())
    with torch.no_grad():
        loss = model(**collate(list(dataset))).loss.item()
        assert use(model, dataset, folder) == len(seconds)
        batch = collate(list(dataset))
        assert model(**batch).loss.item() == pytest.approx(loss, rel=2e-4)
    return batch


def test_the_model_hears_the_frames_of_its_encoder_in_bf16(any_model, tmp_path):
    """Of samples or features, in a batch with others."""
    model = copy.deepcopy(any_model)
    batch = assert_hears_its_encoder(model, (0.9, 2.3, 0.5), tmp_path)
    assert batch["input_features"].shape[2] == model.config.encoder_size and not list(model.encoder.parameters())


def test_each_window_of_a_clip_over_30_s_has_its_frames(model, tmp_path):
    assert len(assert_hears_its_encoder(copy.deepcopy(model), (0.9, 31.0), tmp_path)["feature_lengths"]) == 3


def test_clips_padded_to_30_s_have_the_frames_of_the_padding_too(model, tmp_path):
    model = copy.deepcopy(model)
    model.config.pad_to_30s = True
    assert assert_hears_its_encoder(model, (0.9, 2.3), tmp_path)["feature_lengths"].tolist() == [1500, 1500]


@pytest.fixture(scope="module")
def cached(world, chinese_llm, call) -> Path:
    """The output folder of a run that filled its cache, evaluated twice."""
    flags = f"{EVALUATED} --encoder_cache cached_frames --output_dir cached"
    assert new_clips(call(train.main, flags).out) == 40  # 20 to train on and the same 20 to evaluate
    return world / "cached"


def test_a_run_without_a_cache_has_the_same_checkpoint_but_for_rounding(cached, call, world):
    call(train.main, f"{EVALUATED} --output_dir uncached")
    assert losses(cached) == pytest.approx(losses(world / "uncached"), rel=0.01)
    for (loss, rate), (wanted, wanted_rate) in zip(evaluations(cached), evaluations(world / "uncached"), strict=True):
        assert (loss, rate) == (pytest.approx(wanted, rel=0.02), pytest.approx(wanted_rate, abs=0.1))
    assert weights(cached).keys() == weights(world / "uncached").keys()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (cached, world / "uncached")]
    assert [config.pop("training") is None for config in configs] == [False, False]
    assert configs[0] == configs[1]


def test_a_run_that_finds_all_frames_has_the_weights_of_the_one_that_made_them(cached, call, world):
    frames = num_frames(world / "cached_frames")
    printed = call(train.main, f"{EVALUATED} --encoder_cache cached_frames --output_dir again").out
    assert new_clips(printed) == 0
    assert num_frames(world / "cached_frames") == frames
    assert losses(world / "again") == losses(cached)
    assert evaluations(world / "again") == evaluations(cached)
    assert_same(weights(world / "again"), weights(cached))


def test_a_clip_that_is_in_two_manifests_is_encoded_once(cached, world):
    clips = sum(-(-round(16000 * (0.3 + 0.19 * (7 * i % 20))) // 320) for i in range(20))  # 50 frames a second
    assert clips < num_frames(world / "cached_frames") < clips + 2 * 100 + 1500 + 20  # two silences, the trial


def test_a_run_goes_on_with_and_without_the_cache(cached, call, world):
    copy_until(cached, 5, world / "other")
    assert "checkpoint-5" in call(train.main, f"{EVALUATED} --output_dir other").out
    assert losses(world / "other") == pytest.approx(losses(cached), rel=0.01)
    shutil.rmtree(world / "other/checkpoint-10")
    assert "checkpoint-5" in call(train.main, f"{EVALUATED} --encoder_cache cached_frames --output_dir other").out
    assert losses(world / "other") == losses(cached)


def test_its_checkpoint_is_decoded_by_the_encoder_itself(cached, call):
    flags = "--model_path cached --data_path corpus.jsonl --num_beams 1 --max_new_tokens 3 --result_path cached.txt"
    assert "WER" in call(recognize.main, f"{flags} --num_workers 0").out


def test_a_clip_that_cannot_be_read_stops_the_run_or_is_silence(audio, call, chinese_llm, tmp_path):
    audio.with_name("clip2.wav").write_bytes(b"no audio")
    audio.write_text(audio.read_text().replace('"txt"', '"duration": 1, "txt"'))
    flags = f"{TRAINED} --data_path {audio} --encoder_cache {tmp_path}/cache --output_dir {tmp_path}/run"
    assert "corpus.jsonl:3: " in error_of(call, flags)
    assert "skipped 1 bad utterances" in call(train.main, f"{flags} --on_bad_audio skip").err


def test_check_encodes_nothing(call, world, tmp_path):
    flags = f"{TRAINED} --llm_model_name_or_path llm --encoder_cache {tmp_path}/cache --output_dir {tmp_path}/run"
    assert "nothing wrong found" in call(train.main, f"{flags} --check").out
    assert not list(tmp_path.glob("cache/*/*"))


def test_overfit_and_log_predictions_read_from_it(call, chinese_llm, tmp_path):
    flags = f"{CORPUS} --encoder_cache {tmp_path}/cache --output_dir {tmp_path}/run --max_steps 2 --log_predictions 1"
    assert "--overfit: " in error_of(call, f"{flags} --log_predictions_steps 1 --overfit 2")


def test_data_loading_processes_fill_and_read_it_and_get_no_frames_sent(model, audio):
    assert encode(model, audio, num_workers=2) == 6
    (folder,) = audio.parent.glob("cache/*")
    extract, samples = FrameCache(folder, 32).extract, load_audio(audio.with_name("clip1.wav"))
    frames = extract(samples)  # its file is mapped now
    assert torch.equal(pickle.loads(pickle.dumps(extract))(samples), frames)
    assert len(pickle.dumps(extract)) < frames.numel() * 2


# Keys


def test_another_encoder_encodes_anew_and_the_same_under_another_name_does_not(model, audio, world, tmp_path):
    def new_with(**changes) -> int:
        other = copy.deepcopy(model)
        other.config.pad_to_30s = changes.pop("pad_to_30s", False)
        other.encoder = load_encoder(str(tmp_path / "moved.pt"), **changes)
        other.projector.requires_grad_(True)
        return encode(other, audio)

    shutil.copy(world / "whisper.pt", tmp_path / "moved.pt")
    assert encode(model, audio) == 6
    assert new_with() == 0
    assert new_with(layer=2) == 0  # the last
    for changes in ({"layer": 1}, {"dtype": torch.bfloat16}, {"pad_to_30s": True}):
        assert (new_with(**changes), new_with(**changes)) == (6, 0), changes
    state = torch.load(world / "whisper.pt", weights_only=True)
    state["model_state_dict"]["encoder.ln_post.bias"][3] += 1e-3
    torch.save(state, tmp_path / "moved.pt")
    assert (new_with(), new_with()) == (6, 0)
    assert encode(model, audio) == 0


def test_other_settings_of_the_features_encode_anew(model, audio):
    other = copy.deepcopy(model)
    other.encoder.feature_extractor.dither = 0.1
    assert (encode(model, audio), encode(other, audio)) == (6, 6)


def test_audio_that_has_changed_is_encoded_anew(model, audio):
    encode(model, audio)
    path = audio.with_name("clip1.wav")
    soundfile.write(path, load_audio(path)[::-1], SAMPLE_RATE)  # a file of the same size
    assert encode(model, audio) == 1


def test_the_same_audio_in_a_new_file_is_read_and_not_encoded(model, audio):
    encode(model, audio)
    frames, path = num_frames(audio.with_name("cache")), audio.with_name("clip1.wav")
    soundfile.write(path.with_suffix(".flac"), *soundfile.read(path))
    audio.write_text(audio.read_text().replace("clip1.wav", "clip1.flac"))
    assert encode(model, audio) == 1
    assert num_frames(audio.with_name("cache")) == frames + 100  # of the trial, with which each file begins


def test_audio_that_changed_under_its_old_time_and_size_never_gets_the_old_frames(model, audio):
    encode(model, audio)
    path, model = audio.with_name("clip1.wav"), copy.deepcopy(model)
    before = path.stat()
    soundfile.write(path, load_audio(path)[::-1], SAMPLE_RATE)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    dataset = model.make_dataset(Manifest(audio), on_bad="skip")
    assert use(model, dataset, audio.with_name("cache")) == 0
    assert len(dataset[0]["features"]) == 1
    with pytest.raises(InputError, match=r"no frames of .* s of audio: it has changed"):
        dataset[1]


def test_an_encoder_whose_code_has_changed_is_told(model, audio, monkeypatch):
    encode(model, audio)
    forward = WhisperEncoder.forward
    monkeypatch.setattr(WhisperEncoder, "forward", lambda *inputs: 1.1 * forward(*inputs))
    with pytest.raises(InputError, match="gives other frames; its code or a library has changed"):
        encode(model, audio)


def test_keys_are_told_apart_by_both_halves(tmp_path):
    frames = {(7, n): torch.full((n, 3), float(n), dtype=torch.bfloat16) for n in (1, 2, 3)}
    with NewFile(tmp_path) as file:
        file.append(frames | {(9, 9): torch.zeros(0, 3, dtype=torch.bfloat16)})
    cache = FrameCache(tmp_path, 3)
    assert all(torch.equal(cache.frames(key), values) for key, values in frames.items())
    assert (cache.find((7, 4)), cache.find((8, 1)), cache.find((2**64 - 1, 1))) == (None, None, None)


# Kills, a full disk, several processes


@pytest.mark.parametrize(("ending", "cut"), [(".index", 5), (".frames", 1)])
def test_a_torn_file_is_read_up_to_the_tear(ending, cut, tmp_path):
    key_of_first, key_of_last = key_of(b"first"), key_of(b"last")
    values = torch.arange(12, dtype=torch.bfloat16).view(4, 3)
    with NewFile(tmp_path) as file:
        file.append({key_of_first: values, key_of_last: values})
    path = file.path.with_suffix(ending)
    os.truncate(path, path.stat().st_size - cut)
    cache = FrameCache(tmp_path, 3)
    assert torch.equal(cache.frames(key_of_first), values)
    assert cache.frames(key_of_last) is None


def assert_same_frames(folder: Path, wanted: Path) -> None:
    """Two caches have the same clips and, but for rounding, the same frames."""
    caches = [FrameCache(path, 32) for root in (folder, wanted) for path in root.iterdir()]
    keys = [{tuple(row["key"].tolist()) for row in cache.rows if row["num_frames"]} for cache in caches]
    assert keys[0] == keys[1]
    for key in keys[0]:
        found, frames = (cache.frames(key).float() for cache in caches)
        torch.testing.assert_close(found, frames, rtol=0.01, atol=0.01)


def test_after_a_kill_only_what_is_missing_is_encoded(cached, launch, call, world, tmp_path):
    script = tmp_path / "impatient.py"  # it makes every batch safe
    script.write_text("import errors, frame_cache, train\nframe_cache.SYNC_SECONDS = 0\nerrors.run(train.main)\n")
    flags = f"{EVALUATED} --encoder_cache {tmp_path}/frames --output_dir {tmp_path}/run"
    launch(str(script), flags, die_at=8).died()
    assert 0 < new_clips(call(train.main, flags).out) < 40
    assert_same_frames(tmp_path / "frames", world / "cached_frames")


def test_two_processes_fill_it_together_and_two_jobs_at_once(cached, launch, world, tmp_path):
    flags = f"{EVALUATED} --per_device_train_batch_size 2 --encoder_cache {tmp_path}/frames --output_dir {tmp_path}"
    jobs = [launch("train.py", f"{flags}/{number}", processes=2) for number in (1, 2)]
    for job in jobs:
        assert job.wait().status == 0, job.err
    assert 2 <= len(list(tmp_path.glob("frames/*/*.index"))) <= 4  # a job that is late finds all
    assert_same_frames(tmp_path / "frames", world / "cached_frames")


def test_a_full_disk_stops_the_run_and_what_was_encoded_stays(model, audio, monkeypatch):
    """A limit on the size of files stands for the full disk: writing fails in the same place."""
    monkeypatch.setattr(frame_cache, "SYNC_SECONDS", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (131_000, limits[1]))
    problem = r"cannot write it \(OSError: .*File too large.*\); wanted room on the disk; what was encoded stays"
    try:
        with pytest.raises(InputError, match=problem):
            encode(model, audio, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < encode(model, audio) < 6


def test_what_does_not_fit_on_the_disk_is_said_before_anything_is_encoded(model, audio):
    write_manifest(audio, [{"wav": "clip0.wav", "txt": "hello", "duration": 9e8}] * 100)
    with pytest.raises(InputError, match=r"100 of 100 clips are new, [\d,]+\.\d hours, about 288,000.* GB are free"):
        encode(model, audio)
    assert not list(audio.parent.glob("cache/*/*"))


# What it refuses


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--augment gain", "--encoder_cache with --augment"),
        ("--freeze_params ^llm", "weights of the encoder are, or were, trained"),
        ("--encoder_lora_r 2", "weights of the encoder are, or were, trained"),
        ("--encoder_cache corpus.jsonl", "--encoder_cache corpus.jsonl: cannot write there"),
    ],
)
def test_what_has_no_lasting_frames_is_refused_in_a_line(flags, problem, chinese_llm, call, tmp_path):
    assert problem in error_of(call, f"{TRAINED} --encoder_cache {tmp_path}/c --output_dir {tmp_path}/run {flags}")
    assert not list(tmp_path.glob("c/*"))


def test_a_frozen_encoder_that_was_trained_before_is_refused_because_a_checkpoint_holds_its_weights(model, audio):
    model = copy.deepcopy(model)
    model.unfreeze_encoder()
    model.freeze_encoder()
    with pytest.raises(InputError, match="are, or were, trained"):
        encode(model, audio)
