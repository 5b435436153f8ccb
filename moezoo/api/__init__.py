"""The implementation of the Python API `import moezoo`."""

from moezoo.api.evaluate_file import evaluate_file
from moezoo.api.load import load_model
from moezoo.api.loaded_model import LoadedModel

__all__ = ["LoadedModel", "evaluate_file", "load_model"]
