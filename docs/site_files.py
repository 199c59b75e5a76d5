"""Hook of mkdocs: the site has the repository's own layout, so that every link is the same there and on GitHub."""

import re
from collections.abc import Iterable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#:]+?)(?:#[\w-]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Returns the theme's files, the pages (README.md is the first), and the files of the repository they link to."""
    pages = {ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")}
    linked = links_of(pages)
    reports = links_of(path for path in linked if path.suffix == ".md")
    style = {ROOT / "docs" / "site.css"}
    shown = dict.fromkeys(linked | reports | style, InclusionLevel.NOT_IN_NAV) | dict.fromkeys(
        pages, InclusionLevel.UNDEFINED
    )
    theme = [file for file in files if not Path(str(file.abs_src_path)).is_relative_to(ROOT / "docs")]
    ours = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path), inclusion=level)
        for path, level in sorted(shown.items())
    ]
    return Files(theme + ours)


def links_of(pages: Iterable[Path]) -> set[Path]:
    """Returns the files of the repository to which pages link."""
    found = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    return {path for path in found if path.is_file()}
