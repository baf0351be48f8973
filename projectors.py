"""Projectors: encoder frames (A, T, D) -> LLM embeddings (A, N, H). The letters are model.py's.

    projector = PROJECTORS[config.projector](encoder_size, llm_size, config)
    embeddings = projector(frames, lengths)  # of clip i, the first projector.output_lengths(lengths[i]) are valid

A valid embedding depends on the valid frames of its own clip alone. There is no dropout and no batch statistic, so that
training and decoding compute the same.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from encoders import valid
from manifest import InputError


class Projector(nn.Module):
    """What all have in common: an embedding for every `projector_stride` frames, the dtype of the weights, checks."""

    def __init__(self, config):
        super().__init__()
        for name in ("projector_stride", "projector_hidden_size", "projector_num_layers"):
            if getattr(config, name) < 1:
                raise InputError(f"--{name} {getattr(config, name)}: wanted 1 or more")
        if config.projector_activation not in ACT2FN:
            known = ", ".join(sorted(ACT2FN))
            raise InputError(f"--projector_activation {config.projector_activation}: unknown; there are {known}")
        self.stride = config.projector_stride

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return lengths // self.stride  # a tail shorter than the stride is dropped

    def cast(self, frames: Tensor) -> Tensor:
        return frames.to(next(self.parameters()).dtype)

    def stack(self, frames: Tensor) -> Tensor:
        """Neighbouring frames side by side: (A, T, D) -> (A, T // stride, stride * D)."""
        count = frames.shape[1] // self.stride
        return frames[:, : count * self.stride].unflatten(1, (count, self.stride)).flatten(2)


class Conv1dProjector(Projector):
    """Convolution with kernel = stride, activation, Linear, activation, Linear; N = T // stride.

    Its parameters have the names that published checkpoints have.
    """

    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__(config)
        self.conv = nn.Conv1d(encoder_size, encoder_size, kernel_size=self.stride, stride=self.stride)
        self.activation = ACT2FN[config.projector_activation]
        self.linear1 = nn.Linear(encoder_size, config.projector_hidden_size)
        self.linear2 = nn.Linear(config.projector_hidden_size, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(self.cast(frames).transpose(1, 2)).transpose(1, 2)  # (A, N, D)
        return self.linear2(self.activation(self.linear1(self.activation(x))))


class LinearProjector(Projector):
    """Frames stacked, Linear, activation, Linear; N = T // stride. The projector of SLAM-ASR (arXiv:2402.08846)."""

    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__(config)
        self.linear1 = nn.Linear(self.stride * encoder_size, config.projector_hidden_size)
        self.activation = ACT2FN[config.projector_activation]
        self.linear2 = nn.Linear(config.projector_hidden_size, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(self.stack(self.cast(frames)))))  # (A, N, H)


class MLPProjector(Projector):
    """Frames stacked, Linear, `projector_num_layers` hidden layers, Linear, plus one Linear around it all.

    N = T // stride. As in SpeechLLM, with Xavier initialisation and a linear residual from stacked frames to LLM.
    """

    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__(config)
        stacked, hidden = self.stride * encoder_size, config.projector_hidden_size
        layers = [nn.Linear(stacked, hidden), ACT2FN[config.projector_activation]]
        for _ in range(config.projector_num_layers):
            layers += [nn.Linear(hidden, hidden), ACT2FN[config.projector_activation]]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, llm_size))
        self.residual = nn.Linear(stacked, llm_size)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.stack(self.cast(frames))  # (A, N, stride * D)
        return self.layers(x) + self.residual(x)


class ConformerProjector(Projector):
    """Convolution with kernel = stride, `projector_num_layers` Conformer layers, Linear; N = T // stride.

    As the modality adapter of SALM (arXiv:2310.09424), with the layers of W2V-BERT 2.0, whose norms are all LayerNorms:
    learned relative positions (up to 64 embeddings away; 6.4 s at 10 Hz) and a depthwise convolution over the last 9.
    One attention head for every 64 of projector_hidden_size, whose default of 2048 makes two layers 193 M parameters;
    512 makes them 12 M. Conformers are usually trained with the activation silu.
    """

    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__(config)
        from transformers import Wav2Vec2BertConfig
        from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertEncoder

        hidden, dropouts = config.projector_hidden_size, ("hidden_dropout", "attention_dropout", "activation_dropout")
        dropouts += ("conformer_conv_dropout", "layerdrop")
        layers = Wav2Vec2BertConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=config.projector_num_layers,
            num_attention_heads=num_heads(hidden),
            hidden_act=config.projector_activation,
            position_embeddings_type="relative_key",
            left_max_position_embeddings=64,
            right_max_position_embeddings=64,
            conv_depthwise_kernel_size=9,
            attn_implementation="eager",
            **dict.fromkeys(dropouts, 0.0),
        )
        self.conv = nn.Conv1d(encoder_size, hidden, kernel_size=self.stride, stride=self.stride)
        self.conformer = Wav2Vec2BertEncoder(layers)
        self.linear = nn.Linear(hidden, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(self.cast(frames).transpose(1, 2)).transpose(1, 2)  # (A, N, hidden)
        mask = valid(self.output_lengths(lengths), x.shape[1])
        return self.linear(self.conformer(x, mask).last_hidden_state)


class QFormerProjector(Projector):
    """A learned query reads each window of `stride` frames, in `projector_num_layers` blocks.

    The window-level Q-Former of SALMONN (arXiv:2310.13289) with one query a window, and so without self-attention among
    queries. A learned vector for each place in the window tells its frames apart. N = T / stride, rounded up: the last
    window may be partly padding, which is masked. One attention head for every 64 of projector_hidden_size.
    """

    def __init__(self, encoder_size: int, llm_size: int, config):
        super().__init__(config)
        hidden = config.projector_hidden_size
        self.query = nn.Parameter(torch.randn(hidden) * 0.02)
        self.places = nn.Parameter(torch.randn(self.stride, hidden) * 0.02)
        self.linear1 = nn.Linear(encoder_size, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        blocks = range(config.projector_num_layers)
        self.blocks = nn.ModuleList([QFormerBlock(hidden, config.projector_activation) for _ in blocks])
        self.linear2 = nn.Linear(hidden, llm_size)

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return -(-lengths // self.stride)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        count = self.output_lengths(frames.shape[1])
        padding = count * self.stride - frames.shape[1]
        x = nn.functional.pad(self.linear1(self.cast(frames)), (0, 0, 0, padding))
        windows = self.norm1(x.unflatten(1, (count, self.stride)) + self.places).flatten(0, 1)  # (A N, stride, hidden)
        ignored = ~valid(lengths, count * self.stride).reshape(-1, self.stride)
        ignored[:, 0] = False  # with nothing to read in a window of padding, some kernels of attention give NaN
        x = self.query.expand(len(windows), 1, -1)
        for block in self.blocks:
            x = block(x, windows, ignored)
        return self.linear2(self.norm2(x)).view(len(frames), count, -1)


class QFormerBlock(nn.Module):
    """Queries (W, 1, hidden) that have read their windows (W, stride, hidden), but where `ignored` (W, stride)."""

    def __init__(self, hidden: int, activation: str):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, num_heads(hidden), batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), ACT2FN[activation], nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: Tensor, windows: Tensor, ignored: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), windows, windows, ignored, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


def num_heads(hidden: int) -> int:
    """One attention head for every 64 of the width; InputError if they do not share it out evenly."""
    heads = max(hidden // 64, 1)
    if hidden % heads:
        raise InputError(f"--projector_hidden_size {hidden}: wanted a multiple of 64, the width of an attention head")
    return heads


PROJECTORS = {
    "conv1d": Conv1dProjector,
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "conformer": ConformerProjector,
    "qformer": QFormerProjector,
}
