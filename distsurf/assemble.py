"""From a job's words to live objects: the model, the data, the objective."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distsurf import zoo
from distsurf.errors import DistsurfError, InputError, in_one_line
from distsurf.files import replacing
from distsurf.job import LIVE, Job
from distsurf.names import nearest
from distsurf.objective.data import Split, as_splits, tensors_of
from distsurf.objective.losses import LOSSES, METRIC_OF, METRICS, Objective, Supervised, Term
from distsurf.subspace.weights import load_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Live:
    """Objects that a script passed in place of their names."""

    model: nn.Module
    data: Any
    losses: tuple[Callable[..., Any] | None, ...] = ()
    """For every loss of the job the script's callable, None where it has a name."""
    objective: Objective | None = None
    checkpoints: Mapping[str, Any] = field(default_factory=dict)
    """Modules and state dicts by the names that the job has for them."""


def build_model(job: Job, live: Live | None, seed: int | None = None) -> nn.Module:
    """The model as the factory makes it from a seed (``run.seed``), or the script's own where it passed one."""
    if live is not None:
        return live.model
    name, arguments = job.model.factory, job.model.arguments
    if name.startswith(LIVE):
        raise InputError(
            f"model.factory = {name!r} was an object of a Python script: run that script again to continue its surface"
        )
    with torch.random.fork_rng():
        torch.manual_seed(job.run.seed if seed is None else seed)
        if _is_callable_name(name):
            factory = find_callable(name, "model.factory")
            model = _call(factory, arguments, "model.factory", name)
        else:
            model = zoo.model(name, **arguments)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model.factory {name!r} returned {type(model).__name__}; expected a torch nn.Module"
        )
    return model


def build_splits(job: Job, live: Live | None) -> dict[str, Split]:
    """All the data that the source gives, in memory, by split."""
    if live is not None:
        data = live.data
    elif _is_callable_name(job.data.source):
        factory = find_callable(job.data.source, "data.source")
        data = _call(factory, job.data.arguments, "data.source", job.data.source)
    else:
        data = zoo.data(job.data.source, **job.data.arguments)
    try:
        return {split.name: split for split in as_splits(data)}
    except DistsurfError:
        raise
    except Exception as error:  # the user's own Dataset or generator
        raise InputError(f"reading the data raised {in_one_line(error)}") from error


def wanted_splits(job: Job, splits: Mapping[str, Split]) -> list[Split]:
    """The splits that the job evaluates, in its order."""
    wanted = splits if job.data.splits is None else job.data.splits
    for name in wanted:
        if name not in splits:
            raise InputError(f"data.splits: the data has no split {name!r}; {nearest(name, splits)}")
    return [splits[name] for name in wanted]


def curved_split(name: str | None, splits: Mapping[str, Split]) -> Split:
    """The data that curvature is measured on. Raises InputError."""
    if name is None:
        name = next((usual for usual in ("train", "") if usual in splits), next(iter(splits)))
    if name not in splits:
        raise InputError(f"curvature.split = {name!r}: the data has {', '.join(splits)}")
    return splits[name]


def training_split(splits: Mapping[str, Split]) -> Split:
    """The split called ``train``, or data that has no splits. Raises InputError."""
    for name in ("train", ""):
        if name in splits:
            return splits[name]
    raise InputError(
        "batch-norm statistics are recomputed from the split called 'train'; "
        f"the data has only {', '.join(splits)}"
    )


def build_objective(job: Job, live: Live | None) -> Objective:
    """The objective: the user's own, or one made of losses and metrics."""
    if live is not None and live.objective is not None:
        return live.objective
    if job.objective.function is not None:
        if job.objective.function.startswith(LIVE):
            raise InputError("the objective was an object of a Python script: run that script again")
        return find_callable(job.objective.function, "objective.function")
    terms = []
    given = live.losses if live is not None else (None,) * len(job.losses)
    for i, (loss, own) in enumerate(zip(job.losses, given, strict=True)):
        column = loss.column or ("loss" if i == 0 else loss.name)
        if own is not None:
            terms.append(Term.users(own, column))
        elif _is_callable_name(loss.name):
            function = find_callable(loss.name, "objective.loss")
            is_factory = inspect.isclass(function) and issubclass(function, nn.Module)
            terms.append(Term.users(function(**loss.parameters) if is_factory else function, column))
        else:
            terms.append(Term.named(loss.name, loss.parameters, column))
    if job.metrics is not None:
        terms += [Term.named(metric.name, metric.parameters, metric.column) for metric in job.metrics]
    elif job.losses[0].name in METRIC_OF:
        terms.append(Term.named(METRIC_OF[job.losses[0].name], {}, "accuracy"))
    return Supervised(terms, job.data.target)


def check_names(job: Job) -> None:
    """Raise InputError for names of losses and metrics that do not exist, before anything slow begins."""
    known = LOSSES | METRICS
    if job.objective.function is None:
        for term in [*job.losses, *(job.metrics or [])]:
            if not _is_callable_name(term.name) and not term.name.startswith(LIVE) and term.name not in known:
                raise InputError(f"no loss or metric {term.name!r}; {nearest(term.name, known)}")


def load_weights(
    job: Job, model: nn.Module, splits: Mapping[str, Split], device: torch.device, say: Say
) -> None:
    """Bring the checkpoint into the model; train it first if it does not exist and the job says how."""
    if job.model.checkpoint is None:
        return
    path = Path(job.model.checkpoint)
    if job.train is not None:
        if not path.exists():
            _train(job, model, splits, path, device, say)
        else:
            _require_recipe(job, path)
    load_checkpoint(model, path, key=job.model.checkpoint_key, allow_pickle=job.model.allow_pickle)


def own_losses(job: Job, live: Live | None) -> list[Callable[..., Any]]:
    """The losses that are the user's own code, whether a script passed them or the job names them."""
    passed = [loss for loss in (live.losses if live else ()) if loss is not None]
    return passed + [find_callable(t.name, "objective.loss") for t in job.losses if _is_callable_name(t.name)]


# -- names ------------------------------------------------------------------------------------------------


def _is_callable_name(name: str) -> bool:
    return ":" in name and not name.startswith(("torchvision:", LIVE))


def find_callable(name: str, where: str) -> Callable[..., Any]:
    """The callable that ``package.module:callable`` or ``path/file.py:callable`` names. Raises InputError."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise InputError(f"{where} = {name!r}: expected file.py:callable or package.module:callable")
    _look_in(Path.cwd())  # a console script, unlike ``python -m``, does not
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name))
        else:
            module = importlib.import_module(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise InputError(f"{where} = {name!r}: {' '.join(str(error).split())}") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or place.lineno
        raise InputError(f"{where} = {name!r}: {in_one_line(error)} (line {line})") from error
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        has = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise InputError(
            f"{where} = {name!r}: {module_name} has no callable {attribute!r}; {nearest(attribute, has)}"
        )
    return function


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    _look_in(path.resolve().parent)  # as if it were run as a script: what lies beside it can be imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path.resolve())
    # Registered, so that classes defined there can be pickled and inspected.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _call(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str, name: str) -> Any:
    try:
        return factory(**arguments)
    except DistsurfError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{where} = {name!r} raised {in_one_line(error)}") from error


# -- training ---------------------------------------------------------------------------------------------


def recipe(job: Job) -> str:
    """What the trained weights depend on, as canonical JSON; kept in the checkpoint's metadata."""
    told = {
        "model": {"factory": job.model.factory, "arguments": job.model.arguments},
        "data": {"source": job.data.source, "arguments": job.data.arguments},
        "train": job.train.model_dump() if job.train else None,
    }
    return json.dumps(told, sort_keys=True)


def _train(
    job: Job, model: nn.Module, splits: Mapping[str, Split], path: Path, device: torch.device, say: Say
) -> None:
    from safetensors.torch import save_model

    assert job.train is not None
    wish = job.train
    if wish.split not in splits:
        raise InputError(f"train.split: no split {wish.split!r}; {nearest(wish.split, splits)}")
    split = splits[wish.split]
    tensors = tensors_of(split.pieces[0])
    if not split.whole or len(tensors) != 2:
        raise InputError("[train] needs a split that is one pair of tensors (images, labels)")
    if path.suffix != ".safetensors":
        raise InputError(f"[train] keeps weights in a .safetensors file; model.checkpoint is {path}")
    # Opened before the work, to learn now whether the folder can be written. Shards of one job that begin together
    # train each by itself, and all go on with the weights of the first.
    with _unless_there(path, say), replacing(path, may_exist=False) as temporary:
        say(f"training {job.model.factory} for {wish.epochs} epochs on {split.samples:,} samples, once")
        model.load_state_dict(build_model(job, None, wish.seed).state_dict())
        model.to(device)
        images, labels = (tensor.to(device) for tensor in tensors)
        zoo.train(model, images, labels, **wish.model_dump(exclude={"split"}))
        model.cpu()
        save_model(model, str(temporary), metadata={"recipe": recipe(job)})
    say(f"its weights are in {path}")


@contextlib.contextmanager
def _unless_there(path: Path, say: Say) -> Iterator[None]:
    try:
        yield
    except InputError:
        if not path.exists():
            raise
        say("another process has trained it meanwhile")


def _require_recipe(job: Job, path: Path) -> None:
    """Weights that another recipe made must not pass for this one's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or {}).get("recipe")
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error
    if kept is not None and kept != recipe(job):
        raise InputError(
            f"checkpoint {path} was trained by another recipe than this job's [model], [data] and [train]; "
            "name another model.checkpoint, or remove that file to train again"
        )
