"""The job: a TOML file, validated and typed, that says which surface is to be evaluated and how.

Job files may name Python callables, so a job file is code: run only those whose origin you trust. Paths are relative
to the folder in which the command is given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distsurf.errors import InputError
from distsurf.grid import Grid
from distsurf.names import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIVE = "live:"
"""What stands before the name of an object that a script passed: such a job cannot be run from its text alone."""


Step = Literal["fold", "channels_last", "many", "fuse", "graph"]
"""Steps of the fast path (`distsurf.objective.fast.steps`)."""

YEAR = 366 * 24 * 3600.0


class Section(BaseModel):
    """A table of the job file. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The network and its weights."""

    factory: str
    """A name (``resnet8``), ``torchvision:NAME``, ``package.module:callable`` or ``file.py:callable``."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    checkpoint: str | None = None
    """A state dict, torch or safetensors; without one the model keeps the weights that the factory gave it."""
    checkpoint_key: str | None = None
    """The checkpoint's entry that holds the state dict."""
    allow_pickle: bool = False
    """Load checkpoints that hold more than tensors. They can run code."""


class TrainSection(Section):
    """How to train the model if its checkpoint does not exist yet (SGD with Nesterov momentum)."""

    split: str = "train"
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    shift: Annotated[int, Field(ge=0)] = 0
    """Random shifts of the images by up to so many pixels."""
    seed: Annotated[int, Field(ge=0)] = 0


class DataSection(Section):
    """The data that the loss is a mean over."""

    source: str
    """A name (``digits``), ``package.module:callable`` or ``file.py:callable`` that returns the data."""
    arguments: dict[str, Any] = {}
    splits: Annotated[list[str], Field(min_length=1)] | None = None
    """Which splits to evaluate; all that the source gives if left out."""
    batch_size: Annotated[int, Field(ge=0)] = 0
    """Samples per forward pass; 0 finds the fastest by a short measurement, which the surface file then keeps."""
    target: str | None = None
    """For dict batches: the entry that holds the targets."""


class TermSection(Section):
    """A loss or metric with parameters; ``as`` renames its column."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    name: str
    column: Annotated[str | None, Field(alias="as")] = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything given beside ``name`` and ``as``."""
        return dict(self.model_extra or {})


class ObjectiveSection(Section):
    """What is measured at every point."""

    loss: str | TermSection | list[str | TermSection] = "cross_entropy"
    """One loss or several, by name or as ``module:callable``; the first one's column is called ``loss``."""
    metrics: list[str | TermSection] | None = None
    """Left out: accuracy for classification losses, none for others."""
    function: str | None = None
    """``module:callable`` ``(model, batch) -> {name: (sum, count)}`` in place of losses and metrics."""
    batch_norm: Literal["frozen", "interpolated", "recomputed"] = "frozen"
    """Batch-norm statistics: ``frozen`` keeps the stored ones, ``interpolated`` makes them part of the directions (the
    ``states`` of Li et al.'s code), ``recomputed`` takes them from the training data at every point."""

    @property
    def losses(self) -> list[TermSection]:
        """The losses, each as a table."""
        return _as_terms(self.loss if isinstance(self.loss, list) else [self.loss])

    @model_validator(mode="after")
    def _has_loss(self) -> ObjectiveSection:
        if self.loss == []:
            raise ValueError("at least one loss is needed")
        return self


def _as_terms(terms: Iterable[str | TermSection]) -> list[TermSection]:
    return [TermSection(name=term) if isinstance(term, str) else term for term in terms]


class DirectionSection(Section):
    """The direction of one axis. What is left out is that of ``[directions]``, or the default."""

    kind: Literal["random", "difference", "gradient", "file"] | None = None
    """``random``: Gaussian numbers. ``difference``: from the model to another ``checkpoint``, which lies at 1.
    ``gradient``: of the first loss on the training data, uphill. ``file``: from a ``file`` of directions."""
    checkpoint: str | None = None
    file: str | None = None
    normalization: Literal["filter", "layer", "weight", "center", "unit", "none"] | None = None
    """Left out: ``filter`` for random directions, ``center`` for gradients, else ``none``."""
    ignore: Literal["bias_bn", "none"] | None = None
    """Left out: ``bias_bn`` for random directions, else ``none``."""
    seed: Annotated[int | None, Field(ge=0)] = None
    """Left out: 0. The axes of one seed are independent of one another."""

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> DirectionSection:
        for kind, key in (("difference", "checkpoint"), ("file", "file")):
            if self.kind == kind and getattr(self, key) is None:
                raise ValueError(f"kind = {kind!r} needs {key}")
            if self.kind not in (kind, None) and getattr(self, key) is not None:
                raise ValueError(f"{key} is for kind = {kind!r}")
        return self


class DirectionsSection(DirectionSection):
    """The directions that span the surface: of all axes, and of each one in ``[directions.x]`` and so on."""

    kind: Literal["random", "difference", "gradient", "file", "plane"] | None = None  # type: ignore[assignment]
    """And ``plane``: through the model and two other ``checkpoints`` (Garipov et al. 2018)."""
    checkpoints: list[str] | None = None
    repeat: Annotated[int, Field(ge=1)] = 1
    """How many independent planes of random directions to evaluate; the first is that of the same job without it."""
    orthogonalize: bool = False
    x: DirectionSection | None = None
    y: DirectionSection | None = None
    z: DirectionSection | None = None

    def axis(self, name: str) -> DirectionSection:
        """The direction of an axis, with every value that it has."""
        own: DirectionSection | None = getattr(self, name)
        told = {} if own is None else own.model_dump(exclude_none=True)
        if "kind" not in told:
            told = {**self.model_dump(exclude_none=True, include={"kind", "checkpoint", "file"}), **told}
        general = self.model_dump(exclude_none=True, include={"normalization", "ignore", "seed"})
        told = {"kind": "random", "seed": 0, **general, **told}
        is_random = told["kind"] == "random"
        length = "filter" if is_random else "center" if told["kind"] == "gradient" else "none"
        return DirectionSection(
            **{"normalization": length, "ignore": "bias_bn" if is_random else "none", **told}
        )

    def told(self, axes: Iterable[str]) -> dict[str, Any]:
        """Everything that the directions of these axes depend on, defaults written out."""
        if self.kind == "plane":
            return {"checkpoints": self.checkpoints, "normalization": self.normalization or "none"}
        told: dict[str, Any] = {"orthogonalize": self.orthogonalize}
        for name in axes:
            own = self.axis(name).model_dump(exclude_none=True)
            if own["kind"] != "random":
                del own["seed"]
            told.update((f"{name}.{key}", value) for key, value in own.items())
        return told if self.repeat == 1 else {**told, "repeat": self.repeat}

    @model_validator(mode="after")
    def _is_one_plane(self) -> DirectionsSection:
        if (self.kind == "plane") != (self.checkpoints is not None):
            raise ValueError("kind = 'plane' needs checkpoints, a list of two, and no other kind has them")
        if self.kind == "plane":
            if self.checkpoints is None or len(self.checkpoints) != 2:
                raise ValueError(
                    f"a plane goes through the model and two checkpoints; {self.checkpoints} were given"
                )
            if self.x or self.y or self.z or self.orthogonalize or self.ignore == "bias_bn":
                raise ValueError(
                    "a plane moves everything, orthogonally: leave x, y, orthogonalize and ignore out"
                )
            if self.normalization not in (None, "none", "unit", "center"):
                raise ValueError(
                    f"normalization = {self.normalization!r} would leave the plane of the models; expected 'none' (the "
                    "first checkpoint at 1 on x), 'unit' or 'center'"
                )
        return self


class CurvatureSection(Section):
    """What of the loss's curvature is measured at every point, beside the objective: of its first column's Hessian."""

    measures: Annotated[list[Literal["eigenvalues", "trace", "gradient", "plane"]], Field(min_length=1)] = [
        "eigenvalues"
    ]
    """``eigenvalues``: the lowest and the highest. ``trace``. ``gradient``: its norm. ``plane``: second derivatives of
    the surface itself."""
    split: str | None = None
    """Of which data; left out: ``train``."""
    samples: Annotated[int, Field(ge=0)] = 0
    """A fixed part of it, spread over all; 0 is all."""
    parameters: Literal["all", "weights"] = "all"
    """``weights``: only those of dimension > 1."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Error of the eigenvalues, relative; of one that is smaller than a thousandth of the other, relative to that."""
    products: Annotated[int, Field(ge=1)] = 100
    """Hessian-vector products for the eigenvalues of a point, at most."""
    probes: Annotated[int, Field(ge=2)] = 10
    """Random vectors for the trace."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Samples at a time; it changes last digits only."""

    @model_validator(mode="after")
    def _is_of_one_mind(self) -> CurvatureSection:
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures = {self.measures} names one twice")
        if "plane" in self.measures and self.parameters != "all":
            raise ValueError("the measure 'plane' is of all that moves in the plane: leave parameters out")
        return self


class GridSection(Section):
    """The coordinates, ``min:max:count`` per axis."""

    x: str
    y: str | None = None
    z: str | None = None

    def grid(self) -> Grid:
        """The grid itself. Raises InputError if an axis cannot be read."""
        return Grid.parse({"x": self.x, "y": self.y, "z": self.z})

    @model_validator(mode="after")
    def _is_readable(self) -> GridSection:
        try:
            self.grid()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self


class RunSection(Section):
    """How to compute: what is here may change speed and last digits, never the meaning."""

    precision: Literal["fp32", "fp64", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 is strict: no TF32. The surface file has each one's error against float64."""
    fast: bool | list[Step] = True
    """Whether to look for faster ways to the same values; ``--plain`` is false. A list names the steps to try."""
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 divides the cores among the ranks of a node."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random state at every point, for models that draw random numbers in evaluation."""
    silence: Annotated[float, Field(gt=0, le=YEAR)] = 300.0
    """Seconds without a sign of life (one is given between batches) after which a rank is done without."""
    disk_patience: Annotated[float, Field(ge=0, le=YEAR)] = 600.0
    """Seconds for which a disk that takes no results is tried again, while the evaluation goes on."""

    @field_validator("fast", mode="before")
    @classmethod
    def _of_one(cls, fast: Any) -> Any:
        return [fast] if isinstance(fast, str) else fast


class OutputSection(Section):
    """Where the results go."""

    file: str | None = None
    """The surface file; left out: ``runs/NAME/surface.h5``. Pictures go beside it."""
    pictures: bool = True


class Job(Section):
    """A validated job. ``Job.load`` reads a file, ``Job.read`` a text."""

    name: str = "surface"
    model: ModelSection
    train: TrainSection | None = None
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    directions: DirectionsSection = DirectionsSection()
    curvature: CurvatureSection | None = None
    grid: GridSection
    run: RunSection = RunSection()
    output: OutputSection = OutputSection()

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError("the name becomes a folder's name: no '/', no leading '.', not empty")
        return name

    @model_validator(mode="after")
    def _trains_into_checkpoint(self) -> Job:
        if self.train is not None and self.model.checkpoint is None:
            raise ValueError("[train] needs model.checkpoint, the file to keep the trained weights in")
        return self

    @model_validator(mode="after")
    def _has_an_axis_for_each_direction(self) -> Job:
        axes = self.grid.grid().names
        for name in ("x", "y", "z"):
            if name not in axes and getattr(self.directions, name) is not None:
                raise ValueError(f"directions.{name}: the grid has no axis {name}")
        if self.directions.kind == "plane" and len(axes) != 2:
            raise ValueError(
                f"directions.kind = 'plane' needs the axes x and y; the grid has {', '.join(axes)}"
            )
        moving = self.objective.batch_norm
        if self.curvature is not None and "plane" in self.curvature.measures and moving != "frozen":
            raise ValueError(
                f"curvature.measures: 'plane' needs objective.batch_norm = 'frozen', since {moving} statistics bend "
                "the surface too"
            )
        if self.directions.repeat > 1:
            kinds = (
                {"plane"} if self.directions.kind == "plane" else {self.directions.axis(n).kind for n in axes}
            )
            if kinds != {"random"}:
                raise ValueError(
                    "directions.repeat draws random directions anew; no other kind can be repeated"
                )
            try:
                self.evaluated_grid()
            except InputError as error:
                raise ValueError(f"directions.repeat: {error}") from None
        return self

    def evaluated_grid(self) -> Grid:
        """The grid of all points: that of the section ``[grid]``, as often as ``directions.repeat`` says."""
        return self.grid.grid().repeat(self.directions.repeat)

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Job:
        """Read a job file; ``overrides`` are texts ``section.key=value``. Raises InputError."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise InputError(f"job file {path} cannot be read: {reason}") from error
        return cls.read(text, overrides, origin=str(path))

    @classmethod
    def read(cls, text: str, overrides: Iterable[str] = (), origin: str = "job") -> Job:
        """Read a job from TOML text. Raises InputError."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{origin} is not TOML: {error}") from error
        except RecursionError:
            raise InputError(f"{origin}: its tables are nested too deeply") from None
        for override in overrides:
            _override(table, override)
        return cls.build(table, origin)

    @classmethod
    def build(cls, table: Mapping[str, Any], origin: str = "job") -> Job:
        """Validate nested tables. Raises InputError with everything that is wrong, in one line."""
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise InputError(f"{origin}: {'; '.join(_complaints(error))}") from None

    def to_toml(self) -> str:
        """The whole job as TOML, defaults included; `read` gives the same job back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, by_alias=True))

    @property
    def fingerprint(self) -> str:
        """Digest of everything in the job that values depend on (not its name, output or placement)."""
        return hashlib.sha256(json.dumps(self._values_depend_on(), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, recorded: Job) -> str:
        """In words what values of a recorded job depend on otherwise than those of this one; empty if nothing."""
        there, here = recorded._values_depend_on(), self._values_depend_on()
        told = []
        for section in {**here, **there}:
            theirs, ours = there.get(section, {}), here.get(section, {})
            told += [
                f"{section}.{key} ({theirs.get(key)} there, {ours.get(key)} here)"
                for key in sorted(theirs.keys() | ours.keys())
                if theirs.get(key) != ours.get(key)
            ]
        return "; ".join(told)

    def _values_depend_on(self) -> dict[str, dict[str, Any]]:
        told = self.model_dump(
            mode="json", by_alias=True, exclude={"name": True, "output": True, "train": True}
        )
        for key in ("device", "threads", "fast"):
            del told["run"][key]
        if self.curvature is None:
            del told["curvature"]
        return {**told, "directions": self.directions.told(self.grid.grid().names)}

    @property
    def losses(self) -> list[TermSection]:
        """The losses, each as a table."""
        return self.objective.losses

    @property
    def metrics(self) -> list[TermSection] | None:
        """The metrics, each as a table; None if the loss decides."""
        return None if self.objective.metrics is None else _as_terms(self.objective.metrics)

    @property
    def path(self) -> Path:
        """The surface file."""
        return Path(self.output.file or Path("runs", self.name, "surface.h5"))


def _override(table: dict[str, Any], text: str) -> None:
    """Apply ``section.key=value``; the value is TOML, or else a string as it stands."""
    key, separator, value = text.partition("=")
    *sections, last = key.strip().split(".")
    if not separator or not last:
        raise InputError(
            f"--set {text!r} cannot be read: expected section.key=value, for example grid.x=-1:1:21"
        )
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {text!r}: {section} is a value, not a section")
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        table[last] = value.strip()


def _complaints(error: ValidationError) -> list[str]:
    """What is wrong, once per place. Of a union's members, only the one that came furthest is heard."""
    by_place = {tuple(_place(e)): e for e in reversed(error.errors())}
    innermost = [p for p in by_place if not any(q != p and q[: len(p)] == p for q in by_place)]
    return [_complaint(list(place), by_place[place]) for place in reversed(innermost)]


def _place(error: Any) -> list[str]:
    """The keys that lead to an error; pydantic puts the types of a union's members between them."""
    *outer, last = error["loc"] or ("",)
    keys = [p for p in outer if isinstance(p, int) or (p.isidentifier() and p not in _UNION_MEMBERS)]
    # An unknown key may look like anything.
    is_key = isinstance(last, int) or error["type"] == "extra_forbidden"
    if is_key or (last.isidentifier() and last not in _UNION_MEMBERS):
        keys.append(last)
    return [" ".join(str(key).split()) for key in keys]


def _complaint(place: list[str], error: Any) -> str:
    """One validation error in words: where, what was given, what is allowed."""
    where = ".".join(place) or "the job"
    if error["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        return f"unknown key {where}: {nearest(place[-1], known)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if place and place[0] == "objective" and place[1:2] in (["loss"], ["metrics"]):
        return f"{where} = {error['input']!r}: expected a name, or a table with a name, for example 'mse'"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = error["input"]
    if error["type"] == "value_error" or isinstance(given, (dict, BaseModel)):
        return f"{where}: {message}"
    return f"{where} = {given!r}: {message.replace('input should be', 'expected')}"


_UNION_MEMBERS = frozenset({"str", "TermSection"})


def _known_keys(place: list[str]) -> list[str]:
    section: Any = Job
    for name in place:
        annotation = section.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
