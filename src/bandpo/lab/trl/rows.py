"""A rollout's rows, fetched once: TRL hands all of them over at each of its updates and reads them at the first."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from trl import GRPOTrainer


class RowsOnce(GRPOTrainer):
    """TRL's trainer, which does not fetch again the rows that it has just fetched; what it trains on is the same."""

    train_dataset: Any

    def get_train_dataloader(self) -> Any:
        """Return TRL's loader of the training data.

        Returns:
            The loader; of rows that hold no tensors, each rollout's are fetched once and moved to no device.
        """
        rows = self.train_dataset
        plain = isinstance(rows, Dataset) and rows.format["type"] is None
        if plain:
            self.train_dataset = _Kept(rows)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        if plain and isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader


class _Kept(Dataset):
    """A dataset that keeps the rows it was asked for last."""

    def __init__(self, rows: Dataset) -> None:
        self.__dict__.update(rows.__dict__)
        self._asked: list[int] | None = None
        self._answer: list[Any] = []

    def __getitems__(self, keys: list[int]) -> list[Any]:
        if keys != self._asked:
            self._asked, self._answer = list(keys), super().__getitems__(keys)
        return self._answer
