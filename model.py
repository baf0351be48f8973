"""SpeechLLM: a frozen speech encoder, a trained projector, a frozen LLM.

    model = SpeechLLM.from_pretrained("run")
    model.transcribe("a.wav")  # -> "the transcript"

Shapes: B batch, A audio windows in the batch, S samples (16 kHz), M mel bins, F feature frames (10 ms), T encoder
frames, N speech embeddings, L tokens, K last tokens with labels, D encoder width, H LLM width, V vocabulary.
"""

import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, WhisperFeatureExtractor
from transformers.modeling_outputs import CausalLMOutput

import checkpoint
import decoding
import trainable
import zero3
from config import SpeechLLMConfig
from dataset import IGNORE, SILENCE, WINDOW, SpeechDataset, collate, pad_left, speech_ids
from encoders import extract, load_encoder, valid
from llm import load_llm
from manifest import InputError
from projectors import PROJECTORS
from prompt import END, SPEECH, START, conversation, render_prompt


class SpeechLLM(PreTrainedModel):
    """A speech recogniser of which, by default, the projector alone is trained.

    Frozen parts keep the LLM's dtype and eval mode. Raises InputError for an encoder, an LLM, a projector or weights
    that do not exist or do not fit each other.
    """

    config_class = SpeechLLMConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # tells Trainer that forward divides by num_items_in_batch

    def __init__(self, config: SpeechLLMConfig, device: str | torch.device | None = None):
        super().__init__(config)
        if not config.encoder_name_or_path or not config.llm_model_name_or_path:
            raise InputError("wanted an encoder and an LLM: --encoder_name_or_path and --llm_model_name_or_path")
        if config.projector not in PROJECTORS:
            raise InputError(f"projector {config.projector!r}: wanted one of {sorted(PROJECTORS)}")
        self.tokenizer, self.llm = load_llm(config, device)
        name = config.encoder_name_or_path
        with zero3.unshared():
            self.encoder = load_encoder(name, config.encoder_revision, config.encoder_layer, self.llm.dtype)
        text_config = self.llm.config.get_text_config()
        config.encoder_size, config.hidden_size = self.encoder.output_size, text_config.hidden_size
        self.projector = PROJECTORS[config.projector](config.encoder_size, config.hidden_size, config)
        if config.audio_boundary_tokens:
            self.boundary = nn.Embedding(2, config.hidden_size)  # before and after a clip
            nn.init.normal_(self.boundary.weight, std=0.02)
        self.label_smoothing, self.merged, self.kept = 0.0, False, set()
        self.max_length = text_config.max_position_embeddings
        self.feature_extractor = self.encoder.feature_extractor
        if self.speech_lengths(len(extract(self.feature_extractor, torch.zeros(SILENCE).numpy()))) < 1:
            raise InputError(f"projector_stride {config.projector_stride}: 2 s of audio give not one embedding")
        trainable.prepare(self)
        self.to(device or self.llm.device).eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None, device=None, **overrides) -> "SpeechLLM":
        """The model of a folder that was saved, a training checkpoint, or a Hub name; `overrides` are config fields."""
        folder = checkpoint.find_folder(name_or_path, revision)
        model = cls(checkpoint.load_config(folder, **overrides), device)
        model.load_trained(folder / "model.safetensors")
        return model

    @classmethod
    def from_parts(cls, encoder: str, llm: str, projector: str = "conv1d", device=None, **fields) -> "SpeechLLM":
        """An untrained model; `fields` are those of SpeechLLMConfig."""
        names = {"encoder_name_or_path": encoder, "llm_model_name_or_path": llm, "projector": projector}
        return cls(SpeechLLMConfig(**names, **fields), device)

    save_pretrained, load_trained, push_to_hub = checkpoint.save, checkpoint.load_trained, checkpoint.push_to_hub
    decode, transcribe = decoding.decode, decoding.transcribe
    train, saved, merge_lora = trainable.set_training, trainable.saved, trainable.merge_lora
    freeze_encoder, unfreeze_encoder = trainable.switches("encoder")
    freeze_llm, unfreeze_llm = trainable.switches("llm")
    freeze_projector, unfreeze_projector = trainable.switches("projector")
    freeze_llm_except_lm_head = trainable.freeze_llm_except_lm_head

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)  # layers of the frozen LLM must know

    def speech_lengths(self, feature_lengths):
        """Speech embeddings made of so many feature frames, or samples (int or Tensor)."""
        return self.projector.output_lengths(self.encoder.output_lengths(feature_lengths))

    def make_dataset(self, records, **options) -> SpeechDataset:
        """SpeechDataset of records (a Manifest or a list of dicts) for this model."""
        config = self.config
        take = partial(extract, self.feature_extractor, pad_to_30s=config.pad_to_30s)
        counts = self.speech_lengths(torch.arange(WINDOW + 1)).numpy()  # a table: workers that load data need no model
        prompts = config.prompt, config.system_prompt, config.audio_boundary_tokens
        return SpeechDataset(records, self.tokenizer, take, counts, *prompts, **options)

    def inputs_for_llm(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """inputs_embeds (B, L, H), attention_mask (B, L) of text and audio, in any of these forms:

        a batch of `collate`, whose input_ids hold placeholders for the speech; or what `feature_extractor` returns,
        its mask as audio_attention_mask, one clip a row, which goes before input_ids, or into the model's prompt.
        """
        features = input_values if input_features is None else input_features
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        if features is None:
            raise ValueError("wanted audio: input_values or input_features, as model.feature_extractor returns them")
        if feature_lengths is None:
            if isinstance(self.feature_extractor, WhisperFeatureExtractor):
                features = features.transpose(1, 2)  # (A, M, F) -> (A, F, M)
            mask = audio_attention_mask
            feature_lengths = features.new_full((len(features),), features.shape[1]) if mask is None else mask.sum(1)
        if input_ids is None or not (input_ids == SPEECH).any():
            before, after = [], []
            if input_ids is None:
                asked = conversation(self.config.prompt, self.config.system_prompt)
                (before, after), _ = render_prompt(self.tokenizer, json.dumps(asked))
                input_ids = attention_mask = features.new_zeros((len(features), 0), dtype=torch.long)
            if len(input_ids) != len(features):
                raise ValueError(f"{len(input_ids)} rows of input_ids for {len(features)} clips")
            counts = self.speech_lengths(feature_lengths.long()).tolist()
            rows = [before + speech_ids(count, self.config.audio_boundary_tokens) + after for count in counts]
            ids, mask = (pad_left(r, 0).to(features.device) for r in (rows, [[1] * len(row) for row in rows]))
            input_ids, attention_mask = torch.cat([ids, input_ids], 1), torch.cat([mask, attention_mask], 1)
        embeds = self.embed(input_ids, features, feature_lengths.long())
        return {"inputs_embeds": embeds, "attention_mask": attention_mask}

    def embed(self, input_ids: Tensor, features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Token embeddings (B, L, H) with the speech embeddings in the SPEECH positions, in order."""
        is_trained = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            frames = self.encoder(features, feature_lengths)  # (A, T, D)
        lengths = self.encoder.output_lengths(feature_lengths)
        speech = self.projector(F.dropout(frames, self.config.encoder_dropout, self.training), lengths)  # (A, N, H)
        speech = speech[valid(self.projector.output_lengths(lengths), speech.shape[1])]
        embeds, places = self.llm.get_input_embeddings()(input_ids.clamp(min=0)), input_ids == SPEECH
        if places.sum() != len(speech):
            raise ValueError(f"{places.sum()} speech positions in the prompts, {len(speech)} speech embeddings")
        if self.config.audio_boundary_tokens:
            for place, vector in zip((START, END), self.boundary(input_ids.new_tensor([0, 1])), strict=True):
                embeds = torch.where((input_ids == place).unsqueeze(2), vector.to(embeds.dtype), embeds)
        return embeds.masked_scatter(places.unsqueeze(2), speech.to(embeds.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        index: list | None = None,
        bad: list | None = None,
        **audio,
    ) -> CausalLMOutput:
        """Logits, and the loss if there are labels; inputs are those of `inputs_for_llm`.

        Labels (B, K) are those of the last K positions, and logits (B, K, V) predict these; without labels logits
        (B, L, V) are of all. The loss is summed over the trained tokens and divided by num_items_in_batch (all
        trained tokens of the optimiser's step, on all devices), by this batch's own when that is None. `index` and
        `bad` come with a batch of `collate` and are not used here.
        """
        inputs = self.inputs_for_llm(input_ids, attention_mask, **audio)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        keep = 0 if labels is None else labels.shape[1] + 1  # each position predicts the next; 0 = all
        logits = self.llm(**inputs, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        if labels is None:
            return CausalLMOutput(logits=logits)
        logits = logits[:, :-1].float()
        total = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        count = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / max(count, 1), logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: list[list[dict]] | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Ids (B, new) of the answers to `prompts`, or to the inputs of `inputs_for_llm`.

        A prompt is a conversation: turns with role, content (with <audio>) and audio (a list of files or samples).
        `options` are those of transformers' generate: num_beams, do_sample, a generation_config ...
        """
        audio = (input_values, input_features, feature_lengths, audio_attention_mask)
        if prompts is not None:
            if any(not turns or turns[-1]["role"] == "assistant" for turns in prompts):
                raise ValueError("wanted prompts whose last turn is the user's")
            records = [{"where": f"prompt {number}", "messages": turns} for number, turns in enumerate(prompts, 1)]
            dataset = self.make_dataset(records, max_length=self.max_length)
            batch = collate([dataset[i] for i in range(len(dataset))], with_targets=False)
            names = ("input_ids", "attention_mask", "input_values", "input_features", "feature_lengths")
            input_ids, attention_mask, *audio = (batch[n].to(self.device) if n in batch else None for n in names)
        return self.llm.generate(**self.inputs_for_llm(input_ids, attention_mask, *audio), **options)
