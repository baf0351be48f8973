"""Whatever is given to a command, it works or says in one line what is wrong and where, with exit status 2.

Each row of the table: what is written, which command reads it, and the text of its error, or that it works.
"""

import gzip
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TRAIN_FLAGS, noise
from safetensors.torch import save_file

import recognize
import score
import train
from errors import run

WORKS, EMPTY = "", "the second utterance gets an empty line"  # in place of the text of an error
TRAINING = f"{TRAIN_FLAGS} --max_steps 1 --save_strategy no --disable_tqdm True --output_dir new"
DECODING = "--model_path run --result_path r.txt --num_workers 0 --num_beams 1 --max_new_tokens 2"
COMMANDS = {
    "train": (train.main, f"{TRAINING} --data_path m.jsonl"),
    "train YAML": (train.main, ""),
    "decode": (recognize.main, f"{DECODING} --data_path m.jsonl"),
    "decode files": (recognize.main, "--model_path run --num_beams 1 --max_new_tokens 2"),
    "score": (score.main, "--data_path m.jsonl --result_path r.txt --json"),
}


# What is written: by the name of a file its bytes, its text, or a function of its path


def line(**keys) -> str:
    """A line of a manifest that is good but for `keys`."""
    return json.dumps({"wav": "good.wav", "txt": "hello world"} | keys, ensure_ascii=False) + "\n"


def second(content: str | bytes) -> dict:
    """A manifest whose second line is this."""
    return {"m.jsonl": line().encode() + (content if isinstance(content, bytes) else content.encode())}


def wav(content, name: str = "a.wav", **keys) -> dict:
    """A manifest whose second line has this audio."""
    return {name: content, **second(line(wav=name, **keys))}


def audio(rate: int = 16000, channels: int = 1, seconds: float = 0.5, sample: float = 0.0, keep: float = 1, **options):
    """Noise with one other sample in its middle, in a file of which this share is kept."""

    def write(path: Path) -> None:
        samples = np.resize(noise(1), (round(rate * seconds), channels))
        samples[len(samples) // 2 :][:1] = sample
        soundfile.write(path, samples, rate, **{"format": "WAV", "subtype": "FLOAT"} | options)
        os.truncate(path, round(keep * path.stat().st_size))

    return write


def run_with(name: str, content) -> dict:
    """A good manifest, and a trained model of which one file is this."""
    return {"m.jsonl": line(), f"run/{name}": content}


def config(**keys) -> dict:
    """A good manifest, and a trained model whose config.json has these values."""
    return run_with("config.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | keys)))


def folder_there(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


GOOD = {"m.jsonl": line()}
FLAC = {"format": "FLAC", "subtype": "PCM_16"}
NUMBER = '{"wav": "good.wav", "txt": "a", "n": ' + 5000 * "9" + "}\n"
NO_FILE, MALFORMED = "m.jsonl:2: a.wav: no such file; wanted a wav, flac, ogg or mp3 file", "m.jsonl:2: malformed JSON"
WEIGHTS, OURS = "run/model.safetensors: cannot read the trained weights", "wanted a folder that train.py or"

# fmt: off
TABLE = [  # name, what is written, the command, the text of its error
    # Manifests
    ("a good line", GOOD, "train", WORKS),
    ("no manifest", {}, "train", "m.jsonl: no such manifest; wanted a file of JSON lines"),
    ("a folder as manifest", {"m.jsonl": Path.mkdir}, "train", "m.jsonl: no such manifest"),
    ("a pipe as manifest", {"m.jsonl": os.mkfifo}, "train", "m.jsonl: no such manifest"),
    ("a link to itself as manifest", {"m.jsonl": loop}, "train", "m.jsonl: no such manifest"),
    ("an empty manifest", {"m.jsonl": ""}, "train", "m.jsonl: the manifest is empty"),
    ("latin-1 text", second('{"wav": "good.wav", "txt": "schön"}\n'.encode("latin-1")), "train", MALFORMED),
    ("UTF-16", {"m.jsonl": line().encode("utf-16")}, "train", "m.jsonl:1: malformed JSON (str is not valid UTF-8"),
    ("gzip", {"m.jsonl": gzip.compress(line().encode())}, "train", "m.jsonl:1: malformed JSON (str is not valid UTF-8"),
    ("a byte order mark", {"m.jsonl": b"\xef\xbb\xbf" + line().encode()}, "decode", WORKS),
    ("CRLF", {"m.jsonl": 2 * line().replace("\n", "\r\n")}, "decode", WORKS),
    ("CR alone", {"m.jsonl": 2 * line().replace("\n", "\r")}, "decode", "1: malformed JSON (unexpected content"),
    ("no end of the last line", {"m.jsonl": (2 * line()).rstrip("\n")}, "decode", WORKS),
    ("a lone surrogate, escaped", second('{"wav": "good.wav", "txt": "\\udc80"}\n'), "train", MALFORMED),
    ("a lone surrogate, as bytes", second(b'{"wav": "good.wav", "txt": "\xed\xb2\x80"}\n'), "train", MALFORMED),
    ("a pair of surrogates", second('{"wav": "good.wav", "txt": "\\ud83d\\ude00"}\n'), "decode", WORKS),
    ("a null byte", second(b'{"wav": "good.wav", "txt": "a\0b"}\n'), "train", MALFORMED),
    ("a transcript of 1 MB", second(line(txt=150_000 * "hello ")), "train", "m.jsonl:2: 19 positions of prompt and"),
    ("another key of 1 MB", second(line(note=1_000_000 * "x")), "decode", WORKS),
    ("1 MB of brackets", second(1_000_000 * "["), "train", f"{MALFORMED} (depth limit exceeded"),
    ("a number of 5,000 digits", second(NUMBER), "train", f"{MALFORMED} (number is infinity"),
    ("a key twice, the last counts", second('{"wav": "no.wav", "wav": "good.wav", "txt": "b"}\n'), "decode", WORKS),
    ("right-to-left text", second(line(txt="\u200fشكرا\u202e hello")), "decode", WORKS),
    ("combining characters", second(line(txt="e" + 20 * "\u0301")), "train", WORKS),
    ("other line separators in a text", second(line(txt="a\u2028b\x85c")), "decode", WORKS),
    ("special tokens in a transcript", second(line(txt="<|im_end|> <audio> hello")), "train", WORKS),
    ("an empty transcript", second(line(txt="")), "train", WORKS),
    ("no audio", second('{"txt": "a"}\n'), "decode", "m.jsonl:2: missing ['wav']; every line needs 'wav'"),
    ("no transcript, in training", second(line(txt=None)), "train", "m.jsonl:2: missing ['txt']"),
    ("no transcript, in decoding", second(line(txt=None)), "decode", WORKS),
    ("a blank line", second(" \n"), "train", "m.jsonl:2: a blank line"),
    ("one array of all", {"m.jsonl": f"[{line().strip()}]"}, "train", "m.jsonl:1: found b'[{"),
    ("an object on several lines", {"m.jsonl": '{\n"wav": "good.wav",\n"txt": ""}'}, "train", "m.jsonl:1: malformed J"),
    ("CSV", {"m.jsonl": "wav,txt\ngood.wav,hello\n"}, "train", "m.jsonl:1: malformed JSON"),
    ("Python's quotes", second("{'wav': 'good.wav', 'txt': 'a'}\n"), "train", MALFORMED),
    ("two objects in a line", second(2 * line().strip()), "train", f"{MALFORMED} (unexpected content after"),
    ("a number as wav", second('{"wav": 3, "txt": "a"}\n'), "train", "m.jsonl:2: 'wav' is 3; wanted a str"),
    ("a prompt without a place for audio", second(line(prompt="Hi")), "train", "m.jsonl:2: 0 <audio> in the prompt"),
    ("a negative start", second(line(start=-1)), "train", "m.jsonl:2: 'start' is -1; wanted seconds, 0 or more"),
    ("NaN as start", second(line(start=float("nan"))), "train", f"{MALFORMED} (unexpected character"),
    ("an end before the start", second(line(start=0.2, end=0.1)), "train", "m.jsonl:2: start 0.2 and end 0.1; wanted"),
    ("a segment past the end", second(line(start=0.1, end=9)), "train", "m.jsonl:2: good.wav: segment 0.1 to 9 s of 0"),
    ("a segment behind the end", second(line(start=8)), "train", "m.jsonl:2: good.wav: segment 8 to None s of 0.3"),
    ("a duration that is wrong", second(line(duration=1e-9)), "decode", WORKS),
    ("a conversation without turns", second('{"messages": []}\n'), "train", "m.jsonl:2: the last of 'messages' is not"),
    ("a key with slashes", second(line(key="../../a\n")), "decode", WORKS),
    # Audio
    ("a name of 5,000 characters", second(line(wav=5000 * "a")), "train", "unreadable ([Errno 36] File name too long"),
    ("a null in a name", second(line(wav="a\0.wav")), "train", "m.jsonl:2: a\0.wav: no such file"),
    ("no name", second(line(wav="")), "train", "m.jsonl:2: .: no such file"),
    ("a web address", second(line(wav="http://a/b.wav")), "train", "m.jsonl:2: http:/a/b.wav: no such file"),
    ("a name in several scripts", wav(audio(), "naïve 你好 \u202e.wav"), "decode", WORKS),
    ("a folder as audio", wav(Path.mkdir), "train", NO_FILE),
    ("a pipe as audio", wav(os.mkfifo), "train", NO_FILE),
    ("a pipe as audio, in decoding", wav(os.mkfifo), "decode", EMPTY),
    ("a link to itself as audio", wav(loop), "train", NO_FILE),
    ("a device as audio", second(line(wav="/dev/zero")), "train", "m.jsonl:2: /dev/zero: no such file"),
    ("text as audio", wav("this is no audio"), "train", "m.jsonl:2: a.wav: unreadable (Error opening"),
    ("an empty file as audio", wav(""), "train", "m.jsonl:2: a.wav: unreadable (Error opening"),
    ("half a wav", wav(audio(keep=0.5)), "train", "m.jsonl:2: a.wav: cut off after 0.25 s"),
    ("half a flac", wav(audio(seconds=3, keep=0.5, **FLAC)), "train", "m.jsonl:2: a.wav: unreadable (Error : flac dec"),
    ("no samples", wav(audio(seconds=0)), "train", "m.jsonl:2: a.wav: the audio is empty"),
    ("one sample", wav(audio(seconds=1 / 16000)), "train", "m.jsonl:2: 0.000 s of audio are too short"),
    ("NaN", wav(audio(sample=np.nan)), "train", "m.jsonl:2: a.wav: the audio holds NaN or infinite samples"),
    ("infinity", wav(audio(sample=np.inf)), "train", "m.jsonl:2: a.wav: the audio holds NaN or infinite samples"),
    ("a sample of 1e30", wav(audio(sample=1e30)), "decode", WORKS),
    ("8 kHz", wav(audio(8000)), "decode", WORKS),
    ("96 kHz, 6 channels", wav(audio(96000, 6)), "decode", WORKS),
    ("1 Hz", wav(audio(1, seconds=2)), "decode", WORKS),
    ("24 bit", wav(audio(subtype="PCM_24")), "decode", WORKS),
    ("8 bit", wav(audio(subtype="PCM_U8")), "decode", WORKS),
    ("mu-law", wav(audio(8000, subtype="ULAW")), "decode", WORKS),
    ("flac with the name of a wav", wav(audio(**FLAC)), "decode", WORKS),
    ("a name without an ending", wav(audio(), "speech"), "decode", WORKS),
    ("samples without a header", wav(900 * "\0", "a.raw"), "train", "m.jsonl:2: a.raw: unreadable (samplerate must be"),
    ("a missing file among two", GOOD, "decode files no.wav good.wav", WORKS),
    # Checkpoints
    ("a good model", GOOD, "decode", WORKS),
    ("no weights", run_with("model.safetensors", Path.unlink), "decode", f"{WEIGHTS} (FileNotFoundError: No such file"),
    ("half of the weights", run_with("model.safetensors", lambda path: os.truncate(path, 1000)), "decode", WEIGHTS),
    ("empty weights", run_with("model.safetensors", ""), "decode", WEIGHTS),
    ("a folder as weights", run_with("model.safetensors", folder_there), "decode", WEIGHTS),
    ("weights of PyTorch", run_with("model.safetensors", lambda path: torch.save({}, path)), "decode", WEIGHTS),
    ("other weights", run_with("model.safetensors", lambda path: save_file({"a": torch.zeros(3)}, path)), "decode",
     "run/model.safetensors: does not fit encoder width 32, LLM width 48"),
    ("no config", run_with("config.json", Path.unlink), "decode", f"run/config.json: no such file; {OURS}"),
    ("an empty config", run_with("config.json", ""), "decode", "run/config.json: Expecting value: line 1 column 1"),
    ("a latin-1 config", run_with("config.json", b'{"prompt": "h\xf6r"}'), "decode", "run/config.json: 'utf-8' codec"),
    ("a folder as config", run_with("config.json", folder_there), "decode", "run/config.json: [Errno 21] Is a directo"),
    ("a config of brackets", run_with("config.json", 100_000 * "["), "decode", "run/config.json: maximum recursion de"),
    ("an unknown field", config(promt="Hi"), "decode", "run/config.json: unknown field 'promt'; did you mean prompt?"),
    ("a field of another type", config(projector_stride=2.5), "decode", "run/config.json: Field 'projector_stride' ex"),
    ("a field out of range", config(projector_stride=-1), "decode", "run/config.json: projector_stride is -1; wanted"),
    ("too large a field", config(projector_hidden_size=10**12), "decode", "run/config.json: projector_hidden_size is"),
    ("no such layer", config(encoder_layer=99), "decode", "encoder layer 99: wanted 1 ... 2"),
    ("no encoder", config(encoder_name_or_path=None), "decode", "wanted an encoder and an LLM"),
    ("a half of a regular expression", config(freeze_params=["("]), "decode", "freeze pattern '(': cannot read it (e"),
    ("half a template", config(chat_template="{% for %} <audio>"), "decode", "the chat template refuses the conversat"),
    ("a manifest as model", GOOD, "decode --model_path m.jsonl", "m.jsonl: no such folder, nor a model on the Hub"),
    ("an LLM as model", GOOD, "decode --model_path chinese_llm", "chinese_llm/config.json: it describes another kind"),
    ("an LLM as encoder", GOOD, "train --encoder_name_or_path chinese_llm", "chinese_llm: a model of type qwen2; want"),
    ("an encoder as LLM", GOOD, "train --llm_model_name_or_path whisper.pt", "whisper.pt: cannot load the LLM"),
    ("text as encoder", GOOD | {"w.pt": "Hi"}, "train --encoder_name_or_path w.pt", "w.pt: cannot load a speech encod"),
    ("an empty folder as LLM", GOOD | {"e": Path.mkdir}, "train --llm_model_name_or_path e", "e: cannot load the LLM"),
    ("a manifest as projector", GOOD, "train --projector_model_path m.jsonl", "m.jsonl: cannot read the trained weigh"),
    # Results
    ("a folder as result", GOOD | {"r.txt": Path.mkdir}, "decode", "--result_path r.txt: wanted the ending .txt or"),
    ("another ending", GOOD, "decode --result_path r.csv", "--result_path r.csv: wanted the ending .txt or .jsonl"),
    ("a result in no folder", GOOD, "decode --result_path no/r.txt", "no/r.txt: cannot be written there (No such file"),
    ("a result where nobody may write", GOOD, "decode --result_path /proc/r.txt", "/proc/r.txt: cannot be written the"),
    ("brackets in a result's name", GOOD, "decode --result_path r[1].txt", WORKS),
    ("garbage beside a result", GOOD | {"r.txt.abc.partial-0": "garbage\n{}\n"}, "decode", WORKS),
    ("too few hypotheses", second(line()) | {"r.txt": "hello\n"}, "score", "r.txt: found 1 lines; wanted 2"),
    ("a latin-1 result", GOOD | {"r.txt": b"sch\xf6n\n"}, "score", "r.txt: cannot be read ('utf-8' codec"),
    ("a folder as result, to score", GOOD | {"r.txt": Path.mkdir}, "score", "r.txt: no such result file"),
    ("CRLF in a result", GOOD | {"r.txt": "hello\r\n"}, "score", WORKS),
    ("half a JSON result", GOOD | {"r.jsonl": "{\n"}, "score --result_path r.jsonl", "r.jsonl:1: wanted a JSON object"),
    ("brackets as result", GOOD | {"r.jsonl": 100_000 * "["}, "score --result_path r.jsonl", "r.jsonl:1: wanted a JSO"),
    ("a number as hypothesis", GOOD | {"r.jsonl": '{"key": "good", "pred": 3}'}, "score --result_path r.jsonl", "r.js"),
    # Flags
    ("no beam", GOOD, "decode --num_beams 0", "--num_beams 0: wanted 1 or more"),
    ("NaN as length penalty", GOOD, "decode --length_penalty nan", "--length_penalty nan: wanted"),
    ("more new tokens than positions", GOOD, "decode --max_new_tokens 9999", "max_new_tokens 9999: the LLM has 1024"),
    ("fewer than no loaders", GOOD, "decode --num_workers -1", "--num_workers -1: wanted"),
    ("a device that is not there", GOOD, "decode --device cuda", "--device cuda: no CUDA GPU here"),
    ("a revision of a folder", GOOD, "decode --revision v1", "run: revision v1 of local files"),
    ("a missing template", GOOD, "decode --chat_template t.jinja", "--chat_template t.jinja: cannot read it"),
    ("a latin-1 template", GOOD | {"t.jinja": b"\xf6"}, "decode --chat_template t.jinja", "t.jinja: cannot read it (U"),
    ("a prompt without <audio>", GOOD, "decode --prompt Hi", "prompt 'Hi': wanted <audio> in it"),
    ("an unknown source", GOOD, "decode --data_path sheet:a", "sheet:a: no such file, and no source 'sheet'; wanted o"),
    ("a latin-1 NeMo manifest", {"n.json": b"\xf6"}, "decode --data_path nemo:n.json", "n.json:1: UnicodeDecodeError"),
    ("a latin-1 transcript in a folder", {"good.txt": b"\xf6"}, "decode --data_path folder:.", "good.txt: 'utf-8' cod"),
    ("a latin-1 Kaldi folder", {"wav.scp": b"a \xf6.wav"}, "decode --data_path kaldi:.", "wav.scp: 'utf-8' codec"),
    ("batches of none", GOOD, "train --per_device_train_batch_size 0", "--per_device_train_batch_size 0: wanted 1 or"),
    ("no epochs", GOOD, "train --max_steps 0 --num_train_epochs 0", "--num_train_epochs 0.0: wanted more than 0"),
    ("NaN as learning rate", GOOD, "train --learning_rate nan", "--learning_rate nan: wanted 0 or more"),
    ("fewer than no loaders, in training", GOOD, "train --dataloader_num_workers -1", "--dataloader_num_workers -1: w"),
    ("a negative seed", GOOD, "train --seed -1", "--seed -1: wanted 0 or more"),
    ("an unknown augmentation", GOOD, "train --augment reverb", "--augment reverb: wanted some of gain, speed"),
    ("no position for a clip", GOOD, "train --model_max_length 3", "m.jsonl:1: 19 positions of prompt and speech and"),
    ("a negative rank", GOOD, "train --lora_r -1", "config: lora_r is -1; wanted 0 or more"),
    ("an output inside a file", GOOD, "train --output_dir m.jsonl/run", "--output_dir m.jsonl/run: a file is there"),
    ("an unknown flag", GOOD, "train --learning_rat 1", "error: unknown arguments: --learning_rat 1; did you mean --l"),
    ("an unknown scheduler", GOOD, "train --lr_scheduler_type cosinus", "invalid choice: 'cosinus'"),
    ("no checkpoint to go on from", GOOD, "train --resume_from_checkpoint no", "--resume_from_checkpoint no: no compl"),
    ("an empty evaluation set", GOOD | {"e.jsonl": ""}, "train --eval_data_path e.jsonl", "e.jsonl: the manifest is e"),
    # YAML files
    ("no YAML file", {}, "train YAML c.yaml", "c.yaml: cannot be read"),
    ("a folder as YAML file", {"c.yaml": Path.mkdir}, "train YAML c.yaml", "c.yaml: cannot be read"),
    ("a latin-1 YAML file", {"c.yaml": b"\xf6"}, "train YAML c.yaml", "c.yaml: cannot be read"),
    ("a tab in a YAML file", {"c.yaml": "a:\n\t- b"}, "train YAML c.yaml", "c.yaml: cannot be read (while scanning"),
    ("code in a YAML file", {"c.yaml": "seed: !!python/object/apply:os.getpid []"}, "train YAML c.yaml", "c.yaml: can"),
    ("an unknown key in a YAML file", {"c.yaml": "data_pth: a"}, "train YAML c.yaml", "c.yaml: unknown key 'data_pth'"),
    ("a number as key in a YAML file", {"c.yaml": "1: a"}, "train YAML c.yaml", "c.yaml: unknown key 1"),
]
# fmt: on


@pytest.fixture(scope="module")
def parts(world, trained, tmp_path_factory) -> Path:
    """A folder with good audio, the parts of a model, and a trained model."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copy(world / "clip0.wav", folder / "good.wav")
    for name in ("whisper.pt", "chinese_llm"):
        (folder / name).symlink_to(world / name)
    shutil.copytree(trained, folder / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


@pytest.mark.parametrize(("files", "command", "error"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_given_works_or_is_one_line(files, command, error, parts, call, tmp_path):
    folder = shutil.copytree(parts, tmp_path / "here", symlinks=True)
    for name, content in files.items():
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    name = max((name for name in COMMANDS if command.startswith(name)), key=len)
    main, flags = COMMANDS[name]
    status = []

    def main_until_exit(argv: list[str]) -> None:
        os.chdir(folder)  # `call` goes back
        try:
            run(partial(main, argv))
        except SystemExit as exit:
            status.append(exit.code)

    lines = call(main_until_exit, flags + command.removeprefix(name)).err.splitlines()
    errors = [line for line in lines if "error: " in line]
    if error in (WORKS, EMPTY):
        assert not status and not errors, lines
        problems = [line for line in lines if line.startswith("m.jsonl:") and "no end within" not in line]
        assert [line[:10] for line in problems] == (["m.jsonl:2:"] if error == EMPTY else [])
    else:
        assert status == [2] and len(errors) == 1 and error in errors[0], lines
        assert lines[-1] == errors[0]


def test_there_are_no_two_rows_of_one_name():
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 60
