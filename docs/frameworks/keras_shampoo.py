"""Shampoo as an optimizer of Keras 3, on the JAX backend.

    model.compile(optimizer=Shampoo(3e-3, weight_decay=0.1), loss=...)

compiles, fits, saves and loads as with Keras's own. It is one Optax transformation of all variables
by name, so any other Optax optimizer fits in the same way.
"""

import jax
import keras
import optax

import shampoo_jax


@keras.saving.register_keras_serializable("shampoo_jax")
class Shampoo(keras.optimizers.Optimizer):
    """Shampoo on kernels of hidden layers, AdamW on embeddings, vectors and the kernels `adamw`.

    Args:
      learning_rate: Number or schedule of Keras; callbacks may change it.
      adamw: Names of layers that AdamW takes: the output layer, which Keras's names do not tell.
      options: Of `shampoo_jax.shampoo`: numbers and names, which Keras can save.
    """

    def __init__(self, learning_rate=3e-3, adamw=(), name="shampoo", **options):
        super().__init__(learning_rate, name=name)
        self.adamw, self.options = tuple(adamw), options

    def transformation(self, learning_rate):
        """The Optax optimizer, of a dictionary from paths of variables to arrays."""
        return shampoo_jax.shampoo(learning_rate, preconditioned=self.takes, **self.options)

    def takes(self, path, leaf):
        """Whether Shampoo takes the variable of this path."""
        layers = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return shampoo_jax.is_hidden_matrix(path, leaf) and not set(self.adamw) & set(layers)

    def build(self, variables):
        """Makes a variable of every array of the state."""
        super().build(variables)
        self.trained = lambda: variables  # a list of them Keras would take for the optimizer's own
        state = self.transformation(0.0).init({v.path: v.value for v in variables})
        arrays, self.structure = jax.tree.flatten(state)
        self.arrays = [
            self.add_variable(x.shape, lambda *_, x=x, **__: x, str(x.dtype), name=f"state_{i}")
            for i, x in enumerate(arrays)
        ]

    def apply(self, grads, trainable_variables=None):
        """Moves all variables by one step."""
        if not self.built:
            self.build(trainable_variables)
        variables = trainable_variables or self.trained()
        params = {v.path: v.value for v in variables}
        named = dict(zip(params, grads, strict=True))  # two variables of one path end here
        state = self.structure.unflatten([v.value for v in self.arrays])
        tx = self.transformation(keras.ops.convert_to_tensor(self.learning_rate))
        updates, state = tx.update(named, state, params)
        params = optax.apply_updates(params, updates)
        for variable in variables:
            variable.assign(params[variable.path])
        for variable, array in zip(self.arrays, jax.tree.leaves(state), strict=True):
            variable.assign(array)
        self.iterations.assign_add(1)

    def get_config(self):
        """What Keras writes into a saved model."""
        known = {"learning_rate": super().get_config()["learning_rate"], "name": self.name}
        return known | {"adamw": list(self.adamw)} | self.options
