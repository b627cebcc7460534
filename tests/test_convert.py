"""Checkpoints of transformers and nanoGPT: the same logits and greedy text, exact round trips, refusals by name."""

import dataclasses
import errno
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from foreign_models import COLUMNS, SIZES, THEIRS, WIDTH, to_theirs, write_nano, write_transformers
from hostile import CANARY, PICKLE, refused_command, saved_model
from safetensors.torch import load_file, save_file
from test_hostile_commands import WITH_CHECKPOINT

from ckl_jax import tasks
from ckl_jax.analysis import critical, discovery
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.gpt2 import load_foreign, save_transformers
from ckl_jax.checkpoint.store import fingerprint, load_model, save_model
from ckl_jax.convert import ConvertCommand, main
from ckl_jax.errors import ConfigError
from ckl_jax.evaluate import judge
from ckl_jax.model import forward
from ckl_jax.runtime import cli
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION, SUBTRACTION
from experiments.figure1_scratchpad import __main__ as figure1
from experiments.figure5_certainty_colors import shown as shown_lib

WRITERS = {
    "transformers": write_transformers,
    "nanoGPT": write_nano,
    "nanoGPT without biases": lambda directory: write_nano(directory, bias=False),
    "nanoGPT of PyTorch": lambda directory: write_nano(directory, bias=False, pytorch=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_logits_and_greedy_text_equal_those_of_the_source_character_by_character(kind, tmp_path):
    reference = WRITERS[kind](tmp_path / "source")
    model = load_foreign(tmp_path / "source", ADDITION, 7)
    assert model.config.use_bias == ("without" not in kind and "PyTorch" not in kind)
    columns = COLUMNS
    run = jax.jit(lambda tokens: forward(model.config, model.params, tokens).logits_BxTxV)
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 50))
    with torch.no_grad():
        expected = reference(to_theirs(tokens)).numpy()[..., columns]
        assert expected.std() > 0.5
        np.testing.assert_allclose(run(tokens), expected, atol=1e-4)

        ours = np.zeros((1, 30), np.int32)
        prompt = alphabet.encode(ADDITION.prompt_text(tasks.Problem(12, 7)))
        ours[0, : len(prompt)] = prompt
        theirs = ours.copy()
        for end in range(len(prompt), 30):
            ours[0, end] = np.asarray(run(ours))[0, end - 1, : alphabet.VOCAB_SIZE].argmax()
            logits_V = reference(to_theirs(theirs[:, :end]))[0, -1].numpy()[columns]
            theirs[0, end] = logits_V[: alphabet.VOCAB_SIZE].argmax()
    assert (ours == theirs).all()
    assert len(set(ours[0, len(prompt) :])) > 1


def test_the_certainty_and_the_rollout_are_those_of_the_whole_vocabulary(tmp_path):
    reference = write_nano(tmp_path / "source")
    main(ConvertCommand(str(tmp_path / "source"), tmp_path / "ours", digits=1))
    model = load_model(tmp_path / "ours")
    tokens = alphabet.encode("Input:\n12+7")[None].astype(np.int32)
    with torch.no_grad():
        log_p = torch.log_softmax(reference(to_theirs(tokens)), -1)
        expected = 1 + (log_p.exp() * log_p).sum(-1) / np.log(SIZES["vocab_size"])
    found = certainty(jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(jnp.array(tokens)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert judge(model, [tasks.Problem(1, 2)], 1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("use_bias", "task", "activation"), [(True, ADDITION, "gelu_new"), (False, SUBTRACTION, "gelu")]
)
def test_ours_to_transformers_and_back_is_exact(use_bias, task, activation, tmp_path):
    write_nano(tmp_path / "source", bias=use_bias, activation_function=activation)
    model = load_foreign(tmp_path / "source", task, 5)
    save_model(tmp_path / "ours", model, {})
    main(ConvertCommand(str(tmp_path / "ours"), tmp_path / "exported", to="transformers"))
    main(ConvertCommand(str(tmp_path / "exported"), tmp_path / "back"))
    back = load_model(tmp_path / "back")
    assert fingerprint(back.params) == fingerprint(load_model(tmp_path / "ours").params)
    assert back._replace(params=None) == model._replace(params=None)
    reference, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values())
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transformer.h.1.mlp.c_fc.weight": None}, r"source: got 'no tensors h\.1\.mlp\.c_fc\.weight'"),
        ({"transformer.wpe.weight": torch.zeros(5, WIDTH)}, r"wpe\.weight: got \(5, 16\), allowed is \(300, 16\)"),
        ({"transformer.h.0.attn.c_attn.weight": torch.zeros(3, 3)}, r"h\.0\.attn\.c_attn\.weight: got \(3, 3\)"),
        ({"transformer.h.9.ln_1.weight": torch.zeros(3)}, r"source: got 'tensors h\.9\.ln_1\.weight'"),
        ({"transformer.ln_f.weight": torch.full((WIDTH,), torch.nan)}, r"ln_f\.weight: got 'NaN or infinity'"),
        ({"transformer.ln_f.weight": torch.ones(WIDTH, dtype=torch.int32)}, r"ln_f\.weight: got 'I32'"),
        ({"lm_head.weight": torch.zeros(SIZES["vocab_size"], WIDTH)}, r"lm_head\.weight: got 'other values"),
    ],
)
def test_tensors_that_cannot_be_ours_are_named(change, expected, tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    state = {name.removeprefix("_orig_mod."): x for name, x in load_file(path).items()} | change
    save_file({name: x for name, x in state.items() if x is not None}, path)
    with pytest.raises(ConfigError, match=expected):
        load_foreign(tmp_path / "source", ADDITION, 7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 50257}, r"config\.json vocab_size: got 50257, allowed is 41\.\.256"),
        ({"n_embd": 8192}, r"config\.json: got '\d+ weights', allowed is at most"),
        ({"n_layer": None}, r"config\.json n_layer: got None"),
        ({"activation_function": "relu"}, r"config\.json activation_function: got 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, r"config\.json layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"config\.json scale_attn_by_inverse_layer_idx"),
        ({"bias": False}, r"bias: got 'other numbers than 0'"),
    ],
)
def test_settings_that_our_model_lacks_are_named(change, expected, tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=expected):
        load_foreign(tmp_path / "source", ADDITION, 7)


def test_a_reduced_vocabulary_has_the_logits_of_our_characters(tmp_path):
    reference = write_transformers(tmp_path / "source")
    main(ConvertCommand(str(tmp_path / "source"), tmp_path / "ours", vocabulary="ours", digits=1))
    model = load_model(tmp_path / "ours")
    assert model.config.vocab_size == alphabet.VOCAB_SIZE
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 20))
    columns = [THEIRS.index(character) for character in alphabet.VOCABULARY]
    with torch.no_grad():
        expected = reference(to_theirs(tokens)).numpy()[..., columns]
    found = jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokens_that_are_none_of_ours_are_shown_as_unknown(tmp_path):
    write_nano(tmp_path / "source")
    model = load_foreign(tmp_path / "source", ADDITION, 1)
    problem = tasks.Problem(12, 7)
    assert alphabet.UNKNOWN in figure1.answer(model, problem.a, problem.b, temperature=2.0)["text"]
    found = critical.sample(model, [problem] * 4, 2, critical.Measuring(temperature=2.0))
    shown = shown_lib.scratchpad(ADDITION, found, problem, 0)
    assert len(shown.text) == found.mask_BxT[0].sum()
    assert alphabet.UNKNOWN in "".join(found.text(row) for row in range(4))
    probes = discovery.choose(found, discovery.Rule(), seed=0)
    beyond = [probe for probe in probes if probe["own_token"] >= alphabet.VOCAB_SIZE]
    assert {probe["own"] for probe in beyond} == {alphabet.UNKNOWN}


def test_our_characters_that_a_vocabulary_lacks_are_named(tmp_path):
    write_nano(tmp_path / "source")
    ids = {character: row for row, character in enumerate(THEIRS) if character not in "<%"}
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(ConfigError, match=re.escape("['%', '<']")):
        load_foreign(tmp_path / "source", ADDITION, 7)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nano(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged"):
        load_foreign(tmp_path / "source", ADDITION, 7)
    assert not (tmp_path / CANARY).exists()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    write_nano(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match="the extra convert installed"):
        load_foreign(tmp_path / "source", ADDITION, 7)


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs: a model's list of files, and each of them."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        source, name = self.server.source, self.path.split("?")[0].rpartition("/")[2]
        commit = "0" * 40
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": path.name} for path in source.iterdir()]
            content, self.path = json.dumps({"id": "a/b", "sha": commit, "siblings": files}).encode(), ""
            if "/tree/" in name or "tree" in self.requestline:
                entries = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
                    for path in source.iterdir()
                ]
                content = json.dumps(entries).encode()
        elif (source / name).is_file():
            content = (source / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, value in (("Content-Length", len(content)), ("ETag", f'"{name}"'), ("X-Repo-Commit", commit)):
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_model_is_had_by_name_from_a_stand_in_of_the_hub(tmp_path):
    write_nano(tmp_path / "source", bias=False)
    config = tmp_path / "source" / "config.json"
    described = json.loads(config.read_text())
    del described["activation_function"]
    config.write_text(json.dumps(described))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.source = tmp_path / "source"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "ckl_jax.convert", "--source", "lecraquito/gpt2_reduced_vocab_FT_7digits"]
    done = subprocess.run([*command, "--out", tmp_path / "ours"], env=environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "ours")
    assert model.max_pretrain_digits == 7
    assert model.config.activation == "gelu_tanh"
    source = load_foreign(tmp_path / "source", ADDITION, 7, activation="gelu_tanh")
    assert fingerprint(model.params) == fingerprint(source.params)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a model of nanoGPT in ``theirs`` and one of ours in ``model``."""
    monkeypatch.chdir(tmp_path)
    write_nano(tmp_path / "theirs")
    saved_model(tmp_path / "model")
    return tmp_path


THEIRS_GIVEN = r"got '\S+, weights of transformers or nanoGPT', allowed is a checkpoint of ours, which "


@pytest.mark.parametrize("form", ["safetensors", "ckpt.pt", "shards", "file"])
@pytest.mark.parametrize("name", [*WITH_CHECKPOINT, "experiments.table1_certainty_gap", "experiments.reproduce"])
def test_a_model_of_others_as_checkpoint_is_told_which_command_converts_it(here, capsys, monkeypatch, name, form):
    if form in ("ckpt.pt", "shards"):
        (here / "theirs/model.safetensors").rename(
            here / "theirs" / {"shards": "model-1-of-1.safetensors"}.get(form, form)
        )
    option = "--checkpoints" if name.endswith("table1_certainty_gap") else "--checkpoint"
    given = "theirs/model.safetensors" if form == "file" else "theirs"
    expected = (
        rf"{option[2:]}: {THEIRS_GIVEN}`python -m ckl_jax\.convert --source \S*{given} --out DIRECTORY` makes of it"
    )
    refused_command(here, capsys, monkeypatch, name, [option, given], expected)


def convert_refused(here, capsys, monkeypatch, arguments, expected):
    refused_command(here, capsys, monkeypatch, "ckl_jax.convert", arguments.split(), expected)


NOT_HERE = "allowed is a directory or file that exists, or owner/name on the hub where no directory here is named owner"


@pytest.mark.parametrize("source", ["./their", "../their", "~/their", "~nobody/a", "/nowhere/their", "theirs/modle"])
@pytest.mark.parametrize("option", ["source", "tokenizer"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(here, capsys, monkeypatch, option, source):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    arguments = f"--source theirs --digits 1 --out new --{option} {source}"
    convert_refused(here, capsys, monkeypatch, arguments, rf"{option}: got '{re.escape(source)}', {NOT_HERE}")


@pytest.mark.parametrize("source", ["theirs/x.safetensors", "their/model.bin", "their/ckpt.pt", "a/b.pth", "a/b.json"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(here, capsys, monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    convert_refused(here, capsys, monkeypatch, f"--source {source}", rf"source: got '{re.escape(source)}', {NOT_HERE}")


@pytest.mark.parametrize("name", ["model.safetensors", "gpt.safetensors", "a.bin", "ckpt.pt", "b.pth", "last.ckpt"])
def test_a_file_of_weights_is_taken_with_what_is_beside_it(here, name):
    path = here / "theirs" / "model.safetensors"
    expected = fingerprint(load_foreign(here / "theirs", ADDITION, 1).params)
    if name.endswith("safetensors"):
        path.rename(here / "theirs" / name)
    else:
        torch.save(load_file(path), here / "theirs" / name)
        path.unlink()
    main(ConvertCommand(f"theirs/{name}", here / "ours", digits=1))
    assert fingerprint(load_model(here / "ours").params) == expected


FILES = r"allowed is a directory with one of model\.safetensors, .*; or the file of weights itself \(\.safetensors .*\)"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--source model --digits 1",
            r"source: got 'model', allowed is another's model: this is a .*",
        ),
        (
            "--source theirs --to transformers",
            r"source: got 'theirs', allowed is a checkpoint of ours .* for --to .*",
        ),
        *(
            (f"--source model --to transformers {option}", rf"{option[2:].split()[0]}: got .*, allowed is .* --to .*")
            for option in (
                "--vocabulary ours",
                "--tokenizer x",
                "--activation gelu_erf",
                "--task subtraction",
                "--digits 1",
            )
        ),
        ("--source theirs/config.json --digits 1", rf"source: got '\S*config\.json', {FILES}"),
        ("--source theirs/tokenizer.json --digits 1", rf"source: got '\S*tokenizer\.json', {FILES}"),
        ("--source model/params --digits 1", rf"source: got '\S*params', {FILES}"),
        ("--source theirs", r"digits: got None, allowed is a number, .*"),
        (
            "--source theirs --activation gelu_erf --digits 1",
            r"activation: got 'gelu_erf', allowed is gelu_tanh, .*",
        ),
        ("--source theirs --activation relu", r".*--activation.*"),
        ("--source theirs --tokenizer model --digits 1", r"source: got 'no vocabulary in .*model', allowed is .*"),
    ],
)
def test_sources_that_cannot_be_converted_are_refused(here, capsys, monkeypatch, arguments, expected):
    convert_refused(here, capsys, monkeypatch, f"{arguments} --out new", expected)


@pytest.mark.parametrize("arguments", ["--source theirs --digits 1", "--source model --to transformers"])
@pytest.mark.parametrize("out", ["model", "theirs", "model/params", "notes", "theirs/../theirs"])
def test_nothing_that_is_there_is_overwritten(here, capsys, monkeypatch, arguments, out):
    (here / "notes").mkdir()
    (here / "notes" / "params").write_text("mine")
    said = r"which is not empty', allowed is a new or empty directory, or what this command made before"
    convert_refused(
        here, capsys, monkeypatch, f"{arguments} --out {out}", rf"out: got '\S+(, {said}|', .* than source)"
    )


def test_the_same_command_may_write_again_and_another_may_not(here, capsys, monkeypatch):
    (here / "empty").mkdir()
    for arguments in ("--source theirs --digits 1 --out empty", "--source model --to transformers --out exported"):
        for _ in range(2):
            monkeypatch.setattr(sys, "argv", ["convert", *arguments.split()])
            cli.run(main, ConvertCommand)
    capsys.readouterr()
    for arguments in (
        "--source theirs --digits 2 --out empty",
        "--source theirs --digits 1 --out exported",
        "--source empty --to transformers --out exported",
    ):
        convert_refused(here, capsys, monkeypatch, arguments, r"out: got '\S+, which is not empty', .*")


def test_an_export_that_was_trained_since_is_not_overwritten(here, capsys, monkeypatch):
    arguments = "--source model --to transformers --out exported"
    monkeypatch.setattr(sys, "argv", ["convert", *arguments.split()])
    cli.run(main, ConvertCommand)
    model = transformers.GPT2LMHeadModel.from_pretrained("exported")
    assert {model.config.attn_pdrop, model.config.embd_pdrop, model.config.resid_pdrop} == {0.0}
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1
    model.save_pretrained("exported")
    trained = load_file("exported/model.safetensors")
    assert "made_by" in json.loads((here / "exported" / "config.json").read_text())
    capsys.readouterr()
    convert_refused(here, capsys, monkeypatch, arguments, "out: got 'exported, which is not empty', .*")
    kept = load_file("exported/model.safetensors")
    assert all(torch.equal(kept[name], x) for name, x in trained.items())


def test_an_export_has_the_dropout_of_pre_training_everywhere(here):
    model = load_model(here / "model")
    model = model._replace(config=dataclasses.replace(model.config, dropout=0.2))
    save_transformers(here / "exported", model, {})
    described = json.loads((here / "exported" / "config.json").read_text())
    assert [described[f"{part}_pdrop"] for part in ("attn", "embd", "resid")] == [0.2] * 3


def test_a_model_that_ships_is_exported_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(ConvertCommand("tiny", pathlib.Path("exported"), to="transformers"))
    exported = transformers.GPT2LMHeadModel.from_pretrained("exported")
    ours = load_model("tiny").params["params"]["wte"]["embedding"]
    np.testing.assert_array_equal(exported.transformer.wte.weight.detach().numpy(), ours)


@pytest.mark.parametrize("arguments", ["--source theirs --digits 1", "--source model --to transformers"])
def test_a_conversion_that_was_stopped_is_made_again_by_the_same_command(here, capsys, monkeypatch, arguments):
    def stop(directory, *_):
        (directory / "params").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device", "params")

    def run():
        monkeypatch.setattr(sys, "argv", ["convert", *arguments.split(), "--out", "new"])
        cli.run(main, ConvertCommand)

    for name in ("save_model", "save_transformers"):
        monkeypatch.setattr(f"ckl_jax.convert.{name}", stop)
    with pytest.raises(SystemExit):
        run()
    capsys.readouterr()
    convert_refused(here, capsys, monkeypatch, "--source theirs --digits 2 --out new", "out: got 'new, which is .*")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    run()
    run()
    assert not (here / "new" / "unfinished.json").exists()


def test_a_tokenizer_by_name_is_had_without_weights(here, monkeypatch):
    asked = {}
    (here / "theirs" / "tokenizer.json").rename(here / "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.update(how, name=name) or here)
    main(ConvertCommand("theirs", here / "ours", digits=1, tokenizer="owner/name"))
    assert asked["name"] == "owner/name"
    assert set(asked["allow_patterns"]) == {
        "vocab.json",
        "tokenizer.json",
        "added_tokens.json",
        "tokenizer_config.json",
    }
    assert load_model(here / "ours").config.vocab_size == SIZES["vocab_size"]


NANOGPTS = {"block_size": 300, "bias": True, "dropout": 0.0, "use_flash": True}
"""model_args of the paper's authors' fork of nanoGPT, beside the sizes."""


def test_nanogpts_directory_is_converted_by_what_the_messages_ask_for(here, capsys, monkeypatch):
    torch.save(
        {"model": load_file("theirs/model.safetensors"), "model_args": {**SIZES, **NANOGPTS}},
        "ckpt.pt",
    )
    (here / "meta.pkl").write_bytes(PICKLE)
    arguments = "--source ckpt.pt --out ours"
    convert_refused(here, capsys, monkeypatch, arguments, "digits: .*")
    convert_refused(here, capsys, monkeypatch, f"{arguments} --digits 3", r"activation: .* gelu_tanh \(.*gelu_erf \(.*")
    arguments += " --digits 3 --activation gelu_erf"
    expected = r"source: got 'no vocabulary in .*', .* --tokenizer .* stoi .*"
    convert_refused(here, capsys, monkeypatch, arguments, expected)
    (here / "stoi.json").write_text(json.dumps({character: row for row, character in enumerate(THEIRS)}))
    main(ConvertCommand("ckpt.pt", here / "ours", digits=3, activation="gelu_erf", tokenizer="stoi.json"))
    model = load_model(here / "ours")
    assert (model.config.activation, model.max_pretrain_digits) == ("gelu_erf", 3)
    assert fingerprint(model.params) == fingerprint(load_foreign(here / "theirs", ADDITION, 3).params)
    main(ConvertCommand("ours", here / "exported", to="transformers"))
    assert json.loads((here / "exported" / "config.json").read_text())["activation_function"] == "gelu"


def test_a_model_of_ours_from_before_the_activation_was_a_field_is_one_by_tanh(here):
    path = here / "model" / "model.json"
    description = json.loads(path.read_text())
    del description["model"]["activation"]
    path.write_text(json.dumps(description))
    assert load_model(here / "model").config.activation == "gelu_tanh"
