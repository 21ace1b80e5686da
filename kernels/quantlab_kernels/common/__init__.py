"""What every kernel room shares: the operator library, backends, hardware facts, tuning tables, timing, error bounds."""
