"""Types of Flax NNX whose parameters are not told apart here."""

from typing import Any

from flax import nnx

State = nnx.State[Any, Any]
GraphDef = nnx.GraphDef[Any]
