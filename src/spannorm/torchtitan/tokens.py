"""torchtitan's data loader for a folder that `spannorm data` wrote, in the same order as our own run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX

from spannorm.errors import InputError
from spannorm.files import read_json


class Sequences(IterableDataset[Any]):
    """This process's share of the sequences, epoch after epoch. The order of an epoch depends only on (seed, epoch).

    The batches of all processes together hold consecutive sequences of that order. So a step sees the same sequences as
    a step of our own run. The last position of a sequence predicts nothing, as in our model.
    """

    def __init__(self, folder: Path, length: int, seed: int, batch: int, rank: int, count: int) -> None:
        description = folder / "data.json"
        if not description.exists():
            raise InputError(f"no tokens in {folder}: make them with `spannorm data RECIPE --out {folder}`.")
        self.tokens = np.memmap(folder / "train.bin", read_json(description, {"dtype": str})["dtype"], mode="r")
        self.length, self.seed, self.batch, self.rank, self.count = length, seed, batch, rank, count
        self.windows = len(self.tokens) // length
        self.seen = 0  # sequences of this process

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        order, order_epoch = np.empty(0, np.int64), -1
        while True:
            batches, within = divmod(self.seen, self.batch)
            item = (batches * self.count + self.rank) * self.batch + within
            epoch, place = divmod(item, self.windows)
            if epoch != order_epoch:
                draw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.windows)
                order, order_epoch = np.argsort(draw, kind="stable"), epoch
            start = int(order[place]) * self.length
            ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
            self.seen += 1
            positions = torch.arange(self.length)
            yield {"input": ids, "positions": positions}, torch.cat([ids[1:], ids.new_full((1,), IGNORE_INDEX)])

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class TokenDataLoader(ParallelAwareDataloader):
    """Our tokens for torchtitan. It resumes from a checkpoint."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        seed: int = 0

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = None,
        **_: Any,
    ) -> None:
        if not config.dataset_path:
            raise InputError("TokenDataLoader needs `dataset_path`: a folder of `spannorm data`.")
        sequences = Sequences(
            Path(config.dataset_path), seq_len, config.seed, local_batch_size, dp_rank, dp_world_size
        )  # fmt: skip
        more = {} if snapshot_every_n_steps is None else {"snapshot_every_n_steps": snapshot_every_n_steps}
        super().__init__(sequences, dp_rank, dp_world_size, batch_size=local_batch_size, **more)
