"""Talk to a DuplexModel: what the agent says to a recording, in text as it comes, and in sound.

python -m duplex.talk --model_path run user.wav --result_path reply.wav  # user on the left, agent on the right
"""

import argparse
import sys
import time

import numpy as np
import soundfile
import soxr
import torch

from dataset import load_audio
from duplex.data import FRAME_SECONDS, HOP
from duplex.model import DuplexModel
from errors import run
from manifest import SAMPLE_RATE


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", help="what the user says")
    parser.add_argument("--model_path", required=True, help="folder that duplex.train wrote")
    parser.add_argument("--result_path", default="reply.wav", help="both voices, in stereo (default: reply.wav)")
    parser.add_argument("--silence", type=float, default=3.0, help="seconds of it behind the audio (default: 3)")
    args = parser.parse_args(argv)
    model, user = DuplexModel.from_pretrained(args.model_path), load_audio(args.audio)
    stream, codes, begin, words = model.stream(), [], time.perf_counter(), []
    user = np.pad(user, (0, round(args.silence * SAMPLE_RATE)))  # in which the agent answers
    user = np.pad(user, (0, -len(user) % (model.config.chunk * HOP) + model.config.lookahead * HOP))  # whole windows
    for piece in np.split(user, range(HOP, len(user), HOP)):  # as a microphone would give it
        for token, frame in stream.push(piece):
            codes.append(frame)
            if token == model.tokens.bos:
                print(f"{len(codes) * FRAME_SECONDS:6.2f} s ", end="")
            elif token == model.tokens.eos:
                print(f"  to {len(codes) * FRAME_SECONDS:.2f} s")
            elif token != model.tokens.pad:
                words.append(token)
                print(model.tokenizer.decode([token]), end="", flush=True)
    print()
    seconds = time.perf_counter() - begin
    agent = model.audio_of(torch.stack(codes)).cpu().numpy()
    rate = model.codec.sample_rate
    user = soxr.resample(user, SAMPLE_RATE, rate)
    stereo = np.zeros((max(len(user), len(agent)), 2), np.float32)
    stereo[: len(user), 0], stereo[: len(agent), 1] = user, agent
    soundfile.write(args.result_path, stereo, rate)
    factor = seconds / (len(codes) * FRAME_SECONDS)
    print(f"{args.result_path}: {len(codes) * FRAME_SECONDS:.2f} s, real-time factor {factor:.2f}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
