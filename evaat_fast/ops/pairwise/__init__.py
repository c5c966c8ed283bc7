"""The pairwise losses, cut into max-margin (sms) and log-sum-exp (contrast) over one loop of panels.

`sms.py`, `contrast.py`: the public functions, which check a call and plan it. `reference.py`: the specification of all.
`relevancy.py`, `positives.py`: what is known of the pairs. `step.py`: the operators and their gradients. `panels.py`: the loop,
over a step of `cpu.py` or `triton.py`.
"""
