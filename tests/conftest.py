"""Tiny real models with random weights, and a corpus of noise: everything that the tests run on."""

import atexit
import gc
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from families import ENCODERS, LLMS, make_llm_tokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from xdist.scheduler import LoadScopeScheduling

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # also for the commands that tests start
torch.set_num_threads(1)
get_checkpoint_conversion_mapping("qwen2")  # makes a thousand regular expressions, which forked processes then have

ROOT = Path(__file__).parent.parent
SAMPLE_RATE = 16000
MODEL_FLAGS = "--llm_model_name_or_path chinese_llm --whisper_model_name_or_path whisper.pt"
TRAIN_FLAGS = f"--use_cpu {MODEL_FLAGS} --projector_hidden_size 64 --report_to none --logging_steps 1"
TRAINED_FLAGS = (
    "--data_path corpus.jsonl --eval_data_path eval.jsonl --num_train_epochs 2 --learning_rate 1e-3 "
    "--eval_strategy steps --eval_steps 5 --save_steps 5"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PROCESSES = ("test_zero3", "test_kills", "test_benchmark", "test_house", "test_distributed", "test_batching")
PROCESSES += ("test_engines", "test_fsdp", "test_tensor_parallel", "test_frame_cache")


class ByFile(LoadScopeScheduling):
    """A file goes to one of xdist's workers as a whole. Those that start many processes go to the same one, at first.

    ZeRO-3's ranks wait for each other hundreds of times a step. Where a third process wants their cores each wait takes
    a slice of its time, six times as long in all: so the tests in other files give way, see below.
    """

    def _assign_work_unit(self, node) -> None:
        if "processes" in self.workqueue:
            self.workqueue.move_to_end("processes", last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if Path(file).stem in PROCESSES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByFile:
    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's rounds, of which each run of Trainer ends with one."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or nanobind calls it a leak


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.stem not in PROCESSES and os.nice(0) == 0:
        os.nice(10)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Samples (S,) of noise whose loudness and colour go up and down, so that no two stretches of it are alike."""
    random = np.random.default_rng(seed)
    samples = random.normal(0, 0.1, round(seconds * SAMPLE_RATE))
    swell = np.sin(np.arange(len(samples)) / SAMPLE_RATE * random.uniform(3, 9)) ** 2
    return (samples * swell + np.roll(samples, 1) * (1 - swell)).astype(np.float32)


def make_whisper(path: Path, width: int = 32) -> Path:
    """A random Whisper in openai-whisper's .pt format."""
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(
        80, 1500, width, 2, 2, n_vocab=64, n_text_ctx=16, n_text_state=16, n_text_head=2, n_text_layer=1
    )
    torch.save({"dims": dims.__dict__, "model_state_dict": Whisper(dims).state_dict()}, path)
    return path


def make_tokenizer(chat_template: str | None = CHATML, **special_tokens):
    """A byte-level BPE tokenizer; pads with its end token, as many LLMs do, unless told otherwise."""
    special_tokens = special_tokens or {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    special = "<|im_start|> <|im_end|> <|eot_id|> </s> <|start_header_id|> <|end_header_id|>"
    return make_llm_tokenizer(chat_template, special, **special_tokens)


def make_llm(folder: Path, width: int = 48, tokenizer=None) -> Path:
    """A random Qwen2 with its tokenizer, in a folder as the Hub has it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.5,  # answers that differ from clip to clip
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_corpus(folder: Path, seconds: list[float]) -> Path:
    """Noise of these lengths and a manifest of it."""
    random, rows = np.random.default_rng(0), []
    for number, length in enumerate(seconds):
        name = f"clip{number}.wav"
        samples = random.normal(0, 0.1, round(length * SAMPLE_RATE)).astype(np.float32)
        soundfile.write(folder / name, samples, SAMPLE_RATE)
        rows.append({"wav": name, "txt": "hello world" + " hello" * (number % 3)})
    return write_manifest(folder / "corpus.jsonl", rows)


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with whisper.pt, llm/ and corpus.jsonl: 20 clips of 0.3 to 4 s."""
    folder = tmp_path_factory.mktemp("world")
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm")
    make_corpus(folder, [0.3 + 0.19 * (7 * i % 20) for i in range(20)])
    return folder


@pytest.fixture(scope="session")
def model(world):
    from model import SpeechLLM

    torch.manual_seed(0)
    return SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / "llm"), projector_hidden_size=64)


@pytest.fixture(scope="session")
def recogniser(world, chinese_llm):
    """A random model of which some answers end and others are cut off."""
    from model import SpeechLLM

    torch.manual_seed(0)
    return SpeechLLM.from_parts(str(world / "whisper.pt"), str(chinese_llm), projector_hidden_size=64)


@pytest.fixture(scope="module", params=["wav2vec2_large", "whisper_openai", "w2v_bert"])
def any_model(request, tmp_path_factory):
    """A model of each kind of input: samples, Whisper's features (M before F), and features of another shape."""
    from model import SpeechLLM

    folder = tmp_path_factory.mktemp("parts")
    encoder, llm = ENCODERS[request.param](folder / "encoder"), LLMS["qwen3"](folder / "llm")
    torch.manual_seed(0)
    options = {"projector": "mlp", "projector_hidden_size": 32, "encoder_dropout": 0.1}
    return SpeechLLM.from_parts(str(encoder), str(llm), **options)


class Screen(NamedTuple):
    """What a command prints."""

    out: str
    err: str


@pytest.fixture(scope="session")
def call(world):
    """call(train.main, "--flag value") -> Screen: one of our commands in this process, in the `world` folder.

    The process is afterwards as it was: its folder, warnings, random numbers, and what accelerate knows of it.
    """
    from accelerate.state import AcceleratorState

    def call_main(main: Callable[[list[str]], None], flags: str) -> Screen:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
        screen, folder = Screen(*streams), os.getcwd()
        os.chdir(world)
        try:
            with (
                warnings.catch_warnings(),
                torch.random.fork_rng(),
                redirect_stdout(screen.out),
                redirect_stderr(screen.err),
            ):
                main(shlex.split(flags))
        finally:
            os.chdir(folder)
            AcceleratorState._reset_state(reset_partial_state=True)
        for stream in screen:
            stream.seek(0)
        return Screen(screen.out.read(), screen.err.read())

    return call_main


def die_at(moment: str | int) -> None:
    """kill -9 this process and its workers when it makes the folder `moment`, or calls os.fsync so many times."""
    fsync, synced = os.fsync, []

    def die() -> None:
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(descriptor)
        if len(synced) == moment:
            die()

    def hook(event: str, args: tuple) -> None:
        if event == "os.mkdir" and str(args[0]).endswith(str(moment)):
            die()

    os.fsync = sync
    sys.addaudithook(hook)


def run_script(command: list[str], folder: str, environment: dict, out: str, err: str, moment: str | int) -> None:
    """In a new process: run one of our files as `python FILE FLAGS` would, with its output in two files."""
    os.setsid()  # a process group of its own, which one kill takes down with its data-loading workers
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for data-loading workers, as in any new process
    gc.freeze()
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = command
    if "--deepspeed" in command:
        import deepspeed

        # Gloo does, as where there is no C++ compiler: DeepSpeed's own would be compiled first, for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if moment:
        die_at(moment)
    runpy.run_path(command[0], run_name="__main__")


class Job:
    """A command line of ours, running: one process, or as many ranks as torchrun would start."""

    def __init__(self, processes: list, logs: Path):
        self.processes, self.logs = processes, logs

    @property
    def out(self) -> str:
        """Standard output of the first rank, so far."""
        path = self.logs / "out0"
        return path.read_text() if path.exists() else ""  # the process makes it when it begins

    @property
    def err(self) -> str:
        return (self.logs / "err0").read_text()

    @property
    def status(self) -> int:
        """The exit status; the first that is not 0, of several ranks."""
        return next((p.exitcode for p in self.processes if p.exitcode), 0)

    def wait(self, seconds: float = 120) -> "Job":
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        if any(process.is_alive() for process in self.processes):
            self.kill()
            raise TimeoutError(f"not done after {seconds} s: {self.err[-2000:]}")
        return self

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def died(self) -> "Job":
        """Wait until a rank dies at the moment that it was told, and kill the others."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], 120)
        self.kill()
        assert -signal.SIGKILL in {p.exitcode for p in self.processes}, self.err[-2000:]
        return self

    def the_error(self) -> str:
        """The one error line that wrong input gives, with exit status 2 and no traceback."""
        assert self.status == 2, (self.status, self.err)
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error:")]
        return line


@pytest.fixture(scope="session")
def launch(tmp_path_factory, world):
    """launch("train.py", "--flag value", processes=2) -> Job: real processes, forked where the imports are done.

    They start in the `world` folder. With more than one process, each is told its rank as torchrun would tell it, on
    one machine or several `nodes`. `die_at` is the moment of a kill -9 (see `die_at` above).
    """
    changed = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    forkserver = multiprocessing.get_context("forkserver")
    imports = "conftest train recognize report hub lora zero3 whisper soxr transformers.models.qwen2.modeling_qwen2"
    forkserver.set_forkserver_preload(imports.split())

    def start(script: str, flags: str, processes: int = 1, die_at: str | int = "", nodes: int = 1) -> Job:
        logs, ranks = tmp_path_factory.mktemp("logs"), []
        command = [str(ROOT / script), *shlex.split(flags)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            local = {"LOCAL_RANK": rank % (processes // nodes), "LOCAL_WORLD_SIZE": processes // nodes}
            told = local | {"RANK": rank, "WORLD_SIZE": processes}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            told = {name: str(value) for name, value in told.items()} if processes > 1 else {}
            files = str(logs / f"out{rank}"), str(logs / f"err{rank}")
            ranks.append(forkserver.Process(target=run_script, args=(command, str(world), told, *files, die_at)))
            ranks[-1].start()
        return Job(ranks, logs)

    yield start
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def chinese_llm(world) -> Path:
    """An LLM in `world` that says Chinese characters, and not many: one token in eight ends the answer."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([chr(0x4E00 + 7 * i) for i in range(600)])
    folder = make_llm(world / "chinese_llm", tokenizer=tokenizer)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(1, len(tokenizer), 8))}))
    return folder


@pytest.fixture(scope="session")
def trained(world, chinese_llm, launch) -> Path:
    """The output folder of a short training run on one process: ten steps of four clips, evaluated twice."""
    rows = (world / "corpus.jsonl").read_text().splitlines(keepends=True)
    (world / "eval.jsonl").write_text("".join(rows[::3]))
    batches = "--per_device_train_batch_size 4 --per_device_eval_batch_size 3"
    job = launch("train.py", f"{TRAIN_FLAGS} {TRAINED_FLAGS} {batches} --output_dir trained").wait()
    assert job.status == 0, job.err
    return world / "trained"


@pytest.fixture(scope="session")
def ddp(world, trained, launch) -> Path:
    """The run of `trained` under DistributedDataParallel on two processes."""
    batches = "--per_device_train_batch_size 2 --per_device_eval_batch_size 1"
    job = launch("train.py", f"{TRAIN_FLAGS} {TRAINED_FLAGS} {batches} --output_dir ddp", processes=2).wait()
    assert job.status == 0, job.err
    return world / "ddp"


@pytest.fixture(scope="session")
def never_stopped(world, chinese_llm, call) -> Path:
    from runs import RESUMED, losses

    import train

    assert "going on" not in call(train.main, f"{RESUMED} --output_dir never_stopped").out
    assert len(losses(world / "never_stopped")) == 16
    return world / "never_stopped"
