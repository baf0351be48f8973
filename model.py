"""SpeechLLM: a frozen speech encoder, a trained projector, a frozen LLM.

    model = SpeechLLM.from_pretrained("run")
    model.transcribe("a.wav")  # -> "the transcript"

Shapes: B batch, A audio windows in the batch, S samples (16 kHz), M mel bins, F feature frames (10 ms), T encoder
frames (20 ms), N speech embeddings, L tokens, K last tokens with labels, D encoder width, H LLM width, V vocabulary.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dataset import AUDIO, IGNORE, PROMPT, SPEECH, SpeechDataset, collate, render_prompt
from manifest import InputError


@dataclass
class SpeechLLMConfig:
    """What a checkpoint says of itself in config.json, and the model's flags on the command line."""

    llm_model_name_or_path: str = field(metadata={"help": "instruction-tuned LLM: a folder or a Hub name"})
    whisper_model_name_or_path: str = field(metadata={"help": "tiny ... large-v3-turbo, or the path of a .pt file"})
    prompt: str = field(default=PROMPT, metadata={"help": "the user's turn"})
    projector_stride: int = field(default=5, metadata={"help": "encoder frames (20 ms) joined into one embedding"})
    projector_hidden_size: int = field(default=2048, metadata={"help": "width between the projector's linear layers"})
    pad_to_30s: bool = field(default=False, metadata={"help": "pad every clip to 30 s, as Whisper was trained"})
    encoder_size: int = field(default=0, init=False)  # D, filled in when the model is built
    hidden_size: int = field(default=0, init=False)  # H

    def save(self, folder: str) -> None:
        Path(folder, "config.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str, **overrides) -> "SpeechLLMConfig":
        path, names = Path(folder, "config.json"), {f.name for f in fields(cls) if f.init}
        try:
            found = {key: value for key, value in json.loads(path.read_text()).items() if key in names}
            return cls(**{**found, **overrides})
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}; wanted a folder that train.py or save_pretrained wrote") from None


class WhisperEncoder(nn.Module):
    """openai-whisper's encoder for clips of any length up to 30 s, batched without a trace of the padding.

    Its own forward wants exactly 30 s and cannot mask, so its modules are called here one by one. Padding is zeroed
    between the convolutions, since conv1's bias would leak into the last valid frame through conv2, and masked as
    keys in attention.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        import whisper

        try:
            self.whisper = whisper.load_model(name_or_path, device="cpu").encoder
        except (OSError, RuntimeError, KeyError, UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name_or_path}: cannot load the Whisper model ({reason})") from None
        for module in self.whisper.modules():
            if isinstance(module, nn.LayerNorm):  # Whisper's own casts its input to fp32, which bf16 weights refuse
                module.__class__ = nn.LayerNorm
        self.num_mels, self.output_size = self.whisper.conv1.in_channels, self.whisper.conv2.out_channels

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Features (A, M, F) with valid lengths (A,) -> frames (A, T, D), T = F / 2 rounded up."""
        whisper = self.whisper
        x = F.gelu(whisper.conv1(features)) * valid(lengths, features.shape[2]).unsqueeze(1)
        x = F.gelu(whisper.conv2(x)).transpose(1, 2)  # (A, T, D)
        x = (x + whisper.positional_embedding[: x.shape[1]]).to(x.dtype)
        mask = valid((lengths + 1) // 2, x.shape[1])[:, None, None, :]  # (A, 1, 1, T)
        for block in whisper.blocks:
            y, heads = block.attn_ln(x), block.attn.n_head
            q, k, v = (
                layer(y).unflatten(2, (heads, -1)).transpose(1, 2)
                for layer in (block.attn.query, block.attn.key, block.attn.value)
            )
            attended = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + block.attn.out(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_ln(x))
        return whisper.ln_post(x)


class Conv1dProjector(nn.Module):
    """One LLM embedding for every `stride` encoder frames: (A, T, D) -> (A, N, H), N = T // stride.

    A tail shorter than the stride is dropped. 50 Hz frames and stride 5 give 10 Hz.
    """

    def __init__(self, encoder_size: int, llm_size: int, stride: int = 5, hidden_size: int = 2048):
        super().__init__()
        self.conv = nn.Conv1d(encoder_size, encoder_size, kernel_size=stride, stride=stride)
        self.linear1 = nn.Linear(encoder_size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, llm_size)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.conv(frames.to(self.conv.weight.dtype).transpose(1, 2)).transpose(1, 2)  # (A, N, D)
        return self.linear2(F.relu(self.linear1(F.relu(x))))


def valid(lengths: Tensor, size: int) -> Tensor:
    """(A, size), True where a position lies inside its row's length."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def speech_lengths(feature_lengths, stride: int):
    """Speech embeddings made of so many feature frames (int or Tensor): two frames a step in Whisper, then `stride`."""
    return (feature_lengths + 1) // 2 // stride


class SpeechLLM(nn.Module):
    """A speech recogniser of which only the projector is trained. Encoder and LLM keep the LLM's dtype and eval mode.

    Raises InputError for an encoder, an LLM or weights that do not exist or do not fit each other.
    """

    accepts_loss_kwargs = True  # tells Trainer that forward divides by num_items_in_batch

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        path = config.llm_model_name_or_path
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.llm = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path}: cannot load the LLM ({str(error).splitlines()[0]})") from None
        # logits_to_keep is a slice, which PyTorch would multiply row by row, reading the vocabulary matrix each time:
        # half the time of a training step with a small LLM.
        self.llm.get_output_embeddings().register_forward_pre_hook(lambda _, x: tuple(t.contiguous() for t in x))
        self.encoder = WhisperEncoder(config.whisper_model_name_or_path).to(self.llm.dtype)
        self.llm.requires_grad_(False)
        self.encoder.requires_grad_(False)
        llm_config = self.llm.config.get_text_config()
        config.encoder_size, config.hidden_size = self.encoder.output_size, llm_config.hidden_size
        self.projector = Conv1dProjector(
            config.encoder_size, config.hidden_size, config.projector_stride, config.projector_hidden_size
        )
        self.config, self.label_smoothing = config, 0.0
        self.max_length = llm_config.max_position_embeddings
        # The LLM's own defaults (Qwen2: sampling, a repetition penalty) are for chat; only its stop tokens are kept.
        stop_ids = self.llm.generation_config.eos_token_id
        stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
        pieces, end_id = render_prompt(self.tokenizer, json.dumps([{"role": "user", "content": config.prompt}]))
        if len(pieces) != 2:
            raise InputError(f"prompt {config.prompt!r}: wanted {AUDIO} in it, once")
        self.stop_ids = sorted({end_id, self.tokenizer.eos_token_id, *stop_ids} - {None})
        self.llm.generation_config = GenerationConfig(eos_token_id=self.stop_ids, pad_token_id=end_id)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str, **overrides) -> "SpeechLLM":
        """The model of a checkpoint folder; `overrides` replace fields of its config (a moved LLM's path, say)."""
        model = cls(SpeechLLMConfig.load(folder, **overrides))
        model.load_trained(Path(folder, "model.safetensors"))
        return model

    def save_pretrained(self, folder: str, state: dict[str, Tensor] | None = None) -> None:
        """Write the trained weights (`state` if they live elsewhere) and config.json; frozen weights are not saved."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        state = {name: p.detach() for name, p in self.trained()} if state is None else state
        save_file({name: p.contiguous().cpu() for name, p in state.items()}, Path(folder, "model.safetensors"))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def load_trained(self, path: str | Path) -> None:
        """Load the trained weights; InputError names every missing, extra or wrongly shaped tensor."""
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot read the trained weights ({error})") from None
        wanted, found = ({name: tuple(t.shape) for name, t in w} for w in (self.trained(), state.items()))
        if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
            widths = f"encoder width {self.config.encoder_size}, LLM width {self.config.hidden_size}"
            wrong = [f"{n} is {found.get(n, 'missing')}, wanted {wanted.get(n, 'no such tensor')}" for n in wrong]
            stride, hidden = self.config.projector_stride, self.config.projector_hidden_size
            raise InputError(
                f"{path}: does not fit {widths}, stride {stride}, hidden size {hidden}: {'; '.join(wrong)}"
            )
        self.load_state_dict(state, strict=False)

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Only the projector changes mode; the LLM's layers are told, for they checkpoint only while training."""
        super().train(False)
        self.training = mode
        self.projector.train(mode)
        for layer in self.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = mode
        return self

    @property
    def device(self) -> torch.device:
        return self.llm.device

    def make_dataset(self, records, **options) -> SpeechDataset:
        """SpeechDataset of records (a Manifest or a list of dicts) for this model."""
        lengths = partial(speech_lengths, stride=self.config.projector_stride)
        prompt, pad = self.config.prompt, self.config.pad_to_30s
        return SpeechDataset(records, self.tokenizer, lengths, self.encoder.num_mels, prompt, pad, **options)

    def embed(self, input_ids: Tensor, input_features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Token embeddings (B, L, H) with the speech embeddings in the SPEECH positions, in order."""
        with torch.no_grad():
            frames = self.encoder(input_features.to(self.llm.dtype), feature_lengths)
            embeds = self.llm.get_input_embeddings()(input_ids.clamp(min=0))
        speech = self.projector(frames)  # (A, N, H)
        speech = speech[valid(speech_lengths(feature_lengths, self.config.projector_stride), speech.shape[1])]
        places = input_ids == SPEECH
        if places.sum() != len(speech):
            raise ValueError(f"{places.sum()} speech positions in the prompts, {len(speech)} speech embeddings")
        return embeds.masked_scatter(places.unsqueeze(2), speech.to(embeds.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        input_features: Tensor,
        feature_lengths: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss and logits (B, K, V) of the last K positions, for a batch of `collate`.

        The loss is summed over the trained tokens and divided by num_items_in_batch (all trained tokens of the
        optimiser's step, on all devices), by this batch's own when that is None.
        """
        num_labels = labels.shape[1]
        logits = self.llm(
            inputs_embeds=self.embed(input_ids, input_features, feature_lengths),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=num_labels + 1,  # each position predicts the next
        ).logits[:, :-1].float()  # fmt: skip
        total = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        count = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / max(count, 1), "logits": logits}

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, input_features, feature_lengths, **options) -> Tensor:
        """Ids (B, new) of the answers; `options` are those of transformers' generate (num_beams ...)."""
        embeds = self.embed(input_ids, input_features, feature_lengths)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    def decode(
        self,
        dataset: SpeechDataset,
        positions: Iterable[int] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        num_beams: int = 4,
        max_new_tokens: int = 200,
        **options,
    ) -> Iterator[list[tuple[int, str, str | None]]]:
        """Yield a list of (index of the record, hypothesis, problem or None) for each batch, longest clips first.

        Only the examples at `positions` of the dataset (default: all). What cannot be read has an empty hypothesis.
        """
        training = self.training
        self.eval()
        positions = range(len(dataset)) if positions is None else positions
        order = sorted(positions, key=lambda i: -dataset.durations[dataset.indices[i]])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        to_batch = partial(collate, with_targets=False)
        try:
            for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=to_batch, num_workers=num_workers):
                index, problems, _ = (batch.pop(key) for key in ("index", "bad", "labels"))
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                ids = self.generate(**batch, num_beams=num_beams, max_new_tokens=max_new_tokens, **options).cpu()
                stopped = torch.isin(ids, torch.tensor(self.stop_ids)).any(1).tolist()
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                texts = ["" if bad else " ".join(text.split()) for text, bad in zip(texts, problems, strict=True)]
                cut = f"no end within {max_new_tokens} new tokens"
                problems = [bad or (None if end else cut) for bad, end in zip(problems, stopped, strict=True)]
                yield list(zip(index, texts, problems, strict=True))
        finally:  # also if the caller stops early
            self.train(training)

    def transcribe(self, audio, **options) -> str | list[str]:
        """The transcript of an audio file (or of samples (S,) at 16 kHz); of a list, the list of transcripts.

        `options` are those of `decode`. Audio that cannot be read has an empty transcript and a warning that says why.
        """
        many = isinstance(audio, (list, tuple))
        records = [{"where": f"audio {number}", "wav": a} for number, a in enumerate(audio if many else [audio], 1)]
        room = self.max_length - options.get("max_new_tokens", 200)
        rows = sorted(chain(*self.decode(self.make_dataset(records, max_length=room, on_bad="keep"), **options)))
        for index, _, problem in rows:
            if problem:
                warnings.warn(f"audio {index + 1}: {problem.removeprefix(f'audio {index + 1}: ')}", stacklevel=2)
        texts = [text for _, text, _ in rows]
        return texts if many else texts[0]
