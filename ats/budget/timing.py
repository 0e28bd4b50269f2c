"""A time budget, met on this machine: which of the given blocks sample, and with which K?

Every ATS block scores and samples, which takes time however little it drops. Where blocks are small, sampling in fewer
of them is faster. So the search tries several sets of blocks: all, every second, every third, the first alone. For each
set, time grows with K; linear interpolation between the settings timed so far says which K to try next. Of the sets
that meet the budget, it takes the one that changes the logits least and times it again, longer.

Times are shares of the dense network's in the same round (`ats/interleave.py`), so drift in the machine's speed cancels
out. The dense network is the real one, without ATS; if no setting is faster, the network is left dense.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ats.budget.network import Network, Pass, give
from ats.budget.search import Knobs, Setting, amounts
from ats.errors import UserError, counted, rounded
from ats.interleave import interleave

STRIDES = (1, 2, 3)  # of the sets of blocks, besides the first block alone
GAIN = 0.98  # share of the dense time above which a setting is no faster
TOLERANCE = 0.02  # of the budget
NUM_TIMED = 4  # images per timed pass, at least
MAX_STEPS = 4
ROUNDS, MAX_SECONDS = 7, 12.0  # of a step of the search
FINAL_ROUNDS, MAX_FINAL_SECONDS = 25, 30.0
MAX_RETRIES = 3  # with other K, if many rounds contradict the few


@dataclass(frozen=True)
class Goal:
    """A budget of time."""

    name: str  # "speedup" or "latency_ms"
    value: float

    def share(self, dense_ms: float) -> float:
        """The budget as a share of the dense network's time."""
        return 1 / self.value if self.name == "speedup" else self.value / dense_ms


@dataclass(frozen=True)
class Tried:
    """A set of blocks with the K that meets the budget."""

    setting: Setting
    share: float  # of the dense network's time
    found: Pass

    @property
    def change(self) -> float:
        """Mean total variation distance from the dense network's class distribution."""
        return self.found.changes.mean().item()


@dataclass(frozen=True)
class Timing:
    """What was timed. Milliseconds are of a batch."""

    goal: Goal
    batch_size: int
    device: str  # its name; for a CPU, with its threads
    dense_ms: float
    expected_ms: float  # by the search
    ms: float  # measured afterwards, median over the rounds
    speedup: float  # dense time / time, median over the rounds
    quartiles: tuple[float, float]  # of the speedup
    rounds: int
    fastest: float  # share of the dense time with the fewest tokens; 0: not timed
    tried: tuple[Tried, ...] = ()
    why_dense: str = ""  # the reason, if the network is left dense

    @property
    def is_met(self) -> bool:
        """Whether the measured time is within the budget and TOLERANCE."""
        if self.goal.name == "speedup":
            return self.speedup * (1 + TOLERANCE) >= self.goal.value
        return self.ms <= self.goal.value * (1 + TOLERANCE)


@dataclass
class Curve:
    """Time of one set of blocks by place, from 0 (the fewest tokens) to 1 (the most). A place is the scale place / (1 -
    place) of the knobs; the number of kept tokens grows roughly in proportion to the place.
    """

    knobs: Knobs
    # place -> share of the dense network's time; all tokens are assumed to take 1 (at least), not timed
    shares: dict[float, float] = field(default_factory=lambda: {1.0: 1.0})

    def setting(self, place: float) -> Setting:
        """The reductions at a place."""
        return self.knobs.most if place == 1 else self.knobs.at(place / (1 - place))

    def best(self, share: float) -> float:
        """The place with the most tokens that takes no more than a share of the dense time; 0 if there is none."""
        return max((place for place, own in self.shares.items() if own <= share), default=0.0)

    def next(self, share: float) -> float | None:
        """The place to time next for a share of the dense time; None if found, or if nothing is left in between."""
        low = self.best(share)
        above = [place for place, own in self.shares.items() if place > low and own > share]
        if not above or self.shares[low] >= share * (1 - TOLERANCE):
            return None
        high = min(above)
        if amounts(self.setting(low)) == amounts(self.setting(high)):
            return None
        part = (share * (1 - TOLERANCE / 2) - self.shares[low]) / (self.shares[high] - self.shares[low])
        return low + (high - low) * min(max(part, 0.1), 0.9)


def block_sets(knobs: Knobs) -> list[Knobs]:
    """The knobs of all blocks, of every second, every third, and of the first."""
    count = len(knobs.reductions)
    kept = dict.fromkeys(tuple(range(0, count, stride)) for stride in (*STRIDES, count))
    return [
        Knobs(tuple(knobs.reductions[i] for i in own), tuple(knobs.max_tokens[i] for i in own), knobs.together)
        for own in kept
    ]


class Stopwatch:
    """Times a network with different reductions against the dense one, on every n-th image in order of cost, so that
    the batches cost what all images do.
    """

    def __init__(self, network: Network, batch_size: int) -> None:
        self.network, self.dense_ms = network, 0.0
        images = network.batches
        if len({x.shape[1:] for x in images}) > 1:
            raise UserError("The images have several sizes: for a time budget, give images of one size.")
        num_batches = -(-NUM_TIMED // batch_size)
        order = network.run(network.knobs.at(0.5)).gflops.argsort()
        places = (torch.arange(num_batches * batch_size) + 0.5) * len(order) / (num_batches * batch_size)
        chosen = torch.cat(images)[order[places.long()]]
        self.batches = [chosen[first::num_batches].to(network.device) for first in range(num_batches)]

    def time(
        self, settings: Sequence[Setting], *, rounds: int, max_seconds: float, label: str
    ) -> tuple[list[float], list[list[float]]]:
        """Milliseconds per batch in every round, for the dense network and for each setting."""
        model = self.network.model
        names = {str(index): self.network.learned(setting) for index, setting in enumerate(settings)}
        seconds, _ = interleave(
            dict.fromkeys(["dense", *names], self._run),
            rounds=rounds,
            max_seconds=max_seconds,
            prepare=lambda name, _: give(model, names.get(name, ())),
            label=label,
            progress=self.network.progress,
        )
        dense, *others = ([1e3 * s / len(self.batches) for s in own] for own in seconds.values())
        self.dense_ms = statistics.median(dense)
        return dense, others

    def add(self, asked: Sequence[tuple[Curve, float]], *, label: str) -> None:
        """Time these places of curves and note them there."""
        settings = [curve.setting(place) for curve, place in asked]
        dense, others = self.time(settings, rounds=ROUNDS, max_seconds=MAX_SECONDS, label=label)
        for (curve, place), own in zip(asked, others, strict=True):
            curve.shares[place] = statistics.median(a / b for a, b in zip(own, dense, strict=True))

    @torch.inference_mode()
    def _run(self) -> None:
        for x in self.batches:
            self.network.model(x)


def calibrate_time(
    network: Network, goal: Goal, *, batch_size: int, threads: int | None
) -> tuple[Setting, Pass, Timing]:
    """The reductions that meet a time budget (none if the network is better left dense), what they do to the images,
    and what was timed. Leaves the network with any of the reductions tried.

    Raises:
        UserError: a budget out of reach, or images of several sizes.
    """
    with _evaluating(network.model, threads):
        watch = Stopwatch(network, batch_size)
        curves = [Curve(knobs) for knobs in block_sets(network.knobs)]
        watch.add([(curve, 0.0) for curve in curves], label="fewest tokens")
        share, fastest = goal.share(watch.dense_ms), min(curve.shares[0.0] for curve in curves)
        timing = Timing(
            goal=goal,
            batch_size=batch_size,
            device=_device_name(network.device),
            dense_ms=watch.dense_ms,
            expected_ms=watch.dense_ms,
            ms=watch.dense_ms,
            speedup=1.0,
            quartiles=(1.0, 1.0),
            rounds=0,
            fastest=fastest,
        )
        if share >= 1:
            return (), network.dense_pass(), replace(timing, why_dense="it meets the budget without ATS")
        if fastest > GAIN:
            return (), network.dense_pass(), replace(timing, why_dense=_no_gain(fastest))
        if share < fastest * (1 - TOLERANCE):
            raise UserError(_out_of_reach(network, timing))
        return _choose(network, watch, curves, timing)


def _choose(network: Network, watch: Stopwatch, curves: list[Curve], timing: Timing) -> tuple[Setting, Pass, Timing]:
    """Find K of every set of blocks, take the set that changes the logits least, and time it at length."""
    share = max(timing.goal.share(watch.dense_ms), timing.fastest)
    curves = [curve for curve in curves if curve.shares[0.0] <= share]
    for step in range(MAX_STEPS):
        asked = [(curve, place) for curve in curves if (place := curve.next(share)) is not None]
        if not asked:
            break
        watch.add(asked, label=f"step {step + 1}: {counted(len(asked), 'set')} of blocks")
        share = max(timing.goal.share(watch.dense_ms), timing.fastest)
    network.compare_with_dense()
    tried = []
    for curve in curves:
        place = curve.best(share)
        setting = curve.setting(place)
        tried.append(Tried(setting, curve.shares[place], network.run(setting)))
    best = min(range(len(tried)), key=lambda index: tried[index].change)
    place, timing = _confirm(watch, curves[best], curves[best].best(share), replace(timing, tried=tuple(tried)))
    if timing.why_dense:
        return (), network.dense_pass(), timing
    setting = curves[best].setting(place)
    found = tried[best].found if setting == tried[best].setting else network.run(setting)
    return found.setting, found, timing


def _confirm(watch: Stopwatch, curve: Curve, place: float, timing: Timing) -> tuple[float, Timing]:
    """Time a place in many rounds, and other places while many rounds contradict the few. Returns the place with the
    most tokens that meets the budget, or else the fastest, and what was timed there.
    """
    trials: dict[float, Timing] = {}
    while place not in trials and len(trials) <= MAX_RETRIES:
        expected = curve.shares[place]
        trials[place] = trial = _time_at_length(watch, curve.setting(place), timing, expected)
        share, factor = timing.goal.share(trial.dense_ms), 1 / (trial.speedup * expected)
        curve.shares = {at: own * factor for at, own in curve.shares.items()} | {1.0: 1.0}
        curve.shares |= {at: 1 / own.speedup for at, own in trials.items()}
        if (following := curve.next(share)) is not None:
            place = following
            curve.shares[place] = share
        else:
            place = curve.best(share)
    met = [place for place, trial in trials.items() if trial.is_met]
    place = max(met) if met else max(trials, key=lambda place: trials[place].speedup)
    trial = trials[place]
    if trial.speedup <= 1:
        why = _no_gain(1 / trial.speedup)
        trial = replace(trial, ms=trial.dense_ms, speedup=1.0, quartiles=(1.0, 1.0), why_dense=why)
    return place, trial


def _time_at_length(watch: Stopwatch, setting: Setting, timing: Timing, expected: float) -> Timing:
    """`timing`, updated by many rounds of a setting."""
    dense, [own] = watch.time([setting], rounds=FINAL_ROUNDS, max_seconds=MAX_FINAL_SECONDS, label="the setting found")
    ratios = torch.tensor([a / b for a, b in zip(dense, own, strict=True)], dtype=torch.float64)
    low, median, high = ratios.quantile(ratios.new_tensor([0.25, 0.5, 0.75])).tolist()
    return replace(
        timing,
        dense_ms=watch.dense_ms,
        expected_ms=expected * watch.dense_ms,
        ms=statistics.median(own),
        speedup=median,
        quartiles=(low, high),
        rounds=len(own),
    )


def _no_gain(fastest: float) -> str:
    return f"no setting is faster here: the fastest takes {fastest:.3g} times the dense network's time"


def _out_of_reach(network: Network, timing: Timing) -> str:
    goal, dense, fastest = timing.goal, timing.dense_ms, timing.fastest * timing.dense_ms
    is_speedup = goal.name == "speedup"
    low, high = (1, 1 / timing.fastest) if is_speedup else (fastest, dense)
    return (
        f"{goal.name} {rounded(goal.value)} cannot be met with ATS in blocks {', '.join(map(str, network.blocks))}: "
        f"a batch of {timing.batch_size} takes {rounded(dense)} ms dense and {rounded(fastest)} ms with the fewest "
        f"tokens ({timing.device}). Give {goal.name} from {rounded(low)} to {rounded(high)}; to be faster, "
        f"{network.how_to_keep_less} (ATS.BLOCKS)."
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"


@contextmanager
def _evaluating(model: nn.Module, threads: int | None) -> Iterator[None]:
    """Inside, the model is in evaluation mode and PyTorch has this many threads."""
    was_training, before = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        model.train(was_training)
