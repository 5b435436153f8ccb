"""`python -m tests.torture`: attack for hours, and write the counts into writings/reliability.md.

Every outcome is a line of a log, so that the next call goes on with the next number of each attack; an attempt is
decided by the seed, the attack's name and its number, and `--only NAME --number N` repeats it.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from moezoo.core.files import PACKAGE
from tests.torture.attacks import Attacker, attackers
from tests.torture.outcome import FAULT, Outcome, append, read, table

PAGE = PACKAGE.parent / "writings" / "reliability.md"
BEGIN, END = "<!-- torture: make torture -->\n", "<!-- /torture -->"


@click.command()
@click.option("--hours", type=float, default=2.0, show_default=True, help="Stop after this time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is random.")
@click.option("--folder", type=Path, default=Path("build/torture"), show_default=True, help="Work folder and log.")
@click.option("--only", default="", metavar="TEXT", help="Attacks whose name contains this text.")
@click.option("--attempts", type=int, help="Attempts per attack, instead of hours.")
@click.option("--sharded/--no-sharded", default=True, help="Damage sharded checkpoints too, which JAX writes first.")
@click.option("--number", type=int, help="Repeat one attempt.")
@click.option("--report", is_flag=True, help="Write the counts of the log into writings/reliability.md and stop.")
def main(
    hours: float,
    seed: int,
    folder: Path,
    only: str,
    attempts: int | None,
    sharded: bool,
    number: int | None,
    report: bool,
) -> None:
    """Torture runs, caches and checkpoints."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"outcomes-{seed}.jsonl"
    if report:
        write_report(list(read(log)))
        return
    chosen = [attacker for attacker in attackers(folder / "work", sharded=sharded) if only in attacker.name]
    done = Counter(outcome.attack for outcome in read(log))
    faults = 0
    turns = (
        _turns(chosen, done, time.monotonic() + 3600 * hours) if attempts is None else _each(chosen, range(attempts))
    )
    for attacker, number_of in turns if number is None else _each(chosen, (number,)):
        outcome = attacker.run(number_of, seed)
        if number is None:
            append(log, outcome)
        if outcome.verdict == FAULT or number is not None:
            faults += outcome.verdict == FAULT
            click.echo(f"{outcome.verdict}: {outcome.attack} {outcome.number}: {outcome.detail}")
        elif outcome.number % 100 == 0:
            click.echo(f"{outcome.attack} {outcome.number}: {outcome.verdict}")
    if number is None:
        click.echo(table(list(read(log))))
    sys.exit(1 if faults else 0)


def _each(chosen: list[Attacker], numbers: Iterable[int]) -> Iterator[tuple[Attacker, int]]:
    """Yield the same attempts of every attack."""
    yield from ((attacker, number) for number in numbers for attacker in chosen)


def _turns(chosen: list[Attacker], done: Counter[str], end: float) -> Iterator[tuple[Attacker, int]]:
    """Yield the next attempts of every attack in turn, for 10 seconds each: those on files take milliseconds."""
    while True:
        for attacker in chosen:
            start = time.monotonic()
            while time.monotonic() - start < 10:
                if time.monotonic() > end:
                    return
                yield attacker, done[attacker.name]
                done[attacker.name] += 1


def write_report(outcomes: list[Outcome]) -> None:
    """Write the table of counts between the two marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table(outcomes)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
