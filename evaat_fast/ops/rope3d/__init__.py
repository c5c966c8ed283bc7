"""rope3d: rotary embedding of queries and keys at space-time positions, each read and written once.

rope3d.py      the public functions, and the check of a call
rotation.py    what a rotation is besides the tensors it turns, and the check of it
reference.py   the specification
freqs.py       frequencies; table.py: the cosines and sines made from them
rotate.py      the operators and what autograd keeps; native.py: their C++ and CUDA kernels (Triton's: kernels/rope3d)
"""
