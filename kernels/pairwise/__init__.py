"""The pairwise losses in Triton: `panel.py` what all share, `sms.py` and `sms_recompute.py` max-margin, `contrast.py` log-sum-exp."""
