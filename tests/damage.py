"""Ways in which a file can be damaged, all of them on every file below a directory."""

import contextlib
import pathlib
import shutil

SWAPPED = (b"[]", b"{}", b"7", b"null", b'"text"', b'{"config": {}, "step": 1e999, "0": ' + b"9" * 5_000 + b"}")


def _bytes(content):
    return lambda path: path.write_bytes(content)


def _directory(path):
    path.unlink()
    path.mkdir()


def _dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def ways(path):
    """Name -> what damages a file: cut, emptied, deleted, replaced by other content or by what is no file."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0x40]) + whole[middle + 1 :] if whole else b"\x00"
    contents = {
        "empty": b"",
        "half": whole[:middle],
        "one byte less": whole[:-1],
        "one bit": flipped,
        "no text": b"\xff\xfe" + whole,
        "longer": whole + b"9" * 5_000,
        **{f"other JSON {content[:12]!r}": content for content in SWAPPED},
    }
    others = {"deleted": pathlib.Path.unlink, "a directory": _directory, "a dangling link": _dangling}
    found = {name: _bytes(content) for name, content in contents.items() if content != whole}
    return found | others


@contextlib.contextmanager
def as_before(path):
    """Puts a file back after the block."""
    whole = path.read_bytes()
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def each(directory):
    """(path, name of a way), with the file damaged in that way while the loop's body runs, for every file and way."""
    for path in sorted(found for found in directory.rglob("*") if found.is_file() and found.stat().st_size < 2**20):
        for name, damage in ways(path).items():
            with as_before(path):
                damage(path)
                yield path, name
