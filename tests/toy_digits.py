"""A pipeline on a few handwritten digits: a teacher of width 4 and a student of width 2, seconds on one core."""

from pathlib import Path

from fmdistill import distill, recipe
from fmdistill.recipe import Recipe

TEACHER = """
out: {folder}/teacher
images: {{name: digits, train: 120, validation: 60, shard_size: 40}}
student: {{name: digits_resnet, width: 4}}
task: {{name: classify, statistics: digits}}
objective:
  label: {{output: logits, distance: {{name: cross_entropy}}, weighting: {{name: uniform}}}}
optimizer: {{name: sgd, lr: 0.05}}
schedule: {{name: steps}}
train: {{steps: 60, batch_size: 30, workers: 0, image_memory: 0.1, device: cpu, precision: fp32}}
"""
STUDENT = """
extends: {folder}/teacher.yaml
out: {folder}/student
teacher: {{name: classifier, network: {{name: digits_resnet, width: 4}}, weights: {folder}/teacher,
  statistics: digits, maps: [block2], device: cpu}}
cache: {{root: {folder}/cache, codec: fp32}}
student: {{width: 2}}
objective:
  kd: {{output: logits, distance: {{name: kd}}, weighting: {{name: uniform}}}}
train: {{steps: 8, log_every: 1}}
protocols: [{folder}/top1.yaml]
"""
TOP1 = "name: top1\nquartiles: true\nfrequency: true\nmany: 12\nfew: 11\n"


def write(folder: Path) -> tuple[Path, Path]:
    """Write the teacher's and the student's recipe and a protocol into `folder`; return the recipes' paths."""
    for name, text in (("teacher", TEACHER), ("student", STUDENT), ("top1", TOP1)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder / "teacher.yaml", folder / "student.yaml"


def trained(folder: Path) -> Recipe:
    """Train the teacher in `folder`; return the student's recipe."""
    teacher, student = write(folder)
    distill.run(recipe.load(teacher))
    return recipe.load(student)
