"""What the site has beyond the files of this folder: README as its first page, the files next to it, a list of the
schemas, and in the gallery the whole pages of recipes. A hook of mkdocs (mkdocs.yml)."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
PAGES = ("demo", "grid", "field", "noise", "after", "finetuning", "pep8")
"""Recipes whose pages the gallery shows: those that have run here, or were kept."""


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=from_root((ROOT / "README.md").read_text())))
    for name in BESIDE:
        files.append(File.generated(config, name, content=from_root((ROOT / name).read_text())))
    files.append(File.generated(config, "schemas.md", content=schemas()))
    files.append(File.generated(config, "tutorial.md", content=tutorial(files, config)))
    worker = (Path(__file__).parent / "iframe-worker.js").read_text()
    files.append(File.generated(config, "assets/iframe-worker.js", content=worker))
    for name, page in made_pages().items():
        files.append(File.generated(config, f"pages/{name}.html", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    markdown = LINK.sub(lambda m: f"{m[1]}{_in_site(m[2])}{m[3]}", markdown)
    if page.file.src_uri == "gallery.md":
        markdown += made()
    return markdown


def from_root(markdown: str) -> str:
    """Text of a file of the root, as if it were in this folder."""
    return LINK.sub(lambda m: f"{m[1]}{m[2].removeprefix('docs/')}{m[3]}", markdown)


def _in_site(target: str) -> str:
    """Where a link of a page in this folder goes to on the site."""
    target = target.removeprefix("../") if target.removeprefix("../") in BESIDE else target
    return {"schemas": "schemas.md", "../README.md": "index.md"}.get(target, target)


def schemas() -> str:
    rows = []
    for path in sorted((ROOT / "docs" / "schemas").glob("*.json")):
        about = json.loads(path.read_text()).get("description", "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{path.name}](schemas/{path.name}) | {about} |")
    return "\n".join(["# JSON schemas", "", "| file | what it describes |", "|---|---|", *rows, ""])


def tutorial(files: Files, config: Any) -> str:
    """The notebook with its results as a page. Its pictures become files."""
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial-{cell['id']}.png"
                files.append(File.generated(config, name, content=base64.b64decode(data["image/png"])))
                parts.append(f"![Plot]({name})")
            elif said := "".join(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(f"```text\n{said}\n```")
    note = "The notebook is [tutorial.ipynb](tutorial.ipynb) in the repository's folder `docs`."
    return "\n\n".join([*parts, note, ""])


def made_pages() -> dict[str, bytes]:
    """The pages of recipes that ran on this machine, and of others those in `docs/pages`."""
    found = {}
    for name in PAGES:
        page = ROOT / "runs" / name / "report.html"
        kept = ROOT / "docs" / "pages" / f"{name}.html.gz"
        if page.exists():
            found[name] = page.read_bytes()
        elif kept.exists():
            found[name] = gzip.decompress(kept.read_bytes())
    return found


def made() -> str:
    return "\n## Whole pages\n\n" + "".join(f"- [{name}](pages/{name}.html)\n" for name in made_pages())
