"""Token ids by token, of a tokenizer's files: vocab.json, tokenizer.json and the tokens added to either."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckl_jax.errors import is_integer, require
from ckl_jax.runtime import reading
from ckl_jax.tasks import alphabet

VOCABULARIES = ("vocab.json", "tokenizer.json")
ADDED = ("added_tokens.json", "tokenizer_config.json")
BYTE_LEVEL = {"\n": "Ċ", " ": "Ġ"}
"""Names of our characters in GPT-2's byte-level vocabulary, where they differ."""


def rows(place: pathlib.Path, size: int) -> np.ndarray:
    """Token ids in our order: those of our characters first, then all others of ``0..size-1``: [size].

    Args:
      place: a directory with a tokenizer's files, or a JSON file of ids by token (``stoi`` of nanoGPT's meta.pkl).

    Raises:
      ConfigError: there is none, or a file is no such file; one of our characters is missing, has an id that is none of
        a token, or two.
    """
    ids = _ids(place)
    missing = [character for character in alphabet.VOCABULARY if character not in ids]
    require(not missing, "source", f"a vocabulary without {missing}", f"one that has all of {alphabet.VOCABULARY!r}")
    ours = [ids[character] for character in alphabet.VOCABULARY]
    whole = all(is_integer(row) and 0 <= row < size for row in ours) and len(set(ours)) == len(ours)
    require(whole, "source", f"token ids {ours}", f"different ones of 0..{size - 1}")
    return np.array(ours + sorted(set(range(size)) - set(ours)))


def _ids(place: pathlib.Path) -> dict[str, Any]:
    paths = [place] if place.is_file() else [place / name for name in VOCABULARIES if (place / name).is_file()]
    allowed = (
        f"{' or '.join(VOCABULARIES)} there, or --tokenizer with a directory or a name on the hub that has one, or "
        "with a JSON file of ids by token (of nanoGPT's meta.pkl, which is not unpickled, the object stoi as JSON)"
    )
    require(bool(paths), "source", f"no vocabulary in {place}", allowed)
    plain: dict[str, Any] = {}
    added: dict[str, Any] = {}
    for path in paths:
        whole = reading.read_object(path, "source")
        if path.name == "tokenizer.json":
            ids = _vocabulary(whole, path)
            _join(added, _listed(whole.get("added_tokens")), path)
        else:
            stoi = whole.get("stoi")
            ids = stoi if isinstance(stoi, dict) else whole
        _join(plain, ids if path == paths[0] else {token: ids[token] for token in ids if token in plain}, path)
    for path in (place / name for name in ADDED if (place / name).is_file()):
        whole = reading.read_object(path, "source")
        if path.name == "tokenizer_config.json":
            decoder = whole.get("added_tokens_decoder")
            pairs = decoder.items() if isinstance(decoder, dict) else ()
            whole = _listed([{**token, "id": _integer(row)} for row, token in pairs if isinstance(token, dict)])
        _join(added, whole, path)
    for character, name in BYTE_LEVEL.items():
        if name in plain and character not in added:
            same = plain.setdefault(character, plain[name]) == plain[name]
            require(same, "source", f"tokens {character!r} and {name!r}", "one of them, or both with the same id")
    _join(plain, added, place)
    return plain


def _vocabulary(whole: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    require(isinstance(vocabulary, dict), str(path), sorted(whole), "an object with model.vocab, ids by token")
    return vocabulary or {}


def _listed(tokens: Any) -> dict[str, Any]:
    listed = tokens if isinstance(tokens, list) else []
    return {str(token.get("content")): token.get("id") for token in listed if isinstance(token, dict)}


def _integer(text: str) -> Any:
    return int(text) if text.isdecimal() and len(text) < 10 else text


def _join(ids: dict[str, Any], more: Mapping[str, Any], path: pathlib.Path) -> None:
    """Adds ids; raises a ConfigError where a file says another id of one of our characters than those before it."""
    for token in (*alphabet.VOCABULARY, *BYTE_LEVEL.values()):
        if token in ids and token in more:
            others = f"{repr(ids[token])[:40]}, as in the other files there"
            require(ids[token] == more[token], "source", f"{path} with {more[token]} for {token!r}", others)
    ids.update(more)
