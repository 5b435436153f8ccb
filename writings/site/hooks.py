"""Hooks of MkDocs: the writings as a site, without a line in them that GitHub would not show as well.

The navigation is the index, writings/README.md. The pages of the repository's root and the notebooks become pages.
Links to files outside of the writings lead to the repository. Formulas become MathML, which browsers render
themselves. The tables of options and errors are made from the code, in place of a comment in their pages.
"""

import json
import logging
import os
import posixpath
import re
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from writings.site.error_page import error_page
from writings.site.option_tables import option_tables

ROOT = Path(__file__).parents[2]
WRITINGS = ROOT / "writings"
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository's root, and where they are on the site."""

INDEX = "pages.md"
"""The site's page for writings/README.md, which MkDocs would take for the home page."""

SECTION = re.compile(r"^## (.+)$|\]\(([^)#\s]+\.(?:md|ipynb))\)", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- site: (\w+) -->")
LONG_CODE = re.compile(r"(?<=<code>)[^<]{30,}(?=</code>)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.moezoo")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation: a section for each heading of the index, in its order."""
    config.nav = [{"Home": "index.md"}]
    pages: list[str] = []
    for heading, link in SECTION.findall((WRITINGS / "README.md").read_text(encoding="utf-8")):
        if heading:
            pages = []
            config.nav.append({heading: pages})
        elif not link.startswith("../"):
            pages.append(_page_of(link))
        elif link[3:] in ROOT_PAGES:
            pages.append(ROOT_PAGES[link[3:]])
    config.nav = [each for each in config.nav if all(each.values())]
    config.nav[-1][next(iter(config.nav[-1]))].append(INDEX)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages and the notebooks."""
    index = files.get_file_from_path("README.md")
    assert index is not None
    files.remove(index)
    for source, place in [*((ROOT / name, page) for name, page in ROOT_PAGES.items()), (WRITINGS / "README.md", INDEX)]:
        files.append(File.generated(config, place, content=source.read_text(encoding="utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        content = notebook_page(WRITINGS / notebook.src_uri, config.repo_url or "")
        files.append(File.generated(config, _page_of(notebook.src_uri), content=content))
        notebook.inclusion = InclusionLevel.EXCLUDED
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts, and point links at pages of the site or files of the repository."""
    repository = str(config.repo_url).rstrip("/")
    makers = {"options": option_tables, "errors": lambda: error_page(f"{repository}/blob/main/moezoo")}
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    markdown = GENERATED.sub(lambda found: makers[found[1]](), markdown)
    place = page.file.src_uri
    source = _source_of(place)

    def link(found: re.Match[str]) -> str:
        target = found[2]
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return found[0]
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        there = files.get_file_from_path(_place_of(linked))
        if there is not None and not there.inclusion.is_excluded():
            relative = posixpath.relpath(there.src_uri, posixpath.dirname(place) or ".")
            return f"{found[1]}{relative}{fragment}{found[3]}"
        if linked.startswith("..") or not (ROOT / linked).exists():
            _log.warning("%s links to %s, which is not there", source, target)
        kind = "tree" if (ROOT / linked).is_dir() else "blob"
        return f"{found[1]}{repository}/{kind}/main/{linked}{fragment}{found[3]}"

    pieces = FENCE.split(markdown)
    return "".join(
        _as_shell(piece) if index % 2 else LINK.sub(link, _with_pipes(piece)) for index, piece in enumerate(pieces)
    )


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Replace TeX by MathML, let long code break, and give a page without headings the room of their list."""
    if not any(item.children for item in page.toc):
        page.meta.setdefault("hide", []).append("toc")
    html = LONG_CODE.sub(lambda found: re.sub(r"(&\w+;)|(?<=[,/_.])", r"\1<wbr>", found[0]), html)
    return FORMULA.sub(lambda found: convert(unescape(found[2]), "block" if found[1] == "div" else "inline"), html)


def on_post_page(output: str, **_: object) -> str:
    """Name the theme's search dialog, for screen readers."""
    return output.replace(' role="dialog">', ' role="dialog" aria-label="Search">', 1)


def _as_shell(fence: str) -> str:
    """Highlight commands without a prompt as such: `console` takes each line without one for output."""
    return fence if "\n$ " in fence else fence.replace("```console\n", "```bash\n", 1)


def _with_pipes(markdown: str) -> str:
    r"""Write `a|b` for `a\|b` in the code of tables, which only GitHub needs."""
    return re.sub(
        r"^\|.*",
        lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0]),
        markdown,
        flags=re.MULTILINE,
    )


def notebook_page(path: Path, repository: str) -> str:
    """Return a notebook as Markdown: its texts, its code, and the text of what the code printed."""
    name = path.relative_to(ROOT).as_posix()
    links = f"This page is the notebook [{path.name}]({repository}/blob/main/{name})."
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code" and text:
            parts.append(f"```python\n{text}\n```")
            printed = "".join(_printed(output) for output in cell.get("outputs", ())).rstrip()
            parts += [f"```text\n{printed}\n```"] if printed else []
    return "\n\n".join([*parts[:1], links, *parts[1:]]) + "\n"


def _printed(output: dict[str, object]) -> str:
    data = output.get("data", {})
    text = output.get("text") or (data.get("text/plain", "") if isinstance(data, dict) else "")
    return "".join(text) if isinstance(text, list) else str(text)


def _page_of(name: str) -> str:
    return os.path.splitext(name)[0] + ".md" if name.endswith(".ipynb") else name


def _source_of(place: str) -> str:
    """Return the file of the repository that a page of the site is made from."""
    names = {page: name for name, page in ROOT_PAGES.items()} | {INDEX: "writings/README.md"}
    return names.get(place, f"writings/{place}")


def _place_of(source: str) -> str:
    """Return the page of the site, or the picture, for a file of the repository; '' if it has none."""
    if source in ROOT_PAGES:
        return ROOT_PAGES[source]
    if source == "writings/README.md":
        return INDEX
    return _page_of(source.removeprefix("writings/")) if source.startswith("writings/") else ""
