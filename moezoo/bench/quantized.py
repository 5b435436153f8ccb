"""The model of a benchmark case as a quantized folder in mlx-lm's layout, which moezoo and mlx-lm open alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moezoo.bench.case import Case
from moezoo.core.huggingface.export_as import describe_as_family
from moezoo.core.huggingface.export_layout import make_target, write_target
from moezoo.core.huggingface.recipe import recipe_of_options
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights

MAX_LENGTH = 1 << 16
"""Value of `max_position_embeddings`, which does not affect the computation."""


@contextmanager
def quantized_folder(case: Case) -> Iterator[Path]:
    """Write the case's initial weights as codes of its width, with float32 scales; the folder is removed at the end.

    Raises SpecError: mlx-lm does not have the model.
    """
    description = describe_as_family(case.spec, MAX_LENGTH, case.label)
    dtypes = dict.fromkeys((row.name for row in parameter_table(description.spec)), "F32")
    recipe = recipe_of_options(f"{case.bits}bit", None, None, None, None)
    target = make_target(description, dtypes, "mlx", recipe)
    weights = initial_weights(case.spec, case.config.training.seed)
    with TemporaryDirectory() as folder:
        write_target(target, weights, description.spec, Path(folder))
        yield Path(folder)
