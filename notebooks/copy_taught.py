"""Copies what the notebooks teach into ddpm_utils.py, word for word. For maintainers.

    python notebooks/copy_taught.py            of all notebooks
    python notebooks/copy_taught.py 01 03      of those two

Cells tagged `taught` go into the section of ddpm_utils.py that begins with the notebook's number
("# --- 01: ..."); whatever was in that section is replaced. A test runs this and finds no change.
"""

import json
import pathlib
import re
import sys

NOTEBOOKS = pathlib.Path(__file__).resolve().parent
HELPER = NOTEBOOKS.parent / "ddpm_utils.py"


def taught(path):
    """The source of the notebook's tagged cells, one after the other."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [
        "".join(cell["source"]).strip()
        for cell in cells
        if "taught" in cell["metadata"].get("tags", [])
    ]
    return "\n\n\n".join(sources)


def copied(helper, paths):
    """The text of the helper with the sections of these notebooks replaced."""
    for path in paths:
        code, number = taught(path), path.name[:2]
        section = re.compile(rf"(# --- {number}: [^\n]*\n\n).*?(?=\n\n# --- )", re.DOTALL)
        if code and not section.search(helper):
            raise SystemExit(f'ddpm_utils.py has no section "# --- {number}: ..." for {path.name}')
        if code:
            helper = section.sub(lambda found: found[1] + code + "\n", helper, count=1)
    return helper


if __name__ == "__main__":
    wanted = sys.argv[1:] or [""]
    paths = [
        path
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        if any(path.name.startswith(w) for w in wanted)
    ]
    before = HELPER.read_text(encoding="utf-8")
    after = copied(before, paths)
    if after == before:
        print("nothing to change")
    else:
        HELPER.write_text(after, encoding="utf-8")
        print("ddpm_utils.py changed")
