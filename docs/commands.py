"""docs/commands.md: every command with all its flags, as `--help-all` prints them.

python docs/commands.py            # writes docs/commands.md
python docs/commands.py --check    # exit status 1 where it is not what the commands print
"""

from __future__ import annotations

import sys
from pathlib import Path

from rhc.cli.flags import page
from rhc.cli.main import COMMANDS

PAGE = Path(__file__).parent / "commands.md"


def text() -> str:
    """The page."""
    parts = [
        "# Commands and flags",
        "`rhc --help` lists the commands, `rhc COMMAND --help` shows one screen of the usual "
        "flags, `rhc COMMAND --help-all` what is printed here. Every flag of `rhc train` is a "
        "setting of a `--config` file too, with underscores.",
    ]
    for name, (flags, _) in COMMANDS.items():
        parts += [f"## rhc {name}", f"```text\n{page(name, flags, whole=True)}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(text(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text():
        print("docs/commands.md is old: python docs/commands.py writes it anew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
