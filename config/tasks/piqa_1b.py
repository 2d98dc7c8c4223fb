# PIQA for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "piqa"
learning_rate = 1e-6
warmup_steps = 50
max_steps = 600
batch_size = 32
