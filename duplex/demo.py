"""The stages of python -m duplex, in a module that processes of its own can import."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import load_audio, open_records
from demo.data import ACCENTS, KNOWN_VOICES, WORDS, synthesize
from demo.stages import CORES, say
from duplex.codecs import MelCodec
from duplex.data import HOP, open_conversations
from duplex.evaluate import evaluate
from duplex.model import DuplexConfig, DuplexModel
from duplex.simulate import write_conversations
from duplex.train import encode_once
from errors import InputError
from model import SpeechLLM

REQUESTS = ("please GIVE COUNT THINGS", "WHO DID COUNT THINGS")
ANSWER = "her uncle sold COUNT THINGS"  # as the demo's recogniser knows sentences; it takes three words for one
AGENT = ("en-us+f2", 200, 50, 0, 1.0)  # voice, words a minute, pitch, its range, speed: as predictable as can be
KINDS = ("direct", "decoder")
ROOT = Path(__file__).parent.parent
MODEL = {"projector_stride": 4, "projector_hidden_size": 512, "freeze_params": [r"^encoder\."]}  # the LLM is trained
MODEL |= {
    "chunk": 3,  # with lookahead 1 it hears 0.24 s late; 0.4 s are too late to fall silent in 0.5 s
    "context": 10,
    "lookahead": 1,
    "speech_decoder_size": 128,
    "speech_decoder_layers": 2,
    "speech_decoder_dropout": 0.0,
    "cfg_unconditional_prob": 0.0,  # a decoder of one layer had a WER of 25.7 % with 0.1, of 14.4 % without
    "cfg_scale": 1.0,
}
TRAINING = {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "lr_scheduler_type": "cosine"}
TRAINING |= {"warmup_steps": 0.05, "adam_beta2": 0.98, "logging_steps": 25, "save_strategy": "no", "report_to": "none"}


@dataclass
class Settings:
    requests: int = 5200
    conversations: int = 2800  # 1,600, at a learning rate of 3e-3, were learnt by heart: 36 % exact
    test_conversations: int = 60
    num_codebooks: int = 4
    codebook_size: int = 128
    steps: int = 900
    seed: int = 0


def on_all_cores(function, jobs: list[tuple]) -> None:
    """Call the function with each tuple of arguments, in processes side by side."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CORES, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(function, *zip(*jobs, strict=True)))


def make_conversations(folder: Path, settings: Settings) -> None:
    """train/ and test/, in which no request is one of train/'s; their manifests and wav/ lie beside them."""
    rng, earlier, paths, jobs = random.Random(settings.seed), set(), {}, []
    (folder / "wav").mkdir(exist_ok=True)
    counts = {"train": settings.requests, "test": 2 * settings.test_conversations}
    voices = [name for name in KNOWN_VOICES if name != AGENT[0].partition("+")[2]]
    for split, count in counts.items():
        rows = {"requests": [], "answers": []}
        while len(rows["requests"]) < count:
            words = {slot: rng.choice(choices) for slot, choices in WORDS.items()}
            text, reply = (" ".join(words.get(s, s) for s in form.split()) for form in (rng.choice(REQUESTS), ANSWER))
            if text in earlier:
                continue
            earlier.add(text)
            voice = f"{rng.choice(ACCENTS)}+{rng.choice(voices)}"
            prosody = rng.randint(190, 250), rng.randint(35, 65), rng.randint(35, 65)
            speed = rng.uniform(0.88, 1.14) if split == "train" else 1.0
            for kind, spoken in (("requests", (text, voice, *prosody, speed)), ("answers", (reply, *AGENT))):
                if spoken not in paths:  # an answer is spoken once
                    paths[spoken] = f"wav/{len(paths):05}.wav"
                    jobs.append((f"{folder}/{paths[spoken]}", *spoken))
                rows[kind].append({"wav": paths[spoken], "txt": spoken[0]})
        for kind, part in rows.items():
            (folder / f"{split}_{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    on_all_cores(synthesize, [(jobs[i : i + 200],) for i in range(0, len(jobs), 200)])
    for split, count, share in (("train", settings.conversations, 0.3), ("test", settings.test_conversations, 0.5)):
        manifests = [open_records(folder / f"{split}_{kind}.jsonl") for kind in ("requests", "answers")]
        write_conversations(*manifests, folder / split, count, share, settings.seed)


def learn_codec(folder: Path, settings: Settings) -> None:
    paths = sorted({row["wav"] for row in map(json.loads, (folder / "train_answers.jsonl").read_text().splitlines())})
    clips = [F.pad(torch.from_numpy(load_audio(folder / path)), (HOP, HOP)) for path in paths]  # with silence
    codec = MelCodec.learn(clips, settings.num_codebooks, settings.codebook_size, settings.seed)
    codec.save(folder / "codec.safetensors")


def fields_of(demo: Path, folder: Path, kind: str) -> dict:
    """Fields of DuplexConfig."""
    paths = {"encoder_name_or_path": demo / "whisper.pt", "llm_model_name_or_path": demo / "llm"}
    paths |= {"codec": folder / "codec.safetensors"}
    return {"kind": kind} | {name: str(path.absolute()) for name, path in paths.items()} | MODEL


def encode_share(demo: Path, folder: Path, rank: int) -> None:
    model = DuplexModel.from_config(DuplexConfig(**fields_of(demo, folder, "direct")))
    dataset = model.make_conversations(open_conversations(folder / "train/conversations.jsonl"))
    encode_once(model, dataset, folder / "frames", rank, CORES)


def train_both(demo: Path, folder: Path, settings: Settings) -> None:
    """Two commands side by side, of which DEMO/duplex/KIND.log has all lines, and the screen the last ones."""
    # Both have threads for all cores, and take turns on these; whoever is left alone has them all.
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    runs = {}
    for kind in KINDS:
        values = fields_of(demo, folder, kind) | TRAINING | {"max_steps": settings.steps, "seed": settings.seed}
        values |= {"projector_model_path": demo / "run/model.safetensors"}
        values |= {"data_path": folder / "train/conversations.jsonl", "output_dir": folder / kind}
        values |= {"encoder_cache": folder / "frames", "disable_tqdm": True, "use_cpu": True}
        words = [sys.executable, "-m", "duplex.train"]
        for name, value in values.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        print("      $", *words[1:], flush=True)
        with open(folder / f"{kind}.log", "w") as log:
            runs[kind] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    while running := [process for process in runs.values() if process.poll() is None]:
        with suppress(subprocess.TimeoutExpired):
            running[0].wait(10)
        for kind in KINDS:
            losses = [line for line in (folder / f"{kind}.log").read_text().splitlines() if line.startswith("{'loss'")]
            say("models", f"{kind}: {losses[-1] if losses else 'starts'}")
    for kind, process in runs.items():
        if process.returncode:
            raise InputError(f"{kind}: duplex.train ended with {process.returncode}; see {folder / kind}.log")


def answer(demo: Path, folder: Path, kind: str) -> None:
    """KIND.json, the figures of a model; replies_KIND/, its answers to listen to."""
    model, recognizer = DuplexModel.from_pretrained(folder / kind), SpeechLLM.from_pretrained(demo / "run")
    replies = folder / f"replies_{kind}"
    replies.mkdir(exist_ok=True)
    figures = evaluate(model, open_conversations(folder / "test/conversations.jsonl"), recognizer, replies)
    (folder / f"{kind}.json").write_text(json.dumps(figures, indent=2) + "\n")
