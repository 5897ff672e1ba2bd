"""The notebooks as web pages, as files; tests/places/test_site_browser.py opens them in a browser."""

import html.parser

import make_site
import nbformat
import pytest
from series import PATHS, ROOT, each_notebook, read

PNG = "iVBORw0KGgo="
FRAMES = [("0", False, PNG), ("500", True, PNG), ("1000", False, PNG)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages without sliders; nothing is run for them."""
    folder = tmp_path_factory.mktemp("site")
    make_site.make_site(folder=folder, still=True)
    return folder


class Page(html.parser.HTMLParser):
    """Every tag of a page, as (name, attributes); `open` at the end is 0 where details are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += tag == "details"

    def handle_endtag(self, tag):
        self.open -= tag == "details"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page(site, name):
    return Page((site / f"{name}.html").read_text(encoding="utf-8"))


def test_the_index_leads_to_every_page_and_has_the_readmes_words(site):
    links = [a["href"] for a in page(site, "index").all("a")]
    assert [x for x in links if x.endswith(".html")] == [f"{path.stem}.html" for path in PATHS]
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "These garments never existed" in text and "Minutes on two CPU cores" in text
    assert (site / "img" / "fashion.gif").read_bytes() == (ROOT / "img/fashion.gif").read_bytes()


@pytest.mark.parametrize("name", ["index", *(path.stem for path in PATHS)])
def test_a_page_needs_nothing_from_elsewhere_but_mathjax(site, name):
    here = page(site, name)
    assert [s["src"] for s in here.all("script") if "src" in s] == [make_site.MATHJAX_URL]
    assert [link["href"] for link in here.all("link")] == ["style.css"]
    for image in here.all("img"):
        assert len(image["alt"]) > 3, "no alt text"
        assert image["src"].startswith("data:image/") or (site / image["src"]).is_file()
    for a in here.all("a"):
        if not a["href"].startswith(("https://", "#")):
            assert (site / a["href"].split("#")[0]).is_file(), a["href"]
    assert here.open == 0


@each_notebook
def test_a_page_has_all_figures_folds_what_is_folded_and_leads_on(site, path):
    here, cells = page(site, path.stem), read(path)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    figures = [o for o in outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
    assert len(figures) <= len(here.all("img")) <= len(figures) + 2
    folded = sum(
        cell["source"].count("<details") + bool(cell["metadata"].get("jupyter")) for cell in cells
    )
    assert len(here.all("details")) == len(here.all("summary")) == folded > 3
    assert not any("open" in details for details in here.all("details"))
    links = [a["href"] for a in here.all("a")]
    i = PATHS.index(path)
    for neighbour in PATHS[max(0, i - 1) : i] + PATHS[i + 1 : i + 2]:
        assert links.count(f"{neighbour.stem}.html") >= 2  # above and below
    assert links.count("index.html") == 2 and len(here.all("h1")) == 1


def test_mathjax_beside_the_pages_is_used(tmp_path):
    (tmp_path / make_site.MATHJAX).parent.mkdir(parents=True)
    (tmp_path / make_site.MATHJAX).write_text("stands for the real one")
    make_site.make_site(["none"], tmp_path)
    assert page(tmp_path, "index").all("script")[1]["src"] == make_site.MATHJAX


def test_a_slider_shows_its_start_and_nothing_where_scripts_are_off():
    here = Page(make_site.slider("t", FRAMES))
    assert "hidden" in here.all("div")[0]
    (range_,) = here.all("input")
    assert (range_["type"], range_["max"], range_["value"]) == ("range", "2", "1")
    assert range_["aria-label"] == "t"
    assert [image["alt"] for image in here.all("img")] == ["t = 0", "t = 500", "t = 1000"]


NOTEBOOK = [
    "import ipywidgets as widgets, matplotlib.pyplot as plt",
    """def show(t, w, colour):
    plt.plot([w, t], c=colour)
    plt.show()
slider = widgets.IntSlider(value=50, min=0, max=1000, step=10, description="step")
widgets.interact(show, t=slider, w=widgets.Dropdown(options=["A", "B"]), colour=widgets.fixed("red"))
show(50, "A", "red")  # a still, not one of the slider's""",
    "raise SystemError('what is below the last slider is not run')",
]


def test_the_pictures_of_a_slider_are_drawn_by_the_notebook(tmp_path):
    path = tmp_path / "01_one.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in NOTEBOOK])
    nbformat.write(notebook, path)
    frames = make_site.frames_of(path)
    assert list(frames) == [1]
    assert list(frames[1]) == ["step", "w"]
    steps = [int(text) for text, _, _ in frames[1]["step"]]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 1000 and len(steps) == 13
    assert [text for text, start, _ in frames[1]["step"] if start] == ["50"]
    assert len({png for _, _, png in frames[1]["step"]}) == 13
    assert [(text, start) for text, start, _ in frames[1]["w"]] == [("A", True), ("B", False)]


def test_no_slider_from_drawn_garments(tmp_path, capsys):
    path = tmp_path / "01_one.ipynb"
    cells = ['print("data: stand-in, drawn by code")', "print; interact = None  # interact(...)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, path)
    assert make_site.frames_of(path) == {}
    assert "without the real data" in capsys.readouterr().out


def test_alt_texts_are_sentences_without_markup():
    cells = [
        nbformat.v4.new_code_cell("plot()"),
        nbformat.v4.new_markdown_cell(
            r"At $\hat x_0$, `f` and [05](05.ipynb) **fall**: see. And so on."
        ),
        nbformat.v4.new_code_cell("plot()"),
        nbformat.v4.new_markdown_cell("## Next"),
    ]
    assert make_site.description(cells, 0) == "At hat x_0, f and 05 fall: see."
    for i in (2, 3):
        assert make_site.description(cells, i) == "Figure, drawn by the code above it"
