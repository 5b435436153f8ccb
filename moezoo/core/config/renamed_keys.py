"""Config keys that were renamed. A config that users write gets an error with the new name; a saved one is updated."""

from typing import Any

RENAMED_KEYS = {"arrangement": "norm_placement"}


def with_new_keys(raw: Any) -> Any:
    """Return the raw config of a run that an earlier version saved, with keys as they are called now."""
    if isinstance(raw, dict):
        return {RENAMED_KEYS.get(key, key): with_new_keys(value) for key, value in raw.items()}
    return [with_new_keys(value) for value in raw] if isinstance(raw, list) else raw
