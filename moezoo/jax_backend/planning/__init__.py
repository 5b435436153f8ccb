"""Training steps compiled for simulated devices, to plan memory and communication."""
