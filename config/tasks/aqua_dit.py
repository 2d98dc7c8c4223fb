# AQuA-RAT as in Kim et al. 2025; after config/dit.py.
task = "aqua"
learning_rate = 3e-5
max_steps = 73_100  # three epochs of 97,467 examples
batch_size = 4
