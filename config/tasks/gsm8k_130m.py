# GSM8K for the model of config/pause_130m.py [Goyal et al. 2023]; after config/finetune.py.
task = "gsm8k"
learning_rate = 1e-4
warmup_steps = 75
max_steps = 7500
batch_size = 16
