"""What eval_vbench.py is made of: what VBench fixes and how its package is run, and metrics of our own."""
