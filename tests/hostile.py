"""What a refusal has to be: one line, before anything compiles, with every file as it was."""

import contextlib
import os
import pathlib
import pickle
import stat

import jax

CANARY = "unpickled"
_refusing: list[bool] = []


class CompiledError(BaseException):
    """Something was compiled although the input should have been refused: what was asked for is not to go on."""


def _stop_compilation(event, _, **__):
    if _refusing and "backend_compile" in event:
        raise CompiledError(event)


jax.monitoring.register_event_duration_secs_listener(_stop_compilation)


class Canary:
    """Whoever unpickles it makes a file of that name in the working directory."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(CANARY),)


PICKLE = pickle.dumps(Canary())


def snapshot(directory):
    """Every file below a directory with its content; links are not followed, pipes and devices not read."""
    found = {}
    for root, directories, files in os.walk(directory):
        for path in (pathlib.Path(root, name) for name in (*directories, *files)):
            mode = path.lstat().st_mode
            small = stat.S_ISREG(mode) and path.stat().st_size < 2**20
            content = path.read_bytes() if small else os.readlink(path) if stat.S_ISLNK(mode) else None
            found[str(path.relative_to(directory))] = (stat.S_IFMT(mode), path.lstat().st_size, content)
    return found


@contextlib.contextmanager
def refusal(directory):
    """Asserts that the block leaves a directory as it was, compiles nothing and unpickles nothing."""
    before = snapshot(directory)
    _refusing.append(True)
    try:
        yield
    finally:
        _refusing.pop()
    assert snapshot(directory) == before
    assert not pathlib.Path(CANARY).exists()
