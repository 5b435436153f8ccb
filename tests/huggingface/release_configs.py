"""Write configs/families/*.yaml: the models of published releases as configs. See `main`."""

import json
from pathlib import Path
from typing import Any

from moezoo.core.config.model_text import model_text
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import ModelSpec, PrecisionSpec

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "families"
RELEASES: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/data/releases.json").read_text(encoding="utf-8"))
"""By the name of the config: the release, where its sizes are from, its published parameter counts and who published
them, and the fields of its config.json: all of those that public copies have, where there are any (none was fetched for
this), else those that are not the family's defaults. `active_without` and `total_without` say which parameters the
published count leaves out, and `active_skips_no_expert` that it is of a token that skips no expert, not of the mean."""

_REST = """\
data:
  sources: [{kind: dataset, name: fables}]
training:
  steps: 1000
  batch_size: 8
  sequence_length: 1024
  final_validation_sequences: 64
  rematerialize: block
optimizer:
  learning_rate: 3.0e-4
  schedule: {kind: cosine, warmup_steps: 100}
"""


def release_spec(name: str) -> ModelSpec:
    """Return the model of a release, in bfloat16, the dtype of its files."""
    fields = Fields(RELEASES[name]["config"], name)
    spec = family_of(fields).spec_of(fields)
    return spec.model_copy(update={"precision": PrecisionSpec(compute="bfloat16")})


def release_text(name: str) -> str:
    """Return the text of a release's config."""
    known, counts = RELEASES[name], parameter_counts(release_spec(name))
    published = f"; counts published in {known['published']}" if "published" in known else ""
    size = f"{counts.total / 1e9:.4g} billion parameters, {counts.active / 1e9:.3g} active per token"
    header = (
        f"# {known['release']}: {size}.",
        f"# source: sizes from {known['sizes']}{published}",
        f"# command: moezoo describe {name}",
    )
    return "\n".join(header) + "\n" + model_text(release_spec(name)) + _REST


def main() -> None:
    """Write all configs: `python -m tests.huggingface.release_configs`."""
    for name in RELEASES:
        (FOLDER / f"{name}.yaml").write_text(release_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
