"""How well a DuplexModel answers: its text, its voice, its delay, and whether it lets itself be interrupted.

python -m duplex.evaluate --model_path run --data_path test/conversations.jsonl --recognizer demo_run/run
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sacrebleu
import soundfile
import soxr
import torch
from torch import Tensor

from duplex.data import FRAME_SECONDS, HOP, frame_of, load_channels, open_conversations
from duplex.model import DuplexModel
from errors import run
from manifest import SAMPLE_RATE
from model import SpeechLLM
from score import score

SOUND = 0.01  # root mean square of a frame in which the agent is heard
SILENT_WITHIN = round(0.5 / FRAME_SECONDS)  # frames after an interruption


class Answer(NamedTuple):
    """What the agent says to a turn of the user, from its end to that of the next one."""

    wanted: str
    text: str
    first_word: float | None  # seconds behind the turn; None where there is none
    first_sound: float | None
    voice: np.ndarray  # samples (S,) at 16 kHz
    codec_voice: np.ndarray  # the codec's copy of the true answer
    is_whole: bool  # nobody interrupts the true answer
    is_obeyed: bool | None  # whether the agent falls silent at this turn; None where it is silent already


def evaluate(model: DuplexModel, records, recognizer: SpeechLLM | None, folder: Path | None = None) -> dict[str, float]:
    """Figures by name: those of the text over all requests, those of the voice over answers without an interruption.

    Delays are medians. With a folder, the conversations are written there in stereo, the user on the left.
    """
    answers, elapsed, seconds = [], 0.0, 0.0
    for number, record in enumerate(records):
        (user, agent), _ = load_channels(record)
        begin = time.perf_counter()
        result = model.offline_inference(torch.from_numpy(user)[None], torch.tensor([len(user)]))
        elapsed, seconds = elapsed + time.perf_counter() - begin, seconds + len(user) / SAMPLE_RATE
        rate = model.codec.sample_rate
        reply = soxr.resample(result["audio"][0].cpu().numpy(), rate, SAMPLE_RATE)
        codes = model.codec.encode(torch.from_numpy(soxr.resample(agent, SAMPLE_RATE, rate))[None])[0]
        copy = soxr.resample(model.audio_of(codes).cpu().numpy(), rate, SAMPLE_RATE)
        answers += answers_of(model, record["turns"], result["tokens_text"][0], reply, copy)
        if folder:
            size = min(len(user), len(reply))
            soundfile.write(folder / f"reply{number:03}.wav", np.stack([user[:size], reply[:size]], 1), SAMPLE_RATE)
    obeyed = [answer.is_obeyed for answer in answers if answer.is_obeyed is not None]
    figures = {"exact": np.mean([answer.text == answer.wanted for answer in answers]), "requests": len(answers)}
    texts = [answer.text for answer in answers], [[answer.wanted for answer in answers]]
    figures |= {"bleu": sacrebleu.corpus_bleu(*texts).score}
    for name in ("first_word", "first_sound"):
        delays = [getattr(answer, name) for answer in answers if getattr(answer, name) is not None]
        figures[name] = np.median(delays or np.nan)
    figures |= {"obeyed": np.mean(obeyed or np.nan), "interruptions": len(obeyed)}
    figures |= {"real_time_factor": elapsed / seconds}
    whole = [answer for answer in answers if answer.is_whole]
    if recognizer and whole:
        wanted = [answer.wanted for answer in whole]
        for name, clips in (("reply", [a.voice for a in whole]), ("codec", [a.codec_voice for a in whole])):
            transcripts = iter(recognizer.transcribe([clip for clip in clips if len(clip)]))
            heard = [next(transcripts) if len(clip) else "" for clip in clips]
            figures[f"wer_{name}"] = score(wanted, heard).all.rate
            figures[f"asr_bleu_{name}"] = sacrebleu.corpus_bleu(heard, [wanted]).score
    return {name: float(value) for name, value in figures.items()}


def answers_of(
    model: DuplexModel, turns: list[dict], ids: Tensor, reply: np.ndarray, copy: np.ndarray
) -> Iterator[Answer]:
    """The answers to a conversation's turns of the user: text channel (T,), agent's voice, codec's copy (S,)."""
    is_loud, is_speaking = loud_frames(reply), speaking_frames(model, ids)
    users = [turn for turn in turns if turn["role"] == "user"]
    for turn, later in zip(users, [*users[1:], None], strict=True):
        start, end = frame_of(turn["start"]), frame_of(turn["end"])
        until = frame_of(later["end"]) if later else len(ids)  # the next answer comes after that
        true_answers = [t for t in turns if t["role"] == "agent" and end <= frame_of(t["start"]) < until]
        # The text of step t is that of frame t + 1, and known when frame t is over. So are the codes of frame t.
        words = (ids[end:until] == model.tokens.bos).nonzero()[:1].flatten().tolist()  # none, or the first
        sounds = is_loud[end:until].nonzero()[0][:1].tolist()
        is_obeyed = None
        if 0 < start < len(ids) - SILENT_WITHIN and is_speaking[start - 1]:  # the user interrupts
            silent = start + SILENT_WITHIN  # the frame by which the agent should be
            is_obeyed = not is_speaking[silent] and not is_loud[silent + 1 : silent + 3].any()
        yield Answer(
            wanted=" ".join(answer["text"] for answer in true_answers),
            text=model.text_of(ids[end:until]),
            first_word=(words[0] + 2) * FRAME_SECONDS if words else None,
            first_sound=(sounds[0] + 1) * FRAME_SECONDS if sounds else None,
            voice=cut(reply, end, until),
            codec_voice=cut(copy, end, until),
            is_whole=not later or all(answer["end"] <= later["start"] for answer in true_answers),
            is_obeyed=is_obeyed,
        )


def loud_frames(samples: np.ndarray) -> np.ndarray:
    """(T,) in which frames something is heard."""
    frames = samples[: len(samples) // HOP * HOP].reshape(-1, HOP)
    return np.sqrt(np.mean(frames**2, 1)) > SOUND


def speaking_frames(model: DuplexModel, ids: Tensor) -> list[bool]:
    """(T,) in which frames the text channel is between the beginning and the end of a turn."""
    frames, is_speaking = [], False
    for token in ids.tolist():
        is_speaking = token == model.tokens.bos or (is_speaking and token != model.tokens.eos)
        frames.append(is_speaking)
    return frames


def cut(samples: np.ndarray, start: int, end: int) -> np.ndarray:
    """What is heard between two frames, nothing if nothing is. 80 ms more of silence make the recogniser fail."""
    samples = samples[start * HOP : end * HOP]
    loud = np.flatnonzero(np.abs(samples) > 0.05)
    return samples[max(loud[0] - 500, 0) : loud[-1] + 500] if len(loud) else samples[:0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="folder that duplex.train wrote")
    parser.add_argument("--data_path", required=True, help="conversations: JSON lines, or lhotse:CUTS")
    parser.add_argument("--recognizer", help="a SpeechLLM to hear the replies with: WER and ASR-BLEU")
    parser.add_argument("--output_dir", type=Path, help="where the replies go, in stereo; none without it")
    args = parser.parse_args(argv)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    recognizer = SpeechLLM.from_pretrained(args.recognizer) if args.recognizer else None
    model = DuplexModel.from_pretrained(args.model_path)
    for name, value in evaluate(model, open_conversations(args.data_path), recognizer, args.output_dir).items():
        print(f"{name:<18} {value:.3f}")


if __name__ == "__main__":
    run(main)
