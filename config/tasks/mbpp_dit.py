# MBPP as in Kim et al. 2025; after config/dit.py.
task = "mbpp"
learning_rate = 3e-5
max_steps = 280  # three epochs of 374 examples
batch_size = 4
