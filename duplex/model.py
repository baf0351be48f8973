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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutput

from dataset import IGNORE
from duplex.codecs import load_codec
from duplex.data import HOP, ConversationDataset, TextTokens, resample, text_ids, window_features
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
    chunk: int = option(4, "frames of 80 ms that the encoder takes at a time; delay = chunk - 1 + lookahead frames")
    context: int = option(16, "frames before these that it hears again with them")
    lookahead: int = option(0, "frames behind these that it waits for")
    text_loss_weight: float = option(3.0, "of the text channel")
    audio_loss_weight: float = option(4.0, "of the audio codes")
    duplex_user_channel_weight: float = option(1.0, "of the user's frames in the sum that the LLM reads")
    speech_decoder_size: int = option(768, "width of the speech decoder")
    speech_decoder_layers: int = option(12, "its layers; heads are 64 wide")
    detach_input: bool = option(False, "keep the speech decoder's loss from the LLM, which then learns text alone")
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
    llm: DynamicCache
    decoder: list | None = None  # of each layer of the speech decoder


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
        self.window = {"chunk": config.chunk, "context": config.context, "lookahead": config.lookahead}
        self.delay = config.chunk - 1 + config.lookahead  # frames from a sound to the frame in which the LLM hears it
        num_frames, features = sum(self.window.values()), self.hear(np.zeros(HOP, np.float32))[0]
        num_embeds = self.embedding_counts[len(features)]
        if num_frames - num_embeds not in (0, 1):  # wav2vec 2.0 drops a part of the last one
            found = f"{num_embeds} embeddings in {num_frames} frames of 80 ms"
            raise InputError(f"--projector_stride {config.projector_stride}: {found}; wanted one each")
        num_codes, width = self.codec.num_codebooks * (self.size + 3), self.config.hidden_size
        self.register_buffer("offsets", torch.arange(self.codec.num_codebooks) * (self.size + 3), persistent=False)
        if config.kind == "direct":
            self.code_embeds, self.audio_head = nn.Embedding(num_codes, width), nn.Linear(width, num_codes)
            text_embeds = llm.get_input_embeddings().weight
            if is_deepspeed_zero3_enabled():
                import zero3  # an option

                # Trained weights are gathered from the optimiser, which is not there yet. apply_freezing comes below.
                text_embeds = zero3.gather({"": text_embeds.requires_grad_(False)})[""]
            nn.init.normal_(self.code_embeds.weight, std=text_embeds.std().item() / 2)
        else:
            self.speech_decoder = SpeechDecoder(config, width, num_codes)
        self.apply_freezing()
        self.eval()

    def make_conversations(self, records) -> ConversationDataset:
        """The dataset of records of duplex/data.py for this model."""
        speak, encode = partial(resample, self.codec.sample_rate), partial(text_ids, self.tokenizer)
        return ConversationDataset(records, self.hear, speak, encode, self.tokens)

    # What the LLM reads

    @property
    def hear(self) -> Callable[[np.ndarray], Tensor]:
        """What gives samples (S,) -> features (W, F, M) of their windows; it can be sent to a loader's process."""
        return partial(window_features, self.encoder.extract, **self.window)

    def encode_windows(self, features: Tensor) -> Tensor:
        """Features of windows (W, F, M) -> the encoder's frames of chunk and lookahead (W, frames, D)."""
        lengths = torch.full((len(features),), features.shape[1], device=features.device)
        is_trained = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            frames = self.encoder(features, lengths)
        return frames[:, -self.config.projector_stride * (self.config.chunk + self.config.lookahead) :]

    def embed_windows(self, heard: Tensor) -> Tensor:
        """Features of windows (W, F, M), or what encode_windows gave of them -> embeddings of chunks (W, chunk, H)."""
        frames = self.encode_windows(heard)[:, : self.config.projector_stride * self.config.chunk]
        return self.projector(frames, torch.full((len(frames),), frames.shape[1], device=frames.device))

    def embed_user(self, heard: Tensor, num_frames: Tensor) -> Tensor:
        """(B, T, H) of all windows in a batch. A frame is heard when its window is over, `delay` frames late."""
        counts = (-(-num_frames // self.config.chunk)).tolist()  # windows of each conversation
        rows = [part.flatten(0, 1) for part in self.embed_windows(heard).split(counts)]  # (frames, H) each
        rows = [F.pad(row, (0, 0, self.delay, 0))[:n] for row, n in zip(rows, num_frames.tolist(), strict=True)]
        return pad_sequence(rows, batch_first=True)

    def embed_frames(self, user: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """What the LLM reads (B, T, H), of the user's embeddings, text (B, T) and the codes of the frames before."""
        embeds = self.get_input_embeddings()(text) + self.config.duplex_user_channel_weight * user
        if self.config.kind == "direct":
            embeds = embeds + self.code_embeds(codes + self.offsets).sum(2)  # (B, T, K, H) -> (B, T, H)
        return embeds.to(self.llm.dtype)

    def codes_of(self, voice: Tensor, text: Tensor) -> Tensor:
        """Codes (B, T, K) of the agent's samples (B, A), or codes, and those that begin and end a turn."""
        codes = (voice.long() if voice.ndim == 3 else self.codec.encode(voice))[:, : text.shape[1]].clone()
        codes[text[:, : codes.shape[1]] == self.tokens.bos] = self.size
        codes[text[:, : codes.shape[1]] == self.tokens.eos] = self.size + 1
        return codes

    # Training

    def forward(self, heard, text_ids, labels, num_frames, voice, num_items_in_batch=None, **kwargs) -> CausalLMOutput:
        """The loss of a batch of `collate`; a mean over frames, of all conversations alike.

        The frames are those of the optimiser's step on all devices, num_items_in_batch, or, if None, of this batch.
        `logits` are a dict of the losses of text and audio. Frames behind a conversation's end do not count.
        """
        codes = self.codes_of(voice, text_ids)  # (B, T, K)
        num_frames, text_ids = num_frames.clamp(max=codes.shape[1]), text_ids[:, : codes.shape[1]]
        before = F.pad(codes, (0, 0, 1, 0), value=self.size + 2)  # (B, T + 1, K): the codes of the frame before
        user = self.embed_user(heard, num_frames)[:, :-1]  # the last frame predicts nothing
        inputs = self.embed_frames(user, text_ids[:, :-1], before[:, :-2])
        states = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state  # (B, T - 1, H)
        if self.config.kind == "direct":
            code_logits = self.audio_head(states.float())
        else:
            is_blind = self.training and torch.rand(()) < self.config.cfg_unconditional_prob
            seen = states.detach() if self.config.detach_input else states
            code_logits, _ = self.speech_decoder(seen.float(), before[:, :-2] + self.offsets, is_blind)
        text_logits = self.llm.get_output_embeddings()(states).float()
        labels = labels[:, 1 : codes.shape[1]]  # (B, T - 1)
        is_counted = labels != IGNORE
        total = is_counted.sum() if num_items_in_batch is None else num_items_in_batch  # frames
        text_loss = F.cross_entropy(text_logits[is_counted], labels[is_counted], reduction="sum") / total
        code_logits = code_logits.unflatten(2, (-1, self.size + 3))[is_counted]  # (frames, K, V + 3)
        targets = before[:, 1:-1][is_counted]  # (frames, K)
        audio_loss = F.cross_entropy(code_logits.mT, targets, reduction="sum") / (total * targets.shape[1])
        loss = self.config.text_loss_weight * text_loss + self.config.audio_loss_weight * audio_loss
        return CausalLMOutput(loss=loss, logits={"text_loss": text_loss.detach(), "audio_loss": audio_loss.detach()})

    # Inference

    def start(self, batch_size: int) -> State:
        text = torch.full((batch_size,), self.tokens.pad, device=self.device)
        codes = torch.full((batch_size, self.codec.num_codebooks), self.size + 2, device=self.device)
        return State(text, codes, DynamicCache())

    def step(self, user: Tensor, state: State) -> None:
        """A frame of the user (B, H) changes the state, whose text and codes are then those of the agent."""
        inputs = self.embed_frames(user[:, None], state.text[:, None], state.codes[:, None])  # (B, 1, H)
        states = self.llm.base_model(inputs_embeds=inputs, past_key_values=state.llm, use_cache=True).last_hidden_state
        if self.config.kind == "direct":
            logits = self.audio_head(states.float())
        else:
            codes = state.codes[:, None] + self.offsets
            logits, state.decoder = self.speech_decoder.guided(states.float(), codes, state.decoder)
        state.text = self.llm.get_output_embeddings()(states)[:, 0].argmax(1)
        state.codes = logits[:, 0].unflatten(1, (-1, self.size + 3)).argmax(2)  # (B, K)

    @torch.no_grad()
    def offline_inference(self, samples: Tensor, lengths: Tensor, decode_audio: bool = True) -> dict:
        """What the agent says to whole recordings (B, S), 16 kHz, of so many samples (B,).

        `text` (B texts), `tokens_text` (B, T), `tokens_audio` (B, T, K), `tokens_len` (B,), and with decode_audio
        `audio` (B, A) at the codec's rate and `audio_len` (B,). What a conversation gives depends on no other.
        """
        rows = [row[:length].cpu().numpy() for row, length in zip(samples, lengths.tolist(), strict=True)]
        state, num_frames, frames = self.start(len(rows)), -(-lengths // HOP), []
        with self.in_eval_mode():
            heard = torch.cat([self.hear(row) for row in rows]).to(self.device)
            for user in self.embed_user(heard, num_frames).unbind(1):
                self.step(user, state)
                frames.append((state.text, state.codes))
        text, codes = (torch.stack(channel, 1) for channel in zip(*frames, strict=True))
        sizes = num_frames.tolist()
        results = {"text": [self.text_of(row[:n]) for row, n in zip(text, sizes, strict=True)]}
        results |= {"tokens_text": text, "tokens_audio": codes, "tokens_len": num_frames}
        if decode_audio:
            audio = [self.audio_of(row[:n]) for row, n in zip(codes, sizes, strict=True)]
            results |= {"audio": pad_sequence(audio, batch_first=True), "audio_len": torch.tensor([*map(len, audio)])}
        return results

    def text_of(self, ids: Tensor) -> str:
        """The text in a stretch (T,) of the text channel; turns are parted by a space."""
        turns: list[list[int]] = [[]]
        for token in ids.tolist():
            if token in (self.tokens.bos, self.tokens.eos):
                turns.append([])
            elif token != self.tokens.pad:
                turns[-1].append(token)
        return " ".join(" ".join(self.tokenizer.batch_decode(turns, skip_special_tokens=True)).split())

    def audio_of(self, codes: Tensor) -> Tensor:
        """Samples (A,) of codes (T, K), in which frames that begin or end a turn are silent."""
        rate, hop = self.codec.sample_rate, round(self.codec.sample_rate * HOP / SAMPLE_RATE)
        silence = self.codec.encode(torch.zeros(1, rate))[0, 6].to(codes.device)  # (K,)
        return self.codec.decode(torch.where(codes < self.size, codes, silence)[None])[0, : len(codes) * hop]

    def stream(self) -> "Stream":
        return Stream(self)


class Stream:
    """A conversation under way: `push` takes samples of the user and gives what the agent says in each frame."""

    def __init__(self, model: DuplexModel):
        self.model, self.state, self.window = model, model.start(1), model.window
        self.heard = np.zeros(self.window["context"] * HOP, np.float32)  # the context, and what is no whole window yet
        self.silence = torch.zeros(model.delay, 1, model.config.hidden_size, device=model.device)  # what it hears first

    @torch.no_grad()
    def push(self, samples: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Yield (text token, codes (K,)) of each frame that these samples (S,) at 16 kHz complete."""
        self.heard, size = np.concatenate([self.heard, samples]), sum(self.window.values()) * HOP
        with self.model.in_eval_mode():
            while len(self.heard) >= size:
                features = self.model.encoder.extract(self.heard[:size])[None].to(self.model.device)
                chunk = self.model.embed_windows(features)[0].unsqueeze(1)  # (chunk, 1, H)
                self.heard = self.heard[self.window["chunk"] * HOP :]
                users, self.silence = torch.cat([self.silence, chunk]), self.silence[:0]
                for user in users:
                    self.model.step(user, self.state)
                    yield int(self.state.text), self.state.codes[0]


# The speech decoder


class SpeechDecoder(nn.Module):
    """Codes of the LLM's states (B, T, H): a pre-norm causal transformer over P(state) + mean of codes.

    It has no biases. Feed-forward parts are two causal convolutions over 3 frames with a GELU; positions are learned.
    """

    max_frames = 4096  # 5 minutes and a half

    def __init__(self, config: DuplexConfig, llm_size: int, num_codes: int):
        super().__init__()
        size, count = config.speech_decoder_size, config.speech_decoder_layers
        self.scale, self.project = config.cfg_scale, nn.Linear(llm_size, size)
        self.code_embeds, self.positions = nn.Embedding(num_codes, size), nn.Embedding(self.max_frames, size)
        self.layers = nn.ModuleList(DecoderLayer(size, config.speech_decoder_dropout) for _ in range(count))
        self.norm, self.head = nn.LayerNorm(size, bias=False), nn.Linear(size, num_codes)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                is_output = name.endswith(("out.weight", "down.weight"))
                std = 0.02 * (768 / size) ** 0.5  # 0.02 at NeMo's width
                nn.init.normal_(p, std=std / (2 * count) ** 0.5 if is_output else std)

    def forward(self, states: Tensor, codes: Tensor, is_blind: bool | Tensor = False, pasts=None) -> tuple:
        """(Logits (B, T, K * (V + 3)), what each layer keeps of the past); `codes` (B, T, K) are of the frames before.

        Blind rows do not see the states. With the past of earlier frames T is 1.
        """
        start = pasts[0][0].shape[2] if pasts else 0  # frames before these
        places = torch.arange(start, start + states.shape[1], device=states.device)
        seen = self.project(states) * ~torch.as_tensor(is_blind, device=states.device)
        x, kept = seen + self.code_embeds(codes).mean(2) + self.positions(places), []  # (B, T, d)
        for layer, past in zip(self.layers, pasts or [None] * len(self.layers), strict=True):
            x, past = layer(x, past)
            kept.append(past)
        return self.head(self.norm(x)), kept

    def guided(self, states: Tensor, codes: Tensor, pasts: list | None) -> tuple:
        """As `forward`, away from what it would say without the states (arXiv:2207.12598)."""
        is_blind = torch.tensor([False, True], device=states.device).repeat_interleave(len(states))[:, None, None]
        logits, pasts = self(states.repeat(2, 1, 1), codes.repeat(2, 1, 1), is_blind, pasts)
        seeing, blind = logits.chunk(2)
        return blind + self.scale * (seeing - blind), pasts


class DecoderLayer(nn.Module):
    def __init__(self, size: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, bias=False), nn.LayerNorm(size, bias=False)
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.up, self.down = nn.Conv1d(size, 4 * size, 3, bias=False), nn.Conv1d(4 * size, size, 3, bias=False)
        self.dropout, self.num_heads = nn.Dropout(dropout), max(size // 64, 1)

    def forward(self, x: Tensor, past: tuple | None) -> tuple[Tensor, tuple]:
        """(B, T, d) -> (B, T, d), and the past: keys, values, and the last 4 frames that the convolutions saw."""
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past)  # (B, heads, T, d / heads)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y = self.norm2(x)
        y = torch.cat([past[2], y], 1) if past else F.pad(y, (0, 0, 4, 0))  # (B, 4 + T, d)
        x = x + self.dropout(self.down(F.gelu(self.up(y.mT), approximate="tanh")).mT)
        return x, (k, v, y[:, -4:])
