"""Blocks and models of KerasHub as MoE; without KerasHub these tests are skipped."""

import importlib
import importlib.metadata
import importlib.util
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import convert
from keras_moe.convert import _keras_hub
from keras_moe.convert._gated_shared_moe import GatedSharedMoE
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from tests.support import backends, moe_oracles, oracles

HAS_KERAS_HUB = importlib.util.find_spec("keras_hub") is not None
needs_keras_hub = pytest.mark.skipif(
    not HAS_KERAS_HUB, reason="keras-hub is not installed"
)
EXPERTS, TOP_K, WIDTH, HIDDEN = 5, 2, 6, 7
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(3, 4, WIDTH)).astype("float32")
# The module, class and arguments of every kind of block that is converted.
_QWEN = {"moe_intermediate_dim": HIDDEN, "router_aux_loss_coefficient": 0.5}
BLOCKS = {
    "mixtral": (
        "mixtral.mixtral_decoder",
        "MixtralSparseMoeBlock",
        {"intermediate_dim": HIDDEN, "router_aux_loss_coef": 0.5},
    ),
    "qwen": (
        "qwen_moe.qwen_moe_decoder",
        "QwenSparseMoeBlock",
        {**_QWEN, "shared_expert_intermediate_dim": 9, "norm_top_k_prob": False},
    ),
    "qwen, renormalized": (
        "qwen_moe.qwen_moe_decoder",
        "QwenSparseMoeBlock",
        {**_QWEN, "shared_expert_intermediate_dim": 9, "norm_top_k_prob": True},
    ),
    "qwen3": (
        "qwen3_moe.qwen3_moe_decoder",
        "Qwen3SparseMoeBlock",
        {**_QWEN, "norm_top_k_prob": True},
    ),
    "qwen3.5": (
        "qwen3_5_moe.qwen3_5_moe_decoder",
        "Qwen3_5MoeSparseMoeBlock",
        {**_QWEN, "shared_expert_intermediate_size": 9},
    ),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def block_of(name, seed=0, **changes):
    """A built block with weights large enough for distinct choices."""
    module, kind, arguments = BLOCKS[name]
    keras.utils.set_random_seed(seed)
    made = getattr(importlib.import_module(f"keras_hub.src.models.{module}"), kind)
    sizes = {"hidden_dim": WIDTH, "num_experts": EXPERTS, "top_k": TOP_K}
    block = made(**sizes, **{**arguments, **changes})
    block.build((None, None, WIDTH))
    for weight in block.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.5))
    return block


def trainer(layer):
    """A model that returns the outputs of a layer alone."""
    inputs = keras.Input((TOKENS.shape[1], WIDTH))
    outputs = layer(inputs)
    model = keras.Model(inputs, outputs[0] if isinstance(outputs, tuple) else outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def close(found, expected, tolerance=1e-5):
    found, expected = map(ops.convert_to_numpy, (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@needs_keras_hub
@every_block
def test_outputs_and_losses_of_a_block(name):
    block = block_of(name)
    moe = convert.from_keras_hub(block)
    assert isinstance(moe, MoE)
    assert moe.name == block.name
    assert moe.count_params() == block.count_params()
    close(moe(TOKENS), block(TOKENS)[0])
    close(moe(TOKENS, training=True), block(TOKENS, training=True)[0])
    close(sum(moe.losses), sum(block.losses))
    assert float(sum(moe.losses)) > 0.4  # 0.5 where experts are used evenly.


@needs_keras_hub
@every_block
def test_a_training_step_of_a_block(name):
    block = block_of(name)
    moe = convert.from_keras_hub(block)
    models = [trainer(layer) for layer in (block, moe)]
    targets = np.random.default_rng(1).normal(size=TOKENS.shape).astype("float32")
    before = ops.convert_to_numpy(moe(TOKENS))
    for _ in range(2):
        losses = [float(model.train_on_batch(TOKENS, targets)) for model in models]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    outputs = ops.convert_to_numpy(moe(TOKENS))
    close(outputs, block(TOKENS)[0])
    assert np.abs(outputs - before).max() > 1e-3
    # The same weights, converted once more: what is read is what training changed.
    again = convert.from_keras_hub(block)
    for ours, theirs in zip(moe.weights, again.weights, strict=True):
        close(ours, theirs)


@needs_keras_hub
@pytest.mark.parametrize("name", ["mixtral", "qwen3.5"])
def test_padding_is_no_token_of_the_loss(name):
    block = block_of(name)
    moe = convert.from_keras_hub(block)
    mask = np.arange(4) < np.array([[4], [2], [1]])
    expected = ops.convert_to_numpy(
        block(TOKENS, attention_mask=mask.astype("int32"), training=True)[0]
    )
    found = ops.convert_to_numpy(moe(TOKENS, mask=mask, training=True))
    close(found[mask], expected[mask])
    assert (found[~mask] == 0).all()
    close(sum(moe.losses), sum(block.losses))


@needs_keras_hub
def test_weights_are_copies_and_frozen_parts_stay_frozen():
    block = block_of("qwen")
    block.expert_bank.trainable = False
    moe = convert.from_keras_hub(block)
    assert [w.path.split("/")[-2] for w in moe.trainable_weights] == [
        "router",
        "shared_expert",
        "shared_expert",
        "shared_expert",
        "shared_gate",
    ]
    before = ops.convert_to_numpy(moe(TOKENS))
    for weight in block.weights:
        weight.assign(np.zeros(weight.shape))
    np.testing.assert_array_equal(ops.convert_to_numpy(moe(TOKENS)), before)


@needs_keras_hub
def test_policies_are_kept():
    block = block_of("qwen", dtype="mixed_bfloat16")
    moe = convert.from_keras_hub(block)
    found, expected = moe(TOKENS), block(TOKENS)[0]
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    found, expected = (
        ops.convert_to_numpy(ops.cast(x, "float32")) for x in (found, expected)
    )
    # Few tokens choose otherwise, where experts are almost even in bfloat16.
    assert np.median(np.abs(found - expected)) < 0.005
    assert moe.experts.gate_kernel.dtype == "float32"


@needs_keras_hub
@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_a_saved_model_needs_no_keras_hub(name, tmp_path):
    model = trainer(convert.from_keras_hub(block_of(name)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(loaded(TOKENS), model(TOKENS), 0)
    assert type(loaded.layers[-1]) is (MoE if name == "mixtral" else GatedSharedMoE)


# Arguments.


def refused(kind, message, function, argument):
    with pytest.raises(kind, match=re.escape(message)) as error:
        function(argument)
    assert "\n" not in str(error.value)


@needs_keras_hub
def test_other_blocks_are_refused():
    known = "one of KerasHub's MixtralSparseMoeBlock, QwenSparseMoeBlock, "
    decoder = importlib.import_module("keras_hub.src.models.gpt_oss.gpt_oss_decoder")
    other = decoder.GptOssSparseMoeBlock(
        hidden_dim=4, intermediate_dim=4, num_experts=2, top_k=1
    )
    for block in (other, keras.layers.Dense(3), None):
        refused(ValueError, known, convert.from_keras_hub, block)
        received = f"Received: block={block!r}"
        refused(ValueError, received, convert.from_keras_hub, block)


@needs_keras_hub
def test_a_block_without_weights_is_refused():
    block = block_of("mixtral")
    fresh = type(block)(4, 4, 2, name="fresh")
    message = "must be built: call it once, or its model. Received: block=<Mixtral"
    refused(ValueError, message, convert.from_keras_hub, fresh)


@needs_keras_hub
def test_a_quantized_block_is_refused():
    block = block_of("mixtral")
    block._sparse_feedforward_gate_dense.quantize("int8")
    message = "`block` must not be quantized"
    refused(ValueError, message, convert.from_keras_hub, block)


@needs_keras_hub
def test_an_unknown_version_is_named():
    block = block_of("qwen3")
    object.__delattr__(block, "num_experts")
    version = importlib.metadata.version("keras-hub")
    message = f"KerasHub {version} has no `num_experts` there"
    refused(ValueError, message, convert.from_keras_hub, block)


def test_a_missing_keras_hub_is_named(monkeypatch):
    monkeypatch.setattr(_keras_hub.importlib.util, "find_spec", lambda name: None)
    message = (
        "is not installed: pip install keras-hub. Received: block=<Dense name=mine"
    )
    block = keras.layers.Dense(3, name="mine")
    refused(ImportError, message, convert.from_keras_hub, block)


# Whole models.


SIZES = {
    "vocabulary_size": 53,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 9,
    "num_experts": EXPERTS,
    "top_k": TOP_K,
}
_OF_QWEN = {"moe_intermediate_dim": 9, "norm_top_k_prob": True}
MODELS = {
    "Mixtral": {"sliding_window": 16, "router_aux_loss_coef": 0.5},
    "QwenMoe": {
        **_OF_QWEN,
        "shared_expert_intermediate_dim": 7,
        "router_aux_loss_coefficient": 0.5,
    },
    "Qwen3Moe": {**_OF_QWEN, "head_dim": 4, "router_aux_loss_coefficient": 0.5},
}


def language_model(name):
    import keras_hub

    keras.utils.set_random_seed(1)
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**SIZES, **MODELS[name])
    for weight in backbone.weights:
        if len(weight.shape) > 1:  # Scales of normalizations stay.
            weight.assign(keras.random.normal(weight.shape, stddev=0.5))
    model = getattr(keras_hub.models, f"{name}CausalLM")(
        backbone=backbone, preprocessor=None
    )
    model.compile(keras.optimizers.SGD(0.1), sampler="greedy")
    return model


def prompts():
    mask = (np.arange(10) < np.array([[4], [3]])).astype("int32")
    ids = np.random.default_rng(2).integers(1, 53, mask.shape).astype("int32")
    return {"token_ids": ids * mask, "padding_mask": mask}


def generated(model):
    return model.generate(prompts(), stop_token_ids=None)["token_ids"]


@needs_keras_hub
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="KerasHub does not generate on JAX with the 64 bits of these tests",
)
@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_generates_the_same_tokens(name, tmp_path):
    model = language_model(name)
    expected, logits = generated(model), model.predict(prompts(), verbose=0)
    parameters = model.count_params()
    moes = convert.replace_keras_hub_blocks(model)
    assert [type(moe).__name__ for moe in moes] == [
        "GatedSharedMoE" if name == "QwenMoe" else "MoE"
    ] * 2
    assert model.count_params() == parameters
    found = generated(model)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found[:, 4:])) > 2  # More than one token in turn.
    kept = prompts()["padding_mask"] == 1
    close(model.predict(prompts(), verbose=0)[kept], logits[kept])
    # The replaced layers are those that compute: without their weights, other tokens.
    model.save_weights(tmp_path / "all.weights.h5")
    for moe in moes:
        kernel = moe.experts.down_kernel
        kernel.assign(np.zeros(kernel.shape))
    assert (generated(model) != expected).any()
    model.load_weights(tmp_path / "all.weights.h5")
    np.testing.assert_array_equal(generated(model), expected)


@needs_keras_hub
@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_trains_alike(name):
    models = [language_model(name) for _ in range(2)]
    first, _ = convert.replace_keras_hub_blocks(models[1])
    first_block = next(
        value
        for value in vars(models[0].backbone.transformer_layers[0]).values()
        if _keras_hub.is_block(value)
    )
    close(first.router.kernel, first_block._sparse_feedforward_gate_dense.kernel)
    inputs = prompts()
    for _ in range(2):
        losses = [
            float(
                np.ravel(
                    model.train_on_batch(
                        inputs, inputs["token_ids"], inputs["padding_mask"]
                    )
                )[0]
            )
            for model in models
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    close(first.router.kernel, first_block._sparse_feedforward_gate_dense.kernel)


@needs_keras_hub
def test_a_model_without_blocks_is_refused():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    replace = convert.replace_keras_hub_blocks
    refused(ValueError, "of type Functional, which has none", replace, model)
    refused(ValueError, "`model` must be a Keras model. Received", replace, None)


@needs_keras_hub
def test_a_model_with_other_blocks_is_refused_by_name():
    import keras_hub

    backbone = keras_hub.models.GptOssBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        num_experts=4,
        top_k=2,
    )
    kinds = "which has only GptOssExperts, GptOssSparseMoeBlock"
    refused(ValueError, kinds, convert.replace_keras_hub_blocks, backbone)


# The layer for the shared expert, which needs no KerasHub.


def gated(**kwargs):
    keras.utils.set_random_seed(0)
    experts = GLUExperts(4, HIDDEN, dtype="float64")
    return GatedSharedMoE(
        shared_hidden_units=9, experts=experts, dtype="float64", **kwargs
    )


def gated_oracle(layer, tokens, weights, mask=None):
    """One token at a time: the mixture plus the shared expert times its gate."""
    gate, up, down, shared_gate, shared_up, shared_down, to_gate = weights
    record = {
        name: ops.convert_to_numpy(value)
        for name, value in zip(
            ("expert_indices", "combine_weights"),
            layer.router(tokens)[:2],
            strict=True,
        )
    }
    outputs = moe_oracles.moe(
        tokens, record, moe_oracles.glu_experts((gate, up, down)), mask
    )
    (shared,) = moe_oracles.glu_experts((shared_gate, shared_up, shared_down))
    for i, token in enumerate(tokens):
        if mask is None or mask[i]:
            weight = 1.0 / (1.0 + np.exp(-token @ to_gate))
            outputs[i] += weight * shared(token)
    return outputs


@pytest.mark.parametrize("masked", [False, True])
def test_a_gated_shared_expert_equals_its_oracle(masked):
    layer = gated()
    tokens = TOKENS[0].astype("float64")
    mask = np.array([True, True, False, True]) if masked else None
    layer.build(tokens.shape)
    parts = layer.experts.weights + layer.shared_expert.weights
    parts += layer.shared_gate.weights
    weights = [ops.convert_to_numpy(part) for part in parts]
    expected = gated_oracle(layer, tokens, weights, mask)
    given = tokens.copy()
    if masked:
        given[2] = np.nan
    found = ops.convert_to_numpy(layer(given, mask=mask))
    np.testing.assert_allclose(found, expected, **backends.tolerance(1e-9))


def test_gradients_of_a_gated_shared_expert():
    layer = gated(load_balancing_loss_weight=0.0)
    tokens = TOKENS[0].astype("float64")
    layer.build(tokens.shape)
    parts = layer.experts.weights + layer.shared_expert.weights
    parts += layer.shared_gate.weights
    weights = [ops.convert_to_numpy(part).astype("float64") for part in parts]
    cotangent = np.random.default_rng(3).normal(size=tokens.shape)
    expected = oracles.numeric_gradients(
        lambda: (gated_oracle(layer, tokens, weights) * cotangent).sum(), weights
    )
    found = backends.gradients(layer, [tokens], [cotangent])[0]
    of_part = dict(zip([w.path for w in layer.trainable_variables], found, strict=True))
    for part, gradient in zip(parts, expected, strict=True):
        np.testing.assert_allclose(
            of_part[part.path], gradient, **backends.tolerance(1e-5, 1e-7)
        )


def test_experts_of_another_width_are_refused():
    layer = GatedSharedMoE(shared_hidden_units=3, experts=GLUExperts(2, 3, units=5))
    message = "Received: outputs of width 5 for inputs of width 6"
    refused(ValueError, message, layer.build, (None, WIDTH))
    with pytest.raises(ValueError, match="`shared_hidden_units` must be"):
        GatedSharedMoE(2, 4, shared_hidden_units=0)
