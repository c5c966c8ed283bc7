"""The pairwise losses, cut into max-margin (sms) and log-sum-exp (contrast) over one loop of panels.

`sms.py`, `contrast.py`: the public functions and their plans. `reference.py`: the specification of all. `relevancy.py`,
`positives.py`: what is known of the pairs. `step.py`: checks, operators, gradients and the loop. `ranks.py`: over a group.
`cpu.py`, `triton.py`: a step.
"""
