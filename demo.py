"""The whole job on a laptop, nothing downloaded: a table of word error rates and three transcripts.

    python demo.py           # about seven minutes on two cores
    python demo.py --quick   # everything once in a minute or two; its error rates mean nothing

espeak-ng speaks made-up sentences in 16 voices. A small Whisper encoder learns to recognise them with CTC, a small
Qwen2 learns to repeat a noisy text that stands where the speech will stand. Then both are frozen, and the real
commands, train.py and recognize.py, train the projector between them and decode two test sets: new sentences in
known voices, and in voices that no part has heard. No test sentence is in any training data; their words are.

Each stage writes a stamp when its output is complete. A second run reuses what has one, unless the stage's settings or
a stage before it have changed.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that wait must not spin: beside another busy program 38 steps of the encoder took 160 s so, and now 9 s.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dataset import IGNORE, PROMPT, load_audio, log_mel, render_prompt
from manifest import Manifest

HERE, CORES = (
    Path(__file__).parent,
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
)
PROCESSES = min(2, CORES)  # side by side, for small models gain little from more threads
ACCENTS = ("en-us", "en-gb-x-rp")  # a voice is an accent and one of espeak-ng's speaker variants
KNOWN_VOICES = "m1 m2 m3 m4 m6 m7 f1 f2 f3 f5 Andrea Alex belinda adam steph edward".split()
NEW_VOICES = "m8 f4 linda Michael".split()  # these variants are in no training data, in neither accent
TESTS = {"known_voices": KNOWN_VOICES, "new_voices": NEW_VOICES}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|blank|>"]
BLANK = SPECIAL.index("<|blank|>")  # CTC's blank, and a slot without a word in what the LLM repeats
CHARACTERS = "_ abcdefghijklmnopqrstuvwxyz"  # _ = blank
CHAT_TEMPLATE = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

UNITS = "two three four five six seven eight nine".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {
    "WHO": "my brother/my sister/our teacher/the doctor/the old farmer/a young woman/the children/your friend/"
    "his mother/her uncle",
    "DID": "bought/found/sold/painted/carried/wanted/lost/brought/washed/counted",
    "COUNT": "/".join(UNITS * 8 + TENS * 3 + [f"{ten} {unit}" for ten in TENS for unit in ["one", *UNITS]]),
    "ADJ": "red/green/blue/white/yellow/black/small/large/heavy/broken/clean/cheap",
    "THINGS": "apples/books/chairs/boxes/flowers/letters/shirts/bottles/tickets/cups/lamps/carpets/potatoes/windows",
    "PLACE": "at the market/in the garden/near the river/behind the house/at the station/in the kitchen/"
    "under the bridge/on the table/beside the church/in the village",
    "TIME": "yesterday/this morning/on monday/on friday/last week/after lunch/before dinner/in the evening/in winter/"
    "again",
    "GIVE": "bring/send/give",
    "ARE": "are/were/are still/were still/are not/were not",
    "RIDE": "train/bus",
    "CITY": "london/paris/berlin/madrid/dublin/vienna",
    "LEAVES": "leaves/arrives",
    "HOUR": "one/two/three/four/five/six/seven/eight/nine/ten/eleven/twelve",
    "MINUTES": "twenty/thirty/forty/fifty",
    "WENT": "walked/drove/ran/came/went/cycled",
}
WORDS = {slot: words.split("/") for slot, words in WORDS.items()}
TEMPLATES = [  # ? = only half of the time
    *["WHO DID COUNT ADJ? THINGS PLACE? TIME?"] * 3,
    "TIME WHO DID COUNT ADJ? THINGS",
    "please GIVE COUNT ADJ? THINGS to WHO",
    "the ADJ THINGS ARE PLACE",
    "the RIDE to CITY LEAVES at HOUR MINUTES?",
    "WHO and WHO WENT to CITY TIME?",
]


@dataclass
class Settings:
    """What decides the outcome of a run."""

    train_sentences: int = 6000
    test_sentences: int = 250  # in each of the two test sets
    encoder_epochs: float = 2
    llm_steps: int = 600
    projector_epochs: float = 2
    projector_batch_size: int = 16
    projector_hidden_size: int = 512
    projector_learning_rate: float = 3e-3
    seed: int = 0


QUICK = {"train_sentences": 600, "test_sentences": 40, "encoder_epochs": 1, "llm_steps": 60, "projector_epochs": 1}


def sentence(rng: random.Random) -> str:
    """A sentence of 6 to 14 words from 132; the grammar can say some 200 million."""
    slots = [slot for slot in rng.choice(TEMPLATES).split() if not slot.endswith("?") or rng.random() < 0.5]
    return " ".join(rng.choice(WORDS.get(slot.rstrip("?"), [slot])) for slot in slots)


def new_sentences(rng: random.Random, count: int, seen: set[str]) -> list[str]:
    """So many sentences that are not in `seen`, where they are noted."""
    fresh = []
    while len(fresh) < count:
        if (text := sentence(rng)) not in seen:
            seen.add(text)
            fresh.append(text)
    return fresh


class Synthesizer:
    """Speech from text by the espeak-ng library that the espeakng-loader package carries."""

    def __init__(self):
        import espeakng_loader

        self.lib, self.pieces = ctypes.CDLL(espeakng_loader.get_library_path()), []
        data = espeakng_loader.get_data_path().encode()
        self.rate = self.lib.espeak_Initialize(2, 0, data, 0)  # 2: samples come back through the callback
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self.take)  # a reference must stay, or Python frees it
        self.lib.espeak_SetSynthCallback(self.callback)

    def take(self, samples, count: int, events) -> int:
        if samples and count:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, words_a_minute: int, pitch: int, pitch_range: int, speed: float):
        """Samples (S,) at 16 kHz. `speed` is that of a tape: it moves pitch and formants too."""
        import soxr

        self.pieces.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((1, words_a_minute), (3, pitch), (4, pitch_range)):  # numbers of speak_lib.h
            self.lib.espeak_SetParameter(parameter, value, 0)
        self.lib.espeak_Synth(text.encode(), len(text) + 1, 0, 0, 0, 1, None, None)  # 1: UTF-8
        samples = np.concatenate(self.pieces).astype(np.float32) / 2**15
        loud = np.flatnonzero(np.abs(samples) > 0.005)
        return soxr.resample(samples[max(0, loud[0] - 1500) : loud[-1] + 2000], self.rate * speed, 16000, "MQ")


def synthesize(jobs: list[tuple]) -> list[float]:
    """Write the wav file of each (path, text, voice ...); their durations in seconds."""
    import soundfile

    synthesizer, seconds = Synthesizer(), []
    for path, *spoken in jobs:
        samples = synthesizer.speak(*spoken)
        soundfile.write(path, samples, 16000)
        seconds.append(len(samples) / 16000)
    return seconds


def make_data(folder: Path, settings: Settings) -> None:
    """wav/, train.jsonl, test_*.jsonl, and tokenizer/ (BPE of 666 tokens, most words whole)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, seen, jobs = random.Random(settings.seed), set(), {}
    shutil.rmtree(folder / "wav", ignore_errors=True)
    (folder / "wav").mkdir()
    for name, variants in {**TESTS, "train": KNOWN_VOICES}.items():
        is_train = name == "train"
        count = settings.train_sentences if is_train else settings.test_sentences
        for i, text in enumerate(new_sentences(rng, count, seen)):
            voice = f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"
            prosody = (rng.randint(190, 250), rng.randint(35, 65), rng.randint(35, 65))
            speed = rng.uniform(0.88, 1.14) if is_train else 1.0  # stands for larger and smaller speakers
            stem = name if is_train else f"test_{name}"
            jobs.setdefault(stem, []).append((f"{folder}/wav/{stem}_{i:05}.wav", text, voice, *prosody, speed))
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        for stem, part in jobs.items():
            shares = [part[i : i + 100] for i in range(0, len(part), 100)]
            seconds = [s for share in pool.imap(synthesize, shares) for s in share]
            rows = [
                {"wav": f"wav/{Path(path).name}", "txt": text, "duration": round(s, 3), "voice": voice}
                for (path, text, voice, *_), s in zip(part, seconds, strict=True)
            ]
            (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"      {stem}: {len(rows):,} sentences, {sum(seconds) / 60:.0f} minutes of speech", flush=True)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"{text} {text}" for _, text, *_ in jobs["train"]] + ["user\nassistant\nTranscribe the speech"] * 99
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=768, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: https://kellerjordan.github.io/posts/muon/

    After as many steps it has a third of AdamW's CTC loss here. torch.optim.Muon computes in bf16 always, which most
    laptops are slow at.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                rows, columns = x.shape
                x = F.normalize(x.T if rows > columns else x, dim=(0, 1))
                for _ in range(5):  # Newton-Schulz: all singular values go to about 1
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if rows > columns else x
                p.add_(x.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class Optimizer:
    """`step(loss)` of Muon for the weight matrices of `blocks` and AdamW for all else, in one warmup and cosine."""

    def __init__(self, modules: list[nn.Module], blocks: nn.Module, num_steps: int):
        self.params = {id(p): p for module in modules for p in module.parameters()}
        matrices = {id(p): p for p in blocks.parameters() if p.ndim > 1}
        rest = [p for key, p in self.params.items() if key not in matrices]
        adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.optimizers = [Muon(matrices.values(), lr=0.02), adamw]
        warmup = max(1, 0.07 * num_steps)

        def rate(step: int) -> float:
            done = (step + 1 - warmup) / (num_steps - warmup)
            return (step + 1) / warmup if done < 0 else 0.5 + 0.5 * math.cos(math.pi * done)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in self.optimizers]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for part in self.optimizers + self.schedules:
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def train_encoder(folder: Path, settings: Settings, threads: Callable[[], int]) -> None:
    """whisper.pt: an untrained Whisper of 3 layers and 192 channels whose encoder learns CTC on clips of any length.

    The last layer predicts the LLM's tokens, the one before characters: tokens alone are slow to start with, and
    characters alone leave the spelling to the projector. The decoder's weights stay random.
    """
    import whisper
    from transformers import AutoTokenizer

    from model import WhisperEncoder

    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    dims = whisper.model.ModelDimensions(80, 1500, 192, 3, 3, n_vocab=8, n_text_ctx=8, n_text_state=192,
                                         n_text_head=3, n_text_layer=1)  # fmt: skip
    path = folder / "whisper.pt.partial"
    model = whisper.model.Whisper(dims)
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict()}, path)
    encoder = WhisperEncoder(str(path))
    to_tokens, to_characters = nn.Linear(192, len(tokenizer)), nn.Linear(192, len(CHARACTERS))
    middle = []  # what the last block's first LayerNorm makes of the block before
    hook = encoder.whisper.blocks[-1].attn_ln.register_forward_hook(lambda *call: middle.append(call[-1]))

    torch.set_num_threads(threads())
    clips = []
    for record in Manifest(str(folder / "train.jsonl")):
        (features,) = log_mel(load_audio(folder / record["wav"]), 80)
        ids = tokenizer(record["txt"], add_special_tokens=False).input_ids
        clips.append((features, ids, [CHARACTERS.index(c) for c in record["txt"]]))
    clips.sort(key=lambda clip: len(clip[0]))
    batches = [clips[i : i + 16] for i in range(0, len(clips), 16)]
    num_steps = round(len(batches) * settings.encoder_epochs)
    optimizer = Optimizer([encoder, to_tokens, to_characters], encoder.whisper.blocks, num_steps)
    watch = Progress("encoder", num_steps)
    order = [
        i for _ in range(math.ceil(settings.encoder_epochs)) for i in rng.sample(range(len(batches)), len(batches))
    ]
    for i in order[:num_steps]:
        torch.set_num_threads(threads())
        features, ids, characters = zip(*batches[i], strict=True)
        lengths = torch.tensor([len(f) for f in features])
        masked = pad_sequence([mask_some(f, rng) for f in features], batch_first=True).transpose(1, 2)
        frames, frame_lengths = encoder(masked, lengths), (lengths + 1) // 2
        loss = ctc(to_tokens(frames), frame_lengths, ids, BLANK)
        optimizer.step(loss + ctc(to_characters(middle.pop()), frame_lengths, characters, 0))
        watch.step(loss)
    hook.remove()
    model.encoder = encoder.whisper
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict()}, path)
    path.replace(folder / "whisper.pt")


def ctc(logits: Tensor, lengths: Tensor, targets: list[list[int]], blank: int) -> Tensor:
    """CTC loss per target symbol; logits (B, T, V)."""
    sizes, flat = torch.tensor([len(t) for t in targets]), torch.tensor([i for t in targets for i in t])
    return F.ctc_loss(logits.log_softmax(2).transpose(0, 1), flat, lengths, sizes, blank)


def mask_some(features: Tensor, rng: random.Random) -> Tensor:
    """A louder or softer copy (F, M) without two bands of time and of frequency: SpecAugment, arXiv:1904.08779."""
    features, mean = features + rng.uniform(-0.15, 0.15), features.mean()
    for axis, widest in ((0, 8), (0, 8), (1, 10), (1, 10)):
        width = rng.randint(0, widest)
        features.narrow(axis, rng.randint(0, features.shape[axis] - width), width).fill_(mean)
    return features


def train_llm(folder: Path, settings: Settings) -> None:
    """llm/: a Qwen2 of 2 layers and 128 channels that repeats a text which stands in its prompt as if misheard.

    The text is clean at first: repeating is learnt in a fraction of the time so."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer), initializer_range=0.05, **shape, **heads, **ends)
    llm = Qwen2ForCausalLM(config)
    table = llm.get_input_embeddings().weight  # (V, H)
    (before, after), end_id = render_prompt(tokenizer, json.dumps([{"role": "user", "content": PROMPT}]))
    optimizer, watch = Optimizer([llm], llm.model.layers, settings.llm_steps), Progress("llm", settings.llm_steps)
    seen = {r["txt"] for name in TESTS for r in Manifest(str(folder / f"test_{name}.jsonl"))}
    words = sorted({i for text in new_sentences(rng, 1000, set(seen)) for i in tokenizer(text).input_ids})
    for step in range(settings.llm_steps):
        noise = min(1.0, max(0.0, 2 * step / settings.llm_steps - 0.2))
        targets = [tokenizer(text).input_ids for text in new_sentences(rng, 32, seen)]
        heard = [mishear(target, words, noise, rng) for target in targets]
        labels = pad_left([torch.tensor([*t, end_id]) for t in targets], IGNORE)  # (B, K)
        slots = [blur(table[h], table.detach().std(), noise) for h in heard]
        # A wrong word now and then in what it has said so far: it must look at the speech again, and not run on.
        said = [[rng.choice(words) if rng.random() < 0.1 * noise else i for i in t] for t in targets]
        rest = [table[[*after, *t, end_id]] for t in said]
        embeds = pad_left([torch.cat([table[before], s, r]) for s, r in zip(slots, rest, strict=True)], 0)
        mask = pad_left([torch.ones(len(s) + len(r) + len(before)) for s, r in zip(slots, rest, strict=True)], 0)
        logits = llm(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=labels.shape[1] + 1).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        optimizer.step(loss)
        watch.step(loss)
    partial = folder / "llm.partial"
    llm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder / "llm", ignore_errors=True)
    partial.rename(folder / "llm")


def mishear(tokens: list[int], words: list[int], noise: float, rng: random.Random) -> list[int]:
    """What a poor encoder might deliver at 10 Hz for some tokens.

    Each stands one to three times, with a few blanks between; some are lost, wrong, or too many.
    """
    slots, blanks, errors = [BLANK] * rng.randint(0, 2), 0.7 * rng.random(), 0.1 * noise * rng.random()
    for token in tokens:
        luck = rng.random()
        heard = [] if luck < 0.2 * errors else [rng.choice(words)] if luck < errors else [token]
        heard += [rng.choice(words)] if rng.random() < 0.2 * errors else []
        slots += heard * rng.choice((1, 1, 1, 1, 2, 2, 3))
        while rng.random() < blanks:
            slots.append(BLANK)
    return slots or [BLANK]


def blur(embeds: Tensor, spread: Tensor, noise: float) -> Tensor:
    """Embeddings (N, H) mixed with their neighbours, scaled and noisy, as an untrained projector's are and worse.

    Without it a projector learns more slowly: loss 0.96 in place of 0.54 after 250 steps.
    """
    shares = noise * (torch.rand(len(embeds), 1) - 0.5).clamp(min=0)
    embeds = torch.lerp(embeds, embeds.roll(1, 0), shares) * torch.exp(0.5 * noise * torch.randn(1))
    return embeds + 2 * noise * torch.rand(1) * spread * torch.randn_like(embeds)


def pad_left(rows: list[Tensor], value: float) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


class Progress:
    """Prints a line about every ten seconds: `[3/6] encoder: step 100/750, loss 0.712, 21 s`."""

    def __init__(self, stage: str, num_steps: int):
        self.stage, self.num_steps, self.num_done, self.losses = stage, num_steps, 0, []
        self.begin = self.shown = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        self.num_done += 1
        self.losses.append(loss.item())
        now = time.perf_counter()
        if now - self.shown > 10 or self.num_done == self.num_steps:
            mean = sum(self.losses) / len(self.losses)
            say(self.stage, f"step {self.num_done}/{self.num_steps}, loss {mean:.3f}, {now - self.begin:.0f} s")
            self.losses, self.shown = [], now


def say(stage: str, text: str) -> None:
    print(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}: {text}", flush=True)


STAGES = ("data", "llm", "encoder", "projector", "known_voices", "new_voices")


class Stage:
    """A stage with a stamp, stages/NAME.json, which is written when its output is complete.

    `run(make)` makes the output unless the stamp says that it was made with these settings after these stages.
    """

    def __init__(self, folder: Path, name: str, settings: dict, after: list["Stage"] = ()):
        self.folder, self.name, self.settings, self.after = folder, name, settings, after
        self.path = folder / "stages" / f"{name}.json"

    def stamp(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def key(self) -> dict:
        return {"settings": self.settings, "after": [stage.stamp()["id"] for stage in self.after]}

    def run(self, outputs: list[str], make: Callable, *args) -> None:
        old, key = self.stamp(), self.key()
        if old.get("key") == key and all((self.folder / output).exists() for output in outputs):
            say(self.name, f"there already, made in {old['seconds']:.0f} s")
            return
        self.path.unlink(missing_ok=True)
        begin = time.perf_counter()
        make(*args)
        seconds = round(time.perf_counter() - begin, 1)
        stamp = {"key": key, "id": uuid.uuid4().hex, "seconds": seconds}
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(stamp) + "\n")
        partial.replace(self.path)
        say(self.name, f"done in {seconds:.0f} s")


def command(script: str, *flags) -> None:
    """Run one of the commands beside this file as a user would, on two processes that share the cores."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", str(HERE / script)]
    words += map(str, flags)
    print("      $ python", " ".join(words), flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, CORES // PROCESSES)), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, **threads})


def train_projector(folder: Path, settings: Settings) -> None:
    partial = folder / "run.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command(
        "train.py",
        *("--llm_model_name_or_path", folder / "llm", "--whisper_model_name_or_path", folder / "whisper.pt"),
        *("--data_path", folder / "train.jsonl", "--output_dir", partial, "--seed", settings.seed),
        *("--num_train_epochs", settings.projector_epochs, "--learning_rate", settings.projector_learning_rate),
        *("--per_device_train_batch_size", settings.projector_batch_size // PROCESSES, "--warmup_ratio", 0.05),
        *("--projector_hidden_size", settings.projector_hidden_size),
        *("--lr_scheduler_type", "cosine", "--logging_steps", 50, "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", True, "--use_cpu"),
    )
    shutil.rmtree(folder / "run", ignore_errors=True)
    partial.rename(folder / "run")


def recognize(folder: Path, name: str) -> None:
    files = ("--data_path", folder / f"test_{name}.jsonl", "--result_path", folder / f"result_{name}.txt")
    (folder / f"result_{name}.txt").unlink(missing_ok=True)
    command(
        "recognize.py",
        "--model_path",
        folder / "run",
        *files,
        "--num_beams",
        4,
        "--max_new_tokens",
        40,
        "--num_workers",
        0,
        "--device",
        "cpu",
    )


def llm_process(folder: Path, settings: Settings, stage: Stage) -> None:
    parent = multiprocessing.parent_process()  # if it is killed, this process must not write on beside the next run
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(max(1, CORES // 2))
    stage.run(["llm"], train_llm, folder, settings)


def summarize(folder: Path, settings: Settings, stages: dict[str, Stage]) -> None:
    """Print the table and three transcripts; write summary.json."""
    from score import score

    summary = {}
    print("\n| test set | sentences | words | WER |\n|---|---|---|---|")
    for name in TESTS:
        references = [record["txt"] for record in Manifest(str(folder / f"test_{name}.jsonl"))]
        hypotheses = (folder / f"result_{name}.txt").read_text().splitlines()
        counts = score(references, hypotheses).all
        summary[f"wer_{name}"] = counts.rate
        num_words = sum(len(text.split()) for text in references)
        print(
            f"| new sentences, {name.replace('_', ' ')} | {len(references)} | {num_words} | {100 * counts.rate:.2f} % |"
        )
    print()
    for said, heard in list(zip(references, hypotheses, strict=True))[:3]:
        print(f"reference  {said}\nhypothesis {heard}\n")
    summary["seconds"] = {name: stage.stamp()["seconds"] for name, stage in stages.items()}
    summary["settings"] = asdict(settings)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tenth of the data and of the steps: shows that everything runs")
    add("--output_dir", type=Path, help="where everything goes (default: demo_run, with --quick demo_run_quick)")
    add("--seed", type=int, default=0, help="another seed makes other sentences and other weights (default: 0)")
    args = parser.parse_args()
    settings = Settings(seed=args.seed, **(QUICK if args.quick else {}))
    folder = args.output_dir or Path("demo_run_quick" if args.quick else "demo_run")
    folder.mkdir(parents=True, exist_ok=True)

    def stage(name: str, after: list[Stage], *fields: str) -> Stage:
        return Stage(folder, name, {field: getattr(settings, field) for field in ("seed", *fields)}, after)

    begin = time.perf_counter()
    data = stage("data", [], "train_sentences", "test_sentences")
    data.run(["tokenizer", "wav", "train.jsonl"], make_data, folder, settings)
    # On few cores two small trainings side by side are faster than one after the other.
    llm, encoder = stage("llm", [data], "llm_steps"), stage("encoder", [data], "encoder_epochs")
    process = multiprocessing.get_context("spawn").Process(
        target=llm_process, args=(folder, settings, llm), daemon=True
    )
    process.start()

    def threads() -> int:  # the encoder takes over the LLM's cores as soon as they are free
        return max(1, CORES // 2) if process.is_alive() else CORES

    encoder.run(["whisper.pt"], train_encoder, folder, settings, threads)
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    fields = [name for name in asdict(settings) if name.startswith("projector")]
    projector = stage("projector", [llm, encoder], *fields)
    projector.run(["run"], train_projector, folder, settings)
    stages = [data, llm, encoder, projector]
    for name in TESTS:
        stages.append(stage(name, [projector]))
        stages[-1].run([f"result_{name}.txt"], recognize, folder, name)
    summarize(folder, settings, {stage.name: stage for stage in stages})
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {folder}/")


if __name__ == "__main__":
    main()
