"""Vocabularies in every file that a tokenizer or nanoGPT's data has, and files that contradict each other."""

import json
import pickle
import re

import numpy as np
import pytest
from foreign_models import THEIRS, write_nano
from hostile import CANARY, PICKLE

from ckl_jax.checkpoint.gpt2 import load_foreign
from ckl_jax.checkpoint.store import fingerprint
from ckl_jax.checkpoint.token_files import rows
from ckl_jax.errors import ConfigError
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION

SIZE = len(THEIRS) + 7
PLAIN = {character: row for row, character in enumerate(THEIRS)}
BYTES = {{"\n": "Ċ", " ": "Ġ"}.get(character, character): row for character, row in PLAIN.items()}
EXPECTED = [PLAIN[character] for character in alphabet.VOCABULARY] + list(range(len(THEIRS), SIZE))


def without(ids, character="%"):
    return {name: row for name, row in ids.items() if name != character}


def added(row=PLAIN["%"], character="%"):
    return {"added_tokens_decoder": {str(row): {"content": character, "special": True}}}


def tokenizer(ids, added=()):
    return {"model": {"type": "BPE", "vocab": ids}, "added_tokens": list(added)}


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.json": PLAIN},
        {"vocab.json": BYTES},
        {"vocab.json": {"vocab_size": SIZE, "stoi": PLAIN, "itos": {str(row): c for c, row in PLAIN.items()}}},
        {"tokenizer.json": tokenizer(BYTES)},
        {"tokenizer.json": tokenizer(BYTES), "vocab.json": BYTES},
        {"tokenizer.json": tokenizer(without(BYTES), [{"id": PLAIN["%"], "content": "%"}])},
        {"vocab.json": without(BYTES), "added_tokens.json": {"%": PLAIN["%"]}},
        {"vocab.json": without(BYTES), "tokenizer_config.json": added()},
        {"vocab.json": BYTES, "tokenizer_config.json": added(SIZE - 1, "<pad>"), "added_tokens.json": {"<pad>": 47}},
        {"vocab.json": BYTES | {"12": 45, "ab": 46}},
    ],
)
def test_rows_are_ours_first_whatever_file_has_the_vocabulary(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    np.testing.assert_array_equal(rows(tmp_path, SIZE), EXPECTED)


SWAPPED = PLAIN | {"1": PLAIN["2"], "2": PLAIN["1"]}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab.json": PLAIN, "tokenizer.json": tokenizer(SWAPPED)}, r"tokenizer\.json with \d+ for ..?1"),
        ({"vocab.json": PLAIN, "added_tokens.json": {"1": 44}}, r"with 44 for ..?1"),
        ({"vocab.json": PLAIN, "tokenizer_config.json": added(44, "1")}, r"with 44 for ..?1"),
        ({"added_tokens.json": {"%": 44}, "tokenizer_config.json": added(), "vocab.json": without(PLAIN)}, "for ..?%"),
        ({"vocab.json": PLAIN | {"1": "a\nb" * 99}, "added_tokens.json": {"1": 44}}, r"with 44 .* 'a\\nba\\nb"),
        ({"vocab.json": PLAIN | {"Ġ": 44}}, r"got \"tokens ' ' and 'Ġ'\", allowed is one of them"),
        ({"vocab.json": PLAIN | {"Ċ": 44}}, r"and 'Ċ'\", allowed is one of them"),
        ({"vocab.json": without(PLAIN)}, r"a vocabulary without \['%'\]"),
        ({"vocab.json": PLAIN | {"1": "5"}}, r"token ids \["),
        ({"vocab.json": PLAIN | {"1": True}}, r"token ids \["),
        ({"vocab.json": PLAIN | {"1": -1}}, r"token ids \["),
        ({"vocab.json": PLAIN | {"1": SIZE}}, r"allowed is different ones of 0\.\.47"),
        ({"vocab.json": PLAIN | {"1": PLAIN["2"]}}, r"allowed is different ones of 0\.\.47"),
        ({"vocab.json": [1]}, r"vocab\.json with a list"),
        ({"tokenizer.json": {"model": {"vocab": [["a", 0.5]]}}}, r"tokenizer\.json: got \['model'\], allowed is an ob"),
    ],
)
def test_vocabularies_that_contradict_each_other_or_are_none_are_refused(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said) as caught:
        rows(tmp_path, SIZE)
    assert "\n" not in str(caught.value)


def test_nanogpts_meta_is_not_unpickled_and_its_stoi_as_json_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    write_nano(source)
    expected = fingerprint(load_foreign(source, ADDITION, 7).params)
    (source / "tokenizer.json").unlink()
    (source / "meta.pkl").write_bytes(PICKLE)
    with pytest.raises(ConfigError, match=r"no vocabulary in \S+', allowed is .* --tokenizer .* not unpickled, .*stoi"):
        load_foreign(source, ADDITION, 7)
    assert not (tmp_path / CANARY).exists()
    meta = pickle.loads(pickle.dumps({"vocab_size": SIZE, "stoi": PLAIN, "itos": {row: c for c, row in PLAIN.items()}}))
    for content in (meta["stoi"], meta):
        (tmp_path / "stoi.json").write_text(json.dumps(content))
        found = load_foreign(source, ADDITION, 7, tokenizer=tmp_path / "stoi.json")
        assert fingerprint(found.params) == expected
    (source / "vocab.json").write_text(json.dumps(meta["stoi"]))
    assert fingerprint(load_foreign(source, ADDITION, 7).params) == expected


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": NaN}', b'{"1": 1, "1": 2}', PICKLE, b"[" * 10**5])
def test_files_of_a_tokenizer_that_are_no_json_objects_are_refused(name, content, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(PLAIN))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^source: .*{re.escape(name)}"):
        rows(tmp_path, SIZE)
