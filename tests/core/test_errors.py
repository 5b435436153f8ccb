"""Words of messages."""

from moezoo.core.errors import counted


def test_a_number_and_what_it_counts_agree() -> None:
    found = [counted(number, word) for number, word in ((0, "id"), (1, "id"), (1_024, "token"), (2, "micro-batch"))]
    assert found == ["0 ids", "1 id", "1,024 tokens", "2 micro-batches"]
