"""Pruning masks against brute force, on every kind of tree, sharded, traced and exported."""

from fractions import Fraction
from functools import partial

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsereg_jax import pruning, thresholds
from sparsereg_jax.pruning import (
    apply_mask,
    check_pruning_mask,
    count_kept,
    full_mask,
    mask_blocks,
    mask_by_fraction,
    mask_by_rules,
    mask_by_sparsity,
    mask_by_threshold,
    mask_n_of_m,
    mask_units,
    pack_mask,
    unpack_mask,
)
from sparsereg_jax.selection import every_parameter, weights

RULES = {
    "threshold": partial(mask_by_threshold, threshold=0.5),
    "global": partial(mask_by_sparsity, sparsity=0.6),
    "tensor": partial(mask_by_sparsity, sparsity=0.6, scope="tensor"),
    "fraction": partial(mask_by_fraction, fraction=0.3),
    "n_of_m": partial(mask_n_of_m, n=2, m=4),
    "blocks": partial(mask_blocks, sparsity=0.5, block=(2, 2)),
    "units": partial(mask_units, sparsity=0.5),
}


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def model(seed=0):
    return {
        "encoder": {"kernel": normal(seed, 6, 5), "bias": normal(seed + 1, 5)},
        "decoder": [normal(seed + 2, 6, 5), None],
        "steps": jnp.zeros((), jnp.int32),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def out(pruning_mask):
    return [int((~np.asarray(keep)).sum()) for keep in jax.tree.leaves(pruning_mask)]


# Every rule.


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refines_and_leaves_the_others_alone(rule):
    params = model()
    once = RULES[rule](params)
    check_pruning_mask(params, once)
    assert out(once["encoder"]["bias"]) == [0]
    assert out(once["encoder"]["kernel"])[0] > 0
    given = jax.tree.map(
        lambda keep: keep & jnp.asarray(np.random.default_rng(3).random(keep.shape) < 0.6),
        full_mask(params),
    )
    given["steps"] = jnp.array(True)
    # Other weights now: what is out stays out although its weight is the largest.
    twice = RULES[rule](
        jax.tree.map(lambda p, k: jnp.where(k, p, 9) if p.ndim else p, params, given),
        pruning_mask=given,
    )
    for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(twice), strict=True):
        assert not np.any(np.asarray(after) & ~np.asarray(before))
    assert_same(twice["encoder"]["bias"], given["encoder"]["bias"])


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_the_same_under_jit_and_vmap(rule):
    trees = [model(seed) for seed in (0, 10, 20)]
    given = [mask_by_sparsity(params, 0.2) for params in trees]
    eager = [
        RULES[rule](params, pruning_mask=mask) for params, mask in zip(trees, given, strict=True)
    ]
    with jax.numpy_dtype_promotion("strict"):
        mapped = jax.jit(jax.vmap(lambda p, m: RULES[rule](p, pruning_mask=m)))(
            jax.tree.map(lambda *x: jnp.stack(x), *trees),
            jax.tree.map(lambda *x: jnp.stack(x), *given),
        )
    assert_same(mapped, jax.tree.map(lambda *x: jnp.stack(x), *eager))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_lowers_for_every_platform(rule):
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), model())
    exported = jax.export.export(jax.jit(RULES[rule]), platforms=["cpu", "cuda", "tpu"])(params)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    params = model()
    assert_same(exported.call(params), RULES[rule](params))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "global", "fraction", "n_of_m", "units"])
def test_masks_are_sharded_like_the_params(rule):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    params = {
        "w": jax.device_put(normal(0, 64, 256), spec),
        "v": jax.device_put(normal(1, 16, 128), spec),
    }
    mask = RULES[rule](params)
    assert_same(mask, RULES[rule](jax.device_get(params)))
    for keep in jax.tree.leaves(mask):
        assert keep.sharding.is_equivalent_to(spec, 2)
    assert full_mask(params)["w"].sharding.is_equivalent_to(spec, 2)
    if rule in ("threshold", "global", "fraction"):
        program = jax.jit(RULES[rule]).lower(params).compile().as_text()
        gathered = [line for line in program.splitlines() if " all-gather(" in line]
        # Per device and row at most: the counts, never the weights.
        assert not any("f32[" in line or "pred[" in line for line in gathered)


@pytest.mark.parametrize(
    "spec",
    [("x", None)]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ((None, "x"), (("x", "y"), None))],
)
@pytest.mark.parametrize(
    "rule",
    ["n_of_m", pytest.param("odd blocks", marks=pytest.mark.slow), "odd n_of_m"]
    + [pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule != "n_of_m"],
)
def test_masks_on_a_mesh_of_explicit_axes(rule, spec):
    """That of ``jax.make_mesh``, on which every array's type says how it is sharded."""
    odd = {
        "odd blocks": partial(mask_blocks, sparsity=0.5, block=(3, 5)),
        "odd n_of_m": partial(mask_n_of_m, n=2, m=5),
    }
    rule = (RULES | odd)[rule]
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=explicit, devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    weights = {"w": normal(0, 8, 16)}
    params = jax.device_put(weights, sharding)
    first = rule(params)
    again = rule(params, pruning_mask=mask_by_sparsity(params, 0.2))
    assert_same(jax.device_get(first), jax.device_get(rule(weights)))
    plain = rule(weights, pruning_mask=mask_by_sparsity(weights, 0.2))
    assert_same(jax.device_get(again), jax.device_get(plain))
    jitted = jax.jit(rule)(params)
    with jax.set_mesh(mesh):
        within = jax.jit(rule)(params)
    for mask in (jitted, within):
        assert_same(jax.device_get(mask), jax.device_get(first))
    for mask in (first, again, jitted, within):
        assert mask["w"].sharding.is_equivalent_to(sharding, 2)


TREES = {
    "dict": lambda w, b: {"w": w, "b": b},
    "tuple": lambda w, b: (w, b),
    "list with None": lambda w, b: [w, None, b],
    "FrozenDict": lambda w, b: flax.core.freeze({"w": w, "b": b}),
    "leaf": lambda w, b: w,
    "nnx.State": lambda w, b: nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0))),
    "keys": lambda w, b: {"w": w, "key": jax.random.key(0)},
}


@pytest.mark.parametrize("kind", TREES)
def test_containers(kind):
    params = TREES[kind](normal(0, 4, 6), normal(1, 6))
    mask = mask_by_fraction(params, 0.5)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert sum(out(mask)) == 12
    mask = mask_by_sparsity(params, 0.75, pruning_mask=mask)
    assert sum(out(mask)) == 18
    zeroed = apply_mask(params, mask)
    assert jax.tree.structure(zeroed) == jax.tree.structure(params)
    assert_same(unpack_mask(pack_mask(mask), params), mask)
    assert_same(unpack_mask(pack_mask(mask), mask), mask)
    assert [row.kept for row in pruning.summary(params, mask)] == [
        int(keep.sum()) for keep in jax.tree.leaves(mask) if keep.ndim
    ]
    assert_same(
        mask_by_rules(params, {".*": RULES["fraction"]}), mask_by_fraction(params, 0.3, mask=None)
    )


def test_empty_scalar_and_zero_size():
    assert full_mask({}) == {}
    assert float(pruning.sparsity({})) == 0
    assert count_kept({}) == 0
    params = {"none": jnp.zeros((0, 3)), "one": jnp.float32(2), "w": jnp.array([1.0, 3.0])}
    for rule in (RULES["global"], RULES["tensor"], RULES["fraction"], RULES["threshold"]):
        mask = rule(params, mask=every_parameter, floor=0)
        check_pruning_mask(params, mask)
        assert_same(unpack_mask(pack_mask(mask), params), mask)
    assert out(mask_by_sparsity(params, 1.0, mask=every_parameter)) == [0, 0, 1]
    assert out(mask_by_sparsity(params, 1.0, mask=every_parameter, floor=0)) == [0, 1, 2]
    empty = {"w": jnp.zeros((0, 3))}
    for rule in RULES.values():
        assert rule(empty)["w"].shape == (0, 3)


# Amounts.


def test_sparsity_is_exact_and_global():
    params = {"a": normal(0, 30, 40), "b": normal(1, 50, 20), "c": normal(2, 7)}
    values = np.abs(np.concatenate([np.ravel(params[k]) for k in "ab"]))
    given = None
    for share in (0.0, 0.1, 1 / 3, 0.3, 0.9, 0.99):  # 0.3 below 1/3: nothing more goes
        mask = mask_by_sparsity(params, share, pruning_mask=given)
        goal = max(round(share * 2200), sum(out(given)) if given else 0)
        kept = np.concatenate([np.ravel(mask[k]) for k in "ab"])
        np.testing.assert_array_equal(kept, values > np.sort(np.append(values, -1))[goal])
        assert out(mask["c"]) == [0]
        given = mask


def test_scopes():
    params = {"x": {"a": normal(0, 10, 10), "b": 9 * normal(1, 10, 10)}, "y": normal(2, 10, 10)}
    tensor = mask_by_sparsity(params, 0.35, scope="tensor")
    assert out(tensor) == [35, 35, 35]
    tree = mask_by_sparsity(params, 0.35, scope={"x": "left", "y": "right"})
    assert sum(out(tree["x"])) == 70
    assert out(tree["x"]["a"])[0] > 50
    assert out(tree["y"]) == [35]
    assert_same(tree, mask_by_sparsity(params, 0.35, scope=lambda path: path[0]))
    with pytest.raises(ValueError, match="neither 'global' nor 'tensor'"):
        mask_by_sparsity(params, 0.5, scope="layer")
    with pytest.raises(ValueError, match="scope: its structure"):
        mask_by_sparsity(params, 0.5, scope={"x": "left"})
    with pytest.raises(TypeError, match="'y' is 3, not a string"):
        mask_by_sparsity(params, 0.5, scope={"x": "left", "y": 3})


def test_tensors_are_apart_even_with_one_path():
    small = jnp.arange(1.0, 9.0).reshape(2, 4)
    params = {"x/y": small, "x": {"y": 100 * small}}
    assert out(mask_by_sparsity(params, 0.5, scope="tensor")) == [4, 4]


def test_python_numbers_are_leaves():
    params = {"temperature": 1.0, "w": normal(0, 2, 2)}
    assert weights(params) == {"temperature": False, "w": True}
    assert out(mask_by_sparsity(params, 0.5)) == [0, 2]
    assert out(mask_by_sparsity(params, 0.4, mask=every_parameter, floor=0)) == out(
        mask_by_sparsity(
            {**params, "temperature": jnp.ones(())}, 0.4, mask=every_parameter, floor=0
        )
    )


def test_fraction_is_of_what_remains():
    params = {"a": normal(0, 30, 40), "b": normal(1, 50, 20)}
    mask, remaining = full_mask(params), 2200
    for fraction in (0.2, 0.5, jnp.float32(0.3), 0.0, 0.9):
        values = np.abs(np.concatenate([np.ravel(params[k]) for k in "ab"]))
        values = values[np.concatenate([np.ravel(mask[k]) for k in "ab"])]
        mask = mask_by_fraction(params, fraction, pruning_mask=mask)
        if not isinstance(fraction, float):
            fraction = Fraction(float(fraction))
        drop = round(fraction * remaining)
        remaining -= drop
        kept = np.concatenate([np.ravel(jnp.where(mask[k], jnp.abs(params[k]), -1)) for k in "ab"])
        np.testing.assert_array_equal(np.sort(kept[kept >= 0]), np.sort(values)[drop:])
    assert count_kept(mask) == remaining


@pytest.mark.slow
def test_python_numbers_round_as_in_python_and_traced_ones_exactly():
    params = {"w": jnp.arange(1.0, 11.0)[None]}
    half = mask_by_sparsity(params, 0.5)
    for share in (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85):
        assert out(mask_by_sparsity(params, share, floor=0)) == [round(share * 10)]
        assert out(mask_by_fraction(params, share, floor=0)) == [round(share * 10)]
        after = mask_by_fraction(params, share, pruning_mask=half, floor=0)
        assert out(after) == [5 + round(share * 5)]
        jitted = jax.jit(mask_by_fraction, static_argnums=1)(params, share)
        assert out(jitted) == [round(Fraction(share) * 10)]
        traced = jax.jit(mask_by_fraction)(params, jnp.float32(share))
        assert out(traced) == [round(Fraction(float(np.float32(share))) * 10)]


def test_floors():
    params = {"small": jnp.full((3, 3), 1e-3).at[0, 0].set(1e-2), "large": normal(0, 20, 20) + 9}
    mask = mask_by_sparsity(params, 0.5)
    assert count_kept(mask) == 409 - round(0.5 * 409)
    assert mask["small"].tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert count_kept(mask_by_sparsity(params, 0.5, floor=5)["small"]) == 5
    assert count_kept(mask_by_sparsity(params, 0.5, floor=0)["small"]) == 0
    assert count_kept(mask_by_fraction(params, 1.0, floor=4)) == 8
    assert count_kept(mask_by_threshold(params, 1e9, floor=2)) == 4
    assert count_kept(mask_by_threshold(params, 1e9, floor=0)) == 0
    # A tensor with less than its floor keeps what it has.
    twice = mask_by_fraction(params, 0.5, pruning_mask=mask, floor=3)
    assert_same(twice["small"], mask["small"])


def test_ties():
    params = {"a": jnp.ones((2, 3)), "b": jnp.array([[1.0, -1.0, 2.0]])}
    assert out(mask_by_sparsity(params, 0.5, floor=0)) == [6, 2]
    exact = mask_by_sparsity(params, 0.5, floor=0, exact_ties=True)
    assert exact["a"].tolist() == [[False] * 3, [False, True, True]]  # round(4.5) = 4
    assert out(exact["b"]) == [0]
    exact = mask_by_sparsity(params, 7 / 9, exact_ties=True)  # one of a stays, by its floor
    assert out(exact) == [5, 2]
    assert bool(exact["a"][1, 2])


def test_threshold_compares_bits():
    least = np.float32(1e-45)
    values = np.array([[0, -0.0, least, -least, 2 * least, 1, np.inf, -np.inf, np.nan]], np.float32)
    params = {"w": jnp.asarray(values)}

    def kept(threshold):
        return mask_by_threshold(params, threshold, floor=0)["w"][0].tolist()

    finite = values[0, :6].astype(np.float64)
    for threshold in (0.0, -0.0, float(least), 2 * float(least), 0.5, 1.0, -1.0, -float(least)):
        assert kept(threshold) == [*(np.abs(finite) > threshold).tolist(), True, True, True]
        assert kept(jnp.float32(threshold)) == kept(threshold)
    assert kept(np.inf) == [False] * 8 + [True]
    traced = jax.jit(lambda threshold: mask_by_threshold(params, threshold, floor=0))
    assert traced(jnp.float32(np.nan))["w"].all()
    half = {"w": jnp.array([[1.0, 1.0078125, 0.99609375]], jnp.bfloat16)}
    assert mask_by_threshold(half, 1.001)["w"].tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="threshold: NaN"):
        mask_by_threshold(params, float("nan"))


def test_amounts_do_not_recompile():
    params = {"a": normal(0, 11, 13), "b": normal(1, 5, 3)}
    cores = (
        *(pruning._to_be_out, pruning._plan_below, pruning._cut_leaf_below),
        *(pruning._cut_leaf_lowest, thresholds._count_leaf, thresholds._enter),
        *(thresholds._planned, thresholds.share_of),
    )

    def run(amount, floor):
        for value in (amount, jnp.float32(amount)):
            mask = mask_by_sparsity(params, value, floor=floor)
            mask_by_fraction(params, value, floor=floor, pruning_mask=mask)
            mask_by_threshold(params, value, floor=floor)

    run(0.5, 1)
    sizes = [core._cache_size() for core in cores]
    run(0.25, 3)
    run(0.75, 0)
    assert [core._cache_size() for core in cores] == sizes
    traced = jax.jit(lambda p, s: mask_by_sparsity(p, s))
    for share in (0.25, 0.5, 0.8125):
        assert_same(traced(params, share), mask_by_sparsity(params, share))
    assert traced._cache_size() == 1


@pytest.mark.parametrize("committed", [False, True])
def test_leaves_of_one_shape_share_their_programs(committed):
    shape = (17, 19 + committed)
    params = {name: normal(i, *shape) for i, name in enumerate("abcd")}
    if committed:
        params = jax.device_put(params, jax.devices()[0])
    cores = (thresholds._count_leaf, pruning._cut_leaf_below, pruning._cut_leaf_lowest)
    sizes = [core._cache_size() for core in cores]

    def grown():
        return [core._cache_size() - size for core, size in zip(cores, sizes, strict=True)]

    mask_by_sparsity(params, 0.5)
    assert grown() == [1, 1, 0]  # no floor bites: the long search of a leaf alone is not compiled
    mask_by_sparsity(params, 0.9, floor=100)
    mask_by_sparsity({"a": params["a"], "b": params["b"]}, 0.9, floor=100)
    mask_by_sparsity(params, 0.9, scope="tensor", floor=100)
    mask_by_threshold(params, 10.0, floor=100)
    assert grown()[2] == 1


@pytest.mark.parametrize("floor", [np.int32(4), np.uint8(4), jnp.int32(4)])
def test_floors_may_be_any_integers(floor):
    params = {"a": normal(0, 6, 7)}
    assert_same(
        mask_by_fraction(params, 0.99, floor=floor), mask_by_fraction(params, 0.99, floor=4)
    )


def test_fractions_of_what_jit_closes_over():
    params = {"a": normal(0, 6, 7), "b": normal(1, 5, 3)}
    once = mask_by_fraction(params, 0.3)
    for mask in (None, once):
        expected = mask_by_fraction(params, 0.3, pruning_mask=mask)
        got = jax.jit(lambda mask=mask: mask_by_fraction(params, 0.3, pruning_mask=mask))()
        assert_same(got, expected)


def test_eight_bits_beside_wider_floats():
    """Their largest exponent has finite values where IEEE's has infinity."""
    params = {
        "a": jnp.array([[256.0, 448.0, 1.0, -2.0]]).astype(jnp.float8_e4m3fn),
        "b": jnp.array([[300.0, 1000.0, 0.5, 3.0]]),
    }
    mask = mask_by_sparsity(params, 0.5)
    assert mask["a"].tolist() == [[True, True, False, False]]
    assert mask["b"].tolist() == [[True, True, False, False]]
    assert mask_by_threshold(params, 300.0)["a"].tolist() == [[False, True, False, False]]


# Patterns.


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 4), (3, 20)])
def test_n_of_m(n, m, axis):
    w = np.random.default_rng(0).integers(-4, 4, (3, 10, 9)).astype(np.float32)
    w[0, 0, 0] = np.nan
    given = np.random.default_rng(1).random(w.shape) < 0.8
    got = mask_n_of_m(
        {"w": jnp.asarray(w)}, n, m, axis=axis, pruning_mask={"w": jnp.asarray(given)}
    )["w"]
    rows, keeps, gots = (
        np.moveaxis(x, axis, -1).reshape(-1, w.shape[axis]) for x in (w, given, np.asarray(got))
    )
    for row, keep, new in zip(rows, keeps, gots, strict=True):
        for start in range(0, len(row), m):
            group = np.abs(row[start : start + m])
            quota = -(-len(group) * n // m)
            alive = [i for i in range(len(group)) if keep[start + i]]
            alive.sort(key=lambda i: (np.isnan(group[i]), group[i], i))
            expected = np.isin(np.arange(len(group)), alive[max(len(alive) - quota, 0) :])
            np.testing.assert_array_equal(new[start : start + m], expected)


def test_blocks():
    w = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    given = np.random.default_rng(1).random(w.shape) < 0.7
    given[0, :2, :3] = False  # a block that is out already
    got = mask_blocks({"w": jnp.asarray(w)}, 0.4, (2, 3), pruning_mask={"w": jnp.asarray(given)})[
        "w"
    ]
    tiles = [
        (i, slice(j, j + 2), slice(k, k + 3))
        for i in range(2)
        for j in range(0, 5, 2)
        for k in range(0, 7, 3)
    ]
    norms = [
        np.sqrt(np.sum(np.square(np.where(given, w, 0)[tile]), dtype=np.float64)) for tile in tiles
    ]
    expected = given.copy()
    for i in np.argsort(norms)[: round(0.4 * len(tiles))]:
        expected[tiles[i]] = False
    np.testing.assert_array_equal(got, expected)


def test_block_norms_neither_overflow_nor_vanish():
    rows = [[2e38, 2e38], [1e38, 1e38], [1e-30, 0], [2e-30, 0], [np.inf, 0], [np.nan, 0], [0, 0]]
    w = {"w": jnp.array(rows, jnp.float32)}
    order = []
    for out_of_7 in range(1, 7):
        kept = np.asarray(mask_blocks(w, out_of_7 / 7, (1, 2), exact_ties=True)["w"])[:, 0]
        order += [i for i in range(7) if not kept[i] and i not in order]
    assert order == [6, 2, 3, 1, 0, 4]


def test_units():
    params = {"narrow": normal(0, 4, 10), "wide": normal(1, 3, 3, 30, 8), "bias": normal(2, 10)}
    mask = mask_units(params, 0.5)
    rms = {
        k: np.sqrt(np.mean(np.square(params[k]), axis=tuple(range(params[k].ndim - 1))))
        for k in ("narrow", "wide")
    }
    bound = np.sort(np.concatenate(list(rms.values())))[8]
    for k, values in rms.items():
        np.testing.assert_array_equal(mask[k], np.broadcast_to(values > bound, params[k].shape))
    rows = mask_units(params, 0.5, axis=0, scope="tensor")["narrow"]
    assert np.asarray(rows).all(1).sum() == 2
    assert (~np.asarray(rows)).all(1).sum() == 2
    assert count_kept(mask_units(params, 1.0, floor=5)["narrow"]) == 8  # 2 units of 4
    assert sum(out(mask_units(params, 1.0, floor=0))) == 40 + 9 * 30 * 8


def test_pruned_entries_of_a_unit_count_as_zero():
    given = {"w": jnp.array([[True, True], [False, True]])}  # rms 1.77, not 2.5, beside 2
    mask = mask_units({"w": jnp.array([[2.5, 2.0], [2.5, 2.0]])}, 0.5, pruning_mask=given)
    assert mask["w"].tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (partial(mask_by_fraction, fraction=0.25), 9),
        (partial(mask_units, sparsity=0.5), 6),
        (partial(mask_blocks, sparsity=1 / 3, block=(2, 2)), 8),
    ],
)
def test_exact_ties_of_every_rule(rule, kept):
    assert count_kept(rule({"w": jnp.ones((2, 6))}, exact_ties=True)) == kept


def test_the_floor_of_blocks_is_of_the_smallest():
    mask = mask_blocks({"w": jnp.arange(1.0, 16.0).reshape(3, 5)}, 1.0, (2, 2), floor=3)["w"]
    assert mask.tolist() == [[False] * 5, [False] * 5, [True] * 5]  # three blocks of the last row


def test_rules_by_path():
    params = model()
    half = partial(mask_by_sparsity, sparsity=0.5)
    mask = mask_by_rules(
        params,
        {
            "encoder/kernel": partial(mask_n_of_m, n=1, m=3, axis=0),
            ".*/bias": None,
            "decoder/.*": half,
        },
    )
    assert_same(mask["encoder"]["kernel"], mask_n_of_m(params, 1, 3, axis=0)["encoder"]["kernel"])
    assert out(mask["encoder"]["bias"]) == [0]
    assert out(mask["decoder"]) == [15]
    again = mask_by_rules(
        params, {".*": partial(mask_by_fraction, fraction=1.0, floor=0)}, pruning_mask=mask
    )
    assert count_kept(again) == 1  # the stand-in of the step count
    with pytest.raises(ValueError, match="no pattern matches the leaves"):
        mask_by_rules(params, {"encoder/.*": half})
    with pytest.raises(ValueError, match="decide no leaf"):
        mask_by_rules(params, {"encode": half, ".*": None})
    with pytest.raises(ValueError, match="no pattern matches"):
        mask_by_rules(params, {})


# Masks as such.


def test_apply_mask_sets_positive_zero():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = {"w": jnp.array([-1.0, np.nan, np.inf, -2.0], dtype), "n": jnp.arange(3)}
        mask = {"w": jnp.array([False, False, False, True]), "n": jnp.array(True)}
        zeroed = apply_mask(params, mask)
        assert zeroed["w"].dtype == dtype
        assert zeroed["w"].tolist() == [0, 0, 0, -2]
        assert not np.signbit(np.asarray(zeroed["w"], np.float32)[:3]).any()
        assert zeroed["n"] is params["n"]


def test_counts_and_overlap():
    a = {"w": jnp.array([True, True, False, False]), "b": jnp.array(True)}
    b = {"w": jnp.array([True, False, True, False]), "b": jnp.array(True)}
    assert count_kept(a) == 3
    assert float(jax.jit(pruning.sparsity)(a)) == np.float32(0.4)
    assert pruning.union(a, b)["w"].tolist() == [True, True, True, False]
    assert pruning.intersection(a, b)["w"].tolist() == [True, False, False, False]
    assert float(pruning.overlap(a, b)) == 0.5
    nothing = {"w": jnp.zeros(3, bool)}
    assert float(pruning.overlap(nothing, nothing)) == 1
    with pytest.raises(ValueError, match="'w'"):
        pruning.union(a, {**b, "w": jnp.ones(3, bool)})


@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (0,), (3, 0), (0, 5), (4, 3, 17)])
def test_packing_round_trip(shape):
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    with jax.numpy_dtype_promotion("strict"):
        packed = pack_mask({"w": mask})
        assert packed["w"].dtype == jnp.uint8
        assert packed["w"].shape == ((*shape[:-1], -(-shape[-1] // 8)) if shape else (1,))
        assert_same(jax.jit(lambda p: unpack_mask(p, {"w": mask}))(packed), {"w": mask})


def test_errors_name_the_path_and_the_fix():
    params = model()
    good = full_mask(params)
    with pytest.raises(ValueError, match=r"'steps' instead of .*'encoder/kernel'"):
        mask_by_fraction(
            params, 0.1, pruning_mask={**good, "encoder": {"bias": good["encoder"]["bias"]}}
        )
    with pytest.raises(ValueError, match="'encoder/bias' is bool of shape"):
        apply_mask(params, {**good, "encoder": {**good["encoder"], "bias": jnp.array(True)}})
    with pytest.raises(ValueError, match="'encoder/bias' is float32"):
        apply_mask(params, {**good, "encoder": {**good["encoder"], "bias": jnp.ones(5)}})
    with pytest.raises(ValueError, match="other containers"):
        check_pruning_mask(params, {**good, "decoder": tuple(good["decoder"])})
    with pytest.raises(ValueError, match="'w' has shape"):
        unpack_mask({"w": jnp.zeros(2, jnp.uint8)}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="mask=every_parameter"):
        mask_by_fraction({"b": jnp.ones(3)}, 0.1)
    for share in (-0.1, 1.1, float("nan"), 2, np.float32(20), np.int64(90), jnp.float32(1.5)):
        for rule in (
            mask_by_sparsity,
            mask_by_fraction,
            mask_units,
            partial(mask_blocks, block=(2, 2)),
        ):
            with pytest.raises(ValueError, match=r"is not in \[0, 1\]"):
                rule(params, share)
    for threshold in (float("nan"), np.float32("nan"), jnp.float32("nan")):
        with pytest.raises(ValueError, match="threshold: NaN"):
            mask_by_threshold(params, threshold)
    with pytest.raises(TypeError, match=r"sparsity: one number belongs there, not dict. The order"):
        mask_by_sparsity(0.5, params)
    with pytest.raises(TypeError, match=r"fraction: .* of shape \(2,\)\. The order is \(params, f"):
        mask_by_fraction(params, jnp.ones(2))
    # A sum of ten float32 tenths is 1.0000001.
    everything = mask_by_sparsity(params, jnp.float32(1) + jnp.finfo(jnp.float32).eps, floor=0)
    assert_same(everything, mask_by_sparsity(params, 1.0, floor=0))
    packed = pack_mask(good)
    for function in (count_kept, pruning.sparsity, pack_mask):
        with pytest.raises(ValueError, match=r"'decoder/0' is uint8, not bool.*unpack_mask"):
            function(packed)
    for function in (pruning.union, pruning.intersection, pruning.overlap):
        with pytest.raises(ValueError, match="a: the leaf at 'decoder/0' is float32, not bool"):
            function(params, good)
        with pytest.raises(ValueError, match=r"b: .* 'decoder/0' instead of a leaf at 'w'"):
            function({"w": good["decoder"][0]}, good)
    with pytest.raises(ValueError, match="floor: -1"):
        mask_by_fraction(params, 0.1, floor=-1)
    with pytest.raises(ValueError, match="1 <= n <= m"):
        mask_n_of_m(params, 5, 4)
    with pytest.raises(ValueError, match=r"'decoder/0' has shape .*no axis 2"):
        mask_n_of_m(params, 2, 4, axis=2, mask=weights)
    with pytest.raises(ValueError, match="positive lengths"):
        mask_blocks(params, 0.5, (0, 2))
    with pytest.raises(ValueError, match="fewer axes"):
        mask_blocks(params, 0.5, (2, 2, 2))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_temporaries_stay_below_two_leaves(scope):
    params = {name: normal(i, 256, 256) for i, name in enumerate("abcdef")}
    masks = jax.jit(lambda p: mask_by_sparsity(p, 0.8, scope=scope))
    memory = masks.lower(params).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes <= 2 * params["a"].nbytes
