"""Speech encoders other than Whisper, which is in model.py: wav2vec 2.0, HuBERT, WavLM, W2V-BERT, Parakeet, Canary.

    encoder = load("microsoft/wavlm-large")  # model.load_encoder calls this, and knows Whisper too
    features = encoder.extract(samples)  # (S,) -> (S,), or (F, M) where the encoder takes log-mel features
    frames = encoder(features[None], torch.tensor([len(features)]))  # (1, T, D)

A new encoder is a class and a row of ENCODERS. The class is an nn.Module with this contract:

    extract(samples (S,), float32 numpy) -> features (F, M), or samples (S,); can be pickled without the weights,
        because data loading workers call it
    output_lengths(lengths, Tensor or int) -> valid frames, of the same type, never negative
    output_size -> D
    forward(features (A, F, M) or (A, S), zeros after each clip; lengths (A,)) -> frames (A, T, D)

The frames of a clip are the same alone and in a batch; what comes after its `output_lengths` is garbage. Lengths are
arguments and never stay on a module: two threads may use one encoder, and gradient checkpointing computes layers again
in another thread. The shape letters are model.py's.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersWhisper

from dataset import length_mask
from errors import InputError, as_input_error, load_pretrained
from manifest import SAMPLE_RATE

# WavLM's attention warns, at every batch, that its mask is bool and its position bias is not.
warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
WANTED = "a folder or Hub name in transformers' format"
PREFIXES = {r"^model\.encoder\.": "", r"^encoder\.": ""}  # of an encoder's weights in a whole model -> in the encoder


def load(
    name: str,
    revision: str | None = None,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
    whisper_class: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """The encoder of a checkpoint, without heads and decoders.

    `name`: a folder, a Hub name (at `revision`), or KIND:PLACE, which calls the loader of row KIND with the name PLACE.
    `layer`: the frames are hidden_states[layer] of transformers, 1 ... the number of layers, and nothing above is
    loaded; None is the model's own last output. `dtype` of the weights: None is the checkpoint's. `whisper_class` is
    made of transformers' Whisper encoder and its feature extractor. Raises InputError.
    """
    kind, colon, place = name.partition(":")
    if colon and kind in ENCODERS and not Path(name).exists():
        return ENCODERS[kind](place, revision, layer, dtype)
    config = read_config(name, revision)
    model_type = config.model_type
    if model_type == "whisper" and whisper_class:
        keep_whisper_layers(config, layer)
        return whisper_class(*load_parts(name, revision, dtype, config, TransformersWhisper, key_mapping=PREFIXES))
    if model_type not in ENCODERS:
        raise InputError(f"{name}: a model of type {model_type}; wanted one of whisper, {', '.join(ENCODERS)}")
    return ENCODERS[model_type](name, revision, layer, dtype)


# Loading


def read_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The config of a whole checkpoint. Raises InputError."""
    with as_input_error(name, "load a speech encoder", WANTED):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if config.to_dict().get("add_adapter"):  # strided convolutions behind the last layer; MMS has adapter_attn_dim
        raise InputError(f"{name}: add_adapter is true in config.json; wanted an encoder that ends with its layers")
    return config


def keep_layers(config: PreTrainedConfig, layer: int | None) -> None:
    """Make the config that of a model which ends after this layer; None keeps all layers. Raises InputError."""
    if layer is None:
        return
    num_layers = config.num_hidden_layers
    if not 1 <= layer <= num_layers:
        raise InputError(f"encoder layer {layer}: wanted 1 ... {num_layers}, or none for the model's own last output")
    config.num_hidden_layers = layer


def keep_whisper_layers(config: WhisperConfig, layer: int | None) -> None:
    """As keep_layers. Only behind Whisper's last layer comes its final norm."""
    if layer is not None:
        is_last = layer == config.num_hidden_layers
        keep_layers(config, layer)
        config.has_final_norm = is_last and config.to_dict().get("has_final_norm", True)  # a field of ours


def load_parts(
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    config: PreTrainedConfig,
    model_class=AutoModel,
    **options,
) -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """The model of this config and its feature extractor. `options` go to errors.load_pretrained. Raises InputError."""
    whole = nullcontext
    if is_deepspeed_zero3_enabled():
        import zero3

        whole = zero3.unsharded  # some encoders cannot be built in shards
    with as_input_error(name, "load a speech encoder", WANTED), whole():
        feature_extractor = AutoFeatureExtractor.from_pretrained(name, revision=revision, trust_remote_code=False)
        options |= {"config": config, "dtype": dtype or "auto", "revision": revision or "main"}
        model = load_pretrained(model_class, name, **options)
    if feature_extractor.sampling_rate != SAMPLE_RATE:
        raise InputError(f"{name}: an encoder of {feature_extractor.sampling_rate} Hz audio; wanted {SAMPLE_RATE} Hz")
    return model, feature_extractor


def extract(feature_extractor: FeatureExtractionMixin, samples: np.ndarray) -> Tensor:
    """What an encoder takes of one clip (S,): log-mel features (F, M), or samples (S,), normalised if it wants that."""
    options = {"padding": "longest", "return_attention_mask": True, "return_tensors": "pt"}
    inputs = feature_extractor(samples, sampling_rate=SAMPLE_RATE, **options)
    features = inputs[feature_extractor.model_input_names[0]][0]
    return features[: inputs["attention_mask"][0].sum()]  # W2V-BERT's pads to an even number, Parakeet's to one more


# The encoders


class TransformersEncoder(nn.Module):
    """What the encoders of transformers have in common. A model that masks all padding by itself needs no more.

    They have the contract above and also `model`, `feature_extractor`, `save_pretrained` and `lora_targets`: the
    names of the linear layers for LoRA, None for the usual queries and values.
    """

    lora_targets: ClassVar[list[str] | None] = None

    def __init__(self, model: PreTrainedModel, feature_extractor: FeatureExtractionMixin):
        super().__init__()
        self.model, self.feature_extractor = model, feature_extractor
        self.extract = partial(extract, feature_extractor)
        self.output_size = model.config.hidden_size

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return not_negative(lengths)  # a frame for each feature frame

    def mask_lengths(self, features: Tensor, lengths: Tensor) -> Tensor:
        """The lengths (A,) to mask with. A clip too short for a frame gets the whole row: an empty mask gives NaN."""
        return torch.where(self.output_lengths(lengths) > 0, lengths, features.shape[1])

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Features (A, F, M) -> frames (A, T, D)."""
        mask = length_mask(self.mask_lengths(features, lengths), features.shape[1])
        return self.model(features.to(self.model.dtype), attention_mask=mask).last_hidden_state

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """Write what load(folder) needs: config.json, model.safetensors, preprocessor_config.json."""
        # With save_original_format=True, the names of the weights would get back the prefixes of a whole model.
        self.model.save_pretrained(folder, save_original_format=False, **options)
        self.feature_extractor.save_pretrained(folder)


class WaveEncoder(TransformersEncoder):
    """wav2vec 2.0, and so MMS and XLS-R: samples -> seven strided convolutions, 50 frames a second -> Transformer.

    forward calls the model's parts one after another, because the group norm of the base models needs the lengths.
    """

    def __init__(self, model: PreTrainedModel, feature_extractor: FeatureExtractionMixin):
        super().__init__(model, feature_extractor)
        self.has_group_norm = model.config.feat_extract_norm == "group"  # base models; large ones have layer norms
        if self.has_group_norm:
            convolutions = model.feature_extractor.conv_layers
            convolutions[0] = ClipNormConvolution(convolutions[0])
        if ends_before_norm(model.config):
            model.encoder.layer_norm = nn.Identity()

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, layer: int | None = None, dtype: torch.dtype | None = None
    ) -> "WaveEncoder":
        config = read_config(name, revision)
        keep_layers(config, layer)
        if layer is not None:
            config.has_final_norm = False  # a field of ours: hidden_states of transformers come from before that norm
        config.layerdrop = 0.0  # training would skip layers at random
        config.mask_time_prob = config.mask_feature_prob = 0.0  # no SpecAugment, and no vector for it in the model
        may_lack = ("encoder.layer_norm.weight", "encoder.layer_norm.bias") if ends_before_norm(config) else ()
        return cls(*load_parts(name, revision, dtype, config, may_lack=may_lack))

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        config = self.model.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        return not_negative(lengths)

    def forward(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Samples (A, S) -> frames (A, T, D)."""
        lengths = self.mask_lengths(samples, lengths)
        x = samples.to(self.model.dtype).unsqueeze(1)  # (A, 1, S)
        first, *others = self.model.feature_extractor.conv_layers
        x = first(x, lengths) if self.has_group_norm else first(x)
        for convolution in others:
            x = convolution(x)
        x = self.project(x.transpose(1, 2))  # (A, C, T) -> (A, T, D)
        mask = length_mask(self.output_lengths(lengths), x.shape[1])
        return self.model.encoder(x, attention_mask=mask).last_hidden_state

    def project(self, x: Tensor) -> Tensor:
        return self.model.feature_projection(x)[0]  # the second is x, normalised


class WavLMEncoder(WaveEncoder):
    """WavLM passes the q/k/v weights straight to F.multi_head_attention_forward, so LoRA on those layers never runs."""

    lora_targets: ClassVar = ["intermediate_dense", "output_dense"]


class HubertEncoder(WaveEncoder):
    """HuBERT; a few models have a batch norm in front of their positional convolution."""

    def __init__(self, model: PreTrainedModel, feature_extractor: FeatureExtractionMixin):
        super().__init__(model, feature_extractor)
        if model.config.conv_pos_batch_norm:
            model.encoder.pos_conv_embed.batch_norm.register_forward_hook(keep_zeros)

    def project(self, x: Tensor) -> Tensor:
        return self.model.feature_projection(x)


class W2VBertEncoder(TransformersEncoder):
    """W2V-BERT 2.0: 160 features, which are two log-mel frames side by side -> Conformer, 50 frames a second."""

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, layer: int | None = None, dtype: torch.dtype | None = None
    ) -> "W2VBertEncoder":
        config = read_config(name, revision)
        keep_layers(config, layer)
        config.layerdrop = 0.0  # as in WaveEncoder.load
        config.mask_time_prob = config.mask_feature_prob = 0.0
        return cls(*load_parts(name, revision, dtype, config))


class ParakeetEncoder(TransformersEncoder):
    """The FastConformer of Parakeet (CTC, RNN-T, TDT) and Canary: log-mel features -> 12.5 frames a second."""

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, layer: int | None = None, dtype: torch.dtype | None = None
    ) -> "ParakeetEncoder":
        config = read_config(name, revision)
        if config.model_type != "parakeet_encoder":  # a whole model
            config = config.encoder_config
        keep_layers(config, layer)
        config.layerdrop = 0.0  # as in WaveEncoder.load
        return cls(*load_parts(name, revision, dtype, config, key_mapping=PREFIXES))

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        config = self.model.config
        kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
        for _ in range(int(math.log2(config.subsampling_factor))):  # three convolutions of stride 2
            lengths = (lengths + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        return not_negative(lengths)


# Parts of the encoders


class ClipNormConvolution(GradientCheckpointingLayer):
    """The first convolution of a base model, whose group norm takes mean and variance over each clip by itself.

    transformers takes them over the whole row, the padding included.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.conv, self.layer_norm, self.activation = layer.conv, layer.layer_norm, layer.activation

    def forward(self, samples: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(samples)  # (A, 1, S) -> (A, C, S / 5)
        num_frames = (lengths - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        normed = torch.zeros_like(x)
        for i, count in enumerate(num_frames.tolist()):
            normed[i : i + 1, :, :count] = self.layer_norm(x[i : i + 1, :, :count])
        return self.activation(normed)


def keep_zeros(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook. Frames of zeros stay zeros: they are the padding, just cleared by transformers, and the
    convolution behind this norm would carry the norm's bias from there into the clip."""
    return output * inputs[0].any(dim=1, keepdim=True)  # (A, D, T)


def ends_before_norm(config: PreTrainedConfig) -> bool:
    """Whether the model ends with a norm behind its layers (large models' do) that a chosen layer leaves out."""
    return config.do_stable_layer_norm and not config.to_dict().get("has_final_norm", True)  # a field of ours


def not_negative(lengths: Tensor | int) -> Tensor | int:
    return lengths.clamp(min=0) if isinstance(lengths, Tensor) else max(lengths, 0)


ENCODERS: dict[str, Callable[..., nn.Module]] = {  # model_type in config.json, or KIND of a name KIND:PLACE -> loader
    "wav2vec2": WaveEncoder.load,
    "hubert": HubertEncoder.load,
    "wavlm": WavLMEncoder.load,
    "wav2vec2-bert": W2VBertEncoder.load,
    "parakeet_encoder": ParakeetEncoder.load,
    "parakeet_ctc": ParakeetEncoder.load,
    "parakeet_rnnt": ParakeetEncoder.load,
    "parakeet_tdt": ParakeetEncoder.load,
    "canary": ParakeetEncoder.load,
}
