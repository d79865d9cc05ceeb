"""What tools/export.py is made of, no programs: student.py says what is exported, levels.py finds a scheduler for it,
lora.py makes a LoRA of it, card.py describes it.
"""
