"""DuplexModel: listens and speaks at the same time, a frame of 80 ms after the other.

    model = DuplexModel.from_pretrained("run")
    results = model.offline_inference(samples, lengths)  # of whole conversations
    stream = model.stream()
    stream.push(samples)  # of any size; -> what the agent says meanwhile

Two kinds, after NeMo's DuplexS2SModel and DuplexS2SSpeechDecoderModel: `direct`, whose LLM predicts a text token and K
audio codes for each frame, and `decoder`, in which a small causal transformer makes the codes of the LLM's states.

Shapes: B conversations, T frames of 80 ms, W windows of the encoder, K codebooks of V codes, H LLM width, d decoder
width, F feature frames, M mel bins, S samples at 16 kHz.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from dataset import IGNORE
from duplex.codecs import load_codec
from duplex.data import HOP, ConversationDataset, TextTokens, windows
from errors import InputError
from manifest import SAMPLE_RATE, option
from model import ModelArguments, SpeechLLM, SpeechLLMConfig


@dataclass
class DuplexArguments(ModelArguments):
    """Flags of duplex.train beside those of the root, and fields of config.json."""

    kind: Literal["direct", "decoder"] = option("direct", "the LLM makes the codes, or a speech decoder does")
    codec: str | None = option(None, "Hub name or folder of Mimi, EnCodec or DAC; or codec.safetensors of the demo")
    codec_revision: str | None = option(None, "branch, tag or commit on the Hub")
    text_bos: str = option("<|im_start|>", "token that begins the agent's turn in the text channel")
    text_eos: str = option("<|im_end|>", "token that ends it")
    text_pad: str = option("<|endoftext|>", "token of a frame in which the agent says nothing")
    chunk: int = option(4, "frames of 80 ms that the encoder takes at a time: so many less one is the delay")
    context: int = option(16, "frames before these that it hears again with them")
    text_loss_weight: float = option(3.0, "of the text channel")
    audio_loss_weight: float = option(4.0, "of the audio codes")
    duplex_user_channel_weight: float = option(1.0, "of the user's frames in the sum that the LLM reads")
    speech_decoder_size: int = option(768, "width of the speech decoder")
    speech_decoder_layers: int = option(12, "its layers; heads are 64 wide")
    speech_decoder_dropout: float = option(0.1, "dropout in it, in training only")
    cfg_unconditional_prob: float = option(0.1, "share of the batches in which it does not see the LLM's states")
    cfg_scale: float = option(2.5, "classifier-free guidance in inference: 1 = none")


class DuplexConfig(SpeechLLMConfig, DuplexArguments):
    model_type = "duplex"
    PARTS = (*SpeechLLMConfig.PARTS, ("codec", "codec_revision"))


@dataclass
class State:
    """What inference keeps from frame to frame."""

    text: Tensor  # (B,) the last token
    codes: Tensor  # (B, K) the last codes
    llm: DynamicCache = field(default_factory=DynamicCache)
    decoder: list[dict] | None = None  # of each layer of the speech decoder


class DuplexModel(SpeechLLM):
    """A SpeechLLM that reads e(t) = E(text of t) + sum over K of E(codes of t - 1) + w * speech(t), without a prompt.

    From that it predicts the text of t + 1 and the codes of t, so that text is a frame ahead of the voice. Codes have
    three more values: V begins a turn, V + 1 ends one, V + 2 stands before the first frame.
    """

    config_class = DuplexConfig

    def __init__(self, config: DuplexConfig, encoder: nn.Module, projector: nn.Module, llm: nn.Module, tokenizer):
        super().__init__(config, encoder, projector, llm, tokenizer)
        if not config.codec:
            raise InputError("wanted a codec: --codec")
        self.codec = load_codec(config.codec, config.codec_revision)  # no module: a checkpoint only names it
        named = [tokenizer.convert_tokens_to_ids(getattr(config, f"text_{name}")) for name in ("pad", "bos", "eos")]
        if None in named or len(set(named)) < 3:
            raise InputError("wanted three tokens of the LLM, all different: --text_pad, --text_bos and --text_eos")
        self.tokens, self.size = TextTokens(*named), self.codec.codebook_size  # V
        num_codes, width = self.codec.num_codebooks * (self.size + 3), llm.config.get_text_config().hidden_size
        self.register_buffer("offsets", torch.arange(self.codec.num_codebooks) * (self.size + 3), persistent=False)
        features = encoder.extract(np.zeros((config.context + config.chunk) * HOP, np.float32))
        if self.embedding_counts[len(features)] not in (
            config.context + config.chunk,
            config.context + config.chunk - 1,
        ):
            found = (
                f"{self.embedding_counts[len(features)]} embeddings in {config.context + config.chunk} frames of 80 ms"
            )
            raise InputError(f"--projector_stride {config.projector_stride}: {found}; wanted one each")
        if config.kind == "direct":
            self.code_embeds = nn.Embedding(num_codes, width)
            self.audio_head = nn.Linear(width, num_codes)
            nn.init.normal_(self.code_embeds.weight, std=llm.get_input_embeddings().weight.std().item() / 2)
        else:
            self.speech_decoder = SpeechDecoder(config, width, num_codes)
        self.apply_freezing()
        self.eval()

    def make_conversations(self, records) -> ConversationDataset:
        """The dataset of records of duplex/data.py for this model."""

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        sizes = self.codec.sample_rate, self.config.chunk, self.config.context
        return ConversationDataset(records, self.encoder.extract, encode, self.tokens, *sizes)

    # What the LLM reads

    def embed_windows(self, features: Tensor) -> Tensor:
        """Features of windows (W, F, M) -> the embeddings of their chunks (W, chunk, H), the last ones of each."""
        lengths = torch.full((len(features),), features.shape[1], device=features.device)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        ):
            frames = self.encoder(features, lengths)
        return self.projector(frames, self.encoder.output_lengths(lengths))[:, -self.config.chunk :]

    def embed_user(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """(B, T, H) of all windows in a batch. A frame is heard when its chunk is over: chunk - 1 frames late."""
        embeds, chunk = self.embed_windows(features), self.config.chunk
        counts = (-(-num_frames // chunk)).tolist()  # windows of each conversation
        rows = [part.flatten(0, 1) for part in embeds.split(counts)]  # (frames, H) each
        rows = [F.pad(row, (0, 0, chunk - 1, 0))[:n] for row, n in zip(rows, num_frames.tolist(), strict=True)]
        return pad_sequence(rows, batch_first=True)

    def embed_frames(self, user: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """What the LLM reads (B, T, H), of the user's embeddings, text (B, T) and the codes of the frames before."""
        embeds = self.get_input_embeddings()(text) + self.config.duplex_user_channel_weight * user
        if self.config.kind == "direct":
            embeds = embeds + self.code_embeds(codes + self.offsets).sum(2)  # (B, T, K, H) -> (B, T, H)
        return embeds.to(self.llm.dtype)

    def codes_of(self, samples: Tensor, text: Tensor) -> Tensor:
        """Codes (B, T, K) of the agent's samples (B, A), with those that mark the beginning and the end of a turn."""
        codes = self.codec.encode(samples)[:, : text.shape[1]].clone()
        codes[text[:, : codes.shape[1]] == self.tokens.bos] = self.size
        codes[text[:, : codes.shape[1]] == self.tokens.eos] = self.size + 1
        return codes

    # Training

    def forward(
        self, features, text_ids, num_frames, agent_samples, num_items_in_batch=None, **kwargs
    ) -> CausalLMOutput:
        """The loss of a batch of `collate`; a mean over frames, of all conversations in the batch alike.

        `logits` are a dict of the losses of text and audio. Frames behind a conversation's end do not count.
        """
        codes = self.codes_of(agent_samples, text_ids)  # (B, T, K)
        num_frames = num_frames.clamp(max=codes.shape[1])
        text_ids = text_ids[:, : codes.shape[1]]
        before = F.pad(codes, (0, 0, 1, 0), value=self.size + 2)  # (B, T + 1, K): the codes of the frame before
        user = self.embed_user(features, num_frames)[:, :-1]  # the last frame predicts nothing
        inputs = self.embed_frames(user, text_ids[:, :-1], before[:, :-2])
        states = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state  # (B, T - 1, H)
        counts = torch.arange(1, text_ids.shape[1], device=text_ids.device) < num_frames.unsqueeze(1)  # (B, T - 1)
        text_labels = text_ids[:, 1:].masked_fill(~counts, IGNORE)
        code_labels = before[:, 1:-1].masked_fill(~counts.unsqueeze(2), IGNORE)  # (B, T - 1, K)
        text_logits = self.llm.get_output_embeddings()(states).float()
        if self.config.kind == "direct":
            code_logits = self.audio_head(states.float())
        else:
            is_blind = self.training and torch.rand(()) < self.config.cfg_unconditional_prob
            code_logits = self.speech_decoder(states.float(), before[:, :-2] + self.offsets, is_blind)
        code_logits = code_logits.unflatten(2, (-1, self.size + 3))  # (B, T - 1, K, V + 3)
        total = counts.sum().clamp(min=1)
        text_loss = F.cross_entropy(
            text_logits.flatten(0, 1), text_labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        audio_loss = F.cross_entropy(
            code_logits.flatten(0, 2), code_labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        text_loss, audio_loss = text_loss / total, audio_loss / (total * self.codec.num_codebooks)
        loss = self.config.text_loss_weight * text_loss + self.config.audio_loss_weight * audio_loss
        return CausalLMOutput(loss=loss, logits={"text_loss": text_loss.detach(), "audio_loss": audio_loss.detach()})

    # Inference

    def start(self, batch_size: int) -> State:
        text = torch.full((batch_size,), self.tokens.pad, device=self.device)
        codes = torch.full((batch_size, self.codec.num_codebooks), self.size + 2, device=self.device)
        decoder = [{} for _ in range(self.config.speech_decoder_layers)] if self.config.kind == "decoder" else None
        return State(text, codes, DynamicCache(), decoder)

    def step(self, user: Tensor, state: State) -> None:
        """A frame of the user (B, H) changes the state, whose text and codes are then those of the agent."""
        inputs = self.embed_frames(user[:, None], state.text[:, None], state.codes[:, None])  # (B, 1, H)
        states = self.llm.base_model(inputs_embeds=inputs, past_key_values=state.llm, use_cache=True).last_hidden_state
        if self.config.kind == "direct":
            logits = self.audio_head(states.float())
        else:
            logits = self.speech_decoder.guided(states.float(), state.codes[:, None] + self.offsets, state.decoder)
        state.text = self.llm.get_output_embeddings()(states)[:, 0].argmax(1)
        state.codes = logits[:, 0].unflatten(1, (-1, self.size + 3)).argmax(2)  # (B, K)

    @torch.no_grad()
    def offline_inference(self, samples: Tensor, lengths: Tensor, decode_audio: bool = True) -> dict:
        """What the agent says to whole recordings (B, S), 16 kHz, of so many samples (B,).

        `text` (B texts), `tokens_text` (B, T), `tokens_audio` (B, T, K), `tokens_len` (B,), and with decode_audio
        `audio` (B, A) at the codec's rate and `audio_len` (B,). What a conversation gives depends on no other.
        """
        with self.in_eval_mode():
            parts, num_frames = [], -(-lengths // HOP)
            for row, length in zip(samples, lengths.tolist(), strict=True):
                parts += map(
                    self.encoder.extract, windows(row[:length].cpu().numpy(), self.config.chunk, self.config.context)
                )
            user = self.embed_user(torch.stack(parts).to(self.device), num_frames)  # (B, T, H)
            state, text, codes = self.start(len(samples)), [], []
            for frame in user.unbind(1):
                self.step(frame, state)
                text.append(state.text)
                codes.append(state.codes)
        text, codes = torch.stack(text, 1), torch.stack(codes, 1)
        results = {"text": [self.text_of(row[:n]) for row, n in zip(text, num_frames.tolist(), strict=True)]}
        results |= {"tokens_text": text, "tokens_audio": codes, "tokens_len": num_frames}
        if decode_audio:
            audio = [self.audio_of(row[None, :n])[0] for row, n in zip(codes, num_frames.tolist(), strict=True)]
            results |= {"audio": pad_sequence(audio, batch_first=True), "audio_len": torch.tensor([*map(len, audio)])}
        return results

    def text_of(self, ids: Tensor) -> str:
        """The text in a stretch (T,) of the text channel; turns are parted by a space."""
        turns, words = [], []
        for token in ids.tolist():
            if token in (self.tokens.bos, self.tokens.eos):
                turns.append(self.tokenizer.decode(words, skip_special_tokens=True))
                words = []
            elif token != self.tokens.pad:
                words.append(token)
        return " ".join(" ".join([*turns, self.tokenizer.decode(words, skip_special_tokens=True)]).split())

    def audio_of(self, codes: Tensor) -> Tensor:
        """Samples (B, A) of codes (B, T, K), in which frames that begin or end a turn are silent."""
        rate, hop = self.codec.sample_rate, round(self.codec.sample_rate * HOP / SAMPLE_RATE)
        silence = self.codec.encode(torch.zeros(1, rate))[0, 6].to(codes.device)  # (K,)
        return self.codec.decode(torch.where(codes < self.size, codes, silence))[:, : codes.shape[1] * hop]

    def stream(self) -> "Stream":
        return Stream(self)


class Stream:
    """A conversation under way: `push` takes samples of the user and gives what the agent says in each frame."""

    def __init__(self, model: DuplexModel):
        self.model, self.state, config = model, model.start(1), model.config
        self.chunk, self.context = config.chunk, config.context
        self.heard = np.zeros(self.context * HOP, np.float32)  # the context, and what is not a whole chunk yet
        self.waiting: list[Tensor] = [torch.zeros(1, model.config.hidden_size, device=model.device)] * (self.chunk - 1)

    @torch.no_grad()
    def push(self, samples: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Yield (text token, codes (K,)) of each frame that these samples (S,) at 16 kHz complete."""
        self.heard = np.concatenate([self.heard, samples])
        with self.model.in_eval_mode():
            while len(self.heard) >= (self.context + self.chunk) * HOP:
                window = self.heard[: (self.context + self.chunk) * HOP]
                self.heard = self.heard[self.chunk * HOP :]
                features = self.model.encoder.extract(window)[None].to(self.model.device)
                self.waiting += self.model.embed_windows(features)[0].unsqueeze(1).unbind(0)
                for user in self.waiting:  # as the first frames, those that no chunk has reached yet
                    self.model.step(user, self.state)
                    yield int(self.state.text), self.state.codes[0]
                self.waiting = []


class SpeechDecoder(nn.Module):
    """Codes of the LLM's states (B, T, H): a pre-norm causal transformer over P(state) + mean of codes.

    It has no biases. Feed-forward parts are two causal convolutions over 3 frames with a GELU; positions are learned.
    """

    max_frames = 4096  # 5 minutes and a half

    def __init__(self, config: DuplexConfig, llm_size: int, num_codes: int):
        super().__init__()
        size = config.speech_decoder_size
        self.scale = config.cfg_scale
        self.project = nn.Linear(llm_size, size)
        self.code_embeds, self.positions = nn.Embedding(num_codes, size), nn.Embedding(self.max_frames, size)
        layers = [DecoderLayer(size, config.speech_decoder_dropout) for _ in range(config.speech_decoder_layers)]
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(size, bias=False)
        self.head = nn.Linear(size, num_codes)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                is_output = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * len(layers)) ** 0.5 if is_output else 0.02)

    def forward(self, states: Tensor, codes: Tensor, is_blind: bool | Tensor = False, caches=None) -> Tensor:
        """Logits (B, T, K * (V + 3)); `codes` (B, T, K) are those of the frames before. Blind rows see no state."""
        seen = self.project(states) * ~torch.as_tensor(is_blind, device=states.device)
        start = caches[0]["keys"].shape[2] if caches and caches[0] else 0  # frames before these
        places = torch.arange(start, start + states.shape[1], device=states.device)
        x = seen + self.code_embeds(codes).mean(2) + self.positions(places)  # (B, T, d)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, cache)
        return self.head(self.norm(x))

    def guided(self, states: Tensor, codes: Tensor, caches: list[dict]) -> Tensor:
        """Logits of one more frame, away from what it would say without the states (arXiv:2207.12598)."""
        is_blind = torch.tensor([False, True], device=states.device).repeat_interleave(len(states))[:, None, None]
        seeing, blind = self(states.repeat(2, 1, 1), codes.repeat(2, 1, 1), is_blind, caches).chunk(2)
        return blind + self.scale * (seeing - blind)


class DecoderLayer(nn.Module):
    def __init__(self, size: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, bias=False), nn.LayerNorm(size, bias=False)
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.up, self.down = nn.Conv1d(size, 4 * size, 3, bias=False), nn.Conv1d(4 * size, size, 3, bias=False)
        self.dropout, self.num_heads = nn.Dropout(dropout), max(size // 64, 1)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        """(B, T, d) -> (B, T, d); with a cache, which keeps what came before, T is 1."""
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        if cache is not None:
            k, v = (torch.cat([cache[name], y], 2) if cache else y for name, y in (("keys", k), ("values", v)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)  # (B, heads, T, d / heads)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y, tail = self.convolve(self.up, self.norm2(x), cache and cache["up"])
        y, tail2 = self.convolve(self.down, F.gelu(y, approximate="tanh"), cache and cache["down"])
        if cache is not None:
            cache |= {"keys": k, "values": v, "up": tail, "down": tail2}
        return x + self.dropout(y)

    @staticmethod
    def convolve(conv: nn.Conv1d, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """A convolution (B, T, d) over each frame and the two before it, and the last two frames of its input."""
        x = F.pad(x, (0, 0, 2, 0)) if not isinstance(before, Tensor) else torch.cat([before, x], 1)
        return conv(x.mT).mT, x[:, -2:]
