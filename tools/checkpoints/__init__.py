"""What make_checkpoint.py writes besides a Hugging Face folder: `.nemo` files as NeMo and Megatron-core write them."""
