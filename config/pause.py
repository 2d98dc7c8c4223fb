# Pause pretraining [Goyal et al. 2023, Algorithm 1]: a tenth as many pauses as tokens, at random places.
pause_rate = 0.1
