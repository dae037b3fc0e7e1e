"""The sequences that are cut from the tokens, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from spannorm.errors import InputError
from spannorm.train.data import TokenData


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a split: consecutive windows of `sequence_length` tokens. A shorter rest is left out.

    Documents are packed: a window may begin inside a document and hold several. Only the end-of-document token marks
    their borders; attention crosses them.

    Item: `input_ids` and `labels`, each int64 of shape (sequence_length,) and equal: the model shifts.
    Raises `InputError` when the split is shorter than one window.
    """

    def __init__(self, data: TokenData, split: str, sequence_length: int) -> None:
        held = data.split(split).tokens
        if held < sequence_length:
            fraction = "" if split == "train" else f"a larger data.{split}_fraction, "
            raise InputError(
                f"the {split} split holds {held} tokens, fewer than one sequence of {sequence_length}: "
                f"use a larger corpus, {fraction}or a smaller train.sequence_length."
            )
        self.data, self.split, self.sequence_length = data, split, sequence_length
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return self.data.split(self.split).tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._tokens is None:
            self._tokens = self.data.tokens(self.split)
        start = index * self.sequence_length
        ids = torch.from_numpy(self._tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}  # a pickled memory map is the whole file


class TrainingSequences(Dataset[dict[str, torch.Tensor]]):
    """All `count` sequences that a run sees, in order: item `i` is the same for every run of that `seed`.

    The windows of the training split (see `Windows`, also for the items and for how documents are packed)
    are visited epoch after epoch, each time in another order. The order depends only on (`seed`, epoch). So a run can
    resume at any item without reading earlier ones, and the order does not change with NumPy's version.

    Args:
        left_out: ranges (from, to) of items that a rollback left out, in the order of the rollbacks. After each `from`
            the items go on at `to`.
    """

    def __init__(
        self, data: TokenData, sequence_length: int, count: int, seed: int, left_out: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.windows = Windows(data, "train", sequence_length)
        self.count, self.seed, self.left_out = count, seed, left_out
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        for start, end in reversed(self.left_out):
            if index >= start:
                index += end - start
        epoch, place = divmod(index, len(self.windows))
        if epoch != self._epoch:
            draw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.windows))
            self._epoch, self._order = epoch, np.argsort(draw, kind="stable")
        return self.windows[int(self._order[place])]


def evaluation_sequences(
    data: TokenData, split: str, sequence_length: int, count: int
) -> Dataset[dict[str, torch.Tensor]]:
    """`count` windows spread evenly over a split, or all of them if there are fewer; the same for every run.

    They do not overlap; for the items and the `InputError` see `Windows`.
    """
    windows = Windows(data, split, sequence_length)
    count = min(count, len(windows))
    chosen: Sequence[int] = [place * len(windows) // count for place in range(count)]
    return Subset(windows, chosen)
