"""Run every command and Python example of README.md, on what the quick demo has made.

The commands are run as they stand but for names: models and data that are not here become the demo's, 8 processes
become 2 on the CPU, and long training stops after a few steps. Hub names are looked up on a hub of our own, where tiny
random models have them. `make` lines are run by .ci/run itself.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo_run_quick"
README = (ROOT / "README.md").read_text()
sys.path += [str(ROOT), str(ROOT / "tests")]

from fake_hub import FakeHub  # noqa: E402
from families import ENCODERS, LLMS  # noqa: E402

HUB = {
    "facebook/mms-300m": ENCODERS["wav2vec2_large"],
    "microsoft/wavlm-large": ENCODERS["wavlm_large"],
    "Qwen/Qwen3-0.6B": LLMS["qwen3"],
    "Qwen/Qwen2-1.5B-Instruct": LLMS["qwen2"],
    "meta-llama/Llama-3.2-1B": LLMS["gpt2"],  # a base LLM, without a chat template
}
SHORT = "--max_steps 4 --save_steps 4 --eval_steps 4 --use_cpu --bf16 False"
NAMES = {
    r"(name_or_path) Qwen2-1.5B-Instruct(?!-)": rf"\1 {DEMO / 'llm'}",
    r"((whisper_model|encoder)_name_or_path) tiny": rf"\1 {DEMO / 'whisper.pt'}",
    r"--nproc_per_node=8": "--nproc_per_node=2",
    r"--bf16 True": "--use_cpu",
    r"checkpoint-600": "checkpoint-4",
    r"--save_steps 100": "--save_steps 4 --max_steps 4",
    r"--gradient_accumulation_steps 8": "--gradient_accumulation_steps 1",
    r"train.py (whisper_qwen.yaml)": rf"train.py \1 --encoder_name_or_path {DEMO / 'whisper.pt'} {SHORT}",
    r"train.py (wavlm_llama.yaml)": rf"train.py \1 --projector_hidden_size 32 {SHORT}",
    r"python demo.py": f"python demo.py --quick --output_dir {DEMO}",
    r"(python benchmark.py .*)": r"\1 --llm nano --batch_size 1 --steps 1 --decode_batches 1 --repeats 1",
}


def main() -> None:
    folder = DEMO / "readme"
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir(parents=True)
    files = [path for ending in ("py", "txt", "yaml", "json") for path in ROOT.glob(f"*.{ending}")]
    links = {path.name: path for path in (*files, ROOT / "tests", DEMO / "wav")}
    links |= {"train.jsonl": DEMO / "train.jsonl", "test.jsonl": DEMO / "test_known_voices.jsonl"}
    clip = next((DEMO / "wav").rglob("*.wav"))
    links |= {"dev.jsonl": DEMO / "test_new_voices.jsonl", "a.wav": clip, "b.wav": clip}
    for name, path in links.items():
        (folder / name).symlink_to(path)
    hub = FakeHub()
    for name, build in HUB.items():
        with tempfile.TemporaryDirectory() as made:
            build(Path(made))
            hub.commit(name, "main", {path.name: path.read_bytes() for path in Path(made).iterdir()})
    environment = os.environ | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_ci"}

    count = 0
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL):
        for pattern, replacement in NAMES.items():
            text = re.sub(pattern, replacement, text)
        lines = text.replace("\\\n", " ").strip().splitlines() if language == "bash" else [text]
        for line in lines:
            if language == "bash" and re.match(r"make|git|cd|#|$", line):
                continue
            print(f"$ {' '.join(line.split())}" if language == "bash" else line, flush=True)
            command = ["bash", "-c", line] if language == "bash" else [sys.executable, "-c", line]
            done = subprocess.run(command, cwd=folder, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="", flush=True)
            if "matrix.py" in line:
                rows = {row for row in done.stdout.splitlines() if row.startswith("|")}
                assert rows <= set(README.splitlines()), "README.md has another table than tests/matrix.py prints"
            count += 1
    print(f"{count} commands and examples of README.md ran")


if __name__ == "__main__":
    main()
