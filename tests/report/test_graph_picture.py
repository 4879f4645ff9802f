"""Drawings of graphs: what is drawn, that it is drawn whole and legibly, and that those in the documents are true."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx.parser
import pytest
from graph.models import SUBJECTS, build, random, save
from onnx import helper

from onnxcare.graph.view import GraphView
from onnxcare.inspection import inspect_model
from onnxcare.report import boxes, graph_picture
from onnxcare.report.boxes import boxes_of, without_arrows
from onnxcare.report.svg import Arrow, Box, Line, Sheet, render

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import draw_sites  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
KINDS = {"plain", "port", "open", "refused", "holder"}


class Drawing:
    """A drawing, read back."""

    def __init__(self, text: str) -> None:
        self.root = ElementTree.fromstring(text)
        groups = self.root.findall(f"{SVG}g")
        # What stands in the legend has no title, and labels of arrows have no line.
        self.boxes = [g for g in groups if g.get("class") in KINDS and g.find(f"{SVG}title") is not None]
        self.arrows = [g for g in groups if g.find(f"{SVG}path") is not None]
        self.labels = [
            g for g in groups if g not in self.boxes and g not in self.arrows and g.find(f"{SVG}text") is not None
        ]

    @property
    def texts(self) -> list[str]:
        return [text.text or "" for text in self.root.iter(f"{SVG}text")]

    def box(self, name: str) -> ElementTree.Element:
        (found,) = [box for box in self.boxes if name in lines(box)]
        return found


def lines(group: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in group.findall(f"{SVG}text")]


def told(group: ElementTree.Element) -> str:
    return group.findtext(f"{SVG}title") or ""


def rectangle(group: ElementTree.Element) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a box."""
    place = group.findall(f"{SVG}rect")[-1]
    x, y, width, height = (float(place.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def ends(arrow: ElementTree.Element) -> tuple[tuple[float, float], tuple[float, float]]:
    line, tip = (path.get("d") for path in arrow.findall(f"{SVG}path"))
    start, point = re.match(r"M([\d.]+) ([\d.]+)", line), re.match(r"M([\d.]+) ([\d.]+)", tip)
    return tuple(map(float, start.groups())), tuple(map(float, point.groups()))


def drawing(proto: onnx.ModelProto, folder: Path) -> Drawing:
    model = save(proto, folder)
    return Drawing(graph_picture.draw(model, inspect_model(model)))


def special() -> onnx.ModelProto:
    """A layer that cannot be rewritten, a site that is also read elsewhere, a branch, and two outputs."""
    return build(
        """special (float[N, 8] x, bool flag) => (float[N, 4] y, int64[N] label) {
            [first] z1 = Gemm (x, W1, b1)
            [relu] h1 = Relu (z1)
            [again] z2 = Gemm <alpha = 0.0> (h1, W2)
            [relu2] h2 = Relu (z2)
            [third] z3 = Gemm <alpha = 0.0> (h2, W4)
            [skip] z4 = Add (z3, h1)
            [branch] z5 = If (flag) <
                then_branch = yes () => (float[N, 8] t) { t = Relu (z4) },
                else_branch = no () => (float[N, 8] e) { q = Tanh (z4) w = Abs (q) e = Sqrt (w) }>
            [second] y = Gemm (z5, W3, b3)
            [best] label = ArgMax <axis = 1, keepdims = 0> (y)
        }""",
        {
            "W1": random(8, 8),
            "b1": random(8),
            "W2": random(8, 8),
            "W4": random(8, 8),
            "W3": random(8, 4),
            "b3": random(4),
        },
    )


def arrows_by_hand(proto: onnx.ModelProto) -> int:
    """Return how many arrows a drawing of every node has: one for each tensor that a node reads, however often."""
    constants = {tensor.name for tensor in proto.graph.initializer}

    def reads(node: onnx.NodeProto) -> set[str]:
        found = set(node.input)
        for item in node.attribute:
            for inner in item.g.node:
                found |= reads(inner)
        return found

    made = {item.name for item in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    inside = sum(len(reads(node) & (made - constants)) for node in proto.graph.node)
    return inside + len(proto.graph.output)


# -- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "residual", "special"])
def test_every_node_is_a_box_and_every_tensor_an_arrow(tmp_path: Path, name: str) -> None:
    proto = special() if name == "special" else SUBJECTS[name]().proto
    found = drawing(proto, tmp_path)
    names = [name for box in found.boxes for name in lines(box)[1:2]]
    ports = [lines(box)[0] for box in found.boxes if box.get("class") == "port"]
    assert sorted(set(names) & {node.name for node in proto.graph.node}) == sorted(n.name for n in proto.graph.node)
    assert sorted(ports) == sorted(item.name for item in [*proto.graph.input, *proto.graph.output])
    assert len(found.boxes) == len(proto.graph.node) + len(ports)
    assert len(found.arrows) == arrows_by_hand(proto)


def test_a_layer_shows_its_weights_and_its_colour_says_whether_it_can_be_repaired(tmp_path: Path) -> None:
    found = drawing(special(), tmp_path)
    first, again = found.box("first"), found.box("again")
    assert first.get("class") == "open" and lines(first) == ["Gemm", "first", "W 8×8", "B 8"]  # noqa: RUF001
    assert again.get("class") == "refused"
    assert lines(again) == ["Gemm", "again", "W 8×8", "its alpha is 0"]  # noqa: RUF001
    assert "not by auto" in told(again) and "its alpha is 0" in told(again)
    assert "changed by auto" in told(first)
    assert found.box("relu").get("class") == "plain"


def test_an_add_that_holds_a_bias_shares_the_box_of_its_layer(tmp_path: Path) -> None:
    found = drawing(SUBJECTS["mlp"]().proto, tmp_path)
    assert lines(found.box("fc2"))[:4] == ["MatMul + Add", "fc2", "W 8×7", "B 7"]  # noqa: RUF001
    assert len(found.boxes) == 5 + 2  # of six nodes, one is the bias


def test_sites_are_marked_on_their_arrow(tmp_path: Path) -> None:
    found = drawing(special(), tmp_path)
    marks = {text: label.get("class") for label in found.labels for text in lines(label) if "neurons" in text}
    assert len([label for label in found.labels if "8 neurons" in lines(label)]) == 2
    # The first is also read by the Add, the second by a layer that is refused.
    assert marks == {"8 neurons": "closed"}
    residual = drawing(SUBJECTS["residual"]().proto, tmp_path)
    assert any("not by care: 'h' is also read by Add add" in told(arrow) for arrow in residual.arrows)
    cnn = drawing(SUBJECTS["cnn"]().proto, tmp_path)
    assert Counter(text for label in cnn.labels if label.get("class") == "site" for text in lines(label)) == {
        "N×4×4×4": 1, "4 channels": 1, "N×6×2×2": 1, "6 channels": 1  # noqa: RUF001
    }  # fmt: skip


def test_a_branch_is_one_box_that_tells_what_is_inside(tmp_path: Path) -> None:
    assert lines(drawing(special(), tmp_path).box("branch")) == ["If", "branch", "1 + 3 nodes inside"]


def test_functions_and_quantised_operators_are_drawn_as_what_they_compute(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "my": 1]>
        called (float[N, 2] x) => (float[N, 2] y) { [call] y = my.Twice (x) }
        <domain: "my", opset_import: ["": 17]>
        Twice (X) => (Y) { H = Relu (X) Y = Tanh (H) }"""
    )
    found = drawing(proto, tmp_path)
    assert [lines(box)[0] for box in found.boxes] == ["x", "Relu", "Tanh", "y"]
    note = "Functions are drawn as what is in them, quantised operators as what they compute."
    assert note in found.texts and note not in drawing(special(), tmp_path).texts


def test_shapes_and_values_of_other_constants_stand_in_the_box(tmp_path: Path) -> None:
    proto = build(
        """flat (float[N, 2, 3] x, int64 n) => (float[N, 6] y, float[N, 2, 3] z) {
            [shape] r = Reshape (x, target)
            [shift] y = Add (r, table)
            [power] z = Pow (x, two)
        }""",
        {"target": np.array([-1, 6]), "table": random(6), "two": np.float32(2)},
    )
    found = drawing(proto, tmp_path)
    assert lines(found.box("shape"))[2:] == ["shape -1, 6"]
    assert lines(found.box("shift"))[2:] == ["table 6"]
    assert lines(found.box("power"))[2:] == ["two 2"]


def test_shape_arithmetic_is_left_out_unless_the_model_answers_with_it(tmp_path: Path) -> None:
    found = drawing(SUBJECTS["keras"]().proto, tmp_path)
    assert not {"shape", "gather", "unsqueeze", "concat"} & {text for box in found.boxes for text in lines(box)}
    assert "4 nodes that only work out shapes are left out." in found.texts
    answered = build("sized (float[N, 2] x) => (int64[2] y) { [size] s = Shape (x) [same] y = Identity (s) }")
    assert drawing(answered, tmp_path).box("size") is not None


def test_the_legend_explains_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    texts = drawing(special(), tmp_path).texts
    assert (
        "layer that is refused; the box says why" in texts
        and "site whose units cannot be scaled in what reads them" in texts
    )
    assert "other node with weights" not in texts and "several nodes in one box" not in texts


# -- long graphs ---------------------------------------------------------------------------------


def long_model(blocks: int) -> onnx.ModelProto:
    """Return residual blocks of a normalisation in pieces, a layer, and an activation function in pieces."""
    text, before = "", "x"
    for index in range(blocks):
        text += f"""
            m{index} = ReduceMean <axes = [-1]> ({before})
            d{index} = Sub ({before}, m{index})
            s{index} = Mul (d{index}, d{index})
            v{index} = ReduceMean <axes = [-1]> (s{index})
            e{index} = Add (v{index}, tiny)
            q{index} = Sqrt (e{index})
            n{index} = Div (d{index}, q{index})
            [up{index}] u{index} = MatMul (n{index}, W)
            [half{index}] h{index} = Mul (u{index}, tiny)
            [erf{index}] f{index} = Erf (h{index})
            [gate{index}] g{index} = Mul (f{index}, u{index})
            [down{index}] o{index} = MatMul (g{index}, V{index})
            [skip{index}] r{index} = Add ({before}, o{index})"""
        before = f"r{index}"
    weights = {"W": random(6, 6), "tiny": np.float32(1e-3)} | {f"V{i}": random(6, 6) for i in range(blocks)}
    return build(f"long (float[N, 6] x) => (float[N, 6] y) {{ {text} y = Relu ({before}) }}", weights)


def test_steps_between_layers_are_folded_in_long_models(tmp_path: Path) -> None:
    proto = long_model(12)
    found = drawing(proto, tmp_path)
    heads = Counter(lines(box)[0] for box in found.boxes)
    # A box for the normalisation, one for the activation function, and one each for two layers and the sum.
    norm, step = "ReduceMean · Sub · … · Div", "Mul · Erf · Mul"
    assert heads == {"MatMul": 24, norm: 12, step: 12, "Add": 11, "Add · Relu": 1, "x": 1, "y": 1}
    assert f"{12 * 7 + 12 * 3 + 2} nodes are folded into 25 boxes." in found.texts
    # Folding loses no node: all are named by somebody.
    names = "\n".join(told(box) for box in found.boxes).split("\n")
    view = GraphView(proto)
    assert {view.label(index) for index in range(len(view.nodes))} <= {name.partition(" ")[2] for name in names}
    # Sites stay to be seen; nothing hidden stands in front of the first layer.
    assert len([label for label in found.labels if any("neurons" in text for text in lines(label))]) == 2 * 12 - 1


@pytest.mark.parametrize("seed", range(12))
def test_what_is_folded_leads_to_one_box_alone(seed: int) -> None:
    """Random graphs: nobody outside reads what is made inside a folded box, but for what its last node makes."""
    rng = np.random.default_rng(seed)
    nodes, names = [], ["x"]
    for index in range(150):
        count = int(rng.integers(1, 3))
        reads = [names[max(0, len(names) - 1 - int(rng.geometric(0.5)))] for _ in range(count)]
        kind = "MatMul" if count == 2 and rng.random() < 0.2 else "Add" if count == 2 else "Relu"
        nodes.append(helper.make_node(kind, reads, [f"t{index}"], name=f"n{index}"))
        names.append(f"t{index}")
    kept = {f"t{index}" for index in rng.integers(0, 150, 8)}
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("t149", 1, None)],
    )
    view = GraphView(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))
    found = boxes_of(view, [], kept, ())
    assert sorted(index for group in found.groups for index in group.nodes) == list(range(150))
    assert found.folded
    for group in found.folded:
        assert all(view.nodes[index].op_type != "MatMul" for index in group.nodes)
        for index in group.nodes[:-1]:
            (made,) = view.nodes[index].output
            assert made not in kept and set(view.consumers[made]) <= set(group.nodes)


def test_the_drawing_ends_where_no_browser_would_show_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MOST", 10)
    monkeypatch.setattr(boxes, "FOLDED_FROM", 1000)
    found = drawing(long_model(2), tmp_path)
    assert "The drawing ends here; 17 further nodes are left out." in found.texts
    assert len(found.boxes) == 10 + 2


def test_a_tensor_that_is_read_all_over_is_named_where_it_is_read(tmp_path: Path) -> None:
    text, before = "", "x"
    for index in range(10):
        text += f"""
            [m{index}] z{index} = MatMul ({before}, W)
            [a{index}] h{index} = Add (z{index}, mask)"""
        before = f"h{index}"
    proto = build(
        f"masked (float[N, 4] x, float[N, 4] mask) => (float[N, 4] y) {{ {text} y = Relu (h9) }}", {"W": random(4, 4)}
    )
    found = drawing(proto, tmp_path)
    assert [lines(found.box(f"a{index}"))[2:] for index in range(10)] == [[], *[["reads mask"]] * 9]
    assert "9 long arrows are left out; the boxes they lead to name what they read." in found.texts
    assert len(found.arrows) == arrows_by_hand(proto) - 9


@pytest.mark.parametrize("seed", range(5))
def test_arrows_pass_by_no_more_boxes_than_can_be_placed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "_PASSED", 60)
    rng = np.random.default_rng(seed)
    pairs = {(index, index + 1, f"t{index}") for index in range(60)}
    pairs |= {(int(a), int(b), f"t{a}") for a, b in np.sort(rng.integers(0, 61, (25, 2)), axis=1) if a < b}
    left_out = without_arrows(sorted(pairs), ())
    # Boxes are in a row here, so that an arrow passes by all that lie between its ends.
    assert len(left_out) > 0 and left_out < pairs
    assert sum(b - a - 1 for a, b, _ in pairs - left_out) <= 60
    # Every tensor that is read keeps the arrow to whoever reads it next.
    assert {(index, index + 1, f"t{index}") for index in range(60)} <= pairs - left_out


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "keras", "special", "long"])
def test_boxes_lie_apart_and_arrows_lead_from_one_to_another(tmp_path: Path, name: str) -> None:
    proto = {"special": special, "long": lambda: long_model(12)}.get(name, lambda: SUBJECTS[name]().proto)()
    found = drawing(proto, tmp_path)
    places = [rectangle(box) for box in found.boxes]
    for index, (left, top, right, bottom) in enumerate(places):
        for other in places[index + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    width, height = (float(found.root.get(key)) for key in ("width", "height"))
    assert all(left > 0 and right < width and top > 0 and bottom < height for left, top, right, bottom in places)
    for arrow in found.arrows:
        (x, y), (to_x, to_y) = ends(arrow)
        # Coordinates are rounded to a tenth.
        assert any(left <= x <= right and abs(y - bottom) < 0.2 for left, _, right, bottom in places)
        assert any(left <= to_x <= right and abs(to_y - top) < 0.2 for left, top, right, _ in places)
        assert y < to_y


def test_the_file_is_scalable_and_has_no_script_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    model = save(special(), tmp_path)
    text = graph_picture.draw(model, inspect_model(model))
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= set("svg g title style rect text path".split())
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on") or "href" in name]
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme:dark" in text
    assert text == graph_picture.draw(model, inspect_model(model))


def test_names_that_mean_something_in_xml_are_only_names(tmp_path: Path) -> None:
    names = ["<b>&\"'", "a\tb\nc", "]]>", "\x01\x1b[31m", "ünïcödé", 300 * "x", "</text><script>alert(1)</script>"]
    nodes, before = [], "in"
    for name in names:
        nodes.append(helper.make_node("Relu", [before], [name], name=f"{name} node"))
        before = name
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("in", 1, ["<N>&", 4])],
        [helper.make_tensor_value_info(before, 1, ["<N>&", 4])],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    found = drawing(proto, tmp_path)
    assert "<b>&\"' node" in found.texts and "a\\tb\\nc node" in found.texts and "ünïcödé node" in found.texts
    assert not list(found.root.iter(f"{SVG}script"))
    # Names that are too long are cut in the box and whole for whoever points at it.
    assert max(map(len, found.texts)) < 120 and any(300 * "x" in told(box) for box in found.boxes)


@pytest.mark.parametrize("proto", ["answers a constant", "answers its input", "has no node that computes"])
def test_graphs_without_much_to_draw(tmp_path: Path, proto: str) -> None:
    texts = {
        "answers a constant": "g (float[N] x) => (float[2] y) <float[2] c = {1, 2}> { y = Identity (c) }",
        "answers its input": "g (float[N] x) => (float[N] y) { y = Identity (x) }",
        "has no node that computes": "g () => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }",
    }
    found = drawing(build(texts[proto]), tmp_path)
    assert any("y" in lines(box) for box in found.boxes)


def test_text_fits_into_its_box() -> None:
    line = "W 1024 by 1024 by 3 by 3"
    sheet = Sheet(
        "t", "s", [Box("plain", [Line("head", "Op"), Line("data", line)], "x"), Box("port", [], "y")], [Arrow(0, 1)], []
    )
    found = Drawing(render(sheet))
    left, _, right, _ = rectangle(found.boxes[0])
    # Fixed fonts are at most 0.61 of their size wide.
    assert right - left >= 11 * 0.61 * len(line) * 0.99


# -- the documents -------------------------------------------------------------------------------


def content(text: str) -> list[tuple[str, str | None, str]]:
    """Return what a drawing says, without where: another version of the layout may place things a little otherwise."""
    return [
        (element.tag.removeprefix(SVG), element.get("class"), (element.text or "").strip())
        for element in ElementTree.fromstring(text).iter()
    ]


@pytest.mark.parametrize("name", draw_sites.MODELS)
def test_pictures_of_the_documents_show_what_is_found_now(tmp_path: Path, name: str) -> None:
    kept = draw_sites.PICTURES / f"{name}.svg"
    assert content(draw_sites.draw(name, tmp_path).read_text(encoding="utf-8")) == content(
        kept.read_text(encoding="utf-8")
    ), "run scripts/draw_sites.py, and see whether docs/sites.md still says what the pictures show"


def test_every_picture_is_shown_and_every_one_shown_is_made() -> None:
    shown = set(re.findall(r"pictures/(\w+)\.svg", (ROOT / "docs/sites.md").read_text(encoding="utf-8")))
    assert shown == set(draw_sites.MODELS) == {path.stem for path in draw_sites.PICTURES.glob("*.svg")}
