"""Outcomes of attacks, and the log that makes a long torture resumable."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FAULT = "FAULT"


@dataclass(frozen=True)
class Outcome:
    """Result of one attack.

    Fields:
        attack: name of the attack, such as `kill jax`.
        number: of the attack in its series; with the seed it decides everything that is random.
        verdict: `FAULT`, or in a few words how the program held.
        detail: the attacked file or the moment, and for a fault what was seen.
    """

    attack: str
    number: int
    verdict: str
    detail: str


def append(log: Path, outcome: Outcome) -> None:
    """Append an outcome to a JSON Lines file."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(log: Path) -> Iterator[Outcome]:
    """Yield the outcomes of earlier sessions."""
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            yield Outcome(**json.loads(line))


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table: how often each attack ended in which way."""
    counts = Counter((outcome.attack, outcome.verdict) for outcome in outcomes)
    attacks = dict.fromkeys(sorted(outcome.attack for outcome in outcomes))
    rows = ["| attack | attempts | faults | how it held |", "|---|---|---|---|"]
    for attack in attacks:
        own = {verdict: count for (name, verdict), count in sorted(counts.items()) if name == attack}
        held = "; ".join(f"{verdict} {count:,}" for verdict, count in own.items() if verdict != FAULT)
        rows.append(f"| {attack} | {sum(own.values()):,} | {own.get(FAULT, 0)} | {held} |")
    return "\n".join(rows) + "\n"
