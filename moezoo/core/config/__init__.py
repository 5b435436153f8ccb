"""Run configs in YAML: the sections, reading and validation."""
