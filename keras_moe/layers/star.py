"""STAR: an MLP for each scenario, whose weights are those of a shared MLP, modulated.

Axis letters: n rows, d input features, p scenarios, h hidden units, u output units.

A layer of the star topology (Sheng et al. 2021, section 4.3): for a row of
scenario p, with shared weights W, b and the scenario's W_p, b_p,
y = f((W_p * W) x + b_p + b), where * is element-wise.
The inputs of the first layer are normalized by scenario (`PartitionedNormalization`),
and an auxiliary network, which reads an embedding of the scenario beside the inputs, is
added to the last layer before its activation (section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks
from keras_moe._layer import given_or_attached
from keras_moe.experts._stacked import activation_function
from keras_moe.initializers import independent
from keras_moe.layers._mlp_layer import MLPLayer
from keras_moe.layers._parts import layer_name
from keras_moe.layers._scenarios import (
    check_scenario_shape,
    checked_scenario,
    scenario_index,
)
from keras_moe.layers.partitioned_normalization import PartitionedNormalization


@keras.saving.register_keras_serializable("keras_moe")
class STAR(MLPLayer):
    """Star topology: one MLP for several scenarios, adapted to the scenario of a row.

    The shared weights learn from the rows of all scenarios, those of a scenario only
    from its own. All scenarios start as the shared MLP: their kernels are ones and
    their biases zeros.

    Args:
        units: int or sequence of ints, the widths of the layers.
        num_scenarios: int, number of scenarios p.
        final_activation: activation of the last layer, after the auxiliary network is
            added. Linear by default; "sigmoid" with `units=(..., 1)` is the paper's
            whole model.
        normalization: bool, whether the inputs of the MLP are normalized by a
            `PartitionedNormalization`.
        auxiliary_units: sequence of ints, the widths of the hidden layers of the
            auxiliary network, which is shared by all scenarios. None: no such network.
        embedding_units: int, width of the scenario embedding that the auxiliary network
            reads beside `inputs`.
        activation: activation of the hidden layers.
        use_bias: bool, whether every layer adds its biases.
        dropout: float in [0, 1), fraction of each hidden layer's units to drop.
        kernel_initializer: initializer of the shared kernels; each layer gets its own
            draw.
        kernel_regularizer: regularizer of the shared kernels. The scenarios' kernels,
            which are factors around 1, have none.
        seed: int, the seed of the dropout.

    Call arguments:
        inputs: tensor of shape `(..., d)`.
        scenario: integer tensor of the leading axes of `inputs`, the scenario of each
            row, in [0, p). Rows with another id get the shared MLP alone, and a zero
            embedding.
        mask: bool tensor of the leading axes, False for rows to exclude from the
            moments of the normalization.
        training: bool, whether dropout is active and batch moments are used.

    Returns:
        A tensor of shape `(..., units[-1])`.

    Raises:
        ValueError: if an argument is invalid, `scenario` does not hold integers, or its
            shape is not that of the leading axes of `inputs`.

    Example:

    >>> star = keras_moe.layers.STAR((32, 1), num_scenarios=3, auxiliary_units=(8,))
    >>> star(np.ones((2, 8)), np.array([0, 2])).shape == (2, 1)
    True

    Every layer computes each row for all scenarios and for the shared MLP, and selects
    one: the shapes are static, at p + 1 times the cost of a `Dense` layer. With many
    scenarios, group them.

    As in the paper, the auxiliary network has a linear last layer; it reads the inputs
    before the normalization.

    References:
        - [Sheng et al., 2021: One Model to Serve All: Star Topology Adaptive
          Recommender for Multi-Domain CTR Prediction](
          https://arxiv.org/abs/2101.11427)
    """

    def __init__(
        self,
        units: int | Sequence[int],
        num_scenarios: int,
        *,
        final_activation: Any = None,
        normalization: bool = True,
        auxiliary_units: int | Sequence[int] | None = None,
        embedding_units: int = 8,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=layer_name(name, "star"), **kwargs)
        self.units = _checks.unit_sizes("units", units)
        self.num_scenarios = _checks.positive_int("num_scenarios", num_scenarios)
        self.final_activation = activation_function(
            "final_activation", final_activation
        )
        self.normalization = _checks.flag("normalization", normalization)
        self.auxiliary_units = None
        self.embedding_units = _checks.positive_int("embedding_units", embedding_units)
        if normalization:
            self.norm = PartitionedNormalization(
                num_scenarios, dtype=self.dtype_policy, name="norm"
            )
        if auxiliary_units is not None:
            self.auxiliary_units = _checks.unit_sizes(
                "auxiliary_units", auxiliary_units, allow_empty=True
            )
            self.auxiliary = self.make_mlps(
                1,
                (*self.auxiliary_units, self.units[-1]),
                name="auxiliary",
                kernel_initializer=independent(self.kernel_initializer, *b"auxiliary"),
                seed=_checks.next_seed(self.seed, 1),
            )
        if self.dropout > 0.0:
            self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.kernels: list[Any] = []
        self.biases: list[Any] = []
        self.scenario_kernels: list[Any] = []
        self.scenario_biases: list[Any] = []

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        features = _checks.last_dimension(type(self).__name__, inputs_shape)
        check_scenario_shape(scenario_shape, inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        if self.normalization:
            self.norm.build(inputs_shape)
        if self.auxiliary_units is not None:
            self.embedding = self.add_weight(
                name="scenario_embedding",
                shape=(self.num_scenarios, self.embedding_units),
                initializer="uniform",
            )
            self.auxiliary.build((None, features + self.embedding_units))
        for i, units in enumerate(self.units):
            self._add_dense(i, features, units)
            features = units

    def _add_dense(self, i: int, features: int, units: int) -> None:
        # Products of kernels are computed in the weights' dtype, hence no autocast.
        p = self.num_scenarios
        self.kernels.append(
            self.add_weight(
                name=f"kernel_{i}",
                shape=(features, units),
                initializer=independent(self.kernel_initializer, i),
                regularizer=self.kernel_regularizer,
                autocast=False,
            )
        )
        self.scenario_kernels.append(
            self.add_weight(
                name=f"scenario_kernel_{i}",
                shape=(p, features, units),
                initializer="ones",
                autocast=False,
            )
        )
        if not self.use_bias:
            return
        for biases, name, shape in (
            (self.biases, f"bias_{i}", (units,)),
            (self.scenario_biases, f"scenario_bias_{i}", (p, units)),
        ):
            biases.append(
                self.add_weight(
                    name=name, shape=shape, initializer="zeros", autocast=False
                )
            )

    def call(
        self,
        inputs: Any,
        scenario: Any,
        mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        mask = given_or_attached(mask, inputs)
        scenario = checked_scenario(scenario, inputs)
        inputs = ops.cast(inputs, self.compute_dtype)  # Inputs may be integers.
        leading = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        index = scenario_index(scenario, self.num_scenarios)  # (n,)
        hidden = rows
        if self.normalization:
            if mask is not None:
                mask = ops.reshape(mask, (-1,))
            hidden = self.norm(rows, index, mask=mask, training=training)
        last = len(self.units) - 1
        for i in range(last):
            hidden = self.activation(self._star_layer(i, hidden, index))
            if training and self.dropout > 0.0:
                hidden = keras.random.dropout(
                    hidden, self.dropout, seed=self.seed_generator
                )
        outputs = self._star_layer(last, hidden, index)
        if self.auxiliary_units is not None:
            outputs = outputs + self._auxiliary(rows, index, training)
        outputs = self.final_activation(outputs)
        return ops.reshape(outputs, (*_backend.restored_axes(leading), self.units[-1]))

    def _star_layer(self, i: int, rows: Any, index: Any) -> Any:
        """(n, in) -> (n, out): the layer of each row's scenario, without activation."""
        p, units = self.num_scenarios, self.units[i]
        kernel = ops.expand_dims(self.kernels[i], 0)
        kernels = ops.concatenate([kernel * self.scenario_kernels[i], kernel])
        kernels = ops.reshape(ops.transpose(kernels, (1, 0, 2)), (-1, (p + 1) * units))
        outputs = ops.matmul(rows, ops.cast(kernels, rows.dtype))
        outputs = ops.reshape(outputs, (-1, p + 1, units))
        if self.use_bias:
            bias = ops.expand_dims(self.biases[i], 0)
            biases = ops.concatenate([bias + self.scenario_biases[i], bias])
            outputs = outputs + ops.cast(biases, rows.dtype)
        own = ops.one_hot(index, p + 1, dtype="bool")[..., None]
        # `where` instead of a product: another scenario may overflow.
        return ops.sum(ops.where(own, outputs, ops.zeros_like(outputs)), axis=1)

    def _auxiliary(self, rows: Any, index: Any, training: bool | None) -> Any:
        unknown = ops.zeros((1, self.embedding_units), dtype=self.compute_dtype)
        table = ops.cast(self.embedding, self.compute_dtype)
        embedded = ops.take(ops.concatenate([table, unknown]), index, axis=0)
        features = ops.concatenate([embedded, rows], axis=-1)
        return ops.squeeze(self.auxiliary(features, training=training), axis=-2)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        scenario_shape: tuple[int | None, ...] | None = None,
    ) -> tuple[int | None, ...]:
        return (*inputs_shape[:-1], self.units[-1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "num_scenarios": self.num_scenarios,
            "final_activation": keras.activations.serialize(self.final_activation),
            "normalization": self.normalization,
            "auxiliary_units": self.auxiliary_units,
            "embedding_units": self.embedding_units,
        }
