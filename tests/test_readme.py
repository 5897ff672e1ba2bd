"""The README: its pictures, links and commands are what the repository holds."""
import pathlib
import re
import shutil
import subprocess
import sys

import ddpm_utils

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_picture_exists_and_has_alt_text():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", TEXT)
    assert len(pictures) >= 10
    for alt, target in pictures:
        assert len(alt) > 3, target
        assert target.startswith("https://colab") or (ROOT / target).is_file(), target
    assert "<img" not in TEXT


def test_pictures_of_the_source_document_are_there_and_small():
    for name in ["diffusion_example.png", "forward.png", "u-net-architecture.png", "noise_adding0.png",
                 "noise_adding.png", "noise_adding5.png", "noise_adding75.png", "noise_adding100.png"]:
        assert (ROOT / "img" / name).read_bytes()[:4] == b"\x89PNG"
    gif = (ROOT / "img" / "fashion.gif").read_bytes()
    assert gif[:6] == b"GIF89a" and len(gif) < 700_000


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_two_commands_stand_there():
    assert "pip install -r requirements.txt && jupyter lab notebooks/01_schedule_and_forward_noising.ipynb" in TEXT
    assert re.search(r"^ *pip install -r requirements.txt && pytest$", TEXT, re.MULTILINE)


def test_every_notebook_is_in_the_table_with_its_measured_time():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        row = next(line for line in TEXT.splitlines() if line.startswith("|") and f"notebooks/{path.name})" in line)
        assert re.search(r"\| *\d+(\.\d+)? *\|", row), row
        assert f"/{ddpm_utils.REPOSITORY}/blob/{ddpm_utils.TAG}/notebooks/{path.name}" in row


def test_one_step_renames_the_repository(tmp_path):
    command = re.search(r'^ *python -c "(.*)" (\S+) (\S+)$', TEXT, re.MULTILINE)
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "data", "outputs", "*.pt", "__pycache__"))
    subprocess.run([sys.executable, "-c", command[1], ddpm_utils.REPOSITORY, "ada/lessons"], cwd=copy, check=True)
    texts = [copy / "ddpm_utils.py", copy / "README.md", *(copy / "notebooks").glob("*.ipynb")]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert "ada/lessons" in text, path.name
        assert ddpm_utils.REPOSITORY not in text, path.name


def test_requirements_have_lower_bounds_and_no_pins():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split(">=", line)[0] for line in lines} == {"torch", "torchvision", "numpy", "matplotlib", "ipywidgets",
                                                           "jupyterlab", "nbval", "tqdm"}
    assert all(">=" in line and "<" not in line and "==" not in line for line in lines)
