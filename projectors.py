"""Projectors other than model.py's Conv1d: encoder frames (A, T, D) -> LLM embeddings (A, N, H).

    projector = PROJECTORS[config.projector](encoder_size, llm_size, config)
    embeddings = projector(frames, lengths)  # of clip i, the first projector.output_lengths(lengths[i]) are valid

A new projector is a class with these three methods and a row of PROJECTORS. A valid embedding depends on the valid
frames of its own clip alone. There is no dropout and no batch statistic, so training and decoding compute the same.
The shape letters are model.py's. conformer and qformer are meant for --projector_hidden_size 512, not the default 2048.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dataset import length_mask
from errors import InputError

if TYPE_CHECKING:
    from model import SpeechLLMConfig


class Projector(nn.Module):
    """What all of these have in common: one embedding for every `projector_stride` frames, in the weights' dtype."""

    def __init__(self, config: "SpeechLLMConfig"):
        super().__init__()
        self.stride = config.projector_stride

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return lengths // self.stride  # valid frames (A,) -> valid embeddings (A,)

    def cast(self, frames: Tensor) -> Tensor:
        return frames.to(next(self.parameters()).dtype)

    def stack(self, frames: Tensor) -> Tensor:
        """Neighbouring frames side by side: (A, T, D) -> (A, T // stride, stride * D)."""
        num_stacks = frames.shape[1] // self.stride
        frames = frames[:, : num_stacks * self.stride]  # a tail shorter than the stride is dropped
        return frames.unflatten(1, (num_stacks, self.stride)).flatten(2)


class LinearProjector(Projector):
    """Frames stacked, Linear, activation, Linear; N = T // stride. The projector of SLAM-ASR (arXiv:2402.08846)."""

    def __init__(self, encoder_size: int, llm_size: int, config: "SpeechLLMConfig"):
        super().__init__(config)
        self.linear1 = nn.Linear(self.stride * encoder_size, config.projector_hidden_size)
        self.activation = ACT2FN[config.projector_activation]
        self.linear2 = nn.Linear(config.projector_hidden_size, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.stack(self.cast(frames))  # (A, N, stride * D)
        return self.linear2(self.activation(self.linear1(x)))  # (A, N, H)


class MLPProjector(Projector):
    """Frames stacked, Linear, `projector_num_layers` hidden layers, Linear, plus one Linear around it all.

    N = T // stride. As in SpeechLLM, with Xavier initialisation and a linear residual from stacked frames to LLM.
    """

    def __init__(self, encoder_size: int, llm_size: int, config: "SpeechLLMConfig"):
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
        return self.layers(x) + self.residual(x)  # (A, N, H)


class ConformerProjector(Projector):
    """Convolution with kernel = stride, `projector_num_layers` Conformer layers, Linear; N = T // stride.

    As the modality adapter of SALM (arXiv:2310.09424), with the layers of W2V-BERT 2.0, whose norms are all LayerNorms:
    learned relative positions (up to 64 embeddings away; 6.4 s at 10 Hz) and a depthwise convolution over the last 9.
    One attention head for every 64 of projector_hidden_size. Take 512: two layers then have 12 M parameters; with the
    default of 2048 they have 193 M. Conformers are usually trained with the activation silu.
    """

    def __init__(self, encoder_size: int, llm_size: int, config: "SpeechLLMConfig"):
        super().__init__(config)
        from transformers import Wav2Vec2BertConfig
        from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertEncoder

        hidden = config.projector_hidden_size
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
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            conformer_conv_dropout=0.0,
            layerdrop=0.0,
        )
        self.conv = nn.Conv1d(encoder_size, hidden, kernel_size=self.stride, stride=self.stride)
        self.conformer = Wav2Vec2BertEncoder(layers)
        self.linear = nn.Linear(hidden, llm_size)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(self.cast(frames).transpose(1, 2)).transpose(1, 2)  # (A, N, hidden)
        mask = length_mask(self.output_lengths(lengths), x.shape[1])  # (A, N), for attention and convolutions
        return self.linear(self.conformer(x, mask).last_hidden_state)  # (A, N, H)


class QFormerProjector(Projector):
    """A learned query reads each window of `stride` frames, in `projector_num_layers` blocks.

    The window-level Q-Former of SALMONN (arXiv:2310.13289) with one query a window, and so without self-attention among
    queries. A learned vector for each place in the window tells its frames apart. N = T / stride, rounded up: the last
    window may be partly padding, which is masked. One attention head for every 64 of projector_hidden_size; take 512,
    as for the Conformer.
    """

    def __init__(self, encoder_size: int, llm_size: int, config: "SpeechLLMConfig"):
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
        return -(-lengths // self.stride)  # rounded up

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        num_windows = self.output_lengths(frames.shape[1])  # N
        num_frames = num_windows * self.stride
        x = self.linear1(self.cast(frames))  # (A, T, hidden)
        x = nn.functional.pad(x, (0, 0, 0, num_frames - frames.shape[1]))  # the last window is filled up
        x = x.unflatten(1, (num_windows, self.stride)) + self.places  # (A, N, stride, hidden)
        windows = self.norm1(x).flatten(0, 1)  # (A N, stride, hidden)
        ignored = ~length_mask(lengths, num_frames).reshape(-1, self.stride)  # (A N, stride)
        ignored[:, 0] = False  # with nothing to read in a window of padding, some kernels of attention give NaN
        queries = self.query.expand(len(windows), 1, -1)  # (A N, 1, hidden)
        for block in self.blocks:
            queries = block(queries, windows, ignored)
        return self.linear2(self.norm2(queries)).view(len(frames), num_windows, -1)  # (A, N, H)


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
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "conformer": ConformerProjector,
    "qformer": QFormerProjector,
}
