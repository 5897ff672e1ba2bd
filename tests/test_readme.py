"""The README: its pictures, links and commands are what the repository holds."""

import re
import shutil
import subprocess

import pytest
from series import PATHS, ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_pictures_have_alt_text_and_those_of_the_source_document_are_there_and_small():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", TEXT)
    assert len(pictures) >= 10 and "<img" not in TEXT
    for alt, target in pictures:  # that the files are there: test_links_lead_somewhere
        assert len(alt) > 3 and target.startswith(("img/", "https://colab")), target
    for name in ["diffusion_example", "forward", "u-net-architecture", "noise_adding0",
                 "noise_adding", "noise_adding5", "noise_adding75", "noise_adding100"]:
        assert (ROOT / "img" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    gif = (ROOT / "img" / "fashion.gif").read_bytes()
    assert gif[:6] == b"GIF89a" and len(gif) < 700_000


def test_every_notebook_is_in_the_table_with_its_measured_time():
    for name in (path.name for path in PATHS):
        row = re.search(rf"^\|.*notebooks/{name}\).*", TEXT, re.MULTILINE)[0]
        assert re.search(r"\| *\d+(\.\d+)? *\|", row), row
        assert f"/OWNER/diffusion-notebooks/blob/main/notebooks/{name}" in row


def test_one_command_renames_the_repository(tmp_path):
    command = re.search(r"^ *(perl -pi .*)$", CONTRIBUTING, re.MULTILINE)[1]
    assert "OWNER/diffusion-notebooks" in command
    for placeholder, own in [("you/your-repository", "ada/lessons"), ("you.github", "ada.github")]:
        command = command.replace(placeholder, own)
    ignored = shutil.ignore_patterns(".git", "data", "outputs", "runs", "*.pt", "__pycache__")
    folder = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    subprocess.run(f"git init -q && git add . && {command}", shell=True, cwd=folder, check=True)
    for path in [folder / "ddpm_utils.py", folder / "README.md", *folder.glob("notebooks/*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        assert "ada/lessons" in text and "OWNER/diffusion-notebooks" not in text, path.name


@pytest.mark.parametrize("file, wanted", [
    ("README.md", [f"^ *pip install -r requirements.txt && {command}$" for command in (
        "pytest", f"jupyter lab notebooks/{PATHS[0].name}")]),
    ("LICENSE", [r"\AMIT License\n\n.*\n\nPermission is hereby granted"]),
    ("CITATION.cff", ["cff-version: 1.2.0"]),
    (".github/ISSUE_TEMPLATE/report.yml",
     ["(?i)notebook and cell", "(?i)python ddpm_utils.py", "(?i)expected"]),
    ("CONTRIBUTING.md",
     ["ruff check", "notebooks/refresh.py", "notebooks/copy_taught.py", "House style"])])
def test_files_say_what_they_are_for(file, wanted):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not [pattern for pattern in wanted if not re.search(pattern, text, re.MULTILINE)]


def test_requirements_have_lower_bounds_and_no_pins():
    bounds = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().split())
    wanted = "torch torchvision numpy matplotlib ipywidgets jupyterlab nbval tqdm"
    assert sorted(bounds) == sorted(wanted.split())
    assert all(re.fullmatch(r"[\d.]+", version) for version in bounds.values())
