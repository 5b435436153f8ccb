"""Findings of the doctor, and the diagnosis that they make."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["fault", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Fields:
        severity: `fault`: the model does not do what its config says, or cannot train. `warning`: it may be intended.
        check: name of the check, constant between versions.
        what: what was found, with numbers.
        where: layer and experts, parameter, step or file.
        why: why it matters.
        advice: what to do.
    """

    severity: Severity
    check: str
    what: str
    where: str
    why: str
    advice: str

    def describe(self) -> str:
        """Return the finding as one line."""
        return f"{self.severity}: {self.what} ({self.where}). {self.why} {self.advice}"


@dataclass
class Diagnosis:
    """All that was found.

    Fields:
        path: of the run or checkpoint.
        kind: `run`, `checkpoint` (a saved step of a run) or `huggingface`.
        step: number of updates done; 0 for a Hugging Face checkpoint.
        findings: faults first.
        done: names of the kinds of checks that were made.
        skipped: reason, by kind of check, of those that were not.
        environment: facts about this machine, by name.
    """

    path: str
    kind: Literal["run", "checkpoint", "huggingface"]
    step: int = 0
    findings: list[Finding] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_healthy(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    def add(self, kind: str, findings: list[Finding]) -> None:
        """Add what a kind of check found."""
        self.done.append(kind)
        self.findings = sorted([*self.findings, *findings], key=lambda finding: finding.severity)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "is_healthy": self.is_healthy}

    def lines(self) -> list[str]:
        """Return the diagnosis as lines of text."""
        faults = sum(finding.severity == "fault" for finding in self.findings)
        warnings = len(self.findings) - faults
        parts = [
            f"{count} {word}{'s' * (count > 1)}" for count, word in ((faults, "fault"), (warnings, "warning")) if count
        ]
        summary = ", ".join(parts) or "healthy"
        found = [f"{self.path}: {summary}; checked: {', '.join(self.done)}"]
        for finding in self.findings:
            found += [
                f"{finding.severity} [{finding.check}] {finding.what}",
                f"  where: {finding.where}",
                f"  why: {finding.why}",
                f"  what to do: {finding.advice}",
            ]
        found += [f"not checked: {kind}: {why}" for kind, why in self.skipped.items()]
        return [*found, *(f"{name}: {fact}" for name, fact in self.environment.items())]
