"""Type aliases for generic types of Flax NNX, without type arguments."""

from typing import Any

from flax import nnx

State = nnx.State[Any, Any]
GraphDef = nnx.GraphDef[Any]
