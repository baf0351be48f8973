"""The demo's data: made-up sentences, espeak-ng's speech of them in known voices and new ones, and a tokenizer."""

import ctypes
import json
import multiprocessing
import random
import shutil
from pathlib import Path

import numpy as np

from demo.stages import CORES

ACCENTS = ("en-us", "en-gb-x-rp")  # a voice is an accent and one of espeak-ng's speaker variants
KNOWN_VOICES = "m1 m2 m3 m4 m6 m7 f1 f2 f3 f5 Andrea Alex belinda adam steph edward".split()
NEW_VOICES = "m8 f4 linda Michael".split()  # these variants are in no training data, in neither accent
TESTS = {"known_voices": KNOWN_VOICES, "new_voices": NEW_VOICES}
NUM_DEV = 64  # sentences in known voices for the evaluation at the end of training
NOTHING = ("silence", "white noise", "pink noise", "hum", "music")  # what test_nothing.jsonl has, in turn
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|blank|>"]
BLANK = SPECIAL.index("<|blank|>")  # CTC's blank, and a slot without a word in what the LLM repeats
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


def sentence(rng: random.Random) -> str:
    """A sentence of 6 to 14 words from 132; the grammar can say some 200 million."""
    slots = [slot for slot in rng.choice(TEMPLATES).split() if not slot.endswith("?") or rng.random() < 0.5]
    return " ".join(rng.choice(WORDS.get(slot.rstrip("?"), [slot])) for slot in slots)


def new_sentences(rng: random.Random, count: int, earlier: set[str]) -> list[str]:
    """So many sentences that are not among the `earlier` ones, to which they are added."""
    sentences = []
    while len(sentences) < count:
        if (text := sentence(rng)) not in earlier:
            earlier.add(text)
            sentences.append(text)
    return sentences


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


def nothing(kind: str, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Samples (S,) at 16 kHz in which nobody speaks."""
    time = np.arange(round(seconds * 16000)) / 16000
    noise = random.normal(0, 1, len(time))
    if kind == "pink noise":
        spectrum = np.fft.rfft(noise) / np.sqrt(np.arange(len(time) // 2 + 1) + 1)  # power falls with 1 / frequency
        noise = np.fft.irfft(spectrum, len(time))
    if kind == "hum":
        noise = sum(np.sin(2 * np.pi * 50 * n * time) / n for n in (1, 2, 3, 5))
    if kind == "music":  # a chord a second, each tone dying away
        roots = 110 * 2 ** (random.integers(0, 12, round(seconds) + 1) / 12)
        root, fade = roots[time.astype(int)], np.exp(-2 * (time % 1))
        noise = fade * sum(np.sin(2 * np.pi * root * ratio * (time % 1)) for ratio in (1, 1.25, 1.5, 2))
    loudness = 1e-4 if kind == "silence" else random.uniform(0.01, 0.1)
    return (loudness * noise / noise.std()).astype(np.float32)


def make_nothing(folder: Path, count: int, seed: int) -> None:
    """test_nothing.jsonl: clips of 2 to 6 s without a word in them, whose transcripts are empty."""
    import soundfile

    random, rows = np.random.default_rng(seed), []
    for i in range(count):
        kind, seconds = NOTHING[i % len(NOTHING)], random.uniform(2, 6)
        samples = nothing(kind, seconds, random)
        soundfile.write(folder / f"wav/test_nothing_{i:03}.wav", samples, 16000)
        rows.append({"wav": f"wav/test_nothing_{i:03}.wav", "txt": "", "duration": len(samples) / 16000, "kind": kind})
    (folder / "test_nothing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder: Path, seed: int, train_sentences: int, test_sentences: int) -> None:
    """wav/, train.jsonl, dev.jsonl, test_*.jsonl, and tokenizer/."""
    rng, earlier, jobs = random.Random(seed), set(), {}
    shutil.rmtree(folder / "wav", ignore_errors=True)
    (folder / "wav").mkdir()
    counts = {**dict.fromkeys(TESTS, test_sentences), "train": train_sentences, "dev": NUM_DEV}
    for name, count in counts.items():
        is_train, variants = name == "train", TESTS.get(name, KNOWN_VOICES)
        for i, text in enumerate(new_sentences(rng, count, earlier)):
            voice = f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"
            prosody = (rng.randint(190, 250), rng.randint(35, 65), rng.randint(35, 65))
            speed = rng.uniform(0.88, 1.14) if is_train else 1.0  # stands for larger and smaller speakers
            stem = f"test_{name}" if name in TESTS else name
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
    make_nothing(folder, max(test_sentences // 10, len(NOTHING)), seed)
    make_tokenizer(folder / "tokenizer", [text for _, text, *_ in jobs["train"]])


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """BPE of 666 tokens, most words of the texts whole, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"{text} {text}" for text in texts] + ["user\nassistant\nTranscribe the speech"] * 99
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=768, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
