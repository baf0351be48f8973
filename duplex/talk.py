"""Talk to a DuplexModel: what the agent says to a recording, in text as it comes, and in sound.

python -m duplex.talk --model_path run user.wav --result_path reply.wav  # user on the left, agent on the right
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from dataset import load_audio
from duplex.data import FRAME_SECONDS, HOP
from duplex.model import DuplexModel
from errors import run
from manifest import SAMPLE_RATE


def write_stereo(path: str | Path, user: np.ndarray, agent: np.ndarray, rate: int) -> None:
    """Write the user's samples (S,), 16 kHz, on the left and the agent's (A,), of this rate, on the right."""
    voices = soxr.resample(user, SAMPLE_RATE, rate), agent
    soundfile.write(path, np.stack([voice[: min(map(len, voices))] for voice in voices], 1), rate)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", help="what the user says; 3 s of silence come behind it, in which the agent answers")
    parser.add_argument("--model_path", required=True, help="folder that duplex.train wrote")
    parser.add_argument("--result_path", default="reply.wav", help="both voices, in stereo (default: reply.wav)")
    args = parser.parse_args(argv)
    model, user = DuplexModel.from_pretrained(args.model_path), np.pad(load_audio(args.audio), (0, 3 * SAMPLE_RATE))
    stream, codes, begin = model.stream(), [], time.perf_counter()
    for piece in np.split(user, range(HOP, len(user), HOP)):  # as a microphone would give it
        for (token,), frame in stream.push(piece[None]):
            codes.append(frame)
            seconds = len(codes) * FRAME_SECONDS
            if token == model.tokens.bos:
                print(f"{seconds:6.2f} s ", end="")
            elif token == model.tokens.eos:
                print(f"  to {seconds:.2f} s")
            elif token != model.tokens.pad:
                print(model.tokenizer.decode([token]), end="", flush=True)
    factor = (time.perf_counter() - begin) / seconds
    agent = model.audio_of(torch.cat(codes)).cpu().numpy()
    write_stereo(args.result_path, user, agent, model.codec.sample_rate)
    print(f"\n{args.result_path}: {seconds:.2f} s, real-time factor {factor:.2f}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
