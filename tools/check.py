"""What a reader, and a contributor, may rely on in every notebook and module.

    python tools/check.py    end non-zero if something is found; names notebook and cell

It looks at columns, statements a line and names nobody binds (ruff), at the order of the
notebooks (a module imports only modules of notebooks before its own, and adds no method to their
classes; each has a number of its own), at names of the package that are not there any more, which
slow cells would keep for months, at the size of modules, for names of model families outside
their table and toys, at the form of test names, for cells committed with an error, for notebooks
committed without their outputs, for names that the changelog sends a reader to and that are not
there, at leaks: a cell of the story that reads a name which a proof has bound again, so that its
output is not what a reader gets; and at what stops Run All: a name read before it is bound, and
slow cells without their switch.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 700
SHOWN_LATER = {"Report"}  # what evaluate counts, report draws
FAMILIES = re.compile(
    "qwen|mllama|llava.?next|onevision|internvl|idefics|smolvlm|gemma|mistral|pixtral|llama.?4",
    re.I,
)
MAY_NAME_FAMILIES = {"towers", "tiled", "families", "toys", "tiny"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def notebooks() -> list[Path]:
    "The notebooks, in reading order, tutorials and benchmarks last."
    nbs = ROOT / "nbs"
    return sorted(nbs.glob("*.ipynb")) + sorted(nbs.glob("[a-z]*/*.ipynb"))


def code_cells(path: Path) -> Iterator[tuple[int, str]]:
    "Number and source of each code cell, magics left out."
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            yield i, re.sub(r"(?m)^\s*[%!].*$", "", "".join(cell["source"]))


def directive(source: str, word: str) -> bool:
    "Whether a cell carries a directive."
    return re.search(rf"(?m)^#\|\s*{word}\b", source) is not None


# Lines


def lines() -> list[str]:
    "Lines over 100 columns, several statements a line, names nobody binds: cell and line, by ruff."
    found = []
    for words in (["check", "--quiet", "--output-format", "concise"], ["format", "--check"]):
        paths = ["nbs", "tools", "setup.py", "tests/conftest.py"]
        done = subprocess.run(["ruff", *words, *paths], capture_output=True, text=True)
        found += [line for line in done.stdout.splitlines() if re.match(r"\S+:|Would", line)]
    return found


def lengths() -> list[str]:
    "Modules that are longer than a subject should be."
    found = []
    for path in sorted((ROOT / "llava_cot").glob("[a-z]*.py")):
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > MOST_LINES:
            found.append(f"llava_cot/{path.name}: {n} lines, expected at most {MOST_LINES}")
    return found


# Rooms


def order() -> list[str]:
    "Modules that import one whose notebook comes later."
    numbers = {}
    for path in notebooks():
        for _, source in code_cells(path):
            name = re.search(r"(?m)^#\|\s*default_exp\s+(\w+)", source)
            if name:
                numbers[name[1]] = len(numbers)
    found = []
    for name, number in numbers.items():
        tree = ast.parse((ROOT / f"llava_cot/{name}.py").read_text(encoding="utf-8"))
        for line, other in imported(tree):
            if numbers.get(other, -1) >= number:
                found.append(f"llava_cot/{name}.py:{line}: imports {other}, which comes later")
    return found


def same_numbers() -> list[str]:
    "Notebooks of one number: reading order is the order of the numbers."
    found = {}
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        found.setdefault(path.name.split("_")[0], []).append(path.name)
    return [f"nbs: {', '.join(sorted(some))}: one number" for some in found.values() if some[1:]]


def family_names() -> list[str]:
    "Modules that name a family of models; what differs between them stands in one table."
    found = []
    for path in sorted((ROOT / "llava_cot").glob("[a-z]*.py")):
        if path.stem in MAY_NAME_FAMILIES:
            continue
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name = FAMILIES.search(line)
            if name:
                found.append(f"llava_cot/{path.name}:{n}: names {name[0]}; ask a field of Family")
    return found


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    "Line and name of each module of the package that a module imports, inside functions, too."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level == 1 and module or module.startswith("llava_cot."):
            yield node.lineno, module.removeprefix("llava_cot.").split(".")[0]
        elif node.level == 1 or module == "llava_cot":
            yield from ((node.lineno, alias.name) for alias in node.names)


def patches() -> list[str]:
    "Methods that a module puts on a class of another: its notebook would change it for all others."
    found = []
    for path in sorted((ROOT / "llava_cot").glob("[a-z]*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        own = {node.name for node in body if isinstance(node, ast.ClassDef)}
        for node in body:
            marks = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            if any(re.match(r"patch\b", mark) for mark in marks):
                owner = ast.unparse(node.args.args[0].annotation)
                if owner not in own | SHOWN_LATER:
                    place = f"llava_cot/{path.name}:{node.lineno}"
                    found.append(f"{place}: {node.name} is patched into {owner}, another module's")
    return found


# Proofs


def parsed(source: str) -> list[ast.AST]:
    "All that a cell holds; nothing where it is more than Python."
    try:
        return list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return []


def names(source: str) -> list[ast.Name]:
    "Names that a cell binds or reads itself, outside its functions and comprehensions."
    inner, nodes = set(), parsed(source)
    for node in nodes:
        if isinstance(node, FUNCTIONS + COMPREHENSIONS):
            inner |= {id(child) for child in ast.walk(node) if child is not node}
    return [n for n in nodes if isinstance(n, ast.Name) and id(n) not in inner]


def defined(source: str) -> set[str]:
    "Functions and classes that a cell defines."
    try:
        return {n.name for n in ast.parse(source).body if isinstance(n, FUNCTIONS[:3])}
    except SyntaxError:
        return set()


def leaks(path: Path) -> list[str]:
    "Cells of the story that read a name which a proof has bound after the story had."
    story, taken, found = set(), {}, []
    for i, source in code_cells(path):
        used = names(source)
        stored = {n.id for n in used if isinstance(n.ctx, ast.Store)} | defined(source)
        if directive(source, "test"):
            taken |= {name: i for name in stored & story}
            continue
        for n in used:
            if isinstance(n.ctx, ast.Load) and n.id in taken:
                found.append(
                    f"cell {i}: reads {n.id!r}, which the proof in cell {taken[n.id]} binds"
                )
        story |= stored
        for name in stored:
            taken.pop(name, None)
    return [f"{path.relative_to(ROOT)} {text}" for text in dict.fromkeys(found)]


def binds(source: str) -> set[str]:
    "Names that a cell leaves to the cells after it."
    found = {n.id for n in names(source) if isinstance(n.ctx, ast.Store)} | defined(source)
    for node in parsed(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def reads(source: str) -> set[str]:
    "Names of others that a cell reads when it runs; nothing where its functions run later."
    if directive(source, "(exports?|exporti|testmod)"):
        return set()
    nodes = parsed(source)
    used = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.id for node in used if isinstance(node.ctx, ast.Store)} | binds(source)
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.name for node in nodes if isinstance(node, (*FUNCTIONS[:3], ast.ExceptHandler))}
    return {node.id for node in used} - own


def early(path: Path) -> list[str]:
    "Cells that read what only a later cell binds, or one that Run All leaves out."
    cells = list(code_cells(path))
    later = set().union(*(binds(source) for _, source in cells))
    found, run, left_out = [], set(), set()
    for i, source in cells:
        slow = directive(source, "(slow|long)")
        missing = (reads(source) & later) - run - (left_out if slow else set())
        for name in sorted(missing):
            found.append(f"{path.relative_to(ROOT)} cell {i}: reads {name!r} before it is bound")
        if slow:
            left_out |= binds(source)
        else:
            run |= binds(source)
    return found


def switch(path: Path) -> list[str]:
    "A notebook with slow cells and without the switch that leaves them out of Run All."
    sources = [source for _, source in code_cells(path)]
    slow = any(directive(source, "slow") for source in sources)
    if slow and not any(re.search(r"(?m)^slow_cells\(run=False\)", source) for source in sources):
        return [f"{path.relative_to(ROOT)}: has slow cells; expected slow_cells(run=False) before"]
    return []


def test_names(path: Path) -> list[str]:
    "Test cells whose names are not words in lower case."
    found = []
    for i, source in code_cells(path):
        for name in re.findall(r"(?m)^#\|\s*test[ \t]+(.+)$", source):
            if not re.fullmatch(r"[A-Za-z0-9]+( [A-Za-z0-9]+)*", name.strip()):
                found.append(f"{path.relative_to(ROOT)} cell {i}: '#| test {name}': expected words")
    return found


def errors(path: Path) -> list[str]:
    "Cells whose committed output is an exception, as a killed run leaves it."
    found = []
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                found.append(f"{path.relative_to(ROOT)} cell {i}: ended in {output['ename']}")
    return found


def speaks(source: str) -> bool:
    "Whether a cell prints, or ends in a value that a notebook shows."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    shows = bool(body) and isinstance(body[-1], ast.Expr)
    return shows or any(name.id == "print" for name in names(source))


def never_executed(path: Path) -> list[str]:
    "A numbered notebook whose story shows values, none of which is committed."
    story = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code" and speaks(re.sub(r"(?m)^\s*[%!].*$", "", source))
        if code and not re.search(r"(?m)^#\|\s*(test|hide|export|default_exp)", source):
            story.append(cell)
    if path.name[0].isdigit() and story and not any(cell["outputs"] for cell in story):
        return [f"{path.relative_to(ROOT)}: no cell has its output; run tools/execute.py on it"]
    return []


def moved(bound: dict[str, set[str]]) -> list[str]:
    "Rows of the changelog's table that send a reader to a name that is not there."
    found = []
    for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines():
        place = re.fullmatch(r"\| `[\w.]+` \| `(\w+)\.(\w+)` \|", line)
        if place and place[2] not in bound.get(place[1], ()):
            found.append(f"CHANGELOG.md: `{place[1]}.{place[2]}` is not there: {line}")
    return found


def gone(path: Path, bound: dict[str, set[str]]) -> list[str]:
    "Names that a notebook takes from a module of the package, and that are not there."
    modules, found = {}, []
    for i, source in code_cells(path):
        nodes, taken = parsed(source), []
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_cot"):
                module = node.module.removeprefix("llava_cot").removeprefix(".")
                for alias in node.names:
                    if module:
                        taken.append((module, alias.name))
                    elif alias.name in bound:
                        modules[alias.asname or alias.name] = alias.name
        own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.value.id
                if name in modules and name not in own:
                    taken.append((modules[name], node.attr))
        for module, name in dict.fromkeys(taken):
            if name not in bound.get(module, ()) and not name.startswith("__"):
                place = f"{path.relative_to(ROOT)} cell {i}"
                found.append(f"{place}: llava_cot.{module} has no {name!r}")
    return found


def bindings() -> dict[str, set[str]]:
    "Module → the names that it binds, imports among them."
    found = {}
    for path in (ROOT / "llava_cot").glob("*.py"):
        found[path.stem] = binds(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    os.chdir(ROOT)
    found = lines() + lengths() + order() + same_numbers() + patches() + family_names()
    bound = bindings()
    found += moved(bound)
    for path in notebooks():
        found += leaks(path) + early(path) + switch(path) + test_names(path)
        found += errors(path) + never_executed(path) + gone(path, bound)
    print("\n".join(found) or "tools/check.py: nothing found")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
