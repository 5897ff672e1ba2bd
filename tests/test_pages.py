"""The notebooks' form: what the anatomy asks for, and that the helper repeats what they teach.

That their cells run, and show what is saved, is nbval's part of the same pytest run.
"""

import ast
import contextlib
import io
import json
import pathlib
import re
import tempfile
import textwrap

import copy_taught
from series import PATHS, ROOT, code_cells, each_notebook, has_figure, printed, prose, read, tagged

LAST_HEADINGS = ["## Check yourself", "## What you learned", "## Common mistakes",
                 "## Where this comes from", "## Next"]
COLAB = "https://colab.research.google.com/github/OWNER/diffusion-notebooks/blob/main/notebooks"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
TIME = r"\*\*Time:\*\* (about |under )?\d+(\.\d+)? (minute|second)s? on two CPU cores"


def is_check(cell):
    return any(tag.startswith("check-") for tag in cell["tags"])


@each_notebook
def test_head_and_closing_sections(path):
    first, second = prose(path)[:2]
    assert re.match(rf"# {path.stem[:2]} · \S", first) and f"({COLAB}/{path.name})" in first
    assert re.search(TIME, first), "measured time missing"
    assert "**Read before:**" in first and second.startswith("## You will")
    assert 3 <= len(re.findall(r"^[-*\d]", second, re.MULTILINE)) <= 5
    headings = re.findall(r"^## .*$", "\n".join(prose(path)), re.MULTILINE)
    assert headings[-5:] == LAST_HEADINGS
    (mistakes,) = [text for text in prose(path) if "## Common mistakes" in text]
    bullets = re.findall(r"^- ", mistakes.split("## Common")[1], re.MULTILINE)
    assert len(bullets) >= 3, "each mistake is a bullet, with its symptom"


def test_set_up_cell_is_short_and_the_same_everywhere():
    assert [path.stem[:2] for path in PATHS] == [f"{k:02}" for k in range(1, 14)]
    cells = [source for path in PATHS for source in tagged(path, "setup")]
    assert len(cells) == len(PATHS) and len(set(cells)) == 1
    assert len(cells[0].splitlines()) <= 12 and "OWNER/diffusion-notebooks/main" in cells[0]


@each_notebook
def test_no_machinery_on_the_page(path):
    """And set-up and checks, which hold the answers, are collapsed in JupyterLab and in Colab."""
    source = "\n".join(cell["source"] for cell in code_cells(path))
    private = r"import[^\n]*[ ,(]_[a-z]"
    assert not re.findall(rf"{private}|NBVAL_CHECK_OUTPUT|agrees: True|PYTEST|pytest", source)
    for cell in code_cells(path):
        if is_check(cell) or "setup" in cell["tags"]:
            assert cell["metadata"]["jupyter"]["source_hidden"] is True
            assert cell["metadata"]["cellView"] == "form"


@each_notebook
def test_saved_from_a_fresh_kernel_and_with_no_path_of_a_machine(path):
    homes = [str(pathlib.Path.home()), str(ROOT.parent) + "/", tempfile.gettempdir() + "/",
             "/home/", "/Users/", "C:\\"]
    assert read(path)["metadata"]["kernelspec"]["name"] == "python3"
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(path):
        assert not is_check(cell) or "not attempted yet" in printed(cell)
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", output
            text = json.dumps([output.get("text"), *(data for kind, data in output.get(
                "data", {}).items() if not kind.startswith("image/"))])
            assert not [home for home in homes if home in text], text[:300]


@each_notebook
def test_size(path):
    """Cells are few and short, and prose outweighs code."""
    assert path.stat().st_size < 1.5e6 and 40 <= len(read(path)["cells"]) <= 70
    assert not [text[:100] for text in prose(path) if len(text.split()) > 320]
    lesson = [cell for cell in code_cells(path) if not {"setup", "taught"} & set(cell["tags"])]
    assert not [cell["source"] for cell in lesson if len(cell["source"].splitlines()) > 30]
    assert sum(map(len, prose(path))) >= sum(len(c["source"]) for c in lesson if not is_check(c))


@each_notebook
def test_pictures_are_outputs_with_a_sentence_under_each(path):
    cells = read(path)["cells"]
    figures = [i for i, c in enumerate(cells) if c["cell_type"] == "code" and has_figure(c)]
    assert figures, "no figure at all"
    for below in (cells[i + 1] for i in figures):  # a heading is no caption
        assert below["cell_type"] == "markdown" and len(below["source"]) > 60, below["source"]
        assert not below["source"].startswith("#"), below["source"][:99]
    links = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", "\n".join(prose(path)))
    assert links == [("Open in Colab", BADGE)]
    assert not any("attachments" in cell for cell in cells)


@each_notebook
def test_enough_outputs_are_compared(path):
    compared = [cell for cell in code_cells(path) if "nbval-check-output" in cell["tags"]]
    assert len(compared) >= 5
    for cell in compared:
        assert printed(cell).strip(), "a compared cell that prints nothing compares nothing"
        # a progress bar has speeds, and pictures differ too: they can't be compared
        assert "%|" not in printed(cell) and not has_figure(cell)


def test_copying_what_is_taught_changes_nothing():
    """And what is taught has docstrings, and comes first in the helper."""
    helper = (ROOT / "ddpm_utils.py").read_text(encoding="utf-8")
    assert copy_taught.copied(helper, PATHS) == helper
    sections = re.findall(r"^# --- (\d\d): ", helper, re.MULTILINE)
    assert sections == sorted(path.stem[:2] for path in PATHS if copy_taught.taught(path))
    assert helper.index("class NoiseSchedule") < helper.index("# --- plumbing")
    assert helper[: helper.index("class NoiseSchedule")].count("\n") < 100
    for node in ast.parse("\n".join(s for path in PATHS for s in tagged(path, "taught"))).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@each_notebook
def test_exercises(path, monkeypatch):
    """Each stub is reported as not attempted, each solution passes its check."""
    numbers = sorted(int(tag[9:]) for cell in code_cells(path) for tag in cell["tags"]
                     if tag.startswith("exercise-"))
    assert 2 <= len(numbers) <= 4
    monkeypatch.chdir(path.parent)
    space = {"__name__": "__main__"}

    def run(source):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(compile(source, path.name, "exec"), space)
        return text.getvalue().strip().splitlines()

    run("\n".join(tagged(path, "setup", "needed", "taught")))
    for k in numbers:
        (stub,), (check,) = tagged(path, f"exercise-{k}"), tagged(path, f"check-{k}")
        summary = f"<summary>Solution of exercise {k}</summary>"
        (folded,) = [text for text in prose(path) if summary in text]
        assert folded.startswith("<details>") and folded.rstrip().endswith("</details>")
        run(stub)
        assert run(check)[-1] == f"Exercise {k}: not attempted yet"
        run(textwrap.dedent(re.search(r"```python\n(.*?)```", folded, re.DOTALL)[1]))
        assert run(check)[-1] == f"Exercise {k}: correct"
