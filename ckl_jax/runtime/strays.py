"""Files that no command here reads or writes: those of file managers, editors and file systems, and logs."""

from __future__ import annotations

import os
import pathlib
import re

_UNREAD = re.compile(
    r"\.(?!\.?$|z(array|attrs|group|metadata)$).*"  # Hidden; not the hidden files of Zarr, which Orbax could read.
    r"|.*~|#.*#|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|@eadir|__macosx|lost\+found|\$recycle\.bin"
    r"|system volume information",
    re.IGNORECASE,
)
_LOG = re.compile(
    r"(.*[._-])?(log|out|err|output|stdout|stderr|nohup|console|typescript|screenlog)(\.(\d+|txt|gz|bz2|xz|zst|old|bak))*"
    r"|.*\.(tmp|pid|[oe]\d+)",  # tmp: of a process that was killed before it wrote config.json.
    re.IGNORECASE,
)


def is_unread(name: str) -> bool:
    """Whether nothing reads a file or directory of that name."""
    return _UNREAD.fullmatch(name) is not None


def first_owned(directory: pathlib.Path) -> pathlib.Path | None:
    """A file in a directory that may be of another run or of value; None if there are only unread ones and logs."""
    for path in sorted(directory.iterdir()):
        if is_unread(path.name):
            continue
        if path.is_dir() and not os.path.islink(path):
            found = first_owned(path)
            if found is not None:
                return found
        elif not _LOG.fullmatch(path.name):
            return path
    return None
