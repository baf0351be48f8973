"""SpeechLLM: a frozen speech encoder, a trained projector, a frozen LLM.

    model = SpeechLLM.from_pretrained("run")
    model.transcribe("a.wav")  # -> "the transcript"

Shapes: B batch, A audio windows in the batch, S samples (16 kHz), M mel bins, F feature frames (10 ms), T encoder
frames, N speech embeddings, L tokens, K last tokens with labels, D encoder width, H LLM width, V vocabulary.
"""

import copy
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import type_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, WhisperFeatureExtractor
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersWhisper

from dataset import IGNORE, PLAIN_TEMPLATE, SILENCE, WINDOW, SpeechDataset, collate, length_mask, render_prompt
from errors import BadUtterance, InputError, as_input_error, load_pretrained, nearest
from manifest import AUDIO, BOUNDARY, PROMPT, SAMPLE_RATE, SPEECH, DecodingOptions, Hypothesis, Records, option

FROZEN = [r"^encoder\.", r"^llm\."]  # patterns of parameter names that are not trained, unless other ones are given
LORA = r"\.lora_"  # in the name of every parameter of LoRA
RANGES = {"encoder_dropout": (0, 1), "lora_dropout": (0, 1), "lora_r": (0, 1e9), "encoder_lora_r": (0, 1e9)}
RANGES |= {f"projector_{name}": (1, 1e9) for name in ("stride", "hidden_size", "num_layers")}
SHORT_PROMPT = 8  # tokens before <audio>; what the LLM makes of more is computed once, not for every batch
AUDIO_OF_BATCH = {"input_features", "input_values", "feature_lengths"}  # a batch of `collate` has two of them
INPUTS = AUDIO_OF_BATCH | {"audio_attention_mask", "speech_embeds", "input_ids", "attention_mask"}


# Config


@dataclass
class ModelArguments:
    """What a model is made of: flags of train.py, keywords of `from_parts`, fields of a checkpoint's config.json."""

    encoder_name_or_path: str | None = option(None, "tiny ... large-v3-turbo, a .pt file, a folder or a Hub name")
    encoder_revision: str | None = option(None, "branch, tag or commit on the Hub")
    encoder_layer: int | None = option(None, "take the output of this layer, 1 = the first (default: the last)")
    encoder_dropout: float = option(0.0, "dropout on the encoder's frames, in training only; from 0 to below 1")
    encoder_lora_r: int = option(0, "rank of LoRA on the encoder; 0 = none")
    pad_to_30s: bool = option(False, "pad every clip to 30 s, as Whisper was trained")
    llm_model_name_or_path: str | None = option(None, "the LLM: a folder or a Hub name")
    llm_revision: str | None = option(None, "branch, tag or commit on the Hub")
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of frozen weights; auto = that of the LLM")
    quantize: Literal["4bit", "8bit"] | None = option(None, "hold the frozen LLM so, by bitsandbytes on a GPU")
    lora_r: int = option(0, "rank of LoRA on the LLM; 0 = none")
    lora_alpha: float = option(16.0, "LoRA's output is scaled by alpha / rank")
    lora_dropout: float = option(0.0, "dropout on LoRA's input, in training only; from 0 to below 1")
    lora_target_modules: list[str] = option([], "names of linear layers, or all-linear (default: queries and values)")
    projector: str = option("conv1d", "conv1d, linear, mlp, conformer or qformer")
    projector_stride: int = option(5, "encoder frames joined into one embedding")
    projector_hidden_size: int = option(2048, "width inside the projector; take 512 for conformer and qformer")
    projector_num_layers: int = option(2, "hidden layers (mlp), Conformer layers, Q-Former blocks")
    projector_activation: str = option("relu", "activation inside the projector: relu, gelu, silu ...")
    audio_boundary_tokens: bool = option(False, "a learned vector before and after each clip")
    prompt: str = option(PROMPT, "the user's turn, with <audio> in it")
    system_prompt: str | None = option(None, "the system's turn (default: as the chat template has it)")
    chat_template: str | None = option(None, "FILE.jinja (or its text) in place of the tokenizer's own template")
    freeze_params: list[str] = option(FROZEN, "regular expressions: parameters with such names are not trained")
    prevent_freeze_params: list[str] = option([], "regular expressions: exceptions from --freeze_params")


class SpeechLLMConfig(PreTrainedConfig, ModelArguments):
    """The fields of config.json. Raises InputError for a field that does not exist, or a value that does not do."""

    model_type = "speech_llm"
    PARTS = (("encoder_name_or_path", "encoder_revision"), ("llm_model_name_or_path", "llm_revision"))  # frozen

    encoder_size: int = 0  # D, filled in when the model is put together
    hidden_size: int = 0  # H
    origin: dict | None = None  # where frozen parts that lie beside config.json came from: names and commits
    training: dict | None = None  # data, steps and error rate of the run that made the weights

    @classmethod
    def own_fields(cls) -> dict[str, Any]:
        """Name -> type of our fields, and of those of a subclass, without the fields of transformers' config."""
        classes = [part for part in reversed(cls.__mro__) if part not in PreTrainedConfig.__mro__]
        return {name: kind for part in classes for name, kind in inspect.get_annotations(part).items()}

    def __post_init__(self, **kwargs):
        types = self.own_fields()
        for name in kwargs.keys() - {"model_type", "name_or_path", "_commit_hash"}:
            hint = nearest(name, list(types)) or f"; wanted one of {sorted(types)}"
            raise InputError(f"config: unknown field {name!r}{hint}")
        for name, kind in types.items():
            if kind is float and type(getattr(self, name)) is int:
                setattr(self, name, float(getattr(self, name)))  # an int is a float here
            try:
                type_validator(name, getattr(self, name), kind)
            except TypeError as error:
                raise InputError(f"config: {' '.join(str(error).split())}") from None
        for name, (least, limit) in RANGES.items():
            if not least <= getattr(self, name) < limit:
                raise InputError(f"config: {name} is {getattr(self, name)}; wanted {least} or more, below {limit:g}")
        if self.projector_activation not in ACT2FN:
            names = ", ".join(sorted(ACT2FN))
            raise InputError(f"config: projector_activation is {self.projector_activation}; wanted one of {names}")
        if self.chat_template and "{" not in self.chat_template and AUDIO not in self.chat_template:  # a file's name
            with as_input_error(f"--chat_template {self.chat_template}", "read it", "a Jinja file in UTF-8"):
                self.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """What config.json holds: our fields. transformers' say nothing of such a model, and Trainer adds more."""
        values = {name: getattr(self, name) for name in self.own_fields()}
        return copy.deepcopy({"model_type": self.model_type, "architectures": self.architectures} | values)


# Whisper

# Parts of the names of an encoder's weights: openai-whisper's -> transformers', replaced in this order.
OPENAI_NAMES = {
    "blocks.": "layers.", "attn_ln.": "self_attn_layer_norm.", "mlp_ln.": "final_layer_norm.",
    "mlp.0.": "fc1.", "mlp.2.": "fc2.", "attn.query.": "self_attn.q_proj.", "attn.key.": "self_attn.k_proj.",
    "attn.value.": "self_attn.v_proj.", "attn.out.": "self_attn.out_proj.", "ln_post.": "layer_norm.",
    "positional_embedding": "embed_positions.weight",
}  # fmt: skip


class WhisperEncoder(nn.Module):
    """Whisper's encoder for clips of any length in one batch: features (A, F, M) -> frames (A, T, D), T = F / 2.

    transformers' own forward wants exactly 30 s and cannot mask; this one masks the padding in the attention and zeroes
    it between the convolutions, so that it changes no frame of any clip.
    """

    lora_targets = None  # names of linear layers for LoRA; None = the usual queries and values

    def __init__(self, model: TransformersWhisper, feature_extractor: WhisperFeatureExtractor):
        super().__init__()
        self.model, self.feature_extractor = model, feature_extractor
        self.extract = partial(log_mel, feature_extractor)  # goes to loader processes, without the weights
        self.output_size = model.config.d_model  # D
        self.has_final_norm = model.config.to_dict().get("has_final_norm", True)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Log-mel features (A, F, M), zero behind `lengths` (A,) -> frames (A, T, D), valid up to `output_lengths`."""
        model = self.model
        x = features.to(model.dtype).transpose(1, 2)  # (A, M, F)
        x = F.gelu(model.conv1(x))  # (A, D, F)
        x = x * length_mask(lengths, x.shape[2]).unsqueeze(1)  # or conv1's bias would leak from the padding into conv2
        x = F.gelu(model.conv2(x)).transpose(1, 2)  # (A, T, D)
        assert x.shape[1] <= model.config.max_source_positions, f"{x.shape[1]} frames; Whisper's positions end at 30 s"
        x = x + model.embed_positions(torch.arange(x.shape[1], device=x.device))  # sines, (T, D)
        mask = length_mask(self.output_lengths(lengths), x.shape[1])[:, None, None]  # (A, 1, 1, T)
        for layer in model.layers:
            x = layer(x, mask)  # (A, T, D)
        return model.layer_norm(x) if self.has_final_norm else x

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        """Valid frames of so many feature frames; conv2 has stride 2."""
        return lengths.clamp(min=0).add(1) // 2 if isinstance(lengths, Tensor) else max(lengths + 1, 0) // 2

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json, for load_encoder(folder)."""
        self.model.save_pretrained(folder, save_original_format=False, **options)  # without prefixes in the names
        self.feature_extractor.save_pretrained(folder)


def log_mel(feature_extractor: WhisperFeatureExtractor, samples: np.ndarray) -> Tensor:
    """Samples (S,) -> Whisper's log-mel features (F, M), a frame every 10 ms, without padding to 30 s."""
    options = {"padding": "longest", "truncation": False, "return_tensors": "pt", "sampling_rate": SAMPLE_RATE}
    return feature_extractor(samples, **options).input_features[0].T  # (M, F) -> (F, M)


def load_encoder(
    name_or_path: str, revision: str | None = None, layer: int | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The speech encoder of a checkpoint, without heads and decoders, frozen and in eval mode; see encoders.py.

    `name_or_path`: a name or .pt file of openai-whisper, or a folder or Hub name (at `revision`) of a Whisper or a
    family of encoders.py. `layer`: the frames are transformers' hidden_states[layer], 1 ... the number of layers, and
    nothing above is loaded; None: the last output. `dtype`: None is the checkpoint's, fp32 for openai-whisper.
    """
    name, path = str(name_or_path), Path(name_or_path)
    has_kind = ":" in name and not path.exists()  # KIND:PLACE, for encoders that are not of transformers
    wanted = "a name or .pt file of openai-whisper, or a folder or Hub name in transformers' format"
    with as_input_error(name, "load a speech encoder", wanted):
        if not (has_kind or path.is_dir()) and (path.suffix == ".pt" or len(path.parts) == 1):
            if revision:
                raise InputError(f"{name}: revision {revision} of an openai-whisper model, which has none")
            encoder = load_openai_whisper(name, layer, dtype)
        else:
            import encoders  # an option

            encoder = encoders.load(name, revision, layer, dtype, WhisperEncoder)
    return encoder.requires_grad_(False).eval()  # apply_freezing decides what of it is trained after all


def load_openai_whisper(name_or_path: str, layer: int | None, dtype: torch.dtype | None) -> WhisperEncoder:
    """The encoder of an openai-whisper model, in the layers of transformers."""
    import whisper  # here, because it takes half a second

    model = whisper.load_model(name_or_path, device="cpu")
    dims = model.dims  # openai-whisper's names of the sizes
    sizes = {"d_model": dims.n_audio_state, "encoder_ffn_dim": 4 * dims.n_audio_state}
    sizes |= {"encoder_layers": dims.n_audio_layer, "encoder_attention_heads": dims.n_audio_head}
    config = transformers.WhisperConfig(num_mel_bins=dims.n_mels, max_source_positions=dims.n_audio_ctx, **sizes)
    if layer is not None:
        import encoders  # an option

        encoders.keep_whisper_layers(config, layer)
    with torch.device("meta"):  # no memory and no random numbers for weights that come from the checkpoint
        encoder = TransformersWhisper(config)  # layers without weights
    weights = {transformers_name(name): weight for name, weight in model.encoder.state_dict().items()}
    weights = {name: weights[name].to(dtype or torch.float32) for name in encoder.state_dict()}  # no layers above
    encoder.load_state_dict(weights, assign=True)  # the tensors themselves, no copies
    return WhisperEncoder(encoder, WhisperFeatureExtractor(dims.n_mels))


def transformers_name(name: str) -> str:
    """The name in transformers of a weight of openai-whisper's encoder."""
    for openai, ours in OPENAI_NAMES.items():
        name = name.replace(openai, ours)
    return name


# The projector


class Conv1dProjector(nn.Module):
    """One LLM embedding per `projector_stride` encoder frames: (A, T, D) -> (A, N, H), N = T // stride.

    Convolution with kernel = stride, activation, Linear, activation, Linear. A tail shorter than the stride is dropped.
    50 Hz frames and stride 5 give 10 Hz. The parameters have the names that published checkpoints have.
    """

    def __init__(self, encoder_size: int, llm_size: int, config: SpeechLLMConfig):
        super().__init__()
        self.stride = config.projector_stride
        self.conv = nn.Conv1d(encoder_size, encoder_size, kernel_size=self.stride, stride=self.stride)
        self.activation = ACT2FN[config.projector_activation]
        self.linear1 = nn.Linear(encoder_size, config.projector_hidden_size)  # D -> hidden
        self.linear2 = nn.Linear(config.projector_hidden_size, llm_size)  # hidden -> H

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        frames = frames.to(self.conv.weight.dtype)  # bf16 of a frozen encoder -> fp32 of trained weights
        x = self.activation(self.conv(frames.transpose(1, 2)).transpose(1, 2))  # (A, N, D)
        return self.linear2(self.activation(self.linear1(x)))  # (A, N, H)

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return lengths // self.stride  # valid frames (A,) -> valid embeddings (A,)


def build_projector(config: SpeechLLMConfig, encoder_size: int, llm_size: int) -> nn.Module:
    """The projector that the config names, with random weights. Raises InputError."""
    if config.projector == "conv1d":
        return Conv1dProjector(encoder_size, llm_size, config)
    from projectors import PROJECTORS  # an option

    if config.projector not in PROJECTORS:
        raise InputError(f"projector {config.projector!r}: wanted one of {sorted(['conv1d', *PROJECTORS])}")
    return PROJECTORS[config.projector](encoder_size, llm_size, config)  # every projector has these arguments


# The LLM


def load_llm(
    config: SpeechLLMConfig, device=None, **options
) -> tuple[transformers.PreTrainedTokenizerBase, PreTrainedModel]:
    """(tokenizer, causal LLM) of a config, on the device; `options` are those of from_pretrained. Raises InputError."""
    if config.quantize:
        from quantize import quantization_config  # an option

        options["quantization_config"] = quantization_config(config.quantize)
    name, source = config.llm_model_name_or_path, {"revision": config.llm_revision, "trust_remote_code": False}
    options |= source | {"dtype": config.frozen_dtype, "device_map": {"": device} if device else None}
    with as_input_error(name, "load the LLM", "a folder or Hub name of a causal LLM, with its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        llm = load_pretrained(transformers.AutoModelForCausalLM, name, **options)
    if not tokenizer("Transcribe the speech").input_ids:
        raise InputError(f"{name}: a tokenizer without a vocabulary; wanted its tokenizer.json or the like")
    return tokenizer, llm


# The model


class SpeechLLM(PreTrainedModel):
    """A speech recogniser of which, by default, the projector alone is trained.

    Put together from ready modules; `from_parts` and `from_pretrained` load them. Frozen parts keep their dtype and
    eval mode. Raises InputError for parts, a prompt or freeze patterns that do not go together.
    """

    config_class = SpeechLLMConfig
    supports_gradient_checkpointing = True  # in layers of the encoder and the LLM
    accepts_loss_kwargs = True  # tells Trainer that forward divides by num_items_in_batch

    def __init__(self, config: SpeechLLMConfig, encoder: nn.Module, projector: nn.Module, llm: nn.Module, tokenizer):
        super().__init__(copy.deepcopy(config))  # the caller's stays as it is
        self.llm, self.encoder, self.projector, self.tokenizer = llm, encoder, projector, tokenizer
        self.feature_extractor = getattr(encoder, "feature_extractor", None)  # of transformers, for inputs.py
        text_config = llm.config.get_text_config()
        self.config.encoder_size, self.config.hidden_size = encoder.output_size, text_config.hidden_size
        self.max_length = text_config.max_position_embeddings  # LLM positions
        if config.audio_boundary_tokens:
            self.boundary = nn.Embedding(2, text_config.hidden_size)  # before and after a clip
            nn.init.normal_(self.boundary.weight, std=0.02)
        # [length of features] -> speech embeddings: with this table datasets need no model in their processes.
        self.embedding_counts = self.num_embeddings(torch.arange(WINDOW + 1)).int().numpy()
        if not self.embedding_counts[len(encoder.extract(np.zeros(SILENCE, np.float32)))]:
            raise InputError(f"projector_stride {config.projector_stride}: 2 s of audio give not one embedding")
        self.label_smoothing = 0.0  # in training
        self.is_merged = False  # LoRA has gone into the weights of the LLM or the encoder
        self.ever_trained: set[str] = set()  # names of parameters that were loaded, or unfrozen for a time: saved

        self.set_prompt()
        # PyTorch would multiply the slice that logits_to_keep takes row by row, reading the whole matrix for each.
        llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if config.lora_r or config.encoder_lora_r or config.lora_target_modules:
            import lora  # an option

            lora.add_to_parts(llm, encoder, self.config)  # before apply_freezing, which exempts it
        self.apply_freezing()  # sets requires_grad
        self.eval()

    @classmethod
    def from_config(cls, config: SpeechLLMConfig, device: str | torch.device | None = None, **options) -> "SpeechLLM":
        """An untrained model with the parts that the config names; `options` are load_llm's. Raises InputError."""
        if not config.encoder_name_or_path or not config.llm_model_name_or_path:
            raise InputError("wanted an encoder and an LLM: --encoder_name_or_path and --llm_model_name_or_path")
        tokenizer, llm = load_llm(config, device, **options)
        encoder = load_encoder(config.encoder_name_or_path, config.encoder_revision, config.encoder_layer, llm.dtype)
        projector = build_projector(config, encoder.output_size, llm.config.get_text_config().hidden_size)  # D -> H
        model = cls(config, encoder, projector, llm, tokenizer)
        for part in set(model.children()) - {llm}:
            part.to(device or llm.device)  # the LLM was loaded there
        for part, revision in config.PARTS:  # absolute paths, and the commits that Hub names stand for today
            name, version = getattr(config, part), getattr(config, revision)
            if Path(name).exists():
                setattr(model.config, part, str(Path(name).absolute()))
                if version:
                    raise InputError(f"{name}: revision {version} of local files; wanted none, or a Hub name")
            elif "/" in name and ":" not in name:
                import hub  # an option

                setattr(model.config, revision, hub.commit_of(name, version))
        return model

    @classmethod
    def from_parts(cls, encoder: str, llm: str, device=None, dtype: str = "auto", **others) -> "SpeechLLM":
        """An untrained model; the others are fields of SpeechLLMConfig, `dtype` is that of the frozen weights."""
        names = {"encoder_name_or_path": str(encoder), "llm_model_name_or_path": str(llm)}
        return cls.from_config(cls.config_class(**names, frozen_dtype=dtype, **others), device)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision=None, device=None, token=None, dtype: str | None = None, **overrides
    ) -> "SpeechLLM":
        """The model of a folder that was saved, a training checkpoint, a Hub name, or a .safetensors file.

        `overrides` are fields of its config. Where there is no config.json they can name the parts in its stead.
        """
        overrides |= {"frozen_dtype": dtype} if dtype else {}
        path = Path(name_or_path)
        if not path.is_dir() and path.suffix != ".safetensors":
            import hub  # an option

            path = hub.download(str(name_or_path), revision, token)
        elif revision:
            raise InputError(f"{name_or_path}: revision {revision} of local files; wanted none, or a Hub name")
        weights = path / "model.safetensors" if path.is_dir() else path  # the file itself, beside its config.json
        model = cls.from_config(load_config(weights.parent, cls.config_class, **overrides), device)
        model.load_trained(weights)
        return model

    # What the LLM reads

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def num_embeddings(self, feature_lengths: Tensor | int) -> Tensor | int:
        """Speech embeddings made of so many feature frames, or samples."""
        return self.projector.output_lengths(self.encoder.output_lengths(feature_lengths))  # F -> T -> N

    def make_dataset(self, records: Records | Sequence[dict], **options) -> SpeechDataset:
        """SpeechDataset of records (or a list of dicts) for this model; `options` are fields of SpeechDataset."""
        if isinstance(records, list):
            from sources import RecordList  # an option

            records = RecordList(records)
        options |= {n: getattr(self.config, n) for n in "prompt system_prompt pad_to_30s audio_boundary_tokens".split()}
        return SpeechDataset(records, self.tokenizer, self.encoder.extract, self.embedding_counts, **options)

    def set_prompt(self) -> None:
        """Give the tokenizer its chat template, and the LLM its stop tokens; check the prompt."""
        config, tokenizer = self.config, self.tokenizer
        if config.chat_template:
            tokenizer.chat_template = config.chat_template
        elif tokenizer.chat_template is None:  # of a base LLM
            warnings.warn(f"{tokenizer.name_or_path}: no chat template; taking a plain one, 'user: ...'", stacklevel=2)
            tokenizer.chat_template = PLAIN_TEMPLATE
        try:
            pieces, end_id = render_prompt(tokenizer, config.prompt, config.system_prompt)
        except BadUtterance as error:
            raise InputError(f"{error}; wanted another --system_prompt, --prompt or --chat_template") from None
        if len(pieces) != 2:
            raise InputError(f"prompt {config.prompt!r}: wanted {AUDIO} in it or in --chat_template, once")
        self.prompt_ids = pieces[0]  # token ids up to <audio>
        stop_ids = np.atleast_1d(self.llm.generation_config.eos_token_id).tolist()  # one, several or None
        stop_ids = sorted({end_id, tokenizer.eos_token_id, *stop_ids} - {None})  # any of them ends an answer
        # The LLM's own defaults (Qwen2: sampling, a repetition penalty) are for chat.
        self.llm.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=end_id)

    def embed_speech(self, feature_lengths: Tensor, input_features=None, input_values=None) -> Tensor:
        """Speech embeddings (sum of N, H), those of each clip in turn, of features (A, F, M) or samples (A, S)."""
        features = input_values if input_features is None else input_features  # (A, S) or (A, F, M)
        is_trained = any(p.requires_grad for p in self.encoder.parameters())
        lengths = torch.where(feature_lengths > 0, feature_lengths, features.shape[1])  # no mask may be empty
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):  # a frozen encoder keeps no activations
            frames = self.encoder(features, lengths)  # (A, T, D)
        frames = F.dropout(frames, self.config.encoder_dropout, self.training)
        frame_lengths = self.encoder.output_lengths(feature_lengths)  # (A,)
        speech_embeds = self.projector(frames, frame_lengths)  # (A, N, H)
        return speech_embeds[length_mask(self.projector.output_lengths(frame_lengths), speech_embeds.shape[1])]

    def embed_batch(self, batch: dict) -> Tensor:
        """Speech embeddings (sum of N, H) of a batch of `collate`."""
        return self.embed_speech(**{name: batch[name].to(self.device) for name in AUDIO_OF_BATCH & batch.keys()})

    def splice(self, input_ids: Tensor, speech_embeds: Tensor) -> Tensor:
        """Embeddings (B, L, H) of input_ids (B, L), with the speech embeddings in the SPEECH positions, in order."""
        is_speech, num_embeds = input_ids == SPEECH, len(speech_embeds)  # (B, L)
        if is_speech.sum() != num_embeds:
            raise ValueError(f"{is_speech.sum()} speech positions in the prompts, {num_embeds} speech embeddings")
        embeds = self.get_input_embeddings()(input_ids.clamp(min=0))  # (B, L, H)
        if self.config.audio_boundary_tokens:
            for placeholder, vector in zip(BOUNDARY, self.boundary.weight, strict=True):
                embeds = torch.where((input_ids == placeholder).unsqueeze(2), vector.to(embeds.dtype), embeds)
        return embeds.masked_scatter(is_speech.unsqueeze(2), speech_embeds.to(embeds.dtype))

    def inputs_for_llm(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, speech_embeds=None, **audio
    ) -> dict[str, Tensor]:
        """inputs_embeds (B, L, H) and attention_mask (B, L) of text and audio together.

        `audio` is input_features or input_values with feature_lengths, as `collate` makes them, or without, as
        feature_extractor does (see inputs.py). `speech_embeds`, made by embed_speech before, stand for all of it.
        """
        if speech_embeds is None and "feature_lengths" not in audio:
            import inputs  # an option

            prompt = render_prompt(self.tokenizer, self.config.prompt, self.config.system_prompt)[0]
            options = self.encoder, self.num_embeddings, prompt, self.config.audio_boundary_tokens
            input_ids, attention_mask, audio = inputs.batch_from_tensors(input_ids, attention_mask, audio, *options)
        if speech_embeds is None:
            speech_embeds = self.embed_speech(**audio)  # (sum of N, H)
        return {"inputs_embeds": self.splice(input_ids, speech_embeds), "attention_mask": attention_mask}

    # Training

    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch=None, index=None, bad=None, **inputs: Tensor
    ) -> CausalLMOutput:
        """Logits, and the loss if there are labels; inputs are those of `inputs_for_llm`.

        Labels (B, K) are those of the last K positions, and logits (B, K, V) predict these; of K = L labels the first,
        which nothing predicts, does not count. Without labels logits (B, L, V) are of all. The loss is summed over the
        trained tokens and divided by num_items_in_batch: those of the optimiser's step on all devices, or, if None, of
        this batch. `index` and `bad` come with a batch of `collate` and are not used here.
        """
        inputs = self.inputs_for_llm(**inputs) | {"use_cache": False}
        mask = inputs["attention_mask"]  # (B, L)
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # padding is on the left: text starts at position 0
        if labels is None:
            return CausalLMOutput(logits=self.llm(**inputs).logits)
        if labels.ndim != 2 or len(labels) != len(mask) or labels.shape[1] > mask.shape[1]:
            raise ValueError(f"labels: found shape {tuple(labels.shape)} for positions of shape {tuple(mask.shape)}")
        labels = labels[:, -(mask.shape[1] - 1) :]  # K is at most L - 1: nothing predicts the first position
        if len(self.prompt_ids) > SHORT_PROMPT:
            import prompt_once  # an option

            inputs = prompt_once.for_training(self.llm, self.prompt_ids, inputs, labels)
        # Position i predicts label i + 1: take the logits of the last K + 1 positions, without those of the very last.
        logits = self.llm(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()  # (B, K, V)
        options = {"reduction": "sum", "label_smoothing": self.label_smoothing if self.training else 0.0}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, **options)
        num_tokens = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / max(num_tokens, 1), logits=logits)

    # Decoding

    @torch.no_grad()
    def generate(self, *, prompts: list[list[dict]] | None = None, **options) -> Tensor:
        """Ids (B, new) of the answers to `prompts`, or to the inputs of `inputs_for_llm`.

        A prompt is a conversation: turns with role, content (with <audio>) and audio (a list of files or samples).
        `options` are these inputs and those of transformers' generate: num_beams, do_sample, generation_config ...
        """
        tensors = {name: options.pop(name) for name in INPUTS & options.keys()}  # the rest is for transformers
        if prompts is not None:
            import inputs  # an option

            if tensors:
                raise ValueError("wanted prompts, or tensors of audio and text; not both")
            dataset = self.make_dataset(inputs.records_of(prompts), max_length=self.max_length)
            return self.generate(**self.tensors_of(collate(list(dataset), with_targets=False)), **options)
        with self.in_eval_mode():  # in training mode, layers that recompute their activations keep no cache
            llm_inputs = self.inputs_for_llm(**tensors)
            if "feature_lengths" not in tensors:
                import inputs  # an option

                llm_inputs = inputs.pad_to_the_left(**llm_inputs)
            if len(self.prompt_ids) > SHORT_PROMPT:
                import prompt_once  # an option

                llm_inputs = prompt_once.for_decoding(self.llm, self.prompt_ids, llm_inputs, options)
            return self.llm.generate(**llm_inputs, **options)  # from embeddings it returns new tokens alone

    def tensors_of(self, batch: dict) -> dict[str, Tensor]:
        """What `generate` takes of a batch of `collate`, on the model's device."""
        return {k: v.to(self.device) for k, v in batch.items() if k not in ("index", "bad", "labels")}

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Eval mode for a while. A model in eval mode is not touched: another thread may be decoding with it."""
        if was_training := self.training:
            self.eval()
        try:
            yield
        finally:  # also where the caller of a generator stops early
            if was_training:
                self.train()

    def decoding_dataset(self, records: Records | Sequence[dict], options: DecodingOptions) -> SpeechDataset:
        """The dataset of records for `decode`: every line is kept, transcripts are not looked at. Raises InputError."""
        room = self.max_length - options.max_new_tokens  # positions for prompt and speech
        if room < 1:
            raise InputError(f"max_new_tokens {options.max_new_tokens}: the LLM has {self.max_length} positions in all")
        return self.make_dataset(records, on_bad="keep", with_targets=False, max_length=room)

    def decode(
        self, dataset: SpeechDataset, positions=None, batch_size: int = 16, num_workers: int = 0, options=None, **more
    ) -> Iterator[list[Hypothesis]]:
        """Yield the hypotheses of each batch, longest clips first, of the examples at `positions` (default: all).

        The options are a DecodingOptions, more of them its fields. What cannot be read has an empty hypothesis.
        """
        options = replace(options or DecodingOptions(), **more)
        positions = range(len(dataset)) if positions is None else positions  # of the dataset
        order = sorted(positions, key=lambda position: -dataset.seconds[position])
        loading = {"collate_fn": partial(collate, with_targets=False), "num_workers": num_workers}
        with self.in_eval_mode():
            if options.timestamps:
                import long_audio  # an option

                return (yield from long_audio.decode(self, dataset, order, batch_size, options))
            for batch in DataLoader(dataset, batch_size, sampler=order, **loading):
                yield self.decode_batch(batch, dataset, options)

    @torch.no_grad()
    def decode_batch(
        self, batch: dict, dataset: SpeechDataset, options: DecodingOptions, speech_embeds: Tensor | None = None
    ) -> list[Hypothesis]:
        """The hypotheses of a batch of `collate` without targets, whose `speech_embeds` may have been made before."""
        speech_embeds = self.embed_batch(batch) if speech_embeds is None else speech_embeds  # (sum of N, H)
        inputs, nbest = self.tensors_of(batch) | {"speech_embeds": speech_embeds}, options.nbest
        durations = zip(dataset.durations[batch["index"]].tolist(), batch["bad"], strict=True)
        seconds = torch.tensor([s or (0.0 if bad else 1e9) for s, bad in durations])  # (B,), no limit for text alone
        bound = (20 + options.max_tokens_per_second * seconds).minimum(self.max_length - batch["attention_mask"].sum(1))
        limits = bound.clamp(max=options.max_new_tokens).int().to(self.device)  # (B,) new tokens of each clip
        search = {o.name: getattr(options, o.name) for o in fields(options) if "ours" not in o.metadata}
        # Ids (rows, new) -> (rows,): a clip has as many rows as beams or samples, and ends at its own limit.
        search["stopping_criteria"] = [lambda ids, _: ids.shape[1] >= limits.repeat_interleave(len(ids) // len(limits))]
        if options.do_sample or options.repetition_penalty != 1 or options.no_repeat_ngram_size:
            import sampling  # an option

            search |= sampling.keywords(options, batch["index"])
        ids = self.generate(**inputs, **search, num_return_sequences=nbest).cpu()  # (B * nbest, new), the best first
        is_end = torch.isin(ids, torch.tensor(self.llm.generation_config.eos_token_id))  # any of several stop tokens
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1), ids.shape[1]).tolist()  # up to the first
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]  # behind the end there is padding
        texts = self.tokenizer.batch_decode(rows[::nbest], skip_special_tokens=True)  # of the best, (B,)
        most, scores, hypotheses = limits.tolist(), [{}] * len(texts), []
        if options.confidence or nbest > 1:
            import confidence  # an option

            scores = confidence.scores(self, options, inputs, ids, lengths, most)
        for n, (index, bad, text) in enumerate(zip(batch["index"], batch["bad"], texts, strict=True)):
            no_end = None
            if lengths[n * nbest] == most[n]:
                no_end = f"{dataset.records[index]['where']}: no end within {most[n]} new tokens"
            scored = Hypothesis(index, " ".join(text.split()), no_end, **scores[n])
            hypotheses.append(Hypothesis(index, "", bad) if bad else scored)
        return hypotheses

    def transcribe(self, audio, batch_size: int = 16, num_workers: int = 0, **keywords) -> str | list:
        """The transcript of an audio file (or of samples (S,) at 16 kHz); of a list, the list of transcripts.

        `keywords` are fields of DecodingOptions. With timestamps=True the audio may last hours, and a transcript is a
        list of segments. What cannot be read has an empty transcript, and a warning says why.
        """
        options, clips = DecodingOptions(**keywords), audio if isinstance(audio, (list, tuple)) else [audio]
        if options.nbest > 1 or options.confidence:
            raise InputError("transcribe gives texts alone; wanted decode, for nbest and confidence")
        records = [{"wav": clip, "where": f"audio {number}"} for number, clip in enumerate(clips, 1)]
        batches = self.decode(self.decoding_dataset(records, options), None, batch_size, num_workers, options)
        hypotheses = sorted(sum(batches, []), key=lambda hypothesis: hypothesis.index)  # the longest come first
        for hypothesis in hypotheses:
            if hypothesis.problem:
                warnings.warn(hypothesis.problem, stacklevel=2)
        texts = [hypothesis.segments if options.timestamps else hypothesis.text for hypothesis in hypotheses]
        return texts if clips is audio else texts[0]

    # What is trained

    def apply_freezing(self) -> None:
        """Train what no pattern of freeze_params matches by name, or one of prevent_freeze_params does."""
        config = self.config
        exceptions = config.prevent_freeze_params + [LORA] * bool(config.lora_r or config.encoder_lora_r)
        named = list(self.named_parameters(remove_duplicate=False))  # tied weights come twice, by two names
        matches: dict[str, set[nn.Parameter]] = {}  # by pattern
        for pattern in [*config.freeze_params, *exceptions]:
            with as_input_error(f"freeze pattern {pattern!r}", "read it", "a regular expression"):
                matches[pattern] = {parameter for name, parameter in named if re.search(pattern, name)}
            if not matches[pattern] and pattern not in FROZEN:  # some encoder may have no parameters
                examples = ", ".join(name for name, _ in named[:: len(named) // 4])
                raise InputError(f"freeze pattern {pattern!r} matches no parameter; there are {examples} ...")
        frozen = {parameter for pattern in config.freeze_params for parameter in matches[pattern]}
        frozen -= {parameter for pattern in exceptions for parameter in matches[pattern]}
        for _, parameter in named:
            parameter.requires_grad_(parameter not in frozen and parameter.is_floating_point())
        self.hold_trained_weights_in_fp32()

    def hold_trained_weights_in_fp32(self) -> None:
        """Trained weights in fp32, with the whole encoder or LLM that they belong to: bf16 rounds AdamW's steps away.

        ZeRO-3, whose parameters have a ds_id, holds fp32 copies itself. LoRA is fp32 beside an LLM of any dtype.
        """
        for part in self.children():
            own = [p for name, p in part.named_parameters() if p.requires_grad and not re.search(LORA, name)]
            if own and self.config.quantize and part is self.llm:
                raise InputError("--quantize: quantised weights cannot be trained; use --lora_r, or leave it out")
            if any(p.dtype != torch.float32 and not hasattr(p, "ds_id") for p in own):
                part.float()  # layers of two dtypes do not go together

    def set_trained(self, part: str, is_trained: bool) -> None:
        """Freeze or unfreeze all parameters of a part; what was trained till now is saved all the same."""
        self.ever_trained |= {name for name, p in self.named_parameters() if p.requires_grad}
        prefixes = ("projector.", "boundary.") if part == "projector" else f"{part}."
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes):
                parameter.requires_grad_(is_trained and parameter.is_floating_point())
        self.hold_trained_weights_in_fp32()
        self.train(self.training)  # modes follow what is trained

    freeze_encoder = partialmethod(set_trained, "encoder", False)
    unfreeze_encoder = partialmethod(set_trained, "encoder", True)
    freeze_llm = partialmethod(set_trained, "llm", False)
    unfreeze_llm = partialmethod(set_trained, "llm", True)
    freeze_projector = partialmethod(set_trained, "projector", False)
    unfreeze_projector = partialmethod(set_trained, "projector", True)

    def freeze_llm_except_lm_head(self) -> None:
        """Train only the vocabulary projection of the LLM: with it the token embeddings, where the two are tied."""
        self.freeze_llm()
        self.llm.get_output_embeddings().requires_grad_(True)
        self.hold_trained_weights_in_fp32()

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Training mode for modules that are trained as a whole, eval mode for all else: no dropout in a frozen LLM."""
        super().train(False)  # all modules; below, parents come before their children
        self.training = mode
        if not mode:
            return self
        for name, module in list(self.named_modules())[1:]:  # the first is the model itself
            trained = [p.requires_grad for p in module.parameters()]  # with those of its children
            if ".lora_dropout" in name or (trained and all(trained)):
                module.train()  # with its children that have no parameters: dropout, activations
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                # Layers recompute their activations in training mode alone. Those of a frozen LLM must, too.
                module.training = name.startswith("llm.") or any(trained)
            if isinstance(module, nn.BatchNorm1d):
                module.eval()  # its running statistics are no parameters: no checkpoint would hold them
        self.get_input_embeddings().training = True  # NEFTune adds its noise there
        return self

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)  # frozen layers recompute only in training mode

    def merge_lora(self) -> None:
        """Add LoRA's product to the weights it stands beside, and take LoRA away: decoding is as fast as without."""
        import lora  # an option

        self.is_merged = any([lora.merge(self.llm), lora.merge(self.encoder)]) or self.is_merged
        self.config.lora_r = self.config.encoder_lora_r = 0  # so that the saved model is loaded without LoRA

    # Save and load: config.json says what the model is made of, model.safetensors holds what was trained

    def parameters_to_save(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: all that is trained, or was, and all that comes from no other place."""
        parameters = dict(self.named_parameters())  # tied weights once, by their first name
        of_parts = {n for n in parameters if n.startswith(("encoder.", "llm.")) and not re.search(LORA, n)}
        return {n: p for n, p in parameters.items() if p.requires_grad or n in self.ever_trained or n not in of_parts}

    def save_pretrained(
        self, folder: str | Path, include_frozen: bool = False, state_dict=None, is_main_process=True, config=None
    ) -> None:
        """Write config.json and what was trained (taken from `state_dict` if it lives elsewhere).

        With `include_frozen` the encoder and the LLM too, and a model card: the folder then needs nothing else. Files
        are the old ones or the new ones, never half written. `config` goes into config.json in place of the model's.
        """
        config = config or self.config
        if is_main_process and include_frozen:
            import hub  # an option

            parts, names = (self.encoder, self.llm, self.tokenizer), list(self.parameters_to_save())
            with hub.new_files_in(Path(folder)) as new:
                self.write_files(new, hub.save_frozen_parts(new, config, *parts, names, self.is_merged), state_dict)
        elif is_main_process:
            if self.is_merged:
                raise InputError("LoRA was merged into the LLM's weights; save them too, with include_frozen=True")
            self.write_files(Path(folder), config, state_dict)

    def write_files(self, folder: Path, config: SpeechLLMConfig, state_dict: dict[str, Tensor] | None) -> None:
        """Write trained weights and a config into a folder."""
        parameters = self.parameters_to_save()
        source = parameters if state_dict is None else state_dict  # ZeRO-3 gathers whole weights for state_dict
        state = {name: source[name].detach().contiguous().cpu() for name in parameters}
        folder.mkdir(parents=True, exist_ok=True)
        weights, new_config = folder / "model.safetensors", folder / "config.json.new"
        save_file(state, weights, {"format": "pt"})  # into another file, which is renamed at the end
        values = config.to_dict() | {"architectures": [type(self).__name__]}  # as any model of transformers has it
        new_config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        weights.chmod(new_config.stat().st_mode)  # safetensors makes files that nobody else may read
        new_config.replace(folder / "config.json")

    def load_trained(self, path: str | Path, only: str | None = None) -> None:
        """Copy what was trained from a file; InputError names missing, extra and wrongly shaped tensors.

        Weights of the encoder or the LLM may be among them: they were trained, are held in fp32, and are saved again.
        With `only`, the name of a part, tensors of other parts may be missing: they start new, and a warning says so.
        """
        parameters, saved = dict(self.named_parameters()), self.parameters_to_save()
        with as_input_error(str(path), "read the trained weights", "a model.safetensors that was saved here"):
            weights = load_file(path)  # pages of the file, which come into memory as they are copied
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        wanted = {name: tuple(p.shape) for name, p in parameters.items() if name in saved or name in shapes}
        if only and (new := [n for n in wanted if n not in shapes and not n.startswith(f"{only}.")]):
            warnings.warn(f"{path}: without {new[0]} and the like ({len(new)}): they start new", stacklevel=2)
            wanted = {name: shape for name, shape in wanted.items() if name not in new}
        if wrong := [name for name in wanted | shapes if shapes.get(name) != wanted.get(name)]:
            c = self.config
            made_for = f"encoder width {c.encoder_size}, LLM width {c.hidden_size}, {c.projector} projector of "
            made_for += f"stride {c.projector_stride}, hidden size {c.projector_hidden_size}"
            texts = [f"{n} is {shapes.get(n, 'missing')}, wanted {wanted.get(n, 'no such tensor')}" for n in wrong[:12]]
            raise InputError(f"{path}: does not fit {made_for} ({len(wrong)} tensors): {'; '.join(texts)}")
        for name, weight in weights.items():
            if weight.dtype == torch.float32 and parameters[name].dtype != torch.float32:
                self.get_submodule(name.partition(".")[0]).float()  # the part that the weight belongs to
            parameters[name].detach().copy_(weight)
        self.ever_trained |= shapes.keys()  # so that they are saved again

    def push_to_hub(self, repo_id: str, include_frozen: bool = False, state_dict=None, **options) -> str:
        """Upload what `save_pretrained` writes, and a model card, to the Hub; `options` are those of hub.push."""
        import hub  # an option

        write = partial(self.save_pretrained, include_frozen=include_frozen, state_dict=state_dict)
        names = list(self.parameters_to_save())
        return hub.push(write, self.config, names, self.is_merged, repo_id, include_frozen, **options)


def load_config(folder: Path, config_class: type = SpeechLLMConfig, **overrides) -> SpeechLLMConfig:
    """The config of a checkpoint folder; `overrides` replace fields of it (a moved LLM's path, say)."""
    path = folder / "config.json"
    if not path.is_file() and all(part in overrides for part, _ in config_class.PARTS):
        return config_class(**overrides)  # weights alone: the flags say what they belong to
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("model_type") != config_class.model_type:
            raise ValueError("it describes another kind of model")
        config_class(**values)  # only to check them
    except (OSError, ValueError, RecursionError) as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix("config: ")
        raise InputError(f"{path}: {problem}; wanted a folder that train.py or save_pretrained wrote") from None
    for part, revision in config_class.PARTS:
        if part in overrides:  # another encoder or LLM than the checkpoint's, of another revision and origin
            values[revision] = None
            values["origin"] = {k: v for k, v in (values.get("origin") or {}).items() if k not in (part, revision)}
        elif values.get(part) and (folder / values[part]).exists():  # a frozen part in the folder itself
            values[part] = str((folder / values[part]).absolute())
    return config_class(**{**values, **overrides})  # the latter win
