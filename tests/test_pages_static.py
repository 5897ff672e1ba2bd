"""The notebooks where no kernel and no script runs: GitHub's page of them, and nbconvert's.

GitHub turns a notebook into HTML with nbconvert, takes scripts and styles out, and lets MathJax set the mathematics.
"""

import html
import html.parser
import re

import pytest
from series import code_cells, each_notebook, prose, read

# what a page without scripts can show
STATIC = {"image/png", "image/jpeg", "image/gif", "text/html", "text/plain"}
VOID = {"br", "hr", "img"}
TAGS = VOID | {*"details summary sub sup table thead tbody tr th td b i p a code".split()}
# macros that GitHub's MathJax refuses or loses
REFUSED = {*"newcommand renewcommand def DeclareMathOperator require operatorname label ref eqref tag "
           "href class style unicode mbox hbox".split()}


def without_code(text):
    """Markdown text without its code blocks and code spans."""
    text = re.sub(r"^( *)```.*?^ *```", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+).+?\1", "code", text)


def mathematics(text):
    """The formulas of a markdown cell, as matches with the groups display and inline."""
    return list(re.finditer(r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>[^$]+?)\$",
                            without_code(text), re.DOTALL))


WRONG = {  # in a formula
    r"<[a-zA-Z/!?]": "reads as the start of a tag", r"\\[*_]|__|\*\*": "markdown eats this",
    r"\\begin\{(align|equation|gather|eqnarray)\*?\}": "an environment that must not stand in $$"}


def complaints(text):
    """What a renderer of markdown with mathematics would stumble over in this cell."""
    found, plain, end, rest = [], without_code(text), 0, ""
    for match in mathematics(text):
        before, after = plain[: match.start()], plain[match.end():]
        rest, end = rest + plain[end: match.start()], match.end()
        formula = match["display"] or match["inline"]
        if match["display"]:
            alone = not before.rstrip(" ") or re.search(r"\n *\n *$", before)
            if not alone or after and not re.match(r" *(\n *(\n|$)|$)", after):
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
    rest += plain[end:]
    if "$" in rest.replace("\\$", ""):
        found.append(f"a $ without its partner: {rest[:200]}")
    if outside := re.search(r".*\\([a-zA-Z]{3,}|\(|\[).*", rest):
        found.append(f"TeX outside $: {outside[0]}")
    return found


@pytest.mark.parametrize("text, well", [
    ("so $a$ and $b are", 0), ("see $ a$ there", 0), ("see $a$2", 0), ("then\n$$a$$\n\nso", 0),
    ("then\n\n$$a$$\nso", 0), ("$$a\n\nb$$", 0), ("$\\frac{a}{b$", 0), ("$\\left(a)$", 0),
    ("$$\\begin{align}a\\end{align}$$", 0), ("\\begin{equation}a\\end{equation}", 0), ("$a <b$", 0),
    ("$a\\_b$", 0), ("$\\operatorname{tr} a$", 0), ("$$\\begin{aligned}a$$", 0), ("so \\(a\\) is", 0),
    ("the \\alpha of it", 0), ("so $a_t$ and $b_t$, are", 1), ("`$HOME` and $a$", 1),
    ("then\n\n$$\na_1 &= b \\\\\n$$\n\nso", 1), ("```\n$x\n```", 1), ("costs \\$5", 1), ("$$a$$", 1)])
def test_what_is_complained_about(text, well):
    assert bool(complaints(text)) != well


class Reader(html.parser.HTMLParser):
    """Collects tags and attributes, and what is opened but not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


def read_without_scripts(text):
    read = Reader(text)
    assert not read.open and set(read.tags) <= TAGS, (read.open, set(read.tags) - TAGS)
    for tag, name, value in read.attributes:
        assert not name.startswith("on") and not value.startswith("javascript:"), (tag, name)
        if (tag, name) == ("img", "src"):  # nothing from elsewhere
            assert value.startswith("data:image/") and len(value) > 100, value[:100]
    alts = [value for tag, name, value in read.attributes if name == "alt" and value]
    assert read.tags.count("img") == len(alts)
    return read


@each_notebook
def test_prose_without_scripts(path):
    """Formulas come out of nbconvert as they went in; folded markdown is read as markdown."""
    filters = pytest.importorskip("nbconvert.filters")
    assert sum(len(mathematics(text)) for text in prose(path)) > 10, "where are the formulas?"
    for source in prose(path):
        assert complaints(source) == []
        plain = re.sub(r"\$\$?.+?\$\$?", "", without_code(source), flags=re.DOTALL)
        read = read_without_scripts(plain)
        assert read.tags.count("details") == read.tags.count("summary")
        if "details" in read.tags:  # markdown inside is read as markdown only after an empty line
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
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, (
        "GitHub does not show saved widget state")
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    plain, pictures = html.unescape(page), 0
    for output in (output for cell in code_cells(path) for output in cell["outputs"]):
        data = output.get("data", {})
        assert set(data) <= STATIC, "a page without scripts does not show this"
        if "text/html" in data:
            shown = read_without_scripts("".join(data["text/html"]))
            assert "img" in shown.tags or shown.text.strip(), "nothing is left without scripts"
        pictures += "image/png" in data and "text/html" not in data
        for line in "".join(output.get("text", "")).splitlines():
            assert line.strip() in plain, line
    assert page.count('src="data:image/png;base64,') == pictures > 0
