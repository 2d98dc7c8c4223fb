# LAMBADA for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "lambada"
learning_rate = 5e-5
warmup_steps = 40
max_steps = 2800
batch_size = 16
