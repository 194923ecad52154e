"""Numbers of a callback in a trainer's log: 🤗 Trainer makes no place for them, so here is how they get there."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


def go_first(callback: TrainerCallback) -> None:
    """Put a callback before the trainer's others. Trackers read a log as it is when they get it, so who adds to it must
    come before them. To be called from one of the callback's own events."""
    # Trainer gives a callback no way to the others but to be called by what holds them.
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return
        frame = frame.f_back


def add_to_log(logs: dict[str, float], state: Any, numbers: dict[str, float]) -> None:
    """Put numbers beside the trainer's own, in an `on_log`: for the callbacks behind, and in its history."""
    logs.update(numbers)
    if state.log_history:
        state.log_history[-1].update(numbers)
