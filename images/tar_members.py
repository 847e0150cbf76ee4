"""Images inside tar shards (WebDataset's format). They are read in place, and nothing is ever unpacked.

The path of such an image treats the shard as a folder and ends with the place of its bytes:
SHARD.tar/MEMBER@FIRST+SIZE, for example `train/00012.tar/000120345.jpg@1536+20480`. One seek finds it: no process
needs a list of all members.
"""

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PATH = re.compile(r"(?P<shard>.+\.tar)/(?P<name>.+)@(?P<first>\d+)\+(?P<size>\d+)", re.DOTALL)
_BLOCK = tarfile.BLOCKSIZE  # a member's header is the block in front of its bytes


class Member(NamedTuple):
    """A file in a shard: its name, the place of its first byte, and its size in bytes."""

    shard: Path
    name: str
    first: int
    size: int

    def path(self, relative_to: Path) -> str:
        """Its path below a folder, in the form that `find_member` reads. A member `./NAME` is NAME."""
        name = self.name if leads_out(self.name) else posixpath.normpath(self.name)
        return f"{self.shard.relative_to(relative_to).as_posix()}/{name}@{self.first}+{self.size}"


def find_member(path: Path | str) -> Member | None:
    """The member that a path names. None where the path is that of a file."""
    found = _PATH.fullmatch(str(path)) if "@" in str(path) else None
    if found is None or not os.path.isfile(found["shard"]):
        return None
    return Member(Path(found["shard"]), found["name"], int(found["first"]), int(found["size"]))


def without_place(path: str) -> str:
    """A member's path without the place of its bytes. It stays the same when the shard is written anew."""
    found = _PATH.fullmatch(path)
    return f"{found['shard']}/{found['name']}" if found else path


def file_of(path: Path) -> Path:
    """The file that holds an image: the shard, or the image's own file."""
    member = find_member(path)
    return member.shard if member else path


def leads_out(name: str) -> bool:
    """Whether a member's name is absolute or has `..`: such a member is hostile."""
    return name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name


def open_member(member: Member) -> io.BytesIO:
    """The bytes of a member. Raises ValueError where they are not, or no longer, where the path says."""
    if leads_out(member.name):
        raise ValueError(f"the name {member.name} leads out of the shard")
    with member.shard.open("rb") as file:
        file.seek(max(member.first - _BLOCK, 0))
        try:
            header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = tarfile.TarInfo()
        if member.first < _BLOCK or header.size != member.size or not _is_same_name(header.name, member.name):
            raise ValueError(f"{member.shard.name} has changed since it was prepared; run prepare_dataset.py again")
        if member.first + member.size > os.fstat(file.fileno()).st_size:  # compared before memory is asked for
            raise ValueError(f"{member.shard.name} ends within it")
        return io.BytesIO(file.read(member.size))


def _is_same_name(in_header: str, name: str) -> bool:
    """Whether a header is that of the member `name`. Headers cut long names, and respell those that are not ASCII."""
    return bool(in_header) and (posixpath.normpath(in_header) in name or not name.isascii())


def members(shard: Path) -> Iterator[Member]:
    """The files in a shard, in order. They end where the shard is cut off or damaged."""
    place = -1
    try:
        with tarfile.open(shard, "r:") as archive:
            while (found := archive.next()) is not None and found.offset > place:  # a negative size leads back
                place = found.offset
                vars(archive)["members"].clear()  # else the archive keeps them all
                if found.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and found.size >= 0:
                    yield Member(shard, found.name, found.offset_data, found.size)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError):
        return  # tarfile trusts the numbers in a header
