"""The embedded nano model: its world, its training, its file, and what the file is held to.

Read in this order: `facts`, `tasks`, `corpus` (what it is taught); `batching`, `training_model`, `train`
(how); `quant`, `export`, `export_hf` (the file); `problems`, `behaviour`, `structure`, `evaluate`
(what it can do).
Importing the room brings in none of them.
"""
