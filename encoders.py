"""Speech encoders: log-mel features or raw samples -> frames, batched without a trace of the padding.

encoder = load_encoder("large-v3-turbo")  # or the folder or Hub name of a Whisper, wav2vec 2.0, HuBERT, Parakeet ...
features = extract(encoder.feature_extractor, samples)  # (F, M), or (S,) where the encoder takes raw samples
frames = encoder(features[None], torch.tensor([len(features)]))  # (1, T, D)

Shapes: A clips in the batch, S samples (16 kHz), M mel bins, F feature frames, T encoder frames, D encoder width.
"""

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from manifest import SAMPLE_RATE, InputError
from pretrained import load_pretrained, told_in_one_line

FAMILIES = (  # model_type in config.json; MMS and XLS-R are wav2vec2, FastConformers are parakeet
    *("whisper", "wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "wav2vec2-conformer", "unispeech", "unispeech-sat"),
    *("data2vec-audio", "parakeet_encoder", "parakeet_ctc", "parakeet_rnnt", "parakeet_tdt", "canary"),
)
OPENAI_NAMES = (  # parts of the names of an encoder's weights: openai-whisper's, transformers'
    ("blocks.", "layers."),
    ("attn_ln.", "self_attn_layer_norm."),
    ("mlp_ln.", "final_layer_norm."),
    ("mlp.0.", "fc1."),
    ("mlp.2.", "fc2."),
    ("attn.query.", "self_attn.q_proj."),
    ("attn.key.", "self_attn.k_proj."),
    ("attn.value.", "self_attn.v_proj."),
    ("attn.out.", "self_attn.out_proj."),
    ("ln_post.", "layer_norm."),  # after the other two that end so
    ("positional_embedding", "embed_positions.weight"),
)
warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # transformers' WavLM, at every batch
WINDOW = 30 * SAMPLE_RATE  # samples that Whisper was trained on


def load_encoder(
    name_or_path: str, revision: str | None = None, layer: int | None = None, dtype: torch.dtype | None = None
) -> "SpeechEncoder":
    """The speech encoder of a checkpoint, without heads and decoders, frozen and in eval mode.

    `name_or_path`: a name or .pt file of openai-whisper, or the folder or Hub name (at `revision`) of one of FAMILIES.
    `layer`: the frames are transformers' hidden_states[layer], 1 ... the number of layers, and nothing above is loaded;
    None: the model's own last output. `dtype` of the weights: None is the checkpoint's, fp32 for openai-whisper.
    Raises InputError.
    """
    path = Path(name_or_path)
    is_openai = not path.is_dir() and (path.suffix == ".pt" or len(path.parts) == 1)
    if is_openai and revision:
        raise InputError(
            f"{path}: revision {revision} of an openai-whisper model; wanted none, for they have no others"
        )
    wanted = "a name or .pt file of openai-whisper, or a folder or Hub name in transformers' format"
    with told_in_one_line(str(path), "a speech encoder", wanted):
        if is_openai:
            config, weights = read_openai(str(path))
            feature_extractor = transformers.WhisperFeatureExtractor(config.num_mel_bins)
        else:
            config, weights = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision), None
            if config.model_type not in FAMILIES:
                raise InputError(f"{path}: a model of type {config.model_type}; wanted one of {', '.join(FAMILIES)}")
            config = getattr(config, "encoder_config", config)  # Parakeet's and Canary's
            feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(name_or_path, revision=revision)
        set_output(config, layer)
        model = load_model(name_or_path, config, weights, dtype=dtype or "auto", revision=revision or "main")
    if feature_extractor.sampling_rate != SAMPLE_RATE:
        raise InputError(f"{path}: an encoder of {feature_extractor.sampling_rate} Hz audio; wanted {SAMPLE_RATE} Hz")
    return SpeechEncoder(model, feature_extractor).requires_grad_(False).eval()


def read_openai(name_or_path: str) -> tuple[transformers.WhisperConfig, dict[str, Tensor]]:
    """The config and weights of an openai-whisper encoder, as transformers has them."""
    import whisper

    loaded = whisper.load_model(name_or_path, device="cpu")
    dims = loaded.dims
    config = transformers.WhisperConfig(
        num_mel_bins=dims.n_mels,
        max_source_positions=dims.n_audio_ctx,
        d_model=dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
    )
    return config, rename(loaded.encoder.state_dict(), OPENAI_NAMES)


def rename(weights: dict[str, Tensor], pairs: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights with (old, new) parts of their names replaced in order."""
    renamed = {}
    for name, weight in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = weight
    return renamed


def set_output(config: PreTrainedConfig, layer: int | None) -> None:
    """Make the config that of an encoder whose output is hidden_states[layer], with nothing random but dropout."""
    off = {"layerdrop": 0.0, "encoder_layerdrop": 0.0}
    config.apply_spec_augment = False  # data2vec's config leaves it out, and its model then masks
    if layer is not None:
        last = config.num_hidden_layers
        if not 1 <= layer <= last:
            raise InputError(f"encoder layer {layer}: wanted 1 ... {last}, or none for the model's own last output")
        # hidden_states come from before the final norm, except for the last one of Whisper
        is_normed = layer == last and config.model_type == "whisper"
        config.has_final_norm = is_normed and getattr(config, "has_final_norm", True)
        config.num_hidden_layers = layer
        off |= {"add_adapter": False, "use_intermediate_ffn_before_adapter": False}
    for option, value in off.items():
        if hasattr(config, option):
            setattr(config, option, value)


def load_model(name: str, config: PreTrainedConfig, weights: dict[str, Tensor] | None, **options) -> PreTrainedModel:
    """The transformers module of a config."""
    loader = WhisperEncoder if config.model_type == "whisper" else transformers.AutoModel
    if config.model_type in ("whisper", "parakeet_encoder"):  # a model with a head or decoder, perhaps
        options["key_mapping"] = {r"^model\.encoder\.": "", r"^encoder\.": ""}
    may_lack = ("masked_spec_embed",)  # for SpecAugment
    return load_pretrained(loader, name, weights, may_lack, config=config, **options)


class SpeechEncoder(nn.Module):
    """A transformers encoder (`model`) and its `feature_extractor`, for clips of any length in one batch.

    What transformers leaves to the padding is mended here: Whisper's own forward wants exactly 30 s and cannot mask,
    group norms take the mean of the whole row, and some convolutions see what biases and norms made of the padding.
    """

    def __init__(self, model: PreTrainedModel, feature_extractor: FeatureExtractionMixin):
        super().__init__()
        self.model, self.feature_extractor, config = model, feature_extractor, model.config
        self.input_name, self.is_whisper = model.main_input_name, isinstance(model, WhisperEncoder)
        wave_count = getattr(model, "_get_feat_extract_output_lengths", None)
        self.count_frames = wave_count or model._get_subsampling_output_length
        self.has_adapter = getattr(config, "add_adapter", False)  # strided convolutions behind the last layer
        self.output_size = config.output_hidden_size if self.has_adapter else config.hidden_size
        if not getattr(config, "has_final_norm", True):
            final_norm(model).register_forward_hook(skip)
        if hasattr(model, "freeze_feature_encoder"):  # convolutions that want gradients whenever they are training
            model.freeze_feature_encoder()
        if hasattr(model, "masked_spec_embed"):
            model.masked_spec_embed = None  # SpecAugment's, which is off: no gradient would reach it
        self.norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        for norm in self.norms:
            norm.__class__ = ClipNorm
        stages = [(0, model.encoder)] if hasattr(model, "encoder") else []
        stages += enumerate(model.adapter.layers) if self.has_adapter else []
        for depth, stage in stages:
            for conv in stage.modules():
                if isinstance(conv, nn.Conv1d) and conv.padding != (0,):
                    conv.register_forward_pre_hook(partial(self.zero_padding, depth))

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Samples (A, S) or features (A, F, M), with valid lengths (A,) -> frames (A, T, D).

        Frames past `output_lengths` are garbage; so are all frames of a clip that is too short for one.
        """
        lengths = torch.where(self.output_lengths(lengths) > 0, lengths, features.shape[1])  # no mask may be empty
        features = features.to(self.model.dtype)
        if self.is_whisper:
            return self.whisper_frames(features, lengths)
        for norm in self.norms:  # behind the first convolution
            norm.lengths = (lengths - self.model.config.conv_kernel[0]) // self.model.config.conv_stride[0] + 1
        self.frame_lengths = self.count_frames(lengths, **{"add_adapter": False} if self.has_adapter else {})
        return self.model(features, attention_mask=valid(lengths, features.shape[1]).long()).last_hidden_state

    def whisper_frames(self, features: Tensor, lengths: Tensor) -> Tensor:
        model, x = self.model, features.transpose(1, 2)
        x = F.gelu(model.conv1(x)) * valid(lengths, x.shape[2]).unsqueeze(1)  # else its bias leaks through conv2
        x = F.gelu(model.conv2(x)).transpose(1, 2)  # (A, T, D)
        assert x.shape[1] <= model.config.max_source_positions, f"{x.shape[1]} frames; Whisper's positions end at 30 s"
        x = x + model.embed_positions(torch.arange(x.shape[1], device=x.device))
        mask = valid(self.output_lengths(lengths), x.shape[1])[:, None, None]  # (A, 1, 1, T)
        for layer in model.layers:
            x = layer(x, mask)
        return model.layer_norm(x)

    def zero_padding(self, depth: int, conv: nn.Conv1d, inputs: tuple[Tensor]) -> Tensor:
        """Zeros where the padding is in a convolution's input (A, D, T), after `depth` layers of an adapter."""
        lengths = self.frame_lengths
        for _ in range(depth):
            lengths = (lengths - 1) // self.model.config.adapter_stride + 1
        return inputs[0] * valid(lengths, inputs[0].shape[2]).unsqueeze(1)

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        """Valid frames of so many samples or feature frames."""
        if isinstance(lengths, int):
            return int(self.output_lengths(torch.tensor(lengths)))
        return self.count_frames(lengths).long().clamp(min=0)

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """Write what load_encoder(folder) needs: config.json, model.safetensors, preprocessor_config.json."""
        options |= {"save_original_format": False}  # True: with the prefixes of a whole model
        self.model.save_pretrained(folder, **options)
        self.feature_extractor.save_pretrained(folder)


class ClipNorm(nn.GroupNorm):
    """A group norm that takes each clip's mean over its own frames: `lengths` (A,) are set before the call."""

    def forward(self, x: Tensor) -> Tensor:  # (A, C, T)
        normed = torch.zeros_like(x)
        for row, length in enumerate(self.lengths.tolist()):
            normed[row, :, :length] = super().forward(x[row : row + 1, :, :length])[0]
        return normed


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm behind the last layer; a module of no effect if there is none."""
    if isinstance(model, WhisperEncoder):
        return model.layer_norm
    if getattr(model.config, "do_stable_layer_norm", False) or model.config.model_type == "wav2vec2-conformer":
        return model.encoder.layer_norm
    return nn.Identity()


def skip(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook that undoes the module."""
    return inputs[0]


def valid(lengths: Tensor, size: int) -> Tensor:
    """(A, size), True where a position lies inside its row's length."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def extract(feature_extractor: FeatureExtractionMixin, samples: np.ndarray, pad_to_30s: bool = False) -> Tensor:
    """What an encoder takes of a clip (S,): its features (F, M), or its samples (S,), normalised if it wants that."""
    if pad_to_30s:
        samples = np.pad(samples, (0, max(WINDOW - len(samples), 0)))
    options = {"padding": "longest", "truncation": False}  # Whisper's extractor would make 30 s of everything
    options |= {"return_attention_mask": True, "return_tensors": "pt", "sampling_rate": SAMPLE_RATE}
    inputs = feature_extractor(samples, **options)
    features, mask = inputs[feature_extractor.model_input_names[0]][0], inputs["attention_mask"][0]
    features = features.T if isinstance(feature_extractor, transformers.WhisperFeatureExtractor) else features
    return features[: mask.sum()]
