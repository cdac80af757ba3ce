"""The picture of the house in CONTRIBUTING.md: rooms of rhc by floors, drawn from the imports.

python docs/house.py            # writes docs/figures/house.svg
python docs/house.py --check    # exit status 1 where it is not what the imports say
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "figures" / "house.svg"
LEFT_OUT = ("__init__", "__main__")  # the front door names everything, and imports it when used


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file of rhc imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms() -> dict[str, set[str]]:
    """Every file or folder of rhc, and those that it imports from."""
    files = [
        (path, path.relative_to(ROOT).with_suffix("").parts[1]) for path in ROOT.glob("rhc/**/*.py")
    ]
    names = {room for _, room in files} - {*LEFT_OUT}
    found: dict[str, set[str]] = {name: set() for name in names}
    for path, room in files:
        for name in imports(path) if room in names else ():
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "rhc" and other in names and other != room:
                found[room].add(other)
    return found


def floors(below: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, from the ground: each stands above all that it imports from."""
    placed: list[list[str]] = []
    left = dict(below)
    while left:
        free = sorted(room for room, needs in left.items() if not needs & left.keys())
        if not free:
            raise SystemExit(f"these import one another in a circle: {', '.join(sorted(left))}")
        placed.append(free)
        for room in free:
            del left[room]
    return placed


def reaches(room: str, below: dict[str, set[str]]) -> set[str]:
    """All that a room imports from, also through others."""
    return below[room].union(*(reaches(other, below) for other in below[room]))


def drawn() -> str:
    """The picture as SVG; an arrow that others imply is not drawn."""
    below = rooms()
    placed = floors(below)
    wide, high, gap, box = 960, 84, 40, 132
    middle: dict[str, tuple[float, float]] = {}
    for level, names in enumerate(reversed(placed)):
        for place, name in enumerate(names, start=1):
            middle[name] = wide * place / (len(names) + 1), gap + level * high
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high * len(placed)}" '
        'font-family="system-ui, sans-serif" font-size="15" text-anchor="middle">',
        f'<rect width="{wide}" height="{high * len(placed)}" rx="8" fill="#fbfaf7"/>',
    ]
    for room in sorted(below):
        x, y = middle[room]
        implied = set().union(*(reaches(other, below) for other in below[room]))
        for other in sorted(below[room] - implied):
            to, down = middle[other]
            half = (down - y) / 2
            parts.append(
                f'<path d="M{x:.0f} {y + 18:.0f}C{x:.0f} {y + half:.0f} {to:.0f} '
                f'{down - half:.0f} {to:.0f} {down - 18:.0f}" fill="none" stroke="#b3aa9c" '
                'stroke-width="1.5"/>'
            )
    for name, (x, y) in sorted(middle.items()):
        parts.append(
            f'<rect x="{x - box / 2:.0f}" y="{y - 18:.0f}" width="{box}" height="36" rx="5" '
            'fill="#fff" stroke="#4a6a8a"/>'
        )
        slash = "/" if (ROOT / "rhc" / name).is_dir() else ".py"
        parts.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" fill="#222">{name}{slash}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PICTURE.read_text(encoding="utf-8") != drawn())
    PICTURE.write_text(drawn(), encoding="utf-8")
