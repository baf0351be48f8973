"""The order of training: clips of similar length together, the same for any number of processes."""

from collections.abc import Callable, Iterator

import numpy as np
import torch


class LengthSampler(torch.utils.data.Sampler):
    """Positions in a random order in which each run of `batch_size` has similar lengths; a new order every epoch.

    Shuffled positions are sorted by length within groups of 50 batches, and the batches shuffled again. The last batch
    is filled up with positions that come twice, so that any number of processes sees the same batches. The order
    depends on the seed and the epoch alone, so a resumed run sees what the first would have seen.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: Callable[[], int] = lambda: 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        random, size = np.random.default_rng([self.seed, self.epoch()]), self.batch_size
        order = np.resize(random.permutation(len(self.lengths)), len(self))
        groups = np.split(order, range(50 * size, len(order), 50 * size))
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        return iter(random.permutation(order.reshape(-1, size)).ravel().tolist())
