"""The report's numbers by hand, and its page: whole, alone, escaped, for any tree."""

import base64
import html.parser
import io
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from PIL import Image

import sparsereg_jax as sj
from sparsereg_jax import report
from sparsereg_jax.flops import count_flops, count_flops_by_leaf


@pytest.fixture(autouse=True)
def loose_ranks():
    """The networks here add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield


VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page strictly: what is opened is closed, in order; every attribute is collected."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def tables(self):
        text = self.rawdata_text
        return [
            [
                re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
                for row in re.findall(r"<tr>(.*?)</tr>", t, re.S)
            ]
            for t in re.findall(r"<table>(.*?)</table>", text, re.S)
        ]


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    page.rawdata_text = text
    return page


def check_pictures(page, folder):
    """Each picture is inside the page, beside it, described, and shows something."""
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([\w-]+\.png)\)", markdown)
    assert len(named) == len(page.of("img")) > 0
    for name, attrs in zip(named, page.of("img"), strict=True):
        kind, data = attrs["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / name).read_bytes()
        assert len(attrs["alt"]) > 20
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
        assert pixels.std() > 10
        assert pixels.mean() > 150  # light


def checks(number=6, met=4):
    return [
        sj.Check(
            *(i, i, 0.9 - i / 100, i / 10, 10, i < met, i < met, False),
            *("pruned" if i < met else "went back", 1, 0.5, {}),
        )
        for i in range(number)
    ]


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"]


@pytest.fixture
def network():
    """16-8-4; of the hidden units 0 to 4 nothing is read, and unit 5 reads nothing."""
    one = np.zeros((16, 8), np.float32)
    one[3, 6], one[9, 7], one[2, 7], one[1, 0] = 1.0, -2.0, 0.5, 3.0
    two = np.zeros((8, 4), np.float32)
    two[6, 1], two[7, 0], two[7, 2], two[7, 3] = 1.0, 1.0, 4.0, -1.0
    bias = np.array([0, 0, 0, 0, 0, 0, 0.25, 0], np.float32)
    return {"one": {"bias": bias, "kernel": one}, "two": {"kernel": two}}


def test_numbers_by_hand(network, tmp_path):
    x = jnp.ones((5, 16))
    small = sj.compact(mlp, network, x)
    dense = jax.tree.map(lambda w: np.full(w.shape, 0.5, np.float32), network)
    mask = jax.tree.map(lambda w: w != 0, network)
    path = sj.write_report(
        tmp_path / "made" / "here",
        network,
        mask,
        title="Sixteen",
        dense=dense,
        fn=mlp,
        inputs=(x,),
        history=checks(),
        bound=0.875,
        compacted=small,
    )
    assert path == tmp_path / "made" / "here" / "report.html"
    page = read(path)
    totals, layers = page.tables()
    # Two units stay; three pixels, 2, 3 and 9, are cut from the input; biases come with units.
    assert [row[0] for row in layers[1:]] == ["one/bias", "one/kernel", "two/kernel", "all"]
    rows = {row[0]: dict(zip(layers[0], row, strict=True)) for row in layers[1:]}
    assert rows["one/kernel"] == {
        "layer": "one/kernel",
        "shape": "16 x 8",
        "dtype": "float32",
        "weights": "128",
        "kept": "4",
        "sparsity": "96.88 %",
        "bytes": "512",
        "sparse bytes": rows["one/kernel"]["sparse bytes"],
        "FLOPs": f"{2 * 5 * 16 * 8:,}",
        "compacted": "3 x 2",
        "compacted FLOPs": f"{2 * 5 * 3 * 2}",
    }
    assert rows["one/bias"]["kept"] == "1"
    assert rows["one/bias"]["FLOPs"] == str(5 * 8)
    assert rows["two/kernel"]["compacted FLOPs"] == str(2 * 5 * 2 * 4)
    assert (rows["all"]["weights"], rows["all"]["kept"]) == ("168", "9")
    assert rows["all"]["sparsity"] == "94.64 %"  # 159 / 168
    assert rows["all"]["compacted"] == "16 weights"
    stored = {leaf.path: leaf for leaf in inspected(network, tmp_path)}
    for name in ("one/bias", "one/kernel", "two/kernel"):
        leaf = stored[name]
        assert rows[name]["sparse bytes"] == f"{leaf.values_bytes + (leaf.pattern_bytes or 0)}"
    table = {row[0]: row[1:] for row in totals}
    assert table["weights"] == ["168", "9", "16"]
    assert table["compression (dense weights / these)"] == ["1.0", "18.7", "10.5"]
    total = sum(leaf.values_bytes + (leaf.pattern_bytes or 0) for leaf in stored.values())
    assert table["bytes"] == ["672", f"{total:,}", "64"]
    assert table["dense bytes / these"] == ["1.0", f"{672 / total:,.1f}", "10.5"]
    flops = count_flops(mlp, network, x), count_flops(small.fn, small.params, x)
    assert flops[0] == 2 * 5 * 16 * 8 + 2 * 5 * 8 + 2 * 5 * 8 * 4  # with the ReLU's 5 x 8
    assert table["FLOPs of the whole function"] == [
        f"{flops[0]:,.0f}",
        "the same",
        f"{flops[1]:,.0f}",
    ]
    assert table["dense FLOPs / these"] == ["1.0", "1.0", f"{flops[0] / flops[1]:,.1f}"]
    text = "".join(page.texts)
    assert "159 of 168 weights are pruned, 94.64 % of them; 9 are kept (18.7 times fewer)." in text
    assert (
        "6 checks, 4 of which ended in a pruning; 2 times the loop went back; 3.0 seconds" in text
    )
    assert "met the bound of 0.875: 30.00 % sparse with a metric of 0.87, at check 3." in text
    check_pictures(page, path.parent)
    assert len(page.of("img")) == 5  # curve, magnitudes, three layers


def test_the_sparsest_need_not_be_the_last(network, tmp_path):
    one, two, four, three = checks(4, 4)
    page = read(sj.write_report(tmp_path, network, history=[one, two, three, four], bound=0.8))
    text = "".join(page.texts)
    assert "30.00 % sparse with a metric of 0.87, at check 3." in text


def inspected(params, folder):
    sj.save_sparse(folder / "w", params)
    return sj.inspect_sparse(folder / "w").leaves


def test_the_page_stands_alone(network, tmp_path):
    page = read(sj.write_report(tmp_path, network, history=checks()))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        assert not {"href", "srcset", "action"} & attrs.keys()
        assert attrs.get("src", "data:image/png").startswith("data:image/png")
    assert not re.search(r"https?:|url\(|@import", page.rawdata_text)
    assert page.of("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.of("meta")
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert all(frame["aria-label"] for frame in page.of("div"))
    assert len(page.of("div")) == len(page.of("table")) == 2  # wide tables scroll in a frame
    assert len(page.of("h1")) == 1


NASTY = [
    "<script>alert(1)</script>",
    "a|b\\|c",
    "**bold** _it_ `code` ~~no~~",
    "[x](javascript:alert(1)) ![y](http://evil/z.png)",
    "&lt;b&gt; &amp;",
    "line\nbreak\rand\ttab\x1b[31m\u202e",
    '"quoted\' onload="x',
    "$\\alpha_{$ #1 @you :smile: https://evil.example www.evil.example",
    "größe/重み/🙂",
    "- 1. + x",
    " ",
    "x" * 300,
]


def test_names_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURED", 3)
    params = {name: jnp.ones((2, 3)) for name in NASTY}
    for name in (NASTY[7], NASTY[8], NASTY[11]):  # formulas, other scripts, length: drawn
        params[name] = jnp.ones((2, 4))
    page = read(sj.write_report(tmp_path, params, title=NASTY[0] + NASTY[3]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert {tag for tag, _ in page.tags}.isdisjoint({"a", "strong", "em", "code", "b", "s"})
    assert len(page.of("img")) == 1 + 3
    text = "".join(page.texts)
    for name in NASTY:
        shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)
        assert shown.strip() in text
    (layers,) = page.tables()[1:]
    assert len(layers) == 1 + len(NASTY) + 1
    assert all(len(row) == len(layers[0]) for row in layers)
    assert "".join(page.texts).count(NASTY[0]) >= 3  # title, heading, table
    terminal = sj.report_text(params, title=NASTY[5])
    assert all(c.isprintable() or c == "\n" for c in terminal)
    assert "line\\u000abreak" in terminal


def warned(params, mask=None):
    text = sj.report_text(params, mask)
    block = text.split("Warnings\n--------\n")[1].split("\n\nLayer by layer")[0]
    return block.replace("\n  ", " ").splitlines()  # long lines are wrapped


def test_warnings():
    def kernel(kept, shape=(100, 30)):
        return np.arange(np.prod(shape)).reshape(shape) < kept

    params = {
        "a": kernel(0),  # wholly
        "b": kernel(29),  # nearly: 29 of 3000, for 30 units
        "c": kernel(30),  # 1 %, one a unit
        "d": kernel(3, (400,)),  # 1-d: 3 of 400
        "e": kernel(4, (400,)),
        "f": kernel(0, (10,)),
        "g": kernel(20, (1, 3000)),
        "h": kernel(30, (200, 30)),  # 0.5 %, but one a unit
        "empty": kernel(0, (0, 3)),
    }
    params = jax.tree.map(lambda keep: keep.astype(np.float32), params)
    assert warned(params) == [
        "- Wholly empty: a, none of 3,000 kept. Nothing passes through it.",
        "- Nearly empty: b, 29 of 3,000 kept.",
        "- Nearly empty: d, 3 of 400 kept.",
        "- Wholly empty: f, none of 10 kept. It is a constant 0.",
        "- Nearly empty: g, 20 of 3,000 kept.",
    ]
    assert warned({"w": np.ones(3)}) == ["- None: no layer is empty or nearly so."]


def test_warns_of_weights_outside_the_mask_and_of_nan():
    params = {"w": np.array([1.0, 2.0, np.nan, 0.0], np.float32)}
    mask = {"w": np.array([True, False, True, False])}
    assert warned(params, mask) == [
        "- Not pruned yet: w, 1 of the weights outside the mask differ from zero; here they count"
        " as pruned.",
        "- Not finite: w, NaN or infinite in 1 places.",
    ]


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    "params",
    [
        {"bias": jnp.array([0.0, 1.0, 0.0])},
        {"w": jnp.array([[0.0, 1.5], [2.0, 0.0]], jnp.bfloat16), "none": None},
        {"w": jnp.array([[0.0, 1e-7]], jnp.float16), "step": jnp.zeros((), jnp.int32)},
        {"w": np.array([[0.0, 1e-300, 1e300]])},
        (jnp.ones((2, 2)), [Pair(jnp.zeros(3), None), FrozenDict(x=jnp.ones((2, 2, 2, 3)))]),
        {"scalar": jnp.array(2.0), "zero": jnp.zeros((0, 4)), "key": jax.random.key(0)},
        {"flags": jnp.array([True, False])},
        jnp.ones((3, 200)),
        {},
        {"w": jnp.array([[1.0, 0.5]], jnp.float8_e4m3fn)},
    ],
    ids=["1-d", "bf16", "f16", "f64", "containers", "scalar", "bools", "leaf", "nothing", "f8"],
)
def test_any_tree(params, tmp_path):
    page = read(sj.write_report(tmp_path, params))
    check_pictures(page, tmp_path)
    floats = [w for w in jax.tree.leaves(params) if jnp.issubdtype(w.dtype, jnp.floating)]
    assert len(page.tables()[1]) == 1 + len(floats) + 1
    total = page.tables()[1][-1]
    assert total[3] == str(sum(w.size for w in floats))
    assert total[4] == str(sum(int((np.asarray(w) != 0).sum()) for w in floats))


def test_nnx_state(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    text = sj.report_text(
        state, sj.full_mask(state), fn=fn, inputs=[jax.ShapeDtypeStruct((7, 3), jnp.float32)]
    )
    (row,) = [line.split() for line in text.splitlines() if line.startswith("kernel ")]
    assert row[:5] == ["kernel", "3", "x", "2", "float32"]
    assert row[-1] == str(2 * 7 * 3 * 2)


def test_many_layers_are_all_in_the_table(tmp_path, monkeypatch):
    assert report.PICTURED == 12
    monkeypatch.setattr(report, "PICTURED", 2)
    params = {f"w{i:03}": jnp.ones((1, i + 1)) for i in range(30)}
    page = read(sj.write_report(tmp_path, params))
    assert len(page.tables()[1]) == 32
    assert len(page.of("img")) == 1 + 2
    assert "The 2 largest layers; 28 more are in the table alone." in "".join(page.texts)
    assert [a["alt"][:4] for a in page.of("img")[1:]] == [f"w{i:03}" for i in range(28, 30)]


def test_maps_show_where():
    """What is dark in a layer's map is what is kept, also where cells hold several weights."""
    from sparsereg_jax import report_pictures

    keep = np.zeros((1000, 30), bool)
    keep[500:, 20:] = True
    figure = report_pictures.layer("w", keep, None, np.ones((3, 3)))
    (image,) = figure.axes[0].images
    share = np.asarray(image.get_array())
    assert share.shape == (160, 30)
    np.testing.assert_array_equal(share[80:, 20:], 1)
    assert share.sum() == share[80:, 20:].size
    # The shares of cells of different sizes, weighted, are what is kept.
    random = np.random.default_rng(0).random((1, 999)) < 0.3
    figure = report_pictures.layer("w", random, None, np.ones((3, 3)))
    (share,) = np.asarray(figure.axes[0].images[0].get_array())
    sizes = np.diff([*np.linspace(0, 999, 160, endpoint=False).astype(int), 999])
    np.testing.assert_allclose((share * sizes).sum(), random.sum(), rtol=1e-5)


def test_histograms_count_every_weight():
    from sparsereg_jax import report_pictures

    before = [np.array([0.0, -1.0, 1e-30, np.nan, np.inf]), np.full((2, 3), 0.25)]
    after = [np.array([0.0, -1.0]), np.zeros((2, 3))]
    axes = report_pictures.magnitudes(before, after).axes[0]
    counts = [patch.get_data().values.sum() for patch in axes.patches]
    assert counts == [8, 1]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["before: 8 not zero", "after: 1 not zero"]


def test_curve_has_a_point_for_each_check():
    from sparsereg_jax import report_pictures

    whole = sj.Check(9, 9, 0.1, 1.0, 0, False, True, True, "pruned", 1, 0.5, {})
    axes = report_pictures.curve([*checks(), whole], 0.875).axes[0]
    bound, met, missed = axes.lines
    assert list(bound.get_ydata()) == [0.875, 0.875]
    np.testing.assert_allclose(met.get_xdata(), 1 / (1 - np.arange(4) / 10))
    np.testing.assert_allclose(met.get_ydata(), 0.9 - np.arange(4) / 100)
    np.testing.assert_allclose(missed.get_xdata(), [1 / 0.6, 1 / 0.5])


def test_flops_belong_to_what_reads_a_leaf():
    def fn(params, x):
        scale = params["scale"] * jax.lax.rsqrt(params["var"] + 1e-3)
        x = (x @ params["w"].T.reshape(3, 4)) * scale
        x, _ = jax.lax.scan(lambda x, w: (x + w, None), x, params["loop"])
        return jax.nn.softmax(x @ jax.nn.gelu(params["unused"] * 0 + 1))

    params = {
        "loop": jnp.ones((7, 4)),
        "scale": jnp.ones(4),
        "unused": jnp.ones((4, 2)),
        "var": jnp.ones(4),
        "w": jnp.ones((4, 3)),
    }
    loop, scale, _, var, w = count_flops_by_leaf(fn, params, jnp.ones((5, 3)))
    assert loop is None
    assert w == 2 * 5 * 3 * 4
    assert scale == 4 + 5 * 4  # with the root, and with the product
    assert var == 4 + scale  # and the sum; XLA counts a root as transcendental, apart


def test_flops_of_what_is_made_of_parameters_by_a_function_of_its_own():
    """A custom derivative or a checkpoint around parameters hides no product from its leaf."""
    params, x = {"w": jnp.full((3, 5), 0.5)}, jnp.ones((9, 3))
    for made in (jax.nn.relu, jax.nn.relu6, jax.checkpoint(jnp.square)):
        (found,) = count_flops_by_leaf(lambda p, x, made=made: x @ made(p["w"]), params, x)
        assert 2 * 9 * 3 * 5 <= found <= 2 * 9 * 3 * 5 + 2 * 15


def test_leaves_of_one_path_have_their_own_dense_weights(tmp_path):
    network = {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((3, 3))}
    dense = {"a": {"b": jnp.full((4, 4), 2.0)}, "a/b": jnp.full((3, 3), 3.0)}
    facts = report._facts(network, None, dense, None, (), None)
    assert [layer.dense.max() for layer in facts.layers] == [2, 3]
    with pytest.raises(ValueError, match=r"dense: the leaf 'a/b' has shape \(5, 4\)"):
        sj.write_report(tmp_path, network, dense=dense | {"a": {"b": jnp.ones((5, 4))}})


def test_flops_agree_with_the_sizes_in_a_convolution():
    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"w": jnp.ones((3, 3, 2, 5))}, jnp.ones((2, 8, 9, 2))
    wanted = 2 * (2 * 6 * 7 * 5) * (3 * 3 * 2)
    assert count_flops_by_leaf(fn, params, x) == [wanted]
    assert count_flops(fn, params, x) == wanted


def test_errors(network, tmp_path):
    mask = sj.full_mask(network)
    mask["one"]["kernel"] = mask["one"]["kernel"][1:]
    with pytest.raises(ValueError, match=r"pruning_mask: .*'one/kernel' is bool of shape"):
        sj.write_report(tmp_path, network, mask)
    with pytest.raises(ValueError, match=r"dense: the leaf 'two/kernel' has shape none"):
        sj.write_report(tmp_path, network, dense={"one": network["one"]})
    with pytest.raises(ValueError, match=r"dense: the leaf 'w' has shape \(3,\), in params \(2,\)"):
        sj.write_report(tmp_path, {"w": np.ones(2)}, dense={"w": np.ones(3)})
    with pytest.raises(ValueError, match="inputs: given without fn"):
        sj.write_report(tmp_path, network, inputs=(np.ones((1, 16)),))
    small = sj.compact(mlp, network, jnp.ones((1, 16)))
    with pytest.raises(ValueError, match="compacted: made of other parameters"):
        sj.write_report(tmp_path, network["one"], compacted=small)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib.axes", "markdown_it", "tabulate"])
def test_says_what_to_install(package, tmp_path, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("sparsereg_jax.report_")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(sj, module.split(".")[1], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'write_report .*pip install "sparsereg_jax\[report\]"'):
        sj.write_report(tmp_path, {"w": np.ones(2)})
    if package == "tabulate":
        with pytest.raises(ImportError, match=r'report_text .*"sparsereg_jax\[report\]"'):
            sj.report_text({"w": np.ones(2)})


def test_the_library_loads_without_the_extra():
    import subprocess

    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['markdown_it'] = None;"
        "sys.modules['tabulate'] = None; import sparsereg_jax"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
