"""Device meshes, sharding rules and process groups, as data without any framework."""
