"""The order of training: clips of similar length together, the same for any number of processes."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from manifest import InputError


class LengthSampler(torch.utils.data.Sampler):
    """Positions in a random order in which each run of `batch_size` has similar lengths; a new order every epoch.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again. The last batch
    is filled up with positions that come twice, or dropped, so that any number of processes sees the same batches. The
    order depends on the seed and the epoch alone, so a resumed run sees what the first would have seen.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
    ):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch
        count = len(lengths)
        self.size = count // batch_size if drop_last else -(-count // batch_size)  # batches
        if drop_last and not self.size:
            raise InputError(f"--dataloader_drop_last: {count} utterances do not fill one batch of {batch_size}")
        if 0 < count < batch_size:
            often = f"{batch_size / count:.1f} times an epoch"
            warnings.warn(f"{count} utterances fill a batch of {batch_size}: each comes {often}", stacklevel=2)

    def __len__(self) -> int:
        return self.size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        random, size = np.random.default_rng([self.seed, self.epoch()]), self.batch_size
        order = np.resize(random.permutation(len(self.lengths)), len(self))
        groups = np.split(order, range(50 * size, len(order), 50 * size))
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        return iter(random.permutation(order.reshape(-1, size)).ravel().tolist())
