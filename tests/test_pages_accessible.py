"""Readable by everybody: colours, line styles, sizes of letters, words for what moves, sliders
without a mouse.

What a figure shows is known only when it is drawn, so notebooks are run as students get them
(notebooks/make_copies.py), and every figure is looked at on its way out. 01 is in every run of
pytest; `pytest -m figures` does it with all notebooks.
"""

import ast
import itertools
import json
import re

import make_copies
import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient
from series import PATHS, read

import ddpm_utils


def test_the_cycle_of_colours_is_okabe_and_itos():
    """Okabe and Ito 2008: told apart by the colour-blind, and in grey by 0.016 and more."""
    with matplotlib.rc_context():
        ddpm_utils.set_up()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    assert cycle == ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


# ------------------------------------------------------------------ what the figures show

WATCH = """
import matplotlib, matplotlib.backend_bases, matplotlib.text
_seen, _print = [], matplotlib.backend_bases.FigureCanvasBase.print_figure

def _watched(canvas, *args, **options):
    figure = canvas.figure
    texts = [(t.get_text(), float(t.get_fontsize())) for t in figure.findobj(matplotlib.text.Text)
             if t.get_visible() and t.get_text().strip()]
    lines = [[(l.get_label(), matplotlib.colors.to_hex(l.get_color()), l.get_linestyle(),
               str(l.get_marker()), float(l.get_linewidth()))
              for l in axes.lines if not l.get_label().startswith("_")] for axes in figure.axes]
    _seen.append({"width": float(figure.get_figwidth()), "texts": texts,
                  "axes": [l for l in lines if l]})
    return _print(canvas, *args, **options)

matplotlib.backend_bases.FigureCanvasBase.print_figure = _watched
"""


def figures_of(path):
    """Runs a notebook; what is in each of its figures."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WATCH))
    notebook.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(_seen))"))
    NotebookClient(notebook, timeout=3600, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


def complaints(figures):
    found = []
    for figure in figures:
        # a figure wider than the slide is made smaller
        shrunk = min(1, make_copies.WIDTH / 80 / figure["width"])
        found += [f"{size * shrunk:.1f} points: {text}" for text, size in figure["texts"]
                  if size * shrunk < 11 - 1e-6]
        pairs = (pair for lines in figure["axes"] for pair in itertools.combinations(lines, 2))
        for (a, colour, *style, width), (b, colour2, *style2, width2) in pairs:
            if style == style2 and max(width, width2) < 3 * min(width, width2):
                found.append(f"told apart by nothing but colour ({colour}, {colour2}): {a} and {b}")
    return found


def test_complaints_are_made():
    one, red, dashed = (["a", "#000000", "-", "None", 1.5], ["b", "#ff0000", "-", "None", 1.5],
                        ["b", "#ff0000", "--", "None", 1.5])
    assert complaints([{"width": 15, "texts": [("small", 12)], "axes": [[one, red]]}]) == [
        "10.7 points: small", "told apart by nothing but colour (#000000, #ff0000): a and b"]
    assert not complaints([{"width": 13, "texts": [("large", 11)], "axes": [[one, dashed]]}])


@pytest.mark.parametrize("path", [PATHS[0], *(
    pytest.param(path, marks=pytest.mark.figures) for path in PATHS)], ids=lambda path: path.stem)
def test_each_runs_without_its_solutions_and_its_figures_can_be_read(path, tmp_path, monkeypatch):
    """The student's copy: nothing but the data is taken from this checkout."""
    monkeypatch.setenv("DDPM_DATA", str(ddpm_utils._data_folder().resolve()))
    copies = make_copies.make_student_copy(tmp_path / "student")
    figures = figures_of(copies[PATHS.index(path)])
    assert figures and complaints(figures) == []
    if path == PATHS[0]:  # it has that many, and lines that are named
        assert len(figures) >= 10 and any(figure["axes"] for figure in figures)


# ------------------------------------------------------------------ animations and sliders

def test_what_moves_is_told_in_words():
    """Each animation has alt text, and between it and the next heading stands what it shows."""
    moving = 0
    for page in (read(path)["cells"] for path in PATHS):
        for i, cell in enumerate(page):
            data = [output.get("data", {}) for output in cell.get("outputs", [])]
            html = "".join("".join(one.get("text/html", "")) for one in data)
            if "image/gif" not in html and not any("image/gif" in one for one in data):
                continue
            moving += 1
            for tag in re.findall(r"<img[^>]*>", html):
                assert len(re.search(r'alt="([^"]*)"', tag)[1]) > 20, tag[:200]
            below = [c["source"] for c in page[i + 1:] if c["cell_type"] == "markdown"]
            words = "".join(itertools.takewhile(lambda text: text[0] != "#", below))
            assert "animation" in words and len(words) > 200, cell["source"][:200]
    assert moving >= 1


def test_every_slider_has_a_label_and_its_keys_are_told():
    sliders = 0
    for page in (read(path)["cells"] for path in PATHS):
        for before, cell, after in zip(page, page[1:], page[2:]):
            if cell["cell_type"] != "code" or "interact(" not in cell["source"]:
                continue
            calls = [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(cell["source"]))
                     if isinstance(node, ast.Call)]
            widgets = [call for name, call in calls
                       if re.search(r"(Slider|Buttons|Dropdown|Text|Checkbox)$", name)]
            (interact,) = [call for name, call in calls if name.endswith("interact")]
            moved = [k for k in interact.keywords if "fixed(" not in ast.unparse(k.value)]
            assert len(widgets) == len(moved) > 0, "interact makes its own widgets of plain values"
            for call in widgets:
                label = {k.arg: k.value for k in call.keywords}["description"]
                assert isinstance(label, ast.Constant) and label.value.strip()
            sliders += 1
            assert before["cell_type"] == "markdown" and "arrow keys" in before["source"]
            assert "interact" not in after["source"], "the view without a kernel is missing"
    assert sliders >= 3
