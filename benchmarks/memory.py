"""Measure what one training image keeps for the backward pass, in bf16: the figures by which `fmdistill init` sizes.

Run: python benchmarks/memory.py [recipe=recipes/sam/mobilesam.yaml]
Prints the GB of an image for each recipe that `fmdistill init` extends, or for one.
"""

import sys

import torch
from torch import Tensor, nn

from fmdistill import recipe
from fmdistill.distill import student
from fmdistill.pipeline.start import STARTS


def kept(model: nn.Module, side: int) -> float:
    """Return the bytes that autograd saves in one forward pass of an image (1, 3, side, side), weights left out."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(1, 3, side, side))
    return total if outputs else 0.0


def main(arguments: list[str]) -> None:
    """Print a line for each recipe."""
    stated = dict(argument.split("=", 1) for argument in arguments)
    works = {start.recipe: start.work for kind in STARTS.values() for start in kind.values()}
    for path in [stated["recipe"]] if "recipe" in stated else works:
        settings = {key: value for key, value in recipe.load(path).student.items() if key != "pretrained"}
        side = works[path].side
        print(f"{path}: {kept(student.build(settings), side) / 1e9:.3f} GB an image of {side} px", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
