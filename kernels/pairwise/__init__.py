"""The pairwise losses in Triton: max-margin (`sms.py`) and log-sum-exp (`contrast.py`) over `panel.py`."""
