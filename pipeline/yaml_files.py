"""YAML as people write it: 1e-3 is a number, and a key that stands twice in a mapping is a mistake."""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(f"{key.value} stands twice (again in line {key.start_mark.line + 1}); keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises UserError for a key that stands twice, and PyYAML's errors."""
    return _Loader(text).get_single_data()


def read_yaml_file(path: str | Path) -> Any:
    """The value of a YAML file. Raises UserError where there is none, or it is no YAML."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; name a file such as configs/openclipart.yaml"
        ) from None
    except UserError as error:
        raise UserError(f"the config {path}: {error}") from None
    except Exception as error:  # YAML's constructors raise anything: a date of the 99th month, a thousand brackets
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the config {path} is no valid YAML: {why}") from None
