"""Headers of `.npy` and `.npz` files: nothing is allocated for what they claim."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from moezoo.core.config.data import BatchesSource
from moezoo.core.data.npy_header import read_npy_header
from moezoo.core.data.prebatched import open_prebatched
from moezoo.core.data.token_shards import open_shard
from moezoo.core.errors import DataError


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text, data=b""):
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.uint16), np.ones((2, 3, 4), ">i8", order="F"), np.zeros((0, 2), int)]
)
def test_what_numpy_writes_is_read(array):
    content = saved(array)
    header = read_npy_header(io.BytesIO(content), len(content))
    order = "F" if header.fortran_order else "C"
    found = np.frombuffer(content, header.dtype, offset=header.start_byte).reshape(header.shape, order=order)
    np.testing.assert_array_equal(found, array)


HOSTILE = {
    "terabytes": (
        with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,), }"),
        "0 bytes follow",
    ),
    "overflow": (with_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**62},), }}"), "its shape is"),
    "negative": (with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }"), "its shape is"),
    "pickle": (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "not integers"),
    "floats": (saved(np.ones(3)), "not integers"),
    "brackets": (with_header("[" * 5000), "not a Python dictionary"),
    "program": (with_header("__import__('os').abort()"), "not a Python dictionary"),
    "long": (b"\x93NUMPY\2\0\xff\xff\xff\x7f", "its header has 2147483647 bytes"),
    "cut": (saved(np.arange(9))[:40], "ends inside its header"),
    "text": (b"id,text\n", "does not begin like a .npy file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_header_is_one_line(name, tmp_path):
    content, reason = HOSTILE[name]
    path = tmp_path / "tokens.npy"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_shard(path, str(path))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def zipped(path, name, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(name, "w", force_zip64=True) as member:
        for piece in content:
            member.write(piece)
    return path


def opened(path, **fields):
    return open_prebatched(BatchesSource(kind="batches", path=str(path), **fields), 300, str(path), "data.sources[0]")


def test_batches_are_read_from_both_formats(tmp_path):
    ids = np.arange(48).reshape(3, 4, 4)
    np.savez_compressed(tmp_path / "a.npz", tokens=ids, other=ids + 1)
    np.save(tmp_path / "b.npy", ids.astype(">i4"))
    for train, _ in (opened(tmp_path / "a.npz", key="tokens"), opened(tmp_path / "b.npy")):
        np.testing.assert_array_equal(train.batch(1, 4, 4, 0)[:, :-1], ids[1])
    with pytest.raises(DataError, match="has the arrays tokens, other; got key None"):
        opened(tmp_path / "a.npz")


def test_an_archive_that_expands_without_bound_is_refused_unread(tmp_path):
    header = with_header("{'descr': '<u2', 'fortran_order': False, 'shape': (100000, 1024, 1), }")
    bomb = zipped(tmp_path / "bomb.npz", "tokens.npy", [header, *[bytes(1 << 20)] * 100])
    assert bomb.stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"expands from \d+ to \d+ bytes"):
            opened(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "method", "reason"),
    [
        (HOSTILE["terabytes"][0], zipfile.ZIP_DEFLATED, "0 bytes follow"),
        (saved(np.zeros((2, 2, 2), int)), zipfile.ZIP_BZIP2, "compressed in an unknown way"),
    ],
)
def test_a_hostile_member_of_an_archive_is_one_line(tmp_path, content, method, reason):
    with pytest.raises(DataError) as caught:
        opened(zipped(tmp_path / "a.npz", "tokens.npy", [content], method))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_an_archive_are_one_line(tmp_path):
    whole = zipped(tmp_path / "a.npz", "tokens.npy", [saved(np.arange(240).reshape(3, 8, 10) % 7)]).read_bytes()
    path = tmp_path / "b.npz"
    problems = []
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            opened(path)
        except DataError as error:
            problems.append(str(error))
    assert len(problems) > len(whole) // 6
    assert [problem for problem in problems if "\n" in problem or len(problem) > 600] == []
