"""Runs notebooks from a fresh kernel and saves them the way they are committed. For maintainers.

    DDPM_MAINTAINER=1 python notebooks/refresh.py            all of them, and the pictures in img/
    DDPM_MAINTAINER=1 python notebooks/refresh.py 03 05      those two

Saved are the outputs without widget state, without the live widgets (they show only where a kernel
runs), and with progress bars as they looked at the end. Prints the seconds that each one took.
"""

import pathlib
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget

NOTEBOOKS = pathlib.Path(__file__).resolve().parent


def patch_nbclient():
    """nbclient answers a slider's first picture with a message of its own. Where that crosses the
    kernel's reply, the reply is never read and the run hangs (seen with notebook 05, nbclient
    0.11). Nothing that is saved needs the answer."""
    OutputWidget.sync_state = lambda self: None


def tidy(cell):
    """Joins printed text; drops overwritten lines, live widgets and the metadata of the run."""
    outputs = []
    for output in cell.outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
            outputs[-1].text += output.text
        else:
            outputs.append(output)
    for output in outputs:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    cell.outputs = [o for o in outputs if o.output_type != "stream" or o.text.strip()]
    cell.metadata.pop("execution", None)


def refresh(path):
    notebook = nbformat.read(path, as_version=4)
    start = time.time()
    NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.time() - start
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tidy(cell)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    return seconds


if __name__ == "__main__":
    patch_nbclient()
    wanted = sys.argv[1:] or [""]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if any(path.name.startswith(w) for w in wanted):
            print(f"{path.name}: {refresh(path):.0f} s", flush=True)
