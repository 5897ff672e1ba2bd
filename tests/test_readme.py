"""The README: its pictures, links and commands are what the repository holds."""

import re
import shutil
import subprocess

from series import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_picture_exists_and_has_alt_text():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", TEXT)
    assert len(pictures) >= 10
    for alt, target in pictures:
        assert len(alt) > 3, target
        assert target.startswith("https://colab") or (ROOT / target).is_file(), target
    assert "<img" not in TEXT


def test_pictures_of_the_source_document_are_there_and_small():
    for name in [
        "diffusion_example.png",
        "forward.png",
        "u-net-architecture.png",
        "noise_adding0.png",
        "noise_adding.png",
        "noise_adding5.png",
        "noise_adding75.png",
        "noise_adding100.png",
    ]:
        assert (ROOT / "img" / name).read_bytes()[:4] == b"\x89PNG"
    gif = (ROOT / "img" / "fashion.gif").read_bytes()
    assert gif[:6] == b"GIF89a" and len(gif) < 700_000


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_two_commands_stand_there():
    assert (
        "pip install -r requirements.txt && jupyter lab notebooks/01_schedule_and_forward_noising.ipynb"
        in TEXT
    )
    assert re.search(r"^ *pip install -r requirements.txt && pytest$", TEXT, re.MULTILINE)


def test_every_notebook_is_in_the_table_with_its_measured_time():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        row = next(
            line
            for line in TEXT.splitlines()
            if line.startswith("|") and f"notebooks/{path.name})" in line
        )
        assert re.search(r"\| *\d+(\.\d+)? *\|", row), row
        assert f"/OWNER/diffusion-notebooks/blob/main/notebooks/{path.name}" in row


def test_one_command_renames_the_repository(tmp_path):
    command = re.search(r"^ *(perl -pi .*)$", CONTRIBUTING, re.MULTILINE)[1]
    assert "OWNER/diffusion-notebooks" in command
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", "data", "outputs", "runs", "*.pt", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(
        command.replace("you/your-repository", "ada/lessons").replace(
            "you.github.io", "ada.github.io"
        ),
        shell=True,
        cwd=folder,
        check=True,
    )
    for path in [folder / "ddpm_utils.py", folder / "README.md", *folder.glob("notebooks/*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        assert "ada/lessons" in text and "OWNER/diffusion-notebooks" not in text, path.name


def test_community_files_are_there():
    licence = (ROOT / "LICENSE").read_text().split("\n\n")
    assert licence[0] == "MIT License" and licence[2].startswith("Permission is hereby granted")
    assert "cff-version: 1.2.0" in (ROOT / "CITATION.cff").read_text()
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "report.yml").read_text()
    for asked in ("notebook and cell", "python ddpm_utils.py", "expected"):
        assert asked in form.lower()
    for word in ("ruff check", "notebooks/refresh.py", "notebooks/copy_taught.py", "House style"):
        assert word in CONTRIBUTING


def test_requirements_have_lower_bounds_and_no_pins():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split(">=", line)[0] for line in lines} == {
        "torch",
        "torchvision",
        "numpy",
        "matplotlib",
        "ipywidgets",
        "jupyterlab",
        "nbval",
        "tqdm",
    }
    assert all(">=" in line and "<" not in line and "==" not in line for line in lines)
