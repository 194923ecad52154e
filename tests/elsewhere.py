"""A pretended accelerator: real numbers, and an error for any operation that mixes its tensors with the CPU's.

Machines that have no GPU can so test that code keeps to one device. The device calls itself "meta", which every build
of PyTorch knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # a GPU takes indices from the CPU
MOVING = (aten._to_copy, aten.copy_)


class Elsewhere(torch.Tensor):
    """A tensor that is said to lie on the accelerator; `inner` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """PyTorch refuses it to subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """Within it, tensors made on or moved to `DEVICE` are on the pretended accelerator."""

    def __enter__(self) -> Any:
        self.literals = Literals()
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """`torch.tensor(…, device=…)` makes its tensor without asking the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    packet, asked = func.overloadpacket, kwargs.get("device")
    if packet in INDEXING:
        here = [] if isinstance(args[0], Elsewhere) else [args[0]] if there else []
    if there and here and packet not in MOVING:
        raise AssertionError(
            f"{func} mixes tensors of the accelerator with {here[0].dtype} {tuple(here[0].shape)} of the CPU"
        )
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(t.inner): t for t in there}
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    stays = bool(there) if asked is None else torch.device(asked) == DEVICE
    if packet is aten.copy_:
        return args[0]

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not stays:
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(wrapped, found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
