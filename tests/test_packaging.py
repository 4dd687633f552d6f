"""What a user installs: the Dockerfile does what the README says, and the wheel runs alone in an empty folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fmdistill.mini.photos import photograph

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# The demo's own shape, cut until two cores finish it within a minute.
SMALLEST = ["train.steps=4", "images.limit=32", "train.batch_size=4", "train.workers=0", "protocols=[quick.yaml]"]
QUICK = "name: grid_miou\ngrids: [5]\nimages: 4\nfloors: true\n"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: int = 1800) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("fmdistill-*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """An empty working folder and an environment in which only the wheel's files are importable as fmdistill."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        site,
        wheel,
        cwd=folder,
    )
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    where = run(sys.executable, "-c", "import fmdistill; print(fmdistill.__file__)", cwd=folder, env=env)
    assert Path(where.strip()).is_relative_to(site)
    return folder, env


def install_steps(readme: str) -> list[str]:
    """The commands of the fenced block under the README's heading "Install"."""
    section = re.split(r"^#+ ", readme.split("\n## Install\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    block = re.search(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert block, "the README's section Install has no fenced block"
    return [line for line in block[1].splitlines() if line and not line.startswith("#")]


def docker_steps(dockerfile: str) -> list[str]:
    """What the Dockerfile runs as its own user, after the system packages."""
    own = re.split(r"^USER .*$", dockerfile, maxsplit=1, flags=re.MULTILINE)[1]
    return re.findall(r"^RUN (.*)$", own, re.MULTILINE)


def test_the_dockerfile_installs_as_the_readme_says():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert docker_steps(dockerfile) == install_steps(README.read_text())
    assert 'ENTRYPOINT ["fmdistill"]' in dockerfile
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["fmdistill"]


def test_the_wheel_carries_recipes_protocols_and_weights(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    data = [p for folder in ("recipes", "eval") for p in (ROOT / folder).rglob("*") if p.is_file()]
    expected = {f"fmdistill/{p.relative_to(ROOT)}" for p in data}
    shipped = [
        p for p in (ROOT / "fmdistill").rglob("*") if p.suffix in {".py", ".safetensors", ".html", ".css", ".js"}
    ]
    expected |= {str(p.relative_to(ROOT)) for p in shipped}
    assert any(name.endswith(".yaml") for name in expected)
    assert expected <= packed
    assert not [name for name in packed if name.startswith(("tests/", "runs/", "caches/")) or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in packed)


@pytest.mark.slow
def test_the_installed_wheel_checks_its_recipes(elsewhere):
    folder, env = elsewhere
    run(sys.executable, "-m", "fmdistill", "check", cwd=folder, env=env)
    run(sys.executable, "-m", "fmdistill", "check", "recipes/sam/mobilesam_srw.yaml", cwd=folder, env=env)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_installed_wheel_runs_a_small_demo_and_the_code_of_the_docs(elsewhere):
    folder, env = elsewhere
    (folder / "quick.yaml").write_text(QUICK)
    shown = run(sys.executable, "-m", "fmdistill", "demo", *SMALLEST, cwd=folder, env=env)
    (page,) = folder.rglob("*.html")
    assert str(page.relative_to(folder)) in shown and "<table" in page.read_text()
    pages = "\n".join(path.read_text() for path in [README, *sorted((ROOT / "docs").glob("*.md"))])
    codes = [b for b in re.findall(r"```python\n(.*?)```", pages, re.DOTALL) if 'sam.set_image("photo.jpg")' in b]
    assert len(codes) == 3 and all(len(code.split("\n\n")[-1].strip().splitlines()) == 3 for code in codes)
    Image.fromarray(photograph("coffee")).save(folder / "photo.jpg")
    run(sys.executable, "-m", "fmdistill", "export", "runs/demo/sam_srw", "onnx", "out/mine", cwd=folder, env=env)
    for code in codes:  # of the README, and of the pages about SAM and about exports
        code = code.replace("runs/mine", "runs/demo/sam_srw") + "\nprint(masks.shape, masks.dtype)"
        shown = run(sys.executable, "-c", code, cwd=folder, env=env)
        assert shown.strip().endswith(f"{(3, *photograph('coffee').shape[:2])} bool")
