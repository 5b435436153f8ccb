"""The --mesh option: `data=2,expert=4`, or a YAML file with a `mesh` section (configs/meshes)."""

from pathlib import Path
from typing import Any

from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import read_mapping
from moezoo.core.distributed.mesh import MESH_AXES, MeshConfig
from moezoo.core.errors import SpecError


def load_mesh(option: str) -> MeshConfig:
    """Parse the value of --mesh: axis sizes, or the path of a YAML file.

    Raises SpecError: neither of these, a file without a `mesh` section, an unknown or duplicate axis, a bad size.
    """
    path = Path(option)
    if path.suffix in (".yaml", ".yml"):
        raw = read_mapping(path, "mesh").get("mesh")
        if raw is None:
            raise SpecError(f"{option} has no mesh section. Use a YAML file that has one, or data=2,expert=4.")
        return validate(MeshConfig, raw, option)
    sizes: dict[str, Any] = {}
    for word in option.split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        if not name or not value or name in sizes:
            raise SpecError(
                f"--mesh is {option!r}; expected AXIS=DEVICES with each axis once, e.g. data=2,expert=4 "
                f"(axes: {', '.join(MESH_AXES)}), or a YAML file."
            )
        sizes[name] = int(value) if value.isascii() and value.isdigit() else value
    return validate(MeshConfig, sizes, f"--mesh {option}")
