"""Pages and pictures for people: models, meshes, plans, checkpoints, runs."""
