"""Training steps that are compiled for simulated devices, to plan memory and communication."""
