"""Flags of a command from its settings: one parser reads them, formats help and completes them."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from rhc.errors import InputError
from rhc.settings.fields import Known, Settings

Config = TypeVar("Config", bound=Settings)


def parsed(
    name: str,
    flags: type[Config],
    words: Sequence[str],
    usual: Config | None,
    further: Callable[[str, Sequence[str]], bool] = lambda flag, words: False,
) -> Config:
    """The command's settings: those of `usual` where no flag says otherwise. further: whether a
    flag that the command does not know, of these words, is an option of RUN."""
    parser = _parser(name, flags)
    known = parser.options()
    flat: list[str] = []
    options: list[str] = []
    follows = False
    for word in words:
        if follows:
            options[-1] += word
            follows = False
            continue
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag.replace("_", "-") not in known:
            # A slip of the finger is told at once: to ask RUN imports torch.
            slip = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
            if not slip and further(flag, words):
                options.append(f"{flag[2:].replace('-', '_')}={value}")
                follows = not equals
                continue
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ";"
            raise InputError(f"unknown flag {flag}{hint} see rhc {name} --help")
        flat.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else word)
    given = vars(parser.parse_intermixed_args(flat))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if options:
        before = given.get("options", None if usual is None else vars(usual)["options"])
        given["options"] = (*(before or ()), *options)
    return flags(**{**({} if usual is None else vars(usual)), **given})


def page(name: str, flags: type[Settings], *, whole: bool) -> str:
    """The help of a command; whole: with all flags, sentences and examples."""
    text = _parser(name, flags, whole=whole, helping=True).format_help().rstrip()
    if whole:
        return text
    # One screen: no empty lines between the headings.
    headings = "|".join(dict.fromkeys(each.heading for each in flags.known().values()))
    first, *further = re.split(rf"\n\n(?=(?:{headings}):\n)", text)
    return "\n\n".join([first, "\n".join(further)]) if further else first


def completion(shell: str, commands: Mapping[str, type[Settings]]) -> str:
    flags = {name: " ".join(_parser(name, known).options()) for name, known in commands.items()}
    if shell == "tcsh":
        every = " ".join(sorted({flag for line in flags.values() for flag in line.split()}))
        return f"complete rhc 'p@1@({' '.join(flags)})@' 'C@--@({every})@'"
    cases = "\n".join(f'    {name}) words="{line}" ;;' for name, line in flags.items())
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return begin + _BASH.format(names=" ".join(flags), cases=cases)


SHELLS = ("bash", "zsh", "tcsh")

_BASH = """\
_rhc() {{
  local words="{names}"
  if [ "$COMP_CWORD" -gt 1 ]; then case "${{COMP_WORDS[1]}}" in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _rhc rhc"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as an InputError of one clause."""

    def error(self, message: str) -> NoReturn:
        fault = message.removeprefix("argument ").replace(": ", " ", 1)
        fault = fault.replace("expected one argument", "needs a value")
        fault = re.sub(r"^the following arguments are required (.*)", r"\1 is missing", fault)
        raise InputError(f"{fault}; see {self.prog} --help")

    def options(self) -> list[str]:
        return list(self._option_string_actions)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags and values at the left, sentences from column 24 on."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=80)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return str(action.metavar)
        return f"{', '.join(action.option_strings)} {action.metavar}".strip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _parser(
    name: str, flags: type[Settings], *, whole: bool = True, helping: bool = False
) -> _Parser:
    known = [each for each in flags.known().values() if each.setting.place != "none"]
    left_out = [each for each in known if each.setting.place == "rare" and not whole]
    about, _, more = (inspect.getdoc(flags) or "").partition("\n\nmore examples:")
    foot = ""
    if not whole and (left_out or more or any(". " in each.text for each in known)):
        further = f"{len(left_out)} further flags" if left_out else "more about these"
        foot = f"[…]: the default; {further}: rhc {name} --help-all"
    positional = [each.setting.metavar for each in known if each.setting.place == "argument"]
    optional = ["[FLAGS]"] if len(positional) < len(known) else []
    parser = _Parser(
        f"rhc {name}",
        usage=" ".join(["rhc", name, *positional, *optional]),
        description=f"{about}\n\nmore examples:{more}" if whole and more else about,
        epilog=foot,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for each in known:
        if each in left_out:
            continue
        if each.heading not in groups:
            groups[each.heading] = parser.add_argument_group(each.heading)
        _add(groups[each.heading], each, _help(each, whole=whole) if helping else None)
    return parser


def _add(group: Any, each: Known, text: str | None) -> None:
    what = each.setting
    settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    names = [what.alias, each.flag] if what.alias else [each.flag]
    if each.kind is bool and what.metavar:  # a flag that may have a value
        group.add_argument(*names, nargs="?", const=True, metavar=what.metavar, **settings)
        no = {**settings, "help": argparse.SUPPRESS}
        group.add_argument(f"--no-{each.flag[2:]}", action="store_false", dest=each.name, **no)
        return
    if each.kind is bool:
        action = group.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
        action.metavar = f"--no-{each.flag[2:]}" if each.default else each.flag
        return
    element = each.element if each.kind is tuple else each.kind
    settings |= {"type": _reader(element, each), "metavar": what.metavar}
    if each.kind is tuple:
        settings["nargs"] = "+" if each.required else "*"
    elif what.place == "argument" and not each.required:
        settings["nargs"] = "?"
    if what.place == "argument":
        group.add_argument(each.name, **settings)
    else:
        group.add_argument(*names, dest=each.name, required=each.required, **settings)


def _reader(kind: Any, each: Known) -> Callable[[str], Any]:
    if each.setting.parse is not None and kind is int:
        return str

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {number}, got {text!r}") from None

    return read


def _help(each: Known, *, whole: bool) -> str:
    default = each.setting.unset
    if not default and each.kind is not bool and each.default not in (None, ()):
        default = "" if each.required else f"{each.default}"
    text = each.text if whole else each.text.partition(". ")[0].rstrip(".")
    if default:
        text += f" (default: {default})" if whole else f" [{default}]"
    return text.replace("%", "%%")
