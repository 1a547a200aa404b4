"""The logo, drawn by code: a picture of four shapes, and the four stages of an answer.

python tools/logo.py        writes nbs/logo.svg (the favicon, too) and nbs/images/scene.png
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("#8ecae6", "#ffb703", "#adb5bd", "#52b788")  # summary, caption, reasoning, conclusion
SCENE = 10  # the seed of the scene on the front page


def logo() -> str:
    "The logo as SVG, 64 units wide and high; legible at 16 pixels."
    bars = [
        f'<rect x="{6 + 5 * i}" y="{34 + 7 * i}" width="{52 - 5 * i}" height="5" rx="2.5"'
        f' fill="{colour}"/>'
        for i, colour in enumerate(STAGES)
    ]
    shapes = [
        '<circle cx="15" cy="18" r="9" fill="#d62839"/>',
        '<rect x="27" y="10" width="16" height="16" fill="#2a6fdb"/>',
        '<path d="M54 8 L62 26 L46 26 Z" fill="#f2c14e"/>',
    ]
    body = "\n".join(shapes + bars)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">\n{body}\n</svg>\n'


def main() -> None:
    os.chdir(ROOT)
    from llava_cot.scenes import draw, sample_scene

    Path("nbs/logo.svg").write_text(logo(), encoding="utf-8")
    Path("nbs/images").mkdir(exist_ok=True)
    draw(sample_scene(SCENE, "easy"), 192, seed=1).save("nbs/images/scene.png")
    print("nbs/logo.svg, nbs/images/scene.png")


if __name__ == "__main__":
    sys.exit(main())
