"""Conversations made of two manifests: questions, and the answers to them in another voice.

    python -m duplex.simulate --questions questions.jsonl --answers answers.jsonl --output_dir talks --count 3000

Line by line, an answer belongs to the question of the same number. A conversation has one or two questions; in a share
of those with two the second comes while the agent still answers the first, and the agent falls silent.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from dataset import load_audio
from errors import InputError
from manifest import SAMPLE_RATE, Records, clips_of

ANSWER_AFTER = 0.3  # seconds between the end of a question and the beginning of its answer
SILENT_AFTER = 0.3  # seconds in which an agent that is interrupted falls silent


def simulate(questions: Records, answers: Records, indices: Sequence[int], interruption: float, random) -> tuple:
    """(user's samples (S,), agent's samples (S,), turns) of a conversation about these questions, one or two."""
    channels, turns, now = {"user": [], "agent": []}, [], random.uniform(0.2, 0.8)  # seconds
    is_interrupted = len(indices) > 1 and random.random() < interruption

    def say(role: str, start: float, samples: np.ndarray, text: str) -> float:
        channels[role].append((round(start * SAMPLE_RATE), samples))
        end = start + len(samples) / SAMPLE_RATE
        turns.append({"role": role, "start": round(start, 3), "end": round(end, 3), "text": text})
        return end

    for number, index in enumerate(indices):
        question, answer = (load_audio(*clips_of(records[index])[0]) for records in (questions, answers))
        end = say("user", now, question, questions[index]["txt"])
        if is_interrupted and number == 0:
            now = end + ANSWER_AFTER + random.uniform(0.3, 0.6)  # the next question begins
            answer = answer[: round((now + SILENT_AFTER - end - ANSWER_AFTER) * SAMPLE_RATE)]
            said = len(answer) / len(load_audio(*clips_of(answers[index])[0]))
            words = answers[index]["txt"].split()
            say("agent", end + ANSWER_AFTER, answer, " ".join(words[: round(said * len(words))]))
        else:
            now = say("agent", end + ANSWER_AFTER, answer, answers[index]["txt"]) + random.uniform(0.2, 0.8)
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
