"""The site without quarto, into `_docs/`: nbdev processes the notebooks, pandoc writes the pages.

python tools/preview_docs.py            build, then open _docs/index.html
python tools/preview_docs.py --check    build, then end non-zero if a link is dead or text is lost
"""

import argparse
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbdev.doclinks
import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
# the pandoc that pip installed, so that every machine writes the same
PANDOC = Path(pypandoc.__file__).parent / "files" / "pandoc"
MARKDOWN = "markdown-yaml_metadata_block"
COLAB = "https://colab.research.google.com/github/"
MIXED = (
    "mixes imports with other code: give the imports a cell of their own, for a test in"
    " '#| testmod'"
)
SHOWN = (
    "text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex",
    "text/plain",
)  # fmt: skip


# The sidebar: the front page's tour, in its order and under its headings


def tour(nbs: Path) -> list:
    "Entries of the sidebar as quarto writes them, from the tables of the front page alone."
    cells = json.loads((nbs / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join(joined(c["source"]) for c in cells if c["cell_type"] == "markdown")
    entries: list = ["index.ipynb"]
    for line in text.split("\n"):
        heading = re.match(r"#+\s+(.+)$", line)
        row = re.match(r"\|\s*\[[^\]]+\]\(([\w/]+\.ipynb)\)", line)
        if heading:
            entries.append({"section": heading[1], "contents": []})
        elif row:
            entries[-1]["contents"].append(row[1])
    return [e for e in entries if isinstance(e, str) or e["contents"]]


def not_on_tour(nbs: Path, entries: list) -> list[str]:
    "Notebooks that the front page forgets."
    named = {s for e in entries for s in ([e] if isinstance(e, str) else e["contents"])}
    files = {p.relative_to(nbs).as_posix() for p in nbglob(nbs, as_path=True)}
    return sorted(files - named)


def write_sidebar(nbs: Path) -> list:
    "Write `sidebar.yml`, which quarto reads, too."
    entries, path = tour(nbs), nbs / "sidebar.yml"
    contents = {"website": {"sidebar": {"contents": entries}}}
    text = "# Made by tools/preview_docs.py\n" + yaml.dump(contents, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return entries


# From a processed notebook to markdown


def joined(text: str | list[str]) -> str:
    "The text of a cell or an output."
    return text if isinstance(text, str) else "".join(text)


def fence(text: str, attrs: str = "") -> str:
    "`text` as a code block, whatever it holds."
    ticks = "`" * max([3, *(len(m) + 1 for m in re.findall(r"`{3,}", text))])
    return f"{ticks}{attrs}\n{text.rstrip()}\n{ticks}"


def output(out: dict, divs: bool) -> str:
    "One output of a cell as markdown."
    if out["output_type"] == "stream":
        kind, text = "text/plain", joined(out["text"])
    elif out["output_type"] == "error":
        kind, text = "text/plain", "\n".join(out["traceback"])
    else:
        kind = next((k for k in SHOWN if k in out["data"]), None)
        if kind is None:
            return ""
        text = joined(out["data"][kind])
    if kind == "text/plain":
        return fence(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)) if text.strip() else ""
    if kind in ("text/markdown", "text/latex"):
        return text
    if not divs:
        raise ValueError(f"an output of index.ipynb is {kind}, which README.md can not hold")
    if kind in ("image/png", "image/jpeg"):
        data = re.sub(r"\n", "", text)
        text = f'<img src="data:{kind};base64,{data}" alt="output of the cell above">'
    return fence(text, "{=html}")


def cell_markdown(cell: dict, divs: bool) -> str:
    "A processed cell as markdown: quarto's options are obeyed and taken out."
    source = joined(cell["source"])
    if cell["cell_type"] != "code":
        return source if cell["cell_type"] == "markdown" else ""
    options = dict(re.findall(r"(?m)^#\|\s*([\w-]+):\s*(.*?)\s*$", source))
    code = re.sub(r"(?m)^#\|\s*[\w-]+:.*\n?", "", source).strip("\n")
    if options.get("include") == "false":
        return ""
    parts = []
    if code and options.get("echo") != "false":
        parts.append(fence(code, "{.python}" if divs else " python"))
    for out in cell["outputs"] if options.get("output") != "false" else []:
        text = output(out, divs)
        if text and divs and options.get("output") != "asis":
            text = f"::: {{.output .{out.get('name', 'result')}}}\n{text}\n:::"
        if text:
            parts.append(text)
    return folded("\n\n".join(parts), options) if divs else "\n\n".join(parts)


def folded(text: str, options: dict) -> str:
    "A cell as quarto's `code-fold` asks: a proof is shut, the source of what is exported open."
    if options.get("code-fold") != "true" or not text:
        return text
    summary = html.escape(options.get("code-summary", "Code").strip('"'))
    return f'<details class="proof">\n<summary>{summary}</summary>\n\n{text}\n\n</details>'


@dataclass
class Page:
    "A processed notebook on its way to HTML."

    source: str  # path of the notebook, relative to nbs/
    html: str  # path of the page, relative to the site
    title: str
    description: str
    ast: dict  # pandoc's
    ids: set  # anchors


def pandoc(text: str, *args: str) -> str:
    "What pandoc makes of a text."
    done = subprocess.run(
        [PANDOC, *args], input=text, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stdout


def elements(node) -> Iterator[dict]:
    "Every element of pandoc's tree."
    if isinstance(node, dict):
        if "t" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for x in node:
            yield from elements(x)


def read_page(path: Path, source: str, divs: bool = True) -> Page:
    "Read the processed notebook at `path`."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    front = {}
    if cells and cells[0]["cell_type"] == "raw":
        front = yaml.safe_load(joined(cells[0]["source"]).replace("---", ""))
    text = "\n\n".join(filter(None, (cell_markdown(c, divs) for c in cells)))
    tree = json.loads(pandoc(text, "-f", MARKDOWN, "-t", "json"))
    name = front.get("output-file") or nbdev.doclinks._nbpath2html(Path(source)).name
    ids = {e["c"][1][0] for e in elements(tree) if e["t"] == "Header"}
    title, description = front.get("title", Path(source).stem), front.get("description", "")
    where = Path(source).with_name(name).as_posix()
    return Page(source, where, str(title), str(description), tree, ids)


# Links


def site_url(cfg) -> str:
    "Where the site will stand."
    return f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/"


def blob_url(cfg) -> str:
    "Where the repository shows a file."
    return f"{cfg.git_url}/blob/{cfg.branch}/"


def split_url(url: str, page: str, site: str) -> tuple[str, str] | None:
    "Path (relative to the site) and anchor that `url` on `page` means; None where it leads away."
    if url.startswith(site):
        base, url = "", url.removeprefix(site)
        home = "index.html"
    elif re.match(r"[a-z][a-z0-9+.-]*:|//", url, re.I):
        return None
    else:
        base, home = os.path.dirname(page), page
    path, _, anchor = url.partition("#")
    where = os.path.normpath(os.path.join(base, unquote(path))) if path else home
    return where, unquote(anchor)


def relink(page: Page, pages: dict[str, Page], site: str) -> None:
    """Point links at pages of this site: from `NN_name.ipynb`, and from the addresses that nbdev
    gives to `names` in backticks. A name without a heading leads to its class or to the top."""
    for e in elements(page.ast):
        if e["t"] == "CodeBlock":  # nbdev links names in signatures, too
            e["c"][1] = re.sub(rf"\[(`[^`]+`)\]\({re.escape(site)}[^)]*\)", r"\1", e["c"][1])
        if e["t"] not in ("Link", "Image"):
            continue
        url = e["c"][2][0]
        where = split_url(url, page.html, site)
        if where is None or url.startswith("#"):
            continue
        path, anchor = where
        target = next((p for p in pages.values() if path in (p.source, p.html)), None)
        if target is None:
            continue
        if url.startswith(site):
            while anchor and anchor not in target.ids:
                anchor = anchor.rpartition(".")[0]
        path = between(page, target.html)
        e["c"][2][0] = f"{path}#{anchor}" if anchor else path


def between(page: Page, to: str) -> str:
    "The address of a file of the site, seen from a page."
    return os.path.relpath(to, os.path.dirname(page.html) or ".")


# The pages


def site_nav(page: Page, entries: list, pages: dict[str, Page]) -> str:
    "The sidebar of `page` as HTML."

    def item(source: str) -> str:
        p = pages[source]
        here = ' class="here" aria-current="page"' if p is page else ""
        return f'<li><a href="{between(page, p.html)}"{here}>{html.escape(p.title)}</a></li>'

    parts = []
    for e in entries:
        if isinstance(e, str):
            parts.append(f"<ul>{item(e)}</ul>")
        else:
            parts.append(f'<div class="group">{html.escape(e["section"])}</div>')
            parts.append(f"<ul>{''.join(map(item, e['contents']))}</ul>")
    return "".join(parts)


def page_links(page: Page, cfg) -> str:
    "Where to run, read and change a page's notebook."
    path = f"{cfg.nbs_path.name}/{page.source}"
    repo = cfg.git_url.removeprefix("https://github.com/")
    links = {
        "Open in Colab": f"{COLAB}{repo}/blob/{cfg.branch}/{path}",
        "Notebook": blob_url(cfg) + path,
        "Edit": f"{cfg.git_url}/edit/{cfg.branch}/{path}",
    }
    return " · ".join(f'<a href="{url}">{name}</a>' for name, url in links.items())


def neighbour(page: Page, other: Page | None, text: str) -> str:
    "A link to the page before or after."
    if other is None:
        return ""
    return f'<a href="{between(page, other.html)}">{text.format(html.escape(other.title))}</a>'


def write_page(
    page: Page, before: Page | None, after: Page | None, nav: str, out: Path, cfg
) -> None:
    "Write `page` as HTML under `out`."
    description = pandoc(page.description, "-f", MARKDOWN, "-t", "html").strip()
    values = {
        "pagetitle": html.escape(page.title),
        "title": html.escape(page.title),
        "description": description.removeprefix("<p>").removesuffix("</p>"),
        "site": nav,
        "links": page_links(page, cfg),
        "repository": cfg.git_url,
        "before": neighbour(page, before, "← {}"),
        "after": neighbour(page, after, "{} →"),
        "root": "../" * page.html.count("/"),
    }
    words = ["-f", "json", "-t", "html5", "--standalone", "--toc", "--toc-depth=3", "--mathml"]
    words += ["--wrap=none", f"--template={ROOT / 'tools/preview.html'}"]
    words += [f"-V{k}={v}" for k, v in values.items() if v]
    path = out / page.html
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pandoc(json.dumps(page.ast), *words), encoding="utf-8")


def llms_text(pages: list[Page], cfg) -> str:
    "The site for language models (llmstxt.org): what it is, and a line for each page."
    lines = [f"# {cfg.title}", "", f"> {pages[0].description}", "", "## Notebooks", ""]
    for p in pages[1:]:
        said = re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", p.description)
        lines.append(f"- [{p.title}]({blob_url(cfg)}{cfg.nbs_path.name}/{p.source}): {said}")
    return "\n".join(lines) + "\n"


def processed(cfg, order: list[str]) -> Path:
    "The notebooks as nbdev processes them."
    os.environ["PYTHONWARNINGS"] = (
        "ignore"  # of processes this starts; what matters, `problems` says
    )
    try:
        return proc_nbs(cfg.nbs_path, force=True, n_workers=2)
    except Exception as e:
        for s in order:
            for line in run_by_nbdev(cfg.nbs_path / s):
                print(f"{s}: the cell {line!r} {MIXED}", file=sys.stderr)
        sys.exit(f"preview_docs: nbdev can not process the notebooks. {e}")


def build(out: Path) -> dict[str, Page]:
    "Process the notebooks and write the site to `out`."
    cfg = get_config()
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    entries = write_sidebar(cfg.nbs_path)
    order = [s for e in entries for s in ([e] if isinstance(e, str) else e["contents"])]
    proc = processed(cfg, order)
    pages = {s: read_page(proc / s, s) for s in order}
    shutil.rmtree(out, ignore_errors=True)
    for path in proc.rglob("*"):
        if path.is_file() and path.suffix not in (".ipynb", ".yml"):
            (out / path.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(proc))
    for name in ("logo.svg", "images/scene.png", "styles.css"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cfg.nbs_path / name, out / name)
    for i, s in enumerate(order):
        relink(pages[s], pages, site_url(cfg))
        around = [pages[order[j]] if 0 <= j < len(order) else None for j in (i - 1, i + 1)]
        write_page(pages[s], *around, site_nav(pages[s], entries, pages), out, cfg)
    (out / "llms.txt").write_text(llms_text(list(pages.values()), cfg), encoding="utf-8")
    return pages


# The check


class Links(HTMLParser):
    "Anchors and links of a page."

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.urls = {"", "top"}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        for k, v in attrs:
            if k in ("id", "name") and v:
                self.ids.add(v)
            if k in ("href", "src") and v is not None:
                self.urls.append(v)


def lost_text(path: Path) -> str:
    "What nbdev drops from the title's cell: all but the H1, the `>` line and `- key: value` lines."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = joined(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(r"^#\s", text, re.M):
            lines = [
                line
                for line in text.split("\n")
                if line.strip() and not re.match(r"#\s|-\s\S.*:", line)
            ]
            return "\n".join(lines[1:] if lines and lines[0].startswith(">") else lines)
    return ""


def run_by_nbdev(path: Path) -> list[str]:
    "First lines of the cells that mix imports with other code: nbdev runs them to build the site."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] != "code" or re.match(
            r"#\|\s*(export|testmod)|#\|\s*eval:\s*false", source
        ):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a magic
            continue
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)]
        alone = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
        if any(imports) and not alone:
            found.append(source.partition("\n")[0])
    return found


def private(path: Path) -> list[str]:
    "Paths of one machine and tokens in the outputs of the notebook at `path`."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = []
    for out in (o for c in cells for o in c.get("outputs", [])):
        texts += [joined(out.get("text", "")), "\n".join(out.get("traceback", []))]
        texts += [joined(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]
    text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", "\n".join(texts))
    folder = r"(?<![\w./-])/(?:root|home|Users|tmp|work|var/folders)(?:/[\w.-]*|\b)"
    token = r"\b(?:hf_|gh[pos]_|sk-)[A-Za-z0-9]{16,}"
    return list(dict.fromkeys(re.findall(f"{folder}|{token}", text)))


def links_of(page: Page, links: dict[str, Links], out: Path, cfg) -> list[str]:
    "Dead links and anchors of a page, within the site and into the repository."
    found, blob, edit = [], blob_url(cfg), f"{cfg.git_url}/edit/{cfg.branch}/"
    for url in dict.fromkeys(links[page.html].urls):
        where = split_url(url, page.html, site_url(cfg))
        start = next((s for s in (blob, edit) if url.startswith(s)), None)
        if start:
            if not (ROOT / unquote(url.removeprefix(start).partition("#")[0])).exists():
                found.append(f"{page.source}: no such file in the repository: {url}")
        elif where:
            path, anchor = where
            if not (out / path).is_file():
                found.append(f"{page.source}: dead link: {url}")
            elif path in links and anchor not in links[path].ids:
                found.append(f"{page.source}: dead anchor: {url}")
    return found


def problems(out: Path, pages: dict[str, Page]) -> list[str]:
    "Dead links, text that a reader would not see, and notebooks that the tour forgets."
    cfg = get_config()
    found = [f"{s}: not on the front page's tour" for s in not_on_tour(cfg.nbs_path, list(pages))]
    texts = {p.html: (out / p.html).read_text(encoding="utf-8") for p in pages.values()}
    links = {name: Links(text) for name, text in texts.items()}
    for p in pages.values():
        found += links_of(p, links, out, cfg)
        notebook = cfg.nbs_path / p.source
        found += [f"{p.source}: the cell {s!r} {MIXED}" for s in run_by_nbdev(notebook)]
        found += [f"{p.source}: an output holds {s!r}" for s in private(notebook)]
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", texts[p.html], flags=re.S)
        tag = re.search(r"</?(SUMMARY|CAPTION|REASONING|CONCLUSION)>", text)
        if tag:
            found.append(f"{p.source}: {tag[0]} is read as HTML and vanishes: put it in backticks")
        lost = lost_text(notebook)
        if lost:
            found.append(f"{p.source}: nbdev drops this from the title's cell: {lost[:60]!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="end non-zero if a link leads nowhere or text is lost"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    out = get_config().doc_path
    pages = build(out)
    found = problems(out, pages)
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages in {out.relative_to(ROOT)}, {len(found)} problems")
    if args.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
