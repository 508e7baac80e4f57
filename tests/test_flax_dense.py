"""Block-sparse dense layers of Linen and NNX against dense ones in float64, their patterns, and pruning."""

from __future__ import annotations

import itertools
from typing import Any, cast

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import NamedSharding

import jax_bsk.flax
from jax_bsk import BSR
from jax_bsk.flax._dense import BlockPattern
from jax_bsk.matmul.pruning import balanced_mask, cubic_density, magnitude_mask, prune

LinenDense, NnxDense = jax_bsk.flax.linen.BlockSparseDense, jax_bsk.flax.nnx.BlockSparseDense
IN, OUT, BLOCK = 100, 70, (32, 16)  # a grid of 4 x 5 whose last row and column of blocks stick out
FRAMEWORKS = pytest.mark.parametrize("framework", ["linen", "nnx"])


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def inputs(*batch: int, size: int = IN) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((*(batch or (6,)), size)), jnp.float32)


def numbers(key, shape, dtype=jnp.float32):
    """An initializer that needs no compiling, which is most of the time of these tests."""
    return jnp.asarray(np.random.default_rng(shape[0]).standard_normal(shape), dtype)


def make(framework: str, in_features: int = IN, features: int = OUT, **options):
    """A jitted function of (parameters, inputs), the parameters, and the pattern: a layer, whichever the framework."""
    options = {"block_size": BLOCK, "kernel_init": numbers, "bias_init": numbers} | options
    if framework == "linen":
        layer = LinenDense(features, **options)
        params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, in_features)))["params"]
        return jax.jit(lambda p, x: layer.apply({"params": p}, x)), params, layer.block_pattern(in_features)
    module = nnx.jit(lambda: NnxDense(in_features, features, rngs=nnx.Rngs(0), **options))()
    graph, state = nnx.split(module)
    leaves = jax.tree.structure(state)
    params = nnx.to_pure_dict(state)
    return jax.jit(lambda p, x: nnx.merge(graph, leaves.unflatten(jax.tree.leaves(p)))(x)), params, module.pattern


def dense_kernel(params, pattern) -> np.ndarray:
    return np.asarray(pattern.matrix(params["kernel"]).to_dense(), np.float64)


def stored(pattern) -> np.ndarray:
    """bool [in_features, features]: which numbers of the kernel are stored."""
    (m, k), (bm, bk) = pattern.shape, pattern.block_size
    return pattern.mask.repeat(bm, 0).repeat(bk, 1)[:m, :k]


def close(actual, expected):
    """float32 sums in another order."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# ---- The layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "features", "options"),
    [
        (IN, OUT, {"density": 0.4}),
        (20, 12, {"density": 1.0, "block_size": None, "use_bias": False}),  # less than a block
        (IN, OUT, {"pattern": np.eye(4, 5, dtype=bool)}),  # the last outputs have no block
        (IN, OUT, {"pattern": np.zeros((4, 5), bool)}),
    ],
)
def test_values_and_gradients(in_features, features, options):
    x = inputs(2, 3, size=in_features)
    apply, params, pattern = make("linen", in_features, features, **options)
    kernel = dense_kernel(params, pattern)
    assert params["kernel"].shape == (pattern.mask.sum(), *pattern.block_size)
    assert ("bias" in params) == options.get("use_bias", True)

    def loss(params, x):
        out = apply(params, x)
        return jnp.sin(out).sum(), out

    (gradients, dx), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    want = np.asarray(x, np.float64) @ kernel + np.asarray(params.get("bias", 0), np.float64)
    close(out, want)
    slope = np.cos(want)
    assert gradients["kernel"].shape == params["kernel"].shape  # the blocks alone
    full = np.einsum("abi,abo->io", np.asarray(x, np.float64), slope)
    close(pattern.matrix(gradients["kernel"]).to_dense(), np.where(stored(pattern), full, 0))
    close(dx, slope @ kernel.T)
    if "bias" in params:
        close(gradients["bias"], slope.sum((0, 1)))


def test_linen_and_nnx_agree():
    """Same arguments, same pattern; same parameters, same numbers and gradients."""
    (linen, params, one), (module, other_params, two) = make("linen", density=0.4), make("nnx", density=0.4)
    assert one == two
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, other_params)
    results = [
        jax.jit(jax.value_and_grad(lambda p, x, apply=apply: jnp.sin(apply(p, x)).sum(), (0, 1)))(params, inputs())
        for apply in (linen, module)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@FRAMEWORKS
def test_vmap_over_inputs_and_parameters(framework):
    apply, params, pattern = make(framework, density=0.4)
    x, kernel = inputs(2, 2), dense_kernel(params, pattern)
    both = jax.tree.map(lambda p: jnp.stack([p, -2 * p]), params)
    want = np.asarray(x, np.float64) @ kernel + np.asarray(params["bias"], np.float64)
    close(jax.jit(jax.vmap(jax.vmap(apply, (0, None)), (None, 0), 1))(both, x), [want, -2 * want])
    close(apply(params, x[0, 0]), want[0, 0])


@FRAMEWORKS
def test_types(framework):
    x = inputs()
    apply, params, pattern = make(framework, density=0.4, dtype=jnp.bfloat16)
    assert params["kernel"].dtype == jnp.float32
    out = apply(params, x)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) @ dense_kernel(params, pattern) + np.asarray(params["bias"], np.float64)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2 * np.abs(want).max())
    apply, params, _ = make(framework, density=0.4, param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    assert jax.eval_shape(apply, params, x).dtype == jnp.float32  # promoted, as in Flax
    assert jax.eval_shape(apply, params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@FRAMEWORKS
def test_implementation_is_passed_on(framework, monkeypatch):
    seen = []

    def product(a, b, **options):
        seen.append(options)
        return a @ b.to_dense()

    monkeypatch.setattr("jax_bsk.flax._dense.sparse_matmul", product)
    choices: tuple[dict[str, Any], ...] = {}, {"implementation": "xla"}
    for options in choices:
        apply, params, _ = make(framework, density=0.4, **options)
        seen.clear()
        jax.eval_shape(apply, params, inputs())
        assert seen == [{"implementation": options.get("implementation")}]


@FRAMEWORKS
def test_training_lowers_the_loss(framework):
    x, target = inputs(32), jnp.asarray(np.random.default_rng(1).standard_normal((32, OUT)), jnp.float32)
    apply, params, pattern = make(framework, density=0.5)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - target) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    # What sticks out of the kernel was 0 at first, has no gradient, and stays so.
    outside = pattern.lists[1] == 4
    assert outside.any()
    assert not np.asarray(params["kernel"])[outside, :, OUT % BLOCK[1] :].any()


def test_nnx_transformations_trace_once_for_equal_layers():
    traces = []

    @nnx.jit
    def step(module, optimizer, x):
        traces.append(1)
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(module)
        optimizer.update(module, gradients)
        return loss

    def layer():
        return NnxDense(IN, OUT, 0.4, block_size=BLOCK, kernel_init=numbers, rngs=nnx.Rngs(0))

    losses, descent = [], optax.sgd(0.1)
    for module in (layer(), layer()):
        optimizer = nnx.Optimizer(module, descent, wrt=nnx.Param)
        losses += [step(module, optimizer, inputs()) for _ in range(2)]
    assert len(traces) == 1
    assert losses[1] < losses[0] == losses[2]


def test_the_state_is_the_parameters_alone():
    call = nnx.jit(lambda module, x: module(x))
    module = NnxDense(IN, OUT, 0.4, block_size=BLOCK, kernel_init=numbers, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    hash(graph)
    assert set(nnx.to_pure_dict(state)) == {"kernel", "bias"}
    np.testing.assert_array_equal(call(nnx.merge(graph, state), inputs()), call(module, inputs()))
    again = NnxDense(IN, OUT, 0.4, block_size=BLOCK, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(1))
    nnx.update(again, jax.tree.map(np.asarray, nnx.to_pure_dict(state)))
    np.testing.assert_array_equal(call(again, inputs()), call(module, inputs()))

    layer = LinenDense(OUT, pattern=module.pattern.mask.copy(), block_size=BLOCK)
    assert hash(layer) == hash(layer.clone())
    variables = {"params": nnx.to_pure_dict(state)}
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    np.testing.assert_array_equal(jax.jit(layer.apply)(restored, inputs()), call(module, inputs()))


def test_partitioning_names_are_those_of_the_blocks():
    names, mesh = ("blocks", None, None), jax.make_mesh((2,), ("blocks",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nn.with_partitioning(numbers, names)
        layer = LinenDense(64, density=0.5, block_size=32, kernel_init=init)
        variables = jax.jit(layer.init)(jax.random.key(0), inputs(size=64))
        assert variables["params"]["kernel"].names == names
        init = nnx.with_partitioning(numbers, names)
        module = NnxDense(64, 64, 0.5, block_size=32, kernel_init=init, rngs=nnx.Rngs(0))
        assert isinstance(sharding := module.kernel[...].sharding, NamedSharding)
        assert sharding.spec[0] == "blocks"
        out = jax.jit(layer.apply)(variables, inputs(size=64)), nnx.jit(lambda m, x: m(x))(module, inputs(size=64))
    want = np.asarray(inputs(size=64), np.float64) @ np.asarray(module.matrix.to_dense(), np.float64)
    close(out[0], want)
    close(out[1], want)


# ---- Initial numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", ["lecun_normal", "he_uniform", "glorot_normal"])
def test_variance_is_that_of_what_is_stored(initializer):
    """A quarter of the blocks: as of dense layers with a quarter of the inputs (and of the outputs)."""
    fan_in, fan_out = 512 / 4, 1024 / 4
    want = {"lecun_normal": 1 / fan_in, "he_uniform": 2 / fan_in, "glorot_normal": 2 / (fan_in + fan_out)}[initializer]
    init = getattr(nn.initializers, initializer)()
    _, params, _ = make("linen", 512, 1024, density=0.25, block_size=32, kernel_init=init)
    kernel = np.asarray(params["kernel"], np.float64)
    assert kernel.var() == pytest.approx(want, rel=0.02)
    assert np.unique(kernel).size > 0.95 * kernel.size  # no number twice but by chance


def test_each_output_has_the_variance_of_its_own_inputs():
    mask = np.zeros((16, 2), bool)
    mask[:, 0], mask[3, 1] = True, True
    init = nnx.initializers.lecun_uniform()
    _, params, pattern = make("nnx", 500, 128, pattern=mask, block_size=(32, 64), kernel_init=init)
    kernel = dense_kernel(params, pattern)
    assert kernel[:, :64].var() == pytest.approx(1 / 500, rel=0.05)
    assert kernel[96:128, 64:].var() == pytest.approx(1 / 32, rel=0.1)


def test_a_constant_stays_a_constant_and_nothing_sticks_out():
    _, params, pattern = make("linen", density=0.4, kernel_init=nn.initializers.constant(3.0))
    np.testing.assert_array_equal(dense_kernel(params, pattern), 3.0 * stored(pattern))
    assert np.asarray(params["kernel"]).sum() == 3.0 * stored(pattern).sum()  # padding included


# ---- Patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "density"),
    [(4, 4, 0.25), (8, 16, 0.2), (5, 7, 0.4), (6, 4, 0.99), (1, 5, 1), (7, 1, 1), (24, 36, 0.1)],
)
def test_balanced_masks(rows, columns, density):
    masks = [balanced_mask(rows, columns, density, seed) for seed in range(4)]
    for mask in masks:
        assert mask.sum() == round(density * rows * columns)
        assert all(counts.min() > 0 and np.ptp(counts) <= 1 for counts in (mask.sum(0), mask.sum(1)))
    np.testing.assert_array_equal(masks[0], balanced_mask(rows, columns, density, 0))
    if density < 0.5:
        assert not all((masks[0] == mask).all() for mask in masks[1:])


def test_balanced_masks_are_drawn_alike():
    """All six masks of 4 rows, 4 columns and 4 blocks each way would be permutations: 24 of them, each as often."""
    seen: dict = {}
    for seed in range(1200):
        mask = balanced_mask(4, 4, 0.25, seed).tobytes()
        seen[mask] = seen.get(mask, 0) + 1
    assert len(seen) == 24
    assert min(seen.values()) > 20
    assert max(seen.values()) < 90  # 50 each, in the mean


def test_a_seed_means_the_same_mask_forever():
    """Checkpoints hold no pattern: this one was written down when the function was made."""
    rows = ["0101100", "0010011", "1000101", "0111000", "1000010"]
    want = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(balanced_mask(5, 7, 0.4), want)


def test_a_pattern_of_a_bsr_has_its_lists():
    dense = np.random.default_rng(1).standard_normal((IN, OUT)).astype(np.float32)
    matrix = BSR.from_dense(dense, BLOCK, keep=balanced_mask(4, 5, 0.5, seed=3))
    layer = LinenDense(OUT, pattern=matrix, use_bias=False)
    out = jax.jit(layer.apply)({"params": {"kernel": matrix.data}}, inputs())
    close(out, np.asarray(inputs(), np.float64) @ np.asarray(matrix.to_dense(), np.float64))
    for mine, its in zip(layer.block_pattern(IN).lists, (matrix.indptr, matrix.indices), strict=True):
        np.testing.assert_array_equal(mine, its)
    module = NnxDense(IN, OUT, pattern=layer.block_pattern(IN), kernel_init=numbers, rngs=nnx.Rngs(0))
    assert module.matrix.density == pytest.approx(0.5)
    assert hash(module.pattern) == hash(layer.block_pattern(IN))
    assert BlockPattern.of(matrix).density == 0.5


# ---- Pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16)])
def test_the_largest_blocks_are_kept(norm, kind):
    kernel = kind(np.random.default_rng(2).standard_normal((IN, OUT)).astype(np.float32))
    exact, (bm, bk) = np.asarray(kernel, np.float64), BLOCK
    order = {"l2": 2, "l1": 1, "max": np.inf}[norm]
    sizes = {
        (i, j): np.linalg.norm(exact[i * bm : (i + 1) * bm, j * bk : (j + 1) * bk].ravel(), order)
        for i, j in itertools.product(range(4), range(5))
    }
    for count in (0, 1, 7, 19, 20):
        want = set(sorted(sizes, key=lambda place: -sizes[place])[:count])
        got = magnitude_mask(kernel, count / 20, BLOCK, norm)
        assert {(int(i), int(j)) for i, j in np.argwhere(got)} == want
    matrix = prune(kernel, 7 / 20, BLOCK, norm)
    kept = magnitude_mask(kernel, 7 / 20, BLOCK, norm).repeat(bm, 0).repeat(bk, 1)[:IN, :OUT]
    assert matrix.dtype == kernel.dtype
    np.testing.assert_array_equal(np.asarray(matrix.to_dense(), np.float64), np.where(kept, exact, 0))


def test_equal_blocks_are_kept_in_order():
    np.testing.assert_array_equal(magnitude_mask(np.ones((64, 64)), 0.5, 32), [[True, True], [False, False]])


@FRAMEWORKS
@pytest.mark.parametrize(
    ("how", "options"),
    [({"density": 0.4}, {}), ({"density": 1.0}, {"use_bias": False, "dtype": jnp.bfloat16})],
)
def test_a_pruned_dense_layer(framework, how, options):
    """Its outputs are those of the dense layer with zeros in place of the other blocks; at density 1, of itself."""
    x, options = inputs(), {"kernel_init": numbers, "bias_init": numbers} | options
    if framework == "linen":
        dense = nn.Dense(OUT, **options)
        params: Any = dense.init(jax.random.key(0), x)["params"]
        layer, pruned = LinenDense.from_dense(dense, params, block_size=BLOCK, **how)
        assert set(pruned) == set(params)
        got, pattern = jax.jit(layer.apply)({"params": pruned}, x), layer.block_pattern(IN)
        want: Any = dense.apply({"params": {**params, "kernel": jnp.where(stored(pattern), params["kernel"], 0)}}, x)
    else:
        linear = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0), **options)
        module = NnxDense.from_linear(linear, block_size=BLOCK, **how)
        got, pattern = nnx.jit(lambda m, x: m(x))(module, x), module.pattern
        linear.kernel[...] = jnp.where(stored(pattern), linear.kernel[...], 0)
        want = linear(x)
    assert got.dtype == want.dtype
    assert pattern.density == pytest.approx(how["density"])
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=np.abs(want).max() * (2e-2 if "dtype" in options else 2e-6))


def test_what_decides_the_blocks_that_stay():
    """The norm that is asked for, or a pattern; and the dense layer stays as it is."""
    dense, linear = nn.Dense(OUT), nnx.Linear(IN, OUT, kernel_init=numbers, rngs=nnx.Rngs(0))
    kernel, chosen = np.asarray(linear.kernel[...]), balanced_mask(4, 5, 0.3)
    cases: tuple[tuple[dict[str, Any], np.ndarray], ...] = (
        ({"density": 0.4}, magnitude_mask(kernel, 0.4, BLOCK)),
        ({"density": 0.4, "norm": "max"}, magnitude_mask(kernel, 0.4, BLOCK, "max")),
        ({"pattern": chosen}, chosen),
    )
    for how, mask in cases:
        want = BSR.from_dense(kernel, BLOCK, keep=mask)
        module = NnxDense.from_linear(linear, block_size=BLOCK, **how)
        layer, params = LinenDense.from_dense(dense, {"kernel": kernel, "bias": kernel[0]}, block_size=BLOCK, **how)
        assert layer.block_pattern(IN) == module.pattern
        for matrix in (module.matrix, module.pattern.matrix(params["kernel"])):
            jax.tree.map(np.testing.assert_array_equal, matrix, want)
    assert module.bias is not None
    assert linear.bias is not None
    module.bias[...] = module.bias[...] + 1
    assert not np.asarray(linear.bias[...]).any()
    np.testing.assert_array_equal(linear.kernel[...], kernel)


def test_the_schedule_of_gradual_pruning():
    assert [cubic_density(step, 10, 20, 0.1) for step in (0, 10, 20, 99)] == pytest.approx([1, 1, 0.1, 0.1])
    assert cubic_density(15, 10, 20, 0.1, 0.6) == pytest.approx(0.1 + 0.5 / 8)
    densities = [cubic_density(step, 10, 20, 0.1) for step in range(10, 21)]
    steps = np.diff(densities)
    assert (steps < 0).all()
    assert (np.diff(steps) > 0).all()  # fast at first
    with pytest.raises(ValueError, match="begins before it ends"):
        cubic_density(0, 5, 5, 0.1)


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@FRAMEWORKS
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "either density .* or pattern"),
        ({"density": 0.5, "pattern": np.ones((4, 5), bool)}, ValueError, "either density .* or pattern"),
        ({"density": 1.5}, ValueError, r"in \[0, 1\]"),
        ({"density": 0.1}, ValueError, "density of 0.25 or more, or smaller blocks"),
        ({"pattern": np.ones((4, 5))}, TypeError, "boolean .*magnitude_mask"),
        (
            {"pattern": np.ones((5, 4), bool)},
            ValueError,
            r"has \(4, 5\) blocks of \(32, 16\), but the pattern is \(5, 4\)",
        ),
        ({"pattern": np.ones(20, bool)}, ValueError, "a bool for each block"),
        ({"pattern": BSR.from_dense(np.ones((IN, OUT)), 16)}, ValueError, "leave out block_size"),
        (
            {"pattern": BSR.from_dense(np.ones((IN - 1, OUT)), BLOCK), "block_size": None},
            ValueError,
            r"of a matrix \(99, 70\)",
        ),
        ({"density": 0.5, "block_size": 0}, ValueError, "block_size must be positive"),
    ],
)
def test_mistakes_in_the_pattern_are_named(framework, options, error, says):
    with pytest.raises(error, match=says):
        make(framework, **options)


def test_lists_that_no_layer_can_have():
    matrix = BSR.from_dense(np.ones((64, 64), np.float32), 32)
    for indices, says in (([1, 0, 0, 1], "in order"), ([0, 0, 0, 1], "each once"), ([0, 1, 0, 5], "row 1")):
        bad = BSR(matrix.data, matrix.indptr, np.array(indices, np.int32), (64, 64))
        with pytest.raises(ValueError, match=says):
            LinenDense(64, pattern=bad)
    spare = BSR(np.zeros((5, 32, 32)), matrix.indptr, np.array([0, 1, 0, 1, -1], np.int32), (64, 64))
    with pytest.raises(ValueError, match="no room to spare"):
        LinenDense(64, pattern=spare)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda mask: LinenDense(64, pattern=mask).features)(jnp.ones((2, 2), bool))


@FRAMEWORKS
def test_mistakes_in_the_call_are_named(framework):
    apply, params, _ = make(framework, density=0.5)
    says = "in_features" if framework == "nnx" else "kernel"
    with pytest.raises((ValueError, flax.errors.ScopeParamShapeError), match=says):
        apply(params, inputs(size=IN + 40))
    with pytest.raises(ValueError, match="in_features"):
        apply(params, jnp.float32(1))
    other = make(framework, density=0.6)[1]
    says = "density, seed and block_size" if framework == "nnx" else "kernel"
    with pytest.raises((ValueError, flax.errors.ScopeParamShapeError), match=says):
        apply(other, inputs())


def test_mistakes_in_pruning_are_named():
    kernel = np.ones((IN, OUT), np.float32)
    cases: tuple[tuple[tuple[Any, ...], type[Exception], str], ...] = (
        ((kernel, 1.2), ValueError, r"in \[0, 1\]"),
        ((kernel, 0.5, BLOCK, "l3"), ValueError, '"l2", "l1" or "max"'),
        ((kernel[0], 0.5), ValueError, "one by one"),
        (
            (np.where(np.arange(OUT) == 40, np.nan, kernel), 0.5, BLOCK),
            ValueError,
            r"block \(0, 2\) of kernel has a NaN",
        ),
    )
    for arguments, error, says in cases:
        with pytest.raises(error, match=says):
            magnitude_mask(*cast(tuple[Any, ...], arguments))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda kernel: prune(kernel, 0.5).data)(kernel)
    dense = nn.Dense(OUT)
    variables = dense.init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match=r'variables\["params"\]'):
        LinenDense.from_dense(dense, variables, 0.5)
    with pytest.raises(ValueError, match="dot_general"):
        LinenDense.from_dense(nn.Dense(OUT, dot_general=jax.lax.dot_general), variables["params"], 0.5)
    replaced = nnx.Linear(IN, OUT, dot_general=lambda *args, **kwargs: None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dot_general"):
        NnxDense.from_linear(replaced, 0.5)
    with pytest.raises(ValueError, match="either density"):
        NnxDense.from_linear(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)))
