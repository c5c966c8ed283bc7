"""Kernels to drop into other code: needs torch, and nothing else of this package's model, data or trainer.

>>> from evaat_fast import ops
>>> q, k = ops.rope3d(q, k, grid=(4, 14, 14))
"""

from evaat_fast.ops.attn.attn import joint_attention, joint_attention_qkv_
from evaat_fast.ops.attn.flops import register_flop_formulas
from evaat_fast.ops.norm.norm import add_norm, swiglu_norm
from evaat_fast.ops.pairwise.contrast import clip_loss, ego_nce_loss
from evaat_fast.ops.pairwise.positives import VerbNounPositives
from evaat_fast.ops.pairwise.relevancy import DenseRelevancy, IndexedRelevancy, VerbNounRelevancy, quantize_relevancy
from evaat_fast.ops.pairwise.sms import adaptive_mi_mm_loss, mi_mm_loss, sms_loss
from evaat_fast.ops.patchify.patchify import patchify
from evaat_fast.ops.rope3d.rope3d import joint_freqs, rope3d, rope3d_, rope3d_qkv_, spatial_freqs, split_freqs

__all__ = [
    "DenseRelevancy",
    "IndexedRelevancy",
    "VerbNounPositives",
    "VerbNounRelevancy",
    "adaptive_mi_mm_loss",
    "add_norm",
    "clip_loss",
    "ego_nce_loss",
    "joint_attention",
    "joint_attention_qkv_",
    "joint_freqs",
    "mi_mm_loss",
    "patchify",
    "quantize_relevancy",
    "register_flop_formulas",
    "rope3d",
    "rope3d_",
    "rope3d_qkv_",
    "sms_loss",
    "spatial_freqs",
    "split_freqs",
    "swiglu_norm",
]
