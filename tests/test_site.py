"""The documentation builds as a site without a warning: no broken link, no page that the navigation lacks."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_the_site_builds_from_the_pages_as_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("material")  # the extra `docs`
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")  # of the theme, about its own future
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # raises Abort after any warning
    site = tmp_path / "site"
    assert "diffusion language models that decide their own length" in (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / page.stem / "index.html").is_file(), page.name
    for linked in ("docs/eos_ablation.png", "benchmarks/results/samplers/index.html", "dllm_var/model/transformer.py"):
        assert (site / linked).is_file(), linked
    assert '<script src="http' not in (site / "index.html").read_text()  # nothing from other servers
