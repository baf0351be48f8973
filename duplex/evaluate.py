"""How well a DuplexModel answers: its text, its voice, its delay, and whether it lets itself be interrupted.

python -m duplex.evaluate --model_path run --data_path test/conversations.jsonl --recognizer demo_run/run
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import sacrebleu
import soxr
import torch

from duplex.data import FRAME_SECONDS, HOP, frame_of, load_channels, open_conversations
from duplex.model import DuplexModel
from duplex.talk import write_stereo
from errors import run
from manifest import SAMPLE_RATE
from model import SpeechLLM
from score import score

SOUND = 0.01  # root mean square of a frame in which the agent is heard
SILENT_WITHIN = round(0.5 / FRAME_SECONDS)  # frames after an interruption


def evaluate(model: DuplexModel, records, recognizer: SpeechLLM | None, folder: Path | None = None) -> dict[str, float]:
    """Figures by name: those of the text over all requests, those of the voice over answers without an interruption.

    Delays are medians. With a folder, the conversations are written there in stereo, the user on the left.
    """
    answers, elapsed, seconds, rate = defaultdict(list), 0.0, 0.0, model.codec.sample_rate
    for number, record in enumerate(records):
        user, agent = load_channels(record)
        begin = time.perf_counter()
        result = model.offline_inference(torch.from_numpy(user)[None], torch.tensor([len(user)]))
        elapsed, seconds = elapsed + time.perf_counter() - begin, seconds + len(user) / SAMPLE_RATE
        codes = model.codec.encode(torch.from_numpy(soxr.resample(agent, SAMPLE_RATE, rate))[None])[0]
        voices = [voice.cpu().numpy() for voice in (result["audio"][0], model.audio_of(codes))]
        said = model.turns_of(result["tokens_text"][0])
        add_answers(answers, record["turns"], said, *(soxr.resample(voice, rate, SAMPLE_RATE) for voice in voices))
        if folder:
            write_stereo(folder / f"reply{number:03}.wav", user, voices[0], rate)
    figures = {"requests": len(answers["wanted"]), "exact": np.mean(np.equal(answers["text"], answers["wanted"]))}
    figures |= {"bleu": sacrebleu.corpus_bleu(answers["text"], [answers["wanted"]]).score}
    figures |= {name: np.median(answers[name] or np.nan) for name in ("first_word", "first_sound")}
    figures |= {"obeyed": np.mean(answers["obeyed"] or np.nan), "interruptions": len(answers["obeyed"])}
    figures |= {"real_time_factor": elapsed / seconds}
    for name in ("reply", "codec") if recognizer and answers["whole"] else ():
        transcripts = iter(recognizer.transcribe([clip for clip in answers[name] if len(clip)]))
        heard = [next(transcripts) if len(clip) else "" for clip in answers[name]]
        figures[f"wer_{name}"] = score(answers["whole"], heard).all.rate
        figures[f"asr_bleu_{name}"] = sacrebleu.corpus_bleu(heard, [answers["whole"]]).score
    return {name: float(value) for name, value in figures.items()}


def add_answers(answers: dict[str, list], turns: list[dict], said: list[dict], reply: np.ndarray, copy: np.ndarray):
    """Add what the agent says to each turn of the user, from its end to that of the next one.

    `said` are the turns of its text channel, `reply` (S,) is its voice, `copy` (S,) the codec's copy of the true one.
    """
    num_frames = len(reply) // HOP
    is_loud = np.sqrt(np.mean(reply[: num_frames * HOP].reshape(-1, HOP) ** 2, 1)) > SOUND  # (T,)
    users = [turn for turn in turns if turn["role"] == "user"]
    for turn, later in zip(users, [*users[1:], None], strict=True):
        start, end = frame_of(turn["start"]), frame_of(turn["end"])
        until = frame_of(later["end"]) if later else num_frames  # the next answer comes after that
        truth = [t for t in turns if t["role"] == "agent" and end <= frame_of(t["start"]) < until]
        replies = [t for t in said if end <= t["start"] < until]
        answers["wanted"].append(wanted := " ".join(t["text"] for t in truth))
        answers["text"].append(" ".join(t["text"] for t in replies))
        # The text of step t is that of frame t + 1, and known when frame t is over. So are the codes of frame t.
        answers["first_word"] += [(t["start"] - end + 2) * FRAME_SECONDS for t in replies[:1]]  # nothing if silent
        answers["first_sound"] += [(t + 1) * FRAME_SECONDS for t in is_loud[end:until].nonzero()[0][:1]]
        if not later or all(t["end"] <= later["start"] for t in truth):  # nobody interrupts the true answer
            answers["whole"].append(wanted)
            answers["reply"].append(cut(reply, end, until))
            answers["codec"].append(cut(copy, end, until))
        silent = start + SILENT_WITHIN  # the frame by which an agent that is interrupted should be so
        was_heard = is_loud[max(start - 3, 0) : start + 1].any()  # else there was nothing to interrupt
        if silent < num_frames and was_heard and any(t["start"] < start <= t["end"] for t in said):
            is_speaking = any(t["start"] <= silent < t["end"] for t in said)
            answers["obeyed"].append(not is_speaking and not is_loud[silent + 1 : silent + 3].any())


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
