"""Recognise speech: the lines of a manifest into a result file, or audio files onto the screen.

python recognize.py --model_path run --data_path test.jsonl --result_path result.txt
python recognize.py --model_path run a.wav b.flac
"""

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from journal import append, fingerprint, finish, open_journal, read_journals
from manifest import InputError, Manifest, reference, run
from score import score_files


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files to recognise, one transcript a line on standard output")
    add("--model_path", help="folder or Hub name: says of itself which encoder, LLM and prompt it needs")
    add("--revision", help="of --model_path on the Hub: branch, tag or commit")
    add("--projector_model_path", help="model.safetensors, in place of --model_path")
    add("--llm_model_name_or_path", help="the LLM (default: what the checkpoint names)")
    names = "--encoder_name_or_path", "--whisper_model_name_or_path"
    add(*names, help="the speech encoder (default: what the checkpoint names)")
    add("--prompt", help="the user's turn, with <audio> in it (default: the checkpoint's)")
    add("--system_prompt", help="the system's turn (default: the checkpoint's)")
    add("--chat_template", help="FILE.jinja in place of the LLM's own (default: the checkpoint's)")
    add("--quantize", choices=["4bit", "8bit"], help="hold the LLM so, by bitsandbytes on a GPU")
    add("--merge_lora", action="store_true", help="add LoRA to the weights beside it, for speed")
    add("--data_path", help="manifest: JSON lines with 'wav' and, to be scored, 'txt'")
    add("--result_path", help="where the hypotheses go: .txt = one a line, .jsonl = one object a line")
    add("--num_beams", type=int, default=4, help="beams of the search; 1 = greedy (default: 4)")
    add("--batch_size", type=int, default=16, help="utterances decoded together (default: 16)")
    add("--max_new_tokens", type=int, default=200, help="most tokens of a transcript (default: 200)")
    add("--num_workers", type=int, default=2, help="processes that read audio; 0 = none (default: 2)")
    add("--device", help="default: this process's GPU if there is one, else cpu")
    add("--llm_type", help=argparse.SUPPRESS)  # older commands give it; the tokenizer knows its stop tokens
    args = parser.parse_args()
    for name, value in search_options(args).items():
        if value < 1:
            parser.error(f"--{name} {value}: wanted 1 or more")
    if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA GPU here")
    if not args.model_path and not args.projector_model_path:
        parser.error("wanted --model_path, or --projector_model_path with the encoder and the LLM")
    if bool(args.audio) == bool(args.data_path and args.result_path):
        parser.error("wanted either audio files, or --data_path and --result_path")
    return args


def load_model(args: argparse.Namespace):
    """The SpeechLLM that the flags name; they win over the config.json beside the weights, and can stand in for it."""
    from model import SpeechLLM  # here, so that --help is quick

    names = "llm_model_name_or_path encoder_name_or_path prompt system_prompt chat_template quantize".split()
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    path = args.projector_model_path or args.model_path
    model = SpeechLLM.from_pretrained(path, args.revision, args.device or gpu, **given)
    if args.merge_lora:
        model.merge_lora()
    return model


def search_options(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in ("batch_size", "num_beams", "max_new_tokens")}


def recognize_files(args: argparse.Namespace) -> None:
    """One transcript a line for each audio file; one that cannot be read gives an empty line and a warning."""
    print(*load_model(args).transcribe(args.audio, **search_options(args)), sep="\n")


def recognize_manifest(args: argparse.Namespace) -> None:
    """Decode a manifest into a result file, on one process or on a share each of several, and score it."""
    manifest = Manifest(args.data_path, needs_text=False)  # wrong input is told before the model is loaded
    if not (folder := Path(args.result_path).parent).is_dir():
        raise InputError(f"{folder}: no such folder, for --result_path {args.result_path}")
    if not args.result_path.endswith((".txt", ".jsonl")):
        raise InputError(f"--result_path {args.result_path}: wanted the ending .txt or .jsonl")
    rank, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    wait_for_all = dist.barrier if num_processes > 1 else lambda: None
    model = load_model(args)
    dataset = model.to_decode(manifest, args.max_new_tokens)
    key = fingerprint(model, manifest.sha256, args.num_beams, args.max_new_tokens)
    done, foreign = read_journals(args.result_path, key)
    wait_for_all()  # all have read before anyone writes
    if rank == 0 and done:
        print(f"going on: {len(done):,} of {len(manifest):,} utterances were decoded before", file=sys.stderr)
    if rank == 0 and foreign:
        print("starting over: an unfinished result of another model, manifest or setting is there", file=sys.stderr)
        for path in foreign:
            path.unlink()
    wait_for_all()

    todo = sorted((i for i in range(len(manifest)) if i not in done), key=lambda i: -dataset.durations[i])
    mine, begin, audio_seconds = todo[rank::num_processes], time.perf_counter(), 0.0
    batches = model.decode(dataset, mine, num_workers=args.num_workers, **search_options(args))
    bar = tqdm(total=len(mine), unit="utt", disable=rank > 0)
    with open_journal(args.result_path, key, rank) as journal, bar:
        for batch in batches:
            append(journal, batch)
            audio_seconds += sum(dataset.durations[index] for index, _, _ in batch)
            bar.set_postfix(RTF=f"{(time.perf_counter() - begin) / max(audio_seconds, 0.01):.4f}", refresh=False)
            bar.update(len(batch))
    wait_for_all()
    if rank > 0:
        return
    problems = finish(args.result_path, manifest, key)
    if problems:
        print(f"{len(problems):,} of {len(manifest):,} utterances have problems:", file=sys.stderr)
        print(*(f"  line {number}: {problem}" for number, problem in problems), sep="\n", file=sys.stderr)
    if any(reference(record) is not None for record in manifest):
        print(score_files(args.data_path, args.result_path))


if __name__ == "__main__":
    args = parse()
    run(lambda: recognize_files(args) if args.audio else recognize_manifest(args))
