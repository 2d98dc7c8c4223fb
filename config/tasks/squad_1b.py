# SQuAD 1.1 for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "squad"
learning_rate = 1e-4
warmup_steps = 100
max_steps = 10_000
batch_size = 256
