# LAMBADA for the model of config/pause_130m.py [Goyal et al. 2023]; after config/finetune.py.
task = "lambada"
learning_rate = 5e-5
warmup_steps = 40
max_steps = 1400
batch_size = 16
