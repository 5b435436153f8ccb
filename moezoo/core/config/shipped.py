"""Configs that ship with the package, by name: `fables`, `moe_small`, `shakespeare/moe_small`."""

from pathlib import Path

from moezoo.core.errors import SpecError, nearest
from moezoo.core.files import PACKAGE

SHIPPED = PACKAGE / "configs"
"""Folder of the configs: that of the checkout, or its copy in an installed package."""


def shipped_configs() -> dict[str, Path]:
    """Return the configs by name: the path below the folder without its suffix. Meshes are not among them."""
    names = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if not name.startswith("meshes/")}


def shipped_config(name: str | Path) -> Path | None:
    """Return the config that a name is of, by its whole name or the last part alone; None if it is of none.

    Raises SpecError: several configs have this last part.
    """
    if Path(name).exists() or Path(name).suffix:
        return None
    configs, text = shipped_configs(), str(name)
    found = [text] if text in configs else [known for known in configs if known.rpartition("/")[2] == text]
    if len(found) > 1:
        raise SpecError(f"{text!r} is the name of several configs: {', '.join(found)}. Use one of these names.")
    return configs[found[0]] if found else None


def config_file(name: str | Path) -> Path:
    """Return the file of a config from its path or name. Raises SpecError: it is neither."""
    path = Path(name)
    if path.suffix or path.exists():
        return path
    found = shipped_config(name)
    if found is None:
        known = [*shipped_configs(), *(known.rpartition("/")[2] for known in shipped_configs())]
        here = path.with_name(f"{path.name}.yaml")
        close = f"; did you mean {here}?" if here.is_file() else nearest(str(name), known)
        raise SpecError(
            f"no such config; got {str(name)!r:.200}{close}; expected a YAML file, or the name of "
            "a config that ships with moezoo (fables, shakespeare/moe_small). Check the path, or list the parts and "
            "their configs with `moezoo zoo --list`."
        )
    return found
