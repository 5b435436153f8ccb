"""A mesh from the command line: `data=2,expert=4`, or a YAML file with a section `mesh` (configs/meshes)."""

from pathlib import Path
from typing import Any

from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import read_mapping
from moezoo.core.distributed.mesh import MESH_AXES, MeshConfig
from moezoo.core.errors import SpecError


def load_mesh(given: str) -> MeshConfig:
    """Raises SpecError: neither words nor a file with a mesh, an axis that is none or stands twice, a bad size."""
    path = Path(given)
    if path.suffix in (".yaml", ".yml"):
        raw = read_mapping(path, "mesh").get("mesh")
        if raw is None:
            raise SpecError(f"{given} has no section mesh. Give a YAML file that has one, or data=2,expert=4.")
        return validate(MeshConfig, raw, given)
    sizes: dict[str, Any] = {}
    for word in given.split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        if not name or not value or name in sizes:
            raise SpecError(
                f"--mesh is {given!r}; expected an axis and its devices, each axis once, such as data=2,expert=4 "
                f"(axes: {', '.join(MESH_AXES)}), or a YAML file."
            )
        sizes[name] = int(value) if value.isascii() and value.isdigit() else value
    return validate(MeshConfig, sizes, f"--mesh {given}")
