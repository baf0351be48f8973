"""Tiny real models with random weights, and a corpus of noise: everything that the tests run on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_whisper(path: Path, width: int = 32) -> Path:
    """A random Whisper in openai-whisper's .pt format."""
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, width, 2, 2, n_vocab=64, n_text_ctx=16, n_text_state=16, n_text_head=2, n_text_layer=1)
    torch.save({"dims": dims.__dict__, "model_state_dict": Whisper(dims).state_dict()}, path)
    return path


def make_tokenizer(chat_template: str | None = CHATML, **special_tokens):
    """A byte-level BPE tokenizer; pads with its end token, as many LLMs do, unless told otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = special_tokens or {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    extra = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>", "<|start_header_id|>", "<|end_header_id|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=extra, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["hello world transcribe the speech user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special_tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.chat_template = chat_template
    return tokenizer


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


def make_corpus(folder: Path, seconds: list[float], rate: int = 16000) -> Path:
    """Noise of the given lengths and a manifest of it."""
    random = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(seconds):
        name = f"clip{number}.wav"
        soundfile.write(folder / name, random.normal(0, 0.1, round(length * rate)).astype(np.float32), rate)
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
    from model import SpeechLLM, SpeechLLMConfig

    torch.manual_seed(0)
    return SpeechLLM(SpeechLLMConfig(str(world / "llm"), str(world / "whisper.pt"), projector_hidden_size=64))
