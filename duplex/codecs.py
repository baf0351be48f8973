"""Codecs: the agent's voice as K codes for each frame of 80 ms, and back. They are frozen.

A codec has `sample_rate` (Hz), `num_codebooks` K, `codebook_size` V, encode(samples (B, A)) -> codes (B, T, K), and
decode(codes (B, T, K)) -> samples (B, A').
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.audio_utils import mel_filter_bank

from duplex.data import FRAME_SECONDS, HOP
from errors import InputError, as_input_error, load_pretrained
from manifest import SAMPLE_RATE


def load_codec(name: str, revision: str | None = None) -> "HubCodec | MelCodec":
    """The codec of a Hub name or folder of Mimi, EnCodec or DAC, or of MelCodec's file. Raises InputError."""
    with as_input_error(name, "load a codec", "a Hub name or folder of Mimi, EnCodec or DAC, or a .safetensors file"):
        if Path(name).suffix == ".safetensors":
            return MelCodec(**load_file(name))
        kind = AutoConfig.from_pretrained(name, revision=revision).model_type
        if kind not in CODECS:
            raise InputError(f"{name}: a {kind}; wanted one of {', '.join(CODECS)}")
        return HubCodec(load_pretrained(AutoModel, name, revision=revision), name)


# Model type of transformers -> samples (B, 1, A) or (B, A) of its codes (B, books, frames)
CODECS = {
    "mimi": lambda model, codes: model.decode(codes).audio_values,  # arXiv:2410.00037, 24 kHz
    "encodec": lambda model, codes: model.decode(codes[None], [None]).audio_values,  # arXiv:2210.13438; of one chunk
    "dac": lambda model, codes: model.decode(audio_codes=codes).audio_values,  # arXiv:2306.06546, 16 or 24 kHz
}


class HubCodec:
    """A codec of transformers. Where it has several frames in 80 ms, their codes stand side by side as more books."""

    def __init__(self, model: torch.nn.Module, name: str):
        self.model, config = model.requires_grad_(False).eval(), model.config
        self.sample_rate, self.codebook_size = config.sampling_rate, config.codebook_size
        self.hop = round(self.sample_rate * FRAME_SECONDS)  # samples of a frame of 80 ms
        rate = config.frame_rate * FRAME_SECONDS
        if abs(rate - round(rate)) > 1e-6:
            raise InputError(f"{name}: {rate:.2f} frames of codes in {FRAME_SECONDS} s; wanted a whole number")
        self.rate = round(rate)
        self.num_codebooks = self.encode(torch.zeros(1, self.hop)).shape[2]

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        num_frames = -(-samples.shape[1] // self.hop)
        samples = F.pad(samples, (0, (num_frames + 1) * self.hop - samples.shape[1]))  # DAC drops its last frame
        codes = self.model.encode(samples.unsqueeze(1)).audio_codes
        codes = codes[0] if codes.ndim == 4 else codes  # EnCodec's chunks, of which there is one: (B, books, frames)
        return codes[:, :, : num_frames * self.rate].mT.reshape(len(samples), num_frames, -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        frames = codes.cpu().reshape(len(codes), -1, codes.shape[2] // self.rate).mT  # (B, books, frames)
        return CODECS[self.model.config.model_type](self.model, frames).reshape(len(codes), -1)


class MelCodec:
    """Residual vector quantisation of log-mel frames, learnt by k-means; Griffin and Lim (1984) back to samples.

    It needs no download and little time, and sounds like it: for the demo. A frame is 8 log-mel vectors of 10 ms.
    """

    sample_rate, size, step, bins, floor = SAMPLE_RATE, 512, 160, 80, 1e-5  # Hz; FFT and hop in samples; mel bins

    def __init__(self, codebooks: Tensor, mean: Tensor):
        self.codebooks, self.mean = codebooks, mean  # (K, V, 640), (640,)
        self.num_codebooks, self.codebook_size = codebooks.shape[:2]
        filters = mel_filter_bank(self.size // 2 + 1, self.bins, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")
        self.filters = torch.from_numpy(filters).float()  # (frequencies, mel bins)
        self.inverse = torch.linalg.pinv(self.filters)
        self.window = torch.hann_window(self.size)

    @classmethod
    def learn(
        cls, samples: list[Tensor], num_codebooks: int = 8, codebook_size: int = 256, seed: int = 0
    ) -> "MelCodec":
        """The codec of clips (A,): each book holds the means of what the books before it leave over."""
        codec, random = cls(torch.zeros(0, codebook_size, 1), torch.zeros(1)), torch.Generator().manual_seed(seed)
        rest = torch.cat([codec.frames(clip[None])[0] for clip in samples])  # (frames, 640)
        mean, books = rest.mean(0), []
        rest = rest - mean
        for _ in range(num_codebooks):
            book = rest[torch.randperm(len(rest), generator=random)[:codebook_size]]  # (V, 640)
            for _ in range(8):  # Lloyd's steps
                nearest = torch.cdist(rest, book).argmin(1)
                sums = torch.zeros_like(book).index_add_(0, nearest, rest)
                counts = nearest.bincount(minlength=len(book)).unsqueeze(1)
                book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
            books.append(book)
            rest = rest - book[torch.cdist(rest, book).argmin(1)]
        return cls(torch.stack(books), mean)

    def save(self, path: str | Path) -> None:
        save_file({"codebooks": self.codebooks, "mean": self.mean}, path)

    def spectrum(self, samples: Tensor) -> Tensor:
        """Samples (B, A) -> (B, frequencies, A / 160 + 1), complex."""
        return torch.stft(samples, self.size, self.step, window=self.window, return_complex=True)

    def frames(self, samples: Tensor) -> Tensor:
        """Samples (B, A) -> log-mel vectors of whole frames (B, T, 640)."""
        samples = F.pad(samples.cpu(), (0, -samples.shape[1] % HOP))
        magnitude = self.spectrum(samples).abs()[:, :, :-1]  # (B, frequencies, 8 T)
        mel = (magnitude.mT @ self.filters).clamp(min=self.floor).log()  # (B, 8 T, 80)
        return mel.reshape(len(mel), samples.shape[1] // HOP, -1)

    def encode(self, samples: Tensor) -> Tensor:
        rest, codes = self.frames(samples) - self.mean, []
        for book in self.codebooks:
            codes.append(torch.cdist(rest, book.expand(len(rest), -1, -1)).argmin(2))  # (B, T)
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 2).to(samples.device)

    def decode(self, codes: Tensor, iterations: int = 32) -> Tensor:
        codes = codes.cpu()
        frames = self.mean + sum(book[codes[:, :, k]] for k, book in enumerate(self.codebooks))  # (B, T, 640)
        mel = frames.reshape(len(frames), -1, self.bins).exp()  # (B, 8 T, 80)
        magnitude = F.pad((mel @ self.inverse).clamp(min=0).mT, (0, 1), mode="replicate")  # (B, frequencies, 8 T + 1)
        start = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0))  # the same codes, one voice
        phase = torch.ones_like(magnitude) * torch.exp(2j * torch.pi * start)
        for _ in range(iterations):
            samples = torch.istft(magnitude * phase, self.size, self.step, window=self.window)  # (B, 1280 T)
            phase = torch.exp(1j * self.spectrum(samples).angle())
        return samples
