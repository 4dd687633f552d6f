"""Name the tensors of SAM as ONNX files, in the layouts of the programs that load them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fmdistill.registry import UserError


@dataclass(frozen=True)
class SamLayout:
    """Names, types and frames of an encoder and a decoder.

    The encoder's input `image` is float32: normalised and zero-padded (1, 3, S, S), or with `raw` (H, W, 3) of 0..255.
    The decoder is segment_anything's (SamOnnxModel) with the stated differences, or with `batched` that of
    transformers: (B, P, N, 2) points, no mask input, three masks at low resolution.
    """

    encoder: str = "encoder.onnx"
    decoder: str = "decoder.onnx"
    image: str = "x"
    raw: bool = False
    canvas: tuple[int, int] | None = None  # (h, w) of the black canvas that the program draws every image on
    frame: int | None = None  # longest side in whose pixels points are given; None is the student's own
    mask_side: int | None = None  # of mask_input and low_res_masks; None is the student's own, 4 x the grid
    any_mask: bool = False  # mask_input has any side, and the graph resizes it
    padding: int | None = None  # of the program before it normalises; the graph puts SAM's zeros in its place
    pads: bool = False  # the graph adds SAM's padding point to clicks, since the program does not
    single: bool = False  # one mask, chosen by SamOnnxModel's rule, instead of four
    flag_shape: tuple[int, ...] = (1,)  # of has_mask_input; values are clamped to 0..1
    size: str = "orig_im_size"
    size_type: str = "float32"
    size_shape: tuple[int, ...] = (2,)
    masks: str = "masks"
    batched: bool = False

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "SamLayout":
        """Return the layout that an exported folder's JSON states. Raises UserError if it is another version's."""
        try:
            plain = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
            return cls(**plain)  # type: ignore[arg-type]
        except (TypeError, AttributeError):
            raise UserError(f"layout {stored!r}: not one of this version's; export the run again") from None

    def to_json(self) -> dict[str, Any]:
        """Return the fields, for an exported folder's JSON."""
        return asdict(self)

    def with_single(self, single: bool) -> "SamLayout":
        """Return the layout with one mask or four."""
        return replace(self, single=single)


ANYLABELING = (684, 1024)
LAYOUTS = {
    "onnx": SamLayout(),
    "anylabeling": SamLayout(image="input_image", raw=True, canvas=ANYLABELING, frame=1024, mask_side=256, single=True),
    "labelme": SamLayout(mask_side=256, single=True),
    "openvino": SamLayout(
        any_mask=True,
        padding=114,  # the mean of SAM's mean colour
        pads=True,
        flag_shape=(1, 1),
        size="orig_size",
        size_type="int64",
        size_shape=(1, 2),
        masks="upscaled_masks",
    ),
    "transformers": SamLayout(
        encoder="onnx/vision_encoder.onnx",
        decoder="onnx/prompt_encoder_mask_decoder.onnx",
        image="pixel_values",
        pads=True,
        batched=True,
    ),
}
