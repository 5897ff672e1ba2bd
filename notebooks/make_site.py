"""Makes web pages of the notebooks, to be read on any device, in outputs/site/.

    python notebooks/make_site.py              all pages, with sliders that move (some minutes)
    python notebooks/make_site.py 01 03        those two, and the index
    python notebooks/make_site.py --still      without sliders: nothing is run, seconds

What the pages show are the outputs saved in the notebooks. For a slider, the cells down to it are
run, with the picture drawn at 12 of its values; on the page a script of a few lines shows one of
them. MathJax comes from the network, unless it is in `outputs/site/node_modules/`: see teaching.md.
"""

import html
import os
import pathlib
import re
import shutil
import sys

import nbformat
from nbclient import NotebookClient
from nbconvert.filters import Highlight2HTML, ansi2html, markdown2html_mistune
from pygments.formatters import HtmlFormatter
from refresh import patch_nbclient

ROOT = pathlib.Path(__file__).resolve().parent.parent
SITE = ROOT / "outputs" / "site"
SOURCE = "https://github.com/OWNER/diffusion-notebooks/blob/main"
MATHJAX = "node_modules/mathjax/es5/tex-svg.js"  # beside the pages; where it isn't, from here:
MATHJAX_URL = "https://cdn.jsdelivr.net/npm/mathjax@3.2.2/es5/tex-svg.js"
PAGE = """<!DOCTYPE html>
<html lang="en-GB"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="style.css">
<script>MathJax = {{tex: {{inlineMath: [['$', '$']]}}}}</script>
<script async src="{mathjax}"></script></head>
<body>{nav}<main>
{body}
</main>{nav}<script>{script}</script></body></html>
"""
SCRIPT = """
for (const slider of document.querySelectorAll('.slider')) {
  const pictures = slider.querySelectorAll('img'), range = slider.querySelector('input');
  range.oninput = () => {
    pictures.forEach((picture, i) => picture.hidden = i != range.value);
    const text = pictures[range.value].alt;
    slider.querySelector('output').value = text;
    range.setAttribute('aria-valuetext', text);
  };
  range.oninput();
  slider.hidden = false;
}"""
# In place of ipywidgets.interact: for each control that is not fixed it draws the picture at 12
# values, the other controls at their start, each picture after an output that tells the value.
INTERACT = """
import ipywidgets
from IPython.display import display

def draw_all(function, **controls):
    controls = {w._kwarg: w for w in ipywidgets.interactive(function, **controls).kwargs_widgets}
    start = {name: w.value for name, w in controls.items()}
    for name, w in controls.items():
        if isinstance(w, ipywidgets.fixed):
            continue
        values = list(getattr(w, "options", ())) or [
            w.min + i * w.step for i in range(round((w.max - w.min) / w.step) + 1)]
        at = min(range(len(values)), key=lambda i: values[i] != w.value)
        for i in sorted({at, *(round(k * (len(values) - 1) / 11) for k in range(12))}):
            text = values[i] if isinstance(values[i], str) else f"{values[i]:.6g}"
            display({"control": w.description or name, "text": text, "start": str(i == at)},
                    raw=True)
            function(**{**start, name: values[i]})

ipywidgets.interact = draw_all
"""


def frames_of(path):
    """Runs a notebook down to its last slider.

    {index of a cell: {name of a control: [(value, shown at first?, PNG), …]}}
    """
    notebook = nbformat.read(path, as_version=4)
    where = [i for i, cell in enumerate(notebook.cells) if "interact(" in cell.source]
    if not where:
        return {}
    notebook.cells = [nbformat.v4.new_code_cell(INTERACT), *notebook.cells[: where[-1] + 1]]
    patch_nbclient()
    environment = {**os.environ, "DDPM_MAINTAINER": "0"}  # the README's pictures stay
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3")
    client.execute(cwd=str(path.parent), env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if any("stand-in" in output.get("text", "") for output in outputs):
        print(f"{path.name}: without the real data its pictures would not be those of the page")
        return {}
    frames = {i: {} for i in where}
    for i in where:
        data = [output.get("data", {}) for output in notebook.cells[i + 1].outputs]
        for a, b in zip(data, data[1:]):
            if "control" in a:
                frame = (a["text"], a["start"] == "True", b["image/png"])
                frames[i].setdefault(a["control"], []).append(frame)
    return frames


def image(data, alt, more=""):
    """An <img> that holds its picture."""
    kind = next(kind for kind in data if kind.startswith("image/"))
    source = f"data:{kind};base64,{data[kind].strip()}"
    return f'<img src="{source}" alt="{html.escape(alt)}"{more}>'


def slider(name, frames):
    """All pictures of a control, one of them visible. The whole is hidden until a script runs: the
    notebook shows a still of each slider anyway."""
    start = next(i for i, frame in enumerate(frames) if frame[1])
    pictures = [image({"image/png": png}, f"{name} = {text}", " hidden") for text, _, png in frames]
    return f"""<div class="slider" hidden><output></output>
<input type="range" max="{len(frames) - 1}" value="{start}" aria-label="{html.escape(name)}">
{"".join(pictures)}</div>"""


def description(cells, i):
    """The alt text of a figure in cell i: the sentence below it, which tells what to see."""
    below = cells[i + 1].source if i + 1 < len(cells) else ""
    if i + 1 == len(cells) or cells[i + 1].cell_type == "code" or not re.match(r"[\w$*`]", below):
        return "Figure, drawn by the code above it"
    sentence = re.split(r"(?<=[.?!])\s", below)[0].replace("\\", " ")
    return " ".join(re.sub(r"\]\([^)]*\)|[][$*`{}]", "", sentence).split())


def output_html(output, alt):
    if output.output_type == "stream":
        return f'<pre class="out">{ansi2html(output.text)}</pre>'
    if "text/html" in output.data:
        return output.data["text/html"]
    if any(kind.startswith("image/") for kind in output.data):
        return image(output.data, alt)
    return f'<pre class="out">{html.escape(output.data["text/plain"])}</pre>'


def prose(text, folder):
    """Markdown of a file in folder as HTML. A link to a notebook goes to its page, other relative
    links to the repository; of Colab's badge, which is on the network, the words stay."""
    text = re.sub(r"!\[(Open[^\]]*)\]\(https?:[^)]*\)", r"\1", text)
    text = markdown2html_mistune(text)
    text = re.sub(r'href="(?:notebooks/)?(\d\d_\w+)\.ipynb', r'href="\1.html', text)
    return re.sub(r'href="(?!https?:|#|\d\d_\w+\.html)', f'href="{SOURCE}/{folder}', text)


def notebook_html(path, frames):
    """All cells of a notebook; a collapsed one is folded away."""
    cells, parts = nbformat.read(path, as_version=4).cells, []
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            parts.append(prose(cell.source, "notebooks/"))
            continue
        code = Highlight2HTML()(cell.source, language="python")
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            first = html.escape(cell.source.split("\n")[0].removeprefix("# @title "))
            code = f"<details><summary>{first}</summary>{code}</details>"
        parts.append(code)
        parts += [slider(name, some) for name, some in frames.get(i, {}).items()]
        parts += [output_html(output, description(cells, i)) for output in cell.outputs]
    return "\n".join(parts)


def make_page(folder, name, body, links=()):
    """Writes folder/name.html. links: (address, text) pairs."""
    heading = re.search(r"<h1[^>]*>(.*?)<", body)[1]
    nav = "".join(f'<a href="{address}">{text}</a>' for address, text in links)
    mathjax = MATHJAX if (folder / MATHJAX).is_file() else MATHJAX_URL
    page = PAGE.format(
        title=heading, nav=nav and f"<nav>{nav}</nav>", mathjax=mathjax, body=body, script=SCRIPT
    )
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    print(f"outputs/site/{name}.html", flush=True)


def make_site(wanted=("",), folder=SITE, still=False):
    """Writes the index and the pages of the wanted notebooks into folder."""
    folder = pathlib.Path(folder)
    shutil.copytree(ROOT / "img", folder / "img", dirs_exist_ok=True)
    look = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    light, dark = (
        HtmlFormatter(style=style).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    )
    look = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{look}"
    (folder / "style.css").write_text(look, encoding="utf-8")
    # the index: what the README says first, then its table
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\n## The notebooks\n\n(\|.*\n)+", readme)[0]
    more = f"\nTo run them, and for all the rest: [the repository]({SOURCE.split('/blob/')[0]})."
    make_page(folder, "index", prose(readme.split("\n## ")[0] + table + more, ""))
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    titles = [nbformat.read(path, as_version=4).cells[0].source.split("\n")[0] for path in paths]
    pages = [(f"{path.stem}.html", title[2:]) for path, title in zip(paths, titles)]
    for i, path in enumerate(paths):
        if any(path.name.startswith(w) for w in wanted):
            before = [(address, f"← {title}") for address, title in pages[max(0, i - 1) : i]]
            after = [(address, f"{title} →") for address, title in pages[i + 1 : i + 2]]
            links = [*before, ("index.html", "All notebooks"), *after]
            frames = {} if still else frames_of(path)
            make_page(folder, path.stem, notebook_html(path, frames), links)


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if argument != "--still"]
    make_site(numbers or [""], still="--still" in sys.argv)
