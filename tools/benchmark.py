"""Speed, memory and padding of training and decoding, on random weights of named sizes: nothing is downloaded.

python -m tools.benchmark --encoder tiny --llm small --mean_seconds 4.5            # as train.py and recognize.py do it
python -m tools.benchmark --encoder tiny --llm small --mean_seconds 4.5 --fixed    # the old recipe: 30 s, 512 tokens
python -m tools.benchmark --encoder tiny --llm small --mean_seconds 4.5 --compare  # both in turns, and their ratios
python -m tools.benchmark --encoder tiny --llm small --mean_seconds 4.5 --compare="--lora_r 8"  # what LoRA costs

Training from cached frames (--encoder_cache), against the encoder at work, and against no audio and no encoder at all:

python -m tools.benchmark --frames cache --audio wav --decode_batches 0 --compare="--frames encoder"
python -m tools.benchmark --frames cache --audio wav --decode_batches 0 --compare="--frames none --audio memory"
python -m tools.benchmark --mean_seconds 2 --prompt_tokens 24 --compare=--prompt_anew  # what prompt_once.py gains
python -m tools.benchmark --mean_seconds 12.3 --decode_batches 0 --compare="--max_batch_seconds 0"  # by a budget
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import soundfile
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersWhisper

import prompt_once
from batching import BudgetSampler, measure
from dataset import IGNORE, SpeechDataset, collate
from errors import InputError, run
from frame_cache import CachedEncoder, use
from manifest import PROMPT, SAMPLE_RATE, SPEECH
from model import SpeechLLM, SpeechLLMConfig, WhisperEncoder, build_projector
from projectors import PROJECTORS
from train import LengthSampler

ENCODERS = {  # mel bins, width, heads, layers
    "tiny": (80, 384, 6, 4),
    "base": (80, 512, 8, 6),
    "small": (80, 768, 12, 12),
    "medium": (80, 1024, 16, 24),
    "large-v3": (128, 1280, 20, 32),
    "large-v3-turbo": (128, 1280, 20, 32),
}
LLMS = {  # width, inner width, layers, heads, key-value heads, vocabulary, tied embeddings
    "nano": (64, 128, 2, 4, 2, 1000, True),  # for the test
    "small": (512, 1536, 8, 8, 2, 151_936, True),  # trains on two cores; the vocabulary is that of the real ones
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152_064, False),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128_256, False),
}
CHAT = (
    "<|im_start|> system You are a helpful assistant . <|im_end|> {% for m in messages %}"
    "<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}<|im_start|> assistant "
)
CHAT_TOKENS = 11  # of it before the user's turn
FIXED_TOKENS = 512  # positions of every text in the old recipe
TOKENS_A_SECOND = 3.5  # of transcript: English words at 2.7 a second with 1.3 tokens each
GROUP = 50  # batches among which LengthSampler sorts


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--encoder", choices=ENCODERS, default="tiny", help="Whisper size (default: tiny)")
    add("--llm", choices=LLMS, default="small", help="LLM size (default: small = 8 layers, 512 wide, 151,936 tokens)")
    add("--mean_seconds", type=float, default=4.5, help="mean length of the clips, up to 20 seconds (default: 4.5)")
    add("--fixed", action="store_true", help="the old recipe: audio padded to 30 s, text to 512 tokens, all logits")
    add("--projector", choices=["conv1d", *PROJECTORS], default="conv1d", help="default: conv1d")
    add("--frames", choices=["encoder", "cache", "none"], default="encoder",
        help="in training: encoded each time, from --encoder_cache (filled before, which is a figure of its own), or "
        "random ones, without audio and encoder (default: encoder)")  # fmt: skip
    add("--audio", choices=["memory", "wav", "flac"], default="memory", help="where the samples are (default: memory)")
    add("--lora_r", type=int, default=0, help="rank of LoRA on the LLM, 0 = none (default: 0)")
    add("--prompt_tokens", type=int, default=CHAT_TOKENS, help="before <audio>, 11 or more (default: 11; SmolLM2: 24)")
    add("--prompt_anew", action="store_true", help="the LLM reads them in every batch, as without prompt_once.py")
    add("--compare", nargs="?", const="--fixed", metavar="FLAGS",
        help="run without and with these flags in turns, each in a process of its own (default: --fixed)")  # fmt: skip
    add("--repeats", type=int, default=3, help="turns of --compare, of which medians are given (default: 3)")
    add("--batch_size", type=int, default=4, help="clips a training step (default: 4)")
    add("--max_batch_seconds", type=float, help="batches by a budget of padded seconds; 0 = --batch_size times the "
        "longest clip, for the same peak memory (default: batches of --batch_size clips)")  # fmt: skip
    add("--steps", type=int, default=5, help="timed training steps, 0 to 50; one more warms up (default: 5)")
    add("--decode_batch_size", type=int, default=16, help="clips decoded together, against one alone (default: 16)")
    add("--decode_batches", type=int, default=2, help="batches to decode, 0 to 50 (default: 2)")
    add("--num_workers", type=int, default=0, help="processes that make training batches, 0 = none (default: 0)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights (default: float32)")
    add("--json", action="store_true", help="print the figures as one line of JSON")
    args = parser.parse_args(argv)
    limits = {"mean_seconds": (0.5, 20), "steps": (0, GROUP), "decode_batches": (0, GROUP)}
    limits |= {name: (1, 1000) for name in ("repeats", "batch_size", "decode_batch_size")}
    limits |= {"prompt_tokens": (CHAT_TOKENS, 400)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name):g}: wanted {least} to {most}")
    if args.frames != "encoder" and args.decode_batches:
        parser.error(f"--frames {args.frames} is of training alone; wanted --decode_batches 0")
    return args


def build_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word, w0, w1 ..., for each id: a transcript of n words has n tokens."""
    words = ["<|im_end|>", "<|im_start|>", *"system You are a helpful assistant . user Transcribe the speech".split()]
    words += [f"w{i}" for i in range(len(words), num_tokens)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": words[0], "additional_special_tokens": words[:2]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **special)


def build_model(args: argparse.Namespace) -> SpeechLLM:
    """SpeechLLM as train.py builds it, of parts with random weights that are made in place, on the device."""
    width, inner, layers, heads, kv_heads, num_tokens, tied = LLMS[args.llm]
    llm_config = (LlamaConfig if args.llm.startswith("llama") else Qwen2Config)(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=num_tokens, tie_word_embeddings=tied, max_position_embeddings=32768,
        initializer_range=0.3,  # else every answer is one word over and over, and all are the same
    )  # fmt: skip
    mels, encoder_width, heads, layers = ENCODERS[args.encoder]
    encoder_config = WhisperConfig(
        num_mel_bins=mels, d_model=encoder_width, encoder_ffn_dim=4 * encoder_width, encoder_attention_heads=heads,
        encoder_layers=layers,
    )  # fmt: skip
    prompt = "w20 " * (args.prompt_tokens - CHAT_TOKENS) + PROMPT
    config = SpeechLLMConfig(projector=args.projector, pad_to_30s=args.fixed, lora_r=args.lora_r, prompt=prompt)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype)
        whisper = TransformersWhisper(encoder_config).to(dtype)
        projector = build_projector(config, encoder_width, width)
    encoder = WhisperEncoder(whisper, WhisperFeatureExtractor(mels))
    model = SpeechLLM(config, encoder, projector, llm, build_tokenizer(num_tokens))
    model.llm.generation_config.eos_token_id = [num_tokens]  # no such token: random weights would stop anywhere
    return model


def make_dataset(model: SpeechLLM, args: argparse.Namespace, folder: Path) -> SpeechDataset:
    """Noise with random transcripts; lengths spread like speech corpora's: 30 % of the mean, 0.4 to 2 times the mean.

    AISHELL-1 has 4.5 s with a deviation of 1.4 s; LibriSpeech 12.3 s with 3.8 s, up to 24.5 s. `folder` is for --audio.
    """
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 40 * SAMPLE_RATE).astype(np.float32)  # clips are views of it and take no memory
    mean, count = args.mean_seconds, GROUP * max(args.batch_size, args.decode_batch_size)
    records = []
    for index, seconds in enumerate(random.normal(mean, 0.3 * mean, count).clip(0.4 * mean, min(2 * mean, 30))):
        start, words = random.integers(SAMPLE_RATE), random.integers(20, 1000, max(1, round(TOKENS_A_SECOND * seconds)))
        wav = noise[start : start + round(seconds * SAMPLE_RATE)]
        if args.audio != "memory":
            soundfile.write(folder / f"{index}.{args.audio}", wav, SAMPLE_RATE)
            wav = str(folder / f"{index}.{args.audio}")
        records.append({"where": f"clip {index}", "wav": wav, "txt": " ".join(f"w{i}" for i in words)})
    return model.make_dataset(records)


def replace_encoder(
    model: SpeechLLM, dataset: SpeechDataset, positions: np.ndarray, args: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Put a cache of the clips at these positions, or random frames, in the encoder's place; figures of the filling.

    Noise takes as long as speech, but for flac files, of which those of noise are larger.
    """
    figures, width, dtype = {}, model.encoder.output_size, getattr(torch, args.dtype)
    if args.frames == "cache":
        part = copy(dataset)
        part.indices, part.seconds = dataset.indices[positions], dataset.seconds[positions]
        data = SimpleNamespace(augment=[], check=0, encoder_cache=str(folder / "cache"))
        training = SimpleNamespace(device=torch.device(args.device), process_index=0, world_size=1)
        training.per_device_train_batch_size, training.dataloader_num_workers = args.batch_size, args.num_workers
        begin = time.perf_counter()
        with redirect_stdout(sys.stderr):  # standard output is for the figures
            use(model, {"trained on": part}, data, training)
        figures["fill_audio_seconds_a_second"] = float(part.seconds.sum()) / (time.perf_counter() - begin)
    else:
        frames = torch.randn(1500, width).bfloat16()  # of 30 s
        extract = lambda samples: frames[: len(samples) // 320]  # noqa: E731
        model.encoder = CachedEncoder(SimpleNamespace(extract=extract, width=width), dtype)
        model.embedding_counts = model.num_embeddings(torch.arange(len(frames) + 1)).numpy()
    dataset.extract, dataset.embedding_counts = model.encoder.extract, model.embedding_counts
    return figures


def pick(groups: np.ndarray, count: int) -> np.ndarray:
    """`count` rows at even distances, so that few of many sorted clips or batches have the mean of all."""
    return groups[((np.arange(count) + 0.5) * len(groups) / max(count, 1)).astype(int)]


def fix(batch: dict) -> dict:
    """A batch in the old recipe: 512 positions, each of which has a label but the first, which nothing predicts."""
    room = FIXED_TOKENS - batch["input_ids"].shape[1]
    assert room >= 0, f"a text and 30 s of speech take {FIXED_TOKENS - room} positions, more than {FIXED_TOKENS}"
    padded = {name: F.pad(batch[name], (room, 0)) for name in ("input_ids", "attention_mask")}
    labels = F.pad(batch["labels"], (FIXED_TOKENS - 1 - batch["labels"].shape[1], 0), value=IGNORE)
    return {**batch, **padded, "labels": labels}


def size(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))


def count_work(model: SpeechLLM, seconds: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """What a batch of clips of so many seconds holds, and the operations of the matrix products that it needs.

    Only the clips and texts themselves count, no padding; of each text the prompt, too, though it be computed once.
    Forward takes 2 operations for a weight and a position, backward 2 for the gradient of the input and 2 for that of
    the weight: frozen weights have no gradient, the encoder no backward. Attention without the half that the causal
    mask hides; the vocabulary only where there are labels.
    """
    is_cached = isinstance(model.encoder, CachedEncoder)
    features = ((50 if is_cached else 100) * seconds).long()  # those of a cache are frames
    frames, speech = model.encoder.output_lengths(features), model.num_embeddings(features)
    texts = (batch["attention_mask"].bool() & (batch["input_ids"] != SPEECH)).sum(1)  # prompt and transcript
    tokens, labels = texts + speech, (batch["labels"] != IGNORE).sum(1)

    projector, llm, config, work = model.projector, model.llm, model.llm.config, torch.zeros(len(seconds))
    if not is_cached:
        encoder = model.encoder.model
        work += 2 * size(encoder.conv1) * features + 2 * (size(encoder.conv2) + size(encoder.layers)) * frames
        work += len(encoder.layers) * 4 * frames**2 * model.encoder.output_size
    first = next(m for m in projector.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
    work += (6 * size(projector) - 2 * size(first)) * speech
    work += 4 * size(llm.model) * tokens + config.num_hidden_layers * 6 * tokens**2 * config.hidden_size
    work += 4 * config.hidden_size * config.vocab_size * labels
    useful = {"seconds": seconds, "features": features, "tokens": tokens, "operations": work.double()}
    with_padding = {
        "padded_features": batch["input_features"][:, :, 0].numel(),
        "padded_tokens": batch["input_ids"].numel(),
    }
    return {name: value.sum().item() for name, value in useful.items()} | with_padding


def to_device(batch: dict, device: str) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def matrix_rate(device: str, dtype: str) -> float:
    """Operations a second of one large square matrix product, the second of two."""
    width = 8192 if device == "cuda" else 2048
    a = torch.ones(width, width, device=device, dtype=getattr(torch, dtype))
    for _ in range(2):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
    return 2 * width**3 / (time.perf_counter() - begin)


def reset_peak(device: str) -> int:
    """Forget the highest memory use so far; returns the present one, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # Linux; elsewhere the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_batches(dataset: SpeechDataset, args: argparse.Namespace) -> list[list[int]]:
    """Positions of the clips of each batch of an epoch, as train.py makes them."""
    if args.max_batch_seconds is None:
        order = [position for _, position in LengthSampler(dataset.durations, args.batch_size, seed=0)]
        return np.array(order[: GROUP * args.batch_size]).reshape(GROUP, -1).tolist()
    seconds = args.max_batch_seconds or args.batch_size * dataset.durations.max()
    sampler = BudgetSampler(measure(dataset)[0], np.array([seconds, np.inf]), seed=0)
    return [[position for _, position in batch] for batch in sampler]


def measure_training(
    model: SpeechLLM, dataset: SpeechDataset, args: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Figures of `steps` optimiser steps over batches as train.py makes them, from audio in memory to new weights."""
    batches = sorted(training_batches(dataset, args), key=lambda batch: dataset.durations[batch].mean())
    batches = [batches[-1], *(batches[i] for i in pick(np.arange(len(batches)), args.steps))]  # the longest warms up
    figures = {}
    if args.frames != "encoder":
        figures = replace_encoder(model, dataset, np.unique(sum(batches, [])), args, folder)
    memory_before = reset_peak(args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    autocast = partial(torch.autocast, args.device, torch.bfloat16, args.dtype == "bfloat16")
    model.train()
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.num_workers))
    times, rates, counts = [], [], []
    for _ in batches:
        begin = time.perf_counter()
        batch = next(loader)
        if args.fixed:
            batch = fix(batch)
        with autocast():
            loss = model(**to_device(batch, args.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        rates.append(matrix_rate(args.device, args.dtype))  # beside each step, for others may use the machine
        counts.append(count_work(model, torch.tensor(dataset.durations[batch["index"]]), batch))
    total = {name: sum(count[name] for count in counts[1:]) for name in counts[0]}
    seconds, rate = sum(times[1:]), median(rates[1:])
    return figures | {
        "train_audio_seconds_a_second": total["seconds"] / seconds,
        "train_mean_clip_seconds": total["seconds"] / sum(map(len, batches[1:])),
        "train_encoder_padding_share": 1 - total["features"] / total["padded_features"],
        "train_llm_padding_share": 1 - total["tokens"] / total["padded_tokens"],
        "matrix_gflops_a_second": rate / 1e9,
        "train_useful_share_of_matrix_rate": total["operations"] / seconds / rate,
        "weights_mb": memory_before / 1e6,
        "train_peak_above_weights_mb": (peak_memory(args.device) - memory_before) / 1e6,
    }


def measure_decoding(model: SpeechLLM, dataset: SpeechDataset, args: argparse.Namespace) -> dict[str, float]:
    """Figures of decoding the same clips in batches and one by one, in turns.

    Nothing stops early: a clip gets as many tokens as its transcript has, a batch as many as its longest.
    """

    def decode(clips: list[int]) -> dict[int, list[str]]:
        num_words = {i: len(dataset.records[i]["txt"].split()) for i in clips}
        (hypotheses,) = model.decode(dataset, clips, len(clips), num_beams=1, max_new_tokens=max(num_words.values()))
        return {h.index: h.text.split()[: num_words[h.index]] for h in hypotheses}

    size = args.decode_batch_size
    batches = pick(dataset.durations.argsort()[: GROUP * size].reshape(GROUP, size), args.decode_batches).tolist()
    decode(batches[0][:1])  # warms up
    times, texts = {"batch": 0.0, "alone": 0.0}, {"batch": {}, "alone": {}}
    for batch in batches:
        for way, parts in ("batch", [batch]), ("alone", [[clip] for clip in batch]):
            begin = time.perf_counter()
            for part in parts:
                texts[way] |= decode(part)
            times[way] += time.perf_counter() - begin
    clips = sum(batches, [])
    audio = float(dataset.durations[clips].sum())
    return {
        "decode_audio_seconds_a_second": audio / times["batch"],
        "decode_alone_audio_seconds_a_second": audio / times["alone"],
        "decode_batch_over_alone": times["alone"] / times["batch"],
        "decode_clips": len(clips),
        "decode_clips_with_the_same_text": sum(texts["batch"][i] == texts["alone"][i] for i in clips),
        "decode_different_texts": len({" ".join(text) for text in texts["batch"].values()}),
    }


def compare(argv: list[str], repeats: int, flags: str) -> dict[str, list[float]]:
    """Each figure's median over the turns: without the flags, with them, and of the ratios; or the first alone."""
    argv = [arg for arg in argv if not arg.startswith("--compare") and arg != flags]
    server, turns = multiprocessing.get_context("forkserver"), []
    server.set_forkserver_preload(["train"])  # so that the libraries are imported once
    for extra in repeats * [[], flags.split() + ["--decode_batches=0"] * ("--fixed" in flags)]:
        # In a process of its own, because the highest memory use is that of a process.
        with ProcessPoolExecutor(1, server) as process:
            try:
                turns.append(process.submit(measure_one, [*argv, *extra]).result())
            except BrokenProcessPool:
                raise InputError(f"{' '.join([*argv, *extra])}: killed, perhaps for want of memory") from None
    figures = {}
    for name in turns[0]:
        without, with_flags = [turn[name] for turn in turns[::2]], [turn.get(name) for turn in turns[1::2]]
        figures[name] = [median(without)]
        if None not in with_flags:
            ratios = [a / b if b else float("nan") for a, b in zip(without, with_flags, strict=True)]
            figures[name] += [median(with_flags), median(ratios)]
    return figures


def measure_one(argv: list[str]) -> dict[str, float]:
    """The figures of these flags."""
    args = parse(argv)
    torch.manual_seed(0)
    prompt_once.IS_ON = not args.prompt_anew
    model = build_model(args)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(model, args, Path(folder))
        figures = measure_training(model, dataset, args, Path(folder)) if args.steps else {}
        return figures | (measure_decoding(model, dataset, args) if args.decode_batches else {})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    figures = compare(argv, args.repeats, args.compare) if args.compare else measure_one(argv)
    if args.json:
        return print(json.dumps(figures))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.encoder} + {args.llm}, {args.dtype}, clips of {args.mean_seconds:g} s, {machine}")
    if args.compare:
        print(f"{'':40}{'now':>12}{args.compare:>12}{'ratio':>12}")
    for name, values in figures.items():
        print(f"{name:40}" + "".join(f"{value:12,.4g}" for value in (values if args.compare else [values])))


if __name__ == "__main__":
    run(main)
