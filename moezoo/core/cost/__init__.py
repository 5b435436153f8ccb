"""Cost by formula: parameters, FLOPs, memory and communication."""
