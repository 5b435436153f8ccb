"""A comparison as it is returned: the report, its verdict, and their page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.core.comparison.compare import compare_models
from moezoo.core.comparison.compared_data import windows_of_file
from moezoo.core.comparison.page import comparison_page
from moezoo.core.comparison.report import ComparisonReport
from moezoo.core.comparison.side import Loaded, side_of
from moezoo.core.comparison.verdict import Verdict, verdict
from moezoo.core.parity.report import json_safe
from moezoo.core.progress import Message

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison of two models.

    Fields:
        report: all measurements.
        verdict: routing or arithmetic, and where the difference starts.
    """

    report: ComparisonReport
    verdict: Verdict

    def page(self) -> "RenderableType":
        """Return the verdict, the split and the tables for a terminal of 80 columns."""
        return comparison_page(self.report, self.verdict)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data; infinities and NaN are strings."""
        split = {name: getattr(self.report, name) for name in ("routing_kl", "routing_loss", "routing_share")}
        content: dict[str, Any] = json_safe({"verdict": asdict(self.verdict), **split, **asdict(self.report)})
        return content


def with_verdict(report: ComparisonReport) -> Comparison:
    """Return a report with its verdict."""
    return Comparison(report, verdict(report))


def compare_loaded(
    a: Loaded,
    b: Loaded,
    data: str | Path,
    *,
    sequence_length: int | None,
    max_windows: int | None,
    on_message: Message,
) -> Comparison:
    """Compare two loaded models: the implementation of `moezoo.compare`."""
    left, right = side_of(a, str(a.path)), side_of(b, str(b.path))
    sizes = {"sequence_length": sequence_length, "batch_size": None, "max_windows": max_windows}
    windows = windows_of_file(left, right, str(data), **sizes, on_message=on_message)
    return with_verdict(compare_models(left, right, *windows, lambda what, done, total: None))
