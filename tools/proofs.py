"""How cells appear on the site; nbdev calls this for each cell, as `procs` in settings.ini says.

A proof (`#| test parse undoes render`) is folded under its claim, as "Proof: parse undoes render";
so are the imports and the helpers of proofs.
"""

import re


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
