"""Analysis and schedules of TIR functions."""
