"""The plane of a training's checkpoints, against scikit-learn's PCA and the projections themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from distsurf.errors import InputError
from distsurf.subspace import checkpoints as module
from distsurf.subspace.checkpoints import Checkpoints
from distsurf.subspace.trajectory import principal_plane, project


def rows_of(count: int = 9, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """State dicts of a random walk: two tensors, statistics and a counter."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(7, 300, generator=generator), torch.randn(5, generator=generator)
    found = []
    for step in range(count):
        weight = weight + 0.1 * torch.randn(7, 300, generator=generator) * (1 + step)
        bias = bias + 0.1
        state = {
            "w": weight,
            "b": bias,
            "n.running_var": torch.full((5,), float(step)),
            "n.count": torch.tensor(step),
        }
        found.append({name: tensor.clone() for name, tensor in state.items()})
    return found


def write(folder: Path, states: list[dict[str, torch.Tensor]]) -> list[Path]:
    """Every second file in either format, and one with a wrapper's prefix."""
    paths = []
    for i, state in enumerate(states):
        if i % 2:
            save_file(state, folder / f"{i}.safetensors")
        else:
            prefix = "module." if i == 4 else ""
            torch.save(
                {"state_dict": {prefix + n: t for n, t in state.items()}, "epoch": i}, folder / f"{i}.pt"
            )
        paths.append(folder / (f"{i}.safetensors" if i % 2 else f"{i}.pt"))
    return paths


def matrix(states: list[dict[str, torch.Tensor]]) -> np.ndarray:
    return np.stack([torch.cat([s["w"].flatten(), s["b"]]).double().numpy() for s in states])


def vectors(found: np.ndarray, checkpoints: Checkpoints) -> np.ndarray:
    """Directions without the layout's padding."""
    return np.stack([np.concatenate([v.ravel() for v in checkpoints.layout.views(d)]) for d in found])


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in many pieces."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("center", [0, 4, 8])
def test_about_the_mean_it_is_scikit_learns_pca(tmp_path: Path, chunked: None, center: int) -> None:
    states = rows_of()
    pca = PCA(2, svd_solver="full").fit(matrix(states))
    with Checkpoints(write(tmp_path, states)) as checkpoints:
        assert len(checkpoints.chunks()) == 4
        found = principal_plane(checkpoints, center, about="mean")
        directions = vectors(found.directions, checkpoints)
    everything = PCA(svd_solver="full").fit(matrix(states)).explained_variance_ratio_
    np.testing.assert_allclose(found.explained_centred[:8], everything[:8], rtol=1e-8)
    signs = np.sign((directions * pca.components_).sum(axis=1))
    np.testing.assert_allclose(directions, pca.components_ * signs[:, None], atol=1e-7)
    expected = (matrix(states) - matrix(states)[center]) @ (pca.components_ * signs[:, None]).T
    np.testing.assert_allclose(found.coordinates, expected, atol=1e-7)


@pytest.mark.parametrize("scale", ["none", "center"])
def test_coordinates_are_projections(tmp_path: Path, scale: str) -> None:
    """About the centre: the right singular vectors of Δ; what is outside is what the projection leaves."""
    states = rows_of()
    delta = matrix(states) - matrix(states)[-1]
    _, s, vt = np.linalg.svd(delta, full_matrices=False)
    with Checkpoints(write(tmp_path, states)) as checkpoints:
        found = principal_plane(checkpoints, 8, scale=scale)  # type: ignore[arg-type]
        directions = vectors(found.directions, checkpoints)
    unit = np.linalg.norm(matrix(states)[-1]) if scale == "center" else 1.0
    np.testing.assert_allclose(found.unit, unit, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), unit, rtol=1e-6)
    np.testing.assert_allclose(found.explained[:8], s[:8] ** 2 / (s**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(np.abs(directions @ vt[:2].T), np.eye(2) * unit, atol=1e-6 * unit)
    np.testing.assert_allclose(found.coordinates, delta @ directions.T / unit**2, atol=1e-6)
    rest = delta - found.coordinates @ directions
    outside = np.linalg.norm(rest[:-1], axis=1) / np.linalg.norm(delta[:-1], axis=1)
    np.testing.assert_allclose(found.outside[:-1], outside, rtol=1e-5)
    assert found.outside[-1] == 0
    assert (found.coordinates[np.abs(found.coordinates).argmax(axis=0), [0, 1]] > 0).all()


def test_projections_onto_a_plane_are_least_squares(tmp_path: Path, chunked: None) -> None:
    """Of directions that are not orthogonal; and onto the principal plane they are its own coordinates."""
    states = rows_of()
    with Checkpoints(write(tmp_path, states)) as checkpoints:
        own = principal_plane(checkpoints, 2)
        again = project(checkpoints, 2, own.directions)
        slanted = np.stack([own.directions[0], own.directions[0] + 2 * own.directions[1]])
        found = project(checkpoints, 2, slanted)
        plane = vectors(slanted, checkpoints).astype(np.float64)
        with pytest.raises(InputError, match="the two directions are parallel"):
            project(checkpoints, 2, np.stack([own.directions[0], own.directions[0]]))
    for name in ("coordinates", "outside"):
        np.testing.assert_allclose(getattr(again, name), getattr(own, name), atol=1e-6)
    np.testing.assert_allclose(again.explained, own.explained[:2], rtol=1e-6)
    delta = matrix(states) - matrix(states)[2]
    expected, *_ = np.linalg.lstsq(plane.T, delta.T)
    np.testing.assert_allclose(found.coordinates, expected.T, atol=1e-6)
    centred = delta - delta.mean(axis=0)
    inside = centred @ np.linalg.pinv(plane) @ plane
    share = np.square(inside).sum() / np.square(centred).sum()
    np.testing.assert_allclose(found.explained_centred.sum(), share, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda states: states[:1], "two checkpoints or more; 1 were given"),
        (lambda states: states[:2], "the 2 checkpoints span 1 direction, and 2 were asked for"),
        (lambda states: [states[0]] * 3, "all checkpoints have the same weights"),
        (lambda states: [*states[:3], {**states[3], "b": torch.full((5,), torch.nan)}], "3.safetensors: b holds NaN"),
        (lambda states: [*states[:3], {"w": states[3]["w"]}], "3.safetensors has no tensor b"),
        (lambda states: [*states[:3], {**states[3], "b": torch.ones(6)}], r"b has shape \(6,\), and \(5,\) in others"),
        (lambda states: [{"n": torch.tensor(1)}] * 3, "has no floating-point tensors"),
    ],
)  # fmt: skip
def test_what_is_no_trajectory_is_told(tmp_path: Path, change: object, words: str) -> None:
    states = change(rows_of(5))  # type: ignore[operator]
    with pytest.raises(InputError, match=words), Checkpoints(write(tmp_path, states)) as checkpoints:
        principal_plane(checkpoints, 0)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from distsurf.subspace.checkpoints import Checkpoints
from distsurf.subspace.trajectory import principal_plane

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

import distsurf.subspace.trajectory as module
least, most = peak(), 0
original = Checkpoints.read
def read(self, chunk):
    global most
    found = original(self, chunk)
    most = max(most, peak())
    return found
Checkpoints.read = read
with Checkpoints(sorted(Path().glob("*.*t*"))) as checkpoints:
    found = principal_plane(checkpoints, 0)
print((most - least) / 2**20, found.explained[0])
"""


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_memory_does_not_grow_with_the_checkpoints(tmp_path: Path, kind: str) -> None:
    """Forty checkpoints of 16 MiB: anonymous memory stays at a few of them (pages of mapped files are the kernel's)."""
    generator = torch.Generator().manual_seed(0)
    base, step = torch.randn(2048, 2048, generator=generator), torch.randn(2048, 2048, generator=generator)
    for i in range(40):
        state = {"w": base + i * step + (i == 7)}
        if kind == "pt":
            torch.save(state, tmp_path / f"{i:02}.pt")
        else:
            save_file(state, tmp_path / f"{i:02}.safetensors")
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    used, explained = map(float, ended.stdout.split())
    assert explained > 0.9
    assert used < 330, (
        used
    )  # chunks of all, twice over; two directions. All together would be 640, in float64 1,280.
