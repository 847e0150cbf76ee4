"""The command line of every script: flags for every setting, and one-line errors."""

import argparse
import copy
import functools
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from pipeline.errors import UserError
from pipeline.settings import (
    DEFAULT_CONFIG,
    Settings,
    _in_words,
    _leaves,
    _nearest,
    _set,
    _settings_parser,
    flatten,
    get,
    load_settings,
    mistakes,
    not_read,
    read_yaml,
    setting_types,
    to_settings,
)


class Stopped(Exception):
    """A signal asked the script to stop, and it did so in good order. Its message is one line, as UserError's."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class _Parser(ArgumentParser):
    """jsonargparse's parser, whose mistakes are UserErrors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        if "unrecognized arguments:" in text:
            word = text.split("unrecognized arguments:", 1)[1].split()[0]
            name = word.lstrip("-").split("=")[0]
            text = f"no setting is called {name}" if word.startswith("--") else f"{word} is one argument too many"
            text += _nearest(name, flatten(Settings())) if word.startswith("--") else "; see --help"
        raise UserError(text)


def make_parser(description: str | None) -> ArgumentParser:
    """A command line with `--config` and one flag a setting; scripts add their own arguments to it.

    `description` is the script's docstring: its first paragraph is shown by `--help`.
    """
    parser = _Parser(description=(description or "").strip(), usage="%(prog)s [options]", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with settings (default: configs/openclipart.yaml)")
    parser.add_class_arguments(Settings, None)
    return parser


def parse_settings(
    parser: ArgumentParser,
    argv: list[str] | None = None,
    base: Settings | None = None,
    also: Callable[[Settings, Any], list[str]] = lambda settings, arguments: [],
) -> tuple[Settings, Settings, Any]:
    """Settings of this call, settings before its flags, and all parsed arguments.

    What stands before the flags is the config file, or `base` where it is given, as for what belongs to a trained run.
    `also` finds what is wrong with the script's own arguments. A flag on the command line itself (`argv` None) that
    nothing reads under these settings is a mistake too; scripts that call scripts pass on flags that only some read.
    Raises UserError that lists every mistake at once.
    """
    is_own = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    named = peek(argv, "--config")
    if base is not None:
        parser.set_defaults(flatten(base))
    elif not named:
        named = [str(DEFAULT_CONFIG)]
        argv = ["--config", named[0], *argv]
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    trees = [read_yaml(path) for path in named]
    flags = _flags(argv)
    try:
        arguments = parser.parse_args(argv)
    except UserError as error:
        raise UserError("; ".join(_wrong_types(trees, flags, base)) or str(error)) from None
    settings = to_settings(arguments)
    found = mistakes(settings)
    if is_own and not found:
        found = not_read(settings, {name for name, _ in flags})
    if found := found + also(settings, arguments):
        raise UserError("; ".join(found))
    return settings, base or load_settings(*trees), arguments


def _flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """The settings that a command line names, each with its words there: the flag and the value that follows."""
    known, found = flatten(Settings()), []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, _ = word.partition("=")
        if flag.startswith("--") and (name := flag[2:].removesuffix("+")) in known:
            found.append((name, [word] if equals else [word, following]))
    return found


def _wrong_types(trees: list[dict[str, Any]], flags: list[tuple[str, list[str]]], base: Settings | None) -> list[str]:
    """Every value of the wrong type in files and flags, and what else is wrong with those that are of the right one.

    Empty where all types are right: then the mistake is another.
    """
    parser = _settings_parser()
    kinds, found = setting_types(), []
    values = to_settings(parser.get_defaults()) if base is None else copy.deepcopy(base)
    leaves = {name: value for tree in trees for name, value in _leaves(tree).items()}
    for name, value, read in (
        *((name, value, functools.partial(parser.parse_object, {name: value})) for name, value in leaves.items()),
        *((name, words[-1], functools.partial(parser.parse_args, words)) for name, words in flags),
    ):
        try:
            _set(values, name, get(to_settings(read()), name))
        except UserError:
            found.append(f"{name} is {value!r:.60} and must be {_in_words(kinds[name])}")
    return [*found, *mistakes(values)] if found else []


def peek(argv: list[str], flag: str) -> list[str]:
    """The values given with `flag`, before the command line is parsed in earnest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="values", action="append", nargs="?", default=[])
    return [value for value in parser.parse_known_args(argv)[0].values if value]


def without(argv: list[str], flags: Mapping[str, int]) -> list[str]:
    """A command line without some flags and the values that follow each."""
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


def run_script(main: Callable[[], None], then: str | None = None) -> None:
    """Run a script's `main`; a user's mistake ends in one line on stderr and exit code 2.

    `then` is the script, perhaps with arguments, to run next with the settings of this call.
    """
    try:
        main()
        if then:
            say_next("python", *then.split(), *sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except Stopped as stopped:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {stopped}\n")
        sys.exit(128 + stopped.signal)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            told = "a process that decodes images was killed, as happens where memory runs out; lower training.workers"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split("\n\n")[0].split())[:300]
            told = f"torch.compile failed ({reason}); install a C++ compiler such as g++, or leave out training.compile"
        else:
            raise
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {told}\n")
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has had enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        sys.exit(130)
