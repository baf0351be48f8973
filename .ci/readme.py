"""Run every command and Python example of README.md, on what the quick demo has made.

The commands are run as they stand but for names: models and data that are not here become the demo's, 8 processes
become 2 on the CPU, and long training stops after a few steps. `make` lines are run by .ci/run itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo_run_quick"
NAMES = {
    r"Qwen2-1.5B-Instruct(?!-)": str(DEMO / "llm"),
    r"(whisper_model_name_or_path) tiny": rf"\1 {DEMO / 'whisper.pt'}",
    r"--data_path train.jsonl": f"--data_path {DEMO / 'train.jsonl'}",
    r"--data_path test.jsonl": f"--data_path {DEMO / 'test_known_voices.jsonl'}",
    r"--eval_data_path dev.jsonl": f"--eval_data_path {DEMO / 'test_new_voices.jsonl'}",
    r"--nproc_per_node=8": "--nproc_per_node=2",
    r"--bf16 True": "--use_cpu",
    r"checkpoint-600": "checkpoint-4",
    r"--save_steps 100": "--save_steps 4 --max_steps 4",
    r"--gradient_accumulation_steps 8": "--gradient_accumulation_steps 1",
    r"\bdemo_run\b": str(DEMO),
    r"(python benchmark.py .*)": r"\1 --llm nano --batch_size 1 --steps 1 --decode_batches 1 --repeats 1",
}


def main() -> None:
    folder = DEMO / "readme"
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir(parents=True)
    for name in (*ROOT.glob("*.py"), *ROOT.glob("*.txt"), ROOT / "ds_config_zero3.json"):
        (folder / name.name).symlink_to(name)
    clip = next((DEMO / "wav").rglob("*.wav"))
    for name in ("a.wav", "b.wav"):
        (folder / name).symlink_to(clip)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    environment = os.environ | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    count = 0
    for language, text in blocks:
        for pattern, replacement in NAMES.items():
            text = re.sub(pattern, replacement, text)
        lines = text.replace("\\\n", " ").strip().splitlines() if language == "bash" else [text]
        for line in lines:
            if language == "bash" and re.match(r"make|git|cd|#|$", line):
                continue
            print(f"$ {' '.join(line.split())}" if language == "bash" else line, flush=True)
            command = ["bash", "-c", line] if language == "bash" else [sys.executable, "-c", line]
            subprocess.run(command, cwd=folder, check=True, env=environment)
            count += 1
    print(f"{count} commands and examples of README.md ran")


if __name__ == "__main__":
    main()
