"""Reports: pages on models, meshes, plans and checkpoints, and pictures of runs."""
