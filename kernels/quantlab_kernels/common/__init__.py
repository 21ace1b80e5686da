"""What the kernel rooms share: the operator library, backends, hardware facts, tuning tables, timing, error bounds."""
