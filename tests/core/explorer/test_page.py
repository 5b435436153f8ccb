"""The explorer's page: what it contains, how large it is, and which traces it takes."""

import base64
import html
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moezoo
from moezoo.core.errors import DataError
from moezoo.core.explorer.columns import Column, integers, packed, reals
from moezoo.core.explorer.page import MAX_TOKENS, check_comparable, chosen_tokens, demo_trace, explorer_page
from moezoo.core.traces.trace import RoutingTrace, trace_of
from tests.support.traces import synthetic_trace, with_columns

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--data-->",
    "\u202e\u200b\ufeff\n",
    "",
]


def content_of(page: str) -> tuple[dict[str, Any], bytes]:
    """The header and the columns of a page."""
    [found] = re.findall(r'id="data">([A-Za-z0-9+/=]*)</script>', page)
    whole = zlib.decompress(base64.b64decode(found))
    end = 4 + int.from_bytes(whole[:4], "little")
    return json.loads(whole[4:end]), whole[end:]


def hostile_trace() -> RoutingTrace:
    """A trace whose names and texts are markup."""
    trace = synthetic_trace(vocab=len(HOSTILE))
    info = trace.info.model_copy(update={"domains": (HOSTILE[0], "prose"), "model": HOSTILE[1]})
    return RoutingTrace(info, trace.source, dict(enumerate(HOSTILE)), "/x/<b><!--data-->")


def decoded(column: Column) -> np.ndarray:
    """Values of a column, by the formula that the page uses."""
    top = np.iinfo(column.codes.dtype).max
    codes = column.codes.astype(np.float64)
    if column.power is None:
        return np.where(codes == top, -1, codes)
    values = column.low + (column.high - column.low) * (codes / (top - 1)) ** column.power
    return np.where(codes == top, np.nan, values)


@pytest.mark.parametrize("largest", [3, 254, 255, 65534, 65535, 100_000])
def test_integers_come_back_from_codes_of_any_width(largest: int) -> None:
    values = np.array([-1, 0, 1, largest])
    assert decoded(integers("expert", values)).tolist() == values.tolist()


def test_reals_come_back_within_the_codes_and_missing_ones_stay_missing() -> None:
    values = np.array([0, 1e-6, 1e-3, 0.3, 1.7, np.inf, np.nan], np.float32)
    margin = decoded(reals("margin", values, 0, bits=16, power=4))
    np.testing.assert_allclose(margin[1:5], values[1:5], rtol=2e-3)
    assert margin[0] == 0
    assert np.isnan(margin[5:]).all()
    weight = decoded(reals("weight", np.linspace(-0.5, 2, 100), 0, bits=8, power=2))
    assert np.abs(weight - np.linspace(-0.5, 2, 100)).max() < 2.5 / 200
    assert decoded(reals("weight", np.zeros(3), 0, bits=8, power=2)).tolist() == [0, 0, 0]


def test_planes_of_two_bytes_are_low_bytes_first() -> None:
    whole = zlib.decompress(base64.b64decode(packed({}, [integers("text", np.array([0x0102, 0x0304]))])))
    assert whole[-4:] == bytes([2, 4, 1, 3])


def test_page_has_every_column_and_names_nothing_outside() -> None:
    trace = synthetic_trace()
    page = explorer_page([trace], range(5, 25))
    header, columns = content_of(page)
    assert (header["first"], header["tokens"], header["total"]) == (5, 20, 40)
    shown = [header["texts"][code] for code in columns[:20]]
    assert shown == [trace.text(token) for token in trace.column("token", 5, 25).tolist()]
    names = {column["name"] for column in header["columns"]}
    assert names >= {"text", "document", "domain", "expert", "weight", "margin", "runner_up", "loss"}
    assert sum(column["bytes"] * column["size"] for column in header["columns"]) == len(columns)
    assert not re.findall(r"https?:|src=|@import|url\(|<link", page)


def test_hostile_texts_and_names_do_not_become_markup() -> None:
    page, plain = (explorer_page([one], range(40)) for one in (hostile_trace(), synthetic_trace(vocab=len(HOSTILE))))
    assert page.count("<script") == plain.count("<script")
    assert "&lt;b&gt;" in page
    assert not any(text in page for text in ("alert(1)", "<b>", "<!--"))
    assert set(content_of(page)[0]["texts"]) <= set(HOSTILE)


def test_two_traces_of_2000_tokens_32_layers_and_64_experts_are_below_3_megabytes() -> None:
    """Random routing: nothing to compress but the ranges."""
    trace = synthetic_trace(2000, tuple(range(32)), 64, 8, vocab=1500)
    assert len(explorer_page([trace], range(2000))) < 2_200_000
    assert len(explorer_page([trace, trace.renamed("b")], range(2000))) < 3_000_000


def test_trace_of_experts_alone_is_shown_by_positions() -> None:
    trace = synthetic_trace()
    nothing = {name: None for name in trace.rows().columns if name != "expert"}
    alone = trace_of(trace.info, replace(trace.rows(), **nothing))
    header, _ = content_of(explorer_page([alone], range(3)))
    assert header["texts"] == ["#0 ", "#1 ", "#2 "]
    assert [column["name"] for column in header["columns"]] == ["text", "expert"]
    header, _ = content_of(explorer_page([alone, trace], range(3)))
    assert header["texts"] != ["#0 ", "#1 ", "#2 "]


def test_two_traces_must_have_the_same_tokens_and_layers() -> None:
    trace = synthetic_trace().renamed("a")
    check_comparable(trace, synthetic_trace(seed=0).renamed("b"))
    with pytest.raises(DataError, match=r"^b has 30 tokens; expected the 40 of a\. Record both [^\n]*$"):
        check_comparable(trace, synthetic_trace(30).renamed("b"))
    with pytest.raises(DataError, match=r"^b has routing of the layers \[0, 2\]; expected those of a, \[1, 2, 4\]\."):
        check_comparable(trace, synthetic_trace(layers=(0, 2)).renamed("b"))
    token = trace.column("token").copy()
    token[7] += 1
    with pytest.raises(DataError, match=rf"^b has token {token[7]} at position 7; expected {token[7] - 1}, as in a\."):
        check_comparable(trace, with_columns(trace, token=token).renamed("b"))


def test_tokens_are_chosen_as_a_slice_within_the_limit() -> None:
    assert chosen_tokens(None, 10) == range(10)
    assert chosen_tokens(None, 5000) == range(2000)
    assert chosen_tokens("10:20", 5000) == range(10, 20)
    assert chosen_tokens("4990:", 5000) == chosen_tokens("4990:9999", 5000) == range(4990, 5000)
    assert chosen_tokens(":7", 5000) == range(7)
    for text in ("7", "a:b", "20:10", "6000:7000", "1:2:3", ""):
        with pytest.raises(
            DataError, match=r"^--tokens chooses tokens of the trace's 5,000 as FIRST:LAST; got [^\n]*$"
        ):
            chosen_tokens(text, 5000)
    with pytest.raises(DataError, match=r"chooses 20,001 tokens; a page takes at most 20,000"):
        chosen_tokens("0:20001", MAX_TOKENS * 2)


def test_demo_is_a_trained_models_trace() -> None:
    trace = demo_trace()
    rows = trace.rows()
    assert trace.num_tokens > 500
    assert trace.info.num_experts == (16,) * 4
    assert np.nanmean(rows.loss) < 0.6  # nats; an untrained model has 3.3
    assert "".join(map(trace.text, rows.token.tolist()))[:7] == "At tea,"


def test_a_notebook_shows_the_page_in_a_frame_and_a_file_has_it(tmp_path: Path) -> None:
    trace = hostile_trace()
    page = moezoo.explore(trace, tokens=range(3, 9))
    assert page.html == explorer_page([trace], range(3, 9))
    assert repr(page).startswith("<Explorer: 6 tokens;")
    [shown] = re.findall(r'^<iframe srcdoc="([^"]*)" [^<>]*></iframe>$', page._repr_html_())
    assert html.unescape(shown) == page.html
    assert page.write(tmp_path / "page.html").read_text(encoding="utf-8") == page.html


def test_two_traces_of_other_tokens_are_no_page() -> None:
    trace = synthetic_trace()
    other = with_columns(trace, token=trace.column("token") + 1)
    with pytest.raises(DataError, match="has token"):
        moezoo.explore(trace, other)
