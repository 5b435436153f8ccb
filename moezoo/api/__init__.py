"""The implementation of the Python API `import moezoo`."""

from moezoo.api.evaluate_file import evaluate_file
from moezoo.api.load import load_model
from moezoo.api.loaded_model import LoadedModel
from moezoo.api.run import Run, train_run

__all__ = ["LoadedModel", "Run", "evaluate_file", "load_model", "train_run"]
