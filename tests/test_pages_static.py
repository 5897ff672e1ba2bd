"""The notebooks where no kernel and no script runs: GitHub's page of them, and nbconvert's.

GitHub turns a notebook into HTML with nbconvert, takes scripts and styles out, and lets MathJax set
the mathematics.
"""

import html
import re

import bs4  # comes with nbconvert
import pytest
from series import NOTEBOOKS, PATHS, ROOT, code_cells, each_notebook, prose, read

# what a page without scripts can show
STATIC = {"image/png", "image/jpeg", "image/gif", "text/html", "text/plain"}
TAGS = {*"br hr img details summary sub sup table thead tbody tr th td b i p a code".split()}
# macros that GitHub's MathJax refuses or loses
REFUSED = {*"newcommand renewcommand def DeclareMathOperator require operatorname label ref eqref "
           "tag href class style unicode mbox hbox".split()}
FORMULA = re.compile(r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>[^$]+?)\$", re.DOTALL)


def without_code(text):
    """Markdown text without its code blocks and code spans."""
    text = re.sub(r"^( *)```.*?^ *```", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+).+?\1", "code", text)


def mathematics(text):
    """The formulas of a markdown cell, as matches with the groups display and inline."""
    return list(FORMULA.finditer(without_code(text)))


WRONG = {  # in a formula
    r"<[a-zA-Z/!?]": "reads as the start of a tag", r"\\[*_]|__|\*\*": "markdown eats this",
    r"\\begin\{(align|equation|gather|eqnarray)\*?\}": "an environment that must not stand in $$"}


def complaints(text):
    """What a renderer of markdown with mathematics would stumble over in this cell."""
    found, plain = [], without_code(text)
    for match in mathematics(text):
        before, after = plain[: match.start()], plain[match.end():]
        formula = match["display"] or match["inline"]
        if match["display"]:
            if not (re.search(r"(\A|\n *\n) *\Z", before)
                    and re.match(r" *(\n *(\n|\Z)|\Z)", after)):
                found.append(f"$$ without blank lines around it: {formula}")
            if re.search(r"\n\s*\n", formula):
                found.append(f"an empty line inside $$: {formula}")
        elif formula != formula.strip() or "\n" in formula:
            found.append(f"a space or line break inside $: {formula}")
        elif re.search(r"\w$", before) or re.match(r"\w", after):
            found.append(f"a letter or digit touches $: {before[-10:]}${formula}${after[:10]}")
        opened, closed = (re.findall(rf"\\{word}\{{(.+?)\}}", formula) for word in ("begin", "end"))
        lefts, rights = (len(re.findall(rf"\\{word}\b", formula)) for word in ("left", "right"))
        if formula.count("{") != formula.count("}") or lefts != rights or opened != closed[::-1]:
            found.append(f"unbalanced: {formula}")
        found += [f"{why}: {formula}" for what, why in WRONG.items() if re.search(what, formula)]
        if refused := set(re.findall(r"\\([a-zA-Z]+)", formula)) & REFUSED:
            found.append(f"GitHub refuses {refused}: {formula}")
    rest = FORMULA.sub("", plain)
    if "$" in rest.replace("\\$", ""):
        found.append(f"a $ without its partner: {rest[:200]}")
    if outside := re.search(r".*\\([a-zA-Z]{3,}|\(|\[).*", rest):
        found.append(f"TeX outside $: {outside[0]}")
    return found


ILL = ["so $a$ and $b are", "see $ a$ there", "see $a$2", "then\n$$a$$\n\nso", "then\n\n$$a$$\nso",
       "$$a\n\nb$$", "$\\frac{a}{b$", "$\\left(a)$", "$$\\begin{align}a\\end{align}$$", "$a <b$",
       "\\begin{equation}a\\end{equation}", "$a\\_b$", "$\\operatorname{tr} a$", "so \\(a\\) is",
       "$$\\begin{aligned}a$$", "the \\alpha of it"]
WELL = ["so $a_t$ and $b_t$, are", "`$HOME` and $a$", "then\n\n$$\na_1 &= b \\\\\n$$\n\nso",
        "```\n$x\n```", "costs \\$5", "$$a$$"]


@pytest.mark.parametrize("text", [*ILL, *WELL])
def test_what_is_complained_about(text):
    assert bool(complaints(text)) == (text in ILL)


def read_without_scripts(text):
    """The HTML, in which every tag is closed in its turn, known and harmless."""
    page, closed = bs4.BeautifulSoup(text, "html.parser"), r"</\w+>"
    assert re.findall(closed, text) == re.findall(closed, str(page)), "a tag is not closed in turn"
    for tag in page(True):
        assert tag.name in TAGS, tag.name
        for name, value in tag.attrs.items():
            assert not name.startswith("on") and "javascript:" not in value, (tag.name, name)
        if tag.name == "img":  # nothing from elsewhere
            assert tag["alt"] and tag["src"].startswith("data:image/") and len(tag["src"]) > 100
    return page


@each_notebook
def test_prose_without_scripts(path):
    """Formulas come out of nbconvert as they went in; folded markdown is read as markdown."""
    filters = pytest.importorskip("nbconvert.filters")
    assert sum(len(mathematics(text)) for text in prose(path)) > 10, "where are the formulas?"
    for source in prose(path):
        assert complaints(source) == []
        shown = read_without_scripts(FORMULA.sub("", without_code(source)))
        assert len(shown("details")) == len(shown("summary"))
        if shown.details:  # markdown inside is read as markdown only after an empty line
            assert re.search(r"</summary>\n *\n", source)
            assert re.search(r"\n *\n *</details>", source)
        page = filters.markdown2html(source)
        page = html.unescape(re.sub(r"<(code|pre)\b.*?</\1>", "code", page, flags=re.DOTALL))
        for formula in (match[0].strip("$").strip() for match in mathematics(source)):
            assert formula in page, f"lost on the way to HTML: {formula}"


@each_notebook
def test_outputs_without_scripts(path):
    """nbconvert's page of them, from the saved outputs, has every picture and every line."""
    nbconvert = pytest.importorskip("nbconvert")
    notebook, (page, _) = read(path), nbconvert.HTMLExporter().from_filename(str(path))
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}  # no state of widgets
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    plain, pictures = html.unescape(page), 0
    for output in (output for cell in code_cells(path) for output in cell["outputs"]):
        data = output.get("data", {})
        assert set(data) <= STATIC, "a page without scripts does not show this"
        if "text/html" in data:
            shown = read_without_scripts("".join(data["text/html"]))
            assert shown.img or shown.text.strip(), "nothing is left without scripts"
        pictures += "image/png" in data and "text/html" not in data
        for line in "".join(output.get("text", "")).splitlines():
            assert line.strip() in plain, line
    assert page.count('src="data:image/png;base64,') == pictures > 0


FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", NOTEBOOKS / "teaching.md"]


@pytest.mark.parametrize("path", [*PATHS, *FILES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = (path.read_text(encoding="utf-8") if path in FILES else
            FORMULA.sub("", without_code("\n\n".join(prose(path)))))
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target
