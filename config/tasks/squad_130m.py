# SQuAD 1.1 for the model of config/pause_130m.py [Goyal et al. 2023]; after config/finetune.py.
task = "squad"
learning_rate = 1e-4
warmup_steps = 400
max_steps = 40_000
batch_size = 16
