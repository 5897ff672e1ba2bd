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
import matplotlib
import matplotlib.pyplot as plt
from series import PATHS, ROOT, code_cells, each_notebook, has_figure, printed, prose, read, tagged

NAMES = ["01_schedule_and_forward_noising", "02_unet", "03_loss_derivation", "04_training_loop",
         "05_reverse_sampling", "06_result_gif", "07_rgb_128", "08_scores_and_sdes",
         "09_flow_as_ode"]
LAST_HEADINGS = ["## Check yourself", "## What you learned", "## Common mistakes",
                 "## Where this comes from", "## Next"]
COLAB = "https://colab.research.google.com/github/OWNER/diffusion-notebooks/blob/main/notebooks"


def test_all_notebooks_are_there():
    assert [path.stem for path in PATHS][: len(NAMES)] == NAMES


@each_notebook
def test_head(path):
    first, second = prose(path)[:2]
    assert re.match(rf"# {path.stem[:2]} · \S", first)
    assert f"({COLAB}/{path.name})" in first
    assert re.search(
        r"\*\*Time:\*\* (about |under )?\d+(\.\d+)? (minute|second)s? on two CPU cores", first
    ), "measured time missing"
    assert "**Read before:**" in first
    assert second.startswith("## You will")
    assert 3 <= len(re.findall(r"^[-*\d]", second, re.MULTILINE)) <= 5


@each_notebook
def test_closing_sections(path):
    headings = re.findall(r"^## .*$", "\n".join(prose(path)), re.MULTILINE)
    assert headings[-5:] == LAST_HEADINGS
    mistakes = next(text for text in prose(path) if "## Common mistakes" in text)
    bullets = re.findall(r"^- ", mistakes[mistakes.index("## Common") :], re.MULTILINE)
    assert len(bullets) >= 3, "each mistake is a bullet, with its symptom"


def test_set_up_cell_is_short_collapsed_and_the_same_everywhere():
    cells = [cell for path in PATHS for cell in code_cells(path) if "setup" in cell["tags"]]
    assert len(cells) == len(PATHS)
    assert len({cell["source"] for cell in cells}) == 1
    assert len(cells[0]["source"].splitlines()) <= 12
    assert "OWNER/diffusion-notebooks/main" in cells[0]["source"]


@each_notebook
def test_set_up_and_checks_are_collapsed(path):
    """In JupyterLab and in Colab: check cells hold the answers."""
    for cell in code_cells(path):
        if any(tag == "setup" or tag.startswith("check-") for tag in cell["tags"]):
            assert cell["metadata"]["jupyter"]["source_hidden"] is True
            assert cell["metadata"]["cellView"] == "form"


@each_notebook
def test_no_machinery_on_the_page(path):
    source = "\n".join(cell["source"] for cell in code_cells(path))
    assert not re.search(r"import[^\n]*[ ,(]_[a-z]", source), "a private name is imported"
    assert "NBVAL_CHECK_OUTPUT" not in source and 'print("agrees: True")' not in source
    assert "PYTEST" not in source and "pytest" not in source


@each_notebook
def test_saved_from_a_fresh_kernel(path):
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"], "GitHub does not show it with widget state"
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", printed(cell)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each_notebook
def test_no_path_of_a_machine_in_an_output(path):
    homes = [str(pathlib.Path.home()), str(ROOT.parent) + "/", tempfile.gettempdir() + "/",
             "/home/", "/Users/", "C:\\"]
    for cell in code_cells(path):
        text = json.dumps([{key: value for key, value in o.get("data", {}).items()
                            if not key.startswith("image/")} | {"text": o.get("text", "")}
                           for o in cell["outputs"]])
        assert not [home for home in homes if home in text], text[:300]


@each_notebook
def test_size(path):
    assert path.stat().st_size < 1.5e6
    assert 40 <= len(read(path)["cells"]) <= 70
    long = [text for text in prose(path) if len(text.split()) > 320]
    assert not long, long[0][:100]


@each_notebook
def test_cells_are_short_and_prose_outweighs_code(path):
    lesson = [cell for cell in code_cells(path) if not {"setup", "taught"} & set(cell["tags"])]
    for cell in lesson:
        assert len(cell["source"].splitlines()) <= 30, cell["source"][:200]
    code = sum(len(cell["source"]) for cell in lesson
               if not any(tag.startswith("check-") for tag in cell["tags"]))
    assert sum(map(len, prose(path))) >= code


@each_notebook
def test_every_figure_has_a_sentence_under_it(path):
    cells = read(path)["cells"]
    figures = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"
               and has_figure(cell)]
    assert figures, "no figure at all"
    for i in figures:
        below = cells[i + 1]
        assert below["cell_type"] == "markdown" and len(below["source"]) > 60, cells[i]["source"][
            :200
        ]
        assert not below["source"].startswith("#"), ("a heading is no caption: "
                                                     + below["source"][:99])


@each_notebook
def test_pictures_are_outputs_and_not_links(path):
    links = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", "\n".join(prose(path)))
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert links == [("Open in Colab", badge)]
    assert not any("attachments" in cell for cell in read(path)["cells"])


@each_notebook
def test_enough_outputs_are_compared(path):
    compared = [cell for cell in code_cells(path) if "nbval-check-output" in cell["tags"]]
    assert len(compared) >= 5
    for cell in compared:
        assert printed(cell).strip(), "a compared cell that prints nothing compares nothing"
        assert "%|" not in printed(cell), "a progress bar has speeds: it can't be compared"
        assert not has_figure(cell)


@each_notebook
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", "\n".join(prose(path)), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        if not re.search(r"[\\^_{}$]", target) or target.endswith(".ipynb"):
            assert (path.parent / target).exists(), target


def test_copying_what_is_taught_changes_nothing():
    helper = (ROOT / "ddpm_utils.py").read_text(encoding="utf-8")
    assert copy_taught.copied(helper, PATHS) == helper
    sections = re.findall(r"^# --- (\d\d): ", helper, re.MULTILINE)
    assert sections == sorted(path.stem[:2] for path in PATHS if copy_taught.taught(path))
    assert helper.index("class NoiseSchedule") < helper.index("# --- plumbing")
    assert helper[: helper.index("class NoiseSchedule")].count("\n") < 100


@each_notebook
def test_taught_cells_hold_definitions_with_docstrings(path):
    for source in tagged(path, "taught"):
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), node.name


def exercises(path):
    return sorted(int(tag.split("-")[1]) for cell in code_cells(path) for tag in cell["tags"]
                  if tag.startswith("exercise-"))


def solution(path, number):
    summary = f"<summary>Solution of exercise {number}</summary>"
    (folded,) = [text for text in prose(path) if summary in text]
    assert folded.startswith("<details>") and folded.rstrip().endswith("</details>")
    return textwrap.dedent(re.search(r"```python\n(.*?)```", folded, re.DOTALL).group(1))


@each_notebook
def test_exercises(path, monkeypatch):
    """Each stub is reported as not attempted, each solution passes its check."""
    assert 2 <= len(exercises(path)) <= 4
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)

    def run(source, space):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            exec(compile(source, path.name, "exec"), space)
        return text.getvalue().strip().splitlines()

    space = {"__name__": "__main__"}
    for source in tagged(path, "setup", "needed", "taught"):
        run(source, space)
    for number in exercises(path):
        (stub,), (check,) = tagged(path, f"exercise-{number}"), tagged(path, f"check-{number}")
        assert "raise NotImplementedError" in stub
        run(stub, space)
        assert run(check, space)[-1] == f"Exercise {number}: not attempted yet"
        run(solution(path, number), space)
        assert run(check, space)[-1] == f"Exercise {number}: correct"
    plt.close("all")


@each_notebook
def test_saved_checks_are_not_attempted(path):
    for cell in code_cells(path):
        if any(tag.startswith("check-") for tag in cell["tags"]):
            assert "not attempted yet" in printed(cell)
