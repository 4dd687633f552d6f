"""Install other programs, each in an environment of its own, and run them there."""

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import PIL.Image

from fmdistill.export.checks import photographs


def python(environment: Path, packages: tuple[tuple[str, ...], ...]) -> Path:
    """Return the interpreter of the environment, made with the packages if it is not there yet."""
    done, interpreter = environment / "installed", environment.absolute() / "bin/python"
    if not done.exists():
        venv.create(environment, with_pip=True, clear=True)
        for arguments in packages:
            call([interpreter, "-m", "pip", "install", "--quiet", *arguments])
        done.touch()
    return interpreter


def npm(environment: Path, packages: tuple[str, ...]) -> Path:
    """Return the node_modules folder of the environment; the packages' scripts, which download CUDA, do not run."""
    modules = environment.absolute() / "node_modules"
    if not modules.exists():
        environment.mkdir(parents=True, exist_ok=True)
        call(["npm", "install", "--silent", "--ignore-scripts", "--prefix", environment.absolute(), *packages])
    return modules


def call(command: list[Any], env: dict[str, str] | None = None) -> None:
    """Run a command, by default without this interpreter's PYTHONPATH, and stop with its output if it fails."""
    env = env or {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{command[0]} {command[1]}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def photos(folder: str | None) -> dict[str, PIL.Image.Image]:
    """Return by name a landscape and a portrait of scikit-image, or every JPEG and PNG file of a folder."""
    if folder is None:
        pixels = photographs()
        return {"landscape": PIL.Image.fromarray(pixels[1]), "portrait": PIL.Image.fromarray(pixels[5])}
    paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return {path.stem: PIL.Image.open(path).convert("RGB") for path in paths}
