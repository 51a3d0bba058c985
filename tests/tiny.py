"""The model of the tests' tiny profiles: a whole fine-tune takes a second."""

MODEL = """
[model]
d_model = 32
n_layers = 4
n_experts = 2
d_ff = 32
d_state = 4
dt_rank = 4
vocab_size = 300
"""
