"""Cost by formula: parameters, FLOPs, memory, and the communication of a step."""
