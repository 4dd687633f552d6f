"""Write images of `captioned` in clip_benchmark's format, and print the commands that must give the same accuracy.

    python benchmarks/clip_benchmark.py FOLDER RUN

RUN is a run that `fmdistill export RUN openclip FOLDER/model` can export, such as runs/mini/clip_mini. Two data sets
are written, of classes and of captions, and a protocol of the evaluator `clip_suite` for both.
clip_benchmark 1.6.2 needs numpy below 2.4, so install it in a separate environment.
"""

import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fmdistill.images import Encoded, captions
from fmdistill.mini.captioned import Captioned, class_names

TEMPLATES = ("a {c}", "a picture of a {c}", "a photo of a {c}")
SUITE = """name: clip_suite
root: {folder}
datasets:
  classes: {{metric: acc1}}
  captions: {{metric: mean_recall@1}}
workers: 0
"""


def main(folder: Path, run: str) -> None:
    """Write one image of each class, labelled and captioned, and print the commands to run."""
    source = Captioned(train=1, validation=len(class_names()), seed=1000)
    images = [source.encode("validation", index) for index in range(source.validation)]
    classes, captioned = folder / "classes", folder / "captions"
    write(classes, images, "cls", [str(image.label) for image in images])
    (classes / "classnames.txt").write_text("\n".join(class_names()))
    (classes / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    first = list({captions("", image)[0]: image for image in reversed(images)}.items())[::-1]  # no caption twice
    write(captioned, [image for _, image in first], "txt", [text for text, _ in first])
    (captioned / "dataset_type.txt").write_text("retrieval")
    (folder / "suite.yaml").write_text(SUITE.format(folder=folder))
    print(f"""fmdistill export {run} openclip {folder}/model
fmdistill evaluate {folder}/suite.yaml {run}
for name in classes captions; do clip_benchmark eval --pretrained_model local-dir:{folder}/model, \\
    --dataset wds/$name --dataset_root {folder}/$name --recall_k 1 5 10 --no_amp --num_workers 0 \\
    --task $([ $name = classes ] && echo zeroshot_classification || echo zeroshot_retrieval) \\
    --output {folder}/$name.json; done""")


def write(folder: Path, images: Sequence[Encoded], suffix: str, annotations: Sequence[str]) -> None:
    """Write images with their annotations in KEY.`suffix`, half of them in each of two tars."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test/nshards.txt").write_text("2")
    half = len(images) // 2
    for number, part in enumerate((range(half), range(half, len(images)))):
        with tarfile.open(folder / f"test/{number}.tar", "w") as tar:
            for index in part:
                for ending, data in (("png", images[index].data), (suffix, annotations[index].encode())):
                    member = tarfile.TarInfo(f"s{index:07d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
