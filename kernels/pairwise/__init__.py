"""The pairwise losses in Triton: max-margin (`sms.py`, `sms_recompute.py`) and log-sum-exp (`contrast.py`) over `panel.py`."""
