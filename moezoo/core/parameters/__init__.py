"""The parameter table: one row for every parameter of a model.

Initialization, checkpoints, weight decay, cost, sharding, and the shape tests of both backends use it. A canonical name
is the attribute path of the parameter in both frameworks: `layers.3.moe.experts.w_gate`.
"""

from moezoo.core.parameters.model import parameter_table
from moezoo.core.parameters.row import ROLES, Initializer, MatrixAxes, Parameter, Role

__all__ = ["ROLES", "Initializer", "MatrixAxes", "Parameter", "Role", "parameter_table"]
