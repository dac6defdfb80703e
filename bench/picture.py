"""A picture of the figures of run.py, for a page that is read in the light or in the dark.

picture.py [--scheme http] [--to docs/performance.svg]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lab import CACHE, ROOT

WIDTH, LABELS, BARS, GAP = 840, 170, 260, 75  # pixels; a value stands in the gap, right of its bar
LINE, THICK, HEAD = 20, 13, 62  # pixels
MARGIN = 16  # pixels
OURS = "ckpt-sidecar"
COLUMNS = {"cpu": "CPU seconds for each GiB (less is better)", "wall": "wall-clock seconds for each GiB"}
TITLES = {"up": "From the save to the bucket", "down": "From the bucket to the file"}
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.quiet { fill: #59636e; }
.ours { font-weight: 600; }
.label { text-anchor: end; }
.back { fill: #ffffff; }
.bar { fill: #8c959f; }
.bar.ours { fill: #0969da; }
.bar.floor { fill: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .quiet { fill: #9198a1; }
  .back { fill: #0d1117; }
  .bar { fill: #656c76; }
  .bar.ours { fill: #4493f8; }
  .bar.floor { fill: #30363d; }
}
"""


def kind_of(client: str) -> str:
    """How a client is drawn."""
    kinds = {OURS: "ours", "floor:": "floor"}
    return next((kind for word, kind in kinds.items() if client.startswith(word)), "peer")


def text(x: float, y: float, words: str, *, kind: str = "") -> str:
    """Words, with their left end there, or by their kind the right one."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def panel(result: dict[str, Any], top: float) -> Iterator[str]:
    """One way: a line for each client, the fastest first, with a bar for each figure."""
    rows: Sequence[dict[str, Any]] = result["rows"]
    gib = result["mib"] / 1024
    scheme = result["url"].partition(":")[0]
    rounds = "one round" if result["rounds"] == 1 else f"median of {result['rounds']} rounds"
    about = f"{gib:g} GiB by {scheme}, {rounds}"
    yield text(MARGIN, top + 24, TITLES[result["way"]], kind="title")
    yield f'<text x="{WIDTH - MARGIN}" y="{top + 24:g}" class="label quiet">{escape(about)}</text>'
    for n, (figure, title) in enumerate(COLUMNS.items()):
        left = LABELS + n * (BARS + GAP)
        most = max(row[figure] for row in rows) / gib
        yield text(left, top + 50, title, kind="quiet")
        for m, row in enumerate(rows):
            kind, y, value = kind_of(row["client"]), top + HEAD + m * LINE, max(0.0, row[figure] / gib)
            wide = max(1.0, BARS * value / most)
            if n == 0:
                yield text(LABELS - 8, y + THICK - 2, row["client"], kind=f"label {kind}")
            yield f'<rect x="{left}" y="{y:g}" width="{wide:.1f}" height="{THICK}" class="bar {kind}"/>'
            yield text(round(left + wide + 5, 1), y + THICK - 2, f"{value:.2f}", kind=kind)


def picture(results: Sequence[dict[str, Any]]) -> str:
    """The whole picture, one panel below the other."""
    drawn: list[str] = []
    top = 0.0
    for each in results:
        drawn += panel(each, top)
        top += HEAD + LINE * len(each["rows"]) + MARGIN
    size = f'width="{WIDTH}" height="{top:g}" viewBox="0 0 {WIDTH} {top:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="what">',
            '<title id="what">CPU and wall-clock seconds for each GiB, by client; less is better</title>',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{top:g}" class="back"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw what was measured last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", default="http")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "performance.svg")
    given = parser.parse_args()
    results = json.loads((CACHE / "transfers.json").read_text())["results"]
    of_scheme = [each for each in results if each["url"].startswith(f"{given.scheme}:")]
    if not of_scheme:
        raise SystemExit(f"nothing was measured by {given.scheme}")
    given.to.write_text(picture(of_scheme))


if __name__ == "__main__":
    main()
