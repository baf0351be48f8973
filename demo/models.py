"""The demo's models, all of which start from nothing: speech encoders that learn CTC, an LLM that learns to repeat."""

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dataset import IGNORE, load_audio, open_records, pad_left, render_prompt
from demo.data import BLANK, TESTS, new_sentences
from demo.stages import Progress, put
from manifest import PROMPT, SAMPLE_RATE
from model import load_encoder, transformers_name


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
            alike: dict[tuple, list] = {}  # shape -> matrices of it: together they take two thirds of the time
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                is_tall = x.shape[0] > x.shape[1]
                x = x.T if is_tall else x
                alike.setdefault(tuple(x.shape), []).append((p, is_tall, x))
            for matrices in alike.values():
                updates = orthogonal(torch.stack([x for _, _, x in matrices]))
                for (p, is_tall, _), x in zip(matrices, updates, strict=True):
                    x = x.T if is_tall else x
                    rate = group["lr"] * max(1, x.shape[0] / x.shape[1]) ** 0.5
                    p.add_(x.reshape(p.shape), alpha=-rate)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with all singular values at about 1, by Newton-Schulz."""
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


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
            share = (step + 1 - warmup) / (num_steps - warmup)  # of the cosine, 0 to 1
            return (step + 1) / warmup if share < 0 else 0.5 + 0.5 * math.cos(math.pi * share)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in self.optimizers]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for part in self.optimizers + self.schedules:
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


CHARACTERS = "_ abcdefghijklmnopqrstuvwxyz"  # _ = blank


def train_encoder(
    folder: Path, threads: Callable[[], int], seed: int, encoder_epochs: float, encoder: str = "whisper"
) -> None:
    """whisper.pt or wav2vec2/: an encoder of 3 layers and 192 channels that learns CTC from clips of any length.

    The last layer predicts the LLM's tokens, the one before characters: tokens alone are slow to start with, and
    characters alone leave the spelling to the projector.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    rng, recipe = random.Random(seed), RECIPES[encoder]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    partial = folder / f"partial_{recipe.output}"
    recipe.create(partial)
    model = load_encoder(str(partial))  # which is frozen
    for name, p in model.named_parameters():
        p.requires_grad_("embed_positions" not in name)  # Whisper's sines stay
    to_tokens, to_characters = nn.Linear(192, len(tokenizer)), nn.Linear(192, len(CHARACTERS))
    middle = []  # frames (B, T, D) of the layer before the last, through the last layer's first LayerNorm
    hook = recipe.last_norm(model).register_forward_hook(lambda *call: middle.append(call[-1]))

    torch.set_num_threads(threads())
    clips = []
    for record in open_records(folder / "train.jsonl"):
        features = model.extract(load_audio(folder / record["wav"]))
        ids = tokenizer(record["txt"], add_special_tokens=False).input_ids
        clips.append((features, ids, [CHARACTERS.index(c) for c in record["txt"]]))
    clips.sort(key=lambda clip: len(clip[0]))
    batches = [clips[i : i + 16] for i in range(0, len(clips), 16)]
    num_steps = round(len(batches) * encoder_epochs)
    optimizer = Optimizer([model, to_tokens, to_characters], recipe.blocks(model), num_steps)
    watch = Progress("encoder", num_steps)
    epochs = [rng.sample(range(len(batches)), len(batches)) for _ in range(math.ceil(encoder_epochs))]
    for i in sum(epochs, [])[:num_steps]:
        torch.set_num_threads(threads())
        features, ids, characters = zip(*batches[i], strict=True)
        lengths = torch.tensor([len(f) for f in features])
        frames = model(pad_sequence([recipe.mask(f, rng) for f in features], batch_first=True), lengths)
        frame_lengths = model.output_lengths(lengths)
        loss = ctc(to_tokens(frames), frame_lengths, ids, BLANK)
        optimizer.step(loss + ctc(to_characters(middle.pop()), frame_lengths, characters, 0))
        watch.step(loss)
    hook.remove()
    recipe.save(model, partial)
    put(partial, folder / recipe.output)


def ctc(logits: Tensor, lengths: Tensor, targets: list[list[int]], blank: int) -> Tensor:
    """CTC loss per target symbol; logits (B, T, V)."""
    sizes, flat = torch.tensor([len(t) for t in targets]), torch.tensor([i for t in targets for i in t])
    return F.ctc_loss(logits.log_softmax(2).transpose(0, 1), flat, lengths, sizes, blank)


def new_whisper(path: Path) -> None:
    """Write an untrained Whisper in openai's format."""
    import whisper

    dims = whisper.model.ModelDimensions(80, 1500, 192, 3, 3, n_vocab=8, n_text_ctx=8, n_text_state=192,
                                         n_text_head=3, n_text_layer=1)  # fmt: skip
    torch.save({"dims": asdict(dims), "model_state_dict": whisper.model.Whisper(dims).state_dict()}, path)


def save_whisper(encoder: nn.Module, path: Path) -> None:
    """Put the encoder's weights into the file that new_whisper wrote; the decoder's stay random."""
    checkpoint = torch.load(path, weights_only=True)
    weights, trained_weights = checkpoint["model_state_dict"], encoder.model.state_dict()
    for name in weights:
        if name.startswith("encoder."):
            weights[name] = trained_weights[transformers_name(name.removeprefix("encoder."))]
    torch.save(checkpoint, path)


def mask_features(features: Tensor, rng: random.Random) -> Tensor:
    """A louder or softer copy (F, M) without two bands of time and of frequency: SpecAugment, arXiv:1904.08779."""
    features, mean = features + rng.uniform(-0.15, 0.15), features.mean()
    for axis, widest in ((0, 8), (0, 8), (1, 10), (1, 10)):
        width = rng.randint(0, widest)
        features.narrow(axis, rng.randint(0, features.shape[axis] - width), width).fill_(mean)
    return features


def new_wav2vec2(path: Path) -> None:
    """Write an untrained wav2vec 2.0 (arXiv:2006.11477) with the strides of the real ones: 20 ms a frame."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    layers = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768}
    convs = {"conv_dim": (32, 32, 64, 64, 96, 128, 128), "conv_bias": True, "num_conv_pos_embeddings": 32}
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    dropouts = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop")
    config = Wav2Vec2Config(**layers, **convs, **norms, **dict.fromkeys(dropouts, 0.0), apply_spec_augment=False)
    Wav2Vec2Model(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(path)


def mask_samples(samples: Tensor, rng: random.Random) -> Tensor:
    """A copy (S,) in which two short spans are silent."""
    samples = samples.clone()
    for _ in range(2):
        width = rng.randint(0, SAMPLE_RATE * 8 // 100)
        samples.narrow(0, rng.randint(0, len(samples) - width), width).zero_()
    return samples


class Recipe(NamedTuple):
    output: str  # name of a file or a folder
    create: Callable[[Path], None]  # writes an untrained encoder
    blocks: Callable[[nn.Module], nn.Module]  # the part of the encoder whose matrices Muon trains
    last_norm: Callable[[nn.Module], nn.Module]  # the first LayerNorm of the encoder's last layer
    mask: Callable[[Tensor, random.Random], Tensor]  # what augments features
    save: Callable[[nn.Module, Path], None]


RECIPES = {
    "whisper": Recipe(
        output="whisper.pt",
        create=new_whisper,
        blocks=lambda encoder: encoder.model.layers,
        last_norm=lambda encoder: encoder.model.layers[-1].self_attn_layer_norm,
        mask=mask_features,
        save=save_whisper,
    ),
    "wav2vec2": Recipe(
        output="wav2vec2",
        create=new_wav2vec2,
        blocks=lambda encoder: encoder,
        last_norm=lambda encoder: encoder.model.encoder.layers[-1].layer_norm,
        mask=mask_samples,
        save=lambda encoder, path: encoder.save_pretrained(path),
    ),
}


def train_llm(folder: Path, seed: int, llm_steps: int) -> None:
    """llm/: a Qwen2 of 2 layers and 128 channels that repeats a text which stands in its prompt as if misheard.

    The text is clean at first: repeating is learnt in a fraction of the time so."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer), initializer_range=0.05, **shape, **heads, **ends)
    llm = Qwen2ForCausalLM(config)
    table = llm.get_input_embeddings().weight  # (V, H)
    (before, after), end_id = render_prompt(tokenizer, PROMPT)
    optimizer, watch = Optimizer([llm], llm.model.layers, llm_steps), Progress("llm", llm_steps)
    earlier = {record["txt"] for name in TESTS for record in open_records(folder / f"test_{name}.jsonl")}
    words = sorted({i for text in new_sentences(rng, 1000, set(earlier)) for i in tokenizer(text).input_ids})
    for step in range(llm_steps):
        noise = min(1.0, max(0.0, 2 * step / llm_steps - 0.2))
        targets = [tokenizer(text).input_ids for text in new_sentences(rng, 32, earlier)]
        slots = [mishear(target, words, noise, rng) for target in targets]
        speech = [blur(table[ids], table.detach().std(), noise) for ids in slots]  # of (N, H) each
        # A wrong word now and then in what it has said so far: it must look at the speech again, and not run on.
        answers = [[rng.choice(words) if rng.random() < 0.1 * noise else i for i in target] for target in targets]
        rows = [
            torch.cat([table[before], embeds, table[[*after, *answer, end_id]]])  # (L, H)
            for embeds, answer in zip(speech, answers, strict=True)
        ]
        labels = pad_left([[*target, end_id] for target in targets], IGNORE)  # (B, K)
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")  # (B, L, H)
        mask = pad_left([[1] * len(row) for row in rows], 0)  # (B, L)
        logits = llm(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=labels.shape[1] + 1).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        optimizer.step(loss)
        watch.step(loss)
    partial = folder / "llm.partial"
    llm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    put(partial, folder / "llm")


def mishear(tokens: list[int], words: list[int], noise: float, rng: random.Random) -> list[int]:
    """What a poor encoder might deliver at 12.5 Hz for some tokens.

    Each stands one to three times, with a few blanks between; some are lost, wrong, or too many.
    """
    slots, blanks, errors = [BLANK] * rng.randint(0, 2), 0.7 * rng.random(), 0.1 * noise * rng.random()
    for token in tokens:
        luck = rng.random()
        copies = [token]
        if luck < errors:
            copies = [] if luck < 0.2 * errors else [rng.choice(words)]
        copies += [rng.choice(words)] if rng.random() < 0.2 * errors else []
        slots += copies * rng.choice((1, 1, 1, 1, 2, 2, 3))
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
