"""Images that lie inside tar shards (WebDataset's format), read where they lie.

Such an image has a path as if the shard were a folder, and where in the shard its bytes are,
SHARD.tar/MEMBER@FIRST+SIZE, for example `train/00012.tar/000120345.jpg@1536+20480`. So one seek finds it, and no
process needs a list of what all shards hold. Nothing is ever unpacked.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PATH = re.compile(r"(?P<shard>.+\.tar)/(?P<name>.+)@(?P<first>\d+)\+(?P<size>\d+)", re.DOTALL)
_BLOCK = 512  # the unit of a tar file: a member's header is the block in front of its bytes


class Member(NamedTuple):
    """A file in a shard: its name, the place of its first byte, and its size in bytes."""

    shard: Path
    name: str
    first: int
    size: int

    def path(self, relative_to: Path) -> str:
        """Its path below a folder, in the form that `find_member` reads."""
        return f"{self.shard.relative_to(relative_to).as_posix()}/{self.name}@{self.first}+{self.size}"


def find_member(path: Path | str) -> Member | None:
    """The member that a path names; None where it is the path of a file of its own."""
    found = _PATH.fullmatch(str(path)) if "@" in str(path) else None
    if found is None or not os.path.isfile(found["shard"]):
        return None
    return Member(Path(found["shard"]), found["name"], int(found["first"]), int(found["size"]))


def without_place(path: str) -> str:
    """A member's path without the place of its bytes: the same in a shard that was written anew."""
    found = _PATH.fullmatch(path)
    return f"{found['shard']}/{found['name']}" if found else path


def file_of(path: Path) -> Path:
    """The file that holds an image: the shard, or the image's own file."""
    member = find_member(path)
    return member.shard if member else path


def leads_out(name: str) -> bool:
    """Whether a member's name is absolute or has `..`: an archive with such a member is not what it says it is."""
    return name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name


def open_member(member: Member) -> io.BytesIO:
    """The bytes of a member; raises ValueError where they are not (any more) where the path says."""
    if leads_out(member.name):
        raise ValueError(f"the name {member.name} leads out of the shard")
    with member.shard.open("rb") as file:
        file.seek(max(member.first - _BLOCK, 0))
        header = file.read(_BLOCK)
        stem = header[:100].rstrip(b"\0").decode(errors="replace")
        same_name = stem in member.name or not member.name.isascii()  # which a header of 100 bytes may spell otherwise
        is_header = member.first >= _BLOCK and header[257:262] == b"ustar" and stem and same_name
        if not is_header or int(header[124:135].strip(b" \0") or b"0", 8) != member.size:
            raise ValueError(f"{member.shard.name} has changed since it was prepared; run prepare_dataset.py again")
        if member.first + member.size > os.fstat(file.fileno()).st_size:  # looked at before memory is asked for
            raise ValueError(f"{member.shard.name} ends within it")
        return io.BytesIO(file.read(member.size))


def members(shard: Path) -> Iterator[Member]:
    """The files in a shard, in order. Where the shard is cut short or damaged they end there."""
    place = -1
    try:
        with tarfile.open(shard, "r:") as archive:
            while (found := archive.next()) is not None and found.offset > place:  # a size below 0 would lead back
                place = found.offset
                archive.members.clear()  # the archive would hold them all
                if found.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and found.size >= 0:
                    yield Member(shard, found.name, found.offset_data, found.size)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError):
        return  # tarfile takes what a header says at its word
