# GSM8K for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "gsm8k"
learning_rate = 1e-4
warmup_steps = 200
max_steps = 20_000
batch_size = 16
