"""Every number of a model, its pre-training and its fine-tuning: frozen dataclasses and what they refuse.

A chapter is one group of the command line's help. What a field may hold is said at the field; here and in
``__post_init__`` stand the rules across fields.
"""

from ckl_jax.config.advantage import Algorithm as Algorithm
from ckl_jax.config.finetuning import FinetuneConfig as FinetuneConfig
from ckl_jax.config.finetuning import Recipe as Recipe
from ckl_jax.config.pretraining import PretrainConfig as PretrainConfig
from ckl_jax.config.pretraining import Scale as Scale
from ckl_jax.config.shape import Activation as Activation
from ckl_jax.config.shape import ModelConfig as ModelConfig
