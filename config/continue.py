# Continued pretraining of the model in init_from, for config/standard.py or config/pause.py: can a model that was
# pretrained without pauses still learn to use them? 0.65 B tokens of OpenWebText, prepared with the model's tokenizer.
dataset = "openwebtext"
block_size = 1024

optimizer = "adamw"
learning_rate = 1e-4
min_lr_ratio = 0.1
decay = "cosine"
max_steps = 5_000
warmup_steps = 100
weight_decay = 0.1
batch_size = 128
micro_batch_size = 16

eval_interval = 500
eval_blocks = 512
checkpoint_interval = 500
