"""MaxText's and tunix's `forced_routed_experts`: the routing that a training step replays.

Integers [batch, sequence, layers, top_k] in a `.npy` file, or in a `.npz` file under that name with `token_ids` and
`token_mask` [batch, sequence] beside it, as in MaxText's `RouterReplayTrainerPayload`. -1 marks a slot or token that is
not replayed, padding among them. The layers are read as all layers or as the MoE layers, whichever fits the model.

Source: AI-Hypercomputer/maxtext, RouterReplayTrainerPayload and RoutedMoE.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from moezoo.core.data.token_shards import IdFile
from moezoo.core.files import atomic_writer
from moezoo.core.traces.formats.foreign import (
    Foreign,
    IntegerArray,
    Known,
    Request,
    RequestReader,
    all_layers,
    document_lengths,
    documents,
    lost,
)
from moezoo.core.traces.formats.payloads import array_keys, blocks, damaged, open_array
from moezoo.core.traces.trace import RoutingTrace

_NAME = "forced_routed_experts"
_EXPECTED = f"{_NAME}, integers [batch, sequence, layers, top_k]"


def read_maxtext(path: Path, known: Known) -> Foreign:
    """Open forced_routed_experts as a trace, a document per sequence, without padding. Raises DataError."""
    keys = array_keys(path) if path.suffix == ".npz" else ()
    array = open_array(path, _NAME if path.suffix == ".npz" else None)
    if len(array.shape) != 4 or 0 in array.shape:
        raise damaged(str(path), f"{array.dtype} {list(array.shape)}", _EXPECTED)
    beside = {key: np.asarray(open_array(path, key)) for key in ("token_ids", "token_mask") if key in keys}
    for name, column in beside.items():
        if column.shape != array.shape[:2]:
            raise damaged(f"{name} of {path}", f"the shape {list(column.shape)}", f"{list(array.shape[:2])}")
    reader = RequestReader(known, "maxtext", str(path), path.stem)
    return reader.read(_sequences(array, beside.get("token_ids"), beside.get("token_mask")))


def _sequences(
    array: IdFile | IntegerArray, token_BT: IntegerArray | None, mask_BT: IntegerArray | None
) -> Iterator[tuple[str, Request]]:
    number = 0
    for block in blocks(array):
        for expert in block:
            real = (expert >= 0).any((1, 2)) if mask_BT is None else mask_BT[number] != 0
            used = int(np.flatnonzero(real)[-1]) + 1 if real.any() else 0
            if used:
                yield (
                    f"sequence {number}",
                    Request(expert[:used], None if token_BT is None else token_BT[number][:used]),
                )
            number += 1


def write_maxtext(trace: RoutingTrace, path: Path, depth: int | None) -> list[str]:
    """Write a trace as `.npy`, or else as `.npz` with the tokens, padded to the longest document; return what is lost.

    Without a model's depth the layers are the MoE layers.
    """
    lengths = document_lengths(trace)
    shape = (len(lengths), max(lengths), depth or trace.num_layers, trace.top_k)
    if path.suffix == ".npy":
        with atomic_writer(path) as file:
            _write_experts(file, trace, shape, depth)
        return lost(trace, ("document",), "maxtext")
    with atomic_writer(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"{_NAME}.npy", "w", force_zip64=True) as member:
            _write_experts(member, trace, shape, depth)
        mask_BT = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
        columns = {"token_mask": mask_BT}
        if trace.has("token"):
            columns["token_ids"] = np.zeros_like(mask_BT)
            columns["token_ids"][mask_BT != 0] = trace.column("token")
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, column, allow_pickle=False)
    return lost(trace, ("token", "document"), "maxtext")


def _write_experts(file: IO[bytes], trace: RoutingTrace, shape: tuple[int, ...], depth: int | None) -> None:
    header: dict[str, Any] = {"descr": "<i4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for rows in documents(trace):
        expert = rows.expert if depth is None else all_layers(rows.expert, trace.info.layers, depth, dense=-1)
        whole = np.full(shape[1:], -1, "<i4")
        whole[: len(rows)] = expert
        file.write(whole.tobytes())
