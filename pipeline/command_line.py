"""The command line of every script: flags for every setting, help, and mistakes that end in one line."""

import argparse
import errno
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from pipeline.errors import FULL_DISK, Stopped, UserError
from pipeline.home import demand_home, expanded
from pipeline.output import harden_output, in_one_line
from pipeline.schema import Settings
from pipeline.settings import (
    DEFAULT_CONFIG,
    choices,
    fields,
    flatten,
    get,
    mistakes,
    not_read,
    parse_yaml,
    plain_type,
    read_yaml,
    shown,
    unknown,
    validated,
)

Checks = Callable[[Settings, argparse.Namespace], list[str]]


SAID = (
    (r"unrecognized arguments: (?!--)(\S+).*", r"\1 is one argument too many; see --help"),
    (r"unrecognized arguments: --([^\s=]+).*", r"no setting is called \1; see --help"),
    (r"argument (.*): invalid float value: (.*)", r"\1 is \2 and must be a number"),
    (r"argument (.*): invalid int value: (.*)", r"\1 is \2 and must be a whole number"),
    (r"argument (.*): invalid choice: (.*) \(choose from (.*)\)", r"\1 is \2 and must be one of \3"),
    (r"argument (.*): expected (one|at least one) argument", r"\1 needs a value"),
    (r"the following arguments are required: (.*)", r"\1 must be given; see --help"),
)
"""What argparse says, and how it is said to the one who typed it."""


def path_of(text: str) -> Path:
    """A path of the command line. A shell expands no `~` behind `--out=`."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise UserError(f"{text} must be {error}") from None


class Parser(argparse.ArgumentParser):
    """argparse's parser. Its mistakes are UserErrors, in the words of the one who typed them."""

    sections: tuple[str, ...] | None = None
    """The sections of the settings that --help shows; all where there are none; None where no setting is a flag."""

    def __init__(self, docstring: str | None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=(docstring or "").strip(), formatter_class=form, allow_abbrev=False)
        self.register("type", Path, path_of)

    def format_help(self) -> str:
        """Usage with the positional arguments, the docstring, and the options."""
        given = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.usage = " ".join([f"python {self.prog}", *given, "[options]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise UserError for one of argparse's messages."""
        text = " ".join(message.split())
        if self.sections is not None and (wrong := re.match(r"unrecognized arguments: --([^\s=]+)", text)):
            raise UserError(unknown(wrong[1]))
        for said, plain in SAID:
            text = re.sub(f"^{said}$", plain, text)
        raise UserError(text)


def make_parser(docstring: str | None, *sections: str) -> Parser:
    """A command line with `--config` and a flag for every setting. Scripts add their own arguments.

    `docstring` is the script's: `--help` shows it as it is, and then the settings of `sections`, those that the script
    reads. `--help-all` shows all.
    """
    parser = Parser(docstring)
    parser.sections = sections
    parser.add_argument("--config", metavar="FILE.yaml", help=f"settings (default: configs/{DEFAULT_CONFIG.name})")
    parser.add_argument("--help-all", action="help", help="show all settings, not only those that this script reads")
    return parser


def _add_settings(parser: Parser, in_force: Settings, show_all: bool) -> None:
    """A flag for every setting, grouped by section; the help shows the values `in_force` as defaults."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field, _ in fields():
        section = name.partition(".")[0] if "." in name else ""
        if section not in groups:
            doc = str(get(in_force, section).__doc__).strip(".") if section else ""
            groups[section] = parser.add_argument_group(f"{section}: {doc}" if section else "settings of every script")
        is_shown = show_all or not parser.sections or section in ("", *parser.sections)
        description = f"{field.description} (default: {shown(get(in_force, name))})".replace("%", "%%")
        groups[section].add_argument(
            f"--{name}",
            dest=name,
            metavar="|".join(choices(field)) or METAVARS.get(plain_type(field), "[N,...]"),
            default=argparse.SUPPRESS,
            help=description if is_shown else argparse.SUPPRESS,
        )


METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


def _parsed(text: str, field: FieldInfo) -> Any:
    """The value of a flag: for settings that are texts as it is typed, else as YAML has it."""
    if plain_type(field) is str or choices(field):
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
    is_own, argv = argv is None, sys.argv[1:] if argv is None else argv
    of_files = flatten(base) if base else {}
    for path in peek(argv, "--config") or ([] if base else [str(DEFAULT_CONFIG)]):
        of_files |= read_yaml(path_of(path))
    in_force, _ = validated(of_files)
    _add_settings(parser, in_force, show_all="--help-all" in argv)
    arguments = parser.parse_args(argv)
    given = vars(arguments)
    of_flags = {name: _parsed(given[name], field) for name, field, _ in fields() if name in given}
    settings, found = validated({**of_files, **of_flags})
    found += mistakes(settings)
    if is_own and not found:
        found = not_read(settings, of_flags)
    if found := found + also(settings, arguments):
        raise UserError("; ".join(found))
    return settings, base or in_force, arguments


def mistakes_in_name(settings: Settings, arguments: argparse.Namespace) -> list[str]:
    """What is wrong with --name, which names a folder."""
    if arguments.name is None or re.fullmatch(r"[^\W_][^/\\\0\n\r]{0,149}", arguments.name):
        return []
    return ["--name must begin with a letter or digit, and have at most 150 characters without / and \\"]


def peek(argv: list[str], flag: str) -> list[str]:
    """The values given with `flag`, before the command line is parsed in earnest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="values", action="append", nargs="?", default=[])
    return [value for value in parser.parse_known_args(argv)[0].values if value]


def without(argv: list[str], flags: Iterable[str]) -> list[str]:
    """A command line without some flags and the values that follow each."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, nargs="*")
    return parser.parse_known_args(argv)[1]


REFUSED_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""How a file system refuses a path. Whatever function of Python met it, the mistake is the path's."""


def say_next(*words: str | Path) -> None:
    """Print the command to run next, the same way in every script."""
    print("next:", shlex.join(map(str, words)))


def run_script(main: Callable[[], object], then: str | None = None) -> None:
    """Run a script's `main`; a user's mistake ends in one line on stderr and exit code 2.

    `then` is the script, perhaps with arguments, to run next with the settings of this call.
    """
    harden_output()
    demand_home()
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
    except OSError as error:
        if error.errno in FULL_DISK:
            _end(2, f"{error.strerror}; make room, and run the same command again")
        if error.filename is None or error.errno not in REFUSED_PATHS:
            raise
        _end(2, f"{error.strerror}: {os.fsdecode(error.filename)}; name another path, or mend this one")
    except KeyboardInterrupt:
        _end(130, "interrupted")


def _end(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"{in_one_line(f'{Path(sys.argv[0]).name}: {message}')}\n")
    sys.exit(code)
