"""What eval_vbench.py is made of: VBench's constants and scorer, folder, sampling, our metrics, report, ledger."""
