"""What a pass over the data costs, counted from the operations that a model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def flop(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in ``work()``, two for a multiply-add.

    Counted by torch's own counter, zeros that pad an image included.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def traffic(work: Callable[[], object]) -> int:
    """Bytes that the operations in ``work()`` read and write, were nothing kept in a cache between them."""
    with _Traffic() as counter:
        work()
    return counter.bytes


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation takes and gives, unless it only gives another view of it."""
        result = function(*args, **(kwargs or {}))
        given = {_place(t): _size(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {_place(t): _size(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
        is_view = made.keys() <= given.keys() and not function._schema.is_mutable
        if not is_view:
            self.bytes += sum(given.values()) + sum(made.values())
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
