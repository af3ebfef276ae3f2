"""BiasBalancedRouter: groups by hand, and updates of the bias."""

import keras
import numpy as np

from keras_moe import losses
from tests.support.router_cases import array, arrays, make, on_logits, tokens


def logit(scores):
    scores = np.asarray(scores)
    return np.log(scores / (1 - scores))


def test_groups_by_hand():
    # Sums of the two best of each group: 0.9 + 0.1, 0.6 + 0.5, 0.8 + 0.05
    x = logit([[0.9, 0.1, 0.6, 0.5, 0.8, 0.05]])
    options = {"num_experts": 6, "num_groups": 3, "routed_scaling_factor": 2.5}
    one = on_logits(make("bias_balanced", top_k_groups=1, **options))
    found = arrays(one(x))
    assert found["expert_indices"].tolist() == [[2, 3]]
    np.testing.assert_allclose(
        found["combine_weights"], [[2.5 * 0.6 / 1.1, 2.5 * 0.5 / 1.1]], 1e-5
    )
    # The two best groups have 0.9, 0.1, 0.6 and 0.5: the expert with 0.8 is out.
    two = on_logits(make("bias_balanced", top_k_groups=2, **options))
    assert array(two(x).expert_indices).tolist() == [[0, 2]]
    # A bias for all moves nothing, also where it makes every score negative.
    two.expert_bias.assign(np.full(6, -2.0))
    assert array(two(x).expert_indices).tolist() == [[0, 2]]
    # With 0.5 more for expert 4 the last group has 1.35: the best two are 1.3 and 0.6.
    two.expert_bias.assign([0, 0, 0, 0, 0.5, 0])
    found = arrays(two(x))
    assert found["expert_indices"].tolist() == [[4, 2]]
    # The weights know no bias: 0.8 and 0.6.
    np.testing.assert_allclose(
        found["combine_weights"], [[2.5 * 0.8 / 1.4, 2.5 * 0.6 / 1.4]], 1e-5
    )


def test_the_bias_follows_the_load_by_hand():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    router(x, training=False)
    assert (array(router.expert_bias) == 0).all()
    # Loads (3, 1, 1, 0), mean 1.25: one has more, three have less.
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.125, 0.125, 0.125, 0.125]
    # In the next step tokens 0 and 1 count, chosen once each: mean 0.5.
    optimizer_step(router)
    mask = np.array([True, False, True, False, False])
    router(x, mask=mask, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.0, 0.25, 0.25]
    # A token that is not finite does not count either, nor does an empty batch.
    for batch, counted in (
        (np.full((2, 4), np.nan), None),
        (x, np.zeros(5, bool)),
        (np.zeros((0, 4)), None),
    ):
        optimizer_step(router)
        router(batch, mask=counted, training=True)
    router.trainable = False
    optimizer_step(router)
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.0, 0.25, 0.25]


def optimizer_step(router):
    """Change the kernel, by which a router knows that an optimizer has made a step."""
    router.kernel.assign(router.kernel * (1 + 2**-20))


def test_the_bias_moves_once_for_all_batches_of_a_step():
    """Loads (3, 1, 1, 0), then (0, 1, 1, 3), together (3, 2, 2, 3): mean 2.5.

    The second batch is routed by the bias of the beginning, and counted twice it would
    change no sign: (3, 3, 3, 6) has the mean 3.75, (3, 2, 2, 3) and its double 2.5, 5.
    """
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.5))
    router.expert_bias.assign([0.0, 0.25, 0.0, 0.0])
    first, second = 4 * np.eye(4)[[0, 0, 1, 0, 2]], 4 * np.eye(4)[[1, 3, 3, 2, 3]]
    routed = [array(router(x).expert_indices) for x in (first, second)]
    for _ in range(2):  # The second time as recomputations.
        for x, expected in zip((first, second), routed, strict=True):
            found = array(router(x, training=True).expert_indices)
            np.testing.assert_array_equal(found, expected)
    assert array(router.expert_bias).tolist() == [-0.5, 0.75, 0.5, -0.5]
    optimizer_step(router)
    router(first, training=True)
    # The sigmoids differ by less than the bias: every token goes to expert 1.
    assert array(router.expert_bias).tolist() == [0.0, 0.25, 1.0, 0.0]


def test_assigning_the_bias_begins_a_step():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    router(x, training=True)
    router.expert_bias.assign([0.0, 0.0, 0.0, 0.5])
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [0.125, 0.125, 0.125, 0.375]


def test_the_bias_follows_every_call_if_the_kernel_is_frozen():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    router.kernel.trainable = False
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    for _ in range(2):
        router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_variables_of_a_step_are_not_weights():
    router = on_logits(make("bias_balanced"))
    assert [v.name for v in router.weights] == ["kernel", "expert_bias"]
    assert len(router.variables) == 6
    assert len(on_logits(make("bias_balanced", bias_update_rate=0.0)).variables) == 2


def test_the_bias_balances_a_skewed_router():
    x = tokens(256, 4) + np.array([2.0, 0, 0, 0])
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.01))

    def largest():
        return np.bincount(array(router(x).expert_indices)[:, 0], minlength=4).max()

    assert largest() > 180
    for _ in range(100):
        router(x, training=True)
        optimizer_step(router)
    assert largest() < 80
    variables = [v.name for v in router.trainable_variables]
    assert variables == ["kernel"]


def test_a_bias_in_half_precision_is_float32():
    router = on_logits(make("bias_balanced", dtype="bfloat16"))
    assert router.expert_bias.dtype == "float32"


def test_the_bias_is_updated_in_compiled_training():
    """`fit` with a compiler and without moves the bias and trains the kernel."""
    compilers = (False,) if keras.backend.backend() == "torch" else (False, True)
    for jit in compilers:
        layer = WeightsOnly(make("bias_balanced", bias_update_rate=0.125))
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile("sgd", "mse", jit_compile=jit)
        kernel = array(layer.router.kernel)
        x = tokens(64)
        x[:, 0] += 5
        model.fit(x, np.zeros((64, 2), "float32"), batch_size=32, verbose=0)
        assert set(np.abs(array(layer.router.expert_bias))) <= {0.0, 0.125, 0.25}
        assert array(layer.router.expert_bias).any()
        assert (array(layer.router.kernel) != kernel).any()


class WeightsOnly(keras.layers.Layer):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def build(self, input_shape):
        self.router.build(input_shape)

    def call(self, x, training=None):
        record = self.router(x, training=training)
        self.add_loss(
            losses.load_balancing_loss(record.router_probs, record.expert_indices)
        )
        return record.combine_weights
