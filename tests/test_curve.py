"""The picture of the sweep: well-formed, the same bytes, true to its numbers, and closed to what an id might hold."""

import itertools
import random
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from made_release import GOLDEN, made_curve

from safesail.release.curve import curve_svg
from safesail.release.svg import Axis, escaped, log_ticks, pixels, text, ticks

SVG = "{http://www.w3.org/2000/svg}"
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu")


def row(sae_id: str, l0: float, architecture: str = "topk", **numbers: Any) -> dict[str, Any]:
    """A row of the `selection` table."""
    settled = {"sae_id": sae_id, "architecture": architecture, "l0": l0, "selected": False, "fvu": 0.25}
    settled |= {"above_null": 0.004, "above_null_low": 0.002, "above_null_high": 0.005}
    return settled | {"i_cdf_null": 0.01, "i_cdf_null_high": 0.011} | numbers


def parsed(curve: list[dict[str, Any]]) -> ElementTree.Element:
    return ElementTree.fromstring(curve_svg(curve))


def words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def marks(root: ElementTree.Element, told: str) -> list[ElementTree.Element]:
    """The marks that tell a pointer about the SAE `told`."""
    return [e for e in root.iter() if (e.findtext(f"{SVG}title") or "").startswith(f"{told}: ") and e is not root]


def lines(root: ElementTree.Element, colour: str) -> list[dict[str, float]]:
    """The ends of all lines of a colour, in pixels."""
    found = [line.attrib for line in root.iter(f"{SVG}line") if line.attrib["stroke"] == colour]
    return [{end: float(line[end]) for end in ("x1", "y1", "x2", "y2")} for line in found]


def test_the_picture_of_the_invented_sweep_is_the_golden_one():
    """`python tests/made_release.py` writes it anew."""
    rows = [{"sae_id": sae_id, **numbers} for sae_id, numbers in made_curve().items()]
    assert curve_svg(rows) == (GOLDEN / "saes/curve.svg").read_text(encoding="utf-8")


def test_the_order_of_the_sparsities_changes_no_byte():
    rows = [row(f"h/topk-k{k}-w8", float(k)) for k in (1, 2, 4, 8)]
    shuffled = random.Random(1).sample(rows, 4)
    assert shuffled != rows
    assert curve_svg(shuffled) == curve_svg(rows)


def test_marks_and_whiskers_lie_where_their_numbers_are():
    """Contrast: values from 0 (the null) to 0.005, so the axis goes from -0.0005 to 0.0059 over y = 300 to 138."""
    (mark_of_fvu, mark) = marks(root := parsed([row("h/a", 4.0), row("h/b", 16.0)]), "h/a")

    def y(value: float) -> float:
        return 300 - 162 * (value + 0.0005) / 0.0064

    assert float(mark.attrib["cy"]) == pytest.approx(y(0.004), abs=0.06)
    at_a = [line for line in lines(root, "#1f4e9c") if line["x1"] == line["x2"] == float(mark.attrib["cx"])]
    assert [(line["y1"], line["y2"]) for line in at_a] == [
        (pytest.approx(y(0.002), abs=0.06), pytest.approx(y(0.005), abs=0.06))
    ]
    null = [line for line in lines(root, "#9a5b00") if line["x2"] - line["x1"] == 670]
    assert [line["y1"] for line in null] == [pytest.approx(y(0.0), abs=0.06)]
    short = [line for line in lines(root, "#9a5b00") if line["x2"] - line["x1"] == pytest.approx(16)]
    bars = [line for line in short if line["y1"] < 320]  # above the legend
    assert [line["y1"] for line in bars] == [pytest.approx(y(0.001), abs=0.06)] * 2  # 0.011 less the mean 0.01
    assert mark_of_fvu.attrib["fill"] == "#ffffff"
    assert mark.attrib["fill"] == mark.attrib["stroke"] != "#ffffff"


def test_l0_is_on_a_logarithmic_scale():
    """2, 8 and 32 are equally far apart."""
    xs = [float(marks(parsed(rows), name)[0].attrib["cx"]) for rows in [SPREAD] for name in ("h/a", "h/b", "h/c")]
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.15)
    assert xs[0] < xs[1]


SPREAD = [row("h/a", 2.0), row("h/b", 8.0), row("h/c", 32.0)]


def test_architectures_differ_by_shape_and_are_named():
    rows = [row(f"h/{name}", 4.0 + i, name) for i, name in enumerate(ARCHITECTURES)]
    root = parsed(rows)
    shapes = set()
    for name in ARCHITECTURES:
        mark = marks(root, f"h/{name}")[0]
        corners = [tuple(map(float, corner.split(","))) for corner in mark.attrib.get("points", "").split()]
        first = corners[0] if corners else (0.0, 0.0)
        shapes.add((mark.tag, *((round(x - first[0]), round(y - first[1])) for x, y in corners)))
        assert name in words(root)
    assert len(shapes) == len(ARCHITECTURES)


def test_marks_at_one_l0_do_not_cover_each_other():
    root = parsed([row(f"h/{name}", 8.0, name) for name in ARCHITECTURES])
    (top, *_), xs = [label for label in words(root) if label == "h"], []
    for name in ARCHITECTURES:
        place = marks(root, f"h/{name}")[0].attrib
        xs.append(float(place.get("cx") or place["points"].partition(",")[0]))
    assert top == "h"
    assert len({round(x) for x in xs}) == 5


def test_the_selected_sae_alone_is_ringed_and_named():
    root = parsed([row("h/topk-k4-w8", 4.0), row("h/topk-k8-w8", 8.0, selected=True)])
    rings = [e.attrib for e in root.iter(f"{SVG}circle") if e.attrib["r"] == "10.0"]
    (_, mark) = marks(root, "h/topk-k8-w8")
    assert [(ring["cx"], ring["cy"]) for ring in rings] == [(mark.attrib["cx"], mark.attrib["cy"])]
    assert [label for label in words(root) if label.startswith("selected:")] == ["selected: topk-k8-w8"]
    assert "h/topk-k8-w8" in (root.findtext(f"{SVG}desc") or "")


def test_every_hook_point_has_a_panel():
    names = [f"layers.{i}.mlp" for i in range(4)]
    root = parsed([row(f"{name}/a", 4.0) for name in names])
    assert [label for label in words(root) if label.startswith("layers.")] == names
    assert words(root).count("FVU") == words(root).count("I_CDF above its null") == 4


HOSTILE = [
    "<script>alert(1)<script>",
    "<img src=x onerror=alert(1)>",
    "a & b",
    "\"quoted\" 'id'",
    "]]>",
    "<!-- x",
    "\x00\x1b[31m\ud800",
    "&#60;",
    "枪 👍🏽",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_id_is_shown_as_text(name: str):
    svg = curve_svg([row(f"{name}/{name}", 4.0, selected=True), row(f"{name}/b", 8.0, f"x{name}")])
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} <= {
        f"{SVG}{tag}" for tag in ("svg", "title", "desc", "rect", "line", "text", "polyline", "circle", "polygon")
    }
    shown = re.sub("[\x00-\x1f\ud800]", "\ufffd", name)
    assert f"selected: {shown}" in words(root)
    assert shown in words(root)
    assert not any(key.startswith("on") or "href" in key for element in root.iter() for key in element.attrib)


@pytest.mark.parametrize(
    "numbers",
    [
        {"fvu": None},
        {"above_null": None, "above_null_low": None, "above_null_high": None},
        {"above_null_low": None, "above_null_high": None},
        {"i_cdf_null": None, "i_cdf_null_high": None},
        {"above_null": 0.0, "above_null_low": 0.0, "above_null_high": 0.0, "i_cdf_null_high": 0.01, "fvu": 0.0},
        {"above_null": -0.01, "above_null_low": -0.02, "above_null_high": -0.005},
        {"fvu": None, "above_null": None, "above_null_low": None, "above_null_high": None},
        {"l0": 1e-3, "fvu": 1e6},
    ],
)
@pytest.mark.parametrize("selected", [False, True])
def test_what_is_undefined_lacks_its_mark_and_nothing_else(numbers: dict[str, Any], selected: bool):
    root = parsed([row("h/a", **({"l0": 4.0, "selected": selected} | numbers))])
    defined = [name for name in ("fvu", "above_null") if numbers.get(name, 0.0) is not None]
    assert len(marks(root, "h/a")) == len(defined)
    places = [float(v) for e in root.iter() for k, v in e.attrib.items() if k in ("cx", "cy", "x1", "y1", "x", "y")]
    assert all(-1 <= place <= 830 for place in places)


def test_an_sae_that_never_fires_has_no_place_on_a_logarithmic_scale():
    root = parsed([row("h/a", 0.0, selected=True), row("g/a", 0.0), row("g/b", 2.0)])
    assert "No SAE here has an L0 above 0." in words(root)
    assert not marks(root, "h/a")
    assert not marks(root, "g/a")
    assert len(marks(root, "g/b")) == 2
    assert parsed([]).tag == f"{SVG}svg"


def test_it_is_readable_on_a_dark_page():
    root = parsed([row("h/a", 4.0)])
    ground = next(root.iter(f"{SVG}rect")).attrib
    assert ground["fill"] == "#ffffff"
    assert (ground["width"], ground["height"]) == (root.attrib["width"], root.attrib["height"])


# --- pieces -------------------------------------------------------------------------------------------------------


def test_an_axis_by_hand():
    assert Axis(0, 10, 100, 0).at(2.5) == 75
    assert Axis(1, 100, 0, 50, log=True).at(10) == pytest.approx(25)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.0004, 0.0021, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (0.18, 0.24, [0.18, 0.19, 0.2, 0.21, 0.22, 0.23, 0.24]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_there_are_a_few_ticks_on_any_scale():
    chance = random.Random(0)
    for _ in range(500):
        low = chance.uniform(-1, 1) * 10 ** chance.uniform(-6, 6)
        high = low + 10 ** chance.uniform(-6, 6)
        found = ticks(low, high)
        assert 2 <= len(found) <= 8
        spread = high - low
        assert all(low - 1e-6 * spread - 1e-11 <= tick <= high + 1e-6 * spread + 1e-11 for tick in found)
        assert all(a < b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(7, 37, [10, 20]), (0.9, 60, [1, 2, 5, 10, 20, 50]), (1, 1e4, [1, 10, 100, 1000, 10000]), (3, 4, [3.5])],
)
def test_ticks_of_a_logarithmic_scale(low: float, high: float, expected: list[float]):
    assert log_ticks(low, high) == pytest.approx(expected)


def test_numbers_of_pixels_have_one_decimal_and_no_negative_zero():
    assert [pixels(value) for value in (1, 1.25, -0.01, -2.06, 1 / 3)] == ["1.0", "1.2", "0.0", "-2.1", "0.3"]


def test_text_is_escaped_in_content():
    assert text(0, 0, "<b> & 'c'").endswith(">&lt;b&gt; &amp; &#x27;c&#x27;</text>")
    assert escaped("a\x00b") == "a\ufffdb"
