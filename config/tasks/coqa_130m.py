# CoQA for the model of config/pause_130m.py [Goyal et al. 2023]; after config/finetune.py.
task = "coqa"
learning_rate = 1e-4
warmup_steps = 75
max_steps = 3500
batch_size = 16
