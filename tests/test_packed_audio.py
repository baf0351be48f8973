"""What packed_audio.py promises: audio inside other files, and a tar that is whole or refused."""

import io
import tarfile

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, noise

from dataset import audio_seconds, load_audio
from errors import InputError
from manifest import stated_seconds
from packed_audio import PackedAudio, check_tar, read_bytes, tar_members, wav_of


def test_packed_audio_is_loaded_as_a_file_is_with_segments_rates_and_channels(tmp_path):
    stereo = np.stack([noise(1, 1), noise(1, 2)])  # (channels, S)
    content = wav_of(stereo, 8000)
    (tmp_path / "a.wav").write_bytes(content)
    audio = PackedAudio("a.wav", lambda: content)
    for times in [(), (0.25,), (0.25, 1.5)]:
        np.testing.assert_array_equal(load_audio(audio, *times), load_audio(tmp_path / "a.wav", *times))
    assert audio_seconds({"wav": audio}) == 2 and audio_seconds({"wav": audio, "start": 0.5, "end": 1}) == 0.5
    assert np.isnan(stated_seconds({"wav": audio})) and str(audio) == "a.wav"


def test_wav_of_keeps_samples_as_they_are_and_takes_floats_alone():
    samples, rate = soundfile.read(io.BytesIO(wav_of(noise(1), SAMPLE_RATE)), dtype="float32")
    np.testing.assert_array_equal(samples, noise(1))
    assert rate == SAMPLE_RATE
    with pytest.raises(TypeError, match="samples of type int64; wanted floats"):
        wav_of([1, 2], SAMPLE_RATE)


def test_the_members_of_a_tar_are_read_at_their_place(tmp_path):
    (tmp_path / "a").write_bytes(b"alpha")
    (tmp_path / "b").write_bytes(b"beta" * 1000)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in "ab":
            tar.add(tmp_path / name, f"{'deep/' * 40}{name}")  # a name of over 100 letters has a header of its own
    members = tar_members(tmp_path / "t.tar")
    assert [name[-2:] for name, *_ in members] == ["/a", "/b"]
    assert [read_bytes(tmp_path / "t.tar", *place) for _, *place in members] == [b"alpha", b"beta" * 1000]


def test_a_tar_cut_anywhere_or_compressed_is_refused(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a")
        member.size = 3000
        tar.addfile(member, io.BytesIO(b"x" * 3000))
    content = path.read_bytes()
    check_tar(path)
    for size in (0, 100, 512, 2000, 512 + 3072):  # the last is between two members
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"^{path}: the tar is cut short, at {size:,} bytes"):
            check_tar(path)
    path.write_bytes(b"no tar" + bytes(2000))
    with pytest.raises(InputError, match=r"unreadable .*wanted an uncompressed tar"):
        tar_members(path)
