"""The project speaks the field's language: phrases that a reader would have to translate stay out.

Checked in the docstrings, comments, errors and help texts of the package, in the pages, and in the configs' headers.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.support.source_tree import PACKAGE, tree_of

ROOT = PACKAGE.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("writings/**/*.md"), *ROOT.glob("datasets/*.md"), *ROOT.glob("tests/**/*.md")]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CODE = sorted(PACKAGE.rglob("*.py"))

# Pattern, and what to write in its place. Letters are compared without regard to case.
BANNED = {
    r"\bway back\b": "the backward pass; the inverse mapping",
    r"\bcomputes? again\b|\bcomputed again\b": "recompute",
    r"\bput together (for|a layer|in)\b|\bputs? .{0,30}\btogether on\b": "all-gather",
    r"\bcut along\b": "sharded over",
    r"\bparameters? lies?\b|\bself\.lie\b": "how parameters are sharded; shardings",
    r"\bholds and sends\b|\bwhat travels\b|\btravell?ed\b": "memory and communication of a step",
    r"\bdevices that are not there\b": "simulated devices; no accelerator needed",
    r"\b(one|a|the|each|every|whole|published) mixtures?\b(?!.of)|\bmixtures\b(?! of)": "MoE layer; MoE checkpoints",
    r"\bwho computes what\b": "the experts chosen for each token",
    r"\bwho is (dropped|who|chosen|served)\b": "dropped tokens; chosen experts",
    r"\b(was|is|were) understood\b": "the parsed config",
    r"\bwhat becomes of\b": "the tensor mapping",
    r"\bsees? later tokens\b": "causality check",
    r"\brope in halves\b": "half-split (NeoX) or interleaved (GPT-J) RoPE",
    r"\bpart as two seeds\b": "diverge like two seeds",
    r"\brouted copies\b|\bcopies_bytes\b": "token-expert assignments; dispatched tokens",
    r"\bon_their_devices\b|\bon their devices\b": "expert-parallel dispatch and combine (all-to-all)",
    r"\b_given\b|\b_stream\b|\b_left\b": "StepInputs, ResidualState, LayerOutput",
    r"\bbehind (attention|_attention|a block|the block|the feed)": "post-attention norm",
    r"\bwarmth\b|\bplace_s\b": "temperature_T; slot_S or position_S",
    r"\bstands? twice\b": "duplicate",
    r"\bmend (it|the|them|your)\b": "fix",
    r"\brealizations?\b|\brealized (in|on|by|thrice|twice)\b|\bnot realized?\b": "implementation; not supported",
    r"\bno targets? counts?\b": "all targets are masked",
    r"\bhow many there are\b": "number of ...",
    r"\bwhich this is\b": "index of ...",
    r"\bwindows at once\b": "batch size",
    r"\bthe heir'?s?\b|\bfor no one to read\b": "subclasses; ignored",
    r"\bthousand millions?\b|\bthousands of millions\b": "billion",
    r"\btell fables\b": "generate fables",
}
WEAK_START = ("What ", "How ", "Whether ", "Of ", "Where ", "Who ", "Which ")


def prose_of(path: Path) -> str:
    """Return the comments and string literals of a module."""
    text = path.read_text(encoding="utf-8")
    kinds = (
        (tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE)
        if hasattr(tokenize, "FSTRING_MIDDLE")
        else (
            tokenize.COMMENT,
            tokenize.STRING,
        )
    )
    return "\n".join(t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kinds)


def comments_of(path: Path) -> str:
    return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("#"))


def banned_in(text: str) -> list[str]:
    """Return each banned phrase with what to write instead."""
    joined = re.sub(r"\s*\n[\s#>]*", " ", text)
    return [
        f"{found.group()!r}: write {instead}"
        for pattern, instead in BANNED.items()
        for found in re.finditer(pattern, joined, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_has_no_banned_phrase(path):
    assert banned_in(path.read_text(encoding="utf-8")) == []


def test_code_has_no_banned_phrase():
    found = {str(path.relative_to(ROOT)): banned_in(prose_of(path)) for path in CODE}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


def test_headers_of_configs_have_no_banned_phrase():
    found = {str(path.relative_to(ROOT)): banned_in(comments_of(path)) for path in CONFIGS}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


def test_docstrings_begin_with_what_a_thing_is_or_does():
    weak = [
        f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {text.splitlines()[0]}"
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if (text := ast.get_docstring(node) or "").startswith(WEAK_START)
    ]
    assert weak == []


def test_a_banned_phrase_is_found_across_a_line_break_and_in_any_case():
    assert banned_in("Computed again on the\n    way  back".replace("  ", " ")) != []
    assert banned_in("A mixture of experts is a mixture-of-experts model.") == []
