"""Modes of `moezoo bench`: the cases of each mode, and the loop over them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, get_args

from moezoo.bench.case import Case
from moezoo.bench.configs import bench_config, smoke_config, sweep_config
from moezoo.bench.contenders import LIMIT, Entry
from moezoo.bench.duration import unit_seconds
from moezoo.bench.machine import load, machine
from moezoo.bench.measure import Effort, Timings, take_turns, time_starts
from moezoo.bench.results import Mode, Results, Row, rows_of, starts_of
from moezoo.core.config.run_config import Config
from moezoo.core.errors import SpecError, nearest
from moezoo.core.progress import Progress
from moezoo.core.signals import Interrupted, interrupted_by_signals

MODES: tuple[Mode, ...] = get_args(Mode)

_SHORT, _NEW = 32, 64  # prompt tokens, new tokens
_CONTEXTS, _NEW_IN_CONTEXT = (256, 2048), 32
_SHORTER_IN_CODES = 8
"""Prompts have this part of their tokens with codes: on a CPU mlx-lm takes minutes for one of 2,048."""
_SWEPT = (4, 8, 16, 32, 64, 128)
SMOKE = Effort(slices=1, slice_seconds=0.0)


def known_mode(name: str) -> Mode:
    """Return the mode with this name. Raises SpecError."""
    for mode in MODES:
        if mode == name:
            return mode
    raise SpecError(
        f"no such mode; got {name!r}{nearest(name, MODES)}; expected one of {', '.join(MODES)}, or no mode."
    )


def named_configs(names: str) -> dict[str, Config]:
    """Load configs from comma-separated names or files; return them by name. Raises SpecError."""
    return {name: bench_config(name) for name in (each.strip() for each in names.split(",")) if name}


def bench(
    modes: Sequence[Mode],
    configs: Mapping[str, Config],
    entries: Mapping[str, Entry],
    left_out: Mapping[str, str],
    effort: Effort,
    on_progress: Progress,
    on_rows: Callable[[list[Row], bool], None] = lambda rows, complete: None,
    *,
    smoke: bool = False,
    bits: int = 0,
) -> Results:
    """Run benchmark modes one after the other. A stop signal ends it with what was measured until then.

    Args:
        modes: modes, in order.
        configs: models by name; the sweep has its own.
        entries: contenders by name; the limit is always included.
        left_out: skipped contenders and the reason, for the results.
        effort: number and length of slices.
        on_progress: called with warm-ups, slices and starts, counted over all modes and configs.
        on_rows: called with the rows of each mode and config as soon as they are measured, and False if they lack some.
        smoke: use a tiny model in place of the configs, a short sweep, and one slice of one unit.
        bits: width of codes in `decode`; 0: floats.

    Raises SpecError: mode `layer` for a model without MoE layers.
    """
    before, failed, stopped = load(), [], None
    rows: list[Row] = []
    facts: dict[str, dict[str, str]] = {}
    parts = planned(modes, configs, entries, effort, smoke=smoke, bits=bits)
    effort, all_units, done_before = SMOKE if smoke else effort, sum(len(part.seconds) for part in parts), 0
    for mode, name, cases, seconds in parts:
        timings = Timings()
        others = all_units - len(seconds)
        show = partial(_counted_over_all, on_progress, f"{mode} {name}: ", done_before, others)
        try:
            with interrupted_by_signals():
                if mode == "startup":
                    time_starts(cases[0], entries, effort, show, timings)
                else:
                    contenders = {**entries, "limit": LIMIT}
                    take_turns(cases, contenders, effort, show, timings, partial(_cases_that_beat_the_limit, cases))
        except Interrupted as signal:
            stopped = signal.exit_status
        made = starts_of(name, timings) if mode == "startup" else rows_of(name, mode, cases, timings)
        on_rows(made, stopped is None)
        rows += made
        facts |= timings.facts
        failed += [f"{name} {mode}: {why}" for why in timings.failed.values()]
        done_before += len(seconds)
        if stopped is not None:
            break
    described = {**machine(), "load_before": before, "load_after": load()}
    return Results(described, effort, facts, dict(left_out), failed, rows, stopped)


def _counted_over_all(
    on_progress: Progress, prefix: str, done_before: int, others: int, what: str, done: int, total: int | None
) -> None:
    """Report progress of a part as that of the benchmark, which has `others` units outside of it."""
    on_progress(prefix + what, done_before + done, None if total is None else total + others)


class Part(NamedTuple):
    """One mode with one model: its name, its cases, and the expected seconds of each warm-up and slice, or start."""

    mode: Mode
    name: str
    cases: Sequence[Case]
    seconds: Sequence[float]


def planned(
    modes: Sequence[Mode],
    configs: Mapping[str, Config],
    entries: Mapping[str, Entry],
    effort: Effort,
    *,
    smoke: bool = False,
    bits: int = 0,
) -> list[Part]:
    """Return the parts of a benchmark in order; the sweep has its own models. The arguments are those of `bench`.

    Raises SpecError: mode `layer` for a model without MoE layers.
    """
    if smoke:
        configs, effort = {"smoke": smoke_config()}, SMOKE
    found: list[Part] = []
    for mode in modes:
        models = {"sweep": None} if mode == "experts" else configs
        for name, config in models.items():
            cases = _sweep(smoke) if config is None else _cases(mode, name, config, smoke, bits)
            contenders = entries if mode == "startup" else {**entries, "limit": LIMIT}
            found.append(Part(mode, name, cases, unit_seconds(mode, cases, contenders, effort)))
    return found


def _cases_that_beat_the_limit(cases: Sequence[Case], timings: Timings) -> list[Case]:
    """Return the cases in which a contender was faster than the limit, so that one of them was disturbed."""
    fast = {row.case for row in rows_of("", "train", cases, timings) if row.beats_limit}
    return [case for case in cases if case.label in fast]


def _cases(mode: Mode, name: str, config: Config, smoke: bool, bits: int) -> list[Case]:
    match mode:
        case "train" | "startup":
            return [Case("train", "train", config)]
        case "layer":
            if not config.model.moe_layers:
                raise SpecError(f"model.layers has no MoE layer ({name}); expected at least one. Use another mode.")
            return [Case("forward", "forward", config), Case("forward and backward", "gradients", config)]
        case "decode":
            if smoke:
                return [Case("batch 2", "decode", config, 2, 5, 4, bits)]
            part = _SHORTER_IN_CODES if bits else 1
            prompt, new = _SHORT // part, _NEW_IN_CONTEXT if bits else _NEW
            short = [Case(f"batch {batch}", "decode", config, batch, prompt, new, bits) for batch in (1, 8)]
            contexts = [size // part for size in _CONTEXTS]
            long = [Case(f"context {size}", "decode", config, 1, size, _NEW_IN_CONTEXT, bits) for size in contexts]
            longest = config.model.max_length
            cases = *short, *long
            return [case for case in cases if longest is None or case.context + case.new_tokens <= longest]
        case "experts":
            raise ValueError("the sweep has its own configs")


def shorter_in_codes() -> dict[str, str]:
    """Return why a benchmark with codes has shorter prompts, for its list of what it leaves out."""
    why = f"with codes prompts are {_SHORTER_IN_CODES} times shorter, since mlx-lm takes minutes for this one"
    return {f"context {_CONTEXTS[-1]}": why}


def _sweep(smoke: bool) -> list[Case]:
    """Return cases of training and of one MoE layer for increasing numbers of experts at equal active FLOPs."""
    base = smoke_config() if smoke else None
    cases = []
    for number in (2, 4) if smoke else _SWEPT:
        config = sweep_config(base, number)
        cases += [
            Case(f"train, {number} experts", "train", config),
            Case(f"forward, {number} experts", "forward", config),
        ]
    return cases
