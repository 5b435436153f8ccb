"""Device meshes, sharding rules, and groups of processes, as data."""
