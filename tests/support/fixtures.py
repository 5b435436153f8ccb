"""Tiny checkpoints in Hugging Face's layout, generated from a seed instead of stored.

`tests/data/huggingface/<case>.json` describes the checkpoint (config.json, seed, names, shapes and laws of the
tensors), `<case>.npz` has the outputs of transformers. Needs only NumPy, because `tests/external/make_oracles.py`,
which writes the fixtures, uses it in an environment without moezoo.

Every value of a tensor is computed from 64 raw bits of Philox, keyed by SHA-256 of seed and name, with integer
arithmetic and one float64 multiplication: unlike `standard_normal`, it cannot change with the version of NumPy or libm.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FOLDER = Path(__file__).parent.parent / "data" / "huggingface"

# safetensors dtype -> NumPy dtype of the same width that stores its bits
STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1", "I64": "<i8"}


@dataclass(frozen=True)
class Fixture:
    """A test case: the description of a checkpoint, and the outputs of transformers for it."""

    case: str
    description: dict[str, Any]
    expected: dict[str, np.ndarray]

    @property
    def model_type(self) -> str:
        """Model type; in a multimodal wrapper that of the text model."""
        return str(text_config(self.description["config"])["model_type"])


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's object in a multimodal wrapper's config.json; of any other config itself."""
    for name in ("thinker_config", "text_config"):
        config = config.get(name, config)
    return config


def cases(*, refused: bool = False) -> list[str]:
    """Return the names of all fixtures that moezoo supports, or with `refused` of those that it refuses."""
    every = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    return sorted(name for name, description in every.items() if ("refused" in description) == refused)


def read_fixture(case: str) -> Fixture:
    """Read the fixture of that name."""
    description = json.loads((FOLDER / f"{case}.json").read_text())
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return Fixture(case, description, dict(arrays))


def write_checkpoint(case: str, folder: Path, *, spelling: Literal["saved", "hub"] = "saved", shards: int = 1) -> Path:
    """Write config.json and model.safetensors of a case into `folder`, and return it.

    `spelling` chooses the format of config.json: that of transformers 5, or that of files on the hub (`rope_theta`,
    `rope_scaling`, ...); both mean the same. With `shards` > 1 the tensors are split over as many files, with a
    model.safetensors.index.json.
    """
    description = json.loads((FOLDER / f"{case}.json").read_text())
    return write_described(description, folder, spelling=spelling, shards=shards)


def write_described(
    description: dict[str, Any], folder: Path, *, spelling: Literal["saved", "hub"] = "saved", shards: int = 1
) -> Path:
    """Like `write_checkpoint`, from the content of a case's json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = description["hub_config" if spelling == "hub" else "config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = drawn_tensors(description)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    where = {name: files[place % shards] for place, name in enumerate(tensors)}
    for file in files:
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if where[name] == file})
    size = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def drawn_tensors(description: dict[str, Any]) -> dict[str, tuple[str, np.ndarray]]:
    """Return all tensors by name: (safetensors dtype, array of the stored bits)."""
    laws = description["laws"]
    return {
        name: (dtype, drawn(description["seed"], name, tuple(shape), dtype, laws[law]))
        for pattern, dtype, shape, law in description["tensors"]
        for name in expanded(pattern)
    }


def digest(tensors: dict[str, tuple[str, np.ndarray]]) -> str:
    """Return the SHA-256 over names and stored bytes, in order of name."""
    everything = hashlib.sha256()
    for name, (dtype, array) in sorted(tensors.items()):
        everything.update(f"{name} {dtype} {array.shape}".encode() + array.tobytes())
    return everything.hexdigest()


def drawn(seed: int, name: str, shape: tuple[int, ...], dtype: str, law: dict[str, float]) -> np.ndarray:
    """Return one tensor's stored values: `mean + std * z`, or integers from `low` to `high` (both included).

    With `distinct`, the integers of a row are the first of a random order of those below `distinct`.

    z is the sum of four uniform 16-bit integers, centered and divided by its standard deviation: nearly normal, within
    3.47.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    bits = philox.random_raw(int(np.prod(shape))).reshape(shape)
    if "distinct" in law:
        order = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
        every = order.random_raw(shape[0] * int(law["distinct"])).reshape(shape[0], -1)
        return np.argsort(every, axis=-1, kind="stable")[:, : shape[1]].astype(STORAGE[dtype])
    if "low" in law:
        low, high = int(law["low"]), int(law["high"])
        return (low + bits % np.uint64(high - low + 1)).astype(STORAGE[dtype])
    lanes = sum(((bits >> np.uint64(16 * lane)) & np.uint64(0xFFFF)).astype(np.int64) for lane in range(4))
    z = (lanes - 2 * 0xFFFF) * (3.0**0.5 / 2**16)
    return stored(law["mean"] + law["std"] * z, dtype)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to the nearest value of a storage dtype, ties to even (E4M3: to the lower one)."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    if dtype == "F8_E4M3":
        magnitudes = e4m3_values()[:127]
        code = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values))
        return (code | (np.signbit(values) << 7)).astype("u1")
    return values.astype(STORAGE[dtype])


def e4m3_values() -> np.ndarray:
    """Return the value of each E4M3 code, float32 [256] (exponent bias 7; no infinity, 0x7f and 0xff are NaN)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def expanded(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern `a.{0-2}.b.{0-1}`, with the last range varying fastest."""
    parts = re.split(r"\{(\d+)-(\d+)\}", pattern)
    ranges = [range(int(low), int(high) + 1) for low, high in zip(parts[1::3], parts[2::3], strict=True)]
    for numbers in itertools.product(*ranges):
        yield parts[0] + "".join(f"{number}{text}" for number, text in zip(numbers, parts[3::3], strict=True))


def contracted(names: list[str]) -> list[str]:
    """Return patterns that `expanded` turns into exactly these names (of one shape, dtype and law)."""
    patterns: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", name)
        patterns.setdefault(tuple(parts[0::2]), set()).add(tuple(map(int, parts[1::2])))
    return [_filled(text, box) for text, numbers in patterns.items() for box in _boxes(numbers)]


def _boxes(numbers: set[tuple[int, ...]]) -> list[list[tuple[int, int]]]:
    """Return index tuples as products of ranges: one product if exact, otherwise one per first index."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    box = [(column[0], column[-1]) for column in columns]
    if np.prod([high - low + 1 for low, high in box]) == len(numbers):
        return [box]
    boxes = []
    for first in columns[0]:
        rest = {number[1:] for number in numbers if number[0] == first}
        boxes += [[(first, first), *inner] for inner in (_boxes(rest) if rest != {()} else [[]])]
    return boxes


def _filled(text: tuple[str, ...], box: list[tuple[int, int]]) -> str:
    numbers = [str(low) if low == high else f"{{{low}-{high}}}" for low, high in box]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(text, numbers, fillvalue="")))


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file: length of the header, header as JSON, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
