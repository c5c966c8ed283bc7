"""Weights in and out: our own files, and those of EVA, timm, open_clip, OpenAI, AVION and LaViLa.

    load_checkpoint(model, "EVA02_CLIP_B_psz16_s8B.pt", fresh_heads=True)     # image weights, inflated to clips
    save_checkpoint(model, "model.safetensors")
    convert("avion_pretrain.pt", "model.safetensors")                         # and back, with to="avion"

`files` reads and writes, `layouts` knows everybody's names, `fit` resizes what depends on frames, pictures and captions, `load`
puts a state dict into a model, `convert` goes from file to file. Loading is strict: what does not fit is an error with a table.
What may differ and is converted: the number of frames, the size of the patch grid, the length of texts, and, for weights of
others, the width of the embedding space (its two projections then start fresh, as EVA02-AT's do).
"""

from evaat_fast.model.checkpoints.convert import Converted, convert
from evaat_fast.model.checkpoints.files import Stored, download, read, read_checkpoint, save_checkpoint
from evaat_fast.model.checkpoints.fit import inflate
from evaat_fast.model.checkpoints.layouts import LAYOUTS, convert_state, export_state, implied
from evaat_fast.model.checkpoints.load import Report, check_config, config_of, load_checkpoint, load_state

__all__ = [
    "LAYOUTS",
    "Converted",
    "Report",
    "Stored",
    "check_config",
    "config_of",
    "convert",
    "convert_state",
    "download",
    "export_state",
    "implied",
    "inflate",
    "load_checkpoint",
    "load_state",
    "read",
    "read_checkpoint",
    "save_checkpoint",
]
