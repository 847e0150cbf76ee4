"""The command line of every script: flags for every setting, help, and mistakes that end in one line."""

import argparse
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn

from pydantic.fields import FieldInfo

from pipeline.errors import Stopped, UserError
from pipeline.output import ESCAPED, harden_output
from pipeline.setting_types import Section
from pipeline.settings import (
    DEFAULT_CONFIG,
    Settings,
    choices,
    fields,
    flatten,
    get,
    mistakes,
    nearest,
    not_read,
    plain_type,
    read_yaml,
    shown,
    validated,
)
from pipeline.yaml_files import parse_yaml

Checks = Callable[[Settings, argparse.Namespace], list[str]]


class Parser(argparse.ArgumentParser):
    """argparse's parser. Its mistakes are UserErrors, in the words of the one who typed them."""

    def __init__(self, docstring: str | None, sections: tuple[str, ...] = ()) -> None:
        super().__init__(
            description=(docstring or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.sections = sections

    def format_usage(self) -> str:
        """One line with the positional arguments."""
        self._describe_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """Usage, the docstring, and the options."""
        self._describe_usage()
        return super().format_help()

    def _describe_usage(self) -> None:
        given = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join([f"python {self.prog}", *given, "[options]"])

    def error(self, message: str) -> NoReturn:
        """Raise UserError for one of argparse's messages."""
        text = " ".join(message.split())
        if found := re.match(r"unrecognized arguments: (\S+)", text):
            name = found[1].lstrip("-").split("=")[0]
            if found[1].startswith("--"):
                raise UserError(f"no setting is called {name}{nearest(name) if self.sections else '; see --help'}")
            raise UserError(f"{found[1]} is one argument too many; see --help")
        kinds = {"invalid float value": "a number", "invalid int value": "a whole number"}
        for said, wanted in kinds.items():
            text = re.sub(rf"^argument (.*): {said}: (.*)$", rf"\1 is \2 and must be {wanted}", text)
        text = re.sub(
            r"^argument (.*): invalid choice: (.*) \(choose from (.*)\)$", r"\1 is \2 and must be one of \3", text
        )
        text = re.sub(r"^argument (.*): expected (one|at least one) argument$", r"\1 needs a value", text)
        text = re.sub(r"^the following arguments are required: (.*)$", r"\1 must be given; see --help", text)
        raise UserError(text)


EVERYWHERE = ("",)


def make_parser(docstring: str | None, *sections: str) -> Parser:
    """A command line with `--config` and a flag for every setting. Scripts add their own arguments.

    `docstring` is the script's: `--help` shows it as it is, and then the settings of `sections`, those that the script
    reads. `--help-all` shows all.
    """
    parser = Parser(docstring, sections or EVERYWHERE)
    parser.add_argument("--config", metavar="FILE.yaml", help=f"settings (default: configs/{DEFAULT_CONFIG.name})")
    parser.add_argument("--help-all", action="help", help="show all settings, not only those that this script reads")
    return parser


def _add_settings(parser: Parser, in_force: Settings, show_all: bool) -> None:
    """A flag for every setting, grouped by section; the help shows the values `in_force` as defaults."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field, _ in fields():
        top, dot, _ = name.partition(".")
        key = top if dot else ""
        if key not in groups:
            title = f"{key}: {_first_line(type(get(in_force, key)))}" if key else "settings of every script"
            groups[key] = parser.add_argument_group(title)
        is_shown = show_all or parser.sections == EVERYWHERE or not key or key in parser.sections
        description = f"{field.description} (default: {shown(get(in_force, name))})".replace("%", "%%")
        groups[key].add_argument(
            f"--{name}",
            dest=name,
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=description if is_shown else argparse.SUPPRESS,
        )


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").split("\n\n")[0].strip()


def _metavar(field: FieldInfo) -> str:
    if names := choices(field):
        return "|".join(names)
    kind = plain_type(field)
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(kind, "[N,...]")


def _parsed(text: str, field: FieldInfo) -> Any:
    """The value of a flag: for settings that are texts as it is typed, else as YAML has it."""
    kind = plain_type(field)
    if kind is str or typing.get_origin(kind) is Literal:
        return None if text == "null" and NoneType in typing.get_args(field.annotation) else text
    try:
        return parse_yaml(text)
    except Exception:  # what is no YAML is no number either: the schema says so
        return text


def parse_settings(
    parser: Parser,
    argv: list[str] | None = None,
    base: Settings | None = None,
    also: Checks = lambda settings, arguments: [],
) -> tuple[Settings, Settings, argparse.Namespace]:
    """Settings of this call, settings before its flags, and all parsed arguments.

    The settings before the flags are those of the config file, or `base` where it is given, as for a trained run.
    `also` finds mistakes in the script's own arguments. On the command line itself (`argv` None) a flag that nothing
    reads is a mistake too; scripts that call scripts pass on flags that only some of them read.
    Raises UserError that lists every mistake at once.
    """
    is_own = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    named = peek(argv, "--config")
    if base is None and not named:
        named = [str(DEFAULT_CONFIG)]
    of_files: dict[str, Any] = flatten(base) if base else {}
    for path in named:
        of_files |= read_yaml(os.path.expanduser(path))
    in_force, _ = validated(of_files)
    _add_settings(parser, in_force, show_all="--help-all" in argv)
    arguments = parser.parse_args(argv)
    of_flags = {
        name: _parsed(getattr(arguments, name), field) for name, field, _ in fields() if hasattr(arguments, name)
    }
    settings, found = validated({**of_files, **of_flags})
    found += mistakes(settings)
    if is_own and not found:
        found = not_read(settings, of_flags)
    if found := found + also(settings, arguments):
        raise UserError("; ".join(found))
    return settings, base or in_force, arguments


def peek(argv: list[str], flag: str) -> list[str]:
    """The values given with `flag`, before the command line is parsed in earnest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="values", action="append", nargs="?", default=[])
    return [value for value in parser.parse_known_args(argv)[0].values if value]


def without(argv: list[str], flags: Mapping[str, int]) -> list[str]:
    """A command line without some flags and the number of values that follow each."""
    kept, skip = [], 0
    for word in argv:
        name, equals, _ = word.partition("=")
        if name in flags:
            skip = flags[name] - 1 if equals else flags[name]
        elif skip:
            skip -= 1
        else:
            kept.append(word)
    return kept


def say_next(*words: str | Path) -> None:
    """Print the command to run next, the same way in every script."""
    print("next:", shlex.join(map(str, words)))


def run_script(main: Callable[[], object], then: str | None = None) -> None:
    """Run a script's `main`; a user's mistake ends in one line on stderr and exit code 2.

    `then` is the script, perhaps with arguments, to run next with the settings of this call.
    """
    harden_output()
    try:
        main()
        if then:
            say_next("python", *then.split(), *sys.argv[1:])
    except UserError as error:
        _end(2, " ".join(str(error).split()))
    except Stopped as stopped:
        _end(128 + stopped.signal, str(stopped))
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            _end(2, "a process that decodes images was killed, perhaps for want of memory; lower training.workers")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split("\n\n")[0].split())[:300]
            _end(
                2, f"torch.compile failed ({reason}); install a C++ compiler such as g++, or leave out training.compile"
            )
        raise
    except KeyboardInterrupt:
        _end(130, "interrupted")


def _end(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message.translate(ESCAPED)}\n")
    sys.exit(code)
