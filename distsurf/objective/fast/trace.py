"""A model as a graph of ours, on copies of its layers that share its weights' memory until they get their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import fx, nn


class Refused(Exception):
    """A step cannot be taken, with the reason in a few words."""


class NotApplicable(Exception):
    """There is nothing for a step to do here."""


def trace(module: nn.Module) -> fx.GraphModule:
    """The module's graph in evaluation mode. Raises Refused for models that have none.

    The model must be in evaluation mode. Its buffers are copied, since tracing runs what a forward pass does to them.
    """
    hooked = next(_hooks(module), None)
    if hooked is not None:
        raise Refused(f"{hooked or 'the model'} has hooks")
    known: dict[int, torch.Tensor] = {
        **{id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()},
        **{id(b): b.detach().clone() for b in module.buffers()},
    }
    try:
        duplicate = copy.deepcopy(module, known)
        graph = fx.Tracer().trace(duplicate)
    except Exception as error:
        raise Refused(f"the model cannot be traced ({type(error).__name__}: {_briefly(error)})") from error
    return fx.GraphModule(duplicate, graph, type(module).__name__)


def layer_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, if it calls one."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def calls(graph: fx.GraphModule, layer: nn.Module) -> int:
    """How many nodes call a layer."""
    return sum(layer_of(graph, node) is layer for node in graph.graph.nodes)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses this one, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _hooks(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks:
            yield name


def _briefly(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 80 else f"{said[:79]}…"
