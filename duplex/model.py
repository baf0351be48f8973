"""DuplexModel: listens and speaks at the same time, a frame of 80 ms after the other.

    model = DuplexModel.from_pretrained("run")
    results = model.offline_inference(samples, lengths)  # of whole conversations
    stream = model.stream()
    stream.push(samples)  # of any size; -> what the agent says meanwhile

Two kinds, after NeMo's DuplexS2SModel and DuplexS2SSpeechDecoderModel: `direct`, whose LLM predicts a text token and K
audio codes for each frame, and `decoder`, in which a small Llama makes the codes of the LLM's states.

Shapes: B conversations, T frames of 80 ms, W windows of the encoder, K codebooks of V codes, H LLM width, d decoder
width, D encoder width, F feature frames, M mel bins, S samples at 16 kHz.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.modeling_outputs import CausalLMOutput

from dataset import IGNORE, length_mask
from duplex.codecs import load_codec
from duplex.data import FRAME_SECONDS, HOP, ConversationDataset, TextTokens, encode_channels
from errors import InputError
from manifest import option
from model import ModelArguments, SpeechLLM, SpeechLLMConfig


@dataclass
class DuplexArguments(ModelArguments):
    """Flags of duplex.train beside those of the root, and fields of config.json."""

    kind: Literal["direct", "decoder"] = option("direct", "the LLM makes the codes, or a speech decoder does")
    codec: str = option("kyutai/mimi", "Hub name or folder of Mimi, EnCodec or DAC; or codec.safetensors of the demo")
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
    speech_decoder_dropout: float = option(0.1, "dropout in its attention, in training only")
    cfg_unconditional_prob: float = option(0.1, "share of the batches in which it does not see the LLM's states")
    cfg_scale: float = option(2.5, "classifier-free guidance in inference: 1 = none")


class DuplexConfig(SpeechLLMConfig, DuplexArguments):
    model_type = "duplex"
    PARTS = (*SpeechLLMConfig.PARTS, ("codec", "codec_revision"))


class DuplexModel(SpeechLLM):
    """A SpeechLLM that reads e(t) = E(text of t) + sum over K of E(codes of t - 1) + w * speech(t), without a prompt.

    From that it predicts the text of t + 1 and the codes of t, so that text is a frame ahead of the voice. Codes have
    three more values: V begins a turn, V + 1 ends one, V + 2 stands before the first frame.
    """

    config_class = DuplexConfig

    def __init__(self, config: DuplexConfig, encoder: nn.Module, projector: nn.Module, llm: nn.Module, tokenizer):
        super().__init__(config, encoder, projector, llm, tokenizer)
        self.codec = load_codec(config.codec, config.codec_revision)  # no module: a checkpoint only names it
        ids = tokenizer.convert_tokens_to_ids([config.text_pad, config.text_bos, config.text_eos])
        if None in ids or len(set(ids)) < 3:
            raise InputError("wanted three tokens of the LLM, all different: --text_pad, --text_bos and --text_eos")
        self.tokens, self.size = TextTokens(*ids), self.codec.codebook_size  # V
        self.window = {"chunk": config.chunk, "context": config.context, "lookahead": config.lookahead}
        self.delay = config.chunk - 1 + config.lookahead  # frames from a sound to the frame in which the LLM hears it
        num_frames = sum(self.window.values())
        num_embeds = self.embedding_counts[len(encoder.extract(np.zeros(num_frames * HOP, np.float32)))]
        if num_frames - num_embeds not in (0, 1):  # wav2vec 2.0 drops a part of the last one
            found = f"{num_embeds} embeddings in {num_frames} frames of 80 ms"
            raise InputError(f"--projector_stride {config.projector_stride}: {found}; wanted one each")
        num_codes, width = self.codec.num_codebooks * (self.size + 3), self.config.hidden_size
        self.register_buffer("offsets", torch.arange(self.codec.num_codebooks) * (self.size + 3), persistent=False)
        if config.kind == "direct":
            self.code_embeds = nn.Embedding(num_codes, width)
            nn.init.normal_(self.code_embeds.weight, std=llm.config.get_text_config().initializer_range / 2)
        else:
            self.project, width = nn.Linear(width, config.speech_decoder_size), config.speech_decoder_size
            sizes = {"vocab_size": num_codes, "hidden_size": width, "intermediate_size": 4 * width}
            sizes |= {"num_hidden_layers": config.speech_decoder_layers, "num_attention_heads": max(width // 64, 1)}
            std = 0.02 * (768 / width) ** 0.5  # 0.02 at NeMo's width
            options = {"attention_dropout": config.speech_decoder_dropout, "initializer_range": std}
            self.speech_decoder = LlamaModel(LlamaConfig(**sizes, **options))
            self.code_embeds = self.speech_decoder.embed_tokens
        self.audio_head = nn.Linear(width, num_codes)
        self.apply_freezing()
        self.eval()

    def make_conversations(self, records) -> ConversationDataset:
        """The dataset of records of duplex/data.py for this model."""
        encode = partial(encode_channels, extract=self.encoder.extract, codec=self.codec, sizes=self.window)
        encode_text = partial(self.tokenizer.encode, add_special_tokens=False)
        return ConversationDataset(records, encode, encode_text, self.tokens)

    # What the LLM reads

    def encode_windows(self, features: Tensor) -> Tensor:
        """Features of windows (W, F, M) -> the encoder's frames of their chunks (W, frames, D)."""
        frames = self.encoder(features, torch.full((len(features),), features.shape[1], device=features.device))
        chunk, behind = (self.config.projector_stride * n for n in (self.config.chunk, self.config.lookahead))
        return frames[:, -chunk - behind :][:, :chunk]

    def embed_chunks(self, frames: Tensor) -> Tensor:
        """What encode_windows gives -> embeddings (W, chunk, H)."""
        return self.projector(frames, torch.full((len(frames),), frames.shape[1], device=frames.device))

    def predict(self, user: Tensor, text: Tensor, codes: Tensor, caches: tuple = (None, None)) -> tuple[Tensor, Tensor]:
        """Logits of the next frames' text (B, T, vocabulary) and of these frames' codes (B, T, K, V + 3).

        It reads the user's embeddings (B, T, H), text (B, T) and the codes of the frames before (B, T, K). Caches, in
        inference, are of the LLM and the speech decoder: they hold the frames of earlier calls.
        """
        code_embeds = self.code_embeds(codes + self.offsets)  # (B, T, K, H), or d in place of H
        embeds = self.get_input_embeddings()(text) + self.config.duplex_user_channel_weight * user
        if self.config.kind == "direct":
            embeds = embeds + code_embeds.sum(2)
        options = {"past_key_values": caches[0], "use_cache": caches[0] is not None}
        states = self.llm.base_model(inputs_embeds=embeds.to(self.llm.dtype), **options).last_hidden_state  # (B, T, H)
        voice = states.float()
        if self.config.kind == "decoder":
            voice = self.decode_speech(voice, code_embeds.mean(2), caches[1])
        code_logits = self.audio_head(voice).unflatten(2, (-1, self.size + 3))
        return self.llm.get_output_embeddings()(states).float(), code_logits

    def decode_speech(self, states: Tensor, code_embeds: Tensor, cache: DynamicCache | None) -> Tensor:
        """The speech decoder's states (B, T, d), of the LLM's (B, T, H) and the codes of the frames before (B, T, d).

        In a share of the training batches it does not see the LLM's states. In inference it goes away from what it
        would say without them (arXiv:2207.12598); guiding states is guiding logits, which are linear in them.
        """
        seen, scale = self.project(states.detach() if self.config.detach_input else states), self.config.cfg_scale
        if self.training:
            seen = seen * (torch.rand(()).item() >= self.config.cfg_unconditional_prob)
        is_guided = cache is not None and scale != 1
        if is_guided:
            seen, code_embeds = torch.cat([seen, torch.zeros_like(seen)]), code_embeds.repeat(2, 1, 1)  # (2 B, T, d)
        options = {"past_key_values": cache, "use_cache": cache is not None}
        states = self.speech_decoder(inputs_embeds=seen + code_embeds, **options).last_hidden_state
        if is_guided:
            seeing, blind = states.chunk(2)
            states = blind + scale * (seeing - blind)
        return states

    # Training

    def forward(
        self, text_ids, labels, codes, features=None, frames=None, num_items_in_batch=None, **kwargs
    ) -> CausalLMOutput:
        """The loss of a batch of `collate`, of features (B, W, F, M) or of what encode_windows gave of them.

        It is a mean over frames, of all conversations alike: those of the optimiser's step on all devices,
        num_items_in_batch, or, if None, of this batch. Frames behind a conversation's end do not count. `logits` are a
        dict of it and of the losses of text and audio.
        """
        frames = self.encode_windows(features.flatten(0, 1)) if frames is None else frames.flatten(0, 1)
        user = self.embed_chunks(frames).reshape(len(codes), -1, self.config.hidden_size)  # (B, W * chunk, H)
        user = F.pad(user, (0, 0, self.delay, 0))[:, : text_ids.shape[1]]  # heard when a window is over
        for token, code in ((self.tokens.bos, self.size), (self.tokens.eos, self.size + 1)):
            codes = codes.long().masked_fill((text_ids == token).unsqueeze(2), code)
        before = F.pad(codes, (0, 0, 1, -1), value=self.size + 2)  # the codes of the frame before
        text_logits, code_logits = self.predict(user, text_ids, before)
        is_counted = labels != IGNORE  # (B, T)
        total = is_counted.sum() if num_items_in_batch is None else num_items_in_batch  # frames
        text_loss = F.cross_entropy(text_logits[is_counted], labels[is_counted], reduction="sum") / total
        code_logits, codes = code_logits[is_counted], codes[is_counted]  # (frames, K, V + 3), (frames, K)
        audio_loss = F.cross_entropy(code_logits.mT, codes, reduction="sum") / (total * codes.shape[1])
        loss = self.config.text_loss_weight * text_loss + self.config.audio_loss_weight * audio_loss
        losses = {"loss": loss.detach(), "text_loss": text_loss.detach(), "audio_loss": audio_loss.detach()}
        return CausalLMOutput(loss=loss, logits=losses)

    # Inference

    def stream(self, batch_size: int = 1) -> "Stream":
        return Stream(self, batch_size)

    def offline_inference(self, samples: Tensor, lengths: Tensor) -> dict:
        """What the agent says to whole recordings (B, S), 16 kHz, of so many samples (B,).

        `text` (B texts), `tokens_text` (B, T), `tokens_audio` (B, T, K), `tokens_len` (B,), `audio` (B, A) at the
        codec's rate and `audio_len` (B,). What a conversation gives depends on no other.
        """
        num_frames, size = -(-lengths // HOP), samples.shape[1]
        samples = F.pad(samples * length_mask(lengths, size), (0, -size % HOP)).cpu().numpy()  # whole frames
        frames = islice(self.stream(len(samples)).push(samples), int(num_frames.max()))
        text, codes = (torch.stack(channel, 1) for channel in zip(*frames, strict=True))
        texts, audio = [], []
        for row_text, row_codes, length in zip(text, codes, num_frames.tolist(), strict=True):
            texts.append(" ".join(turn["text"] for turn in self.turns_of(row_text[:length])))
            audio.append(self.audio_of(row_codes[:length]))
        results = {"text": texts, "tokens_text": text, "tokens_audio": codes, "tokens_len": num_frames}
        return results | {"audio": pad_sequence(audio, True), "audio_len": torch.tensor([*map(len, audio)])}

    def turns_of(self, ids: Tensor) -> list[dict]:
        """The turns in a text channel (T,): text, and the frames `start`, in which it begins, and `end`."""
        turns, is_open = [], False
        for frame, token in enumerate([*ids.tolist(), self.tokens.eos]):  # the last turn ends with the channel
            if token in (self.tokens.bos, self.tokens.eos):
                if is_open:
                    turns[-1] |= {"end": frame, "text": self.tokenizer.decode(turns[-1]["ids"]).strip()}
                if is_open := token == self.tokens.bos:
                    turns.append({"start": frame, "ids": []})
            elif is_open and token != self.tokens.pad:
                turns[-1]["ids"].append(token)
        return turns

    def audio_of(self, codes: Tensor) -> Tensor:
        """Samples (A,) of codes (T, K), in which frames that begin or end a turn are silent."""
        silence = self.codec.encode(torch.zeros(1, self.codec.sample_rate))[0, 6].to(codes.device)  # (K,)
        samples = self.codec.decode(torch.where(codes < self.size, codes, silence)[None])[0]
        return samples[: round(len(codes) * FRAME_SECONDS * self.codec.sample_rate)]


class Stream:
    """Conversations under way: `push` takes samples of the users and gives what the agent says in each frame."""

    def __init__(self, model: DuplexModel, batch_size: int):
        self.model, self.window = model, model.window
        self.heard = np.zeros((batch_size, self.window["context"] * HOP), np.float32)  # and what is no whole window yet
        size = (batch_size, model.delay, model.config.hidden_size)
        self.silence = torch.zeros(size, device=model.device)  # what the LLM hears first
        self.text = torch.full((batch_size, 1), model.tokens.pad, device=model.device)
        self.codes = torch.full((batch_size, 1, model.codec.num_codebooks), model.size + 2, device=model.device)
        self.caches = DynamicCache(), DynamicCache()

    @torch.no_grad()
    def push(self, samples: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (text tokens (B,), codes (B, K)) of each frame that these samples (B, S) at 16 kHz complete."""
        self.heard, size = np.concatenate([self.heard, samples], 1), sum(self.window.values()) * HOP
        with self.model.in_eval_mode():
            while self.heard.shape[1] >= size:
                features = torch.stack([self.model.encoder.extract(row[:size]) for row in self.heard])  # (B, F, M)
                frames = self.model.encode_windows(features.to(self.model.device))
                users = torch.cat([self.silence, self.model.embed_chunks(frames)], 1)  # (B, chunk, H); more at first
                self.heard, self.silence = self.heard[:, self.window["chunk"] * HOP :], self.silence[:, :0]
                for user in users.split(1, 1):  # (B, 1, H)
                    text, codes = self.model.predict(user, self.text, self.codes, self.caches)
                    self.text, self.codes = text.argmax(2), codes.argmax(3)
                    yield self.text[:, 0], self.codes[:, 0]
