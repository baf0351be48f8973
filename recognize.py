"""Recognise speech: the lines of a manifest into a result file, or audio files onto the screen.

python recognize.py --model_path run --data_path test.jsonl --result_path result.txt
python recognize.py --model_path run a.wav b.flac
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from errors import InputError, run
from manifest import DecodingOptions, Hypothesis, Records, SourceOptions, key_of, source_options, transcript_of
from score import score

if TYPE_CHECKING:
    from model import SpeechLLM  # imported where it is used, so that --help and wrong input are quick


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("audio", nargs="*", help="audio files to recognise, one transcript a line on standard output")
    add("--model_path", help="folder or Hub name: says of itself which encoder, LLM and prompt it needs")
    add("--revision", help="of --model_path on the Hub: branch, tag or commit")
    add("--projector_model_path", help="model.safetensors, in place of --model_path")
    add("--llm_model_name_or_path", help="the LLM; this and the next six are by default as the checkpoint says")
    add("--encoder_name_or_path", "--whisper_model_name_or_path", help="the speech encoder")
    add("--prompt", help="the user's turn, with <audio> in it")
    add("--system_prompt", help="the system's turn")
    add("--chat_template", help="FILE.jinja in place of the LLM's own")
    add("--quantize", help="4bit or 8bit: hold the LLM so, by bitsandbytes on a GPU")
    add("--dtype", dest="frozen_dtype", help="float32, bfloat16 or auto: of the frozen weights")
    add("--merge_lora", action="store_true", help="add LoRA to the weights beside it, for speed")
    add("--data_path", nargs="+", help="JSON lines with 'wav' and, to be scored, 'txt'; or KIND:PLACE; or several")
    add("--result_path", help="where the hypotheses go: .txt = one a line, .jsonl = one object a line")
    for option in (*fields(SourceOptions), *fields(DecodingOptions)):
        text = f"{option.metadata['help']} (default: {option.default!r})"
        kind = {"action": "store_true"} if option.type is bool else {"type": option.type}
        add(f"--{option.name}", default=option.default, help=text, **kind)
    add("--format", choices=("txt", "srt", "vtt", "json"), help="segments with times, of an audio file of any length")
    add("--output_dir", help="where --format puts a file for each audio file (default: standard output, for one)")
    add("--batch_size", type=int, default=16, help="utterances decoded together (default: 16)")
    add("--num_workers", type=int, default=2, help="processes that read audio; 0 = none (default: 2)")
    add("--device", help="default: this process's GPU if there is one, else cpu")
    add("--llm_type", help=argparse.SUPPRESS)  # older commands give it; the tokenizer knows its stop tokens
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 0:
        parser.error(f"--batch_size {args.batch_size} --num_workers {args.num_workers}: wanted at least 1 and 0")
    if not args.model_path and not args.projector_model_path:
        parser.error("wanted --model_path, or --projector_model_path with the encoder and the LLM")
    if bool(args.audio) == bool(args.data_path) or bool(args.data_path) != bool(args.result_path):
        parser.error("wanted either audio files, or --data_path and --result_path")
    wants_format = args.output_dir or (args.audio and args.timestamps)
    if (args.format and args.data_path) or (wants_format and not args.format):
        parser.error("wanted --format, perhaps with --output_dir, for audio files, and --timestamps for a manifest")
    return args


def load_model(args: argparse.Namespace) -> "SpeechLLM":
    """The SpeechLLM that the flags name; they win over the config.json beside the weights, and can stand in for it."""
    import torch

    from model import SpeechLLM, SpeechLLMConfig

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA GPU here")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device  # a GPU for each process
    overrides = {name: value for name, value in vars(args).items() if value and name in SpeechLLMConfig.own_fields()}
    path = args.projector_model_path or args.model_path  # the one says no more than the other
    model = SpeechLLM.from_pretrained(path, args.revision, device, **overrides)
    if args.merge_lora:
        model.merge_lora()
    return model


def recognize_manifest(args: argparse.Namespace, options: DecodingOptions) -> None:
    """Decode a manifest into a result file, on one process or on a share each of several, and score it."""
    from dataset import open_records

    # Wrong input is reported before the model is loaded.
    records = open_records(args.data_path, needs_text=False, **source_options(args))
    rank, num_processes, wait_for_all = 0, int(os.environ.get("WORLD_SIZE", 1)), lambda: None
    if num_processes > 1:
        import distributed  # an option

        rank, wait_for_all = int(os.environ["RANK"]), distributed.join()
    model = load_model(args)
    dataset = model.decoding_dataset(records, options)
    key = key_of_result(model, records, options)  # the same on all processes
    finished, others = read_unfinished(args.result_path, key), unfinished_files(args.result_path, "*")
    wait_for_all()  # all have read before anyone writes
    if rank == 0 and finished:
        print(f"going on: {len(finished):,} of {len(records):,} utterances were decoded before", file=sys.stderr)
    elif rank == 0 and others:
        print(f"starting over: {others[0]} is of another model, manifest or setting, and stays there", file=sys.stderr)

    todo = sorted(set(range(len(records))) - finished.keys(), key=lambda index: -dataset.durations[index])
    share = todo[rank::num_processes]  # long and short ones for every process
    bar = tqdm(total=dataset.durations[share].sum(), unit=" s of audio", unit_scale=True, disable=rank > 0)
    with open(f"{args.result_path}.{key}.partial-{rank}-{time.time_ns()}", "xb") as file, bar:
        for hypotheses in model.decode(dataset, share, args.batch_size, args.num_workers, options):
            file.write("".join(json.dumps(asdict(h), ensure_ascii=False) + "\n" for h in hypotheses).encode())
            file.flush()
            os.fsync(file.fileno())  # safe on the disk from here
            bar.update(sum(dataset.durations[hypothesis.index] for hypothesis in hypotheses))
    wait_for_all()
    if rank == 0:
        finished = read_unfinished(args.result_path, key)  # those of all processes
        write_result(args.result_path, records, finished)
        for path in unfinished_files(args.result_path, key):
            path.unlink()
        print_problems_and_score(records, dataset.durations, finished)
        if (model.config.training or {}).get("chosen on") == records.fingerprint():
            print("the checkpoint was chosen on this very manifest: on other speech, expect more errors")


def print_problems_and_score(records: Records, durations: Sequence[float], hypotheses: dict[int, Hypothesis]) -> None:
    if problems := [h.problem for _, h in sorted(hypotheses.items()) if h.problem]:
        print(f"{len(problems):,} of {len(records):,} utterances have problems:", *problems, sep="\n", file=sys.stderr)
    rows = [(transcript_of(record), hypotheses[i].text, durations[i]) for i, record in enumerate(records)]
    scored = [row for row in rows if row[0] is not None]
    if any(reference for reference, *_ in scored):  # else there is no rate
        result = score(*zip(*scored, strict=True))
        print(result.summary() + "; score.py lists them, and why" * bool(result.hallucinated))
        if len(scored) < len(rows):
            print(f"not scored: {len(rows) - len(scored):,} lines without a reference")


# The unfinished result
#
# result.txt.KEY.partial-RANK-TIME beside the result file holds what a process has finished, as JSON lines. KEY is of
# all that decides a hypothesis. So any number of processes can go on after a kill, and nothing is mixed.


def key_of_result(model: "SpeechLLM", records: Records, options: DecodingOptions) -> str:
    """Hash of all that decides the hypotheses: config, the start of every weight tensor, records, options."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("training", "origin")}
    digest = sha256(json.dumps([config, records.fingerprint(), asdict(options)], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def only_writer_of(result_path: str) -> Iterator[None]:
    """Hold a lock in result.txt.lock, which the kernel frees at a kill. InputError if another decode holds it."""
    if not result_path.endswith((".txt", ".jsonl")) or os.path.isdir(result_path):
        raise InputError(f"--result_path {result_path}: wanted the ending .txt or .jsonl, and no folder there")
    try:
        file, rank = open(f"{result_path}.lock", "w"), int(os.environ.get("RANK", 0))  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--result_path {result_path}: cannot be written there ({error.strerror})") from None
    with file:
        try:
            import fcntl  # not on Windows

            # One byte for each rank. Unlike those of flock, such locks do not pass on to data-loading processes.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except BlockingIOError:
            raise InputError(f"{result_path}: another process is decoding into it; wait, or name another") from None
        except (ImportError, OSError):
            pass  # some network disks know no locks either
        try:
            yield
        finally:
            if rank == 0:
                os.unlink(file.name)


def unfinished_files(result_path: str, key: str) -> list[Path]:
    return sorted(Path(result_path).parent.glob(f"{escape(Path(result_path).name)}.{key}.partial-*"))


def read_unfinished(result_path: str, key: str) -> dict[int, Hypothesis]:
    """Finished hypotheses by index, of all processes."""
    files = [path.read_bytes() for path in unfinished_files(result_path, key)]
    lines = [line for content in files for line in content.split(b"\n")[:-1]]  # one without its end was torn by a kill
    return {row["index"]: Hypothesis(**row) for row in map(json.loads, lines)}


def write_result(result_path: str, records: Records, hypotheses: dict[int, Hypothesis]) -> None:
    """Write the result file, in the order of the records; it appears whole or not at all."""
    with open(f"{result_path}.whole", "w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            row = {name: x for name, x in asdict(hypotheses[index]).items() if x is not None or name == "problem"}
            text = row.pop("text")  # named pred in the file, as its users know it
            row = {"key": key_of(record), "wav": record.get("wav"), "txt": transcript_of(record), "pred": text} | row
            line = json.dumps(row, ensure_ascii=False, default=str) if result_path.endswith(".jsonl") else text
            file.write(line + "\n")  # str: audio inside another file
    os.replace(f"{result_path}.whole", result_path)  # in one step


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    options = DecodingOptions(**{option.name: getattr(args, option.name) for option in fields(DecodingOptions)})
    output = args.result_path or f".{args.format}"
    if (options.confidence or options.nbest > 1) and not output.endswith((".jsonl", ".json")):
        raise InputError("--confidence, --nbest: no room for them; wanted --result_path NAME.jsonl or --format json")
    if args.data_path:
        with only_writer_of(args.result_path):
            return recognize_manifest(args, options)
    if args.format:
        import long_audio  # an option

        paths = long_audio.output_paths(args.audio, args.format, args.output_dir)  # told before the model is loaded
        return long_audio.transcribe_files(load_model(args), args.audio, paths, args.format, args.batch_size, options)
    print(*load_model(args).transcribe(args.audio, args.batch_size, args.num_workers, **asdict(options)), sep="\n")


if __name__ == "__main__":
    run(main)
