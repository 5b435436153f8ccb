"""Results of `moezoo bench`: a row per contender and case, and the speed relative to peers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from moezoo.bench.case import Case
from moezoo.bench.contenders import OWN, PEERS
from moezoo.bench.foreign_load import DISTURBED
from moezoo.bench.limit import bytes_per_step, useful_flops
from moezoo.bench.measure import Effort, Timings

Mode = Literal["train", "layer", "decode", "startup", "experts"]


@dataclass(frozen=True)
class Row:
    """Result of one contender for one case.

    Fields:
        config: S, M, a file, `smoke` or `sweep`.
        case: label of the case, e.g. `forward` or `batch 8`.
        contender: its name, or `limit`.
        seconds: median over the slices, per unit: a step, a pass, a token of each sequence, a start. For the limit of
            decoding: its bytes at the median bandwidth of all cases.
        slices: seconds of each slice.
        first_seconds: of the first unit, which may compile; None for a start.
        tokens_per_second: None for a start.
        flops_per_second: useful FLOPs, on active parameters; None for decoding and starts.
        bytes_per_second: bytes that decoding must read; otherwise None.
        share_of_limit: the limit's seconds divided by these seconds: for compute-bound cases, the model FLOPs
            utilization (MFU) on active parameters relative to plain matrix products on this machine. None without a
            limit. Above 1 the limit was measured too low, and this is no share of anything.
        relative: in a sweep: seconds relative to those with the fewest experts.
        peak_memory_bytes: of the process, in mode `train`; otherwise None.
        foreign_load: mean share of the cores that other processes used in each slice; empty where it is not known.
    """

    config: str
    mode: Mode
    case: str
    contender: str
    seconds: float
    slices: list[float]
    first_seconds: float | None = None
    tokens_per_second: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    share_of_limit: float | None = None
    relative: float | None = None
    peak_memory_bytes: int | None = None
    foreign_load: list[float] = field(default_factory=list)

    @property
    def beats_limit(self) -> bool:
        """The limit was measured too low."""
        return self.share_of_limit is not None and self.share_of_limit > 1

    @property
    def num_disturbed(self) -> int:
        """Number of slices in which other processes used a relevant share of the cores."""
        return sum(share > DISTURBED for share in self.foreign_load)

    def to_json(self) -> dict[str, Any]:
        """Return JSON data, with a share of the limit only where the limit holds."""
        share = None if self.beats_limit else self.share_of_limit
        return {**vars(self), "share_of_limit": share, "beats_limit": self.beats_limit}


@dataclass(frozen=True)
class Ratio:
    """Speed of a backend relative to a peer in the same turns of one case.

    Fields:
        config, mode, case, contender, peer: the rows compared.
        median, lowest, highest: over the turns, the peer's seconds divided by the contender's.
    """

    config: str
    mode: Mode
    case: str
    contender: str
    peer: str
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Results:
    """All results of one benchmark run.

    Fields:
        machine: see machine.py, with the load before and after.
        effort: number and length of slices.
        contenders: versions, device and compute paths of each.
        left_out: skipped contenders and the reason.
        failed: lines `config mode: error`.
        stopped: exit status of the signal that ended the benchmark before all was measured; None if all was.
    """

    machine: dict[str, Any]
    effort: Effort
    contenders: dict[str, dict[str, str]]
    left_out: dict[str, str]
    failed: list[str]
    rows: list[Row]
    stopped: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "machine": self.machine,
            "effort": vars(self.effort),
            "contenders": self.contenders,
            "left_out": self.left_out,
            "failed": self.failed,
            "incomplete": self.stopped is not None,
            "rows": [row.to_json() for row in self.rows],
            "relative_to_peers": [vars(ratio) for ratio in ratios(self.rows)],
        }


def starts_of(name: str, timings: Timings) -> list[Row]:
    """Return the results of mode `startup`."""
    return [
        Row(
            name,
            "startup",
            label,
            contender,
            median(slices),
            slices,
            foreign_load=timings.foreign_load[contender, label],
        )
        for (contender, label), slices in sorted(timings.slices.items(), key=lambda item: item[0][1])
    ]


def rows_of(name: str, mode: Mode, cases: Sequence[Case], timings: Timings) -> list[Row]:
    """Return the results of the cases of one mode."""
    rows: list[Row] = []
    fewest_experts: dict[tuple[str, str], float] = {}
    limits = _limits(cases, timings)
    for case in cases:
        limit = limits.get(case.label)
        for contender in ("limit", *(each for each in timings.facts if each != "limit")):
            seconds = limit if contender == "limit" else timings.seconds(contender, case.label)
            if seconds is None:
                continue
            decode = case.kind == "decode"
            rows.append(
                Row(
                    name,
                    mode,
                    case.label,
                    contender,
                    seconds,
                    timings.slices[contender, case.label],
                    timings.first_seconds[contender, case.label],
                    case.tokens / seconds,
                    None if decode else useful_flops(case) / seconds,
                    bytes_per_step(case) / seconds if decode else None,
                    None if limit is None else limit / seconds,
                    seconds / fewest_experts.setdefault((contender, case.kind), seconds) if mode == "experts" else None,
                    timings.peak_memory.get(contender) if mode == "train" and contender != "limit" else None,
                    timings.foreign_load.get((contender, case.label), []),
                )
            )
    return rows


def _limits(cases: Sequence[Case], timings: Timings) -> dict[str, float]:
    """Return the seconds of the limit by label.

    All decoding cases have one bandwidth, the median over the slices of all of them, since the bandwidth of copies
    varies more over time than the rate of matrix products.
    """
    rates = [
        bytes_per_step(case) / seconds
        for case in cases
        if case.kind == "decode"
        for seconds in timings.slices.get(("limit", case.label), [])
    ]
    limits = {}
    for case in cases:
        seconds = timings.seconds("limit", case.label)
        if seconds is not None:
            limits[case.label] = bytes_per_step(case) / median(rates) if case.kind == "decode" else seconds
    return limits


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Compare each backend with each peer, turn by turn. A contender that missed turns is not compared."""
    found = []
    for row in rows:
        for peer in rows if row.contender in OWN else ():
            same_case = (peer.config, peer.mode, peer.case) == (row.config, row.mode, row.case)
            if same_case and peer.contender in PEERS and len(peer.slices) == len(row.slices):
                pairs = [theirs / ours for theirs, ours in zip(peer.slices, row.slices, strict=True)]
                names = row.config, row.mode, row.case, row.contender, peer.contender
                found.append(Ratio(*names, median(pairs), min(pairs), max(pairs)))
    return found
