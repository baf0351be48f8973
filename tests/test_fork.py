"""Forks: each idea is added to a scratch copy by the lines that the README's table "Where a change goes" tells.

Every fork trains and decodes with its idea, by the commands that a user types.
"""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL_FLAGS, ROOT

TRAIN = f"{MODEL_FLAGS} --projector_hidden_size 64 --data_path corpus.jsonl --max_steps 2 --save_strategy no"
TRAIN += " --per_device_train_batch_size 4 --learning_rate 1e-3 --report_to none --logging_steps 1 --disable_tqdm True"
DECODE = "--data_path corpus.jsonl --num_beams 2 --max_new_tokens 6 --num_workers 0"


def run_commands(fork: Path, folder: str, commands: list[tuple[str, str]], log: str) -> None:
    """In a new process: run the `main` of files of a fork, one after the other, with all output in `log`."""
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    for name, module in list(sys.modules.items()):  # what was imported from the original
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT:
            del sys.modules[name]
    sys.path[:] = [str(fork), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    os.chdir(folder)
    torch.set_num_threads(1)
    for script, flags in commands:
        sys.argv = [script]
        module = __import__(script)
        assert Path(module.__file__).parent == fork
        module.main(shlex.split(flags))


class Fork:
    """A scratch copy of our files in the root."""

    def __init__(self, folder: Path, world: Path):
        self.folder, self.world = folder, world
        folder.mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)

    def append(self, name: str, code: str) -> None:
        path = self.folder / name
        path.write_text(f"{path.read_text()}\n\n{code}")

    def insert_before(self, name: str, line: str, code: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert text.count(line) == 1, f"{name} has {text.count(line)} lines {line!r}"
        path.write_text(text.replace(line, code + line))

    def run(self, *commands: tuple[str, str]) -> str:
        """What the commands print; they run in the world folder."""
        log = self.folder / "log.txt"
        args = (self.folder, str(self.world), list(commands), str(log))
        process = multiprocessing.get_context("forkserver").Process(target=run_commands, args=args)
        process.start()
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
        return log.read_text()

    def train_and_decode(self, train_flags: str = "", decode_flags: str = "") -> str:
        run = self.folder / "run"
        result = self.folder / "result.jsonl"
        train = f"{TRAIN} --output_dir {run} {train_flags}"
        decode = f"--model_path {run} {DECODE} --result_path {result} {decode_flags}"
        return self.run(("train", train), ("recognize", decode))

    def hypotheses(self) -> list[str]:
        return [json.loads(line)["pred"] for line in (self.folder / "result.jsonl").read_text().splitlines()]

    def problems(self) -> list[str | None]:
        return [json.loads(line)["problem"] for line in (self.folder / "result.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", (self.folder / "log.txt").read_text())]


@pytest.fixture
def fork(tmp_path, world, chinese_llm, launch) -> Fork:
    return Fork(tmp_path / "fork", world)


@pytest.fixture(scope="module")
def original(tmp_path_factory, world, chinese_llm, launch) -> Fork:
    """A copy without any change, trained and decoded."""
    copy = Fork(tmp_path_factory.mktemp("original") / "copy", world)
    copy.train_and_decode()
    return copy


def test_a_new_projector(fork):
    fork.append(
        "projectors.py",
        """
class MeanProjector(nn.Module):
    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__()
        self.stride = config.projector_stride
        self.linear = nn.Linear(encoder_size, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        count = frames.shape[1] // self.stride
        return self.linear(frames[:, : count * self.stride].unflatten(1, (count, self.stride)).mean(2))

    def output_lengths(self, lengths):
        return lengths // self.stride


PROJECTORS["mean"] = MeanProjector
""",
    )
    fork.train_and_decode("--projector mean")
    assert json.loads((fork.folder / "run/config.json").read_text())["projector"] == "mean"
    assert len(fork.hypotheses()) == 20


def test_a_new_encoder_that_is_not_of_transformers(fork):
    fork.append(
        "encoders.py",
        """
class Envelope(nn.Module):
    \"\"\"The loudness of every 20 ms in some bands of width 320 / num_bands samples, without any weight.\"\"\"

    def __init__(self, num_bands: int):
        super().__init__()
        self.output_size, self.extract = num_bands, torch.from_numpy

    @classmethod
    def load(cls, name, revision, layer, dtype):
        return cls(int(name))

    def output_lengths(self, lengths):
        return lengths // 320

    def forward(self, features, lengths):
        count = features.shape[1] // 320
        return features[:, : count * 320].reshape(len(features), count, self.output_size, -1).abs().mean(3)


ENCODERS["envelope"] = Envelope.load
""",
    )
    fork.train_and_decode("--encoder_name_or_path envelope:32")
    config = json.loads((fork.folder / "run/config.json").read_text())
    assert (config["encoder_name_or_path"], config["encoder_size"]) == ("envelope:32", 32)
    assert len(set(fork.hypotheses())) > 1


def test_a_new_source_of_data(fork, world):
    rows = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    lines = [f"{world / row['wav']}\t{row['txt']}\n" for row in rows]
    (fork.folder / "corpus.tsv").write_text("".join(lines))
    fork.append(
        "sources.py",
        """
def tsv(place: str, needs_text: bool) -> Records:
    rows = [line.split("\\t") for line in Path(place).read_text().splitlines()]
    return RecordList([{"wav": wav, "txt": txt} for wav, txt in rows], place)


SOURCES["tsv"] = tsv
""",
    )
    source = f"--data_path tsv:{fork.folder}/corpus.tsv"
    fork.train_and_decode(f"{source} --eval_data_path tsv:{fork.folder}/corpus.tsv", source)
    assert len(fork.hypotheses()) == 20


def test_a_new_augmentation(fork, original):
    fork.append(
        "augment.py",
        """
def reverse(samples, random):
    return samples[::-1].copy()


AUGMENTATIONS["reverse"] = reverse
""",
    )
    fork.train_and_decode("--augment reverse")
    assert fork.losses() != original.losses()


def test_a_new_decoding_option(fork):
    fork.insert_before(
        "manifest.py",
        "    length_penalty: float =",
        '    min_new_tokens: int = field(default=0, metadata={"help": "least tokens of a transcript", "least": 0})\n',
    )
    fork.train_and_decode(decode_flags="--min_new_tokens 6")
    assert all("no end within 6 new tokens" in problem for problem in fork.problems())
    run, result = fork.folder / "run", fork.folder / "result.jsonl"
    result.unlink()
    fork.run(("recognize", f"--model_path {run} {DECODE} --result_path {result}"))
    assert None in fork.problems()


def test_length_penalty_was_such_an_option_and_stays(original):
    run, texts = original.folder / "run", {}
    for penalty in (-20.0, 20.0):
        result = original.folder / f"penalty{penalty}.txt"
        flags = f"--model_path {run} {DECODE} --num_beams 4 --max_new_tokens 20 --length_penalty {penalty}"
        original.run(("recognize", f"{flags} --result_path {result}"))
        texts[penalty] = result.read_text()
    assert len(texts[-20.0]) < len(texts[20.0])


def test_a_new_metric(fork):
    fork.append(
        "score.py",
        """
def sentences(text: str) -> list[str]:
    \"\"\"whole sentences\"\"\"
    return [text]


METRICS["ser"] = sentences
""",
    )
    evaluated = (
        "--eval_data_path corpus.jsonl --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1"
    )
    log = fork.train_and_decode(f"{evaluated} --save_best_by ser")
    assert "lowest ser so far: 1.0000" in log and "SER 100.00%" in log
    result = fork.folder / "result.jsonl"
    assert "SER 100.00" in fork.run(("score", f"--data_path corpus.jsonl --result_path {result} --metric ser"))


def test_a_new_normaliser(fork, original):
    result = original.folder / "result.jsonl"
    fork.append(
        "score.py",
        """
def first_letter() -> Callable[[str], str]:
    \"\"\"the first letter\"\"\"
    return lambda text: text[:1]


NORMALIZERS["first_letter"] = first_letter
""",
    )
    out = fork.run(("score", f"--data_path corpus.jsonl --result_path {result} --normalizer first_letter"))
    assert "normalizer: first_letter" in out and "reference length 20" in out


def test_another_order_of_training(fork, original):
    fork.insert_before("train.py", "        return LengthSampler(", "        return LongestFirst(dataset.seconds)\n")
    fork.insert_before(
        "train.py",
        "class SpeechTrainer(Trainer):",
        """class LongestFirst(torch.utils.data.Sampler):
    def __init__(self, lengths: np.ndarray):
        self.order = [(0, position) for position in (-lengths).argsort().tolist()]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.order)


""",
    )
    fork.train_and_decode()
    assert fork.losses() != original.losses()


def test_another_way_to_make_batches(fork, tmp_path, world):
    """Neighbours of the manifest stand in a batch."""
    flags = "--max_batch_seconds 9"
    before = Fork(tmp_path / "plain", world).run(("train", f"{TRAIN} --output_dir {tmp_path}/budget {flags}"))
    line = "    strips = np.array_split("
    fork.insert_before("batching.py", line, "    return np.arange(len(lengths))\n")
    after = fork.train_and_decode(flags)
    shares = [float(re.search(r"padding ([\d.]+)% \(encoder\)", log)[1]) for log in (before, after)]
    assert shares[1] > 1.5 * shares[0]


def test_a_new_loss_term(fork, original):
    fork.insert_before(
        "model.py",
        "        return CausalLMOutput(loss=loss / max(num_tokens, 1), logits=logits)",
        '        loss = loss + inputs["inputs_embeds"].float().square().sum()\n',
    )
    fork.train_and_decode()
    assert all(ours > theirs for ours, theirs in zip(fork.losses(), original.losses(), strict=True))


def test_a_new_config_field_with_which_an_older_checkpoint_still_loads_and_resumes(fork, original, world):
    old = fork.folder / "old"
    flags = f"{TRAIN} --save_strategy steps --save_steps 2 --output_dir {old}"
    original.run(("train", flags))
    fork.insert_before(
        "model.py", "    prompt: str = option(", '    speech_weight: float = option(0.5, "of a loss of ours")\n'
    )
    fork.insert_before(
        "model.py",
        "        return CausalLMOutput(loss=loss / max(num_tokens, 1), logits=logits)",
        '        loss = loss + self.config.speech_weight * inputs["inputs_embeds"].float().square().sum()\n',
    )
    assert "speech_weight" not in json.loads((old / "config.json").read_text())
    result = fork.folder / "result.jsonl"
    log = fork.run(
        ("recognize", f"--model_path {old} {DECODE} --result_path {result}"),
        ("train", f"{flags} --max_steps 4 --speech_weight 2"),
    )
    assert "going on from" in log and "max_steps was 2, is 4" in log and "not compared: speech_weight" in log
    assert json.loads((old / "config.json").read_text())["speech_weight"] == 2.0


def test_the_readme_says_where_each_of_these_goes():
    table = (ROOT / "README.md").read_text().partition("## Where a change goes")[2].partition("\n## ")[0]
    for name in (
        "projectors.py",
        "encoders.py",
        "sources.py",
        "augment.py",
        "batching.py",
        "manifest.py",
        "score.py",
        "model.py",
    ):
        assert f"`{name}`" in table, name
