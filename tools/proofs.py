"""How cells appear on the site; nbdev calls this for each cell, as `procs` in settings.ini says.

A proof (`#| test parse undoes render`) is folded under its claim, as "Proof: parse undoes render";
so are the imports and the helpers of proofs.
"""

import re

from nbdev import processors

_def_names = processors._def_names
# nbdev documents the functions of a cell in reverse; this turns them round
processors._def_names = lambda cell, shown: _def_names(cell, shown)[::-1]


def fold_proofs(cell) -> None:
    "Fold a cell that is a proof, or that only helps proofs."
    if cell.cell_type != "code" or "source" not in cell:
        return
    words = cell.directives_.get("test")
    if words is not None:
        summary = f"Proof: {' '.join(words).replace('_', ' ')}"
    elif "testmod" in cell.directives_:
        imports = re.match(r"\s*(import|from)\b", cell.source)
        summary = "Imports of the proofs" if imports else "Helpers of the proofs"
    else:
        return
    cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell.source}'
