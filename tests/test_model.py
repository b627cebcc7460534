"""The language model against itself (cache, causality, segments, chunks) and against GPT-2 of transformers."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import untrained

from ckl_jax import presets
from ckl_jax.model import GPT2, forward, init_cache, scans_layers
from ckl_jax.rl.critic import ValueHead, values
from ckl_jax.runtime import targets


@functools.cache
def init(config):
    """Parameters ten times larger than the initialization, so that every part of the model moves the logits."""
    params = untrained(config)
    key = jax.random.key(1)
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x + 0.1 * jax.random.normal(key, x.shape), params)


def random_tokens(config, *shape):
    return jax.random.randint(jax.random.key(7), shape, 0, config.vocab_size)


def logits_of(config, params, *inputs):
    return jax.jit(forward, static_argnums=0)(config, params, *inputs).logits_BxTxV


def parameter_paths(params):
    return {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def left_padded(paddings, length):
    columns = jnp.arange(length)[None] - jnp.array(paddings)[:, None]
    return jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)


def test_cached_decoding_gives_the_uncached_logits_under_left_paddings(two_layers):
    params, tokens = init(two_layers), random_tokens(two_layers, 3, 12)
    inputs = (tokens, *left_padded([0, 3, 6], 12))
    expected = logits_of(two_layers, params, *inputs)

    @jax.jit
    def extend(cache, *window):
        return forward(two_layers, params, *window, cache)

    output = extend(init_cache(two_layers, 3, 15), *(x[:, :7] for x in inputs))
    found = [output.logits_BxTxV]
    for t in range(7, 12):
        output = extend(output.cache, *(x[:, t : t + 1] for x in inputs))
        found.append(output.logits_BxTxV)
    assert int(output.cache.length) == 12
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=2e-5)


@pytest.mark.parametrize("changes", [{"layers": "scanned"}, {"remat": True}, {"layers": "scanned", "remat": True}])
def test_layers_in_a_loop_or_computed_twice_give_the_same_logits_and_gradients(two_layers, changes):
    params, tokens = init(two_layers), random_tokens(two_layers, 3, 12)

    def logits_and_gradient(config):
        def loss(params):
            logits = forward(config, params, tokens, num_outputs=5).logits_BxTxV
            return jnp.square(logits).mean(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        return logits, gradient

    expected = logits_and_gradient(dataclasses.replace(two_layers, layers="unrolled"))
    found = logits_and_gradient(dataclasses.replace(two_layers, **changes))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_of_scanned_layers_is_appended_grown_and_cut_like_one_of_each(two_layers):
    params, tokens = init(two_layers), random_tokens(two_layers, 3, 12)

    def logits(config):
        output = forward(config, params, tokens[:, :5], cache=init_cache(config, 3, 6))
        output = forward(config, params, tokens[:, 5:8], cache=output.cache.grown(12))
        several = output.cache._replace(length=jnp.full(3, 8))  # As speculation has it: of each row its own.
        kept = jnp.array([2, 0])
        return output.logits_BxTxV, forward(config, params, tokens[kept, 8:], cache=several.rows(kept)).logits_BxTxV

    expected = logits(two_layers)
    whole = logits_of(two_layers, params, tokens)
    np.testing.assert_allclose(expected[1], whole[jnp.array([2, 0]), 8:], atol=2e-5)
    chex.assert_trees_all_close(logits(dataclasses.replace(two_layers, layers="scanned")), expected, atol=2e-5)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_dropout_needs_a_key_and_follows_it(two_layers, layers):
    config = dataclasses.replace(two_layers, dropout=0.5, layers=layers)
    params, tokens = init(config), random_tokens(config, 1, 6)
    draw = jax.jit(lambda key: forward(config, params, tokens, deterministic=False, rngs={"dropout": key}).logits_BxTxV)
    first, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != logits_of(config, params, tokens)).any()


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_dropout_is_the_same_in_the_backward_pass(two_layers, layers):
    """Scanned layers compute attention twice: the gradient is that of the loss only if both draw the same."""
    config = dataclasses.replace(two_layers, dropout=0.3, layers=layers)
    params, tokens = init(config), random_tokens(config, 2, 12)

    @jax.jit
    def loss(params):
        output = forward(config, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})
        return jnp.square(output.logits_BxTxV).mean()

    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * jnp.abs(x), params)
    moved = [loss(jax.tree.map(lambda x, d, sign=sign: x + sign * 0.01 * d, params, direction)) for sign in (1, -1)]
    gradient = jax.jit(jax.grad(loss))(params)
    expected = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    np.testing.assert_allclose((moved[0] - moved[1]) / 0.02, expected, rtol=0.02)


def test_layers_are_scanned_where_programs_are_for_a_tpu_unless_said_otherwise(two_layers):
    assert not scans_layers(two_layers)
    for platform in ("tpu", "gpu"):
        with targets.compiling_for([types.SimpleNamespace(platform=platform, process_index=0)]):
            assert scans_layers(two_layers) == (platform == "tpu")
            assert scans_layers(dataclasses.replace(two_layers, layers="scanned"))
            assert not scans_layers(dataclasses.replace(two_layers, layers="unrolled"))
    assert not targets.only_compiling()


def test_cached_decoding_counts_positions_from_the_cache_by_default(two_layers):
    params, tokens = init(two_layers), random_tokens(two_layers, 2, 9)

    @jax.jit
    def in_two_parts(tokens):
        first = forward(two_layers, params, tokens[:, :5], cache=init_cache(two_layers, 2, 9))
        return forward(two_layers, params, tokens[:, 5:], cache=first.cache).logits_BxTxV

    np.testing.assert_allclose(in_two_parts(tokens), logits_of(two_layers, params, tokens)[:, 5:], atol=2e-5)


def test_left_padding_leaves_the_logits_of_the_text_alone(two_layers):
    params, text = init(two_layers), random_tokens(two_layers, 2, 9)
    padded = jnp.pad(text, ((0, 0), (5, 0)))
    found = logits_of(two_layers, params, padded, *left_padded([5, 5], 14))[:, 5:]
    np.testing.assert_allclose(found, logits_of(two_layers, params, text), atol=2e-5)


def test_logits_depend_on_every_position_up_to_theirs_and_on_none_after(two_layers):
    config = dataclasses.replace(two_layers, attention_chunk=4)
    params, tokens = init(config)["params"], random_tokens(config, 1, 9)
    weights = jax.random.normal(jax.random.key(3), (config.vocab_size,))

    def weighted_logits(wpe):
        return forward(config, {"params": {**params, "wpe": {"embedding": wpe}}}, tokens).logits_BxTxV[0] @ weights

    gradients = jax.jit(jax.jacrev(weighted_logits))(params["wpe"]["embedding"])
    moved = np.abs(gradients).max(axis=2)
    assert moved.shape == (9, config.block_size)
    for t in range(9):
        assert (moved[t, : t + 1] > 1e-4).all()
        assert (moved[t, t + 1 :] == 0).all()


def test_segments_isolate_documents(two_layers):
    params, tokens = init(two_layers), random_tokens(two_layers, 2, 5)
    positions, segments = jnp.arange(5)[None] + jnp.array([[0], [20]]), jnp.repeat(jnp.array([0, 1]), 5)[None]
    row = (tokens.reshape(1, 10), positions.reshape(1, 10))
    together = logits_of(two_layers, params, *row, segments)[0]
    apart = logits_of(two_layers, params, tokens, positions).reshape(10, -1)
    np.testing.assert_allclose(together, apart, atol=2e-5)
    crossing = logits_of(two_layers, params, *row, jnp.zeros_like(segments))[0]
    assert np.abs(crossing - together)[5:].max() > 1e-2


def test_attention_in_chunks_equals_one_chunk_in_logits_and_gradients(two_layers):
    params, tokens = init(two_layers), random_tokens(two_layers, 2, 13)
    segments = (jnp.arange(13)[None] >= jnp.array([[6], [0]])).astype(jnp.int32)

    def loss(params, chunk):
        config = dataclasses.replace(two_layers, attention_chunk=chunk)
        logits = forward(config, params, tokens, None, segments).logits_BxTxV
        return jnp.square(logits).mean(), logits

    one, divides_not, exact = (jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, c) for c in (64, 5, 13))
    chex.assert_trees_all_close(divides_not, one, atol=2e-5, rtol=1e-4)
    chex.assert_trees_all_close(exact, one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_every_matrix_product_has_the_configured_precision(two_layers, cached):
    tokens, cache = jnp.zeros((1, 5), jnp.int32), init_cache(two_layers, 1, 8) if cached else None
    jaxpr = str(jax.make_jaxpr(lambda p: forward(two_layers, p, tokens, cache=cache)[:2])(init(two_layers)))
    products = jaxpr.count("dot_general[")
    assert products == 6 * two_layers.num_layers + 1
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_the_gpt2_preset_has_85_million_parameters_no_bias_and_dropout():
    config = presets.pretrain_preset("gpt2").model
    shapes = jax.eval_shape(GPT2(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert abs(sum(x.size for x in jax.tree.leaves(shapes)) - 85e6) < 1e6
    assert not any(path.endswith("bias") for path in parameter_paths(shapes))
    assert config.dropout == 0.2


def test_biases_are_there_exactly_when_asked_for(two_layers):
    def paths(config):
        return set(parameter_paths(jax.eval_shape(GPT2(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))))

    names = ("ln_1", "c_attn", "c_proj", "ln_2", "c_fc", "mlp_c_proj")
    layers = [f"h_{i}/{name}" for i in range(2) for name in names]
    biases = {f"params/{layer}/bias" for layer in [*layers, "ln_f"]}
    without = paths(dataclasses.replace(two_layers, use_bias=False))
    assert not without & biases
    assert paths(two_layers) == without | biases


def test_logits_equal_those_of_transformers(two_layers):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(two_layers, attention_chunk=5)
    params, tokens = init(config), np.array(random_tokens(config, 2, 17))
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            attn_implementation="eager",
        )
    ).eval()
    names = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_c_proj": "mlp.c_proj"}
    state = {}
    for path, x in parameter_paths(params["params"]).items():
        *layer, module, kind = path.split("/")
        prefix = "".join(name.replace("h_", "h.") + "." for name in layer) + names.get(module, module)
        state[f"transformer.{prefix}.{'bias' if kind == 'bias' else 'weight'}"] = torch.tensor(np.array(x))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    reference.load_state_dict(state)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_of(config, params, tokens), expected, atol=1e-4)


def test_bfloat16_activations_give_float32_logits_near_the_float32_ones(two_layers):
    config = dataclasses.replace(two_layers, dtype="bfloat16")
    params, tokens = init(config), random_tokens(config, 2, 9)
    output = jax.jit(forward, static_argnums=0)(config, params, tokens, cache=init_cache(config, 2, 9))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert output.logits_BxTxV.dtype == output.hidden_BxTxD.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in output.cache.keys_BxHxSxK + output.cache.values_BxHxSxK)
    expected = logits_of(two_layers, params, tokens)
    np.testing.assert_allclose(output.logits_BxTxV, expected, atol=0.1 * float(expected.std()))
    assert np.abs(output.logits_BxTxV - expected).max() > 1e-4


def test_dropout_acts_only_when_not_deterministic(two_layers):
    plain_model = dataclasses.replace(two_layers, num_layers=1)
    config = dataclasses.replace(plain_model, dropout=0.5)
    params, tokens = init(config), random_tokens(config, 2, 9)

    @jax.jit
    def noisy(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return GPT2(config).apply(params, tokens, deterministic=False, rngs=rngs).logits_BxTxV

    plain = logits_of(config, params, tokens)
    np.testing.assert_allclose(plain, logits_of(plain_model, params, tokens), atol=1e-6)
    assert np.abs(noisy(0) - plain).max() > 0.1
    assert np.abs(noisy(0) - noisy(1)).max() > 0.1
    np.testing.assert_array_equal(noisy(0), noisy(0))


def test_the_value_head_gives_one_float32_value_per_position():
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = jax.jit(ValueHead().init)(jax.random.key(1), hidden)
    assert {path: x.shape for path, x in parameter_paths(params["params"]).items() if path.endswith("kernel")} == {
        "fc_1/kernel": (16, 128),
        "fc_2/kernel": (128, 128),
        "out/kernel": (128, 1),
    }
    found = values(params, hidden)
    assert found.shape == (2, 5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(values(params, hidden[1:, 2:]), found[1:, 2:], atol=1e-6)


@pytest.mark.parametrize("num_outputs", [1, 5, 9])
def test_the_last_outputs_are_those_of_the_whole_pass_cached_or_not(two_layers, num_outputs):
    config = dataclasses.replace(two_layers, attention_chunk=4)
    params, tokens = init(config), random_tokens(config, 2, 9)
    inputs = (tokens, *left_padded([0, 3], 9))
    expected = logits_of(config, params, *inputs)[:, 9 - num_outputs :]
    for cache in (None, init_cache(config, 2, 12)):
        output = forward(config, params, *inputs, cache, num_outputs=num_outputs)
        np.testing.assert_allclose(output.logits_BxTxV, expected, atol=2e-5)
        assert output.hidden_BxTxD.shape == (2, num_outputs, config.width)
