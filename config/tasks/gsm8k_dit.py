# GSM8K as in Kim et al. 2025; after config/dit.py.
task = "gsm8k"
learning_rate = 1e-5
max_steps = 5321  # three epochs of the 7,095 examples that are not held out
batch_size = 4
