"""The notebooks' form: what the anatomy of the series asks for, and that what they teach is what the helper does.

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

import matplotlib
import matplotlib.pyplot as plt
import pytest

import ddpm_utils

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_schedule_and_forward_noising", "02_unet", "03_loss_derivation", "04_training_loop", "05_reverse_sampling",
         "06_result_gif", "07_rgb_128", "08_scores_and_sdes"]
TAUGHT = {"01": ["NoiseSchedule", "at", "linear_schedule", "cosine_schedule"],
          "02": ["time_embedding", "zero_init", "ResidualBlock", "SelfAttention", "UNet"],
          "03": ["simple_loss"],
          "04": ["EMA", "learning_rate", "v_loss", "min_snr_loss", "NoiseFromV"],
          "05": ["ddpm_sample", "ddim_sample", "start_noise"],
          "06": ["GarmentClassifier", "feature_statistics", "frechet_distance"],
          "08": ["dpm_solver_sample"]}
LAST_HEADINGS = ["## Check yourself", "## What you learned", "## Common mistakes", "## Where this comes from", "## Next"]

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = cell["metadata"].get("tags", [])
    return notebook


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def prose(path):
    return [cell["source"] for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]


def tagged(path, tag):
    return [cell["source"] for cell in code_cells(path) if tag in cell["tags"]]


def printed(cell):
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_all_notebooks_are_there():
    assert [path.stem for path in PATHS][:len(NAMES)] == NAMES


@each_notebook
def test_head(path):
    first, second = prose(path)[:2]
    assert re.match(rf"# {path.stem[:2]} · \S", first)
    assert f"({'https://colab.research.google.com/github'}/{ddpm_utils.REPOSITORY}/blob/{ddpm_utils.TAG}/" \
           f"notebooks/{path.name})" in first
    assert re.search(r"\*\*Time:\*\* (about |under )?\d+(\.\d+)? (minute|second)s? on two CPU cores", first), \
        "measured time missing"
    assert "**Read before:**" in first
    assert second.startswith("## You will")
    assert 3 <= len(re.findall(r"^[-*\d]", second, re.MULTILINE)) <= 5


@each_notebook
def test_closing_sections(path):
    headings = re.findall(r"^## .*$", "\n".join(prose(path)), re.MULTILINE)
    assert headings[-5:] == LAST_HEADINGS


def test_set_up_cell_is_the_same_everywhere():
    cells = [tagged(path, "setup") for path in PATHS]
    assert all(len(found) == 1 for found in cells)
    assert len({found[0] for found in cells}) == 1
    assert f"{ddpm_utils.REPOSITORY}/{ddpm_utils.TAG}\"" in cells[0][0]


@each_notebook
def test_saved_from_a_fresh_kernel(path):
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"], "GitHub does not show a notebook with widget state"
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", printed(cell)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each_notebook
def test_no_path_of_a_machine_in_an_output(path):
    homes = [str(pathlib.Path.home()), str(ROOT.parent) + "/", tempfile.gettempdir() + "/", "/home/", "/Users/", "C:\\"]
    for cell in code_cells(path):
        text = json.dumps([{k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} | {
            "text": o.get("text", "")} for o in cell["outputs"]])
        assert not [home for home in homes if home in text], text[:300]


@each_notebook
def test_size(path):
    assert path.stat().st_size < 1.5e6
    assert 40 <= len(read(path)["cells"]) <= 70


@each_notebook
def test_cells_are_short_and_prose_outweighs_code(path):
    cells = [cell["source"] for cell in code_cells(path) if "setup" not in cell["tags"]]
    taught = TAUGHT.get(path.stem[:2], [])
    for source in cells:
        names = {node.name for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        assert len(source.splitlines()) <= 30 or names & set(taught), source[:200]
    lesson = [cell["source"] for cell in code_cells(path)  # what is compared with the helper, and checkers, not counted
              if not any(tag == "setup" or tag.startswith("check-") for tag in cell["tags"])
              and not any(f"class {name}" in cell["source"] or f"def {name}(" in cell["source"] for name in taught)]
    assert sum(map(len, prose(path))) >= sum(map(len, lesson))


@each_notebook
def test_every_figure_has_a_sentence_under_it(path):
    cells = read(path)["cells"]
    figures = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code" and has_figure(cell)]
    assert figures, "no figure at all"
    for i in figures:
        below = cells[i + 1]
        assert below["cell_type"] == "markdown" and len(below["source"]) > 60, cells[i]["source"][:200]
        assert not below["source"].startswith("#"), "a heading is no caption: " + below["source"][:100]


@each_notebook
def test_pictures_are_outputs_and_not_links(path):
    links = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", "\n".join(prose(path)))
    assert links == [("Open in Colab", "https://colab.research.google.com/assets/colab-badge.svg")]
    assert not any("attachments" in cell for cell in read(path)["cells"])


@each_notebook
def test_enough_outputs_are_compared(path):
    compared = [cell for cell in code_cells(path)
                if "# NBVAL_CHECK_OUTPUT" in cell["source"].splitlines()
                and not any(tag.startswith("check-") for tag in cell["tags"])]
    assert len(compared) >= 5
    for cell in compared:
        assert printed(cell).strip(), "a compared cell that prints nothing compares nothing"
        assert not has_figure(cell)


@each_notebook
def test_links_lead_somewhere(path):
    text = "\n".join(prose(path))
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        if not re.search(r"[\\^_{}$]", target) or target.endswith(".ipynb"):
            assert (path.parent / target).exists(), target


def without_docstrings(node):
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:]
    return ast.dump(node)


def definitions(source):
    return {node.name: without_docstrings(node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@each_notebook
def test_what_is_taught_is_what_the_helper_does(path):
    helper = definitions((ROOT / "ddpm_utils.py").read_text(encoding="utf-8"))
    found = set()
    for cell in code_cells(path):
        for name, code in definitions(cell["source"]).items():
            if name in helper and not any(tag.startswith("exercise") for tag in cell["tags"]):
                assert code == helper[name], f"{name} differs from ddpm_utils.py"
                found.add(name)
    assert set(TAUGHT.get(path.stem[:2], [])) <= found


def exercises(path):
    return sorted(int(tag.split("-")[1]) for cell in code_cells(path) for tag in cell["tags"]
                  if tag.startswith("exercise-"))


def solution(path, number):
    folded = [text for text in prose(path) if f"<summary>Solution of exercise {number}</summary>" in text]
    assert len(folded) == 1 and folded[0].startswith("<details>") and folded[0].rstrip().endswith("</details>")
    return textwrap.dedent(re.search(r"```python\n(.*?)```", folded[0], re.DOTALL).group(1))


@each_notebook
def test_exercises(path, monkeypatch):
    """Each stub is reported as not attempted, each solution passes its check; only what an exercise needs is run."""
    assert 2 <= len(exercises(path)) <= 4
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(str(ROOT))

    def run(source, space):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            exec(compile(source, path.name, "exec"), space)
        return text.getvalue().strip().splitlines()

    space = {"__name__": "__main__"}
    for source in tagged(path, "setup") + tagged(path, "needed"):
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
def test_saved_checks_say_not_attempted(path):
    for cell in code_cells(path):
        if any(tag.startswith("check-") for tag in cell["tags"]):
            assert "not attempted yet" in printed(cell)
