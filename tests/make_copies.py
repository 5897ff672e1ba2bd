"""Makes what a teacher hands out and shows. For teachers, not a test.

    python tests/make_copies.py            of all notebooks: a folder for the students, and slides
    python tests/make_copies.py 01 03      slides of those two (and the students' folder as before)

`outputs/student/` is complete in itself: the notebooks without the solutions, the helper, the weights. `outputs/slides/`
holds one HTML file per notebook, with the outputs as they are saved in it; nothing is run. The slides fetch reveal.js and
MathJax from the network, unless they lie in `outputs/slides/node_modules/`: see notebooks/teaching.md.
"""
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
SOLUTION = re.compile(r"\s*<details><summary>Solution of exercise \d+</summary>")
# A slide is 13 1/3 by 7 1/2 inches of 80 pixels, as the figures have: a figure's points are the slide's points.
WIDTH, HEIGHT = 1067, 600
LOOK = """<style>
:root { --jp-content-font-size1: 19px; --jp-code-font-size: 14px; --jp-cell-prompt-width: 0px; }
.reveal .slides > section, .reveal .slides > section > section { padding: 0; }
.reveal .slides section section { max-height: %dpx; overflow-y: auto; }
.reveal .slides { text-align: left; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; margin: 0 0 12px 0; }
.reveal h1 { font-size: 44px; } .reveal h2 { font-size: 32px; } .reveal h3 { font-size: 26px; }
.reveal .jp-InputPrompt, .reveal .jp-OutputPrompt { display: none; }
.reveal .jp-RenderedImage img { margin: 4px 0; max-width: 100%%; }
.reveal pre { width: 100%%; font-size: 14px; box-shadow: none; margin: 0; }
.reveal .jp-CodeCell:has(.jp-RenderedImage) .jp-InputArea pre { max-height: 160px; overflow-y: auto; }
.reveal .jp-RenderedHTMLCommon :not(pre) > code { font-size: 17px; }
</style>""" % HEIGHT
# where a file lies if it was installed beside the slides, and nbconvert's option that names it
OFFLINE = {"reveal.js/dist/reveal.js": "--SlidesExporter.reveal_url_prefix=node_modules/reveal.js",
           "mathjax/MathJax.js": "--HTMLExporter.mathjax_url=node_modules/mathjax/MathJax.js?config=TeX-AMS_CHTML-full,Safe",
           "requirejs/require.js": "--HTMLExporter.require_js_url=node_modules/requirejs/require.js",
           "jquery/dist/jquery.min.js": "--HTMLExporter.jquery_url=node_modules/jquery/dist/jquery.min.js"}


def without_solutions(notebook):
    """The same notebook less its folded solutions, and less the sentence that says where they are."""
    notebook.cells = [cell for cell in notebook.cells if not SOLUTION.match(cell.source)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(" The solutions are folded away.", "")
    return notebook


def make_student_copy(folder=OUTPUTS / "student"):
    """A fresh folder to hand out; returns the paths of its notebooks. A folder of that name is replaced."""
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
    """One notebook's slides; returns the path of the HTML file."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    here = [option for file, option in OFFLINE.items() if (folder / "node_modules" / file).is_file()]
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "slides", str(path), "--output-dir", str(folder),
                    f"--SlidesExporter.reveal_width={WIDTH}", f"--SlidesExporter.reveal_height={HEIGHT}",
                    "--SlidesExporter.reveal_number=c/t", "--SlidesExporter.reveal_transition=none",
                    "--log-level=ERROR", *here], check=True)
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
