"""Training: each image once an epoch, small shifts, one seed one result, and the recipe of the embedded job."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from distsurf import zoo
from distsurf.errors import InputError


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder(nn.Module):
    """A linear classifier that keeps every batch it is trained on."""

    def __init__(self, pixels: int, classes: int = 2, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(pixels, classes)
        self.dropout = nn.Dropout(dropout)
        self.batches: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches.append(images.clone())
        return self.linear(self.dropout(images.flatten(1)))


def numbered(count: int, size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Black images (at -1) with one bright pixel in the middle, whose brightness is the image's number from 1."""
    images = torch.full((count, 1, size, size), -1.0)
    images[:, 0, size // 2, size // 2] = torch.arange(1.0, count + 1)
    return images, torch.arange(count) % 2


def test_every_image_once_an_epoch_in_batches_of_equal_size() -> None:
    model, epochs = Recorder(49), 3
    zoo.train(model, *numbered(31), epochs=epochs, batch_size=10, lr=1e-4)
    assert [len(batch) for batch in model.batches] == [8, 8, 8, 7] * epochs
    orders = torch.cat(model.batches).amax((1, 2, 3)).reshape(epochs, 31)
    assert all(sorted(order.tolist()) == list(range(1, 32)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == epochs


def test_shifts() -> None:
    """The bright pixel lands everywhere within the shift, equally often, and the rest stays black."""
    model, shift = Recorder(49), 2
    zoo.train(model, *numbered(50), epochs=40, lr=1e-4, shift=shift)
    seen = torch.cat(model.batches)[:, 0]
    assert (seen > 0).flatten(1).sum(1).eq(1).all()
    assert seen[seen <= 0].eq(-1).all()
    landed = (seen > 0).sum(0)
    assert landed[3 - shift : 4 + shift, 3 - shift : 4 + shift].sum() == len(seen)
    expected = len(seen) / 25
    assert landed[landed > 0].numel() == 25
    assert ((landed[landed > 0] - expected).abs() < 5 * math.sqrt(expected)).all()


def test_shifts_uncover_the_black_of_each_channel_in_the_whole_data() -> None:
    images = torch.ones(20, 3, 4, 4)
    images[0, :, 0, 0] = torch.tensor([-1.0, -2.0, -3.0])  # black occurs in one image only
    model = Recorder(48)
    zoo.train(model, images, torch.zeros(20, dtype=torch.int64), epochs=3, batch_size=1, lr=1e-4, shift=1)
    seen = torch.cat(model.batches)
    for channel, black in enumerate((-1.0, -2.0, -3.0)):
        assert seen[:, channel].unique().tolist() == [black, 1.0]
    uncovered = (seen[:, 0] < 0).flatten(1).sum(1)
    assert {4, 7} < set(uncovered.tolist()) <= {0, 1, 4, 5, 7, 8}  # a side, or two that share a corner


def test_labels_stay_with_their_images() -> None:
    """A problem that is learnt perfectly only if they do."""
    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.sum((1, 2, 3)) > 0).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    zoo.train(model, images, labels, epochs=60, lr=0.5, weight_decay=0)
    assert zoo.accuracy(model, images, labels) > 99


@pytest.mark.usefixtures("one_thread")
def test_one_seed_one_result() -> None:
    images, labels = zoo.data("digits")["train"]

    def trained(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = zoo.model("resnet8", width=4, in_channels=1)
        zoo.train(model, images[:300], labels[:300], epochs=2, shift=1, seed=seed)
        return list(model.state_dict().values())

    first = trained(1)
    assert all(map(torch.equal, first, trained(1)))
    assert not all(map(torch.equal, first, trained(2)))


def test_dropout_follows_the_seed_and_the_global_generator_is_left_alone() -> None:
    def trained(global_seed: int, seed: int) -> torch.Tensor:
        model = Recorder(49, dropout=0.5)
        nn.init.zeros_(model.linear.weight)
        nn.init.zeros_(model.linear.bias)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        zoo.train(model, *numbered(20), epochs=2, shift=1, seed=seed, lr=0.01)
        assert torch.equal(before, torch.get_rng_state())
        return model.linear.weight

    assert torch.equal(trained(0, seed=4), trained(1, seed=4))
    assert not torch.equal(trained(0, seed=4), trained(0, seed=5))


def test_progress_and_eval_mode() -> None:
    calls: list[tuple[int, int, float]] = []
    images, labels = zoo.data("digits")["train"]
    model = zoo.model("resnet8", width=4, in_channels=1)
    zoo.train(model, images, labels, epochs=3, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert calls[0][2] > calls[2][2] > 0
    assert not any(module.training for module in model.modules())


def test_accuracy() -> None:
    """A classifier of which the right answers are known: it names the brighter of two pixels."""
    images = torch.rand(1000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    labels = images.flatten(1).argmax(1)
    labels[:130] = 1 - labels[:130]
    model = Recorder(2)
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(2))
        model.linear.bias.zero_()
    assert model.training
    assert zoo.accuracy(model, images, labels) == 87.0
    assert model.training
    assert not model.batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs = 0: expected 1 or more"),
        ({"epochs": 1, "batch_size": 0}, "batch_size = 0"),
        ({"epochs": 1, "shift": -1}, "shift = -1: expected 0 or more"),
        ({"epochs": 20, "lr": 1e30}, "training diverged in epoch 2 .*lower lr = 1e"),
    ],
)
def test_impossible_training(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.train(Recorder(49), *numbered(100), **arguments)  # type: ignore[arg-type]


def test_impossible_data() -> None:
    images, labels = numbered(4)
    with pytest.raises(InputError, match="4 images and 3 labels"):
        zoo.train(Recorder(49), images, labels[:3], epochs=1)
    with pytest.raises(InputError, match="0 images and 0 labels"):
        zoo.accuracy(Recorder(49), images[:0], labels[:0])
    with pytest.raises(InputError, match=r"shift = 1 needs images .*are \(4, 49\)"):
        zoo.train(Recorder(49), images.flatten(1), labels, epochs=1, shift=1)
    with pytest.raises(InputError, match="no parameters"):
        zoo.accuracy(nn.Flatten(), images, labels)


def test_recipe_of_the_embedded_job() -> None:
    data = zoo.data("digits")
    torch.manual_seed(0)
    model = zoo.model("resnet8", width=8, in_channels=1)
    zoo.train(model, *data["train"], epochs=20, shift=1)
    assert zoo.accuracy(model, *data["test"]) >= 97
    assert zoo.accuracy(model, *data["train"]) >= 99
