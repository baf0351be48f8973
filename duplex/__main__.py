"""A demo that one can hear: somebody asks for things of the demo's world, and a voice of codes repeats which.

    python -m demo && python -m duplex  # 12 minutes more on two cores
    python -m demo --quick && python -m duplex --quick  # everything once; its figures mean nothing

espeak-ng asks in many voices ("please bring nine letters") and answers in another one ("her uncle sold nine letters"),
sometimes interrupted by the next request. A codec is learnt from the answers. The demo's encoder hears the requests,
once for both kinds of model; its LLM, trained as a whole now, answers new requests, to which the demo's recogniser
listens. Everything is in DEMO/duplex/; a stage that is complete is not done again.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from demo.stages import CORES, Stage
from duplex.demo import (
    AGENT,
    KINDS,
    MODEL,
    REQUESTS,
    TRAINING,
    Settings,
    answer,
    encode_share,
    learn_codec,
    make_conversations,
    on_all_cores,
    train_both,
)
from errors import InputError, run

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


QUICK = {"requests": 200, "conversations": 64, "test_conversations": 4, "steps": 10}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data and few steps: shows that everything runs")
    parser.add_argument("--demo", type=Path, help="output of python -m demo (default: demo_run; demo_run_quick)")
    args = parser.parse_args(argv)
    demo = args.demo or Path("demo_run_quick" if args.quick else "demo_run")
    if not (demo / "run").is_dir():
        raise InputError(f"{demo}: no run/ in it; start python -m demo{' --quick' if args.quick else ''} first")
    settings, folder, begin = Settings(**(QUICK if args.quick else {})), demo / "duplex", time.perf_counter()
    demo, folder = demo.absolute(), folder.absolute()
    folder.mkdir(exist_ok=True)
    values = asdict(settings)
    speech = Stage(folder, "speech", values | {"agent": AGENT, "requests of": REQUESTS}, [], {})
    speech.run(["train", "test"], make_conversations, folder, settings)
    codec = Stage(folder, "codec", values, [speech], {})
    codec.run(["codec.safetensors"], learn_codec, folder, settings)
    frames = Stage(folder, "frames", {"model": MODEL}, [codec], {})
    frames.run(["frames"], on_all_cores, encode_share, [(demo, folder, rank) for rank in range(CORES)])
    models = Stage(folder, "models", {"training": TRAINING, "steps": settings.steps}, [frames], {})
    models.run([*KINDS], train_both, demo, folder, settings)
    answers = Stage(folder, "answers", {}, [models], {})
    results = [f"{kind}.json" for kind in KINDS]
    answers.run(results, on_all_cores, answer, [(demo, folder, kind) for kind in KINDS])
    figures = [json.loads((folder / result).read_text()) for result in results]
    print(f"\n| new requests: {figures[0]['requests']:.0f} | direct | decoder | aim |\n|---|---|---|---|")
    for name, (text, form, aim) in AIMS.items():
        print("|", " | ".join([text, *(form.format(part[name]) for part in figures), aim]), "|")
    print(f"\n{time.perf_counter() - begin:.0f} s; listen to {folder}/replies_*/: requests left, answers right")


if __name__ == "__main__":
    run(main)
