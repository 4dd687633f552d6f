"""Write images of `captioned` in clip_benchmark's format, and print the commands that must give the same accuracy.

    python benchmarks/clip_benchmark.py FOLDER RUN

RUN is a run that `fmdistill export RUN openclip FOLDER/model` can export, such as runs/mini/clip_mini.
clip_benchmark 1.6.2 needs numpy below 2.4, so install it in a separate environment.
"""

import io
import sys
import tarfile
from pathlib import Path

from fmdistill.mini.captioned import Captioned, class_names

TEMPLATES = ("a {}", "a picture of a {}", "a photo of a {}")


def main(folder: Path, run: str) -> None:
    """Write one image of each class as a webdataset with class names and templates, and print the commands to run."""
    source, shards = Captioned(train=1, validation=len(class_names()), seed=1000), folder / "test"
    shards.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shards / "0.tar", "w") as tar:
        for index in range(source.validation):
            image = source.encode("validation", index)
            for suffix, data in (("png", image.data), ("cls", str(image.label).encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (shards / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("zeroshot_classification")
    (folder / "classnames.txt").write_text("\n".join(class_names()))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    templates = "\n".join(template.replace("{}", "{c}") for template in TEMPLATES)
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    print(f"""fmdistill export {run} openclip {folder}/model
fmdistill evaluate eval/imagenet_zeroshot.yaml {run} images.name=tar images.root={shards} 'images.validation=[0.tar]' \\
    classnames={folder}/classnames.txt templates={folder}/templates.txt
clip_benchmark eval --pretrained_model local-dir:{folder}/model, --dataset wds/{folder} --dataset_root {folder} \\
    --task zeroshot_classification --no_amp --num_workers 0 --output {folder}/clip_benchmark.json""")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
