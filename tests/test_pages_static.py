"""The notebooks where no kernel and no script runs: GitHub's page of them, and nbconvert's.

GitHub turns a notebook into HTML with nbconvert, takes scripts and styles out, and lets MathJax set the mathematics.
"""

import html
import html.parser
import re

import pytest
from series import code_cells, each_notebook, prose, read

STATIC = {
    "image/png",
    "image/jpeg",
    "image/gif",
    "text/html",
    "text/plain",
}  # what a page without scripts can show
VOID = {"br", "hr", "img"}
TAGS = VOID | {"details", "summary", "sub", "sup", "table", "thead", "tbody", "tr", "th", "td", "b",
               "i", "p", "a", "code"}
REFUSED = [
    "newcommand",
    "renewcommand",
    "def",
    "DeclareMathOperator",
    "require",
    "operatorname",
    "label",
    "ref",
    "eqref",
    "tag",
    "href",
    "class",
    "style",
    "unicode",
    "mbox",
    "hbox",
]  # macros that GitHub's MathJax refuses or loses


def without_code(text):
    """Markdown text without its code blocks and code spans."""
    text = re.sub(r"^( *)```.*?^ *```", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+).+?\1", "code", text)


def mathematics(text):
    """The formulas of a markdown cell, as matches with the groups display and inline."""
    return list(re.finditer(r"\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>[^$]+?)\$",
                            without_code(text), re.DOTALL))


def complaints(text):
    """What a renderer of markdown with mathematics would stumble over in this cell."""
    found, plain, end = [], without_code(text), 0
    rest = []
    for match in mathematics(text):
        before, after = plain[: match.start()], plain[match.end() :]
        rest.append(plain[end : match.start()])
        end = match.end()
        formula = match["display"] or match["inline"]
        if match["display"]:
            if (before.rstrip(" ") and not re.search(r"\n *\n *$", before) or after
                and not re.match(r" *(\n *(\n|$)|$)", after)):
                found.append(f"$$ without blank lines around it: {formula}")
            if re.search(r"\n\s*\n", formula):
                found.append(f"an empty line inside $$: {formula}")
        else:
            if formula != formula.strip() or "\n" in formula:
                found.append(f"a space or line break inside $: {formula}")
            if re.search(r"\w$", before) or re.match(r"\w", after):
                found.append(f"a letter or digit touches $: {before[-10:]}${formula}${after[:10]}")
        if formula.count("{") != formula.count("}"):
            found.append(f"unbalanced braces: {formula}")
        if len(re.findall(r"\\left\b", formula)) != len(re.findall(r"\\right\b", formula)):
            found.append(f"\\left without \\right: {formula}")
        if re.findall(r"\\begin\{(.+?)\}", formula) != re.findall(r"\\end\{(.+?)\}", formula)[::-1]:
            found.append(f"\\begin without \\end: {formula}")
        if re.search(r"\\begin\{(align|equation|gather|eqnarray)\*?\}", formula):
            found.append(f"an environment that must not stand in $$: {formula}")
        if re.search(r"<[a-zA-Z/!?]", formula):
            found.append(f"< reads as the start of a tag: {formula}")
        if re.search(r"\\[*_]|__|\*\*", formula):
            found.append(f"markdown eats this: {formula}")
        if refused := set(re.findall(r"\\([a-zA-Z]+)", formula)) & set(REFUSED):
            found.append(f"GitHub refuses {refused}: {formula}")
    rest.append(plain[end:])
    rest = "".join(rest)
    if "$" in rest.replace("\\$", ""):
        found.append(f"a $ without its partner: {rest[:200]}")
    if outside := re.search(r".*\\([a-zA-Z]{3,}|\(|\[).*", rest):
        found.append(f"TeX outside $: {outside[0]}")
    return found


@pytest.mark.parametrize("text", ["so $a$ and $b are", "see $ a$ there", "see $a$2",
                                  "then\n$$a$$\n\nso", "then\n\n$$a$$\nso", "$$a\n\nb$$",
                                  "$\\frac{a}{b$", "$\\left(a)$", "$$\\begin{align}a\\end{align}$$",
                                  "\\begin{equation}a\\end{equation}", "$a <b$", "$a\\_b$",
                                  "$\\operatorname{tr} a$", "$$\\begin{aligned}a$$",
                                  "so \\(a\\) is", "the \\alpha of it"])
def test_what_is_complained_about(text):
    assert complaints(text)


@pytest.mark.parametrize("text", ["so $a_t$ and $b_t$, are", "then\n\n$$\na_1 &= b \\\\\n$$\n\nso",
                                  "`$HOME` and $a$", "```\n$x\n```", "costs \\$5", "$$a$$"])
def test_what_is_not(text):
    assert not complaints(text)


@each_notebook
def test_mathematics(path):
    texts = prose(path)
    assert sum(len(mathematics(text)) for text in texts) > 10, "where has the mathematics gone?"
    assert not [complaint for text in texts for complaint in complaints(text)]


class Reader(html.parser.HTMLParser):
    """Collects tags and attributes, and what is opened but not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


def assert_survives_without_scripts(text):
    read = Reader(text)
    assert not read.open, f"not closed: {read.open}"
    assert set(read.tags) <= TAGS, set(read.tags) - TAGS
    for tag, name, value in read.attributes:
        assert not name.startswith("on") and not (value or "").startswith("javascript:"), (tag,
                                                                                           name)
        if tag == "img" and name == "src":
            # nothing from elsewhere
            assert value.startswith("data:image/") and len(value) > 100, value[:100]
    assert read.tags.count("img") == sum(name == "alt" and bool(value) for _, name,
                                         value in read.attributes)
    return read


@each_notebook
def test_html_in_the_prose(path):
    for source in prose(path):
        text = re.sub(r"\$\$?.+?\$\$?", "", without_code(source), flags=re.DOTALL)
        read = assert_survives_without_scripts(text)
        assert read.tags.count("details") == read.tags.count("summary")
        if "details" in read.tags:  # markdown inside is read as markdown only after an empty line
            assert re.search(r"</summary>\n *\n", source)
            assert re.search(r"\n *\n *</details>", source)


@each_notebook
def test_outputs_show_without_scripts(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            kinds = set(output.get("data", {}))
            assert kinds <= STATIC, f"a page without scripts does not show {kinds - STATIC}"
            if "text/html" in kinds:
                read = assert_survives_without_scripts("".join(output["data"]["text/html"]))
                assert "img" in read.tags or read.text.strip(), "nothing is left without scripts"


@each_notebook
def test_no_widget_metadata(path):
    notebook = read(path)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, (
        "GitHub does not show saved widget state"
    )
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))


@each_notebook
def test_nbconvert_keeps_every_formula(path):
    """nbconvert reads the markdown: whatever stands between dollars must come out as it went in."""
    filters = pytest.importorskip("nbconvert.filters")
    for source in prose(path):
        page = re.sub(r"<(code|pre)\b.*?</\1>", "code", filters.markdown2html(source),
                      flags=re.DOTALL)
        page = html.unescape(page)
        for match in mathematics(source):
            formula = match[0].strip("$")
            assert formula.strip() in page, f"lost on the way to HTML: {formula}"


@each_notebook
def test_nbconvert_to_html(path):
    """The whole page, from the saved outputs: every picture and every printed line is on it."""
    nbconvert = pytest.importorskip("nbconvert")
    page, _ = nbconvert.HTMLExporter().from_filename(str(path))
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    pictures = sum("image/png" in output.get("data", {}) and "text/html" not in output["data"]
                   for output in outputs)
    assert pictures > 0
    assert page.count('src="data:image/png;base64,') == pictures
    plain = html.unescape(page)
    for output in outputs:
        if output["output_type"] == "stream":
            for line in "".join(output["text"]).splitlines():
                assert line.strip() in plain, line
