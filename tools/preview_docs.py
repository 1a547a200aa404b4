"""The documentation site without quarto, into `_docs/`: nbdev processes the notebooks, pandoc writes the pages.

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
PANDOC = (
    Path(pypandoc.__file__).parent / "files" / "pandoc"
)  # the one pip installed, so that every machine writes the same
MARKDOWN = "markdown-yaml_metadata_block"
GROUPS = {
    3: "The format and the data",
    5: "Tokens and models",
    8: "Training",
    11: "Answering and scoring",
    99: "The command line",
}
MIXED = "mixes imports with other code: give the imports a cell of their own, for a test in '#| testmod'"
SHOWN = (
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
)


# The sidebar


def sidebar(nbs: Path) -> list:
    "Entries of the sidebar as quarto writes them: front page, numbered notebooks in groups, then a section for each folder, in the front page's order"
    tour = (
        (nbs / "index.ipynb").read_text(encoding="utf-8") if (nbs / "index.ipynb").exists() else ""
    )
    place = lambda p: (
        tour.find(f"({p.as_posix()})") % (len(tour) + 1),
        p,
    )  # not on the tour: -1, so last
    files = sorted((p.relative_to(nbs) for p in nbglob(nbs, as_path=True)), key=place)
    sections, res = (
        {},
        [p.as_posix() for p in files if p.name == "index.ipynb" and len(p.parts) == 1],
    )
    for p in files:
        if p.as_posix() in res:
            continue
        number = int((re.match(r"\d+", p.name) or ["99"])[0])
        name = (
            next(t for last, t in GROUPS.items() if number <= last)
            if len(p.parts) == 1
            else p.parts[0].capitalize()
        )
        sections.setdefault(name, []).append(p.as_posix())
    order = [*GROUPS.values(), "Tutorials", "Benchmarks"]
    known = sorted(sections, key=lambda s: order.index(s) if s in order else len(order))
    return res + [{"section": s, "contents": sections[s]} for s in known]


def write_sidebar(nbs: Path) -> list:
    "Write `sidebar.yml`, which quarto reads too"
    entries, path = sidebar(nbs), nbs / "sidebar.yml"
    text = "# Made by tools/preview_docs.py\n" + yaml.dump(
        {"website": {"sidebar": {"contents": entries}}}, sort_keys=False
    )
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return entries


# From a processed notebook to markdown


def joined(text) -> str:
    return text if isinstance(text, str) else "".join(text)


def fence(text: str, attrs: str = "") -> str:
    "`text` as a code block, whatever it holds"
    ticks = "`" * max([3, *(len(m) + 1 for m in re.findall(r"`{3,}", text))])
    return f"{ticks}{attrs}\n{text.rstrip()}\n{ticks}"


def output(out: dict, divs: bool) -> str:
    "One output of a cell as markdown"
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
        raise ValueError(
            f"an output of index.ipynb is {kind}, which README.md can not hold: link a picture from a file instead"
        )
    if kind in ("image/png", "image/jpeg"):
        text = f'<img src="data:{kind};base64,{re.sub(chr(10), "", text)}" alt="">'
    return fence(text, "{=html}")


def cell_markdown(cell: dict, divs: bool) -> str:
    "A processed cell as markdown: quarto's options are obeyed and taken out"
    source = joined(cell["source"])
    if cell["cell_type"] != "code":
        return source if cell["cell_type"] == "markdown" else ""
    lines = source.split("\n")
    options = dict(
        m.groups() for line in lines if (m := re.match(r"#\|\s*([\w-]+):\s*(.*?)\s*$", line))
    )
    code = "\n".join(line for line in lines if not re.match(r"#\|\s*[\w-]+:", line)).strip("\n")
    if options.get("include") == "false":
        return ""
    parts = []
    if code and options.get("echo") != "false":
        parts.append(fence(code, "{.python}" if divs else " python"))
        if "code-fold" in options and divs:
            parts[-1] = (
                f"<details>\n<summary>{options.get('code-summary', 'Code').strip(chr(34))}</summary>\n\n{parts[-1]}\n\n</details>"
            )
    for out in cell["outputs"] if options.get("output") != "false" else []:
        text = output(out, divs)
        if text and divs and options.get("output") != "asis":
            text = f"::: {{.output .{out.get('name', 'result')}}}\n{text}\n:::"
        if text:
            parts.append(text)
    return "\n\n".join(parts)


@dataclass
class Page:
    "A processed notebook on its way to HTML"

    source: str  # path of the notebook, relative to nbs/
    html: str  # path of the page, relative to the site
    title: str
    description: str
    ast: dict  # pandoc's
    ids: set  # anchors


def pandoc(text: str, *args: str) -> str:
    return subprocess.run(
        [PANDOC, *args], input=text, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


def elements(node):
    "Every element of pandoc's tree"
    if isinstance(node, dict):
        if "t" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for x in node:
            yield from elements(x)


def read_page(path: Path, source: str, divs: bool = True) -> Page:
    "Read the processed notebook at `path`"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    front = (
        yaml.safe_load(joined(cells[0]["source"]).replace("---", ""))
        if cells and cells[0]["cell_type"] == "raw"
        else {}
    )
    text = "\n\n".join(filter(None, (cell_markdown(c, divs) for c in cells)))
    ast = json.loads(pandoc(text, "-f", MARKDOWN, "-t", "json"))
    name = (
        Path(source)
        .with_name(front.get("output-file") or nbdev.doclinks._nbpath2html(Path(source)).name)
        .as_posix()
    )
    ids = {e["c"][1][0] for e in elements(ast) if e["t"] == "Header"}
    return Page(
        source,
        name,
        str(front.get("title", Path(source).stem)),
        str(front.get("description", "")),
        ast,
        ids,
    )


# Links


def site_url(cfg) -> str:
    return f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/"


def blob_url(cfg) -> str:
    return f"{cfg.git_url}/blob/{cfg.branch}/"


def split_url(url: str, page: str, site: str) -> tuple[str, str] | None:
    "Path (relative to the site) and anchor that `url` on `page` points to; None where it leads elsewhere"
    if url.startswith(site):
        base, url = "", url.removeprefix(site)
    elif re.match(r"[a-z][a-z0-9+.-]*:|//", url, re.I):
        return None
    else:
        base = os.path.dirname(page)
    path, _, anchor = url.partition("#")
    return os.path.normpath(os.path.join(base, unquote(path))) if path else (
        "index.html" if base != os.path.dirname(page) else page
    ), unquote(anchor)


def relink(page: Page, pages: dict[str, Page], site: str):
    """Point links at pages of this site: from `NN_name.ipynb`, and from the addresses that nbdev gives to `names` in
    backticks. A name without a heading of its own (a method, a private name) leads to its class or to the page's top."""
    for e in elements(page.ast):
        if e["t"] == "CodeBlock":
            e["c"][1] = re.sub(
                rf"\[(`[^`]+`)\]\({re.escape(site)}[^)]*\)", r"\1", e["c"][1]
            )  # nbdev links names in signatures too
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
        path = os.path.relpath(target.html, os.path.dirname(page.html) or ".")
        e["c"][2][0] = f"{path}#{anchor}" if anchor else path


# The pages


def site_nav(page: Page, entries: list, pages: dict[str, Page]) -> str:
    "The sidebar of `page` as HTML"

    def item(source):
        p = pages[source]
        here = ' class="here" aria-current="page"' if p is page else ""
        return f'<li><a href="{os.path.relpath(p.html, os.path.dirname(page.html) or ".")}"{here}>{html.escape(p.title)}</a></li>'

    return "".join(
        f"<ul>{item(e)}</ul>"
        if isinstance(e, str)
        else f'<div class="group">{html.escape(e["section"])}</div><ul>{"".join(map(item, e["contents"]))}</ul>'
        for e in entries
    )


def write_page(page: Page, before: Page | None, after: Page | None, nav: str, out: Path):
    "Write `page` as HTML under `out`"

    def link(p, text):
        return (
            f'<a href="{os.path.relpath(p.html, os.path.dirname(page.html) or ".")}">{text.format(html.escape(p.title))}</a>'
            if p
            else ""
        )

    description = (
        pandoc(page.description, "-f", MARKDOWN, "-t", "html")
        .strip()
        .removeprefix("<p>")
        .removesuffix("</p>")
    )
    values = {
        "pagetitle": html.escape(page.title),
        "title": html.escape(page.title),
        "description": description,
        "site": nav,
        "before": link(before, "← {}"),
        "after": link(after, "{} →"),
        "root": "../" * page.html.count("/"),
    }
    text = pandoc(
        json.dumps(page.ast),
        "-f",
        "json",
        "-t",
        "html5",
        "--standalone",
        "--toc",
        "--toc-depth=3",
        "--mathml",
        "--wrap=none",
        f"--template={ROOT / 'tools/preview.html'}",
        *(f"-V{k}={v}" for k, v in values.items() if v),
    )
    path = out / page.html
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build(out: Path) -> dict[str, Page]:
    "Process the notebooks and write the site to `out`"
    cfg = get_config()
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    entries = write_sidebar(cfg.nbs_path)
    order = [s for e in entries for s in ([e] if isinstance(e, str) else e["contents"])]
    os.environ["PYTHONWARNINGS"] = (
        "ignore"  # of the processes that this starts; what matters in them, `problems` says
    )
    try:
        proc = proc_nbs(cfg.nbs_path, force=True, n_workers=2)
    except Exception as e:
        for s in order:
            for line in run_by_nbdev(cfg.nbs_path / s):
                print(f"{s}: the cell {line!r} {MIXED}", file=sys.stderr)
        sys.exit(f"preview_docs: nbdev can not process the notebooks. {e}")
    pages = {s: read_page(proc / s, s) for s in order}
    shutil.rmtree(out, ignore_errors=True)
    for path in proc.rglob("*"):
        if path.is_file() and path.suffix not in (".ipynb", ".yml"):
            (out / path.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(proc))
    for i, s in enumerate(order):
        relink(pages[s], pages, site_url(cfg))
        around = [pages[order[j]] if 0 <= j < len(order) else None for j in (i - 1, i + 1)]
        write_page(pages[s], *around, site_nav(pages[s], entries, pages), out)
    return pages


# The check


class Links(HTMLParser):
    "Anchors and links of a page"

    def __init__(self, text):
        super().__init__()
        self.ids, self.urls = {"", "top"}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k in ("id", "name") and v:
                self.ids.add(v)
            if k in ("href", "src") and v is not None:
                self.urls.append(v)


def lost_text(path: Path) -> str:
    "What nbdev drops from the title's cell: all but the H1, the `>` line and `- key: value` lines"
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
    "First lines of the cells that mix imports with other code: nbdev runs them when it builds the site, without the cells they need"
    res = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] != "code" or re.match(
            r"#\|\s*(export|testmod)|#\|\s*eval:\s*false", source
        ):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # a magic
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)) and not all(
            isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body
        ):
            res.append(source.partition("\n")[0])
    return res


def private(path: Path) -> list[str]:
    "Paths of one machine and tokens in the outputs of the notebook at `path`"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [
        joined(t)
        for c in cells
        for o in c.get("outputs", [])
        for t in [
            o.get("text", ""),
            "\n".join(o.get("traceback", [])),
            *(v for k, v in o.get("data", {}).items() if k.startswith("text/")),
        ]
    ]
    text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", "\n".join(texts))
    return list(
        dict.fromkeys(
            m[0]
            for m in re.finditer(
                r"(?<![\w./-])/(?:root|home|Users|tmp|work|var/folders)(?:/[\w.-]*|\b)|\b(?:hf_|gh[pos]_|sk-)[A-Za-z0-9]{16,}",
                text,
            )
        )
    )


def problems(out: Path, pages: dict[str, Page]) -> list[str]:
    "Dead links and anchors within the site and into the repository, and text that a reader would not see"
    cfg, res = get_config(), []
    blob, site = blob_url(cfg), site_url(cfg)
    links = {p.html: Links((out / p.html).read_text(encoding="utf-8")) for p in pages.values()}
    for p in pages.values():
        for url in dict.fromkeys(links[p.html].urls):
            if url.startswith(blob):
                if not (ROOT / unquote(url.removeprefix(blob).partition("#")[0])).exists():
                    res.append(f"{p.source}: no such file in the repository: {url}")
            elif where := split_url(url, p.html, site):
                path, anchor = where
                if not (out / path).is_file():
                    res.append(f"{p.source}: dead link: {url}")
                elif path in links and anchor not in links[path].ids:
                    res.append(f"{p.source}: dead anchor: {url}")
        res += [
            f"{p.source}: the cell {s!r} {MIXED}" for s in run_by_nbdev(cfg.nbs_path / p.source)
        ]
        res += [f"{p.source}: an output holds {s!r}" for s in private(cfg.nbs_path / p.source)]
        text = re.sub(
            r"<(pre|code)\b.*?</\1>", "", (out / p.html).read_text(encoding="utf-8"), flags=re.S
        )
        if tag := re.search(r"</?(SUMMARY|CAPTION|REASONING|CONCLUSION)>", text):
            res.append(f"{p.source}: {tag[0]} is read as HTML and vanishes: put it in backticks")
        if lost := lost_text(cfg.nbs_path / p.source):
            res.append(f"{p.source}: nbdev drops this from the title's cell: {lost[:60]!r}")
    return res


def main():
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
