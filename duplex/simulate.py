"""Conversations made of two manifests: questions, and the answers to them in another voice.

    python -m duplex.simulate --questions questions.jsonl --answers answers.jsonl --output_dir talks --count 3000

Line by line, an answer belongs to the question of the same number. A conversation has one or two questions; in a share
of those with two the second comes while the agent still answers the first, and the agent falls silent.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from dataset import load_audio, open_records
from duplex.data import FRAME_SECONDS, HOP, frame_of
from errors import InputError, run
from manifest import SAMPLE_RATE, Records, clips_of

ANSWER_AFTER = 0.4  # seconds between the end of a question and the beginning of its answer
SILENT_AFTER = 0.4  # seconds in which an agent that is interrupted falls silent


def simulate(questions: Records, answers: Records, indices: Sequence[int], interruption: float, random) -> tuple:
    """(User's samples (S,), agent's samples (S,), turns) of a conversation about these questions, one or two.

    The agent begins with a frame, as a voice of frames does; it is silent in the first one of a turn, in which the code
    that begins the turn stands in place of sound. An interrupted answer keeps the words for which the text
    channel, a token a frame and thus ahead of the voice, has room.
    """
    channels, turns, now = {"user": [], "agent": []}, [], random.uniform(0.2, 0.8)  # seconds
    is_interrupted = len(indices) > 1 and random.random() < interruption

    def say(role: str, start: float, samples: np.ndarray, text: str) -> float:
        channels[role].append((round(start * SAMPLE_RATE), samples))
        end = start + len(samples) / SAMPLE_RATE
        turns.append({"role": role, "start": round(start, 3), "end": round(end, 3), "text": text})
        return end

    for number, index in enumerate(indices):
        question, answer = (load_audio(*clips_of(records[index])[0]) for records in (questions, answers))
        answer = np.pad(answer, (HOP, 0))
        end, text = say("user", now, question, questions[index]["txt"]), answers[index]["txt"]
        start = frame_of(end + ANSWER_AFTER) * FRAME_SECONDS
        now = start + len(answer) / SAMPLE_RATE + random.uniform(0.2, 0.8)  # the next question begins
        if is_interrupted and number == 0:
            now = start + random.uniform(0.3, 0.6)
            answer = answer[: round((now + SILENT_AFTER - start) * SAMPLE_RATE)]
            text = " ".join(text.split()[: int((now + SILENT_AFTER - start) / FRAME_SECONDS) - 1])
        say("agent", start, answer, text)
    size = round(max(turn["end"] for turn in turns) * SAMPLE_RATE) + SAMPLE_RATE // 2
    signals = {role: np.zeros(size, np.float32) for role in channels}
    for role, parts in channels.items():
        for start, samples in parts:
            signals[role][start : start + len(samples)] += samples
    return signals["user"], signals["agent"], sorted(turns, key=lambda turn: turn["start"])


def write_conversations(
    questions: Records, answers: Records, folder: Path, count: int, interruption: float = 0.3, seed: int = 0
) -> None:
    """conversations.jsonl, and the two channels of each conversation in wav/. Raises InputError."""
    if len(questions) != len(answers):
        raise InputError(f"{len(questions)} questions and {len(answers)} answers; wanted one answer for each question")
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(seed), []
    order = np.concatenate([random.permutation(len(questions)) for _ in range(-(-2 * count // len(questions)))])
    for number in range(count):
        indices = order[2 * number : 2 * number + random.integers(1, 3)]
        *channels, turns = simulate(questions, answers, indices.tolist(), interruption, random)
        names = {role: f"wav/{number:05}_{role}.wav" for role in ("user", "agent")}
        for name, samples in zip(names.values(), channels, strict=True):
            soundfile.write(folder / name, samples, SAMPLE_RATE)
        rows.append(names | {"turns": turns})
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, help="manifest of what users ask")
    parser.add_argument("--answers", required=True, help="manifest of the answers, in the same order")
    parser.add_argument("--output_dir", type=Path, required=True, help="where conversations.jsonl and wav/ go")
    parser.add_argument("--count", type=int, required=True, help="conversations to make")
    parser.add_argument("--interruption", type=float, default=0.3, help="share of those with two questions (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other conversations (0)")
    args = parser.parse_args(argv)
    records = open_records(args.questions), open_records(args.answers)
    write_conversations(*records, args.output_dir, args.count, args.interruption, args.seed)


if __name__ == "__main__":
    run(main)
