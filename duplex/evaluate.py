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

from dataset import load_audio
from duplex.data import FRAME_SECONDS, frame_of, open_conversations
from duplex.model import DuplexModel
from errors import run
from manifest import SAMPLE_RATE
from model import SpeechLLM
from score import score

SOUND = 0.01  # root mean square of a frame in which the agent is heard
SILENT_WITHIN = 0.5  # seconds after an interruption


def evaluate(model: DuplexModel, records, recognizer: SpeechLLM | None, folder: Path | None = None) -> dict[str, float]:
    """Figures by name; with a folder, the replies are written there in stereo, the user on the left."""
    replies = {"text": [], "reference": [], "audio": [], "codec": []}
    words, sounds, obeyed, begin, seconds = [], [], [], time.perf_counter(), 0.0
    for number, record in enumerate(records):
        user, agent = (load_audio(record.get("folder", Path()) / record[role]) for role in ("user", "agent"))
        result = model.offline_inference(torch.from_numpy(user)[None], torch.tensor([len(user)]))
        seconds += len(user) / SAMPLE_RATE
        audio = soxr.resample(result["audio"][0].cpu().numpy(), model.codec.sample_rate, SAMPLE_RATE)
        replies["text"].append(result["text"][0])
        replies["reference"].append(" ".join(turn["text"] for turn in record["turns"] if turn["role"] == "agent"))
        replies["audio"].append(audio)
        hop = round(FRAME_SECONDS * SAMPLE_RATE)
        loudness = np.sqrt(np.mean(audio[: len(audio) // hop * hop].reshape(-1, hop) ** 2, 1))
        text = result["tokens_text"][0].tolist()
        is_speaking = np.zeros(len(text), bool)  # between bos and eos
        for frame, token in enumerate(text):
            is_speaking[frame] = token != model.tokens.eos and (
                token == model.tokens.bos or (frame and is_speaking[frame - 1])
            )
        users = [turn for turn in record["turns"] if turn["role"] == "user"]
        for turn, later in zip(users, [*users[1:], None], strict=True):
            end, start = frame_of(turn["end"]), frame_of(turn["start"])
            if start and start < len(text) and is_speaking[start - 1]:  # the user interrupts
                after = start + round(SILENT_WITHIN / FRAME_SECONDS)
                obeyed.append(not is_speaking[after] and loudness[after + 1 : after + 3].max() < SOUND)
            until = frame_of(later["start"]) if later else len(text)
            word = [frame for frame in range(end, until) if text[frame] == model.tokens.bos]
            sound = [frame for frame in range(end, min(until, len(loudness))) if loudness[frame] > SOUND]
            words += [(word[0] + 2 - end) * FRAME_SECONDS] if word else []
            sounds += [(sound[0] + 1 - end) * FRAME_SECONDS] if sound else []
        if recognizer:
            codes = model.codec.encode(
                torch.from_numpy(soxr.resample(agent, SAMPLE_RATE, model.codec.sample_rate))[None]
            )
            copy = model.audio_of(codes)[0].numpy()
            replies["codec"].append(soxr.resample(copy, model.codec.sample_rate, SAMPLE_RATE))
        if folder:
            size = max(len(user), len(audio))
            channels = [np.pad(channel, (0, size - len(channel))) for channel in (user, audio)]
            soundfile.write(folder / f"reply{number:03}.wav", np.stack(channels, 1), SAMPLE_RATE)
    elapsed = time.perf_counter() - begin
    exact = np.mean([text == reference for text, reference in zip(replies["text"], replies["reference"], strict=True)])
    figures = {"exact": exact, "bleu": sacrebleu.corpus_bleu(replies["text"], [replies["reference"]]).score}
    figures |= {"first_word": float(np.median(words or [np.nan])), "first_sound": float(np.median(sounds or [np.nan]))}
    figures |= {"obeyed": float(np.mean(obeyed or [np.nan])), "interruptions": len(obeyed)}
    figures["real_time_factor"] = elapsed / seconds
    if recognizer:
        for name in ("audio", "codec"):
            texts = recognizer.transcribe(replies[name])
            figures[f"wer_{name}"] = score(replies["reference"], texts).all.rate
            figures[f"asr_bleu_{name}"] = sacrebleu.corpus_bleu(texts, [replies["reference"]]).score
    return figures


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
