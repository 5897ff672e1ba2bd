"""The notebooks as web pages: their files; tests/places/test_site_browser.py opens them."""

import bs4  # comes with nbconvert
import make_site
import pytest
from nbformat import v4, write
from series import PATHS, ROOT, read


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages without sliders; nothing is run for them."""
    folder = tmp_path_factory.mktemp("site")
    make_site.make_site(folder=folder, still=True)
    return folder


@pytest.mark.parametrize("path", [ROOT / "index", *PATHS], ids=lambda path: path.stem)
def test_a_page_is_whole_leads_on_and_needs_nothing_from_elsewhere_but_mathjax(site, path):
    text = (site / f"{path.stem}.html").read_text(encoding="utf-8")
    page = bs4.BeautifulSoup(text, "html.parser")
    images, links = page("img"), [a["href"] for a in page("a")]
    assert [script["src"] for script in page("script", src=True)] == [make_site.MATHJAX_URL]
    assert [link["href"] for link in page("link")] == ["style.css"]
    assert all(len(image["alt"]) > 3 for image in images), "no alt text"
    files = [image["src"] for image in images if not image["src"].startswith("data:image/")]
    files += [link.split("#")[0] for link in links if not link.startswith(("https://", "#"))]
    assert all((site / file).is_file() for file in files), files
    assert text.count("<details") == text.count("</details>") and len(page("h1")) == 1
    if path.stem == "index":
        assert [x for x in links if x.endswith(".html")] == [f"{path.stem}.html" for path in PATHS]
        assert "These garments never existed" in text and "Minutes on two CPU cores" in text
        assert (site / "img/fashion.gif").read_bytes() == (ROOT / "img/fashion.gif").read_bytes()
        return
    i, cells = PATHS.index(path), read(path)["cells"]
    outputs = [" ".join(o.get("data", ())) for cell in cells for o in cell.get("outputs", ())]
    assert len(images) - sum("image/" in kinds for kinds in outputs) in (0, 1, 2)  # in the prose
    folded = sum(c["source"].count("<details") + bool(c["metadata"].get("jupyter")) for c in cells)
    assert len(page("details")) == len(page("summary")) == folded > 3
    assert not page("details", open=True) and links.count("index.html") == 2
    for neighbour in PATHS[max(0, i - 1) : i] + PATHS[i + 1 : i + 2]:
        assert links.count(f"{neighbour.stem}.html") >= 2  # above and below


def test_mathjax_beside_the_pages_is_used(tmp_path):
    (tmp_path / make_site.MATHJAX).parent.mkdir(parents=True)
    (tmp_path / make_site.MATHJAX).write_text("stands for the real one")
    make_site.make_site(["none"], tmp_path)
    assert f'src="{make_site.MATHJAX}"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def frames_of(folder, *cells):
    write(v4.new_notebook(cells=[*map(v4.new_code_cell, cells)]), folder / "01.ipynb")
    return make_site.frames_of(folder / "01.ipynb")


def test_the_pictures_of_a_slider_are_drawn_by_the_notebook(tmp_path):
    frames = frames_of(tmp_path, "import ipywidgets, matplotlib.pyplot as plt", """
def show(t, w, colour):
    plt.plot([w, t], c=colour)
    plt.show()
slider = ipywidgets.IntSlider(value=50, min=0, max=1000, step=10, description="step")
ipywidgets.interact(show, t=slider, w=["A", "B"], colour=ipywidgets.fixed("red"))
show(50, "A", "red")  # a still, not one of the slider's""",
                       "raise SystemError('what is below the last slider is not run')")
    assert list(frames) == [1] and list(frames[1]) == ["step", "w"]
    assert [frame[:2] for frame in frames[1]["w"]] == [("A", True), ("B", False)]
    steps = [0, 50, 90, 180, 270, 360, 450, 550, 640, 730, 820, 910, 1000]
    assert [frame[:2] for frame in frames[1]["step"]] == [(str(x), x == 50) for x in steps]
    assert len({picture for *_, picture in frames[1]["step"]}) == 13
    page = bs4.BeautifulSoup(make_site.slider("t", frames[1]["step"]), "html.parser")
    assert page.div.has_attr("hidden")  # nothing is shown where scripts are off
    (bar,) = page("input")
    assert bar.attrs == {"type": "range", "max": "12", "value": "1", "aria-label": "t"}
    assert [image["alt"] for image in page("img")] == [f"t = {x}" for x in steps]


def test_no_slider_from_drawn_garments(tmp_path, capsys):
    assert frames_of(tmp_path, 'print("data: stand-in, drawn by code")', "0  # interact(") == {}
    assert "without the real data" in capsys.readouterr().out


def test_alt_texts_are_sentences_without_markup():
    below = r"At $\hat x_0$, `f` and [05](05.ipynb) **fall**: see. And so on."
    code, prose = v4.new_code_cell(), v4.new_markdown_cell
    cells = [code, prose(below), code, prose("## Next")]
    texts = [make_site.description(cells, i) for i in (0, 2, 3)]
    assert texts == ["At hat x_0, f and 05 fall: see.", *["Figure, drawn by the code above it"] * 2]
