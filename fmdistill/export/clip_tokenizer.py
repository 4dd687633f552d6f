"""Write a CLIP's tokenizer as tokenizer.json and tokenizer_config.json, which other programs read."""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy.chardata as ftfy_tables
import numpy as np
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from fmdistill.files import write_whole
from fmdistill.registry import UserError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Of HTML's 2,231 entities those that texts contain; &amp; first, since open_clip replaces entities twice.
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " "}
# open_clip's expression; it ignores case, for which JavaScript's expressions have no sign.
WORDS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write(tokenizer: Any, model_cfg: Mapping[str, Any], folder: Path, pad: str | None = None) -> None:
    """Write both files of an open_clip tokenizer into `folder`; `pad` names another padding token than its own.

    Raises UserError if a tokenizer of transformers has no tokenizer.json or no padding token, or if the tokenizer drops
    tokens at random, which no file can state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)
        _check_saved(folder)
        return
    kwargs = model_cfg["text_cfg"].get("tokenizer_kwargs", {})
    if kwargs.get("reduction_mask"):
        raise UserError(
            f"tokenizer_kwargs.reduction_mask={kwargs['reduction_mask']}: the teacher's tokenizer drops tokens of long "
            f"texts, which a {FILE} cannot state; export with the format openclip"
        )
    padding = tokenizer.decoder[0] if pad is None else pad
    write_whole(
        folder / FILE, json.dumps(_simple(tokenizer, kwargs.get("clean", "lower"), padding), ensure_ascii=False) + "\n"
    )
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": padding,
        "clean_up_tokenization_spaces": False,
    }
    write_whole(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def end_token(tokenizer: Any) -> str | None:
    """Return the text of the end token of OpenAI's tokenizer, or None for a tokenizer of transformers."""
    return None if isinstance(tokenizer, HFTokenizer) else tokenizer.decoder[tokenizer.eot_token_id]


def tokenize(folder: Path, texts: Sequence[str], context_length: int, canonicalize: bool = False) -> np.ndarray:
    """Return ids int64 (L, context_length) by the files in `folder`, as immich and transformers.js read them.

    `canonicalize` removes punctuation first, as immich does if the model's configuration states it. Raises UserError if
    the package tokenizers is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f"a {FILE} is read by the package tokenizers; pip install 'fmdistill[onnx]'") from None
    opened = Tokenizer.from_file(str(folder / FILE))
    pad = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    opened.enable_padding(length=context_length, pad_token=pad, pad_id=opened.token_to_id(pad))
    opened.enable_truncation(max_length=context_length)
    if canonicalize:
        texts = [text.translate(str.maketrans("", "", string.punctuation)).lower() for text in texts]
    return np.array([opened.encode(" ".join(text.split())).ids for text in texts], np.int64)


def _check_saved(folder: Path) -> None:
    if not (folder / FILE).is_file():
        raise UserError(
            f"the teacher's tokenizer has no fast form, so no {FILE} can be written; use the format openclip"
        )
    if not json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("pad_token"):
        raise UserError("the teacher's tokenizer has no padding token (pad_token); use the format openclip")


def _simple(tokenizer: SimpleTokenizer, clean: str, pad: str) -> dict[str, Any]:
    """Return the tokenizer.json of OpenAI's byte-pair encoding, made from open_clip's own tables."""
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    special = [tokenizer.decoder[i] for i in tokenizer.all_special_ids]
    length = {"max_length": tokenizer.context_length, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": tokenizer.context_length}, "direction": "Right", "pad_to_multiple_of": None}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": length,
        "padding": {**padding, "pad_id": tokenizer.encoder[pad], "pad_type_id": 0, "pad_token": pad},
        "added_tokens": [{"id": tokenizer.encoder[text], "content": text, **flags} for text in special],
        "normalizer": {"type": "Sequence", "normalizers": _cleaning(clean)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [tokenizer.decoder[end], end],
            "cls": [tokenizer.decoder[start], start],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.decoder[end],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": tokenizer.encoder,
            "merges": [" ".join(pair) for pair in tokenizer.bpe_ranks],
        },
    }


def _cleaning(clean: str) -> list[dict[str, Any]]:
    """Return the normalizers that do what open_clip's cleaning does with ftfy, entities, spaces and case."""
    steps = [*(_replace(entity, char) for entity, char in ENTITIES.items())]
    for table in (ftfy_tables.LIGATURES, ftfy_tables.WIDTH_MAP):
        steps += [_replace(chr(code), text) for code, text in table.items()]
    steps += [
        _replace_any(ftfy_tables.SINGLE_QUOTE_RE.pattern, "'"),
        _replace_any(ftfy_tables.DOUBLE_QUOTE_RE.pattern, '"'),
        _replace_any("[" + "".join(rf"\u{code:04X}" for code in ftfy_tables.CONTROL_CHARS) + "]", ""),
        {"type": "NFC"},
    ]
    if clean == "canonicalize":
        punctuation = "".join(rf"\u{ord(char):04X}" for char in string.punctuation if char != "_")
        steps += [_replace("_", " "), _replace_any(f"[{punctuation}]", "")]
    steps += [_replace_any(r"\s+", " "), {"type": "Strip", "strip_left": True, "strip_right": True}]
    return steps if clean == "whitespace" else [*steps, {"type": "Lowercase"}]


def _replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _replace_any(regex: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": by}
