"""Where attention in Gluon is faster: made by bench/decide.py from bench/results, not edited."""

# 9.0, heads of 64, forward: 1.34 x at N 785, 1.38 x at N 1025, 1.26 x at N 1569, 1.18 x at N 3137, 1.24 x at N 6273
#   (nvidia-h200/attn.json of 70e84c0)
# 9.0, heads of 64, gradients: 1.39 x at N 785, 1.34 x at N 1569, 1.21 x at N 3137 (nvidia-h200/attn.json of 70e84c0)
# 9.0, heads of 128, forward: 1.16 x at N 785, 1.13 x at N 1569 (nvidia-h200/lab/wide-2bb54ce.json of 2bb54ce,
#   nvidia-h200/lab/wide-70e84c0.json of 70e84c0)
# 9.0, heads of 128, gradients: 1.04 x at N 785 (nvidia-h200/lab/wide-70e84c0.json of 70e84c0)

# (compute capability, head dim): the passes that are at least 1.05 x as fast at all of these lengths. A call
# that wants gradients asks for both.
GLUON = {
    ((9, 0), 64): ["forward", "gradients"],
    ((9, 0), 128): ["forward"],
}
