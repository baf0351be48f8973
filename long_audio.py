"""Audio of any length, with times: cut at pauses into windows of at most 30 s, which are decoded in batches.

    model.transcribe("hour.mp3", timestamps=True)  # -> [{"start": 0.42, "end": 7.9, "text": "good morning"}, ...]
    python recognize.py --model_path run hour.mp3 --format srt

A file is read block by block, each frame of 32 ms is judged to be speech or not, and a window ends where nobody speaks
for half a second. Speech without such a pause is cut at its quietest point. What is no speech is not decoded. A few
batches of windows are in memory, however long the file is.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soxr
import torch
from tqdm import tqdm

from dataset import WINDOW, SpeechDataset, load_audio, open_audio
from errors import BadUtterance, InputError
from manifest import SAMPLE_RATE, Clip, DecodingOptions, Hypothesis, clips_of
from sources import RecordList

if TYPE_CHECKING:
    from model import SpeechLLM

FRAME = 512  # samples, 32 ms: what silero-vad judges at a time; the counts below are of such frames
BLOCK = 1000  # 32 s, read at a time
PAUSE = 16  # 0.5 s: a shorter pause ends no window
MARGIN = 6  # 0.2 s of a pause stay beside the speech, whose first and last sounds may be too weak to be found
LONGEST = WINDOW // FRAME - 2 * MARGIN  # of speech in a window, 29.6 s
LAST_SECONDS = 312  # 10 s: speech without a pause is cut at the quietest point of so much, at the end of LONGEST
QUIET = 7  # 0.2 s: how long that point is
CLICK = 2  # 64 ms: so little alone is no speech
BATCHES = 4  # are read together, so that windows of like length can be decoded together


# Audio


class Recording:
    """A clip, read from disk block by block. Whoever has taken the last block finds in `problem` what was not read."""

    def __init__(self, clip: Clip):
        self.clip, self.problem, self.num_samples = clip, None, 0  # read so far

    @property
    def seconds(self) -> float:
        return self.num_samples / SAMPLE_RATE

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples (BLOCK * FRAME,), mono, 16 kHz; the last block may be shorter."""
        size, block = BLOCK * FRAME, np.zeros(0, np.float32)
        try:
            for piece in samples_of(self.clip):
                self.num_samples += len(piece)
                block = np.concatenate([block, piece])
                while len(block) >= size:
                    yield block[:size]
                    block = block[size:]
        except BadUtterance as error:
            self.problem = f"{error}; read {self.seconds:.2f} s" if self.num_samples else str(error)
        if len(block):
            yield block


def samples_of(clip: Clip) -> Iterator[np.ndarray]:
    """Samples (S,) of a clip, mono, 16 kHz, a second at a time. Raises BadUtterance behind the last if some lack."""
    if not hasattr(clip.audio, "open"):  # samples, no file
        yield load_audio(*clip)
        return
    with open_audio(clip._replace(end=np.inf)) as file:  # one that was cut off, too
        rate, first, count = file.samplerate, round(clip.start * file.samplerate), 0  # Hz, frames of the file
        wanted = (file.frames if clip.end is None else round(clip.end * rate)) - first
        if not 0 < wanted <= file.frames - first + 0.1 * rate:  # rounded ends may lie a little outside
            stretch = f"{clip.start:g} s to {'the end' if clip.end is None else f'{clip.end:g} s'}"
            raise BadUtterance(f"{clip.audio}: nothing to read from {stretch}; it has {file.frames / rate:.2f} s")
        if first:  # some formats cannot seek
            file.seek(first)
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1)
        while count < wanted:
            samples = file.read(min(rate, wanted - count), dtype="float32", always_2d=True).mean(axis=1)  # (S,)
            if not np.isfinite(samples).all():
                raise BadUtterance(f"{clip.audio}: the audio holds NaN or infinite samples")
            if not len(samples):
                break
            count += len(samples)
            yield samples if rate == SAMPLE_RATE else resampler.resample_chunk(samples)
        if rate != SAMPLE_RATE:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    with open_audio(clip):  # raises BadUtterance if the header of a wav file promises more
        pass
    if count < wanted - 0.1 * rate:
        raise BadUtterance(f"{clip.audio}: cut off after {count / rate:.2f} s of {wanted / rate:.2f} s")


# Where somebody speaks


class SileroDetector:
    """Speech or not, for each frame, by the neural network that the package silero-vad carries."""

    def __init__(self):
        num_threads = torch.get_num_threads()
        from silero_vad import load_silero_vad

        torch.set_num_threads(num_threads)  # the import sets it to 1, for all that comes after it
        self.model = load_silero_vad()

    def reset(self) -> None:
        """Forget the recording before."""
        self.model.reset_states()

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, FRAME) -> bool (n,)."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on so little work several threads wait for each other, up to 30 times as long
        try:
            return np.array([self.model(frame, SAMPLE_RATE).item() > 0.5 for frame in torch.from_numpy(frames)])
        finally:
            torch.set_num_threads(num_threads)


class EnergyDetector:
    """Speech or not, for each frame, by its level: the power between 200 and 4000 Hz.

    The level of the noise is the 10th percentile of the last 64 s, since even in speech so many frames are gaps (noise
    by quantiles: Stahl et al. 2000, doi:10.1109/ICASSP.2000.862122); that of speech is the 95th. A frame is speech if
    it is 30 % of the way in dB above the noise, and 4 dB at least: a threshold between silence and peak, as Rabiner and
    Sambur have it (Bell System Technical Journal 54, 1975, 297-315). Steady noise stays within 1 dB of its level.
    """

    SILENT = -70.0  # dB of full scale: nothing below is speech

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the recording before."""
        self.levels = np.zeros(0)  # dB

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, FRAME) -> bool (n,)."""
        spectrum = np.abs(np.fft.rfft(frames * np.hanning(FRAME))) ** 2  # (n, FRAME / 2 + 1), 31.25 Hz each
        power = spectrum[:, 6:129].sum(axis=1) * 16 / (3 * FRAME**2)  # of the samples squared, without the window's
        levels = 10 * np.log10(power + 1e-12)
        self.levels = np.concatenate([self.levels, levels])[-2 * BLOCK :]
        noise, speech = np.percentile(self.levels, [10, 95])
        if len(self.levels) < 100:  # 3 s may hold no pause that would tell the noise
            noise = self.SILENT
        noise = max(noise, self.SILENT)
        return levels > noise + max(4, 0.3 * (speech - noise))


Detector = SileroDetector | EnergyDetector


def load_detector() -> Detector:
    """silero-vad where it is installed, else the energy, and a warning says so."""
    try:
        return SileroDetector()
    except ImportError:
        message = "silero-vad is not installed: pauses are found by energy, less well in noise; pip install silero-vad"
        warnings.warn(message, stacklevel=2)
        return EnergyDetector()


# Windows


class Window(NamedTuple):  # a stretch of a recording, cut out for decoding
    start: float  # seconds of the recording: where the speech in it begins, and where it ends
    end: float
    samples: np.ndarray  # (S,), with some of the pauses around the speech


def windows_of(recording: Recording, detector: Detector) -> Iterator[Window]:
    """The windows of a recording, in order, all speech of it in one of them each."""
    frames, is_speech = np.zeros((0, FRAME), np.float32), np.zeros(0, bool)  # what is in no window yet
    first = 0  # number of its first frame
    detector.reset()
    for block in chain(recording.blocks(), [None]):
        if block is not None:
            block = np.pad(block, (0, -len(block) % FRAME)).reshape(-1, FRAME)
            frames, is_speech = np.concatenate([frames, block]), np.concatenate([is_speech, detector(block)])
        while window := first_window(frames, is_speech, is_last=block is None):
            begin, end, stop = window
            if is_speech[begin:end].sum() > CLICK:
                start = max(begin - MARGIN, 0)
                room = recording.num_samples - (first + start) * FRAME  # the last frame was padded
                samples = frames[start:stop].reshape(-1)[:room]
                last = min((first + end) * FRAME, recording.num_samples)
                yield Window(float((first + begin) * FRAME / SAMPLE_RATE), float(last / SAMPLE_RATE), samples)
            frames, is_speech, first = frames[stop:], is_speech[stop:], first + stop
        spare = max((is_speech.argmax() if is_speech.any() else len(is_speech)) - MARGIN, 0)  # frames of a long pause
        frames, is_speech, first = frames[spare:], is_speech[spare:], first + spare


def first_window(frames: np.ndarray, is_speech: np.ndarray, is_last: bool) -> tuple[int, int, int] | None:
    """Begin and end of speech, and the end of its window in the pause behind it, in frames; None if it is not over."""
    spoken = np.flatnonzero(is_speech)
    if not len(spoken):
        return None
    pauses = np.flatnonzero(np.diff(spoken) > PAUSE)  # the first is behind spoken[pauses[0]]
    begin, end = spoken[0], spoken[pauses[0] if len(pauses) else -1] + 1
    stop = min(end + MARGIN, len(frames))
    if end - begin > LONGEST:
        last = begin + LONGEST
        stop = last - LAST_SECONDS + quietest(frames[last - LAST_SECONDS : last])
        end = spoken[spoken < stop][-1] + 1
        return begin, end, stop
    is_over = len(pauses) or is_last or len(frames) - end >= PAUSE
    return (begin, end, stop) if is_over else None


def quietest(frames: np.ndarray) -> int:
    """The middle of the quietest 0.2 s of frames (n, FRAME)."""
    power = (frames**2).mean(axis=1)
    return np.convolve(power, np.ones(QUIET), "valid").argmin() + QUIET // 2


# Decoding


@dataclass
class Transcript:
    """What was recognised of a record."""

    index: int  # of the record
    record: dict
    segments: list[dict] = field(default_factory=list)  # "start", "end" (seconds), "text", and what the options add
    seconds: float = 0.0  # of audio that were read
    unread: str | None = None  # why it could not be read, or not to its end

    def add(self, window: Window, hypothesis: Hypothesis) -> None:
        """Note what was recognised in a window, if anything was."""
        values = {name: value for name, value in asdict(hypothesis).items() if value is not None and name != "index"}
        if hypothesis.text or hypothesis.problem:
            offset = self.record.get("start", 0)  # times are those of the file
            times = {"start": round(offset + window.start, 3), "end": round(offset + window.end, 3)}
            self.segments.append(times | values)

    def hypothesis(self) -> Hypothesis:
        problems = [self.unread] * bool(self.unread) + [s["problem"] for s in self.segments if "problem" in s]
        more = f" (and {len(problems) - 1} more in its segments)" if len(problems) > 1 else ""
        words = [word for segment in self.segments for word in segment.get("words", [])]
        text = " ".join(segment["text"] for segment in self.segments if segment["text"])
        problem = problems[0] + more if problems else None
        return Hypothesis(self.index, text, problem, words=words or None, segments=self.segments)


def decode(
    model: "SpeechLLM", dataset: SpeechDataset, positions: Sequence[int], batch_size: int, options: DecodingOptions
) -> Iterator[list[Hypothesis]]:
    """Yield the hypothesis, with `segments`, of each example of a dataset, in the order of the positions."""
    for transcript in transcripts(model, dataset, positions, batch_size, options, load_detector()):
        yield [transcript.hypothesis()]


def transcripts(
    model: "SpeechLLM",
    dataset: SpeechDataset,
    positions: Sequence[int],
    batch_size: int,
    options: DecodingOptions,
    detector: Detector,
    progress: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Transcript]:
    """Yield the transcript of each example; `progress` is called with the seconds of audio that were just done."""
    if options.do_sample:
        raise InputError("--timestamps: long audio is decoded by a beam search; wanted no --do_sample")
    options, done = replace(options, timestamps=False), 0.0  # of the windows; seconds of the record
    windows, size = windows_of_records(dataset, positions, detector), BATCHES * batch_size
    with ThreadPoolExecutor(1) as pool:  # reads the next windows while these are decoded
        future = pool.submit(lambda: list(islice(windows, size)))
        while group := future.result():
            future = pool.submit(lambda: list(islice(windows, size)))
            records = RecordList(record_of(transcript, window) for transcript, window in group if window)
            batches = model.decode(replace(dataset, records=records), None, batch_size, 0, options) if records else []
            hypotheses = iter(sorted(sum(batches, []), key=lambda hypothesis: hypothesis.index))
            for transcript, window in group:
                if window:
                    transcript.add(window, next(hypotheses))
                    progress(window.end - done)
                    done = window.end
                else:
                    progress(transcript.seconds - done)
                    done = 0.0
                    yield transcript


def windows_of_records(
    dataset: SpeechDataset, positions: Sequence[int], detector: Detector
) -> Iterator[tuple[Transcript, Window | None]]:
    """Each window of each record, beside the transcript that it belongs to; None behind a record's last window."""
    for index in dataset.indices[list(positions)].tolist():
        record = dataset.records[index]
        transcript, problem = Transcript(index, record), "a conversation; --timestamps is for records with 'wav'"
        if "messages" not in record:
            recording = Recording(*clips_of(record))
            for window in windows_of(recording, detector):
                yield transcript, window
            transcript.seconds, problem = recording.seconds, recording.problem
        transcript.unread = f"{record['where']}: {problem}" if problem else None
        yield transcript, None


def record_of(transcript: Transcript, window: Window) -> dict:
    """A record of a window, with the prompt of the record that it is cut from."""
    record = transcript.record
    where = f"{record['where']}, {record.get('start', 0) + window.start:.1f} s"
    return {"wav": window.samples, "where": where, "prompt": record.get("prompt")}


# recognize.py hour.mp3 --format srt


def output_paths(audio: Sequence[str], format: str, output_dir: str | None) -> list[Path | None]:
    """Where the text of each audio file goes; None is standard output. Raises InputError."""
    if not output_dir:
        if len(audio) > 1:
            wanted = f"--output_dir, for a .{format} file of each"
            raise InputError(f"--format {format}: found {len(audio)} audio files; wanted one, or {wanted}")
        return [None]
    paths = [Path(output_dir, f"{Path(name).stem}.{format}") for name in audio]
    for name, path in zip(audio, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{name}: {path} would be written twice; wanted files of different names")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: {error.strerror}; wanted a folder") from None
    return paths


def transcribe_files(
    model: "SpeechLLM",
    audio: Sequence[str],
    paths: Sequence[Path | None],
    format: str,
    batch_size: int,
    options: DecodingOptions,
) -> None:
    """Write the text of each audio file to its path, once it is done. Raises InputError if one was not read whole."""
    detector = load_detector()  # before the bar, for it may have something to say
    records = [{"wav": name, "where": f"audio {number}"} for number, name in enumerate(audio, 1)]
    dataset, unread = model.decoding_dataset(records, options), []
    layout = "{l_bar}{bar}| {n:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
    begin, total = time.perf_counter(), float(dataset.durations.sum())
    with tqdm(total=total, bar_format=layout) as bar:

        def progress(seconds: float) -> None:
            real_time_factor = (time.perf_counter() - begin) / max(bar.n + seconds, 0.01)
            bar.set_postfix(RTF=f"{real_time_factor:.4f}", refresh=False)
            bar.total = max(bar.total, bar.n + seconds)  # a file that was cut off counted for nothing
            bar.update(seconds)

        for transcript in transcripts(model, dataset, range(len(dataset)), batch_size, options, detector, progress):
            unread += [transcript.unread] * bool(transcript.unread)
            for segment in transcript.segments:
                if "problem" in segment:
                    tqdm.write(f"warning: {segment['problem']}", file=sys.stderr)
            if transcript.seconds:
                text, path = FORMATS[format](audio[transcript.index], transcript.hypothesis()), paths[transcript.index]
                if path:
                    path.write_text(text, encoding="utf-8")
                else:
                    tqdm.write(text, end="")  # on standard output; takes the bar off the line first
    if unread:
        raise InputError("; ".join(unread))


def txt(audio: str, hypothesis: Hypothesis) -> str:
    """A segment a line."""
    return "".join(f"{segment['text']}\n" for segment in cues(hypothesis))


def srt(audio: str, hypothesis: Hypothesis) -> str:
    """SubRip: for each segment its number, its times, its text and a blank line."""
    lines = [f"{n}\n{times(cue, ',')}\n{cue['text']}\n\n" for n, cue in enumerate(cues(hypothesis), 1)]
    return "".join(lines)


def vtt(audio: str, hypothesis: Hypothesis) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1: < and & would begin tags and entities."""
    lines = [f"{times(cue, '.')}\n{escape(cue['text'], quote=False)}\n\n" for cue in cues(hypothesis)]
    return "WEBVTT\n\n" + "".join(lines)


def json_object(audio: str, hypothesis: Hypothesis) -> str:
    """{"wav", "text", "segments": [{"start", "end", "text"}, ...], "problem"}, in a line."""
    values = {"wav": audio, "text": hypothesis.text, "segments": hypothesis.segments, "problem": hypothesis.problem}
    return json.dumps(values, ensure_ascii=False) + "\n"


def cues(hypothesis: Hypothesis) -> list[dict]:
    """The segments with text."""
    return [segment for segment in hypothesis.segments if segment["text"]]


def times(segment: dict, point: str) -> str:
    """00:00:01,000 --> 00:00:02,500"""
    texts = []
    for seconds in (segment["start"], segment["end"]):
        minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
        texts.append(f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}")
    return " --> ".join(texts)


FORMATS = {"txt": txt, "srt": srt, "vtt": vtt, "json": json_object}
