"""SpeechLLM: a frozen speech encoder, a trained projector, a frozen LLM.

    model = SpeechLLM.from_pretrained("run")
    model.transcribe("a.wav")  # -> "the transcript"

Shapes: B batch, A audio windows in the batch, S samples (16 kHz), M mel bins, F feature frames (10 ms), T encoder
frames, N speech embeddings, L tokens, K last tokens with labels, D encoder width, H LLM width, V vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import checkpoint
import decoding
import inputs
import trainable
import zero3
from config import SpeechLLMConfig
from dataset import IGNORE, SILENCE, WINDOW, SpeechDataset
from encoders import extract, load_encoder, valid
from llm import load_llm
from manifest import InputError
from projectors import PROJECTORS
from prompt import END, SPEECH, START


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
        checkpoint.pin(config)
        text_config = self.llm.config.get_text_config()
        config.encoder_size, config.hidden_size = self.encoder.output_size, text_config.hidden_size
        self.projector = PROJECTORS[config.projector](config.encoder_size, config.hidden_size, config)
        if config.audio_boundary_tokens:
            self.boundary = nn.Embedding(2, config.hidden_size)  # before and after a clip
            nn.init.normal_(self.boundary.weight, std=0.02)
        self.label_smoothing, self.merged, self.once_trained = 0.0, False, set()
        self.max_length = text_config.max_position_embeddings
        self.feature_extractor = self.encoder.feature_extractor
        example = extract(self.feature_extractor, torch.zeros(SILENCE).numpy())
        self.feature_shape = example.shape[1:]  # of a frame: (M,), or () where samples are taken
        if self.speech_lengths(len(example)) < 1:
            raise InputError(f"projector_stride {config.projector_stride}: 2 s of audio give not one embedding")
        trainable.prepare(self)
        for part in set(self.children()) - {self.llm}:
            part.to(device or self.llm.device)
        self.eval()

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None, device=None, token=None, **overrides) -> "SpeechLLM":
        """The model of a folder that was saved, of a training checkpoint, of a Hub name, or of a .safetensors file.

        `overrides` are fields of its config. Where there is no config.json they can name the parts in its stead.
        """
        weights = checkpoint.find_weights(name_or_path, revision, token)
        model = cls(checkpoint.load_config(weights.parent, **overrides), device)
        model.load_trained(weights)
        return model

    @classmethod
    def from_parts(cls, encoder: str, llm: str, projector: str = "conv1d", device=None, **fields) -> "SpeechLLM":
        """An untrained model; `fields` are those of SpeechLLMConfig."""
        names = {"encoder_name_or_path": encoder, "llm_model_name_or_path": llm, "projector": projector}
        return cls(SpeechLLMConfig(**names, **fields), device)

    save_pretrained, load_trained, push_to_hub = checkpoint.save, checkpoint.load_trained, checkpoint.push_to_hub
    to_decode, decode, transcribe = decoding.to_decode, decoding.decode, decoding.transcribe
    inputs_for_llm = inputs.inputs_for_llm
    train, saved, merge_lora = trainable.set_training, trainable.saved, trainable.merge_lora
    freeze_encoder, unfreeze_encoder = trainable.switches("encoder")
    freeze_llm, unfreeze_llm = trainable.switches("llm")
    freeze_projector, unfreeze_projector = trainable.switches("projector", "boundary")
    freeze_llm_except_lm_head = trainable.freeze_llm_except_lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

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
        counts = self.speech_lengths(torch.arange(WINDOW + 1)).int().numpy()  # a table: workers need no model
        prompts = config.prompt, config.system_prompt, config.audio_boundary_tokens
        return SpeechDataset(records, self.tokenizer, take, counts, *prompts, **options)

    def embed(self, input_ids: Tensor, features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Token embeddings (B, L, H) with the speech embeddings in the SPEECH positions, in order."""
        is_trained = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            frames = self.encoder(features, feature_lengths)  # (A, T, D)
        lengths = self.encoder.output_lengths(feature_lengths)
        speech = self.projector(F.dropout(frames, self.config.encoder_dropout, self.training), lengths)  # (A, N, H)
        speech = speech[valid(self.projector.output_lengths(lengths), speech.shape[1])]
        embeds, places = self.get_input_embeddings()(input_ids.clamp(min=0)), input_ids == SPEECH
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

        Labels (B, K) are those of the last K positions, and logits (B, K, V) predict these; of K = L labels the first,
        which nothing predicts, does not count. Without labels logits (B, L, V) are of all. The loss is summed over the
        trained tokens and divided by num_items_in_batch (all trained tokens of the optimiser's step, on all devices),
        by this batch's own when that is None. `index` and `bad` come with a batch of `collate` and are not used here.
        """
        given = self.inputs_for_llm(input_ids, attention_mask, **audio)
        labels = None if labels is None else inputs.predictable(labels, *given["attention_mask"].shape)
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        keep = 0 if labels is None else labels.shape[1] + 1  # each position predicts the next; 0 = all
        logits = self.llm(**given, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
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
    def generate(self, input_ids=None, attention_mask=None, prompts: list[list[dict]] | None = None, **options):
        """Ids (B, new) of the answers to `prompts`, or to the inputs of `inputs_for_llm`.

        A prompt is a conversation: turns with role, content (with <audio>) and audio (a list of files or samples).
        `options` are audio inputs and those of transformers' generate: num_beams, do_sample, generation_config ...
        """
        audio = {name: options.pop(name) for name in inputs.AUDIO_INPUTS if name in options}
        if prompts is not None:
            if audio or input_ids is not None:
                raise ValueError("wanted prompts, or tensors of audio and text; not both")
            input_ids, attention_mask, audio = inputs.of_prompts(self, prompts)
        training = self.training
        self.eval()  # layers that checkpoint their gradients keep no cache
        try:
            given = inputs.pad_to_the_left(**self.inputs_for_llm(input_ids, attention_mask, **audio))
            return self.llm.generate(**given, **options)
        finally:
            self.train(training)
