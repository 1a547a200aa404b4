"""Run notebooks in place, as a reader's *Run All* does; what is slow keeps its output.

python tools/execute.py nbs/24_template.ipynb [more]       stop at the first cell that fails
python tools/execute.py --slow nbs/25_tokens.ipynb         run the slow cells, too
"""

import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


class Client(NotebookClient):
    "Leaves out cells marked slow."

    def __init__(self, *args, slow: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.slow, self.seconds = slow, []

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        marked = re.search(r"^#\|\s*(slow|long|eval:\s*false)\b", cell["source"], re.M)
        if cell["cell_type"] == "code" and marked and not self.slow:
            return cell
        began = time.perf_counter()
        result = await super().async_execute_cell(cell, cell_index, **kwargs)
        self.seconds.append((time.perf_counter() - began, cell_index))
        return result


def execute(path: Path, slow: bool, timeout: int) -> None:
    "Run one notebook, and write it back without what differs from run to run."
    nb = nbformat.read(path, as_version=4)
    os.environ["LLAVA_COT_SLOW"] = "1"  # slow cells are this tool's to leave out
    where = {"metadata": {"path": str(path.parent)}}
    how = dict(store_widget_state=False, coalesce_streams=True)
    client = Client(nb, slow=slow, timeout=timeout, resources=where, **how)
    began = time.perf_counter()
    try:
        client.execute()
    finally:
        for cell in nb.cells:
            if cell.cell_type == "code":
                proof = re.search(r"^#\| test", cell.source, re.MULTILINE) is not None
                drop = _warned if proof else _kernels
                cell.outputs = [out for out in cell.outputs if not (_bar(out) or drop(out))]
                cell.execution_count = None
                cell.metadata = {}
                for out in cell.outputs:
                    if "execution_count" in out:
                        out["execution_count"] = None
                    if "metadata" in out:
                        out["metadata"] = {}
        nb.metadata.pop("widgets", None)  # of an earlier run, which no output shows
        nbformat.write(nb, path)
    most = ", ".join(f"cell {i} {s:.1f} s" for s, i in sorted(client.seconds, reverse=True)[:3])
    print(f"{path}: {time.perf_counter() - began:.0f} s ({most})")


def _bar(out) -> bool:
    "Whether an output is a progress bar, which says nothing once it has run."
    data = out.get("data", {})
    shown = "application/vnd.jupyter.widget-view+json" in data
    return shown and re.search(r"\d+%\|", data.get("text/plain", "")) is not None


def _warned(out) -> bool:
    "Whether a proof was warned, as it often means to be, by a line with a path of this machine."
    return out.get("name") == "stderr"


def _kernels(out) -> bool:
    "Whether bitsandbytes complains that it has no kernels for this processor, which nothing uses."
    return out.get("name") == "stderr" and out["text"].startswith("Failed to load CPU gemm_4bit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument(
        "--slow", action="store_true", help="run the cells marked slow or long, too"
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    args = parser.parse_args()
    for path in args.paths:
        execute(path, args.slow, args.timeout)


if __name__ == "__main__":
    main()
