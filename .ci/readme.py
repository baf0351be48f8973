"""Run every command and Python example of README.md and of the recipes' READMEs, on the output of the quick demo.

The commands are run as they stand but for names: models and data that are not here become the demo's, 8 processes
become 2 on the CPU, and long training stops after a few steps. Hub names are looked up on a hub of our own, where tiny
random models have them. `make` lines are run by .ci/run itself. Commands whose output no other one reads run
beside the others, one at a time, and give way to them.
"""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo_run_quick"
FOLDER = DEMO / "readme"  # where the commands run
READMES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/*/README.md"))]
sys.path += [str(ROOT), str(ROOT / "tests")]

from fake_hub import FakeHub  # noqa: E402
from families import ENCODERS, LLMS  # noqa: E402
from test_recipes import make_aishell, make_librispeech, make_recordings  # noqa: E402

HUB = {
    "facebook/mms-300m": ENCODERS["wav2vec2_large"],
    "microsoft/wavlm-large": ENCODERS["wavlm_large"],
    "Qwen/Qwen3-0.6B": LLMS["qwen3"],
    "Qwen/Qwen2-1.5B-Instruct": LLMS["qwen2"],
    "meta-llama/Llama-3.2-1B": LLMS["gpt2"],  # a base LLM, without a chat template
    "meta-llama/Meta-Llama-3-8B-Instruct": LLMS["llama"],
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLMS["qwen2"],
}
SERVER = multiprocessing.get_context("forkserver")
PROGRAMS = ("demo", "duplex", "tools", "recipes", "tests")  # folders that `python -m` starts, or that commands name
SHORT = "--max_steps 4 --save_steps 4 --eval_steps 4 --use_cpu --bf16 False --gradient_accumulation_steps 1"
TINY = f"{SHORT} --dataloader_num_workers 0"
BESIDE = r"\$ python -m (demo|tools\.)"  # no other command reads what these write
SMALLEST = "--llm nano --batch_size 1 --steps 1 --repeats 1"
NAMES = {
    # On one process, to save half a minute: README.md has ZeRO-3.
    r"torchrun --standalone --nproc_per_node=8 (train\.py recipes/(librispeech|aishell)/train\.yaml) --deepspeed \S+": (
        rf"python \1 --encoder_name_or_path {DEMO / 'whisper.pt'} {TINY}"
    ),
    r"name_or_path Qwen2-1.5B-Instruct(?!\S)": f"name_or_path {DEMO / 'llm'}",
    r"((whisper_model|encoder)_name_or_path) tiny(\.en)?(?!\S)": rf"\1 {DEMO / 'whisper.pt'}",
    r"--nproc_per_node=8": "--nproc_per_node=2",
    r"for part in test-clean test-other": "for part in test-other",
    r"srun .*?(?=torchrun)": "",  # there is one machine
    r"--nnodes=2": "--nnodes=1",
    r"--rdzv_endpoint=node1:29500": "--rdzv_endpoint=localhost:0",
    r"--bf16 True": "--use_cpu",
    r"checkpoint-600": "checkpoint-4",
    r"--max_batch_seconds 240": "--max_batch_seconds 40",
    r"--save_steps 100": "--save_steps 4 --max_steps 4",
    r"--streaming --max_steps 600": "--streaming --max_steps 4",
    r"--gradient_accumulation_steps 8": "--gradient_accumulation_steps 1",
    r"(train\.py( --config)? recipes/whisper_qwen\.yaml)": rf"\1 --encoder_name_or_path {DEMO / 'whisper.pt'} {SHORT}",
    r"(train\.py( --config)? recipes/wavlm_llama\.yaml)": rf"\1 --projector_hidden_size 32 {SHORT}",
    r"(.*--overfit 4)(?!\S)": r"\1 --max_steps 2 --use_cpu || test $? = 2",  # after so few steps it says why not
    r"--log_predictions_steps 50": "--log_predictions_steps 2 --max_steps 4 --use_cpu",
    r"(.*train\.py .*--check)(?!\S)": r"\1 --use_cpu",
    r"demo_run(?=/)": str(DEMO),
    r"python -m tools\.matrix": "python -m tools.matrix canary",  # the others in tests/
    r"python -m demo(?!\S)": f"python -m demo --quick --output_dir {DEMO}",
    r"--encoder large-v3": "--encoder tiny",
    r"--repeats 3 --dtype bfloat16": "--repeats 3",  # a CPU that cannot compute in it takes minutes
    r"(python -m tools\.benchmark(?!\S).*)": rf"\1 {SMALLEST}",
    r"(python -m recipes\.digits\.prepare(?!\S).*)": r"\1 --recordings recordings --num_train 16 --num_test 4",
}


def commands(readme: Path) -> list[tuple[str, list[str]]]:
    """What a README tells to run: (as it is printed, the words of the process)."""
    result = []
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", readme.read_text(), re.DOTALL):
        lines = text.replace("\\\n", " ").strip().splitlines() if language == "bash" else [text]
        for line in lines:
            for pattern, replacement in NAMES.items():
                line = re.sub(pattern, replacement, line)
            if language == "python":
                result.append((line, [sys.executable, "-c", line]))
            elif not re.match(r"\s*(make|git|cd|#|$)", line):
                result.append((f"$ {' '.join(line.split())}", ["bash", "-c", line]))
    return result


def fill_folder() -> None:
    """Make FOLDER, with links to the code and to the demo's data by the names that the READMEs give them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    files = [path for ending in ("py", "txt", "yaml", "json") for path in ROOT.glob(f"*.{ending}")]
    links = {path.name: path for path in (*files, *(ROOT / name for name in PROGRAMS), DEMO / "wav")}
    links |= {"train.jsonl": DEMO / "train.jsonl", "meetings.jsonl": DEMO / "train.jsonl"}
    links |= {"test.jsonl": DEMO / "test_known_voices.jsonl"}
    clip = next((DEMO / "wav").rglob("*.wav"))
    links |= {"a.wav": clip, "b.wav": clip}
    for name, path in links.items():
        (FOLDER / name).symlink_to(path)
    dev = (DEMO / "test_new_voices.jsonl").read_text().splitlines(keepends=True)
    (FOLDER / "dev.jsonl").write_text("".join(dev[:8]))  # an untrained model answers at length
    make_recordings(FOLDER / "recordings")
    make_librispeech(FOLDER / "corpora")
    make_aishell(FOLDER / "corpora")
    make_sources(FOLDER, [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()[:8]])


def make_sources(folder: Path, rows: list[dict]) -> None:
    """The clips of `rows` as each source in the README's table; the data set of the Hub is a folder with its name."""
    from datasets import Audio, Dataset
    from lhotse import CutSet, Recording, SupervisionSegment

    hub = "fixie-ai/common_voice"
    for name in ("data/train", "speech", "audiofolder/train", "shards", "parquet", "shar", f"{hub}/en"):
        (folder / name).mkdir(parents=True)
    clips = [(DEMO / row["wav"], row["txt"]) for row in rows]
    for place in ("speech", "audiofolder/train"):
        for path, _ in clips:
            (folder / place / path.name).symlink_to(path)
    write = {
        "train.json": [json.dumps({"audio_filepath": str(path), "text": text}) for path, text in clips],
        "audiofolder/train/metadata.jsonl": [json.dumps({"file_name": p.name, "text": text}) for p, text in clips],
        "data/train/wav.scp": [f"{path.stem} {path}" for path, _ in clips],
        "data/train/text": [f"{path.stem} {text}" for path, text in clips],
    }
    write |= {f"speech/{path.stem}.txt": [text] for path, text in clips}
    for name, lines in write.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    cuts = []
    with tarfile.open(folder / "shards/train-000.tar", "w") as tar:
        for path, text in clips:
            for file in (path, folder / f"speech/{path.stem}.txt"):
                tar.add(file, file.name)
            cuts.append(Recording.from_file(path).to_cut())
            cuts[-1].supervisions = [SupervisionSegment(path.stem, path.stem, 0, cuts[-1].duration, text=text)]
    cuts = CutSet.from_cuts(cuts)
    cuts.to_file(folder / "cuts.jsonl.gz")
    cuts.to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=4)
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in clips]
    table = Dataset.from_dict({"audio": audio, "text": [text for _, text in clips]}).cast_column("audio", Audio())
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "parquet/train.parquet")
    for split in ("train", "validation"):
        table.rename_column("text", "sentence").to_parquet(folder / f"{hub}/en/{split}.parquet")
    (folder / hub / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n")


def show(readme: Path, text: str, words: list[str], nice: int = 0) -> None:
    """Run a command and print it, what it prints, and its time."""
    begin = time.perf_counter()
    out = run(words, nice)
    print(f"{text}\n{out}({time.perf_counter() - begin:.0f} s)", flush=True)
    if "tools.matrix" in text:
        rows = {row for row in out.splitlines() if row.startswith("|")}
        assert rows <= set(readme.read_text().splitlines()), f"{readme}: another table than tools.matrix prints"


def run(words: list[str], nice: int) -> str:
    """What a command prints on standard output. Exits if it fails."""
    line = words[-1]
    if words[0] != "bash" or not line.startswith("python ") or re.search("[;|&<>]", line):
        words = ["nice", "-n", str(nice), *words]
        return subprocess.run(words, cwd=FOLDER, check=True, stdout=subprocess.PIPE, text=True).stdout
    with tempfile.NamedTemporaryFile("r") as log:
        process = SERVER.Process(target=run_python, args=(shlex.split(line)[1:], log.name, nice))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{log.read()}\n{line}\nexit status {process.exitcode}")
        return log.read()


def run_python(words: list[str], log: str, nice: int) -> None:
    """What `python FILE FLAGS` or `python -m MODULE FLAGS` does, in a process that has the libraries loaded already."""
    os.nice(nice)
    multiprocessing.set_start_method("fork", force=True)  # for data-loading workers, as in any new process
    os.dup2(os.open(log, os.O_WRONLY), 1)
    os.chdir(FOLDER)
    sys.argv = words[words[0] == "-m" :]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    fill_folder()
    hub = FakeHub()
    for name, build in HUB.items():
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            hub.commit(name, "main", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    environment = os.environ | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait must not spin where another command could run
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(FOLDER / "hf"), "HF_TOKEN": "hf_ci"}

    os.environ.update(environment)  # for the commands, and for the server that forks them
    SERVER.set_forkserver_preload("train recognize report hub soxr transformers.models.qwen2.modeling_qwen2".split())

    jobs = [(readme, text, words) for readme in READMES for text, words in commands(readme)]
    with ThreadPoolExecutor(1) as pool:
        # The demo, whose processes take both cores, comes last.
        beside = [pool.submit(show, *job, nice=10) for job in reversed(jobs) if re.match(BESIDE, job[1])]
        for job in jobs:
            if not re.match(BESIDE, job[1]):
                show(*job)
        for future in beside:
            future.result()
    print(f"{len(jobs)} commands and examples of {len(READMES)} READMEs ran")


if __name__ == "__main__":
    main()
