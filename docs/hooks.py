"""What mkdocs does with links that leave docs/: the pages of benchmarks/ join the site, a source file becomes a page.

So a link of a page is the same relative path on the site and where the repository is browsed.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()((?!https?:|#)[^)#\s]+)")  # the path of [text](path#anchor)
LANGUAGES = {".py": "python", ".sh": "sh", "": "sh", ".yaml": "yaml"}


def on_files(files, config):
    pages = [*Path(config["docs_dir"]).glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    linked = {target for page in pages for target in _targets(page)}
    for path in sorted(linked | {str(page.relative_to(ROOT)) for page in pages}):
        if path.startswith("docs/") or not (ROOT / path).is_file():
            continue
        if _on_site(path).startswith("source/"):
            text = f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, '')}\n{(ROOT / path).read_text()}\n````\n"
            files.append(File.generated(config, _on_site(path), content=text))
        else:
            files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    def relink(match):
        there = posixpath.relpath(_on_site(_resolved(path, match[2])), posixpath.dirname(page.file.src_uri))
        return match[1] + there

    if page.file.src_uri.startswith("source/"):
        return markdown
    path = page.file.src_uri if page.file.src_uri.startswith("benchmarks/") else f"docs/{page.file.src_uri}"
    return LINK.sub(relink, markdown)


def _targets(page):
    """The repository's paths that a page links."""
    path = str(page.relative_to(ROOT))
    return {_resolved(path, match[2]) for match in LINK.finditer(page.read_text())}


def _resolved(page, link):
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _on_site(path):
    """The source of a page or picture on the site, from a path of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/") and path.endswith((".md", ".png")) or path.endswith(".ipynb"):
        return path
    return f"source/{path.lstrip('.')}.md"  # mkdocs leaves out what begins with a dot
