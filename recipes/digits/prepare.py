"""Connected digits from real recordings: train.jsonl of all speakers but the last, test.jsonl of the last.

    python -m recipes.digits.prepare digits  # fetches the recordings, about 15 MB
    python -m recipes.digits.prepare digits --recordings FOLDER  # takes them from a folder

The recordings are the Free Spoken Digit Dataset of Zohar Jackson and others (CC BY-SA 4.0, doi 10.5281/zenodo.1342401):
single digits at 8 kHz, six people, 50 recordings of each digit by each. An utterance is two to six of them by one
person, chosen at random, each at the same loudness and with a pause of 0.05 to 0.2 s behind it.
"""

import argparse
import io
import json
import random
import re
import tarfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import soundfile

from errors import InputError, run

ARCHIVE = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.tar.gz"
FILE_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_\d+\.wav")  # 7_george_32.wav
WORDS = "zero one two three four five six seven eight nine".split()
RATE = 8000  # Hz
PEAK = 0.5  # of every digit; 1 = full scale

Recordings = dict[str, dict[int, list[Path]]]  # speaker -> digit -> files


def fetch(folder: Path) -> None:
    """Make the folder, with the wav files of the archive on GitHub in it. Raises InputError."""
    print(f"fetching {ARCHIVE}", flush=True)
    try:
        with urllib.request.urlopen(ARCHIVE, timeout=60) as response:
            archive = io.BytesIO(response.read())
        partial_folder = folder.with_suffix(".partial")  # so that after a kill no folder looks complete
        partial_folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if FILE_NAME.fullmatch(name) and member.isfile():
                    (partial_folder / name).write_bytes(tar.extractfile(member).read())
        partial_folder.rename(folder)
    except (OSError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
        cure = "unpack that archive yourself, and pass --recordings FOLDER"
        raise InputError(f"cannot fetch {ARCHIVE} ({error}); {cure}") from None


def find_recordings(folder: Path) -> Recordings:
    """The recordings in a folder and its subfolders. Raises InputError unless two speakers or more say every digit."""
    recordings: Recordings = {}
    for path in sorted(folder.rglob("*.wav")):
        if match := FILE_NAME.fullmatch(path.name):
            digits = recordings.setdefault(match["speaker"], {digit: [] for digit in range(10)})
            digits[int(match["digit"])].append(path)
    if len(recordings) < 2:
        wanted = "wanted files like 7_george_32.wav of two speakers at least"
        raise InputError(f"{folder}: recordings of {len(recordings)} speakers; {wanted}")
    for speaker, digits in recordings.items():
        if missing := [str(digit) for digit, paths in digits.items() if not paths]:
            raise InputError(f"{folder}: {speaker} never says {', '.join(missing)}; wanted all ten digits")
    return recordings


def read_digit(path: Path) -> np.ndarray:
    """Samples (S,) of a recording, the loudest of which is PEAK or -PEAK. Raises InputError."""
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except (OSError, soundfile.SoundFileError) as error:
        raise InputError(f"{path}: unreadable ({error}); wanted a wav file") from None
    if rate != RATE or samples.ndim > 1 or not samples.size:
        raise InputError(f"{path}: {rate} Hz, shape {samples.shape}; wanted one channel of {RATE} Hz, not empty")
    return samples * PEAK / max(np.abs(samples).max(), 1e-3)  # silence stays silence


def make_utterance(rng: random.Random, digits: dict[int, list[Path]]) -> tuple[str, np.ndarray]:
    """The transcript and the samples (S,) of an utterance of one speaker."""
    spoken_digits = [rng.randrange(10) for _ in range(rng.randint(2, 6))]
    pieces = []
    for digit in spoken_digits:
        pieces.append(read_digit(rng.choice(digits[digit])))
        pieces.append(np.zeros(int(RATE * rng.uniform(0.05, 0.2)), np.float32))  # a pause
    return " ".join(WORDS[digit] for digit in spoken_digits), np.concatenate(pieces)


def make_set(folder: Path, name: str, rng: random.Random, recordings: Recordings, count: int) -> str:
    """Write NAME.jsonl and its wav files; returns a sentence about them."""
    speakers, rows = sorted(recordings), []
    for index in range(count):
        speaker = rng.choice(speakers)
        transcript, samples = make_utterance(rng, recordings[speaker])
        wav = f"wav/{name}_{index:05}.wav"
        soundfile.write(folder / wav, samples, RATE)
        rows.append({"wav": wav, "txt": transcript, "duration": round(len(samples) / RATE, 3), "speaker": speaker})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    minutes = sum(row["duration"] for row in rows) / 60
    return f"{folder}/{name}.jsonl: {count:,} utterances, {minutes:.0f} minutes, of {', '.join(speakers)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output_dir", type=Path, help="where train.jsonl, test.jsonl and wav/ go")
    add("--recordings", type=Path, metavar="FOLDER", help="the recordings, if they are here already")
    add("--num_train", type=int, default=1600, help="utterances to train on (default: 1600)")
    add("--num_test", type=int, default=200, help="utterances to test on (default: 200)")
    args = parser.parse_args(argv)
    source = args.recordings or args.output_dir / "recordings"
    if not args.recordings and not source.is_dir():
        fetch(source)
    recordings = find_recordings(source)
    *train_speakers, test_speaker = sorted(recordings)
    train_recordings = {speaker: recordings[speaker] for speaker in train_speakers}
    (args.output_dir / "wav").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)  # every run makes the same utterances
    print(make_set(args.output_dir, "train", rng, train_recordings, args.num_train))
    print(make_set(args.output_dir, "test", rng, {test_speaker: recordings[test_speaker]}, args.num_test))


if __name__ == "__main__":
    run(main)
