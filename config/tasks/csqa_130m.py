# CommonsenseQA for the model of config/pause_130m.py [Goyal et al. 2023]; after config/finetune.py.
task = "csqa"
learning_rate = 5e-5
warmup_steps = 100
max_steps = 6000
batch_size = 16
