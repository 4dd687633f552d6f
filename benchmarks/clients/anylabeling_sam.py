"""Segment by the SAM class of X-AnyLabeling or anylabeling, with the folder of the export format `anylabeling`.

The class is the one that "Load custom model" opens config.yaml with, and gets the same settings. Nothing is replaced:
Qt runs without a window by its platform `offscreen`, and HOME is a folder of this run, where both write settings.
"""

import os
import sys
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["HOME"] = tempfile.mkdtemp()
program, sys.argv = sys.argv, sys.argv[:1]  # both read the command line when they are imported

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402
from anylabeling import config as own_settings  # noqa: E402
from anylabeling.services.auto_labeling.segment_anything import SegmentAnything  # noqa: E402
from exchange import answer, folder, marks  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

sys.argv = program


def main() -> None:
    """Answer the prompts."""
    application = QApplication(["fmdistill"])
    if hasattr(own_settings, "current_config_file"):  # X-AnyLabeling's start names the file, which it writes if missing
        own_settings.current_config_file = os.path.join(os.environ["HOME"], ".xanylabelingrc")
    config = folder() / "config.yaml"
    settings = {**yaml.safe_load(config.read_text()), "config_file": str(Path(config).resolve())}
    model = SegmentAnything(settings, on_message=print)

    def segment(prompt: dict[str, Any]) -> np.ndarray:
        image = cv2.cvtColor(cv2.imread(prompt["picture"]), cv2.COLOR_BGR2RGB)  # as their own conversion from Qt's
        masks = model.model.predict_masks(model.model.encode(image), marks(prompt))
        assert shapes(model, prompt, image), "no polygon was drawn"
        return masks[0, 0] > 0

    answer(packages_distributions()["anylabeling"][0], segment)
    application.quit()


def shapes(model: SegmentAnything, prompt: dict[str, Any], image: np.ndarray) -> list:
    """Return the polygons that the program draws for a prompt on the picture."""
    from PyQt6.QtGui import QImage

    height, width = image.shape[:2]
    model.set_auto_labeling_marks(marks(prompt))
    picture = QImage(image.tobytes(), width, height, 3 * width, QImage.Format.Format_RGB888)
    return model.predict_shapes(picture, prompt["picture"]).shapes


if __name__ == "__main__":
    main()
