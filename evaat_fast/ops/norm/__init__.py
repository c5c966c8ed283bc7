"""add_norm and swiglu_norm: the layer norms of a transformer, each fused with what stands before it.

norm.py       the public functions: a call is checked, and handed to the specification or to kernels
reference.py  the specification, which torch.compile fuses with what stands around it
function.py   what kernels read and write, and autograd around it
triton.py     Triton's kernels (kernels/norm)
cpu.py        those in C++ (csrc/norm)
"""
