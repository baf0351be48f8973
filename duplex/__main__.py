"""A demo that one can hear: somebody asks for things of the demo's world, and a voice of codes repeats what and how many.

    python -m demo && python -m duplex  # about twelve minutes more on two cores
    python -m demo --quick && python -m duplex --quick  # everything once; its figures mean nothing

espeak-ng asks in many voices ("please bring nine letters") and answers in another one ("the nine letters"), sometimes
interrupted by the next request. A codec is learnt from the answers. The demo's encoder hears the requests, once for
both kinds of model; its LLM, trained as a whole now, answers new requests. The demo's recogniser listens to the answers.
Everything is in DEMO/duplex/; a stage that is complete is not done again.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile
import torch

from dataset import load_audio, open_records
from demo.data import ACCENTS, KNOWN_VOICES, WORDS, synthesize
from demo.stages import CORES, Stage
from duplex.codecs import MelCodec
from duplex.data import open_conversations
from duplex.evaluate import evaluate
from duplex.model import DuplexModel
from duplex.simulate import write_conversations
from duplex.train import encode_once
from errors import InputError, run
from model import SpeechLLM

REQUESTS = ("please GIVE COUNT THINGS", "WHO DID COUNT THINGS")
AGENT = ("en-us+f2", 200, 50, 0, 1.0)  # voice, words a minute, pitch, its range, speed: as predictable as can be
KINDS = ("direct", "decoder")
ROOT = Path(__file__).parent.parent
AIMS = {
    "exact": ("answers with exactly the right text", "{:.1%}", ">= 80 %"),
    "bleu": ("BLEU of the text", "{:.1f}", ""),
    "wer_reply": ("WER of our recogniser on the spoken answers", "{:.1%}", "codec's + 10"),
    "wer_codec": ("WER on the codec's copy of the true answers", "{:.1%}", ""),
    "first_word": ("first word after the request, median", "{:.2f} s", "<= 0.5 s"),
    "first_sound": ("first sound, median", "{:.2f} s", ""),
    "obeyed": ("interruptions after which it falls silent in 0.5 s", "{:.1%}", ">= 80 %"),
    "real_time_factor": ("real-time factor on one core", "{:.2f}", "< 1"),
}


@dataclass
class Settings:
    requests: int = 5000
    conversations: int = 3000
    test_conversations: int = 120
    num_codebooks: int = 4
    codebook_size: int = 128
    steps: int = 1000
    seed: int = 0


QUICK = {"requests": 200, "conversations": 64, "test_conversations": 4, "steps": 10}
MODEL = f"""--projector_stride 4 --projector_hidden_size 512 --freeze_params ^encoder\\. --chunk 4 --context 12
    --lookahead 2 --speech_decoder_size 128 --speech_decoder_layers 2 --speech_decoder_dropout 0""".split()
TRAINING = """--per_device_train_batch_size 32 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 0.05
    --adam_beta2 0.98 --logging_steps 25 --save_strategy no --report_to none --disable_tqdm True --use_cpu""".split()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data and few steps: shows that everything runs")
    parser.add_argument("--demo", type=Path, help="output of python -m demo (default: demo_run; demo_run_quick)")
    args = parser.parse_args(argv)
    demo = args.demo or Path("demo_run_quick" if args.quick else "demo_run")
    if not (demo / "run").is_dir():
        raise InputError(f"{demo}: no run/ in it; start python -m demo{' --quick' if args.quick else ''} first")
    settings, folder, begin = Settings(**(QUICK if args.quick else {})), demo / "duplex", time.perf_counter()
    folder.mkdir(exist_ok=True)
    values = asdict(settings)
    speech = Stage(folder, "speech", values | {"agent": AGENT, "requests of": REQUESTS}, [], {})
    speech.run(["train", "test"], make_conversations, folder, settings)
    codec = Stage(folder, "codec", values, [speech], {})
    codec.run(["codec.safetensors"], learn_codec, folder, settings)
    frames = Stage(folder, "frames", {"model": MODEL}, [speech], {})
    frames.run(["frames"], on_all_cores, encode_share, [(demo, folder, rank) for rank in range(CORES)])
    models = Stage(folder, "models", {"training": TRAINING, "steps": settings.steps}, [codec, frames], {})
    models.run([f"{kind}" for kind in KINDS], train_both, demo, folder, settings)
    answers = Stage(folder, "answers", {}, [models], {})
    results = [f"{kind}.json" for kind in KINDS]
    answers.run(results, on_all_cores, answer, [(demo, folder, kind) for kind in KINDS])
    figures = [json.loads((folder / result).read_text()) for result in results]
    print(f"\n| new requests: {figures[0]['requests']:.0f} | direct | decoder | aim |\n|---|---|---|---|")
    for name, (text, form, aim) in AIMS.items():
        print("|", " | ".join([text, *(form.format(part[name]) for part in figures), aim]), "|")
    print(f"\n{time.perf_counter() - begin:.0f} s; listen to {folder}/replies_*/: requests left, answers right")


def on_all_cores(function, jobs: list[tuple]) -> None:
    """Call the function with each tuple of arguments, in processes side by side."""
    with multiprocessing.get_context("spawn").Pool(CORES, torch.set_num_threads, (1,)) as pool:
        pool.starmap(function, jobs, chunksize=1)


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
            text = " ".join(words.get(slot, slot) for slot in rng.choice(REQUESTS).split())
            if text in earlier:
                continue
            earlier.add(text)
            reply = f"the {words['COUNT']} {words['THINGS']}"
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
    clips = [torch.from_numpy(load_audio(folder / path)) for path in paths]
    codec = MelCodec.learn(clips, settings.num_codebooks, settings.codebook_size, settings.seed)
    codec.save(folder / "codec.safetensors")


def parts(demo: Path, folder: Path) -> list[str]:
    """Flags of duplex.train that name the parts of a model."""
    names = {"encoder_name_or_path": demo / "whisper.pt", "llm_model_name_or_path": demo / "llm"}
    names |= {"codec": folder / "codec.safetensors"}
    return [*MODEL, *sum(([f"--{name}", str(path.absolute())] for name, path in names.items()), [])]
