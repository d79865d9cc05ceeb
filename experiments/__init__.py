"""What made docs/evidence.md: its runs and table, controls and ablations. Programs, each started by itself."""
