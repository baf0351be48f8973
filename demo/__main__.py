"""The whole job on a laptop, nothing downloaded: error rates, what the model hears and makes up, pictures, a report.

    python -m demo           # five to six minutes on two cores
    python -m demo --quick   # everything once in about a minute; its error rates mean nothing
    python -m demo --projector mlp  # or --lora_r 8, --encoder wav2vec2: only the stages that differ are new

espeak-ng speaks made-up sentences in 32 voices. A small Whisper encoder learns to recognise them with CTC, a small
Qwen2 learns to repeat a noisy text that stands where the speech will stand. Then both are frozen, and the real
commands, train.py and recognize.py, train the projector between them and decode three test sets: new sentences in
known voices, in voices that no part has heard, and clips without speech. No test sentence is in any training data;
their words are.

Each stage writes a stamp when its output is complete. A second run reuses what has one, unless the stage's settings or
a stage before it have changed. A variant writes beside the default: run_mlp/, result_known_voices_mlp.jsonl ...
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that wait must not spin: beside another busy program 38 steps of the encoder took 160 s so, and now 9 s.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from demo.data import TESTS, make_data
from demo.models import RECIPES, train_encoder, train_llm
from demo.stages import CORES, Stage, put, run_in_child
from errors import run
from from_nothing import text_from_nothing
from intervals import LEVEL, rate_interval
from projectors import PROJECTORS
from result_file import read_rows
from score import main as score_main
from score import score
from tools.plot import main as plot

ROOT = Path(__file__).parent.parent
VARIANT = ("encoder", "projector", "lora_r")  # settings in which a run may differ from the default
NUM_RESAMPLES = 1000  # for the intervals
PROCESSES = min(2, CORES)  # side by side, for small models gain little from more threads


@dataclass
class Settings:
    """What decides the outcome of a run."""

    train_sentences: int = 6000
    test_sentences: int = 250  # in each of the two test sets
    encoder_epochs: float = 1.65
    llm_steps: int = 600
    projector_epochs: float = 1.75
    projector_batch_size: int = 16
    projector_stride: int = 4  # 12.5 Hz, which duplex/ starts from
    projector_hidden_size: int = 512
    projector_learning_rate: float = 3e-3
    projector_no_speech_share: float = 0.1  # without it the model makes up 110 words a minute where nobody speaks
    seed: int = 0
    encoder: str = "whisper"
    projector: str = "conv1d"
    lora_r: int = 0

    def differences(self, *names: str) -> dict:
        """Those of the named settings that are not the default's."""
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Settings, name)}


QUICK = {"train_sentences": 300, "test_sentences": 20, "encoder_epochs": 1, "llm_steps": 30, "projector_epochs": 1}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a twentieth of the data and of the steps: shows that everything runs")
    add("--output_dir", type=Path, help="where everything goes (default: demo_run, with --quick demo_run_quick)")
    add("--seed", type=int, default=0, help="another seed makes other sentences and other weights (default: 0)")
    add("--encoder", choices=RECIPES, default="whisper", help="what is trained on the speech (default: whisper)")
    projectors = ["conv1d", *PROJECTORS]
    add("--projector", choices=projectors, default="conv1d", help="--projector of train.py (default: conv1d)")
    add("--lora_r", type=int, default=0, help="--lora_r of train.py: rank of LoRA on the LLM (default: 0 = none)")
    args = parser.parse_args(argv)
    flags = {name: getattr(args, name) for name in ("seed", *VARIANT)}
    settings = Settings(**flags, **(QUICK if args.quick else {}))
    folder = args.output_dir or Path("demo_run_quick" if args.quick else "demo_run")
    folder.mkdir(parents=True, exist_ok=True)

    def stage(name: str, after: list[Stage], *fields: str, variant: tuple[str, ...] = ()) -> Stage:
        values = {field: getattr(settings, field) for field in ("seed", *fields)}
        return Stage(folder, name, values, after, settings.differences(*variant))

    begin = time.perf_counter()
    data = stage("data", [], "train_sentences", "test_sentences")
    manifests = [f"{name}.jsonl" for name in ("train", "dev", *(f"test_{test}" for test in (*TESTS, "nothing")))]
    data.run(["tokenizer", "wav", *manifests], make_data, folder, **data.settings)
    # On few cores two small trainings side by side are faster than one after the other.
    llm, encoder = stage("llm", [data], "llm_steps"), stage("encoder", [data], "encoder_epochs", variant=("encoder",))
    child = {"target": run_in_child, "args": (llm, ["llm"], train_llm, folder), "kwargs": llm.settings}
    process = multiprocessing.get_context("spawn").Process(**child, daemon=True)
    if llm.is_there(["llm"]):  # nothing to train: a new process would only take its time to start
        llm.run(["llm"], train_llm)
    else:
        process.start()

    def threads() -> int:  # the encoder takes over the LLM's cores as soon as they are free
        return max(1, CORES // 2) if process.is_alive() else CORES

    encoder.run([RECIPES[settings.encoder].output], train_encoder, folder, threads, **encoder.settings)
    if process.pid:
        process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    fields = [name for name in asdict(settings) if name.startswith("projector_")]
    projector = stage("projector", [llm, encoder], *fields, variant=VARIANT)
    model = folder / f"run{projector.suffix}"
    projector.run([model.name], train_projector, folder, settings, model)
    stages = [data, llm, encoder, projector]
    results = {name: folder / f"result_{name}{projector.suffix}.jsonl" for name in (*TESTS, "nothing")}
    stages.append(stage("tests", [projector], variant=VARIANT))
    stages[-1].run([result.name for result in results.values()], recognize, model, folder, results)
    summarize(folder, settings, stages)
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {folder}/")


def command(script: str, *flags) -> None:
    """Run a command of the repository as a user would, on two processes that share the cores."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", str(ROOT / script)]
    words += map(str, flags)
    print("      $ python", " ".join(words), flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, CORES // PROCESSES)), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, **threads})


def train_projector(folder: Path, settings: Settings, output_dir: Path) -> None:
    partial, encoder = Path(f"{output_dir}.partial"), folder / RECIPES[settings.encoder].output
    shutil.rmtree(partial, ignore_errors=True)
    command(
        "train.py",
        *("--llm_model_name_or_path", folder / "llm", "--encoder_name_or_path", encoder),
        *("--data_path", folder / "train.jsonl", "--eval_data_path", folder / "dev.jsonl"),
        *("--output_dir", partial, "--seed", settings.seed),
        *("--num_train_epochs", settings.projector_epochs, "--learning_rate", settings.projector_learning_rate),
        *("--per_device_train_batch_size", settings.projector_batch_size // PROCESSES, "--warmup_steps", 0.05),
        *("--projector", settings.projector, "--projector_stride", settings.projector_stride),
        *("--projector_hidden_size", settings.projector_hidden_size),
        *("--no_speech_share", settings.projector_no_speech_share),
        *("--lora_r", settings.lora_r, "--lora_alpha", 2),  # with 16 the LLM learns to guess: WER 3.1 and 5.0 %
        *("--eval_strategy", "steps", "--eval_steps", 150, "--lr_scheduler_type", "cosine", "--logging_steps", 10),
        *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", True, "--use_cpu"),
    )
    put(partial, output_dir)


def recognize(model: Path, folder: Path, results: dict[str, Path]) -> None:
    """Decode all test sets in one go, which loads the model once, and write a result file for each."""
    tests = {name: (folder / f"test_{name}.jsonl").read_text().splitlines(keepends=True) for name in results}
    manifest, result = folder / "test_all.jsonl", folder / "result_all.jsonl"
    manifest.write_text("".join(sum(tests.values(), [])))
    result.unlink(missing_ok=True)
    command(
        "recognize.py",
        *("--model_path", model, "--data_path", manifest, "--result_path", result, "--num_beams", 4),
        *("--max_new_tokens", 40, "--num_workers", 0, "--device", "cpu"),
    )
    rows = map(json.loads, result.read_text().splitlines())
    for name, lines in tests.items():
        part = (next(rows) | {"index": index} for index in range(len(lines)))
        results[name].write_text("".join(json.dumps(row) + "\n" for row in part))


def summarize(folder: Path, settings: Settings, stages: list[Stage]) -> None:
    """Print error rates, three transcripts, what the model hears and what it makes up; write summary.json, pictures."""
    summary, suffix = {}, stages[-1].suffix
    print(f"\n| test set | sentences | words | WER | {LEVEL} % interval |\n|---|---|---|---|---|")
    for name in TESTS:
        rows = read_rows(str(folder / f"test_{name}.jsonl"), str(folder / f"result_{name}{suffix}.jsonl"))
        result = score(rows.references, rows.hypotheses)
        interval = rate_interval(result.lines, NUM_RESAMPLES)
        summary[f"wer_{name}"], summary[f"interval_{name}"] = result.all.rate, str(interval)
        title, num_words = name.replace("_", " "), result.all.reference_length
        print(f"| new sentences, {title} | {len(rows.keys)} | {num_words} | {result.all.rate:.2%} | {interval} % |")
    for reference, hypothesis in list(zip(rows.references, rows.hypotheses, strict=True))[:3]:
        print(f"\nreference  {reference}\nhypothesis {hypothesis}")
    facts = json.loads((folder / f"run{suffix}" / "config.json").read_text())["training"]
    summary["listening_gap"] = facts["evaluation listening_gap"]
    rows = read_rows(str(folder / "test_nothing.jsonl"), str(folder / f"result_nothing{suffix}.jsonl"))
    nothing = text_from_nothing(rows.references, rows.hypotheses, rows.durations)
    summary["words_a_minute_from_nothing"] = nothing.words_per_minute
    print(f"\nlistening gap: {summary['listening_gap']:.2f} nats a token more with another clip's audio")
    print(nothing)
    draw(folder, suffix)
    summary["seconds"] = {stage.name: stage.stamp()["seconds"] for stage in stages}
    summary["settings"] = asdict(settings)
    (folder / f"summary{suffix}.json").write_text(json.dumps(summary, indent=2) + "\n")


def draw(folder: Path, suffix: str) -> None:
    """The report with audio players, and the pictures: of the run, of error rates, of what the LLM looks at."""
    test = ["--data_path", str(folder / "test_new_voices.jsonl")]
    result = str(folder / f"result_new_voices{suffix}.jsonl")
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())):  # the figures stand in the table
        score_main([*test, "--result_path", result, "--html", str(folder / f"report{suffix}.html")])
    run, clip = str(folder / f"run{suffix}"), str(folder / "wav/test_new_voices_00001.wav")
    pictures = {
        "run": [run],
        "wer": ["--result", result, *test],
        "attention": ["--attention", clip, "--model_path", run],
    }
    for name, flags in pictures.items():
        plot([*flags, "--out", str(folder / f"{name}{suffix}.png")])
    print(f"report{suffix}.html in {folder}/ shows every alignment, with audio")


if __name__ == "__main__":
    run(main)
