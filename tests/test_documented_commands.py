"""The commands of README.md and of the documents: scripts, flags, values and settings are those of the program."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_documents import DOCUMENTS, code_of, exists

from pipeline import command_line
from pipeline.errors import UserError
from pipeline.schema import Settings
from pipeline.settings import fields, load_settings, not_read

PASSES_FLAGS_ON = ("reproduce_tables", "tune_loss_weights")
"""Scripts that take flags which only some of their trainings read."""
SETTINGS = {name: field for name, field, _ in fields()}
SECTIONS = tuple(Settings.model_fields)


class Parsed(Exception):
    """A script has read its command line. Its settings, where it has any."""


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command in a document, from the script on; a shell's variables are replaced."""
    for code in code_of(document.read_text(encoding="utf-8")):
        values: dict[str, str] = {}
        for line in code.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if assigned := re.fullmatch(r"([A-Z]+)=(\S+)", line):
                values[assigned[1]] = assigned[2]
            if re.match(r"(python|bash|torchrun) .*\.(py|sh)\b", line):
                line = re.sub(r"\$([A-Z]+)", lambda found, values=values: values.get(found[1], "RUN"), line)
                words = shlex.split(line, comments=True)
                first = next(place for place, word in enumerate(words) if word.endswith((".py", ".sh")))
                yield words[first:]


ALL = [(document, words) for document in DOCUMENTS for words in commands(document)]


def read_by_its_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script at the top read its command line, and no more. Raises UserError for what a user would be told."""
    parse, mistakes, validated = command_line.Parser.parse_args, command_line.mistakes, command_line.validated

    def parse_args(parser: command_line.Parser, *arguments: Any) -> Any:
        found = parse(parser, *arguments)
        if parser.sections is None:
            raise Parsed
        return found

    def all_mistakes(settings: Settings) -> list[str]:
        if found := mistakes(settings):
            raise UserError("; ".join(found))
        raise Parsed(settings)

    def valid(leaves: dict[str, Any]) -> tuple[Settings, list[str]]:
        settings, found = validated(leaves)
        if found:
            raise UserError("; ".join(found))
        return settings, found

    monkeypatch.setattr(command_line.Parser, "parse_args", parse_args)
    monkeypatch.setattr(command_line, "mistakes", all_mistakes)
    monkeypatch.setattr(command_line, "validated", valid)
    monkeypatch.setattr("training.runs.finished_run", lambda run, force: [load_settings({})])  # evaluate.py's
    monkeypatch.setattr(sys, "argv", words)
    name = words[0].removesuffix(".py")
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(name).main()
    if parsed.value.args and name not in PASSES_FLAGS_ON:
        flags = {word[2:] for word in words if word.startswith("--") and word[2:] in SETTINGS}
        if found := not_read(parsed.value.args[0], flags):
            raise UserError("; ".join(found))


@pytest.mark.parametrize(
    ("document", "words"), ALL, ids=[f"{document.name}: {' '.join(words)[:60]}" for document, words in ALL]
)
def test_a_command_of_a_document_is_one(document: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"{document.name} names {words[0]}"
    if script.parent == ROOT and script.suffix == ".py":
        monkeypatch.chdir(ROOT)
        read_by_its_script(words, monkeypatch)
    else:  # of scripts for developers and of bash: whether the flags stand in them
        flags = [word.strip("[]") for word in words if word.strip("[]").startswith("--")]
        source = script.read_text(encoding="utf-8")
        assert [flag for flag in flags if flag not in source and flag[2:] not in SETTINGS] == []


def test_commands_are_found() -> None:
    scripts = {words[0] for _, words in ALL}
    at_the_top = {path.name for path in ROOT.glob("*.py") if "run_script(main" in path.read_text(encoding="utf-8")}
    assert len(at_the_top) > 10 and at_the_top - scripts == set()


@pytest.mark.parametrize(
    "words",
    [
        "prepare_dataset.py --no 1",
        "prepare_dataset.py --dataset.min_characters 0",
        "train_cross_modal_retrieval_model.py 1 0.3 0.2 --loss.temperature 0.2",
        "train_cross_modal_retrieval_model.py 1 0.3",
        "search.py --run RUN --nowhere",
        "evaluate.py --run RUN --evaluation.expand -1",
        "reproduce_tables.py --config configs/web_news.yaml --seed five",
    ],
)
def test_a_wrong_command_is_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError):
        read_by_its_script(words.split(), monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_setting_of_a_document_is_one(document: Path) -> None:
    """In backticks: `training.batch_size`, and with a value, `loss.form hinge` or `deterministic: true`."""
    for code in code_of(document.read_text(encoding="utf-8")):
        found = re.fullmatch(rf"((?:{'|'.join(SECTIONS)})\.[\w.]*\w)(?::? ([^\s=].*))?", code)
        if found and Path(found[1]).suffix not in (".md", ".py", ".npy"):
            name, value = found.groups()
            assert exists(name), f"{document.name} names {code}"
            if value and name in SETTINGS and value.islower():
                wrong = command_line.validated({name: command_line._parsed(value, SETTINGS[name])})[1]
                assert wrong == [], f"{document.name} names {code}: {wrong}"
