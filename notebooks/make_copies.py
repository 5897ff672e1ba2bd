"""Makes what a teacher hands out and shows.

    python notebooks/make_copies.py         a folder for students, slides and pages of all notebooks
    python notebooks/make_copies.py 01 03   slides and pages of those two (and the students' folder)

`outputs/student/` is complete in itself: the notebooks without the solutions, the helper, the
weights. `outputs/slides/` holds one HTML file per notebook, with the outputs as they are saved in
it; nothing is run. The slides fetch reveal.js and MathJax from the network, unless these are in
`outputs/slides/node_modules/`: see notebooks/teaching.md. `outputs/site/` holds the pages to read,
as make_site.py makes them.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
from make_site import make_site

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
SOLUTION = re.compile(r"\s*<details><summary>Solution of exercise \d+</summary>")
# A slide is 13 1/3 by 7 1/2 inches of 80 pixels, as the figures have: a
# figure's points are the slide's points.
WIDTH, HEIGHT = 1067, 600
LOOK = (
    """<style>
:root { --jp-content-font-size1: 18px; --jp-code-font-size: 14px; --jp-cell-prompt-width: 0px; }
.reveal .slides > section, .reveal .slides > section > section { padding: 0; }
.reveal .slides section section { max-height: %dpx; overflow-y: auto; }
.reveal .slides { text-align: left; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; margin: 0 0 12px 0; }
.reveal h1 { font-size: 44px; } .reveal h2 { font-size: 32px; } .reveal h3 { font-size: 26px; }
.reveal .jp-InputPrompt, .reveal .jp-OutputPrompt { display: none; }
.reveal .jp-RenderedImage img { margin: 4px 0; max-width: 100%%; }
.reveal pre { width: 100%%; font-size: 14px; box-shadow: none; margin: 0; }
.reveal .jp-CodeCell:has(.jp-RenderedImage) .jp-InputArea pre {
  max-height: 62px; overflow-y: auto; }
.reveal .jp-RenderedHTMLCommon :not(pre) > code { font-size: 17px; }
</style>"""
    % HEIGHT
)
# where a file is if it was installed beside the slides, and nbconvert's option that names it
MODULES = "node_modules"
OFFLINE = {
    "reveal.js/dist/reveal.js": f"--SlidesExporter.reveal_url_prefix={MODULES}/reveal.js",
    "mathjax/MathJax.js": f"--HTMLExporter.mathjax_url={MODULES}/mathjax/MathJax.js"
    "?config=TeX-AMS_CHTML-full,Safe",
    "requirejs/require.js": f"--HTMLExporter.require_js_url={MODULES}/requirejs/require.js",
    "jquery/dist/jquery.min.js": f"--HTMLExporter.jquery_url={MODULES}/jquery/dist/jquery.min.js",
}
HINT = re.compile(r" (The|Its|Their) solutions? (is|are) folded away[^.]*\.")


def without_hint(text):
    """Markdown less the sentence that tells where the solutions are."""
    return HINT.sub("", text)


def without_solutions(notebook):
    """The same notebook less its folded solutions, and less the sentence on them."""
    notebook.cells = [cell for cell in notebook.cells if not SOLUTION.match(cell.source)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = without_hint(cell.source)
    return notebook


def make_student_copy(folder=OUTPUTS / "student"):
    """A fresh folder for students; returns the paths of its notebooks. An old one is replaced."""
    folder = pathlib.Path(folder)
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(ROOT / "notebooks" / "weights", folder / "notebooks" / "weights")
    for name in ("ddpm_utils.py", "requirements.txt", "LICENSE", "LICENSE-text.md"):
        shutil.copy(ROOT / name, folder / name)
    paths = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        paths.append(folder / "notebooks" / path.name)
        nbformat.write(without_solutions(nbformat.read(path, as_version=4)), paths[-1])
    return paths


def make_slides(path, folder=OUTPUTS / "slides"):
    """One notebook's slides; returns the path of the HTML file. Of a collapsed cell only the first
    line and the outputs are shown: the rest may hold an exercise's answer."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.source = cell.source.split("\n")[0]
    copy = folder / path.name
    nbformat.write(notebook, copy)
    here = [option for file, option in OFFLINE.items() if (folder / MODULES / file).is_file()]
    command = [sys.executable, "-m", "nbconvert", "--to", "slides", str(copy), "--log-level=ERROR"]
    size = [f"--SlidesExporter.reveal_width={WIDTH}", f"--SlidesExporter.reveal_height={HEIGHT}"]
    look = ["--SlidesExporter.reveal_number=c/t", "--SlidesExporter.reveal_transition=none"]
    subprocess.run([*command, *size, *look, *here], check=True)
    copy.unlink()
    made = folder / f"{path.stem}.slides.html"
    html = made.read_text(encoding="utf-8")
    made.write_text(html.replace("</head>", LOOK + "\n</head>", 1), encoding="utf-8")
    return made


if __name__ == "__main__":
    wanted = sys.argv[1:] or [""]
    copies = make_student_copy()
    print(f"outputs/student: {len(copies)} notebooks without solutions")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if any(path.name.startswith(w) for w in wanted):
            print(f"outputs/slides/{make_slides(path).name}", flush=True)
    make_site(wanted)
