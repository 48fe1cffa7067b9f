from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distsurf.errors import InputError
from distsurf.objective.data import as_splits, tensors_of

X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)


class Mapped(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return X[i].numpy(), int(Y[i])


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


FORMS: dict[str, Any] = {
    "pair": (X, Y),
    "numpy": (X.numpy(), Y.numpy()),
    "tensor_dataset": TensorDataset(X, Y),
    "dataset": Mapped(),
    "iterable_dataset": Streamed(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "generator": ((X[i : i + 4], Y[i : i + 4]) for i in range(0, 10, 4)),
    "list": [(X[:7], Y[:7]), [X[7:], Y[7:]]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_batches(form: str) -> None:
    (split,) = as_splits(FORMS[form])
    assert split.samples == 10
    batches = split.batches(4)
    assert [len(b[0]) for b in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([b[0] for b in batches]), X)
    assert torch.equal(torch.cat([b[1] for b in batches]), Y)


def test_loaders_keep_their_choice_of_samples() -> None:
    dataset = TensorDataset(X, Y)
    chosen = DataLoader(dataset, 3, sampler=SubsetRandomSampler([7, 2, 5, 0]))
    assert as_splits(chosen)[0].batches(9)[0][1].tolist() == [0, 2, 5, 7]
    assert as_splits(DataLoader(dataset, 4, drop_last=True))[0].samples == 8
    weighted = DataLoader(dataset, 4, sampler=WeightedRandomSampler([0.0] * 9 + [1.0], 6))
    assert as_splits(weighted)[0].batches(9)[0][1].tolist() == [9] * 6
    batched = DataLoader(dataset, batch_sampler=[[3, 1], [4]])
    assert as_splits(batched)[0].batches(9)[0][1].tolist() == [3, 1, 4]


def test_nested_inputs_beside_targets() -> None:
    (split,) = as_splits(((X, {"more": X}), Y))
    assert split.samples == 10
    assert torch.equal(split.batches(4)[2][0][1]["more"], X[8:])


def test_batches_are_views_of_one_piece() -> None:
    (split,) = as_splits((X, Y))
    assert all(b[0].untyped_storage().data_ptr() == X.untyped_storage().data_ptr() for b in split.batches(3))


def test_dicts_of_tensors_and_splits_by_name() -> None:
    (table,) = as_splits({"features": X, "labels": Y})
    assert table.name == ""
    assert set(table.batches(6)[0]) == {"features", "labels"}
    train, test = as_splits({"train": (X, Y), "test": [{"features": X[:4], "labels": Y[:4]}]})
    assert (train.name, test.name, test.samples) == ("train", "test", 4)


def test_ragged_batches_stay_as_they_are() -> None:
    ragged = [(torch.zeros(2, 5), torch.zeros(2)), (torch.zeros(3, 7), torch.zeros(3))]
    (split,) = as_splits(ragged)
    assert [tuple(b[0].shape) for b in split.batches(1)] == [(2, 5), (3, 7)]
    assert split.samples == 5


def test_nested_inputs() -> None:
    (split,) = as_splits([((X, {"more": X}), Y)])
    assert len(tensors_of(split.batches(3)[0])) == 3
    assert torch.equal(split.batches(3)[1][0][1]["more"], X[3:6])


@pytest.mark.parametrize(
    "bad",
    [
        (X, Y[:4]),
        [],
        {},
        (X[:0], Y[:0]),
        3,
        "digits",
        [("a", "b")],
        {"train": None},
        (torch.tensor(1.0), torch.tensor(2)),
    ],
)
def test_what_is_no_data_is_one_line(bad: Any) -> None:
    with pytest.raises(InputError) as error:
        as_splits(bad)
    assert "\n" not in str(error.value)
