"""How well a DuplexModel answers: its text, its voice, its delay, and whether it lets itself be interrupted.

python -m duplex.evaluate --model_path run --data_path test/conversations.jsonl --recognizer demo_run/run
"""

import argparse
import time
from pathlib import Path

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


def evaluate(model: DuplexModel, records, recognizer: SpeechLLM | None, folder: Path | None = None) -> dict[str, float]:
    """Figures by name: those of the text over all requests, those of the voice over answers without an interruption.

    A request is a turn of the user with what the agent says from its end to the next one. Delays are medians. With a
    folder, the conversations are written there in stereo, the user on the left.
    """
    texts, voices, word_delays, sound_delays, obeyed, elapsed, seconds = [], [], [], [], [], 0.0, 0.0
    for number, record in enumerate(records):
        (user, agent), _ = load_channels(record)
        begin = time.perf_counter()
        result = model.offline_inference(torch.from_numpy(user)[None], torch.tensor([len(user)]))
        elapsed, seconds = elapsed + time.perf_counter() - begin, seconds + len(user) / SAMPLE_RATE
        rate, ids = model.codec.sample_rate, result["tokens_text"][0]  # (T,)
        reply = soxr.resample(result["audio"][0].cpu().numpy(), rate, SAMPLE_RATE)
        codes = model.codec.encode(torch.from_numpy(soxr.resample(agent, SAMPLE_RATE, rate))[None])[0]
        copy = soxr.resample(model.audio_of(codes).cpu().numpy(), rate, SAMPLE_RATE)
        is_loud, is_speaking = loud_frames(reply), speaking_frames(model, ids)
        users = [turn for turn in record["turns"] if turn["role"] == "user"]
        for turn, later in zip(users, [*users[1:], None], strict=True):
            start, end = frame_of(turn["start"]), frame_of(turn["end"])
            until = frame_of(later["end"]) if later else len(ids)  # the next answer comes after that
            answers = [t for t in record["turns"] if t["role"] == "agent" and end <= frame_of(t["start"]) < until]
            wanted = " ".join(answer["text"] for answer in answers)
            texts.append((wanted, model.text_of(ids[end:until])))
            # The text of step t is that of frame t + 1, and known when frame t is over. So are the codes of frame t.
            words = (ids[end:until] == model.tokens.bos).nonzero()[:1] + 2
            sounds = is_loud[end:until].nonzero()[0][:1] + 1
            word_delays += [float(frames) * FRAME_SECONDS for frames in words]
            sound_delays += [float(frames) * FRAME_SECONDS for frames in sounds]
            if not later or all(answer["end"] <= later["start"] for answer in answers):
                voices.append((wanted, cut(reply, end, until), cut(copy, end, until)))
            if 0 < start < len(ids) - SILENT_WITHIN and is_speaking[start - 1]:  # the user interrupts
                after = start + SILENT_WITHIN
                obeyed.append(not is_speaking[after] and not is_loud[after + 1 : after + 3].any())
        if folder:
            size = min(len(user), len(reply))
            soundfile.write(folder / f"reply{number:03}.wav", np.stack([user[:size], reply[:size]], 1), SAMPLE_RATE)
    wanted, said = zip(*texts, strict=True)
    figures = {"exact": np.mean([one == other for one, other in texts]), "requests": len(texts)}
    figures |= {"bleu": sacrebleu.corpus_bleu(said, [wanted]).score}
    figures |= {"first_word": np.median(word_delays or np.nan), "first_sound": np.median(sound_delays or np.nan)}
    figures |= {
        "obeyed": np.mean(obeyed or np.nan),
        "interruptions": len(obeyed),
        "real_time_factor": elapsed / seconds,
    }
    if recognizer and voices:
        wanted, *recordings = zip(*voices, strict=True)
        for name, clips in zip(("reply", "codec"), recordings, strict=True):
            transcripts = iter(recognizer.transcribe([clip for clip in clips if len(clip)]))
            heard = [next(transcripts) if len(clip) else "" for clip in clips]
            figures[f"wer_{name}"] = score(wanted, heard).all.rate
            figures[f"asr_bleu_{name}"] = sacrebleu.corpus_bleu(heard, [wanted]).score
    return {name: float(value) for name, value in figures.items()}


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
