"""The dataset's texts, balance and splits, and the windows that pre-training reads from its stream."""

import collections
import dataclasses
import errno
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import each
from hostile import no_file_above, snapshot

from ckl_jax import tasks
from ckl_jax.datasets import Scratchpads, TokenStream, load_stream, sample_documents, sample_stream, scratchpads
from ckl_jax.errors import ConfigError
from ckl_jax.tasks import alphabet, catalog
from ckl_jax.tasks.columns import ADDITION, MULTIPLICATION
from ckl_jax.tasks.task import Problem

DIGITS, COUNT, WINDOW, BLOCK, BATCH = 2, 200, 150, 180, 64


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def examples(data_dir):
    builder = Scratchpads(max_digits=DIGITS, num_examples=COUNT, data_dir=str(data_dir))
    builder.download_and_prepare()
    return {split: list(builder.as_data_source(split=split)) for split in ("train", "test")}


@pytest.fixture(scope="module")
def stream(data_dir, examples):
    return load_stream(DIGITS, COUNT, data_dir=data_dir)


def _text(feature):
    return feature.decode() if isinstance(feature, bytes) else feature


def test_prompts_and_answers_are_the_ones_of_their_operands(examples):
    for example in examples["train"] + examples["test"]:
        a, b = int(example["a"]), int(example["b"])
        assert _text(example["prompt"]) == ADDITION.prompt_text(Problem(a, b))
        assert _text(example["answer"]) == ADDITION.answer_text(Problem(a, b))


def test_the_train_split_has_equally_many_problems_of_every_pair_of_lengths(examples):
    cells = collections.Counter((len(str(e["a"])), len(str(e["b"]))) for e in examples["train"])
    assert cells == {(m, n): COUNT // DIGITS**2 for m in (1, 2) for n in (1, 2)}


def test_no_problem_nor_its_mirror_image_is_in_both_splits(examples):
    pairs = {split: {tuple(sorted((int(e["a"]), int(e["b"])))) for e in examples[split]} for split in examples}
    assert len(examples["test"]) == COUNT // 20
    assert not pairs["train"] & pairs["test"]


def test_the_same_settings_give_the_same_stream_and_another_seed_another(stream, data_dir, tmp_path):
    chex.assert_trees_all_equal(stream, load_stream(DIGITS, COUNT, data_dir=data_dir))
    chex.assert_trees_all_equal(stream, load_stream(DIGITS, COUNT, data_dir=tmp_path))
    other = load_stream(DIGITS, COUNT, seed=1, data_dir=data_dir)
    assert alphabet.decode(other.tokens_N) != alphabet.decode(stream.tokens_N)


def test_the_stream_is_the_documents_back_to_back(stream, examples):
    texts = [_text(e["prompt"]) + _text(e["answer"]) for e in examples["train"]]
    assert alphabet.decode(stream.tokens_N) == "".join(texts)
    assert alphabet.decode(stream.tokens_N[: stream.starts_E[1]]) == texts[0]
    np.testing.assert_array_equal(np.diff(stream.starts_E), [len(text) for text in texts[:-1]])


def test_document_windows_start_with_a_document_and_predict_inside_documents_alone(stream):
    windows = jax.tree.map(np.asarray, sample_documents(stream, jax.random.key(0), BATCH, WINDOW, BLOCK))
    whole = alphabet.decode(stream.tokens_N)
    starts = set(stream.starts_E.tolist())
    for inputs, targets, segments, mask in zip(
        windows.inputs_BxT, windows.targets_BxT, windows.segments_BxT, windows.mask_BxT, strict=True
    ):
        text = alphabet.decode(inputs) + alphabet.decode(targets[-1:])
        place = next(i for i in stream.starts_E.tolist() if whole.startswith(text, i))
        assert alphabet.decode(targets) == text[1:]
        begins = [t for t in range(WINDOW) if place + t in starts]
        np.testing.assert_array_equal(np.flatnonzero(np.diff(segments)) + 1, begins[1:])
        ends = [t for t in range(WINDOW) if place + t + 1 in starts]
        np.testing.assert_array_equal(np.flatnonzero(~mask), ends)


def test_document_windows_lie_anywhere_in_the_block_and_never_beyond(stream):
    positions = np.asarray(sample_documents(stream, jax.random.key(0), 512, WINDOW, BLOCK).positions_BxT)
    assert (np.diff(positions, axis=1) == 1).all()
    assert set(positions[:, 0]) == set(range(BLOCK - WINDOW + 1))
    assert positions.max() == BLOCK - 1


def test_the_asked_share_of_document_windows_is_at_position_0(stream):
    firsts = sample_documents(stream, jax.random.key(0), 4000, WINDOW, BLOCK, 0.25).positions_BxT[:, 0]
    others = BLOCK - WINDOW + 1
    counts = np.bincount(firsts, minlength=others) / 4000
    np.testing.assert_allclose(counts[0], 0.25 + 0.75 / others, atol=0.02)
    np.testing.assert_allclose(counts[1:], 0.75 / others, atol=0.02)


def test_stream_windows_start_anywhere_and_attend_across_documents(stream):
    windows = jax.tree.map(np.asarray, sample_stream(stream, jax.random.key(0), BATCH, WINDOW))
    whole = alphabet.decode(stream.tokens_N)
    for inputs, targets in zip(windows.inputs_BxT, windows.targets_BxT, strict=True):
        text = alphabet.decode(inputs) + alphabet.decode(targets[-1:])
        assert text in whole
        assert alphabet.decode(targets) == text[1:]
    assert any(not alphabet.decode(inputs).startswith("Input") for inputs in windows.inputs_BxT)
    np.testing.assert_array_equal(windows.positions_BxT, np.tile(np.arange(WINDOW), (BATCH, 1)))
    assert (windows.segments_BxT == 0).all()
    assert windows.mask_BxT.all()


def test_every_window_of_the_stream_can_be_drawn_and_none_runs_over_its_end():
    stream = TokenStream(jnp.arange(20, dtype=jnp.uint8), jnp.arange(0, 20, 5))
    windows = sample_stream(stream, jax.random.key(0), 400, 16)
    assert set(np.asarray(windows.inputs_BxT[:, 0]).tolist()) == {0, 1, 2, 3}
    assert windows.targets_BxT.max() == 19
    windows = sample_documents(stream, jax.random.key(0), 400, 12, 12)
    assert set(np.asarray(windows.inputs_BxT[:, 0]).tolist()) == {0, 5}
    assert (windows.targets_BxT - windows.inputs_BxT == 1).all()


@pytest.mark.parametrize(
    "sample",
    [
        lambda stream, key: sample_stream(stream, key, BATCH, WINDOW),
        lambda stream, key: sample_documents(stream, key, BATCH, WINDOW, BLOCK),
    ],
    ids=["stream", "documents"],
)
def test_windows_are_a_pure_function_of_the_key(stream, sample):
    windows = sample(stream, jax.random.key(1))
    chex.assert_trees_all_equal(windows, jax.jit(sample)(stream, jax.random.key(1)))
    assert (windows.inputs_BxT != sample(stream, jax.random.key(2)).inputs_BxT).any()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_digits": 0, "num_examples": 10}, "max_digits"),
        ({"max_digits": tasks.MAX_DIGITS, "num_examples": 1000}, "max_digits"),
        ({"max_digits": 3, "num_examples": 8}, "num_examples"),
        ({"max_digits": 1, "num_examples": 8, "split": "validation"}, "split"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_is_written(arguments, field, tmp_path):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        load_stream(**arguments, data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stream_shorter_than_the_window_is_refused(stream):
    short = TokenStream(stream.tokens_N[:WINDOW], stream.starts_E[:1])
    with pytest.raises(ConfigError, match=r"^num_documents: "):
        sample_stream(short, jax.random.key(0), 1, WINDOW)
    with pytest.raises(ConfigError, match=r"^num_documents: "):
        sample_documents(short, jax.random.key(0), 1, WINDOW, BLOCK)


def test_another_tasks_dataset_is_one_of_its_own(data_dir):
    multiplied = load_stream(DIGITS, COUNT, data_dir=data_dir, task="multiplication")
    text = alphabet.decode(multiplied.tokens_N)
    operands = re.findall(r"Input:\n(\d+)T(\d)\nTarget:", text)
    drawn = [MULTIPLICATION.problem(int(a), int(b)) for a, b in operands]
    assert len(drawn) == COUNT == len(multiplied.starts_E)
    assert text == "".join(MULTIPLICATION.prompt_text(p) + MULTIPLICATION.answer_text(p) for p in drawn)
    lengths = collections.Counter(len(str(a)) for a, _ in operands)
    assert lengths == {1: COUNT // 2, 2: COUNT // 2}
    with pytest.raises(ConfigError, match=r"^task: got 'division'"):
        load_stream(DIGITS, COUNT, data_dir=data_dir, task="division")


REMAKE = r"allowed is what was prepared there: delete it, and the same command prepares it anew"


@pytest.fixture
def copied(stream, data_dir, tmp_path):
    """A copy of the dataset's directory alone."""
    (place,) = data_dir.glob(f"scratchpads/addition_digits{DIGITS}_examples{COUNT}_seed0/1.0.0")
    copy = tmp_path / place.relative_to(data_dir)
    shutil.copytree(place, copy)
    return copy


def test_a_damaged_file_gives_one_line_or_the_same_stream(stream, copied, tmp_path):
    refused = collections.Counter()
    for path, way in each(copied):
        before = snapshot(tmp_path)
        try:
            chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)
        except ConfigError as error:
            said = str(error)
            refused[path.name.split(".")[0]] += 1
        else:
            continue
        assert re.fullmatch(rf"data_dir: {copied} is damaged \(.+\); {REMAKE}", said), (path, way, said)
        assert snapshot(tmp_path) == before, (path, way)
    assert refused["dataset_info"] >= 15
    assert refused["scratchpads-train"] >= 12
    chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)


@pytest.mark.parametrize("split", ["train", "test"])
def test_fewer_or_other_examples_than_the_settings_say_are_refused(data_dir, copied, tmp_path, split):
    multiplied = load_stream(DIGITS, COUNT, data_dir=data_dir, task="multiplication")
    assert len(multiplied.starts_E) == COUNT
    fewer = Scratchpads(max_digits=DIGITS, num_examples=COUNT // 2, data_dir=str(tmp_path))
    fewer.download_and_prepare()
    of_multiplication = str(data_dir / copied.relative_to(tmp_path)).replace("addition", "multiplication")
    examples, count = r"ValueError: example", r"ValueError: \d+ examples of \w+, not \d+"
    for other, said in ((fewer.data_dir, count), (of_multiplication, examples)):
        shutil.rmtree(copied)
        shutil.copytree(other, copied)
        with pytest.raises(ConfigError, match=rf"^data_dir: .* is damaged \({said}.*{REMAKE}$"):
            load_stream(DIGITS, COUNT, data_dir=tmp_path, split=split)


class Own(type(ADDITION)):
    """A user's task, whose second operand is always the same."""

    second = 7

    def draw(self, rng, digits_a, digits_b):
        return self.problem(super().draw(rng, digits_a, digits_b).a, self.second)


@pytest.fixture
def own(monkeypatch):
    of_addition = {field.name: getattr(ADDITION, field.name) for field in dataclasses.fields(ADDITION)}
    monkeypatch.setitem(catalog.TASKS, "own", Own(**of_addition | {"name": "own"}))


@pytest.mark.usefixtures("own")
def test_a_task_that_has_come_to_draw_otherwise_is_not_trained_on_what_it_drew(tmp_path, monkeypatch):
    first = load_stream(1, 40, data_dir=tmp_path, task="own")
    chex.assert_trees_all_equal(load_stream(1, 40, data_dir=tmp_path, task="own"), first)
    monkeypatch.setattr(Own, "second", 3)
    with pytest.raises(ConfigError, match=rf"not those that the task own draws now\); {REMAKE}"):
        load_stream(1, 40, data_dir=tmp_path, task="own")


@pytest.mark.usefixtures("own")
def test_a_task_without_problems_of_a_split_is_refused(tmp_path, monkeypatch):
    """7 + 2 is the one of its 10 that is in the test split; with 1 none is."""
    monkeypatch.setattr(Own, "second", 1)
    monkeypatch.setattr(scratchpads, "MOST_DRAWS", 1000)
    with pytest.raises(
        ConfigError, match=r"^task: got own, none of whose 1000 draws of 1 and 1 digits is in the test "
    ):
        load_stream(1, 40, data_dir=tmp_path, task="own")
    assert not [*tmp_path.rglob("*array_record*")]


def test_what_a_killed_process_left_is_not_read_and_an_empty_directory_is_filled(stream, copied, tmp_path):
    half = copied.with_name("incomplete.ABC123_1.0.0")
    copied.rename(half)
    (half / "dataset_info.json").unlink()
    left = snapshot(half)
    copied.mkdir()
    chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)
    assert snapshot(half) == left
    for name in (".DS_Store", "._features.json", "Thumbs.db", "features.json~"):
        (copied / name).write_bytes(b"?")
        (copied.parent / name).write_bytes(b"?")
    chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)


def test_of_two_processes_that_prepare_at_once_both_read_the_same(stream, tmp_path, monkeypatch):
    first = []

    def other_prepares_meanwhile(self, dl_manager, splits=Scratchpads._split_generators):
        if not first:
            first.append(self)
            load_stream(DIGITS, COUNT, data_dir=tmp_path)
        return splits(self, dl_manager)

    monkeypatch.setattr(Scratchpads, "_split_generators", other_prepares_meanwhile)
    chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)
    assert first
    assert not list(tmp_path.rglob("incomplete.*"))


@pytest.mark.parametrize("size", [50_000, 100_000])
def test_a_disk_that_is_full_leaves_no_half_dataset(stream, tmp_path, size):
    with no_file_above(size), pytest.raises(OSError, match="File too large") as caught:
        load_stream(DIGITS, COUNT, data_dir=tmp_path)
    assert caught.value.errno in (errno.EIO, errno.EFBIG)
    assert caught.value.filename
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    chex.assert_trees_all_equal(load_stream(DIGITS, COUNT, data_dir=tmp_path), stream)
