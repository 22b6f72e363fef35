"""Which leaves: by path, rank and predicate; the same ones in every form of the same params."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import sparsereg_jax as sj
from sparsereg_jax.selection import is_float, leaf_path, resolve_mask

PARAMS = {
    "embed": {"table": jnp.ones((8, 2))},
    "layers_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "layers_10": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
    "step": jnp.zeros((2, 2), jnp.int32),
    "temperature": jnp.ones(()),
}


def selected(tree) -> set[str]:
    """The paths at which a tree of Python bools is True."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    assert all(type(leaf) is bool for _, leaf in leaves)
    return {leaf_path(path) for path, leaf in leaves if leaf}


def large(path, leaf):
    return leaf.size > 6


# Rules by path.


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        (
            {".*": True},
            {
                "embed/table",
                "layers_0/kernel",
                "layers_0/bias",
                "layers_10/kernel",
                "layers_10/bias",
                "temperature",
            },
        ),
        # The whole path has to match: "layers_1" alone is no prefix search.
        ({"layers_1.*": True, ".*": False}, {"layers_10/kernel", "layers_10/bias"}),
        ({".*/kernel": True, ".*": False}, {"layers_0/kernel", "layers_10/kernel"}),
        # The first that matches decides.
        ({"layers_0/.*": False, ".*/kernel": True, ".*": False}, {"layers_10/kernel"}),
        (
            {".*/kernel": True, "layers_0/.*": False, ".*": False},
            {"layers_0/kernel", "layers_10/kernel"},
        ),
        # A predicate may decide, of path and leaf.
        ({"embed/.*": False, ".*": large}, {"layers_10/kernel"}),
        ({".*": lambda path, leaf: path.startswith("embed")}, {"embed/table"}),
    ],
)
def test_rules_by_path(rules, want):
    selection = sj.by_path(PARAMS, rules)
    assert selected(selection(PARAMS)) == want
    assert jax.tree.structure(selection(PARAMS)) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layers_1": True, ".*": False}, r"'layers_1'.*decide no leaf.*layers_10/kernel"),
        ({".*": True, "embed/table": False}, r"'embed/table'.*decide no leaf"),  # never reached
        ({"step": True, ".*": True}, r"'step'.*decide no leaf"),  # an integer leaf
        ({".*/kernel": True}, r"no pattern matches.*embed/table.*layers_0/bias.*temperature"),
        ({"(": True}, r"'\(' is not a regular expression"),
    ],
)
def test_rules_that_miss_are_an_error(rules, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        sj.by_path(PARAMS, rules)


def test_no_rules_are_an_error_unless_there_is_nothing_to_rule():
    with pytest.raises(ValueError, match="no pattern matches"):
        sj.by_path(PARAMS, {})
    assert sj.by_path({"step": jnp.zeros(2, int)}, {})({"step": jnp.zeros(2, int)}) == {
        "step": False
    }


def test_a_checked_selection_takes_any_tree():
    # optax's placeholder trees among them, on which no rule matches.
    selection = sj.by_path(PARAMS, {".*/kernel": True, ".*": False})
    assert selection({}) == {}
    tx = optax.masked(optax.trace(0.9), selection)
    counted = optax.tree.map_params(tx, lambda _: "moment", tx.init(PARAMS))
    moments = [leaf for leaf in jax.tree.leaves(counted) if isinstance(leaf, str)]
    assert len(moments) == 2


@pytest.mark.parametrize(
    "form",
    [
        lambda tree: tree,
        FrozenDict,
        lambda tree: jax.eval_shape(lambda: tree),
        lambda tree: jax.tree.map(np.asarray, tree),
    ],
)
def test_the_same_leaves_in_any_form(form):
    selection = sj.by_path(PARAMS, {".*/kernel": large, ".*": False})
    assert selected(selection(form(PARAMS))) == {"layers_10/kernel"}


def test_the_same_leaves_under_jit():
    seen = []

    @jax.jit
    def traced(params):
        seen.append(selected(sj.weights(params)))
        return 0

    traced(PARAMS)
    assert seen == [selected(sj.weights(PARAMS))]


def test_paths_of_lists_and_tuples():
    params = [{"w": jnp.ones(2)}, (jnp.ones(1), jnp.ones(3))]
    selection = sj.by_path(params, {"0/w": True, "1/1": True, ".*": False})
    assert selection(params) == [{"w": True}, (False, True)]


def test_a_key_called_value_stays():
    params = {"value": jnp.ones(2), "head": {"value": jnp.ones(3)}}
    assert selected(sj.every_parameter(params)) == {"value", "head/value"}


# The selections that are there.


def test_weights_are_the_default():
    assert selected(sj.weights(PARAMS)) == {"embed/table", "layers_0/kernel", "layers_10/kernel"}


def test_every_parameter_is_every_float():
    assert selected(sj.every_parameter(PARAMS)) == {
        "embed/table",
        "layers_0/kernel",
        "layers_0/bias",
        "layers_10/kernel",
        "layers_10/bias",
        "temperature",
    }


def test_by_predicate_asks_about_floats_alone():
    asked = []
    select = sj.by_predicate(lambda path, leaf: asked.append(path) or leaf.ndim == 1)
    assert selected(select(PARAMS)) == {"layers_0/bias", "layers_10/bias"}
    assert "step" not in asked


def test_a_predicate_may_answer_with_numpy():
    assert sj.by_predicate(lambda path, leaf: np.bool_(True))({"w": jnp.ones(1)}) == {"w": True}


class _Block(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(4)(nn.LayerNorm()(carry)), None


def test_scanned_norm_scales_are_no_weights():
    stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((2, 4)), None)["params"]
    assert params["LayerNorm_0"]["scale"].shape == (3, 4)  # a matrix by rank alone
    assert "LayerNorm_0/scale" not in selected(sj.weights(params))
    assert "Dense_0/kernel" in selected(sj.weights(params))
    assert "LayerNorm_0/scale" in selected(sj.every_parameter(params))


def test_the_scale_is_a_name_not_a_substring():
    params = {
        "scale": jnp.ones((2, 2)),
        "rescale": jnp.ones((2, 2)),
        "scale_net": {"kernel": jnp.ones((2, 2))},
    }
    assert selected(sj.weights(params)) == {"rescale", "scale_net/kernel"}


# nnx: the optimizer's init sees layer/kernel/value, its update layer/kernel.


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_nnx_optimizer_selects_the_same_leaves_in_init_and_update():
    model = _Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    selections = {
        "rules": sj.by_path(params, {"layer/kernel": True, ".*": False}),
        "weights": sj.weights,
        "predicate": sj.by_predicate(lambda path, leaf: path == "layer/kernel"),
    }
    seen = {"init": [], "update": []}

    def spy(where, tree):
        seen[where].append({name: selected(s(tree)) for name, s in selections.items()})

    def init(params):
        spy("init", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        spy("update", updates)
        spy("update", params)
        return updates, state

    optimizer = nnx.Optimizer(model, optax.GradientTransformation(init, update), wrt=nnx.Param)
    optimizer.update(model, params)
    want = {name: {"layer/kernel"} for name in selections}
    assert seen == {"init": [want], "update": [want, want]}


def test_a_masked_term_in_an_nnx_optimizer_shrinks_the_selected_leaf_alone():
    model = _Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    mask = sj.by_path(params, {"layer/kernel": True, ".*": False})
    optimizer = nnx.Optimizer(
        model,
        optax.chain(sj.add_selective_shrinkage(1.0, mask=mask), optax.scale(-0.5)),
        wrt=nnx.Param,
    )
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(after["layer"]["kernel"], before["layer"]["kernel"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(after["norm"]["scale"], before["norm"]["scale"])


def test_rng_counts_and_keys_are_never_selected():
    state = nnx.state(_Net(nnx.Rngs(0)))
    kinds = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    rng = {path for path in kinds if path.startswith("dropout")}
    assert len(rng) == 2  # a count and a key
    assert not any(is_float(kinds[path]) for path in rng)
    always = sj.by_predicate(lambda path, leaf: True)
    for select in (sj.weights, sj.every_parameter, always, sj.by_path(state, {".*": True})):
        assert selected(select(state)).isdisjoint(rng)
    assert selected(resolve_mask(True, state)) == set(kinds) - rng


@pytest.mark.parametrize(
    ("leaf", "answer"),
    [
        (jnp.ones(1), True),
        (jnp.ones(1, jnp.bfloat16), True),
        (np.ones(1, np.float16), True),
        (jax.ShapeDtypeStruct((1,), jnp.float32), True),
        (1.0, True),
        (jnp.ones(1, int), False),
        (jnp.ones(1, bool), False),
        (jnp.ones(1, complex), False),
        (1, False),
        (True, False),
    ],
)
def test_is_float(leaf, answer):
    assert is_float(leaf) is answer


def test_a_key_is_no_float():
    assert not is_float(jax.random.key(0))


# A mask as users give it.


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (
            None,
            {
                "embed/table",
                "layers_0/kernel",
                "layers_0/bias",
                "layers_10/kernel",
                "layers_10/bias",
                "temperature",
            },
        ),
        (sj.weights, {"embed/table", "layers_0/kernel", "layers_10/kernel"}),
        (False, set()),
        (
            {
                "embed": True,
                "layers_0": {"kernel": True, "bias": False},
                "layers_10": False,
                "step": True,
                "temperature": False,
            },
            {"embed/table", "layers_0/kernel"},
        ),
        (lambda params: {name: name == "embed" for name in params}, {"embed/table"}),
    ],
)
def test_resolve_mask(mask, want):
    resolved = resolve_mask(mask, PARAMS)
    assert selected(resolved) == want
    assert jax.tree.structure(resolved) == jax.tree.structure(PARAMS)


def test_resolve_mask_keeps_none_leaves():
    assert resolve_mask(None, {"a": None, "b": jnp.ones(1)}) == {"a": None, "b": True}


@pytest.mark.parametrize("leaf", [np.bool_(True), jnp.ones((2, 3), bool), 1, 0.5, "yes"])
def test_only_python_bools_choose_leaves(leaf):
    mask = jax.tree.map(lambda _: True, PARAMS) | {"temperature": leaf}
    with pytest.raises(TypeError, match=r"mask.*'temperature'.*not a Python bool"):
        resolve_mask(mask, PARAMS)
    with pytest.raises(TypeError, match="not a Python bool"):
        resolve_mask(lambda params: mask, PARAMS)


@pytest.mark.parametrize(
    "mask",
    [
        {"embed": True},
        {"other": True},
        [True, False],
        jax.tree.map(lambda _: True, PARAMS) | {"temperature": {"deeper": True}},
    ],
)
def test_a_mask_of_another_structure_is_an_error(mask):
    with pytest.raises(ValueError, match="mask: its structure is not a prefix"):
        resolve_mask(mask, PARAMS)


# The table.


def test_the_table():
    assert sj.selection_table(PARAMS).splitlines() == [
        "path              shape   dtype    selected",
        "embed/table       (8, 2)  float32  yes",
        "layers_0/bias     (3,)    float32  no",
        "layers_0/kernel   (2, 3)  float32  yes",
        "layers_10/bias    (3,)    float32  no",
        "layers_10/kernel  (3, 3)  float32  yes",
        "step              (2, 2)  int32    no",
        "temperature       ()      float32  no",
        "total             42               31",
    ]
    lines = sj.selection_table(PARAMS, {name: name == "embed" for name in PARAMS}).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("yes")] == ["embed/table"]
    assert lines[-1].split() == ["total", str(16 + 9 + 12 + 4 + 1), "16"]


def test_the_table_of_keys_and_nothing():
    table = sj.selection_table({"key": jax.random.key(0), "w": jnp.ones((2, 2), jnp.bfloat16)})
    assert [line.split()[-1] for line in table.splitlines()] == ["selected", "no", "yes", "4"]
    assert sj.selection_table({}).splitlines()[-1].split() == ["total", "0", "0"]
