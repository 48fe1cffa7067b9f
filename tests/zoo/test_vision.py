"""torchvision beside any torch, its models by name, and CIFAR from files made here in CIFAR's own format."""

from __future__ import annotations

import ast
import hashlib
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from distsurf.errors import InputError
from distsurf.zoo import vision


def python(code: str, *path: Path) -> str:
    """What a fresh interpreter prints for some code, with ``path`` before all other places of modules."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- the import -------------------------------------------------------------------------------------------


def test_loads_and_computes_in_a_fresh_process() -> None:
    """Also after a plain import has failed, and twice."""
    printed = python("""
try:
    import torchvision
except RuntimeError:
    pass
import torch
from distsurf.zoo import vision
first = vision.load()
import torchvision
assert vision.load() is first is torchvision
with torch.inference_mode():
    print(*vision.model("resnet18").eval()(torch.zeros(1, 3, 32, 32)).shape)
""")
    assert printed == "1 1000"


def test_defines_nothing_where_the_plain_import_works(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("")
    printed = python(
        "from distsurf.zoo import vision\nimport torch\n"
        "print(vision.load().__file__, hasattr(torch.ops.torchvision, 'nms'))",
        tmp_path,
    )
    assert printed == f"{tmp_path / 'torchvision.py'} False"


def test_other_failures_of_the_import_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"beside torch .*made for another torch; install"):
        vision.load()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="install the torchvision made for this torch"):
        vision.load()


# -- models -----------------------------------------------------------------------------------------------


def test_arguments_reach_the_model() -> None:
    model = vision.model("mobilenet_v3_small", num_classes=3).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_no_backbone_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_downloads(monkeypatch)
    assert vision.model("lraspp_mobilenet_v3_large", num_classes=2)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnt18", {}, "'resnt18'; the nearest of its names are resnet18"),
        ("resnet18", {"depth": 3}, "resnet18 cannot be made with depth=3: .*unexpected keyword argument"),
        ("resnet18", {"weights": "BEST"}, "resnet18 has no weights 'BEST'; it has IMAGENET1K_V1"),
        ("resnet18", {"weights": "DEFAULT", "num_classes": 10}, "expected value 1000 but got 10"),
    ],
)
def test_what_torchvision_does_not_have(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vision.model(name, **arguments)


def refuse_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


def test_weights_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refuse_downloads(monkeypatch)
    with pytest.raises(
        InputError, match=r"cannot download the weights DEFAULT .*no network.*run: "
    ) as caught:
        vision.model("squeezenet1_1", weights="DEFAULT")
    assert (
        command(caught.value)
        == "from distsurf.zoo import vision; vision.model('squeezenet1_1', weights='DEFAULT')"
    )

    own = vision.model("squeezenet1_1")
    file = vision.load().models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(own.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    cached = vision.model("squeezenet1_1", weights="DEFAULT")
    assert all(map(torch.equal, own.parameters(), cached.parameters()))


def command(error: InputError) -> str:
    """The Python code of the shell line at the end of a message, once a shell has read it."""
    program, flag, code = shlex.split(str(error).split("run: ")[1])
    assert (program, flag) == ("python", "-c")
    ast.parse(code)
    return code


# -- CIFAR ------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    """Small files of the format, with their own checksums in place of the published; the bytes they hold."""
    dataset = getattr(vision.load().datasets, name)
    rng = np.random.default_rng(0)
    key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)
    (folder / dataset.base_folder).mkdir()

    def write(file: str, content: Any) -> str:
        raw = pickle.dumps(content)
        (folder / dataset.base_folder / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    held: dict[str, tuple[Any, Any]] = {}
    for split in ("train", "test"):
        listed, pixels, labels = [], [], []
        for file, _ in getattr(dataset, f"{split}_list"):
            part = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, classes, 4).tolist()
            listed.append([file, write(file, {"data": part[0], key: part[1]})])
            pixels.append(part[0])
            labels += part[1]
        monkeypatch.setattr(dataset, f"{split}_list", listed)
        held[split] = np.concatenate(pixels).reshape(-1, 3, 32, 32), labels
    meta = write(dataset.meta["filename"], {dataset.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": meta})
    return held


@pytest.mark.parametrize(("name", "train"), [("CIFAR10", 20), ("CIFAR100", 4)])
def test_cifar(name: str, train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = write_cifar(tmp_path, name, monkeypatch)
    data = getattr(vision, name.lower())(tmp_path)
    assert list(data) == ["train", "test"]
    mean = np.array([125.3, 123.0, 113.9]).reshape(3, 1, 1) / 255
    std = np.array([63.0, 62.1, 66.7]).reshape(3, 1, 1) / 255
    for split, (images, labels) in data.items():
        assert images.shape == (train if split == "train" else 4, 3, 32, 32)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.is_contiguous()
        np.testing.assert_allclose(images, (held[split][0] / 255 - mean) / std, atol=1e-6)
        assert labels.tolist() == held[split][1]


def test_damaged_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    with open(tmp_path / "cifar-10-batches-py" / "test_batch", "ab") as file:
        file.write(b"!")
    with pytest.raises(InputError, match="no intact CIFAR10"):
        vision.cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "inside"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_missing_cifar_says_how_to_fetch_it(name: str, inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    with pytest.raises(
        InputError, match=f"{re.escape(str(folder))}.*{inside}.*on a machine with network"
    ) as caught:
        getattr(vision, name)(folder)
    code = command(caught.value)
    assert code.endswith(f"vision.load().datasets.{name.upper()}({str(folder)!r}, download=True)")
    assert "\n" not in str(caught.value)
