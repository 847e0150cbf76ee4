"""The home folder of whoever runs a script, which a container or batch system may not have, and paths that name it."""

import getpass
import os
import re

NONE = "/nonexistent"
"""HOME where there is none, as Debian has it. No home is made there."""


def demand_home() -> None:
    """Set HOME and USER where they cannot be found out: gensim, nltk and torch's compiler fail without them."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = NONE
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def expanded(path: str) -> str:
    """A path with `~` and `$VARIABLE` replaced. Raises ValueError where they stand for nothing.

    A folder would be made under their names otherwise. A path that exists as it is written may hold any name.
    """
    if os.path.lexists(path):
        return path
    found = os.path.expandvars(path)
    if unknown := re.search(r"\$(\w+|\{\w+\})", found):
        raise ValueError(f"a path without {unknown[0]}, of which the environment knows nothing")
    found = os.path.expanduser(found)
    if found.startswith("~") or (path.startswith("~") and found.startswith(NONE)):
        raise ValueError(f"a path without {path.split('/')[0]}, which is no home folder here; ./~ is the folder ~")
    return found
