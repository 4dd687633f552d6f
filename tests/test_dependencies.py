"""pyproject.toml declares what the package imports, and nothing that only the tests do."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# the photographs are read as files, without an import
NOT_IMPORTED = {"scikit-image", "scikit-learn"}
EXTRAS = {  # each named in the error that misses it
    "ray": "ray",
    "starlette": "serve",
    "uvicorn": "serve",
    "faster-coco-eval": "ap",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "tokenizers": "onnx",
    "coremltools": "coreml",
    "litert-torch": "tflite",
    "ai-edge-litert": "tflite",
    "executorch": "executorch",
    "tensorboard": "trackers",
    "wandb": "trackers",
}


def imported(package: Path) -> set[str]:
    """The distributions that any file of `package` imports, at its top or inside a function."""
    found: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    outside = found - set(sys.stdlib_module_names) - {package.name}
    return {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in outside}


def declared(pyproject: str) -> set[str]:
    """The names in `dependencies`, without versions."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert block
    return {name.replace("_", "-") for name in re.findall(r'^ *"([\w-]+)', block[1], re.MULTILINE)}


def test_what_is_imported_is_declared_and_the_reverse():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert imported(ROOT / "fmdistill") | NOT_IMPORTED == declared(pyproject) | set(EXTRAS)
    for name, extra in EXTRAS.items():
        assert re.search(rf'^{extra} = \[.*"{name}[>"]', pyproject, re.MULTILINE)
