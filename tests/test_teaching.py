"""What a teacher gets: the page with the answers, slides, and a students' copy without solutions.

That a student's copy runs is shown in test_pages_accessible.py, whose figures come from it.
"""

import re

import make_copies
import nbformat
import pytest
from series import PATHS, ROOT, each_notebook, prose, read

PAGE = (ROOT / "notebooks" / "teaching.md").read_text(encoding="utf-8")


def cells(path):
    return read(path)["cells"]


def slide_type(cell):
    return cell["metadata"].get("slideshow", {}).get("slide_type", "-")


# ------------------------------------------------------------------ the page for teachers


@each_notebook
def test_the_page_has_a_part_on_each_notebook_with_all_answers(path):
    (part,) = re.findall(rf"(?ms)^## {path.stem[:2]} · .*?(?=^## |\Z)", PAGE)
    assert re.search(r"\d+ minutes", part)
    for words in ("**Opening.**", "**Exit.**", "**Needs.**", "### Plan", "### Board", "### Answers",
                  "### Where they get stuck", "### Open task", "### Oral exam"):
        assert words in part, words
    headings = re.findall(r"(?m)^##+ (.*)$", "\n".join(prose(path)))
    named = set(re.findall(r"“([^”]*)”", part))  # what stands in “…” is a heading of that notebook
    assert named and named <= set(headings), named - set(headings)
    titles = [heading for heading in headings if re.match(r"Exercise \d+: ", heading)]
    assert 2 <= len(titles) <= 4
    for title in titles:
        answer = re.search(rf"(?ms)\*{re.escape(title)}\*\*(.*?)(?=\*\*Exercise|^### |\Z)", part)
        assert answer and len(answer[1]) > 150, title


# ------------------------------------------------------------------ slides


@each_notebook
def test_sections_start_slides_set_up_is_not_shown_and_solutions_are_notes(path):
    assert slide_type(cells(path)[0]) == "slide"
    for cell in cells(path):
        tags, text, kind = cell["tags"], cell["source"], slide_type(cell)
        assert kind in {"slide", "subslide", "fragment", "skip", "notes", "-"}
        for found, wanted in [
                (cell["cell_type"] == "markdown" and re.search(r"(?m)^## ", text), "slide"),
                ("setup" in tags or any(tag.startswith("check-") for tag in tags), "skip"),
                (text.startswith("<details>"), "notes")]:
            assert not found or kind == wanted, text[:80]


@pytest.mark.parametrize("offline", [False, True])
def test_slides_are_made(tmp_path, offline):
    for file in make_copies.OFFLINE if offline else ():
        (tmp_path / "node_modules" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "node_modules" / file).write_text("stands for the real one")
    html = make_copies.make_slides(PATHS[2], tmp_path).read_text(encoding="utf-8")
    kinds = [slide_type(cell) for cell in cells(PATHS[2])]
    assert html.count("<section") == 2 * kinds.count("slide") + kinds.count("subslide")
    assert html.count('class="notes"') == kinds.count("notes") > 0
    loaded = re.findall(r'(?:<script[^>]*\bsrc=|<link rel="stylesheet" href=)"([^"]*)"', html)
    loaded += re.findall(r'"([^"\s]*/(?:reveal|notes)\.js)"', html)
    where = "node_modules/" if offline else "https://"
    assert len(loaded) >= 5 and all(address.startswith(where) for address in loaded), loaded


# ------------------------------------------------------------------ the students' copy


def test_a_students_copy_lacks_the_solutions_and_nothing_else(tmp_path):
    student = tmp_path / "student"
    (student / "notebooks").mkdir(parents=True)
    (student / "notebooks" / "09_old.ipynb").write_text("{}")  # an old copy is replaced
    copies = make_copies.make_student_copy(student)
    assert [copy.name for copy in copies] == [path.name for path in PATHS]
    assert sorted(student.rglob("*.ipynb")) == copies and not list(student.rglob("teaching.md"))
    for name in ("ddpm_utils.py", "requirements.txt", "notebooks/weights/fashion.pt"):
        assert (student / name).read_bytes() == (ROOT / name).read_bytes()
    for copy, path in zip(copies, PATHS):
        text = copy.read_text(encoding="utf-8")
        assert "Solution of exercise" not in text and "solutions are folded" not in text
        nbformat.validate(nbformat.read(copy, as_version=4))
        mine, original = cells(copy), cells(path)
        kept = [cell for cell in original if not cell["source"].lstrip().startswith("<details>")]
        assert 2 <= len(original) - len(kept) <= 4 and len(mine) == len(kept)
        for a, b in zip(mine, kept):
            assert {**a, "source": ""} == {**b, "source": ""}
            assert a["source"] in (b["source"], make_copies.without_hint(b["source"]))
        stubs = [c["source"] for c in mine if any(tag.startswith("exercise-") for tag in c["tags"])]
        assert len(stubs) == len(original) - len(kept)
        assert all("raise NotImplementedError" in stub for stub in stubs)
