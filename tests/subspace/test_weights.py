from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distsurf.errors import InputError
from distsurf.subspace import Tensors, load_checkpoint
from tests.cases import TiedWeights


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "net": lambda state: {"net": state, "acc": 0.9},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "data_parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_usual_checkpoints_load(tmp_path: Path, form: str) -> None:
    source, model = _net(), _net()
    path = tmp_path / "net.pt"
    torch.save(WRAPPED[form](source.state_dict()), path)
    load_checkpoint(model, path)
    assert _same(source, model)


def test_safetensors_and_named_entry(tmp_path: Path) -> None:
    source, model, other = _net(), _net(), _net()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    load_checkpoint(model, tmp_path / "net.safetensors")
    torch.save({"ema": source.state_dict(), "model": model.state_dict()}, tmp_path / "two.pt")
    load_checkpoint(other, tmp_path / "two.pt", key="ema")
    assert _same(source, model)
    assert _same(source, other)


def test_tied_weight_named_once_is_complete(tmp_path: Path) -> None:
    source, model = TiedWeights(), TiedWeights()
    save_file({"embedding.weight": source.embedding.weight.detach()}, tmp_path / "t.safetensors")
    load_checkpoint(model, tmp_path / "t.safetensors")
    assert torch.equal(model.head.weight, source.embedding.weight)
    assert model.head.weight is model.embedding.weight


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = _net().state_dict()
    del state["0.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["2.weight"] = torch.zeros(3, 4)
    torch.save(state, tmp_path / "bad.pt")
    model = _net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_checkpoint(model, tmp_path / "bad.pt")
    for part in ("missing 0.bias", "unexpected extra.weight", "2.weight (3, 4) where the model has (2, 4)"):
        assert part in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"state_dict": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="allow_pickle"):
        load_checkpoint(_net(), tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_checkpoints_are_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_checkpoint(_net(), path)
    assert "\n" not in str(error.value)


def test_models_without_movable_weights_are_refused() -> None:
    with pytest.raises(InputError, match="no parameters"):
        Tensors.of(nn.ReLU())
    with pytest.raises(InputError, match="lazy"):
        Tensors.of(nn.LazyLinear(3))
    with pytest.raises(InputError, match="complex"):
        Tensors.of(nn.Linear(2, 2).to(torch.complex64))
