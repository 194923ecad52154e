"""Paired timing: how many times longer one thing takes than another, with a 95 % interval.

Times are CPU seconds of one thread, so that other work on the machine does not count. Both sides run in turn, order
alternating, so that slow drifts hit them alike; the ratio is taken pair by pair and averaged on the log scale.
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(1)  # NumPy's own threads, which would spin and be counted

Turn = Callable[[], None]  # called between two pieces of work: the other side's turn
Work = Callable[[Turn], Any]


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios and its 95 % t-interval over pairs."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}] ({self.pairs} pairs)"

    def plus(self, share: float) -> Ratio:
        """The ratio with a further known share of the fast side's time on the slow side."""
        return Ratio(self.value + share, self.low + share, self.high + share, self.pairs)


def now() -> float:
    """CPU seconds of this process; where a GPU does the work, seconds on the clock with its work done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, by `now`."""
    start = now()
    work()
    return now() - start


def ratio_of(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """The ratio slow / fast of paired times."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    mean = statistics.fmean(logs)
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def paired(
    slow: Callable[[], object], fast: Callable[[], object], pairs: int, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Times of both, in seconds, one entry a pair."""
    for _ in range(warmup):
        slow()
        fast()
    slow_times, fast_times = [], []
    for pair in range(pairs):
        if pair % 2:
            fast_times.append(seconds(fast))
            slow_times.append(seconds(slow))
        else:
            slow_times.append(seconds(slow))
            fast_times.append(seconds(fast))
    return slow_times, fast_times


def alternating(slow: Work, fast: Work, pairs: int) -> tuple[list[float], list[float]]:
    """As `paired`, for work that can stop midway: both sides run at once, in threads of which one works at a time, and
    hand over to each other wherever they call their `Turn`. A drift of the machine within a pair hits both alike."""
    took = [_in_turns(slow, fast) for _ in range(pairs)]
    return [pair[0] for pair in took], [pair[1] for pair in took]


def _in_turns(*works: Work) -> list[float]:
    times, working, start = [0.0, 0.0], [True, True], now()
    may_work = [threading.Semaphore(1), threading.Semaphore(0)]

    def hand_over(me: int) -> None:
        nonlocal start
        times[me] += now() - start
        other_works = working[1 - me]
        start = now()
        if other_works:
            may_work[1 - me].release()
            if working[me]:
                may_work[me].acquire()

    def side(me: int) -> None:
        torch.set_num_threads(1)  # a setting of each thread
        may_work[me].acquire()
        try:
            works[me](lambda: hand_over(me))
        finally:
            working[me] = False
            hand_over(me)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(side, me) for me in (0, 1)]:
            done.result()
    return times


def memory_of_process(field: str) -> float:
    """MiB; VmHWM is the peak. (getrusage's peak is inherited from the parent process, so it measures the wrong one.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Let VmHWM begin again at the present VmRSS (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def verdict(
    name: str, ratio: Ratio, *, at_least: float | None = None, at_most: float | None = None, lower_end: bool = False
) -> bool:
    """Print the ratio beside its bound; whether the bound holds, with `lower_end` for the interval's lower end too."""
    if at_least is not None:
        holds = (ratio.low if lower_end else ratio.value) >= at_least
        bound = f"{'the lower end ' if lower_end else ''}at least {at_least}x"
    else:
        assert at_most is not None
        holds, bound = ratio.value <= at_most, f"at most {at_most}x"
    print(f"{name}: {ratio}, {bound}: {'holds' if holds else 'MISSED'}", flush=True)
    return holds


def finish(*held: bool) -> None:
    """Exit with 1 if any bound was missed."""
    sys.exit(0 if all(held) else 1)
