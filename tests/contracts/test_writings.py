"""Links lead somewhere, every stem has its page, every page is in the index, and every YAML snippet is a config."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moezoo.core.config.run_config import Config
from moezoo.core.config.validate import validate
from tests.contracts.line_links import documents, line_links, line_of, renumbered

ROOT = Path(__file__).parents[2]
WRITINGS = ROOT / "writings"
PAGES = sorted(WRITINGS.rglob("*.md"))
DOCUMENTS = documents()
STEMS = sorted(path.stem for path in (ROOT / "moezoo" / "core" / "reference").glob("*.py") if path.stem != "__init__")

# A small config that the snippets, each a part of a config, are laid over.
LAYER: dict[str, Any] = {
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "moe": {"num_experts": 8, "router": {"top_k": 2}, "experts": {"hidden_dim": 16}},
}
CONFIG: dict[str, Any] = {
    "model": {"embed_dim": 32, "layers": [LAYER]},
    "data": {"sources": [{"kind": "dataset", "name": "fables"}]},
    "training": {"steps": 10, "batch_size": 2, "sequence_length": 16},
    "optimizer": {"learning_rate": 1e-3},
}


def without_code(text: str) -> str:
    """The text less its fenced blocks and inline code, where brackets are not links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def relative_links(document: Path) -> list[str]:
    """Targets of the document's links and pictures, without those that name a scheme (https:, mailto:)."""
    text = without_code(document.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(document: Path) -> set[str]:
    """The fragments that a forge gives to a document's headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+\s+(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def named_lines(document: Path) -> set[tuple[Path, str]]:
    """Links to lines whose text says what stands there."""
    return {(path, f"L{number}") for _, path, number in line_links(document)}


def problem_of(document: Path, link: str) -> str | None:
    """What is wrong with a relative link, or None."""
    name, _, fragment = link.partition("#")
    target = (document.parent / name).resolve() if name else document
    if re.fullmatch(r"L\d*(-L\d+)?", fragment) and (target, fragment) not in named_lines(document):
        return "names a line, which moves; write [`name`](file.py#L), and `make links` finds it"
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    if not target.exists():
        return "leads nowhere"
    if fragment and target.suffix == ".md" and fragment not in anchors(target):
        return "names no heading"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    assert document.is_file(), f"{document} is missing"
    links = relative_links(document)
    problems = [f"{link} {problem}" for link in links if (problem := problem_of(document, link))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_lines_lead_to_what_they_name(document: Path) -> None:
    assert document.read_text(encoding="utf-8") == renumbered(document), "Run: make links"


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_has_a_page_that_links_its_code(stem: str) -> None:
    page = WRITINGS / f"{stem}.md"
    assert page.is_file(), f"{page} is missing"
    assert f"../moezoo/core/reference/{stem}.py" in relative_links(page)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "](../moezoo/core/reference/" in page.read_text("utf-8")],
    ids=lambda page: page.stem,
)
def test_a_page_on_code_links_lines_of_the_reference_and_of_both_twins(page: Path) -> None:
    linked = {path.parent.name: path.stem for _, path, _ in line_links(page)}
    assert linked.keys() >= {"reference", "jax_backend", "mlx_backend"}


def test_every_page_is_in_the_index_once() -> None:
    links = relative_links(WRITINGS / "README.md")
    pages = sorted(page.relative_to(WRITINGS).as_posix() for page in PAGES if page != WRITINGS / "README.md")
    assert sorted(link for link in links if link.endswith(".md") and not link.startswith("../")) == pages


def merged(base: Any, part: Any) -> Any:
    """`part` laid over `base`, mapping by mapping; anything else replaces."""
    if isinstance(base, dict) and isinstance(part, dict) and base.get("kind") == part.get("kind", base.get("kind")):
        return {**base, **{key: merged(base.get(key), value) for key, value in part.items()}}
    return copy.deepcopy(part)


def completed(snippet: dict[str, Any]) -> dict[str, Any]:
    """A whole config from a snippet; each of its layers is laid over LAYER."""
    snippet = copy.deepcopy(snippet)
    layers = snippet.get("model", {}).get("layers", [])
    for index, layer in enumerate(layers):
        has_block = "feed_forward" in layer or "mixer_only" in layer
        base = {key: value for key, value in LAYER.items() if key == "attention" or not has_block}
        layers[index] = merged(base, layer)
    return merged(CONFIG, snippet)


def snippets() -> list[Any]:
    """Every YAML block that is a part of a config."""
    found = []
    for document in [path for path in DOCUMENTS if path.is_file()]:
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"^```yaml(?: title=[^\n]*)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for number, block in enumerate(blocks):
            raw = yaml.safe_load(block)
            if isinstance(raw, dict) and raw.keys() <= Config.model_fields.keys():
                found.append(pytest.param(raw, id=f"{document.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("snippet", snippets())
def test_every_yaml_snippet_is_a_part_of_a_config(snippet: dict[str, Any]) -> None:
    validate(Config, completed(snippet), "snippet")


def test_a_wrong_link_is_noticed() -> None:
    page = WRITINGS / "README.md"
    assert problem_of(page, "nowhere.md") == "leads nowhere"
    assert "names a line" in (problem_of(page, "../moezoo/core/reference/moe.py#L3") or "")
    assert problem_of(page, "routing.md#no-such-heading") == "names no heading"
    assert problem_of(page, "../../elsewhere") == "leads out of the repository"
    assert problem_of(page, "routing.md#traps") is None


def test_a_name_leads_to_the_line_that_defines_it(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("LIMIT = 1\n\n\nclass Part:\n    size: int\n\n    def check(self):\n        here = 1\n")
    names = ("LIMIT", "Part", "Part.size", "size", "check", "Part.check")
    assert [line_of(code, name) for name in names] == [1, 4, 5, 5, 7, 7]
    with pytest.raises(LookupError, match="has no here"):
        line_of(code, "here")


def test_a_name_that_is_defined_twice_must_say_whose(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("class One:\n    size = 1\n\n\nclass Two:\n    size = 2\n")
    assert line_of(code, "Two.size") == 6
    with pytest.raises(LookupError, match="defines size 2 times"):
        line_of(code, "size")
