"""What a teacher gets: the page with the answers, slides, and a students' copy without solutions.

That a student's copy runs is shown in test_accessible.py, whose figures come from it.
"""

import re

import make_copies
import nbformat
import pytest
from series import PATHS, ROOT, each_notebook, read

PAGE = (ROOT / "notebooks" / "teaching.md").read_text(encoding="utf-8")
TYPES = {"slide", "subslide", "fragment", "skip", "notes", "-"}


def cells(path):
    return read(path)["cells"]


def slide_type(cell):
    return cell["metadata"].get("slideshow", {}).get("slide_type", "-")


# ------------------------------------------------------------------ the page for teachers


def part_of(path):
    """The page's part on one notebook, from its heading to the next of that rank."""
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    found = [part for part in parts if re.match(rf"{path.stem[:2]} · ", part)]
    assert len(found) == 1, f"the page has {len(found)} parts on {path.stem}"
    return found[0]


@each_notebook
def test_every_exercise_is_answered(path):
    titles = [
        re.match(r"### (Exercise \d+: .*)", cell["source"])[1]
        for cell in cells(path)
        if cell["source"].startswith("### Exercise")
    ]
    assert 2 <= len(titles) <= 4
    for title in titles:
        answer = re.search(
            rf"\*\*{re.escape(title)}\*\*(.*?)(?=\*\*Exercise|^### |\Z)",
            part_of(path),
            re.DOTALL | re.MULTILINE,
        )
        assert answer, f"no answer to {title}"
        assert len(answer[1]) > 150, title


@each_notebook
def test_sections_that_the_page_names_exist(path):
    """What stands in “…” is a heading of that notebook."""
    headings = re.findall(
        r"^##+ (.*)$", "\n".join(cell["source"] for cell in cells(path)), re.MULTILINE
    )
    named = re.findall(r"“([^”]*)”", part_of(path))
    assert named
    assert set(named) <= set(headings), set(named) - set(headings)


@each_notebook
def test_each_notebook_has_minutes_stumbling_blocks_and_questions(path):
    part = part_of(path)
    assert re.search(r"\d+ minutes", part)
    for question in ("**Opening.**", "**Exit.**", "**Needs.**"):
        assert question in part, question
    for heading in (
        "### Plan",
        "### Board",
        "### Where they get stuck",
        "### Answers",
        "### Open task",
        "### Oral exam",
    ):
        assert heading in part, heading


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (ROOT / "notebooks" / target).exists(), target


# ------------------------------------------------------------------ slides


@each_notebook
def test_every_section_starts_a_slide(path):
    page = cells(path)
    assert {slide_type(cell) for cell in page} <= TYPES
    assert slide_type(page[0]) == "slide"
    for cell in page:
        if cell["cell_type"] == "markdown" and re.search(r"^## ", cell["source"], re.MULTILINE):
            assert slide_type(cell) == "slide", cell["source"][:80]


@each_notebook
def test_set_up_and_checks_are_not_shown_and_solutions_are_notes(path):
    for cell in cells(path):
        tags = cell["metadata"].get("tags", [])
        if "setup" in tags or any(tag.startswith("check-") for tag in tags):
            assert slide_type(cell) == "skip", cell["source"][:80]
        if cell["source"].startswith("<details>"):
            assert slide_type(cell) == "notes", cell["source"][:80]


@pytest.mark.parametrize("offline", [False, True])
def test_slides_are_made(tmp_path, offline):
    path = PATHS[2]
    if offline:
        for file in make_copies.OFFLINE:
            (tmp_path / "node_modules" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "node_modules" / file).write_text("stands for the real one")
    html = make_copies.make_slides(path, tmp_path).read_text(encoding="utf-8")
    shown = [cell for cell in cells(path) if slide_type(cell) in ("slide", "subslide")]
    assert html.count("<section") == len(shown) + sum(slide_type(cell) == "slide" for cell in shown)
    notes = [cell for cell in cells(path) if slide_type(cell) == "notes"]
    assert html.count('class="notes"') == len(notes) > 0
    loaded = (
        re.findall(r'<script[^>]*\bsrc="([^"]*)"', html)
        + re.findall(r'<link rel="stylesheet" href="([^"]*)"', html)
        + re.findall(r'"([^"\s]*/(?:reveal|notes)\.js)"', html)
    )
    assert len(loaded) >= 5
    assert all(
        address.startswith("node_modules/" if offline else "https://") for address in loaded
    ), loaded


# ------------------------------------------------------------------ the students' copy


def test_a_students_copy_lacks_the_solutions_and_nothing_else(tmp_path):
    copies = make_copies.make_student_copy(tmp_path / "student")
    assert [copy.name for copy in copies] == [path.name for path in PATHS]
    for copy, path in zip(copies, PATHS):
        text = copy.read_text(encoding="utf-8")
        assert "Solution of exercise" not in text and "solutions are folded" not in text
        nbformat.validate(nbformat.read(copy, as_version=4))
        mine, original = cells(copy), cells(path)
        kept = [cell for cell in original if not cell["source"].lstrip().startswith("<details>")]
        assert 2 <= len(original) - len(kept) <= 4
        assert len(mine) == len(kept)
        for a, b in zip(mine, kept):
            assert {**a, "source": ""} == {**b, "source": ""}
            assert a["source"] == b["source"] or a["source"] == make_copies.without_hint(
                b["source"]
            )
        stubs = [
            cell["source"]
            for cell in mine
            if any(t.startswith("exercise-") for t in cell["metadata"].get("tags", []))
        ]
        assert len(stubs) == len(original) - len(kept)
        assert all("raise NotImplementedError" in stub for stub in stubs)


def test_a_students_copy_is_complete_in_itself(tmp_path):
    make_copies.make_student_copy(tmp_path / "student")
    for name in ("ddpm_utils.py", "requirements.txt", "notebooks/weights/fashion.pt"):
        assert (tmp_path / "student" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list((tmp_path / "student").rglob("teaching.md"))


def test_an_old_copy_is_replaced(tmp_path):
    (tmp_path / "student" / "notebooks").mkdir(parents=True)
    (tmp_path / "student" / "notebooks" / "09_old.ipynb").write_text("{}")
    copies = make_copies.make_student_copy(tmp_path / "student")
    assert sorted((tmp_path / "student" / "notebooks").glob("*.ipynb")) == copies
