"""What the ops share: the table of backends, the registration of operators, and what is asked of a tensor."""
