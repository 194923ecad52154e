"""Residual-stream states of the visual tokens, during any forward of any trainer or script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keepsight.vlm.view import Vlm, hidden_states_in, hidden_states_out, refuse_replica

Sink = Callable[[int, Tensor], None]


class Capture:
    """What `capture` yields.

    Attributes:
        states: ``{layer: [T, d]}`` of the latest forward, in the order of `Vlm.image_tokens`, still in the autograd
            graph if there is one; empty when a sink takes them.
    """

    def __init__(self, vlm: Vlm, layers: Iterable[int | str], sink: Sink | None) -> None:
        self.vlm = vlm
        self.layers = sorted({vlm.resolve_layer(layer) for layer in layers})
        self.states: dict[int, Tensor] = {}
        self._sink = sink
        self._index: Tensor | None = None  # flat positions; None = disarmed
        self._taken: set[int] = set()
        self._later = False

    def _arm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_replica(module)
        self._index = self.vlm.visual_index(self.vlm.bind(args, kwargs))
        self.states = {}
        self._taken = set()
        self._later = self._sink is None and torch.is_grad_enabled()

    def _check(self, *_: Any) -> None:
        missing = sorted(set(self.layers) - self._taken)
        if missing:
            raise RuntimeError(
                f"the hooks on layers {missing} were not called: if the model is compiled, capture around its first "
                "call, or call torch._dynamo.reset() inside the `with` block."
            )
        if self._later:
            self.states = {layer: self._gathered(hidden) for layer, hidden in self.states.items()}

    def _disarm(self, *_: Any) -> None:
        # Layers recomputed by gradient checkpointing during the backward must not be captured a second time.
        self._index = None

    def _take(self, layer: int, hidden: Tensor) -> None:
        if self._index is None:
            return
        self._taken.add(layer)
        if self._sink is not None:
            self._sink(layer, self._gathered(hidden))
        elif self._later:
            # Gathered after the forward: hooks may run inside a checkpointed region, whose replay must save as much.
            self.states[layer] = hidden
        else:
            self.states[layer] = self._gathered(hidden)

    def _gathered(self, hidden: Tensor) -> Tensor:
        assert self._index is not None
        return hidden.flatten(0, 1).index_select(0, self._index.to(hidden.device))  # [T, d]

    def _input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take(0, hidden_states_in(args, kwargs))

    def _output(self, layer: int, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._take(layer, hidden_states_out(output))


@contextmanager
def capture(vlm: Vlm, layers: Iterable[int | str], sink: Sink | None = None) -> Iterator[Capture]:
    """Hand over ``h[l]`` of the visual tokens of every forward inside the ``with`` block.

    Only the visual tokens are gathered. ``h[depth]`` is the residual stream before the final norm (unlike
    ``hidden_states[-1]`` of transformers). In families that add vision features between layers (deepstack), ``h[l]`` is
    the output of layer ``l`` before that addition.

    Args:
        vlm: the model.
        layers: indices, "middle" or "last".
        sink: called as ``sink(layer, tokens)`` with ``tokens [T, d]`` inside the forward, layer by layer in rising
            order; nothing is kept then, so memory does not grow with the number of layers.

    Raises:
        ValueError: for a layer that does not exist; at the forward, when the model is called without ``input_ids``,
            or in one process on several GPUs.
        RuntimeError: at the forward, when a compiled model passes the hooks by.
    """
    taken = Capture(vlm, layers, sink)
    hooks = [
        vlm.core.register_forward_pre_hook(taken._arm, with_kwargs=True),
        vlm.core.register_forward_hook(taken._check),
        vlm.core.register_forward_hook(taken._disarm, always_call=True),
    ]
    for layer in taken.layers:
        if layer == 0:
            hooks.append(vlm.layers[0].register_forward_pre_hook(taken._input, with_kwargs=True))
        else:
            hooks.append(vlm.layers[layer - 1].register_forward_hook(partial(taken._output, layer)))
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
