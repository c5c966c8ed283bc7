"""joint_attention: 3-D RoPE and softmax attention over all tokens of a clip.

attn.py       the public functions: a call is checked, planned, and handed to torch's attention or a backend
plan.py       what a call is besides its tensors, and the check of that
reference.py  the specification
layout.py     what keeps the gradients of torch's attention right on CUDA
fused.py      the passes of kernels/attn, Gluon's and Triton's, as operators
clips.py      packed clips for torch's; flops.py: FLOPs
"""
